//! Packet sockets (packet(7)) on an existing interface, or on a MACVLAN that is made here.
//!
//! What the kernel does, and how it is used here:
//! * several sockets form a fan-out group, and our BPF program picks the socket for each frame by its place in the
//!   group, which is the order of joining. So a queue that the guest does not use gets no frames;
//! * a socket also receives what the host's own stack sends over the interface, unless told not to;
//! * an interface accepts frames to its own address and to groups that somebody on the host joined. The guest needs its
//!   own groups, at least for IPv6, so all groups are asked for;
//! * the kernel takes VLAN tags out of frames and gives them in control messages (`mmsg`);
//! * all kinds of unfinished frames come, which cannot be set: `net::segment` finishes them for a guest that takes
//!   none;
//! * when the interface goes down, each socket gives one error (`ENETDOWN`), and works again when it is up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use thiserror::Error;

use super::ioctl::Membership;
use super::netlink::Link;
use super::on_card::{self, Found, OnCardError, OnCardKind, Wanted};
use super::{Control, Device, DeviceKind, DeviceQueue, Steering, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
use super::{TUN_F_USO4, TUN_F_USO6, bpf, ioctl};
use crate::mac::{self, Mac};

/// Which interface to open, and how.
#[derive(Clone, Debug)]
pub struct Existing {
    /// The interface, or the MACVLAN to make. Its `mac` is the guest's address; if not given, that is the interface's.
    pub interface: Wanted,
    /// How many sockets to open.
    pub queue_pairs: u16,
    /// Whether frames to other addresses come too.
    pub promiscuous: bool,
}

/// Why an interface cannot be used.
#[derive(Debug, Error)]
pub enum PacketError {
    /// There is none of that name.
    #[error(
        "There is no interface {name:?}; 'ip link' lists them, --netns names another network namespace, and \
         --macvlan-parent IF has a MACVLAN made"
    )]
    Missing {
        /// The interface.
        name: String,
    },
    /// It is of a kind for which there is a better option, or no Ethernet interface.
    #[error("Interface {name:?} is {kind}; {instead}")]
    WrongKind {
        /// The interface.
        name: String,
        /// What it is.
        kind: &'static str,
        /// What to use.
        instead: &'static str,
    },
    /// The interface is down, so its sockets cannot form a group.
    #[error("Interface {name:?} is down, and several queue pairs need it up: 'ip link set {name} up'")]
    Down {
        /// The interface.
        name: String,
    },
    /// It cannot be found or made.
    #[error(transparent)]
    OnCard(#[from] OnCardError),
    /// A socket cannot be opened or set up.
    #[error("Cannot open a packet socket on {name:?} ({what}){}", hint_open(cause))]
    Open {
        /// The interface.
        name: String,
        /// What failed.
        what: &'static str,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

fn hint_open(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EPERM) => {
            ": this user may not; give the program CAP_NET_RAW (as root: 'setcap cap_net_raw+ep' on it), or start it as root"
        }
        Some(libc::ENOPROTOOPT) => ": this kernel is too old; Linux 4.20 is needed",
        _ => "",
    }
}

/// Opens the interface that `how` names, or makes a MACVLAN, which goes away with the device.
///
/// # Errors
/// [`PacketError`], which says what to do about it.
pub fn open(how: &Existing) -> Result<(Device, Vec<DeviceQueue>), PacketError> {
    let Found { name, link, created } = on_card::find_or_make(OnCardKind::Macvlan, &how.interface)?;
    let link = link.ok_or_else(|| PacketError::Missing { name: name.clone() })?;
    check(&name, &link, how)?;
    let own = link.mac.filter(|_| !link.takes_all);
    let address = how.interface.mac.or(own).filter(|_| !how.promiscuous);
    let queues = open_sockets(&name, link.index, how, address)?;
    let second = |cause| PacketError::Open { name: name.clone(), what: "second descriptor", cause };
    let sockets = queues.iter().map(|queue| queue.fd.try_clone()).collect::<Result<_, _>>().map_err(second)?;
    let verb = if created.is_some() { "Made" } else { "Opened" };
    log::info!("{verb} interface {name:?} with {} packet socket(s), address {}", how.queue_pairs, mac::shown(address));
    let device = Device {
        name,
        kind: DeviceKind::PacketSocket,
        index: Some(link.index),
        control: Control::PacketSockets { sockets, dropped: AtomicU64::default() },
        offloads: offloads(),
        mtu: link.mtu,
        mac: address,
        created,
    };
    Ok((device, queues))
}

/// Checks that the interface can be used, and warns of what is odd about it.
fn check(name: &str, link: &Link, how: &Existing) -> Result<(), PacketError> {
    let wrong = |kind, instead| PacketError::WrongKind { name: name.to_owned(), kind, instead };
    match link.kind.as_deref() {
        Some("tun") => return Err(wrong("a TAP or TUN", "use --tap or --tun, which are made for that")),
        Some("macvtap") => return Err(wrong("a MACVTAP", "use --macvtap, which is made for that")),
        _ if !link.is_ethernet => {
            return Err(wrong("no Ethernet interface", "name one with Ethernet frames, or route with --tun"));
        }
        _ => {}
    }
    if !link.is_up && how.queue_pairs > 1 {
        return Err(PacketError::Down { name: name.to_owned() });
    }
    if !link.is_up {
        log::warn!("Interface {name:?} is down, no frames will pass: 'ip link set {name} up'");
    }
    if let Some(address) = an_address(name) {
        log::warn!(
            "Interface {name:?} has address {address}: the host answers there too, beside the guest; take it away with \
             'ip address flush dev {name}', or leave the guest an interface of its own"
        );
    }
    if link.kind.as_deref() == Some("macvlan") && !link.takes_all {
        warn_of_own_address(name, link, how);
    }
    Ok(())
}

/// Warns where frames to other addresses are wanted, which a MACVLAN of this mode never accepts.
fn warn_of_own_address(name: &str, link: &Link, how: &Existing) {
    let only = format_args!("MACVLAN {name:?} lets in frames to its own address and to groups only");
    match how.interface.mac {
        _ if how.promiscuous => log::warn!("{only}, with --promiscuous, too: one of mode passthru lets in all"),
        Some(mac) if Some(mac) != link.mac => {
            let mac = mac::shown(mac);
            log::warn!("{only}, and its own is not that of --mac: 'ip link set {name} address {mac}'");
        }
        _ => {}
    }
}

/// An IP address of the interface. Link-local IPv6 addresses do not count, as most interfaces have one.
fn an_address(name: &str) -> Option<String> {
    let all = nix::ifaddrs::getifaddrs().ok()?;
    let addresses = all.filter(|address| address.interface_name == name).filter_map(|address| address.address);
    addresses
        .filter_map(|address| match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => Some(v4.ip().to_string()),
            (None, Some(v6)) if !v6.ip().is_unicast_link_local() => Some(v6.ip().to_string()),
            _ => None,
        })
        .next()
}

fn open_sockets(name: &str, index: u32, how: &Existing, address: Option<Mac>) -> Result<Vec<DeviceQueue>, PacketError> {
    let group = (how.queue_pairs > 1).then(|| Arc::new(FanOut::default()));
    let fault = |what| move |cause| PacketError::Open { name: name.to_owned(), what, cause };
    let mut id = None;
    (0..how.queue_pairs)
        .map(|place| {
            let socket = open_socket(name, index, address)?;
            let steering = match &group {
                None => Steering::Always,
                Some(_) => {
                    let joined = ioctl::join_fan_out(socket.as_fd(), id).map_err(fault("fan-out"))?;
                    id.get_or_insert(joined);
                    Steering::Detached
                }
            };
            let mut queue = DeviceQueue::new(socket, DeviceKind::PacketSocket, steering);
            queue.address = address.filter(|_| place == 0);
            queue.group = group.as_ref().map(|group| (Arc::clone(group), u32::from(place)));
            if place == 0 {
                let other = how.interface.mac.map(Membership::Address);
                let asked = if how.promiscuous { Some(Membership::Promiscuous) } else { other };
                for membership in asked.into_iter().chain([Membership::AllGroups]) {
                    ioctl::add_membership(queue.as_fd(), index, membership)
                        .map_err(fault("which frames are let in"))?;
                }
                queue.attach().map_err(fault("fan-out program"))?;
            }
            Ok(queue)
        })
        .collect()
}

fn open_socket(name: &str, index: u32, address: Option<Mac>) -> Result<OwnedFd, PacketError> {
    let fault = |what| move |cause: io::Error| PacketError::Open { name: name.to_owned(), what, cause };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    // Opened without a protocol, it gets no frames before it is bound.
    let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)
        .map_err(|cause| fault("socket")(cause.into()))?;
    let fd = socket.as_fd();
    ioctl::set_packet_option(fd, ioctl::PACKET_VNET_HDR, 1).map_err(fault("virtio-net header"))?;
    ioctl::set_packet_option(fd, libc::PACKET_AUXDATA, 1).map_err(fault("VLAN tags"))?;
    ioctl::set_packet_option(fd, ioctl::PACKET_IGNORE_OUTGOING, 1).map_err(fault("PACKET_IGNORE_OUTGOING"))?;
    if let Some(address) = address {
        ioctl::attach_filter(fd, &bpf::frames_to(address)).map_err(fault("filter"))?;
    }
    ioctl::enlarge_buffers(fd, BUFFER);
    ioctl::bind_to_interface(fd, index).map_err(fault("bind"))?;
    Ok(socket)
}

/// The buffers of a socket, if the host allows as much: some dozens of the largest frames.
const BUFFER: libc::c_int = 4 << 20;

/// The offloads that the guest may leave to the kernel. A socket does not tell them; UDP segmentation came with Linux
/// 6.2.
fn offloads() -> u32 {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let datagrams = if version >= (6, 2) { TUN_F_USO4 | TUN_F_USO6 } else { 0 };
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | datagrams
}

/// A fan-out group: the places of the sockets that get frames.
#[derive(Debug, Default)]
pub(super) struct FanOut(Mutex<Vec<u32>>);

impl FanOut {
    /// Sets whether the socket at `place` gets frames. `socket` is any socket of the group.
    pub(super) fn steer(&self, socket: std::os::fd::BorrowedFd<'_>, place: u32, attached: bool) -> io::Result<()> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut wanted: Vec<u32> = places.iter().copied().filter(|other| *other != place).collect();
        if attached {
            wanted.push(place);
            wanted.sort_unstable();
        }
        ioctl::set_fan_out_program(socket, &bpf::spread(&wanted))?;
        *places = wanted;
        Ok(())
    }
}
