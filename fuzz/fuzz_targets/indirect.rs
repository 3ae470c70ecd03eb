//! Chains that end in an indirect table: of any length, anywhere in memory, with any descriptors in it; also tables so long
//! that one system call does not take all their buffers.
//!
//! Oracle: `chain_model`, with its bytes. A head that is refused leaves nothing behind, and the one after it is popped.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net::virtqueue::{GuestIovecs, Queue};
use vhost_user_net_fuzz::chain_model::{Ring, assert_same, walk};
use vhost_user_net_fuzz::guest::{self, DATA, Guest, HOLE, SECOND, START};
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::device_side::find;
use vhost_user_net_fuzz::kit::split_ring::{Desc, RingAddrs};
use vhost_user_net_fuzz::kit::virtio::desc_flag::{INDIRECT, NEXT, WRITE};

const ADDRS: RingAddrs = RingAddrs { desc: START, avail: START + 0x100, used: START + 0x200 };
const SIZE: u16 = 8;

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

fn run(input: &mut Input<'_>) {
    let Guest { mem, view } = guest::fresh();
    let features = RingFeatures { event_idx: false, indirect: input.below(16) != 0 };
    mem.fill(ADDRS.avail, 4, 0);
    mem.fill(ADDRS.used, 4, 0);
    let mut queue = Queue::start(find(view, SIZE, ADDRS).unwrap(), Arc::clone(view), features).unwrap();
    let mut iovecs = GuestIovecs::new(Arc::clone(view), 64);

    let table = match input.below(4) {
        0 => SECOND - u64::from(input.u8()),
        1 => HOLE - u64::from(input.u8()) * 16,
        _ => DATA + u64::from(input.u8()),
    };
    let descs = if input.flag() { long_table(input) } else { short_table(input) };
    for (at, desc) in descs.iter().enumerate().filter(|(at, _)| guest::has(table + 16 * *at as u64, 16)) {
        mem.write(table + 16 * at as u64, &desc.to_bytes());
    }
    // Up to three direct descriptors before it.
    let before = input.below(4) as u16;
    for at in 0..before {
        let desc = input.descriptor();
        let desc = Desc { flags: desc.flags & WRITE | NEXT, next: at + 1, ..desc };
        mem.write(ADDRS.desc + 16 * u64::from(at), &desc.to_bytes());
    }
    let mut head = Desc { addr: table, len: 16 * descs.len() as u32, flags: INDIRECT, next: 0 };
    match input.u8() {
        0 => head.flags |= NEXT,
        1 => head.len = input.length(),
        2 => head.addr = input.address(),
        3 => head.flags |= u16::from(input.u8()) << 3 | WRITE,
        _ => {}
    }
    mem.write(ADDRS.desc + 16 * u64::from(before), &head.to_bytes());
    let good = Desc { addr: DATA, len: 5, flags: 0, next: 0 };
    mem.write(ADDRS.desc + 16 * u64::from(SIZE - 1), &good.to_bytes());
    mem.write(ADDRS.avail + 2, &[2, 0, 0, 0, SIZE as u8 - 1, 0]);

    let ring = Ring { addrs: ADDRS, size: SIZE, indirect: features.indirect };
    for head in [0, SIZE - 1] {
        let pieces = iovecs.len();
        let popped = queue.pop(&mut iovecs).unwrap().expect("two chains");
        assert_same(walk(mem, ring, head), &popped.chain, &iovecs, mem);
        let kept = popped.chain.map_or(0, |shape| shape.readable().len() + shape.writable().len());
        assert_eq!(iovecs.len() - pieces, kept, "pieces of a chain that is refused");
        queue.push_used(popped.head, 0);
    }
}

/// A few descriptors, each following the last unless the input says otherwise.
fn short_table(input: &mut Input<'_>) -> Vec<Desc> {
    let count = input.below(64);
    let table = (0..count).map(|at| {
        let desc = input.descriptor();
        let in_order = Desc { flags: desc.flags & !(NEXT | INDIRECT), next: at as u16 + 1, ..desc };
        let more = if at + 1 < count { NEXT } else { 0 };
        if desc.flags & 0x40 == 0 { Desc { flags: in_order.flags | more, ..in_order } } else { desc }
    });
    table.collect()
}

/// About as many as there may be, beside each other or apart, empty or not.
fn long_table(input: &mut Input<'_>) -> Vec<Desc> {
    let count = 1000 + usize::from(input.u8());
    let (len, step) = (u32::from(input.u8() % 3), 1 + u64::from(input.u8() % 3));
    let (from, writable) = (input.address(), usize::from(input.u16()));
    let table = (0..count).map(|at| Desc {
        addr: from.wrapping_add(at as u64 * step),
        len,
        flags: if at + 1 < count { NEXT } else { 0 } | if at < writable { 0 } else { WRITE },
        next: at as u16 + 1,
    });
    table.collect()
}
