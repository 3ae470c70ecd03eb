//! A network namespace, a folder for the socket, and the real binary in the one on the other.

use std::path::PathBuf;

use tempfile::TempDir;

use super::PATIENCE;
use super::backend::{Spawned, arg};
use super::bench::Guest;
use super::frames::{Ends, Stamp, test_frame};
use super::frontend::RawFrontend;
use super::netns::{NetNs, PacketSocket};
use super::virtio::VnetHdr;

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");

/// See the file's head.
pub struct Place {
    pub namespace: NetNs,
    dir: TempDir,
}

impl Place {
    pub fn new() -> Place {
        Place { namespace: NetNs::new(), dir: TempDir::new().unwrap() }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Starts the binary here with more arguments; waits until it listens.
    pub fn start(&self, more: &[&str]) -> Spawned {
        let socket = self.socket();
        Spawned::start_in(&self.namespace, &[&["--socket-path", arg(&socket)], more].concat())
    }

    /// What the binary says when it refuses to start.
    pub fn refusal(&self, more: &[&str]) -> String {
        let socket = self.socket();
        let mut command = self.namespace.command(BINARY);
        let (code, log) = Spawned::refusal(command.args(["--socket-path", arg(&socket)]).args(more));
        assert_eq!(code, Some(1), "{log}");
        log
    }

    /// A front-end with a session for `guest`.
    pub fn connect(&self, guest: &Guest) -> RawFrontend {
        let front_end = RawFrontend::connect(self.socket()).unwrap();
        front_end.negotiate_like_cloud_hypervisor(&guest.session()).unwrap();
        front_end
    }
}

/// One frame each way on queue pair 0; `host` is where the guest's come out.
pub fn assert_frames_pass(guest: &mut Guest, host: &PacketSocket, seq: u32) {
    let driver = &mut guest.pairs[0];
    let out = test_frame(&Ends::TX, Stamp { stream: 1, seq }, 200);
    driver.send(&VnetHdr::default(), &out);
    assert_eq!(host.recv(PATIENCE).expect("a frame on the host"), out);
    if driver.rx.outstanding().is_empty() {
        driver.post_rx(64, 2048);
    }
    let inn = test_frame(&Ends::RX, Stamp { stream: 2, seq }, 200);
    host.send(&inn);
    assert_eq!(driver.recv(PATIENCE).expect("a frame in the guest").1, inn);
}
