//! A network namespace, a folder for the socket, and the real binary in the one on the other.

use std::path::PathBuf;

use tempfile::TempDir;

use super::backend::{Spawned, arg};
use super::bench::Guest;
use super::frames::{Ends, Stamp, test_frame};
use super::frontend::RawFrontend;
use super::netns::{NetNs, PacketSocket, require_root};
use super::virtio::VnetHdr;
use super::{PATIENCE, skip};

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

    /// With interfaces `card` and `outside`, two ends of a veth pair; none, said aloud, where there is no root or no MACVTAP.
    pub fn with_card(test: &str) -> Option<Place> {
        if !require_root(test) {
            return None;
        }
        let place = Place::new();
        place.make_card();
        if !place.namespace.try_ip("link add link card name probe type macvtap") {
            skip(test, "this kernel has no MACVTAP");
            return None;
        }
        place.namespace.ip("link del probe");
        Some(place)
    }

    pub fn make_card(&self) {
        self.namespace.ip("link add card type veth peer name outside");
        self.namespace.ip("link set card up");
        self.namespace.ip("link set outside up");
    }

    /// Makes a MACVTAP or MACVLAN on `card`, and sets it up.
    pub fn add_on_card(&self, kind: &str, name: &str, mode: &str, mac: &str) {
        self.namespace.ip(&format!("link add link card name {name} address {mac} type {kind} mode {mode}"));
        self.namespace.ip(&format!("link set {name} up"));
    }

    /// The world beyond the card.
    pub fn outside(&self) -> PacketSocket {
        PacketSocket::open(&self.namespace, "outside")
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

/// One frame each way on queue pair 0; `host` is where the guest's come out. The interface may have got its carrier just now.
pub fn assert_frames_pass(guest: &mut Guest, host: &PacketSocket, seq: u32) {
    host.wait_operational();
    assert_frames_go_on_passing(guest, host, seq);
}

/// The same once they have passed: it asks nothing of the interface before.
pub fn assert_frames_go_on_passing(guest: &mut Guest, host: &PacketSocket, seq: u32) {
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
