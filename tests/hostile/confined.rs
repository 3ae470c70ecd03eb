//! What a guest or a front-end must not make a thread of the process do: ask for what its sandbox forbids, or wait.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::Signal;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::common::bench::Guest;
use crate::common::frames::{Ends, L4Csum, Stamp, tcp4, test_frame};
use crate::common::frontend::Answer;
use crate::common::message::{Message, request};
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::place::Place;
use crate::common::split_ring::Buf;
use crate::common::virtio::{VnetHdr, feature, gso, net_flag};
use crate::common::{PATIENCE, fd_of, wait_until};
use crate::process::TAP;

/// G-07. A thousand pieces of memory in each entry: many entries popped for small frames, or for a large one. A longer list of
/// them than there is room for would have the allocator ask for mremap(2).
#[test]
fn buffers_of_single_bytes_do_not_end_the_process() {
    if !require_root("buffers_of_single_bytes_do_not_end_the_process") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let mut backend = place.start(&["--tap", TAP]);
    let offloads = feature::GUEST_CSUM | feature::GUEST_TSO4;
    let mut guest = Guest::new(1, feature::MRG_RXBUF | feature::INDIRECT_DESC | offloads);
    let front_end = place.connect(&guest);
    // Two at the same place do not make one longer piece.
    let table = vec![Buf::writable(guest.mem.alloc(64, 64), 1); 1024];
    let host = PacketSocket::open_vnet_hdr(&place.namespace, TAP);
    host.wait_operational();
    let csum = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
    let segmented = VnetHdr { gso_type: gso::TCPV4, hdr_len: 54, gso_size: 1448, ..csum };
    let large = tcp4(&Ends::RX, 1, &[7; 60_000], L4Csum::Partial);
    let small = test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, 100);
    let rx = &mut guest.pairs[0].rx;
    for round in 0..6 {
        while rx.free_descriptors() > 0 {
            rx.add_indirect(&table);
        }
        rx.publish_and_kick();
        let used = rx.used_idx();
        if round % 2 == 0 {
            (0..64).for_each(|_| host.send_vnet(&VnetHdr::default(), &small).unwrap());
        } else {
            host.send_vnet(&segmented, &large).unwrap();
        }
        wait_until("frames are in the buffers", || rx.used_idx() != used || backend.has_ended());
        assert!(!backend.has_ended(), "{}", backend.log());
        while rx.take_used().is_some() {}
    }
    assert!(front_end.is_alive());
}

/// A pipe without room, whose writing end is made blocking again after it was handed over.
fn full_pipe() -> (PipeReader, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    fcntl_setfl(&writer, fcntl_getfl(&writer).unwrap() | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    (reader, writer)
}

/// U-53. What a front-end handed over stays its own: it may make a descriptor wait that was made not to. Then its own card's
/// thread waits, and the process ends, as it does on a signal.
#[test]
fn front_end_that_has_a_write_wait_ends_its_own_process_alone() {
    if !require_root("front_end_that_has_a_write_wait_ends_its_own_process_alone") {
        return;
    }
    for signal in [None, Some(Signal::SIGTERM)] {
        let place = Place::new();
        place.namespace.add_tap(&TapSpec::new(TAP));
        let mut backend = place.start(&["--tap", TAP]);
        let guest = Guest::new(1, 0);
        let front_end = place.connect(&guest);
        let (_reader, err) = full_pipe();
        assert!(front_end.get_vring_base(1).is_ok());
        assert_eq!(front_end.ask(Message::u64(request::SET_VRING_ERR, 1).with_fd(err.as_fd())), Answer::Ack);
        fcntl_setfl(&err, fcntl_getfl(&err).unwrap() - OFlags::NONBLOCK).unwrap();
        guest.pairs[0].tx.write_avail_idx(0x4000);
        let kick = guest.pairs[0].tx.kick.try_clone().unwrap();
        front_end.send(&Message::set_vring_kick(1, fd_of(&kick)).with_need_reply()).unwrap();
        signal.into_iter().for_each(|signal| backend.signal(signal));
        let status = backend.wait_end(PATIENCE);
        assert_eq!(status.code(), Some(1), "{}", backend.log());
        assert!(backend.log().contains("did not answer in time"), "{}", backend.log());
    }
}
