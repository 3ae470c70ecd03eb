//! Descriptors that this process was started with: takes over those that it is to use, and closes all others.
//!
//! `main` calls this before the process opens anything of its own: only then is a descriptor that no option names
//! certain to be an inherited one. `device::passed` takes over passed queues of a TAP.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;

use crate::device::ioctl;

/// Why the descriptor of `--fd` cannot be used.
#[derive(Debug, Error)]
#[error("Descriptor {fd} of --fd is no connected Unix stream socket")]
pub struct NotConnected {
    fd: i32,
    #[source]
    cause: io::Error,
}

/// Closes all inherited descriptors except the standard ones and those that are to be used (`but`): whoever started
/// this process may have left some open that must not come within a guest's reach.
pub fn close_others(but: &[i32]) {
    let mut but: Vec<_> = but.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    but.sort_unstable();
    let firsts = [3].into_iter().chain(but.iter().map(|fd| fd.saturating_add(1).max(3)));
    let lasts = but.iter().map(|fd| fd.saturating_sub(1)).chain([u32::MAX]);
    for (first, last) in firsts.zip(lasts).filter(|(first, last)| first <= last) {
        if let Err(error) = ioctl::close_inherited_fds(first, last) {
            log::info!("Descriptors that this process was started with stay open: {error}");
        }
    }
}

/// Takes over descriptor `fd`, the connected socket of `--fd`. Nothing in this process may own it already.
///
/// # Errors
/// [`NotConnected`].
pub fn take_connected_socket(fd: i32) -> Result<OwnedFd, NotConnected> {
    let checked = ioctl::take_inherited_fd(fd).and_then(|socket| {
        let kind = rustix::net::sockopt::socket_type(&socket)?;
        let domain = rustix::net::sockopt::socket_domain(&socket)?;
        let wrong = match (domain, kind) {
            (AddressFamily::UNIX, SocketType::STREAM) => None,
            (AddressFamily::UNIX, SocketType::DGRAM) => Some("it is a datagram socket, not a stream socket"),
            (AddressFamily::UNIX, SocketType::SEQPACKET) => Some("it is a SEQPACKET socket, not a stream socket"),
            (AddressFamily::UNIX, _) => Some("it is a socket of another type"),
            _ => Some("it is no Unix socket"),
        };
        if let Some(wrong) = wrong {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, wrong));
        }
        rustix::net::getpeername(&socket)?;
        Ok(socket)
    });
    checked.map_err(|cause| NotConnected { fd, cause })
}
