//! A vhost-user network back-end.
#![deny(unsafe_code)]
