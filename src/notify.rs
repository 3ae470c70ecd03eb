//! The two notifications of a virtqueue, as descriptors that a front-end sent: [`Kick`] from the guest, [`Call`] to it;
//! and [`RingFds`], all descriptors of a ring.
//!
//! The front-end chose what they are: eventfds, pipes, or worse. Kicks, and the ends of pipes and sockets, are made
//! non-blocking on arrival, so no read or write of one waits. A call that is an eventfd stays as it came: blocking is a
//! property of the file, which a front-end (libkrun) may share and read. So there is a poll before each write to a call
//! that may block. A front-end can still make a write wait, by filling the eventfd at that moment or making it blocking
//! again. That stops the thread of its own ring, which ends the process. What a descriptor does on an error is its
//! sender's problem and never ours.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

/// What a read of a kick found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KickState {
    /// More kicks may come.
    Open,
    /// No kick will come again: it is closed at the other end, or is no descriptor that can be read.
    Dead,
}

/// A descriptor that the guest makes readable when it has made buffers available.
#[derive(Debug)]
pub struct Kick(OwnedFd);

impl Kick {
    /// Takes a descriptor as a kick.
    ///
    /// # Errors
    /// `EINVAL` for what is plainly no eventfd, pipe or socket: files and devices.
    pub fn new(fd: OwnedFd) -> io::Result<Kick> {
        kind(&fd)?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Kick(fd))
    }

    /// Takes the kicks that were signalled.
    pub(crate) fn drain(&self) -> KickState {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(1..) | Err(Errno::AGAIN | Errno::INTR) => KickState::Open,
            Ok(_) | Err(_) => KickState::Dead,
        }
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A descriptor by which the guest learns of used buffers, or the front-end of an error.
#[derive(Debug)]
pub struct Call {
    fd: OwnedFd,
    may_block: bool,
}

impl Call {
    /// Takes a descriptor as a call.
    ///
    /// # Errors
    /// `EINVAL` for what is plainly no eventfd, pipe or socket: files and devices.
    pub fn new(fd: OwnedFd) -> io::Result<Call> {
        let may_block = kind(&fd)? == FileType::Unknown && !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        if !may_block {
            rustix::io::ioctl_fionbio(&fd, true)?;
        }
        Ok(Call { fd, may_block })
    }

    /// Signals. A full eventfd or pipe holds a signal that was not taken yet, and a closed one has nobody to tell.
    pub(crate) fn signal(&self) {
        if !self.may_block || self.has_room() {
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        }
    }

    fn has_room(&self) -> bool {
        let mut out = [PollFd::new(&self.fd, PollFlags::OUT)];
        poll(&mut out, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1) && out[0].revents().contains(PollFlags::OUT)
    }
}

/// A ring's descriptors, as its front-end sent them.
#[derive(Debug, Default)]
pub struct RingFds {
    /// Tells of the guest's kicks; without it the ring is polled.
    pub kick: Option<Kick>,
    /// Calls the guest; without it the guest polls.
    pub call: Option<Call>,
    /// Tells the front-end that the ring is broken.
    pub err: Option<Call>,
}

/// The type of the file, if it can be a notification.
fn kind(fd: &OwnedFd) -> io::Result<FileType> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    // An eventfd has none of the types that a file can have; what User Mode Linux calls a pipe is a socket.
    if !matches!(kind, FileType::Fifo | FileType::Socket | FileType::Unknown) {
        return Err(Errno::INVAL.into());
    }
    Ok(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_pipe_is_a_dead_kick_and_a_silent_call() {
        let (read, write): (OwnedFd, OwnedFd) = io::pipe().map(|(r, w)| (r.into(), w.into())).expect("pipe");
        let kick = Kick::new(read).expect("kick");
        assert_eq!(kick.drain(), KickState::Open);
        drop(write);
        assert_eq!(kick.drain(), KickState::Dead);
        let (read, write): (OwnedFd, OwnedFd) = io::pipe().map(|(r, w)| (r.into(), w.into())).expect("pipe");
        drop(read);
        Call::new(write).expect("call").signal();
    }

    #[test]
    fn regular_file_is_refused() {
        let file = || std::fs::File::open("/proc/self/exe").expect("open").into();
        assert!(Kick::new(file()).is_err() && Call::new(file()).is_err());
    }
}
