//! A guest that rewrites its rings, tables and headers while they are read: the back-end survives, keeps to the memory
//! that it was given, and serves the same guest once its rings are set up anew.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::frames::{self, Ends, L4Csum, TCP_CSUM_OFFSET};
use common::path_bench::{Bench, FEATURE_SETS, RX, TX, rx_frame};
use common::split_ring::{Buf, Desc};
use common::virtio::{VnetHdr, feature, gso, net_flag};

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

#[test]
fn rings_rewritten_while_they_are_read_do_no_harm() {
    for features in FEATURE_SETS {
        let mut bench = Bench::new(features);
        let buf = bench.mem.alloc(1 << 16, 16);
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
            let begin = Instant::now();
            let frame = [&[0; 12][..], &rx_frame(0, 300)].concat();
            while begin.elapsed() < FOR {
                for ring in rings {
                    // As much as fits behind what the device has done.
                    ring.write_avail_idx(ring.used_idx().wrapping_add(size));
                    ring.kick();
                }
                let _ = tap.try_send_raw(&frame);
                while tap.recv_raw(Duration::ZERO).is_some() {}
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(bench.counter("broken_rings"), 0, "heads and indices were always right");
        assert!(bench.counter("tx_drop_bad_chain") > 0 && bench.counter("rx_bad_chains") > 0);
        bench.front_end.stop_like_qemu(2).unwrap();
        while bench.tap().recv_raw(Duration::ZERO).is_some() {}
        bench.driver.rx.reset();
        bench.driver.tx.reset();
        bench.start_ring(RX, &bench.driver.rx);
        bench.start_ring(TX, &bench.driver.tx);
        bench.pass_tx(1, 500);
        assert!(bench.front_end.is_alive());
    }
}

#[test]
fn header_rewritten_while_it_is_checked_reaches_the_tap_as_it_was_checked() {
    let mut bench = Bench::new(feature::CSUM | feature::HOST_TSO4);
    let good = VnetHdr {
        flags: net_flag::NEEDS_CSUM,
        gso_type: gso::TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: TCP_CSUM_OFFSET,
        num_buffers: 0,
    };
    let tcp = frames::tcp4(&Ends::TX, 1, &[5; 3000], L4Csum::Partial);
    let addr = bench.mem.alloc(8192, 64);
    bench.mem.write(addr, &[&good.to_bytes()[..], &tcp].concat());
    let stop = AtomicBool::new(false);
    let Bench { driver, backend, mem, .. } = &mut bench;
    let tap = &backend.taps[0];
    thread::scope(|scope| {
        let (mem, stop) = (&*mem, &stop);
        scope.spawn(move || {
            let bad = [
                VnetHdr { csum_start: 0xffff, ..good },
                VnetHdr { gso_size: 0, ..good },
                VnetHdr { gso_size: 1, ..good },
                VnetHdr { gso_type: gso::UDP, ..good },
                VnetHdr { hdr_len: 0xffff, ..good },
            ];
            let mut wrong_protocol = tcp[..54].to_vec();
            wrong_protocol[23] = 17;
            while !stop.load(Ordering::Relaxed) {
                for header in bad {
                    mem.write(addr, &header.to_bytes());
                    mem.write(addr + 12, &wrong_protocol);
                    mem.write(addr, &good.to_bytes());
                    mem.write(addr + 12, &tcp[..54]);
                }
            }
        });
        let begin = Instant::now();
        let mut passed = 0;
        while begin.elapsed() < FOR {
            driver.tx.add(&[Buf::readable(addr, 12 + 54 + 3000)]);
            driver.tx.publish_and_kick();
            driver.tx.wait_used(common::PATIENCE).unwrap();
            while let Some((header, frame)) = tap.recv(Duration::ZERO) {
                if header.gso_type == gso::NONE {
                    continue;
                }
                passed += 1;
                assert_eq!(VnetHdr { gso_size: 1448, ..header }, good);
                assert!(header.gso_size == 1448 || (header.gso_size > 0 && 3000 / header.gso_size < 1366));
                assert_eq!(frame[23], 6, "the protocol headers are sent as they were checked");
            }
        }
        stop.store(true, Ordering::Relaxed);
        eprintln!("{passed} frames passed");
        assert!(passed > 0);
    });
}
