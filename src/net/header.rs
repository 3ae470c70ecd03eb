//! The virtio-net header (VIRTIO 1.3, "Network Device", "Device Operation"): 12 bytes before each frame.
//!
//! The kernel acts on this header without knowing what was negotiated. So `tx` copies it to private memory, it is
//! checked there, and the kernel gets the copy. For a segmentation request the protocol headers are copied and checked
//! too: the frame must be what its virtio-net header says. On rx the header is reduced to what the guest negotiated.
//! Nothing here touches guest memory.

use std::fmt;

use thiserror::Error;

use super::features::{
    self, CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_UFO, GUEST_USO4, GUEST_USO6, GuestOffloads,
    HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_UFO, HOST_USO,
};
use super::protocol::find_l4;
use super::{ETH_HEADER, FRAME_MAX};

/// Bytes of the header. It always has `num_buffers`, since `VIRTIO_F_VERSION_1` is required.
pub const HEADER_LEN: usize = 12;
/// How many bytes of a frame are searched for protocol headers: enough for Ethernet, two VLAN tags, IP and TCP with all
/// options.
pub const PROTOCOL_HEADERS_MAX: usize = 192;
/// The most segments that one frame may ever ask for: those of a full frame in the smallest sensible TCP segments (48
/// bytes). A frame of thousands of segments costs the host hundreds of times as much as a normal one.
pub(super) const SEGMENTS_MAX: usize = SegmentLimit::MOST as usize;

/// To Linux this is not a size but a request to cut where its own page fragments end; newer kernels refuse it.
const GSO_BY_FRAGS: u16 = 0xffff;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
pub const F_NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`.
pub const F_DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_NONE`.
pub const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
pub const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_UDP`.
pub const GSO_UDP: u8 = 3;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
pub const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
pub const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, a flag on the types.
pub const GSO_ECN: u8 = 0x80;

/// A virtio-net header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// `F_` flags.
    pub flags: u8,
    /// A `GSO_` type.
    pub gso_type: u8,
    /// Bytes of the protocol headers of a frame to be segmented.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the checksummed bytes begin.
    pub csum_start: u16,
    /// Where the checksum is stored, counted from `csum_start`.
    pub csum_offset: u16,
    /// How many buffers the frame takes (rx).
    pub num_buffers: u16,
}

impl VnetHeader {
    /// Reads a header.
    #[inline]
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> VnetHeader {
        let [flags, gso_type, a, b, c, d, e, f, g, h, i, j] = *bytes;
        let [hdr_len, gso_size, csum_start, csum_offset, num_buffers] =
            [[a, b], [c, d], [e, f], [g, h], [i, j]].map(u16::from_le_bytes);
        VnetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers }
    }

    /// Writes the header.
    #[inline]
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        let [[a, b], [c, d], [e, f], [g, h], [i, j]] = words.map(u16::to_le_bytes);
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h, i, j]
    }

    /// Whether the frame is to be segmented, so that its protocol headers have to be checked too.
    #[inline]
    pub fn is_gso(&self) -> bool {
        self.gso_type != GSO_NONE
    }
}

/// What can be wrong with a header that the driver wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HeaderFault {
    /// The frame is shorter than an Ethernet header or longer than any frame.
    #[error("frame of {len} bytes")]
    Length {
        /// Its length.
        len: usize,
    },
    /// It asks for a checksum or segmentation that was not negotiated or does not exist.
    #[error("flags {flags:#x} or GSO type {gso_type:#x} not negotiated")]
    NotNegotiated {
        /// The header's flags.
        flags: u8,
        /// The header's type.
        gso_type: u8,
    },
    /// Segmentation without a segment size or a checksum, or flags that exclude each other.
    #[error("contradictory flags {flags:#x}, GSO type {gso_type:#x}, GSO size {gso_size}")]
    Contradictory {
        /// The header's flags.
        flags: u8,
        /// The header's type.
        gso_type: u8,
        /// The header's segment size.
        gso_size: u16,
    },
    /// The checksum field is not within the frame, or not where the protocol has it.
    #[error("checksum from {start}, stored at +{offset}, does not fit the frame")]
    Checksum {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
    },
    /// The frame is not of the protocol that its GSO type names.
    #[error("frame is not of the protocol that GSO type {gso_type:#x} segments")]
    WrongProtocol {
        /// The header's type.
        gso_type: u8,
    },
    /// More segments than are allowed.
    #[error("{segments} segments, too many")]
    TooManySegments {
        /// How many it would make.
        segments: usize,
    },
}

/// A tx header that the kernel may act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckedHeader {
    /// The header to send.
    pub header: VnetHeader,
    /// How many segments the host may make of the frame.
    pub segments: usize,
}

/// The most segments that the guest may have the host make of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentLimit(u16);

impl SegmentLimit {
    /// The largest limit.
    pub const MOST: u16 = 1366;
    /// [`SegmentLimit::MOST`], as a limit.
    pub const LARGEST: SegmentLimit = SegmentLimit(Self::MOST);

    /// A limit of `segments`, unless that is zero or more than [`SegmentLimit::MOST`].
    pub fn new(segments: u16) -> Option<SegmentLimit> {
        (1..=Self::MOST).contains(&segments).then_some(SegmentLimit(segments))
    }
}

impl fmt::Display for SegmentLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Default for SegmentLimit {
    /// Four times as many as a full frame has on the usual MTU (45), so that a frame costs the host at most four times
    /// as much. Only with segments of less than 364 bytes does a full frame have more.
    fn default() -> SegmentLimit {
        SegmentLimit(180)
    }
}

/// What the driver may ask for on tx.
#[derive(Clone, Copy, Debug, Default)]
pub struct TxRules {
    /// The acknowledged features.
    acked: u64,
    limit: SegmentLimit,
}

impl TxRules {
    /// The rules that follow from the acknowledged features and from what the operator allows.
    pub fn of(acked: u64, limit: SegmentLimit) -> TxRules {
        TxRules { acked: features::consistent(acked), limit }
    }

    /// Checks the header of a frame of `len` bytes; `start` is a private copy of the frame's first bytes, up to
    /// [`PROTOCOL_HEADERS_MAX`], and is looked at only if [`VnetHeader::is_gso`].
    ///
    /// # Errors
    /// [`HeaderFault`]; the frame must not reach the kernel then.
    #[inline]
    pub fn check(self, header: VnetHeader, len: usize, start: &[u8]) -> Result<CheckedHeader, HeaderFault> {
        if !(ETH_HEADER..=FRAME_MAX).contains(&len) {
            return Err(HeaderFault::Length { len });
        }
        if header.is_gso() {
            return self.check_gso(header, len, start);
        }
        let plain = VnetHeader { flags: header.flags & F_NEEDS_CSUM, ..VnetHeader::default() };
        if plain.flags == 0 {
            return Ok(CheckedHeader { header: plain, segments: 1 });
        }
        self.check_checksum(header, len)?;
        let header = VnetHeader { csum_start: header.csum_start, csum_offset: header.csum_offset, ..plain };
        Ok(CheckedHeader { header, segments: 1 })
    }

    fn has(self, feature: u64) -> bool {
        self.acked & feature != 0
    }

    /// Checks that NEEDS_CSUM was negotiated, is not combined with DATA_VALID, and names a field behind the Ethernet
    /// header within the frame.
    fn check_checksum(self, header: VnetHeader, len: usize) -> Result<(), HeaderFault> {
        let VnetHeader { flags, gso_type, gso_size, csum_start: start, csum_offset: offset, .. } = header;
        if !self.has(CSUM) {
            return Err(HeaderFault::NotNegotiated { flags, gso_type });
        }
        if flags & F_DATA_VALID != 0 {
            return Err(HeaderFault::Contradictory { flags, gso_type, gso_size });
        }
        let end = usize::from(start) + usize::from(offset) + 2;
        if usize::from(start) < ETH_HEADER || end > len {
            return Err(HeaderFault::Checksum { start, offset });
        }
        Ok(())
    }

    fn check_gso(self, header: VnetHeader, len: usize, start: &[u8]) -> Result<CheckedHeader, HeaderFault> {
        let VnetHeader { flags, gso_type, gso_size, csum_start, csum_offset, .. } = header;
        if !self.is_negotiated(gso_type) {
            return Err(HeaderFault::NotNegotiated { flags, gso_type });
        }
        if gso_size == 0 || gso_size == GSO_BY_FRAGS || flags & F_NEEDS_CSUM == 0 {
            return Err(HeaderFault::Contradictory { flags, gso_type, gso_size });
        }
        self.check_checksum(header, len)?;
        let start = start.get(..len.min(start.len())).unwrap_or_default();
        let wrong_protocol = HeaderFault::WrongProtocol { gso_type };
        let found = find_l4(start).ok_or(wrong_protocol)?;
        let kind = found.kind().filter(|kind| kind.fits(gso_type)).ok_or(wrong_protocol)?;
        if usize::from(csum_start) != found.l4 || csum_offset != kind.checksum_offset() {
            return Err(HeaderFault::Checksum { start: csum_start, offset: csum_offset });
        }
        let headers = kind.payload_start(start, found.l4).ok_or(wrong_protocol)?;
        let segments = len.saturating_sub(headers).div_ceil(usize::from(gso_size));
        if segments > usize::from(self.limit.0) {
            return Err(HeaderFault::TooManySegments { segments });
        }
        // The driver's `hdr_len` is ignored and computed anew; `headers` is at most PROTOCOL_HEADERS_MAX.
        let header = VnetHeader {
            flags: F_NEEDS_CSUM,
            gso_type,
            hdr_len: headers as u16,
            gso_size,
            csum_start,
            csum_offset,
            num_buffers: 0,
        };
        Ok(CheckedHeader { header, segments })
    }

    /// Whether a GSO type exists and was negotiated.
    fn is_negotiated(self, gso_type: u8) -> bool {
        let (feature, is_tcp) = match gso_type & !GSO_ECN {
            GSO_TCPV4 => (HOST_TSO4, true),
            GSO_TCPV6 => (HOST_TSO6, true),
            GSO_UDP => (HOST_UFO, false),
            GSO_UDP_L4 => (HOST_USO, false),
            _ => return false,
        };
        let ecn_allowed = gso_type & GSO_ECN == 0 || (is_tcp && self.has(HOST_ECN));
        self.has(feature) && ecn_allowed
    }
}

/// Offset of `num_buffers` in a header.
pub const NUM_BUFFERS_OFFSET: usize = 10;

/// The frame needs an offload that the guest did not negotiate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotNegotiated;

/// The rx header as the guest may see it: without anything that it did not negotiate.
///
/// # Errors
/// [`NotNegotiated`] if leaving that out would break the frame.
#[inline]
pub fn check_rx(header: VnetHeader, guest: GuestOffloads) -> Result<VnetHeader, NotNegotiated> {
    if header.flags == 0 && header.gso_type == GSO_NONE {
        return Ok(VnetHeader::default());
    }
    let segmentation = match header.gso_type & !GSO_ECN {
        GSO_NONE => true,
        GSO_TCPV4 => guest.has(GUEST_TSO4),
        GSO_TCPV6 => guest.has(GUEST_TSO6),
        GSO_UDP => guest.has(GUEST_UFO),
        GSO_UDP_L4 => guest.has(GUEST_USO4) && guest.has(GUEST_USO6),
        _ => false,
    };
    let ecn = header.gso_type & GSO_ECN == 0 || guest.has(GUEST_ECN);
    let is_open = header.flags & F_NEEDS_CSUM != 0;
    let checksum = !is_open || guest.has(GUEST_CSUM);
    // A frame merged by the NIC (LRO) has a GSO type without NEEDS_CSUM. Guests must not see that (VIRTIO 1.3,
    // "Processing of Incoming Packets"), and Linux refuses such UDP frames.
    let is_whole = is_open || !header.is_gso();
    if !(segmentation && ecn && checksum && is_whole) {
        return Err(NotNegotiated);
    }
    let may = if guest.has(GUEST_CSUM) { F_NEEDS_CSUM | F_DATA_VALID } else { 0 };
    Ok(VnetHeader { flags: header.flags & may, num_buffers: 0, ..header })
}

/// Replaces the device's header in `place` by what [`check_rx`] lets the guest see.
///
/// A header that is right already is not written, so that a copy of the frame need not wait for the store.
///
/// # Errors
/// [`NotNegotiated`] as [`check_rx`]; nothing is changed then.
pub fn check_rx_in_place(place: &mut [u8; HEADER_LEN], guest: GuestOffloads) -> Result<(), NotNegotiated> {
    let shown = check_rx(VnetHeader::from_bytes(place), guest)?.to_bytes();
    if *place != shown {
        *place = shown;
    }
    Ok(())
}
