//! What becomes of a frame from the guest, and what follows from the kernel's answer to it.

use std::io;

use rustix::io::Errno;

use super::Pump;
use crate::metrics::{Counter, PairCounters};

/// What became of one chain, or will.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    ToSend,
    Sent,
    /// It asks the gateway for its address.
    ForGateway,
    Dropped(Reason),
}

/// Under which counter a frame was dropped.
pub(super) type Reason = fn(&PairCounters) -> &Counter;

/// The kernel's error.
pub(super) fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Whether it may work the next moment: memory is short, or a signal came.
pub(super) fn is_passing(error: Errno) -> bool {
    matches!(error, Errno::NOBUFS | Errno::NOMEM | Errno::INTR)
}

/// What follows from the kernel's answer to a frame: the one place where that is decided. An error ends the pass, with
/// the frame to be sent again.
pub(super) fn fate(result: Result<usize, Errno>) -> Result<Fate, Pump> {
    match result {
        Ok(_) => Ok(Fate::Sent),
        Err(Errno::AGAIN) => Err(Pump::DeviceBlocked),
        Err(Errno::BADFD | Errno::NXIO | Errno::PIPE | Errno::CONNRESET) => Err(Pump::DeviceLost),
        // Not tried, though nothing before it stopped the others: the next pass does.
        Err(Errno::CANCELED) => Err(Pump::BudgetSpent),
        Err(Errno::IO | Errno::NETDOWN) => Ok(Fate::Dropped(|c| &c.tx_drop_link_down)),
        Err(Errno::NOBUFS | Errno::NOMEM) => Ok(Fate::Dropped(|c| &c.tx_drop_no_memory)),
        Err(_) => Ok(Fate::Dropped(|c| &c.tx_drop_refused)),
    }
}
