//! The command line, checked: whoever has a [`Config`] has a valid one.

use std::path::PathBuf;

use thiserror::Error;

use crate::cli::{
    Cli, CoalesceChoice, FrontEndKind, IoEngine, LinkChoice, LogLevel, LossChoice, ModeChoice, SandboxChoice,
};
use crate::device::macvtap::Macvtap;
use crate::device::netns::NetNs;
use crate::device::on_card::{OnCardMode, Wanted};
use crate::device::packet::Existing;
use crate::device::passed::Passed;
use crate::device::tap::{Extras, TapByName};
use crate::device::{Io, Layer};
use crate::host_side::{DeviceChoice, HostSide, OnLoss};
use crate::nic::{NicSetup, QUEUE_PAIRS_MAX};
use crate::sandbox::Wanted as WantedSandbox;
use crate::tuning::{Coalescing, Tuning};
use crate::vhost_user::listener::{Group, SocketAccess};
use crate::vhost_user::session::SessionOptions;

/// Where front-ends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrontEnds {
    /// They connect to a socket.
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// Who may connect.
        access: SocketAccess,
    },
    /// There is one, already connected on this descriptor.
    Descriptor(i32),
}

/// The configuration of the process.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where front-ends come from.
    pub front_ends: FrontEnds,
    /// The host's interface.
    pub host: HostSide,
    /// The properties of the card.
    pub nic: NicSetup,
    /// What sessions offer of the protocol.
    pub session: SessionOptions,
    /// How much of the sandbox is wanted.
    pub sandbox: WantedSandbox,
    /// How much to log.
    pub log_level: log::LevelFilter,
}

impl Config {
    /// The inherited descriptors that this process is to use.
    pub fn inherited(&self) -> Vec<i32> {
        let front_end = match self.front_ends {
            FrontEnds::Descriptor(fd) => Some(fd),
            FrontEnds::Socket { .. } => None,
        };
        let queues = match &self.host.device {
            DeviceChoice::Passed(passed) => passed.fds.as_slice(),
            _ => &[],
        };
        front_end.into_iter().chain(queues.iter().copied()).collect()
    }
}

/// Why a command line is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The number of descriptors differs from that of queue pairs.
    #[error("--queue-pairs {queue_pairs} does not fit --tap-fd, which has {fds} descriptor(s): one is needed for each")]
    TapFdCount {
        /// The value of `--queue-pairs`.
        queue_pairs: u16,
        /// How many descriptors there are.
        fds: usize,
    },
    /// A descriptor is named twice.
    #[error("Descriptor {fd} is named twice")]
    SameFd {
        /// Its number.
        fd: i32,
    },
    /// There is no such group.
    #[error("{option} {name:?}: there is no such group; 'getent group' lists them")]
    Group {
        /// The option that names it.
        option: &'static str,
        /// The name.
        name: String,
    },
    /// The user or group could not be looked up.
    #[error("{option} {name:?}: cannot be looked up now")]
    NotKnown {
        /// The option.
        option: &'static str,
        /// The user or group.
        name: String,
        /// Why the look-up failed.
        #[source]
        cause: std::io::Error,
    },
    /// There is no such user.
    #[error("--owner {name:?}: there is no such user; 'getent passwd' lists them")]
    User {
        /// The name.
        name: String,
    },
    /// The number stands for nobody, to the kernel.
    #[error(
        "{option} {name:?}: that number means \"no {what}\", so nothing can be given to it; 'getent {base}' lists others"
    )]
    Nobody {
        /// The option.
        option: &'static str,
        /// The number, as it was typed.
        name: String,
        /// Whether it should be a user's or a group's.
        what: &'static str,
        /// Where such numbers are listed.
        base: &'static str,
    },
    /// The sandbox would take away rights that other options need.
    #[error(
        "--sandbox full and seccomp do not go with this: {why}; use --sandbox auto, which confines the other threads"
    )]
    Sandbox {
        /// What the rights are needed for.
        why: &'static str,
    },
    /// Neither socket nor device was named.
    #[error(
        "A socket (--socket-path or --fd) and a device (--tap, --tun, --macvtap, --macvtap-parent, --interface, \
         --macvlan-parent or --tap-fd) are needed"
    )]
    Incomplete,
}

impl TryFrom<Cli> for Config {
    type Error = ConfigError;

    fn try_from(cli: Cli) -> Result<Config, ConfigError> {
        check_fds(&cli)?;
        let queue_pairs = queue_pairs(&cli)?;
        let tuning = Tuning {
            io: io(cli.io),
            coalescing: coalescing(cli.coalesce),
            segment_limit: cli.max_segments,
            polling: cli.poll_us,
            cpus: cli.cpu_affinity.into_iter().flatten().collect(),
        };
        let nic = NicSetup {
            mac: cli.mac,
            mtu: cli.mtu,
            gateway: cli.gateway,
            has_control_queue: cli.front_end == FrontEndKind::Generic,
            tuning,
        };
        let access = SocketAccess { mode: cli.socket_mode, group: cli.socket_group.map(socket_group).transpose()? };
        let front_ends = match (cli.socket_path, cli.fd) {
            (Some(path), _) => FrontEnds::Socket { path, access },
            (None, Some(fd)) => FrontEnds::Descriptor(fd),
            (None, None) => return Err(ConfigError::Incomplete),
        };
        let (mac, mtu) = (cli.mac, cli.mtu);
        let layer = if cli.tun.is_some() { Layer::Ip } else { Layer::Ethernet };
        let device = if !cli.tap_fd.is_empty() {
            DeviceChoice::Passed(Passed { fds: cli.tap_fd, of: cli.tap.or(cli.tun).map(|name| (layer, name)) })
        } else if let Some(name) = cli.tap.or(cli.tun) {
            let extras = Extras {
                bridge: cli.bridge,
                owner: cli.owner.as_deref().map(user_number).transpose()?,
                group: cli.group.as_deref().map(|name| group_number("--group", name)).transpose()?,
                persists: cli.persist,
            };
            DeviceChoice::Tap(TapByName { layer, name, queue_pairs, shared: cli.shared, mtu, extras, reopens: false })
        } else if cli.macvtap.is_some() || cli.macvtap_parent.is_some() {
            let parent = cli.macvtap_parent.map(|parent| (parent, mode(cli.macvtap_mode)));
            let interface = Wanted { name: cli.macvtap, parent, mac, former_mac: None, mtu };
            DeviceChoice::Macvtap(Macvtap { interface, queue_pairs })
        } else if cli.interface.is_some() || cli.macvlan_parent.is_some() {
            let parent = cli.macvlan_parent.map(|parent| (parent, mode(cli.macvlan_mode)));
            let interface = Wanted { name: cli.interface, parent, mac, former_mac: None, mtu };
            DeviceChoice::Existing(Existing { interface, queue_pairs, promiscuous: cli.promiscuous })
        } else {
            return Err(ConfigError::Incomplete);
        };
        let sandbox = sandbox(cli.sandbox);
        let host = HostSide {
            on_loss: on_loss(cli.on_device_loss, sandbox, &device),
            device,
            netns: cli.netns.as_deref().map(NetNs::from),
            carrier: cli.link.map(|link| link == LinkChoice::Up),
        };
        if let (WantedSandbox::Full | WantedSandbox::Seccomp, Some(why)) = (sandbox, host.why_rights_are_needed()) {
            return Err(ConfigError::Sandbox { why });
        }
        Ok(Config {
            front_ends,
            host,
            nic,
            session: SessionOptions { offers_config: !cli.no_config, queue_size_max: cli.queue_size },
            sandbox,
            log_level: level_filter(cli.log_level),
        })
    }
}

fn sandbox(choice: SandboxChoice) -> WantedSandbox {
    match choice {
        SandboxChoice::Auto => WantedSandbox::Auto,
        SandboxChoice::Full => WantedSandbox::Full,
        SandboxChoice::Seccomp => WantedSandbox::Seccomp,
        SandboxChoice::Off => WantedSandbox::Off,
    }
}

/// By default, the process waits only for an interface that it can open again.
fn on_loss(choice: Option<LossChoice>, sandbox: WantedSandbox, device: &DeviceChoice) -> OnLoss {
    match choice {
        Some(LossChoice::Wait) => OnLoss::Wait,
        Some(LossChoice::Exit) => OnLoss::Exit,
        None if sandbox == WantedSandbox::Off && !device.is_passed() => OnLoss::Wait,
        None => OnLoss::Exit,
    }
}

fn check_fds(cli: &Cli) -> Result<(), ConfigError> {
    let mut fds: Vec<i32> = cli.fd.iter().chain(&cli.tap_fd).copied().collect();
    fds.sort_unstable();
    match fds.windows(2).find(|pair| matches!(pair, [a, b] if a == b)) {
        Some(&[fd, ..]) => Err(ConfigError::SameFd { fd }),
        _ => Ok(()),
    }
}

fn queue_pairs(cli: &Cli) -> Result<u16, ConfigError> {
    let fds = cli.tap_fd.len();
    if fds == 0 {
        return Ok(cli.queue_pairs.unwrap_or(1));
    }
    let queue_pairs = cli.queue_pairs.unwrap_or_else(|| u16::try_from(fds).unwrap_or(u16::MAX));
    if usize::from(queue_pairs) != fds || queue_pairs > QUEUE_PAIRS_MAX {
        return Err(ConfigError::TapFdCount { queue_pairs: queue_pairs.min(QUEUE_PAIRS_MAX), fds });
    }
    Ok(queue_pairs)
}

/// The number that system calls take for "leave it as it is" or "nobody" (chown(2), `TUNSETOWNER`).
const NOBODY: u32 = u32::MAX;

fn user_number(name: &str) -> Result<u32, ConfigError> {
    let option = "--owner";
    let unknown = || ConfigError::User { name: name.to_owned() };
    let number = name.parse().or_else(|_| {
        let user = nix::unistd::User::from_name(name).map_err(|e| not_known(option, name, e))?;
        user.map(|user| user.uid.as_raw()).ok_or_else(unknown)
    })?;
    let nobody = || ConfigError::Nobody { option, name: name.to_owned(), what: "user", base: "passwd" };
    if number == NOBODY { Err(nobody()) } else { Ok(number) }
}

fn not_known(option: &'static str, name: &str, error: nix::Error) -> ConfigError {
    ConfigError::NotKnown { option, name: name.to_owned(), cause: error.into() }
}

fn group_number(option: &'static str, name: &str) -> Result<u32, ConfigError> {
    let unknown = || ConfigError::Group { option, name: name.to_owned() };
    let number = name.parse().or_else(|_| {
        let group = nix::unistd::Group::from_name(name).map_err(|e| not_known(option, name, e))?;
        group.map(|group| group.gid.as_raw()).ok_or_else(unknown)
    })?;
    let nobody = || ConfigError::Nobody { option, name: name.to_owned(), what: "group", base: "group" };
    if number == NOBODY { Err(nobody()) } else { Ok(number) }
}

fn socket_group(name: String) -> Result<Group, ConfigError> {
    Ok(Group { number: group_number("--socket-group", &name)?, name })
}

fn mode(mode: ModeChoice) -> OnCardMode {
    match mode {
        ModeChoice::Bridge => OnCardMode::Bridge,
        ModeChoice::Vepa => OnCardMode::Vepa,
        ModeChoice::Private => OnCardMode::Private,
        ModeChoice::Passthru => OnCardMode::Passthru,
    }
}

fn io(io: IoEngine) -> Io {
    match io {
        IoEngine::Auto => Io::Auto,
        IoEngine::Uring => Io::Uring,
        IoEngine::Syscall => Io::Syscall,
    }
}

fn coalescing(choice: CoalesceChoice) -> Coalescing {
    match choice {
        CoalesceChoice::Auto => Coalescing::Auto,
        CoalesceChoice::On => Coalescing::On,
        CoalesceChoice::Off => Coalescing::Off,
    }
}

fn level_filter(level: LogLevel) -> log::LevelFilter {
    match level {
        LogLevel::Error => log::LevelFilter::Error,
        LogLevel::Warn => log::LevelFilter::Warn,
        LogLevel::Info => log::LevelFilter::Info,
        LogLevel::Debug => log::LevelFilter::Debug,
        LogLevel::Trace => log::LevelFilter::Trace,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn config(args: &str) -> Result<Config, String> {
        let args = format!("vhost-user-net {args}");
        let cli = Cli::try_parse_from(args.split(' ')).map_err(|e| e.to_string())?;
        Config::try_from(cli).map_err(|e| crate::error_chain(&e).to_string())
    }

    #[test]
    fn queue_pairs_follow_the_descriptors() {
        let good = config("--socket-path s --tap-fd 5,6").expect("valid");
        assert!(
            matches!(good.host.device, DeviceChoice::Passed(passed) if passed.fds == [5, 6] && passed.of.is_none())
        );
        let bad = config("--socket-path s --tap-fd 5,6 --queue-pairs 3").expect_err("refused");
        assert!(bad.contains("--queue-pairs 3") && bad.contains("2 descriptor"), "{bad}");
    }

    /// Inside the sandbox nothing can be opened, and descriptors that were passed cannot be opened again anywhere.
    #[test]
    fn interface_is_waited_for_by_default_only_where_it_can_be_opened_again() {
        for (args, wanted) in [
            ("--tap t", OnLoss::Exit),
            ("--tap t --sandbox off", OnLoss::Wait),
            ("--tap-fd 5", OnLoss::Exit),
            ("--tap-fd 5 --sandbox off", OnLoss::Exit),
            ("--tap-fd 5 --on-device-loss wait", OnLoss::Wait),
        ] {
            let config = config(&format!("--socket-path s {args}")).expect("valid");
            assert_eq!(config.host.on_loss, wanted, "{args}");
        }
    }

    #[test]
    fn cpus_and_ranges_of_them_are_one_list() {
        let config = config("--socket-path s --tap t --cpu-affinity 6,0-2").expect("valid");
        assert_eq!(config.nic.tuning.cpus, [6, 0, 1, 2]);
    }

    #[test]
    fn descriptor_named_twice_is_refused() {
        for args in ["--fd 5 --tap-fd 5", "--fd 3 --tap-fd 4,4"] {
            assert!(config(args).expect_err("refused").contains("named twice"));
        }
    }

    #[test]
    fn impossible_values_are_refused_with_their_range() {
        for (args, wanted) in [
            ("--socket-path s --tap t --queue-size 1000", "1000 is not a power of two"),
            ("--socket-path s --tap t --queue-size 65536", "65536"),
            ("--socket-path s --tap t --queue-size 1k", "a power of two from 1 to 32768 is expected"),
            ("--socket-path s --tap t --cpu-affinity 0,x", "such as 0,2 or 0-3"),
            ("--socket-path s --tap t --socket-mode 7", "three or four octal digits"),
            ("--socket-path s --tap t --queue-pairs 128", "1..=127"),
            ("--socket-path s --tap t --mtu 67", "68..=65535"),
            ("--socket-path s --tap sixteen-bytes-xx", "16 bytes"),
            ("--socket-path s --tap t --socket-group no-such-group-here", "no such group"),
            ("--socket-path s --tap t --group no-such-group-here", "--group \"no-such-group-here\""),
            ("--socket-path s --tap t --owner no-such-user-here", "no such user"),
            (
                "--socket-path s --tap t --socket-group 4294967295",
                "--socket-group \"4294967295\": that number means \"no group\"",
            ),
            ("--socket-path s --tap t --group 4294967295", "--group \"4294967295\": that number means \"no group\""),
            ("--socket-path s --tap t --owner +4294967295", "--owner \"+4294967295\": that number means \"no user\""),
            ("--socket-path s --macvtap t --bridge br0", "cannot be used with"),
            ("--socket-path s --tap-fd 5 --persist", "cannot be used with"),
            ("--socket-path s --tun t --bridge br0", "cannot be used with"),
            ("--socket-path s --tun t --tap u", "cannot be used with"),
            ("--socket-path s --interface t --persist", "cannot be used with"),
            ("--socket-path s --macvlan-parent t --macvtap u", "cannot be used with"),
            ("--socket-path s --interface t --macvlan-mode vepa", "--macvlan-parent"),
            ("--socket-path s --tap t --promiscuous", "cannot be used with"),
            ("--socket-path s --interface t --link down", "cannot be used with"),
            ("--socket-path s --tap t --gateway 10.0.0.1", "cannot be used with"),
            ("--socket-path s --tun t --gateway 10.0.0.1,10.0.0.2", "one IPv4 and one IPv6"),
            ("--socket-path s --tun t --gateway ff02::1", "of a host"),
            ("--socket-path s --tap t --socket-mode 999", "octal"),
            ("--socket-path s", "--tap"),
            ("--tap t", "--socket-path"),
            ("--socket-path s --fd 3 --tap t", "cannot be used with"),
        ] {
            let error = config(args).expect_err(args);
            assert!(error.contains(wanted), "{args}: {error}");
        }
    }
}
