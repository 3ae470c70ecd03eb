//! The test kit proved: its parts one by one.
//!
//! What passes here is known of the kit, so that a failure elsewhere is the library's.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::driver::CtrlDriver;
use common::frames::{self, Checker, Ends, L4Csum, Stamp};
use common::memory::{GuestMemory, RegionSpec};
use common::split_ring::{Buf, SplitRing, need_event};
use common::tap_double::TapDouble;
use common::virtio::{VnetHdr, ctrl};
use common::{PATIENCE, fd_of, wait_readable};

const MIB: usize = 1 << 20;

// The kit's parts.

#[test]
fn memory_is_the_same_through_each_region_of_its_file() {
    let mem = GuestMemory::new(&[
        RegionSpec::new(0x1000, 0x1000),
        RegionSpec::new(0x2000, 0x1000).in_file(0, 0x1000),
        RegionSpec::new(0x10_0000, 0x2000),
    ]);

    mem.write(0x1ffe, &[1, 2, 3, 4]);

    assert_eq!(mem.read(0x1ffe, 4), [1, 2, 3, 4]);
    assert_eq!(mem.read(0x10_0ffe, 4), [1, 2, 3, 4]);
    assert_eq!(mem.load_u32(0x10_0ffc, Ordering::Relaxed), 0x0201_0000);
    assert_eq!(mem.user_addr(0x2001) - mem.user_addr(0x2000), 1);
    assert_ne!(mem.user_addr(0x2000), 0x2000);
    assert_eq!(mem.regions()[1].info.offset, 0x1000);
}

#[test]
#[should_panic(expected = "No guest memory at 0x2000")]
fn memory_in_a_hole_panics() {
    let mem = GuestMemory::new(&[
        RegionSpec::new(0x1000, 0x1000),
        RegionSpec::new(0x3000, 0x1000).in_file(1, 0),
    ]);
    mem.read(0x1fff, 2);
}

#[test]
fn allocation_goes_on_in_the_next_region() {
    let mem = GuestMemory::new(&[
        RegionSpec::new(0x1000, 0x100),
        RegionSpec::new(0x8000, 0x1000).in_file(1, 0),
    ]);

    assert_eq!(mem.alloc(0xf1, 1), 0x1000);
    assert_eq!(mem.alloc(1, 16), 0x8000);
    assert_eq!(mem.alloc(1, 16), 0x8010);
}

#[test]
fn need_event_holds_only_when_the_event_is_passed() {
    assert!(need_event(0, 1, 0));
    assert!(!need_event(1, 1, 0));
    assert!(!need_event(0xffff, 1, 0));
    assert!(need_event(0xffff, 0, 0xffff));
    assert!(need_event(0xffff, 3, 0xfff0));
    assert!(!need_event(3, 3, 3));
}

/// A device that gives back a head, for tests of the driver's side.
fn use_head(ring: &SplitRing, idx: u16, head: u32, len: u32) {
    let entry = ring.addrs.used + 4 + 8 * u64::from(idx % ring.size);
    ring.mem().store_u32(entry, head, Ordering::Relaxed);
    ring.mem().store_u32(entry + 4, len, Ordering::Relaxed);
    ring.write_used_idx(idx.wrapping_add(1));
}

#[test]
fn ring_lays_out_chains_as_the_specification_says() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::starting_at(&mem, 4, 0xffff);

    let head = ring.add(&[Buf::readable(0x11_0000, 12), Buf::writable(0x12_0000, 99)]);
    ring.publish();

    let table = mem.read(ring.addrs.desc + 16 * u64::from(head), 16);
    assert_eq!(table[..12], [0, 0, 0x11, 0, 0, 0, 0, 0, 12, 0, 0, 0]);
    assert_eq!(table[12..14], [1, 0], "NEXT");
    let next = u64::from(table[14]);
    let second = mem.read(ring.addrs.desc + 16 * next, 16);
    assert_eq!(second[8..14], [99, 0, 0, 0, 2, 0], "WRITE");
    let avail = mem.read(ring.addrs.avail, 14);
    assert_eq!(avail[2..4], [0, 0], "The index has wrapped");
    assert_eq!(avail[10], head as u8, "Entry 3");
}

#[test]
fn ring_gives_descriptors_back_once() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::new(&mem, 4);
    let first = ring.add(&[Buf::readable(0x11_0000, 1); 2]);
    let second = ring.add_indirect(&[Buf::readable(0x11_0000, 1); 3]);
    assert_eq!(ring.free_descriptors(), 1);
    assert_eq!(ring.try_add(&[Buf::readable(0x11_0000, 1); 2]), None);

    use_head(&ring, 0, second.into(), 5);
    assert_eq!(ring.take_used(), Some((second, 5)));
    use_head(&ring, 1, first.into(), 0);
    assert_eq!(ring.take_used(), Some((first, 0)));

    assert_eq!(ring.free_descriptors(), 4);
    assert_eq!(ring.out_of_order(), 1);
    assert_eq!(ring.take_used(), None);
}

#[test]
#[should_panic(expected = "returned head 0, which it does not have")]
fn head_that_comes_back_twice_panics() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::new(&mem, 4);
    ring.add(&[Buf::readable(0x11_0000, 1)]);
    use_head(&ring, 0, 0, 0);
    use_head(&ring, 1, 0, 0);

    ring.take_used();
    ring.take_used();
}

#[test]
#[should_panic(expected = "used without a call")]
fn buffer_used_without_a_call_panics() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut ring = SplitRing::new(&mem, 4);
    ring.add(&[Buf::readable(0x11_0000, 1)]);
    let device = Arc::clone(&mem);
    let addrs = ring.addrs;

    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Once the driver waits: its used_event says so.
            while device.load_u16(addrs.avail + 12, Ordering::Relaxed) != 0 {
                std::thread::yield_now();
            }
            device.store_u16(addrs.used + 2, 1, Ordering::Release);
        });
        mem.store_u16(addrs.avail + 12, 7, Ordering::Relaxed);
        ring.wait_used(Duration::from_millis(300));
    });
}

#[test]
fn kicks_follow_used_flags_or_the_event_index() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let buf = [Buf::readable(0x11_0000, 1)];
    let mut ring = SplitRing::new(&mem, 8);

    ring.add(&buf);
    assert!(ring.publish_and_kick());
    mem.store_u16(ring.addrs.used, 1, Ordering::Relaxed);
    ring.add(&buf);
    assert!(!ring.publish_and_kick());

    ring.event_idx = true;
    mem.store_u16(ring.addrs.used + 4 + 8 * 8, 3, Ordering::Relaxed);
    ring.add(&buf);
    assert!(!ring.publish_and_kick(), "Index 2 is not beyond 3");
    ring.add(&buf);
    assert!(ring.publish_and_kick(), "Index 3 is awaited");
    assert_eq!(ring.kick.read().unwrap(), 2);
}

#[test]
fn control_driver_brings_a_command_and_takes_its_status() {
    let mem = Arc::new(GuestMemory::single(MIB));
    let mut driver = CtrlDriver::new(&mem, 64, 0);
    let addrs = driver.ring.addrs;
    let kick = driver.ring.kick.try_clone().unwrap();
    let call = driver.ring.call.try_clone().unwrap();

    let (status, command) = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            assert!(wait_readable(fd_of(&kick), PATIENCE));
            // The first chain of a new ring: descriptors 0 to 2.
            let addr = |desc: u64| mem.load_u64(addrs.desc + 16 * desc, Ordering::Relaxed);
            let command = [mem.read(addr(0), 2), mem.read(addr(1), 2)].concat();
            mem.write(addr(2), &[ctrl::ERR]);
            mem.store_u16(addrs.used + 2, 1, Ordering::Release);
            call.write(1).unwrap();
            command
        });
        let status = driver.command(ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[2, 0]);
        (status, device.join().unwrap())
    });

    assert_eq!(command, [4, 0, 2, 0]);
    assert_eq!(status, ctrl::ERR);
}

#[test]
fn tap_double_keeps_borders_and_blocks_when_full() {
    let (tap, device) = TapDouble::new();
    let header = VnetHdr::default();

    tap.send(&header, &[1; 60]);
    tap.send(&header, &[2; 1514]);
    let mut bytes = vec![0; 2000];
    assert_eq!(rustix::io::read(&device, &mut bytes).unwrap(), 72);
    assert_eq!(rustix::io::read(&device, &mut bytes[..100]).unwrap(), 100);
    let blocked = rustix::io::read(&device, &mut bytes);
    assert_eq!(blocked, Err(rustix::io::Errno::AGAIN));

    let fillers = tap.fill();
    let full = rustix::io::write(&device, &[0; 72]);
    assert_eq!(full, Err(rustix::io::Errno::AGAIN));
    assert!(tap.drain_fillers(fillers).is_empty());
    rustix::io::write(&device, &bytes[..72]).unwrap();
    assert_eq!(tap.recv(PATIENCE).unwrap().1.len(), 60);
}

#[test]
fn checker_tells_loss_duplication_reordering_and_corruption_apart() {
    let frame = |seq| frames::test_frame(&Ends::TX, Stamp { stream: 9, seq }, 60);
    let mut checker = Checker::new(9);
    let mut spoilt = frame(8);
    spoilt[50] ^= 1;

    for seq in [0, 1, 1, 4, 3] {
        checker.see(&frame(seq));
    }
    checker.see(&spoilt);
    checker.see(&frame(8)[..40]);
    checker.see(&frames::arp_request(&Ends::TX));

    assert_eq!(checker.lost(7), [2, 5, 6]);
    assert_eq!(checker.duplicated, 1);
    assert_eq!(checker.reordered, 1);
    assert_eq!(checker.corrupted.len(), 2);
    assert_eq!(checker.foreign, 1);
}

#[test]
fn built_frames_have_right_checksums() {
    for len in [18, 19, 1400, 1401] {
        let payload = frames::payload(Stamp { stream: 1, seq: 5 }, len);
        for frame in [
            frames::udp4(&Ends::TX, &payload, L4Csum::Full),
            frames::udp6(&Ends::TX, &payload, L4Csum::Full),
            frames::tcp4(&Ends::TX, 1, &payload, L4Csum::Full),
            frames::tcp6(&Ends::TX, 1, &payload, L4Csum::Full),
            frames::vlan(&frames::udp4(&Ends::TX, &payload, L4Csum::Full), 42),
        ] {
            assert!(frames::checksums_are_right(&frame));
            let stamp = Stamp { stream: 1, seq: 5 };
            assert_eq!(frames::find_stamp(&frame), Some(Ok(stamp)));
        }
        let partial = frames::udp4(&Ends::TX, &payload, L4Csum::Partial);
        assert!(!frames::checksums_are_right(&partial));
    }
}

#[test]
fn known_ip_header_has_its_known_checksum() {
    // The example that RFC 1071's implementers use.
    let header = [
        0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7,
    ];
    assert_eq!(!frames::checksum_add(0, &header), 0xb861);
}
