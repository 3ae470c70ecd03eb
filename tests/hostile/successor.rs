//! The process after one that was killed: what it finds, and what waited for it.

use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::backend::{Spawned, arg, inherit};
use crate::common::bench::Guest;
use crate::common::frames::{Ends, Stamp, test_frame};
use crate::common::message::Message;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::place::{Place, assert_frames_pass};
use crate::common::virtio::{VnetHdr, feature};
use crate::common::{PATIENCE, times};
use crate::outlived::{BINARY, place_with_tap};
use crate::process::TAP;

/// I-02
#[test]
fn process_killed_in_the_middle_of_a_message_leaves_a_guest_that_the_next_one_serves() {
    if !require_root("process_killed_in_the_middle_of_a_message_leaves_a_guest_that_the_next_one_serves") {
        return;
    }
    let place = place_with_tap();
    let mut guest = Guest::new(1, feature::EVENT_IDX | feature::IN_ORDER);
    guest.pairs[0].post_rx(16, 2048);
    let mut host = None;
    for round in 0..times(12, 200) {
        let mut backend = place.start(&["--tap", TAP]);
        let front_end = place.connect(&guest);
        let host = host.get_or_insert_with(|| PacketSocket::open(&place.namespace, TAP));
        assert_frames_pass(&mut guest, host, round);
        let frame = test_frame(&Ends::TX, Stamp { stream: 7, seq: round }, 100);
        guest.pairs[0].send(&VnetHdr::default(), &frame);
        // Several in a row, so that it is busy with one of them, at a moment that differs.
        for _ in 0..8 {
            let message = if round % 2 == 0 {
                Message::set_mem_table(&guest.mem)
            } else {
                Message::get_vring_base(round % 4 / 2)
            };
            assert!(front_end.tell(&message));
        }
        thread::sleep(Duration::from_micros(u64::from(round) * 20));
        backend.signal(Signal::SIGKILL);
        backend.wait_end(PATIENCE);
        drop(front_end);
        while host.recv(Duration::ZERO).is_some() {}
        guest.resume_at_used_index();
        if !guest.pairs[0].tx.outstanding().is_empty() {
            // What was not returned goes out with the next process.
            let mut backend = place.start(&["--tap", TAP]);
            let front_end = place.connect(&guest);
            assert!(guest.pairs[0].wait_tx_done(PATIENCE), "round {round}: a head was lost");
            front_end.disconnect();
            backend.signal(Signal::SIGTERM);
            assert_eq!(backend.wait_end(PATIENCE).code(), Some(0));
            while host.recv(Duration::ZERO).is_some() {}
            guest.resume_at_used_index();
        }
    }
}

/// I-06
#[test]
fn process_started_again_with_fewer_queue_pairs_says_which_rings_stay_idle() {
    if !require_root("process_started_again_with_fewer_queue_pairs_says_which_rings_stay_idle") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new(TAP) });
    let mut guest = Guest::new(2, 0);
    let mut backend = place.start(&["--tap", TAP, "--queue-pairs", "2"]);
    let front_end = place.connect(&guest);
    let host = PacketSocket::open(&place.namespace, TAP);
    assert_frames_pass(&mut guest, &host, 0);
    assert!(!backend.log().contains("stays idle"), "{}", backend.log());
    backend.signal(Signal::SIGKILL);
    backend.wait_end(PATIENCE);
    drop(front_end);

    guest.resume_at_used_index();
    let mut backend = place.start(&["--tap", TAP]);
    let _front_end = place.connect(&guest);

    let line = backend.wait_line("stays idle");
    assert!(line.contains("warn: Ring 2 was set up, and stays idle: "), "{line}");
    assert_frames_pass(&mut guest, &host, 1);
}

/// I-09: whoever keeps the TAP's descriptor keeps the frames.
#[test]
fn frames_that_come_between_two_processes_wait_in_the_tap_that_somebody_holds() {
    if !require_root("frames_that_come_between_two_processes_wait_in_the_tap_that_somebody_holds") {
        return;
    }
    const NUMBER: i32 = 20;
    const FRAMES: u32 = 200;
    let place = place_with_tap();
    let tap = place.namespace.open_tun(TAP, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let start = || {
        let mut command = Command::new(BINARY);
        inherit(&mut command, tap.as_fd(), NUMBER);
        let mut backend = Spawned::run(command.args(["--socket-path", arg(&place.socket()), "--tap-fd", "20"]));
        backend.wait_line("Listening on");
        backend
    };
    let mut guest = Guest::new(1, 0);
    guest.pairs[0].post_rx(240, 2048);
    let mut backend = start();
    let front_end = place.connect(&guest);
    let host = PacketSocket::open(&place.namespace, TAP);
    assert_frames_pass(&mut guest, &host, 0);
    backend.signal(Signal::SIGKILL);
    backend.wait_end(PATIENCE);
    drop(front_end);
    let frames: Vec<_> = (0..FRAMES).map(|seq| test_frame(&Ends::RX, Stamp { stream: 4, seq }, 300)).collect();
    frames.iter().for_each(|frame| host.send(frame));

    guest.resume_at_used_index();
    let _backend = start();
    let _front_end = place.connect(&guest);

    for frame in frames {
        assert!(guest.pairs[0].recv(PATIENCE).expect("a frame that waited").1 == frame);
    }
}
