//! The real binary under long and wrong use: what it holds, what it costs, what it logs.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use vmm_sys_util::eventfd::EventFd;

use crate::common::backend::Spawned;
use crate::common::bench::{BASE, Guest};
use crate::common::frames::{Ends, GUEST_MAC, Stamp, test_frame};
use crate::common::frontend::{Answer, Event, RawFrontend};
use crate::common::memory::{RegionInfo, memfd};
use crate::common::message::{Message, NO_FD, request};
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::place::{Place, assert_frames_pass};
use crate::common::split_ring::Desc;
use crate::common::virtio::{VnetHdr, feature};
use crate::common::{PATIENCE, fd_of, say, times};

pub(crate) const TAP: &str = "tap0";

/// A namespace with a TAP, the binary on it, and the host's end.
pub(crate) struct Bench {
    pub(crate) backend: Spawned,
    pub(crate) host: PacketSocket,
    pub(crate) place: Place,
    seq: u32,
}

impl Bench {
    pub(crate) fn new(pairs: usize) -> Bench {
        let place = Place::new();
        place.namespace.add_tap(&TapSpec { multi_queue: pairs > 1, ..TapSpec::new(TAP) });
        let backend = place.start(&["--tap", TAP, "--queue-pairs", &pairs.to_string()]);
        place.namespace.wait_operational(TAP);
        let host = PacketSocket::open(&place.namespace, TAP);
        let mut this = Bench { backend, host, place, seq: 0 };
        // It logs that it listens before it has all its own descriptors; counters come from its loop.
        this.backend.counters(pairs);
        this
    }

    pub(crate) fn connect(&self, guest: &Guest) -> RawFrontend {
        self.place.connect(guest)
    }

    pub(crate) fn assert_frames_pass(&mut self, guest: &mut Guest) {
        self.seq += 1;
        assert_frames_pass(guest, &self.host, self.seq);
    }

    /// Serves a new guest from connect to disconnect.
    pub(crate) fn assert_serves_anew(&mut self) {
        let mut guest = Guest::new(1, 0);
        let front_end = self.connect(&guest);
        self.assert_frames_pass(&mut guest);
        front_end.disconnect();
    }

    pub(crate) fn held(&self) -> Held {
        Held::by(&self.backend)
    }

    /// Waits until the process holds what it did; a session's descriptors go a moment after its connection.
    pub(crate) fn assert_holds_no_more_than(&self, before: &Held) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.held();
            let same = now.threads == before.threads && now.fds <= before.fds && now.mappings <= before.mappings + 4;
            // What the allocator keeps for next time.
            if same && now.rss_kib <= before.rss_kib + 1024 {
                return;
            }
            assert!(Instant::now() < deadline, "{now:?} after {before:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn assert_idle(&self) {
        self.backend.wait_at_rest();
    }
}

/// What a process holds.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    threads: usize,
    fds: usize,
    mappings: usize,
    rss_kib: u64,
}

impl Held {
    fn by(backend: &Spawned) -> Held {
        let of = |what: &str| format!("/proc/{}/{what}", backend.pid());
        let status = fs::read_to_string(of("status")).unwrap();
        let rss = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        Held {
            threads: fs::read_dir(of("task")).unwrap().count(),
            fds: fs::read_dir(of("fd")).unwrap().count(),
            mappings: fs::read_to_string(of("maps")).unwrap().lines().count(),
            rss_kib: rss.trim().trim_end_matches("kB").trim().parse().unwrap(),
        }
    }
}

/// U-30, U-55
#[test]
fn queue_sizes_and_enables_by_the_hundred_thousand_leave_memory_flat() {
    if !require_root("queue_sizes_and_enables_by_the_hundred_thousand_leave_memory_flat") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    let mut sizes = [1, 2, 64, 256, 1024].into_iter().cycle();
    let mut send = |count| {
        for _ in 0..count {
            // A ring that nothing runs, so that it is never started.
            assert!(front_end.tell(&Message::set_vring_num(2, sizes.next().unwrap())));
            // And one that runs.
            assert!(front_end.tell(&Message::set_vring_enable(1, 0)));
            assert!(front_end.tell(&Message::set_vring_enable(1, 1)));
        }
        assert!(front_end.is_alive());
    };
    send(1000);
    let before = bench.held();
    (0..100).for_each(|_| send(1000));
    bench.assert_holds_no_more_than(&before);
    bench.assert_frames_pass(&mut guest);
    bench.assert_idle();
}

/// U-35: a file that cannot be sealed is shortened, and then a thread looks into it.
#[test]
fn memory_that_is_cut_off_under_the_rings_ends_the_session_alone() {
    if !require_root("memory_that_is_cut_off_under_the_rings_ends_the_session_alone") {
        return;
    }
    type Touch = fn(&Bench, &Guest, &RawFrontend);
    let touches: [(&str, Touch); 3] = [
        ("tx worker", |_, guest, _| guest.pairs[0].tx.kick.write(1).unwrap()),
        ("rx worker", |bench, _, _| {
            bench.host.send(&test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, 200));
        }),
        ("control thread", |_, guest, front_end| {
            assert!(front_end.get_vring_base(1).is_ok());
            let kick = Message::set_vring_kick(1, fd_of(&guest.pairs[0].tx.kick));
            front_end.tell(&kick);
        }),
    ];
    let mut bench = Bench::new(1);
    // What the allocator keeps of the first sessions.
    (0..3).for_each(|_| bench.assert_serves_anew());
    let before = bench.held();
    for (who, touch) in touches {
        let mut guest = Guest::new(1, 0);
        let file = guest.mem.regions()[0].fd().try_clone_to_owned().unwrap();
        fcntl_add_seals(&file, SealFlags::SEAL).unwrap();
        let front_end = bench.connect(&guest);
        bench.assert_frames_pass(&mut guest);
        ftruncate(&file, 0).unwrap();

        touch(&bench, &guest, &front_end);

        bench.backend.wait_line("so the session ends: the front-end shortened its file");
        assert!(front_end.wait_closed(PATIENCE), "{who}");
        bench.assert_serves_anew();
        bench.assert_holds_no_more_than(&before);
    }
    bench.assert_idle();
}

/// U-42: the same of the log of written pages, into which the worker writes.
#[test]
fn log_that_is_cut_off_under_the_rings_ends_the_session_alone() {
    if !require_root("log_that_is_cut_off_under_the_rings_ends_the_session_alone") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    let file = memfd(4096);
    fcntl_add_seals(&file, SealFlags::SEAL).unwrap();
    let log = Message::set_log_base(4096, 0, file.as_fd());
    assert_eq!(front_end.get(&log).unwrap().body, log.body);
    assert_eq!(front_end.ask(Message::set_features(BASE | feature::LOG_ALL)), Answer::Ack);
    bench.assert_frames_pass(&mut guest);
    ftruncate(&file, 0).unwrap();

    bench.host.send(&test_frame(&Ends::RX, Stamp { stream: 2, seq: 0 }, 200));

    bench.backend.wait_line("The log of written pages is gone, so the session ends");
    assert!(front_end.wait_closed(PATIENCE));
    bench.assert_serves_anew();
    bench.assert_idle();
}

/// U-45, U-46, U-47: not offered, so that each is refused, and leaves nothing.
#[test]
fn inflight_regions_asked_for_ten_thousand_times_are_refused_and_leave_nothing() {
    if !require_root("inflight_regions_asked_for_ten_thousand_times_are_refused_and_leave_nothing") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    let file = memfd(4096);
    // Size, offset, queues, queue size: possible, and not.
    let shapes =
        [(4096, 0, 2_u16, 256_u16), (4096, 0, 0, 0), (u64::MAX, 4096, 65_535, 3), (1, u64::MAX, 65_535, 65_535)];
    let body = |(size, offset, queues, depth): (u64, u64, u16, u16)| {
        [&size.to_ne_bytes()[..], &offset.to_ne_bytes(), &queues.to_ne_bytes(), &depth.to_ne_bytes(), &[0; 4]].concat()
    };
    let ask = |count: usize| {
        for shape in shapes.into_iter().cycle().take(count) {
            let get = Message::new(request::GET_INFLIGHT_FD, body(shape));
            assert_eq!(front_end.ask(get), Answer::Nack(1));
            let set = Message::new(request::SET_INFLIGHT_FD, body(shape)).with_fd(file.as_fd());
            assert_eq!(front_end.ask(set), Answer::Nack(1));
        }
    };
    ask(100);
    let before = bench.held();
    ask(10_000);
    bench.assert_holds_no_more_than(&before);
    bench.assert_frames_pass(&mut guest);
    bench.assert_idle();
}

/// R-FDLEAK, U-16, U-17: with more than 32 the connection ends, and theirs with it.
#[test]
fn messages_with_any_number_of_descriptors_leave_none_behind() {
    if !require_root("messages_with_any_number_of_descriptors_leave_none_behind") {
        return;
    }
    let mut bench = Bench::new(1);
    bench.assert_serves_anew();
    let before = bench.held();
    let (_reader, writer) = std::io::pipe().unwrap();
    let mut state = 1_u32;
    let mut random = |end: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % end
    };
    let connect = |bench: &Bench| {
        let front_end = RawFrontend::connect(bench.place.socket()).unwrap();
        let offered = front_end.get_u64(&Message::get_protocol_features()).unwrap();
        assert!(front_end.tell(&Message::set_protocol_features(offered)));
        front_end
    };
    let mut front_end = connect(&bench);
    let mut ended = 0;
    for _ in 0..times(3000, 10_000) {
        let count = if random(20) == 0 { random(254) } else { random(33) };
        let request = random(50);
        let message = Message::new(request, vec![0; [0, 8, 12, 40][random(4) as usize]]);
        let fds = vec![writer.as_fd(); count as usize];
        front_end.send(&message.with_fds(fds)).unwrap();
        // What is answered is read; where it ends, the next one is served.
        if count > 32 {
            while let Event::Reply(_) = front_end.receive(PATIENCE) {}
            ended += 1;
            front_end = connect(&bench);
        } else {
            front_end.send(&Message::set_owner().with_need_reply()).unwrap();
            loop {
                match front_end.receive(PATIENCE) {
                    Event::Reply(reply) if reply.request == request::SET_OWNER => break,
                    Event::Reply(_) => {}
                    other => panic!("{other:?} after request {request} with {count} descriptors"),
                }
            }
        }
    }
    assert!(ended > 10);
    front_end.disconnect();
    bench.assert_holds_no_more_than(&before);
    // SEND_RARP is right with any eight bytes.
    while bench.host.recv(Duration::ZERO).is_some() {}
    bench.assert_serves_anew();
    bench.assert_idle();
}

/// R-FDERR: each message that takes descriptors, wrong at each step of what is done with them.
#[test]
fn message_that_fails_at_any_step_keeps_no_descriptor_and_no_mapping() {
    if !require_root("message_that_fails_at_any_step_keeps_no_descriptor_and_no_mapping") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    let (file, eventfd) = (memfd(1 << 20), guest.pairs[0].tx.call.try_clone().unwrap());
    let (directory, device) = (fs::File::open("/").unwrap(), fs::File::open("/dev/null").unwrap());
    let region = |guest: u64, size: u64| RegionInfo { guest, size, user: guest, offset: 0 };
    let own = guest.mem.regions()[0].info;
    let good = region(0x4000_0000, 1 << 20);
    let long = region(0x5000_0000, 1 << 21);
    let over = RegionInfo { guest: own.guest + 4096, ..good };
    let file_fd = file.as_fd();
    let table = |infos: &[RegionInfo], count| Message::set_mem_table_claiming(infos).with_fds(vec![file_fd; count]);
    let mut messages = vec![
        table(&[good, long], 2),
        table(&[good, good], 2),
        table(&[good, region(0, 0)], 2),
        table(&[good], 3),
        table(&[good, long], 1),
        table(&[], 5),
        Message::add_mem_reg_claiming(&long).with_fd(file_fd),
        Message::add_mem_reg_claiming(&over).with_fd(file_fd),
        Message::add_mem_reg_claiming(&good).with_fds([file_fd; 2]),
        Message::add_mem_reg_claiming(&good).with_fd(directory.as_fd()),
        Message::set_log_fd(fd_of(&eventfd)),
        Message::new(request::SET_INFLIGHT_FD, vec![0; 24]).with_fd(file_fd),
        Message::set_backend_req_fd(fd_of(&eventfd)),
        Message::set_device_state_fd(0, fd_of(&eventfd)),
        Message::get_features().with_fd(file_fd),
        Message::new(99, vec![0; 8]).with_fd(file_fd),
    ];
    for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
        messages.push(Message::u64(request, 77).with_fd(fd_of(&eventfd)));
        messages.push(Message::u64(request, NO_FD).with_fd(fd_of(&eventfd)));
        messages.push(Message::u64(request, 0).with_fds([fd_of(&eventfd); 2]));
        messages.push(Message::u64(request, 0).with_fd(device.as_fd()));
        messages.push(Message::new(request, vec![0; 7]).with_fd(fd_of(&eventfd)));
    }
    // Each takes the place of the one before.
    let log = Message::set_log_base(4096, 0, file_fd);
    let refused_logs = [
        Message::set_log_base(1 << 21, 0, file_fd),
        Message::set_log_base(4096, 0, directory.as_fd()),
        Message::set_log_base(1, 0, file_fd),
        log.clone().with_fds([file_fd; 2]),
    ];
    assert_eq!(front_end.get(&log).unwrap().body, log.body);
    let before = bench.held();
    for round in 0..20 {
        for message in &messages {
            assert_eq!(front_end.ask(message.clone()), Answer::Nack(1), "round {round}, {message:?}");
        }
        for message in &refused_logs {
            assert_eq!(front_end.get(message).unwrap().body, [0; 16], "round {round}, {message:?}");
        }
        assert_eq!(front_end.get(&log).unwrap().body, log.body);
    }
    bench.assert_holds_no_more_than(&before);
    bench.assert_frames_pass(&mut guest);
}

/// U-37: 64 TiB without a page behind them are address space and nothing else, so they are not refused: what a front-end
/// may hand over is limited by what the kernel maps.
#[test]
fn region_of_64_tib_of_nothing_costs_nothing() {
    if !require_root("region_of_64_tib_of_nothing_costs_nothing") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    let before = bench.held();
    const SIZE: u64 = 1 << 46;
    let (first, second) = (memfd(SIZE), memfd(SIZE));
    let at = |guest| RegionInfo { guest, size: SIZE, user: guest, offset: 0 };
    let (first_at, second_at) = (at(1 << 50), at(1 << 51));
    assert_eq!(front_end.ask(Message::add_mem_reg_claiming(&first_at).with_fd(first.as_fd())), Answer::Ack);
    // There is no room for another.
    assert_eq!(front_end.ask(Message::add_mem_reg_claiming(&second_at).with_fd(second.as_fd())), Answer::Nack(1));
    bench.assert_frames_pass(&mut guest);
    assert!(bench.held().rss_kib <= before.rss_kib + 1024);
    assert_eq!(front_end.ask(Message::rem_mem_reg(&first_at)), Answer::Ack);
    bench.assert_holds_no_more_than(&before);
    bench.assert_frames_pass(&mut guest);
}

/// Q-32, N-07
#[test]
fn kicks_without_end_cost_a_look_each_at_most_and_other_rings_go_on() {
    if !require_root("kicks_without_end_cost_a_look_each_at_most_and_other_rings_go_on") {
        return;
    }
    const PAIRS: usize = 2;
    let mut bench = Bench::new(PAIRS);
    let mut guest = Guest::new(PAIRS, 0);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    let kicks = u64::from(times(200_000, 1_000_000));
    let flooded = [&guest.pairs[1].rx, &guest.pairs[1].tx].map(|ring| ring.kick.try_clone().unwrap());
    let flood = {
        let flooded = flooded.each_ref().map(|kick| kick.try_clone().unwrap());
        thread::spawn(move || (0..kicks).for_each(|_| flooded.iter().for_each(|kick| kick.write(1).unwrap())))
    };
    while !flood.is_finished() {
        bench.assert_frames_pass(&mut guest);
    }
    flood.join().unwrap();
    bench.assert_idle();
    let counters = &bench.backend.counters(PAIRS)[1];
    for name in ["rx_kicks", "tx_kicks"] {
        let looks = counters[name];
        say(&format!("{looks} looks for {kicks} kicks"));
        assert!((1..=kicks + 10).contains(&looks), "{counters:?}");
    }
    assert_sleeps_between_kicks(&bench, &flooded);
    assert!(front_end.is_alive());
    bench.assert_frames_pass(&mut guest);
}

/// A thread that was kicked and found nothing sleeps, also where it is kicked again soon.
fn assert_sleeps_between_kicks(bench: &Bench, kicks: &[EventFd]) {
    const KICKS: u32 = 500;
    let began = (Instant::now(), bench.backend.cpu_time());
    for _ in 0..KICKS {
        kicks.iter().for_each(|kick| kick.write(1).unwrap());
        thread::sleep(Duration::from_millis(1));
    }
    let (wall, cpu) = (began.0.elapsed(), bench.backend.cpu_time() - began.1);
    say(&format!("Kicked each millisecond for {wall:?}: {cpu:?} of processor time"));
    // Far more than a look takes; one that waits awake takes all that it gets, also of a busy machine.
    assert!(cpu <= wall / 5, "{cpu:?} in {wall:?}");
}

/// P-19: there is no endpoint for counters but SIGUSR1.
#[test]
fn counters_asked_for_without_end_keep_nobody_waiting() {
    if !require_root("counters_asked_for_without_end_keep_nobody_waiting") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    for round in 0..1000 {
        bench.backend.signal(nix::sys::signal::Signal::SIGUSR1);
        if round % 20 == 0 {
            bench.assert_frames_pass(&mut guest);
            assert!(front_end.is_alive());
        }
    }
    bench.assert_idle();
    bench.assert_frames_pass(&mut guest);
}

/// P-25. What a guest and a front-end do wrong again and again, all at once, for some seconds.
#[test]
fn log_has_a_line_a_second_for_each_reason_at_most() {
    if !require_root("log_has_a_line_a_second_for_each_reason_at_most") {
        return;
    }
    const FOR: Duration = Duration::from_secs(3);
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    let lines_before = bench.backend.log().lines().count();
    let began = Instant::now();
    let mut rounds = 0_u32;
    while began.elapsed() < FOR {
        rounds += 1;
        assert!(front_end.get_vring_base(1).is_ok());
        guest.pairs[0].tx.reset();
        let kick = guest.pairs[0].tx.kick.try_clone().unwrap();
        assert_eq!(front_end.ask(Message::set_vring_kick(1, fd_of(&kick))), Answer::Ack);
        let tx = &mut guest.pairs[0].tx;
        // A bad chain, and then an index that cannot be.
        tx.write_desc(0, Desc { addr: 0, len: 100, flags: 0, next: 0 });
        tx.offer(0);
        tx.publish();
        tx.kick();
        assert!(tx.wait_used(PATIENCE).is_some());
        tx.write_avail_idx(0x4000);
        tx.kick();
        assert!(front_end.get_vring_base(1).is_ok());
        // It does not start so, nor is anything of this taken.
        assert_eq!(front_end.ask(Message::set_vring_kick(1, fd_of(&kick))), Answer::Nack(1));
        for bad in [Message::set_vring_num(0, 3), Message::new(99, vec![]), Message::set_features(u64::MAX)] {
            assert_eq!(front_end.ask(bad), Answer::Nack(1));
        }
        assert_eq!(front_end.ask(Message::send_rarp(GUEST_MAC)), Answer::Ack);
    }
    guest.pairs[0].tx.reset();
    let kick = guest.pairs[0].tx.kick.try_clone().unwrap();
    assert_eq!(front_end.ask(Message::set_vring_kick(1, fd_of(&kick))), Answer::Ack);
    let log = bench.backend.log();
    let mut reasons: BTreeMap<String, u32> = BTreeMap::new();
    for line in log.lines().skip(lines_before) {
        let reason: String = line.chars().filter(|c| !c.is_ascii_digit()).collect();
        *reasons.entry(reason).or_default() += 1;
    }
    say(&format!("{rounds} rounds of trouble in {FOR:?} made these lines: {reasons:#?}"));
    assert!(rounds > 20, "only {rounds} rounds");
    assert!(!reasons.is_empty(), "Nothing was said");
    let most = began.elapsed().as_secs() as u32 + 2;
    assert!(reasons.values().all(|lines| *lines <= most), "{reasons:#?}");
    // The RARP frames.
    while bench.host.recv(Duration::ZERO).is_some() {}
    bench.assert_frames_pass(&mut guest);
    bench.assert_idle();
}

/// P-25: where the features come last, all rings start with them, or say why they do not.
#[test]
fn ring_that_does_not_start_with_the_features_is_said_once_a_second() {
    if !require_root("ring_that_does_not_start_with_the_features_is_said_once_a_second") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1500) {
        assert_eq!(front_end.ask(Message::reset_device()), Answer::Ack);
        let tx = &guest.pairs[0].tx;
        tx.write_avail_idx(0x4000);
        for message in [
            Message::set_vring_num(1, tx.size.into()),
            Message::set_vring_addr(1, tx),
            Message::set_vring_kick(1, fd_of(&tx.kick)),
            Message::set_features(BASE),
        ] {
            assert_eq!(front_end.ask(message), Answer::Ack);
        }
    }
    let said = bench.backend.log().matches("Ring 1 does not start").count() as u64;
    assert!((1..=began.elapsed().as_secs() + 2).contains(&said), "said {said} times in {:?}", began.elapsed());
    front_end.disconnect();
    guest = Guest::new(1, 0);
    let _front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
}

/// P-22
#[test]
fn eight_pairs_on_one_processor_all_pass_frames() {
    const TEST: &str = "eight_pairs_on_one_processor_all_pass_frames";
    const PAIRS: usize = 8;
    if !require_root(TEST) {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new(TAP) });
    let mut command = place.namespace.command("taskset");
    let socket = place.socket();
    command.args(["-c", "0", env!("CARGO_BIN_EXE_vhost-user-net"), "--socket-path", socket.to_str().unwrap()]);
    command.args(["--tap", TAP, "--queue-pairs", "8"]);
    let mut backend = Spawned::run(&mut command);
    backend.wait_line("Listening on");
    let mut guest = Guest::new(PAIRS, 0);
    let _front_end = place.connect(&guest);
    let host = PacketSocket::open(&place.namespace, TAP);
    let began = Instant::now();
    for seq in 0..200 {
        for pair in &mut guest.pairs {
            pair.queue(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 1, seq }, 300));
            pair.tx.publish_and_kick();
        }
        for _ in 0..PAIRS {
            assert_eq!(host.recv(PATIENCE).unwrap(), test_frame(&Ends::TX, Stamp { stream: 1, seq }, 300));
        }
    }
    say(&format!("8 pairs on one processor: 200 frames each in {:?}", began.elapsed()));
    assert!(guest.pairs.iter_mut().all(|pair| pair.wait_tx_done(PATIENCE)));
    let counters = backend.counters(PAIRS);
    assert!(counters.iter().all(|pair| pair["tx_frames"] == 200), "{counters:?}");
}
