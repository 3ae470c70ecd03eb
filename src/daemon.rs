//! The control thread after start-up: accepts a front-end, serves it, accepts the next, until told to end.
//!
//! The event loop (crate `event-manager`) waits for the listener, the one session, the interface's events, the alarm
//! that a device or memory seems to be lost, signals, a stop request, and a timer that is armed only while something is
//! pending. It never waits for a descriptor that a front-end sent: those belong to the workers. `daemon::following`
//! handles what happens to the interface.

mod following;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::following::Following;
use crate::device::link_watch::LinkWatch;
use crate::host_side::HostSide;
use crate::mailbox::Stuck;
use crate::nic::Nic;
use crate::sandbox::syscalls::Role;
use crate::sandbox::{Level, Sandbox, SandboxError};
use crate::throttle::Throttle;
use crate::vhost_user::listener::SocketListener;
use crate::vhost_user::session::{Session, SessionOptions, SessionState};

/// How long no ring must have changed before device queues that nobody uses are detached: a front-end sets rings up one
/// after the other, and detaching a queue loses the frames that wait in it.
const SETTLE: Duration = Duration::from_secs(1);

/// How long to leave the listener alone after `accept` failed, most likely for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Where front-ends come from.
#[derive(Debug)]
pub enum Source {
    /// They connect, one after the other.
    Listener(SocketListener),
    /// There is one, already connected, and the process ends with it.
    Connected(UnixStream),
}

impl Source {
    /// The directory of the socket to which front-ends connect, if they do.
    pub fn directory(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Source::Listener(listener) => Some(listener.directory()),
            Source::Connected(_) => None,
        }
    }
}

/// What a daemon needs besides its card.
pub struct DaemonSetup {
    /// Where front-ends come from.
    pub source: Source,
    /// What sessions offer of the protocol.
    pub session: SessionOptions,
    /// The host's interface, to be opened again when it is deleted and comes back.
    pub host: HostSide,
    /// The subscription to the interface's events, if there is one.
    pub watch: Option<LinkWatch>,
}

/// Why the daemon ends with an error.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The event loop failed.
    #[error("The event loop failed: {0}")]
    EventLoop(event_manager::Error),
    /// A descriptor cannot be added to the event loop.
    #[error("Cannot wait for what is to be served")]
    NotWatched,
    /// A worker does not answer.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// The sandbox cannot be closed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The interface was deleted, and is not to be waited for.
    #[error("Interface {name:?} was deleted, which is to end this process (--on-device-loss exit)")]
    DeviceLost {
        /// The interface.
        name: String,
    },
    /// The kernel has no descriptor for the event loop.
    #[error("Cannot set up the event loop")]
    SetUp(#[source] std::io::Error),
}

/// The events of the loop. Their numbers are the data of epoll's events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Stop,
    Signal,
    Timer,
    Listener,
    Session,
    Link,
    Alarm,
}

const TOKENS: [Token; 7] =
    [Token::Stop, Token::Signal, Token::Timer, Token::Listener, Token::Session, Token::Link, Token::Alarm];

/// The signals that are handled as events.
fn signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1].into_iter().collect()
}

/// Blocks the signals, so that none ends the process in the middle of something. To be called before any thread is
/// started.
///
/// # Errors
/// What `sigprocmask(2)` says.
pub fn block_signals() -> std::io::Result<()> {
    signals().thread_block().map_err(std::io::Error::from)
}

/// Raises the limits of this process: as many descriptors as it may have (each memory region, kick and call is one),
/// and as much locked memory (for batches).
pub fn raise_limits() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    if setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }).is_err() {
        let limit = getrlimit(Resource::Memlock);
        // A process may always raise its limit to the maximum.
        let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit });
    }
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::warn!("Cannot raise the limit of open files from {:?}: {error}", limit.current);
    }
}

/// Serves one front-end after another on the control thread.
pub struct Daemon {
    nic: Arc<Nic>,
    options: SessionOptions,
    listener: Option<SocketListener>,
    /// The connection that the process was started with, until the loop begins.
    connected: Option<UnixStream>,
    session: Option<Session>,
    stop: EventFd,
    signals: SignalFd,
    following: Following,
    timer: TimerFd,
    settle_at: Option<Instant>,
    /// When to watch the listener again, while it is not watched.
    listen_at: Option<Instant>,
    has_ended: bool,
    /// Why the loop has ended, if not because it was told to.
    failure: Option<DaemonError>,
    throttle: Throttle,
    sandbox: Level,
}

impl Daemon {
    /// Makes a daemon for `nic`. If the signals are blocked ([`block_signals`]), SIGTERM, SIGINT and SIGHUP end it, and
    /// SIGUSR1 logs the counters.
    ///
    /// # Errors
    /// Where the kernel has no descriptors for it.
    pub fn new(nic: Nic, setup: DaemonSetup) -> Result<Daemon, DaemonError> {
        let DaemonSetup { source, session: options, host, watch } = setup;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let (listener, connected) = match source {
            Source::Listener(listener) => (Some(listener), None),
            Source::Connected(stream) => (None, Some(stream)),
        };
        Ok(Daemon {
            nic: Arc::new(nic),
            options,
            listener,
            connected,
            session: None,
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DaemonError::SetUp)?,
            signals: SignalFd::with_flags(&signals(), flags).map_err(|e| DaemonError::SetUp(e.into()))?,
            following: Following::new(host, watch),
            timer: TimerFd::new().map_err(|e| DaemonError::SetUp(e.into()))?,
            settle_at: None,
            listen_at: None,
            has_ended: false,
            failure: None,
            throttle: Throttle::default(),
            sandbox: Level::Off,
        })
    }

    /// An eventfd that ends the loop when it is written to.
    ///
    /// # Errors
    /// Where the kernel has no descriptor for it.
    pub fn stop_handle(&self) -> Result<EventFd, DaemonError> {
        self.stop.try_clone().map_err(DaemonError::SetUp)
    }

    /// The card, for its counters.
    pub fn nic(&self) -> Arc<Nic> {
        Arc::clone(&self.nic)
    }

    /// Closes the sandbox around this thread, and serves until told to end, or until the one connection ends. Then all
    /// rings are stopped and the socket is removed.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub fn run(mut self, sandbox: Sandbox) -> Result<(), DaemonError> {
        let mut manager = EventManager::new().map_err(DaemonError::EventLoop)?;
        self.sandbox = sandbox.level();
        sandbox.confine(Role::Control)?;
        let id = manager.add_subscriber(self);
        loop {
            let daemon = manager.subscriber_mut(id).map_err(DaemonError::EventLoop)?;
            if daemon.has_ended {
                break;
            }
            manager.run().map_err(DaemonError::EventLoop)?;
        }
        let mut daemon = manager.remove_subscriber(id).map_err(DaemonError::EventLoop)?;
        daemon.session = None;
        daemon.log_counters();
        daemon.failure.map_or(Ok(()), Err)
    }

    fn log_counters(&self) {
        let process = format!("process sandbox={}", self.sandbox);
        self.nic
            .counter_lines()
            .chain(self.interface_counters())
            .chain([process])
            .for_each(|line| log::info!("Counters: {line}"));
    }

    fn begin(&mut self, stream: UnixStream, ops: &mut EventOps) {
        match Session::new(stream, Arc::clone(&self.nic), self.options) {
            Ok(session) if watch(session.as_fd().as_raw_fd(), Token::Session, ops) => {
                log::info!("Front-end connected");
                self.session = Some(session);
            }
            Ok(_) => {}
            Err(error) => log::error!("Cannot serve a front-end: {error}"),
        }
    }

    fn end_session(&mut self, ops: &mut EventOps) {
        if let Some(session) = self.session.take() {
            unwatch(&session, Token::Session, ops);
            // Stops the session's rings before the next front-end is accepted.
            drop(session);
            log::info!("Front-end disconnected");
            self.has_ended |= self.listener.is_none();
        }
    }

    /// Ends a session whose memory was taken away under the rings.
    fn look_for_lost_memory(&mut self, ops: &mut EventOps) {
        if let Some(lost) = self.session.as_ref().and_then(Session::lost_memory) {
            log::error!(
                "{lost} is gone, so the session ends: the front-end shortened its file, or the host \
                 has no room for it (a full /dev/shm, too few huge pages)"
            );
            self.end_session(ops);
        }
    }

    fn process_session(&mut self, ops: &mut EventOps) {
        let Some(session) = &mut self.session else { return };
        match session.process() {
            SessionState::Open => {}
            SessionState::Over => return self.end_session(ops),
            SessionState::Failed(stuck) => {
                self.fail(stuck.into());
                return self.end_session(ops);
            }
        }
        if session.take_unsettled() {
            self.settle_at = Some(Instant::now() + SETTLE);
        }
        // A front-end that does not read its replies is not read from.
        let wanted = if session.wants_write() { EventSet::OUT } else { EventSet::IN };
        let events = Events::with_data_raw(session.as_fd().as_raw_fd(), Token::Session as u32, wanted);
        if let Err(error) = ops.modify(events) {
            log::error!("Cannot wait for the front-end: {error}");
            self.end_session(ops);
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Some(listener) = &self.listener else { return };
        let accepted = match listener.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => return,
            Err(error) => {
                log::error!("Cannot accept a front-end, trying again in {ACCEPT_AGAIN:?}: {error}");
                unwatch(listener, Token::Listener, ops);
                self.listen_at = Some(Instant::now() + ACCEPT_AGAIN);
                return;
            }
        };
        if self.session.as_ref().is_some_and(has_hung_up) {
            self.end_session(ops);
        }
        if self.session.is_none() {
            self.begin(accepted, ops);
        } else if self.throttle.allows() {
            log::warn!("Refused a second front-end: one is being served");
        }
    }

    fn fail(&mut self, error: DaemonError) {
        self.failure = Some(error);
        self.has_ended = true;
    }

    /// Ends the loop with an error unless `done`; the cause was logged.
    fn fail_unless(&mut self, done: bool) {
        if !done {
            self.fail(DaemonError::NotWatched);
        }
    }

    fn watch_listener(&mut self, ops: &mut EventOps) {
        if let Some(listener) = &self.listener {
            let watched = watch(listener.as_fd().as_raw_fd(), Token::Listener, ops);
            self.fail_unless(watched);
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo == Signal::SIGUSR1 as u32 {
                self.log_counters();
            } else {
                log::info!("Ending on a signal");
                self.has_ended = true;
            }
        }
    }

    /// Handles what is due. Nothing may be due any more: an event before this one in the same round may have handled it
    /// and armed the timer anew. So the timer is not read, as the read would then wait; arming it clears its event,
    /// too.
    fn tick(&mut self, ops: &mut EventOps) {
        let now = Instant::now();
        if self.listen_at.take_if(|at| *at <= now).is_some() {
            self.watch_listener(ops);
        }
        self.follow_by_time(now, ops);
        if self.settle_at.take_if(|at| *at <= now).is_some()
            && let Err(stuck) = self.nic.detach_unused()
        {
            self.fail(stuck.into());
        }
        self.process_session(ops);
    }

    /// Arms the timer for what is due next, if anything is.
    fn arm_timer(&mut self) {
        let deadlines = [
            self.settle_at,
            self.following.deadline(),
            self.listen_at,
            self.session.as_ref().and_then(Session::deadline),
        ];
        let armed = match deadlines.into_iter().flatten().min() {
            // Zero would disarm the timer.
            Some(at) => {
                self.timer.reset(at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)), None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = armed {
            log::error!("Cannot set the timer: {error}");
        }
    }
}

impl MutEventSubscriber for Daemon {
    fn init(&mut self, ops: &mut EventOps) {
        let stop = self.stop.as_raw_fd();
        let timer = self.timer.as_raw_fd();
        let signals = self.signals.as_fd().as_raw_fd();
        let alarm = self.nic.alarm().as_raw_fd();
        let watched = [(stop, Token::Stop), (timer, Token::Timer), (alarm, Token::Alarm), (signals, Token::Signal)];
        for (fd, token) in watched {
            let watched = watch(fd, token, ops);
            self.fail_unless(watched);
        }
        self.watch_listener(ops);
        self.begin_following(ops);
        self.arm_timer();
        if let Some(stream) = self.connected.take() {
            self.begin(stream, ops);
            self.fail_unless(self.session.is_some());
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match TOKENS.get(events.data() as usize) {
            Some(Token::Stop) => self.has_ended = true,
            Some(Token::Signal) => self.take_signals(),
            Some(Token::Timer) => self.tick(ops),
            Some(Token::Listener) => self.accept(ops),
            Some(Token::Session) => self.process_session(ops),
            Some(Token::Link) => self.follow_link(ops),
            Some(Token::Alarm) => self.take_alarm(ops),
            None => {}
        }
        self.arm_timer();
    }
}

/// Watches `fd` from now on; returns whether that succeeded.
fn watch(fd: RawFd, token: Token, ops: &mut EventOps) -> bool {
    let watched = ops.add(Events::with_data_raw(fd, token as u32, EventSet::IN));
    watched.inspect_err(|error| log::error!("Cannot wait for {token:?}: {error}")).is_ok()
}

fn unwatch(fd: &impl AsFd, token: Token, ops: &mut EventOps) {
    let events = Events::with_data_raw(fd.as_fd().as_raw_fd(), token as u32, EventSet::IN);
    if let Err(error) = ops.remove(events) {
        log::error!("Cannot stop waiting for {token:?}: {error}");
    }
}

/// Whether the front-end has closed its end; what it sent before may be unread.
fn has_hung_up(session: &Session) -> bool {
    let mut fds = [PollFd::new(session, PollFlags::RDHUP)];
    let polled = poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_ok_and(|ready| ready > 0)
}
