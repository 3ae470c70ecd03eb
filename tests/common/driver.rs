//! A guest's virtio-net driver: one queue pair with buffers, virtio-net headers and frames
//! (VIRTIO 1.3, 5.1.6 "Device Operation"), and the control queue (5.1.6.5 "Control Virtqueue").
//!
//! The rings are public, so that a test can spoil them under the driver's hands.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::PATIENCE;
use super::memory::GuestMemory;
use super::split_ring::{Buf, SplitRing};
use super::virtio::{VnetHdr, feature};

/// How a driver is made; `..NetDriverSpec::default()` for the rest.
#[derive(Clone, Copy, Debug)]
pub struct NetDriverSpec {
    /// What will be negotiated: EVENT_IDX, INDIRECT_DESC and MRG_RXBUF change what the driver does.
    pub features: u64,
    pub queue_size: u16,
    /// Index at which the rings begin.
    pub start_index: u16,
    /// Accept that the buffers of one frame become used one after another. The specification says that they
    /// must become used together; conventional back-ends do not keep to it.
    pub tolerate_partial_frames: bool,
}

impl Default for NetDriverSpec {
    fn default() -> Self {
        Self { features: feature::VERSION_1, queue_size: 256, start_index: 0, tolerate_partial_frames: false }
    }
}

/// The driver of one queue pair.
pub struct NetDriver {
    pub rx: SplitRing,
    pub tx: SplitRing,
    /// Give a received frame's buffers to the device again at once?
    pub repost: bool,
    features: u64,
    tolerate_partial_frames: bool,
    mem: Arc<GuestMemory>,
    /// What each head on the receive ring stands for.
    rx_bufs: HashMap<u16, Vec<Buf>>,
    /// The buffer behind each head on the transmit ring.
    tx_bufs: HashMap<u16, TxBuf>,
    tx_pool: Vec<TxBuf>,
}

/// A frame as it came, with what a test may want to know of how it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub header: VnetHdr,
    pub frame: Vec<u8>,
    /// Used length of each buffer.
    pub lens: Vec<u32>,
}

#[derive(Clone, Copy)]
struct TxBuf {
    addr: u64,
    room: usize,
}

impl NetDriver {
    pub fn new(mem: &Arc<GuestMemory>, spec: &NetDriverSpec) -> Self {
        let ring = || {
            let mut ring = SplitRing::starting_at(mem, spec.queue_size, spec.start_index);
            ring.event_idx = spec.features & feature::EVENT_IDX != 0;
            ring
        };
        Self {
            rx: ring(),
            tx: ring(),
            repost: true,
            features: spec.features,
            tolerate_partial_frames: spec.tolerate_partial_frames,
            mem: Arc::clone(mem),
            rx_bufs: HashMap::new(),
            tx_bufs: HashMap::new(),
            tx_pool: Vec::new(),
        }
    }

    /// The pair's rings in the order of their indices.
    pub fn rings(&self) -> [&SplitRing; 2] {
        [&self.rx, &self.tx]
    }

    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    // Receiving.

    /// Posts `count` receive buffers of `len` bytes each, header included.
    pub fn post_rx(&mut self, count: usize, len: usize) {
        self.post_rx_chains(count, &[len]);
    }

    /// Posts `count` receive chains, each of elements of these lengths.
    pub fn post_rx_chains(&mut self, count: usize, lens: &[usize]) {
        for _ in 0..count {
            let bufs = lens.iter().map(|len| Buf::writable(self.mem.alloc(*len, 1), *len)).collect();
            self.add_rx(bufs);
        }
        self.rx.publish_and_kick();
    }

    /// Receives a frame; `None` when `timeout` passed without one.
    pub fn recv(&mut self, timeout: Duration) -> Option<(VnetHdr, Vec<u8>)> {
        let received = self.recv_detailed(timeout)?;
        Some((received.header, received.frame))
    }

    /// Receives a frame, and how it lay in the buffers.
    pub fn recv_detailed(&mut self, timeout: Duration) -> Option<Received> {
        let (head, len) = self.rx.wait_used(timeout)?;
        let mut bytes = self.take_rx(head, len);
        assert!(bytes.len() >= VnetHdr::LEN, "A frame of {len} bytes has no whole header");
        let header = VnetHdr::from_bytes(&bytes);
        let mut lens = vec![len];
        for _ in 1..self.buffers_of(&header) {
            let (head, len) = self.next_of_frame();
            bytes.extend(self.take_rx(head, len));
            lens.push(len);
        }
        if self.repost {
            self.rx.publish_and_kick();
        }
        let frame = bytes.split_off(VnetHdr::LEN);
        Some(Received { header, frame, lens })
    }

    fn buffers_of(&self, header: &VnetHdr) -> u16 {
        if self.has(feature::MRG_RXBUF) {
            assert_ne!(header.num_buffers, 0, "A frame in no buffers");
            header.num_buffers
        } else {
            1
        }
    }

    fn next_of_frame(&mut self) -> (u16, u32) {
        let next = if self.tolerate_partial_frames { self.rx.wait_used(PATIENCE) } else { self.rx.take_used() };
        next.expect("all buffers of a frame are used together")
    }

    fn add_rx(&mut self, bufs: Vec<Buf>) {
        let head = if self.has(feature::INDIRECT_DESC) && bufs.len() > 1 {
            self.rx.add_indirect(&bufs)
        } else {
            self.rx.add(&bufs)
        };
        self.rx_bufs.insert(head, bufs);
    }

    /// The bytes that the device wrote to a chain. The chain goes back to the device if asked.
    fn take_rx(&mut self, head: u16, len: u32) -> Vec<u8> {
        let bufs = self.rx_bufs.remove(&head).unwrap();
        let room: u32 = bufs.iter().map(|buf| buf.len).sum();
        assert!(len <= room, "{len} bytes used of a buffer of {room}");
        let bytes = self.gather(&bufs, len as usize);
        if self.repost {
            self.add_rx(bufs);
        }
        bytes
    }

    fn gather(&self, bufs: &[Buf], len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        for buf in bufs {
            let step = (len - bytes.len()).min(buf.len as usize);
            bytes.extend(self.mem.read(buf.addr, step));
        }
        bytes
    }

    // Sending.

    /// Sends a frame: header and frame in a descriptor each, in an indirect table if that was negotiated.
    pub fn send(&mut self, header: &VnetHdr, frame: &[u8]) -> u16 {
        let head = self.queue(header, frame);
        self.tx.publish_and_kick();
        head
    }

    /// Like [`NetDriver::send`], but neither published nor kicked: for batches.
    pub fn queue(&mut self, header: &VnetHdr, frame: &[u8]) -> u16 {
        let bytes = [&header.to_bytes()[..], frame].concat();
        self.queue_split(&bytes, &[VnetHdr::LEN])
    }

    /// Queues any bytes as one chain, with descriptors of the lengths `cuts` and one for the rest.
    pub fn queue_split(&mut self, bytes: &[u8], cuts: &[usize]) -> u16 {
        self.reclaim_tx();
        let buf = self.tx_buffer(bytes.len());
        self.mem.write(buf.addr, bytes);
        let bufs = cut(buf.addr, bytes.len(), cuts);
        let head = self.add_tx(&bufs);
        self.tx_bufs.insert(head, buf);
        head
    }

    /// Takes back what the device has sent; returns how many frames that were.
    pub fn reclaim_tx(&mut self) -> usize {
        let mut count = 0;
        while let Some((head, _)) = self.tx.take_used() {
            self.tx_pool.extend(self.tx_bufs.remove(&head));
            count += 1;
        }
        count
    }

    /// Waits until the device has given back every frame; false when `timeout` passed.
    pub fn wait_tx_done(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while !self.tx.outstanding().is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some((head, _)) = self.tx.wait_used(left) else {
                return false;
            };
            self.tx_pool.extend(self.tx_bufs.remove(&head));
        }
        true
    }

    /// Adds a chain, after waiting for room if there is none.
    fn add_tx(&mut self, bufs: &[Buf]) -> u16 {
        loop {
            let added =
                if self.has(feature::INDIRECT_DESC) { self.tx.try_add_indirect(bufs) } else { self.tx.try_add(bufs) };
            match added {
                Some(head) => return head,
                None => self.wait_tx_room(),
            }
        }
    }

    fn wait_tx_room(&mut self) {
        // What is queued and not published would never come back.
        self.tx.publish_and_kick();
        let (head, _) = self.tx.wait_used(PATIENCE).expect("the device takes frames");
        self.tx_pool.extend(self.tx_bufs.remove(&head));
    }

    fn tx_buffer(&mut self, len: usize) -> TxBuf {
        if let Some(at) = self.tx_pool.iter().position(|buf| buf.room >= len) {
            return self.tx_pool.swap_remove(at);
        }
        let room = len.max(2048);
        TxBuf { addr: self.mem.alloc(room, 1), room }
    }
}

/// Descriptors for `len` bytes at `addr`, of the lengths `cuts` and one for the rest.
fn cut(addr: u64, len: usize, cuts: &[usize]) -> Vec<Buf> {
    let mut bufs = Vec::new();
    let mut at = 0;
    for step in cuts {
        bufs.push(Buf::readable(addr + at as u64, *step));
        at += step;
    }
    if at < len {
        bufs.push(Buf::readable(addr + at as u64, len - at));
    }
    bufs
}

/// The driver's side of the control queue.
pub struct CtrlDriver {
    pub ring: SplitRing,
    mem: Arc<GuestMemory>,
    command: u64,
    status: u64,
}

impl CtrlDriver {
    const ROOM: usize = 64 << 10;
    /// What a device never answers.
    const UNANSWERED: u8 = 0xee;

    pub fn new(mem: &Arc<GuestMemory>, size: u16, features: u64) -> Self {
        let mut ring = SplitRing::new(mem, size);
        ring.event_idx = features & feature::EVENT_IDX != 0;
        Self { ring, mem: Arc::clone(mem), command: mem.alloc(Self::ROOM, 1), status: mem.alloc(1, 1) }
    }

    /// Gives a command and returns the device's status byte; panics if none comes.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
        self.try_command(class, command, data, PATIENCE).expect("an answer on the control queue")
    }

    /// Gives a command; `None` when `timeout` passed without an answer, or the device wrote no status.
    pub fn try_command(&mut self, class: u8, command: u8, data: &[u8], timeout: Duration) -> Option<u8> {
        let len = 2 + data.len();
        let addr = if len <= Self::ROOM { self.command } else { self.mem.alloc(len, 1) };
        self.mem.write(addr, &[class, command]);
        self.mem.write(addr + 2, data);
        self.mem.write(self.status, &[Self::UNANSWERED]);
        let mut bufs = vec![Buf::readable(addr, 2)];
        if !data.is_empty() {
            bufs.push(Buf::readable(addr + 2, data.len()));
        }
        bufs.push(Buf::writable(self.status, 1));
        self.ring.add(&bufs);
        self.ring.publish_and_kick();
        self.ring.wait_used(timeout)?;
        let status = self.mem.read(self.status, 1)[0];
        (status != Self::UNANSWERED).then_some(status)
    }
}
