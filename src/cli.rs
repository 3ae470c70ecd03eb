//! The command line as typed. `config` says what it means.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, ValueEnum};
use rustix::thread::CpuSet;

use crate::busy_poll::Polling;
use crate::device::name::InterfaceName;
use crate::mac::Mac;
use crate::net::header::SegmentLimit;
use crate::net::ip_link::Gateway;
use crate::virtqueue::QueueSize;

/// Connect a virtual machine's virtio-net card to a network interface of the host, from a process of its own.
///
/// A vhost-user back-end for QEMU, cloud-hypervisor and other virtual machine monitors: they connect to the socket and
/// hand over the guest's memory and virtqueues, and frames move straight between those and a TAP, TUN, MACVTAP or
/// packet socket. One process serves one network card. It does not daemonize, logs to standard error, and serves
/// front-ends one after another.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
#[command(group = needed("front-end-socket", &["socket_path", "fd"]))]
#[command(group = needed("device", &DEVICES))]
#[command(group = ArgGroup::new("tuntap").args(["tap", "tun"]))]
#[command(group = ArgGroup::new("existing").multiple(true).args(["interface", "macvlan_parent"]))]
#[command(after_help = MORE, after_long_help = SECTIONS)]
pub struct Cli {
    /// Listen for front-ends on a Unix socket at PATH
    ///
    /// The socket of a process that is gone is replaced; one that is served, and anything that is not a socket, is left
    /// alone. At most 107 bytes.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Serve the front-end on the connected socket that was passed as descriptor N, and end with it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..), conflicts_with = "socket_path")]
    pub fd: Option<i32>,

    /// Print this back-end's capabilities as JSON, for management software, and exit, whatever other options there are
    // `main` looks for it before anything is parsed; it is declared here for the help.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Use TAP interface NAME; it is created if it does not exist
    ///
    /// An existing one must have been made with 'ip tuntap add dev NAME mode tap vnet_hdr user USER', and with
    /// 'multi_queue' for more than one queue pair, and set up with 'ip link set NAME up'. One that is created here is
    /// set up, and goes away when this process ends.
    #[arg(long, value_name = "NAME")]
    pub tap: Option<InterfaceName>,

    /// Use TUN interface NAME, a routed network without Ethernet; it is created if it does not exist
    ///
    /// An existing one must have been made with 'ip tuntap add dev NAME mode tun vnet_hdr user USER', and with
    /// 'multi_queue' for more than one queue pair, and set up with 'ip link set NAME up'. Addresses and routes are
    /// given to it with ip(8), such as 'ip route add GUEST dev NAME'.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["macvtap", "macvtap_parent"])]
    pub tun: Option<InterfaceName>,

    /// Answer the guest's ARP requests and neighbour solicitations for these addresses [default: for all]
    ///
    /// It is the gateway that the guest is configured with, one IPv4 and one IPv6 address or one of them; not
    /// necessarily an address of the host. Without it everybody seems to be on the guest's network.
    #[arg(long, value_name = "ADDR[,ADDR]", conflicts_with_all = ["tap", "macvtap", "macvtap_parent", "existing"])]
    pub gateway: Option<Gateway>,

    /// Use MACVTAP interface NAME
    ///
    /// Made with 'ip link add link IF name NAME type macvtap mode bridge'. The guest's card must have its address.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["tap", "tap_fd"])]
    pub macvtap: Option<InterfaceName>,

    /// Make a MACVTAP on interface IF, by the name of --macvtap if given; it goes away when this process ends
    ///
    /// It gets the address of --mac, if given (but in mode passthru), and the MTU of --mtu.
    #[arg(long, value_name = "IF", conflicts_with_all = ["tap", "tap_fd"])]
    pub macvtap_parent: Option<InterfaceName>,

    /// Use existing interface NAME, whatever it is (a MACVLAN, a veth end, a card), through a packet socket
    ///
    /// Frames to the guest's address (--mac, else the interface's) and to groups come to the guest. Needs CAP_NET_RAW.
    #[arg(long, value_name = "NAME", conflicts_with_all = NOT_PACKET)]
    pub interface: Option<InterfaceName>,

    /// Make a MACVLAN on interface IF, by the name of --interface if given; it goes away when this process ends
    ///
    /// It gets the address of --mac, if given, and the MTU of --mtu.
    #[arg(long, value_name = "IF", conflicts_with_all = NOT_PACKET)]
    pub macvlan_parent: Option<InterfaceName>,

    /// How MACVLANs on the same interface reach each other
    #[arg(long, value_name = "MODE", default_value = "bridge", requires = "macvlan_parent", conflicts_with_all = NOT_PACKET)]
    pub macvlan_mode: ModeChoice,

    /// Let frames to any address come to the guest from the interface of --interface
    #[arg(long, requires = "existing", conflicts_with_all = NOT_PACKET)]
    pub promiscuous: bool,

    /// Open or make the device in network namespace NS, a name of 'ip netns' or a path; the socket stays here
    #[arg(long, value_name = "NS", conflicts_with = "tap_fd")]
    pub netns: Option<String>,

    /// How MACVTAPs on the same interface reach each other
    #[arg(long, value_name = "MODE", default_value = "bridge", requires = "macvtap_parent")]
    #[arg(conflicts_with_all = ["tap", "tap_fd"])]
    pub macvtap_mode: ModeChoice,

    /// Use queues that were opened by someone else and passed as descriptors N,…: one for each queue pair
    ///
    /// Those of a TAP or TUN must have been opened with IFF_NO_PI and IFF_VNET_HDR, several of them with
    /// IFF_MULTI_QUEUE; those of a MACVTAP are its open /dev/tapN. All of one interface. With --tap or --tun they may
    /// be open /dev/net/tun that are no queues yet: they become queues of that interface, which must exist, wherever it
    /// is.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(3..))]
    pub tap_fd: Vec<i32>,

    /// Attach to a multi-queue TAP or TUN even though another process has queues on it, and share its frames with that
    /// one
    // Not only `requires`: clap ignores that if the required option conflicts with one that is given.
    #[arg(long, requires = "tuntap", conflicts_with_all = NOT_TUNTAP)]
    pub shared: bool,

    /// Make a TAP that is created a port of bridge BR; an existing one is left as it is
    #[arg(long, value_name = "BR", requires = "tap", conflicts_with_all = NOT_TAP)]
    pub bridge: Option<InterfaceName>,

    /// User (a name or number) who may attach to a TAP or TUN that is created [default: who creates it, without
    /// --group]
    ///
    /// Root may always. With --group too, USER may only as a member of GROUP.
    #[arg(long, value_name = "USER", requires = "tuntap", conflicts_with_all = NOT_TUNTAP)]
    pub owner: Option<String>,

    /// Group (a name or number) whose members may attach to a TAP or TUN that is created
    #[arg(long, value_name = "GROUP", requires = "tuntap", conflicts_with_all = NOT_TUNTAP)]
    pub group: Option<String>,

    /// Let a TAP or TUN that is created stay when this process ends
    ///
    /// The next process attaches to it, and frames that come meanwhile are not refused but lost.
    #[arg(long, requires = "tuntap", conflicts_with_all = NOT_TUNTAP)]
    pub persist: bool,

    /// Carrier that a TAP or TUN begins with [default: as it is, which is up]
    ///
    /// The guest's link follows the interface: it is up while the interface is up and has a carrier. 'ip link set NAME
    /// carrier on' changes it later. While the link is down, the guest's frames are dropped.
    #[arg(long, value_name = "STATE", conflicts_with_all = NO_CARRIER)]
    pub link: Option<LinkChoice>,

    /// What to do when the interface is deleted [default: wait with --sandbox off, but for --tap-fd; else exit]
    ///
    /// Inside the sandbox nothing can be opened, so with wait the control thread stays out of it. Descriptors of
    /// --tap-fd are never opened again: with wait, the guest keeps a card whose link is down.
    #[arg(long, value_name = "WHAT")]
    pub on_device_loss: Option<LossChoice>,

    /// What to give up once everything is open, so that a guest that takes over this process gains little
    #[arg(long, value_name = "LEVEL", default_value = "auto")]
    pub sandbox: SandboxChoice,

    /// Number of queue pairs, 1 to 127 [default: 1, or the number of descriptors of --tap-fd]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=127))]
    pub queue_pairs: Option<u16>,

    /// Largest queue that a front-end may set up: a power of two up to 32768
    ///
    /// A front-end cannot be told of this limit: a larger queue is refused, and the card does not work. Some front-ends
    /// use the largest queue that there can be.
    #[arg(long, value_name = "N", default_value = "32768", value_parser = parse_queue_size)]
    pub queue_size: QueueSize,

    /// MAC address of the card, for front-ends that take it from the back-end [default: a MACVTAP's or interface's own]
    ///
    /// QEMU does not: there it is the device's 'mac=' property.
    #[arg(long, value_name = "MAC", value_parser = parse_mac)]
    pub mac: Option<Mac>,

    /// Largest MTU that the guest may use, 68 to 65535 [default: that of the interface]
    ///
    /// An interface that is created gets it, a TAP at most 65521; an existing one keeps its own. QEMU has its own
    /// property 'host_mtu=' for it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(68..))]
    pub mtu: Option<u16>,

    /// Permissions of the socket, three or four octal digits
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = parse_mode)]
    #[arg(requires = "socket_path", conflicts_with = "fd")]
    pub socket_mode: u32,

    /// Group that the socket is given to, by name or number (with --socket-mode 0660)
    #[arg(long, value_name = "GROUP", requires = "socket_path", conflicts_with = "fd")]
    pub socket_group: Option<String>,

    /// What kind of front-end will connect
    #[arg(long, value_name = "KIND", default_value = "standard")]
    pub front_end: FrontEndKind,

    /// How frames are read from the TAP and written to it
    ///
    /// Packet sockets (--interface, --macvlan-parent) take no io_uring: their batches go by sendmmsg and recvmmsg instead,
    /// which every kernel allows.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub io: IoEngine,

    /// Whether consecutive frames of one flow go to the TAP as one frame, which the kernel cuts again where it must
    ///
    /// They pass the host's network stack as one. What comes out is what the guest sent, byte for byte, but for the
    /// IPv4 identification of packets that must not be fragmented.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub coalesce: CoalesceChoice,

    /// Into how many segments the host may have to cut one frame of the guest, 1 to 1366; one that needs more is
    /// dropped
    ///
    /// Cutting costs the host's CPU time for each segment, whatever it carries. A full frame on the usual MTU takes 45.
    /// A guest has use for more than the default only where it sends a lot to a TCP peer that takes less than 364 bytes
    /// at a time.
    #[arg(long, value_name = "N", default_value_t, value_parser = parse_segments)]
    pub max_segments: SegmentLimit,

    /// Look for more frames for N microseconds (at most 1000) before sleeping, or as long as it pays ('auto'); 0 to sleep
    /// at once
    ///
    /// Polling saves kicks by the guest and wake-ups on both sides. It costs CPU time, which a busy host gets back at
    /// once.
    #[arg(long, value_name = "N|auto", default_value = "0", value_parser = parse_polling)]
    pub poll_us: Polling,

    /// Bind the worker threads of the queue pairs to these CPUs, in turn: numbers, or ranges such as 0-3
    #[arg(long, value_name = "CPU,…", value_delimiter = ',', value_parser = parse_cpus)]
    pub cpu_affinity: Vec<RangeInclusive<usize>>,

    /// Do not offer the configuration space: QEMU warns about it once for each queue pair
    #[arg(long)]
    pub no_config: bool,

    /// How much to log
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LogLevel,
}

/// Which side keeps the control queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FrontEndKind {
    /// One with a network device of its own, which keeps the control queue: QEMU -netdev vhost-user, cloud-hypervisor
    /// vhost_user=true
    Standard,
    /// One that hands everything over, control queue and configuration space too: crosvm, libkrun, User Mode Linux,
    /// cloud-hypervisor --generic-vhost-user
    Generic,
}

/// How MACVTAPs on the same interface reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeChoice {
    /// Directly
    Bridge,
    /// Through the switch outside, if it sends frames back
    Vepa,
    /// Not at all
    Private,
    /// There is only one, and it gets all frames of IF
    Passthru,
}

/// How frames are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoEngine {
    /// Small frames in batches where there are several at a time, if the kernel allows io_uring; others with a system
    /// call each
    Auto,
    /// Small frames always through io_uring (on a TAP, TUN or MACVTAP do not start if the kernel forbids it)
    Uring,
    /// A system call for each frame
    Syscall,
}

/// When frames are coalesced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CoalesceChoice {
    /// TCP, and UDP where the kernel can segment it (Linux 6.2)
    Auto,
    /// The same, with a warning where UDP cannot be
    On,
    /// Never
    Off,
}

/// How much to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// What was asked and did not happen
    Error,
    /// Also what is odd
    Warn,
    /// Also what is rare and normal
    Info,
    /// Also what changes within a session
    Debug,
    /// Also every message of the protocol
    Trace,
}

/// Whether a link is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinkChoice {
    /// Frames pass
    Up,
    /// Frames do not pass until the interface has a carrier
    Down,
}

/// What to do when the interface is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LossChoice {
    /// Wait for an interface of its name, and go on with that
    Wait,
    /// End with status 75
    Exit,
}

/// How much of the sandbox is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxChoice {
    /// As much as the host and the other options allow; the log says how much
    Auto,
    /// No files, no network, no capabilities, few system calls
    Full,
    /// No capabilities, few system calls
    Seccomp,
    /// Nothing
    Off,
}

/// The options that name the host's interface.
const DEVICES: [&str; 7] = ["tap", "tun", "tap_fd", "macvtap", "macvtap_parent", "interface", "macvlan_parent"];
/// The options that conflict with an option for interfaces of the TUN driver only, for TAPs only, for interfaces whose
/// carrier can be set, and for packet sockets only.
const NOT_TUNTAP: [&str; 4] = ["tap_fd", "macvtap", "macvtap_parent", "existing"];
const NOT_TAP: [&str; 5] = ["tap_fd", "tun", "macvtap", "macvtap_parent", "existing"];
const NO_CARRIER: [&str; 3] = ["macvtap", "macvtap_parent", "existing"];
const NOT_PACKET: [&str; 5] = ["tap", "tun", "tap_fd", "macvtap", "macvtap_parent"];

const MORE: &str = "'--help' has examples, exit statuses and signals.";
/// Lines that are to be pasted must be shorter than a terminal, which would break them: tests/cli.rs checks that, and
/// makes sections of the man page of this text.
const SECTIONS: &str = "\
Exit status:
  0   it was ended, by a signal or with the front-end of --fd
  1   it cannot start or go on as the host is; trying again may help
  2   the command line is wrong; trying again does not help
  75  the interface was deleted and is not waited for (--on-device-loss)

Signals:
  SIGTERM, SIGINT, SIGHUP  stop the rings, remove the socket, end with status 0
  SIGUSR1                  log the counters

Examples:
  ip tuntap add dev tap0 mode tap vnet_hdr user alice
  ip link set tap0 up
  vhost-user-net --socket-path /run/user/1000/net0 --tap tap0

  qemu-system-x86_64 -machine q35,memory-backend=mem0 -m 1G \\
    -object memory-backend-memfd,id=mem0,size=1G,share=on \\
    -chardev socket,id=chr0,path=/run/user/1000/net0,reconnect=1 \\
    -netdev vhost-user,id=net0,chardev=chr0 \\
    -device virtio-net-pci,netdev=net0 …

The guest's memory must be shared (share=on), or nothing can be handed over.
With reconnect=1 (from QEMU 9.2 on reconnect-ms=1000) the guest's card outlives
a restart of this process.";

/// A group of which one option must be given. The options themselves declare which of them conflict.
fn needed(name: &'static str, one_of: &[&'static str]) -> ArgGroup {
    ArgGroup::new(name).required(true).multiple(true).args(one_of)
}

fn parse_mac(text: &str) -> Result<Mac, String> {
    let is_hex = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let digits = |part: &str| is_hex(part).then(|| u8::from_str_radix(part, 16).ok()).flatten();
    let bytes: Option<Vec<u8>> = text.split(':').map(digits).collect();
    let mac: Option<Mac> = bytes.and_then(|bytes| bytes.try_into().ok());
    match mac {
        None => Err("six pairs of hexadecimal digits are expected, such as 52:54:00:12:34:56".to_owned()),
        Some([first, ..]) if first & 1 == 1 => {
            Err("this is a multicast address; the first byte must be even".to_owned())
        }
        Some(mac) if mac == [0; 6] => Err("the address of all zeros is none".to_owned()),
        Some(mac) => Ok(mac),
    }
}

fn parse_polling(text: &str) -> Result<Polling, String> {
    /// A longer poll would not be a wait for the next frame, but a CPU given away.
    const LONGEST_US: u64 = 1000;
    if text == "auto" {
        return Ok(Polling::Auto);
    }
    let micros = text.parse().ok().filter(|micros| *micros <= LONGEST_US);
    let polling = micros.map(|micros| Polling::Fixed(Duration::from_micros(micros)));
    polling.ok_or_else(|| format!("'auto' or a number from 0 to {LONGEST_US} is expected"))
}

fn parse_segments(text: &str) -> Result<SegmentLimit, String> {
    let limit = text.parse().ok().and_then(SegmentLimit::new);
    limit.ok_or_else(|| format!("a number from 1 to {} is expected", SegmentLimit::MOST))
}

fn parse_queue_size(text: &str) -> Result<QueueSize, String> {
    let number: u32 = text.parse().map_err(|_| "a power of two from 1 to 32768 is expected".to_owned())?;
    QueueSize::try_from(number).map_err(|error| error.to_string())
}

fn parse_cpus(text: &str) -> Result<RangeInclusive<usize>, String> {
    const LAST: usize = CpuSet::MAX_CPU - 1;
    let number = |text: &str| text.parse().ok().filter(|cpu| *cpu <= LAST);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let cpus = number(first).zip(number(last)).map(|(first, last)| first..=last).filter(|cpus| !cpus.is_empty());
    cpus.ok_or_else(|| format!("numbers of CPUs up to {LAST}, or ranges of them, are expected, such as 0,2 or 0-3"))
}

fn parse_mode(text: &str) -> Result<u32, String> {
    // A single digit would only say what everybody else may do, which is hardly meant.
    let is_whole = matches!(text.len(), 3 | 4) && text.bytes().all(|digit| digit.is_ascii_digit());
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| is_whole && *mode <= 0o777);
    mode.ok_or_else(|| "three or four octal digits are expected, such as 0660".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declaration_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn socket_mode_is_three_or_four_octal_digits() {
        assert_eq!((parse_mode("660"), parse_mode("0600")), (Ok(0o660), Ok(0o600)));
        for bad in ["", "7", "60", "00660", "1777", "+660", "0o60", "888", "rw-"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cpus_are_numbers_and_ranges() {
        assert_eq!((parse_cpus("3"), parse_cpus("0-3"), parse_cpus("2-2")), (Ok(3..=3), Ok(0..=3), Ok(2..=2)));
        for bad in ["", "-", "1-", "-1", "3-1", "0-99999999999", "1024", "a", "1-2-3"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mac_that_no_card_can_have_is_refused() {
        assert_eq!(parse_mac("52:54:00:12:34:5f"), Ok([0x52, 0x54, 0, 0x12, 0x34, 0x5f]));
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:254:00:12:34:56",
            "01:00:5e:00:00:01",
            "+2:54:00:12:34:56",
            "00:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }
}
