//! What is merged or not, cut again, is what the guest sent.

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use vhost_user_net::net::coalesce::{Run, Segment};

use crate::common::virtio::VnetHdr;
use crate::{ALL, DF, FIN, Frame, KINDS, PSH, Rendered, ours, render, stream, tagged, there_and_back};

/// Each bit of the headers is turned over, in one frame of three or in all, with sums that fit again or not.
#[test]
fn any_header_bit_may_be_turned_over() {
    for kind in KINDS {
        for fragment in [0, DF] {
            let first = Frame { tags: tagged(1), options: vec![1; 4], fragment, ..Frame::new(kind) };
            let frames = stream(first, &[100; 3]);
            for bit in 0..frames[0].headers() * 8 {
                for (changed, repaired) in [(0..1, true), (1..2, true), (2..3, true), (0..3, true), (1..2, false)] {
                    let mut rendered = render(&frames);
                    for at in changed {
                        rendered[at].bytes[bit / 8] ^= 1 << (bit % 8);
                        if repaired {
                            frames[at].repair(&mut rendered[at]);
                        }
                    }
                    there_and_back(&rendered).unwrap_or_else(|why| panic!("{kind:?}, bit {bit}: {why}"));
                }
            }
        }
    }
}

/// One frame of a random stream.
#[derive(Clone, Debug)]
struct Step {
    flow: usize,
    len: usize,
    change: Change,
}

#[derive(Clone, Debug)]
enum Change {
    None,
    LastFlags(u8),
    Sequence(u32),
    Identification(u16),
    /// Fields that segmentation copies.
    Flags(u8),
    Ack,
    /// Turns a bit of the headers over; the sums fit again or not.
    Bit(usize, bool),
    Header(VnetHdr),
    Padding(usize),
}

fn flow() -> impl Strategy<Value = Frame> {
    let options = prop_oneof![Just(0_usize), Just(12), Just(40)];
    let kind = proptest::sample::select(&KINDS);
    let numbers = (any::<u16>(), any::<u32>(), any::<[u8; 4]>());
    (kind, 0..3_usize, any::<bool>(), options, numbers).prop_map(|(kind, tags, df, options, (id, seq, ip))| {
        let mut frame = Frame { tags: tagged(tags), options: vec![1; options], id, seq, ..Frame::new(kind) };
        frame.fragment = if df { DF } else { 0 };
        frame.dst_ip[12..].copy_from_slice(&ip);
        frame
    })
}

fn step() -> impl Strategy<Value = Step> {
    let flow = prop_oneof![20 => Just(0_usize), 2 => Just(1), 1 => Just(2)];
    let len =
        prop_oneof![20 => Just(1000_usize), 1 => 0..1000_usize, 1 => Just(1001), 2 => Just(1), 1 => 1400..9000_usize];
    let change = prop_oneof![
        30 => Just(Change::None),
        2 => proptest::sample::select(vec![PSH, FIN, PSH | FIN]).prop_map(Change::LastFlags),
        1 => any::<u32>().prop_map(Change::Sequence),
        1 => any::<u16>().prop_map(Change::Identification),
        1 => any::<u8>().prop_map(Change::Flags),
        1 => Just(Change::Ack),
        2 => (0..122 * 8_usize, any::<bool>()).prop_map(|(bit, repair)| Change::Bit(bit, repair)),
        1 => Just(Change::Header(VnetHdr::default())),
        1 => (1..50_usize).prop_map(Change::Padding),
    ];
    (flow, len, change).prop_map(|(flow, len, change)| Step { flow, len, change })
}

/// Frames of three flows, mostly of the first, mostly as they should be.
fn streams() -> impl Strategy<Value = Vec<Rendered>> {
    let flows = (flow(), flow(), any::<bool>()).prop_map(|(first, second, near)| {
        let third = Frame { src_port: first.src_port + 1, ..first.clone() };
        if near { [first.clone(), first, third] } else { [first, second, third] }
    });
    (flows, proptest::collection::vec(step(), 1..64)).prop_map(|(mut flows, steps)| {
        let steps = steps.iter();
        steps.map(|step| advance(&mut flows[step.flow], step)).collect()
    })
}

/// Frames of one flow, none of which a bridge may keep or the kernel may refuse, merged or not.
pub(crate) fn harmless_streams() -> impl Strategy<Value = Vec<Rendered>> {
    (flow(), proptest::collection::vec(step(), 2..64)).prop_map(|(mut flow, steps)| {
        let harmless = steps.iter().filter(|step| !matches!(step.change, Change::Bit(..) | Change::Padding(_)));
        harmless.map(|step| advance(&mut flow, step)).collect()
    })
}

/// The flow's next frame.
fn advance(flow: &mut Frame, step: &Step) -> Rendered {
    let mut frame = flow.next(step.len);
    *flow = frame.clone();
    match step.change {
        Change::LastFlags(flags) => frame.flags |= flags,
        Change::Sequence(seq) => frame.seq = seq,
        Change::Identification(id) => frame.id = id,
        Change::Flags(flags) => frame.flags = flags,
        Change::Ack => frame.ack += 1,
        _ => {}
    }
    let mut rendered = frame.render();
    match step.change {
        Change::Bit(bit, repair) => {
            rendered.bytes[bit / 8 % frame.headers()] ^= 1 << (bit % 8);
            if repair {
                frame.repair(&mut rendered);
            }
        }
        Change::Header(header) => rendered.header = header,
        Change::Padding(len) => rendered.bytes.extend(vec![0; len]),
        _ => {}
    }
    rendered
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames_that_are_cut_again_are_the_guests(frames in streams()) {
        there_and_back(&frames).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn clean_stream_becomes_one(first in flow(), (len, last) in (1..1400_usize, 1..1400_usize), n in 2..40_usize) {
        let lengths: Vec<_> = (1..n).map(|_| len).chain([last.min(len)]).collect();
        prop_assert_eq!(there_and_back(&render(&stream(first, &lengths))).unwrap(), [n]);
    }

    /// Hostile bytes, of which the first may look well.
    #[test]
    fn hostile_bytes_are_judged(
        fields in any::<(u8, u8, [u16; 5])>(),
        (first_start, next_start) in any::<(Vec<u8>, Vec<u8>)>(),
        model in flow(),
        (len, flips) in (0..70_000_usize, proptest::collection::vec((0..192_usize, any::<u8>()), 0..3)),
        (looks_well, fits) in any::<(bool, bool)>(),
    ) {
        let good = model.with_payload(50).render();
        let (flags, gso_type, [hdr_len, gso_size, csum_start, csum_offset, num_buffers]) = fields;
        let hostile = VnetHdr { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers };
        let header = ours(if looks_well { good.header } else { hostile });
        let mut start = if looks_well { good.bytes.clone() } else { first_start.clone() };
        for (at, value) in flips {
            if let Some(byte) = start.get_mut(at) {
                *byte = value;
            }
        }
        let segment = Segment::of(ALL, header, &start, if fits { start.len() } else { len });
        let well = good.segment(ALL).unwrap();
        for first in [Some(well), segment].into_iter().flatten() {
            let mut run = Run::begin(first);
            for next in [Some(well), segment].into_iter().flatten() {
                // Copies of other frames, or none.
                run.join(&start, next, &next_start);
                run.join(&first_start, next, &start);
                run.join(&start, next, &start);
            }
            for [first, next] in [[&first_start, &next_start], [&start, &next_start], [&start, &start]] {
                run.join_alike(first, next, len);
                run.join_alike(first, next, next.len());
            }
            let mut short = first_start.clone();
            let merged = run.merge(&mut short);
            prop_assert!(run.frames() == 1 || short.len() >= first.headers_len() || merged.is_none());
            run.merge(&mut start);
        }
    }
}
