//! The control queue's commands (VIRTIO 1.3, "Network Device", "Control Virtqueue"): bytes in, a verdict out.
//!
//! For front-ends that hand the control queue over. This file decides what a command means for the device's state;
//! `control_queue` reads the ring and carries the [`Effect`] out. What was not negotiated or does not exist is refused,
//! and so is a command that is not exactly as long as its structure.

use std::sync::Arc;

use super::features::{
    self, CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, GUEST_ANNOUNCE, GuestOffloads,
    LOG_ALL, MQ, PROTOCOL_FEATURES,
};
use super::filter::{MacTable, RxFilter, VlanTable};
use crate::mac::Mac;

/// `VIRTIO_NET_OK`.
pub const OK: u8 = 0;
/// `VIRTIO_NET_ERR`.
pub const ERR: u8 = 1;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_VLAN: u8 = 2;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
const CLASS_GUEST_OFFLOADS: u8 = 5;

const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;
const ANNOUNCE_ACK: u8 = 0;
const MQ_VQ_PAIRS_SET: u8 = 0;
const GUEST_OFFLOADS_SET: u8 = 0;

/// The most addresses of one kind (unicast or multicast) that are kept; with more, all of that kind pass.
const MAC_TABLE_MAX: usize = 64;

/// What the caller has to do to carry a command out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The receive filter changed.
    Filter(Arc<RxFilter>),
    /// The guest's MAC address changed.
    Mac(Mac),
    /// The guest uses only the queue pairs before this one.
    QueuePairs(u16),
    /// The guest offloads changed.
    Offloads(GuestOffloads),
    /// Nothing: the driver acknowledges an announcement.
    None,
}

impl Effect {
    /// What changes, for the log: a few words, as a guest may send many commands.
    pub fn name(&self) -> &'static str {
        match self {
            Effect::Filter(_) => "receive filter",
            Effect::Mac(_) => "MAC address",
            Effect::QueuePairs(_) => "queue pairs",
            Effect::Offloads(_) => "guest offloads",
            Effect::None => "announcement",
        }
    }
}

/// What the commands have set so far.
#[derive(Clone, Debug, Default)]
pub struct ControlState {
    features: u64,
    max_queue_pairs: u16,
    filter: RxFilter,
    /// The one address that the device lets frames in to, if it does not let in any.
    only: Option<Mac>,
    /// How many queue pairs the guest uses, once it has said so.
    queue_pairs: Option<u16>,
    /// The guest offloads, once it has set them.
    offloads: Option<GuestOffloads>,
}

impl ControlState {
    /// The state after a reset, for a guest that acknowledged `features`.
    pub fn new(features: u64, max_queue_pairs: u16, mac: Option<Mac>) -> ControlState {
        // Front-ends add and take away what concerns themselves alone; it is the same guest.
        let features = features::consistent(features) & !(LOG_ALL | PROTOCOL_FEATURES);
        let vlans = (features & CTRL_VLAN != 0).then(VlanTable::default);
        let filter = RxFilter { mac, vlans, ..RxFilter::default() };
        let offloads = (features & CTRL_GUEST_OFFLOADS != 0).then(|| GuestOffloads::of(features));
        ControlState { features, max_queue_pairs, filter, offloads, ..ControlState::default() }
    }

    /// The state of a guest that continues with its ring: the state when the ring stopped, if there is one. Else the
    /// commands were carried out by another process and are unknown: then every frame passes, and every frame is
    /// finished.
    pub fn resumed(self, former: ControlState) -> ControlState {
        if former.features == self.features {
            return former;
        }
        let filter = RxFilter {
            mac: self.filter.mac.filter(|_| !self.has(CTRL_MAC_ADDR)),
            table: MacTable { unicast_overflow: true, multicast_overflow: true, ..MacTable::default() },
            vlans: self.filter.vlans.as_ref().map(|_| VlanTable::full()),
            ..self.filter.clone()
        };
        let queue_pairs = self.has(MQ).then_some(self.max_queue_pairs);
        let offloads = self.has(CTRL_GUEST_OFFLOADS).then(|| GuestOffloads::of(0));
        ControlState { filter, queue_pairs, offloads, ..self }
    }

    /// The effects that restore this state after a reset. Offloads come first, so that frames that pass are finished
    /// accordingly.
    pub fn effects(&self) -> impl Iterator<Item = Effect> {
        let filter = self.filter.mac.map_or_else(|| Effect::Filter(self.filter()), Effect::Mac);
        let pairs = self.queue_pairs.map(Effect::QueuePairs);
        [self.offloads.map(Effect::Offloads), Some(filter), pairs].into_iter().flatten()
    }

    /// Sets the only address to which the device accepts frames, if there is such a limit. A guest may not choose
    /// another address: it would receive nothing.
    ///
    /// Further addresses and the receive modes are not refused: those commands must be supported, and what then comes is a
    /// SHOULD ("Packet Receive Filtering"). An answer that they failed would keep the groups in the same table from the
    /// guest.
    pub fn restrict_address(&mut self, only: Option<Mac>) {
        self.only = only;
    }

    /// The filter as it is now.
    pub fn filter(&self) -> Arc<RxFilter> {
        Arc::new(self.filter.clone())
    }

    /// Decides on one command: class, command and data. `None` refuses it, and nothing has changed then.
    pub fn command(&mut self, command: &[u8]) -> Option<Effect> {
        let (&[class, command], data) = command.split_first_chunk()?;
        match class {
            CLASS_RX => self.set_mode(command, data),
            CLASS_MAC => self.set_mac(command, data),
            CLASS_VLAN => self.set_vlan(command, data),
            CLASS_ANNOUNCE if command == ANNOUNCE_ACK && data.is_empty() && self.has(GUEST_ANNOUNCE) => {
                Some(Effect::None)
            }
            CLASS_MQ if command == MQ_VQ_PAIRS_SET && self.has(MQ) => {
                let pairs = u16::from_le_bytes(data.try_into().ok()?);
                (1..=self.max_queue_pairs).contains(&pairs).then_some(())?;
                self.queue_pairs = Some(pairs);
                Some(Effect::QueuePairs(pairs))
            }
            CLASS_GUEST_OFFLOADS if command == GUEST_OFFLOADS_SET && self.has(CTRL_GUEST_OFFLOADS) => {
                let wanted = u64::from_le_bytes(data.try_into().ok()?);
                let negotiated = self.features & GuestOffloads::ALL;
                (wanted & !negotiated == 0).then_some(())?;
                let offloads = GuestOffloads::of(wanted);
                self.offloads = Some(offloads);
                Some(Effect::Offloads(offloads))
            }
            _ => None,
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn filter_changed(&self) -> Option<Effect> {
        Some(Effect::Filter(self.filter()))
    }

    fn set_mode(&mut self, command: u8, data: &[u8]) -> Option<Effect> {
        let &[on @ (0 | 1)] = data else { return None };
        let modes = &mut self.filter.modes;
        let (mode, needs) = match command {
            0 => (&mut modes.promiscuous, CTRL_RX),
            1 => (&mut modes.all_multicast, CTRL_RX),
            2 => (&mut modes.all_unicast, CTRL_RX_EXTRA),
            3 => (&mut modes.no_multicast, CTRL_RX_EXTRA),
            4 => (&mut modes.no_unicast, CTRL_RX_EXTRA),
            5 => (&mut modes.no_broadcast, CTRL_RX_EXTRA),
            _ => return None,
        };
        (self.features & needs != 0).then_some(())?;
        *mode = on == 1;
        self.filter_changed()
    }

    fn set_mac(&mut self, command: u8, data: &[u8]) -> Option<Effect> {
        match command {
            MAC_TABLE_SET if self.has(CTRL_RX) => {
                let (unicast, rest) = read_macs(data)?;
                let (multicast, rest) = read_macs(rest)?;
                rest.is_empty().then_some(())?;
                self.filter.table = MacTable {
                    unicast: kept(unicast),
                    multicast: kept(multicast),
                    unicast_overflow: unicast.len() > MAC_TABLE_MAX,
                    multicast_overflow: multicast.len() > MAC_TABLE_MAX,
                };
                self.filter_changed()
            }
            MAC_ADDR_SET if self.has(CTRL_MAC_ADDR) => {
                let mac: Mac = data.try_into().ok()?;
                // Setting the current address again changes nothing, so it is not refused.
                let is_let_in = self.only.is_none_or(|only| only == mac) || self.filter.mac == Some(mac);
                is_let_in.then_some(())?;
                self.filter.mac = Some(mac);
                Some(Effect::Mac(mac))
            }
            _ => None,
        }
    }

    fn set_vlan(&mut self, command: u8, data: &[u8]) -> Option<Effect> {
        let id = u16::from_le_bytes(data.try_into().ok()?);
        let pass = match command {
            VLAN_ADD => true,
            VLAN_DEL => false,
            _ => return None,
        };
        let vlans = self.filter.vlans.as_mut().filter(|_| id < 4096)?;
        vlans.set(id, pass);
        self.filter_changed()
    }
}

/// One table of `struct virtio_net_ctrl_mac`: a count and as many addresses; tells what comes behind it.
fn read_macs(data: &[u8]) -> Option<(&[Mac], &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (table, rest) = rest.split_at_checked(count.checked_mul(size_of::<Mac>())?)?;
    Some((table.as_chunks().0, rest))
}

/// The addresses to keep: none where the table is too large, as all pass then.
fn kept(macs: &[Mac]) -> Vec<Mac> {
    if macs.len() > MAC_TABLE_MAX { Vec::new() } else { macs.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::features::{CTRL_VQ, GUEST_CSUM, GUEST_TSO4};

    const ALL: u64 = CTRL_VQ
        | CTRL_RX
        | CTRL_RX_EXTRA
        | CTRL_VLAN
        | CTRL_MAC_ADDR
        | MQ
        | GUEST_ANNOUNCE
        | CTRL_GUEST_OFFLOADS
        | GUEST_CSUM
        | GUEST_TSO4;

    fn state() -> ControlState {
        ControlState::new(ALL, 4, Some([2, 0, 0, 0, 0, 1]))
    }

    fn table(unicast: usize, multicast: usize) -> Vec<u8> {
        let mut data = vec![CLASS_MAC, MAC_TABLE_SET];
        for count in [unicast, multicast] {
            data.extend((count as u32).to_le_bytes());
            data.extend(std::iter::repeat_n([4; 6], count).flatten());
        }
        data
    }

    #[test]
    fn every_command_without_its_feature_is_refused() {
        let commands: &[&[u8]] = &[
            &[0, 0, 1],
            &[0, 2, 1],
            &table(1, 1),
            &[1, 1, 2, 0, 0, 0, 0, 9],
            &[2, 0, 5, 0],
            &[3, 0],
            &[4, 0, 1, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ];
        for command in commands {
            assert!(state().command(command).is_some(), "{command:?}");
            assert_eq!(ControlState::new(CTRL_VQ, 4, None).command(command), None, "{command:?}");
        }
    }

    #[test]
    fn unknown_or_wrongly_sized_command_is_refused() {
        let commands: &[&[u8]] = &[
            &[],
            &[0],
            &[0, 0],
            &[0, 0, 2],
            &[0, 0, 1, 1],
            &[0, 6, 1],
            &[1, 2, 0],
            &[1, 1, 2, 0, 0, 0, 0],
            &[2, 0, 5],
            &[2, 2, 5, 0],
            &[2, 0, 0, 0x10],
            &[2, 0, 0xff, 0xff],
            &[3, 0, 0],
            &[3, 1],
            &[4, 1, 1, 0],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[5, 0, 0],
            &[6, 0],
            &[255, 255, 255],
        ];
        for command in commands {
            assert_eq!(state().command(command), None, "{command:?}");
        }
    }

    #[test]
    fn queue_pairs_and_offloads_within_limits_take_effect() {
        assert_eq!(state().command(&[4, 0, 4, 0]), Some(Effect::QueuePairs(4)));
        let set = |bits: u64| state().command(&[&[5, 0][..], &bits.to_le_bytes()].concat());
        assert_eq!(set(GUEST_CSUM), Some(Effect::Offloads(GuestOffloads::of(GUEST_CSUM))));
        assert_eq!(set(features::GUEST_TSO6), None);
        assert_eq!(set(1 << 60), None);
    }

    #[test]
    fn address_that_nothing_comes_to_is_refused_and_changes_nothing() {
        const TOLD: Mac = [2, 0, 0, 0, 0, 1];
        const ONLY: Mac = [2, 0, 0, 0, 0, 2];
        let set = |state: &mut ControlState, mac: Mac| state.command(&[&[CLASS_MAC, MAC_ADDR_SET][..], &mac].concat());
        let mut state = state();
        state.restrict_address(Some(ONLY));
        assert_eq!(set(&mut state, [4; 6]), None);
        assert_eq!(state.filter.mac, Some(TOLD));
        assert_eq!(set(&mut state, TOLD), Some(Effect::Mac(TOLD)));
        assert_eq!(set(&mut state, ONLY), Some(Effect::Mac(ONLY)));
        assert_eq!(set(&mut state, TOLD), None);
        assert!(state.command(&table(1, 1)).is_some(), "further addresses are best-effort");
        state.restrict_address(None);
        assert_eq!(set(&mut state, [4; 6]), Some(Effect::Mac([4; 6])));
    }

    #[test]
    fn mac_table_larger_than_kept_lets_all_of_its_kind_pass() {
        let mut state = state();
        state.command(&[0, 0, 0]).expect("promiscuous off");
        state.command(&table(2, MAC_TABLE_MAX + 1)).expect("table");
        let table = &state.filter.table;
        assert!(table.multicast_overflow && table.multicast.is_empty());
        assert!(!table.unicast_overflow && table.unicast == [[4; 6]; 2]);
    }

    #[test]
    fn mac_table_whose_count_does_not_fit_is_refused() {
        for count in [2, u32::MAX, u32::MAX / 6 + 1] {
            let mut data = table(1, 0);
            data[2..6].copy_from_slice(&count.to_le_bytes());
            assert_eq!(state().command(&data), None, "{count}");
        }
        let mut long = table(1, 1);
        long.push(0);
        assert_eq!(state().command(&long), None);
    }
}
