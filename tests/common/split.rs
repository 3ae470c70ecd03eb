//! Cuts a segmentation request into the frames that it stands for: an oracle, written from the specifications.
//!
//! VIRTIO 1.3, 5.1.6.2 "Packet Transmission" says what is asked for; RFC 791 and RFC 6864 (IPv4), RFC 8200 (IPv6), RFC
//! 768 (UDP), RFC 9293 (TCP) and RFC 1071 (checksums) say what each frame must look like. It shares no code with the
//! library and trusts nothing: a request that is not exactly as it should be is refused with the reason.

use std::ops::Range;

use super::frames::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, checksum_add};
use super::virtio::{VnetHdr, gso, net_flag};

const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN_AND_PSH: u8 = 0x09;
const DF: u16 = 0x4000;

/// Fills in the checksum that the header asks for, over what is there: the frame as the guest means it.
pub fn complete(header: &VnetHdr, frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if header.flags & net_flag::NEEDS_CSUM != 0 {
        let start = usize::from(header.csum_start);
        let at = start + usize::from(header.csum_offset);
        let sum = !checksum_add(0, &frame[start..]);
        // To UDP, 0 means that there is none (RFC 768).
        let is_udp = header.csum_offset == 6;
        let sum = if is_udp && sum == 0 { 0xffff } else { sum };
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// The frames that a device makes of `frame`, with all checksums complete.
pub fn split(header: &VnetHdr, frame: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    if header.gso_type == gso::NONE {
        return Ok(vec![complete(header, frame)]);
    }
    let request = Request::read(header, frame)?;
    request.check(header)?;
    let payload = &frame[request.payload..];
    let size = usize::from(header.gso_size);
    let count = payload.len().div_ceil(size);
    if count < 2 {
        return Err(format!("{count} segments of a frame that asks to be segmented"));
    }
    let segments = payload.chunks(size).enumerate();
    Ok(segments.map(|(index, payload)| request.segment(index, size, index + 1 == count, payload)).collect())
}

/// Compares a frame that was merged with others and cut again, or was alone, with `wanted`. An identification that means
/// nothing may differ (RFC 6864, "4.1 IPv4 ID Used Only for Fragmentation").
pub fn same(got: &[u8], wanted: &[u8], was_merged: bool) -> Result<(), String> {
    let mut got = got.to_vec();
    let ip = find_ipv4(wanted).filter(|ip| was_merged && got.len() >= ip.end && be16(wanted, ip.start + 6) & DF != 0);
    if let Some(ip) = ip.filter(|ip| checksum_add(0, &got[ip.clone()]) == 0xffff) {
        for at in [ip.start + 4, ip.start + 10] {
            put(&mut got, at, be16(wanted, at));
        }
    }
    if got == wanted { Ok(()) } else { Err(format!("sent {wanted:02x?}\n got {got:02x?}")) }
}

fn find_ipv4(frame: &[u8]) -> Option<Range<usize>> {
    let mut at = 12;
    while [0x8100, 0x88a8].contains(&be16(frame.get(at..at + 2)?, 0)) {
        at += 4;
    }
    (be16(frame.get(at..at + 2)?, 0) == ETHERTYPE_IPV4 && frame.len() >= at + 22).then_some(at + 2..at + 22)
}

/// A frame that asks for segmentation, and where its parts are.
struct Request<'a> {
    frame: &'a [u8],
    ip: usize,
    is_ipv4: bool,
    l4: usize,
    protocol: u8,
    payload: usize,
}

impl<'a> Request<'a> {
    fn read(header: &VnetHdr, frame: &'a [u8]) -> Result<Self, String> {
        let mut ip = 14;
        while [0x8100, 0x88a8].contains(&be16(frame, ip - 2)) {
            ip += 4;
        }
        let is_ipv4 = match be16(frame, ip - 2) {
            ETHERTYPE_IPV4 => true,
            ETHERTYPE_IPV6 => false,
            other => return Err(format!("ethertype {other:#x}")),
        };
        let (l4, protocol) =
            if is_ipv4 { (ip + usize::from(frame[ip] & 15) * 4, frame[ip + 9]) } else { (ip + 40, frame[ip + 6]) };
        let payload = match (header.gso_type, is_ipv4, protocol) {
            (gso::TCPV4, true, TCP) | (gso::TCPV6, false, TCP) => l4 + usize::from(frame[l4 + 12] >> 4) * 4,
            (gso::UDP_L4, _, UDP) => l4 + 8,
            other => return Err(format!("GSO type, IPv4, protocol {other:?} do not go together")),
        };
        Ok(Self { frame, ip, is_ipv4, l4, protocol, payload })
    }

    /// The frame must be right as one frame, too: lengths, IPv4 checksum, and the sum of the pseudo-header.
    fn check(&self, header: &VnetHdr) -> Result<(), String> {
        let csum_offset = if self.protocol == TCP { 16 } else { 6 };
        let expected = VnetHdr {
            flags: net_flag::NEEDS_CSUM,
            hdr_len: self.payload as u16,
            csum_start: self.l4 as u16,
            csum_offset,
            num_buffers: 0,
            ..*header
        };
        must(*header == expected && header.gso_size != 0, "header")?;
        let (frame, ip, l4) = (self.frame, self.ip, self.l4);
        if self.is_ipv4 {
            must(usize::from(be16(frame, ip + 2)) == frame.len() - ip, "IPv4 total length")?;
            must(be16(frame, ip + 10) != 0xffff && checksum_add(0, &frame[ip..l4]) == 0xffff, "IPv4 checksum")?;
            must(be16(frame, ip + 6) & 0xbfff == 0, "fragment")?;
        } else {
            must(usize::from(be16(frame, ip + 4)) == frame.len() - l4, "IPv6 payload length")?;
        }
        if self.protocol == UDP {
            must(usize::from(be16(frame, l4 + 4)) == frame.len() - l4, "UDP length")?;
        }
        let pseudo = self.pseudo_sum(frame, frame.len() - l4);
        must(be16(frame, l4 + usize::from(csum_offset)) == pseudo, "sum of the pseudo-header")
    }

    fn segment(&self, index: usize, size: usize, is_last: bool, payload: &[u8]) -> Vec<u8> {
        let (ip, l4) = (self.ip, self.l4);
        let mut frame = [&self.frame[..self.payload], payload].concat();
        let l4_len = frame.len() - l4;
        if self.is_ipv4 {
            let id = be16(&frame, ip + 4).wrapping_add(index as u16);
            put(&mut frame, ip + 2, (l4 - ip + l4_len) as u16);
            put(&mut frame, ip + 4, id);
            put(&mut frame, ip + 10, 0);
            let sum = !checksum_add(0, &frame[ip..l4]);
            put(&mut frame, ip + 10, sum);
        } else {
            put(&mut frame, ip + 4, l4_len as u16);
        }
        if self.protocol == TCP {
            let seq = u32::from_be_bytes(frame[l4 + 4..l4 + 8].try_into().unwrap());
            let seq = seq.wrapping_add((index * size) as u32);
            frame[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
            if !is_last {
                frame[l4 + 13] &= !FIN_AND_PSH;
            }
            // CWR stays: the request, which says nothing of ECN, has it as part of a counter (RFC 9768, "The ACE Field").
        } else {
            put(&mut frame, l4 + 4, l4_len as u16);
        }
        self.put_checksum(&mut frame);
        frame
    }

    fn put_checksum(&self, frame: &mut [u8]) {
        let l4 = self.l4;
        let at = l4 + if self.protocol == TCP { 16 } else { 6 };
        put(frame, at, 0);
        let sum = !checksum_add(self.pseudo_sum(frame, frame.len() - l4), &frame[l4..]);
        put(frame, at, if sum == 0 && self.protocol == UDP { 0xffff } else { sum });
    }

    fn pseudo_sum(&self, frame: &[u8], len: usize) -> u16 {
        let addresses = if self.is_ipv4 { self.ip + 12..self.ip + 20 } else { self.ip + 8..self.ip + 40 };
        let sum = checksum_add(0, &frame[addresses]);
        let sum = checksum_add(sum, &(len as u32).to_be_bytes());
        checksum_add(sum, &[0, self.protocol])
    }
}

fn must(condition: bool, what: &str) -> Result<(), String> {
    if condition { Ok(()) } else { Err(format!("{what} is wrong")) }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}
