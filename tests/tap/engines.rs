//! Frames in io_uring batches on a real TAP: their order, what happens without io_uring, and a killed process's ring.

use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::backend::{Spawned, arg, for_any_user, inherit};
use crate::common::bench::Guest;
use crate::common::frames::{Checker, Ends, Stamp, test_frame};
use crate::common::netns::{TapSpec, require_root};
use crate::common::refused::refuse_to;
use crate::common::virtio::{VnetHdr, feature};
use crate::common::{PATIENCE, say, skip};
use crate::extras::{is_forwarding, place_with_bridge};
use crate::{Place, TAP, assert_frames_pass, wait_until};

fn tx_frame(seq: u32) -> Vec<u8> {
    test_frame(&Ends::TX, Stamp { stream: 1, seq }, 100)
}

fn rx_frame(seq: u32) -> Vec<u8> {
    test_frame(&Ends::RX, Stamp { stream: 2, seq }, 100)
}

/// Frames come one by one while a batch of reads goes on, so one may come between a read that finds nothing and the next:
/// none is lost and none comes late.
#[test]
fn frame_that_comes_between_two_reads_of_a_batch_leaves_no_hole() {
    const FRAMES: u32 = 20_000;
    if !require_root("frame_that_comes_between_two_reads_of_a_batch_leaves_no_hole") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    place.namespace.ip("link set dev tap0 txqueuelen 30000");
    let _backend = place.start(&["--io", "uring"]);
    let mut guest = Guest::new(1, feature::MRG_RXBUF | feature::EVENT_IDX);
    guest.pairs[0].post_rx(200, 2048);
    let _front_end = place.connect(&guest);
    let host = place.host();
    let mut checker = Checker::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seq in 0..FRAMES {
                host.send(&rx_frame(seq));
                // Pauses of all lengths, so that batches end everywhere.
                (0..seq % 97 * 7).for_each(|_| std::hint::spin_loop());
            }
        });
        for _ in 0..FRAMES {
            let (_, frame) = guest.pairs[0].recv(PATIENCE).expect("all frames come");
            checker.see(&frame);
        }
    });
    checker.assert_perfect(FRAMES);
}

/// A TAP with a send limit refuses frames in the middle of a batch, here while those before them wait for a slow port of its
/// bridge: they go later, and none before them.
#[test]
fn frame_that_the_tap_refuses_for_now_is_not_overtaken() {
    const TEST: &str = "frame_that_the_tap_refuses_for_now_is_not_overtaken";
    const FRAMES: u32 = 3000;
    if !require_root(TEST) {
        return;
    }
    let place = place_with_bridge();
    let slow = "qdisc add dev port root tbf rate 4mbit burst 2000 limit 1000000";
    let mut tc = place.namespace.command("tc");
    if !tc.args(slow.split(' ')).status().is_ok_and(|status| status.success()) {
        return skip(TEST, "this kernel, or this machine, has no token bucket filter (tc)");
    }
    place.namespace.add_tap(&TapSpec::new(TAP));
    place.namespace.ip("link set tap0 master br0");
    let queue = place.namespace.open_tap(TAP, false);
    let limit: libc::c_int = 6000;
    // SAFETY: TUNSETSNDBUF reads one int, which outlives the call.
    let set = unsafe { libc::ioctl(queue.fd.as_raw_fd(), libc::TUNSETSNDBUF, &raw const limit) };
    assert_eq!(set, 0, "TUNSETSNDBUF: {}", std::io::Error::last_os_error());
    let socket = place.socket();
    let mut command = Command::new(crate::BINARY);
    command.args(["--socket-path", arg(&socket), "--tap-fd", "7", "--io", "uring"]);
    inherit(&mut command, queue.fd.as_fd(), 7);
    let mut backend = Spawned::run(&mut command);
    backend.wait_line("Listening on");
    let mut guest = Guest::new(1, feature::EVENT_IDX);
    let _front_end = place.connect(&guest);
    wait_until("the bridge forwards", || is_forwarding(&place));
    // As they come out of the TAP: behind the port each processor has a queue of its own.
    let host = place.host();
    let driver = &mut guest.pairs[0];
    let mut checker = Checker::new(1);
    let mut seq = 0;
    let mut was_refused = false;
    while seq < FRAMES {
        for _ in 0..100 {
            let frame = test_frame(&Ends { dst_mac: [2, 0, 0, 0, 0, 9], ..Ends::TX }, Stamp { stream: 1, seq }, 100);
            driver.queue(&VnetHdr::default(), &frame);
            seq += 1;
        }
        driver.tx.publish_and_kick();
        // They take 20 ms on the port; more than the limit are not let out before.
        was_refused |= !driver.wait_tx_done(Duration::from_millis(5));
        for _ in 0..100 {
            checker.see(&host.recv(PATIENCE).expect("all frames come out"));
        }
        assert!(driver.wait_tx_done(PATIENCE), "every head comes back");
    }
    checker.assert_perfect(FRAMES);
    assert!(was_refused, "the TAP took all frames at once");
}

/// The kernel ends the ring of a killed process later than the process: the next one waits for the TAP.
#[test]
fn process_killed_in_the_middle_of_batches_can_be_started_again_at_once() {
    const KILLS: u32 = 15;
    if !require_root("process_killed_in_the_middle_of_batches_can_be_started_again_at_once") {
        return;
    }
    // A TAP that stays, and one that goes with its process.
    for is_kept in [true, false] {
        let place = Place::new();
        if is_kept {
            place.namespace.add_tap(&TapSpec::new(TAP));
        }
        let mut waited = 0;
        for _ in 0..KILLS {
            let mut guest = Guest::new(1, feature::MRG_RXBUF | feature::EVENT_IDX);
            guest.pairs[0].post_rx(64, 2048);
            let mut backend = place.start(&["--io", "uring"]);
            waited += u32::from(backend.log().contains("is in use; waiting"));
            let front_end = place.connect(&guest);
            let host = place.host();
            assert_frames_pass(&mut guest, &host);
            for seq in 0..100 {
                guest.pairs[0].queue(&VnetHdr::default(), &tx_frame(seq));
                host.send(&rx_frame(seq));
            }
            guest.pairs[0].tx.publish_and_kick();
            backend.signal(Signal::SIGKILL);
            backend.wait_end(PATIENCE);
            drop(front_end);
        }
        say(&format!("Killed {KILLS} times, {waited} times the next one had to wait for the TAP"));
    }
}

/// In a container whose filter forbids io_uring.
fn without_io_uring(place: &Place, more: &[&str]) -> Command {
    let mut command = place.command(&[&["--tap", TAP], more].concat());
    refuse_to(&mut command, libc::SYS_io_uring_setup, libc::EPERM);
    command
}

#[test]
fn frames_pass_with_system_calls_where_io_uring_is_forbidden() {
    if !require_root("frames_pass_with_system_calls_where_io_uring_is_forbidden") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let mut backend = Spawned::run(&mut without_io_uring(&place, &[]));
    backend.wait_line("Listening on");
    assert_eq!(backend.log().matches("o io_uring").count(), 1, "{}", backend.log());
    let mut guest = Guest::new(1, feature::MRG_RXBUF);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.host());
    drop(backend);

    wait_until("the TAP is free", || place.namespace.ip("-d link show dev tap0").contains("NO-CARRIER"));
    let (code, log) = Spawned::refusal(&mut without_io_uring(&place, &["--io", "uring"]));
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("--io uring") && log.contains("io_uring_disabled") && log.contains("not permitted"), "{log}");
}

/// Where little memory may be locked the frames' memory cannot be registered: said once, and frames pass.
#[test]
fn frames_pass_where_little_memory_may_be_locked() {
    if !require_root("frames_pass_where_little_memory_may_be_locked") {
        return;
    }
    let place = Place::new();
    // A user who has nothing else: all of a user's processes count together.
    place.namespace.add_tap(&TapSpec::new(TAP));
    let queue = place.namespace.open_tap(TAP, false);
    let socket = place.socket();
    let mut command = place.namespace.command("prlimit");
    command.args([
        "--memlock=65536",
        "setpriv",
        "--reuid=61234",
        "--regid=61234",
        "--clear-groups",
        "--bounding-set=-all",
    ]);
    command.arg("--inh-caps=-all").arg(for_any_user(&socket));
    command.args(["--socket-path", arg(&socket), "--tap-fd", "20", "--io", "uring"]);
    inherit(&mut command, queue.fd.as_fd(), 20);
    let mut backend = Spawned::run(&mut command);
    backend.wait_line("Listening on");
    let mut guest = Guest::new(1, feature::MRG_RXBUF);
    let _front_end = place.connect(&guest);
    let host = place.host();
    for _ in 0..3 {
        assert_frames_pass(&mut guest, &host);
    }
    backend.wait_line("going on with one system call for each frame");
    std::thread::sleep(Duration::from_millis(10));
    // Once for each direction.
    assert!(backend.log().matches("going on with one system call").count() <= 2, "{}", backend.log());
}
