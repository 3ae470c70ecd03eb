//! The real binary on existing interfaces, through packet sockets: on one end of a veth pair, or a MACVLAN on it, with the
//! other end as the world outside.
//!
//! * [`admission`]: which frames come to the guest;
//! * [`link`]: an interface that goes down and comes up, or is deleted;
//! * [`offloads`]: unfinished frames both ways, as negotiated;
//! * [`passage`]: frames both ways on each kind of interface, of each size;
//! * [`spread`]: flows over several queue pairs;
//! * [`start`]: MACVLANs that are made, warnings, and each way in which it cannot be;
//! * [`vlan`]: tagged frames.
//!
//! Needs root; says SKIPPED aloud without.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod admission;
mod link;
mod offloads;
mod passage;
mod spread;
mod start;
mod vlan;

use std::ops::Deref;

use common::bench::Guest;
use common::frames::{Ends, GUEST_MAC, HOST_MAC, Stamp, mac_text, test_frame};
use common::netns::{PacketSocket, require_root};
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, skip};

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");
/// The guest's address, as frames of the kit have it.
const MAC: &str = "52:54:00:aa:00:01";
const MODES: [&str; 4] = ["bridge", "vepa", "private", "passthru"];

const CSUM: u64 = feature::CSUM | feature::GUEST_CSUM | feature::MRG_RXBUF;
const TSO: u64 = CSUM | feature::GUEST_TSO4 | feature::HOST_TSO4 | feature::GUEST_TSO6 | feature::HOST_TSO6;

/// What the back-end is on.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Veth,
    Macvlan(&'static str),
}

const KINDS: [Kind; 5] =
    [Kind::Veth, Kind::Macvlan(MODES[0]), Kind::Macvlan(MODES[1]), Kind::Macvlan(MODES[2]), Kind::Macvlan(MODES[3])];

/// A namespace with a veth pair: `card` is the back-end's, or has MACVLANs on it, and `outside` is the world.
struct Place(common::place::Place);

impl Deref for Place {
    type Target = common::place::Place;

    fn deref(&self) -> &common::place::Place {
        &self.0
    }
}

impl Place {
    /// None, said aloud, where it cannot be.
    fn new(test: &str) -> Option<Place> {
        if !require_root(test) {
            return None;
        }
        let place = Place(common::place::Place::new());
        let (mac, host) = (mac_text(GUEST_MAC), mac_text(HOST_MAC));
        place.namespace.ip(&format!("link add card address {mac} type veth peer name outside address {host}"));
        place.namespace.ip("link set card up");
        place.namespace.ip("link set outside up");
        if !place.namespace.try_ip("link add link card name probe type macvlan") {
            skip(test, "this kernel has no MACVLAN");
            return None;
        }
        place.namespace.ip("link del probe");
        place.wait_operational("card");
        Some(place)
    }

    /// Makes what a back-end is to be on; tells its name.
    fn make(&self, kind: Kind) -> &'static str {
        let Kind::Macvlan(mode) = kind else { return "card" };
        if mode != "passthru" {
            self.namespace.ip("link set card address 52:54:00:cc:00:01");
        }
        self.namespace.ip(&format!("link add link card name mv0 type macvlan mode {mode}"));
        if mode != "passthru" {
            self.namespace.ip(&format!("link set mv0 address {MAC}"));
        }
        self.namespace.ip("link set mv0 up");
        self.wait_operational("mv0");
        "mv0"
    }

    /// Takes it away again.
    fn unmake(&self, kind: Kind) {
        if let Kind::Macvlan(_) = kind {
            self.namespace.ip("link del mv0");
            self.namespace.ip(&format!("link set card address {MAC}"));
        }
    }

    /// Waits until frames pass from `outside` to the interface and back.
    fn wait_operational(&self, name: &str) {
        self.namespace.wait_operational("outside");
        self.namespace.wait_operational(name);
    }

    fn set_mtu(&self, mtu: u32) {
        ["card", "outside"].iter().for_each(|name| _ = self.namespace.ip(&format!("link set {name} mtu {mtu}")));
    }

    /// What it says when it refuses to start with these, which is one line.
    fn refusal(&self, more: &[&str]) -> String {
        let log = self.0.refusal(more);
        assert_eq!(log.lines().count(), 1, "{more:?}: {log}");
        log
    }

    fn outside(&self) -> PacketSocket {
        PacketSocket::open(&self.namespace, "outside")
    }

    fn outside_vnet(&self) -> PacketSocket {
        PacketSocket::open_vnet_hdr(&self.namespace, "outside")
    }
}

/// A guest whose pairs all have buffers.
fn guest_with(queue_pairs: usize, features: u64) -> Guest {
    let mut guest = Guest::new(queue_pairs, features);
    (0..queue_pairs).for_each(|pair| fill(&mut guest, pair, features));
    guest
}

fn fill(guest: &mut Guest, pair: usize, features: u64) {
    let (count, len) = if features & feature::MRG_RXBUF == 0 { (16, 66_000) } else { (128, 2048) };
    guest.pairs[pair].post_rx(count, len);
}

fn inward(stream: u16, seq: u32, len: usize) -> Vec<u8> {
    test_frame(&Ends::RX, Stamp { stream, seq }, len)
}

fn outward(stream: u16, seq: u32, len: usize) -> Vec<u8> {
    test_frame(&Ends::TX, Stamp { stream, seq }, len)
}

/// One frame each way on queue pair 0.
fn assert_frames_pass(guest: &mut Guest, outside: &PacketSocket, seq: u32) {
    assert_frame_leaves(guest, 0, outside, seq);
    outside.send(&inward(2, seq, 200));
    assert_next_is(guest, 0, &inward(2, seq, 200));
}

fn assert_frame_leaves(guest: &mut Guest, pair: usize, outside: &PacketSocket, seq: u32) {
    guest.pairs[pair].send(&VnetHdr::default(), &outward(1, seq, 200));
    assert_eq!(outside.recv(PATIENCE).expect("a frame outside"), outward(1, seq, 200));
}

fn assert_next_is(guest: &mut Guest, pair: usize, frame: &[u8]) {
    let (_, got) = guest.pairs[pair].recv(PATIENCE).expect("a frame in the guest");
    assert!(got == frame, "{} bytes that are not the {} expected: {got:02x?}", got.len(), frame.len());
}
