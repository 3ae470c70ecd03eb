//! The host's interface, as the operator chose it: opened at the start, and again when it was deleted and has come
//! back.

use std::error::Error;
use std::io;

use thiserror::Error;

use crate::device::link_watch::LinkWatch;
use crate::device::macvtap::{self, Macvtap};
use crate::device::netns::NetNs;
use crate::device::packet::{self, Existing};
use crate::device::passed::{self, Passed};
use crate::device::tap::{self, TapByName};
use crate::device::{Device, DeviceQueue};
use crate::mac::Mac;

/// Which interface to use.
#[derive(Clone, Debug)]
pub enum DeviceChoice {
    /// A TAP or TUN by its name.
    Tap(TapByName),
    /// A MACVTAP, found by its name or to be made.
    Macvtap(Macvtap),
    /// An existing interface, or a MACVLAN to be made.
    Existing(Existing),
    /// Queues of a TAP, TUN or MACVTAP, as descriptors.
    Passed(Passed),
}

/// What to do when the interface is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// Wait for a new interface of its name.
    #[default]
    Wait,
    /// End the process.
    Exit,
}

/// The operator's choice of the host's interface.
#[derive(Clone, Debug)]
pub struct HostSide {
    /// Which interface it is.
    pub device: DeviceChoice,
    /// The network namespace that it is in, if that is not ours.
    pub netns: Option<NetNs>,
    /// The carrier to set at the start, if one is to be set.
    pub carrier: Option<bool>,
    /// What to do when it is deleted.
    pub on_loss: OnLoss,
}

/// An open interface and a subscription to its events, if there can be one.
pub struct Opened {
    /// The interface.
    pub device: Device,
    /// Its queues, one for each queue pair.
    pub queues: Vec<DeviceQueue>,
    /// The subscription to its events.
    pub watch: Option<LinkWatch>,
}

/// The device does not support `--link`.
#[derive(Debug, Error)]
#[error(
    "Cannot set the carrier of {name:?}, which --link asks for; that goes with TAPs and TUNs, others follow their card"
)]
struct CannotSetCarrier {
    name: String,
    #[source]
    cause: io::Error,
}

/// An error in opening one of the kinds of device.
pub type OpenError = Box<dyn Error + Send + Sync>;

impl DeviceChoice {
    /// Whether its queues are passed as descriptors, and so never opened here.
    pub fn is_passed(&self) -> bool {
        matches!(self, DeviceChoice::Passed(_))
    }

    /// Whether its queues are packet sockets, whose batches need no io_uring.
    pub fn has_packet_sockets(&self) -> bool {
        matches!(self, DeviceChoice::Existing(_))
    }

    /// Whether it is made here, and has to be deleted at the end.
    fn is_made(&self) -> bool {
        match self {
            DeviceChoice::Macvtap(Macvtap { interface, .. }) | DeviceChoice::Existing(Existing { interface, .. }) => {
                interface.parent.is_some()
            }
            DeviceChoice::Tap(_) | DeviceChoice::Passed(_) => false,
        }
    }
}

impl HostSide {
    /// Why the control thread needs its rights after the start, if it does.
    pub fn why_rights_are_needed(&self) -> Option<&'static str> {
        if self.device.is_made() {
            Some("the interface that is made here (--macvtap-parent, --macvlan-parent) has to be taken away at the end")
        } else if self.on_loss == OnLoss::Wait && self.can_reopen() {
            Some("a deleted interface is to be opened again (--on-device-loss wait)")
        } else {
            None
        }
    }

    /// Opens the interface.
    ///
    /// # Errors
    /// The error of the kind of device, worded for the operator.
    pub fn open(&self) -> Result<Opened, OpenError> {
        let opened = self.open_as(&self.device)?;
        if let Some(is_on) = self.carrier {
            let name = opened.device.name().to_owned();
            opened.device.set_carrier(is_on).map_err(|cause| CannotSetCarrier { name, cause })?;
        }
        Ok(opened)
    }

    /// Whether the interface can be opened a second time.
    pub fn can_reopen(&self) -> bool {
        !self.device.is_passed()
    }

    /// Opens the interface again if it is back, without waiting for it. One that is made here gets `former_mac`, the
    /// address that it had before: the guest's card still has that address.
    ///
    /// # Errors
    /// As [`HostSide::open`].
    pub fn reopen(&self, former_mac: Option<Mac>) -> Result<Opened, OpenError> {
        let mut device = self.device.clone();
        match &mut device {
            DeviceChoice::Tap(how) => how.reopens = true,
            DeviceChoice::Macvtap(Macvtap { interface, .. }) | DeviceChoice::Existing(Existing { interface, .. }) => {
                interface.former_mac = former_mac;
            }
            DeviceChoice::Passed(_) => {}
        }
        self.open_as(&device)
    }

    fn open_as(&self, device: &DeviceChoice) -> Result<Opened, OpenError> {
        match &self.netns {
            Some(namespace) => namespace.within(|| open(device))?,
            None => open(device),
        }
    }
}

fn open(choice: &DeviceChoice) -> Result<Opened, OpenError> {
    let (device, queues) = match choice {
        DeviceChoice::Tap(how) => tap::open(how)?,
        DeviceChoice::Macvtap(how) => macvtap::open(how)?,
        DeviceChoice::Existing(how) => packet::open(how)?,
        DeviceChoice::Passed(how) => passed::open(how)?,
    };
    Ok(Opened { watch: device.watch()?, device, queues })
}
