//! TAP queues and front-ends that somebody else opened and passed as descriptors.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use crate::common::PATIENCE;
use crate::common::backend::{Spawned, arg, for_any_user, inherit};
use crate::common::bench::Guest;
use crate::common::frontend::RawFrontend;
use crate::common::netns::{PacketSocket, TapSpec, require_root};
use crate::{BINARY, Place, TAP, assert_frames_pass};

const IFF_TAP: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const MULTI: i32 = IFF_TAP | libc::IFF_MULTI_QUEUE;
/// Numbers that nothing else has in a fresh process.
const FIRST: i32 = 20;

/// Gives `command`, which runs the binary, `fds` under numbers from `FIRST` on, which `--tap-fd` names.
fn with_tap_fds(mut command: Command, place: &Place, fds: &[BorrowedFd<'_>]) -> Command {
    let numbers = (FIRST..).zip(fds).map(|(number, fd)| {
        inherit(&mut command, *fd, number);
        number.to_string()
    });
    let numbers = numbers.collect::<Vec<_>>().join(",");
    command.args(["--socket-path", arg(&place.socket()), "--tap-fd", &numbers]);
    command
}

#[test]
fn queues_that_were_passed_as_descriptors_are_served() {
    if !require_root("queues_that_were_passed_as_descriptors_are_served") {
        return;
    }
    for (pairs, flags) in [(1, IFF_TAP), (1, MULTI), (3, MULTI)] {
        let place = Place::new();
        place.namespace.add_tap(&TapSpec { multi_queue: flags == MULTI, ..TapSpec::new(TAP) });
        let queues: Vec<OwnedFd> = (0..pairs).map(|_| place.namespace.open_tun(TAP, flags)).collect();
        let fds: Vec<_> = queues.iter().map(AsFd::as_fd).collect();
        // Outside the namespace: the descriptors are all that it needs.
        let mut backend = Spawned::run(&mut with_tap_fds(Command::new(BINARY), &place, &fds));
        backend.wait_line("Listening on");
        assert!(backend.log().contains(&format!("Took {pairs} descriptor(s) of TAP \"tap0\"")), "{}", backend.log());
        let mut guest = Guest::new(pairs, 0);
        let _front_end = place.connect(&guest);

        // One pair of several: the others have no buffers, so their queues are not attached.
        assert_frames_pass(&mut guest, &place.host());
    }
}

/// What a manager of services passes (`OpenFile=/dev/net/tun`) to one without rights, whose network is another.
#[test]
fn open_device_becomes_a_queue_of_the_interface_that_is_named() {
    if !require_root("open_device_becomes_a_queue_of_the_interface_that_is_named") {
        return;
    }
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"];
    for (pairs, kind, more) in [(1, "tap", ""), (1, "tap", "multi_queue"), (2, "tap", "multi_queue"), (1, "tun", "")] {
        let place = Place::new();
        place.namespace.ip(&format!("tuntap add dev it0 mode {kind} vnet_hdr user 65534 {more}"));
        place.namespace.ip("link set it0 up");
        let open = || OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap().into();
        let devices: Vec<OwnedFd> = (0..pairs).map(|_| place.namespace.within(open)).collect();
        let fds: Vec<_> = devices.iter().map(AsFd::as_fd).collect();
        let mut command = Command::new("unshare");
        command.arg("--net").arg("setpriv").args(nobody).arg(for_any_user(&place.socket()));
        let mut command = with_tap_fds(command, &place, &fds);
        let mut backend = Spawned::run(command.args([&format!("--{kind}"), "it0"]));
        backend.wait_line("Listening on");
        let what = kind.to_uppercase();
        assert!(backend.log().contains(&format!("Took {pairs} descriptor(s) of {what} \"it0\"")), "{}", backend.log());
        if kind == "tap" {
            let mut guest = Guest::new(pairs, 0);
            let _front_end = place.connect(&guest);
            place.namespace.wait_operational("it0");
            assert_frames_pass(&mut guest, &PacketSocket::open(&place.namespace, "it0"));
        }
        // Started again by who kept them, it finds them to be queues already.
        drop(backend);
        let mut command = with_tap_fds(place.namespace.command(BINARY), &place, &fds);
        let mut backend = Spawned::run(command.args([&format!("--{kind}"), "it0"]));
        backend.wait_line("Listening on");
    }
}

/// F-06
#[test]
fn descriptor_that_cannot_become_a_queue_of_what_is_named_is_refused() {
    if !require_root("descriptor_that_cannot_become_a_queue_of_what_is_named_is_refused") {
        return;
    }
    let place = Place::new();
    place.namespace.ip("tuntap add dev tun0 mode tun vnet_hdr");
    place.namespace.ip("link add br0 type bridge");
    let device = OwnedFd::from(place.namespace.within(|| OpenOptions::new().write(true).open("/dev/net/tun").unwrap()));
    let queue = place.namespace.open_tun("other0", IFF_TAP);
    for (fd, option, wanted) in [
        (&device, ["--tap", "tun0"], "Cannot attach to TAP \"tun0\" (queue 0)"),
        (&device, ["--tap", "br0"], "Cannot attach to TAP \"br0\" (queue 0)"),
        (&queue, ["--tap", "tap0"], "Descriptor 20 of --tap-fd is a queue of \"other0\" (TAP), not of \"tap0\""),
        (
            &queue,
            ["--tun", "other0"],
            "Descriptor 20 of --tap-fd is a queue of \"other0\" (TAP), not of \"other0\" (TUN)",
        ),
    ] {
        let mut command = with_tap_fds(place.namespace.command(BINARY), &place, &[fd.as_fd()]);
        let (code, log) = Spawned::refusal(command.args(option));
        assert_eq!(code, Some(1), "{option:?}: {log}");
        assert!(log.contains(wanted), "{option:?}: {log}");
    }
}

/// Root could create it by the same call, which nobody asked for; another user is told the true cause.
#[test]
fn open_device_does_not_create_the_interface_that_is_named() {
    if !require_root("open_device_does_not_create_the_interface_that_is_named") {
        return;
    }
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];
    for (user, made, wanted) in [
        (&[][..], "", "There is no TAP \"tap0\" in the network namespace where descriptor 20 of --tap-fd was opened"),
        (&nobody, "", "as root, there: 'ip tuntap add dev tap0 mode tap vnet_hdr user USER && ip link set tap0 up'"),
        (&nobody, "user 0", "(queue 0): this user is not its owner; as root: 'ip link delete tap0 && ip tuntap add"),
    ] {
        let place = Place::new();
        if !made.is_empty() {
            place.namespace.ip(&format!("tuntap add dev tap0 mode tap vnet_hdr {made}"));
        }
        let open = || OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        let device = OwnedFd::from(place.namespace.within(open));
        let mut command = Command::new("setpriv");
        command.args(user).arg(for_any_user(&place.socket()));
        let mut command = with_tap_fds(command, &place, &[device.as_fd()]);

        let (code, log) = Spawned::refusal(command.args(["--tap", TAP]));

        assert_eq!(code, Some(1), "{user:?}: {log}");
        assert!(log.contains(wanted), "{user:?}: {log}");
        assert_eq!(place.namespace.try_ip("link show tap0"), !made.is_empty(), "{user:?}");
    }
}

/// F-06
#[test]
fn descriptor_that_is_no_tap_queue_as_needed_is_refused() {
    if !require_root("descriptor_that_is_no_tap_queue_as_needed_is_refused") {
        return;
    }
    let place = Place::new();
    let open = |name: &str, flags: i32| place.namespace.open_tun(name, flags);
    let (pipe, _writer) = std::io::pipe().unwrap();
    let file = OwnedFd::from(File::open("/dev/net/tun").unwrap());
    let (good, more) = (open("multi0", MULTI), open("multi0", MULTI));
    let cases: [(&str, Vec<OwnedFd>, &str); 7] = [
        ("pipe", vec![pipe.into()], "Descriptor 20 of --tap-fd is no TAP queue"),
        ("no queue yet", vec![file], "Descriptor 20 of --tap-fd is no TAP queue"),
        (
            "no virtio-net header",
            vec![open("bare0", libc::IFF_TAP | libc::IFF_NO_PI)],
            "without the virtio-net header; open it with IFF_VNET_HDR",
        ),
        (
            "packet information",
            vec![open("pi0", libc::IFF_TAP | libc::IFF_VNET_HDR)],
            "with packet information before each frame; open it with IFF_NO_PI",
        ),
        (
            "two TAPs",
            vec![good, open("multi1", MULTI)],
            "Descriptor 21 of --tap-fd is a queue of \"multi1\" and the first one is of \"multi0\"",
        ),
        (
            "single queue",
            vec![open("single0", IFF_TAP), more],
            "that takes one queue only; open all of them with IFF_MULTI_QUEUE",
        ),
        ("socket", vec![UnixStream::pair().unwrap().0.into()], "is no TAP queue"),
    ];
    for (name, fds, wanted) in cases {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let (code, log) = Spawned::refusal(&mut with_tap_fds(place.namespace.command(BINARY), &place, &fds));
        assert_eq!(code, Some(1), "{name}: {log}");
        assert!(log.contains(wanted), "{name}: {log}");
        assert!(!place.socket().exists(), "{name}");
    }
}

#[test]
fn descriptor_that_is_not_open_is_refused() {
    let dir = tempfile::TempDir::new().unwrap();
    let socket = dir.path().join("socket");
    for (option, wanted) in [
        (["--tap-fd", "99"], "Descriptor 99 of --tap-fd is not open"),
        (["--tap-fd", "98,99"], "Descriptor 98 of --tap-fd is not open"),
    ] {
        let mut command = Command::new(BINARY);
        let (code, log) = Spawned::refusal(command.args(["--socket-path", arg(&socket)]).args(option));
        assert_eq!(code, Some(1));
        assert!(log.contains(wanted), "{log}");
    }
}

#[test]
fn connected_front_end_is_served_once_and_ends_the_process() {
    if !require_root("connected_front_end_is_served_once_and_ends_the_process") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = place.namespace.command(BINARY);
    inherit(&mut command, theirs.as_fd(), FIRST);
    let mut backend = Spawned::run(command.args(["--fd", "20", "--tap", TAP]));
    drop((theirs, command));
    let front_end = RawFrontend::from_stream(ours);
    let mut guest = Guest::new(1, 0);
    front_end.negotiate_like_qemu(&guest.session()).unwrap();
    assert_frames_pass(&mut guest, &place.host());

    front_end.disconnect();

    assert!(backend.wait_end(PATIENCE).success(), "{}", backend.log());
}

#[test]
fn connected_front_end_that_is_none_is_refused() {
    let listener_dir = tempfile::TempDir::new().unwrap();
    let listener = UnixListener::bind(listener_dir.path().join("socket")).unwrap();
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cases: [(&str, Option<OwnedFd>, &str); 5] = [
        ("not open", None, "Bad file descriptor"),
        ("pipe", Some(pipe.into()), "Socket operation on non-socket"),
        ("listening socket", Some(listener.into()), "not connected"),
        ("datagram socket", Some(datagram.into()), "it is a datagram socket, not a stream socket"),
        ("TCP socket", Some(tcp.into()), "it is no Unix socket"),
    ];
    for (name, fd, why) in cases {
        let mut command = Command::new(BINARY);
        if let Some(fd) = &fd {
            inherit(&mut command, fd.as_fd(), FIRST);
        }
        let (code, log) = Spawned::refusal(command.args(["--fd", "20", "--tap", TAP]));
        assert_eq!(code, Some(1), "{name}");
        assert!(log.contains("Descriptor 20 of --fd is no connected Unix stream socket"), "{name}: {log}");
        assert!(log.contains(why), "{name}: {log}");
    }
}
