//! The virtual network card: what outlives front-end connections.
//!
//! It owns the device, a worker for each queue pair, the control queue's thread and the configuration space. A
//! vhost-user session drives it in terms of ring indices; only the card knows which thread runs which ring. `nic::host`
//! handles what happens to the device.

mod host;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::card_config::CardConfig;
use crate::control_queue::{self, ControlQueue, Surroundings};
use crate::device::{Device, DeviceQueue, Layer};
use crate::device_slot::{DeviceSlot, OffloadsRefused};
use crate::mac::Mac;
use crate::mailbox::{Mailbox, Stuck};
use crate::memory::MemView;
use crate::metrics::{CardCounters, PairCounters};
use crate::net::coalesce::Coalesce;
use crate::net::config_space::{ConfigSpace, LinkShown, MTU_MIN};
use crate::net::features::{self, CTRL_GUEST_OFFLOADS, Circumstances, GuestOffloads, MQ, VERSION_1};
use crate::net::framing::Framing;
use crate::net::ip_link::{Gateway, IpLink};
use crate::net::rarp;
use crate::notify::Call;
use crate::running_ring::{Direction, NotStarted, RingChange, RunsRings, StartRing, StoppedRing};
use crate::tuning::Tuning;
use crate::virtqueue::SplitRing;
use crate::worker::{self, Fitting, QueuePair};

pub use host::NotConfined;

/// The usual MTU, if neither the operator nor the interface says one.
const MTU_DEFAULT: u16 = 1500;
/// How many ring indices messages can carry.
const RINGS_MAX: usize = 256;
/// The most queue pairs: ring 2N is the control queue's, and kick and call messages carry the ring's index in 8 bits.
pub const QUEUE_PAIRS_MAX: u16 = 127;

/// The properties of the card, besides its device.
#[derive(Clone, Debug, Default)]
pub struct NicSetup {
    /// Its MAC address, if the back-end is to say it.
    pub mac: Option<Mac>,
    /// The largest MTU; the device's if not given.
    pub mtu: Option<u16>,
    /// The addresses of the gateway for which the guest asks, if the device carries packets only; any address if not
    /// given.
    pub gateway: Option<Gateway>,
    /// Whether the front-end hands over the control queue.
    pub has_control_queue: bool,
    /// How the workers move frames.
    pub tuning: Tuning,
}

impl NicSetup {
    /// The MAC address of a guest's card whose device is `device`, if that matters.
    fn mac_on(&self, device: &Device) -> Option<Mac> {
        self.mac.or(device.mac())
    }
}

/// What the card could not do.
#[derive(Debug, Error)]
pub enum NicError {
    /// A thread does not answer.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// The device refused offloads.
    #[error(transparent)]
    Offloads(#[from] OffloadsRefused),
    /// A kick descriptor cannot be waited for.
    #[error("Cannot wait for the kick descriptor of ring {ring}")]
    Kick {
        /// The ring's index.
        ring: usize,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// An MTU that no network card has.
    #[error("MTU {mtu} is not in {MTU_MIN} to 65535")]
    Mtu {
        /// What was asked.
        mtu: u64,
    },
    /// The device did not take a frame of ours.
    #[error("Cannot send a frame on {name:?}")]
    Inject {
        /// The interface.
        name: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

/// Which thread runs a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Pair(usize, Direction),
    Control,
    /// No thread: a front-end may set the ring up, but nothing here runs it.
    Nowhere,
}

/// The virtual network card.
pub struct Nic {
    alarm: Arc<EventFd>,
    link: Option<Arc<IpLink>>,
    pairs: Arc<[Mailbox<QueuePair>]>,
    counters: Vec<Arc<PairCounters>>,
    control: Mailbox<ControlQueue>,
    control_counters: Arc<PairCounters>,
    /// Whether the driver uses only one pair, however many there are, and has its control queue right behind that.
    has_one_pair: AtomicBool,
    config: Arc<CardConfig>,
    card_counters: CardCounters,
    setup: NicSetup,
    /// Dropped last: an interface that was made here is deleted by the thread that drops the card, which has the right
    /// to.
    device: Arc<DeviceSlot>,
}

impl Nic {
    /// Starts the threads of a card on `device`, with `queues` as the device queues of the queue pairs.
    ///
    /// # Errors
    /// Where the kernel has no descriptors or threads for it, or no CPU that a worker is to be bound to.
    pub fn new(device: Device, queues: Vec<DeviceQueue>, setup: NicSetup) -> io::Result<Nic> {
        let alarm = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let counters: Vec<_> = queues.iter().map(|_| Arc::new(PairCounters::default())).collect();
        let coalesce = Coalesce::of(setup.tuning.coalescing, &device);
        let has_packets = device.layer() == Layer::Ip;
        if setup.gateway.is_some() && !has_packets {
            log::warn!("--gateway has no meaning for {:?}, which carries Ethernet frames", device.name());
        }
        let link = has_packets.then(|| Arc::new(IpLink::new(setup.gateway, setup.mac)));
        let spawned = queues.into_iter().zip(&counters).enumerate();
        let pairs: Arc<[_]> = spawned
            .map(|(index, (queue, counters))| {
                let framing = Framing::of(&queue, link.as_ref());
                let fitting = Fitting { coalesce, framing, alarm: Arc::clone(&alarm) };
                worker::spawn(index, queue, &setup.tuning, fitting, Arc::clone(counters))
            })
            .collect::<io::Result<Vec<_>>>()?
            .into();
        bind(&pairs, &setup.tuning.cpus)?;
        let config = ConfigSpace {
            mac: setup.mac_on(&device).unwrap_or_default(),
            max_queue_pairs: u16::try_from(pairs.len()).unwrap_or(QUEUE_PAIRS_MAX),
            mtu: setup.mtu.or(device.mtu()).unwrap_or(MTU_DEFAULT),
            link_up: true,
        };
        let device = Arc::new(DeviceSlot::new(device));
        let config = Arc::new(CardConfig::new(config));
        let around =
            Surroundings { device: Arc::clone(&device), pairs: Arc::clone(&pairs), config: Arc::clone(&config) };
        let control_counters = Arc::new(PairCounters::default());
        let control = control_queue::spawn(around, Arc::clone(&control_counters))?;
        Ok(Nic {
            device,
            alarm,
            link,
            pairs,
            counters,
            control,
            control_counters,
            has_one_pair: AtomicBool::new(false),
            config,
            card_counters: CardCounters::default(),
            setup,
        })
    }

    /// The virtio features to offer.
    pub fn offered_features(&self) -> u64 {
        let device = self.device.get();
        features::offered(Circumstances {
            device_offloads: device.supported_offloads(),
            has_mac: self.setup.mac_on(&device).is_some(),
            has_control_queue: self.setup.has_control_queue,
        })
    }

    /// The answer to `GET_QUEUE_NUM`: front-ends read it as pairs, or as rings, or as rings with the control queue, and
    /// all of them are content with 2N + 1.
    pub fn queue_number(&self) -> u64 {
        2 * self.pairs.len() as u64 + 1
    }

    /// Whether the front-end is to hand over the control queue.
    pub fn has_control_queue(&self) -> bool {
        self.setup.has_control_queue
    }

    /// How many rings a front-end may set up: as many as it may expect if it takes the queue number for pairs. Rings
    /// that no thread runs stay idle.
    pub fn ring_count(&self) -> usize {
        (2 * (2 * self.pairs.len() + 1)).min(RINGS_MAX)
    }

    /// Why no thread runs ring `index`, if none does.
    pub fn why_idle(&self, index: usize) -> Option<&'static str> {
        let may_be_control = index == 2 * self.pairs_in_use();
        match self.place(index) {
            Place::Pair(..) | Place::Control => None,
            Place::Nowhere if may_be_control => Some(
                "a control queue is run for --front-end generic only, and for another queue pair see --queue-pairs",
            ),
            Place::Nowhere => Some("there are fewer queue pairs, see --queue-pairs"),
        }
    }

    fn place(&self, index: usize) -> Place {
        let pairs = self.pairs_in_use();
        let direction = if index.is_multiple_of(2) { Direction::Rx } else { Direction::Tx };
        match index / 2 {
            pair if pair < pairs => Place::Pair(pair, direction),
            _ if self.setup.has_control_queue && index == 2 * pairs => Place::Control,
            _ => Place::Nowhere,
        }
    }

    /// How many pairs have rings.
    fn pairs_in_use(&self) -> usize {
        if self.has_one_pair.load(Ordering::Relaxed) { 1 } else { self.pairs.len() }
    }

    /// Reads the configuration space; `None` where not all of the range can be read.
    pub fn read_config(&self, offset: u32, size: u32, shown: LinkShown) -> Option<Vec<u8>> {
        self.config.read(offset, size, shown)
    }

    /// Changes the MTU that the guest is told.
    ///
    /// # Errors
    /// [`NicError::Mtu`].
    pub fn set_mtu(&self, mtu: u64) -> Result<(), NicError> {
        let valid = u16::try_from(mtu).ok().filter(|mtu| *mtu >= MTU_MIN).ok_or(NicError::Mtu { mtu })?;
        self.config.set_mtu(valid);
        Ok(())
    }

    /// Forgets what an earlier front-end and its guest changed in the configuration space, and what the guest set by
    /// commands.
    pub fn begin_session(&self) {
        self.config.begin_session();
        if let Err(stuck) = self.control.call(ControlQueue::forget) {
            log::error!("{stuck}");
        }
    }

    /// Forgets the MAC address that the guest set, if it did.
    pub fn reset_mac(&self) {
        self.config.reset_mac();
    }

    /// Takes over the features that the guest acknowledged: sets the device's offloads, and begins the control queue's
    /// state anew.
    ///
    /// No ring may run.
    ///
    /// # Errors
    /// [`NicError`].
    pub fn set_features(&self, acked: u64) -> Result<(), NicError> {
        let offloads = GuestOffloads::of(acked);
        let device = self.device.get();
        self.device.set_offloads(offloads)?;
        self.config.begin_driver();
        let mac = self.setup.mac_on(&device);
        let filter = self.control.call(move |control| control.reset(acked, mac))?;
        // With the control queue here, the driver says how many pairs it uses, and begins with one (VIRTIO 1.3,
        // "Automatic receive steering"). Otherwise the front-end says it, by enabling rings.
        let starts_with_one = self.setup.has_control_queue && acked & MQ != 0;
        // Without MQ the driver has one pair, and the control queue right behind it (VIRTIO 1.3, "Network Device",
        // "Virtqueues"). The rings' indices are the driver's then.
        let is_driver = acked & VERSION_1 != 0;
        self.has_one_pair.store(self.setup.has_control_queue && is_driver && acked & MQ == 0, Ordering::Relaxed);
        // A driver that may have switched offloads off gets finished frames until its control ring shows whether it
        // did.
        let says_later = self.setup.has_control_queue && acked & CTRL_GUEST_OFFLOADS != 0;
        let offloads = if says_later { GuestOffloads::of(0) } else { offloads };
        for (index, pair) in self.pairs.iter().enumerate() {
            let filter = Arc::clone(&filter);
            pair.call(move |pair| {
                pair.set_filter(filter);
                pair.set_offloads(offloads);
                pair.set_allowed(index == 0 || !starts_with_one);
            })?;
        }
        Ok(())
    }

    /// Hands a ring to its thread, if one runs it.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn start(&self, ring: usize, start: StartRing) -> Result<Result<(), NotStarted>, Stuck> {
        self.on_ring(ring, Ok(()), move |owner, direction| owner.start(direction, start))
    }

    /// Stops a ring. What was completed is published, and nothing of the ring is touched any more.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn stop(&self, ring: usize) -> Result<Option<StoppedRing>, Stuck> {
        self.on_ring(ring, None, |owner, direction| owner.stop(direction))
    }

    /// Stops a ring whose memory was taken away.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn abandon(&self, ring: usize) -> Result<Option<StoppedRing>, Stuck> {
        self.on_ring(ring, None, |owner, direction| owner.abandon(direction))
    }

    /// Changes one thing about a running ring.
    ///
    /// # Errors
    /// [`NicError`].
    pub fn change(&self, ring: usize, change: RingChange) -> Result<(), NicError> {
        let changed = self.on_ring(ring, Ok(()), move |owner, direction| owner.change(direction, change))?;
        changed.map_err(|cause| NicError::Kick { ring, cause })
    }

    /// Counts that `ring` carries on at another position than its front-end said.
    pub fn count_off_base(&self, ring: usize) {
        let counters = match self.place(ring) {
            Place::Pair(pair, _) => self.counters.get(pair),
            Place::Control => Some(&self.control_counters),
            Place::Nowhere => None,
        };
        counters.into_iter().for_each(|counters| counters.rings_resumed_off_base.add(1));
    }

    /// Signals the front-end that a ring is broken that does not run, and gives the descriptor back. The ring's own
    /// thread writes to it: if the front-end makes that write wait, only its own card stands still, and the control
    /// thread, which still hears signals, ends the process.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn report_broken(&self, ring: usize, err: Option<Call>) -> Result<Option<Call>, Stuck> {
        let Some(err) = err else { return Ok(None) };
        self.on_ring(ring, None, move |_, _| {
            err.signal();
            Some(err)
        })
    }

    /// Has a running ring carry on in a new view of memory, in which it was found as `found`.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn relocate(&self, ring: usize, mem: &Arc<MemView>, found: SplitRing) -> Result<(), Stuck> {
        let mem = Arc::clone(mem);
        self.on_ring(ring, (), move |owner, direction| owner.relocate(direction, &mem, found))
    }

    /// Has the thread that runs `ring` do `job`; returns `nowhere` if none runs it.
    fn on_ring<R: Send + 'static>(
        &self,
        ring: usize,
        nowhere: R,
        job: impl FnOnce(&mut dyn RunsRings, Direction) -> R + Send + 'static,
    ) -> Result<R, Stuck> {
        match self.place(ring) {
            Place::Pair(pair, direction) => self.on_pair(pair, move |pair| job(pair, direction)),
            Place::Control => self.control.call(|control| job(control, Direction::Tx)),
            Place::Nowhere => Ok(nowhere),
        }
    }

    /// Detaches the device queues of pairs that pass no frames while others do: flows that the kernel steers to them
    /// would be lost. If no pair is in use, nothing is detached: frames wait for the guest to come back.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn detach_unused(&self) -> Result<(), Stuck> {
        let usages = self.pairs.iter().map(|pair| pair.call(|pair| pair.usage())).collect::<Result<Vec<_>, _>>()?;
        if !usages.iter().any(|usage| usage.in_use && usage.attached) {
            return Ok(());
        }
        let idle = self.pairs.iter().zip(usages).filter(|(_, usage)| usage.attached && !usage.in_use);
        // Each worker checks again: the control queue's thread may have put its pair to use meanwhile.
        idle.map(|(pair, _)| pair).try_for_each(|pair| pair.call(QueuePair::detach_if_unused))
    }

    /// Broadcasts a RARP request from `mac`, so that switches learn where the guest is now (RFC 903; vhost-user,
    /// `VHOST_USER_SEND_RARP`).
    ///
    /// # Errors
    /// [`NicError`].
    pub fn send_rarp(&self, mac: Mac) -> Result<(), NicError> {
        if let Some(link) = &self.link {
            // There is no switch to tell, but this is the address to send to from now on.
            link.learn(mac);
            return Ok(());
        }
        let mut frame = rarp::announcement(mac);
        self.on_pair(0, move |pair| pair.inject(&mut frame))?
            .map_err(|cause| NicError::Inject { name: self.device.get().name().to_owned(), cause })
    }

    /// Each queue pair's counters.
    pub fn counters(&self) -> &[Arc<PairCounters>] {
        &self.counters
    }

    /// Lines of counters for the log: one for each queue pair, one for the control queue if it is run here, one for the
    /// card.
    pub fn counter_lines(&self) -> impl Iterator<Item = String> {
        let pairs = self.counters.iter().enumerate().map(|(index, counters)| format!("pair={index} {counters}"));
        let control = self.setup.has_control_queue.then(|| {
            let counters = &self.control_counters;
            format!("control tx_calls={} broken_rings={}", counters.tx_calls.get(), counters.broken_rings.get())
        });
        pairs.chain(control).chain([self.card_counters.to_string()])
    }

    fn on_pair<R: Send + 'static>(
        &self,
        pair: usize,
        job: impl FnOnce(&mut QueuePair) -> R + Send + 'static,
    ) -> Result<R, Stuck> {
        let none = || Stuck { name: format!("pair-{pair}") };
        self.pairs.get(pair).ok_or_else(none)?.call(job)
    }
}

/// Binds the workers to `cpus`, in turn.
fn bind(pairs: &[Mailbox<QueuePair>], cpus: &[usize]) -> io::Result<()> {
    for (index, (pair, &cpu)) in pairs.iter().zip(cpus.iter().cycle()).enumerate() {
        let bound = pair.call(move |pair| pair.bind_to_cpu(cpu)).map_err(io::Error::other)?;
        bound.map_err(|cause| {
            let what = format!(
                "cannot bind the worker of queue pair {index} to CPU {cpu} (--cpu-affinity; 'taskset -cp $$' shows those \
                 that a process may use): {cause}"
            );
            io::Error::new(cause.kind(), what)
        })?;
    }
    Ok(())
}
