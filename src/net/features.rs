//! The one table of virtio features: which are offered when, and what an acknowledged one asks of the TAP.
//!
//! VIRTIO 1.3, "Network Device", "Feature bits", and "Reserved Feature Bits". A `GUEST_` offload is what the guest can
//! receive unfinished, a `HOST_` offload what it may send unfinished. A frame is unfinished if its checksum or
//! segmentation is left to the receiver.

use crate::device::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6};

/// When a feature is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Always.
    Always,
    /// If the device can do all of these `TUN_F_` offloads.
    Device(u32),
    /// If a MAC address was given.
    Mac,
    /// If the front-end hands over the control queue.
    ControlQueue,
}

/// One feature bit.
#[derive(Clone, Copy, Debug)]
struct Row {
    bit: u32,
    name: &'static str,
    when: When,
    /// The features without which the driver must not acknowledge it (VIRTIO 1.3, "Feature bit requirements").
    needs: u64,
}

const fn row(bit: u32, name: &'static str, when: When, needs: u64) -> Row {
    Row { bit, name, when, needs }
}

macro_rules! bits {
    ($($name:ident = $bit:literal,)+) => {
        $(#[doc = concat!("The mask of feature bit ", $bit, ".")] pub const $name: u64 = 1 << $bit;)+
    };
}

bits! {
    CSUM = 0,
    GUEST_CSUM = 1,
    CTRL_GUEST_OFFLOADS = 2,
    MTU = 3,
    MAC = 5,
    GUEST_TSO4 = 7,
    GUEST_TSO6 = 8,
    GUEST_ECN = 9,
    GUEST_UFO = 10,
    HOST_TSO4 = 11,
    HOST_TSO6 = 12,
    HOST_ECN = 13,
    HOST_UFO = 14,
    MRG_RXBUF = 15,
    STATUS = 16,
    CTRL_VQ = 17,
    CTRL_RX = 18,
    CTRL_VLAN = 19,
    CTRL_RX_EXTRA = 20,
    GUEST_ANNOUNCE = 21,
    MQ = 22,
    CTRL_MAC_ADDR = 23,
    LOG_ALL = 26,
    INDIRECT_DESC = 28,
    EVENT_IDX = 29,
    PROTOCOL_FEATURES = 30,
    VERSION_1 = 32,
    IN_ORDER = 35,
    GUEST_USO4 = 54,
    GUEST_USO6 = 55,
    HOST_USO = 56,
}

const USO: u32 = TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6;

/// CTRL_VQ, GUEST_ANNOUNCE and MQ are always offered: without them, front-ends that handle the control queue themselves
/// would hide them from the guest. Commands that a back-end carries out are offered only to front-ends that hand the
/// control queue over.
const TABLE: &[Row] = &[
    row(0, "CSUM", When::Always, 0),
    row(1, "GUEST_CSUM", When::Device(TUN_F_CSUM), 0),
    row(2, "CTRL_GUEST_OFFLOADS", When::ControlQueue, CTRL_VQ),
    row(3, "MTU", When::Always, 0),
    row(5, "MAC", When::Mac, 0),
    row(7, "GUEST_TSO4", When::Device(TUN_F_CSUM | TUN_F_TSO4), GUEST_CSUM),
    row(8, "GUEST_TSO6", When::Device(TUN_F_CSUM | TUN_F_TSO6), GUEST_CSUM),
    row(9, "GUEST_ECN", When::Device(TUN_F_CSUM | TUN_F_TSO_ECN), GUEST_CSUM),
    row(10, "GUEST_UFO", When::Device(TUN_F_CSUM | TUN_F_UFO), GUEST_CSUM),
    row(11, "HOST_TSO4", When::Always, CSUM),
    row(12, "HOST_TSO6", When::Always, CSUM),
    row(13, "HOST_ECN", When::Always, CSUM),
    row(14, "HOST_UFO", When::Always, CSUM),
    row(15, "MRG_RXBUF", When::Always, 0),
    row(16, "STATUS", When::Always, 0),
    row(17, "CTRL_VQ", When::Always, 0),
    row(18, "CTRL_RX", When::ControlQueue, CTRL_VQ),
    row(19, "CTRL_VLAN", When::ControlQueue, CTRL_VQ),
    row(20, "CTRL_RX_EXTRA", When::ControlQueue, CTRL_VQ),
    row(21, "GUEST_ANNOUNCE", When::Always, CTRL_VQ),
    row(22, "MQ", When::Always, CTRL_VQ),
    row(23, "CTRL_MAC_ADDR", When::ControlQueue, CTRL_VQ),
    // For the front-end, not the guest (vhost-user, "Migration").
    row(26, "LOG_ALL", When::Always, 0),
    row(28, "INDIRECT_DESC", When::Always, 0),
    row(29, "EVENT_IDX", When::Always, 0),
    row(30, "PROTOCOL_FEATURES", When::Always, 0),
    row(32, "VERSION_1", When::Always, 0),
    row(35, "IN_ORDER", When::Always, 0),
    row(54, "GUEST_USO4", When::Device(USO), GUEST_CSUM),
    row(55, "GUEST_USO6", When::Device(USO), GUEST_CSUM),
    // A kernel that gives USO frames also takes them.
    row(56, "HOST_USO", When::Device(USO), CSUM),
];

/// What the offered features depend on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Circumstances {
    /// The `TUN_F_` offloads that the device has.
    pub device_offloads: u32,
    /// Whether a MAC address was given.
    pub has_mac: bool,
    /// Whether the front-end hands over the control queue (`--front-end generic`).
    pub has_control_queue: bool,
}

/// The features to offer.
pub fn offered(here: Circumstances) -> u64 {
    let applies = |row: &&Row| match row.when {
        When::Always => true,
        When::Device(flags) => here.device_offloads & flags == flags,
        When::Mac => here.has_mac,
        When::ControlQueue => here.has_control_queue,
    };
    TABLE.iter().filter(applies).fold(0, |all, row| all | 1 << row.bit)
}

/// The names of the features in `bits`, for the log.
pub fn names(bits: u64) -> String {
    let name_of = |bit: u32| {
        let row = TABLE.iter().find(|row| row.bit == bit);
        row.map_or_else(|| format!("bit {bit}"), |row| row.name.to_owned())
    };
    (0..u64::BITS).filter(|bit| bits >> bit & 1 == 1).map(name_of).collect::<Vec<_>>().join(" ")
}

/// The acknowledged features, without those that need a feature that was not acknowledged.
pub fn consistent(acked: u64) -> u64 {
    let lacks = |row: &&Row| acked & row.needs != row.needs;
    TABLE.iter().filter(lacks).fold(acked, |left, row| left & !(1 << row.bit))
}

/// Which unfinished frames the guest can receive, by the acknowledged features or as set through the control queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestOffloads(u64);

impl GuestOffloads {
    /// The features that are guest offloads, which `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET` may switch.
    pub const ALL: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO4 | GUEST_USO6;

    /// The guest offloads among `features`, without those that lack what they need.
    pub fn of(features: u64) -> GuestOffloads {
        GuestOffloads(consistent(features) & GuestOffloads::ALL)
    }

    /// Whether the guest can receive frames that need `feature`.
    #[inline]
    pub fn has(self, feature: u64) -> bool {
        self.0 & feature != 0
    }

    /// The `TUN_F_` flags to set on a device that supports `supported`: what the guest can receive unfinished, and also
    /// what is finished for it by `segment`.
    pub fn device_flags(self, supported: u32) -> u32 {
        let finished = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6;
        self.tun_flags() | (supported & finished)
    }

    /// The `TUN_F_` flags of what the guest can receive unfinished.
    pub fn tun_flags(self) -> u32 {
        let single =
            [(GUEST_CSUM, TUN_F_CSUM), (GUEST_TSO4, TUN_F_TSO4), (GUEST_TSO6, TUN_F_TSO6), (GUEST_UFO, TUN_F_UFO)];
        let mut flags = single.iter().filter(|(bit, _)| self.has(*bit)).fold(0, |all, (_, flag)| all | flag);
        // The kernel takes ECN only with a TSO, and USO for both IP versions or for none.
        if self.has(GUEST_ECN) && flags & (TUN_F_TSO4 | TUN_F_TSO6) != 0 {
            flags |= TUN_F_TSO_ECN;
        }
        if self.has(GUEST_USO4) && self.has(GUEST_USO6) {
            flags |= TUN_F_USO4 | TUN_F_USO6;
        }
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL_TUN: u32 = USO | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO;

    #[test]
    fn feature_that_the_device_lacks_is_not_offered() {
        let with = |device_offloads| offered(Circumstances { device_offloads, ..Circumstances::default() });
        assert_eq!(with(0) & GuestOffloads::ALL, 0);
        assert_eq!(with(0) & HOST_USO, 0);
        assert_eq!(with(TUN_F_CSUM) & GuestOffloads::ALL, GUEST_CSUM);
        assert_eq!(with(ALL_TUN) & GuestOffloads::ALL, GuestOffloads::ALL);
        assert_ne!(with(ALL_TUN) & HOST_USO, 0);
    }

    #[test]
    fn control_queue_commands_are_offered_to_generic_front_ends_only() {
        let commands = CTRL_GUEST_OFFLOADS | CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | CTRL_MAC_ADDR;
        let standard = offered(Circumstances { device_offloads: ALL_TUN, ..Circumstances::default() });
        assert_eq!(standard & commands, 0);
        assert_eq!(standard & (CTRL_VQ | MQ | GUEST_ANNOUNCE), CTRL_VQ | MQ | GUEST_ANNOUNCE);
        let generic = offered(Circumstances { has_control_queue: true, ..Circumstances::default() });
        assert_eq!(generic & commands, commands);
    }

    #[test]
    fn offload_without_what_it_needs_is_not_asked_of_the_device() {
        assert_eq!(GuestOffloads::of(GUEST_TSO4).tun_flags(), 0);
        assert_eq!(GuestOffloads::of(GUEST_CSUM | GUEST_ECN).tun_flags(), TUN_F_CSUM);
        assert_eq!(GuestOffloads::of(GUEST_CSUM | GUEST_USO4).tun_flags(), TUN_F_CSUM);
        assert_eq!(GuestOffloads::of(GuestOffloads::ALL).tun_flags(), ALL_TUN);
    }

    #[test]
    fn table_and_masks_agree() {
        assert_eq!(names(CSUM | CTRL_VQ | IN_ORDER | HOST_USO), "CSUM CTRL_VQ IN_ORDER HOST_USO");
        assert_eq!(names(1 << 60), "bit 60");
        assert!(TABLE.windows(2).all(|rows| rows[0].bit < rows[1].bit));
    }
}
