//! A broken or hostile front-end: what it hands over as kick, call and error descriptors.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::common::bench::Bench;
use crate::common::frontend::Answer;
use crate::common::memory::memfd;
use crate::common::message::{Message, NO_FD, request};
use crate::common::{QUIET, fd_of};

const FD_REQUESTS: [u32; 3] = [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR];

fn stream_pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

/// U-15, U-49
#[test]
fn descriptor_and_its_flag_must_agree() {
    let mut bench = Bench::running(1);
    let eventfd = EventFd::new(0).unwrap();
    for request in FD_REQUESTS {
        let cases = [
            ("flag and descriptor", Message::u64(request, NO_FD).with_fd(fd_of(&eventfd))),
            ("neither", Message::u64(request, 0)),
            ("two descriptors", Message::u64(request, 0).with_fds([fd_of(&eventfd), fd_of(&eventfd)])),
            ("unknown flag", Message::u64(request, 0x200).with_fd(fd_of(&eventfd))),
        ];
        for (name, message) in cases {
            assert_eq!(bench.front_end.ask(message), Answer::Nack(1), "request {request}: {name}");
        }
    }
    bench.assert_frames_pass();
}

/// U-48: what is plainly no notification is refused.
#[test]
fn file_or_directory_as_a_notification_is_refused() {
    let mut bench = Bench::running(1);
    let cases: [(&str, OwnedFd); 3] = [
        ("memfd", memfd(4096).into()),
        ("regular file", tempfile::tempfile().unwrap().into()),
        ("directory", File::open("/").unwrap().into()),
    ];
    for (name, fd) in cases {
        for request in FD_REQUESTS {
            let message = Message::u64(request, 1).with_fd(fd.as_fd());
            assert_eq!(bench.front_end.ask(message), Answer::Nack(1), "request {request}: {name}");
            bench.assert_frames_pass();
        }
    }
}

/// U-48: the rest is judged by what it does. Whatever it is, the control plane answers, the other ring runs, and the
/// ring itself does as soon as it has a proper kick.
#[test]
fn odd_kick_descriptor_stops_nothing_but_its_ring() {
    let (pipe_reader, mut pipe_writer) = io::pipe().unwrap();
    pipe_writer.write_all(&[1; 5]).unwrap();
    let (dead_reader, _) = io::pipe().unwrap();
    let (_reader, writing_end) = io::pipe().unwrap();
    let (socket, other_end) = stream_pair();
    let (dead_socket, _) = stream_pair();
    rustix::io::write(&other_end, b"kick").unwrap();
    let timer = TimerFd::new().unwrap();
    let empty_epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let ready_epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let data = epoll::EventData::new_u64(0);
    epoll::add(&ready_epoll, &socket, data, epoll::EventFlags::IN).unwrap();
    let cases: [(&str, OwnedFd); 10] = [
        ("pipe with something in it", pipe_reader.into()),
        ("pipe without a writer", dead_reader.into()),
        ("the writing end of a pipe", writing_end.into()),
        ("socket with something in it", socket.try_clone().unwrap()),
        ("socket without a peer", dead_socket),
        ("timer", borrowed(&timer).try_clone_to_owned().unwrap()),
        ("epoll without anything", empty_epoll),
        ("epoll that is ready", ready_epoll),
        ("character device", File::open("/dev/null").unwrap().into()),
        ("process", pidfd_of_this_process()),
    ];
    for (name, fd) in cases {
        let mut bench = Bench::running(1);
        bench.assert_frames_pass();
        // Taken or refused: both will do.
        let answer = bench.ask(Message::set_vring_kick(1, fd.as_fd()));
        assert!(matches!(answer, Answer::Ack | Answer::Nack(1)), "{name}: {answer:?}");

        bench.guest.assert_rx(0, &bench.backend.taps[0]);
        assert_does_not_spin(&bench, name);
        assert!(bench.front_end.get_vring_base(1).is_ok(), "{name}");

        bench.start_ring(1);
        bench.assert_frames_pass();
    }
}

/// U-48: with a proper kick the ring runs, and its call and error descriptors are those that it had.
#[test]
fn ring_whose_kick_cannot_be_waited_for_keeps_its_other_descriptors() {
    let mut bench = Bench::running(1);
    bench.assert_frames_pass();
    let tx = &mut bench.guest.pairs[0].tx;
    let (kick, err) = (tx.kick.try_clone().unwrap(), tx.err.try_clone().unwrap());
    assert_eq!(bench.front_end.ask(Message::set_vring_err(1, fd_of(&err))), Answer::Ack);
    assert!(bench.front_end.get_vring_base(1).is_ok());
    tx.take_calls();
    let epolls = epolls_within_epolls();

    let answer = bench.front_end.ask(Message::set_vring_kick(1, epolls.last().unwrap().as_fd()));

    assert_eq!(answer, Answer::Nack(1));
    assert_eq!(bench.front_end.ask(Message::set_vring_kick(1, fd_of(&kick))), Answer::Ack);
    assert_eq!(tx.take_calls(), 1, "a ring that starts calls");
    bench.assert_frames_pass();
    let tx = &bench.guest.pairs[0].tx;
    tx.write_avail_idx(tx.used_idx().wrapping_add(tx.size + 1));
    tx.kick();
    bench.backend.wait_counter(0, "broken_rings", 1);
    assert_eq!(err.read().unwrap(), 1);
}

/// As deep as they may be: the last one cannot be added to another.
fn epolls_within_epolls() -> Vec<OwnedFd> {
    let fresh = || epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let mut chain = vec![fresh()];
    loop {
        let outer = fresh();
        let data = epoll::EventData::new_u64(0);
        if epoll::add(&outer, chain.last().unwrap(), data, epoll::EventFlags::IN).is_err() {
            return chain;
        }
        chain.push(outer);
    }
}

fn borrowed(timer: &TimerFd) -> BorrowedFd<'_> {
    // SAFETY: `timer` owns its descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) }
}

fn pidfd_of_this_process() -> OwnedFd {
    // SAFETY: pidfd_open takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for us alone.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Wake-ups by kicks are counted.
fn assert_does_not_spin(bench: &Bench, name: &str) {
    let before = bench.backend.counter(0, "tx_kicks");
    assert!(bench.backend.taps[0].recv(QUIET).is_none());
    let woken = bench.backend.counter(0, "tx_kicks") - before;
    // A kick that is not there any more may have been one.
    assert!(woken < 20, "{name}: {woken} wake-ups in {QUIET:?}");
}

/// U-51
#[test]
fn kick_that_was_replaced_while_it_was_signalled_wakes_nobody() {
    let mut bench = Bench::running(1);
    for _ in 0..5 {
        let fresh = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let old = std::mem::replace(&mut bench.guest.pairs[0].tx.kick, fresh);
        old.write(1).unwrap();
        let kick = bench.guest.pairs[0].tx.kick.try_clone().unwrap();
        assert_eq!(bench.ask(Message::set_vring_kick(1, fd_of(&kick))), Answer::Ack);
        // The first signal may have been taken before the descriptor was replaced.
        let _ = old.read();
        old.write(1).unwrap();

        assert_does_not_spin(&bench, "the old kick");

        assert_eq!(old.read().unwrap(), 1, "Nobody reads the old kick any more");
        bench.assert_frames_pass();
    }
}

/// U-52
#[test]
fn kick_that_somebody_else_takes_is_no_fault() {
    let mut bench = Bench::running(1);
    for _ in 0..2000 {
        let kick = &bench.guest.pairs[0].tx.kick;
        kick.write(1).unwrap();
        // Either of us may be first.
        let _ = kick.read();
    }
    bench.assert_frames_pass();
    assert_eq!(bench.backend.counter(0, "broken_rings"), 0);
}

/// U-48: nobody knows what a device does with what is written to it.
#[test]
fn device_as_call_descriptor_is_refused() {
    let mut bench = Bench::running(1);
    let device = File::options().write(true).open("/dev/null").unwrap();
    assert_eq!(bench.ask(Message::set_vring_call(0, device.as_fd())), Answer::Nack(1));
    bench.assert_frames_pass();
}

/// U-53, U-54. A guest whose call cannot be made polls its rings, as the driver here does; the ring goes on.
#[test]
fn call_descriptor_that_takes_nothing_delays_nobody() {
    // Blocking, on purpose.
    let saturated = EventFd::new(0).unwrap();
    saturated.write(u64::MAX - 1).unwrap();
    let (reader, closed) = io::pipe().unwrap();
    drop(reader);
    let (_reader, full) = full_pipe();
    let (socket, _peer) = stream_pair();
    let (alone, _) = stream_pair();
    let (read_only, _writer) = io::pipe().unwrap();
    let cases: [(&str, OwnedFd); 6] = [
        ("U-53 saturated eventfd", fd_of(&saturated).try_clone_to_owned().unwrap()),
        ("U-54 pipe without a reader", closed.into()),
        ("U-54 full pipe", full),
        ("U-54 socket, which is User Mode Linux's pipe", socket),
        ("U-54 socket without a peer", alone),
        ("U-54 the reading end of a pipe", read_only.into()),
    ];
    for (name, fd) in cases {
        let mut bench = Bench::running(1);
        for index in 0..2 {
            assert_eq!(bench.ask(Message::set_vring_call(index, fd.as_fd())), Answer::Ack, "{name}");
        }
        for round in 1..=50 {
            bench.guest.pairs[0].send(&Default::default(), &[round as u8; 60]);
            assert!(bench.backend.taps[0].recv(crate::common::PATIENCE).is_some(), "{name}");
            bench.backend.wait_counter(0, "tx_frames", round);
        }
        assert!(bench.front_end.is_alive(), "{name}");
        for index in 0..2 {
            let call = bench.guest.session().rings[index as usize].call.try_clone().unwrap();
            assert_eq!(bench.ask(Message::set_vring_call(index, fd_of(&call))), Answer::Ack, "{name}");
        }
        bench.assert_frames_pass();
    }
}

/// libkrun waits for calls in a read of the eventfd that it handed over, and for a call that it does not take the read must wait.
#[test]
fn eventfd_that_its_front_end_reads_blocking_stays_blocking_and_is_signalled() {
    let mut bench = Bench::running(1);
    let call = EventFd::new(0).unwrap();
    let is_blocking = || !rustix::fs::fcntl_getfl(fd_of(&call)).unwrap().contains(rustix::fs::OFlags::NONBLOCK);
    for request in [request::SET_VRING_CALL, request::SET_VRING_ERR] {
        assert_eq!(bench.ask(Message::u64(request, 1).with_fd(fd_of(&call))), Answer::Ack);
        assert!(is_blocking(), "request {request}");
    }
    // A new call is signalled at once.
    assert_eq!(call.read().unwrap(), 1);
    for _ in 0..10 {
        bench.guest.pairs[0].send(&Default::default(), &[1; 60]);
        // Waits for it.
        assert_eq!(call.read().unwrap(), 1);
    }
    let tx = &bench.guest.pairs[0].tx;
    tx.write_avail_idx(0x4000);
    tx.kick();
    assert_eq!(call.read().unwrap(), 1, "the ring broke");
    assert!(is_blocking());
}

/// Both ends of a blocking pipe with no room left.
fn full_pipe() -> (io::PipeReader, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

/// User Mode Linux's call is a pipe: eight bytes for each call.
#[test]
fn call_through_a_pipe_is_eight_bytes() {
    let bench = Bench::running(1);
    let (mut reader, writer) = io::pipe().unwrap();
    assert_eq!(bench.ask(Message::set_vring_call(1, writer.as_fd())), Answer::Ack);

    let mut bench = bench;
    bench.guest.pairs[0].send(&Default::default(), &[1; 60]);

    let mut called = [0; 8];
    reader.read_exact(&mut called).unwrap();
    assert_eq!(u64::from_ne_bytes(called), 1);
}

/// U-54: the error descriptor too may be anything.
#[test]
fn dead_error_descriptor_does_not_matter_when_the_ring_breaks() {
    let mut bench = Bench::running(1);
    let (reader, closed) = io::pipe().unwrap();
    drop(reader);
    assert_eq!(bench.ask(Message::set_vring_err(1, closed.as_fd())), Answer::Ack);
    let tx = &bench.guest.pairs[0].tx;
    tx.write_avail_idx(0x4000);
    tx.kick();

    bench.backend.wait_counter(0, "broken_rings", 1);

    bench.guest.assert_rx(0, &bench.backend.taps[0]);
    bench.start_over();
    bench.assert_frames_pass();
}
