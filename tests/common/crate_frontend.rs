//! The front-end that cloud-hypervisor uses, `vhost::vhost_user::Frontend`, in the order in which it uses it.

use std::os::fd::AsRawFd;
use std::path::Path;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{Result, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::frontend::{Negotiated, SessionSpec};
use super::memory::Region;
use super::split_ring::SplitRing;
use super::virtio::{feature, protocol};

/// A started session of the `vhost` crate's front-end. It ends when dropped.
pub struct CrateFrontend {
    pub frontend: Frontend,
    pub negotiated: Negotiated,
    rings: usize,
}

impl CrateFrontend {
    /// Connects to `path` and starts the session.
    pub fn start(path: impl AsRef<Path>, spec: &SessionSpec<'_>) -> Result<Self> {
        let rings = spec.rings.len();
        let mut frontend = Frontend::connect(path, rings as u64)?;
        let negotiated = negotiate(&mut frontend, spec)?;
        set_up(&mut frontend, spec, negotiated.features)?;
        Ok(Self { frontend, negotiated, rings })
    }

    /// Disables and stops the rings; returns their bases.
    pub fn stop(&mut self) -> Result<Vec<u32>> {
        (0..self.rings)
            .map(|index| {
                self.frontend.set_vring_enable(index, false)?;
                self.frontend.get_vring_base(index)
            })
            .collect()
    }
}

fn negotiate(frontend: &mut Frontend, spec: &SessionSpec<'_>) -> Result<Negotiated> {
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    let mut negotiated = Negotiated { offered, features: offered & spec.features, ..Negotiated::default() };
    if offered & feature::PROTOCOL_FEATURES == 0 {
        return Ok(negotiated);
    }
    negotiated.protocol_offered = frontend.get_protocol_features()?.bits();
    negotiated.protocol = negotiated.protocol_offered & spec.protocol;
    frontend.set_protocol_features(VhostUserProtocolFeatures::from_bits_truncate(negotiated.protocol))?;
    if negotiated.protocol & protocol::REPLY_ACK != 0 {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if negotiated.protocol & protocol::MQ != 0 {
        negotiated.queue_num = Some(frontend.get_queue_num()?);
    }
    Ok(negotiated)
}

fn set_up(frontend: &mut Frontend, spec: &SessionSpec<'_>, features: u64) -> Result<()> {
    frontend.set_features(features)?;
    let regions: Vec<_> = spec.mem.regions().iter().map(region_info).collect();
    frontend.set_mem_table(&regions)?;
    for (index, ring) in spec.rings.iter().enumerate() {
        frontend.set_vring_num(index, ring.size)?;
    }
    for (index, ring) in spec.rings.iter().enumerate() {
        frontend.set_vring_addr(index, &vring_config(ring))?;
        frontend.set_vring_base(index, ring.base)?;
        frontend.set_vring_call(index, &ring.call)?;
        frontend.set_vring_kick(index, &ring.kick)?;
    }
    for index in 0..spec.rings.len() {
        frontend.set_vring_enable(index, true)?;
    }
    Ok(())
}

/// A region in the crate's words.
pub fn region_info(region: &Region) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.info.guest,
        memory_size: region.info.size,
        userspace_addr: region.info.user,
        mmap_offset: region.info.offset,
        mmap_handle: region.fd().as_raw_fd(),
    }
}

/// A ring's place in the crate's words.
pub fn vring_config(ring: &SplitRing) -> VringConfigData {
    let user = |addr| ring.mem().user_addr(addr);
    VringConfigData {
        queue_max_size: ring.size,
        queue_size: ring.size,
        flags: 0,
        desc_table_addr: user(ring.addrs.desc),
        used_ring_addr: user(ring.addrs.used),
        avail_ring_addr: user(ring.addrs.avail),
        log_addr: None,
    }
}
