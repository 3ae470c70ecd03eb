//! The window of `rx`: buffers of the guest that were popped and that no frame is in yet, oldest first.
//!
//! It keeps the chains' heads and pieces, fills itself from the queue, and completes as many chains as a frame took.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::FRAME_MAX;
use super::backlog::SLOTS;
use super::header::{HEADER_LEN, NUM_BUFFERS_OFFSET};
use crate::device::mmsg::CONTROL_LEN;
use crate::device::{DeviceQueue, VlanTag};
use crate::memory::MemView;
use crate::metrics::PairCounters;
use crate::virtqueue::iovec::IOV_MAX;
use crate::virtqueue::{Direction, GuestIovecs, Head, Queue, RingBroken, Shape};

/// Pieces that a read can take besides our header and our private buffer.
const READ_PIECES_MAX: usize = IOV_MAX - 2;

/// The most pieces of guest memory that the window holds. A chain has up to [`IOV_MAX`]; all but the last one popped have
/// fewer bytes together than the largest frame, and a piece has one byte at least, or they are of the chains popped ahead,
/// which are few; and as many again may be of completed chains. A driver decides how many of these there are, so room for
/// all is taken when the ring starts: a longer list would have to be moved while frames are.
const PIECES_MAX: usize = HEADER_LEN + FRAME_MAX + 3 * IOV_MAX;
const _: () = assert!(SLOTS * IOV_MAX < HEADER_LEN + FRAME_MAX);
/// The most chains: mergeable buffers have room for a header each.
const CHAINS_MAX: usize = FRAME_MAX / HEADER_LEN + SLOTS + 2;

/// Without mergeable buffers a chain must hold the header and the smallest frame, else no frame ever fits it.
const CHAIN_MIN: usize = HEADER_LEN + 60;

/// What [`Window::fill`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes are there; less than was asked for only if the ring has no more.
    Bytes(usize),
    /// A chain was of no use and was returned; there is to be looked again.
    ReturnedUnused,
}

/// What [`Window::make_room`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// The bytes are there.
    There,
    /// A chain was of no use and was returned; there is to be looked again.
    LookAgain,
    /// The ring has no more at present.
    NotYet,
    /// All that there can be is too little.
    Never,
}

/// Buffers that were popped from the ring and hold no frame yet.
pub(super) struct Window {
    mergeable: bool,
    iovecs: GuestIovecs,
    /// How many of the first pieces belong to chains that are completed.
    gone: usize,
    chains: VecDeque<Buffer>,
    /// Bytes in them.
    bytes: usize,
}

/// One chain of the window.
struct Buffer {
    len: u32,
    /// At most [`IOV_MAX`].
    pieces: u16,
    /// Descriptors of the ring that it takes up.
    ring_descriptors: u16,
    head: Head,
}

impl Buffer {
    fn new(head: Head, shape: &Shape) -> Buffer {
        // All of them fit: a chain has less than 2^32 bytes, and no more pieces or descriptors than a queue or a call takes.
        let (len, pieces) = (shape.writable_len as u32, shape.writable().len() as u16);
        Buffer { len, pieces, ring_descriptors: shape.ring_descriptors as u16, head }
    }
}

impl Window {
    pub(super) fn new(mem: Arc<MemView>, mergeable: bool) -> Window {
        Window {
            mergeable,
            iovecs: GuestIovecs::new(mem, PIECES_MAX),
            gone: 0,
            chains: VecDeque::with_capacity(CHAINS_MAX),
            bytes: 0,
        }
    }

    /// Whether a frame may take several chains.
    #[inline]
    pub(super) fn mergeable(&self) -> bool {
        self.mergeable
    }

    /// How many buffers there are.
    #[inline]
    pub(super) fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Whether there is no buffer.
    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Pops until `bytes` are there or the ring has no more, or until a chain is of no use. Then goes on up to `ahead`
    /// chains, for frames that come after this one: many at a time are cheaper to pop.
    #[inline]
    pub(super) fn fill(
        &mut self,
        queue: &mut Queue,
        bytes: usize,
        ahead: usize,
        counters: &PairCounters,
    ) -> Result<Filled, RingBroken> {
        let (most, chain_min) = if self.mergeable { (usize::MAX, HEADER_LEN) } else { (1, CHAIN_MIN) };
        let wanted = (Direction::Writable, chain_min as u32);
        let is_enough = |there, chains| (there >= bytes && chains >= ahead) || chains >= most;
        while !is_enough(self.bytes, self.chains.len()) {
            let Window { iovecs, chains, bytes: there, .. } = &mut *self;
            queue.pop_singles(wanted, iovecs, |head, len| {
                append(chains, there, Buffer { len, pieces: 1, ring_descriptors: 1, head });
                !is_enough(*there, chains.len())
            });
            if is_enough(self.bytes, self.chains.len()) {
                break;
            }
            let pieces = self.iovecs.len();
            let Some(popped) = queue.pop(&mut self.iovecs)? else { break };
            match popped.chain.and_then(Shape::only_writable) {
                Ok(shape) if shape.writable_len >= chain_min => {
                    append(&mut self.chains, &mut self.bytes, Buffer::new(popped.head, &shape));
                }
                _ if self.bytes < bytes => {
                    self.return_unused(queue, popped.head, counters);
                    return Ok(Filled::ReturnedUnused);
                }
                _ => {
                    // Its turn comes later.
                    self.iovecs.truncate(pieces);
                    queue.rewind(popped.head);
                    break;
                }
            }
        }
        Ok(Filled::Bytes(self.bytes))
    }

    /// Has the window hold `len` bytes. If buffers have to be popped for that, then at once for `ahead` frames.
    ///
    /// # Errors
    /// [`RingBroken`].
    #[inline]
    pub(super) fn make_room(
        &mut self,
        queue: &mut Queue,
        len: usize,
        ahead: usize,
        counters: &PairCounters,
    ) -> Result<Room, RingBroken> {
        if self.bytes < len && self.fill(queue, len, ahead, counters)? == Filled::ReturnedUnused {
            return Ok(Room::LookAgain);
        }
        Ok(if self.bytes >= len { Room::There } else { self.too_little(queue) })
    }

    /// What it means that the ring has no more.
    #[cold]
    fn too_little(&self, queue: &Queue) -> Room {
        // One chain is all that there can be, or all that the ring can hold is there: it never fits. A chain too short for
        // this frame stays for the next: there are drivers that take one with nothing in it for a frame.
        let ring_descriptors: usize = self.chains.iter().map(|buffer| usize::from(buffer.ring_descriptors)).sum();
        let is_all = !self.mergeable || ring_descriptors >= usize::from(queue.size());
        if self.bytes == 0 || !is_all { Room::NotYet } else { Room::Never }
    }

    /// Returns a malformed entry unused, and before it the good ones that a frame cannot use across it.
    #[cold]
    fn return_unused(&mut self, queue: &mut Queue, bad: Head, counters: &PairCounters) {
        for head in self.chains.drain(..).map(|buffer| buffer.head).chain([bad]) {
            queue.push_used(head, 0);
            counters.rx_bad_chains.add(1);
        }
        self.clear();
    }

    /// Puts everything back, youngest first.
    pub(super) fn give_back(&mut self, queue: &mut Queue) {
        self.chains.drain(..).rev().for_each(|buffer| queue.rewind(buffer.head));
        self.clear();
    }

    fn clear(&mut self) {
        self.iovecs.truncate(0);
        self.gone = 0;
        self.bytes = 0;
    }

    /// The pieces that a read goes to.
    fn read_pieces(&self) -> std::ops::Range<usize> {
        self.gone..self.iovecs.len().min(self.gone + READ_PIECES_MAX)
    }

    /// The bytes that [`Window::read`] can put into the guest's buffers, header included.
    pub(super) fn read_room(&self) -> usize {
        if self.iovecs.len() - self.gone <= READ_PIECES_MAX {
            self.bytes
        } else {
            self.iovecs.bytes(self.read_pieces())
        }
    }

    /// Reads one frame: its start to `start`, then the guest's buffers without their first `skip` bytes, which are the
    /// start's place, then `private`. A VLAN tag that came beside it is put into `tag`.
    #[inline]
    pub(super) fn read(
        &mut self,
        device: &DeviceQueue,
        (start, skip): (&mut [u8], usize),
        private: &mut [u8],
        tag: &mut Option<VlanTag>,
    ) -> Result<usize, Errno> {
        let pieces = (self.read_pieces(), skip);
        if !device.is_packet_socket() {
            return self.iovecs.readv(device.as_fd(), start, pieces, private);
        }
        let mut control = [0; CONTROL_LEN];
        let (len, control_len) = self.iovecs.recvmsg(device.as_fd(), start, pieces, (private, &mut control))?;
        *tag = VlanTag::from_control(control.get(..control_len).unwrap_or_default());
        Ok(len)
    }

    /// Copies the frame that was just read out of the guest's buffers.
    pub(super) fn copy_frame_to(&self, out: &mut [u8]) {
        self.iovecs.copy_to(self.gone..self.iovecs.len(), HEADER_LEN, out);
    }

    /// Completes the chains that hold a frame of `len` bytes, which is in them already but for `start`: its header, and as
    /// many bytes of the frame as follow there.
    #[inline]
    pub(super) fn complete(&mut self, queue: &mut Queue, start: &[u8], len: usize) {
        self.iovecs.copy_from(self.gone..self.iovecs.len(), 0, start);
        self.push_used(queue, HEADER_LEN + len);
    }

    /// Copies a frame into the guest's buffers and completes them: its `start`, header first, and the `rest`.
    #[inline]
    pub(super) fn deliver(&mut self, queue: &mut Queue, start: &[u8], rest: &[u8]) {
        self.iovecs.copy_from(self.gone..self.iovecs.len(), 0, start);
        if !rest.is_empty() {
            self.iovecs.copy_from(self.gone..self.iovecs.len(), start.len(), rest);
        }
        self.push_used(queue, start.len() + rest.len());
    }

    /// Completes the chains with `len` bytes in them, and writes how many those are (VIRTIO 1.3, "Processing of Incoming
    /// Packets").
    #[inline(always)]
    fn push_used(&mut self, queue: &mut Queue, len: usize) {
        let first = self.gone;
        let left = len - self.push_oldest(queue, len);
        let num_buffers = 1 + if left > 0 { self.push_further(queue, left) } else { 0 };
        // It is written where it belongs, as whoever copies what was just written in parts has to wait until that has left
        // the processor.
        self.iovecs.put_le16(first..self.iovecs.len(), NUM_BUFFERS_OFFSET, num_buffers);
        self.compact();
    }

    /// Completes chains until `left` bytes are in them; tells how many chains.
    #[inline(never)]
    fn push_further(&mut self, queue: &mut Queue, mut left: usize) -> u16 {
        let mut chains = 0;
        while left > 0 && !self.chains.is_empty() {
            left -= self.push_oldest(queue, left);
            // A frame has at most 64 KiB and a chain at least 12 bytes: the count fits.
            chains += 1;
        }
        chains
    }

    /// Completes the oldest chain with as many of `len` bytes as it holds; tells how many those are.
    #[inline(always)]
    fn push_oldest(&mut self, queue: &mut Queue, len: usize) -> usize {
        let Some(buffer) = self.chains.pop_front() else { return 0 };
        let here = len.min(buffer.len as usize);
        self.bytes -= buffer.len as usize;
        self.gone += usize::from(buffer.pieces);
        queue.push_used(buffer.head, here as u32);
        here
    }

    /// Moves what is left down once much is gone, so that the list stays short.
    #[inline]
    fn compact(&mut self) {
        if self.chains.is_empty() {
            self.clear();
        } else if self.gone >= IOV_MAX {
            self.iovecs.forget_first(self.gone);
            self.gone = 0;
        }
    }
}

/// Adds a chain to those of a window, and its `bytes`.
#[inline]
fn append(chains: &mut VecDeque<Buffer>, bytes: &mut usize, buffer: Buffer) {
    *bytes += buffer.len as usize;
    chains.push_back(buffer);
}
