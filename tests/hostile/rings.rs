//! Rings and notifications, end to end and in races.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::bench::{self, Guest};
use crate::common::device_side::{ALL, DeviceSide, NONE};
use crate::common::driver::NetDriverSpec;
use crate::common::frames::{Ends, Stamp, test_frame};
use crate::common::frontend::Answer;
use crate::common::memory::{GuestMemory, RegionSpec};
use crate::common::message::Message;
use crate::common::path_bench::{Bench, RX, TX};
use crate::common::split_ring::{Buf, Desc, SplitRing};
use crate::common::virtio::VnetHdr;
use crate::common::{PATIENCE, StopOnDrop, fd_of, say, times, wait_readable};

/// Q-01, E-01: it cannot be returned, so its ring is parked; that ring can be stopped at once, and starts again.
#[test]
fn head_that_is_no_descriptor_parks_its_ring_alone() {
    for index in [RX, TX] {
        for head in [256, 9999, 0xffff] {
            let mut bench = Bench::new(0);
            let ring = if index == RX { &mut bench.driver.rx } else { &mut bench.driver.tx };
            ring.put_avail(head);
            ring.publish();
            ring.kick();
            let err = ring.err.try_clone().unwrap();
            // Nothing looks at receive buffers before there is a frame.
            bench.tap().send(&VnetHdr::default(), &[0; 60]);
            assert!(wait_readable(fd_of(&err), PATIENCE), "ring {index}, head {head}");
            bench.wait_counter("broken_rings", 1);
            if index == RX {
                bench.pass_tx(0, 60);
            }

            let began = Instant::now();
            assert_eq!(bench.front_end.get_vring_base(index), Ok(0));
            say(&format!("A parked ring was stopped in {:?}", began.elapsed()));

            let ring = if index == RX { &mut bench.driver.rx } else { &mut bench.driver.tx };
            ring.reset();
            bench.start_ring(index, if index == RX { &bench.driver.rx } else { &bench.driver.tx });
            bench.pass_tx(1, 60);
            bench.driver.post_rx(4, 2048);
            assert!(bench.driver.recv(PATIENCE).is_some(), "the frame that waited");
            bench.pass_rx(1, 60);
        }
    }
}

/// between two regions, into the hole, and out of it.
#[test]
fn buffer_in_a_hole_of_memory_is_returned_unused() {
    const HOLE: u64 = 0x110_0000;
    const BEHIND: u64 = 0x4000_0000;
    let mem = Arc::new(GuestMemory::new(&[
        RegionSpec::new(HOLE - (16 << 20), 16 << 20),
        RegionSpec::new(BEHIND, 1 << 20).in_file(1, 0),
    ]));
    let mut bench = Bench::on(Arc::clone(&mem), NetDriverSpec::default());
    bench.driver.tx.take_free(1).unwrap();
    let holes = [HOLE, HOLE - 50, BEHIND - 50, BEHIND - 200, BEHIND + (1 << 20) - 50];
    for (count, addr) in (1..).zip(holes) {
        bench.driver.tx.write_desc(0, Desc { addr, len: 100, flags: 0, next: 0 });
        bench.driver.tx.offer(0);
        bench.driver.tx.publish_and_kick();
        assert_eq!(bench.driver.tx.wait_used(PATIENCE), Some((0, 0)), "{addr:#x}");
        assert_eq!(bench.counter("tx_drop_bad_chain"), count);
        bench.pass_tx(0, 100);
        assert!(bench.driver.wait_tx_done(PATIENCE));
    }
}

/// N-03: the device asks for kicks and looks once more, the driver adds and looks whether it is to kick, again and again
/// at the same moment.
#[test]
fn no_kick_is_lost_between_the_last_look_and_sleep() {
    let rounds = times(150_000, 5_000_000);
    for features in [NONE, ALL] {
        let mem = Arc::new(GuestMemory::single(1 << 20));
        let mut ring = SplitRing::new(&mem, 64);
        ring.event_idx = features.event_idx;
        ring.write_desc(0, Desc { addr: mem.alloc(64, 1), len: 64, flags: 0, next: 0 });
        let mut ours = DeviceSide::start(&ring, features).unwrap();
        let kick = ring.kick.try_clone().unwrap();
        let slept = thread::scope(|scope| {
            let device = scope.spawn(move || {
                let (mut done, mut slept) = (0, 0);
                loop {
                    done += ours.complete_all(0);
                    ours.queue.publish();
                    if done >= rounds as usize {
                        return slept;
                    }
                    if !ours.queue.enable_kicks().unwrap() {
                        slept += 1;
                        assert!(wait_readable(fd_of(&kick), PATIENCE), "No kick after {done} of {rounds}");
                        let _ = kick.read();
                        ours.queue.disable_kicks();
                    }
                }
            });
            for round in 0..rounds {
                let deadline = Instant::now() + PATIENCE;
                // Never more than one on its way: the device is always about to sleep.
                while ring.used_idx() != ring.avail_idx() {
                    assert!(Instant::now() < deadline, "Entry {round} is not seen");
                    std::hint::spin_loop();
                }
                ring.put_avail(0);
                ring.publish();
                if ring.needs_kick() {
                    ring.kick();
                }
            }
            device.join().unwrap()
        });
        say(&format!("{slept} of {rounds} times the device went to sleep"));
        assert!(slept > 0, "The race was never run");
    }
}

/// N-04
#[test]
fn kicks_while_a_ring_is_stopped_and_started_do_no_harm() {
    let mut bench = bench::Bench::running(1);
    let kicks = bench.guest.session().rings.iter().map(|ring| ring.kick.try_clone().unwrap()).collect::<Vec<_>>();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                kicks.iter().for_each(|kick| _ = kick.write(1));
            }
        });
        let _stop = StopOnDrop(&stop);
        for round in 0..200 {
            for index in 0..2 {
                let used = bench.guest.session().rings[index].used_idx();
                let base = bench.front_end.get_vring_base(index as u32);
                assert_eq!(base, Ok(used.into()), "round {round}");
                bench.start_ring(index);
            }
            if round % 20 == 0 {
                bench.assert_frames_pass();
            }
        }
    });
    bench.assert_frames_pass();
    assert_eq!(bench.backend.counter(0, "broken_rings"), 0);
}

/// N-05. A wait is measured in what the flood does meanwhile, and the middle one of many is judged: the machine may be busy,
/// and may take a processor away from either of us.
#[test]
fn queue_beside_a_flooded_one_does_not_wait_for_the_flood() {
    const WAITS: usize = 200;
    /// A few milliseconds of it.
    const FRAMES_MOST: u32 = 1000;
    let mut bench = bench::Bench::running(2);
    let (done, passed) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut waits = Vec::new();
    let bench::Bench { guest, backend, .. } = &mut bench;
    let Guest { pairs, .. } = guest;
    let [flooded, other] = &mut pairs[..] else { unreachable!() };
    let [flooded_tap, other_tap] = &backend.taps[..] else { unreachable!() };
    thread::scope(|scope| {
        let (seen, is_flooded) = mpsc::channel();
        let (done, passed) = (&done, &passed);
        scope.spawn(move || {
            let frame = test_frame(&Ends::TX, Stamp { stream: 1, seq: 0 }, 1000);
            let mut told = false;
            while !done.load(Ordering::Relaxed) {
                flooded.send(&VnetHdr::default(), &frame);
                while flooded_tap.recv_raw(Duration::ZERO).is_some() {
                    passed.fetch_add(1, Ordering::Relaxed);
                }
                if passed.load(Ordering::Relaxed) >= 1000 && !std::mem::replace(&mut told, true) {
                    let _ = seen.send(());
                }
            }
        });
        let _stop = StopOnDrop(done);
        is_flooded.recv_timeout(PATIENCE).expect("a thousand frames of the flood");
        let flooded = || passed.load(Ordering::Relaxed);
        let (first, deadline) = (flooded(), Instant::now() + PATIENCE);
        while waits.len() < WAITS || flooded() < first + FRAMES_MOST {
            assert!(Instant::now() < deadline, "There is no flood any more");
            let frame = test_frame(&Ends::TX, Stamp { stream: 2, seq: waits.len() as u32 }, 200);
            let before = flooded();
            other.send(&VnetHdr::default(), &frame);
            let (_, got) = other_tap.recv(PATIENCE).expect("a frame beside the flood");
            assert!(got == frame, "it is another one");
            waits.push(flooded() - before);
        }
    });
    waits.sort_unstable();
    let (middle, worst) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    say(&format!(
        "While a frame passed beside a flood, of that {middle} frames passed in the middle, {worst} at worst"
    ));
    assert!(middle < FRAMES_MOST, "{middle} of {} waits", waits.len());
}

/// T-04: what is in a buffer is the guest's own matter, but its length and place are not.
#[test]
fn payload_rewritten_while_it_is_sent_stays_a_frame_of_its_length() {
    let mut bench = Bench::new(0);
    let addr = bench.mem.alloc(2048, 64);
    bench.mem.fill(addr, 2048, 0);
    let stop = AtomicBool::new(false);
    let (mem, done) = (Arc::clone(&bench.mem), &stop);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut fill = 0_u8;
            while !done.load(Ordering::Relaxed) {
                fill = fill.wrapping_add(1);
                mem.fill(addr + 12, 1500, fill);
            }
        });
        let _stop = StopOnDrop(&stop);
        let began = Instant::now();
        let mut wrong = None;
        while wrong.is_none() && began.elapsed() < Duration::from_millis(200) {
            bench.driver.tx.add(&[Buf::readable(addr, 12 + 1500)]);
            bench.driver.tx.publish_and_kick();
            let frame = bench.tap().recv(PATIENCE).map(|(_, frame)| frame.len());
            let is_returned = bench.driver.tx.wait_used(PATIENCE).is_some();
            wrong = Some((frame, is_returned)).filter(|seen| *seen != (Some(1500), true));
        }
        assert_eq!(wrong, None, "the frame's length, and whether its buffer came back");
    });
    bench.pass_tx(1, 100);
}

/// E-01: after each bad chain the position moves on, however many there are, and the ring can be stopped among them.
#[test]
fn ring_full_of_bad_chains_is_worked_off_and_can_be_stopped() {
    let mut bench = Bench::new(0);
    bench.driver.tx.take_free(1).unwrap();
    bench.driver.tx.write_desc(0, Desc { addr: 0, len: 100, flags: 0, next: 0 });
    for round in 1..=200 {
        (0..256).for_each(|_| bench.driver.tx.offer(0));
        bench.driver.tx.publish_and_kick();
        for _ in 0..256 {
            assert_eq!(bench.driver.tx.wait_used(PATIENCE), Some((0, 0)), "round {round}");
        }
        assert_eq!(bench.counter("tx_drop_bad_chain"), 256 * round);
    }
    (0..256).for_each(|_| bench.driver.tx.offer(0));
    bench.driver.tx.publish_and_kick();
    let base = bench.front_end.get_vring_base(TX).unwrap();
    assert_eq!(base, u32::from(bench.driver.tx.used_idx()), "Stopped in the middle of them");
    assert_eq!(bench.front_end.ask(Message::set_vring_num(TX, 256)), Answer::Ack);
    bench.driver.tx.reset();
    bench.start_ring(TX, &bench.driver.tx);
    bench.pass_tx(1, 60);
}
