//! Attaching to a TAP by name, creating one, and each way in which that cannot be.

use std::process::Command;

use crate::common::backend::{Spawned, arg, for_any_user};
use crate::common::bench::Guest;
use crate::common::netns::{TapSpec, require_root};
use crate::{BINARY, Place, TAP, assert_frames_pass, wait_until};

#[test]
fn existing_tap_is_attached_to_and_left_as_it_was() {
    if !require_root("existing_tap_is_attached_to_and_left_as_it_was") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { mtu: Some(1400), ..TapSpec::new(TAP) });
    let mut backend = place.start(&["--mtu", "9000"]);
    assert!(backend.log().contains("Attached to TAP \"tap0\" with 1 queue(s)"), "{}", backend.log());
    let mut guest = Guest::new(1, 0);
    let front_end = place.connect(&guest);

    assert_frames_pass(&mut guest, &place.host());

    assert!(place.namespace.ip("link show tap0").contains("mtu 1400 "), "An existing TAP keeps its MTU");
    drop(front_end);
    backend.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(backend.wait_end(crate::common::PATIENCE).success());
    assert!(place.namespace.ip("link show tap0").contains("tap0"), "A persistent TAP stays");
}

#[test]
fn tap_that_is_created_is_up_has_the_mtu_and_goes_with_the_process() {
    if !require_root("tap_that_is_created_is_up_has_the_mtu_and_goes_with_the_process") {
        return;
    }
    let place = Place::new();
    let mut backend = place.start(&["--mtu", "9000"]);
    assert!(backend.log().contains("Created TAP \"tap0\" with 1 queue(s)"), "{}", backend.log());
    let mut guest = Guest::new(1, 0);
    let front_end = place.connect(&guest);

    assert_frames_pass(&mut guest, &place.host());

    let shown = place.namespace.ip("link show tap0");
    assert!(shown.contains("mtu 9000 ") && shown.contains("UP"), "{shown}");
    assert_eq!(front_end.get_config(10, 2).unwrap(), 9000_u16.to_le_bytes());
    backend.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(backend.wait_end(crate::common::PATIENCE).success());
    assert!(!place.namespace.ip("link show").contains("tap0"));
}

#[test]
fn mtu_that_no_tap_can_have_is_refused_with_the_limit() {
    if !require_root("mtu_that_no_tap_can_have_is_refused_with_the_limit") {
        return;
    }
    let place = Place::new();
    let log = place.refusal(&["--tap", TAP, "--mtu", "65522"]);
    assert!(log.contains("Cannot give TAP \"tap0\" MTU 65522 of --mtu: a TAP takes at most 65521"), "{log}");
    assert!(!place.namespace.ip("link show").contains(TAP));
    for (option, name, mtu) in [("--tap", "tap1", "65521"), ("--tun", "tun1", "65535")] {
        let socket = place.socket();
        let args = ["--socket-path", arg(&socket), option, name, "--mtu", mtu];
        let _backend = Spawned::start_in(&place.namespace, &args);
        assert!(place.namespace.ip(&format!("link show {name}")).contains(&format!("mtu {mtu} ")));
    }
}

#[test]
fn mtu_that_the_guest_is_told_is_that_of_the_tap() {
    if !require_root("mtu_that_the_guest_is_told_is_that_of_the_tap") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { mtu: Some(1400), ..TapSpec::new(TAP) });
    let _backend = place.start(&[]);
    let front_end = place.connect(&Guest::new(1, 0));
    assert_eq!(front_end.get_config(10, 2).unwrap(), 1400_u16.to_le_bytes());
}

#[test]
fn tap_that_is_down_is_warned_about_and_works_once_it_is_up() {
    if !require_root("tap_that_is_down_is_warned_about_and_works_once_it_is_up") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    place.namespace.ip("link set tap0 down");
    let backend = place.start(&[]);
    assert!(backend.log().contains("is down, no frames will pass: 'ip link set tap0 up'"), "{}", backend.log());
    place.namespace.ip("link set tap0 up");
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.host());
}

#[test]
fn interface_of_another_kind_is_refused_by_its_kind() {
    if !require_root("interface_of_another_kind_is_refused_by_its_kind") {
        return;
    }
    let place = Place::new();
    place.namespace.ip("link add br0 type bridge");
    place.namespace.ip("link add veth0 type veth peer name veth1");
    place.namespace.ip("tuntap add dev tun0 mode tun vnet_hdr");
    for (name, wanted) in [
        ("br0", "Interface \"br0\" is a bridge interface, not a TAP"),
        ("veth0", "Interface \"veth0\" is a veth interface, not a TAP"),
        ("lo", "Interface \"lo\" is a loopback interface, not a TAP"),
        ("tun0", "Interface \"tun0\" is a TUN interface, not a TAP"),
    ] {
        let log = place.refusal(&["--tap", name]);
        assert!(
            log.contains(wanted) && log.contains("'ip tuntap add dev NAME mode tap vnet_hdr user USER &&"),
            "{log}"
        );
        assert!(!place.socket().exists());
    }
}

/// F-10
#[test]
fn single_queue_tap_is_refused_for_two_pairs() {
    if !require_root("single_queue_tap_is_refused_for_two_pairs") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec::new(TAP));
    let log = place.refusal(&["--tap", TAP, "--queue-pairs", "2"]);
    assert!(log.contains("was made with a single queue, 2 queue pairs need a multi-queue one"), "{log}");
    assert!(log.contains("'ip link delete tap0 && ip tuntap add dev tap0 mode tap vnet_hdr multi_queue user"), "{log}");
}

/// The command in a message, with names in the places of its capital words.
fn cure(log: &str) -> String {
    let from = log.find("'ip ").expect(log);
    let command = log[from + 1..].split('\'').next().unwrap();
    command.replace("USER", "0").replace("NAME", "other0")
}

/// What a message tells to do is all that there is to do: nothing is warned of then.
#[test]
fn command_that_a_message_gives_makes_a_tap_of_which_nothing_is_warned() {
    if !require_root("command_that_a_message_gives_makes_a_tap_of_which_nothing_is_warned") {
        return;
    }
    let as_root = |place: &Place, options: &[&str]| place.command(options);
    let nobody = |place: &Place, options: &[&str]| {
        let socket = place.socket();
        as_nobody(place, "666", &[&["--socket-path", arg(&socket)], options].concat())
    };
    type Start<'a> = &'a dyn Fn(&Place, &[&str]) -> Command;
    let cases: [(&str, &str, &[&str], Start<'_>); 6] = [
        ("tuntap add dev tap0 mode tap vnet_hdr", "tap0", &["--tap", TAP, "--queue-pairs", "2"], &as_root),
        ("link add tap0 type bridge", "other0", &["--tap", TAP], &as_root),
        ("tuntap add dev tap0 mode tap vnet_hdr", "tap0", &["--tun", TAP], &as_root),
        ("tuntap add dev tap0 mode tap vnet_hdr user 0", "tap0", &["--tap", TAP], &nobody),
        ("tuntap add dev other mode tap", "tap0", &["--tap", TAP], &nobody),
        ("tuntap add dev tap0 mode tap vnet_hdr", "tap0", &["--tap", TAP], &as_root),
    ];
    for (made, name, options, start) in cases {
        let place = Place::new();
        place.namespace.ip(made);
        let mut backend = Spawned::run(&mut start(&place, options));
        let log = backend.wait_line("'ip ");
        drop(backend);

        place.namespace.run("sh", &["-c", &cure(&log)]);

        let cured = if log.contains("NAME") { "other0" } else { name };
        let socket = place.socket();
        let mut args = vec!["--socket-path", arg(&socket)];
        args.extend(options.iter().map(|word| if *word == TAP { cured } else { word }));
        let backend = Spawned::start_in(&place.namespace, &args);
        assert!(!backend.log().contains("warn: "), "{made}, {options:?}: {}", backend.log());
    }
}

#[test]
fn multi_queue_tap_serves_one_pair_too() {
    if !require_root("multi_queue_tap_serves_one_pair_too") {
        return;
    }
    let place = Place::new();
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new(TAP) });
    let _backend = place.start(&[]);
    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.host());
}

/// F-09, I-10
#[test]
fn tap_that_another_back_end_has_is_refused_and_that_one_untouched() {
    if !require_root("tap_that_another_back_end_has_is_refused_and_that_one_untouched") {
        return;
    }
    for (multi_queue, wanted) in [
        (false, "Cannot attach to TAP \"tap0\" (queue 0): another process has it open"),
        (true, "TAP \"tap0\" is in use: 1 of its queues are open in another process"),
    ] {
        let (place, second) = (Place::new(), tempfile::TempDir::new().unwrap());
        place.namespace.add_tap(&TapSpec { multi_queue, ..TapSpec::new(TAP) });
        let _backend = place.start(&[]);
        let mut guest = Guest::new(1, 0);
        let _front_end = place.connect(&guest);
        let path = second.path().join("socket");
        let mut command = place.namespace.command(BINARY);

        let (code, log) = Spawned::refusal(command.args(["--socket-path", arg(&path), "--tap", TAP]));

        assert_eq!(code, Some(1));
        assert!(log.contains(wanted), "{log}");
        assert!(log.contains("'grep -l \"iff:.*tap0\" /proc/[0-9]*/fdinfo/*' finds it"), "{log}");
        assert!(log.matches("has no owner").count() < 2, "it was tried for two seconds: {log}");
        assert!(!path.exists());
        assert_frames_pass(&mut guest, &place.host());
    }
}

#[test]
fn multi_queue_tap_in_use_is_shared_when_asked_for() {
    if !require_root("multi_queue_tap_in_use_is_shared_when_asked_for") {
        return;
    }
    let (place, other) = (Place::new(), tempfile::TempDir::new().unwrap());
    place.namespace.add_tap(&TapSpec { multi_queue: true, ..TapSpec::new(TAP) });
    let first = place.start(&[]);
    let path = other.path().join("socket");
    let second = Spawned::start_in(&place.namespace, &["--socket-path", arg(&path), "--tap", TAP, "--shared"]);
    assert_eq!(place.namespace.tap_queues(TAP).0, 2);
    drop(first);
    wait_until("the first one's queue is gone", || place.namespace.tap_queues(TAP).0 == 1);
    drop(second);
}

/// F-08
#[test]
fn name_that_the_kernel_would_change_is_refused_as_typed() {
    if !require_root("name_that_the_kernel_would_change_is_refused_as_typed") {
        return;
    }
    let place = Place::new();
    for (name, wanted) in [
        ("sixteen-bytes-xx", "it has 16 bytes, and the kernel would cut it to 15"),
        ("tap%d", "the kernel would expand the '%' to a new name"),
        ("a/b", "has no '/', ':' or white space"),
        ("", "it is empty"),
    ] {
        let (code, log) = Spawned::refusal(&mut place.command(&["--tap", name]));
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(wanted), "{name:?}: {log}");
    }
    assert!(!place.namespace.ip("link show").contains("tap"), "Nothing was created");
}

/// The binary in the place's namespace as a user without privileges, who cannot see the build folder, and with a
/// /dev/net/tun of these permissions.
pub(crate) fn as_nobody(place: &Place, tun_mode: &str, args: &[&str]) -> Command {
    let binary = for_any_user(&place.socket());
    let node = place.dir.path().join(format!("tun-{tun_mode}"));
    let made = Command::new("mknod").args(["-m", tun_mode, arg(&node), "c", "10", "200"]).output().unwrap();
    assert!(made.status.success() || node.exists());
    // `ip netns exec` gives its program a mount namespace too.
    let script = "mount --bind \"$0\" /dev/net/tun && exec setpriv --reuid=65534 --regid=65534 --clear-groups \
                  --inh-caps=-all \"$@\"";
    let mut command = place.namespace.command("sh");
    command.args(["-c", script, arg(&node), arg(&binary)]).args(args);
    command
}

/// F-12
#[test]
fn user_without_privileges_needs_a_tap_of_its_own() {
    if !require_root("user_without_privileges_needs_a_tap_of_its_own") {
        return;
    }
    let place = Place::new();
    let as_nobody = |tun_mode, tap| as_nobody(&place, tun_mode, &["--socket-path", arg(&place.socket()), "--tap", tap]);
    place.namespace.ip("tuntap add dev roots mode tap vnet_hdr user 0");
    place.namespace.ip("tuntap add dev tap0 mode tap vnet_hdr user 65534");
    place.namespace.ip("link set tap0 up");
    for (tun_mode, name, wanted) in [
        ("600", TAP, "Cannot open /dev/net/tun: this user may not open it; pass an open descriptor with --tap-fd"),
        ("666", "roots", "this user is not its owner; as root: 'ip link delete roots && ip tuntap add dev roots"),
        ("666", "absent", "it does not exist, and this user may not create it; as root: 'ip tuntap add dev absent"),
    ] {
        let (code, log) = Spawned::refusal(&mut as_nobody(tun_mode, name));
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(wanted), "{log}");
    }

    let mut backend = Spawned::run(&mut as_nobody("666", TAP));
    backend.wait_line("Listening on");

    let mut guest = Guest::new(1, 0);
    let _front_end = place.connect(&guest);
    assert_frames_pass(&mut guest, &place.host());
}

/// A multi-queue one takes queues of whoever may attach, and a share of the guest's frames goes there.
#[test]
fn created_tap_is_open_to_its_creator_and_whom_the_options_name_alone() {
    if !require_root("created_tap_is_open_to_its_creator_and_whom_the_options_name_alone") {
        return;
    }
    for (more, owner, may) in [
        (&[][..], "user 0", false),
        (&["--owner", "65534"], "user 65534", true),
        (&["--group", "65534"], "group 65534", true),
        (&["--group", "65533"], "group 65533", false),
        (&["--owner", "65534", "--group", "65533"], "user 65534 group 65533", false),
    ] {
        let (place, other) = (Place::new(), Place::new());
        let _backend = place.start(&[&["--queue-pairs", "2", "--persist"], more].concat());
        let shown = place.namespace.ip("tuntap show");
        assert!(shown.contains(owner), "{more:?}: {shown}");
        let second = other.dir.path().join("socket");
        let args = ["--socket-path", arg(&second), "--tap", TAP, "--queue-pairs", "2", "--shared"];
        let mut command = as_nobody(&place, "666", &args);
        std::fs::set_permissions(other.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();

        if may {
            Spawned::run(&mut command).wait_line("Listening on");
        } else {
            let (code, log) = Spawned::refusal(&mut command);
            assert_eq!(code, Some(1), "{more:?}: {log}");
            assert!(log.contains("this user is not its owner"), "{more:?}: {log}");
        }
    }
}
