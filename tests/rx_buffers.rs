//! Frames to the guest and the buffers that it gives for them: too small, too few, too late, malformed.
#![allow(clippy::unwrap_used)]

mod common;

use common::driver::NetDriverSpec;
use common::frames::{self, Ends, L4Csum, Stamp, payload};
use common::path_bench::{Bench, FEATURE_SETS, RX, rx_frame};
use common::split;
use common::split_ring::{Buf, Desc};
use common::virtio::{VnetHdr, desc_flag, feature, gso, net_flag};
use common::{PATIENCE, QUIET};

const MERGEABLE: u64 = feature::MRG_RXBUF;

fn bench_of(features: u64, queue_size: u16) -> Bench {
    Bench::with(NetDriverSpec { features, queue_size, ..NetDriverSpec::default() })
}

/// G-02
#[test]
fn frame_over_1_to_17_mergeable_buffers_says_exactly_how_many() {
    const ROOM: usize = 100;
    for extra in [0, feature::EVENT_IDX, feature::INDIRECT_DESC] {
        let mut bench = Bench::new(MERGEABLE | extra);
        bench.driver.post_rx_chains(40, &[30, ROOM - 30]);
        let lens = (1..=17).flat_map(|n| [n * ROOM - 12, n * ROOM - 13, n * ROOM + 1 - 12]).filter(|len| *len >= 30);
        for (seq, len) in (0..).zip(lens) {
            let frame = rx_frame(seq, len);
            bench.tap().send(&VnetHdr::default(), &frame);
            let got = bench.driver.recv_detailed(PATIENCE).unwrap();
            let total = 12 + len;
            let expected: Vec<_> = (0..total.div_ceil(ROOM)).map(|k| ROOM.min(total - k * ROOM) as u32).collect();
            assert_eq!(got.lens, expected, "a frame of {len} bytes");
            assert_eq!(usize::from(got.header.num_buffers), expected.len());
            assert!(got.frame == frame);
        }
    }
}

/// G-05
#[test]
fn frame_without_mergeable_buffers_is_in_one_buffer_and_says_so() {
    let mut bench = Bench::new(0);
    bench.driver.post_rx(4, 2048);
    bench.tap().send(&VnetHdr { num_buffers: 77, ..VnetHdr::default() }, &rx_frame(0, 60));
    assert_eq!(bench.driver.recv_detailed(PATIENCE).unwrap().header.num_buffers, 1);
}

/// G-01, G-03
#[test]
fn frame_larger_than_its_buffer_is_dropped_and_the_next_one_has_the_buffer() {
    for features in FEATURE_SETS.into_iter().filter(|features| features & MERGEABLE == 0) {
        let mut bench = Bench::new(features);
        bench.driver.post_rx(2, 1526);
        bench.pass_rx(0, 1514);
        for len in [1515, 9000, 65_549] {
            bench.tap().send(&VnetHdr::default(), &rx_frame(9, len));
        }
        bench.pass_rx(1, 60);
        assert_eq!(bench.counter("rx_drop_too_large"), 3);
        assert_eq!(bench.counter("rx_bad_chains"), 0);
        bench.assert_balance(5, 0);
    }
}

/// iPXE posts buffers for its MTU, and takes one that comes back with nothing in it for a frame of less than nothing.
#[test]
fn buffer_shorter_than_a_standard_frame_that_a_frame_does_not_fit_stays_for_the_next() {
    for features in FEATURE_SETS.into_iter().filter(|features| features & MERGEABLE == 0) {
        let mut bench = Bench::new(features);
        bench.driver.repost = false;
        bench.driver.post_rx(1, 200);
        bench.driver.post_rx(1, 2048);
        bench.tap().send(&VnetHdr::default(), &rx_frame(9, 189));
        bench.pass_rx(1, 188);
        bench.pass_rx(2, 1514);
        assert_eq!((bench.counter("rx_drop_too_large"), bench.counter("rx_bad_chains")), (1, 0));
        bench.assert_balance(3, 0);
    }
}

/// G-01
#[test]
fn frame_longer_than_any_is_dropped() {
    for features in [0, MERGEABLE] {
        let mut bench = Bench::new(features);
        bench.driver.post_rx(64, 2048);
        bench.pass_rx(0, 60);
        bench.tap().send_raw(&vec![0; 12 + 65_535 + 14 + 8 + 1]);
        bench.pass_rx(1, 60);
        assert_eq!(bench.counter("rx_drop_too_large"), 1);
        bench.assert_balance(3, 0);
    }
}

/// G-09
#[test]
fn frame_read_before_there_are_enough_buffers_comes_first_once_there_are() {
    let mut bench = Bench::new(MERGEABLE);
    bench.driver.post_rx(2, 100);
    let frames = [rx_frame(0, 1500), rx_frame(1, 60), rx_frame(2, 700)];
    for frame in &frames {
        bench.tap().send(&VnetHdr::default(), frame);
    }
    bench.wait_counter("rx_held", 1);
    assert!(bench.driver.recv(QUIET).is_none(), "two buffers of 100 do not hold 1500 bytes");
    bench.driver.post_rx(60, 100);
    for frame in &frames {
        assert!(bench.driver.recv(PATIENCE).unwrap().1 == *frame);
    }
    bench.assert_balance(3, 0);
}

/// G-09
#[test]
fn frame_that_waits_for_buffers_outlives_its_ring_and_its_session() {
    let mut bench = Bench::new(MERGEABLE);
    bench.driver.post_rx(1, 100);
    bench.tap().send(&VnetHdr::default(), &rx_frame(0, 1500));
    bench.wait_counter("rx_held", 1);
    bench.front_end.get_vring_base(RX).unwrap();
    bench.start_ring(RX, &bench.driver.rx);
    bench.reconnect();
    bench.driver.post_rx(60, 100);
    assert!(bench.driver.recv(PATIENCE).unwrap().1 == rx_frame(0, 1500));
    bench.pass_rx(1, 60);
}

/// G-08
#[test]
fn frame_that_a_full_ring_cannot_hold_is_dropped() {
    let mut bench = bench_of(MERGEABLE, 4);
    bench.driver.post_rx(4, 100);
    bench.tap().send(&VnetHdr::default(), &rx_frame(0, 1000));
    bench.wait_counter("rx_drop_too_large", 1);
    bench.pass_rx(1, 4 * 100 - 12);
    bench.assert_balance(2, 0);
}

/// G-08
#[test]
fn frame_that_a_full_ring_of_longer_chains_cannot_hold_is_dropped() {
    let mut bench = bench_of(MERGEABLE, 8);
    bench.driver.post_rx_chains(4, &[50, 50]);
    bench.tap().send(&VnetHdr::default(), &rx_frame(0, 1000));
    bench.wait_counter("rx_drop_too_large", 1);
    bench.pass_rx(1, 4 * 100 - 12);
}

/// G-05, G-07, R-ZERO
#[test]
fn chain_of_as_many_pieces_as_there_can_be_takes_small_and_large_frames() {
    const PIECE: usize = 64;
    for features in [0, MERGEABLE] {
        let mut bench = Bench::new(features | feature::INDIRECT_DESC);
        for (seq, len) in (0..).zip([60, 1514, 65_000, 65_524, 60]) {
            // None adjacent to the next, so that none are merged: more than one read can take with memory of ours.
            let bufs: Vec<_> = (0..1024).map(|_| Buf::writable(bench.mem.alloc(PIECE, 128), PIECE)).collect();
            let head = bench.driver.rx.add_indirect(&bufs);
            bench.driver.rx.publish_and_kick();
            let frame = rx_frame(seq, len);
            bench.tap().send(&VnetHdr::default(), &frame);
            assert_eq!(bench.driver.rx.wait_used(PATIENCE), Some((head, 12 + len as u32)), "{len} bytes");
            let bytes: Vec<u8> = bufs.iter().flat_map(|buf| bench.mem.read(buf.addr, PIECE)).collect();
            assert_eq!(bytes[..12], VnetHdr { num_buffers: 1, ..VnetHdr::default() }.to_bytes());
            assert!(bytes[12..12 + len] == frame, "{len} bytes");
        }
        bench.assert_balance(5, 0);
    }
}

/// Ways in which a receive chain can be of no use, as descriptors 0 and 1 of its ring.
fn useless_chains(buf: u64) -> Vec<(&'static str, [Desc; 2])> {
    let desc = |addr, len, flags, next| Desc { addr, len, flags, next };
    let none = Desc::default();
    let (write, next) = (desc_flag::WRITE, desc_flag::NEXT);
    vec![
        ("read-only", [desc(buf, 2048, 0, 0), none]),
        ("mixed", [desc(buf, 12, next, 1), desc(buf + 12, 2036, write, 0)]),
        ("readable behind writable", [desc(buf, 12, write | next, 1), desc(buf + 12, 2036, 0, 0)]),
        ("loop", [desc(buf, 2048, write | next, 1), desc(buf, 2048, write | next, 0)]),
        ("next out of the table", [desc(buf, 2048, write | next, 9999), none]),
        ("outside memory", [desc(u64::MAX - 8, 2048, write, 0), none]),
        ("partly outside memory", [desc(buf, 12, write | next, 1), desc(0, 2036, write, 0)]),
        ("indirect, not negotiated", [desc(buf, 16, desc_flag::INDIRECT, 0), none]),
        ("empty", [desc(buf, 0, write, 0), none]),
        ("shorter than a header", [desc(buf, 11, write, 0), none]),
    ]
}

///
#[test]
fn useless_chain_is_returned_unused_and_the_next_one_gets_the_frame() {
    for features in [0, MERGEABLE] {
        let mut bench = Bench::new(features);
        let buf = bench.mem.alloc(4096, 8);
        bench.mem.fill(buf, 4096, 0xa5);
        let [first, second] = bench.driver.rx.take_free(2).unwrap()[..] else { unreachable!() };
        assert_eq!((first, second), (0, 1));
        for (count, (what, descs)) in (1..).zip(useless_chains(buf)) {
            bench.driver.rx.write_desc(0, descs[0]);
            bench.driver.rx.write_desc(1, descs[1]);
            bench.driver.rx.offer(0);
            bench.driver.rx.publish_and_kick();
            assert_eq!(bench.driver.rx.wait_used(PATIENCE), Some((0, 0)), "{what}");
            assert_eq!(bench.counter("rx_bad_chains"), count, "{what}");
            bench.driver.repost = false;
            bench.driver.post_rx(1, 2048);
            bench.pass_rx(0, 100);
        }
        assert_eq!(bench.mem.read(buf, 4096), [0xa5; 4096], "nothing is written to a chain that is returned unused");
    }
}

///
#[test]
fn chain_shorter_than_the_smallest_frame_is_returned_unused_without_mergeable_buffers() {
    let mut bench = Bench::new(0);
    let mut bad = 0;
    for len in [12, 13, 59, 71] {
        let head = bench.driver.rx.add(&[Buf::writable(bench.mem.alloc(len, 1), len)]);
        bench.driver.rx.publish_and_kick();
        bad += 1;
        assert_eq!(bench.driver.rx.wait_used(PATIENCE), Some((head, 0)), "{len} bytes");
    }
    assert_eq!(bench.counter("rx_bad_chains"), bad);
    bench.driver.post_rx(1, 72);
    bench.pass_rx(0, 60);
}

/// Q-24, R-FDERR
#[test]
fn useless_chain_in_the_middle_of_a_frame_is_returned_with_those_before_it() {
    let mut bench = Bench::new(MERGEABLE);
    bench.driver.repost = false;
    let addr = bench.mem.alloc(300, 1);
    bench.mem.fill(addr, 300, 0xa5);
    let heads = [
        bench.driver.rx.add(&[Buf::writable(addr, 100)]),
        bench.driver.rx.add(&[Buf::writable(addr + 100, 100)]),
        bench.driver.rx.add(&[Buf::readable(addr + 200, 100)]),
    ];
    bench.driver.rx.publish_and_kick();
    for head in heads {
        assert_eq!(bench.driver.rx.wait_used(PATIENCE), Some((head, 0)));
    }
    assert_eq!(bench.mem.read(addr, 300), [0xa5; 300]);
    bench.driver.post_rx(20, 100);
    bench.pass_rx(0, 1000);
    assert_eq!(bench.counter("rx_bad_chains"), 3);
}

/// chains are popped for all frames of a batch at the same time.
#[test]
fn useless_chain_between_the_buffers_of_a_batch_is_returned_unused_at_its_turn() {
    const FRAMES: u32 = 20;
    for place in 0..30 {
        let mut bench = Bench::new(MERGEABLE);
        (0..FRAMES).for_each(|seq| bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 60)));
        let mut given = vec![];
        for number in 0..40 {
            let addr = bench.mem.alloc(2048, 8);
            let buf = if number == place { Buf::readable(addr, 2048) } else { Buf::writable(addr, 2048) };
            given.push((bench.driver.rx.add(&[buf]), addr));
        }
        bench.driver.rx.publish_and_kick();
        let mut seq = 0;
        for (number, (given, addr)) in given.into_iter().enumerate() {
            if seq == FRAMES {
                break;
            }
            let (head, len) = bench.driver.rx.wait_used(PATIENCE).unwrap();
            assert_eq!(head, given, "in order");
            assert!(number != place || len == 0, "the useless one is unused");
            if len > 0 {
                assert_eq!(bench.mem.read(addr, len as usize)[12..], rx_frame(seq, 60), "useless: {place}");
                seq += 1;
            }
        }
        assert_eq!(seq, FRAMES);
    }
}

/// What was popped ahead of its turn and put back is not read into: frames that were dropped leave buffers over before it.
#[test]
fn useless_chain_behind_buffers_that_a_batch_left_over_stays_untouched() {
    const BUFFER: usize = 3000;
    const FRAMES: u32 = 20;
    /// Frames 8 to 15 are read together.
    const GOOD: u32 = 10;
    let no_checksum = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 999, ..VnetHdr::default() };
    for place in 0..16 {
        let mut bench = Bench::new(MERGEABLE);
        for seq in 0..FRAMES {
            let header = if seq < GOOD { VnetHdr::default() } else { no_checksum };
            bench.tap().send(&header, &rx_frame(seq, 60));
        }
        let given: Vec<_> = (0..20)
            .map(|number| {
                let addr = bench.mem.alloc(BUFFER, 8);
                bench.mem.write(addr, &[0x5a; BUFFER]);
                let buf = if number == place { Buf::readable(addr, BUFFER) } else { Buf::writable(addr, BUFFER) };
                bench.driver.rx.add(&[buf]);
                addr
            })
            .collect();
        bench.driver.rx.publish_and_kick();
        bench.assert_balance(FRAMES.into(), 0);
        // After a frame that comes alone the next one is read by itself, straight into the buffers.
        bench.tap().send(&no_checksum, &rx_frame(0, 60));
        bench.assert_balance(u64::from(FRAMES) + 1, 0);
        let large = rx_frame(FRAMES, 3500);
        bench.tap().send(&VnetHdr::default(), &large);
        let mut came = vec![];
        let mut addrs = given.iter();
        while came.len() < GOOD as usize * 72 + 12 + large.len() {
            let (_, len) = bench.driver.rx.wait_used(PATIENCE).unwrap();
            came.extend(bench.mem.read(*addrs.next().unwrap(), len as usize));
        }
        assert!(came.ends_with(&large), "useless: {place}");
        assert_eq!(bench.mem.read(given[place], BUFFER), [0x5a; BUFFER], "useless: {place}");
    }
}

#[test]
fn frame_shorter_than_ethernet_is_dropped() {
    let mut bench = Bench::new(0);
    bench.driver.post_rx(4, 2048);
    for len in [1, 11, 12, 25] {
        bench.tap().send_raw(&vec![0; len]);
    }
    bench.pass_rx(0, 60);
    assert_eq!(bench.counter("rx_drop_short"), 4);
    bench.assert_balance(5, 0);
}

/// G-03. Sent by a host that leaves checksums and cutting to others; what arrives is what an independent splitter makes
/// of it, and its headers say nothing that was not negotiated.
#[test]
fn frame_that_needs_what_was_not_negotiated_is_finished() {
    let tcp = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let udp = VnetHdr { csum_offset: 6, ..tcp };
    let of = |seq, len| payload(Stamp { stream: 2, seq }, len);
    let sent = [
        (tcp, frames::tcp4(&Ends::RX, 1, &of(0, 999), L4Csum::Partial)),
        (udp, frames::udp4(&Ends::RX, &of(1, 1000), L4Csum::Partial)),
        (
            VnetHdr { gso_type: gso::TCPV4, gso_size: 1448, hdr_len: 54, ..tcp },
            frames::tcp4(&Ends::RX, 1, &of(2, 60_001), L4Csum::Partial),
        ),
        (
            VnetHdr { gso_type: gso::UDP_L4, gso_size: 1000, hdr_len: 42, ..udp },
            frames::udp4(&Ends::RX, &of(3, 30_000), L4Csum::Partial),
        ),
    ];
    for offered in [0, feature::MRG_RXBUF] {
        for offloads in [0, feature::GUEST_CSUM, feature::GUEST_CSUM | feature::GUEST_TSO4] {
            let mut bench = Bench::new(offered | offloads);
            bench.driver.post_rx(200, if offered == 0 { 70_000 } else { 600 });
            // Twice: the first of a kind is read as if it needed nothing.
            for (header, frame) in sent.iter().chain(&sent) {
                bench.tap().send(header, frame);
                let whole = split::split(header, frame).unwrap();
                let may_be_whole = header.gso_type == gso::TCPV4 && offloads & feature::GUEST_TSO4 != 0;
                let mut got = Vec::new();
                while got.len() < whole.len() {
                    let (mut seen, bytes) = bench.driver.recv(PATIENCE).expect("all of it arrives");
                    seen.num_buffers = 0;
                    assert_eq!(seen.gso_type != gso::NONE, may_be_whole, "{seen:?}");
                    assert!(seen.flags == 0 || offloads & feature::GUEST_CSUM != 0, "{seen:?}");
                    got.extend(split::split(&seen, &bytes).unwrap());
                }
                assert!(got == whole, "{offloads:#x}, {header:?}");
            }
            bench.pass_rx(9, 60);
        }
    }
}

/// A card that puts frames together has checked their sums, and leaves none to be completed.
#[test]
fn frame_whose_checksum_was_checked_is_cut_for_a_guest_that_takes_large_ones() {
    const TAKES: u64 = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_USO4 | feature::GUEST_USO6;
    let open = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, ..VnetHdr::default() };
    let tcp = VnetHdr { gso_type: gso::TCPV4, gso_size: 1448, hdr_len: 54, csum_offset: 16, ..open };
    let udp = VnetHdr { gso_type: gso::UDP_L4, gso_size: 1000, hdr_len: 42, csum_offset: 6, ..open };
    let content = payload(Stamp { stream: 2, seq: 0 }, 30_000);
    let sent = [
        (tcp, frames::tcp4(&Ends::RX, 1, &content, L4Csum::Partial)),
        (udp, frames::udp4(&Ends::RX, &content, L4Csum::Partial)),
    ];
    for features in [TAKES, TAKES | MERGEABLE] {
        let mut bench = Bench::new(features);
        bench.driver.post_rx(64, if features == TAKES { 70_000 } else { 2048 });
        // Twice: the first of a kind is read as if it needed nothing.
        for (header, frame) in sent.iter().chain(&sent) {
            let checked = VnetHdr { flags: net_flag::DATA_VALID, csum_start: 0, csum_offset: 0, ..*header };
            bench.tap().send(&checked, &split::complete(header, frame));
            for wanted in split::split(header, frame).unwrap() {
                let (seen, got) = bench.driver.recv(PATIENCE).expect("a segment");
                assert_eq!((seen.flags, seen.gso_type), (net_flag::NEEDS_CSUM, gso::NONE));
                assert!(split::complete(&seen, &got) == wanted, "{header:?}");
            }
        }
    }
}

/// G-03. What its header says cannot be done to it.
#[test]
fn frame_that_cannot_be_finished_is_dropped() {
    let partial = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let segmented = VnetHdr { gso_type: gso::TCPV4, gso_size: 1448, hdr_len: 54, ..partial };
    let mut bench = Bench::new(0);
    bench.driver.post_rx(8, 70_000);
    // No TCP; a checksum behind the end; a legacy kind.
    bench.tap().send(&segmented, &rx_frame(0, 4000));
    bench.tap().send(&VnetHdr { csum_start: 999, ..partial }, &rx_frame(1, 100));
    bench.tap().send(&VnetHdr { gso_type: gso::UDP, ..segmented }, &rx_frame(2, 4000));
    bench.pass_rx(9, 60);
    assert_eq!(bench.counter("rx_drop_not_negotiated"), 3);
    bench.assert_balance(4, 0);
}

/// A packet socket says of a tunnel's frame what is within. Whoever cut it by that would take the tunnel's headers for TCP's.
#[test]
fn frame_of_a_tunnel_that_is_to_be_cut_is_dropped() {
    const TAKES: u64 =
        feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_USO4 | feature::GUEST_USO6;
    let content = payload(Stamp { stream: 2, seq: 0 }, 20_000);
    let tcp = frames::tcp4(&Ends::RX, 1, &content, L4Csum::Partial);
    let udp = frames::udp4(&Ends::RX, &content, L4Csum::Partial);
    // VXLAN and its like over IPv4 and IPv6; IPIP over IPv4, and over IPv6 behind an option.
    let ip =
        |protocol| [&[0x45, 0, 0x4e, 0x84, 0, 0, 0, 0, 64, protocol, 0, 0][..], &[10, 99, 0, 1, 10, 99, 0, 2]].concat();
    let vxlan = |frame: &[u8]| [&[0x12, 0xb5, 0x12, 0xb5, 0x4e, 0x70, 0, 0, 8, 0, 0, 0, 0, 0, 5, 0], frame].concat();
    let ipv6 = |next| [&[0x60, 0, 0, 0, 0x4e, 0x70, next, 64][..], &[0xfd; 32]].concat();
    let tunnelled = [
        (gso::TCPV4, 0x0800, [ip(17), vxlan(&tcp)].concat()),
        (gso::UDP_L4, 0x0800, [ip(17), vxlan(&udp)].concat()),
        (gso::TCPV4, 0x86dd, [ipv6(17), vxlan(&tcp)].concat()),
        (gso::TCPV4, 0x0800, [&ip(4)[..], &tcp[14..]].concat()),
        (gso::TCPV4, 0x86dd, [&ipv6(60)[..], &[4, 0, 4, 1, 4, 1, 1, 0], &tcp[14..]].concat()),
    ];
    for (features, len) in [(0, 70_000), (MERGEABLE, 2048), (TAKES, 70_000), (TAKES | MERGEABLE, 2048)] {
        let mut bench = Bench::new(features);
        bench.driver.post_rx(64, len);
        for (count, (gso_type, ethertype, packet)) in (1..).zip(tunnelled.iter().chain(&tunnelled)) {
            let frame = frames::ethernet(&Ends::RX, *ethertype, packet);
            let transport = if *gso_type == gso::UDP_L4 { 8 } else { 20 };
            let hdr_len = (frame.len() - content.len()) as u16;
            let csum = (hdr_len - transport, if transport == 8 { 6 } else { 16 });
            let header = VnetHdr {
                flags: net_flag::NEEDS_CSUM,
                gso_type: *gso_type,
                hdr_len,
                gso_size: 1000,
                ..VnetHdr::default()
            };
            bench.tap().send(&VnetHdr { csum_start: csum.0, csum_offset: csum.1, ..header }, &frame);
            bench.wait_counter("rx_drop_tunnel", count);
        }
        bench.pass_rx(1, 1514);
        bench.assert_balance(11, 0);
    }
}

#[test]
fn buffers_outside_a_frame_stay_untouched() {
    let mut bench = Bench::new(MERGEABLE);
    bench.driver.repost = false;
    bench.driver.post_rx(3, 2048);
    bench.pass_rx(0, 100);
    assert_eq!(bench.driver.rx.outstanding().len(), 2, "buffers that a frame did not need stay with the device");
    bench.pass_rx(1, 100);
    bench.pass_rx(2, 100);
}
