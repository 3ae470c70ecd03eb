//! Attaches to a TAP or TUN interface by name, or creates one.
//!
//! Every mistake of an operator ends the start with one message: what was tried, on what, the cause, and the command
//! that puts it right. What the driver does, and why it is checked here:
//! * `TUNSETIFF` cuts a name of more than 15 bytes, expands `%d`, and creates what does not exist;
//! * a single-queue interface and a multi-queue one open with different flags, `EINVAL` if they do not match;
//! * anybody who may open a multi-queue interface can add queues to it, and the kernel then spreads flows over all of
//!   them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_TUN_EXCL, IFF_VNET_HDR, c_int};
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use super::name::InterfaceName;
use super::netlink::{self, Link};
use super::tap_queue::{self, CannotSet, Interface};
use super::{Device, DeviceQueue, Layer, Steering, ioctl};

/// How to open a TAP or TUN by name.
#[derive(Clone, Debug)]
pub struct TapByName {
    /// TAP or TUN.
    pub layer: Layer,
    /// The interface.
    pub name: InterfaceName,
    /// How many queues to open.
    pub queue_pairs: u16,
    /// Whether other processes may have queues on it.
    pub shared: bool,
    /// The MTU of an interface that is created; an existing one keeps its own.
    pub mtu: Option<u16>,
    /// Further settings of an interface that is created.
    pub extras: Extras,
    /// Whether this opens a lost interface again: then it must exist, and is not waited for if it is in use.
    pub reopens: bool,
}

/// Settings of an interface that is created; an existing one is left as it is.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// The bridge that it becomes a port of.
    pub bridge: Option<InterfaceName>,
    /// The user who may attach to it, besides root. If neither this nor a group is given, it is the creator.
    pub owner: Option<u32>,
    /// The group whose members may attach to it. If an owner is given too, only the owner may, and only as a member.
    pub group: Option<u32>,
    /// Whether it stays when its last queue is closed.
    pub persists: bool,
}

/// Why a TAP or TUN cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// `/dev/net/tun` cannot be opened.
    #[error("Cannot open {TUN_PATH}{}", hint_tun(cause))]
    OpenTun {
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
    /// There is an interface of that name, of another kind.
    #[error(
        "Interface {name:?} is a {kind} interface, not a {0}; make a {0} of another name, as root: '{1}'",
        layer.name(), command_to_make(*layer, "NAME", false)
    )]
    OtherKind {
        /// What it should be.
        layer: Layer,
        /// The interface.
        name: String,
        /// What it is.
        kind: String,
    },
    /// It was deleted meanwhile.
    #[error("There is no {} {name:?}", layer.name())]
    Missing {
        /// What it should be.
        layer: Layer,
        /// The interface.
        name: String,
    },
    /// It does not exist in the network namespace where a passed descriptor was opened.
    #[error(
        "There is no {} {name:?} in the network namespace where descriptor {fd} of --tap-fd was opened, and none is \
         created for it; as root, there: '{}'",
        layer.name(), command_to_make(*layer, name, *multi_queue)
    )]
    NotThere {
        /// What it should be.
        layer: Layer,
        /// The interface.
        name: String,
        /// The descriptor's number.
        fd: i32,
        /// Whether it needs several queues.
        multi_queue: bool,
    },
    /// Several queue pairs are wanted on an interface with a single queue.
    #[error(
        "{} {name:?} was made with a single queue, {queue_pairs} queue pairs need a multi-queue one, so it has to be made \
         anew, as root: 'ip link delete {name} && {}', or use --queue-pairs 1",
        layer.name(), command_to_make(*layer, name, true)
    )]
    SingleQueue {
        /// TAP or TUN.
        layer: Layer,
        /// The interface.
        name: String,
        /// What was asked.
        queue_pairs: u16,
    },
    /// Somebody else has queues on it.
    #[error(
        "{} {name:?} is in use: {open_queues} of its queues are open in another process, which would get a share of \
         this guest's frames; end that process ({}), or pass --shared if that is what you want",
        layer.name(), how_to_find_it(name)
    )]
    InUse {
        /// TAP or TUN.
        layer: Layer,
        /// The interface.
        name: String,
        /// How many.
        open_queues: u32,
    },
    /// `TUNSETIFF` failed.
    #[error(
        "Cannot attach to {} {name:?} (queue {queue}){}",
        layer.name(), hint_attach((*layer, name), *queue, *exists, *multi_queue, cause)
    )]
    Attach {
        /// TAP or TUN.
        layer: Layer,
        /// The interface.
        name: String,
        /// Which of its queues, from 0.
        queue: u16,
        /// Whether it existed before.
        exists: bool,
        /// Whether it was asked for with several queues.
        multi_queue: bool,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// There is no such bridge.
    #[error(
        "--bridge {bridge:?}: there is no such interface; 'ip link add {bridge} type bridge && ip link set {bridge} up'"
    )]
    NoBridge {
        /// The interface that is not there.
        bridge: String,
    },
    /// The interface is no bridge.
    #[error("--bridge {bridge:?} is a {kind} interface, not a bridge")]
    NotABridge {
        /// The interface.
        bridge: String,
        /// What it is.
        kind: String,
    },
    /// It cannot have that MTU.
    #[error("Cannot give {} {name:?} MTU {mtu} of --mtu{}", layer.name(), hint_mtu(*layer, *mtu))]
    Mtu {
        /// TAP or TUN.
        layer: Layer,
        /// The interface.
        name: String,
        /// What it was to be.
        mtu: u16,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// A setting was refused.
    #[error(transparent)]
    Set(#[from] CannotSet),
}

impl TapError {
    /// Whether another process has the interface, which may be about to release it.
    fn is_busy(&self) -> bool {
        match self {
            TapError::InUse { .. } => true,
            TapError::Attach { cause, .. } => cause.raw_os_error() == Some(libc::EBUSY),
            _ => false,
        }
    }
}

/// How long to wait for a TAP that is in use: the kernel tears down the io_uring of a killed process, which holds the
/// TAP, only a while after the process has ended.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
const BUSY_INTERVAL: Duration = Duration::from_millis(20);
pub(super) const TUN_PATH: &str = "/dev/net/tun";

fn hint_tun(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::NotFound => ": the kernel's tun driver is not there; load it with 'modprobe tun'",
        io::ErrorKind::PermissionDenied => {
            ": this user may not open it; pass an open descriptor with --tap-fd, or give the user access to it"
        }
        _ => "",
    }
}

/// The command that makes a suitable interface, one that causes no warning.
fn command_to_make(layer: Layer, name: &str, multi_queue: bool) -> String {
    let multi = if multi_queue { " multi_queue" } else { "" };
    format!("ip tuntap add dev {name} mode {} vnet_hdr{multi} user USER && ip link set {name} up", layer.mode())
}

/// The command that names the process that has an interface open.
fn how_to_find_it(name: &str) -> String {
    format!("'grep -l \"iff:.*{name}\" /proc/[0-9]*/fdinfo/*' finds it")
}

fn hint_attach((layer, name): (Layer, &str), queue: u16, exists: bool, multi_queue: bool, cause: &io::Error) -> String {
    let make = command_to_make(layer, name, multi_queue);
    match cause.raw_os_error() {
        Some(libc::EPERM) if exists => {
            format!(": this user is not its owner; as root: 'ip link delete {name} && {make}'")
        }
        Some(libc::EPERM) => format!(": it does not exist, and this user may not create it; as root: '{make}'"),
        Some(libc::EBUSY) => {
            format!(": another process has it open (another back-end for the same guest?); {}", how_to_find_it(name))
        }
        Some(libc::EINVAL) => format!(
            ": it is no {}, or was made {} multi_queue, which does not fit",
            layer.name(),
            if multi_queue { "without" } else { "with" }
        ),
        Some(libc::E2BIG) => format!(": it takes no more than {queue} queues"),
        _ => String::new(),
    }
}

fn hint_mtu(layer: Layer, mtu: u16) -> String {
    /// The driver's limit counts the Ethernet header, which a TUN has not (`tun_net_initialize`).
    const TAP_MOST: u16 = u16::MAX - 14;
    match layer {
        Layer::Ethernet if mtu > TAP_MOST => format!(": a TAP takes at most {TAP_MOST}"),
        _ => String::new(),
    }
}

/// Attaches to the TAP or TUN that `how` names, or creates it.
///
/// An interface that was created is set up, and goes away with its last descriptor; an existing one is changed in
/// nothing but what its queues need (header size, offloads).
///
/// # Errors
/// [`TapError`], which says what to do about it.
pub fn open(how: &TapByName) -> Result<(Device, Vec<DeviceQueue>), TapError> {
    let name = how.name.as_str().to_owned();
    let what = how.layer.name();
    let bridge = how.extras.bridge.as_ref().map(|bridge| find_bridge(bridge.as_str())).transpose()?;
    let deadline = Instant::now() + if how.reopens { Duration::ZERO } else { BUSY_PATIENCE };
    let mut attached = attach(how);
    if !how.reopens && attached.as_ref().is_err_and(TapError::is_busy) {
        log::info!("{what} {name:?} is in use; waiting up to {} s for it", BUSY_PATIENCE.as_secs());
    }
    while attached.as_ref().is_err_and(TapError::is_busy) && Instant::now() < deadline {
        thread::sleep(BUSY_INTERVAL);
        attached = attach(how);
    }
    let Attached { existing, queues, multi_queue } = attached?;
    let lookup = |cause| TapError::Lookup { name: name.clone(), cause };
    let link = netlink::link_by_name(&name).map_err(lookup)?;
    // If the interface was deleted meanwhile with the process that had made it, `TUNSETIFF` has created a new one.
    let existing = existing.filter(|before| link.as_ref().is_none_or(|now| now.index == before.index));
    if how.reopens && existing.is_none() {
        // Its owner has to make it; ours is deleted with `queues`.
        return Err(TapError::Missing { layer: how.layer, name });
    }
    match (&existing, &link, queues.first()) {
        (None, Some(link), Some(queue)) => complete(&name, link, how, bridge, queue)?,
        (Some(_), Some(link), _) if bridge.is_some() && link.master != bridge => {
            let bridge = how.extras.bridge.as_ref().map_or("", InterfaceName::as_str);
            log::warn!(
                "TAP {name:?} was there before and is no port of {bridge:?}: 'ip link set {name} master {bridge}'"
            );
        }
        _ => {}
    }
    let link = link.unwrap_or_default();
    if let Some(before) = &existing {
        warn_of(before, how.layer, &name);
    }
    let verb = if existing.is_some() { "Attached to" } else { "Created" };
    log::info!("{verb} {what} {name:?} with {} queue(s)", how.queue_pairs);
    // On creation the wanted MTU was set; netlink's answer may be older.
    let mtu = if existing.is_none() { how.mtu.or(link.mtu) } else { link.mtu };
    let steering = if multi_queue { Steering::Attached } else { Steering::Always };
    let index = (link.index != 0).then_some(link.index);
    let kind = how.layer.tun_driver_kind();
    let queues = queues.into_iter().map(|fd| DeviceQueue::new(fd, kind, steering)).collect();
    Ok(tap_queue::set_up(Interface { name, kind, index, mtu, mac: None }, queues)?)
}

/// Queues of a TAP, and what it was like before they were opened.
struct Attached {
    existing: Option<Link>,
    queues: Vec<OwnedFd>,
    multi_queue: bool,
}

fn attach(how: &TapByName) -> Result<Attached, TapError> {
    let name = how.name.as_str();
    let existing = netlink::link_by_name(name).map_err(|cause| TapError::Lookup { name: name.to_owned(), cause })?;
    let multi_queue = match &existing {
        Some(link) => check_existing(how, link)?,
        None if how.reopens => return Err(TapError::Missing { layer: how.layer, name: name.to_owned() }),
        None => how.queue_pairs > 1,
    };
    let open = |queue| {
        let opened = open_queue(how, queue, existing.is_some(), multi_queue)?;
        if existing.is_none() && queue == 0 {
            close_to_others(name, how, &opened)?;
        }
        Ok(opened)
    };
    let queues = (0..how.queue_pairs).map(open).collect::<Result<_, TapError>>()?;
    Ok(Attached { existing, queues, multi_queue })
}

/// Checks that an existing interface can be used. Returns whether it is a multi-queue one.
fn check_existing(how: &TapByName, link: &Link) -> Result<bool, TapError> {
    let name = how.name.as_str().to_owned();
    let layer = how.layer;
    let found = match (link.kind.as_deref(), c_int::from(link.tun.mode)) {
        (Some("tun"), IFF_TAP) => Ok(Layer::Ethernet),
        (Some("tun"), _) => Ok(Layer::Ip),
        _ => Err(link.kind_name()),
    };
    if found != Ok(layer) {
        let kind = match found {
            Ok(layer) => layer.name(),
            Err(kind) => kind,
        };
        let kind = kind.to_owned();
        return Err(TapError::OtherKind { layer, name, kind });
    }
    if how.queue_pairs > 1 && !link.tun.multi_queue {
        return Err(TapError::SingleQueue { layer, name, queue_pairs: how.queue_pairs });
    }
    if link.tun.multi_queue && link.tun.open_queues > 0 && !how.shared {
        return Err(TapError::InUse { layer, name, open_queues: link.tun.open_queues });
    }
    Ok(link.tun.multi_queue)
}

/// Says what does not forbid an interface that was there before, but is hardly meant.
fn warn_of(link: &Link, layer: Layer, name: &str) {
    let what = layer.name();
    if !link.tun.has_owner {
        log::warn!(
            "{what} {name:?} has no owner, so any user of this host may attach to it; it has to be made anew, as root: \
             'ip link delete {name} && {}'",
            command_to_make(layer, name, link.tun.multi_queue)
        );
    }
    if !link.is_up {
        log::warn!("{what} {name:?} is down, no frames will pass: 'ip link set {name} up'");
    }
}

fn open_queue(how: &TapByName, queue: u16, exists: bool, multi_queue: bool) -> Result<OwnedFd, TapError> {
    let fd = rustix::fs::open(TUN_PATH, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
        .map_err(|cause| TapError::OpenTun { cause: cause.into() })?;
    let name = how.name.as_str().to_owned();
    attach_queue(fd.as_fd(), (how.layer, &how.name), multi_queue).map_err(|cause| TapError::Attach {
        layer: how.layer,
        name,
        queue,
        exists,
        multi_queue,
        cause,
    })?;
    Ok(fd)
}

/// Attaches a descriptor of the TUN driver that somebody else opened. The interface is in the network namespace in
/// which the descriptor was opened, which may not be ours.
pub(super) fn attach_passed(
    fd: BorrowedFd<'_>,
    of: (Layer, &InterfaceName),
    (number, queue, multi_queue): (i32, u16, bool),
) -> Result<(), TapError> {
    if !is_there(fd, of.1) {
        return Err(TapError::NotThere { layer: of.0, name: of.1.as_str().to_owned(), fd: number, multi_queue });
    }
    let mut attached = attach_queue(fd, of, multi_queue);
    if !multi_queue && attached.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
        // It may be one queue of a multi-queue interface.
        attached = attach_queue(fd, of, true);
    }
    let (layer, name) = (of.0, of.1.as_str().to_owned());
    attached.map_err(|cause| TapError::Attach { layer, name, queue, exists: true, multi_queue, cause })
}

/// Whether an interface of that name exists in the network namespace where `fd` was opened, which our netlink may not
/// see. The trick is to ask for a new one without a type: the kernel says `EBUSY` if the name exists, and creates
/// nothing if not.
fn is_there(fd: BorrowedFd<'_>, name: &InterfaceName) -> bool {
    let made = ioctl::tun_set_iff(fd, name.as_str(), IFF_TUN_EXCL);
    made.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

fn attach_queue(fd: BorrowedFd<'_>, (layer, name): (Layer, &InterfaceName), multi_queue: bool) -> io::Result<()> {
    let kind = match layer {
        Layer::Ethernet => IFF_TAP,
        Layer::Ip => IFF_TUN,
    };
    let flags = kind | IFF_NO_PI | IFF_VNET_HDR | if multi_queue { IFF_MULTI_QUEUE } else { 0 };
    ioctl::tun_set_iff(fd, name.as_str(), flags).map(|_| ())
}

/// A bridge's index.
fn find_bridge(bridge: &str) -> Result<u32, TapError> {
    let found = netlink::link_by_name(bridge).map_err(|cause| TapError::Lookup { name: bridge.to_owned(), cause })?;
    let link = found.ok_or_else(|| TapError::NoBridge { bridge: bridge.to_owned() })?;
    if link.kind.as_deref() != Some("bridge") {
        let kind = link.kind_name().to_owned();
        return Err(TapError::NotABridge { bridge: bridge.to_owned(), kind });
    }
    if !link.is_up {
        log::warn!("Bridge {bridge:?} is down, no frames will pass: 'ip link set {bridge} up'");
    }
    Ok(link.index)
}

/// Gives an interface that was just created what was asked for, and sets it up.
fn complete(name: &str, link: &Link, how: &TapByName, bridge: Option<u32>, queue: &OwnedFd) -> Result<(), TapError> {
    let set = |what| move |cause| CannotSet { what, name: name.to_owned(), cause };
    // Before the owner was set, another process could add a queue to a multi-queue interface.
    if link.tun.open_queues > u32::from(how.queue_pairs) && !how.shared {
        let (layer, open_queues) = (how.layer, link.tun.open_queues);
        return Err(TapError::InUse { layer, name: name.to_owned(), open_queues });
    }
    if let Some(mtu) = how.mtu {
        let (layer, name) = (how.layer, name.to_owned());
        netlink::set_mtu(link.index, mtu).map_err(|cause| TapError::Mtu { layer, name, mtu, cause })?;
    }
    if let Some(bridge) = bridge {
        netlink::set_master(link.index, bridge).map_err(set("the bridge"))?;
    }
    netlink::set_up(link.index).map_err(set("the link up"))?;
    if how.extras.persists {
        ioctl::tun_set_persistent(queue.as_fd()).map_err(set("that it stays"))?;
    }
    Ok(())
}

/// Sets owner and group of an interface that was just created. An ownerless TAP is open to every user, so its creator
/// becomes owner if nobody is named.
fn close_to_others(name: &str, how: &TapByName, queue: &OwnedFd) -> Result<(), TapError> {
    let set = |what| move |cause| CannotSet { what, name: name.to_owned(), cause };
    let Extras { owner, group, .. } = how.extras;
    let creator = || rustix::process::geteuid().as_raw();
    if let Some(owner) = owner.or_else(|| group.is_none().then(creator)) {
        ioctl::tun_set_owner(queue.as_fd(), owner).map_err(set("the owner"))?;
    }
    if let Some(group) = group {
        ioctl::tun_set_group(queue.as_fd(), group).map_err(set("the group"))?;
    }
    Ok(())
}
