//! What a flow's frames have in common: where their headers are, and which bits of them are equal.
//!
//! `coalesce` asks this of private copies. A single frame is checked there, not here.

use super::ETH_HEADER;
use super::protocol::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_HEADER, IPV6_HEADER, PacketKind, TCP_CHECKSUM, TCP_HEADER, TCP_LAST_ONLY,
    UDP_HEADER,
};

/// What a frame's headers are, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) kind: PacketKind,
    /// Where the IP header begins.
    pub(super) l3: u8,
    /// Where the TCP or UDP header begins.
    pub(super) l4: u8,
    /// Where the payload begins.
    pub(super) end: u8,
}

/// A mask of header bits that must be equal: all but the bytes at `holes` (offset, length).
const fn all_but<const N: usize>(holes: &[(usize, usize)]) -> [u8; N] {
    let mut mask = [0xff; N];
    let mut hole = 0;
    while hole < holes.len() {
        let (mut at, end) = (holes[hole].0, holes[hole].0 + holes[hole].1);
        while at < end {
            mask[at] = 0;
            at += 1;
        }
        hole += 1;
    }
    mask
}

/// A mask for the IP and transport headers of each kind of packet, without TCP options.
pub(super) struct Masks {
    tcp4: [u8; IPV4_HEADER + TCP_HEADER],
    tcp6: [u8; IPV6_HEADER + TCP_HEADER],
    udp4: [u8; IPV4_HEADER + UDP_HEADER],
    udp6: [u8; IPV6_HEADER + UDP_HEADER],
}

/// The bits that segmentation copies from the merged frame to each segment. All others it writes: IPv4's total length,
/// identification and checksum, or IPv6's payload length; UDP's length and checksum, or TCP's sequence number, last
/// flags and checksum.
pub(super) const COPIED: Masks = Masks {
    tcp4: but_last_flags(
        all_but(&[(2, 4), (10, 2), (IPV4_HEADER + 4, 4), (IPV4_HEADER + TCP_CHECKSUM, 2)]),
        IPV4_HEADER,
    ),
    tcp6: but_last_flags(all_but(&[(4, 2), (IPV6_HEADER + 4, 4), (IPV6_HEADER + TCP_CHECKSUM, 2)]), IPV6_HEADER),
    udp4: all_but(&[(2, 4), (10, 2), (IPV4_HEADER + 4, 4)]),
    udp6: all_but(&[(4, 2), (IPV6_HEADER + 4, 4)]),
};

/// The bits that are equal in frames of the same length: all but fields that count up (IPv4's identification and so its
/// checksum, TCP's sequence number) and the flags of the last TCP segment. The checksum fields of TCP and UDP hold the
/// pseudo-header's sum, which is the same in all.
pub(super) const ALIKE: Masks = Masks {
    tcp4: but_last_flags(all_but(&[(4, 2), (10, 2), (IPV4_HEADER + 4, 4)]), IPV4_HEADER),
    tcp6: but_last_flags(all_but(&[(IPV6_HEADER + 4, 4)]), IPV6_HEADER),
    udp4: all_but(&[(4, 2), (10, 2)]),
    udp6: all_but(&[]),
};

const fn but_last_flags<const N: usize>(mut mask: [u8; N], tcp: usize) -> [u8; N] {
    mask[tcp + 13] = !TCP_LAST_ONLY;
    mask
}

/// Whether the link headers are equal and the others equal under the masks. If so, `next` has the same layout: the
/// fields that determine a layout (ethertype, protocol, TCP header length) are compared.
#[inline(always)]
pub(super) fn same_headers(masks: &Masks, layout: Layout, first: &[u8], next: &[u8]) -> Option<bool> {
    let end = usize::from(layout.end);
    let (first_link, first) = first.get(..end)?.split_at_checked(layout.l3.into())?;
    let (next_link, next) = next.get(..end)?.split_at_checked(layout.l3.into())?;
    let same_packet = match layout.kind {
        PacketKind::Tcp4 => same_under(&masks.tcp4, first, next),
        PacketKind::Tcp6 => same_under(&masks.tcp6, first, next),
        PacketKind::Udp4 => same_under(&masks.udp4, first, next),
        PacketKind::Udp6 => same_under(&masks.udp6, first, next),
    };
    // Addresses and ethertype at once, then VLAN tags if there are any.
    let (first_start, first_tags) = first_link.split_first_chunk::<ETH_HEADER>()?;
    let (next_start, next_tags) = next_link.split_first_chunk::<ETH_HEADER>()?;
    Some(first_start == next_start && same_packet? && same_bytes(first_tags, next_tags))
}

/// Whether two slices are equal; most are empty.
#[inline]
fn same_bytes(first: &[u8], next: &[u8]) -> bool {
    (first.is_empty() && next.is_empty()) || first == next
}

/// Whether `N` bytes are equal under the mask, and the rest (TCP options) wholly.
#[inline]
fn same_under<const N: usize>(mask: &[u8; N], first: &[u8], next: &[u8]) -> Option<bool> {
    let (first, first_options) = first.split_first_chunk::<N>()?;
    let (next, next_options) = next.split_first_chunk::<N>()?;
    // Without an early exit, and with lengths that are multiples of 4, the compiler makes a few wide instructions of
    // this loop.
    let pairs = words(first).zip(words(next)).zip(words(mask));
    let different = pairs.fold(0, |different, ((a, b), mask)| different | ((a ^ b) & mask));
    Some(different == 0 && same_bytes(first_options, next_options))
}

fn words<const N: usize>(bytes: &[u8; N]) -> impl Iterator<Item = u32> {
    const { assert!(N.is_multiple_of(4), "no byte may be left out") };
    bytes.as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word))
}

/// A cheap hash of bytes at a frame's `start` that are equal in all frames of a flow. Frames of different flows mostly
/// have different hints, which shows sooner than a full comparison that they cannot be one run.
#[inline]
pub fn flow_hint(start: &[u8]) -> u64 {
    let Some(start) = start.first_chunk::<38>() else { return 0 };
    let word = |at| start.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    // Two Ethernet addresses and the ethertype.
    let link = word(0) ^ word(6).rotate_left(24);
    // For IPv4 without a VLAN tag these are addresses and ports, for IPv6 a part of the addresses.
    let is_tagged = !matches!(u16::from_be_bytes([start[12], start[13]]), ETHERTYPE_IPV4 | ETHERTYPE_IPV6);
    if is_tagged { link } else { link ^ word(26).rotate_left(40) ^ word(30) }
}
