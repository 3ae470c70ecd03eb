//! What must not become one frame: each rule alone.
//!
//! Each check makes two frames that are merged, breaks one rule, and looks again: frames that were never merged would
//! not pass.

use vhost_user_net::net::coalesce::{Coalesce, Segment};
use vhost_user_net::net::flow::flow_hint;

use crate::common::frames::{Ends, arp_request, checksum_add};
use crate::common::virtio::{VnetHdr, gso, net_flag};
use crate::{
    ACK, ALL, CWR, DF, ECE, FIN, Frame, KINDS, Kind, PSH, RST, Rendered, SYN, TCP, TCP4, TCP6, UDP, UDP4, UDP6, URG,
    V4, V6, assert_merges, be16, coalesce_with, counts, ours, put, render, stream, tagged, there_and_back,
};

/// A frame is merged with its successor, but no longer once `change` was done to the second.
fn assert_must_be_equal(kinds: &[Kind], change: impl Fn(&mut Frame)) {
    for kind in kinds {
        for fragment in [0, DF] {
            let first = Frame { options: vec![1; 12], tags: tagged(1), fragment, ..Frame::new(*kind) };
            let mut frames = stream(first, &[100; 2]);
            assert_eq!(counts(&render(&frames)), [2]);
            change(&mut frames[1]);
            assert_merges(&frames, &[1, 1]);
        }
    }
}

/// The same, once it was done to both: the frames are still equal.
fn assert_never(kinds: &[Kind], change: impl Fn(&mut Frame)) {
    for kind in kinds {
        let mut frames = stream(Frame { tags: tagged(1), ..Frame::new(*kind) }, &[100; 2]);
        assert_eq!(counts(&render(&frames)), [2]);
        frames.iter_mut().for_each(&change);
        assert_merges(&frames, &[1, 1]);
    }
}

/// The same, for a change of the bytes or the header: to both, to the first, to the second.
fn assert_never_raw(kinds: &[Kind], change: impl Fn(&Frame, &mut Rendered)) {
    for kind in kinds {
        for changed in [0..2, 0..1, 1..2] {
            let frames = stream(Frame { tags: tagged(1), ..Frame::new(*kind) }, &[100; 2]);
            let mut rendered = render(&frames);
            assert_eq!(counts(&rendered), [2]);
            for at in changed {
                change(&frames[at], &mut rendered[at]);
            }
            assert_eq!(there_and_back(&rendered).unwrap(), [1, 1]);
        }
    }
}

/// That a frame is of another flow, once `change` was done to it, is seen at first sight.
fn assert_other_flow(kinds: &[Kind], change: impl Fn(&mut Frame)) {
    for kind in kinds {
        let mut other = Frame::new(*kind);
        change(&mut other);
        let [first, other] = [Frame::new(*kind), other].map(|frame| frame.render());
        assert_eq!(flow_hint(first.start()), flow_hint(&first.start()[..38]), "{kind:?}");
        assert_ne!(flow_hint(first.start()), flow_hint(other.start()), "{kind:?}");
    }
}

#[test]
fn other_flow_is_seen_at_first_sight() {
    assert_other_flow(&KINDS, |frame| frame.dst[5] ^= 1);
    assert_other_flow(&KINDS, |frame| frame.src[0] ^= 2);
    assert_other_flow(&V4, |frame| frame.src_ip[15] ^= 1);
    assert_other_flow(&V4, |frame| frame.dst_ip[12] ^= 1);
    assert_other_flow(&V4, |frame| frame.src_port ^= 1);
    assert_other_flow(&V4, |frame| frame.dst_port ^= 0x100);
    assert_eq!(flow_hint(&[7; 37]), 0, "too short for any");
}

#[test]
fn other_mac_address_is_not_merged() {
    assert_must_be_equal(&KINDS, |frame| frame.dst[5] ^= 1);
    assert_must_be_equal(&KINDS, |frame| frame.src[0] ^= 2);
}

#[test]
fn other_vlan_is_not_merged() {
    assert_must_be_equal(&KINDS, |frame| frame.tags[0].1 ^= 1);
    assert_must_be_equal(&KINDS, |frame| frame.tags[0].1 ^= 0x8000);
    assert_must_be_equal(&KINDS, |frame| frame.tags[0].0 = 0x88a8);
    assert_must_be_equal(&KINDS, |frame| frame.tags = tagged(0));
    assert_must_be_equal(&KINDS, |frame| frame.tags.extend(tagged(1)));
}

#[test]
fn third_vlan_tag_is_not_merged() {
    assert_never(&KINDS, |frame| frame.tags = vec![(0x8100, 1); 3]);
}

#[test]
fn other_address_is_not_merged() {
    assert_must_be_equal(&KINDS, |frame| frame.src_ip[15] ^= 1);
    assert_must_be_equal(&KINDS, |frame| frame.dst_ip[12] ^= 1);
    assert_must_be_equal(&V6, |frame| frame.src_ip[0] ^= 1);
    // The sum of the pseudo-header stays.
    assert_must_be_equal(&KINDS, |frame| std::mem::swap(&mut frame.src_ip, &mut frame.dst_ip));
}

#[test]
fn other_port_is_not_merged() {
    assert_must_be_equal(&KINDS, |frame| frame.src_port ^= 1);
    assert_must_be_equal(&KINDS, |frame| frame.dst_port ^= 0x100);
}

#[test]
fn other_traffic_class_is_not_merged() {
    for bit in 0..8 {
        assert_must_be_equal(&KINDS, |frame| frame.tos ^= 1 << bit);
    }
}

#[test]
fn other_hop_limit_is_not_merged() {
    assert_must_be_equal(&KINDS, |frame| frame.ttl -= 1);
}

#[test]
fn other_flow_label_is_not_merged() {
    assert_must_be_equal(&V6, |frame| frame.flow_label ^= 1);
    assert_must_be_equal(&V6, |frame| frame.flow_label ^= 0x80000);
}

#[test]
fn other_df_is_not_merged() {
    assert_must_be_equal(&V4, |frame| frame.fragment ^= DF);
}

#[test]
fn identification_that_does_not_count_up_is_not_merged_without_df() {
    for step in [0_u16, 2, 0xffff, 0x100] {
        for kind in V4 {
            let mut frames = stream(Frame::new(kind), &[100; 2]);
            frames[1].id = frames[0].id.wrapping_add(step);
            assert_merges(&frames, &[1, 1]);
        }
    }
}

#[test]
fn fragment_is_not_merged() {
    for bits in [0x2000, 0x0001, 0x1000, 0x2000 | DF, 0x0010 | DF] {
        assert_never(&V4, |frame| frame.fragment = bits);
    }
}

#[test]
fn reserved_ipv4_flag_is_not_merged() {
    assert_never(&V4, |frame| frame.fragment |= 0x8000);
}

#[test]
fn ipv4_options_are_not_merged() {
    assert_never_raw(&V4, |frame, rendered| {
        let ip = frame.ip();
        rendered.bytes[ip] = 0x46;
        rendered.bytes.splice(ip + 20..ip + 20, [1; 4]);
        let total = be16(&rendered.bytes, ip + 2) + 4;
        put(&mut rendered.bytes, ip + 2, total);
        put(&mut rendered.bytes, ip + 10, 0);
        let sum = !checksum_add(0, &rendered.bytes[ip..ip + 24]);
        put(&mut rendered.bytes, ip + 10, sum);
        rendered.header.csum_start += 4;
    });
}

#[test]
fn wrong_ip_version_or_header_length_is_not_merged() {
    for first in [0x44, 0x55, 0x65, 0x05] {
        assert_never_raw(&V4, |frame, rendered| {
            rendered.bytes[frame.ip()] = first;
            frame.repair(rendered);
        });
    }
    assert_never_raw(&V6, |frame, rendered| rendered.bytes[frame.ip()] ^= 0x20);
}

#[test]
fn ipv6_extension_header_is_not_merged() {
    for extension in [0, 43, 44, 60] {
        assert_never_raw(&V6, |frame, rendered| {
            let ip = frame.ip();
            let protocol = std::mem::replace(&mut rendered.bytes[ip + 6], extension);
            rendered.bytes.splice(ip + 40..ip + 40, [protocol, 0, 1, 4, 0, 0, 0, 0]);
            let len = be16(&rendered.bytes, ip + 4) + 8;
            put(&mut rendered.bytes, ip + 4, len);
            rendered.header.csum_start += 8;
        });
    }
}

#[test]
fn other_protocols_are_not_merged() {
    for protocol in [0, 1, 47, 50, 136] {
        assert_never_raw(&KINDS, |frame, rendered| {
            let at = frame.ip() + if frame.kind.v6 { 6 } else { 9 };
            rendered.bytes[at] = protocol;
            frame.repair(rendered);
        });
    }
    let arp = Rendered { header: VnetHdr::default(), bytes: arp_request(&Ends::TX) };
    assert_eq!(there_and_back(&[arp.clone(), arp]).unwrap(), [1, 1]);
}

#[test]
fn tcp_and_udp_are_not_merged() {
    for v6 in [false, true] {
        let tcp = Frame::new(Kind { v6, tcp: true }).with_payload(100);
        let udp = Frame { kind: Kind { v6, tcp: false }, ..tcp.next(100) };
        assert_merges(&[tcp.clone(), udp.clone()], &[1, 1]);
        assert_merges(&[udp, tcp], &[1, 1]);
    }
}

#[test]
fn wrong_ipv4_checksum_is_not_merged() {
    assert_never_raw(&V4, |frame, rendered| rendered.bytes[frame.ip() + 10] ^= 1);
    assert_never_raw(&V4, |frame, rendered| put(&mut rendered.bytes, frame.ip() + 10, 0));
}

#[test]
fn ipv4_checksum_of_ffff_is_not_merged_where_the_kernel_writes_0() {
    let mut frames = stream(Frame { fragment: DF, ..Frame::new(TCP4) }, &[100; 2]);
    for frame in &mut frames {
        let sum = be16(&frame.render().bytes, frame.ip() + 10);
        frame.id = checksum_add(frame.id, &sum.to_be_bytes());
    }
    let mut rendered = render(&frames);
    assert_eq!(be16(&rendered[0].bytes, 24), 0);
    assert_eq!(counts(&rendered), [2]);
    for frame in &mut rendered {
        put(&mut frame.bytes, 24, 0xffff);
    }
    assert_eq!(there_and_back(&rendered).unwrap(), [1, 1]);
}

#[test]
fn padding_is_not_merged() {
    for len in [1, 6] {
        assert_never_raw(&KINDS, |_, rendered| rendered.bytes.extend(vec![0; len]));
    }
}

#[test]
fn frame_that_is_cut_short_is_not_merged() {
    assert_never_raw(&KINDS, |_, rendered| rendered.bytes.truncate(rendered.bytes.len() - 1));
}

#[test]
fn wrong_udp_length_is_not_merged() {
    for len in [0, 8, 107, 109] {
        assert_never_raw(&UDP, |frame, rendered| {
            put(&mut rendered.bytes, frame.l4() + 4, len);
        });
    }
}

#[test]
fn frame_without_checksum_request_is_not_merged() {
    assert_never_raw(&KINDS, |_, rendered| rendered.header = VnetHdr::default());
    assert_never_raw(&KINDS, |_, rendered| {
        let bytes = rendered.completed();
        *rendered = Rendered { header: VnetHdr::default(), bytes };
    });
}

#[test]
fn other_flag_beside_the_checksum_request_is_not_merged() {
    assert_never_raw(&KINDS, |_, rendered| rendered.header.flags |= net_flag::DATA_VALID);
}

#[test]
fn checksum_request_for_another_place_is_not_merged() {
    assert_never_raw(&KINDS, |_, rendered| rendered.header.csum_start += 2);
    assert_never_raw(&KINDS, |_, rendered| rendered.header.csum_start -= 2);
    assert_never_raw(&KINDS, |_, rendered| rendered.header.csum_offset += 2);
    assert_never_raw(&KINDS, |_, rendered| rendered.header.csum_offset -= 2);
}

#[test]
fn checksum_field_that_is_not_the_sum_of_the_pseudo_header_is_not_merged() {
    let at = |frame: &Frame| frame.l4() + frame.csum_offset();
    assert_never_raw(&KINDS, |frame, rendered| put(&mut rendered.bytes, at(frame), 0));
    assert_never_raw(&KINDS, |frame, rendered| put(&mut rendered.bytes, at(frame), 0xffff));
    assert_never_raw(&KINDS, |_, rendered| rendered.bytes = rendered.completed());
    assert_never_raw(&KINDS, |frame, rendered| {
        let without_len = checksum_add(0, &[0xff, !((frame.headers() - frame.l4()) as u8 + 100)]);
        let sum = checksum_add(be16(&rendered.bytes, at(frame)), &without_len.to_be_bytes());
        put(&mut rendered.bytes, at(frame), sum);
    });
}

#[test]
fn gso_frame_is_not_merged() {
    for (kind, gso_type) in [(TCP4, gso::TCPV4), (TCP6, gso::TCPV6), (UDP4, gso::UDP_L4), (UDP6, gso::UDP_L4)] {
        for frame in stream(Frame::new(kind), &[100; 2]) {
            let plain = frame.render();
            assert!(plain.segment(ALL).is_some());
            let hdr_len = frame.headers() as u16;
            let request = VnetHdr { gso_type, gso_size: 60, hdr_len, ..plain.header };
            assert_eq!(Rendered { header: request, ..plain }.segment(ALL), None);
        }
    }
}

#[test]
fn protocol_that_the_device_does_not_take_is_not_merged() {
    for kind in KINDS {
        let frames = render(&stream(Frame::new(kind), &[100; 2]));
        let only = |tcp, udp| coalesce_with(Coalesce { tcp, udp }, &frames).len();
        assert_eq!(only(kind.tcp, !kind.tcp), 1);
        assert_eq!(only(!kind.tcp, kind.tcp), 2);
        assert_eq!(coalesce_with(Coalesce::default(), &frames).len(), 2);
    }
}

#[test]
fn sequence_number_that_does_not_follow_is_not_merged() {
    for step in [1_u32, u32::MAX, 100, 1 << 31] {
        assert_must_be_equal(&TCP, |frame| frame.seq = frame.seq.wrapping_add(step));
    }
    let frame = Frame::new(TCP4).with_payload(100);
    let again = Frame { id: frame.id + 1, ..frame.clone() };
    assert_merges(&[frame, again], &[1, 1]);
}

#[test]
fn other_acknowledgement_is_not_merged() {
    assert_must_be_equal(&TCP, |frame| frame.ack += 1);
    assert_must_be_equal(&TCP, |frame| frame.ack ^= 1 << 31);
}

#[test]
fn other_window_is_not_merged() {
    assert_must_be_equal(&TCP, |frame| frame.window += 1);
}

#[test]
fn urgent_pointer_is_not_merged() {
    assert_never(&TCP, |frame| frame.urgent = 1);
}

#[test]
fn other_options_are_not_merged() {
    for at in 0..12 {
        assert_must_be_equal(&TCP, |frame| frame.options[at] ^= 0x80);
    }
    assert_must_be_equal(&TCP, |frame| frame.options.truncate(8));
    assert_must_be_equal(&TCP, |frame| frame.options.extend([1; 4]));
}

#[test]
fn flags_that_segmentation_does_not_give_back_are_not_merged() {
    for flag in [SYN, RST, URG, CWR] {
        assert_never(&TCP, |frame| frame.flags |= flag);
        assert_must_be_equal(&TCP, |frame| frame.flags |= flag);
    }
}

#[test]
fn segment_without_ack_is_not_merged() {
    assert_never(&TCP, |frame| frame.flags = 0);
    assert_never(&TCP, |frame| frame.flags = PSH);
}

#[test]
fn other_echo_of_congestion_is_not_merged() {
    assert_must_be_equal(&TCP, |frame| frame.flags |= ECE);
    let mut frames = stream(Frame { flags: ACK | ECE, ..Frame::new(TCP6) }, &[100; 2]);
    frames[1].flags = ACK;
    assert_merges(&frames, &[1, 1]);
}

#[test]
fn reserved_tcp_bits_are_not_merged() {
    for bit in [1, 2, 4, 8] {
        assert_never(&TCP, |frame| frame.reserved = bit);
    }
}

#[test]
fn tcp_header_of_impossible_length_is_not_merged() {
    for kind in TCP {
        for words in [0, 1, 4, 15] {
            let frame = Frame::new(kind).with_payload(39);
            let mut rendered = frame.render();
            assert!(rendered.segment(ALL).is_some());
            rendered.bytes[frame.l4() + 12] = words << 4;
            assert_eq!(rendered.segment(ALL), None, "{words}");
        }
    }
}

#[test]
fn push_or_fin_before_the_last_frame_is_not_merged() {
    for kind in TCP {
        for flags in [PSH, FIN] {
            let mut frames = stream(Frame::new(kind), &[100; 4]);
            frames[0].flags |= flags;
            assert_merges(&frames, &[1, 3]);
            frames.iter_mut().for_each(|frame| frame.flags |= flags);
            assert_merges(&frames, &[1; 4]);
        }
    }
}

#[test]
fn empty_frame_is_not_merged() {
    for kind in KINDS {
        assert_merges(&stream(Frame::new(kind), &[0, 0]), &[1, 1]);
        assert_merges(&stream(Frame::new(kind), &[100, 0, 100]), &[1, 1, 1]);
    }
}

#[test]
fn longer_frame_is_not_merged() {
    for kind in KINDS {
        assert_merges(&stream(Frame::new(kind), &[100, 101]), &[1, 1]);
        assert_merges(&stream(Frame::new(kind), &[100, 100, 101]), &[2, 1]);
    }
}

#[test]
fn headers_that_were_not_copied_whole_are_not_merged() {
    for kind in KINDS {
        let frame = Frame { options: vec![1; 40], ..Frame::new(kind) }.with_payload(100);
        let (headers, frame) = (frame.headers(), frame.render());
        let of = |copied: usize| Segment::of(ALL, ours(frame.header), &frame.bytes[..copied], frame.bytes.len());
        assert!(of(headers).is_some());
        for copied in 0..headers {
            assert_eq!(of(copied), None, "{copied}");
        }
    }
}
