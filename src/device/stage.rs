//! The stage: private memory through which many frames at a time go to or come from a device queue.
//!
//! Slots of equal length, and a list of jobs: which slot, how many bytes. [`Stage::write`] and [`Stage::read`] do the
//! jobs in order, through one batch of io_uring (or `sendmmsg` and `recvmmsg`, for a packet socket) where that is
//! better, else by a system call each. The results look the same, so users of a stage need not know which it was.
//!
//! Order is kept exactly. A write that the device does not take now holds back those after it, which stay undone
//! (`CANCELED`). A device that never blocks (a TAP without a send limit) gets the writes of a batch unlinked, which
//! costs a third less. If it refuses a frame all the same and takes a later one, the refused frame is dropped as for
//! lack of memory, never sent late.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use thiserror::Error;

use super::errno::{WriteFailure, classify_write, write_patiently};
use super::mmsg::Messages;
pub use super::uring::UringPool;
use super::uring::{self, BatchMemory, Operation};
use super::{DeviceQueue, VlanTag};

/// The smallest number of frames for which a batch pays.
const BATCH_MIN: usize = 4;

/// How frames are read and written (`--io`). For a packet socket, `sendmmsg` and `recvmmsg` are in io_uring's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// Through io_uring where there are several small frames at a time.
    #[default]
    Auto,
    /// Through io_uring wherever frames go through private memory.
    Uring,
    /// One system call for each frame.
    Syscall,
}

/// io_uring was asked for and cannot be used.
#[derive(Debug, Error)]
#[error("--io uring: this process cannot use io_uring{}; --io auto goes without", why_no_uring(cause))]
pub struct NoUring {
    #[source]
    cause: io::Error,
}

/// A hint for the operator on why io_uring cannot be used.
pub(crate) fn why_no_uring(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::ENOMEM) => {
            ": this user may lock no more memory ('ulimit -l', LimitMEMLOCK=), of which a pair needs 1.2 MB"
        }
        Some(libc::EPERM) => ": it is forbidden ('sysctl kernel.io_uring_disabled', or a filter of system calls)",
        Some(libc::ENOSYS) => ": this kernel has none",
        _ => "",
    }
}

impl Io {
    /// What this host supports of it, for a device that is no packet socket.
    ///
    /// # Errors
    /// [`NoUring`] if io_uring was demanded and cannot be used.
    pub fn usable(self) -> Result<Io, NoUring> {
        let probed = if self == Io::Syscall { Ok(()) } else { uring::probe() };
        match (self, probed) {
            (_, Ok(())) => Ok(self),
            (Io::Uring, Err(cause)) => Err(NoUring { cause }),
            (_, Err(error)) => {
                log::info!("No io_uring, each frame takes a system call{}: {error}", why_no_uring(&error));
                Ok(Io::Syscall)
            }
        }
    }

    /// Whether `count` small frames, ready at the same time, are to go in one batch.
    #[inline]
    pub fn batches(self, count: usize) -> bool {
        match self {
            Io::Auto => count >= BATCH_MIN,
            Io::Uring => true,
            Io::Syscall => false,
        }
    }
}

/// One frame's transfer.
#[derive(Clone, Debug)]
pub struct Job {
    pub(super) slot: usize,
    /// Which bytes of the stage's memory.
    pub(super) bytes: Range<usize>,
    pub(super) result: Result<usize, Errno>,
    /// A VLAN tag that belongs into the frame that was read.
    pub(super) tag: Option<VlanTag>,
}

/// What became of a frame's transfer.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Where the frame is.
    pub slot: usize,
    /// How many bytes were moved. `CANCELED` where it was not tried.
    pub result: Result<usize, Errno>,
    /// A VLAN tag that belongs into the frame that was read.
    pub tag: Option<VlanTag>,
}

/// The slots of a stage.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    /// How many there are.
    pub count: usize,
    /// Bytes of each.
    pub len: usize,
    /// How many bytes at the start of each do not go over the device.
    pub omitted: usize,
}

/// The slots for one direction of a device queue, and the jobs on them.
pub struct Stage {
    /// The bytes of all slots. They have no ring before the first batch, and never one on a packet socket.
    memory: BatchMemory,
    /// For a packet socket.
    messages: Option<Messages>,
    slot_len: usize,
    /// Bytes of a slot's start that do not go over the device.
    omitted: usize,
    io: Io,
    /// Whether the device may refuse a frame now and take it later.
    may_block: bool,
    jobs: Vec<Job>,
}

impl Stage {
    /// A stage for `device`, whose batches use one of `rings`. Memory is taken as it is used.
    pub fn new(device: &DeviceQueue, io: Io, rings: &UringPool, slots: Slots) -> Stage {
        let Slots { count, len: slot_len, omitted } = slots;
        Stage {
            memory: BatchMemory::new(count * slot_len, rings),
            messages: device.is_packet_socket().then(|| Messages::new(count)),
            slot_len,
            omitted,
            io,
            may_block: device.may_block(),
            jobs: Vec::with_capacity(count),
        }
    }

    /// How frames are moved.
    pub fn io(&self) -> Io {
        self.io
    }

    /// The bytes of slot `slot`; none where there is no such slot.
    #[inline]
    pub fn slot(&self, slot: usize) -> &[u8] {
        let from = slot * self.slot_len;
        self.memory.bytes().get(from..from + self.slot_len).unwrap_or_default()
    }

    /// The bytes of slot `slot`, to be written.
    #[inline]
    pub fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        let from = slot * self.slot_len;
        self.memory.bytes_mut().get_mut(from..from + self.slot_len).unwrap_or_default()
    }

    /// Forgets all jobs.
    #[inline]
    pub fn clear(&mut self) {
        self.jobs.clear();
    }

    /// Adds a job on the first `len` bytes of slot `slot`, less the omitted ones.
    #[inline]
    pub fn add(&mut self, slot: usize, len: usize) {
        let from = slot * self.slot_len;
        let bytes = from + self.omitted..from + len.min(self.slot_len);
        self.jobs.push(Job { slot, bytes, result: Err(Errno::CANCELED), tag: None });
    }

    /// What became of the jobs, in order.
    pub fn outcomes(&self) -> impl Iterator<Item = Outcome> {
        self.jobs.iter().map(|&Job { slot, result, tag, .. }| Outcome { slot, result, tag })
    }

    /// Writes the jobs' bytes to `device`, each a frame, until one has to wait. Returns whether all were written; if
    /// not, [`Stage::outcomes`] says what became of each.
    pub fn write(&mut self, device: &DeviceQueue) -> bool {
        let mut at = 0;
        while at < self.jobs.len() {
            if self.messages.is_some() {
                self.write_messages(device.as_fd(), at);
            } else if self.takes_batch(device, self.jobs.len() - at) {
                if self.write_batch(at) {
                    return at == 0;
                }
            } else {
                self.write_singly(device.as_fd(), at);
            }
            let rest = self.jobs.get(at..).unwrap_or_default();
            let settled = rest.iter().take_while(|job| job.result != Err(Errno::CANCELED)).count();
            let stopped =
                settled.checked_sub(1).and_then(|last| rest.get(last)).is_none_or(|job| holds_back(job.result));
            if stopped {
                break;
            }
            at += settled;
        }
        self.jobs.iter().all(|job| job.result.is_ok())
    }

    fn write_singly(&mut self, device: BorrowedFd<'_>, first: usize) {
        for at in first..self.jobs.len() {
            let Some(Job { bytes, .. }) = self.jobs.get(at).cloned() else { return };
            let frame = self.memory.bytes().get(bytes).unwrap_or_default();
            let result = write_patiently(|| rustix::io::write(device, frame));
            if let Some(job) = self.jobs.get_mut(at) {
                job.result = result;
            }
            if holds_back(result) {
                return;
            }
        }
    }

    /// Writes the jobs from `first` on to a packet socket, up to one that is refused.
    fn write_messages(&mut self, socket: BorrowedFd<'_>, first: usize) {
        let Some(messages) = &mut self.messages else { return };
        let memory = self.memory.bytes_mut();
        let count = if self.io == Io::Syscall { 1 } else { usize::MAX };
        let jobs = self.jobs.get_mut(first..).unwrap_or_default();
        let jobs = jobs.split_at_mut(count.min(jobs.len())).0;
        // The call fails only for the first job; a later one that is refused ends it early, and is tried again by the
        // caller.
        let _ = write_patiently(|| {
            messages.send(socket, memory, jobs);
            jobs.first().map_or(Ok(0), |job| job.result)
        });
    }

    /// Writes the jobs from `first` on in a batch. Returns whether all were written.
    fn write_batch(&mut self, first: usize) -> bool {
        let operation = if self.may_block { Operation::WriteLinked } else { Operation::Write };
        let all_went = self.transfer(operation, first);
        if !all_went && operation == Operation::Write {
            self.settle_refused(first);
        }
        all_went
    }

    /// Drops refused frames that later ones have overtaken, which must not be sent after these.
    fn settle_refused(&mut self, first: usize) {
        let jobs = self.jobs.get_mut(first..).unwrap_or_default();
        let overtaken = jobs.iter().rposition(|job| job.result.is_ok()).unwrap_or(0);
        for job in jobs.iter_mut().take(overtaken).filter(|job| job.result == Err(Errno::AGAIN)) {
            job.result = Err(Errno::NOBUFS);
            self.may_block = true;
        }
    }

    /// Reads a frame into each job's slot, until `device` has no more.
    pub fn read(&mut self, device: &DeviceQueue) {
        if let Some(messages) = &mut self.messages {
            return messages.receive(device.as_fd(), self.memory.bytes_mut(), &mut self.jobs);
        }
        if self.takes_batch(device, self.jobs.len()) {
            self.transfer(Operation::Read, 0);
            return;
        }
        for at in 0..self.jobs.len() {
            let Some(Job { bytes, .. }) = self.jobs.get(at).cloned() else { return };
            let room = self.memory.bytes_mut().get_mut(bytes).unwrap_or_default();
            let result = rustix::io::read(device, room);
            if let Some(job) = self.jobs.get_mut(at) {
                job.result = result;
            }
            if result.is_err() {
                return;
            }
        }
    }

    /// Whether `count` jobs go in a batch. The first batch takes a ring.
    fn takes_batch(&mut self, device: &DeviceQueue, count: usize) -> bool {
        if !self.io.batches(count) {
            return false;
        }
        if let Err(error) = self.memory.attach(device.as_fd()) {
            self.fall_back(&error);
            return false;
        }
        true
    }

    /// Does the jobs from `first` on in a batch. Returns whether all succeeded.
    fn transfer(&mut self, operation: Operation, first: usize) -> bool {
        let jobs = self.jobs.get_mut(first..).unwrap_or_default();
        match self.memory.transfer(operation, jobs) {
            Ok(all_succeeded) => all_succeeded,
            Err(error) => {
                // It is unknown which of these were done.
                jobs.iter_mut().filter(|job| job.result.is_err()).for_each(|job| job.result = Err(Errno::NOBUFS));
                self.fall_back(&error);
                false
            }
        }
    }

    fn fall_back(&mut self, error: &io::Error) {
        self.io = Io::Syscall;
        self.memory.renounce();
        log::warn!("io_uring failed, going on with one system call for each frame: {error}");
    }
}

/// Whether the frames after one with this result have to wait.
fn holds_back(result: Result<usize, Errno>) -> bool {
    classify_write(result).is_err_and(WriteFailure::holds_back)
}
