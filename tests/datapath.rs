//! Frames between a driver's rings and a TAP double, through the back-end in this process.
#![allow(clippy::unwrap_used)]

mod common;
use std::sync::Arc;

use common::PATIENCE;
use common::backend::InProcess;
use common::driver::{NetDriver, NetDriverSpec};
use common::frames::{Ends, Stamp, test_frame};
use common::frontend::{RawFrontend, SessionSpec};
use common::memory::GuestMemory;
use common::virtio::{VnetHdr, feature};

const BASE: u64 = feature::VERSION_1 | feature::PROTOCOL_FEATURES;

#[test]
fn frames_of_all_sizes_pass_both_ways_over_the_feature_sets() {
    for extra in [0, feature::MRG_RXBUF, feature::EVENT_IDX, feature::INDIRECT_DESC] {
        let backend = InProcess::start(1);
        let mem = Arc::new(GuestMemory::single(64 << 20));
        let spec = NetDriverSpec { features: BASE | extra, queue_size: 256, ..Default::default() };
        let mut driver = NetDriver::new(&mem, &spec);
        let front_end = RawFrontend::connect(backend.socket()).unwrap();
        let session = SessionSpec::new(&mem, driver.rings().to_vec(), BASE | extra);
        front_end.negotiate_like_qemu(&session).unwrap();
        driver.post_rx(64, 2048);
        for (seq, len) in [(0, 60), (1, 1514), (2, 300)] {
            let out = test_frame(&Ends::TX, Stamp { stream: 1, seq }, len);
            driver.send(&VnetHdr::default(), &out);
            assert_eq!(backend.taps[0].recv(PATIENCE).unwrap().1, out);
            let inn = test_frame(&Ends::RX, Stamp { stream: 2, seq }, len);
            backend.taps[0].send(&VnetHdr::default(), &inn);
            assert_eq!(driver.recv(PATIENCE).unwrap().1, inn);
        }
        assert_eq!(backend.counter(0, "tx_frames"), 3);
        assert_eq!(backend.counter(0, "rx_frames"), 3);
    }
}
