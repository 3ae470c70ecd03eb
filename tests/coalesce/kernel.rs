//! The kernel's opinion: it cuts merged frames into the guest's.

use std::cell::Cell;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

use crate::common::PATIENCE;
use crate::common::netns::{NetNs, TapQueue, TapSpec, require_root};
use crate::common::virtio::{VnetHdr, gso};
use crate::cut_again::harmless_streams;
use crate::{
    ACK, DF, ECE, FIN, Frame, KINDS, PSH, Rendered, TCP, UDP, be16, coalesce, make_sum_zero, put, render, same, stream,
    tagged,
};

/// TAP a and TAP b in one bridge. What the guest sends into a comes out of b; b takes no offloads, so that the kernel
/// cuts frames and completes checksums before.
struct Bridge {
    a: TapQueue,
    b: TapQueue,
    _namespace: NetNs,
}

impl Bridge {
    fn new() -> Self {
        const MTU: u32 = 65_521;
        let namespace = NetNs::new();
        namespace.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0");
        for (name, mac) in [("tap_a", "52:54:00:cc:00:01"), ("tap_b", "52:54:00:cc:00:02")] {
            namespace.add_tap(&TapSpec { mac: Some(mac), mtu: Some(MTU), ..TapSpec::new(name) });
        }
        let [a, b] = ["tap_a", "tap_b"].map(|name| namespace.open_tap(name, false));
        for name in ["tap_a", "tap_b"] {
            namespace.ip(&format!("link set {name} master br0"));
        }
        namespace.ip(&format!("link set br0 mtu {MTU} up"));
        let bridge = Self { a, b, _namespace: namespace };
        bridge.wait_forwarding();
        bridge
    }

    /// A port's carrier is taken note of a moment after it came: what is sent before does not come through.
    fn wait_forwarding(&self) {
        let mut probe = [0xff; 60];
        probe[6..14].copy_from_slice(&[0x52, 0x54, 0, 0xcc, 0, 3, 0x88, 0xb5]);
        let deadline = Instant::now() + PATIENCE;
        while self.b.read(Duration::from_millis(50)).is_none() {
            assert!(Instant::now() < deadline, "The bridge does not forward");
            self.a.write(&VnetHdr::default(), &probe).expect("a write to a TAP that is up");
        }
        while self.b.read(Duration::from_millis(50)).is_some() {}
    }

    /// Coalesces `frames`, sends the result, and compares what the kernel makes of it. Tells how many were sent.
    fn check(&self, frames: &[Rendered]) -> Result<usize, String> {
        let mut guest = frames.iter();
        let all_sent = coalesce(frames);
        for sent in &all_sent {
            self.a.write(&sent.frame.header, &sent.frame.bytes).map_err(|error| format!("{sent:?}: {error}"))?;
            for _ in 0..sent.frames {
                let (header, got) = self.b.read(PATIENCE).ok_or_else(|| format!("A frame is missing of {sent:?}"))?;
                assert_eq!((header.flags, header.gso_type), (0, gso::NONE));
                let guest = guest.next().unwrap();
                same(&one_zero(guest, got), guest, sent.frames > 1)?;
            }
        }
        assert!(self.b.read(Duration::ZERO).is_none(), "more frames than the guest's");
        Ok(all_sent.len())
    }

    fn assert_one(&self, frames: &[Frame]) {
        assert_eq!(self.check(&render(frames)).unwrap(), 1, "{frames:?}");
    }
}

/// A TCP checksum of 0 may come as 0xffff, which is the same to TCP: Linux does that to a frame which it does not cut.
fn one_zero(guest: &Rendered, mut got: Vec<u8>) -> Vec<u8> {
    let at = usize::from(guest.header.csum_start) + 16;
    let is_zero = guest.header.csum_offset == 16 && be16(&guest.completed(), at) == 0;
    if is_zero && got.get(at..at + 2) == Some(&[0xff, 0xff]) {
        put(&mut got, at, 0);
    }
    got
}

#[test]
fn kernel_cuts_merged_frames_into_the_guests() {
    if !require_root("kernel_cuts_merged_frames_into_the_guests") {
        return;
    }
    let bridge = Bridge::new();
    for kind in KINDS {
        for tags in 0..=2 {
            for fragment in [0, DF] {
                let first = Frame { tags: tagged(tags), fragment, id: 0xfffe, seq: u32::MAX - 99, ..Frame::new(kind) };
                for lengths in [&[1000; 30][..], &[1447; 5], &[101, 101, 101, 1], &[2, 1], &[1; 40], &[8000, 7999]] {
                    bridge.assert_one(&stream(first.clone(), lengths));
                }
            }
        }
    }
}

#[test]
fn kernel_keeps_flags_options_and_ecn_of_merged_tcp() {
    if !require_root("kernel_keeps_flags_options_and_ecn_of_merged_tcp") {
        return;
    }
    let bridge = Bridge::new();
    for kind in TCP {
        for (flags, last) in [(ACK, PSH), (ACK, FIN), (ACK, PSH | FIN), (ACK | ECE, 0), (ACK | ECE, PSH)] {
            let options = (1..=20).collect();
            let mut frames = stream(Frame { flags, options, tos: 3, ..Frame::new(kind) }, &[500, 500, 500, 77]);
            frames[3].flags |= last;
            bridge.assert_one(&frames);
        }
    }
}

#[test]
fn kernel_cuts_the_longest_frames_and_the_most_datagrams() {
    if !require_root("kernel_cuts_the_longest_frames_and_the_most_datagrams") {
        return;
    }
    let bridge = Bridge::new();
    for kind in KINDS {
        let room = 65_535 - Frame::new(kind).headers();
        bridge.assert_one(&stream(Frame::new(kind), &[room - room / 2, room / 2]));
        bridge.assert_one(&stream(Frame::new(kind), &[9; 64]));
    }
}

#[test]
fn kernel_gives_back_a_udp_checksum_that_comes_out_as_0() {
    if !require_root("kernel_gives_back_a_udp_checksum_that_comes_out_as_0") {
        return;
    }
    let bridge = Bridge::new();
    for kind in UDP {
        let mut frames = stream(Frame::new(kind), &[100; 4]);
        frames.iter_mut().for_each(make_sum_zero);
        bridge.assert_one(&frames);
    }
}

#[test]
fn kernel_cuts_random_streams_into_the_guests_frames() {
    if !require_root("kernel_cuts_random_streams_into_the_guests_frames") {
        return;
    }
    let bridge = Bridge::new();
    let merged = Cell::new(0);
    let mut runner = TestRunner::new(ProptestConfig { cases: 300, ..ProptestConfig::default() });
    let result = runner.run(&harmless_streams(), |frames| {
        // What a case that failed left behind.
        while bridge.b.read(Duration::ZERO).is_some() {}
        let sent = bridge.check(&frames).map_err(TestCaseError::fail)?;
        merged.set(merged.get() + frames.len() - sent);
        Ok(())
    });
    result.unwrap();
    assert!(merged.get() > 1000, "Only {} frames were merged", merged.get());
}
