//! What lets QEMU talk to the reference back-end: a middleman that holds early enables back.
//!
//! QEMU sends `SET_VRING_ENABLE` before any `SET_FEATURES`, and the reference ends the connection on that. The shim
//! keeps such enables (and acks them), and sends them on once `SET_FEATURES` has passed. All else goes
//! through unchanged, file descriptors included.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::frontend::{Event, RawFrontend, Reply, has_own_reply};
use super::message::{Message, flag, request};
use super::{PATIENCE, wait_readable};

/// How long a front-end may be silent; as long as its test.
const SESSION: Duration = Duration::from_secs(60);

/// Passes one connection on, in a thread that ends with it.
pub struct QemuShim {
    _thread: JoinHandle<()>,
}

impl QemuShim {
    /// Listens on `path` when this returns, and passes what comes on to the back-end at `backend`.
    pub fn start(path: impl AsRef<Path>, backend: impl AsRef<Path>) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let backend = RawFrontend::connect(backend).unwrap();
        let thread = thread::spawn(move || {
            if wait_readable(&listener, PATIENCE) {
                let (stream, _) = listener.accept().unwrap();
                let front = RawFrontend::from_stream(stream);
                // However it ended, dropping both sockets tells both sides.
                let _ = pass_on(&front, &backend);
            }
        });
        Self { _thread: thread }
    }
}

/// Runs until one side goes.
fn pass_on(front: &RawFrontend, backend: &RawFrontend) -> io::Result<()> {
    let mut early = Some(Vec::new());
    while let Event::Reply(message) = front.receive(SESSION) {
        match &mut early {
            Some(held) if message.request == request::SET_VRING_ENABLE => {
                held.push(message.body.clone());
                ack(front, &message)?;
            }
            _ => forward(front, backend, &message)?,
        }
        if message.request == request::SET_FEATURES {
            for body in early.take().unwrap_or_default() {
                backend.send(&Message::new(request::SET_VRING_ENABLE, body))?;
            }
        }
    }
    Ok(())
}

/// Passes a message on, and its answer back.
fn forward(front: &RawFrontend, backend: &RawFrontend, message: &Reply) -> io::Result<()> {
    backend.send(&resend(message))?;
    if !has_own_reply(message.request) && !wants_ack(message) {
        return Ok(());
    }
    match backend.receive(PATIENCE) {
        Event::Reply(reply) => front.send(&resend(&reply)),
        Event::Closed | Event::Timeout => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

fn resend(message: &Reply) -> Message<'_> {
    Message::new(message.request, message.body.clone())
        .with_flags(message.flags)
        .with_fds(message.fds.iter().map(AsFd::as_fd))
}

fn ack(front: &RawFrontend, message: &Reply) -> io::Result<()> {
    if !wants_ack(message) {
        return Ok(());
    }
    let flags = flag::VERSION | flag::REPLY;
    front.send(&Message::u64(message.request, 0).with_flags(flags))
}

fn wants_ack(message: &Reply) -> bool {
    message.flags & flag::NEED_REPLY != 0
}
