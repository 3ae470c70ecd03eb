//! The guest that all targets share: its memory is made once and filled anew for each input.
//!
//! ```text
//!   START          DATA              SECOND         HOLE        THIRD       END
//!     │ rings, tables │ buffers         │ buffers     ┆           │ buffers  │
//!     └─── region 1 ────────────────────┴── region 2 ─┘           └ region 3 ┘
//! ```
//!
//! Regions 1 and 2 are neighbours for the guest and apart for the host.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use vhost_user_net::memory::MemView;

use crate::kit::device_side::view_of;
use crate::kit::memory::{GuestMemory, RegionSpec};

pub const START: u64 = 0x10_0000;
pub const DATA: u64 = START + 0x4000;
pub const SECOND: u64 = START + 0x1_0000;
pub const HOLE: u64 = SECOND + 0x1_0000;
pub const THIRD: u64 = HOLE + 0x1_0000;
pub const END: u64 = THIRD + 0x4000;

/// What memory is filled with, so that a stray write shows.
const CANARY: u8 = 0xca;

pub struct Guest {
    pub mem: Arc<GuestMemory>,
    pub view: Arc<MemView>,
}

/// The guest, with nothing in its memory but canaries.
pub fn fresh() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    let guest = GUEST.get_or_init(|| {
        let spec = |start, end, file| RegionSpec::new(start, (end - start) as usize).in_file(file, 0);
        let specs = [spec(START, SECOND, 0), spec(SECOND, HOLE, 1), spec(THIRD, END, 2)];
        let mem = Arc::new(GuestMemory::new(&specs));
        let view = view_of(&mem);
        Guest { mem, view }
    });
    guest.mem.fill(START, (HOLE - START) as usize, CANARY);
    guest.mem.fill(THIRD, (END - THIRD) as usize, CANARY);
    guest
}

/// Whether all of `addr .. addr + len` is guest memory.
pub fn has(addr: u64, len: u64) -> bool {
    let within = |range: Range<u64>| addr >= range.start && addr.checked_add(len).is_some_and(|end| end <= range.end);
    within(START..HOLE) || within(THIRD..END)
}

/// Panics if anything was written but in `allowed` since memory was fresh.
pub fn assert_canaries_but(mem: &GuestMemory, allowed: &[Range<u64>]) {
    const PAGE: usize = 4096;
    for region in mem.regions() {
        let now = mem.read(region.info.guest, region.info.size as usize);
        // A page at a time: it is most of what a short input costs.
        for (page, bytes) in now.chunks(PAGE).enumerate().filter(|(_, bytes)| **bytes != [CANARY; PAGE]) {
            for at in (0..PAGE).filter(|at| bytes[*at] != CANARY) {
                let addr = region.info.guest + (page * PAGE + at) as u64;
                assert!(allowed.iter().any(|range| range.contains(&addr)), "a byte was written at {addr:#x}");
            }
        }
    }
}
