//! A broken or hostile front-end: features, owners, and messages of features that were not negotiated.

use crate::common::bench::{BASE, Bench, Guest};
use crate::common::frontend::{Answer, RawFrontend};
use crate::common::message::{Message, request};
use crate::common::virtio::{feature, protocol};
use crate::common::{PATIENCE, fd_of};

/// U-09, C-08
#[test]
fn features_that_were_not_offered_are_refused_and_the_old_ones_stay() {
    let mut bench = Bench::running(1);
    let offered = bench.front_end.get_u64(&Message::get_features()).unwrap();
    for bit in (0..64).map(|bit| 1_u64 << bit).filter(|bit| offered & bit == 0) {
        assert_eq!(bench.ask(Message::set_features(BASE | bit)), Answer::Nack(1), "{bit:#x}");
    }
    assert_eq!(bench.ask(Message::set_features(u64::MAX)), Answer::Nack(1));
    bench.assert_frames_pass();

    // The same before any ring runs.
    let mut bench = Bench::negotiated(1);
    assert_eq!(bench.ask(Message::set_features(u64::MAX)), Answer::Nack(1));
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-10
#[test]
fn protocol_features_that_were_not_offered_are_refused_and_the_old_ones_stay() {
    let mut bench = Bench::running(1);
    let offered = bench.front_end.get_u64(&Message::get_protocol_features()).unwrap();
    for bits in [u64::MAX, offered | protocol::INFLIGHT_SHMFD, offered | 1 << 63] {
        assert_eq!(bench.ask(Message::set_protocol_features(bits)), Answer::Nack(1), "{bits:#x}");
    }
    assert_eq!(bench.front_end.get_u64(&Message::get_queue_num()), Ok(3), "MQ stays negotiated");
    bench.assert_frames_pass();
}

/// U-11, U-43. LOG_ALL would be welcome on running rings; it is not offered, so it is refused as any other.
#[test]
fn features_that_change_while_rings_run_are_refused() {
    let mut bench = Bench::running(1);
    assert_eq!(bench.ask(Message::set_features(BASE)), Answer::Ack, "The same again changes nothing");
    for bits in [BASE | feature::MRG_RXBUF, feature::PROTOCOL_FEATURES, 0, BASE | feature::LOG_ALL] {
        assert_eq!(bench.ask(Message::set_features(bits)), Answer::Nack(1), "{bits:#x}");
        bench.assert_frames_pass();
    }
    bench.front_end.stop_like_qemu(2).unwrap();
    assert_eq!(bench.ask(Message::set_features(BASE | feature::MRG_RXBUF)), Answer::Ack, "With all rings stopped");
}

/// U-11
#[test]
fn legacy_features_that_are_refused_while_rings_run_keep_no_ring_from_starting_again() {
    let mut bench = Bench::running(1);
    assert_eq!(bench.ask(Message::set_features(feature::PROTOCOL_FEATURES | feature::CSUM)), Answer::Nack(1));
    bench.assert_frames_pass();
    assert!(bench.front_end.get_vring_base(1).is_ok());

    bench.start_ring(1);

    bench.assert_frames_pass();
}

/// U-12, U-46, U-47, D-01, D-02, D-03, D-04
#[test]
fn messages_of_a_protocol_feature_that_was_not_negotiated_are_refused() {
    let mut bench = Bench::connected(1);
    assert!(bench.front_end.tell(&Message::set_protocol_features(protocol::REPLY_ACK)));
    let pipe = std::io::pipe().unwrap();
    let end = std::os::fd::AsFd::as_fd(&pipe.1);
    let messages = [
        Message::add_mem_reg(&bench.guest.mem.regions()[0]),
        Message::rem_mem_reg(&bench.guest.mem.regions()[0].info),
        Message::send_rarp([2; 6]),
        Message::set_mtu(1500),
        Message::set_status(1),
        Message::reset_device(),
        Message::set_config(0, 0, &[0; 6]),
        Message::set_log_base(4096, 0, end),
        Message::new(request::GET_INFLIGHT_FD, vec![0; 24]),
        Message::new(request::SET_INFLIGHT_FD, vec![0; 24]).with_fd(end),
        Message::set_backend_req_fd(end),
        Message::set_device_state_fd(0, end),
        Message::check_device_state(),
    ];
    for message in messages {
        let request = message.request;
        assert_eq!(bench.front_end.ask(message), Answer::Nack(1), "request {request}");
    }
    assert_eq!(bench.front_end.get_config(0, 6), Ok(Vec::new()));
    assert_eq!(bench.ask(Message::set_features(BASE)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-12: an answer is something to negotiate too.
#[test]
fn without_reply_ack_nothing_is_acknowledged() {
    let bench = Bench::connected(1);
    for message in [Message::set_owner(), Message::set_owner(), Message::set_vring_num(0, 0), Message::new(99, vec![])]
    {
        bench.front_end.send(&message.with_need_reply()).unwrap();
    }
    // The first reply is this one's.
    assert!(bench.front_end.is_alive());
}

/// U-14. libkrun says it at every activation of the device.
#[test]
fn second_owner_of_a_session_is_the_first_and_the_next_session_has_its_own() {
    let mut bench = Bench::running(1);
    for _ in 0..3 {
        assert_eq!(bench.ask(Message::set_owner()), Answer::Ack);
        bench.assert_frames_pass();
    }

    // A second connection's owner does not come to be heard.
    let second = RawFrontend::connect(bench.backend.socket()).unwrap();
    second.tell(&Message::set_owner());
    assert!(second.wait_closed(PATIENCE));
    bench.assert_frames_pass();

    bench.start_over();
    bench.assert_frames_pass();
}

/// U-13, N-04, small: every order of the messages that set a ring up ends in a ring that runs.
#[test]
fn ring_that_is_described_in_any_order_runs() {
    let count = 5;
    for order in permutations(count) {
        let mut bench = Bench::negotiated(1);
        for index in 0..2 {
            let session = bench.guest.session();
            let ring = session.rings[index as usize];
            for step in &order {
                let message = match step {
                    0 => Message::set_vring_num(index, u32::from(ring.size)),
                    1 => Message::set_vring_addr(index, ring),
                    2 => Message::set_vring_kick(u64::from(index), fd_of(&ring.kick)),
                    3 => Message::set_vring_call(u64::from(index), fd_of(&ring.call)),
                    _ => Message::set_vring_enable(index, 1),
                };
                assert_eq!(bench.ask(message), Answer::Ack, "step {step} of {order:?}");
            }
        }
        bench.assert_frames_pass();
    }
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    (0..count).fold(vec![Vec::new()], |shorter, next| {
        let insert = |order: &Vec<usize>| {
            let with = |at| {
                let mut longer = order.clone();
                longer.insert(at, next);
                longer
            };
            (0..=order.len()).map(with).collect::<Vec<_>>()
        };
        shorter.iter().flat_map(insert).collect()
    })
}

/// U-60: a reset before anything else was said.
#[test]
fn reset_of_a_fresh_session_is_harmless() {
    let mut bench = Bench::connected(1);
    let offered = bench.front_end.get_u64(&Message::get_protocol_features()).unwrap();
    assert!(bench.front_end.tell(&Message::set_protocol_features(offered)));
    assert_eq!(bench.ask(Message::reset_device()), Answer::Ack);
    assert_eq!(bench.ask(Message::set_status(0)), Answer::Ack);
    bench.guest = Guest::new(1, 0);
    bench.start();
    bench.assert_frames_pass();
}
