//! Segmentation on rx: finishing frames that the guest cannot take as they are (VIRTIO 1.3, "Network Device",
//! "Processing of Incoming Packets"). The device may give unfinished frames even if the guest did not negotiate them:
//! to read 64 KiB at once and segment it here costs less than many reads.
//!
//! `finish` calls this with a frame in private memory that `check_rx` refused. [`plan`] says what is to be done:
//! completing the checksum ([`complete_checksum`], in place), or cutting it ([`Plan::segment`] writes one segment's
//! headers and says which payload follows). A checksum is left to the guest if it negotiated that, else it is computed.
//! The guest never sees a type of segmentation or an unfinished checksum that it did not negotiate.

use std::ops::Range;

use super::checksum::{Sum, crc32c};
use super::features::{GUEST_CSUM, GuestOffloads};
use super::header::{
    F_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NotNegotiated, PROTOCOL_HEADERS_MAX,
    SEGMENTS_MAX, VnetHeader,
};
use super::protocol::{
    Found, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP, IPV4_HEADER, PacketKind, SCTP_CHECKSUM, TCP_CWR, TCP_HEADER,
    TCP_LAST_ONLY, UDP_CHECKSUM, UDP_HEADER, find_l4,
};

/// What has to be done to a frame before the guest may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Its checksum has to be completed.
    Checksum,
    /// It has to be cut.
    Segmentation(Plan),
}

/// How to cut a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    kind: PacketKind,
    l3: usize,
    l4: usize,
    /// Where the payload begins.
    end: usize,
    /// Bytes of payload in each segment but the last.
    size: usize,
    /// Bytes of all payload.
    payload: usize,
    /// Whether only the first segment keeps CWR (RFC 3168, "6.1.2 The TCP Sender"). Else CWR is part of a counter that
    /// is the same in all segments (RFC 9768, "The ACE Field").
    is_cwr_first: bool,
    /// Whether there are options or extension headers: the final destination, which the checksum covers, may then
    /// differ from that in the IP header.
    is_routed: bool,
    /// Whether the segments' checksums are left to the guest.
    leaves_checksum: bool,
}

/// One segment: headers, then a part of the frame's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The guest's virtio-net header.
    pub header: VnetHeader,
    /// Bytes of protocol headers.
    pub headers_len: usize,
    /// Where the payload is in the frame.
    pub payload: Range<usize>,
}

/// Says what `frame`, which came with `header`, needs for a guest that negotiated `guest` and may not have it as it is
/// ([`check_rx`](super::header::check_rx)).
///
/// # Errors
/// [`NotNegotiated`] where the frame cannot be finished: it is not what its header says.
pub fn plan(header: VnetHeader, frame: &[u8], guest: GuestOffloads) -> Result<Need, NotNegotiated> {
    if header.gso_type != GSO_NONE {
        return Plan::of(header, frame, guest).map(Need::Segmentation).ok_or(NotNegotiated);
    }
    let field = usize::from(header.csum_start) + usize::from(header.csum_offset);
    if header.flags & F_NEEDS_CSUM == 0 || field + 2 > frame.len() { Err(NotNegotiated) } else { Ok(Need::Checksum) }
}

/// Whether a frame with a GSO type is of a tunnel (VXLAN, GRE, IPIP). Its header describes only the inner packet, as if
/// there were no tunnel, so neither this file nor the guest could segment it correctly. `start` is the start of the
/// frame, of any length.
pub(super) fn is_of_tunnel(header: VnetHeader, start: &[u8]) -> bool {
    let protocol = match header.gso_type & !GSO_ECN {
        GSO_TCPV4 | GSO_TCPV6 => IPPROTO_TCP,
        GSO_UDP_L4 => IPPROTO_UDP,
        _ => return false,
    };
    let is_elsewhere = |l4| header.flags & F_NEEDS_CSUM != 0 && usize::from(header.csum_start) != l4;
    let found = find_l4(start.get(..PROTOCOL_HEADERS_MAX).unwrap_or(start));
    found.is_some_and(|found| found.protocol != protocol || is_elsewhere(found.l4))
}

/// Completes the checksum of a frame that is not to be cut. Returns its header for the guest. SCTP has a CRC instead of
/// the Internet checksum, at an offset that no other protocol uses.
///
/// # Errors
/// [`NotNegotiated`] where the checksum's field is not in the frame.
pub fn complete_checksum(header: VnetHeader, frame: &mut [u8]) -> Result<VnetHeader, NotNegotiated> {
    let start = usize::from(header.csum_start);
    let at = usize::from(header.csum_offset);
    if at == SCTP_CHECKSUM && find_l4(frame).is_some_and(|found| found.protocol == IPPROTO_SCTP) {
        return complete_crc(frame.get_mut(start..).ok_or(NotNegotiated)?);
    }
    let summed = frame.get_mut(start..).ok_or(NotNegotiated)?;
    let sum = Sum::of(summed).complement();
    let field: &mut [u8; 2] = summed.get_mut(at..).and_then(<[u8]>::first_chunk_mut).ok_or(NotNegotiated)?;
    *field = transmitted(sum, at == UDP_CHECKSUM).to_be_bytes();
    Ok(VnetHeader::default())
}

/// The same for an SCTP packet (RFC 9260, "CRC32c Checksum Calculation").
fn complete_crc(packet: &mut [u8]) -> Result<VnetHeader, NotNegotiated> {
    let put = |packet: &mut [u8], crc: u32| {
        let field = packet.get_mut(SCTP_CHECKSUM..).and_then(<[u8]>::first_chunk_mut);
        field.map(|field| *field = crc.to_le_bytes()).ok_or(NotNegotiated)
    };
    put(packet, 0)?;
    put(packet, crc32c(packet))?;
    Ok(VnetHeader::default())
}

/// The checksum as it is sent. UDP sends 0xffff for 0, which means that there is none (RFC 768).
fn transmitted(sum: u16, is_udp: bool) -> u16 {
    if is_udp && sum == 0 { 0xffff } else { sum }
}

impl Plan {
    fn of(header: VnetHeader, frame: &[u8], guest: GuestOffloads) -> Option<Plan> {
        let found = find_l4(frame)?;
        let kind = found.kind().filter(|kind| kind.gso_type() == header.gso_type & !GSO_ECN)?;
        let Found { l3, l4, .. } = found;
        // A NIC that merges frames (LRO) has verified their checksums, and leaves NEEDS_CSUM out.
        let is_checked = header.flags & F_NEEDS_CSUM == 0;
        let is_there = usize::from(header.csum_start) == l4 && header.csum_offset == kind.checksum_offset();
        if !(is_checked || is_there) {
            return None;
        }
        // With a source route or a routing header the checksum covers the final destination (RFC 8200, "Upper-Layer
        // Checksums").
        let is_routed = l4 - l3 > kind.ip_header();
        if is_routed && is_checked {
            return None;
        }
        let end = kind.payload_start(frame, l4)?;
        let payload = frame.len() - end;
        let size = usize::from(header.gso_size);
        if end > PROTOCOL_HEADERS_MAX || payload == 0 || size == 0 || payload.div_ceil(size) > SEGMENTS_MAX {
            return None;
        }
        let (is_cwr_first, leaves_checksum) = (header.gso_type & GSO_ECN != 0, guest.has(GUEST_CSUM));
        Some(Plan { kind, l3, l4, end, size, payload, is_cwr_first, is_routed, leaves_checksum })
    }

    /// How many segments the frame has.
    pub fn segments(&self) -> usize {
        self.payload.div_ceil(self.size)
    }

    /// Writes the protocol headers of segment `index` to `out` and returns the rest of the segment. `None` if `frame`
    /// has no such segment.
    pub fn segment(&self, frame: &[u8], index: usize, out: &mut [u8]) -> Option<Piece> {
        let from = index.checked_mul(self.size).filter(|from| *from < self.payload)?;
        let len = self.size.min(self.payload - from);
        let payload = self.end + from..self.end + from + len;
        let out = out.get_mut(..self.end)?;
        out.copy_from_slice(frame.get(..self.end)?);
        let pseudo = self.write_ip(out, index, len)?;
        let l4 = out.get_mut(self.l4..)?;
        if self.kind.is_tcp() {
            let not_last = if index + 1 < self.segments() { TCP_LAST_ONLY } else { 0 };
            let not_first = if index > 0 && self.is_cwr_first { TCP_CWR } else { 0 };
            write_tcp(l4, from, not_last | not_first)?;
        } else {
            *l4.get_mut(4..)?.first_chunk_mut()? = ((UDP_HEADER + len) as u16).to_be_bytes();
        }
        let at = usize::from(self.kind.checksum_offset());
        let field: &mut [u8; 2] = l4.get_mut(at..)?.first_chunk_mut()?;
        let pseudo = if self.is_routed { self.pseudo_of(*field, len) } else { pseudo };
        *field = pseudo.fold().to_be_bytes();
        let header = if self.leaves_checksum {
            let (csum_start, csum_offset) = (self.l4 as u16, at as u16);
            VnetHeader { flags: F_NEEDS_CSUM, csum_start, csum_offset, ..VnetHeader::default() }
        } else {
            // The checksum field holds the pseudo-header's sum here. The length of the headers is even, so headers and
            // payload can be summed separately.
            let sum = Sum::of(l4).plus(Sum::of(frame.get(payload.clone())?)).complement();
            *l4.get_mut(at..)?.first_chunk_mut()? = transmitted(sum, !self.kind.is_tcp()).to_be_bytes();
            VnetHeader::default()
        };
        Some(Piece { header, headers_len: self.end, payload })
    }

    /// The pseudo-header's sum for `payload` bytes, computed from that of the whole frame.
    fn pseudo_of(&self, of_whole: [u8; 2], payload: usize) -> Sum {
        let headers = self.end - self.l4;
        Sum::of(&of_whole).plus_word(!((headers + self.payload) as u16)).plus_word((headers + payload) as u16)
    }

    /// Writes lengths, identification and checksum of the IP header; returns the pseudo-header's sum.
    fn write_ip(&self, headers: &mut [u8], index: usize, payload: usize) -> Option<Sum> {
        let l4_len = (self.end - self.l4 + payload) as u16;
        let ip = headers.get_mut(self.l3..self.l4)?;
        if self.kind.is_ipv4() {
            let fixed: &mut [u8; IPV4_HEADER] = ip.first_chunk_mut()?;
            let id = u16::from_be_bytes([fixed[4], fixed[5]]).wrapping_add(index as u16);
            [fixed[4], fixed[5]] = id.to_be_bytes();
        }
        self.kind.write_ip_length(ip, l4_len)
    }
}

/// Writes the sequence number of the segment whose payload begins at `from`, and clears the flags `cleared`.
fn write_tcp(l4: &mut [u8], from: usize, cleared: u8) -> Option<()> {
    let tcp: &mut [u8; TCP_HEADER] = l4.first_chunk_mut()?;
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]).wrapping_add(from as u32);
    [tcp[4], tcp[5], tcp[6], tcp[7]] = sequence.to_be_bytes();
    tcp[13] &= !cleared;
    Some(())
}
