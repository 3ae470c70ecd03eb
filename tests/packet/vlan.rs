//! Tagged frames: the kernel takes tags out of what comes, and tells them beside the frame.

use crate::common::PATIENCE;
use crate::common::frames::{
    self, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, Ends, L4Csum, Stamp, checksums_are_right, payload, tag,
};
use crate::common::split;
use crate::common::virtio::{VnetHdr, feature, gso, net_flag};
use crate::{CSUM, Kind, Place, TSO, assert_next_is, guest_with, inward, outward};

const TPIDS: [u16; 2] = [ETHERTYPE_VLAN, ETHERTYPE_SERVICE_VLAN];
/// Priority 5, VLAN 100; priority alone.
const TCIS: [u16; 2] = [0xa064, 0xe000];
/// Where the transport header is behind one tag.
const L4: u16 = 38;

/// The smallest, some that are read in a batch, and the largest: one by one and many at once.
#[test]
fn tagged_frames_come_with_their_tags() {
    for kind in [Kind::Veth, Kind::Macvlan("bridge")] {
        let Some(place) = Place::new("tagged_frames_come_with_their_tags") else { return };
        // That of 802.1ad frames does not count as a tag where the MTU is concerned.
        place.set_mtu(1600);
        let name = place.make(kind);
        for (features, io) in [(0, "auto"), (CSUM, "auto"), (TSO, "auto"), (CSUM, "syscall")] {
            let mut backend = place.start(&["--interface", name, "--io", io]);
            let mut guest = guest_with(1, features);
            let _front_end = place.connect(&guest);
            let outside = place.outside();
            for (len, tpid, tci) in [30, 60, 1000, 1514]
                .into_iter()
                .flat_map(|len| TPIDS.map(|tpid| TCIS.map(|tci| (len, tpid, tci))).concat())
            {
                let frame = |seq| tag(&inward(1, seq, len), tpid, tci);
                for seq in 0..3 {
                    outside.send(&frame(seq));
                    assert_next_is(&mut guest, 0, &frame(seq));
                }
                (0..30).for_each(|seq| outside.send(&frame(seq)));
                (0..30).for_each(|seq| assert_next_is(&mut guest, 0, &frame(seq)));
            }
            // Two tags, and some without between those that have one.
            let mixed = |seq: u32| match seq % 3 {
                0 => inward(2, seq, 200),
                1 => tag(&inward(2, seq, 200), ETHERTYPE_VLAN, 7),
                _ => tag(&tag(&inward(2, seq, 200), ETHERTYPE_VLAN, 7), ETHERTYPE_SERVICE_VLAN, 8),
            };
            (0..60).for_each(|seq| outside.send(&mixed(seq)));
            (0..60).for_each(|seq| assert_next_is(&mut guest, 0, &mixed(seq)));
            assert_eq!(backend.counters(1)[0].keys().filter(|name| name.contains("rx_drop")).count(), 0);
        }
    }
}

#[test]
fn tagged_frames_leave_as_they_are() {
    for kind in [Kind::Veth, Kind::Macvlan("bridge")] {
        let Some(place) = Place::new("tagged_frames_leave_as_they_are") else { return };
        place.set_mtu(1600);
        let _backend = place.start(&["--interface", place.make(kind)]);
        let mut guest = guest_with(1, CSUM);
        let _front_end = place.connect(&guest);
        let outside = place.outside();
        for (len, tpid, tci) in
            [30, 1000, 1514].into_iter().flat_map(|len| TPIDS.map(|tpid| TCIS.map(|tci| (len, tpid, tci))).concat())
        {
            let frame = |seq| tag(&outward(1, seq, len), tpid, tci);
            (0..10).for_each(|seq| _ = guest.pairs[0].queue(&VnetHdr::default(), &frame(seq)));
            guest.pairs[0].tx.publish_and_kick();
            for seq in 0..10 {
                assert_eq!(outside.recv(PATIENCE).expect("a frame outside"), frame(seq));
            }
        }
    }
}

/// A tagged frame may be longer than the MTU by the tag.
#[test]
fn tagged_frames_of_full_size_leave() {
    let Some(place) = Place::new("tagged_frames_of_full_size_leave") else { return };
    let _backend = place.start(&["--interface", "card"]);
    let mut guest = guest_with(1, CSUM);
    let _front_end = place.connect(&guest);
    let outside = place.outside();
    let frame = tag(&outward(1, 0, 1514), ETHERTYPE_VLAN, 5);
    guest.pairs[0].send(&VnetHdr::default(), &frame);
    assert!(outside.recv(PATIENCE).expect("a frame outside") == frame);
}

/// With its tag such a frame is longer than any without.
#[test]
fn largest_frames_pass_both_ways() {
    const LARGEST: usize = 65_535 + 14;
    let Some(place) = Place::new("largest_frames_pass_both_ways") else { return };
    place.set_mtu(65_535);
    for features in [0, CSUM] {
        let _backend = place.start(&["--interface", "card"]);
        let mut guest = guest_with(1, features);
        let _front_end = place.connect(&guest);
        let outside = place.outside();
        for seq in 0..20 {
            let of = |frame: Vec<u8>| if seq % 2 == 0 { frame } else { tag(&frame, ETHERTYPE_VLAN, 5) };
            outside.send(&of(inward(1, seq, LARGEST)));
            assert_next_is(&mut guest, 0, &of(inward(1, seq, LARGEST)));
            guest.pairs[0].send(&VnetHdr::default(), &of(outward(1, seq, LARGEST)));
            assert!(outside.recv(PATIENCE).expect("a frame outside") == of(outward(1, seq, LARGEST)), "frame {seq}");
        }
    }
}

fn needs_csum(csum_offset: u16) -> VnetHdr {
    VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: L4, csum_offset, ..VnetHdr::default() }
}

const LARGE: usize = 20_000;

/// What is unfinished behind a tag: whole where the guest takes it, else finished.
#[test]
fn unfinished_frames_behind_a_tag_come_right() {
    for (features, tpid) in [0, feature::MRG_RXBUF, CSUM, TSO].into_iter().flat_map(|f| TPIDS.map(|tpid| (f, tpid))) {
        let Some(place) = Place::new("unfinished_frames_behind_a_tag_come_right") else { return };
        let _backend = place.start(&["--interface", "card"]);
        let mut guest = guest_with(1, features);
        let _front_end = place.connect(&guest);
        let outside = place.outside_vnet();

        let frame =
            tag(&frames::udp4(&Ends::RX, &payload(Stamp { stream: 1, seq: 0 }, 1000), L4Csum::Partial), tpid, 5);
        outside.send_vnet(&needs_csum(6), &frame).unwrap();
        let (header, got) = guest.pairs[0].recv(PATIENCE).expect("a frame in the guest");
        if features & feature::GUEST_CSUM != 0 {
            assert_eq!((header.flags, header.csum_start, header.csum_offset), (net_flag::NEEDS_CSUM, L4, 6));
            assert_eq!(got, frame);
        } else {
            assert_eq!(header.flags, 0);
            assert!(checksums_are_right(&got));
            assert_eq!(got, split::complete(&needs_csum(6), &frame));
        }

        let content = payload(Stamp { stream: 2, seq: 0 }, LARGE);
        let frame = tag(&frames::tcp4(&Ends::RX, 1, &content, L4Csum::Partial), tpid, 5);
        let header = VnetHdr { gso_type: gso::TCPV4, hdr_len: 58, gso_size: 1448, ..needs_csum(16) };
        outside.send_vnet(&header, &frame).unwrap();
        let mut came = Vec::new();
        while came.len() < LARGE {
            let (header, frame) = guest.pairs[0].recv(PATIENCE).expect("a frame in the guest");
            assert_eq!(header.gso_type == gso::TCPV4, features == TSO, "{header:?}");
            assert_eq!(frame[12..18], [&tpid.to_be_bytes()[..], &[0, 5, 8, 0]].concat());
            let header = VnetHdr { num_buffers: 0, hdr_len: if features == TSO { 58 } else { 0 }, ..header };
            for frame in split::split(&header, &frame).unwrap() {
                assert!(checksums_are_right(&frame));
                came.extend_from_slice(&frame[58..]);
            }
        }
        assert!(came == content);
    }
}

#[test]
fn unfinished_frames_behind_a_tag_leave_right() {
    let Some(place) = Place::new("unfinished_frames_behind_a_tag_leave_right") else { return };
    let _backend = place.start(&["--interface", "card"]);
    let mut guest = guest_with(1, TSO);
    let _front_end = place.connect(&guest);
    let outside = place.outside_vnet();
    let datagram =
        tag(&frames::udp4(&Ends::TX, &payload(Stamp { stream: 1, seq: 0 }, 1000), L4Csum::Partial), 0x8100, 5);
    let large =
        tag(&frames::tcp4(&Ends::TX, 1, &payload(Stamp { stream: 2, seq: 0 }, LARGE), L4Csum::Partial), 0x8100, 5);
    let segmented = VnetHdr { gso_type: gso::TCPV4, hdr_len: 58, gso_size: 1448, ..needs_csum(16) };
    for (header, frame) in [(needs_csum(6), datagram), (segmented, large)] {
        guest.pairs[0].send(&header, &frame);
        let mut came = Vec::new();
        let wanted = split::split(&header, &frame).unwrap();
        while came.len() < wanted.len() {
            let (mut header, frame) = outside.recv_vnet(PATIENCE).expect("a frame outside");
            header.hdr_len = if header.gso_type == gso::NONE { 0 } else { 58 };
            came.extend(split::split(&header, &frame).unwrap());
        }
        assert!(came == wanted);
    }
}
