//! The data path, measured without a guest: `cargo bench --bench datapath`, as root.
//!
//! A driver of our own ([`guest`]) with real rings in a memfd, a real vhost-user session, the real binary, a real TAP in a
//! namespace of its own ([`place`]). Side by side, round by round, so that what disturbs one disturbs all:
//! * the floor: a bare loop of `writev` or `readv` on the same TAP, without a virtqueue; and where frames are small, two
//!   that have them go together, by the best means that the kernel has ([`floor`]);
//! * the baseline: a conventional back-end ([`baseline`]) of the crates that most are made of;
//! * DPDK's `dpdk-testpmd` where it is installed ([`testpmd`]);
//! * ours, with its options;
//! * ours and the floor on other devices than a TAP, in cases of their own.
//!
//! The figure that counts is the back-end's processor time for each frame. Ratios above 1 mean that ours needs less.
#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

mod baseline;
mod cases;
#[path = "../../tests/common/mod.rs"]
mod common;
mod floor;
mod guest;
mod idle;
mod place;
mod report;
mod testpmd;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use cases::{Kind, Sample};
use clap::Parser;
use place::{Contender, Means, OURS, On};

/// Measure the data path beside a bare loop of system calls and a conventional back-end
#[derive(Parser)]
struct Args {
    /// Fewer rounds and fewer frames: about a minute
    #[arg(long)]
    quick: bool,
    /// Rounds [default: 5, quick: 3]
    #[arg(long)]
    rounds: Option<usize>,
    /// Only cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only this contender, as the table names it; may be given several times
    #[arg(long, value_name = "NAME")]
    contender: Vec<String>,
    /// Where the figures go as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the ratios go as a picture
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Another build of this program (or a script that starts one, under valgrind say), to take part beside this one
    #[arg(long, value_name = "PROGRAM")]
    beside: Option<PathBuf>,
    /// Serve as the conventional back-end on this socket (the benchmark starts itself so)
    #[arg(long, value_name = "SOCKET", hide = true)]
    as_baseline: Option<PathBuf>,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// A case: its name, what to measure, and who takes part besides the default.
struct Case {
    name: &'static str,
    kind: Kind,
    contenders: Vec<Contender>,
}

impl Case {
    /// Whether it is about other devices than a TAP.
    fn is_on_others(&self) -> bool {
        self.contenders.iter().any(|contender| contender.on() != On::Tap)
    }
}

/// A case's samples: for each contender one a round.
struct Measured {
    case: Case,
    samples: Vec<Vec<Sample>>,
    /// The part of the machine's processor time that its host gave to others meanwhile.
    stolen: f64,
}

fn cases() -> Vec<Case> {
    const FLOOR: Contender = Contender::Floor(On::Tap, Means::Calls);
    const BATCHES: Contender = Contender::Floor(On::Tap, Means::Batches);
    const COPIES: Contender = Contender::Floor(On::Tap, Means::Copies);
    const SYSCALL: Contender = Contender::Ours(On::Tap, &["--io", "syscall"]);
    const URING: Contender = Contender::Ours(On::Tap, &["--io", "uring"]);
    const ALONE: Contender = Contender::Ours(On::Tap, &["--coalesce", "off"]);
    const FINEST: Contender = Contender::Ours(On::Tap, &["--max-segments", "1366"]);
    const UNCONFINED: Contender = Contender::Ours(On::Tap, &["--sandbox", "off"]);
    const POLLING: Contender = Contender::Ours(On::Tap, &["--poll-us", "50"]);
    const ADAPTIVE: Contender = Contender::Ours(On::Tap, &["--poll-us", "auto"]);
    let with = |name, kind, more: &[Contender]| {
        let mut contenders = vec![FLOOR, Contender::Baseline, OURS];
        contenders.extend_from_slice(more);
        Case { name, kind, contenders }
    };
    let alone = |name, kind| Case { name, kind, contenders: vec![OURS] };
    let on_all = |name, kind| {
        let others =
            On::OTHERS.into_iter().flat_map(|on| [Contender::Floor(on, Means::Calls), Contender::Ours(on, &[])]);
        Case { name, kind, contenders: [FLOOR, OURS].into_iter().chain(others).collect() }
    };
    vec![
        with("tx 64 B, mixed flows", Kind::Tx(64), &[BATCHES, COPIES, SYSCALL, URING, UNCONFINED, Contender::Testpmd]),
        with("tx 512 B, mixed flows", Kind::Tx(512), &[BATCHES, COPIES]),
        with("tx 1500 B, mixed flows", Kind::Tx(1500), &[BATCHES, COPIES, SYSCALL, URING, Contender::Testpmd]),
        Case { name: "tx 64 B, mixed flows, 2 pairs", kind: Kind::TxPairs(64), contenders: vec![FLOOR, OURS] },
        with("tx 64 KiB super-frames", Kind::TxLarge, &[]),
        alone("tx super-frames cut by the host, 45 segments", Kind::TxCut(1448)),
        alone("tx super-frames cut by the host, 180 segments", Kind::TxCut(356)),
        Case { contenders: vec![FINEST], ..alone("tx super-frames cut by the host, 1334 segments", Kind::TxCut(48)) },
        with("udp 1400 B to a socket", Kind::UdpToSocket(1400), &[BATCHES, ALONE]),
        with("udp 200 B to a socket", Kind::UdpToSocket(200), &[BATCHES, ALONE]),
        with("udp 1400 B to a veth", Kind::UdpToVeth(1400), &[BATCHES, ALONE]),
        with("rx 64 B", Kind::Rx(64), &[BATCHES, COPIES, SYSCALL, URING, UNCONFINED]),
        with("rx 512 B", Kind::Rx(512), &[BATCHES, COPIES]),
        with("rx 1500 B", Kind::Rx(1500), &[BATCHES, COPIES, SYSCALL, URING]),
        with("rx 64 KiB super-frames", Kind::RxLarge, &[]),
        with("udp 1400 B from a socket, sender's time too", Kind::UdpFromSocket, &[]),
        with("round trip", Kind::PingPong, &[POLLING, ADAPTIVE]),
        on_all("devices: tx 1500 B, mixed flows", Kind::Tx(1500)),
        on_all("devices: tx 1500 B to a full socket", Kind::TxToFull(1500)),
        on_all("devices: rx 1500 B", Kind::Rx(1500)),
        on_all("devices: tx 64 KiB super-frames", Kind::TxLarge),
    ]
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(socket) = &args.as_baseline {
        baseline::serve(socket, place::TAP);
        return ExitCode::SUCCESS;
    }
    if !common::netns::require_root("the data-path benchmark") {
        return ExitCode::FAILURE;
    }
    place::bind_to(place::DRIVER_CPU);
    place::sleep_exactly();
    let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 5 });
    let scale = if args.quick { 300 } else { 1000 };
    println!("{}", place::machine());
    println!("{rounds} rounds, all contenders in turn in each\n");
    let wanted = |case: &Case| args.only.as_ref().is_none_or(|text| case.name.contains(text.as_str()));
    let mut all = Vec::new();
    let has_testpmd = testpmd::is_installed();
    for mut case in cases().into_iter().filter(wanted) {
        case.contenders.retain(|contender| *contender != Contender::Testpmd || has_testpmd);
        if let Some(ours) = case.contenders.iter().position(|contender| *contender == OURS) {
            case.contenders.splice(ours + 1..ours + 1, args.beside.clone().map(Contender::Beside));
        }
        case.contenders.retain(|contender| args.contender.is_empty() || args.contender.contains(&contender.name()));
        let measured = run(case, rounds, scale);
        report::print(&measured);
        all.push(measured);
    }
    let idle = args.only.as_ref().is_none_or(|text| "idle".contains(text.as_str())).then(|| idle::measure(3));
    if let Some(idle) = &idle {
        report::print_idle(idle);
    }
    let json = args.json.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("datapath.json"));
    std::fs::write(&json, report::json(&all, idle.as_ref())).expect("the JSON can be written");
    eprintln!("Figures: {}", json.display());
    if let Some(svg) = args.svg {
        std::fs::write(&svg, report::svg(&all)).expect("the picture can be written");
    }
    ExitCode::SUCCESS
}

fn run(case: Case, rounds: usize, scale: u64) -> Measured {
    let mut samples = vec![Vec::new(); case.contenders.len()];
    let shows_progress = std::io::stderr().is_terminal();
    let before = place::processor_time();
    for round in 1..=rounds {
        // Each begins in its turn, so that none always comes after the same one.
        for at in 0..case.contenders.len() {
            let at = (at + round) % case.contenders.len();
            let contender = &case.contenders[at];
            if shows_progress {
                eprint!("\r\x1b[K{}: round {round} of {rounds}, {}", case.name, contender.name());
            }
            samples[at].push(cases::measure(case.kind, contender, scale));
        }
    }
    if shows_progress {
        eprint!("\r\x1b[K");
    }
    Measured { case, samples, stolen: place::stolen(before, place::processor_time()) }
}
