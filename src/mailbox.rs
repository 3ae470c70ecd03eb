//! The way to talk to a thread that owns something: closures, which the owner runs between two passes.
//!
//! [`Mailbox::call`] waits for the result, so its caller knows that the change is in effect. The owner is never
//! interrupted and takes no lock; a look into an empty [`Inbox`] is two loads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

type Job<T> = Box<dyn FnOnce(&mut T) + Send>;

/// How long a thread may wait for the host besides.
const HOST_PATIENCE: Duration = Duration::from_secs(120);

/// How many threads of this process wait for the host.
static WAITING_FOR_HOST: AtomicUsize = AtomicUsize::new(0);

/// Makes a system call that changes a network interface, for which the kernel takes a lock (RTNL) that others on the host
/// may hold for many seconds. Meanwhile no thread counts as [`Stuck`]: it may be this one, or one that waits for it.
pub(crate) fn wait_for_host<R>(call: impl FnOnce() -> R) -> R {
    WAITING_FOR_HOST.fetch_add(1, Relaxed);
    let result = call();
    WAITING_FOR_HOST.fetch_sub(1, Relaxed);
    result
}

/// A thread did not do what it was asked in time.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("Thread {name} did not answer in time: it ended, or guest memory or the host does not answer")]
pub struct Stuck {
    /// The thread's name.
    pub name: String,
}

/// The callers' end. Dropping it ends the thread and waits for its end.
pub struct Mailbox<T> {
    name: String,
    patience: Duration,
    /// `None` only while being dropped.
    jobs: Option<Sender<Job<T>>>,
    wake: Arc<EventFd>,
    /// Whether the owner did not answer once: nobody waits for it again.
    is_stuck: AtomicBool,
    thread: Option<JoinHandle<()>>,
}

/// The owner's end.
pub(crate) struct Inbox<T> {
    jobs: Receiver<Job<T>>,
    wake: Arc<EventFd>,
}

impl<T: 'static> Mailbox<T> {
    /// Starts a thread that runs `run`, and gives it `patience` for each job. `run` must look into its inbox whenever
    /// the wake-up descriptor is readable, and end when [`Inbox::run_jobs`] returns false.
    pub(crate) fn spawn(
        name: String,
        patience: Duration,
        run: impl FnOnce(Inbox<T>) + Send + 'static,
    ) -> io::Result<Mailbox<T>> {
        let (sender, receiver) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let inbox = Inbox { jobs: receiver, wake: Arc::clone(&wake) };
        let spawned = std::thread::Builder::new().name(name.clone()).spawn(move || run(inbox));
        let thread = spawned.map_err(|cause| {
            io::Error::new(
                cause.kind(),
                format!("Cannot start thread {name} (too little memory, or too many threads?): {cause}"),
            )
        })?;
        Ok(Mailbox { name, patience, jobs: Some(sender), wake, is_stuck: AtomicBool::new(false), thread: Some(thread) })
    }

    /// Has the owner run `job`, and waits for the result.
    ///
    /// # Errors
    /// [`Stuck`]; the job may still run later.
    pub fn call<R: Send + 'static>(&self, job: impl FnOnce(&mut T) -> R + Send + 'static) -> Result<R, Stuck> {
        let stuck = || {
            self.is_stuck.store(true, Relaxed);
            Stuck { name: self.name.clone() }
        };
        if self.is_stuck.load(Relaxed) {
            return Err(stuck());
        }
        let (answer, answered) = mpsc::sync_channel(1);
        let job: Job<T> = Box::new(move |owner| {
            // After a time-out nobody waits for the result any more.
            let _ = answer.send(job(owner));
        });
        let jobs = self.jobs.as_ref().ok_or_else(stuck)?;
        jobs.send(job).map_err(|_| stuck())?;
        self.wake.write(1).map_err(|_| stuck())?;
        let begun = Instant::now();
        loop {
            match answered.recv_timeout(self.patience) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Timeout)
                    if WAITING_FOR_HOST.load(Relaxed) > 0 && begun.elapsed() < HOST_PATIENCE => {}
                Err(_) => return Err(stuck()),
            }
        }
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        self.jobs = None;
        let answers = self.wake.write(1).is_ok() && !self.is_stuck.load(Relaxed);
        // A thread that does not answer ends with the process.
        if let Some(thread) = self.thread.take().filter(|_| answers) {
            // A panic of that thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl<T> Inbox<T> {
    /// The descriptor that is readable when a job is there.
    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Takes the wake-up, so that it does not come again for the same jobs.
    pub(crate) fn clear(&self) {
        // An empty eventfd only means that its job was seen already.
        let _ = self.wake.read();
    }

    /// Runs the jobs that are there; returns whether more may come.
    pub(crate) fn run_jobs(&self, owner: &mut T) -> bool {
        loop {
            match self.jobs.try_recv() {
                Ok(job) => job(owner),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_returns_after_the_owner_ran_it() {
        let mailbox = Mailbox::spawn("owner".to_owned(), Duration::from_secs(5), |inbox: Inbox<u32>| {
            let mut owned = 1;
            while inbox.run_jobs(&mut owned) {
                std::thread::yield_now();
            }
        })
        .expect("thread");
        assert_eq!(mailbox.call(|n| std::mem::replace(n, 5)), Ok(1));
        assert_eq!(mailbox.call(|n| *n), Ok(5));
    }

    /// The owner sleeps between two jobs, as the threads of the process do.
    #[test]
    fn owner_that_looks_only_when_it_is_woken_misses_nothing() {
        const CALLS: u32 = if cfg!(miri) { 10 } else { 2000 };
        let mailbox = Mailbox::spawn("owner".to_owned(), Duration::from_secs(60), |inbox: Inbox<u32>| {
            let mut owned = 0;
            loop {
                if inbox.wake().read().is_err() {
                    std::thread::yield_now();
                } else if !inbox.run_jobs(&mut owned) {
                    break;
                }
            }
        })
        .expect("thread");
        let call = || (0..CALLS).for_each(|_| assert!(mailbox.call(|n| *n += 1).is_ok()));
        std::thread::scope(|scope| {
            scope.spawn(call);
            scope.spawn(call);
        });
        assert_eq!(mailbox.call(|n| *n), Ok(2 * CALLS));
    }

    #[test]
    fn owner_that_waits_for_the_host_is_not_stuck() {
        let patience = Duration::from_millis(500);
        let mailbox = Mailbox::spawn("owner".to_owned(), patience, |inbox: Inbox<u32>| {
            let mut owned = 1;
            while inbox.run_jobs(&mut owned) {
                std::thread::yield_now();
            }
        })
        .expect("thread");
        let slow = move || std::thread::sleep(3 * patience);
        assert_eq!(mailbox.call(move |_| wait_for_host(slow)), Ok(()));
        assert_eq!(mailbox.call(move |_| slow()), Err(Stuck { name: "owner".to_owned() }));
    }

    #[test]
    fn call_to_a_thread_that_ended_is_an_error() {
        let mailbox = Mailbox::spawn("gone".to_owned(), Duration::from_secs(5), |_: Inbox<()>| {}).expect("thread");
        assert_eq!(mailbox.call(|_| ()), Err(Stuck { name: "gone".to_owned() }));
    }
}
