//! The jobs that the control threads may give a worker through its mailbox; it runs them between two passes.

use std::io;
use std::sync::Arc;

use rustix::thread::{CpuSet, sched_setaffinity};

use super::readiness::{ARRIVAL, DeviceReadiness};
use super::{QueuePair, Usage, ring_of};
use crate::device::stage::why_no_uring;
use crate::device::{DeviceQueue, Io};
use crate::epoll::Event;
use crate::mailbox::wait_for_host;
use crate::memory::MemView;
use crate::net::Uplink;
use crate::net::features::GuestOffloads;
use crate::net::filter::RxFilter;
use crate::net::rx::Rx;
use crate::net::tx::Tx;
use crate::running_ring::{Direction, NotStarted, RingChange, RunningRing, RunsRings, StartRing, StoppedRing};
use crate::sandbox::syscalls::Role;
use crate::sandbox::{Level, Sandbox, SandboxError};
use crate::virtqueue::SplitRing;

/// The pair's rings, run for the control thread through the mailbox.
impl RunsRings for QueuePair {
    fn start(&mut self, direction: Direction, start: StartRing) -> Result<(), NotStarted> {
        let (mem, features) = (Arc::clone(start.queue.mem()), start.features);
        drop(self.stop(direction));
        match direction {
            Direction::Rx => {
                let ring = RunningRing::start(start, &self.epoll, Event::RxKick)?;
                let left = std::mem::take(&mut self.left);
                self.rx = Some((ring, Rx::new(mem, features, self.admission.clone(), &self.uplink(), left)));
            }
            Direction::Tx => {
                let ring = RunningRing::start(start, &self.epoll, Event::TxKick)?;
                self.tx = Some((ring, Tx::new(mem, features, &self.uplink())));
            }
        }
        self.reconsider_device();
        Ok(())
    }

    fn stop(&mut self, direction: Direction) -> Option<StoppedRing> {
        let ring = match direction {
            Direction::Rx => self.rx.take().map(|(ring, rx)| {
                self.left = rx.into_held_frames();
                ring
            }),
            Direction::Tx => self.tx.take().map(|(ring, _)| ring),
        }?;
        Some(ring.stop(&self.epoll))
    }

    fn abandon(&mut self, direction: Direction) -> Option<StoppedRing> {
        self.counters.broken_rings.add(1);
        self.stop(direction)
    }

    fn change(&mut self, direction: Direction, change: RingChange) -> io::Result<()> {
        let ring = ring_of(direction, &mut self.rx, &mut self.tx);
        let changed = ring.map_or(Ok(()), |ring| ring.change(change, &self.epoll));
        self.reconsider_device();
        changed
    }

    fn relocate(&mut self, direction: Direction, mem: &Arc<MemView>, found: SplitRing) {
        match (direction, &mut self.rx, &mut self.tx) {
            (Direction::Rx, Some((ring, rx)), _) => {
                rx.relocate(&mut ring.queue, Arc::clone(mem));
                ring.queue.relocate(found, Arc::clone(mem));
            }
            (Direction::Tx, _, Some((ring, tx))) => {
                tx.relocate(Arc::clone(mem));
                ring.queue.relocate(found, Arc::clone(mem));
            }
            _ => {}
        }
    }
}

/// The other jobs that the control threads may give, through the mailbox.
impl QueuePair {
    /// Closes the sandbox around the thread.
    ///
    /// # Errors
    /// [`SandboxError`]; the process must not go on then.
    pub fn confine(&mut self, sandbox: Sandbox) -> Result<(), SandboxError> {
        if sandbox.level() == Level::Off {
            return Ok(());
        }
        let is_packet_socket = self.device.is_packet_socket();
        if !is_packet_socket
            && self.io != Io::Syscall
            && let Err(error) = self.rings.seal()
        {
            let (index, hint) = (self.index, why_no_uring(&error));
            log::warn!("Queue pair {index}: no io_uring, each frame takes a system call{hint}: {error}");
            self.io = Io::Syscall;
        }
        sandbox.confine(if is_packet_socket { Role::PacketWorker } else { Role::TapWorker })
    }

    /// Binds the thread to one CPU.
    ///
    /// # Errors
    /// What `sched_setaffinity(2)` says: `EINVAL` where this process has no such CPU.
    pub fn bind_to_cpu(&mut self, cpu: usize) -> io::Result<()> {
        let mut cpus = CpuSet::new();
        if cpu >= CpuSet::MAX_CPU {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        cpus.set(cpu);
        Ok(sched_setaffinity(None, &cpus)?)
    }

    /// Changes which frames reach the guest.
    pub fn set_filter(&mut self, filter: Arc<RxFilter>) {
        self.admission.filter = filter;
        self.admit();
    }

    /// Changes which unfinished frames the guest takes.
    pub fn set_offloads(&mut self, offloads: GuestOffloads) {
        self.admission.offloads = offloads;
        self.admit();
    }

    fn admit(&mut self) {
        if let Some((ring, rx)) = &mut self.rx {
            rx.set_admission(self.admission.clone());
            // A frame that waits for buffers may not be for the guest any more.
            ring.schedule();
        }
    }

    /// Sets whether the driver may use this pair. If it may not, the kernel gives the pair no frames, and frames that
    /// wait for its buffers are discarded, as they would be old once it may. Those of a ring that stopped stay: it may be
    /// the same driver whose ring goes on.
    pub fn set_allowed(&mut self, allowed: bool) {
        self.allowed = allowed;
        if allowed {
            return self.reconsider_device();
        }
        self.detach();
        if let Some((ring, rx)) = &mut self.rx {
            rx.discard(&self.counters);
            // Buffers that were too few for a discarded frame may be enough for the next.
            ring.schedule();
        }
    }

    /// Whether this pair passes frames, and whether the kernel gives it any.
    pub fn usage(&self) -> Usage {
        let in_use = self.allowed && self.rx.as_ref().is_some_and(|(ring, _)| ring.passes());
        Usage { in_use, attached: self.device.is_attached() }
    }

    /// Detaches the device's queue unless the pair passes frames.
    pub fn detach_if_unused(&mut self) {
        if !self.usage().in_use {
            self.detach();
        }
    }

    /// Detaches the device's queue: the kernel gives it no frames any more.
    fn detach(&mut self) {
        let detached = wait_for_host(|| self.device.detach());
        self.log_steering("detach from", detached);
    }

    /// Stops passing frames, as the device is gone. The guest's frames are dropped from now on.
    pub fn lose_device(&mut self) {
        if self.readiness.lose() {
            log::debug!("Queue pair {}: the device is gone", self.index);
            self.raise_alarm();
        }
    }

    /// Goes on with another device queue of the same kind.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says; the pair goes on without a device then.
    pub fn replace_device(&mut self, device: DeviceQueue) -> io::Result<()> {
        self.epoll.add(&device, Event::Device, ARRIVAL)?;
        let gone = std::mem::replace(&mut self.device, device);
        self.epoll.remove(&gone)?;
        self.readiness = DeviceReadiness::new();
        // The memory of their batches belongs to the former queue.
        if let Some((mut ring, mut rx)) = self.rx.take() {
            let mem = Arc::clone(ring.queue.mem());
            rx.relocate(&mut ring.queue, Arc::clone(&mem));
            let left = rx.into_held_frames();
            let rx = Rx::new(mem, ring.features, self.admission.clone(), &self.uplink(), left);
            self.rx = Some((ring, rx));
        }
        if let Some((ring, _)) = self.tx.take() {
            let tx = Tx::new(Arc::clone(ring.queue.mem()), ring.features, &self.uplink());
            self.tx = Some((ring, tx));
        }
        for direction in [Direction::Rx, Direction::Tx] {
            self.ring(direction).into_iter().for_each(|ring| ring.schedule());
        }
        self.reconsider_device();
        Ok(())
    }

    /// Sets whether frames pass over the device; while not, the guest's frames are dropped.
    pub fn set_link(&mut self, up: bool) {
        self.link_up = up;
        self.unblock();
        self.reconsider_device();
    }

    fn uplink(&self) -> Uplink<'_> {
        Uplink {
            device: &self.device,
            io: self.io,
            rings: &self.rings,
            coalesce: self.coalesce,
            framing: &self.framing,
            segment_limit: self.segment_limit,
        }
    }

    /// Sends a frame of ours, with its virtio-net header, to the device.
    ///
    /// # Errors
    /// What `write(2)` says.
    pub fn inject(&mut self, frame: &mut [u8]) -> io::Result<()> {
        self.framing.cut(frame);
        let taken = frame.get(self.framing.omitted()..).unwrap_or_default();
        rustix::io::write(&self.device, taken).map(drop).map_err(io::Error::from)
    }
}
