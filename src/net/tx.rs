//! Frames from the guest to the device.
//!
//! One pass, in three steps over up to a budget of frames:
//!
//! * **gather**: pop a chain, copy its first bytes to a slot of the stage, check the virtio-net header (and what it says
//!   about the protocol headers) there. A small frame is copied as a whole;
//! * **send**: frames that are wholly on the stage go together, in one batch where that is better; of a large frame the
//!   checked copy and the rest of the chain go in one `writev`, straight from guest memory;
//! * **settle**: complete the chains in their order, or put back those that the device does not take now.
//!
//! What the kernel acts on is our checked copy. Nothing is reordered and nothing is skipped silently: a frame is sent, or
//! counted under one reason. The worker publishes what was completed after the pass.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::header::{HEADER_LEN, PROTOCOL_HEADERS_MAX, TxRules, VnetHeader};
use super::{BUDGET, ETH_HEADER, FRAME_MAX, LARGE_FRAME, Pump};
use crate::device::stage::Stage;
use crate::device::{DeviceQueue, Io};
use crate::memory::MemView;
use crate::metrics::{Counter, PairCounters};
use crate::virtqueue::iovec::{IOV_MAX, Part};
use crate::virtqueue::{GuestIovecs, Head, Popped, Queue, RingBroken, Shape};

/// A frame that fits with its header is copied as a whole: of the usual MTU, with room for tags.
const SLOT_LEN: usize = 2048;
/// What is copied of a larger one.
const START_LEN: usize = HEADER_LEN + PROTOCOL_HEADERS_MAX;

/// Everything that one direction from the guest needs besides its queue.
pub struct Tx {
    iovecs: GuestIovecs,
    rules: TxRules,
    /// Slot n belongs to frame n of the pass.
    stage: Stage,
    /// The frames of this pass, oldest first.
    frames: Vec<Frame>,
    /// For a frame in more pieces than one call takes.
    bounce: Box<[u8]>,
}

/// One popped chain.
struct Frame {
    head: Head,
    /// Bytes, virtio-net header included.
    len: usize,
    /// How many of them are on the stage.
    staged: usize,
    pieces: Range<usize>,
    fate: Fate,
}

/// What became of one chain, or will.
#[derive(Clone, Copy)]
enum Fate {
    ToSend,
    Sent,
    Dropped(Reason),
}

type Reason = fn(&PairCounters) -> &Counter;

impl Tx {
    /// A direction to `device` for a guest that acknowledged `features`, whose memory is `mem`.
    pub fn new(mem: Arc<MemView>, features: u64, device: &DeviceQueue, io: Io) -> Tx {
        Tx {
            iovecs: iovecs(mem),
            rules: TxRules::of(features),
            stage: Stage::new(device, io, BUDGET, SLOT_LEN),
            frames: Vec::with_capacity(BUDGET),
            bounce: vec![0; HEADER_LEN + FRAME_MAX].into_boxed_slice(),
        }
    }

    /// Carries on with another view of memory.
    pub fn relocate(&mut self, mem: Arc<MemView>) {
        self.iovecs = iovecs(mem);
    }

    /// Sends up to [`BUDGET`] frames.
    ///
    /// # Errors
    /// [`RingBroken`]; what was completed before is still to be published.
    pub fn pump(
        &mut self,
        queue: &mut Queue,
        device: &DeviceQueue,
        counters: &PairCounters,
    ) -> Result<Pump, RingBroken> {
        let gathered = self.gather(queue);
        let stopped = self.send(device);
        self.settle(queue, counters);
        let end = gathered?;
        Ok(stopped.unwrap_or(end))
    }

    /// Completes up to [`BUDGET`] chains without sending them: a disabled ring's frames are discarded.
    ///
    /// # Errors
    /// [`RingBroken`].
    pub fn discard(&mut self, queue: &mut Queue, counters: &PairCounters) -> Result<Pump, RingBroken> {
        for _ in 0..BUDGET {
            self.iovecs.truncate(0);
            let Some(popped) = queue.pop(&mut self.iovecs)? else { return Ok(Pump::Drained) };
            counters.tx_drop_disabled.add(1);
            queue.push_used(popped.head, 0);
        }
        Ok(Pump::BudgetSpent)
    }
}

/// A pass ends once it has [`IOV_MAX`] pieces; the last chain may bring as many again.
fn iovecs(mem: Arc<MemView>) -> GuestIovecs {
    GuestIovecs::new(mem, 2 * IOV_MAX + 1)
}

/// Gathering.
impl Tx {
    fn gather(&mut self, queue: &mut Queue) -> Result<Pump, RingBroken> {
        self.iovecs.truncate(0);
        while self.frames.len() < BUDGET && self.iovecs.len() < IOV_MAX {
            let Some(popped) = queue.pop(&mut self.iovecs)? else { return Ok(Pump::Drained) };
            let frame = self.examine(popped);
            self.frames.push(frame);
        }
        Ok(Pump::BudgetSpent)
    }

    /// Checks one chain, its start on the stage.
    #[inline]
    fn examine(&mut self, Popped { head, chain }: Popped) -> Frame {
        let dropped = |head, reason| Frame { head, len: 0, staged: 0, pieces: 0..0, fate: Fate::Dropped(reason) };
        let Ok(chain) = chain.and_then(Shape::only_readable) else {
            return dropped(head, |c| &c.tx_drop_bad_chain);
        };
        let len = chain.readable_len as usize;
        if !(HEADER_LEN + ETH_HEADER..=HEADER_LEN + FRAME_MAX).contains(&len) {
            return dropped(head, |c| &c.tx_drop_bad_length);
        }
        let Some(staged) = self.stage_start(chain, len) else {
            return dropped(head, |c| &c.tx_drop_bad_header);
        };
        Frame { head, len, staged, pieces: chain.readable(), fate: Fate::ToSend }
    }

    /// Copies the start of a frame to its slot, or all of a small one, and checks the header there; tells how much is
    /// there now. `None` if the header asks for what it may not.
    #[inline]
    fn stage_start(&mut self, chain: Shape, len: usize) -> Option<usize> {
        let wanted = if len <= SLOT_LEN { len } else { START_LEN };
        let slot = self.stage.slot_mut(self.frames.len()).get_mut(..wanted)?;
        let staged = self.iovecs.copy_to(chain.readable(), 0, slot);
        let (head, frame) = slot.split_first_chunk_mut::<HEADER_LEN>()?;
        let start = frame.get(..staged.checked_sub(HEADER_LEN)?.min(PROTOCOL_HEADERS_MAX))?;
        let checked = self.rules.check(VnetHeader::from_bytes(head), len - HEADER_LEN, start).ok()?;
        *head = checked.header.to_bytes();
        Some(staged)
    }
}

/// Sending.
impl Tx {
    /// Sends what was gathered, in order; tells why it stopped, if before the end.
    fn send(&mut self, device: &DeviceQueue) -> Option<Pump> {
        let mut at = 0;
        while let Some(frame) = self.frames.get(at) {
            let stopped = match frame.fate {
                Fate::ToSend if frame.staged < frame.len => self.send_gathered(&mut at, device),
                _ => self.send_staged(&mut at, device),
            };
            if stopped.is_some() {
                return stopped;
            }
        }
        None
    }

    /// Sends the frames from `at` on that are wholly on the stage.
    fn send_staged(&mut self, at: &mut usize, device: &DeviceQueue) -> Option<Pump> {
        self.stage.clear();
        for frame in self.frames.get(*at..).unwrap_or_default() {
            match frame.fate {
                Fate::ToSend if frame.staged < frame.len => break,
                Fate::ToSend => self.stage.add(*at, frame.len),
                Fate::Sent | Fate::Dropped(_) => {}
            }
            *at += 1;
        }
        self.stage.write(device);
        for (slot, result) in self.stage.results() {
            match fate(result) {
                Ok(fate) => self.frames.get_mut(slot).into_iter().for_each(|frame| frame.fate = fate),
                Err(stopped) => return Some(stopped),
            }
        }
        None
    }

    /// Sends frame `at` from the stage and from guest memory.
    fn send_gathered(&mut self, at: &mut usize, device: &DeviceQueue) -> Option<Pump> {
        let mut sent = self.write(*at, device);
        if sent.is_err_and(is_passing) {
            sent = self.write(*at, device);
        }
        match fate(sent) {
            Ok(fate) => self.frames.get_mut(*at).into_iter().for_each(|frame| frame.fate = fate),
            Err(stopped) => return Some(stopped),
        }
        *at += 1;
        None
    }

    /// Writes what is on the stage of frame `at` and the rest of its chain.
    fn write(&mut self, at: usize, device: &DeviceQueue) -> Result<usize, Errno> {
        let Some(Frame { pieces, staged, .. }) = self.frames.get(at) else { return Err(Errno::INVAL) };
        let start = self.stage.slot(at).get(..*staged).unwrap_or_default();
        let part = if pieces.len() < IOV_MAX {
            Part { private: start, pieces: pieces.clone(), skip: *staged }
        } else {
            let (head, rest) = self.bounce.split_at_mut_checked(start.len()).ok_or(Errno::INVAL)?;
            head.copy_from_slice(start);
            let copied = self.iovecs.copy_to(pieces.clone(), start.len(), rest);
            Part { private: self.bounce.get(..start.len() + copied).unwrap_or_default(), pieces: 0..0, skip: 0 }
        };
        self.iovecs.writev(device.as_fd(), [part]).map_err(errno)
    }
}

/// Settling.
impl Tx {
    /// Completes what was sent or dropped, in order, and puts back the rest.
    fn settle(&mut self, queue: &mut Queue, counters: &PairCounters) {
        let done = self.frames.iter().take_while(|frame| !matches!(frame.fate, Fate::ToSend)).count();
        self.frames.drain(done..).rev().for_each(|frame| queue.rewind(frame.head));
        let (mut sent, mut bytes, mut large) = (0, 0, 0);
        for frame in self.frames.drain(..) {
            match frame.fate {
                Fate::Dropped(reason) => reason(counters).add(1),
                Fate::Sent | Fate::ToSend => {
                    let len = frame.len - HEADER_LEN;
                    sent += 1;
                    bytes += len as u64;
                    large += u64::from(len > LARGE_FRAME);
                }
            }
            queue.push_used(frame.head, 0);
        }
        counters.tx_frames.add(sent);
        counters.tx_bytes.add(bytes);
        counters.tx_large_frames.add(large);
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Whether it may work the next moment: memory is short, or a signal came.
fn is_passing(error: Errno) -> bool {
    matches!(error, Errno::NOBUFS | Errno::NOMEM | Errno::INTR)
}

/// What follows from the kernel's answer to a frame: the one place where that is decided. An error ends the pass, with
/// the frame to be sent again.
fn fate(result: Result<usize, Errno>) -> Result<Fate, Pump> {
    match result {
        Ok(_) => Ok(Fate::Sent),
        Err(Errno::AGAIN) => Err(Pump::DeviceBlocked),
        Err(Errno::BADFD | Errno::NXIO | Errno::PIPE | Errno::CONNRESET) => Err(Pump::DeviceLost),
        // Not tried, though nothing before it stopped the others: the next pass does.
        Err(Errno::CANCELED) => Err(Pump::BudgetSpent),
        Err(Errno::IO) => Ok(Fate::Dropped(|c| &c.tx_drop_link_down)),
        Err(Errno::NOBUFS | Errno::NOMEM) => Ok(Fate::Dropped(|c| &c.tx_drop_no_memory)),
        Err(_) => Ok(Fate::Dropped(|c| &c.tx_drop_refused)),
    }
}
