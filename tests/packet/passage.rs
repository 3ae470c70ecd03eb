//! Frames both ways on each kind of interface, of each size.

use crate::common::PATIENCE;
use crate::common::backend::{Spawned, arg};
use crate::common::bench::Guest;
use crate::common::frames::GUEST_MAC;
use crate::common::frontend::{Answer, RawFrontend};
use crate::common::message::Message;
use crate::common::netns::{NetNs, PacketSocket};
use crate::common::virtio::{VnetHdr, feature};
use crate::{
    CSUM, KINDS, Kind, MAC, Place, TSO, assert_frame_leaves, assert_frames_pass, assert_next_is, guest_with, inward,
    outward,
};

#[test]
fn frames_pass_both_ways_and_in_order_on_each_kind_of_interface() {
    let Some(place) = Place::new("frames_pass_both_ways_and_in_order_on_each_kind_of_interface") else { return };
    for kind in KINDS {
        let name = place.make(kind);
        for (queue_pairs, features) in
            [1, 4].into_iter().flat_map(|pairs| [0, CSUM, TSO].map(|features| (pairs, features)))
        {
            println!("{kind:?}, {queue_pairs} queue pairs, features {features:#x}");
            let backend = place.start(&["--interface", name, "--mac", MAC, "--queue-pairs", &queue_pairs.to_string()]);
            let opened = format!("Opened interface \"{name}\" with {queue_pairs} packet socket(s), address {MAC}");
            assert!(backend.log().contains(&opened), "{}", backend.log());
            let mut guest = guest_with(queue_pairs, features);
            let _front_end = place.connect(&guest);
            let outside = place.outside();
            (0..10).for_each(|seq| assert_frames_pass(&mut guest, &outside, seq));
            (0..queue_pairs).for_each(|pair| assert_frame_leaves(&mut guest, pair, &outside, 100));
            assert_bursts_pass(&mut guest, &outside, 1514);
        }
        place.unmake(kind);
    }
}

/// Many at once, each way.
fn assert_bursts_pass(guest: &mut Guest, outside: &PacketSocket, len: usize) {
    const BURST: u32 = 100;
    (0..BURST).for_each(|seq| outside.send(&inward(3, seq, len)));
    (0..BURST).for_each(|seq| assert_next_is(guest, 0, &inward(3, seq, len)));
    (0..BURST).for_each(|seq| _ = guest.pairs[0].queue(&VnetHdr::default(), &outward(4, seq, len)));
    guest.pairs[0].tx.publish_and_kick();
    for seq in 0..BURST {
        assert!(outside.recv(PATIENCE).expect("a frame of the burst") == outward(4, seq, len), "frame {seq}");
    }
}

#[test]
fn smallest_frames_pass_both_ways() {
    let Some(place) = Place::new("smallest_frames_pass_both_ways") else { return };
    let _backend = place.start(&["--interface", "card"]);
    let mut guest = guest_with(1, CSUM);
    let _front_end = place.connect(&guest);
    // An Ethernet header and a stamp.
    assert_bursts_pass(&mut guest, &place.outside(), 30);
}

#[test]
fn jumbo_frames_pass_both_ways() {
    for kind in [Kind::Veth, Kind::Macvlan("bridge")] {
        let Some(place) = Place::new("jumbo_frames_pass_both_ways") else { return };
        place.set_mtu(9000);
        let name = place.make(kind);
        for features in [0, CSUM] {
            let _backend = place.start(&["--interface", name]);
            let mut guest = guest_with(1, features);
            let front_end = place.connect(&guest);
            assert_eq!(front_end.get_config(10, 2).unwrap(), 9000_u16.to_le_bytes());
            assert_bursts_pass(&mut guest, &place.outside(), 9014);
        }
    }
}

#[test]
fn frame_above_the_mtu_is_dropped_and_counted_and_keeps_back_no_other() {
    let Some(place) = Place::new("frame_above_the_mtu_is_dropped_and_counted_and_keeps_back_no_other") else { return };
    let mut backend = place.start(&["--interface", "card"]);
    let mut guest = guest_with(1, CSUM);
    let _front_end = place.connect(&guest);
    let outside = place.outside();
    for seq in 0..30 {
        let len = if seq % 10 == 5 { 1600 } else { 1000 };
        guest.pairs[0].queue(&VnetHdr::default(), &outward(1, seq, len));
    }
    guest.pairs[0].tx.publish_and_kick();
    for seq in (0..30).filter(|seq| seq % 10 != 5) {
        assert!(outside.recv(PATIENCE).expect("a frame outside") == outward(1, seq, 1000), "frame {seq}");
    }
    backend.wait_counter("tx_drop_refused", 3);
}

/// The header of a frame of ours is shorter on a packet socket, too.
#[test]
fn rarp_frame_that_is_asked_for_comes_out() {
    let Some(place) = Place::new("rarp_frame_that_is_asked_for_comes_out") else { return };
    let _backend = place.start(&["--interface", "card"]);
    let mut guest = guest_with(1, CSUM);
    let front_end = RawFrontend::connect(place.socket()).unwrap();
    front_end.negotiate_like_qemu(&guest.session()).unwrap();
    let outside = place.outside();

    assert_eq!(front_end.ask(Message::send_rarp(GUEST_MAC)), Answer::Ack);

    let frame = outside.recv(PATIENCE).expect("a RARP frame");
    assert_eq!(frame.len(), 60);
    assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &GUEST_MAC[..]));
    assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!(frame[22..42], [&GUEST_MAC[..], &[0; 4], &GUEST_MAC, &[0; 4]].concat());
    assert_frames_pass(&mut guest, &outside, 0);
}

/// The process is in an empty namespace, and its socket is not in any.
#[test]
fn interface_of_another_namespace_is_served_made_and_taken_away() {
    let Some(place) = Place::new("interface_of_another_namespace_is_served_made_and_taken_away") else { return };
    let empty = NetNs::new();
    let path = format!("/run/netns/{}", place.namespace.name);
    for (netns, device) in [
        (&place.namespace.name, &["--interface", "card", "--queue-pairs", "4"][..]),
        (&path, &["--macvlan-parent", "card", "--interface", "made", "--mac", "52:54:00:aa:00:02"]),
    ] {
        let socket = place.socket();
        let mut backend =
            Spawned::start_in(&empty, &[&["--socket-path", arg(&socket), "--netns", netns], device].concat());
        assert_eq!(empty.ip("-br link").lines().count(), 1, "Nothing but lo is here");
        let is_made = device.contains(&"made");
        place.wait_operational(if is_made { "made" } else { "card" });
        let mut guest = guest_with(1, feature::MRG_RXBUF);
        let front_end = place.connect(&guest);
        let outside = place.outside();
        if is_made {
            assert_frame_leaves(&mut guest, 0, &outside, 0);
        } else {
            assert_frames_pass(&mut guest, &outside, 0);
        }
        drop(front_end);
        backend.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());
        assert!(!place.namespace.ip("-br link").contains("made"));
    }
}
