//! The bare loops: what the same frames cost where there is no virtqueue.
//!
//! One takes a system call for each frame, as most back-ends do. Another ([`Means::Batches`]) goes about it by the best
//! means that the kernel has. The third ([`Means::Copies`]) does that under the conditions of a back-end: the frames are in
//! memory that the kernel does not know, and a driver wakes now and then on the other CPU. What a back-end needs more than
//! that is for its rings and its care.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use crate::cases::Sample;
use crate::common::memory::GuestMemory;
use crate::common::netns::PacketSocket;
use crate::common::virtio::VnetHdr;
use crate::common::{fd_of, wait_readable};
use crate::guest::{RING_SIZE, RX_BUFFER, rest};
use crate::place::{
    BACKEND_CPU, Contender, DRIVER_CPU, Means, PATIENCE, Place, TAP, bind_to, on_backend_cpu, thread_cpu,
};

/// Frames that go as one batch.
const BATCH: u32 = 64;
/// Datagrams that go as one frame: as many of 1,400 bytes as it holds.
pub const TOGETHER: u64 = 45;

/// Bytes of their Ethernet, IPv4 and UDP headers.
pub const HEADERS: usize = 42;

/// Bytes of a large frame that a back-end looks at, and sends as it saw them: with all headers that there can be.
const START: usize = 204;

/// A frame as the guest has it.
pub type Frame = (VnetHdr, Vec<u8>);

type Vectored = unsafe extern "C" fn(i32, *const libc::iovec, i32) -> isize;

/// One frame by one system call.
fn vectored(fd: &impl AsFd, iovecs: &[libc::iovec], call: Vectored) {
    // SAFETY: the iovecs are in guest memory that the caller keeps mapped, or in buffers that it borrows meanwhile.
    let len = unsafe { call(fd.as_fd().as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) };
    assert!(len > 0, "{}", std::io::Error::last_os_error());
}

/// Processor time of this thread, and time, that `act` takes on the back-ends' CPU.
pub fn timed(contender: &Contender, act: impl FnOnce()) -> (Duration, Duration) {
    let act = || {
        on_backend_cpu(|| {
            let (cpu, begun) = (thread_cpu(), Instant::now());
            act();
            (thread_cpu() - cpu, begun.elapsed())
        })
    };
    if contender.means() == Some(Means::Copies) { beside_a_driver(act) } else { act() }
}

/// Does `act` while another thread rests and wakes on the driver's CPU, as a driver does.
fn beside_a_driver<R>(act: impl FnOnce() -> R) -> R {
    let has_ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bind_to(DRIVER_CPU);
            while !has_ended.load(Ordering::Relaxed) {
                rest();
            }
        });
        let result = act();
        has_ended.store(true, Ordering::Relaxed);
        result
    })
}

/// Sends frames in turn.
pub struct Sender {
    queue: OwnedFd,
    way: Way,
    next: usize,
}

enum Way {
    /// The iovecs of each call, and how many frames those are; and the memory that they are in.
    Calls(Vec<Vec<libc::iovec>>, u64, #[expect(dead_code, reason = "kept mapped")] GuestMemory),
    /// Frames, each in a slot of the batch.
    Batches(Box<Batch>, Vec<Vec<u8>>),
    /// Frames that are copied to the next slot.
    Copies(Box<Batch>, Vec<Vec<u8>>),
}

impl Sender {
    /// As many frames as the rings have, each in one piece of such memory as a guest's: as many pages are gone through.
    /// `together` is [`TOGETHER`] of them as one, where that is possible.
    pub fn new(place: &Place, contender: &Contender, frames: &[Frame], together: Option<Frame>) -> Sender {
        let on = contender.on();
        let queue = place.floor(on);
        let means = contender.means();
        let frames = frames.iter().cycle().take(RING_SIZE.into());
        let frames: Vec<_> =
            frames.map(|(header, frame)| [&on.header(header), &frame[on.omitted()..]].concat()).collect();
        let mem = GuestMemory::single(256 << 20);
        let way = match (means, together) {
            (Some(Means::Batches), Some((header, frame))) => {
                let frame = [&header.to_bytes()[..], &frame].concat();
                // As a guest has it: the first with the headers, the others' payloads apart.
                let headers = VnetHdr::LEN + HEADERS;
                let size = (frame.len() - headers) / TOGETHER as usize;
                let start = |at| if at == 0 { 0 } else { headers + at * size };
                let calls = (0..u64::from(RING_SIZE) / TOGETHER).map(|_| {
                    let at = in_memory(&mem, &frame);
                    let piece = |index| mem.iovec(at + start(index) as u64, start(index + 1) - start(index));
                    (0..TOGETHER as usize).map(piece).collect()
                });
                Way::Calls(calls.collect(), TOGETHER, mem)
            }
            (Some(Means::Batches), None) => {
                let mut batch = Box::new(Batch::new(&queue, frames.len()));
                for (slot, frame) in frames.iter().enumerate() {
                    batch.slot(slot)[..frame.len()].copy_from_slice(frame);
                }
                Way::Batches(batch, frames)
            }
            (Some(Means::Copies), _) => Way::Copies(Box::new(Batch::new(&queue, BATCH as usize)), frames),
            _ => {
                let call = |frame: &Vec<u8>| {
                    let at = in_memory(&mem, frame);
                    // A back-end has the checked start of a large one apart.
                    let start = if frame.len() > RX_BUFFER { START } else { 0 };
                    let pieces =
                        [(0, start), (start, frame.len())].map(|(from, to)| mem.iovec(at + from as u64, to - from));
                    pieces.into_iter().filter(|piece| piece.iov_len > 0).collect()
                };
                Way::Calls(frames.iter().map(call).collect(), 1, mem)
            }
        };
        Sender { queue, way, next: 0 }
    }

    /// Sends so many frames; of those that go together, so many of them.
    pub fn send(&mut self, count: u64) {
        match &mut self.way {
            Way::Calls(calls, frames, _) => {
                for _ in 0..count / *frames {
                    vectored(&self.queue, &calls[self.next], libc::writev);
                    self.next = (self.next + 1) % calls.len();
                }
            }
            Way::Batches(batch, frames) => {
                for at in 0..count {
                    batch.add(opcode::WriteFixed::CODE, self.next, frames[self.next].len());
                    self.next = (self.next + 1) % frames.len();
                    batch.submit_if_full(at + 1 == count);
                }
            }
            Way::Copies(batch, frames) => {
                for at in 0..count {
                    let (slot, frame) = (batch.waiting, &frames[self.next]);
                    batch.slot(slot)[..frame.len()].copy_from_slice(frame);
                    batch.add(opcode::WriteFixed::CODE, slot, frame.len());
                    self.next = (self.next + 1) % frames.len();
                    batch.submit_if_full(at + 1 == count);
                }
            }
        }
    }
}

/// Where it is.
fn in_memory(mem: &GuestMemory, frame: &[u8]) -> u64 {
    let at = mem.alloc(frame.len(), 64);
    mem.write(at, frame);
    at
}

/// Takes frames off a device.
pub struct Receiver {
    queue: OwnedFd,
    means: Means,
    batch: Option<Batch>,
    /// As a guest's: so many for a super-frame.
    buffers: Vec<libc::iovec>,
    header: libc::iovec,
    /// Where the frames of batches are copied to.
    copies: Vec<[u8; RX_BUFFER]>,
    /// The next of these.
    next: usize,
    _mem: GuestMemory,
}

impl Receiver {
    pub fn new(place: &Place, contender: &Contender) -> Receiver {
        let queue = place.floor(contender.on());
        let means = contender.means().unwrap_or(Means::Calls);
        let mem = GuestMemory::single(8 << 20);
        let buffers = (0..RING_SIZE).map(|_| mem.iovec(mem.alloc(RX_BUFFER, 64), RX_BUFFER)).collect();
        let header = mem.iovec(mem.alloc(VnetHdr::LEN, 64), VnetHdr::LEN);
        let batch = (means != Means::Calls).then(|| Batch::new(&queue, BATCH as usize));
        Receiver {
            queue,
            means,
            batch,
            buffers,
            header,
            copies: vec![[0; RX_BUFFER]; RING_SIZE.into()],
            next: 0,
            _mem: mem,
        }
    }

    /// Takes `count` frames, each in so many buffers.
    pub fn receive(&mut self, count: u64, buffers: usize) {
        let Some(batch) = &mut self.batch else { return self.receive_singly(count, buffers) };
        for at in 0..count {
            batch.add(opcode::ReadFixed::CODE, batch.waiting, RX_BUFFER);
            let came = batch.submit_if_full(at + 1 == count);
            if self.means == Means::Batches {
                continue;
            }
            for slot in 0..came {
                let len = batch.lens[slot];
                self.copies[self.next][..len].copy_from_slice(&batch.slot(slot)[..len]);
                self.next = (self.next + 1) % self.copies.len();
            }
        }
    }

    fn receive_singly(&self, count: u64, buffers: usize) {
        let mut iovecs = Vec::new();
        for frame in 0..count as usize {
            iovecs.clear();
            let first = frame * buffers;
            iovecs.extend((first..first + buffers).map(|at| self.buffers[at % self.buffers.len()]));
            if buffers > 1 {
                // A back-end has the header of a large one apart, to look at it before the guest does.
                let piece = &mut iovecs[0];
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(VnetHdr::LEN).cast();
                piece.iov_len -= VnetHdr::LEN;
                iovecs.insert(0, self.header);
            }
            vectored(&self.queue, &iovecs, libc::readv);
        }
    }
}

/// Frames that are written or read together, from or to memory that the kernel knows.
struct Batch {
    /// Goes before the memory does.
    ring: IoUring,
    memory: Box<[u8]>,
    waiting: usize,
    /// Bytes that were moved, of each of the last batch.
    lens: Vec<usize>,
}

/// Bytes of a slot, each a frame's.
const SLOT: usize = 2048;

impl Batch {
    fn new(device: &OwnedFd, slots: usize) -> Batch {
        let ring = IoUring::builder().setup_single_issuer().build(BATCH).expect("io_uring");
        let mut memory = vec![0; slots * SLOT].into_boxed_slice();
        let whole = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
        ring.submitter().register_files(&[device.as_raw_fd()]).expect("a file");
        // SAFETY: the memory lives as long as the ring.
        unsafe { ring.submitter().register_buffers(&[whole]).expect("memory that may be locked") };
        Batch { ring, memory, waiting: 0, lens: vec![0; BATCH as usize] }
    }

    fn slot(&mut self, slot: usize) -> &mut [u8] {
        &mut self.memory[slot * SLOT..][..SLOT]
    }

    /// Adds the transfer of the first `len` bytes of a slot.
    fn add(&mut self, code: u8, slot: usize, len: usize) {
        let (device, start) = (types::Fixed(0), self.slot(slot)[..len].as_mut_ptr());
        let entry = if code == opcode::ReadFixed::CODE {
            opcode::ReadFixed::new(device, start, len as u32, 0).rw_flags(libc::RWF_NOWAIT).build()
        } else {
            opcode::WriteFixed::new(device, start, len as u32, 0).rw_flags(libc::RWF_NOWAIT).build()
        };
        let entry = entry.user_data(self.waiting as u64);
        // SAFETY: the bytes are of `memory`, which is not touched until `submit` has seen the end.
        unsafe { self.ring.submission().push(&entry).expect("room for a batch") };
        self.waiting += 1;
    }

    /// Does what was added if it is a batch, or the last. Tells how many that were.
    fn submit_if_full(&mut self, is_last: bool) -> usize {
        if self.waiting < BATCH as usize && !is_last {
            return 0;
        }
        self.ring.submit_and_wait(self.waiting).expect("a batch is taken");
        let mut ended = 0;
        for completion in self.ring.completion() {
            assert!(completion.result() > 0, "{}", std::io::Error::from_raw_os_error(-completion.result()));
            self.lens[completion.user_data() as usize] = completion.result() as usize;
            ended += 1;
        }
        assert_eq!(ended, std::mem::take(&mut self.waiting), "all of a batch has ended");
        ended
    }
}

/// A frame there and back at a time, `count` times: an eventfd for the kick, one for the call, a thread that reads and
/// writes the TAP.
pub fn ping_pong(place: &Place, contender: &Contender, there: &Frame, back: &[u8], count: u64) -> Sample {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
    let tap = place.floor(contender.on());
    let host = PacketSocket::open(&place.namespace, TAP);
    let frame = [&there.0.to_bytes()[..], &there.1].concat();
    let (kick, call) =
        (EventFd::new(EFD_NONBLOCK).expect("an eventfd"), EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let (kick_fd, call_fd) = (fd_of(&kick), fd_of(&call));
    let mut trips = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bind_to(BACKEND_CPU);
            let mut room = [0; 2048];
            for _ in 0..count {
                assert!(wait_readable(kick_fd, PATIENCE));
                let _ = kick.read();
                rustix::io::write(&tap, &frame).expect("the TAP takes it");
                assert!(wait_readable(&tap, PATIENCE));
                rustix::io::read(&tap, &mut room).expect("a frame");
                call.write(1).expect("an eventfd");
            }
        });
        for _ in 0..count {
            let begun = Instant::now();
            kick.write(1).expect("an eventfd");
            host.recv(PATIENCE).expect("a frame on the host");
            host.send(back);
            assert!(wait_readable(call_fd, PATIENCE));
            let _ = call.read();
            trips.push(begun.elapsed().as_nanos() as u64);
        }
    });
    Sample::of_trips(trips)
}
