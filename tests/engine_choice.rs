//! `--io`: what `auto` chooses, against the benchmark's figures, and that frames go the way that was chosen.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use vhost_user_net::device::Io;
use vhost_user_net::nic::NicSetup;
use vhost_user_net::tuning::Tuning;

use common::backend::InProcess;
use common::driver::NetDriverSpec;
use common::memory::GuestMemory;
use common::path_bench::{Bench, tx_frame};
use common::virtio::VnetHdr;
use common::{PATIENCE, skip};

/// Frames that are ready at the same time in the benchmark's cases, at the least.
const READY: usize = 16;
/// Figures that differ by less say nothing.
const NOISE: f64 = 1.05;

fn median(contender: &Value) -> f64 {
    let mut costs: Vec<f64> =
        contender["cost_ns"].as_array().unwrap().iter().map(|cost| cost.as_f64().unwrap()).collect();
    costs.sort_by(f64::total_cmp);
    costs[costs.len() / 2]
}

/// Nothing is measured: the figures are those of the last run that was committed. What fails is a choice in the source that
/// they speak against, or new figures that speak against the choice; slower code does not show before it is measured.
#[test]
fn auto_takes_the_engine_that_the_benchmark_shows_to_be_better() {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/datapath.json")).unwrap();
    let figures: Value = serde_json::from_str(&text).unwrap();
    let mut compared = 0;
    for case in figures["cases"].as_array().unwrap() {
        let of = |name: &str| {
            let contenders = case["contenders"].as_array().unwrap();
            contenders.iter().find(|contender| contender["name"] == name).map(median)
        };
        let (Some(auto), Some(uring), Some(syscall)) = (of("ours"), of("ours --io uring"), of("ours --io syscall"))
        else {
            continue;
        };
        compared += 1;
        let name = &case["name"];
        if uring.max(syscall) > NOISE * uring.min(syscall) {
            assert_eq!(Io::Auto.batches(READY), uring < syscall, "{name}: uring {uring} ns, system calls {syscall} ns");
        }
        assert!(auto <= NOISE * uring.min(syscall), "{name}: {auto} ns, uring {uring} ns, system calls {syscall} ns");
    }
    assert_eq!(compared, 4, "small frames and those of the usual MTU, each way");
    // A frame that is alone has nobody to share a batch with.
    assert!(!Io::Auto.batches(1));
}

/// How many operations of io_uring have ended in this process, by what the kernel tells of each ring that is there; `None`
/// where it tells nothing.
fn ended_in_rings() -> Option<u64> {
    let mut ended = 0;
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let fd = entry.unwrap().file_name();
        // Descriptors of other threads come and go.
        if fs::read_link(Path::new("/proc/self/fd").join(&fd)).is_ok_and(|to| to.as_os_str() == "anon_inode:[io_uring]")
        {
            let told = fs::read_to_string(Path::new("/proc/self/fdinfo").join(&fd)).unwrap();
            ended += told.lines().find_map(|line| line.strip_prefix("CqTail:"))?.trim().parse::<u64>().unwrap();
        }
    }
    Some(ended)
}

/// A worker that cannot have io_uring goes on without and says so in its log alone.
#[test]
fn frames_go_through_io_uring_where_they_are_to_and_nowhere_else() {
    const TEST: &str = "frames_go_through_io_uring_where_they_are_to_and_nowhere_else";
    const FRAMES: u32 = 32;
    if let Err(error) = Io::Uring.usable() {
        return skip(TEST, &error.to_string());
    }
    for (io, least, most) in
        [(Io::Syscall, 0, 0), (Io::Auto, FRAMES.into(), u64::MAX), (Io::Uring, (2 * FRAMES).into(), u64::MAX)]
    {
        let setup = NicSetup { tuning: Tuning { io, ..Tuning::default() }, ..NicSetup::default() };
        let backend = InProcess::start_as(1, setup);
        let mut bench = Bench::before(backend, Arc::new(GuestMemory::single(16 << 20)), NetDriverSpec::default());
        for seq in 0..FRAMES {
            bench.driver.queue(&VnetHdr::default(), &tx_frame(seq, 300));
        }
        bench.driver.tx.publish_and_kick();
        for seq in 0..FRAMES {
            assert_eq!(bench.tap().recv(PATIENCE).expect("a frame from the guest").1, tx_frame(seq, 300));
        }
        bench.driver.post_rx(FRAMES as usize, 2048);
        (0..FRAMES).for_each(|seq| bench.pass_rx(seq, 300));
        let Some(ended) = ended_in_rings() else { return skip(TEST, "this kernel does not tell of its rings' state") };
        assert!((least..=most).contains(&ended), "{io:?}: {ended} operations for {FRAMES} frames each way");
    }
}
