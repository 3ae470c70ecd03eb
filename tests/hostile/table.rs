//! The list and the tests that answer for it: each case has its tests, each label its case; and the table of both.
//!
//! With `VHOST_USER_NET_RESULTS` naming what `cargo test` printed (`-`: standard input), the table says what became of
//! each case; else, which tests there are. `resources/run-tests.sh` prints it at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::times;
use crate::list::{Answer, ROWS, Row};

/// A test, as the harness names it: its binary, and its path there.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Test {
    binary: String,
    path: String,
}

impl Test {
    fn name(&self) -> &str {
        self.path.rsplit("::").next().unwrap_or_default()
    }
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("common") {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The binary that a file is a part of, and the file's module in it.
fn place_of(file: &Path, tests: &Path) -> (String, String) {
    let inner = file.strip_prefix(tests).unwrap().with_extension("");
    let parts: Vec<_> = inner.iter().map(|part| part.to_str().unwrap()).collect();
    let modules = parts[1..].iter().filter(|part| **part != "main" && **part != "mod");
    (parts[0].to_owned(), modules.map(|module| format!("{module}::")).collect())
}

/// The ids among the words of a line of documentation.
fn ids_in(line: &str) -> Vec<&str> {
    let words = line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
    words.filter(|word| is_id(word)).collect()
}

fn is_id(word: &str) -> bool {
    let Some((table, case)) = word.split_once('-') else { return false };
    let is_number = case.len() == 2 && case.bytes().all(|byte| byte.is_ascii_digit());
    let is_name = case.len() > 3 && case.bytes().all(|byte| byte.is_ascii_uppercase());
    match table {
        "R" => is_name,
        _ => table.len() == 1 && "UQTHGNFCDIPME".contains(table) && is_number,
    }
}

/// Every label in front of a test, with its tests.
fn labels() -> BTreeMap<String, BTreeSet<Test>> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut sources = Vec::new();
    files(&tests, &mut sources);
    let mut labels: BTreeMap<String, BTreeSet<Test>> = BTreeMap::new();
    for file in sources {
        let (binary, module) = place_of(&file, &tests);
        let mut ids: Vec<String> = Vec::new();
        let mut is_test = false;
        for line in fs::read_to_string(&file).unwrap().lines().map(str::trim) {
            if let Some(text) = line.strip_prefix("///") {
                ids.extend(ids_in(text).into_iter().map(str::to_owned));
            } else if line == "#[test]" {
                is_test = true;
            } else if !line.starts_with("#[") {
                let name = line.strip_prefix("fn ").and_then(|rest| rest.split('(').next());
                if let Some(name) = name.filter(|_| is_test) {
                    let test = Test { binary: binary.clone(), path: format!("{module}{name}") };
                    ids.drain(..).for_each(|id| _ = labels.entry(id).or_default().insert(test.clone()));
                }
                assert!(ids.is_empty(), "{}: {ids:?} stand before no test but {line:?}", file.display());
                is_test = false;
            }
        }
    }
    labels
}

/// What became of each test, as the harness printed it.
#[derive(Default)]
struct Results {
    /// `ok`, `FAILED`, `ignored`, by binary and path.
    ended: BTreeMap<Test, String>,
    /// Why tests did nothing, by name.
    skipped: BTreeMap<String, String>,
}

fn results_in(log: &str) -> Results {
    let mut results = Results::default();
    let mut binary = String::new();
    for line in log.lines() {
        if let Some(path) = line.trim_start().strip_prefix("Running tests/") {
            let file = Path::new(path.split(' ').next().unwrap());
            binary = place_of(&Path::new("tests").join(file), Path::new("tests")).0;
        } else if let Some((name, why)) = line.split_once("SKIPPED: ").and_then(|(_, rest)| rest.split_once(": ")) {
            results.skipped.insert(name.to_owned(), why.to_owned());
        } else if let Some((path, end)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            let test = Test { binary: binary.clone(), path: path.to_owned() };
            results.ended.insert(test, end.split(' ').next().unwrap_or_default().to_owned());
        }
    }
    results
}

/// What became of a case: `pass` only where every test of it ran and passed.
fn verdict(row: &Row, tests: &BTreeSet<Test>, results: &Results) -> String {
    let mut all = tests.iter();
    if let Some(failed) = all.find(|test| results.ended.get(test).is_some_and(|end| end != "ok")) {
        return format!("FAILED: {}", failed.path);
    }
    if let Some(absent) = tests.iter().find(|test| !results.ended.contains_key(test)) {
        return format!("not run: {} was not", absent.path);
    }
    if let Some(why) = tests.iter().find_map(|test| results.skipped.get(test.name())) {
        return format!("not run: {why}");
    }
    match row.answer {
        Answer::Tested => "pass".to_owned(),
        Answer::Absent => "not offered, and refused".to_owned(),
        Answer::NotRun(why) => format!("not run: {why}"),
    }
}

#[test]
fn every_case_is_listed_once_and_has_its_tests() {
    let labels = labels();
    let listed: BTreeSet<_> = ROWS.iter().map(|row| row.id).collect();
    assert_eq!(listed.len(), ROWS.len(), "An id is listed twice");
    assert!(listed.iter().all(|id| is_id(id)), "An id that no label can have");
    assert_eq!(listed.len(), 208);
    let unknown: Vec<_> = labels.keys().filter(|id| !listed.contains(id.as_str())).collect();
    assert!(unknown.is_empty(), "Labels without a row in the list: {unknown:?}");
    let untested = ROWS.iter().filter(|row| !matches!(row.answer, Answer::NotRun(_)) && !labels.contains_key(row.id));
    let untested: Vec<_> = untested.map(|row| row.id).collect();
    assert!(untested.is_empty(), "Rows without a test whose documentation names them: {untested:?}");
}

#[test]
fn table_of_the_cases() {
    let labels = labels();
    let none = BTreeSet::new();
    let log = std::env::var_os("VHOST_USER_NET_RESULTS").map(|path| {
        if path == "-" { std::io::read_to_string(std::io::stdin()).unwrap() } else { fs::read_to_string(path).unwrap() }
    });
    let results = log.as_deref().map(results_in);
    let mut passed = 0;
    for row in ROWS {
        let tests = labels.get(row.id).unwrap_or(&none);
        let seen = match &results {
            Some(results) => verdict(row, tests, results),
            None => match row.answer {
                Answer::NotRun(why) => format!("not run: {why}"),
                _ => tests.iter().map(|test| format!("{}::{}", test.binary, test.path)).collect::<Vec<_>>().join(" "),
            },
        };
        passed += usize::from(seen == "pass");
        println!("| {:8} | {} | {} | {seen}", row.id, row.input, row.wanted);
    }
    if results.is_some() {
        let how = ["; what takes long was done less often than listed, see --full", ""][times(0, 1) as usize];
        println!("| {passed} of {} passed{how}", ROWS.len());
    }
}

#[test]
fn only_what_ran_and_passed_counts_as_passed() {
    let log = "\
     Running tests/session/main.rs (target/debug/deps/session-1)
test card::good ... ok
test card::bad ... FAILED
SKIPPED: skipped: needs root
test card::skipped ... ok
     Running tests/header.rs (target/debug/deps/header-1)
test elsewhere ... ok
";
    let results = results_in(log);
    let test = |binary: &str, path: &str| Test { binary: binary.to_owned(), path: path.to_owned() };
    let good = test("session", "card::good");
    let seen = |tests: &[Test], answer| {
        let row = Row { id: "U-01", input: "", wanted: "", answer };
        verdict(&row, &tests.iter().cloned().collect(), &results)
    };
    assert_eq!(seen(&[good.clone(), test("header", "elsewhere")], Answer::Tested), "pass");
    assert_eq!(seen(std::slice::from_ref(&good), Answer::Absent), "not offered, and refused");
    assert_eq!(seen(std::slice::from_ref(&good), Answer::NotRun("a reason")), "not run: a reason");
    assert_eq!(seen(&[good.clone(), test("session", "card::bad")], Answer::Tested), "FAILED: card::bad");
    assert_eq!(seen(&[good.clone(), test("session", "card::skipped")], Answer::Tested), "not run: needs root");
    assert_eq!(seen(&[good, test("session", "elsewhere")], Answer::Tested), "not run: elsewhere was not");
}
