//! Rings that come back without being set up from the start: after their memory, after being disabled, after others
//! failed.

use crate::common::bench::{BASE, Bench, Guest};
use crate::common::frontend::Answer;
use crate::common::message::Message;
use crate::common::virtio::{VnetHdr, feature};
use crate::common::{QUIET, fd_of};

/// QEMU removes and adds a region whose size changes, and does not describe the rings again.
#[test]
fn rings_run_again_once_their_memory_is_back() {
    let mut bench = Bench::running(1);
    bench.assert_frames_pass();
    for _ in 0..3 {
        let info = bench.guest.mem.regions()[0].info;
        assert_eq!(bench.ask(Message::rem_mem_reg(&info)), Answer::Ack);
        bench.guest.pairs[0].send(&VnetHdr::default(), &[0; 60]);
        assert!(bench.backend.taps[0].recv(QUIET).is_none(), "without its memory no ring runs");

        assert_eq!(bench.ask(Message::add_mem_reg(&bench.guest.mem.regions()[0])), Answer::Ack);

        assert!(bench.backend.taps[0].recv(crate::common::PATIENCE).is_some(), "what waited is sent");
        bench.assert_frames_pass();
    }
}

/// A message that would start a complete ring does not cost one without memory its kick.
#[test]
fn rings_that_were_spoken_of_without_their_memory_run_again_once_it_is_back() {
    let mut bench = Bench::running(1);
    let kick = bench.guest.pairs[0].tx.kick.try_clone().unwrap();
    let messages = [
        ("features", Message::set_features(BASE)),
        ("size", Message::set_vring_num(1, 256)),
        ("kick", Message::set_vring_kick(1, fd_of(&kick))),
    ];
    for (name, message) in messages {
        let info = bench.guest.mem.regions()[0].info;
        assert_eq!(bench.ask(Message::rem_mem_reg(&info)), Answer::Ack, "{name}");

        assert_eq!(bench.ask(message), Answer::Ack, "{name}");

        assert_eq!(bench.ask(Message::add_mem_reg(&bench.guest.mem.regions()[0])), Answer::Ack, "{name}");
        bench.assert_frames_pass();
    }
}

#[test]
fn ring_that_broke_without_its_memory_keeps_neither_that_nor_the_others_from_coming_back() {
    let mut bench = Bench::running(1);
    let err = bench.guest.pairs[0].rx.err.try_clone().unwrap();
    assert_eq!(bench.ask(Message::set_vring_err(0, fd_of(&err))), Answer::Ack);
    let info = bench.guest.mem.regions()[0].info;
    assert_eq!(bench.ask(Message::rem_mem_reg(&info)), Answer::Ack);
    assert_eq!(err.read().unwrap(), 1, "its memory is gone");
    bench.guest.pairs[0].rx.write_avail_idx(5000);

    assert_eq!(bench.ask(Message::add_mem_reg(&bench.guest.mem.regions()[0])), Answer::Ack);

    bench.guest.assert_tx(0, &bench.backend.taps[0]);
    assert_eq!(err.read().unwrap(), 1, "the front-end is told of the other one");
}

/// What was lost and then stopped is not started behind the front-end's back.
#[test]
fn ring_that_was_stopped_without_its_memory_stays_stopped_when_that_is_back() {
    let mut bench = Bench::running(1);
    let info = bench.guest.mem.regions()[0].info;
    assert_eq!(bench.ask(Message::rem_mem_reg(&info)), Answer::Ack);
    assert!(bench.front_end.get_vring_base(1).is_ok());
    assert_eq!(bench.ask(Message::add_mem_reg(&bench.guest.mem.regions()[0])), Answer::Ack);
    bench.guest.pairs[0].send(&VnetHdr::default(), &[0; 60]);
    assert!(bench.backend.taps[0].recv(QUIET).is_none());
}

/// User Mode Linux disables its rings when its driver lets go, and never asks for their positions.
#[test]
fn disabled_rings_are_described_anew_without_being_stopped_first() {
    let mut bench = Bench::running(1);
    bench.assert_frames_pass();
    for _ in 0..3 {
        for index in [1, 0] {
            assert_eq!(bench.ask(Message::set_vring_enable(index, 0)), Answer::Ack);
        }
        bench.guest = Guest::new(1, feature::MRG_RXBUF);
        assert_eq!(bench.ask(Message::set_features(BASE | feature::MRG_RXBUF)), Answer::Ack);
        assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
        (0..2).for_each(|index| bench.start_ring(index));
        bench.assert_frames_pass();
    }
}

/// The order of messages does not matter: the features may be the last.
#[test]
fn features_that_come_last_start_the_good_rings_though_one_is_broken() {
    let mut bench = Bench::connected(1);
    let protocol = bench.front_end.get_u64(&Message::get_protocol_features()).unwrap();
    assert!(bench.front_end.tell(&Message::set_protocol_features(protocol)));
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    bench.guest.pairs[0].rx.write_avail_idx(5000);
    let err = bench.guest.pairs[0].rx.err.try_clone().unwrap();
    assert_eq!(bench.ask(Message::set_vring_err(0, fd_of(&err))), Answer::Ack);
    (0..2).for_each(|index| bench.start_ring(index));

    assert_eq!(bench.ask(Message::set_features(BASE)), Answer::Ack);

    bench.guest.assert_tx(0, &bench.backend.taps[0]);
    assert_eq!(err.read().unwrap(), 1, "the front-end is told of the other one");
}

/// A queue disabled while it was stopped is as one that was not enabled yet: what waits in it is not discarded.
#[test]
fn ring_disabled_while_stopped_keeps_its_frames_until_it_is_enabled() {
    let bench = Bench::running(1);
    let base = bench.front_end.get_vring_base(1).unwrap();
    assert_eq!(bench.ask(Message::set_vring_enable(1, 0)), Answer::Ack);
    let mut bench = bench;
    bench.guest.pairs[0].send(&VnetHdr::default(), &[0; 60]);
    let kick = bench.guest.pairs[0].tx.kick.try_clone().unwrap();
    assert_eq!(bench.ask(Message::set_vring_base(1, base)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_kick(1, fd_of(&kick))), Answer::Ack);
    assert!(bench.backend.taps[0].recv(QUIET).is_none(), "not enabled");

    assert_eq!(bench.ask(Message::set_vring_enable(1, 1)), Answer::Ack);

    assert!(bench.backend.taps[0].recv(crate::common::PATIENCE).is_some());
    assert_eq!(bench.backend.counter(0, "tx_drop_disabled"), 0);
}

/// libkrun's restore says last where the rings carry on, when they are complete already.
#[test]
fn base_of_a_ring_that_was_not_enabled_yet_is_taken_and_compared_when_it_is() {
    for off in [0, 5] {
        let mut bench = Bench::running(1);
        bench.assert_frames_pass();
        bench.reconnect();
        let protocol = bench.front_end.get_u64(&Message::get_protocol_features()).unwrap();
        assert!(bench.front_end.tell(&Message::set_protocol_features(protocol)));
        assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
        for index in 0..2 {
            let session = bench.guest.session();
            let ring = session.rings[index as usize];
            let kick = Message::set_vring_kick(index.into(), fd_of(&ring.kick));
            let call = Message::set_vring_call(index.into(), fd_of(&ring.call));
            let num = Message::set_vring_num(index, u32::from(ring.size));
            for message in [num, Message::set_vring_base(index, 0), Message::set_vring_addr(index, ring), kick, call] {
                assert_eq!(bench.ask(message), Answer::Ack);
            }
        }
        assert_eq!(bench.ask(Message::set_features(BASE)), Answer::Ack);

        for index in 0..2 {
            assert_eq!(bench.ask(Message::set_vring_base(index, 1 + off)), Answer::Ack);
            assert_eq!(bench.ask(Message::set_vring_base(index, 0x1_0000)), Answer::Nack(1));
        }

        for index in 0..2 {
            assert_eq!(bench.ask(Message::set_vring_enable(index, 1)), Answer::Ack);
            assert_eq!(bench.ask(Message::set_vring_base(index, 1)), Answer::Nack(1), "it may have moved on");
        }
        let counted = u64::from(off != 0) * 2;
        assert_eq!(bench.backend.counter(0, "rings_resumed_off_base"), counted, "base off by {off}");
        bench.assert_frames_pass();
    }
}
