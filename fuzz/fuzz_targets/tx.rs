//! Frames from a guest to the device, end to end: chains of any shape, in rounds, through `Tx` to a socket pair.
//!
//! Oracle: models of chain and header (`chain_model`, `header_model`) tell which frames must arrive, with which header.
//! Those arrive, byte for byte, in order, and no others; one that was merged, cut again by the kit's splitter, gives the
//! guest's frames. Every chain comes back, in order, with nothing written, and the counters balance.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::device::stage::UringPool;
use vhost_user_net::device::{Device, Io, Layer};
use vhost_user_net::metrics::PairCounters;
use vhost_user_net::net::coalesce::Coalesce;
use vhost_user_net::net::framing::Framing;
use vhost_user_net::net::header::SegmentLimit;
use vhost_user_net::net::tx::Tx;
use vhost_user_net::net::{Pump, Uplink};
use vhost_user_net::virtqueue::Queue;
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net_fuzz::chain_model::{Ring, Walk, walk};
use vhost_user_net_fuzz::guest::{self, DATA, Guest, START};
use vhost_user_net_fuzz::header_model;
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::device_side::find;
use vhost_user_net_fuzz::kit::split;
use vhost_user_net_fuzz::kit::split_ring::RingAddrs;
use vhost_user_net_fuzz::kit::tap_double::TapDouble;
use vhost_user_net_fuzz::scenario::{Flow, Sent, TX_FEATURES, Writer, cut, frame};

const ADDRS: RingAddrs = RingAddrs { desc: START, avail: START + 0x1000, used: START + 0x1800 };
const TABLES: u64 = START + 0x2000;
const SIZE: u16 = 128;

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

fn run(input: &mut Input<'_>) {
    let Guest { mem, view } = guest::fresh();
    let features = input.subset(&TX_FEATURES);
    let indirect = input.flag();
    let coalesce = Coalesce { tcp: input.flag(), udp: input.flag() };
    let io = if input.below(16) == 15 { Io::Auto } else { Io::Syscall };
    let ring = Ring { addrs: ADDRS, size: SIZE, indirect };
    let (tap, fd) = TapDouble::new();
    let (_, queues) = Device::from_sockets(vec![fd], Layer::Ethernet).unwrap();
    let device = &queues[0];
    mem.fill(ADDRS.avail, 4, 0);
    mem.fill(ADDRS.used, 4, 0);
    let found = find(view, SIZE, ADDRS).unwrap();
    let mut queue = Queue::start(found, Arc::clone(view), RingFeatures { event_idx: false, indirect }).unwrap();
    let segment_limit = SegmentLimit::LARGEST;
    let uplink = Uplink { device, io, rings: &UringPool::default(), coalesce, framing: &Framing::Whole, segment_limit };
    let mut tx = Tx::new(Arc::clone(view), features, &uplink);
    let counters = PairCounters::default();
    let mut writer = Writer { mem, addrs: ADDRS, size: SIZE, next: 0, tables: TABLES, chains: 0 };
    let (mut done, mut flow) = (0, Flow::default());
    while !input.is_empty() {
        let mut at = DATA + u64::from(input.u8());
        let mut is_clear = true;
        for _ in 0..=input.below(24) {
            let sent = frame(input, &mut flow).bytes();
            if at + sent.len() as u64 > guest::HOLE {
                break;
            }
            mem.write(at, &sent);
            let descs = cut(input, at, sent.len(), 0);
            let is_indirect = indirect && input.flag();
            if !writer.add(input, descs, is_indirect) {
                break;
            }
            at += sent.len() as u64 + u64::from(input.u8() & 1);
        }
        let expected = (done..writer.chains).map(|chain| match walk(mem, ring, writer.head(chain)) {
            Walk::Good(chain) | Walk::Long(chain) if chain.writable.is_empty() => {
                // What the device writes while it works is another thing to read than what was there.
                let used = ADDRS.used..ADDRS.used + 6 + 8 * u64::from(SIZE);
                is_clear &=
                    chain.readable.iter().all(|(at, len)| *at >= used.end || at + u64::from(*len) <= used.start);
                let len = chain.readable_len();
                if !(26..=12 + header_model::FRAME_MAX).contains(&len) {
                    return None;
                }
                let mut sent = Sent::from_bytes(&chain.bytes(mem));
                let start = &sent.frame[..sent.frame.len().min(header_model::START)];
                sent.header = header_model::check(features, sent.header, sent.frame.len(), start)?;
                Some(sent)
            }
            _ => None,
        });
        let expected: Vec<Sent> = expected.collect::<Vec<_>>().into_iter().flatten().collect();
        let arrived = pump(&mut tx, &mut queue, &counters, device, &tap);
        assert_eq!(writer.used_idx(), writer.chains, "every chain comes back");
        for chain in done..writer.chains {
            assert_eq!(writer.used(chain), (writer.head(chain).into(), 0));
        }
        done = writer.chains;
        if is_clear {
            compare(&arrived, &expected, coalesce);
        }
    }
    let is_event = |name: &str| name.starts_with("tx_drop") || name == "tx_frames";
    let counted: u64 = counters.values().filter(|(name, _)| is_event(name)).map(|(_, count)| count).sum();
    assert_eq!(counted, u64::from(done), "each frame is sent or counted");
}

/// Lets the device work until nothing is left; what arrived.
fn pump(
    tx: &mut Tx,
    queue: &mut Queue,
    counters: &PairCounters,
    device: &vhost_user_net::device::DeviceQueue,
    tap: &TapDouble,
) -> Vec<Sent> {
    let mut arrived = Vec::new();
    for _ in 0..100 {
        let end = tx.pump(queue, device, counters).unwrap();
        queue.publish();
        while let Some(bytes) = tap.recv_raw(Duration::ZERO) {
            arrived.push(Sent::from_bytes(&bytes));
        }
        match end {
            Pump::Drained => return arrived,
            Pump::BudgetSpent | Pump::DeviceBlocked => {}
            end => panic!("{end:?}"),
        }
    }
    panic!("the device makes no progress");
}

fn compare(arrived: &[Sent], expected: &[Sent], coalesce: Coalesce) {
    let mut left = expected;
    for sent in arrived {
        if left.first() == Some(sent) {
            left = &left[1..];
            continue;
        }
        assert!(coalesce.tcp || coalesce.udp, "{sent:x?} arrived in place of {:x?}", left.first());
        let parts = split::split(&sent.header, &sent.frame).unwrap_or_else(|why| panic!("{why} in {sent:x?}"));
        assert!(parts.len() > 1 && parts.len() <= left.len(), "{} parts of {} frames", parts.len(), left.len());
        for (part, guest) in parts.iter().zip(left) {
            split::same(part, &guest.completed(), true).unwrap();
        }
        left = &left[parts.len()..];
    }
    assert!(left.is_empty(), "{} frames did not arrive: {:x?}", left.len(), left[0]);
}
