//! A broken or hostile front-end: what it says of the guest's memory.
//!
//! A refused table leaves the old one in place, so frames pass on the rings that run in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, SealFlags, fcntl_add_seals};
use rustix::net::{AddressFamily, SocketType};
use vmm_sys_util::eventfd::EventFd;

use crate::common::backend::InProcess;
use crate::common::bench::{Bench, Guest};
use crate::common::fd_of;
use crate::common::frontend::Answer;
use crate::common::memory::{GuestMemory, RegionInfo, RegionSpec, USER_OFFSET, memfd};
use crate::common::message::Message;

const MIB: u64 = 1 << 20;
const GUEST: u64 = 0x4000_0000;

fn region(guest: u64, size: u64) -> RegionInfo {
    RegionInfo { guest, size, user: guest.wrapping_add(USER_OFFSET), offset: 0 }
}

/// Tells a running session of `regions`, all in `file`, both ways: as a table, and one by one.
fn answers_to(bench: &Bench, regions: &[RegionInfo], file: &impl AsFd) -> Vec<Answer> {
    let fds = regions.iter().map(|_| file.as_fd());
    let table = bench.ask(Message::set_mem_table_claiming(regions).with_fds(fds));
    let last = regions.last().map(|info| bench.ask(Message::add_mem_reg_claiming(info).with_fd(file.as_fd())));
    [table].into_iter().chain(last).collect()
}

/// U-33, U-34
#[test]
fn region_that_is_empty_wraps_or_is_larger_than_its_file_is_refused() {
    let mut bench = Bench::running(1);
    let file = memfd(MIB);
    let good = region(GUEST, MIB);
    let cases = [
        ("U-33 size 0", RegionInfo { size: 0, ..good }),
        ("U-33 guest address wraps", RegionInfo { guest: 0_u64.wrapping_sub(MIB / 2), ..good }),
        ("U-33 user address wraps", RegionInfo { user: 0_u64.wrapping_sub(MIB / 2), ..good }),
        ("U-33 file offset wraps", RegionInfo { offset: 0_u64.wrapping_sub(MIB / 2), ..good }),
        ("U-33 everything wraps", RegionInfo { size: u64::MAX, ..good }),
        ("U-34 one byte more than the file", RegionInfo { size: MIB + 1, ..good }),
        ("U-34 one byte further than the file", RegionInfo { offset: 1, ..good }),
        ("U-34 far larger", RegionInfo { size: 1 << 46, ..good }),
        ("U-34 offset behind the file", RegionInfo { offset: 2 * MIB, size: 4096, ..good }),
    ];
    for (name, info) in cases {
        assert_eq!(answers_to(&bench, &[info], &file), [Answer::Nack(1); 2], "{name}");
        bench.assert_frames_pass();
    }
    assert_eq!(bench.ask(Message::add_mem_reg_claiming(&good).with_fd(file.as_fd())), Answer::Ack);
    bench.assert_frames_pass();
}

/// U-31
#[test]
fn memory_table_whose_numbers_do_not_agree_is_refused() {
    let mut bench = Bench::running(1);
    let file = memfd(MIB);
    let fd = || file.as_fd();
    let two = [region(GUEST, 4096), region(GUEST + MIB, 4096)];
    let claiming = Message::set_mem_table_claiming;
    let counted = |count: u32| {
        let mut message = claiming(&two).with_fds([fd(), fd()]);
        message.body[..4].copy_from_slice(&count.to_ne_bytes());
        message
    };
    let many: Vec<_> = (0..33).map(|at| region(GUEST + at * MIB, 4096)).collect();
    let cases = [
        ("no regions", claiming(&[])),
        ("no regions and a descriptor", claiming(&[]).with_fd(fd())),
        ("fewer descriptors", claiming(&two).with_fd(fd())),
        ("no descriptors (U-15)", claiming(&two)),
        ("more descriptors", claiming(&two).with_fds([fd(), fd(), fd()])),
        ("more regions than descriptors fit a message", claiming(&many).with_fds(vec![fd(); 32])),
        ("count says fewer", counted(1)),
        ("count says more", counted(3)),
        ("count says most", counted(u32::MAX)),
    ];
    for (name, message) in cases {
        assert_eq!(bench.front_end.ask(message), Answer::Nack(1), "{name}");
        bench.assert_frames_pass();
    }
}

/// U-31: one by one, there are 509 and no more. (U-37: all of them tiny.)
#[test]
fn region_beyond_the_last_slot_is_refused() {
    let mut bench = Bench::connected(1);
    bench.negotiate();
    let region_0 = &bench.guest.mem.regions()[0];
    assert_eq!(bench.ask(Message::add_mem_reg(region_0)), Answer::Ack);
    let file = memfd(4096);
    let answers = (1..512)
        .map(|at| bench.ask(Message::add_mem_reg_claiming(&region(GUEST + at * MIB, 4096)).with_fd(file.as_fd())));
    let accepted = answers.take_while(|answer| *answer == Answer::Ack).count();

    assert_eq!(accepted, 508);

    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-32
#[test]
fn regions_that_overlap_for_the_guest_are_refused() {
    let mut bench = Bench::running(1);
    let file = memfd(4 * MIB);
    for second in [GUEST, GUEST + 4096, GUEST + MIB - 4096, GUEST - 4096] {
        let regions = [region(GUEST, MIB), region(second, MIB)];
        let answer = bench.ask(Message::set_mem_table_claiming(&regions).with_fds([file.as_fd(), file.as_fd()]));
        assert_eq!(answer, Answer::Nack(1), "{second:#x}");
    }
    let own = bench.guest.mem.regions()[0].info;
    let inside = RegionInfo { guest: own.guest + 4096, size: 4096, user: GUEST, offset: 0 };
    assert_eq!(bench.ask(Message::add_mem_reg_claiming(&inside).with_fd(file.as_fd())), Answer::Nack(1));
    bench.assert_frames_pass();
}

/// U-32: one file for several regions is how QEMU's memory below and above the hole looks.
#[test]
fn regions_in_the_same_file_or_at_the_same_user_address_are_accepted() {
    let specs = [RegionSpec::new(0x10_0000, 16 << 20), RegionSpec::new(0x1_0000_0000, 4 << 20).in_file(0, 16 << 20)];
    let guest = Guest::in_memory(GuestMemory::new(&specs), 1, 0);
    let mut bench = Bench::before(InProcess::start(1), guest);
    bench.start();
    bench.assert_frames_pass();
    let file = memfd(MIB);
    let user = bench.guest.mem.regions()[0].info.user;
    let same_user = RegionInfo { user, ..region(GUEST, MIB) };
    assert_eq!(bench.ask(Message::add_mem_reg_claiming(&same_user).with_fd(file.as_fd())), Answer::Ack);
    bench.assert_frames_pass();
}

/// U-36
#[test]
fn region_in_what_cannot_be_memory_is_refused() {
    let mut bench = Bench::running(1);
    let (reader, writer) = io::pipe().unwrap();
    let (socket, _other) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, rustix::net::SocketFlags::CLOEXEC, None)
            .unwrap();
    let eventfd = EventFd::new(0).unwrap();
    let sealed = memfd(MIB);
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let reopened = |flags: OFlags| -> OwnedFd {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&sealed));
        rustix::fs::open(path, flags, Mode::empty()).unwrap()
    };
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    let cases: [(&str, OwnedFd); 9] = [
        ("pipe to read", reader.into()),
        ("pipe to write", writer.into()),
        ("socket", socket),
        ("eventfd", own(fd_of(&eventfd))),
        ("directory", File::open("/").unwrap().into()),
        ("character device", File::open("/dev/zero").unwrap().into()),
        ("memfd open for reading", reopened(OFlags::RDONLY)),
        ("path descriptor", reopened(OFlags::PATH)),
        ("memfd sealed against writing", sealed.into()),
    ];
    for (name, fd) in cases {
        assert_eq!(answers_to(&bench, &[region(GUEST, MIB)], &fd), [Answer::Nack(1); 2], "{name}");
        bench.assert_frames_pass();
    }
}

/// U-36: a deleted file is normal. Every memfd is one, and most huge page files.
#[test]
fn region_in_a_deleted_file_is_accepted() {
    let mut bench = Bench::running(1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB).unwrap();
    let answer = bench.ask(Message::add_mem_reg_claiming(&region(GUEST, MIB)).with_fd(file.as_fd()));
    assert_eq!(answer, Answer::Ack);
    bench.assert_frames_pass();
}

/// U-15
#[test]
fn region_without_its_descriptor_is_refused() {
    let mut bench = Bench::running(1);
    let info = region(GUEST, MIB);
    assert_eq!(bench.ask(Message::add_mem_reg_claiming(&info)), Answer::Nack(1));
    let file = memfd(MIB);
    let two = Message::add_mem_reg_claiming(&info).with_fds([file.as_fd(), file.as_fd()]);
    assert_eq!(bench.ask(two), Answer::Nack(1));
    bench.assert_frames_pass();
}

#[test]
fn removal_of_a_region_that_is_not_there_changes_nothing() {
    let mut bench = Bench::running(1);
    let own = bench.guest.mem.regions()[0].info;
    let others = [
        region(GUEST, MIB),
        RegionInfo { guest: GUEST, ..own },
        RegionInfo { user: own.user + own.size, ..own },
        RegionInfo { size: own.size - 4096, ..own },
        RegionInfo { user: own.user + 4096, ..own },
        RegionInfo { guest: own.guest + 4096, ..own },
    ];
    for info in others {
        assert_eq!(bench.ask(Message::rem_mem_reg(&info)), Answer::Ack, "{info:x?}");
    }
    bench.assert_frames_pass();
}

/// U-38: the rings' memory goes while they run. They are broken, nothing else is; a new set-up heals them.
#[test]
fn rings_whose_memory_is_taken_away_break_and_heal() {
    type Take = fn(&Bench) -> Answer;
    let ways: [(&str, Take); 2] = [
        ("REM_MEM_REG", |bench| bench.ask(Message::rem_mem_reg(&bench.guest.mem.regions()[0].info))),
        ("SET_MEM_TABLE", |bench| {
            let file = memfd(MIB);
            bench.ask(Message::set_mem_table_claiming(&[region(GUEST, MIB)]).with_fd(file.as_fd()))
        }),
    ];
    for (name, take) in ways {
        let mut bench = Bench::running(1);
        bench.assert_frames_pass();
        let err = bench.guest.pairs[0].tx.err.try_clone().unwrap();
        assert_eq!(bench.ask(Message::set_vring_err(1, fd_of(&err))), Answer::Ack);

        assert_eq!(take(&bench), Answer::Ack, "{name}");

        bench.backend.wait_counter(0, "broken_rings", 2);
        assert_eq!(err.read().unwrap(), 1, "The front-end is told once");
        bench.guest.pairs[0].send(&Default::default(), &[0; 60]);
        assert!(bench.backend.taps[0].recv(crate::common::QUIET).is_none(), "{name}");
        bench.front_end.stop_like_qemu(2).unwrap();
        bench.guest = Guest::new(1, 0);
        assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
        (0..2).for_each(|index| bench.start_ring(index));
        bench.assert_frames_pass();
    }
}

/// U-28, U-29
#[test]
fn ring_in_no_memory_or_in_a_hole_is_refused() {
    let specs = [RegionSpec::new(0x10_0000, 16 << 20), RegionSpec::new(0x4000_0000, 1 << 20).in_file(1, 0)];
    let guest = Guest::in_memory(GuestMemory::new(&specs), 1, 0);
    let mut bench = Bench::before(InProcess::start(1), guest);
    bench.negotiate();
    let addr = bench.ring_addr(0);
    assert_eq!(bench.ask(Message::set_vring_num(0, 256)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_vring_addr_raw(0, &addr)), Answer::Nack(1), "U-29 before the memory");
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    let hole = 0x2000_0000 + USER_OFFSET;
    for part in 0..3 {
        let mut wrong = addr;
        *[&mut wrong.desc, &mut wrong.avail, &mut wrong.used][part] = hole;
        assert_eq!(bench.ask(Message::set_vring_addr_raw(0, &wrong)), Answer::Nack(1), "U-28 part {part} in a hole");
    }
    (0..2).for_each(|index| bench.start_ring(index));
    bench.assert_frames_pass();
}

/// U-28: a ring over two regions that are adjacent for the guest, and far apart for the front-end and for us.
#[test]
fn ring_that_spans_two_adjacent_regions_works() {
    use crate::common::split_ring::{RingAddrs, SplitRing};
    let size = 2 << 20;
    let border = 0x10_0000 + size as u64;
    let specs = [
        RegionSpec::new(0x10_0000, size).in_file(0, 0),
        RegionSpec::new(border, 16 << 20).in_file(1, 0).at_user(0x1234_0000_0000),
    ];
    // Each part of the ring lies over the border once.
    for part in 0..3 {
        let mut guest = Guest::in_memory(GuestMemory::new(&specs), 1, 0);
        let free = border + (4 << 20);
        let mut addrs = RingAddrs { desc: free, avail: free + 0x2000, used: free + 0x4000 };
        *[&mut addrs.desc, &mut addrs.avail, &mut addrs.used][part] = border - 64;
        guest.pairs[0].tx = SplitRing::placed(&guest.mem, 256, 0, addrs);
        let mut bench = Bench::before(InProcess::start(1), guest);

        bench.start();

        for _ in 0..300 {
            bench.assert_frames_pass();
        }
    }
}
