//! Log lines to standard error, which never make a thread wait: lines that nobody takes are lost, and counted.

use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The longest line. A pipe that has room at all has room for this (`PIPE_BUF`).
const LINE_MAX: usize = 4096;

/// Starts logging lines of this level, and of those that matter more.
pub fn start(level: log::LevelFilter) {
    let format = |out: &mut env_logger::fmt::Formatter, record: &log::Record<'_>| {
        writeln!(out, "vhost-user-net: {}: {}", record.level().as_str().to_lowercase(), record.args())
    };
    let target = env_logger::Target::Pipe(Box::new(Lines { out: io::stderr(), lost: 0 }));
    env_logger::Builder::new().filter_level(level).format(format).target(target).init();
}

/// Says why the process ends, if anybody listens: whoever waits for its end must not wait for a reader.
pub fn last_words(text: &str) {
    let _ = Lines { out: io::stderr(), lost: 0 }.write(format!("{text}\n").as_bytes());
}

/// Writes each line for which there is room.
struct Lines<W> {
    out: W,
    lost: u64,
}

impl<W: Write + AsFd> Lines<W> {
    /// Whether a line can be written, or fails, at once.
    fn has_room(&self) -> bool {
        let mut out = [PollFd::new(&self.out, PollFlags::OUT)];
        poll(&mut out, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
    }

    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        match line.split_at_checked(LINE_MAX - 1) {
            Some((start, rest)) if rest.len() > 1 => self.out.write_all(&[start, b"\n"].concat()),
            _ => self.out.write_all(line),
        }
    }
}

impl<W: Write + AsFd> Write for Lines<W> {
    /// `line` is a whole line: the logger passes each in one call.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lost > 0 && self.has_room() {
            let lost = std::mem::take(&mut self.lost);
            self.write_line(format!("vhost-user-net: warn: Lost {lost} log lines, which nobody took\n").as_bytes())?;
        }
        if self.lost == 0 && self.has_room() {
            self.write_line(line)?;
        } else {
            self.lost = self.lost.saturating_add(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn read_lines(from: &mut impl Read) -> Vec<String> {
        let mut bytes = vec![0; 1 << 20];
        let len = from.read(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).lines().map(str::to_owned).collect()
    }

    #[test]
    fn full_pipe_takes_nothing_and_later_says_how_much_it_missed() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut lines = Lines { out: writer, lost: 0 };
        let line = format!("{}\n", "x".repeat(999));
        let mut taken = 0;
        while lines.lost == 0 {
            lines.write_all(line.as_bytes()).unwrap();
            taken += 1;
            assert!(taken < 10_000, "it is never full");
        }
        lines.write_all(b"lost too\n").unwrap();
        assert_eq!(read_lines(&mut reader).len(), taken - 1);
        lines.write_all(b"heard\n").unwrap();
        assert_eq!(read_lines(&mut reader), ["vhost-user-net: warn: Lost 2 log lines, which nobody took", "heard"]);
    }

    #[test]
    fn line_longer_than_a_pipe_is_sure_to_take_is_cut() {
        let (reader, writer) = UnixStream::pair().unwrap();
        let mut lines = Lines { out: writer, lost: 0 };
        for len in [LINE_MAX - 1, LINE_MAX, LINE_MAX + 1, 9000] {
            let line = format!("{}\n", "x".repeat(len - 1));
            lines.write_all(line.as_bytes()).unwrap();
            assert_eq!(read_lines(&mut &reader), ["x".repeat(len.min(LINE_MAX) - 1)], "{len}");
        }
    }
}
