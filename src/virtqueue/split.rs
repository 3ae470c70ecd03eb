//! The split ring's three areas in guest memory (VIRTIO 1.3, "Split Virtqueues"): where each word is, and with which
//! memory order it is read or written.
//!
//! Alignment, being wholly in guest memory, and no overlap are checked once, when the ring is made. From then on every
//! access is a single atomic load or store of a word that lies in a mapping which this ring keeps. What the words say
//! is judged elsewhere: in `queue` for indices and in `chain` for descriptors.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::AtomicInteger;

use super::iovec::Words;
use crate::memory::dirty_log::{DirtyLog, UsedLog};
use crate::memory::{MemView, Unmapped};

/// A queue size that a split ring may have: a power of two up to 32768.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSize(u16);

impl QueueSize {
    /// The number of descriptors.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u32> for QueueSize {
    type Error = RingError;

    fn try_from(size: u32) -> Result<QueueSize, RingError> {
        match u16::try_from(size) {
            Ok(n) if n.is_power_of_two() => Ok(QueueSize(n)),
            _ => Err(RingError::BadSize { size }),
        }
    }
}

impl fmt::Display for QueueSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Guest addresses of a split ring's areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitRingAddresses {
    /// The descriptor table.
    pub desc: u64,
    /// The avail ring (driver area).
    pub avail: u64,
    /// The used ring (device area).
    pub used: u64,
}

/// Why a ring cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// Not a power of two, or not in 1 to 32768.
    #[error("Queue size {size} is not a power of two from 1 to 32768")]
    BadSize {
        /// What was asked.
        size: u32,
    },
    /// An area's address is not aligned as the specification asks.
    #[error("The {area} at {addr:#x} is not aligned to {align} bytes")]
    Unaligned {
        /// Which area.
        area: &'static str,
        /// Its guest address.
        addr: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// An area is not wholly in guest memory.
    #[error("The {area} is not all in guest memory")]
    Unmapped {
        /// Which area.
        area: &'static str,
        /// Where it would be.
        #[source]
        cause: Unmapped,
    },
    /// Two areas share bytes, so that writing one would change the other.
    #[error("The used ring at {used:#x} overlaps the {other}")]
    Overlap {
        /// The used ring's guest address.
        used: u64,
        /// The area it overlaps.
        other: &'static str,
    },
}

const DESCRIPTOR: &str = "descriptor table";
const AVAIL: &str = "avail ring";
const USED: &str = "used ring";
/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_SIZE: u64 = 16;
const USED_ENTRY_SIZE: u64 = 8;
/// Bytes of `flags` and `idx`, which stand before the entries of both rings.
const RING_HEAD: u64 = 4;
/// The 16-bit words of both rings: `flags`, `idx`, the entries.
const FLAGS: usize = 0;
const IDX: usize = 1;
const ENTRIES: usize = 2;

/// One area of a ring in words of one size, all of them known to be mapped and aligned.
#[derive(Debug)]
struct Area<T> {
    /// Empty if the area lies over several adjacent regions: then each word is looked up.
    words: Words<T>,
    mem: Arc<MemView>,
    addr: u64,
}

impl<T: AtomicInteger> Area<T> {
    fn new(mem: &Arc<MemView>, area: &'static str, addr: u64, len: u64, align: u64) -> Result<Area<T>, RingError> {
        let unaligned = RingError::Unaligned { area, addr, align };
        let mut pieces = 0;
        let mut aligned = addr.is_multiple_of(align);
        let mut left = len;
        mem.pieces(addr, len, |piece| {
            pieces += 1;
            left -= piece.len() as u64;
            // No word may lie over the border of two pieces, or be unaligned for us though it is aligned for the guest.
            aligned &= (piece.ptr_guard().as_ptr().addr() as u64).is_multiple_of(align)
                && (left == 0 || (piece.len() as u64).is_multiple_of(align));
        })
        .map_err(|cause| RingError::Unmapped { area, cause })?;
        if !aligned {
            return Err(unaligned);
        }
        let in_one = if pieces == 1 { len as usize } else { 0 };
        let words = mem.find(addr).and_then(|region| Words::new(region, addr - region.setup().guest, in_one));
        let words = words.ok_or(RingError::Unmapped { area, cause: Unmapped { addr, len } })?;
        Ok(Area { words, mem: Arc::clone(mem), addr })
    }

    /// Calls `then` with word number `index`, which the caller keeps within the area.
    #[inline(always)]
    fn word<R>(&self, index: usize, then: impl FnOnce(&T) -> R) -> R {
        self.words(index, |[word]| then(word))
    }

    /// As `word`, for `N` words from number `first` on.
    #[inline(always)]
    fn words<const N: usize, R>(&self, first: usize, then: impl FnOnce([&T; N]) -> R) -> R {
        match self.words.get(first) {
            Some(words) => then(words.each_ref()),
            None => then(std::array::from_fn(|index| self.spread_word(first + index))),
        }
    }

    /// Word number `index`, by its guest address.
    #[cold]
    fn spread_word(&self, index: usize) -> &T {
        let addr = self.addr + (index * size_of::<T>()) as u64;
        let word = self.mem.find(addr).and_then(|region| region.atomic(addr - region.setup().guest));
        word.expect("Area::new checked that every word of the area is mapped and aligned")
    }
}

/// Bytes of a used ring, with the `avail_event` at its end.
pub(crate) fn used_ring_len(size: QueueSize) -> u64 {
    RING_HEAD + u64::from(size.get()) * USED_ENTRY_SIZE + 2
}

/// A split ring in guest memory.
#[derive(Debug)]
pub struct SplitRing {
    size: QueueSize,
    desc: Area<AtomicU64>,
    avail: Area<AtomicU16>,
    /// The used ring's entries, in words of 32 bits.
    used: Area<AtomicU32>,
    /// All of the used ring, for its 16-bit words.
    used_head: Area<AtomicU16>,
    /// Where writes to the used ring are logged, if they are.
    used_log: Option<UsedLog>,
}

impl SplitRing {
    /// Finds the ring's areas in `mem`.
    ///
    /// # Errors
    /// [`RingError`] if an area is unaligned, not all mapped, or overlapped by the used ring, the one we write.
    pub fn new(mem: &Arc<MemView>, size: QueueSize, at: SplitRingAddresses) -> Result<SplitRing, RingError> {
        let n = u64::from(size.get());
        // The two rings end with `used_event` and `avail_event` (VIRTIO 1.3, "Used Buffer Notification Suppression").
        let desc_len = n * DESCRIPTOR_SIZE;
        let avail_len = RING_HEAD + n * 2 + 2;
        let used_len = used_ring_len(size);
        for (other, start, len) in [(DESCRIPTOR, at.desc, desc_len), (AVAIL, at.avail, avail_len)] {
            if at.used < start.saturating_add(len) && start < at.used.saturating_add(used_len) {
                return Err(RingError::Overlap { used: at.used, other });
            }
        }
        Ok(SplitRing {
            size,
            desc: Area::new(mem, DESCRIPTOR, at.desc, desc_len, DESCRIPTOR_SIZE)?,
            avail: Area::new(mem, AVAIL, at.avail, avail_len, 2)?,
            used: Area::new(mem, USED, at.used, used_len, 4)?,
            used_head: Area::new(mem, USED, at.used, used_len, 4)?,
            used_log: None,
        })
    }

    /// The same ring, with writes to its used ring logged as if that began at `addr`.
    pub(crate) fn logged(self, log: Arc<DirtyLog>, addr: u64) -> SplitRing {
        SplitRing { used_log: Some(UsedLog { log, addr }), ..self }
    }

    /// Enters in the log that `len` bytes of the used ring from byte `offset` on were written.
    #[inline(always)]
    fn log_used(&self, offset: usize, len: usize) {
        if let Some(log) = &self.used_log {
            log.mark(offset, len);
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size.get()
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size() - 1))
    }

    /// The descriptor at `index`, if there is one; its two halves are read once each.
    #[inline(always)]
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size() {
            return None;
        }
        // Relaxed: `avail_idx`'s acquire ordered the driver's writes of the descriptor before this.
        let [addr, rest] = self.desc.words(2 * usize::from(index), |halves| halves.map(|half| half.load(Relaxed)));
        Some(descriptor_from_words(u64::from_le(addr), u64::from_le(rest)))
    }

    /// Where the driver will put the next head. Acquire: pairs with the driver's write barrier between the avail entry
    /// and the index, so that the entries and descriptors behind this index are seen as the driver wrote them.
    #[inline]
    pub(crate) fn avail_idx(&self) -> u16 {
        self.avail.word(IDX, |w| u16::from_le(w.load(Acquire)))
    }

    /// The head that the driver made available as number `index` (modulo 2^16).
    #[inline]
    pub(crate) fn avail_entry(&self, index: u16) -> u16 {
        self.avail.word(ENTRIES + self.slot(index), |w| u16::from_le(w.load(Relaxed)))
    }

    pub(crate) fn avail_flags(&self) -> u16 {
        self.avail.word(FLAGS, |w| u16::from_le(w.load(Relaxed)))
    }

    /// The used index at which the driver wants a call.
    pub(crate) fn used_event(&self) -> u16 {
        self.avail.word(ENTRIES + usize::from(self.size()), |w| u16::from_le(w.load(Relaxed)))
    }

    /// Writes used entry number `index` (modulo 2^16); the driver sees it after [`SplitRing::store_used_idx`].
    #[inline(always)]
    pub(crate) fn write_used(&self, index: u16, id: u16, len: u32) {
        // Two 32-bit words for each entry, behind one for `flags` and `idx`.
        let first = 1 + 2 * self.slot(index);
        self.used.words(first, |[id_word, len_word]| {
            id_word.store(u32::from(id).to_le(), Relaxed);
            len_word.store(len.to_le(), Relaxed);
        });
        self.log_used(first * size_of::<u32>(), USED_ENTRY_SIZE as usize);
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.used_head.word(IDX, |w| u16::from_le(w.load(Acquire)))
    }

    /// Publishes the used entries before `index`. Release: pairs with the driver's read barrier between its read of
    /// the index and of the entries and buffers.
    #[inline]
    pub(crate) fn store_used_idx(&self, index: u16) {
        self.set_used_head(IDX, index, Release);
    }

    pub(crate) fn set_used_flags(&self, flags: u16) {
        self.set_used_head(FLAGS, flags, Relaxed);
    }

    /// Writes the used ring's 16-bit word `at`.
    #[inline(always)]
    fn set_used_head(&self, at: usize, value: u16, order: Ordering) {
        self.used_head.word(at, |w| w.store(value.to_le(), order));
        self.log_used(at * size_of::<u16>(), size_of::<u16>());
    }

    /// Asks the driver for a kick once it makes avail entry number `index` available.
    pub(crate) fn set_avail_event(&self, index: u16) {
        self.set_used_head(ENTRIES + 4 * usize::from(self.size()), index, Relaxed);
    }
}

/// Makes a descriptor of the two words in which it is stored, in host byte order.
pub(crate) fn descriptor_from_words(addr: u64, rest: u64) -> Descriptor {
    Descriptor::new(addr, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16)
}

/// A full barrier between a store that the driver reads and a load that the driver stores to: the two sides must not
/// both miss the other's write (the driver has the same barrier between its index and its look at our flags or event).
pub(crate) fn full_fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}
