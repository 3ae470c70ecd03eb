//! One front-end connection: its negotiation, its memory, its rings.
//!
//! Theory of operation. Messages are handled one by one, in order, on the control thread. A message that changes what a
//! worker sees returns only after the worker has acted (`mailbox`), so an answer to the front-end means that it is so.
//! A ring starts as soon as everything that it needs is known, whichever message brought the last of it, and stops with
//! `GET_VRING_BASE`, a reset, or the end of the session: dropping a [`Session`] stops its rings and lets go of guest
//! memory; the [`Nic`] stays for the next one.
//!
//! What a front-end gets wrong is refused ([`Refusal`]): a negative acknowledgement if it asked for one, a log line at
//! most once a second, nothing changed. Only a stream that cannot be trusted any more ends the connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

use super::codec::{Codec, Message, Received, StreamError};
use super::memory::{self, MEMORY_SLOTS, MemoryError};
use super::ring::{KickSource, Layout, Ring, RingSetup, StartError, UserAddresses};
use crate::mailbox::Stuck;
use crate::memory::{MemView, RegionSetup};
use crate::net::features::{self, EVENT_IDX, INDIRECT_DESC, PROTOCOL_FEATURES, VERSION_1};
use crate::nic::{Nic, NicError};
use crate::notify::{Call, Kick};
use crate::running_ring::{RingChange, RingMode, StartRing};
use crate::throttle::Throttle;
use crate::virtqueue::queue::RingFeatures;
use crate::virtqueue::{QueueSize, RingError};

/// Messages that are handled before other events have their turn.
const BUDGET: usize = 64;
/// In the 64-bit payload of kick, call and err messages: the ring's index, and that no descriptor comes with it.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NOFD: u64 = 0x100;

/// Why a message is refused.
#[derive(Debug, Error)]
pub enum Refusal {
    /// Its number is not known, or of something that a network device does not have.
    #[error("Request not supported")]
    Unknown,
    /// Its protocol feature was not negotiated.
    #[error("Protocol feature {0:?} was not negotiated")]
    NotNegotiated(Protocol),
    /// Its payload is not of the right length.
    #[error("Payload of {got} bytes, {expected} expected")]
    PayloadLength {
        /// What came.
        got: usize,
        /// What the message has.
        expected: usize,
    },
    /// The wrong number of descriptors came with it.
    #[error("{got} descriptors came with it, {expected} expected")]
    Descriptors {
        /// What came.
        got: usize,
        /// What the message has.
        expected: usize,
    },
    /// A second owner.
    #[error("The session has an owner already")]
    Owned,
    /// There is no such ring.
    #[error("Ring {index} does not exist; there are {rings}")]
    NoRing {
        /// The index.
        index: u64,
        /// How many there are.
        rings: usize,
    },
    /// The ring runs, and this can only be changed while it is stopped.
    #[error("Ring {index} is started; stop it with GET_VRING_BASE first")]
    Started {
        /// The index.
        index: usize,
    },
    /// A number out of its range.
    #[error("{what} {value:#x} is out of range")]
    Range {
        /// What it is.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// Features that were not offered.
    #[error("Features that were not offered: {0}")]
    NotOffered(String),
    /// A guest without VIRTIO 1.
    #[error("The guest's driver does not use VIRTIO 1 (VERSION_1 missing): a legacy or transitional driver?")]
    Legacy,
    /// Features may not change while rings run.
    #[error("Features cannot change while rings run")]
    RingsRun,
    /// The ring cannot start or be there.
    #[error(transparent)]
    Ring(#[from] StartError),
    /// The queue size is impossible.
    #[error(transparent)]
    Size(#[from] RingError),
    /// The memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The card could not do it.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// A worker does not answer.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// A descriptor is unusable.
    #[error("Descriptor for ring {index} is neither an eventfd nor a pipe")]
    BadDescriptor {
        /// The ring's index.
        index: usize,
    },
}

/// What a handled message is answered with.
enum Answer {
    /// An acknowledgement, if it was asked for.
    Done,
    /// This payload.
    Payload(Vec<u8>),
}

impl Answer {
    fn number(value: u64) -> Answer {
        Answer::Payload(value.to_ne_bytes().to_vec())
    }
}

type Handled = Result<Answer, Refusal>;

/// Whether a session goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionState {
    /// It goes on.
    Open,
    /// It is over.
    Over,
}

/// What of the protocol is offered, besides what goes without saying.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Whether to offer the configuration space.
    pub offers_config: bool,
    /// The largest queue that a front-end may set up.
    pub queue_size_max: QueueSize,
}

/// A ring, and what it may do once it is started.
struct Slot {
    ring: Ring,
    mode: RingMode,
}

impl Default for Slot {
    fn default() -> Slot {
        Slot { ring: Ring::default(), mode: RingMode::Waiting }
    }
}

/// See the file's head.
pub struct Session {
    codec: Codec,
    nic: Arc<Nic>,
    options: SessionOptions,
    is_owned: bool,
    protocol: Protocol,
    features: u64,
    status: u8,
    /// For requests of ours, of which there are none. Kept open: its end tells the front-end that we are gone.
    _backend_channel: Option<OwnedFd>,
    mem: Arc<MemView>,
    slots: Vec<Slot>,
    /// Rings changed in a way after which device queues may be unused.
    is_unsettled: bool,
    throttle: Throttle,
}

impl Session {
    /// Begins a session on a connected socket.
    ///
    /// # Errors
    /// What `fcntl(2)` says where the socket cannot be made non-blocking.
    pub fn new(stream: UnixStream, nic: Arc<Nic>, options: SessionOptions) -> std::io::Result<Session> {
        let slots = std::iter::repeat_with(Slot::default).take(nic.ring_count()).collect();
        Ok(Session {
            codec: Codec::new(stream)?,
            nic,
            options,
            is_owned: false,
            protocol: Protocol::empty(),
            features: 0,
            status: 0,
            _backend_channel: None,
            mem: Arc::default(),
            slots,
            is_unsettled: false,
            throttle: Throttle::default(),
        })
    }

    /// Whether a reply waits for the socket to be writable.
    pub fn wants_write(&self) -> bool {
        self.codec.is_blocked()
    }

    /// Until when the front-end must have finished what it began.
    pub fn deadline(&self) -> Option<Instant> {
        self.codec.deadline()
    }

    /// Whether rings changed since this was asked last.
    pub fn take_unsettled(&mut self) -> bool {
        std::mem::take(&mut self.is_unsettled)
    }

    /// Handles what the socket has, some messages at a time.
    pub fn process(&mut self) -> SessionState {
        match self.try_process() {
            Ok(state) => state,
            Err(error) => {
                log::warn!("Front-end connection closed: {}", crate::error_chain(&error));
                SessionState::Over
            }
        }
    }

    fn try_process(&mut self) -> Result<SessionState, StreamError> {
        self.codec.flush()?;
        for _ in 0..BUDGET {
            if self.codec.is_blocked() {
                break;
            }
            match self.codec.receive()? {
                Received::Message(message) => self.answer(message)?,
                Received::Nothing => break,
                Received::Closed => return Ok(SessionState::Over),
            }
        }
        match self.deadline() {
            Some(deadline) if deadline <= Instant::now() => Err(StreamError::TooSlow),
            _ => Ok(SessionState::Open),
        }
    }

    fn answer(&mut self, message: Message) -> Result<(), StreamError> {
        let Message { request, need_reply, payload, fds } = message;
        let known = FrontendReq::try_from(request);
        let handled = known.map_err(|_| Refusal::Unknown).and_then(|known| self.handle(known, &payload, fds));
        log::trace!("Request {known:?} ({request}): {}", if handled.is_ok() { "done" } else { "refused" });
        let acknowledge = need_reply && self.protocol.contains(Protocol::REPLY_ACK);
        match handled {
            Ok(Answer::Payload(payload)) => self.codec.reply(request, &payload),
            Ok(Answer::Done) if acknowledge => self.codec.reply(request, &0_u64.to_ne_bytes()),
            Ok(Answer::Done) => Ok(()),
            Err(refusal) => {
                if self.throttle.allows() {
                    let name = known.map_or_else(|_| "request".to_owned(), |known| format!("{known:?}"));
                    log::warn!("Refused {name} ({request}): {}", crate::error_chain(&refusal));
                }
                match (known, payload.first_chunk::<4>()) {
                    // These two have an answer of their own for a refusal, and the front-end waits for one.
                    (Ok(FrontendReq::GET_CONFIG), _) => self.codec.reply(request, &[]),
                    (Ok(FrontendReq::GET_VRING_BASE), Some(index)) => {
                        self.codec.reply(request, [*index, [0; 4]].as_flattened())
                    }
                    _ if acknowledge => self.codec.reply(request, &1_u64.to_ne_bytes()),
                    _ => Ok(()),
                }
            }
        }
    }

    fn handle(&mut self, request: FrontendReq, payload: &[u8], fds: Vec<OwnedFd>) -> Handled {
        if let Some(needed) = protocol_feature_of(request).filter(|needed| !self.protocol.contains(*needed)) {
            return Err(Refusal::NotNegotiated(needed));
        }
        if !takes_fds(request) && !fds.is_empty() {
            return Err(Refusal::Descriptors { got: fds.len(), expected: 0 });
        }
        match request {
            FrontendReq::GET_FEATURES => Ok(Answer::number(self.nic.offered_features())),
            FrontendReq::SET_FEATURES => self.set_features(number(payload)?),
            FrontendReq::GET_PROTOCOL_FEATURES => Ok(Answer::number(self.offered_protocol_features().bits())),
            FrontendReq::SET_PROTOCOL_FEATURES => self.set_protocol_features(number(payload)?),
            FrontendReq::SET_OWNER => self.set_owner(),
            // No longer used; back-ends may ignore it (vhost-user, "VHOST_USER_RESET_OWNER").
            FrontendReq::RESET_OWNER => Ok(Answer::Done),
            FrontendReq::GET_QUEUE_NUM => Ok(Answer::number(self.nic.queue_number())),
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(Answer::number(MEMORY_SLOTS as u64)),
            FrontendReq::SET_MEM_TABLE => self.set_mem_table(payload, fds),
            FrontendReq::ADD_MEM_REG => self.add_mem_reg(payload, fds),
            FrontendReq::REM_MEM_REG => self.rem_mem_reg(payload),
            FrontendReq::SET_VRING_NUM => self.set_vring_num(record(payload)?),
            FrontendReq::SET_VRING_ADDR => self.set_vring_addr(&record(payload)?),
            FrontendReq::SET_VRING_BASE => self.set_vring_base(record(payload)?),
            FrontendReq::GET_VRING_BASE => self.get_vring_base(record(payload)?),
            FrontendReq::SET_VRING_KICK => self.set_vring_kick(number(payload)?, fds),
            FrontendReq::SET_VRING_CALL => self.set_vring_call(number(payload)?, fds),
            FrontendReq::SET_VRING_ERR => self.set_vring_err(number(payload)?, fds),
            FrontendReq::SET_VRING_ENABLE => self.set_vring_enable(record(payload)?),
            FrontendReq::GET_CONFIG => self.get_config(payload),
            FrontendReq::NET_SET_MTU => {
                self.nic.set_mtu(number(payload)?)?;
                Ok(Answer::Done)
            }
            FrontendReq::SEND_RARP => self.send_rarp(payload),
            FrontendReq::RESET_DEVICE => self.reset(),
            FrontendReq::SET_STATUS => self.set_status(number(payload)?),
            FrontendReq::GET_STATUS => Ok(Answer::number(u64::from(self.status))),
            FrontendReq::SET_BACKEND_REQ_FD => self.set_backend_channel(fds),
            _ => Err(Refusal::Unknown),
        }
    }
}

/// Negotiation.
impl Session {
    fn offered_protocol_features(&self) -> Protocol {
        let config = if self.options.offers_config { Protocol::CONFIG } else { Protocol::empty() };
        // We have nothing to say on it, but User Mode Linux (6.1) has no interrupt for its rings without it: it
        // requests number 0, which is the timer's.
        let backend_channel = if self.nic.has_control_queue() { Protocol::BACKEND_REQ } else { Protocol::empty() };
        config
            | backend_channel
            | Protocol::MQ
            | Protocol::RARP
            | Protocol::REPLY_ACK
            | Protocol::MTU
            | Protocol::RESET_DEVICE
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::STATUS
    }

    fn set_owner(&mut self) -> Handled {
        if std::mem::replace(&mut self.is_owned, true) { Err(Refusal::Owned) } else { Ok(Answer::Done) }
    }

    fn set_protocol_features(&mut self, bits: u64) -> Handled {
        let surplus = bits & !self.offered_protocol_features().bits();
        if surplus != 0 {
            return Err(Refusal::NotOffered(format!("protocol {:?}", Protocol::from_bits_retain(surplus))));
        }
        self.protocol = Protocol::from_bits_retain(bits);
        Ok(Answer::Done)
    }

    fn set_backend_channel(&mut self, fds: Vec<OwnedFd>) -> Handled {
        let [channel] =
            <[OwnedFd; 1]>::try_from(fds).map_err(|fds| Refusal::Descriptors { got: fds.len(), expected: 1 })?;
        self._backend_channel = Some(channel);
        Ok(Answer::Done)
    }

    fn set_features(&mut self, bits: u64) -> Handled {
        let surplus = bits & !self.nic.offered_features();
        if surplus != 0 {
            return Err(Refusal::NotOffered(features::names(surplus)));
        }
        // Before a driver is there, some front-ends set what concerns themselves alone.
        if bits & VERSION_1 == 0 && bits & !PROTOCOL_FEATURES != 0 {
            return Err(Refusal::Legacy);
        }
        if bits == self.features {
            return Ok(Answer::Done);
        }
        if self.slots.iter().any(|slot| matches!(slot.ring, Ring::Started(_))) {
            return Err(Refusal::RingsRun);
        }
        self.nic.set_features(bits)?;
        self.features = bits;
        log::debug!("Features: {}", features::names(bits));
        Ok(Answer::Done)
    }

    fn set_status(&mut self, status: u64) -> Handled {
        let status = u8::try_from(status).map_err(|_| Refusal::Range { what: "Device status", value: status })?;
        self.status = status;
        if status == 0 { self.reset() } else { Ok(Answer::Done) }
    }

    /// Rings stop and what the driver negotiated is gone; owner, protocol features, memory and the rings' positions stay:
    /// QEMU asks for a position after the reset that belongs to it.
    fn reset(&mut self) -> Handled {
        self.stop_rings()?;
        self.slots.iter_mut().for_each(|slot| slot.mode = RingMode::Waiting);
        self.features = 0;
        self.status = 0;
        Ok(Answer::Done)
    }
}

/// Memory.
impl Session {
    /// The payload may be longer than its regions need: some front-ends always send room for the most that they have.
    fn set_mem_table(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Handled {
        let short = Refusal::PayloadLength { got: payload.len(), expected: 8 };
        let Some((head, regions)) = payload.split_first_chunk::<8>() else { return Err(short) };
        let [a, b, c, d, ..] = *head;
        let count = u32::from_ne_bytes([a, b, c, d]) as usize;
        let each = size_of::<VhostUserMemoryRegion>();
        let expected = count.saturating_mul(each);
        let regions =
            regions.get(..expected).ok_or(Refusal::PayloadLength { got: regions.len(), expected })?.chunks_exact(each);
        let setups = regions.map(region).collect::<Result<Vec<_>, _>>()?;
        let view = memory::table(&setups, fds)?;
        self.replace_memory(view)
    }

    fn add_mem_reg(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Handled {
        let setup = single_region(payload)?;
        if memory::has(&self.mem, setup) {
            return Ok(Answer::Done);
        }
        let view = memory::with(&self.mem, setup, fds)?;
        self.replace_memory(view)
    }

    fn rem_mem_reg(&mut self, payload: &[u8]) -> Handled {
        let view = memory::without(&self.mem, single_region(payload)?)?;
        self.replace_memory(view)
    }

    /// Gives every running ring the new view. The old one goes with the last worker that lets go of it: before this
    /// returns.
    fn replace_memory(&mut self, view: MemView) -> Handled {
        self.mem = Arc::new(view);
        for (index, slot) in self.slots.iter().enumerate() {
            if let Ring::Started(layout) = &slot.ring {
                self.nic.relocate(index, &self.mem, layout.find(&self.mem).ok())?;
            }
        }
        Ok(Answer::Done)
    }
}

/// Rings.
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

    fn stopped(&mut self, index: usize) -> Result<&mut RingSetup, Refusal> {
        match &mut self.slot(index)?.ring {
            Ring::Stopped(setup) => Ok(setup),
            Ring::Started(_) => Err(Refusal::Started { index }),
        }
    }

    fn set_vring_num(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        let size = QueueSize::try_from(state.num)?;
        if size.get() > self.options.queue_size_max.get() {
            return Err(Refusal::Range { what: "Queue size (see --queue-size)", value: u64::from(size.get()) });
        }
        self.stopped(index)?.size = Some(size);
        self.start_if_complete(index)
    }

    fn set_vring_base(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        let base = u16::try_from(state.num);
        let base = base.map_err(|_| Refusal::Range { what: "Ring base", value: u64::from(state.num) })?;
        self.stopped(index)?.base = base;
        Ok(Answer::Done)
    }

    fn set_vring_addr(&mut self, message: &VhostUserVringAddr) -> Handled {
        let index = self.index(message.index)?;
        let flags = message.flags;
        if flags != 0 {
            return Err(Refusal::Range { what: "Ring address flags", value: u64::from(flags) });
        }
        let addresses = UserAddresses::from(message);
        if let Ring::Started(layout) = &self.slot(index)?.ring {
            // The same again changes nothing.
            let same = layout.addresses == addresses;
            return if same { Ok(Answer::Done) } else { Err(Refusal::Started { index }) };
        }
        let size = match self.stopped(index)?.size {
            Some(size) => size,
            None => QueueSize::try_from(1)?,
        };
        Layout { size, addresses }.find(&self.mem)?;
        self.stopped(index)?.addresses = Some(addresses);
        self.start_if_complete(index)
    }

    fn set_vring_kick(&mut self, word: u64, fds: Vec<OwnedFd>) -> Handled {
        let (index, fd) = self.vring_fd(word, fds)?;
        let kick = fd.map(Kick::new).transpose().map_err(|_| Refusal::BadDescriptor { index })?;
        match &mut self.slot(index)?.ring {
            Ring::Started(_) => {
                self.nic.change(index, RingChange::Kick(kick))?;
                Ok(Answer::Done)
            }
            Ring::Stopped(setup) => {
                setup.kick = Some(KickSource::from(kick));
                self.start_if_complete(index)
            }
        }
    }

    fn set_vring_call(&mut self, word: u64, fds: Vec<OwnedFd>) -> Handled {
        let (index, fd) = self.vring_fd(word, fds)?;
        let call = fd.map(Call::new).transpose().map_err(|_| Refusal::BadDescriptor { index })?;
        match &mut self.slot(index)?.ring {
            Ring::Started(_) => self.nic.change(index, RingChange::Call(call))?,
            Ring::Stopped(setup) => setup.call = call,
        }
        Ok(Answer::Done)
    }

    fn set_vring_err(&mut self, word: u64, fds: Vec<OwnedFd>) -> Handled {
        let (index, fd) = self.vring_fd(word, fds)?;
        let err = fd.map(Call::new).transpose().map_err(|_| Refusal::BadDescriptor { index })?;
        match &mut self.slot(index)?.ring {
            Ring::Started(_) => self.nic.change(index, RingChange::Err(err))?,
            Ring::Stopped(setup) => setup.err = err,
        }
        Ok(Answer::Done)
    }

    /// The ring's index and the descriptor of a kick, call or err message, in agreement with its flag.
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

    /// The early ones are remembered: QEMU enables rings before anything else is known of them.
    fn set_vring_enable(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        let slot = self.slot(index)?;
        let mode = match (state.num, slot.mode) {
            (1, _) => RingMode::Enabled,
            (0, RingMode::Waiting) => RingMode::Waiting,
            (0, _) => RingMode::Disabled,
            (other, _) => return Err(Refusal::Range { what: "Ring enable", value: u64::from(other) }),
        };
        slot.mode = mode;
        if matches!(slot.ring, Ring::Started(_)) {
            self.nic.change(index, RingChange::Mode(mode))?;
        }
        self.is_unsettled = true;
        Ok(Answer::Done)
    }

    fn get_vring_base(&mut self, state: VhostUserVringState) -> Handled {
        let index = self.index(state.index)?;
        self.stop_ring(index)?;
        let base = self.stopped(index)?.base;
        let answer = VhostUserVringState::new(state.index, u32::from(base));
        Ok(Answer::Payload(answer.as_slice().to_vec()))
    }

    /// Starts a ring once size, addresses and a kick are there.
    fn start_if_complete(&mut self, index: usize) -> Handled {
        let features = self.features;
        let mem = Arc::clone(&self.mem);
        let Some(slot) = self.slots.get_mut(index) else { return Ok(Answer::Done) };
        let Ring::Stopped(setup) = &mut slot.ring else { return Ok(Answer::Done) };
        let (Some(layout), Some(_)) = (setup.layout(), &setup.kick) else { return Ok(Answer::Done) };
        // What starts it again after a failure is a new kick.
        let kick = setup.kick.take().and_then(Option::<Kick>::from);
        if !self.nic.runs_ring(index) {
            log::warn!("Ring {index} was set up, and stays idle: there are fewer queue pairs (see --queue-pairs)");
            return Ok(Answer::Done);
        }
        if features & VERSION_1 == 0 {
            return Err(Refusal::Legacy);
        }
        let ring_features =
            RingFeatures { event_idx: features & EVENT_IDX != 0, indirect: features & INDIRECT_DESC != 0 };
        let queue = layout.start(&mem, ring_features).inspect_err(|_| {
            if let Some(err) = &setup.err {
                err.signal();
            }
        })?;
        // Without protocol features there is no message to enable a ring (vhost-user, "Ring states").
        if features & PROTOCOL_FEATURES == 0 {
            slot.mode = RingMode::Enabled;
        }
        let RingSetup { call, err, base, .. } = std::mem::take(setup);
        log::debug!("Ring {index} starts at {} (base {base}), {:?}", queue.position(), slot.mode);
        let start = StartRing { queue, kick, call, err, base, mode: slot.mode, features };
        slot.ring = Ring::Started(layout);
        self.is_unsettled = true;
        if let Err(error) = self.nic.start(index, start) {
            slot.ring = Ring::default();
            return Err(error.into());
        }
        Ok(Answer::Done)
    }

    fn stop_ring(&mut self, index: usize) -> Result<(), Refusal> {
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        let Ring::Started(layout) = slot.ring else { return Ok(()) };
        let left = self.nic.stop(index)?;
        slot.ring = left.map_or_else(Ring::default, |left| {
            log::debug!("Ring {index} stopped at {}", left.position);
            Ring::Stopped(RingSetup::stopped(layout, left))
        });
        // A ring that starts again begins as one that was not enabled yet.
        if slot.mode == RingMode::Disabled {
            slot.mode = RingMode::Waiting;
        }
        self.is_unsettled = true;
        Ok(())
    }

    fn stop_rings(&mut self) -> Result<(), Refusal> {
        (0..self.slots.len()).try_for_each(|index| self.stop_ring(index))
    }
}

/// The card.
impl Session {
    fn get_config(&mut self, payload: &[u8]) -> Handled {
        let head_len = size_of::<VhostUserConfig>();
        let expected = Refusal::PayloadLength { got: payload.len(), expected: head_len };
        let head = payload.get(..head_len).ok_or(expected)?;
        let config: VhostUserConfig = record(head)?;
        let (offset, size) = (config.offset, config.size);
        let what = "Configuration space offset";
        let bytes = self.nic.read_config(offset, size).ok_or(Refusal::Range { what, value: u64::from(offset) })?;
        Ok(Answer::Payload([head, &bytes].concat()))
    }

    fn send_rarp(&mut self, payload: &[u8]) -> Handled {
        let mac = number(payload)?.to_ne_bytes();
        let mac = mac.first_chunk().copied().unwrap_or_default();
        self.nic.send_rarp(mac)?;
        log::info!("Sent a RARP frame for {}", crate::net::filter::MacDisplay(mac));
        Ok(Answer::Done)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(error) = self.stop_rings() {
            log::error!("Cannot stop the rings of a session: {}", crate::error_chain(&error));
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.codec.as_fd()
    }
}

/// The protocol feature that must have been negotiated for a message.
fn protocol_feature_of(request: FrontendReq) -> Option<Protocol> {
    Some(match request {
        FrontendReq::GET_QUEUE_NUM => Protocol::MQ,
        FrontendReq::SEND_RARP => Protocol::RARP,
        FrontendReq::NET_SET_MTU => Protocol::MTU,
        FrontendReq::GET_CONFIG => Protocol::CONFIG,
        FrontendReq::RESET_DEVICE => Protocol::RESET_DEVICE,
        FrontendReq::SET_STATUS | FrontendReq::GET_STATUS => Protocol::STATUS,
        FrontendReq::SET_BACKEND_REQ_FD => Protocol::BACKEND_REQ,
        FrontendReq::GET_MAX_MEM_SLOTS | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG => {
            Protocol::CONFIGURE_MEM_SLOTS
        }
        _ => return None,
    })
}

/// Whether descriptors may come with a message. `REM_MEM_REG` has one from front-ends that copy the message that added
/// the region.
fn takes_fds(request: FrontendReq) -> bool {
    matches!(
        request,
        FrontendReq::SET_MEM_TABLE
            | FrontendReq::ADD_MEM_REG
            | FrontendReq::REM_MEM_REG
            | FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_BACKEND_REQ_FD
    )
}

fn number(payload: &[u8]) -> Result<u64, Refusal> {
    let expected = size_of::<u64>();
    Ok(u64::from_ne_bytes(payload.try_into().map_err(|_| Refusal::PayloadLength { got: payload.len(), expected })?))
}

fn record<T: ByteValued + Default>(payload: &[u8]) -> Result<T, Refusal> {
    let expected = size_of::<T>();
    if payload.len() != expected {
        return Err(Refusal::PayloadLength { got: payload.len(), expected });
    }
    let mut record = T::default();
    record.as_mut_slice().copy_from_slice(payload);
    Ok(record)
}

fn region(bytes: &[u8]) -> Result<RegionSetup, Refusal> {
    let region: VhostUserMemoryRegion = record(bytes)?;
    Ok(RegionSetup {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        size: region.memory_size,
        file_offset: region.mmap_offset,
    })
}

/// `ADD_MEM_REG` and `REM_MEM_REG` have eight bytes of padding before the region.
fn single_region(payload: &[u8]) -> Result<RegionSetup, Refusal> {
    let expected = 8 + size_of::<VhostUserMemoryRegion>();
    region(payload.get(8..).ok_or(Refusal::PayloadLength { got: payload.len(), expected })?)
}
