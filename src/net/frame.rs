//! A frame from the guest: what there is of it, what becomes of it, and what follows from the kernel's answer.

use std::ops::Range;

use rustix::io::Errno;

use super::Pump;
use crate::device::errno::{WriteFailure, classify_write};
use crate::metrics::{Counter, PairCounters};
use crate::virtqueue::Head;

/// One popped chain.
pub(super) struct Frame {
    pub(super) head: Head,
    /// Bytes, virtio-net header included.
    pub(super) len: usize,
    /// How many of them are on the stage, or, behind the first frame of a run, are headers that do not go out; the others
    /// are taken from guest memory.
    pub(super) staged: usize,
    pub(super) pieces: Range<usize>,
    /// How many frames, from this one on, go as one; none where it goes with one before it.
    pub(super) run: usize,
    pub(super) fate: Fate,
}

impl Frame {
    /// A frame alone, of which nothing is on the stage yet.
    #[inline]
    pub(super) fn new(head: Head, len: usize, fate: Fate) -> Frame {
        Frame { head, len, staged: 0, pieces: 0..0, run: 1, fate }
    }

    /// Whether not all of what is to be sent is on the stage, in one slot.
    pub(super) fn is_gathered(&self) -> bool {
        self.staged < self.len || self.run > 1
    }
}

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

/// What follows from the kernel's answer to a frame. An error ends the pass, with the frame to be sent again: those that
/// hold back the frames behind it ([`WriteFailure::holds_back`]).
pub(super) fn fate(result: Result<usize, Errno>) -> Result<Fate, Pump> {
    match classify_write(result) {
        Ok(()) => Ok(Fate::Sent),
        Err(WriteFailure::Blocked) => Err(Pump::DeviceBlocked),
        Err(WriteFailure::DeviceLost) => Err(Pump::DeviceLost),
        // Though nothing before it stopped the others: the next pass tries it.
        Err(WriteFailure::NotTried) => Err(Pump::BudgetSpent),
        Err(WriteFailure::LinkDown) => Ok(Fate::Dropped(|c| &c.tx_drop_link_down)),
        Err(WriteFailure::NoMemory) => Ok(Fate::Dropped(|c| &c.tx_drop_no_memory)),
        Err(WriteFailure::Refused) => Ok(Fate::Dropped(|c| &c.tx_drop_refused)),
    }
}
