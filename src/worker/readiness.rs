//! What a worker knows about its device queue, and which events it has epoll report.
//!
//! The device is watched edge-triggered: an event reports an arrival, not what is still there. So a flag that says that
//! there may be something is cleared only after a look that found nothing; an event is certain to report what comes
//! after that. While there are frames that nobody has buffers for, further arrivals are not watched for, and wake
//! nobody.
//!
//! Functions that are `must_use` return whether [`DeviceReadiness::interest`] changed.

use vmm_sys_util::epoll::EventSet;

/// Edge-triggered: an event for each arrival, none for what is still there.
pub(super) const ARRIVAL: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// The state of a device queue, as its worker knows it.
pub(super) struct DeviceReadiness {
    /// It may have frames.
    readable: bool,
    /// It had none, and may have some a moment later, for which no event comes.
    retry: bool,
    /// It takes no frames until an event says so.
    blocked: bool,
    /// Its arrivals are not watched for: it has frames already, which have to wait.
    deaf: bool,
    /// It is gone.
    lost: bool,
}

impl DeviceReadiness {
    /// The state of a device that is watched for [`ARRIVAL`]s and was not looked at yet.
    pub(super) fn new() -> DeviceReadiness {
        DeviceReadiness { readable: true, retry: false, blocked: false, deaf: false, lost: false }
    }

    /// The events for which to watch the device.
    pub(super) fn interest(&self) -> EventSet {
        let mut on = if self.deaf { EventSet::EDGE_TRIGGERED } else { ARRIVAL };
        on.set(EventSet::OUT, self.blocked);
        on
    }

    /// Notes that it may have frames.
    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Notes that a look found no frames.
    #[must_use]
    pub(super) fn found_empty(&mut self) -> bool {
        self.readable = false;
        std::mem::take(&mut self.deaf)
    }

    /// Notes that it may have frames at the next look, in a moment.
    pub(super) fn look_again_soon(&mut self) {
        self.retry = true;
    }

    /// Ends the moment for which [`DeviceReadiness::look_again_soon`] waits.
    pub(super) fn end_retry(&mut self) {
        self.readable |= std::mem::take(&mut self.retry);
    }

    /// Notes that what arrives now has to wait.
    #[must_use]
    pub(super) fn ignore_arrivals(&mut self) -> bool {
        !std::mem::replace(&mut self.deaf, true)
    }

    /// Notes that it refused a frame. It is to be watched anew even if it was blocked before: room that came meanwhile
    /// is reported again.
    pub(super) fn block(&mut self) {
        self.blocked = true;
    }

    /// Notes that it may take frames again. Only while it does not is it worth being woken for every frame that
    /// somebody takes.
    #[must_use]
    pub(super) fn unblock(&mut self) -> bool {
        std::mem::take(&mut self.blocked)
    }

    /// Notes that it is gone; returns whether that is news.
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
