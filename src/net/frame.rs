//! A frame from the guest in a pass of `tx`: where its bytes are, and what becomes of it.

use std::ops::Range;

use rustix::io::Errno;

use super::Pump;
use crate::device::errno::{WriteFailure, classify_write};
use crate::metrics::{Counter, PairCounters};
use crate::virtqueue::Head;

/// A popped chain and the frame in it.
pub(super) struct Frame {
    pub(super) head: Head,
    /// Bytes, virtio-net header included.
    pub(super) len: usize,
    /// How many of them are not taken from guest memory: those on the stage or, in a run's frames after the first, the
    /// headers, which are not sent.
    pub(super) staged: usize,
    pub(super) pieces: Range<usize>,
    /// How many frames, from this one on, are sent as one; 0 if this one is sent with an earlier one.
    pub(super) run: usize,
    pub(super) fate: Fate,
}

impl Frame {
    /// A frame alone, of which nothing is on the stage yet.
    #[inline]
    pub(super) fn new(head: Head, len: usize, fate: Fate) -> Frame {
        Frame { head, len, staged: 0, pieces: 0..0, run: 1, fate }
    }

    /// Whether a part of what is to be sent is in guest memory or another slot.
    pub(super) fn is_gathered(&self) -> bool {
        self.staged < self.len || self.run > 1
    }
}

/// What became of one chain, or will.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    ToSend,
    Sent,
    /// It is an address request to the gateway.
    ForGateway,
    Dropped(Reason),
}

/// The counter for a dropped frame.
pub(super) type Reason = fn(&PairCounters) -> &Counter;

/// What becomes of a frame after a write. An error ends the pass, and the frame is sent again later; these are the
/// failures that hold back the frames behind it ([`WriteFailure::holds_back`]).
pub(super) fn fate(result: Result<usize, Errno>) -> Result<Fate, Pump> {
    match classify_write(result) {
        Ok(()) => Ok(Fate::Sent),
        Err(WriteFailure::Blocked) => Err(Pump::DeviceBlocked),
        Err(WriteFailure::DeviceLost) => Err(Pump::DeviceLost),
        // The next pass tries it.
        Err(WriteFailure::NotTried) => Err(Pump::BudgetSpent),
        Err(WriteFailure::LinkDown) => Ok(Fate::Dropped(|c| &c.tx_drop_link_down)),
        Err(WriteFailure::NoMemory) => Ok(Fate::Dropped(|c| &c.tx_drop_no_memory)),
        Err(WriteFailure::Refused) => Ok(Fate::Dropped(|c| &c.tx_drop_refused)),
    }
}
