//! What a thread waits for: an epoll set whose events are an enum.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// What can wake a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A job is in the mailbox.
    Mailbox,
    /// The device has frames or takes them again.
    Device,
    /// The driver made rx buffers available.
    RxKick,
    /// The driver made tx frames available.
    TxKick,
    /// The driver made commands available.
    ControlKick,
}

const EVENTS: [Event; 5] = [Event::Mailbox, Event::Device, Event::RxKick, Event::TxKick, Event::ControlKick];

/// How long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Not at all: only look.
    No,
    /// So many milliseconds.
    Millis(i32),
    /// Until something happens.
    Forever,
}

/// An epoll set.
#[derive(Debug)]
pub(crate) struct EpollSet {
    epoll: Epoll,
    ready: [EpollEvent; EVENTS.len()],
}

impl EpollSet {
    pub(crate) fn new() -> io::Result<EpollSet> {
        Ok(EpollSet { epoll: Epoll::new()?, ready: [EpollEvent::default(); EVENTS.len()] })
    }

    /// Watches `fd`. It must be removed before it is closed, as a copy in another process would keep it in the set.
    pub(crate) fn add(&self, fd: &impl AsFd, event: Event, on: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, event, on)
    }

    /// Watches an eventfd of ours for signals.
    pub(crate) fn add_eventfd(&self, fd: &EventFd, event: Event) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, event as u64))
    }

    /// Changes what `fd` is watched for; what is there already is reported again.
    pub(crate) fn modify(&self, fd: &impl AsFd, event: Event, on: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, event, on)
    }

    /// Stops watching `fd`.
    pub(crate) fn remove(&self, fd: &impl AsFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, Event::Mailbox, EventSet::empty())
    }

    fn control(&self, operation: ControlOperation, fd: &impl AsFd, event: Event, on: EventSet) -> io::Result<()> {
        self.epoll.ctl(operation, fd.as_fd().as_raw_fd(), EpollEvent::new(on, event as u64))
    }

    /// Waits, and returns what happened.
    pub(crate) fn wait(&mut self, wait: Wait) -> io::Result<impl Iterator<Item = (Event, EventSet)> + use<>> {
        let timeout = match wait {
            Wait::No => 0,
            Wait::Millis(n) => n,
            Wait::Forever => -1,
        };
        let count = match self.epoll.wait(timeout, &mut self.ready) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        let ready = self.ready;
        let named = |event: EpollEvent| Some((*EVENTS.get(event.data() as usize)?, event.event_set()));
        Ok(ready.into_iter().take(count).filter_map(named))
    }
}
