//! A guest that moves, while it runs, to a second QEMU on a second back-end.
//!
//! Both back-ends are on TAPs of one bridge ([`HostDevice::Bridge`]), so the host's connections go on: the bridge learns
//! from the guest's announcement behind which of its ports the guest is now.
//!
//! QEMU copies all of the guest's memory, then again and again what was written meanwhile, by the guest or by the back-end,
//! and stops the guest for the last of that. How long this takes depends on the machine; a test wants to do something
//! in the middle of it. So a [`Migration`] begins with bounds that keep a guest with traffic from ever coming to that last
//! step, and ends when the test lifts them.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::guest::{Bench, Guest, GuestSpec, HostDevice, Seat, TAPS, qemu_command};
use super::{qmp, say};

/// For each step of it. The memory of an emulated guest is copied in some seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often QEMU is asked how far it is: there are events, but only on a connection that stays open.
const PACE: Duration = Duration::from_millis(20);

/// Bytes in a second, and milliseconds in which the guest may stand still: it is stopped when what is left can be copied in
/// these. In the first pass that is less than [`WRITER`] leaves,
const FIRST: [u64; 2] = [64 << 20, 1];
/// then less than a page,
const HELD: [u64; 2] = [1 << 20, 1];
/// and in the end more than all of that.
const FREE: [u64; 2] = [4 << 30, 500];
/// Writes 16 MiB of memory again and again. Traffic alone writes few pages, always the same, so that the second pass could
/// be over before anybody sees it. Not zeros: for a page of these QEMU sends a word.
const WRITER: &str = "dd if=/dev/urandom of=/tmp/noise bs=1M count=16 2>/dev/null
    while :; do dd if=/tmp/noise of=/tmp/written bs=1M conv=notrunc 2>/dev/null; done & writer=$!";
const STOP_WRITER: &str = "kill $writer; rm /tmp/noise /tmp/written";

/// One under way: the guest runs on the source, whose QEMU is copying what was written since its first pass.
pub struct Migration {
    // Dropped in this order.
    guest: Guest,
    seat: Seat,
}

impl Migration {
    /// Boots the destination as `spec` says, which is as the source was booted, and begins. Returns in the second pass.
    pub fn begin(bench: &mut Bench, spec: &GuestSpec<'_>) -> Self {
        assert_eq!(spec.device, HostDevice::Bridge, "a guest can move only there");
        let tap = TAPS.into_iter().find(|tap| !bench.seat.is_on(tap)).expect("one of two is free");
        let seat = Seat::take(spec, &bench.namespace, ["--tap", tap]);
        let uri = format!("unix:{}", seat.file("incoming.sock").display());
        let guest = Guest::start(qemu_command(spec, &bench.namespace, &seat).args(["-incoming", &uri]));
        let this = Self { guest, seat };
        this.wait_listening();
        bench.guest.run(WRITER);
        bound(bench, FIRST);
        execute(bench, "migrate", json!({ "uri": uri }));
        wait(bench, "active", |migration| migration["ram"]["dirty-sync-count"].as_u64() >= Some(2));
        bound(bench, HELD);
        bench.guest.run(STOP_WRITER);
        this
    }

    /// QEMU speaks QMP when it has opened everything else.
    fn wait_listening(&self) {
        let socket = self.seat.file("qmp.sock");
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "The destination does not come up");
            thread::sleep(PACE);
        }
        qmp::execute(&socket, "query-status", json!({}));
    }

    /// Ends it: from now on the bench is the destination, and the source is gone. No command may run in the guest's console
    /// meanwhile.
    pub fn finish(self, bench: &mut Bench) {
        // If it has ended already, the test did nothing in the middle of it.
        wait(bench, "active", |_| true);
        bound(bench, FREE);
        // Its times come a moment after its status.
        let done = wait(bench, "completed", |migration| migration["total-time"].as_u64() > Some(0));
        let passes = &done["ram"]["dirty-sync-count"];
        let [total, downtime] = ["total-time", "downtime"].map(|name| &done[name]);
        say(&format!("Migrated in {total} ms, {downtime} ms of them standing still, {passes} passes over memory"));
        bench.assert_sound();
        let Self { mut guest, seat } = self;
        guest.continue_from(&mut bench.guest);
        bench.guest = guest;
        bench.seat = seat;
    }

    /// Gives it up; the guest stays where it is.
    pub fn cancel(self, bench: &mut Bench) {
        execute(bench, "migrate_cancel", json!({}));
        wait(bench, "cancelled", |_| true);
    }
}

/// A command to the QEMU where the guest runs.
fn execute(bench: &Bench, command: &str, arguments: Value) -> Value {
    qmp::execute(&bench.seat.file("qmp.sock"), command, arguments)
}

fn bound(bench: &Bench, [bandwidth, downtime]: [u64; 2]) {
    execute(bench, "migrate-set-parameters", json!({ "max-bandwidth": bandwidth, "downtime-limit": downtime }));
}

/// Waits until a migration has this status and something is so of it.
fn wait(bench: &mut Bench, status: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let migration = execute(bench, "query-migrate", json!({}));
        let has = migration["status"].as_str().unwrap_or_default();
        if has == status && is_so(&migration) {
            return migration;
        }
        let has_ended = has != status && ["completed", "failed", "cancelled"].contains(&has);
        let why = if has_ended { "It ended otherwise" } else { "It takes too long" };
        let may_come = !has_ended && Instant::now() < deadline;
        assert!(may_come, "No migration that is {status}. {why}: {migration}\n{}", bench.backend().log());
        thread::sleep(PACE);
    }
}
