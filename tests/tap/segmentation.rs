//! Datagrams that the host sends as one, to a guest that takes them one by one.

use std::net::UdpSocket;

use crate::common::PATIENCE;
use crate::common::bench::Guest;
use crate::common::frames::{HOST_MAC, checksums_are_right, mac_text};
use crate::common::netns::{TapSpec, require_root, segment_datagrams};
use crate::common::split;
use crate::common::virtio::{feature, gso};
use crate::{Place, TAP};

const SIZE: usize = 1200;
const DATAGRAMS: usize = 40;

/// Sends datagrams through a socket with UDP segmentation; returns what arrives in the guest, checksums completed.
fn sent_as_one(offloads: u64) -> (Vec<Vec<u8>>, u64) {
    let place = Place::new();
    let mac = mac_text(HOST_MAC);
    let spec = TapSpec { mac: Some(&mac), addr: Some("10.99.0.1/24"), ..TapSpec::new(TAP) };
    place.namespace.add_tap(&spec);
    place.namespace.ip("neigh add 10.99.0.2 lladdr 52:54:00:aa:00:01 dev tap0");
    let mut backend = place.start(&[]);
    let mut guest = Guest::new(1, feature::MRG_RXBUF | feature::EVENT_IDX | offloads);
    guest.pairs[0].post_rx(200, 1526);
    let _front_end = place.connect(&guest);
    place.wait_operational();
    let socket = place.namespace.within(|| UdpSocket::bind("10.99.0.1:5000").unwrap());
    socket.connect("10.99.0.2:4000").unwrap();
    segment_datagrams(&socket, SIZE);
    // The last one is shorter.
    let bytes: Vec<u8> = (0..SIZE * DATAGRAMS - 100).map(|at| (at * 7 % 251) as u8).collect();
    socket.send(&bytes).unwrap();
    let mut frames = Vec::new();
    let mut payload = Vec::new();
    while frames.len() < DATAGRAMS {
        let (header, frame) = guest.pairs[0].recv(PATIENCE).expect("all datagrams arrive");
        assert_eq!(header.gso_type, gso::NONE);
        assert!(header.flags == 0 || offloads & feature::GUEST_CSUM != 0, "{header:?}");
        let frame = split::complete(&header, &frame);
        assert!(checksums_are_right(&frame));
        payload.extend_from_slice(&frame[42..]);
        frames.push(frame);
    }
    assert!(payload == bytes);
    let counters = backend.counters(1).remove(0);
    (frames, counters["rx_segmented_frames"])
}

/// Whatever the guest left to be done, it gets the same datagrams.
#[test]
fn datagrams_sent_as_one_arrive_one_by_one() {
    if !require_root("datagrams_sent_as_one_arrive_one_by_one") {
        return;
    }
    let (with_checksums, cut) = sent_as_one(0);
    assert!(cut > 0, "the kernel gave none to be cut");
    let (left_to_the_guest, cut) = sent_as_one(feature::GUEST_CSUM);
    assert!(cut > 0, "the kernel gave none to be cut");
    assert_eq!(with_checksums.len(), left_to_the_guest.len());
}
