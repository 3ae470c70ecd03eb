//! Interfaces on top of a network card, MACVTAPs and MACVLANs: found by name, or made and then deleted with the device.

use std::io;

use thiserror::Error;

use super::name::InterfaceName;
use super::netlink::{self, CreatedLink, Link};
use crate::mac::Mac;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnCardKind {
    /// Frames come out of a character device.
    Macvtap,
    /// It is an interface like others.
    Macvlan,
}

impl OnCardKind {
    fn name(self) -> &'static str {
        match self {
            OnCardKind::Macvtap => "MACVTAP",
            OnCardKind::Macvlan => "MACVLAN",
        }
    }

    /// As ip(8) and modprobe(8) have it.
    pub(super) fn type_name(self) -> &'static str {
        match self {
            OnCardKind::Macvtap => "macvtap",
            OnCardKind::Macvlan => "macvlan",
        }
    }
}

/// How interfaces on the same card reach each other and the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCardMode {
    /// They reach each other directly.
    #[default]
    Bridge,
    /// All frames go out; the switch outside may send them back.
    Vepa,
    /// They do not reach each other.
    Private,
    /// There is only one, which gets all frames of its parent.
    Passthru,
}

/// Which interface to find, or to make.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The name; if not given, one that is made gets a unique one.
    pub name: Option<InterfaceName>,
    /// What to make it on, and in which mode; if not given, the interface must exist.
    pub parent: Option<(InterfaceName, OnCardMode)>,
    /// The address of one that is made; in mode passthru it is its parent's.
    pub mac: Option<Mac>,
    /// The address that it had before it was deleted, used if `mac` is not given.
    pub former_mac: Option<Mac>,
    /// The MTU of one that is made.
    pub mtu: Option<u16>,
}

/// Why there is no such interface.
#[derive(Debug, Error)]
pub enum OnCardError {
    /// The interface to make it on does not exist.
    #[error("--{}-parent {parent:?}: there is no such interface; 'ip link' lists them", kind.type_name())]
    NoParent {
        /// What was to be made.
        kind: OnCardKind,
        /// The interface that is not there.
        parent: String,
    },
    /// The interface to make it on is no Ethernet interface.
    #[error(
        "--{}-parent {parent:?}: this is a {parent_kind} interface, and a {} is made on one with Ethernet frames; 'ip link' \
         lists them (link/ether)",
        kind.type_name(), kind.name()
    )]
    NoEthernet {
        /// What was to be made.
        kind: OnCardKind,
        /// What it was to be made on.
        parent: String,
        /// What that is.
        parent_kind: String,
    },
    /// It cannot be made.
    #[error("Cannot make {} {name:?} on {parent:?}{}", kind.name(), hint_make(*kind, parent, cause))]
    Make {
        /// What was to be made.
        kind: OnCardKind,
        /// The interface.
        name: String,
        /// What it was to be made on.
        parent: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// It cannot have that MTU.
    #[error("Cannot give {} {name:?} MTU {mtu} of --mtu: {parent:?} must have as much", kind.name())]
    Mtu {
        /// What was to be made.
        kind: OnCardKind,
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
}

fn hint_make(kind: OnCardKind, parent: &str, cause: &io::Error) -> String {
    let (kind, name) = (kind.type_name(), kind.name());
    let instead = if kind == "macvtap" { "pass its queues with --tap-fd" } else { "name it with --interface" };
    match cause.raw_os_error() {
        Some(libc::EPERM) => format!(
            ": this user may not; make it as root ('ip link add link {parent} name NAME type {kind} mode bridge'), and {instead}"
        ),
        Some(libc::EBUSY | libc::EINVAL) => format!(
            ": {parent:?} is in use another way (a bridge's port, or by MACVLANs or MACVTAPs of which one has mode passthru)"
        ),
        Some(libc::EADDRINUSE) => {
            format!(": {parent:?}, or another {name} on it, has that address; give another with --mac")
        }
        Some(libc::EEXIST) => ": an interface of that name exists".to_owned(),
        Some(libc::EOPNOTSUPP) => format!(": the kernel has no {name}; load it with 'modprobe {kind}'"),
        _ => String::new(),
    }
}

/// What was found or made.
pub(super) struct Found {
    pub(super) name: String,
    /// None if it does not exist and was not to be made.
    pub(super) link: Option<Link>,
    pub(super) created: Option<CreatedLink>,
}

/// Finds the interface of the wanted name, or makes one if there is a parent.
pub(super) fn find_or_make(kind: OnCardKind, wanted: &Wanted) -> Result<Found, OnCardError> {
    // A name that no other process in this PID namespace chooses.
    let own_name = || format!("{}-{}", kind.type_name(), std::process::id());
    let name = wanted.name.as_ref().map_or_else(own_name, |name| name.as_str().to_owned());
    let existing = lookup(&name)?;
    let created = match (&existing, &wanted.parent) {
        (None, Some((parent, mode))) => Some(make(kind, &name, (parent.as_str(), *mode), wanted)?),
        (Some(_), Some((parent, _))) => {
            log::warn!(
                "Interface {name:?} is there already and is used as it is, not made on {:?} and not taken away",
                parent.as_str()
            );
            None
        }
        _ => None,
    };
    let link = if created.is_some() { lookup(&name)? } else { existing };
    Ok(Found { name, link, created })
}

fn lookup(name: &str) -> Result<Option<Link>, OnCardError> {
    netlink::link_by_name(name).map_err(|cause| OnCardError::Lookup { name: name.to_owned(), cause })
}

fn make(
    kind: OnCardKind,
    name: &str,
    (parent, mode): (&str, OnCardMode),
    wanted: &Wanted,
) -> Result<CreatedLink, OnCardError> {
    let on = lookup(parent)?.ok_or_else(|| OnCardError::NoParent { kind, parent: parent.to_owned() })?;
    if !on.is_ethernet {
        return Err(OnCardError::NoEthernet {
            kind,
            parent: parent.to_owned(),
            parent_kind: on.kind_name().to_owned(),
        });
    }
    let fault = |cause| OnCardError::Make { kind, name: name.to_owned(), parent: parent.to_owned(), cause };
    let created =
        netlink::make_on_card(kind, name, (parent, on.index), mode, wanted.mac.or(wanted.former_mac)).map_err(fault)?;
    if let Some(mtu) = wanted.mtu {
        let (name, parent) = (name.to_owned(), parent.to_owned());
        netlink::set_mtu(created.index(), mtu).map_err(|cause| OnCardError::Mtu { kind, name, mtu, parent, cause })?;
    }
    if kind == OnCardKind::Macvtap {
        // A packet socket asks for that itself.
        netlink::let_groups_in(created.index()).map_err(fault)?;
    }
    netlink::set_up(created.index()).map_err(fault)?;
    if !on.is_up {
        log::warn!("Interface {parent:?} is down, no frames will pass: 'ip link set {parent} up'");
    }
    Ok(created)
}
