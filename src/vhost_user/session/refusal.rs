//! Why a message is refused: what the front-end did wrong, in words for the log.

use thiserror::Error;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use super::super::memory::MemoryError;
use super::super::ring::StartError;
use crate::mailbox::Stuck;
use crate::memory::MapError;
use crate::nic::NicError;
use crate::virtqueue::{QueueSize, RingError};

/// Why a message is refused.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    /// Its number is unknown, or of something that a network device does not have.
    #[error("Request not supported")]
    Unknown,
    /// Its protocol feature was not negotiated.
    #[error("Protocol feature {0:?} was not negotiated")]
    NotNegotiated(Protocol),
    /// Its payload is not of the right length.
    #[error("Payload of {got} bytes, {expected} expected")]
    PayloadLength {
        /// How many bytes came.
        got: usize,
        /// How many bytes the message has.
        expected: usize,
    },
    /// The wrong number of descriptors came with it.
    #[error("{got} descriptors came with it, {expected} expected")]
    Descriptors {
        /// How many came.
        got: usize,
        /// How many the message has.
        expected: usize,
    },
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
        /// What number it is.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// Features that were not offered.
    #[error("Features that were not offered: {0}")]
    NotOffered(String),
    /// The guest does not use VIRTIO 1.
    #[error("The guest's driver does not use VIRTIO 1 (VERSION_1 missing): a legacy or transitional driver?")]
    Legacy,
    /// Features may not change while rings run.
    #[error("Features cannot change while rings run")]
    RingsRun,
    /// The ring cannot start, or cannot be where it is described.
    #[error(transparent)]
    Ring(#[from] StartError),
    /// The queue size is impossible.
    #[error(transparent)]
    Size(#[from] RingError),
    /// The queue size is more than the operator allows.
    #[error("Queue size {size} is more than --queue-size {most} allows")]
    TooLarge {
        /// What was asked for.
        size: QueueSize,
        /// The most that there may be.
        most: QueueSize,
    },
    /// The memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The log of written pages cannot be used.
    #[error("The log of written pages cannot be used")]
    Log(#[source] MapError),
    /// The log has no bit for some pages.
    #[error("A log of {size} bytes has no bit for the page of guest address {last:#x}")]
    LogTooSmall {
        /// The last guest address.
        last: u64,
        /// The log's bytes.
        size: u64,
    },
    /// Writes are to be logged, and there is no log.
    #[error("LOG_ALL while rings run, and no log came (SET_LOG_BASE)")]
    NoLog,
    /// The card could not do what was asked.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// A worker does not answer.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// A descriptor is unusable.
    #[error("Descriptor for ring {index} is neither an eventfd nor a pipe or socket")]
    BadDescriptor {
        /// The ring's index.
        index: usize,
    },
}
