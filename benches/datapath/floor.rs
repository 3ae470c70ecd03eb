//! The bare loops: what the same frames cost where there is no virtqueue.
//!
//! One takes a system call for each frame, as most back-ends do. The other ([`Means::Batches`]) goes about it by the best
//! means that the kernel has: what it needs more than that is what a back-end's own work costs.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use crate::cases::Sample;
use crate::common::memory::GuestMemory;
use crate::common::netns::PacketSocket;
use crate::common::virtio::VnetHdr;
use crate::common::{fd_of, wait_readable};
use crate::guest::RING_SIZE;
use crate::place::{BACKEND_CPU, Contender, Means, PATIENCE, Place, TAP, bind_to, on_backend_cpu, thread_cpu};

/// Bytes of a receive buffer.
const BUFFER: usize = 1536;
/// Frames that go as one batch.
const BATCH: u32 = 64;
/// Datagrams that go as one frame: as many of 1,400 bytes as it holds.
pub const TOGETHER: u64 = 45;

/// Bytes of their Ethernet, IPv4 and UDP headers.
pub const HEADERS: usize = 42;

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
pub fn timed(act: impl FnOnce()) -> (Duration, Duration) {
    on_backend_cpu(|| {
        let (cpu, begun) = (thread_cpu(), Instant::now());
        act();
        (thread_cpu() - cpu, begun.elapsed())
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
    /// A batch in whose slots the frames are, and their lengths.
    Batches(Box<Batch>, Vec<usize>),
}

impl Sender {
    /// As many frames as the rings have, in such memory as a guest's: as many pages are gone through. `together` is
    /// [`TOGETHER`] of them as one, where that is possible.
    pub fn new(place: &Place, contender: &Contender, frames: &[Frame], together: Option<Frame>) -> Sender {
        let on = contender.on();
        let queue = place.floor(on);
        let frames = frames.iter().cycle().take(RING_SIZE.into());
        let frames = frames.map(|(header, frame)| (on.header(header), &frame[on.omitted()..]));
        let mem = GuestMemory::single(256 << 20);
        let way = match (contender, together) {
            (Contender::Floor(_, Means::Batches), Some((header, frame))) => {
                let calls = (0..u64::from(RING_SIZE) / TOGETHER).map(|_| {
                    let [header, frame] = in_two(&mem, &header.to_bytes(), &frame);
                    // As a guest has it: the first with the headers, the others' payloads apart.
                    let size = (frame.iov_len - HEADERS) / TOGETHER as usize;
                    let start = |at| if at == 0 { 0 } else { HEADERS + at * size };
                    let pieces = (0..TOGETHER as usize).map(|at| libc::iovec {
                        iov_base: frame.iov_base.cast::<u8>().wrapping_add(start(at)).cast(),
                        iov_len: start(at + 1) - start(at),
                    });
                    std::iter::once(header).chain(pieces).collect()
                });
                Way::Calls(calls.collect(), TOGETHER, mem)
            }
            (Contender::Floor(_, Means::Batches), None) => {
                let frames: Vec<_> = frames.map(|(header, frame)| [&header, frame].concat()).collect();
                let mut batch = Box::new(Batch::new(&queue, frames.len()));
                for (slot, frame) in frames.iter().enumerate() {
                    batch.slot(slot)[..frame.len()].copy_from_slice(frame);
                }
                Way::Batches(batch, frames.iter().map(Vec::len).collect())
            }
            _ => Way::Calls(frames.map(|(header, frame)| in_two(&mem, &header, frame).into()).collect(), 1, mem),
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
            Way::Batches(batch, lens) => {
                for at in 0..count {
                    batch.add(opcode::WriteFixed::CODE, self.next, lens[self.next]);
                    self.next = (self.next + 1) % lens.len();
                    if batch.waiting == BATCH as usize || at + 1 == count {
                        batch.submit();
                    }
                }
            }
        }
    }
}

/// The header and the frame behind it, each a piece.
fn in_two(mem: &GuestMemory, header: &[u8], frame: &[u8]) -> [libc::iovec; 2] {
    let at = mem.alloc(header.len() + frame.len(), 64);
    mem.write(at, &[header, frame].concat());
    [mem.iovec(at, header.len()), mem.iovec(at + header.len() as u64, frame.len())]
}

/// Takes frames off a device.
pub struct Receiver {
    queue: OwnedFd,
    header: libc::iovec,
    buffers: Vec<libc::iovec>,
    batch: Option<Batch>,
    _mem: GuestMemory,
}

impl Receiver {
    pub fn new(place: &Place, contender: &Contender) -> Receiver {
        let queue = place.floor(contender.on());
        // Buffers as a guest's: the header apart, and so many for a super-frame.
        let mem = GuestMemory::single(8 << 20);
        let buffers = (0..RING_SIZE).map(|_| mem.iovec(mem.alloc(BUFFER, 64), BUFFER)).collect();
        let header = mem.iovec(mem.alloc(VnetHdr::LEN, 64), contender.on().header_len());
        let batches = matches!(contender, Contender::Floor(_, Means::Batches));
        let batch = batches.then(|| Batch::new(&queue, BATCH as usize));
        Receiver { queue, header, buffers, batch, _mem: mem }
    }

    /// Takes `count` frames, each in so many buffers.
    pub fn receive(&mut self, count: u64, buffers: usize) {
        if let Some(batch) = &mut self.batch {
            for at in 0..count {
                batch.add(opcode::ReadFixed::CODE, batch.waiting, BUFFER);
                if batch.waiting == BATCH as usize || at + 1 == count {
                    batch.submit();
                }
            }
            return;
        }
        let mut iovecs = Vec::new();
        for frame in 0..count as usize {
            iovecs.clear();
            iovecs.push(self.header);
            let first = frame * buffers;
            iovecs.extend((first..first + buffers).map(|at| self.buffers[at % self.buffers.len()]));
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
        Batch { ring, memory, waiting: 0 }
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
        // SAFETY: the bytes are of `memory`, which is not touched until `submit` has seen the end.
        unsafe { self.ring.submission().push(&entry).expect("room for a batch") };
        self.waiting += 1;
    }

    /// Does what was added.
    fn submit(&mut self) {
        self.ring.submit_and_wait(self.waiting).expect("a batch is taken");
        let mut ended = 0;
        for completion in self.ring.completion() {
            assert!(completion.result() > 0, "{}", std::io::Error::from_raw_os_error(-completion.result()));
            ended += 1;
        }
        assert_eq!(ended, std::mem::take(&mut self.waiting), "all of a batch has ended");
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
