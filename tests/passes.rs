//! What one pass may do before the other direction, and the control thread, have their turn.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::device_side::{ALL, DeviceSide};
use common::frames::{Ends, L4Csum, Stamp, payload, tcp4, test_frame};
use common::memory::GuestMemory;
use common::split_ring::{Buf, SplitRing};
use common::tap_double::TapDouble;
use common::virtio::{VnetHdr, feature, gso, net_flag};
use vhost_user_net::device::stage::Rings;
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
    // It takes all that a pass brings.
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let (_, queues) = Device::from_sockets(vec![device.into()], Layer::Ethernet).unwrap();
    let mem = Arc::new(GuestMemory::single(16 << 20));
    let mut ring = SplitRing::new(&mem, 256);
    let at = mem.alloc(70_000, 64);
    mem.write(at, &[&header.to_bytes()[..], frame].concat());
    for _ in 0..count {
        ring.add(&[Buf::readable(at, VnetHdr::LEN + frame.len())]);
    }
    ring.publish();
    let mut side = DeviceSide::start(&ring, ALL).unwrap();
    let rings = Rings::default();
    let (io, coalesce) = (Io::Syscall, Coalesce::default());
    let segment_limit = SegmentLimit::LARGEST;
    let uplink = Uplink { device: &queues[0], io, rings: &rings, coalesce, framing: &Framing::Whole, segment_limit };
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

/// How many frames each pass gives to a guest of `count` frames of `len` bytes that the device has.
fn rx_passes(len: usize, count: usize) -> Vec<usize> {
    let (tap, fd) = TapDouble::new();
    let (_, queues) = Device::from_sockets(vec![fd], Layer::Ethernet).unwrap();
    let mem = Arc::new(GuestMemory::single(16 << 20));
    let mut ring = SplitRing::new(&mem, 256);
    let at = mem.alloc(2048, 64);
    while ring.try_add(&[Buf::writable(at, 2048)]).is_some() {}
    ring.publish();
    let mut side = DeviceSide::start(&ring, ALL).unwrap();
    let rings = Rings::default();
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
        let before = counters.rx_frames.get();
        let end = rx.pump(&mut side.queue, &queues[0], &counters).unwrap();
        given.push((counters.rx_frames.get() - before) as usize);
        if end == Pump::Drained {
            return given;
        }
    }
}

/// The guest has large frames while others are still being read.
#[test]
fn pass_ends_after_so_many_bytes_for_the_guest() {
    assert_eq!(rx_passes(60, BUDGET + 1), [BUDGET, 1]);
    // 128 KiB are more than nine and less than ten of these.
    assert_eq!(rx_passes(14_000, 12), [10, 2]);
}
