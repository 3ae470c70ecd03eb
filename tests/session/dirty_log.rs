//! The log of written pages, with which a front-end copies a guest to another host while it runs.
//!
//! What is asked of it: a page that the back-end wrote is marked when its rings have stopped, also where the log was
//! replaced or memory was added meanwhile; and what nobody wrote is not, or the copying would never end.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::common::backend::InProcess;
use crate::common::bench::{BASE, Bench, Guest, RING_SIZE};
use crate::common::frames::{Ends, Stamp, test_frame};
use crate::common::frontend::{Answer, RawFrontend};
use crate::common::memory::{RegionInfo, memfd};
use crate::common::message::{Message, VRING_F_LOG, VringAddr, request};
use crate::common::split_ring::{RingAddrs, SplitRing};
use crate::common::virtio::{VnetHdr, feature};
use crate::common::wait_until;

const PAGE: u64 = 4096;
/// Enough for the pages of the guest's 32 MiB from 1 MiB on.
const LOG_SIZE: u64 = 2048;
const MERGEABLE: u64 = feature::MRG_RXBUF;

/// Hands a log over; whether it was taken.
fn set_log(front_end: &RawFrontend, size: u64, offset: u64, fd: BorrowedFd<'_>) -> bool {
    let message = Message::set_log_base(size, offset, fd);
    let asked = message.body.clone();
    let reply = front_end.get(&message).expect("an answer of its own");
    assert!(reply.body == asked || reply.body == [0; 16], "{reply:?}");
    reply.body == asked
}

/// A guest of whose rings everything is logged.
struct Copied {
    bench: Bench,
    log: File,
}

impl Copied {
    fn begin(features: u64) -> Copied {
        let mut guest = Guest::new(1, features);
        // The used ring lies in two pages, of which its head marks one.
        let at = guest.mem.alloc(4 * PAGE as usize, PAGE);
        let addrs = RingAddrs { desc: at, avail: at + PAGE, used: at + 3 * PAGE - 64 };
        let mut rx = SplitRing::placed(&guest.mem, RING_SIZE, 0, addrs);
        rx.event_idx = features & feature::EVENT_IDX != 0;
        guest.pairs[0].rx = rx;
        let bench = Bench::before(InProcess::start(1), guest);
        bench.start();
        // So that no page has a part of a used ring and of a buffer.
        bench.guest.mem.alloc(PAGE as usize, PAGE);
        let log = memfd(LOG_SIZE);
        assert!(set_log(&bench.front_end, LOG_SIZE, 0, log.as_fd()));
        let copied = Copied { bench, log };
        copied.log_buffers(true);
        copied.log_used_rings(VRING_F_LOG, 0);
        copied
    }

    fn features(&self) -> u64 {
        self.bench.guest.session().features
    }

    fn log_buffers(&self, is_logged: bool) {
        let bit = if is_logged { feature::LOG_ALL } else { 0 };
        assert_eq!(self.bench.ask(Message::set_features(self.features() | bit)), Answer::Ack);
    }

    /// With these flags, `further` in the log than where the used rings are.
    fn log_used_rings(&self, flags: u32, further: u64) {
        let session = self.bench.guest.session();
        for (index, ring) in session.rings.iter().enumerate() {
            let logged = VringAddr::logged(ring);
            let addr = VringAddr { flags, log: logged.log + further, ..logged };
            assert_eq!(self.bench.ask(Message::set_vring_addr_raw(index as u32, &addr)), Answer::Ack);
        }
    }

    /// The pages that the log tells of by now; it is empty afterwards.
    fn take_marked(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; LOG_SIZE as usize];
        self.log.read_exact_at(&mut bytes, 0).unwrap();
        self.log.write_all_at(&vec![0; LOG_SIZE as usize], 0).unwrap();
        let pages = (0..8 * LOG_SIZE).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1);
        pages.collect()
    }

    /// Has a frame from the guest and `lens` to it pass, while nobody else writes to the guest's memory; the pages that
    /// changed.
    fn pass_frames(&mut self, lens: &[usize]) -> BTreeSet<u64> {
        let driver = &mut self.bench.guest.pairs[0];
        driver.repost = false;
        driver.post_rx(40, 2048);
        driver.queue(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 1, seq: 1 }, 200));
        driver.tx.publish();
        let (tx_before, rx_before) = (driver.tx.used_idx(), self.bench.backend.counter(0, "rx_frames"));
        let before = self.bench.guest.mem.snapshot();

        let driver = &self.bench.guest.pairs[0];
        driver.tx.kick();
        let tap = &self.bench.backend.taps[0];
        for (seq, len) in lens.iter().enumerate() {
            let frame = test_frame(&Ends::RX, Stamp { stream: 2, seq: seq as u32 }, *len);
            tap.send(&VnetHdr::default(), &frame);
        }
        assert!(tap.recv(crate::common::PATIENCE).is_some());
        wait_until("both directions are done", || {
            let came = self.bench.backend.counter(0, "rx_frames") - rx_before;
            driver.tx.used_idx() != tx_before && came == lens.len() as u64
        });
        // The worker has ended its pass when it answers.
        assert_eq!(self.bench.ask(Message::set_vring_enable(0, 1)), Answer::Ack);
        changed_pages(&before, &self.bench)
    }
}

/// Guest memory begins at a page's start and is one region.
fn changed_pages(before: &[Vec<u8>], bench: &Bench) -> BTreeSet<u64> {
    let first = bench.guest.mem.regions()[0].info.guest / PAGE;
    let after = bench.guest.mem.snapshot();
    let pages = before[0].chunks(PAGE as usize).zip(after[0].chunks(PAGE as usize)).enumerate();
    pages.filter(|(_, (before, after))| before != after).map(|(page, _)| first + page as u64).collect()
}

fn all_pages(bench: &Bench) -> BTreeSet<u64> {
    let info = bench.guest.mem.regions()[0].info;
    (info.guest / PAGE..(info.guest + info.size) / PAGE).collect()
}

fn used_ring_pages(bench: &Bench) -> BTreeSet<u64> {
    let session = bench.guest.session();
    session.rings.iter().flat_map(|ring| ring.addrs.used / PAGE..=(ring.addrs.used + 6 + 8 * 256) / PAGE).collect()
}

/// Small ones are copied from a batch, large ones are read straight into the guest's buffers.
#[test]
fn page_that_was_written_is_marked_and_no_other() {
    for (features, lens) in [
        (0, &[100, 1500, 60][..]),
        (MERGEABLE, &[100, 1500, 60]),
        (MERGEABLE, &[20_000, 30_000, 5000]),
        (MERGEABLE | feature::EVENT_IDX, &[100, 9000, 60, 60, 60, 60, 60, 60]),
    ] {
        let mut copied = Copied::begin(features);
        for round in 0..3 {
            copied.take_marked();
            let changed = copied.pass_frames(lens);
            let marked = copied.take_marked();
            assert!(changed.len() >= 3, "{changed:?}");
            let missed: Vec<_> = changed.difference(&marked).collect();
            assert_eq!(missed, [&0; 0], "changed and not marked, with frames of {lens:?}, round {round}");
            let allowed: BTreeSet<_> = changed.union(&used_ring_pages(&copied.bench)).copied().collect();
            let surplus: Vec<_> = marked.difference(&allowed).collect();
            assert_eq!(surplus, [&0; 0], "marked and not changed, with frames of {lens:?}, round {round}");
        }
    }
}

#[test]
fn what_is_not_to_be_logged_is_not() {
    let mut copied = Copied::begin(MERGEABLE);
    let lens = [100, 1500, 60];

    copied.log_used_rings(0, 0);
    copied.take_marked();
    let changed = copied.pass_frames(&lens);
    let used = used_ring_pages(&copied.bench);
    let buffers: BTreeSet<_> = changed.difference(&used).copied().collect();
    assert_eq!(copied.take_marked(), buffers, "buffers alone");

    copied.log_buffers(false);
    copied.log_used_rings(VRING_F_LOG, 0);
    copied.take_marked();
    copied.pass_frames(&lens);
    let marked = copied.take_marked();
    assert!(!marked.is_empty() && marked.is_subset(&used), "used rings alone: {marked:?}");

    copied.log_used_rings(0, 0);
    copied.take_marked();
    copied.pass_frames(&lens);
    assert_eq!(copied.take_marked(), BTreeSet::new(), "nothing");
}

/// It need not be guest memory there (vhost-user, "Migration").
#[test]
fn used_ring_is_logged_where_the_front_end_says() {
    const FURTHER: u64 = 20 << 20;
    let mut copied = Copied::begin(MERGEABLE);
    copied.log_buffers(false);
    copied.log_used_rings(VRING_F_LOG, FURTHER);
    copied.take_marked();
    copied.pass_frames(&[100, 100]);
    let marked = copied.take_marked();
    let there: BTreeSet<_> = used_ring_pages(&copied.bench).iter().map(|page| page + FURTHER / PAGE).collect();
    assert!(!marked.is_empty() && marked.is_subset(&there), "{marked:?}");
}

/// QEMU makes a larger log when memory is added. By the answer the back-end has let go of the old one.
#[test]
fn log_that_was_replaced_is_not_written_to_any_more() {
    let mut copied = Copied::begin(MERGEABLE);
    let next = memfd(LOG_SIZE + 4096);
    assert!(set_log(&copied.bench.front_end, LOG_SIZE, 4096, next.as_fd()));
    copied.take_marked();
    let changed = copied.pass_frames(&[100, 20_000]);
    assert_eq!(copied.take_marked(), BTreeSet::new());
    let mut bytes = vec![0; LOG_SIZE as usize];
    next.read_exact_at(&mut bytes, 4096).unwrap();
    let is_marked = |page: &u64| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
    assert!(changed.iter().all(is_marked), "at its offset in the file");
}

#[test]
fn log_outlives_a_change_of_the_memory() {
    let mut copied = Copied::begin(MERGEABLE);
    let more = memfd(1 << 20);
    let info = RegionInfo { guest: 33 << 20, size: 1 << 20, user: 0x5000_0000, offset: 0 };
    assert_eq!(copied.bench.ask(Message::add_mem_reg_claiming(&info).with_fd(more.as_fd())), Answer::Ack);
    copied.take_marked();
    let changed = copied.pass_frames(&[100, 20_000]);
    assert!(changed.is_subset(&copied.take_marked()));
    assert_eq!(copied.bench.ask(Message::rem_mem_reg(&info)), Answer::Ack);

    // Of a page without a bit nobody would know.
    let info = RegionInfo { guest: 64 << 20, ..info };
    let add = || Message::add_mem_reg_claiming(&info).with_fd(more.as_fd());
    assert_eq!(copied.bench.ask(add()), Answer::Nack(1), "behind the log's end");
    let changed = copied.pass_frames(&[100]);
    assert!(changed.is_subset(&copied.take_marked()));
    copied.log_buffers(false);
    assert_eq!(copied.bench.ask(add()), Answer::Ack, "the copying is over");
    assert_eq!(copied.bench.ask(Message::set_features(copied.features() | feature::LOG_ALL)), Answer::Nack(1));
}

/// A migration is given up; memory is added that its log has no bits for; and another migration has the features come before
/// the log, as QEMU does for a guest that goes on meanwhile.
#[test]
fn log_of_a_migration_that_is_over_refuses_nothing() {
    let copied = Copied::begin(MERGEABLE);
    let bench = &copied.bench;
    copied.log_buffers(false);
    copied.log_used_rings(0, 0);
    let more = memfd(PAGE);
    let info = RegionInfo { guest: 64 << 20, user: 1 << 45, size: PAGE, offset: 0 };
    assert_eq!(bench.ask(Message::add_mem_reg_claiming(&info).with_fd(more.as_fd())), Answer::Ack);
    (0..2).for_each(|index| assert!(bench.front_end.get_vring_base(index).is_ok()));
    assert_eq!(bench.ask(Message::set_features(copied.features() | feature::LOG_ALL)), Answer::Ack);
    (0..2).for_each(|index| bench.start_ring(index));
    // Nothing of the log is written any more.
    copied.log_used_rings(VRING_F_LOG, 0);
    copied.take_marked();
    let log = memfd(2 * LOG_SIZE);
    assert!(set_log(&bench.front_end, 2 * LOG_SIZE, 0, log.as_fd()), "a larger one");
    assert_eq!(copied.take_marked(), BTreeSet::new());
    let mut bytes = vec![0; 2 * LOG_SIZE as usize];
    log.read_exact_at(&mut bytes, 0).unwrap();
    let is_marked = |page: &u64| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
    assert!(all_pages(bench).iter().all(is_marked), "what was written before is in no log");
}

/// A front-end that connects again while it copies says all of it before its rings run, the log last, as QEMU does.
#[test]
fn log_may_come_after_the_features_and_the_rings() {
    let mut copied = Copied::begin(MERGEABLE);
    copied.bench.reconnect();
    let bench = &copied.bench;
    bench.negotiate();
    assert_eq!(bench.ask(Message::set_features(copied.features() | feature::LOG_ALL)), Answer::Ack);
    assert_eq!(bench.ask(Message::set_mem_table(&bench.guest.mem)), Answer::Ack);
    (0..2).for_each(|index| bench.start_ring(index));
    copied.log_used_rings(VRING_F_LOG, 0);
    copied.take_marked();
    copied.pass_frames(&[100]);
    assert_eq!(copied.take_marked(), BTreeSet::new(), "U-43: nothing to log to");

    assert!(set_log(&copied.bench.front_end, LOG_SIZE, 0, copied.log.as_fd()));
    assert_eq!(copied.take_marked(), all_pages(&copied.bench), "whatever was written before");
    let changed = copied.pass_frames(&[100, 20_000]);
    let marked = copied.take_marked();
    assert!(changed.is_subset(&marked) && marked.len() < 100, "{marked:?}");
}

/// QEMU gives a log up when the guest stops, and hands over the next one when it goes on and its rings run.
#[test]
fn rings_that_started_since_the_log_came_have_all_pages_marked_in_the_next() {
    let mut copied = Copied::begin(MERGEABLE);
    assert!(set_log(&copied.bench.front_end, LOG_SIZE, 0, copied.log.as_fd()));
    assert_eq!(copied.take_marked(), BTreeSet::new(), "another log for rings that run");
    (0..2).for_each(|index| assert!(copied.bench.front_end.get_vring_base(index).is_ok()));
    (0..2).for_each(|index| copied.bench.start_ring(index));
    copied.pass_frames(&[100]);
    copied.take_marked();
    for pages in [all_pages(&copied.bench), BTreeSet::new()] {
        assert!(set_log(&copied.bench.front_end, LOG_SIZE, 0, copied.log.as_fd()));
        assert_eq!(copied.take_marked(), pages);
    }
}

/// U-11, U-43: QEMU goes on after a log that was refused, but not after features that were.
#[test]
fn logging_begins_while_rings_run_only_with_a_log() {
    let mut bench = Bench::running(1);
    assert_eq!(bench.ask(Message::set_features(BASE | feature::LOG_ALL)), Answer::Nack(1));
    bench.assert_frames_pass();
    let log = memfd(LOG_SIZE);
    assert!(set_log(&bench.front_end, LOG_SIZE, 0, log.as_fd()));
    for features in [BASE | feature::LOG_ALL, BASE | feature::LOG_ALL, BASE, BASE] {
        assert_eq!(bench.ask(Message::set_features(features)), Answer::Ack);
        bench.assert_frames_pass();
    }
    assert!(!set_log(&bench.front_end, LOG_SIZE + 1, 0, log.as_fd()));
    assert_eq!(
        bench.ask(Message::set_features(BASE | feature::LOG_ALL)),
        Answer::Nack(1),
        "the former log is nobody's"
    );
    assert!(set_log(&bench.front_end, LOG_SIZE, 0, log.as_fd()));
    let others = BASE | feature::LOG_ALL | feature::MRG_RXBUF;
    assert_eq!(bench.ask(Message::set_features(others)), Answer::Nack(1), "what else changes than the logging");
    bench.assert_frames_pass();
}

/// U-40, U-41, U-42
#[test]
fn log_that_cannot_be_one_is_refused() {
    let mut bench = Bench::running(1);
    let file = memfd(LOG_SIZE);
    let (pipe, _writer) = std::io::pipe().unwrap();
    // Its last page has its bit in this byte.
    let last = ((33 << 20) - 1) / PAGE / 8;
    let fd = file.as_fd();
    for (what, size, offset, fd) in [
        ("U-40 wraps", LOG_SIZE, u64::MAX - 100, fd),
        ("U-40 as much as there can be", u64::MAX, 0, fd),
        ("empty", 0, 8, fd),
        ("U-41 a byte too small", last, 0, fd),
        ("U-42 larger than its file", LOG_SIZE + 1, 0, fd),
        ("U-42 further than its file", LOG_SIZE, 1, fd),
        ("no file", LOG_SIZE, 0, pipe.as_fd()),
    ] {
        assert!(!set_log(&bench.front_end, size, offset, fd), "{what}");
        bench.assert_frames_pass();
    }
    let without = Message::set_log_base(LOG_SIZE, 0, fd).without_fds();
    assert_eq!(bench.front_end.get(&without).unwrap().body, [0; 16], "U-15");
    assert!(set_log(&bench.front_end, last + 1, 0, fd), "as small as it may be");
    assert!(set_log(&bench.front_end, last + 1, LOG_SIZE - last - 1, fd), "at an offset");
    bench.assert_frames_pass();
}

/// U-44
#[test]
fn used_ring_logged_behind_the_end_of_the_log_is_refused() {
    let mut copied = Copied::begin(MERGEABLE);
    let addr = VringAddr::logged(copied.bench.guest.session().rings[0]);
    let end = LOG_SIZE * 8 * PAGE;
    let used_len = 6 + 8 * 256;
    let ask = |bench: &Bench, addr: &VringAddr| bench.ask(Message::set_vring_addr_raw(0, addr));
    for log in [end - used_len + 1, end, u64::MAX - 100, u64::MAX] {
        assert_eq!(ask(&copied.bench, &VringAddr { log, ..addr }), Answer::Nack(1), "{log:#x}");
    }
    let changed = copied.pass_frames(&[100]);
    assert!(changed.is_subset(&copied.take_marked()), "as it was");
    assert_eq!(ask(&copied.bench, &VringAddr { log: end - used_len, ..addr }), Answer::Ack);
    let changed = copied.pass_frames(&[100]);
    assert!(!changed.is_subset(&copied.take_marked()), "its used ring is logged elsewhere");
    copied.log_buffers(false);
    // A smaller log would lose what this ring has to say.
    assert!(!set_log(&copied.bench.front_end, LOG_SIZE - 1, 0, copied.log.as_fd()));
    copied.pass_frames(&[100]);
}

/// QEMU does not look at the answer, and reads the new log alone from then on.
#[test]
fn log_that_is_refused_while_the_guest_is_copied_ends_the_session() {
    let mut copied = Copied::begin(MERGEABLE);
    let pipe = std::io::pipe().unwrap().0;
    let message = Message::set_log_base(LOG_SIZE, 0, pipe.as_fd());
    assert!(copied.bench.front_end.get(&message).is_err());
    // The same for its first log, as its rings run already.
    copied.bench.reconnect();
    copied.bench.negotiate();
    assert_eq!(copied.bench.ask(Message::set_features(copied.features() | feature::LOG_ALL)), Answer::Ack);
    assert!(copied.bench.front_end.get(&message).is_err());
    copied.bench.start_over();
    copied.bench.assert_frames_pass();
}

/// U-12
#[test]
fn log_without_its_protocol_feature_is_refused() {
    let mut bench = Bench::connected(1);
    // Nothing to acknowledge with yet: the next answer is of the next question.
    assert!(bench.front_end.tell(&Message::set_features(BASE).with_need_reply()));
    assert!(bench.front_end.is_alive());
    let reply_ack = crate::common::virtio::protocol::REPLY_ACK;
    assert!(bench.front_end.tell(&Message::set_protocol_features(reply_ack)));
    let log = memfd(LOG_SIZE);
    assert_eq!(bench.ask(Message::set_log_base(LOG_SIZE, 0, log.as_fd())), Answer::Nack(1));
    assert_eq!(bench.ask(Message::new(request::SET_LOG_FD, vec![]).with_fd(log.as_fd())), Answer::Nack(1));
    bench.start_over();
    bench.assert_frames_pass();
}

/// The driver's answers are written to guest memory, too.
#[test]
fn rings_that_stopped_write_to_the_log_no_more() {
    let mut copied = Copied::begin(MERGEABLE);
    copied.pass_frames(&[100]);
    copied.bench.front_end.stop_like_qemu(2).unwrap();
    copied.take_marked();
    copied.bench.backend.taps[0].send(&VnetHdr::default(), &[0; 60]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(copied.take_marked(), BTreeSet::new());
}
