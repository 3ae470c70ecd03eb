//! The control queue's thread, for front-ends that hand the queue over: reads commands, carries them out, answers.
//!
//! It is a thread of its own because its commands reach into the workers of the queue pairs, and a worker never waits
//! for another thread: control thread → this thread → workers is the only order of waiting. `net::control` decides what
//! a command means.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::card_config::CardConfig;
use crate::device_slot::DeviceSlot;
use crate::epoll::{EpollSet, Event, Wait};
use crate::error_chain;
use crate::mac::Mac;
use crate::mailbox::{Inbox, Mailbox, wait_for_host};
use crate::memory::MemView;
use crate::metrics::PairCounters;
use crate::net::control::{ControlState, ERR, Effect, OK};
use crate::net::filter::RxFilter;
use crate::notify::KickState;
use crate::running_ring::{Direction, NotStarted, RingChange, RunningRing, RunsRings, StartRing, StoppedRing};
use crate::sandbox::syscalls::Role;
use crate::sandbox::{Sandbox, SandboxError};
use crate::throttle::Throttle;
use crate::virtqueue::iovec::IOV_MAX;
use crate::virtqueue::{GuestIovecs, RingBroken, Shape, SplitRing};
use crate::worker::{POLL_INTERVAL_MS, QueuePair};

/// How many commands are answered between two looks at the mailbox: each may have to wait for every worker.
const BUDGET: usize = 1;
/// How long the control thread waits for this one: longer than this one waits for a worker.
const PATIENCE: Duration = Duration::from_secs(15);
/// A longer command is refused: it would be a table of more than 170,000 addresses. A table with more addresses of a
/// kind than are kept lets all frames of that kind pass (VIRTIO 1.3, "Setting MAC Address Filtering"), but it has to be
/// read for that.
const COMMAND_MAX: usize = 1 << 20;

/// What the commands act on.
#[derive(Clone)]
pub struct Surroundings {
    /// The host's interface.
    pub device: Arc<DeviceSlot>,
    /// The queue pairs' workers.
    pub pairs: Arc<[Mailbox<QueuePair>]>,
    /// The configuration space, whose MAC address a command may change.
    pub config: Arc<CardConfig>,
}

/// All that the control queue's thread owns.
pub struct ControlQueue {
    around: Surroundings,
    state: ControlState,
    /// The state from before the last resets, until a ring starts.
    former: Option<ControlState>,
    ring: Option<(RunningRing, GuestIovecs)>,
    epoll: EpollSet,
    command: Vec<u8>,
    counters: Arc<PairCounters>,
    throttle: Throttle,
}

/// Starts the thread.
///
/// # Errors
/// Where the kernel has no descriptor or thread for it.
pub fn spawn(around: Surroundings, counters: Arc<PairCounters>) -> io::Result<Mailbox<ControlQueue>> {
    let queue = ControlQueue {
        around,
        state: ControlState::default(),
        former: None,
        ring: None,
        epoll: EpollSet::new()?,
        command: Vec::new(),
        counters,
        throttle: Throttle::default(),
    };
    Mailbox::spawn("control-queue".to_owned(), PATIENCE, move |inbox| queue.run(&inbox))
}

impl ControlQueue {
    /// Closes the sandbox around the thread.
    ///
    /// # Errors
    /// [`SandboxError`]; the process must not go on then.
    pub fn confine(&mut self, sandbox: Sandbox) -> Result<(), SandboxError> {
        sandbox.confine(Role::ControlQueue)
    }

    /// Begins anew for a guest that acknowledged `features`; returns the filter of frames until its first command.
    ///
    /// It may be the same guest, whose rings stopped for a while: the position at which its control ring starts shows
    /// that.
    pub fn reset(&mut self, features: u64, mac: Option<Mac>) -> Arc<RxFilter> {
        // 127 pairs at most.
        let state = ControlState::new(features, self.around.pairs.len() as u16, mac);
        let before = std::mem::replace(&mut self.state, state);
        self.former.get_or_insert(before);
        self.state.filter()
    }

    /// Forgets what the guest of an earlier front-end set: the next guest is another one, or has gone on without us.
    pub fn forget(&mut self) {
        (self.state, self.former) = (ControlState::default(), None);
    }

    /// Restores what the driver set before, if it goes on where it was, and puts the state into effect.
    fn begin(&mut self, former: ControlState, goes_on: bool) {
        if goes_on {
            log::debug!("Control queue: the driver goes on where it was");
            self.state = std::mem::take(&mut self.state).resumed(former);
        }
        let effects: Vec<_> = self.state.effects().collect();
        for effect in effects {
            self.carry_out(effect);
        }
    }
}

/// The one ring of the control queue, run for the control thread through the mailbox.
impl RunsRings for ControlQueue {
    fn start(&mut self, _: Direction, start: StartRing) -> Result<(), NotStarted> {
        let iovecs = GuestIovecs::new(Arc::clone(start.queue.mem()), IOV_MAX + 1);
        // A driver that was reset begins with the first entry.
        let goes_on = start.queue.position() != 0;
        self.ring = Some((RunningRing::start(start, &self.epoll, Event::ControlKick)?, iovecs));
        if let Some(former) = self.former.take() {
            self.begin(former, goes_on);
        }
        Ok(())
    }

    fn stop(&mut self, _: Direction) -> Option<StoppedRing> {
        self.ring.take().map(|(ring, _)| ring.stop(&self.epoll))
    }

    fn abandon(&mut self, direction: Direction) -> Option<StoppedRing> {
        self.counters.broken_rings.add(1);
        self.stop(direction)
    }

    fn change(&mut self, _: Direction, change: RingChange) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), |(ring, _)| ring.change(change, &self.epoll))
    }

    fn relocate(&mut self, _: Direction, mem: &Arc<MemView>, found: SplitRing) {
        if let Some((ring, iovecs)) = &mut self.ring {
            *iovecs = GuestIovecs::new(Arc::clone(mem), IOV_MAX + 1);
            ring.queue.relocate(found, Arc::clone(mem));
        }
    }
}

/// What runs in the thread.
impl ControlQueue {
    fn run(mut self, inbox: &Inbox<ControlQueue>) {
        if let Err(e) = self.epoll.add_eventfd(inbox.wake(), Event::Mailbox) {
            return log::error!("Control queue: cannot watch its mailbox: {e}");
        }
        while inbox.run_jobs(&mut self) {
            let wait = self.wait();
            let events = match self.epoll.wait(wait) {
                Ok(events) => events,
                Err(e) => return log::error!("Control queue: cannot wait for events: {e}"),
            };
            for (event, _) in events {
                match event {
                    Event::Mailbox => inbox.clear(),
                    _ => self.kicked(),
                }
            }
            if let Some((ring, _)) = self.ring.as_mut().filter(|(ring, _)| ring.has_no_kick()) {
                ring.schedule();
            }
            if self.is_ready() {
                self.pass();
            }
        }
    }

    fn is_ready(&self) -> bool {
        // Nothing is discarded on this queue: a disabled ring waits like one that was never enabled.
        self.ring.as_ref().is_some_and(|(ring, _)| ring.is_ready() && ring.passes())
    }

    fn wait(&self) -> Wait {
        if self.is_ready() {
            Wait::No
        } else if self.ring.as_ref().is_some_and(|(ring, _)| ring.has_no_kick()) {
            Wait::Millis(POLL_INTERVAL_MS)
        } else {
            Wait::Forever
        }
    }

    fn kicked(&mut self) {
        if self.ring.as_mut().map(|(ring, _)| ring.kicked()) == Some(KickState::Dead) {
            self.park(&"its kick descriptor is dead");
        }
    }

    fn pass(&mut self) {
        let passed = self.answer_commands();
        let Some((ring, _)) = &mut self.ring else { return };
        ring.publish(&self.counters.tx_calls);
        let settled = passed.and_then(|more| if more { Ok(()) } else { ring.sleep() });
        if let Err(broken) = settled {
            self.park(&broken);
        }
    }

    /// Answers up to [`BUDGET`] commands; returns whether there may be more.
    fn answer_commands(&mut self) -> Result<bool, RingBroken> {
        for _ in 0..BUDGET {
            let Some((ring, iovecs)) = &mut self.ring else { return Ok(false) };
            iovecs.truncate(0);
            let Some(popped) = ring.queue.pop(iovecs)? else { return Ok(false) };
            let written = popped.chain.map_or(0, |chain| self.answer(chain));
            if let Some((ring, _)) = &mut self.ring {
                ring.queue.push_used(popped.head, written);
            }
        }
        Ok(true)
    }

    /// Carries out the command of one chain and writes its status; returns the bytes written.
    fn answer(&mut self, chain: Shape) -> u32 {
        let Some((_, iovecs)) = &self.ring else { return 0 };
        if chain.writable_len == 0 {
            return 0;
        }
        let len = chain.readable_len;
        let mut command = std::mem::take(&mut self.command);
        let kept = len.min(COMMAND_MAX);
        if command.capacity() < kept {
            // To grow the old one, the allocator may use a system call that the sandbox forbids.
            command = Vec::with_capacity(kept);
        }
        command.resize(kept, 0);
        iovecs.copy_to(chain.readable(), 0, &mut command);
        // The device may be another one than at the last command.
        self.state.restrict_address(self.around.device.mac());
        let effect = if len > COMMAND_MAX { None } else { self.state.command(&command) };
        self.command = command;
        let status = if effect.is_some_and(|effect| self.carry_out(effect)) { OK } else { ERR };
        if let Some((_, iovecs)) = &self.ring {
            iovecs.copy_from(chain.writable(), 0, &[status]);
        }
        1
    }

    /// Carries out an effect; returns whether it took place.
    fn carry_out(&mut self, effect: Effect) -> bool {
        log::debug!("Control queue: {}", effect.name());
        match effect {
            Effect::None => true,
            Effect::Filter(filter) => self.tell_pairs(move |_, pair| pair.set_filter(Arc::clone(&filter))),
            Effect::QueuePairs(count) => self.tell_pairs(move |index, pair| {
                pair.set_allowed(index < usize::from(count));
            }),
            Effect::Mac(mac) => {
                self.around.config.set_mac(mac);
                let filter = self.state.filter();
                self.tell_pairs(move |_, pair| pair.set_filter(Arc::clone(&filter)))
            }
            Effect::Offloads(offloads) => match wait_for_host(|| self.around.device.set_offloads(offloads)) {
                Ok(()) => self.tell_pairs(move |_, pair| pair.set_offloads(offloads)),
                Err(refused) => {
                    if self.throttle.allows() {
                        log::error!("{}", error_chain(&refused));
                    }
                    false
                }
            },
        }
    }

    /// Has every worker do `job`; returns whether all did.
    fn tell_pairs(&self, job: impl Fn(usize, &mut QueuePair) + Clone + Send + 'static) -> bool {
        let mut done = true;
        for (index, pair) in self.around.pairs.iter().enumerate() {
            let job = job.clone();
            if let Err(stuck) = pair.call(move |pair| job(index, pair)) {
                log::error!("{stuck}");
                done = false;
            }
        }
        done
    }

    fn park(&mut self, why: &dyn Display) {
        if let Some((ring, _)) = &mut self.ring {
            ring.park(&self.epoll, &self.counters.broken_rings, &mut self.throttle, why);
        }
    }
}
