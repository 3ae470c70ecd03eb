//! MACVTAP interfaces: one more MAC address on a network card, whose frames pass through a character device.
//!
//! What the driver does, and why it is checked here:
//! * an interface's queues are opened at `/dev/tapN`, N being its index. All network namespaces share `/dev`, so the
//!   node may belong to another namespace's interface, and opens without an error. Sysfs has the right device numbers;
//!   if no node has them, one is made in a private folder while the queues are opened;
//! * the interface accepts unicast frames to its own address only (except in mode passthru), even if promiscuous: so
//!   the guest's card must have that address. It accepts frames to groups that the host joined or, if told so, to all
//!   groups;
//! * a deleted interface goes on taking frames and gives none, without an error: only netlink tells.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use rustix::fs::{CWD, Dev, FileType, Mode, OFlags, makedev, mknodat};
use rustix::io::Errno;
use thiserror::Error;

use super::netlink::Link;
use super::on_card::{self, Found, OnCardError, OnCardKind, Wanted};
use super::tap_queue::{self, CannotSet, Interface};
use super::{Device, DeviceKind, DeviceQueue, Steering, ioctl};
use crate::mac;

/// Which MACVTAP to open, or to make.
#[derive(Clone, Debug)]
pub struct Macvtap {
    /// Which one.
    pub interface: Wanted,
    /// How many queues to open.
    pub queue_pairs: u16,
}

/// Why a MACVTAP cannot be used.
#[derive(Debug, Error)]
pub enum MacvtapError {
    /// There is none of that name.
    #[error(
        "There is no interface {name:?}; make it with 'ip link add link IF name {name} type macvtap mode bridge', or have \
         it made with --macvtap-parent IF"
    )]
    Missing {
        /// The interface.
        name: String,
    },
    /// There is an interface of that name, of another kind.
    #[error(
        "Interface {name:?} is a {kind} interface, not a MACVTAP; make one with \
         'ip link add link IF name NAME type macvtap mode bridge'"
    )]
    NotAMacvtap {
        /// The interface.
        name: String,
        /// What it is.
        kind: String,
    },
    /// It cannot be found or made.
    #[error(transparent)]
    OnCard(#[from] OnCardError),
    /// Its device numbers cannot be found.
    #[error(
        "Cannot find the device numbers of MACVTAP {name:?} in /sys/class/net; is that another network namespace's? \
         --netns and 'ip netns exec' show the right one"
    )]
    NoNumbers {
        /// The interface.
        name: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// Its device cannot be opened.
    #[error("Cannot open queue {queue} of MACVTAP {name:?} at {path:?}{}", hint_open(cause))]
    Open {
        /// The interface.
        name: String,
        /// Its device.
        path: PathBuf,
        /// Which queue, from 0.
        queue: u16,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// No node in `/dev` is its device, and none can be made.
    #[error(
        "No node in /dev is the device of MACVTAP {name:?} ({usual:?} is missing or another network namespace's), and \
         none can be made there{}",
        hint_node(cause)
    )]
    NoNode {
        /// The interface.
        name: String,
        /// Where its node should be.
        usual: PathBuf,
        /// Why none can be made.
        #[source]
        cause: io::Error,
    },
    /// The node that was opened is not its device.
    #[error("{path:?} is another interface's device, not that of MACVTAP {name:?}")]
    WrongNode {
        /// The interface.
        name: String,
        /// What was opened.
        path: PathBuf,
    },
    /// A setting was refused.
    #[error(transparent)]
    Set(#[from] CannotSet),
}

fn hint_open(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            ": this user may not; give it access ('chown' the device), or pass open descriptors with --tap-fd"
        }
        Some(libc::EBUSY) => ": it has no more queues to give; another process may have them, or see --queue-pairs",
        _ => "",
    }
}

fn hint_node(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            ": that needs CAP_MKNOD; make it as root with 'mknod' and the numbers of /sys/class/net/NAME/tapN/dev, or pass \
             open descriptors with --tap-fd"
        }
        _ => "",
    }
}

/// Opens the MACVTAP that `how` names, or makes one, which goes away with the device.
///
/// # Errors
/// [`MacvtapError`], which says what to do about it.
pub fn open(how: &Macvtap) -> Result<(Device, Vec<DeviceQueue>), MacvtapError> {
    let Found { name, link, created } = on_card::find_or_make(OnCardKind::Macvtap, &how.interface)?;
    let link = link.ok_or_else(|| MacvtapError::Missing { name: name.clone() })?;
    if link.kind.as_deref() != Some("macvtap") {
        let kind = link.kind_name().to_owned();
        return Err(MacvtapError::NotAMacvtap { name, kind });
    }
    if !link.is_up {
        log::warn!("MACVTAP {name:?} is down, no frames will pass: 'ip link set {name} up'");
    }
    let queues = open_queues(&name, &link, how.queue_pairs)?;
    let verb = if created.is_some() { "Made" } else { "Attached to" };
    log::info!("{verb} MACVTAP {name:?} with {} queue(s), address {}", how.queue_pairs, mac::shown(link.mac));
    let mac = link.mac.filter(|_| !link.takes_all);
    let interface = Interface { name, kind: DeviceKind::Macvtap, index: Some(link.index), mtu: link.mtu, mac };
    let (device, queues) = tap_queue::set_up(interface, queues)?;
    Ok((Device { created, ..device }, queues))
}

fn open_queues(name: &str, link: &Link, queue_pairs: u16) -> Result<Vec<DeviceQueue>, MacvtapError> {
    let number = numbers(name, link.index).map_err(|cause| MacvtapError::NoNumbers { name: name.to_owned(), cause })?;
    let usual = PathBuf::from(format!("/dev/tap{}", link.index));
    let is_it = fs::metadata(&usual).is_ok_and(|node| node.file_type().is_char_device() && node.rdev() == number);
    let no_node = |cause| MacvtapError::NoNode { name: name.to_owned(), usual: usual.clone(), cause };
    // The node is removed with its folder, when `private` is dropped.
    let private = if is_it { None } else { Some(PrivateNode::make(number).map_err(no_node)?) };
    let path = private.as_ref().map_or(&usual, |node| &node.path);
    (0..queue_pairs).map(|queue| open_queue((name, number), path, queue, queue_pairs > 1)).collect()
}

fn open_queue(
    (name, number): (&str, Dev),
    path: &Path,
    queue: u16,
    several: bool,
) -> Result<DeviceQueue, MacvtapError> {
    let fault = |cause| MacvtapError::Open { name: name.to_owned(), path: path.to_owned(), queue, cause };
    let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
        .map_err(|cause| fault(cause.into()))?;
    let wrong = || Err(MacvtapError::WrongNode { name: name.to_owned(), path: path.to_owned() });
    // The node may have been replaced, by that of an interface with the same name in another namespace.
    if rustix::fs::fstat(&fd).map_err(|cause| fault(cause.into()))?.st_rdev != number {
        return wrong();
    }
    prepare(&fd, several).map_err(fault)?;
    let (found, _) = ioctl::tun_get_iff(fd.as_fd()).map_err(fault)?;
    if found != name {
        return wrong();
    }
    let steering = if several { Steering::Attached } else { Steering::Always };
    Ok(DeviceQueue::new(fd, DeviceKind::Macvtap, steering))
}

/// Makes an open `/dev/tapN` a queue with virtio-net headers; the interface's name plays no part.
pub(super) fn prepare(fd: &OwnedFd, several: bool) -> io::Result<()> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if several { IFF_MULTI_QUEUE } else { 0 };
    ioctl::tun_set_iff(fd.as_fd(), "", flags).map(drop)
}

/// The device numbers of an interface's character device.
pub(super) fn numbers(name: &str, index: u32) -> io::Result<Dev> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/tap{index}/dev"))?;
    let parts = text.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = parts.ok_or(io::ErrorKind::InvalidData)?;
    Ok(makedev(major, minor))
}

/// A device node in a folder that nobody else can enter.
struct PrivateNode {
    dir: PathBuf,
    path: PathBuf,
}

impl PrivateNode {
    /// `/dev` is the only place that is never mounted with `nodev`.
    fn make(number: Dev) -> io::Result<PrivateNode> {
        let dir = new_folder(&format!("/dev/vhost-user-net.{}", std::process::id()))?;
        let node = PrivateNode { path: dir.join("tap"), dir };
        mknodat(CWD, &node.path, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number)?;
        Ok(node)
    }
}

/// Makes a folder with that name or, if it exists, one that begins with it: a process with our id may have been killed
/// and left its folder, or run in another container that shares `/dev`.
fn new_folder(name: &str) -> io::Result<PathBuf> {
    const TRIES: u32 = 100;
    let names = std::iter::once(name.to_owned()).chain((1..TRIES).map(|number| format!("{name}.{number}")));
    for dir in names.map(PathBuf::from) {
        match rustix::fs::mkdir(&dir, Mode::RWXU) {
            Err(Errno::EXIST) => {}
            made => return Ok(made.map(|()| dir)?),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

impl Drop for PrivateNode {
    fn drop(&mut self) {
        // If there is none, making it failed.
        let _ = fs::remove_file(&self.path);
        if let Err(error) = fs::remove_dir(&self.dir) {
            log::warn!("Cannot remove {:?}: {error}", self.dir);
        }
    }
}
