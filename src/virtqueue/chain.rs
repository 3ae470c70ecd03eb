//! The descriptor chain walker, the only one (VIRTIO 1.3, "The Virtqueue Descriptor Table", "Indirect Descriptors").
//!
//! `Queue::pop` calls it with a head; it follows direct and indirect descriptors to the end, checks all of them and
//! appends their buffers to a [`GuestIovecs`]. A malformed chain never turns into a shorter good one: it is a
//! [`ChainFault`]. Every descriptor is read once, into a copy of ours. The walker does not know what the buffers hold.
//!
//! Most chains are of one descriptor. `Queue::pop_singles` has [`collect_single`] take those at less cost. It leaves
//! alone all chains that are different or wrong, which `pop` then reads anew.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;

use super::iovec::{GuestIovecs, IOV_MAX, PushError};
use super::split::{DESCRIPTOR_SIZE, SplitRing, descriptor_from_words};
use crate::memory::{MemView, Unmapped};

/// What a driver can do wrong in one chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChainFault {
    /// `next` names no descriptor of its table.
    #[error("next descriptor {index} is outside its table of {size}")]
    NextOutOfTable {
        /// What `next` says.
        index: u16,
        /// The table's size.
        size: u32,
    },
    /// The chain has more descriptors than its table: it loops.
    #[error("chain loops")]
    Loop,
    /// An indirect descriptor where the feature was not negotiated.
    #[error("indirect descriptor, but VIRTIO_F_INDIRECT_DESC was not negotiated")]
    IndirectNotNegotiated,
    /// An indirect descriptor in an indirect table.
    #[error("indirect descriptor within an indirect table")]
    NestedIndirect,
    /// INDIRECT and NEXT in one descriptor.
    #[error("descriptor is indirect and has a next one")]
    IndirectWithNext,
    /// An indirect table whose length is 0, no multiple of 16, or more than is taken.
    #[error("indirect table of {len} bytes")]
    BadTableLength {
        /// Its length.
        len: u32,
    },
    /// A buffer or table is outside guest memory.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
    /// A readable buffer behind a writable one.
    #[error("device-readable buffer behind a device-writable one")]
    ReadableAfterWritable,
    /// More than 2^32 bytes (VIRTIO 1.3, "The Virtqueue Descriptor Table").
    #[error("chain is longer than 2^32 bytes")]
    TooLong,
    /// More pieces of memory than one system call takes.
    #[error("chain has more than {IOV_MAX} buffers")]
    TooManyBuffers,
    /// A buffer of the wrong direction for this queue: see `Shape::only_readable` and `Shape::only_writable`.
    #[error("buffer in the wrong direction for this queue")]
    WrongDirection,
}

/// What the device may do with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It may read it.
    Readable,
    /// It may write it.
    Writable,
}

/// A checked chain: which pieces of the [`GuestIovecs`] are its buffers.
///
/// All fields have the same size: a copy of two smaller fields at once would have to wait for both of their stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    start: usize,
    middle: usize,
    end: usize,
    /// Bytes of the device-readable buffers.
    pub readable_len: usize,
    /// Bytes of the device-writable buffers.
    pub writable_len: usize,
    /// How many descriptors of the ring itself it takes up.
    pub ring_descriptors: usize,
}

impl Shape {
    /// The device-readable pieces.
    pub fn readable(&self) -> std::ops::Range<usize> {
        self.start..self.middle
    }

    /// The device-writable pieces.
    pub fn writable(&self) -> std::ops::Range<usize> {
        self.middle..self.end
    }

    /// Checks the chain of a queue on which the driver only sends.
    ///
    /// # Errors
    /// [`ChainFault::WrongDirection`] where there is a device-writable buffer.
    pub fn only_readable(self) -> Result<Shape, ChainFault> {
        if self.writable_len == 0 { Ok(self) } else { Err(ChainFault::WrongDirection) }
    }

    /// Checks the chain of a queue on which the driver only receives.
    ///
    /// # Errors
    /// [`ChainFault::WrongDirection`] where there is a device-readable buffer.
    pub fn only_writable(self) -> Result<Shape, ChainFault> {
        if self.readable_len == 0 { Ok(self) } else { Err(ChainFault::WrongDirection) }
    }

    fn at(start: usize) -> Shape {
        Shape { start, middle: start, end: start, readable_len: 0, writable_len: 0, ring_descriptors: 0 }
    }

    /// Adds the buffer of one descriptor. A buffer of length 0 holds nothing, wherever it points, and is passed over.
    #[inline(always)]
    fn add(&mut self, desc: Descriptor, out: &mut GuestIovecs) -> Result<(), ChainFault> {
        if desc.len() == 0 {
            return Ok(());
        }
        let (part, total) = if desc.is_write_only() {
            (self.middle, &mut self.writable_len)
        } else if self.writable_len == 0 {
            (self.start, &mut self.readable_len)
        } else {
            return Err(ChainFault::ReadableAfterWritable);
        };
        let longer = total.checked_add(desc.len() as usize);
        *total = longer.filter(|len| u32::try_from(*len).is_ok()).ok_or(ChainFault::TooLong)?;
        out.push(desc.addr().0, desc.len(), part).map_err(|e| match e {
            PushError::Unmapped(cause) => ChainFault::Unmapped(cause),
            PushError::TooMany => ChainFault::TooManyBuffers,
        })?;
        self.end = out.len();
        if !desc.is_write_only() {
            self.middle = self.end;
        }
        if self.end - self.start > IOV_MAX { Err(ChainFault::TooManyBuffers) } else { Ok(()) }
    }
}

/// The table in which the walk is.
#[derive(Clone, Copy)]
enum Table {
    Ring,
    Indirect { addr: u64, size: u32 },
}

impl Table {
    fn size(self, ring: &SplitRing) -> u32 {
        match self {
            Table::Ring => u32::from(ring.size()),
            Table::Indirect { size, .. } => size,
        }
    }

    fn descriptor(self, ring: &SplitRing, mem: &MemView, index: u16) -> Result<Descriptor, ChainFault> {
        let out_of_table = ChainFault::NextOutOfTable { index, size: self.size(ring) };
        match self {
            Table::Ring => ring.descriptor(index).ok_or(out_of_table),
            Table::Indirect { addr, size } if u32::from(index) < size => {
                // `addr + 16 * size` is in guest memory (`indirect_table` checked it), so this cannot wrap.
                indirect_descriptor(mem, addr + DESCRIPTOR_SIZE * u64::from(index))
            }
            Table::Indirect { .. } => Err(out_of_table),
        }
    }
}

fn indirect_descriptor(mem: &MemView, addr: u64) -> Result<Descriptor, ChainFault> {
    let mut raw = [[0; 8]; 2];
    mem.read(addr, raw.as_flattened_mut())?;
    let [addr, rest] = raw.map(u64::from_le_bytes);
    Ok(descriptor_from_words(addr, rest))
}

/// The table that an indirect descriptor refers to. It may have as many entries as the queue, and 1024 in any case,
/// which drivers could always use.
fn indirect_table(desc: Descriptor, ring: &SplitRing, mem: &MemView) -> Result<Table, ChainFault> {
    let (addr, len) = (desc.addr().0, desc.len());
    let size = len / DESCRIPTOR_SIZE as u32;
    let most = u32::from(ring.size()).max(IOV_MAX as u32);
    if size == 0 || size > most || !len.is_multiple_of(DESCRIPTOR_SIZE as u32) {
        return Err(ChainFault::BadTableLength { len });
    }
    mem.pieces(addr, u64::from(len), |_| {})?;
    Ok(Table::Indirect { addr, size })
}

/// Appends the buffer of the chain that starts at descriptor `head` of `ring` to `out`, if the chain is like most: one
/// buffer in this `direction` of at least `min` bytes, in the region of the buffer before. Returns its length, or
/// `None` for any other chain, as [`collect`] finds out what that is.
#[inline(always)]
pub(crate) fn collect_single(
    ring: &SplitRing,
    head: u16,
    (direction, min): (Direction, u32),
    out: &mut GuestIovecs,
) -> Option<u32> {
    let desc = ring.descriptor(head)?;
    let is_buffer = desc.is_write_only() == (direction == Direction::Writable) && desc.len() >= min;
    let is_single = is_buffer && !desc.has_next() && !desc.refers_to_indirect_table();
    (is_single && out.push_near(desc.addr().0, desc.len())).then_some(desc.len())
}

/// The most buffers of no bytes in a chain: no driver has a use for one, and each takes time.
const EMPTY_MAX: usize = 64;

/// Walks the chain that starts at descriptor `head` of `ring` and appends its buffers to `out`.
///
/// Descriptors of the ring may be followed by one indirect descriptor, the last (VIRTIO 1.3, "Indirect Descriptors").
///
/// # Errors
/// [`ChainFault`]; the caller has to take back what was appended to `out` by then.
pub(crate) fn collect(ring: &SplitRing, indirect: bool, head: u16, out: &mut GuestIovecs) -> Result<Shape, ChainFault> {
    let mut shape = Shape::at(out.len());
    let mut table = Table::Ring;
    let mut desc = table.descriptor(ring, out.mem(), head)?;
    let mut left = table.size(ring);
    let mut empty = 0;
    loop {
        if matches!(table, Table::Ring) {
            shape.ring_descriptors += 1;
        }
        if desc.refers_to_indirect_table() {
            check_indirect(desc, table, indirect)?;
            table = indirect_table(desc, ring, out.mem())?;
            left = table.size(ring);
            desc = table.descriptor(ring, out.mem(), 0)?;
            continue;
        }
        empty += usize::from(desc.len() == 0);
        if empty > EMPTY_MAX {
            return Err(ChainFault::TooManyBuffers);
        }
        shape.add(desc, out)?;
        if !desc.has_next() {
            return Ok(shape);
        }
        left -= 1;
        if left == 0 {
            return Err(ChainFault::Loop);
        }
        desc = table.descriptor(ring, out.mem(), desc.next())?;
    }
}

fn check_indirect(desc: Descriptor, table: Table, negotiated: bool) -> Result<(), ChainFault> {
    match table {
        _ if !negotiated => Err(ChainFault::IndirectNotNegotiated),
        Table::Indirect { .. } => Err(ChainFault::NestedIndirect),
        Table::Ring if desc.has_next() => Err(ChainFault::IndirectWithNext),
        Table::Ring => Ok(()),
    }
}
