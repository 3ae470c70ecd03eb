//! Coalescing on tx: consecutive frames of one flow become one frame that asks to be segmented (VIRTIO 1.3, "Network
//! Device", "Packet Transmission"), so that the kernel's stack is walked once for all of them.
//!
//! `tx` calls this with private copies of the frames' first bytes. [`Segment::of`] checks a frame by itself,
//! [`Run::join`] appends it to a run, [`Run::join_alike`] does both at once for a frame like the run's first, and
//! [`Run::merge`] writes the headers of the merged frame. The caller sends `[virtio-net header][merged headers][payload
//! of frame 1][payload of frame 2]…`. Nothing here does I/O or allocates.
//!
//! **The rule.** A frame joins only if cutting the whole again gives the guest's frames, byte for byte with completed
//! checksums. So the code relies on how frames are segmented by Linux (`inet_gso_segment`, `ipv6_gso_segment`,
//! `tcp_gso_segment`, `__udp_gso_segment`) or a guest that gets the frame whole:
//! * It copies the headers of the whole to each segment, so what it does not write must be equal in all of them.
//! * It writes lengths and checksums as they should be. A frame with wrong ones is sent as it is, alone.
//! * It counts the IPv4 identification up by one. With DF set the identification means nothing (RFC 6864, "4.1 IPv4 ID
//!   Used Only for Fragmentation") and may be any; without it the guest must have counted so too.
//! * It counts the TCP sequence number up by the payload and leaves PSH and FIN to the last segment. CWR stays on the
//!   first, SYN, RST and URG on all: none of these is merged.
//! * It cuts at the first frame's payload length, so only the last frame may be shorter, and none longer.
//! * It fills in the TCP or UDP checksum: each frame must have asked for that, with exactly the pseudo-header's sum.
//!   A UDP checksum of none (0) or one that is complete already would not come back. (Of a lone TCP frame Linux may write
//!   a checksum of 0 as 0xffff, which verifies as well.)

use super::checksum::{Sum, pseudo_header};
use super::flow::{ALIKE, COPIED, Layout, same_headers};
use super::header::{F_NEEDS_CSUM, HEADER_LEN, VnetHeader};
use super::protocol::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_HEADER, IPV6_HEADER, PacketKind, TCP_ACK, TCP_CHECKSUM, TCP_ECE, TCP_HEADER,
    TCP_LAST_ONLY, UDP_CHECKSUM, UDP_HEADER, find_l3,
};
use crate::device::{Device, TUN_F_USO4, TUN_F_USO6};

/// Longest merged frame. From 65536 bytes on, the usual `gso_max_size`, Linux segments a frame in software even if the
/// device could; and an IP packet in a frame of this length never exceeds its length field.
pub const MERGED_FRAME_MAX: usize = 65_535;
/// Most UDP datagrams in one frame: Linux before 6.10 accepts no more (`UDP_MAX_SEGMENTS`).
pub const UDP_FRAMES_MAX: usize = 64;

/// Which protocols may be merged: those whose segmentation the device takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalesce {
    /// TCP, over IPv4 and IPv6.
    pub tcp: bool,
    /// UDP, over IPv4 and IPv6.
    pub udp: bool,
}

/// Whether frames of one flow go to the device as one (`--coalesce`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Coalescing {
    /// Those that the device can segment again.
    #[default]
    Auto,
    /// The same, with a warning where it cannot segment all kinds.
    On,
    /// Each frame goes by itself.
    Off,
}

impl Coalesce {
    /// The protocols to coalesce on `device`: those that are wanted and that it can segment again. Every device
    /// segments TCP.
    pub fn of(wanted: Coalescing, device: &Device) -> Coalesce {
        if wanted == Coalescing::Off {
            return Coalesce::default();
        }
        let uso = TUN_F_USO4 | TUN_F_USO6;
        let udp = device.supported_offloads() & uso == uso;
        if !udp {
            let level = if wanted == Coalescing::On { log::Level::Warn } else { log::Level::Info };
            let name = device.name();
            log::log!(level, "Only TCP frames are coalesced: {name:?} cannot segment UDP, which Linux 6.2 can");
        }
        Coalesce { tcp: true, udp }
    }
}

/// What has to be known of a frame that may be part of a run, besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    layout: Layout,
    /// [`TCP_LAST_ONLY`] flags that are set.
    last_flags: u8,
    identification: Identification,
    payload: u16,
    /// TCP's sequence number.
    sequence: u32,
}

/// The IPv4 identification of a packet, if it has a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identification {
    Counts(u16),
    /// DF is set, or there is none (IPv6).
    Any,
}

impl Identification {
    /// The identification of a packet without DF, which may be fragmented.
    fn of(ip: &[u8; IPV4_HEADER]) -> Identification {
        Identification::Counts(u16::from_be_bytes([ip[4], ip[5]]))
    }

    fn may_precede(self, next: Identification) -> bool {
        match (self, next) {
            (Identification::Counts(id), Identification::Counts(next)) => id.wrapping_add(1) == next,
            (Identification::Any, Identification::Any) => true,
            _ => false,
        }
    }
}

impl Segment {
    /// Checks a frame of `len` bytes by itself: `header` is its checked virtio-net header, `start` a private copy of
    /// its first bytes, up to [`PROTOCOL_HEADERS_MAX`](super::header::PROTOCOL_HEADERS_MAX). `None` if it has to be
    /// sent as it is.
    #[inline]
    pub fn of(allowed: Coalesce, header: VnetHeader, start: &[u8], len: usize) -> Option<Segment> {
        if header.flags != F_NEEDS_CSUM || header.is_gso() {
            return None;
        }
        let (ethertype, l3) = find_l3(start)?;
        let ip = Ip::parse(ethertype, start.get(l3..)?, len.checked_sub(l3)?)?;
        let l4 = l3 + ip.header_len;
        let kind = PacketKind::of(ethertype, ip.protocol)?;
        let transport = match kind {
            PacketKind::Tcp4 | PacketKind::Tcp6 if allowed.tcp => Transport::tcp(start.get(l4..)?.first_chunk()?)?,
            PacketKind::Udp4 | PacketKind::Udp6 if allowed.udp => {
                Transport::udp(start.get(l4..)?.first_chunk()?, ip.payload)?
            }
            _ => return None,
        };
        let end = l4 + transport.header_len;
        let payload = ip.payload.checked_sub(transport.header_len as u16)?;
        let completes = usize::from(header.csum_start) == l4 && header.csum_offset == kind.checksum_offset();
        let as_kernel_wants = completes && transport.checksum == ip.pseudo.fold();
        if payload == 0 || end > start.len() || !as_kernel_wants {
            return None;
        }
        Some(Segment {
            // Two VLAN tags, IPv6 and TCP with all options are 122 bytes.
            layout: Layout { kind, l3: l3 as u8, l4: l4 as u8, end: end as u8 },
            last_flags: transport.last_flags,
            identification: ip.identification,
            payload,
            sequence: transport.sequence,
        })
    }

    /// The segment for a frame of `len` bytes that equals this one except in fields that count up; else `None`. `this`
    /// and `other` are the copies of both frames' first bytes, with the checked virtio-net headers.
    #[inline]
    fn of_alike(&self, this: &[u8], other: &[u8], len: usize) -> Option<Segment> {
        let (this_header, this) = this.split_first_chunk::<HEADER_LEN>()?;
        let (other_header, other) = other.split_first_chunk::<HEADER_LEN>()?;
        let same_size = other_header == this_header && len == self.headers_len() + self.payload_len();
        if !same_size || !same_headers(&ALIKE, self.layout, this, other)? {
            return None;
        }
        let mut segment = *self;
        if self.layout.kind.is_ipv4() {
            let ip = other.get(self.layout.l3.into()..)?.first_chunk()?;
            if !has_right_checksum(ip) {
                return None;
            }
            if self.identification != Identification::Any {
                segment.identification = Identification::of(ip);
            }
        }
        if self.layout.kind.is_tcp() {
            let tcp = Transport::tcp(other.get(self.layout.l4.into()..)?.first_chunk()?)?;
            (segment.sequence, segment.last_flags) = (tcp.sequence, tcp.last_flags);
        }
        Some(segment)
    }

    /// How many bytes of protocol headers the frame begins with.
    #[inline]
    pub fn headers_len(&self) -> usize {
        usize::from(self.layout.end)
    }

    /// How many bytes of payload follow them; never 0.
    #[inline]
    pub fn payload_len(&self) -> usize {
        usize::from(self.payload)
    }

    /// The sequence number that follows this frame's.
    fn next_sequence(&self) -> u32 {
        self.sequence.wrapping_add(u32::from(self.payload))
    }
}

/// The fields of an IP header that segmentation would reproduce.
struct Ip {
    header_len: usize,
    protocol: u8,
    /// Bytes behind the IP header.
    payload: u16,
    identification: Identification,
    /// The pseudo-header's sum, its length included.
    pseudo: Sum,
}

impl Ip {
    /// `bytes` begin with the IP header of a packet that has `len` bytes to the frame's end.
    #[inline]
    fn parse(ethertype: u16, bytes: &[u8], len: usize) -> Option<Ip> {
        match ethertype {
            ETHERTYPE_IPV4 => Ip::v4(bytes.first_chunk()?, len),
            ETHERTYPE_IPV6 => Ip::v6(bytes.first_chunk()?, len),
            _ => None,
        }
    }

    /// Accepts a header without options, fragmentation or reserved bits, without padding after the packet, and with
    /// exactly the checksum that the kernel would write. That it verifies is not enough: 0 and 0xffff both do.
    #[inline]
    fn v4(ip: &[u8; IPV4_HEADER], len: usize) -> Option<Ip> {
        const VERSION_AND_LENGTH: u8 = 0x45;
        const DF: u16 = 0x4000;
        let fragment = u16::from_be_bytes([ip[6], ip[7]]);
        let total = u16::from_be_bytes([ip[2], ip[3]]);
        let is_plain = ip[0] == VERSION_AND_LENGTH && fragment & !DF == 0 && usize::from(total) == len;
        if !is_plain || !has_right_checksum(ip) {
            return None;
        }
        let payload = total.checked_sub(IPV4_HEADER as u16)?;
        Some(Ip {
            header_len: IPV4_HEADER,
            protocol: ip[9],
            payload,
            identification: if fragment == DF { Identification::Any } else { Identification::of(ip) },
            pseudo: pseudo_header(ip.last_chunk::<8>()?, ip[9]).plus_word(payload),
        })
    }

    /// Accepts a header without extension headers (the caller takes TCP and UDP only), without padding after the
    /// packet.
    #[inline]
    fn v6(ip: &[u8; IPV6_HEADER], len: usize) -> Option<Ip> {
        let payload = u16::from_be_bytes([ip[4], ip[5]]);
        if ip[0] >> 4 != 6 || len.checked_sub(IPV6_HEADER) != Some(usize::from(payload)) {
            return None;
        }
        Some(Ip {
            header_len: IPV6_HEADER,
            protocol: ip[6],
            payload,
            identification: Identification::Any,
            pseudo: pseudo_header(ip.last_chunk::<32>()?, ip[6]).plus_word(payload),
        })
    }
}

#[inline]
fn has_right_checksum(ip: &[u8; IPV4_HEADER]) -> bool {
    let stored = u16::from_be_bytes([ip[10], ip[11]]);
    // Subtracting is adding the complement (RFC 1624).
    stored == Sum::of(ip).plus_word(!stored).complement()
}

/// The fields of a TCP or UDP header that segmentation would reproduce.
struct Transport {
    header_len: usize,
    checksum: u16,
    last_flags: u8,
    sequence: u32,
}

impl Transport {
    /// Accepts ACK with, at most, ECE, PSH and FIN; reserved bits and the urgent pointer must be 0.
    #[inline]
    fn tcp(tcp: &[u8; TCP_HEADER]) -> Option<Transport> {
        let header_len = usize::from(tcp[12] >> 4) * 4;
        let reserved = tcp[12] & 0x0f;
        let flags = tcp[13];
        let urgent = u16::from_be_bytes([tcp[18], tcp[19]]);
        let plain = flags & !(TCP_LAST_ONLY | TCP_ECE) == TCP_ACK;
        if header_len < TCP_HEADER || reserved != 0 || !plain || urgent != 0 {
            return None;
        }
        Some(Transport {
            header_len,
            checksum: u16::from_be_bytes([tcp[TCP_CHECKSUM], tcp[TCP_CHECKSUM + 1]]),
            last_flags: flags & TCP_LAST_ONLY,
            sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
        })
    }

    /// Accepts a header whose length is that of the packet.
    #[inline]
    fn udp(udp: &[u8; UDP_HEADER], len: u16) -> Option<Transport> {
        if u16::from_be_bytes([udp[4], udp[5]]) != len {
            return None;
        }
        Some(Transport {
            header_len: UDP_HEADER,
            checksum: u16::from_be_bytes([udp[UDP_CHECKSUM], udp[UDP_CHECKSUM + 1]]),
            last_flags: 0,
            sequence: 0,
        })
    }
}

/// Frames that go as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: Segment,
    last: Segment,
    frames: usize,
    /// Bytes of all payloads.
    payload: usize,
}

impl Run {
    /// A run of one frame.
    #[inline]
    pub fn begin(first: Segment) -> Run {
        Run { first, last: first, frames: 1, payload: first.payload_len() }
    }

    /// Adds `next` if the run, cut again, gives exactly these frames. `first_start` is the copy that the first frame's
    /// segment was made of, `next_start` that of `next`. If false, the run is as it was, and `next` may begin another.
    #[inline]
    pub fn join(&mut self, first_start: &[u8], next: Segment, next_start: &[u8]) -> bool {
        let joins =
            self.may_precede(next) && same_headers(&COPIED, self.first.layout, first_start, next_start) == Some(true);
        if joins {
            self.add(next);
        }
        joins
    }

    /// A fast path of [`Run::join`] for a frame of `len` bytes that differs from the first only in fields that count
    /// up, as most frames of a flow do. `first` and `next` are the copies, with the checked virtio-net headers. If
    /// false, the frame may still join by [`Run::join`].
    #[inline]
    pub fn join_alike(&mut self, first: &[u8], next: &[u8], len: usize) -> bool {
        let alike = self.first.of_alike(first, next, len).filter(|next| self.may_precede(*next));
        let Some(next) = alike else { return false };
        self.add(next);
        true
    }

    #[inline]
    fn add(&mut self, next: Segment) {
        self.last = next;
        self.frames += 1;
        self.payload += next.payload_len();
    }

    /// Checks all conditions but the bytes that must be equal.
    #[inline]
    fn may_precede(&self, next: Segment) -> bool {
        let Run { first, last, .. } = *self;
        let open = last.last_flags == 0 && last.payload == first.payload;
        let follows = last.identification.may_precede(next.identification)
            && (!first.layout.kind.is_tcp() || last.next_sequence() == next.sequence);
        open && self.has_room(next) && follows && next.payload <= first.payload
    }

    fn has_room(&self, next: Segment) -> bool {
        let Run { first, frames, payload, .. } = *self;
        let fits = first.headers_len() + payload + next.payload_len() <= MERGED_FRAME_MAX;
        fits && (first.layout.kind.is_tcp() || frames < UDP_FRAMES_MAX)
    }

    /// Whether there is no room for another frame like the first.
    #[inline]
    pub fn is_full(&self) -> bool {
        !self.has_room(self.first)
    }

    /// How many bytes of protocol headers each frame begins with.
    #[inline]
    pub fn headers_len(&self) -> usize {
        self.first.headers_len()
    }

    /// How many frames it has.
    #[inline]
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Turns the first frame's headers, in the copy that its segment was made of, into those of the merged frame.
    /// Returns the virtio-net header for it. A run of one frame stays as it is. `None` if `first_start` is shorter than
    /// that copy was.
    #[inline]
    pub fn merge(&self, first_start: &mut [u8]) -> Option<VnetHeader> {
        let Layout { kind, l3, l4, .. } = self.first.layout;
        let alone = VnetHeader {
            flags: F_NEEDS_CSUM,
            csum_start: l4.into(),
            csum_offset: kind.checksum_offset(),
            ..VnetHeader::default()
        };
        if self.frames == 1 {
            return Some(alone);
        }
        let headers = first_start.get_mut(..self.first.headers_len())?;
        let (_, packet) = headers.split_at_mut_checked(l3.into())?;
        self.write_packet(packet)?;
        Some(VnetHeader {
            gso_type: kind.gso_type(),
            hdr_len: self.first.layout.end.into(),
            gso_size: self.first.payload,
            ..alone
        })
    }

    /// Lengths, checksums and flags of the whole, in the headers from IP's on.
    fn write_packet(&self, packet: &mut [u8]) -> Option<()> {
        let kind = self.first.layout.kind;
        let (ip, l4) = packet.split_at_mut_checked(kind.ip_header())?;
        // MERGED_FRAME_MAX bounds both lengths.
        let l4_len = (l4.len() + self.payload) as u16;
        let pseudo = kind.write_ip_length(ip, l4_len)?.fold();
        if kind.is_tcp() {
            let tcp: &mut [u8; TCP_HEADER] = l4.first_chunk_mut()?;
            tcp[13] |= self.last.last_flags;
            [tcp[TCP_CHECKSUM], tcp[TCP_CHECKSUM + 1]] = pseudo.to_be_bytes();
        } else {
            let udp: &mut [u8; UDP_HEADER] = l4.first_chunk_mut()?;
            [udp[4], udp[5]] = l4_len.to_be_bytes();
            [udp[UDP_CHECKSUM], udp[UDP_CHECKSUM + 1]] = pseudo.to_be_bytes();
        }
        Some(())
    }
}
