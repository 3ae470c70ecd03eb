//! Flows over several queue pairs: a program of ours picks the socket of each frame.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::bench::Guest;
use crate::common::frames::{self, Ends, L4Csum, Stamp, find_stamp, payload};
use crate::common::frontend::{Answer, RawFrontend};
use crate::common::message::Message;
use crate::common::netns::PacketSocket;
use crate::{CSUM, Kind, Place, fill, guest_with};

type Builder = fn(&Ends, &[u8]) -> Vec<u8>;

/// Frames of each protocol that has ports.
const BUILDERS: [Builder; 4] = [
    |ends, payload| frames::udp4(ends, payload, L4Csum::Full),
    |ends, payload| frames::tcp4(ends, 1, payload, L4Csum::Full),
    |ends, payload| frames::udp6(ends, payload, L4Csum::Full),
    |ends, payload| frames::tcp6(ends, 1, payload, L4Csum::Full),
];
const FLOWS: u16 = 64;

/// Frame `seq` of a flow, which is its stamp's stream.
fn frame_of(build: Builder, flow: u16, seq: u32) -> Vec<u8> {
    let ends = Ends { src_port: 1000 + flow, ..Ends::RX };
    build(&ends, &payload(Stamp { stream: flow, seq }, 100))
}

/// What comes to each queue pair until `count` frames came.
fn collect(guest: &mut Guest, count: usize) -> Vec<Vec<Stamp>> {
    let came = collect_for(PATIENCE, guest, count);
    let counts: Vec<_> = came.iter().map(Vec::len).collect();
    assert_eq!(counts.iter().sum::<usize>(), count, "{counts:?}");
    came
}

/// The same, or what came until `timeout` passed.
fn collect_for(timeout: Duration, guest: &mut Guest, count: usize) -> Vec<Vec<Stamp>> {
    let deadline = Instant::now() + timeout;
    let mut came = vec![Vec::new(); guest.pairs.len()];
    while came.iter().map(Vec::len).sum::<usize>() < count && Instant::now() < deadline {
        for (pair, came) in guest.pairs.iter_mut().zip(&mut came) {
            let received = std::iter::from_fn(|| pair.recv(Duration::ZERO));
            came.extend(received.map(|(_, frame)| find_stamp(&frame).unwrap().unwrap()));
        }
    }
    came
}

/// A frame of each flow arrives, and no other, on one of `pairs`; tells which of all pairs got some.
pub(crate) fn assert_flows_arrive(guest: &mut Guest, outside: &PacketSocket, pairs: &[usize]) -> Vec<usize> {
    let mut used = BTreeSet::new();
    for build in BUILDERS {
        let seq = send_flows(outside, build);
        let came = collect(guest, usize::from(FLOWS));
        assert!(came.iter().flatten().all(|stamp| stamp.seq == seq), "A frame of long ago: {came:?}");
        used.extend((0..came.len()).filter(|pair| !came[*pair].is_empty()));
    }
    assert!(used.iter().all(|pair| pairs.contains(pair)), "{used:?} got frames, {pairs:?} are in use");
    used.into_iter().collect()
}

/// Sends a frame of each flow; tells the number in their stamps.
fn send_flows(outside: &PacketSocket, build: Builder) -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let seq = NEXT.fetch_add(1, Ordering::Relaxed);
    (0..FLOWS).for_each(|flow| outside.send(&frame_of(build, flow, seq)));
    seq
}

/// Waits until no flow is steered to a pair that is not in use, which is seen to a moment after the front-end's last
/// message: until then some are lost.
fn wait_steered(guest: &mut Guest, outside: &PacketSocket) {
    let deadline = Instant::now() + PATIENCE;
    let mut first = None;
    loop {
        let seq = send_flows(outside, BUILDERS[0]);
        let first = *first.get_or_insert(seq);
        let came = collect_for(Duration::from_millis(100), guest, usize::from(FLOWS));
        assert!(came.iter().flatten().all(|stamp| stamp.seq >= first), "A frame of long ago: {came:?}");
        if came.iter().map(Vec::len).sum::<usize>() == usize::from(FLOWS) {
            return;
        }
        assert!(Instant::now() < deadline, "Flows are lost");
    }
}

#[test]
fn each_pair_gets_flows_and_each_flow_stays_in_order_on_one() {
    for kind in [Kind::Veth, Kind::Macvlan("bridge")] {
        let Some(place) = Place::new("each_pair_gets_flows_and_each_flow_stays_in_order_on_one") else { return };
        let _backend = place.start(&["--interface", place.make(kind), "--queue-pairs", "4"]);
        let mut guest = guest_with(4, CSUM);
        let _front_end = place.connect(&guest);
        let outside = place.outside();
        for build in BUILDERS {
            for seq in 0..10 {
                (0..FLOWS).for_each(|flow| outside.send(&frame_of(build, flow, seq)));
            }
            let came = collect(&mut guest, 10 * usize::from(FLOWS));
            assert!(came.iter().all(|came| !came.is_empty()), "One pair got nothing");
            for flow in 0..FLOWS {
                let of_flow = |came: &Vec<Stamp>| -> Vec<u32> {
                    came.iter().filter(|stamp| stamp.stream == flow).map(|stamp| stamp.seq).collect()
                };
                let places: Vec<_> = came.iter().map(of_flow).filter(|seqs| !seqs.is_empty()).collect();
                assert_eq!(places, [(0..10).collect::<Vec<_>>()], "flow {flow}");
            }
        }
    }
}

/// The later fragments of a datagram have no ports.
#[test]
fn fragments_of_a_datagram_come_to_one_pair() {
    let Some(place) = Place::new("fragments_of_a_datagram_come_to_one_pair") else { return };
    let _backend = place.start(&["--interface", "card", "--queue-pairs", "4"]);
    let mut guest = guest_with(4, CSUM);
    let _front_end = place.connect(&guest);
    let outside = place.outside();
    for flow in 0..FLOWS {
        let mut frame = frame_of(BUILDERS[0], flow, 0);
        // More fragments; or an offset, in units of 8 bytes.
        let fragment: u16 = if flow % 2 == 0 { 0x2000 } else { 100 };
        frame[20..22].copy_from_slice(&fragment.to_be_bytes());
        outside.send(&frame);
    }
    let came = collect(&mut guest, usize::from(FLOWS));
    assert_eq!(came.iter().filter(|came| !came.is_empty()).count(), 1);
}

/// A flow that is steered to a pair that the guest never fills would be lost.
#[test]
fn pair_without_buffers_gets_no_frames_until_it_has_some() {
    let Some(place) = Place::new("pair_without_buffers_gets_no_frames_until_it_has_some") else { return };
    let _backend = place.start(&["--interface", "card", "--queue-pairs", "4"]);
    let mut guest = Guest::new(4, CSUM);
    fill(&mut guest, 0, CSUM);
    let _front_end = place.connect(&guest);
    let outside = place.outside();
    assert_flows_arrive(&mut guest, &outside, &[0]);
    for filled in [&[0, 2][..], &[0, 2, 3], &[0, 1, 2, 3]] {
        let newest = *filled.iter().find(|pair| guest.pairs[**pair].rx.outstanding().is_empty()).unwrap();
        fill(&mut guest, newest, CSUM);
        let deadline = Instant::now() + PATIENCE;
        while assert_flows_arrive(&mut guest, &outside, filled).len() < filled.len() {
            assert!(Instant::now() < deadline, "Pair {newest} gets nothing");
        }
    }
}

/// What was steered to a pair before it was taken out of use is not there when it is used again.
#[test]
fn flows_follow_the_pairs_that_are_enabled() {
    let Some(place) = Place::new("flows_follow_the_pairs_that_are_enabled") else { return };
    let _backend = place.start(&["--interface", "card", "--queue-pairs", "4"]);
    let mut guest = guest_with(4, CSUM);
    let front_end = place.connect(&guest);
    let outside = place.outside();
    for in_use in [vec![0, 1], vec![0], vec![0, 1, 2], vec![1, 3], vec![0, 1, 2, 3]] {
        (0..4).for_each(|pair| enable(&front_end, pair, in_use.contains(&pair)));
        wait_steered(&mut guest, &outside);
        assert_eq!(assert_flows_arrive(&mut guest, &outside, &in_use), in_use);
    }
}

fn enable(front_end: &RawFrontend, pair: usize, enabled: bool) {
    for ring in [2 * pair, 2 * pair + 1] {
        assert_eq!(front_end.ask(Message::set_vring_enable(ring as u32, u32::from(enabled))), Answer::Ack);
    }
}
