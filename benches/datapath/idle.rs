//! What a back-end costs that has nothing to do, and how soon it is there.

use std::time::{Duration, Instant};

use crate::cases::mixed;
use crate::guest::{FEATURES, Guest};
use crate::place::{OURS, Place, Process};

/// What an idle back-end costs.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    pub wakeups_per_s: f64,
    pub memory_kib: [u64; 2],
    pub until_listening: Duration,
    pub until_first_frame: Duration,
}

/// How often it is started for the times until it listens and sends.
const STARTS: usize = 9;

pub fn measure(seconds: u64) -> Idle {
    let rest = |pairs: usize| {
        let started = Started::new(pairs);
        // The second after the start is for what is put off.
        std::thread::sleep(Duration::from_millis(1500));
        let before = started.process.wakeups();
        std::thread::sleep(Duration::from_secs(seconds));
        let wakeups = (started.process.wakeups() - before) as f64 / seconds as f64;
        (wakeups, started.process.memory_kib())
    };
    let (one, two) = (rest(1), rest(2));
    let starts: Vec<_> = (0..STARTS).map(|_| Started::new(1)).map(|started| started.until).collect();
    let median = |which: usize| {
        let mut times: Vec<_> = starts.iter().map(|until| until[which]).collect();
        times.sort_unstable();
        times[STARTS / 2]
    };
    Idle {
        wakeups_per_s: one.0.max(two.0),
        memory_kib: [one.1, two.1],
        until_listening: median(0),
        until_first_frame: median(1),
    }
}

/// A back-end that had its first frame.
struct Started {
    process: Process,
    /// Time from its start until it listened, and until that frame was sent.
    until: [Duration; 2],
    _guest: Guest,
    _place: Place,
}

impl Started {
    fn new(pairs: usize) -> Started {
        let place = Place::new(pairs > 1);
        let mut guest = Guest::new(pairs, &mixed(64), FEATURES);
        let begun = Instant::now();
        let process = place.launch(&OURS, pairs, &[]);
        guest.connect(&place.socket());
        guest.pairs[0].tx.pass(1);
        Started { until: [process.until_listening, begun.elapsed()], process, _guest: guest, _place: place }
    }
}
