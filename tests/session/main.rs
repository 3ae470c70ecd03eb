//! Sessions with the back-end in this process: what front-ends send, right and wrong, and what comes back.
//!
//! * [`orders`]: the message orders of real front-ends, session after session, who is served;
//! * [`answers`]: how single questions are answered, as front-ends are known to need it;
//! * [`card`]: what concerns the network card: MTU, RARP, status, reset, configuration space;
//! * [`dirty_log`]: which pages were written, for a guest that moves to another host;
//! * [`comebacks`]: rings that come back: after their memory, after being disabled;
//! * [`hostile_stream`], [`hostile_negotiation`], [`hostile_memory`], [`hostile_rings`], [`hostile_descriptors`]: what a
//!   broken or hostile front-end sends, case by case, each followed by a good frame.
//!
//! A test's name is what happens; the numbers in the tables (U-04 …) only tell cases apart.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod card;
mod comebacks;
mod dirty_log;
mod hostile_descriptors;
mod hostile_memory;
mod hostile_negotiation;
mod hostile_rings;
mod hostile_stream;
mod orders;
