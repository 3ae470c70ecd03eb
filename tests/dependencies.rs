//! What the program is built from: each dependency says in `Cargo.toml` why it is there, and the bill of materials
//! (`resources/sbom.sh`) names exactly what is built in.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::skip;
use serde_json::Value;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The dependencies of a manifest that no comment stands above. Neighbours of one family (`netlink-…`) share one.
fn unexplained(manifest: &str) -> (usize, Vec<String>) {
    let (mut in_dependencies, mut count) = (false, 0);
    let mut unexplained = Vec::new();
    // Whether a comment stands right above, and what it was said of.
    let (mut is_explained, mut family) = (false, String::new());
    for line in manifest.lines() {
        let name = line.split_once('=').map(|(name, _)| name.trim());
        match name {
            _ if line.starts_with('[') => in_dependencies = line.contains("dependencies"),
            _ if line.starts_with('#') => (is_explained, family) = (line.len() > "# ".len(), String::new()),
            // Not the inside of a list that is broken over lines.
            Some(name) if in_dependencies && !line.starts_with([' ', ']', '}']) => {
                let own_family = name.split('-').next().unwrap();
                count += 1;
                if !(is_explained || family == own_family) {
                    unexplained.push(name.to_owned());
                } else {
                    own_family.clone_into(&mut family);
                }
                is_explained = false;
            }
            _ => {}
        }
    }
    (count, unexplained)
}

#[test]
fn every_dependency_says_why_it_is_there() {
    let manifest = read("Cargo.toml");
    let (count, unexplained) = unexplained(&manifest);
    assert!(unexplained.is_empty(), "why is there {unexplained:?}?");
    let metadata = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    assert_eq!(count, metadata["packages"][0]["dependencies"].as_array().unwrap().len(), "The test sees all of them");
}

#[test]
fn dependency_without_a_comment_is_seen() {
    let explained =
        "[package]\nname = \"a\"\n[dependencies]\n# Why.\nb-one = { features = [\n    \"x\",\n] }\nb-two = \"1\"\n";
    assert_eq!(unexplained(explained), (2, vec![]));
    for line in ["c = \"1\"", "#\nc = \"1\"", "[dev-dependencies]\nc = \"1\""] {
        assert_eq!(unexplained(&format!("{explained}{line}\n")).1, ["c"], "{line}");
    }
}

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn bill_of_materials_names_what_is_built_in() {
    if Command::new("jq").arg("--version").output().is_err() {
        return skip("bill_of_materials_names_what_is_built_in", "there is no jq");
    }
    let printed = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/sbom.sh")).output().unwrap();
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let bill: Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!((&bill["bomFormat"], &bill["specVersion"]), (&"CycloneDX".into(), &"1.5".into()));
    let program = &bill["metadata"]["component"];
    assert_eq!((&program["name"], &program["version"]), (&"vhost-user-net".into(), &env!("CARGO_PKG_VERSION").into()));

    let components = bill["components"].as_array().unwrap();
    let named: BTreeSet<_> = components.iter().chain([program]).map(|part| text(&part["purl"]).to_owned()).collect();
    assert_eq!(named.len(), components.len() + 1, "none twice");
    let tree = cargo(&["tree", "--locked", "--edges", "normal,build", "--prefix", "none", "--format", "{p}"]);
    // "name v1.2.3 (proc-macro)"
    let purl_of = |line: &str| {
        let mut words = line.split_whitespace();
        Some(format!("pkg:cargo/{}@{}", words.next()?, words.next()?.strip_prefix('v')?))
    };
    assert_eq!(named, tree.lines().filter_map(purl_of).collect());

    let lock = read("Cargo.lock");
    for part in components {
        let entry = format!("name = \"{}\"\nversion = \"{}\"\n", text(&part["name"]), text(&part["version"]));
        let entry = lock.split("[[package]]\n").find(|package| package.starts_with(&entry)).unwrap();
        let sum = text(&part["hashes"][0]["content"]);
        assert!(sum.len() == 64 && entry.contains(sum), "{part}");
        assert_ne!(text(&part["licenses"][0]["expression"]), "NOASSERTION", "{part}");
    }
    let edges = bill["dependencies"].as_array().unwrap();
    assert!(edges.iter().all(|edge| named.contains(text(&edge["ref"]))) && edges.len() == named.len());
    let targets = edges.iter().flat_map(|edge| edge["dependsOn"].as_array().unwrap());
    assert!(targets.map(text).all(|target| named.contains(target)));
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}
