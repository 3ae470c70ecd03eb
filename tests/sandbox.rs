//! The sandbox from outside and inside: what is left to a process, and that each call which is not listed ends it.
//!
//! `UPDATE_DOCS=1 cargo test --test sandbox` writes the tables of `docs/sandbox.md` anew.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use libc::c_long;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rustix::process::{Resource, Rlimit, prlimit};
use seccompiler::{BpfProgram, apply_filter};
use vhost_user_net::sandbox::program;
use vhost_user_net::sandbox::syscalls::{Only, Role};

use crate::common::backend::{Spawned, arg};
use crate::common::bench::Guest;
use crate::common::frontend::RawFrontend;
use crate::common::message::Message;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::place::{Place, assert_frames_pass};
use crate::common::virtio::feature;
use crate::common::{PATIENCE, fd_of, skip};

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");

/// Numbers of system calls, on the architectures that there are: those of old, and those that all have in common.
fn all_calls() -> impl Iterator<Item = c_long> {
    let of_old = if cfg!(target_arch = "x86_64") { 0..335 } else { 0..294 };
    of_old.chain(424..470)
}

/// What becomes of a process of one thread that makes this call behind the filter of `role`.
fn end_of_call(role: Role, filter: &BpfProgram, number: c_long, args: [c_long; 4]) -> WaitStatus {
    // Only one thread may end the process.
    let end = if role == Role::Control { libc::SYS_exit_group } else { libc::SYS_exit };
    // SAFETY: the child makes system calls only, and touches nothing that another thread may have held.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        ForkResult::Child => {
            let is_confined = apply_filter(filter).is_ok();
            if is_confined {
                // SAFETY: all that a call can harm is this child, which ends now.
                unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], 0, 0) };
            }
            // SAFETY: the child ends, and with it all that it has.
            unsafe { libc::syscall(end, if is_confined { 0 } else { 1 }) };
            unreachable!("the call ends this process");
        }
    }
}

fn is_killed(status: WaitStatus) -> bool {
    matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
}

/// P-17: a call that is not permitted ends the process, whatever thread makes it.
#[test]
fn every_call_that_is_not_permitted_ends_the_process() {
    for role in Role::ALL {
        let filter = program(role).unwrap();
        let mut tried = 0;
        for number in all_calls().filter(|number| role.permits().all(|permit| permit.number != *number)) {
            let status = end_of_call(role, &filter, number, [0; 4]);
            assert!(is_killed(status), "{role:?}: call {number}: {status:?}");
            tried += 1;
        }
        assert!(tried > 330, "{role:?}: {tried}");
    }
}

/// The arguments that are permitted, off by one bit.
#[test]
fn every_argument_that_is_not_permitted_ends_the_process() {
    for role in Role::ALL {
        let filter = program(role).unwrap();
        for permit in role.permits() {
            let call = |index: u8, value: u32| {
                let mut args = [0; 4];
                args[usize::from(index)] = c_long::from(value);
                end_of_call(role, &filter, permit.number, args)
            };
            match permit.only {
                Only::Any => {}
                Only::Values(index, values) => {
                    for bit in 0..32 {
                        for (value, name) in values {
                            let other = value ^ 1 << bit;
                            if values.iter().all(|(value, _)| *value != other) {
                                let status = call(index, other);
                                assert!(is_killed(status), "{role:?}: {} {name} ^ 1 << {bit}: {status:?}", permit.name);
                            }
                        }
                    }
                }
                Only::Without(index, (bits, name)) => {
                    assert!(is_killed(call(index, bits)), "{role:?}: {} {name}", permit.name);
                    assert!(is_killed(call(index, bits | 3)), "{role:?}: {} {name} and others", permit.name);
                    assert!(!is_killed(call(index, 3)), "{role:?}: {} without {name}", permit.name);
                }
            }
        }
    }
}

#[test]
fn no_call_is_listed_twice_and_the_lists_are_short() {
    for role in Role::ALL {
        let mut numbers: Vec<_> = role.permits().map(|permit| permit.number).collect();
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        // Four of a worker's are io_uring's, and one is of builds for debugging only.
        let most = if role == Role::Control { 32 } else { 25 };
        assert!(numbers.len() == count && count <= most, "{role:?}: {count}");
    }
}

fn tables() -> String {
    let mut text = String::new();
    for (role, title) in [
        (Role::TapWorker, "A queue pair on a TAP, TUN or MACVTAP"),
        (Role::PacketWorker, "A queue pair on a packet socket"),
        (Role::ControlQueue, "The control queue"),
        (Role::Control, "The control thread"),
    ] {
        write!(text, "### {title}\n\n| call | with | for |\n|---|---|---|\n").unwrap();
        for permit in role.permits() {
            let with = match permit.only {
                Only::Any => String::new(),
                Only::Values(_, values) => values.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", "),
                Only::Without(_, (_, name)) => format!("no {name}"),
            };
            // A build for debugging checks more.
            if !permit.why.contains("debugging") {
                writeln!(text, "| `{}` | {} | {} |", permit.name, with.replace("F_GETFD, ", ""), permit.why).unwrap();
            }
        }
        text.push('\n');
    }
    text
}

#[test]
fn lists_in_the_documentation_are_those_of_the_source() {
    const MARK: &str = "<!-- From here on it is made by tests/sandbox.rs. -->\n\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/sandbox.md");
    let document = fs::read_to_string(&path).unwrap();
    let (before, _) = document.split_once(MARK).unwrap();
    let wanted = format!("{before}{MARK}{}", tables().trim_end().to_owned() + "\n");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &wanted).unwrap();
    }
    if cfg!(target_arch = "x86_64") {
        assert!(fs::read_to_string(&path).unwrap() == wanted, "UPDATE_DOCS=1 cargo test --test sandbox");
    }
}

/// The field of each thread's status, by the thread's name.
fn of_threads(backend: &Spawned, field: &str) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    let of = |status: &str, field: &str| {
        let line = status.lines().find(|line| line.starts_with(&format!("{field}:"))).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    tasks
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            (of(&status, "Name"), of(&status, field))
        })
        .collect()
}

fn assert_all(backend: &Spawned, field: &str, wanted: impl Fn(&str) -> &'static str) {
    for (name, value) in of_threads(backend, field) {
        assert_eq!(value, wanted(&name), "{field} of thread {name}");
    }
}

const NONE: &str = "0000000000000000";

fn assert_leaves_no_core_file(backend: &Spawned) {
    let limits = fs::read_to_string(format!("/proc/{}/limits", backend.pid())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["0", "0", "bytes"]);
}

#[test]
fn process_has_no_files_no_network_and_no_rights_left() {
    if !require_root("process_has_no_files_no_network_and_no_rights_left") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0"]);
    let mut guest = Guest::new(1, feature::MRG_RXBUF);
    let _front_end = place.connect(&guest);
    backend.wait_line("Sandbox full");
    assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "tap0"), 0);
    for field in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_all(&backend, field, |_| NONE);
    }
    assert_all(&backend, "NoNewPrivs", |_| "1");
    assert_all(&backend, "Seccomp", |_| "2");
    let proc = format!("/proc/{}", backend.pid());
    assert_eq!(fs::read_dir(format!("{proc}/root")).unwrap().count(), 0, "the root is empty");
    for namespace in ["user", "mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |process: &str| fs::read_link(format!("{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&proc), of("/proc/self"), "{namespace}");
    }
    assert_leaves_no_core_file(&backend);
    let devices = fs::read_to_string(format!("{proc}/net/dev")).unwrap();
    assert!(!devices.contains("tap0"), "{devices}");
    // The process goes on, hears of its interface, and tidies up.
    place.namespace.ip("link set tap0 mtu 1400");
    backend.wait_line("MTU 1400");
    backend.signal(Signal::SIGTERM);
    assert!(backend.wait_end(PATIENCE).success());
    assert!(!place.socket().exists());
    backend.wait_line("process sandbox=full");
}

/// Each way to wait for frames and to move them needs calls of its own.
#[test]
fn frames_pass_in_the_sandbox_whatever_is_chosen() {
    if !require_root("frames_pass_in_the_sandbox_whatever_is_chosen") {
        return;
    }
    let choices = [
        ["--poll-us", "200"],
        ["--poll-us", "auto"],
        ["--cpu-affinity", "0"],
        ["--io", "uring"],
        ["--io", "syscall"],
        ["--coalesce", "off"],
    ];
    for (device, outside) in [(&["--tap", "it0"][..], "it0"), (&["--interface", "it0", "--promiscuous"], "outside")] {
        for choice in choices {
            let place = Place::new();
            if outside == "it0" {
                place.namespace.add_tap(&TapSpec::new("it0"));
            } else {
                place.namespace.ip("link add it0 up type veth peer name outside");
                place.namespace.ip("link set outside up");
            }
            let mut backend = place.start(&[device, &choice].concat());
            backend.wait_line("Sandbox full");
            let mut guest = Guest::new(1, feature::MRG_RXBUF);
            let _front_end = place.connect(&guest);
            let host = PacketSocket::open(&place.namespace, outside);
            for round in 0..3 {
                assert_frames_pass(&mut guest, &host, round);
                // Until it sleeps.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            assert!(!backend.has_ended(), "{device:?} {choice:?}: {}", backend.log());
        }
    }
}

#[test]
fn level_that_is_chosen_is_what_there_is() {
    if !require_root("level_that_is_chosen_is_what_there_is") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let full = of_self("CapEff");
    for (more, said, control, workers) in [
        (&["--sandbox", "seccomp"][..], "Sandbox seccomp", ("2", NONE), ("2", NONE)),
        (&["--on-device-loss", "wait"], "Sandbox workers", ("0", &full), ("2", NONE)),
        (&["--sandbox", "off"], "Sandbox off", ("0", &full), ("0", &full)),
    ] {
        let mut backend = place.start(&[&["--tap", "tap0"], more].concat());
        let mut guest = Guest::new(1, feature::MRG_RXBUF);
        let _front_end = place.connect(&guest);
        let line = backend.wait_line(said);
        // Root's rights in a thread that hears the front-end are not what is expected of a sandbox.
        assert_eq!(line.contains("warn: "), said == "Sandbox workers", "{line}");
        assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "tap0"), 0);
        let wanted = |name: &str| if name == "vhost-user-net" { control } else { workers };
        for (name, mode) in of_threads(&backend, "Seccomp") {
            assert_eq!(mode, wanted(&name).0, "{said}: {name}");
        }
        for (name, rights) in of_threads(&backend, "CapEff") {
            assert_eq!(rights, wanted(&name).1, "{said}: {name}");
        }
        if said == "Sandbox seccomp" {
            assert_leaves_no_core_file(&backend);
        }
        backend.signal(Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        assert!(!place.socket().exists());
    }
}

fn of_self(field: &str) -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn what_needs_rights_later_does_not_go_with_a_level_that_takes_them() {
    for (level, device, why) in [
        ("full", &["--tap", "t", "--on-device-loss", "wait"][..], "--on-device-loss wait"),
        ("seccomp", &["--tap", "t", "--on-device-loss", "wait"], "--on-device-loss wait"),
        ("full", &["--macvtap-parent", "eth0"], "--macvtap-parent"),
        ("full", &["--macvlan-parent", "eth0"], "--macvlan-parent"),
    ] {
        let mut command = Command::new(BINARY);
        let (code, log) = Spawned::refusal(command.args(["--socket-path", "s", "--sandbox", level]).args(device));
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(why) && log.contains("--sandbox auto"), "{log}");
    }
}

/// P-18: a host that forbids namespaces.
#[test]
fn host_without_namespaces_is_said_to_be_one() {
    const TEST: &str = "host_without_namespaces_is_said_to_be_one";
    if !require_root(TEST) {
        return;
    }
    let place = Place::new();
    let forbidding = |level: &str| {
        let mut command = Command::new("unshare");
        let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$@\"";
        command.args(["--user", "--map-root-user", "--net", "sh", "-c", script, "sh", BINARY]);
        command.args(["--socket-path", arg(&place.socket()), "--tap", "tap0", "--sandbox", level]);
        command
    };
    let (code, log) = Spawned::refusal(&mut forbidding("full"));
    if log.contains("/dev/net/tun") || log.contains("unshare failed") {
        return skip(TEST, "user namespaces, or TAPs in them, are not to be had here");
    }
    assert_eq!(code, Some(1), "{log}");
    for wanted in ["--sandbox full", "--sandbox auto", "Cannot make namespaces", "max_user_namespaces"] {
        assert!(log.contains(wanted), "{wanted}: {log}");
    }
    let mut backend = Spawned::run(&mut forbidding("auto"));
    let line = backend.wait_line("Sandbox seccomp");
    assert!(line.contains("Cannot make namespaces") && line.contains("max_user_namespaces"), "{line}");
    assert!(!line.contains("--sandbox"), "What is in force is no advice: {line}");
    // Who is served is served from inside.
    let front_end = place.connect(&Guest::new(1, feature::MRG_RXBUF));
    assert!(front_end.is_alive());
    assert_all(&backend, "Seccomp", |_| "2");
    assert_all(&backend, "CapEff", |_| NONE);
    backend.signal(Signal::SIGTERM);
    assert!(backend.wait_end(PATIENCE).success());
    // Its namespaces are left, but Landlock's rule for the socket's directory holds all the same.
    assert!(!place.socket().exists());
}

/// P-24: nobody without privileges can look into the process, not even its own user.
#[test]
fn own_user_cannot_look_into_the_process() {
    if !require_root("own_user_cannot_look_into_the_process") {
        return;
    }
    let place = Place::new();
    let as_nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];
    let can_look = |pid: &dyn std::fmt::Display| {
        let environment = format!("/proc/{pid}/environ");
        Command::new("setpriv").args(as_nobody).args(["cat", &environment]).output().unwrap().status.success()
    };
    let mut sleeper = Command::new("setpriv").args(as_nobody).args(["sleep", "60"]).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !can_look(&sleeper.id()) {
        assert!(Instant::now() < deadline, "its own other processes it can look into");
    }
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();

    place.namespace.add_tap(&TapSpec::new("tap0"));
    let socket = place.socket();
    let binary = common::backend::for_any_user(&socket);
    let queue = place.namespace.open_tap("tap0", false);
    place.namespace.wait_operational("tap0");
    let mut command = place.namespace.command("setpriv");
    command.args(as_nobody).args([arg(&binary), "--socket-path", arg(&socket), "--tap-fd", "20"]);
    common::backend::inherit(&mut command, queue.fd.as_fd(), 20);
    let mut backend = Spawned::run(&mut command);
    backend.wait_line("Sandbox");
    assert!(!can_look(&backend.pid()));
    let mut guest = Guest::new(1, feature::MRG_RXBUF);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "tap0"), 0);
}

/// What a thread frees at the end of its arena the C library would give back, and look into a file of /proc first.
#[test]
fn memory_that_a_confined_thread_frees_opens_no_file() {
    if !require_root("memory_that_a_confined_thread_frees_opens_no_file") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut command = place.namespace.command(BINARY);
    command.env("MALLOC_TRIM_THRESHOLD_", "4096").env("MALLOC_ARENA_MAX", "2");
    let socket = place.socket();
    command.args(["--tap", "tap0", "--socket-path", arg(&socket)]);
    let mut backend = Spawned::run(&mut command);
    backend.wait_line("Listening on");
    place.namespace.wait_operational("tap0");
    let host = PacketSocket::open(&place.namespace, "tap0");
    for seq in 0..3 {
        let mut guest = Guest::new(1, 0);
        let front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &host, seq);
        front_end.disconnect();
    }
    assert!(!backend.has_ended(), "{}", backend.log());
}

/// The thread that was in the namespace may still be about to end when the process makes its own.
#[test]
fn process_whose_device_is_in_another_namespace_is_confined_each_time() {
    if !require_root("process_whose_device_is_in_another_namespace_is_confined_each_time") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    for _ in 0..30 {
        let mut command = Command::new(BINARY);
        let socket = place.socket();
        command.args(["--netns", &place.namespace.name, "--tap", "tap0", "--sandbox", "full"]);
        command.args(["--socket-path", arg(&socket)]);
        Spawned::run(&mut command).wait_line("Listening on");
    }
}

/// The list of no thread has a call to abort with. Memory for the frames of a ring is taken when it starts.
#[test]
fn ring_start_with_too_little_memory_is_said_and_ends_the_process_by_sigsys() {
    if !require_root("ring_start_with_too_little_memory_is_said_and_ends_the_process_by_sigsys") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0"]);
    let guest = Guest::new(1, 0);
    let front_end = RawFrontend::connect(place.socket()).unwrap();
    assert!(front_end.tell(&Message::set_owner()));
    assert!(front_end.tell(&Message::set_features(feature::VERSION_1)));
    assert!(front_end.tell(&Message::set_mem_table(&guest.mem)));
    assert!(front_end.is_alive());
    let pid = rustix::process::Pid::from_raw(backend.pid().as_raw());
    prlimit(pid, Resource::Data, Rlimit { current: Some(0), maximum: Some(0) }).unwrap();
    backend.may_end_by(Signal::SIGSYS);

    for (index, ring) in (0..).zip(guest.session().rings) {
        // It may have ended already.
        front_end.tell(&Message::set_vring_num(index, ring.size.into()));
        front_end.tell(&Message::set_vring_addr(index, ring));
        front_end.tell(&Message::set_vring_call(index.into(), fd_of(&ring.call)));
        front_end.tell(&Message::set_vring_kick(index.into(), fd_of(&ring.kick)));
    }

    let status = backend.wait_end(PATIENCE);
    assert_eq!(status.signal(), Some(Signal::SIGSYS as i32), "{status}");
    backend.wait_line("memory allocation of ");
}
