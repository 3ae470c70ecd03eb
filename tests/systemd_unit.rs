//! The systemd units against systemd's own judgement. Needs systemd-analyze, and says SKIPPED aloud without.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::Path;
use std::process::Command;

use clap::Parser;
use common::skip;
use vhost_user_net::cli::Cli;
use vhost_user_net::config::Config;

const UNIT: &str = "resources/systemd/vhost-user-net@.service";

fn text() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(UNIT)).unwrap()
}

#[test]
fn unit_exposes_little() {
    const TEST: &str = "unit_exposes_little";
    const MOST: f64 = 1.0;
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--offline=true", "--no-pager", UNIT]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let Ok(output) = command.output() else { return skip(TEST, "there is no systemd-analyze (Debian: systemd)") };
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if said.contains("unrecognized option") || said.contains("Unknown system call") {
        return skip(TEST, "this systemd-analyze is too old");
    }
    let level = said.split("Overall exposure level for").nth(1).and_then(|rest| rest.split(": ").nth(1));
    let level: f64 = level.and_then(|rest| rest.split(' ').next()).and_then(|level| level.parse().ok()).expect(&said);
    assert!(level <= MOST, "{level}: {said}");
    assert!(!said.contains("ignoring"), "{said}");
}

#[test]
fn units_command_line_is_one() {
    let text = text();
    let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let line = line.replace("%i", "tap0").replace("$ARGS", "--socket-mode=0660");
    let config = Config::try_from(Cli::try_parse_from(line.split(' ')).unwrap()).unwrap();
    // Whoever restarts a process is not told of its end by one that waits.
    assert_eq!(config.host.on_loss, vhost_user_net::host_side::OnLoss::Exit);
    assert!(text.contains("Restart=always"));
}
