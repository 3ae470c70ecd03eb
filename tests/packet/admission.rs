//! Which frames come to the guest.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::common::PATIENCE;
use crate::common::bench::Guest;
use crate::common::frames::{self, BROADCAST, Ends, GUEST_MAC, L4Csum, Mac, Stamp, find_stamp, payload, test_frame};
use crate::common::netns::PacketSocket;
use crate::{CSUM, Kind, MAC, Place, guest_with};

const OTHER: Mac = [0x52, 0x54, 0, 0xaa, 0, 9];
/// Of mDNS over IPv6, and of a spanning tree.
const GROUPS: [Mac; 2] = [[0x33, 0x33, 0, 0, 0, 0xfb], [1, 0x80, 0xc2, 0, 0, 0]];

/// Sends a frame to each address, and once as many came as are `wanted` one to the guest; tells which came before that.
fn which_come(guest: &mut Guest, outside: &PacketSocket, addresses: &[Mac], wanted: usize) -> BTreeSet<Mac> {
    let send = |dst_mac| outside.send(&test_frame(&Ends { dst_mac, ..Ends::RX }, Stamp { stream: 5, seq: 0 }, 100));
    addresses.iter().for_each(|address| send(*address));
    let mut next = || -> Mac {
        let (_, frame) = guest.pairs[0].recv(PATIENCE).expect("a frame");
        frame[..6].try_into().unwrap()
    };
    // A MACVLAN gives frames to groups a moment later than others.
    let mut came: BTreeSet<_> = (0..wanted).map(|_| next()).collect();
    send(GUEST_MAC);
    came.extend(std::iter::repeat_with(next).take_while(|address| *address != GUEST_MAC));
    came
}

#[test]
fn frames_to_the_guest_and_to_groups_come_and_all_where_asked_for() {
    let every = [OTHER, BROADCAST, GROUPS[0], GROUPS[1]];
    let groups = [BROADCAST, GROUPS[0], GROUPS[1]];
    let promiscuous: &[&str] = &["--promiscuous"];
    for (kind, how, wanted) in [
        (Kind::Veth, &[][..], &groups[..]),
        (Kind::Veth, &["--mac", MAC], &groups),
        (Kind::Veth, promiscuous, &every),
        (Kind::Macvlan("bridge"), &[], &groups),
        // It cannot have another one's.
        (Kind::Macvlan("bridge"), promiscuous, &groups),
        // What is for its parent is for the guest.
        (Kind::Macvlan("passthru"), &[], &every),
        (Kind::Macvlan("passthru"), &["--mac", MAC], &groups),
        (Kind::Macvlan("passthru"), promiscuous, &every),
    ] {
        for queue_pairs in [1, 4] {
            let Some(place) = Place::new("frames_to_the_guest_and_to_groups_come_and_all_where_asked_for") else {
                return;
            };
            let name = place.make(kind);
            let _backend =
                place.start(&[&["--interface", name, "--queue-pairs", &queue_pairs.to_string()], how].concat());
            let mut guest = guest_with(queue_pairs, CSUM);
            let _front_end = place.connect(&guest);
            let came = which_come(&mut guest, &place.outside(), &every, wanted.len());
            assert_eq!(came, wanted.iter().copied().collect(), "{kind:?}, {how:?}, {queue_pairs} queue pairs");
        }
    }
}

/// On an interface whose address is another, as that of a card of which the guest has a part.
#[test]
fn address_that_is_given_is_the_one_that_frames_come_to() {
    let Some(place) = Place::new("address_that_is_given_is_the_one_that_frames_come_to") else { return };
    place.namespace.ip("link set card address 52:54:00:12:34:56");
    let interface = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let _backend = place.start(&["--interface", "card", "--mac", MAC]);
    let mut guest = guest_with(1, CSUM);
    let front_end = place.connect(&guest);
    let came = which_come(&mut guest, &place.outside(), &[interface, BROADCAST], 1);
    assert_eq!(came, [BROADCAST].into());
    assert_eq!(front_end.get_config(0, 6).unwrap(), GUEST_MAC);
}

/// Nor do the guest's own.
#[test]
fn frames_that_the_host_sends_over_the_interface_do_not_come() {
    const FLOWS: u16 = 32;
    for queue_pairs in [1, 4] {
        let Some(place) = Place::new("frames_that_the_host_sends_over_the_interface_do_not_come") else { return };
        let _backend =
            place.start(&["--interface", "card", "--queue-pairs", &queue_pairs.to_string(), "--promiscuous"]);
        let mut guest = guest_with(queue_pairs, CSUM);
        let _front_end = place.connect(&guest);
        let (inside, outside) = (PacketSocket::open(&place.namespace, "card"), place.outside());
        let frame = |stream, flow: u16| {
            let ends = Ends { src_port: 1000 + flow, ..Ends::RX };
            frames::udp4(&ends, &payload(Stamp { stream, seq: 0 }, 100), L4Csum::Full)
        };
        for flow in 0..FLOWS {
            inside.send(&frame(1, flow));
            guest.pairs[0].send(&<_>::default(), &frame(2, flow));
            assert!(outside.recv(PATIENCE).is_some() && outside.recv(PATIENCE).is_some());
            outside.send(&frame(3, flow));
        }
        let mut came = 0;
        let deadline = Instant::now() + PATIENCE;
        while came < FLOWS {
            assert!(Instant::now() < deadline, "{came} of {FLOWS} frames came");
            for pair in &mut guest.pairs {
                while let Some((_, frame)) = pair.recv(Duration::from_millis(1)) {
                    assert_eq!(find_stamp(&frame), Some(Ok(Stamp { stream: 3, seq: 0 })));
                    came += 1;
                }
            }
        }
    }
}
