//! When a ring asks for a call, and when it asks for kicks (VIRTIO 1.3, "Used Buffer Notification Suppression" and
//! "Available Buffer Notification Suppression").
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::device_side::{ALL, DeviceSide, NONE};
use common::memory::GuestMemory;
use common::split_ring::{Desc, SplitRing};
use common::virtio::{AVAIL_NO_INTERRUPT, USED_NO_NOTIFY};
use vhost_user_net::virtqueue::queue::RingFeatures;

const SIZE: u16 = 64;

/// A ring whose driver offers the same empty chain again and again.
struct Bench {
    ring: SplitRing,
    ours: DeviceSide,
}

impl Bench {
    fn new(start: u16, features: RingFeatures) -> Self {
        let mem = Arc::new(GuestMemory::single(1 << 20));
        let mut ring = SplitRing::starting_at(&mem, SIZE, start);
        ring.event_idx = features.event_idx;
        ring.write_desc(0, Desc { addr: mem.alloc(64, 1), len: 64, flags: 0, next: 0 });
        let ours = DeviceSide::start(&ring, features).unwrap();
        Self { ring, ours }
    }

    fn offer(&mut self, count: u16) {
        (0..count).for_each(|_| self.ring.put_avail(0));
        self.ring.publish();
    }

    /// Completes `count` chains; tells whether the driver is to be called.
    fn complete(&mut self, count: u16) -> bool {
        self.offer(count);
        assert_eq!(self.ours.complete_all(0), usize::from(count));
        self.ours.queue.publish()
    }
}

/// Q-34, N-06
#[test]
fn call_is_wanted_exactly_if_the_event_lies_among_the_new_entries() {
    for start in [0, 1, 40, 0x7fff, 0x8000, 65_500, 65_535] {
        let mut bench = Bench::new(start, ALL);
        for count in (1..=SIZE).chain([1, SIZE, 1, 2, SIZE]) {
            for distance in [0, 1, 2, count - 1, count, count + 1, 0x7fff, 0x8000, 0xfffe, 0xffff] {
                let old = bench.ring.used_idx();
                let event = old.wrapping_add(distance);
                bench.ring.set_used_event(event);
                let called = bench.complete(count);
                // The specification's words: the entry with this index is one of those just used.
                let expected = (0..count).any(|k| old.wrapping_add(k) == event);
                assert_eq!(called, expected, "{old} + {count}, event {event}");
            }
        }
    }
}

/// Q-34, N-06
#[test]
fn every_event_distance_around_a_batch_is_judged_right() {
    let mut bench = Bench::new(65_400, ALL);
    for count in [1, 7, SIZE] {
        for distance in 0..=u16::MAX {
            let old = bench.ring.used_idx();
            bench.ring.set_used_event(old.wrapping_add(distance));
            assert_eq!(bench.complete(count), distance < count, "{old} + {count}, event {distance} ahead");
        }
    }
}

///
#[test]
fn without_event_index_the_flag_decides_on_calls() {
    let mut bench = Bench::new(65_530, NONE);
    for count in 1..=20 {
        bench.ring.write_avail_flags(AVAIL_NO_INTERRUPT);
        assert!(!bench.complete(count));
        bench.ring.write_avail_flags(0);
        assert!(bench.complete(count));
        // Other bits mean nothing.
        bench.ring.write_avail_flags(!AVAIL_NO_INTERRUPT);
        assert!(bench.complete(count));
    }
}

#[test]
fn with_event_index_the_flag_means_nothing() {
    let mut bench = Bench::new(0, ALL);
    bench.ring.write_avail_flags(AVAIL_NO_INTERRUPT);
    bench.ring.set_used_event(0);
    assert!(bench.complete(1));
}

#[test]
fn nothing_used_is_nothing_to_call_for() {
    for features in [NONE, ALL] {
        let mut bench = Bench::new(9, features);
        bench.ring.set_used_event(9);
        assert!(!bench.ours.queue.publish());
        bench.complete(3);
        assert!(!bench.ours.queue.publish());
    }
}

/// N-06
#[test]
fn kicks_are_asked_for_by_flag_or_event_and_only_when_told() {
    for start in [0, 65_533] {
        let mut bench = Bench::new(start, NONE);
        assert_eq!(bench.ring.used_flags(), USED_NO_NOTIFY, "a ring that just started is looked at anyway");
        assert!(!bench.ours.queue.enable_kicks().unwrap());
        assert!(bench.ring.needs_kick());
        bench.ours.queue.disable_kicks();
        assert!(!bench.ring.needs_kick());

        let mut bench = Bench::new(start, ALL);
        for _ in 0..10 {
            assert!(!bench.ours.queue.enable_kicks().unwrap());
            bench.offer(1);
            assert!(bench.ring.needs_kick(), "the first entry behind the event");
            bench.ours.queue.disable_kicks();
            bench.offer(1);
            assert!(!bench.ring.needs_kick());
            bench.ours.complete_all(0);
            bench.ours.queue.publish();
        }
    }
}

#[test]
fn entries_that_came_before_kicks_were_asked_for_are_told() {
    for features in [NONE, ALL] {
        let mut bench = Bench::new(65_535, features);
        bench.offer(1);
        assert!(bench.ours.queue.enable_kicks().unwrap());
        bench.ours.complete_all(0);
        assert!(!bench.ours.queue.enable_kicks().unwrap());
    }
}
