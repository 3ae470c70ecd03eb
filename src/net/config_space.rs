//! The device configuration space (VIRTIO 1.3, "Network Device", "Device configuration layout").

use crate::mac::Mac;

/// Link is up, in `status`.
const STATUS_LINK_UP: u16 = 1;
/// `speed` and `duplex` are not known.
const UNKNOWN_SPEED: u32 = u32::MAX;
const UNKNOWN_DUPLEX: u8 = u8::MAX;
/// Bytes of `struct virtio_net_config`.
pub const CONFIG_LEN: usize = 24;
/// Bytes that can be read (vhost-user, "Virtio device config space"); those after the structure are zeros.
const READABLE_LEN: usize = 256;
/// Smallest MTU that the specification allows.
pub const MTU_MIN: u16 = 68;

/// What the configuration space says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    /// The MAC address; zero where none was given.
    pub mac: Mac,
    /// The most queue pairs that may be used.
    pub max_queue_pairs: u16,
    /// The largest MTU that the driver may use.
    pub mtu: u16,
    /// Whether frames pass over the interface.
    pub link_up: bool,
}

/// What a driver is shown of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkShown {
    /// The actual state, for a driver that is told of changes.
    AsItIs,
    /// Always up, for a driver that is never told of changes: it would believe for ever what it once read.
    Up,
}

impl ConfigSpace {
    /// The bytes as the driver sees them.
    pub fn to_bytes(&self, shown: LinkShown) -> [u8; CONFIG_LEN] {
        let status = if self.link_up || shown == LinkShown::Up { STATUS_LINK_UP } else { 0 };
        let mut bytes = [0; CONFIG_LEN];
        let fields: [&[u8]; 6] = [
            &self.mac,
            &status.to_le_bytes(),
            &self.max_queue_pairs.to_le_bytes(),
            &self.mtu.to_le_bytes(),
            &UNKNOWN_SPEED.to_le_bytes(),
            &[UNKNOWN_DUPLEX],
        ];
        let filled = bytes.iter_mut().zip(fields.into_iter().flatten());
        filled.for_each(|(to, from)| *to = *from);
        bytes
    }

    /// The bytes `offset .. offset + size`, if the range is not empty and all of it can be read. Generic front-ends,
    /// which do not know the device's type, read the largest possible range at once.
    pub fn read(&self, offset: u32, size: u32, shown: LinkShown) -> Option<Vec<u8>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        let mut readable = [0; READABLE_LEN];
        readable[..CONFIG_LEN].copy_from_slice(&self.to_bytes(shown));
        readable.get(start..end).filter(|bytes| !bytes.is_empty()).map(<[u8]>::to_vec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: ConfigSpace = ConfigSpace { mac: [1, 2, 3, 4, 5, 6], max_queue_pairs: 4, mtu: 1500, link_up: true };

    #[test]
    fn layout_is_the_specifications() {
        let bytes = SPACE.to_bytes(LinkShown::AsItIs);
        assert_eq!(bytes[..6], [1, 2, 3, 4, 5, 6]);
        assert_eq!(bytes[6..12], [1, 0, 4, 0, 0xdc, 5]);
        assert_eq!(bytes[12..], [0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn link_that_is_down_is_shown_to_drivers_that_are_told_of_changes() {
        let down = ConfigSpace { link_up: false, ..SPACE };
        assert_eq!(down.to_bytes(LinkShown::AsItIs)[6..8], [0, 0]);
        assert_eq!(down.to_bytes(LinkShown::Up)[6..8], [1, 0]);
    }

    #[test]
    fn read_beyond_the_end_is_zeros_and_beyond_what_can_be_read_refused() {
        let read = |offset, size| SPACE.read(offset, size, LinkShown::AsItIs);
        assert_eq!(read(0, 24).map(|b| b.len()), Some(24));
        assert_eq!(read(6, 2), Some(vec![1, 0]));
        assert_eq!(read(23, 2), Some(vec![0, 0]));
        assert_eq!(read(0, 256).map(|b| b.len()), Some(256));
        for (offset, size) in [(0, 0), (0, 257), (256, 1), (255, 2), (u32::MAX, 1), (0xffff_ff00, 0x200)] {
            assert_eq!(read(offset, size), None, "{offset} {size}");
        }
    }
}
