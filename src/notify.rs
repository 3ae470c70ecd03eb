//! The two notifications of a virtqueue, as descriptors that a front-end sent: [`Kick`] from the guest, [`Call`] to it.
//!
//! The front-end chose what they are: eventfds, pipes, or worse. They are made non-blocking on arrival, so no read or
//! write of one ever waits; what one does on an error is its sender's problem and never ours.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

/// What a read of a kick found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KickState {
    /// There may be kicks to come.
    Open,
    /// It will not kick again: closed at the other end, or no descriptor that can be read.
    Dead,
}

/// A descriptor that the guest makes readable when it made buffers available.
#[derive(Debug)]
pub struct Kick(OwnedFd);

impl Kick {
    /// Takes a descriptor as a kick.
    ///
    /// # Errors
    /// `EINVAL` for what is plainly no eventfd, pipe or socket: files and devices.
    pub fn new(fd: OwnedFd) -> io::Result<Kick> {
        Ok(Kick(notifier(fd)?))
    }

    /// Takes what was signalled.
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
pub struct Call(OwnedFd);

impl Call {
    /// Takes a descriptor as a call.
    ///
    /// # Errors
    /// `EINVAL` for what is plainly no eventfd, pipe or socket: files and devices.
    pub fn new(fd: OwnedFd) -> io::Result<Call> {
        Ok(Call(notifier(fd)?))
    }

    /// Signals. A full eventfd or pipe is a signal that was not taken yet, and a closed one has nobody to tell.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

fn notifier(fd: OwnedFd) -> io::Result<OwnedFd> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    // An eventfd is of no kind that a file can be; what User Mode Linux calls a pipe is a socket.
    if !matches!(kind, FileType::Fifo | FileType::Socket | FileType::Unknown) {
        return Err(Errno::INVAL.into());
    }
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
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
