//! Which system calls each thread may make once it is confined, and why. Any other ends the process.
//!
//! The tables of `docs/sandbox.md` are made from the tables here, and `tests/sandbox` tries out all calls.

use libc::c_long;

/// A thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The thread of a queue pair on a TAP, TUN or MACVTAP.
    TapWorker,
    /// The thread of a queue pair on a packet socket.
    PacketWorker,
    /// The thread of the control queue.
    ControlQueue,
    /// The control thread.
    Control,
}

/// A system call that is let through.
#[derive(Clone, Copy, Debug)]
pub struct Permit {
    /// Its number, on this architecture.
    pub number: c_long,
    /// Its name.
    pub name: &'static str,
    /// Which arguments it may have.
    pub only: Only,
    /// What it is needed for.
    pub why: &'static str,
}

/// Which arguments a call may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Any.
    Any,
    /// The low 32 bits of the argument of this index must be one of these values.
    Values(u8, &'static [(u32, &'static str)]),
    /// The argument of this index must have none of these bits.
    Without(u8, (u32, &'static str)),
}

const fn any(number: c_long, name: &'static str, why: &'static str) -> Permit {
    Permit { number, name, only: Only::Any, why }
}

const fn values(
    number: c_long,
    name: &'static str,
    (index, values): (u8, &'static [(u32, &'static str)]),
    why: &'static str,
) -> Permit {
    Permit { number, name, only: Only::Values(index, values), why }
}

const fn data_only(number: c_long, name: &'static str, why: &'static str) -> Permit {
    Permit { number, name, only: Only::Without(2, (libc::PROT_EXEC as u32, "PROT_EXEC")), why }
}

/// The calls of every thread.
const EVERYWHERE: &[Permit] = &[
    any(libc::SYS_read, "read", "kicks, and what wakes the thread"),
    any(libc::SYS_write, "write", "calls, and log lines"),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_epoll_wait, "epoll_wait", "to wait"),
    #[cfg(not(target_arch = "x86_64"))]
    any(libc::SYS_epoll_pwait, "epoll_pwait", "to wait"),
    any(libc::SYS_epoll_ctl, "epoll_ctl", "what to wait for, such as a ring's kick"),
    any(libc::SYS_futex, "futex", "jobs of another thread, and their results"),
    any(
        libc::SYS_sched_yield,
        "sched_yield",
        "others first: while it looks for frames (--poll-us), or another hands over a job",
    ),
    any(libc::SYS_close, "close", "kicks and calls of a ring that ended"),
    data_only(libc::SYS_mmap, "mmap", "memory for the batches of a ring that starts"),
    data_only(libc::SYS_mprotect, "mprotect", "the allocator's arena of a thread grows so"),
    any(libc::SYS_munmap, "munmap", "such memory, and guest memory with its last user"),
    any(libc::SYS_brk, "brk", "the allocator"),
    any(
        libc::SYS_madvise,
        "madvise",
        "a thread's stack at its end; the allocator, where it is to use huge pages (glibc.malloc.hugetlb)",
    ),
    any(libc::SYS_sigaltstack, "sigaltstack", "the end of a thread, or of the process"),
    any(libc::SYS_rt_sigreturn, "rt_sigreturn", "after a signal, such as those of a debugger"),
    any(libc::SYS_restart_syscall, "restart_syscall", "after a stop, by the kernel's own doing"),
    any(libc::SYS_ppoll, "ppoll", "whether a call or a log line would have to wait; whether a front-end has hung up"),
    any(libc::SYS_clock_gettime, "clock_gettime", "the time, on a host whose clock only the kernel can read"),
];

/// The calls of every thread except the control thread.
const THREAD: &[Permit] = &[
    any(libc::SYS_exit, "exit", "the end of the thread"),
    any(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "no signals then"),
];

/// The call of threads that close descriptors in builds where the standard library checks what is closed.
#[cfg(debug_assertions)]
const CHECKED_CLOSE: Permit =
    values(libc::SYS_fcntl, "fcntl", (1, &[(libc::F_GETFD as u32, "F_GETFD")]), "a check of builds for debugging");

/// The calls of a thread that moves frames of a TAP.
const TAP_WORKER: &[Permit] = &[
    #[cfg(debug_assertions)]
    CHECKED_CLOSE,
    any(libc::SYS_readv, "readv", "a frame to the guest"),
    any(libc::SYS_writev, "writev", "a frame from the guest"),
    any(
        libc::SYS_io_uring_enter,
        "io_uring_enter",
        "frames in a batch, of the operations that its ring was restricted to",
    ),
    values(
        libc::SYS_io_uring_register,
        "io_uring_register",
        (
            1,
            &[
                (0, "IORING_REGISTER_BUFFERS"),
                (1, "IORING_UNREGISTER_BUFFERS"),
                (2, "IORING_REGISTER_FILES"),
                (3, "IORING_UNREGISTER_FILES"),
            ],
        ),
        "memory and device of the batches of a ring that starts",
    ),
    values(
        libc::SYS_ioctl,
        "ioctl",
        (1, &[(libc::TUNSETQUEUE as u32, "TUNSETQUEUE")]),
        "whether the kernel spreads flows over the queue",
    ),
];

/// The calls of a thread that moves frames of a packet socket.
const PACKET_WORKER: &[Permit] = &[
    #[cfg(debug_assertions)]
    CHECKED_CLOSE,
    any(libc::SYS_recvmsg, "recvmsg", "a frame to the guest, with its VLAN tag"),
    any(libc::SYS_recvmmsg, "recvmmsg", "several of them"),
    any(libc::SYS_writev, "writev", "a large frame from the guest"),
    any(libc::SYS_sendmmsg, "sendmmsg", "frames from the guest"),
    values(
        libc::SYS_setsockopt,
        "setsockopt",
        (2, &[(22, "PACKET_FANOUT_DATA")]),
        "whether the kernel spreads flows over the queue",
    ),
];

/// The calls of the control queue's thread.
const CONTROL_QUEUE: &[Permit] = &[
    #[cfg(debug_assertions)]
    CHECKED_CLOSE,
    values(
        libc::SYS_ioctl,
        "ioctl",
        (1, &[(libc::TUNSETOFFLOAD as u32, "TUNSETOFFLOAD"), (libc::TUNGETIFF as u32, "TUNGETIFF")]),
        "offloads that the guest switches",
    ),
];

/// The calls of the control thread.
const CONTROL: &[Permit] = &[
    any(libc::SYS_accept4, "accept4", "front-ends that connect"),
    any(libc::SYS_recvmsg, "recvmsg", "their messages"),
    any(libc::SYS_sendmsg, "sendmsg", "the answers"),
    any(libc::SYS_sendto, "sendto", "questions about the interface, over netlink"),
    any(libc::SYS_recvfrom, "recvfrom", "what netlink says of it"),
    values(
        libc::SYS_fcntl,
        "fcntl",
        (
            1,
            &[
                #[cfg(debug_assertions)]
                (libc::F_GETFD as u32, "F_GETFD"),
                (libc::F_GETFL as u32, "F_GETFL"),
                (libc::F_ADD_SEALS as u32, "F_ADD_SEALS"),
            ],
        ),
        "descriptors of the front-end: how they were opened; not to shrink",
    ),
    any(libc::SYS_fstat, "fstat", "what the front-end's descriptors are"),
    any(libc::SYS_fstatfs, "fstatfs", "the page size of guest memory"),
    any(libc::SYS_getsockopt, "getsockopt", "what a packet socket dropped"),
    any(libc::SYS_getsockname, "getsockname", "whether a packet socket's interface is there"),
    values(
        libc::SYS_ioctl,
        "ioctl",
        (
            1,
            &[
                (libc::FIONBIO as u32, "FIONBIO"),
                (libc::TUNSETOFFLOAD as u32, "TUNSETOFFLOAD"),
                (libc::TUNGETIFF as u32, "TUNGETIFF"),
            ],
        ),
        "front-ends and their descriptors must not block; offloads that the guest acknowledged; whether the interface is there",
    ),
    any(libc::SYS_timerfd_settime, "timerfd_settime", "what is due later"),
    any(libc::SYS_newfstatat, "newfstatat", "whether the socket's file is still ours, at the end"),
    any(libc::SYS_unlinkat, "unlinkat", "to remove it then"),
    any(libc::SYS_exit_group, "exit_group", "the end of the process"),
];

impl Role {
    /// All roles.
    pub const ALL: [Role; 4] = [Role::TapWorker, Role::PacketWorker, Role::ControlQueue, Role::Control];

    /// The system calls that it may make.
    pub fn permits(self) -> impl Iterator<Item = &'static Permit> {
        let (own, common) = match self {
            Role::TapWorker => (TAP_WORKER, THREAD),
            Role::PacketWorker => (PACKET_WORKER, THREAD),
            Role::ControlQueue => (CONTROL_QUEUE, THREAD),
            Role::Control => (CONTROL, &[][..]),
        };
        own.iter().chain(common).chain(EVERYWHERE)
    }
}
