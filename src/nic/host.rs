//! What happens to the card's device, and what follows for the workers and for what the guest is told.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::Nic;
use crate::card_config::ConfigChange;
use crate::device::link_watch::LinkState;
use crate::device::{Device, DeviceQueue};
use crate::mac::{self, Mac};
use crate::mailbox::Stuck;
use crate::sandbox::{Sandbox, SandboxError};
use crate::worker::QueuePair;

/// Why a thread could not be confined.
#[derive(Debug, Error)]
pub enum NotConfined {
    /// The thread does not answer.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// The sandbox cannot be closed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl Nic {
    /// Closes the sandbox around the card's threads.
    ///
    /// # Errors
    /// The error of the first thread that has one; the process must not go on then.
    pub fn confine(&self, sandbox: Sandbox) -> Result<(), NotConfined> {
        self.control.call(move |control| control.confine(sandbox))??;
        self.pairs.iter().try_for_each(|pair| Ok(pair.call(move |pair| pair.confine(sandbox))??))
    }

    /// The interface's name.
    pub fn device_name(&self) -> String {
        self.device.get().name().to_owned()
    }

    /// The eventfd that a worker signals when the device seems to be gone.
    pub fn alarm(&self) -> &Arc<EventFd> {
        &self.alarm
    }

    /// The MAC address of the interface, if it was made here.
    pub fn made_with_mac(&self) -> Option<Mac> {
        self.device.made_with_mac()
    }

    /// Whether the interface has to be polled for whether it was deleted.
    pub fn device_ends_silently(&self) -> bool {
        self.device.get().ends_silently()
    }

    /// How many frames to the guest the device's packet sockets had no room for, if it has packet sockets.
    pub fn socket_drops(&self) -> Option<u64> {
        self.device.get().socket_drops()
    }

    /// Stops passing frames if the interface was deleted; returns whether it was.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn lose_deleted_device(&self) -> Result<bool, Stuck> {
        let is_gone = self.device.get().is_gone();
        if is_gone {
            self.pairs.iter().try_for_each(|pair| pair.call(QueuePair::lose_device))?;
        }
        Ok(is_gone)
    }

    /// Takes over the interface's state.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn follow(&self, state: LinkState) -> Result<ConfigChange, Stuck> {
        // An MTU that the operator chose stays.
        let mtu = state.mtu.filter(|_| self.setup.mtu.is_none());
        let change = self.config.follow(LinkState { mtu, ..state });
        if let Some(up) = change.link_up {
            self.card_counters.link_changes.add(1);
            self.pairs.iter().try_for_each(|pair| pair.call(move |pair| pair.set_link(up)))?;
        }
        self.card_counters.mtu_changes.add(u64::from(change.mtu.is_some()));
        Ok(change)
    }

    /// Counts a change that the guest could not be told of.
    pub fn count_untold_change(&self) {
        self.card_counters.changes_untold.add(1);
    }

    /// Goes on with another device of the same kind.
    ///
    /// # Errors
    /// The device's error, or that a worker does not answer; frames do not pass then.
    pub fn replace_device(&self, device: Device, queues: Vec<DeviceQueue>) -> io::Result<()> {
        self.take_address(&device);
        self.device.replace(device)?;
        for (pair, queue) in self.pairs.iter().zip(queues) {
            pair.call(move |pair| pair.replace_device(queue)).map_err(io::Error::other)??;
        }
        Ok(())
    }

    /// Gives guests that come later the address to which frames come now. A guest that runs has a card with the former
    /// one.
    fn take_address(&self, device: &Device) {
        let Some(mac) = device.mac().filter(|_| self.setup.mac.is_none()) else { return };
        let told = self.config.replace_mac(mac);
        if told != mac && told != Mac::default() {
            let (name, mac, told) = (device.name(), mac::shown(mac), mac::shown(told));
            log::warn!(
                "Interface {name:?} has address {mac} now, and guests were told {told}: nothing comes to one that runs until \
                 it starts again; make the interface with 'address {told}' to spare it that"
            );
        }
    }
}
