//! Sets up the queues of a TAP, TUN or MACVTAP, however they were opened: header layout, no offloads yet, only the
//! first queue attached.
//!
//! The TUN driver's `TUNSETOFFLOAD` refuses what the kernel does not support, so offloads are found by trying. A
//! MACVTAP's refuses unknown bits only, in any combination. Both finish frames themselves whose offload was not asked
//! for, and both ignore `TUN_F_UFO` in newer kernels.

use std::io;
use std::os::fd::AsFd;

use libc::c_int;
use thiserror::Error;

use super::{
    Control, Device, DeviceKind, DeviceQueue, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4,
    TUN_F_USO6, ioctl,
};
use crate::mac::Mac;

/// Bytes of the header before each frame: `struct virtio_net_hdr_v1`.
const VNET_HEADER_LEN: c_int = 12;

/// A setting was refused.
#[derive(Debug, Error)]
#[error("Cannot set {what} on {name:?}")]
pub struct CannotSet {
    pub(super) what: &'static str,
    pub(super) name: String,
    #[source]
    pub(super) cause: io::Error,
}

/// The interface to which the queues belong, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) kind: DeviceKind,
    /// Its index, where it is in our network namespace.
    pub(super) index: Option<u32>,
    pub(super) mtu: Option<u16>,
    /// The only MAC address to which frames come, if there is one.
    pub(super) mac: Option<Mac>,
}

/// Sets up `queues`, of which there must be one at least, and makes a device of them.
pub(super) fn set_up(
    interface: Interface,
    mut queues: Vec<DeviceQueue>,
) -> Result<(Device, Vec<DeviceQueue>), CannotSet> {
    let Interface { name, kind, index, mtu, mac } = interface;
    let set = |what| {
        let name = name.clone();
        move |cause| CannotSet { what, name, cause }
    };
    let mut offloads = 0;
    let mut control = None;
    for queue in &mut queues {
        rustix::io::ioctl_fionbio(&queue.fd, true).map_err(io::Error::from).map_err(set("O_NONBLOCK"))?;
        ioctl::tun_set_vnet_header_size(queue.as_fd(), VNET_HEADER_LEN).map_err(set("the header size"))?;
        ioctl::tun_set_vnet_little_endian(queue.as_fd()).map_err(set("the header's byte order"))?;
        // A queue without a send limit never blocks.
        queue.may_block = if kind == DeviceKind::Macvtap {
            // It has a limit, which cannot be read, and would block while the card is busy.
            ioctl::tun_set_send_limit(queue.as_fd(), c_int::MAX).map_err(set("the send limit"))?;
            false
        } else {
            // It has a limit only if an operator set one.
            ioctl::tun_send_limit(queue.as_fd()).map_err(set("(read) the send limit"))? != c_int::MAX
        };
        if control.is_none() {
            queue.attach().map_err(set("the first queue to be used"))?;
            offloads = probe_offloads(queue);
            // The warning of the first queue is enough.
            queue.address = mac;
            control = Some(queue.fd.try_clone().map_err(set("up a second descriptor"))?);
        } else {
            queue.detach().map_err(set("aside a queue"))?;
        }
    }
    let control = control.ok_or_else(|| set("up a device without queues")(io::ErrorKind::InvalidInput.into()))?;
    ioctl::tun_set_offload(control.as_fd(), 0).map_err(set("offloads off"))?;
    let control = Control::Queue(control);
    Ok((Device { name, kind, index, control, offloads, mtu, mac, created: None }, queues))
}

/// The offloads that the kernel supports. Each needs the checksum; USO is set for both IP versions or for none.
fn probe_offloads(queue: &DeviceQueue) -> u32 {
    let groups = [TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO4 | TUN_F_TSO_ECN, TUN_F_UFO, TUN_F_USO4 | TUN_F_USO6];
    let takes = |flags| ioctl::tun_set_offload(queue.as_fd(), flags).is_ok();
    if !takes(TUN_F_CSUM) {
        return 0;
    }
    groups.into_iter().filter(|group| takes(TUN_F_CSUM | group)).fold(TUN_F_CSUM, |all, group| all | group)
}
