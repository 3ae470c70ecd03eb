//! Bytes and file descriptors on the socket, to messages and back (vhost-user, "Message Specification").
//!
//! Nothing here waits: a message that came in part is kept until the rest comes, a reply that the peer does not read is
//! kept until it does, and [`Codec::deadline`] limits both. An error of the stream itself ends the connection
//! ([`StreamError`]); `session` decides what a message means.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

/// Bytes of a message's header: request, flags, size of the payload.
const HEADER_LEN: usize = 12;
/// The largest payload taken: far more than any message of a network device has.
const PAYLOAD_MAX: usize = 4096;
/// The most descriptors with one message (`VHOST_MEMORY_BASELINE_NREGIONS` is 8, front-ends use up to 32).
const FDS_MAX: usize = 32;
/// How long a peer may take for the rest of a message, or to read a reply.
const PATIENCE: Duration = Duration::from_secs(5);

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;

/// One message from the front-end.
#[derive(Debug)]
pub struct Message {
    /// The request's number.
    pub request: u32,
    /// Whether an acknowledgement is asked for.
    pub need_reply: bool,
    /// Its payload.
    pub payload: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Why a connection cannot go on.
#[derive(Debug, Error)]
pub enum StreamError {
    /// No front-end sends such flags.
    #[error("Message {request} has flags {flags:#x}: not version 1, or not a request")]
    Flags {
        /// The message's number.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// The announced payload is larger than any message has.
    #[error("Message {request} announces a payload of {size} bytes, more than {PAYLOAD_MAX}")]
    Size {
        /// The message's number.
        request: u32,
        /// The announced size.
        size: u32,
    },
    /// Descriptors were lost on the way.
    #[error("A message came with more than {FDS_MAX} descriptors, or with more than this process may have")]
    TooManyFds,
    /// The connection was closed within a message.
    #[error("The front-end closed the connection within a message")]
    CutOff,
    /// A message, or the reading of a reply, took too long.
    #[error("The front-end left a message unfinished, or a reply unread, for {PATIENCE:?}")]
    TooSlow,
    /// The socket failed.
    #[error("The socket failed")]
    Socket(#[source] io::Error),
}

/// What was read from the connection.
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(Message),
    /// Nothing, or only a part of a message so far.
    Nothing,
    /// The front-end has closed the connection.
    Closed,
}

/// A connection as a stream of messages.
#[derive(Debug)]
pub struct Codec {
    stream: UnixStream,
    input: Vec<u8>,
    fds: Vec<OwnedFd>,
    output: Vec<u8>,
    waiting_since: Option<Instant>,
}

impl Codec {
    /// A codec on a connected socket.
    ///
    /// # Errors
    /// What `fcntl(2)` says where it cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Codec> {
        stream.set_nonblocking(true)?;
        Ok(Codec { stream, input: Vec::new(), fds: Vec::new(), output: Vec::new(), waiting_since: None })
    }

    /// When the peer must have finished what it began.
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting_since.map(|since| since + PATIENCE)
    }

    /// Whether a reply waits for the peer to read it; until then nothing more is received.
    pub fn is_blocked(&self) -> bool {
        !self.output.is_empty()
    }

    /// Takes the next message, if all of it has come.
    ///
    /// # Errors
    /// [`StreamError`]; the connection must be closed then.
    pub fn receive(&mut self) -> Result<Received, StreamError> {
        loop {
            let missing = self.missing()?;
            if missing == 0 {
                self.waiting_since = None;
                return Ok(Received::Message(self.take_message()));
            }
            match self.read_some(missing)? {
                Some(0) if self.input.is_empty() => return Ok(Received::Closed),
                Some(0) => return Err(StreamError::CutOff),
                // This is progress: a slow peer is not a silent one.
                Some(_) => self.waiting_since = None,
                None => {
                    self.note_wait(!self.input.is_empty());
                    return Ok(Received::Nothing);
                }
            }
        }
    }

    /// How many bytes of the current message have not come yet.
    fn missing(&self) -> Result<usize, StreamError> {
        let Some(header) = self.input.first_chunk::<HEADER_LEN>() else { return Ok(HEADER_LEN - self.input.len()) };
        let [request, flags, size] = words(header);
        if flags & VERSION_MASK != VERSION || flags & !(VERSION_MASK | FLAG_NEED_REPLY) != 0 {
            return Err(StreamError::Flags { request, flags });
        }
        let payload = usize::try_from(size).ok().filter(|size| *size <= PAYLOAD_MAX);
        let payload = payload.ok_or(StreamError::Size { request, size })?;
        Ok(HEADER_LEN + payload - self.input.len())
    }

    /// Reads up to `len` bytes and the descriptors that come with them; `None` if there is nothing yet.
    fn read_some(&mut self, len: usize) -> Result<Option<usize>, StreamError> {
        let mut bytes = vec![0; len];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            // The peer died with our reply unread.
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(errno) => return Err(StreamError::Socket(errno.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > FDS_MAX {
            return Err(StreamError::TooManyFds);
        }
        self.input.extend(bytes.iter().take(got.bytes));
        Ok(Some(got.bytes))
    }

    fn take_message(&mut self) -> Message {
        let input = std::mem::take(&mut self.input);
        let fds = std::mem::take(&mut self.fds);
        let (header, payload) = input.split_first_chunk::<HEADER_LEN>().unwrap_or((&[0; HEADER_LEN], &[]));
        let [request, flags, _] = words(header);
        Message { request, need_reply: flags & FLAG_NEED_REPLY != 0, payload: payload.to_vec(), fds }
    }

    /// Sends a reply to message `request`, or as much of it as the peer takes now.
    ///
    /// # Errors
    /// [`StreamError::Socket`].
    pub fn reply(&mut self, request: u32, payload: &[u8]) -> Result<(), StreamError> {
        // At most PAYLOAD_MAX: the length of a reply is fixed, or at most what was asked for.
        let header = [request, VERSION | FLAG_REPLY, payload.len() as u32].map(u32::to_ne_bytes);
        self.output.extend(header.as_flattened());
        self.output.extend(payload);
        self.flush()
    }

    /// Sends the replies that wait.
    ///
    /// # Errors
    /// [`StreamError::Socket`].
    pub fn flush(&mut self) -> Result<(), StreamError> {
        if self.output.is_empty() {
            return Ok(());
        }
        while !self.output.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let parts = [IoSlice::new(&self.output)];
            match sendmsg(&self.stream, &parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) => drop(self.output.drain(..sent.min(self.output.len()))),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(StreamError::Socket(errno.into())),
            }
        }
        self.note_wait(!self.output.is_empty());
        Ok(())
    }

    fn note_wait(&mut self, waits: bool) {
        self.waiting_since = if waits { self.waiting_since.or_else(|| Some(Instant::now())) } else { None };
    }
}

impl AsFd for Codec {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The bytes of a request of ours on the back-end's channel, without a payload and without asking for a reply.
pub(super) fn request_of_ours(request: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    let header = [request, VERSION, 0].map(u32::to_ne_bytes);
    bytes.iter_mut().zip(header.as_flattened()).for_each(|(to, from)| *to = *from);
    bytes
}

fn words(header: &[u8; HEADER_LEN]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *header;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::io::Write;

    use super::*;

    fn pair() -> (UnixStream, Codec) {
        let (peer, stream) = UnixStream::pair().unwrap();
        (peer, Codec::new(stream).unwrap())
    }

    /// A message without payload.
    const MESSAGE: [u8; HEADER_LEN] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn peer_that_closes_between_two_messages_has_closed() {
        let (mut peer, mut codec) = pair();
        peer.write_all(&MESSAGE).unwrap();
        drop(peer);
        assert!(matches!(codec.receive(), Ok(Received::Message(_))));
        assert!(matches!(codec.receive(), Ok(Received::Closed)));
    }

    #[test]
    fn peer_that_closes_in_the_middle_of_a_message_has_cut_it_off() {
        let (mut peer, mut codec) = pair();
        peer.write_all(&MESSAGE[..5]).unwrap();
        assert!(matches!(codec.receive(), Ok(Received::Nothing)));
        drop(peer);
        assert!(matches!(codec.receive(), Err(StreamError::CutOff)));
    }

    #[test]
    fn peer_is_waited_for_in_the_middle_of_a_message_only() {
        let (mut peer, mut codec) = pair();
        assert!(matches!(codec.receive(), Ok(Received::Nothing)));
        assert_eq!(codec.deadline(), None);
        peer.write_all(&MESSAGE[..5]).unwrap();
        assert!(matches!(codec.receive(), Ok(Received::Nothing)));
        assert!(codec.deadline().is_some());
        peer.write_all(&MESSAGE[5..]).unwrap();
        assert!(matches!(codec.receive(), Ok(Received::Message(_))));
        assert_eq!(codec.deadline(), None);
    }

    /// Whoever has the other end of a passed socket may have made it blocking.
    #[test]
    fn stream_that_would_wait_is_not_waited_for() {
        let (_peer, mut codec) = pair();
        codec.stream.set_nonblocking(false).unwrap();
        assert!(matches!(codec.receive(), Ok(Received::Nothing)));
        while !codec.is_blocked() {
            codec.reply(1, &[0; PAYLOAD_MAX]).unwrap();
        }
        assert!(codec.deadline().is_some());
    }

    #[test]
    fn descriptors_are_not_handed_on_to_other_programs() {
        let (peer, mut codec) = pair();
        let fds = [peer.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&peer, &[IoSlice::new(&MESSAGE)], &mut control, SendFlags::empty()).unwrap();
        let Ok(Received::Message(message)) = codec.receive() else { panic!("a message") };
        assert!(rustix::io::fcntl_getfd(&message.fds[0]).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }

    /// vhost-user, "Header": request, flags (version 1, no reply wanted), size of the payload.
    #[test]
    fn request_of_ours_is_a_header() {
        let words = [7_u32, 1, 0].map(u32::to_ne_bytes);
        assert_eq!(request_of_ours(7), words.as_flattened());
    }
}
