//! Messages of the vhost-user protocol as values: one constructor for each that a net front-end sends.
//!
//! A message is plain bytes and file descriptors, and every part of it can be made wrong before it is sent.
//! Encoded by hand from QEMU's `docs/interop/vhost-user.rst`, to be independent of any library.

use std::os::fd::BorrowedFd;

use super::memory::{GuestMemory, Region, RegionInfo};
use super::split_ring::SplitRing;

/// Request numbers ("Front-end message types").
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const SET_VRING_ENDIAN: u32 = 23;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const POSTCOPY_ADVISE: u32 = 28;
    pub const POSTCOPY_LISTEN: u32 = 29;
    pub const POSTCOPY_END: u32 = 30;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Header flags ("Header").
pub mod flag {
    pub const VERSION: u32 = 1;
    pub const REPLY: u32 = 1 << 2;
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// `SET_VRING_ADDR`'s flag: log writes to the used ring.
pub const VRING_F_LOG: u32 = 1;

/// "There is no file descriptor" in the messages for a ring's eventfds.
pub const NO_FD: u64 = 1 << 8;

pub const HEADER_LEN: usize = 12;

#[derive(Clone, Debug)]
pub struct Message<'fd> {
    pub request: u32,
    pub flags: u32,
    /// What the header says; the body may be another size.
    pub size: u32,
    pub body: Vec<u8>,
    pub fds: Vec<BorrowedFd<'fd>>,
}

impl<'fd> Message<'fd> {
    /// Any request with any body.
    pub fn new(request: u32, body: Vec<u8>) -> Self {
        Self { request, flags: flag::VERSION, size: body.len() as u32, body, fds: Vec::new() }
    }

    pub fn with_fd(mut self, fd: BorrowedFd<'fd>) -> Self {
        self.fds.push(fd);
        self
    }

    pub fn with_fds(mut self, fds: impl IntoIterator<Item = BorrowedFd<'fd>>) -> Self {
        self.fds.extend(fds);
        self
    }

    pub fn without_fds(mut self) -> Self {
        self.fds.clear();
        self
    }

    /// Asks for an answer.
    pub fn with_need_reply(self) -> Self {
        let flags = self.flags | flag::NEED_REPLY;
        self.with_flags(flags)
    }

    pub fn with_flags(self, flags: u32) -> Self {
        Self { flags, ..self }
    }

    /// Lies about the body's size.
    pub fn with_size(self, size: u32) -> Self {
        Self { size, ..self }
    }

    /// Sends `body` in place of the right one, with its right size.
    pub fn with_body(self, body: Vec<u8>) -> Self {
        Self { size: body.len() as u32, body, ..self }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = words32(&[self.request, self.flags, self.size]);
        bytes.extend(&self.body);
        bytes
    }

    // Session.

    pub fn get_features() -> Self {
        Self::new(request::GET_FEATURES, Vec::new())
    }

    pub fn set_features(features: u64) -> Self {
        Self::u64(request::SET_FEATURES, features)
    }

    pub fn get_protocol_features() -> Self {
        Self::new(request::GET_PROTOCOL_FEATURES, Vec::new())
    }

    pub fn set_protocol_features(features: u64) -> Self {
        Self::u64(request::SET_PROTOCOL_FEATURES, features)
    }

    pub fn set_owner() -> Self {
        Self::new(request::SET_OWNER, Vec::new())
    }

    pub fn reset_owner() -> Self {
        Self::new(request::RESET_OWNER, Vec::new())
    }

    pub fn get_queue_num() -> Self {
        Self::new(request::GET_QUEUE_NUM, Vec::new())
    }

    pub fn get_max_mem_slots() -> Self {
        Self::new(request::GET_MAX_MEM_SLOTS, Vec::new())
    }

    pub fn reset_device() -> Self {
        Self::new(request::RESET_DEVICE, Vec::new())
    }

    pub fn get_status() -> Self {
        Self::new(request::GET_STATUS, Vec::new())
    }

    pub fn set_status(status: u8) -> Self {
        Self::u64(request::SET_STATUS, status.into())
    }

    pub fn set_backend_req_fd(fd: BorrowedFd<'fd>) -> Self {
        Self::new(request::SET_BACKEND_REQ_FD, Vec::new()).with_fd(fd)
    }

    /// Hands over the end of a pipe for the device's state: `direction` 0 to save, 1 to load.
    pub fn set_device_state_fd(direction: u32, fd: BorrowedFd<'fd>) -> Self {
        const PHASE_STOPPED: u32 = 0;
        let body = words32(&[direction, PHASE_STOPPED]);
        Self::new(request::SET_DEVICE_STATE_FD, body).with_fd(fd)
    }

    pub fn check_device_state() -> Self {
        Self::new(request::CHECK_DEVICE_STATE, Vec::new())
    }

    // Net.

    pub fn set_mtu(mtu: u64) -> Self {
        Self::u64(request::NET_SET_MTU, mtu)
    }

    pub fn send_rarp(mac: [u8; 6]) -> Self {
        let mut bytes = [0; 8];
        bytes[..6].copy_from_slice(&mac);
        Self::u64(request::SEND_RARP, u64::from_le_bytes(bytes))
    }

    /// Asks for `size` bytes of the configuration space; the room for them goes along, zeroed.
    pub fn get_config(offset: u32, size: u32) -> Self {
        let mut body = words32(&[offset, size, 0]);
        body.resize(12 + size as usize, 0);
        Self::new(request::GET_CONFIG, body)
    }

    pub fn set_config(offset: u32, flags: u32, bytes: &[u8]) -> Self {
        let mut body = words32(&[offset, bytes.len() as u32, flags]);
        body.extend(bytes);
        Self::new(request::SET_CONFIG, body)
    }

    // Memory.

    /// The whole of `mem`.
    pub fn set_mem_table(mem: &'fd GuestMemory) -> Self {
        Self::set_mem_table_of(mem.regions())
    }

    pub fn set_mem_table_of(regions: &'fd [Region]) -> Self {
        let infos: Vec<RegionInfo> = regions.iter().map(|region| region.info).collect();
        Self::set_mem_table_claiming(&infos).with_fds(regions.iter().map(Region::fd))
    }

    /// A table without file descriptors; add them with [`Message::with_fds`].
    pub fn set_mem_table_claiming(infos: &[RegionInfo]) -> Self {
        let mut body = words32(&[infos.len() as u32, 0]);
        for info in infos {
            body.extend(region_bytes(info));
        }
        Self::new(request::SET_MEM_TABLE, body)
    }

    pub fn add_mem_reg(region: &'fd Region) -> Self {
        Self::add_mem_reg_claiming(&region.info).with_fd(region.fd())
    }

    /// A region without a file descriptor; add one with [`Message::with_fd`].
    pub fn add_mem_reg_claiming(info: &RegionInfo) -> Self {
        Self::single_region(request::ADD_MEM_REG, info)
    }

    pub fn rem_mem_reg(info: &RegionInfo) -> Self {
        Self::single_region(request::REM_MEM_REG, info)
    }

    pub fn set_log_base(size: u64, offset: u64, fd: BorrowedFd<'fd>) -> Self {
        Self::new(request::SET_LOG_BASE, words64(&[size, offset])).with_fd(fd)
    }

    pub fn set_log_fd(fd: BorrowedFd<'fd>) -> Self {
        Self::new(request::SET_LOG_FD, Vec::new()).with_fd(fd)
    }

    // Rings.

    pub fn set_vring_num(index: u32, num: u32) -> Self {
        Self::vring_state(request::SET_VRING_NUM, index, num)
    }

    pub fn set_vring_base(index: u32, base: u32) -> Self {
        Self::vring_state(request::SET_VRING_BASE, index, base)
    }

    pub fn get_vring_base(index: u32) -> Self {
        Self::vring_state(request::GET_VRING_BASE, index, 0)
    }

    /// `enable` is a number so that it may be wrong.
    pub fn set_vring_enable(index: u32, enable: u32) -> Self {
        Self::vring_state(request::SET_VRING_ENABLE, index, enable)
    }

    /// Where `ring` lies, in the front-end's addresses.
    pub fn set_vring_addr(index: u32, ring: &SplitRing) -> Self {
        Self::set_vring_addr_raw(index, &VringAddr::of(ring))
    }

    pub fn set_vring_addr_raw(index: u32, addr: &VringAddr) -> Self {
        let mut body = words32(&[index, addr.flags]);
        body.extend(words64(&[addr.desc, addr.used, addr.avail, addr.log]));
        Self::new(request::SET_VRING_ADDR, body)
    }

    pub fn set_vring_kick(index: u64, fd: BorrowedFd<'fd>) -> Self {
        Self::u64(request::SET_VRING_KICK, index).with_fd(fd)
    }

    pub fn set_vring_call(index: u64, fd: BorrowedFd<'fd>) -> Self {
        Self::u64(request::SET_VRING_CALL, index).with_fd(fd)
    }

    pub fn set_vring_err(index: u64, fd: BorrowedFd<'fd>) -> Self {
        Self::u64(request::SET_VRING_ERR, index).with_fd(fd)
    }

    /// One of the three above without an eventfd, and saying so.
    pub fn set_vring_no_fd(request: u32, index: u64) -> Self {
        Self::u64(request, index | NO_FD)
    }

    // Shapes.

    /// Any request with one 64-bit word.
    pub fn u64(request: u32, value: u64) -> Self {
        Self::new(request, words64(&[value]))
    }

    /// Any request with a ring's index and a number.
    pub fn vring_state(request: u32, index: u32, num: u32) -> Self {
        Self::new(request, words32(&[index, num]))
    }

    fn single_region(request: u32, info: &RegionInfo) -> Self {
        let mut body = words64(&[0]);
        body.extend(region_bytes(info));
        Self::new(request, body)
    }
}

/// The body of `SET_VRING_ADDR`.
#[derive(Clone, Copy, Debug)]
pub struct VringAddr {
    pub flags: u32,
    pub desc: u64,
    pub used: u64,
    pub avail: u64,
    /// Guest address of the used ring, for the dirty log.
    pub log: u64,
}

impl VringAddr {
    pub fn of(ring: &SplitRing) -> Self {
        let user = |addr| ring.mem().user_addr(addr);
        Self {
            flags: 0,
            desc: user(ring.addrs.desc),
            used: user(ring.addrs.used),
            avail: user(ring.addrs.avail),
            log: 0,
        }
    }

    /// With the used ring's writes logged.
    pub fn logged(ring: &SplitRing) -> Self {
        Self { flags: VRING_F_LOG, log: ring.addrs.used, ..Self::of(ring) }
    }
}

fn region_bytes(info: &RegionInfo) -> Vec<u8> {
    words64(&[info.guest, info.size, info.user, info.offset])
}

fn words32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
