//! Bulk traffic between the host and a guest ([`Bench`]), whose content is checked.
//!
//! The host's part is in this process, so that a test can do something in the middle of a transfer without a clock; the
//! guest's part is in the background there, so that its console is free.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use super::guest::{Bench, HOST};
use super::netns::ChildGuard;
use super::{wait_readable, wait_until};

/// A transfer that something interrupted takes seconds to get going again: TCP waits longer each time.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// What a test does in the middle of a transfer.
pub type Interlude<'a> = &'a mut dyn FnMut(&mut Bench);

/// Sends `mib` MiB of noise to the guest over TCP, with `interlude` after each of its quarters but the last; panics if
/// other bytes arrive.
pub fn to_guest(bench: &mut Bench, port: u16, mib: usize, interlude: Interlude<'_>) {
    let listener = listen(bench, port);
    let bytes = take(&mut noise(), mib * MIB);
    bench.guest.run(&format!("nc {HOST} {port} </dev/null >/tmp/received & transfer=$!"));
    let mut stream = accept(&listener);
    for (at, quarter) in bytes.chunks(bytes.len() / 4).enumerate() {
        if at > 0 {
            interlude(bench);
        }
        stream.write_all(quarter).unwrap();
    }
    drop(stream);
    let sum = end(bench, "sha256sum </tmp/received; rm /tmp/received");
    assert_eq!(sum, sum_of(&bytes));
}

/// Has the guest send `mib` MiB of noise over TCP, with `interlude` after each quarter but the last; panics if other
/// bytes arrive.
pub fn to_host(bench: &mut Bench, port: u16, mib: usize, interlude: Interlude<'_>) {
    let listener = listen(bench, port);
    bench.guest.run(&format!("dd if=/dev/urandom of=/tmp/sent bs=1M count={mib} 2>/dev/null"));
    bench.guest.run(&format!("nc {HOST} {port} </tmp/sent & transfer=$!"));
    let mut stream = accept(&listener);
    let mut bytes = vec![0; mib * MIB];
    let quarter = bytes.len() / 4;
    for (at, quarter) in bytes.chunks_mut(quarter).enumerate() {
        if at > 0 {
            interlude(bench);
        }
        stream.read_exact(quarter).unwrap();
    }
    drop(stream);
    let sum = end(bench, "sha256sum </tmp/sent; rm /tmp/sent");
    assert_eq!(sum, sum_of(&bytes));
}

/// Waits for the guest's part, which runs in the background; then has it do `sum`.
fn end(bench: &mut Bench, sum: &str) -> String {
    let number = bench.guest.begin(&format!("wait $transfer && {sum}"));
    let (status, output) = bench.guest.end(number, PATIENCE);
    assert_eq!(status, 0, "The guest's part of a transfer: {output}");
    first_word(&output).to_owned()
}

/// Bytes without end, both ways, on one TCP connection that the guest made. Ended when dropped, or when something else
/// came back than was sent.
pub struct Flood {
    stream: TcpStream,
    /// A word for each MiB that arrived here, and for each that the guest has taken.
    ways: [Receiver<()>; 2],
}

impl Flood {
    /// Starts it, from the guest's processor `cpu`, and waits until it flows.
    pub fn start(bench: &mut Bench, port: u16, cpu: usize) -> Self {
        let listener = listen(bench, port);
        bench.guest.run(&format!("taskset {:x} nc {HOST} {port} </dev/zero >/dev/null 2>/dev/null &", 1 << cpu));
        let stream = accept(&listener);
        let [mut from, mut to] = [(); 2].map(|()| stream.try_clone().unwrap());
        let mut bytes = vec![0; MIB];
        let from_guest = each_mib(move || from.read_exact(&mut bytes).is_ok());
        let to_guest = each_mib(move || to.write_all(&[0; MIB]).is_ok());
        Self::flowing(stream, [from_guest, to_guest])
    }

    /// The same with noise that the guest sends back. Its content is checked, which costs some of the load.
    pub fn start_checked(bench: &mut Bench, port: u16, cpu: usize) -> Self {
        let listener = listen(bench, port);
        bench.guest.run(&format!("taskset {:x} nc {HOST} {port} -e /bin/cat 2>/dev/null &", 1 << cpu));
        let stream = accept(&listener);
        let [mut from, mut to] = [(); 2].map(|()| stream.try_clone().unwrap());
        let (mut sent, mut expected) = (noise(), noise());
        let mut bytes = vec![0; MIB];
        let from_guest = each_mib(move || {
            let came = from.read_exact(&mut bytes).is_ok();
            assert!(!came || bytes == take(&mut expected, MIB), "The guest sends back other bytes than it was sent");
            came
        });
        let to_guest = each_mib(move || to.write_all(&take(&mut sent, MIB)).is_ok());
        Self::flowing(stream, [from_guest, to_guest])
    }

    fn flowing(stream: TcpStream, ways: [Receiver<()>; 2]) -> Self {
        let this = Self { stream, ways };
        this.assert_flows();
        this
    }

    /// Fails unless it goes on flowing both ways.
    pub fn assert_flows(&self) {
        for (way, what) in self.ways.iter().zip(["from the guest", "to the guest"]) {
            // The first may be of before.
            for _ in way.try_iter() {}
            for _ in 0..2 {
                assert!(way.recv_timeout(PATIENCE).is_ok(), "Nothing flows {what} any more");
            }
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Has the guest use so many queue pairs while `floods` flow; fails unless all of them go on, on these pairs alone.
pub fn change_queue_pairs(bench: &mut Bench, floods: &[Flood], pairs: usize) {
    bench.guest.run(&format!("ethtool -L eth0 combined {pairs}"));
    // What was on its way has come when some more has.
    floods.iter().for_each(Flood::assert_flows);
    let [rx, tx] = ["rx_frames", "tx_frames"].map(|name| bench.counters(name));
    floods.iter().for_each(Flood::assert_flows);
    for (name, before) in [("rx_frames", rx), ("tx_frames", tx)] {
        let after = bench.counters(name);
        assert_eq!(before[pairs..], after[pairs..], "{name} with {pairs} pairs: {before:?}, then {after:?}");
        assert_ne!(before[..pairs], after[..pairs], "{name} with {pairs} pairs: {before:?}");
    }
}

/// Calls `pass`, which moves a MiB, until it fails; says so each time.
fn each_mib(mut pass: impl FnMut() -> bool + Send + 'static) -> Receiver<()> {
    let (sender, passed) = mpsc::channel();
    thread::spawn(move || while pass() && sender.send(()).is_ok() {});
    passed
}

/// An iperf3 server on the host's side; it serves one client after another.
pub fn serve_iperf(bench: &Bench) -> ChildGuard {
    let mut command = bench.namespace.command("iperf3");
    let mut child = ChildGuard(command.args(["-s", "--forceflush"]).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let listening = lines.find(|line| !matches!(line, Ok(line) if !line.contains("listening")));
    assert!(matches!(listening, Some(Ok(_))), "iperf3 does not listen: {listening:?}");
    thread::spawn(move || lines.for_each(drop));
    child
}

/// Runs the guest's iperf3 for `seconds` against `host`; returns the Mbit/s that arrived.
pub fn iperf(bench: &mut Bench, host: &str, seconds: u32, options: &str) -> f64 {
    let output = bench.guest.run(&format!("iperf3 -c {host} -t {seconds} -f m {options}"));
    let words: Vec<&str> = output.lines().rfind(|line| line.contains("receiver")).unwrap_or("").split(' ').collect();
    let rate = words.iter().position(|word| *word == "Mbits/sec").and_then(|at| words[at - 1].parse().ok());
    rate.unwrap_or_else(|| panic!("iperf3 {options}: {output}"))
}

/// A listener on the host's side of the bench.
pub fn listen(bench: &Bench, port: u16) -> TcpListener {
    bench.namespace.within(|| TcpListener::bind((HOST, port)).unwrap())
}

/// The guest's connection, with a bound on all that is done with it.
pub fn accept(listener: &TcpListener) -> TcpStream {
    assert!(wait_readable(listener, PATIENCE), "The guest does not connect");
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Bytes that the guest has and that no program there has read yet; it reads them when told to.
pub struct Unread {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Unread {
    /// What a receiver takes that does not read.
    const LEN: usize = 48 << 10;

    /// The guest connects, and reads nothing.
    pub fn connect(bench: &mut Bench, port: u16) -> Self {
        let listener = listen(bench, port);
        bench.guest.run(&format!("nc {HOST} {port} </dev/null >/tmp/unread & reader=$!"));
        let stream = accept(&listener);
        bench.guest.run("kill -STOP $reader");
        Self { stream, bytes: take(&mut noise(), Self::LEN) }
    }

    /// Sends them, and waits until the guest has confirmed all.
    pub fn send(&mut self, bench: &Bench) {
        self.stream.write_all(&self.bytes).unwrap();
        let port = format!("sport = :{}", self.stream.local_addr().unwrap().port());
        let unconfirmed = || {
            let shown = bench.namespace.run("ss", &["--no-header", "--tcp", "--numeric", &port]);
            shown.split_whitespace().nth(2).map(str::to_owned)
        };
        wait_until("the guest has what it is to read", || unconfirmed().as_deref() == Some("0"));
    }

    /// Has the guest read all; panics if that are other bytes than were sent.
    pub fn assert_whole(self, bench: &mut Bench) {
        drop(self.stream);
        let read = "kill -CONT $reader && wait $reader && sha256sum </tmp/unread; rm /tmp/unread";
        let number = bench.guest.begin(read);
        let (_, output) = bench.guest.end(number, PATIENCE);
        assert_eq!(first_word(&output), sum_of(&self.bytes), "What the guest had not read: {output}");
    }
}

/// Bytes without a pattern (xorshift), always the same.
fn noise() -> impl Iterator<Item = u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten()
}

fn take(bytes: &mut impl Iterator<Item = u8>, len: usize) -> Vec<u8> {
    bytes.take(len).collect()
}

fn sum_of(bytes: &[u8]) -> String {
    let mut command = Command::new("sha256sum");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    first_word(&String::from_utf8(output.stdout).unwrap()).to_owned()
}

fn first_word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or("")
}
