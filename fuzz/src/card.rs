//! A network card of this process that outlives inputs, for sessions: its front-end and its control thread are the target.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vhost_user_net::device::{Device, Layer};
use vhost_user_net::nic::{Nic, NicSetup};
use vhost_user_net::vhost_user::session::{Session, SessionOptions, SessionState};
use vhost_user_net::virtqueue::QueueSize;

use crate::kit::frontend::{Event, RawFrontend, Reply};
use crate::kit::message::Message;
use crate::kit::tap_double::TapDouble;

/// The largest queue that it takes.
pub const QUEUE_SIZE_MAX: u16 = 1024;

pub struct Card {
    pub nic: Arc<Nic>,
    pub tap: TapDouble,
}

impl Card {
    /// A card with one queue pair.
    pub fn new(has_control_queue: bool) -> Self {
        crate::ignore_broken_pipes();
        let (tap, fd) = TapDouble::new();
        let (device, queues) = Device::from_sockets(vec![fd], Layer::Ethernet).unwrap();
        let nic = Nic::new(device, queues, NicSetup { has_control_queue, ..NicSetup::default() }).unwrap();
        Self { nic: Arc::new(nic), tap }
    }

    /// A new session, and its front-end.
    pub fn connect(&self) -> (RawFrontend, Session) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let queue_size_max = QueueSize::try_from(u32::from(QUEUE_SIZE_MAX)).unwrap();
        let options = SessionOptions { offers_config: true, queue_size_max };
        (RawFrontend::from_stream(ours), Session::new(theirs, Arc::clone(&self.nic), options).unwrap())
    }
}

/// Sends a message and has it handled; what was replied at once.
pub fn ask(front_end: &RawFrontend, session: &mut Session, message: &Message<'_>) -> Option<Reply> {
    front_end.send(message).unwrap();
    assert_eq!(session.process(), SessionState::Open, "{message:?}");
    match front_end.receive(Duration::ZERO) {
        Event::Reply(reply) => Some(reply),
        Event::Timeout => None,
        Event::Closed => panic!("{message:?} closed the connection"),
    }
}
