//! The real binary on real kernel TAPs, in a network namespace for each test.
//!
//! * [`attach`]: attaching to a TAP, creating one, and each way in which that cannot be;
//! * [`descriptors`]: TAP queues and front-ends that are passed as descriptors;
//! * [`coalescing`]: a stream of datagrams that goes as few frames;
//! * [`engines`]: io_uring batches, and without io_uring;
//! * [`extras`]: what a TAP that is created gets: a bridge, an owner, a life of its own;
//! * [`lifetime`]: the socket, signals, the counters, the end;
//! * [`link`]: queues that come and go with the guest's, the link, a TAP that is deleted;
//! * [`offloads`]: unfinished frames both ways, as negotiated;
//! * [`restart`]: killed under load, and the next process in its place;
//! * [`segmentation`]: datagrams that the host sends as one;
//! * [`waiting`]: frames for which the guest has no buffers yet.
//!
//! Needs root; says SKIPPED aloud without.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod attach;
mod coalescing;
mod descriptors;
mod engines;
mod extras;
mod lifetime;
mod link;
mod offloads;
mod restart;
mod segmentation;
mod waiting;

use std::path::PathBuf;
use std::process::Command;

use common::backend::{Spawned, arg};
use common::bench::Guest;
use common::frames::{Ends, Stamp, test_frame};
use common::frontend::RawFrontend;
use common::netns::{NetNs, PacketSocket};
use common::virtio::VnetHdr;
use common::{PATIENCE, wait_until};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");
/// The interface in each test.
const TAP: &str = "tap0";

/// A namespace and a folder for the socket.
struct Place {
    namespace: NetNs,
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        Place { namespace: NetNs::new(), dir: TempDir::new().unwrap() }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Starts the binary here, on TAP and socket, with more arguments; waits until it listens.
    fn start(&self, more: &[&str]) -> Spawned {
        let socket = self.socket();
        let mut args = vec!["--socket-path", arg(&socket), "--tap", TAP];
        args.extend(more);
        Spawned::start_in(&self.namespace, &args)
    }

    /// The binary, to be run here on TAP and socket.
    fn command(&self, more: &[&str]) -> Command {
        let socket = self.socket();
        let mut command = self.namespace.command(BINARY);
        command.args(["--socket-path", arg(&socket)]).args(more);
        command
    }

    /// What the binary says when it refuses to start with these arguments; it leaves no socket behind.
    fn refusal(&self, more: &[&str]) -> String {
        let (code, log) = Spawned::refusal(&mut self.command(more));
        assert_eq!(code, Some(1), "{log}");
        assert_eq!(
            log.lines().filter(|line| line.starts_with("vhost-user-net: ")).count(),
            log.lines().count(),
            "{log}"
        );
        log
    }

    /// A front-end with a session for `guest`.
    fn connect(&self, guest: &Guest) -> RawFrontend {
        let front_end = RawFrontend::connect(self.socket()).unwrap();
        front_end.negotiate_like_cloud_hypervisor(&guest.session()).unwrap();
        front_end
    }

    /// The host's side, once it takes frames.
    fn host(&self) -> PacketSocket {
        self.wait_operational();
        PacketSocket::open(&self.namespace, TAP)
    }

    fn wait_operational(&self) {
        self.namespace.wait_operational(TAP);
    }
}

/// One frame each way on queue pair 0.
fn assert_frames_pass(guest: &mut Guest, host: &PacketSocket) {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let stamp = Stamp { stream: 1, seq: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) };
    let driver = &mut guest.pairs[0];
    let out = test_frame(&Ends::TX, stamp, 200);
    driver.send(&VnetHdr::default(), &out);
    assert_eq!(host.recv(PATIENCE).expect("a frame on the host"), out);
    if driver.rx.outstanding().is_empty() {
        driver.post_rx(64, 2048);
    }
    let inn = test_frame(&Ends::RX, stamp, 200);
    host.send(&inn);
    assert_eq!(driver.recv(PATIENCE).expect("a frame in the guest").1, inn);
}
