//! What a TAP that is created gets: a bridge, an owner, a life of its own. An existing one is left as it is.

use nix::sys::signal::Signal;

use crate::common::PATIENCE;
use crate::common::bench::Guest;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::{Place, TAP, assert_frames_pass, wait_until};

/// A place with a bridge, and a veth pair with one end in it; the other is `far`.
pub(crate) fn place_with_bridge() -> Place {
    let place = Place::new();
    for words in [
        "link add br0 type bridge forward_delay 0 mcast_snooping 0",
        "link add far type veth peer name port",
        "link set port master br0",
        "link set far up",
        "link set port up",
        "link set br0 up",
    ] {
        place.namespace.ip(words);
    }
    place
}

/// Whether the TAP's port of the bridge forwards.
pub(crate) fn is_forwarding(place: &Place) -> bool {
    place.namespace.ip("-d link show dev tap0").contains("state forwarding")
}

#[test]
fn created_tap_is_a_port_of_the_bridge_and_outlives_the_process() {
    if !require_root("created_tap_is_a_port_of_the_bridge_and_outlives_the_process") {
        return;
    }
    const OPTIONS: [&str; 7] = ["--bridge", "br0", "--owner", "65533", "--group", "65532", "--persist"];
    let place = place_with_bridge();
    for run in ["Created", "Attached to"] {
        let mut backend = place.start(&OPTIONS);
        assert!(backend.log().contains(&format!("{run} TAP \"tap0\"")), "{}", backend.log());
        assert!(!backend.log().contains("no port of"), "{}", backend.log());
        let mut guest = Guest::new(1, 0);
        let front_end = place.connect(&guest);
        wait_until("the bridge forwards", || is_forwarding(&place));

        assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "far"));

        drop(front_end);
        backend.signal(Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        let shown = place.namespace.ip("tuntap show");
        assert!(shown.contains("tap0: tap") && shown.contains("persist"), "{shown}");
        assert!(shown.contains("user 65533") && shown.contains("group 65532"), "{shown}");
    }
}

#[test]
fn existing_tap_is_left_out_of_the_bridge_with_a_word() {
    if !require_root("existing_tap_is_left_out_of_the_bridge_with_a_word") {
        return;
    }
    let place = place_with_bridge();
    place.namespace.add_tap(&TapSpec::new(TAP));

    let backend = place.start(&["--bridge", "br0"]);

    assert!(backend.log().contains("'ip link set tap0 master br0'"), "{}", backend.log());
    assert!(!place.namespace.ip("link show dev tap0").contains("master"));
}

#[test]
fn bridge_that_is_none_is_refused_and_nothing_is_created() {
    if !require_root("bridge_that_is_none_is_refused_and_nothing_is_created") {
        return;
    }
    let place = place_with_bridge();
    for (bridge, wanted) in [
        ("br1", "--bridge \"br1\": there is no such interface; 'ip link add br1 type bridge"),
        ("lo", "--bridge \"lo\" is a loopback interface, not a bridge"),
        ("far", "--bridge \"far\" is a veth interface, not a bridge"),
    ] {
        let log = place.refusal(&["--tap", TAP, "--bridge", bridge]);
        assert!(log.contains(wanted), "{log}");
    }
    assert!(!place.namespace.ip("link show").contains(TAP));
}
