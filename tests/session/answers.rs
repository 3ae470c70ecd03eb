//! How single questions are answered, where front-ends are known to depend on it.

use std::sync::atomic::Ordering;

use crate::common::backend::InProcess;
use crate::common::bench::{BASE, Bench, Guest};
use crate::common::frontend::{Answer, SessionSpec};
use crate::common::memory::{GuestMemory, RegionSpec};
use crate::common::message::{Message, request};
use crate::common::virtio::{VnetHdr, feature};
use crate::common::{PATIENCE, fd_of};

/// QEMU compares it with pairs, cloud-hypervisor with rings, crosvm makes that many rings, control queue included.
#[test]
fn queue_number_is_right_for_pairs_and_for_rings() {
    for (pairs, wanted) in [(1, 3), (2, 5), (4, 9)] {
        let bench = Bench::negotiated(pairs);
        assert_eq!(bench.front_end.get_u64(&Message::get_queue_num()), Ok(wanted));
    }
}

/// QEMU gives up if it ever falls.
#[test]
fn memory_slots_are_509_before_and_after_memory_is_there() {
    let bench = Bench::connected(1);
    bench.negotiate();
    let before = bench.front_end.get_u64(&Message::get_max_mem_slots());
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    assert_eq!([before, bench.front_end.get_u64(&Message::get_max_mem_slots())], [Ok(509), Ok(509)]);
}

/// U-12: the front-end would wait for ever, and they tell nothing that it may not know.
#[test]
fn questions_are_answered_before_their_protocol_feature_is_negotiated() {
    let bench = Bench::connected(1);
    for (question, answer) in
        [(Message::get_queue_num(), 3), (Message::get_max_mem_slots(), 509), (Message::get_status(), 0)]
    {
        assert_eq!(bench.front_end.get_u64(&question), Ok(answer), "request {}", question.request);
    }
}

#[test]
fn control_queue_features_are_always_offered() {
    let offered = Bench::connected(1).front_end.get_u64(&Message::get_features()).unwrap();
    let needed = feature::CTRL_VQ | feature::GUEST_ANNOUNCE | feature::MQ | feature::IN_ORDER;
    assert_eq!(offered & needed, needed);
    let never_for_standard = feature::CTRL_GUEST_OFFLOADS | feature::RING_RESET;
    assert_eq!(offered & never_for_standard, 0);
}

/// cloud-hypervisor gives no call descriptor before the guest has set up MSI-X.
#[test]
fn ring_without_a_call_descriptor_starts_and_one_that_comes_later_is_used() {
    let mut bench = Bench::negotiated(1);
    for index in 0..2 {
        set_up_without_call(&bench, index);
    }
    let frame = crate::common::frames::arp_request(&crate::common::frames::Ends::TX);
    bench.guest.pairs[0].send(&VnetHdr::default(), &frame);
    assert_eq!(bench.backend.taps[0].recv(PATIENCE).expect("a frame on the TAP").1, frame);
    // The guest polls: nothing calls it.
    bench.backend.wait_counter(0, "tx_frames", 1);
    assert_eq!(bench.guest.pairs[0].tx.take_calls(), 0);

    for index in 0..2 {
        let session = bench.guest.session();
        let call = fd_of(&session.rings[index as usize].call);
        assert_eq!(bench.ask(Message::set_vring_call(index, call)), Answer::Ack);
    }

    bench.assert_frames_pass();
}

fn set_up_without_call(bench: &Bench, index: u32) {
    let session = bench.guest.session();
    let ring = session.rings[index as usize];
    let kick = Message::set_vring_kick(u64::from(index), fd_of(&ring.kick));
    let addr = Message::set_vring_addr(index, ring);
    for message in [Message::set_vring_num(index, u32::from(ring.size)), addr, kick] {
        assert_eq!(bench.ask(message), Answer::Ack);
    }
    assert_eq!(bench.ask(Message::set_vring_enable(index, 1)), Answer::Ack);
}

/// U-49. A masked vector, and polling.
#[test]
fn ring_without_call_and_kick_descriptors_is_polled() {
    let mut bench = Bench::running(1);
    for index in 0..2 {
        for request in [request::SET_VRING_CALL, request::SET_VRING_KICK] {
            assert_eq!(bench.ask(Message::set_vring_no_fd(request, index)), Answer::Ack);
        }
    }
    let frame = crate::common::frames::arp_request(&crate::common::frames::Ends::TX);
    bench.guest.pairs[0].queue(&VnetHdr::default(), &frame);

    bench.guest.pairs[0].tx.publish();

    assert_eq!(bench.backend.taps[0].recv(PATIENCE).expect("a frame without a kick").1, frame);
    for index in 0..2 {
        let session = bench.guest.session();
        let call = fd_of(&session.rings[index as usize].call);
        assert_eq!(bench.ask(Message::set_vring_call(index, call)), Answer::Ack);
    }
    bench.assert_frames_pass();
}

/// User Mode Linux sends room for two regions with one in use.
#[test]
fn memory_table_with_room_for_more_regions_is_accepted() {
    let mut bench = Bench::connected(1);
    bench.negotiate();
    let mut table = Message::set_mem_table(&bench.guest.mem);
    let mut body = table.body.clone();
    body.resize(8 + 2 * 32, 0);
    table = table.with_body(body);

    assert_eq!(bench.ask(table), Answer::Ack);

    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

#[test]
fn unsorted_memory_table_is_accepted() {
    let specs = [
        RegionSpec::new(0x4000_0000, 4 << 20).in_file(0, 0),
        RegionSpec::new(0x10_0000, 16 << 20).in_file(1, 0),
        RegionSpec::new(0x2000_0000, 4 << 20).in_file(2, 0),
    ];
    let guest = Guest::in_memory(GuestMemory::new(&specs), 1, 0);
    let mut bench = Bench::before(InProcess::start(1), guest);

    bench.start();

    bench.assert_frames_pass();
}

/// QEMU 7.2 adds each region once for every queue pair, and removes it as often.
#[test]
fn region_that_is_added_and_removed_twice_is_acknowledged_and_there_once() {
    let mut bench = Bench::connected(1);
    bench.negotiate();
    let region = &bench.guest.mem.regions()[0];
    for _ in 0..2 {
        assert_eq!(bench.ask(Message::add_mem_reg(region)), Answer::Ack);
    }
    let info = region.info;
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();

    bench.front_end.stop_like_qemu(2).unwrap();
    for _ in 0..2 {
        assert_eq!(bench.ask(Message::rem_mem_reg(&info)), Answer::Ack);
    }
    assert_eq!(bench.ask(Message::set_vring_num(0, 256)), Answer::Ack);
    let addresses = Message::set_vring_addr(0, &bench.guest.pairs[0].rx);
    assert_eq!(bench.ask(addresses), Answer::Nack(1), "there is no memory");
}

#[test]
fn regions_added_and_removed_one_by_one_keep_the_rings_going() {
    let specs = [RegionSpec::new(0x10_0000, 16 << 20), RegionSpec::new(0x4000_0000, 4 << 20).in_file(1, 0)];
    let guest = Guest::in_memory(GuestMemory::new(&specs), 1, 0);
    let mut bench = Bench::before(InProcess::start(1), guest);
    bench.front_end.negotiate_like_qemu(&bench.guest.session()).unwrap();
    bench.assert_frames_pass();
    let last = bench.guest.mem.regions()[1].info;
    for _ in 0..5 {
        assert_eq!(bench.ask(Message::rem_mem_reg(&last)), Answer::Ack);
        bench.assert_frames_pass();
        let mem = std::sync::Arc::clone(&bench.guest.mem);
        assert_eq!(bench.ask(Message::add_mem_reg(&mem.regions()[1])), Answer::Ack);
        bench.assert_frames_pass();
    }
}

/// I-08. The used index decides: completion is in order, so it is where the guest has its frames from.
#[test]
fn base_that_differs_from_the_used_index_is_counted_and_not_used() {
    for off in [1, 5, 255, 0x8000] {
        let mut bench = Bench::running(1);
        bench.assert_frames_pass();
        bench.reconnect();
        for driver in &mut bench.guest.pairs {
            driver.rx.base = driver.rx.used_idx();
            driver.tx.base = driver.tx.used_idx().wrapping_add(off);
        }

        bench.start();

        assert_eq!(bench.backend.counter(0, "rings_resumed_off_base"), 1, "base off by {off}");
        bench.assert_frames_pass();
        assert_eq!(bench.front_end.get_vring_base(1), Ok(2));
    }
}

///
#[test]
fn avail_index_too_far_ahead_of_the_used_index_breaks_the_ring_and_a_new_set_up_heals_it() {
    let mut bench = Bench::running(1);
    assert!(bench.front_end.get_vring_base(1).is_ok());
    let tx = &bench.guest.pairs[0].tx;
    tx.write_avail_idx(tx.used_idx().wrapping_add(tx.size + 1));
    let (kick, err) = (tx.kick.try_clone().unwrap(), tx.err.try_clone().unwrap());
    assert_eq!(bench.ask(Message::set_vring_err(1, fd_of(&err))), Answer::Ack);

    let answer = bench.ask(Message::set_vring_kick(1, fd_of(&kick)));

    assert_eq!(answer, Answer::Nack(1));
    assert_eq!(err.read().unwrap(), 1, "The error descriptor is signalled once");
    bench.guest.assert_rx(0, &bench.backend.taps[0]);
    let tx = &bench.guest.pairs[0].tx;
    tx.write_avail_idx(tx.used_idx());
    bench.start_ring(1);
    bench.assert_frames_pass();
}

/// I-06: after a restart with fewer queue pairs there are rings that nothing runs any more. They are not refused, as
/// a front-end that takes the queue number for pairs sets such up at any time; what passes frames goes on.
#[test]
fn ring_beyond_the_queue_pairs_stays_idle_without_harm() {
    let backend = InProcess::start(1);
    let mut bench = Bench::before(backend, Guest::new(3, 0));
    let spec = SessionSpec { protocol: u64::MAX, ..bench.guest.session() };
    bench.front_end.negotiate_like_cloud_hypervisor(&spec).unwrap();
    let idle = &mut bench.guest.pairs[2];

    idle.send(&VnetHdr::default(), &[0; 60]);

    bench.guest.assert_tx(0, &bench.backend.taps[0]);
    bench.guest.assert_rx(0, &bench.backend.taps[0]);
    let tx = &bench.guest.pairs[2].tx;
    assert_eq!(bench.guest.mem.load_u16(tx.addrs.used + 2, Ordering::Acquire), 0, "An idle ring is not served");
    let bases: Vec<_> = (2..6).map(|index| bench.front_end.get_vring_base(index)).collect();
    assert_eq!(bases, [Ok(0); 4]);
}

///
#[test]
fn guest_without_version_1_is_refused() {
    let bench = Bench::connected(1);
    let protocol = bench.front_end.get_u64(&Message::get_protocol_features()).unwrap();
    assert!(bench.front_end.tell(&Message::set_protocol_features(protocol)));
    assert_eq!(bench.ask(Message::set_features(feature::PROTOCOL_FEATURES | feature::CSUM)), Answer::Nack(1));
    assert_eq!(bench.ask(Message::set_features(feature::PROTOCOL_FEATURES)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_features(BASE)), Answer::Ack);
}

/// Without protocol features there is no message to enable a ring.
#[test]
fn rings_run_without_protocol_features_and_without_enables() {
    let mut bench = Bench::connected(1);
    let front_end = &bench.front_end;
    assert!(front_end.tell(&Message::set_owner()));
    assert!(front_end.tell(&Message::set_features(feature::VERSION_1)));
    assert!(front_end.tell(&Message::set_mem_table(&bench.guest.mem)));
    for (index, ring) in (0..).zip(bench.guest.session().rings) {
        assert!(front_end.tell(&Message::set_vring_num(index, 256)));
        assert!(front_end.tell(&Message::set_vring_addr(index, ring)));
        assert!(front_end.tell(&Message::set_vring_call(u64::from(index), fd_of(&ring.call))));
        assert!(front_end.tell(&Message::set_vring_kick(u64::from(index), fd_of(&ring.kick))));
    }

    bench.assert_frames_pass();
}
