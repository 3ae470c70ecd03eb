//! The backlog of `rx`: frames that were read into private memory and wait to be copied to the guest, oldest first.
//!
//! Each is in a slot of the stage, its virtio-net header before it. A frame's slot is free again once it was delivered or
//! dropped; new frames are read only into an empty backlog, so the slots' order is the frames' order.

use super::framing::{Framing, put_tag};
use super::header::{HEADER_LEN, VnetHeader};
use super::ip_link::Answer;
use super::{ETH_HEADER, FRAME_MAX, Pump, Uplink};
use crate::device::errno::{ReadFailure, classify_read};
use crate::device::stage::{Outcome, Slots, Stage};
use crate::device::{DeviceQueue, VlanTag};
use crate::metrics::PairCounters;

/// The most frames that are read at a time.
pub(super) const SLOTS: usize = 16;
/// The largest frame with its header, and one byte more: a frame that fills it was truncated.
const SLOT_LEN: usize = HEADER_LEN + FRAME_MAX + 1;

/// A frame that waited for buffers when its ring stopped, kept for the next start: its bytes with the virtio-net
/// header, and how many of its segments were delivered.
pub struct HeldFrame(Vec<u8>, usize);

/// Frames in private memory, in the order in which they came.
pub(super) struct Backlog {
    stage: Stage,
    framing: Framing,
    /// Those before `next` are delivered or dropped.
    waiting: Vec<Waiting>,
    next: usize,
}

#[derive(Clone, Copy)]
struct Waiting {
    slot: usize,
    /// Bytes, header included.
    len: usize,
    /// How many of its segments were delivered, if it has to be cut.
    delivered: usize,
    /// A VLAN tag that has yet to be inserted.
    tag: Option<VlanTag>,
}

impl Backlog {
    /// The backlog of a ring that starts, with the frames that one before it left.
    pub(super) fn new(uplink: &Uplink<'_>, left: Vec<HeldFrame>) -> Backlog {
        let slots = Slots { count: SLOTS, len: SLOT_LEN, omitted: uplink.framing.omitted() };
        let stage = Stage::new(uplink.device, uplink.io, uplink.rings, slots);
        let mut backlog =
            Backlog { stage, framing: uplink.framing.clone(), waiting: Vec::with_capacity(SLOTS), next: 0 };
        for (slot, HeldFrame(frame, delivered)) in left.into_iter().take(SLOTS).enumerate() {
            backlog.stage.slot_mut(slot).iter_mut().zip(&frame).for_each(|(to, from)| *to = *from);
            backlog.waiting.push(Waiting { slot, len: frame.len(), delivered, tag: None });
        }
        backlog
    }

    /// The frames that wait, for the next start of the ring.
    pub(super) fn into_held(self) -> Vec<HeldFrame> {
        let frame = |Waiting { slot, len, delivered, .. }| {
            Some(HeldFrame(self.stage.slot(slot).get(..len)?.to_vec(), delivered))
        };
        self.waiting.iter().skip(self.next).copied().filter_map(frame).collect()
    }

    /// How many frames can be read at a time.
    pub(super) fn slots(&self) -> usize {
        SLOTS
    }

    /// Whether `count` small frames, ready at the same time, are to be read in one batch.
    pub(super) fn batches(&self, count: usize) -> bool {
        self.stage.io().batches(count)
    }

    /// Whether no frame waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.len() == self.next
    }

    /// How many frames wait.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.waiting.len() - self.next
    }

    /// The oldest frame, its virtio-net header before it.
    #[inline]
    pub(super) fn front(&mut self) -> Option<&mut [u8]> {
        let Waiting { slot, len, .. } = *self.waiting.get(self.next)?;
        self.stage.slot_mut(slot).get_mut(..len)
    }

    /// How many segments of the oldest frame were delivered, for the caller to count up.
    pub(super) fn delivered(&mut self) -> Option<&mut usize> {
        self.waiting.get_mut(self.next).map(|frame| &mut frame.delivered)
    }

    /// Forgets the oldest frame.
    #[inline]
    pub(super) fn pop(&mut self) {
        self.next += 1;
        if self.next >= self.waiting.len() {
            self.waiting.clear();
            self.next = 0;
        }
    }

    /// Room for the part of a frame that does not fit the guest's buffers. Valid while the backlog is empty.
    pub(super) fn spill(&mut self) -> &mut [u8] {
        self.stage.slot_mut(0).get_mut(HEADER_LEN..).unwrap_or_default()
    }

    /// Appends a frame that a read split: its first `room` bytes are in the guest's buffers, from where `first` copies
    /// them, the others in [`Backlog::spill`].
    pub(super) fn put_together(
        &mut self,
        header: &[u8; HEADER_LEN],
        len: usize,
        room: usize,
        first: impl FnOnce(&mut [u8]),
    ) {
        let spill = self.spill();
        let room = room.min(len);
        spill.copy_within(..len - room, room);
        if let Some(start) = spill.get_mut(..room) {
            first(start);
        }
        if let Some(place) = self.stage.slot_mut(0).first_chunk_mut() {
            *place = *header;
        }
        self.waiting.push(Waiting { slot: 0, len: HEADER_LEN + len, delivered: 0, tag: None });
    }

    /// Appends an answer of the gateway. The backlog must be empty.
    pub(super) fn put(&mut self, answer: &Answer) {
        let frame = answer.frame();
        let len = HEADER_LEN + frame.len();
        if let Some((header, place)) = self.stage.slot_mut(0).get_mut(..len).and_then(<[u8]>::split_first_chunk_mut) {
            *header = VnetHeader::default().to_bytes();
            place.copy_from_slice(frame);
            self.waiting.push(Waiting { slot: 0, len, delivered: 0, tag: None });
        }
    }

    /// Reads up to `count` frames. Returns how many came and, unless `count` came, how the pass ends.
    pub(super) fn read(
        &mut self,
        device: &DeviceQueue,
        count: usize,
        counters: &PairCounters,
    ) -> (usize, Option<Pump>) {
        self.stage.clear();
        (0..count.min(SLOTS)).for_each(|slot| self.stage.add(slot, SLOT_LEN));
        self.stage.read(device);
        // A frame may come between two reads: what ended the last read counts, not one before it.
        let mut end = None;
        let omitted = self.framing.omitted();
        for Outcome { slot, result, tag } in self.stage.outcomes() {
            end = match classify_read(result).map(|len| len + omitted) {
                Ok(len) if len < HEADER_LEN + ETH_HEADER => {
                    counters.rx_drop_short.add(1);
                    None
                }
                Ok(SLOT_LEN) => {
                    counters.rx_drop_too_large.add(1);
                    None
                }
                Ok(len) => {
                    self.waiting.push(Waiting { slot, len, delivered: 0, tag });
                    None
                }
                Err(ReadFailure::NotTried) => end,
                Err(failure) => after_failed_read(failure, counters),
            };
        }
        let came = self.waiting.len();
        self.enclose(counters);
        (came, end)
    }
}

impl Backlog {
    /// Brings the frames that were just read into the guest's format.
    fn enclose(&mut self, counters: &PairCounters) {
        let Backlog { stage, framing, waiting, .. } = self;
        if matches!(framing, Framing::Whole) {
            return;
        }
        waiting.retain_mut(|Waiting { slot, len, tag, .. }| {
            let bytes = stage.slot_mut(*slot);
            let is_frame = bytes.get_mut(..*len).is_some_and(|bytes| framing.enclose(bytes));
            counters.rx_drop_short.add(u64::from(!is_frame));
            let tagged = tag.take().map_or(Some(*len), |tag| put_tag(bytes, *len, tag));
            counters.rx_drop_too_large.add(u64::from(is_frame && tagged.is_none()));
            *len = tagged.unwrap_or(*len);
            is_frame && tagged.is_some()
        });
    }

    /// Inserts a VLAN tag into the oldest frame. Returns false if there is no room; the frame must not be delivered
    /// without its tag, which would put it on another network.
    pub(super) fn put_tag(&mut self, tag: VlanTag) -> bool {
        let Some(Waiting { slot, len, .. }) = self.waiting.get_mut(self.next) else { return false };
        let tagged = put_tag(self.stage.slot_mut(*slot), *len, tag);
        *len = tagged.unwrap_or(*len);
        tagged.is_some()
    }
}

/// How the pass ends after a failed read; `None` to read again.
pub(super) fn after_failed_read(failure: ReadFailure, counters: &PairCounters) -> Option<Pump> {
    match failure {
        ReadFailure::Empty => Some(Pump::Drained),
        ReadFailure::DeviceLost => Some(Pump::DeviceLost),
        ReadFailure::NotTried | ReadFailure::LinkDown => None,
        ReadFailure::Refused => {
            counters.rx_drop_refused.add(1);
            None
        }
        ReadFailure::Failed => {
            counters.rx_read_errors.add(1);
            Some(Pump::TryLater)
        }
    }
}
