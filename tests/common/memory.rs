//! A guest's memory: regions of memfds at chosen guest addresses, and what a front-end hands over of each.
//!
//! Every region has three addresses that differ on purpose: where the guest sees it, where the front-end
//! says that it has it mapped (the address space of `SET_VRING_ADDR`), and where it really is mapped here
//! (known to nobody outside). A back-end that mixes them up finds nothing.
//!
//! The device on the other side writes to this memory at the same time. So all access is volatile, and
//! ring indices go through atomics. Reads and writes may cross from one region to an adjacent one; a hole
//! panics, since it is the test that asked.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// What [`RegionSpec::new`] puts between a region's guest address and its user address.
pub const USER_OFFSET: u64 = 0x7e00_0000_0000;

/// A region to make. Regions with the same `file` share one memfd.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    pub guest: u64,
    pub size: usize,
    pub user: u64,
    pub file: usize,
    pub offset: u64,
}

impl RegionSpec {
    /// A region at the start of memfd number 0, its user address apart from its guest address.
    pub fn new(guest: u64, size: usize) -> Self {
        Self { guest, size, user: guest + USER_OFFSET, file: 0, offset: 0 }
    }

    /// Puts the region at `offset` of memfd number `file`.
    pub fn in_file(self, file: usize, offset: u64) -> Self {
        Self { file, offset, ..self }
    }

    /// Claims `user` as the front-end's virtual address.
    pub fn at_user(self, user: u64) -> Self {
        Self { user, ..self }
    }

    fn end_in_file(&self) -> u64 {
        self.offset + self.size as u64
    }
}

/// What a front-end says of a region in `SET_MEM_TABLE` and `ADD_MEM_REG`. Copy it and lie as needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    pub guest: u64,
    pub size: u64,
    pub user: u64,
    pub offset: u64,
}

/// A mapped region.
pub struct Region {
    pub info: RegionInfo,
    file: File,
    map: MmapRegion,
}

impl Region {
    /// The memfd to hand over.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn map(file: &File, spec: &RegionSpec) -> Self {
        let file = file.try_clone().unwrap();
        let backing = FileOffset::new(file.try_clone().unwrap(), spec.offset);
        Self {
            info: RegionInfo { guest: spec.guest, size: spec.size as u64, user: spec.user, offset: spec.offset },
            file,
            map: MmapRegion::from_file(backing, spec.size).unwrap(),
        }
    }

    /// How many bytes of this region follow `addr`; none if it lies elsewhere.
    fn room_from(&self, addr: u64) -> Option<usize> {
        let at = addr.checked_sub(self.info.guest)?;
        let room = self.info.size.checked_sub(at)?;
        (room > 0).then_some(room as usize)
    }
}

/// A guest's memory. Share it in an `Arc`: all methods take `&self`.
pub struct GuestMemory {
    regions: Vec<Region>,
    /// Where [`GuestMemory::alloc`] goes on: region number and offset in it.
    next: Mutex<(usize, u64)>,
}

impl GuestMemory {
    /// Makes the memfds and maps the regions. A memfd ends where its last region ends.
    pub fn new(specs: &[RegionSpec]) -> Self {
        let count = specs.iter().map(|spec| spec.file + 1).max().unwrap_or(0);
        let files: Vec<File> = (0..count).map(|file| memfd_for(specs, file)).collect();
        let regions = specs.iter().map(|spec| Region::map(&files[spec.file], spec)).collect();
        Self { regions, next: Mutex::new((0, 0)) }
    }

    /// One region of `size` bytes at guest address 1 MiB.
    pub fn single(size: usize) -> Self {
        Self::new(&[RegionSpec::new(0x10_0000, size)])
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The front-end's virtual address of a guest address.
    pub fn user_addr(&self, guest: u64) -> u64 {
        let region = self.region_at(guest);
        region.info.user + (guest - region.info.guest)
    }

    /// Where `len` bytes of guest memory are in this process, as an iovec; for loops without a back-end.
    pub fn iovec(&self, addr: u64, len: usize) -> libc::iovec {
        let (region, at, _) = self.locate(addr);
        let slice = region.map.get_slice(at, len).unwrap();
        libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len }
    }

    /// Takes `len` bytes that nothing else uses, from the first region with room. There is no free.
    pub fn alloc(&self, len: usize, align: u64) -> u64 {
        let mut next = self.next.lock().unwrap();
        while let Some(region) = self.regions.get(next.0) {
            let addr = (region.info.guest + next.1).next_multiple_of(align);
            let end = addr - region.info.guest + len as u64;
            if end <= region.info.size {
                next.1 = end;
                return addr;
            }
            *next = (next.0 + 1, 0);
        }
        panic!("Guest memory has no {len} bytes left");
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let (region, at, room) = self.locate(addr + done as u64);
            let step = room.min(len - done);
            let part = region.map.get_slice(at, step).unwrap();
            part.copy_to(&mut bytes[done..done + step]);
            done += step;
        }
        bytes
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let (region, at, room) = self.locate(addr + done as u64);
            let step = room.min(bytes.len() - done);
            let part = region.map.get_slice(at, step).unwrap();
            part.copy_from(&bytes[done..done + step]);
            done += step;
        }
    }

    /// Fills a range, for canaries.
    pub fn fill(&self, addr: u64, len: usize, byte: u8) {
        self.write(addr, &vec![byte; len]);
    }

    /// All of memory, region by region: compare two to see what a device wrote.
    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        self.regions.iter().map(|region| self.read(region.info.guest, region.info.size as usize)).collect()
    }

    pub fn load_u16(&self, addr: u64, order: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(addr).load(order))
    }

    pub fn store_u16(&self, addr: u64, value: u16, order: Ordering) {
        self.atomic_u16(addr).store(value.to_le(), order);
    }

    pub fn load_u32(&self, addr: u64, order: Ordering) -> u32 {
        u32::from_le(self.atomic_u32(addr).load(order))
    }

    pub fn store_u32(&self, addr: u64, value: u32, order: Ordering) {
        self.atomic_u32(addr).store(value.to_le(), order);
    }

    pub fn load_u64(&self, addr: u64, order: Ordering) -> u64 {
        u64::from_le(self.atomic_u64(addr).load(order))
    }

    pub fn store_u64(&self, addr: u64, value: u64, order: Ordering) {
        self.atomic_u64(addr).store(value.to_le(), order);
    }

    fn atomic_u16(&self, addr: u64) -> &AtomicU16 {
        let (region, at, _) = self.locate(addr);
        region.map.get_atomic_ref(at).unwrap()
    }

    fn atomic_u32(&self, addr: u64) -> &AtomicU32 {
        let (region, at, _) = self.locate(addr);
        region.map.get_atomic_ref(at).unwrap()
    }

    fn atomic_u64(&self, addr: u64) -> &AtomicU64 {
        let (region, at, _) = self.locate(addr);
        region.map.get_atomic_ref(at).unwrap()
    }

    /// The region of `addr`, the offset in it, and the bytes from there to its end.
    fn locate(&self, addr: u64) -> (&Region, usize, usize) {
        let region = self.region_at(addr);
        let at = (addr - region.info.guest) as usize;
        (region, at, region.info.size as usize - at)
    }

    fn region_at(&self, addr: u64) -> &Region {
        self.regions
            .iter()
            .find(|region| region.room_from(addr).is_some())
            .unwrap_or_else(|| panic!("No guest memory at {addr:#x}"))
    }
}

/// A memfd of `size` bytes: for dirty logs, and for lies about regions.
pub fn memfd(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("guest-memory", flags).unwrap();
    ftruncate(&fd, size).unwrap();
    File::from(fd)
}

/// Memfd number `file`, as long as the regions in it need.
fn memfd_for(specs: &[RegionSpec], file: usize) -> File {
    let size = specs.iter().filter(|spec| spec.file == file).map(RegionSpec::end_in_file).max().unwrap_or(0);
    memfd(size)
}
