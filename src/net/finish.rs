//! What is still to be done to a frame of the device before the guest may have it: nothing, as to most; a checksum; to be cut,
//! by a plan of `segment`; or it is dropped.

use std::sync::Arc;

use super::features::GuestOffloads;
use super::filter::RxFilter;
use super::frame::Reason;
use super::header::{HEADER_LEN, NotNegotiated, PROTOCOL_HEADERS_MAX, VnetHeader, check_rx_in_place};
use super::segment::{Need, Plan, complete_checksum, is_of_tunnel, plan};

/// Which frames may reach the guest.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    /// Unfinished ones of these kinds.
    pub offloads: GuestOffloads,
    /// Those that are for it.
    pub filter: Arc<RxFilter>,
}

/// What is still to be done to a frame before the guest may have it.
pub(super) enum Finish {
    /// It was as it should be.
    Nothing,
    /// It was done.
    Done,
    /// It has to be cut.
    Cut(Plan),
}

/// Finishes a frame in place, its virtio-net header before it, or finds how it is to be cut. Else, why it is to be dropped.
#[inline]
pub(super) fn look_at(bytes: &mut [u8], admission: &Admission) -> Result<Finish, Reason> {
    let Some((place, frame)) = bytes.split_first_chunk_mut::<HEADER_LEN>() else { return Err(|c| &c.rx_drop_short) };
    if !admission.filter.passes_all() && frame.first_chunk().is_some_and(|start| !admission.filter.accepts(start)) {
        return Err(|c| &c.rx_drop_filtered);
    }
    // Where nothing is said, as of most, nothing is to be done.
    if *place == [0; HEADER_LEN] { Ok(Finish::Nothing) } else { finish(place, frame, admission.offloads) }
}

/// The same for a frame of which its header says something.
#[inline(never)]
fn finish(place: &mut [u8; HEADER_LEN], frame: &mut [u8], offloads: GuestOffloads) -> Result<Finish, Reason> {
    let header = VnetHeader::from_bytes(place);
    if header.is_gso() && is_of_tunnel(header, frame) {
        return Err(|c| &c.rx_drop_tunnel);
    }
    if check_rx_in_place(place, offloads).is_ok() {
        return Ok(Finish::Nothing);
    }
    let finished = match plan(header, frame, offloads) {
        Ok(Need::Segmentation(plan)) => return Ok(Finish::Cut(plan)),
        Ok(Need::Checksum) => complete_checksum(header, frame),
        Ok(Need::Nothing(_)) | Err(_) => Err(NotNegotiated),
    };
    let finished = finished.map_err(|NotNegotiated| -> Reason { |c| &c.rx_drop_not_negotiated })?;
    *place = finished.to_bytes();
    Ok(Finish::Done)
}

/// Whether a frame of `len` bytes, whose start `copy_to` copies, is one of a tunnel that comes to be cut.
#[inline]
pub(super) fn is_read_of_tunnel(place: &[u8; HEADER_LEN], len: usize, copy_to: impl FnOnce(&mut [u8])) -> bool {
    let header = VnetHeader::from_bytes(place);
    if !header.is_gso() {
        return false;
    }
    let mut start = [0; PROTOCOL_HEADERS_MAX];
    let start = start.get_mut(..len.min(PROTOCOL_HEADERS_MAX)).unwrap_or_default();
    copy_to(start);
    is_of_tunnel(header, start)
}
