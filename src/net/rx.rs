//! Frames from the device to the guest.
//!
//! Theory of operation. Buffers are popped into a window ([`Window`]) before frames are read: as many as recent frames
//! needed. A frame takes one of two ways into them:
//!
//! * **direct**: a read scatters the frame straight into the window's buffers, its header into private memory before
//!   them, and what does not fit into private memory behind them (without which the kernel would truncate the frame
//!   silently). Buffers that a frame does not use stay in the window for the next one;
//! * **staged**: several small frames are read into private memory in one batch, the [`Backlog`], and copied from there.
//!
//! ```text
//!   direct:  [our header][buffer][buffer][buffer][ ... our private memory ... ]
//!              12 bytes   └────── window ───────┘  normally untouched
//! ```
//!
//! A direct frame that reached into the private memory is put together there and joins the backlog, too. The backlog is
//! delivered before anything is read, as soon as the guest has buffers, so nothing is reordered or lost. It survives a
//! restart of the ring.
//!
//! The device also gives frames that the guest did not negotiate, such as datagrams to be segmented. They are finished in
//! the backlog (`segment`): completed in place, or delivered segment by segment. While such frames come, all are staged.
//!
//! A malformed chain is returned unused. If it is among the buffers that one frame needs, those before it are returned
//! unused too, before anything is written: the used entries of a frame must follow each other. That ends the pass,
//! since it may have cost thousands of descriptors, and may happen again at once.

use std::collections::VecDeque;
use std::sync::Arc;

use super::backlog::{Backlog, after_failed_read};
use super::features::MRG_RXBUF;
use super::finish::{Finish, Verdict, finish, judge};
use super::frame::Reason;
use super::framing::Framing;
use super::header::{HEADER_LEN, PROTOCOL_HEADERS_MAX};
use super::ip_link::Answer;
use super::segment::Plan;
use super::window::{Filled, Room, Window};
use super::{BUDGET, ETH_HEADER, FRAME_MAX, LARGE_FRAME, Pump, Uplink};
use crate::device::errno::classify_read;
use crate::device::{DeviceQueue, VlanTag};
use crate::memory::MemView;
use crate::metrics::PairCounters;
use crate::virtqueue::{Queue, RingBroken};

pub use super::backlog::HeldFrame;
pub use super::finish::Admission;

/// The smallest window: a frame of the usual MTU.
const EXPECT_MIN: usize = HEADER_LEN + 2048;
/// A pass ends once it delivered so many bytes. So it has few frames if they are large, and the guest gets used
/// buffers, and gives new ones, while more are read.
const BYTES_BUDGET: u64 = 128 << 10;
/// After so many frames the window is fitted to the largest of them.
const EXPECT_PERIOD: u32 = 1024;
/// Frames up to this length are cheaper to copy than to read one by one.
const STAGED_MAX: usize = 4096;
/// After so many frames that needed no finishing, frames are read straight into the guest's buffers again.
const UNFINISHED_PERIOD: u32 = 64;
/// The most answers of the gateway that wait.
const ANSWERS_MAX: usize = 16;

/// Everything that one direction to the guest needs besides its queue.
pub struct Rx {
    window: Window,
    admission: Admission,
    expect: Expect,
    backlog: Backlog,
    /// How many frames the device seems to have ready.
    ready: usize,
    /// Whether the backlog's oldest frame is counted as held.
    held: bool,
    /// How the backlog's oldest frame is cut, if it has to be.
    cut: Option<Plan>,
    framing: Framing,
    /// Frames of the gateway for the guest.
    answers: VecDeque<Answer>,
    /// The headers of a segment, from the virtio-net header on; or the start of a frame that is read.
    headers: Box<[u8; HEADER_LEN + PROTOCOL_HEADERS_MAX]>,
    /// How many more frames without need of finishing have to come until unfinished ones are no longer expected.
    unfinished: u32,
    /// The length of the last frame that was read.
    last_len: usize,
}

/// A frame that was read straight into the window.
struct Direct {
    /// Its bytes, without the virtio-net header.
    len: usize,
    /// How many of the first bytes, the header included, are in [`Rx::headers`] and not in the guest's buffers.
    start_len: usize,
    /// How many bytes fit the guest's buffers, the header included.
    fits: usize,
    /// A VLAN tag that has yet to be inserted.
    tag: Option<VlanTag>,
}

/// The result of one step of the pump.
enum Step {
    Delivered,
    /// Nothing was delivered; the next step may do so.
    Again,
    /// Nothing was delivered, and this counter says why.
    Counted(Reason),
    End(Pump),
}

impl Rx {
    /// Starts the direction from `uplink` to a guest that acknowledged `features` and whose memory is `mem`. The frames
    /// in `left` are delivered first.
    pub fn new(
        mem: Arc<MemView>,
        features: u64,
        admission: Admission,
        uplink: &Uplink<'_>,
        left: Vec<HeldFrame>,
    ) -> Rx {
        Rx {
            window: Window::new(mem, features & MRG_RXBUF != 0),
            admission,
            expect: Expect::default(),
            backlog: Backlog::new(uplink, left),
            ready: 0,
            held: false,
            cut: None,
            framing: uplink.framing.clone(),
            answers: VecDeque::with_capacity(ANSWERS_MAX),
            headers: Box::new([0; HEADER_LEN + PROTOCOL_HEADERS_MAX]),
            unfinished: 0,
            last_len: 0,
        }
    }

    /// Queues a frame of the gateway for the guest.
    pub fn answer(&mut self, answer: Answer, counters: &PairCounters) {
        say(&mut self.answers, answer, counters);
    }

    /// Ends this direction and returns the frames that could not be delivered.
    pub fn into_held_frames(self) -> Vec<HeldFrame> {
        self.backlog.into_held()
    }

    /// Drops the frames that could not be delivered yet.
    pub fn discard(&mut self, counters: &PairCounters) {
        while !self.backlog.is_empty() {
            self.forget_front();
            counters.rx_drop_disabled.add(1);
        }
    }

    /// Carries on with another view of memory; `queue` gets back the buffers that were popped ahead.
    pub fn relocate(&mut self, queue: &mut Queue, mem: Arc<MemView>) {
        self.window.give_back(queue);
        self.window = Window::new(mem, self.window.mergeable());
    }

    /// Changes which frames pass.
    pub fn set_admission(&mut self, admission: Admission) {
        self.admission = admission;
        self.cut = None;
    }

    /// Whether there are popped buffers without a frame.
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
        // How the last batch ended. This holds for this pass only: the device may have frames again before the next.
        let mut end = None;
        let before = counters.rx_bytes.get();
        for _ in 0..BUDGET {
            if counters.rx_bytes.get().wrapping_sub(before) >= BYTES_BUDGET {
                break;
            }
            let step = if !self.backlog.is_empty() {
                self.deliver(queue, counters)?
            } else if let Some(answer) = self.answers.pop_front() {
                self.backlog.put(&answer);
                Step::Again
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

    /// Reads from the device: one frame straight into the window, or several into the backlog.
    fn receive(
        &mut self,
        queue: &mut Queue,
        device: &DeviceQueue,
        counters: &PairCounters,
        end: &mut Option<Pump>,
    ) -> Result<Step, RingBroken> {
        let need = if self.unfinished > 0 { EXPECT_MIN } else { self.expect.now };
        let room = match self.window.fill(queue, need, 0, counters)? {
            Filled::Bytes(0) => return Ok(Step::End(Pump::NoBuffers)),
            Filled::Bytes(room) => room,
            Filled::ReturnedUnused => return Ok(Step::End(Pump::BudgetSpent)),
        };
        // No more frames than there seem to be, and than there are buffers for.
        let count = self.ready.min(self.window.chains() + queue.entries_seen()).min(self.backlog.slots());
        let small = self.expect.now.max(self.last_len) <= STAGED_MAX;
        // If the ring's last buffers may be too small for a large frame, it is better not read half into them.
        let is_short = self.window.mergeable() && room < need && !small;
        if self.unfinished == 0 && !is_short && !(small && self.backlog.batches(count)) {
            return Ok(self.receive_one(queue, device, counters));
        }
        // Large frames are read one at a time, so that they stay in the cache.
        let asked = if small { count.max(1) } else { 1 };
        let (came, ended) = self.backlog.read(device, asked, counters);
        self.ready = if came == asked { 2 * asked } else { came };
        *end = ended;
        let Rx { framing, backlog, answers, .. } = self;
        ask_for_guest(framing, backlog.front().unwrap_or_default(), answers, counters);
        Ok(Step::Again)
    }

    /// Reads one frame straight into the window, and delivers it from there if it can stay.
    fn receive_one(&mut self, queue: &mut Queue, device: &DeviceQueue, counters: &PairCounters) -> Step {
        let frame = match self.read_into_window(device, counters) {
            Ok(frame) => frame,
            Err(step) => return step,
        };
        if let Some(tag) = frame.tag {
            self.keep(&frame);
            if self.backlog.put_tag(tag) {
                return Step::Again;
            }
            self.backlog.pop();
            return Step::Counted(|c| &c.rx_drop_too_large);
        }
        if HEADER_LEN + frame.len > frame.fits {
            self.keep(&frame);
            self.held = true;
            self.expect.note(HEADER_LEN + frame.len);
            return Step::Counted(|c| &c.rx_held);
        }
        self.admit(&frame, queue, counters)
    }

    /// Reads one frame into the window's buffers, and what does not fit into the backlog's spill. An error is the
    /// result of the step when no frame is left to deliver.
    #[inline]
    fn read_into_window(&mut self, device: &DeviceQueue, counters: &PairCounters) -> Result<Direct, Step> {
        let Rx { window, backlog, headers, framing, answers, .. } = self;
        let (omitted, start_len) = (framing.omitted(), framing.private_len());
        let fits = window.read_room();
        let place = headers.get_mut(omitted..start_len).unwrap_or_default();
        let mut tag = None;
        let read = window.read(device, (place, start_len), backlog.spill(), &mut tag);
        let len = match classify_read(read) {
            Ok(len) if len + omitted >= HEADER_LEN + ETH_HEADER => len + omitted - HEADER_LEN,
            Ok(_) => return Err(Step::Counted(|c| &c.rx_drop_short)),
            Err(failure) => {
                self.ready = 0;
                return Err(after_failed_read(failure, counters).map_or(Step::Again, Step::End));
            }
        };
        self.ready = self.ready.saturating_add(1);
        self.last_len = len;
        if len > FRAME_MAX {
            return Err(Step::Counted(|c| &c.rx_drop_too_large));
        }
        let start_len = start_len.min(HEADER_LEN + len);
        let start = headers.get_mut(..start_len).unwrap_or_default();
        if !framing.enclose(start) {
            return Err(Step::Counted(|c| &c.rx_drop_short));
        }
        ask_for_guest(framing, start, answers, counters);
        Ok(Direct { len, start_len, fits, tag })
    }

    /// Moves a frame that cannot be delivered from the window to the backlog, in private memory.
    fn keep(&mut self, frame: &Direct) {
        let Rx { window, backlog, headers, .. } = self;
        let start = headers.get(..frame.start_len).unwrap_or_default();
        let Some((header, start)) = start.split_first_chunk() else { return };
        // How many of the frame's bytes lie before the spill.
        let room = frame.fits.max(frame.start_len) - HEADER_LEN;
        backlog.put_together(header, frame.len, room, |out| copy_start(window, start, out));
    }

    /// Delivers a frame from where it was read, if the guest may have it as it is.
    #[inline]
    fn admit(&mut self, frame: &Direct, queue: &mut Queue, counters: &PairCounters) -> Step {
        let Rx { window, headers, admission, .. } = self;
        let start = headers.get_mut(..frame.start_len).unwrap_or_default();
        let Some((header, rest)) = start.split_first_chunk_mut() else { return Step::Counted(|c| &c.rx_drop_short) };
        let verdict = judge(header, frame.len, admission, |out| copy_start(window, rest, out));
        if let Ok(Verdict::Unfinished) = verdict {
            self.keep(frame);
            return Step::Again;
        }
        self.expect.note(HEADER_LEN + frame.len);
        if let Err(reason) = verdict {
            return Step::Counted(reason);
        }
        window.complete(queue, start, frame.len);
        count_delivered(counters, frame.len);
        Step::Delivered
    }

    /// Copies the backlog's oldest frame, or its next segment, into buffers if there are enough.
    #[inline]
    fn deliver(&mut self, queue: &mut Queue, counters: &PairCounters) -> Result<Step, RingBroken> {
        if let Some(plan) = self.cut {
            return self.deliver_segment(plan, queue, counters);
        }
        let Rx { backlog, window, admission, unfinished, last_len, expect, .. } = self;
        let ahead = backlog.len();
        let was_cut = backlog.delivered().is_some_and(|delivered| *delivered > 0);
        let Some(frame) = backlog.front() else { return Ok(Step::Again) };
        let len = frame.len();
        *last_len = len.saturating_sub(HEADER_LEN);
        let finished = finish(frame, admission);
        match finished {
            Ok(Finish::Nothing) => *unfinished = unfinished.saturating_sub(1),
            Ok(Finish::Done | Finish::Cut(_)) => *unfinished = UNFINISHED_PERIOD,
            Err(_) => {}
        }
        let reason: Reason = match finished {
            Ok(Finish::Cut(plan)) => {
                self.cut = Some(plan);
                return self.deliver_segment(plan, queue, counters);
            }
            // Some of its segments were delivered before the guest changed its offloads: the whole frame must not
            // follow.
            Ok(_) if was_cut => |c| &c.rx_drop_not_negotiated,
            Ok(_) => match window.make_room(queue, len, ahead, counters)? {
                Room::There => {
                    window.deliver(queue, frame, &[]);
                    count_delivered(counters, *last_len);
                    expect.note(len);
                    self.forget_front();
                    return Ok(Step::Delivered);
                }
                Room::LookAgain => return Ok(Step::End(Pump::BudgetSpent)),
                Room::NotYet => return Ok(self.wait_for_buffers(counters)),
                Room::Never => |c| &c.rx_drop_too_large,
            },
            Err(reason) => reason,
        };
        self.forget_front();
        Ok(Step::Counted(reason))
    }

    /// Delivers the next segment of the backlog's oldest frame.
    fn deliver_segment(&mut self, plan: Plan, queue: &mut Queue, counters: &PairCounters) -> Result<Step, RingBroken> {
        let index = self.backlog.delivered().map_or(0, |delivered| *delivered);
        let Some(bytes) = self.backlog.front() else { return Ok(Step::Again) };
        let frame = bytes.get(HEADER_LEN..).unwrap_or_default();
        let place = self.headers.get_mut(HEADER_LEN..).unwrap_or_default();
        let Some(piece) = plan.segment(frame, index, place) else {
            self.forget_front();
            return Ok(Step::Counted(|c| &c.rx_segmented_frames));
        };
        let headers_len = HEADER_LEN + piece.headers_len;
        let step = match self.window.make_room(queue, headers_len + piece.payload.len(), 0, counters)? {
            Room::LookAgain => return Ok(Step::End(Pump::BudgetSpent)),
            Room::NotYet => return Ok(self.wait_for_buffers(counters)),
            Room::Never => Step::Counted(|c| &c.rx_drop_too_large),
            Room::There => Step::Delivered,
        };
        if let Step::Delivered = step
            && let Some(bytes) = self.backlog.front()
            && let Some(payload) = bytes.get(HEADER_LEN + piece.payload.start..HEADER_LEN + piece.payload.end)
            && let Some(headers) = self.headers.get_mut(..headers_len)
            && let Some(place) = headers.first_chunk_mut()
        {
            *place = piece.header.to_bytes();
            let len = headers_len + payload.len();
            self.window.deliver(queue, headers, payload);
            count_delivered(counters, len - HEADER_LEN);
            counters.rx_segments.add(1);
            self.expect.note(len);
        }
        self.backlog.delivered().into_iter().for_each(|delivered| *delivered = index + 1);
        Ok(step)
    }

    fn wait_for_buffers(&mut self, counters: &PairCounters) -> Step {
        if !std::mem::replace(&mut self.held, true) {
            counters.rx_held.add(1);
        }
        Step::End(Pump::NoBuffers)
    }

    fn forget_front(&mut self) {
        self.backlog.pop();
        self.held = false;
        self.cut = None;
    }
}

/// Copies the first bytes of the frame that was just read into `window`, except that `start` is not in there.
fn copy_start(window: &Window, start: &[u8], out: &mut [u8]) {
    window.copy_frame_to(out);
    out.iter_mut().zip(start).for_each(|(to, from)| *to = *from);
}

/// Has the gateway ask for the guest's MAC address if that is unknown and this is a packet for the guest. `bytes` are
/// the start of the frame, with its virtio-net header.
#[inline]
fn ask_for_guest(framing: &Framing, bytes: &[u8], answers: &mut VecDeque<Answer>, counters: &PairCounters) {
    let Some(link) = framing.link() else { return };
    let question = bytes.get(HEADER_LEN..).and_then(|frame| link.question(frame));
    question.into_iter().for_each(|question| say(answers, question, counters));
}

/// Queues a frame of the gateway for the guest, if not too many wait.
fn say(answers: &mut VecDeque<Answer>, answer: Answer, counters: &PairCounters) {
    if answers.len() < ANSWERS_MAX {
        answers.push_back(answer);
        counters.rx_neighbour_answers.add(1);
    } else {
        counters.rx_drop_answers.add(1);
    }
}

fn count_delivered(counters: &PairCounters, len: usize) {
    counters.rx_frames.add(1);
    counters.rx_bytes.add(len as u64);
    if len > LARGE_FRAME {
        counters.rx_large_frames.add(1);
    }
}

/// How large a window recent frames need.
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
