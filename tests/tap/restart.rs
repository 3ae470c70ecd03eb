//! SIGKILL with frames on their way: what the next process finds is what the last one left.

use nix::sys::signal::Signal;

use crate::common::bench::Guest;
use crate::common::frames::{Checker, Ends, Stamp, test_frame};
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::virtio::{VnetHdr, feature};
use crate::common::{PATIENCE, QUIET, say, times};
use crate::{Place, TAP};

/// Frames on their way when the process is killed.
const BURST: u32 = 120;
/// Completions that are published together: so many frames may be sent again.
const BATCH: usize = 64;

/// I-01, P-06: no descriptor is lost or doubled, no frame is lost on its way out, and at most a batch goes out twice.
#[test]
fn process_killed_under_load_loses_and_doubles_no_descriptor() {
    if !require_root("process_killed_under_load_loses_and_doubles_no_descriptor") {
        return;
    }
    let kills = times(40, 1000);
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let mut guest = Guest::new(1, feature::MRG_RXBUF | feature::EVENT_IDX | feature::IN_ORDER);
    guest.pairs[0].post_rx(64, 2048);
    let mut checker = Checker::new(1);
    let mut sent = 0;
    let mut killed_with_work = 0;
    let mut host = None;
    for round in 0..=kills {
        let mut backend = place.start(&[]);
        let front_end = place.connect(&guest);
        let host = host.get_or_insert_with(|| place.host());
        let driver = &mut guest.pairs[0];
        if round == kills {
            assert!(driver.wait_tx_done(PATIENCE), "every head comes back");
            take(host, &mut checker, sent);
            continue;
        }
        for _ in 0..BURST {
            driver.queue(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 1, seq: sent }, 100));
            host.send(&test_frame(&Ends::RX, Stamp { stream: 2, seq: sent }, 100));
            sent += 1;
        }
        driver.tx.publish_and_kick();
        // At a moment that differs from round to round, after so many frames came out.
        for _ in 0..round * BURST / kills {
            checker.see(&host.recv(PATIENCE).expect("a frame on the host"));
        }
        backend.signal(Signal::SIGKILL);
        backend.wait_end(PATIENCE);
        drop(front_end);
        driver.reclaim_tx();
        killed_with_work += u32::from(!driver.tx.outstanding().is_empty());
        while driver.recv(std::time::Duration::ZERO).is_some() {}
        take(host, &mut checker, 0);
        guest.resume_at_used_index();
    }
    say(&format!(
        "Killed {kills} times, {killed_with_work} of them with frames on their way; {} went out twice",
        checker.duplicated
    ));
    let driver = &guest.pairs[0];
    assert_eq!((driver.tx.out_of_order(), driver.rx.out_of_order()), (0, 0));
    assert_eq!(checker.lost(sent), Vec::<u32>::new());
    assert!(checker.corrupted.is_empty() && checker.duplicated <= BATCH * kills as usize, "{checker:?}");
    assert!(killed_with_work > 0, "no kill came in the middle of anything");
}

/// Takes what came out, until all of `sent` are there or nothing more comes.
fn take(host: &PacketSocket, checker: &mut Checker, sent: u32) {
    while sent == 0 || !checker.lost(sent).is_empty() {
        match host.recv(QUIET) {
            Some(frame) => checker.see(&frame),
            None => break,
        }
    }
}
