//! Cutting frames for the guest, against the kernel: what it makes of a frame is what we make of it.
//!
//! The same frame goes to two TAPs in a namespace. One lets it through whole, and we finish it; the other has no
//! offloads, so that the kernel finishes it.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use common::frames::{self, Ends, GUEST_MAC, HOST_MAC, L4Csum, Stamp, payload};
use common::netns::{NetNs, PacketSocket, TapQueue, TapSpec, require_root, segment_datagrams};
use common::virtio::{VnetHdr, feature, gso, net_flag};
use common::{PATIENCE, QUIET, split};
use vhost_user_net::net::features::GuestOffloads;
use vhost_user_net::net::header::{PROTOCOL_HEADERS_MAX, VnetHeader, check_rx};
use vhost_user_net::net::segment::{Need, complete_checksum, plan};

/// `TUN_F_CSUM`, `TSO4`, `TSO6`, `TSO_ECN`, `USO4` and `USO6`.
const ALL_OFFLOADS: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40;
const FIN: u8 = 0x01;
const SYN_ACK: u8 = 0x12;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;

/// A TAP that gives frames whole and one that has the kernel finish them, with a socket that sends to each.
struct Taps {
    whole: TapQueue,
    finished: TapQueue,
    to_whole: PacketSocket,
    to_finished: PacketSocket,
    namespace: NetNs,
}

impl Taps {
    fn new() -> Self {
        let namespace = NetNs::new();
        let mac = frames::mac_text(HOST_MAC);
        let whole = TapSpec { mac: Some(&mac), addr: Some("10.99.0.1/24"), ..TapSpec::new("whole") };
        namespace.add_tap(&whole);
        namespace.add_tap(&TapSpec::new("finished"));
        let [whole, finished] = ["whole", "finished"].map(|name| namespace.open_tap(name, false));
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let set = unsafe { libc::ioctl(whole.fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, ALL_OFFLOADS) };
        assert_eq!(set, 0, "TUNSETOFFLOAD: {}", std::io::Error::last_os_error());
        let [to_whole, to_finished] = ["whole", "finished"].map(|name| PacketSocket::open_vnet_hdr(&namespace, name));
        let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        namespace.ip(&format!("neigh add 10.99.0.2 lladdr {mac} dev whole"));
        let taps = Self { whole, finished, to_whole, to_finished, namespace };
        wait_carried(&taps.to_whole, &taps.whole);
        wait_carried(&taps.to_finished, &taps.finished);
        taps
    }

    /// Sends a frame to both; compares what comes out. Tells how many frames it became.
    fn check(&self, header: &VnetHdr, frame: &[u8]) -> usize {
        self.to_whole.send_vnet(header, frame).unwrap();
        let (header, frame) = self.whole.read(PATIENCE).expect("the frame comes out");
        self.check_given(&header, &frame)
    }

    /// The same for a frame that the kernel has given us.
    fn check_given(&self, header: &VnetHdr, frame: &[u8]) -> usize {
        self.to_finished.send_vnet(header, frame).unwrap();
        let ours = [0, feature::GUEST_CSUM].map(|features| finish(header, frame, features));
        for index in 0..ours[0].len() {
            let (shown, wanted) = self.finished.read(PATIENCE).expect("as many frames as we make");
            assert_eq!((shown.flags & net_flag::NEEDS_CSUM, shown.gso_type), (0, gso::NONE));
            for ours in &ours {
                let got = one_zero(header, &wanted, &ours[index]);
                let at = got.iter().zip(&wanted).position(|(got, wanted)| got != wanted);
                assert_eq!((at, got.len()), (None, wanted.len()), "frame {index} of {header:?}");
            }
        }
        assert!(self.finished.read(Duration::ZERO).is_none(), "more frames than we make");
        assert_eq!(ours[0].len(), ours[1].len());
        ours[0].len()
    }
}

/// Waits until what is sent to a TAP comes out of it: the kernel drops it, without a word, until it has noticed that
/// the TAP was opened. Afterwards no probe is left.
fn wait_carried(socket: &PacketSocket, tap: &TapQueue) {
    const PROBES: u32 = 50;
    let seq_of = |frame: &[u8]| frames::find_stamp(frame).unwrap().unwrap().seq;
    for probe in 0..PROBES {
        let frame = frames::test_frame(&Ends::RX, Stamp { stream: 0, seq: probe }, 60);
        socket.send_vnet(&VnetHdr::default(), &frame).unwrap();
        if let Some((_, mut came)) = tap.read(QUIET) {
            // An earlier one may have come late; once one comes, those after it do.
            while seq_of(&came) != probe {
                came = tap.read(PATIENCE).expect("the later probes").1;
            }
            return;
        }
    }
    panic!("Nothing comes out of the TAP");
}

/// What the guest gets, its checksums completed as the guest would.
fn finish(header: &VnetHdr, frame: &[u8], features: u64) -> Vec<Vec<u8>> {
    let guest = GuestOffloads::of(features);
    let header = VnetHeader::from_bytes(&header.to_bytes());
    let shown = |header: VnetHeader, frame: &[u8]| {
        let header = VnetHdr::from_bytes(&header.to_bytes());
        assert_eq!(header.gso_type, gso::NONE);
        assert!(header.flags == 0 || features != 0, "{header:?}");
        split::complete(&header, frame)
    };
    if let Ok(header) = check_rx(header, guest) {
        return vec![shown(header, frame)];
    }
    match plan(header, frame, guest).unwrap() {
        Need::Checksum => {
            let mut frame = frame.to_vec();
            let header = complete_checksum(header, &mut frame).unwrap();
            vec![shown(header, &frame)]
        }
        Need::Segmentation(plan) => {
            let mut out = [0; PROTOCOL_HEADERS_MAX];
            let segment = |index| {
                let piece = plan.segment(frame, index, &mut out).unwrap();
                shown(piece.header, &[&out[..piece.headers_len], &frame[piece.payload]].concat())
            };
            (0..plan.segments()).map(segment).collect()
        }
    }
}

/// A TCP checksum of 0 may be 0xffff to the kernel, which is the same to TCP. To UDP it is not.
fn one_zero(header: &VnetHdr, wanted: &[u8], got: &[u8]) -> Vec<u8> {
    let mut got = got.to_vec();
    let at = usize::from(header.csum_start) + usize::from(frames::TCP_CSUM_OFFSET);
    let is_tcp = header.csum_offset == frames::TCP_CSUM_OFFSET;
    if is_tcp && got.get(at..at + 2) == Some(&[0, 0]) && wanted.get(at..at + 2) == Some(&[0xff, 0xff]) {
        got[at..at + 2].fill(0xff);
    }
    got
}

/// What its IP header has besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extra {
    Nothing,
    /// IPv4 options, or an IPv6 destination options header.
    Options,
    /// A source route, or a routing header: the destination is the next of two.
    Route,
}

/// A frame to be built.
#[derive(Clone, Debug)]
struct Frame {
    gso_type: u8,
    is_ipv4: bool,
    is_tcp: bool,
    payload: usize,
    size: u16,
    tags: usize,
    /// Of TCP.
    flags: u8,
    tcp_options: usize,
    ip_extra: Extra,
    fragment: u16,
}

const TCP4: Frame = Frame {
    gso_type: gso::TCPV4,
    is_ipv4: true,
    is_tcp: true,
    payload: 5000,
    size: 1448,
    tags: 0,
    flags: ACK,
    tcp_options: 0,
    ip_extra: Extra::Nothing,
    fragment: 0x4000,
};
const TCP6: Frame = Frame { gso_type: gso::TCPV6, is_ipv4: false, ..TCP4 };
const UDP4: Frame = Frame { gso_type: gso::UDP_L4, is_tcp: false, ..TCP4 };
const UDP6: Frame = Frame { is_ipv4: false, ..UDP4 };
const KINDS: [Frame; 4] = [TCP4, TCP6, UDP4, UDP6];

impl Frame {
    fn build(&self) -> (VnetHdr, Vec<u8>) {
        let mut l4 = self.transport();
        let l4_len = l4.len();
        let protocol = if self.is_tcp { 6 } else { 17 };
        let (mut ip, addresses) = self.network(protocol, l4_len);
        let csum_offset = if self.is_tcp { 16 } else { 6 };
        let sum = frames::checksum_add(0, &addresses);
        let sum = frames::checksum_add(sum, &[0, protocol, (l4_len >> 8) as u8, l4_len as u8]);
        l4[csum_offset..csum_offset + 2].copy_from_slice(&sum.to_be_bytes());
        ip.extend(l4);
        let ethertype = if self.is_ipv4 { frames::ETHERTYPE_IPV4 } else { frames::ETHERTYPE_IPV6 };
        let mut frame = frames::ethernet(&Ends::RX, ethertype, &ip);
        for tag in 0..self.tags {
            frame = frames::vlan(&frame, 5 + tag as u16);
        }
        let csum_start = frame.len() - l4_len;
        let hdr_len = frame.len() - self.payload;
        let header = VnetHdr {
            flags: net_flag::NEEDS_CSUM,
            gso_type: self.gso_type,
            hdr_len: hdr_len as u16,
            gso_size: self.size,
            csum_start: csum_start as u16,
            csum_offset: csum_offset as u16,
            num_buffers: 0,
        };
        (header, frame)
    }

    /// The transport header, without checksum, and the payload.
    fn transport(&self) -> Vec<u8> {
        let mut l4 = vec![0x13, 0x88, 0x0f, 0xa0];
        if self.is_tcp {
            // Over the end of the numbers.
            l4.extend((u32::MAX - 2000).to_be_bytes());
            l4.extend([0, 0, 0, 1, (5 + self.tcp_options as u8) << 4, self.flags, 0xff, 0xff, 0, 0, 0x12, 0x34]);
            l4.extend((0..self.tcp_options).flat_map(|_| [1, 1, 1, 1]));
        } else {
            l4.extend(((8 + self.payload) as u16).to_be_bytes());
            l4.extend([0, 0]);
        }
        l4.extend(payload(Stamp { stream: 1, seq: self.payload as u32 }, self.payload));
        l4
    }

    /// The network header, and the addresses of the pseudo-header.
    fn network(&self, protocol: u8, l4_len: usize) -> (Vec<u8>, Vec<u8>) {
        if self.is_ipv4 {
            // No operation; or a loose source route of one more address, which is the last.
            let extra = match self.ip_extra {
                Extra::Nothing => vec![],
                Extra::Options => vec![1; 8],
                Extra::Route => vec![131, 7, 4, 10, 99, 0, 7, 1],
            };
            let mut ip = vec![0x45 + extra.len() as u8 / 4, 3];
            ip.extend(((20 + extra.len() + l4_len) as u16).to_be_bytes());
            ip.extend([0xff, 0xfe]);
            ip.extend(self.fragment.to_be_bytes());
            ip.extend([64, protocol, 0, 0, 10, 99, 0, 1, 10, 99, 0, 2]);
            ip.extend(extra);
            let sum = !frames::checksum_add(0, &ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            let last = if self.ip_extra == Extra::Route { [10, 99, 0, 7] } else { [10, 99, 0, 2] };
            let addresses = [&ip[12..16], &last].concat();
            return (ip, addresses);
        }
        const DESTINATION_OPTIONS: u8 = 60;
        const ROUTING: u8 = 43;
        let address = |end| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 99, 0, end];
        let (next, extra, last) = match self.ip_extra {
            Extra::Nothing => (protocol, vec![], 2),
            // Six bytes of padding.
            Extra::Options => (DESTINATION_OPTIONS, vec![protocol, 0, 1, 4, 0, 0, 0, 0], 2),
            // Of the type for mobile hosts, with one address left (RFC 6275, "Type 2 Routing Header").
            Extra::Route => (ROUTING, [&[protocol, 2, 2, 1, 0, 0, 0, 0][..], &address(7)].concat(), 7),
        };
        let mut ip = vec![0x60, 0x30, 0, 7];
        ip.extend(((extra.len() + l4_len) as u16).to_be_bytes());
        ip.extend([next, 64]);
        [1, 2].into_iter().for_each(|end| ip.extend(address(end)));
        ip.extend(extra);
        (ip, [address(1), address(last)].concat())
    }
}

fn check_all(test: &str, frames: impl IntoIterator<Item = Frame>) {
    if !require_root(test) {
        return;
    }
    let taps = Taps::new();
    for frame in frames {
        let (header, bytes) = frame.build();
        let count = taps.check(&header, &bytes);
        assert_eq!(count, frame.payload.div_ceil(usize::from(frame.size)), "{frame:?}");
    }
}

#[test]
fn frames_of_all_lengths_are_cut_as_the_kernel_does() {
    let lengths =
        [(2896, 1448), (2897, 1448), (4344, 1448), (4343, 1447), (60_001, 1400), (3000, 999), (100, 51), (17, 16)];
    let frames = KINDS
        .into_iter()
        .flat_map(|kind| lengths.into_iter().map(move |(payload, size)| Frame { payload, size, ..kind.clone() }));
    check_all("frames_of_all_lengths_are_cut_as_the_kernel_does", frames);
}

#[test]
fn flags_and_options_of_tcp_are_spread_as_the_kernel_does() {
    let flags = [ACK | PSH, ACK | FIN, ACK | PSH | FIN, ACK | ECE, ACK | CWR, ACK | CWR | PSH | FIN];
    let kinds = [TCP4, TCP6, Frame { gso_type: gso::TCPV4 | gso::ECN, ..TCP4 }];
    let kinds = kinds.into_iter().chain([Frame { gso_type: gso::TCPV6 | gso::ECN, ..TCP6 }]);
    let frames = kinds.flat_map(|kind| {
        // From a header that says nothing of ECN the kernel knows nothing of it either, and takes CWR for that of RFC 3168.
        // But what has it without that is accurate ECN's, for which the header has no word.
        let is_told = kind.gso_type & gso::ECN != 0;
        let one = move |flags| [0, 3, 10].map(|tcp_options| Frame { flags, tcp_options, ..kind.clone() });
        flags.into_iter().filter(|flags| is_told || flags & CWR == 0).flat_map(one).collect::<Vec<_>>()
    });
    check_all("flags_and_options_of_tcp_are_spread_as_the_kernel_does", frames);
}

#[test]
fn vlan_tags_and_ip_options_are_kept_as_the_kernel_does() {
    let frames = KINDS.into_iter().flat_map(|kind| {
        let one =
            move |(tags, ip_extra)| [0, 0x4000].map(|fragment| Frame { tags, ip_extra, fragment, ..kind.clone() });
        use Extra::{Nothing, Options, Route};
        [(0, Options), (1, Nothing), (1, Options), (2, Nothing), (2, Options), (0, Route), (1, Route)]
            .into_iter()
            .flat_map(one)
            .collect::<Vec<_>>()
    });
    check_all("vlan_tags_and_ip_options_are_kept_as_the_kernel_does", frames);
}

#[test]
fn checksum_of_a_whole_frame_is_completed_as_the_kernel_does() {
    let frames = KINDS.into_iter().flat_map(|kind| {
        let one =
            move |payload| [0, 1].map(|tags| Frame { gso_type: gso::NONE, size: 1500, payload, tags, ..kind.clone() });
        [16, 17, 1000, 1399].into_iter().flat_map(one).collect::<Vec<_>>()
    });
    check_all("checksum_of_a_whole_frame_is_completed_as_the_kernel_does", frames);
}

/// A card that puts frames together leaves nothing to be completed in what it made of them.
#[test]
fn frame_whose_checksum_was_checked_is_cut_as_the_kernel_does() {
    if !require_root("frame_whose_checksum_was_checked_is_cut_as_the_kernel_does") {
        return;
    }
    let taps = Taps::new();
    for kind in [TCP4, TCP6] {
        let (header, bytes) = kind.build();
        let bytes = split::complete(&header, &bytes);
        let header = VnetHdr { flags: 0, csum_start: 0, csum_offset: 0, ..header };
        assert_eq!(taps.check_given(&header, &bytes), 4);
        let checked = VnetHdr { flags: net_flag::DATA_VALID, ..header };
        assert_eq!(finish(&checked, &bytes, 0), finish(&header, &bytes, 0));
    }
}

/// Has the first datagram's checksum come out as 0, by its first two bytes.
fn make_checksum_zero(header: &VnetHdr, frame: &mut [u8]) {
    let field = usize::from(header.csum_start + header.csum_offset);
    frame[field + 2..field + 4].fill(0);
    let first = split::split(header, frame).unwrap().remove(0);
    frame[field + 2..field + 4].copy_from_slice(&first[field..field + 2]);
}

/// To UDP, 0 means that there is none (RFC 768).
#[test]
fn udp_checksum_that_comes_out_as_0_is_sent_as_the_kernel_does() {
    if !require_root("udp_checksum_that_comes_out_as_0_is_sent_as_the_kernel_does") {
        return;
    }
    let taps = Taps::new();
    for (kind, gso_type) in [UDP4, UDP6].into_iter().flat_map(|kind| [(kind.clone(), gso::UDP_L4), (kind, gso::NONE)]) {
        let (header, mut bytes) = Frame { gso_type, payload: 1400, size: 1000, ..kind }.build();
        make_checksum_zero(&header, &mut bytes);
        let field = usize::from(header.csum_start + header.csum_offset);
        let first = finish(&header, &bytes, 0).remove(0);
        assert_eq!(first[field..field + 2], [0xff, 0xff]);
        taps.check(&header, &bytes);
    }
}

#[test]
fn datagrams_of_a_socket_are_cut_as_the_kernel_does() {
    if !require_root("datagrams_of_a_socket_are_cut_as_the_kernel_does") {
        return;
    }
    let taps = Taps::new();
    let socket = taps.namespace.within(|| UdpSocket::bind("10.99.0.1:5000").unwrap());
    socket.connect("10.99.0.2:4000").unwrap();
    for (size, len) in [(1200, 48_000), (1200, 47_900), (999, 5000), (1472, 2945)] {
        segment_datagrams(&socket, size);
        socket.send(&payload(Stamp { stream: 2, seq: 0 }, len)).unwrap();
        let (header, frame) = taps.whole.read(PATIENCE).unwrap();
        assert_eq!(header.gso_type, gso::UDP_L4);
        assert_eq!(taps.check_given(&header, &frame), len.div_ceil(size));
    }
}

/// The guest's answer to a connection request: what it sends is taken, up to 64 KiB.
fn syn_ack(request: &[u8]) -> Vec<u8> {
    let port = u16::from_be_bytes([request[34], request[35]]);
    let expected = u32::from_be_bytes(request[38..42].try_into().unwrap()).wrapping_add(1);
    let ends = Ends { dst_port: port, src_port: 4000, ..Ends::TX };
    let mut frame = frames::tcp4(&ends, 1, &[], L4Csum::Partial);
    frame[42..46].copy_from_slice(&expected.to_be_bytes());
    frame[47] = SYN_ACK;
    frame
}

#[test]
fn stream_of_a_socket_is_cut_as_the_kernel_does() {
    if !require_root("stream_of_a_socket_is_cut_as_the_kernel_does") {
        return;
    }
    let taps = Taps::new();
    let segments = thread::scope(|scope| {
        let connecting = scope.spawn(|| taps.namespace.within(|| TcpStream::connect("10.99.0.2:4000").unwrap()));
        let (_, request) = taps.whole.read(PATIENCE).expect("a connection request");
        let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHdr::default() };
        taps.whole.write(&header, &syn_ack(&request)).unwrap();
        let mut stream = connecting.join().unwrap();
        stream.write_all(&payload(Stamp { stream: 3, seq: 0 }, 5000)).unwrap();
        let mut segments = Vec::new();
        while segments.iter().sum::<usize>() < 5000 / 536 {
            let (header, frame) = taps.whole.read(PATIENCE).expect("the stream's frames");
            segments.push(taps.check_given(&header, &frame));
        }
        segments
    });
    assert!(segments.iter().any(|count| *count > 1), "the kernel gave none to be cut: {segments:?}");
}
