//! An interface that goes down and comes up, or is deleted.

use std::time::Instant;

use nix::sys::signal::Signal;

use crate::common::PATIENCE;
use crate::common::backend::{Spawned, arg};
use crate::common::bench::Guest;
use crate::common::netns::NetNs;
use crate::common::virtio::VnetHdr;
use crate::spread::assert_flows_arrive;
use crate::{CSUM, Kind, Place, assert_frames_pass, assert_next_is, fill, guest_with, inward, outward};

/// The sockets are taken out of their group and put back: some pairs are without buffers, so their order shows.
#[test]
fn frames_are_dropped_and_counted_while_the_interface_is_down_and_pass_when_it_is_up() {
    for (kind, filled) in [
        (Kind::Veth, &[0][..]),
        (Kind::Veth, &[0, 1, 3]),
        (Kind::Macvlan("bridge"), &[0]),
        (Kind::Macvlan("bridge"), &[0, 2]),
    ] {
        let Some(place) =
            Place::new("frames_are_dropped_and_counted_while_the_interface_is_down_and_pass_when_it_is_up")
        else {
            return;
        };
        let queue_pairs = if filled.len() == 1 { 1 } else { 4 };
        let name = place.make(kind);
        let mut backend = place.start(&["--interface", name, "--queue-pairs", &queue_pairs.to_string()]);
        let mut guest = Guest::new(queue_pairs, CSUM);
        filled.iter().for_each(|pair| fill(&mut guest, *pair, CSUM));
        let _front_end = place.connect(&guest);
        let outside = place.outside();
        assert_frames_pass(&mut guest, &outside, 0);
        for round in 1..=2 {
            place.namespace.ip(&format!("link set {name} down"));
            for pair in &mut guest.pairs {
                (0..10).for_each(|seq| _ = pair.send(&VnetHdr::default(), &outward(3, seq, 100)));
                assert!(pair.wait_tx_done(PATIENCE), "The guest has its buffers back");
            }
            backend.wait_at_rest();
            for counters in backend.counters(queue_pairs) {
                assert_eq!(counters["tx_drop_link_down"], 10 * round);
            }

            place.namespace.ip(&format!("link set {name} up"));
            place.wait_operational(name);
            // Until it heard of that the back-end drops what the guest sends.
            backend.wait_line("link up");

            assert_frames_pass(&mut guest, &outside, round as u32);
            assert_eq!(assert_flows_arrive(&mut guest, &outside, filled), filled);
        }
    }
}

/// The kernel tells first that the interface is down, then gives what came before.
#[test]
fn frames_that_came_before_the_interface_went_down_arrive() {
    let Some(place) = Place::new("frames_that_came_before_the_interface_went_down_arrive") else { return };
    let _backend = place.start(&["--interface", "card"]);
    let mut guest = Guest::new(1, CSUM);
    let _front_end = place.connect(&guest);
    let outside = place.outside();
    (0..5).for_each(|seq| outside.send(&inward(1, seq, 300)));
    let deadline = Instant::now() + PATIENCE;
    while place.namespace.statistic("card", "rx_packets") < 5 {
        assert!(Instant::now() < deadline, "The interface does not have its frames");
        std::thread::yield_now();
    }
    place.namespace.ip("link set card down");

    fill(&mut guest, 0, CSUM);

    (0..5).for_each(|seq| assert_next_is(&mut guest, 0, &inward(1, seq, 300)));
}

#[test]
fn one_that_was_down_at_the_start_is_warned_of_and_works_once_it_is_up() {
    let Some(place) = Place::new("one_that_was_down_at_the_start_is_warned_of_and_works_once_it_is_up") else { return };
    place.namespace.ip("link set card down");
    let mut backend = place.start(&["--interface", "card"]);
    assert!(backend.log().contains("is down, no frames will pass: 'ip link set card up'"), "{}", backend.log());
    let mut guest = guest_with(1, CSUM);
    let _front_end = place.connect(&guest);
    place.namespace.ip("link set card up");
    place.wait_operational("card");
    backend.wait_line("link up");
    assert_frames_pass(&mut guest, &place.outside(), 0);
}

#[test]
fn deleted_interface_is_noticed_and_leaves_a_quiet_process_that_ends_when_told() {
    for (kind, is_elsewhere) in [(Kind::Veth, false), (Kind::Macvlan("bridge"), false), (Kind::Veth, true)] {
        let Some(place) = Place::new("deleted_interface_is_noticed_and_leaves_a_quiet_process_that_ends_when_told")
        else {
            return;
        };
        let name = place.make(kind);
        let empty = NetNs::new();
        let socket = place.socket();
        let args = ["--socket-path", arg(&socket), "--netns", &place.namespace.name, "--interface", name];
        let args = [&args[..], &["--queue-pairs", "2", "--on-device-loss", "wait"]].concat();
        let mut backend = Spawned::start_in(if is_elsewhere { &empty } else { &place.namespace }, &args);
        let mut guest = guest_with(2, CSUM);
        let front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &place.outside(), 0);

        place.namespace.ip(&format!("link del {name}"));

        backend.wait_line(&format!("Interface {name:?} was deleted"));
        (0..10).for_each(|seq| _ = guest.pairs[1].send(&VnetHdr::default(), &outward(3, seq, 100)));
        backend.wait_at_rest();
        assert!(front_end.is_alive(), "The control plane answers");
        backend.signal(Signal::SIGTERM);
        assert_eq!(backend.wait_end(PATIENCE).code(), Some(0));
    }
}
