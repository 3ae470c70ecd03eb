//! User Mode Linux with `--front-end generic`: a real driver that hands us the control queue and the configuration
//! space, and whose call descriptor is a pipe.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
use common::guest::{Bench, GUEST, GuestSpec, HOST, TAP, Vmm, require_guest};
use common::netns::PacketSocket;
use common::skip;
use common::transfer::{self, Flood};

const MAC: &str = "52:54:00:aa:bb:cc";
const GENERIC: [&str; 4] = ["--front-end", "generic", "--mac", MAC];

/// Frames of a test's own to these are for nobody.
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 0x77];
const OTHER_GROUP: [u8; 6] = [1, 0, 0x5e, 1, 2, 3];
const OWN: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];
const BROADCAST: [u8; 6] = [0xff; 6];
/// Of these in a row: more than come with a ping.
const FRAMES: u64 = 50;

fn boot(queue_pairs: usize) -> Bench {
    Bench::boot(&GuestSpec { queue_pairs, backend: &GENERIC, ..GuestSpec::new(Vmm::Uml) })
}

/// A small frame of a protocol that nobody speaks (the first of those for experiments).
fn frame_to(mac: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
    let mut frame = [mac, [2, 0, 0, 0, 0, 1]].concat();
    if let Some(id) = vlan {
        frame.extend([0x81, 0x00]);
        frame.extend(id.to_be_bytes());
    }
    frame.extend([0x88, 0xb5]);
    frame.resize(60, 0);
    frame
}

/// Whether the card lets such frames pass to the guest.
fn passes(bench: &mut Bench, mac: [u8; 6], vlan: Option<u16>) -> bool {
    let socket = PacketSocket::open(&bench.namespace, TAP);
    let in_guest = |bench: &mut Bench| bench.guest.number("cat /sys/class/net/eth0/statistics/rx_packets");
    let (before, had) = (bench.counter("rx_drop_filtered"), in_guest(bench));
    for _ in 0..FRAMES {
        socket.send(&frame_to(mac, vlan));
    }
    // The answer to a ping comes behind them.
    bench.assert_reaches_host();
    let (filtered, came) = (bench.counter("rx_drop_filtered") - before, in_guest(bench) - had);
    match (filtered, came >= FRAMES) {
        (0, true) => true,
        (FRAMES, false) => false,
        _ => panic!("{filtered} of {FRAMES} frames were dropped, and {came} frames came to the guest"),
    }
}

#[test]
fn guest_takes_its_mac_from_the_back_end_and_carries_bulk_both_ways() {
    if !require_guest("guest_takes_its_mac_from_the_back_end_and_carries_bulk_both_ways", Vmm::Uml) {
        return;
    }
    let mut bench = boot(1);
    assert_eq!(bench.guest.run("cat /sys/class/net/eth0/address"), MAC);
    let pings = bench.guest.run(&format!("ping -c 5 -i 0.2 -W 2 {HOST}"));
    assert!(pings.contains(" 0% packet loss"), "{pings}");

    transfer::to_guest(&mut bench, 5001, 32, &mut |_| {});
    transfer::to_host(&mut bench, 5002, 32, &mut |_| {});
    // The transfers' nc writes a kilobyte at a time, which a fast host takes one by one: this one writes much at once.
    let _server = transfer::serve_iperf(&bench);
    transfer::iperf(&mut bench, HOST, 1, "");

    for counter in ["rx_large_frames", "tx_large_frames"] {
        assert!(bench.counter(counter) > 16, "{counter}: {}", bench.backend().log());
    }
    bench.assert_sound();
}

#[test]
fn receive_modes_and_addresses_decide_what_reaches_the_guest() {
    if !require_guest("receive_modes_and_addresses_decide_what_reaches_the_guest", Vmm::Uml) {
        return;
    }
    const MACVLAN: &str = "ip link add link eth0 name mv0 address 02:00:00:00:00:77 type macvlan && ip link set mv0 up";
    let mut bench = boot(1);
    bench.guest.run("insmod /lib/modules/macvlan.ko");
    // What is done, and whether frames to somebody else and to another group pass then.
    let steps = [
        ("true", false, false),
        ("ip link set eth0 promisc on", true, true),
        ("ip link set eth0 promisc off", false, false),
        ("ip link set eth0 allmulticast on", false, true),
        ("ip link set eth0 allmulticast off", false, false),
        ("ip maddress add 01:00:5e:01:02:03 dev eth0", false, true),
        (MACVLAN, true, true),
        ("ip maddress del 01:00:5e:01:02:03 dev eth0", true, false),
        ("ip link del mv0", false, false),
    ];
    for (step, other, group) in steps {
        // Changed while traffic flows.
        let flood = Flood::start(&mut bench, 5003, 0);
        bench.guest.run(step);
        flood.assert_flows();
        drop(flood);
        assert_eq!(passes(&mut bench, OTHER, None), other, "{step}");
        assert_eq!(passes(&mut bench, OTHER_GROUP, None), group, "{step}");
        assert!(passes(&mut bench, OWN, None), "{step}");
        assert!(passes(&mut bench, BROADCAST, None), "{step}");
    }
    bench.assert_sound();
}

#[test]
fn mac_that_the_guest_changes_is_the_one_that_passes() {
    if !require_guest("mac_that_the_guest_changes_is_the_one_that_passes", Vmm::Uml) {
        return;
    }
    let mut bench = boot(1);
    // Else the host would learn the new address from the guest at once.
    let host_sends_to = |bench: &Bench, mac| {
        bench.namespace.ip(&format!("neighbour replace {GUEST} lladdr {mac} dev {TAP} nud permanent"));
    };
    host_sends_to(&bench, MAC);
    let flood = Flood::start(&mut bench, 5003, 0);

    let dropped = bench.counter("rx_drop_filtered");
    bench.guest.run("ip link set eth0 address 02:00:00:00:00:77");
    bench.wait_counter_moves("rx_drop_filtered", dropped);
    host_sends_to(&bench, "02:00:00:00:00:77");

    flood.assert_flows();
    drop(flood);
    assert!(passes(&mut bench, OTHER, None));
    assert!(!passes(&mut bench, OWN, None));
    bench.assert_sound();
}

#[test]
fn vlans_that_the_guest_asked_for_pass_and_others_do_not() {
    const TEST: &str = "vlans_that_the_guest_asked_for_pass_and_others_do_not";
    if !require_guest(TEST, Vmm::Uml) {
        return;
    }
    let mut bench = boot(1);
    let modules = "for m in llc stp garp mrp 8021q; do insmod /lib/modules/$m.ko || exit 1; done";
    if bench.guest.try_run(&format!("({modules})")).0 != 0 {
        return skip(TEST, "the guest has no VLAN devices");
    }
    assert!(!passes(&mut bench, OWN, Some(5)));

    let flood = Flood::start(&mut bench, 5003, 0);
    bench.guest.run("ip link add link eth0 name v5 type vlan id 5 && ip link set v5 up");
    flood.assert_flows();
    drop(flood);
    let before = bench.guest.number("cat /sys/class/net/v5/statistics/rx_packets");
    assert!(passes(&mut bench, OWN, Some(5)));
    assert!(!passes(&mut bench, OWN, Some(6)));
    assert!(!passes(&mut bench, OTHER, Some(5)));
    assert!(passes(&mut bench, OWN, None));
    assert_eq!(bench.guest.number("cat /sys/class/net/v5/statistics/rx_packets") - before, FRAMES);

    bench.guest.run("ip link del v5");
    assert!(!passes(&mut bench, OWN, Some(5)));
    bench.assert_sound();
}

#[test]
fn offloads_that_the_guest_switches_off_and_on_follow_under_traffic() {
    if !require_guest("offloads_that_the_guest_switches_off_and_on_follow_under_traffic", Vmm::Uml) {
        return;
    }
    let mut bench = boot(1);
    let flood = Flood::start(&mut bench, 5003, 0);
    for _ in 0..3 {
        bench.guest.run("ethtool -K eth0 rx-gro-hw off");
        // What was on its way has come when some more has.
        flood.assert_flows();
        let before = bench.counter("rx_large_frames");
        flood.assert_flows();
        assert_eq!(bench.counter("rx_large_frames"), before);
        bench.guest.run("ethtool -K eth0 rx-gro-hw on");
        bench.wait_counter_moves("rx_large_frames", before);

        bench.guest.run("ethtool -K eth0 tx off tso off");
        flood.assert_flows();
        let before = bench.counter("tx_large_frames");
        flood.assert_flows();
        assert_eq!(bench.counter("tx_large_frames"), before);
        bench.guest.run("ethtool -K eth0 tx on tso on");
    }
    bench.assert_sound();
}

#[test]
fn queue_pairs_that_the_guest_does_not_use_stay_quiet_under_traffic() {
    const PAIRS: usize = 4;
    if !require_guest("queue_pairs_that_the_guest_does_not_use_stay_quiet_under_traffic", Vmm::Uml) {
        return;
    }
    let mut bench = boot(PAIRS);
    let floods: Vec<_> = (0..2).map(|flow| Flood::start(&mut bench, 5010 + flow, 0)).collect();
    for pairs in [1, 4, 2] {
        transfer::change_queue_pairs(&mut bench, &floods, pairs);
    }
    bench.assert_sound();
}

/// This driver disables its rings when it lets go and describes them anew later: it never asks for a position.
#[test]
fn driver_that_is_unbound_and_bound_finds_its_rings_again() {
    if !require_guest("driver_that_is_unbound_and_bound_finds_its_rings_again", Vmm::Uml) {
        return;
    }
    let mut bench = boot(1);
    bench.assert_reaches_host();
    let device = bench.guest.run("basename $(readlink -f /sys/class/net/eth0/device)");
    for _ in 0..2 {
        bench.guest.run(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_net/unbind"));
        assert_eq!(bench.guest.run("ls -d /sys/class/net/eth* 2>/dev/null | wc -l"), "0");
        bench.guest.run(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_net/bind"));
        bench.guest.run(&format!("ip address add {GUEST}/24 dev eth0 && ip link set eth0 up"));
        bench.assert_reaches_host();
    }
    bench.assert_sound();
}

/// The guest's driver is told by a message of ours on the back-end's channel.
#[test]
fn guest_sees_the_link_of_the_interface() {
    if !require_guest("guest_sees_the_link_of_the_interface", Vmm::Uml) {
        return;
    }
    let mut bench = boot(1);
    bench.assert_reaches_host();
    for _ in 0..2 {
        for (state, carrier) in [("off", "0"), ("on", "1")] {
            bench.namespace.ip(&format!("link set dev tap0 carrier {state}"));
            let shows = format!("[ $(cat /sys/class/net/eth0/carrier) = {carrier} ]");
            bench.guest.run(&format!("until {shows}; do usleep 10000; done"));
        }
        bench.assert_reaches_host();
    }
    bench.assert_sound();
}
