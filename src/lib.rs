//! A vhost-user network back-end: connects a virtual machine's virtio-net card to a network interface of the host, from
//! a process of its own.
//!
//! On one side, a virtual machine monitor hands over the guest's memory, the addresses of the virtqueues and an eventfd
//! pair (kick, call) for each, over a Unix socket (vhost-user). On the other side is a TAP or another interface. One
//! worker thread for each queue pair moves frames between the two. The guest is an enemy; the front-end is trusted
//! little.
//!
//! rx and tx are the guest's everywhere: tx leaves the guest.
//!
//! | module | job |
//! |---|---|
//! | [`cli`], [`config`] | the command line as typed; the checked configuration made of it |
//! | [`inherited`] | descriptors that the process was started with |
//! | [`daemon`] | the control thread: accept, serve, end; [`host_side`]: the host's interface as chosen |
//! | [`vhost_user`] | the control plane: sessions, messages, rings that are being described; never a packet |
//! | [`nic`] | the card: what outlives sessions, which thread runs which ring; [`card_config`]: its configuration |
//! | [`worker`], [`control_queue`] | the threads; [`mailbox`]: talking to them; [`running_ring`]: what they run |
//! | [`net`] | the virtio-net device: features, headers, frames each way; no sockets, threads or messages |
//! | [`virtqueue`] | rings and descriptor chains; no networking |
//! | [`memory`], [`notify`], [`mac`] | guest memory; kicks and calls; MAC addresses |
//! | [`device`] | the host's interface; no virtio |
//! | [`tuning`] | what an operator may choose about how frames are moved; [`busy_poll`]: how long a worker polls |
//! | [`metrics`], [`log_lines`] | counters; log lines, which never make a thread wait |
//! | [`sandbox`] | the rights that the process gives up once everything is open |
#![deny(unsafe_code)]

pub mod busy_poll;
pub mod card_config;
pub mod cli;
pub mod config;
pub mod control_queue;
pub mod daemon;
pub mod device;
mod device_slot;
mod epoll;
pub mod host_side;
pub mod inherited;
pub mod log_lines;
pub mod mac;
pub mod mailbox;
pub mod memory;
pub mod metrics;
pub mod net;
pub mod nic;
pub mod notify;
pub mod running_ring;
pub mod sandbox;
mod throttle;
pub mod tuning;
pub mod vhost_user;
pub mod virtqueue;
pub mod worker;

use std::error::Error;
use std::fmt;

/// Shows an error and its causes on one line.
pub fn error_chain<'a>(error: &'a (dyn Error + 'a)) -> impl fmt::Display + 'a {
    ErrorChain(error)
}

struct ErrorChain<'a>(&'a (dyn Error + 'a));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
