//! What an operator may choose about how frames are moved.

use crate::busy_poll::Polling;
use crate::device::Io;
use crate::net::header::SegmentLimit;

pub use crate::net::coalesce::Coalescing;

/// How the workers move frames.
#[derive(Clone, Debug, Default)]
pub struct Tuning {
    /// How frames are read and written.
    pub io: Io,
    /// Whether frames of one flow go to the device as one.
    pub coalescing: Coalescing,
    /// Into how many segments the host may have to cut a frame of the guest.
    pub segment_limit: SegmentLimit,
    /// How long to look again before sleeping.
    pub polling: Polling,
    /// The CPUs that the workers are bound to, in turn; none for any.
    pub cpus: Vec<usize>,
}
