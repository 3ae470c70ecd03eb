//! What a guest can send wrongly: each is returned unused, counted under its reason, and the next good frame passes.
#![allow(clippy::unwrap_used)]

mod common;

use common::driver::NetDriverSpec;
use common::frames::{self, Ends, L4Csum};
use common::message::Message;
use common::path_bench::{Bench, TX, tx_frame};
use common::split_ring::{Buf, Desc};
use common::virtio::{VnetHdr, desc_flag, feature, gso, net_flag};
use common::{PATIENCE, QUIET};
use rustix::net::sockopt;

/// Makes `descs` available as one chain and expects it back unused, counted by `counter`; then a good frame passes.
fn refused(bench: &mut Bench, what: &str, descs: &[Desc], counter: &str) {
    let before = bench.counter(counter);
    let sent = bench.counter("tx_frames");
    for (index, desc) in (0..).zip(descs) {
        bench.driver.tx.write_desc(index, *desc);
    }
    bench.driver.tx.offer(0);
    bench.driver.tx.publish_and_kick();
    assert_eq!(bench.driver.tx.wait_used(PATIENCE), Some((0, 0)), "{what}");
    assert_eq!((bench.counter(counter), bench.counter("tx_frames")), (before + 1, sent), "{what}: {counter}");
    bench.pass_tx(0, 100);
    assert!(bench.driver.wait_tx_done(PATIENCE));
}

fn bench_with_raw_descriptors(features: u64) -> (Bench, u64) {
    let mut bench = Bench::new(features);
    assert_eq!(bench.driver.tx.take_free(4).unwrap(), [0, 1, 2, 3]);
    let buf = bench.mem.alloc(1 << 20, 16);
    (bench, buf)
}

///
#[test]
fn malformed_chain_is_returned_and_the_next_frame_passes() {
    let desc = |addr, len, flags, next| Desc { addr, len, flags, next };
    let (next, write, indirect) = (desc_flag::NEXT, desc_flag::WRITE, desc_flag::INDIRECT);
    for features in [0, feature::INDIRECT_DESC, feature::EVENT_IDX] {
        let (mut bench, buf) = bench_with_raw_descriptors(features);
        let inner = desc(buf, 64, indirect, 0);
        bench.mem.write(buf + 4096, &[inner.to_bytes(), inner.to_bytes()].concat());
        let cases: Vec<(&str, Vec<Desc>)> = vec![
            ("Q-02 next out of the table", vec![desc(buf, 100, next, 256)]),
            ("Q-03 self loop", vec![desc(buf, 100, next, 0)]),
            ("Q-04 two-node loop", vec![desc(buf, 100, next, 1), desc(buf, 100, next, 0)]),
            ("Q-07 indirect in an indirect table", vec![desc(buf + 4096, 32, indirect, 0)]),
            ("Q-08 indirect with next", vec![desc(buf + 4096, 32, indirect | next, 1), desc(buf, 100, 0, 0)]),
            ("Q-10 empty indirect table", vec![desc(buf + 4096, 0, indirect, 0)]),
            ("Q-10 odd indirect table", vec![desc(buf + 4096, 17, indirect, 0)]),
            ("Q-10 indirect table outside memory", vec![desc(0x100, 32, indirect, 0)]),
            ("Q-11 length wraps", vec![desc(buf, u32::MAX, 0, 0)]),
            ("Q-11 address wraps", vec![desc(u64::MAX - 10, 100, 0, 0)]),
            ("Q-13 outside memory", vec![desc(0, 100, 0, 0)]),
            ("Q-13 partly outside memory", vec![desc(buf, 100, next, 1), desc(0, 100, 0, 0)]),
            ("Q-15 write-only", vec![desc(buf, 100, write, 0)]),
            ("Q-15 write-only first", vec![desc(buf, 12, write | next, 1), desc(buf, 100, 0, 0)]),
            ("Q-15 write-only last", vec![desc(buf, 100, next, 1), desc(buf, 100, write, 0)]),
        ];
        let count = cases.len() as u64;
        for (what, descs) in cases {
            refused(&mut bench, what, &descs, "tx_drop_bad_chain");
        }
        bench.assert_balance(0, 2 * count);
    }
}

/// H-01, H-15
#[test]
fn chain_of_no_possible_length_is_returned_and_counted() {
    let (mut bench, buf) = bench_with_raw_descriptors(0);
    let longest = 12 + 65_535 + 14 + 8;
    for len in [0, 1, 11, 12, 13, 25, longest + 1, 1 << 20] {
        let what = format!("Q-20, Q-21, H-15: {len} bytes");
        refused(&mut bench, &what, &[Desc { addr: buf, len, flags: 0, next: 0 }], "tx_drop_bad_length");
    }
}

#[test]
fn shortest_and_longest_frames_pass() {
    let mut bench = Bench::new(0);
    for len in [14, 15, 65_535 + 14 + 8] {
        let frame = vec![0x11; len];
        bench.driver.send(&VnetHdr::default(), &frame);
        assert!(bench.tap().recv(PATIENCE).unwrap().1 == frame, "{len} bytes");
    }
}

///
#[test]
fn empty_descriptors_in_a_chain_are_passed_over() {
    let (mut bench, buf) = bench_with_raw_descriptors(0);
    let frame = tx_frame(5, 100);
    bench.mem.write(buf, &[&[0; 12][..], &frame].concat());
    for empty in 0..3 {
        for k in 0..3_u16 {
            let (addr, len) = match k {
                _ if k == empty => (u64::MAX, 0),
                _ if k == 0 || (k == 1 && empty == 0) => (buf, 12),
                _ => (buf + 12, 100),
            };
            let flags = if k < 2 { desc_flag::NEXT } else { 0 };
            bench.driver.tx.write_desc(k, Desc { addr, len, flags, next: k + 1 });
        }
        bench.driver.tx.offer(0);
        bench.driver.tx.publish_and_kick();
        assert_eq!(bench.tap().recv(PATIENCE).unwrap().1, frame, "Q-14: number {empty} is empty");
    }
}

/// No driver has a use for them, and each takes time.
#[test]
fn chain_of_many_empty_descriptors_is_returned_and_counted() {
    let (mut bench, buf) = bench_with_raw_descriptors(0);
    bench.mem.write(buf, &[&[0; 12][..], &tx_frame(5, 100)].concat());
    for (turn, empty) in [64, 65].into_iter().enumerate() {
        for k in 0..empty {
            bench.driver.tx.write_desc(k, Desc { addr: buf, len: 0, flags: desc_flag::NEXT, next: k + 1 });
        }
        bench.driver.tx.write_desc(empty, Desc { addr: buf, len: 112, flags: 0, next: 0 });
        bench.driver.tx.offer(0);
        bench.driver.tx.publish_and_kick();
        bench.assert_balance(0, turn as u64 + 1);
        assert_eq!(bench.counter("tx_drop_bad_chain"), turn as u64);
    }
}

///
#[test]
fn same_head_twice_in_a_batch_is_sent_and_returned_twice() {
    let (mut bench, buf) = bench_with_raw_descriptors(0);
    let frame = tx_frame(6, 100);
    bench.mem.write(buf, &[&[0; 12][..], &frame].concat());
    bench.driver.tx.write_desc(0, Desc { addr: buf, len: 112, flags: 0, next: 0 });
    bench.driver.tx.offer(0);
    bench.driver.tx.offer(0);
    bench.driver.tx.publish_and_kick();
    for _ in 0..2 {
        assert_eq!(bench.tap().recv(PATIENCE).unwrap().1, frame, "Q-06");
        assert_eq!(bench.driver.tx.wait_used(PATIENCE), Some((0, 0)));
    }
}

/// H-02, H-03, H-04, H-08, H-11
#[test]
fn header_that_asks_too_much_is_returned_and_counted() {
    let partial = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let segmented = VnetHdr { gso_type: gso::TCPV4, gso_size: 1448, hdr_len: 54, ..partial };
    let tcp = frames::tcp4(&Ends::TX, 1, &[3; 4000], L4Csum::Partial);
    for (features, header) in [
        (0, partial),
        (0, segmented),
        (feature::CSUM, segmented),
        (feature::CSUM | feature::HOST_TSO4, VnetHdr { gso_size: 0, ..segmented }),
        (feature::CSUM | feature::HOST_TSO4, VnetHdr { csum_start: 0xffff, ..segmented }),
        (feature::CSUM | feature::HOST_TSO4, VnetHdr { gso_type: 0x77, ..segmented }),
    ] {
        let mut bench = Bench::new(features);
        bench.driver.send(&header, &tcp);
        assert!(bench.driver.wait_tx_done(PATIENCE));
        assert_eq!(bench.counter("tx_drop_bad_header"), 1, "{header:?}");
        bench.pass_tx(0, 100);
    }
}

/// H-13, H-16, Q-22
#[test]
fn segmentation_request_reaches_the_tap_complete() {
    let mut bench = Bench::new(feature::CSUM | feature::HOST_TSO4);
    let partial = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let wanted = VnetHdr { gso_type: gso::TCPV4, gso_size: 1448, hdr_len: 54, ..partial };
    let tcp = frames::tcp4(&Ends::TX, 1, &frames::payload(frames::Stamp { stream: 1, seq: 0 }, 9000), L4Csum::Partial);
    for cuts in [&[12][..], &[12, 14, 20, 20], &[1; 100], &[9]] {
        let header = VnetHdr { hdr_len: 3, num_buffers: 9, ..wanted };
        bench.driver.queue_split(&[&header.to_bytes()[..], &tcp].concat(), cuts);
        bench.driver.tx.publish_and_kick();
        let (got, frame) = bench.tap().recv(PATIENCE).unwrap();
        assert_eq!(got, wanted, "{cuts:?}");
        assert!(frame == tcp, "{cuts:?}");
    }
}

/// U-56
#[test]
fn disabled_ring_discards_and_counts() {
    let mut bench = Bench::new(0);
    bench.pass_tx(0, 100);
    bench.tell(&Message::set_vring_enable(TX, 0));
    bench.driver.send(&VnetHdr::default(), &tx_frame(1, 100));
    bench.driver.send(&VnetHdr::default(), &tx_frame(2, 100));
    assert!(bench.driver.wait_tx_done(PATIENCE));
    assert_eq!(bench.counter("tx_drop_disabled"), 2);
    assert!(bench.tap().recv(QUIET).is_none());
    bench.tell(&Message::set_vring_enable(TX, 1));
    bench.pass_tx(3, 100);
    bench.assert_balance(0, 4);
}

#[test]
fn frame_that_the_device_refuses_is_counted() {
    let mut bench = Bench::new(0);
    // A message longer than the socket's send buffer is refused for good (EMSGSIZE).
    sockopt::set_socket_send_buffer_size(bench.tap().device_fd(), 8 << 10).unwrap();
    bench.driver.send(&VnetHdr::default(), &tx_frame(0, 60_000));
    assert!(bench.driver.wait_tx_done(PATIENCE));
    assert_eq!(bench.counter("tx_drop_refused"), 1);
    bench.pass_tx(1, 100);
}

///
#[test]
fn frame_that_lies_over_the_ring_itself_harms_nobody_else() {
    let spec = NetDriverSpec { queue_size: 16, ..NetDriverSpec::default() };
    let mut bench = Bench::with(spec);
    let (desc, used) = (bench.driver.tx.addrs.desc, bench.driver.tx.addrs.used);
    let header = bench.mem.alloc(12, 1);
    bench.mem.fill(header, 12, 0);
    for addr in [desc, used] {
        bench.driver.tx.add(&[Buf::readable(header, 12), Buf::readable(addr, 100)]);
        bench.driver.tx.publish_and_kick();
        assert_eq!(bench.tap().recv(PATIENCE).unwrap().1.len(), 100, "Q-19");
        bench.driver.tx.wait_used(PATIENCE).unwrap();
    }
    bench.pass_tx(0, 60);
}
