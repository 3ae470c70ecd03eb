//! One front-end connection: its negotiation, its memory, its rings.
//!
//! Theory of operation. Messages are handled one by one, in order, on the control thread. A message that changes what a
//! worker sees is answered only after the worker has acted on it (`mailbox`), so an answer to the front-end means that
//! the change is in effect. A ring starts as soon as everything that it needs is known, whichever message brought the
//! last of it, and stops with `GET_VRING_BASE`, a reset, or the end of the session: dropping a [`Session`] stops its
//! rings and lets go of guest memory; the [`Nic`] stays for the next session.
//!
//! A message that the front-end got wrong is refused (`Refusal`): it gets a negative acknowledgement if it asked for
//! one, and a log line at most once a second, and changes nothing. Only a stream that cannot be trusted any more, or a
//! log that is refused while the guest is being moved, ends the connection.

mod config;
mod logging;
mod memory_messages;
mod payload;
mod refusal;
mod rings;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use vhost::vhost_user::message::{FrontendReq, VhostUserLog, VhostUserProtocolFeatures as Protocol};

pub use self::config::Told;
use self::payload::{number, record};
use self::refusal::Refusal;
use super::codec::{Codec, Message, Received, StreamError};
use super::memory::MEMORY_SLOTS;
use super::ring::Ring;
use crate::mac;
use crate::mailbox::Stuck;
use crate::memory::MemView;
use crate::memory::dirty_log::DirtyLog;
use crate::net::features::{self, LOG_ALL, PROTOCOL_FEATURES, VERSION_1};
use crate::nic::{Nic, NicError};
use crate::running_ring::RingMode;
use crate::throttle::Throttle;
use crate::virtqueue::QueueSize;

/// How many messages are handled before other events have their turn.
const BUDGET: usize = 64;
/// How a handled message is answered.
enum Answer {
    /// With an acknowledgement, if it was asked for.
    Done,
    /// With this payload.
    Payload(Vec<u8>),
}

impl Answer {
    fn number(value: u64) -> Answer {
        Answer::Payload(value.to_ne_bytes().to_vec())
    }
}

type Handled = Result<Answer, Refusal>;

/// Whether a session goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionState {
    /// It goes on.
    Open,
    /// It is over.
    Over,
    /// It is over, and so must the process be: a worker does not answer, so nobody can know what it still does to guest
    /// memory.
    Failed(Stuck),
}

/// Memory that a front-end took away under the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LostMemory {
    /// A region of guest memory.
    #[error("Guest memory from {0:#x} on")]
    From(u64),
    /// The log of written pages.
    #[error("The log of written pages")]
    Log,
}

/// Why we end a session.
#[derive(Debug)]
enum SessionError {
    Stream(StreamError),
    Stuck(Stuck),
    /// A log was refused while writes to guest memory are to be logged. QEMU does not look at the answer, and would move a
    /// guest that lacks what is written.
    LogRefused(Refusal),
}

impl From<StreamError> for SessionError {
    fn from(error: StreamError) -> SessionError {
        SessionError::Stream(error)
    }
}

/// What may be chosen about the protocol that is offered.
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

/// One front-end connection, with its negotiation, memory and rings.
pub struct Session {
    codec: Codec,
    nic: Arc<Nic>,
    options: SessionOptions,
    protocol: Protocol,
    features: u64,
    /// Whether the last features were refused because VIRTIO 1 was missing.
    is_legacy: bool,
    status: u8,
    /// The channel for requests of ours. When it is closed, the front-end knows that we are gone.
    backend_channel: Option<OwnedFd>,
    /// Whether the front-end is still to be told that the configuration space changed, as no ring ran then.
    owes_config_change: bool,
    mem: Arc<MemView>,
    /// The log of written pages, kept from one view of memory to the next.
    log: Option<Arc<DirtyLog>>,
    /// Whether a ring started with `LOG_ALL` since the last log came, or without any log.
    started_before_log: bool,
    slots: Vec<Slot>,
    /// Whether rings changed in a way after which device queues may be unused.
    is_unsettled: bool,
    throttle: Throttle,
    rarp_throttle: Throttle,
}

impl Session {
    /// Begins a session on a connected socket.
    ///
    /// # Errors
    /// What `fcntl(2)` says where the socket cannot be made non-blocking.
    pub fn new(stream: UnixStream, nic: Arc<Nic>, options: SessionOptions) -> std::io::Result<Session> {
        nic.begin_session();
        let slots = std::iter::repeat_with(Slot::default).take(nic.ring_count()).collect();
        Ok(Session {
            codec: Codec::new(stream)?,
            nic,
            options,
            protocol: Protocol::empty(),
            features: 0,
            is_legacy: false,
            status: 0,
            backend_channel: None,
            owes_config_change: false,
            mem: Arc::default(),
            log: None,
            started_before_log: false,
            slots,
            is_unsettled: false,
            throttle: Throttle::default(),
            rarp_throttle: Throttle::default(),
        })
    }

    /// Whether a reply waits for the socket to be writable.
    pub fn wants_write(&self) -> bool {
        self.codec.is_blocked()
    }

    /// When the front-end must have finished what it began.
    pub fn deadline(&self) -> Option<Instant> {
        self.codec.deadline()
    }

    /// What memory was taken away under the rings, if any was.
    pub fn lost_memory(&self) -> Option<LostMemory> {
        let region = self.mem.regions().iter().find(|region| region.is_lost());
        let log = self.log.as_ref().filter(|log| log.is_lost()).map(|_| LostMemory::Log);
        region.map(|region| LostMemory::From(region.setup().guest)).or(log)
    }

    /// Whether rings changed since the last call.
    pub fn take_unsettled(&mut self) -> bool {
        std::mem::take(&mut self.is_unsettled)
    }

    /// Handles the messages that have come, some at a time.
    pub fn process(&mut self) -> SessionState {
        match self.try_process() {
            Ok(state) => state,
            Err(SessionError::Stuck(stuck)) => SessionState::Failed(stuck),
            Err(SessionError::Stream(error)) => {
                log::warn!("Front-end connection closed: {}", crate::error_chain(&error));
                SessionState::Over
            }
            Err(SessionError::LogRefused(refusal)) => {
                log::warn!("Front-end connection closed in a migration: {}", crate::error_chain(&refusal));
                SessionState::Over
            }
        }
    }

    fn try_process(&mut self) -> Result<SessionState, SessionError> {
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
            Some(deadline) if deadline <= Instant::now() => Err(StreamError::TooSlow.into()),
            _ => Ok(SessionState::Open),
        }
    }

    fn answer(&mut self, message: Message) -> Result<(), SessionError> {
        let Message { request, need_reply, payload, fds } = message;
        let known = FrontendReq::try_from(request).ok();
        let handled = known.ok_or(Refusal::Unknown).and_then(|known| self.handle(known, &payload, fds));
        log::trace!("{} {}", request_name(request, known), if handled.is_ok() { "done" } else { "refused" });
        let acknowledge = need_reply && self.protocol.contains(Protocol::REPLY_ACK);
        let reply = match handled {
            Ok(Answer::Payload(payload)) => Some(payload),
            Ok(Answer::Done) => acknowledge.then(|| 0_u64.to_ne_bytes().to_vec()),
            Err(Refusal::Stuck(stuck) | Refusal::Nic(NicError::Stuck(stuck))) => {
                return Err(SessionError::Stuck(stuck));
            }
            Err(refusal) if known == Some(FrontendReq::SET_LOG_BASE) && self.needs_log(&refusal) => {
                return Err(SessionError::LogRefused(refusal));
            }
            Err(refusal) => {
                // A legacy driver is logged only once it starts a ring: some front-ends hand over the features in two
                // halves.
                if !matches!(refusal, Refusal::Legacy) && self.throttle.allows() {
                    log::warn!("Refused {}: {}", request_name(request, known), crate::error_chain(&refusal));
                }
                refused_with(known, &payload, &refusal).or(acknowledge.then(|| 1_u64.to_ne_bytes().to_vec()))
            }
        };
        Ok(reply.map_or(Ok(()), |reply| self.codec.reply(request, &reply))?)
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
            // The connected front-end is the owner. Saying so again (libkrun: whenever its device is activated) changes
            // nothing.
            FrontendReq::SET_OWNER => Ok(Answer::Done),
            FrontendReq::RESET_OWNER => self.disable_rings(),
            FrontendReq::GET_QUEUE_NUM => Ok(Answer::number(self.nic.queue_number())),
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(Answer::number(MEMORY_SLOTS as u64)),
            FrontendReq::SET_MEM_TABLE => self.set_mem_table(payload, fds),
            FrontendReq::ADD_MEM_REG => self.add_mem_reg(payload, fds),
            FrontendReq::REM_MEM_REG => self.rem_mem_reg(payload),
            FrontendReq::SET_LOG_BASE => self.set_log_base(payload, fds),
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
        // Without it, User Mode Linux (6.1) has no interrupt for its rings: it requests number 0, which is the timer's.
        let backend_channel = if self.nic.has_control_queue() { Protocol::BACKEND_REQ } else { Protocol::empty() };
        config
            | backend_channel
            | Protocol::MQ
            | Protocol::LOG_SHMFD
            | Protocol::RARP
            | Protocol::REPLY_ACK
            | Protocol::MTU
            | Protocol::RESET_DEVICE
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::STATUS
    }

    fn set_protocol_features(&mut self, bits: u64) -> Handled {
        let surplus = bits & !self.offered_protocol_features().bits();
        if surplus != 0 {
            return Err(Refusal::NotOffered(format!("protocol {:?}", Protocol::from_bits_retain(surplus))));
        }
        self.protocol = Protocol::from_bits_retain(bits);
        Ok(Answer::Done)
    }

    fn set_features(&mut self, bits: u64) -> Handled {
        let surplus = bits & !self.nic.offered_features();
        if surplus != 0 {
            return Err(Refusal::NotOffered(features::names(surplus)));
        }
        let runs = |slot: &Slot| matches!(slot.ring, Ring::Started(_)) && slot.mode != RingMode::Disabled;
        let rings_run = self.slots.iter().any(runs);
        // Before there is a driver, some front-ends set only features that concern themselves.
        let is_legacy = bits & VERSION_1 == 0 && bits & !(PROTOCOL_FEATURES | LOG_ALL) != 0;
        if is_legacy && rings_run {
            return Err(Refusal::RingsRun);
        }
        self.is_legacy = is_legacy;
        if is_legacy {
            return Err(Refusal::Legacy);
        }
        let any_started = self.slots.iter().any(|slot| matches!(slot.ring, Ring::Started(_)));
        if self.features & VERSION_1 != 0 && bits ^ self.features == LOG_ALL && any_started {
            return self.set_logging(bits);
        }
        if rings_run {
            return if bits == self.features { Ok(Answer::Done) } else { Err(Refusal::RingsRun) };
        }
        let mem = self.logged(&Arc::clone(&self.mem), bits)?;
        self.stop_disabled_rings()?;
        self.nic.set_features(bits)?;
        self.mem = Arc::new(mem);
        self.features = bits;
        log::debug!("Features: {}", features::names(bits));
        for index in 0..self.slots.len() {
            self.start_or_warn(index)?;
        }
        Ok(Answer::Done)
    }

    fn set_status(&mut self, status: u64) -> Handled {
        let status = u8::try_from(status).map_err(|_| Refusal::Range { what: "Device status", value: status })?;
        self.status = status;
        if status == 0 { self.reset() } else { Ok(Answer::Done) }
    }

    /// Stops the rings and forgets what the driver negotiated. Owner, protocol features, memory and the rings'
    /// positions stay: QEMU asks for a ring's position only after the reset.
    fn reset(&mut self) -> Handled {
        self.stop_rings()?;
        for slot in &mut self.slots {
            slot.mode = RingMode::Waiting;
            if let Ring::Stopped(setup) = &mut slot.ring {
                (setup.size, setup.addresses) = (None, None);
            }
        }
        self.nic.reset_mac();
        (self.features, self.is_legacy) = (0, false);
        self.status = 0;
        Ok(Answer::Done)
    }
}

/// The card.
impl Session {
    fn send_rarp(&mut self, payload: &[u8]) -> Handled {
        let mac = number(payload)?.to_ne_bytes();
        let mac = mac.first_chunk().copied().unwrap_or_default();
        self.nic.send_rarp(mac)?;
        if self.rarp_throttle.allows() {
            log::info!("Sent a RARP frame for {}", mac::shown(mac));
        }
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

/// The answer to a refused request of those that have an answer even then, as their front-end waits for it.
fn refused_with(request: Option<FrontendReq>, payload: &[u8], why: &Refusal) -> Option<Vec<u8>> {
    match request? {
        FrontendReq::GET_CONFIG => Some(Vec::new()),
        FrontendReq::GET_VRING_BASE => payload.first_chunk::<4>().map(|index| [*index, [0; 4]].concat()),
        FrontendReq::SET_LOG_BASE if !matches!(why, Refusal::NotNegotiated(_)) => {
            Some(vec![0; size_of::<VhostUserLog>()])
        }
        _ => None,
    }
}

fn request_name(request: u32, known: Option<FrontendReq>) -> String {
    known.map_or_else(|| format!("request {request}"), |known| format!("{known:?} ({request})"))
}

/// The protocol feature that must have been negotiated for a message. Questions that change nothing need none: a
/// refused one has no answer, and its front-end would wait for ever.
fn protocol_feature_of(request: FrontendReq) -> Option<Protocol> {
    Some(match request {
        FrontendReq::SET_LOG_BASE => Protocol::LOG_SHMFD,
        FrontendReq::SEND_RARP => Protocol::RARP,
        FrontendReq::NET_SET_MTU => Protocol::MTU,
        FrontendReq::GET_CONFIG => Protocol::CONFIG,
        FrontendReq::RESET_DEVICE => Protocol::RESET_DEVICE,
        FrontendReq::SET_STATUS => Protocol::STATUS,
        FrontendReq::SET_BACKEND_REQ_FD => Protocol::BACKEND_REQ,
        FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG => Protocol::CONFIGURE_MEM_SLOTS,
        _ => return None,
    })
}

/// Whether descriptors may come with a message. `REM_MEM_REG` comes with one from front-ends that copy the message that
/// added the region.
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
            | FrontendReq::SET_LOG_BASE
    )
}
