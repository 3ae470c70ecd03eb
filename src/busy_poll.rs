//! Busy polling (`--poll-us`): how long a worker with nothing to do keeps looking before it sleeps.
//!
//! A worker that sleeps costs nothing, but waking it costs a kick, an interrupt for the other CPU and a thread switch.
//! One that looks at its rings for some microseconds more saves them if frames come soon. While it looks, kicks are
//! suppressed. It never looks for longer than its window at a time, so an idle card sleeps, and it lets other threads
//! of its CPU run between two looks: if one does, the host is busy, and the worker sleeps at once.
//!
//! `auto` chooses the window by how long the last sleep was. After a sleep that was shorter than the longest window,
//! the window grows, as it would have been better to wait awake; after a longer one there is no window.

use std::thread;
use std::time::{Duration, Instant};

/// The longest window of `auto`.
const AUTO_MAX: Duration = Duration::from_micros(50);
/// The first window of `auto`.
const AUTO_FIRST: Duration = Duration::from_micros(8);
/// A thread that had the CPU for so long had work to do.
const BUSY_HOST: Duration = Duration::from_micros(20);

/// How long to poll before sleeping, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// So long each time; not at all if zero.
    Fixed(Duration),
    /// As long as it pays.
    Auto,
}

impl Default for Polling {
    fn default() -> Polling {
        Polling::Fixed(Duration::ZERO)
    }
}

/// The polling of one worker.
#[derive(Debug)]
pub(crate) struct Poller {
    polling: Polling,
    window: Duration,
    /// Since when there has been nothing to do, and when the last look was.
    idle: Option<(Instant, Instant)>,
}

impl Poller {
    pub(crate) fn new(polling: Polling) -> Poller {
        let window = if let Polling::Fixed(window) = polling { window } else { Duration::ZERO };
        Poller { polling, window, idle: None }
    }

    /// Whether it pays to look once more before sleeping.
    pub(crate) fn is_on(&self) -> bool {
        !self.window.is_zero()
    }

    /// Notes that there was something to do.
    pub(crate) fn found_work(&mut self) {
        self.idle = None;
    }

    /// Whether to look again after a look that found nothing. Other threads of this CPU have their turn first.
    pub(crate) fn goes_on(&mut self) -> bool {
        if !self.is_on() {
            return false;
        }
        thread::yield_now();
        let now = Instant::now();
        let (since, last) = self.idle.get_or_insert((now, now));
        let others_run = now.duration_since(*last) > BUSY_HOST;
        *last = now;
        let goes_on = now.duration_since(*since) < self.window && !others_run;
        if !goes_on {
            self.idle = None;
        }
        goes_on
    }

    /// Sleeps by calling `wait`, and learns from how long that took.
    pub(crate) fn sleep<R>(&mut self, wait: impl FnOnce() -> R) -> R {
        if self.polling != Polling::Auto {
            return wait();
        }
        let before = Instant::now();
        let result = wait();
        self.slept(before.elapsed());
        result
    }

    fn slept(&mut self, time: Duration) {
        self.window = if time > AUTO_MAX { Duration::ZERO } else { (2 * self.window).clamp(AUTO_FIRST, AUTO_MAX) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_of_auto_grows_with_short_sleeps_and_goes_with_a_long_one() {
        let mut poller = Poller::new(Polling::Auto);
        assert!(!poller.is_on() && !poller.goes_on(), "An idle card does not begin with polling");
        let windows: Vec<_> = (0..5).map(|_| (poller.slept(Duration::from_micros(30)), poller.window).1).collect();
        assert_eq!(windows, [8, 16, 32, 50, 50].map(Duration::from_micros));
        poller.slept(Duration::from_millis(1));
        assert!(!poller.is_on());
    }

    #[test]
    fn window_ends_and_begins_anew_with_work() {
        let mut poller = Poller::new(Polling::Fixed(Duration::from_secs(3600)));
        // Unless the host is busy, which is for it to notice.
        assert!((0..1000).any(|_| poller.goes_on()));
        let before = poller.idle.map(|(since, _)| since - Duration::from_secs(3600));
        poller.idle = before.map(|since| (since, Instant::now()));
        assert!(!poller.goes_on());
        poller.found_work();
        assert_eq!(poller.idle, None);
    }
}
