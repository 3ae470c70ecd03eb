//! What happens to the interface while the process runs: link and MTU, which the guest is told of, and its end and its
//! coming back. Real devices in namespaces; needs root, and says SKIPPED aloud without.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::backend::{Spawned, arg, inherit};
use common::bench::Guest;
use common::frames::{Ends, GUEST_MAC as GUEST_MAC_BYTES, L4Csum, Stamp, mac_text, payload, test_frame, udp4};
use common::frontend::{Answer, RawFrontend};
use common::message::Message;
use common::netns::{ChildGuard, NetNs, PacketSocket, TapSpec, require_root};
use common::place::{Place, assert_frames_pass};
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, QUIET, fd_of, skip, wait_readable, wait_until};
use nix::sys::signal::Signal;

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");
const GUEST_MAC: &str = "52:54:00:aa:00:01";
/// `status` and `mtu` in the configuration space.
const STATUS: u32 = 6;
const MTU: u32 = 10;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// A front-end that takes news, with the other end of its channel.
struct Informed {
    front_end: RawFrontend,
    channel: UnixStream,
    guest: Guest,
}

impl Informed {
    fn connect(place: &Place) -> Informed {
        let guest = Guest::new(1, 0);
        let front_end = place.connect(&guest);
        let (channel, theirs) = UnixStream::pair().unwrap();
        assert_eq!(front_end.ask(Message::set_backend_req_fd(theirs.as_fd())), Answer::Ack);
        let mut informed = Informed { front_end, channel, guest };
        // The guest may have been told otherwise by a process before.
        informed.expect_news();
        informed
    }

    fn number(&self, offset: u32) -> u16 {
        u16::from_le_bytes(self.front_end.get_config(offset, 2).unwrap().try_into().unwrap())
    }

    fn expect_news(&mut self) {
        assert!(wait_readable(&self.channel, PATIENCE), "No news");
        let mut bytes = [0; 12];
        self.channel.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, *CONFIG_CHANGE.map(u32::to_ne_bytes).as_flattened());
    }
}

#[test]
fn link_and_mtu_reach_a_front_end_that_takes_news() {
    if !require_root("link_and_mtu_reach_a_front_end_that_takes_news") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let _backend = place.start(&["--tap", "tap0", "--front-end", "generic", "--mac", GUEST_MAC]);
    let mut informed = Informed::connect(&place);
    assert_eq!((informed.number(STATUS), informed.number(MTU)), (1, 1500));
    for (change, status, mtu) in [
        ("down", 0, 1500),
        ("up", 1, 1500),
        ("carrier off", 0, 1500),
        ("carrier on", 1, 1500),
        ("mtu 9000", 1, 9000),
        ("mtu 1400", 1, 1400),
    ] {
        place.namespace.ip(&format!("link set dev tap0 {change}"));
        informed.expect_news();
        assert_eq!((informed.number(STATUS), informed.number(MTU)), (status, mtu), "{change}");
    }
    // The next one finds it as it is.
    place.namespace.ip("link set dev tap0 down");
    informed.expect_news();
    drop(informed);
    let informed = Informed::connect(&place);
    assert_eq!((informed.number(STATUS), informed.number(MTU)), (0, 1400));
}

/// vhost-user, "Suspended device state".
#[test]
fn change_while_no_ring_runs_is_told_once_one_does() {
    if !require_root("change_while_no_ring_runs_is_told_once_one_does") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0", "--front-end", "generic", "--mac", GUEST_MAC]);
    let mut informed = Informed::connect(&place);
    informed.front_end.stop_like_cloud_hypervisor(2).unwrap();
    for (change, status) in [("down", 0), ("up", 1)] {
        place.namespace.ip(&format!("link set dev tap0 {change}"));
        backend.wait_line(&format!("Interface \"tap0\": link {change}; the guest is told once its rings run"));
        assert!(!wait_readable(&informed.channel, QUIET), "{change}");
        assert_eq!(informed.number(STATUS), status);
    }

    let kick = Message::set_vring_kick(0, fd_of(&informed.guest.pairs[0].rx.kick));
    assert_eq!(informed.front_end.ask(kick), Answer::Ack);

    informed.expect_news();
    assert!(!wait_readable(&informed.channel, QUIET), "told once");
}

#[test]
fn front_end_that_takes_no_news_sees_a_link_that_is_up_and_changes_are_counted() {
    if !require_root("front_end_that_takes_no_news_sees_a_link_that_is_up_and_changes_are_counted") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    place.namespace.ip("link set dev tap0 down");
    let mut backend = place.start(&["--tap", "tap0"]);
    let guest = Guest::new(1, 0);
    let front_end = place.connect(&guest);
    assert_eq!(front_end.get_config(STATUS, 2).unwrap(), [1, 0]);
    place.namespace.ip("link set dev tap0 up");
    backend.wait_line("Interface \"tap0\": link up; this front-end has no way to tell the guest");
    place.namespace.ip("link set dev tap0 mtu 1400");
    backend.wait_line("Interface \"tap0\": MTU 1400; this front-end has no way to tell the guest");
    assert_eq!(front_end.get_config(MTU, 2).unwrap(), 1400_u16.to_le_bytes());
    backend.signal(Signal::SIGUSR1);
    backend.wait_line("card link_changes=2 mtu_changes=1 changes_untold=2");
}

#[test]
fn mtu_that_the_operator_chose_stays() {
    if !require_root("mtu_that_the_operator_chose_stays") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0", "--front-end", "generic", "--mac", GUEST_MAC, "--mtu", "1300"]);
    let mut informed = Informed::connect(&place);
    place.namespace.ip("link set dev tap0 mtu 9000");
    // Events come in order.
    place.namespace.ip("link set dev tap0 down");
    informed.expect_news();
    assert_eq!((informed.number(STATUS), informed.number(MTU)), (0, 1300));
    backend.signal(Signal::SIGUSR1);
    backend.wait_line("card link_changes=1 mtu_changes=0");
}

/// F-02
#[test]
fn frames_do_not_pass_without_a_carrier_and_pass_again_with_one() {
    if !require_root("frames_do_not_pass_without_a_carrier_and_pass_again_with_one") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0", "--link", "down"]);
    backend.wait_line("Interface \"tap0\": link down");
    assert!(place.namespace.ip("link show dev tap0").contains("NO-CARRIER"));
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    let host = PacketSocket::open(&place.namespace, "tap0");
    for seq in 0..10 {
        guest.pairs[0].send(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 9, seq }, 100));
    }
    backend.wait_counter("tx_drop_link_down", 10);
    assert!(guest.pairs[0].wait_tx_done(PATIENCE));
    place.namespace.ip("link set dev tap0 carrier on");
    backend.wait_line("Interface \"tap0\": link up");
    place.namespace.wait_operational("tap0");
    assert_frames_pass(&mut guest, &host, 0);
}

#[test]
fn link_option_is_for_devices_whose_carrier_can_be_set() {
    if !require_root("link_option_is_for_devices_whose_carrier_can_be_set") {
        return;
    }
    let place = Place::new();
    let Some(_) = make(&place, "macvtap", 1, "link_option_is_for_devices_whose_carrier_can_be_set") else { return };
    let queue = place.namespace.open_macvtap("dev0");
    let mut command = place.namespace.command(BINARY);
    inherit(&mut command, queue.as_fd(), 20);
    let socket = place.socket();
    let args = ["--socket-path", arg(&socket), "--tap-fd", "20", "--link", "down"];
    let (code, log) = Spawned::refusal(command.args(args));
    assert_eq!(code, Some(1));
    assert!(log.contains("Cannot set the carrier of \"dev0\", which --link asks for"), "{log}");
}

const KINDS: [&str; 4] = ["tap", "macvtap", "macvlan", "veth"];

/// Makes a device of one kind, `dev0`; tells where its frames come out on the host, and the option that names it.
fn make(place: &Place, kind: &str, queue_pairs: usize, test: &str) -> Option<(&'static str, &'static str)> {
    let namespace = &place.namespace;
    if kind == "tap" {
        namespace.add_tap(&TapSpec { multi_queue: queue_pairs > 1, ..TapSpec::new("dev0") });
        return Some(("dev0", "--tap"));
    }
    if kind == "veth" {
        namespace.ip(&format!("link add dev0 address {GUEST_MAC} type veth peer name outside"));
    } else {
        if !namespace.try_ip("link show dev card") {
            namespace.ip("link add card type veth peer name outside");
            namespace.ip("link set card up");
        }
        if !namespace.try_ip(&format!("link add link card name dev0 address {GUEST_MAC} type {kind} mode bridge")) {
            skip(test, &format!("this kernel has no {kind}"));
            return None;
        }
    }
    namespace.ip("link set outside up");
    namespace.ip("link set dev0 up");
    Some(("outside", if kind == "macvtap" { "--macvtap" } else { "--interface" }))
}

/// F-03, F-04: what is deleted is said, its guest's frames are dropped, nobody spins, and one of its name takes its place.
#[test]
fn interface_that_is_deleted_and_made_again_under_load_is_gone_on_with() {
    const TEST: &str = "interface_that_is_deleted_and_made_again_under_load_is_gone_on_with";
    if !require_root(TEST) {
        return;
    }
    for kind in KINDS {
        for queue_pairs in [1, 4] {
            let place = Place::new();
            let Some((outside, option)) = make(&place, kind, queue_pairs, TEST) else { continue };
            let pairs = queue_pairs.to_string();
            let args = [option, "dev0", "--queue-pairs", &pairs, "--on-device-loss", "wait"];
            let mut backend = place.start(&args);
            let mut guest = Guest::new(queue_pairs, feature::MRG_RXBUF);
            guest.pairs.iter_mut().for_each(|pair| pair.post_rx(64, 2048));
            let front_end = place.connect(&guest);
            place.namespace.wait_operational("dev0");
            for round in 0..3_usize {
                let host = PacketSocket::open(&place.namespace, outside);
                assert_every_pair_passes(&mut guest, &host, kind);
                send_burst(&mut guest, round as u32);
                place.namespace.ip("link del dev0");
                assert_quiet_after_loss(&mut backend);
                send_burst(&mut guest, round as u32);
                for pair in &mut guest.pairs {
                    assert!(pair.wait_tx_done(PATIENCE), "{kind}: the guest has its buffers back");
                }
                make(&place, kind, queue_pairs, TEST).unwrap();
                backend.wait_line("Interface \"dev0\" is back; frames pass again");
                place.namespace.wait_operational("dev0");
                wait_until("the link is up", || backend.log().matches("link up").count() > round);
                drain(&mut guest);
            }
            let host = PacketSocket::open(&place.namespace, outside);
            assert_every_pair_passes(&mut guest, &host, kind);
            assert!(front_end.is_alive());
            backend.signal(Signal::SIGTERM);
            assert!(backend.wait_end(PATIENCE).success());
        }
    }
}

/// Frames on all pairs, not waited for.
fn send_burst(guest: &mut Guest, seq: u32) {
    for pair in &mut guest.pairs {
        assert!(pair.wait_tx_done(PATIENCE));
        for _ in 0..20 {
            pair.queue(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 7, seq }, 500));
        }
        pair.tx.publish_and_kick();
    }
}

fn assert_quiet_after_loss(backend: &mut Spawned) {
    backend.wait_line("Interface \"dev0\" was deleted; waiting for one of that name");
    backend.wait_at_rest();
}

/// Takes what came meanwhile.
fn drain(guest: &mut Guest) {
    for pair in &mut guest.pairs {
        while pair.recv(Duration::from_millis(1)).is_some() {
            pair.post_rx(1, 2048);
        }
    }
}

/// All flows arrive in the guest, and frames of each pair outside.
fn assert_every_pair_passes(guest: &mut Guest, host: &PacketSocket, kind: &str) {
    const FLOWS: u16 = 32;
    for flow in 0..FLOWS {
        let ends = Ends { src_port: 1000 + flow, ..Ends::RX };
        host.send(&udp4(&ends, &payload(Stamp { stream: 4, seq: flow.into() }, 100), L4Csum::Full));
    }
    let deadline = Instant::now() + PATIENCE;
    let mut came = 0;
    while came < FLOWS {
        assert!(Instant::now() < deadline, "{kind}: {came} of {FLOWS} flows");
        for pair in &mut guest.pairs {
            while pair.recv(Duration::from_millis(1)).is_some() {
                pair.post_rx(1, 2048);
                came += 1;
            }
        }
    }
    for (index, pair) in guest.pairs.iter_mut().enumerate() {
        let out = test_frame(&Ends::TX, Stamp { stream: 5, seq: index as u32 }, 200);
        pair.send(&VnetHdr::default(), &out);
        assert_eq!(host.recv(PATIENCE).expect("a frame outside"), out);
    }
}

#[test]
fn interface_that_is_made_here_comes_back_with_what_it_was_made_on() {
    const TEST: &str = "interface_that_is_made_here_comes_back_with_what_it_was_made_on";
    if !require_root(TEST) {
        return;
    }
    for (parent, name) in [("--macvtap-parent", "--macvtap"), ("--macvlan-parent", "--interface")] {
        let place = Place::new();
        place.make_card();
        if !place.namespace.try_ip("link add link card name probe type macvtap") {
            return skip(TEST, "this kernel has no MACVTAP");
        }
        place.namespace.ip("link del probe");
        let mut backend = place.start(&[parent, "card", name, "made", "--mac", GUEST_MAC, "--on-device-loss", "wait"]);
        let mut guest = Guest::new(1, feature::MRG_RXBUF);
        guest.pairs[0].post_rx(64, 2048);
        let _front_end = place.connect(&guest);
        place.namespace.wait_operational("made");
        for seq in 0..2 {
            assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "outside"), seq);
            place.namespace.ip("link del card");
            backend.wait_line("was deleted; waiting for one of that name");
            place.make_card();
            backend.wait_line("is back; frames pass again");
            place.namespace.wait_operational("made");
        }
        assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "outside"), 2);
        backend.signal(Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        assert!(!place.namespace.ip("-br link").contains("made"), "It is taken away");
    }
}

/// What is made and taken away again by an attempt that fails is news of interfaces too, and not a reason for the next.
#[test]
fn interface_that_cannot_be_made_again_is_tried_at_intervals_and_the_process_can_be_ended() {
    const TEST: &str = "interface_that_cannot_be_made_again_is_tried_at_intervals_and_the_process_can_be_ended";
    const ATTEMPTS: usize = 5;
    /// As `src/daemon/following.rs` has it.
    const RETRY_INTERVAL: Duration = Duration::from_millis(200);
    for (parent, name) in [("--macvtap-parent", "--macvtap"), ("--macvlan-parent", "--interface")] {
        let Some(place) = Place::with_card(TEST) else { return };
        let set_mtu = || place.namespace.ip("link set card mtu 9000");
        set_mtu();
        let args = [parent, "card", name, "made", "--mtu", "9000", "--on-device-loss", "wait"];
        for way_out in ["link set card mtu 9000", ""] {
            let mut backend = place.start(&args);
            place.namespace.ip("link del card");
            backend.wait_line("was deleted; waiting for one of that name");
            let news = LinkNews::begin(&place);
            let began = Instant::now();
            place.make_card();
            backend.wait_line("cannot be opened again yet: Cannot give");
            wait_until("it was tried again and again", || news.removals("made") >= ATTEMPTS);
            // A busy machine makes this longer, never shorter.
            let (took, least) = (began.elapsed(), RETRY_INTERVAL * (ATTEMPTS as u32 - 1));
            assert!(took >= least, "{ATTEMPTS} attempts within {took:?}");
            if way_out.is_empty() {
                backend.signal(Signal::SIGTERM);
                assert!(backend.wait_end(PATIENCE).success());
                set_mtu();
            } else {
                place.namespace.ip(way_out);
                backend.wait_line("Interface \"made\" is back; frames pass again");
            }
        }
    }
}

/// What happens to interfaces of a namespace, as `ip monitor` tells it.
struct LinkNews {
    _monitor: ChildGuard,
    told: Arc<Mutex<String>>,
}

impl LinkNews {
    fn begin(place: &Place) -> LinkNews {
        let mut command = place.namespace.command("ip");
        let mut monitor = command.args(["monitor", "link"]).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
        let told = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&told);
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| kept.lock().unwrap().push_str(&line)));
        let news = LinkNews { _monitor: ChildGuard(monitor), told };
        // It listens once it tells of something.
        wait_until("ip monitor listens", || {
            let namespace = &place.namespace;
            namespace.ip("link add probe type bridge");
            namespace.ip("link del probe");
            news.count("probe") > 0
        });
        news
    }

    /// How often an interface was taken away.
    fn removals(&self, name: &str) -> usize {
        let told = self.told.lock().unwrap();
        let removed = told.split("Deleted ").skip(1).filter_map(|event| event.split(' ').nth(1));
        removed.filter(|removed| removed.split(['@', ':']).next() == Some(name)).count()
    }

    /// How often an interface was spoken of.
    fn count(&self, name: &str) -> usize {
        let told = self.told.lock().unwrap();
        // One that is on another has that behind an @.
        told.matches(&format!(" {name}@")).count() + told.matches(&format!(" {name}:")).count()
    }
}

/// The guest keeps the address that it was told, and goes on receiving.
#[test]
fn interface_that_is_made_again_has_the_address_that_the_guest_was_told() {
    const TEST: &str = "interface_that_is_made_again_has_the_address_that_the_guest_was_told";
    for (parent, name) in [("--macvtap-parent", "--macvtap"), ("--macvlan-parent", "--interface")] {
        for mode in ["bridge", "vepa", "private"] {
            let Some(place) = Place::with_card(TEST) else { return };
            let option = parent.replace("parent", "mode");
            let args = [parent, "card", &option, mode, name, "made", "--on-device-loss", "wait"];
            let mut backend = place.start(&args);
            let mut guest = Guest::new(1, feature::MRG_RXBUF);
            guest.pairs[0].post_rx(64, 2048);
            let front_end = place.connect(&guest);
            let told: [u8; 6] = front_end.get_config(0, 6).unwrap().try_into().unwrap();
            for seq in 0..3 {
                if seq > 0 {
                    place.namespace.ip("link del card");
                    backend.wait_line("was deleted; waiting for one of that name");
                    place.make_card();
                    backend.wait_line("is back; frames pass again");
                }
                place.namespace.wait_operational("made");
                let shown = place.namespace.ip("link show dev made");
                assert!(shown.contains(&mac_text(told)), "{mode}: the guest was told {told:02x?}, and it is {shown}");
                let frame = test_frame(&Ends { dst_mac: told, ..Ends::RX }, Stamp { stream: 2, seq }, 200);
                place.outside().send(&frame);
                assert_eq!(guest.pairs[0].recv(PATIENCE).expect("a frame in the guest").1, frame);
            }
            assert_eq!(front_end.get_config(0, 6).unwrap(), told);
        }
    }
}

/// A guest that runs keeps the address that it was told; those that come later are told the new one.
#[test]
fn interface_that_comes_back_with_another_address_is_warned_of_and_later_guests_are_told_it() {
    const TEST: &str = "interface_that_comes_back_with_another_address_is_warned_of_and_later_guests_are_told_it";
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    for (kind, option) in [("macvtap", "--macvtap"), ("macvlan", "--interface")] {
        for chosen in [false, true] {
            let Some(place) = Place::with_card(TEST) else { return };
            place.add_on_card(kind, "dev0", "bridge", GUEST_MAC);
            let mac: &[&str] = if chosen { &["--mac", GUEST_MAC] } else { &[] };
            let mut backend = place.start(&[&[option, "dev0", "--on-device-loss", "wait"], mac].concat());
            let guest = Guest::new(1, 0);
            let front_end = place.connect(&guest);
            assert_eq!(front_end.get_config(0, 6).unwrap(), GUEST_MAC_BYTES);
            place.namespace.ip("link del dev0");
            backend.wait_line("was deleted; waiting for one of that name");
            place.add_on_card(kind, "dev0", "bridge", &mac_text(OTHER));
            if !chosen {
                backend.wait_line(
                    "Interface \"dev0\" has address 52:54:00:12:34:56 now, and guests were told 52:54:00:aa:00:01",
                );
            }
            backend.wait_line("is back; frames pass again");
            assert_eq!(front_end.get_config(0, 6).unwrap(), GUEST_MAC_BYTES);
            drop(front_end);
            let wanted = if chosen { GUEST_MAC_BYTES } else { OTHER };
            assert_eq!(place.connect(&guest).get_config(0, 6).unwrap(), wanted, "{kind}");
        }
    }
}

/// Of a TAP as it is opened by its name.
const TAP_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

#[test]
fn interface_that_comes_back_before_it_can_be_opened_is_tried_again() {
    if !require_root("interface_that_comes_back_before_it_can_be_opened_is_tried_again") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0", "--on-device-loss", "wait"]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    place.namespace.ip("link del tap0");
    backend.wait_line("was deleted; waiting");
    place.namespace.ip("tuntap add dev tap0 mode tun");
    backend.wait_line("cannot be opened again yet: Interface \"tap0\" is a TUN interface, not a TAP");
    place.namespace.ip("link del tap0");
    let busy = place.namespace.open_tun("tap0", TAP_FLAGS);
    backend.wait_line("cannot be opened again yet: Cannot attach to TAP \"tap0\" (queue 0)");
    place.namespace.ip("link set dev tap0 up");
    drop(busy);
    // It went with its last descriptor, so none of that name is there to be opened. Nor is one to be made, also where it
    // goes between the look at it and the opening.
    for _ in 0..100 {
        if let Ok(_short) = place.namespace.try_open_tun("tap0", TAP_FLAGS) {
            place.namespace.try_ip("link set dev tap0 up");
        }
    }
    wait_until("the name is free", || place.namespace.try_ip("tuntap add dev tap0 mode tap vnet_hdr"));
    place.namespace.ip("link set dev tap0 up");
    backend.wait_line("Interface \"tap0\" is back; frames pass again");
    assert!(!backend.log().contains("Created"), "{}", backend.log());
    place.namespace.wait_operational("tap0");
    assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "tap0"), 0);
}

#[test]
fn process_that_is_to_end_with_its_interface_says_so_with_status_75() {
    const TEST: &str = "process_that_is_to_end_with_its_interface_says_so_with_status_75";
    if !require_root(TEST) {
        return;
    }
    // In the sandbox there is no other way.
    let ways = [&["--on-device-loss", "exit", "--sandbox", "off"][..], &[]];
    for (kind, more) in KINDS.into_iter().flat_map(|kind| ways.map(|more| (kind, more))) {
        let place = Place::new();
        let Some((_, option)) = make(&place, kind, 1, TEST) else { continue };
        let mut backend = place.start(&[&[option, "dev0"], more].concat());
        let guest = Guest::new(1, 0);
        let _front_end = place.connect(&guest);
        place.namespace.ip("link del dev0");
        assert_eq!(backend.wait_end(PATIENCE).code(), Some(75), "{kind}: {}", backend.log());
        backend.wait_line("vhost-user-net: Interface \"dev0\" was deleted");
        assert!(!place.socket().exists(), "The socket is removed");
    }
}

/// Where netlink is out of reach: descriptors of another namespace's TAP.
#[test]
fn passed_descriptor_whose_interface_is_deleted_elsewhere_is_noticed() {
    if !require_root("passed_descriptor_whose_interface_is_deleted_elsewhere_is_noticed") {
        return;
    }
    let place = Place::new();
    let elsewhere = NetNs::new();
    // Of the same name, and nothing to do with it.
    place.namespace.add_tap(&TapSpec::new("tap0"));
    place.namespace.ip("link set dev tap0 down");
    // More frames than the guest has buffers: those wait in the TAP, and what else comes wakes nobody.
    let cases = [(None, 75, 0), (Some("exit"), 75, 400), (Some("wait"), 0, 0), (Some("wait"), 0, 400)];
    // Who lacks the right may not ask whose a TAP is.
    for (right, (policy, code, frames)) in
        ["-mknod", "-net_admin"].into_iter().flat_map(|right| cases.map(|case| (right, case)))
    {
        elsewhere.add_tap(&TapSpec::new("tap0"));
        let queue = elsewhere.open_tap("tap0", false);
        elsewhere.wait_operational("tap0");
        let socket = place.socket();
        let mut command = place.namespace.command("setpriv");
        command.args(["--bounding-set", right, BINARY]);
        command.args(["--socket-path", arg(&socket), "--tap-fd", "20"]);
        command.args(policy.iter().flat_map(|policy| ["--on-device-loss", policy]));
        inherit(&mut command, queue.fd.as_fd(), 20);
        let mut backend = Spawned::run(&mut command);
        backend.wait_line("Listening on");
        drop(queue);
        let mut guest = Guest::new(1, 0);
        let _front_end = place.connect(&guest);
        let host = PacketSocket::open(&elsewhere, "tap0");
        assert_frames_pass(&mut guest, &host, 0);
        (0..frames).for_each(|seq| host.send(&test_frame(&Ends::RX, Stamp { stream: 8, seq }, 100)));
        elsewhere.ip("link del tap0");
        if policy == Some("wait") {
            backend.wait_line("was deleted; to go on, make it anew and start this process again");
            guest.pairs[0].send(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 9, seq: 0 }, 100));
            backend.wait_counter("tx_drop_link_down", 1);
            backend.signal(Signal::SIGTERM);
        }
        assert_eq!(backend.wait_end(PATIENCE).code(), Some(code), "{}", backend.log());
    }
}

/// F-13
#[test]
fn tap_that_is_moved_to_another_namespace_goes_on() {
    if !require_root("tap_that_is_moved_to_another_namespace_goes_on") {
        return;
    }
    let place = Place::new();
    let elsewhere = NetNs::new();
    place.namespace.add_tap(&TapSpec::new("tap0"));
    let mut backend = place.start(&["--tap", "tap0"]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "tap0"), 0);
    place.namespace.ip(&format!("link set dev tap0 netns {}", elsewhere.name));
    backend.wait_line("Interface \"tap0\" was moved to another network namespace");
    elsewhere.ip("link set dev tap0 up");
    elsewhere.wait_operational("tap0");
    assert_frames_pass(&mut guest, &PacketSocket::open(&elsewhere, "tap0"), 1);
    elsewhere.ip("link del tap0");
    backend.wait_line("Interface \"tap0\" was deleted");
}
