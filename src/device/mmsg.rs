//! Moves many frames through a packet socket with one system call, and takes the VLAN tags that come beside them: with
//! `uring`, unsafe door 3.
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::stage::Job;

/// Room for the control messages of one frame: an auxdata message and some reserve.
pub(crate) const CONTROL_LEN: usize = 64;

/// A VLAN tag that the kernel took out of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanTag {
    /// 802.1Q or 802.1ad.
    pub tpid: u16,
    /// Priority and VLAN.
    pub tci: u16,
}

impl VlanTag {
    /// The tag in a frame's control messages (`PACKET_AUXDATA`, packet(7)).
    #[inline]
    pub(crate) fn from_control(control: &[u8]) -> Option<VlanTag> {
        let (header, rest) = control.split_first_chunk::<{ size_of::<libc::cmsghdr>() }>()?;
        let number = |at: usize| Some(libc::c_int::from_ne_bytes(*header.get(at..)?.first_chunk()?));
        let level = number(std::mem::offset_of!(libc::cmsghdr, cmsg_level))?;
        let kind = number(std::mem::offset_of!(libc::cmsghdr, cmsg_type))?;
        if (level, kind) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            return None;
        }
        let (status, rest) = rest.split_first_chunk()?;
        let status = u32::from_ne_bytes(*status);
        // Skips two lengths and two offsets.
        let (tci, rest) = rest.get(12..)?.split_first_chunk()?;
        let tpid = u16::from_ne_bytes(*rest.first_chunk()?);
        let has_tpid = status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
        (status & libc::TP_STATUS_VLAN_VALID != 0)
            .then(|| VlanTag { tpid: if has_tpid { tpid } else { VLAN_8021Q }, tci: u16::from_ne_bytes(*tci) })
    }
}

const VLAN_8021Q: u16 = 0x8100;

/// The arguments of the calls, kept so that nothing is allocated for a frame.
pub(super) struct Messages {
    headers: Vec<libc::mmsghdr>,
    iovecs: Vec<libc::iovec>,
    control: Vec<[u8; CONTROL_LEN]>,
}

// SAFETY: the pointers in `headers` and `iovecs` are used in the call that they were written for only.
unsafe impl Send for Messages {}

impl Messages {
    /// Room for `count` frames in one call.
    pub(super) fn new(count: usize) -> Messages {
        Messages {
            headers: Vec::with_capacity(count),
            iovecs: Vec::with_capacity(count),
            control: vec![[0; CONTROL_LEN]; count],
        }
    }

    /// Reads a frame for each of `jobs` into its bytes of `memory`, until there is none.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>, memory: &mut [u8], jobs: &mut [Job]) {
        self.point(jobs, |bytes| piece(memory, bytes));
        for (message, control) in self.headers.iter_mut().zip(&mut self.control) {
            message.msg_hdr.msg_control = control.as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = CONTROL_LEN as _;
        }
        let headers = self.headers.as_mut_ptr();
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: each header names one iovec of `iovecs` and one array of `control`, different ones, alive and not otherwise
        // used until the call returns; the iovecs lie in different slots of `memory`, borrowed mutably.
        let count =
            unsafe { libc::recvmmsg(socket.as_raw_fd(), headers, self.count(), flags as _, std::ptr::null_mut()) };
        self.note(jobs, count);
        for ((job, message), control) in jobs.iter_mut().zip(&self.headers).zip(&self.control) {
            let len = message.msg_hdr.msg_controllen;
            job.tag = job.result.ok().and_then(|_| VlanTag::from_control(control.get(..len)?));
        }
    }

    /// Writes the bytes of each of `jobs`, until one is refused.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, memory: &mut [u8], jobs: &mut [Job]) {
        self.point(jobs, |bytes| piece(memory, bytes));
        let headers = self.headers.as_mut_ptr();
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: each header names one iovec of `iovecs`, which lies in `memory`, borrowed until the call returns.
        let count = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers, self.count(), flags as _) };
        self.note(jobs, count);
    }

    /// Makes a header for each of `jobs`.
    fn point(&mut self, jobs: &[Job], mut piece: impl FnMut(Range<usize>) -> libc::iovec) {
        self.iovecs.clear();
        self.headers.clear();
        self.iovecs.extend(jobs.iter().map(|job| piece(job.bytes.clone())));
        self.headers.extend(self.iovecs.iter_mut().map(|iovec| {
            // SAFETY: all zeros is a valid mmsghdr: null pointers and lengths of 0.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = iovec;
            message.msg_hdr.msg_iovlen = 1;
            message
        }));
    }

    fn count(&self) -> libc::c_uint {
        self.headers.len() as libc::c_uint
    }

    /// Notes the result of each job. `count` of them were done; if the call failed, no job was, and the first one gets
    /// the error.
    fn note(&self, jobs: &mut [Job], count: libc::c_int) {
        let Ok(count) = usize::try_from(count) else {
            let error = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
            return jobs.iter_mut().take(1).for_each(|job| job.result = Err(error));
        };
        for (job, message) in jobs.iter_mut().zip(&self.headers).take(count) {
            job.result = Ok(message.msg_len as usize);
        }
    }
}

/// Some of the bytes, if there are such.
fn piece(memory: &mut [u8], bytes: Range<usize>) -> libc::iovec {
    let bytes = memory.get_mut(bytes).unwrap_or_default();
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(level: libc::c_int, kind: libc::c_int, status: u32) -> Vec<u8> {
        let len = (size_of::<libc::cmsghdr>() + 20) as u64;
        let mut bytes = [&len.to_ne_bytes()[..], &level.to_ne_bytes(), &kind.to_ne_bytes()].concat();
        bytes.extend([status.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat());
        bytes.extend([5_u16.to_ne_bytes(), 0x88a8_u16.to_ne_bytes()].concat());
        bytes
    }

    #[test]
    fn tag_is_told_where_there_is_one() {
        let both = libc::TP_STATUS_VLAN_VALID | libc::TP_STATUS_VLAN_TPID_VALID;
        let from = |status| VlanTag::from_control(&control(libc::SOL_PACKET, libc::PACKET_AUXDATA, status));
        assert_eq!(from(both), Some(VlanTag { tpid: 0x88a8, tci: 5 }));
        assert_eq!(from(libc::TP_STATUS_VLAN_VALID), Some(VlanTag { tpid: VLAN_8021Q, tci: 5 }));
        assert_eq!(from(0), None);
        assert_eq!(VlanTag::from_control(&control(libc::SOL_SOCKET, libc::PACKET_AUXDATA, both)), None);
        let whole = control(libc::SOL_PACKET, libc::PACKET_AUXDATA, both);
        assert!((0..whole.len()).all(|len| VlanTag::from_control(&whole[..len]).is_none()));
    }
}
