//! The messages that describe, start and stop rings.

use std::fmt::Arguments;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserVringAddr, VhostUserVringState};
use vm_memory::ByteValued;

use super::super::ring::{Addresses, Layout, Ring, RingSetup, StartError, StartedRing, VRING_LOG};
use super::refusal::Refusal;
use super::{Answer, Handled, Session, Slot};
use crate::mailbox::Stuck;
use crate::net::features::{EVENT_IDX, INDIRECT_DESC, LOG_ALL, PROTOCOL_FEATURES, VERSION_1};
use crate::nic::{Nic, NicError};
use crate::notify::{Call, Kick};
use crate::running_ring::{NotStarted, RingChange, RingMode, StartRing, StoppedRing};
use crate::virtqueue::QueueSize;
use crate::virtqueue::queue::RingFeatures;

/// The 64-bit payload of kick, call and err messages: the ring's index, and the flag that no descriptor comes with it.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NOFD: u64 = 0x100;

impl Session {
    fn index(&self, index: impl Into<u64>) -> Result<usize, Refusal> {
        let index = index.into();
        let known = usize::try_from(index).ok().filter(|known| *known < self.slots.len());
        known.ok_or(Refusal::NoRing { index, rings: self.slots.len() })
    }

    fn slot(&mut self, index: usize) -> Result<&mut Slot, Refusal> {
        let rings = self.slots.len();
        self.slots.get_mut(index).ok_or(Refusal::NoRing { index: index as u64, rings })
    }

    /// The setup of a stopped ring, which may be described. A disabled ring is stopped first: some front-ends (User
    /// Mode Linux) never ask for its position.
    fn stopped(&mut self, index: usize) -> Result<&mut RingSetup, Refusal> {
        if self.slot(index)?.mode == RingMode::Disabled {
            self.stop_ring(index)?;
        }
        match &mut self.slot(index)?.ring {
            Ring::Stopped(setup) => Ok(setup),
            Ring::Started(_) => Err(Refusal::Started { index }),
        }
    }

    pub(super) fn set_vring_num(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        let size = QueueSize::try_from(state.num)?;
        let most = self.options.queue_size_max;
        if size.get() > most.get() {
            return Err(Refusal::TooLarge { size, most });
        }
        self.stopped(index)?.size = Some(size);
        self.start_if_ready(index)
    }

    pub(super) fn set_vring_base(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        let base = u16::try_from(state.num);
        let base = base.map_err(|_| Refusal::Range { what: "Ring base", value: u64::from(state.num) })?;
        match self.slot(index)? {
            // The ring is complete but not used yet: libkrun sends the base once more at the end.
            Slot { ring: Ring::Started(started), mode: RingMode::Waiting } => started.base = base,
            _ => self.stopped(index)?.base = base,
        }
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_addr(&mut self, message: &VhostUserVringAddr) -> Handled {
        let index = self.index(message.index)?;
        let flags = message.flags;
        if flags & !VRING_LOG != 0 {
            return Err(Refusal::Range { what: "Ring address flags", value: u64::from(flags) });
        }
        let addresses = Addresses::from(message);
        if let Ring::Started(StartedRing { layout, .. }) = self.slot(index)?.ring {
            return self.change_addresses(index, layout, addresses);
        }
        let size = match self.stopped(index)?.size {
            Some(size) => size,
            None => QueueSize::try_from(1)?,
        };
        Layout { size, addresses }.find(&self.mem)?;
        self.stopped(index)?.addresses = Some(addresses);
        self.start_if_ready(index)
    }

    /// Changes where the used ring of a running ring is logged; nothing else of it may change.
    fn change_addresses(&mut self, index: usize, layout: Layout, addresses: Addresses) -> Handled {
        if layout.addresses.user != addresses.user {
            return Err(Refusal::Started { index });
        }
        if layout.addresses != addresses {
            let layout = Layout { addresses, ..layout };
            let found = layout.find(&self.mem)?;
            self.nic.relocate(index, &self.mem, found)?;
            if let Ring::Started(started) = &mut self.slot(index)?.ring {
                started.layout = layout;
            }
        }
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_kick(&mut self, word: u64, fds: Vec<OwnedFd>) -> Handled {
        let (index, fd) = self.vring_fd(word, fds)?;
        let kick = fd.map(Kick::new).transpose().map_err(|_| Refusal::BadDescriptor { index })?;
        match &mut self.slot(index)?.ring {
            Ring::Started(_) => {
                self.nic.change(index, RingChange::Kick(kick))?;
                Ok(Answer::Done)
            }
            Ring::Stopped(setup) => {
                setup.fds.kick = kick;
                setup.is_kick_told = true;
                self.start_if_ready(index)
            }
        }
    }

    pub(super) fn set_vring_call(&mut self, word: u64, fds: Vec<OwnedFd>) -> Handled {
        let (index, fd) = self.vring_fd(word, fds)?;
        let call = fd.map(Call::new).transpose().map_err(|_| Refusal::BadDescriptor { index })?;
        match &mut self.slot(index)?.ring {
            Ring::Started(_) => self.nic.change(index, RingChange::Call(call))?,
            Ring::Stopped(setup) => setup.fds.call = call,
        }
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_err(&mut self, word: u64, fds: Vec<OwnedFd>) -> Handled {
        let (index, fd) = self.vring_fd(word, fds)?;
        let err = fd.map(Call::new).transpose().map_err(|_| Refusal::BadDescriptor { index })?;
        match &mut self.slot(index)?.ring {
            Ring::Started(_) => self.nic.change(index, RingChange::Err(err))?,
            Ring::Stopped(setup) => setup.fds.err = err,
        }
        Ok(Answer::Done)
    }

    /// The ring's index and the descriptor of a kick, call or err message, which must come unless its flag says
    /// otherwise.
    fn vring_fd(&self, word: u64, fds: Vec<OwnedFd>) -> Result<(usize, Option<OwnedFd>), Refusal> {
        if word & !(VRING_INDEX_MASK | VRING_NOFD) != 0 {
            return Err(Refusal::NoRing { index: word, rings: self.slots.len() });
        }
        let index = self.index(word & VRING_INDEX_MASK)?;
        let expected = usize::from(word & VRING_NOFD == 0);
        if fds.len() != expected {
            return Err(Refusal::Descriptors { got: fds.len(), expected });
        }
        Ok((index, fds.into_iter().next()))
    }

    /// Remembers what comes before the ring starts: QEMU enables rings before anything else is known of them.
    pub(super) fn set_vring_enable(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        let slot = self.slot(index)?;
        let passes_frames = matches!(slot.ring, Ring::Started(_)) && slot.mode != RingMode::Waiting;
        let mode = match (state.num, passes_frames) {
            (1, _) => RingMode::Enabled,
            (0, true) => RingMode::Disabled,
            (0, false) => RingMode::Waiting,
            (other, _) => return Err(Refusal::Range { what: "Ring enable", value: u64::from(other) }),
        };
        self.set_mode(index, mode)
    }

    fn set_mode(&mut self, index: usize, mode: RingMode) -> Handled {
        let slot = self.slot(index)?;
        let is_resumed = std::mem::replace(&mut slot.mode, mode) == RingMode::Waiting && mode != RingMode::Waiting;
        if let Ring::Started(started) = &slot.ring {
            let is_off_base = is_resumed && started.is_off_base();
            self.nic.change(index, RingChange::Mode(mode))?;
            if is_off_base {
                self.nic.count_off_base(index);
            }
        }
        self.is_unsettled = true;
        Ok(Answer::Done)
    }

    /// Does what is left of the meaning of `RESET_OWNER`. Old front-ends (DPDK's virtio-user) stop with it: they then
    /// describe the rings anew and never ask for a position, not even of rings that were started and not enabled.
    pub(super) fn disable_rings(&mut self) -> Handled {
        for index in 0..self.slots.len() {
            let is_started = matches!(self.slot(index)?.ring, Ring::Started(_));
            self.set_mode(index, if is_started { RingMode::Disabled } else { RingMode::Waiting })?;
        }
        Ok(Answer::Done)
    }

    pub(super) fn get_vring_base(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        self.stop_ring(index)?;
        let base = self.stopped(index)?.base;
        let answer = VhostUserVringState::new(state.index, u32::from(base));
        Ok(Answer::Payload(answer.as_slice().to_vec()))
    }

    /// Starts a ring if everything that it needs is known.
    pub(super) fn start_if_ready(&mut self, index: usize) -> Handled {
        let Some(layout) = self.ready_layout(index)? else { return Ok(Answer::Done) };
        let tried = self.start_ring(index, layout);
        // After a failure, only a new kick starts the ring again.
        if let Ring::Stopped(setup) = &mut self.slot(index)?.ring {
            setup.forget_kick();
        }
        tried.map(|()| Answer::Done)
    }

    /// As `start_if_ready`, but after a message that is done whatever is wrong with a ring: a failure is only logged,
    /// and reported on the ring's err descriptor.
    pub(super) fn start_or_warn(&mut self, index: usize) -> Result<(), Refusal> {
        match self.start_if_ready(index) {
            Err(stuck @ (Refusal::Stuck(_) | Refusal::Nic(NicError::Stuck(_)))) => return Err(stuck),
            Err(refusal) => self.warn(format_args!("Ring {index} does not start: {}", crate::error_chain(&refusal))),
            Ok(_) => {}
        }
        Ok(())
    }

    /// The layout of a stopped ring that is to start: its size, its addresses, its kick and the guest's features must
    /// be known. A ring that lost its memory also waits for that.
    fn ready_layout(&mut self, index: usize) -> Result<Option<Layout>, Refusal> {
        let Ring::Stopped(setup) = &self.slot(index)?.ring else { return Ok(None) };
        let Some(layout) = setup.layout().filter(|_| setup.is_kick_told) else { return Ok(None) };
        let is_lost = setup.is_lost;
        if self.is_legacy {
            self.warn(format_args!("Ring {index} does not start: {}", Refusal::Legacy));
            return Ok(None);
        }
        let waits = self.features & VERSION_1 == 0 || is_lost && layout.find(&self.mem).is_err();
        Ok((!waits).then_some(layout))
    }

    fn start_ring(&mut self, index: usize, layout: Layout) -> Result<(), Refusal> {
        if let Some(why) = self.nic.why_idle(index) {
            self.warn(format_args!("Ring {index} was set up, and stays idle: {why}"));
            return Ok(());
        }
        let Some(Slot { ring, mode }) = self.slots.get_mut(index) else { return Ok(()) };
        let Ring::Stopped(setup) = ring else { return Ok(()) };
        let features = self.features;
        let ring_features =
            RingFeatures { event_idx: features & EVENT_IDX != 0, indirect: features & INDIRECT_DESC != 0 };
        let queue = match layout.start(&self.mem, ring_features) {
            Ok(queue) => queue,
            Err(error) => {
                setup.fds.err = self.nic.report_broken(index, setup.fds.err.take())?;
                return Err(error.into());
            }
        };
        // Without protocol features there is no message to enable a ring (vhost-user, "Ring states").
        if features & PROTOCOL_FEATURES == 0 {
            *mode = RingMode::Enabled;
        }
        let started = StartedRing { layout, base: setup.base, position: queue.position() };
        log::debug!("Ring {index} starts at {} (base {}), {mode:?}", started.position, started.base);
        setup.is_lost = false;
        self.is_unsettled = true;
        let start = StartRing { queue, fds: std::mem::take(&mut setup.fds), mode: *mode, features };
        if let Err(NotStarted { cause, fds }) = self.nic.start(index, start)? {
            setup.fds = fds;
            return Err(NicError::Kick { ring: index, cause }.into());
        }
        if *mode != RingMode::Waiting && started.is_off_base() {
            self.nic.count_off_base(index);
        }
        *ring = Ring::Started(started);
        self.started_before_log |= features & LOG_ALL != 0;
        self.tell_what_is_owed();
        Ok(())
    }

    /// Logs what a front-end may cause again and again, once a second.
    fn warn(&mut self, what: Arguments) {
        if self.throttle.allows() {
            log::warn!("{what}");
        }
    }

    /// Stops a ring that is no longer in guest memory, until its memory is back or it is set up anew.
    pub(super) fn lose_ring(&mut self, index: usize, error: &StartError) -> Result<(), Refusal> {
        self.take_back(index, Nic::abandon, true)?;
        let nic = Arc::clone(&self.nic);
        let setup = self.stopped(index)?;
        setup.is_lost = true;
        setup.fds.err = nic.report_broken(index, setup.fds.err.take())?;
        self.warn(format_args!("Ring {index} stopped: {error}"));
        Ok(())
    }

    /// Starts a ring again that lost its memory, if that is back: QEMU removes and adds a region whose size changes.
    pub(super) fn recover_ring(&mut self, index: usize) -> Result<(), Refusal> {
        let mem = Arc::clone(&self.mem);
        let Ring::Stopped(setup) = &mut self.slot(index)?.ring else { return Ok(()) };
        let is_back = setup.is_lost && setup.layout().is_some_and(|layout| layout.find(&mem).is_ok());
        if is_back { self.start_or_warn(index) } else { Ok(()) }
    }

    fn stop_ring(&mut self, index: usize) -> Result<(), Refusal> {
        self.take_back(index, Nic::stop, false)
    }

    /// Takes a started ring back from its worker by means of `take`. A ring that was about to start does not start any
    /// more.
    fn take_back(
        &mut self,
        index: usize,
        take: impl FnOnce(&Nic, usize) -> Result<Option<StoppedRing>, Stuck>,
        keeps_kick: bool,
    ) -> Result<(), Refusal> {
        let slot = self.slot(index)?;
        let layout = match &mut slot.ring {
            Ring::Started(started) => started.layout,
            Ring::Stopped(setup) => {
                setup.forget_kick();
                setup.is_lost = false;
                return Ok(());
            }
        };
        let left = take(&self.nic, index)?;
        let slot = self.slot(index)?;
        slot.ring = left.map_or_else(Ring::default, |left| {
            log::debug!("Ring {index} stopped at {}", left.position);
            Ring::Stopped(RingSetup::stopped(layout, left, keeps_kick))
        });
        // A disabled ring starts again as one that was not enabled yet.
        if slot.mode == RingMode::Disabled {
            slot.mode = RingMode::Waiting;
        }
        self.is_unsettled = true;
        Ok(())
    }

    /// Stops the rings that the front-end has disabled but not stopped.
    pub(super) fn stop_disabled_rings(&mut self) -> Result<(), Refusal> {
        for index in 0..self.slots.len() {
            if self.slot(index)?.mode == RingMode::Disabled {
                self.stop_ring(index)?;
            }
        }
        Ok(())
    }

    /// Stops all rings, even if one of them cannot be stopped; returns the first error.
    pub(super) fn stop_rings(&mut self) -> Result<(), Refusal> {
        (0..self.slots.len()).map(|index| self.stop_ring(index)).fold(Ok(()), Result::and)
    }
}
