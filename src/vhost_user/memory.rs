//! The set of memory regions that a front-end has handed over, changed region by region or as a whole.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;

use crate::memory::{MapError, MemView, Region, RegionSetup};

/// The most regions at a time. A constant: QEMU gives up if the answer to `GET_MAX_MEM_SLOTS` ever falls.
pub(super) const MEMORY_SLOTS: usize = 509;

/// Why a change of the set is refused.
#[derive(Debug, Error)]
pub(in crate::vhost_user) enum MemoryError {
    /// A region is unusable.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Regions overlap.
    #[error("Memory regions overlap in guest address space")]
    Overlap,
    /// Too many regions.
    #[error("More than {MEMORY_SLOTS} memory regions")]
    TooMany,
    /// The numbers of regions and descriptors differ.
    #[error("{regions} memory regions came with {fds} descriptors")]
    Descriptors {
        /// Regions in the message.
        regions: usize,
        /// Descriptors with it.
        fds: usize,
    },
}

/// Makes a view of exactly these regions, each with its descriptor.
pub(super) fn table(setups: &[RegionSetup], fds: Vec<OwnedFd>) -> Result<MemView, MemoryError> {
    if setups.is_empty() || setups.len() != fds.len() {
        return Err(MemoryError::Descriptors { regions: setups.len(), fds: fds.len() });
    }
    let map = |(setup, fd): (&RegionSetup, OwnedFd)| Region::map(*setup, fd).map(Arc::new);
    let regions = setups.iter().zip(fds).map(map).collect::<Result<Vec<_>, _>>()?;
    MemView::new(regions).ok_or(MemoryError::Overlap)
}

/// Whether `view` has exactly this region already: QEMU 7 adds each region once for every queue pair.
pub(super) fn has(view: &MemView, setup: RegionSetup) -> bool {
    view.regions().iter().any(|region| *region.setup() == setup)
}

/// The regions of `view` and one more.
pub(super) fn with(view: &MemView, setup: RegionSetup, fds: Vec<OwnedFd>) -> Result<MemView, MemoryError> {
    if view.regions().len() >= MEMORY_SLOTS {
        return Err(MemoryError::TooMany);
    }
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| MemoryError::Descriptors { regions: 1, fds: fds.len() })?;
    let added = Arc::new(Region::map(setup, fd)?);
    MemView::new(view.regions().iter().cloned().chain([added]).collect()).ok_or(MemoryError::Overlap)
}

/// The regions of `view` without this one; `None` if it is not there.
pub(super) fn without(view: &MemView, setup: RegionSetup) -> Result<Option<MemView>, MemoryError> {
    let key = |region: &RegionSetup| (region.guest, region.user, region.size);
    let left: Vec<_> = view.regions().iter().filter(|r| key(r.setup()) != key(&setup)).cloned().collect();
    if left.len() == view.regions().len() {
        return Ok(None);
    }
    MemView::new(left).map(Some).ok_or(MemoryError::Overlap)
}
