//! The protocol headers of a frame (Ethernet, IPv4 or IPv6, TCP or UDP): their constants, where each of them is, and the
//! fields that depend on a packet's length.
//!
//! `header` checks with this what a header says, `coalesce` and `segment` put packets together and cut them. All of it
//! works on private copies; what is malformed is `None`.

use super::checksum::{Sum, pseudo_header};
use super::header::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4};

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// 802.1Q and 802.1ad.
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];
const VLAN_TAGS_MAX: usize = 2;

pub(super) const IPPROTO_TCP: u8 = 6;
pub(super) const IPPROTO_UDP: u8 = 17;
pub(super) const IPPROTO_SCTP: u8 = 132;

/// Length of an IPv4 header without options.
pub(super) const IPV4_HEADER: usize = 20;
/// Length of an IPv6 header without extension headers.
pub(super) const IPV6_HEADER: usize = 40;
/// Length of a TCP header without options.
pub(super) const TCP_HEADER: usize = 20;
/// Length of a UDP header.
pub(super) const UDP_HEADER: usize = 8;

/// Offset of the checksum in a TCP header.
pub(super) const TCP_CHECKSUM: usize = 16;
/// Offset of the checksum in a UDP header.
pub(super) const UDP_CHECKSUM: usize = 6;
/// Offset of the checksum in an SCTP header.
pub(super) const SCTP_CHECKSUM: usize = 8;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
pub(super) const TCP_ACK: u8 = 0x10;
pub(super) const TCP_ECE: u8 = 0x40;
pub(super) const TCP_CWR: u8 = 0x80;
/// The flags that only the last segment of a segmented frame keeps.
pub(super) const TCP_LAST_ONLY: u8 = TCP_FIN | TCP_PSH;

/// The IP version and transport protocol of a packet that can be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PacketKind {
    Tcp4,
    Tcp6,
    Udp4,
    Udp6,
}

impl PacketKind {
    #[inline]
    pub(super) fn of(ethertype: u16, protocol: u8) -> Option<PacketKind> {
        match (ethertype, protocol) {
            (ETHERTYPE_IPV4, IPPROTO_TCP) => Some(PacketKind::Tcp4),
            (ETHERTYPE_IPV6, IPPROTO_TCP) => Some(PacketKind::Tcp6),
            (ETHERTYPE_IPV4, IPPROTO_UDP) => Some(PacketKind::Udp4),
            (ETHERTYPE_IPV6, IPPROTO_UDP) => Some(PacketKind::Udp6),
            _ => None,
        }
    }

    #[inline]
    pub(super) fn is_tcp(self) -> bool {
        matches!(self, PacketKind::Tcp4 | PacketKind::Tcp6)
    }

    #[inline]
    pub(super) fn is_ipv4(self) -> bool {
        matches!(self, PacketKind::Tcp4 | PacketKind::Udp4)
    }

    /// Length of the IP header without options or extension headers.
    #[inline]
    pub(super) fn ip_header(self) -> usize {
        if self.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER }
    }

    /// The transport protocol's number in the IP header.
    #[inline]
    pub(super) fn protocol(self) -> u8 {
        if self.is_tcp() { IPPROTO_TCP } else { IPPROTO_UDP }
    }

    /// Offset of the checksum in the transport header.
    #[inline]
    pub(super) fn checksum_offset(self) -> u16 {
        (if self.is_tcp() { TCP_CHECKSUM } else { UDP_CHECKSUM }) as u16
    }

    /// The GSO type that cuts such a packet into packets of the same kind (not into IP fragments, as `GSO_UDP` does).
    #[inline]
    pub(super) fn gso_type(self) -> u8 {
        match self {
            PacketKind::Tcp4 => GSO_TCPV4,
            PacketKind::Tcp6 => GSO_TCPV6,
            PacketKind::Udp4 | PacketKind::Udp6 => GSO_UDP_L4,
        }
    }

    /// Whether a frame with this GSO type may hold such a packet.
    pub(super) fn fits(self, gso_type: u8) -> bool {
        let gso_type = gso_type & !GSO_ECN;
        gso_type == self.gso_type() || (gso_type == GSO_UDP && !self.is_tcp())
    }

    /// Where the payload begins behind the transport header at `l4`, if all of that header is in `frame`.
    pub(super) fn payload_start(self, frame: &[u8], l4: usize) -> Option<usize> {
        let (len, least) = if self.is_tcp() {
            (usize::from(*frame.get(l4 + 12)? >> 4) * 4, TCP_HEADER)
        } else {
            (UDP_HEADER, UDP_HEADER)
        };
        let end = l4 + len;
        (len >= least && end <= frame.len()).then_some(end)
    }

    /// Writes the length and, for IPv4, the header checksum of a packet with `l4_len` bytes of transport header and
    /// payload behind `ip`, its IP header with all options or extension headers. Returns the sum of the pseudo-header,
    /// of the addresses in the header.
    #[inline]
    pub(super) fn write_ip_length(self, ip: &mut [u8], l4_len: u16) -> Option<Sum> {
        let addresses = if self.is_ipv4() {
            let total = l4_len.wrapping_add(ip.len() as u16);
            let fixed: &mut [u8; IPV4_HEADER] = ip.first_chunk_mut()?;
            [fixed[2], fixed[3]] = total.to_be_bytes();
            [fixed[10], fixed[11]] = [0, 0];
            let sum = Sum::of(ip).complement().to_be_bytes();
            let fixed: &mut [u8; IPV4_HEADER] = ip.first_chunk_mut()?;
            [fixed[10], fixed[11]] = sum;
            fixed.get(12..)?
        } else {
            // The payload length counts extension headers.
            let extensions = ip.len().checked_sub(IPV6_HEADER)? as u16;
            let fixed: &mut [u8; IPV6_HEADER] = ip.first_chunk_mut()?;
            [fixed[4], fixed[5]] = l4_len.wrapping_add(extensions).to_be_bytes();
            fixed.get(8..)?
        };
        Some(pseudo_header(addresses, self.protocol()).plus_word(l4_len))
    }
}

/// Where a frame's network and transport headers are.
pub(super) struct Found {
    pub(super) ethertype: u16,
    /// Offset of the IP header.
    pub(super) l3: usize,
    /// The protocol's number of what follows the IP header.
    pub(super) protocol: u8,
    /// Offset of the transport header.
    pub(super) l4: usize,
}

impl Found {
    /// What kind of packet it is, if it can be segmented.
    pub(super) fn kind(&self) -> Option<PacketKind> {
        PacketKind::of(self.ethertype, self.protocol)
    }
}

/// The ethertype and the offset of the network header, behind up to two VLAN tags.
pub(super) fn find_l3(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = 12;
    for _ in 0..=VLAN_TAGS_MAX {
        let ethertype = u16::from_be_bytes(*frame.get(at..)?.first_chunk()?);
        if !ETHERTYPES_VLAN.contains(&ethertype) {
            return Some((ethertype, at + 2));
        }
        at += 4;
    }
    None
}

/// The headers of an IP packet, behind options and extension headers. The transport header itself may be missing.
pub(super) fn find_l4(frame: &[u8]) -> Option<Found> {
    let (ethertype, l3) = find_l3(frame)?;
    let ip = frame.get(l3..)?;
    match (ethertype, ip.first()? >> 4) {
        (ETHERTYPE_IPV4, 4) => {
            let header_len = usize::from(ip.first()? & 15) * 4;
            (header_len >= IPV4_HEADER).then_some(())?;
            Some(Found { ethertype, l3, protocol: *ip.get(9)?, l4: l3 + header_len })
        }
        (ETHERTYPE_IPV6, 6) => {
            let (protocol, len) = skip_ipv6_headers(ip)?;
            Some(Found { ethertype, l3, protocol, l4: l3 + len })
        }
        _ => None,
    }
}

/// The transport protocol behind an IPv6 header and the extension headers that a segmented packet may have, and the
/// length of all of them.
fn skip_ipv6_headers(ip: &[u8]) -> Option<(u8, usize)> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const DESTINATION: u8 = 60;
    let mut protocol = *ip.get(6)?;
    let mut at = IPV6_HEADER;
    while [HOP_BY_HOP, ROUTING, DESTINATION].contains(&protocol) {
        let [next, units] = *ip.get(at..)?.first_chunk()?;
        protocol = next;
        at += (usize::from(units) + 1) * 8;
    }
    Some((protocol, at))
}
