//! A ring's life in a session (vhost-user, "Ring states").
//!
//! ```text
//!   Stopped(RingSetup) ── size, addresses and a kick are there ──▶ Started(StartedRing)   its Queue is with a worker
//!          ▲                                                            │
//!          └── GET_VRING_BASE, a reset, memory taken away, session over ┘
//! ```
//!
//! The parts may come in any order (QEMU: base, addresses, kick, call; cloud-hypervisor: addresses, base, call, kick),
//! and a call may come later or never. A starting ring takes its position from the used index in guest memory:
//! completion is in order, so that index is the truth, whatever base the front-end says.

use std::sync::Arc;

use thiserror::Error;
use vhost::vhost_user::message::VhostUserVringAddr;

use crate::memory::MemView;
use crate::notify::RingFds;
use crate::running_ring::StoppedRing;
use crate::virtqueue::queue::RingFeatures;
use crate::virtqueue::split::used_ring_len;
use crate::virtqueue::{Queue, QueueSize, RingBroken, RingError, SplitRing, SplitRingAddresses};

/// A flag of `SET_VRING_ADDR`: writes to the used ring are to be logged (`VHOST_VRING_F_LOG`).
pub(super) const VRING_LOG: u32 = 1;

/// A ring's areas in the front-end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UserAddresses {
    desc: u64,
    avail: u64,
    used: u64,
}

/// Where a ring is, as the front-end says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) user: UserAddresses,
    /// Where writes to the used ring are logged, as if the ring began there; `None` if they are not.
    used_log: Option<u64>,
}

impl Addresses {
    /// Whether writes to the used ring are to be logged.
    pub(super) fn logs_used_ring(&self) -> bool {
        self.used_log.is_some()
    }
}

impl From<&VhostUserVringAddr> for Addresses {
    fn from(message: &VhostUserVringAddr) -> Addresses {
        let user = UserAddresses { desc: message.descriptor, avail: message.available, used: message.used };
        Addresses { user, used_log: (message.flags & VRING_LOG != 0).then_some(message.log) }
    }
}

/// Where a ring is and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) size: QueueSize,
    pub(super) addresses: Addresses,
}

/// Why a ring does not start, or why its description is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(in crate::vhost_user) enum StartError {
    /// An address is in no memory region.
    #[error("Ring address {user:#x} is in no memory region")]
    NotInMemory {
        /// The address in the front-end.
        user: u64,
    },
    /// Its layout is impossible.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The log has no room for writes to its used ring.
    #[error("Used ring of {len} bytes is to be logged from {addr:#x} on, behind the end of the log")]
    UsedLog {
        /// Where they are to be logged.
        addr: u64,
        /// Bytes of the used ring.
        len: u64,
    },
    /// Its indices are impossible.
    #[error("Ring is broken: {0}")]
    Broken(#[from] RingBroken),
}

impl Layout {
    /// Finds the ring in `mem`.
    pub(super) fn find(&self, mem: &Arc<MemView>) -> Result<SplitRing, StartError> {
        let guest = |user| mem.user_to_guest(user).ok_or(StartError::NotInMemory { user });
        let Addresses { user: UserAddresses { desc, avail, used }, used_log } = self.addresses;
        let addresses = SplitRingAddresses { desc: guest(desc)?, avail: guest(avail)?, used: guest(used)? };
        let ring = SplitRing::new(mem, self.size, addresses)?;
        // Without a log there is nothing to check yet: it may come later.
        let (Some(addr), Some(log)) = (used_log, mem.log()) else { return Ok(ring) };
        let len = used_ring_len(self.size);
        let is_covered = addr.checked_add(len - 1).is_some_and(|last| log.covers(last));
        if is_covered { Ok(ring.logged(Arc::clone(log), addr)) } else { Err(StartError::UsedLog { addr, len }) }
    }

    /// Starts a queue on the ring.
    pub(super) fn start(&self, mem: &Arc<MemView>, features: RingFeatures) -> Result<Queue, StartError> {
        Ok(Queue::start(self.find(mem)?, Arc::clone(mem), features)?)
    }
}

/// What is known of a stopped ring.
#[derive(Debug, Default)]
pub(super) struct RingSetup {
    pub(super) size: Option<QueueSize>,
    pub(super) addresses: Option<Addresses>,
    /// The position at which the ring carries on, as the front-end says.
    pub(super) base: u16,
    pub(super) fds: RingFds,
    /// Whether a kick message came, with or without a descriptor; the ring does not start before that.
    pub(super) is_kick_told: bool,
    /// Whether the ring ran until its memory was taken away; it runs again when the memory is back.
    pub(super) is_lost: bool,
}

impl RingSetup {
    /// The ring's layout, once both of its parts are known.
    pub(super) fn layout(&self) -> Option<Layout> {
        Some(Layout { size: self.size?, addresses: self.addresses? })
    }

    /// The setup of a ring of `layout` that has just stopped. Only a new kick starts it again, unless `keeps_kick` says
    /// otherwise and the ring is not broken.
    pub(super) fn stopped(layout: Layout, left: StoppedRing, keeps_kick: bool) -> RingSetup {
        let mut setup = RingSetup {
            size: Some(layout.size),
            addresses: Some(layout.addresses),
            base: left.position,
            fds: left.fds,
            is_kick_told: true,
            is_lost: false,
        };
        if !keeps_kick || left.is_broken {
            setup.forget_kick();
        }
        setup
    }

    /// Keeps the ring from starting before a new kick message comes.
    pub(super) fn forget_kick(&mut self) {
        self.fds.kick = None;
        self.is_kick_told = false;
    }
}

/// What the session knows of a ring that is with a worker.
#[derive(Debug)]
pub(super) struct StartedRing {
    pub(super) layout: Layout,
    /// The position as the front-end says it, which the front-end may correct until frames pass.
    pub(super) base: u16,
    /// The position at which the ring really carries on; true until frames pass.
    pub(super) position: u16,
}

impl StartedRing {
    /// Whether the front-end is wrong about the position.
    pub(super) fn is_off_base(&self) -> bool {
        self.base != self.position
    }
}

/// A ring of a session: stopped or started.
#[derive(Debug)]
pub(super) enum Ring {
    /// Being described by the front-end.
    Stopped(RingSetup),
    /// With a worker.
    Started(StartedRing),
}

impl Ring {
    /// The ring, if it is started.
    pub(super) fn started(&self) -> Option<&StartedRing> {
        match self {
            Ring::Started(started) => Some(started),
            Ring::Stopped(_) => None,
        }
    }
}

impl Default for Ring {
    fn default() -> Ring {
        Ring::Stopped(RingSetup::default())
    }
}
