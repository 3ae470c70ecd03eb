//! Unfinished frames both ways, as negotiated: what the kernel is asked for, and what it is given.

use crate::common::bench::{BASE, Guest};
use crate::common::driver::Received;
use crate::common::frames::{self, Ends, L4Csum, Stamp, TCP_CSUM_OFFSET, checksums_are_right, find_stamp, payload};
use crate::common::frontend::{Answer, RawFrontend};
use crate::common::message::Message;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::virtio::{VnetHdr, feature, gso, net_flag};
use crate::common::{PATIENCE, fd_of};
use crate::{Place, TAP};

/// The payload of an unsegmented frame close to the largest.
const LARGE: usize = 65_000;
const MSS: u16 = 1448;
const CSUM: u64 = feature::CSUM | feature::GUEST_CSUM;
const TSO: u64 = CSUM | feature::HOST_TSO4 | feature::GUEST_TSO4 | feature::MRG_RXBUF;

fn needs_csum() -> VnetHdr {
    VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: TCP_CSUM_OFFSET, ..VnetHdr::default() }
}

fn needs_segmentation() -> VnetHdr {
    VnetHdr { gso_type: gso::TCPV4, hdr_len: 54, gso_size: MSS, ..needs_csum() }
}

fn tcp_frame(ends: &Ends, seq: u32, len: usize) -> Vec<u8> {
    frames::tcp4(ends, 1, &payload(Stamp { stream: 1, seq }, len), L4Csum::Partial)
}

fn place_with_tap() -> Place {
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    place
}

fn host(place: &Place) -> PacketSocket {
    place.wait_operational();
    PacketSocket::open_vnet_hdr(&place.namespace, TAP)
}

/// A guest with features and posted buffers.
fn guest_with(features: u64) -> Guest {
    let mut guest = Guest::new(1, features);
    if features & feature::MRG_RXBUF != 0 {
        guest.pairs[0].post_rx(128, 2048);
    } else {
        guest.pairs[0].post_rx(8, 66_000);
    }
    guest
}

/// Sends an unfinished frame of `len` bytes of payload towards the guest and takes what arrives for it there.
fn send_to_guest(guest: &mut Guest, host: &PacketSocket, header: &VnetHdr, len: usize) -> Received {
    host.send_vnet(header, &tcp_frame(&Ends::RX, 0, len)).unwrap();
    guest.pairs[0].recv_detailed(PATIENCE).expect("a frame in the guest")
}

#[test]
fn unsegmented_frame_of_64_kib_from_the_guest_arrives_as_one_on_the_host() {
    if !require_root("unsegmented_frame_of_64_kib_from_the_guest_arrives_as_one_on_the_host") {
        return;
    }
    let place = place_with_tap();
    let mut backend = place.start(&[]);
    let mut guest = guest_with(TSO);
    let _front_end = place.connect(&guest);
    let host = host(&place);

    guest.pairs[0].send(&needs_segmentation(), &tcp_frame(&Ends::TX, 7, LARGE));

    let (header, frame) = host.recv_vnet(PATIENCE).expect("a GSO frame on the host");
    assert_eq!((header.gso_type, header.gso_size), (gso::TCPV4, MSS));
    assert_eq!(frame.len(), 54 + LARGE);
    assert_eq!(find_stamp(&frame), Some(Ok(Stamp { stream: 1, seq: 7 })));
    // Counted before it is given back, and after the host has it.
    assert!(guest.pairs[0].wait_tx_done(PATIENCE));
    backend.wait_counter("tx_large_frames", 1);
}

#[test]
fn unsegmented_frame_of_64_kib_reaches_a_guest_that_takes_it_whole() {
    if !require_root("unsegmented_frame_of_64_kib_reaches_a_guest_that_takes_it_whole") {
        return;
    }
    let place = place_with_tap();
    let _backend = place.start(&[]);
    let mut guest = guest_with(TSO);
    let _front_end = place.connect(&guest);

    let got = send_to_guest(&mut guest, &host(&place), &needs_segmentation(), LARGE);

    assert_eq!((got.header.gso_type, got.header.gso_size), (gso::TCPV4, MSS));
    assert_eq!(usize::from(got.header.num_buffers), got.lens.len());
    assert_eq!(got.frame.len(), 54 + LARGE);
    assert_eq!(find_stamp(&got.frame), Some(Ok(Stamp { stream: 1, seq: 0 })));
}

#[test]
fn guest_without_checksum_offload_gets_finished_checksums() {
    if !require_root("guest_without_checksum_offload_gets_finished_checksums") {
        return;
    }
    let place = place_with_tap();
    let _backend = place.start(&[]);
    let mut guest = guest_with(0);
    let _front_end = place.connect(&guest);

    let got = send_to_guest(&mut guest, &host(&place), &needs_csum(), 1000);

    assert_eq!(got.header, VnetHdr { num_buffers: 1, ..VnetHdr::default() });
    assert!(checksums_are_right(&got.frame));
}

#[test]
fn guest_with_checksum_offload_gets_them_unfinished() {
    if !require_root("guest_with_checksum_offload_gets_them_unfinished") {
        return;
    }
    let place = place_with_tap();
    let _backend = place.start(&[]);
    let mut guest = guest_with(CSUM);
    let _front_end = place.connect(&guest);

    let got = send_to_guest(&mut guest, &host(&place), &needs_csum(), 1000);

    assert_eq!(got.header, VnetHdr { num_buffers: 1, ..needs_csum() });
    assert!(!checksums_are_right(&got.frame), "It is the guest's to finish");
}

#[test]
fn guest_without_segmentation_offload_gets_segments() {
    if !require_root("guest_without_segmentation_offload_gets_segments") {
        return;
    }
    for features in [0, CSUM, CSUM | feature::GUEST_TSO6] {
        let place = place_with_tap();
        let _backend = place.start(&[]);
        let mut guest = guest_with(features);
        let _front_end = place.connect(&guest);
        let host = host(&place);
        host.send_vnet(&needs_segmentation(), &tcp_frame(&Ends::RX, 0, 4000)).unwrap();

        for wanted in [1448, 1448, 4000 - 2 * 1448] {
            let got = guest.pairs[0].recv_detailed(PATIENCE).expect("a segment");
            assert_eq!(got.header.gso_type, gso::NONE, "features {features:#x}");
            assert_eq!(got.frame.len(), 54 + wanted, "features {features:#x}");
            let finished = got.header.flags & net_flag::NEEDS_CSUM == 0;
            assert_eq!(finished, features & feature::GUEST_CSUM == 0, "features {features:#x}");
            assert_eq!(checksums_are_right(&got.frame), finished, "features {features:#x}");
        }
    }
}

/// G-04. Within one session, as at a reboot of the guest, and from session to session.
#[test]
fn offloads_follow_what_is_negotiated_next() {
    if !require_root("offloads_follow_what_is_negotiated_next") {
        return;
    }
    let place = place_with_tap();
    let _backend = place.start(&[]);
    let host = host(&place);
    let mut front_end: Option<RawFrontend> = None;
    for (round, features) in [TSO, 0, CSUM, TSO, 0, TSO].into_iter().enumerate() {
        let mut guest = guest_with(features);
        match front_end.as_ref().filter(|_| round % 2 == 1) {
            Some(front_end) => renegotiate(front_end, &guest, features),
            None => {
                front_end.take().into_iter().for_each(RawFrontend::disconnect);
                front_end = Some(place.connect(&guest));
            }
        }
        let got = send_to_guest(&mut guest, &host, &needs_csum(), 1000);
        let unfinished = got.header.flags & net_flag::NEEDS_CSUM != 0;
        assert_eq!(unfinished, features & feature::GUEST_CSUM != 0, "round {round}");
        let got = send_to_guest(&mut guest, &host, &needs_segmentation(), 2000);
        let whole = got.frame.len() == 54 + 2000;
        assert_eq!(whole, features & feature::GUEST_TSO4 != 0, "round {round}");
        if !whole {
            assert!(guest.pairs[0].recv(PATIENCE).is_some(), "The second segment");
        }
    }
}

/// Stops the rings and sets them up anew, with other features and another guest's memory.
fn renegotiate(front_end: &RawFrontend, guest: &Guest, features: u64) {
    front_end.stop_like_qemu(2).unwrap();
    let must = |message| assert_eq!(front_end.ask(message), Answer::Ack);
    must(Message::set_features(BASE | features));
    must(Message::set_mem_table(&guest.mem));
    for (index, ring) in (0..).zip(guest.session().rings) {
        must(Message::set_vring_num(index, u32::from(ring.size)));
        must(Message::set_vring_base(index, 0));
        must(Message::set_vring_addr(index, ring));
        must(Message::set_vring_call(index.into(), fd_of(&ring.call)));
        must(Message::set_vring_kick(index.into(), fd_of(&ring.kick)));
    }
}

/// H-03. Without the feature the driver may not ask for it: dropped, counted, and the ring goes on.
#[test]
fn offload_that_the_guest_did_not_negotiate_is_not_given_to_the_kernel() {
    if !require_root("offload_that_the_guest_did_not_negotiate_is_not_given_to_the_kernel") {
        return;
    }
    let place = place_with_tap();
    let mut backend = place.start(&[]);
    let mut guest = guest_with(0);
    let _front_end = place.connect(&guest);
    let host = host(&place);
    for header in [needs_csum(), needs_segmentation()] {
        guest.pairs[0].send(&header, &tcp_frame(&Ends::TX, 0, 4000));
    }
    let good = frames::test_frame(&Ends::TX, Stamp { stream: 2, seq: 0 }, 100);
    guest.pairs[0].send(&VnetHdr::default(), &good);

    assert_eq!(host.recv_vnet(PATIENCE).expect("the good frame").1, good);
    backend.wait_counter("tx_drop_bad_header", 2);
}

/// H-05. The host would be busy with such frames for long; an operator may allow them.
#[test]
fn frame_of_many_segments_reaches_the_kernel_only_where_the_operator_allows_it() {
    if !require_root("frame_of_many_segments_reaches_the_kernel_only_where_the_operator_allows_it") {
        return;
    }
    let many = VnetHdr { gso_size: 100, ..needs_segmentation() };
    let frame = tcp_frame(&Ends::TX, 0, 18_100);
    for (options, is_allowed) in [(&[][..], false), (&["--max-segments", "181"], true)] {
        let place = place_with_tap();
        let mut backend = place.start(options);
        let mut guest = guest_with(TSO);
        let _front_end = place.connect(&guest);
        let host = host(&place);
        for _ in 0..3 {
            guest.pairs[0].send(&many, &frame);
        }
        let good = frames::test_frame(&Ends::TX, Stamp { stream: 2, seq: 0 }, 100);
        guest.pairs[0].send(&VnetHdr::default(), &good);

        if is_allowed {
            for _ in 0..3 {
                assert_eq!(host.recv_vnet(PATIENCE).expect("a frame of many segments"), (many, frame.clone()));
            }
        }
        assert_eq!(host.recv_vnet(PATIENCE).expect("the good frame").1, good);
        if !is_allowed {
            backend.wait_line("to be cut into 181 segments; --max-segments allows 180 (1366 at most)");
            backend.wait_counter("tx_drop_too_many_segments", 3);
        }
        let log = backend.log();
        assert_eq!(log.matches("segments; --max-segments allows").count(), usize::from(!is_allowed), "{log}");
    }
}
