//! Frames from the guest to the device.
//!
//! One pass: pop a chain, copy and check its header, hand header and payload to the device in one `writev` straight from
//! guest memory, complete the chain. Nothing is reordered and nothing is skipped silently: a frame is sent, or counted
//! under one reason. The worker publishes what was completed after the pass.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::header::{HEADER_LEN, PROTOCOL_HEADERS_MAX, TxRules, VnetHeader};
use super::{ETH_HEADER, FRAME_MAX, LARGE_FRAME, Pump};
use crate::memory::MemView;
use crate::metrics::{Counter, PairCounters};
use crate::virtqueue::iovec::IOV_MAX;
use crate::virtqueue::{ChainFault, GuestIovecs, Queue, RingBroken, Shape};

/// Everything that one direction from the guest needs besides its queue.
pub struct Tx {
    iovecs: GuestIovecs,
    rules: TxRules,
    /// For a frame in more pieces than one call takes.
    bounce: Box<[u8]>,
}

/// What became of one chain.
enum Outcome {
    Sent(usize),
    Dropped(fn(&PairCounters) -> &Counter),
    /// The device takes nothing now; the chain stays.
    Blocked,
    Lost,
}

impl Tx {
    /// A direction for a guest that acknowledged `features`, whose memory is `mem`.
    pub fn new(mem: Arc<MemView>, features: u64) -> Tx {
        Tx {
            iovecs: GuestIovecs::new(mem, IOV_MAX + 1),
            rules: TxRules::of(features),
            bounce: vec![0; HEADER_LEN + FRAME_MAX].into_boxed_slice(),
        }
    }

    /// Carries on with another view of memory.
    pub fn relocate(&mut self, mem: Arc<MemView>) {
        self.iovecs = GuestIovecs::new(mem, IOV_MAX + 1);
    }

    /// Sends up to `budget` frames.
    ///
    /// # Errors
    /// [`RingBroken`]; what was completed before is still to be published.
    pub fn pump(
        &mut self,
        queue: &mut Queue,
        device: BorrowedFd<'_>,
        counters: &PairCounters,
        budget: usize,
    ) -> Result<Pump, RingBroken> {
        for _ in 0..budget {
            self.iovecs.truncate(0);
            let Some(popped) = queue.pop(&mut self.iovecs)? else { return Ok(Pump::Drained) };
            match self.send(popped.chain, device) {
                Outcome::Sent(len) => count_sent(counters, len),
                Outcome::Dropped(reason) => reason(counters).add(1),
                Outcome::Blocked => {
                    queue.rewind(popped.head);
                    return Ok(Pump::DeviceBlocked);
                }
                Outcome::Lost => {
                    queue.rewind(popped.head);
                    return Ok(Pump::DeviceLost);
                }
            }
            queue.push_used(popped.head, 0);
        }
        Ok(Pump::BudgetSpent)
    }

    /// Completes up to `budget` chains without sending them: a disabled ring's frames are discarded.
    ///
    /// # Errors
    /// [`RingBroken`].
    pub fn discard(&mut self, queue: &mut Queue, counters: &PairCounters, budget: usize) -> Result<Pump, RingBroken> {
        for _ in 0..budget {
            self.iovecs.truncate(0);
            let Some(popped) = queue.pop(&mut self.iovecs)? else { return Ok(Pump::Drained) };
            counters.tx_drop_disabled.add(1);
            queue.push_used(popped.head, 0);
        }
        Ok(Pump::BudgetSpent)
    }

    fn send(&mut self, chain: Result<Shape, ChainFault>, device: BorrowedFd<'_>) -> Outcome {
        let Ok(chain) = chain.and_then(Shape::only_readable) else {
            return Outcome::Dropped(|c| &c.tx_drop_bad_chain);
        };
        let len = chain.readable_len as usize;
        if !(HEADER_LEN + ETH_HEADER..=HEADER_LEN + FRAME_MAX).contains(&len) {
            return Outcome::Dropped(|c| &c.tx_drop_bad_length);
        }
        let mut start = [0; HEADER_LEN + PROTOCOL_HEADERS_MAX];
        let Some(private) = self.checked_start(chain, len, &mut start) else {
            return Outcome::Dropped(|c| &c.tx_drop_bad_header);
        };
        let start = start.get(..private).unwrap_or_default();
        let mut sent = self.write(chain, start, device);
        if sent.as_ref().is_err_and(is_passing) {
            sent = self.write(chain, start, device);
        }
        sent.map_or_else(|error| after_write_error(&error), |_| Outcome::Sent(len - HEADER_LEN))
    }

    /// Puts the header to send, and for a segmentation request the protocol headers behind it, into `start`; tells how
    /// many bytes of the chain are to be sent from there.
    fn checked_start(
        &self,
        chain: Shape,
        len: usize,
        start: &mut [u8; HEADER_LEN + PROTOCOL_HEADERS_MAX],
    ) -> Option<usize> {
        let (head, frame) = start.split_first_chunk_mut::<HEADER_LEN>()?;
        self.iovecs.copy_to(chain.readable(), 0, head);
        let header = VnetHeader::from_bytes(head);
        let copied = if header.is_gso() { self.iovecs.copy_to(chain.readable(), HEADER_LEN, frame) } else { 0 };
        let checked = self.rules.check(header, len - HEADER_LEN, frame.get(..copied)?).ok()?;
        *head = checked.header.to_bytes();
        Some(HEADER_LEN + checked.protocol_headers)
    }

    /// Writes `start` in place of as many bytes of the chain, and the rest of it.
    fn write(&mut self, chain: Shape, start: &[u8], device: BorrowedFd<'_>) -> io::Result<usize> {
        let pieces = chain.readable();
        if pieces.len() < IOV_MAX {
            return self.iovecs.writev(device, start, pieces, start.len());
        }
        let (head, rest) = self.bounce.split_at_mut(start.len());
        head.copy_from_slice(start);
        let copied = self.iovecs.copy_to(pieces, start.len(), rest);
        let whole = self.bounce.get(..start.len() + copied).unwrap_or_default();
        self.iovecs.writev(device, whole, 0..0, 0)
    }
}

/// Whether it may work the next moment: memory is short, or a signal came.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM | libc::EINTR))
}

/// What follows from the kernel's refusal: the one place where that is decided.
fn after_write_error(error: &io::Error) -> Outcome {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Outcome::Blocked,
        Some(libc::EBADFD | libc::ENXIO | libc::EPIPE | libc::ECONNRESET) => Outcome::Lost,
        Some(libc::EIO) => Outcome::Dropped(|c| &c.tx_drop_link_down),
        Some(libc::ENOBUFS | libc::ENOMEM) => Outcome::Dropped(|c| &c.tx_drop_no_memory),
        _ => Outcome::Dropped(|c| &c.tx_drop_refused),
    }
}

fn count_sent(counters: &PairCounters, len: usize) {
    counters.tx_frames.add(1);
    counters.tx_bytes.add(len as u64);
    if len > LARGE_FRAME {
        counters.tx_large_frames.add(1);
    }
}
