//! A scripted driver behind a stock QEMU: its front-end and its message orders, without a guest kernel.
#![allow(clippy::unwrap_used)]

mod common;
use std::path::Path;

use common::backend::{InProcess, Spawned, arg};
use common::frames::{Ends, Stamp, test_frame};
use common::netns::{NetNs, PacketSocket, TapSpec, require_root};
use common::place::Place;
use common::qmp;
use common::qtest::{BUFFERS, Qemu, QemuSpec, QtestDriver, is_at_least, require_qemu};
use common::refused::refuse_ioctl_bits_to;
use common::split_ring::Buf;
use common::virtio::{VnetHdr, ctrl, feature};
use common::{PATIENCE, wait_until};
use serde_json::json;
use tempfile::TempDir;

const HEADER: usize = VnetHdr::LEN;
/// Where frames to be sent lie; those received lie at [`BUFFERS`].
const OUT: u64 = BUFFERS + 0x10_0000;

fn qemu(socket: &Path, pairs: u32) -> Qemu {
    Qemu::start(&QemuSpec { queue_pairs: pairs, ..QemuSpec::new(socket) })
}

/// A driver with all its queues set up and started, control queue included where there are several pairs.
fn started(qemu: Qemu, pairs: u16, features: u64) -> QtestDriver {
    let several = if pairs > 1 { feature::MQ | feature::CTRL_VQ } else { 0 };
    let mut driver = QtestDriver::new(qemu, |offered| offered & (features | several));
    start(&mut driver, pairs, None);
    driver
}

fn start(driver: &mut QtestDriver, pairs: u16, size: Option<u16>) {
    assert!(driver.features_ok);
    let queues = if pairs > 1 { 2 * pairs + 1 } else { 2 };
    (0..queues).for_each(|index| driver.set_up_queue_of(index, size));
    driver.driver_ok();
    if pairs > 1 {
        use_pairs(driver, pairs, pairs);
    }
}

fn use_pairs(driver: &mut QtestDriver, pairs: u16, used: u16) {
    let status = driver.ctrl(2 * pairs, ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &used.to_le_bytes());
    assert_eq!(status, Some(ctrl::OK));
}

/// Offers a frame in descriptors of these lengths (the rest in the last), and returns it.
fn transmit(driver: &mut QtestDriver, pair: u16, seq: u32, lens: &[usize]) -> Vec<u8> {
    let frame = test_frame(&Ends::TX, Stamp { stream: 1, seq }, 200);
    driver.qemu.write(OUT, &[&VnetHdr::default().to_bytes()[..], &frame].concat());
    let mut at = 0;
    let mut bufs = Vec::new();
    for len in lens {
        bufs.push(Buf::readable(OUT + at as u64, *len));
        at += len;
    }
    bufs.push(Buf::readable(OUT + at as u64, HEADER + frame.len() - at));
    driver.add(2 * pair + 1, 0, &bufs);
    driver.kick(2 * pair + 1);
    frame
}

/// One frame each way on a queue pair.
fn assert_passes(backend: &InProcess, driver: &mut QtestDriver, pair: u16, seq: u32) {
    let tap = &backend.taps[usize::from(pair)];
    let out = transmit(driver, pair, seq, &[HEADER]);
    assert_eq!(tap.recv(PATIENCE).expect("a frame on the TAP").1, out);
    assert_eq!(driver.wait_used(2 * pair + 1, PATIENCE), Some((0, 0)));

    let into = test_frame(&Ends::RX, Stamp { stream: 2, seq }, 300);
    driver.add(2 * pair, 0, &[Buf::writable(BUFFERS, 2048)]);
    driver.kick(2 * pair);
    tap.send(&VnetHdr::default(), &into);
    assert_eq!(driver.wait_used(2 * pair, PATIENCE), Some((0, 312)));
    assert_eq!(driver.qemu.read(BUFFERS + HEADER as u64, 300), into);
}

#[test]
fn one_and_two_queue_pairs_pass_frames_in_qemus_message_order() {
    if !require_qemu("one_and_two_queue_pairs_pass_frames_in_qemus_message_order") {
        return;
    }
    for pairs in [1, 2] {
        let backend = InProcess::start(pairs.into());
        let mut driver = started(qemu(&backend.socket(), pairs.into()), pairs, 0);
        for seq in 0..3 {
            (0..pairs).for_each(|pair| assert_passes(&backend, &mut driver, pair, seq));
        }
    }
}

#[test]
fn frame_in_any_layout_of_descriptors_leaves_whole() {
    if !require_qemu("frame_in_any_layout_of_descriptors_leaves_whole") {
        return;
    }
    let backend = InProcess::start(1);
    let mut driver = started(qemu(&backend.socket(), 1), 1, 0);
    let layouts: [&[usize]; 6] = [&[], &[HEADER], &[5, 7], &[5, 20], &[1; 40], &[HEADER, 14, 20, 8, 1]];
    for (seq, lens) in (0..).zip(layouts) {
        let frame = transmit(&mut driver, 0, seq, lens);
        assert_eq!(backend.taps[0].recv(PATIENCE).expect("a frame on the TAP").1, frame, "{lens:?}");
        assert_eq!(driver.wait_used(1, PATIENCE), Some((0, 0)), "{lens:?}");
    }
}

#[test]
fn frame_is_spread_over_small_mergeable_buffers() {
    if !require_qemu("frame_is_spread_over_small_mergeable_buffers") {
        return;
    }
    let backend = InProcess::start(1);
    let mut driver = started(qemu(&backend.socket(), 1), 1, feature::MRG_RXBUF);
    let frame = test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, 300);
    for head in 0..4 {
        driver.add(0, head, &[Buf::writable(BUFFERS + 100 * u64::from(head), 100)]);
    }
    driver.kick(0);
    backend.taps[0].send(&VnetHdr::default(), &frame);
    for (head, len) in [(0, 100), (1, 100), (2, 100), (3, 12)] {
        assert_eq!(driver.wait_used(0, PATIENCE), Some((head, len)));
    }
    let bytes = driver.qemu.read(BUFFERS, 312);
    assert_eq!(VnetHdr::from_bytes(&bytes).num_buffers, 4);
    assert_eq!(bytes[HEADER..], frame);
}

#[test]
fn reset_device_passes_frames_with_other_features_and_sizes() {
    if !require_qemu("reset_device_passes_frames_with_other_features_and_sizes") {
        return;
    }
    let backend = InProcess::start(2);
    let mut driver = started(qemu(&backend.socket(), 2), 2, 0);
    assert_passes(&backend, &mut driver, 0, 0);
    let several = feature::MQ | feature::CTRL_VQ;
    for (pairs, features, size) in [
        (2, several | feature::MRG_RXBUF, None),
        (1, feature::EVENT_IDX, Some(64)),
        (2, several | feature::INDIRECT_DESC, Some(8)),
        (1, feature::MRG_RXBUF | feature::EVENT_IDX, Some(128)),
        (2, several, Some(256)),
    ] {
        driver.reset();
        driver.negotiate(|offered| offered & features);
        start(&mut driver, pairs, size);
        assert_eq!(driver.queue_size(0), size.unwrap_or(256));
        // More frames than the smallest ring has entries.
        for seq in 0..10 {
            (0..pairs).for_each(|pair| assert_passes(&backend, &mut driver, pair, seq));
        }
    }
}

#[test]
fn queue_pair_that_is_disabled_and_enabled_passes_frames_again() {
    if !require_qemu("queue_pair_that_is_disabled_and_enabled_passes_frames_again") {
        return;
    }
    let backend = InProcess::start(2);
    let mut driver = started(qemu(&backend.socket(), 2), 2, 0);
    for seq in 0..3 {
        use_pairs(&mut driver, 2, 1);
        assert_passes(&backend, &mut driver, 0, seq);
        use_pairs(&mut driver, 2, 2);
        assert_passes(&backend, &mut driver, 0, seq);
        assert_passes(&backend, &mut driver, 1, seq);
    }
}

#[test]
fn back_end_restarted_between_frames_carries_on_in_the_same_rings() {
    const TEST: &str = "back_end_restarted_between_frames_carries_on_in_the_same_rings";
    if !require_root(TEST) || !require_qemu(TEST) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("net.sock");
    let namespace = NetNs::new();
    namespace.add_tap(&TapSpec::new("tap0"));
    let host = PacketSocket::open(&namespace, "tap0");
    let run = || Spawned::start_in(&namespace, &["--socket-path", arg(&socket), "--tap", "tap0"]);
    let mut backend = run();
    let reconnect = if is_at_least(9, 2) { ",reconnect-ms=1000" } else { ",reconnect=1" };
    let spec = QemuSpec { chardev: reconnect, ..QemuSpec::new(&socket) };
    let mut driver = started(Qemu::start(&spec), 1, 0);
    for seq in 0..2 {
        // Posted to one back-end, filled by the next.
        driver.add(0, 0, &[Buf::writable(BUFFERS, 2048)]);
        driver.kick(0);
        backend.signal(nix::sys::signal::Signal::SIGKILL);
        backend.wait_end(PATIENCE);
        backend = run();
        backend.wait_line("Front-end connected");

        let into = test_frame(&Ends::RX, Stamp { stream: 2, seq }, 300);
        host.send(&into);
        assert_eq!(driver.wait_used(0, PATIENCE), Some((0, 312)), "{}", backend.log());
        assert_eq!(driver.qemu.read(BUFFERS + HEADER as u64, 300), into);

        let out = transmit(&mut driver, 0, seq, &[HEADER]);
        assert_eq!(host.recv(PATIENCE), Some(out), "{}", backend.log());
        assert_eq!(driver.wait_used(1, PATIENCE), Some((0, 0)));
        assert_eq!(backend.counters(1)[0].get("broken_rings"), None);
    }
}

/// A back-end on `place`'s TAP; on a kernel that has no TCP segmentation for it, if so wanted.
fn start_on(place: &Place, lacks_tso: bool) -> Spawned {
    let mut command = place.namespace.command(env!("CARGO_BIN_EXE_vhost-user-net"));
    command.args(["--socket-path", arg(&place.socket()), "--tap", "tap0"]);
    if lacks_tso {
        refuse_ioctl_bits_to(&mut command, libc::TUNSETOFFLOAD as u32, libc::TUN_F_TSO4, libc::EINVAL);
    }
    let mut backend = Spawned::run(&mut command);
    backend.wait_line("Listening on");
    backend
}

/// The destination's QEMU says what the guest has and would not have there, and the guest goes on where it was: by itself if
/// that QEMU is told of the failure, and with a command where it is not.
#[test]
fn guest_that_a_lesser_back_end_cannot_take_goes_on_where_it_was() {
    const TEST: &str = "guest_that_a_lesser_back_end_cannot_take_goes_on_where_it_was";
    if !require_root(TEST) || !require_qemu(TEST) {
        return;
    }
    for is_told in [true, false] {
        let (here, there) = (Place::new(), Place::new());
        [&here, &there].iter().for_each(|place| place.namespace.add_tap(&TapSpec::new("tap0")));
        let _backends = [start_on(&here, false), start_on(&there, true)];
        let host = PacketSocket::open(&here.namespace, "tap0");
        let dir = TempDir::new().unwrap();
        let (incoming, monitor) = (dir.path().join("incoming"), dir.path().join("qmp"));
        let more = format!(" -qmp unix:{},server=on,wait=off", monitor.display());
        let source = Qemu::start(&QemuSpec { more: &more, ..QemuSpec::new(&here.socket()) });
        let mut driver = started(source, 1, feature::GUEST_CSUM | feature::GUEST_TSO4);
        let uri = format!("unix:{}", incoming.display());
        let more = format!(" -incoming {uri}");
        let destination = Qemu::start(&QemuSpec { more: &more, ..QemuSpec::new(&there.socket()) });
        wait_until("the destination listens", || incoming.exists());
        let execute = |command, arguments| qmp::execute(&monitor, command, arguments);
        let capability = json!({ "capability": "return-path", "state": is_told });
        execute("migrate-set-capabilities", json!({ "capabilities": [capability] }));

        execute("migrate", json!({ "uri": uri }));

        wait_until("it says why not", || {
            let said = destination.stderr();
            said.lines().any(|line| line.contains("Features 0x") && line.contains(" unsupported. Allowed features: 0x"))
        });
        let status = if is_told { "failed" } else { "completed" };
        wait_until(status, || execute("query-migrate", json!({}))["status"] == status);
        if !is_told {
            execute("cont", json!({}));
        }
        wait_until("it runs", || execute("query-status", json!({}))["running"] == true);
        for seq in 0..3 {
            let out = transmit(&mut driver, 0, seq, &[HEADER]);
            assert!(host.recv(PATIENCE) == Some(out), "told {is_told}: frame {seq}");
            assert_eq!(driver.wait_used(1, PATIENCE), Some((0, 0)));
        }
    }
}
