//! The TUN/TAP driver's ioctls, packet sockets' options, and descriptors that this process was started with: unsafe
//! door 2. Each function is one call with its types; its callers know when to make it and what an error means.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_uint, ifreq};

use crate::mac::Mac;

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

/// Closes the descriptors from `first` to `last`, whichever of them there are.
///
/// # Errors
/// `ENOSYS` before Linux 5.9.
pub(crate) fn close_inherited_fds(first: c_uint, last: c_uint) -> io::Result<()> {
    // SAFETY: nothing in this process owns any of them: it is called before anything is opened (`main`), for what the
    // command line does not name.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } as c_int)
}

/// A request whose argument is the address of one `T`, which the kernel reads or writes.
struct Request<T>(libc::Ioctl, PhantomData<T>);

impl<T> Request<T> {
    const fn new(number: libc::Ioctl) -> Request<T> {
        Request(number, PhantomData)
    }
}

// linux/if_tun.h
const TUNSETIFF: Request<ifreq> = Request::new(libc::TUNSETIFF as _);
const TUNGETIFF: Request<ifreq> = Request::new(libc::TUNGETIFF as _);
const TUNSETQUEUE: Request<ifreq> = Request::new(libc::TUNSETQUEUE as _);
const TUNSETVNETHDRSZ: Request<c_int> = Request::new(libc::TUNSETVNETHDRSZ as _);
const TUNSETVNETLE: Request<c_int> = Request::new(libc::TUNSETVNETLE as _);
const TUNGETSNDBUF: Request<c_int> = Request::new(libc::TUNGETSNDBUF as _);
const TUNSETSNDBUF: Request<c_int> = Request::new(libc::TUNSETSNDBUF as _);
const TUNSETCARRIER: Request<c_int> = Request::new(libc::_IOW::<c_int>(b'T' as u32, 226));
/// Takes no argument.
const TUNGETDEVNETNS: libc::Ioctl = libc::_IO(b'T' as u32, 227);
// linux/sockios.h
const SIOCGIFHWADDR: Request<HardwareAddress> = Request::new(libc::SIOCGIFHWADDR as _);

/// `struct ifreq` with a hardware address.
#[repr(C)]
struct HardwareAddress {
    name: [u8; libc::IFNAMSIZ],
    family: u16,
    address: [u8; 14],
    rest: [u8; 8],
}

const _: () = assert!(size_of::<HardwareAddress>() >= size_of::<ifreq>());

fn call<T>(fd: BorrowedFd<'_>, request: &Request<T>, argument: &mut T) -> io::Result<()> {
    // SAFETY: the kernel reads or writes one `T` at the address of `argument`: the table above says so of each request.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request.0, std::ptr::from_mut(argument)) })
}

/// `request` is one that takes its argument by value.
fn call_by_value(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: u32) -> io::Result<c_int> {
    // SAFETY: the requests that this is called with below take a number, and touch no memory of ours whatever that is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, libc::c_ulong::from(argument)) };
    check(result).map(|()| result)
}

/// Makes `fd` a queue of interface `name`, which is created if need be; tells the interface's name.
pub(crate) fn tun_set_iff(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<String> {
    let mut request = ifreq_with(name, flags);
    call(fd, &TUNSETIFF, &mut request)?;
    Ok(name_of(&request))
}

/// The interface's name and its `IFF_` flags.
pub(crate) fn tun_get_iff(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    let mut request = ifreq_with("", 0);
    call(fd, &TUNGETIFF, &mut request)?;
    // SAFETY: `ifreq_with` or the kernel filled in the union's `ifru_flags`, and every bit pattern is a short.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_of(&request), c_int::from(flags as u16)))
}

/// The interface's Ethernet address, if it has one; of any queue of the TUN driver or a MACVTAP.
pub(crate) fn hardware_address(fd: BorrowedFd<'_>) -> io::Result<Option<Mac>> {
    let mut request = HardwareAddress { name: [0; libc::IFNAMSIZ], family: 0, address: [0; 14], rest: [0; 8] };
    call(fd, &SIOCGIFHWADDR, &mut request)?;
    Ok(request.address.first_chunk().copied().filter(|_| request.family == libc::ARPHRD_ETHER))
}

/// The network namespace that a TAP or TUN is in.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` there, `EINVAL` before Linux 5.2.
pub(crate) fn tun_namespace(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let namespace = call_by_value(fd, TUNGETDEVNETNS, 0)?;
    // SAFETY: the kernel made the descriptor in this call, so it is open, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}

/// Sets which unfinished frames (`TUN_F_`) may be read from the interface.
pub(crate) fn tun_set_offload(fd: BorrowedFd<'_>, flags: c_uint) -> io::Result<()> {
    call_by_value(fd, libc::TUNSETOFFLOAD as _, flags).map(drop)
}

/// Sets the length of the virtio-net header before each frame.
pub(crate) fn tun_set_vnet_header_size(fd: BorrowedFd<'_>, mut size: c_int) -> io::Result<()> {
    call(fd, &TUNSETVNETHDRSZ, &mut size)
}

/// Makes the header's words little-endian on every host.
pub(crate) fn tun_set_vnet_little_endian(fd: BorrowedFd<'_>) -> io::Result<()> {
    call(fd, &TUNSETVNETLE, &mut 1)
}

/// The send limit: how many bytes of frames may be in flight before the interface takes no more.
pub(crate) fn tun_send_limit(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    let mut limit = 0;
    call(fd, &TUNGETSNDBUF, &mut limit)?;
    Ok(limit)
}

/// Sets the send limit; `c_int::MAX` is none.
pub(crate) fn tun_set_send_limit(fd: BorrowedFd<'_>, mut limit: c_int) -> io::Result<()> {
    call(fd, &TUNSETSNDBUF, &mut limit)
}

/// Sets whether the kernel gives this queue frames.
pub(crate) fn tun_set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    call(fd, &TUNSETQUEUE, &mut ifreq_with("", flags))
}

/// Sets the user who may attach to the interface, besides root.
pub(crate) fn tun_set_owner(fd: BorrowedFd<'_>, user: u32) -> io::Result<()> {
    call_by_value(fd, libc::TUNSETOWNER as _, user).map(drop)
}

/// Sets the group whose members may attach to the interface.
pub(crate) fn tun_set_group(fd: BorrowedFd<'_>, group: u32) -> io::Result<()> {
    call_by_value(fd, libc::TUNSETGROUP as _, group).map(drop)
}

/// Keeps the interface when its last queue is closed.
pub(crate) fn tun_set_persistent(fd: BorrowedFd<'_>) -> io::Result<()> {
    call_by_value(fd, libc::TUNSETPERSIST as _, 1).map(drop)
}

/// Sets the interface's carrier.
pub(crate) fn tun_set_carrier(fd: BorrowedFd<'_>, is_on: bool) -> io::Result<()> {
    call(fd, &TUNSETCARRIER, &mut c_int::from(is_on))
}

/// `PACKET_VNET_HDR` (linux/if_packet.h).
pub(crate) const PACKET_VNET_HDR: c_int = 15;
/// `PACKET_IGNORE_OUTGOING`.
pub(crate) const PACKET_IGNORE_OUTGOING: c_int = 23;
/// `PACKET_FANOUT`.
const PACKET_FANOUT: c_int = 18;
/// `PACKET_FANOUT_DATA`.
const PACKET_FANOUT_DATA: c_int = 22;
/// `PACKET_FANOUT_CBPF` and `PACKET_FANOUT_FLAG_IGNORE_OUTGOING`, as they stand in the option's value. A group needs
/// the flag because it disregards its sockets' own `PACKET_IGNORE_OUTGOING`.
const FANOUT_KIND: c_int = (6 | 0x4000) << 16;
/// `PACKET_FANOUT_FLAG_UNIQUEID`, in the same place.
const FANOUT_UNIQUE: c_int = 0x2000 << 16;

/// Sets an option of a packet socket whose value is a number.
pub(crate) fn set_packet_option(fd: BorrowedFd<'_>, option: c_int, value: c_int) -> io::Result<()> {
    set_option(fd, (libc::SOL_PACKET, option), &value)
}

/// Binds the packet socket to the interface with this index.
pub(crate) fn bind_to_interface(fd: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let address = packet_address(c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?);
    // SAFETY: bind reads one sockaddr_ll at the given address, that of `address`.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as _) })
}

/// The index of the interface that the packet socket is bound to; -1 once that is gone.
pub(crate) fn bound_interface(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    let mut address = packet_address(0);
    let mut len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: getsockname writes at most `len` bytes, a sockaddr_ll, at the address of `address`, and the length at that of
    // `len`.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut len) })?;
    Ok(address.sll_ifindex)
}

fn packet_address(index: c_int) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}

/// How many frames the packet socket had no room for since the last call.
pub(crate) fn packet_drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    get_option(fd, (libc::SOL_PACKET, libc::PACKET_STATISTICS), &mut stats)?;
    Ok(stats.tp_drops)
}

/// Which frames an interface accepts besides those to its own address, while a socket asks for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Membership {
    /// Those to all groups.
    AllGroups,
    /// Those to this address.
    Address(Mac),
    /// All.
    Promiscuous,
}

/// Has the interface with this index accept more frames.
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

/// Sets the size of the socket's buffers to `bytes`, or to the most that this process may have.
pub(crate) fn enlarge_buffers(fd: BorrowedFd<'_>, bytes: c_int) {
    for (forced, polite) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        let set = |option| set_option(fd, (libc::SOL_SOCKET, option), &bytes);
        // Unlike the forced option, this one limits the size silently.
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
    get_option(fd, (libc::SOL_PACKET, PACKET_FANOUT), &mut value)?;
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

/// `value` is of a type of numbers, which the option fills in.
fn get_option<T>(fd: BorrowedFd<'_>, (level, option): (c_int, c_int), value: &mut T) -> io::Result<()> {
    let mut len = size_of::<T>() as libc::socklen_t;
    let value = std::ptr::from_mut(value).cast();
    // SAFETY: getsockopt writes at most `len` bytes at the address of `value`, which is that long and of a type for which every
    // bit pattern is valid, and the length at the address of `len`.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, value, &raw mut len) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about `name`, of which at most [`MAX_NAME`] bytes are used (`name` refuses longer ones before).
fn ifreq_with(name: &str, flags: c_int) -> ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().take(MAX_NAME).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // All of the union is initialised, and then the part that is read.
    let mut request = ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: std::ptr::null_mut() } };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn name_of(request: &ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
