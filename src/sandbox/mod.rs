//! The sandbox: how little a guest that took over a thread of this process would find.
//!
//! It is entered once everything is open and before there is a second thread ([`enter`]), and then closed around each
//! thread ([`Sandbox::confine`]), around the control thread last. It is an empty file system and network of its own, no
//! capability and no way to get one, Landlock for where namespaces cannot be had, and a short list of system calls for
//! each thread ([`syscalls`]): any other call ends the process.
//!
//! A process that needs rights later (to open an interface again, or to delete one that it made) leaves the control
//! thread as it is, and confines only the threads that touch what a guest writes ([`Level::Workers`]).

mod filter;
mod root;
pub mod syscalls;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use thiserror::Error;

pub use filter::program;
use syscalls::Role;

/// How much of the sandbox is wanted (`--sandbox`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// As much as the host and the other options allow.
    #[default]
    Auto,
    /// All of it.
    Full,
    /// System calls and capabilities only.
    Seccomp,
    /// None.
    Off,
}

/// How much of the sandbox is in effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// None.
    Off,
    /// The threads that touch guest memory may make few system calls and have no capability.
    Workers,
    /// All threads may make few system calls and have no capability.
    Seccomp,
    /// As `Seccomp`, and there are no files and no network.
    Full,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Off => "off",
            Level::Workers => "workers",
            Level::Seccomp => "seccomp",
            Level::Full => "full",
        })
    }
}

/// What this host does not have of the full sandbox.
#[derive(Debug, Error)]
pub enum Missing {
    /// The host does not allow namespaces.
    #[error(
        "Cannot {what}; does this host forbid user namespaces ('sysctl user.max_user_namespaces \
         kernel.apparmor_restrict_unprivileged_userns')?"
    )]
    Namespaces {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// Landlock failed.
    #[error("Cannot deny access to files and ports with Landlock")]
    Landlock(#[source] landlock::RulesetError),
    /// The kernel has no Landlock, or an old one.
    #[error("This kernel's Landlock is switched off or too old")]
    NoLandlock,
}

/// Why there is less of the sandbox than was asked for.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// All of it was demanded, and the host does not have it.
    #[error("--sandbox full cannot be had here; --sandbox auto goes without what is missing")]
    NotFull(#[from] Missing),
    /// Rights cannot be given up.
    #[error("Cannot {what}, which the sandbox needs (--sandbox off goes without)")]
    Rights {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// System calls cannot be filtered.
    #[error("Cannot filter system calls (--sandbox off goes without)")]
    Filter(#[source] seccompiler::Error),
}

/// The sandbox of this process, as it was entered.
#[derive(Clone, Copy, Debug)]
pub struct Sandbox {
    level: Level,
}

/// What the process must still be able to do later.
#[derive(Clone, Copy, Debug, Default)]
pub struct Later<'a> {
    /// Why the control thread needs its rights, if it does.
    pub keeps_rights: Option<&'static str>,
    /// The directory of the socket, which is to be removed at the end.
    pub directory: Option<BorrowedFd<'a>>,
}

/// Gives up what will not be needed. The process must have only one thread.
///
/// # Errors
/// [`SandboxError`]: there is less than was asked for, or a step failed that every host allows.
pub fn enter(wanted: Wanted, later: Later<'_>) -> Result<Sandbox, SandboxError> {
    if wanted == Wanted::Off {
        log::info!("Sandbox off: whoever takes over this process has all of its rights");
        return Ok(Sandbox { level: Level::Off });
    }
    // Asks the kernel for the page size now: the answer is kept, and no confined thread may ask.
    let _ = rustix::param::page_size();
    if let Some(reason) = later.keeps_rights {
        say_that_control_is_not_confined(reason);
        return Ok(Sandbox { level: Level::Workers });
    }
    let missing = match wanted {
        Wanted::Seccomp => Some("as was asked for".to_owned()),
        _ => match leave(later.directory) {
            Ok(()) => None,
            Err(missing) if wanted == Wanted::Full => return Err(missing.into()),
            Err(error) => Some(crate::error_chain(&error).to_string()),
        },
    };
    give_up_capabilities()?;
    let rights = |what| move |e: rustix::io::Errno| SandboxError::Rights { what, cause: e.into() };
    rustix::thread::set_no_new_privs(true).map_err(rights("set no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(rights("forbid others to look into this process"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(rights("forbid core files"))?;
    Ok(match missing {
        None => {
            log::info!("Sandbox full: no files, no network, no capabilities, few system calls");
            Sandbox { level: Level::Full }
        }
        Some(why) => {
            log::info!("Sandbox seccomp: no capabilities, few system calls; no more than that: {why}");
            Sandbox { level: Level::Seccomp }
        }
    })
}

/// Logs that the control thread, which reads what a front-end sends, keeps all rights of its user. As root these are
/// more than a front-end should be able to win.
fn say_that_control_is_not_confined(reason: &str) {
    if rustix::process::geteuid().is_root() {
        log::warn!(
            "Sandbox workers: only the threads that touch guest memory are confined, and the one that hears the front-end \
             keeps root's rights: {reason}; an interface that exists and --on-device-loss exit go without"
        );
    } else {
        log::info!("Sandbox workers: only the threads that touch guest memory are confined: {reason}");
    }
}

fn leave(directory: Option<BorrowedFd<'_>>) -> Result<(), Missing> {
    let left = root::leave_world().map_err(|(what, cause)| Missing::Namespaces { what, cause });
    // Where there are no namespaces, Landlock matters all the more.
    let denied = deny_access(directory);
    left.and(denied)
}

/// Denies all access to files and TCP ports, and to abstract sockets and processes outside, except for removing our
/// socket.
fn deny_access(directory: Option<BorrowedFd<'_>>) -> Result<(), Missing> {
    const KNOWN: ABI = ABI::V6;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(KNOWN)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(KNOWN)))
        .and_then(Ruleset::create)
        .map_err(Missing::Landlock)?;
    let ruleset = match directory {
        Some(directory) => ruleset.add_rule(PathBeneath::new(directory, AccessFs::RemoveFile)),
        None => Ok(ruleset),
    };
    let status = ruleset.and_then(|ruleset| ruleset.restrict_self()).map_err(Missing::Landlock)?;
    if status.ruleset == RulesetStatus::NotEnforced { Err(Missing::NoLandlock) } else { Ok(()) }
}

/// Gives up the calling thread's capabilities, and all means to get any back.
fn give_up_capabilities() -> Result<(), SandboxError> {
    let rights = |what| move |e: rustix::io::Errno| SandboxError::Rights { what, cause: e.into() };
    // Without CAP_SETPCAP this is refused, and with no_new_privs it does not matter.
    let _ = CapabilitySet::all().iter().try_for_each(rustix::thread::remove_capability_from_bounding_set);
    rustix::thread::clear_ambient_capability_set().map_err(rights("clear the ambient capabilities"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    // A thread without capabilities may be forbidden to set them (systemd, `SystemCallFilter=~@privileged`).
    if rustix::thread::capabilities(None).is_ok_and(|sets| sets == none) {
        return Ok(());
    }
    rustix::thread::set_capabilities(None, none).map_err(rights("give up capabilities"))
}

impl Sandbox {
    /// No sandbox at all.
    pub const OFF: Sandbox = Sandbox { level: Level::Off };

    /// How much of the sandbox is in effect.
    pub fn level(self) -> Level {
        self.level
    }

    /// Closes the sandbox around the calling thread, which has this role.
    ///
    /// # Errors
    /// [`SandboxError`]; the thread must not go on then.
    pub fn confine(self, role: Role) -> Result<(), SandboxError> {
        match (self.level, role) {
            (Level::Off, _) | (Level::Workers, Role::Control) => return Ok(()),
            (Level::Workers, _) => give_up_capabilities()?,
            (Level::Seccomp | Level::Full, _) => {}
        }
        seccompiler::apply_filter(&program(role)?).map_err(SandboxError::Filter)
    }
}
