//! Frames and chains out of an input: mostly good ones, with one thing or another wrong.

use crate::guest::DATA;
use crate::header_model;
use crate::input::Input;
use crate::kit;
use crate::kit::frames::{Ends, L4Csum, checksum_add, tcp4, tcp6, udp4, udp6, vlan};
use crate::kit::memory::GuestMemory;
use crate::kit::split::complete;
use crate::kit::split_ring::{Desc, RingAddrs};
use crate::kit::virtio::{VnetHdr, desc_flag, feature, gso, net_flag};

/// The features that say what a guest may send unfinished.
pub const TX_FEATURES: [u64; 6] =
    [feature::CSUM, feature::HOST_TSO4, feature::HOST_TSO6, feature::HOST_ECN, feature::HOST_UFO, feature::HOST_USO];
/// Those that say what it takes unfinished.
pub const RX_FEATURES: [u64; 7] = [
    feature::GUEST_CSUM,
    feature::GUEST_TSO4,
    feature::GUEST_TSO6,
    feature::GUEST_ECN,
    feature::GUEST_UFO,
    feature::GUEST_USO4,
    feature::GUEST_USO6,
];

/// A header and the frame behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub header: VnetHdr,
    pub frame: Vec<u8>,
}

impl Sent {
    pub fn bytes(&self) -> Vec<u8> {
        [&self.header.to_bytes()[..], &self.frame].concat()
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self { header: VnetHdr::from_bytes(bytes), frame: bytes[VnetHdr::LEN..].to_vec() }
    }

    /// As the frame is meant: with its checksum, where its header asks for one that can be filled in.
    pub fn completed(&self) -> Vec<u8> {
        let end = usize::from(self.header.csum_start) + usize::from(self.header.csum_offset) + 2;
        if end <= self.frame.len() { complete(&self.header, &self.frame) } else { self.frame.clone() }
    }
}

/// A flow, and how far it has come.
#[derive(Clone, Copy, Default)]
pub struct Flow {
    seq: u32,
    id: u16,
}

/// The next frame: of one of four protocols, to be checksummed, segmented or neither, in order with those before it; then
/// some bytes of it changed, with sums that fit again or not.
pub fn frame(input: &mut Input<'_>, flow: &mut Flow) -> Sent {
    let kind = input.u8();
    if kind & 0x80 != 0 {
        let header = VnetHdr::from_bytes(&input.array::<{ VnetHdr::LEN }>());
        let len = input.u8();
        return Sent { header, frame: input.bytes(len.into()).to_vec() };
    }
    let (is_v4, is_tcp) = (kind & 1 == 0, kind & 2 == 0);
    let len = match input.u8() {
        len @ 0..=199 => usize::from(len) * 8,
        200..=254 => usize::from(input.u16()) % 30_000,
        255 => 65_000,
    };
    let payload: Vec<u8> = (0..len).map(|at| (at as u8).wrapping_mul(7) ^ flow.id as u8).collect();
    let mut frame = match (is_v4, is_tcp) {
        (true, true) => tcp4(&Ends::TX, flow.seq, &payload, L4Csum::Partial),
        (true, false) => udp4(&Ends::TX, &payload, L4Csum::Partial),
        (false, true) => tcp6(&Ends::TX, flow.seq, &payload, L4Csum::Partial),
        (false, false) => udp6(&Ends::TX, &payload, L4Csum::Partial),
    };
    if is_tcp {
        // ACK alone: a frame with PSH is the last of a run.
        let flags = frame.len() - payload.len() - 7;
        frame[flags] = 0x10;
    }
    if is_v4 {
        frame[18..20].copy_from_slice(&flow.id.to_be_bytes());
    }
    flow.seq = flow.seq.wrapping_add(len as u32);
    flow.id = flow.id.wrapping_add(1);
    let (mut ip, csum_offset) = (14, if is_tcp { 16 } else { 6 });
    if kind & 4 != 0 {
        frame = vlan(&frame, 5);
        ip += 4;
    }
    for _ in 0..kind >> 3 & 3 {
        let (at, value) = (usize::from(input.u8()), input.u8());
        if let Some(byte) = frame.get_mut(12 + at) {
            *byte = value;
        }
    }
    if kind & 0x20 == 0 {
        repair(&mut frame, ip, is_v4, csum_offset);
    }
    let csum_start = (ip + if is_v4 { 20 } else { 40 }) as u16;
    let mut header =
        VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start, csum_offset: csum_offset as u16, ..VnetHdr::default() };
    match input.below(8) {
        0 => header = VnetHdr::default(),
        1 => {
            header.gso_type = if !is_tcp { gso::UDP_L4 } else { [gso::TCPV6, gso::TCPV4][usize::from(is_v4)] };
            header.gso_size = input.u16() >> 2;
            header.hdr_len = csum_start + if is_tcp { 20 } else { 8 };
        }
        2 => header.gso_type = input.u8(),
        3 => (header.flags, header.gso_size) = (input.u8(), input.u16()),
        4 => (header.csum_start, header.csum_offset) = (input.u16(), input.u16()),
        _ => {}
    }
    Sent { header, frame }
}

/// Fills in the IPv4 header's checksum and the pseudo-header's sum, if the frame is long enough to have them.
fn repair(frame: &mut [u8], ip: usize, is_v4: bool, csum_offset: usize) {
    let l4 = ip + if is_v4 { 20 } else { 40 };
    let l4_len = (frame.len() - l4) as u32;
    if is_v4 {
        frame[ip + 10..ip + 12].fill(0);
        let sum = !checksum_add(0, &frame[ip..l4]);
        frame[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
    }
    let addresses = if is_v4 { ip + 12..ip + 20 } else { ip + 8..ip + 40 };
    let sum = checksum_add(0, &frame[addresses]);
    let sum = checksum_add(checksum_add(sum, &l4_len.to_be_bytes()), &[0, if csum_offset == 16 { 6 } else { 17 }]);
    frame[l4 + csum_offset..l4 + csum_offset + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Lays `len` bytes from `at` on out as buffers, as the input cuts them.
pub fn cut(input: &mut Input<'_>, at: u64, len: usize, flags: u16) -> Vec<Desc> {
    let mut descs = Vec::new();
    let mut done = 0;
    for _ in 0..input.below(8) {
        let step = usize::from(input.u8()).min(len - done);
        descs.push(Desc { addr: at + done as u64, len: step as u32, flags, next: 0 });
        done += step;
    }
    descs.push(Desc { addr: at + done as u64, len: (len - done) as u32, flags, next: 0 });
    descs
}

/// Writes descriptors of a ring's table, one after the other.
pub struct Writer<'a> {
    pub mem: &'a GuestMemory,
    pub addrs: RingAddrs,
    pub size: u16,
    /// The next that is free.
    pub next: u16,
    /// Where indirect tables go, before the data.
    pub tables: u64,
    /// How many chains there are.
    pub chains: u16,
}

impl Writer<'_> {
    /// Makes `descs` available as one chain, directly or by a table, and lets the input spoil one of them. False if there
    /// is no room.
    pub fn add(&mut self, input: &mut Input<'_>, mut descs: Vec<Desc>, indirect: bool) -> bool {
        let count = descs.len() as u16;
        let needed = if indirect { 1 } else { count };
        let tables_end = self.tables + if indirect { 16 * u64::from(count) } else { 0 };
        if self.next + needed > self.size || tables_end > DATA {
            return false;
        }
        let first = if indirect { 0 } else { self.next };
        for (at, desc) in descs.iter_mut().enumerate() {
            if at + 1 < usize::from(count) {
                desc.flags |= desc_flag::NEXT;
                desc.next = first + at as u16 + 1;
            }
        }
        if input.below(8) == 7 {
            let at = input.below(descs.len());
            match input.below(4) {
                0 => descs[at] = input.descriptor(),
                1 => descs[at].flags = input.u8().into(),
                2 => descs[at].next = input.u8().into(),
                _ => descs[at].len = input.length(),
            }
        }
        let table = if indirect { self.tables } else { self.addrs.desc + 16 * u64::from(self.next) };
        for (at, desc) in descs.iter().enumerate() {
            self.mem.write(table + 16 * at as u64, &desc.to_bytes());
        }
        if indirect {
            let head = Desc { addr: table, len: 16 * u32::from(count), flags: desc_flag::INDIRECT, next: 0 };
            self.mem.write(self.addrs.desc + 16 * u64::from(self.next), &head.to_bytes());
            self.tables = tables_end;
        }
        self.mem.write(self.addrs.avail + 4 + 2 * u64::from(self.chains), &self.next.to_le_bytes());
        self.chains += 1;
        self.next += needed;
        self.mem.write(self.addrs.avail + 2, &self.chains.to_le_bytes());
        true
    }

    /// The head of chain number `at`.
    pub fn head(&self, at: u16) -> u16 {
        let bytes = self.mem.read(self.addrs.avail + 4 + 2 * u64::from(at), 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Used entry number `at`.
    pub fn used(&self, at: u16) -> (u32, u32) {
        let bytes = self.mem.read(self.addrs.used + 4 + 8 * u64::from(at), 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    pub fn used_idx(&self) -> u16 {
        let bytes = self.mem.read(self.addrs.used + 2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
}

/// The features without which a guest may not see this header; `None` where it may not at all.
pub fn rx_needs(header: &VnetHdr) -> Option<u64> {
    if header.gso_type != gso::NONE && header.flags & net_flag::NEEDS_CSUM == 0 {
        return None;
    }
    let segmentation = match header.gso_type & !gso::ECN {
        gso::NONE => 0,
        gso::TCPV4 => feature::GUEST_TSO4,
        gso::TCPV6 => feature::GUEST_TSO6,
        gso::UDP => feature::GUEST_UFO,
        gso::UDP_L4 => feature::GUEST_USO4 | feature::GUEST_USO6,
        _ => return None,
    };
    let ecn = if header.gso_type & gso::ECN == 0 { 0 } else { feature::GUEST_ECN };
    let csum = if header.flags == 0 { 0 } else { feature::GUEST_CSUM };
    Some(segmentation | ecn | csum)
}

/// The frames that a segmentation request stands for, by the kit's splitter; `None` where that one, which is strict, has no
/// opinion.
pub fn split(sent: &Sent) -> Option<Vec<Vec<u8>>> {
    let start = &sent.frame[..sent.frame.len().min(header_model::START)];
    header_model::check(u64::MAX, sent.header, sent.frame.len(), start)?;
    kit::split::split(&sent.header, &sent.frame).ok()
}
