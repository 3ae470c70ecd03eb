//! Two guests on one card, and a peer behind it: who reaches whom, on MACVTAPs and MACVLANs in each of their modes. Needs
//! root; says SKIPPED aloud without.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::backend::{Spawned, arg};
use common::bench::Guest;
use common::frames::{Ends, Mac, Stamp, test_frame};
use common::frontend::RawFrontend;
use common::netns::require_root;
use common::place::Place;
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, QUIET, skip};
use tempfile::TempDir;

const PEER: Mac = [0x52, 0x54, 0, 0xbb, 0, 1];
const EVERYBODY: Mac = [0xff; 6];

/// A guest on a device of its own.
struct Resident {
    mac: Mac,
    guest: Guest,
    _front_end: RawFrontend,
    _backend: Spawned,
    _dir: TempDir,
}

impl Resident {
    fn move_in(place: &Place, kind: &str, mode: &str, number: u8) -> Option<Resident> {
        let mac = [0x52, 0x54, 0, 0xaa, 0, number];
        let shown = mac.map(|byte| format!("{byte:02x}")).join(":");
        let name = format!("dev{number}");
        let link = format!("link add link card name {name} address {shown} type {kind} mode {mode}");
        if !place.namespace.try_ip(&link) {
            return None;
        }
        place.namespace.ip(&format!("link set {name} up"));
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("socket");
        let option = if kind == "macvtap" { "--macvtap" } else { "--interface" };
        let args = ["--socket-path", arg(&socket), option, &name];
        let backend = Spawned::start_in(&place.namespace, &args);
        let mut guest = Guest::new(1, feature::MRG_RXBUF);
        guest.pairs[0].post_rx(128, 2048);
        let front_end = RawFrontend::connect(&socket).unwrap();
        front_end.negotiate_like_cloud_hypervisor(&guest.session()).unwrap();
        Some(Resident { mac, guest, _front_end: front_end, _backend: backend, _dir: dir })
    }

    fn send(&mut self, to: Mac, seq: u32) -> Vec<u8> {
        let frame = frame(self.mac, to, seq);
        self.guest.pairs[0].send(&VnetHdr::default(), &frame);
        frame
    }

    fn assert_gets(&mut self, frame: &[u8]) {
        let (_, got) = self.guest.pairs[0].recv(PATIENCE).expect("a frame in the guest");
        assert_eq!(got, frame);
    }

    fn assert_gets_nothing(&mut self, what: &str) {
        let got = self.guest.pairs[0].recv(QUIET);
        assert!(got.is_none(), "{what}: a frame that should not come: {got:?}");
    }
}

fn frame(from: Mac, to: Mac, seq: u32) -> Vec<u8> {
    test_frame(&Ends { src_mac: from, dst_mac: to, ..Ends::TX }, Stamp { stream: 1, seq }, 300)
}

#[test]
fn guests_reach_each_other_and_the_peer_as_the_mode_says() {
    const TEST: &str = "guests_reach_each_other_and_the_peer_as_the_mode_says";
    if !require_root(TEST) {
        return;
    }
    for kind in ["macvtap", "macvlan"] {
        for mode in ["bridge", "vepa", "private"] {
            let place = Place::new();
            place.make_card();
            let Some(mut first) = Resident::move_in(&place, kind, mode, 1) else {
                return skip(TEST, &format!("this kernel has no {kind}"));
            };
            let mut second = Resident::move_in(&place, kind, mode, 2).unwrap();
            let outside = place.outside();
            let expect_outside = |frame: &[u8]| assert_eq!(outside.recv(PATIENCE).expect("a frame outside"), frame);

            // Each and the peer.
            for (seq, resident) in [&mut first, &mut second].into_iter().enumerate() {
                let sent = resident.send(PEER, seq as u32);
                expect_outside(&sent);
                let answer = frame(PEER, resident.mac, seq as u32);
                outside.send(&answer);
                resident.assert_gets(&answer);
            }

            // One and the other: directly in mode bridge alone.
            let sent = first.send(second.mac, 2);
            if mode == "bridge" {
                second.assert_gets(&sent);
            } else {
                expect_outside(&sent);
                second.assert_gets_nothing(mode);
            }

            // To everybody. What a switch outside sends back of that, those in mode vepa have; in mode private the kernel
            // gives it to the sender.
            let sent = first.send(EVERYBODY, 3);
            expect_outside(&sent);
            if mode == "bridge" {
                second.assert_gets(&sent);
                first.assert_gets_nothing(mode);
                continue;
            }
            second.assert_gets_nothing(mode);
            outside.send(&sent);
            let (gets, other) = if mode == "vepa" { (&mut second, &mut first) } else { (&mut first, &mut second) };
            gets.assert_gets(&sent);
            other.assert_gets_nothing(mode);
        }
    }
}

#[test]
fn card_in_mode_passthru_has_one_guest() {
    const TEST: &str = "card_in_mode_passthru_has_one_guest";
    if !require_root(TEST) {
        return;
    }
    for kind in ["macvtap", "macvlan"] {
        let place = Place::new();
        place.make_card();
        let Some(mut only) = Resident::move_in(&place, kind, "passthru", 1) else {
            return skip(TEST, &format!("this kernel has no {kind}"));
        };
        assert!(Resident::move_in(&place, kind, "passthru", 2).is_none());
        let outside = place.outside();
        let sent = only.send(PEER, 0);
        assert_eq!(outside.recv(PATIENCE).expect("a frame outside"), sent);
        let answer = frame(PEER, only.mac, 1);
        outside.send(&answer);
        only.assert_gets(&answer);
    }
}
