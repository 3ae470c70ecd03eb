//! Which tx headers may reach the host, and as what (VIRTIO 1.3, "Network Device", "Packet Transmission").

use crate::kit::virtio::{VnetHdr, feature, gso, net_flag};

/// Ethernet with two tags around 64 KiB of IP packet.
pub const FRAME_MAX: usize = 65_535 + 14 + 8;
/// How much of a frame is looked at.
pub const START: usize = 192;
const SEGMENTS_MAX: usize = 1366;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The header to send for a frame of `len` bytes that begins with `start`, or `None` where the frame must be dropped.
pub fn check(features: u64, header: VnetHdr, len: usize, start: &[u8]) -> Option<VnetHdr> {
    let has = |feature| features & feature != 0;
    let wants_csum = header.flags & net_flag::NEEDS_CSUM != 0;
    if !(14..=FRAME_MAX).contains(&len) {
        return None;
    }
    let csum_end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
    let csum_is_good =
        has(feature::CSUM) && header.flags & net_flag::DATA_VALID == 0 && header.csum_start >= 14 && csum_end <= len;
    if header.gso_type == gso::NONE {
        let VnetHdr { csum_start, csum_offset, .. } = header;
        return match (wants_csum, csum_is_good) {
            (false, _) => Some(VnetHdr::default()),
            (true, true) => {
                Some(VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start, csum_offset, ..VnetHdr::default() })
            }
            (true, false) => None,
        };
    }
    let (allowed_by, versions, protocol) = match header.gso_type & !gso::ECN {
        gso::TCPV4 => (feature::HOST_TSO4, &[4][..], TCP),
        gso::TCPV6 => (feature::HOST_TSO6, &[6][..], TCP),
        gso::UDP => (feature::HOST_UFO, &[4, 6][..], UDP),
        gso::UDP_L4 => (feature::HOST_USO, &[4, 6][..], UDP),
        _ => return None,
    };
    let ecn_is_good = header.gso_type & gso::ECN == 0 || (protocol == TCP && has(feature::HOST_ECN));
    if !(has(allowed_by) && ecn_is_good && wants_csum && csum_is_good && (1..0xffff).contains(&header.gso_size)) {
        return None;
    }
    let start = &start[..len.min(start.len())];
    let (version, found, l4) = transport(start)?;
    let csum_offset = if protocol == TCP { 16 } else { 6 };
    if !versions.contains(&version)
        || found != protocol
        || usize::from(header.csum_start) != l4
        || header.csum_offset != csum_offset
    {
        return None;
    }
    let l4_len = if protocol == TCP { usize::from(start.get(l4 + 12)? / 16) * 4 } else { 8 };
    let headers = l4 + l4_len;
    if l4_len < 8 || (protocol == TCP && l4_len < 20) || headers > start.len() {
        return None;
    }
    let segments = (len - headers).div_ceil(header.gso_size.into());
    let hdr_len = headers as u16;
    (segments <= SEGMENTS_MAX).then_some(VnetHdr { flags: net_flag::NEEDS_CSUM, hdr_len, num_buffers: 0, ..header })
}

/// Whether a frame that is to be cut has, behind its own IP header, another thing than its header says.
pub fn is_mislabelled(header: &VnetHdr, frame: &[u8]) -> bool {
    let protocol = match header.gso_type & !gso::ECN {
        gso::TCPV4 | gso::TCPV6 => TCP,
        gso::UDP_L4 => UDP,
        _ => return false,
    };
    let own = transport(&frame[..frame.len().min(START)]);
    own.is_some_and(|(_, found, l4)| (found, l4) != (protocol, header.csum_start.into()))
}

/// IP version, protocol and place of the transport header.
fn transport(frame: &[u8]) -> Option<(u8, u8, usize)> {
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let tags = (0..3).take_while(|tag| matches!(word(12 + 4 * tag), Some(0x8100 | 0x88a8))).count();
    let ip = 14 + 4 * tags;
    if tags > 2 {
        return None;
    }
    let first = *frame.get(ip)?;
    match (word(ip - 2)?, first >> 4) {
        (0x0800, 4) if first & 15 >= 5 => Some((4, *frame.get(ip + 9)?, ip + usize::from(first & 15) * 4)),
        (0x86dd, 6) => {
            let (mut next, mut at) = (*frame.get(ip + 6)?, ip + 40);
            // Hop-by-hop options, routing, destination options.
            while let 0 | 43 | 60 = next {
                let units = frame.get(at + 1)?;
                (next, at) = (frame[at], at + 8 + 8 * usize::from(*units));
            }
            Some((6, next, at))
        }
        _ => None,
    }
}
