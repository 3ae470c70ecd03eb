//! Reads and writes in batches through io_uring: unsafe door 3.
//!
//! A [`BatchMemory`] owns the private memory that its operations work on, registered with the kernel once there is a ring
//! for it. [`BatchMemory::transfer`] submits a batch and returns when all of it has ended, so nothing is in flight between
//! two calls: a ring that stops, or a thread that ends, has nothing to cancel. It never waits for the device either: each
//! operation is non-blocking (`RWF_NOWAIT`) and ends with `EAGAIN` instead.
//!
//! Guest memory is never registered: pinned pages would outlive what the guest gives back to its host.
//!
//! System-call filters do not see what goes through a ring, so each ring is restricted for ever to these two operations
//! on registered files and memory. A thread takes its rings before it is confined ([`UringPool`]) and cannot make one
//! afterwards.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use rustix::io::Errno;

use super::stage::Job;

/// The registered file: the device.
const DEVICE: types::Fixed = types::Fixed(0);
/// The registered buffer: the memory.
const MEMORY: u16 = 0;
/// The most operations of a batch.
const ENTRIES: u32 = 64;
/// The virtqueues of a thread, each of which has a ring of its own.
const DIRECTIONS: usize = 2;

/// What a batch does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    /// All of them, even if some fail.
    Write,
    /// Each after the one before has succeeded; those after a failed one end with `ECANCELED`.
    WriteLinked,
}

/// The idle io_uring instances of one thread. The lock is taken only when a virtqueue takes or returns one.
#[derive(Clone, Default)]
pub struct UringPool(Arc<Mutex<Pool>>);

#[derive(Default)]
struct Pool {
    idle: Vec<IoUring>,
    /// Whether no more may be made.
    is_sealed: bool,
}

impl UringPool {
    /// Makes a ring for each direction, and none later. The thread that will use them has to call this.
    ///
    /// # Errors
    /// What the kernel says; the pool is sealed all the same.
    pub fn seal(&self) -> io::Result<()> {
        let mut pool = self.lock();
        pool.is_sealed = true;
        for _ in 0..DIRECTIONS {
            pool.idle.push(build(ENTRIES)?);
        }
        Ok(())
    }

    fn take(&self) -> io::Result<IoUring> {
        let mut pool = self.lock();
        match pool.idle.pop() {
            Some(ring) => Ok(ring),
            None if pool.is_sealed => Err(io::ErrorKind::PermissionDenied.into()),
            None => build(ENTRIES),
        }
    }

    fn put(&self, ring: IoUring) {
        self.lock().idle.push(ring);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Private memory of a stage, and the ring that it is registered with, once a batch has needed one.
pub(super) struct BatchMemory {
    /// `drop` returns it to the pool, before the memory is freed.
    ring: Option<Box<IoUring>>,
    rings: UringPool,
    memory: Box<[u8]>,
    /// Operations that have been submitted and not ended: none between two calls, unless the kernel failed us.
    outstanding: usize,
}

/// Whether this process may use io_uring for what is needed here.
///
/// # Errors
/// What the kernel says (`EPERM` with `kernel.io_uring_disabled`, `ENOSYS`), or `Unsupported` for an old one.
pub(super) fn probe() -> io::Result<()> {
    let ring = build(2)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::ReadFixed::CODE, opcode::WriteFixed::CODE];
    if needed.iter().all(|code| probe.is_supported(*code)) { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// Makes a ring for one thread. It has no `DEFER_TASKRUN`: operations that complete at once cost less without.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_r_disabled();
    let ring = builder.clone().setup_single_issuer().setup_no_sqarray().build(entries).or_else(|error| {
        // Kernels before 6.6 do not know these flags.
        if error.raw_os_error() == Some(libc::EINVAL) { builder.build(entries) } else { Err(error) }
    })?;
    restrict(&ring)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

/// Restricts the ring to the two operations.
fn restrict(ring: &IoUring) -> io::Result<()> {
    /// `IORING_REGISTER_BUFFERS` and `UNREGISTER`, the same of files, and `PROBE`, as linux/io_uring.h numbers them.
    const CHANGES: [u8; 5] = [0, 1, 2, 3, 8];
    let operations = [opcode::ReadFixed::CODE, opcode::WriteFixed::CODE];
    let fixed = squeue::Flags::FIXED_FILE.bits();
    let mut restrictions: Vec<_> = operations.into_iter().map(Restriction::sqe_op).collect();
    restrictions.extend(CHANGES.into_iter().map(Restriction::register_op));
    restrictions.push(Restriction::sqe_flags_required(fixed));
    restrictions.push(Restriction::sqe_flags_allowed(fixed | squeue::Flags::IO_LINK.bits()));
    ring.submitter().register_restrictions(&mut restrictions)
}

impl BatchMemory {
    /// Memory of `len` bytes, without a ring.
    pub(super) fn new(len: usize, rings: &UringPool) -> BatchMemory {
        BatchMemory { ring: None, rings: rings.clone(), memory: vec![0; len].into_boxed_slice(), outstanding: 0 }
    }

    /// Puts a ring on `device` if there is none yet.
    ///
    /// # Errors
    /// What the kernel says; `ENOMEM` where more memory may not be locked (`RLIMIT_MEMLOCK`).
    #[inline]
    pub(super) fn attach(&mut self, device: BorrowedFd<'_>) -> io::Result<()> {
        if self.ring.is_none() {
            self.ring = Some(Box::new(self.set_up(device)?));
        }
        Ok(())
    }

    fn set_up(&mut self, device: BorrowedFd<'_>) -> io::Result<IoUring> {
        let ring = self.rings.take()?;
        ring.submitter().register_files(&[device.as_raw_fd()])?;
        let iov_base = self.memory.as_mut_ptr().cast();
        let whole = libc::iovec { iov_base, iov_len: self.memory.len() };
        // SAFETY: `whole` is the memory that `self` owns, which goes only when it is unregistered, or the ring has gone
        // (`drop`).
        unsafe { ring.submitter().register_buffers(&[whole])? };
        Ok(ring)
    }

    /// Gives up the ring. If the kernel may still use the memory, goes on with a copy of it, since it also holds frames
    /// that were not submitted.
    pub(super) fn renounce(&mut self) {
        if self.outstanding > 0 {
            let mut other = BatchMemory::new(self.memory.len(), &self.rings);
            other.memory.copy_from_slice(&self.memory);
            *self = other;
        }
    }

    /// The memory.
    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory
    }

    /// The memory, to be written.
    #[inline]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    /// Does `jobs` in their order and notes the result in each. Returns whether all succeeded.
    ///
    /// # Errors
    /// The kernel did not accept or did not complete the batch. What became of jobs without a result is
    /// unknown, and the ring must not be used again.
    pub(super) fn transfer(&mut self, operation: Operation, jobs: &mut [Job]) -> io::Result<bool> {
        let BatchMemory { ring: Some(ring), memory, outstanding, .. } = self else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        if *outstanding > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let last = jobs.len().saturating_sub(1);
        let mut entries = ring.submission();
        for (index, job) in jobs.iter().enumerate() {
            let Some(bytes) = memory.get_mut(job.bytes.clone()) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let mut entry = entry(operation, bytes).user_data(index as u64);
            if operation == Operation::WriteLinked && index < last {
                entry = entry.flags(squeue::Flags::IO_LINK);
            }
            // SAFETY: the entry names bytes of `memory`, which is not touched until the operation has ended: that is
            // waited for below, and where it cannot be, `outstanding` keeps the memory from use and from being freed.
            unsafe { entries.push(&entry) }.map_err(io::Error::other)?;
            *outstanding += 1;
        }
        drop(entries);
        let mut all_succeeded = true;
        while *outstanding > 0 {
            match ring.submit_and_wait(*outstanding) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for completion in ring.completion() {
                *outstanding = outstanding.saturating_sub(1);
                all_succeeded &= note(jobs, &completion);
            }
        }
        Ok(all_succeeded)
    }
}

fn entry(operation: Operation, bytes: &mut [u8]) -> squeue::Entry {
    // A slot is at most a frame long, which fits 32 bits.
    let (start, len) = (bytes.as_mut_ptr(), bytes.len() as u32);
    if operation == Operation::Read {
        opcode::ReadFixed::new(DEVICE, start, len, MEMORY).rw_flags(libc::RWF_NOWAIT).build()
    } else {
        opcode::WriteFixed::new(DEVICE, start, len, MEMORY).rw_flags(libc::RWF_NOWAIT).build()
    }
}

/// Notes the result of one job. Returns whether it succeeded.
#[inline]
fn note(jobs: &mut [Job], completion: &cqueue::Entry) -> bool {
    let Some(job) = jobs.get_mut(completion.user_data() as usize) else { return false };
    let error = |_| Errno::from_raw_os_error(completion.result().wrapping_neg());
    job.result = usize::try_from(completion.result()).map_err(error);
    job.result.is_ok()
}

impl Drop for BatchMemory {
    fn drop(&mut self) {
        if let Some(ring) = self.ring.take() {
            // Closing a ring takes effect later than the call, but the device has to be released at once.
            let files = ring.submitter().unregister_files();
            let memory = ring.submitter().unregister_buffers();
            if self.outstanding == 0 && files.and(memory).is_ok() {
                self.rings.put(*ring);
            }
        }
        if self.outstanding > 0 {
            // The kernel may still use the memory, so it is leaked rather than freed.
            std::mem::forget(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_on_the_memory_outlive_a_ring_that_the_kernel_failed() {
        let mut uring = BatchMemory::new(6, &UringPool::default());
        uring.bytes_mut().copy_from_slice(b"frames");
        uring.outstanding = 1;
        uring.renounce();
        assert_eq!((uring.bytes(), uring.outstanding), (&b"frames"[..], 0));
    }
}
