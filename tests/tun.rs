//! The real binary on real TUNs: a guest that is routed. Needs root; says SKIPPED aloud without.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::backend::{Spawned, arg, inherit};
use common::bench::Guest;
use common::frames::{self, Ends, GUEST_MAC, L4Csum, Stamp, checksums_are_right, payload};
use common::netns::require_root;
use common::place::Place;
use common::virtio::{VnetHdr, feature, net_flag};

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");
const CSUM: u64 = feature::CSUM | feature::GUEST_CSUM | feature::MRG_RXBUF;
const ALL: u64 = CSUM | feature::GUEST_TSO4 | feature::HOST_TSO4 | feature::GUEST_TSO6 | feature::HOST_TSO6;

/// A socket of the host's on `tun0`, which is given the address.
fn host(place: &Place) -> UdpSocket {
    place.namespace.ip("addr add 10.99.0.1/24 dev tun0");
    let socket = place.namespace.within(|| UdpSocket::bind("10.99.0.1:5000").unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn guest_with(queue_pairs: usize, features: u64) -> Guest {
    let mut guest = Guest::new(queue_pairs, features);
    let large = if features & feature::MRG_RXBUF == 0 { 66_000 } else { 2048 };
    guest.pairs.iter_mut().for_each(|pair| pair.post_rx(64, large));
    guest
}

/// The next frame of any pair, and of which.
fn receive_anywhere(guest: &mut Guest) -> (usize, VnetHdr, Vec<u8>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for (index, pair) in guest.pairs.iter_mut().enumerate() {
            if let Some((header, frame)) = pair.recv(Duration::from_millis(1)) {
                return (index, header, frame);
            }
        }
        assert!(Instant::now() < deadline, "no frame comes to the guest");
    }
}

/// Datagrams of the guest to a socket of the host, and back.
#[test]
fn guest_and_host_exchange_datagrams() {
    if !require_root("guest_and_host_exchange_datagrams") {
        return;
    }
    for (queue_pairs, features) in [(1, 0), (1, CSUM), (1, ALL), (4, 0), (4, ALL)] {
        let place = Place::new();
        let backend = place.start(&["--tun", "tun0", "--queue-pairs", &queue_pairs.to_string()]);
        assert!(backend.log().contains("Created TUN \"tun0\""), "{}", backend.log());
        let mut guest = guest_with(queue_pairs, features);
        let _front_end = place.connect(&guest);
        let host = host(&place);
        let mut bytes = [0; 2000];
        for seq in 0..20 {
            let content = payload(Stamp { stream: 1, seq }, 16 + 60 * seq as usize);
            let (header, csum) = if features & feature::CSUM == 0 {
                (VnetHdr::default(), L4Csum::Full)
            } else {
                let flags = net_flag::NEEDS_CSUM;
                (VnetHdr { flags, csum_start: 34, csum_offset: 6, ..VnetHdr::default() }, L4Csum::Partial)
            };
            let pair = seq as usize % queue_pairs;
            guest.pairs[pair].send(&header, &frames::udp4(&Ends::TX, &content, csum));
            let (len, from) = host.recv_from(&mut bytes).expect("a datagram on the host");
            assert!(bytes[..len] == content);
            // A flow comes back where it went out. The kernel notes that only after it has delivered the datagram, and the
            // thread in which it does may have to wait for a CPU.
            let (_, header, frame) = (0..1000)
                .map(|_| {
                    host.send_to(&content, from).unwrap();
                    let answer = receive_anywhere(&mut guest);
                    if answer.0 != pair {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    answer
                })
                .find(|(at, ..)| *at == pair)
                .expect("the answer comes to the queue of the question");
            assert_eq!((&frame[..6], &frame[42..]), (&GUEST_MAC[..], &content[..]));
            let is_finished = header.flags & net_flag::NEEDS_CSUM == 0;
            assert!(if is_finished { checksums_are_right(&frame) } else { header.csum_start == 34 });
            assert!(is_finished || features & feature::GUEST_CSUM != 0);
        }
    }
}

#[test]
fn jumbo_packets_pass_both_ways_once_the_mtu_allows_them() {
    if !require_root("jumbo_packets_pass_both_ways_once_the_mtu_allows_them") {
        return;
    }
    for features in [0, CSUM] {
        let place = Place::new();
        let mut backend = place.start(&["--tun", "tun0"]);
        let mut guest = guest_with(1, features);
        let front_end = place.connect(&guest);
        let host = host(&place);
        place.namespace.ip("link set dev tun0 mtu 9000");
        backend.wait_line("Interface \"tun0\": MTU 9000");
        assert_eq!(front_end.get_config(10, 2).unwrap(), 9000_u16.to_le_bytes());
        let content = payload(Stamp { stream: 1, seq: 0 }, 8972);
        guest.pairs[0].send(&VnetHdr::default(), &frames::udp4(&Ends::TX, &content, L4Csum::Full));
        let mut bytes = [0; 10_000];
        let (len, from) = host.recv_from(&mut bytes).expect("a datagram on the host");
        assert!(bytes[..len] == content);
        host.send_to(&content, from).unwrap();
        let (_, frame) = guest.pairs[0].recv(PATIENCE).expect("a frame in the guest");
        assert!(frame[42..] == content);
    }
}

/// As many datagrams as go as one frame to the kernel come out one by one.
#[test]
fn coalesced_datagrams_arrive_as_they_were_sent() {
    const DATAGRAMS: u32 = 50;
    if !require_root("coalesced_datagrams_arrive_as_they_were_sent") {
        return;
    }
    let place = Place::new();
    let mut backend = place.start(&["--tun", "tun0"]);
    let mut guest = guest_with(1, feature::CSUM | feature::EVENT_IDX);
    let _front_end = place.connect(&guest);
    let host = host(&place);
    let header = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHdr::default() };
    let content = |seq| payload(Stamp { stream: 1, seq }, 1400 - 300 * usize::from(seq % 10 == 9));
    for seq in 0..DATAGRAMS {
        guest.pairs[0].queue(&header, &frames::udp4(&Ends::TX, &content(seq), L4Csum::Partial));
    }
    guest.pairs[0].tx.publish_and_kick();
    let mut bytes = [0; 2000];
    for seq in 0..DATAGRAMS {
        let (len, _) = host.recv_from(&mut bytes).expect("a datagram");
        assert!(bytes[..len] == content(seq), "datagram {seq} is another one");
    }
    backend.wait_counter("tx_frames", u64::from(DATAGRAMS));
    let kernel_can = !backend.log().contains("Only TCP frames are coalesced");
    assert_eq!(backend.counters(1)[0]["tx_coalesced_frames"], if kernel_can { u64::from(DATAGRAMS) } else { 0 });
}

#[test]
fn existing_and_passed_tuns_carry_packets_too() {
    if !require_root("existing_and_passed_tuns_carry_packets_too") {
        return;
    }
    for is_passed in [false, true] {
        let place = Place::new();
        place.namespace.ip("tuntap add dev tun0 mode tun vnet_hdr");
        place.namespace.ip("link set tun0 up");
        let backend = if is_passed {
            let queue = place.namespace.open_tun("tun0", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
            let socket = place.socket();
            let mut command = place.namespace.command(BINARY);
            command.args(["--socket-path", arg(&socket), "--tap-fd", "20"]);
            inherit(&mut command, queue.as_fd(), 20);
            let mut backend = Spawned::run(&mut command);
            backend.wait_line("Listening on");
            backend
        } else {
            place.start(&["--tun", "tun0"])
        };
        let mut guest = guest_with(1, 0);
        let _front_end = place.connect(&guest);
        let host = host(&place);
        let content = payload(Stamp { stream: 1, seq: 0 }, 100);
        guest.pairs[0].send(&VnetHdr::default(), &frames::udp4(&Ends::TX, &content, L4Csum::Full));
        assert_eq!(host.recv_from(&mut [0; 200]).expect("a datagram on the host").0, 100);
        assert!(backend.log().contains("TUN \"tun0\""), "{}", backend.log());
    }
}

#[test]
fn each_wrong_interface_has_its_message() {
    if !require_root("each_wrong_interface_has_its_message") {
        return;
    }
    let place = Place::new();
    place.namespace.ip("tuntap add dev tap0 mode tap vnet_hdr");
    place.namespace.ip("tuntap add dev tun0 mode tun vnet_hdr");
    place.namespace.ip("link add veth0 type veth peer name veth1");
    for (args, wanted) in [
        (
            &["--tun", "tap0"][..],
            "\"tap0\" is a TAP interface, not a TUN; make a TUN of another name, as root: 'ip tuntap",
        ),
        (&["--tun", "veth0"], "\"veth0\" is a veth interface, not a TUN"),
        (&["--tap", "tun0"], "\"tun0\" is a TUN interface, not a TAP"),
        (&["--tun", "tun0", "--queue-pairs", "2"], "mode tun vnet_hdr multi_queue user USER && ip link set tun0 up"),
    ] {
        let log = place.refusal(args);
        assert!(log.contains(wanted), "{args:?}: {log}");
    }
}
