//! Options that only the whole program can show: what was typed reaches whom it is about. Needs root; says SKIPPED aloud
//! without.
//!
//! What a value may be stands in `cli`; what an option is about, tested where its matter is, is not tested here again.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;

use common::backend::{Spawned, arg};
use common::bench::Guest;
use common::frames::{self, Ends, Stamp, test_frame};
use common::frontend::{Answer, RawFrontend};
use common::message::Message;
use common::netns::{PacketSocket, TapSpec, require_root};
use common::place::{Place, assert_frames_pass};
use common::refused::refuse_ioctl_bits_to;
use common::virtio::{VnetHdr, protocol};
use common::{PATIENCE, skip, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");
const TAP: &str = "tap0";

/// With a TAP; none, said aloud, without root.
fn place_with_tap(test: &str, multi_queue: bool) -> Option<Place> {
    if !require_root(test) {
        return None;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue, ..TapSpec::new(TAP) });
    Some(place)
}

/// The CPUs that a status of proc(5) lists.
fn cpus_of(status: &str) -> Vec<usize> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        first.parse().unwrap()..=last.parse().unwrap()
    };
    list.trim().split(',').flat_map(range).collect()
}

/// Where this process may run.
fn own_cpus() -> Vec<usize> {
    cpus_of(&fs::read_to_string("/proc/self/status").unwrap())
}

/// Each thread's name, and where it may run.
fn cpus_of_threads(backend: &Spawned) -> BTreeMap<String, Vec<usize>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    let statuses = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let named = |status: String| (status.lines().next().unwrap()["Name:".len()..].trim().to_owned(), cpus_of(&status));
    statuses.map(named).collect()
}

#[test]
fn cpu_affinity_binds_the_workers_in_turn_and_nobody_else() {
    const TEST: &str = "cpu_affinity_binds_the_workers_in_turn_and_nobody_else";
    let Some(place) = place_with_tap(TEST, true) else { return };
    let all = own_cpus();
    let [first, second, ..] = all[..] else { return skip(TEST, "there is one CPU") };
    let cpus = format!("{second},{first}");

    let mut backend = place.start(&["--tap", TAP, "--queue-pairs", "3", "--cpu-affinity", &cpus]);

    // It has its threads, and has bound them, before it serves.
    backend.counters(3);
    let seen = cpus_of_threads(&backend);
    for (thread, wanted) in [("pair-0", second), ("pair-1", first), ("pair-2", second)] {
        assert_eq!(seen[thread], [wanted], "{seen:?}");
    }
    assert_eq!(seen["vhost-user-net"], all);
}

#[test]
fn configuration_space_is_offered_unless_it_is_not_to_be() {
    const TEST: &str = "configuration_space_is_offered_unless_it_is_not_to_be";
    let Some(place) = place_with_tap(TEST, false) else { return };
    for (more, wanted) in [(&[][..], protocol::CONFIG), (&["--no-config"], 0)] {
        let _backend = place.start(&[&["--tap", TAP], more].concat());
        let front_end = RawFrontend::connect(place.socket()).unwrap();
        let offered = front_end.get_u64(&Message::get_protocol_features()).unwrap();
        assert_eq!(offered & protocol::CONFIG, wanted, "{more:?}: {offered:#x}");
    }
}

#[test]
fn queue_above_the_largest_is_refused() {
    const TEST: &str = "queue_above_the_largest_is_refused";
    let Some(place) = place_with_tap(TEST, false) else { return };
    for (more, size, wanted, said) in [
        (&["--queue-size", "256"][..], 256, Answer::Ack, ""),
        (&["--queue-size", "256"], 512, Answer::Nack(1), "Queue size 512 is more than --queue-size 256 allows"),
        (&["--queue-size", "256"], 768, Answer::Nack(1), "Queue size 768 is not a power of two from 1 to 32768"),
        (&["--queue-size", "256"], 0, Answer::Nack(1), "Queue size 0 is not a power of two from 1 to 32768"),
        (&[], 512, Answer::Ack, ""),
        (&[], 32768, Answer::Ack, ""),
    ] {
        let mut backend = place.start(&[&["--tap", TAP], more].concat());
        let mut guest = Guest::new(1, 0);
        let front_end = place.connect(&guest);
        place.namespace.wait_operational(TAP);
        assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, TAP), 0);
        // Of a ring that does not run.
        assert_eq!(front_end.ask(Message::set_vring_num(2, size)), wanted, "{more:?}: {size}");
        if wanted != Answer::Ack {
            backend.wait_line(said);
        }
    }
}

/// Lines of each level that there is up to that one, and of no other. An error is not had for the asking.
#[test]
fn log_has_lines_up_to_its_level() {
    const TEST: &str = "log_has_lines_up_to_its_level";
    const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];
    for (count, level) in (1..).zip(LEVELS) {
        let Some(place) = place_with_tap(TEST, false) else { return };
        // Which is warned of.
        place.namespace.ip("link set tap0 down");
        let mut command = place.namespace.command(BINARY);
        command.args(["--socket-path", arg(&place.socket()), "--tap", TAP, "--log-level", level]);
        let mut backend = Spawned::run(&mut command);
        let listens = || RawFrontend::connect(place.socket()).is_ok_and(|front_end| front_end.is_alive());
        wait_until("it listens", listens);
        let guest = Guest::new(1, 0);
        let mut front_end = None;
        // The connection before may have its end still to come.
        wait_until("it serves", || {
            front_end = RawFrontend::connect(place.socket()).ok().filter(RawFrontend::is_alive);
            front_end.is_some()
        });
        front_end.unwrap().negotiate_like_cloud_hypervisor(&guest.session()).unwrap();
        backend.signal(Signal::SIGTERM);
        assert!(backend.wait_end(PATIENCE).success());

        let wanted: BTreeSet<_> = LEVELS[1..count].iter().map(|level| (*level).to_owned()).collect();
        let seen = || -> BTreeSet<String> {
            let levels = |line: &str| line.split(": ").nth(1).unwrap().to_owned();
            backend.log().lines().map(levels).collect()
        };
        // The last ones are still being read.
        wait_until(&format!("{level} has {wanted:?}:\n{}", backend.log()), || seen() == wanted);
    }
}

/// While a worker looks by itself, frames that no kick tells of leave the guest. Not each: others may want its CPU, to whom it
/// gives way. One that does not look takes such a frame only if it comes while it is about to sleep.
#[test]
fn worker_that_polls_needs_no_kicks() {
    const TEST: &str = "worker_that_polls_needs_no_kicks";
    // Of so many, one left by chance where it did not poll. On a machine that was busy with other things, 5 of 400 left where it
    // did.
    const TRIES: u32 = 2000;
    const ENOUGH: usize = 6;
    let Some(place) = place_with_tap(TEST, false) else { return };
    if own_cpus().len() < 2 {
        return skip(TEST, "there is one CPU");
    }
    let _backend = place.start(&["--tap", TAP, "--poll-us", "1000"]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    let driver = &mut guest.pairs[0];
    let frame = test_frame(&Ends::TX, Stamp { stream: 1, seq: 0 }, 200);
    let mut leaves_unkicked = || {
        driver.send(&VnetHdr::default(), &frame);
        assert!(driver.wait_tx_done(PATIENCE));
        std::thread::sleep(Duration::from_micros(100));
        driver.queue(&VnetHdr::default(), &frame);
        driver.tx.publish();
        let leaves = driver.wait_tx_done(Duration::from_millis(5));
        if !leaves {
            driver.tx.kick();
            assert!(driver.wait_tx_done(PATIENCE));
        }
        leaves
    };
    let left = (0..TRIES).filter(|_| leaves_unkicked()).take(ENOUGH).count();
    assert_eq!(left, ENOUGH, "of {TRIES}");
}

#[test]
fn gateway_answers_for_its_own_address_alone() {
    const OTHER: Ends = Ends { dst_ip: [10, 99, 0, 77], ..Ends::TX };
    if !require_root("gateway_answers_for_its_own_address_alone") {
        return;
    }
    for (more, answered) in [(&[][..], &[OTHER, Ends::TX][..]), (&["--gateway", "10.99.0.1"], &[Ends::TX])] {
        let place = Place::new();
        let _backend = place.start(&[&["--tun", "tun0"], more].concat());
        let mut guest = Guest::new(1, 0);
        let _front_end = place.connect(&guest);
        let driver = &mut guest.pairs[0];
        driver.post_rx(16, 2048);
        for asked in [OTHER, Ends::TX] {
            driver.send(&VnetHdr::default(), &frames::arp_request(&asked));
        }
        for asked in answered {
            let (_, frame) = driver.recv(PATIENCE).expect("an answer");
            assert!(frames::is_arp_reply(&frame, asked), "{more:?}: {frame:x?}");
        }
    }
}

/// On a kernel before Linux 6.2.
#[test]
fn coalescing_that_was_asked_for_and_is_not_whole_is_warned_of() {
    const TEST: &str = "coalescing_that_was_asked_for_and_is_not_whole_is_warned_of";
    for (choice, level) in [("auto", "info"), ("on", "warn")] {
        let Some(place) = place_with_tap(TEST, false) else { return };
        let mut command = place.namespace.command(BINARY);
        command.args(["--socket-path", arg(&place.socket()), "--tap", TAP, "--coalesce", choice]);
        let datagrams = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        refuse_ioctl_bits_to(&mut command, libc::TUNSETOFFLOAD as u32, datagrams, libc::EINVAL);
        let mut backend = Spawned::run(&mut command);
        let line = backend.wait_line("Only TCP frames are coalesced");
        assert!(line.contains(&format!("{level}: Only TCP")), "{choice}: {line}");
    }
}
