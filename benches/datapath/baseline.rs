//! The conventional back-end: `vhost-user-backend`, `VringRwLock`, `virtio_queue::Queue`, one system call for each frame,
//! written as the examples of these crates are. It has the same features and the same TAP offloads as ours, reads and
//! writes straight in guest memory, and publishes and calls once for each batch of frames.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, RwLock};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use vhost_user_net::device::tap::{self, Extras, TapByName};
use vhost_user_net::device::{Device, DeviceQueue, Layer, TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard, GuestMemoryMmap as Mmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::guest::FEATURES;

type Chain = DescriptorChain<GuestMemoryLoadGuard<Mmap>>;

const RX: u16 = 0;
const TX: u16 = 1;
/// Beyond the rings' numbers and that of the exit event.
const TAP: u16 = 3;
const HEADER: usize = 12;

/// Serves one front-end on `socket` with TAP `name`, and ends with it.
pub fn serve(socket: &Path, name: &str) {
    let name = name.parse().expect("a name");
    let how = TapByName {
        layer: Layer::Ethernet,
        name,
        queue_pairs: 1,
        shared: false,
        mtu: None,
        extras: Extras::default(),
        reopens: false,
    };
    let (device, mut queues) = tap::open(&how).expect("the TAP");
    device.set_offloads(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6).expect("offloads");
    let queue = queues.remove(0);
    let tap = queue.as_fd().try_clone_to_owned().expect("a descriptor");
    let mem = GuestMemoryAtomic::new(Mmap::new());
    let bridge = Bridge {
        mem: mem.clone(),
        tap,
        exit: new_event_consumer_and_notifier(EventFlag::NONBLOCK).expect("an eventfd"),
        readable: true,
        _device: (device, queue),
    };
    let tap = bridge.tap.as_raw_fd();
    let mut daemon = VhostUserDaemon::new("baseline".to_owned(), Arc::new(RwLock::new(bridge)), mem).expect("a daemon");
    for handler in daemon.get_epoll_handlers() {
        handler.register_listener(tap, EventSet::IN | EventSet::EDGE_TRIGGERED, TAP.into()).expect("epoll");
    }
    let mut listener = Listener::new(socket, true).expect("a socket");
    eprintln!("baseline: Listening on {}; EVENT_IDX, INDIRECT_DESC, MRG_RXBUF, CSUM, TSO on", socket.display());
    daemon.start(&mut listener).expect("a front-end");
    // It ends when the front-end goes.
    let _ = daemon.wait();
}

struct Bridge {
    mem: GuestMemoryAtomic<Mmap>,
    tap: OwnedFd,
    exit: (EventConsumer, EventNotifier),
    /// Whether the TAP may have frames.
    readable: bool,
    _device: (Device, DeviceQueue),
}

impl Bridge {
    fn transmit(&self, vring: &VringRwLock) -> io::Result<()> {
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            while let Some(chain) = pop(vring, &self.mem)? {
                let head = chain.head_index();
                let pieces = pieces(chain, &self.mem);
                // What the TAP refuses is dropped.
                let _ = vectored(self.tap.as_fd(), &pieces, libc::writev);
                vring.add_used(head, 0).map_err(io::Error::other)?;
            }
            signal(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }

    fn receive(&mut self, vring: &VringRwLock) -> io::Result<()> {
        vring.disable_notification().map_err(io::Error::other)?;
        while self.readable {
            let Some(chains) = chains(vring, &self.mem)? else {
                if vring.enable_notification().map_err(io::Error::other)? {
                    continue;
                }
                break;
            };
            self.receive_into(vring, chains)?;
        }
        signal(vring)
    }

    /// Reads one frame into a chain, or into as many as a large one needs.
    fn receive_into(&mut self, vring: &VringRwLock, chains: Vec<Chain>) -> io::Result<()> {
        let mem = self.mem.memory();
        let first = chains.first().and_then(|chain| chain.clone().writable().next()).expect("a descriptor").addr();
        let all: Vec<_> = chains.iter().flat_map(|chain| pieces(chain.clone(), &self.mem)).collect();
        let Ok(len) = vectored(self.tap.as_fd(), &all, libc::readv) else {
            self.readable = false;
            let mut state = vring.get_mut();
            chains.iter().for_each(|_| state.get_queue_mut().go_to_previous_position());
            return Ok(());
        };
        let mut left = len;
        let mut used = 0;
        for chain in &chains {
            if left == 0 {
                vring.get_mut().get_queue_mut().go_to_previous_position();
                continue;
            }
            let room: usize = chain.clone().writable().map(|desc| desc.len() as usize).sum();
            let here = left.min(room);
            left -= here;
            used += 1;
            vring.add_used(chain.head_index(), here as u32).map_err(io::Error::other)?;
        }
        mem.write_obj(
            u16::to_le(used),
            first.0.checked_add(HEADER as u64 - 2).map(vm_memory::GuestAddress).expect("in memory"),
        )
        .map_err(io::Error::other)
    }
}

/// Chains for the largest frame that may come: one is enough for what the cases send but for super-frames.
fn chains(vring: &VringRwLock, mem: &GuestMemoryAtomic<Mmap>) -> io::Result<Option<Vec<Chain>>> {
    let wanted = crate::cases::baseline_chains();
    let mut chains = Vec::with_capacity(wanted);
    while chains.len() < wanted {
        match pop(vring, mem)? {
            Some(chain) => chains.push(chain),
            None => break,
        }
    }
    if chains.len() < wanted {
        let mut state = vring.get_mut();
        chains.iter().for_each(|_| state.get_queue_mut().go_to_previous_position());
        return Ok(None);
    }
    Ok(Some(chains))
}

fn pop(vring: &VringRwLock, mem: &GuestMemoryAtomic<Mmap>) -> io::Result<Option<Chain>> {
    let mut state = vring.get_mut();
    let mut chains = state.get_queue_mut().iter(mem.memory()).map_err(io::Error::other)?;
    Ok(chains.next())
}

/// The chain's buffers as iovecs in guest memory.
fn pieces(chain: Chain, mem: &GuestMemoryAtomic<Mmap>) -> Vec<libc::iovec> {
    let mem = mem.memory();
    chain
        .map(|desc| {
            let len = desc.len() as usize;
            let slice = mem.get_slice(desc.addr(), len).expect("buffers are in guest memory");
            libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len }
        })
        .collect()
}

type Vectored = unsafe extern "C" fn(i32, *const libc::iovec, i32) -> isize;

fn vectored(fd: BorrowedFd<'_>, pieces: &[libc::iovec], call: Vectored) -> io::Result<usize> {
    // SAFETY: the pieces lie in guest memory, which the daemon keeps mapped while it handles an event.
    let len = unsafe { call(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

fn signal(vring: &VringRwLock) -> io::Result<()> {
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
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        assert!(enabled, "EVENT_IDX is negotiated");
    }

    fn update_memory(&mut self, mem: GuestMemoryAtomic<Mmap>) -> io::Result<()> {
        self.mem = mem;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = &self.exit;
        Some((consumer.try_clone().ok()?, notifier.try_clone().ok()?))
    }

    fn handle_event(&mut self, event: u16, _on: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let runs = |ring: u16| {
            let state = vrings[usize::from(ring)].get_ref();
            state.is_enabled() && state.get_queue().ready()
        };
        match event {
            TX => return self.transmit(&vrings[usize::from(TX)]),
            TAP => self.readable = true,
            _ => {}
        }
        if runs(RX) { self.receive(&vrings[usize::from(RX)]) } else { Ok(()) }
    }
}
