//! Every way in which a driver can get a chain wrong: it is named, and no piece of it is kept.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::device_side::{DeviceSide, INDIRECT, NONE};
use common::memory::GuestMemory;
use common::split_ring::{Buf, Desc, SplitRing};
use common::virtio::desc_flag::{INDIRECT as IND, NEXT, WRITE};
use vhost_user_net::memory::Unmapped;
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net::virtqueue::{ChainFault, Shape};

const SIZE: u16 = 8;
const MIB: usize = 1 << 20;
/// Where [`GuestMemory::single`] begins.
const START: u64 = 0x10_0000;
const END: u64 = START + 4 * MIB as u64;
/// A buffer that nothing else uses.
const BUF: u64 = START + 0x8_0000;
/// An indirect table that nothing else uses.
const TABLE: u64 = START + 0x10_0000;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// What the walker makes of a chain: these descriptors are 0, 1, ... of the ring, those the indirect table at [`TABLE`].
///
/// A good chain before it checks that nothing of the bad one is appended, and another behind it that the queue goes on.
fn walk(features: RingFeatures, ring_descs: &[Desc], table: &[Desc]) -> Result<Shape, ChainFault> {
    let mem = Arc::new(GuestMemory::single(4 * MIB));
    let mut ring = SplitRing::new(&mem, SIZE);
    let good = Buf::readable(mem.alloc(4, 4), 4);
    let reserved = ring.take_free(usize::from(SIZE) - 1).unwrap();
    assert_eq!(reserved, (0..SIZE - 1).collect::<Vec<_>>());
    for (index, desc) in (0..).zip(ring_descs) {
        ring.write_desc(index, *desc);
    }
    for (index, desc) in (0..).zip(table) {
        ring.write_desc_at(TABLE, index, *desc);
    }
    let last = ring.add(&[good]);
    ring.offer(0);
    ring.put_avail(last);
    ring.publish();
    let mut ours = DeviceSide::start(&ring, features).unwrap();
    let before = ours.pop().unwrap();
    let pieces = ours.iovecs.len();
    let popped = ours.pop().unwrap();
    let kept = ours.iovecs.len() - pieces;
    match &popped.chain {
        Ok(shape) => assert_eq!(kept, shape.readable().len() + shape.writable().len()),
        Err(fault) => assert_eq!(kept, 0, "pieces of a chain with {fault:?} were kept"),
    }
    let after = ours.pop().unwrap();
    assert!(after.chain.is_ok(), "a chain behind a bad one");
    for head in [before.head, popped.head, after.head] {
        ours.queue.push_used(head, 0);
    }
    ours.queue.publish();
    assert_eq!([0, 1, 2].map(|at| ring.used_entry(at).0), [u32::from(last), 0, u32::from(last)]);
    popped.chain
}

fn fault(features: RingFeatures, ring_descs: &[Desc], table: &[Desc]) -> ChainFault {
    walk(features, ring_descs, table).expect_err("a malformed chain is refused")
}

/// A head that refers to `count` descriptors at [`TABLE`].
fn indirect(count: u32) -> Desc {
    desc(TABLE, 16 * count, IND, 0)
}

///
#[test]
fn next_outside_its_table_is_a_fault() {
    for index in [SIZE, SIZE + 1, 0x7fff, 0xffff] {
        let chain = [desc(BUF, 4, NEXT, index)];
        let ring_fault = ChainFault::NextOutOfTable { index, size: u32::from(SIZE) };
        assert_eq!(fault(NONE, &chain, &[]), ring_fault);
        assert_eq!(fault(INDIRECT, &[indirect(2)], &chain), ChainFault::NextOutOfTable { index, size: 2 });
    }
    // In the ring there is a descriptor 2, in the indirect table there is none.
    let table = [desc(BUF, 4, NEXT, 2), desc(BUF, 4, 0, 0)];
    let out = ChainFault::NextOutOfTable { index: 2, size: 2 };
    assert_eq!(fault(INDIRECT, &[indirect(2), desc(BUF, 4, 0, 0), desc(BUF, 4, 0, 0)], &table), out);
}

///
#[test]
fn loop_of_any_length_is_a_fault() {
    let ahead = |k: u16| desc(BUF + 16 * u64::from(k), 4, NEXT, k + 1);
    let back = |k: u16, to: u16| desc(BUF + 16 * u64::from(k), 4, NEXT, to);
    let loops: [&[Desc]; 4] = [
        &[back(0, 0)],
        &[ahead(0), back(1, 0)],
        &[ahead(0), ahead(1), ahead(2), back(3, 3)],
        &[ahead(0), ahead(1), ahead(2), ahead(3), ahead(4), ahead(5), back(6, 1)],
    ];
    for chain in loops {
        assert_eq!(fault(NONE, chain, &[]), ChainFault::Loop);
        assert_eq!(fault(INDIRECT, &[indirect(chain.len() as u32)], chain), ChainFault::Loop);
    }
}

///
#[test]
fn loop_of_empty_buffers_is_a_fault() {
    assert_eq!(fault(NONE, &[desc(0, 0, NEXT, 1), desc(0, 0, NEXT, 0)], &[]), ChainFault::Loop);
}

///
#[test]
fn chain_of_exactly_its_table_is_good() {
    let table: Vec<_> = (0..1024_u16).map(|k| desc(BUF + 2 * u64::from(k), 1, u16::from(k < 1023), k + 1)).collect();
    let shape = walk(INDIRECT, &[indirect(1024)], &table).unwrap();
    assert_eq!((shape.readable_len, shape.readable().len()), (1024, 1024));
}

///
#[test]
fn indirect_where_it_may_not_be_is_a_fault() {
    let inner = [desc(BUF, 4, 0, 0)];
    assert_eq!(fault(NONE, &[indirect(1)], &inner), ChainFault::IndirectNotNegotiated);
    assert_eq!(fault(INDIRECT, &[indirect(1)], &[indirect(1)]), ChainFault::NestedIndirect);
    let chained = Desc { flags: IND | NEXT, next: 1, ..indirect(1) };
    assert_eq!(fault(INDIRECT, &[chained, desc(BUF, 4, 0, 0)], &inner), ChainFault::IndirectWithNext);
}

#[test]
fn indirect_behind_direct_descriptors_is_good() {
    let shape = walk(INDIRECT, &[desc(BUF, 4, NEXT, 1), indirect(1)], &[desc(BUF + 64, 5, 0, 0)]).unwrap();
    assert_eq!(shape.readable_len, 9);
}

///
#[test]
fn indirect_table_of_a_wrong_length_is_a_fault() {
    for len in [0, 1, 15, 17, 16 * 1025, 16 * 65_536, u32::MAX] {
        let head = desc(TABLE, len, IND, 0);
        assert_eq!(fault(INDIRECT, &[head], &[desc(BUF, 4, 0, 0)]), ChainFault::BadTableLength { len });
    }
}

///
#[test]
fn indirect_table_outside_memory_is_a_fault() {
    for addr in [0, START - 16, END - 16, END, u64::MAX - 16, u64::MAX] {
        let at = Unmapped { addr, len: 32 };
        assert_eq!(fault(INDIRECT, &[desc(addr, 32, IND, 0)], &[]), ChainFault::Unmapped(at));
    }
}

///
#[test]
fn buffer_outside_memory_is_a_fault() {
    for (addr, len) in [
        (0, 1),
        (START - 1, 1),
        (START - 1, 2),
        (END - 1, 2),
        (END, 1),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (BUF, u32::MAX),
        (u64::MAX - 3, 8),
    ] {
        let at = ChainFault::Unmapped(Unmapped { addr, len: u64::from(len) });
        assert_eq!(fault(NONE, &[desc(addr, len, 0, 0)], &[]), at);
        assert_eq!(fault(NONE, &[desc(BUF, 4, NEXT, 1), desc(addr, len, WRITE, 0)], &[]), at);
        assert_eq!(fault(INDIRECT, &[indirect(2)], &[desc(BUF, 4, NEXT, 1), desc(addr, len, WRITE, 0)]), at);
    }
    assert!(walk(NONE, &[desc(END - 1, 1, 0, 0)], &[]).is_ok());
}

#[test]
fn readable_buffer_behind_a_writable_one_is_a_fault() {
    let chain = [desc(BUF, 4, WRITE | NEXT, 1), desc(BUF + 8, 4, 0, 0)];
    assert_eq!(fault(NONE, &chain, &[]), ChainFault::ReadableAfterWritable);
    assert_eq!(fault(INDIRECT, &[indirect(2)], &chain), ChainFault::ReadableAfterWritable);
}

///
#[test]
fn chain_longer_than_32_bits_is_a_fault() {
    // One region of 4 MiB, named 1024 times: 2^32 bytes, one more than fits.
    let table: Vec<_> = (0..1024_u16).map(|k| desc(START, 4 << 20, WRITE | u16::from(k < 1023), k + 1)).collect();
    assert_eq!(fault(INDIRECT, &[indirect(1024)], &table), ChainFault::TooLong);
}

///
#[test]
fn chain_of_more_pieces_than_one_call_takes_is_a_fault() {
    // 1023 and then two: the ring's descriptors before the table make one piece too many.
    let table: Vec<_> = (0..1024_u16).map(|k| desc(BUF + 2 * u64::from(k), 1, u16::from(k < 1023), k + 1)).collect();
    let chain = [desc(BUF + 0x8000, 1, NEXT, 1), indirect(1024)];
    assert_eq!(fault(INDIRECT, &chain, &table), ChainFault::TooManyBuffers);
    // Where they merge they are few.
    let table: Vec<_> = (0..1024_u16).map(|k| desc(BUF + u64::from(k), 1, u16::from(k < 1023), k + 1)).collect();
    let shape = walk(INDIRECT, &chain, &table).unwrap();
    assert_eq!((shape.readable_len, shape.readable().len()), (1025, 2));
}

/// what holds nothing is passed over, but not without end: each takes time.
#[test]
fn chain_of_more_than_64_empty_buffers_is_a_fault() {
    let table: Vec<_> = (0..64_u16).map(|k| desc(BUF, 0, u16::from(k < 63), k + 1)).collect();
    let shape = walk(INDIRECT, &[desc(BUF, 1, NEXT, 1), indirect(64)], &table).unwrap();
    assert_eq!((shape.readable_len, shape.readable().len()), (1, 1));
    let chain = [desc(BUF, 0, NEXT, 1), indirect(64)];
    assert_eq!(fault(INDIRECT, &chain, &table), ChainFault::TooManyBuffers);
}

///
#[test]
fn buffer_in_the_wrong_direction_is_a_fault_of_its_queue() {
    let mixed = walk(NONE, &[desc(BUF, 4, NEXT, 1), desc(BUF + 8, 4, WRITE, 0)], &[]).unwrap();
    assert_eq!((mixed.readable_len, mixed.writable_len), (4, 4));
    assert_eq!(mixed.only_readable(), Err(ChainFault::WrongDirection));
    assert_eq!(mixed.only_writable(), Err(ChainFault::WrongDirection));
    let readable = walk(NONE, &[desc(BUF, 4, 0, 0)], &[]).unwrap();
    assert!(readable.only_readable().is_ok() && readable.only_writable().is_err());
    let writable = walk(NONE, &[desc(BUF, 4, WRITE, 0)], &[]).unwrap();
    assert!(writable.only_writable().is_ok() && writable.only_readable().is_err());
}

///
#[test]
fn empty_buffer_holds_nothing_wherever_it_stands_and_points() {
    let chain = |empty: usize| -> Vec<Desc> {
        let part = |k: usize| if k == empty { (u64::MAX, 0) } else { (BUF + 16 * k as u64, 4) };
        (0..3).map(|k| (k, part(k))).map(|(k, (addr, len))| desc(addr, len, u16::from(k < 2), k as u16 + 1)).collect()
    };
    for empty in 0..3 {
        assert_eq!(walk(NONE, &chain(empty), &[]).unwrap().readable_len, 8, "number {empty} is empty");
    }
    let shape = walk(NONE, &[desc(0, 0, NEXT, 1), desc(u64::MAX, 0, 0, 0)], &[]).unwrap();
    assert_eq!((shape.readable_len, shape.writable_len, shape.readable().len()), (0, 0, 0));
}

///
#[test]
fn unknown_descriptor_flags_are_ignored() {
    for bit in 3..16 {
        let flags = 1 << bit;
        let shape = walk(NONE, &[desc(BUF, 4, flags | NEXT, 1), desc(BUF + 8, 4, flags | WRITE, 0)], &[]).unwrap();
        assert_eq!((shape.readable_len, shape.writable_len), (4, 4), "flag {flags:#x}");
    }
}
