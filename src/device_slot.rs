//! Holds the card's device, which may be replaced, for the control threads; workers own its queues.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::device::Device;
use crate::mac::Mac;
use crate::net::features::GuestOffloads;

/// The device refused offloads.
#[derive(Debug, Error)]
#[error("Cannot set offloads {flags:#x} on {name:?}")]
pub struct OffloadsRefused {
    /// The interface.
    name: String,
    /// `TUN_F_` flags.
    flags: u32,
    /// What the kernel said.
    #[source]
    cause: io::Error,
}

/// The card's device, for the control threads to share.
#[derive(Debug)]
pub struct DeviceSlot(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    device: Arc<Device>,
    /// The `TUN_F_` offloads that were set last.
    offloads: u32,
}

impl DeviceSlot {
    /// A slot with this device.
    pub fn new(device: Device) -> DeviceSlot {
        DeviceSlot(Mutex::new(Inner { device: Arc::new(device), offloads: 0 }))
    }

    /// The present device, for the control thread alone: who lets go of a device last takes away the interface that was
    /// made for it, which the sandbox forbids other threads.
    pub fn get(&self) -> Arc<Device> {
        Arc::clone(&self.lock().device)
    }

    /// The MAC address that the guest's card must have to receive frames; `None` if any will do ([`Device::mac`]).
    pub fn mac(&self) -> Option<Mac> {
        self.lock().device.mac()
    }

    /// The MAC address of the device, if it was made here ([`Device::made_with_mac`]).
    pub fn made_with_mac(&self) -> Option<Mac> {
        self.lock().device.made_with_mac()
    }

    /// Sets the offloads for a guest ([`GuestOffloads::device_flags`]) on this device, and on those that replace it. A
    /// device that is gone needs none.
    ///
    /// # Errors
    /// [`OffloadsRefused`].
    pub fn set_offloads(&self, offloads: GuestOffloads) -> Result<(), OffloadsRefused> {
        let mut inner = self.lock();
        let flags = offloads.device_flags(inner.device.supported_offloads());
        inner.offloads = flags;
        match inner.device.set_offloads(flags) {
            Err(cause) if !inner.device.is_gone() => {
                Err(OffloadsRefused { name: inner.device.name().to_owned(), flags, cause })
            }
            _ => Ok(()),
        }
    }

    /// Replaces the device.
    ///
    /// # Errors
    /// The error of the new device in setting the former one's offloads.
    pub fn replace(&self, device: Device) -> io::Result<()> {
        let mut inner = self.lock();
        device.set_offloads(inner.offloads)?;
        inner.device = Arc::new(device);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
