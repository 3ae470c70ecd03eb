use super::*;

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, len).expect("ftruncate");
    fd
}

fn setup(guest: u64, size: u64, file_offset: u64) -> RegionSetup {
    RegionSetup { guest, user: guest + 0x7000_0000, size, file_offset }
}

fn region(guest: u64, size: u64) -> Arc<Region> {
    Arc::new(Region::map(setup(guest, size, 0), memfd(size)).expect("map"))
}

/// A region that is not shared: it needs no file, so that Miri can follow what is done with it.
pub(crate) fn private_region(guest: u64, size: u64) -> Arc<Region> {
    let map = MmapRegion::new(size as usize).expect("map");
    let start = map.as_ptr() as usize;
    let guarded = Guarded::new(start..start + size as usize).expect("room");
    Arc::new(Region { setup: setup(guest, size, 0), guarded, map, lead: 0 })
}

#[test]
fn range_over_two_adjacent_regions_is_two_pieces() {
    let view = MemView::new(vec![region(0x3000, 0x1000), region(0x1000, 0x2000)]).expect("disjoint");
    let mut lens = Vec::new();
    view.pieces(0x2f00, 0x200, |p| lens.push(p.len())).expect("mapped");
    assert_eq!(lens, [0x100, 0x100]);
}

#[test]
fn range_into_a_hole_is_unmapped() {
    let view = MemView::new(vec![region(0x1000, 0x1000), region(0x3000, 0x1000)]).expect("disjoint");
    assert_eq!(view.read(0x1fff, &mut [0; 2]), Err(Unmapped { addr: 0x1fff, len: 2 }));
    assert!(view.read(0x1ffe, &mut [0; 2]).is_ok());
    assert!(view.read(u64::MAX, &mut [0; 2]).is_err());
    assert!(view.read(0xfff, &mut [0; 1]).is_err());
}

#[test]
fn overlapping_regions_make_no_view() {
    assert!(MemView::new(vec![region(0x1000, 0x2000), region(0x2000, 0x1000)]).is_none());
}

#[test]
fn user_address_is_translated_within_its_region_only() {
    let view = MemView::new(vec![region(0x1000, 0x1000)]).expect("one");
    assert_eq!(view.user_to_guest(0x7000_1010), Some(0x1010));
    assert_eq!(view.user_to_guest(0x7000_2000), None);
    assert_eq!(view.user_to_guest(0x1000), None);
}

#[test]
fn region_longer_than_its_file_is_refused() {
    assert!(matches!(
        Region::map(setup(0, 0x2000, 0), memfd(0x1fff)),
        Err(MapError::FileTooShort { needed: 0x2000, has: 0x1fff })
    ));
    assert!(matches!(Region::map(setup(0, 0x1000, 0x1001), memfd(0x2000)), Err(MapError::FileTooShort { .. })));
}

#[test]
fn region_at_an_unaligned_file_offset_is_mapped() {
    let fd = memfd(0x3000);
    rustix::io::pwrite(&fd, b"here", 0x1234).expect("pwrite");
    let view = MemView::new(vec![Arc::new(Region::map(setup(0x1000, 0x1000, 0x1234), fd).expect("map"))]);
    let mut got = [0; 4];
    view.expect("one").read(0x1000, &mut got).expect("mapped");
    assert_eq!(&got, b"here");
}

#[test]
fn empty_and_wrapping_regions_are_refused() {
    assert!(matches!(Region::map(setup(0x1000, 0, 0), memfd(1)), Err(MapError::Empty { guest: 0x1000 })));
    let wraps = RegionSetup { guest: u64::MAX, user: 0, size: 2, file_offset: 0 };
    assert!(matches!(Region::map(wraps, memfd(2)), Err(MapError::Wraps { .. })));
}

#[test]
fn descriptor_that_is_no_writable_file_is_refused() {
    let (pipe, _other): (OwnedFd, OwnedFd) = io::pipe().map(|(r, w)| (r.into(), w.into())).expect("pipe");
    assert!(matches!(Region::map(setup(0, 0x1000, 0), pipe), Err(MapError::NotAFile { .. })));
    let read_only = File::open("/proc/self/exe").expect("open");
    assert!(matches!(Region::map(setup(0, 0x1000, 0), read_only.into()), Err(MapError::NotWritable)));
}

/// The pages that are marked in the log in `fd`.
fn marked(fd: &OwnedFd) -> Vec<u64> {
    let mut bytes = [0; 64];
    let len = rustix::io::pread(fd, &mut bytes, 0).expect("pread") as u64;
    (0..8 * len).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1).collect()
}

#[test]
fn each_page_of_what_was_written_is_marked_as_far_as_there_are_bits() {
    let fd = memfd(2);
    let log = DirtyLog::map(2, 0, fd.try_clone().expect("dup")).expect("map");
    let pages = |addr, len| {
        log.mark(addr, len);
        let pages = marked(&fd);
        rustix::io::pwrite(&fd, &[0; 2], 0).expect("pwrite");
        pages
    };
    assert_eq!(pages(0x1000, 0), [0; 0]);
    assert_eq!(pages(0x1fff, 1), [1]);
    assert_eq!(pages(0x1fff, 2), [1, 2]);
    assert_eq!(pages(0x6000, 0x4001), [6, 7, 8, 9, 10]);
    assert_eq!(pages(0xefff, 0x10_0000), [14, 15]);
    assert_eq!(pages(0x1_0000, 1), [0; 0]);
    assert_eq!(pages(u64::MAX, u64::MAX), [0; 0]);
    assert!(log.covers(0xffff) && !log.covers(0x1_0000));
}

/// Buffers in two such regions may have become one piece.
#[test]
fn regions_side_by_side_in_our_address_space_are_logged_each_at_its_guest_address() {
    // The kernel puts a mapping below the one before it, unless another thread comes between.
    let host = |region: &Region| region.map.as_ptr() as usize;
    let pair = || [region(0x8000, 0x1000), region(0x2000, 0x1000)];
    let found = std::iter::repeat_with(pair).take(1000).find(|[a, b]| host(b) + 0x1000 == host(a));
    let [above, below] = found.expect("two mappings side by side");
    let (fd, start) = (memfd(2), host(&below));
    let log = Arc::new(DirtyLog::map(2, 0, fd.try_clone().expect("dup")).expect("map"));
    let view = MemView::new(vec![above, below]).expect("disjoint").logged(Some(log), true);
    view.log_written(start + 0xfff, 2);
    assert_eq!(marked(&fd), [2, 8]);
}
