//! A running virtqueue: positions, in-order completion, notifications both ways.
//!
//! A worker owns it from the start of its ring until the ring stops (`vhost_user::ring` makes it). All positions are
//! free-running 16-bit counters, as in the rings:
//!
//! ```text
//!   used index        next_used         next_avail          avail index
//!   (published)       (pushed)          (popped)            (the driver's)
//!   ──────┼───────────────┼─────────────────┼────────────────────┼──────▶
//!          entries to publish   in our hands    waiting in the ring
//! ```

use std::sync::Arc;

use thiserror::Error;

use super::chain::{ChainFault, Direction, Shape, collect, collect_single};
use super::iovec::GuestIovecs;
use super::split::{SplitRing, full_fence};
use crate::memory::MemView;

/// `VIRTQ_USED_F_NO_NOTIFY`: the driver need not kick.
const USED_F_NO_NOTIFY: u16 = 1;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the device need not call.
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// A ring from which nothing sane can be read; it is parked until it is set up anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingBroken {
    /// The driver made more entries available than the ring has places.
    #[error("avail index {avail} is more than {size} ahead of used index {used}")]
    AvailIndex {
        /// The driver's index.
        avail: u16,
        /// How far completion has come.
        used: u16,
        /// The queue size.
        size: u16,
    },
    /// The driver took back entries that were popped already.
    #[error("avail index {avail} went back behind {taken}, up to which entries were taken")]
    AvailIndexBack {
        /// The driver's index.
        avail: u16,
        /// How far entries were popped.
        taken: u16,
    },
    /// An avail entry names no descriptor, so that nothing can be returned for it.
    #[error("head {head} is no descriptor of a ring of {size}")]
    Head {
        /// What the entry says.
        head: u16,
        /// The queue size.
        size: u16,
    },
}

/// The right to complete or put back one popped chain; it ends in [`Queue::push_used`] or [`Queue::rewind`].
#[must_use = "a popped head is completed with push_used or put back with rewind"]
#[derive(Debug)]
pub struct Head(u16);

/// One popped entry of the avail ring.
#[derive(Debug)]
pub struct Popped {
    /// The head, to be completed or put back.
    pub head: Head,
    /// Its chain, or what is wrong with it.
    pub chain: Result<Shape, ChainFault>,
}

/// Which of the negotiated features change how a ring is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: bool,
}

/// A started virtqueue.
#[derive(Debug)]
pub struct Queue {
    ring: SplitRing,
    mem: Arc<MemView>,
    features: RingFeatures,
    next_avail: u16,
    next_used: u16,
    /// The used index in guest memory.
    published: u16,
    /// The avail index as last seen.
    avail_seen: u16,
    kicks_wanted: bool,
}

impl Queue {
    /// Starts on `ring`, at the position that the used index in guest memory gives.
    ///
    /// # Errors
    /// [`RingBroken::AvailIndex`] if the two indices cannot both be right.
    pub fn start(ring: SplitRing, mem: Arc<MemView>, features: RingFeatures) -> Result<Queue, RingBroken> {
        let used = ring.used_idx();
        let mut queue = Queue {
            ring,
            mem,
            features,
            next_avail: used,
            next_used: used,
            published: used,
            avail_seen: used,
            kicks_wanted: true,
        };
        queue.read_avail_idx()?;
        queue.disable_kicks();
        Ok(queue)
    }

    /// The memory that the ring and its buffers are in.
    pub fn mem(&self) -> &Arc<MemView> {
        &self.mem
    }

    /// Carries on with the same ring found in another view of memory.
    ///
    /// No chain may be in hand, that is, popped and neither completed nor put back.
    pub fn relocate(&mut self, ring: SplitRing, mem: Arc<MemView>) {
        debug_assert_eq!(self.next_avail, self.next_used, "chains in hand point into the old memory");
        self.ring = ring;
        self.mem = mem;
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Where the ring would carry on if it were stopped now: all before this is completed and published.
    pub fn position(&self) -> u16 {
        self.published
    }

    /// Takes the next entry as [`Queue::pop`] does, if it is like most: known to wait, and of one buffer in the wanted
    /// direction, of at least the wanted length, in the region of the buffer before. The buffer is appended to `out` as
    /// one piece. Returns its length. Of any other entry nothing is taken: `pop` is there for all.
    #[inline(always)]
    pub fn pop_single(&mut self, wanted: (Direction, u32), out: &mut GuestIovecs) -> Option<(Head, u32)> {
        let mut popped = None;
        self.pop_singles(wanted, out, |head, len| {
            popped = Some((head, len));
            false
        });
        popped
    }

    /// As [`Queue::pop_single`], for one entry after the other, each handed to `take`, for as long as that says to go on.
    #[inline(always)]
    pub fn pop_singles(
        &mut self,
        wanted: (Direction, u32),
        out: &mut GuestIovecs,
        mut take: impl FnMut(Head, u32) -> bool,
    ) {
        let mut next = self.next_avail;
        while self.avail_seen != next {
            let head = self.ring.avail_entry(next);
            let Some(len) = collect_single(&self.ring, head, wanted, out) else { break };
            next = next.wrapping_add(1);
            if !take(Head(head), len) {
                break;
            }
        }
        self.next_avail = next;
    }

    /// Takes the next entry of the avail ring, if there is one; its buffers are appended to `out`.
    ///
    /// # Errors
    /// [`RingBroken`]; the ring is of no more use then.
    pub fn pop(&mut self, out: &mut GuestIovecs) -> Result<Option<Popped>, RingBroken> {
        if !self.has_entries()? {
            return Ok(None);
        }
        let head = self.ring.avail_entry(self.next_avail);
        if head >= self.size() {
            return Err(RingBroken::Head { head, size: self.size() });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        let before = out.len();
        let chain = collect(&self.ring, self.features.indirect, head, out);
        if chain.is_err() {
            out.truncate(before);
        }
        Ok(Some(Popped { head: Head(head), chain }))
    }

    /// Whether [`Queue::pop`] would find an entry.
    ///
    /// # Errors
    /// [`RingBroken`], of the avail index.
    #[inline]
    pub fn has_entries(&mut self) -> Result<bool, RingBroken> {
        if self.avail_seen == self.next_avail {
            self.read_avail_idx()?;
        }
        Ok(self.avail_seen != self.next_avail)
    }

    /// How many entries are known to wait; [`Queue::has_entries`] looks for more.
    #[inline]
    pub fn entries_seen(&self) -> usize {
        usize::from(self.avail_seen.wrapping_sub(self.next_avail))
    }

    /// Reads the avail index, once, and checks it.
    fn read_avail_idx(&mut self) -> Result<(), RingBroken> {
        let avail = self.ring.avail_idx();
        if avail.wrapping_sub(self.next_used) > self.size() {
            return Err(RingBroken::AvailIndex { avail, used: self.next_used, size: self.size() });
        }
        // An index behind the popped entries would look like almost 2^16 new entries.
        if avail.wrapping_sub(self.next_used) < self.next_avail.wrapping_sub(self.next_used) {
            return Err(RingBroken::AvailIndexBack { avail, taken: self.next_avail });
        }
        self.avail_seen = avail;
        Ok(())
    }

    /// Puts back the entry that was popped last.
    pub fn rewind(&mut self, head: Head) {
        let Head(_) = head;
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Completes a chain into which `len` bytes were written. Chains are completed in the order in which they were
    /// popped; the driver sees them at the next [`Queue::publish`].
    #[inline(always)]
    pub fn push_used(&mut self, head: Head, len: u32) {
        let Head(id) = head;
        self.ring.write_used(self.next_used, id, len);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes the completed chains visible to the driver, all at once; returns whether it wants a call for them.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.next_used);
        self.ring.store_used_idx(self.next_used);
        // The driver writes `used_event` or its flags and then looks at the used index again; with a barrier on both
        // sides one of us sees the other.
        full_fence();
        if self.features.event_idx {
            is_event_within(self.ring.used_event(), old, self.next_used)
        } else {
            self.ring.avail_flags() & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Whether the driver was asked for a kick, and not told since that none is needed.
    pub fn wants_kicks(&self) -> bool {
        self.kicks_wanted
    }

    /// Tells the driver that kicks are not needed, as we look without them.
    pub fn disable_kicks(&mut self) {
        if std::mem::replace(&mut self.kicks_wanted, false) && !self.features.event_idx {
            self.ring.set_used_flags(USED_F_NO_NOTIFY);
        }
        // With the event index there is nothing to write: the event lies behind and is not reached again.
    }

    /// Asks the driver for a kick at its next entry; returns whether entries came meanwhile, for which no kick may
    /// come.
    ///
    /// # Errors
    /// [`RingBroken`], of the avail index.
    pub fn enable_kicks(&mut self) -> Result<bool, RingBroken> {
        self.kicks_wanted = true;
        if self.features.event_idx {
            self.ring.set_avail_event(self.next_avail);
        } else {
            self.ring.set_used_flags(0);
        }
        // The driver writes its index and then looks at our event or flags; with a barrier on both sides one of us sees
        // the other.
        full_fence();
        self.read_avail_idx()?;
        Ok(self.avail_seen != self.next_avail)
    }
}

/// Whether index `event` was passed on the way from `old` to `new` (VIRTIO 1.3, "Used Buffer Notification
/// Suppression"); all three count modulo 2^16.
fn is_event_within(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
