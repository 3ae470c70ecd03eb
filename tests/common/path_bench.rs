//! A guest's driver, a front-end's session and the back-end in this process, with TAP doubles: one call to have frames
//! flow.

use std::net::Shutdown;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use super::PATIENCE;
use super::backend::InProcess;
use super::driver::{NetDriver, NetDriverSpec};
use super::fd_of;
use super::frames::{Ends, Stamp, test_frame};
use super::frontend::{RawFrontend, SessionSpec};
use super::memory::GuestMemory;
use super::message::Message;
use super::split_ring::SplitRing;
use super::tap_double::TapDouble;
use super::virtio::{VnetHdr, feature};

/// The feature sets over which the scenarios run.
pub const FEATURE_SETS: [u64; 6] = [
    0,
    feature::MRG_RXBUF,
    feature::EVENT_IDX,
    feature::INDIRECT_DESC,
    feature::IN_ORDER,
    feature::MRG_RXBUF | feature::EVENT_IDX | feature::INDIRECT_DESC | feature::IN_ORDER,
];

/// Index of the first pair's receive ring.
pub const RX: u32 = 0;
/// Index of the first pair's transmit ring.
pub const TX: u32 = 1;

/// See the file's head. The session starts as QEMU starts it.
pub struct Bench {
    // Dropped in this order: the front-end ends its session before the back-end is waited for.
    pub front_end: RawFrontend,
    pub driver: NetDriver,
    pub mem: Arc<GuestMemory>,
    pub backend: InProcess,
    pub features: u64,
}

impl Bench {
    /// One queue pair with rings of 256.
    pub fn new(features: u64) -> Self {
        Self::with(NetDriverSpec { features, ..NetDriverSpec::default() })
    }

    /// One queue pair with a driver of another kind.
    pub fn with(spec: NetDriverSpec) -> Self {
        Self::on(Arc::new(GuestMemory::single(64 << 20)), spec)
    }

    /// One queue pair in this memory.
    pub fn on(mem: Arc<GuestMemory>, spec: NetDriverSpec) -> Self {
        Self::before(InProcess::start(1), mem, spec)
    }

    /// One queue pair before this back-end.
    pub fn before(backend: InProcess, mem: Arc<GuestMemory>, spec: NetDriverSpec) -> Self {
        let features = spec.features | feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        let driver = NetDriver::new(&mem, &NetDriverSpec { features, ..spec });
        let front_end = RawFrontend::connect(backend.socket()).unwrap();
        let mut bench = Self { front_end, driver, mem, backend, features };
        bench.negotiate();
        bench
    }

    /// Ends the session and begins another on the same rings, which say of themselves where they are.
    pub fn reconnect(&mut self) {
        // The back-end closes its end when it has let go of the rings, and then takes the next connection.
        self.front_end.stream().shutdown(Shutdown::Write).unwrap();
        assert!(self.front_end.wait_closed(PATIENCE), "The session ends with its connection");
        self.front_end = RawFrontend::connect(self.backend.socket()).unwrap();
        self.negotiate();
    }

    fn negotiate(&mut self) {
        let session = SessionSpec::new(&self.mem, self.driver.rings().to_vec(), self.features);
        let negotiated = self.front_end.negotiate_like_qemu(&session).unwrap();
        assert_eq!(negotiated.features, self.features, "All features are offered");
        // An answer says that everything before it was done.
        assert!(self.front_end.is_alive());
    }

    pub fn tap(&self) -> &TapDouble {
        &self.backend.taps[0]
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.backend.counter(0, name)
    }

    pub fn wait_counter(&self, name: &str, value: u64) {
        self.backend.wait_counter(0, name, value);
    }

    /// Sends a stamped frame of stream 1 from the guest and takes it from the TAP.
    pub fn pass_tx(&mut self, seq: u32, len: usize) {
        let frame = tx_frame(seq, len);
        self.driver.send(&VnetHdr::default(), &frame);
        let (header, got) = self.tap().recv(PATIENCE).expect("a frame from the guest");
        assert_eq!(header, VnetHdr::default());
        assert!(got == frame, "frame {seq} of {len} bytes arrived as {} other bytes", got.len());
    }

    /// Sends a stamped frame of stream 2 to the guest and takes it from the rx ring.
    pub fn pass_rx(&mut self, seq: u32, len: usize) {
        let frame = rx_frame(seq, len);
        self.tap().send(&VnetHdr::default(), &frame);
        let (_, got) = self.driver.recv(PATIENCE).expect("a frame to the guest");
        assert!(got == frame, "frame {seq} of {len} bytes arrived as {} other bytes", got.len());
    }

    /// All frames that the host sent were delivered or are counted under a reason, and likewise the guest's heads.
    pub fn assert_balance(&self, host_sent: u64, guest_sent: u64) {
        // A frame may be seen on the TAP a moment before it is counted.
        let deadline = Instant::now() + PATIENCE;
        while self.settled() != (host_sent, guest_sent) {
            assert!(Instant::now() < deadline, "{host_sent}, {guest_sent}: {:?}", self.backend.counters(0));
            thread::yield_now();
        }
    }

    /// How many of the host's frames and of the guest's heads are counted, passed or dropped.
    fn settled(&self) -> (u64, u64) {
        let counters = self.backend.counters(0);
        let all = |frames: &str, drops: &str| -> u64 {
            let counted = counters.iter().filter(|(name, _)| **name == frames || name.starts_with(drops));
            counted.map(|(_, value)| value).sum()
        };
        (all("rx_frames", "rx_drop_"), all("tx_frames", "tx_drop_"))
    }

    /// Describes a stopped ring to the back-end again, which starts it.
    pub fn start_ring(&self, index: u32, ring: &SplitRing) {
        let messages = [
            Message::set_vring_num(index, ring.size.into()),
            Message::set_vring_base(index, ring.base.into()),
            Message::set_vring_addr(index, ring),
            Message::set_vring_call(index.into(), fd_of(&ring.call)),
            Message::set_vring_err(index.into(), fd_of(&ring.err)),
            Message::set_vring_kick(index.into(), fd_of(&ring.kick)),
        ];
        for message in messages {
            self.tell(&message);
        }
    }

    /// Sends a message and waits until it is done.
    pub fn tell(&self, message: &Message<'_>) {
        assert!(self.front_end.tell(message) && self.front_end.is_alive(), "{:?} was refused", message.request);
    }
}

/// A frame of stream 1, from the guest.
pub fn tx_frame(seq: u32, len: usize) -> Vec<u8> {
    test_frame(&Ends::TX, Stamp { stream: 1, seq }, len)
}

/// A frame of stream 2, to the guest.
pub fn rx_frame(seq: u32, len: usize) -> Vec<u8> {
    test_frame(&Ends::RX, Stamp { stream: 2, seq }, len)
}
