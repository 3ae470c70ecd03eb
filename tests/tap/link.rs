//! Queues that come and go with the guest's, the link, a TAP that is deleted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::PATIENCE;
use crate::common::bench::Guest;
use crate::common::driver::NetDriver;
use crate::common::frames::{Ends, L4Csum, Stamp, payload, test_frame, udp4};
use crate::common::frontend::{Answer, RawFrontend};
use crate::common::message::Message;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::virtio::VnetHdr;
use crate::{Place, TAP, assert_frames_pass, wait_until};

/// Frames both ways, as fast as they go, until stopped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    /// None once they were waited for.
    guest: Option<JoinHandle<(u64, u64)>>,
    host: Option<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start(mut guest: Guest, place: &Place) -> Load {
        let host = PacketSocket::open_vnet_hdr(&place.namespace, TAP);
        let stop = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let (stop_guest, count) = (Arc::clone(&stop), Arc::clone(&received));
        let guest = std::thread::spawn(move || {
            let driver = &mut guest.pairs[0];
            let frame = test_frame(&Ends::TX, Stamp { stream: 9, seq: 0 }, 1000);
            assert!(driver.wait_tx_done(PATIENCE));
            let mut sent = 0;
            while !stop_guest.load(Ordering::Relaxed) {
                driver.reclaim_tx();
                if driver.tx.free_descriptors() > 4 {
                    driver.queue(&VnetHdr::default(), &frame);
                    sent += 1;
                    driver.tx.publish_and_kick();
                }
                while driver.rx.used_idx() != driver.rx.last_used() {
                    driver.recv(PATIENCE);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            // To send may have taken back some, too.
            driver.reclaim_tx();
            (sent, sent - driver.tx.outstanding().len() as u64)
        });
        let stop_host = Arc::clone(&stop);
        let host = std::thread::spawn(move || {
            let frame = test_frame(&Ends::RX, Stamp { stream: 8, seq: 0 }, 1000);
            while !stop_host.load(Ordering::Relaxed) {
                // The queue may be full, the link down, the TAP gone.
                let _ = host.send_vnet(&VnetHdr::default(), &frame);
            }
        });
        Load { stop, received, guest: Some(guest), host: Some(host) }
    }

    /// Waits until frames arrive in the guest.
    pub(crate) fn wait_moving(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let before = self.received.load(Ordering::Relaxed);
        while self.received.load(Ordering::Relaxed) < before + 100 {
            assert!(Instant::now() < deadline, "Nothing moves");
            std::thread::yield_now();
        }
    }

    /// Ends it; returns how many frames were sent, and how many of them came back used.
    pub(crate) fn stop(mut self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.host.take().unwrap().join().unwrap();
        self.guest.take().unwrap().join().unwrap()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // A test that failed: its threads would take the processors from those that come after it.
        self.stop.store(true, Ordering::Relaxed);
        _ = (self.host.take().map(JoinHandle::join), self.guest.take().map(JoinHandle::join));
    }
}

fn enable(front_end: &RawFrontend, pair: u32, enable: u32) {
    for index in [2 * pair, 2 * pair + 1] {
        assert_eq!(front_end.ask(Message::set_vring_enable(index, enable)), Answer::Ack);
    }
}

#[test]
fn tap_queues_follow_the_pairs_that_are_in_use() {
    if !require_root("tap_queues_follow_the_pairs_that_are_in_use") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new(TAP) });
    let queues = || place.namespace.tap_queues(TAP);
    let _backend = place.start(&["--queue-pairs", "4"]);
    assert_eq!(queues(), (1, 3), "Before a guest comes");
    let mut guest = Guest::new(4, 0);
    guest.pairs.iter_mut().for_each(|pair| pair.post_rx(128, 2048));
    let front_end = place.connect(&guest);
    wait_until("4 queues are attached", || queues() == (4, 0));

    for in_use in [2, 1, 3, 2] {
        (0..4).for_each(|pair| enable(&front_end, pair, u32::from(pair < in_use)));
        wait_until("the queues follow", || queues() == (in_use, 4 - in_use));

        assert_flows_arrive(&mut guest, &place.host(), in_use as usize);
    }
}

/// Many flows: every frame arrives, on a pair that is in use.
fn assert_flows_arrive(guest: &mut Guest, host: &PacketSocket, in_use: usize) {
    const FLOWS: u16 = 64;
    for flow in 0..FLOWS {
        let ends = Ends { src_port: 6000 + flow, ..Ends::RX };
        let stamp = Stamp { stream: flow, seq: 0 };
        host.send(&udp4(&ends, &payload(stamp, 100), L4Csum::Full));
    }
    let mut arrived = 0;
    let deadline = Instant::now() + PATIENCE;
    while arrived < FLOWS && Instant::now() < deadline {
        for pair in &mut guest.pairs[..in_use] {
            while pair.recv(Duration::ZERO).is_some() {
                arrived += 1;
            }
        }
    }
    assert_eq!(arrived, FLOWS, "with {in_use} pairs in use");
    for pair in &mut guest.pairs[in_use..] {
        assert!(pair.recv(Duration::ZERO).is_none(), "A frame on a pair that is not in use");
    }
}

/// A flow that the kernel steers to a queue that the guest never fills would be lost.
#[test]
fn tap_queue_of_a_pair_without_buffers_is_not_attached() {
    if !require_root("tap_queue_of_a_pair_without_buffers_is_not_attached") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new(TAP) });
    let _backend = place.start(&["--queue-pairs", "2"]);
    let mut guest = Guest::new(2, 0);
    guest.pairs[0].post_rx(128, 2048);
    let _front_end = place.connect(&guest);
    assert_flows_arrive(&mut guest, &place.host(), 1);
    assert_eq!(place.namespace.tap_queues(TAP), (1, 1));

    guest.pairs[1].post_rx(128, 2048);

    wait_until("the second is attached", || place.namespace.tap_queues(TAP) == (2, 0));
    assert_flows_arrive(&mut guest, &place.host(), 2);
}

/// While a worker polls it asks for no kicks: buffers are found by looking.
#[test]
fn tap_queue_is_attached_for_buffers_that_no_kick_told_of() {
    if !require_root("tap_queue_is_attached_for_buffers_that_no_kick_told_of") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new(TAP) });
    let _backend = place.start(&["--queue-pairs", "2", "--poll-us", "1000"]);
    let mut guest = Guest::new(2, 0);
    guest.pairs[0].post_rx(128, 2048);
    let _front_end = place.connect(&guest);
    let pair = &mut guest.pairs[1];
    let mut seq = 0..;
    let mut keep_awake = |pair: &mut NetDriver| {
        for seq in seq.by_ref().take(20) {
            pair.send(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 1, seq }, 60));
            assert!(pair.wait_tx_done(PATIENCE));
        }
    };
    keep_awake(pair);
    pair.post_rx(128, 2048);
    keep_awake(pair);
    wait_until("the second is attached", || place.namespace.tap_queues(TAP) == (2, 0));
}

/// I-09. Frames wait for the guest to come back: with no session nothing is detached further.
#[test]
fn frames_for_a_guest_that_is_away_wait_in_the_tap() {
    if !require_root("frames_for_a_guest_that_is_away_wait_in_the_tap") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let _backend = place.start(&[]);
    let mut guest = Guest::new(1, 0);
    let front_end = place.connect(&guest);
    let host = place.host();
    assert_frames_pass(&mut guest, &host);
    front_end.disconnect();
    // Served only once the old session's rings are stopped.
    let next = RawFrontend::connect(place.socket()).unwrap();
    assert!(next.is_alive());
    let frames: Vec<_> = (0..50).map(|seq| test_frame(&Ends::RX, Stamp { stream: 4, seq }, 300)).collect();
    frames.iter().for_each(|frame| host.send(frame));

    guest.resume_at_used_index();
    next.negotiate_like_cloud_hypervisor(&guest.session()).unwrap();

    for frame in frames {
        assert_eq!(guest.pairs[0].recv(PATIENCE).expect("a frame that waited").1, frame);
    }
}

/// F-01
#[test]
fn frames_are_dropped_and_counted_while_the_link_is_down_and_pass_when_it_is_up() {
    if !require_root("frames_are_dropped_and_counted_while_the_link_is_down_and_pass_when_it_is_up") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let mut backend = place.start(&[]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.host());
    for round in 1..=3 {
        place.namespace.ip("link set tap0 down");
        for seq in 0..10 {
            let frame = test_frame(&Ends::TX, Stamp { stream: 2, seq }, 100);
            guest.pairs[0].send(&VnetHdr::default(), &frame);
        }
        assert!(guest.pairs[0].wait_tx_done(PATIENCE), "The guest has its buffers back");
        backend.wait_counter("tx_drop_link_down", 10 * round);

        place.namespace.ip("link set tap0 up");

        // Until it has heard of that it drops frames.
        backend.wait_line("Interface \"tap0\": link up");
        assert_frames_pass(&mut guest, &place.host());
    }
}

/// F-03
#[test]
fn tap_deleted_under_load_leaves_a_quiet_process_that_ends_when_told() {
    if !require_root("tap_deleted_under_load_leaves_a_quiet_process_that_ends_when_told") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let mut backend = place.start(&["--on-device-loss", "wait"]);
    let mut guest = Guest::new(1, 0);
    let front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.host());
    let load = Load::start(guest, &place);
    load.wait_moving(PATIENCE);

    place.namespace.ip("link delete tap0");

    backend.wait_line("Interface \"tap0\" was deleted; waiting for one of that name");
    load.stop();
    backend.wait_at_rest();
    let before = backend.counters(1);
    backend.wait_at_rest();
    assert_eq!(before, backend.counters(1), "The counters stand");
    assert_eq!(backend.log().matches("was deleted").count(), 1);
    assert!(front_end.is_alive(), "The control plane answers");
    let began = Instant::now();
    backend.signal(Signal::SIGTERM);
    assert_eq!(backend.wait_end(PATIENCE).code(), Some(0));
    crate::common::say(&format!("SIGTERM without a device: ended after {:?}", began.elapsed()));
}
