//! Landlock, the second lock of the sandbox: what it denies by itself, and a kernel that has none.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, getppid};
use rustix::fs::{AtFlags, Mode, OFlags, open, openat, unlinkat};
use vhost_user_net::sandbox::{self, Later, Level, Wanted};

use crate::common::backend::{Spawned, arg};
use crate::common::bench::Guest;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::place::{Place, assert_frames_pass};
use crate::common::refused::{refuse, refuse_to};
use crate::common::skip;
use crate::common::virtio::feature;

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");

/// Which Landlock the kernel has; `None`, said aloud, where it has none.
fn version(test: &str) -> Option<i64> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: asked for its version the call takes no memory.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, VERSION) };
    if version < 0 {
        skip(test, &format!("this kernel has no Landlock: {}", io::Error::last_os_error()));
    }
    Some(version).filter(|version| *version > 0)
}

/// What a child of this process, which has one thread, comes to.
fn in_child(work: impl FnOnce() -> String) -> String {
    let (mut reader, mut writer) = io::pipe().unwrap();
    // SAFETY: the C library has its allocator ready for use in the child, and nothing else of another thread is touched.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| "It panicked".to_owned());
            let _ = writer.write_all(result.as_bytes());
            // SAFETY: the child ends, and with it all that it has.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let mut result = String::new();
            reader.read_to_string(&mut result).unwrap();
            waitpid(child, None).unwrap();
            result
        }
    }
}

/// Files, ports and processes, tried one by one: which are denied.
fn denied(version: i64, removable: &Path) -> String {
    let other = Path::new("/etc/passwd");
    let mut wrong = Vec::new();
    let mut expect = |what: &str, result: io::Result<()>, wanted: Option<i32>| {
        let errno = result.err().and_then(|error| error.raw_os_error());
        if errno != wanted {
            wrong.push(format!("{what}: {errno:?}, not {wanted:?}"));
        }
    };
    expect("reading a file", File::open(other).map(drop), Some(libc::EACCES));
    expect("reading a directory", fs::read_dir("/etc").map(drop), Some(libc::EACCES));
    expect("making a file", File::create(removable.with_extension("new")).map(drop), Some(libc::EACCES));
    let parent = removable.parent().unwrap();
    expect("making a directory", fs::create_dir(parent.join("made")), Some(libc::EACCES));
    expect("reading the file to be removed", File::open(removable).map(drop), Some(libc::EACCES));
    expect("removing it", fs::remove_file(removable), None);
    if version >= 4 {
        expect("a TCP port", TcpListener::bind("127.0.0.1:0").map(drop), Some(libc::EACCES));
    }
    if version >= 6 {
        expect("a signal to a process outside", kill(getppid(), None).map_err(io::Error::from), Some(libc::EPERM));
    }
    wrong.join("\n")
}

/// On a host that forbids namespaces: there is nothing else then between the process and its user's files.
#[test]
fn files_ports_and_processes_are_denied_where_there_are_no_namespaces() {
    let Some(version) = version("files_ports_and_processes_are_denied_where_there_are_no_namespaces") else { return };
    let dir = tempfile::TempDir::new().unwrap();
    let socket = dir.path().join("socket");
    File::create(&socket).unwrap();
    let directory = File::open(dir.path()).unwrap();

    let wrong = in_child(|| {
        refuse(libc::SYS_unshare, libc::EPERM).unwrap();
        let later = Later { keeps_rights: None, directory: Some(directory.as_fd()) };
        let sandbox = sandbox::enter(Wanted::Auto, later).unwrap();
        assert_eq!(sandbox.level(), Level::Seccomp);
        denied(version, &socket)
    });

    assert_eq!(wrong, "");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made, and the socket is gone");
}

/// A directory that is still open leads out of the empty file system, and is no way for files to be opened.
#[test]
fn directory_that_is_open_leads_to_no_file() {
    const TEST: &str = "directory_that_is_open_leads_to_no_file";
    const NO_NAMESPACES: &str = "no namespaces";
    if version(TEST).is_none() {
        return;
    }
    let dir = tempfile::TempDir::new().unwrap();
    ["socket", "other"].iter().for_each(|name| drop(File::create(dir.path().join(name)).unwrap()));
    let directory = open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();

    let seen = in_child(|| {
        let later = Later { keeps_rights: None, directory: Some(directory.as_fd()) };
        match sandbox::enter(Wanted::Full, later) {
            Err(sandbox::SandboxError::NotFull(sandbox::Missing::Namespaces { .. })) => {
                return NO_NAMESPACES.to_owned();
            }
            entered => assert_eq!(entered.unwrap().level(), Level::Full),
        }
        let errno = |e: rustix::io::Errno| e.raw_os_error();
        let opened = openat(&directory, "other", OFlags::RDONLY, Mode::empty()).map(drop).map_err(errno);
        let removed = unlinkat(&directory, "socket", AtFlags::empty()).map_err(errno);
        format!("opened {opened:?}, removed {removed:?}")
    });

    if seen == NO_NAMESPACES {
        return skip(TEST, "user namespaces are not to be had here");
    }
    assert_eq!(seen, format!("opened Err({}), removed Ok(())", Errno::EACCES as i32));
}

/// P-18: a kernel without Landlock, or on which it is switched off.
#[test]
fn kernel_without_landlock_is_said_to_be_one() {
    if !require_root("kernel_without_landlock_is_said_to_be_one") {
        return;
    }
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP] {
        let place = Place::new();
        place.namespace.add_tap(&TapSpec::new("tap0"));
        let without = |level: &str| {
            let mut command = place.namespace.command(BINARY);
            command.args(["--socket-path", arg(&place.socket()), "--tap", "tap0", "--sandbox", level]);
            refuse_to(&mut command, libc::SYS_landlock_create_ruleset, errno);
            command
        };

        let (code, log) = Spawned::refusal(&mut without("full"));

        const SAID: &str = "This kernel's Landlock is switched off or too old";
        assert_eq!(code, Some(1), "{log}");
        assert!(log.lines().last().unwrap().contains(SAID), "{log}");

        let mut backend = Spawned::run(&mut without("auto"));

        let line = backend.wait_line("Sandbox ");
        assert!(line.contains("Sandbox seccomp: ") && line.contains(SAID), "{line}");
        // What does without it is there.
        assert_eq!(fs::read_dir(format!("/proc/{}/root", backend.pid())).unwrap().count(), 0, "the root is empty");
        let mut guest = Guest::new(1, feature::MRG_RXBUF);
        let _front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "tap0"), 0);
    }
}
