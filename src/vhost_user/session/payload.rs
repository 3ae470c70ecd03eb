//! Reads the payloads of messages as values; one of the wrong length is refused.

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::ByteValued;

use super::refusal::Refusal;
use crate::memory::RegionSetup;

pub(super) fn number(payload: &[u8]) -> Result<u64, Refusal> {
    let expected = size_of::<u64>();
    Ok(u64::from_ne_bytes(payload.try_into().map_err(|_| Refusal::PayloadLength { got: payload.len(), expected })?))
}

pub(super) fn record<T: ByteValued + Default>(payload: &[u8]) -> Result<T, Refusal> {
    let expected = size_of::<T>();
    if payload.len() != expected {
        return Err(Refusal::PayloadLength { got: payload.len(), expected });
    }
    let mut record = T::default();
    record.as_mut_slice().copy_from_slice(payload);
    Ok(record)
}

pub(super) fn region(bytes: &[u8]) -> Result<RegionSetup, Refusal> {
    let region: VhostUserMemoryRegion = record(bytes)?;
    Ok(RegionSetup {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        size: region.memory_size,
        file_offset: region.mmap_offset,
    })
}

/// `ADD_MEM_REG` and `REM_MEM_REG` have eight bytes of padding before the region.
pub(super) fn single_region(payload: &[u8]) -> Result<RegionSetup, Refusal> {
    let expected = 8 + size_of::<VhostUserMemoryRegion>();
    region(payload.get(8..).ok_or(Refusal::PayloadLength { got: payload.len(), expected })?)
}
