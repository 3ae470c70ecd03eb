//! Ethernet frames for tests, and the checker that says what became of them.
//!
//! Each test frame carries a stamp in its payload: stream, sequence number, length and a checksum over the
//! payload. So a checker tells lost, duplicated, reordered and corrupted frames apart, whatever headers a
//! kernel or a back-end may have rewritten on the way. The pattern behind the stamp follows from stream and
//! sequence number, so that two frames never look alike.

use std::collections::BTreeSet;

pub const ETHER_HEADER: usize = 14;
pub const IPV4_HEADER: usize = 20;
pub const IPV6_HEADER: usize = 40;
pub const UDP_HEADER: usize = 8;
pub const TCP_HEADER: usize = 20;
/// Shortest Ethernet frame without its check sequence.
pub const SHORTEST_FRAME: usize = 60;

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// 802.1ad, the outer tag of two.
pub const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// "Local experimental", which no host stack answers.
pub const ETHERTYPE_TEST: u16 = 0x88b5;

const PROTO_TCP: u8 = 6;
const PROTO_UDP: u8 = 17;

/// Where the checksum stands in a UDP and in a TCP header.
pub const UDP_CSUM_OFFSET: u16 = 6;
pub const TCP_CSUM_OFFSET: u16 = 16;

pub type Mac = [u8; 6];
pub const BROADCAST: Mac = [0xff; 6];
pub const GUEST_MAC: Mac = [0x52, 0x54, 0, 0xaa, 0, 1];
pub const HOST_MAC: Mac = [0x52, 0x54, 0, 0xbb, 0, 1];

/// An address as `ip` has it.
pub fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The two ends of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub src_mac: Mac,
    pub dst_mac: Mac,
    pub src_ip: [u8; 4],
    pub dst_ip: [u8; 4],
    pub src_port: u16,
    pub dst_port: u16,
}

impl Ends {
    /// From guest to host.
    pub const TX: Self = Self {
        src_mac: GUEST_MAC,
        dst_mac: HOST_MAC,
        src_ip: [10, 99, 0, 2],
        dst_ip: [10, 99, 0, 1],
        src_port: 4000,
        dst_port: 5000,
    };

    /// From host to guest.
    pub const RX: Self = Self {
        src_mac: HOST_MAC,
        dst_mac: GUEST_MAC,
        src_ip: [10, 99, 0, 1],
        dst_ip: [10, 99, 0, 2],
        src_port: 5000,
        dst_port: 4000,
    };

    /// fd00::/64 with the IPv4 address at the end.
    fn ipv6(ip: [u8; 4]) -> [u8; 16] {
        let mut addr = [0; 16];
        addr[0] = 0xfd;
        addr[12..].copy_from_slice(&ip);
        addr
    }
}

/// The stamp in a test frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub stream: u16,
    pub seq: u32,
}

const MAGIC: [u8; 4] = *b"VuNt";
/// Magic, stream, sequence number, length, checksum.
pub const STAMP_LEN: usize = 16;

/// A payload of `len` bytes (at least [`STAMP_LEN`]) with its stamp.
pub fn payload(stamp: Stamp, len: usize) -> Vec<u8> {
    assert!((STAMP_LEN..=usize::from(u16::MAX)).contains(&len), "A payload of {len} bytes");
    let mut bytes = Vec::with_capacity(len);
    bytes.extend(MAGIC);
    bytes.extend(stamp.stream.to_be_bytes());
    bytes.extend(stamp.seq.to_be_bytes());
    bytes.extend((len as u16).to_be_bytes());
    bytes.extend([0; 4]);
    let mut state = stamp.seq ^ u32::from(stamp.stream).rotate_left(16) ^ 0x9e37_79b9;
    while bytes.len() < len {
        // Marsaglia's xorshift32: any pattern that differs from frame to frame will do.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bytes.push(state as u8);
    }
    let sum = fnv1a(&bytes);
    bytes[12..16].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// Finds a stamp anywhere in `frame`. `Err` if there is one and the payload behind it is not whole.
pub fn find_stamp(frame: &[u8]) -> Option<Result<Stamp, String>> {
    let at = frame.windows(4).position(|window| window == MAGIC)?;
    Some(read_stamp(&frame[at..]))
}

fn read_stamp(bytes: &[u8]) -> Result<Stamp, String> {
    if bytes.len() < STAMP_LEN {
        return Err(format!("Stamp cut to {} bytes", bytes.len()));
    }
    let len = usize::from(be16(bytes, 10));
    let stamp = Stamp { stream: be16(bytes, 4), seq: be32(bytes, 6) };
    if bytes.len() < len || len < STAMP_LEN {
        return Err(format!("{stamp:?} has {} of {len} bytes", bytes.len()));
    }
    let mut unsummed = bytes[..len].to_vec();
    unsummed[12..16].fill(0);
    if fnv1a(&unsummed) != be32(bytes, 12) {
        return Err(format!("{stamp:?} has a wrong checksum"));
    }
    Ok(stamp)
}

/// A frame of exactly `len` bytes (30 or more) that no host stack looks at.
pub fn test_frame(ends: &Ends, stamp: Stamp, len: usize) -> Vec<u8> {
    ethernet(ends, ETHERTYPE_TEST, &payload(stamp, len - ETHER_HEADER))
}

/// An Ethernet header and what follows it, not padded.
pub fn ethernet(ends: &Ends, ethertype: u16, rest: &[u8]) -> Vec<u8> {
    [&ends.dst_mac[..], &ends.src_mac, &ethertype.to_be_bytes(), rest].concat()
}

/// Puts an 802.1Q tag into `frame`.
pub fn vlan(frame: &[u8], id: u16) -> Vec<u8> {
    tag(frame, ETHERTYPE_VLAN, id)
}

/// Puts a tag of any kind into `frame`, before those that it has.
pub fn tag(frame: &[u8], tpid: u16, tci: u16) -> Vec<u8> {
    [&frame[..12], &tpid.to_be_bytes(), &tci.to_be_bytes(), &frame[12..]].concat()
}

/// Pads `frame` to the shortest that Ethernet knows.
pub fn pad(mut frame: Vec<u8>) -> Vec<u8> {
    if frame.len() < SHORTEST_FRAME {
        frame.resize(SHORTEST_FRAME, 0);
    }
    frame
}

/// Who has the other end's address? Broadcast, padded.
pub fn arp_request(ends: &Ends) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(ends.src_mac);
    arp.extend(ends.src_ip);
    arp.extend([0; 6]);
    arp.extend(ends.dst_ip);
    let ends = Ends { dst_mac: BROADCAST, ..*ends };
    pad(ethernet(&ends, ETHERTYPE_ARP, &arp))
}

/// Is this the answer to [`arp_request`] of `ends`?
pub fn is_arp_reply(frame: &[u8], ends: &Ends) -> bool {
    frame.len() >= 42
        && be16(frame, 12) == ETHERTYPE_ARP
        && be16(frame, 20) == 2
        && frame[28..32] == ends.dst_ip
        && frame[38..42] == ends.src_ip
}

/// How a builder leaves the L4 checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4Csum {
    /// Complete.
    Full,
    /// The pseudo header's sum alone, as with NEEDS_CSUM.
    Partial,
}

pub fn udp4(ends: &Ends, payload: &[u8], csum: L4Csum) -> Vec<u8> {
    let l4 = udp(ends, payload);
    ethernet(ends, ETHERTYPE_IPV4, &ipv4(ends, PROTO_UDP, l4, csum))
}

pub fn udp6(ends: &Ends, payload: &[u8], csum: L4Csum) -> Vec<u8> {
    let l4 = udp(ends, payload);
    ethernet(ends, ETHERTYPE_IPV6, &ipv6(ends, PROTO_UDP, l4, csum))
}

/// A TCP segment with ACK and PSH set. `tcp_seq` is TCP's own number, not the stamp's.
pub fn tcp4(ends: &Ends, tcp_seq: u32, payload: &[u8], csum: L4Csum) -> Vec<u8> {
    let l4 = tcp(ends, tcp_seq, payload);
    ethernet(ends, ETHERTYPE_IPV4, &ipv4(ends, PROTO_TCP, l4, csum))
}

pub fn tcp6(ends: &Ends, tcp_seq: u32, payload: &[u8], csum: L4Csum) -> Vec<u8> {
    let l4 = tcp(ends, tcp_seq, payload);
    ethernet(ends, ETHERTYPE_IPV6, &ipv6(ends, PROTO_TCP, l4, csum))
}

fn udp(ends: &Ends, payload: &[u8]) -> Vec<u8> {
    let len = (UDP_HEADER + payload.len()) as u16;
    let mut l4 = Vec::new();
    l4.extend(ends.src_port.to_be_bytes());
    l4.extend(ends.dst_port.to_be_bytes());
    l4.extend(len.to_be_bytes());
    l4.extend([0; 2]);
    l4.extend(payload);
    l4
}

fn tcp(ends: &Ends, seq: u32, payload: &[u8]) -> Vec<u8> {
    const DATA_OFFSET: u8 = 5 << 4;
    const ACK_PSH: u8 = 0x18;
    let mut l4 = Vec::new();
    l4.extend(ends.src_port.to_be_bytes());
    l4.extend(ends.dst_port.to_be_bytes());
    l4.extend(seq.to_be_bytes());
    l4.extend(1u32.to_be_bytes());
    l4.extend([DATA_OFFSET, ACK_PSH]);
    l4.extend(0xffffu16.to_be_bytes());
    l4.extend([0; 4]);
    l4.extend(payload);
    l4
}

fn ipv4(ends: &Ends, proto: u8, mut l4: Vec<u8>, csum: L4Csum) -> Vec<u8> {
    let len = (IPV4_HEADER + l4.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(len.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, proto, 0, 0]);
    ip.extend(ends.src_ip);
    ip.extend(ends.dst_ip);
    let sum = !checksum_add(0, &ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let pseudo = pseudo_sum(&ends.src_ip, &ends.dst_ip, proto, l4.len());
    put_l4_csum(proto, &mut l4, pseudo, csum);
    [ip, l4].concat()
}

fn ipv6(ends: &Ends, proto: u8, mut l4: Vec<u8>, csum: L4Csum) -> Vec<u8> {
    let (src, dst) = (Ends::ipv6(ends.src_ip), Ends::ipv6(ends.dst_ip));
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend((l4.len() as u16).to_be_bytes());
    ip.extend([proto, 64]);
    ip.extend(src);
    ip.extend(dst);
    let pseudo = pseudo_sum(&src, &dst, proto, l4.len());
    put_l4_csum(proto, &mut l4, pseudo, csum);
    [ip, l4].concat()
}

fn put_l4_csum(proto: u8, l4: &mut [u8], pseudo: u16, csum: L4Csum) {
    let at = usize::from(if proto == PROTO_TCP { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET });
    let sum = match csum {
        L4Csum::Partial => pseudo,
        L4Csum::Full => nonzero_complement(checksum_add(pseudo, l4)),
    };
    l4[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// A checksum of 0 means "none" to UDP, so it goes as 0xffff.
fn nonzero_complement(sum: u16) -> u16 {
    match !sum {
        0 => 0xffff,
        sum => sum,
    }
}

/// The Internet checksum's ones' complement sum (RFC 1071), not complemented, going on from `sum`.
pub fn checksum_add(sum: u16, bytes: &[u8]) -> u16 {
    let mut total = u64::from(sum);
    for pair in bytes.chunks(2) {
        total += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn pseudo_sum(src: &[u8], dst: &[u8], proto: u8, l4_len: usize) -> u16 {
    let sum = checksum_add(checksum_add(0, src), dst);
    let len = (l4_len as u32).to_be_bytes();
    checksum_add(checksum_add(sum, &len), &[0, proto])
}

/// Is `frame` IPv4 or IPv6 (perhaps tagged) with TCP or UDP, and are all its checksums complete and right?
pub fn checksums_are_right(frame: &[u8]) -> bool {
    let mut at = 12;
    while [ETHERTYPE_VLAN, ETHERTYPE_SERVICE_VLAN].contains(&be16(frame, at)) {
        at += 4;
    }
    let ip = &frame[at + 2..];
    match be16(frame, at) {
        ETHERTYPE_IPV4 => ipv4_checksums_are_right(ip),
        ETHERTYPE_IPV6 => {
            let len = usize::from(be16(ip, 4));
            l4_sum_is_right(&ip[8..24], &ip[24..40], ip[6], &ip[IPV6_HEADER..IPV6_HEADER + len])
        }
        _ => false,
    }
}

fn ipv4_checksums_are_right(ip: &[u8]) -> bool {
    let total = usize::from(be16(ip, 2));
    checksum_add(0, &ip[..IPV4_HEADER]) == 0xffff
        && l4_sum_is_right(&ip[12..16], &ip[16..20], ip[9], &ip[IPV4_HEADER..total])
}

fn l4_sum_is_right(src: &[u8], dst: &[u8], proto: u8, l4: &[u8]) -> bool {
    checksum_add(pseudo_sum(src, dst, proto, l4.len()), l4) == 0xffff
}

/// Follows one stream of stamped frames.
#[derive(Debug, Default)]
pub struct Checker {
    stream: u16,
    next: u32,
    missing: BTreeSet<u32>,
    pub received: usize,
    pub duplicated: usize,
    pub reordered: usize,
    pub corrupted: Vec<String>,
    /// Frames without a stamp, or of another stream.
    pub foreign: usize,
}

impl Checker {
    /// Expects `stream` from sequence number 0 on.
    pub fn new(stream: u16) -> Self {
        Self { stream, ..Self::default() }
    }

    /// Takes note of a frame that arrived.
    pub fn see(&mut self, frame: &[u8]) {
        match find_stamp(frame) {
            Some(Ok(stamp)) if stamp.stream == self.stream => self.see_seq(stamp.seq),
            Some(Err(why)) => self.corrupted.push(why),
            Some(Ok(_)) | None => self.foreign += 1,
        }
    }

    fn see_seq(&mut self, seq: u32) {
        self.received += 1;
        if seq >= self.next {
            self.missing.extend(self.next..seq);
            self.next = seq + 1;
        } else if self.missing.remove(&seq) {
            self.reordered += 1;
        } else {
            self.duplicated += 1;
        }
    }

    /// Sequence numbers below `sent` that never came.
    pub fn lost(&self, sent: u32) -> Vec<u32> {
        let tail = self.next..sent;
        self.missing.iter().copied().chain(tail).collect()
    }

    /// Panics unless frames 0 to `sent` came once each, whole and in order.
    pub fn assert_perfect(&self, sent: u32) {
        let lost = self.lost(sent);
        let perfect = lost.is_empty()
            && self.duplicated == 0
            && self.reordered == 0
            && self.corrupted.is_empty()
            && self.received == sent as usize;
        assert!(perfect, "Of {sent} frames, lost {lost:?}; {self:?}");
    }
}

fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
