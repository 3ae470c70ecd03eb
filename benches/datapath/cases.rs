//! What is measured: each case once, for one contender.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::common::frames::{self, Ends, L4Csum, Stamp, payload};
use crate::common::netns::PacketSocket;
use crate::common::virtio::{VnetHdr, feature, gso, net_flag};
use crate::floor::{self, Frame, HEADERS, Receiver, Sender, TOGETHER, timed};
use crate::guest::{FEATURES, Guest, RING_SIZE, RX_BUFFER, Ring, pause};
use crate::place::{Contender, PATIENCE, Place, TAP, on_backend_cpu, set_option, thread_cpu};

/// Payload of a frame that asks to be segmented.
const LARGE: usize = 64_000;
const MSS: u16 = 1448;
/// Flows of the mixed cases.
const FLOWS: u16 = 16;

/// How many chains the conventional back-end has to pop for the largest frame of the case.
const CHAINS: &str = "VHOST_USER_NET_BENCH_CHAINS";

pub fn baseline_chains() -> usize {
    std::env::var(CHAINS).ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the guest, flows mixed: frames of so many bytes, to nobody.
    Tx(usize),
    /// The same on two queue pairs.
    TxPairs(usize),
    /// From the guest, flows mixed: frames of so many bytes to a socket of the host that is full, so all of the host's
    /// way in is gone through, whatever the device.
    TxToFull(usize),
    /// From the guest: super-frames.
    TxLarge,
    /// From the guest, one stream of datagrams of so many bytes into a socket of the host.
    UdpToSocket(usize),
    /// The same, across a bridge to a veth end where nobody has to cut them.
    UdpToVeth(usize),
    /// From the guest: super-frames of segments of so many bytes, across a bridge to a veth end where the host cuts them.
    /// What counts is all of the back-end's CPU, which is busy with them.
    TxCut(u16),
    /// To the guest: frames of so many bytes.
    Rx(usize),
    /// To the guest: super-frames.
    RxLarge,
    /// To a guest that cannot take them whole: datagrams of a socket with UDP segmentation; the sender's time counts, too.
    UdpFromSocket,
    /// One frame there and back at a time: time of each.
    PingPong,
}

/// One measurement.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Nanoseconds of the back-end's processor time for each frame (of the guest's: datagrams, super-frames).
    pub cpu_ns: f64,
    /// Frames in a second.
    pub rate: f64,
    /// Round trips in nanoseconds, sorted.
    pub trips: Vec<u64>,
}

impl Sample {
    fn new(frames: u64, cpu: Duration, wall: Duration) -> Sample {
        Sample {
            cpu_ns: cpu.as_nanos() as f64 / frames as f64,
            rate: frames as f64 / wall.as_secs_f64(),
            trips: Vec::new(),
        }
    }

    /// Of round trips.
    pub fn of_trips(mut trips: Vec<u64>) -> Sample {
        trips.sort_unstable();
        Sample { trips, ..Sample::default() }
    }
}

/// From the guest, to nobody: the host takes no frame to this address, and forwards no packet to that one.
const NOBODY: Ends = Ends { dst_mac: [2, 0, 0, 0, 0, 9], dst_ip: [10, 99, 0, 9], ..Ends::TX };

fn large_header() -> VnetHdr {
    VnetHdr {
        flags: net_flag::NEEDS_CSUM,
        gso_type: gso::TCPV4,
        hdr_len: 54,
        gso_size: MSS,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

fn partial_udp() -> VnetHdr {
    VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHdr::default() }
}

/// A datagram of the guest in a frame of `len` bytes.
fn datagram(ends: &Ends, len: usize) -> Frame {
    let bytes = payload(Stamp { stream: 1, seq: 0 }, len - HEADERS);
    (partial_udp(), frames::udp4(ends, &bytes, L4Csum::Partial))
}

/// Datagrams of so many bytes that go as one frame.
fn together(ends: &Ends, len: usize) -> Frame {
    let bytes = payload(Stamp { stream: 1, seq: 0 }, len * TOGETHER as usize);
    let header = VnetHdr { gso_type: gso::UDP_L4, hdr_len: HEADERS as u16, gso_size: len as u16, ..partial_udp() };
    (header, frames::udp4(ends, &bytes, L4Csum::Partial))
}

/// Frames of flows in turn that no one takes.
pub fn mixed(len: usize) -> Vec<Frame> {
    mixed_to(NOBODY, len)
}

fn mixed_to(ends: Ends, len: usize) -> Vec<Frame> {
    (0..FLOWS).map(|flow| datagram(&Ends { src_port: 4000 + flow, ..ends }, len)).collect()
}

fn large() -> Vec<Frame> {
    let bytes = payload(Stamp { stream: 1, seq: 0 }, LARGE);
    vec![(large_header(), frames::tcp4(&NOBODY, 1, &bytes, L4Csum::Partial))]
}

/// Measures one contender in one case; `scale` frames for each thousand.
pub fn measure(kind: Kind, contender: &Contender, scale: u64) -> Sample {
    match kind {
        Kind::Tx(len) => transmit(contender, 1, &mixed(len), 150 * scale),
        Kind::TxPairs(len) => transmit(contender, 2, &mixed(len), 100 * scale),
        Kind::TxToFull(len) => to_full(contender, len, 150 * scale),
        Kind::TxLarge => transmit(contender, 1, &large(), 10 * scale),
        Kind::UdpToSocket(len) => to_socket(contender, len, 20 * scale),
        Kind::UdpToVeth(len) => to_veth(contender, len, 100 * scale),
        Kind::TxCut(segment) => to_be_cut(contender, segment, 2 * scale),
        Kind::Rx(len) => receive(contender, len, 12 * scale),
        Kind::RxLarge => receive_large(contender, 3 * scale),
        Kind::UdpFromSocket => from_socket(contender, 9 * scale),
        Kind::PingPong => ping_pong(contender, 5 * scale),
    }
}

/// Bytes of an Ethernet header, which not every device counts.
const ETHERNET: usize = 14;

/// Frames that are sent before it is measured.
const WARM_UP: u64 = 45 * TOGETHER;

fn transmit(contender: &Contender, pairs: usize, frames: &[Frame], count: u64) -> Sample {
    transmit_in(&Place::new(pairs > 1), contender, pairs, frames, count)
}

fn transmit_in(place: &Place, contender: &Contender, pairs: usize, frames: &[Frame], count: u64) -> Sample {
    if contender.is_floor() {
        return floor_transmit(place, contender, frames, None, count);
    }
    let features = contender.features();
    let plain: Vec<_> = frames.iter().map(|(_, frame)| (VnetHdr::default(), frame.clone())).collect();
    let mut guest = Guest::new(pairs, if features & feature::CSUM == 0 { &plain } else { frames }, features);
    let process = place.start(contender, &mut guest, &[]);
    let pass = |guest: &mut Guest, count: u64| {
        std::thread::scope(|scope| {
            for pair in &mut guest.pairs {
                scope.spawn(move || pair.tx.pass(count / pairs as u64));
            }
        });
    };
    pass(&mut guest, WARM_UP);
    let (cpu, begun) = (process.cpu(), Instant::now());
    pass(&mut guest, count);
    let wall = begun.elapsed();
    let cpu = process.cpu() - cpu;
    assert_arrived(place, contender, frames, count);
    Sample::new(count, cpu, wall)
}

fn floor_transmit(
    place: &Place,
    contender: &Contender,
    frames: &[Frame],
    together: Option<Frame>,
    count: u64,
) -> Sample {
    let mut sender = Sender::new(place, contender, frames, together);
    // As many as go together, so that none is left out.
    let count = count.next_multiple_of(TOGETHER);
    on_backend_cpu(|| sender.send(WARM_UP));
    let (cpu, wall) = timed(contender, || sender.send(count));
    assert_arrived(place, contender, frames, count);
    Sample::new(count, cpu, wall)
}

/// What is lost costs less: nothing may be. Of a stream that goes on as one only the payload is sure to arrive.
fn assert_arrived(place: &Place, contender: &Contender, frames: &[Frame], count: u64) {
    let headers = if frames.len() == 1 { HEADERS } else { ETHERNET };
    let least = (WARM_UP + count) * (frames[0].1.len() - headers) as u64;
    let [bytes, packets] = place.received(contender.host_side());
    let name = contender.name();
    assert!(bytes >= least, "{name}: of {count} frames {packets} packets arrived with {bytes} bytes, not {least}");
}

fn to_full(contender: &Contender, len: usize, count: u64) -> Sample {
    let place = Place::new(false);
    let socket = host_socket(&place, SO_RCVBUF_MIN);
    let sample = transmit_in(&place, contender, 1, &mixed_to(Ends::TX, len), count);
    let arrived = socket.recv(&mut [0; 2048]).expect("a datagram");
    assert_eq!(arrived, len - HEADERS, "{} delivers datagrams", contender.name());
    sample
}

/// Less than one datagram: the kernel raises it to what it thinks the least, which holds one or two.
const SO_RCVBUF_MIN: i32 = 0;

/// What the guest sends to, with room for so many bytes: nobody reads them while it is measured.
fn host_socket(place: &Place, room: i32) -> UdpSocket {
    let socket = place.namespace.within(|| UdpSocket::bind("10.99.0.1:5000").expect("a socket"));
    set_option(&socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room);
    socket.set_nonblocking(true).expect("a socket");
    socket
}

fn to_socket(contender: &Contender, len: usize, count: u64) -> Sample {
    // As many as the kernel has room for without that they all come from elsewhere; and what a start costs is little.
    const AT_ONCE: u64 = 90 * TOGETHER;
    let place = Place::new(false);
    let socket = host_socket(&place, 1 << 29);
    let mut bytes = [0; 2048];
    // Between two measurements, so that the reader's time does not count and the kernel's memory is used again.
    let mut read = || {
        let mut came = 0;
        while let Ok(got) = socket.recv(&mut bytes) {
            assert_eq!(got, len);
            came += 1;
        }
        assert_eq!(came, AT_ONCE, "{} delivers all datagrams", contender.name());
    };
    let frames = [datagram(&Ends::TX, len + HEADERS)];
    let times = count.div_ceil(AT_ONCE);
    let (mut cpu, mut wall) = (Duration::ZERO, Duration::ZERO);
    let mut add = |(spent, took)| {
        cpu += spent;
        wall += took;
        read();
    };
    if contender.is_floor() {
        let mut sender = Sender::new(&place, contender, &frames, Some(together(&Ends::TX, len)));
        (0..times).for_each(|_| add(timed(contender, || sender.send(AT_ONCE))));
    } else {
        let mut guest = Guest::new(1, &frames, FEATURES);
        let process = place.start(contender, &mut guest, &[]);
        for _ in 0..times {
            let (before, begun) = (process.cpu(), Instant::now());
            guest.pairs[0].tx.pass(AT_ONCE);
            let took = begun.elapsed();
            add((process.cpu() - before, took));
        }
    }
    Sample::new(times * AT_ONCE, cpu, wall)
}

fn to_veth(contender: &Contender, len: usize, count: u64) -> Sample {
    let place = place_with_bridge();
    let frames = [datagram(&NEIGHBOUR, len + HEADERS)];
    if contender.is_floor() {
        let together = Some(together(&NEIGHBOUR, len));
        return floor_transmit(&place, contender, &frames, together, count);
    }
    transmit_in(&place, contender, 1, &frames, count)
}

fn to_be_cut(contender: &Contender, segment: u16, count: u64) -> Sample {
    let place = place_with_bridge();
    place.namespace.ip("link set veth0 gso_max_size 2000");
    let bytes = payload(Stamp { stream: 1, seq: 0 }, LARGE);
    let header = VnetHdr { gso_size: segment, ..large_header() };
    let frame = frames::tcp4(&NEIGHBOUR, 1, &bytes, L4Csum::Partial);
    let arrived = || place.received("veth1")[1];
    let before = arrived();
    let sample = transmit_in(&place, contender, 1, &[(header, frame)], count);
    let each = (arrived() - before) / (count + WARM_UP);
    // As many as wait for the other end at most (net.core.netdev_max_backlog).
    assert!(each >= LARGE.div_ceil(segment.into()).min(1000) as u64, "only {each} segments of each frame arrive");
    Sample { cpu_ns: 1e9 / sample.rate, ..sample }
}

/// Frames to this end flow on over the bridge.
const NEIGHBOUR: Ends = Ends { dst_mac: [2, 0, 0, 0, 0, 9], ..Ends::TX };

/// The TAP and a veth pair's end are ports of a bridge.
fn place_with_bridge() -> Place {
    let place = Place::new(false);
    for command in [
        "link add br0 type bridge",
        "link add veth0 type veth peer name veth1",
        "link set tap0 master br0",
        "link set veth0 master br0",
        "link set veth0 up",
        "link set veth1 up",
        "link set br0 up",
    ] {
        place.namespace.ip(command);
    }
    // A bridge listens before it forwards; and it floods what it has not seen.
    std::thread::sleep(Duration::from_millis(50));
    place
}

/// A host's side whose frames wait in the TAP's queue until the guest has buffers.
fn sender(place: &Place, contender: &Contender, vnet_hdr: bool) -> PacketSocket {
    let device = contender.host_side();
    let socket = if vnet_hdr {
        PacketSocket::open_vnet_hdr(&place.namespace, device)
    } else {
        PacketSocket::open(&place.namespace, device)
    };
    set_option(&socket.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 1 << 29);
    socket
}

fn receive(contender: &Contender, len: usize, count: u64) -> Sample {
    let (_, frame) = datagram(&Ends::RX, len);
    let frame = &frame[contender.on().omitted()..];
    receive_with(contender, count.div_ceil(AT_ONCE), AT_ONCE, len, |place| {
        let socket = sender(place, contender, false);
        (0..AT_ONCE).for_each(|_| socket.send(frame));
    })
}

/// Frames that wait at the same time: so many of the usual MTU a packet socket of ours has room for.
const AT_ONCE: u64 = 3000;

fn receive_large(contender: &Contender, count: u64) -> Sample {
    let frame = frames::tcp4(&Ends::RX, 1, &payload(Stamp { stream: 2, seq: 0 }, LARGE), L4Csum::Partial);
    let header = large_header();
    let times = count.div_ceil(LARGE_AT_ONCE);
    receive_with(contender, times, LARGE_AT_ONCE, frame.len(), |place| {
        let socket = sender(place, contender, true);
        (0..LARGE_AT_ONCE).for_each(|_| socket.send_vnet(&header, &frame).expect("the TAP's queue has room"));
    })
}

/// Super-frames that wait at the same time: 64 MB.
const LARGE_AT_ONCE: u64 = 1000;

/// Fills the TAP with `count` frames of `len` bytes, then gives the guest's buffers and times how they come back, `times`
/// over, and once before that: memory that is used the first time would count as much as the rest.
fn receive_with(contender: &Contender, times: u64, count: u64, len: usize, fill: impl Fn(&Place)) -> Sample {
    let chains = chains_of(len);
    let place = Place::new(false);
    let (mut cpu, mut wall) = (Duration::ZERO, Duration::ZERO);
    let mut add = |time: u64, spent, took| {
        if time > 0 {
            (cpu, wall) = (cpu + spent, wall + took);
        }
    };
    if contender.is_floor() {
        let mut receiver = Receiver::new(&place, contender);
        for time in 0..=times {
            fill(&place);
            let (spent, took) = timed(contender, || receiver.receive(count, chains as usize));
            add(time, spent, took);
        }
        return Sample::new(times * count, cpu, wall);
    }
    let mut guest = Guest::new(1, &[datagram(&NOBODY, 64)], FEATURES);
    let process = place.start(contender, &mut guest, &[(CHAINS, chains.to_string())]);
    // On a TUN a guest that has said nothing is asked for its address, again and again.
    guest.pairs[0].tx.pass(1);
    for time in 0..=times {
        fill(&place);
        std::thread::sleep(Duration::from_millis(20));
        let (before, begun) = (process.cpu(), Instant::now());
        if chains == 1 {
            drain(&mut guest, count, count);
        } else {
            drain(&mut guest, count * chains, u64::MAX);
        }
        let took = begun.elapsed();
        add(time, process.cpu() - before, took);
        assert_received(&guest, contender, len);
    }
    Sample::new(times * count, cpu, wall)
}

/// Buffers that a frame of so many bytes takes.
fn chains_of(len: usize) -> u64 {
    (VnetHdr::LEN + len).div_ceil(RX_BUFFER) as u64
}

/// The last buffers that came back hold whole frames of so many bytes.
fn assert_received(guest: &Guest, contender: &Contender, len: usize) {
    let frames = u64::from(RING_SIZE) / chains_of(len);
    let came = guest.pairs[0].rx.last_bytes((frames * chains_of(len)) as u16);
    assert_eq!(came, frames * (VnetHdr::LEN + len) as u64, "{}: {frames} frames of {len} bytes", contender.name());
}

/// Gives buffers, `most` at most, until `count` came back.
fn drain(guest: &mut Guest, count: u64, most: u64) {
    let rx = &mut guest.pairs[0].rx;
    let mut left = most;
    let mut give = |rx: &mut Ring, free: u16| {
        let more = left.min(free.into());
        left -= more;
        rx.give(more as u16);
    };
    let free = RING_SIZE - rx.outstanding();
    give(rx, free);
    let deadline = Instant::now() + PATIENCE;
    let (mut came, mut free) = (0, 0);
    while came < count {
        let back = rx.take();
        came += u64::from(back);
        free += back;
        if free >= RING_SIZE / 4 {
            give(rx, std::mem::take(&mut free));
        }
        if back == 0 {
            assert!(Instant::now() < deadline, "only {came} of {count} came");
            pause();
        }
    }
}

fn from_socket(contender: &Contender, count: u64) -> Sample {
    const DATAGRAM: usize = 1400;
    let place = Place::new(false);
    let mut guest = Guest::new(1, &[datagram(&Ends::TX, 64)], FEATURES);
    let process = (!contender.is_floor()).then(|| place.start(contender, &mut guest, &[]));
    let queue = process.is_none().then(|| place.floor(contender.on()));
    let socket = place.namespace.within(|| UdpSocket::bind("10.99.0.1:0").expect("a socket"));
    socket.connect("10.99.0.2:5000").expect("a route");
    set_option(&socket.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 1 << 29);
    set_option(&socket.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, DATAGRAM as i32);
    let bytes = vec![7; DATAGRAM * TOGETHER as usize];
    let sends = count / TOGETHER;
    let (backend, sender) = (process.as_ref().map(|process| process.cpu()), thread_cpu());
    let begun = Instant::now();
    (0..sends).for_each(|_| assert_eq!(socket.send(&bytes).expect("the TAP's queue has room"), bytes.len()));
    let mut cpu = thread_cpu() - sender;
    if let Some(queue) = queue {
        let mut frame = vec![0; 66_000];
        cpu += on_backend_cpu(|| {
            let before = thread_cpu();
            (0..sends * TOGETHER).for_each(|_| assert!(rustix::io::read(&queue, &mut frame).expect("a frame") > 0));
            thread_cpu() - before
        });
    } else {
        drain(&mut guest, sends * TOGETHER, u64::MAX);
        assert_received(&guest, contender, HEADERS + DATAGRAM);
    }
    let wall = begun.elapsed();
    if let (Some(process), Some(before)) = (process, backend) {
        cpu += process.cpu() - before;
    }
    Sample::new(sends * TOGETHER, cpu, wall)
}

fn ping_pong(contender: &Contender, count: u64) -> Sample {
    let place = Place::new(false);
    let there = datagram(&Ends { dst_mac: [2, 0, 0, 0, 0, 9], ..Ends::TX }, 64);
    let (_, back) = datagram(&Ends::RX, 64);
    if contender.is_floor() {
        return floor::ping_pong(&place, contender, &there, &back, count);
    }
    let mut guest = Guest::new(1, &[there], FEATURES);
    let _process = place.start(contender, &mut guest, &[]);
    let host = PacketSocket::open(&place.namespace, TAP);
    let pair = &mut guest.pairs[0];
    pair.rx.give(RING_SIZE);
    let mut trips = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        pair.rx.ask_for_call();
        pair.tx.give(1);
        host.recv(PATIENCE).expect("a frame on the host");
        host.send(&back);
        let came = pair.rx.wait();
        trips.push(begun.elapsed().as_nanos() as u64);
        pair.rx.give(came);
        pair.tx.take();
    }
    Sample::of_trips(trips)
}
