//! Guest memory: the regions that a front-end handed over, and one immutable view of all of them.
//!
//! The vhost-user session maps regions and builds a [`MemView`] whenever the set changes (`vhost_user::memory`);
//! rings and chains only read a view. A view is never changed: a worker that holds one keeps every mapping in it alive
//! until it lets go, so an address that was checked stays mapped for as long as it is used.
//!
//! The guest writes this memory at any moment. Nothing here hands out a Rust reference to guest bytes: words are loaded
//! and stored through atomics, ranges are copied, and addresses for scatter-gather I/O go to `virtqueue::iovec` only.
//! Where a front-end takes memory away under the rings, `guard` keeps this process alive. This file knows no rings, no
//! messages and no networking.

pub mod dirty_log;
pub mod guard;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dirty_log::DirtyLog;
use guard::Guarded;
use rustix::fs::{FileType, OFlags, SealFlags};
use thiserror::Error;
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// A front-end's description of one memory region (vhost-user, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSetup {
    /// First guest-physical address.
    pub guest: u64,
    /// First address in the front-end's own address space, which its messages about rings use.
    pub user: u64,
    /// Its size in bytes.
    pub size: u64,
    /// The region's offset in the file, in bytes.
    pub file_offset: u64,
}

/// Why a region cannot be used.
#[derive(Debug, Error)]
pub enum MapError {
    /// The region has size 0.
    #[error("Memory region at guest address {guest:#x} has size 0")]
    Empty {
        /// The region's guest address.
        guest: u64,
    },
    /// An end address does not fit 64 bits.
    #[error("Memory region wraps around: {setup:x?}")]
    Wraps {
        /// What the front-end said.
        setup: RegionSetup,
    },
    /// The descriptor is a pipe, a socket, a directory or the like.
    #[error("Memory region's descriptor is a {kind:?}, not a file that can be mapped")]
    NotAFile {
        /// What it is.
        kind: FileType,
    },
    /// The descriptor was not opened for reading and writing.
    #[error("Memory region's descriptor is not open for reading and writing")]
    NotWritable,
    /// The file ends before the region does; touching the rest would raise SIGBUS.
    #[error("Memory region needs {needed:#x} bytes of its file, which has {has:#x} (is it shared memory, share=on?)")]
    FileTooShort {
        /// Bytes that the region needs.
        needed: u64,
        /// Bytes that the file has.
        has: u64,
    },
    /// The file could not be examined.
    #[error("Cannot examine a memory region's descriptor")]
    Stat(#[source] io::Error),
    /// The kernel refused the mapping.
    #[error("Cannot map {size:#x} bytes of guest memory at file offset {offset:#x}")]
    Map {
        /// Bytes to map.
        size: u64,
        /// Where in the file.
        offset: u64,
        /// What the kernel said.
        #[source]
        cause: vm_memory::mmap::MmapRegionError,
    },
    /// More mappings than can be guarded.
    #[error("Too many memory regions are mapped")]
    TooMany,
}

/// One mapped region of guest memory.
#[derive(Debug)]
pub struct Region {
    setup: RegionSetup,
    /// Dropped before `map`.
    guarded: Guarded,
    map: MmapRegion,
    /// The region's offset in `map`, which may begin earlier for alignment.
    lead: usize,
}

impl Region {
    /// Maps `setup` from `fd`, after checking that the file can be mapped and is long enough.
    ///
    /// # Errors
    /// [`MapError`]; nothing stays mapped then.
    pub fn map(setup: RegionSetup, fd: OwnedFd) -> Result<Region, MapError> {
        if setup.size == 0 {
            return Err(MapError::Empty { guest: setup.guest });
        }
        let ends = [setup.guest, setup.user, setup.file_offset].map(|start| start.checked_add(setup.size));
        let [Some(_), Some(_), Some(file_end)] = ends else {
            return Err(MapError::Wraps { setup });
        };
        // Keeps others from shortening the file under our feet. Only a memfd that was made for it can be sealed; for
        // all other files there is the guard.
        let _ = rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK);
        let align = check_file(&fd, file_end)?;
        let start = setup.file_offset & !(align - 1);
        let wraps = MapError::Wraps { setup };
        let Some(length) = (file_end - start).checked_next_multiple_of(align) else {
            return Err(wraps);
        };
        let (Ok(length), Ok(lead)) = (usize::try_from(length), usize::try_from(setup.file_offset - start)) else {
            return Err(wraps);
        };
        let map = MmapRegion::from_file(FileOffset::new(File::from(fd), start), length)
            .map_err(|cause| MapError::Map { size: length as u64, offset: start, cause })?;
        let begin = map.as_ptr() as usize;
        let guarded = Guarded::new(begin..begin + length).ok_or(MapError::TooMany)?;
        Ok(Region { setup, guarded, map, lead })
    }

    /// The front-end's description of this region.
    pub fn setup(&self) -> &RegionSetup {
        &self.setup
    }

    /// Whether its file was shortened, so that it holds only zeros now ([`guard`]).
    pub fn is_lost(&self) -> bool {
        self.guarded.is_lost()
    }

    /// The bytes `offset .. offset + len` of the region, if they are all inside it.
    pub(crate) fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(len as u64)?;
        if end > self.setup.size {
            return None;
        }
        // The region's size fits usize: a mapping of that size exists.
        self.map.get_slice(self.lead + offset as usize, len).ok()
    }

    /// The atomic word at `offset` of the region, if it is all inside and aligned.
    #[inline]
    pub(crate) fn atomic<T: AtomicInteger>(&self, offset: u64) -> Option<&T> {
        let end = offset.checked_add(size_of::<T>() as u64)?;
        if end > self.setup.size {
            return None;
        }
        self.map.get_atomic_ref(self.lead + offset as usize).ok()
    }

    /// The offset in this region of `host`, an address in our own address space, if it is here.
    fn offset_of(&self, host: usize) -> Option<u64> {
        let offset = host.wrapping_sub((self.map.as_ptr() as usize).wrapping_add(self.lead)) as u64;
        (offset < self.setup.size).then_some(offset)
    }

    fn contains_guest(&self, addr: u64) -> bool {
        addr.wrapping_sub(self.setup.guest) < self.setup.size
    }
}

/// Refuses a descriptor that cannot back a region ending at `file_end`; returns the alignment that its mappings need.
fn check_file(fd: &OwnedFd, file_end: u64) -> Result<u64, MapError> {
    let stat = rustix::fs::fstat(fd).map_err(|e| MapError::Stat(e.into()))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return Err(MapError::NotAFile { kind });
    }
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| MapError::Stat(e.into()))?;
    if !flags.contains(OFlags::RDWR) {
        return Err(MapError::NotWritable);
    }
    let has = u64::try_from(stat.st_size).unwrap_or(0);
    if has < file_end {
        return Err(MapError::FileTooShort { needed: file_end, has });
    }
    let fs = rustix::fs::fstatfs(fd).map_err(|e| MapError::Stat(e.into()))?;
    let page = rustix::param::page_size() as u64;
    // A huge page file is mapped and unmapped in whole huge pages, and st_blksize is their size.
    let huge = fs.f_type == libc::HUGETLBFS_MAGIC;
    let align = if huge { u64::try_from(stat.st_blksize).unwrap_or(page) } else { page };
    Ok(if align.is_power_of_two() { align } else { page })
}

/// An address range that is not wholly in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("Guest address {addr:#x}, {len} bytes: not in guest memory")]
pub struct Unmapped {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// All regions at one moment, sorted by guest address, and the log of what is written to them.
#[derive(Debug, Default)]
pub struct MemView {
    regions: Vec<Arc<Region>>,
    /// `(first, last)` guest address of each region; the search touches one cache line or two.
    spans: Vec<(u64, u64)>,
    log: Option<Arc<DirtyLog>>,
    /// Whether writes to buffers are logged.
    logs_buffers: bool,
}

impl MemView {
    /// A view of `regions`, or `None` where two of them overlap in guest address space.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Option<MemView> {
        regions.sort_by_key(|r| r.setup.guest);
        let spans: Vec<_> = regions.iter().map(|r| (r.setup.guest, r.setup.guest + (r.setup.size - 1))).collect();
        let disjoint = spans.windows(2).all(|pair| matches!(pair, [a, b] if a.1 < b.0));
        disjoint.then_some(MemView { regions, spans, log: None, logs_buffers: false })
    }

    /// The same regions with a log, and whether writes to buffers are entered in it, too, besides those to used rings.
    pub fn logged(&self, log: Option<Arc<DirtyLog>>, logs_buffers: bool) -> MemView {
        MemView { regions: self.regions.clone(), spans: self.spans.clone(), log, logs_buffers }
    }

    /// The log.
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// Whether [`MemView::log_written`] has to be called for writes to buffers.
    pub fn logs_buffers(&self) -> bool {
        self.logs_buffers && self.log.is_some()
    }

    /// Enters in the log that the `len` bytes at `host` in our own address space were written.
    ///
    /// They may belong to several regions that happen to lie side by side there.
    pub(crate) fn log_written(&self, mut host: usize, mut len: usize) {
        let Some(log) = &self.log else { return };
        while len > 0 {
            let found = self.regions.iter().find_map(|region| Some((region.setup, region.offset_of(host)?)));
            let Some((setup, offset)) = found else { return };
            // The length fits usize: it is the rest of a mapping, or less.
            let here = (setup.size - offset).min(len as u64);
            log.mark(setup.guest + offset, here);
            (host, len) = (host + here as usize, len - here as usize);
        }
    }

    /// The last guest address.
    pub fn last(&self) -> Option<u64> {
        self.spans.last().map(|(_, last)| *last)
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The region that holds guest address `addr`.
    #[inline]
    pub(crate) fn find(&self, addr: u64) -> Option<&Arc<Region>> {
        let at = self.spans.partition_point(|&(_, last)| last < addr);
        self.regions.get(at).filter(|region| region.contains_guest(addr))
    }

    /// Translates an address of the front-end's own address space, as `SET_VRING_ADDR` has it, to a guest address.
    pub fn user_to_guest(&self, user: u64) -> Option<u64> {
        let region = self.regions.iter().find(|r| user.wrapping_sub(r.setup.user) < r.setup.size)?;
        Some(region.setup.guest + (user - region.setup.user))
    }

    /// Calls `each` for every piece, contiguous in our address space, of the guest range `addr .. addr + len`.
    ///
    /// A range may run from one region into the next if the two are adjacent for the guest.
    ///
    /// # Errors
    /// [`Unmapped`] if any byte of the range is outside guest memory; `each` may have seen the pieces before it.
    #[inline]
    pub(crate) fn pieces(&self, addr: u64, len: u64, mut each: impl FnMut(VolatileSlice<'_>)) -> Result<(), Unmapped> {
        let bad = Unmapped { addr, len };
        let end = addr.checked_add(len).ok_or(bad)?;
        let mut at = addr;
        while at < end {
            let region = self.find(at).ok_or(bad)?;
            let offset = at - region.setup.guest;
            let here = (region.setup.size - offset).min(end - at);
            // `here` fits usize: it lies within a mapping.
            each(region.slice(offset, here as usize).ok_or(bad)?);
            at += here;
        }
        Ok(())
    }

    /// Copies guest memory at `addr` into `out`; each byte is read once.
    ///
    /// # Errors
    /// [`Unmapped`]; `out` may be partly written then.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), Unmapped> {
        let mut done = 0;
        self.pieces(addr, out.len() as u64, |piece| {
            if let Some(rest) = out.get_mut(done..) {
                done += piece.copy_to(rest);
            }
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
