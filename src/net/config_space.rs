//! The device configuration space (VIRTIO 1.3, "Network Device", "Device configuration layout").

/// Link is up, in `status`.
const STATUS_LINK_UP: u16 = 1;
/// `speed` and `duplex` are not known.
const UNKNOWN_SPEED: u32 = u32::MAX;
const UNKNOWN_DUPLEX: u8 = u8::MAX;
/// Bytes of `struct virtio_net_config`.
pub const CONFIG_LEN: usize = 24;
/// Smallest MTU that the specification allows.
pub const MTU_MIN: u16 = 68;

/// What the configuration space says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    /// The MAC address; zero where none was given.
    pub mac: [u8; 6],
    /// The most queue pairs that may be used.
    pub max_queue_pairs: u16,
    /// The largest MTU that the driver may use.
    pub mtu: u16,
}

impl ConfigSpace {
    /// The bytes as the driver sees them.
    pub fn to_bytes(&self) -> [u8; CONFIG_LEN] {
        let mut bytes = [0; CONFIG_LEN];
        let fields: [&[u8]; 6] = [
            &self.mac,
            &STATUS_LINK_UP.to_le_bytes(),
            &self.max_queue_pairs.to_le_bytes(),
            &self.mtu.to_le_bytes(),
            &UNKNOWN_SPEED.to_le_bytes(),
            &[UNKNOWN_DUPLEX],
        ];
        let filled = bytes.iter_mut().zip(fields.into_iter().flatten());
        filled.for_each(|(to, from)| *to = *from);
        bytes
    }

    /// The bytes `offset .. offset + size`, if there are any and all of them exist.
    pub fn read(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        self.to_bytes().get(start..end).filter(|bytes| !bytes.is_empty()).map(<[u8]>::to_vec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_specifications() {
        let space = ConfigSpace { mac: [1, 2, 3, 4, 5, 6], max_queue_pairs: 4, mtu: 1500 };
        let bytes = space.to_bytes();
        assert_eq!(bytes[..6], [1, 2, 3, 4, 5, 6]);
        assert_eq!(bytes[6..12], [1, 0, 4, 0, 0xdc, 5]);
        assert_eq!(bytes[12..], [0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn read_beyond_the_end_is_refused() {
        let space = ConfigSpace { mac: [0; 6], max_queue_pairs: 1, mtu: 1500 };
        assert_eq!(space.read(0, 24).map(|b| b.len()), Some(24));
        assert_eq!(space.read(6, 2), Some(vec![1, 0]));
        for (offset, size) in [(0, 0), (0, 25), (24, 1), (23, 2), (u32::MAX, 1), (0xffff_ff00, 0x200)] {
            assert_eq!(space.read(offset, size), None, "{offset} {size}");
        }
    }
}
