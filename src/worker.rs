//! The thread of one queue pair: waits for events, and lets `net` move frames.
//!
//! Ownership, not locks. A [`QueuePair`] is all that one thread owns: the device queue, and the rx and tx virtqueue
//! while they run. The control thread changes it through its [`Mailbox`], between two passes, and waits until that is
//! done: whatever a vhost-user message changed is in effect when the front-end gets its answer.
//!
//! One pass moves at most [`BUDGET`](crate::net::BUDGET) frames in each direction; then the thread looks for events, so
//! that neither direction, and no message, waits for the other. With nothing to do the thread sleeps, without a timeout
//! unless a ring has to be polled, or frames wait for buffers.
//!
//! Flags say whether there may be something to do: a ring's `can_run` (it may have entries), and those of `readiness`
//! for the device. A flag is cleared only after a look that found nothing, and only where an event is certain to come
//! then: the driver is asked for kicks, and after that the ring is looked at once more. While arrivals at the device
//! are not watched for, the worker checks now and then whether the device is still there: the kernel reports a TAP's
//! end as it reports an arrival.

mod orders;
mod readiness;

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::readiness::{ARRIVAL, DeviceReadiness};
use crate::busy_poll::Poller;
use crate::device::stage::UringPool;
use crate::device::{DeviceQueue, Io};
use crate::epoll::{EpollSet, Event, Wait};
use crate::mailbox::{Inbox, Mailbox, wait_for_host};
use crate::metrics::PairCounters;
use crate::net::Pump;
use crate::net::coalesce::Coalesce;
use crate::net::framing::Framing;
use crate::net::header::SegmentLimit;
use crate::net::rx::{Admission, HeldFrame, Rx};
use crate::net::tx::Tx;
use crate::notify::KickState;
use crate::running_ring::{Direction, RingMode, RunningRing};
use crate::throttle::Throttle;
use crate::tuning::Tuning;
use crate::virtqueue::RingBroken;

/// How long a job may wait for its turn. A pass takes well under a millisecond, or some tens of milliseconds if a guest
/// does its worst, with queues of the largest size.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a ring without a kick descriptor is polled (vhost-user, `VHOST_USER_SET_VRING_KICK`, bit 8).
pub(crate) const POLL_INTERVAL_MS: i32 = 1;

/// How often to check whether a device is still there while its arrivals are not watched for.
const DEAF_INTERVAL_MS: i32 = 1000;

/// Whether a pair passes frames, and whether the kernel gives it any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The pair passes frames.
    pub in_use: bool,
    /// The kernel spreads flows over its device queue.
    pub attached: bool,
}

/// What a worker has to know about its device, besides the queue.
pub struct Fitting {
    /// Which frames may go to it as one.
    pub coalesce: Coalesce,
    /// How frames are laid out there.
    pub framing: Framing,
    /// Signalled when the device seems to be gone.
    pub alarm: Arc<EventFd>,
}

/// All that one worker thread owns.
pub struct QueuePair {
    index: usize,
    device: DeviceQueue,
    counters: Arc<PairCounters>,
    epoll: EpollSet,
    rx: Option<(RunningRing, Rx)>,
    tx: Option<(RunningRing, Tx)>,
    /// Frames that were read for an rx ring that stopped, for the next one.
    left: Vec<HeldFrame>,
    io: Io,
    rings: UringPool,
    coalesce: Coalesce,
    framing: Framing,
    segment_limit: SegmentLimit,
    poller: Poller,
    admission: Admission,
    readiness: DeviceReadiness,
    /// Whether frames pass over the device; while not, the guest's frames are dropped.
    link_up: bool,
    /// Tells the control thread to check the device.
    alarm: Arc<EventFd>,
    /// Whether the driver may use this pair (`VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`).
    allowed: bool,
    throttle: Throttle,
}

/// Starts the thread of queue pair `index` on `device`.
///
/// # Errors
/// Where the kernel has no descriptor or thread for it.
pub fn spawn(
    index: usize,
    device: DeviceQueue,
    how: &Tuning,
    Fitting { coalesce, framing, alarm }: Fitting,
    counters: Arc<PairCounters>,
) -> io::Result<Mailbox<QueuePair>> {
    let epoll = EpollSet::new()?;
    epoll.add(&device, Event::Device, ARRIVAL)?;
    let pair = QueuePair {
        index,
        device,
        counters,
        epoll,
        rx: None,
        tx: None,
        left: Vec::new(),
        io: how.io,
        rings: UringPool::default(),
        coalesce,
        framing,
        segment_limit: how.segment_limit,
        poller: Poller::new(how.polling),
        admission: Admission::default(),
        readiness: DeviceReadiness::new(),
        link_up: true,
        alarm,
        allowed: true,
        throttle: Throttle::default(),
    };
    Mailbox::spawn(format!("pair-{index}"), PATIENCE, move |inbox| pair.run(&inbox))
}

/// What runs in the thread.
impl QueuePair {
    fn run(mut self, inbox: &Inbox<QueuePair>) {
        if let Err(e) = self.epoll.add_eventfd(inbox.wake(), Event::Mailbox) {
            return log::error!("Queue pair {}: cannot watch its mailbox: {e}", self.index);
        }
        while inbox.run_jobs(&mut self) {
            let wait = self.prepare_wait();
            let epoll = &mut self.epoll;
            let woken = match wait {
                Wait::Forever => self.poller.sleep(|| epoll.wait(wait)),
                Wait::No | Wait::Millis(_) => epoll.wait(wait),
            };
            let events = match woken {
                Ok(events) => events,
                Err(e) => return log::error!("Queue pair {}: cannot wait for events: {e}", self.index),
            };
            let mut is_quiet = true;
            for (event, on) in events {
                is_quiet = false;
                self.handle(event, on, inbox);
            }
            if is_quiet && self.readiness.is_deaf() && wait != Wait::No {
                self.watch_device();
            }
            self.readiness.end_retry();
            self.schedule_rings_without_kick();
            self.for_resting_rings(RunningRing::check_avail);
            // Before the device is read: attaching discards the frames that its queue holds from long ago.
            self.attach_if_used();
            if self.tx_ready() {
                self.pump_tx();
            }
            if self.rx_ready() {
                self.pump_rx();
            }
        }
    }

    /// Gets ready to wait, and returns how. With nothing to do, it lets other threads have the CPU, and looks again
    /// while that pays; then it asks for kicks, and attaches the device's queue if the last look found buffers.
    fn prepare_wait(&mut self) -> Wait {
        if self.tx_ready() || self.rx_ready() {
            self.poller.found_work();
            return Wait::No;
        }
        if self.poller.goes_on() {
            return Wait::No;
        }
        self.for_resting_rings(RunningRing::sleep);
        // Asking for kicks ends with a last look at the rings: no kick comes for buffers that it found.
        self.attach_if_used();
        self.allowed_wait()
    }

    /// Does `act` with each ring that had no entries and for whose next ones no kick would come.
    fn for_resting_rings(&mut self, act: impl Fn(&mut RunningRing) -> Result<(), RingBroken>) {
        for direction in [Direction::Rx, Direction::Tx] {
            let resting = self.ring(direction).filter(|ring| ring.is_resting());
            if let Some(Err(broken)) = resting.map(&act) {
                self.park(direction, &broken);
            }
        }
    }

    /// The longest wait after which nothing is missed.
    fn allowed_wait(&self) -> Wait {
        let rings = [self.rx.as_ref().map(|(ring, _)| ring), self.tx.as_ref().map(|(ring, _)| ring)];
        if self.tx_ready() || self.rx_ready() {
            Wait::No
        } else if self.readiness.has_retry() || rings.into_iter().flatten().any(RunningRing::has_no_kick) {
            Wait::Millis(POLL_INTERVAL_MS)
        } else if self.readiness.is_deaf() {
            Wait::Millis(DEAF_INTERVAL_MS)
        } else {
            Wait::Forever
        }
    }

    fn handle(&mut self, event: Event, on: EventSet, inbox: &Inbox<QueuePair>) {
        match event {
            Event::Mailbox => inbox.clear(),
            Event::Device => {
                if on.contains(EventSet::IN) && self.readiness.is_readable() && !self.rx_ready() {
                    // It was known that there are frames, and they have to wait: the guest has a better use for the
                    // CPU.
                    let changed = self.readiness.ignore_arrivals();
                    self.watch_device_if(changed);
                }
                self.readiness.set_readable();
                if on.intersects(EventSet::ERROR | EventSet::HANG_UP) {
                    self.raise_alarm();
                }
                if on.contains(EventSet::OUT) {
                    self.unblock();
                }
            }
            Event::RxKick => {
                self.counters.rx_kicks.add(1);
                self.kicked(Direction::Rx);
            }
            Event::TxKick => {
                self.counters.tx_kicks.add(1);
                self.kicked(Direction::Tx);
            }
            // Only the control queue's thread has this event.
            Event::ControlKick => {}
        }
    }

    fn kicked(&mut self, direction: Direction) {
        if self.ring(direction).map(RunningRing::kicked) == Some(KickState::Dead) {
            self.park(direction, &"its kick descriptor is dead");
        }
    }

    fn schedule_rings_without_kick(&mut self) {
        for direction in [Direction::Rx, Direction::Tx] {
            if let Some(ring) = self.ring(direction).filter(|ring| ring.has_no_kick()) {
                ring.schedule();
            }
        }
    }

    /// Whether tx has something to do. A detached device queue takes frames all the same.
    fn tx_ready(&self) -> bool {
        self.tx.as_ref().is_some_and(|(ring, _)| match ring.mode {
            RingMode::Waiting => false,
            RingMode::Enabled => ring.is_ready() && !(self.readiness.is_blocked() && self.passes()),
            RingMode::Disabled => ring.is_ready(),
        })
    }

    /// Whether there is a device over which frames pass.
    fn passes(&self) -> bool {
        self.link_up && !self.readiness.is_lost()
    }

    fn rx_ready(&self) -> bool {
        let takes = |ring: &RunningRing| ring.is_ready() && ring.mode == RingMode::Enabled;
        let may_read = self.readiness.is_readable() && !self.readiness.is_lost() && self.allowed;
        may_read && self.rx.as_ref().is_some_and(|(ring, _)| takes(ring))
    }

    /// One pass from the guest to the device.
    fn pump_tx(&mut self) {
        let passes = self.passes();
        let Some((ring, tx)) = &mut self.tx else { return };
        let passed = match ring.mode {
            RingMode::Disabled => tx.discard(&mut ring.queue, &self.counters.tx_drop_disabled),
            _ if !passes => tx.discard(&mut ring.queue, &self.counters.tx_drop_link_down),
            _ => tx.pump(&mut ring.queue, &self.device, &self.counters),
        };
        ring.publish(&self.counters.tx_calls);
        if let Some(source) = tx.take_unexpected_source() {
            self.device.warn_of_source(source);
        }
        if let Some(segments) = tx.take_too_many_segments() {
            warn_of_segments(self.index, segments, self.segment_limit);
        }
        if let Some((_, rx)) = &mut self.rx {
            for answer in tx.take_answers() {
                rx.answer(answer, &self.counters);
                // The answer goes out together with what the device has.
                self.readiness.set_readable();
            }
        }
        let settled = passed.and_then(|pump| match pump {
            Pump::Drained => settle(ring, &self.poller).map(|()| pump),
            _ => Ok(pump),
        });
        match settled {
            Ok(Pump::DeviceBlocked) => self.wait_until_writable(),
            Ok(Pump::DeviceLost) => self.lose_device(),
            Ok(Pump::Drained | Pump::NoBuffers | Pump::TryLater | Pump::BudgetSpent) => {}
            Err(broken) => self.park(Direction::Tx, &broken),
        }
    }

    /// One pass from the device to the guest.
    fn pump_rx(&mut self) {
        let Some((ring, rx)) = &mut self.rx else { return };
        let passed = rx.pump(&mut ring.queue, &self.device, &self.counters);
        ring.publish(&self.counters.rx_calls);
        let settled = passed.and_then(|pump| match pump {
            Pump::NoBuffers => settle(ring, &self.poller).map(|()| pump),
            _ => Ok(pump),
        });
        match settled {
            Ok(Pump::Drained) => self.wait_for_arrival(),
            Ok(Pump::TryLater) => {
                self.wait_for_arrival();
                self.readiness.look_again_soon();
            }
            Ok(Pump::DeviceLost) => self.lose_device(),
            Ok(Pump::NoBuffers | Pump::DeviceBlocked | Pump::BudgetSpent) => {}
            Err(broken) => self.park(Direction::Rx, &broken),
        }
    }

    /// Notes that the device has no frames. An event tells of the next one, even if it came since the last look.
    fn wait_for_arrival(&mut self) {
        let changed = self.readiness.found_empty();
        self.watch_device_if(changed);
    }

    /// Asks for an event once the device takes frames again.
    fn wait_until_writable(&mut self) {
        self.readiness.block();
        self.watch_device();
    }

    fn unblock(&mut self) {
        let changed = self.readiness.unblock();
        self.watch_device_if(changed);
    }

    fn watch_device_if(&mut self, changed: bool) {
        if changed {
            self.watch_device();
        }
    }

    /// Watches the device for what is of interest now; epoll reports again what is there already.
    fn watch_device(&mut self) {
        if let Err(e) = self.epoll.modify(&self.device, Event::Device, self.readiness.interest()) {
            log::error!("Queue pair {}: cannot watch the device: {e}", self.index);
            self.lose_device();
        }
    }

    /// Has the control thread check whether the device is still there.
    fn raise_alarm(&self) {
        // This fails only if the alarm was raised so often that nobody can have missed it.
        let _ = self.alarm.write(1);
    }

    /// Looks at the device after a change by which it may have become of interest; attaches its queue if that is in use
    /// now.
    fn reconsider_device(&mut self) {
        self.readiness.set_readable();
        self.attach_if_used();
    }

    /// Attaches the device's queue once the pair runs and its rx ring has buffers, whether a kick or a look found them:
    /// a flow that the kernel steers to a queue that the guest never fills would be lost.
    fn attach_if_used(&mut self) {
        let (Some((ring, rx)), Some(_)) = (&mut self.rx, &self.tx) else { return };
        if self.device.is_attached() || self.readiness.is_lost() || !self.allowed || !ring.passes() {
            return;
        }
        match ring.queue.has_entries() {
            Ok(has_more) if has_more || rx.has_buffers_in_hand() => {}
            Ok(_) => return,
            Err(broken) => return self.park(Direction::Rx, &broken),
        }
        let attached = wait_for_host(|| self.device.attach());
        if attached.is_ok() {
            self.readiness.set_readable();
        }
        self.log_steering("attach to", attached);
    }

    fn log_steering(&mut self, what: &str, done: io::Result<bool>) {
        if matches!(done, Ok(false)) || !self.throttle.allows() {
            return;
        }
        match done {
            Ok(_) => log::debug!("Queue pair {}: {what} the device", self.index),
            Err(e) => log::warn!("Queue pair {}: cannot {what} the device: {e}", self.index),
        }
    }

    fn ring(&mut self, direction: Direction) -> Option<&mut RunningRing> {
        ring_of(direction, &mut self.rx, &mut self.tx)
    }

    fn park(&mut self, direction: Direction, why: &dyn Display) {
        let ring = ring_of(direction, &mut self.rx, &mut self.tx);
        if let Some(ring) = ring {
            let why = format_args!("queue pair {}: {why}", self.index);
            ring.park(&self.epoll, &self.counters.broken_rings, &mut self.throttle, &why);
        }
    }
}

/// Warns of a dropped frame: the guest may have a use for such frames, so the operator should know.
fn warn_of_segments(index: usize, segments: usize, limit: SegmentLimit) {
    log::warn!(
        "Queue pair {index}: dropped a frame that is to be cut into {segments} segments; --max-segments allows {limit} \
         ({} at most). Others like it are counted as tx_drop_too_many_segments",
        SegmentLimit::MOST
    );
}

/// Asks a ring on which there is nothing to do for kicks: at once, or only after it was polled.
fn settle(ring: &mut RunningRing, poller: &Poller) -> Result<(), RingBroken> {
    if poller.is_on() {
        ring.rest();
        Ok(())
    } else {
        ring.sleep()
    }
}

/// One direction's ring. It is borrowed alone, so that the rest of the pair can be used along with it.
fn ring_of<'a>(
    direction: Direction,
    rx: &'a mut Option<(RunningRing, Rx)>,
    tx: &'a mut Option<(RunningRing, Tx)>,
) -> Option<&'a mut RunningRing> {
    match direction {
        Direction::Rx => rx.as_mut().map(|(ring, _)| ring),
        Direction::Tx => tx.as_mut().map(|(ring, _)| ring),
    }
}
