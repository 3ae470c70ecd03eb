//! Every ring of a small scope: all that a driver can write into tables of two and four descriptors, into an indirect
//! table of two, into the indices and into the words that suppress notifications, from sets of values that reach every
//! rule. Each outcome is compared with a model of a few lines, written from VIRTIO 1.3, "Split Virtqueues" (2.7), and,
//! where that leaves it to the device, from what `ChainFault` promises: a buffer of no bytes holds nothing wherever it
//! points, and a table has 1 to 1024 whole descriptors.
//!
//! Each test says how many states it saw, and fails where that is not the whole scope.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::device_side::{ALL, DeviceSide, INDIRECT, NONE, find, view_of};
use common::memory::{GuestMemory, RegionSpec};
use common::say;
use common::split_ring::{Desc, RingAddrs, SplitRing};
use common::virtio::desc_flag;
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net::virtqueue::{ChainFault, Queue, RingBroken};

/// Guest memory: two regions, adjacent for the guest, and nothing behind them.
const START: u64 = 0x10_0000;
const BORDER: u64 = START + 0x2000;
const END: u64 = START + 0x3000;

const RING: RingAddrs = RingAddrs { desc: START, avail: START + 0x100, used: START + 0x200 };
/// Where a buffer or table may be.
const PLAIN: u64 = START + 0x1000;
/// Where a buffer of 48 bytes at `PLAIN` ends.
const TABLE: u64 = PLAIN + 48;
const OVER_THE_BORDER: u64 = BORDER - 24;
const AT_THE_END: u64 = END - 16;
const OUTSIDE: u64 = END;
const WRAPS: u64 = u64::MAX - 7;

const ADDRS: [u64; 6] = [PLAIN, TABLE, OVER_THE_BORDER, AT_THE_END, OUTSIDE, WRAPS];
const LENS: [u32; 6] = [0, 1, 16, 17, 48, u32::MAX];
const FLAGS: u16 = desc_flag::NEXT | desc_flag::WRITE | desc_flag::INDIRECT;

// The model.

/// What a chain can do wrong.
mod wrong {
    pub(super) const NEXT: u16 = 1 << 0;
    pub(super) const LOOP: u16 = 1 << 1;
    pub(super) const INDIRECT: u16 = 1 << 2;
    pub(super) const NESTED: u16 = 1 << 3;
    pub(super) const INDIRECT_AND_NEXT: u16 = 1 << 4;
    pub(super) const TABLE: u16 = 1 << 5;
    pub(super) const MEMORY: u16 = 1 << 6;
    pub(super) const ORDER: u16 = 1 << 7;
    pub(super) const LONG: u16 = 1 << 8;
}

/// What a chain is: its bytes, or all that is wrong with it as far as it can be followed.
#[derive(Debug, Default)]
struct Model {
    readable: Vec<u8>,
    writable: Vec<u8>,
    in_ring: usize,
    wrong: u16,
}

fn in_memory(addr: u64, len: u32) -> bool {
    addr >= START && addr.checked_add(len.into()).is_some_and(|end| end <= END)
}

impl Model {
    /// Follows the chain from `head` (2.7.5 "The Virtqueue Descriptor Table", 2.7.5.3 "Indirect Descriptors").
    fn follow(&mut self, memory: &[u8], size: u16, indirect: bool, head: u16) {
        self.readable.clear();
        self.writable.clear();
        (self.in_ring, self.wrong) = (0, 0);
        let (mut table, mut size, mut is_ring) = (RING.desc, u32::from(size), true);
        let (mut index, mut seen, mut bytes) = (u32::from(head), 0_u64, 0_u64);
        loop {
            let at = (table - START) as usize + 16 * index as usize;
            let desc = parse(&memory[at..at + 16]);
            seen |= 1 << index;
            self.in_ring += usize::from(is_ring);
            if desc.flags & desc_flag::INDIRECT != 0 {
                let rules = [
                    (!indirect, wrong::INDIRECT),
                    (!is_ring, wrong::NESTED),
                    (desc.flags & desc_flag::NEXT != 0, wrong::INDIRECT_AND_NEXT),
                    (desc.len == 0 || !desc.len.is_multiple_of(16) || desc.len / 16 > 1024, wrong::TABLE),
                    (!in_memory(desc.addr, desc.len), wrong::MEMORY),
                ];
                self.wrong |= rules.iter().filter(|rule| rule.0).fold(0, |all, rule| all | rule.1);
                if self.wrong != 0 {
                    return;
                }
                (table, size, is_ring, index, seen) = (desc.addr, desc.len / 16, false, 0, 0);
                continue;
            }
            bytes += u64::from(desc.len);
            self.wrong |= if bytes > u64::from(u32::MAX) { wrong::LONG } else { 0 };
            self.take(memory, desc);
            if desc.flags & desc_flag::NEXT == 0 {
                return;
            }
            index = desc.next.into();
            if index >= size || seen & 1 << index != 0 {
                self.wrong |= if index >= size { wrong::NEXT } else { wrong::LOOP };
                // A chain that has taken up its whole table has no next descriptor at all.
                self.wrong |= if seen.count_ones() == size { wrong::LOOP } else { 0 };
                // Whoever goes round once more comes from its writable buffers to its readable ones.
                let has_both = !self.readable.is_empty() && !self.writable.is_empty();
                self.wrong |= if has_both { wrong::ORDER } else { 0 };
                return;
            }
        }
    }

    /// A buffer (2.7.4.2: device-readable ones come first).
    fn take(&mut self, memory: &[u8], Desc { addr, len, flags, .. }: Desc) {
        let is_writable = flags & desc_flag::WRITE != 0;
        if len == 0 {
            return;
        }
        if !in_memory(addr, len) {
            self.wrong |= wrong::MEMORY;
        }
        if !is_writable && !self.writable.is_empty() {
            self.wrong |= wrong::ORDER;
        }
        if self.wrong == 0 {
            let at = (addr - START) as usize;
            let part = if is_writable { &mut self.writable } else { &mut self.readable };
            part.extend(&memory[at..at + len as usize]);
        }
    }
}

fn parse(bytes: &[u8]) -> Desc {
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    Desc {
        addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
        len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        flags: word(12),
        next: word(14),
    }
}

fn wrong_by(fault: ChainFault) -> u16 {
    match fault {
        ChainFault::NextOutOfTable { .. } => wrong::NEXT,
        ChainFault::Loop => wrong::LOOP,
        ChainFault::IndirectNotNegotiated => wrong::INDIRECT,
        ChainFault::NestedIndirect => wrong::NESTED,
        ChainFault::IndirectWithNext => wrong::INDIRECT_AND_NEXT,
        ChainFault::BadTableLength { .. } => wrong::TABLE,
        ChainFault::Unmapped(_) => wrong::MEMORY,
        ChainFault::ReadableAfterWritable => wrong::ORDER,
        ChainFault::TooLong => wrong::LONG,
        // No chain of this scope has so many buffers, and no walk knows what its queue is for.
        ChainFault::TooManyBuffers | ChainFault::WrongDirection => 0,
    }
}

// Chains.

/// A ring, its device's side, what both see in memory, and what was seen so far.
struct Scope {
    ring: SplitRing,
    device: DeviceSide,
    indirect: bool,
    memory: Vec<u8>,
    model: Model,
    next: u16,
    good: u64,
    bad: u64,
    seen_wrong: u16,
}

impl Scope {
    fn new(size: u16, features: RingFeatures) -> Scope {
        let mem = Arc::new(small_memory());
        let (ring, device) = started(&mem, size, 0, features);
        let memory = mem.snapshot().concat();
        let model = Model::default();
        let indirect = features.indirect;
        Scope { ring, device, indirect, memory, model, next: 0, good: 0, bad: 0, seen_wrong: 0 }
    }

    fn write(&mut self, table: u64, index: u16, desc: Desc) {
        self.ring.write_desc_at(table, index, desc);
        let at = (table - START) as usize + 16 * usize::from(index);
        self.memory[at..at + 16].copy_from_slice(&desc.to_bytes());
    }

    /// Makes the chain at `head` available, and compares what comes out.
    fn check(&mut self, head: u16) {
        self.ring.write_avail_entry(self.next, head);
        self.ring.write_avail_idx(self.next.wrapping_add(1));
        self.model.follow(&self.memory, self.ring.size, self.indirect, head);
        let popped = self.device.pop().expect("an entry");
        let model = &self.model;
        match popped.chain {
            Ok(shape) => {
                let iovecs = &self.device.iovecs;
                let is = |range: std::ops::Range<usize>, len: usize, wanted: &[u8]| {
                    let mut bytes = [0; 256];
                    let bytes = &mut bytes[..wanted.len()];
                    iovecs.bytes(range.clone()) == wanted.len()
                        && len == wanted.len()
                        && iovecs.copy_to(range, 0, bytes) == wanted.len()
                        && bytes == wanted
                };
                let same = model.wrong == 0
                    && is(shape.readable(), shape.readable_len, &model.readable)
                    && is(shape.writable(), shape.writable_len, &model.writable)
                    && shape.ring_descriptors == model.in_ring;
                assert!(same, "{shape:?} of {}", self.tell(head));
                self.good += 1;
            }
            Err(fault) => {
                let named = wrong_by(fault);
                assert!(model.wrong & named != 0, "{fault:?} of {}", self.tell(head));
                assert!(self.device.iovecs.is_empty(), "pieces of a bad chain: {}", self.tell(head));
                self.seen_wrong |= named;
                self.bad += 1;
            }
        }
        let len = self.model.writable.len() as u32;
        self.device.queue.push_used(popped.head, len);
        assert_eq!(self.ring.used_entry(self.next), (head.into(), len));
        self.device.iovecs.truncate(0);
        self.next = self.next.wrapping_add(1);
    }

    fn tell(&self, head: u16) -> String {
        let descs: Vec<_> = self.memory[..16 * usize::from(self.ring.size)].chunks(16).map(parse).collect();
        format!("head {head} of {descs:x?}; the model: {:x?}", self.model)
    }

    /// The whole scope was seen, and both outcomes in it, and each of the faults `wrong`.
    fn assert_seen(&self, name: &str, states: u64, wrong: u16) {
        say(&format!("{name}: {} chains, {} of them good", self.good + self.bad, self.good));
        assert_eq!(self.good + self.bad, states);
        assert!(self.good > 0);
        assert_eq!(self.seen_wrong, wrong, "other faults");
    }
}

/// Memory in which no two places look alike.
fn small_memory() -> GuestMemory {
    let mem = GuestMemory::new(&[
        RegionSpec::new(START, (BORDER - START) as usize),
        RegionSpec::new(BORDER, (END - BORDER) as usize).in_file(1, 0),
    ]);
    let mut state = 1_u64;
    let bytes: Vec<u8> = (PLAIN..END)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    mem.write(PLAIN, &bytes);
    mem
}

fn started(mem: &Arc<GuestMemory>, size: u16, base: u16, features: RingFeatures) -> (SplitRing, DeviceSide) {
    let ring = SplitRing::placed(mem, size, base, RING);
    let device = DeviceSide::start(&ring, features).unwrap();
    (ring, device)
}

/// All descriptors of the sets above, with every `next` of a table of `size` and one outside.
fn all_descriptors(size: u16) -> Vec<Desc> {
    let mut all = Vec::new();
    for addr in ADDRS {
        for len in LENS {
            for flags in 0..=FLAGS {
                all.extend((0..=size).map(|next| Desc { addr, len, flags, next }));
            }
        }
    }
    all
}

const ALL_BUT_NOT_NEGOTIATED: u16 = wrong::NEXT
    | wrong::LOOP
    | wrong::NESTED
    | wrong::INDIRECT_AND_NEXT
    | wrong::TABLE
    | wrong::MEMORY
    | wrong::ORDER
    | wrong::LONG;

/// A table that is all good if it is taken whole, and runs out of itself if it is not.
fn write_table(scope: &mut Scope) {
    let desc = |addr, len, flags, next| Desc { addr, len, flags, next };
    scope.write(TABLE, 0, desc(PLAIN, 16, desc_flag::NEXT, 1));
    scope.write(TABLE, 1, desc(AT_THE_END, 16, desc_flag::NEXT | desc_flag::WRITE, 2));
    scope.write(TABLE, 2, desc(OVER_THE_BORDER, 48, desc_flag::WRITE, 0));
}

fn every_ring_of_two(name: &str, features: RingFeatures, wrong: u16) {
    let mut scope = Scope::new(2, features);
    write_table(&mut scope);
    let descs = all_descriptors(2);
    for &first in &descs {
        scope.write(RING.desc, 0, first);
        for &second in &descs {
            scope.write(RING.desc, 1, second);
            scope.check(0);
            scope.check(1);
        }
    }
    scope.assert_seen(name, 1_492_992, wrong);
}

#[test]
fn every_ring_of_two_descriptors() {
    every_ring_of_two("rings of two, indirect", ALL, ALL_BUT_NOT_NEGOTIATED);
}

#[test]
fn every_ring_of_two_descriptors_without_indirect_ones() {
    let not_in_a_table = wrong::NEXT | wrong::LOOP | wrong::INDIRECT | wrong::MEMORY | wrong::ORDER | wrong::LONG;
    every_ring_of_two("rings of two, direct", NONE, not_in_a_table);
}

/// The table lies over the border of two regions, one of its descriptors in both; before it come no buffer, a readable
/// and a writable one.
#[test]
fn every_indirect_table_of_two_descriptors() {
    let mut scope = Scope::new(2, INDIRECT);
    let descs = all_descriptors(2);
    let table = Desc { addr: OVER_THE_BORDER, len: 32, flags: desc_flag::INDIRECT | desc_flag::WRITE, next: 2 };
    scope.write(RING.desc, 1, table);
    for (head, flags) in [(1, 0), (0, desc_flag::NEXT), (0, desc_flag::NEXT | desc_flag::WRITE)] {
        scope.write(RING.desc, 0, Desc { addr: PLAIN, len: 17, flags, next: 1 });
        for &first in &descs {
            scope.write(OVER_THE_BORDER, 0, first);
            for &second in &descs {
                scope.write(OVER_THE_BORDER, 1, second);
                scope.check(head);
            }
        }
    }
    let no_table_within = !(wrong::INDIRECT_AND_NEXT | wrong::TABLE);
    scope.assert_seen("indirect tables of two", 2_239_488, ALL_BUT_NOT_NEGOTIATED & no_table_within);
}

/// Rings of four: two good buffers, one of no bytes and one that is not all memory, in all directions and orders, and a
/// table.
#[test]
fn every_order_in_a_ring_of_four_descriptors() {
    let mut descs = Vec::new();
    for (addr, len) in [(OVER_THE_BORDER, 48), (AT_THE_END, 16), (OUTSIDE, 0), (AT_THE_END, 17)] {
        for flags in [0, desc_flag::WRITE] {
            descs.push(Desc { addr, len, flags, next: 0 });
            descs.extend((0..=4).map(|next| Desc { addr, len, flags: flags | desc_flag::NEXT, next }));
        }
    }
    for flags in [0, desc_flag::NEXT, desc_flag::WRITE] {
        descs.push(Desc { addr: TABLE, len: 48, flags: flags | desc_flag::INDIRECT, next: 0 });
    }
    assert_eq!(descs.len(), 51);
    let mut scope = Scope::new(4, ALL);
    write_table(&mut scope);
    for &a in &descs {
        scope.write(RING.desc, 0, a);
        for &b in &descs {
            scope.write(RING.desc, 1, b);
            for &c in &descs {
                scope.write(RING.desc, 2, c);
                for &d in &descs {
                    scope.write(RING.desc, 3, d);
                    (0..4).for_each(|head| scope.check(head));
                }
            }
        }
    }
    let faults = wrong::NEXT | wrong::LOOP | wrong::INDIRECT_AND_NEXT | wrong::MEMORY | wrong::ORDER;
    scope.assert_seen("rings of four", 27_060_804, faults);
}

// Indices and notifications.

const BASES: [u16; 4] = [0, 1, 0x7fff, 0xfffe];

/// Rings with `n` entries of which `taken` are in our hands and of those `done` completed.
fn every_progress(size: u16, mut each: impl FnMut(u16, u16, u16)) {
    for n in 0..=size {
        for taken in 0..=n {
            (0..=taken).for_each(|done| each(n, taken, done));
        }
    }
}

/// Of the 2^16 values of the avail index those are good that take nothing back that was taken, and make no more
/// available than the ring has descriptors (2.7.6 "The Virtqueue Available Ring").
#[test]
fn every_avail_index_is_taken_or_breaks_the_ring() {
    let (mut states, mut broken) = (0_u64, 0_u64);
    for (size, base) in [2, 4].into_iter().flat_map(|size| BASES.map(|base| (size, base))) {
        let mem = Arc::new(small_memory());
        every_progress(size, |n, taken, done| {
            let (ring, mut device) = started(&mem, size, base, ALL);
            (0..size).for_each(|entry| ring.write_desc(entry, Desc { addr: PLAIN, len: 1, flags: 0, next: 0 }));
            (0..size).for_each(|entry| ring.write_avail_entry(entry, entry));
            ring.write_avail_idx(base.wrapping_add(n));
            let heads: Vec<_> = (0..taken).map(|_| device.pop().unwrap().head).collect();
            heads.into_iter().take(done.into()).for_each(|head| device.queue.push_used(head, 0));
            // How many more may be: what was completed makes room.
            let room = size + done;
            for avail in 0..=u16::MAX {
                ring.write_avail_idx(avail);
                let made = avail.wrapping_sub(base);
                let outcome = device.queue.enable_kicks();
                states += 1;
                if made < taken || made > room {
                    broken += 1;
                    let is_named =
                        matches!(outcome, Err(RingBroken::AvailIndex { .. } | RingBroken::AvailIndexBack { .. }));
                    assert!(is_named, "avail index {avail} of {base}, {n}, {taken}, {done}: {outcome:?}");
                    continue;
                }
                assert_eq!(outcome, Ok(made > taken), "avail index {avail} of {base}, {n}, {taken}, {done}");
                assert_eq!(device.queue.entries_seen(), usize::from(made - taken));
                assert_eq!(ring.avail_event(), base.wrapping_add(taken));
                let next = base.wrapping_add(taken) % size;
                ring.write_avail_entry(next, size);
                if made > taken {
                    // One that names no descriptor stays where it is, and so does what is put back.
                    assert_eq!(device.try_pop().unwrap_err(), RingBroken::Head { head: size, size });
                    ring.write_avail_entry(next, next);
                    let popped = device.pop().unwrap();
                    assert!(popped.chain.is_ok());
                    device.queue.rewind(popped.head);
                    device.iovecs.truncate(0);
                    assert_eq!(device.queue.entries_seen(), usize::from(made - taken));
                } else {
                    assert!(device.pop().is_none());
                    ring.write_avail_entry(next, next);
                }
            }
        });
    }
    say(&format!("avail indices: {states} states, {broken} of them broken"));
    assert_eq!(states, 4 * (10 + 35) * 65_536);
    // For each ring and progress `size + done - taken + 1` values are good.
    let mut good = 0;
    for size in [2, 4] {
        every_progress(size, |_, taken, done| good += 4 * u64::from(size + done - taken + 1));
    }
    assert_eq!(states - broken, good);
}

/// The same at the start of a ring, where nothing is in our hands.
#[test]
fn every_avail_index_at_the_start() {
    let mut states = 0_u64;
    let mem = Arc::new(small_memory());
    let view = view_of(&mem);
    for (size, base) in [2, 4].into_iter().flat_map(|size| BASES.map(|base| (size, base))) {
        let ring = SplitRing::placed(&mem, size, base, RING);
        for avail in 0..=u16::MAX {
            ring.write_avail_idx(avail);
            let started = Queue::start(find(&view, size, RING).unwrap(), Arc::clone(&view), ALL);
            let is_good = avail.wrapping_sub(base) <= size;
            assert_eq!(started.is_ok(), is_good, "avail index {avail} of {base}, size {size}");
            states += 1;
        }
    }
    say(&format!("avail indices at the start: {states} states"));
    assert_eq!(states, 8 * 65_536);
}

/// "used_event" (2.7.7.2): a call is wanted if the entry with that index is among those that were just published.
/// Without the feature the flag says it (2.7.7.1), whatever the other bits are.
#[test]
fn every_used_event_and_flag_calls_or_does_not() {
    let (mut states, mut calls) = (0_u64, 0_u64);
    for size in [2, 4] {
        for features in [ALL, NONE] {
            let mem = Arc::new(small_memory());
            let (ring, mut device) = started(&mem, size, 0, features);
            (0..size).for_each(|entry| ring.write_desc(entry, Desc { addr: PLAIN, len: 1, flags: 0, next: 0 }));
            let mut old = 0_u16;
            for word in 0..=u16::MAX {
                for count in 0..=size {
                    (0..count).for_each(|k| ring.write_avail_entry(old.wrapping_add(k), k));
                    ring.write_avail_idx(old.wrapping_add(count));
                    assert_eq!(device.complete_all(0), usize::from(count));
                    device.iovecs.truncate(0);
                    let event = old.wrapping_add(word);
                    let (flags, used_event) = if features.event_idx { (1, event) } else { (word, old) };
                    ring.write_avail_flags(flags);
                    ring.write_used_event(used_event);
                    let is_wanted = if features.event_idx {
                        (0..count).any(|k| old.wrapping_add(k) == event)
                    } else {
                        count > 0 && word % 2 == 0
                    };
                    assert_eq!(device.queue.publish(), is_wanted, "{word:#x}, {count} entries from {old}");
                    old = old.wrapping_add(count);
                    assert_eq!((ring.used_idx(), device.queue.position()), (old, old));
                    states += 1;
                    calls += u64::from(is_wanted);
                }
            }
        }
    }
    say(&format!("calls: {states} states, {calls} of them called"));
    assert_eq!(states, 2 * 65_536 * (3 + 5));
    assert_eq!(calls, (1 + 2) + (1 + 2 + 3 + 4) + 32_768 * (2 + 4));
}

/// All orders in which kicks are asked for, or not, while entries come and go, up to eight steps: what the driver reads
/// says what was asked last (2.7.10 "Available Buffer Notification Suppression").
#[test]
fn every_order_of_asking_for_kicks() {
    let mut states = 0_u64;
    for features in [ALL, NONE] {
        for steps in 0..3_u32.pow(8) {
            let mem = Arc::new(small_memory());
            let (ring, mut device) = started(&mem, 2, 0xfffe, features);
            (0..2).for_each(|entry| ring.write_desc(entry, Desc { addr: PLAIN, len: 1, flags: 0, next: 0 }));
            let mut at = 0xfffe_u16;
            let mut wanted = None;
            for step in (0..8).map(|k| steps / 3_u32.pow(k) % 3) {
                match step {
                    0 => {
                        assert_eq!(device.queue.enable_kicks(), Ok(false));
                        wanted = Some(at);
                    }
                    1 => {
                        device.queue.disable_kicks();
                        wanted = if features.event_idx { wanted } else { None };
                    }
                    _ => {
                        ring.write_avail_entry(at, at % 2);
                        at = at.wrapping_add(1);
                        ring.write_avail_idx(at);
                        assert_eq!(device.complete_all(0), 1);
                    }
                }
                if features.event_idx {
                    assert_eq!(ring.used_flags(), 0, "The flag means nothing with the feature, and is 0");
                    assert_eq!(wanted.unwrap_or(0), ring.avail_event());
                } else {
                    assert_eq!(ring.used_flags(), u16::from(wanted.is_none()), "steps {steps}, {step}");
                }
                states += 1;
            }
        }
    }
    say(&format!("kicks: {states} states"));
    assert_eq!(states, 2 * 8 * 6561);
}
