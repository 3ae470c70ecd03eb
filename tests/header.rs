//! The virtio-net header's check: what a guest may ask the kernel for, and what the kernel may hand a guest.
//!
//! The kernel accepts much of what is refused here.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::frames::{self, Ends, L4Csum, TCP_CSUM_OFFSET, UDP_CSUM_OFFSET};
use common::virtio::{VnetHdr, feature, gso, net_flag};
use proptest::prelude::*;
use vhost_user_net::net::features::GuestOffloads;
use vhost_user_net::net::header::{
    CheckedHeader, HeaderFault, SegmentLimit, TxRules, VnetHeader, check_rx, check_rx_in_place,
};

const TX_ALL: u64 =
    feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_UFO | feature::HOST_USO;
/// Ethernet header; IPv4 and IPv6 header behind it.
const L4_OF_IPV4: usize = 34;
const L4_OF_IPV6: usize = 54;
const LONGEST: usize = 65_535 + 14 + 8;

/// The same header in the library's type, by way of its bytes.
fn ours(header: VnetHdr) -> VnetHeader {
    VnetHeader::from_bytes(&header.to_bytes())
}

fn check_with(features: u64, header: VnetHdr, len: usize, frame: &[u8]) -> Result<CheckedHeader, HeaderFault> {
    check_within(SegmentLimit::MOST, features, header, len, frame)
}

fn check_within(
    segments: u16,
    features: u64,
    header: VnetHdr,
    len: usize,
    frame: &[u8],
) -> Result<CheckedHeader, HeaderFault> {
    let limit = SegmentLimit::new(segments).expect("a limit");
    TxRules::of(features, limit).check(ours(header), len, &frame[..frame.len().min(192)])
}

fn check(header: VnetHdr, frame: &[u8]) -> Result<CheckedHeader, HeaderFault> {
    check_with(TX_ALL, header, frame.len(), frame)
}

/// A request to segment, complete and right for a frame whose L4 header is at `l4`.
fn request(gso_type: u8, l4: usize) -> VnetHdr {
    let is_tcp = matches!(gso_type & !gso::ECN, gso::TCPV4 | gso::TCPV6);
    VnetHdr {
        flags: net_flag::NEEDS_CSUM,
        gso_type,
        hdr_len: 0,
        gso_size: 1448,
        csum_start: l4 as u16,
        csum_offset: if is_tcp { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET },
        num_buffers: 0,
    }
}

fn tcp4() -> Vec<u8> {
    frames::tcp4(&Ends::TX, 1, &[7; 4000], L4Csum::Partial)
}

fn tcp6() -> Vec<u8> {
    frames::tcp6(&Ends::TX, 1, &[7; 4000], L4Csum::Partial)
}

fn udp4() -> Vec<u8> {
    frames::udp4(&Ends::TX, &[7; 4000], L4Csum::Partial)
}

fn udp6() -> Vec<u8> {
    frames::udp6(&Ends::TX, &[7; 4000], L4Csum::Partial)
}

/// Every kind of request with a frame for it, its L4 offset, its headers' length, and the feature that allows it.
fn good_requests() -> Vec<(u8, Vec<u8>, usize, usize, u64)> {
    vec![
        (gso::TCPV4, tcp4(), L4_OF_IPV4, L4_OF_IPV4 + 20, feature::HOST_TSO4),
        (gso::TCPV6, tcp6(), L4_OF_IPV6, L4_OF_IPV6 + 20, feature::HOST_TSO6),
        (gso::TCPV4 | gso::ECN, tcp4(), L4_OF_IPV4, L4_OF_IPV4 + 20, feature::HOST_TSO4 | feature::HOST_ECN),
        (gso::TCPV6 | gso::ECN, tcp6(), L4_OF_IPV6, L4_OF_IPV6 + 20, feature::HOST_TSO6 | feature::HOST_ECN),
        (gso::UDP, udp4(), L4_OF_IPV4, L4_OF_IPV4 + 8, feature::HOST_UFO),
        (gso::UDP_L4, udp4(), L4_OF_IPV4, L4_OF_IPV4 + 8, feature::HOST_USO),
        (gso::UDP_L4, udp6(), L4_OF_IPV6, L4_OF_IPV6 + 8, feature::HOST_USO),
    ]
}

#[test]
fn good_request_passes_and_its_header_is_complete() {
    for (gso_type, frame, l4, headers, needs) in good_requests() {
        let header = request(gso_type, l4);
        let checked = check_with(needs | feature::CSUM, header, frame.len(), &frame).unwrap();
        let expected = VnetHdr { hdr_len: headers as u16, ..header };
        let segments = (frame.len() - headers).div_ceil(header.gso_size.into());
        let wanted = CheckedHeader { header: ours(expected), segments };
        assert_eq!(checked, wanted, "{gso_type:#x}");
    }
}

/// H-01, H-15
#[test]
fn frame_shorter_than_ethernet_or_longer_than_any_is_refused() {
    let plain = VnetHdr::default();
    for len in [0, 1, 13, LONGEST + 1, 1 << 20, usize::MAX] {
        assert_eq!(check_with(TX_ALL, plain, len, &[]), Err(HeaderFault::Length { len }), "H-01, H-15");
    }
    for len in [14, 60, 9000, 65_550, LONGEST] {
        assert!(check_with(TX_ALL, plain, len, &[]).is_ok());
    }
}

/// H-02
#[test]
fn unknown_gso_type_is_refused() {
    let known = [gso::TCPV4, gso::TCPV6, gso::UDP, gso::UDP_L4, gso::TCPV4 | gso::ECN, gso::TCPV6 | gso::ECN];
    for gso_type in (1..=255).filter(|gso_type| !known.contains(gso_type)) {
        let result = check(request(gso_type, L4_OF_IPV4), &tcp4());
        assert!(matches!(result, Err(HeaderFault::NotNegotiated { .. })), "H-02 {gso_type:#x}");
    }
}

/// H-03
#[test]
fn request_that_was_not_negotiated_is_refused() {
    for (gso_type, frame, l4, _, needs) in good_requests() {
        let single = (0..64).map(|bit| 1 << bit).filter(|bit| needs & bit != 0);
        for lacking in single.chain([feature::CSUM]) {
            let result = check_with(TX_ALL & !lacking, request(gso_type, l4), frame.len(), &frame);
            assert!(matches!(result, Err(HeaderFault::NotNegotiated { .. })), "H-03 {gso_type:#x}");
        }
    }
}

/// H-04
#[test]
fn request_without_segment_size_is_refused() {
    for (gso_type, frame, l4, ..) in good_requests() {
        // The kernel has a meaning of its own for the largest.
        for gso_size in [0, 0xffff] {
            let header = VnetHdr { gso_size, ..request(gso_type, l4) };
            assert!(matches!(check(header, &frame), Err(HeaderFault::Contradictory { .. })), "H-04 {gso_type:#x}");
        }
        assert!(check(VnetHdr { gso_size: 0xfffe, ..request(gso_type, l4) }, &frame).is_ok());
    }
}

/// H-05
#[test]
fn request_for_more_segments_than_a_full_frame_of_48_bytes_is_refused() {
    let headers = L4_OF_IPV4 + 20;
    let frame = tcp4();
    let with = |gso_size, payload: usize| {
        check_with(TX_ALL, VnetHdr { gso_size, ..request(gso::TCPV4, L4_OF_IPV4) }, headers + payload, &frame)
    };
    assert!(with(1, 1366).is_ok());
    assert_eq!(with(1, 1367), Err(HeaderFault::TooManySegments { segments: 1367 }), "H-05");
    assert_eq!(with(8, 65_000), Err(HeaderFault::TooManySegments { segments: 8125 }), "H-05");
    assert!(with(48, LONGEST - headers).is_ok());
    assert!(with(1448, 0).is_ok(), "no payload is no segment");
}

/// H-05
#[test]
fn request_for_more_segments_than_the_operator_allows_is_refused() {
    let frame = tcp4();
    let header = VnetHdr { gso_size: 100, ..request(gso::TCPV4, L4_OF_IPV4) };
    let with = |limit, payload| check_within(limit, TX_ALL, header, L4_OF_IPV4 + 20 + payload, &frame);
    for limit in [1, 45, 180, 655] {
        let most = usize::from(limit) * 100;
        assert_eq!(with(limit, most).map(|checked| checked.segments), Ok(usize::from(limit)));
        assert_eq!(
            with(limit, most + 1),
            Err(HeaderFault::TooManySegments { segments: usize::from(limit) + 1 }),
            "H-05"
        );
    }
    assert_eq!([0, 1, 1366, 1367].map(|limit| SegmentLimit::new(limit).is_some()), [false, true, true, false]);
    // Four frames' worth of a full frame on the usual MTU.
    assert_eq!(SegmentLimit::default(), SegmentLimit::new(4 * (65_535_u16 - 40).div_ceil(1460)).expect("a limit"));
}

/// H-06
#[test]
fn request_on_another_protocol_is_refused() {
    let arp = frames::arp_request(&Ends::TX);
    let [tcp4, tcp6, udp4, udp6] = [tcp4(), tcp6(), udp4(), udp6()];
    let wrong = [
        (gso::TCPV4, &arp, L4_OF_IPV4),
        (gso::TCPV4, &tcp6, L4_OF_IPV6),
        (gso::TCPV4, &udp4, L4_OF_IPV4),
        (gso::TCPV6, &tcp4, L4_OF_IPV4),
        (gso::TCPV6, &udp6, L4_OF_IPV6),
        (gso::UDP_L4, &tcp4, L4_OF_IPV4),
        (gso::UDP_L4, &tcp6, L4_OF_IPV6),
        (gso::UDP, &tcp4, L4_OF_IPV4),
    ];
    for (gso_type, frame, l4) in wrong {
        let result = check(request(gso_type, l4), frame);
        assert_eq!(result, Err(HeaderFault::WrongProtocol { gso_type }), "H-06 {gso_type:#x}");
    }
}

/// H-06
#[test]
fn ethertype_and_ip_version_must_agree() {
    let mut frame = tcp4();
    frame[14] = 0x65;
    assert!(matches!(check(request(gso::TCPV4, L4_OF_IPV4), &frame), Err(HeaderFault::WrongProtocol { .. })));
    let mut frame = tcp4();
    frame[14] = 0x44;
    let short = "an IPv4 header of 16 bytes";
    assert!(matches!(check(request(gso::TCPV4, 30), &frame), Err(HeaderFault::WrongProtocol { .. })), "{short}");
}

/// H-07
#[test]
fn request_without_a_checksum_to_complete_is_refused() {
    for (gso_type, frame, l4, ..) in good_requests() {
        let header = VnetHdr { flags: 0, ..request(gso_type, l4) };
        assert!(matches!(check(header, &frame), Err(HeaderFault::Contradictory { .. })), "H-07 {gso_type:#x}");
    }
}

/// A frame without segmentation, whose checksum is to be completed.
fn partial(csum_start: u16, csum_offset: u16) -> VnetHdr {
    VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start, csum_offset, ..VnetHdr::default() }
}

/// H-08, H-09, H-10
#[test]
fn checksum_field_outside_the_frame_is_refused() {
    const LEN: usize = 100;
    let bad = [
        ("H-08", 0xffff, 0),
        ("H-08", 0xffff, 0xffff),
        ("H-08", 50, 0xffff),
        ("H-08 wraps 16 bits", 0x8000, 0x8010),
        ("H-09 last byte one past the end", 34, 65),
        ("H-09", 98, 1),
        ("H-09", 99, 0),
        ("H-10", 0, 16),
        ("H-10", 13, 16),
    ];
    for (id, start, offset) in bad {
        let fault = HeaderFault::Checksum { start, offset };
        assert_eq!(check_with(TX_ALL, partial(start, offset), LEN, &[]), Err(fault), "{id}");
    }
    for (start, offset) in [(14, 0), (34, 16), (34, 64), (98, 0)] {
        let checked = check_with(TX_ALL, partial(start, offset), LEN, &[]).unwrap();
        assert_eq!(checked.header, ours(partial(start, offset)));
    }
}

/// H-11
#[test]
fn checksum_that_was_not_negotiated_is_refused() {
    let refused = check_with(TX_ALL & !feature::CSUM, partial(34, 16), 100, &[]);
    assert!(matches!(refused, Err(HeaderFault::NotNegotiated { .. })), "H-11");
}

/// H-12
#[test]
fn request_whose_checksum_is_not_where_the_protocol_has_it_is_refused() {
    for (gso_type, frame, l4, ..) in good_requests() {
        let good = request(gso_type, l4);
        for csum_offset in (0..20).filter(|offset| *offset != good.csum_offset) {
            let result = check(VnetHdr { csum_offset, ..good }, &frame);
            assert!(matches!(result, Err(HeaderFault::Checksum { .. })), "H-12 {gso_type:#x} +{csum_offset}");
        }
        for csum_start in [l4 as u16 - 1, l4 as u16 + 1, 14] {
            let result = check(VnetHdr { csum_start, ..good }, &frame);
            assert!(matches!(result, Err(HeaderFault::Checksum { .. })), "H-12 {gso_type:#x} from {csum_start}");
        }
    }
}

/// H-13
#[test]
fn header_length_is_computed_whatever_the_guest_says() {
    for hdr_len in [0, 1, 54, 0xffff] {
        let header = VnetHdr { hdr_len, ..request(gso::TCPV4, L4_OF_IPV4) };
        assert_eq!(check(header, &tcp4()).unwrap().header.hdr_len, 54, "H-13");
        let plain = VnetHdr { hdr_len, gso_size: 9, csum_start: 9, csum_offset: 9, ..VnetHdr::default() };
        assert_eq!(check(plain, &tcp4()).unwrap().header, VnetHeader::default(), "nothing asked for, nothing said");
    }
}

/// H-14
#[test]
fn flags_that_exclude_each_other_are_refused_and_unknown_ones_cleared() {
    let both = VnetHdr { flags: net_flag::NEEDS_CSUM | net_flag::DATA_VALID, ..partial(34, 16) };
    assert!(matches!(check(both, &tcp4()), Err(HeaderFault::Contradictory { .. })), "H-14");
    let unknown = VnetHdr { flags: 0xfc | net_flag::NEEDS_CSUM, ..partial(34, 16) };
    assert_eq!(check(unknown, &tcp4()).unwrap().header, ours(partial(34, 16)), "H-14");
    for flags in [net_flag::DATA_VALID, net_flag::RSC_INFO, 0xfe] {
        let header = VnetHdr { flags, ..VnetHdr::default() };
        assert_eq!(check(header, &tcp4()).unwrap().header, VnetHeader::default(), "H-14 {flags:#x}");
    }
}

/// H-16
#[test]
fn number_of_buffers_from_a_guest_is_ignored() {
    let header = VnetHdr { num_buffers: 0xffff, ..request(gso::TCPV4, L4_OF_IPV4) };
    assert_eq!(check(header, &tcp4()).unwrap().header.num_buffers, 0, "H-16");
}

#[test]
fn up_to_two_vlan_tags_stand_before_the_protocol() {
    let mut frame = tcp4();
    for tags in 0..=3_usize {
        let l4 = L4_OF_IPV4 + 4 * tags;
        let result = check(request(gso::TCPV4, l4), &frame);
        match tags {
            0..=2 => assert_eq!(usize::from(result.unwrap().header.hdr_len), l4 + 20),
            _ => assert_eq!(result, Err(HeaderFault::WrongProtocol { gso_type: gso::TCPV4 })),
        }
        frame = frames::vlan(&frame, 7);
        if tags == 1 {
            // The outer one of two is usually 802.1ad's.
            frame[12..14].copy_from_slice(&[0x88, 0xa8]);
        }
    }
}

/// Puts extension headers of these (number, units of eight bytes) behind the IPv6 header.
fn with_extensions(frame: &[u8], extensions: &[(u8, u8)]) -> Vec<u8> {
    let mut out = frame[..L4_OF_IPV6].to_vec();
    let l4 = frame[20];
    let numbers: Vec<u8> = extensions.iter().map(|(number, _)| *number).chain([l4]).collect();
    out[20] = numbers[0];
    for ((_, units), next) in extensions.iter().zip(&numbers[1..]) {
        let mut extension = vec![0; 8 * usize::from(*units)];
        (extension[0], extension[1]) = (*next, units - 1);
        out.extend(extension);
    }
    out.extend(&frame[L4_OF_IPV6..]);
    out
}

#[test]
fn ipv6_extension_headers_are_skipped() {
    const HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const DESTINATION: u8 = 60;
    for extensions in [&[(HOP, 1)][..], &[(HOP, 2), (ROUTING, 3)], &[(HOP, 1), (DESTINATION, 1), (ROUTING, 2)]] {
        let frame = with_extensions(&tcp6(), extensions);
        let l4 = L4_OF_IPV6 + extensions.iter().map(|(_, units)| 8 * usize::from(*units)).sum::<usize>();
        let checked = check(request(gso::TCPV6, l4), &frame).unwrap();
        assert_eq!(usize::from(checked.header.hdr_len), l4 + 20);
        assert!(matches!(check(request(gso::TCPV6, L4_OF_IPV6), &frame), Err(HeaderFault::Checksum { .. })));
    }
}

#[test]
fn fragment_is_not_segmented() {
    const FRAGMENT: u8 = 44;
    let frame = with_extensions(&tcp6(), &[(FRAGMENT, 1)]);
    let result = check(request(gso::TCPV6, L4_OF_IPV6 + 8), &frame);
    assert_eq!(result, Err(HeaderFault::WrongProtocol { gso_type: gso::TCPV6 }));
}

#[test]
fn extension_headers_beyond_what_is_copied_are_refused() {
    let frame = with_extensions(&tcp6(), &[(0, 31)]);
    assert!(check(request(gso::TCPV6, L4_OF_IPV6 + 248), &frame).is_err());
}

#[test]
fn protocol_headers_must_be_whole() {
    for (gso_type, frame, l4, headers, _) in good_requests() {
        for len in 14..headers {
            assert!(check(request(gso_type, l4), &frame[..len]).is_err(), "{gso_type:#x} cut to {len}");
        }
        assert!(check(request(gso_type, l4), &frame[..headers]).is_ok());
    }
    let mut frame = tcp4();
    frame[L4_OF_IPV4 + 12] = 0x40;
    assert!(check(request(gso::TCPV4, L4_OF_IPV4), &frame).is_err(), "a TCP header of 16 bytes");
    frame[L4_OF_IPV4 + 12] = 0xf0;
    assert_eq!(check(request(gso::TCPV4, L4_OF_IPV4), &frame).unwrap().header.hdr_len, 34 + 60);
    assert!(check(request(gso::TCPV4, L4_OF_IPV4), &frame[..80]).is_err(), "TCP options are cut off");
}

// To the guest.

const RX_BITS: [u64; 7] = [
    feature::GUEST_CSUM,
    feature::GUEST_TSO4,
    feature::GUEST_TSO6,
    feature::GUEST_ECN,
    feature::GUEST_UFO,
    feature::GUEST_USO4,
    feature::GUEST_USO6,
];

/// What a guest may be given, told independently: the features that a header needs, if there are any with which it may be.
fn rx_needs(flags: u8, gso_type: u8) -> Option<u64> {
    if gso_type != gso::NONE && flags & net_flag::NEEDS_CSUM == 0 {
        return None;
    }
    let csum = if flags & net_flag::NEEDS_CSUM != 0 { feature::GUEST_CSUM } else { 0 };
    let ecn = if gso_type & gso::ECN != 0 { feature::GUEST_ECN } else { 0 };
    let segmentation = match gso_type & !gso::ECN {
        gso::NONE => 0,
        gso::TCPV4 => feature::GUEST_TSO4,
        gso::TCPV6 => feature::GUEST_TSO6,
        gso::UDP => feature::GUEST_UFO,
        gso::UDP_L4 => feature::GUEST_USO4 | feature::GUEST_USO6,
        _ => return None,
    };
    Some(csum | ecn | segmentation)
}

#[test]
fn guest_is_given_nothing_that_it_did_not_negotiate() {
    for chosen in 0..1_u32 << RX_BITS.len() {
        let pick = |(k, bit): (usize, &u64)| if chosen >> k & 1 == 1 { *bit } else { 0 };
        let features: u64 = RX_BITS.iter().enumerate().map(pick).sum();
        let guest = GuestOffloads::of(features);
        // Every other guest offload needs GUEST_CSUM (VIRTIO 1.3, "Feature bit requirements").
        let features = if features & feature::GUEST_CSUM == 0 { 0 } else { features };
        for gso_type in 0..=255 {
            for flags in 0..8 {
                let header = VnetHdr { flags, gso_type, gso_size: 1448, num_buffers: 9, ..partial(34, 16) };
                let header = VnetHdr { flags, ..header };
                let allowed = rx_needs(flags, gso_type).is_some_and(|needs| needs & !features == 0);
                let given = check_rx(ours(header), guest);
                assert_eq!(given.is_ok(), allowed, "{header:?} with {features:#x}");
                let mut place = header.to_bytes();
                assert_eq!(check_rx_in_place(&mut place, guest).is_ok(), allowed);
                assert_eq!(place, given.map_or(header.to_bytes(), |given| given.to_bytes()));
                let Ok(given) = given else { continue };
                let may = net_flag::NEEDS_CSUM | net_flag::DATA_VALID;
                let kept = if features & feature::GUEST_CSUM != 0 { flags & may } else { 0 };
                assert_eq!((given.flags, given.gso_type, given.num_buffers), (kept, gso_type, 0));
            }
        }
    }
}

// Random headers.

/// What the kernel relies on in a request to segment, read from the frame by other means than the library's.
fn is_sound(header: &VnetHeader, len: usize, frame: &[u8]) -> bool {
    let mut at = 12;
    let ethertype = loop {
        let word = u16::from_be_bytes([frame[at], frame[at + 1]]);
        at += 2;
        if word != 0x8100 && word != 0x88a8 {
            break word;
        }
        at += 2;
    };
    let kind = header.gso_type & 0x7f;
    let (is_tcp, l4) = (matches!(kind, 1 | 4), usize::from(header.csum_start));
    let version_fits = match ethertype {
        0x0800 => frame[at] >> 4 == 4 && kind != 4 && l4 == at + usize::from(frame[at] & 15) * 4,
        0x86dd => frame[at] >> 4 == 6 && kind != 1 && l4 >= at + 40 && (l4 - at).is_multiple_of(8),
        _ => false,
    };
    let l4_len = if is_tcp { usize::from(frame[l4 + 12] >> 4) * 4 } else { 8 };
    let payload = len - (l4 + l4_len);
    version_fits
        && header.flags == 1
        && header.gso_size > 0
        && header.csum_offset == if is_tcp { 16 } else { 6 }
        && usize::from(header.hdr_len) == l4 + l4_len
        && l4_len >= if is_tcp { 20 } else { 8 }
        && payload.div_ceil(usize::from(header.gso_size)) <= 1366
}

fn random_header() -> impl Strategy<Value = VnetHdr> {
    let near = prop_oneof![Just(34_u16), Just(38), Just(54), Just(62), any::<u16>()];
    let offset = prop_oneof![Just(16_u16), Just(6), any::<u16>()];
    let kind = prop_oneof![Just(0_u8), Just(1), Just(3), Just(4), Just(5), Just(0x81), any::<u8>()];
    let flags = prop_oneof![Just(0_u8), Just(1), any::<u8>()];
    (flags, kind, any::<u16>(), prop_oneof![Just(1448_u16), any::<u16>()], near, offset).prop_map(
        |(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)| VnetHdr {
            flags,
            gso_type,
            hdr_len,
            gso_size,
            csum_start,
            csum_offset,
            num_buffers: 0,
        },
    )
}

fn random_frame() -> impl Strategy<Value = Vec<u8>> {
    let whole = prop_oneof![Just(tcp4()), Just(tcp6()), Just(udp4()), Just(udp6()), Just(frames::vlan(&tcp4(), 3))];
    let spoiled = (whole, prop::collection::vec((12..100_usize, any::<u8>()), 0..3), 14..400_usize).prop_map(
        |(mut frame, bytes, len)| {
            bytes.into_iter().for_each(|(at, byte)| frame[at] = byte);
            frame.truncate(len);
            frame
        },
    );
    prop_oneof![4 => spoiled, 1 => prop::collection::vec(any::<u8>(), 0..300)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_passes_is_sound_and_nothing_panics(
        header in random_header(),
        frame in random_frame(),
        more in prop_oneof![Just(0_usize), 0..70_000_usize],
        features in prop_oneof![Just(TX_ALL), any::<u64>()],
    ) {
        let len = frame.len() + if frame.len() >= 192 { more } else { 0 };
        if let Ok(checked) = check_with(features, header, len, &frame) {
            let CheckedHeader { header, segments } = checked;
            prop_assert!((14..=LONGEST).contains(&len) && header.hdr_len <= 192 && header.flags <= 1);
            if header.is_gso() {
                prop_assert!(is_sound(&header, len, &frame), "{header:?}");
                prop_assert!(segments <= 1366);
            } else {
                let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
                prop_assert!(header.flags == 0 || (header.csum_start >= 14 && end <= len));
                prop_assert_eq!((header.hdr_len, segments), (0, 1));
            }
        }
    }
}
