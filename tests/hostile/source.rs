//! What the source must not have, whatever it is used for.

use std::fs;
use std::path::Path;

/// The sources of the library and the command, each with its code: without comments.
fn sources() -> Vec<(String, String)> {
    fn collect(dir: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else {
                let text = fs::read_to_string(&path).unwrap();
                let code: Vec<_> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
                found.push((path.display().to_string(), code.join("\n")));
            }
        }
    }
    let mut found = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 50, "The source is not where it was");
    found
}

fn assert_nowhere(words: &[&str]) {
    for (path, code) in sources() {
        let named: Vec<_> = words.iter().filter(|word| code.contains(**word)).collect();
        assert!(named.is_empty(), "{path} has {named:?}");
    }
}

/// M-01: these copy guest memory byte by byte, so that an index could be read half before and half after it changed.
#[test]
fn no_word_of_guest_memory_is_read_byte_by_byte() {
    assert_nowhere(&["read_obj", "write_obj", "read_volatile", "copy_nonoverlapping"]);
    let (_, rings) = sources().into_iter().find(|(path, _)| path.ends_with("virtqueue/split.rs")).unwrap();
    assert!(rings.contains("atomic"), "Ring words are atomic ones");
}

/// P-14: every wait is by the clock that does not jump.
#[test]
fn no_wait_depends_on_the_clock_of_day() {
    assert_nowhere(&["SystemTime", "CLOCK_REALTIME", "Realtime"]);
    assert!(sources().iter().any(|(_, code)| code.contains("Instant::now")), "There are waits");
}
