//! Tests of rings on memory that Miri can follow (`resources/deep-checks.sh --only miri`). Miri checks that every
//! access of the unsafe door is to a byte of the mapping that it was made from, and that the atomics and fences of the
//! shipped code order each hand-over between the driver's thread and ours. Without an order Miri sees a race on the
//! buffers, which nobody accesses atomically; the values it picks for relaxed loads are those that the memory model
//! allows, not those of this CPU.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, fence};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::AtomicInteger;

use super::queue::RingFeatures;
use super::{GuestIovecs, Popped, Queue, QueueSize, SplitRing, SplitRingAddresses};
use crate::memory::MemView;
use crate::memory::tests::private_region;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const SIZE: u16 = 4;
const AT: SplitRingAddresses = SplitRingAddresses { desc: 0x1000, avail: 0x1100, used: 0x1200 };
/// An indirect table.
const TABLE: u64 = 0x1300;
/// Where the second region begins, adjacent to the first for the guest.
const BORDER: u64 = 0x1800;
const END: u64 = 0x2000;

const BOTH: [RingFeatures; 2] =
    [RingFeatures { event_idx: false, indirect: true }, RingFeatures { event_idx: true, indirect: true }];

/// How often threads meet: a step under Miri takes a thousand times as long.
const ROUNDS: u16 = if cfg!(miri) { 8 } else { 2000 };

/// The driver's side.
struct Driver {
    mem: Arc<MemView>,
}

impl Driver {
    fn new() -> Driver {
        // Miri aligns mappings to 8 bytes and no more; one of several will do for a table.
        let mut unfit = Vec::new();
        loop {
            let regions = vec![private_region(AT.desc, BORDER - AT.desc), private_region(BORDER, END - BORDER)];
            let mem = Arc::new(MemView::new(regions).expect("disjoint"));
            let size = QueueSize::try_from(u32::from(SIZE)).expect("size");
            if SplitRing::new(&mem, size, AT).is_ok() {
                return Driver { mem };
            }
            unfit.push(mem);
            assert!(unfit.len() < 64, "no aligned memory");
        }
    }

    fn device(&self, features: RingFeatures) -> (Queue, GuestIovecs) {
        let size = QueueSize::try_from(u32::from(SIZE)).expect("size");
        let ring = SplitRing::new(&self.mem, size, AT).expect("ring");
        let queue = Queue::start(ring, Arc::clone(&self.mem), features).expect("queue");
        (queue, GuestIovecs::new(Arc::clone(&self.mem), 8))
    }

    fn word<T: AtomicInteger>(&self, addr: u64) -> &T {
        let region = self.mem.find(addr).expect("mapped");
        region.atomic(addr - region.setup().guest).expect("aligned")
    }

    fn desc(&self, table: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let at = table + 16 * u64::from(index);
        self.word::<AtomicU64>(at).store(addr.to_le(), Relaxed);
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.word::<AtomicU64>(at + 8).store(rest.to_le(), Relaxed);
    }

    /// Makes `head` available as entry number `index`.
    fn offer(&self, index: u16, head: u16) {
        let entry = AT.avail + 4 + 2 * u64::from(index % SIZE);
        self.word::<AtomicU16>(entry).store(head.to_le(), Relaxed);
        self.word::<AtomicU16>(AT.avail + 2).store(index.wrapping_add(1).to_le(), Release);
    }

    fn used_idx(&self) -> u16 {
        u16::from_le(self.word::<AtomicU16>(AT.used + 2).load(Acquire))
    }

    fn used_len(&self, index: u16) -> u32 {
        let entry = AT.used + 4 + 8 * u64::from(index % SIZE);
        u32::from_le(self.word::<AtomicU32>(entry + 4).load(Relaxed))
    }

    /// Whether the device wants a kick for entry number `index`, made available just now.
    fn is_kick_wanted(&self, features: RingFeatures, index: u16) -> bool {
        fence(SeqCst);
        if features.event_idx {
            let event = AT.used + 4 + 8 * u64::from(SIZE);
            u16::from_le(self.word::<AtomicU16>(event).load(Relaxed)) == index
        } else {
            self.word::<AtomicU16>(AT.used).load(Relaxed) == 0
        }
    }

    /// Asks for a call for entry number `index`; returns whether it was used already.
    fn enable_calls(&self, features: RingFeatures, index: u16) -> bool {
        if features.event_idx {
            let event = AT.avail + 4 + 2 * u64::from(SIZE);
            self.word::<AtomicU16>(event).store(index.to_le(), Relaxed);
        } else {
            self.word::<AtomicU16>(AT.avail).store(0, Relaxed);
        }
        fence(SeqCst);
        self.used_idx() != index
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        let mut done = 0;
        let each = |piece: vm_memory::VolatileSlice<'_>| {
            piece.copy_from(&bytes[done..done + piece.len()]);
            done += piece.len();
        };
        self.mem.pieces(addr, bytes.len() as u64, each).expect("mapped");
    }

    fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read(addr, &mut bytes).expect("mapped");
        bytes
    }
}

/// How long a test of two threads may take.
const PATIENCE: Duration = Duration::from_secs(if cfg!(miri) { 300 } else { 5 });

/// Two threads of a test, neither of which waits for ever for the other.
struct Two {
    begun: Instant,
    arrived: AtomicU32,
    failed: AtomicBool,
}

/// Tells the other thread if this one fails.
struct Partner<'a>(&'a Two);

impl Drop for Partner<'_> {
    fn drop(&mut self) {
        self.0.failed.fetch_or(thread::panicking(), Relaxed);
    }
}

impl Two {
    fn new() -> Two {
        Two { begun: Instant::now(), arrived: AtomicU32::new(0), failed: AtomicBool::new(false) }
    }

    /// A moment of waiting for the other.
    fn rest(&self) {
        assert!(!self.failed.load(Relaxed), "the other thread failed");
        assert!(self.begun.elapsed() < PATIENCE, "the other thread does nothing");
        thread::yield_now();
    }

    /// Waits until both are here.
    fn meet(&self) {
        let before = self.arrived.fetch_add(1, AcqRel);
        while self.arrived.load(Acquire) < before - before % 2 + 2 {
            self.rest();
        }
    }
}

fn pop(queue: &mut Queue, iovecs: &mut GuestIovecs) -> Option<Popped> {
    queue.pop(iovecs).expect("a ring that is not broken")
}

#[test]
fn chain_over_two_regions_is_copied_from_and_to_with_every_part_left_out() {
    for table in [AT.desc, TABLE] {
        let driver = Driver::new();
        let sent: Vec<u8> = (1..=40).collect();
        driver.write(BORDER - 20, &sent);
        driver.desc(table, 0, (BORDER - 20, 40, NEXT, 1));
        driver.desc(table, 1, (BORDER + 100, 8, WRITE | NEXT, 2));
        driver.desc(table, 2, (BORDER - 60, 8, WRITE, 0));
        if table == TABLE {
            driver.desc(AT.desc, 0, (TABLE, 48, INDIRECT, 0));
        }
        driver.offer(0, 0);
        let (mut queue, mut iovecs) = driver.device(BOTH[0]);
        let popped = pop(&mut queue, &mut iovecs).expect("an entry");
        let shape = popped.chain.expect("a good chain");
        assert_eq!((shape.readable_len, shape.writable_len), (40, 16));
        for skip in 0..=41 {
            let left = sent.get(skip..).unwrap_or_default();
            let mut bytes = [0; 64];
            assert_eq!(iovecs.copy_to(shape.readable(), skip, &mut bytes), left.len());
            assert_eq!(bytes.get(..left.len()), Some(left));
            assert_eq!(iovecs.copy_to(shape.readable(), skip, &mut bytes[..3]), left.len().min(3));
        }
        for skip in 0..=17 {
            let room = 16_usize.saturating_sub(skip);
            driver.write(BORDER + 100, &[0xee; 8]);
            driver.write(BORDER - 60, &[0xee; 8]);
            assert_eq!(iovecs.copy_from(shape.writable(), skip, &sent), room);
            let there = [driver.read(BORDER + 100, 8), driver.read(BORDER - 60, 8)].concat();
            let wanted = [&[0xee; 16][..16 - room], &sent[..room]].concat();
            assert_eq!(there, wanted);
        }
        queue.push_used(popped.head, 16);
        assert!(queue.publish());
        assert_eq!((driver.used_idx(), driver.used_len(0)), (1, 16));
    }
}

/// The front-end mapped the same guest memory anew, and the driver went on there.
#[test]
fn queue_goes_on_in_another_view_of_memory() {
    for features in BOTH {
        let [old, new] = [Driver::new(), Driver::new()];
        let (mut queue, mut iovecs) = old.device(features);
        for driver in [&old, &new] {
            driver.desc(AT.desc, 0, (BORDER, 8, WRITE, 0));
            driver.offer(0, 0);
        }
        let head = pop(&mut queue, &mut iovecs).expect("an entry").head;
        queue.push_used(head, 8);
        queue.publish();
        new.offer(1, 0);
        let ring = SplitRing::new(&new.mem, QueueSize::try_from(u32::from(SIZE)).expect("size"), AT).expect("ring");

        queue.relocate(ring, Arc::clone(&new.mem));

        assert!(Arc::ptr_eq(queue.mem(), &new.mem));
        let mut iovecs = GuestIovecs::new(Arc::clone(queue.mem()), 8);
        let popped = pop(&mut queue, &mut iovecs).expect("an entry");
        let shape = popped.chain.expect("a good chain");
        assert_eq!(iovecs.copy_from(shape.writable(), 0, b"new view"), 8);
        queue.push_used(popped.head, 8);
        queue.publish();
        assert_eq!((old.used_idx(), new.used_idx()), (1, 2));
        assert_eq!(new.read(BORDER, 8), b"new view");
    }
}

/// The buffers are ordinary memory: only the indices order what the two threads do with it.
#[test]
fn buffers_go_there_and_back_in_the_order_of_the_indices() {
    for features in BOTH {
        let driver = Driver::new();
        let (mut queue, mut iovecs) = driver.device(features);
        let two = Two::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _partner = Partner(&two);
                for round in 0..ROUNDS {
                    let number = round.to_le_bytes();
                    driver.write(BORDER, &number);
                    driver.desc(AT.desc, 0, (BORDER, 2, NEXT, 1));
                    driver.desc(AT.desc, 1, (BORDER + 8, 2, WRITE, 0));
                    driver.offer(round, 0);
                    while driver.used_idx() != round + 1 {
                        two.rest();
                    }
                    assert_eq!(driver.used_len(round), 2);
                    assert_eq!(driver.read(BORDER + 8, 2), number);
                }
            });
            let _partner = Partner(&two);
            for round in 0..ROUNDS {
                iovecs.truncate(0);
                let popped = loop {
                    match pop(&mut queue, &mut iovecs) {
                        Some(popped) => break popped,
                        None => two.rest(),
                    }
                };
                let shape = popped.chain.expect("a good chain");
                let mut number = [0; 2];
                assert_eq!(iovecs.copy_to(shape.readable(), 0, &mut number), 2);
                assert_eq!(u16::from_le_bytes(number), round);
                assert_eq!(iovecs.copy_from(shape.writable(), 0, &number), 2);
                queue.push_used(popped.head, 2);
                queue.publish();
            }
        });
    }
}

/// Has both threads do their part at once, `ROUNDS` times; `check` is given what they return in each round.
fn race(
    mut driver: impl FnMut(u16) -> bool + Send,
    mut device: impl FnMut(u16) -> bool,
    check: impl Fn(bool, bool),
    mut after: impl FnMut(u16),
) {
    let two = Two::new();
    let said = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _partner = Partner(&two);
            for round in 0..ROUNDS {
                two.meet();
                said.store(driver(round), Relaxed);
                two.meet();
            }
        });
        let _partner = Partner(&two);
        for round in 0..ROUNDS {
            after(round);
            two.meet();
            let ours = device(round);
            two.meet();
            check(said.load(Relaxed), ours);
        }
    });
}

#[test]
fn entry_is_seen_or_kicked_for() {
    for features in BOTH {
        let guest = Driver::new();
        let (queue, mut iovecs) = guest.device(features);
        let queue = std::cell::RefCell::new(queue);
        guest.desc(AT.desc, 0, (BORDER, 2, 0, 0));
        race(
            |round| {
                guest.offer(round, 0);
                guest.is_kick_wanted(features, round)
            },
            |_| queue.borrow_mut().enable_kicks().expect("good indices"),
            |kicked, seen| assert!(kicked || seen, "an entry that nobody looks for"),
            |_| {
                let mut queue = queue.borrow_mut();
                queue.disable_kicks();
                while let Some(popped) = pop(&mut queue, &mut iovecs) {
                    queue.push_used(popped.head, 0);
                }
                iovecs.truncate(0);
                queue.publish();
            },
        );
    }
}

#[test]
fn used_entry_is_seen_or_called_for() {
    for features in BOTH {
        let guest = Driver::new();
        let (queue, iovecs) = guest.device(features);
        let device = std::cell::RefCell::new((queue, iovecs));
        guest.desc(AT.desc, 0, (BORDER, 2, 0, 0));
        race(
            |round| guest.enable_calls(features, round),
            |_| device.borrow_mut().0.publish(),
            |seen, called| assert!(seen || called, "a used entry that nobody looks for"),
            |round| {
                let (queue, iovecs) = &mut *device.borrow_mut();
                // No calls are wanted so far.
                guest.word::<AtomicU16>(AT.avail).store(1_u16.to_le(), Relaxed);
                guest.offer(round, 0);
                let popped = pop(queue, iovecs).expect("an entry");
                iovecs.truncate(0);
                queue.push_used(popped.head, 0);
            },
        );
    }
}

/// Whatever a driver writes while the ring is read: each access of ours stays within memory, and each word is read as
/// one.
#[test]
fn words_that_change_while_they_are_read_do_no_harm() {
    let driver = Driver::new();
    let (mut queue, mut iovecs) = driver.device(BOTH[0]);
    let (two, stop) = (Two::new(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 1_u64;
            while !stop.load(Relaxed) && !two.failed.load(Relaxed) {
                for index in 0..SIZE {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let random = seed >> 33;
                    let addr = [BORDER - 20, BORDER + 64, END - 8, TABLE, u64::MAX - 3][random as usize % 5];
                    let len = [0, 8, 32, 48, u32::MAX][(random >> 4) as usize % 5];
                    driver.desc(AT.desc, index, (addr, len, (random >> 8) as u16 % 8, (random >> 16) as u16 % 5));
                }
                thread::yield_now();
            }
        });
        let _partner = Partner(&two);
        for round in 0..ROUNDS {
            driver.offer(round, round % SIZE);
            let popped = pop(&mut queue, &mut iovecs).expect("an entry");
            if let Ok(shape) = popped.chain {
                let mut bytes = [0; 64];
                iovecs.copy_to(shape.readable(), 0, &mut bytes);
            }
            iovecs.truncate(0);
            queue.push_used(popped.head, 0);
            queue.publish();
        }
        stop.store(true, Relaxed);
    });
}
