//! The control queue through real rings, and its effect: which frames arrive.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::backend::InProcess;
use common::driver::{CtrlDriver, NetDriver, NetDriverSpec};
use common::frames::{BROADCAST, Ends, GUEST_MAC, HOST_MAC, Mac, Stamp, test_frame, vlan};
use common::frontend::{Answer, RawFrontend, SessionSpec};
use common::memory::GuestMemory;
use common::message::Message;
use common::split_ring::{Buf, Desc, SplitRing};
use common::virtio::{VnetHdr, ctrl, desc_flag, feature, gso, net_flag};
use common::{PATIENCE, QUIET, StopOnDrop, fd_of, times, wait_readable};
use vhost_user_net::nic::NicSetup;

const CTRL_RX_EXTRA: u64 = 1 << 20;
const COMMANDS: u64 = feature::CTRL_VQ
    | feature::CTRL_RX
    | CTRL_RX_EXTRA
    | feature::CTRL_MAC_ADDR
    | feature::GUEST_ANNOUNCE
    | feature::CTRL_GUEST_OFFLOADS
    | feature::MAC
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4;

const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 9];
const OTHER_GROUP: Mac = [0x33, 0x33, 0, 0, 0, 8];
const OTHER: Mac = [0x52, 0x54, 0, 0xcc, 0, 7];

const PROMISCUOUS: u8 = 0;
const ALL_MULTICAST: u8 = 1;
const ALL_UNICAST: u8 = 2;
const NO_MULTICAST: u8 = 3;
const NO_UNICAST: u8 = 4;
const NO_BROADCAST: u8 = 5;

const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;

/// Two queue pairs, or one where the driver cannot use more, and the control queue behind them, all handed over.
struct Bench {
    front_end: RawFrontend,
    ctrl: CtrlDriver,
    pairs: Vec<NetDriver>,
    mem: Arc<GuestMemory>,
    backend: InProcess,
    features: u64,
}

/// A guest's drivers that begin anew, with buffers.
fn drivers(mem: &Arc<GuestMemory>, features: u64) -> (Vec<NetDriver>, CtrlDriver) {
    let driver = |_| NetDriver::new(mem, &NetDriverSpec { features, ..NetDriverSpec::default() });
    let count = if features & feature::MQ == 0 { 1 } else { 2 };
    let mut pairs: Vec<_> = (0..count).map(driver).collect();
    pairs.iter_mut().for_each(|pair| pair.post_rx(32, 9000));
    (pairs, CtrlDriver::new(mem, 64, features))
}

impl Bench {
    fn new(features: u64) -> Self {
        let setup = NicSetup { mac: Some(GUEST_MAC), has_control_queue: true, ..NicSetup::default() };
        let backend = InProcess::start_as(2, setup);
        let mem = Arc::new(GuestMemory::single(64 << 20));
        let features = features | feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        let (pairs, ctrl) = drivers(&mem, features);
        let front_end = RawFrontend::connect(backend.socket()).unwrap();
        let this = Self { front_end, ctrl, pairs, mem, backend, features };
        this.negotiate();
        this
    }

    fn rings(&self) -> Vec<&SplitRing> {
        self.pairs.iter().flat_map(NetDriver::rings).chain([&self.ctrl.ring]).collect()
    }

    fn negotiate(&self) {
        let session = SessionSpec::new(&self.mem, self.rings(), self.features);
        let negotiated = self.front_end.negotiate_like_cloud_hypervisor(&session).unwrap();
        assert_eq!(negotiated.features, self.features);
    }

    /// Ends the session and begins another on the same rings.
    fn reconnect(&mut self) {
        self.front_end.stream().shutdown(std::net::Shutdown::Write).unwrap();
        assert!(self.front_end.wait_closed(PATIENCE));
        self.front_end = RawFrontend::connect(self.backend.socket()).unwrap();
        self.negotiate();
    }

    /// Has rings that were stopped go on from there; before, the features are said as many times as there are additions to them.
    fn restart(&self, bases: &[u32], additions: &[u64]) {
        let ask = |message| assert_eq!(self.front_end.ask(message), Answer::Ack);
        additions.iter().for_each(|more| ask(Message::set_features(self.features | more)));
        for ((index, ring), base) in (0..).zip(self.rings()).zip(bases) {
            ask(Message::set_vring_num(index, ring.size.into()));
            ask(Message::set_vring_base(index, *base));
            ask(Message::set_vring_addr(index, ring));
            ask(Message::set_vring_call(index.into(), fd_of(&ring.call)));
            ask(Message::set_vring_kick(index.into(), fd_of(&ring.kick)));
            ask(Message::set_vring_enable(index, 1));
        }
    }

    /// Whether a frame that the device has for the second pair arrives.
    fn second_pair_is_used(&mut self) -> bool {
        self.backend.taps[1].send(&VnetHdr::default(), &frame_to(GUEST_MAC));
        self.pairs[1].recv(QUIET).is_some()
    }

    /// Has the device have a frame that is to be segmented. It is no TCP, so it cannot be cut.
    fn send_segments(&self) {
        let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
        let header = VnetHdr { gso_type: gso::TCPV4, gso_size: 500, hdr_len: 54, ..header };
        self.backend.taps[0].send(&header, &frame_to(GUEST_MAC));
    }

    /// Whether such a frame arrives whole.
    fn takes_segments(&mut self) -> bool {
        let dropped = self.backend.counter(0, "rx_drop_not_negotiated");
        self.send_segments();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.pairs[0].recv(Duration::ZERO).is_some() {
                return true;
            }
            if self.backend.counter(0, "rx_drop_not_negotiated") > dropped {
                return false;
            }
            assert!(Instant::now() < deadline, "A frame is neither delivered nor counted");
            std::thread::yield_now();
        }
    }

    fn ok(&mut self, class: u8, command: u8, data: &[u8]) {
        self.answered(ctrl::OK, class, command, data);
    }

    fn refused(&mut self, class: u8, command: u8, data: &[u8]) {
        self.answered(ctrl::ERR, class, command, data);
    }

    fn answered(&mut self, status: u8, class: u8, command: u8, data: &[u8]) {
        let start = &data[..data.len().min(32)];
        let got = self.ctrl.command(class, command, data);
        assert_eq!(got, status, "class {class}, command {command}, {} bytes: {start:x?}", data.len());
    }

    fn mode(&mut self, mode: u8, on: bool) {
        self.ok(ctrl::CLASS_RX, mode, &[on.into()]);
    }

    fn macs(&mut self, unicast: &[Mac], multicast: &[Mac]) {
        self.ok(ctrl::CLASS_MAC, MAC_TABLE_SET, &mac_table(unicast, multicast));
    }

    /// Which of these frames reach the guest; one that always does says that those before it were judged.
    fn arriving(&mut self, frames: &[Vec<u8>]) -> Vec<bool> {
        let sent = self.backend.counter(0, "rx_frames") + self.backend.counter(0, "rx_drop_filtered");
        let mut arrived = Vec::new();
        for (count, frame) in (sent + 1..).zip(frames) {
            let before = self.backend.counter(0, "rx_frames");
            self.backend.taps[0].send(&VnetHdr::default(), frame);
            let judged =
                |backend: &InProcess| backend.counter(0, "rx_frames") + backend.counter(0, "rx_drop_filtered") == count;
            let deadline = Instant::now() + PATIENCE;
            while !judged(&self.backend) {
                assert!(Instant::now() < deadline, "A frame is neither delivered nor counted");
                std::thread::yield_now();
            }
            let delivered = self.backend.counter(0, "rx_frames") > before;
            if delivered {
                assert!(self.pairs[0].recv(PATIENCE).unwrap().1 == *frame);
            }
            arrived.push(delivered);
        }
        arrived
    }

    /// Which of the usual addresses' frames arrive.
    fn addresses(&mut self) -> Vec<&'static str> {
        let named =
            [("own", GUEST_MAC), ("other", OTHER), ("group", GROUP), ("other group", OTHER_GROUP), ("all", BROADCAST)];
        let frames = named.map(|(_, mac)| frame_to(mac));
        let arrived = self.arriving(&frames);
        named.iter().zip(arrived).filter(|(_, arrived)| *arrived).map(|((name, _), _)| *name).collect()
    }
}

fn frame_to(mac: Mac) -> Vec<u8> {
    test_frame(&Ends { dst_mac: mac, src_mac: HOST_MAC, ..Ends::RX }, Stamp { stream: 2, seq: 0 }, 100)
}

fn mac_table(unicast: &[Mac], multicast: &[Mac]) -> Vec<u8> {
    let part = |macs: &[Mac]| [&(macs.len() as u32).to_le_bytes()[..], macs.as_flattened()].concat();
    [part(unicast), part(multicast)].concat()
}

/// C-03
#[test]
fn receive_modes_decide_which_frames_arrive() {
    for extra in [0, feature::EVENT_IDX, feature::INDIRECT_DESC, feature::MRG_RXBUF, feature::IN_ORDER] {
        let mut bench = Bench::new(COMMANDS | extra);
        assert_eq!(bench.addresses(), ["own", "other", "group", "other group", "all"], "promiscuous at first");
        bench.mode(PROMISCUOUS, false);
        assert_eq!(bench.addresses(), ["own", "all"]);
        bench.mode(ALL_MULTICAST, true);
        assert_eq!(bench.addresses(), ["own", "group", "other group", "all"]);
        bench.mode(ALL_UNICAST, true);
        assert_eq!(bench.addresses(), ["own", "other", "group", "other group", "all"]);
        bench.mode(NO_MULTICAST, true);
        assert_eq!(bench.addresses(), ["own", "other", "all"]);
        bench.mode(NO_UNICAST, true);
        assert_eq!(bench.addresses(), ["all"]);
        bench.mode(NO_BROADCAST, true);
        assert_eq!(bench.addresses(), [""; 0]);
        bench.mode(PROMISCUOUS, true);
        assert_eq!(bench.addresses(), ["own", "other", "group", "other group", "all"]);
        bench.refused(ctrl::CLASS_RX, 6, &[1]);
        bench.refused(ctrl::CLASS_RX, PROMISCUOUS, &[2]);
        bench.refused(ctrl::CLASS_RX, PROMISCUOUS, &[]);
        bench.refused(ctrl::CLASS_RX, PROMISCUOUS, &[0, 0]);
    }
}

/// C-03, C-05
#[test]
fn mac_table_and_address_decide_which_frames_arrive() {
    let mut bench = Bench::new(COMMANDS);
    bench.mode(PROMISCUOUS, false);
    bench.macs(&[OTHER], &[GROUP]);
    assert_eq!(bench.addresses(), ["own", "other", "group", "all"]);
    bench.macs(&[], &[OTHER_GROUP]);
    assert_eq!(bench.addresses(), ["own", "other group", "all"]);
    bench.macs(&[], &[[0x33; 6]; 65]);
    assert_eq!(bench.addresses(), ["own", "group", "other group", "all"], "more groups than are kept: all");
    bench.macs(&[[2; 6]; 65], &[]);
    assert_eq!(bench.addresses(), ["own", "other", "all"], "more addresses than are kept: all");
    bench.macs(&[[2; 6]; 100_000], &[GROUP]);
    assert_eq!(bench.addresses(), ["own", "other", "group", "all"], "many more: the groups behind them count");
    bench.macs(&[], &[]);
    bench.ok(ctrl::CLASS_MAC, MAC_ADDR_SET, &OTHER);
    assert_eq!(bench.addresses(), ["other", "all"]);
    assert_eq!(bench.front_end.get_config(0, 6).unwrap(), OTHER);
    bench.refused(ctrl::CLASS_MAC, MAC_ADDR_SET, &OTHER[..5]);
    for count in [2, u32::MAX, u32::MAX / 6 + 1, 0x8000_0000] {
        let mut table = mac_table(&[OTHER], &[]);
        table[..4].copy_from_slice(&count.to_le_bytes());
        bench.refused(ctrl::CLASS_MAC, MAC_TABLE_SET, &table);
    }
    assert_eq!(bench.addresses(), ["other", "all"], "what was refused has changed nothing");
}

/// C-03, C-06
#[test]
fn vlan_table_decides_which_tagged_frames_arrive() {
    let mut bench = Bench::new(COMMANDS | feature::CTRL_VLAN);
    let frames: Vec<_> = [None, Some(0), Some(5), Some(4095)]
        .map(|id| id.map_or(frame_to(GUEST_MAC), |id| vlan(&frame_to(GUEST_MAC), id)))
        .into();
    assert_eq!(bench.arriving(&frames), [true; 4], "promiscuous at first");
    bench.mode(PROMISCUOUS, false);
    assert_eq!(bench.arriving(&frames), [true, false, false, false], "the table is empty at first");
    bench.ok(ctrl::CLASS_VLAN, VLAN_ADD, &5_u16.to_le_bytes());
    assert_eq!(bench.arriving(&frames), [true, false, true, false]);
    bench.ok(ctrl::CLASS_VLAN, VLAN_ADD, &4095_u16.to_le_bytes());
    bench.ok(ctrl::CLASS_VLAN, VLAN_DEL, &5_u16.to_le_bytes());
    assert_eq!(bench.arriving(&frames), [true, false, false, true]);
    for id in [4096, 65_535_u16] {
        bench.refused(ctrl::CLASS_VLAN, VLAN_ADD, &id.to_le_bytes());
    }
    bench.refused(ctrl::CLASS_VLAN, VLAN_ADD, &[5]);
    bench.refused(ctrl::CLASS_VLAN, 2, &[5, 0]);
}

/// What the driver set holds for as long as it is the same driver: its rings stop and go on, as when its machine is paused.
#[test]
fn what_was_set_holds_over_a_stop_of_the_rings() {
    let mut bench = Bench::new(COMMANDS | feature::CTRL_VLAN | feature::MQ);
    bench.mode(PROMISCUOUS, false);
    bench.macs(&[OTHER], &[GROUP]);
    bench.ok(ctrl::CLASS_VLAN, VLAN_ADD, &5_u16.to_le_bytes());
    bench.ok(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[2, 0]);
    bench.ok(ctrl::CLASS_GUEST_OFFLOADS, 0, &feature::GUEST_CSUM.to_le_bytes());
    let tagged = [5, 6].map(|id| vlan(&frame_to(GUEST_MAC), id));
    // Twice, as some front-ends say the features twice; and with what is the front-end's own, in a migration.
    for additions in [&[0][..], &[0, 0], &[feature::LOG_ALL], &[feature::LOG_ALL, 0]] {
        let bases = bench.front_end.stop_like_cloud_hypervisor(5).unwrap();
        let dropped = bench.backend.counter(0, "rx_drop_not_negotiated");
        bench.send_segments();
        bench.restart(&bases, additions);
        bench.backend.wait_counter(0, "rx_drop_not_negotiated", dropped + 1);
        assert_eq!(bench.addresses(), ["own", "other", "group", "all"]);
        assert_eq!(bench.arriving(&tagged), [true, false]);
        assert!(bench.second_pair_is_used());
        assert!(!bench.takes_segments());
    }
    // A driver that begins anew has set nothing, also where its features are the same but for that.
    bench.front_end.stop_like_cloud_hypervisor(5).unwrap();
    (bench.pairs, bench.ctrl) = drivers(&bench.mem, bench.features);
    bench.restart(&[0; 5], &[feature::LOG_ALL]);
    assert_eq!(bench.addresses().len(), 5);
    assert!(!bench.second_pair_is_used());
    assert!(bench.takes_segments());
}

/// Another process, or another session, knows nothing of it: the guest may then get too much, but never too little, and
/// nothing unfinished.
#[test]
fn what_another_process_was_told_keeps_nothing_from_the_guest() {
    let mut bench = Bench::new(COMMANDS | feature::CTRL_VLAN | feature::MQ);
    bench.mode(PROMISCUOUS, false);
    bench.ok(ctrl::CLASS_GUEST_OFFLOADS, 0, &0_u64.to_le_bytes());
    bench.ok(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[2, 0]);
    bench.ok(ctrl::CLASS_MAC, MAC_ADDR_SET, &OTHER);
    bench.reconnect();
    assert_eq!(bench.addresses().len(), 5);
    assert!(!bench.takes_segments());
    bench.mode(PROMISCUOUS, false);
    assert_eq!(bench.addresses().len(), 5, "nobody knows its address and groups");
    bench.macs(&[], &[]);
    assert_eq!(bench.addresses(), ["own", "other", "all"], "nobody knows its address");
    bench.ok(ctrl::CLASS_MAC, MAC_ADDR_SET, &GUEST_MAC);
    assert_eq!(bench.addresses(), ["own", "all"]);
    assert_eq!(bench.arriving(&[5, 6].map(|id| vlan(&frame_to(GUEST_MAC), id))), [true, true]);
    bench.ok(ctrl::CLASS_VLAN, VLAN_DEL, &6_u16.to_le_bytes());
    assert_eq!(bench.arriving(&[5, 6].map(|id| vlan(&frame_to(GUEST_MAC), id))), [true, false]);
    assert!(bench.second_pair_is_used());
}

#[test]
fn without_vlan_filtering_every_tagged_frame_arrives() {
    let mut bench = Bench::new(COMMANDS);
    let frames = [vlan(&frame_to(GUEST_MAC), 5), vlan(&frame_to(GUEST_MAC), 4095)];
    bench.mode(PROMISCUOUS, false);
    assert_eq!(bench.arriving(&frames), [true, true]);
    bench.refused(ctrl::CLASS_VLAN, VLAN_ADD, &[5, 0]);
}

/// C-03, C-07, C-08
#[test]
fn queue_pairs_that_the_driver_does_not_use_get_no_frames() {
    let mut bench = Bench::new(COMMANDS | feature::MQ);
    let set = |bench: &mut Bench, pairs: u16| bench.ok(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &pairs.to_le_bytes());
    let frame = frame_to(GUEST_MAC);
    bench.backend.taps[1].send(&VnetHdr::default(), &frame);
    assert!(bench.pairs[1].recv(QUIET).is_none(), "a driver begins with one pair");
    set(&mut bench, 2);
    assert!(bench.pairs[1].recv(PATIENCE).unwrap().1 == frame);
    set(&mut bench, 1);
    bench.backend.taps[1].send(&VnetHdr::default(), &frame);
    assert!(bench.pairs[1].recv(QUIET).is_none());
    bench.backend.taps[0].send(&VnetHdr::default(), &frame);
    assert!(bench.pairs[0].recv(PATIENCE).unwrap().1 == frame);
    for pairs in [0, 3, 0x8000, 0xffff_u16] {
        bench.refused(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &pairs.to_le_bytes());
    }
    bench.refused(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[1]);
    bench.refused(ctrl::CLASS_MQ, 1, &[1, 0]);
}

/// They were read when the driver used the pair, and are old once it does so again.
#[test]
fn frames_that_wait_for_buffers_of_a_pair_that_falls_out_of_use_are_dropped() {
    let mut bench = Bench::new(COMMANDS | feature::MQ | feature::MRG_RXBUF);
    let set = |bench: &mut Bench, pairs: u8| bench.ok(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[pairs, 0]);
    let large = |seq| test_frame(&Ends::RX, Stamp { stream: 2, seq }, 60_000);
    let send = |bench: &Bench, seq| bench.backend.taps[1].send(&VnetHdr::default(), &large(seq));
    set(&mut bench, 2);
    // In its 32 buffers of 9000 bytes there is room for four.
    (0..4).for_each(|seq| send(&bench, seq));
    bench.backend.wait_counter(1, "rx_frames", 4);
    let held = bench.backend.counter(1, "rx_held");
    send(&bench, 4);
    bench.backend.wait_counter(1, "rx_held", held + 1);
    set(&mut bench, 1);
    assert_eq!(bench.backend.counter(1, "rx_drop_disabled"), 1);
    set(&mut bench, 2);
    // The buffers that were too few for that frame are enough for another one, without a kick.
    bench.backend.taps[1].send(&VnetHdr::default(), &frame_to(GUEST_MAC));
    bench.backend.wait_counter(1, "rx_frames", 5);
    (0..4).for_each(|seq| assert!(bench.pairs[1].recv(PATIENCE).unwrap().1 == large(seq)));
    assert!(bench.pairs[1].recv(PATIENCE).unwrap().1 == frame_to(GUEST_MAC));
    send(&bench, 5);
    assert!(bench.pairs[1].recv(PATIENCE).unwrap().1 == large(5));
}

/// C-10
#[test]
fn guest_offloads_decide_which_unfinished_frames_arrive() {
    let mut bench = Bench::new(COMMANDS);
    let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let segmented = VnetHdr { gso_type: gso::TCPV4, gso_size: 500, hdr_len: 54, ..header };
    let set = |bits: u64| (ctrl::CLASS_GUEST_OFFLOADS, ctrl::GUEST_OFFLOADS_SET, bits.to_le_bytes());
    let mut dropped = 0;
    for (offloads, [partial, segment]) in [
        (feature::GUEST_CSUM, [true, false]),
        (0, [false, false]),
        (feature::GUEST_TSO4, [false, false]),
        (feature::GUEST_CSUM | feature::GUEST_TSO4, [true, true]),
    ] {
        // A frame that is no TCP cannot be cut for a guest that does not take it whole; a checksum can be completed.
        let (class, command, data) = set(offloads);
        bench.ok(class, command, &data);
        for (header, passes) in [(header, partial), (segmented, segment)] {
            bench.backend.taps[0].send(&header, &frame_to(GUEST_MAC));
            if passes || header.gso_type == gso::NONE {
                let (got, _) = bench.pairs[0].recv(PATIENCE).unwrap();
                assert_eq!((got.gso_type, got.flags != 0), (header.gso_type, passes));
            } else {
                dropped += 1;
                bench.backend.wait_counter(0, "rx_drop_not_negotiated", dropped);
            }
        }
    }
    for offloads in [feature::GUEST_TSO6, 1 << 63, u64::MAX] {
        let (class, command, data) = set(offloads);
        bench.refused(class, command, &data);
    }
}

/// C-09
#[test]
fn announcement_is_acknowledged() {
    let mut bench = Bench::new(COMMANDS);
    bench.ok(ctrl::CLASS_ANNOUNCE, 0, &[]);
    bench.refused(ctrl::CLASS_ANNOUNCE, 1, &[]);
    bench.refused(ctrl::CLASS_ANNOUNCE, 0, &[0]);
}

/// C-02, C-03
#[test]
fn unknown_or_oversized_command_is_refused() {
    let mut bench = Bench::new(COMMANDS | feature::MQ);
    for class in 6..=255 {
        bench.refused(class, 0, &[1]);
    }
    bench.refused(ctrl::CLASS_MAC, MAC_TABLE_SET, &mac_table(&[[2; 6]; 175_000], &[]));
    bench.mode(PROMISCUOUS, true);
}

/// C-02
#[test]
fn commands_without_their_feature_are_refused() {
    let mut bench = Bench::new(feature::CTRL_VQ);
    bench.refused(ctrl::CLASS_RX, PROMISCUOUS, &[0]);
    bench.refused(ctrl::CLASS_MAC, MAC_TABLE_SET, &mac_table(&[], &[]));
    bench.refused(ctrl::CLASS_MAC, MAC_ADDR_SET, &OTHER);
    bench.refused(ctrl::CLASS_VLAN, VLAN_ADD, &[5, 0]);
    bench.refused(ctrl::CLASS_ANNOUNCE, 0, &[]);
    bench.refused(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[1, 0]);
    bench.refused(ctrl::CLASS_GUEST_OFFLOADS, ctrl::GUEST_OFFLOADS_SET, &[0; 8]);
    assert_eq!(bench.addresses().len(), 5);
}

/// C-04
#[test]
fn command_split_byte_by_byte_is_put_together() {
    let mut bench = Bench::new(COMMANDS);
    bench.mode(PROMISCUOUS, false);
    let command = [&[ctrl::CLASS_MAC, MAC_TABLE_SET][..], &mac_table(&[OTHER], &[GROUP])].concat();
    let place = |byte: &u8| {
        let addr = bench.mem.alloc(1, 2);
        bench.mem.write(addr, &[*byte]);
        Buf::readable(addr, 1)
    };
    let mut bufs: Vec<_> = command.iter().map(place).collect();
    let status = bench.mem.alloc(4, 1);
    bench.mem.fill(status, 4, 0xee);
    bufs.push(Buf::writable(status, 4));
    let head = bench.ctrl.ring.add(&bufs);
    bench.ctrl.ring.publish_and_kick();
    assert_eq!(bench.ctrl.ring.wait_used(PATIENCE), Some((head, 1)));
    assert_eq!(bench.mem.read(status, 4), [ctrl::OK, 0xee, 0xee, 0xee]);
    assert_eq!(bench.addresses(), ["own", "other", "group", "all"]);
}

/// C-01, C-12
#[test]
fn chain_without_room_for_a_status_or_malformed_is_returned_without_effect() {
    let mut bench = Bench::new(COMMANDS);
    let data = bench.mem.alloc(16, 1);
    bench.mem.write(data, &[ctrl::CLASS_RX, PROMISCUOUS, 0]);
    let [first, second] = bench.ctrl.ring.take_free(2).unwrap()[..] else { unreachable!() };
    let desc = |addr, len, flags, next| Desc { addr, len, flags, next };
    let (next, write) = (desc_flag::NEXT, desc_flag::WRITE);
    for (what, descs) in [
        ("C-01 no status byte", [desc(data, 3, 0, 0), Desc::default()]),
        ("C-01 status read-only", [desc(data, 3, next, second), desc(data + 8, 1, 0, 0)]),
        ("empty status", [desc(data, 3, next, second), desc(data + 8, 0, write, 0)]),
        ("status outside memory", [desc(data, 3, next, second), desc(0, 1, write, 0)]),
        ("next out of the table", [desc(data, 3, next, 999), Desc::default()]),
        ("loop", [desc(data, 3, next, second), desc(data, 3, next, first)]),
        ("readable behind writable", [desc(data + 8, 1, write | next, second), desc(data, 3, 0, 0)]),
        ("indirect, not negotiated", [desc(data, 16, desc_flag::INDIRECT, 0), Desc::default()]),
    ] {
        bench.ctrl.ring.write_desc(first, descs[0]);
        bench.ctrl.ring.write_desc(second, descs[1]);
        bench.ctrl.ring.offer(first);
        bench.ctrl.ring.publish_and_kick();
        assert_eq!(bench.ctrl.ring.wait_used(PATIENCE), Some((first, 0)), "{what}");
        assert_eq!(bench.addresses().len(), 5, "{what}");
    }
    // A status alone is a command without class and code.
    bench.mem.fill(data + 8, 1, 0xee);
    bench.ctrl.ring.write_desc(first, desc(data + 8, 1, write, 0));
    bench.ctrl.ring.offer(first);
    bench.ctrl.ring.publish_and_kick();
    assert_eq!(bench.ctrl.ring.wait_used(PATIENCE), Some((first, 1)));
    assert_eq!(bench.mem.read(data + 8, 1), [ctrl::ERR]);
    bench.mode(PROMISCUOUS, false);
    assert_eq!(bench.addresses(), ["own", "all"]);
}

/// C-12
#[test]
fn broken_control_ring_is_reported_and_frames_go_on() {
    let mut bench = Bench::new(COMMANDS | feature::MQ);
    bench.front_end.tell(&Message::set_vring_err(4, fd_of(&bench.ctrl.ring.err)));
    assert!(bench.front_end.is_alive());
    bench.ctrl.ring.write_avail_idx(9999);
    bench.ctrl.ring.kick();
    assert!(wait_readable(fd_of(&bench.ctrl.ring.err), PATIENCE));
    assert_eq!(bench.addresses().len(), 5);
}

/// C-12: what cannot be returned parks the ring, here as on any other; it can be stopped at once, and starts again.
#[test]
fn control_ring_with_an_impossible_head_or_index_is_parked_and_heals() {
    for (what, spoil) in [
        ("head", (|ring| ring.put_avail(64)) as fn(&mut SplitRing)),
        ("last head", |ring| ring.put_avail(0xffff)),
        ("index back", |ring| ring.write_avail_idx(ring.used_idx().wrapping_sub(1))),
        ("index too large", |ring| ring.write_avail_idx(ring.used_idx().wrapping_add(65))),
    ] {
        let mut bench = Bench::new(COMMANDS | feature::MQ);
        let err = Message::set_vring_err(4, fd_of(&bench.ctrl.ring.err));
        assert!(bench.front_end.tell(&err) && bench.front_end.is_alive());
        bench.mode(PROMISCUOUS, false);
        let ring = &mut bench.ctrl.ring;
        spoil(ring);
        if what.ends_with("head") {
            ring.publish();
        }
        ring.kick();
        assert!(wait_readable(fd_of(&ring.err), PATIENCE), "{what}");
        assert_eq!(bench.addresses(), ["own", "all"], "{what}");
        assert!(bench.front_end.get_vring_base(4).is_ok(), "{what}");
        let ring = &mut bench.ctrl.ring;
        ring.reset();
        for message in [
            Message::set_vring_num(4, ring.size.into()),
            Message::set_vring_addr(4, ring),
            Message::set_vring_call(4, fd_of(&ring.call)),
            Message::set_vring_kick(4, fd_of(&ring.kick)),
        ] {
            assert_eq!(bench.front_end.ask(message), Answer::Ack, "{what}");
        }
        bench.mode(PROMISCUOUS, true);
        assert_eq!(bench.addresses().len(), 5, "{what}");
    }
}

/// C-11
#[test]
fn commands_without_end_are_answered_and_frames_pass_meanwhile() {
    let mut bench = Bench::new(COMMANDS | feature::MQ);
    let frame = frame_to(GUEST_MAC);
    for count in 0..times(5000, 100_000) {
        match count % 4 {
            0 => bench.mode(PROMISCUOUS, count % 8 == 0),
            1 => bench.macs(&[OTHER], &[GROUP; 40]),
            2 => bench.ok(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[1 + (count / 4 % 2) as u8, 0]),
            _ => bench.refused(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[0, 0]),
        }
        if count % 50 == 0 {
            bench.pairs[0].send(&VnetHdr::default(), &frame);
            assert!(bench.backend.taps[0].recv(PATIENCE).is_some_and(|(_, got)| got == frame));
            bench.backend.taps[0].send(&VnetHdr::default(), &frame);
            assert!(bench.pairs[0].recv(PATIENCE).is_some_and(|(_, got)| got == frame));
        }
    }
    assert!(bench.front_end.is_alive());
}

/// T-06: whatever is read, there is an answer, and the next command that is left alone is carried out.
#[test]
fn command_rewritten_while_it_is_read_does_no_harm() {
    let mut bench = Bench::new(COMMANDS);
    let table = mac_table(&[OTHER; 3], &[GROUP; 3]);
    let command = [&[ctrl::CLASS_MAC, MAC_TABLE_SET][..], &table].concat();
    let addr = bench.mem.alloc(command.len(), 8);
    let status = bench.mem.alloc(1, 1);
    let stop = AtomicBool::new(false);
    let (mem, done) = (Arc::clone(&bench.mem), &stop);
    let mut statuses = [0; 256];
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let counts = [3, 0, u32::MAX, 0x2aaa_aaab, 65, 2];
            for count in counts.into_iter().cycle() {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                mem.write(addr + 2, &count.to_le_bytes());
                mem.write(addr, &[(count % 7) as u8, (count % 3) as u8]);
                mem.write(addr, &command);
            }
        });
        let _stop = StopOnDrop(&stop);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(300) || (statuses[0] == 0 && begin.elapsed() < PATIENCE) {
            bench.mem.write(status, &[0xee]);
            bench.ctrl.ring.add(&[Buf::readable(addr, 2 + table.len()), Buf::writable(status, 1)]);
            bench.ctrl.ring.publish_and_kick();
            if bench.ctrl.ring.wait_used(PATIENCE).is_none() {
                break;
            }
            statuses[usize::from(bench.mem.read(status, 1)[0])] += 1;
        }
    });
    let [ok, err] = [ctrl::OK, ctrl::ERR].map(|status| statuses[usize::from(status)]);
    common::say(&format!("{ok} commands were carried out, {err} refused"));
    assert!(ok > 0 && statuses.iter().sum::<u32>() == ok + err, "An answer that is none");
    bench.mode(PROMISCUOUS, false);
    bench.macs(&[], &[]);
    assert_eq!(bench.addresses(), ["own", "all"]);
}
