//! `--io auto` against the benchmark's figures: where both engines were measured, it is the better one's.
#![allow(clippy::unwrap_used, clippy::panic)]

use serde_json::Value;
use vhost_user_net::device::Io;

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

#[test]
fn auto_takes_the_engine_that_the_benchmark_shows_to_be_better() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/datapath.json")).unwrap();
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
        assert_eq!(Io::Auto.batches(READY), uring < syscall, "{name}: uring {uring} ns, system calls {syscall} ns");
        assert!(auto <= NOISE * uring.min(syscall), "{name}: {auto} ns, uring {uring} ns, system calls {syscall} ns");
    }
    assert_eq!(compared, 4, "small frames and those of the usual MTU, each way");
    // A frame that is alone has nobody to share a batch with.
    assert!(!Io::Auto.batches(1));
}
