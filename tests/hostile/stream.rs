//! The stream of messages: unfinished, slow, random.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::bench::{Bench, RING_SIZE};
use crate::common::frontend::{Answer, Event, RawFrontend, has_own_reply};
use crate::common::message::{Message, VringAddr, request};
use crate::common::{PATIENCE, QUIET, fd_of, say, times};

/// U-01
#[test]
fn header_that_is_never_finished_closes_the_connection_after_a_while() {
    let header = Message::get_features().to_bytes();
    let mut benches: Vec<_> = (1..header.len()).map(|_| Bench::running(1)).collect();
    let began = Instant::now();
    for (bench, len) in benches.iter().zip(1..) {
        bench.front_end.send_bytes(&header[..len], &[]).unwrap();
    }

    assert!(!benches[0].front_end.wait_closed(Duration::from_secs(3)), "It is given some seconds");
    benches.iter_mut().for_each(Bench::assert_frames_pass);
    for (bench, len) in benches.iter().zip(1..) {
        assert!(bench.front_end.wait_closed(Duration::from_secs(6)), "{len} bytes");
    }

    assert!(began.elapsed() >= Duration::from_secs(4), "{:?}", began.elapsed());
    for mut bench in benches {
        bench.front_end = RawFrontend::connect(bench.backend.socket()).unwrap();
        bench.start_over();
        bench.assert_frames_pass();
    }
}

/// Sends a message byte by byte, its descriptors with the first.
fn send_slowly(front_end: &RawFrontend, message: &Message<'_>) {
    let pause = Duration::from_millis(times(1, 50).into());
    for (at, byte) in message.to_bytes().into_iter().enumerate() {
        front_end.send_bytes(&[byte], if at == 0 { &message.fds } else { &[] }).unwrap();
        thread::sleep(pause);
    }
}

/// U-03. One byte each 50 ms where all is done in full, each millisecond where not.
#[test]
fn session_that_comes_byte_by_byte_is_served_and_frames_pass_meanwhile() {
    let mut bench = Bench::connected(1);
    bench.negotiate();
    let guest = &bench.guest;
    send_slowly(&bench.front_end, &Message::set_mem_table(&guest.mem));
    for (index, ring) in (0..).zip(guest.session().rings) {
        for message in [
            Message::set_vring_num(index, ring.size.into()),
            Message::set_vring_base(index, 0),
            Message::set_vring_addr(index, ring),
            Message::set_vring_call(index.into(), fd_of(&ring.call)),
            Message::set_vring_kick(index.into(), fd_of(&ring.kick)),
            Message::set_vring_enable(index, 1),
        ] {
            send_slowly(&bench.front_end, &message);
        }
    }
    bench.assert_frames_pass();
    for byte in Message::get_features().to_bytes() {
        bench.front_end.send_bytes(&[byte], &[]).unwrap();
        bench.assert_frames_pass();
    }
    assert!(matches!(bench.front_end.receive(PATIENCE), Event::Reply(reply) if reply.request == request::GET_FEATURES));
}

/// P-20: whatever a message was answered with, no lock is held and no state is in between.
#[test]
fn good_question_after_any_bad_message_is_answered_at_once() {
    let mut longest = Duration::ZERO;
    let mut bench = Bench::running(1);
    for request in 0..50 {
        for len in [0, 1, 7, 8, 12, 40, 200] {
            for fill in [0xff, 0x80, 6] {
                let message = Message::new(request, vec![fill; len]);
                bench.front_end.send(&message).unwrap();
                if has_own_reply(request) {
                    // It may have been refused without one, as nobody asked for that.
                    bench.front_end.send(&Message::set_owner().with_need_reply()).unwrap();
                    while let Event::Reply(reply) = bench.front_end.receive(PATIENCE)
                        && reply.request != request::SET_OWNER
                    {}
                }
                let began = Instant::now();
                assert!(bench.front_end.is_alive(), "after request {request} with {len} bytes of {fill:#x}");
                longest = longest.max(began.elapsed());
            }
        }
    }
    say(&format!("The longest wait for an answer: {longest:?}"));
    // SEND_RARP is right with any eight bytes.
    while bench.backend.taps[0].recv(Duration::ZERO).is_some() {}
    bench.start_over();
    bench.assert_frames_pass();
}

/// R-ZERO
#[test]
fn reply_has_no_bytes_but_those_that_mean_something() {
    let bench = Bench::negotiated(1);
    for (offset, size) in [(0, 6), (6, 2), (0, 24)] {
        let mut question = Message::get_config(offset, size);
        question.body[12..].fill(0xa5);
        let reply = bench.front_end.get(&question).unwrap();
        assert_eq!(reply.body[..12], [offset, size, 0].map(u32::to_ne_bytes).concat());
        let known = bench.front_end.get_config(offset, size).unwrap();
        assert_eq!(reply.body[12..], known, "Nothing of the question's room comes back");
    }
    for index in [0, 5, 77, u32::MAX] {
        let mut question = Message::get_vring_base(index);
        question.body[4..].fill(0xa5);
        assert_eq!(bench.front_end.get(&question).unwrap().vring_state(), (index, 0));
    }
}

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % u64::from(end)) as u32
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u32) as usize]
    }
}

/// What a ring is to a front-end that knows the protocol.
#[derive(Clone, Copy, Default)]
struct RingModel {
    size: Option<u16>,
    addressed: bool,
    kick: bool,
    started: bool,
    /// Disabled while it was started and enabled: described anew, it stops by itself.
    disabled: bool,
    enabled: bool,
    base: u16,
}

impl RingModel {
    /// A message that describes it: refused while it runs.
    fn describe(&mut self) -> bool {
        if self.disabled {
            self.stop();
        }
        !self.started
    }

    /// Complete, and not enabled yet.
    fn is_waiting(&self) -> bool {
        self.started && !self.enabled && !self.disabled
    }

    fn start_if_complete(&mut self) {
        if self.size.is_some() && self.addressed && self.kick && !self.started {
            (self.started, self.kick) = (true, false);
        }
    }

    fn stop(&mut self) {
        if self.started {
            // The rings of this test stay empty, so each stands where it began.
            self.base = 0;
        }
        (self.started, self.disabled, self.kick) = (false, false, false);
    }

    fn enable(&mut self, on: bool) {
        self.disabled = !on && self.started && (self.enabled || self.disabled);
        self.enabled = on;
    }
}

/// U-13
#[test]
fn random_messages_are_answered_as_a_model_of_the_protocol_says() {
    const RINGS: u32 = 2;
    for seed in 1..=u64::from(times(4, 40)) {
        let mut bench = Bench::negotiated(1);
        let mut model = [RingModel::default(); RINGS as usize];
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (seed << 17));
        for step in 0..10_000 {
            let index = random.below(RINGS);
            let ring = &mut model[index as usize];
            let session = bench.guest.session();
            let kick = fd_of(&session.rings[index as usize].kick);
            let addr = VringAddr::of(session.rings[index as usize]);
            let kind = random.below(12);
            let (message, accepted) = match kind {
                0 => {
                    let size = random.one_of(&[0, 3, 128, u32::from(RING_SIZE), u32::from(RING_SIZE), 70_000]);
                    let possible = size == 128 || size == u32::from(RING_SIZE);
                    let accepted = possible && ring.describe();
                    if accepted {
                        ring.size = Some(size as u16);
                        ring.start_if_complete();
                    }
                    (Message::set_vring_num(index, size), accepted)
                }
                1 => {
                    let base = random.one_of(&[0, 7, 0xffff, 0x1_0000]);
                    let accepted = base < 0x1_0000 && (ring.is_waiting() || ring.describe());
                    // One that is complete carries on where it is.
                    if accepted && !ring.started {
                        ring.base = base as u16;
                    }
                    (Message::set_vring_base(index, base), accepted)
                }
                2 | 3 => {
                    let wrong = random.below(3) == 0;
                    let message = if wrong { VringAddr { desc: addr.desc + 1, ..addr } } else { addr };
                    // The same again is taken on a running ring, and changes nothing.
                    let accepted = !wrong;
                    if ring.started {
                        // Said to a ring that runs it is compared, and no more.
                    } else if ring.describe() && accepted {
                        ring.addressed = true;
                        ring.start_if_complete();
                    }
                    (Message::set_vring_addr_raw(index, &message), accepted)
                }
                4 | 5 => {
                    if !ring.started {
                        ring.kick = true;
                        ring.start_if_complete();
                    }
                    (Message::set_vring_kick(index.into(), kick), true)
                }
                6 => (Message::set_vring_call(index.into(), fd_of(&session.rings[index as usize].call)), true),
                7 => {
                    let enable = random.below(3);
                    if enable < 2 {
                        ring.enable(enable == 1);
                    }
                    (Message::set_vring_enable(index, enable), enable < 2)
                }
                8 => {
                    ring.stop();
                    let base = bench.front_end.get_vring_base(index);
                    assert_eq!(base, Ok(ring.base.into()), "seed {seed}, step {step}: ring {index}");
                    continue;
                }
                9 if random.below(20) == 0 => {
                    for ring in &mut model {
                        ring.stop();
                        *ring = RingModel { base: ring.base, ..RingModel::default() };
                    }
                    assert_eq!(bench.ask(Message::reset_device()), Answer::Ack, "seed {seed}, step {step}");
                    (Message::set_features(crate::common::bench::BASE), true)
                }
                10 => (Message::set_owner(), true),
                _ => (Message::set_features(u64::MAX), false),
            };
            let wanted = if accepted { Answer::Ack } else { Answer::Nack(1) };
            assert_eq!(bench.front_end.ask(message), wanted, "seed {seed}, step {step}: kind {kind}, ring {index}");
        }
        assert!(!bench.front_end.wait_closed(Duration::ZERO));
        bench.start_over();
        bench.assert_frames_pass();
        assert!(bench.backend.taps[0].recv(QUIET).is_none());
    }
}
