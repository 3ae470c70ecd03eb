//! What the fuzz targets share: the test kit, a reader of inputs ([`input`]), a guest ([`guest`]), and models of what the
//! library must do, written from the specification and sharing no code with it ([`chain_model`], [`header_model`]).
//!
//! A target is a file in `fuzz_targets/`. It reads its input as a scenario, runs shipped code on it and compares with a
//! model; what it finds is a panic, or a report of AddressSanitizer. `seeds.rs` writes the first inputs.
// An oracle fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

pub mod card;
pub mod chain_model;
pub mod guest;
pub mod header_model;
pub mod input;
pub mod scenario;

/// The part of the test kit that needs no front-end or back-end around it.
#[path = "../../tests/common"]
#[allow(dead_code, reason = "each target uses a part of it")]
pub mod kit {
    pub mod device_side;
    pub mod driver;
    pub mod frames;
    pub mod frontend;
    pub mod memory;
    pub mod message;
    pub mod split;
    pub mod split_ring;
    pub mod tap_double;
    pub mod virtio;
    mod waiting;

    pub use waiting::{PATIENCE, QUIET, fd_of, wait_for, wait_readable};
}

/// What the standard library does before `main`, which a fuzz target has none of.
pub fn ignore_broken_pipes() {
    // SAFETY: no handler is set, so none can run in the middle of anything.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
