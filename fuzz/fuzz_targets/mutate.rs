//! A guest that rewrites its memory while it is read: one thread runs both directions, another flips the words that the
//! input names, as fast as it can.
//!
//! Oracle: what reaches the device is as it was checked: its header, judged again with the frame that it came with, is the
//! one that such a frame may have. Nothing is written outside the guest's buffers and its used rings.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::device::stage::UringPool;
use vhost_user_net::device::{Device, Io, Layer};
use vhost_user_net::metrics::PairCounters;
use vhost_user_net::net::Uplink;
use vhost_user_net::net::coalesce::Coalesce;
use vhost_user_net::net::features::GuestOffloads;
use vhost_user_net::net::framing::Framing;
use vhost_user_net::net::header::SegmentLimit;
use vhost_user_net::net::rx::{Admission, Rx};
use vhost_user_net::net::tx::Tx;
use vhost_user_net::virtqueue::Queue;
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net_fuzz::guest::{self, DATA, Guest, HOLE, SECOND, START};
use vhost_user_net_fuzz::header_model;
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::device_side::find;
use vhost_user_net_fuzz::kit::split_ring::{Desc, RingAddrs};
use vhost_user_net_fuzz::kit::tap_double::TapDouble;
use vhost_user_net_fuzz::kit::virtio::{desc_flag, feature};
use vhost_user_net_fuzz::scenario::{Flow, Sent, TX_FEATURES, Writer, cut, frame};

const SIZE: u16 = 32;
const TX: RingAddrs = RingAddrs { desc: START, avail: START + 0x200, used: START + 0x300 };
const RX: RingAddrs = RingAddrs { desc: START + 0x800, avail: START + 0xa00, used: START + 0xb00 };
const TABLES: u64 = START + 0x1000;
/// Passes of each direction.
const PASSES: usize = 24;

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

fn run(input: &mut Input<'_>) {
    let Guest { mem, view } = guest::fresh();
    let features = input.subset(&TX_FEATURES);
    let coalesce = Coalesce { tcp: input.flag(), udp: input.flag() };
    let (tap, fd) = TapDouble::new();
    let (_, queues) = Device::from_sockets(vec![fd], Layer::Ethernet).unwrap();
    let segment_limit = SegmentLimit::LARGEST;
    let uplink = Uplink {
        device: &queues[0],
        io: Io::Syscall,
        rings: &UringPool::default(),
        coalesce,
        framing: &Framing::Whole,
        segment_limit,
    };
    for ring in [TX, RX] {
        mem.fill(ring.avail, 4, 0);
        mem.fill(ring.used, 4, 0);
    }
    let start = |ring| {
        let found = find(view, SIZE, ring).unwrap();
        Queue::start(found, Arc::clone(view), RingFeatures { event_idx: false, indirect: true }).unwrap()
    };
    let (mut tx_queue, mut rx_queue) = (start(TX), start(RX));
    let mut tx = Tx::new(Arc::clone(view), features, &uplink);
    let admission = Admission { offloads: GuestOffloads::of(0), ..Admission::default() };
    let mut rx = Rx::new(Arc::clone(view), feature::MRG_RXBUF, admission, &uplink, Vec::new());
    let counters = PairCounters::default();

    // Frames to send in the first half of memory, buffers in the second, of which the guest may make what it likes.
    let mut writer = Writer { mem, addrs: TX, size: SIZE, next: 0, tables: TABLES, chains: 0 };
    let (mut at, mut flow) = (DATA, Flow::default());
    for _ in 0..=input.below(8) {
        let sent = frame(input, &mut flow).bytes();
        if at + sent.len() as u64 > SECOND {
            break;
        }
        mem.write(at, &sent);
        let descs = cut(input, at, sent.len(), 0);
        let is_indirect = input.flag();
        writer.add(input, descs, is_indirect);
        at += sent.len() as u64;
    }
    let mut buffers = Writer { mem, addrs: RX, size: SIZE, next: 0, tables: TABLES + 0x1000, chains: 0 };
    for buffer in 0..8 {
        let desc = Desc { addr: SECOND + 0x1000 * buffer, len: 0x800, flags: desc_flag::WRITE, next: 0 };
        buffers.add(&mut Input::new(&[]), vec![desc], buffer % 2 == 1);
    }
    let frames: Vec<Sent> = (0..4).map(|_| frame(input, &mut flow)).collect();
    let flips: Vec<(u64, u8, u8)> = (0..=input.below(32)).map(|_| (place(input, at), input.u8(), input.u8())).collect();

    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (addr, one, other) in &flips {
                    mem.write(*addr, &[*one]);
                    mem.write(*addr, &[*other]);
                }
            }
        });
        for pass in 0..PASSES {
            let _ = tap.try_send_raw(&frames[pass % frames.len()].bytes());
            // A ring that is broken is left alone from then on; here the guest mends it.
            let _ = tx.pump(&mut tx_queue, &queues[0], &counters);
            tx_queue.publish();
            let _ = rx.pump(&mut rx_queue, &queues[0], &counters);
            rx_queue.publish();
            for (ring, chains) in [(TX, writer.chains), (RX, buffers.chains)] {
                let used = mem.load_u16(ring.used + 2, Ordering::Relaxed);
                mem.store_u16(ring.avail + 2, used.wrapping_add(chains), Ordering::Release);
            }
            while let Some(bytes) = tap.recv_raw(Duration::ZERO) {
                check(features, coalesce, &Sent::from_bytes(&bytes), &stop);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    guest::assert_canaries_but(mem, std::slice::from_ref(&(START..HOLE)));
}

/// Somewhere in a descriptor, an entry, a table or a frame, or in its header.
fn place(input: &mut Input<'_>, frames_end: u64) -> u64 {
    let at = u64::from(input.u16());
    match input.below(8) {
        0 => TX.desc + at % 0x200,
        1 => RX.desc + at % 0x200,
        2 => TX.avail + 4 + at % 64,
        3 => RX.avail + 4 + at % 64,
        4 => TABLES + at % 0x200,
        5 => DATA + at % 12,
        6 => DATA + at % 100,
        _ => DATA + at % (frames_end - DATA).max(1),
    }
}

fn check(features: u64, coalesce: Coalesce, sent: &Sent, stop: &AtomicBool) {
    // What is put together is segmented whether the guest negotiated that or not.
    let tso = if coalesce.tcp { feature::HOST_TSO4 | feature::HOST_TSO6 } else { 0 };
    let uso = if coalesce.udp { feature::HOST_USO } else { 0 };
    let start = &sent.frame[..sent.frame.len().min(header_model::START)];
    let judged = header_model::check(features | tso | uso, sent.header, sent.frame.len(), start);
    if judged != Some(sent.header) {
        // The other thread must end for the panic to be seen.
        stop.store(true, Ordering::Relaxed);
        panic!("{:?} reached the device with {start:02x?}; that is {judged:?}", sent.header);
    }
}
