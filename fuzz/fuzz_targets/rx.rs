//! Frames from the device to a guest, end to end: buffers of any shape and frames of any kind, in rounds, through `Rx`.
//!
//! Oracle: buffers come back in order; with nothing in them those of no use, and good ones only where a frame may take
//! several. Those with something in them are whole frames: `num_buffers` says how many, all but the last are full. Each is
//! one that was sent (as it was, completed, or a segment that the kit's splitter makes of it), in the order of sending; its
//! header says nothing that was not negotiated, and nothing else than the frame does. Canaries around the buffers: nothing is written but there and in the used
//! ring. Counters balance: each frame is delivered, held, or counted once.
#![no_main]

use std::ops::Range;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::device::stage::UringPool;
use vhost_user_net::device::{Device, DeviceQueue, Io, Layer};
use vhost_user_net::metrics::PairCounters;
use vhost_user_net::net::coalesce::Coalesce;
use vhost_user_net::net::features::GuestOffloads;
use vhost_user_net::net::framing::Framing;
use vhost_user_net::net::header::SegmentLimit;
use vhost_user_net::net::rx::{Admission, Rx};
use vhost_user_net::net::{Pump, Uplink};
use vhost_user_net::virtqueue::Queue;
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net_fuzz::chain_model::{Chain, Ring, Walk, walk};
use vhost_user_net_fuzz::guest::{self, DATA, Guest, START};
use vhost_user_net_fuzz::header_model::is_mislabelled;
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::device_side::find;
use vhost_user_net_fuzz::kit::memory::GuestMemory;
use vhost_user_net_fuzz::kit::split_ring::{Desc, RingAddrs};
use vhost_user_net_fuzz::kit::tap_double::TapDouble;
use vhost_user_net_fuzz::kit::virtio::{VnetHdr, desc_flag, feature, gso};
use vhost_user_net_fuzz::scenario::{Flow, RX_FEATURES, Sent, Writer, frame, rx_needs, split};

const ADDRS: RingAddrs = RingAddrs { desc: START, avail: START + 0x800, used: START + 0xa00 };
const TABLES: u64 = START + 0x1000;
const SIZE: u16 = 128;
/// The virtio-net header and the smallest frame.
const CHAIN_MIN: usize = 12 + 60;

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

struct Scene {
    mem: &'static GuestMemory,
    features: u64,
    mergeable: bool,
    ring: Ring,
    /// What was sent and did not come yet, each as the forms that it may come in.
    expected: Vec<Vec<Vec<u8>>>,
    delivered: u64,
    /// Where the device may write, and on whose account.
    writable: Vec<(Option<u16>, Range<u64>)>,
    /// Whether buffers may lie over each other: then what is in them is nobody's business.
    is_wild: bool,
}

fn run(input: &mut Input<'_>) {
    let Guest { mem, view } = guest::fresh();
    let features = input.subset(&RX_FEATURES);
    let (mergeable, indirect) = (input.flag(), input.flag());
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
    let uplink = Uplink {
        device,
        io,
        rings: &UringPool::default(),
        coalesce: Coalesce::default(),
        framing: &Framing::Whole,
        segment_limit,
    };
    let acked = features | if mergeable { feature::MRG_RXBUF } else { 0 };
    let admission = Admission { offloads: GuestOffloads::of(acked), ..Admission::default() };
    let mut rx = Rx::new(Arc::clone(view), acked, admission, &uplink, Vec::new());
    let counters = PairCounters::default();
    let mut writer = Writer { mem, addrs: ADDRS, size: SIZE, next: 0, tables: TABLES, chains: 0 };
    let used = ADDRS.used..ADDRS.used + 6 + 8 * u64::from(SIZE);
    let mut scene = Scene {
        mem,
        features: if features & feature::GUEST_CSUM == 0 { 0 } else { features },
        mergeable,
        ring,
        expected: Vec::new(),
        delivered: 0,
        writable: vec![(None, used)],
        is_wild: false,
    };
    let (mut at, mut flow, mut sent, mut seen) = (DATA, Flow::default(), 0, 0);
    while !input.is_empty() {
        for _ in 0..input.below(16) {
            let Some(descs) = buffers(input, &mut at) else { break };
            let is_indirect = indirect && input.flag();
            if !writer.add(input, descs, is_indirect) {
                break;
            }
        }
        // A spoiled chain may run into one that was added after it.
        (seen..writer.chains).for_each(|chain| scene.posted(&writer, chain));
        for _ in 0..input.below(8) {
            let next = frame(input, &mut flow);
            if tap.try_send_raw(&next.bytes()).unwrap() {
                sent += 1;
                scene.expected.push(forms(&next));
            }
        }
        pump(&mut rx, &mut queue, &counters, device);
        seen = scene.check(&writer, seen);
    }
    let written =
        [(ADDRS.desc, 16 * u64::from(SIZE)), (ADDRS.avail, 6 + 2 * u64::from(SIZE)), (TABLES, writer.tables - TABLES)];
    let written = written.map(|(addr, len)| addr..addr + len);
    let writable: Vec<_> = scene.writable.iter().map(|(_, range)| range.clone()).chain(written).collect();
    guest::assert_canaries_but(mem, &writable);
    let count = |name: &str| counters.values().find(|(other, _)| *other == name).unwrap().1;
    assert!(scene.is_wild || count("rx_frames") == scene.delivered, "each frame that is counted arrives");
    let dropped: u64 = counters.values().filter(|(name, _)| name.starts_with("rx_drop")).map(|(_, count)| count).sum();
    let whole = count("rx_frames") - count("rx_segments") + count("rx_segmented_frames");
    let left = rx.into_held_frames().len() as u64 + waiting(device);
    assert!(whole + dropped + left >= sent, "{whole} whole, {dropped} dropped, {left} left of {sent}");
}

/// How many frames the device has not read.
fn waiting(device: &DeviceQueue) -> u64 {
    let mut bytes = [0; 1];
    let mut read = || rustix::io::read(device, &mut bytes).is_ok();
    std::iter::from_fn(|| read().then_some(())).count() as u64
}

/// Buffers side by side, with a canary between them.
fn buffers(input: &mut Input<'_>, at: &mut u64) -> Option<Vec<Desc>> {
    let descs = (0..=input.below(5)).map(|_| {
        let len = match input.u8() {
            255 => 20_000,
            len @ 200..255 => u32::from(len - 199) * 64,
            len => u32::from(len),
        };
        let desc = Desc { addr: *at, len, flags: desc_flag::WRITE, next: 0 };
        *at += u64::from(len) + 1;
        desc
    });
    let descs: Vec<_> = descs.collect();
    (*at < guest::HOLE).then_some(descs)
}

/// All that may come of a frame on its way to the guest; none where anything may.
fn forms(sent: &Sent) -> Vec<Vec<u8>> {
    let mut forms = vec![sent.frame.clone(), sent.completed()];
    if sent.header.gso_type != gso::NONE {
        match split(sent) {
            Some(parts) => forms.extend(parts),
            None => forms.clear(),
        }
    }
    forms
}

fn pump(rx: &mut Rx, queue: &mut Queue, counters: &PairCounters, device: &DeviceQueue) {
    for _ in 0..1000 {
        let end = rx.pump(queue, device, counters).unwrap();
        queue.publish();
        match end {
            Pump::Drained | Pump::NoBuffers => return,
            Pump::BudgetSpent => {}
            end => panic!("{end:?}"),
        }
    }
    panic!("the device makes no progress");
}

impl Scene {
    /// Takes note of where a chain, as it is now, lets the device write.
    fn posted(&mut self, writer: &Writer<'_>, chain: u16) {
        let (Walk::Good(found) | Walk::Long(found)) = walk(self.mem, self.ring, writer.head(chain)) else { return };
        let ranges: Vec<_> = found.writable.into_iter().map(|(addr, len)| addr..addr + u64::from(len)).collect();
        let cross = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        for (at, range) in ranges.iter().enumerate() {
            let others = self.writable.iter().filter(|(owner, _)| *owner != Some(chain)).map(|(_, other)| other);
            let mut others = others.chain(&ranges[..at]);
            self.is_wild |= range.start < DATA || others.any(|other| cross(other, range));
        }
        self.writable.extend(ranges.into_iter().map(|range| (Some(chain), range)));
    }

    /// Judges what was used since `seen`; how far that is now.
    fn check(&mut self, writer: &Writer<'_>, mut seen: u16) -> u16 {
        assert!(writer.used_idx() <= writer.chains);
        if self.is_wild {
            return writer.used_idx();
        }
        while seen < writer.used_idx() {
            let (first, len) = self.used(writer, seen);
            if len == 0 {
                let is_of_use = first.readable.is_empty() && first.writable_len() >= CHAIN_MIN;
                assert!(self.mergeable || !is_of_use, "a good buffer comes back with nothing in it");
                seen += 1;
                continue;
            }
            let header = VnetHdr::from_bytes(&first.written(self.mem)[..VnetHdr::LEN]);
            assert!(header.num_buffers > 0 && (self.mergeable || header.num_buffers == 1), "{header:?}");
            let mut bytes = Vec::new();
            for buffer in 0..header.num_buffers {
                assert!(seen < writer.used_idx(), "a frame's buffers are used together");
                let (chain, len) = self.used(writer, seen);
                assert!(len > 0 && (buffer + 1 == header.num_buffers || len == chain.writable_len()), "a gap");
                bytes.extend(&chain.written(self.mem)[..len]);
                seen += 1;
            }
            self.arrived(Sent::from_bytes(&bytes));
        }
        seen
    }

    /// A used chain and how many bytes are in it.
    fn used(&self, writer: &Writer<'_>, at: u16) -> (Chain, usize) {
        let (id, len) = writer.used(at);
        assert_eq!(id, u32::from(writer.head(at)), "in order");
        match walk(self.mem, self.ring, writer.head(at)) {
            Walk::Long(_) if len == 0 => (Chain::default(), 0),
            Walk::Good(chain) | Walk::Long(chain) => {
                assert!(len as usize <= chain.writable_len());
                assert!(len == 0 || chain.readable.is_empty(), "a chain in the wrong direction");
                (chain, len as usize)
            }
            Walk::Bad => {
                assert_eq!(len, 0, "a malformed chain is used");
                (Chain::default(), 0)
            }
        }
    }

    fn arrived(&mut self, got: Sent) {
        self.delivered += 1;
        let needs = rx_needs(&got.header).unwrap_or(u64::MAX);
        assert_eq!(needs & !self.features, 0, "{:?} is not negotiated", got.header);
        assert!(!is_mislabelled(&got.header, &got.frame), "{:?} is not of this frame", got.header);
        // What it is, maybe with its checksum left to the guest, and which of the frames before it were dropped.
        let completed = got.completed();
        let is = |forms: &Vec<Vec<u8>>| forms.is_empty() || forms.contains(&got.frame) || forms.contains(&completed);
        let at = self.expected.iter().position(is).unwrap_or_else(|| panic!("{got:x?} was not sent, or before others"));
        self.expected.drain(..at);
    }
}
