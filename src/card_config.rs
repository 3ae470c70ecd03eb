//! The configuration space over the card's life, for the control threads.
//!
//! What belongs to the card itself outlives sessions, and each session begins with it. A front-end may change the MTU,
//! and a guest the MAC address, until the session ends or a driver begins anew. A change of the interface holds for
//! this session and for the next.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::device::link_watch::LinkState;
use crate::mac::Mac;
use crate::net::config_space::{ConfigSpace, LinkShown, MTU_MIN};

/// The card's configuration space, for the present session and for the next.
#[derive(Debug)]
pub struct CardConfig(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    for_next_session: ConfigSpace,
    current: ConfigSpace,
}

/// What of the configuration space changed with the interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigChange {
    /// Whether the link is up now, if that changed.
    pub link_up: Option<bool>,
    /// The MTU, if it changed.
    pub mtu: Option<u16>,
}

impl ConfigChange {
    /// Whether nothing changed.
    pub fn is_none(&self) -> bool {
        *self == ConfigChange::default()
    }
}

impl CardConfig {
    /// A configuration space with which sessions begin.
    pub fn new(config: ConfigSpace) -> CardConfig {
        CardConfig(Mutex::new(Inner { for_next_session: config.clone(), current: config }))
    }

    /// Reads the present configuration space; `None` if not all of the range can be read.
    pub fn read(&self, offset: u32, size: u32, shown: LinkShown) -> Option<Vec<u8>> {
        self.lock().current.read(offset, size, shown)
    }

    /// Forgets what an earlier front-end and its guest changed.
    pub fn begin_session(&self) {
        let mut inner = self.lock();
        inner.current = inner.for_next_session.clone();
    }

    /// Forgets what an earlier driver changed; what the front-end changed stays.
    pub fn begin_driver(&self) {
        let mut inner = self.lock();
        inner.current = ConfigSpace { mtu: inner.current.mtu, ..inner.for_next_session.clone() };
    }

    /// Changes the MTU, on behalf of the front-end.
    pub fn set_mtu(&self, mtu: u16) {
        self.lock().current.mtu = mtu;
    }

    /// Changes the MAC address, on behalf of the guest.
    pub fn set_mac(&self, mac: Mac) {
        self.lock().current.mac = mac;
    }

    /// Forgets the MAC address that the guest set, if it did.
    pub fn reset_mac(&self) {
        let mut inner = self.lock();
        inner.current.mac = inner.for_next_session.mac;
    }

    /// Changes the MAC address for sessions to come; returns the former one.
    pub fn replace_mac(&self, mac: Mac) -> Mac {
        std::mem::replace(&mut self.lock().for_next_session.mac, mac)
    }

    /// Takes over the interface's state; an MTU that no network card has is ignored.
    pub fn follow(&self, state: LinkState) -> ConfigChange {
        let Inner { for_next_session, current } = &mut *self.lock();
        let mtu = state.mtu.filter(|mtu| *mtu >= MTU_MIN);
        let change = ConfigChange {
            link_up: Some(state.is_up).filter(|up| *up != for_next_session.link_up),
            mtu: mtu.filter(|mtu| *mtu != for_next_session.mtu),
        };
        (for_next_session.link_up, current.link_up) = (state.is_up, state.is_up);
        if let Some(mtu) = change.mtu {
            (for_next_session.mtu, current.mtu) = (mtu, mtu);
        }
        change
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGINNING: ConfigSpace =
        ConfigSpace { mac: [2, 0, 0, 0, 0, 1], max_queue_pairs: 1, mtu: 1500, link_up: true };
    const GUESTS: Mac = [2, 0, 0, 0, 0, 2];

    fn changed_by_a_session() -> CardConfig {
        let config = CardConfig::new(BEGINNING);
        config.set_mtu(9000);
        config.set_mac(GUESTS);
        config
    }

    fn current(config: &CardConfig) -> ConfigSpace {
        config.lock().current.clone()
    }

    #[test]
    fn changes_last_as_long_as_who_made_them() {
        let config = changed_by_a_session();
        config.begin_driver();
        assert_eq!(current(&config), ConfigSpace { mtu: 9000, ..BEGINNING });
        config.begin_session();
        assert_eq!(current(&config), BEGINNING);
    }

    #[test]
    fn what_happens_to_the_interface_is_told_once_and_stays() {
        let config = changed_by_a_session();
        let state = LinkState { is_up: false, mtu: Some(1400) };
        assert_eq!(config.follow(state), ConfigChange { link_up: Some(false), mtu: Some(1400) });
        assert!(config.follow(state).is_none() && config.follow(LinkState { mtu: Some(60), ..state }).is_none());
        let changed = ConfigSpace { link_up: false, mtu: 1400, ..BEGINNING };
        assert_eq!(current(&config), ConfigSpace { mac: GUESTS, ..changed.clone() });
        config.begin_session();
        assert_eq!(current(&config), changed);
    }
}
