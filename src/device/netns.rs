//! Opening and making devices in another network namespace.
//!
//! A short-lived thread enters the namespace; what it opens stays there, and the process itself never moves. The thread
//! also mounts the namespace's sysfs, which has the device numbers of a MACVTAP.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use thiserror::Error;

/// A network namespace by name, as `ip netns` keeps them, or by path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetNs(PathBuf);

/// Why a network namespace cannot be used.
#[derive(Debug, Error)]
pub enum NetNsError {
    /// There is none.
    #[error(
        "--netns: no network namespace at {path:?}; 'ip netns list' lists names, and /proc/PID/ns/net is a process's"
    )]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// It cannot be entered.
    #[error("--netns: cannot enter {path:?}{}", hint_enter(cause))]
    Enter {
        /// Where it is.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

fn hint_enter(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EPERM) => ": it needs CAP_SYS_ADMIN; pass open descriptors with --tap-fd, or start as root",
        Some(libc::EINVAL) => ": it is not a network namespace",
        _ => "",
    }
}

impl From<&str> for NetNs {
    /// A name with a `/` is a path.
    fn from(name: &str) -> NetNs {
        NetNs(if name.contains('/') { name.into() } else { Path::new("/run/netns").join(name) })
    }
}

impl NetNs {
    /// Does `work` in the namespace.
    ///
    /// # Errors
    /// [`NetNsError`].
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetNsError> {
        let namespace = File::open(&self.0).map_err(|cause| NetNsError::Open { path: self.0.clone(), cause })?;
        let entered = thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                if let Err(error) = show_sysfs() {
                    log::debug!("The namespace's /sys cannot be shown: {error}");
                }
                Ok(work())
            });
            inside.join().unwrap_or_else(|_| Err(nix::Error::ECANCELED))
        });
        entered.map_err(|error| NetNsError::Enter { path: self.0.clone(), cause: error.into() })
    }
}

/// Gives this thread a /sys that shows its network namespace; nobody else sees it.
fn show_sysfs() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)?;
    Ok(mount("sysfs", "/sys", "sysfs", MountFlags::RDONLY, None)?)
}
