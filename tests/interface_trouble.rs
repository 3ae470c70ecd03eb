//! What the host's side can do to a card: each is counted or said, nothing spins, and frames pass again afterwards. Real
//! devices in namespaces; needs root, and says SKIPPED aloud without. (Deleted, moved and returning interfaces:
//! `following`; passed descriptors that are no queues: `tap::descriptors`; names and users: `tap::attach`.)

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::PATIENCE;
use common::backend::Spawned;
use common::bench::Guest;
use common::frames::{Ends, Stamp, test_frame};
use common::netns::{PacketSocket, TapSpec, require_root};
use common::place::{Place, assert_frames_pass};
use common::skip;
use common::virtio::{VnetHdr, feature};

const GUEST_MAC: &str = "52:54:00:aa:00:01";

/// With a MACVTAP `mvt0` on a card.
fn macvtap_place(test: &str) -> Option<Place> {
    let place = Place::with_card(test)?;
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    Some(place)
}

/// Has the guest send `count` frames on pair 0, and waits until it has its buffers back.
fn send(guest: &mut Guest, count: u32) {
    for seq in 0..count {
        guest.pairs[0].send(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 9, seq }, 1000));
    }
    assert!(guest.pairs[0].wait_tx_done(PATIENCE), "The guest has its buffers back");
}

/// A number in a line of counters.
fn number(backend: &mut Spawned, line: &str, name: &str) -> u64 {
    backend.signal(nix::sys::signal::Signal::SIGUSR1);
    let line = backend.wait_line(line);
    let found = line.split(' ').find_map(|word| word.strip_prefix(&format!("{name}=")));
    found.unwrap_or_else(|| panic!("No {name}: {line}")).parse().unwrap()
}

/// F-05: writes to such a MACVTAP succeed, and the frames are gone.
#[test]
fn frames_into_a_macvtap_that_is_down_or_whose_card_is_are_counted_and_it_is_said() {
    const TEST: &str = "frames_into_a_macvtap_that_is_down_or_whose_card_is_are_counted_and_it_is_said";
    let Some(place) = macvtap_place(TEST) else { return };
    let mut backend = place.start(&["--macvtap", "mvt0"]);
    let mut guest = Guest::new(1, feature::MRG_RXBUF);
    guest.pairs[0].post_rx(64, 2048);
    let _front_end = place.connect(&guest);
    let outside = place.outside();
    assert_frames_pass(&mut guest, &outside, 0);
    for (round, interface) in [(1, "mvt0"), (2, "card")] {
        place.namespace.ip(&format!("link set {interface} down"));
        backend.wait_line("Interface \"mvt0\": link down");
        send(&mut guest, 10);
        backend.wait_counter("tx_drop_link_down", 10 * u64::from(round));
        place.namespace.ip(&format!("link set {interface} up"));
        backend.wait_line("Interface \"mvt0\": link up");
        assert_frames_pass(&mut guest, &outside, round);
    }
}

/// F-07: `/dev/tapN` is one for all namespaces, and N an index in one of them.
#[test]
fn macvtap_is_not_taken_for_one_of_the_same_index_in_another_namespace() {
    const TEST: &str = "macvtap_is_not_taken_for_one_of_the_same_index_in_another_namespace";
    let (Some(first), Some(second)) = (macvtap_place(TEST), macvtap_place(TEST)) else { return };
    let index = |place: &Place| place.namespace.run("cat", &["/sys/class/net/mvt0/ifindex"]);
    assert_eq!(index(&first), index(&second), "The test is about equal indices");
    for (seq, place) in [&first, &second].into_iter().enumerate() {
        let _backend = place.start(&["--macvtap", "mvt0"]);
        let mut guest = Guest::new(1, feature::MRG_RXBUF);
        guest.pairs[0].post_rx(64, 2048);
        let _front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &place.outside(), seq as u32);
    }
}

/// The same, where no node with the right numbers can be made.
#[test]
fn macvtap_whose_node_is_another_namespaces_is_refused_where_none_can_be_made() {
    const TEST: &str = "macvtap_whose_node_is_another_namespaces_is_refused_where_none_can_be_made";
    let (Some(first), Some(second)) = (macvtap_place(TEST), macvtap_place(TEST)) else { return };
    let mut refused = 0;
    for place in [&first, &second] {
        let mut command = place.namespace.command("setpriv");
        command.args(["--bounding-set", "-mknod", env!("CARGO_BIN_EXE_vhost-user-net"), "--socket-path"]);
        let mut backend = Spawned::run(command.arg(place.socket()).args(["--macvtap", "mvt0"]));
        let deadline = Instant::now() + PATIENCE;
        while !place.socket().exists() && !backend.has_ended() {
            assert!(Instant::now() < deadline, "{}", backend.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        if backend.has_ended() {
            backend.wait_line(
                "is missing or another network namespace's), and none can be made there: that needs CAP_MKNOD",
            );
            refused += 1;
        }
    }
    // The one node of their index is of one of them, or of neither.
    assert!(refused > 0, "Both took one node for theirs");
}

/// In a container this process has the same number each time, and another container may have the same folder.
#[test]
fn macvtap_is_opened_where_a_killed_process_of_the_same_number_left_its_folder() {
    const TEST: &str = "macvtap_is_opened_where_a_killed_process_of_the_same_number_left_its_folder";
    let (Some(first), Some(second)) = (macvtap_place(TEST), macvtap_place(TEST)) else { return };
    // The one node of their index is of one of them, or of neither.
    for place in [&first, &second] {
        let mut command = place.namespace.command("sh");
        command.args([
            "-c",
            "mkdir /dev/vhost-user-net.$$ && exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_vhost-user-net"),
        ]);
        let mut backend = Spawned::run(command.arg("--socket-path").arg(place.socket()).args(["--macvtap", "mvt0"]));
        backend.wait_line("Listening on");
        std::fs::remove_dir(format!("/dev/vhost-user-net.{}", backend.pid())).unwrap();
    }
}

/// F-11
#[test]
fn more_queues_than_the_kernel_gives_are_refused_with_their_number() {
    if !require_root("more_queues_than_the_kernel_gives_are_refused_with_their_number") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new("tap0") });
    let backend = place.start(&["--tap", "tap0", "--queue-pairs", "127"]);
    assert_eq!(place.namespace.tap_queues("tap0"), (1, 126));
    let log = place.refusal(&["--tap", "tap0", "--queue-pairs", "127", "--socket-mode", "600"]);
    assert!(log.contains("TAP \"tap0\" is in use: 127 of its queues are open in another process"), "{log}");
    drop(backend);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let _others: Vec<_> = (0..200).map(|_| place.namespace.open_tun("tap0", flags)).collect();
    let log = place.refusal(&["--tap", "tap0", "--queue-pairs", "100", "--shared"]);
    assert!(log.contains("it takes no more than 56 queues"), "{log}");
}

/// F-14
#[test]
fn frames_larger_than_an_mtu_that_was_lowered_pass() {
    if !require_root("frames_larger_than_an_mtu_that_was_lowered_pass") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0"]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    let host = PacketSocket::open(&place.namespace, "tap0");
    place.namespace.ip("link set dev tap0 mtu 576");
    backend.wait_line("Interface \"tap0\": MTU 576");
    for seq in 0..10 {
        let frame = test_frame(&Ends::TX, Stamp { stream: 9, seq }, 1514);
        guest.pairs[0].send(&VnetHdr::default(), &frame);
        assert_eq!(host.recv(PATIENCE).expect("a frame on the host"), frame);
    }
}

/// F-15, F-18: the kernel keeps as many frames as it has room for, in order, and what it drops is shown.
#[test]
fn what_the_kernel_drops_for_a_guest_without_buffers_is_shown() {
    const TEST: &str = "what_the_kernel_drops_for_a_guest_without_buffers_is_shown";
    let Some(place) = macvtap_place(TEST) else { return };
    place.namespace.ip("link add veth0 type veth peer name veth1");
    place.namespace.ip("link set veth0 up");
    place.namespace.ip("link set veth1 up");
    place.namespace.add_tap(&TapSpec::new("tap0"));
    for (option, name, outside, counter) in [
        ("--tap", "tap0", "tap0", "tx_dropped"),
        ("--macvtap", "mvt0", "outside", "rx_dropped"),
        ("--interface", "veth0", "veth1", "sockets_dropped"),
    ] {
        const SENT: u32 = 12_000;
        let mut backend = place.start(&[option, name, "--mac", GUEST_MAC]);
        let mut guest = Guest::new(1, feature::MRG_RXBUF);
        let _front_end = place.connect(&guest);
        let host = PacketSocket::open(&place.namespace, outside);
        host.enlarge();
        let before = number(&mut backend, "interface rx_dropped", counter);
        (0..SENT).for_each(|seq| {
            let _ = host.try_send(&test_frame(&Ends::RX, Stamp { stream: 3, seq }, 1000));
        });
        let dropped = number(&mut backend, "interface rx_dropped", counter) - before;
        assert!(dropped > 0 && dropped < u64::from(SENT), "{name}: {dropped} of {SENT}");
        // Those that were kept are the first ones.
        guest.pairs[0].post_rx(64, 2048);
        for seq in 0..100 {
            let (_, frame) = guest.pairs[0].recv(PATIENCE).expect("a frame that was kept");
            assert_eq!(frame, test_frame(&Ends::RX, Stamp { stream: 3, seq }, 1000), "{name}");
            guest.pairs[0].post_rx(1, 2048);
        }
    }
}

/// F-16
#[test]
fn frames_that_the_queueing_discipline_has_no_room_for_are_counted() {
    const TEST: &str = "frames_that_the_queueing_discipline_has_no_room_for_are_counted";
    const SENT: u32 = 200;
    if !require_root(TEST) {
        return;
    }
    let place = Place::new();
    place.namespace.ip("link add veth0 type veth peer name veth1");
    place.namespace.ip("link set veth0 up");
    place.namespace.ip("link set veth1 up");
    let slow = "qdisc add dev veth0 root tbf rate 8kbit burst 2000 limit 4000";
    let mut tc = place.namespace.command("tc");
    if !tc.args(slow.split(' ')).status().is_ok_and(|status| status.success()) {
        return skip(TEST, "this kernel, or this machine, has no token bucket filter (tc)");
    }
    let mut backend = place.start(&["--interface", "veth0", "--mac", GUEST_MAC]);
    let mut guest = Guest::new(1, feature::MRG_RXBUF);
    guest.pairs[0].post_rx(64, 2048);
    let _front_end = place.connect(&guest);
    send(&mut guest, SENT);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let counters = &backend.counters(1)[0];
        let (passed, dropped) = (counters["tx_frames"], counters.get("tx_drop_no_memory").copied().unwrap_or(0));
        if passed + dropped == u64::from(SENT) {
            assert!(dropped > 100, "{passed} passed and {dropped} were dropped");
            break;
        }
        assert!(Instant::now() < deadline, "{passed} and {dropped} are not all of {SENT}");
        std::thread::sleep(Duration::from_millis(10));
    }
    place.namespace.run("tc", &["qdisc", "del", "dev", "veth0", "root"]);
    let outside = PacketSocket::open(&place.namespace, "veth1");
    assert_frames_pass(&mut guest, &outside, 1);
}

/// F-17: a pair whose rx ring never had buffers is not attached; its tx frames pass all the same, or are counted.
#[test]
fn frames_of_a_detached_queue_pass_or_are_counted() {
    const SENT: u32 = 50;
    if !require_root("frames_of_a_detached_queue_pass_or_are_counted") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new("tap0") });
    let mut backend = place.start(&["--tap", "tap0", "--queue-pairs", "2"]);
    let mut guest = Guest::new(2, feature::MRG_RXBUF);
    guest.pairs[0].post_rx(64, 2048);
    let _front_end = place.connect(&guest);
    assert_eq!(place.namespace.tap_queues("tap0"), (1, 1));
    for seq in 0..SENT {
        guest.pairs[1].send(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 9, seq }, 300));
    }
    assert!(guest.pairs[1].wait_tx_done(PATIENCE));
    let counters = &backend.counters(2)[1];
    let dropped = counters.get("tx_drop_link_down").copied().unwrap_or(0);
    assert_eq!(counters["tx_frames"] + dropped, u64::from(SENT), "{counters:?}");
    assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "tap0"), 0);
}
