//! What one pass may do before the other direction, and the control thread, have their turn.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::device_side::{ALL, DeviceSide};
use common::frames::{Ends, L4Csum, Stamp, payload, tcp4, test_frame, udp4};
use common::memory::GuestMemory;
use common::split_ring::{Buf, SplitRing};
use common::tap_double::TapDouble;
use common::virtio::{VnetHdr, feature, gso, net_flag};
use vhost_user_net::device::stage::UringPool;
use vhost_user_net::device::{Device, Io, Layer};
use vhost_user_net::metrics::PairCounters;
use vhost_user_net::net::coalesce::Coalesce;
use vhost_user_net::net::framing::Framing;
use vhost_user_net::net::header::SegmentLimit;
use vhost_user_net::net::rx::{Admission, Rx};
use vhost_user_net::net::tx::Tx;
use vhost_user_net::net::{BUDGET, Pump, Uplink};

/// How many frames each pass sends of a ring with `count` of this one.
fn passes(header: &VnetHdr, frame: &[u8], count: usize) -> Vec<usize> {
    passes_of(&[(*header, frame.to_vec())], count, Coalesce::default())
}

/// The same of a ring with these frames, over and over.
fn passes_of(frames: &[(VnetHdr, Vec<u8>)], count: usize, coalesce: Coalesce) -> Vec<usize> {
    // It takes all that a pass brings.
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let (_, queues) = Device::from_sockets(vec![device.into()], Layer::Ethernet).unwrap();
    let mem = Arc::new(GuestMemory::single(16 << 20));
    let mut ring = SplitRing::new(&mem, 256);
    let buffers = frames.iter().map(|(header, frame)| {
        let bytes = [&header.to_bytes()[..], frame].concat();
        let at = mem.alloc(bytes.len(), 64);
        mem.write(at, &bytes);
        Buf::readable(at, bytes.len())
    });
    let buffers: Vec<_> = buffers.collect();
    buffers.into_iter().cycle().take(count).for_each(|buffer| _ = ring.add(&[buffer]));
    ring.publish();
    let mut side = DeviceSide::start(&ring, ALL).unwrap();
    let rings = UringPool::default();
    let segment_limit = SegmentLimit::LARGEST;
    let uplink = Uplink {
        device: &queues[0],
        io: Io::Syscall,
        rings: &rings,
        coalesce,
        framing: &Framing::Whole,
        segment_limit,
    };
    let features = feature::CSUM | feature::HOST_TSO4;
    let mut tx = Tx::new(Arc::clone(side.queue.mem()), features, &uplink);
    let counters = PairCounters::default();
    let mut sent = Vec::new();
    loop {
        let before = counters.tx_frames.get();
        let end = tx.pump(&mut side.queue, &queues[0], &counters).unwrap();
        side.queue.publish();
        sent.push((counters.tx_frames.get() - before) as usize);
        if end == Pump::Drained {
            break;
        }
    }
    assert_eq!(sent.iter().sum::<usize>(), count);
    sent
}

#[test]
fn pass_ends_after_so_many_frames() {
    let frame = test_frame(&Ends::TX, Stamp { stream: 1, seq: 0 }, 64);
    assert_eq!(passes(&VnetHdr::default(), &frame, BUDGET + 1), [BUDGET, 1]);
}

/// H-05: a frame that the host has to cut into the smallest segments takes thirty times as long as one of usual segments.
#[test]
fn pass_ends_after_so_many_segments() {
    let bytes = payload(Stamp { stream: 1, seq: 0 }, 60_000);
    let frame = tcp4(&Ends::TX, 1, &bytes, L4Csum::Partial);
    let flags = net_flag::NEEDS_CSUM;
    let header = VnetHdr { flags, gso_type: gso::TCPV4, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    // 1,250 segments each: the third is one too many.
    assert_eq!(passes(&VnetHdr { gso_size: 48, ..header }, &frame, 7), [3, 3, 1]);
    // 42 each.
    assert_eq!(passes(&VnetHdr { gso_size: 1448, ..header }, &frame, BUDGET + 1), [BUDGET, 1]);
}

/// A run that two passes divide goes as two.
#[test]
fn pass_ends_with_a_full_run() {
    const UDP: Coalesce = Coalesce { tcp: false, udp: true };
    let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHdr::default() };
    let datagram = |src_port, len| {
        let bytes = payload(Stamp { stream: 1, seq: 0 }, len);
        (header, udp4(&Ends { src_port, ..Ends::TX }, &bytes, L4Csum::Partial))
    };
    // 46 have room in a frame.
    assert_eq!(passes_of(&[datagram(1, 1400)], 246, UDP), [BUDGET, 46, 46, 46, 44]);
    // Here as many as a pass has.
    assert_eq!(passes_of(&[datagram(1, 200)], BUDGET + 2, UDP), [BUDGET, 2]);
    // After a stream's end passes are as long as before.
    let mut frames = vec![datagram(1, 1400); BUDGET];
    frames.extend((0..160).map(|flow| datagram(flow, 1400)));
    assert_eq!(passes_of(&frames, frames.len(), UDP), [BUDGET, 46, BUDGET, 50]);
}

/// What each pass adds to a counter, where the device has `count` frames of `len` bytes and the guest's ring these
/// buffers, one after the other, over and over.
fn rx_passes(len: usize, count: usize, buffers: &[Buf], counted: impl Fn(&PairCounters) -> u64) -> Vec<u64> {
    let (tap, fd) = TapDouble::new();
    let (_, queues) = Device::from_sockets(vec![fd], Layer::Ethernet).unwrap();
    let mem = Arc::new(GuestMemory::single(16 << 20));
    let mut ring = SplitRing::new(&mem, 256);
    let at = mem.alloc(2048, 64);
    let all = buffers.iter().map(|buffer| Buf { addr: at, ..*buffer }).cycle();
    for buffer in all {
        if ring.try_add(&[buffer]).is_none() {
            break;
        }
    }
    ring.publish();
    let mut side = DeviceSide::start(&ring, ALL).unwrap();
    let rings = UringPool::default();
    let (io, coalesce, segment_limit) = (Io::Syscall, Coalesce::default(), SegmentLimit::default());
    let uplink = Uplink { device: &queues[0], io, rings: &rings, coalesce, framing: &Framing::Whole, segment_limit };
    let mem = Arc::clone(side.queue.mem());
    let mut rx = Rx::new(mem, feature::MRG_RXBUF, Admission::default(), &uplink, Vec::new());
    for _ in 0..count {
        tap.send(&VnetHdr::default(), &test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, len));
    }
    let counters = PairCounters::default();
    let mut given = Vec::new();
    loop {
        let before = counted(&counters);
        let end = rx.pump(&mut side.queue, &queues[0], &counters).unwrap();
        given.push(counted(&counters) - before);
        if end == Pump::Drained || end == Pump::NoBuffers {
            return given;
        }
    }
}

/// The guest has large frames while others are still being read.
#[test]
fn pass_ends_after_so_many_bytes_for_the_guest() {
    let frames = |len, count| rx_passes(len, count, &[Buf::writable(0, 2048)], |c| c.rx_frames.get());
    assert_eq!(frames(60, BUDGET + 1), [BUDGET as u64, 1]);
    // 128 KiB are more than nine and less than ten of these.
    assert_eq!(frames(14_000, 12), [10, 2]);
}

/// Buffers that a bad one spoils are popped in vain, and may be many: a pass that went on would be as long as the guest likes.
#[test]
fn pass_ends_with_a_bad_chain_among_the_buffers_of_a_frame() {
    let group = [Buf::writable(0, 512), Buf::writable(0, 512), Buf::readable(0, 512)];
    let returned = rx_passes(1500, 1, &group, |c| c.rx_bad_chains.get());
    // The last buffer is the first of a group that is not whole.
    assert_eq!(returned, [vec![3; 256 / 3], vec![0]].concat());
}
