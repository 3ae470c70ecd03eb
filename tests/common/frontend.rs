//! A front-end on a Unix socket: sends any [`Message`], right or wrong, and reads what comes back.
//!
//! [`RawFrontend::negotiate_like_qemu`] and [`RawFrontend::negotiate_like_cloud_hypervisor`] start a session in
//! the order in which those two send. Both orders are known from recordings and from their source; where a test
//! needs another order, it sends the messages itself.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::GuestMemory;
use super::message::{HEADER_LEN, Message, flag, request};
use super::split_ring::SplitRing;
use super::virtio::{feature, protocol, status};
use super::{PATIENCE, fd_of, wait_readable};

/// The most file descriptors that the kernel lets through with one message (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// What a back-end did with a request that asked for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Ack,
    Nack(u64),
    Closed,
    Timeout,
}

/// A message from the back-end.
#[derive(Debug)]
pub struct Reply {
    pub request: u32,
    pub flags: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The body as one 64-bit word; panics if it is another size.
    pub fn u64(&self) -> u64 {
        u64::from_ne_bytes(self.body[..].try_into().expect("a body of 8 bytes"))
    }

    /// The body as a ring's index and a number.
    pub fn vring_state(&self) -> (u32, u32) {
        assert_eq!(self.body.len(), 8, "A body of 8 bytes");
        let word = |at: usize| u32::from_ne_bytes(self.body[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }
}

/// What was read from the socket.
#[derive(Debug)]
pub enum Event {
    Reply(Reply),
    Closed,
    Timeout,
}

/// A step of a negotiation that the back-end did not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub request: u32,
    pub answer: Answer,
}

/// What a front-end brings to a session.
pub struct SessionSpec<'a> {
    pub mem: &'a GuestMemory,
    /// All rings, by index.
    pub rings: Vec<&'a SplitRing>,
    /// Features that VMM and guest want; what the back-end does not offer is left out.
    pub features: u64,
    /// Protocol features that the VMM knows.
    pub protocol: u64,
}

impl<'a> SessionSpec<'a> {
    /// The protocol features that QEMU's net front-end knows.
    pub const QEMU_PROTOCOL: u64 = protocol::MQ
        | protocol::LOG_SHMFD
        | protocol::RARP
        | protocol::REPLY_ACK
        | protocol::MTU
        | protocol::BACKEND_REQ
        | protocol::CROSS_ENDIAN
        | protocol::BACKEND_SEND_FD
        | protocol::HOST_NOTIFIER
        | protocol::RESET_DEVICE
        | protocol::CONFIGURE_MEM_SLOTS
        | protocol::STATUS;

    /// The protocol features that cloud-hypervisor's net front-end knows.
    pub const CLOUD_HYPERVISOR_PROTOCOL: u64 = protocol::MQ
        | protocol::LOG_SHMFD
        | protocol::REPLY_ACK
        | protocol::CONFIG
        | protocol::INFLIGHT_SHMFD
        | protocol::CONFIGURE_MEM_SLOTS
        | protocol::DEVICE_STATE;

    pub fn new(mem: &'a GuestMemory, rings: Vec<&'a SplitRing>, features: u64) -> Self {
        Self { mem, rings, features: features | feature::PROTOCOL_FEATURES | feature::VERSION_1, protocol: u64::MAX }
    }
}

/// What came out of a negotiation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    pub offered: u64,
    pub features: u64,
    pub protocol_offered: u64,
    pub protocol: u64,
    pub queue_num: Option<u64>,
    pub mem_slots: Option<u64>,
}

impl Negotiated {
    fn has_protocol(&self, bit: u64) -> bool {
        self.protocol & bit != 0
    }
}

/// In what the versions of QEMU differ.
struct QemuWays {
    /// Does `SET_VRING_ENABLE` ask for an answer?
    enable_acks: bool,
    /// Are the regions sent for each queue pair anew?
    memory_for_each_pair: bool,
}

const QEMU_7: QemuWays = QemuWays { enable_acks: false, memory_for_each_pair: true };

const QEMU_10: QemuWays = QemuWays { enable_acks: true, memory_for_each_pair: false };

pub struct RawFrontend {
    stream: UnixStream,
}

impl RawFrontend {
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self::from_stream(UnixStream::connect(path)?))
    }

    /// Waits for a back-end that connects by itself.
    pub fn accept(listener: &UnixListener) -> Self {
        assert!(wait_readable(listener, PATIENCE), "No back-end connects");
        Self::from_stream(listener.accept().unwrap().0)
    }

    pub fn from_stream(stream: UnixStream) -> Self {
        Self { stream }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    // Any message.

    /// Sends bytes with file descriptors attached to the first of them.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut done = self.send_some(bytes, fds)?;
        while done < bytes.len() {
            done += self.send_some(&bytes[done..], &[])?;
        }
        Ok(())
    }

    fn send_some(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(fds));
            assert!(fits, "{} file descriptors are more than can be sent", fds.len());
        }
        let iov = [IoSlice::new(bytes)];
        Ok(sendmsg(&self.stream, &iov, &mut control, SendFlags::NOSIGNAL)?)
    }

    /// Sends a message as it is.
    pub fn send(&self, message: &Message<'_>) -> io::Result<()> {
        self.send_bytes(&message.to_bytes(), &message.fds)
    }

    /// Reads the next message from the back-end.
    pub fn receive(&self, timeout: Duration) -> Event {
        let deadline = Instant::now() + timeout;
        let mut fds = Vec::new();
        let header = match self.read_exactly(HEADER_LEN, deadline, &mut fds) {
            Ok(header) => header,
            Err(event) => return event,
        };
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        match self.read_exactly(word(8) as usize, deadline, &mut fds) {
            Ok(body) => Event::Reply(Reply { request: word(0), flags: word(4), body, fds }),
            Err(event) => event,
        }
    }

    fn read_exactly(&self, len: usize, deadline: Instant, fds: &mut Vec<OwnedFd>) -> Result<Vec<u8>, Event> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let left = deadline.saturating_duration_since(Instant::now());
            if !wait_readable(&self.stream, left) {
                return Err(Event::Timeout);
            }
            match self.receive_some(&mut bytes[done..], fds) {
                Ok(0) | Err(_) => return Err(Event::Closed),
                Ok(step) => done += step,
            }
        }
        Ok(bytes)
    }

    fn receive_some(&self, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(bytes)];
        let received = recvmsg(&self.stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        Ok(received.bytes)
    }

    // Requests.

    /// Sends a message with need_reply and reads the answer.
    pub fn ask(&self, message: Message<'_>) -> Answer {
        let request = message.request;
        if self.send(&message.with_need_reply()).is_err() {
            return Answer::Closed;
        }
        match self.receive(PATIENCE) {
            Event::Reply(reply) => answer_of(request, &reply),
            Event::Closed => Answer::Closed,
            Event::Timeout => Answer::Timeout,
        }
    }

    /// Sends a message that nothing answers. True unless the connection is gone.
    pub fn tell(&self, message: &Message<'_>) -> bool {
        self.send(message).is_ok()
    }

    /// Sends a request that has a reply of its own, and reads that.
    pub fn get(&self, message: &Message<'_>) -> Result<Reply, Answer> {
        if self.send(message).is_err() {
            return Err(Answer::Closed);
        }
        match self.receive(PATIENCE) {
            Event::Reply(reply) => {
                assert_is_reply(message.request, &reply);
                Ok(reply)
            }
            Event::Closed => Err(Answer::Closed),
            Event::Timeout => Err(Answer::Timeout),
        }
    }

    /// Like [`RawFrontend::get`], for a reply of one 64-bit word.
    pub fn get_u64(&self, message: &Message<'_>) -> Result<u64, Answer> {
        Ok(self.get(message)?.u64())
    }

    /// Stops a ring and returns its base.
    pub fn get_vring_base(&self, index: u32) -> Result<u32, Answer> {
        let (_, base) = self.get(&Message::get_vring_base(index))?.vring_state();
        Ok(base)
    }

    /// The bytes of the configuration space; none if the back-end refuses them (by a reply without bytes).
    pub fn get_config(&self, offset: u32, size: u32) -> Result<Vec<u8>, Answer> {
        let reply = self.get(&Message::get_config(offset, size))?;
        Ok(reply.body.get(12..).unwrap_or_default().to_vec())
    }

    /// Is the connection of use? Asks for the features.
    pub fn is_alive(&self) -> bool {
        self.get_u64(&Message::get_features()).is_ok()
    }

    /// Waits until the back-end has closed the connection; false when `timeout` passed, panics on a message.
    pub fn wait_closed(&self, timeout: Duration) -> bool {
        match self.receive(timeout) {
            Event::Closed => true,
            Event::Timeout => false,
            Event::Reply(reply) => panic!("{reply:?} came instead of the end"),
        }
    }

    /// Ends the connection: at once, which dropping it does not where another thread is starting a process, that has all
    /// descriptors for a moment.
    pub fn disconnect(self) {
        // The peer may have gone first.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    // Whole sessions.

    /// Starts a session as QEMU 10's net front-end does: enables before `SET_FEATURES`, regions one by one,
    /// `BASE` before `ADDR`, `KICK` before `CALL`.
    pub fn negotiate_like_qemu(&self, spec: &SessionSpec<'_>) -> Result<Negotiated, Refusal> {
        self.negotiate_like_some_qemu(spec, &QEMU_10)
    }

    /// Starts a session as QEMU 7.2's net front-end does: it asks for no answer to its enables, and gives the memory
    /// for each queue pair anew, without taking the old away.
    pub fn negotiate_like_qemu_7(&self, spec: &SessionSpec<'_>) -> Result<Negotiated, Refusal> {
        self.negotiate_like_some_qemu(spec, &QEMU_7)
    }

    fn negotiate_like_some_qemu(&self, spec: &SessionSpec<'_>, ways: &QemuWays) -> Result<Negotiated, Refusal> {
        let mut negotiated = Negotiated::default();
        for pair in 0..spec.rings.len().div_ceil(2) {
            self.qemu_greeting(spec, pair, &mut negotiated)?;
        }
        for index in 0..spec.rings.len() as u32 {
            let ack = ways.enable_acks && negotiated.has_protocol(protocol::REPLY_ACK);
            self.must(Message::set_vring_enable(index, 1), ack)?;
        }
        for (pair, rings) in spec.rings.chunks(2).enumerate() {
            self.must(Message::set_features(negotiated.features), false)?;
            self.qemu_add_status(&negotiated, status::FEATURES_OK)?;
            if pair == 0 || ways.memory_for_each_pair {
                self.qemu_memory(spec, &negotiated)?;
            }
            for (index, ring) in (2 * pair as u32..).zip(rings) {
                self.qemu_start_ring(index, ring)?;
            }
        }
        self.qemu_add_status(&negotiated, status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK)?;
        Ok(negotiated)
    }

    /// Stops a session as QEMU does; returns the bases.
    pub fn stop_like_qemu(&self, rings: usize) -> Result<Vec<u32>, Answer> {
        (0..rings as u32).map(|index| self.get_vring_base(index)).collect()
    }

    /// QEMU has a vhost device for each pair, and each introduces itself; some things only the first says.
    fn qemu_greeting(&self, spec: &SessionSpec<'_>, pair: usize, negotiated: &mut Negotiated) -> Result<(), Refusal> {
        let queue_num = negotiated.queue_num;
        *negotiated = self.offered(spec)?;
        negotiated.queue_num = queue_num;
        if pair == 0 && negotiated.has_protocol(protocol::MQ) {
            negotiated.queue_num = Some(self.must_get(&Message::get_queue_num())?);
        }
        if negotiated.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            negotiated.mem_slots = Some(self.must_get(&Message::get_max_mem_slots())?);
        }
        if pair == 0 {
            self.must(Message::set_owner(), false)?;
        }
        self.must_get(&Message::get_features())?;
        self.qemu_masked_calls(spec, pair)
    }

    /// Before the guest runs, calls go to eventfds that nobody reads.
    fn qemu_masked_calls(&self, spec: &SessionSpec<'_>, pair: usize) -> Result<(), Refusal> {
        let masked = EventFd::new(EFD_NONBLOCK).unwrap();
        for (index, ring) in (0..).zip(&spec.rings).skip(2 * pair).take(2) {
            self.must(Message::set_vring_call(index, fd_of(&masked)), false)?;
            self.must(Message::set_vring_err(index, fd_of(&ring.err)), false)?;
        }
        Ok(())
    }

    fn qemu_memory(&self, spec: &SessionSpec<'_>, negotiated: &Negotiated) -> Result<(), Refusal> {
        let ack = negotiated.has_protocol(protocol::REPLY_ACK);
        if !negotiated.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            return self.must(Message::set_mem_table(spec.mem), ack);
        }
        for region in spec.mem.regions() {
            self.must(Message::add_mem_reg(region), ack)?;
        }
        Ok(())
    }

    fn qemu_start_ring(&self, index: u32, ring: &SplitRing) -> Result<(), Refusal> {
        let fd_index = u64::from(index);
        self.must(Message::set_vring_num(index, ring.size.into()), false)?;
        self.must(Message::set_vring_base(index, ring.base.into()), false)?;
        self.must(Message::set_vring_addr(index, ring), false)?;
        self.must(Message::set_vring_kick(fd_index, fd_of(&ring.kick)), false)?;
        self.must(Message::set_vring_call(fd_index, fd_of(&ring.call)), false)
    }

    fn qemu_add_status(&self, negotiated: &Negotiated, bits: u8) -> Result<(), Refusal> {
        if !negotiated.has_protocol(protocol::STATUS) {
            return Ok(());
        }
        let old = self.must_get(&Message::get_status())? as u8;
        self.must(Message::set_status(old | bits), false)
    }

    /// Starts a session as cloud-hypervisor does: one memory table, all `NUM`s first, `ADDR` before `BASE`,
    /// `CALL` before `KICK`, all enables at the end, and an answer asked of everything as soon as that is possible.
    pub fn negotiate_like_cloud_hypervisor(&self, spec: &SessionSpec<'_>) -> Result<Negotiated, Refusal> {
        self.must(Message::set_owner(), false)?;
        let mut negotiated = self.offered(spec)?;
        let ack = negotiated.has_protocol(protocol::REPLY_ACK);
        if negotiated.has_protocol(protocol::MQ) {
            negotiated.queue_num = Some(self.must_get(&Message::get_queue_num())?);
        }
        self.must(Message::set_features(negotiated.features), ack)?;
        self.must(Message::set_mem_table(spec.mem), ack)?;
        for (index, ring) in spec.rings.iter().enumerate() {
            self.must(Message::set_vring_num(index as u32, ring.size.into()), ack)?;
        }
        for (index, ring) in spec.rings.iter().enumerate() {
            self.cloud_hypervisor_ring(index as u32, ring, ack)?;
        }
        for index in 0..spec.rings.len() as u32 {
            self.must(Message::set_vring_enable(index, 1), ack)?;
        }
        Ok(negotiated)
    }

    /// Stops a session as cloud-hypervisor does when the guest resets the device; returns the bases.
    pub fn stop_like_cloud_hypervisor(&self, rings: usize) -> Result<Vec<u32>, Answer> {
        (0..rings as u32)
            .map(|index| match self.ask(Message::set_vring_enable(index, 0)) {
                Answer::Ack => self.get_vring_base(index),
                answer => Err(answer),
            })
            .collect()
    }

    fn cloud_hypervisor_ring(&self, index: u32, ring: &SplitRing, ack: bool) -> Result<(), Refusal> {
        let fd_index = u64::from(index);
        self.must(Message::set_vring_addr(index, ring), ack)?;
        self.must(Message::set_vring_base(index, ring.base.into()), ack)?;
        self.must(Message::set_vring_call(fd_index, fd_of(&ring.call)), ack)?;
        self.must(Message::set_vring_kick(fd_index, fd_of(&ring.kick)), ack)
    }

    /// Both kinds of features, settled as far as protocol features go.
    fn offered(&self, spec: &SessionSpec<'_>) -> Result<Negotiated, Refusal> {
        let offered = self.must_get(&Message::get_features())?;
        let mut negotiated = Negotiated { offered, features: offered & spec.features, ..Negotiated::default() };
        if offered & feature::PROTOCOL_FEATURES != 0 {
            negotiated.protocol_offered = self.must_get(&Message::get_protocol_features())?;
            negotiated.protocol = negotiated.protocol_offered & spec.protocol;
            self.must(Message::set_protocol_features(negotiated.protocol), false)?;
        }
        Ok(negotiated)
    }

    fn must(&self, message: Message<'_>, need_reply: bool) -> Result<(), Refusal> {
        let request = message.request;
        let answer = if need_reply {
            self.ask(message)
        } else if self.tell(&message) {
            Answer::Ack
        } else {
            Answer::Closed
        };
        match answer {
            Answer::Ack => Ok(()),
            answer => Err(Refusal { request, answer }),
        }
    }

    fn must_get(&self, message: &Message<'_>) -> Result<u64, Refusal> {
        self.get_u64(message).map_err(|answer| Refusal { request: message.request, answer })
    }
}

fn answer_of(request: u32, reply: &Reply) -> Answer {
    assert_is_reply(request, reply);
    // A request with a reply of its own (GET_VRING_BASE) is answered by that, which is no ack.
    match reply.body.len() {
        8 if reply.u64() == 0 => Answer::Ack,
        8 => Answer::Nack(reply.u64()),
        len => panic!("An ack of {len} bytes to request {request}"),
    }
}

fn assert_is_reply(request: u32, reply: &Reply) {
    assert_eq!((reply.request, reply.flags), (request, flag::VERSION | flag::REPLY), "The reply's request and flags");
}

/// Requests that have a reply of their own, so that an ack would be one too many.
pub fn has_own_reply(request: u32) -> bool {
    matches!(
        request,
        request::GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | request::GET_VRING_BASE
            | request::GET_QUEUE_NUM
            | request::GET_CONFIG
            | request::GET_INFLIGHT_FD
            | request::GET_MAX_MEM_SLOTS
            | request::GET_STATUS
            | request::SET_LOG_BASE
            | request::SET_DEVICE_STATE_FD
            | request::CHECK_DEVICE_STATE
    )
}

impl AsFd for RawFrontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
