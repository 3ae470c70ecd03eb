//! Coalescing, without a ring around it: frames of a flow, mostly in order, put together as `tx` does.
//!
//! Oracle: what was put together, cut again by the kit's splitter, is what the guest sent, byte for byte with completed
//! checksums; and nothing is lost.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_user_net::net::coalesce::{Coalesce, MERGED_FRAME_MAX, Run, Segment};
use vhost_user_net::net::header::VnetHeader;
use vhost_user_net_fuzz::header_model;
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::split;
use vhost_user_net_fuzz::kit::virtio::VnetHdr;
use vhost_user_net_fuzz::scenario::{Flow, Sent, frame};

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

/// A run, with the first frame's start and the payload of all.
struct Open {
    run: Run,
    start: Vec<u8>,
    headers: usize,
    payload: Vec<u8>,
    frames: Vec<Sent>,
}

fn start(sent: &Sent) -> &[u8] {
    &sent.frame[..sent.frame.len().min(header_model::START)]
}

fn run(input: &mut Input<'_>) {
    let allowed = Coalesce { tcp: input.flag(), udp: input.flag() };
    let (mut flow, mut open) = (Flow::default(), None::<Open>);
    while !input.is_empty() {
        let sent = frame(input, &mut flow);
        // What the check lets through is what comes this far.
        let Some(header) = header_model::check(u64::MAX, sent.header, sent.frame.len(), start(&sent)) else { continue };
        let sent = Sent { header, ..sent };
        let ours = VnetHeader::from_bytes(&header.to_bytes());
        let segment = Segment::of(allowed, ours, start(&sent), sent.frame.len());
        let alike = open.as_ref().and_then(|open| alike(open, &sent));
        if let (Some(open), Some(segment)) = (&mut open, segment)
            && open.run.join(&open.start, segment, start(&sent))
        {
            assert!(alike.is_none_or(|alike| alike == open.run));
            open.payload.extend(&sent.frame[segment.headers_len()..]);
            open.frames.push(sent);
            continue;
        }
        assert!(alike.is_none(), "it did not join the other way");
        open.take().into_iter().for_each(close);
        open = segment.map(|segment| Open {
            run: Run::begin(segment),
            start: start(&sent).to_vec(),
            headers: segment.headers_len(),
            payload: sent.frame[segment.headers_len()..].to_vec(),
            frames: vec![sent],
        });
    }
    open.into_iter().for_each(close);
}

/// The run with this frame, if it joins at first sight.
fn alike(open: &Open, sent: &Sent) -> Option<Run> {
    let copy = |sent: &Sent, start: &[u8]| [&sent.header.to_bytes()[..], start].concat();
    let (first, next) = (copy(&open.frames[0], &open.start), copy(sent, start(sent)));
    let mut run = open.run;
    run.join_alike(&first, &next, sent.frame.len()).then_some(run)
}

fn close(mut open: Open) {
    assert_eq!(open.run.frames(), open.frames.len());
    if open.frames.len() == 1 {
        return;
    }
    let header = open.run.merge(&mut open.start).expect("a run becomes a frame");
    let whole = [&open.start[..open.headers], &open.payload].concat();
    assert!(whole.len() <= MERGED_FRAME_MAX);
    let parts = split::split(&VnetHdr::from_bytes(&header.to_bytes()), &whole).unwrap();
    assert_eq!(parts.len(), open.frames.len());
    for (part, guest) in parts.iter().zip(&open.frames) {
        split::same(part, &guest.completed(), true).unwrap();
    }
}
