//! A guest's stream of datagrams into a socket of the host: merged on the way, and what was sent.

use std::net::UdpSocket;
use std::time::Duration;

use crate::common::PATIENCE;
use crate::common::bench::Guest;
use crate::common::frames::{self, Ends, HOST_MAC, L4Csum, Stamp, payload};
use crate::common::netns::{TapSpec, require_root};
use crate::common::virtio::{VnetHdr, feature, net_flag};
use crate::{Place, TAP};

const DATAGRAMS: u32 = 50;

/// Sends datagrams of the guest to a socket behind the TAP; tells how many of them went together with others.
fn stream(options: &[&str]) -> u64 {
    let place = Place::new();
    let mac = HOST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let spec = TapSpec { mac: Some(&mac), addr: Some("10.99.0.1/24"), ..TapSpec::new(TAP) };
    place.namespace.add_tap(&spec);
    let mut backend = place.start(options);
    let mut guest = Guest::new(1, feature::CSUM | feature::EVENT_IDX);
    let _front_end = place.connect(&guest);
    place.wait_operational();
    let socket = place.namespace.within(|| UdpSocket::bind("10.99.0.1:5000").unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHdr::default() };
    let payload_of = |seq| payload(Stamp { stream: 1, seq }, 1400 - 300 * usize::from(seq % 10 == 9));
    for seq in 0..DATAGRAMS {
        guest.pairs[0].queue(&header, &frames::udp4(&Ends::TX, &payload_of(seq), L4Csum::Partial));
    }
    guest.pairs[0].tx.publish_and_kick();
    let mut bytes = [0; 2000];
    for seq in 0..DATAGRAMS {
        let (len, _) = socket.recv_from(&mut bytes).expect("a datagram");
        assert!(bytes[..len] == payload_of(seq), "datagram {seq} is another one");
    }
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    assert!(socket.recv_from(&mut bytes).is_err(), "more datagrams than were sent");
    backend.wait_counter("tx_frames", u64::from(DATAGRAMS));
    backend.counters(1)[0]["tx_coalesced_frames"]
}

#[test]
fn datagrams_that_went_as_one_arrive_as_they_were_sent() {
    if !require_root("datagrams_that_went_as_one_arrive_as_they_were_sent") {
        return;
    }
    assert_eq!(stream(&[]), u64::from(DATAGRAMS));
    assert_eq!(stream(&["--coalesce", "on"]), u64::from(DATAGRAMS));
    assert_eq!(stream(&["--coalesce", "off"]), 0);
}
