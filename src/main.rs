//! The command: the order of start-up, and the one place that prints an error and picks an exit code.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use vhost_user_net::cli::Cli;
use vhost_user_net::config::{Config, ConfigError, FrontEnds};
use vhost_user_net::daemon::{self, Daemon, DaemonError, DaemonSetup, Source};
use vhost_user_net::host_side::Opened;
use vhost_user_net::nic::Nic;
use vhost_user_net::sandbox::{self, Later};
use vhost_user_net::vhost_user::listener::{self, ListenError, SocketListener};
use vhost_user_net::{error_chain, inherited, log_lines, memory};

/// The answer to `--print-capabilities`, for management software (QEMU, "Backend program conventions"); network
/// back-ends have no features to list there.
const CAPABILITIES: &str = r#"{"type": "net", "features": []}"#;

/// The exit code for a wrong command line, which trying again does not mend: clap's own, also for what is found after
/// clap's parsing.
const EX_WRONG_COMMAND_LINE: u8 = 2;

/// The exit code if trying again later may succeed (sysexits.h).
const EX_TEMPFAIL: u8 = 75;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    // This option overrides all others, and is obeyed before any of them is judged (QEMU, "Backend program
    // conventions").
    let is_asked = std::env::args_os().any(|word| word == "--print-capabilities");
    let result = if is_asked { print_capabilities() } else { run(Cli::parse()) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log_lines::last_words(&format!("vhost-user-net: {}", error_chain(&*error)));
            exit_code(&error)
        }
    }
}

fn exit_code(error: &BoxError) -> ExitCode {
    match error.downcast_ref() {
        None | Some(ConfigError::NotKnown { .. }) => {}
        Some(_) => return ExitCode::from(EX_WRONG_COMMAND_LINE),
    }
    if error.downcast_ref().is_some_and(ListenError::is_of_the_path_itself) {
        return ExitCode::from(EX_WRONG_COMMAND_LINE);
    }
    match error.downcast_ref() {
        Some(DaemonError::DeviceLost { .. }) => ExitCode::from(EX_TEMPFAIL),
        _ => ExitCode::FAILURE,
    }
}

fn print_capabilities() -> Result<(), BoxError> {
    Ok(writeln!(io::stdout(), "{CAPABILITIES}")?)
}

fn run(cli: Cli) -> Result<(), BoxError> {
    let mut config = Config::try_from(cli)?;
    log_lines::start(config.log_level);
    memory::guard::keep_what_is_freed();
    inherited::close_others(&config.inherited());
    daemon::block_signals()?;
    daemon::raise_limits();
    if !config.host.device.has_packet_sockets() {
        config.nic.tuning.io = config.nic.tuning.io.usable()?;
    }
    match config.front_ends.clone() {
        FrontEnds::Descriptor(fd) => {
            let connected = UnixStream::from(inherited::take_connected_socket(fd)?);
            serve(config, || Ok(Source::Connected(connected)))
        }
        FrontEnds::Socket { path, access } => {
            // The socket is made after the device, but an unusable path must not leave a device behind.
            listener::check(&path)?;
            serve(config, || {
                let listener = SocketListener::bind(&path, access)?;
                log::info!("Listening on {:?}", listener.path());
                Ok(Source::Listener(listener))
            })
        }
    }
}

/// Opens the device, then the source of front-ends, and serves them.
fn serve(config: Config, open_source: impl FnOnce() -> Result<Source, BoxError>) -> Result<(), BoxError> {
    let Opened { device, queues, watch } = config.host.open()?;
    let source = open_source()?;
    // The process still has only one thread, as `sandbox::enter` requires.
    let later = Later { keeps_rights: config.host.why_rights_are_needed(), directory: source.directory() };
    let sandbox = sandbox::enter(config.sandbox, later)?;
    let nic = Nic::new(device, queues, config.nic)?;
    memory::guard::install(Arc::clone(nic.alarm()))?;
    nic.confine(sandbox)?;
    let setup = DaemonSetup { source, session: config.session, host: config.host, watch };
    Ok(Daemon::new(nic, setup)?.run(sandbox)?)
}
