//! The format of a frame on the device's side. On the guest's side it is a virtio-net header of 12 bytes and an
//! Ethernet frame.
//!
//! What a device does not have is left out at the start, and the virtio-net header is moved to what remains; the rest
//! of the frame never moves. `tx` calls `cut`, `rx` calls `enclose`.
//!
//! ```text
//!   the guest's        [virtio-net header: 12][Ethernet: 14][packet]
//!   a TAP's            [virtio-net header: 12][Ethernet: 14][packet]
//!   a packet socket's  [2 unused][its first 10][Ethernet: 14][packet]
//!   a TUN's            [14 unused][virtio-net header: 12][packet]
//! ```

use std::sync::Arc;

use super::header::{F_NEEDS_CSUM, HEADER_LEN, VnetHeader};
use super::ip_link::{self, IpLink};
use super::{ETH_HEADER, VlanTag};
use crate::device::DeviceQueue;

/// What of a frame a device does without.
#[derive(Clone, Debug)]
pub enum Framing {
    /// Nothing: as the guest has it.
    Whole,
    /// The virtio-net header's `num_buffers` (packet sockets).
    ShortHeader,
    /// The Ethernet header (TUN).
    Packets(Arc<IpLink>),
}

/// The part of the header that a packet socket has.
const SHORT_HEADER: usize = 10;

impl Framing {
    /// That of `queue`; `link` is there for a device of IP packets.
    pub fn of(queue: &DeviceQueue, link: Option<&Arc<IpLink>>) -> Framing {
        match link {
            Some(link) => Framing::Packets(Arc::clone(link)),
            None if queue.is_packet_socket() => Framing::ShortHeader,
            None => Framing::Whole,
        }
    }

    /// The guest's link, if the device carries IP packets only.
    #[inline]
    pub fn link(&self) -> Option<&Arc<IpLink>> {
        match self {
            Framing::Packets(link) => Some(link),
            Framing::Whole | Framing::ShortHeader => None,
        }
    }

    /// How many bytes at the start of what the guest has do not go over the device.
    #[inline]
    pub(crate) fn omitted(&self) -> usize {
        match self {
            Framing::Whole => 0,
            Framing::ShortHeader => HEADER_LEN - SHORT_HEADER,
            Framing::Packets(_) => ETH_HEADER,
        }
    }

    /// How many of the guest's first bytes are read into private memory, because the device's differ from them.
    #[inline]
    pub(super) fn private_len(&self) -> usize {
        match self {
            Framing::Whole | Framing::ShortHeader => HEADER_LEN,
            Framing::Packets(_) => HEADER_LEN + ETH_HEADER + ip_link::PEEK,
        }
    }

    /// Converts `bytes`, the start of what the guest sends, to the device's format.
    #[inline]
    pub(crate) fn cut(&self, bytes: &mut [u8]) {
        match self {
            Framing::Whole => {}
            Framing::ShortHeader if bytes.len() >= HEADER_LEN => {
                bytes.copy_within(..SHORT_HEADER, HEADER_LEN - SHORT_HEADER);
            }
            Framing::ShortHeader => {}
            Framing::Packets(_) => IpLink::cut(bytes),
        }
    }

    /// Converts `bytes`, the start of what the device gave, to the guest's format. Returns false if that is not
    /// possible.
    #[inline]
    pub(super) fn enclose(&self, bytes: &mut [u8]) -> bool {
        match self {
            Framing::Whole => true,
            Framing::ShortHeader => {
                let Some(header) = bytes.first_chunk_mut::<HEADER_LEN>() else { return false };
                header.rotate_left(HEADER_LEN - SHORT_HEADER);
                let [.., a, b] = header;
                (*a, *b) = (0, 0);
                true
            }
            Framing::Packets(link) => link.enclose(bytes),
        }
    }
}

/// Inserts a VLAN tag into the frame of `len` bytes, virtio-net header included, at the start of `bytes`. Returns its
/// new length if there is room (IEEE 802.1Q, "Tag format": behind the two addresses).
pub(super) fn put_tag(bytes: &mut [u8], len: usize, tag: VlanTag) -> Option<usize> {
    const TAG: usize = 4;
    const AT: usize = HEADER_LEN + 12;
    let room = bytes.get_mut(AT..len + TAG)?;
    let kept = room.len().checked_sub(TAG)?;
    room.copy_within(..kept, TAG);
    let fields = tag.tpid.to_be_bytes().into_iter().chain(tag.tci.to_be_bytes());
    room.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    let place = bytes.first_chunk_mut::<HEADER_LEN>()?;
    let mut header = VnetHeader::from_bytes(place);
    if header.flags & F_NEEDS_CSUM != 0 {
        header.csum_start = header.csum_start.saturating_add(TAG as u16);
    }
    if header.hdr_len != 0 {
        header.hdr_len = header.hdr_len.saturating_add(TAG as u16);
    }
    *place = header.to_bytes();
    Some(len + TAG)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: VlanTag = VlanTag { tpid: 0x88a8, tci: 5 };

    #[test]
    fn tag_goes_behind_the_addresses_and_moves_what_the_header_counts() {
        let header = VnetHeader { flags: F_NEEDS_CSUM, hdr_len: 54, csum_start: 34, ..VnetHeader::default() };
        let mut bytes = [&header.to_bytes()[..], &[1; 12], &[8, 0, 9], &[0; 4]].concat();
        assert_eq!(put_tag(&mut bytes, HEADER_LEN + 15, TAG), Some(HEADER_LEN + 19));
        let moved = VnetHeader { hdr_len: 58, csum_start: 38, ..header };
        assert_eq!(bytes, [&moved.to_bytes()[..], &[1; 12], &[0x88, 0xa8, 0, 5], &[8, 0, 9]].concat());
    }

    #[test]
    fn tag_without_room_is_not_put_in() {
        let mut bytes = vec![7; HEADER_LEN + 100];
        assert_eq!(put_tag(&mut bytes, HEADER_LEN + 97, TAG), None);
        assert_eq!(put_tag(&mut bytes, HEADER_LEN + 3, TAG), None);
        assert_eq!(bytes, vec![7; HEADER_LEN + 100]);
        assert!(put_tag(&mut bytes, HEADER_LEN + 96, TAG).is_some());
    }
}
