//! Frames between a driver's rings and a TAP double, through the back-end in this process: all arrive, whole, in order,
//! and the counters agree.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use common::driver::NetDriverSpec;
use common::frames::Checker;
use common::memory::{GuestMemory, RegionSpec};
use common::path_bench::{Bench, FEATURE_SETS, rx_frame, tx_frame};
use common::split_ring::Buf;
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, StopOnDrop};

/// H-20: a header is 12 bytes with every feature set; what would make it longer is not offered.
#[test]
fn frames_of_all_sizes_pass_both_ways() {
    for features in FEATURE_SETS {
        let mut bench = Bench::new(features);
        let large = if features & feature::MRG_RXBUF == 0 { 66_000 } else { 2048 };
        bench.driver.post_rx(64, large);
        for (seq, len) in (0..).zip([30, 60, 61, 300, 1514, 1515, 2036, 2037, 9014, 65_400, 65_549]) {
            bench.pass_tx(seq, len);
            bench.pass_rx(seq, len);
        }
        bench.assert_balance(11, 11);
        assert_eq!((bench.counter("tx_large_frames"), bench.counter("rx_large_frames")), (6, 6));
    }
}

///
#[test]
fn thousands_of_frames_each_way_arrive_in_order_over_the_wrap() {
    const FRAMES: u32 = 4000;
    const BATCH: u32 = 40;
    for features in FEATURE_SETS {
        let spec = NetDriverSpec { features, start_index: 63_000, ..NetDriverSpec::default() };
        let mut bench = Bench::with(spec);
        bench.driver.post_rx(128, 1600);
        let (mut tx, mut rx) = (Checker::new(1), Checker::new(2));
        for first in (0..FRAMES).step_by(BATCH as usize) {
            for seq in first..first + BATCH {
                let len = 30 + (seq as usize * 37) % 1485;
                bench.driver.queue(&VnetHdr::default(), &tx_frame(seq, len));
                bench.tap().send(&VnetHdr::default(), &rx_frame(seq, len));
            }
            bench.driver.tx.publish_and_kick();
            for _ in 0..BATCH {
                tx.see(&bench.tap().recv(PATIENCE).unwrap().1);
                rx.see(&bench.driver.recv(PATIENCE).unwrap().1);
            }
        }
        tx.assert_perfect(FRAMES);
        rx.assert_perfect(FRAMES);
        assert!(bench.driver.wait_tx_done(PATIENCE));
        assert_eq!(bench.driver.tx.out_of_order() + bench.driver.rx.out_of_order(), 0);
        bench.assert_balance(FRAMES.into(), FRAMES.into());
        let bytes: u64 = (0..u64::from(FRAMES)).map(|seq| 30 + (seq * 37) % 1485).sum();
        assert_eq!((bench.counter("tx_bytes"), bench.counter("rx_bytes")), (bytes, bytes));
    }
}

///
#[test]
fn header_cut_anywhere_is_put_together() {
    for features in [0, feature::INDIRECT_DESC] {
        let mut bench = Bench::new(features);
        for (seq, cuts) in (0..).zip([&[1, 11][..], &[6, 6], &[1; 12], &[11, 2, 1], &[20], &[]]) {
            let frame = tx_frame(seq, 200);
            bench.driver.queue_split(&[&[0; 12][..], &frame].concat(), cuts);
            bench.driver.tx.publish_and_kick();
            assert_eq!(bench.tap().recv(PATIENCE).unwrap().1, frame, "{cuts:?}");
        }
    }
}

/// One readable buffer a byte, none adjacent to the next, that hold these bytes.
fn byte_by_byte(bench: &Bench, bytes: &[u8]) -> Vec<Buf> {
    let place = |byte: &u8| {
        let addr = bench.mem.alloc(1, 2);
        bench.mem.write(addr, &[*byte]);
        Buf::readable(addr, 1)
    };
    bytes.iter().map(place).collect()
}

///
#[test]
fn chain_of_as_many_pieces_as_one_call_takes_passes_and_one_more_is_dropped() {
    let mut bench = Bench::with(NetDriverSpec { queue_size: 2048, ..NetDriverSpec::default() });
    for pieces in [1022, 1023, 1024, 1025] {
        let frame = tx_frame(0, pieces - 12);
        let bufs = byte_by_byte(&bench, &[&[0; 12][..], &frame].concat());
        bench.driver.tx.add(&bufs);
        bench.driver.tx.publish_and_kick();
        if pieces <= 1024 {
            assert_eq!(bench.tap().recv(PATIENCE).unwrap().1, frame, "{pieces}");
        }
        bench.driver.tx.wait_used(PATIENCE).expect("the chain comes back");
    }
    assert_eq!(bench.counter("tx_drop_bad_chain"), 1);
    bench.assert_balance(0, 4);
}

///
#[test]
fn adjacent_descriptors_beyond_what_one_call_takes_are_merged() {
    let mut bench = Bench::with(NetDriverSpec { queue_size: 2048, ..NetDriverSpec::default() });
    let frame = tx_frame(0, 2000);
    bench.driver.queue_split(&[&[0; 12][..], &frame].concat(), &[1; 2000]);
    bench.driver.tx.publish_and_kick();
    assert_eq!(bench.tap().recv(PATIENCE).unwrap().1, frame);
}

/// Q-23, R-SPAN
#[test]
fn header_and_frame_over_two_memory_regions_pass_as_in_one() {
    const BORDER: u64 = 0x110_0000;
    let low = RegionSpec::new(BORDER - (16 << 20), 16 << 20);
    let high = RegionSpec::new(BORDER, 1 << 20).in_file(1, 0);
    for features in [0, feature::MRG_RXBUF] {
        let mem = Arc::new(GuestMemory::new(&[low, high]));
        let mut bench = Bench::on(Arc::clone(&mem), NetDriverSpec { features, ..NetDriverSpec::default() });
        for before in 0..=112 {
            let (buffer, seq) = (BORDER - before, before as u32);
            let frame = tx_frame(seq, 100);
            mem.write(buffer, &[&[0; 12][..], &frame].concat());
            bench.driver.tx.add(&[Buf::readable(buffer, 112)]);
            bench.driver.tx.publish_and_kick();
            assert_eq!(bench.tap().recv(PATIENCE).unwrap().1, frame, "{before} before the border");
            bench.driver.tx.wait_used(PATIENCE).unwrap();
            let frame = rx_frame(seq, 100);
            bench.driver.rx.add(&[Buf::writable(buffer, 112)]);
            bench.driver.rx.publish_and_kick();
            bench.tap().send(&VnetHdr::default(), &frame);
            assert_eq!(bench.driver.rx.wait_used(PATIENCE).unwrap().1, 112);
            assert_eq!(mem.read(buffer + 12, 100), frame, "{before} before the border");
        }
    }
}

#[test]
fn nothing_but_posted_buffers_and_used_rings_is_written() {
    for features in FEATURE_SETS {
        let mut bench = Bench::on(
            Arc::new(GuestMemory::single(4 << 20)),
            NetDriverSpec { features, queue_size: 64, ..NetDriverSpec::default() },
        );
        bench.driver.repost = false;
        let start = bench.mem.alloc(0, 4096);
        let posted: Vec<(u64, usize)> = (0..32).map(|k| (start + 4096 * k + 100, 2000)).collect();
        bench.mem.fill(start, 4096 * 33, 0xa5);
        for (addr, len) in &posted {
            bench.driver.rx.add(&[Buf::writable(*addr, *len)]);
        }
        bench.driver.rx.publish_and_kick();
        for seq in 0..32 {
            bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 60 + seq as usize * 50));
        }
        bench.assert_balance(32, 0);
        let mut canary = bench.mem.read(start, 4096 * 33);
        for (addr, len) in &posted {
            let at = (addr - start) as usize;
            canary[at..at + len].fill(0xa5);
        }
        assert!(canary.iter().all(|byte| *byte == 0xa5), "a byte between the buffers changed");
    }
}

/// N-02
#[test]
fn full_tap_holds_the_guest_back_and_nothing_is_lost() {
    const FRAMES: u32 = 100;
    for features in FEATURE_SETS {
        let mut bench = Bench::new(features);
        bench.pass_tx(0, 60);
        let fillers = bench.tap().fill();
        for seq in 0..FRAMES {
            bench.driver.queue(&VnetHdr::default(), &tx_frame(seq, 200));
        }
        bench.driver.tx.publish_and_kick();
        // The other direction goes on meanwhile, and its answer says that tx had its turn.
        bench.driver.post_rx(4, 2048);
        bench.pass_rx(0, 60);
        assert_eq!(bench.counter("tx_frames"), 1, "the TAP takes nothing");
        let mut checker = Checker::new(1);
        for raw in bench.tap().drain_fillers(fillers) {
            checker.see(&raw[VnetHdr::LEN..]);
        }
        while checker.received < FRAMES as usize {
            checker.see(&bench.tap().recv(PATIENCE).expect("tx goes on once the TAP takes frames").1);
        }
        checker.assert_perfect(FRAMES);
        assert!(bench.driver.wait_tx_done(PATIENCE));
        bench.assert_balance(1, u64::from(FRAMES) + 1);
    }
}

/// N-01
#[test]
fn flood_without_buffers_waits_and_goes_on_once_there_are_some() {
    for features in FEATURE_SETS {
        let mut bench = Bench::new(features);
        let mut sent = 0;
        let raw = |seq| [&[0; 12][..], &rx_frame(seq, 500)].concat();
        while bench.tap().try_send_raw(&raw(sent)).unwrap() {
            sent += 1;
        }
        assert_eq!(bench.counter("rx_frames"), 0);
        let posted = Instant::now();
        bench.driver.post_rx(32, 2048);
        let mut checker = Checker::new(2);
        for seq in 0..sent {
            checker.see(&bench.driver.recv(PATIENCE).expect("rx goes on once there are buffers").1);
            if seq == 0 {
                common::say(&format!(
                    "{features:#x}: {sent} frames waited, the first came after {:?}",
                    posted.elapsed()
                ));
            }
        }
        checker.assert_perfect(sent);
        bench.assert_balance(sent.into(), 0);
    }
}

#[test]
fn both_directions_get_their_turn_when_both_are_always_ready() {
    // 10,000 passes, as a pass moves up to 64 frames each way: short ones, in part.
    const TARGET: u64 = 10_000 * 64;
    let mut bench = Bench::new(0);
    bench.driver.post_rx(256, 128);
    let done = AtomicBool::new(false);
    let Bench { driver, backend, .. } = &mut bench;
    let tap = &backend.taps[0];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The host: its queue to the guest always full, its queue from the guest always empty.
            let raw = [&[0; 12][..], &rx_frame(0, 60)].concat();
            while !done.load(Ordering::Relaxed) {
                while tap.try_send_raw(&raw).unwrap() {}
                while tap.recv_raw(std::time::Duration::ZERO).is_some() {}
            }
        });
        let _stop = StopOnDrop(&done);
        let begin = Instant::now();
        let frame = tx_frame(0, 60);
        let sent = |name| backend.counter(0, name);
        while sent("tx_frames") + sent("rx_frames") < TARGET && begin.elapsed() < 12 * PATIENCE {
            while driver.tx.free_descriptors() >= 2 {
                driver.queue(&VnetHdr::default(), &frame);
            }
            driver.tx.publish_and_kick();
            for _ in 0..256 {
                if driver.recv(std::time::Duration::ZERO).is_none() {
                    break;
                }
            }
            driver.reclaim_tx();
        }
    });
    let (tx, rx) = (bench.counter("tx_frames"), bench.counter("rx_frames"));
    common::say(&format!("{tx} frames from the guest, {rx} to it"));
    assert!(tx > rx / 4 && rx > tx / 4, "{tx} from the guest, {rx} to it");
}
