//! DPDK's `dpdk-testpmd`, where it is installed: `net_vhost` to `net_tap`, a peer that somebody else wrote.
//!
//! It makes its own TAP, without virtio-net headers, and moves frames by polling, so it is measured where a frame needs no
//! offload, and only from the guest: it takes frames off the TAP whether the guest has buffers or not. Its processor
//! time is what has passed, frames or not.

use std::process::{Command, Stdio};

use crate::common::netns::NetNs;
use crate::common::virtio::feature;
use crate::place::{BACKEND_CPU, DRIVER_CPU};

const PROGRAM: &str = "dpdk-testpmd";
/// The TAP that it makes.
pub const TAP: &str = "tap1";
/// What it offers of what the driver has.
pub const FEATURES: u64 =
    feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::EVENT_IDX | feature::MRG_RXBUF | feature::INDIRECT_DESC;
/// It ends with its input unless it has statistics to print.
const APPLICATION: &[&str] =
    &["--total-num-mbufs=16384", "--auto-start", "--stats-period", "3600", "--disable-link-check"];

/// Is it there? If not, says so.
pub fn is_installed() -> bool {
    let found = Command::new(PROGRAM).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: testpmd: there is no {PROGRAM} (Debian: dpdk-dev)");
    }
    found
}

/// How to start it: no memory or device set apart for it, its forwarding thread on the back-ends' CPU.
pub fn command(namespace: &NetNs, socket: &str) -> Command {
    let mut command = namespace.command(PROGRAM);
    command.args(["--no-huge", "-m", "256", "--no-pci"]);
    command.args(["-l".to_owned(), format!("{BACKEND_CPU},{DRIVER_CPU}")]);
    command.args([format!("--main-lcore={DRIVER_CPU}"), format!("--file-prefix=vun{}", std::process::id())]);
    command.arg(format!("--vdev=net_vhost0,iface={socket},queues=1")).arg(format!("--vdev=net_tap0,iface={TAP}"));
    command.arg("--").args(APPLICATION).stdout(Stdio::null());
    command
}
