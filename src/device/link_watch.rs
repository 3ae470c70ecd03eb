//! Watches an interface through rtnetlink: its carrier, its MTU, its deletion, and its return.
//!
//! The socket belongs to the network namespace in which it was made, wherever the process is later. At the start it
//! asks for the interface's state, which comes as the first event: so no change is missed in between.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::netlink::{self, AboutLink};

/// The state of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Whether frames pass: it is administratively up and has a carrier.
    pub is_up: bool,
    /// Its MTU, if that is known and fits a network card.
    pub mtu: Option<u16>,
}

/// What happened to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// This is its state now, changed or not.
    Is(LinkState),
    /// It was deleted or left this network namespace.
    Gone,
    /// There is a new interface with its name or its parent's.
    Appeared,
}

/// What the host counted at an interface; rx and tx are the host's here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStatistics {
    /// Frames that came in and were dropped: of a MACVTAP's, those that its queues had no room for.
    pub rx_dropped: u64,
    /// Frames that were to go out and were dropped: of a TAP's, those that its queues had no room for.
    pub tx_dropped: u64,
}

/// A subscription to the events of one interface.
#[derive(Debug)]
pub struct LinkWatch {
    socket: Socket,
    /// For synchronous requests, in the same namespace.
    questions: Socket,
    index: u32,
    /// The names to look for, and the indices that the interfaces had.
    names: Vec<(String, u32)>,
}

impl LinkWatch {
    /// Watches the interface with this index, and for new ones with these names.
    pub(super) fn new(index: u32, names: Vec<(String, u32)>) -> io::Result<LinkWatch> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, RTMGRP_LINK))?;
        socket.set_non_blocking(true)?;
        let watch = LinkWatch { socket, questions: netlink::connected_socket()?, index, names };
        watch.ask()?;
        Ok(watch)
    }

    /// Asks for the interface's state; the answer is an event.
    ///
    /// # Errors
    /// What the socket says.
    pub fn ask(&self) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        let bytes = netlink::serialized(AboutLink::Get(message), NLM_F_REQUEST);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).map(drop)
    }

    /// The host's counters of the interface.
    ///
    /// # Errors
    /// What netlink says.
    pub fn statistics(&self) -> io::Result<LinkStatistics> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        let answer = netlink::request_on(&self.questions, AboutLink::Get(message), NLM_F_REQUEST)?;
        let Some(AboutLink::New(link)) = answer else { return Err(io::ErrorKind::NotFound.into()) };
        let told = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => {
                Some(LinkStatistics { rx_dropped: stats.rx_dropped, tx_dropped: stats.tx_dropped })
            }
            _ => None,
        });
        Ok(told.unwrap_or_default())
    }

    /// The next event, if there is one.
    ///
    /// # Errors
    /// What the socket says; events may have been missed.
    pub fn next_event(&self) -> io::Result<Option<LinkEvent>> {
        loop {
            let bytes = match self.socket.recv_from_full() {
                Ok((bytes, _)) => bytes,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            };
            let message = NetlinkMessage::<AboutLink>::deserialize(&bytes).map(|message| message.payload);
            if let Some(event) = message.ok().and_then(|payload| self.event(payload)) {
                return Ok(Some(event));
            }
        }
    }

    fn event(&self, payload: NetlinkPayload<AboutLink>) -> Option<LinkEvent> {
        // A bridge sends the same messages when a port joins or leaves it, in its own address family.
        let is_ours = |link: &LinkMessage| {
            link.header.index == self.index && link.header.interface_family == AddressFamily::Unspec
        };
        match payload {
            NetlinkPayload::InnerMessage(AboutLink::New(link)) if is_ours(&link) => Some(LinkEvent::Is(state(&link))),
            NetlinkPayload::InnerMessage(AboutLink::New(link)) => self.awaits(&link).then_some(LinkEvent::Appeared),
            NetlinkPayload::InnerMessage(AboutLink::Del(link)) => is_ours(&link).then_some(LinkEvent::Gone),
            // The interface that was asked for is gone.
            NetlinkPayload::Error(_) => Some(LinkEvent::Gone),
            _ => None,
        }
    }

    fn awaits(&self, link: &LinkMessage) -> bool {
        link.attributes.iter().any(|attribute| match attribute {
            LinkAttribute::IfName(found) => {
                self.names.iter().any(|(name, index)| name == found && *index != link.header.index)
            }
            _ => false,
        })
    }
}

fn state(link: &LinkMessage) -> LinkState {
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => u16::try_from(*mtu).ok(),
        _ => None,
    });
    LinkState { is_up: link.header.flags.contains(LinkFlags::LowerUp), mtu }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The multicast group for interfaces (linux/rtnetlink.h).
const RTMGRP_LINK: u32 = 1;
