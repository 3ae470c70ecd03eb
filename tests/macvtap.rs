//! The real binary on real MACVTAPs: on one end of a veth pair, with the other end as the world outside.
//!
//! Needs root and a kernel with MACVTAP; says SKIPPED aloud without.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::backend::{Spawned, arg, inherit};
use common::bench::Guest;
use common::driver::CtrlDriver;
use common::frames::{
    self, Ends, L4Csum, Mac, Stamp, TCP_CSUM_OFFSET, checksums_are_right, find_stamp, payload, test_frame,
};
use common::frontend::{Answer, RawFrontend};
use common::message::Message;
use common::netns::{NetNs, PacketSocket, TapSpec};
use common::place::{Place, assert_frames_go_on_passing, assert_frames_pass};
use common::virtio::{VnetHdr, ctrl, feature, gso, net_flag};

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");
const GUEST_MAC: &str = "52:54:00:aa:00:01";
const MODES: [&str; 4] = ["bridge", "vepa", "private", "passthru"];
const MSS: u16 = 1448;
/// Of a guest that hands its control queue over.
const COMMANDS: u64 = feature::MRG_RXBUF | feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_MAC_ADDR | feature::MAC;

fn guest_with(pairs: usize, features: u64) -> Guest {
    let mut guest = Guest::new(pairs, features);
    let (count, len) = if features & feature::MRG_RXBUF == 0 { (8, 66_000) } else { (128, 2048) };
    guest.pairs.iter_mut().for_each(|pair| pair.post_rx(count, len));
    guest
}

#[test]
fn frames_pass_both_ways_in_all_modes() {
    for mode in MODES {
        let Some(place) = Place::with_card("frames_pass_both_ways_in_all_modes") else { return };
        place.add_on_card("macvtap", "mvt0", mode, GUEST_MAC);
        let backend = place.start(&["--macvtap", "mvt0"]);
        assert!(backend.log().contains("Attached to MACVTAP \"mvt0\" with 1 queue(s), address"), "{}", backend.log());
        let mut guest = guest_with(1, feature::MRG_RXBUF);
        let _front_end = place.connect(&guest);
        let outside = place.outside();
        assert_frames_pass(&mut guest, &outside, 0);
        (1..100).for_each(|seq| assert_frames_go_on_passing(&mut guest, &outside, seq));
        // Too long for what a TAP would do with a burst, and in order.
        let burst = |seq| test_frame(&Ends::RX, Stamp { stream: 3, seq }, 1500);
        (0..100).for_each(|seq| outside.send(&burst(seq)));
        for seq in 0..100 {
            let (_, got) = guest.pairs[0].recv(PATIENCE).expect("a frame of the burst");
            assert_eq!(got, burst(seq), "{mode}");
            guest.pairs[0].post_rx(1, 2048);
        }
    }
}

#[test]
fn interface_that_was_asked_for_is_made_and_taken_away() {
    for mode in MODES {
        let Some(place) = Place::with_card("interface_that_was_asked_for_is_made_and_taken_away") else { return };
        let mut backend = place.start(&[
            "--macvtap-parent",
            "card",
            "--macvtap-mode",
            mode,
            "--macvtap",
            "made",
            "--mac",
            GUEST_MAC,
            "--mtu",
            "1400",
        ]);
        let shown = place.namespace.ip("-d link show dev made");
        // In mode passthru it has its parent's.
        let address = if mode == "passthru" { "link/ether" } else { GUEST_MAC };
        for wanted in [&format!("mode {mode}"), address, "mtu 1400", "UP"] {
            assert!(shown.contains(wanted), "{wanted}: {shown}");
        }
        let mut guest = guest_with(1, feature::MRG_RXBUF);
        let front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &place.outside(), 0);
        assert_eq!(front_end.get_config(0, 6).unwrap(), frames::GUEST_MAC);
        assert_eq!(front_end.get_config(10, 2).unwrap(), 1400_u16.to_le_bytes());
        backend.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        assert!(!place.namespace.ip("link show").contains("made"));
    }
}

#[test]
fn guest_is_told_the_address_that_frames_come_to() {
    let Some(place) = Place::with_card("guest_is_told_the_address_that_frames_come_to") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", "52:54:00:12:34:56");
    let _backend = place.start(&["--macvtap", "mvt0"]);
    let guest = guest_with(1, 0);
    let front_end = place.connect(&guest);
    assert_eq!(front_end.get_config(0, 6).unwrap(), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
}

#[test]
fn guest_with_another_address_is_warned_of_once() {
    let Some(place) = Place::with_card("guest_with_another_address_is_warned_of_once") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", "52:54:00:12:34:56");
    let mut backend = place.start(&["--macvtap", "mvt0"]);
    for _ in 0..2 {
        let mut guest = guest_with(1, feature::MRG_RXBUF);
        let front_end = place.connect(&guest);
        let outside = place.outside();
        for seq in 0..3 {
            let out = test_frame(&Ends::TX, Stamp { stream: 1, seq }, 200);
            guest.pairs[0].send(&VnetHdr::default(), &out);
            assert_eq!(outside.recv(PATIENCE).expect("a frame outside"), out);
        }
        drop(front_end);
        // A process that another test is about to start may have it open for a moment.
        backend.wait_line("Front-end disconnected");
    }
    backend.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(backend.wait_end(PATIENCE).success());
    let log = backend.log();
    let wanted = "The guest sends from 52:54:00:aa:00:01, but only frames to 52:54:00:12:34:56 come to it";
    assert_eq!(log.matches(wanted).count(), 1, "{log}");
}

/// Unfinished frames from the world outside: whole where the guest takes them, finished where not.
#[test]
fn offloads_are_what_the_guest_negotiated() {
    const CSUM: u64 = feature::CSUM | feature::GUEST_CSUM | feature::MRG_RXBUF;
    const TSO: u64 = CSUM | feature::GUEST_TSO4 | feature::HOST_TSO4;
    const LARGE: usize = 20_000;
    let needs_csum =
        VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: TCP_CSUM_OFFSET, ..VnetHdr::default() };
    let large = VnetHdr { gso_type: gso::TCPV4, hdr_len: 54, gso_size: MSS, ..needs_csum };
    let tcp = |ends: &Ends, len| frames::tcp4(ends, 1, &payload(Stamp { stream: 1, seq: 0 }, len), L4Csum::Partial);
    for features in [feature::MRG_RXBUF, CSUM, TSO] {
        let Some(place) = Place::with_card("offloads_are_what_the_guest_negotiated") else { return };
        place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
        let _backend = place.start(&["--macvtap", "mvt0"]);
        let mut guest = guest_with(1, features);
        let _front_end = place.connect(&guest);
        let outside = PacketSocket::open_vnet_hdr(&place.namespace, "outside");

        outside.send_vnet(&needs_csum, &tcp(&Ends::RX, 1000)).unwrap();
        let got = guest.pairs[0].recv_detailed(PATIENCE).expect("a frame in the guest");
        let is_finished = got.header.flags & net_flag::NEEDS_CSUM == 0;
        assert!(!is_finished || checksums_are_right(&got.frame));
        assert!(is_finished || features & feature::GUEST_CSUM != 0);

        outside.send_vnet(&large, &tcp(&Ends::RX, LARGE)).unwrap();
        let mut came = 0;
        while came < LARGE {
            let got = guest.pairs[0].recv_detailed(PATIENCE).expect("a frame in the guest");
            let is_whole = got.header.gso_type != gso::NONE;
            assert_eq!(is_whole, features == TSO, "{:?}", got.header);
            assert!(got.header.flags & net_flag::NEEDS_CSUM != 0 || checksums_are_right(&got.frame));
            assert!(features & feature::GUEST_CSUM != 0 || checksums_are_right(&got.frame));
            came += got.frame.len() - 54;
        }
        assert_eq!(came, LARGE);

        if features == TSO {
            guest.pairs[0].send(&large, &tcp(&Ends::TX, LARGE));
            let (header, frame) = outside.recv_vnet(PATIENCE).expect("a frame outside");
            assert_eq!((header.gso_type, header.gso_size, frame.len()), (gso::TCPV4, MSS, 54 + LARGE));
            assert_eq!(find_stamp(&frame), Some(Ok(Stamp { stream: 1, seq: 0 })));
        }
    }
}

/// What goes as one is cut again as it was, into a socket behind the other end.
#[test]
fn coalesced_datagrams_arrive_as_they_were_sent() {
    const DATAGRAMS: u32 = 50;
    let Some(place) = Place::with_card("coalesced_datagrams_arrive_as_they_were_sent") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    let mac = frames::mac_text(frames::HOST_MAC);
    place.namespace.ip(&format!("link set dev outside address {mac}"));
    place.namespace.ip("addr add 10.99.0.1/24 dev outside");
    let mut backend = place.start(&["--macvtap", "mvt0"]);
    let mut guest = guest_with(1, feature::CSUM | feature::EVENT_IDX);
    let _front_end = place.connect(&guest);
    let socket = place.namespace.within(|| UdpSocket::bind("10.99.0.1:5000").unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHdr::default() };
    let payload_of = |seq| payload(Stamp { stream: 1, seq }, 1400 - 300 * usize::from(seq % 10 == 9));
    for seq in 0..DATAGRAMS {
        guest.pairs[0].queue(&header, &frames::udp4(&Ends::TX, &payload_of(seq), L4Csum::Partial));
    }
    guest.pairs[0].tx.publish_and_kick();
    let mut bytes = [0; 2000];
    for seq in 0..DATAGRAMS {
        let (len, _) = socket.recv_from(&mut bytes).expect("a datagram");
        assert!(bytes[..len] == payload_of(seq), "datagram {seq} is another one");
    }
    backend.wait_counter("tx_frames", u64::from(DATAGRAMS));
    let kernel_can = !backend.log().contains("Only TCP frames are coalesced");
    assert_eq!(backend.counters(1)[0]["tx_coalesced_frames"], if kernel_can { u64::from(DATAGRAMS) } else { 0 });
}

#[test]
fn four_queue_pairs_get_every_flow() {
    const FLOWS: u16 = 64;
    let Some(place) = Place::with_card("four_queue_pairs_get_every_flow") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    let _backend = place.start(&["--macvtap", "mvt0", "--queue-pairs", "4"]);
    let mut guest = guest_with(4, feature::MRG_RXBUF);
    let _front_end = place.connect(&guest);
    let outside = place.outside();
    (0..4).for_each(|pair| {
        let out = test_frame(&Ends::TX, Stamp { stream: 1, seq: pair as u32 }, 200);
        guest.pairs[pair].send(&VnetHdr::default(), &out);
        assert_eq!(outside.recv(PATIENCE).expect("a frame outside"), out);
    });
    for flow in 0..FLOWS {
        let ends = Ends { src_port: 1000 + flow, ..Ends::RX };
        let bytes = payload(Stamp { stream: 1, seq: flow.into() }, 100);
        outside.send(&frames::udp4(&ends, &bytes, L4Csum::Full));
    }
    let deadline = Instant::now() + PATIENCE;
    let mut came = [0; 4];
    while came.iter().sum::<u16>() < FLOWS {
        assert!(Instant::now() < deadline, "{came:?} of {FLOWS} flows");
        for (pair, came) in guest.pairs.iter_mut().zip(&mut came) {
            while pair.recv(Duration::from_millis(1)).is_some() {
                *came += 1;
            }
        }
    }
    assert!(came.iter().filter(|came| **came > 0).count() > 1, "One pair got all: {came:?}");
}

/// The kernel keeps what waits in a queue that gets no more frames.
#[test]
fn what_waited_in_a_pair_before_it_was_taken_out_of_use_does_not_come_when_it_is_used_again() {
    // It has buffers all the time; or they are used up, and it gets others after it is used again.
    [false, true].into_iter().for_each(assert_nothing_old_comes);
}

fn assert_nothing_old_comes(without_buffers: bool) {
    const TEST: &str = "what_waited_in_a_pair_before_it_was_taken_out_of_use_does_not_come_when_it_is_used_again";
    const FLOWS: u16 = 64;
    let Some(place) = Place::with_card(TEST) else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    let _backend = place.start(&["--macvtap", "mvt0", "--queue-pairs", "2"]);
    let mut guest = Guest::new(2, feature::MRG_RXBUF);
    guest.pairs[0].post_rx(250, 2048);
    let few = 8;
    guest.pairs[1].post_rx(if without_buffers { few } else { 128 }, 2048);
    let front_end = place.connect(&guest);
    let outside = place.outside();
    // What waits for the second pair is taken from this.
    rustix::net::sockopt::set_socket_send_buffer_size_force(outside.as_fd(), 16 << 20).unwrap();
    let mut seq = 0;
    // Sends a frame of each flow; tells the numbers of those that come to each pair in a moment.
    let mut send = |guest: &mut Guest, receives: [bool; 2]| -> [Vec<u32>; 2] {
        seq += 1;
        for flow in 0..FLOWS {
            let ends = Ends { src_port: 1000 + flow, ..Ends::RX };
            outside.send(&frames::udp4(&ends, &payload(Stamp { stream: flow, seq }, 100), L4Csum::Full));
        }
        let deadline = Instant::now() + Duration::from_millis(200);
        let mut came = [Vec::new(), Vec::new()];
        while Instant::now() < deadline {
            let pairs = guest.pairs.iter_mut().zip(&mut came).zip(receives);
            // Whoever receives a frame gives its buffer back.
            for ((pair, came), _) in pairs.filter(|(_, receives)| *receives) {
                while let Some((_, frame)) = pair.recv(Duration::from_millis(1)) {
                    came.push(find_stamp(&frame).unwrap().unwrap().seq);
                }
            }
        }
        came
    };
    let enable = |enabled: bool| {
        for ring in [2, 3] {
            assert_eq!(front_end.ask(Message::set_vring_enable(ring, enabled.into())), Answer::Ack);
        }
    };
    // Each of the three waits has time of its own.
    let deadline = || Instant::now() + PATIENCE;
    let both = [true, !without_buffers];
    let is_used = |guest: &Guest| guest.pairs[1].rx.used_idx() > 0;
    let until = deadline();
    while send(&mut guest, both)[1].is_empty() && !(without_buffers && is_used(&guest)) {
        assert!(Instant::now() < until, "The pair gets nothing");
    }
    enable(false);
    // Once all flows come to the first pair, the second one's queue is out of use.
    let until = deadline();
    let seen = loop {
        let [first, _] = send(&mut guest, both);
        if first.len() >= usize::from(FLOWS) {
            break first.into_iter().max();
        }
        assert!(Instant::now() < until, "Flows are lost");
    };
    enable(true);
    assert!(front_end.is_alive());
    let before = if without_buffers { few } else { 0 };
    guest.pairs[1].post_rx(100, 2048);
    let until = deadline();
    let came = loop {
        let [_, mut second] = send(&mut guest, [true; 2]);
        if second.len() > before {
            break second.split_off(before);
        }
        assert!(Instant::now() < until, "The pair gets nothing");
    };
    assert!(came.iter().all(|seq| Some(*seq) > seen), "Frames of long ago: {came:?}");
}

/// The guest would send from an address that nothing comes to, and believe it had it.
#[test]
fn address_that_the_interface_does_not_let_in_is_refused_to_the_guest() {
    const OTHER: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    for (option, kind, mode, wanted) in [
        ("--macvtap", "macvtap", "bridge", ctrl::ERR),
        ("--macvtap", "macvtap", "passthru", ctrl::OK),
        ("--interface", "macvlan", "bridge", ctrl::ERR),
        ("--interface", "macvlan", "passthru", ctrl::OK),
    ] {
        let Some(place) = Place::with_card("address_that_the_interface_does_not_let_in_is_refused_to_the_guest") else {
            return;
        };
        place.namespace.ip(&format!("link set card address {GUEST_MAC}"));
        place.add_on_card(kind, "dev0", mode, if mode == "passthru" { GUEST_MAC } else { "52:54:00:cc:00:01" });
        let own: Mac = if mode == "passthru" { frames::GUEST_MAC } else { [0x52, 0x54, 0, 0xcc, 0, 1] };
        let _backend = place.start(&[option, "dev0", "--front-end", "generic"]);
        let mut guest = guest_with(1, COMMANDS);
        let mut commands = CtrlDriver::new(&guest.mem, 64, COMMANDS);
        let front_end = RawFrontend::connect(place.socket()).unwrap();
        let mut session = guest.session();
        session.rings.push(&commands.ring);
        front_end.negotiate_like_cloud_hypervisor(&session).unwrap();
        let set = |commands: &mut CtrlDriver, mac: Mac| commands.command(ctrl::CLASS_MAC, 1, &mac);
        assert_eq!(commands.command(ctrl::CLASS_RX, 0, &[0]), ctrl::OK);
        assert_eq!(set(&mut commands, OTHER), wanted, "{kind} {mode}");
        let is = if wanted == ctrl::OK { OTHER } else { own };
        assert_eq!(front_end.get_config(0, 6).unwrap(), is);
        let frame = test_frame(&Ends { dst_mac: is, ..Ends::RX }, Stamp { stream: 2, seq: 0 }, 200);
        place.outside().send(&frame);
        assert_eq!(guest.pairs[0].recv(PATIENCE).expect("a frame in the guest").1, frame, "{kind} {mode}");
        // The interface's own is never refused.
        assert_eq!(set(&mut commands, own), ctrl::OK, "{kind} {mode}");
        // The device does what it can about these, which is nothing here.
        assert_eq!(commands.command(ctrl::CLASS_RX, 0, &[1]), ctrl::OK);
        let table = [&1_u32.to_le_bytes()[..], &OTHER, &[0; 4]].concat();
        assert_eq!(commands.command(ctrl::CLASS_MAC, 0, &table), ctrl::OK);
    }
}

#[test]
fn passed_descriptor_is_served_and_its_end_is_noticed() {
    let Some(place) = Place::with_card("passed_descriptor_is_served_and_its_end_is_noticed") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    let queue = place.namespace.open_macvtap("mvt0");
    let mut command = Command::new(BINARY);
    inherit(&mut command, queue.as_fd(), 20);
    let mut backend = Spawned::run(command.args([
        "--socket-path",
        arg(&place.socket()),
        "--tap-fd",
        "20",
        "--on-device-loss",
        "wait",
    ]));
    backend.wait_line("Listening on");
    assert!(backend.log().contains("Took 1 descriptor(s) of MACVTAP \"mvt0\""), "{}", backend.log());
    let mut guest = guest_with(1, feature::MRG_RXBUF);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.outside(), 0);
    drop(queue);
    delete(&place, &mut backend);
    // Whoever opened the device may make it anew.
    backend.wait_at_rest();
}

/// What the interface of that name here is like says nothing of it.
#[test]
fn passed_descriptor_is_not_taken_for_that_of_an_interface_of_the_same_name_here() {
    const TEST: &str = "passed_descriptor_is_not_taken_for_that_of_an_interface_of_the_same_name_here";
    for mac in ["52:54:00:12:34:56", GUEST_MAC] {
        let (Some(here), Some(elsewhere)) = (Place::with_card(TEST), Place::with_card(TEST)) else { return };
        here.add_on_card("macvtap", "mvt0", "bridge", mac);
        here.namespace.ip("link set mvt0 mtu 1400");
        elsewhere.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
        for (at, told_mac, told_mtu) in [(&here, [0; 6], 1500_u16), (&elsewhere, frames::GUEST_MAC, 1500)] {
            let queue = elsewhere.namespace.open_macvtap("mvt0");
            let mut command = at.namespace.command(BINARY);
            inherit(&mut command, queue.as_fd(), 20);
            let mut backend = Spawned::run(command.args(["--socket-path", arg(&at.socket()), "--tap-fd", "20"]));
            backend.wait_line("Listening on");
            let mut guest = guest_with(1, feature::MRG_RXBUF);
            let front_end = at.connect(&guest);
            assert_eq!(front_end.get_config(0, 6).unwrap(), told_mac);
            assert_eq!(front_end.get_config(10, 2).unwrap(), told_mtu.to_le_bytes());
            assert_frames_pass(&mut guest, &elsewhere.outside(), 0);
        }
    }
}

/// The process is in an empty namespace, and its socket is not in any.
#[test]
fn device_of_another_namespace_is_served_made_and_taken_away() {
    let Some(place) = Place::with_card("device_of_another_namespace_is_served_made_and_taken_away") else { return };
    let empty = NetNs::new();
    let name = place.namespace.name.clone();
    let path = format!("/run/netns/{name}");
    for (netns, device) in [
        (&name, &["--tap", "tap0"][..]),
        (&path, &["--macvtap-parent", "card", "--macvtap", "made", "--mac", GUEST_MAC]),
    ] {
        let socket = place.socket();
        let mut args = vec!["--socket-path", arg(&socket), "--netns", netns];
        args.extend(device);
        let mut backend = Spawned::start_in(&empty, &args);
        assert_eq!(empty.ip("-br link").lines().count(), 1, "Nothing but lo is here");
        let mut guest = guest_with(1, feature::MRG_RXBUF);
        let front_end = place.connect(&guest);
        let host = PacketSocket::open(&place.namespace, if netns == &name { "tap0" } else { "outside" });
        place.namespace.wait_operational(if netns == &name { "tap0" } else { "made" });
        assert_frames_pass(&mut guest, &host, 0);
        drop(front_end);
        backend.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        let links = place.namespace.ip("-br link");
        assert!(!links.contains("tap0") && !links.contains("made"), "{links}");
    }
}

#[test]
fn deleted_interface_of_another_namespace_is_noticed() {
    let Some(place) = Place::with_card("deleted_interface_of_another_namespace_is_noticed") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    let socket = place.socket();
    let empty = NetNs::new();
    let args = ["--socket-path", arg(&socket), "--netns", &place.namespace.name, "--macvtap", "mvt0"];
    let backend = Spawned::start_in(&empty, &args);
    assert_ends_with_its_interface(&place, backend);
}

#[test]
fn namespace_that_is_none_is_refused() {
    let Some(place) = Place::with_card("namespace_that_is_none_is_refused") else { return };
    for (netns, wanted) in [
        ("no-such", "no network namespace at \"/run/netns/no-such\"; 'ip netns list' lists names"),
        ("/proc/self/ns/uts", "cannot enter \"/proc/self/ns/uts\": it is not a network namespace"),
    ] {
        let log = place.refusal(&["--netns", netns, "--tap", "tap0"]);
        assert!(log.contains(wanted), "{log}");
    }
}

/// F-04
#[test]
fn deleted_interface_is_noticed() {
    let Some(place) = Place::with_card("deleted_interface_is_noticed") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    let backend = place.start(&["--macvtap", "mvt0"]);
    let mut guest = guest_with(1, feature::MRG_RXBUF);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.outside(), 0);
    assert!(!backend.log().contains("The guest sends from"), "{}", backend.log());
    assert_ends_with_its_interface(&place, backend);
}

/// What is deleted is said.
fn delete(place: &Place, backend: &mut Spawned) {
    place.namespace.ip("link del mvt0");
    backend.wait_line("Interface \"mvt0\" was deleted");
}

/// And ends the process.
fn assert_ends_with_its_interface(place: &Place, mut backend: Spawned) {
    delete(place, &mut backend);
    assert_eq!(backend.wait_end(PATIENCE).code(), Some(75), "{}", backend.log());
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out() {
    let Some(place) = Place::with_card("what_cannot_be_is_refused_with_the_way_out") else { return };
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    place.namespace.add_tap(&TapSpec::new("tap0"));
    for (args, wanted) in [
        (&["--macvtap", "none"][..], "There is no interface \"none\"; make it with 'ip link add link IF name none"),
        (&["--macvtap", "tap0"], "Interface \"tap0\" is a tun interface, not a MACVTAP"),
        (&["--macvtap", "outside"], "Interface \"outside\" is a veth interface, not a MACVTAP"),
        (&["--tap", "mvt0"], "Interface \"mvt0\" is a macvtap interface, not a TAP"),
        (&["--macvtap-parent", "none"], "--macvtap-parent \"none\": there is no such interface"),
        (&["--macvtap-parent", "card", "--macvtap-mode", "passthru"], "is in use another way"),
        (&["--macvtap-parent", "card", "--mtu", "9000"], "MTU 9000 of --mtu: \"card\" must have as much"),
    ] {
        let log = place.refusal(args);
        assert!(log.contains(wanted), "{args:?}: {log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
    let links = place.namespace.ip("-br link");
    assert!(!links.contains("macvtap-"), "Nothing is left behind: {links}");
}
