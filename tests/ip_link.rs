//! A guest's Ethernet card on a device of IP packets: headers come and go, and the gateway answers.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::PATIENCE;
use common::backend::InProcess;
use common::driver::NetDriverSpec;
use common::frames::{
    self, BROADCAST, ETHER_HEADER, ETHERTYPE_ARP, ETHERTYPE_IPV6, ETHERTYPE_TEST, Ends, GUEST_MAC, L4Csum, Mac, Stamp,
    TCP_CSUM_OFFSET, payload, vlan,
};
use common::memory::GuestMemory;
use common::path_bench::{Bench, FEATURE_SETS};
use common::virtio::{VnetHdr, feature, gso, net_flag};
use proptest::prelude::*;
use proptest::sample::Index;
use vhost_user_net::net::ip_link::{GATEWAY_MAC, Gateway, IpLink, Way};
use vhost_user_net::nic::NicSetup;

const STAMP: Stamp = Stamp { stream: 1, seq: 0 };
const ASKED: [u8; 4] = [10, 0, 0, 1];
const GUEST: [u8; 4] = [10, 0, 0, 2];

fn bench(features: u64, gateway: Option<&str>, mac: Option<Mac>) -> Bench {
    let gateway = gateway.map(|text| text.parse::<Gateway>().unwrap());
    let backend = InProcess::start_on_packets(NicSetup { gateway, mac, ..NicSetup::default() });
    let mem = Arc::new(GuestMemory::single(64 << 20));
    let mac = if mac.is_some() { feature::MAC } else { 0 };
    Bench::before(backend, mem, NetDriverSpec { features: features | mac, ..NetDriverSpec::default() })
}

fn packet(frame: &[u8]) -> &[u8] {
    &frame[ETHER_HEADER..]
}

/// What the guest gets of `packet`.
fn enclosed(to: Mac, ethertype: u16, packet: &[u8]) -> Vec<u8> {
    [&to[..], &GATEWAY_MAC, &ethertype.to_be_bytes(), packet].concat()
}

/// An ARP packet (RFC 826, "Packet format") that asks.
fn arp_request(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, 1];
    let packet = [&fixed[..], &GUEST_MAC, &sender, &[0; 6], &target].concat();
    [&BROADCAST[..], &GUEST_MAC, &ETHERTYPE_ARP.to_be_bytes(), &packet].concat()
}

/// A neighbour solicitation (RFC 4861, "Neighbor Solicitation Message Format") with a right checksum.
fn solicitation(source: [u8; 16], target: [u8; 16]) -> Vec<u8> {
    let all_nodes = address6(0xff02, 1);
    let body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target, &[1, 1], &GUEST_MAC].concat();
    let pseudo = [&source[..], &all_nodes, &(body.len() as u32).to_be_bytes(), &[0, 0, 0, 58]].concat();
    let sum = frames::checksum_add(frames::checksum_add(0, &pseudo), &body);
    let mut packet = [&[0x60, 0, 0, 0, 0, body.len() as u8, 58, 255][..], &source, &all_nodes, &body].concat();
    packet[42..44].copy_from_slice(&(!sum).to_be_bytes());
    [&[0x33, 0x33, 0, 0, 0, 1][..], &GUEST_MAC, &ETHERTYPE_IPV6.to_be_bytes(), &packet].concat()
}

fn address6(first: u16, last: u16) -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&first.to_be_bytes());
    address[14..].copy_from_slice(&last.to_be_bytes());
    address
}

#[test]
fn packets_of_all_sizes_pass_both_ways() {
    for features in FEATURE_SETS {
        let mut bench = bench(features, None, Some(GUEST_MAC));
        let large = if features & feature::MRG_RXBUF == 0 { 66_000 } else { 2048 };
        bench.driver.post_rx(64, large);
        for (seq, len) in (0..).zip([16, 40, 300, 1472, 1500, 2000, 9000, 65_000]) {
            let stamp = Stamp { stream: 1, seq };
            let out = frames::udp4(&Ends::TX, &payload(stamp, len), L4Csum::Full);
            bench.driver.send(&VnetHdr::default(), &out);
            let (header, got) = bench.tap().recv(PATIENCE).unwrap();
            assert_eq!(header, VnetHdr::default());
            assert!(got == packet(&out), "{len} bytes");
            let content = payload(stamp, len);
            let v4 = (frames::ETHERTYPE_IPV4, frames::udp4(&Ends::RX, &content, L4Csum::Full));
            let v6 = (ETHERTYPE_IPV6, frames::udp6(&Ends::RX, &content, L4Csum::Full));
            for (ethertype, inn) in [v4, v6] {
                bench.tap().send(&VnetHdr::default(), packet(&inn));
                let (_, got) = bench.driver.recv(PATIENCE).unwrap();
                assert!(got == enclosed(GUEST_MAC, ethertype, packet(&inn)), "{len} bytes");
            }
        }
        bench.assert_balance(16, 8);
    }
}

/// What is read first is private, so there is more room than the guest gave.
#[test]
fn packet_that_does_not_fit_a_short_buffer_waits_for_another() {
    let mut bench = bench(feature::MRG_RXBUF, None, Some(GUEST_MAC));
    bench.driver.post_rx(1, 40);
    let inn = frames::ethernet(&Ends::RX, frames::ETHERTYPE_IPV4, &[0x45; 30]);
    bench.tap().send(&VnetHdr::default(), packet(&inn));
    bench.wait_counter("rx_held", 1);
    assert!(bench.driver.rx.take_used().is_none());
    bench.driver.post_rx(1, 40);
    let got = bench.driver.recv_detailed(PATIENCE).unwrap();
    assert_eq!((got.lens, got.header.num_buffers), (vec![40, 16], 2));
    assert!(got.frame == enclosed(GUEST_MAC, frames::ETHERTYPE_IPV4, packet(&inn)));
}

#[test]
fn packets_find_their_place_in_buffers_of_any_size() {
    let mut bench = bench(feature::MRG_RXBUF, None, Some(GUEST_MAC));
    for len in [13, 26, 40, 65, 66, 67, 100] {
        for (seq, size) in (0..).zip([1, 28, 29, 300, 1000]) {
            let inn = frames::udp4(&Ends::RX, &payload(Stamp { stream: 1, seq }, 16 + size), L4Csum::Full);
            // Twice, to come by both ways: a single packet, and several at once.
            for count in [1, 8] {
                for _ in 0..count {
                    bench.tap().send(&VnetHdr::default(), packet(&inn));
                }
                for _ in 0..count {
                    while bench.driver.rx.outstanding().len() < 200 {
                        bench.driver.post_rx(10, len);
                    }
                    let (_, got) = bench.driver.recv(PATIENCE).unwrap();
                    assert!(got == enclosed(GUEST_MAC, frames::ETHERTYPE_IPV4, packet(&inn)), "{len} {size}");
                }
            }
        }
    }
}

#[test]
fn offsets_of_the_header_follow_the_cut() {
    let features = feature::CSUM | feature::HOST_TSO4 | feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::MRG_RXBUF;
    let mut bench = bench(features, None, Some(GUEST_MAC));
    bench.driver.post_rx(128, 2048);
    let guests = VnetHdr {
        flags: net_flag::NEEDS_CSUM,
        gso_type: gso::TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: TCP_CSUM_OFFSET,
        ..VnetHdr::default()
    };
    let devices = VnetHdr { hdr_len: 40, csum_start: 20, ..guests };
    for len in [100, 30_000] {
        let out = frames::tcp4(&Ends::TX, 1, &payload(STAMP, len), L4Csum::Partial);
        bench.driver.send(&guests, &out);
        let (header, got) = bench.tap().recv(PATIENCE).unwrap();
        assert_eq!(header, devices);
        assert!(got == packet(&out));
        let inn = frames::tcp4(&Ends::RX, 1, &payload(STAMP, len), L4Csum::Partial);
        bench.tap().send(&devices, packet(&inn));
        let (header, got) = bench.driver.recv(PATIENCE).unwrap();
        assert_eq!(VnetHdr { num_buffers: 0, ..header }, guests);
        assert!(got == enclosed(GUEST_MAC, frames::ETHERTYPE_IPV4, packet(&inn)));
    }
}

#[test]
fn gateway_answers_and_only_packets_reach_the_device() {
    let mut bench = bench(feature::MRG_RXBUF, Some("10.0.0.1,fe80::1"), None);
    bench.driver.post_rx(32, 2048);
    bench.driver.send(&VnetHdr::default(), &arp_request(GUEST, ASKED));
    let (_, answer) = bench.driver.recv(PATIENCE).unwrap();
    assert_eq!((&answer[..6], &answer[6..12], &answer[20..22]), (&GUEST_MAC[..], &GATEWAY_MAC[..], &[0, 2][..]));
    assert_eq!((&answer[22..28], &answer[28..32], &answer[38..42]), (&GATEWAY_MAC[..], &ASKED[..], &GUEST[..]));

    let asker = address6(0xfe80, 2);
    bench.driver.send(&VnetHdr::default(), &solicitation(asker, address6(0xfe80, 1)));
    let (_, answer) = bench.driver.recv(PATIENCE).unwrap();
    assert_eq!((&answer[..6], &answer[6..12]), (&GUEST_MAC[..], &GATEWAY_MAC[..]));
    assert_eq!((&answer[22..38], &answer[38..54]), (&address6(0xfe80, 1)[..], &asker[..]));
    // Type; router, solicited and override; the target, and its address.
    assert_eq!((answer[54], answer[58]), (136, 0xe0));
    assert_eq!((&answer[62..78], &answer[80..86]), (&address6(0xfe80, 1)[..], &GATEWAY_MAC[..]));
    assert!(frames::checksum_add(pseudo_sum(&answer), &answer[54..]) == 0xffff);

    let plain = frames::udp4(&Ends::TX, &payload(STAMP, 100), L4Csum::Full);
    let other = frames::ethernet(&Ends::TX, ETHERTYPE_TEST, &[0; 46]);
    for frame in [arp_request(GUEST, [10, 0, 0, 3]), other, vlan(&plain, 5), plain.clone()] {
        bench.driver.send(&VnetHdr::default(), &frame);
    }
    assert!(bench.tap().recv(PATIENCE).unwrap().1 == packet(&plain), "Nothing else comes");
    bench.assert_balance(2, 3);
    assert_eq!((bench.counter("tx_neighbour_requests"), bench.counter("tx_drop_not_ip")), (3, 2));
}

fn pseudo_sum(frame: &[u8]) -> u16 {
    let len = (frame.len() - 54) as u16;
    frames::checksum_add(frames::checksum_add(0, &frame[22..54]), &[&len.to_be_bytes()[..], &[0, 58]].concat())
}

#[test]
fn guest_whose_address_nobody_knows_is_asked_for_it() {
    for count in [1, 6] {
        let mut bench = bench(feature::MRG_RXBUF, Some("10.0.0.1"), None);
        bench.driver.post_rx(32, 2048);
        let inn = frames::udp4(&Ends::RX, &payload(STAMP, 100), L4Csum::Full);
        for _ in 0..count {
            bench.tap().send(&VnetHdr::default(), packet(&inn));
        }
        // The packets wait for nobody.
        let mut questions = 0;
        let mut packets = 0;
        while packets < count || questions == 0 {
            let (_, got) = bench.driver.recv(PATIENCE).unwrap();
            if got[12..14] == ETHERTYPE_ARP.to_be_bytes() {
                questions += 1;
                assert_eq!((&got[20..22], &got[28..32], &got[38..42]), (&[0, 1][..], &ASKED[..], &inn[30..34]));
            } else {
                packets += 1;
                assert!(got == enclosed(BROADCAST, frames::ETHERTYPE_IPV4, packet(&inn)));
            }
        }
        // Any frame tells.
        bench.driver.send(&VnetHdr::default(), &frames::udp4(&Ends::TX, &payload(STAMP, 100), L4Csum::Full));
        bench.tap().recv(PATIENCE).unwrap();
        bench.tap().send(&VnetHdr::default(), packet(&inn));
        loop {
            let (_, got) = bench.driver.recv(PATIENCE).unwrap();
            if got[12..14] != ETHERTYPE_ARP.to_be_bytes() {
                break assert!(got == enclosed(GUEST_MAC, frames::ETHERTYPE_IPV4, packet(&inn)));
            }
        }
    }
}

#[test]
fn flood_of_requests_is_answered_as_far_as_there_is_room() {
    let mut bench = bench(feature::MRG_RXBUF, None, None);
    for _ in 0..60 {
        bench.driver.queue(&VnetHdr::default(), &arp_request(GUEST, ASKED));
    }
    bench.driver.tx.publish_and_kick();
    assert!(bench.driver.wait_tx_done(PATIENCE));
    bench.wait_counter("tx_neighbour_requests", 60);
    let deadline = Instant::now() + PATIENCE;
    while bench.counter("rx_neighbour_answers") + bench.counter("rx_drop_answers") < 60 {
        assert!(Instant::now() < deadline, "{:?}", bench.backend.counters(0));
    }
    // One more if the first was on its way already.
    let answered = bench.counter("rx_neighbour_answers");
    assert!((16..=17).contains(&answered), "{answered}");
    bench.driver.post_rx(64, 2048);
    for _ in 0..answered {
        bench.driver.recv(PATIENCE).unwrap();
    }
}

#[test]
fn groups_have_their_own_hardware_addresses() {
    let link = IpLink::new(None, Some(GUEST_MAC));
    let to = |packet: &[u8]| {
        let mut bytes = [&[0; 26][..], packet].concat();
        assert!(link.enclose(&mut bytes));
        <[u8; 6]>::try_from(&bytes[12..18]).unwrap()
    };
    let v4 = |to: [u8; 4]| [&[0x45; 16][..], &to].concat();
    let v6 = |to: [u8; 16]| [&[0x60; 24][..], &to].concat();
    assert_eq!(to(&v4([224, 129, 2, 3])), [1, 0, 0x5e, 1, 2, 3]);
    assert_eq!(to(&v4([255; 4])), BROADCAST);
    assert_eq!(to(&v4([10, 0, 0, 2])), GUEST_MAC);
    assert_eq!(to(&v6(address6(0xff02, 0x102))), [0x33, 0x33, 0, 0, 1, 2]);
    assert_eq!(to(&v6(address6(0xfe80, 2))), GUEST_MAC);
    for bad in [&[][..], &[0x45], &[0x45; 19], &[0x60; 39], &[0x75; 40]] {
        assert!(!link.enclose(&mut [&[0; 26][..], bad].concat()), "{bad:?}");
    }
}

#[test]
fn question_whether_an_address_is_free_is_answered_for_the_gateways_only() {
    let free = [arp_request([0; 4], ASKED), solicitation([0; 16], address6(0xfe80, 1))];
    let anybody = IpLink::new(None, None);
    let one = IpLink::new(Some("10.0.0.1,fe80::1".parse().unwrap()), None);
    for frame in &free {
        assert!(anybody.answer(frame).is_none() && one.answer(frame).is_some());
    }
    assert!(anybody.answer(&arp_request(ASKED, ASKED)).is_none(), "It tells of itself");
    assert_eq!(&one.answer(&free[1]).unwrap().frame()[..6], [0x33, 0x33, 0, 0, 0, 1], "To all that are there");
    let mut routed = solicitation(address6(0xfe80, 2), address6(0xfe80, 1));
    assert!(one.answer(&routed).is_some());
    routed[21] = 254;
    assert!(one.answer(&routed).is_none(), "It came over a router");
    let mut broken = solicitation(address6(0xfe80, 2), address6(0xfe80, 1));
    broken[56] ^= 1;
    assert!(one.answer(&broken).is_none(), "Its checksum is wrong");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a guest sends, an answer is one to it, from the gateway, and nothing panics.
    #[test]
    fn nothing_that_a_guest_asks_does_harm(
        which in 0..3usize,
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 0..8),
        len in any::<Index>(),
        cut in any::<bool>(),
        tail in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let seeds = [
            arp_request(GUEST, ASKED),
            solicitation(address6(0xfe80, 2), address6(0xfe80, 1)),
            frames::udp6(&Ends::TX, &payload(STAMP, 16), L4Csum::Full),
        ];
        let mut frame = [&seeds[which][..], &tail].concat();
        for (place, value) in changes {
            let place = place.index(frame.len());
            frame[place] = value;
        }
        if cut {
            frame.truncate(len.index(frame.len()));
        }
        let link = IpLink::new(None, None);
        if link.way(&frame) == Way::Neighbour && let Some(answer) = link.answer(&frame) {
            prop_assert_eq!(&answer.frame()[6..12], &GATEWAY_MAC);
            prop_assert!(answer.frame()[..6] == frame[6..12] || answer.frame()[..2] == [0x33, 0x33]);
        }
    }
}
