//! What becomes one frame, and how that one looks.

use crate::common::virtio::{VnetHdr, gso};
use crate::{
    ACK, DF, ECE, FIN, Frame, KINDS, PSH, Sent, TCP, TCP4, TCP6, UDP, UDP4, UDP6, V4, assert_merges, be16, coalesce,
    make_sum_zero, render, stream, tagged,
};

#[test]
fn frames_of_one_flow_become_one() {
    for kind in KINDS {
        for tags in 0..=2 {
            for fragment in [0, DF] {
                let first = Frame { tags: tagged(tags), fragment, ..Frame::new(kind) };
                assert_merges(&stream(first, &[1448; 40]), &[40]);
            }
        }
    }
}

#[test]
fn merged_frame_asks_for_segmentation_of_its_protocol() {
    for (kind, gso_type) in [(TCP4, gso::TCPV4), (TCP6, gso::TCPV6), (UDP4, gso::UDP_L4), (UDP6, gso::UDP_L4)] {
        let frames = stream(Frame::new(kind), &[100, 100, 30]);
        let sent = coalesce(&render(&frames));
        let [Sent { frame, frames: 3 }] = &sent[..] else { panic!("{sent:?}") };
        let expected =
            VnetHdr { gso_type, gso_size: 100, hdr_len: frames[0].headers() as u16, ..frames[0].render().header };
        assert_eq!(frame.header, expected);
        assert_eq!(frame.bytes.len(), frames[0].headers() + 230);
    }
}

#[test]
fn frame_alone_is_sent_as_it_was() {
    for kind in KINDS {
        let frame = Frame { flags: ACK | PSH, ..Frame::new(kind) }.with_payload(100).render();
        let sent = coalesce(std::slice::from_ref(&frame));
        assert_eq!((sent.len(), &sent[0].frame), (1, &frame));
    }
}

#[test]
fn shorter_frame_ends_a_run() {
    for kind in KINDS {
        assert_merges(&stream(Frame::new(kind), &[100, 100, 99, 100, 100, 1, 1]), &[3, 3, 1]);
    }
}

#[test]
fn payloads_of_every_parity_and_of_one_byte_are_merged() {
    for kind in KINDS {
        for len in [1, 2, 3, 7, 1447] {
            assert_merges(&stream(Frame::new(kind), &[len; 10]), &[10]);
        }
    }
}

#[test]
fn push_and_fin_are_those_of_the_last_frame() {
    for kind in TCP {
        for flags in [PSH, FIN, PSH | FIN] {
            let mut frames = stream(Frame::new(kind), &[100; 3]);
            frames[2].flags |= flags;
            frames.extend(stream(frames[2].next(100), &[100; 2]));
            frames[3].flags = ACK;
            frames[4].flags = ACK;
            assert_merges(&frames, &[3, 2]);
        }
    }
}

#[test]
fn echo_of_congestion_on_all_is_merged() {
    for kind in TCP {
        assert_merges(&stream(Frame { flags: ACK | ECE, ..Frame::new(kind) }, &[100; 3]), &[3]);
    }
}

#[test]
fn equal_options_are_merged() {
    for kind in TCP {
        for len in [4, 12, 40] {
            let options = (1..=len).collect();
            assert_merges(&stream(Frame { options, tags: tagged(2), ..Frame::new(kind) }, &[100; 3]), &[3]);
        }
    }
}

#[test]
fn sequence_number_and_identification_wrap() {
    for kind in KINDS {
        let first = Frame { seq: u32::MAX - 149, id: 0xfffe, ..Frame::new(kind) };
        assert_merges(&stream(first, &[100; 4]), &[4]);
    }
}

#[test]
fn identification_is_free_with_df() {
    for kind in V4 {
        for ids in [[0, 0, 0], [9, 8, 7], [1, 500, 3]] {
            let mut frames = stream(Frame { fragment: DF, ..Frame::new(kind) }, &[100; 3]);
            frames.iter_mut().zip(ids).for_each(|(frame, id)| frame.id = id);
            assert_merges(&frames, &[3]);
        }
    }
}

#[test]
fn udp_checksum_that_comes_out_as_0_is_merged() {
    for kind in UDP {
        let mut frames = stream(Frame::new(kind), &[100; 3]);
        make_sum_zero(&mut frames[1]);
        assert_eq!(be16(&frames[1].render().completed(), frames[1].l4() + 6), 0xffff);
        assert_merges(&frames, &[3]);
    }
}

#[test]
fn udp_run_has_at_most_64_frames() {
    for kind in UDP {
        assert_merges(&stream(Frame::new(kind), &[10; 130]), &[64, 64, 2]);
    }
}

#[test]
fn tcp_run_is_bounded_by_its_length_alone() {
    for kind in TCP {
        assert_merges(&stream(Frame::new(kind), &[10; 1000]), &[1000]);
    }
}

#[test]
fn merged_frame_has_at_most_65535_bytes() {
    for kind in KINDS {
        for tags in 0..=2 {
            let first = Frame { tags: tagged(tags), ..Frame::new(kind) };
            let room = 65_535 - first.headers();
            let lengths = [room / 2, room - room / 2];
            // The second may not be longer than the first.
            let lengths = [lengths[0].max(lengths[1]), lengths[0].min(lengths[1])];
            assert_merges(&stream(first.clone(), &lengths), &[2]);
            let half = room / 2 + 1;
            assert_merges(&stream(first, &[half, room - half + 1]), &[1, 1]);
        }
    }
}
