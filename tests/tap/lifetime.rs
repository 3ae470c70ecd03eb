//! The socket, signals, counters, and the end.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::common::backend::{arg, parse_counters};
use crate::common::bench::Guest;
use crate::common::frontend::RawFrontend;
use crate::common::message::Message;
use crate::common::netns::{TapSpec, require_root};
use crate::common::virtio::feature;
use crate::common::{PATIENCE, fd_of};
use crate::link::Load;
use crate::{Place, TAP, assert_frames_pass};

fn place_with_tap() -> Place {
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    place
}

/// P-01, P-03
#[test]
fn signal_under_load_ends_the_process_with_status_0_and_its_socket() {
    if !require_root("signal_under_load_ends_the_process_with_status_0_and_its_socket") {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let place = place_with_tap();
        let mut backend = place.start(&[]);
        let mut guest = Guest::new(1, 0);
        let front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &place.host());
        let load = Load::start(guest, &place);
        load.wait_moving(PATIENCE);

        let began = Instant::now();
        backend.signal(signal);
        let status = backend.wait_end(PATIENCE);

        crate::common::say(&format!("{signal} under load: ended after {:?}", began.elapsed()));
        assert_eq!(status.code(), Some(0), "{}", backend.log());
        assert!(!place.socket().exists(), "The socket is removed");
        assert!(front_end.wait_closed(PATIENCE));
        let (sent, used) = load.stop();
        // What was taken was given back, and nothing else: one frame went before the load.
        let counters = parse_counters(&backend.wait_line("Counters: pair=0 "));
        let is_of_tx = |name: &str| name == "tx_frames" || name.starts_with("tx_drop_");
        let counted: u64 = counters.iter().filter(|(name, _)| is_of_tx(name)).map(|(_, count)| count).sum();
        assert_eq!(used + 1, counted, "of {sent} frames: {counters:?}");
    }
}

/// P-01
#[test]
fn signal_while_idle_ends_the_process_with_status_0() {
    if !require_root("signal_while_idle_ends_the_process_with_status_0") {
        return;
    }
    let place = place_with_tap();
    let mut backend = place.start(&[]);
    let began = Instant::now();
    backend.signal(Signal::SIGTERM);
    assert_eq!(backend.wait_end(PATIENCE).code(), Some(0));
    crate::common::say(&format!("SIGTERM while idle: ended after {:?}", began.elapsed()));
    assert!(!place.socket().exists());
}

/// P-03
#[test]
fn counters_are_logged_on_sigusr1_and_at_the_end() {
    if !require_root("counters_are_logged_on_sigusr1_and_at_the_end") {
        return;
    }
    let place = place_with_tap();
    let mut backend = place.start(&[]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    for _ in 0..3 {
        assert_frames_pass(&mut guest, &place.host());
    }

    let counters = backend.counters(1);

    assert_eq!([counters[0]["rx_frames"], counters[0]["tx_frames"]], [3, 3]);
    assert_eq!([counters[0]["rx_bytes"], counters[0]["tx_bytes"]], [600, 600]);
    backend.signal(Signal::SIGTERM);
    let last = backend.wait_line("Counters: pair=0 ");
    assert!(last.contains("tx_frames=3 "), "{last}");
}

/// P-07
#[test]
fn socket_of_a_process_that_is_gone_is_replaced() {
    if !require_root("socket_of_a_process_that_is_gone_is_replaced") {
        return;
    }
    let place = place_with_tap();
    drop(UnixListener::bind(place.socket()).unwrap());
    assert!(place.socket().exists(), "The file is left");

    let backend = place.start(&[]);

    assert!(backend.log().contains("of a process that is gone"), "{}", backend.log());
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.host());
}

/// I-10: after SIGKILL the next one starts at the same place, and the guest's frames pass.
#[test]
fn process_after_one_that_was_killed_takes_its_place() {
    if !require_root("process_after_one_that_was_killed_takes_its_place") {
        return;
    }
    let place = place_with_tap();
    let mut guest = Guest::new(1, 0);
    for _ in 0..3 {
        let mut backend = place.start(&[]);
        let front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &place.host());
        backend.signal(Signal::SIGKILL);
        assert_eq!(backend.wait_end(PATIENCE).code(), None);
        drop(front_end);
        guest.resume_at_used_index();
    }
}

/// P-08, P-09
#[test]
fn socket_path_that_cannot_be_used_is_refused_and_left_alone() {
    if !require_root("socket_path_that_cannot_be_used_is_refused_and_left_alone") {
        return;
    }
    let place = place_with_tap();
    let path = place.socket();
    let target = place.dir.path().join("target");
    let refused = |wanted: &str| {
        let log = place.refusal(&["--tap", TAP]);
        assert!(log.contains(wanted), "{log}");
    };

    let live = UnixListener::bind(&path).unwrap();
    refused("is served by another process (another back-end?); end it, or use another path");
    assert!(std::os::unix::net::UnixStream::connect(&path).is_ok(), "The other process still has it");
    drop(live);
    fs::remove_file(&path).unwrap();

    fs::create_dir(&path).unwrap();
    refused("is a directory, which is left alone; use another path");
    fs::remove_dir(&path).unwrap();

    fs::write(&path, "precious").unwrap();
    refused("is a file, which is left alone; use another path");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::remove_file(&path).unwrap();

    for to in [&target, &place.dir.path().to_owned()] {
        symlink(to, &path).unwrap();
        refused("is a symbolic link, which is left alone; use another path");
        assert!(!target.exists());
        fs::remove_file(&path).unwrap();
    }
}

/// P-09
#[test]
fn socket_path_that_is_too_long_or_nowhere_is_refused() {
    if !require_root("socket_path_that_is_too_long_or_nowhere_is_refused") {
        return;
    }
    let place = place_with_tap();
    let folder = arg(place.dir.path()).len();
    let long = |len: usize| place.dir.path().join("x".repeat(len - folder - 1));
    let nowhere = place.dir.path().join("absent/socket");
    let folder_of_that_name = place.dir.path().join("s/");
    for (path, code_wanted, wanted) in [
        (long(108), 2, "has 108 bytes, and a socket's path can have 107; use a shorter one"),
        (long(200), 2, "has 200 bytes"),
        (folder_of_that_name, 2, "ends with '/', which a socket's path does not: it is that of a directory"),
        (nowhere, 1, "its directory is not there; 'mkdir -p "),
    ] {
        let mut command = place.namespace.command(crate::BINARY);
        let command = command.args(["--socket-path", arg(&path), "--tap", TAP]);
        let (code, log) = crate::common::backend::Spawned::refusal(command);
        assert_eq!(code, Some(code_wanted), "{log}");
        assert!(log.contains(wanted), "{log}");
    }
    let path = long(107);
    let args = ["--socket-path", arg(&path), "--tap", TAP];
    let _backend = crate::common::backend::Spawned::start_in(&place.namespace, &args);
    assert!(RawFrontend::connect(&path).unwrap().is_alive(), "107 bytes will do");
}

/// The path is looked at first: what is created and persists would stay.
#[test]
fn socket_path_that_cannot_be_used_leaves_no_created_tap() {
    if !require_root("socket_path_that_cannot_be_used_leaves_no_created_tap") {
        return;
    }
    let place = Place::new();
    let as_nobody = ["--reuid=65534", "--inh-caps=+net_admin", "--ambient-caps=+net_admin"];
    let not_nobodys = place.dir.path().join("not-nobodys");
    fs::create_dir(&not_nobodys).unwrap();
    fs::set_permissions(&not_nobodys, fs::Permissions::from_mode(0o755)).unwrap();
    let binary = crate::common::backend::for_any_user(&place.socket());
    for (user, path, wanted) in [
        (&[][..], place.dir.path().to_owned(), "is a directory, which is left alone; use another path"),
        (&[], place.dir.path().join("absent/socket"), "its directory is not there; 'mkdir -p "),
        (&as_nobody, not_nobodys.join("socket"), "this user may not write to "),
    ] {
        let mut command = place.namespace.command("setpriv");
        command.args(user).args([arg(&binary), "--socket-path", arg(&path), "--tap", TAP, "--persist"]);

        let (code, log) = crate::common::backend::Spawned::refusal(&mut command);

        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(wanted), "{log}");
        assert!(!place.namespace.try_ip("link show tap0"), "{log}");
    }
}

/// P-11
#[test]
fn socket_has_the_mode_and_group_that_were_asked_for() {
    if !require_root("socket_has_the_mode_and_group_that_were_asked_for") {
        return;
    }
    use std::os::unix::fs::MetadataExt;
    for (more, mode, group) in
        [(&[][..], 0o600, 0), (&["--socket-mode", "0660", "--socket-group", "65534"][..], 0o660, 65534)]
    {
        let place = place_with_tap();
        let _backend = place.start(more);
        let found = fs::metadata(place.socket()).unwrap();
        assert_eq!((found.permissions().mode() & 0o777, found.gid()), (mode, group));
    }
}

#[test]
fn group_that_the_user_may_not_give_the_socket_to_is_said() {
    if !require_root("group_that_the_user_may_not_give_the_socket_to_is_said") {
        return;
    }
    let place = Place::new();
    place.namespace.ip("tuntap add dev tap0 mode tap vnet_hdr user 65534");
    let socket = place.socket();
    let args = ["--socket-path", arg(&socket), "--tap", TAP, "--socket-group", "root"];
    let (code, log) = crate::common::backend::Spawned::refusal(&mut crate::attach::as_nobody(&place, "666", &args));
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("to group \"root\" of --socket-group: this user is no member of it"), "{log}");
    assert!(!socket.exists());
}

/// P-10
#[test]
fn second_front_end_is_logged() {
    if !require_root("second_front_end_is_logged") {
        return;
    }
    let place = place_with_tap();
    let mut backend = place.start(&[]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    let second = RawFrontend::connect(place.socket()).unwrap();
    assert!(second.wait_closed(PATIENCE));
    backend.wait_line("Refused a second front-end: one is being served");
    assert_frames_pass(&mut guest, &place.host());
}

/// R-FDLEAK, P-12: descriptors and memory do not grow from session to session.
#[test]
fn sessions_leave_no_descriptor_behind() {
    if !require_root("sessions_leave_no_descriptor_behind") {
        return;
    }
    let place = place_with_tap();
    let mut backend = place.start(&[]);
    // It logs that it listens before it has all its own descriptors; counters come from its loop.
    backend.counters(1);
    let count = || fs::read_dir(format!("/proc/{}/fd", backend.pid())).unwrap().count();
    let idle = count();
    for _ in 0..20 {
        let mut guest = Guest::new(1, 0);
        let front_end = place.connect(&guest);
        assert_frames_pass(&mut guest, &place.host());
        assert!(count() > idle, "A session has descriptors");
        front_end.disconnect();
        // The next one is served only after the one before is gone.
    }
    crate::wait_until("the descriptors are closed", || count() == idle);
}

/// crosvm hands over the lower half of the features first.
#[test]
fn legacy_driver_is_told_of_when_it_starts_a_ring_and_half_of_the_features_is_not_one() {
    if !require_root("legacy_driver_is_told_of_when_it_starts_a_ring_and_half_of_the_features_is_not_one") {
        return;
    }
    for is_legacy in [true, false] {
        let place = place_with_tap();
        let mut backend = place.start(&[]);
        let guest = Guest::new(1, 0);
        let front_end = RawFrontend::connect(place.socket()).unwrap();
        let ring = &guest.pairs[0].tx;
        assert!(front_end.tell(&Message::set_owner()) && front_end.tell(&Message::set_features(feature::MRG_RXBUF)));
        if !is_legacy {
            front_end.tell(&Message::set_features(feature::MRG_RXBUF | feature::VERSION_1));
        }
        for message in [
            Message::set_mem_table(&guest.mem),
            Message::set_vring_num(1, ring.size.into()),
            Message::set_vring_addr(1, ring),
            Message::set_vring_kick(1, fd_of(&ring.kick)),
        ] {
            assert!(front_end.tell(&message));
        }
        assert!(front_end.is_alive());
        const TOLD: &str = "Ring 1 does not start: The guest's driver does not use VIRTIO 1";
        if is_legacy {
            backend.wait_line(TOLD);
        }
        if !is_legacy {
            // The next one is, of a front-end that says no word of the end of the one before.
            assert!(front_end.get_vring_base(1).is_ok());
            front_end.tell(&Message::set_features(feature::MRG_RXBUF));
            front_end.tell(&Message::set_vring_kick(1, fd_of(&ring.kick)));
            backend.wait_line(TOLD);
        }
        backend.counters(1);
        assert_eq!(backend.log().matches("VIRTIO 1").count(), 1, "{}", backend.log());
    }
}
