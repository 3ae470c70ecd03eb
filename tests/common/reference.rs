//! A conventional back-end on `vhost-user-backend`, in a thread: the second opinion for tests of sessions.
//!
//! It bridges one queue pair to one TAP-like file descriptor with one system call and two copies a frame, and is
//! written as the examples of its crates are. Nothing was done against its known weaknesses: a
//! malformed chain ends its worker, it reads a base modulo 2^16, and it publishes the buffers of a mergeable
//! frame one by one. QEMU's message order since 10.0 is beyond it.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{self, JoinHandle};

use rustix::io::Errno;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap as Mmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::tap_double::LARGEST_FRAME;
use super::virtio::feature;

type Memory = GuestMemoryAtomic<Mmap>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<Mmap>>;

const RX: u16 = 0;
const TX: u16 = 1;
/// Beyond the rings' numbers and that of the exit event.
const TAP: u16 = 3;

/// What the reference offers unless told otherwise.
pub const OFFERED: u64 =
    feature::VERSION_1 | feature::MRG_RXBUF | feature::EVENT_IDX | feature::INDIRECT_DESC | feature::PROTOCOL_FEATURES;

/// The running reference. It serves one connection after another until dropped.
pub struct ReferenceDaemon {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    ended: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl ReferenceDaemon {
    /// Listens on `path` when this returns.
    pub fn start(path: impl AsRef<Path>, tap: OwnedFd) -> Self {
        Self::start_offering(path, tap, OFFERED)
    }

    pub fn start_offering(path: impl AsRef<Path>, tap: OwnedFd, features: u64) -> Self {
        let path = path.as_ref().to_owned();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::new(Mutex::new(Vec::new()));
        let mut listener = Listener::new(&path, true).unwrap();
        let (stopped, endings) = (Arc::clone(&stop), Arc::clone(&ended));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let tap = tap.try_clone().unwrap();
                let ending = serve(&mut listener, Bridge::new(tap, features));
                endings.lock().unwrap().push(ending);
            }
        });
        Self { path, stop, ended, thread: Some(thread) }
    }

    /// How the connections so far ended, in the crate's words.
    pub fn endings(&self) -> Vec<String> {
        self.ended.lock().unwrap().clone()
    }
}

impl Drop for ReferenceDaemon {
    /// Ends after the present connection, so drop the front-end first.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A last connection wakes the thread out of accept(); it may have gone already.
        let _ = UnixStream::connect(&self.path);
        let joined = self.thread.take().map(JoinHandle::join);
        if let (Some(Err(_)), false) = (joined, thread::panicking()) {
            panic!("The reference daemon panicked");
        }
    }
}

/// Serves one connection; returns how it ended.
fn serve(listener: &mut Listener, bridge: Bridge) -> String {
    let mem = bridge.mem.clone();
    let tap = bridge.tap.try_clone().unwrap();
    let backend = Arc::new(RwLock::new(bridge));
    let mut daemon = VhostUserDaemon::new("reference".to_owned(), backend, mem).unwrap();
    // Edges: a level would spin while there are no buffers.
    let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
    for handler in daemon.get_epoll_handlers() {
        handler.register_listener(tap.as_raw_fd(), events, TAP.into()).unwrap();
    }
    if let Err(error) = daemon.start(listener) {
        return error.to_string();
    }
    match daemon.wait() {
        Ok(()) => "ok".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// One queue pair and its TAP.
struct Bridge {
    mem: Memory,
    tap: OwnedFd,
    offered: u64,
    acked: u64,
    event_idx: bool,
    /// A frame from the TAP for which there was no buffer.
    pending: Option<Vec<u8>>,
    exit: (EventConsumer, EventNotifier),
}

impl Bridge {
    fn new(tap: OwnedFd, offered: u64) -> Self {
        Self {
            mem: GuestMemoryAtomic::new(Mmap::new()),
            tap,
            offered,
            acked: 0,
            event_idx: false,
            pending: None,
            exit: new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap(),
        }
    }

    /// Sends all that the guest has queued, and asks to be told of more.
    fn pump_tx(&self, vring: &VringRwLock) -> io::Result<()> {
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            if !self.send_queued(vring)? {
                return Ok(());
            }
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }

    /// False when the TAP is full.
    fn send_queued(&self, vring: &VringRwLock) -> io::Result<bool> {
        while let Some(chain) = pop(vring, &self.mem)? {
            let head = chain.head_index();
            match rustix::io::write(&self.tap, &self.read_chain(chain)?) {
                Err(Errno::AGAIN) => {
                    vring.get_mut().get_queue_mut().go_to_previous_position();
                    return Ok(false);
                }
                // What the TAP refuses is dropped.
                Ok(_) | Err(_) => give_back(vring, &[(head, 0)])?,
            }
        }
        Ok(true)
    }

    fn read_chain(&self, chain: Chain) -> io::Result<Vec<u8>> {
        let mem = self.mem.memory();
        let mut bytes = Vec::new();
        chain.reader(&mem).map_err(io::Error::other)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Hands over all that waits on the TAP, as far as there are buffers.
    fn pump_rx(&mut self, vring: &VringRwLock) -> io::Result<()> {
        vring.disable_notification().map_err(io::Error::other)?;
        while let Some(frame) = self.next_frame()? {
            if self.deliver(vring, &frame)? {
                continue;
            }
            self.pending = Some(frame);
            if !vring.enable_notification().map_err(io::Error::other)? {
                break;
            }
        }
        Ok(())
    }

    fn next_frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        if let Some(frame) = self.pending.take() {
            return Ok(Some(frame));
        }
        let mut frame = vec![0; LARGEST_FRAME];
        match rustix::io::read(&self.tap, &mut frame) {
            Ok(0) | Err(Errno::AGAIN) => Ok(None),
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// False when there are too few buffers; then none is taken.
    fn deliver(&self, vring: &VringRwLock, frame: &[u8]) -> io::Result<bool> {
        let mem = self.mem.memory();
        let Some(chains) = self.chains_for(vring, frame.len())? else {
            return Ok(false);
        };
        let mut frame = frame.to_vec();
        frame[10..12].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mut rest = &frame[..];
        let mut used = Vec::new();
        for chain in chains {
            let head = chain.head_index();
            let mut writer = chain.writer(&mem).map_err(io::Error::other)?;
            let step = rest.len().min(writer.available_bytes());
            writer.write_all(&rest[..step])?;
            rest = &rest[step..];
            used.push((head, step as u32));
        }
        give_back(vring, &used)?;
        Ok(true)
    }

    /// Pops chains with room for `len` bytes, or none.
    fn chains_for(&self, vring: &VringRwLock, len: usize) -> io::Result<Option<Vec<Chain>>> {
        let mem = self.mem.memory();
        let most = if self.acked & feature::MRG_RXBUF == 0 { 1 } else { usize::from(u16::MAX) };
        let mut chains = Vec::new();
        let mut room = 0;
        while room < len && chains.len() < most {
            let Some(chain) = pop(vring, &self.mem)? else {
                let mut state = vring.get_mut();
                chains.iter().for_each(|_| state.get_queue_mut().go_to_previous_position());
                return Ok(None);
            };
            let writer = chain.clone().writer(&mem).map_err(io::Error::other)?;
            room += writer.available_bytes();
            chains.push(chain);
        }
        Ok(Some(chains))
    }
}

/// An impossible avail index is an error here, which ends the worker: taken for an empty ring it would spin.
fn pop(vring: &VringRwLock, mem: &Memory) -> io::Result<Option<Chain>> {
    let mut state = vring.get_mut();
    let mut chains = state.get_queue_mut().iter(mem.memory()).map_err(io::Error::other)?;
    Ok(chains.next())
}

fn give_back(vring: &VringRwLock, used: &[(u16, u32)]) -> io::Result<()> {
    for (head, len) in used {
        vring.add_used(*head, *len).map_err(io::Error::other)?;
    }
    if vring.needs_notification().map_err(io::Error::other)? {
        vring.signal_used_queue()?;
    }
    Ok(())
}

impl VhostUserBackendMut for Bridge {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn acked_features(&mut self, features: u64) {
        self.acked = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, mem: Memory) -> io::Result<()> {
        self.mem = mem;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = &self.exit;
        Some((consumer.try_clone().ok()?, notifier.try_clone().ok()?))
    }

    fn handle_event(
        &mut self,
        event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        match event {
            RX => self.pump_rx(&vrings[usize::from(RX)]),
            TX => self.pump_tx(&vrings[usize::from(TX)]),
            _ => {
                if runs(&vrings[usize::from(TX)]) {
                    self.pump_tx(&vrings[usize::from(TX)])?;
                }
                if runs(&vrings[usize::from(RX)]) {
                    self.pump_rx(&vrings[usize::from(RX)])?;
                }
                Ok(())
            }
        }
    }
}

/// The TAP may have an event before the ring is there.
fn runs(vring: &VringRwLock) -> bool {
    let state = vring.get_ref();
    state.is_enabled() && state.get_queue().ready()
}
