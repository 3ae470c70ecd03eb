//! The message orders of real front-ends; session after session on one back-end; who is served when.

use crate::common::backend::InProcess;
use crate::common::bench::{BASE, Bench, Guest};
use crate::common::crate_frontend::CrateFrontend;
use crate::common::frames::{Ends, Stamp, test_frame};
use crate::common::frontend::{Answer, Negotiated, RawFrontend, Refusal, SessionSpec};
use crate::common::message::Message;
use crate::common::virtio::{VnetHdr, feature, protocol};
use crate::common::{PATIENCE, QUIET};

type Negotiate = fn(&RawFrontend, &SessionSpec<'_>) -> Result<Negotiated, Refusal>;
type Stop = fn(&RawFrontend, usize) -> Result<Vec<u32>, Answer>;

/// Name, start, stop, and the protocol features that the front-end knows.
const FRONT_ENDS: [(&str, Negotiate, Stop, u64); 3] = [
    ("QEMU 10", RawFrontend::negotiate_like_qemu, RawFrontend::stop_like_qemu, SessionSpec::QEMU_PROTOCOL),
    ("QEMU 7.2", RawFrontend::negotiate_like_qemu_7, RawFrontend::stop_like_qemu, SessionSpec::QEMU_PROTOCOL),
    (
        "cloud-hypervisor",
        RawFrontend::negotiate_like_cloud_hypervisor,
        RawFrontend::stop_like_cloud_hypervisor,
        SessionSpec::CLOUD_HYPERVISOR_PROTOCOL,
    ),
];

const FEATURE_SETS: [u64; 3] = [0, feature::MRG_RXBUF, feature::EVENT_IDX | feature::INDIRECT_DESC];

#[test]
fn frames_pass_after_each_front_ends_order_and_the_bases_are_the_used_indices() {
    for (name, negotiate, stop, protocol) in FRONT_ENDS {
        for (pairs, features) in [1, 2].into_iter().flat_map(|pairs| FEATURE_SETS.map(|set| (pairs, set))) {
            let mut bench = Bench::before(InProcess::start(pairs), Guest::new(pairs, features));
            let spec = SessionSpec { protocol, ..bench.guest.session() };
            let negotiated = negotiate(&bench.front_end, &spec).unwrap();
            assert_eq!(negotiated.features, features | BASE, "{name}");

            bench.assert_frames_pass();
            bench.assert_frames_pass();
            let bases = stop(&bench.front_end, 2 * pairs).unwrap();

            let session = bench.guest.session();
            let used: Vec<_> = session.rings.iter().map(|ring| u32::from(ring.used_idx())).collect();
            assert_eq!(bases, used, "{name}");
            assert_eq!(used, vec![2; 2 * pairs], "{name}");
        }
    }
}

#[test]
fn crate_front_end_of_cloud_hypervisor_starts_and_stops_a_session() {
    let backend = InProcess::start(1);
    let mut guest = Guest::new(1, feature::MRG_RXBUF);
    let mut session = CrateFrontend::start(backend.socket(), &guest.session()).unwrap();

    guest.assert_frames_pass(&backend.taps);

    assert_eq!(session.stop().unwrap(), [1, 1]);
}

#[test]
fn stopped_rings_start_again_where_they_were_with_a_new_kick() {
    for (name, negotiate, stop, _) in FRONT_ENDS {
        let mut bench = Bench::connected(1);
        negotiate(&bench.front_end, &bench.guest.session()).unwrap();
        bench.assert_frames_pass();
        stop(&bench.front_end, 2).unwrap();

        (0..2).for_each(|index| bench.start_ring(index));

        bench.assert_frames_pass();
        assert_eq!(bench.backend.counter(0, "rings_resumed_off_base"), 0, "{name}");
    }
}

/// I-03
#[test]
fn session_after_session_carries_on_with_the_same_guest() {
    let mut bench = Bench::connected(1);
    for (name, negotiate, ..) in FRONT_ENDS.into_iter().cycle().take(9) {
        negotiate(&bench.front_end, &bench.guest.session()).unwrap_or_else(|refusal| panic!("{name}: {refusal:?}"));
        bench.assert_frames_pass();
        bench.guest.resume_at_used_index();
        bench.reconnect();
    }
    assert_eq!(bench.backend.counter(0, "rx_frames"), 9);
    assert_eq!(bench.backend.counter(0, "rings_resumed_off_base"), 0);
}

/// I-09
#[test]
fn frames_sent_while_nobody_is_connected_pass_after_the_reconnect() {
    let mut bench = Bench::running(1);
    bench.assert_frames_pass();
    bench.reconnect();
    let sent = test_frame(&Ends::TX, Stamp { stream: 7, seq: 0 }, 100);
    bench.guest.pairs[0].send(&VnetHdr::default(), &sent);
    let received = test_frame(&Ends::RX, Stamp { stream: 8, seq: 0 }, 100);
    bench.backend.taps[0].send(&VnetHdr::default(), &received);
    assert!(bench.backend.taps[0].recv(QUIET).is_none(), "Nobody said yet where the rings are");

    bench.guest.resume_at_used_index();
    bench.start();

    assert_eq!(bench.backend.taps[0].recv(PATIENCE).unwrap().1, sent);
    assert_eq!(bench.guest.pairs[0].recv(PATIENCE).unwrap().1, received);
    bench.assert_frames_pass();
}

/// P-10
#[test]
fn second_front_end_is_turned_away_and_the_first_untouched() {
    let mut bench = Bench::running(1);
    for _ in 0..3 {
        let second = RawFrontend::connect(bench.backend.socket()).unwrap();
        // What it says may come before or after it is turned away.
        second.tell(&Message::set_owner());

        assert!(second.wait_closed(PATIENCE), "The second is told at once");

        bench.assert_frames_pass();
    }
}

#[test]
fn front_end_that_comes_right_after_the_old_one_hung_up_is_served() {
    let mut bench = Bench::running(1);
    for _ in 0..50 {
        bench.reconnect();
    }
    bench.start_over();
    bench.assert_frames_pass();
}

/// U-59: closed while frames flow, its rings are left alone before the next front-end is served.
#[test]
fn rings_of_a_closed_session_are_left_alone() {
    let mut bench = Bench::running(1);
    for seq in 0..200 {
        let frame = test_frame(&Ends::TX, Stamp { stream: 3, seq }, 100);
        bench.guest.pairs[0].send(&VnetHdr::default(), &frame);
        while bench.backend.taps[0].recv(std::time::Duration::ZERO).is_some() {}
    }
    bench.reconnect();
    let used = bench.guest.pairs[0].tx.used_idx();
    while bench.backend.taps[0].recv(std::time::Duration::ZERO).is_some() {}

    for seq in 0..20 {
        let frame = test_frame(&Ends::TX, Stamp { stream: 4, seq }, 100);
        bench.guest.pairs[0].queue(&VnetHdr::default(), &frame);
        bench.guest.pairs[0].tx.publish();
        bench.guest.pairs[0].tx.kick();
    }

    assert!(bench.backend.taps[0].recv(QUIET).is_none(), "A frame of a session that is over");
    assert_eq!(bench.guest.pairs[0].tx.used_idx(), used);
    bench.start_over();
    bench.assert_frames_pass();
}

/// DPDK's virtio-user begins a reconnect with these, before features and memory.
#[test]
fn reconnect_in_the_order_of_dpdks_virtio_user_is_answered() {
    let mut bench = Bench::running(1);
    bench.assert_frames_pass();
    bench.guest.resume_at_used_index();
    bench.reconnect();

    for index in 0..2 {
        assert!(bench.front_end.tell(&Message::set_vring_enable(index, 0)));
    }
    let bases: Vec<_> = (0..2).map(|index| bench.front_end.get_vring_base(index)).collect();
    bench.start();

    assert_eq!(bases, [Ok(0), Ok(0)]);
    bench.assert_frames_pass();
}

/// It used to stop so: the pairs that the driver used are disabled, and none is asked for its position.
#[test]
fn owner_reset_ends_the_rings_that_dpdks_virtio_user_describes_anew() {
    let mut bench = Bench::negotiated(2);
    for index in 0..4 {
        let session = bench.guest.session();
        let ring = session.rings[index as usize];
        let kick = Message::set_vring_kick(index.into(), crate::common::fd_of(&ring.kick));
        for message in [Message::set_vring_num(index, 256), Message::set_vring_addr(index, ring), kick] {
            assert_eq!(bench.ask(message), Answer::Ack);
        }
    }
    // The second pair is started, and never enabled.
    for enable in [1, 0] {
        for index in 0..2 {
            assert_eq!(bench.ask(Message::set_vring_enable(index, enable)), Answer::Ack);
        }
    }

    assert_eq!(bench.ask(Message::reset_owner()), Answer::Ack);

    bench.guest = Guest::new(2, feature::MRG_RXBUF);
    assert_eq!(bench.ask(Message::set_features(BASE | feature::MRG_RXBUF)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    (0..4).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// N-04
#[test]
fn early_enables_are_remembered() {
    let mut bench = Bench::connected(1);
    let offered = bench.front_end.get_u64(&Message::get_protocol_features()).unwrap();
    assert!(bench.front_end.tell(&Message::set_protocol_features(offered & protocol::REPLY_ACK)));
    // Before SET_FEATURES and SET_OWNER, with an answer asked for, as QEMU 10 does.
    for index in 0..2 {
        assert_eq!(bench.ask(Message::set_vring_enable(index, 1)), Answer::Ack);
    }
    assert_eq!(bench.ask(Message::set_features(BASE)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    for index in 0..2 {
        let session = bench.guest.session();
        let ring = session.rings[index as usize];
        let kick = Message::set_vring_kick(u64::from(index), crate::common::fd_of(&ring.kick));
        let call = Message::set_vring_call(u64::from(index), crate::common::fd_of(&ring.call));
        for message in [Message::set_vring_num(index, 256), Message::set_vring_addr(index, ring), kick, call] {
            assert_eq!(bench.ask(message), Answer::Ack);
        }
    }

    bench.assert_frames_pass();
}
