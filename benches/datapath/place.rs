//! Where it is measured: a TAP in a namespace of its own, the back-ends on it, and clocks.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;

use crate::common::frames::HOST_MAC;
use crate::common::netns::{NetNs, TapSpec};
use crate::common::virtio::VnetHdr;
use crate::guest::{FEATURES, Guest};
use crate::testpmd;

pub const TAP: &str = "tap0";
/// The far end of the veth pair that the MACVTAP is on.
const OUTSIDE: &str = "outside";
/// The back-ends have a CPU of their own, and so has the floor: the same.
pub const BACKEND_CPU: usize = 0;
/// The driver, and what sends from the host.
pub const DRIVER_CPU: usize = 1;

/// Lets short sleeps be short, instead of up to 50 µs longer.
pub fn sleep_exactly() {
    // SAFETY: PR_SET_TIMERSLACK takes numbers only.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
}

/// Binds this thread to a CPU; what it starts inherits that.
pub fn bind_to(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).expect("two CPUs at least");
}

/// Does `act` on the back-ends' CPU.
pub fn on_backend_cpu<R>(act: impl FnOnce() -> R) -> R {
    bind_to(BACKEND_CPU);
    let result = act();
    bind_to(DRIVER_CPU);
    result
}

/// Does `act` on either.
fn on_any_cpu<R>(act: impl FnOnce() -> R) -> R {
    let mut cpus = CpuSet::new();
    [BACKEND_CPU, DRIVER_CPU].iter().for_each(|cpu| cpus.set(*cpu));
    sched_setaffinity(None, &cpus).expect("two CPUs at least");
    let result = act();
    bind_to(DRIVER_CPU);
    result
}

/// A contender: what runs on the TAP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contender {
    /// A bare loop of system calls on the TAP, in this process, without a virtqueue.
    Floor,
    /// The same on a MACVTAP, on one end of a veth pair.
    FloorOnMacvtap,
    /// The conventional back-end.
    Baseline,
    /// DPDK's, on a TAP of its own.
    Testpmd,
    /// This project's on such a MACVTAP.
    OnMacvtap,
    /// This project's, with these options.
    Ours(&'static [&'static str]),
}

impl Contender {
    /// Whether it is a bare loop.
    pub fn is_floor(&self) -> bool {
        matches!(self, Contender::Floor | Contender::FloorOnMacvtap)
    }

    pub fn name(&self) -> String {
        match self {
            Contender::Floor => "floor".to_owned(),
            Contender::FloorOnMacvtap => "floor on a MACVTAP".to_owned(),
            Contender::Baseline => "baseline".to_owned(),
            Contender::Testpmd => "dpdk-testpmd".to_owned(),
            Contender::OnMacvtap => "ours on a MACVTAP".to_owned(),
            Contender::Ours([]) => "ours".to_owned(),
            Contender::Ours(options) => format!("ours {}", options.join(" ")),
        }
    }

    /// What a guest negotiates with it.
    pub fn features(&self) -> u64 {
        if *self == Contender::Testpmd { testpmd::FEATURES } else { FEATURES }
    }

    /// The interface that the host reaches the guest through.
    pub fn host_side(&self) -> &'static str {
        match self {
            Contender::Testpmd => testpmd::TAP,
            Contender::OnMacvtap | Contender::FloorOnMacvtap => OUTSIDE,
            _ => TAP,
        }
    }
}

/// A namespace with a TAP.
pub struct Place {
    pub namespace: NetNs,
    dir: TempDir,
    multi_queue: bool,
}

impl Place {
    pub fn new(multi_queue: bool) -> Place {
        let namespace = NetNs::new();
        let mac = HOST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let spec = TapSpec { mac: Some(&mac), addr: Some("10.99.0.1/24"), multi_queue, ..TapSpec::new(TAP) };
        namespace.add_tap(&spec);
        namespace.ip("link set dev tap0 txqueuelen 20000");
        namespace.ip("neigh add 10.99.0.2 lladdr 52:54:00:aa:00:01 dev tap0");
        Place { namespace, dir: TempDir::new().expect("a folder"), multi_queue }
    }

    pub fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("socket")
    }

    /// Starts a back-end, and connects the guest to it.
    pub fn start(&self, contender: &Contender, guest: &mut Guest, more: &[(&str, String)]) -> Process {
        let process = self.launch(contender, guest.pairs.len(), more);
        guest.connect(&self.dir.path().join("socket"));
        self.wait_operational(contender.host_side());
        process
    }

    /// Starts a back-end, and waits until it listens.
    pub fn launch(&self, contender: &Contender, pairs: usize, more: &[(&str, String)]) -> Process {
        let socket = self.dir.path().join("socket");
        // What the one before left; ours replaces it by itself.
        let _ = fs::remove_file(&socket);
        let path = socket.to_str().expect("a path").to_owned();
        let mut command = self.command(contender, &path, pairs);
        command.envs(more.iter().map(|(name, value)| (*name, value)));
        let begun = Instant::now();
        // Two pairs share nothing, least of all a CPU.
        let mut spawn = || command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("a process");
        let child = if pairs == 1 { on_backend_cpu(&mut spawn) } else { on_any_cpu(&mut spawn) };
        let mut process = Process { child, until_listening: Duration::ZERO };
        while !socket.exists() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{contender:?} does not listen");
            assert!(matches!(process.child.try_wait(), Ok(None)), "{contender:?} ended");
            std::thread::sleep(Duration::from_micros(200));
        }
        process.until_listening = begun.elapsed();
        process
    }

    fn command(&self, contender: &Contender, socket: &str, pairs: usize) -> Command {
        match contender {
            Contender::Floor | Contender::FloorOnMacvtap => panic!("the floor is no process"),
            Contender::Testpmd => testpmd::command(&self.namespace, socket),
            Contender::Baseline => {
                let this = std::env::current_exe().expect("this program");
                let mut command = self.namespace.command(this.to_str().expect("a path"));
                command.args(["--as-baseline", socket]);
                command
            }
            Contender::OnMacvtap => {
                self.add_macvtap();
                self.ours(socket, pairs, &["--macvtap", "macvtap0"])
            }
            Contender::Ours(options) => {
                let mut command = self.ours(socket, pairs, &["--tap", TAP]);
                command.args(*options);
                command
            }
        }
    }

    fn ours(&self, socket: &str, pairs: usize, device: &[&str]) -> Command {
        let mut command = self.namespace.command(env!("CARGO_BIN_EXE_vhost-user-net"));
        command.args(["--socket-path", socket, "--log-level", "warn", "--queue-pairs"]).arg(pairs.to_string());
        command.args(device);
        command
    }

    /// What arrives at the other end goes to nobody.
    fn add_macvtap(&self) {
        for words in [
            "link add card type veth peer name outside",
            "link set outside up",
            "link set card up",
            "link add link card name macvtap0 txqueuelen 20000 address 52:54:00:aa:00:01 type macvtap mode bridge",
            "link set macvtap0 up",
        ] {
            self.namespace.ip(words);
        }
    }

    /// For a moment after a TAP got its carrier the kernel drops what is sent to it.
    fn wait_operational(&self, tap: &str) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.namespace.ip(&format!("link show dev {tap}")).contains("state DOWN") {
            assert!(Instant::now() < deadline, "the TAP does not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(20));
    }

    /// A queue for the floor.
    pub fn floor(&self, contender: &Contender) -> OwnedFd {
        let fd = if *contender == Contender::FloorOnMacvtap {
            self.add_macvtap();
            let fd = self.namespace.open_macvtap("macvtap0");
            set_int(&fd, libc::TUNSETVNETHDRSZ, VnetHdr::LEN as i32);
            set_int(&fd, libc::TUNSETSNDBUF, i32::MAX);
            fd
        } else {
            self.namespace.open_tap(TAP, self.multi_queue).fd
        };
        // The offloads that the back-ends set.
        let flags = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        assert_eq!(set, 0, "TUNSETOFFLOAD: {}", std::io::Error::last_os_error());
        self.wait_operational(contender.host_side());
        fd
    }
}

fn set_int(fd: &OwnedFd, request: libc::Ioctl, value: i32) {
    // SAFETY: both requests that this is called with read one int at the given address, that of `value`.
    let set = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) };
    assert_eq!(set, 0, "ioctl: {}", std::io::Error::last_os_error());
}

/// A back-end's process; killed and reaped when dropped.
pub struct Process {
    child: Child,
    pub until_listening: Duration,
}

impl Process {
    /// Processor time of all its threads, once they sleep: before, the kernel knows it only to the last tick.
    pub fn cpu(&self) -> Duration {
        std::thread::sleep(Duration::from_millis(3));
        let mut clock = 0;
        // SAFETY: writes one clock id, that of `clock`.
        let found = unsafe { libc::clock_getcpuclockid(self.child.id() as libc::pid_t, &raw mut clock) };
        assert_eq!(found, 0, "the back-end is gone");
        read_clock(clock)
    }

    /// Wake-ups so far: times that a thread gave up its CPU to wait.
    pub fn wakeups(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("a process");
        let of =
            |task: std::io::Result<fs::DirEntry>| field(&task.ok()?.path().join("status"), "voluntary_ctxt_switches:");
        tasks.filter_map(of).sum()
    }

    /// Its memory in KiB, without what it shares with the guest.
    pub fn memory_kib(&self) -> u64 {
        let status = std::path::PathBuf::from(format!("/proc/{}/status", self.child.id()));
        ["RssAnon:", "RssFile:"].iter().filter_map(|name| field(&status, name)).sum()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn field(path: &std::path::Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn read_clock(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, that of `time`.
    let read = unsafe { libc::clock_gettime(clock, &raw mut time) };
    assert_eq!(read, 0, "clock_gettime: {}", std::io::Error::last_os_error());
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Processor time of this thread.
pub fn thread_cpu() -> Duration {
    read_clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// What this program runs on.
pub fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("").trim_matches([' ', '\t', ':']);
    // Of the machine: this thread is bound to one.
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let kernel =
        Command::new("uname").arg("-sr").output().map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    format!("{model}, {cpus} CPUs, {}", kernel.unwrap_or_default())
}
