//! The real binary's start, end, and what it lives through: signals, limits, closed descriptors, front-ends that come and
//! go.

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use crate::common::backend::{Spawned, arg, inherit};
use crate::common::bench::Guest;
use crate::common::frames::{Ends, Stamp, test_frame};
use crate::common::frontend::{Answer, Event, RawFrontend};
use crate::common::memory::{RegionInfo, memfd};
use crate::common::message::Message;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::common::place::{Place, assert_frames_pass};
use crate::common::virtio::VnetHdr;
use crate::common::{PATIENCE, QUIET, say, skip, times, wait_readable, wait_until};
use crate::process::{Bench, TAP};

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-net");

pub(crate) fn place_with_tap() -> Place {
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    place
}

/// I-04, P-12. Some say something first, some a whole session, some nothing.
#[test]
fn front_ends_that_come_and_go_by_the_thousand_are_served_and_leave_nothing() {
    if !require_root("front_ends_that_come_and_go_by_the_thousand_are_served_and_leave_nothing") {
        return;
    }
    let mut bench = Bench::new(1);
    (0..10).for_each(|_| bench.assert_serves_anew());
    let before = bench.held();
    let began = Instant::now();
    let count = times(1000, 1_000_000);
    let guest = Guest::new(1, 0);
    for round in 0..count {
        let front_end = RawFrontend::connect(bench.place.socket()).unwrap();
        match round % 4 {
            0 => {}
            1 => assert!(front_end.is_alive(), "front-end {round}"),
            2 => _ = front_end.send_bytes(&[1, 0, 0], &[]),
            _ => _ = front_end.negotiate_like_cloud_hypervisor(&guest.session()).unwrap(),
        }
        front_end.disconnect();
    }
    say(&format!("{count} front-ends in {:?}", began.elapsed()));
    bench.assert_holds_no_more_than(&before);
    bench.assert_serves_anew();
    bench.assert_idle();
}

/// I-05. What it stands still in is no message, so nothing is unfinished: 30 seconds where all is done in full.
#[test]
fn front_end_that_stands_still_is_kept_and_its_frames_pass() {
    if !require_root("front_end_that_stands_still_is_kept_and_its_frames_pass") {
        return;
    }
    let mut bench = Bench::new(1);
    let mut guest = Guest::new(1, 0);
    let front_end = bench.connect(&guest);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(times(6, 30).into()) {
        bench.assert_frames_pass(&mut guest);
        thread::sleep(QUIET);
    }
    assert!(RawFrontend::connect(bench.place.socket()).unwrap().wait_closed(PATIENCE), "Another one is turned away");
    assert!(front_end.is_alive());
    bench.assert_idle();
}

/// Puts the process to sleep for some time while frames wait on both sides; all of them pass afterwards, in order.
fn assert_sleep_loses_nothing(bench: &mut Bench, sleep: impl FnOnce(&Spawned), wake: impl FnOnce(&Spawned)) {
    const FRAMES: u32 = 100;
    let mut guest = Guest::new(1, 0);
    guest.pairs[0].post_rx(128, 2048);
    let front_end = bench.connect(&guest);
    bench.assert_frames_pass(&mut guest);
    sleep(&bench.backend);
    for seq in 0..FRAMES {
        guest.pairs[0].send(&VnetHdr::default(), &test_frame(&Ends::TX, Stamp { stream: 5, seq }, 300));
        bench.host.send(&test_frame(&Ends::RX, Stamp { stream: 6, seq }, 300));
    }
    thread::sleep(Duration::from_secs(times(1, 60).into()));
    let slept = bench.host.recv(Duration::ZERO).is_none();
    wake(&bench.backend);
    assert!(slept, "It did not sleep");
    for seq in 0..FRAMES {
        let sent = test_frame(&Ends::TX, Stamp { stream: 5, seq }, 300);
        assert_eq!(bench.host.recv(PATIENCE).expect("a frame that waited"), sent);
        let received = test_frame(&Ends::RX, Stamp { stream: 6, seq }, 300);
        assert_eq!(guest.pairs[0].recv(PATIENCE).expect("a frame that waited").1, received);
    }
    assert!(front_end.is_alive());
    bench.assert_idle();
}

/// What each thread of a process does, as proc(5) has it.
fn thread_states(backend: &Spawned) -> Vec<char> {
    let tasks = fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    let stats = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    stats.map(|stat| stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()).collect()
}

fn stop(backend: &Spawned) {
    backend.signal(Signal::SIGSTOP);
    // It takes each thread a moment to hear of it.
    wait_until("all threads are stopped", || thread_states(backend).iter().all(|state| *state == 'T'));
}

/// P-21
#[test]
fn process_that_was_stopped_for_a_while_goes_on_with_nothing_lost() {
    if !require_root("process_that_was_stopped_for_a_while_goes_on_with_nothing_lost") {
        return;
    }
    let mut bench = Bench::new(1);
    assert_sleep_loses_nothing(&mut bench, stop, |backend| backend.signal(Signal::SIGCONT));
}

/// U-02, P-21. The rest of a message comes, and then it is too late for it, all while the process is stopped: both are
/// known to it at once when it goes on.
#[test]
fn message_whose_rest_came_in_time_to_a_stopped_process_is_answered() {
    if !require_root("message_whose_rest_came_in_time_to_a_stopped_process_is_answered") {
        return;
    }
    let mut bench = Bench::new(1);
    let front_end = RawFrontend::connect(bench.place.socket()).unwrap();
    assert!(front_end.is_alive());
    let message = Message::get_features().to_bytes();
    front_end.send_bytes(&message[..5], &[]).unwrap();
    thread::sleep(QUIET);
    stop(&bench.backend);
    front_end.send_bytes(&message[5..], &[]).unwrap();
    // A message is given five seconds.
    thread::sleep(Duration::from_secs(6));
    bench.backend.signal(Signal::SIGCONT);
    assert!(matches!(front_end.receive(PATIENCE), Event::Reply(_)));
    assert!(front_end.is_alive());
    front_end.disconnect();
    bench.assert_serves_anew();
}

/// A control group of this test, removed with it.
struct Freezer {
    dir: std::path::PathBuf,
    file: &'static str,
    values: [&'static str; 2],
}

impl Freezer {
    /// None where this process may not make one. Its name begins with what `VHOST_USER_NET_RUN` calls this run, as those of
    /// namespaces do.
    fn new() -> Option<Freezer> {
        let run = std::env::var("VHOST_USER_NET_RUN").map_or(String::new(), |run| run + "-");
        let name = format!("vun-{run}{}", std::process::id());
        for (root, file, values) in [
            ("/sys/fs/cgroup/freezer", "freezer.state", ["THAWED", "FROZEN"]),
            ("/sys/fs/cgroup", "cgroup.freeze", ["0", "1"]),
        ] {
            let dir = std::path::Path::new(root).join(&name);
            if fs::create_dir(&dir).is_ok() {
                let this = Freezer { dir, file, values };
                if this.dir.join(file).exists() {
                    return Some(this);
                }
            }
        }
        None
    }

    fn set(&self, frozen: bool) {
        fs::write(self.dir.join(self.file), self.values[usize::from(frozen)]).unwrap();
        let (told, wanted) = match self.file {
            "freezer.state" => ("freezer.state", self.values[usize::from(frozen)].to_owned()),
            _ => ("cgroup.events", format!("frozen {}", u8::from(frozen))),
        };
        let is_so = || fs::read_to_string(self.dir.join(told)).unwrap().contains(&wanted);
        wait_until("the control group is frozen, or not", is_so);
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join(self.file), self.values[0]);
        let _ = fs::remove_dir(&self.dir);
    }
}

/// P-23
#[test]
fn process_that_was_frozen_for_a_while_goes_on_with_nothing_lost() {
    const TEST: &str = "process_that_was_frozen_for_a_while_goes_on_with_nothing_lost";
    if !require_root(TEST) {
        return;
    }
    let Some(freezer) = Freezer::new() else { return skip(TEST, "may not make a control group that freezes") };
    let mut bench = Bench::new(1);
    if fs::write(freezer.dir.join("cgroup.procs"), bench.backend.pid().to_string()).is_err() {
        return skip(TEST, "may not put a process into a control group");
    }
    assert_sleep_loses_nothing(&mut bench, |_| freezer.set(true), |_| freezer.set(false));
    drop(bench);
}

/// P-02
#[test]
fn sigterm_at_any_moment_of_the_start_ends_it_and_leaves_no_socket() {
    if !require_root("sigterm_at_any_moment_of_the_start_ends_it_and_leaves_no_socket") {
        return;
    }
    let place = place_with_tap();
    let began = Instant::now();
    drop(place.start(&["--tap", TAP]));
    let whole = began.elapsed();
    let (mut in_time, mut too_early) = (0, 0);
    let steps = times(30, 300);
    for step in 0..steps {
        let mut command = place.namespace.command(BINARY);
        command.args(["--socket-path", arg(&place.socket()), "--tap", TAP]);
        let mut backend = Spawned::run(&mut command);
        thread::sleep(whole * step / steps);
        backend.signal(Signal::SIGTERM);
        let status = backend.wait_end(PATIENCE);
        match (status.code(), status.signal()) {
            (Some(0), _) => in_time += 1,
            // Before it takes signals as events, when there is nothing to clean up.
            (None, Some(libc::SIGTERM)) => too_early += 1,
            _ => panic!("{status} {:?} of {whole:?} after the start: {}", whole * step / steps, backend.log()),
        }
        assert!(!place.socket().exists(), "step {step}: {}", backend.log());
    }
    say(&format!("SIGTERM within the {whole:?} of a start: {in_time} ended in order, {too_early} before it began"));
    assert!(in_time > 0);
    let _backend = place.start(&["--tap", TAP]);
}

/// The number that the next descriptor of a process has, and a limit that forbids it.
fn lowest_free_descriptor(backend: &Spawned) -> u64 {
    let is_free = |number: &u64| fs::symlink_metadata(format!("/proc/{}/fd/{number}", backend.pid())).is_err();
    (0..).find(is_free).unwrap()
}

/// P-04
#[test]
fn process_out_of_descriptors_does_not_spin_and_serves_once_it_has_some() {
    if !require_root("process_out_of_descriptors_does_not_spin_and_serves_once_it_has_some") {
        return;
    }
    let mut bench = Bench::new(1);
    let idle = bench.held();
    bench.assert_serves_anew();
    bench.assert_holds_no_more_than(&idle);
    let pid = rustix::process::Pid::from_raw(bench.backend.pid().as_raw());
    // It has raised its own to the most that it may have, which is what we may have.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let free = lowest_free_descriptor(&bench.backend);
    let old = prlimit(pid, Resource::Nofile, Rlimit { current: Some(free), maximum }).unwrap();
    let waiting = RawFrontend::connect(bench.place.socket()).unwrap();
    bench.backend.wait_line("Cannot accept a front-end");
    let (began, cpu) = (Instant::now(), bench.backend.cpu_time());
    thread::sleep(Duration::from_millis(2500));
    let spent = bench.backend.cpu_time() - cpu;
    assert!(spent <= Duration::from_millis(100), "{spent:?} of processor time in {:?}", began.elapsed());
    let said = bench.backend.log().matches("Cannot accept a front-end").count();
    assert!(said <= 5, "said {said} times");

    prlimit(pid, Resource::Nofile, old).unwrap();

    assert!(waiting.is_alive(), "It is served as soon as there is a descriptor for it");
    // And with just enough for the connection, what comes with a message has no room.
    let free = lowest_free_descriptor(&bench.backend);
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(free), maximum }).unwrap();
    let file = memfd(4096);
    let info = RegionInfo { guest: 0, size: 4096, user: 0x10_0000, offset: 0 };
    waiting.send(&Message::set_mem_table_claiming(&[info]).with_fd(file.as_fd())).unwrap();
    assert!(waiting.wait_closed(PATIENCE), "A message without its descriptors cannot be trusted");
    prlimit(pid, Resource::Nofile, old).unwrap();
    bench.assert_serves_anew();
    bench.assert_idle();
}

/// P-05
#[test]
fn start_with_too_little_memory_works_or_fails_with_a_message() {
    if !require_root("start_with_too_little_memory_works_or_fails_with_a_message") {
        return;
    }
    let place = place_with_tap();
    let (mut started, mut failed) = (0, 0);
    for mib in [4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 512] {
        let mut command = place.namespace.command("sh");
        let script = format!("ulimit -v {}; exec \"$@\"", mib << 10);
        command.args(["-c", &script, "sh", BINARY, "--socket-path", arg(&place.socket()), "--tap", TAP]);
        let mut backend = Spawned::run(&mut command);
        // The standard library's end where there is no memory, and that of a thread that the sandbox forbids to abort.
        const DEADLY: [Signal; 2] = [Signal::SIGABRT, Signal::SIGSYS];
        DEADLY.into_iter().for_each(|signal| backend.may_end_by(signal));
        let deadline = Instant::now() + PATIENCE;
        while !backend.log().contains("Listening on") && !backend.has_ended() {
            assert!(Instant::now() < deadline, "{mib} MiB: neither started nor failed: {}", backend.log());
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(20));
        if backend.has_ended() {
            failed += 1;
            let status = backend.wait_end(PATIENCE);
            say(&format!("{mib} MiB: {status}: {}", backend.log()));
            assert!(!backend.log().is_empty(), "{mib} MiB: {status}, and not a word");
            // 127 is the loader's, before there is a word of ours, and the other the standard library's.
            let last = backend.log().lines().last().unwrap_or_default().to_owned();
            let is_before = status.code() == Some(127) || backend.log().contains("memory allocation of ");
            assert!(is_before || last.starts_with("vhost-user-net: Cannot "), "{mib} MiB: {last}");
            // One that the library ends after it listens, for want of a few bytes more, cannot take its socket away. The
            // next start does.
            let is_aborted = DEADLY.into_iter().any(|signal| status.signal() == Some(signal as i32));
            assert!(is_aborted || !place.socket().exists(), "{mib} MiB");
        } else {
            started += 1;
        }
    }
    assert!(started > 0 && failed > 0, "{started} started, {failed} failed");
}

/// P-11: the socket's mode and group are the policy; who may connect is not asked again.
#[test]
fn user_whom_the_sockets_mode_keeps_out_cannot_connect() {
    if !require_root("user_whom_the_sockets_mode_keeps_out_cannot_connect") {
        return;
    }
    const NOBODY: u32 = 65_534;
    /// Connects as a user and group without privileges, and asks a question.
    fn connects(path: &std::path::Path) -> Result<bool, std::io::ErrorKind> {
        let connect = || {
            for (call, id) in [(libc::SYS_setgroups, 0), (libc::SYS_setresgid, NOBODY), (libc::SYS_setresuid, NOBODY)] {
                // SAFETY: these take numbers (no groups, at no address, the first), and change this thread alone.
                let dropped = unsafe { libc::syscall(call, id, id, id) };
                assert_eq!(dropped, 0, "{}", std::io::Error::last_os_error());
            }
            RawFrontend::connect(path).map(|front_end| front_end.is_alive()).map_err(|error| error.kind())
        };
        thread::scope(|scope| scope.spawn(connect).join().unwrap())
    }
    let place = place_with_tap();
    fs::set_permissions(place.socket().parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    let denied = Err(std::io::ErrorKind::PermissionDenied);
    for (more, wanted) in [
        (&[][..], denied),
        (&["--socket-mode", "0660"][..], denied),
        (&["--socket-mode", "0660", "--socket-group", "65534"], Ok(true)),
        (&["--socket-mode", "0666"], Ok(true)),
    ] {
        let _backend = place.start(&[&["--tap", TAP][..], more].concat());
        assert_eq!(connects(&place.socket()), wanted, "{more:?}");
        // The one before may have its end still to come.
        wait_until("its own user connects", || RawFrontend::connect(place.socket()).unwrap().is_alive());
    }
}

/// The binary behind a shell's redirection, whose log nobody has.
struct Unheard(Child);

impl Unheard {
    fn start(place: &Place, redirection: &str, input: PipeWriter) -> Unheard {
        let mut command = place.namespace.command("sh");
        let script = format!("exec \"$@\" {redirection}");
        command.args(["-c", &script, "sh", BINARY, "--socket-path", arg(&place.socket()), "--tap", TAP]);
        let this = Unheard(command.stdin(input).stderr(Stdio::null()).spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        while !place.socket().exists() || RawFrontend::connect(place.socket()).is_err() {
            assert!(Instant::now() < deadline, "{redirection}: it does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        this
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    fn wait_end(&mut self) -> ExitStatus {
        let mut ended = None;
        wait_until("the process has ended", || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pipe that takes nothing until it is read.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    (reader, writer)
}

/// P-13, P-15: a log that is full or closed or that blocks, and no standard descriptors at all.
#[test]
fn process_whose_log_is_lost_passes_frames_and_ends_when_told() {
    if !require_root("process_whose_log_is_lost_passes_frames_and_ends_when_told") {
        return;
    }
    /// It is given a pipe that is full.
    const BLOCKS: &str = "2>&0 </dev/null";
    let place = place_with_tap();
    for (round, redirection) in (0..).zip(["2>/dev/full", "2>&-", "<&- >&- 2>&-", BLOCKS]) {
        let (mut unread, full) = full_pipe();
        let mut backend = Unheard::start(&place, redirection, full);
        let deadline = Instant::now() + PATIENCE;
        let mut guest = Guest::new(1, 0);
        // The connection that showed that it listens may have its end still to come.
        let front_end = loop {
            let front_end = RawFrontend::connect(place.socket()).unwrap();
            if front_end.is_alive() {
                break front_end;
            }
            assert!(Instant::now() < deadline, "{redirection}");
        };
        front_end.negotiate_like_cloud_hypervisor(&guest.session()).unwrap();
        let host = PacketSocket::open(&place.namespace, TAP);
        assert_frames_pass(&mut guest, &host, round);
        // What is logged is not heard.
        kill(backend.pid(), Signal::SIGUSR1).unwrap();
        assert_eq!(front_end.ask(Message::set_vring_num(0, 3)), Answer::Nack(1));
        assert_frames_pass(&mut guest, &host, round);
        for standard in 0..3 {
            let target = fs::read_link(format!("/proc/{}/fd/{standard}", backend.pid())).unwrap();
            let target = target.to_str().unwrap();
            assert!(
                !target.contains("socket:") && !target.contains("anon_inode") && !target.contains("tun"),
                "{target}"
            );
        }
        if redirection == BLOCKS {
            unread.read_exact(&mut vec![0; 1 << 16]).unwrap();
        }
        kill(backend.pid(), Signal::SIGTERM).unwrap();
        let status = backend.wait_end();
        assert_eq!(status.code(), Some(0), "{redirection}");
        assert!(!place.socket().exists());
        if redirection == BLOCKS {
            let mut heard = String::new();
            unread.read_to_string(&mut heard).unwrap();
            assert!(heard.starts_with("vhost-user-net: warn: Lost "), "{heard}");
            assert!(heard.contains("Ending on a signal"), "{heard}");
        }
    }
}

/// P-16: whoever starts it may have left something open.
#[test]
fn descriptors_that_it_was_started_with_by_mistake_are_closed() {
    if !require_root("descriptors_that_it_was_started_with_by_mistake_are_closed") {
        return;
    }
    let place = place_with_tap();
    let queue = place.namespace.open_tap(TAP, false);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = place.namespace.command(BINARY);
    command.args(["--socket-path", arg(&place.socket()), "--tap-fd", "20"]);
    inherit(&mut command, queue.fd.as_fd(), 20);
    for number in [19, 21, 98] {
        inherit(&mut command, writer.as_fd(), number);
    }
    let mut backend = Spawned::run(&mut command);
    backend.wait_line("Listening on");
    drop((command, writer));
    assert!(wait_readable(&reader, PATIENCE), "it is held open");
    assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
    let mut guest = Guest::new(1, 0);
    let front_end = RawFrontend::connect(place.socket()).unwrap();
    front_end.negotiate_like_cloud_hypervisor(&guest.session()).unwrap();
    assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, TAP), 0);
}
