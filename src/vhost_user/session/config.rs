//! A session's messages about the configuration space, both ways.

use std::os::fd::OwnedFd;

use rustix::net::{SendFlags, send};
use vhost::vhost_user::message::{BackendReq, VhostUserConfig, VhostUserProtocolFeatures as Protocol};

use super::payload::record;
use super::refusal::Refusal;
use super::{Answer, Handled, Session};
use crate::net::config_space::LinkShown;
use crate::vhost_user::codec;
use crate::vhost_user::ring::Ring;

/// Whether a front-end is told of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It was told.
    Now,
    /// It will be told, when a ring runs.
    Later,
    /// It cannot be told, or does not take the message.
    Never,
}

impl Session {
    pub(super) fn get_config(&mut self, payload: &[u8]) -> Handled {
        let head_len = size_of::<VhostUserConfig>();
        let expected = Refusal::PayloadLength { got: payload.len(), expected: head_len };
        let head = payload.get(..head_len).ok_or(expected)?;
        let config: VhostUserConfig = record(head)?;
        let (offset, size) = (config.offset, config.size);
        let what = "Configuration space offset";
        let shown = if self.takes_config_changes() { LinkShown::AsItIs } else { LinkShown::Up };
        let bytes =
            self.nic.read_config(offset, size, shown).ok_or(Refusal::Range { what, value: u64::from(offset) })?;
        let mut answer = [head, &bytes].concat();
        // "Payload size MUST match" the request's; some front-ends (User Mode Linux) send no room for the bytes.
        answer.resize(answer.len().max(payload.len()), 0);
        Ok(Answer::Payload(answer))
    }

    /// Whether the front-end can be told of changes of the configuration space.
    fn takes_config_changes(&self) -> bool {
        self.protocol.contains(Protocol::CONFIG | Protocol::BACKEND_REQ) && self.backend_channel.is_some()
    }

    /// Tells the front-end that the configuration space changed (vhost-user, `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`),
    /// or leaves that until a ring runs: before that, nothing may be sent (vhost-user, "Suspended device state").
    pub fn tell_config_change(&mut self) -> Told {
        let Some(channel) = self.backend_channel.as_ref().filter(|_| self.takes_config_changes()) else {
            return Told::Never;
        };
        self.owes_config_change = !self.slots.iter().any(|slot| matches!(slot.ring, Ring::Started(_)));
        if self.owes_config_change {
            return Told::Later;
        }
        let message = codec::request_of_ours(BackendReq::CONFIG_CHANGE_MSG.into());
        match send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => Told::Now,
            Err(_) => Told::Never,
        }
    }

    /// Sends the message that had to wait, now that a ring runs.
    pub(super) fn tell_what_is_owed(&mut self) {
        if self.owes_config_change {
            self.tell_config_change();
        }
    }

    pub(super) fn set_backend_channel(&mut self, fds: Vec<OwnedFd>) -> Handled {
        let [channel] =
            <[OwnedFd; 1]>::try_from(fds).map_err(|fds| Refusal::Descriptors { got: fds.len(), expected: 1 })?;
        self.backend_channel = Some(channel);
        // The guest may have been told something else before, by a process that is gone or while there was no channel.
        self.tell_config_change();
        Ok(Answer::Done)
    }
}
