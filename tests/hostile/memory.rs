//! Guest memory that is shortened or taken away.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::ftruncate;
use rustix::io::Errno;

use crate::common::PATIENCE;
use crate::common::bench::Bench;
use crate::common::driver::NetDriverSpec;
use crate::common::frontend::Answer;
use crate::common::memory::{GuestMemory, RegionInfo, RegionSpec, memfd};
use crate::common::message::Message;
use crate::common::path_bench::{self, rx_frame};
use crate::common::split_ring::Buf;
use crate::common::virtio::{VnetHdr, feature};

/// U-35: a memfd that can be sealed is, so that nobody shortens it under the rings. In part: a file that cannot be
/// sealed may be shortened still.
#[test]
fn memory_in_a_memfd_cannot_be_shortened_any_more() {
    let mut bench = Bench::running(1);
    let file = memfd(1 << 20);
    let info = RegionInfo { guest: 0x4000_0000, size: 1 << 20, user: 0x4000_0000, offset: 0 };
    assert_eq!(bench.ask(Message::add_mem_reg_claiming(&info).with_fd(file.as_fd())), Answer::Ack);
    for len in [0, 4096, (1 << 20) - 1] {
        assert_eq!(ftruncate(&file, len), Err(Errno::PERM), "{len} bytes");
    }
    assert_eq!(ftruncate(bench.guest.mem.regions()[0].fd(), 0), Err(Errno::PERM));
    bench.assert_frames_pass();
}

/// G-06: the buffers go that a frame waits in, while their ring stays.
#[test]
fn frame_in_hand_survives_the_loss_of_the_buffers_it_was_meant_for() {
    const EXTRA: u64 = 0x1000_0000;
    let mem = Arc::new(GuestMemory::new(&[
        RegionSpec::new(0x10_0000, 16 << 20),
        RegionSpec::new(EXTRA, 1 << 20).in_file(1, 0),
    ]));
    let spec = NetDriverSpec { features: feature::MRG_RXBUF, ..NetDriverSpec::default() };
    let mut bench = path_bench::Bench::on(Arc::clone(&mem), spec);
    let lost =
        [bench.driver.rx.add(&[Buf::writable(EXTRA, 100)]), bench.driver.rx.add(&[Buf::writable(EXTRA + 100, 100)])];
    bench.driver.rx.publish_and_kick();
    bench.tap().send(&VnetHdr::default(), &rx_frame(1, 1500));
    bench.wait_counter("rx_held", 1);

    bench.tell(&Message::rem_mem_reg(&mem.regions()[1].info));
    mem.fill(EXTRA, 4096, 0xa5);
    bench.driver.repost = false;
    let addr = mem.alloc(20 * 100, 1);
    let good: Vec<_> = (0..20).map(|k| bench.driver.rx.add(&[Buf::writable(addr + 100 * k, 100)])).collect();
    bench.driver.rx.publish_and_kick();

    for head in lost {
        assert_eq!(bench.driver.rx.wait_used(PATIENCE), Some((head, 0)), "A buffer that is gone is returned unused");
    }
    let mut got = Vec::new();
    for (k, head) in (0_u64..).zip(good).take(16) {
        let (used, len) = bench.driver.rx.wait_used(PATIENCE).expect("the frame that was kept");
        assert_eq!(used, head);
        got.extend(mem.read(addr + 100 * k, len as usize));
    }
    assert!(got[12..] == rx_frame(1, 1500));
    assert!(mem.read(EXTRA, 4096) == [0xa5; 4096], "Nothing is written to what was taken away");
    bench.pass_tx(0, 60);
}
