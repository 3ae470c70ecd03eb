//! A Linux guest whose network card is the back-end: an emulated one in QEMU, or User Mode Linux.
//!
//! A [`Bench`] is a namespace with a TAP ([`HOST`]), the real binary on it, and a guest ([`GUEST`]) that
//! `resources/guest-image.sh` made. The guest's console is driven as `resources/lib/console.sh` does it: commands go in,
//! their output and status come out between two marks, and no wait is without a bound. Bulk traffic is in
//! `transfer.rs`; how a guest moves to another back-end while it runs, in `migration.rs`.
//!
//! Guests are heavy, and would starve each other: within a test binary they take turns, but for two whose processors are one
//! thread each.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::backend::{Spawned, arg};
use super::netns::{NetNs, TapSpec, require_root};
use super::{PATIENCE, qmp, qtest, skip};

/// The host's and the guest's address.
pub const HOST: &str = "10.99.0.1";
pub const GUEST: &str = "10.99.0.2";
/// The host's TAP.
pub const TAP: &str = "tap0";
/// The TAPs of [`HostDevice::Bridge`].
pub const TAPS: [&str; 2] = [TAP, "tap1"];
/// The guest's hardware address, if nothing changes it.
pub const MAC: &str = "52:54:00:12:34:56";

/// An emulated guest on a busy machine takes 10 s.
const BOOT: Duration = Duration::from_secs(90);
/// How long a command in the guest may take, if it does not say otherwise.
const COMMAND: Duration = Duration::from_secs(20);

/// Places for guests that are free.
static FREE: Mutex<usize> = Mutex::new(2);
/// Some became free.
static FREED: Condvar = Condvar::new();

/// A guest's turn, until it is dropped.
struct Turn(usize);

impl Turn {
    fn wait_for(spec: &GuestSpec<'_>) -> Self {
        // One that moves is two for a while.
        let moves = spec.device == HostDevice::Bridge;
        let has_threads = spec.vmm == Vmm::Qemu && has_thread_per_processor(spec.queue_pairs);
        let places = if spec.alone || moves || has_threads { 2 } else { 1 };
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        *FREED.wait_while(free, |free| *free < places).unwrap_or_else(PoisonError::into_inner) -= places;
        Self(places)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        FREED.notify_all();
    }
}

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// Emulated, whatever the machine can do: it is the same everywhere.
    Qemu,
    Uml,
}

/// Can such a guest be run here? If not, says that the test was skipped and why.
pub fn require_guest(test: &str, vmm: Vmm) -> bool {
    if !require_root(test) {
        return false;
    }
    let Some(image) = image() else {
        skip(test, "VHOST_USER_NET_GUEST does not say where a guest is (resources/guest-image.sh --uml)");
        return false;
    };
    let needed = match vmm {
        Vmm::Qemu if !qtest::require_qemu(test) => return false,
        Vmm::Qemu => ["vmlinuz", "initrd.gz"],
        Vmm::Uml => ["uml/linux", "uml/initrd.gz"],
    };
    let missing = needed.iter().find(|file| !image.join(file).exists());
    if let Some(file) = missing {
        skip(test, &format!("there is no {file} in {}", image.display()));
    }
    missing.is_none()
}

fn image() -> Option<PathBuf> {
    std::env::var_os("VHOST_USER_NET_GUEST").map(PathBuf::from)
}

/// What the back-end ends the card on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostDevice {
    Tap,
    /// On one end of a veth pair, whose other end is the host.
    Macvtap,
    /// The same, through packet sockets.
    Macvlan,
    Tun,
    /// On one of two TAPs, ports of a bridge that has the host's address: the guest may move from one to the other.
    Bridge,
}

impl HostDevice {
    /// Whether this kernel has such devices; says aloud that `test` is skipped if not.
    pub fn require(self, test: &str) -> bool {
        let (kind, on) = match self {
            HostDevice::Tap | HostDevice::Tun => return true,
            HostDevice::Macvtap => ("macvtap", "link card"),
            HostDevice::Macvlan => ("macvlan", "link card"),
            HostDevice::Bridge => ("bridge", ""),
        };
        let namespace = NetNs::new();
        namespace.ip("link add card type veth peer name outside");
        let has = namespace.try_ip(&format!("link add {on} name probe type {kind}"));
        if !has {
            skip(test, &format!("this kernel has no {kind}"));
        }
        has
    }

    /// Makes it, with the host's address; tells how the back-end is told of it.
    fn make(self, namespace: &NetNs, queue_pairs: usize) -> [&'static str; 2] {
        let address = format!("{HOST}/24");
        let multi_queue = queue_pairs > 1;
        match self {
            HostDevice::Tap => {
                namespace.add_tap(&TapSpec { addr: Some(&address), multi_queue, ..TapSpec::new(TAP) });
                ["--tap", TAP]
            }
            HostDevice::Macvtap => {
                make_on_veth(namespace, "mvt0", "macvtap", &address);
                ["--macvtap", "mvt0"]
            }
            HostDevice::Macvlan => {
                make_on_veth(namespace, "mv0", "macvlan", &address);
                ["--interface", "mv0"]
            }
            HostDevice::Tun => {
                let multi_queue = if multi_queue { "multi_queue" } else { "" };
                namespace.ip(&format!("tuntap add dev tun0 mode tun vnet_hdr {multi_queue}"));
                namespace.ip(&format!("addr add {address} dev tun0"));
                namespace.ip("link set tun0 up");
                ["--tun", "tun0"]
            }
            HostDevice::Bridge => {
                namespace.ip("link add br0 type bridge");
                for tap in TAPS {
                    namespace.add_tap(&TapSpec { multi_queue, ..TapSpec::new(tap) });
                    namespace.ip(&format!("link set {tap} master br0"));
                }
                namespace.ip(&format!("addr add {address} dev br0"));
                namespace.ip("link set br0 up");
                ["--tap", TAP]
            }
        }
    }
}

/// Makes a MACVTAP or MACVLAN on one end of a veth pair; the other end has the host's address.
fn make_on_veth(namespace: &NetNs, name: &str, kind: &str, address: &str) {
    namespace.ip("link add card type veth peer name outside");
    namespace.ip("link set card up");
    namespace.ip(&format!("addr add {address} dev outside"));
    namespace.ip("link set outside up");
    namespace.ip(&format!("link add link card name {name} address {MAC} type {kind} mode bridge"));
    namespace.ip(&format!("link set {name} up"));
}

/// A guest to boot; `..GuestSpec::new(vmm)` for the rest.
#[derive(Clone, Debug)]
pub struct GuestSpec<'a> {
    pub vmm: Vmm,
    pub queue_pairs: usize,
    pub device: HostDevice,
    pub backend: &'a [&'a str],
    /// More words of QEMU's command line.
    pub qemu: &'a [&'a str],
    /// Whether no other guest may run meanwhile: something is measured.
    pub alone: bool,
}

impl GuestSpec<'_> {
    pub fn new(vmm: Vmm) -> Self {
        Self { vmm, queue_pairs: 1, device: HostDevice::Tap, backend: &[], qemu: &[], alone: false }
    }
}

/// See the file's head.
pub struct Bench {
    // Dropped in this order.
    pub guest: Guest,
    pub(super) seat: Seat,
    pub namespace: NetNs,
    queue_pairs: usize,
    _turn: Turn,
}

impl Bench {
    /// Boots a guest and waits until it has its address.
    pub fn boot(spec: &GuestSpec<'_>) -> Self {
        Self::boot_in(NetNs::new(), spec)
    }

    /// Boots a guest in a namespace that has further devices.
    pub fn boot_in(namespace: NetNs, spec: &GuestSpec<'_>) -> Self {
        let turn = Turn::wait_for(spec);
        let device = spec.device.make(&namespace, spec.queue_pairs);
        let seat = Seat::take(spec, &namespace, device);
        let mut command = match spec.vmm {
            Vmm::Qemu => qemu_command(spec, &namespace, &seat),
            Vmm::Uml => uml_command(spec, &namespace, &seat),
        };
        let guest = boot_emulated(&mut command);
        Self { guest, seat, namespace, queue_pairs: spec.queue_pairs, _turn: turn }
    }

    pub fn backend(&mut self) -> &mut Spawned {
        self.seat.backend.as_mut().expect("the back-end runs")
    }

    /// Ends the back-end without a chance for it to do anything.
    pub fn kill_backend(&mut self) {
        let mut backend = self.seat.backend.take().expect("the back-end runs");
        backend.signal(Signal::SIGKILL);
        backend.wait_end(PATIENCE);
    }

    /// Starts it again as it was; returns when it listens.
    pub fn start_backend(&mut self) {
        self.seat.start_backend(&self.namespace);
    }

    /// One counter of each queue pair.
    pub fn counters(&mut self, name: &str) -> Vec<u64> {
        let pairs = self.queue_pairs;
        let counters = self.backend().counters(pairs);
        // Those of trouble are shown only where there was any.
        counters.iter().map(|counters| counters.get(name).copied().unwrap_or(0)).collect()
    }

    /// One counter, over all queue pairs.
    pub fn counter(&mut self, name: &str) -> u64 {
        self.counters(name).iter().sum()
    }

    /// Waits until a counter is no longer `was`; returns what it is then.
    pub fn wait_counter_moves(&mut self, name: &str, was: u64) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let is = self.counter(name);
            if is != was {
                return is;
            }
            assert!(Instant::now() < deadline, "{name} stays at {was}");
            // Asking costs the back-end work, and a line of its log.
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Fails if a ring broke or the guest sent what the back-end could not take.
    pub fn assert_sound(&mut self) {
        for name in ["broken_rings", "rx_bad_chains", "tx_drop_bad_chain", "tx_drop_bad_length", "tx_drop_bad_header"] {
            let count = self.counter(name);
            assert_eq!(count, 0, "{name}:\n{}", self.backend().log());
        }
    }

    /// Waits until the guest reaches the host, which it may not at once after something changed.
    pub fn assert_reaches_host(&mut self) {
        let deadline = Instant::now() + COMMAND;
        while self.guest.try_run(&format!("ping -c 1 -W 1 {HOST}")).0 != 0 {
            assert!(Instant::now() < deadline, "The guest does not reach the host:\n{}", self.backend().log());
        }
    }

    /// A command of QEMU's machine protocol, such as `system_reset`.
    pub fn qmp(&self, command: &str) {
        qmp::execute(&self.seat.file("qmp.sock"), command, serde_json::json!({}));
    }
}

/// Where a guest's process is: a directory for its sockets, and the back-end that waits at one of them.
pub(super) struct Seat {
    backend: Option<Spawned>,
    backend_args: Vec<String>,
    dir: TempDir,
}

impl Seat {
    /// Starts the back-end on `device`, two words of its command line; returns when it listens.
    pub(super) fn take(spec: &GuestSpec<'_>, namespace: &NetNs, device: [&str; 2]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("net.sock");
        let pairs = spec.queue_pairs.to_string();
        let own = ["--socket-path", arg(&socket), "--queue-pairs", &pairs];
        let backend_args = own.iter().chain(&device).chain(spec.backend).map(|&word| word.to_owned()).collect();
        let mut this = Self { backend: None, backend_args, dir };
        this.start_backend(namespace);
        this
    }

    fn start_backend(&mut self, namespace: &NetNs) {
        let args: Vec<&str> = self.backend_args.iter().map(String::as_str).collect();
        self.backend = Some(Spawned::start_in(namespace, &args));
    }

    /// Whether the back-end was told of such a device.
    pub(super) fn is_on(&self, device: &str) -> bool {
        self.backend_args.iter().any(|word| word == device)
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Starts a guest and waits for it to come up. An emulator with a thread for each processor now and then runs code that
/// another processor's kernel is just patching (before any driver runs): such a guest gets another chance, said aloud.
fn boot_emulated(command: &mut Command) -> Guest {
    const EMULATORS_FAULT: &str = "Oops: int3";
    for _ in 0..2 {
        let mut guest = Guest::start(command);
        if guest.comes_up() {
            return guest;
        }
        assert!(guest.said.iter().any(|line| line.contains(EMULATORS_FAULT)), "{}", guest.never_came());
        eprintln!("The emulator broke the guest's kernel while it patched itself ({EMULATORS_FAULT}); booting again");
    }
    let mut guest = Guest::start(command);
    guest.wait_ready();
    guest
}

fn kernel_words(spec: &GuestSpec<'_>) -> String {
    format!("quiet guest.ip={GUEST}/24 guest.peer={HOST} guest.queues={}", spec.queue_pairs)
}

/// Processors with a thread each run now and then into a breakpoint that their kernel has taken away (Oops: int3, on QEMU 7.2
/// at least). Four on one thread would be too slow under load.
fn has_thread_per_processor(queue_pairs: usize) -> bool {
    queue_pairs > 2
}

/// In the namespace, for what other network devices it has.
pub(super) fn qemu_command(spec: &GuestSpec<'_>, namespace: &NetNs, seat: &Seat) -> Command {
    let image = image().expect("require_guest was asked");
    let pairs = spec.queue_pairs;
    // QEMU's word for "try again every second" changed.
    let reconnect = if qtest::is_at_least(9, 2) { "reconnect-ms=1000" } else { "reconnect=1" };
    let multi_queue = if pairs > 1 { ",mq=on" } else { "" };
    let threads = if has_thread_per_processor(pairs) { "multi" } else { "single" };
    let words = [
        format!("-nodefaults -no-user-config -display none -accel tcg,thread={threads} -cpu max"),
        format!("-smp {pairs} -m 512M -object memory-backend-memfd,id=mem0,size=512M,share=on"),
        "-machine q35,memory-backend=mem0 -serial stdio".to_owned(),
        format!("-qmp unix:{},server=on,wait=off", seat.file("qmp.sock").display()),
        format!("-chardev socket,id=chr0,path={},{reconnect}", seat.file("net.sock").display()),
        format!("-netdev vhost-user,id=net0,chardev=chr0,queues={pairs}"),
        format!(
            "-device virtio-net-pci,netdev=net0,mac={MAC},romfile=,rx_queue_size=1024,tx_queue_size=1024,\
             vectors={}{multi_queue}",
            vectors(pairs)
        ),
    ];
    let mut command = namespace.command("qemu-system-x86_64");
    command
        .args(words.iter().flat_map(|words| words.split(' ')))
        .args(spec.qemu)
        .arg("-kernel")
        .arg(image.join("vmlinuz"))
        .arg("-initrd")
        .arg(image.join("initrd.gz"))
        .arg("-append")
        .arg(format!("console=ttyS0 {}", kernel_words(spec)));
    command
}

/// Older QEMUs crash when an emulated guest unmasks an MSI-X vector of a vhost-user device (they act as if KVM were
/// there), so their guests get none and use the one interrupt line.
pub fn vectors(queue_pairs: usize) -> usize {
    if qtest::is_at_least(9, 0) { 2 * queue_pairs + 2 } else { 0 }
}

/// In the namespace too, so that whoever ends what is in there finds it.
fn uml_command(spec: &GuestSpec<'_>, namespace: &NetNs, seat: &Seat) -> Command {
    let image = image().expect("require_guest was asked");
    let mut command = namespace.command(arg(&image.join("uml/linux")));
    command
        .arg("mem=256M")
        .arg(format!("initrd={}", image.join("uml/initrd.gz").display()))
        .args(["root=/dev/ram0", "con=null", "con0=fd:0,fd:1"])
        .arg(format!("uml_dir={}", seat.dir.path().display()))
        .arg(format!("virtio_uml.device={}:1", seat.file("net.sock").display()))
        .args(kernel_words(spec).split(' '))
        // The guest's memory, to be executed from.
        .env("TMPDIR", "/dev/shm");
    command
}

/// A running guest and its console. Ended when dropped.
pub struct Guest {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// All that it said, for whoever looks at a failure.
    said: Vec<String>,
    commands: u32,
}

impl Guest {
    pub(super) fn start(command: &mut Command) -> Self {
        // User Mode Linux is several processes; the group ends them all.
        let mut child = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("Cannot run {command:?}: {error}"));
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut line = Vec::new();
            // A guest's early words need not be UTF-8.
            while output.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
        });
        Self { child, input, lines, said: Vec::new(), commands: 0 }
    }

    /// Goes on as the guest that was on `other`'s console until now, where no command runs.
    pub(super) fn continue_from(&mut self, other: &mut Guest) {
        self.said.splice(..0, other.said.drain(..));
        // A number that came twice would find the end of the wrong command.
        self.commands = other.commands;
    }

    /// Waits for the guest to come up, once for each boot.
    pub fn wait_ready(&mut self) {
        assert!(self.comes_up(), "{}", self.never_came());
    }

    fn comes_up(&mut self) -> bool {
        self.read_until(BOOT, |line| line.starts_with("@@ READY")).is_some()
    }

    fn never_came(&self) -> String {
        format!("No guest came up:\n{}", self.said.join("\n"))
    }

    /// Runs a command; returns what it printed, panics if it fails.
    pub fn run(&mut self, command: &str) -> String {
        let (status, output) = self.try_run(command);
        assert_eq!(status, 0, "In the guest: {command}: {output}");
        output
    }

    /// Runs a command that may fail; returns its status and what it printed.
    pub fn try_run(&mut self, command: &str) -> (i32, String) {
        let number = self.begin(command);
        self.end(number, COMMAND)
    }

    /// Starts a command, to be waited for with [`Guest::end`]: meanwhile the host has its part to do.
    pub fn begin(&mut self, command: &str) -> u32 {
        self.commands += 1;
        let number = self.commands;
        // A guest that is gone shows at the end.
        let _ = write!(self.input, "echo '@@ begin {number}'\n{command}\necho \"@@ end {number} $?\"\n");
        let _ = self.input.flush();
        number
    }

    /// The status and the output of a command; panics if it does not end in time.
    pub fn end(&mut self, number: u32, timeout: Duration) -> (i32, String) {
        let (begin, end) = (format!("@@ begin {number}"), format!("@@ end {number} "));
        let Some(lines) = self.read_until(timeout, |line| line.starts_with(&end)) else {
            panic!("No answer from the guest within {timeout:?}:\n{}", self.said.join("\n"));
        };
        let (last, lines) = lines.split_last().expect("the end mark");
        let from = lines.iter().position(|line| *line == begin).map_or(0, |at| at + 1);
        (last[end.len()..].parse().unwrap(), lines[from..].join("\n"))
    }

    /// Waits for a line; returns all lines up to it.
    fn read_until(&mut self, timeout: Duration, is_last: impl Fn(&str) -> bool) -> Option<Vec<String>> {
        let from = self.said.len();
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).ok()?;
            self.said.push(line);
            if self.said.last().is_some_and(|line| is_last(line)) {
                return Some(self.said[from..].to_vec());
            }
        }
    }

    /// Reads a number, for example of a file in /sys.
    pub fn number(&mut self, command: &str) -> u64 {
        let output = self.run(command);
        output.trim().parse().unwrap_or_else(|_| panic!("{command}: {output:?} is no number"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let group = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        // It may have ended already.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
