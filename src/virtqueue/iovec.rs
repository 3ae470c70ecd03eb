//! Pieces of guest memory as iovecs, and the words of rings: unsafe door 1, the one place where guest addresses become
//! pointers that are used.
//!
//! A [`GuestIovecs`] owns the view that its pieces were made from, so a piece stays mapped for as long as it can be
//! named. `virtqueue::chain` appends pieces, `net` says which range of them to read, write or copy. Nothing here knows
//! what the bytes mean. After bytes were written to a piece, they are entered in the log of written pages, if there is
//! one (`memory::dirty_log`). [`Words`] is a range whose words `virtqueue::split` loads and stores; it keeps its region
//! mapped.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::{AtomicInteger, VolatileMemory, VolatileSlice};

use crate::memory::{MemView, Region, Unmapped};

/// The kernel's limit on the iovecs of one call (`UIO_MAXIOV`).
pub const IOV_MAX: usize = 1024;

/// The most that the kernel can have written before a read failed: more than any frame has.
const READ_MAX: usize = 128 << 10;

/// A range of guest memory whose words are loaded and stored; it stays mapped for as long as this lives.
#[derive(Debug)]
pub(crate) struct Words<T> {
    start: *const T,
    count: usize,
    /// Keeps the mapping.
    _region: Arc<Region>,
}

// SAFETY: `start` points into a mapping that `_region` keeps, which any thread may use.
unsafe impl<T: AtomicInteger> Send for Words<T> {}

impl<T: AtomicInteger> Words<T> {
    /// The words of the `len` bytes at `offset` of `region`, if those are all inside it, and aligned for such words.
    pub(crate) fn new(region: &Arc<Region>, offset: u64, len: usize) -> Option<Words<T>> {
        let start = region.slice(offset, len)?.ptr_guard().as_ptr().cast::<T>();
        let count = len / size_of::<T>();
        start.is_aligned().then(|| Words { start, count, _region: Arc::clone(region) })
    }

    /// The `N` words from number `first` on, if there are so many.
    #[inline]
    pub(crate) fn get<const N: usize>(&self, first: usize) -> Option<&[T; N]> {
        let are_inside = first.checked_add(N).is_some_and(|end| end <= self.count);
        // SAFETY: the words are among the `count` from `start` on, which is aligned (`new`), in a slice of the region
        // that `_region` keeps mapped. An atomic integer may have any bits, and others may write it meanwhile.
        are_inside.then(|| unsafe { &*self.start.wrapping_add(first).cast() })
    }
}

/// Why a buffer could not be appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushError {
    /// The buffer is not all in guest memory.
    Unmapped(Unmapped),
    /// The chain has more than [`IOV_MAX`] pieces.
    TooMany,
}

/// One part of what [`GuestIovecs::writev`] sends.
pub struct Part<'a> {
    /// Private bytes, sent first.
    pub private: &'a [u8],
    /// Pieces of the list, sent behind them.
    pub pieces: Range<usize>,
    /// How many of the pieces' first bytes are left out.
    pub skip: usize,
}

/// A growing list of pieces of guest memory; a descriptor chain is a range of it.
pub struct GuestIovecs {
    mem: Arc<MemView>,
    /// Whether writes to the pieces are logged.
    is_logged: bool,
    near: Near,
    list: Vec<libc::iovec>,
    /// What one call passes: private head, guest pieces, private tail.
    call: Vec<libc::iovec>,
}

/// The region in which the last piece was found, since the next is likely to be there, too.
struct Near {
    /// Its first guest address.
    guest: u64,
    size: u64,
    base: *mut u8,
}

impl Near {
    const NOWHERE: Near = Near { guest: 0, size: 0, base: std::ptr::null_mut() };

    /// The region that holds `addr`.
    fn of(mem: &MemView, addr: u64) -> Near {
        let region = mem.find(addr);
        region.map_or(Near::NOWHERE, |region| {
            let (guest, size) = (region.setup().guest, region.setup().size);
            let whole = region.slice(0, size as usize);
            whole.map_or(Near::NOWHERE, |whole| Near { guest, size, base: whole.ptr_guard_mut().as_ptr() })
        })
    }

    /// Our address for guest address `addr`, if all of `len` bytes from it on are in this region.
    #[inline]
    fn find(&self, addr: u64, len: u32) -> Option<*mut u8> {
        let offset = addr.wrapping_sub(self.guest);
        let is_inside = offset < self.size && u64::from(len) <= self.size - offset;
        // The offset fits usize: the region is mapped.
        is_inside.then(|| self.base.wrapping_add(offset as usize))
    }
}

// SAFETY: the pointers in `list` and `near` point into mappings that `mem` keeps, which any thread may use; `call` is
// rewritten before each use.
unsafe impl Send for GuestIovecs {}

impl GuestIovecs {
    /// An empty list on `mem` with room for `capacity` pieces before it has to allocate.
    pub fn new(mem: Arc<MemView>, capacity: usize) -> GuestIovecs {
        GuestIovecs {
            is_logged: mem.logs_buffers(),
            mem,
            near: Near::NOWHERE,
            list: Vec::with_capacity(capacity),
            call: Vec::with_capacity(IOV_MAX),
        }
    }

    /// The memory that the pieces belong to.
    pub fn mem(&self) -> &Arc<MemView> {
        &self.mem
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is no piece.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Bytes of the pieces of `range`.
    pub fn bytes(&self, range: Range<usize>) -> usize {
        self.list.get(range).unwrap_or_default().iter().map(|piece| piece.iov_len).sum()
    }

    /// Forgets the pieces from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.list.truncate(len);
    }

    /// Forgets the first `count` pieces; the others move down.
    pub fn forget_first(&mut self, count: usize) {
        self.list.drain(..count.min(self.list.len()));
    }

    /// Appends the guest range `addr .. addr + len`. The pieces from `part` on are one part of one chain, within which
    /// neighbours are merged.
    ///
    /// # Errors
    /// [`PushError`]; some pieces may have been appended.
    #[inline(always)]
    pub(crate) fn push(&mut self, addr: u64, len: u32, part: usize) -> Result<(), PushError> {
        let Some(base) = self.near.find(addr, len) else { return self.push_from_afar(addr, len, part) };
        append(&mut self.list, part, base, len as usize);
        if self.list.len() - part > IOV_MAX { Err(PushError::TooMany) } else { Ok(()) }
    }

    /// As `push`, for a range that is in another region than the last, or in several.
    #[inline(never)]
    fn push_from_afar(&mut self, addr: u64, len: u32, part: usize) -> Result<(), PushError> {
        let GuestIovecs { mem, near, list, .. } = self;
        *near = Near::of(mem, addr);
        mem.pieces(addr, u64::from(len), |piece| append(list, part, piece.ptr_guard_mut().as_ptr(), piece.len()))
            .map_err(PushError::Unmapped)?;
        if list.len() - part > IOV_MAX { Err(PushError::TooMany) } else { Ok(()) }
    }

    /// Appends the guest range `addr .. addr + len` as one piece, if it is in the region where the last one was found,
    /// and not empty; returns whether it is.
    #[inline(always)]
    pub(crate) fn push_near(&mut self, addr: u64, len: u32) -> bool {
        let Some(base) = self.near.find(addr, len).filter(|_| len > 0) else { return false };
        self.list.push(libc::iovec { iov_base: base.cast(), iov_len: len as usize });
        true
    }

    /// Copies the pieces of `range`, without their first `skip` bytes, into `out`; returns how many bytes that were.
    ///
    /// Each byte of guest memory is read once.
    #[inline]
    pub fn copy_to(&self, range: Range<usize>, skip: usize, out: &mut [u8]) -> usize {
        match self.in_first(&range, skip, out.len()) {
            Some(piece) => piece.copy_to(out),
            None => self.copy_to_pieces(range, skip, out),
        }
    }

    #[inline(never)]
    fn copy_to_pieces(&self, range: Range<usize>, skip: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.slices(range, skip) {
            let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += piece.copy_to(rest);
        }
        done
    }

    /// Copies `data` to the pieces of `range`, behind their first `skip` bytes; returns how many bytes found room.
    #[inline]
    pub fn copy_from(&self, range: Range<usize>, skip: usize, data: &[u8]) -> usize {
        let done = match self.in_first(&range, skip, data.len()) {
            Some(piece) => {
                piece.copy_from(data);
                data.len()
            }
            None => self.copy_from_pieces(range.clone(), skip, data),
        };
        if self.is_logged {
            self.log(range, skip, done);
        }
        done
    }

    /// Writes `value` to the pieces of `range`, behind their first `skip` bytes, little-endian.
    #[inline]
    pub fn put_le16(&self, range: Range<usize>, skip: usize, value: u16) {
        let value = value.to_le();
        let place = self.in_first(&range, skip, size_of::<u16>());
        match place.as_ref().and_then(|piece| piece.get_ref(0).ok()) {
            Some(place) => place.store(value),
            None => _ = self.copy_from_pieces(range.clone(), skip, &value.to_ne_bytes()),
        }
        if self.is_logged {
            self.log(range, skip, size_of::<u16>());
        }
    }

    #[inline(never)]
    fn copy_from_pieces(&self, range: Range<usize>, skip: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.slices(range, skip) {
            let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) else { break };
            piece.copy_from(rest);
            done += rest.len().min(piece.len());
        }
        done
    }

    /// Enters in the log that `len` bytes of the pieces of `range` were written, behind their first `skip` bytes.
    #[cold]
    fn log(&self, range: Range<usize>, skip: usize, mut len: usize) {
        for piece in self.slices(range, skip) {
            let here = len.min(piece.len());
            self.mem.log_written(piece.ptr_guard().as_ptr().addr(), here);
            len -= here;
            if len == 0 {
                break;
            }
        }
    }

    /// As `log`, for what the kernel was to write behind `head` bytes of ours, given the `result` of the whole read.
    #[cold]
    fn log_read(&self, range: Range<usize>, skip: usize, head: usize, result: Result<usize, Errno>) {
        let len = match result {
            Ok(len) => len.saturating_sub(head),
            Err(Errno::FAULT) => READ_MAX,
            Err(_) => 0,
        };
        if len > 0 {
            self.log(range, skip, len);
        }
    }

    /// Sends all `parts` as one message or frame: of each part its private bytes, and then its pieces without their
    /// first `skip` bytes.
    ///
    /// # Errors
    /// What `writev(2)` says; `EINVAL` also where there are more than [`IOV_MAX`] pieces.
    pub fn writev<'a>(
        &mut self,
        fd: BorrowedFd<'_>,
        parts: impl IntoIterator<Item = Part<'a>>,
    ) -> Result<usize, Errno> {
        self.call.clear();
        for Part { private, pieces, skip } in parts {
            if !private.is_empty() {
                self.call.push(libc::iovec { iov_base: private.as_ptr().cast_mut().cast(), iov_len: private.len() });
            }
            gather(&mut self.call, &self.list, pieces, skip);
        }
        // SAFETY: an iovec is a part's `private`, borrowed for longer than this call and only read, or it lies in a
        // region of `self.mem` (`push` got it from there), which `self` keeps mapped. The guest may change those bytes
        // meanwhile, which only the kernel reads.
        result(unsafe { libc::writev(fd.as_raw_fd(), self.call.as_ptr(), count(&self.call)) })
    }

    /// Receives one message or frame into `head`, then the pieces of `range` without their first `skip` bytes, then
    /// `tail`; returns its length.
    ///
    /// # Errors
    /// What `readv(2)` says; `EINVAL` also where there are more than [`IOV_MAX`] pieces.
    pub fn readv(
        &mut self,
        fd: BorrowedFd<'_>,
        head: &mut [u8],
        (range, skip): (Range<usize>, usize),
        tail: &mut [u8],
    ) -> Result<usize, Errno> {
        self.call.clear();
        self.call.push(libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() });
        gather(&mut self.call, &self.list, range.clone(), skip);
        self.call.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        // SAFETY: the first and the last iovec are `head` and `tail`, borrowed mutably until the call returns; each
        // other one lies in a region of `self.mem` (`push` got it from there), mapped writable and kept by `self`. No
        // Rust reference to those bytes exists anywhere.
        let result = result(unsafe { libc::readv(fd.as_raw_fd(), self.call.as_ptr(), count(&self.call)) });
        if self.is_logged {
            self.log_read(range, skip, head.len(), result);
        }
        result
    }

    /// As [`GuestIovecs::readv`], from a socket, with the control messages that come along; returns both lengths.
    ///
    /// # Errors
    /// What `recvmsg(2)` says; `EMSGSIZE` also where there are more than [`IOV_MAX`] pieces.
    pub fn recvmsg(
        &mut self,
        fd: BorrowedFd<'_>,
        head: &mut [u8],
        (range, skip): (Range<usize>, usize),
        (tail, control): (&mut [u8], &mut [u8]),
    ) -> Result<(usize, usize), Errno> {
        self.call.clear();
        self.call.push(libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() });
        gather(&mut self.call, &self.list, range.clone(), skip);
        self.call.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        // SAFETY: all zeros is a valid msghdr: null pointers and lengths of 0.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.call.as_mut_ptr();
        message.msg_iovlen = self.call.len() as _;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = control.len() as _;
        // SAFETY: `message` names the iovecs of `call`, of which each is memory of ours or of the guest as in `readv`,
        // and `control`, borrowed mutably until the call returns.
        let result = result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) });
        if self.is_logged {
            self.log_read(range, skip, head.len(), result);
        }
        Ok((result?, message.msg_controllen as usize))
    }

    /// The pieces of `range` behind their first `skip` bytes.
    fn slices(&self, range: Range<usize>, mut skip: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.list.get(range).unwrap_or_default().iter().filter_map(move |piece| {
            let here = skip.min(piece.iov_len);
            skip -= here;
            self.slice(piece, here, piece.iov_len - here).filter(|slice| !slice.is_empty())
        })
    }

    /// The `len` bytes behind the first `skip` of `range`, if they are all in its first piece, as those of most frames
    /// are.
    #[inline]
    fn in_first(&self, range: &Range<usize>, skip: usize, len: usize) -> Option<VolatileSlice<'_>> {
        if range.is_empty() {
            return None;
        }
        self.slice(self.list.get(range.start)?, skip, len)
    }

    /// The `len` bytes behind the first `skip` of a piece, if it has so many.
    #[inline]
    fn slice(&self, piece: &libc::iovec, skip: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let is_inside = skip <= piece.iov_len && len <= piece.iov_len - skip;
        let base = piece.iov_base.cast::<u8>().wrapping_add(skip);
        // SAFETY: `base .. base + len` is within the piece, which lies in a mapped region of `self.mem` (`push` got it
        // from there), and the slice cannot outlive `self`.
        is_inside.then(|| unsafe { VolatileSlice::new(base, len) })
    }
}

/// Adds a piece to the part of a chain that starts at `part`, or makes the part's last piece longer by it.
#[inline]
fn append(list: &mut Vec<libc::iovec>, part: usize, base: *mut u8, len: usize) {
    match list.get_mut(part..).and_then(<[_]>::last_mut) {
        Some(last) if last.iov_base.addr().wrapping_add(last.iov_len) == base.addr() => last.iov_len += len,
        _ => list.push(libc::iovec { iov_base: base.cast(), iov_len: len }),
    }
}

/// Appends the pieces of `range` to one call's iovecs, without their first `skip` bytes. No piece is empty.
#[inline]
fn gather(call: &mut Vec<libc::iovec>, list: &[libc::iovec], range: Range<usize>, mut skip: usize) {
    let mut pieces = list.get(range).unwrap_or_default();
    while let [piece, rest @ ..] = pieces
        && skip > 0
    {
        pieces = rest;
        if skip < piece.iov_len {
            let iov_base = piece.iov_base.cast::<u8>().wrapping_add(skip).cast();
            call.push(libc::iovec { iov_base, iov_len: piece.iov_len - skip });
        }
        skip = skip.saturating_sub(piece.iov_len);
    }
    // Most frames to send are one piece, of which the start is left out.
    if !pieces.is_empty() {
        call.extend_from_slice(pieces);
    }
}

fn count(call: &[libc::iovec]) -> libc::c_int {
    // A count that does not fit an int is too large for the kernel, too: it answers EINVAL to -1 as to 1025.
    libc::c_int::try_from(call.len()).unwrap_or(-1)
}

/// What a call returned, or its error.
fn result(returned: isize) -> Result<usize, Errno> {
    let last_errno = |_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO);
    usize::try_from(returned).map_err(last_errno)
}
