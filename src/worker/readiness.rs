//! What a worker knows of its device queue, and what it has epoll tell of it.
//!
//! The device is watched edge-triggered: an event tells of an arrival, not of what is still there. So a flag that says that
//! there may be something is cleared only by having looked and found nothing; of what comes after that an event is certain to
//! tell. While there are frames that nobody has buffers for, what else arrives is not watched for, and wakes nobody.
//!
//! Functions that must be heeded return whether what it is to be watched for changed ([`DeviceReadiness::interest`]).

use vmm_sys_util::epoll::EventSet;

/// Edge-triggered: an event for each arrival, none for what is still there.
pub(super) const ARRIVAL: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// See the file's head.
pub(super) struct DeviceReadiness {
    /// It may have frames.
    readable: bool,
    /// It had none, and may have some a moment later, of which no event tells.
    retry: bool,
    /// It takes no frames until an event says so.
    blocked: bool,
    /// Its arrivals are not watched for: it has frames already, and they have to wait.
    deaf: bool,
    /// It is gone.
    lost: bool,
}

impl DeviceReadiness {
    /// Of a device that is watched for [`ARRIVAL`]s and was not looked at yet.
    pub(super) fn new() -> DeviceReadiness {
        DeviceReadiness { readable: true, retry: false, blocked: false, deaf: false, lost: false }
    }

    /// What it is to be watched for.
    pub(super) fn interest(&self) -> EventSet {
        let mut on = if self.deaf { EventSet::EDGE_TRIGGERED } else { ARRIVAL };
        on.set(EventSet::OUT, self.blocked);
        on
    }

    /// It may have frames.
    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// It was looked at, and has no frames.
    #[must_use]
    pub(super) fn found_empty(&mut self) -> bool {
        self.readable = false;
        std::mem::take(&mut self.deaf)
    }

    /// It may have frames at the next look, in a moment.
    pub(super) fn look_again_soon(&mut self) {
        self.retry = true;
    }

    /// The moment is over for which [`DeviceReadiness::look_again_soon`] waits.
    pub(super) fn end_retry(&mut self) {
        self.readable |= std::mem::take(&mut self.retry);
    }

    /// What arrives now has to wait.
    #[must_use]
    pub(super) fn ignore_arrivals(&mut self) -> bool {
        !std::mem::replace(&mut self.deaf, true)
    }

    /// It refused a frame. It is to be watched anew also where it had done so before: what room came meanwhile is told again.
    pub(super) fn block(&mut self) {
        self.blocked = true;
    }

    /// It may take frames again. Only while it does not is it worth being woken for every frame that somebody takes.
    #[must_use]
    pub(super) fn unblock(&mut self) -> bool {
        std::mem::take(&mut self.blocked)
    }

    /// It is gone; tells whether that is news.
    pub(super) fn lose(&mut self) -> bool {
        !std::mem::replace(&mut self.lost, true)
    }

    /// Whether it may have frames.
    pub(super) fn is_readable(&self) -> bool {
        self.readable
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Whether its arrivals are not watched for.
    pub(super) fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// Whether it is to be looked at in a moment.
    pub(super) fn has_retry(&self) -> bool {
        self.retry
    }
}
