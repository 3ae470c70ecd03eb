//! Unfinished frames both ways: as the guest negotiated, right whoever finishes them.

use std::net::UdpSocket;

use crate::common::frames::{
    self, Ends, L4Csum, Stamp, TCP_CSUM_OFFSET, UDP_CSUM_OFFSET, checksums_are_right, payload,
};
use crate::common::netns::segment_datagrams;
use crate::common::split;
use crate::common::virtio::{VnetHdr, feature, gso, net_flag};
use crate::common::{PATIENCE, skip};
use crate::{CSUM, Kind, MAC, Place, TSO, guest_with};

const USO: u64 = TSO | feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO;
const FEATURES: [u64; 5] = [0, feature::MRG_RXBUF, CSUM, TSO, USO];
/// Of a TCP segment over IPv6 that has no options.
const MSS: u16 = 1428;
const LARGE: usize = 40_000;

/// A socket of the host's own stack, behind the other end.
fn host_socket(place: &Place) -> UdpSocket {
    place.namespace.ip("addr add 10.99.0.1/24 dev outside");
    place.namespace.ip(&format!("neigh add 10.99.0.2 lladdr {MAC} dev outside"));
    let socket = place.namespace.within(|| UdpSocket::bind("10.99.0.1:5000").unwrap());
    socket.connect("10.99.0.2:4000").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The frames that a frame with its header stands for, all checksums right.
fn meant_by(header: &VnetHdr, frame: &[u8], headers: usize) -> Vec<Vec<u8>> {
    // What the kernel says of the headers' length is not exact.
    let hdr_len = if header.gso_type == gso::NONE { 0 } else { headers as u16 };
    let meant = split::split(&VnetHdr { num_buffers: 0, hdr_len, ..*header }, frame).unwrap();
    assert!(meant.iter().all(|frame| checksums_are_right(frame)), "{header:?}");
    meant
}

#[test]
fn datagrams_of_a_local_socket_come_right() {
    const SIZE: usize = 1200;
    for kind in [Kind::Veth, Kind::Macvlan("bridge")] {
        let Some(place) = Place::new("datagrams_of_a_local_socket_come_right") else { return };
        let name = place.make(kind);
        let socket = host_socket(&place);
        for features in FEATURES {
            let _backend = place.start(&["--interface", name]);
            let mut guest = guest_with(1, features);
            let _front_end = place.connect(&guest);
            segment_datagrams(&socket, 0);
            for seq in 0..20 {
                let content = payload(Stamp { stream: 1, seq }, 17 + 70 * seq as usize);
                socket.send(&content).unwrap();
                let (header, frame) = guest.pairs[0].recv(PATIENCE).expect("a datagram");
                let is_left = header.flags & net_flag::NEEDS_CSUM != 0;
                assert_eq!(is_left, features & feature::GUEST_CSUM != 0, "{header:?}");
                assert_eq!(meant_by(&header, &frame, 42)[0][42..], content);
            }
            segment_datagrams(&socket, SIZE);
            let content = payload(Stamp { stream: 2, seq: 0 }, LARGE);
            socket.send(&content).unwrap();
            let mut came = Vec::new();
            while came.len() < content.len() {
                let (header, frame) = guest.pairs[0].recv(PATIENCE).expect("a part of the datagrams");
                assert_eq!(header.gso_type == gso::UDP_L4, features == USO, "{header:?}");
                assert!(header.flags & net_flag::NEEDS_CSUM == 0 || features & feature::GUEST_CSUM != 0);
                for frame in meant_by(&header, &frame, 42) {
                    assert_eq!(frame.len() - 42, SIZE.min(content.len() - came.len()));
                    came.extend_from_slice(&frame[42..]);
                }
            }
            assert!(came == content);
        }
    }
}

#[test]
fn large_tcp_frames_come_whole_or_cut_as_negotiated() {
    let Some(place) = Place::new("large_tcp_frames_come_whole_or_cut_as_negotiated") else { return };
    for features in FEATURES {
        let _backend = place.start(&["--interface", "card"]);
        let mut guest = guest_with(1, features);
        let _front_end = place.connect(&guest);
        let outside = place.outside_vnet();
        // Of 65535 bytes is the largest that goes over a veth pair whole.
        for (is_ipv4, len) in [(true, LARGE), (false, LARGE), (true, 65_535 - 54), (true, 3000), (false, 1500)] {
            let (header, frame) = large_tcp(&Ends::RX, is_ipv4, len);
            outside.send_vnet(&header, &frame).unwrap();
            let wanted = split::split(&header, &frame).unwrap();
            let mut came = Vec::new();
            while came.len() < wanted.len() {
                let (got, frame) = guest.pairs[0].recv(PATIENCE).expect("a part of the frame");
                assert_eq!(got.gso_type != gso::NONE, features & feature::GUEST_TSO4 != 0, "{got:?}");
                assert!(got.flags & net_flag::NEEDS_CSUM == 0 || features & feature::GUEST_CSUM != 0);
                came.extend(meant_by(&got, &frame, usize::from(header.hdr_len)));
            }
            assert!(came == wanted, "{len} bytes, IPv4: {is_ipv4}");
        }
    }
}

/// A TCP frame to be segmented, with its header.
fn large_tcp(ends: &Ends, is_ipv4: bool, len: usize) -> (VnetHdr, Vec<u8>) {
    let content = payload(Stamp { stream: 1, seq: 0 }, len);
    let (gso_type, l4) = if is_ipv4 { (gso::TCPV4, 34) } else { (gso::TCPV6, 54) };
    let build = if is_ipv4 { frames::tcp4 } else { frames::tcp6 };
    let header = VnetHdr {
        flags: net_flag::NEEDS_CSUM,
        gso_type,
        hdr_len: l4 + 20,
        gso_size: MSS,
        csum_start: l4,
        csum_offset: TCP_CSUM_OFFSET,
        num_buffers: 0,
    };
    (header, build(ends, 1, &content, L4Csum::Partial))
}

fn unfinished_datagram(content: &[u8]) -> (VnetHdr, Vec<u8>) {
    let header =
        VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: UDP_CSUM_OFFSET, ..VnetHdr::default() };
    (header, frames::udp4(&Ends::TX, content, L4Csum::Partial))
}

/// The interface finishes them, or leaves it to the other end.
#[test]
fn unfinished_frames_of_the_guest_leave_right() {
    for kind in [Kind::Veth, Kind::Macvlan("bridge")] {
        let Some(place) = Place::new("unfinished_frames_of_the_guest_leave_right") else { return };
        let name = place.make(kind);
        let _backend = place.start(&["--interface", name]);
        let mut guest = guest_with(1, USO);
        let _front_end = place.connect(&guest);
        let outside = place.outside_vnet();
        let content = payload(Stamp { stream: 1, seq: 0 }, 999);
        let large_udp = {
            let (header, frame) = unfinished_datagram(&payload(Stamp { stream: 2, seq: 0 }, LARGE));
            (VnetHdr { gso_type: gso::UDP_L4, hdr_len: 42, gso_size: 1200, ..header }, frame)
        };
        let sent = [
            unfinished_datagram(&content),
            large_tcp(&Ends::TX, true, LARGE),
            large_tcp(&Ends::TX, false, LARGE),
            large_tcp(&Ends::TX, true, 3000),
            large_udp,
        ];
        for is_offloaded in [true, false] {
            if !is_offloaded {
                finish_on_the_host(&place);
            }
            for (header, frame) in &sent {
                let wanted = split::split(header, frame).unwrap();
                guest.pairs[0].send(header, frame);
                let mut came = Vec::new();
                while came.len() < wanted.len() {
                    let (got, frame) = outside.recv_vnet(PATIENCE).expect("a frame outside");
                    assert!(is_offloaded || got.flags & net_flag::NEEDS_CSUM == 0, "{got:?}");
                    came.extend(meant_by(&got, &frame, usize::from(header.hdr_len)));
                }
                assert!(came == wanted, "{header:?}");
            }
        }
    }
}

/// Takes the interface what it can finish by itself, so that the kernel has to.
fn finish_on_the_host(place: &Place) {
    /// Checksums, TCP segmentation, and the kernel's own, which lets a frame stay whole until it is with the driver
    /// (`ETHTOOL_STXCSUM`, `ETHTOOL_STSO` and `ETHTOOL_SGSO` of linux/ethtool.h).
    const SWITCHES: [u32; 3] = [0x17, 0x1f, 0x24];
    SWITCHES.iter().for_each(|switch| place.namespace.set_ethtool("card", *switch, 0));
}

/// What goes as one is cut again as it was, into a socket behind the other end.
#[test]
fn coalesced_datagrams_arrive_as_they_were_sent() {
    const DATAGRAMS: u32 = 50;
    let Some(place) = Place::new("coalesced_datagrams_arrive_as_they_were_sent") else { return };
    let mut backend = place.start(&["--interface", "card"]);
    let mut guest = guest_with(1, CSUM | feature::EVENT_IDX);
    let _front_end = place.connect(&guest);
    let socket = host_socket(&place);
    let content = |seq| payload(Stamp { stream: 1, seq }, 1400 - 300 * usize::from(seq % 10 == 9));
    for seq in 0..DATAGRAMS {
        let (header, frame) = unfinished_datagram(&content(seq));
        guest.pairs[0].queue(&header, &frame);
    }
    guest.pairs[0].tx.publish_and_kick();
    let mut bytes = [0; 2000];
    for seq in 0..DATAGRAMS {
        let len = socket.recv(&mut bytes).expect("a datagram");
        assert!(bytes[..len] == content(seq), "datagram {seq} is another one");
    }
    backend.wait_counter("tx_frames", u64::from(DATAGRAMS));
    let kernel_can = !backend.log().contains("Only TCP frames are coalesced");
    assert_eq!(backend.counters(1)[0]["tx_coalesced_frames"], if kernel_can { u64::from(DATAGRAMS) } else { 0 });
}

/// Datagrams of a socket in a VXLAN over the other end: one by one they come; to be cut here, nobody could.
#[test]
fn datagrams_in_a_tunnel_come_only_if_the_host_cuts_them() {
    const SIZE: usize = 1200;
    /// What docs/devices.md has the operator switch off.
    const SWITCHES: [&str; 7] = [
        "tx-udp_tnl-segmentation",
        "tx-udp_tnl-csum-segmentation",
        "tx-gre-segmentation",
        "tx-gre-csum-segmentation",
        "tx-ipxip4-segmentation",
        "tx-ipxip6-segmentation",
        "tx-sctp-segmentation",
    ];
    let test = "datagrams_in_a_tunnel_come_only_if_the_host_cuts_them";
    for features in FEATURES {
        let Some(place) = Place::new(test) else { return };
        host_socket(&place);
        if !place.namespace.try_ip("link add vx type vxlan id 5 remote 10.99.0.2 dstport 4789 dev outside") {
            return skip(test, "this kernel has no VXLAN");
        }
        place.namespace.ip("addr add 10.98.0.1/24 dev vx");
        place.namespace.ip("link set vx up");
        place.namespace.ip(&format!("neigh add 10.98.0.2 lladdr {MAC} dev vx"));
        let socket = place.namespace.within(|| UdpSocket::bind("10.98.0.1:5000").unwrap());
        socket.connect("10.98.0.2:4000").unwrap();
        let mut backend = place.start(&["--interface", "card"]);
        let mut guest = guest_with(1, features);
        let _front_end = place.connect(&guest);
        segment_datagrams(&socket, SIZE);
        let content = payload(Stamp { stream: 1, seq: 0 }, 10 * SIZE);
        socket.send(&content).unwrap();
        backend.wait_counter("rx_drop_tunnel", 1);
        let off = SWITCHES.into_iter().flat_map(|switch| [switch, "off"]);
        let switched = place.namespace.command("ethtool").args(["-K", "outside"]).args(off).status();
        if switched.is_err() {
            return skip(test, "there is no ethtool");
        }
        socket.send(&content).unwrap();
        let mut came = Vec::new();
        while came.len() < content.len() {
            let (header, frame) = guest.pairs[0].recv(PATIENCE).expect("a datagram in the tunnel");
            assert_eq!(header.gso_type, gso::NONE);
            came.extend_from_slice(&frame[frame.len() - SIZE..]);
        }
        assert!(came == content);
    }
}
