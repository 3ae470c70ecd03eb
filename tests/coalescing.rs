//! Frames of one flow that go to the device as one: on the whole path, from the ring to the device.
//!
//! The rule (what may be merged, and that cutting gives the same frames again) has tests of its own in `tests/coalesce`;
//! here is what the path makes of it: gathering from chains of any shape, order, completion, counters.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::PATIENCE;
use common::driver::NetDriverSpec;
use common::frames::{self, Ends, L4Csum, Stamp, payload, test_frame};
use common::path_bench::Bench;
use common::split;
use common::split_ring::Buf;
use common::virtio::{VnetHdr, feature, net_flag};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

fn udp_header() -> VnetHdr {
    VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHdr::default() }
}

/// A datagram of flow `flow` that leaves its checksum to others.
fn datagram(flow: u16, seq: u32, len: usize) -> Vec<u8> {
    let ends = Ends { src_port: 4000 + flow, ..Ends::TX };
    frames::udp4(&ends, &payload(Stamp { stream: flow, seq }, len), L4Csum::Partial)
}

fn bench() -> Bench {
    let features = feature::CSUM | feature::EVENT_IDX | feature::INDIRECT_DESC;
    Bench::with(NetDriverSpec { features, ..NetDriverSpec::default() })
}

/// One frame of the guest: flow (or none: not to be merged), length, and the lengths of its chain's first elements.
#[derive(Clone, Debug)]
struct Plan {
    flow: Option<u16>,
    len: usize,
    cuts: Vec<usize>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let flow = prop_oneof![6 => Just(Some(0)), 2 => Just(Some(1)), 1 => Just(None)];
    let len = prop_oneof![8 => Just(1400_usize), 4 => Just(200), 2 => 16..3000_usize];
    let cuts = prop::collection::vec(1..1500_usize, 0..4);
    (flow, len, cuts).prop_map(|(flow, len, cuts)| Plan { flow, len, cuts })
}

/// The kit's packets have DF set: their identification means nothing (RFC 6864) and rises when they are cut. Without it,
/// and without the IP header's checksum, which has it in it.
fn without_id(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame[12..14] == [8, 0] {
        assert_eq!(frame[20], 0x40);
        frame[18..20].fill(0);
        frame[24..26].fill(0);
    }
    frame
}

/// Sends the frames in one go; what the device gets, cut again, must be these frames, in this order.
fn check(bench: &mut Bench, plans: &[Plan]) -> TestCaseResult {
    let mut wanted = Vec::new();
    for (seq, Plan { flow, len, cuts }) in (0..).zip(plans) {
        let (header, frame) = match flow {
            Some(flow) => (udp_header(), datagram(*flow, seq, *len)),
            None => (VnetHdr::default(), test_frame(&Ends::TX, Stamp { stream: 9, seq }, 60 + len)),
        };
        let bytes = [&header.to_bytes()[..], &frame].concat();
        let mut left = bytes.len() - 1;
        let fits = |cut: &&usize| {
            left = left.saturating_sub(**cut);
            left > 0
        };
        let cuts: Vec<_> = cuts.iter().take_while(fits).copied().collect();
        bench.driver.queue_split(&bytes, &cuts);
        wanted.push(split::complete(&header, &frame));
    }
    bench.driver.tx.publish_and_kick();
    let mut got = Vec::new();
    while got.len() < wanted.len() {
        let Some((header, frame)) = bench.tap().recv(PATIENCE) else { break };
        got.extend(split::split(&header, &frame).map_err(TestCaseError::fail)?);
    }
    let different = got.iter().zip(&wanted).position(|(got, wanted)| without_id(got) != without_id(wanted));
    prop_assert_eq!((different, got.len()), (None, wanted.len()));
    prop_assert!(bench.driver.wait_tx_done(PATIENCE), "every head comes back");
    prop_assert!(bench.tap().recv(Duration::ZERO).is_none());
    Ok(())
}

#[test]
fn frames_that_leave_are_those_of_the_guest_however_they_are_merged() {
    let bench = std::cell::RefCell::new(bench());
    let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(plans in prop::collection::vec(plan(), 1..60))| {
        check(&mut bench.borrow_mut(), &plans)?;
    });
    let bench = bench.into_inner();
    let (frames, runs) = (bench.counter("tx_coalesced_frames"), bench.counter("tx_coalesced_runs"));
    assert!(runs > 60 && frames > 2 * runs, "only {frames} frames went as {runs}");
}

#[test]
fn stream_of_datagrams_leaves_as_few_frames_and_each_is_counted() {
    let mut bench = bench();
    for seq in 0..120 {
        bench.driver.queue(&udp_header(), &datagram(0, seq, 1000));
    }
    bench.driver.tx.publish_and_kick();
    let mut writes = 0;
    let mut datagrams = 0;
    while datagrams < 120 {
        let (header, frame) = bench.tap().recv(PATIENCE).expect("all come out");
        writes += 1;
        datagrams += split::split(&header, &frame).unwrap().len();
    }
    assert!(bench.driver.wait_tx_done(PATIENCE));
    bench.wait_counter("tx_frames", 120);
    bench.wait_counter("tx_bytes", 120 * 1042);
    assert!(writes <= 6, "{writes} writes");
    assert_eq!(bench.counter("tx_coalesced_frames"), 120);
    assert_eq!(bench.counter("tx_coalesced_runs"), writes);
}

/// A run in more pieces than one system call takes goes by way of a copy.
#[test]
fn run_in_a_thousand_pieces_leaves_whole() {
    const FRAMES: u32 = 40;
    const PIECE: usize = 25;
    let mut bench = bench();
    let mut wanted = Vec::new();
    for seq in 0..FRAMES {
        let frame = datagram(0, seq, 900);
        let bytes = [&udp_header().to_bytes()[..], &frame].concat();
        let bufs: Vec<_> = bytes
            .chunks(PIECE)
            .map(|piece| {
                // Apart, or the back-end would take neighbours for one piece.
                let at = bench.mem.alloc(2 * PIECE, 64);
                bench.mem.write(at, piece);
                Buf::readable(at, piece.len())
            })
            .collect();
        bench.driver.tx.add_indirect(&bufs);
        wanted.push(without_id(&split::complete(&udp_header(), &frame)));
    }
    bench.driver.tx.publish_and_kick();
    let mut got = Vec::new();
    while got.len() < wanted.len() {
        let (header, frame) = bench.tap().recv(PATIENCE).expect("all come out");
        got.extend(split::split(&header, &frame).unwrap().iter().map(|frame| without_id(frame)));
    }
    assert!(got == wanted);
    bench.wait_counter("tx_frames", FRAMES.into());
    assert!(bench.counter("tx_coalesced_frames") * 40 > 1024, "too few pieces went together");
}
