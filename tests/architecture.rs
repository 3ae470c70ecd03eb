//! `docs/architecture.md` against the source: what it names is there, and what is there it names.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a screen, generously.
const SCREEN: usize = 70;
/// Files that a frame may pass through in one direction.
const PATH_FILES: usize = 7;
/// The places that may hold unsafe code.
const DOORS: [&str; 5] = [
    "src/virtqueue/iovec.rs",
    "src/device/ioctl.rs",
    "src/device/uring.rs",
    "src/device/mmsg.rs",
    "src/memory/guard.rs",
];

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn document() -> String {
    read("docs/architecture.md")
}

fn sources() -> BTreeSet<String> {
    fn collect(dir: PathBuf, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(path, found);
            } else {
                let path = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
                found.insert(path.to_str().unwrap().to_owned());
            }
        }
    }
    let mut found = BTreeSet::new();
    collect(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found
}

/// The words in backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The cells of the path's table for one direction (1 is tx, 2 is rx).
fn path_column(document: &str, column: usize) -> String {
    let table = document.split("## A frame's path").nth(1).unwrap().split("## Code map").next().unwrap();
    let rows = table.lines().filter(|line| line.starts_with('|'));
    rows.map(|row| row.split('|').nth(column + 1).unwrap()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_function_on_a_frames_path_exists_in_its_file() {
    for column in [1, 2] {
        let cells = path_column(&document(), column);
        let mut file = None;
        let mut functions = 0;
        for word in quoted(&cells) {
            if word.starts_with("src/") {
                file = Some(read(word));
            } else {
                let source = file.as_ref().expect("a file is named before its functions");
                assert!(
                    source.contains(&format!("fn {word}(")) || source.contains(&format!("fn {word}<")),
                    "there is no function {word} in the file named before it"
                );
                functions += 1;
            }
        }
        assert!(functions >= 8, "only {functions} functions were found in column {column}");
    }
}

#[test]
fn frames_path_has_at_most_seven_files_each_way() {
    for column in [1, 2] {
        let cells = path_column(&document(), column);
        let files: BTreeSet<_> = quoted(&cells).into_iter().filter(|word| word.starts_with("src/")).collect();
        assert!(files.len() <= PATH_FILES, "{files:?}");
    }
}

#[test]
fn document_fits_a_screen_and_names_every_source_file() {
    let document = document();
    assert!(document.lines().count() <= SCREEN, "{} lines", document.lines().count());
    let named: BTreeSet<_> = quoted(&document).into_iter().collect();
    for path in sources() {
        let name = path.rsplit('/').next().unwrap();
        let is_part = name == "mod.rs" || name == "tests.rs";
        assert!(is_part || named.contains(path.as_str()) || named.contains(name), "{path} is not in the code map");
    }
}

#[test]
fn unsafe_code_stands_behind_the_doors_only() {
    for path in sources() {
        let source = read(&path);
        let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
        let has_unsafe = code.into_iter().any(|line| line.contains("unsafe {") || line.contains("unsafe impl"));
        assert_eq!(has_unsafe, DOORS.contains(&path.as_str()), "{path}");
    }
}

#[test]
fn unsafe_code_is_little_and_each_site_says_why_it_is_sound() {
    /// How many there may be.
    const SITES: usize = 30;
    let mut sites = 0;
    for path in sources() {
        let source = read(&path);
        let lines: Vec<_> = source.lines().map(str::trim_start).collect();
        for (at, line) in lines.iter().enumerate() {
            if line.starts_with("//") || !(line.contains("unsafe {") || line.contains("unsafe impl")) {
                continue;
            }
            sites += 1;
            let reason = lines[..at].iter().rev().take_while(|line| line.starts_with("//"));
            // A call that is broken over lines may begin a line or two above its `unsafe`.
            let near = lines[at.saturating_sub(3)..at].iter();
            let says_why = reason.chain(near).any(|line| line.starts_with("// SAFETY: "));
            assert!(says_why, "{path}:{}: {line}", at + 1);
        }
    }
    assert!(sites <= SITES, "{sites} unsafe sites");
    assert!(sites > 0, "The test sees them");
}
