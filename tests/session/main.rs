//! Sessions with the back-end in this process: what front-ends send, right and wrong, and what comes back.
//!
//! * [`orders`]: the message orders of real front-ends, session after session, who is served;
//! * [`answers`]: how single questions are answered, as front-ends are known to need it;
//! * [`card`]: what concerns the network card: MTU, RARP, status, reset, configuration space;

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod card;
mod orders;
