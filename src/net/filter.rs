//! Which frames the guest wants to receive: its MAC addresses, receive modes and VLANs.
//!
//! The control queue sets it (VIRTIO 1.3, "Network Device", "Control Virtqueue"), `rx` asks it for each frame.
//! Initially, and without those commands, everything passes.

use super::ETH_HEADER;
use crate::mac::Mac;

/// Bytes of a frame that [`RxFilter::accepts`] looks at: the Ethernet header and one VLAN tag.
pub(crate) const FILTER_LEN: usize = ETH_HEADER + 4;

/// Receive modes that the driver switches (`VIRTIO_NET_CTRL_RX`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Modes {
    /// Everything.
    pub promiscuous: bool,
    /// Every multicast.
    pub all_multicast: bool,
    /// Every unicast.
    pub all_unicast: bool,
    /// No multicast.
    pub no_multicast: bool,
    /// No unicast.
    pub no_unicast: bool,
    /// No broadcast.
    pub no_broadcast: bool,
}

/// The addresses of `VIRTIO_NET_CTRL_MAC_TABLE_SET`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MacTable {
    /// Unicast addresses.
    pub unicast: Vec<Mac>,
    /// Multicast addresses.
    pub multicast: Vec<Mac>,
    /// There were more unicast addresses than are kept: all pass.
    pub unicast_overflow: bool,
    /// There were more multicast addresses than are kept: all pass.
    pub multicast_overflow: bool,
}

/// The VLAN ids of `VIRTIO_NET_CTRL_VLAN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VlanTable(Box<[u64; 64]>);

impl Default for VlanTable {
    fn default() -> VlanTable {
        VlanTable(Box::new([0; 64]))
    }
}

impl VlanTable {
    /// A table that lets all VLANs pass.
    pub fn full() -> VlanTable {
        VlanTable(Box::new([u64::MAX; 64]))
    }

    /// Lets VLAN `id` (0 to 4095) pass or not.
    pub fn set(&mut self, id: u16, pass: bool) {
        if let Some(word) = self.0.get_mut(usize::from(id / 64)) {
            let bit = 1 << (id % 64);
            *word = if pass { *word | bit } else { *word & !bit };
        }
    }

    fn has(&self, id: u16) -> bool {
        self.0.get(usize::from(id / 64)).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }
}

/// The whole filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RxFilter {
    /// Receive modes.
    pub modes: Modes,
    /// The guest's own address, once it is known.
    pub mac: Option<Mac>,
    /// Further addresses.
    pub table: MacTable,
    /// VLANs, if VLAN filtering was negotiated.
    pub vlans: Option<VlanTable>,
}

impl Default for RxFilter {
    fn default() -> RxFilter {
        let modes = Modes { promiscuous: true, ..Modes::default() };
        RxFilter { modes, mac: None, table: MacTable::default(), vlans: None }
    }
}

impl RxFilter {
    /// Whether every frame passes, so that none has to be examined.
    #[inline]
    pub fn passes_all(&self) -> bool {
        self.modes.promiscuous
    }

    /// Whether a frame that begins with these bytes is for the guest.
    pub fn accepts(&self, start: &[u8; FILTER_LEN]) -> bool {
        self.modes.promiscuous || (self.accepts_vlan(start) && self.accepts_address(start))
    }

    fn accepts_vlan(&self, start: &[u8; FILTER_LEN]) -> bool {
        let [.., t0, t1, v0, v1, _, _] = *start;
        let tagged = u16::from_be_bytes([t0, t1]) == 0x8100;
        match &self.vlans {
            Some(vlans) if tagged => vlans.has(u16::from_be_bytes([v0, v1]) & 0xfff),
            _ => true,
        }
    }

    fn accepts_address(&self, start: &[u8; FILTER_LEN]) -> bool {
        let [a, b, c, d, e, f, ..] = *start;
        let to = [a, b, c, d, e, f];
        let modes = &self.modes;
        if to == [0xff; 6] {
            !modes.no_broadcast
        } else if a & 1 == 1 {
            let listed = self.table.multicast_overflow || self.table.multicast.contains(&to);
            !modes.no_multicast && (modes.all_multicast || listed)
        } else {
            let own = self.mac.is_none_or(|mac| mac == to);
            let listed = self.table.unicast_overflow || self.table.unicast.contains(&to);
            !modes.no_unicast && (modes.all_unicast || own || listed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn frame(to: Mac, vlan: Option<u16>) -> [u8; FILTER_LEN] {
        let mut start = [0; FILTER_LEN];
        start[..6].copy_from_slice(&to);
        if let Some(id) = vlan {
            start[12..14].copy_from_slice(&[0x81, 0]);
            start[14..16].copy_from_slice(&(id | 0x2000).to_be_bytes());
        }
        start
    }

    fn quiet() -> RxFilter {
        RxFilter { modes: Modes::default(), mac: Some(OWN), ..RxFilter::default() }
    }

    #[test]
    fn without_modes_only_own_address_and_broadcast_pass() {
        let filter = quiet();
        assert!(filter.accepts(&frame(OWN, None)));
        assert!(filter.accepts(&frame([0xff; 6], None)));
        assert!(!filter.accepts(&frame([2, 0, 0, 0, 0, 2], None)));
        assert!(!filter.accepts(&frame(GROUP, None)));
    }

    #[test]
    fn modes_and_tables_open_and_close() {
        let with = |modes| RxFilter { modes, ..quiet() };
        assert!(with(Modes { all_multicast: true, ..Modes::default() }).accepts(&frame(GROUP, None)));
        assert!(with(Modes { all_unicast: true, ..Modes::default() }).accepts(&frame([2; 6], None)));
        assert!(!with(Modes { no_broadcast: true, ..Modes::default() }).accepts(&frame([0xff; 6], None)));
        assert!(!with(Modes { no_unicast: true, ..Modes::default() }).accepts(&frame(OWN, None)));
        let table = MacTable { unicast: vec![[2; 6]], multicast: vec![GROUP], ..MacTable::default() };
        let listed = RxFilter { table, ..quiet() };
        assert!(listed.accepts(&frame([2; 6], None)) && listed.accepts(&frame(GROUP, None)));
        let mut none = listed.clone();
        none.modes.no_multicast = true;
        assert!(!none.accepts(&frame(GROUP, None)));
    }

    #[test]
    fn tagged_frame_passes_only_with_its_vlan() {
        let mut vlans = VlanTable::default();
        vlans.set(5, true);
        vlans.set(4095, true);
        vlans.set(6, true);
        vlans.set(6, false);
        let mut filter = RxFilter { vlans: Some(vlans), ..quiet() };
        assert!(filter.accepts(&frame(OWN, None)));
        assert!(filter.accepts(&frame(OWN, Some(5))) && filter.accepts(&frame(OWN, Some(4095))));
        assert!(!filter.accepts(&frame(OWN, Some(6))) && !filter.accepts(&frame(OWN, Some(0))));
        filter.modes.promiscuous = true;
        assert!(filter.accepts(&frame(OWN, Some(6))));
    }
}
