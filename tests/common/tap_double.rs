//! A SEQPACKET socket pair in the place of a TAP queue.
//!
//! What it shares with a TAP: one read or write is one frame with its virtio-net header in front, a read
//! into too little room truncates in silence, reads and writes say `EAGAIN` and `poll` tells when to come
//! back. What it does not: it has no offloads to set, it judges no header, and after it was full it reports
//! itself writable only once it is mostly empty.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use rustix::net::{recv, send, socketpair};

use super::virtio::VnetHdr;
use super::{PATIENCE, wait_for, wait_readable};

/// Largest frame with its header that a kernel device hands over or takes.
pub const LARGEST_FRAME: usize = 65_562 + VnetHdr::LEN;

/// The host side of the double. The back-end has the other end.
pub struct TapDouble {
    host: OwnedFd,
    /// The back-end's end once more, to fill it up.
    device: OwnedFd,
}

impl TapDouble {
    /// Makes the double, and the (non-blocking) end that the back-end takes for its TAP queue.
    pub fn new() -> (Self, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (host, device) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        // Room for several of the largest frames each way, as a TAP's queue has.
        for end in [&host, &device] {
            sockopt::set_socket_send_buffer_size(end, 1 << 20).unwrap();
        }
        let given = device.try_clone().unwrap();
        (Self { host, device }, given)
    }

    /// Once more the back-end's end, for another process or a second life of one.
    pub fn device_fd(&self) -> OwnedFd {
        self.device.try_clone().unwrap()
    }

    /// The host's end, to wait on together with other things.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.host.as_fd()
    }

    /// The next frame that left the guest.
    pub fn recv(&self, timeout: Duration) -> Option<(VnetHdr, Vec<u8>)> {
        let bytes = self.recv_raw(timeout)?;
        let frame = bytes[VnetHdr::LEN..].to_vec();
        Some((VnetHdr::from_bytes(&bytes), frame))
    }

    /// The next thing that the back-end wrote, however short.
    pub fn recv_raw(&self, timeout: Duration) -> Option<Vec<u8>> {
        if !wait_readable(&self.host, timeout) {
            return None;
        }
        let mut bytes = vec![0; LARGEST_FRAME + 1];
        let (len, _) = recv(&self.host, &mut bytes[..], RecvFlags::empty()).unwrap();
        bytes.truncate(len);
        Some(bytes)
    }

    /// Sends a frame towards the guest; waits while the back-end has not made room.
    pub fn send(&self, header: &VnetHdr, frame: &[u8]) {
        self.send_raw(&[&header.to_bytes()[..], frame].concat());
    }

    /// Sends anything towards the guest as one frame.
    pub fn send_raw(&self, bytes: &[u8]) {
        while !self.try_send_raw(bytes).unwrap() {
            assert!(wait_for(&self.host, PollFlags::OUT, PATIENCE), "The back-end does not read its TAP");
        }
    }

    /// Sends anything towards the guest; false when the queue is full.
    pub fn try_send_raw(&self, bytes: &[u8]) -> io::Result<bool> {
        try_send(&self.host, bytes)
    }

    /// Makes the back-end's next write say `EAGAIN`. Returns how many one-byte fillers that took:
    /// they stand between the frames before and those after, see [`TapDouble::drain_fillers`].
    pub fn fill(&self) -> usize {
        let mut fillers = 0;
        while try_send(&self.device, &[0xff]).unwrap() {
            fillers += 1;
        }
        fillers
    }

    /// Takes `fillers` fillers out again, and returns the frames that stood before and between them.
    pub fn drain_fillers(&self, mut fillers: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while fillers > 0 {
            match self.recv_raw(PATIENCE) {
                Some(bytes) if bytes == [0xff] => fillers -= 1,
                Some(bytes) => frames.push(bytes),
                None => panic!("{fillers} fillers are gone"),
            }
        }
        frames
    }
}

fn try_send(fd: &OwnedFd, bytes: &[u8]) -> io::Result<bool> {
    match send(fd, bytes, SendFlags::NOSIGNAL) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
