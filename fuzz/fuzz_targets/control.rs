//! The control queue's commands, one after the other, and the frames that then reach the guest.
//!
//! Oracle: a model, written from VIRTIO 1.3, "Control Virtqueue": which commands succeed, and which frames pass.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::net::control::{ControlState, Effect};
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::frames::{BROADCAST, GUEST_MAC, Mac};
use vhost_user_net_fuzz::kit::virtio::{ctrl, feature};

const RX_EXTRA: u64 = 1 << 20;
/// Features of the control queue, and two that it switches.
const FEATURES: [u64; 10] = [
    feature::CTRL_VQ,
    feature::CTRL_RX,
    RX_EXTRA,
    feature::CTRL_VLAN,
    feature::CTRL_MAC_ADDR,
    feature::MQ,
    feature::GUEST_ANNOUNCE,
    feature::CTRL_GUEST_OFFLOADS,
    feature::GUEST_CSUM,
    feature::GUEST_TSO4,
];
const TABLE_MAX: usize = 64;
const PAIRS: u16 = 4;

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

struct Model {
    features: u64,
    modes: [bool; 6],
    mac: Mac,
    /// The tables; none where they were too long, and all pass.
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
    vlans: BTreeSet<u16>,
}

impl Model {
    fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        if !self.has(feature::CTRL_VQ) {
            return false;
        }
        match (class, command, data) {
            (ctrl::CLASS_RX, 0..6, [value @ 0..2]) => {
                let is_allowed = self.has(if command < 2 { feature::CTRL_RX } else { RX_EXTRA });
                if is_allowed {
                    self.modes[usize::from(command)] = *value == 1;
                }
                is_allowed
            }
            (ctrl::CLASS_MAC, 0, data) if self.has(feature::CTRL_RX) => {
                let Some((unicast, rest)) = table(data) else { return false };
                let Some((multicast, [])) = table(rest) else { return false };
                let kept = |table: Vec<Mac>| Some(table).filter(|table| table.len() <= TABLE_MAX);
                (self.unicast, self.multicast) = (kept(unicast), kept(multicast));
                true
            }
            (ctrl::CLASS_MAC, 1, data) if self.has(feature::CTRL_MAC_ADDR) && data.len() == 6 => {
                self.mac.copy_from_slice(data);
                true
            }
            (ctrl::CLASS_VLAN, 0..2, [low, high @ 0..16]) if self.has(feature::CTRL_VLAN) => {
                let id = u16::from(*low) | u16::from(*high) << 8;
                if command == 0 {
                    self.vlans.insert(id)
                } else {
                    self.vlans.remove(&id)
                };
                true
            }
            (ctrl::CLASS_ANNOUNCE, 0, []) => self.has(feature::GUEST_ANNOUNCE),
            (ctrl::CLASS_MQ, 0, [1..=4, 0]) => self.has(feature::MQ),
            (ctrl::CLASS_GUEST_OFFLOADS, 0, data) if data.len() == 8 && self.has(feature::CTRL_GUEST_OFFLOADS) => {
                let wanted = u64::from_le_bytes(data.try_into().unwrap());
                // What needs checksums was not negotiated without them.
                let csum = self.features & feature::GUEST_CSUM;
                let may = if csum == 0 { 0 } else { csum | self.features & feature::GUEST_TSO4 };
                wanted & !may == 0
            }
            _ => false,
        }
    }

    fn passes(&self, frame: &[u8; 18]) -> bool {
        let [promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast] = self.modes;
        if promiscuous {
            return true;
        }
        let id = u16::from_be_bytes([frame[14], frame[15]]) % 4096;
        if self.has(feature::CTRL_VQ | feature::CTRL_VLAN) && frame[12..14] == [0x81, 0] && !self.vlans.contains(&id) {
            return false;
        }
        let to: Mac = frame[..6].try_into().unwrap();
        let is_in = |table: &Option<Vec<Mac>>| table.as_ref().is_none_or(|table| table.contains(&to));
        match to {
            BROADCAST => !no_broadcast,
            [first, ..] if first % 2 == 1 => !no_multicast && (all_multicast || is_in(&self.multicast)),
            _ => !no_unicast && (all_unicast || to == self.mac || is_in(&self.unicast)),
        }
    }
}

/// One table of addresses, and what is behind it.
fn table(data: &[u8]) -> Option<(Vec<Mac>, &[u8])> {
    let count = u32::from_le_bytes(data.get(..4)?.try_into().unwrap()) as u64;
    let bytes = data.get(4..)?;
    if count * 6 > bytes.len() as u64 {
        return None;
    }
    let (macs, rest) = bytes.split_at(count as usize * 6);
    Some((macs.chunks(6).map(|mac| mac.try_into().unwrap()).collect(), rest))
}

fn run(input: &mut Input<'_>) {
    let features = input.subset(&FEATURES);
    let mut state = ControlState::new(features, PAIRS, Some(GUEST_MAC));
    let mut model = Model {
        features,
        modes: [true, false, false, false, false, false],
        mac: GUEST_MAC,
        unicast: Some(Vec::new()),
        multicast: Some(Vec::new()),
        vlans: BTreeSet::new(),
    };
    let mut addresses = vec![GUEST_MAC, BROADCAST, [2; 6], [0x33; 6]];
    while !input.is_empty() {
        let [class, command] = input.array();
        let data = match input.u8() {
            len @ 0..128 => input.bytes(len.into()).to_vec(),
            // Two tables, whose lengths say the truth or not.
            kind => {
                let counts = [input.u8(), input.u8()].map(u32::from);
                let mut data = Vec::new();
                for count in counts {
                    let said = if kind == 255 { input.u32() } else { count };
                    data.extend(said.to_le_bytes());
                    for _ in 0..count {
                        let mac = [kind & 1, 0, 0, 0, 0, input.u8()];
                        addresses.push(mac);
                        data.extend(mac);
                    }
                }
                data
            }
        };
        addresses.extend(data.first_chunk::<6>());
        addresses.truncate(64);
        let got = state.command(&[&[class, command][..], &data].concat());
        let is_ok = model.command(class, command, &data);
        assert_eq!(got.is_some(), is_ok, "class {class}, command {command}, {data:x?}: {got:?}");
        match got {
            Some(Effect::QueuePairs(pairs)) => assert_eq!(pairs.to_le_bytes(), data[..]),
            Some(Effect::Mac(mac)) => assert_eq!(mac, data[..]),
            _ => {}
        }
        let filter = state.filter();
        let tags = [None, Some(0), Some(5), data.first_chunk().map(|id| u16::from_le_bytes(*id) % 4096)];
        for (to, tag) in addresses.iter().flat_map(|to| tags.map(|tag| (to, tag))) {
            let mut frame = [0; 18];
            frame[..6].copy_from_slice(to);
            if let Some(id) = tag {
                frame[12..14].copy_from_slice(&[0x81, 0]);
                frame[14..16].copy_from_slice(&(id | 0x6000).to_be_bytes());
            }
            assert_eq!(filter.accepts(&frame), model.passes(&frame), "frame to {to:x?}, VLAN {tag:?}");
            assert!(!filter.passes_all() || filter.accepts(&frame));
        }
    }
}
