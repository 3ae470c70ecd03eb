//! Where it is measured: a TAP in a namespace of its own, or another device, the back-ends on it, and clocks.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;

use crate::common::frames::HOST_MAC;
use crate::common::netns::{NetNs, PacketSocket, TapSpec};
use crate::common::virtio::VnetHdr;
use crate::guest::{FEATURES, Guest};
use crate::testpmd;

pub const TAP: &str = "tap0";
const TUN: &str = "tun0";
/// One end of a veth pair, and the far one, where the host is.
const CARD: &str = "card";
const OUTSIDE: &str = "outside";
const MACVTAP: &str = "macvtap0";
const MACVLAN: &str = "macvlan0";
/// What makes one of them the host's ([`HOST_MAC`]).
const HOSTS: &str = "address 52:54:00:bb:00:01";
/// What makes one of them the guest's, and has as many frames wait as a case sends at once.
const GUESTS: &str = "address 52:54:00:aa:00:01 txqueuelen 20000";
/// Nothing takes longer, unless something is stuck.
pub const PATIENCE: Duration = Duration::from_secs(10);
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

/// What a contender is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    Tap,
    /// On one end of a veth pair, by its device.
    Macvtap,
    /// On one end of a veth pair, by a packet socket.
    Macvlan,
    /// That end itself, by a packet socket.
    Veth,
    Tun,
}

impl On {
    /// All but the TAP, which each of them is compared with.
    pub const OTHERS: [On; 4] = [On::Macvtap, On::Macvlan, On::Veth, On::Tun];

    fn name(self) -> &'static str {
        match self {
            On::Tap => "a TAP",
            On::Macvtap => "a MACVTAP",
            On::Macvlan => "a MACVLAN",
            On::Veth => "a veth end",
            On::Tun => "a TUN",
        }
    }

    /// The interface that the host reaches the guest through.
    fn host_side(self) -> &'static str {
        match self {
            On::Tap => TAP,
            On::Macvtap | On::Macvlan | On::Veth => OUTSIDE,
            On::Tun => TUN,
        }
    }

    /// How ours is told of it.
    fn options(self) -> [&'static str; 2] {
        match self {
            On::Tap => ["--tap", TAP],
            On::Macvtap => ["--macvtap", MACVTAP],
            On::Macvlan => ["--interface", MACVLAN],
            On::Veth => ["--interface", CARD],
            On::Tun => ["--tun", TUN],
        }
    }

    /// Bytes of its virtio-net header.
    pub fn header_len(self) -> usize {
        match self {
            On::Macvlan | On::Veth => VnetHdr::LEN - 2,
            On::Tap | On::Macvtap | On::Tun => VnetHdr::LEN,
        }
    }

    /// Bytes of a frame's start that do not go over it.
    pub fn omitted(self) -> usize {
        if self == On::Tun { 14 } else { 0 }
    }

    /// A frame's virtio-net header as it goes over it.
    pub fn header(self, header: &VnetHdr) -> Vec<u8> {
        let earlier = |offset: u16| offset.saturating_sub(self.omitted() as u16);
        let header = VnetHdr { csum_start: earlier(header.csum_start), hdr_len: earlier(header.hdr_len), ..*header };
        header.to_bytes()[..self.header_len()].to_vec()
    }
}

/// How a bare loop goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// A system call for each frame.
    Calls,
    /// Batches through io_uring on registered memory; datagrams of one flow together in one frame.
    Batches,
    /// The same, with each frame copied to or from that memory, while a driver wakes now and then on the other CPU.
    Copies,
}

/// A contender: what runs on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contender {
    /// A bare loop, in this process, without a virtqueue.
    Floor(On, Means),
    /// The conventional back-end.
    Baseline,
    /// DPDK's, on a TAP of its own.
    Testpmd,
    /// This project's, with these options.
    Ours(On, &'static [&'static str]),
    /// Another build of it, or what starts one.
    Beside(PathBuf),
}

/// This project's as it is by itself.
pub const OURS: Contender = Contender::Ours(On::Tap, &[]);

impl Contender {
    /// Whether it is a bare loop.
    pub fn is_floor(&self) -> bool {
        matches!(self, Contender::Floor(..))
    }

    /// How, if it is a bare loop.
    pub fn means(&self) -> Option<Means> {
        match self {
            Contender::Floor(_, means) => Some(*means),
            _ => None,
        }
    }

    /// What it is on.
    pub fn on(&self) -> On {
        match self {
            Contender::Floor(on, _) | Contender::Ours(on, _) => *on,
            Contender::Baseline | Contender::Testpmd | Contender::Beside(_) => On::Tap,
        }
    }

    /// The same on a TAP.
    pub fn on_tap(&self) -> Contender {
        match self {
            Contender::Floor(_, means) => Contender::Floor(On::Tap, *means),
            Contender::Ours(_, options) => Contender::Ours(On::Tap, options),
            other => other.clone(),
        }
    }

    pub fn name(&self) -> String {
        let name = match self {
            Contender::Floor(_, Means::Calls) => "floor".to_owned(),
            Contender::Floor(_, Means::Batches) => "floor, batches".to_owned(),
            Contender::Floor(_, Means::Copies) => "floor, batches of copies".to_owned(),
            Contender::Baseline => "baseline".to_owned(),
            Contender::Testpmd => "dpdk-testpmd".to_owned(),
            Contender::Ours(_, []) => "ours".to_owned(),
            Contender::Ours(_, options) => format!("ours {}", options.join(" ")),
            Contender::Beside(_) => "beside".to_owned(),
        };
        if self.on() == On::Tap { name } else { format!("{name} on {}", self.on().name()) }
    }

    /// What a guest negotiates with it.
    pub fn features(&self) -> u64 {
        if *self == Contender::Testpmd { testpmd::FEATURES } else { FEATURES }
    }

    /// The interface that the host reaches the guest through.
    pub fn host_side(&self) -> &'static str {
        if *self == Contender::Testpmd { testpmd::TAP } else { self.on().host_side() }
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

    pub fn socket(&self) -> PathBuf {
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
            Contender::Floor(..) => panic!("the floor is no process"),
            Contender::Testpmd => testpmd::command(&self.namespace, socket),
            Contender::Baseline => {
                let this = std::env::current_exe().expect("this program");
                let mut command = self.namespace.command(this.to_str().expect("a path"));
                command.args(["--as-baseline", socket]);
                command
            }
            Contender::Ours(on, options) => {
                self.add(*on);
                self.ours(env!("CARGO_BIN_EXE_vhost-user-net"), socket, pairs, &[&on.options(), *options].concat())
            }
            Contender::Beside(program) => {
                self.ours(program.to_str().expect("a path"), socket, pairs, &On::Tap.options())
            }
        }
    }

    fn ours(&self, program: &str, socket: &str, pairs: usize, options: &[&str]) -> Command {
        let mut command = self.namespace.command(program);
        command.args(["--socket-path", socket, "--log-level", "warn", "--queue-pairs"]).arg(pairs.to_string());
        command.args(options);
        command
    }

    /// Adds what is not there from the start.
    fn add(&self, on: On) {
        let veth = |words: &str| {
            self.namespace.ip(&format!("link add {CARD} {words} type veth peer name {OUTSIDE} {HOSTS}"));
            self.up(OUTSIDE);
            self.up(CARD);
        };
        let on_card = |name, kind| {
            veth("");
            self.namespace.ip(&format!("link add link {CARD} name {name} {GUESTS} type {kind} mode bridge"));
            self.up(name);
        };
        match on {
            On::Tap => {}
            On::Macvtap => on_card(MACVTAP, "macvtap"),
            On::Macvlan => on_card(MACVLAN, "macvlan"),
            On::Veth => veth(GUESTS),
            On::Tun => {
                self.namespace.ip(&format!("tuntap add dev {TUN} mode tun vnet_hdr"));
                self.namespace.ip(&format!("link set dev {TUN} txqueuelen 20000"));
                self.up(TUN);
            }
        }
    }

    /// How many bytes and packets an interface has received.
    pub fn received(&self, name: &str) -> [u64; 2] {
        // A line of headings, and below it the bytes, then the packets.
        let shown = self.namespace.ip(&format!("-s link show dev {name}"));
        let numbers = shown.lines().skip_while(|line| !line.contains("RX:")).nth(1).unwrap_or_default();
        let mut numbers = numbers.split_whitespace().map_while(|number| number.parse().ok());
        [numbers.next().expect("statistics"), numbers.next().expect("statistics")]
    }

    fn up(&self, name: &str) {
        self.namespace.ip(&format!("link set dev {name} up"));
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
    pub fn floor(&self, on: On) -> OwnedFd {
        self.add(on);
        let fd = match on {
            On::Tap => self.namespace.open_tap(TAP, self.multi_queue).fd,
            On::Macvtap => self.namespace.open_macvtap(MACVTAP),
            On::Macvlan => self.floor_socket(MACVLAN),
            On::Veth => self.floor_socket(CARD),
            On::Tun => self.namespace.open_tun(TUN, libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR),
        };
        if !matches!(on, On::Macvlan | On::Veth) {
            set_int(&fd, libc::TUNSETVNETHDRSZ, VnetHdr::LEN as i32);
            set_int(&fd, libc::TUNSETSNDBUF, i32::MAX);
            // The offloads that the back-ends set.
            let flags = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
            assert_eq!(set, 0, "TUNSETOFFLOAD: {}", std::io::Error::last_os_error());
        }
        self.wait_operational(on.host_side());
        fd
    }

    /// A packet socket with virtio-net headers, and with room for the frames that ours has room for.
    fn floor_socket(&self, name: &str) -> OwnedFd {
        let socket = PacketSocket::open_vnet_hdr(&self.namespace, name);
        set_option(&socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 4 << 20);
        let fd = socket.as_fd().try_clone_to_owned().expect("a descriptor");
        rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::NONBLOCK).expect("a socket");
        fd
    }
}

fn set_int(fd: &OwnedFd, request: libc::Ioctl, value: i32) {
    // SAFETY: both requests that this is called with read one int at the given address, that of `value`.
    let set = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) };
    assert_eq!(set, 0, "ioctl: {}", std::io::Error::last_os_error());
}

pub fn set_option(fd: &BorrowedFd<'_>, level: i32, option: i32, value: i32) {
    let len = size_of_val(&value) as u32;
    // SAFETY: `value` is an int of the length given, and outlives the call.
    let set = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), len) };
    assert_eq!(set, 0, "setsockopt: {}", std::io::Error::last_os_error());
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
        let status = PathBuf::from(format!("/proc/{}/status", self.child.id()));
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

/// Processor time of the machine so far, in all and what its host gave to others instead (`man 5 proc_stat`).
pub fn processor_time() -> [u64; 2] {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let of_all = stat.lines().next().unwrap_or_default();
    // User, nice, system, idle, iowait, irq, softirq, steal; a guest's time, behind them, is in user.
    let times: Vec<u64> = of_all.split_whitespace().skip(1).take(8).map_while(|time| time.parse().ok()).collect();
    [times.iter().sum(), times.get(7).copied().unwrap_or(0)]
}

/// The part that others had between two times.
pub fn stolen(before: [u64; 2], after: [u64; 2]) -> f64 {
    let [all, others] = [0, 1].map(|at| after[at].saturating_sub(before[at]));
    if all == 0 { 0.0 } else { others as f64 / all as f64 }
}
