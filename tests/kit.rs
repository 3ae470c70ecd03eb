//! The test kit proved: its parts one by one, and whole sessions against the reference back-end.
//!
//! What passes here is known of the kit, so that a failure elsewhere is the library's.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::crate_frontend::CrateFrontend;
use common::driver::{CtrlDriver, NetDriver, NetDriverSpec};
use common::frames::{self, Checker, Ends, L4Csum, Stamp};
use common::frontend::{Answer, RawFrontend, Refusal, SessionSpec};
use common::memory::{GuestMemory, RegionSpec};
use common::message::{Message, request};
use common::netns::{NetNs, PacketSocket, TapSpec, require_root};
use common::qemu_shim::QemuShim;
use common::qtest::{self, Qemu, QemuSpec, QtestDriver, require_qemu};
use common::recorder::{Recorded, Recorder};
use common::reference::ReferenceDaemon;
use common::split_ring::{Buf, SplitRing, need_event};
use common::tap_double::TapDouble;
use common::virtio::{VnetHdr, ctrl, feature, gso, net_flag};
use common::{PATIENCE, QUIET, fd_of, skip, wait_readable};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// The feature sets over which the scenarios run.
const FEATURE_SETS: [u64; 5] = [
    0,
    feature::MRG_RXBUF,
    feature::EVENT_IDX,
    feature::INDIRECT_DESC,
    feature::MRG_RXBUF | feature::EVENT_IDX | feature::INDIRECT_DESC,
];

/// A reference daemon with its TAP double, and a guest in front of it.
struct Bench {
    // Dropped in this order: the front-end ends its session before the daemon is waited for.
    session: Option<CrateFrontend>,
    daemon: ReferenceDaemon,
    tap: TapDouble,
    mem: Arc<GuestMemory>,
    driver: NetDriver,
    socket: PathBuf,
    _dir: TempDir,
}

impl Bench {
    fn new(features: u64, start_index: u16) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("vhost.sock");
        let (tap, device) = TapDouble::new();
        let daemon = ReferenceDaemon::start(&socket, device);
        let mem = Arc::new(GuestMemory::single(64 * MIB));
        let spec = NetDriverSpec {
            features: features | feature::VERSION_1,
            start_index,
            tolerate_partial_frames: true,
            ..NetDriverSpec::default()
        };
        Self { session: None, driver: NetDriver::new(&mem, &spec), daemon, tap, mem, socket, _dir: dir }
    }

    /// With a session in cloud-hypervisor's order, through the crate that it uses.
    fn started(features: u64, start_index: u16) -> Self {
        let mut bench = Self::new(features, start_index);
        let session = CrateFrontend::start(&bench.socket, &bench.session_spec(features)).unwrap();
        bench.session = Some(session);
        bench
    }

    fn session_spec(&self, features: u64) -> SessionSpec<'_> {
        SessionSpec::new(&self.mem, self.driver.rings().to_vec(), features)
    }

    fn connect(&self) -> RawFrontend {
        RawFrontend::connect(&self.socket).unwrap()
    }

    /// Sends `count` frames of `len` bytes from the guest and checks that the TAP got them.
    fn assert_tx_works(&mut self, stream: u16, count: u32, len: usize) {
        let mut checker = Checker::new(stream);
        for seq in 0..count {
            let frame = frames::test_frame(&Ends::TX, Stamp { stream, seq }, len);
            self.driver.send(&VnetHdr::default(), &frame);
            let (_, frame) = self.tap.recv(PATIENCE).expect("a frame on the TAP");
            checker.see(&frame);
        }
        checker.assert_perfect(count);
    }

    /// Sends `count` frames of `len` bytes to the guest and checks that it got them.
    fn assert_rx_works(&mut self, stream: u16, count: u32, len: usize) {
        let mut checker = Checker::new(stream);
        for seq in 0..count {
            let frame = frames::test_frame(&Ends::RX, Stamp { stream, seq }, len);
            self.tap.send(&VnetHdr::default(), &frame);
            let (_, frame) = self.driver.recv(PATIENCE).expect("a frame in the guest");
            checker.see(&frame);
        }
        checker.assert_perfect(count);
    }
}

// Sessions against the reference back-end.

#[test]
fn frames_of_all_sizes_reach_the_tap_in_order() {
    for features in FEATURE_SETS {
        let mut bench = Bench::started(features, 0);
        let mut checker = Checker::new(1);
        let sizes = [60, 64, 590, 1514, 9014, 65_549];
        for (seq, len) in (0..).zip(sizes) {
            let stamp = Stamp { stream: 1, seq };
            let sent = frames::test_frame(&Ends::TX, stamp, len);

            bench.driver.send(&VnetHdr::default(), &sent);

            let (_, got) = bench.tap.recv(PATIENCE).expect("a frame on the TAP");
            assert_eq!(got, sent, "{len} bytes with features {features:#x}");
            checker.see(&got);
        }
        checker.assert_perfect(sizes.len() as u32);
        assert!(bench.driver.wait_tx_done(PATIENCE));
        assert_eq!(bench.driver.tx.out_of_order(), 0);
    }
}

#[test]
fn frames_of_all_sizes_reach_the_guest_in_order() {
    for features in FEATURE_SETS {
        let mut bench = Bench::started(features, 0);
        let mergeable = features & feature::MRG_RXBUF != 0;
        if mergeable {
            bench.driver.post_rx(128, 1536);
        } else {
            bench.driver.post_rx_chains(16, &[4096, 66_000 - 4096]);
        }
        for (seq, len) in (0..).zip([60, 64, 590, 1514, 9014, 65_549]) {
            let stamp = Stamp { stream: 2, seq };
            let sent = frames::test_frame(&Ends::RX, stamp, len);

            bench.tap.send(&VnetHdr::default(), &sent);

            let got = bench.driver.recv_detailed(PATIENCE).expect("a frame in the guest");
            assert_eq!(got.frame, sent, "{len} bytes with features {features:#x}");
            let buffers = if mergeable { (len + VnetHdr::LEN).div_ceil(1536) } else { 1 };
            assert_eq!(got.lens.len(), buffers);
        }
    }
}

#[test]
fn headers_pass_unchanged_both_ways() {
    let header = VnetHdr {
        flags: net_flag::NEEDS_CSUM,
        gso_type: gso::TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    let mut bench = Bench::started(0, 0);
    bench.driver.post_rx(4, 4096);
    let frame = frames::test_frame(&Ends::TX, Stamp { stream: 1, seq: 0 }, 100);

    bench.driver.send(&header, &frame);
    let (sent, _) = bench.tap.recv(PATIENCE).unwrap();
    bench.tap.send(&header, &frame);
    let (got, _) = bench.driver.recv(PATIENCE).unwrap();

    assert_eq!(sent, header);
    assert_eq!(got, VnetHdr { num_buffers: 1, ..header });
}

#[test]
fn rings_that_pass_65535_lose_nothing() {
    for features in FEATURE_SETS {
        let mut bench = Bench::started(features, 65_530);
        bench.driver.post_rx(64, 2048);

        bench.assert_tx_works(1, 600, 80);
        bench.assert_rx_works(2, 600, 80);

        assert!(bench.driver.tx.avail_idx() < 65_530);
        assert!(bench.driver.rx.last_used() < 65_530);
    }
}

#[test]
fn a_flood_larger_than_the_ring_arrives_whole() {
    let mut bench = Bench::started(feature::EVENT_IDX, 0);
    let mut checker = Checker::new(1);
    const COUNT: u32 = 5000;
    let tap = &bench.tap;
    let driver = &mut bench.driver;

    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seq in 0..COUNT {
                let frame = frames::test_frame(&Ends::TX, Stamp { stream: 1, seq }, 200);
                driver.queue(&VnetHdr::default(), &frame);
                driver.tx.publish_and_kick();
            }
            assert!(driver.wait_tx_done(PATIENCE));
        });
        for _ in 0..COUNT {
            let (_, frame) = tap.recv(PATIENCE).expect("a frame on the TAP");
            checker.see(&frame);
        }
    });

    checker.assert_perfect(COUNT);
}

#[test]
fn a_chain_cut_anywhere_arrives_as_one_frame() {
    let mut bench = Bench::started(0, 0);
    let frame = frames::test_frame(&Ends::TX, Stamp { stream: 1, seq: 0 }, 100);
    let bytes = [&VnetHdr::default().to_bytes()[..], &frame].concat();
    let single_bytes = [1; VnetHdr::LEN];
    for cuts in [&[][..], &[1], &[11], &[12], &[13, 40], &single_bytes] {
        bench.driver.queue_split(&bytes, cuts);
        bench.driver.tx.publish_and_kick();

        let (_, got) = bench.tap.recv(PATIENCE).expect("a frame on the TAP");
        assert_eq!(got, frame, "cut at {cuts:?}");
    }
}

#[test]
fn a_full_tap_delays_frames_and_loses_none() {
    let mut bench = Bench::started(feature::EVENT_IDX, 0);
    let fillers = bench.tap.fill();
    let mut checker = Checker::new(1);
    for seq in 0..10 {
        let frame = frames::test_frame(&Ends::TX, Stamp { stream: 1, seq }, 200);
        bench.driver.send(&VnetHdr::default(), &frame);
    }
    assert!(!bench.driver.wait_tx_done(QUIET));

    let early = bench.tap.drain_fillers(fillers);
    for _ in early.len()..10 {
        checker.see(&bench.tap.recv(PATIENCE).expect("a delayed frame").1);
    }

    assert!(early.is_empty(), "The TAP was not full");
    checker.assert_perfect(10);
    assert!(bench.driver.wait_tx_done(PATIENCE));
}

#[test]
fn a_session_stops_with_the_bases_that_the_rings_have_reached() {
    let mut bench = Bench::started(0, 100);
    bench.driver.post_rx(16, 2048);
    bench.assert_tx_works(1, 5, 60);
    bench.assert_rx_works(2, 3, 60);

    let bases = bench.session.as_mut().unwrap().stop().unwrap();

    assert_eq!(bases, [103, 105]);
}

#[test]
fn raw_front_end_in_cloud_hypervisors_order_starts_a_session() {
    let features = feature::MRG_RXBUF | feature::EVENT_IDX;
    let mut bench = Bench::new(features, 0);
    let front_end = bench.connect();

    let negotiated = front_end.negotiate_like_cloud_hypervisor(&bench.session_spec(features)).unwrap();

    assert_eq!(negotiated.queue_num, Some(2));
    bench.driver.post_rx(8, 2048);
    bench.assert_tx_works(1, 20, 60);
    bench.assert_rx_works(2, 20, 60);
    assert_eq!(front_end.stop_like_cloud_hypervisor(2), Ok(vec![20, 20]));
    assert!(front_end.is_alive());
    front_end.disconnect();
}

#[test]
fn memory_in_several_files_and_regions_reaches_the_back_end() {
    let mut bench = Bench::new(0, 0);
    bench.mem = Arc::new(GuestMemory::new(&[
        RegionSpec::new(0, MIB),
        RegionSpec::new(MIB as u64, MIB).in_file(0, MIB as u64),
        RegionSpec::new(0x1_0000_0000, 16 * MIB).in_file(1, 4096).at_user(0x5555_0000_0000),
    ]));
    let spec = NetDriverSpec { queue_size: 16, ..NetDriverSpec::default() };
    // Rings low, buffers over the border of the first two regions.
    bench.driver = NetDriver::new(&bench.mem, &spec);
    bench.mem.alloc(MIB - 64 * 1024, 1);
    let front_end = bench.connect();
    front_end.negotiate_like_cloud_hypervisor(&bench.session_spec(0)).unwrap();
    let ends = Ends::TX;
    let frame = frames::test_frame(&ends, Stamp { stream: 1, seq: 0 }, 4000);
    let addr = MIB as u64 - 2000;
    bench.mem.write(addr, &VnetHdr::default().to_bytes());
    bench.mem.write(addr + VnetHdr::LEN as u64, &frame);

    let whole = Buf::readable(addr, VnetHdr::LEN + frame.len());
    bench.driver.tx.add(&[whole]);
    bench.driver.tx.publish_and_kick();

    let (_, got) = bench.tap.recv(PATIENCE).expect("a frame on the TAP");
    assert_eq!(got, frame);
    front_end.disconnect();
}

#[test]
fn refusals_show_as_nack_and_closed() {
    let bench = Bench::new(0, 0);
    let front_end = bench.connect();
    front_end.negotiate_like_cloud_hypervisor(&bench.session_spec(0)).unwrap();

    assert_eq!(front_end.ask(Message::set_vring_base(1, 7)), Answer::Ack);
    assert!(matches!(front_end.ask(Message::set_vring_num(99, 256)), Answer::Nack(_)));
    let unknown = Message::new(4242, vec![1, 2, 3, 4]);
    assert_eq!(front_end.ask(unknown), Answer::Closed);
}

#[test]
fn qemus_order_is_beyond_the_reference() {
    let bench = Bench::new(0, 0);
    let front_end = bench.connect();

    let refused = front_end.negotiate_like_qemu(&bench.session_spec(0));

    assert_eq!(refused, Err(Refusal { request: request::SET_VRING_ENABLE, answer: Answer::Closed }));
}

#[test]
fn reference_serves_one_connection_after_another() {
    let mut bench = Bench::new(0, 0);
    for stream in 0..3 {
        let front_end = bench.connect();
        front_end.negotiate_like_cloud_hypervisor(&bench.session_spec(0)).unwrap();
        bench.assert_tx_works(stream, 3, 60);
        // Else the old session's worker may still look at the rings below.
        front_end.stop_like_cloud_hypervisor(2).unwrap();
        front_end.disconnect();
        // The next session's rings begin anew, as after a guest's reboot.
        bench.driver.tx.reset();
        bench.driver.rx.reset();
    }
    assert!(bench.daemon.endings().len() >= 2);
}

// A real front-end.

#[test]
fn qemu_front_end_moves_frames_both_ways() {
    const TEST: &str = "qemu_front_end_moves_frames_both_ways";
    if !require_qemu(TEST) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("vhost.sock");
    let (tap, device) = TapDouble::new();
    let behind = dir.path().join("reference.sock");
    let _daemon = ReferenceDaemon::start(&behind, device);
    let _shim = QemuShim::start(&socket, &behind);
    let qemu = Qemu::start(&QemuSpec::new(&socket));
    let mut driver = QtestDriver::new(qemu, |offered| offered & feature::MRG_RXBUF);
    assert!(driver.features_ok);
    driver.set_up_queues(2);
    let buffers = qtest::BUFFERS;
    for head in 0..8 {
        let addr = buffers + 2048 * u64::from(head);
        driver.add(0, head, &[Buf::writable(addr, 2048)]);
    }
    driver.driver_ok();
    driver.kick(0);

    let sent = frames::test_frame(&Ends::TX, Stamp { stream: 1, seq: 0 }, 200);
    let at = buffers + 0x10_0000;
    driver.qemu.write(at, &VnetHdr::default().to_bytes());
    driver.qemu.write(at + 12, &sent);
    driver.add(1, 0, &[Buf::readable(at, 12), Buf::readable(at + 12, 200)]);
    driver.kick(1);
    let (_, got) = tap.recv(PATIENCE).expect("a frame on the TAP");
    assert_eq!(got, sent);
    assert_eq!(driver.wait_used(1, PATIENCE), Some((0, 0)));

    let sent = frames::test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, 300);
    tap.send(&VnetHdr::default(), &sent);
    assert_eq!(driver.wait_used(0, PATIENCE), Some((0, 312)));
    assert_eq!(driver.qemu.read(buffers + 12, 300), sent);
}

/// Requests in their order, without what differs from machine to machine: how often QEMU enables the rings, and how
/// many regions there are.
fn order_of(messages: &[Recorded]) -> Vec<(u32, Option<u32>, bool)> {
    let mut order: Vec<_> = messages
        .iter()
        .filter(|message| message.request != request::SET_VRING_ENABLE)
        .map(|message| (message.request, message.index(), message.need_reply))
        .collect();
    order.dedup();
    order
}

fn position(messages: &[Recorded], request: u32) -> usize {
    messages.iter().position(|message| message.request == request).unwrap()
}

#[test]
fn qemu_front_end_sends_in_the_order_that_the_kit_imitates() {
    const TEST: &str = "qemu_front_end_sends_in_the_order_that_the_kit_imitates";
    if !require_qemu(TEST) {
        return;
    }
    if !qtest::version().contains("version 7.2") {
        skip(TEST, "knows QEMU 7.2's order only");
        return;
    }
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("qemu.sock");
    let recorder = Recorder::start(&socket);
    let spec = QemuSpec { queue_pairs: 2, ..QemuSpec::new(&socket) };
    let wanted = feature::MQ | feature::CTRL_VQ | feature::MRG_RXBUF;
    let mut driver = QtestDriver::new(Qemu::start(&spec), |offered| offered & wanted);
    driver.set_up_queues(5);
    driver.driver_ok();
    let mq = [2, 0];
    let status = driver.ctrl(4, ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &mq);
    assert_eq!(status, Some(ctrl::OK));
    drop(driver);
    let qemu = recorder.finish();

    let socket = dir.path().join("kit.sock");
    let recorder = Recorder::start(&socket);
    let mem = Arc::new(GuestMemory::single(MIB));
    let rings: Vec<_> = (0..4).map(|_| SplitRing::new(&mem, 256)).collect();
    let session =
        SessionSpec { protocol: SessionSpec::QEMU_PROTOCOL, ..SessionSpec::new(&mem, rings.iter().collect(), 0) };
    let front_end = RawFrontend::connect(&socket).unwrap();
    front_end.negotiate_like_qemu_7(&session).unwrap();
    front_end.disconnect();
    let kit = recorder.finish();

    assert_eq!(order_of(&qemu), order_of(&kit));
    for messages in [&qemu, &kit] {
        let enable = position(messages, request::SET_VRING_ENABLE);
        assert!(enable < position(messages, request::SET_FEATURES));
    }
}

// Kernel devices.

#[test]
fn kernel_tap_in_a_namespace_passes_frames_both_ways() {
    if !require_root("kernel_tap_in_a_namespace_passes_frames_both_ways") {
        return;
    }
    let namespace = NetNs::new();
    namespace.add_tap(&TapSpec {
        addr: Some("10.99.0.1/24"),
        mac: Some("52:54:00:bb:00:01"),
        multi_queue: true,
        ..TapSpec::new("tap0")
    });
    let tap = namespace.open_tap("tap0", true);
    namespace.wait_operational("tap0");
    let host = PacketSocket::open(&namespace, "tap0");

    let request = frames::arp_request(&Ends::TX);
    tap.write(&VnetHdr::default(), &request).unwrap();
    let seen = host.recv(PATIENCE).expect("a frame on the packet socket");
    assert_eq!(seen, request);
    let reply = tap.read_until(PATIENCE, |frame| frames::is_arp_reply(frame, &Ends::TX));
    assert!(reply.is_some(), "The host answers ARP");

    let sent = frames::test_frame(&Ends::RX, Stamp { stream: 1, seq: 7 }, 100);
    host.send(&sent);
    let got = tap.read_until(PATIENCE, |frame| frame == sent);
    assert!(got.is_some(), "The TAP has the host's frame");
    assert_eq!(namespace.statistic("tap0", "rx_packets"), 1);
    assert!(namespace.ip("link show tap0").contains("LOWER_UP"));
}

#[test]
fn packet_socket_with_headers_shows_offloads() {
    if !require_root("packet_socket_with_headers_shows_offloads") {
        return;
    }
    let namespace = NetNs::new();
    namespace.add_tap(&TapSpec::new("tap0"));
    let tap = namespace.open_tap("tap0", false);
    namespace.wait_operational("tap0");
    let host = PacketSocket::open_vnet_hdr(&namespace, "tap0");
    let payload = frames::payload(Stamp { stream: 1, seq: 0 }, 4000);
    let frame = frames::tcp4(&Ends::TX, 1, &payload, L4Csum::Partial);
    let header = VnetHdr {
        flags: net_flag::NEEDS_CSUM,
        gso_type: gso::TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: frames::TCP_CSUM_OFFSET,
        num_buffers: 0,
    };

    tap.write(&header, &frame).unwrap();

    let (seen, whole) = host.recv_vnet(PATIENCE).expect("a GSO frame");
    assert_eq!((seen.gso_type, seen.gso_size), (gso::TCPV4, 1448));
    assert_eq!(frames::find_stamp(&whole), Some(Ok(Stamp { stream: 1, seq: 0 })));
}

#[test]
fn namespace_is_gone_after_its_test() {
    if !require_root("namespace_is_gone_after_its_test") {
        return;
    }
    let namespace = NetNs::new();
    let name = namespace.name.clone();
    let sleeper = namespace.spawn("sleep", &["60"]);
    assert!(PathBuf::from(format!("/proc/{}", sleeper.pid())).exists());

    drop(sleeper);
    drop(namespace);

    assert!(!PathBuf::from(format!("/run/netns/{name}")).exists());
}

// The kit's parts.

#[test]
fn memory_is_the_same_through_each_region_of_its_file() {
    let mem = GuestMemory::new(&[
        RegionSpec::new(0x1000, 0x1000),
        RegionSpec::new(0x2000, 0x1000).in_file(0, 0x1000),
        RegionSpec::new(0x10_0000, 0x2000),
    ]);

    mem.write(0x1ffe, &[1, 2, 3, 4]);

    assert_eq!(mem.read(0x1ffe, 4), [1, 2, 3, 4]);
    assert_eq!(mem.read(0x10_0ffe, 4), [1, 2, 3, 4]);
    assert_eq!(mem.load_u32(0x10_0ffc, Ordering::Relaxed), 0x0201_0000);
    assert_eq!(mem.user_addr(0x2001) - mem.user_addr(0x2000), 1);
    assert_ne!(mem.user_addr(0x2000), 0x2000);
    assert_eq!(mem.regions()[1].info.offset, 0x1000);
}

#[test]
#[should_panic(expected = "No guest memory at 0x2000")]
fn memory_in_a_hole_panics() {
    let mem = GuestMemory::new(&[RegionSpec::new(0x1000, 0x1000), RegionSpec::new(0x3000, 0x1000).in_file(1, 0)]);
    mem.read(0x1fff, 2);
}

#[test]
fn allocation_goes_on_in_the_next_region() {
    let mem = GuestMemory::new(&[RegionSpec::new(0x1000, 0x100), RegionSpec::new(0x8000, 0x1000).in_file(1, 0)]);

    assert_eq!(mem.alloc(0xf1, 1), 0x1000);
    assert_eq!(mem.alloc(1, 16), 0x8000);
    assert_eq!(mem.alloc(1, 16), 0x8010);
}

#[test]
fn need_event_holds_only_when_the_event_is_passed() {
    assert!(need_event(0, 1, 0));
    assert!(!need_event(1, 1, 0));
    assert!(!need_event(0xffff, 1, 0));
    assert!(need_event(0xffff, 0, 0xffff));
    assert!(need_event(0xffff, 3, 0xfff0));
    assert!(!need_event(3, 3, 3));
}

/// A device that gives back a head, for tests of the driver's side.
fn use_head(ring: &SplitRing, idx: u16, head: u32, len: u32) {
    let entry = ring.addrs.used + 4 + 8 * u64::from(idx % ring.size);
    ring.mem().store_u32(entry, head, Ordering::Relaxed);
    ring.mem().store_u32(entry + 4, len, Ordering::Relaxed);
    ring.write_used_idx(idx.wrapping_add(1));
}

#[test]
fn ring_lays_out_chains_as_the_specification_says() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::starting_at(&mem, 4, 0xffff);

    let head = ring.add(&[Buf::readable(0x11_0000, 12), Buf::writable(0x12_0000, 99)]);
    ring.publish();

    let table = mem.read(ring.addrs.desc + 16 * u64::from(head), 16);
    assert_eq!(table[..12], [0, 0, 0x11, 0, 0, 0, 0, 0, 12, 0, 0, 0]);
    assert_eq!(table[12..14], [1, 0], "NEXT");
    let next = u64::from(table[14]);
    let second = mem.read(ring.addrs.desc + 16 * next, 16);
    assert_eq!(second[8..14], [99, 0, 0, 0, 2, 0], "WRITE");
    let avail = mem.read(ring.addrs.avail, 14);
    assert_eq!(avail[2..4], [0, 0], "The index has wrapped");
    assert_eq!(avail[10], head as u8, "Entry 3");
}

#[test]
fn ring_gives_descriptors_back_once() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::new(&mem, 4);
    let first = ring.add(&[Buf::readable(0x11_0000, 1); 2]);
    let second = ring.add_indirect(&[Buf::readable(0x11_0000, 1); 3]);
    assert_eq!(ring.free_descriptors(), 1);
    assert_eq!(ring.try_add(&[Buf::readable(0x11_0000, 1); 2]), None);

    use_head(&ring, 0, second.into(), 5);
    assert_eq!(ring.take_used(), Some((second, 5)));
    use_head(&ring, 1, first.into(), 0);
    assert_eq!(ring.take_used(), Some((first, 0)));

    assert_eq!(ring.free_descriptors(), 4);
    assert_eq!(ring.out_of_order(), 1);
    assert_eq!(ring.take_used(), None);
}

#[test]
#[should_panic(expected = "returned head 0, which it does not have")]
fn head_that_comes_back_twice_panics() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::new(&mem, 4);
    ring.add(&[Buf::readable(0x11_0000, 1)]);
    use_head(&ring, 0, 0, 0);
    use_head(&ring, 1, 0, 0);

    ring.take_used();
    ring.take_used();
}

#[test]
#[should_panic(expected = "used without a call")]
fn buffer_used_without_a_call_panics() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::new(&mem, 4);
    ring.add(&[Buf::readable(0x11_0000, 1)]);
    let device = Arc::clone(&mem);
    let addrs = ring.addrs;
    mem.store_u16(addrs.avail + 12, 7, Ordering::Relaxed);

    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Once the driver waits: its used_event says so.
            while device.load_u16(addrs.avail + 12, Ordering::Relaxed) != 0 {
                std::thread::yield_now();
            }
            device.store_u16(addrs.used + 2, 1, Ordering::Release);
        });
        ring.wait_used(Duration::from_secs(2));
    });
}

#[test]
fn kicks_follow_used_flags_or_the_event_index() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let buf = [Buf::readable(0x11_0000, 1)];
    let mut ring = SplitRing::new(&mem, 8);

    ring.add(&buf);
    assert!(ring.publish_and_kick());
    mem.store_u16(ring.addrs.used, 1, Ordering::Relaxed);
    ring.add(&buf);
    assert!(!ring.publish_and_kick());

    ring.event_idx = true;
    mem.store_u16(ring.addrs.used + 4 + 8 * 8, 3, Ordering::Relaxed);
    ring.add(&buf);
    assert!(!ring.publish_and_kick(), "Index 2 is not beyond 3");
    ring.add(&buf);
    assert!(ring.publish_and_kick(), "Index 3 is awaited");
    assert_eq!(ring.kick.read().unwrap(), 2);
}

#[test]
fn control_driver_brings_a_command_and_takes_its_status() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut driver = CtrlDriver::new(&mem, 64, 0);
    let addrs = driver.ring.addrs;
    let kick = driver.ring.kick.try_clone().unwrap();
    let call = driver.ring.call.try_clone().unwrap();

    let (status, command) = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            assert!(wait_readable(fd_of(&kick), PATIENCE));
            // The first chain of a new ring: descriptors 0 to 2.
            let addr = |desc: u64| mem.load_u64(addrs.desc + 16 * desc, Ordering::Relaxed);
            let command = [mem.read(addr(0), 2), mem.read(addr(1), 2)].concat();
            mem.write(addr(2), &[ctrl::ERR]);
            mem.store_u16(addrs.used + 2, 1, Ordering::Release);
            call.write(1).unwrap();
            command
        });
        let status = driver.command(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[2, 0]);
        (status, device.join().unwrap())
    });

    assert_eq!(command, [4, 0, 2, 0]);
    assert_eq!(status, ctrl::ERR);
}

#[test]
fn tap_double_keeps_borders_and_blocks_when_full() {
    let (tap, device) = TapDouble::new();
    let header = VnetHdr::default();

    tap.send(&header, &[1; 60]);
    tap.send(&header, &[2; 1514]);
    let mut bytes = vec![0; 2000];
    assert_eq!(rustix::io::read(&device, &mut bytes).unwrap(), 72);
    assert_eq!(rustix::io::read(&device, &mut bytes[..100]).unwrap(), 100);
    let blocked = rustix::io::read(&device, &mut bytes);
    assert_eq!(blocked, Err(rustix::io::Errno::AGAIN));

    let fillers = tap.fill();
    let full = rustix::io::write(&device, &[0; 72]);
    assert_eq!(full, Err(rustix::io::Errno::AGAIN));
    assert!(tap.drain_fillers(fillers).is_empty());
    rustix::io::write(&device, &bytes[..72]).unwrap();
    assert_eq!(tap.recv(PATIENCE).unwrap().1.len(), 60);
}

#[test]
fn checker_tells_loss_duplication_reordering_and_corruption_apart() {
    let frame = |seq| frames::test_frame(&Ends::TX, Stamp { stream: 9, seq }, 60);
    let mut checker = Checker::new(9);
    let mut spoilt = frame(8);
    spoilt[50] ^= 1;

    for seq in [0, 1, 1, 4, 3] {
        checker.see(&frame(seq));
    }
    checker.see(&spoilt);
    checker.see(&frame(8)[..40]);
    checker.see(&frames::arp_request(&Ends::TX));

    assert_eq!(checker.lost(7), [2, 5, 6]);
    assert_eq!(checker.duplicated, 1);
    assert_eq!(checker.reordered, 1);
    assert_eq!(checker.corrupted.len(), 2);
    assert_eq!(checker.foreign, 1);
}

#[test]
fn built_frames_have_right_checksums() {
    for len in [18, 19, 1400, 1401] {
        let payload = frames::payload(Stamp { stream: 1, seq: 5 }, len);
        for frame in [
            frames::udp4(&Ends::TX, &payload, L4Csum::Full),
            frames::udp6(&Ends::TX, &payload, L4Csum::Full),
            frames::tcp4(&Ends::TX, 1, &payload, L4Csum::Full),
            frames::tcp6(&Ends::TX, 1, &payload, L4Csum::Full),
            frames::vlan(&frames::udp4(&Ends::TX, &payload, L4Csum::Full), 42),
        ] {
            assert!(frames::checksums_are_right(&frame));
            let stamp = Stamp { stream: 1, seq: 5 };
            assert_eq!(frames::find_stamp(&frame), Some(Ok(stamp)));
        }
        let partial = frames::udp4(&Ends::TX, &payload, L4Csum::Partial);
        assert!(!frames::checksums_are_right(&partial));
    }
}

#[test]
fn known_ip_header_has_its_known_checksum() {
    // The example that RFC 1071's implementers use.
    let header = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
    assert_eq!(!frames::checksum_add(0, &header), 0xb861);
}
