//! MACVLANs that are made, warnings, and each way in which it cannot be.

use std::time::Duration;

use crate::common::PATIENCE;
use crate::common::backend::{Spawned, arg};
use crate::common::frames::GUEST_MAC;
use crate::common::netns::TapSpec;
use crate::common::refused::{refuse_argument_to, refuse_to};
use crate::common::virtio::VnetHdr;
use crate::{BINARY, CSUM, Kind, MAC, MODES, Place, assert_frames_pass, guest_with, outward};

#[test]
fn macvlan_that_was_asked_for_is_made_and_taken_away() {
    for (mode, queue_pairs) in MODES.into_iter().flat_map(|mode| [(mode, 1), (mode, 4)]) {
        let Some(place) = Place::new("macvlan_that_was_asked_for_is_made_and_taken_away") else { return };
        place.namespace.ip("link set card address 52:54:00:cc:00:01");
        let count = queue_pairs.to_string();
        let how = ["--macvlan-parent", "card", "--macvlan-mode", mode, "--mac", MAC, "--queue-pairs", &count];
        let mut backend = place.start(&[&how[..], &["--interface", "made", "--mtu", "1400"]].concat());
        let wanted = format!("Made interface \"made\" with {queue_pairs} packet socket(s), address {MAC}");
        assert!(backend.log().contains(&wanted), "{}", backend.log());
        assert_nothing_is_warned_of(&backend);
        let shown = place.namespace.ip("-d link show dev made");
        // In mode passthru it has its parent's.
        let address = if mode == "passthru" { "link/ether" } else { MAC };
        for wanted in [&format!("macvlan mode {mode}"), address, "mtu 1400", "UP"] {
            assert!(shown.contains(wanted), "{wanted}: {shown}");
        }
        place.wait_operational("made");
        let mut guest = guest_with(queue_pairs, CSUM);
        let front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &place.outside(), 0);
        assert_eq!(front_end.get_config(0, 6).unwrap(), GUEST_MAC);
        assert_eq!(front_end.get_config(10, 2).unwrap(), 1400_u16.to_le_bytes());
        backend.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        assert!(!place.namespace.ip("link show").contains("made"));
    }
}

#[test]
fn macvlan_without_a_name_or_an_address_gets_both() {
    let Some(place) = Place::new("macvlan_without_a_name_or_an_address_gets_both") else { return };
    let backend = place.start(&["--macvlan-parent", "card"]);
    let name = format!("macvlan-{}", backend.pid());
    let shown = place.namespace.ip(&format!("link show dev {name}"));
    let guest = guest_with(1, CSUM);
    let front_end = place.connect(&guest);
    let mac: [u8; 6] = front_end.get_config(0, 6).unwrap().try_into().unwrap();
    assert!(shown.contains(&crate::common::frames::mac_text(mac)), "{shown}");
}

#[test]
fn macvlan_on_an_interface_that_is_down_is_warned_of_and_works_once_it_is_up() {
    let Some(place) = Place::new("macvlan_on_an_interface_that_is_down_is_warned_of_and_works_once_it_is_up") else {
        return;
    };
    place.namespace.ip("link set card address 52:54:00:cc:00:01");
    place.namespace.ip("link set card down");
    let how = ["--macvlan-parent", "card", "--interface", "made", "--mac", MAC, "--queue-pairs", "4"];
    let mut backend = place.start(&how);
    assert!(backend.log().contains("Interface \"card\" is down, no frames will pass"), "{}", backend.log());
    let mut guest = guest_with(4, CSUM);
    let _front_end = place.connect(&guest);
    place.namespace.ip("link set card up");
    place.wait_operational("made");
    backend.wait_line("link up");
    assert_frames_pass(&mut guest, &place.outside(), 0);
}

#[test]
fn existing_interface_is_used_as_it_is_beside_a_parent_and_left() {
    let Some(place) = Place::new("existing_interface_is_used_as_it_is_beside_a_parent_and_left") else { return };
    let name = place.make(Kind::Macvlan("bridge"));
    let mut backend = place.start(&["--macvlan-parent", "card", "--interface", name]);
    assert!(backend.log().contains("is there already and is used as it is"), "{}", backend.log());
    backend.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(backend.wait_end(PATIENCE).success());
    assert!(place.namespace.ip("link show").contains(name));
}

#[test]
fn what_is_odd_about_an_interface_is_warned_of_with_the_fix() {
    let Some(place) = Place::new("what_is_odd_about_an_interface_is_warned_of_with_the_fix") else { return };
    place.namespace.ip("addr add 10.99.0.7/24 dev card");
    let backend = place.start(&["--interface", "card"]);
    let log = backend.log();
    assert!(log.contains("Interface \"card\" has address 10.99.0.7: the host answers there too"), "{log}");
    assert!(log.contains("'ip address flush dev card'"), "{log}");
    drop(backend);
    place.namespace.ip("address flush dev card");
    let backend = place.start(&["--interface", "card", "--mac", "52:54:00:aa:00:02"]);
    assert_nothing_is_warned_of(&backend);
    drop(backend);
    let name = place.make(Kind::Macvlan("bridge"));
    let backend = place.start(&["--interface", name, "--mac", "52:54:00:aa:00:02"]);
    let log = backend.log();
    assert!(
        log.contains(
            "MACVLAN \"mv0\" lets in frames to its own address and to groups only, and its own is not that of --mac"
        ),
        "{log}"
    );
    assert!(log.contains("'ip link set mv0 address 52:54:00:aa:00:02'"), "{log}");
    drop(backend);
    let backend = place.start(&["--interface", name, "--promiscuous"]);
    let wanted = "and to groups only, with --promiscuous, too: one of mode passthru lets in all";
    assert!(backend.log().contains(wanted), "{}", backend.log());
}

#[test]
fn guest_with_another_address_is_warned_of_once() {
    let Some(place) = Place::new("guest_with_another_address_is_warned_of_once") else { return };
    place.namespace.ip("link set card address 52:54:00:12:34:56");
    for promiscuous in [false, true] {
        let how = ["--interface", "card", "--promiscuous"];
        let mut backend = place.start(&how[..if promiscuous { 3 } else { 2 }]);
        for _ in 0..2 {
            let mut guest = guest_with(1, CSUM);
            let front_end = place.connect(&guest);
            let outside = place.outside();
            for seq in 0..3 {
                guest.pairs[0].send(&VnetHdr::default(), &outward(1, seq, 200));
                assert_eq!(outside.recv(PATIENCE).expect("a frame outside"), outward(1, seq, 200));
            }
            drop(front_end);
            // A process that another test is about to start may have it open for a moment.
            backend.wait_line("Front-end disconnected");
        }
        backend.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        let log = backend.log();
        let wanted = "The guest sends from 52:54:00:aa:00:01, but only frames to 52:54:00:12:34:56 come to it";
        assert_eq!(log.matches(wanted).count(), usize::from(!promiscuous), "{log}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out_and_leaves_nothing() {
    let Some(place) = Place::new("what_cannot_be_is_refused_with_the_way_out_and_leaves_nothing") else { return };
    let ip = |args| place.namespace.ip(args);
    place.namespace.add_tap(&TapSpec::new("tap0"));
    ip("tuntap add dev tun0 mode tun vnet_hdr");
    ip("link add link card name mvt0 type macvtap mode bridge");
    ip("link add away type veth peer name away1");
    ip("link add br0 type bridge");
    ip("link set away1 master br0");
    let links = ip("-br link");
    for (args, wanted) in [
        (&["--interface", "none"][..], "There is no interface \"none\"; 'ip link' lists them, --netns names another"),
        (&["--interface", "tap0"], "Interface \"tap0\" is a TAP or TUN; use --tap or --tun, which are made for that"),
        (&["--interface", "tun0"], "Interface \"tun0\" is a TAP or TUN; use --tap or --tun"),
        (&["--interface", "mvt0"], "Interface \"mvt0\" is a MACVTAP; use --macvtap, which is made for that"),
        (&["--interface", "lo"], "Interface \"lo\" is no Ethernet interface; name one with Ethernet frames"),
        (
            &["--interface", "away", "--queue-pairs", "2"],
            "Interface \"away\" is down, and several queue pairs need it up: 'ip link set away up'",
        ),
        (&["--macvlan-parent", "none"], "--macvlan-parent \"none\": there is no such interface; 'ip link' lists them"),
        (
            &["--macvlan-parent", "lo"],
            "--macvlan-parent \"lo\": this is a loopback interface, and a MACVLAN is made on one with Ethernet frames",
        ),
        (&["--macvlan-parent", "away1"], "\"away1\" is in use another way (a bridge's port, or"),
        (&["--macvlan-parent", "card", "--macvlan-mode", "passthru"], "\"card\" is in use another way"),
        (
            &["--macvlan-parent", "card", "--mac", MAC],
            "\"card\", or another MACVLAN on it, has that address; give another with --mac",
        ),
        (&["--macvlan-parent", "card", "--mtu", "9000"], "MTU 9000 of --mtu: \"card\" must have as much"),
    ] {
        let log = place.refusal(args);
        assert!(log.contains(wanted), "{args:?}: {log}");
        assert_eq!(ip("-br link"), links, "{args:?}");
    }
    // What is found later, too.
    let mut command = place.namespace.command(BINARY);
    let (code, log) = Spawned::refusal(command.args(["--socket-path", "/no/such/socket", "--macvlan-parent", "card"]));
    assert_eq!(code, Some(1), "{log}");
    assert_eq!(ip("-br link"), links, "{log}");
}

#[test]
fn name_that_is_too_long_is_refused() {
    let Some(place) = Place::new("name_that_is_too_long_is_refused") else { return };
    for option in ["--interface", "--macvlan-parent"] {
        let mut command = place.namespace.command(BINARY);
        let (code, log) = Spawned::refusal(command.args(["--socket-path", "s", option, "sixteen-letters0"]));
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(&format!("{option} <")) && log.contains("15"), "{log}");
    }
}

#[test]
fn user_who_may_not_is_told_what_to_do() {
    let Some(place) = Place::new("user_who_may_not_is_told_what_to_do") else { return };
    let socket = place.socket();
    for (args, wanted) in [
        (["--interface", "card"], "this user may not; give the program CAP_NET_RAW (as root: 'setcap cap_net_raw+ep'"),
        (["--macvlan-parent", "card"], "this user may not; make it as root ('ip link add link card name NAME"),
    ] {
        // A user without any rights, who may execute what root may.
        let mut command = place.namespace.command("setpriv");
        command.args(["--bounding-set=-all", "--inh-caps=-all", BINARY, "--socket-path", arg(&socket)]).args(args);
        let (code, log) = Spawned::refusal(&mut command);
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(wanted), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

/// Packet sockets have batches of their own, which take no io_uring: whether that is to be had makes no difference.
#[test]
fn frames_go_in_batches_where_io_uring_is_forbidden() {
    const TEST: &str = "frames_go_in_batches_where_io_uring_is_forbidden";
    const FRAMES: u32 = 16;
    for (io, batches) in [("auto", true), ("uring", true), ("syscall", false)] {
        let Some(place) = Place::new(TEST) else { return };
        let mut command = place.namespace.command(BINARY);
        let socket = place.socket();
        command.args(["--socket-path", arg(&socket), "--interface", "card", "--io", io]);
        refuse_to(&mut command, libc::SYS_io_uring_setup, libc::EPERM);
        // Of one frame.
        refuse_argument_to(&mut command, libc::SYS_sendmmsg, (2, 1), libc::EPERM);
        let mut backend = Spawned::run(&mut command);
        backend.wait_line("Listening on");
        let mut guest = guest_with(1, CSUM);
        let _front_end = place.connect(&guest);
        let outside = place.outside();

        for seq in 0..FRAMES {
            guest.pairs[0].queue(&VnetHdr::default(), &outward(1, seq, 200));
        }
        guest.pairs[0].tx.publish_and_kick();

        assert!(guest.pairs[0].wait_tx_done(PATIENCE));
        let left = (0..FRAMES).filter(|_| outside.recv(Duration::from_millis(200)).is_some()).count();
        assert_eq!(left, if batches { FRAMES as usize } else { 0 }, "{io}: {}", backend.log());
        assert!(!backend.log().contains("o io_uring"), "{io}: {}", backend.log());
    }
}

/// But for root's rights, which the one that has to take an interface away keeps.
fn assert_nothing_is_warned_of(backend: &Spawned) {
    let log = backend.log();
    assert!(log.lines().all(|line| !line.contains("warn") || line.contains("Sandbox workers")), "{log}");
}
