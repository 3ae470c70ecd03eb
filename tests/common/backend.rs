//! The back-end under test: in this process with TAP doubles ([`InProcess`]), or the real binary ([`Spawned`]).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vhost_user_net::busy_poll::Polling;
use vhost_user_net::daemon::{Daemon, DaemonSetup, Source};
use vhost_user_net::device::passed::Passed;
use vhost_user_net::device::{Device, Io, Layer};
use vhost_user_net::host_side::{DeviceChoice, HostSide, OnLoss};
use vhost_user_net::nic::{Nic, NicSetup};
use vhost_user_net::sandbox::Sandbox;
use vhost_user_net::tuning::Tuning;
use vhost_user_net::vhost_user::listener::{SocketAccess, SocketListener};
use vhost_user_net::vhost_user::session::SessionOptions;
use vhost_user_net::virtqueue::QueueSize;
use vmm_sys_util::eventfd::EventFd;

use super::netns::NetNs;
use super::tap_double::TapDouble;
use super::{PATIENCE, panics};

/// The tests of the data path hold however the workers go about it: `VHOST_USER_NET_TEST_IO` says how frames are read and
/// written, `VHOST_USER_NET_TEST_POLL_US` for how long workers poll.
fn tuning_under_test() -> Tuning {
    let io = match std::env::var("VHOST_USER_NET_TEST_IO").as_deref() {
        Err(_) | Ok("auto") => Io::Auto,
        // A worker that cannot have it goes on without, and all would be tested another time with system calls.
        Ok("uring") => Io::Uring.usable().unwrap_or_else(|error| panic!("VHOST_USER_NET_TEST_IO=uring: {error}")),
        Ok("syscall") => Io::Syscall,
        Ok(other) => panic!("VHOST_USER_NET_TEST_IO={other} is not auto, uring or syscall"),
    };
    let micros = std::env::var("VHOST_USER_NET_TEST_POLL_US").map_or(0, |text| text.parse().unwrap());
    Tuning { io, polling: Polling::Fixed(Duration::from_micros(micros)), ..Tuning::default() }
}

fn default_options() -> SessionOptions {
    SessionOptions { offers_config: true, queue_size_max: QueueSize::try_from(32768).unwrap() }
}

/// A back-end in a thread of this process, with a TAP double for each queue pair.
pub struct InProcess {
    pub taps: Vec<TapDouble>,
    /// None only while being dropped.
    nic: Option<Arc<Nic>>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    dir: TempDir,
}

impl InProcess {
    /// A back-end as the command line's defaults make it.
    pub fn start(queue_pairs: usize) -> InProcess {
        InProcess::start_as(queue_pairs, NicSetup { tuning: tuning_under_test(), ..NicSetup::default() })
    }

    /// A back-end of another kind.
    pub fn start_as(queue_pairs: usize, setup: NicSetup) -> InProcess {
        InProcess::start_with(queue_pairs, setup, default_options())
    }

    /// A back-end with one queue pair, whose device carries packets.
    pub fn start_on_packets(setup: NicSetup) -> InProcess {
        let setup = NicSetup { tuning: tuning_under_test(), ..setup };
        InProcess::start_over(Layer::Ip, 1, setup, default_options())
    }

    /// A back-end that offers other things of the protocol.
    pub fn start_with(queue_pairs: usize, setup: NicSetup, options: SessionOptions) -> InProcess {
        InProcess::start_over(Layer::Ethernet, queue_pairs, setup, options)
    }

    fn start_over(layer: Layer, queue_pairs: usize, setup: NicSetup, options: SessionOptions) -> InProcess {
        panics::watch();
        let dir = TempDir::new().unwrap();
        let (taps, fds): (Vec<_>, Vec<_>) = (0..queue_pairs).map(|_| TapDouble::new()).unzip();
        let path = dir.path().join("socket");
        let (started, starting) = mpsc::channel();
        let thread = thread::spawn(move || {
            let (device, queues) = Device::from_sockets(fds, layer).unwrap();
            let nic = Nic::new(device, queues, setup).unwrap();
            let access = SocketAccess { mode: 0o600, group: None };
            let listener = SocketListener::bind(&path, access).unwrap();
            let setup = DaemonSetup { source: Source::Listener(listener), session: options, host: host(), watch: None };
            let daemon = Daemon::new(nic, setup).unwrap();
            started.send((daemon.stop_handle().unwrap(), daemon.nic())).unwrap();
            daemon.run(Sandbox::OFF).unwrap();
        });
        let (stop, nic) = starting.recv().unwrap();
        InProcess { taps, nic: Some(nic), stop, thread: Some(thread), dir }
    }

    /// Where front-ends connect.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// One queue pair's counters, by name.
    pub fn counters(&self, pair: usize) -> BTreeMap<&'static str, u64> {
        self.nic.as_ref().unwrap().counters()[pair].values().collect()
    }

    /// One counter of one queue pair.
    pub fn counter(&self, pair: usize, name: &str) -> u64 {
        *self.counters(pair).get(name).unwrap_or_else(|| panic!("There is no counter {name}"))
    }

    /// Waits until a counter has a value.
    pub fn wait_counter(&self, pair: usize, name: &str, value: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.counter(pair, name) != value {
            assert!(Instant::now() < deadline, "{name} is {}, not {value}", self.counter(pair, name));
            thread::yield_now();
        }
    }
}

/// What the device of a back-end in this process comes nearest to: it is never opened again.
fn host() -> HostSide {
    let device = DeviceChoice::Passed(Passed { fds: Vec::new(), of: None });
    HostSide { device, netns: None, carrier: None, on_loss: OnLoss::Wait }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        let joined = self.thread.take().map(JoinHandle::join);
        // The workers end with the card, of which this was the last user.
        self.nic = None;
        let panics = panics::take();
        if thread::panicking() {
            return;
        }
        assert!(panics.is_empty(), "Threads of the back-end panicked: {panics:?}");
        assert!(matches!(joined, Some(Ok(()))), "The back-end panicked");
    }
}

/// The real binary; ended by SIGTERM when dropped. A panic of any of its threads then fails the test, and so does an end by
/// a signal that the test did not send.
pub struct Spawned {
    child: Child,
    /// By which signals it may end.
    deadly: Mutex<Vec<Signal>>,
    log: Arc<Mutex<Vec<String>>>,
    lines: Receiver<String>,
}

impl Spawned {
    /// Starts the binary with `args` in this network namespace.
    pub fn start(args: &[&str]) -> Spawned {
        Spawned::run(Command::new(env!("CARGO_BIN_EXE_vhost-user-net")).args(args))
    }

    /// Starts it in another one, and waits until it listens.
    pub fn start_in(namespace: &NetNs, args: &[&str]) -> Spawned {
        let mut command = Command::new("ip");
        // `ip netns exec` replaces itself by the program, so its process id is the program's.
        command.args(["netns", "exec", &namespace.name, env!("CARGO_BIN_EXE_vhost-user-net")]).args(args);
        let mut this = Spawned::run(&mut command);
        this.wait_line("Listening on");
        this
    }

    /// Starts a command that runs the binary, with its log captured.
    pub fn run(command: &mut Command) -> Spawned {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&log);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line.clone());
                let _ = sender.send(line);
            }
        });
        Spawned { child, deadly: Mutex::new(vec![Signal::SIGTERM]), log, lines }
    }

    /// What a command that runs the binary says when it refuses to start, and its exit code; panics if it starts.
    pub fn refusal(command: &mut Command) -> (Option<i32>, String) {
        let mut this = Spawned::run(command);
        let status = this.wait_end(PATIENCE);
        // The reader ends with the pipe.
        while this.lines.recv_timeout(PATIENCE).is_ok() {}
        (status.code(), this.log())
    }

    /// Processor time that it has used.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // utime and stime are fields 14 and 15; the name in brackets may have spaces.
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let ticks: u64 = rest.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Waits until it rests: for a while all its threads sleep, and next to none of them is woken. That is looked at, and not
    /// how much processor time passes in that while, because a busy machine changes the one and not the other.
    pub fn wait_at_rest(&self) {
        const WHILE: Duration = Duration::from_millis(300);
        // What looks again each second, or has a last thing to log.
        const WAKE_UPS: u64 = 6;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.threads();
            thread::sleep(WHILE);
            let after = self.threads();
            let sleep = [&before, &after].iter().all(|threads| threads.values().all(|(state, _)| *state == 'S'));
            let woken = |(thread, (_, times)): (&String, &(char, u64))| {
                times.saturating_sub(before.get(thread).map_or(0, |(_, before)| *before))
            };
            if sleep && after.iter().map(woken).sum::<u64>() <= WAKE_UPS {
                return;
            }
            assert!(Instant::now() < deadline, "It does not rest: {before:?}, after {WHILE:?} {after:?}");
        }
    }

    /// What each thread does, as proc(5) has it, and how often it waited for something.
    fn threads(&self) -> BTreeMap<String, (char, u64)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let of = |status: &str, field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            line.trim().to_owned()
        };
        let look = |task: io::Result<fs::DirEntry>| {
            let task = task.unwrap();
            // One that has just ended is none.
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let state = of(&status, "State:").chars().next().unwrap();
            let waits = of(&status, "voluntary_ctxt_switches:").parse().unwrap();
            Some((format!("{} {}", task.file_name().to_str().unwrap(), of(&status, "Name:")), (state, waits)))
        };
        tasks.filter_map(look).collect()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        self.may_end_by(signal);
        kill(self.pid(), signal).unwrap();
    }

    /// That it is ended by this signal is no fault.
    pub fn may_end_by(&self, signal: Signal) {
        self.deadly.lock().unwrap().push(signal);
    }

    /// Ends it if it runs; what its end and its log say of a fault.
    fn end(&mut self) -> Result<(), String> {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill(self.pid(), Signal::SIGTERM);
            let deadline = Instant::now() + PATIENCE;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let _ = self.child.kill();
        let status = self.child.wait().map_err(|error| error.to_string())?;
        // The reader ends with the pipe.
        while self.lines.recv_timeout(PATIENCE).is_ok() {}
        let deadly = self.deadly.get_mut().unwrap();
        let is_sound = status.signal().is_none_or(|number| deadly.iter().any(|signal| *signal as i32 == number));
        if is_sound && !self.log().contains("panicked") { Ok(()) } else { Err(format!("{status}\n{}", self.log())) }
    }

    /// Waits for a line of the log that contains `what`, of those that were not waited for yet.
    pub fn wait_line(&mut self, what: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(what) => return line,
                Ok(_) => {}
                Err(_) => panic!("No line with {what:?} in the log:\n{}", self.log()),
            }
        }
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    pub fn wait_end(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "The back-end did not end:\n{}", self.log());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks for the counters of all queue pairs, by SIGUSR1; one map for each pair.
    pub fn counters(&mut self, queue_pairs: usize) -> Vec<BTreeMap<String, u64>> {
        self.signal(Signal::SIGUSR1);
        (0..queue_pairs).map(|pair| parse_counters(&self.wait_line(&format!("pair={pair} ")))).collect()
    }
}

impl Spawned {
    /// Waits until a counter of the only queue pair has a value: a frame is seen on the TAP a moment before it is
    /// counted. Counters of trouble are shown only above 0.
    pub fn wait_counter(&mut self, name: &str, value: u64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let is = self.counters(1)[0].get(name).copied().unwrap_or(0);
            if is == value {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is {is}, not {value}");
        }
    }
}

/// The `name=value` words of a counter line.
pub fn parse_counters(line: &str) -> BTreeMap<String, u64> {
    let words = line.split(' ').filter_map(|word| word.split_once('='));
    words.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let ended = self.end();
        if !thread::panicking()
            && let Err(how) = ended
        {
            panic!("The back-end did not end in order: {how}");
        }
    }
}

/// A copy of the binary beside the socket, where any user may start it.
pub fn for_any_user(socket: &Path) -> PathBuf {
    let directory = socket.parent().unwrap();
    let binary = directory.join("binary");
    fs::copy(env!("CARGO_BIN_EXE_vhost-user-net"), &binary).unwrap();
    for path in [directory, &binary] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    binary
}

/// Lets the command's process have `fd` under this number, which is to be below 100.
pub fn inherit(command: &mut Command, fd: BorrowedFd<'_>, number: i32) {
    // Far above: what is put under one number must not close what is to be put under the next.
    let fd = rustix::io::fcntl_dupfd_cloexec(fd, 500).unwrap();
    let duplicate = move || {
        // SAFETY: dup2 takes numbers only; `fd` is open, and `number` is the child's own.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(duplicate) };
}

/// The path as the command line wants it.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}
