//! What rtnetlink says of a network interface, and the two things that we change on one that we made.
//!
//! Synchronous, one socket for one question; used at start-up only.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) is_up: bool,
    pub(crate) mtu: Option<u16>,
    /// `tun`, `veth`, `bridge` …; nothing for a physical card.
    pub(crate) kind: Option<String>,
    pub(crate) tun: TunInfo,
}

/// What a TUN or TAP interface says of itself (`IFLA_TUN_*`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TunInfo {
    /// `IFF_TUN` (1) or `IFF_TAP` (2).
    pub(crate) mode: u8,
    /// Whether four bytes of packet information stand before each frame (made without `IFF_NO_PI`).
    pub(crate) packet_information: bool,
    pub(crate) multi_queue: bool,
    pub(crate) has_owner: bool,
    /// Queues that somebody has open, attached and detached ones.
    pub(crate) open_queues: u32,
}

// Numbers of `enum` in linux/if_link.h, "tun attributes".
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_GROUP: u16 = 2;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_PI: u16 = 4;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;

/// Looks an interface up by name; `None` where there is none.
pub(crate) fn link_by_name(name: &str) -> io::Result<Option<Link>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match request(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST) {
        Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(Some(read_link(&link))),
        Ok(_) => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets the interface administratively up.
pub(crate) fn set_up(index: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    request(RouteNetlinkMessage::SetLink(message), NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// Sets the interface's MTU.
pub(crate) fn set_mtu(index: u32, mtu: u16) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Mtu(u32::from(mtu)));
    request(RouteNetlinkMessage::SetLink(message), NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// Sends one request to the kernel and takes its one answer; an acknowledgement is `None`.
fn request(payload: RouteNetlinkMessage, flags: u16) -> io::Result<Option<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(payload));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(inner) => Ok(Some(inner)),
        NetlinkPayload::Error(e) if e.code.is_some() => Err(e.to_io()),
        _ => Ok(None),
    }
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link =
        Link { index: message.header.index, is_up: message.header.flags.contains(LinkFlags::Up), ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = u16::try_from(*mtu).ok(),
            LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| read_info(info, &mut link)),
            _ => {}
        }
    }
    link
}

fn read_info(info: &LinkInfo, link: &mut Link) {
    match info {
        LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
        LinkInfo::Data(InfoData::Tun(attributes)) => {
            attributes.iter().for_each(|attribute| read_tun(attribute, &mut link.tun));
        }
        _ => {}
    }
}

fn read_tun(attribute: &InfoTun, tun: &mut TunInfo) {
    let mut value = [0; 4];
    let Some(bytes) = value.get_mut(..attribute.value_len()) else { return };
    attribute.emit_value(bytes);
    match attribute.kind() {
        IFLA_TUN_OWNER | IFLA_TUN_GROUP => tun.has_owner = true,
        IFLA_TUN_TYPE => tun.mode = value[0],
        IFLA_TUN_PI => tun.packet_information = value[0] != 0,
        IFLA_TUN_MULTI_QUEUE => tun.multi_queue = value[0] != 0,
        IFLA_TUN_NUM_QUEUES | IFLA_TUN_NUM_DISABLED_QUEUES => tun.open_queues += u32::from_ne_bytes(value),
        _ => {}
    }
}
