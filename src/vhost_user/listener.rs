//! The socket that front-ends connect to: made at the start, with the access that was asked for, and removed at the
//! end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use thiserror::Error;

/// The longest path of a socket, without the closing NUL (unix(7)).
pub const PATH_MAX: usize = 107;
/// How many front-ends may wait to be accepted. Only one is served at a time; others are refused at once.
const BACKLOG: i32 = 128;

/// Who may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permission bits.
    pub mode: u32,
    /// The group that the socket is given to.
    pub group: Option<Group>,
}

/// A group of users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its number, which is not `u32::MAX`.
    pub number: u32,
    /// What the operator calls it.
    pub name: String,
}

/// Why the socket cannot be made.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The path is longer than the kernel takes.
    #[error("Socket path {path:?} has {len} bytes, and a socket's path can have {PATH_MAX}; use a shorter one")]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// The path can only be a directory's.
    #[error(
        "Socket path {path:?} ends with '/', which a socket's path does not: it is that of a directory; add the socket's \
         name, or leave out the '/'"
    )]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// There is something other than a socket.
    #[error("Socket path {path:?} is a {what}, which is left alone; use another path")]
    Occupied {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// Another process listens there.
    #[error("Socket {path:?} is served by another process (another back-end?); end it, or use another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be given to that group.
    #[error("Cannot give socket {path:?} to group {group:?} of --socket-group{}", hint_group(cause))]
    Group {
        /// The path.
        path: PathBuf,
        /// The group, as the operator calls it.
        group: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// A step failed.
    #[error("Cannot {what} socket {path:?}{}", hint(path, cause))]
    Io {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

impl ListenError {
    /// Whether there can be no such socket, on any host.
    pub fn is_of_the_path_itself(&self) -> bool {
        matches!(self, ListenError::TooLong { .. } | ListenError::Directory { .. })
    }
}

fn hint(path: &Path, cause: &io::Error) -> String {
    let directory = directory_of(path);
    match cause.kind() {
        io::ErrorKind::NotFound => format!(": its directory is not there; 'mkdir -p {}'", directory.display()),
        io::ErrorKind::PermissionDenied => format!(": this user may not write to {}", directory.display()),
        _ => String::new(),
    }
}

fn hint_group(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::PermissionDenied => ": this user is no member of it; 'id' lists the groups of which it is one",
        _ => "",
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Checks whether a socket may be made at `path`, and changes nothing: called before anything is made that a failure
/// would leave behind. An existing socket passes: its process may be about to end, and to free its device, too.
///
/// # Errors
/// As [`SocketListener::bind`].
pub fn check(path: &Path) -> Result<(), ListenError> {
    examine(path)?;
    rustix::fs::accessat(CWD, directory_of(path), Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)
        .map_err(|errno| ListenError::Io { what: "listen on", path: path.to_owned(), cause: errno.into() })
}

/// A listening socket, whose file is removed with it.
#[derive(Debug)]
pub struct SocketListener {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
    /// The directory of its file, which stays within reach when paths no longer are.
    directory: OwnedFd,
}

impl SocketListener {
    /// Listens at `path`. The socket of a process that is gone is replaced; anything else that is there is left alone.
    ///
    /// # Errors
    /// [`ListenError`], which says what to do about it.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<SocketListener, ListenError> {
        let failed = |what| move |cause| ListenError::Io { what, path: path.to_owned(), cause };
        if let Found::Socket = examine(path)? {
            remove_socket_if_dead(path)?;
        }
        let listener = listen_for_owner(path).map_err(|errno| failed("listen on")(errno.into()))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory_of(path), flags, Mode::empty())
            .map_err(|e| failed("find the directory of")(e.into()))?;
        // From here on, only this very file is meant: where somebody else may write to the directory, the name may soon
        // be another file's.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed("examine")(e.into()))?;
        let found = rustix::fs::fstat(&file).map_err(|e| failed("examine")(e.into()))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
            return Err(ListenError::Occupied { path: path.to_owned(), what: "file" });
        }
        let this = SocketListener { listener, path: path.to_owned(), inode: found.st_ino, directory };
        if let Some(Group { number, name }) = access.group {
            rustix::fs::chownat(&file, "", None, Some(Gid::from_raw(number)), AtFlags::EMPTY_PATH)
                .map_err(|e| ListenError::Group { path: path.to_owned(), group: name, cause: e.into() })?;
        }
        if access.mode != OWNERS.as_raw_mode() {
            let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
            fs::set_permissions(itself, fs::Permissions::from_mode(access.mode)).map_err(failed("set the mode of"))?;
        }
        Ok(this)
    }

    /// The next front-end, if one waits.
    ///
    /// # Errors
    /// What `accept(2)` says.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The directory of its file.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The path at which it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for SocketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketListener {
    fn drop(&mut self) {
        let Some(name) = self.path.file_name() else { return };
        let removed = match rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if found.st_ino == self.inode => rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()),
            // Somebody else's socket.
            Ok(_) => return log::info!("Socket {:?} is another one by now, and stays", self.path),
            Err(Errno::NOENT) => return,
            Err(errno) => Err(errno),
        };
        if let Err(error) = removed {
            log::warn!("Cannot remove socket {:?}: {error}", self.path);
        }
    }
}

/// The permissions of a socket for its owner only.
const OWNERS: Mode = Mode::RUSR.union(Mode::WUSR);

/// Makes a listening socket to which only its owner may connect: nobody else can before mode and group are as asked.
fn listen_for_owner(path: &Path) -> Result<UnixListener, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // bind gives the file the mode of the socket (Linux, unix_bind).
    rustix::fs::fchmod(&socket, OWNERS)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// What is at a path where a socket may be made.
enum Found {
    Nothing,
    /// A socket, whose process may be gone.
    Socket,
}

fn examine(path: &Path) -> Result<Found, ListenError> {
    let failed = |what| move |cause| ListenError::Io { what, path: path.to_owned(), cause };
    let len = path.as_os_str().len();
    if len > PATH_MAX {
        return Err(ListenError::TooLong { path: path.to_owned(), len });
    }
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(ListenError::Directory { path: path.to_owned() });
    }
    let kind = match fs::symlink_metadata(path) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(failed("examine")(error)),
    };
    let what = match kind {
        kind if kind.is_socket() => return Ok(Found::Socket),
        kind if kind.is_symlink() => "symbolic link",
        kind if kind.is_dir() => "directory",
        _ => "file",
    };
    Err(ListenError::Occupied { path: path.to_owned(), what })
}

fn remove_socket_if_dead(path: &Path) -> Result<(), ListenError> {
    let failed = |what| move |cause| ListenError::Io { what, path: path.to_owned(), cause };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let connected = SocketAddrUnix::new(path).and_then(|address| connect(probe?, &address));
    match connected {
        Err(Errno::CONNREFUSED) => {
            log::info!("Replacing socket {path:?} of a process that is gone");
            fs::remove_file(path).map_err(failed("remove"))
        }
        // If the backlog is full, somebody listens, too.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse { path: path.to_owned() }),
        Err(errno) => Err(failed("probe")(errno.into())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn socket_is_its_owners_alone_from_the_start() {
        let path = std::env::temp_dir().join(format!("vhost-user-net-test-{}", std::process::id()));
        let listener = listen_for_owner(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().mode();
        fs::remove_file(&path).unwrap();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
    }
}
