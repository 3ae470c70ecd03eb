//! A broken or hostile front-end: what it does to the stream of messages itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::common::bench::Bench;
use crate::common::frontend::{Answer, Event, MAX_FDS, RawFrontend, has_own_reply};
use crate::common::memory::memfd;
use crate::common::message::{Message, flag, request};
use crate::common::{PATIENCE, fd_of, say, wait_readable};

/// One more than any request number that is known.
const REQUESTS_END: u32 = 46;
/// The largest payload that the back-end takes.
const PAYLOAD_MAX: u32 = 4096;

/// Waits until the other end has read all that was sent.
fn wait_all_read(front_end: &RawFrontend) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut unread: libc::c_int = 0;
        // SAFETY: TIOCOUTQ writes one int, which outlives the call.
        let asked = unsafe { libc::ioctl(front_end.stream().as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
        assert_eq!(asked, 0, "{}", io::Error::last_os_error());
        if unread == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "The back-end does not read");
        std::thread::yield_now();
    }
}

/// U-02
#[test]
fn message_that_comes_in_pieces_is_one_message() {
    let bench = Bench::negotiated(1);
    let mut whole = Message::set_vring_num(0, 256).with_need_reply().to_bytes();
    whole.extend(Message::get_features().to_bytes());
    for piece in [1, 5, 11, 12, 13] {
        for bytes in whole.chunks(piece) {
            bench.front_end.send_bytes(bytes, &[]).unwrap();
            wait_all_read(&bench.front_end);
        }
        for wanted in [request::SET_VRING_NUM, request::GET_FEATURES] {
            let Event::Reply(reply) = bench.front_end.receive(PATIENCE) else { panic!("No reply, {piece} at a time") };
            assert_eq!(reply.request, wanted, "{piece} at a time");
        }
    }
}

/// U-02, with a descriptor: it comes with the first byte.
#[test]
fn descriptor_of_a_message_in_pieces_is_kept_until_it_is_whole() {
    let mut bench = Bench::connected(1);
    bench.negotiate();
    let table = Message::set_mem_table(&bench.guest.mem).with_need_reply();
    let bytes = table.to_bytes();
    bench.front_end.send_bytes(&bytes[..12], &table.fds).unwrap();
    wait_all_read(&bench.front_end);
    bench.front_end.send_bytes(&bytes[12..], &[]).unwrap();

    let Event::Reply(reply) = bench.front_end.receive(PATIENCE) else { panic!("No answer") };

    assert_eq!(reply.u64(), 0);
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-04, U-06: the stream cannot be trusted after these.
#[test]
fn header_that_no_front_end_sends_closes_the_connection() {
    let sized = |size| Message::get_features().with_size(size);
    let flagged = |flags| Message::get_features().with_flags(flags);
    let cases = [
        ("U-04 size 0xffffffff", sized(u32::MAX)),
        ("U-04 size just above the largest", sized(PAYLOAD_MAX + 1)),
        ("U-04 size with the top bit", sized(1 << 31)),
        ("U-06 version 0", flagged(0)),
        ("U-06 version 2", flagged(2)),
        ("U-06 version 3", flagged(3)),
        ("U-06 reply bit", flagged(flag::VERSION | flag::REPLY)),
        ("U-06 unknown flag", flagged(flag::VERSION | 1 << 4)),
        ("U-06 highest flag", flagged(flag::VERSION | 1 << 31)),
    ];
    let mut bench = Bench::running(1);
    for (name, message) in cases {
        bench.front_end.send(&message).unwrap();

        assert!(bench.front_end.wait_closed(PATIENCE), "{name}");

        bench.front_end = RawFrontend::connect(bench.backend.socket()).unwrap();
        bench.start_over();
        bench.assert_frames_pass();
    }
}

/// U-04: one of the largest size is taken. It is refused, since the stream stays in step.
#[test]
fn payload_of_the_largest_size_is_read_and_refused() {
    let mut bench = Bench::running(1);
    let message = Message::set_features(0).with_body(vec![0; PAYLOAD_MAX as usize]);
    assert_eq!(bench.ask(message), Answer::Nack(1));
    bench.assert_frames_pass();
}

/// U-05. Where a request has no payload, surplus bytes carry no meaning and are taken: some front-ends send room for
/// more than there is. The memory table is one of those.
#[test]
fn payload_one_byte_too_short_or_too_long_is_refused() {
    let mut bench = Bench::running(1);
    let fixed = [
        Message::set_features(0),
        Message::set_protocol_features(0),
        Message::set_vring_num(0, 256),
        Message::set_vring_base(0, 0),
        Message::set_vring_enable(0, 1),
        Message::set_vring_addr_raw(0, &bench.ring_addr(0)),
        Message::u64(request::SET_VRING_KICK, 0x100),
        Message::u64(request::SET_VRING_CALL, 0x100),
        Message::u64(request::SET_VRING_ERR, 0x100),
        Message::add_mem_reg_claiming(&bench.guest.mem.regions()[0].info),
        Message::rem_mem_reg(&bench.guest.mem.regions()[0].info),
        Message::set_mtu(1500),
        Message::send_rarp([2; 6]),
        Message::set_status(0),
    ];
    for message in fixed {
        let (request, len) = (message.request, message.body.len());
        for wrong in [0, 1, len - 1, len + 1, len + 8] {
            let mut body = message.body.clone();
            body.resize(wrong, 0);
            let answer = bench.front_end.ask(message.clone().with_body(body));
            assert_eq!(answer, Answer::Nack(1), "request {request} with {wrong} bytes");
        }
    }
    for len in [0, 7, 8 + 31] {
        let mut table = Message::set_mem_table(&bench.guest.mem);
        table.body.truncate(len);
        table.size = len as u32;
        assert_eq!(bench.front_end.ask(table), Answer::Nack(1), "memory table of {len} bytes");
    }
    bench.assert_frames_pass();
}

/// U-05: these two answer a refusal in their own way, since the front-end waits for their reply.
#[test]
fn question_of_the_wrong_length_has_an_answer_all_the_same() {
    let mut bench = Bench::running(1);
    for len in [0, 1, 11] {
        let reply = bench.front_end.get(&Message::new(request::GET_CONFIG, vec![0; len])).unwrap();
        assert!(reply.body.is_empty(), "GET_CONFIG with {len} bytes: {:?}", reply.body);
    }
    for len in [4, 7, 9] {
        let reply = bench.front_end.get(&Message::new(request::GET_VRING_BASE, vec![0; len])).unwrap();
        assert_eq!(reply.vring_state(), (0, 0), "GET_VRING_BASE with {len} bytes");
    }
    bench.assert_frames_pass();
}

/// U-07, U-46, U-47, D-01, D-02, D-03, D-04. Every request that this card does not have, too.
#[test]
fn unknown_request_is_refused_and_the_session_goes_on() {
    let mut bench = Bench::running(1);
    let absent = [
        request::SET_LOG_FD,
        request::SET_BACKEND_REQ_FD,
        request::IOTLB_MSG,
        request::SET_VRING_ENDIAN,
        request::SET_CONFIG,
        request::POSTCOPY_ADVISE,
        request::POSTCOPY_LISTEN,
        request::POSTCOPY_END,
        request::GET_INFLIGHT_FD,
        request::SET_INFLIGHT_FD,
        request::SET_DEVICE_STATE_FD,
        request::CHECK_DEVICE_STATE,
        26,
        35,
        41,
    ];
    for request in absent.into_iter().chain([0, REQUESTS_END + 100, 99, 0x1_0001, u32::MAX]) {
        for len in [0, 8, 40, 256] {
            let message = Message::new(request, vec![0xff; len]);
            // Without a wish for an answer there is none; the answer to the next one shows it.
            assert!(bench.front_end.tell(&message));
            assert_eq!(bench.front_end.ask(message), Answer::Nack(1), "request {request}");
        }
    }
    bench.assert_frames_pass();
}

/// U-08
#[test]
fn question_that_asks_for_an_acknowledgement_too_is_answered_once() {
    let bench = Bench::negotiated(1);
    let questions = [
        Message::get_features(),
        Message::get_protocol_features(),
        Message::get_queue_num(),
        Message::get_max_mem_slots(),
        Message::get_status(),
        Message::get_vring_base(0),
        Message::get_config(0, 6),
        Message::get_config(0, 0),
        Message::get_vring_base(0xffff),
    ];
    for question in questions {
        assert!(has_own_reply(question.request));
        bench.front_end.send(&question.clone().with_need_reply()).unwrap();
        // Had the question two answers, the second would come before this one's.
        bench.front_end.send(&Message::set_owner().with_need_reply()).unwrap();

        let replies = [(); 2].map(|()| bench.front_end.receive(PATIENCE));

        let [Event::Reply(first), Event::Reply(second)] = replies else { panic!("{replies:?}") };
        assert_eq!([first.request, second.request], [question.request, request::SET_OWNER]);
    }
}

/// Closed when every descriptor for the other end is.
fn wait_hung_up(end: impl AsFd) -> bool {
    // A pipe's reader is readable, with nothing to read, once there is no writer.
    wait_readable(end, PATIENCE)
}

/// U-16
#[test]
fn surplus_descriptors_are_closed_and_their_message_refused() {
    let bench = Bench::running(1);
    for surplus in [1, 8, 31] {
        for request in 0..REQUESTS_END {
            let (reader, writer) = io::pipe().unwrap();
            // Kick, call and err take one; a memory table as many as it has regions; others none.
            let fds = vec![writer.as_fd(); surplus + 1];
            let message = Message::new(request, vec![0; 8]).with_fds(fds);
            let question = message.with_need_reply();
            bench.front_end.send(&question).unwrap();
            drop(writer);

            let Event::Reply(reply) = bench.front_end.receive(PATIENCE) else { panic!("No answer to {request}") };

            assert_eq!(reply.request, request);
            if !has_own_reply(request) {
                assert_eq!(reply.u64(), 1, "request {request} with {surplus} surplus descriptors");
            }
            assert!(wait_hung_up(&reader), "request {request}: its descriptors are open still");
        }
    }
}

/// U-17. 32 descriptors are taken, and refused by what the message means; more are lost on the way.
#[test]
fn more_descriptors_than_any_message_has_close_the_connection_and_are_closed() {
    let mut bench = Bench::running(1);
    for count in [33, 64, MAX_FDS] {
        let (reader, writer) = io::pipe().unwrap();
        let fds: Vec<BorrowedFd<'_>> = vec![writer.as_fd(); count];
        bench.front_end.send(&Message::get_features().with_fds(fds)).unwrap();
        drop(writer);

        assert!(bench.front_end.wait_closed(PATIENCE), "{count} descriptors");

        assert!(wait_hung_up(&reader), "{count} descriptors are open still");
        bench.front_end = RawFrontend::connect(bench.backend.socket()).unwrap();
        bench.start_over();
        bench.assert_frames_pass();
    }
}

/// U-17, by pieces: descriptors pile up with every byte of a message that is not finished.
#[test]
fn descriptors_with_every_byte_of_a_message_close_the_connection() {
    let mut bench = Bench::running(1);
    let (reader, writer) = io::pipe().unwrap();
    let fds = vec![writer.as_fd(); 10];
    for byte in Message::get_features().to_bytes() {
        // The back-end may have closed it already.
        let _ = bench.front_end.send_bytes(&[byte], &fds);
    }
    drop(fds);
    drop(writer);

    assert!(bench.front_end.wait_closed(PATIENCE));

    assert!(wait_hung_up(&reader));
    bench.front_end = RawFrontend::connect(bench.backend.socket()).unwrap();
    bench.start_over();
    bench.assert_frames_pass();
}

/// U-57
#[test]
fn front_end_that_reads_no_replies_is_closed_after_a_while_and_frames_pass_meanwhile() {
    let mut bench = Bench::running(1);
    let began = Instant::now();
    bench.front_end.stream().set_nonblocking(true).unwrap();
    let question = Message::get_features().to_bytes();
    // Until the back-end has stopped reading, which it must while its replies are not read.
    let mut sent = 0_usize;
    while bench.front_end.send_bytes(&question, &[]).is_ok() || !is_stuck(&bench.front_end) {
        sent += 1;
        assert!(sent < 1 << 20, "The back-end takes questions without end");
    }

    // Its rings stop with it, so frames are tried well before the end of its time only; the first at once, as that time has
    // just begun, however long it took until here.
    bench.assert_frames_pass();
    while began.elapsed() < Duration::from_secs(3) {
        bench.assert_frames_pass();
    }
    let hung_up = crate::common::wait_for(&bench.front_end, PollFlags::RDHUP, Duration::from_secs(10));

    assert!(hung_up, "The front-end is served for ever");
    assert!(began.elapsed() >= Duration::from_secs(4), "It is given some seconds to read");
    bench.front_end = RawFrontend::connect(bench.backend.socket()).unwrap();
    bench.start_over();
    bench.assert_frames_pass();
}

/// Whether the socket takes nothing, and goes on taking nothing for a while.
fn is_stuck(front_end: &RawFrontend) -> bool {
    !crate::common::wait_for(front_end, PollFlags::OUT, crate::common::QUIET)
}

/// U-58
#[test]
fn connection_that_ends_within_any_message_leaves_the_next_one_served() {
    let mut bench = Bench::running(1);
    let file = memfd(4096);
    let info = bench.guest.mem.regions()[0].info;
    let addr = bench.ring_addr(0);
    let kick = bench.guest.pairs[0].rx.kick.try_clone().unwrap();
    let messages = [
        Message::get_features(),
        Message::set_features(0),
        Message::set_vring_num(0, 256),
        Message::set_vring_addr_raw(0, &addr),
        Message::set_vring_kick(0, fd_of(&kick)),
        Message::set_mem_table_claiming(&[info]).with_fd(file.as_fd()),
        Message::get_config(0, 12),
    ];
    let mut longest = Duration::ZERO;
    for message in messages {
        for cut in 1..message.to_bytes().len() {
            bench.front_end.stream().shutdown(std::net::Shutdown::Both).unwrap();
            bench.front_end = RawFrontend::connect(bench.backend.socket()).unwrap();
            let began = Instant::now();
            bench.front_end.send_bytes(&message.to_bytes()[..cut], &message.fds).unwrap();
            bench.reconnect();
            longest = longest.max(began.elapsed());
        }
    }
    say(&format!("The longest wait for the next session: {longest:?}"));
    bench.start_over();
    bench.assert_frames_pass();
}
