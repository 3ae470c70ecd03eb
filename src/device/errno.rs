//! What the kernel's answer to a read or write of a frame means: the one place where a device queue's errors are judged.
//!
//! `stage` asks this to know which frames wait, `net` to know what becomes of a frame and how a pass ends.

use rustix::io::Errno;

/// Why a frame was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteFailure {
    /// The device takes no frame now.
    Blocked,
    /// The device is gone.
    DeviceLost,
    /// It was not tried, because of a frame before it.
    NotTried,
    /// The link is down.
    LinkDown,
    /// The kernel has no memory for it.
    NoMemory,
    /// The kernel does not take this frame.
    Refused,
}

impl WriteFailure {
    /// Whether the frame is to be sent again later, and those behind it have to wait. Else it is lost.
    pub(crate) fn holds_back(self) -> bool {
        matches!(self, WriteFailure::Blocked | WriteFailure::DeviceLost | WriteFailure::NotTried)
    }
}

/// Says what came of a write.
#[inline]
pub(crate) fn classify_write(result: Result<usize, Errno>) -> Result<(), WriteFailure> {
    match result {
        Ok(_) => Ok(()),
        Err(Errno::AGAIN) => Err(WriteFailure::Blocked),
        Err(Errno::BADFD | Errno::NXIO | Errno::PIPE | Errno::CONNRESET) => Err(WriteFailure::DeviceLost),
        Err(Errno::CANCELED) => Err(WriteFailure::NotTried),
        Err(Errno::IO | Errno::NETDOWN) => Err(WriteFailure::LinkDown),
        Err(Errno::NOBUFS | Errno::NOMEM) => Err(WriteFailure::NoMemory),
        Err(_) => Err(WriteFailure::Refused),
    }
}

/// Does a write, and once more if it failed in a way that may have passed: memory was short, or a signal came.
#[inline]
pub(crate) fn write_patiently(mut write: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    match write() {
        Err(Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => write(),
        result => result,
    }
}

/// Why no frame was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadFailure {
    /// There is none at present.
    Empty,
    /// The device is gone.
    DeviceLost,
    /// It was not tried, because of a read before it.
    NotTried,
    /// The link went down: a packet socket says so once, before it gives the frames that came until then.
    LinkDown,
    /// There was one, which the kernel took out of its queue before it found that it cannot be handed over.
    Refused,
    /// Memory was short, or the like, before a frame was touched.
    Failed,
}

/// Says what came of a read: the length of a frame, which is not 0.
#[inline]
pub(crate) fn classify_read(result: Result<usize, Errno>) -> Result<usize, ReadFailure> {
    match result {
        // The end of a file, or of a socket's other side.
        Ok(0) => Err(ReadFailure::DeviceLost),
        Ok(len) => Ok(len),
        Err(Errno::AGAIN) => Err(ReadFailure::Empty),
        Err(Errno::BADFD | Errno::NXIO | Errno::CONNRESET) => Err(ReadFailure::DeviceLost),
        Err(Errno::CANCELED) => Err(ReadFailure::NotTried),
        Err(Errno::NETDOWN) => Err(ReadFailure::LinkDown),
        Err(Errno::INVAL | Errno::FAULT) => Err(ReadFailure::Refused),
        Err(_) => Err(ReadFailure::Failed),
    }
}
