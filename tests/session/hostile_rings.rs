//! A broken or hostile front-end: what it says of rings: their indices, sizes, places and states.

use crate::common::bench::{Bench, Guest, RING_REQUESTS, RING_SIZE};
use crate::common::frames::{Ends, Stamp, test_frame};
use crate::common::frontend::Answer;
use crate::common::memory::USER_OFFSET;
use crate::common::message::{Message, VringAddr, request};
use crate::common::split_ring::{RingAddrs, SplitRing};
use crate::common::virtio::VnetHdr;
use crate::common::{PATIENCE, QUIET, fd_of, times};

/// U-18
#[test]
fn ring_index_that_does_not_exist_is_refused_in_every_message() {
    let mut bench = Bench::running(1);
    let kick = bench.guest.pairs[0].rx.kick.try_clone().unwrap();
    let addr = bench.ring_addr(0);
    // Rings 2 to 5 exist and stay idle: a front-end that takes the queue number (3) for pairs sets up six rings.
    for index in [6, 7, 0xff, 0x100, 0x101, 0x1_0000, 0x1_0001, 0xffff_0000, u32::MAX] {
        for request in RING_REQUESTS {
            let message = match request {
                request::SET_VRING_ADDR => Message::set_vring_addr_raw(index, &addr),
                request::SET_VRING_KICK => Message::set_vring_kick(index.into(), fd_of(&kick)),
                request::SET_VRING_CALL => Message::set_vring_call(index.into(), fd_of(&kick)),
                request::SET_VRING_ERR => Message::set_vring_err(index.into(), fd_of(&kick)),
                request::SET_VRING_NUM => Message::set_vring_num(index, 256),
                _ => Message::vring_state(request, index, 1),
            };
            if request == request::GET_VRING_BASE {
                // Its own answer: no ring, base 0.
                assert_eq!(bench.front_end.get_vring_base(index), Ok(0), "{index:#x}");
            } else {
                assert_eq!(bench.front_end.ask(message), Answer::Nack(1), "request {request}, ring {index:#x}");
            }
        }
    }
    for index in [0x1_0000_0000, 1 << 63, u64::MAX] {
        assert_eq!(bench.ask(Message::set_vring_kick(index, fd_of(&kick))), Answer::Nack(1), "{index:#x}");
    }
    bench.assert_frames_pass();
}

/// U-19, U-20
#[test]
fn impossible_queue_size_is_refused() {
    let mut bench = Bench::negotiated(1);
    for size in [0, 3, 255, 257, 32769, 65536, 65536 + 256, u32::MAX] {
        assert_eq!(bench.ask(Message::set_vring_num(0, size)), Answer::Nack(1), "{size}");
    }
    for size in [1, 2, 32768] {
        assert_eq!(bench.ask(Message::set_vring_num(0, size)), Answer::Ack, "{size}");
    }
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-21
#[test]
fn base_of_more_than_16_bits_is_refused() {
    let mut bench = Bench::negotiated(1);
    for base in [0x1_0000, 0x1_2345, u32::MAX] {
        assert_eq!(bench.ask(Message::set_vring_base(0, base)), Answer::Nack(1), "{base:#x}");
    }
    assert_eq!(bench.front_end.get_vring_base(0), Ok(0));
    assert_eq!(bench.ask(Message::set_vring_base(0, 0xffff)), Answer::Ack);
    assert_eq!(bench.front_end.get_vring_base(0), Ok(0xffff));
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-22
#[test]
fn started_ring_cannot_be_changed() {
    let mut bench = Bench::running(1);
    let addr = bench.ring_addr(1);
    let changes = [
        Message::set_vring_num(1, RING_SIZE.into()),
        Message::set_vring_num(1, 128),
        Message::set_vring_base(1, 0),
        Message::set_vring_addr_raw(1, &VringAddr { desc: addr.desc + 16, ..addr }),
        Message::set_vring_addr_raw(1, &VringAddr { used: addr.used + 4, ..addr }),
        Message::set_vring_addr_raw(1, &bench.ring_addr(0)),
        Message::set_vring_addr_raw(1, &VringAddr { flags: 2, ..addr }),
    ];
    for message in changes {
        let request = message.request;
        assert_eq!(bench.front_end.ask(message), Answer::Nack(1), "request {request}");
        bench.assert_frames_pass();
    }
    assert_eq!(bench.ask(Message::set_vring_addr_raw(1, &addr)), Answer::Ack, "The same again changes nothing");
    bench.assert_frames_pass();
}

/// U-23
#[test]
fn size_and_place_are_checked_together_when_the_ring_starts() {
    let mut bench = Bench::negotiated(1);
    let info = bench.guest.mem.regions()[0].info;
    let end = info.user + info.size;
    // With 2 entries it ends with the region; with 256 it ends behind it.
    let addr = VringAddr { flags: 0, desc: end - 4096, avail: end - 2048, used: end - 24, log: 0 };
    let kick = bench.guest.pairs[0].rx.kick.try_clone().unwrap();
    let err = bench.guest.pairs[0].rx.err.try_clone().unwrap();
    assert_eq!(bench.ask(Message::set_vring_err(0, fd_of(&err))), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_num(0, 2)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_addr_raw(0, &addr)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_num(0, 256)), Answer::Ack);

    assert_eq!(bench.ask(Message::set_vring_kick(0, fd_of(&kick))), Answer::Nack(1));

    assert_eq!(err.read().unwrap(), 1, "The ring is broken, and the front-end told once");
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-23: what the front-end said last counts.
#[test]
fn ring_made_smaller_before_it_starts_has_the_smaller_size() {
    let mut bench = Bench::negotiated(1);
    let guest = &mut bench.guest;
    guest.pairs[0].tx = SplitRing::placed(&guest.mem, 64, 0, guest.pairs[0].tx.addrs);
    let addr = VringAddr::of(&bench.guest.pairs[0].tx);
    assert_eq!(bench.ask(Message::set_vring_num(1, 256)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_addr_raw(1, &addr)), Answer::Ack);

    (0..2).for_each(|index| bench.start_ring(index));

    for _ in 0..200 {
        bench.assert_frames_pass();
    }
}

/// U-24, U-25, U-27
#[test]
fn ring_that_cannot_lie_where_it_is_said_to_is_refused() {
    let mut bench = Bench::negotiated(1);
    let addr = bench.ring_addr(0);
    let info = bench.guest.mem.regions()[0].info;
    let end = info.user + info.size;
    let cases = [
        ("U-24 descriptor table unaligned", VringAddr { desc: addr.desc + 1, ..addr }),
        ("U-24 descriptor table half aligned", VringAddr { desc: addr.desc + 8, ..addr }),
        ("U-24 avail ring unaligned", VringAddr { avail: addr.avail + 1, ..addr }),
        ("U-24 used ring unaligned", VringAddr { used: addr.used + 1, ..addr }),
        ("U-24 used ring half aligned", VringAddr { used: addr.used + 2, ..addr }),
        ("U-25 descriptor table ends outside", VringAddr { desc: end - 16 * 255, ..addr }),
        ("U-25 avail ring ends outside", VringAddr { avail: end - 4 - 2 * 255, ..addr }),
        ("U-25 used ring ends outside", VringAddr { used: end - 4 - 8 * 255, ..addr }),
        ("U-25 begins behind the end", VringAddr { desc: end, ..addr }),
        ("U-25 begins before the start", VringAddr { avail: info.user - 2, ..addr }),
        ("U-25 wraps", VringAddr { used: u64::MAX - 3, ..addr }),
        ("null", VringAddr { desc: 0, avail: 0, used: 0, ..addr }),
        ("guest addresses", VringAddr { desc: addr.desc - USER_OFFSET, ..addr }),
        ("U-27 used ring over the descriptor table", VringAddr { used: addr.desc + 16, ..addr }),
        ("U-27 used ring over the avail ring", VringAddr { used: (addr.avail + 3) & !3, ..addr }),
        ("U-27 all at one place", VringAddr { avail: addr.desc, used: addr.desc, ..addr }),
        ("unknown flags", VringAddr { flags: 0x8000_0000, ..addr }),
    ];
    assert_eq!(bench.ask(Message::set_vring_num(0, RING_SIZE.into())), Answer::Ack);
    for (name, wrong) in cases {
        assert_eq!(bench.ask(Message::set_vring_addr_raw(0, &wrong)), Answer::Nack(1), "{name}");
    }
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-27, between two rings: not refused. Each ring is judged by itself, and what a guest does to its own rings by
/// laying one over the other stays with that guest: all access is in its memory. What matters is that the back-end
/// lives, and that the pair heals.
#[test]
fn rings_that_share_their_memory_harm_only_their_guest() {
    let mut bench = Bench::negotiated(1);
    let shared = bench.guest.pairs[0].rx.addrs;
    let guest = &mut bench.guest;
    guest.pairs[0].tx =
        SplitRing::placed(&guest.mem, RING_SIZE, 0, RingAddrs { used: shared.used, ..guest.pairs[0].tx.addrs });
    (0..2).for_each(|index| bench.start_ring(index));
    for seq in 0..20 {
        let frame = test_frame(&Ends::TX, Stamp { stream: 1, seq }, 100);
        bench.guest.pairs[0].queue(&VnetHdr::default(), &frame);
        bench.guest.pairs[0].tx.publish();
        bench.guest.pairs[0].tx.kick();
    }
    assert!(bench.backend.taps[0].recv(PATIENCE).is_some());
    bench.settle();

    let bases: Vec<_> = (0..2).map(|index| bench.front_end.get_vring_base(index)).collect();
    assert!(bases.iter().all(Result::is_ok), "{bases:?}");
    while bench.backend.taps[0].recv(QUIET).is_some() {}
    bench.start_over();
    bench.assert_frames_pass();
}

/// U-26
#[test]
fn base_of_a_ring_that_was_never_set_up_is_0_however_often_it_is_asked_for() {
    let mut bench = Bench::connected(1);
    for index in [0, 1, 5, 0, 0, 0] {
        assert_eq!(bench.front_end.get_vring_base(index), Ok(0));
    }
    bench.start();
    bench.assert_frames_pass();
    bench.assert_frames_pass();
    for _ in 0..3 {
        assert_eq!(bench.front_end.get_vring_base(1), Ok(2));
    }
    bench.start_ring(1);
    bench.assert_frames_pass();
}

/// U-55
#[test]
fn enable_is_0_or_1_and_may_come_at_any_time() {
    let mut bench = Bench::connected(1);
    bench.negotiate();
    for index in 0..6 {
        for enable in [1, 0, 0, 1] {
            assert_eq!(bench.ask(Message::set_vring_enable(index, enable)), Answer::Ack, "A ring never set up");
        }
        for wrong in [2, 3, 0x101, u32::MAX] {
            assert_eq!(bench.ask(Message::set_vring_enable(index, wrong)), Answer::Nack(1), "{wrong:#x}");
        }
    }
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    (0..2).for_each(|index| bench.start_ring(index));
    for _ in 0..times(2000, 500_000) {
        for index in 0..2 {
            assert_eq!(bench.ask(Message::set_vring_enable(index, 0)), Answer::Ack);
            assert_eq!(bench.ask(Message::set_vring_enable(index, 1)), Answer::Ack);
        }
    }
    bench.assert_frames_pass();
}

/// U-56
#[test]
fn frames_of_a_disabled_ring_are_discarded_and_counted() {
    let mut bench = Bench::running(1);
    bench.assert_frames_pass();
    assert_eq!(bench.ask(Message::set_vring_enable(1, 0)), Answer::Ack);

    for seq in 0..5 {
        let frame = test_frame(&Ends::TX, Stamp { stream: 2, seq }, 100);
        bench.guest.pairs[0].send(&VnetHdr::default(), &frame);
    }

    assert!(bench.guest.pairs[0].wait_tx_done(PATIENCE), "The guest has its buffers back");
    bench.backend.wait_counter(0, "tx_drop_disabled", 5);
    assert_eq!(bench.ask(Message::set_vring_enable(1, 1)), Answer::Ack);
    // The next frame on the TAP is the one of this check.
    bench.assert_frames_pass();
}

/// U-56: to the specification a ring that was not enabled yet is a disabled one. It holds its frames instead, so that
/// what a guest queued before a reconnect survives until the front-end's enable, which comes last.
#[test]
fn frames_of_a_ring_that_was_never_enabled_wait_for_it() {
    let mut bench = Bench::negotiated(1);
    let frame = test_frame(&Ends::TX, Stamp { stream: 2, seq: 0 }, 100);
    bench.guest.pairs[0].send(&VnetHdr::default(), &frame);
    let tx = bench.guest.pairs[0].tx.kick.try_clone().unwrap();
    assert_eq!(bench.ask(Message::set_vring_num(1, RING_SIZE.into())), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_addr_raw(1, &bench.ring_addr(1))), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_kick(1, fd_of(&tx))), Answer::Ack);
    for enable in [None, Some(0)] {
        if let Some(enable) = enable {
            assert_eq!(bench.ask(Message::set_vring_enable(1, enable)), Answer::Ack);
        }
        assert!(bench.backend.taps[0].recv(QUIET).is_none());
    }

    assert_eq!(bench.ask(Message::set_vring_enable(1, 1)), Answer::Ack);

    assert_eq!(bench.backend.taps[0].recv(PATIENCE).expect("the frame that waited").1, frame);
    assert_eq!(bench.backend.counter(0, "tx_drop_disabled"), 0);
}

/// A disabled receive ring is given nothing; the frames wait in the TAP.
#[test]
fn disabled_receive_ring_is_given_nothing() {
    let mut bench = Bench::running(1);
    bench.assert_frames_pass();
    assert_eq!(bench.ask(Message::set_vring_enable(0, 0)), Answer::Ack);
    let frame = test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, 100);
    bench.backend.taps[0].send(&VnetHdr::default(), &frame);
    assert!(bench.guest.pairs[0].recv(QUIET).is_none());
    bench.guest.assert_tx(0, &bench.backend.taps[0]);

    assert_eq!(bench.ask(Message::set_vring_enable(0, 1)), Answer::Ack);

    assert_eq!(bench.guest.pairs[0].recv(PATIENCE).expect("the frame that waited").1, frame);
}

/// Q-30, E-01. A ring's trouble is its own: the other pair goes on.
#[test]
fn broken_ring_leaves_the_other_pair_alone_and_heals_by_a_new_set_up() {
    let mut bench = Bench::running(2);
    bench.assert_frames_pass();
    let tx = &bench.guest.pairs[0].tx;
    tx.write_avail_idx(tx.used_idx().wrapping_add(0x4000));
    tx.kick();
    bench.backend.wait_counter(0, "broken_rings", 1);

    bench.guest.assert_tx(1, &bench.backend.taps[1]);
    bench.guest.assert_rx(1, &bench.backend.taps[1]);
    bench.guest.assert_rx(0, &bench.backend.taps[0]);

    assert_eq!(bench.front_end.get_vring_base(1), Ok(1));
    let guest = Guest::new(2, 0);
    bench.reconnect();
    bench.guest = guest;
    bench.start();
    bench.assert_frames_pass();
}
