//! Coalescing on tx: frames that become one, frames that must not, and that cutting the whole gives the guest's frames.
//!
//! * [`merged`]: what becomes one frame, and how that one looks;
//! * [`apart`]: for each rule, that frames which break it, and nothing else, stay apart;
//! * [`cut_again`]: random, bit-flipped and hostile frames, judged by `common::split`;
//! * [`kernel`]: the kernel as the judge: it cuts what one TAP of a bridge sends to another. Needs root.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod apart;
mod cut_again;
mod kernel;
mod merged;

use common::frames::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, GUEST_MAC, HOST_MAC, Mac, checksum_add};
use common::split::{self, complete, split};
use common::virtio::{VnetHdr, net_flag};
use vhost_user_net::net::coalesce::{Coalesce, Run, Segment};
use vhost_user_net::net::flow::flow_hint;
use vhost_user_net::net::header::VnetHeader;

const ALL: Coalesce = Coalesce { tcp: true, udp: true };
const COPIED: usize = 192;

const DF: u16 = 0x4000;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    v6: bool,
    tcp: bool,
}

const TCP4: Kind = Kind { v6: false, tcp: true };
const TCP6: Kind = Kind { v6: true, tcp: true };
const UDP4: Kind = Kind { v6: false, tcp: false };
const UDP6: Kind = Kind { v6: true, tcp: false };
const KINDS: [Kind; 4] = [TCP4, TCP6, UDP4, UDP6];
const TCP: [Kind; 2] = [TCP4, TCP6];
const UDP: [Kind; 2] = [UDP4, UDP6];
const V4: [Kind; 2] = [TCP4, UDP4];
const V6: [Kind; 2] = [TCP6, UDP6];

/// What a frame says, field by field; lengths and checksums follow from the rest.
#[derive(Clone, Debug)]
struct Frame {
    kind: Kind,
    dst: Mac,
    src: Mac,
    /// VLAN tags: ethertype and control information.
    tags: Vec<(u16, u16)>,
    tos: u8,
    flow_label: u32,
    id: u16,
    /// IPv4's flags and fragment offset.
    fragment: u16,
    ttl: u8,
    /// IPv4 takes the last 4 bytes.
    src_ip: [u8; 16],
    dst_ip: [u8; 16],
    src_port: u16,
    dst_port: u16,
    seq: u32,
    ack: u32,
    reserved: u8,
    flags: u8,
    window: u16,
    urgent: u16,
    options: Vec<u8>,
    payload: Vec<u8>,
}

impl Frame {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            dst: HOST_MAC,
            src: GUEST_MAC,
            tags: vec![],
            tos: 0,
            flow_label: 0x12345,
            id: 7,
            fragment: 0,
            ttl: 64,
            src_ip: [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 99, 0, 2],
            dst_ip: [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 99, 0, 1],
            src_port: 4000,
            dst_port: 5000,
            seq: 1000,
            ack: 5,
            reserved: 0,
            flags: ACK,
            window: 501,
            urgent: 0,
            options: vec![],
            payload: vec![],
        }
    }

    fn with_payload(self, len: usize) -> Self {
        let salt = self.seq as usize + usize::from(self.id);
        Self { payload: (0..len).map(|at| (at * 7 + at / 256 + salt) as u8).collect(), ..self }
    }

    /// The frame that a guest would send behind this one.
    fn next(&self, len: usize) -> Self {
        let seq = self.seq.wrapping_add(self.payload.len() as u32);
        Self { id: self.id.wrapping_add(1), seq, ..self.clone() }.with_payload(len)
    }

    fn ip(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    fn l4(&self) -> usize {
        self.ip() + if self.kind.v6 { 40 } else { 20 }
    }

    fn headers(&self) -> usize {
        self.l4() + if self.kind.tcp { 20 + self.options.len() } else { 8 }
    }

    fn csum_offset(&self) -> usize {
        if self.kind.tcp { 16 } else { 6 }
    }

    fn render(&self) -> Rendered {
        let mut bytes = [self.dst, self.src].concat();
        for (ethertype, tag) in &self.tags {
            bytes.extend([ethertype.to_be_bytes(), tag.to_be_bytes()].concat());
        }
        let ethertype = if self.kind.v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
        bytes.extend(ethertype.to_be_bytes());
        let l4 = if self.kind.tcp { self.tcp() } else { self.udp() };
        bytes.extend(if self.kind.v6 { self.ipv6(l4.len()) } else { self.ipv4(l4.len()) });
        bytes.extend(l4);
        let header = VnetHdr {
            flags: net_flag::NEEDS_CSUM,
            csum_start: self.l4() as u16,
            csum_offset: self.csum_offset() as u16,
            ..VnetHdr::default()
        };
        let mut rendered = Rendered { header, bytes };
        self.repair(&mut rendered);
        rendered
    }

    fn ipv4(&self, l4_len: usize) -> Vec<u8> {
        let mut ip = vec![0x45, self.tos];
        ip.extend((20 + l4_len as u16).to_be_bytes());
        ip.extend(self.id.to_be_bytes());
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, if self.kind.tcp { 6 } else { 17 }, 0, 0]);
        [&ip, &self.src_ip[12..], &self.dst_ip[12..]].concat()
    }

    fn ipv6(&self, l4_len: usize) -> Vec<u8> {
        let mut ip = (6 << 28 | u32::from(self.tos) << 20 | self.flow_label).to_be_bytes().to_vec();
        ip.extend((l4_len as u16).to_be_bytes());
        ip.extend([if self.kind.tcp { 6 } else { 17 }, self.ttl]);
        [&ip[..], &self.src_ip, &self.dst_ip].concat()
    }

    fn udp(&self) -> Vec<u8> {
        let words = [self.src_port, self.dst_port, 8 + self.payload.len() as u16, 0];
        [&words.map(u16::to_be_bytes).concat()[..], &self.payload].concat()
    }

    fn tcp(&self) -> Vec<u8> {
        let mut tcp = [self.src_port, self.dst_port].map(u16::to_be_bytes).concat();
        tcp.extend([self.seq, self.ack].map(u32::to_be_bytes).concat());
        tcp.extend([(5 + self.options.len() as u8 / 4) << 4 | self.reserved, self.flags]);
        tcp.extend([self.window, 0, self.urgent].map(u16::to_be_bytes).concat());
        [&tcp[..], &self.options, &self.payload].concat()
    }

    /// Writes the IPv4 header's checksum and the pseudo-header's sum of a frame that may have been changed, where this
    /// one has them.
    fn repair(&self, rendered: &mut Rendered) {
        let (ip, l4) = (self.ip(), self.l4());
        let bytes = &mut rendered.bytes;
        if !self.kind.v6 {
            put(bytes, ip + 10, 0);
            let sum = !checksum_add(0, &bytes[ip..l4]);
            put(bytes, ip + 10, sum);
        }
        let addresses = if self.kind.v6 { ip + 8..ip + 40 } else { ip + 12..ip + 20 };
        let sum = checksum_add(0, &bytes[addresses]);
        let protocol = if self.kind.tcp { 6 } else { 17 };
        let sum = checksum_add(sum, &[0, protocol]);
        let sum = checksum_add(sum, &((bytes.len() - l4) as u32).to_be_bytes());
        put(bytes, l4 + self.csum_offset(), sum);
    }
}

/// A frame as the guest hands it over.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rendered {
    header: VnetHdr,
    bytes: Vec<u8>,
}

impl Rendered {
    fn segment(&self, allowed: Coalesce) -> Option<Segment> {
        Segment::of(allowed, ours(self.header), self.start(), self.bytes.len())
    }

    fn start(&self) -> &[u8] {
        &self.bytes[..self.bytes.len().min(COPIED)]
    }

    fn completed(&self) -> Vec<u8> {
        complete(&self.header, &self.bytes)
    }
}

/// What goes to the device, and for how many of the guest's frames.
#[derive(Debug)]
struct Sent {
    frame: Rendered,
    frames: usize,
}

fn put(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The same header in the library's type, by way of its bytes.
fn ours(header: VnetHdr) -> VnetHeader {
    VnetHeader::from_bytes(&header.to_bytes())
}

fn theirs(header: VnetHeader) -> VnetHdr {
    VnetHdr::from_bytes(&header.to_bytes())
}

/// A run as its caller has it.
struct Open {
    run: Run,
    header: VnetHdr,
    start: Vec<u8>,
    first_payload: usize,
    payload: Vec<u8>,
}

impl Open {
    fn new(segment: Segment, frame: &Rendered) -> Self {
        let payload = frame.bytes[segment.headers_len()..].to_vec();
        assert_eq!(payload.len(), segment.payload_len());
        Self {
            run: Run::begin(segment),
            header: frame.header,
            start: frame.start().to_vec(),
            first_payload: payload.len(),
            payload,
        }
    }

    /// Joins in both ways that there are, which have to agree.
    fn join(&mut self, segment: Option<Segment>, frame: &Rendered) -> bool {
        let mut alike = self.run;
        let joins_alike = alike.join_alike(
            &[&self.header.to_bytes()[..], &self.start].concat(),
            &[&frame.header.to_bytes()[..], frame.start()].concat(),
            frame.bytes.len(),
        );
        let first_len = segment.map_or(0, |segment| segment.headers_len()) + self.first_payload;
        let joins = segment.is_some_and(|segment| self.run.join(&self.start, segment, frame.start()));
        let looks_alike = self.header == frame.header && first_len == frame.bytes.len();
        assert_eq!(joins_alike, joins && looks_alike, "{frame:?}");
        assert!(!joins_alike || alike == self.run, "{alike:?}, {:?}", self.run);
        if let Some(segment) = segment.filter(|_| joins) {
            assert_eq!(flow_hint(&self.start), flow_hint(frame.start()), "seen wrongly at first sight");
            self.payload.extend(&frame.bytes[segment.headers_len()..]);
        }
        joins
    }

    fn send(mut self, headers: usize) -> Sent {
        let header = self.run.merge(&mut self.start).unwrap();
        let bytes = [&self.start[..headers], &self.payload].concat();
        Sent { frame: Rendered { header: theirs(header), bytes }, frames: self.run.frames() }
    }
}

/// Merges what may be merged, in order, as the caller does.
fn coalesce_with(allowed: Coalesce, frames: &[Rendered]) -> Vec<Sent> {
    let mut sent = vec![];
    let mut open: Option<(Open, usize)> = None;
    for frame in frames {
        let segment = frame.segment(allowed);
        if open.as_mut().is_some_and(|(open, _)| open.join(segment, frame)) {
            continue;
        }
        sent.extend(open.take().map(|(open, headers)| open.send(headers)));
        match segment {
            Some(segment) => open = Some((Open::new(segment, frame), segment.headers_len())),
            None => sent.push(Sent { frame: frame.clone(), frames: 1 }),
        }
    }
    sent.extend(open.map(|(open, headers)| open.send(headers)));
    sent
}

fn coalesce(frames: &[Rendered]) -> Vec<Sent> {
    coalesce_with(ALL, frames)
}

/// Into how many frames each of those that are sent was merged.
fn counts(frames: &[Rendered]) -> Vec<usize> {
    coalesce(frames).iter().map(|sent| sent.frames).collect()
}

/// Frames of one flow with payloads of these lengths.
fn stream(first: Frame, lengths: &[usize]) -> Vec<Frame> {
    let mut frames: Vec<Frame> = vec![];
    for len in lengths {
        let next = frames.last().map_or_else(|| first.clone().with_payload(*len), |last| last.next(*len));
        frames.push(next);
    }
    frames
}

fn render(frames: &[Frame]) -> Vec<Rendered> {
    frames.iter().map(Frame::render).collect()
}

/// Compares a frame that came out of the cutting with the guest's.
fn same(got: &[u8], guest: &Rendered, was_merged: bool) -> Result<(), String> {
    split::same(got, &guest.completed(), was_merged)
}

/// Coalesces, cuts again, compares. Tells how many frames each one that was sent stands for.
fn there_and_back(frames: &[Rendered]) -> Result<Vec<usize>, String> {
    let mut guest = frames.iter();
    let mut counts = vec![];
    for sent in coalesce(frames) {
        let parts = split(&sent.frame.header, &sent.frame.bytes)?;
        if parts.len() != sent.frames {
            return Err(format!("{} frames became {}", sent.frames, parts.len()));
        }
        for part in parts {
            same(&part, guest.next().unwrap(), sent.frames > 1)?;
        }
        counts.push(sent.frames);
    }
    assert!(guest.next().is_none(), "frames are missing");
    Ok(counts)
}

fn assert_merges(frames: &[Frame], expected: &[usize]) {
    assert_eq!(there_and_back(&render(frames)).unwrap(), expected, "{frames:?}");
}

fn tagged(tags: usize) -> Vec<(u16, u16)> {
    [vec![], vec![(0x8100, 0x6005)], vec![(0x88a8, 0x0064), (0x8100, 0x2001)]][tags].clone()
}

/// Changes the payload so that its checksum comes out as 0.
fn make_sum_zero(frame: &mut Frame) {
    frame.payload[..2].fill(0);
    let sum = !checksum_add(0, &frame.render().bytes[frame.l4()..]);
    put(&mut frame.payload, 0, sum);
}
