//! Frames from the device to the guest.
//!
//! Theory of operation. Buffers are popped ahead of frames into a window ([`Window`]), enough for the frames that come
//! at present; a read scatters the frame straight into the window's buffers, its header into memory of ours before
//! them, and what does not fit into a private buffer behind them (without it the kernel would cut the frame without a
//! word). Buffers that a frame does not use stay in the window for the next one.
//!
//! ```text
//!   readv:  [our header][buffer][buffer][buffer][ ... our private buffer ... ]
//!             12 bytes   └────── window ───────┘  normally untouched
//! ```
//!
//! A frame that reached into the private buffer is put together there ("held"), and from there copied into as many
//! buffers as it needs once the guest has them; it is delivered before any other, so nothing is reordered or lost. It
//! stays held over a restart of the ring.
//!
//! A malformed chain is returned unused. In the middle of buffers that one frame needs it cannot be: a frame's used
//! entries follow each other. Then the buffers before it are returned unused too, before anything is written.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::features::{GuestOffloads, MRG_RXBUF};
use super::filter::RxFilter;
use super::header::{HEADER_LEN, VnetHeader, check_rx};
use super::window::{Filled, Need, Window};
use super::{ETH_HEADER, FRAME_MAX, LARGE_FRAME, Pump};
use crate::memory::MemView;
use crate::metrics::{Counter, PairCounters};
use crate::virtqueue::{Queue, RingBroken};

/// The window's bytes at the least: a frame of the usual MTU.
const EXPECT_MIN: usize = HEADER_LEN + 2048;
/// After how many frames the window is fitted to the largest of them.
const EXPECT_PERIOD: u32 = 1024;
/// Without mergeable buffers a chain must hold the header and the smallest frame, else no frame ever fits it.
const CHAIN_MIN: usize = HEADER_LEN + 60;

/// Which frames may reach the guest.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    /// Unfinished ones of these kinds.
    pub offloads: GuestOffloads,
    /// Those that are for it.
    pub filter: Arc<RxFilter>,
}

/// Everything that one direction to the guest needs besides its queue.
pub struct Rx {
    window: Window,
    mergeable: bool,
    admission: Admission,
    expect: Expect,
    /// Behind the window's buffers in each read; and where a held frame is.
    private: Box<[u8]>,
    held: Option<Held>,
}

/// A frame in `Rx::private` that waits for buffers.
#[derive(Clone, Copy)]
struct Held {
    header: VnetHeader,
    len: usize,
}

/// A frame that waited for buffers when its ring stopped, for the next start.
pub struct HeldFrame {
    header: VnetHeader,
    frame: Vec<u8>,
}

/// What a step of the pump came to.
enum Step {
    Delivered,
    /// Nothing was delivered, for a reason that was seen to.
    Again,
    /// Nothing was delivered, and this counter says why.
    Counted(fn(&PairCounters) -> &Counter),
    End(Pump),
}

impl Rx {
    /// A direction for a guest that acknowledged `features`, whose memory is `mem`; `left` is delivered first.
    pub fn new(mem: Arc<MemView>, features: u64, admission: Admission, left: Option<HeldFrame>) -> Rx {
        // One byte more than any frame has: to fill it is to be cut.
        let mut private = vec![0; FRAME_MAX + 1].into_boxed_slice();
        let held = left.map(|HeldFrame { header, frame }| {
            private.iter_mut().zip(&frame).for_each(|(to, from)| *to = *from);
            Held { header, len: frame.len().min(FRAME_MAX) }
        });
        Rx {
            window: Window::new(mem),
            mergeable: features & MRG_RXBUF != 0,
            admission,
            expect: Expect::default(),
            private,
            held,
        }
    }

    /// Ends this direction, with the frame that could not be delivered, if there is one.
    pub fn into_held_frame(self) -> Option<HeldFrame> {
        let held = self.held?;
        let frame = self.private.get(..held.len)?.to_vec();
        Some(HeldFrame { header: held.header, frame })
    }

    /// Carries on with another view of memory; `queue` gets back the buffers that were popped ahead.
    pub fn relocate(&mut self, queue: &mut Queue, mem: Arc<MemView>) {
        self.window.give_back(queue);
        self.window = Window::new(mem);
    }

    /// Changes which frames pass.
    pub fn set_admission(&mut self, admission: Admission) {
        self.admission = admission;
    }

    /// Whether buffers were popped that no frame is in yet.
    pub fn has_buffers_in_hand(&self) -> bool {
        !self.window.is_empty()
    }

    /// Delivers up to `budget` frames.
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
            let step = match self.held {
                Some(held) => self.deliver_held(held, queue, counters)?,
                None => self.receive(queue, device, counters)?,
            };
            match step {
                Step::Delivered | Step::Again => {}
                Step::Counted(reason) => reason(counters).add(1),
                Step::End(pump) => return Ok(pump),
            }
        }
        Ok(Pump::BudgetSpent)
    }

    /// Reads one frame into the window.
    fn receive(
        &mut self,
        queue: &mut Queue,
        device: BorrowedFd<'_>,
        counters: &PairCounters,
    ) -> Result<Step, RingBroken> {
        let need = self.need(self.expect.now);
        match self.window.fill(queue, need, counters)? {
            Filled::Bytes(0) => return Ok(Step::End(Pump::NoBuffers)),
            Filled::Bytes(_) => {}
            Filled::ReturnedUnused => return Ok(Step::Again),
        }
        let room = self.window.read_room() - HEADER_LEN;
        let mut header = [0; HEADER_LEN];
        let len = match self.window.read(device, &mut header, &mut self.private) {
            Ok(len) if len >= HEADER_LEN + ETH_HEADER => len - HEADER_LEN,
            Ok(0) => return Ok(Step::End(Pump::DeviceLost)),
            Ok(_) => return Ok(Step::Counted(|c| &c.rx_drop_short)),
            Err(error) => return Ok(after_read_error(&error, counters)),
        };
        let header = VnetHeader::from_bytes(&header);
        self.expect.note(HEADER_LEN + len);
        if len > room {
            return Ok(self.hold(header, len, room));
        }
        let Ok(header) = check_rx(header, self.admission.offloads) else {
            return Ok(Step::Counted(|c| &c.rx_drop_not_negotiated));
        };
        if !self.admission.filter.passes_all() && !self.admission.filter.accepts(&self.window.start_of_frame()) {
            return Ok(Step::Counted(|c| &c.rx_drop_filtered));
        }
        self.window.complete(queue, header, len);
        count_delivered(counters, len);
        Ok(Step::Delivered)
    }

    /// Which buffers a frame of `bytes` with its header needs.
    fn need(&self, bytes: usize) -> Need {
        if self.mergeable {
            Need { bytes, chains: usize::MAX, chain_min: HEADER_LEN }
        } else {
            Need { bytes, chains: 1, chain_min: CHAIN_MIN }
        }
    }

    /// Puts together in private memory a frame of which `room` bytes went to the window's buffers.
    fn hold(&mut self, header: VnetHeader, len: usize, room: usize) -> Step {
        if len > FRAME_MAX {
            return Step::Counted(|c| &c.rx_drop_too_large);
        }
        self.private.copy_within(..len - room, room);
        if let Some(first) = self.private.get_mut(..room) {
            self.window.copy_frame_to(first);
        }
        self.held = Some(Held { header, len });
        Step::Counted(|c| &c.rx_held)
    }

    /// Copies the held frame into buffers, if there are enough by now.
    fn deliver_held(&mut self, held: Held, queue: &mut Queue, counters: &PairCounters) -> Result<Step, RingBroken> {
        let need = self.need(HEADER_LEN + held.len);
        let frame = self.private.get(..held.len).unwrap_or_default();
        let step = 'settled: {
            let Ok(header) = check_rx(held.header, self.admission.offloads) else {
                break 'settled Step::Counted(|c| &c.rx_drop_not_negotiated);
            };
            if !self.admission.filter.passes_all()
                && frame.first_chunk().is_some_and(|start| !self.admission.filter.accepts(start))
            {
                break 'settled Step::Counted(|c| &c.rx_drop_filtered);
            }
            let Filled::Bytes(room) = self.window.fill(queue, need, counters)? else { return Ok(Step::Again) };
            if room >= need.bytes {
                self.window.copy_frame_from(frame);
                self.window.complete(queue, header, held.len);
                count_delivered(counters, held.len);
                break 'settled Step::Delivered;
            }
            // One chain is all that there can be, or all that the ring can hold is there: it never fits.
            if room > 0 && (!self.mergeable || self.window.holds_all_of(queue.size())) {
                break 'settled Step::Counted(|c| &c.rx_drop_too_large);
            }
            return Ok(Step::End(Pump::NoBuffers));
        };
        self.held = None;
        Ok(step)
    }
}

/// What follows from the kernel's refusal: the one place where that is decided.
fn after_read_error(error: &io::Error, counters: &PairCounters) -> Step {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Step::End(Pump::Drained),
        Some(libc::EBADFD | libc::ENXIO | libc::ECONNRESET) => Step::End(Pump::DeviceLost),
        // The kernel takes a frame out of its queue before it finds that it cannot be handed over.
        Some(libc::EINVAL | libc::EFAULT) => Step::Counted(|c| &c.rx_drop_refused),
        // Short of memory, before a frame was touched.
        _ => {
            counters.rx_read_errors.add(1);
            Step::End(Pump::TryLater)
        }
    }
}

fn count_delivered(counters: &PairCounters, len: usize) {
    counters.rx_frames.add(1);
    counters.rx_bytes.add(len as u64);
    if len > LARGE_FRAME {
        counters.rx_large_frames.add(1);
    }
}

/// How large a window the frames of late ask for.
struct Expect {
    now: usize,
    largest: usize,
    frames: u32,
}

impl Default for Expect {
    fn default() -> Expect {
        Expect { now: EXPECT_MIN, largest: EXPECT_MIN, frames: 0 }
    }
}

impl Expect {
    /// A larger frame widens the window at once; smaller ones narrow it after a while.
    #[inline]
    fn note(&mut self, bytes: usize) {
        self.largest = self.largest.max(bytes);
        self.now = self.now.max(self.largest);
        self.frames += 1;
        if self.frames == EXPECT_PERIOD {
            *self = Expect { now: self.largest, ..Expect::default() };
        }
    }
}
