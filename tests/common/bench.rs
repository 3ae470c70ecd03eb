//! A guest with its queue pairs ([`Guest`]), and the whole of guest, front-end and back-end in this process ([`Bench`]).
//!
//! What most session tests ask in the end: do frames pass both ways?

use std::net::Shutdown;
use std::sync::Arc;

use super::PATIENCE;
use super::backend::InProcess;
use super::driver::{NetDriver, NetDriverSpec};
use super::frames::{Ends, Stamp, test_frame};
use super::frontend::{Answer, Negotiated, RawFrontend, SessionSpec};
use super::memory::GuestMemory;
use super::message::{Message, request};
use super::tap_double::TapDouble;
use super::virtio::{VnetHdr, feature};

/// What every session here negotiates at least.
pub const BASE: u64 = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
/// Descriptors in each ring.
pub const RING_SIZE: u16 = 256;
/// Bytes of memory that a guest has unless told otherwise.
const MEMORY: usize = 32 << 20;

/// A guest: memory, and a driver for each queue pair.
pub struct Guest {
    pub mem: Arc<GuestMemory>,
    pub pairs: Vec<NetDriver>,
    features: u64,
    next_seq: u32,
}

impl Guest {
    pub fn new(pairs: usize, features: u64) -> Guest {
        Guest::in_memory(GuestMemory::single(MEMORY), pairs, features)
    }

    pub fn in_memory(mem: GuestMemory, pairs: usize, features: u64) -> Guest {
        let mem = Arc::new(mem);
        let features = features | BASE;
        let spec = NetDriverSpec { features, queue_size: RING_SIZE, ..NetDriverSpec::default() };
        let pairs = (0..pairs).map(|_| NetDriver::new(&mem, &spec)).collect();
        Guest { mem, pairs, features, next_seq: 0 }
    }

    /// What a front-end brings to a session for this guest.
    pub fn session(&self) -> SessionSpec<'_> {
        let rings = self.pairs.iter().flat_map(NetDriver::rings).collect();
        SessionSpec::new(&self.mem, rings, self.features)
    }

    fn stamp(&mut self) -> Stamp {
        self.next_seq += 1;
        Stamp { stream: 1, seq: self.next_seq }
    }

    /// Sends one frame on a queue pair and finds it on its TAP.
    pub fn assert_tx(&mut self, pair: usize, tap: &TapDouble) {
        let frame = test_frame(&Ends::TX, self.stamp(), 200);
        self.pairs[pair].send(&VnetHdr::default(), &frame);
        let (_, got) = tap.recv(PATIENCE).expect("a frame on the TAP");
        assert_eq!(got, frame, "queue pair {pair}");
    }

    /// Sends one frame from the TAP and finds it in the guest.
    pub fn assert_rx(&mut self, pair: usize, tap: &TapDouble) {
        let frame = test_frame(&Ends::RX, self.stamp(), 200);
        let driver = &mut self.pairs[pair];
        if driver.rx.outstanding().is_empty() {
            driver.post_rx(8, 2048);
        }
        tap.send(&VnetHdr::default(), &frame);
        let (_, got) = driver.recv(PATIENCE).expect("a frame in the guest");
        assert_eq!(got, frame, "queue pair {pair}");
    }

    /// Frames pass both ways on every queue pair.
    pub fn assert_frames_pass(&mut self, taps: &[TapDouble]) {
        for (pair, tap) in taps.iter().enumerate().take(self.pairs.len()) {
            self.assert_tx(pair, tap);
            self.assert_rx(pair, tap);
        }
    }

    /// Has each ring's front-end say, at the next session, that it carries on where the device got to.
    pub fn resume_at_used_index(&mut self) {
        for driver in &mut self.pairs {
            for ring in [&mut driver.rx, &mut driver.tx] {
                ring.base = ring.used_idx();
            }
        }
    }
}

/// A back-end in this process, with a guest and a connected front-end.
pub struct Bench {
    // Dropped in this order: the front-end before the back-end.
    pub front_end: RawFrontend,
    pub guest: Guest,
    pub backend: InProcess,
}

impl Bench {
    /// Connected; nothing was said yet.
    pub fn connected(queue_pairs: usize) -> Bench {
        Bench::before(InProcess::start(queue_pairs), Guest::new(queue_pairs, 0))
    }

    /// Connected, with that back-end and that guest.
    pub fn before(backend: InProcess, guest: Guest) -> Bench {
        Bench { front_end: RawFrontend::connect(backend.socket()).unwrap(), guest, backend }
    }

    /// With a session in which features and memory are settled, and no ring was spoken of.
    pub fn negotiated(queue_pairs: usize) -> Bench {
        let bench = Bench::connected(queue_pairs);
        bench.negotiate();
        assert_eq!(bench.front_end.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
        bench
    }

    /// With a session whose rings run.
    pub fn running(queue_pairs: usize) -> Bench {
        let bench = Bench::connected(queue_pairs);
        bench.start();
        bench
    }

    /// Settles features: all protocol features that are offered, owner, and the guest's features.
    pub fn negotiate(&self) -> u64 {
        let front_end = &self.front_end;
        let protocol = front_end.get_u64(&Message::get_protocol_features()).unwrap();
        assert!(front_end.tell(&Message::set_protocol_features(protocol)));
        assert_eq!(front_end.ask(Message::set_owner()), Answer::Ack);
        assert_eq!(front_end.ask(Message::set_features(self.guest.features)), Answer::Ack);
        protocol
    }

    /// Starts a session in cloud-hypervisor's order, which asks for an answer to everything.
    pub fn start(&self) -> Negotiated {
        self.front_end.negotiate_like_cloud_hypervisor(&self.guest.session()).unwrap()
    }

    /// Ends the connection, and connects anew.
    pub fn reconnect(&mut self) {
        self.front_end.stream().shutdown(Shutdown::Both).unwrap();
        self.front_end = RawFrontend::connect(self.backend.socket()).unwrap();
        assert!(self.front_end.is_alive(), "The next front-end is served");
    }

    /// The same with a guest that was booted anew, and its rings running.
    pub fn start_over(&mut self) {
        self.reconnect();
        self.guest = Guest::new(self.guest.pairs.len(), self.guest.features);
        self.start();
    }

    pub fn ask(&self, message: Message<'_>) -> Answer {
        self.front_end.ask(message)
    }

    /// Where ring `index` is, for messages about it.
    pub fn ring_addr(&self, index: usize) -> super::message::VringAddr {
        super::message::VringAddr::of(self.guest.session().rings[index])
    }

    /// Sets a stopped ring up and enables it; features and memory must be known.
    pub fn start_ring(&self, index: usize) {
        let session = self.guest.session();
        let ring = session.rings[index];
        let at = index as u32;
        let kick = Message::set_vring_kick(index as u64, super::fd_of(&ring.kick));
        let call = Message::set_vring_call(index as u64, super::fd_of(&ring.call));
        let base = Message::set_vring_base(at, u32::from(ring.used_idx()));
        let num = Message::set_vring_num(at, u32::from(ring.size));
        for message in [num, base, Message::set_vring_addr(at, ring), call, kick, Message::set_vring_enable(at, 1)] {
            let request = message.request;
            assert_eq!(self.ask(message), Answer::Ack, "request {request} for ring {index}");
        }
    }

    /// Waits until the back-end has acted on all that was sent so far: it answers in order.
    pub fn settle(&self) {
        assert!(self.front_end.is_alive());
    }

    pub fn assert_frames_pass(&mut self) {
        self.guest.assert_frames_pass(&self.backend.taps);
    }
}

/// The most that any front-end says of a ring, by request.
pub const RING_REQUESTS: [u32; 8] = [
    request::SET_VRING_NUM,
    request::SET_VRING_ADDR,
    request::SET_VRING_BASE,
    request::GET_VRING_BASE,
    request::SET_VRING_KICK,
    request::SET_VRING_CALL,
    request::SET_VRING_ERR,
    request::SET_VRING_ENABLE,
];
