//! The log of written pages: where it is, and what is entered (vhost-user, "Migration").
//!
//! A front-end that is about to move its guest hands over a log (`SET_LOG_BASE`), and has writes to buffers logged
//! (`LOG_ALL` among the features, while rings run) and writes to each used ring (a flag of `SET_VRING_ADDR`). All of
//! this becomes part of the view of memory that the workers have. So it is in effect when the answer goes out, and by
//! then nothing writes to a log that was replaced.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserLog;

use super::payload::record;
use super::refusal::Refusal;
use super::{Answer, Handled, Session};
use crate::memory::MemView;
use crate::memory::dirty_log::DirtyLog;
use crate::net::features::LOG_ALL;

impl Session {
    /// Answers with the payload that came: front-ends wait for an answer, and take one without a size for a refusal. QEMU
    /// does not look, and reads the former log no more: after a refusal there is none, so that `LOG_ALL` is refused, too.
    pub(super) fn set_log_base(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Handled {
        self.replace_log(payload, fds).inspect_err(|_| self.log = None)
    }

    /// QEMU starts rings with `LOG_ALL` and hands over the log while they run, if it connects again during a migration,
    /// or if a guest goes on. What the rings wrote until then is in no log that QEMU reads, so all pages are marked in
    /// this one.
    fn replace_log(&mut self, payload: &[u8], fds: Vec<OwnedFd>) -> Handled {
        let VhostUserLog { mmap_size, mmap_offset } = record(payload)?;
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| Refusal::Descriptors { got: fds.len(), expected: 1 })?;
        let log = Arc::new(DirtyLog::map(mmap_size, mmap_offset, fd).map_err(Refusal::Log)?);
        check_size(&self.mem, &log)?;
        let view = Arc::new(self.mem.logged(Some(Arc::clone(&log)), false));
        for started in self.slots.iter().filter_map(|slot| slot.ring.started()) {
            started.layout.find(&view)?;
        }
        self.log = Some(Arc::clone(&log));
        log::debug!("Log of written pages: {mmap_size} bytes from {mmap_offset:#x} of its file on");
        self.renew_view()?;
        if std::mem::take(&mut self.started_before_log) {
            log.mark_all(&self.mem);
        }
        Ok(Answer::Payload(payload.to_vec()))
    }

    /// Whether the session must end after a log was refused: the front-end has writes logged, and would move a guest that
    /// lacks them.
    pub(super) fn needs_log(&self, refusal: &Refusal) -> bool {
        self.features & LOG_ALL != 0 && !matches!(refusal, Refusal::NotNegotiated(_))
    }

    /// Turns the logging of writes to buffers on or off while rings run. `bits` differ from the present features in
    /// nothing else.
    pub(super) fn set_logging(&mut self, bits: u64) -> Handled {
        // A front-end that carried on without a log would move a guest that lacks what was written meanwhile.
        if bits & LOG_ALL != 0 && self.log.is_none() {
            return Err(Refusal::NoLog);
        }
        let before = std::mem::replace(&mut self.features, bits);
        self.renew_view().inspect_err(|_| self.features = before)
    }

    /// The regions of `view` with the session's log, as it is to be with `features`.
    ///
    /// A log too small for them is let go of if nothing is entered in it at present: it is left from a migration that is
    /// over, and the next one brings its own. QEMU says the features of that one first, and the log last.
    pub(super) fn logged(&mut self, view: &MemView, features: u64) -> Result<MemView, Refusal> {
        let logs_buffers = features & LOG_ALL != 0;
        if let Some(Err(too_small)) = self.log.as_ref().map(|log| check_size(view, log)) {
            let mut started = self.slots.iter().filter_map(|slot| slot.ring.started());
            if logs_buffers && started.clone().next().is_some() {
                return Err(too_small);
            }
            if !started.any(|ring| ring.layout.addresses.logs_used_ring()) {
                self.log = None;
            }
        }
        Ok(view.logged(self.log.clone(), logs_buffers))
    }

    /// Gives the rings a view of the same memory with the present log.
    fn renew_view(&mut self) -> Handled {
        let mem = Arc::clone(&self.mem);
        self.replace_memory(&mem)
    }
}

/// Checks that each page has its bit in the log.
fn check_size(view: &MemView, log: &DirtyLog) -> Result<(), Refusal> {
    match view.last() {
        Some(last) if !log.covers(last) => Err(Refusal::LogTooSmall { last, size: log.size() }),
        _ => Ok(()),
    }
}
