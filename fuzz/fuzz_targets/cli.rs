//! The command line: arguments on lines, any bytes.
//!
//! Oracle: what is accepted holds what the documentation promises of it, whatever was typed; a refusal is one message.
#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use clap::Parser;
use libfuzzer_sys::fuzz_target;
use vhost_user_net::cli::Cli;
use vhost_user_net::config::{Config, FrontEnds};
use vhost_user_net::device::name::InterfaceName;
use vhost_user_net::device::on_card::Wanted;
use vhost_user_net::device::passed::Passed;
use vhost_user_net::error_chain;
use vhost_user_net::host_side::DeviceChoice;

fuzz_target!(|data: &[u8]| {
    let args = data.split(|byte| *byte == b'\n').map(OsStr::from_bytes);
    let cli = match Cli::try_parse_from([OsStr::new("vhost-user-net")].into_iter().chain(args)) {
        Ok(cli) => cli,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    match Config::try_from(cli) {
        Ok(config) => check(&config),
        Err(error) => {
            let message = error_chain(&error).to_string();
            assert!(!message.is_empty() && !message.contains('\n'), "one line: {message:?}");
        }
    }
});

fn names(interface: &Wanted) -> Vec<&InterfaceName> {
    interface.name.iter().chain(interface.parent.as_ref().map(|(parent, _)| parent)).collect()
}

fn check(config: &Config) {
    let is_name = |name: &str| {
        let is_good = |c: char| !c.is_whitespace() && !"/:%".contains(c);
        (1..16).contains(&name.len()) && name.chars().all(is_good) && ![".", ".."].contains(&name)
    };
    let (names, pairs) = match &config.host.device {
        DeviceChoice::Tap(tap) => (vec![&tap.name], tap.queue_pairs),
        DeviceChoice::Macvtap(device) => (names(&device.interface), device.queue_pairs),
        DeviceChoice::Existing(device) => (names(&device.interface), device.queue_pairs),
        DeviceChoice::Passed(Passed { fds, of }) => {
            assert!(fds.iter().all(|fd| *fd > 2), "{fds:?}");
            if let FrontEnds::Descriptor(fd) = config.front_ends {
                assert!(!fds.contains(&fd));
            }
            (of.iter().map(|(_, name)| name).collect(), fds.len() as u16)
        }
    };
    assert!(names.iter().all(|name| is_name(name.as_str())), "{names:?}");
    assert!((1..=127).contains(&pairs), "{pairs} queue pairs");
    assert!(config.nic.mtu.is_none_or(|mtu| mtu >= 68));
    assert!(config.nic.mac.is_none_or(|mac| mac[0] & 1 == 0 && mac != [0; 6]), "{:?}", config.nic.mac);
    assert!(config.session.queue_size_max.get().is_power_of_two());
    match &config.front_ends {
        FrontEnds::Descriptor(fd) => assert!(*fd > 2),
        FrontEnds::Socket { access, .. } => assert!(access.mode <= 0o7777, "{:o}", access.mode),
    }
}
