//! Real kernel devices in a network namespace that lives as long as its test.
//!
//! Everything goes through `ip` (iproute2) and a thread that enters the namespace, so that the test's own
//! thread stays where it is. IPv6 is off in the namespace: no frame is there that no test sent.
//! Needs root: begin a test with `if !require_root("test_name") { return; }`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::net::{SendFlags, send, sockopt};

use super::tap_double::LARGEST_FRAME;
use super::virtio::{VnetHdr, net_flag};
use super::{PATIENCE, frames, skip, wait_readable};

/// May this test make namespaces and TAPs? If not, says that it was skipped and why.
pub fn require_root(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        skip(test, "needs root");
    } else if !succeeds("ip", &["-V"]) {
        skip(test, "needs ip of iproute2");
    } else if !succeeds("unshare", &["--net", "true"]) {
        skip(test, "may not make a network namespace");
    } else if !Path::new("/dev/net/tun").exists() {
        skip(test, "needs /dev/net/tun");
    } else {
        return true;
    }
    false
}

fn succeeds(program: &str, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}

/// As linux/sockios.h has it.
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// A TAP to make.
#[derive(Clone, Copy, Debug)]
pub struct TapSpec<'a> {
    pub name: &'a str,
    /// Hardware address of the host's side.
    pub mac: Option<&'a str>,
    /// Address and prefix length.
    pub addr: Option<&'a str>,
    pub multi_queue: bool,
    pub mtu: Option<u32>,
}

impl<'a> TapSpec<'a> {
    pub fn new(name: &'a str) -> Self {
        Self { name, mac: None, addr: None, multi_queue: false, mtu: None }
    }
}

/// A network namespace; deleted, with all that is in it, when dropped.
pub struct NetNs {
    pub name: String,
}

impl NetNs {
    /// Makes a namespace with a name that no other process uses, and that tells what `VHOST_USER_NET_RUN` calls this run:
    /// whoever kills a run can then remove what it left.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let run = std::env::var("VHOST_USER_NET_RUN").map_or(String::new(), |run| run + "-");
        let name = format!("vun-{run}{}-{count}", std::process::id());
        must(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Self { name };
        namespace.write_sysctl("net/ipv6/conf/all/disable_ipv6", "1");
        namespace.write_sysctl("net/ipv6/conf/default/disable_ipv6", "1");
        namespace.ip("link set lo up");
        namespace
    }

    /// Makes a persistent TAP with virtio-net headers, and sets it up.
    pub fn add_tap(&self, spec: &TapSpec<'_>) {
        let name = spec.name;
        let multi_queue = if spec.multi_queue { "multi_queue" } else { "" };
        self.ip(&format!("tuntap add dev {name} mode tap vnet_hdr {multi_queue}"));
        if let Some(mac) = spec.mac {
            self.ip(&format!("link set dev {name} address {mac}"));
        }
        if let Some(mtu) = spec.mtu {
            self.ip(&format!("link set dev {name} mtu {mtu}"));
        }
        if let Some(addr) = spec.addr {
            self.ip(&format!("addr add {addr} dev {name}"));
        }
        self.ip(&format!("link set dev {name} up"));
    }

    /// Runs `ip` in the namespace with words of `args`; returns what it printed, panics if it fails.
    pub fn ip(&self, args: &str) -> String {
        let output = must(Command::new("ip").args(["-n", &self.name]).args(args.split_whitespace()));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Whether `ip` can do this in the namespace.
    pub fn try_ip(&self, args: &str) -> bool {
        let output = Command::new("ip").args(["-n", &self.name]).args(args.split_whitespace()).output();
        output.is_ok_and(|output| output.status.success())
    }

    /// A command that runs in the namespace, to be given arguments.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs a program in the namespace; returns what it printed, panics if it fails.
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let output = must(self.command(program).args(args));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a program in the namespace; it is killed when the guard is dropped.
    /// `ip netns exec` becomes the program, so the child's pid is the program's.
    pub fn spawn(&self, program: &str, args: &[&str]) -> ChildGuard {
        ChildGuard(self.command(program).args(args).spawn().unwrap())
    }

    /// Calls `work` in a thread that is in the namespace; what it opens stays there.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                // SAFETY: setns only reads the descriptor, which `namespace` keeps open.
                let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(entered, 0, "setns: {}", io::Error::last_os_error());
                work()
            });
            inside.join().unwrap()
        })
    }

    /// A number from `/sys/class/net/DEV/statistics`, for example `rx_packets`.
    pub fn statistic(&self, device: &str, name: &str) -> u64 {
        let path = format!("/sys/class/net/{device}/statistics/{name}");
        self.run("cat", &[&path]).trim().parse().unwrap()
    }

    /// Opens a queue of a TAP as a back-end would, non-blocking and with headers of [`VnetHdr::LEN`] bytes.
    pub fn open_tap(&self, device: &str, multi_queue: bool) -> TapQueue {
        TapQueue { fd: self.within(|| tap_queue(device, multi_queue)) }
    }

    /// Opens a queue of a TUN or TAP, new or not, with any `IFF_` flags.
    pub fn open_tun(&self, device: &str, flags: i32) -> OwnedFd {
        self.try_open_tun(device, flags).expect("TUNSETIFF")
    }

    /// The same, if the kernel lets it be opened.
    pub fn try_open_tun(&self, device: &str, flags: i32) -> io::Result<OwnedFd> {
        self.within(|| tun_queue(device, flags))
    }

    /// Opens the device of a MACVTAP, by a node of our own: that in /dev may be another namespace's.
    pub fn open_macvtap(&self, name: &str) -> OwnedFd {
        let number = self.run("sh", &["-c", &format!("cat /sys/class/net/{name}/tap*/dev")]);
        let (major, minor) = number.trim().split_once(':').unwrap();
        let folder = tempfile::TempDir::new_in("/dev").unwrap();
        let node = folder.path().join("tap");
        must(Command::new("mknod").arg(&node).args(["c", major, minor]));
        rustix::fs::open(&node, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).unwrap()
    }

    /// Gives a value to one of the interface's switches, by the number of linux/ethtool.h, where the program of that name
    /// may be absent.
    pub fn set_ethtool(&self, device: &str, switch: u32, value: u32) {
        self.within(|| {
            let mut value = [switch, value];
            // SAFETY: all zeroes is a good ifreq.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            // SAFETY: SIOCETHTOOL with a switch's number reads `request`, and the two words of `value` that it names.
            let set = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &mut request) };
            assert_eq!(set, 0, "ethtool {switch:#x} of {device}: {}", io::Error::last_os_error());
        });
    }

    /// How many queues of a multi-queue TAP are attached, and how many detached.
    pub fn tap_queues(&self, device: &str) -> (u32, u32) {
        let shown = self.ip(&format!("-d link show dev {device}"));
        let words: Vec<_> = shown.split_whitespace().collect();
        let number = |name| {
            let at = words.iter().position(|word| *word == name).unwrap_or_else(|| panic!("No {name}: {shown}"));
            words[at + 1].parse().unwrap()
        };
        // Beside the netdevice's own numtxqueues; the TAP's stand behind its type.
        (number("numqueues"), number("numdisabled"))
    }

    /// Waits until the interface takes frames: for a moment after it has got its carrier, the kernel drops what is sent to
    /// it (its queueing discipline is put in place by a deferred job). Nothing tells when.
    pub fn wait_operational(&self, device: &str) {
        wait_operational(&self.name, device);
    }

    fn write_sysctl(&self, name: &str, value: &str) {
        // /proc/sys/net shows the namespace of the thread that looks.
        self.within(|| {
            // A kernel without IPv6 has no such file, and needs none.
            let _ = std::fs::write(format!("/proc/sys/{name}"), value);
        });
    }
}

fn wait_operational(namespace: &str, device: &str) {
    let deadline = Instant::now() + PATIENCE;
    // One that had its carrier from the start is UNKNOWN for ever.
    let is_down = || {
        let shown = must(Command::new("ip").args(["-n", namespace, "link", "show", "dev", device])).stdout;
        let shown = String::from_utf8(shown).unwrap();
        ["state DOWN", "state LOWERLAYERDOWN"].iter().any(|state| shown.contains(state))
    };
    while is_down() {
        assert!(Instant::now() < deadline, "{device} does not come up");
        thread::sleep(Duration::from_millis(10));
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        // Panicking here while panicking would hide the test's own message.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A process that is killed and reaped when its test ends.
pub struct ChildGuard(pub Child);

impl ChildGuard {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An open queue of a TAP: the guest's side, for tests without a back-end, or to hand over to one.
pub struct TapQueue {
    pub fd: OwnedFd,
}

impl TapQueue {
    pub fn write(&self, header: &VnetHdr, frame: &[u8]) -> io::Result<usize> {
        let bytes = [&header.to_bytes()[..], frame].concat();
        Ok(rustix::io::write(&self.fd, &bytes)?)
    }

    pub fn read(&self, timeout: Duration) -> Option<(VnetHdr, Vec<u8>)> {
        if !wait_readable(&self.fd, timeout) {
            return None;
        }
        let mut bytes = vec![0; LARGEST_FRAME];
        let len = rustix::io::read(&self.fd, &mut bytes).unwrap();
        bytes.truncate(len);
        let frame = bytes.split_off(VnetHdr::LEN);
        Some((VnetHdr::from_bytes(&bytes), frame))
    }

    /// Reads frames until one is `wanted`; the host may send others.
    pub fn read_until(&self, timeout: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (_, frame) = self.read(left)?;
            if wanted(&frame) {
                return Some(frame);
            }
        }
    }
}

/// Attaches a queue of `device` in the calling thread's namespace.
fn tap_queue(device: &str, multi_queue: bool) -> OwnedFd {
    let several = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let fd = tun_queue(device, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several).expect("TUNSETIFF");
    let header_len = VnetHdr::LEN as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_len) };
    assert_eq!(set, 0, "TUNSETVNETHDRSZ: {}", io::Error::last_os_error());
    fd
}

/// Makes a queue with these `IFF_` flags in the calling thread's namespace.
fn tun_queue(device: &str, wanted: libc::c_int) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).unwrap();
    // SAFETY: an ifreq of zeros is valid: a name of null bytes and numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = wanted as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if set == 0 { Ok(fd) } else { Err(io::Error::last_os_error()) }
}

/// A packet socket on a device, on the host's side: sends towards the guest, receives what the guest sent, VLAN tags in
/// their place.
pub struct PacketSocket {
    fd: OwnedFd,
    /// The names of both.
    namespace: String,
    device: String,
    vnet_hdr: bool,
}

impl PacketSocket {
    /// Plain frames, as they are on the wire; a GSO frame shows whole, without its header.
    pub fn open(namespace: &NetNs, device: &str) -> Self {
        Self::open_with(namespace, device, false)
    }

    /// Frames with the virtio-net header (10 bytes) that the kernel makes of them, for offloads.
    pub fn open_vnet_hdr(namespace: &NetNs, device: &str) -> Self {
        Self::open_with(namespace, device, true)
    }

    fn open_with(namespace: &NetNs, device: &str, vnet_hdr: bool) -> Self {
        let fd = namespace.within(|| bound_packet_socket(device));
        // What this host sends is not what the guest sent.
        set_packet_option(&fd, libc::PACKET_IGNORE_OUTGOING, 1);
        // The kernel takes a VLAN tag out of a frame, and tells it beside.
        set_packet_option(&fd, libc::PACKET_AUXDATA, 1);
        // Room for a burst: what finds none is lost.
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 8 << 20);
        if vnet_hdr {
            set_packet_option(&fd, libc::PACKET_VNET_HDR, 1);
        }
        Self { fd, namespace: namespace.name.clone(), device: device.to_owned(), vnet_hdr }
    }

    /// As [`NetNs::wait_operational`].
    pub fn wait_operational(&self) {
        wait_operational(&self.namespace, &self.device);
    }

    /// Sends a frame to the device, that is, towards the guest.
    pub fn send(&self, frame: &[u8]) {
        assert!(!self.vnet_hdr, "This socket wants a header");
        send(&self.fd, frame, SendFlags::empty()).unwrap();
    }

    /// Lets much be on its way at a time: what waits in a device counts as the sender's.
    pub fn enlarge(&self) {
        sockopt::set_socket_send_buffer_size_force(&self.fd, 64 << 20).unwrap();
    }

    /// As [`PacketSocket::send`], to a device that may have no room.
    pub fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        assert!(!self.vnet_hdr, "This socket wants a header");
        send(&self.fd, frame, SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// Sends a frame with offloads to be done.
    pub fn send_vnet(&self, header: &VnetHdr, frame: &[u8]) -> io::Result<()> {
        let bytes = [&header.to_bytes()[..10], frame].concat();
        send(&self.fd, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// The next frame that came out of the device, that is, left the guest.
    pub fn recv(&self, timeout: Duration) -> Option<Vec<u8>> {
        Some(self.recv_vnet(timeout)?.1)
    }

    pub fn recv_vnet(&self, timeout: Duration) -> Option<(VnetHdr, Vec<u8>)> {
        if !wait_readable(&self.fd, timeout) {
            return None;
        }
        let (mut bytes, tag) = receive_with_tag(&self.fd);
        let mut header = VnetHdr::default();
        if self.vnet_hdr {
            let frame = bytes.split_off(10);
            bytes.extend([0, 0]);
            header = VnetHdr::from_bytes(&std::mem::replace(&mut bytes, frame));
        }
        let Some((tpid, tci)) = tag else { return Some((header, bytes)) };
        if header.flags & net_flag::NEEDS_CSUM != 0 {
            header.csum_start += 4;
        }
        Some((header, frames::tag(&bytes, tpid, tci)))
    }
}

/// Reads a frame, header and all, and the VLAN tag that the kernel took out of it.
fn receive_with_tag(fd: &OwnedFd) -> (Vec<u8>, Option<(u16, u16)>) {
    let mut bytes = vec![0; 1 << 17];
    let mut iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // Aligned as a cmsghdr is.
    let mut control = [0_u64; 8];
    // SAFETY: all zeros is a valid msghdr: null pointers and lengths of 0.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iovec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: `message` names `bytes` and `control`, which outlive the call and are not otherwise used meanwhile.
    let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, 0) };
    assert!(len >= 0, "recvmsg: {}", io::Error::last_os_error());
    bytes.truncate(len as usize);
    // SAFETY: `message` is as the kernel left it.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: it is null, or points into `control`, which is aligned and still there.
    let first = unsafe { first.as_ref() };
    let aux = first.filter(|first| (first.cmsg_level, first.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA));
    // SAFETY: the pointer is one behind the header, and is not read here.
    let aux = aux.map(|aux| unsafe { libc::CMSG_DATA(aux) }.cast::<libc::tpacket_auxdata>());
    // SAFETY: behind the header of such a message is a tpacket_auxdata, numbers only.
    let aux = aux.map(|aux| unsafe { aux.read_unaligned() });
    let aux = aux.filter(|aux| aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0);
    (bytes, aux.map(|aux| (aux.tp_vlan_tpid, aux.tp_vlan_tci)))
}

/// Has the kernel cut what is sent by this socket into datagrams of `size` bytes (`UDP_SEGMENT`).
pub fn segment_datagrams(socket: &UdpSocket, size: usize) {
    set_option(socket, libc::SOL_UDP, libc::UDP_SEGMENT, size as i32);
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A packet socket for all protocols on `device` of the calling thread's namespace.
fn bound_packet_socket(device: &str) -> OwnedFd {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // Protocol 0: nothing is received before bind says from where.
    // SAFETY: socket takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "socket: {}", io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let addr = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: all,
        sll_ifindex: interface_index(device),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: `addr` is a sockaddr_ll of the length given, and outlives the call.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), size_of_val(&addr) as u32) };
    assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
    fd
}

fn interface_index(device: &str) -> i32 {
    let name = CString::new(device).unwrap();
    // SAFETY: `name` ends with a null byte and outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "No device {device}");
    index as i32
}

fn set_packet_option(fd: &OwnedFd, option: i32, value: i32) {
    set_option(fd, libc::SOL_PACKET, option, value);
}

fn set_option(fd: &impl AsRawFd, level: i32, option: i32, value: i32) {
    // SAFETY: `value` is an int of the length given, and outlives the call.
    let set = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), size_of_val(&value) as u32)
    };
    assert_eq!(set, 0, "setsockopt: {}", io::Error::last_os_error());
}

fn must(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
