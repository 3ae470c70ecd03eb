//! The control plane: vhost-user sessions (QEMU, "Vhost-user Protocol"). Never touches a packet.
//!
//! [`session`] is one front-end connection, each message a short method; [`codec`] turns bytes and descriptors into
//! messages; [`ring`] is a ring's life from being described to being handed to its worker; [`memory`] is the set of
//! memory regions; [`listener`] is the socket that front-ends connect to.

pub mod codec;
pub mod listener;
mod memory;
mod ring;
pub mod session;
