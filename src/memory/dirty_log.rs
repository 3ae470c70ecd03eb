//! The log of written pages: it tells a front-end that moves the guest to another host while it runs which pages of
//! guest memory to copy once more (vhost-user, "Migration").
//!
//! It has a bit for each page of 4 KiB, from guest address 0 on, in memory that the front-end shares. The front-end
//! reads and clears bits at any moment, and copies a page after it cleared the page's bit. So a page is marked after it
//! was written, each time anew, and by an atomic operation: a bit that is set already may be one that is being cleared.
//!
//! Buffers are marked where they are written (`virtqueue::iovec`), used rings where their words are stored
//! (`virtqueue::split`). A write that is not to be logged costs a look at one flag.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Release;

use super::{MapError, MemView, Region, RegionSetup};

/// Bytes that a bit stands for, whatever the host's pages are (`VHOST_LOG_PAGE`).
const PAGE: u64 = 4096;

/// The log of written pages of one front-end.
#[derive(Debug)]
pub struct DirtyLog {
    bits: Region,
}

impl DirtyLog {
    /// Maps the log: `size` bytes of the file `fd` from `file_offset` on.
    ///
    /// # Errors
    /// [`MapError`]; nothing stays mapped then.
    pub fn map(size: u64, file_offset: u64, fd: OwnedFd) -> Result<DirtyLog, MapError> {
        let setup = RegionSetup { guest: 0, user: 0, size, file_offset };
        Ok(DirtyLog { bits: Region::map(setup, fd)? })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.bits.setup().size
    }

    /// Whether there is a bit for the page of `addr`.
    pub fn covers(&self, addr: u64) -> bool {
        addr / PAGE / 8 < self.size()
    }

    /// Whether its file was shortened, so that nobody sees what is marked.
    pub fn is_lost(&self) -> bool {
        self.bits.is_lost()
    }

    /// Marks the pages of `addr .. addr + len`; pages for which the log has no bit are left out.
    ///
    /// Release: whoever sees the bit sees what was written before.
    pub(crate) fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|more| addr.saturating_add(more) / PAGE) else { return };
        let first = addr / PAGE;
        for at in first / 8..=last / 8 {
            let Some(byte) = self.bits.atomic::<AtomicU8>(at) else { return };
            // In the first byte, leaves out the pages before the range; in the last, those behind it.
            let from = if at == first / 8 { 0xff << (first % 8) } else { 0xff };
            let to = if at == last / 8 { 0xff >> (7 - last % 8) } else { 0xff };
            byte.fetch_or(from & to, Release);
        }
    }

    /// Marks all pages of guest memory.
    pub(crate) fn mark_all(&self, mem: &MemView) {
        for RegionSetup { guest, size, .. } in mem.regions().iter().map(|region| region.setup()) {
            self.mark(*guest, *size);
        }
    }
}

/// Where in the log a used ring is logged, which need not be its place in guest memory (vhost-user, "Migration").
#[derive(Clone, Debug)]
pub(crate) struct UsedLog {
    pub(crate) log: Arc<DirtyLog>,
    /// The address in the log of the ring's first byte.
    pub(crate) addr: u64,
}

impl UsedLog {
    /// Marks `len` bytes of the ring from its byte `offset` on.
    pub(crate) fn mark(&self, offset: usize, len: usize) {
        self.log.mark(self.addr.saturating_add(offset as u64), len as u64);
    }
}
