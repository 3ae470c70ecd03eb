//! The TUN/TAP driver's ioctls and packet sockets' options: unsafe door 2. Each function is one call with its types; what
//! to call when, and what an error means, is for those to know who use them.
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

/// Of linux/if_tun.h.
const TUNSETCARRIER: libc::Ioctl = libc::_IOW::<c_int>(b'T' as u32, 226);

/// Sets the interface's carrier.
pub(crate) fn tun_set_carrier(fd: BorrowedFd<'_>, is_on: bool) -> io::Result<()> {
    let value = c_int::from(is_on);
    // SAFETY: TUNSETCARRIER reads one int at the given address, that of `value`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETCARRIER as _, &raw const value) })
}

/// `PACKET_VNET_HDR` (linux/if_packet.h).
pub(crate) const PACKET_VNET_HDR: c_int = 15;
/// `PACKET_IGNORE_OUTGOING`.
pub(crate) const PACKET_IGNORE_OUTGOING: c_int = 23;
/// `PACKET_FANOUT`.
const PACKET_FANOUT: c_int = 18;
/// `PACKET_FANOUT_DATA`.
const PACKET_FANOUT_DATA: c_int = 22;
/// `PACKET_FANOUT_CBPF` and `PACKET_FANOUT_FLAG_IGNORE_OUTGOING`, where the kind of a group stands in its number: what each
/// socket ignores counts for nothing in a group.
const FANOUT_KIND: c_int = (6 | 0x4000) << 16;
/// `PACKET_FANOUT_FLAG_UNIQUEID`, there too.
const FANOUT_UNIQUE: c_int = 0x2000 << 16;

/// Sets one of a packet socket's options that are a number.
pub(crate) fn set_packet_option(fd: BorrowedFd<'_>, option: c_int, value: c_int) -> io::Result<()> {
    set_option(fd, (libc::SOL_PACKET, option), &value)
}

/// Has the packet socket get frames of the interface with this index.
pub(crate) fn bind_to_interface(fd: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    // SAFETY: all zeros is a valid sockaddr_ll: numbers and bytes.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: bind reads one sockaddr_ll at the given address, that of `address`.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as _) })
}

/// The index of the interface that the packet socket is bound to; -1 once that is gone.
pub(crate) fn bound_interface(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    // SAFETY: all zeros is a valid sockaddr_ll: numbers and bytes.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: getsockname writes at most `len` bytes, a sockaddr_ll, at the address of `address`, and the length at that of
    // `len`.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut len) })?;
    Ok(address.sll_ifindex)
}

/// How many frames the packet socket had no room for since this was asked last.
pub(crate) fn packet_drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: all zeros is a valid tpacket_stats: numbers.
    let mut stats: libc::tpacket_stats = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&stats) as libc::socklen_t;
    // SAFETY: getsockopt writes at most `len` bytes, a tpacket_stats, at the address of `stats`, and the length at that of
    // `len`.
    check(unsafe {
        let value = (&raw mut stats).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, value, &raw mut len)
    })?;
    Ok(stats.tp_drops)
}

/// Which frames an interface lets in besides those to its own address, for as long as a socket asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Membership {
    /// Those to all groups.
    AllGroups,
    /// Those to this address.
    Address([u8; 6]),
    /// All.
    Promiscuous,
}

/// Has the interface with this index let frames in.
pub(crate) fn add_membership(fd: BorrowedFd<'_>, index: u32, membership: Membership) -> io::Result<()> {
    let (mr_type, address) = match membership {
        Membership::AllGroups => (libc::PACKET_MR_ALLMULTI, None),
        Membership::Address(address) => (PACKET_MR_UNICAST, Some(address)),
        Membership::Promiscuous => (libc::PACKET_MR_PROMISC, None),
    };
    let mut request = libc::packet_mreq {
        mr_ifindex: c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?,
        mr_type: mr_type as u16,
        mr_alen: address.map_or(0, |address| address.len() as u16),
        mr_address: [0; 8],
    };
    request.mr_address.iter_mut().zip(address.iter().flatten()).for_each(|(to, from)| *to = *from);
    set_option(fd, (libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP), &request)
}

/// `PACKET_MR_UNICAST`.
const PACKET_MR_UNICAST: c_int = 3;

/// Lets `bytes` wait in the socket each way, or as many as this process may.
pub(crate) fn enlarge_buffers(fd: BorrowedFd<'_>, bytes: c_int) {
    for (forced, polite) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        let set = |option| set_option(fd, (libc::SOL_SOCKET, option), &bytes);
        // The polite one takes less without an error.
        let _ = set(forced).or_else(|_| set(polite));
    }
}

/// Attaches a program that says which frames come to the socket.
pub(crate) fn attach_filter(fd: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    set_program(fd, (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER), program)
}

/// Has the socket join the group `id`, or begin one; tells which.
pub(crate) fn join_fan_out(fd: BorrowedFd<'_>, id: Option<c_int>) -> io::Result<c_int> {
    set_packet_option(fd, PACKET_FANOUT, id.map_or(FANOUT_KIND | FANOUT_UNIQUE, |id| FANOUT_KIND | id))?;
    let mut value: c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: getsockopt writes at most `len` bytes, an int, at the address of `value`, and the length at that of `len`.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, PACKET_FANOUT, (&raw mut value).cast(), &raw mut len)
    })?;
    Ok(value & 0xffff)
}

/// Sets the program that says to which socket of the group a frame comes.
pub(crate) fn set_fan_out_program(fd: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    set_program(fd, (libc::SOL_PACKET, PACKET_FANOUT_DATA), program)
}

fn set_program(fd: BorrowedFd<'_>, option: (c_int, c_int), program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // The kernel copies the instructions within the call, and only reads them.
    set_option(fd, option, &libc::sock_fprog { len, filter: program.as_ptr().cast_mut() })
}

/// `value` is what the option's documentation says that it reads.
fn set_option<T>(fd: BorrowedFd<'_>, (level, option): (c_int, c_int), value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: setsockopt reads `len` bytes at the address of `value`, which is that long; what a sock_fprog points to is
    // borrowed by `set_program` for longer than the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), len) })
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
