//! No memory is allocated for a frame, in either direction, however it goes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use common::device_side::{ALL, DeviceSide};
use common::frames::{Ends, L4Csum, Stamp, payload, test_frame, udp4};
use common::memory::GuestMemory;
use common::split_ring::{Buf, SplitRing};
use common::tap_double::TapDouble;
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, skip};
use vhost_user_net::device::stage::UringPool;
use vhost_user_net::device::{Device, DeviceQueue, Io, Layer};
use vhost_user_net::metrics::PairCounters;
use vhost_user_net::net::Uplink;
use vhost_user_net::net::coalesce::Coalesce;
use vhost_user_net::net::framing::Framing;
use vhost_user_net::net::header::SegmentLimit;
use vhost_user_net::net::rx::{Admission, Rx};
use vhost_user_net::net::tx::Tx;

thread_local! {
    /// How often this thread asked for memory.
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all is handed on to the system's allocator; counting touches a thread-local that needs no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often `act` asks for memory.
fn asked_by(act: impl FnOnce()) -> u64 {
    let before = ASKED.get();
    act();
    ASKED.get() - before
}

const FRAMES: usize = 32;
const ROUNDS: usize = 50;

/// The ways to move frames that there are on this host.
fn ways(test: &str) -> Vec<Io> {
    let is_there = |io: &Io| match io.usable() {
        Ok(usable) => usable == *io,
        Err(_) => false,
    };
    let ways: Vec<_> = [Io::Auto, Io::Uring, Io::Syscall].into_iter().filter(is_there).collect();
    if ways.len() < 3 {
        skip(test, &format!("with io_uring, which this host does not have; with {ways:?} it ran"));
    }
    ways
}

struct Place {
    tap: TapDouble,
    device: DeviceQueue,
    mem: Arc<GuestMemory>,
    ring: SplitRing,
    buffers: Vec<u64>,
    counters: PairCounters,
    rings: UringPool,
}

fn place() -> Place {
    let (tap, fd) = TapDouble::new();
    let (_, mut queues) = Device::from_sockets(vec![fd], Layer::Ethernet).unwrap();
    let mem = Arc::new(GuestMemory::single(16 << 20));
    let ring = SplitRing::new(&mem, 256);
    let buffers = (0..FRAMES).map(|_| mem.alloc(66_000, 64)).collect();
    Place {
        tap,
        device: queues.remove(0),
        mem,
        ring,
        buffers,
        counters: PairCounters::default(),
        rings: UringPool::default(),
    }
}

impl Place {
    fn uplink(&self, io: Io, coalesce: Coalesce) -> Uplink<'_> {
        Uplink {
            device: &self.device,
            io,
            rings: &self.rings,
            coalesce,
            framing: &Framing::Whole,
            segment_limit: SegmentLimit::default(),
        }
    }
}

/// A plain frame, one that can be part of a run, and one that is too large for either.
fn frames() -> [(VnetHdr, Vec<u8>); 3] {
    let stamp = Stamp { stream: 1, seq: 0 };
    let csum = VnetHdr { flags: 1, csum_start: 34, csum_offset: 6, ..VnetHdr::default() };
    [
        (VnetHdr::default(), test_frame(&Ends::TX, stamp, 300)),
        (csum, udp4(&Ends::TX, &payload(stamp, 1000), L4Csum::Partial)),
        (VnetHdr::default(), test_frame(&Ends::TX, stamp, 5000)),
    ]
}

/// P-05
#[test]
fn frames_from_the_guest_need_no_memory() {
    for io in ways("frames_from_the_guest_need_no_memory") {
        let mut place = place();
        let mut side = DeviceSide::start(&place.ring, ALL).unwrap();
        let coalesce = Coalesce { tcp: true, udp: true };
        let features = feature::CSUM;
        let mut tx = Tx::new(Arc::clone(side.queue.mem()), features, &place.uplink(io, coalesce));
        for round in 0..ROUNDS {
            for (index, &at) in place.buffers.iter().enumerate() {
                // Runs of four.
                let (header, frame) = &frames()[index / 4 % 3];
                place.mem.write(at, &[&header.to_bytes()[..], frame].concat());
                place.ring.add(&[Buf::readable(at, VnetHdr::LEN + frame.len())]);
            }
            place.ring.publish();
            let asked = asked_by(|| {
                tx.pump(&mut side.queue, &place.device, &place.counters).unwrap();
                side.queue.publish();
            });
            // The ring is set up in the first batch.
            assert!(asked == 0 || round == 0, "{io:?}, round {round}: asked {asked} times for memory");
            while place.tap.recv_raw(std::time::Duration::ZERO).is_some() {}
            while place.ring.take_used().is_some() {}
        }
        assert_eq!(place.counters.tx_frames.get(), (FRAMES * ROUNDS) as u64);
        assert!(place.counters.tx_coalesced_runs.get() > 0);
    }
}

/// P-05
#[test]
fn frames_to_the_guest_need_no_memory() {
    for io in ways("frames_to_the_guest_need_no_memory") {
        let mut place = place();
        let mut side = DeviceSide::start(&place.ring, ALL).unwrap();
        let mem = Arc::clone(side.queue.mem());
        let mut rx = Rx::new(
            mem,
            feature::MRG_RXBUF,
            Admission::default(),
            &place.uplink(io, Coalesce { tcp: false, udp: false }),
            Vec::new(),
        );
        for round in 0..ROUNDS {
            for index in 0..FRAMES {
                // Rounds of small frames, then one with large ones, which need buffers together.
                let len = if round % 10 == 9 && index % 8 == 0 { 9000 } else { 300 };
                place.tap.send(&VnetHdr::default(), &test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, len));
            }
            let deadline = Instant::now() + PATIENCE;
            let mut asked = 0;
            while place.counters.rx_frames.get() < ((round + 1) * FRAMES) as u64 {
                assert!(Instant::now() < deadline, "{} frames came", place.counters.rx_frames.get());
                // Nobody looks at what is in the buffers: they may be the same.
                while place.ring.try_add(&[Buf::writable(place.buffers[0], 2048)]).is_some() {}
                place.ring.publish();
                asked += asked_by(|| {
                    rx.pump(&mut side.queue, &place.device, &place.counters).unwrap();
                    side.queue.publish();
                });
                while place.ring.take_used().is_some() {}
            }
            assert!(asked == 0 || round == 0, "{io:?}, round {round}: asked {asked} times for memory");
        }
    }
}

/// A driver may make buffers of single bytes available, a thousand of them in one entry, and have the device pop many
/// entries. The list of them must not grow: to move it the allocator needs a system call that the sandbox does not let
/// through.
#[test]
fn buffers_of_single_bytes_need_no_memory() {
    const LARGE: usize = 60_000;
    for io in ways("buffers_of_single_bytes_need_no_memory") {
        let mut place = place();
        let mut side = DeviceSide::start(&place.ring, ALL).unwrap();
        let mem = Arc::clone(side.queue.mem());
        let uplink = place.uplink(io, Coalesce { tcp: false, udp: false });
        let mut rx = Rx::new(mem, feature::MRG_RXBUF, Admission::default(), &uplink, Vec::new());
        // Two at the same place do not make one longer piece.
        let table = vec![Buf::writable(place.buffers[0], 1); 1024];
        for round in 0..4 {
            let lens = if round % 2 == 0 { vec![100; FRAMES] } else { vec![LARGE] };
            for &len in &lens {
                place.tap.send(&VnetHdr::default(), &test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, len));
            }
            let delivered = place.counters.rx_frames.get() + lens.len() as u64;
            let deadline = Instant::now() + PATIENCE;
            while place.counters.rx_frames.get() < delivered {
                assert!(Instant::now() < deadline, "{} frames came", place.counters.rx_frames.get());
                while place.ring.free_descriptors() > 0 {
                    place.ring.add_indirect(&table);
                }
                place.ring.publish();
                let asked = asked_by(|| {
                    rx.pump(&mut side.queue, &place.device, &place.counters).unwrap();
                    side.queue.publish();
                });
                // Batches are set up in the first round.
                assert!(asked == 0 || round == 0, "{io:?}, round {round}: asked {asked} times for memory");
                while place.ring.take_used().is_some() {}
            }
        }
    }
}
