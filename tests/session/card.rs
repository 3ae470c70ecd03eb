//! What concerns the network card: MTU, RARP, device status, resets, the configuration space.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vhost_user_net::nic::NicSetup;
use vhost_user_net::vhost_user::session::SessionOptions;
use vhost_user_net::virtqueue::QueueSize;

use crate::common::backend::InProcess;
use crate::common::bench::{BASE, Bench, Guest};
use crate::common::frontend::Answer;
use crate::common::message::{Message, request};
use crate::common::virtio::{VnetHdr, feature, protocol, status};
use crate::common::{PATIENCE, QUIET, wait_readable};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const CONFIG_LEN: u32 = 24;

fn with_mac_and_mtu() -> Bench {
    let setup = NicSetup { mac: Some(MAC), mtu: Some(9000), ..NicSetup::default() };
    let bench = Bench::before(InProcess::start_as(2, setup), Guest::new(2, 0));
    bench.negotiate();
    bench
}

/// R-ZERO
#[test]
fn configuration_space_reads_the_same_at_each_offset_and_size() {
    let bench = with_mac_and_mtu();
    let whole = bench.front_end.get_config(0, CONFIG_LEN).unwrap();

    let mut wanted = MAC.to_vec();
    // Link up; at most two queue pairs; MTU 9000; speed and duplex unknown.
    wanted.extend([1, 0, 2, 0, 0x28, 0x23, 0xff, 0xff, 0xff, 0xff, 0xff]);
    wanted.resize(CONFIG_LEN as usize, 0);
    assert_eq!(whole, wanted);
    for offset in 0..CONFIG_LEN {
        for size in 1..=CONFIG_LEN - offset {
            let part = bench.front_end.get_config(offset, size).unwrap();
            assert_eq!(part, wanted[offset as usize..(offset + size) as usize], "{offset} {size}");
        }
    }
}

/// User Mode Linux reads from offset 0 with growing sizes, and sends no room for the answer.
#[test]
fn configuration_space_is_read_without_room_in_the_question() {
    let bench = with_mac_and_mtu();
    for size in 1..=CONFIG_LEN {
        let body = [0, size, 0].map(u32::to_ne_bytes).concat();
        let reply = bench.front_end.get(&Message::new(request::GET_CONFIG, body)).unwrap();
        assert_eq!(reply.body.len(), 12 + size as usize);
    }
}

/// U-50. OpenVMM reads all that there can be, once.
#[test]
fn configuration_space_behind_its_end_is_zeros() {
    let bench = with_mac_and_mtu();
    let mut wanted = bench.front_end.get_config(0, CONFIG_LEN).unwrap();
    wanted.resize(256, 0);
    for (offset, size) in [(0, 25), (24, 1), (23, 2), (12, 13), (0, 60), (0, 256), (255, 1), (100, 156)] {
        let part = bench.front_end.get_config(offset, size).unwrap();
        assert_eq!(part, wanted[offset as usize..(offset + size) as usize], "{offset} {size}");
    }
}

/// U-50
#[test]
fn configuration_space_beyond_what_can_be_read_is_answered_with_nothing() {
    let bench = with_mac_and_mtu();
    for (offset, size) in [(0, 0), (0, 257), (256, 1), (255, 2), (0xffff_ff00, 0x200), (u32::MAX, 1), (1, 4000)] {
        assert_eq!(bench.front_end.get_config(offset, size), Ok(Vec::new()), "{offset:#x} {size:#x}");
    }
    // The room for a read of 4 GiB cannot come along.
    let body = [0, u32::MAX, 0].map(u32::to_ne_bytes).concat();
    let reply = bench.front_end.get(&Message::new(request::GET_CONFIG, body)).unwrap();
    assert!(reply.body.is_empty(), "{:?}", reply.body);
    // A driver of VIRTIO 1 writes nothing there (VIRTIO 1.3, 5.1.4.2).
    assert_eq!(bench.ask(Message::set_config(0, 0, &MAC)), Answer::Nack(1));
    assert_eq!(bench.front_end.get_config(0, 6).unwrap(), MAC);
}

/// "Payload size MUST match" the question's, which may have room for more than it asks for.
#[test]
fn configuration_space_is_answered_in_the_size_of_the_question() {
    let bench = with_mac_and_mtu();
    for (room, size) in [(256, 6), (256, 256), (7, 6), (4084, 24)] {
        let mut body = [0, size, 0].map(u32::to_ne_bytes).concat();
        body.resize(12 + room, 0xa5);

        let reply = bench.front_end.get(&Message::new(request::GET_CONFIG, body.clone())).unwrap();

        assert_eq!(reply.body.len(), body.len(), "{room} {size}");
        assert_eq!(reply.body[..12], body[..12], "{room} {size}");
        let (asked, rest) = reply.body[12..].split_at(size as usize);
        assert_eq!(asked, bench.front_end.get_config(0, size).unwrap(), "{room} {size}");
        assert!(rest.iter().all(|byte| *byte == 0), "{room} {size}");
    }
}

#[test]
fn configuration_space_that_is_not_offered_is_not_read() {
    let options = SessionOptions { offers_config: false, queue_size_max: QueueSize::try_from(256).unwrap() };
    let setup = NicSetup::default();
    let mut bench = Bench::before(InProcess::start_with(1, setup, options), Guest::new(1, 0));

    let offered = bench.negotiate();

    assert_eq!(offered & protocol::CONFIG, 0);
    assert_eq!(bench.front_end.get_config(0, 6), Ok(Vec::new()));
    assert_eq!(bench.ask(Message::set_protocol_features(offered | protocol::CONFIG)), Answer::Nack(1));
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// vhost-user, "Suspended device state".
#[test]
fn news_of_the_configuration_space_wait_until_a_ring_runs() {
    let setup = NicSetup { has_control_queue: true, ..NicSetup::default() };
    let bench = Bench::before(InProcess::start_as(1, setup), Guest::new(1, 0));
    bench.negotiate();
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    assert_eq!(bench.ask(Message::set_backend_req_fd(theirs.as_fd())), Answer::Ack);
    assert!(!wait_readable(&channel, QUIET), "no ring runs");

    bench.start_ring(0);

    assert!(wait_readable(&channel, PATIENCE), "the first ring runs");
    let mut news = [0; 12];
    channel.read_exact(&mut news).unwrap();
    assert_eq!(news, *[2_u32, 1, 0].map(u32::to_ne_bytes).as_flattened());
    bench.start_ring(1);
    assert!(!wait_readable(&channel, QUIET), "told once");
    assert_eq!(bench.ask(Message::set_backend_req_fd(theirs.as_fd())), Answer::Ack);
    assert!(wait_readable(&channel, PATIENCE), "rings run");
}

#[test]
fn queue_larger_than_permitted_is_refused() {
    let options = SessionOptions { offers_config: true, queue_size_max: QueueSize::try_from(256).unwrap() };
    let setup = NicSetup::default();
    let mut bench = Bench::before(InProcess::start_with(1, setup, options), Guest::new(1, 0));
    bench.negotiate();
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_num(0, 512)), Answer::Nack(1));
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

#[test]
fn mac_is_offered_only_if_it_was_given() {
    let has_mac = |bench: &Bench| bench.front_end.get_u64(&Message::get_features()).unwrap() & feature::MAC != 0;
    assert!(has_mac(&with_mac_and_mtu()));
    assert!(!has_mac(&Bench::connected(1)));
}

#[test]
fn mtu_from_the_front_end_is_what_the_guest_reads() {
    let bench = with_mac_and_mtu();
    for mtu in [68, 1280, 1500, 65535] {
        assert_eq!(bench.ask(Message::set_mtu(mtu)), Answer::Ack, "{mtu}");
        assert_eq!(bench.front_end.get_config(10, 2).unwrap(), (mtu as u16).to_le_bytes());
    }
    for mtu in [0, 67, 65536, 1 << 40, u64::MAX] {
        assert_eq!(bench.ask(Message::set_mtu(mtu)), Answer::Nack(1), "{mtu}");
    }
    assert_eq!(bench.front_end.get_config(10, 2).unwrap(), [0xff, 0xff]);
}

#[test]
fn rarp_request_puts_a_rarp_frame_of_the_guest_on_the_tap() {
    let mut bench = Bench::running(1);

    assert_eq!(bench.ask(Message::send_rarp(MAC)), Answer::Ack);

    let (header, frame) = bench.backend.taps[0].recv(PATIENCE).expect("a RARP frame");
    assert_eq!(header, VnetHdr::default());
    assert_eq!(frame.len(), 60);
    // To everybody, from the guest; RFC 903: Ethernet, IPv4, "request reverse" for the guest itself.
    assert_eq!(frame[..6], [0xff; 6]);
    assert_eq!(frame[6..12], MAC);
    assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!(frame[22..42], [&MAC[..], &[0; 4], &MAC, &[0; 4]].concat());
    assert_eq!(frame[42..], [0; 18]);
    bench.assert_frames_pass();
}

#[test]
fn device_status_is_remembered_and_has_eight_bits() {
    let bench = Bench::negotiated(1);
    for bits in [status::ACKNOWLEDGE, status::ACKNOWLEDGE | status::DRIVER, 0x80] {
        assert_eq!(bench.ask(Message::set_status(bits)), Answer::Ack);
        assert_eq!(bench.front_end.get_u64(&Message::get_status()), Ok(bits.into()));
    }
    assert_eq!(bench.ask(Message::u64(request::SET_STATUS, 0x100)), Answer::Nack(1));
    assert_eq!(bench.front_end.get_u64(&Message::get_status()), Ok(0x80));
}

/// U-60
#[test]
fn reset_in_every_state_stops_the_rings_and_a_new_set_up_works() {
    type Reset = fn() -> Message<'static>;
    let resets: [(&str, Reset); 2] =
        [("RESET_DEVICE", Message::reset_device), ("SET_STATUS 0", || Message::set_status(0))];
    type State = fn() -> Bench;
    let states: [(&str, State); 4] = [
        ("negotiated", || Bench::negotiated(1)),
        ("running", || Bench::running(1)),
        ("after frames", || {
            let mut bench = Bench::running(1);
            bench.assert_frames_pass();
            bench
        }),
        ("stopped", || {
            let bench = Bench::running(1);
            bench.front_end.stop_like_qemu(2).unwrap();
            bench
        }),
    ];
    for (reset_name, reset) in resets {
        for (state_name, state) in states {
            let mut bench = state();
            let used = bench.guest.pairs[0].tx.used_idx();

            assert_eq!(bench.ask(reset()), Answer::Ack, "{reset_name} {state_name}");
            assert_eq!(bench.ask(reset()), Answer::Ack, "{reset_name} {state_name} again");

            assert_eq!(bench.front_end.get_u64(&Message::get_status()), Ok(0));
            bench.guest.pairs[0].queue(&VnetHdr::default(), &[0; 60]);
            bench.guest.pairs[0].tx.publish();
            bench.guest.pairs[0].tx.kick();
            // QEMU asks for the position after the reset that belongs to it.
            assert_eq!(bench.front_end.get_vring_base(1), Ok(used.into()), "{reset_name} {state_name}");
            assert_eq!(bench.guest.pairs[0].tx.used_idx(), used, "The ring is stopped");
            // The features are gone: a ring does not start before they are settled anew.
            assert_ring_needs_features(&mut bench);
            let mut fresh = Guest::new(1, 0);
            std::mem::swap(&mut bench.guest, &mut fresh);
            assert_eq!(bench.ask(Message::set_features(BASE)), Answer::Ack);
            assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
            (0..2).for_each(|index| bench.start_ring(index));
            bench.assert_frames_pass();
        }
    }
}

fn assert_ring_needs_features(bench: &mut Bench) {
    bench.start_ring(1);
    assert_eq!(bench.ask(Message::set_vring_enable(1, 1)), Answer::Ack);
    bench.guest.pairs[0].tx.kick();
    assert!(bench.backend.taps[0].recv(QUIET).is_none());
    // It would start with the features; to stop it is to forget its kick.
    assert!(bench.front_end.get_vring_base(1).is_ok());
}
