//! A vhost-user network back-end.
#![deny(unsafe_code)]

pub mod memory;
pub mod virtqueue;
