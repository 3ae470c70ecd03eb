//! A guest that rewrites its rings, tables and headers while they are read: the back-end survives, keeps to the memory
//! that it was given, and serves the same guest once its rings are set up anew.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::frames::{self, Ends, L4Csum, TCP_CSUM_OFFSET};
use common::memory::GuestMemory;
use common::path_bench::{Bench, FEATURE_SETS, RX, TX, rx_frame};
use common::split_ring::{Buf, Desc};
use common::virtio::{VnetHdr, feature, gso, net_flag};
use common::{PATIENCE, StopOnDrop};

const FOR: Duration = Duration::from_millis(150);

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A descriptor that is sometimes good: addresses and lengths around a buffer, any flags, any next.
fn descriptor(random: &mut Random, buf: u64, size: u16) -> Desc {
    let addr = match random.below(8) {
        0 => random.next(),
        1 => buf + (1 << 26),
        _ => buf + random.below(4096),
    };
    let len = match random.below(8) {
        0 => random.next() as u32,
        _ => random.below(2000) as u32,
    };
    let flags = random.below(8) as u16;
    Desc { addr, len, flags, next: random.below(u64::from(size) + 1) as u16 }
}

/// Memory around the buffer that the guest speaks of: nobody has anything to write there.
struct Canaries {
    parts: [(u64, usize); 2],
}

impl Canaries {
    const BYTE: u8 = 0xa5;

    /// A page, the buffer, and all the rest of memory; and where the buffer is.
    fn around(mem: &GuestMemory, len: usize) -> (Canaries, u64) {
        const PAGE: usize = 4096;
        let before = mem.alloc(PAGE, 4096);
        let buf = mem.alloc(len, 16);
        let behind = buf + len as u64;
        let end = mem.regions().last().map(|region| region.info.guest + region.info.size).unwrap();
        let parts = [(before, PAGE), (behind, (end - behind) as usize)];
        parts.iter().for_each(|(addr, len)| mem.fill(*addr, *len, Self::BYTE));
        (Canaries { parts }, buf)
    }

    fn assert_untouched(&self, mem: &GuestMemory) {
        for (addr, len) in self.parts {
            let wrong = mem.read(addr, len).iter().position(|byte| *byte != Self::BYTE);
            assert_eq!(wrong, None, "written behind {addr:#x}");
        }
    }
}

/// T-01, T-02, T-05
#[test]
fn rings_rewritten_while_they_are_read_do_no_harm() {
    let mut written = 0;
    for features in FEATURE_SETS {
        let mut bench = Bench::new(features);
        // What a descriptor names begins in the first 4096 bytes, and no frame is longer than the rest.
        let (canaries, buf) = Canaries::around(&bench.mem, 8192);
        let stop = AtomicBool::new(false);
        let size = bench.driver.tx.size;
        let (tap, rings) = (&bench.backend.taps[0], bench.driver.rings());
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random(features | 1);
                while !stop.load(Ordering::Relaxed) {
                    for ring in rings {
                        let index = random.below(u64::from(size)) as u16;
                        ring.write_desc(index, descriptor(&mut random, buf, size));
                        ring.write_desc_at(buf, index % 64, descriptor(&mut random, buf, 64));
                        ring.write_avail_entry(random.next() as u16, random.below(u64::from(size)) as u16);
                    }
                }
            });
            let _stop = StopOnDrop(&stop);
            let begin = Instant::now();
            // Where a frame has one chain, one that is good and too short for it waits for the next frame; the shortest
            // fits every good chain.
            let frames = [300, 60].map(|len| [&[0; 12][..], &rx_frame(0, len)].concat());
            let is_seen = |name| bench.counter(name) > 0;
            let has_seen_all = || ["tx_drop_bad_chain", "rx_bad_chains", "rx_frames"].into_iter().all(is_seen);
            // On a busy machine it takes longer until the device has seen something.
            while begin.elapsed() < FOR || (!has_seen_all() && begin.elapsed() < PATIENCE) {
                for ring in rings {
                    // As much as fits behind what the device has done.
                    ring.write_avail_idx(ring.used_idx().wrapping_add(size));
                    ring.kick();
                }
                frames.iter().for_each(|frame| _ = tap.try_send_raw(frame));
                while tap.recv_raw(Duration::ZERO).is_some() {}
            }
        });
        assert_eq!(bench.counter("broken_rings"), 0, "heads and indices were always right");
        let saw_both = bench.counter("tx_drop_bad_chain") > 0 && bench.counter("rx_bad_chains") > 0;
        assert!(saw_both, "features {features:#x}: {:?}", bench.backend.counters(0));
        bench.front_end.stop_like_qemu(2).unwrap();
        canaries.assert_untouched(&bench.mem);
        written += bench.counter("rx_frames");
        while bench.tap().recv_raw(Duration::ZERO).is_some() {}
        bench.driver.rx.reset();
        bench.driver.tx.reset();
        bench.start_ring(RX, &bench.driver.rx);
        bench.start_ring(TX, &bench.driver.tx);
        bench.pass_tx(1, 500);
        assert!(bench.front_end.is_alive());
    }
    // Few chains are good and long enough, so not in each of the sets on a busy machine.
    assert!(written > 0, "no frame was written to memory");
}

/// A segmentation request that is right.
const GOOD: VnetHdr = VnetHdr {
    flags: net_flag::NEEDS_CSUM,
    gso_type: gso::TCPV4,
    hdr_len: 54,
    gso_size: 1448,
    csum_start: 34,
    csum_offset: TCP_CSUM_OFFSET,
    num_buffers: 0,
};
const PAYLOAD: usize = 3000;
/// Where the IP header says that TCP follows.
const PROTOCOL: usize = 23;

/// Sends the same good request again and again, while `rewrite` changes it; what is segmented must be as it was checked. Some
/// are refused, or they were not rewritten in time.
fn send_while(rewrite: impl Fn(&GuestMemory, u64) + Send) {
    let mut bench = Bench::new(feature::CSUM | feature::HOST_TSO4);
    let tcp = frames::tcp4(&Ends::TX, 1, &[5; PAYLOAD], L4Csum::Partial);
    let addr = bench.mem.alloc(8192, 64);
    bench.mem.write(addr, &[&GOOD.to_bytes()[..], &tcp].concat());
    let stop = AtomicBool::new(false);
    let Bench { driver, backend, mem, .. } = &mut bench;
    let (tap, mem, stop) = (&backend.taps[0], &*mem, &stop);
    thread::scope(|scope| {
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                rewrite(mem, addr);
            }
        });
        let _stop = StopOnDrop(stop);
        let mut wrong = None;
        let mut passed = 0;
        let begin = Instant::now();
        let refused = || backend.counter(0, "tx_drop_bad_header");
        let has_seen_both = |passed| passed > 0 && refused() > 0;
        while begin.elapsed() < FOR || (!has_seen_both(passed) && begin.elapsed() < PATIENCE) {
            driver.tx.add(&[Buf::readable(addr, VnetHdr::LEN + tcp.len())]);
            driver.tx.publish_and_kick();
            driver.tx.wait_used(PATIENCE).unwrap();
            while let Some((header, frame)) = tap.recv(Duration::ZERO) {
                let segmented = header.gso_type != gso::NONE;
                passed += usize::from(segmented);
                let sound = header.gso_size > 2 && frame[PROTOCOL] == 6;
                if segmented && !(sound && VnetHdr { gso_size: GOOD.gso_size, ..header } == GOOD) {
                    wrong = Some((header, frame[PROTOCOL]));
                }
            }
        }
        common::say(&format!("{passed} segmentation requests passed, {} were refused", refused()));
        assert!(has_seen_both(passed), "passed {passed}, refused {}", refused());
        assert_eq!(wrong, None, "a header reached the TAP that is not as it was checked");
    });
}

/// T-03
#[test]
fn header_rewritten_while_it_is_checked_reaches_the_tap_as_it_was_checked() {
    let bad = [
        VnetHdr { csum_start: 0xffff, ..GOOD },
        VnetHdr { gso_size: 0, ..GOOD },
        VnetHdr { gso_size: 1, ..GOOD },
        VnetHdr { gso_type: gso::UDP, ..GOOD },
        VnetHdr { hdr_len: 0xffff, ..GOOD },
    ];
    send_while(|mem, addr| {
        for header in bad {
            mem.write(addr, &header.to_bytes());
            mem.write(addr, &GOOD.to_bytes());
        }
    });
}

/// T-03, T-04
#[test]
fn protocol_headers_rewritten_while_they_are_checked_reach_the_tap_as_they_were_checked() {
    send_while(|mem, addr| {
        for protocol in [17, 6] {
            mem.write(addr + (VnetHdr::LEN + PROTOCOL) as u64, &[protocol]);
        }
    });
}
