//! Rings that break, stop, move and start again while frames flow: what goes on goes on, and nothing is lost or doubled.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::backend::InProcess;
use common::driver::NetDriverSpec;
use common::fd_of;
use common::frames::Checker;
use common::memory::{GuestMemory, RegionSpec};
use common::message::{Message, request};
use common::path_bench::{Bench, FEATURE_SETS, RX, TX, rx_frame, tx_frame};
use common::split_ring::{Buf, RingAddrs, SplitRing};
use common::virtio::{VnetHdr, feature};
use common::{PATIENCE, QUIET, wait_readable, wait_until};
use vhost_user_net::busy_poll::Polling;
use vhost_user_net::nic::NicSetup;
use vhost_user_net::tuning::Tuning;

/// E-01: the last of these is one back.
#[test]
fn broken_ring_is_reported_once_and_the_other_goes_on_until_it_is_set_up_anew() {
    for features in FEATURE_SETS {
        for wrong in [257, 5000, 0x8000, 0xffff] {
            let mut bench = Bench::new(features);
            bench.driver.post_rx(16, 2048);
            bench.pass_tx(0, 100);
            bench.driver.tx.write_avail_idx(bench.driver.tx.avail_idx().wrapping_add(wrong));
            bench.driver.tx.kick();
            assert!(wait_readable(fd_of(&bench.driver.tx.err), PATIENCE), "{wrong} too far is reported");
            for seq in 0..20 {
                bench.driver.tx.kick();
                bench.pass_rx(seq, 100);
            }
            assert_eq!(bench.driver.tx.err.read().unwrap(), 1, "reported once");
            assert_eq!((bench.counter("broken_rings"), bench.counter("tx_frames")), (1, 1));
            bench.front_end.get_vring_base(TX).unwrap();
            bench.driver.tx.reset();
            bench.start_ring(TX, &bench.driver.tx);
            bench.pass_tx(1, 100);
        }
    }
}

///
#[test]
fn broken_rx_ring_does_not_stop_tx() {
    let mut bench = Bench::new(feature::MRG_RXBUF);
    bench.driver.post_rx(4, 2048);
    bench.pass_rx(0, 60);
    bench.driver.rx.put_avail(9999);
    bench.driver.rx.publish();
    bench.driver.rx.kick();
    for seq in 0..8 {
        bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 3000));
        bench.pass_tx(seq, 60);
    }
    assert!(wait_readable(fd_of(&bench.driver.rx.err), PATIENCE), "a head that is none is reported");
    bench.wait_counter("broken_rings", 1);
}

/// U-48
#[test]
fn kick_whose_other_end_is_closed_parks_its_ring() {
    let mut bench = Bench::new(0);
    bench.driver.post_rx(16, 2048);
    let (read, write) = std::io::pipe().unwrap();
    bench.tell(&Message::set_vring_kick(TX.into(), read.as_fd()));
    drop(read);
    bench.driver.send(&VnetHdr::default(), &tx_frame(0, 60));
    (&write).write_all(&[1; 8]).unwrap();
    assert!(bench.tap().recv(PATIENCE).is_some(), "a pipe kicks as an eventfd does");
    drop(write);
    assert!(wait_readable(fd_of(&bench.driver.tx.err), PATIENCE), "a kick that cannot come is reported");
    bench.pass_rx(0, 60);
    assert_eq!(bench.counter("broken_rings"), 1);
}

/// U-49
#[test]
fn ring_without_kick_descriptor_is_polled() {
    let mut bench = Bench::new(0);
    for index in [RX, TX] {
        bench.tell(&Message::set_vring_no_fd(request::SET_VRING_KICK, index.into()));
    }
    for seq in 0..50 {
        bench.driver.queue(&VnetHdr::default(), &tx_frame(seq, 60));
        bench.driver.tx.publish();
        assert!(bench.tap().recv(PATIENCE).is_some(), "tx is looked at without a kick");
        bench.driver.rx.add(&[Buf::writable(bench.mem.alloc(2048, 1), 2048)]);
        bench.driver.rx.publish();
        bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 60));
        assert!(bench.driver.rx.wait_used(PATIENCE).is_some(), "rx is looked at without a kick");
    }
    assert_eq!((bench.counter("tx_kicks"), bench.counter("rx_kicks")), (0, 0));
}

/// While it had no kick its entries were found by looking, whatever the driver had been told before that: it is asked for
/// kicks anew.
#[test]
fn ring_that_was_polled_is_asked_for_kicks_again() {
    let tuning = Tuning { polling: Polling::Fixed(Duration::from_micros(50)), ..Tuning::default() };
    let backend = InProcess::start_as(1, NicSetup { tuning, ..NicSetup::default() });
    let spec = NetDriverSpec { features: feature::EVENT_IDX, ..NetDriverSpec::default() };
    let mut bench = Bench::before(backend, Arc::new(GuestMemory::single(64 << 20)), spec);
    let wait_asked = |bench: &Bench| {
        let tx = &bench.driver.tx;
        wait_until("the driver is asked to kick", || tx.avail_event() == tx.avail_idx());
    };
    bench.pass_tx(0, 60);
    wait_asked(&bench);
    bench.tell(&Message::set_vring_no_fd(request::SET_VRING_KICK, TX.into()));
    bench.driver.queue(&VnetHdr::default(), &tx_frame(1, 60));
    bench.driver.tx.publish();
    assert!(bench.tap().recv(PATIENCE).is_some());

    bench.tell(&Message::set_vring_kick(TX.into(), fd_of(&bench.driver.tx.kick)));

    wait_asked(&bench);
    bench.pass_tx(2, 60);
}

/// U-54
#[test]
fn pipe_as_call_is_written_to_and_never_waited_for() {
    let mut bench = Bench::new(0);
    bench.driver.post_rx(128, 2048);
    let (mut read, write) = std::io::pipe().unwrap();
    bench.tell(&Message::set_vring_call(RX.into(), write.as_fd()));
    bench.tap().send(&VnetHdr::default(), &rx_frame(0, 60));
    assert!(wait_readable(&read, PATIENCE));
    let mut call = [0; 8];
    read.read_exact(&mut call).unwrap();
    assert_eq!(call, 1_u64.to_ne_bytes());
    // A full pipe, which the back-end made non-blocking for both of us, and then one that nobody reads any more.
    while (&write).write(&[0; 4096]).is_ok() {}
    for seq in 1..=100 {
        bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 60));
        bench.wait_counter("rx_frames", u64::from(seq) + 1);
        while let Some((_, frame)) = bench.driver.rx.take_used() {
            assert_eq!(frame, 72);
        }
        bench.driver.rx.add(&[Buf::writable(bench.mem.alloc(2048, 1), 2048)]);
        bench.driver.rx.publish_and_kick();
    }
    drop(read);
    bench.tap().send(&VnetHdr::default(), &rx_frame(0, 60));
    bench.wait_counter("rx_frames", 102);
}

/// U-38
#[test]
fn memory_that_comes_and_goes_disturbs_no_frame() {
    const FRAMES: u32 = 2000;
    for features in FEATURE_SETS {
        let mem = Arc::new(GuestMemory::new(&[
            RegionSpec::new(0x10_0000, 32 << 20),
            RegionSpec::new(0x1000_0000, 1 << 20).in_file(1, 0),
        ]));
        let mut bench = Bench::on(Arc::clone(&mem), NetDriverSpec { features, ..NetDriverSpec::default() });
        bench.driver.post_rx(100, 1600);
        let extra = &mem.regions()[1];
        let (mut tx, mut rx) = (Checker::new(1), Checker::new(2));
        for first in (0..FRAMES).step_by(50) {
            for seq in first..first + 50 {
                bench.driver.send(&VnetHdr::default(), &tx_frame(seq, 700));
                bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 700));
            }
            let change = if first % 100 == 0 { Message::rem_mem_reg(&extra.info) } else { Message::add_mem_reg(extra) };
            assert!(bench.front_end.tell(&change));
            for _ in 0..50 {
                tx.see(&bench.tap().recv(PATIENCE).unwrap().1);
                rx.see(&bench.driver.recv(PATIENCE).unwrap().1);
            }
        }
        tx.assert_perfect(FRAMES);
        rx.assert_perfect(FRAMES);
        assert!(bench.driver.wait_tx_done(PATIENCE));
        bench.assert_balance(FRAMES.into(), FRAMES.into());
    }
}

/// U-38
#[test]
fn ring_whose_memory_is_taken_away_is_parked_and_the_other_goes_on() {
    let mem = Arc::new(GuestMemory::new(&[
        RegionSpec::new(0x10_0000, 32 << 20),
        RegionSpec::new(0x1000_0000, 1 << 20).in_file(1, 0),
    ]));
    let mut bench = Bench::on(Arc::clone(&mem), NetDriverSpec::default());
    bench.driver.post_rx(16, 2048);
    let at = 0x1000_0000;
    let addrs = RingAddrs { desc: at, avail: at + 0x8000, used: at + 0x10000 };
    bench.front_end.get_vring_base(TX).unwrap();
    bench.driver.tx = SplitRing::placed(&mem, 256, 0, addrs);
    bench.start_ring(TX, &bench.driver.tx);
    bench.pass_tx(0, 60);
    bench.tell(&Message::rem_mem_reg(&mem.regions()[1].info));
    assert!(wait_readable(fd_of(&bench.driver.tx.err), PATIENCE));
    bench.pass_rx(0, 60);
    assert_eq!(bench.counter("broken_rings"), 1);
}

/// I-07
#[test]
fn stopped_ring_tells_its_base_and_is_not_touched_any_more() {
    for features in FEATURE_SETS {
        let spec = NetDriverSpec { features, start_index: 65_530, ..NetDriverSpec::default() };
        let mut bench = Bench::with(spec);
        bench.driver.repost = false;
        bench.driver.post_rx(40, 2048);
        for seq in 0..10 {
            bench.pass_tx(seq, 60);
            bench.pass_rx(seq, 60);
        }
        // Frames are on their way in both directions when the rings stop.
        for seq in 10..20 {
            bench.driver.send(&VnetHdr::default(), &tx_frame(seq, 60));
            bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 60));
        }
        let bases = bench.front_end.stop_like_qemu(2).unwrap();
        let after = bench.mem.snapshot();
        assert_eq!(bases, bench.driver.rings().map(|ring| u32::from(ring.used_idx())));
        let drops_and_frames = bench.backend.counters(0);
        for seq in 20..40 {
            bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 60));
        }
        bench.driver.tx.kick();
        bench.driver.rx.kick();
        assert!(!wait_readable(&bench.front_end, QUIET));
        assert!(after == bench.mem.snapshot(), "memory changed after the rings had stopped");
        assert_eq!(bench.backend.counters(0), drops_and_frames);
    }
}

/// I-03, U-59
#[test]
fn rings_carry_on_in_a_new_session_with_nothing_lost_or_doubled() {
    const FRAMES: u32 = 1000;
    const SESSIONS: u32 = 20;
    for features in FEATURE_SETS {
        let mut bench = Bench::new(features);
        bench.driver.post_rx(200, 1600);
        let (mut tx, mut rx) = (Checker::new(1), Checker::new(2));
        for session in 0..SESSIONS {
            let each = FRAMES / SESSIONS;
            for seq in session * each..(session + 1) * each {
                bench.driver.send(&VnetHdr::default(), &tx_frame(seq, 300));
                bench.tap().send(&VnetHdr::default(), &rx_frame(seq, 300));
            }
            // In the middle of it.
            bench.reconnect();
            bench.driver.tx.kick();
            bench.driver.rx.kick();
            for _ in 0..each {
                tx.see(&bench.tap().recv(PATIENCE).unwrap().1);
                rx.see(&bench.driver.recv(PATIENCE).unwrap().1);
            }
        }
        tx.assert_perfect(FRAMES);
        rx.assert_perfect(FRAMES);
        assert!(bench.driver.wait_tx_done(PATIENCE));
        assert_eq!(bench.driver.tx.out_of_order() + bench.driver.rx.out_of_order(), 0);
        bench.assert_balance(FRAMES.into(), FRAMES.into());
    }
}

///
#[test]
fn used_ring_that_the_guest_scribbles_on_is_not_believed() {
    for features in FEATURE_SETS {
        let mut bench = Bench::new(features);
        for seq in 0..300 {
            bench.driver.queue(&VnetHdr::default(), &tx_frame(seq, 60));
            let right = bench.driver.tx.last_used().wrapping_add(1);
            bench.mem.fill(bench.driver.tx.addrs.used + 4, 8 * 256, 0xff);
            bench.driver.tx.write_used_idx(0x8000 + seq as u16);
            bench.driver.tx.publish();
            bench.driver.tx.kick();
            assert!(bench.tap().recv(PATIENCE).is_some());
            let deadline = Instant::now() + PATIENCE;
            while bench.driver.tx.used_idx() != right {
                assert!(Instant::now() < deadline, "The next index that the device writes is its own");
                std::thread::yield_now();
            }
            assert!(bench.driver.wait_tx_done(PATIENCE));
        }
        bench.assert_balance(0, 300);
    }
}

/// I-08
#[test]
fn wrong_base_is_counted_and_the_used_index_wins() {
    let mut bench = Bench::new(0);
    for seq in 0..7 {
        bench.pass_tx(seq, 60);
    }
    assert!(bench.driver.wait_tx_done(PATIENCE));
    let before = bench.counter("rings_resumed_off_base");
    bench.front_end.get_vring_base(TX).unwrap();
    bench.driver.tx.base = 3;
    bench.start_ring(TX, &bench.driver.tx);
    bench.pass_tx(7, 60);
    assert_eq!(bench.counter("rings_resumed_off_base"), before + 1);
}

#[test]
fn call_that_was_taken_away_is_no_loss_of_frames() {
    let mut bench = Bench::new(0);
    bench.tell(&Message::set_vring_no_fd(request::SET_VRING_CALL, TX.into()));
    for seq in 0..10 {
        bench.driver.queue(&VnetHdr::default(), &tx_frame(seq, 60));
        bench.driver.tx.publish_and_kick();
        assert!(bench.tap().recv(PATIENCE).is_some());
    }
    bench.wait_counter("tx_frames", 10);
    bench.tell(&Message::set_vring_call(TX.into(), fd_of(&bench.driver.tx.call)));
    assert!(bench.driver.wait_tx_done(PATIENCE));
}
