//! Panics of the library's own threads. Nobody asks such a thread how it ended: without this a test passes beside a worker
//! that died, as long as it wants nothing more of it.

use std::panic;
use std::sync::{Mutex, Once, PoisonError};
use std::thread;

/// Of which threads, by how their names begin: those of tests are named after functions, which have no hyphen.
const OF: [&str; 2] = ["pair-", "control-queue"];

/// Those that no test was told of.
static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Has them noted from now on, besides what is done with them anyway.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let current = thread::current();
            let name = current.name().unwrap_or_default();
            if OF.iter().any(|start| name.starts_with(start)) {
                SEEN.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{name}: {info}"));
            }
            usual(info);
        }));
    });
}

/// Those since the last time. Threads of back-ends in the same process have the same names, so a panic may be told to a
/// test beside the one that it belongs to.
pub fn take() -> Vec<String> {
    std::mem::take(&mut SEEN.lock().unwrap_or_else(PoisonError::into_inner))
}
