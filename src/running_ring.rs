//! A started ring, as its thread has it: the queue with its notifications, and what it may do.

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::epoll::{EpollSet, Event};
use crate::memory::MemView;
use crate::metrics::Counter;
use crate::notify::{Call, Kick, KickState, RingFds};
use crate::throttle::Throttle;
use crate::virtqueue::{Queue, RingBroken, SplitRing};

/// What a started ring may do (vhost-user, "Ring states").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingMode {
    /// Not enabled yet: its entries wait. Frames that a guest queued before a reconnect survive the gap.
    Waiting,
    /// Frames pass.
    Enabled,
    /// Disabled after it was enabled: tx frames are discarded, rx gets none.
    Disabled,
}

/// What a thread needs to start a ring.
#[derive(Debug)]
pub struct StartRing {
    /// The queue.
    pub queue: Queue,
    /// Its descriptors.
    pub fds: RingFds,
    /// What it may do.
    pub mode: RingMode,
    /// The acknowledged virtio features.
    pub features: u64,
}

/// What is left of a ring that stopped.
#[derive(Debug)]
pub struct StoppedRing {
    /// The position at which it carries on.
    pub position: u16,
    /// Whether it was parked.
    pub is_broken: bool,
    /// Its descriptors.
    pub fds: RingFds,
}

/// What is left of a ring that did not start.
#[derive(Debug)]
pub struct NotStarted {
    /// What `epoll_ctl(2)` said of the kick descriptor.
    pub cause: io::Error,
    /// Its descriptors.
    pub fds: RingFds,
}

/// One thing that may change about a running ring.
#[derive(Debug)]
pub enum RingChange {
    /// What it may do.
    Mode(RingMode),
    /// Its kick; a ring without one is polled.
    Kick(Option<Kick>),
    /// Its call.
    Call(Option<Call>),
    /// The descriptor on which it is reported that the ring is broken.
    Err(Option<Call>),
}

/// The object of a thread that runs one ring of each direction, or only one ring.
pub trait RunsRings {
    /// Runs a ring from now on. The first look at it does not wait for a kick.
    ///
    /// # Errors
    /// [`NotStarted`], where the kick descriptor cannot be waited for.
    fn start(&mut self, direction: Direction, start: StartRing) -> Result<(), NotStarted>;

    /// Stops a ring, if it runs. Nothing of it is touched after this.
    fn stop(&mut self, direction: Direction) -> Option<StoppedRing>;

    /// Stops a ring whose memory was taken away, and counts it as broken.
    fn abandon(&mut self, direction: Direction) -> Option<StoppedRing>;

    /// Changes one thing about a ring, if it runs.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says of a new kick descriptor; the ring is polled then.
    fn change(&mut self, direction: Direction, change: RingChange) -> io::Result<()>;

    /// Carries on with the same ring in a new view of memory, in which it was `found`.
    fn relocate(&mut self, direction: Direction, mem: &Arc<MemView>, found: SplitRing);
}

/// A direction, from the guest's point of view; the ring's index modulo 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest: even rings.
    Rx,
    /// From the guest: odd rings.
    Tx,
}

/// A started ring that a thread runs.
#[derive(Debug)]
pub(crate) struct RunningRing {
    pub(crate) queue: Queue,
    fds: RingFds,
    pub(crate) mode: RingMode,
    /// Whether there may be entries that were not looked at.
    can_run: bool,
    /// Whether it is parked until it is set up anew.
    broken: bool,
    event: Event,
    /// The acknowledged virtio features.
    pub(crate) features: u64,
}

impl RunningRing {
    /// Watches the kick and calls the driver once, as a kick or a call may have been lost with the process before.
    pub(crate) fn start(start: StartRing, epoll: &EpollSet, event: Event) -> Result<RunningRing, NotStarted> {
        let StartRing { queue, fds, mode, features } = start;
        if let Some(kick) = &fds.kick
            && let Err(cause) = epoll.add(kick, event, EventSet::IN)
        {
            return Err(NotStarted { cause, fds });
        }
        if let Some(call) = &fds.call {
            call.signal();
        }
        Ok(RunningRing { queue, fds, mode, can_run: true, broken: false, event, features })
    }

    pub(crate) fn stop(self, epoll: &EpollSet) -> StoppedRing {
        unwatch(epoll, self.fds.kick.as_ref());
        StoppedRing { position: self.queue.position(), is_broken: self.broken, fds: self.fds }
    }

    /// Whether its frames pass.
    pub(crate) fn passes(&self) -> bool {
        self.mode == RingMode::Enabled && !self.broken
    }

    /// Whether there may be something to do.
    pub(crate) fn is_ready(&self) -> bool {
        self.can_run && !self.broken
    }

    /// Whether it has to be polled, having no kick.
    pub(crate) fn has_no_kick(&self) -> bool {
        self.fds.kick.is_none() && !self.broken
    }

    /// Changes one thing about it. A kick that is replaced is unwatched before it is closed; a new call is signalled at
    /// once, as the old one's last signal may not have been seen.
    pub(crate) fn change(&mut self, change: RingChange, epoll: &EpollSet) -> io::Result<()> {
        match change {
            RingChange::Mode(mode) => self.mode = mode,
            // A broken ring needs no kick any more.
            RingChange::Kick(_) if self.broken => {}
            RingChange::Kick(kick) => {
                unwatch(epoll, self.fds.kick.take().as_ref());
                if let Some(kick) = &kick {
                    epoll.add(kick, self.event, EventSet::IN)?;
                }
                self.fds.kick = kick;
            }
            RingChange::Call(call) => {
                if let Some(call) = &call {
                    call.signal();
                }
                self.fds.call = call;
            }
            RingChange::Err(err) => self.fds.err = err,
        }
        self.can_run = true;
        Ok(())
    }

    /// Has the next pass look at the ring, as there may be something to do.
    pub(crate) fn schedule(&mut self) {
        self.can_run = true;
    }

    /// Takes a kick; returns the state of the kick descriptor.
    pub(crate) fn kicked(&mut self) -> KickState {
        let state = self.fds.kick.as_ref().map_or(KickState::Open, Kick::drain);
        if state == KickState::Open {
            self.can_run = true;
            self.queue.disable_kicks();
        }
        state
    }

    /// Makes completions visible and calls the driver if it asked for it.
    pub(crate) fn publish(&mut self, calls: &Counter) {
        if self.queue.publish()
            && let Some(call) = &self.fds.call
        {
            call.signal();
            calls.add(1);
        }
    }

    /// Asks for kicks, so that the thread can sleep; without effect if entries came meanwhile.
    pub(crate) fn sleep(&mut self) -> Result<(), RingBroken> {
        self.can_run = self.queue.enable_kicks()?;
        if self.can_run {
            self.queue.disable_kicks();
        }
        Ok(())
    }

    /// Notes that there is nothing to do, and that the ring is looked at again soon ([`RunningRing::check_avail`]), so
    /// no kicks are needed. If the driver was asked for one before, that holds no more: entries were taken since,
    /// perhaps without its kick.
    pub(crate) fn rest(&mut self) {
        self.can_run = false;
        self.queue.disable_kicks();
    }

    /// Whether the last look found nothing, and no kick will tell when there is something.
    pub(crate) fn is_resting(&self) -> bool {
        !self.can_run && !self.queue.wants_kicks() && !self.broken
    }

    /// Looks whether the driver made entries available, without waiting for its kick.
    pub(crate) fn check_avail(&mut self) -> Result<(), RingBroken> {
        self.can_run = self.queue.has_entries()?;
        Ok(())
    }

    /// Parks a ring that cannot go on: it is counted, reported once to the front-end, and left alone until it is set up
    /// anew.
    pub(crate) fn park(
        &mut self,
        epoll: &EpollSet,
        broken_rings: &Counter,
        throttle: &mut Throttle,
        why: &dyn Display,
    ) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        unwatch(epoll, self.fds.kick.take().as_ref());
        self.fds.err.as_ref().into_iter().for_each(Call::signal);
        broken_rings.add(1);
        if throttle.allows() {
            log::warn!("Ring of {:?} broken, parked until it is set up anew: {why}", self.event);
        }
    }
}

fn unwatch(epoll: &EpollSet, kick: Option<&Kick>) {
    if let Some(kick) = kick {
        // The kick was added, so this fails only for a descriptor that epoll had to drop itself.
        let _ = epoll.remove(kick);
    }
}
