//! Frames from the device to the guest.
//!
//! Theory of operation. Buffers are popped ahead of frames into a window ([`Window`]), enough for the frames that come
//! at present. A frame takes one of two ways into them:
//!
//! * **direct**: a read scatters the frame straight into the window's buffers, its header into memory of ours before
//!   them, and what does not fit into private memory behind them (without it the kernel would cut the frame without a
//!   word). Buffers that a frame does not use stay in the window for the next one;
//! * **staged**: several small frames are read into private memory in one batch, the [`Backlog`], and copied from there.
//!
//! ```text
//!   direct:  [our header][buffer][buffer][buffer][ ... our private memory ... ]
//!              12 bytes   └────── window ───────┘  normally untouched
//! ```
//!
//! A direct frame that reached into the private memory is put together there and joins the backlog, too. The backlog is
//! delivered before anything is read, as soon as the guest has buffers, so nothing is reordered or lost. It stays over a
//! restart of the ring.
//!
//! A malformed chain is returned unused. In the middle of buffers that one frame needs it cannot be: a frame's used
//! entries follow each other. Then the buffers before it are returned unused too, before anything is written.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::backlog::{Backlog, after_read_error};
use super::features::{GuestOffloads, MRG_RXBUF};
use super::filter::RxFilter;
use super::header::{HEADER_LEN, VnetHeader, check_rx};
use super::window::{Filled, Need, Window};
use super::{BUDGET, ETH_HEADER, FRAME_MAX, LARGE_FRAME, Pump};
use crate::device::{DeviceQueue, Io};
use crate::memory::MemView;
use crate::metrics::{Counter, PairCounters};
use crate::virtqueue::{Queue, RingBroken};

pub use super::backlog::HeldFrame;

/// The window's bytes at the least: a frame of the usual MTU.
const EXPECT_MIN: usize = HEADER_LEN + 2048;
/// After how many frames the window is fitted to the largest of them.
const EXPECT_PERIOD: u32 = 1024;
/// Frames up to this length are cheaper to copy than to read one by one.
const STAGED_MAX: usize = 4096;
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
    backlog: Backlog,
    /// How many frames the device seems to have ready.
    ready: usize,
    /// Whether the backlog's oldest frame is counted as held.
    held: bool,
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
    /// A direction from `device` for a guest that acknowledged `features`, whose memory is `mem`; `left` is delivered
    /// first.
    pub fn new(
        mem: Arc<MemView>,
        features: u64,
        admission: Admission,
        (device, io): (&DeviceQueue, Io),
        left: Vec<HeldFrame>,
    ) -> Rx {
        Rx {
            window: Window::new(mem),
            mergeable: features & MRG_RXBUF != 0,
            admission,
            expect: Expect::default(),
            backlog: Backlog::new(device, io, left),
            ready: 0,
            held: false,
        }
    }

    /// Ends this direction, with the frames that could not be delivered.
    pub fn into_held_frames(self) -> Vec<HeldFrame> {
        self.backlog.into_held()
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

    /// Delivers up to [`BUDGET`] frames.
    ///
    /// # Errors
    /// [`RingBroken`]; what was completed before is still to be published.
    pub fn pump(
        &mut self,
        queue: &mut Queue,
        device: &DeviceQueue,
        counters: &PairCounters,
    ) -> Result<Pump, RingBroken> {
        // How the last batch ended. It holds for this pass alone: the device may say otherwise before the next.
        let mut end = None;
        for _ in 0..BUDGET {
            let step = if !self.backlog.is_empty() {
                self.deliver(queue, counters)?
            } else if let Some(end) = end {
                Step::End(end)
            } else {
                self.receive(queue, device, counters, &mut end)?
            };
            match step {
                Step::Delivered | Step::Again => {}
                Step::Counted(reason) => reason(counters).add(1),
                Step::End(pump) => return Ok(pump),
            }
        }
        Ok(Pump::BudgetSpent)
    }

    /// Reads from the device, by the way that fits.
    fn receive(
        &mut self,
        queue: &mut Queue,
        device: &DeviceQueue,
        counters: &PairCounters,
        end: &mut Option<Pump>,
    ) -> Result<Step, RingBroken> {
        let need = self.need(self.expect.now);
        match self.window.fill(queue, need, counters)? {
            Filled::Bytes(0) => return Ok(Step::End(Pump::NoBuffers)),
            Filled::Bytes(_) => {}
            Filled::ReturnedUnused => return Ok(Step::Again),
        }
        // No more frames than there seem to be, and than there are buffers for.
        let count = self.ready.min(self.window.chains() + queue.entries_seen()).min(self.backlog.slots());
        if self.expect.now > STAGED_MAX || !self.backlog.batches(count) {
            return Ok(self.receive_one(queue, device, counters));
        }
        let asked = count.max(1);
        let (came, ended) = self.backlog.read(device, asked, counters);
        self.ready = if came == asked { 2 * asked } else { came };
        *end = ended;
        Ok(Step::Again)
    }

    /// Reads one frame straight into the window.
    fn receive_one(&mut self, queue: &mut Queue, device: &DeviceQueue, counters: &PairCounters) -> Step {
        let room = self.window.read_room() - HEADER_LEN;
        let mut header = [0; HEADER_LEN];
        let len = match self.window.read(device.as_fd(), &mut header, self.backlog.spill()) {
            Ok(len) if len >= HEADER_LEN + ETH_HEADER => len - HEADER_LEN,
            Ok(0) => return Step::End(Pump::DeviceLost),
            Ok(_) => return Step::Counted(|c| &c.rx_drop_short),
            Err(error) => {
                self.ready = 0;
                let error = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                return after_read_error(error, counters).map_or(Step::Again, Step::End);
            }
        };
        self.ready = self.ready.saturating_add(1);
        let header = VnetHeader::from_bytes(&header);
        self.expect.note(HEADER_LEN + len);
        if len > FRAME_MAX {
            return Step::Counted(|c| &c.rx_drop_too_large);
        }
        if len > room {
            self.backlog.put_together(header, len, room, |start| self.window.copy_frame_to(start));
            self.held = true;
            return Step::Counted(|c| &c.rx_held);
        }
        let Ok(header) = check_rx(header, self.admission.offloads) else {
            return Step::Counted(|c| &c.rx_drop_not_negotiated);
        };
        if !self.admission.filter.passes_all() && !self.admission.filter.accepts(&self.window.start_of_frame()) {
            return Step::Counted(|c| &c.rx_drop_filtered);
        }
        self.window.complete(queue, header, len);
        count_delivered(counters, len);
        Step::Delivered
    }

    /// Which buffers a frame of `bytes` with its header needs.
    fn need(&self, bytes: usize) -> Need {
        if self.mergeable {
            Need { bytes, chains: usize::MAX, chain_min: HEADER_LEN }
        } else {
            Need { bytes, chains: 1, chain_min: CHAIN_MIN }
        }
    }

    /// Copies the backlog's oldest frame into buffers, if there are enough by now.
    fn deliver(&mut self, queue: &mut Queue, counters: &PairCounters) -> Result<Step, RingBroken> {
        let Some((header, frame)) = self.backlog.front() else { return Ok(Step::Again) };
        let len = frame.len();
        let step = 'settled: {
            let Ok(header) = check_rx(header, self.admission.offloads) else {
                break 'settled Step::Counted(|c| &c.rx_drop_not_negotiated);
            };
            let start = frame.get(HEADER_LEN..).and_then(<[u8]>::first_chunk);
            if !self.admission.filter.passes_all() && start.is_some_and(|start| !self.admission.filter.accepts(start)) {
                break 'settled Step::Counted(|c| &c.rx_drop_filtered);
            }
            let need = self.need(len);
            let Filled::Bytes(room) = self.window.fill(queue, need, counters)? else { return Ok(Step::Again) };
            if room >= len {
                let Some((_, frame)) = self.backlog.front() else { return Ok(Step::Again) };
                self.window.deliver(queue, header, [frame, &mut []]);
                count_delivered(counters, len - HEADER_LEN);
                break 'settled Step::Delivered;
            }
            // One chain is all that there can be, or all that the ring can hold is there: it never fits.
            if room > 0 && (!self.mergeable || self.window.holds_all_of(queue.size())) {
                break 'settled Step::Counted(|c| &c.rx_drop_too_large);
            }
            if !std::mem::replace(&mut self.held, true) {
                counters.rx_held.add(1);
            }
            return Ok(Step::End(Pump::NoBuffers));
        };
        self.held = false;
        self.expect.note(len);
        self.backlog.pop();
        Ok(step)
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
