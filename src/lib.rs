//! A vhost-user network back-end.
#![deny(unsafe_code)]

pub mod device;
pub mod memory;
pub mod metrics;
pub mod net;
pub mod virtqueue;
