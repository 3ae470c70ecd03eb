//! Keeps the process alive when the file of guest memory is shortened after it was mapped. **Unsafe door 4.**
//!
//! The kernel raises SIGBUS in a thread that touches memory whose part of the file is gone, or for which a full file
//! system has no room. That would end the process, and a front-end could do it at will where the file cannot be sealed
//! against it. So each mapping of guest memory is entered here, and the signal's handler puts zeros in the place of the
//! whole mapping, marks it as lost and wakes the control thread, which ends the session. Until then the session's rings
//! see nothing but zeros. SIGBUS anywhere else ends the process.
//!
//! [`keep_what_is_freed`] is about memory of our own.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::hint;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, OnceLock};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

/// The most mappings at a time: twice the most regions of a session and its log, as new ones are mapped before the old
/// are let go.
const MAPPINGS_MAX: usize = 1024;

/// A mapping, or room for one. Its addresses are read and written under [`locked`] only.
#[derive(Debug)]
struct Entry {
    start: AtomicUsize,
    /// The address behind its last byte; 0 if there is no mapping.
    end: AtomicUsize,
    is_lost: AtomicBool,
}

static ENTRIES: [Entry; MAPPINGS_MAX] =
    [const { Entry { start: AtomicUsize::new(0), end: AtomicUsize::new(0), is_lost: AtomicBool::new(false) } };
        MAPPINGS_MAX];
static IS_LOCKED: AtomicBool = AtomicBool::new(false);
/// Signalled when memory is lost.
static ALARM: OnceLock<Arc<EventFd>> = OnceLock::new();

impl Entry {
    fn range(&self) -> Range<usize> {
        self.start.load(Relaxed)..self.end.load(Relaxed)
    }

    fn set(&self, range: Range<usize>) {
        self.start.store(range.start, Relaxed);
        self.end.store(range.end, Relaxed);
        self.is_lost.store(false, Relaxed);
    }
}

/// The entry of a mapping; dropping it takes the entry out, which happens before the mapping goes.
#[derive(Debug)]
pub(super) struct Guarded(&'static Entry);

impl Guarded {
    /// Enters the mapping at `addresses`; `None` if there are too many.
    pub(super) fn new(addresses: Range<usize>) -> Option<Guarded> {
        locked(|| {
            let entry = ENTRIES.iter().find(|entry| entry.range().end == 0)?;
            entry.set(addresses);
            Some(Guarded(entry))
        })
    }

    /// Whether the memory is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.0.is_lost.load(Acquire)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        locked(|| self.0.set(0..0));
    }
}

/// Has the process survive a loss of guest memory from now on, and signal it to `alarm`.
///
/// # Errors
/// What `sigaction(2)` says.
pub fn install(alarm: Arc<EventFd>) -> io::Result<()> {
    // Only the first alarm is kept: a process has one card.
    let _ = ALARM.set(alarm);
    register_signal_handler(libc::SIGBUS, on_sigbus).map_err(io::Error::from)
}

/// Has the C library keep the memory that a thread frees at the end of its arena, for the next use. To give it back,
/// the library would first look into a file of /proc, which no confined thread may open: the process would be ended.
pub fn keep_what_is_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers, and no other thread allocates: there is none yet.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, c_int::MAX);
    }
}

/// Does `act` while no other thread is in here. Not a mutex, which a signal handler must not wait for: a thread that is
/// in here touches no guest memory, so the handler never interrupts the thread that it waits for.
fn locked<R>(act: impl FnOnce() -> R) -> R {
    while IS_LOCKED.swap(true, Acquire) {
        hint::spin_loop();
    }
    let result = act();
    IS_LOCKED.store(false, Release);
    result
}

extern "C" fn on_sigbus(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel calls a handler that was registered with SA_SIGINFO, as `register_signal_handler` does, with a
    // pointer to what it says of the signal.
    let info = unsafe { &*info };
    // SAFETY: what it says of a SIGBUS has an address.
    let address = unsafe { info.si_addr() } as usize;
    // A misaligned access would raise the signal again for ever.
    if info.si_code == libc::BUS_ADRALN || !locked(|| put_zeros(address)) {
        std::process::abort();
    }
    // If this fails, the loss is noticed all the same, only later.
    let _ = ALARM.get().map(|alarm| alarm.write(1));
}

/// Replaces the mapping that holds `address`; returns whether there is one and it could be replaced.
fn put_zeros(address: usize) -> bool {
    let Some(entry) = ENTRIES.iter().find(|entry| entry.range().contains(&address)) else { return false };
    if entry.is_lost.load(Relaxed) {
        // Another thread replaced it while this one waited.
        return true;
    }
    let Range { start, end } = entry.range();
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: an entry covers one whole mapping, which stays until after the entry was taken out, so nothing but guest
    // memory is replaced; all access to that is through pointers and atomics that allow for any change of its bytes.
    let put = unsafe { mmap_anonymous(start as *mut c_void, end - start, ProtFlags::READ | ProtFlags::WRITE, flags) };
    entry.is_lost.store(put.is_ok(), Release);
    put.is_ok()
}

#[cfg(test)]
mod tests {
    use vm_memory::{MmapRegion, VolatileMemory};

    use super::*;

    fn addresses(map: &MmapRegion) -> Range<usize> {
        let start = map.as_ptr() as usize;
        start..start + map.size()
    }

    #[test]
    fn only_the_mapping_that_was_touched_gets_zeros() {
        let [one, other] = [(); 2].map(|()| MmapRegion::<()>::new(3 * 4096).expect("memory"));
        let guarded = [&one, &other].map(|map| Guarded::new(addresses(map)).expect("room"));
        let [a, b] = [&one, &other].map(|map| map.get_atomic_ref::<AtomicUsize>(2 * 4096).expect("inside"));
        [a, b].into_iter().for_each(|word| word.store(7, Relaxed));

        assert!(locked(|| put_zeros(addresses(&one).end - 1)));

        assert_eq!([a, b].map(|word| word.load(Relaxed)), [0, 7]);
        assert_eq!(guarded.each_ref().map(Guarded::is_lost), [true, false]);
        a.store(9, Relaxed);
        assert!(locked(|| put_zeros(addresses(&one).start)), "a thread that was late");
        assert_eq!(a.load(Relaxed), 9);
    }

    #[test]
    fn memory_that_is_no_guests_is_left_alone() {
        let map = MmapRegion::<()>::new(4096).expect("memory");
        drop(Guarded::new(addresses(&map)).expect("room"));
        assert!(!locked(|| put_zeros(addresses(&map).start)));
        assert!(!locked(|| put_zeros(0)));
    }
}
