//! A guest's driver that costs next to nothing: descriptors are filled in once, and heads come round in order.

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use crate::common::frontend::{RawFrontend, SessionSpec};
use crate::common::memory::GuestMemory;
use crate::common::split_ring::SplitRing;
use crate::common::virtio::{VnetHdr, desc_flag, feature, protocol};
use crate::place::BACKEND_CPU;

/// Descriptors in each ring.
pub const RING_SIZE: u16 = 256;
/// Bytes of a receive buffer: a frame of the usual MTU with its header.
pub const RX_BUFFER: usize = 1536;
/// The back-end is stuck if nothing moves for so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// What every guest here negotiates besides the offloads of its case.
pub const FEATURES: u64 = feature::VERSION_1
    | feature::PROTOCOL_FEATURES
    | feature::EVENT_IDX
    | feature::INDIRECT_DESC
    | feature::MRG_RXBUF
    | feature::CSUM
    | feature::GUEST_CSUM
    | feature::HOST_TSO4
    | feature::GUEST_TSO4;

/// Leaves the CPU for a moment that is short beside a ring of frames: to spin would slow down the back-end where its CPU
/// is the other half of the same core.
pub fn rest() {
    std::thread::sleep(Duration::from_micros(20));
}

/// Lets a moment pass as a guest does that takes all frames that there are: it does not sleep, or its back-end would have
/// to, too, which costs that more than a frame. Where both CPUs are one core, it [rests](rest) all the same.
pub fn pause() {
    /// Some microseconds: to look all the time would take the ring's index away from the back-end.
    const SPINS: u32 = 200;
    static IS_ONE_CORE: LazyLock<bool> = LazyLock::new(|| {
        let list = format!("/sys/devices/system/cpu/cpu{BACKEND_CPU}/topology/core_cpus_list");
        std::fs::read_to_string(list).is_ok_and(|cpus| cpus.trim() != BACKEND_CPU.to_string())
    });
    if *IS_ONE_CORE { rest() } else { (0..SPINS).for_each(|_| std::hint::spin_loop()) }
}

/// One ring whose descriptor n is always head n.
pub struct Ring {
    ring: SplitRing,
    mem: Arc<GuestMemory>,
    /// The avail index.
    pub given: u16,
    /// The used index, as last seen.
    pub taken: u16,
    kicked: u16,
}

impl Ring {
    /// A ring of buffers; nothing is available yet.
    fn new(mem: &Arc<GuestMemory>, buffers: &[(u64, usize)], writable: bool) -> Ring {
        let ring = SplitRing::new(mem, RING_SIZE);
        for index in 0..u64::from(RING_SIZE) {
            let (addr, len) = buffers[index as usize % buffers.len()];
            let flags = if writable { u64::from(desc_flag::WRITE) } else { 0 };
            mem.store_u64(ring.addrs.desc + 16 * index, addr, Ordering::Relaxed);
            mem.store_u64(ring.addrs.desc + 16 * index + 8, len as u64 | flags << 32, Ordering::Relaxed);
            mem.store_u16(ring.addrs.avail + 4 + 2 * index, index as u16, Ordering::Relaxed);
        }
        Ring { ring, mem: Arc::clone(mem), given: 0, taken: 0, kicked: 0 }
    }

    /// Makes `count` more entries available, and kicks if that is wanted.
    pub fn give(&mut self, count: u16) {
        self.given = self.given.wrapping_add(count);
        self.mem.store_u16(self.ring.addrs.avail + 2, self.given, Ordering::Release);
        std::sync::atomic::fence(Ordering::SeqCst);
        let event = self.mem.load_u16(self.ring.addrs.used + 4 + 8 * u64::from(RING_SIZE), Ordering::Relaxed);
        let old = std::mem::replace(&mut self.kicked, self.given);
        if self.given.wrapping_sub(event).wrapping_sub(1) < self.given.wrapping_sub(old) {
            self.ring.kick();
        }
    }

    /// How many entries came back since the last time.
    pub fn take(&mut self) -> u16 {
        let used = self.mem.load_u16(self.ring.addrs.used + 2, Ordering::Acquire);
        used.wrapping_sub(std::mem::replace(&mut self.taken, used))
    }

    /// Has the back-end call at the next entry that comes back.
    pub fn ask_for_call(&self) {
        let event = self.ring.addrs.avail + 4 + 2 * u64::from(RING_SIZE);
        self.mem.store_u16(event, self.taken, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Sleeps until an entry comes back.
    pub fn wait(&mut self) -> u16 {
        self.ask_for_call();
        loop {
            let count = self.take();
            if count > 0 {
                return count;
            }
            assert!(crate::common::wait_readable(crate::common::fd_of(&self.ring.call), PATIENCE), "nothing came back");
            let _ = self.ring.call.read();
        }
    }

    /// How many bytes were written to the `count` entries that came back last.
    pub fn last_bytes(&self, count: u16) -> u64 {
        let slots = (1..=count).map(|back| u64::from(self.taken.wrapping_sub(back) % RING_SIZE));
        // A used element is an id and a length.
        slots.map(|slot| u64::from(self.mem.load_u32(self.ring.addrs.used + 4 + 8 * slot + 4, Ordering::Relaxed))).sum()
    }

    /// How many entries the back-end has.
    pub fn outstanding(&self) -> u16 {
        self.given.wrapping_sub(self.taken)
    }

    /// Has `count` entries go through the ring, as many at a time as it holds, and waits until all are back.
    pub fn pass(&mut self, count: u64) {
        let (mut given, mut taken) = (0, 0);
        let mut deadline = Instant::now() + PATIENCE;
        while taken < count {
            let room = RING_SIZE - self.outstanding();
            let more = u64::from(room).min(count - given) as u16;
            // A few at a time would be a kick each.
            if more >= RING_SIZE / 4 || (more > 0 && given + u64::from(more) == count) {
                self.give(more);
                given += u64::from(more);
            }
            let back = self.take();
            taken += u64::from(back);
            if back > 0 {
                deadline = Instant::now() + PATIENCE;
            } else {
                assert!(Instant::now() < deadline, "the back-end is stuck after {taken} of {count} frames");
                rest();
            }
        }
    }
}

/// One queue pair.
pub struct Pair {
    pub rx: Ring,
    pub tx: Ring,
}

/// A guest with its session.
pub struct Guest {
    pub pairs: Vec<Pair>,
    mem: Arc<GuestMemory>,
    features: u64,
    _front_end: Option<RawFrontend>,
}

impl Guest {
    /// A guest that sends these frames in turn, over and over.
    pub fn new(pairs: usize, frames: &[(VnetHdr, Vec<u8>)], features: u64) -> Guest {
        let mem = Arc::new(GuestMemory::single(256 << 20));
        let pairs = (0..pairs)
            .map(|_| {
                let sent: Vec<_> = (0..usize::from(RING_SIZE))
                    .map(|index| {
                        let (header, frame) = &frames[index % frames.len()];
                        let bytes = [&header.to_bytes()[..], frame].concat();
                        let at = mem.alloc(bytes.len(), 64);
                        mem.write(at, &bytes);
                        (at, bytes.len())
                    })
                    .collect();
                let rx_at = mem.alloc(RX_BUFFER * usize::from(RING_SIZE), 4096);
                let received: Vec<_> =
                    (0..u64::from(RING_SIZE)).map(|index| (rx_at + index * RX_BUFFER as u64, RX_BUFFER)).collect();
                Pair { rx: Ring::new(&mem, &received, true), tx: Ring::new(&mem, &sent, false) }
            })
            .collect();
        Guest { pairs, mem, features, _front_end: None }
    }

    /// Connects to the back-end behind `socket`.
    pub fn connect(&mut self, socket: &std::path::Path) {
        // Between bind and listen a socket is there and takes nobody.
        let deadline = Instant::now() + PATIENCE;
        let front_end = loop {
            match RawFrontend::connect(socket) {
                Ok(front_end) => break front_end,
                Err(error) => assert!(Instant::now() < deadline, "the back-end does not listen: {error}"),
            }
            std::thread::sleep(Duration::from_micros(200));
        };
        let rings: Vec<_> = self.pairs.iter_mut().flat_map(|pair| [&mut pair.rx, &mut pair.tx]).collect();
        for ring in &rings {
            assert!(ring.given == 0, "a fresh guest");
        }
        let rings = rings
            .into_iter()
            .map(|ring| {
                ring.ring.event_idx = true;
                &ring.ring
            })
            .collect();
        let mut session = SessionSpec::new(&self.mem, rings, self.features);
        // A back-end to which the status matters waits for a driver that tells it.
        session.protocol &= !protocol::STATUS;
        let negotiated = front_end.negotiate_like_cloud_hypervisor(&session).expect("a session");
        assert_eq!(negotiated.features, self.features, "all features are offered");
        self._front_end = Some(front_end);
    }
}
