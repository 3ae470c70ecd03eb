//! What a hostile guest, front-end or host may do, listed case by case, and the tests of those that stand nowhere else.
//!
//! * [`list`]: all cases, with what is wanted; [`table`]: whether each has its tests, and what became of them;
//! * [`stream`], [`memory`], [`rings`]: front-end and guest, with the back-end in this process;
//! * [`process`], [`outlived`], [`successor`]: the real binary: what it holds, costs and logs, what it lives through, and
//!   the next one after its end;
//! * [`confined`]: what no thread of it may be made to do;
//! * [`source`]: what the source itself must not have.
//!
//! Most cases are tested where their matter is (`session`, `chain_faults`, `header`, `tap`, …), by tests with the case's
//! id in their documentation. What takes long is done less often than it was meant, unless `VHOST_USER_NET_FULL=1`.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod confined;
mod list;
mod memory;
mod outlived;
mod process;
mod rings;
mod source;
mod stream;
mod successor;
mod table;
