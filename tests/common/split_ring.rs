//! The driver's side of one split virtqueue, as a driver writes it (VIRTIO 1.3, 2.7 "Split Virtqueues").
//!
//! The good path: `add` chains, `publish` them, `kick` if the device wants it, `take_used` what comes back.
//! A ring takes note of what it made available, so that it panics on what no device may do: return a head
//! that is not out, or return it twice.
//!
//! The bad path: every word of the ring can be written raw. A head made available by [`SplitRing::offer`]
//! needs no chain behind it.
//!
//! Ordering, as in 2.7.13 "Supplying Buffers to The Device" and 2.7.14 "Receiving Used Buffers From The Device":
//! `publish` releases `avail.idx`, to pair with the device's acquire load; `take_used` acquires `used.idx`, to pair
//! with the device's release store; a full fence stands between publishing and asking whether to kick, and
//! between asking for calls and looking for used buffers, since each is a store followed by a load of what the
//! other side stores.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::GuestMemory;
use super::virtio::{AVAIL_NO_INTERRUPT, USED_NO_NOTIFY, desc_flag};
use super::{fd_of, wait_readable};

/// A call that comes this late is as good as none.
const LATE: Duration = Duration::from_secs(1);

/// One element of a chain: guest memory that the device reads, or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buf {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

impl Buf {
    pub fn readable(addr: u64, len: usize) -> Self {
        Self { addr, len: len as u32, writable: false }
    }

    pub fn writable(addr: u64, len: usize) -> Self {
        Self { addr, len: len as u32, writable: true }
    }
}

/// A descriptor as it stands in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub const LEN: u64 = 16;

    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Where the parts of a ring lie in guest memory. Put them anywhere for odd layouts.
#[derive(Clone, Copy, Debug)]
pub struct RingAddrs {
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

impl RingAddrs {
    /// Takes room for a ring of `size` from `mem`.
    pub fn alloc(mem: &GuestMemory, size: u16) -> Self {
        let size = usize::from(size);
        Self { desc: mem.alloc(16 * size, 16), avail: mem.alloc(6 + 2 * size, 2), used: mem.alloc(6 + 8 * size, 4) }
    }
}

/// A chain that the device has.
struct Outstanding {
    head: u16,
    /// Descriptors to free with it; none for a raw head.
    descs: Vec<u16>,
}

/// An indirect table that is used again with its head descriptor.
#[derive(Clone, Copy, Default)]
struct Table {
    addr: u64,
    room: usize,
}

pub struct SplitRing {
    mem: Arc<GuestMemory>,
    pub size: u16,
    pub addrs: RingAddrs,
    /// Is EVENT_IDX negotiated?
    pub event_idx: bool,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    /// What the front-end says in `SET_VRING_BASE`: the index at which the ring began. After a reconnect, QEMU says
    /// the used index; cloud-hypervisor the avail index, unless IN_ORDER was negotiated.
    pub base: u16,
    free: Vec<u16>,
    tables: Vec<Table>,
    outstanding: VecDeque<Outstanding>,
    avail_idx: u16,
    /// `avail_idx` when the driver last asked whether to kick.
    kicked_idx: u16,
    last_used: u16,
    out_of_order: usize,
}

impl SplitRing {
    pub fn new(mem: &Arc<GuestMemory>, size: u16) -> Self {
        Self::starting_at(mem, size, 0)
    }

    /// A ring whose indices have come to `base` already: close to 65535 for tests of the wrap.
    pub fn starting_at(mem: &Arc<GuestMemory>, size: u16, base: u16) -> Self {
        Self::placed(mem, size, base, RingAddrs::alloc(mem, size))
    }

    pub fn placed(mem: &Arc<GuestMemory>, size: u16, base: u16, addrs: RingAddrs) -> Self {
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let ring = Self {
            mem: Arc::clone(mem),
            size,
            addrs,
            event_idx: false,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            base,
            free: (0..size).rev().collect(),
            tables: vec![Table::default(); usize::from(size)],
            outstanding: VecDeque::new(),
            avail_idx: base,
            kicked_idx: base,
            last_used: base,
            out_of_order: 0,
        };
        ring.write_avail_idx(base);
        ring.write_used_idx(base);
        ring.write_used_event(base);
        ring
    }

    pub fn mem(&self) -> &Arc<GuestMemory> {
        &self.mem
    }

    // The good path.

    /// Makes a direct chain available; not yet published. Panics if descriptors are short.
    pub fn add(&mut self, bufs: &[Buf]) -> u16 {
        self.try_add(bufs).expect("free descriptors")
    }

    /// Like [`SplitRing::add`], but `None` if descriptors are short.
    pub fn try_add(&mut self, bufs: &[Buf]) -> Option<u16> {
        assert!(!bufs.is_empty(), "A chain has a descriptor");
        let descs = self.take_free(bufs.len())?;
        for (k, buf) in bufs.iter().enumerate() {
            let desc = chained(buf, descs.get(k + 1).copied());
            self.write_desc(descs[k], desc);
        }
        Some(self.hand_over(descs))
    }

    /// Makes an indirect chain available; not yet published. Panics if descriptors are short.
    pub fn add_indirect(&mut self, bufs: &[Buf]) -> u16 {
        self.try_add_indirect(bufs).expect("a free descriptor")
    }

    /// Like [`SplitRing::add_indirect`], but `None` if descriptors are short.
    pub fn try_add_indirect(&mut self, bufs: &[Buf]) -> Option<u16> {
        let descs = self.take_free(1)?;
        let table = self.table_for(descs[0], bufs.len());
        for (k, buf) in bufs.iter().enumerate() {
            let next = (k + 1 < bufs.len()).then_some(k as u16 + 1);
            self.write_desc_at(table, k as u16, chained(buf, next));
        }
        let desc =
            Desc { addr: table, len: (bufs.len() as u64 * Desc::LEN) as u32, flags: desc_flag::INDIRECT, next: 0 };
        self.write_desc(descs[0], desc);
        Some(self.hand_over(descs))
    }

    /// Shows the device all that was added since.
    pub fn publish(&self) {
        self.write_avail_idx(self.avail_idx);
    }

    /// Does the device want to hear of what was published since the last time this was asked
    /// (2.7.10 "Available Buffer Notification Suppression")?
    pub fn needs_kick(&mut self) -> bool {
        // Pairs with the device's fence between storing avail_event or used.flags and loading avail.idx.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked_idx, self.avail_idx);
        if self.event_idx {
            need_event(self.avail_event(), self.avail_idx, old)
        } else {
            self.used_flags() & USED_NO_NOTIFY == 0
        }
    }

    /// Kicks, wanted or not.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Publishes, and kicks if the device wants it. Returns whether it did.
    pub fn publish_and_kick(&mut self) -> bool {
        self.publish();
        let wanted = self.needs_kick();
        if wanted {
            self.kick();
        }
        wanted
    }

    /// The next chain that the device gave back: its head and how many bytes it wrote.
    /// Panics on a head that the device does not have.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let (id, len) = self.used_entry(self.last_used);
        self.last_used = self.last_used.wrapping_add(1);
        self.take_back(id);
        Some((id as u16, len))
    }

    /// Like [`SplitRing::take_used`], but sleeps on the call eventfd while there is nothing. `None` when `timeout`
    /// passed; panics if by then there was a used buffer and no call for it.
    pub fn wait_used(&mut self, timeout: Duration) -> Option<(u16, u32)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.take_used() {
                return Some(used);
            }
            // A call that came for what was taken already must not hide that the next one is missing.
            self.take_calls();
            if self.enable_calls() {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait_call(left) && !self.called_late() {
                return None;
            }
        }
    }

    /// Nothing was called in time. Was anything used at the last moment? Then its call must follow.
    fn called_late(&self) -> bool {
        let used = self.used_idx() != self.last_used;
        assert!(!used || self.wait_call(LATE), "A buffer was used without a call");
        used
    }

    /// Asks for a call with the next used buffer. True if one is there already
    /// (2.7.7 "Used Buffer Notification Suppression").
    pub fn enable_calls(&self) -> bool {
        self.write_used_event(self.last_used);
        self.write_avail_flags(0);
        // Pairs with the device's fence between storing used.idx and loading used_event or avail.flags.
        fence(Ordering::SeqCst);
        self.used_idx() != self.last_used
    }

    /// Asks for no calls. With EVENT_IDX that is an event half the index space away.
    pub fn disable_calls(&self) {
        if self.event_idx {
            self.write_used_event(self.last_used.wrapping_add(0x8000));
        } else {
            self.write_avail_flags(AVAIL_NO_INTERRUPT);
        }
    }

    /// Asks for a call only when the used index passes `index`; without effect unless EVENT_IDX is negotiated.
    pub fn set_used_event(&self, index: u16) {
        self.write_used_event(index);
    }

    /// Waits for a call and takes it; false when `timeout` passed.
    pub fn wait_call(&self, timeout: Duration) -> bool {
        wait_readable(fd_of(&self.call), timeout) && self.call.read().is_ok()
    }

    /// How many calls came since the last look.
    pub fn take_calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Descriptors that are free.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Heads that the device has, in the order in which they were made available.
    pub fn outstanding(&self) -> Vec<u16> {
        self.outstanding.iter().map(|chain| chain.head).collect()
    }

    /// How often the device gave a chain back before an older one.
    pub fn out_of_order(&self) -> usize {
        self.out_of_order
    }

    /// Index that the next used buffer will have.
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// Index that the next available chain will have.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// A driver's reset: forgets everything and begins anew at index 0, as after a guest's reboot.
    pub fn reset(&mut self) {
        let fds = [&self.kick, &self.call, &self.err].map(|fd| fd.try_clone().unwrap());
        let event_idx = self.event_idx;
        *self = Self::placed(&self.mem, self.size, 0, self.addrs);
        [self.kick, self.call, self.err] = fds;
        self.event_idx = event_idx;
        self.write_avail_flags(0);
    }

    // The bad path.

    /// Makes `head` available, whatever its descriptor says; not yet published.
    pub fn offer(&mut self, head: u16) {
        self.outstanding.push_back(Outstanding { head, descs: Vec::new() });
        self.put_avail(head);
    }

    /// Makes `head` available without a note of it: use it for what must never come back.
    pub fn put_avail(&mut self, head: u16) {
        self.write_avail_entry(self.avail_idx, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Takes `count` descriptors out of the free ones, to write them raw.
    pub fn take_free(&mut self, count: usize) -> Option<Vec<u16>> {
        let left = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(left).into_iter().rev().collect())
    }

    /// Writes a descriptor of the ring's table.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        self.write_desc_at(self.addrs.desc, index, desc);
    }

    /// Writes a descriptor of any table.
    pub fn write_desc_at(&self, table: u64, index: u16, desc: Desc) {
        self.mem.write(table + Desc::LEN * u64::from(index), &desc.to_bytes());
    }

    /// Writes the avail ring's entry for the running index `idx`.
    pub fn write_avail_entry(&self, idx: u16, head: u16) {
        let addr = self.addrs.avail + 4 + 2 * u64::from(idx % self.size);
        self.mem.store_u16(addr, head, Ordering::Relaxed);
    }

    /// Writes `avail.idx`, whatever was added.
    pub fn write_avail_idx(&self, idx: u16) {
        self.mem.store_u16(self.addrs.avail + 2, idx, Ordering::Release);
    }

    pub fn write_avail_flags(&self, flags: u16) {
        self.mem.store_u16(self.addrs.avail, flags, Ordering::Relaxed);
    }

    pub fn write_used_event(&self, idx: u16) {
        let addr = self.addrs.avail + 4 + 2 * u64::from(self.size);
        self.mem.store_u16(addr, idx, Ordering::Relaxed);
    }

    /// Writes the device's own index.
    pub fn write_used_idx(&self, idx: u16) {
        self.mem.store_u16(self.addrs.used + 2, idx, Ordering::Release);
    }

    pub fn used_flags(&self) -> u16 {
        self.mem.load_u16(self.addrs.used, Ordering::Relaxed)
    }

    pub fn used_idx(&self) -> u16 {
        self.mem.load_u16(self.addrs.used + 2, Ordering::Acquire)
    }

    /// The used ring's entry for the running index `idx`: id and length.
    pub fn used_entry(&self, idx: u16) -> (u32, u32) {
        let addr = self.addrs.used + 4 + 8 * u64::from(idx % self.size);
        let word = |addr| self.mem.load_u32(addr, Ordering::Relaxed);
        (word(addr), word(addr + 4))
    }

    pub fn avail_event(&self) -> u16 {
        let addr = self.addrs.used + 4 + 8 * u64::from(self.size);
        self.mem.load_u16(addr, Ordering::Relaxed)
    }

    // Steps.

    fn hand_over(&mut self, descs: Vec<u16>) -> u16 {
        let head = descs[0];
        self.outstanding.push_back(Outstanding { head, descs });
        self.put_avail(head);
        head
    }

    fn take_back(&mut self, id: u32) {
        let at = self
            .outstanding
            .iter()
            .position(|chain| u32::from(chain.head) == id)
            .unwrap_or_else(|| panic!("The device returned head {id}, which it does not have"));
        self.out_of_order += usize::from(at > 0);
        let chain = self.outstanding.remove(at).unwrap();
        self.free.extend(chain.descs.iter().rev());
    }

    fn table_for(&mut self, head: u16, len: usize) -> u64 {
        let table = &mut self.tables[usize::from(head)];
        if table.room < len {
            let room = len.next_power_of_two();
            let addr = self.mem.alloc(room * Desc::LEN as usize, Desc::LEN);
            *table = Table { addr, room };
        }
        table.addr
    }
}

fn chained(buf: &Buf, next: Option<u16>) -> Desc {
    let write = if buf.writable { desc_flag::WRITE } else { 0 };
    let chain = if next.is_some() { desc_flag::NEXT } else { 0 };
    Desc { addr: buf.addr, len: buf.len, flags: write | chain, next: next.unwrap_or(0) }
}

/// Did an index pass `event` on its way from `old` to `new` (2.7.7.1, `vring_need_event`)?
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
