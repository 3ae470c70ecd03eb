//! A back-end of no substance that says yes to everything and writes down what a front-end sends.
//!
//! It shows the message order of a real front-end, to which the kit's imitations are compared. It maps no memory and
//! starts no ring.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::frontend::{Event, RawFrontend, Reply, has_own_reply};
use super::message::{Message, flag, request};
use super::virtio::{feature, protocol};
use super::{PATIENCE, wait_readable};

/// What the recorder offers: enough for several queue pairs and single regions.
const FEATURES: u64 = feature::VERSION_1
    | feature::MRG_RXBUF
    | feature::EVENT_IDX
    | feature::INDIRECT_DESC
    | feature::CTRL_VQ
    | feature::MQ
    | feature::GUEST_ANNOUNCE
    | feature::PROTOCOL_FEATURES;
const PROTOCOL: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::RARP
    | protocol::STATUS
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

/// A message as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    pub request: u32,
    pub need_reply: bool,
    pub fds: usize,
    pub body: Vec<u8>,
}

impl Recorded {
    /// The ring's index, in requests that have one.
    pub fn index(&self) -> Option<u32> {
        let has_index = matches!(
            self.request,
            request::SET_VRING_NUM
                | request::SET_VRING_ADDR
                | request::SET_VRING_BASE
                | request::GET_VRING_BASE
                | request::SET_VRING_KICK
                | request::SET_VRING_CALL
                | request::SET_VRING_ERR
                | request::SET_VRING_ENABLE
        );
        has_index.then(|| self.body[0].into())
    }
}

/// Serves one connection in a thread.
pub struct Recorder {
    messages: Arc<Mutex<Vec<Recorded>>>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Listens on `path` when this returns.
    pub fn start(path: impl AsRef<Path>) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let messages = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&messages);
        let thread = thread::spawn(move || {
            // Without a front-end the thread ends by itself, after a bounded wait.
            if wait_readable(&listener, PATIENCE) {
                let (stream, _) = listener.accept().unwrap();
                serve(&RawFrontend::from_stream(stream), &record);
            }
        });
        Self { messages, thread: Some(thread) }
    }

    /// Waits for the front-end to end the connection; returns all that it sent.
    pub fn finish(mut self) -> Vec<Recorded> {
        self.thread.take().unwrap().join().unwrap();
        self.messages.lock().unwrap().clone()
    }
}

fn serve(peer: &RawFrontend, record: &Mutex<Vec<Recorded>>) {
    // A front-end may be silent for as long as its test runs.
    while let Event::Reply(message) = peer.receive(Duration::from_secs(60)) {
        let recorded = Recorded {
            request: message.request,
            need_reply: message.flags & flag::NEED_REPLY != 0,
            fds: message.fds.len(),
            body: message.body.clone(),
        };
        if let Some(body) = answer(&message) {
            let reply = Message::new(message.request, body).with_flags(flag::VERSION | flag::REPLY);
            // A front-end that has gone shows at the next receive.
            let _ = peer.send(&reply);
        }
        record.lock().unwrap().push(recorded);
    }
}

fn answer(message: &Reply) -> Option<Vec<u8>> {
    let word = |value: u64| Some(value.to_ne_bytes().to_vec());
    match message.request {
        request::GET_FEATURES => word(FEATURES),
        request::GET_PROTOCOL_FEATURES => word(PROTOCOL),
        request::GET_QUEUE_NUM => word(5),
        request::GET_MAX_MEM_SLOTS => word(509),
        request::GET_STATUS => word(0),
        request::GET_VRING_BASE => Some(message.body.clone()),
        request if has_own_reply(request) => panic!("No reply for request {request}"),
        _ if message.flags & flag::NEED_REPLY != 0 => word(0),
        _ => None,
    }
}
