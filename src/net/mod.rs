//! The virtio-net device: features, headers, configuration space, frames each way. No sockets, threads or messages.

mod backlog;
pub mod checksum;
pub mod coalesce;
pub mod config_space;
pub mod control;
pub mod features;
pub mod filter;
mod finish;
pub mod flow;
mod frame;
pub mod framing;
pub mod header;
pub mod ip_link;
mod protocol;
pub mod rarp;
pub mod rx;
pub mod segment;
pub mod tx;
mod window;

use crate::device::stage::UringPool;
use crate::device::{DeviceQueue, Io, VlanTag};
use coalesce::Coalesce;
use framing::Framing;
use header::SegmentLimit;

/// The host's side of a queue pair, and how frames are moved to and from it.
#[derive(Clone)]
pub struct Uplink<'a> {
    /// The interface's queue.
    pub device: &'a DeviceQueue,
    /// How frames are read and written.
    pub io: Io,
    /// Where batches take their io_uring instances.
    pub rings: &'a UringPool,
    /// Which protocols may be coalesced.
    pub coalesce: Coalesce,
    /// The format of frames on the device.
    pub framing: &'a Framing,
    /// The most segments that the guest may have the host make of one frame.
    pub segment_limit: SegmentLimit,
}

/// How a pass over one direction ended. All of these are ordinary ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pump {
    /// The side that frames come from has no more.
    Drained,
    /// The device takes no frame at the moment.
    DeviceBlocked,
    /// The guest has no (or not enough) buffers for the next frame.
    NoBuffers,
    /// There is more to do, after the other direction had its turn.
    BudgetSpent,
    /// The device had a failure that may be temporary.
    TryLater,
    /// The device is gone.
    DeviceLost,
}

/// Frames that one direction may move before the other has its turn: also how many completions are published at once.
pub const BUDGET: usize = 64;

/// An Ethernet header.
pub(crate) const ETH_HEADER: usize = 14;
/// Longest frame without virtio-net header: 64 KiB of IP packet behind an Ethernet header with two VLAN tags.
pub(crate) const FRAME_MAX: usize = 65_535 + ETH_HEADER + 8;
/// Frames longer than this are counted as large: an Ethernet header and the usual MTU.
pub(crate) const LARGE_FRAME: usize = 1514;
