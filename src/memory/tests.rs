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

/// A region that nobody shares: it needs no file, so that Miri can follow what is done with it.
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
