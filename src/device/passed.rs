//! Queues of a TAP, TUN or MACVTAP that somebody else opened and passed as descriptors (`--tap-fd`).
//!
//! `TUNGETIFF` does not tell whether frames come with packet information: the bit of `IFF_NO_PI` is that of
//! `IFF_NOFILTER`, too, which every TAP without a packet filter has. So netlink is asked.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::{IFF_MULTI_QUEUE, IFF_TAP, IFF_VNET_HDR};
use rustix::fs::FileType;
use thiserror::Error;

use super::name::InterfaceName;
use super::netlink::{self, Link};
use super::tap::{self, TUN_PATH, TapError};
use super::tap_queue::{self, CannotSet, Interface};
use super::{Device, DeviceKind, DeviceQueue, Layer, Steering, ioctl, macvtap};

/// The descriptors, and what they are to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Their numbers.
    pub fds: Vec<i32>,
    /// The TAP or TUN of which they are to be queues: a descriptor that is not attached yet is attached to it.
    pub of: Option<(Layer, InterfaceName)>,
}

/// Why descriptors cannot be used.
#[derive(Debug, Error)]
pub enum PassedError {
    /// A descriptor cannot be used.
    #[error("Descriptor {fd} of --tap-fd {wrong}")]
    BadFd {
        /// Its number.
        fd: i32,
        /// What is wrong with it, and what would be right.
        wrong: String,
    },
    /// A descriptor cannot be attached.
    #[error(transparent)]
    Attach(#[from] TapError),
    /// A setting was refused.
    #[error(transparent)]
    Set(#[from] CannotSet),
}

/// Takes over queues that somebody else opened, all of one interface.
///
/// The numbers must be of descriptors that this process was started with and that nothing in it owns: they are closed
/// with the queues.
///
/// # Errors
/// [`PassedError::BadFd`] says which descriptor is wrong, and how.
pub fn open(how: &Passed) -> Result<(Device, Vec<DeviceQueue>), PassedError> {
    let numbers = how.fds.as_slice();
    let bad = |fd, wrong: String| PassedError::BadFd { fd, wrong };
    let mut queues = Vec::new();
    let mut first: Option<(String, DeviceKind)> = None;
    for (queue, &number) in (0..).zip(numbers) {
        let fd = ioctl::take_inherited_fd(number).map_err(|e| bad(number, format!("is not open: {e}")))?;
        let is_macvtap = is_macvtap(&fd);
        if let Some((layer, name)) = &how.of
            && ioctl::tun_get_iff(fd.as_fd()).is_err_and(|e| e.raw_os_error() == Some(libc::EBADFD))
        {
            tap::attach_passed(fd.as_fd(), (*layer, name), (number, queue, numbers.len() > 1))?;
        }
        if is_macvtap {
            macvtap::prepare(&fd, numbers.len() > 1).map_err(|e| bad(number, format!("is no TAP queue: {e}")))?;
        }
        let (name, flags) = ioctl::tun_get_iff(fd.as_fd())
            .map_err(|e| bad(number, format!("is no TAP queue (open {TUN_PATH} and TUNSETIFF it first): {e}")))?;
        let wrong = |wrong: &str| Err(bad(number, format!("is a queue of {name:?} {wrong}")));
        if flags & IFF_VNET_HDR == 0 {
            return wrong("without the virtio-net header; open it with IFF_VNET_HDR");
        }
        if flags & libc::IFF_NAPI_FRAGS != 0 {
            return wrong("with IFF_NAPI_FRAGS, by which oversized frames have harmed kernels; open it without");
        }
        if numbers.len() > 1 && flags & libc::IFF_NAPI != 0 {
            return wrong("with IFF_NAPI, by which a queue that is set aside takes no frames; open it without");
        }
        if numbers.len() > 1 && flags & IFF_MULTI_QUEUE == 0 {
            return wrong("that takes one queue only; open all of them with IFF_MULTI_QUEUE");
        }
        let kind = match flags & IFF_TAP {
            _ if is_macvtap => DeviceKind::Macvtap,
            0 => DeviceKind::Tun,
            _ => DeviceKind::Tap,
        };
        let layer = kind.layer();
        if let Some((other, wanted)) = how.of.as_ref().filter(|of| (of.0, of.1.as_str()) != (layer, name.as_str())) {
            return wrong(&format!("({}), not of {:?} ({})", layer.name(), wanted.as_str(), other.name()));
        }
        let (first_name, _) = first.get_or_insert_with(|| (name.clone(), kind));
        if *first_name != name {
            return wrong(&format!("and the first one is of {first_name:?}; all must be of one interface"));
        }
        let steering = match flags & (IFF_MULTI_QUEUE | libc::IFF_DETACH_QUEUE) {
            IFF_MULTI_QUEUE => Steering::Attached,
            flags if flags & IFF_MULTI_QUEUE != 0 => Steering::Detached,
            _ => Steering::Always,
        };
        queues.push(DeviceQueue::new(fd, kind, steering));
    }
    let (name, kind) = first.unwrap_or_default();
    // `None` if the interface is in another network namespace: then the MTU is unknown, and packet information goes
    // unnoticed.
    let link = queues.first().and_then(|queue| link_of(queue.as_fd(), kind, &name)).unwrap_or_default();
    if link.tun.packet_information {
        let wrong = "with packet information before each frame; open it with IFF_NO_PI";
        let fd = numbers.first().copied().unwrap_or(-1);
        return Err(bad(fd, format!("is a queue of {name:?} {wrong}")));
    }
    log::info!("Took {} descriptor(s) of {} {name:?}", queues.len(), kind.name());
    let is_macvtap = kind == DeviceKind::Macvtap;
    // A MACVTAP that was deleted gives no error. It may be in another namespace, so it is polled instead of watched.
    let index = Some(link.index).filter(|index| !is_macvtap && *index != 0);
    let mac = link.mac.filter(|_| is_macvtap && !link.takes_all);
    let interface = Interface { name, kind, index, mtu: link.mtu, mac };
    Ok(tap_queue::set_up(interface, queues)?)
}

/// The interface of an open queue, if it is in this network namespace, where another one may have its name.
fn link_of(queue: BorrowedFd<'_>, kind: DeviceKind, name: &str) -> Option<Link> {
    let link = netlink::link_by_name(name).ok().flatten()?;
    // A TUN has no address, so without the right to ask it is taken for the interface of its name.
    let has_its_address = || ioctl::hardware_address(queue).is_ok_and(|address| address == link.mac);
    let (kind, is_it) = if kind == DeviceKind::Macvtap {
        let is_its_device = |number| rustix::fs::fstat(queue).is_ok_and(|file| file.st_rdev == number);
        // If sysfs does not show the numbers, the address has to do.
        ("macvtap", has_its_address() && macvtap::numbers(name, link.index).map_or(true, is_its_device))
    } else {
        ("tun", is_of_this_namespace(queue).unwrap_or_else(|_| has_its_address()))
    };
    Some(link).filter(|link| is_it && link.kind.as_deref() == Some(kind))
}

/// Whether a TAP or TUN is in this thread's network namespace. To ask needs `CAP_NET_ADMIN` there.
fn is_of_this_namespace(queue: BorrowedFd<'_>) -> io::Result<bool> {
    let (its, ours) = (rustix::fs::fstat(ioctl::tun_namespace(queue)?)?, rustix::fs::stat("/proc/thread-self/ns/net")?);
    Ok((its.st_dev, its.st_ino) == (ours.st_dev, ours.st_ino))
}

/// Whether it is a MACVTAP's: each has a device of its own, while all TAPs share one, the TUN driver's.
fn is_macvtap(fd: &OwnedFd) -> bool {
    let number = |file: rustix::fs::Stat| (FileType::from_raw_mode(file.st_mode), file.st_rdev);
    let tun = rustix::fs::stat(TUN_PATH).map(number);
    match (rustix::fs::fstat(fd).map(number), tun) {
        (Ok(this), Ok(tun)) if this == tun => false,
        (Ok((FileType::CharacterDevice, device)), _) => rustix::fs::major(device) != MISC_MAJOR,
        _ => false,
    }
}

/// The major number of miscellaneous devices: the TUN driver's is one, a MACVTAP's never.
const MISC_MAJOR: u32 = 10;
