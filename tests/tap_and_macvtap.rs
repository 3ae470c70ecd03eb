//! What a TAP and a MACVTAP carry: frames in order, tagged ones and jumbo ones, for guests of each kind. (Packet sockets:
//! `packet`; TUNs: `tun`.) Needs root; says SKIPPED aloud without.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::bench::Guest;
use common::frames::{self, Ends, Stamp, test_frame};
use common::netns::{PacketSocket, TapSpec, require_root};
use common::place::Place;
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, skip};

const GUEST_MAC: &str = "52:54:00:aa:00:01";
const CSUM: u64 = feature::CSUM | feature::GUEST_CSUM | feature::MRG_RXBUF;
const TSO: u64 = CSUM | feature::GUEST_TSO4 | feature::HOST_TSO4 | feature::GUEST_TSO6 | feature::HOST_TSO6;
/// Buffers in the rx ring of a guest without mergeable ones, and frames that are on their way at a time.
const AT_ONCE: u32 = 16;

/// A device of the kind, `dev0`, with that MTU; where its frames come out on the host, and the option that names it.
fn make(place: &Place, kind: &str, queue_pairs: usize, mtu: u32, test: &str) -> Option<(&'static str, &'static str)> {
    let namespace = &place.namespace;
    if kind == "tap" {
        namespace.add_tap(&TapSpec { multi_queue: queue_pairs > 1, mtu: Some(mtu), ..TapSpec::new("dev0") });
        return Some(("dev0", "--tap"));
    }
    namespace.ip(&format!("link add card mtu {mtu} type veth peer name outside mtu {mtu}"));
    namespace.ip("link set card up");
    namespace.ip("link set outside up");
    if !namespace.try_ip(&format!("link add link card name dev0 address {GUEST_MAC} type macvtap mode bridge")) {
        skip(test, "this kernel has no MACVTAP");
        return None;
    }
    namespace.ip("link set dev0 up");
    Some(("outside", "--macvtap"))
}

/// Frames of `len` bytes, tagged and untagged in turn.
fn frame(ends: &Ends, seq: u32, len: usize) -> Vec<u8> {
    let plain = test_frame(ends, Stamp { stream: 1, seq }, len);
    if seq.is_multiple_of(2) { plain } else { frames::vlan(&plain, 100) }
}

/// As many frames as are sent at once come to the guest, on whichever pair, in order there.
fn assert_arrive(guest: &mut Guest, outside: &PacketSocket, len: usize) {
    let sent: Vec<_> = (0..AT_ONCE).map(|seq| frame(&Ends::RX, seq, len)).collect();
    sent.iter().for_each(|frame| outside.send(frame));
    let deadline = Instant::now() + PATIENCE;
    let mut came = 0;
    while came < sent.len() {
        assert!(Instant::now() < deadline, "{came} of {} frames of {len} bytes", sent.len());
        for pair in &mut guest.pairs {
            let mut last = None;
            while let Some((_, got)) = pair.recv(Duration::from_millis(1)) {
                let seq = sent.iter().position(|frame| *frame == got).expect("a frame that was sent");
                assert!(last.is_none_or(|last| last < seq), "out of order");
                (last, came) = (Some(seq), came + 1);
            }
        }
    }
}

fn assert_leave(guest: &mut Guest, outside: &PacketSocket, len: usize) {
    for pair in 0..guest.pairs.len() {
        (0..AT_ONCE).for_each(|seq| _ = guest.pairs[pair].queue(&VnetHdr::default(), &frame(&Ends::TX, seq, len)));
        guest.pairs[pair].tx.publish_and_kick();
        for seq in 0..AT_ONCE {
            assert!(outside.recv(PATIENCE).expect("a frame outside") == frame(&Ends::TX, seq, len), "frame {seq}");
        }
        assert!(guest.pairs[pair].wait_tx_done(PATIENCE));
    }
}

#[test]
fn plain_tagged_and_jumbo_frames_pass_both_ways() {
    const TEST: &str = "plain_tagged_and_jumbo_frames_pass_both_ways";
    if !require_root(TEST) {
        return;
    }
    for kind in ["tap", "macvtap"] {
        for (queue_pairs, features) in [1, 4].into_iter().flat_map(|pairs| [0, CSUM, TSO].map(|set| (pairs, set))) {
            for mtu in [1500, 9000] {
                let place = Place::new();
                let Some((outside, option)) = make(&place, kind, queue_pairs, mtu, TEST) else { return };
                let _backend = place.start(&[option, "dev0", "--queue-pairs", &queue_pairs.to_string()]);
                let mut guest = Guest::new(queue_pairs, features);
                let (count, len) = if features & feature::MRG_RXBUF == 0 { (32, 10_000) } else { (128, 2048) };
                guest.pairs.iter_mut().for_each(|pair| pair.post_rx(count, len));
                let front_end = place.connect(&guest);
                assert_eq!(front_end.get_config(10, 2).unwrap(), (mtu as u16).to_le_bytes());
                place.namespace.wait_operational("dev0");
                let outside = PacketSocket::open(&place.namespace, outside);
                for len in [60, 700, mtu as usize + 14] {
                    assert_leave(&mut guest, &outside, len);
                    assert_arrive(&mut guest, &outside, len);
                }
            }
        }
    }
}
