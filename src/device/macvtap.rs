//! MACVTAP interfaces: a network card's second address, whose frames come out of a character device.
//!
//! The facts about the driver behind the checks:
//! * an interface's queues are opened at `/dev/tapN`, N being its index; that folder is one for all network namespaces,
//!   so a node of that name may be another namespace's interface, which opens without an error. The device numbers in
//!   sysfs are the right ones, and where no node has them, one is made in a private folder for as long as opening takes;
//! * the interface takes frames to its own address only (but in mode passthru), whatever promiscuity says: the guest's
//!   card must have that address; and frames to groups that the host joined or, if told so, to all of them;
//! * a deleted one goes on taking frames and gives none, without an error: netlink tells.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use rustix::fs::{CWD, Dev, FileType, Mode, OFlags, makedev, mknodat};
use thiserror::Error;

use super::name::InterfaceName;
use super::netlink::{self, CreatedLink, Link};
use super::tap_queue::{self, CannotSet, Interface};
use super::{Device, DeviceQueue, Driver, Layer, Steering, ioctl};

pub use super::netlink::MacvtapMode;

/// Which MACVTAP to open, or to make.
#[derive(Clone, Debug)]
pub struct Macvtap {
    /// The interface; one that is made has a name of its own if not given.
    pub name: Option<InterfaceName>,
    /// What to make it on, and how; it must exist if not given.
    pub parent: Option<(InterfaceName, MacvtapMode)>,
    /// How many queues to open.
    pub queue_pairs: u16,
    /// The address of one that is made; in mode passthru it is its parent's.
    pub mac: Option<[u8; 6]>,
    /// The MTU of one that is made.
    pub mtu: Option<u16>,
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
    /// What it is to be made on does not exist.
    #[error("--macvtap-parent {parent:?}: there is no such interface; 'ip link' lists them")]
    NoParent {
        /// The interface that is not there.
        parent: String,
    },
    /// It cannot be made.
    #[error("Cannot make MACVTAP {name:?} on {parent:?}{}", hint_make(parent, cause))]
    Make {
        /// The interface.
        name: String,
        /// What it was to be made on.
        parent: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// It cannot have that MTU.
    #[error("Cannot give MACVTAP {name:?} MTU {mtu} of --mtu: {parent:?} must have as much")]
    Mtu {
        /// The interface.
        name: String,
        /// What it was to be.
        mtu: u16,
        /// What the interface is on.
        parent: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// Netlink did not answer.
    #[error("Cannot look up interface {name:?}")]
    Lookup {
        /// The interface.
        name: String,
        /// What went wrong.
        #[source]
        cause: io::Error,
    },
    /// Nothing tells its device numbers.
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
    /// The device is another interface's.
    #[error("{path:?} is of interface {found:?}, not of {name:?}")]
    WrongNode {
        /// The interface.
        name: String,
        /// Its device.
        path: PathBuf,
        /// Whose it is.
        found: String,
    },
    /// A setting was refused.
    #[error(transparent)]
    Set(#[from] CannotSet),
}

fn hint_make(parent: &str, cause: &io::Error) -> String {
    match cause.raw_os_error() {
        Some(libc::EPERM) => ": this user may not; make it as root, and pass its queues with --tap-fd".to_owned(),
        Some(libc::EBUSY | libc::EINVAL) => {
            format!(
                ": {parent:?} is in use another way (a bridge's port, or by MACVTAPs of which one has mode passthru)"
            )
        }
        Some(libc::EEXIST) => ": an interface of that name exists".to_owned(),
        Some(libc::EOPNOTSUPP) => ": the kernel has no MACVTAP; load it with 'modprobe macvtap'".to_owned(),
        _ => String::new(),
    }
}

fn hint_open(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::ENOENT) => {
            ": no node there has the interface's device numbers (/sys/class/net/NAME/tapN/dev), and this user may not make \
             one; make it as root with 'mknod', or pass open descriptors with --tap-fd"
        }
        Some(libc::EPERM | libc::EACCES) => {
            ": this user may not; give it access ('chown' the device), or pass open descriptors with --tap-fd"
        }
        Some(libc::EBUSY) => ": it has no more queues to give; another process may have them, or see --queue-pairs",
        _ => "",
    }
}

/// Opens the MACVTAP that `how` names, or makes one, which goes away with the device.
///
/// # Errors
/// [`MacvtapError`], which says what to do about it.
pub fn open(how: &Macvtap) -> Result<(Device, Vec<DeviceQueue>), MacvtapError> {
    let name = how.name.as_ref().map_or_else(own_name, |name| name.as_str().to_owned());
    let lookup =
        |name: &str| netlink::link_by_name(name).map_err(|cause| MacvtapError::Lookup { name: name.to_owned(), cause });
    let existing = lookup(&name)?;
    let created = match (&existing, &how.parent) {
        (None, Some((parent, mode))) => {
            let parent = parent.as_str();
            let on = lookup(parent)?.ok_or_else(|| MacvtapError::NoParent { parent: parent.to_owned() })?;
            Some(make(&name, (parent, &on), *mode, how)?)
        }
        _ => None,
    };
    let link = lookup(&name)?.ok_or_else(|| MacvtapError::Missing { name: name.clone() })?;
    if link.kind.as_deref() != Some("macvtap") {
        let kind = link.kind.as_deref().unwrap_or("physical").to_owned();
        return Err(MacvtapError::NotAMacvtap { name, kind });
    }
    if let (Some(_), Some((parent, _))) = (&existing, &how.parent) {
        let parent = parent.as_str();
        log::warn!("MACVTAP {name:?} is there already and is used as it is, not made on {parent:?} and not taken away");
    }
    if !link.is_up {
        log::warn!("MACVTAP {name:?} is down, no frames will pass: 'ip link set {name} up'");
    }
    let queues = open_queues(&name, &link, how.queue_pairs)?;
    let verb = if created.is_some() { "Made" } else { "Attached to" };
    log::info!("{verb} MACVTAP {name:?} with {} queue(s), address {}", how.queue_pairs, ShownMac(link.mac));
    let mac = link.mac.filter(|_| !link.takes_all);
    let interface = Interface {
        name,
        layer: Layer::Ethernet,
        index: Some(link.index),
        mtu: link.mtu,
        mac,
        driver: Driver::Macvtap,
    };
    let (device, queues) = tap_queue::set_up(interface, queues)?;
    Ok((Device { created, ..device }, queues))
}

/// A name that no other process of this namespace takes.
fn own_name() -> String {
    format!("macvtap-{}", std::process::id())
}

fn make(
    name: &str,
    (parent, on): (&str, &Link),
    mode: MacvtapMode,
    how: &Macvtap,
) -> Result<CreatedLink, MacvtapError> {
    let fault = |cause| MacvtapError::Make { name: name.to_owned(), parent: parent.to_owned(), cause };
    let created = netlink::make_macvtap(name, (parent, on.index), mode, how.mac).map_err(fault)?;
    if let Some(mtu) = how.mtu {
        let (name, parent) = (name.to_owned(), parent.to_owned());
        netlink::set_mtu(created.index(), mtu).map_err(|cause| MacvtapError::Mtu { name, mtu, parent, cause })?;
    }
    netlink::let_groups_in(created.index()).map_err(fault)?;
    netlink::set_up(created.index()).map_err(fault)?;
    if !on.is_up {
        log::warn!("Interface {parent:?} is down, no frames will pass: 'ip link set {parent} up'");
    }
    Ok(created)
}

fn open_queues(name: &str, link: &Link, queue_pairs: u16) -> Result<Vec<DeviceQueue>, MacvtapError> {
    let number = numbers(name, link.index).map_err(|cause| MacvtapError::NoNumbers { name: name.to_owned(), cause })?;
    let usual = PathBuf::from(format!("/dev/tap{}", link.index));
    let is_it = fs::metadata(&usual).is_ok_and(|node| node.file_type().is_char_device() && node.rdev() == number);
    // The node is there for as long as its folder.
    let private = if is_it { None } else { PrivateNode::make(number).ok() };
    let path = private.as_ref().map_or(usual, |node| node.path.clone());
    (0..queue_pairs).map(|queue| open_queue(name, &path, queue, queue_pairs > 1)).collect()
}

fn open_queue(name: &str, path: &Path, queue: u16, several: bool) -> Result<DeviceQueue, MacvtapError> {
    let fault = |cause| MacvtapError::Open { name: name.to_owned(), path: path.to_owned(), queue, cause };
    let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
        .map_err(|cause| fault(cause.into()))?;
    prepare(&fd, several).map_err(fault)?;
    let (found, _) = ioctl::tun_get_iff(fd.as_fd()).map_err(fault)?;
    if found != name {
        return Err(MacvtapError::WrongNode { name: name.to_owned(), path: path.to_owned(), found });
    }
    let steering = if several { Steering::Attached } else { Steering::Always };
    Ok(DeviceQueue::new(fd, steering))
}

/// Makes an open `/dev/tapN` a queue with virtio-net headers; the interface's name plays no part.
pub(super) fn prepare(fd: &OwnedFd, several: bool) -> io::Result<()> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if several { IFF_MULTI_QUEUE } else { 0 };
    ioctl::tun_set_iff(fd.as_fd(), "", flags).map(drop)
}

/// The device numbers of an interface's character device.
fn numbers(name: &str, index: u32) -> io::Result<Dev> {
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
    /// `/dev` is the one place that is never mounted without devices.
    fn make(number: Dev) -> io::Result<PrivateNode> {
        let dir = PathBuf::from(format!("/dev/vhost-user-net.{}", std::process::id()));
        rustix::fs::mkdir(&dir, Mode::RWXU)?;
        let node = PrivateNode { path: dir.join("tap"), dir };
        mknodat(CWD, &node.path, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number)?;
        Ok(node)
    }
}

impl Drop for PrivateNode {
    fn drop(&mut self) {
        // Where there is none it was not made.
        let _ = fs::remove_file(&self.path);
        if let Err(error) = fs::remove_dir(&self.dir) {
            log::warn!("Cannot remove {:?}: {error}", self.dir);
        }
    }
}

/// An address as people write it.
pub(crate) struct ShownMac(pub(crate) Option<[u8; 6]>);

impl std::fmt::Display for ShownMac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some([a, b, c, d, e, g]) = self.0 else { return f.write_str("unknown") };
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
