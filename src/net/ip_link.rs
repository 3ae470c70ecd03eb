//! What a guest's Ethernet card lacks on a device of IP packets (TUN): Ethernet headers, and a neighbour.
//!
//! The only neighbour on the guest's link is the gateway, which is this process: it answers ARP requests (RFC 826) and
//! neighbour solicitations (RFC 4861), and takes all packets. A frame to the device loses its Ethernet header, and is
//! dropped if it holds no IP packet; a packet from the device gets a header, to the address that the guest sends from.
//!
//! ```text
//!   the guest's   [virtio-net header][Ethernet][packet]        12 + 14 bytes before the packet
//!   the device's  [ 14 unused ][virtio-net header][packet]     in the same place: only the header moves
//! ```

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv6Packet,
    Icmpv6Repr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
};

use super::ETH_HEADER;
use super::header::{F_NEEDS_CSUM, HEADER_LEN, VnetHeader};
use super::protocol::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use crate::mac::Mac;

/// The gateway's address. It is the same for every guest on every host, so that a guest that migrates finds it again;
/// each gateway is alone with its guest.
pub const GATEWAY_MAC: Mac = [0x02, 0x56, 0x4e, 0x00, 0x00, 0x01];

/// How many bytes of a packet are needed to find its destination: an IPv6 header.
pub const PEEK: usize = 40;

const BROADCAST: Mac = [0xff; 6];
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
/// The hop limit that proves that no router has forwarded a message (RFC 4861, "Validation of Neighbor Solicitations").
const HOP_LIMIT: u8 = 255;

/// The IP addresses of the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gateway {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl Gateway {
    /// Whether it answers for every address, as none was given.
    fn is_anybody(self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }
}

impl FromStr for Gateway {
    type Err = String;

    fn from_str(text: &str) -> Result<Gateway, String> {
        let mut gateway = Gateway::default();
        for part in text.split(',') {
            let is_new = if let Ok(v4) = part.parse::<Ipv4Addr>() {
                !(v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast()) && gateway.v4.replace(v4).is_none()
            } else if let Ok(v6) = part.parse::<Ipv6Addr>() {
                !(v6.is_unspecified() || v6.is_multicast()) && gateway.v6.replace(v6).is_none()
            } else {
                false
            };
            if !is_new {
                return Err("one IPv4 and one IPv6 address of a host, or one of them, are expected, such as \
                            10.0.0.1,fe80::1"
                    .to_owned());
            }
        }
        Ok(gateway)
    }
}

/// Where a frame of the guest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the device, without its Ethernet header.
    Device,
    /// To the gateway: it asks for an address.
    Neighbour,
    /// Nowhere, as it is no IP packet.
    Nowhere,
}

/// A frame of ours for the guest, without virtio-net header.
pub struct Answer {
    bytes: [u8; ANSWER_MAX],
    len: usize,
}

/// The length of a neighbour advertisement with our address in it, the longest answer.
const ANSWER_MAX: usize = ETH_HEADER + 40 + 24 + 8;

impl Answer {
    /// The frame.
    pub fn frame(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Answer").field(&self.frame()).finish()
    }
}

/// One guest's link; all its queue pairs share it.
#[derive(Debug)]
pub struct IpLink {
    gateway: Gateway,
    /// The address that the guest sends from, as a number; 0 while it is unknown.
    guest: AtomicU64,
}

impl IpLink {
    /// A link between `gateway` and a guest, whose `mac` may be known.
    pub fn new(gateway: Option<Gateway>, mac: Option<Mac>) -> IpLink {
        let link = IpLink { gateway: gateway.unwrap_or_default(), guest: AtomicU64::new(0) };
        if let Some(mac) = mac {
            link.learn(mac);
        }
        link
    }

    /// Notes the address that the guest sends from.
    #[inline]
    pub fn learn(&self, mac: Mac) {
        let [a, b, c, d, e, f] = mac;
        let number = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        // A frame's source is no group (IEEE 802, "Group addresses").
        if number != self.guest.load(Ordering::Relaxed) && a & 1 == 0 {
            self.guest.store(number, Ordering::Relaxed);
        }
    }

    fn guest(&self) -> Option<Mac> {
        let [_, _, a, b, c, d, e, f] = self.guest.load(Ordering::Relaxed).to_be_bytes();
        ([a, b, c, d, e, f] != [0; 6]).then_some([a, b, c, d, e, f])
    }
}

/// From the guest.
impl IpLink {
    /// Where a frame that begins with `start` goes.
    #[inline]
    pub fn way(&self, start: &[u8]) -> Way {
        let Some((ethertype, packet)) = start.get(12..).and_then(|rest| rest.split_first_chunk()) else {
            return Way::Nowhere;
        };
        if let Some(source) = start.get(6..).and_then(|rest| rest.first_chunk()) {
            self.learn(*source);
        }
        const ARP: u16 = 0x0806;
        match u16::from_be_bytes(*ethertype) {
            ETHERTYPE_IPV4 => Way::Device,
            ETHERTYPE_IPV6 if packet.get(6) == Some(&ICMPV6) && packet.get(40) == Some(&NEIGHBOUR_SOLICITATION) => {
                Way::Neighbour
            }
            ETHERTYPE_IPV6 => Way::Device,
            ARP => Way::Neighbour,
            _ => Way::Nowhere,
        }
    }

    /// The gateway's answer to a frame for [`Way::Neighbour`]; `None` if the frame is malformed or asks for somebody
    /// else.
    pub fn answer(&self, frame: &[u8]) -> Option<Answer> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        match frame.ethertype() {
            EthernetProtocol::Arp => self.answer_arp(frame.src_addr(), frame.payload()),
            EthernetProtocol::Ipv6 => self.answer_solicitation(frame.src_addr(), frame.payload()),
            _ => None,
        }
    }

    fn answer_arp(&self, asker: EthernetAddress, packet: &[u8]) -> Option<Answer> {
        let ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr: source,
            target_protocol_addr: target,
            ..
        } = ArpRepr::parse(&ArpPacket::new_checked(packet).ok()?).ok()?
        else {
            return None;
        };
        // When answering for every address, ignore ARP probes and announcements, or the guest believes its address is
        // taken.
        let is_other = !source.is_unspecified() && source != target;
        let is_asked = if self.gateway.is_anybody() { is_other } else { self.gateway.v4 == Some(target) };
        is_asked.then(|| {
            arp(
                asker,
                ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Reply,
                    source_hardware_addr: EthernetAddress(GATEWAY_MAC),
                    source_protocol_addr: target,
                    target_hardware_addr: source_hardware_addr,
                    target_protocol_addr: source,
                },
            )
        })
    }

    fn answer_solicitation(&self, asker: EthernetAddress, packet: &[u8]) -> Option<Answer> {
        let packet = Ipv6Packet::new_checked(packet).ok()?;
        let ip = Ipv6Repr::parse(&packet).ok()?;
        if ip.hop_limit != HOP_LIMIT || ip.next_header != IpProtocol::Icmpv6 {
            return None;
        }
        let message = Icmpv6Packet::new_checked(packet.payload()).ok()?;
        let checksums = ChecksumCapabilities::default();
        let Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr: target, .. }) =
            Icmpv6Repr::parse(&ip.src_addr, &ip.dst_addr, &message, &checksums).ok()?
        else {
            return None;
        };
        // A solicitation without a source asks whether the address is free (RFC 4862, "Duplicate Address Detection").
        let has_source = !ip.src_addr.is_unspecified();
        let is_asked = if self.gateway.is_anybody() { has_source } else { self.gateway.v6 == Some(target) };
        is_asked.then(|| {
            let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            let (mac, ip) =
                if has_source { (asker, ip.src_addr) } else { (EthernetAddress([0x33, 0x33, 0, 0, 0, 1]), all_nodes) };
            advertisement(mac, target, ip, has_source)
        })
    }

    /// Removes the Ethernet header from `bytes`, the start of a frame with its virtio-net header, which moves to just
    /// before the packet.
    #[inline]
    pub fn cut(bytes: &mut [u8]) {
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return };
        let header = VnetHeader::from_bytes(header);
        // Both are zero or behind the Ethernet header, as `header` has checked.
        let header = VnetHeader {
            csum_start: header.csum_start.saturating_sub(ETH_HEADER as u16),
            hdr_len: header.hdr_len.saturating_sub(ETH_HEADER as u16),
            ..header
        };
        if let Some(place) = bytes.get_mut(ETH_HEADER..).and_then(|rest| rest.first_chunk_mut()) {
            *place = header.to_bytes();
        }
    }
}

/// To the guest.
impl IpLink {
    /// Makes a frame of `bytes`: 14 unused bytes, the device's virtio-net header, and its packet or the first [`PEEK`]
    /// bytes of that. Returns false if it is no IP packet.
    #[inline]
    pub fn enclose(&self, bytes: &mut [u8]) -> bool {
        let Some((unused, rest)) = bytes.split_at_mut_checked(ETH_HEADER) else { return false };
        let Some((header, packet)) = rest.split_first_chunk::<HEADER_LEN>() else { return false };
        let header = VnetHeader::from_bytes(header);
        let longer = |offset: u16| offset.saturating_add(ETH_HEADER as u16);
        let header = VnetHeader {
            csum_start: if header.flags & F_NEEDS_CSUM == 0 { 0 } else { longer(header.csum_start) },
            hdr_len: if header.hdr_len == 0 { 0 } else { longer(header.hdr_len) },
            ..header
        };
        let Some((ethertype, to)) = self.destination(packet) else { return false };
        let mut ethernet = [0; ETH_HEADER];
        let mut fields = to.into_iter().chain(GATEWAY_MAC).chain(ethertype.to_be_bytes());
        ethernet.fill_with(|| fields.next().unwrap_or_default());
        let whole = header.to_bytes().into_iter().chain(ethernet);
        unused.iter_mut().chain(rest).zip(whole).for_each(|(to, from)| *to = from);
        true
    }

    /// The ethertype and hardware address for `packet`.
    fn destination(&self, packet: &[u8]) -> Option<(u16, Mac)> {
        let guest = self.guest().unwrap_or(BROADCAST);
        match packet.first()? >> 4 {
            4 => {
                let to = match *packet.get(16..)?.first_chunk::<4>()? {
                    // RFC 1112, "Extensions to an Ethernet Local Network Module".
                    [224..=239, b, c, d] => [0x01, 0x00, 0x5e, b & 0x7f, c, d],
                    [255, 255, 255, 255] => BROADCAST,
                    _ => guest,
                };
                Some((ETHERTYPE_IPV4, to))
            }
            6 => {
                let to = match *packet.get(24..)?.first_chunk::<16>()? {
                    // RFC 2464, "Address Mapping -- Multicast".
                    [0xff, .., a, b, c, d] => [0x33, 0x33, a, b, c, d],
                    _ => guest,
                };
                Some((ETHERTYPE_IPV6, to))
            }
            _ => None,
        }
    }

    /// An ARP request that makes the guest tell its MAC address, if that is unknown and `frame` is an IPv4 packet to
    /// the guest. A guest with IPv6 needs none: it sends a frame as soon as its link comes up.
    pub fn question(&self, frame: &[u8]) -> Option<Answer> {
        if self.guest().is_some() || *frame.get(12..)?.first_chunk::<2>()? != ETHERTYPE_IPV4.to_be_bytes() {
            return None;
        }
        let target = Ipv4Addr::from(*frame.get(30..)?.first_chunk::<4>()?);
        if target.is_multicast() || target.is_broadcast() {
            return None;
        }
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: EthernetAddress(GATEWAY_MAC),
            source_protocol_addr: self.gateway.v4.unwrap_or(Ipv4Addr::UNSPECIFIED),
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        Some(arp(EthernetAddress::BROADCAST, request))
    }
}

fn arp(to: EthernetAddress, content: ArpRepr) -> Answer {
    let mut bytes = [0; ANSWER_MAX];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    ethernet(to, EthernetProtocol::Arp).emit(&mut frame);
    content.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
    Answer { bytes, len: ETH_HEADER + content.buffer_len() }
}

/// RFC 4861, "Neighbor Advertisement Message Format".
fn advertisement(mac: EthernetAddress, target: Ipv6Addr, to: Ipv6Addr, is_solicited: bool) -> Answer {
    let solicited = if is_solicited { NdiscNeighborFlags::SOLICITED } else { NdiscNeighborFlags::empty() };
    let message = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE | solicited,
        target_addr: target,
        lladdr: Some(EthernetAddress(GATEWAY_MAC).into()),
    });
    let ip = Ipv6Repr {
        src_addr: target,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: message.buffer_len(),
        hop_limit: HOP_LIMIT,
    };
    let mut bytes = [0; ANSWER_MAX];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    ethernet(mac, EthernetProtocol::Ipv6).emit(&mut frame);
    let mut packet = Ipv6Packet::new_unchecked(frame.payload_mut());
    ip.emit(&mut packet);
    let mut body = Icmpv6Packet::new_unchecked(packet.payload_mut());
    message.emit(&target, &to, &mut body, &ChecksumCapabilities::default());
    Answer { bytes, len: ETH_HEADER + ip.buffer_len() + message.buffer_len() }
}

fn ethernet(to: EthernetAddress, ethertype: EthernetProtocol) -> EthernetRepr {
    EthernetRepr { src_addr: EthernetAddress(GATEWAY_MAC), dst_addr: to, ethertype }
}
