//! The host side: the interface that frames go to and come from. It knows nothing of virtqueues or vhost-user messages.
//!
//! A [`Device`] is the interface as a whole (its name, what it can do, its offloads); a [`DeviceQueue`] is one queue of
//! it, owned by one worker, through which frames with their virtio-net header are read and written. A socket pair can
//! stand in for a queue, which is how the data path is tested without privileges.

mod bpf;
pub(crate) mod errno;
pub(crate) mod ioctl;
pub mod link_watch;
pub mod macvtap;
pub(crate) mod mmsg;
pub mod name;
pub mod netlink;
pub mod netns;
pub mod on_card;
pub mod packet;
pub mod passed;
pub mod stage;
pub mod tap;
mod tap_queue;
mod uring;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::io::Errno;

pub use ioctl_flags::*;
use link_watch::LinkWatch;
pub use mmsg::VlanTag;
use netlink::CreatedLink;
use packet::FanOut;
pub use stage::Io;

use crate::mac::{self, Mac};

/// `TUN_F_` offload flags, under the names of linux/if_tun.h.
mod ioctl_flags {
    pub use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6};
}

/// An interface on the host, as a whole.
#[derive(Debug)]
pub struct Device {
    name: String,
    kind: DeviceKind,
    /// Its index, if it is in our network namespace.
    index: Option<u32>,
    control: Control,
    /// The `TUN_F_` offloads that can be set on it.
    offloads: u32,
    mtu: Option<u16>,
    mac: Option<Mac>,
    /// The interface, if it was made here: it is deleted when this is dropped.
    created: Option<CreatedLink>,
}

/// The kind of a device, from which follow its layer, its name, and which calls it takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    /// A TAP: queues of `/dev/net/tun`.
    #[default]
    Tap,
    /// A TUN: queues of `/dev/net/tun`, with IP packets.
    Tun,
    /// A MACVTAP: queues of `/dev/tapN`.
    Macvtap,
    /// Any Ethernet interface, through packet sockets.
    PacketSocket,
    /// No interface: sockets in its place.
    Socket(Layer),
}

impl DeviceKind {
    /// What goes over it.
    pub fn layer(self) -> Layer {
        match self {
            DeviceKind::Tap | DeviceKind::Macvtap | DeviceKind::PacketSocket => Layer::Ethernet,
            DeviceKind::Tun => Layer::Ip,
            DeviceKind::Socket(layer) => layer,
        }
    }

    /// Its name in messages.
    fn name(self) -> &'static str {
        match self {
            DeviceKind::Tap => "TAP",
            DeviceKind::Tun => "TUN",
            DeviceKind::Macvtap => "MACVTAP",
            DeviceKind::PacketSocket => "packet socket",
            DeviceKind::Socket(_) => "socket",
        }
    }
}

/// What goes over a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layer {
    /// Ethernet frames.
    #[default]
    Ethernet,
    /// IP packets.
    Ip,
}

impl Layer {
    /// The kind of interface that the TUN driver has for it.
    pub(crate) fn tun_driver_kind(self) -> DeviceKind {
        match self {
            Layer::Ethernet => DeviceKind::Tap,
            Layer::Ip => DeviceKind::Tun,
        }
    }

    /// The name of such an interface of the TUN driver.
    pub(crate) fn name(self) -> &'static str {
        self.tun_driver_kind().name()
    }

    /// The same in the syntax of ip(8).
    fn mode(self) -> &'static str {
        match self {
            Layer::Ethernet => "tap",
            Layer::Ip => "tun",
        }
    }
}

/// The descriptors for calls that concern the whole interface.
#[derive(Debug)]
enum Control {
    /// A second descriptor of the first queue of a TAP, TUN or MACVTAP.
    Queue(OwnedFd),
    /// A second descriptor of each packet socket, and how many frames these had no room for.
    PacketSockets { sockets: Vec<OwnedFd>, dropped: AtomicU64 },
    /// Sockets in place of an interface: there is nothing to set.
    Nothing,
}

impl Device {
    /// A device whose queues are sockets that preserve message boundaries (`SOCK_SEQPACKET`), for tests and embedders.
    ///
    /// # Errors
    /// What `ioctl(2)` says where a socket cannot be made non-blocking.
    pub fn from_sockets(sockets: Vec<OwnedFd>, layer: Layer) -> io::Result<(Device, Vec<DeviceQueue>)> {
        let offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO | TUN_F_USO4 | TUN_F_USO6;
        let (name, kind) = ("socket".to_owned(), DeviceKind::Socket(layer));
        let device = Device {
            name,
            kind,
            index: None,
            control: Control::Nothing,
            offloads,
            mtu: None,
            mac: None,
            created: None,
        };
        let queue = |socket| {
            rustix::io::ioctl_fionbio(&socket, true)?;
            Ok(DeviceQueue::new(socket, kind, Steering::Always))
        };
        let queues = sockets.into_iter().map(queue).collect::<io::Result<_>>()?;
        Ok((device, queues))
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What goes over it.
    pub fn layer(&self) -> Layer {
        self.kind.layer()
    }

    /// The `TUN_F_` offloads that can be set on the interface.
    pub fn supported_offloads(&self) -> u32 {
        self.offloads
    }

    /// The interface's MTU when it was opened.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// The MAC address that the guest's card must have to receive frames; `None` if any will do.
    pub fn mac(&self) -> Option<Mac> {
        self.mac
    }

    /// The MAC address of the interface, if it was made here. Somebody else may have changed it at once (udev does).
    pub fn made_with_mac(&self) -> Option<Mac> {
        self.created.as_ref().and_then(|created| self.mac.or(created.mac()))
    }

    /// A subscription to the interface's events; `None` if it is in another network namespace.
    ///
    /// # Errors
    /// Where the kernel has no netlink socket for it.
    pub fn watch(&self) -> io::Result<Option<LinkWatch>> {
        let Some(index) = self.index else { return Ok(None) };
        let parent = self.created.as_ref().map(|created| created.parent().clone());
        let names = [(self.name.clone(), index)].into_iter().chain(parent).collect();
        LinkWatch::new(index, names).map(Some)
    }

    /// Whether neither netlink nor an error on its queues would tell that the interface was deleted, so that it has to
    /// be polled ([`Device::is_gone`]).
    pub fn ends_silently(&self) -> bool {
        self.kind == DeviceKind::Macvtap && self.index.is_none()
    }

    /// Whether the interface was deleted.
    pub fn is_gone(&self) -> bool {
        match &self.control {
            Control::Queue(queue) => ioctl::tun_get_iff(queue.as_fd()).is_err(),
            Control::PacketSockets { sockets, .. } => {
                sockets.iter().any(|socket| ioctl::bound_interface(socket.as_fd()).is_ok_and(|index| index < 0))
            }
            Control::Nothing => false,
        }
    }

    /// How many frames to the guest its packet sockets had no room for, if it has packet sockets. Drops of other
    /// devices are counted by the interface ([`link_watch::LinkStatistics`]).
    pub fn socket_drops(&self) -> Option<u64> {
        let Control::PacketSockets { sockets, dropped } = &self.control else { return None };
        // One that cannot be asked drops nothing.
        let new = sockets.iter().map(|socket| u64::from(ioctl::packet_drops(socket.as_fd()).unwrap_or(0))).sum::<u64>();
        Some(dropped.fetch_add(new, Relaxed) + new)
    }

    /// Sets the carrier that the host sees on the interface. `ip link set NAME carrier on` restores it.
    ///
    /// # Errors
    /// `Unsupported` if it is no TAP or TUN; the errors of `TUNSETCARRIER`.
    pub fn set_carrier(&self, is_on: bool) -> io::Result<()> {
        match (self.kind, &self.control) {
            (DeviceKind::Tap | DeviceKind::Tun, Control::Queue(queue)) => ioctl::tun_set_carrier(queue.as_fd(), is_on),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Sets which unfinished frames may be read: those whose checksum or segmentation is left to the guest.
    ///
    /// # Errors
    /// What `TUNSETOFFLOAD` says.
    pub fn set_offloads(&self, flags: u32) -> io::Result<()> {
        match &self.control {
            Control::Queue(queue) => ioctl::tun_set_offload(queue.as_fd(), flags),
            Control::PacketSockets { .. } | Control::Nothing => Ok(()),
        }
    }
}

/// One queue of the interface.
#[derive(Debug)]
pub struct DeviceQueue {
    fd: OwnedFd,
    kind: DeviceKind,
    steering: Steering,
    /// Its fan-out group and its place there, if it is one of several packet sockets.
    group: Option<(Arc<FanOut>, u32)>,
    /// Whether it may refuse a frame now and take it later.
    may_block: bool,
    /// The only MAC address to which frames come, if there is one; taken once a warning was logged that the guest has
    /// another.
    address: Option<Mac>,
}

/// Whether the kernel gives a queue frames, and can be told not to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Steering {
    /// It always does: the queue is the only one, or a socket.
    Always,
    Attached,
    Detached,
}

impl DeviceQueue {
    fn new(fd: OwnedFd, kind: DeviceKind, steering: Steering) -> DeviceQueue {
        DeviceQueue { fd, kind, steering, group: None, may_block: true, address: None }
    }

    /// Whether it is a packet socket: its virtio-net header has 10 bytes, and VLAN tags come beside the frames.
    pub fn is_packet_socket(&self) -> bool {
        self.kind == DeviceKind::PacketSocket
    }

    /// Whether the queue may refuse a frame now and take it later.
    pub fn may_block(&self) -> bool {
        self.may_block
    }

    /// The only MAC address to which frames come, if there is one.
    pub fn address(&self) -> Option<Mac> {
        self.address
    }

    /// Warns, once, that the guest does not send from the address to which frames come.
    pub fn warn_of_source(&mut self, source: Mac) {
        if let Some(address) = self.address.take() {
            let (address, source) = (mac::shown(address), mac::shown(source));
            log::warn!(
                "The guest sends from {source}, but only frames to {address} come to it: give its card that address \
                 (QEMU: -device virtio-net-pci,mac={address}), or the interface the guest's"
            );
        }
    }

    /// Whether the kernel gives this queue frames.
    pub fn is_attached(&self) -> bool {
        self.steering != Steering::Detached
    }

    /// Lets the kernel spread flows over this queue too. Returns whether that is a change.
    ///
    /// # Errors
    /// What `TUNSETQUEUE` says.
    pub fn attach(&mut self) -> io::Result<bool> {
        self.steer(Steering::Detached, Steering::Attached)
    }

    /// Takes this queue out of the kernel's steering. Frames that wait in it are lost, at the latest when it is
    /// attached again. Returns whether that is a change.
    ///
    /// # Errors
    /// What `TUNSETQUEUE` says.
    pub fn detach(&mut self) -> io::Result<bool> {
        self.steer(Steering::Attached, Steering::Detached)
    }

    fn steer(&mut self, from: Steering, to: Steering) -> io::Result<bool> {
        if self.steering != from {
            return Ok(false);
        }
        let attached = to == Steering::Attached;
        match &self.group {
            Some((group, place)) => {
                group.steer(self.as_fd(), *place, attached)?;
                if !attached {
                    self.forget_waiting();
                }
            }
            None => {
                if attached {
                    // For a MACVTAP. A TAP's queue was emptied when it was detached, and cannot be read now.
                    self.forget_waiting();
                }
                ioctl::tun_set_queue(self.as_fd(), attached)?;
            }
        }
        self.steering = to;
        Ok(true)
    }

    /// Discards the frames that wait, which would be stale once the queue is attached again.
    fn forget_waiting(&self) {
        /// More than fit a socket's buffer, or a queue of the usual length. The limit is there because the last socket
        /// of a group still gets new frames.
        const MOST: usize = 1 << 14;
        let lose = || match rustix::io::read(self, &mut [0; 64]) {
            // `EINVAL` is for a frame that no virtio-net header can describe; the kernel has discarded it, too.
            Ok(_) | Err(Errno::INVAL) => Ok(()),
            Err(error) => Err(error),
        };
        let _ = (0..MOST).try_for_each(|_| lose());
    }
}

impl AsFd for DeviceQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
