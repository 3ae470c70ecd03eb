//! The TUN/TAP driver's ioctls: unsafe door 2. Each function is one call with its types; what to call when, and what an
//! error means, is for those to know who use them.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_uint, ifreq};

/// Longest interface name, without the closing NUL.
pub(crate) const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// Takes over a descriptor that this process was started with.
///
/// # Errors
/// `EBADF` where there is none of that number.
pub(crate) fn take_inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD reads the flags of `fd` and touches no memory, whether `fd` is open or not.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is open, as was just seen. The command line named it as ours to use, and it is taken before anything
    // else is opened (`main`), so nothing in this process owns it; a number named twice is refused by `Config`.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// `TUNSETIFF`: makes `fd` a queue of interface `name`, which is created if need be; tells the interface's name.
pub(crate) fn tun_set_iff(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<String> {
    let mut request = ifreq_named(name);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq at the given address, that of `request`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    Ok(name_of(&request))
}

/// `TUNGETIFF`: the interface's name and its `IFF_` flags.
pub(crate) fn tun_get_iff(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    let mut request = ifreq_named("");
    // SAFETY: TUNGETIFF writes one ifreq at the given address, that of `request`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) })?;
    // SAFETY: the kernel filled in the union's `ifru_flags`, and every bit pattern is a short.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_of(&request), c_int::from(flags as u16)))
}

/// `TUNSETOFFLOAD`: which unfinished frames (`TUN_F_`) may be read from the interface.
pub(crate) fn tun_set_offload(fd: BorrowedFd<'_>, flags: c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) })
}

/// `TUNSETVNETHDRSZ`: bytes of the virtio-net header before each frame.
pub(crate) fn tun_set_vnet_header_size(fd: BorrowedFd<'_>, size: c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int at the given address, that of `size`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) })
}

/// `TUNSETVNETLE`: the header's words are little-endian, whatever the host is.
pub(crate) fn tun_set_vnet_little_endian(fd: BorrowedFd<'_>) -> io::Result<()> {
    let on: c_int = 1;
    // SAFETY: TUNSETVNETLE reads one int at the given address, that of `on`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETLE as _, &raw const on) })
}

/// `TUNGETSNDBUF`: how many bytes of frames may be on their way before the interface takes no more.
pub(crate) fn tun_send_limit(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    let mut limit: c_int = 0;
    // SAFETY: TUNGETSNDBUF writes one int at the given address, that of `limit`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETSNDBUF as _, &raw mut limit) })?;
    Ok(limit)
}

/// `TUNSETSNDBUF`: how many bytes of frames may be on their way; `c_int::MAX` for any.
pub(crate) fn tun_set_send_limit(fd: BorrowedFd<'_>, limit: c_int) -> io::Result<()> {
    // SAFETY: TUNSETSNDBUF reads one int at the given address, that of `limit`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETSNDBUF as _, &raw const limit) })
}

/// `TUNSETQUEUE`: whether the kernel gives this queue frames.
pub(crate) fn tun_set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = ifreq_named("");
    let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETQUEUE reads one ifreq at the given address, that of `request`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE as _, &raw const request) })
}

/// `TUNSETOWNER`: the user who may attach to the interface, besides root.
pub(crate) fn tun_set_owner(fd: BorrowedFd<'_>, user: u32) -> io::Result<()> {
    // SAFETY: TUNSETOWNER takes its argument by value and touches no memory of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOWNER as _, libc::c_ulong::from(user)) })
}

/// `TUNSETGROUP`: the group whose members may attach to the interface.
pub(crate) fn tun_set_group(fd: BorrowedFd<'_>, group: u32) -> io::Result<()> {
    // SAFETY: TUNSETGROUP takes its argument by value and touches no memory of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETGROUP as _, libc::c_ulong::from(group)) })
}

/// `TUNSETPERSIST`: the interface stays when its last queue is closed.
pub(crate) fn tun_set_persistent(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST as _, 1 as libc::c_ulong) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request for `name`, of which at most [`MAX_NAME`] bytes are used (`name` refuses longer ones before).
fn ifreq_named(name: &str) -> ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().take(MAX_NAME).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: std::ptr::null_mut() } }
}

fn name_of(request: &ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
