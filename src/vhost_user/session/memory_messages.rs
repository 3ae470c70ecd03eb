//! The messages that hand over guest memory, as a whole or region by region, and what happens to the rings in it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;

use super::payload::{region, single_region};
use super::refusal::Refusal;
use super::{Answer, Handled, Session, Slot};
use crate::memory::MemView;
use crate::vhost_user::memory;
use crate::vhost_user::ring::Ring;

impl Session {
    /// The payload may be longer than its regions need: some front-ends always send room for the most that they have.
    pub(super) fn set_mem_table(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Handled {
        let short = Refusal::PayloadLength { got: payload.len(), expected: 8 };
        let Some((head, regions)) = payload.split_first_chunk::<8>() else { return Err(short) };
        let [a, b, c, d, ..] = *head;
        let count = u32::from_ne_bytes([a, b, c, d]) as usize;
        let each = size_of::<VhostUserMemoryRegion>();
        let expected = count.saturating_mul(each);
        let regions =
            regions.get(..expected).ok_or(Refusal::PayloadLength { got: regions.len(), expected })?.chunks_exact(each);
        let setups = regions.map(region).collect::<Result<Vec<_>, _>>()?;
        let view = memory::table(&setups, fds)?;
        self.replace_memory(&view)
    }

    pub(super) fn add_mem_reg(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Handled {
        let setup = single_region(payload)?;
        if memory::has(&self.mem, setup) {
            return Ok(Answer::Done);
        }
        let view = memory::with(&self.mem, setup, fds)?;
        self.replace_memory(&view)
    }

    pub(super) fn rem_mem_reg(&mut self, payload: &[u8]) -> Handled {
        let setup = single_region(payload)?;
        // QEMU 7 removes each region once for every queue pair, too. By the second time, the first pair may have added
        // another one in its place. If the request were refused, QEMU would go on adding that for ever.
        let Some(view) = memory::without(&self.mem, setup)? else { return Ok(Answer::Done) };
        self.replace_memory(&view)
    }

    /// Gives every running ring the new view, with the present log. All workers have let go of the old one when this
    /// returns, and this thread is the last: to unmap much memory takes a while, for which no frame should wait.
    pub(super) fn replace_memory(&mut self, view: &MemView) -> Handled {
        let view = Arc::new(self.logged(view, self.features)?);
        let _former = std::mem::replace(&mut self.mem, view);
        for index in 0..self.slots.len() {
            let Some(Slot { ring: Ring::Started(started), .. }) = self.slots.get(index) else { continue };
            match started.layout.find(&self.mem) {
                Ok(found) => self.nic.relocate(index, &self.mem, found)?,
                Err(error) => self.lose_ring(index, &error)?,
            }
        }
        for index in 0..self.slots.len() {
            self.recover_ring(index)?;
        }
        Ok(Answer::Done)
    }
}
