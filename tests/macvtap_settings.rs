//! What this process sets of a MACVTAP, by its effect. Needs root and a kernel with MACVTAP; says SKIPPED aloud without.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use common::backend::{Spawned, arg, inherit};
use common::bench::Guest;
use common::frames::{self, Ends, L4Csum, Stamp, payload, test_frame};
use common::place::{Place, assert_frames_pass};
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, QUIET, skip};

const GUEST_MAC: &str = "52:54:00:aa:00:01";

/// IPv6 in the guest asks for its neighbours in groups that nobody on the host joins.
#[test]
fn frames_to_all_groups_come_by_an_interface_that_is_made_here() {
    const GROUPS: u8 = 8;
    let Some(place) = Place::with_card("frames_to_all_groups_come_by_an_interface_that_is_made_here") else { return };
    let outside = place.outside();
    let to_group = |group| {
        let ends = Ends { dst_mac: [0x33, 0x33, 0xff, 0, group, 1], ..Ends::RX };
        frames::udp6(&ends, &payload(Stamp { stream: 6, seq: group.into() }, 100), L4Csum::Full)
    };
    // How many come of one frame to each: the kernel tells groups apart by few bits.
    let come = |options: &[&str], patience| {
        let _backend = place.start(options);
        let mut guest = Guest::new(1, feature::MRG_RXBUF);
        guest.pairs[0].post_rx(64, 2048);
        let _front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &outside, 0);
        (0..GROUPS).for_each(|group| outside.send(&to_group(group)));
        let frames = std::iter::from_fn(|| Some(guest.pairs[0].recv(patience)?.1));
        frames.filter(|frame| (0..GROUPS).any(|group| *frame == to_group(group))).take(GROUPS.into()).count()
    };

    let made = come(&["--macvtap-parent", "card", "--macvtap", "made", "--mac", GUEST_MAC], PATIENCE);

    assert_eq!(made, usize::from(GROUPS));
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    assert!(come(&["--macvtap", "mvt0"], QUIET) < usize::from(GROUPS), "what the operator made is left as it is");
    place.namespace.ip("link set mvt0 allmulticast on");
    assert_eq!(come(&["--macvtap", "mvt0"], PATIENCE), usize::from(GROUPS));
}

/// What a slow card cannot send at once waits in its queueing discipline, and not in the guest's ring.
#[test]
fn send_limit_of_a_passed_descriptor_is_lifted() {
    const TEST: &str = "send_limit_of_a_passed_descriptor_is_lifted";
    let Some(place) = Place::with_card(TEST) else { return };
    // A frame in half a second.
    let slow = "qdisc add dev card root tbf rate 16kbit burst 2000 limit 1000000";
    if !place.namespace.command("tc").args(slow.split(' ')).status().is_ok_and(|status| status.success()) {
        return skip(TEST, "this kernel, or this machine, has no token bucket filter (tc)");
    }
    place.add_on_card("macvtap", "mvt0", "bridge", GUEST_MAC);
    let queue = place.namespace.open_macvtap("mvt0");
    let limit: libc::c_int = 6000;
    // SAFETY: TUNSETSNDBUF reads one int, which outlives the call.
    let set = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETSNDBUF, &raw const limit) };
    assert_eq!(set, 0, "TUNSETSNDBUF: {}", std::io::Error::last_os_error());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-net"));
    inherit(&mut command, queue.as_fd(), 20);
    let mut backend = Spawned::run(command.args(["--socket-path", arg(&place.socket()), "--tap-fd", "20"]));
    backend.wait_line("Listening on");
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    let driver = &mut guest.pairs[0];

    for seq in 0..100 {
        driver.queue(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 1, seq }, 1000));
    }
    driver.tx.publish_and_kick();

    assert!(driver.wait_tx_done(PATIENCE), "The guest waits for the card");
    let counters = &backend.counters(1)[0];
    assert_eq!(counters["tx_frames"], 100, "{counters:?}");
}
