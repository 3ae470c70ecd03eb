//! The test kit: everything around a vhost-user net back-end, so that a test drives it from outside.
//!
//! Rings as a driver writes them ([`split_ring`] and [`driver`] on [`memory`]), messages as a front-end sends them
//! ([`message`], [`frontend`], [`crate_frontend`]), a SEQPACKET pair as the TAP ([`tap_double`]),
//! frames that tell loss from corruption ([`frames`]), what a segmentation request stands for ([`split`]). For what a
//! double cannot show: kernel devices in a namespace ([`netns`]), a stock QEMU ([`qtest`]), Linux guests ([`guest`],
//! [`transfer`], [`migration`]). [`reference`] is a back-end that we did not design, for a second opinion; [`qemu_shim`] lets QEMU
//! talk to it, and [`recorder`] shows a front-end's message order. [`refused`] makes a kernel of ours as poor as others are.
//!
//! A back-end's thread that panics fails the test ([`panics`]).
//!
//! Nothing but [`backend`], which starts it, and [`device_side`], which runs its rings alone, uses the library under
//! test; [`bench`] and [`path_bench`] put a guest and a front-end before it. Nothing sleeps, or waits without a bound: [`PATIENCE`] says
//! how long an event that must come is waited for, and a kit function that gives up says what it waited for.
//! As everywhere, rx and tx are the guest's: tx leaves the guest.

#![allow(dead_code, unused_imports, reason = "each test binary compiles the whole kit and uses a part of it")]
// `pub` here means "for the tests", and a test fails by panicking.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::panic)]

pub mod backend;
pub mod bench;
pub mod crate_frontend;
pub mod device_side;
pub mod driver;
pub mod frames;
pub mod frontend;
pub mod guest;
pub mod memory;
pub mod message;
pub mod migration;
pub mod netns;
pub mod panics;
pub mod path_bench;
pub mod place;
pub mod qemu_shim;
pub mod qmp;
pub mod qtest;
pub mod recorder;
pub mod reference;
pub mod refused;
pub mod split;
pub mod split_ring;
pub mod tap_double;
pub mod transfer;
pub mod virtio;
mod waiting;

use std::fs::OpenOptions;
use std::io::{self, Write};

pub use waiting::{PATIENCE, QUIET, StopOnDrop, fd_of, wait_for, wait_readable, wait_until};

/// How often to do what takes long: `usually`, or as often as it was meant where `VHOST_USER_NET_FULL=1` asks for that
/// (`resources/run-tests.sh --full`).
pub fn times(usually: u32, full: u32) -> u32 {
    if std::env::var_os("VHOST_USER_NET_FULL").is_some_and(|wanted| wanted == "1") { full } else { usually }
}

/// Says aloud why a test did nothing: the test harness has no word for it. And writes it to the file that
/// `VHOST_USER_NET_SKIPPED` names, to be counted: what is printed may stand behind words of the harness on its line.
pub fn skip(test: &str, why: &str) {
    say(&format!("SKIPPED: {test}: {why}"));
    if let Some(path) = std::env::var_os("VHOST_USER_NET_SKIPPED") {
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(format!("{test}: {why}\n").as_bytes()).unwrap();
    }
}

/// Prints a measurement or the like, past the harness, which shows nothing of a test that passes.
pub fn say(line: &str) {
    io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}
