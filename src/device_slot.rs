//! Holds the card's device, which may be replaced, for the control threads; workers own its queues.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::Device;
use crate::mac::Mac;

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

    /// The present device.
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

    /// Sets offloads ([`Device::set_offloads`]) of this device and of those that replace it. A device that is gone
    /// needs none.
    ///
    /// # Errors
    /// What the device says.
    pub fn set_offloads(&self, flags: u32) -> io::Result<()> {
        let mut inner = self.lock();
        inner.offloads = flags;
        let set = inner.device.set_offloads(flags);
        if set.is_err() && inner.device.is_gone() { Ok(()) } else { set }
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
