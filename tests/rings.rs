//! Split rings without a back-end: which chains come out, in which order, and what the used ring says.
//!
//! The second opinion is `virtio_queue::Queue`, on a copy of the same memory.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::device_side::{ALL, DeviceSide, INDIRECT, NONE, find, view_of};
use common::memory::{GuestMemory, RegionSpec};
use common::split_ring::{Buf, RingAddrs, SplitRing};
use proptest::prelude::*;
use vhost_user_net::virtqueue::{Direction, QueueSize, RingBroken, RingError};
use virtio_queue::{Queue as OracleQueue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MIB: usize = 1 << 20;

/// Guest memory in which no two places look alike.
fn patterned(size: usize) -> Arc<GuestMemory> {
    let mem = GuestMemory::single(size);
    let mut state = 1_u64;
    let bytes: Vec<u8> = (0..size)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    mem.write(mem.regions()[0].info.guest, &bytes);
    Arc::new(mem)
}

/// A ring as `virtio-queue` sees it, in memory of its own.
struct Oracle {
    mem: GuestMemoryMmap,
    queue: OracleQueue,
    addrs: RingAddrs,
    size: u16,
}

impl Oracle {
    fn new(ring: &SplitRing, event_idx: bool) -> Self {
        let info = ring.mem().regions()[0].info;
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(info.guest), info.size as usize)]).unwrap();
        let mut queue = OracleQueue::new(ring.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(ring.addrs.desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(ring.addrs.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(ring.addrs.used)).unwrap();
        queue.set_next_avail(ring.base);
        queue.set_next_used(ring.base);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Self { mem, queue, addrs: ring.addrs, size: ring.size }
    }

    /// Takes over what the driver wrote, that is everything.
    fn sync(&self, mem: &GuestMemory) {
        self.mem.write_slice(&mem.snapshot()[0], GuestAddress(mem.regions()[0].info.guest)).unwrap();
    }

    /// Head, readable bytes and writable bytes of the next chain.
    fn pop(&mut self) -> Option<(u16, Vec<u8>, Vec<u8>)> {
        let chain = self.queue.pop_descriptor_chain(&self.mem)?;
        let head = chain.head_index();
        let gather = |descs: &mut dyn Iterator<Item = virtio_queue::desc::split::Descriptor>| {
            let mut all = Vec::new();
            for desc in descs {
                let mut bytes = vec![0; desc.len() as usize];
                self.mem.read_slice(&mut bytes, desc.addr()).unwrap();
                all.extend(bytes);
            }
            all
        };
        Some((head, gather(&mut chain.clone().readable()), gather(&mut chain.writable())))
    }

    /// The used ring without flags and event: index and entries.
    fn used_ring(&self) -> Vec<u8> {
        let mut bytes = vec![0; 2 + 8 * usize::from(self.size)];
        self.mem.read_slice(&mut bytes, GuestAddress(self.addrs.used + 2)).unwrap();
        bytes
    }
}

fn used_ring(ring: &SplitRing) -> Vec<u8> {
    ring.mem().read(ring.addrs.used + 2, 2 + 8 * usize::from(ring.size))
}

/// A chain to make: its elements' lengths, how many of them are readable, and whether it is indirect.
#[derive(Clone, Debug)]
struct ChainPlan {
    lens: Vec<usize>,
    readable: usize,
    indirect: bool,
    used_len: u32,
}

fn chain_plan() -> impl Strategy<Value = ChainPlan> {
    (prop::collection::vec(1..300_usize, 1..6), any::<bool>(), any::<u32>(), 0..6_usize).prop_map(
        |(lens, indirect, used_len, readable)| ChainPlan {
            readable: readable.min(lens.len()),
            lens,
            indirect,
            used_len,
        },
    )
}

/// Rounds of chains: each round is made available together.
fn plan() -> impl Strategy<Value = (u32, u16, bool, Vec<Vec<ChainPlan>>)> {
    let rounds = prop::collection::vec(prop::collection::vec(chain_plan(), 0..12), 1..8);
    (0..7_u32, prop_oneof![any::<u16>(), 65_500..=65_535_u16], any::<bool>(), rounds)
}

fn add(ring: &mut SplitRing, plan: &ChainPlan) -> bool {
    let bufs: Vec<Buf> = (0..)
        .zip(&plan.lens)
        .map(|(k, len)| {
            // Sometimes adjacent to the one before, so that pieces merge.
            let addr = ring.mem().alloc(*len, if len.is_multiple_of(2) { 1 } else { 64 });
            if k < plan.readable { Buf::readable(addr, *len) } else { Buf::writable(addr, *len) }
        })
        .collect();
    if plan.indirect { ring.try_add_indirect(&bufs).is_some() } else { ring.try_add(&bufs).is_some() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn valid_rings_read_as_another_implementation_reads_them((log_size, start, event_idx, rounds) in plan()) {
        let mem = patterned(MIB);
        let mut ring = SplitRing::starting_at(&mem, 1 << log_size, start);
        ring.event_idx = event_idx;
        ring.write_avail_flags(0);
        let mut oracle = Oracle::new(&ring, event_idx);
        let mut ours = DeviceSide::start(&ring, if event_idx { ALL } else { INDIRECT }).unwrap();
        for round in &rounds {
            let added: Vec<_> = round.iter().filter(|plan| add(&mut ring, plan)).collect();
            ring.publish();
            ring.write_used_event(ring.last_used().wrapping_add(2));
            oracle.sync(&mem);
            let mut in_hand = Vec::new();
            while let Some(popped) = ours.pop() {
                let shape = popped.chain.unwrap();
                let got = (ours.bytes(shape.readable()), ours.bytes(shape.writable()));
                prop_assert_eq!(got.0.len(), shape.readable_len);
                prop_assert_eq!(got.1.len(), shape.writable_len);
                in_hand.push((popped.head, got));
            }
            prop_assert_eq!(in_hand.len(), added.len());
            for ((head, got), plan) in in_hand.into_iter().zip(&added) {
                let (oracle_head, readable, writable) = oracle.pop().unwrap();
                prop_assert!(got == (readable, writable), "other buffers for {:?}", plan);
                oracle.queue.add_used(&oracle.mem, oracle_head, plan.used_len).unwrap();
                ours.queue.push_used(head, plan.used_len);
            }
            prop_assert!(oracle.pop().is_none());
            let called = ours.queue.publish();
            let oracle_calls = oracle.queue.needs_notification(&oracle.mem).unwrap() && !added.is_empty();
            prop_assert_eq!(called, oracle_calls);
            prop_assert_eq!(used_ring(&ring), oracle.used_ring());
            while ring.take_used().is_some() {}
            prop_assert!(ring.outstanding().is_empty());
        }
    }
}

///
#[test]
fn indices_wrap_with_batches_across_the_end() {
    for size in [1, 2, 8, 256] {
        for before in 0..=size {
            let mem = Arc::new(GuestMemory::single(MIB));
            let addr = mem.alloc(16, 1);
            let mut ring = SplitRing::starting_at(&mem, size, 0_u16.wrapping_sub(before));
            let mut ours = DeviceSide::start(&ring, ALL).unwrap();
            for _ in 0..3 {
                let heads: Vec<_> = (0..size).map(|_| ring.add(&[Buf::writable(addr, 16)])).collect();
                ring.publish();
                assert_eq!(ours.complete_all(7), usize::from(size));
                ours.queue.publish();
                for head in heads {
                    assert_eq!(ring.take_used(), Some((head, 7)), "size {size}, {before} before the end");
                }
            }
            assert_eq!(ours.queue.position(), ring.avail_idx());
            assert_eq!(ring.out_of_order(), 0);
        }
    }
}

///
#[test]
fn full_ring_of_every_size_is_read_to_its_end_and_no_further() {
    for log in 0..=15 {
        let size = 1 << log;
        let mem = Arc::new(GuestMemory::single(2 * MIB));
        let addr = mem.alloc(16, 1);
        let mut ring = SplitRing::starting_at(&mem, size, 65_000);
        for _ in 0..size {
            ring.add(&[Buf::readable(addr, 16)]);
        }
        ring.publish();
        let mut ours = DeviceSide::start(&ring, NONE).unwrap();
        assert_eq!(ours.complete_all(0), usize::from(size));
        assert!(ours.queue.publish());
        while ring.take_used().is_some() {}
        assert!(ring.outstanding().is_empty(), "size {size}");
    }
}

///
#[test]
fn chain_of_all_descriptors_is_one_chain() {
    for size in [1, 2, 256, 1024] {
        let mem = Arc::new(GuestMemory::single(MIB));
        // Not adjacent, so that no two are merged.
        let bufs: Vec<_> = (0..size).map(|_| Buf::readable(mem.alloc(1, 2), 1)).collect();
        let mut ring = SplitRing::new(&mem, size);
        ring.add(&bufs);
        ring.publish();
        let mut ours = DeviceSide::start(&ring, NONE).unwrap();
        let popped = ours.pop().unwrap();
        let shape = popped.chain.unwrap();
        assert_eq!((shape.readable_len, shape.readable().len()), (usize::from(size), usize::from(size)));
        ours.queue.rewind(popped.head);
    }
}

#[test]
fn size_that_is_no_power_of_two_up_to_32768_is_refused() {
    for size in [0, 3, 255, 32_767, 32_769, 65_535, 65_536, u32::MAX] {
        assert_eq!(QueueSize::try_from(size), Err(RingError::BadSize { size }));
    }
    for log in 0..=15 {
        assert!(QueueSize::try_from(1 << log).is_ok());
    }
}

/// Which entries `pop_single` takes, each behind one that it was shown before.
#[test]
fn single_buffer_is_taken_at_once_where_it_is_as_it_was_asked_for() {
    const FAR: u64 = 0x1000_0000;
    let mem = Arc::new(GuestMemory::new(&[RegionSpec::new(0, MIB), RegionSpec::new(FAR, MIB)]));
    let mut ring = SplitRing::new(&mem, 64);
    let mut ours = DeviceSide::start(&ring, ALL).unwrap();
    let near = mem.alloc(64, 1);
    let take = |ours: &mut DeviceSide, wanted| {
        let (head, len) = ours.queue.pop_single(wanted, &mut ours.iovecs)?;
        ours.queue.push_used(head, 0);
        Some(len)
    };
    let (readable, writable) = ((Direction::Readable, 1), (Direction::Writable, 8));
    ring.add(&[Buf::readable(near, 16)]);
    ring.publish();
    assert_eq!(take(&mut ours, readable), None, "nobody looked for it");
    assert!(ours.queue.has_entries().unwrap());
    assert_eq!(take(&mut ours, readable), None, "nothing was found in this region before");
    assert_eq!(ours.complete_all(0), 1);
    let cases: [(&[Buf], bool, _); 9] = [
        (&[Buf::readable(near, 16)], false, [Some(16), None]),
        (&[Buf::readable(near, 1)], false, [Some(1), None]),
        (&[Buf::writable(near, 16)], false, [None, Some(16)]),
        (&[Buf::writable(near, 8)], false, [None, Some(8)]),
        (&[Buf::writable(near, 7)], false, [None, None]),
        (&[Buf::readable(near, 0)], false, [None, None]),
        (&[Buf::readable(near, 4), Buf::readable(near + 4, 4)], false, [None, None]),
        (&[Buf::readable(near, 16)], true, [None, None]),
        (&[Buf::readable(FAR, 16)], false, [None, None]),
    ];
    for (bufs, indirect, [as_readable, as_writable]) in cases {
        for (wanted, expected) in [(readable, as_readable), (writable, as_writable)] {
            _ = if indirect { ring.add_indirect(bufs) } else { ring.add(bufs) };
            ring.add(&[Buf::readable(near, 4)]);
            ring.publish();
            assert!(ours.queue.has_entries().unwrap());
            let pieces = ours.iovecs.len();
            assert_eq!(take(&mut ours, wanted), expected, "{bufs:?} for {wanted:?}");
            assert_eq!(ours.iovecs.len(), pieces + usize::from(expected.is_some()));
            // What is left is there for `pop`, which was in the near region last.
            assert_eq!(ours.complete_all(0), 2 - usize::from(expected.is_some()));
            ours.queue.publish();
            while ring.take_used().is_some() {}
        }
    }
}

#[test]
fn rewound_chains_come_again_in_order() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::starting_at(&mem, 4, 65_534);
    let heads: Vec<_> = (1..=4).map(|len| ring.add(&[Buf::writable(mem.alloc(len, 1), len)])).collect();
    ring.publish();
    let mut ours = DeviceSide::start(&ring, NONE).unwrap();
    let first = ours.pop().unwrap();
    let [second, third] = [ours.pop().unwrap(), ours.pop().unwrap()];
    ours.queue.rewind(third.head);
    ours.queue.rewind(second.head);
    ours.queue.push_used(first.head, 1);
    let mut len = 1;
    while let Some(popped) = ours.pop() {
        len += 1;
        assert_eq!(popped.chain.unwrap().writable_len, len);
        ours.queue.push_used(popped.head, len as u32);
    }
    assert_eq!((len, ring.take_used()), (4, None), "nothing is visible before it is published");
    ours.queue.publish();
    let used: Vec<_> = std::iter::from_fn(|| ring.take_used()).collect();
    assert_eq!(used, heads.into_iter().zip(1..).collect::<Vec<_>>());
}

///
#[test]
fn avail_index_that_cannot_be_breaks_the_ring() {
    const SIZE: u16 = 8;
    for base in [0, 5, 65_535] {
        for wrong in [SIZE + 1, 5000, 0x8000, 65_535] {
            let mem = Arc::new(GuestMemory::single(MIB));
            let ring = SplitRing::starting_at(&mem, SIZE, base);
            let mut ours = DeviceSide::start(&ring, NONE).unwrap();
            let avail = base.wrapping_add(wrong);
            ring.write_avail_idx(avail);
            let broken = RingBroken::AvailIndex { avail, used: base, size: SIZE };
            assert_eq!(ours.try_pop().unwrap_err(), broken);
            assert_eq!(ours.queue.has_entries().unwrap_err(), broken);
            assert_eq!(ours.queue.enable_kicks().unwrap_err(), broken);
            assert_eq!(DeviceSide::start(&ring, NONE).err(), Some(broken));
        }
    }
}

///
#[test]
fn avail_index_behind_what_was_taken_breaks_the_ring() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::new(&mem, 8);
    for _ in 0..3 {
        ring.add(&[Buf::writable(mem.alloc(64, 1), 64)]);
    }
    ring.publish();
    let mut ours = DeviceSide::start(&ring, NONE).unwrap();
    let _in_hand: Vec<_> = (0..3).map(|_| ours.pop().unwrap().head).collect();
    ring.write_avail_idx(2);
    assert_eq!(ours.try_pop().unwrap_err(), RingBroken::AvailIndexBack { avail: 2, taken: 3 });
}

///
#[test]
fn head_that_is_no_descriptor_breaks_the_ring() {
    for head in [8, 9999, 0xffff] {
        let mem = Arc::new(GuestMemory::single(MIB));
        let mut ring = SplitRing::new(&mem, 8);
        ring.put_avail(head);
        ring.publish();
        let mut ours = DeviceSide::start(&ring, NONE).unwrap();
        assert_eq!(ours.try_pop().unwrap_err(), RingBroken::Head { head, size: 8 });
    }
}

#[test]
fn ring_starts_where_the_used_index_says() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::starting_at(&mem, 8, 65_533);
    for len in 1..=6 {
        ring.add(&[Buf::writable(mem.alloc(len, 1), len)]);
    }
    ring.publish();
    // Four were done by somebody who is gone.
    ring.write_used_idx(1);
    let mut ours = DeviceSide::start(&ring, NONE).unwrap();
    assert_eq!(ours.queue.position(), 1);
    let popped = ours.pop().unwrap();
    assert_eq!(popped.chain.unwrap().writable_len, 5);
    ours.queue.rewind(popped.head);
}

/// Two adjacent regions of different files, whose border is at [`BORDER`].
fn two_regions() -> Arc<GuestMemory> {
    let low = RegionSpec::new(BORDER - MIB as u64, MIB);
    let high = RegionSpec::new(BORDER, MIB).in_file(1, 0);
    Arc::new(GuestMemory::new(&[low, high.at_user(0x10_0000_0000)]))
}

const BORDER: u64 = 0x40_0000;

/// R-SPAN
#[test]
fn ring_over_two_regions_works_as_one_in_one_region() {
    const SIZE: u16 = 16;
    for (area, lens) in [("desc", 256), ("avail", 38), ("used", 134)] {
        let align = if area == "desc" { 16 } else { 4 };
        for before in (0..=lens).step_by(align) {
            let mem = two_regions();
            let mut addrs = RingAddrs { desc: BORDER + 0x1000, avail: BORDER + 0x2000, used: BORDER + 0x3000 };
            let place = match area {
                "desc" => &mut addrs.desc,
                "avail" => &mut addrs.avail,
                _ => &mut addrs.used,
            };
            *place = BORDER - before as u64;
            let mut ring = SplitRing::placed(&mem, SIZE, 65_530, addrs);
            ring.event_idx = true;
            let mut ours = DeviceSide::start(&ring, ALL).unwrap();
            for len in 1..=40 {
                let head = ring.add(&[Buf::writable(BORDER + 0x8000, len)]);
                ring.publish();
                ring.set_used_event(ring.last_used());
                let popped = ours.pop().unwrap();
                assert_eq!(popped.chain.unwrap().writable_len, len);
                ours.queue.push_used(popped.head, len as u32);
                assert!(ours.queue.publish());
                assert_eq!(ring.take_used(), Some((head, len as u32)), "{area} {before} before the border");
                assert!(!ours.queue.enable_kicks().unwrap());
                assert_eq!(ring.avail_event(), ring.avail_idx());
            }
        }
    }
}

/// R-SPAN, Q-10
#[test]
fn buffers_and_tables_over_two_regions_hold_the_same_bytes() {
    let bytes: Vec<u8> = (1..=64).collect();
    for before in 0..=64 {
        let mem = two_regions();
        let mut ring = SplitRing::new(&mem, 8);
        let buffer = BORDER - before;
        mem.write(buffer, &bytes);
        let table = BORDER + 0x1000 - 0x1000 * u64::from(before % 2 == 0) - before % 48;
        for (k, (at, len)) in [(0, 12), (12, 30), (42, 22)].into_iter().enumerate() {
            let k = k as u16;
            let flags = u16::from(k < 2);
            let desc = common::split_ring::Desc { addr: buffer + at, len, flags, next: k + 1 };
            ring.write_desc_at(table + 0x100, k, desc);
        }
        let head = common::split_ring::Desc {
            addr: table + 0x100,
            len: 48,
            flags: common::virtio::desc_flag::INDIRECT,
            next: 0,
        };
        ring.write_desc(0, head);
        ring.offer(0);
        ring.publish();
        let mut ours = DeviceSide::start(&ring, INDIRECT).unwrap();
        let popped = ours.pop().unwrap();
        let shape = popped.chain.unwrap();
        assert_eq!(ours.bytes(shape.readable()), bytes, "{before} before the border");
        ours.queue.rewind(popped.head);
    }
}

#[test]
fn ring_layout_that_cannot_be_is_refused() {
    const SIZE: u16 = 16;
    let mem = GuestMemory::single(MIB);
    let start = mem.regions()[0].info.guest;
    let end = start + MIB as u64;
    let view = view_of(&mem);
    let good = RingAddrs { desc: start, avail: start + 0x1000, used: start + 0x2000 };
    assert!(find(&view, SIZE, good).is_ok());
    let refusal = |at| find(&view, SIZE, at).unwrap_err();
    for off in [1, 2, 4, 8, 15] {
        let desc = start + off;
        assert!(matches!(refusal(RingAddrs { desc, ..good }), RingError::Unaligned { align: 16, .. }));
    }
    assert!(matches!(refusal(RingAddrs { avail: good.avail + 1, ..good }), RingError::Unaligned { align: 2, .. }));
    for off in [1, 2, 3] {
        let used = good.used + off;
        assert!(matches!(refusal(RingAddrs { used, ..good }), RingError::Unaligned { align: 4, .. }));
    }
    let last = !15_u64;
    for at in [
        RingAddrs { desc: end - 240, ..good },
        RingAddrs { avail: end - 36, ..good },
        RingAddrs { used: end - 132, ..good },
        RingAddrs { desc: last, ..good },
        RingAddrs { avail: last, ..good },
        RingAddrs { used: last, ..good },
        RingAddrs { desc: 0, ..good },
    ] {
        assert!(matches!(refusal(at), RingError::Unmapped { .. }), "{at:x?}");
    }
    for at in [
        RingAddrs { used: good.desc, ..good },
        RingAddrs { used: good.desc + 252, ..good },
        RingAddrs { used: good.avail - 132, ..good },
        RingAddrs { used: good.avail + 36, ..good },
    ] {
        assert!(matches!(refusal(at), RingError::Overlap { .. }), "{at:x?}");
    }
    assert!(find(&view, SIZE, RingAddrs { used: good.avail + 40, ..good }).is_ok());
}

#[test]
fn ring_over_a_hole_between_regions_is_refused() {
    let high = RegionSpec::new(BORDER + 0x1000, MIB).in_file(1, 0);
    let mem = GuestMemory::new(&[RegionSpec::new(BORDER - MIB as u64, MIB), high]);
    let at = RingAddrs { desc: BORDER - 16, avail: BORDER - 0x1000, used: BORDER - 0x2000 };
    assert!(matches!(find(&view_of(&mem), 16, at), Err(RingError::Unmapped { .. })));
}
