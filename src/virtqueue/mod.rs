//! Virtqueues, the device's side (VIRTIO 1.3, "Split Virtqueues"). No networking, no sockets, no threads here.
//!
//! Theory of operation. A [`Queue`] exists only while its ring is started, and one worker owns it. [`Queue::pop`] takes
//! the next head from the avail ring; [`chain`], the only walker there is, follows its descriptors and checks the whole
//! chain before a byte of it is used. The buffers come out as pieces of guest memory in an [`iovec::GuestIovecs`].
//! [`Queue::pop_singles`] takes chains of one buffer, as most are, at less cost, and leaves all others to `pop`. A
//! popped entry is a [`Head`], which ends exactly once: [`Queue::push_used`] completes it, [`Queue::rewind`] puts it
//! back. Used entries gather until [`Queue::publish`] makes them visible together and returns whether the driver wants
//! a call. Completion is in order, always: the used index in guest memory is then a complete record of what is done,
//! and a new process carries on from it.
//!
//! Three ways a driver can be wrong, and what follows:
//! * a bad chain ([`ChainFault`]): the head is known, so it can be returned unused, and the queue goes on;
//! * a bad ring ([`RingBroken`]), with a head or an index that cannot be: nothing sane can be returned, so the ring is
//!   parked until it is set up anew;
//! * a bad layout ([`RingError`]): the ring does not start.

pub mod chain;
pub mod iovec;
pub mod queue;
pub mod split;

pub use chain::{ChainFault, Direction, Shape};
pub use iovec::GuestIovecs;
pub use queue::{Head, Popped, Queue, RingBroken};
pub use split::{QueueSize, RingError, SplitRing, SplitRingAddresses};

#[cfg(test)]
mod tests;
