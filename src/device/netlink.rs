//! Looks up network interfaces through rtnetlink, and makes and changes our own.
//!
//! Requests are synchronous, each on a new socket. That is possible only before the sandbox closes; a later request
//! ([`super::link_watch`]) uses a socket from before.

use std::io;

use netlink_packet_core::{
    DecodeError, Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, Nla, Parseable,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoMacVlan, InfoMacVtap, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::on_card::{OnCardKind, OnCardMode};
use crate::mac::Mac;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) is_up: bool,
    pub(crate) mtu: Option<u16>,
    /// `tun`, `veth`, `bridge` …; nothing for a physical card and the loopback interface.
    pub(crate) kind: Option<String>,
    pub(crate) is_loopback: bool,
    /// The index of the bridge that it is a port of, or of another master.
    pub(crate) master: Option<u32>,
    /// Its hardware address.
    pub(crate) mac: Option<Mac>,
    /// Whether it is a MACVTAP or MACVLAN that takes frames to any address (mode passthru).
    pub(crate) takes_all: bool,
    /// Whether it carries Ethernet frames.
    pub(crate) is_ethernet: bool,
    pub(crate) tun: TunInfo,
}

impl Link {
    /// What it is, for messages.
    pub(crate) fn kind_name(&self) -> &str {
        self.kind.as_deref().unwrap_or(if self.is_loopback { "loopback" } else { "physical" })
    }
}

/// The attributes of a TUN or TAP interface (`IFLA_TUN_*`).
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

/// A request or message about an interface. The library's own type also has routes, rules and filters, whose parsers
/// would be a tenth of this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AboutLink {
    /// RTM_NEWLINK: it exists, or is to be made.
    New(LinkMessage),
    /// RTM_DELLINK: it was deleted, or is to be.
    Del(LinkMessage),
    /// RTM_GETLINK: it is asked for.
    Get(LinkMessage),
    /// RTM_SETLINK: it is to be changed.
    Set(LinkMessage),
}

impl AboutLink {
    fn message(&self) -> &LinkMessage {
        let (AboutLink::New(message) | AboutLink::Del(message) | AboutLink::Get(message) | AboutLink::Set(message)) =
            self;
        message
    }
}

impl NetlinkSerializable for AboutLink {
    fn message_type(&self) -> u16 {
        match self {
            AboutLink::New(_) => libc::RTM_NEWLINK,
            AboutLink::Del(_) => libc::RTM_DELLINK,
            AboutLink::Get(_) => libc::RTM_GETLINK,
            AboutLink::Set(_) => libc::RTM_SETLINK,
        }
    }

    fn buffer_len(&self) -> usize {
        self.message().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.message().emit(buffer);
    }
}

impl NetlinkDeserializable for AboutLink {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<AboutLink, DecodeError> {
        match header.message_type {
            libc::RTM_NEWLINK => LinkMessage::parse(payload).map(AboutLink::New),
            libc::RTM_DELLINK => LinkMessage::parse(payload).map(AboutLink::Del),
            other => Err(format!("message of type {other}, which is not about a link").into()),
        }
    }
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
    match request(AboutLink::Get(message), NLM_F_REQUEST) {
        Ok(Some(AboutLink::New(link))) => Ok(Some(read_link(&link))),
        Ok(_) => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

/// An interface that we made; it is deleted when this is dropped.
#[derive(Debug)]
pub(crate) struct CreatedLink {
    /// In the network namespace that it was made in.
    socket: Socket,
    index: u32,
    name: String,
    mac: Option<Mac>,
    parent: (String, u32),
}

impl CreatedLink {
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// The address that it was made with.
    pub(crate) fn mac(&self) -> Option<Mac> {
        self.mac
    }

    /// The name and index of the interface that it was made on.
    pub(crate) fn parent(&self) -> &(String, u32) {
        &self.parent
    }
}

impl Drop for CreatedLink {
    fn drop(&mut self) {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        match request_on(&self.socket, AboutLink::Del(message), NLM_F_REQUEST | NLM_F_ACK) {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                log::warn!("Cannot take {:?} away again: {error}", self.name);
            }
            _ => {}
        }
    }
}

/// Makes a MACVTAP or MACVLAN on an interface, of which `parent` is name and index.
pub(super) fn make_on_card(
    kind: OnCardKind,
    name: &str,
    parent: (&str, u32),
    mode: OnCardMode,
    mac: Option<Mac>,
) -> io::Result<CreatedLink> {
    let mode = kernel_mode(mode);
    let (kind, data) = match kind {
        OnCardKind::Macvtap => (InfoKind::MacVtap, InfoData::MacVtap(vec![InfoMacVtap::Mode(mode)])),
        OnCardKind::Macvlan => (InfoKind::MacVlan, InfoData::MacVlan(vec![InfoMacVlan::Mode(mode)])),
    };
    let mut message = LinkMessage::default();
    message.attributes.extend([
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Link(parent.1),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]),
    ]);
    message.attributes.extend(mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let socket = connected_socket()?;
    request_on(&socket, AboutLink::New(message), flags)?;
    let link = link_by_name(name)?.ok_or(io::ErrorKind::NotFound)?;
    let parent = (parent.0.to_owned(), parent.1);
    Ok(CreatedLink { socket, index: link.index, name: name.to_owned(), mac: link.mac, parent })
}

fn kernel_mode(mode: OnCardMode) -> netlink_packet_route::link::MacVtapMode {
    use netlink_packet_route::link::MacVtapMode as Kernel;
    match mode {
        OnCardMode::Bridge => Kernel::Bridge,
        OnCardMode::Vepa => Kernel::Vepa,
        OnCardMode::Private => Kernel::Private,
        OnCardMode::Passthru => Kernel::Passthrough,
    }
}

/// Sets the interface administratively up.
pub(crate) fn set_up(index: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    request(AboutLink::Set(message), NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// Has the interface accept frames to all groups, not only to those that somebody on the host joined.
pub(crate) fn let_groups_in(index: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Allmulti;
    message.header.change_mask = LinkFlags::Allmulti;
    request(AboutLink::Set(message), NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// Makes the interface a port of the bridge with index `bridge`.
pub(crate) fn set_master(index: u32, bridge: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Controller(bridge));
    request(AboutLink::Set(message), NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// Sets the interface's MTU.
pub(crate) fn set_mtu(index: u32, mtu: u16) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Mtu(u32::from(mtu)));
    request(AboutLink::Set(message), NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// Sends a request to the kernel and returns its answer; an acknowledgement is `None`.
fn request(payload: AboutLink, flags: u16) -> io::Result<Option<AboutLink>> {
    request_on(&connected_socket()?, payload, flags)
}

pub(super) fn connected_socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

pub(super) fn request_on(socket: &Socket, payload: AboutLink, flags: u16) -> io::Result<Option<AboutLink>> {
    socket.send(&serialized(payload, flags), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<AboutLink>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(inner) => Ok(Some(inner)),
        NetlinkPayload::Error(e) if e.code.is_some() => Err(e.to_io()),
        _ => Ok(None),
    }
}

pub(super) fn serialized(payload: AboutLink, flags: u16) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(payload));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn read_link(message: &LinkMessage) -> Link {
    let is = |flag| message.header.flags.contains(flag);
    let mut link = Link { index: message.header.index, is_up: is(LinkFlags::Up), ..Link::default() };
    link.is_loopback = is(LinkFlags::Loopback);
    link.is_ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = u16::try_from(*mtu).ok(),
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::Address(address) => link.mac = address.as_slice().try_into().ok(),
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
        LinkInfo::Data(InfoData::MacVtap(attributes)) => {
            link.takes_all = attributes.contains(&InfoMacVtap::Mode(kernel_mode(OnCardMode::Passthru)));
        }
        LinkInfo::Data(InfoData::MacVlan(attributes)) => {
            link.takes_all = attributes.contains(&InfoMacVlan::Mode(kernel_mode(OnCardMode::Passthru)));
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
