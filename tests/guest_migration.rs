//! Linux in an emulated QEMU that moves to another QEMU on another back-end while it sends and receives.
//!
//! A page that a back-end wrote without saying so arrives as it was before: frames that no program has read yet have other
//! bytes then, of which TCP knows nothing, since it was told that their checksums are good. So there is a
//! receiver that reads only after the migration, and traffic whose content is checked at every moment of one.
//!
//! What no guest can show is whether used rings are logged: QEMU takes them for written whenever it stops them, and so copies
//! them last of all.
#![allow(clippy::unwrap_used)]

mod common;
use common::guest::{Bench, GuestSpec, HOST, HostDevice, Vmm, require_guest};
use common::migration::Migration;
use common::transfer::{self, Flood, Unread};

fn bridged() -> GuestSpec<'static> {
    GuestSpec { device: HostDevice::Bridge, ..GuestSpec::new(Vmm::Qemu) }
}

fn can_run(test: &str) -> bool {
    require_guest(test, Vmm::Qemu) && HostDevice::Bridge.require(test)
}

/// Fails if something is not as it was: the network, the back-end's rings, or what the guest's kernel thinks of it all.
fn assert_well(bench: &mut Bench) {
    let pings = bench.guest.run(&format!("ping -c 5 -i 0.2 -W 2 {HOST}"));
    assert!(pings.contains(" 0% packet loss"), "{pings}");
    bench.assert_sound();
    let log = bench.guest.run("dmesg");
    let complaints =
        ["BUG", "Oops", "WARNING", "is not a head", "bad gso", "NETDEV WATCHDOG", "hung task", "unexpected txq"];
    let complaint = log.lines().find(|line| complaints.iter().any(|complaint| line.contains(complaint)));
    assert_eq!(complaint, None, "{log}");
}

#[test]
fn guest_that_migrates_in_the_middle_of_transfers_loses_no_byte() {
    if !can_run("guest_that_migrates_in_the_middle_of_transfers_loses_no_byte") {
        return;
    }
    let spec = bridged();
    let mut bench = Bench::boot(&spec);
    let mut quarter = 0;
    // Once in each transfer: there, and back.
    let mut migrate = |bench: &mut Bench| {
        quarter += 1;
        if quarter % 3 != 2 {
            return;
        }
        let mut unread = Unread::connect(bench, 5003);
        let migration = Migration::begin(bench, &spec);
        // The guest has prepared these buffers before the first pass, and writes nothing there: but for the log, no pass
        // would come to them again. With more traffic it writes to most pages now and then.
        unread.send(bench);
        migration.finish(bench);
        unread.assert_whole(bench);
    };
    transfer::to_guest(&mut bench, 5001, 16, &mut migrate);
    transfer::to_host(&mut bench, 5002, 16, &mut migrate);
    assert_well(&mut bench);
}

#[test]
fn guest_with_two_queue_pairs_migrates_under_load() {
    const PAIRS: usize = 2;
    if !can_run("guest_with_two_queue_pairs_migrates_under_load") {
        return;
    }
    let spec = GuestSpec { queue_pairs: PAIRS, ..bridged() };
    let mut bench = Bench::boot(&spec);
    // One on each processor: the guest's driver sends on the processor's own queue.
    let floods = [Flood::start(&mut bench, 5010, 0), Flood::start_checked(&mut bench, 5011, 1)];
    let migration = Migration::begin(&mut bench, &spec);
    floods.iter().for_each(Flood::assert_flows);
    migration.finish(&mut bench);
    floods.iter().for_each(Flood::assert_flows);
    for counter in ["rx_frames", "tx_frames", "rx_large_frames", "tx_large_frames"] {
        let counts = bench.counters(counter);
        assert!(counts.iter().all(|count| *count > 0), "{counter} on the new back-end: {counts:?}");
    }
    drop(floods);
    assert_well(&mut bench);
}

#[test]
fn guest_whose_migration_is_cancelled_goes_on_where_it_was_and_migrates_later() {
    if !can_run("guest_whose_migration_is_cancelled_goes_on_where_it_was_and_migrates_later") {
        return;
    }
    let spec = bridged();
    let mut bench = Bench::boot(&spec);
    let flood = Flood::start_checked(&mut bench, 5000, 0);
    let migration = Migration::begin(&mut bench, &spec);
    flood.assert_flows();
    migration.cancel(&mut bench);
    flood.assert_flows();
    bench.assert_sound();

    let migration = Migration::begin(&mut bench, &spec);
    flood.assert_flows();
    migration.finish(&mut bench);
    flood.assert_flows();
    drop(flood);
    assert_well(&mut bench);
}
