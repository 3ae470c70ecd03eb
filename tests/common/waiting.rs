//! Waiting for events, never without a bound.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

/// How long an event that must come is waited for. Generous: the machine may be busy, and what the product gives up after
/// five seconds is to be seen as what it makes of that. Only a test that fails waits so long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long to watch for an event that must not come.
pub const QUIET: Duration = Duration::from_millis(100);

/// Tells the other threads of a test to end: when it is dropped, so also where the test fails meanwhile. A scope waits for
/// its threads, and with a flag that nobody sets it would wait for ever.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until `fd` has one of `events` (or hung up); false when `timeout` passed.
pub fn wait_for(fd: impl AsFd, events: PollFlags, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&fd, events)], Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("Cannot poll: {error}"),
        }
    }
}

/// Waits until `fd` can be read (or its peer hung up); false when `timeout` passed.
pub fn wait_readable(fd: impl AsFd, timeout: Duration) -> bool {
    wait_for(fd, PollFlags::IN, timeout)
}

/// The eventfd as something to wait on, or to send.
pub fn fd_of(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `eventfd` owns its descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

/// Waits until something is so of which no event tells.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "Not so: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
