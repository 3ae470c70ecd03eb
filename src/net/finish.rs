//! May the guest have this frame? [`judge`] answers that for every frame from the device, whether it was read straight
//! into the guest's buffers or into private memory. A frame in private memory can be finished ([`finish`]): its
//! checksum is completed, or `segment` plans how it is cut.

use std::sync::Arc;

use super::features::GuestOffloads;
use super::filter::{FILTER_LEN, RxFilter};
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

/// Whether the guest may have a frame that is not dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may, with the virtio-net header as that stands now.
    Deliver,
    /// Not before its checksum or segmentation is done, which the guest did not negotiate to do.
    Unfinished,
}

/// Judges a frame of `len` bytes by its virtio-net header and by its start, which `copy_start` copies. Leaves in the header
/// only what the guest negotiated.
///
/// # Errors
/// Why the frame is to be dropped.
#[inline]
pub(super) fn judge(
    header: &mut [u8; HEADER_LEN],
    len: usize,
    admission: &Admission,
    copy_start: impl Fn(&mut [u8]),
) -> Result<Verdict, Reason> {
    if !admission.filter.passes_all() {
        let mut start = [0; FILTER_LEN];
        copy_start(start.get_mut(..len.min(FILTER_LEN)).unwrap_or_default());
        if !admission.filter.accepts(&start) {
            return Err(|c| &c.rx_drop_filtered);
        }
    }
    // Most headers ask for nothing.
    if *header == [0; HEADER_LEN] {
        return Ok(Verdict::Deliver);
    }
    judge_header(header, len, admission.offloads, copy_start)
}

/// The part of [`judge`] for a frame that passed the filter and whose header asks for something.
#[inline(never)]
fn judge_header(
    header: &mut [u8; HEADER_LEN],
    len: usize,
    offloads: GuestOffloads,
    copy_start: impl Fn(&mut [u8]),
) -> Result<Verdict, Reason> {
    let said = VnetHeader::from_bytes(header);
    if said.is_gso() {
        let mut start = [0; PROTOCOL_HEADERS_MAX];
        let start = start.get_mut(..len.min(PROTOCOL_HEADERS_MAX)).unwrap_or_default();
        copy_start(start);
        if is_of_tunnel(said, start) {
            return Err(|c| &c.rx_drop_tunnel);
        }
    }
    let checked = check_rx_in_place(header, offloads);
    Ok(checked.map_or(Verdict::Unfinished, |()| Verdict::Deliver))
}

/// How a frame became one that the guest may have.
pub(super) enum Finish {
    /// It was one already.
    Nothing,
    /// Its checksum was completed.
    Done,
    /// Not yet: it has to be cut.
    Cut(Plan),
}

/// Finishes a frame in place, its virtio-net header before it, or finds how it is to be cut.
///
/// # Errors
/// Why the frame is to be dropped.
#[inline]
pub(super) fn finish(bytes: &mut [u8], admission: &Admission) -> Result<Finish, Reason> {
    let Some((header, frame)) = bytes.split_first_chunk_mut::<HEADER_LEN>() else { return Err(|c| &c.rx_drop_short) };
    let copy_start = |out: &mut [u8]| out.iter_mut().zip(&*frame).for_each(|(to, from)| *to = *from);
    match judge(header, frame.len(), admission, copy_start)? {
        Verdict::Deliver => Ok(Finish::Nothing),
        Verdict::Unfinished => finish_unfinished(header, frame, admission.offloads),
    }
}

#[inline(never)]
fn finish_unfinished(
    header: &mut [u8; HEADER_LEN],
    frame: &mut [u8],
    offloads: GuestOffloads,
) -> Result<Finish, Reason> {
    let said = VnetHeader::from_bytes(header);
    let finished = match plan(said, frame, offloads) {
        Ok(Need::Segmentation(plan)) => return Ok(Finish::Cut(plan)),
        Ok(Need::Checksum) => complete_checksum(said, frame),
        Err(NotNegotiated) => Err(NotNegotiated),
    };
    let finished = finished.map_err(|NotNegotiated| -> Reason { |c| &c.rx_drop_not_negotiated })?;
    *header = finished.to_bytes();
    Ok(Finish::Done)
}

#[cfg(test)]
mod tests {
    use super::super::filter::Modes;
    use super::*;
    use crate::mac::Mac;

    #[test]
    fn frame_that_is_an_ethernet_header_alone_is_filtered_by_its_address() {
        const OWN: Mac = [2, 0, 0, 0, 0, 1];
        let filter = RxFilter { modes: Modes::default(), mac: Some(OWN), ..RxFilter::default() };
        let admission = Admission { filter: Arc::new(filter), ..Admission::default() };
        let mut to_another = [&[0; HEADER_LEN][..], &[2; 14]].concat();
        assert!(finish(&mut to_another, &admission).is_err());
        let mut to_own = [&[0; HEADER_LEN][..], &OWN, &[2; 8]].concat();
        assert!(matches!(finish(&mut to_own, &admission), Ok(Finish::Nothing)));
    }
}
