//! Linux in an emulated QEMU, with QEMU's own front-end: everything from the driver to the TAP is real.
#![allow(clippy::unwrap_used)]

mod common;
use common::guest::{Bench, GUEST, GuestSpec, HOST, Vmm, require_guest, vectors};
use common::netns::{NetNs, TapSpec};
use common::transfer::{self, Flood};

fn nothing(_: &mut Bench) {}

/// Traffic both ways, whose content is checked.
fn assert_bulk_passes(bench: &mut Bench, mib: usize) {
    transfer::to_guest(bench, 5001, mib, &mut nothing);
    transfer::to_host(bench, 5002, mib, &mut nothing);
}

#[test]
fn guest_pings_and_leaves_segments_and_checksums_to_the_host() {
    if !require_guest("guest_pings_and_leaves_segments_and_checksums_to_the_host", Vmm::Qemu) {
        return;
    }
    let mut bench = Bench::boot(&GuestSpec::new(Vmm::Qemu));
    let pings = bench.guest.run(&format!("ping -c 5 -i 0.2 -W 2 {HOST}"));
    assert!(pings.contains(" 0% packet loss"), "{pings}");

    assert_bulk_passes(&mut bench, 32);
    // Whose nc writes a kilobyte at a time, which may go out one by one: this one writes much at once.
    let _server = transfer::serve_iperf(&bench);
    transfer::iperf(&mut bench, HOST, 1, "");

    let offloads = bench.guest.run("ethtool -k eth0");
    for offload in ["rx-checksumming", "tx-checksumming", "tcp-segmentation-offload"] {
        assert!(offloads.contains(&format!("{offload}: on")), "{offload}: {offloads}");
    }
    for counter in ["rx_large_frames", "tx_large_frames"] {
        // 32 MiB are 23,000 frames of the usual size, and 512 of the largest.
        assert!(bench.counter(counter) > 256, "{counter}: {}", bench.backend().log());
    }
    bench.assert_sound();
}

#[test]
fn back_end_killed_and_restarted_twice_each_way_loses_no_byte_of_a_transfer() {
    if !require_guest("back_end_killed_and_restarted_twice_each_way_loses_no_byte_of_a_transfer", Vmm::Qemu) {
        return;
    }
    let mut bench = Bench::boot(&GuestSpec::new(Vmm::Qemu));
    let mut off_base = 0;
    let mut quarter = 0;
    let mut kill_and_restart = |bench: &mut Bench| {
        quarter += 1;
        if quarter % 3 != 0 {
            off_base += bench.counter("rings_resumed_off_base");
            bench.assert_sound();
            bench.kill_backend();
            bench.start_backend();
        }
    };
    transfer::to_guest(&mut bench, 5001, 16, &mut kill_and_restart);
    transfer::to_host(&mut bench, 5002, 16, &mut kill_and_restart);
    common::say(&format!("Rings that carried on off their base: {off_base}"));
    bench.assert_sound();
}

#[test]
fn driver_unbound_and_bound_again_brings_the_network_back() {
    if !require_guest("driver_unbound_and_bound_again_brings_the_network_back", Vmm::Qemu) {
        return;
    }
    let mut bench = Bench::boot(&GuestSpec::new(Vmm::Qemu));
    let device = bench.guest.run("basename $(readlink -f /sys/class/net/eth0/device)");
    for port in [5003, 5004, 5005] {
        // In the middle of traffic: the rings are taken away with frames on them.
        let _flood = Flood::start(&mut bench, port, 0);
        bench.guest.run(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_net/unbind"));
        assert_eq!(bench.guest.run("ls -d /sys/class/net/eth* 2>/dev/null | wc -l"), "0");
        bench.guest.run(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_net/bind"));
        bench.guest.run(&format!("ip address add {GUEST}/24 dev eth0 && ip link set eth0 up"));
        bench.assert_reaches_host();
    }
    assert_bulk_passes(&mut bench, 4);
    bench.assert_sound();
}

#[test]
fn guest_that_reboots_or_is_reset_comes_back_on_the_same_back_end() {
    if !require_guest("guest_that_reboots_or_is_reset_comes_back_on_the_same_back_end", Vmm::Qemu) {
        return;
    }
    let mut bench = Bench::boot(&GuestSpec::new(Vmm::Qemu));
    assert_bulk_passes(&mut bench, 4);
    let frames = bench.counter("rx_frames");

    bench.guest.begin("reboot -f");
    bench.guest.wait_ready();
    bench.assert_reaches_host();

    // Without the guest's leave, and in the middle of traffic.
    let flood = Flood::start(&mut bench, 5003, 0);
    bench.qmp("system_reset");
    drop(flood);
    bench.guest.wait_ready();
    bench.assert_reaches_host();

    assert_bulk_passes(&mut bench, 4);
    assert!(bench.counter("rx_frames") > frames, "the back-end is another one");
    bench.assert_sound();
}

#[test]
fn each_of_four_queue_pairs_carries_traffic_and_the_guest_changes_their_number() {
    const PAIRS: usize = 4;
    if !require_guest("each_of_four_queue_pairs_carries_traffic_and_the_guest_changes_their_number", Vmm::Qemu) {
        return;
    }
    let mut bench = Bench::boot(&GuestSpec { queue_pairs: PAIRS, ..GuestSpec::new(Vmm::Qemu) });
    // One on each processor: the guest's driver sends on the processor's own queue.
    let floods: Vec<_> = (0..PAIRS).map(|cpu| Flood::start(&mut bench, 5010 + cpu as u16, cpu)).collect();
    for counter in ["rx_frames", "tx_frames", "rx_large_frames", "tx_large_frames"] {
        let counts = bench.counters(counter);
        assert!(counts.iter().all(|count| *count > 0), "{counter}: {counts:?}");
    }

    for pairs in [1, 4, 2, 3, 1, 4] {
        transfer::change_queue_pairs(&mut bench, &floods, pairs);
    }
    bench.assert_sound();
}

#[test]
fn throughput_is_printed_beside_that_of_qemus_own_tap() {
    const QEMUS_HOST: &str = "10.98.0.1";
    const ROUNDS: u32 = 3;
    // One shows that frames flow, all of them what the figures are worth.
    let rounds = common::times(1, ROUNDS);
    if !require_guest("throughput_is_printed_beside_that_of_qemus_own_tap", Vmm::Qemu) {
        return;
    }
    let namespace = NetNs::new();
    namespace.add_tap(&TapSpec { addr: Some("10.98.0.1/24"), ..TapSpec::new("tap1") });
    let device = format!("virtio-net-pci,netdev=net1,romfile=,rx_queue_size=1024,vectors={}", vectors(1));
    let qemu = ["-netdev", "tap,id=net1,ifname=tap1,script=no,downscript=no,vhost=off", "-device", &device];
    let mut bench = Bench::boot_in(namespace, &GuestSpec { qemu: &qemu, alone: true, ..GuestSpec::new(Vmm::Qemu) });
    bench.guest.run("ip address add 10.98.0.2/24 dev eth1 && ip link set eth1 up");
    let _server = transfer::serve_iperf(&bench);

    for (what, options) in [
        ("TCP to the host", ""),
        ("TCP to the guest", "-R"),
        ("UDP to the host", "-u -b 0"),
        // More than it takes, but not so much that it does nothing any more than take interrupts.
        ("UDP to the guest", "-u -b 700M -R"),
    ] {
        let (mut ours, mut qemus, mut round) = (0.0, 0.0, 0);
        // In turns: what else the machine does troubles both. On a busy one there may be a second without a frame.
        while round < rounds || (ours == 0.0 && round < ROUNDS) {
            ours += transfer::iperf(&mut bench, HOST, 1, options);
            qemus += transfer::iperf(&mut bench, QEMUS_HOST, 1, options);
            round += 1;
        }
        let ratio = ours / qemus;
        let [ours, qemus] = [ours, qemus].map(|sum| sum / f64::from(round));
        common::say(&format!("{what}: {ours:.0} Mbit/s, QEMU's own tap {qemus:.0}: ratio {ratio:.2}"));
        assert!(ours > 0.0, "{what}: nothing arrived");
    }
    bench.assert_sound();
}
