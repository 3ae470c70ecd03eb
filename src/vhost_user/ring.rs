//! A ring's life in a session (vhost-user, "Ring states").
//!
//! ```text
//!   Stopped(RingSetup) ── size, addresses and a kick are there ──▶ Started(StartedRing)   its Queue is with a worker
//!          ▲                                                            │
//!          └── GET_VRING_BASE, a reset, memory taken away, session over ┘
//! ```
//!
//! The order in which the parts come does not matter (QEMU: base, addresses, kick, call; cloud-hypervisor: addresses,
//! base, call, kick), and a call may come later or never. Where to carry on is read from the used index in guest memory
//! when the ring starts: completion is in order, so that index is the truth, whatever base the front-end says.

use std::sync::Arc;

use thiserror::Error;
use vhost::vhost_user::message::VhostUserVringAddr;

use crate::memory::MemView;
use crate::notify::RingFds;
use crate::running_ring::StoppedRing;
use crate::virtqueue::queue::RingFeatures;
use crate::virtqueue::split::used_ring_len;
use crate::virtqueue::{Queue, QueueSize, RingBroken, RingError, SplitRing, SplitRingAddresses};

/// In the flags of `SET_VRING_ADDR`: the used ring is to be logged (`VHOST_VRING_F_LOG`).
pub(super) const VRING_LOG: u32 = 1;

/// A ring's areas in the front-end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UserAddresses {
    desc: u64,
    avail: u64,
    used: u64,
}

/// Where a ring is, by its front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) user: UserAddresses,
    /// Where what is written to the used ring is to be logged as if it began there, if it is.
    used_log: Option<u64>,
}

impl From<&VhostUserVringAddr> for Addresses {
    fn from(message: &VhostUserVringAddr) -> Addresses {
        let user = UserAddresses { desc: message.descriptor, avail: message.available, used: message.used };
        Addresses { user, used_log: (message.flags & VRING_LOG != 0).then_some(message.log) }
    }
}

/// Where a ring is and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) size: QueueSize,
    pub(super) addresses: Addresses,
}

/// Why a ring does not start, or is refused where it is described.
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
    /// What is written to its used ring cannot be logged where it is to be.
    #[error("Used ring of {len} bytes is to be logged from {addr:#x} on, behind the end of the log")]
    UsedLog {
        /// Where it is to be logged.
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
        // Without a log there is nothing to be done yet: it may come later.
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

/// What is known of a ring that is stopped.
#[derive(Debug, Default)]
pub(super) struct RingSetup {
    pub(super) size: Option<QueueSize>,
    pub(super) addresses: Option<Addresses>,
    /// Where the front-end says that it carries on.
    pub(super) base: u16,
    pub(super) fds: RingFds,
    /// Whether its kick was told, be it that there is no descriptor: with that it starts.
    pub(super) is_kick_told: bool,
    /// Whether it ran until its memory was taken away; it runs again when that is back.
    pub(super) is_lost: bool,
}

impl RingSetup {
    /// Where it would be, once both parts of that are known.
    pub(super) fn layout(&self) -> Option<Layout> {
        Some(Layout { size: self.size?, addresses: self.addresses? })
    }

    /// A ring of `layout` that has just stopped. What starts it again is a new kick, unless `keeps_kick`.
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

    /// It does not start before its kick is told anew.
    pub(super) fn forget_kick(&mut self) {
        self.fds.kick = None;
        self.is_kick_told = false;
    }
}

/// What the session knows of a ring that a worker has.
#[derive(Debug)]
pub(super) struct StartedRing {
    pub(super) layout: Layout,
    /// Where the front-end says that it carries on; it may correct that until frames pass.
    pub(super) base: u16,
    /// Where it does, until frames pass.
    pub(super) position: u16,
}

impl StartedRing {
    /// Whether the front-end is wrong about where it carries on.
    pub(super) fn is_off_base(&self) -> bool {
        self.base != self.position
    }
}

/// See the file's head.
#[derive(Debug)]
pub(super) enum Ring {
    /// Being described.
    Stopped(RingSetup),
    /// With a worker.
    Started(StartedRing),
}

impl Default for Ring {
    fn default() -> Ring {
        Ring::Stopped(RingSetup::default())
    }
}
