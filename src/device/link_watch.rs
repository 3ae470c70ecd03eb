//! Hearing what happens to an interface, through rtnetlink: its carrier, its MTU, its end, and its coming back.
//!
//! The socket belongs to the network namespace that it was made in, wherever the process is. It is asked once, at the
//! start, what the interface is like; the answer comes as the first event. So nothing is missed between.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::netlink::{self, AboutLink};

/// What an interface is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Whether frames pass: it is administratively up and has a carrier.
    pub is_up: bool,
    /// Its MTU, if it told one that fits a network card.
    pub mtu: Option<u16>,
}

/// What happened to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// It is so from now on, or still.
    Is(LinkState),
    /// It is not in this network namespace any more.
    Gone,
    /// An interface of its name, or of its parent's, is there that was not there when it was opened.
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

/// See the file's head.
#[derive(Debug)]
pub struct LinkWatch {
    socket: Socket,
    /// For questions that wait for their answer, in the same namespace.
    questions: Socket,
    index: u32,
    /// Names that may come back, and the indices that they had.
    names: Vec<(String, u32)>,
}

impl LinkWatch {
    /// Hears of the interface with this index, and of new ones with these names.
    pub(super) fn new(index: u32, names: Vec<(String, u32)>) -> io::Result<LinkWatch> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, RTMGRP_LINK))?;
        socket.set_non_blocking(true)?;
        let watch = LinkWatch { socket, questions: netlink::connected_socket()?, index, names };
        watch.ask()?;
        Ok(watch)
    }

    /// Asks what the interface is like; the answer is an event.
    ///
    /// # Errors
    /// What the socket says.
    pub fn ask(&self) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        let bytes = netlink::serialized(AboutLink::Get(message), NLM_F_REQUEST);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).map(drop)
    }

    /// What the host counted.
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

    /// What happened next, if something did.
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
        // A bridge says of a port that joins or leaves it the same, in a family of its own.
        let is_ours = |link: &LinkMessage| {
            link.header.index == self.index && link.header.interface_family == AddressFamily::Unspec
        };
        match payload {
            NetlinkPayload::InnerMessage(AboutLink::New(link)) if is_ours(&link) => Some(LinkEvent::Is(state(&link))),
            NetlinkPayload::InnerMessage(AboutLink::New(link)) => self.awaits(&link).then_some(LinkEvent::Appeared),
            NetlinkPayload::InnerMessage(AboutLink::Del(link)) => is_ours(&link).then_some(LinkEvent::Gone),
            // It was asked for, and is gone.
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

/// The group that hears of interfaces (linux/rtnetlink.h).
const RTMGRP_LINK: u32 = 1;
