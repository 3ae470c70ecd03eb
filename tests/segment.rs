//! Cutting frames for the guest: against an independent splitter, and with hostile bytes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::cell::Cell;

use common::frames::{self, Ends, L4Csum, Stamp, payload, vlan};
use common::split;
use common::virtio::{VnetHdr, feature, gso, net_flag};
use proptest::prelude::*;
use vhost_user_net::net::features::GuestOffloads;
use vhost_user_net::net::header::{PROTOCOL_HEADERS_MAX, VnetHeader, check_rx};
use vhost_user_net::net::segment::{Need, Plan, complete_checksum, plan};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

fn ours(header: &VnetHdr) -> VnetHeader {
    VnetHeader::from_bytes(&header.to_bytes())
}

fn theirs(header: &VnetHeader) -> VnetHdr {
    VnetHdr::from_bytes(&header.to_bytes())
}

/// The segments of a frame, each with its header.
fn cut(plan: &Plan, frame: &[u8]) -> Vec<(VnetHdr, Vec<u8>)> {
    let mut out = [0; PROTOCOL_HEADERS_MAX];
    let segment = |index| {
        let piece = plan.segment(frame, index, &mut out).expect("as many segments as it says");
        (theirs(&piece.header), [&out[..piece.headers_len], &frame[piece.payload]].concat())
    };
    let all = (0..plan.segments()).map(segment).collect();
    assert_eq!(plan.segment(frame, plan.segments(), &mut out), None);
    all
}

/// Whether a guest may see this header.
fn is_negotiated(shown: &VnetHdr, guest: GuestOffloads) -> bool {
    let segmentation = match shown.gso_type & !gso::ECN {
        gso::NONE => true,
        gso::TCPV4 => guest.has(feature::GUEST_TSO4),
        gso::TCPV6 => guest.has(feature::GUEST_TSO6),
        gso::UDP => guest.has(feature::GUEST_UFO),
        gso::UDP_L4 => guest.has(feature::GUEST_USO4) && guest.has(feature::GUEST_USO6),
        _ => false,
    };
    let ecn = shown.gso_type & gso::ECN == 0 || guest.has(feature::GUEST_ECN);
    let is_whole = shown.gso_type == gso::NONE || shown.flags & net_flag::NEEDS_CSUM != 0;
    segmentation && ecn && is_whole && (shown.flags == 0 || guest.has(feature::GUEST_CSUM))
}

/// A frame that is to be cut: IP version, protocol, payload, segment size, tags, TCP flags.
#[derive(Clone, Debug)]
struct Large {
    is_ipv4: bool,
    is_tcp: bool,
    payload: usize,
    size: u16,
    tags: usize,
    flags: u8,
    sequence: u32,
    id: u16,
}

fn any_large() -> impl Strategy<Value = Large> {
    let shape = (any::<bool>(), any::<bool>(), 16..20_000_usize, 300..3000_u16);
    let flags = prop::sample::subsequence(vec![FIN, PSH, CWR], 0..=3).prop_map(|bits| bits.iter().sum());
    (shape, 0..3_usize, flags, any::<u32>(), any::<u16>()).prop_map(
        |((is_ipv4, is_tcp, payload, size), tags, flags, sequence, id)| Large {
            is_ipv4,
            is_tcp,
            // At least two segments: the splitter takes a single one for an error.
            payload: payload.max(usize::from(size) + 1),
            size,
            tags,
            flags,
            sequence,
            id,
        },
    )
}

impl Large {
    fn build(&self) -> (VnetHdr, Vec<u8>) {
        let bytes = payload(Stamp { stream: 1, seq: 0 }, self.payload);
        let mut frame = match (self.is_ipv4, self.is_tcp) {
            (true, true) => frames::tcp4(&Ends::RX, self.sequence, &bytes, L4Csum::Partial),
            (true, false) => frames::udp4(&Ends::RX, &bytes, L4Csum::Partial),
            (false, true) => frames::tcp6(&Ends::RX, self.sequence, &bytes, L4Csum::Partial),
            (false, false) => frames::udp6(&Ends::RX, &bytes, L4Csum::Partial),
        };
        let l4 = 14 + if self.is_ipv4 { 20 } else { 40 };
        if self.is_ipv4 {
            frame[18..20].copy_from_slice(&self.id.to_be_bytes());
            frame[24..26].fill(0);
            let sum = !frames::checksum_add(0, &frame[14..34]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        if self.is_tcp {
            frame[l4 + 13] = 0x10 | self.flags;
        }
        for tag in 0..self.tags {
            frame = vlan(&frame, 5 + tag as u16);
        }
        let csum_start = (l4 + 4 * self.tags) as u16;
        let (gso_type, csum_offset, transport) = match (self.is_ipv4, self.is_tcp) {
            (true, true) => (gso::TCPV4, 16, 20),
            (false, true) => (gso::TCPV6, 16, 20),
            _ => (gso::UDP_L4, 6, 8),
        };
        let hdr_len = csum_start + transport;
        let flags = net_flag::NEEDS_CSUM;
        (VnetHdr { flags, gso_type, hdr_len, gso_size: self.size, csum_start, csum_offset, num_buffers: 0 }, frame)
    }
}

/// Congestion is reported once (RFC 3168, "6.1.2 The TCP Sender"), where the header says that it is reported. Else the flag
/// belongs to the counter of accurate ECN (RFC 9768, "The ACE Field").
#[test]
fn cwr_stays_on_the_first_segment_or_on_all_as_the_header_says() {
    let large = Large {
        is_ipv4: true,
        is_tcp: true,
        payload: 3000,
        size: 1000,
        tags: 0,
        flags: CWR | PSH,
        sequence: u32::MAX - 500,
        id: u16::MAX,
    };
    let (header, frame) = large.build();
    for (ecn, later) in [(gso::ECN, 0), (0, CWR)] {
        let header = VnetHdr { gso_type: header.gso_type | ecn, ..header };
        let Ok(Need::Segmentation(plan)) = plan(ours(&header), &frame, GuestOffloads::of(0)) else {
            panic!("it can be cut");
        };
        let flags: Vec<_> = cut(&plan, &frame).iter().map(|(_, segment)| segment[34 + 13]).collect();
        assert_eq!(flags, [0x10 | CWR, 0x10 | later, 0x10 | PSH | later]);
    }
}

/// The host leaves SCTP's checksum open, too: a CRC32c, calculated here by other means.
#[test]
fn sctp_checksum_is_completed_as_what_it_is() {
    const SCTP: u8 = 132;
    // Ports, tag, checksum; and a chunk of data, of zeros.
    let mut packet =
        [&[0x13, 0x88, 0x0f, 0xa0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 3, 0, 0, 16][..], &[0; 12]].concat();
    let ip = [0x45, 0, 0, 48, 0, 0, 0x40, 0, 64, SCTP, 0, 0, 10, 99, 0, 1, 10, 99, 0, 2];
    let mut frame = frames::ethernet(&Ends::RX, frames::ETHERTYPE_IPV4, &[&ip[..], &packet].concat());
    let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 8, ..VnetHdr::default() };
    assert_eq!(plan(ours(&header), &frame, GuestOffloads::of(0)), Ok(Need::Checksum));
    let shown = complete_checksum(ours(&header), &mut frame).unwrap();
    packet[8..12].copy_from_slice(&[0x58, 0x31, 0x22, 0x43]);
    assert_eq!((theirs(&shown), &frame[34..]), (VnetHdr::default(), &packet[..]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn segments_are_those_of_an_independent_splitter(large in any_large(), checksums_left in any::<bool>()) {
        let (header, frame) = large.build();
        let guest = GuestOffloads::of(if checksums_left { feature::GUEST_CSUM } else { 0 });
        let Ok(Need::Segmentation(plan)) = plan(ours(&header), &frame, guest) else {
            panic!("{large:?} can be cut");
        };
        let wanted = split::split(&header, &frame).map_err(TestCaseError::fail)?;
        let got: Vec<_> = cut(&plan, &frame)
            .iter()
            .map(|(header, frame)| {
                assert_eq!(header.gso_type, gso::NONE);
                assert_eq!(header.flags, u8::from(checksums_left) * net_flag::NEEDS_CSUM);
                split::complete(header, frame)
            })
            .collect();
        let different = got.iter().zip(&wanted).position(|(got, wanted)| got != wanted);
        prop_assert_eq!((different, got.len()), (None, wanted.len()));
    }
}

/// Bytes that may be anything: sometimes with a header that asks for what there is.
fn any_bytes() -> impl Strategy<Value = (VnetHeader, Vec<u8>)> {
    let bytes = (any::<[u8; 12]>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..300));
    bytes.prop_map(|(header, likely, mut frame)| {
        let mut header = VnetHeader::from_bytes(&header);
        if likely {
            header.flags = 1;
            header.gso_type = [0, 1, 4, 5][usize::from(header.gso_type % 4)];
            header.csum_start = if header.gso_type == 4 { 54 } else { 34 };
            header.csum_offset = if header.gso_type == 5 { 6 } else { 16 };
            if frame.len() > 40 {
                frame[12..15].copy_from_slice(&if header.gso_type == 4 { [0x86, 0xdd, 0x60] } else { [8, 0, 0x45] });
            }
        }
        (header, frame)
    })
}

/// A frame that can be cut, with some bytes of its headers changed, and sometimes its end missing: close enough to a good
/// one that most are cut.
fn spoiled_large() -> impl Strategy<Value = (VnetHeader, Vec<u8>)> {
    // Half of them where the transport header says how long it is.
    let spots = prop::collection::vec((any::<bool>(), 0..104_usize, any::<u8>()), 0..4);
    let len = prop_oneof![3 => Just(None), 1 => (0..200_usize).prop_map(Some)];
    (any_large(), spots, len).prop_map(|(large, spots, len)| {
        let (header, mut frame) = large.build();
        let mut shown = header.to_bytes();
        for (is_length, at, byte) in spots {
            if is_length {
                frame[usize::from(header.csum_start) + 12] = byte;
            } else if at < shown.len() {
                shown[at] = byte;
            } else {
                frame[at - shown.len()] = byte;
            }
        }
        frame.truncate(len.unwrap_or(usize::MAX));
        (VnetHeader::from_bytes(&shown), frame)
    })
}

/// The kernel is believed little more than the guest: nothing panics, and nothing outside the frame is named.
#[test]
fn hostile_bytes_are_cut_within_the_frame_or_refused() {
    /// Of the 600 cases, how many have to have gone each way: about a tenth of those that do.
    const LEAST: [u32; 4] = [9, 1, 20, 30];
    let config = ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() };
    let seen = [const { Cell::new(0_u32) }; 4];
    let see = |way: usize| seen[way].set(seen[way].get() + 1);
    let inputs = prop_oneof![any_bytes(), spoiled_large()];
    proptest!(config, |((header, mut frame) in inputs, features in any::<u64>())| {
        let guest = GuestOffloads::of(features);
        if let Ok(shown) = check_rx(header, guest) {
            see(0);
            prop_assert!(is_negotiated(&theirs(&shown), guest), "{shown:?}");
            return Ok(());
        }
        match plan(header, &frame, guest) {
            Ok(Need::Checksum) => {
                see(1);
                prop_assert_eq!(complete_checksum(header, &mut frame), Ok(VnetHeader::default()));
            }
            Ok(Need::Segmentation(plan)) => {
                see(2);
                let segments = cut(&plan, &frame);
                let bytes: usize = segments.iter().map(|(_, segment)| segment.len()).sum();
                prop_assert!(bytes >= frame.len());
                let all_negotiated = segments.iter().all(|(shown, _)| is_negotiated(shown, guest));
                prop_assert!(all_negotiated, "{segments:?}");
            }
            Err(_) => see(3),
        }
    });
    let seen = seen.map(Cell::into_inner);
    println!("Shown as it is, checksum completed, cut, refused: {seen:?}");
    assert!(seen.iter().zip(LEAST).all(|(seen, least)| *seen >= least), "{seen:?}: not what this test is for");
}
