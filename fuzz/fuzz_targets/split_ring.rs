//! A driver that writes any word of its ring at any time between the device's steps; the device takes, completes, puts
//! back, publishes, and goes to sleep.
//!
//! Oracle: a model of positions and of the chains (`chain_model`). Every pop gives the chain that is there, or none, or
//! says that the ring is broken, exactly when the model does; the used ring has the completed heads in order; calls are
//! wanted when the specification says so; nothing is written but where the two sides have their words.
#![no_main]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net::virtqueue::{GuestIovecs, Head, Queue};
use vhost_user_net_fuzz::chain_model::{Ring, assert_same, walk};
use vhost_user_net_fuzz::guest::{self, Guest, START};
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::device_side::{find, pop_in_both_ways};
use vhost_user_net_fuzz::kit::memory::GuestMemory;
use vhost_user_net_fuzz::kit::split_ring::RingAddrs;

const ADDRS: RingAddrs = RingAddrs { desc: START, avail: START + 0x1000, used: START + 0x2000 };
/// Indirect tables, which buffers may overlap.
const TABLES: u64 = guest::DATA;

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

/// The driver's side: every word of it.
struct Driver {
    mem: &'static GuestMemory,
    size: u16,
}

impl Driver {
    fn load(&self, addr: u64) -> u16 {
        self.mem.load_u16(addr, Ordering::Relaxed)
    }

    fn store(&self, addr: u64, value: u16) {
        self.mem.store_u16(addr, value, Ordering::Relaxed);
    }

    fn avail_idx(&self) -> u16 {
        self.load(ADDRS.avail + 2)
    }

    fn entry_addr(&self, index: u16) -> u64 {
        ADDRS.avail + 4 + 2 * u64::from(index % self.size)
    }

    /// Where in the used ring an entry is.
    fn entry_offset(&self, index: u16) -> u64 {
        4 + 8 * u64::from(index % self.size)
    }

    fn used_entry(&self, index: u16) -> (u32, u32) {
        let addr = ADDRS.used + self.entry_offset(index);
        (self.mem.load_u32(addr, Ordering::Relaxed), self.mem.load_u32(addr + 4, Ordering::Relaxed))
    }
}

/// Where the device must be.
struct Model {
    next_avail: u16,
    next_used: u16,
    published: u16,
    seen: u16,
}

/// The ring is broken.
struct Broken;

impl Model {
    fn look(&mut self, driver: &Driver) -> Result<(), Broken> {
        let ahead = driver.avail_idx().wrapping_sub(self.next_used);
        let in_hand = self.next_avail.wrapping_sub(self.next_used);
        if ahead > driver.size || ahead < in_hand {
            return Err(Broken);
        }
        self.seen = driver.avail_idx();
        Ok(())
    }

    fn pop(&mut self, driver: &Driver) -> Result<Option<u16>, Broken> {
        if self.seen == self.next_avail {
            self.look(driver)?;
        }
        if self.seen == self.next_avail {
            return Ok(None);
        }
        let head = driver.load(driver.entry_addr(self.next_avail));
        if head >= driver.size {
            return Err(Broken);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }
}

fn run(input: &mut Input<'_>) {
    let Guest { mem, view } = guest::fresh();
    let size = 1_u16 << input.below(7);
    let features = RingFeatures { event_idx: input.flag(), indirect: input.flag() };
    let driver = Driver { mem, size };
    let ring = Ring { addrs: ADDRS, size, indirect: features.indirect };
    let base = input.u16();
    driver.store(ADDRS.avail + 2, base);
    driver.store(ADDRS.avail, 0);
    driver.store(ADDRS.used + 2, base);
    let mut model = Model { next_avail: base, next_used: base, published: base, seen: base };
    let found = find(view, size, ADDRS).unwrap();
    let mut queue = Queue::start(found, Arc::clone(view), features).unwrap();
    let mut iovecs = GuestIovecs::new(Arc::clone(view), 64);
    let mut in_hand: VecDeque<(Head, u16)> = VecDeque::new();
    let mut completed: VecDeque<Option<(u32, u32)>> = VecDeque::new();
    let used_len = 6 + 8 * u64::from(size);
    while !input.is_empty() {
        match input.below(16) {
            0..4 => mem.write(ADDRS.desc + 16 * input.below(size.into()) as u64, &input.descriptor().to_bytes()),
            4 => mem.write(TABLES + 16 * u64::from(input.u8()), &input.descriptor().to_bytes()),
            5 => driver.store(driver.entry_addr(input.u16()), input.u8().into()),
            6 => driver.store(driver.entry_addr(input.u16()), input.u16()),
            7 => driver.store(ADDRS.avail + 2, input.u16()),
            8 => driver.store(ADDRS.avail + 2, driver.avail_idx().wrapping_add(input.u8().into())),
            // What a device must not read: its own index and entries; and its words of ours, used_event and flags.
            9 => {
                let offset = 2 * input.below(used_len as usize / 2) as u64;
                driver.store(ADDRS.used + offset, input.u16());
                let is_there = |at: usize| {
                    driver.entry_offset(model.published.wrapping_add(at as u16)) == (offset.saturating_sub(4) & !7) + 4
                };
                let spoiled = completed.iter_mut().enumerate().filter(|(at, _)| is_there(*at));
                spoiled.for_each(|(_, entry)| *entry = None);
            }
            10 => driver.store(ADDRS.avail + 4 + 2 * u64::from(size), input.u16()),
            11 => driver.store(ADDRS.avail, input.u16()),
            12 => {
                let wanted = model.pop(&driver);
                let got = pop_in_both_ways(&mut queue, &mut iovecs);
                let (wanted, got) = match (wanted, got) {
                    (Err(Broken), Err(_)) => return,
                    (Ok(wanted), Ok(got)) => (wanted, got),
                    (wanted, got) => panic!("model broken: {}, got {got:?}", wanted.is_err()),
                };
                assert_eq!(wanted.is_some(), got.is_some());
                let (Some(head), Some(popped)) = (wanted, got) else { continue };
                assert_same(walk(mem, ring, head), &popped.chain, &iovecs, mem);
                in_hand.push_back((popped.head, head));
                iovecs.truncate(0);
            }
            13 => {
                let Some((head, id)) = in_hand.pop_front() else { continue };
                let len = input.u32();
                queue.push_used(head, len);
                completed.push_back(Some((id.into(), len)));
                model.next_used = model.next_used.wrapping_add(1);
            }
            14 => {
                let Some((head, _)) = in_hand.pop_back() else { continue };
                queue.rewind(head);
                model.next_avail = model.next_avail.wrapping_sub(1);
            }
            _ if input.flag() => {
                let calls = queue.publish();
                check_published(&driver, &mut model, features, &mut completed, calls);
            }
            _ => {
                let more = queue.enable_kicks();
                match (model.look(&driver), more) {
                    (Err(Broken), Err(_)) => return,
                    (Ok(()), Ok(more)) => assert_eq!(more, model.seen != model.next_avail),
                    (wanted, got) => panic!("model broken: {}, got {got:?}", wanted.is_err()),
                }
                queue.disable_kicks();
            }
        }
    }
    assert_eq!(queue.position(), model.published);
    let written = [(ADDRS.desc, 16 * u64::from(size)), (ADDRS.avail, 6 + 2 * u64::from(size)), (ADDRS.used, used_len)];
    let written = written.iter().chain(&[(TABLES, 16 * 256)]).map(|(addr, len)| *addr..addr + len).collect::<Vec<_>>();
    guest::assert_canaries_but(mem, &written);
}

fn check_published(
    driver: &Driver,
    model: &mut Model,
    features: RingFeatures,
    completed: &mut VecDeque<Option<(u32, u32)>>,
    calls: bool,
) {
    if completed.is_empty() {
        assert!(!calls, "a call for nothing");
        return;
    }
    assert_eq!(driver.load(ADDRS.used + 2), model.next_used);
    let old = model.published;
    // A driver that offers a place again before it was told that it is free has the later of its entries there.
    let gone = completed.len().saturating_sub(driver.size.into());
    for (at, entry) in completed.drain(..).enumerate().skip(gone) {
        let index = old.wrapping_add(at as u16);
        // The driver wrote over some of them.
        assert_eq!(driver.used_entry(index), entry.unwrap_or(driver.used_entry(index)), "used entry {index}");
    }
    model.published = model.next_used;
    let event = driver.load(ADDRS.avail + 4 + 2 * u64::from(driver.size));
    let wanted = if features.event_idx {
        // The event's index is among those that were just used.
        event.wrapping_sub(old) < model.next_used.wrapping_sub(old)
    } else {
        driver.load(ADDRS.avail) & 1 == 0
    };
    assert_eq!(calls, wanted, "a call");
}
