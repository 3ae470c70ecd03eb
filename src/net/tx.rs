//! Frames from the guest to the device.
//!
//! One pass, in four steps over up to a budget of frames:
//!
//! * **gather**: pop a chain, copy its first bytes to a slot of the stage, and check the virtio-net header there (and
//!   what it says about the protocol headers);
//! * **arrange**: frames of one flow become a run, which is sent as one frame (`coalesce`); any other small frame is
//!   copied as a whole;
//! * **send**: frames that are wholly on the stage go together, in one batch where that is better. A large frame or a
//!   run goes in one `writev`, straight from guest memory: of a frame, what is on the stage and the rest of its chain;
//!   of a run, the first frame's headers, which are those of the whole, and the payload of all;
//! * **settle**: complete the chains in their order, or put back those that the device does not take now.
//!
//! The kernel acts on our checked copy of the headers. Nothing is reordered and nothing is skipped silently: a frame is
//! sent, or counted under one reason. The worker publishes the completions after the pass.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::coalesce::{Coalesce, Run, Segment};
use super::flow::flow_hint;
use super::frame::{Fate, Frame, fate};
use super::framing::Framing;
use super::header::{HEADER_LEN, HeaderFault, PROTOCOL_HEADERS_MAX, TxRules, VnetHeader};
use super::ip_link::{Answer, Way};
use super::{BUDGET, ETH_HEADER, FRAME_MAX, LARGE_FRAME, Pump, Uplink};
use crate::device::DeviceQueue;
use crate::device::errno::write_patiently;
use crate::device::stage::{Outcome, Slots, Stage};
use crate::mac::Mac;
use crate::memory::MemView;
use crate::metrics::{Counter, PairCounters};
use crate::virtqueue::iovec::{IOV_MAX, Part};
use crate::virtqueue::{Direction, GuestIovecs, Head, Popped, Queue, RingBroken, Shape};

/// The size of a slot. A frame that fits with its header, so one of the usual MTU with room for tags, is copied as a
/// whole. Not a power of two: slots would share few lines of the cache.
const SLOT_LEN: usize = 2048 + 64;
/// How much of a larger frame is copied.
const START_LEN: usize = HEADER_LEN + PROTOCOL_HEADERS_MAX;

/// A pass ends once the host may make this many segments of its frames: as many as of full frames with segments of the
/// usual size. If the operator allows the smallest segments, one frame of those takes the time of thirty.
const SEGMENTS_BUDGET: usize = BUDGET * (FRAME_MAX / LARGE_FRAME);

/// The most answers of the gateway in one pass.
const ANSWERS_MAX: usize = 16;

/// Everything that the direction from the guest needs besides its queue.
pub struct Tx {
    iovecs: GuestIovecs,
    rules: TxRules,
    /// Slot n belongs to frame n of the pass.
    stage: Stage,
    /// The frames of this pass, oldest first.
    frames: Vec<Frame>,
    /// How many segments the host may make of them.
    segments: usize,
    /// The most frames of a pass: [`BUDGET`], or fewer if a stream has filled runs, so that a pass ends with a full run
    /// and the frames of the next full one are not divided between two passes.
    budget: usize,
    coalesce: Coalesce,
    /// Holds a frame in more pieces than one call takes.
    bounce: Box<[u8]>,
    /// The source address without which no answers would come; `None` once a frame had another one.
    expected: Option<Mac>,
    /// That other address, until it is taken.
    unexpected: Option<Mac>,
    /// How many segments the first frame with too many asked for, until that is taken; and whether there was such a
    /// frame.
    too_many: Option<usize>,
    told_of_segments: bool,
    framing: Framing,
    /// The gateway's answers for the guest.
    answers: Vec<Answer>,
}

/// A good chain: its pieces, and their bytes.
struct Chain {
    pieces: Range<usize>,
    len: usize,
}

impl Tx {
    /// Makes a direction to `uplink` for a guest that acknowledged `features`, whose memory is `mem`.
    pub fn new(mem: Arc<MemView>, features: u64, uplink: &Uplink<'_>) -> Tx {
        let Uplink { device, io, rings, coalesce, segment_limit, .. } = *uplink;
        let slots = Slots { count: BUDGET, len: SLOT_LEN, omitted: uplink.framing.omitted() };
        Tx {
            iovecs: iovecs(mem),
            rules: TxRules::of(features, segment_limit),
            stage: Stage::new(device, io, rings, slots),
            frames: Vec::with_capacity(BUDGET),
            segments: 0,
            budget: BUDGET,
            coalesce,
            bounce: vec![0; HEADER_LEN + FRAME_MAX].into_boxed_slice(),
            expected: device.address(),
            unexpected: None,
            too_many: None,
            told_of_segments: false,
            framing: uplink.framing.clone(),
            answers: Vec::with_capacity(ANSWERS_MAX),
        }
    }

    /// Takes the gateway's answers to the guest since the last call.
    #[inline]
    pub fn take_answers(&mut self) -> impl Iterator<Item = Answer> {
        self.answers.drain(..)
    }

    /// Takes the source address of the first frame that had another than the one to which the device's frames come.
    #[inline]
    pub fn take_unexpected_source(&mut self) -> Option<Mac> {
        self.unexpected.take()
    }

    /// Takes the number of segments of the first frame that was dropped because it asked for too many.
    #[inline]
    pub fn take_too_many_segments(&mut self) -> Option<usize> {
        self.too_many.take()
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
        self.arrange();
        let stopped = self.send(device);
        self.settle(queue, counters);
        let end = gathered?;
        Ok(stopped.unwrap_or(end))
    }

    /// Completes up to [`BUDGET`] chains without sending them: a disabled ring's frames are discarded.
    ///
    /// # Errors
    /// [`RingBroken`].
    pub fn discard(&mut self, queue: &mut Queue, reason: &Counter) -> Result<Pump, RingBroken> {
        for _ in 0..BUDGET {
            self.iovecs.truncate(0);
            let Some(popped) = queue.pop(&mut self.iovecs)? else { return Ok(Pump::Drained) };
            reason.add(1);
            queue.push_used(popped.head, 0);
        }
        Ok(Pump::BudgetSpent)
    }
}

/// An empty list of pieces. A pass ends once it has [`IOV_MAX`] pieces; the last chain may bring as many again, and its last
/// buffer one for each region of guest memory.
fn iovecs(mem: Arc<MemView>) -> GuestIovecs {
    GuestIovecs::new(mem, 3 * IOV_MAX)
}

/// Gathering.
impl Tx {
    fn gather(&mut self, queue: &mut Queue) -> Result<Pump, RingBroken> {
        self.iovecs.truncate(0);
        self.segments = 0;
        while self.frames.len() < self.budget && self.iovecs.len() < IOV_MAX && self.segments < SEGMENTS_BUDGET {
            let Some((head, chain)) = self.take_chain(queue)? else { return Ok(Pump::Drained) };
            let frame = self.examine(head, chain);
            self.frames.push(frame);
        }
        Ok(Pump::BudgetSpent)
    }

    /// Takes the next entry: its head, and its chain if that is good.
    #[inline]
    fn take_chain(&mut self, queue: &mut Queue) -> Result<Option<(Head, Option<Chain>)>, RingBroken> {
        let at = self.iovecs.len();
        // A buffer of no bytes does not count.
        if let Some((head, len)) = queue.pop_single((Direction::Readable, 1), &mut self.iovecs) {
            return Ok(Some((head, Some(Chain { pieces: at..at + 1, len: len as usize }))));
        }
        let Some(Popped { head, chain }) = queue.pop(&mut self.iovecs)? else { return Ok(None) };
        let good = chain.and_then(Shape::only_readable).ok();
        Ok(Some((head, good.map(|shape| Chain { pieces: shape.readable(), len: shape.readable_len }))))
    }

    /// Copies the start of one chain to the stage and checks it.
    #[inline]
    fn examine(&mut self, head: Head, chain: Option<Chain>) -> Frame {
        let dropped = |head, reason| Frame::new(head, 0, Fate::Dropped(reason));
        let Some(Chain { pieces, len }) = chain else { return dropped(head, |c| &c.tx_drop_bad_chain) };
        if !(HEADER_LEN + ETH_HEADER..=HEADER_LEN + FRAME_MAX).contains(&len) {
            return dropped(head, |c| &c.tx_drop_bad_length);
        }
        let staged = match self.stage_start(pieces.clone(), len) {
            Ok(staged) => staged,
            Err(HeaderFault::TooManySegments { segments }) => {
                self.tell_of_segments(segments);
                return dropped(head, |c| &c.tx_drop_too_many_segments);
            }
            Err(_) => return dropped(head, |c| &c.tx_drop_bad_header),
        };
        let fate =
            match self.framing.link().map_or(Way::Device, |link| link.way(self.staged(self.frames.len(), staged))) {
                Way::Device => Fate::ToSend,
                Way::Neighbour => Fate::ForGateway,
                Way::Nowhere => return dropped(head, |c| &c.tx_drop_not_ip),
            };
        Frame { staged, pieces, ..Frame::new(head, len, fate) }
    }

    /// The part of a frame that is in `slot`, without its virtio-net header, which `staged` includes.
    #[inline]
    fn staged(&self, slot: usize, staged: usize) -> &[u8] {
        self.stage.slot(slot).get(HEADER_LEN..staged).unwrap_or_default()
    }

    /// Copies the start of a frame to its slot and checks the header there. Returns how many bytes are on the stage, or
    /// an error if the header asks for what it may not.
    #[inline]
    fn stage_start(&mut self, pieces: Range<usize>, len: usize) -> Result<usize, HeaderFault> {
        let short = HeaderFault::Length { len };
        let slot = self.stage.slot_mut(self.frames.len());
        let staged = self.iovecs.copy_to(pieces, 0, slot.get_mut(..len.min(START_LEN)).ok_or(short)?);
        let (head, frame) = slot.split_first_chunk_mut::<HEADER_LEN>().ok_or(short)?;
        let start = staged.checked_sub(HEADER_LEN).and_then(|staged| frame.get(..staged)).ok_or(short)?;
        let checked = self.rules.check(VnetHeader::from_bytes(head), len - HEADER_LEN, start)?;
        *head = checked.header.to_bytes();
        self.segments += checked.segments;
        if self.expected.is_some_and(|expected| start.get(6..12).is_some_and(|source| *source != expected)) {
            self.expected = None;
            self.unexpected = start.get(6..).and_then(|source| source.first_chunk()).copied();
        }
        Ok(staged)
    }

    /// Remembers to report the number of segments, once for each start of the ring.
    #[cold]
    fn tell_of_segments(&mut self, segments: usize) {
        if !self.told_of_segments {
            self.too_many = Some(segments);
            self.told_of_segments = true;
        }
    }
}

/// Arranging.
impl Tx {
    /// Makes runs of frames of one flow, and copies all other small frames as a whole.
    fn arrange(&mut self) {
        let mut at = 0;
        let mut full_until = None;
        let mut hint = self.flow_hint(0);
        while at < self.frames.len() {
            let next = self.flow_hint(at + 1);
            // Of most frames the hint shows at once that they stay alone. The hint of no frame, or of a short one, does
            // not matter.
            let run = if hint == next { self.run_from(at) } else { None };
            let count = match run {
                Some(run) => {
                    if run.is_full() {
                        full_until = Some(at + run.frames());
                    }
                    self.close_run(at, &run)
                }
                None => self.copy_rest(at),
            };
            at += count;
            hint = if count == 1 { next } else { self.flow_hint(at) };
        }
        if self.frames.len() >= self.budget {
            self.budget = full_until.unwrap_or(BUDGET);
        }
    }

    /// What the frame at `at` has in common with those of its flow. This looks at the frame only now, and not while the
    /// frame is gathered: what was just copied cannot be loaded at once.
    #[inline]
    fn flow_hint(&self, at: usize) -> u64 {
        flow_hint(frame_start(&self.stage, at))
    }

    /// The run that begins with the frame at `at`, if there is one of two frames at least.
    fn run_from(&self, at: usize) -> Option<Run> {
        let mut run = Run::begin(self.segment(at)?);
        while self.joins(&mut run, at) {}
        (run.frames() > 1).then_some(run)
    }

    /// Whether the next frame joins the run that begins at `at`.
    #[inline]
    fn joins(&self, run: &mut Run, at: usize) -> bool {
        let next = at + run.frames();
        let frame = self.frames.get(next).filter(|frame| matches!(frame.fate, Fate::ToSend));
        let Some(frame) = frame else { return false };
        let newest = self.stage.slot(next).get(..frame.staged).unwrap_or_default();
        if run.join_alike(self.stage.slot(at), newest, frame.len - HEADER_LEN) {
            return true;
        }
        let first = frame_start(&self.stage, at);
        self.segment(next).is_some_and(|segment| run.join(first, segment, frame_start(&self.stage, next)))
    }

    /// The frame at `at` as a segment of a run, if it can be one.
    fn segment(&self, at: usize) -> Option<Segment> {
        let frame = self.frames.get(at).filter(|frame| matches!(frame.fate, Fate::ToSend))?;
        let (header, start) = self.stage.slot(at).get(..frame.staged)?.split_first_chunk()?;
        Segment::of(self.coalesce, VnetHeader::from_bytes(header), start, frame.len - HEADER_LEN)
    }

    /// Makes one frame of a run; returns how many frames it was.
    fn close_run(&mut self, at: usize, run: &Run) -> usize {
        if let Some((head, start)) = self.stage.slot_mut(at).split_first_chunk_mut::<HEADER_LEN>()
            && let Some(header) = run.merge(start)
        {
            *head = header.to_bytes();
        }
        let frames = self.frames.get_mut(at..at + run.frames()).and_then(<[_]>::split_first_mut);
        if let Some((first, others)) = frames {
            first.run = run.frames();
            // Of these only the payload goes out, all of it from guest memory: the fewer pieces, the better.
            others.iter_mut().for_each(|frame| (frame.run, frame.staged) = (0, HEADER_LEN + run.headers_len()));
        }
        run.frames()
    }

    /// Copies the rest of a small frame that stays alone; returns 1, the number of frames.
    #[inline]
    fn copy_rest(&mut self, at: usize) -> usize {
        if let Some(frame) = self.frames.get_mut(at)
            && frame.staged < frame.len
            && let Some(rest) = self.stage.slot_mut(at).get_mut(frame.staged..frame.len)
        {
            frame.staged += self.iovecs.copy_to(frame.pieces.clone(), frame.staged, rest);
        }
        1
    }
}

/// A slot behind the place of the virtio-net header.
fn frame_start(stage: &Stage, slot: usize) -> &[u8] {
    stage.slot(slot).get(HEADER_LEN..).unwrap_or_default()
}

/// Sending.
impl Tx {
    /// Sends what was gathered, in order; returns why it stopped, if it did before the end.
    fn send(&mut self, device: &DeviceQueue) -> Option<Pump> {
        let mut at = 0;
        while let Some(frame) = self.frames.get(at) {
            let stopped = match frame.fate {
                Fate::ToSend if frame.is_gathered() => self.send_gathered(&mut at, device),
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
        let first = *at;
        self.stage.clear();
        for frame in self.frames.get(*at..).unwrap_or_default() {
            match frame.fate {
                Fate::ToSend if frame.is_gathered() => break,
                Fate::ToSend => {
                    if !matches!(self.framing, Framing::Whole) {
                        self.framing.cut(self.stage.slot_mut(*at));
                    }
                    self.stage.add(*at, frame.len);
                }
                Fate::Sent | Fate::ForGateway | Fate::Dropped(_) => {}
            }
            *at += 1;
        }
        if self.stage.write(device) {
            let frames = self.frames.get_mut(first..*at).unwrap_or_default();
            let sent = frames.iter_mut().filter(|frame| matches!(frame.fate, Fate::ToSend));
            sent.for_each(|frame| frame.fate = Fate::Sent);
            return None;
        }
        for Outcome { slot, result, .. } in self.stage.outcomes() {
            match fate(result) {
                Ok(fate) => self.frames.get_mut(slot).into_iter().for_each(|frame| frame.fate = fate),
                Err(stopped) => return Some(stopped),
            }
        }
        None
    }

    /// Sends the frame or run that begins at `at` from the stage and from guest memory.
    fn send_gathered(&mut self, at: &mut usize, device: &DeviceQueue) -> Option<Pump> {
        self.framing.cut(self.stage.slot_mut(*at));
        let fate = match fate(write_patiently(|| self.write(*at, device))) {
            Ok(fate) => fate,
            Err(stopped) => return Some(stopped),
        };
        let count = self.run_at(*at).len();
        self.frames.iter_mut().skip(*at).take(count).for_each(|frame| frame.fate = fate);
        *at += count;
        None
    }

    /// The frames of the run that begins at `at`; only that frame if there is no run.
    fn run_at(&self, at: usize) -> &[Frame] {
        let count = self.frames.get(at).map_or(0, |frame| frame.run.max(1));
        self.frames.get(at..at + count).unwrap_or_default()
    }

    /// Writes the frame or run that begins at `at`: of each frame what is on the stage and the rest of its chain.
    fn write(&mut self, at: usize, device: &DeviceQueue) -> Result<usize, Errno> {
        let count = self.frames.get(at).map_or(1, |frame| frame.run.max(1));
        let Tx { iovecs, stage, frames, bounce, framing, .. } = self;
        let frames = frames.get(at..at + count).unwrap_or_default();
        let parts = frames.iter().enumerate().map(|(index, frame)| {
            let on_stage = if index == 0 { stage.slot(at) } else { &[] };
            let private = on_stage.get(framing.omitted()..frame.staged).unwrap_or_default();
            Part { private, pieces: frame.pieces.clone(), skip: frame.staged }
        });
        if frames.iter().map(|frame| 1 + frame.pieces.len()).sum::<usize>() <= IOV_MAX {
            return iovecs.writev(device.as_fd(), parts);
        }
        let mut len = 0;
        for Part { private, pieces, skip } in parts {
            let (start, rest) = bounce
                .get_mut(len..)
                .and_then(|room| room.split_at_mut_checked(private.len()))
                .ok_or(Errno::MSGSIZE)?;
            start.copy_from_slice(private);
            len += private.len() + iovecs.copy_to(pieces, skip, rest);
        }
        rustix::io::write(device, bounce.get(..len).unwrap_or_default())
    }
}

/// Settling.
impl Tx {
    /// Completes what was sent or dropped, in order, and puts back the rest.
    fn settle(&mut self, queue: &mut Queue, counters: &PairCounters) {
        let (mut sent, mut bytes, mut large, mut runs, mut coalesced) = (0, 0, 0, 0, 0);
        let mut frames = self.frames.drain(..).enumerate();
        let mut unsent = None;
        for (slot, frame) in frames.by_ref() {
            match frame.fate {
                Fate::ToSend => {
                    unsent = Some(frame);
                    break;
                }
                Fate::ForGateway => {
                    counters.tx_neighbour_requests.add(1);
                    let request = self.stage.slot(slot).get(HEADER_LEN..frame.staged).unwrap_or_default();
                    let answer = self.framing.link().and_then(|link| link.answer(request));
                    if self.answers.len() < ANSWERS_MAX {
                        self.answers.extend(answer);
                    } else if answer.is_some() {
                        counters.rx_drop_answers.add(1);
                    }
                }
                Fate::Dropped(reason) => reason(counters).add(1),
                Fate::Sent => {
                    let len = frame.len - HEADER_LEN;
                    sent += 1;
                    bytes += len as u64;
                    large += u64::from(len > LARGE_FRAME);
                    if frame.run > 1 {
                        runs += 1;
                        coalesced += frame.run as u64;
                    }
                }
            }
            queue.push_used(frame.head, 0);
        }
        let rest = frames.rev().map(|(_, frame)| frame);
        rest.chain(unsent).for_each(|frame| queue.rewind(frame.head));
        counters.tx_frames.add(sent);
        counters.tx_bytes.add(bytes);
        counters.tx_large_frames.add(large);
        counters.tx_coalesced_frames.add(coalesced);
        counters.tx_coalesced_runs.add(runs);
    }
}
