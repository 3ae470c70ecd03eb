//! The systemd units against systemd's own judgement. Needs systemd-analyze, and says SKIPPED aloud without.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::Path;
use std::process::Command;

use clap::Parser;
use common::backend::{Spawned, arg};
use common::netns::{NetNs, require_root};
use common::skip;
use vhost_user_net::cli::Cli;
use vhost_user_net::config::Config;

const UNIT: &str = "resources/systemd/vhost-user-net@.service";
const PASSED: &str = "resources/systemd/vhost-user-net-passed@.service";
const TAP: &str = "resources/systemd/vhost-user-net-tap@.service";
/// Where the program is installed.
const PROGRAM: &str = "/usr/local/bin/vhost-user-net";

fn text(unit: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(unit)).unwrap()
}

#[test]
fn unit_exposes_little() {
    exposes_at_most("unit_exposes_little", UNIT, 1.0);
}

#[test]
fn unit_that_is_passed_its_device_exposes_less() {
    exposes_at_most("unit_that_is_passed_its_device_exposes_less", PASSED, 0.5);
}

/// Settings that no systemd knows, in a wrong section, or of a wrong form.
#[test]
fn units_are_what_systemd_takes() {
    const TEST: &str = "units_are_what_systemd_takes";
    // What it runs, and the manual, are not installed where it is built.
    let dir = tempfile::TempDir::new().unwrap();
    let paths = [UNIT, PASSED, TAP].map(|unit| {
        let path = dir.path().join(Path::new(unit).file_name().unwrap().to_str().unwrap().replace('@', "@tap0"));
        let text = text(unit).replace(PROGRAM, "/bin/true");
        let lines = text.lines().filter(|line| !line.starts_with("Documentation="));
        std::fs::write(&path, lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        path
    });
    // What has to be complained of shows that it looks: its status does not, which others' units have a part in.
    let wrong = dir.path().join("wrong.service");
    std::fs::write(&wrong, "[Service]\nExecStart=/bin/true\nNoSuchSetting=yes\n").unwrap();
    let Ok(output) = Command::new("systemd-analyze").arg("verify").args(paths).arg(&wrong).output() else {
        return skip(TEST, "there is no systemd-analyze (Debian: systemd)");
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.lines().any(|line| line.contains("wrong.service") && line.contains("NoSuchSetting")), "{said}");
    // Of others' units it has its words too.
    let ours = said.lines().filter(|line| line.contains("vhost-user-net") && !line.contains("OpenFile"));
    assert_eq!(ours.count(), 0, "{said}");
}

fn exposes_at_most(test: &str, unit: &str, most: f64) {
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--offline=true", "--no-pager", unit]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let Ok(output) = command.output() else { return skip(test, "there is no systemd-analyze (Debian: systemd)") };
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if said.contains("unrecognized option") || said.contains("Unknown system call") {
        return skip(test, "this systemd-analyze is too old");
    }
    let level = said.split("Overall exposure level for").nth(1).and_then(|rest| rest.split(": ").nth(1));
    let level: f64 = level.and_then(|rest| rest.split(' ').next()).and_then(|level| level.parse().ok()).expect(&said);
    assert!(level <= most, "{level}: {said}");
    // It is of systemd 253, and this may be an older one.
    let ignored = said.lines().filter(|line| line.contains("ignoring") && !line.contains("OpenFile"));
    assert_eq!(ignored.count(), 0, "{said}");
}

#[test]
fn units_command_lines_are_some() {
    for unit in [UNIT, PASSED] {
        let text = text(unit);
        assert!(text.contains(&format!("ExecStart={PROGRAM} ")), "{unit}");
        let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let line = line.replace("%i", "tap0").replace("${QUEUES}", "3,4").replace("$ARGS", "--socket-mode=0660");
        let config = Config::try_from(Cli::try_parse_from(line.split(' ')).unwrap()).unwrap();
        // Whoever restarts a process is not told of its end by one that waits.
        assert_eq!(config.host.on_loss, vhost_user_net::host_side::OnLoss::Exit);
        assert!(text.contains("Restart=always"));
        // Nor of a command line that is wrong, for ever; and what it refers to is set.
        assert!(text.contains("RestartPreventExitStatus=2\n") && text.contains("Environment=ARGS=\n"), "{unit}");
        assert!(text.contains("StartLimitIntervalSec=0\n"), "{unit}");
        // A directory that is made anew at each start is not the one that a container has mounted.
        assert!(text.contains("RuntimeDirectoryPreserve=restart\n"), "{unit}");
    }
}

/// They have one socket.
#[test]
fn units_of_one_tap_exclude_each_other() {
    let text = text(PASSED);
    assert!(text.contains("Conflicts=vhost-user-net@%i.service\n"));
    // Or one would start while the other still ends.
    let after = text.lines().find_map(|line| line.strip_prefix("After=")).unwrap();
    assert!(after.split(' ').any(|unit| unit == "vhost-user-net@%i.service"), "{after}");
}

/// What is advised for all instances holds beside what an operator has for one: the files have different names.
#[test]
fn settings_of_the_template_are_not_those_of_systemctl_edit() {
    for (unit, file) in [(UNIT, "group.conf"), (PASSED, "queues.conf")] {
        let name = Path::new(unit).file_name().unwrap().to_str().unwrap();
        let advised = format!("/etc/systemd/system/{name}.d/{file}");
        let text = text(unit);
        assert!(text.contains(&advised) && !text.contains(": systemctl edit"), "{unit}: {advised}");
    }
}

/// What the two have in common, they have word for word.
#[test]
fn units_differ_in_what_is_passed_only() {
    let settings = |unit| {
        let text = text(unit);
        let service = text.split("[Service]").last().unwrap();
        let is_of_one = |line: &&str| {
            ["ExecStart=", "OpenFile=", "Environment=", "Device", "PrivateDevices=", "PrivateNetwork="]
                .iter()
                .any(|start| line.starts_with(start))
        };
        service.lines().filter(|line| !is_of_one(line)).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(settings(UNIT), settings(PASSED));
}

#[test]
fn program_is_where_all_that_name_it_say() {
    let (directory, name) = PROGRAM.rsplit_once('/').unwrap();
    for (file, wanted) in [
        ("resources/50-vhost-user-net.json", format!("\"binary\": \"{PROGRAM}\"")),
        ("README.md", format!("install target/release/{name} {directory}/")),
        ("docs/service.md", format!("install target/release/{name} {directory}/")),
    ] {
        assert!(text(file).contains(&wanted), "{file}: {wanted}");
    }
}

/// The TAP that a unit makes is one that the back-end, as the other units' user, takes without a word.
#[test]
fn tap_of_the_unit_is_served_without_a_warning() {
    const TEST: &str = "tap_of_the_unit_is_served_without_a_warning";
    if !require_root(TEST) {
        return;
    }
    let namespace = NetNs::new();
    let dir = tempfile::TempDir::new().unwrap();
    let socket = dir.path().join("socket");
    for (flags, pairs) in [("", "1"), ("multi_queue", "2")] {
        let unit = text(TAP).replace("%i", "tap0").replace("$FLAGS", flags).replace("user vhost-user-net", "user 0");
        let commands =
            |setting: &str| unit.lines().filter_map(|line| line.strip_prefix(setting)).collect::<Vec<_>>().join(" && ");
        namespace.run("sh", &["-c", &commands("ExecStart=")]);
        let args = ["--socket-path", arg(&socket), "--tap", "tap0", "--queue-pairs", pairs];
        let backend = Spawned::start_in(&namespace, &args);
        assert!(backend.log().contains("Attached to") && !backend.log().contains("warn: "), "{}", backend.log());
        drop(backend);
        namespace.run("sh", &["-c", &commands("ExecStop=")]);
        assert!(!namespace.try_ip("link show tap0"));
    }
}
