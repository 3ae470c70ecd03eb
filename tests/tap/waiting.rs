//! Frames that wait in the TAP for the guest's buffers.

use std::fs;
use std::time::Duration;

use crate::common::PATIENCE;
use crate::common::backend::Spawned;
use crate::common::bench::Guest;
use crate::common::driver::NetDriver;
use crate::common::frames::{Ends, Stamp, test_frame};
use crate::common::netns::{TapSpec, require_root};
use crate::common::virtio::feature;
use crate::{Place, TAP};

/// How often the worker of the first queue pair gave up its CPU to wait.
fn sleeps(backend: &Spawned) -> u64 {
    let worker = fs::read_dir(format!("/proc/{}/task", backend.pid()))
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| fs::read_to_string(task.join("comm")).unwrap().trim() == "pair-0")
        .expect("a worker");
    let status = fs::read_to_string(worker.join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).expect("a count");
    line.trim().parse().unwrap()
}

/// The guest has a better use for the CPU than that each frame wakes a worker which can do nothing with it. None is lost,
/// and once the guest has caught up each is told of again.
#[test]
fn frames_for_which_there_are_no_buffers_wake_nobody() {
    const WAITING: u32 = 300;
    const AT_A_TIME: u32 = 50;
    if !require_root("frames_for_which_there_are_no_buffers_wake_nobody") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let backend = place.start(&[]);
    let mut guest = Guest::new(1, feature::MRG_RXBUF | feature::EVENT_IDX);
    let driver = &mut guest.pairs[0];
    driver.repost = false;
    driver.post_rx(1, 1526);
    let _front_end = place.connect(&guest);
    let driver = &mut guest.pairs[0];
    let host = place.host();
    let frame = |seq| test_frame(&Ends::RX, Stamp { stream: 7, seq }, 100);
    let receive = |driver: &mut NetDriver, seq| {
        let (_, received) = driver.recv(PATIENCE).unwrap_or_else(|| panic!("frame {seq} does not come"));
        assert!(received == frame(seq), "frame {seq} is not the one that comes");
    };
    host.send(&frame(0));
    receive(driver, 0);
    let mut next = 1;
    for round in 0..3 {
        host.send(&frame(next));
        std::thread::sleep(Duration::from_millis(20));
        let before = sleeps(&backend);
        for seq in next + 1..next + WAITING {
            host.send(&frame(seq));
            std::thread::sleep(Duration::from_micros(100));
        }
        let woken = sleeps(&backend) - before;
        assert!(woken <= 3, "round {round}: woken {woken} times by {WAITING} frames that have to wait");
        for seq in next..next + WAITING {
            if (seq - next) % AT_A_TIME == 0 {
                driver.post_rx(AT_A_TIME as usize, 1526);
            }
            receive(driver, seq);
        }
        next += WAITING;
        // With a buffer for it each wakes the worker.
        for seq in next..next + 5 {
            driver.post_rx(1, 1526);
            std::thread::sleep(Duration::from_millis(2));
            host.send(&frame(seq));
            receive(driver, seq);
        }
        next += 5;
    }
}
