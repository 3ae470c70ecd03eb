//! A virtio-net driver that drives a stock QEMU from outside, over the qtest protocol.
//!
//! QEMU runs with a four-byte BIOS that halts the only CPU, so no guest interferes. What a driver would do with
//! loads and stores, the test does with qtest commands: it finds the device on the PCI bus, negotiates, lays
//! out split rings in guest memory and kicks. So the front-end that the back-end sees is the real one, in
//! its real message order, in a tenth of a second and without a guest kernel.
//!
//! qtest has no event for a used buffer that works with every QEMU, so waiting is asking again; each question is a
//! round trip to QEMU, and the wait is bounded.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::netns::ChildGuard;
use super::split_ring::{Buf, Desc};
use super::virtio::{desc_flag, feature, status};
use super::{PATIENCE, skip, wait_readable};

const PROGRAM: &str = "qemu-system-x86_64";
/// How long QEMU may take to start.
const START: Duration = Duration::from_secs(30);
/// Where the device's first BAR for virtio structures goes.
const BAR: u64 = 0xfe00_0000;
/// The device's slot on the PCI bus.
const SLOT: u32 = 4;

/// Is QEMU here? If not, says that the test was skipped.
pub fn require_qemu(test: &str) -> bool {
    let here = !version().is_empty();
    if !here {
        skip(test, "needs qemu-system-x86_64");
    }
    here
}

/// What QEMU says of its version; nothing if it is not here.
pub fn version() -> String {
    match Command::new(PROGRAM).arg("--version").output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(_) => String::new(),
    }
}

/// Is it this version or a newer one?
pub fn is_at_least(major: u32, minor: u32) -> bool {
    let text = version();
    let number = text.split("version ").nth(1).unwrap_or_default();
    let mut parts = number.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
}

/// A QEMU to start.
#[derive(Clone, Copy, Debug)]
pub struct QemuSpec<'a> {
    /// The back-end's socket.
    pub socket: &'a Path,
    /// Does QEMU listen and the back-end connect?
    pub listen: bool,
    pub queue_pairs: u32,
    /// More properties of the device, each with a comma in front: `,host_mtu=1500`.
    pub device: &'a str,
    /// More properties of the chardev, each with a comma in front: `,reconnect=1`.
    pub chardev: &'a str,
    pub memory_mib: u32,
    /// More words of the command line, each with a space in front: ` -incoming defer`.
    pub more: &'a str,
}

impl<'a> QemuSpec<'a> {
    pub fn new(socket: &'a Path) -> Self {
        Self { socket, listen: false, queue_pairs: 1, device: "", chardev: "", memory_mib: 64, more: "" }
    }
}

/// A running QEMU and the qtest connection to it. Killed when dropped.
pub struct Qemu {
    // Dropped in this order: the process first, then its directory.
    child: ChildGuard,
    reader: BufReader<UnixStream>,
    dir: TempDir,
}

impl Qemu {
    /// Starts QEMU and waits until it speaks qtest. It connects to the back-end before that, so the back-end must
    /// be there. Panics with QEMU's own words if it gives up.
    pub fn start(spec: &QemuSpec<'_>) -> Self {
        let dir = TempDir::new().unwrap();
        let bios = dir.path().join("halt.bin");
        std::fs::write(&bios, halting_bios()).unwrap();
        let qtest = dir.path().join("qtest.sock");
        let listener = UnixListener::bind(&qtest).unwrap();
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments(spec))
            .arg("-bios")
            .arg(&bios)
            .arg("-qtest")
            .arg(format!("unix:{}", qtest.display()))
            .args(["-qtest-log", "/dev/null"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("stderr")).unwrap());
        let child = ChildGuard(command.spawn().unwrap());
        let stream = accept(&listener, &dir);
        stream.set_read_timeout(Some(START)).unwrap();
        Self { child, reader: BufReader::new(stream), dir }
    }

    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// What QEMU printed.
    pub fn stderr(&self) -> String {
        stderr_of(&self.dir)
    }

    /// One qtest command; returns the words after "OK".
    pub fn command(&mut self, command: &str) -> String {
        let stream = self.reader.get_mut();
        // A QEMU that is gone shows at the read, which can say why.
        let _ = stream.write_all(format!("{command}\n").as_bytes());
        loop {
            let line = self.read_line(command);
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("OK", rest) => return rest.to_owned(),
                ("IRQ", _) => {}
                _ => panic!("qtest: {command}: {line}"),
            }
        }
    }

    fn read_line(&mut self, command: &str) -> String {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(len) if len > 0 => line.trim_end().to_owned(),
            end => panic!("QEMU is gone at {command:?} ({end:?}): {}", self.stderr()),
        }
    }

    fn number(&mut self, command: &str) -> u64 {
        let answer = self.command(command);
        u64::from_str_radix(answer.trim_start_matches("0x"), 16).unwrap()
    }

    pub fn read_u8(&mut self, addr: u64) -> u8 {
        self.number(&format!("readb {addr:#x}")) as u8
    }

    pub fn read_u16(&mut self, addr: u64) -> u16 {
        self.number(&format!("readw {addr:#x}")) as u16
    }

    pub fn read_u32(&mut self, addr: u64) -> u32 {
        self.number(&format!("readl {addr:#x}")) as u32
    }

    pub fn write_u8(&mut self, addr: u64, value: u8) {
        self.command(&format!("writeb {addr:#x} {value:#x}"));
    }

    pub fn write_u16(&mut self, addr: u64, value: u16) {
        self.command(&format!("writew {addr:#x} {value:#x}"));
    }

    pub fn write_u32(&mut self, addr: u64, value: u32) {
        self.command(&format!("writel {addr:#x} {value:#x}"));
    }

    /// Reads guest memory.
    pub fn read(&mut self, addr: u64, len: usize) -> Vec<u8> {
        if len == 0 {
            return Vec::new();
        }
        let hex = self.command(&format!("read {addr:#x} {len:#x}"));
        let digits = hex.trim_start_matches("0x").as_bytes();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    /// Writes guest memory.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.command(&format!("write {addr:#x} {:#x} 0x{hex}", bytes.len()));
    }

    /// Reads a word of the device's PCI configuration space.
    fn read_pci(&mut self, offset: u32) -> u32 {
        self.select_pci(offset);
        self.number("inl 0xcfc") as u32
    }

    fn write_pci_u32(&mut self, offset: u32, value: u32) {
        self.select_pci(offset);
        self.command(&format!("outl 0xcfc {value:#x}"));
    }

    fn write_pci_u16(&mut self, offset: u32, value: u16) {
        self.select_pci(offset);
        let port = 0xcfc + (offset & 2);
        self.command(&format!("outw {port:#x} {value:#x}"));
    }

    fn select_pci(&mut self, offset: u32) {
        let select = 0x8000_0000 | (SLOT << 11) | (offset & !3);
        self.command(&format!("outl 0xcf8 {select:#x}"));
    }
}

/// 64 KiB whose reset vector is `cli; hlt; jmp -3`.
fn halting_bios() -> Vec<u8> {
    let mut bios = vec![0xff; 0x1_0000];
    bios[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    bios
}

fn arguments(spec: &QemuSpec<'_>) -> Vec<String> {
    let socket = spec.socket.display();
    let (pairs, memory) = (spec.queue_pairs, spec.memory_mib);
    let listen = if spec.listen { ",server=on,wait=on" } else { "" };
    let multi_queue = match pairs {
        1 => String::new(),
        _ => format!(",mq=on,vectors={}", 2 * pairs + 2),
    };
    let chardev = spec.chardev;
    let (device, more) = (spec.device, spec.more);
    [
        "-nodefaults -no-user-config -display none -accel tcg".to_owned(),
        format!("-machine q35,memory-backend=m0 -m {memory}"),
        format!("-object memory-backend-memfd,id=m0,size={memory}M,share=on"),
        format!("-chardev socket,id=c0,path={socket}{listen}{chardev}"),
        format!("-netdev vhost-user,id=n0,chardev=c0,queues={pairs}"),
        format!(
            "-device virtio-net-pci,netdev=n0,addr={SLOT},mac=52:54:00:aa:00:01,\
             disable-legacy=on,romfile={multi_queue}{device}{more}"
        ),
    ]
    .iter()
    .flat_map(|part| part.split(' ').map(str::to_owned))
    .collect()
}

fn accept(listener: &UnixListener, dir: &TempDir) -> UnixStream {
    assert!(wait_readable(listener, START), "QEMU does not start: {}", stderr_of(dir));
    listener.accept().unwrap().0
}

fn stderr_of(dir: &TempDir) -> String {
    let mut text = String::new();
    // No file, no words.
    if let Ok(mut file) = File::open(dir.path().join("stderr")) {
        let _ = file.read_to_string(&mut text);
    }
    text
}

/// Offsets in the common configuration structure (VIRTIO 1.3, 4.1.4.3).
mod common_cfg {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// Kinds of virtio PCI capabilities (4.1.4 "Virtio Structure PCI Capabilities").
mod capability {
    pub const VENDOR: u32 = 9;
    pub const COMMON: u32 = 1;
    pub const NOTIFY: u32 = 2;
    pub const DEVICE: u32 = 4;
}

/// Where each queue's parts lie in guest memory.
const QUEUE_AREA: u64 = 0x10_0000;
const QUEUE_STRIDE: u64 = 0x1_0000;
const AVAIL_AT: u64 = 0x4000;
const USED_AT: u64 = 0x8000;
/// Guest memory from here on is for buffers.
pub const BUFFERS: u64 = 0x100_0000;

/// A queue that was set up.
#[derive(Clone, Copy, Debug)]
struct Queue {
    area: u64,
    size: u16,
    notify: u64,
    avail_idx: u16,
    last_used: u16,
}

/// The driver of a modern virtio-net PCI device, with split rings.
pub struct QtestDriver {
    pub qemu: Qemu,
    /// What the device offered.
    pub offered: u64,
    /// Did the device take the features that were chosen?
    pub features_ok: bool,
    common: u64,
    device: u64,
    notify: u64,
    notify_multiplier: u64,
    queues: Vec<Option<Queue>>,
}

impl QtestDriver {
    /// Finds and resets the device, and negotiates what `choose` picks of the features offered
    /// (and VERSION_1 in any case).
    pub fn new(mut qemu: Qemu, choose: impl FnOnce(u64) -> u64) -> Self {
        qemu.write_pci_u32(0x20, BAR as u32);
        qemu.write_pci_u32(0x24, 0);
        // Memory space and bus master.
        qemu.write_pci_u16(0x04, 6);
        let mut driver = Self {
            offered: 0,
            features_ok: false,
            common: 0,
            device: 0,
            notify: 0,
            notify_multiplier: 0,
            queues: Vec::new(),
            qemu,
        };
        driver.find_structures();
        driver.reset();
        driver.negotiate(choose);
        driver
    }

    /// Back to before the negotiation (3.1.1 "Driver Requirements: Device Initialization").
    pub fn reset(&mut self) {
        self.queues.clear();
        self.set_status(0);
        let deadline = Instant::now() + PATIENCE;
        while self.status() != 0 {
            assert!(Instant::now() < deadline, "The device does not reset");
        }
    }

    pub fn negotiate(&mut self, choose: impl FnOnce(u64) -> u64) {
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.offered = u64::from(self.read_features(0)) | u64::from(self.read_features(1)) << 32;
        let chosen = choose(self.offered) | feature::VERSION_1;
        for word in 0..2 {
            let cfg = self.common;
            self.qemu.write_u32(cfg + common_cfg::DRIVER_FEATURE_SELECT, word);
            self.qemu.write_u32(cfg + common_cfg::DRIVER_FEATURE, (chosen >> (32 * word)) as u32);
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        self.features_ok = self.status() & status::FEATURES_OK != 0;
    }

    /// Sets up queue `index` with the size that the device proposes.
    pub fn set_up_queue(&mut self, index: u16) {
        self.set_up_queue_of(index, None);
    }

    /// Sets up queue `index` with a smaller size, if one is given.
    pub fn set_up_queue_of(&mut self, index: u16, size: Option<u16>) {
        let cfg = self.common;
        self.qemu.write_u16(cfg + common_cfg::QUEUE_SELECT, index);
        if let Some(size) = size {
            self.qemu.write_u16(cfg + common_cfg::QUEUE_SIZE, size);
        }
        let size = self.qemu.read_u16(cfg + common_cfg::QUEUE_SIZE);
        let area = QUEUE_AREA + QUEUE_STRIDE * u64::from(index);
        for (register, addr) in [
            (common_cfg::QUEUE_DESC, area),
            (common_cfg::QUEUE_DRIVER, area + AVAIL_AT),
            (common_cfg::QUEUE_DEVICE, area + USED_AT),
        ] {
            self.qemu.write_u32(cfg + register, addr as u32);
            self.qemu.write_u32(cfg + register + 4, (addr >> 32) as u32);
        }
        // After a reset the rings begin at 0 again.
        self.qemu.write_u32(area + AVAIL_AT, 0);
        self.qemu.write_u32(area + USED_AT, 0);
        let offset = self.qemu.read_u16(cfg + common_cfg::QUEUE_NOTIFY_OFF);
        self.qemu.write_u16(cfg + common_cfg::QUEUE_ENABLE, 1);
        let queue = Queue {
            area,
            size,
            notify: self.notify + self.notify_multiplier * u64::from(offset),
            avail_idx: 0,
            last_used: 0,
        };
        let at = usize::from(index);
        self.queues.resize(self.queues.len().max(at + 1), None);
        self.queues[at] = Some(queue);
    }

    /// Sets up queues 0 to `count`.
    pub fn set_up_queues(&mut self, count: u16) {
        (0..count).for_each(|index| self.set_up_queue(index));
    }

    /// Starts the device: now QEMU starts the back-end's rings.
    pub fn driver_ok(&mut self) {
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK);
    }

    pub fn status(&mut self) -> u8 {
        self.qemu.read_u8(self.common + common_cfg::DEVICE_STATUS)
    }

    pub fn set_status(&mut self, status: u8) {
        self.qemu.write_u8(self.common + common_cfg::DEVICE_STATUS, status);
    }

    /// Bytes of the device's configuration space.
    pub fn config(&mut self, offset: u64, len: u64) -> Vec<u8> {
        (0..len).map(|at| self.qemu.read_u8(self.device + offset + at)).collect()
    }

    pub fn queue_size(&self, index: u16) -> u16 {
        self.queue(index).size
    }

    /// Where queue `index` has its descriptor table, avail ring and used ring, for raw writes.
    pub fn queue_addrs(&self, index: u16) -> [u64; 3] {
        let area = self.queue(index).area;
        [area, area + AVAIL_AT, area + USED_AT]
    }

    /// Makes a chain available from descriptor `head` on, and publishes it.
    pub fn add(&mut self, index: u16, head: u16, bufs: &[Buf]) {
        let area = self.queue(index).area;
        for (k, buf) in (head..).zip(bufs) {
            let last = usize::from(k - head) + 1 == bufs.len();
            let write = if buf.writable { desc_flag::WRITE } else { 0 };
            let desc = Desc {
                addr: buf.addr,
                len: buf.len,
                flags: write | if last { 0 } else { desc_flag::NEXT },
                next: k + 1,
            };
            self.qemu.write(area + Desc::LEN * u64::from(k), &desc.to_bytes());
        }
        self.offer(index, head);
    }

    /// Makes `head` available, whatever its descriptor says, and publishes it.
    pub fn offer(&mut self, index: u16, head: u16) {
        let queue = self.queue_mut(index);
        let entry = queue.area + AVAIL_AT + 4 + 2 * u64::from(queue.avail_idx % queue.size);
        queue.avail_idx = queue.avail_idx.wrapping_add(1);
        let (area, idx) = (queue.area, queue.avail_idx);
        self.qemu.write_u16(entry, head);
        self.qemu.write_u16(area + AVAIL_AT + 2, idx);
    }

    pub fn kick(&mut self, index: u16) {
        let notify = self.queue(index).notify;
        self.qemu.write_u16(notify, index);
    }

    /// The next chain that came back: its head and length.
    pub fn take_used(&mut self, index: u16) -> Option<(u32, u32)> {
        let queue = self.queue(index);
        let used = queue.area + USED_AT;
        if self.qemu.read_u16(used + 2) == queue.last_used {
            return None;
        }
        let entry = used + 4 + 8 * u64::from(queue.last_used % queue.size);
        self.queue_mut(index).last_used = queue.last_used.wrapping_add(1);
        Some((self.qemu.read_u32(entry), self.qemu.read_u32(entry + 4)))
    }

    /// Like [`QtestDriver::take_used`], but asks until there is one; `None` when `timeout` passed.
    pub fn wait_used(&mut self, index: u16, timeout: Duration) -> Option<(u32, u32)> {
        let deadline = Instant::now() + timeout;
        loop {
            let used = self.take_used(index);
            if used.is_some() || Instant::now() >= deadline {
                return used;
            }
        }
    }

    /// Gives a command on the control queue, which is queue `index`; returns the device's status byte.
    pub fn ctrl(&mut self, index: u16, class: u8, command: u8, data: &[u8]) -> Option<u8> {
        let addr = BUFFERS - 0x1000;
        let status = addr + 2 + data.len() as u64;
        self.qemu.write(addr, &[&[class, command], data].concat());
        let bufs = [Buf::readable(addr, 2), Buf::readable(addr + 2, data.len()), Buf::writable(status, 1)];
        self.add(index, 0, &bufs);
        self.kick(index);
        self.wait_used(index, PATIENCE)?;
        Some(self.qemu.read_u8(status))
    }

    fn read_features(&mut self, word: u32) -> u32 {
        let cfg = self.common;
        self.qemu.write_u32(cfg + common_cfg::DEVICE_FEATURE_SELECT, word);
        self.qemu.read_u32(cfg + common_cfg::DEVICE_FEATURE)
    }

    /// Walks the PCI capabilities for the first structure of each kind.
    fn find_structures(&mut self) {
        let mut at = self.qemu.read_pci(0x34) & 0xff;
        while at != 0 {
            let head = self.qemu.read_pci(at);
            if head & 0xff == capability::VENDOR {
                self.note_structure(head >> 24, at);
            }
            at = head >> 8 & 0xff;
        }
    }

    fn note_structure(&mut self, kind: u32, at: u32) {
        let addr = BAR + u64::from(self.qemu.read_pci(at + 8));
        match kind {
            capability::COMMON => self.common = addr,
            capability::DEVICE => self.device = addr,
            capability::NOTIFY => {
                self.notify = addr;
                self.notify_multiplier = self.qemu.read_pci(at + 16).into();
            }
            _ => {}
        }
    }

    fn queue(&self, index: u16) -> Queue {
        self.queues[usize::from(index)].expect("a queue that was set up")
    }

    fn queue_mut(&mut self, index: u16) -> &mut Queue {
        self.queues[usize::from(index)].as_mut().expect("a queue that was set up")
    }
}
