//! An empty world: namespaces of our own, with an empty file system as their root.

use std::time::Duration;
use std::{fs, io, thread};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{chdir, getgid, getuid, pivot_root};

/// Where the empty file system is mounted; nothing of that place is seen afterwards.
const MOUNT_POINT: &str = "/proc";

/// Leaves files, network, IPC objects and host name behind. What is open stays usable.
///
/// # Errors
/// Which step the kernel refused; the steps before it were taken, and do no harm.
pub(super) fn leave_world() -> Result<(), (&'static str, io::Error)> {
    let (user, group) = (getuid().as_raw(), getgid().as_raw());
    // Not a PID namespace: no thread could be started after that.
    let namespaces = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    alone(|| unshare(namespaces)).map_err(|e| ("make namespaces", e.into()))?;
    map_ids(user, group).map_err(|e| ("map user and group into the namespace", e))?;
    empty_root().map_err(|e| ("put an empty file system in the root's place", e.into()))
}

/// Does `act`, which only a process of one thread may do. A thread that was joined (`--netns`) may still be about to
/// end: it is given a moment.
fn alone(act: impl Fn() -> nix::Result<()>) -> nix::Result<()> {
    const TRIES: usize = 200;
    const PAUSE: Duration = Duration::from_millis(1);
    for _ in 1..TRIES {
        match act() {
            Err(nix::Error::EINVAL) => thread::sleep(PAUSE),
            done => return done,
        }
    }
    act()
}

/// Maps the user and the group to themselves: files keep their owners, so that our socket can be removed.
fn map_ids(user: u32, group: u32) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}

fn empty_root() -> rustix::io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID;
    mount("none", MOUNT_POINT, "tmpfs", flags, c"size=4k,nr_inodes=2,mode=0555")?;
    chdir(MOUNT_POINT)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}
