//! The same sessions against this back-end and against a conventional one that we did not write, message by message.
//!
//! Where the two answer differently, [`DIFFERENCES`] says which and why; a difference that is not listed fails, and so
//! does a listed one that is none any more. Which of the two is right is no question here: what we want of this
//! back-end is in the session tests. This asks whether we differ from others where we do not mean to.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::PathBuf;

use common::backend::InProcess;
use common::bench::{BASE, Guest, RING_SIZE};
use common::frames::{Ends, Stamp, test_frame};
use common::frontend::{Event, RawFrontend, has_own_reply};
use common::memory::{RegionInfo, USER_OFFSET};
use common::message::{Message, NO_FD, VringAddr, request};
use common::reference::ReferenceDaemon;
use common::tap_double::TapDouble;
use common::virtio::{VnetHdr, feature, protocol};
use common::{PATIENCE, fd_of};
use tempfile::TempDir;

/// What came back for one message.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Ack,
    Nack,
    /// A reply of its own.
    Reply(Vec<u8>),
    /// The next message was answered, this one not.
    Silence,
    Closed,
    Timeout,
}

impl Outcome {
    fn kind(&self) -> &'static str {
        match self {
            Outcome::Ack => "ack",
            Outcome::Nack => "nack",
            Outcome::Reply(_) => "reply",
            Outcome::Silence => "silence",
            Outcome::Closed => "closed",
            Outcome::Timeout => "timeout",
        }
    }
}

/// A message, made from what the guest has.
type Make = fn(&Guest) -> Message<'_>;

/// How far a session has come when a question is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Connected.
    Fresh,
    /// Features and memory are settled.
    Negotiated,
    /// The rings run, and one frame has passed each way.
    Running,
}

/// Name, stage, message.
const QUESTIONS: &[(&str, Stage, Make)] = &[
    ("features", Stage::Fresh, |_| Message::get_features()),
    ("protocol features", Stage::Fresh, |_| Message::get_protocol_features()),
    ("owner", Stage::Fresh, |_| Message::set_owner()),
    ("base of a ring never set up", Stage::Negotiated, |_| Message::get_vring_base(0)),
    ("second owner", Stage::Negotiated, |_| Message::set_owner()),
    ("features that were not offered", Stage::Negotiated, |_| Message::set_features(BASE | 1 << 60)),
    ("protocol features that were not offered", Stage::Negotiated, |_| Message::set_protocol_features(u64::MAX)),
    ("unknown request", Stage::Negotiated, |_| Message::new(4242, vec![0; 8])),
    ("request 0", Stage::Negotiated, |_| Message::new(0, Vec::new())),
    ("request without its payload", Stage::Negotiated, |_| Message::new(request::SET_VRING_NUM, Vec::new())),
    ("request with a byte too many", Stage::Negotiated, |_| Message::new(request::SET_VRING_NUM, vec![0; 9])),
    ("header of version 2", Stage::Negotiated, |_| Message::get_features().with_flags(2)),
    ("log of written pages, not negotiated", Stage::Negotiated, |guest| {
        Message::set_log_base(2048, 0, fd_of_memory(guest))
    }),
    ("queue number", Stage::Negotiated, |_| Message::get_queue_num()),
    ("memory slots", Stage::Negotiated, |_| Message::get_max_mem_slots()),
    ("configuration space", Stage::Negotiated, |_| Message::get_config(0, 6)),
    ("queue size 0", Stage::Negotiated, |_| Message::set_vring_num(0, 0)),
    ("queue size 3", Stage::Negotiated, |_| Message::set_vring_num(0, 3)),
    ("queue size 256", Stage::Negotiated, |_| Message::set_vring_num(0, 256)),
    ("queue size 65536", Stage::Negotiated, |_| Message::set_vring_num(0, 65536)),
    ("size of a ring that does not exist", Stage::Negotiated, |_| Message::set_vring_num(99, 256)),
    ("base 7", Stage::Negotiated, |_| Message::set_vring_base(0, 7)),
    ("base of 17 bits", Stage::Negotiated, |_| Message::set_vring_base(0, 0x1_2345)),
    ("addresses", Stage::Negotiated, |guest| Message::set_vring_addr(0, &guest.pairs[0].rx)),
    ("addresses in no memory", Stage::Negotiated, |guest| {
        let addr = VringAddr::of(&guest.pairs[0].rx);
        Message::set_vring_addr_raw(0, &VringAddr { desc: 0x6000, ..addr })
    }),
    ("descriptor table unaligned", Stage::Negotiated, |guest| {
        let addr = VringAddr::of(&guest.pairs[0].rx);
        Message::set_vring_addr_raw(0, &VringAddr { desc: addr.desc + 1, ..addr })
    }),
    ("used ring over the descriptor table", Stage::Negotiated, |guest| {
        let addr = VringAddr::of(&guest.pairs[0].rx);
        Message::set_vring_addr_raw(0, &VringAddr { used: addr.desc, ..addr })
    }),
    ("addresses of a ring that does not exist", Stage::Negotiated, |guest| {
        Message::set_vring_addr(99, &guest.pairs[0].rx)
    }),
    ("kick", Stage::Negotiated, |guest| Message::set_vring_kick(0, fd_of(&guest.pairs[0].rx.kick))),
    ("call", Stage::Negotiated, |guest| Message::set_vring_call(0, fd_of(&guest.pairs[0].rx.call))),
    ("error", Stage::Negotiated, |guest| Message::set_vring_err(0, fd_of(&guest.pairs[0].rx.err))),
    ("no call", Stage::Negotiated, |_| Message::set_vring_no_fd(request::SET_VRING_CALL, 0)),
    ("no call, and not saying so", Stage::Negotiated, |_| Message::u64(request::SET_VRING_CALL, 0)),
    ("no call, and one with it", Stage::Negotiated, |guest| {
        Message::u64(request::SET_VRING_CALL, NO_FD).with_fd(fd_of(&guest.pairs[0].rx.call))
    }),
    ("call of a ring that does not exist", Stage::Negotiated, |guest| {
        Message::set_vring_call(99, fd_of(&guest.pairs[0].rx.call))
    }),
    ("enable", Stage::Negotiated, |_| Message::set_vring_enable(0, 1)),
    ("enable 2", Stage::Negotiated, |_| Message::set_vring_enable(0, 2)),
    ("enable of a ring that does not exist", Stage::Negotiated, |_| Message::set_vring_enable(99, 1)),
    ("memory table", Stage::Negotiated, |guest| Message::set_mem_table(&guest.mem)),
    ("memory table without regions", Stage::Negotiated, |_| Message::set_mem_table_claiming(&[])),
    ("memory table without its descriptor", Stage::Negotiated, |guest| {
        Message::set_mem_table(&guest.mem).without_fds()
    }),
    ("memory table with room for more", Stage::Negotiated, |guest| {
        let table = Message::set_mem_table(&guest.mem);
        let mut body = table.body.clone();
        body.resize(8 + 2 * 32, 0);
        table.with_body(body)
    }),
    ("region", Stage::Negotiated, |guest| Message::add_mem_reg_claiming(&OTHER).with_fd(fd_of_memory(guest))),
    ("region of no bytes", Stage::Negotiated, |guest| {
        Message::add_mem_reg_claiming(&RegionInfo { size: 0, ..OTHER }).with_fd(fd_of_memory(guest))
    }),
    ("region that wraps", Stage::Negotiated, |guest| {
        Message::add_mem_reg_claiming(&RegionInfo { guest: u64::MAX - 4095, ..OTHER }).with_fd(fd_of_memory(guest))
    }),
    ("region larger than its file", Stage::Negotiated, |guest| {
        Message::add_mem_reg_claiming(&RegionInfo { size: 1 << 30, ..OTHER }).with_fd(fd_of_memory(guest))
    }),
    ("region that is there", Stage::Negotiated, |guest| Message::add_mem_reg(&guest.mem.regions()[0])),
    ("removal of a region that is there", Stage::Negotiated, |guest| {
        Message::rem_mem_reg(&guest.mem.regions()[0].info)
    }),
    ("removal of a region that is not there", Stage::Negotiated, |_| Message::rem_mem_reg(&OTHER)),
    ("RARP, not negotiated", Stage::Negotiated, |_| Message::send_rarp([2; 6])),
    ("MTU, not negotiated", Stage::Negotiated, |_| Message::set_mtu(1500)),
    ("status, not negotiated", Stage::Negotiated, |_| Message::set_status(0)),
    ("reset, not negotiated", Stage::Negotiated, |_| Message::reset_device()),
    ("base of a running ring", Stage::Running, |_| Message::get_vring_base(1)),
    ("the same addresses to a running ring", Stage::Running, |guest| Message::set_vring_addr(1, &guest.pairs[0].tx)),
    ("other addresses to a running ring", Stage::Running, |guest| Message::set_vring_addr(1, &guest.pairs[0].rx)),
    ("size of a running ring", Stage::Running, |_| Message::set_vring_num(1, 128)),
    ("base to an enabled ring", Stage::Running, |_| Message::set_vring_base(1, 0)),
    ("new call of a running ring", Stage::Running, |guest| Message::set_vring_call(1, fd_of(&guest.pairs[0].tx.call))),
    ("disable", Stage::Running, |_| Message::set_vring_enable(1, 0)),
    ("the same features while rings run", Stage::Running, |_| Message::set_features(BASE)),
    ("other features while rings run", Stage::Running, |_| Message::set_features(BASE | feature::MRG_RXBUF)),
    ("reset of the owner", Stage::Running, |_| Message::reset_owner()),
];

/// A region beside the guest's own, in its file.
const OTHER: RegionInfo = RegionInfo { guest: 0x4000_0000, size: 4096, user: 0x4000_0000 + USER_OFFSET, offset: 0 };

fn fd_of_memory(guest: &Guest) -> std::os::fd::BorrowedFd<'_> {
    guest.mem.regions()[0].fd()
}

/// Questions that are answered differently for one reason.
struct Difference {
    why: &'static str,
    ours: &'static str,
    reference: &'static str,
    questions: &'static [&'static str],
}

const DIFFERENCES: &[Difference] = &[
    Difference {
        why: "we offer what front-ends of network cards know, the reference the least",
        ours: "reply",
        reference: "reply",
        questions: &["features", "protocol features"],
    },
    Difference {
        why: "front-ends read it as pairs or as rings, and 2N + 1 suits all; the reference says its rings",
        ours: "reply",
        reference: "reply",
        questions: &["queue number"],
    },
    Difference {
        why: "a front-end that gets one message wrong is refused that one; the reference ends its session",
        ours: "nack",
        reference: "closed",
        questions: &[
            "features that were not offered",
            "unknown request",
            "request 0",
            "request without its payload",
            "request with a byte too many",
            "queue size 0",
            "queue size 65536",
            "size of a ring that does not exist",
            "addresses in no memory",
            "descriptor table unaligned",
            "addresses of a ring that does not exist",
            "no call, and not saying so",
            "no call, and one with it",
            "call of a ring that does not exist",
            "enable 2",
            "enable of a ring that does not exist",
            "memory table without regions",
            "memory table without its descriptor",
            "region of no bytes",
            "region that wraps",
            "RARP, not negotiated",
            "MTU, not negotiated",
            "status, not negotiated",
            "reset, not negotiated",
        ],
    },
    Difference {
        why: "so is one that hands over a log too early; the reference ends the session",
        ours: "reply",
        reference: "closed",
        questions: &["log of written pages, not negotiated"],
    },
    Difference {
        why: "libkrun says it whenever its device is activated",
        ours: "ack",
        reference: "closed",
        questions: &["second owner"],
    },
    Difference {
        why: "QEMU up to 7.2 removes a region once for every queue pair",
        ours: "ack",
        reference: "closed",
        questions: &["removal of a region that is not there"],
    },
    Difference {
        why: "an empty reply is the protocol's own refusal of it; the reference ends the session",
        ours: "reply",
        reference: "closed",
        questions: &["configuration space"],
    },
    Difference {
        why: "the reference acknowledges what it then ignores, cuts to 16 bits, or would die of",
        ours: "nack",
        reference: "ack",
        questions: &[
            "protocol features that were not offered",
            "queue size 3",
            "base of 17 bits",
            "used ring over the descriptor table",
            "region larger than its file",
        ],
    },
    Difference {
        why: "a running ring is the worker's, with what was checked when it started; the reference changes it in passing",
        ours: "nack",
        reference: "ack",
        questions: &[
            "other addresses to a running ring",
            "size of a running ring",
            "base to an enabled ring",
            "other features while rings run",
        ],
    },
    Difference {
        why: "User Mode Linux sends room for more regions than it has",
        ours: "ack",
        reference: "closed",
        questions: &["memory table with room for more"],
    },
    Difference {
        why: "QEMU 7.2 adds each region once for every queue pair",
        ours: "ack",
        reference: "closed",
        questions: &["region that is there"],
    },
];

/// A session with one of the two, up to a stage.
struct Side {
    // Dropped in this order: the reference daemon ends after its connection.
    front_end: RawFrontend,
    guest: Guest,
}

impl Side {
    fn at(stage: Stage, socket: PathBuf, tap: &TapDouble) -> Side {
        let mut this = Side { front_end: RawFrontend::connect(socket).unwrap(), guest: Guest::new(1, 0) };
        if stage != Stage::Fresh {
            let answers = this.run(NEGOTIATION);
            assert!(answers.iter().all(|answer| !matches!(answer, Outcome::Nack | Outcome::Closed)), "{answers:?}");
        }
        if stage == Stage::Running {
            let answers = this.run(RINGS);
            assert_eq!(answers, vec![Outcome::Ack; RINGS.len()]);
            let frame = test_frame(&Ends::TX, Stamp { stream: 1, seq: 0 }, 100);
            this.guest.pairs[0].send(&VnetHdr::default(), &frame);
            assert_eq!(tap.recv(PATIENCE).unwrap().1, frame);
            assert!(this.guest.pairs[0].wait_tx_done(PATIENCE));
            this.guest.assert_rx(0, tap);
        }
        this
    }

    fn run(&self, script: &[Make]) -> Vec<Outcome> {
        script.iter().map(|make| self.put(make(&self.guest))).collect()
    }

    /// Sends a message with a wish for an answer, and a question after it that shows whether there was one.
    fn put(&self, message: Message<'_>) -> Outcome {
        let asked = message.request;
        let sent = self.front_end.send(&message.with_need_reply());
        if sent.and_then(|()| self.front_end.send(&Message::get_features())).is_err() {
            return Outcome::Closed;
        }
        let outcome = match self.front_end.receive(PATIENCE) {
            Event::Reply(reply) if reply.request == asked && has_own_reply(asked) => Outcome::Reply(reply.body),
            Event::Reply(reply) if reply.request == asked => {
                if reply.u64() == 0 {
                    Outcome::Ack
                } else {
                    Outcome::Nack
                }
            }
            Event::Reply(reply) if reply.request == request::GET_FEATURES => return Outcome::Silence,
            Event::Reply(reply) => panic!("{reply:?} came for request {asked}"),
            Event::Closed => return Outcome::Closed,
            Event::Timeout => return Outcome::Timeout,
        };
        match self.front_end.receive(PATIENCE) {
            Event::Reply(reply) if reply.request == request::GET_FEATURES => outcome,
            // It answered, and closed then.
            _ => Outcome::Closed,
        }
    }
}

/// Settles what both know.
const NEGOTIATION: &[Make] = &[
    |_| Message::get_features(),
    |_| Message::get_protocol_features(),
    |_| Message::set_protocol_features(protocol::MQ | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS),
    |_| Message::set_owner(),
    |_| Message::set_features(BASE),
    |guest| Message::set_mem_table(&guest.mem),
];

/// In cloud-hypervisor's order.
const RINGS: &[Make] = &[
    |_| Message::set_vring_num(0, RING_SIZE as u32),
    |_| Message::set_vring_num(1, RING_SIZE as u32),
    |guest| Message::set_vring_addr(0, &guest.pairs[0].rx),
    |_| Message::set_vring_base(0, 0),
    |guest| Message::set_vring_call(0, fd_of(&guest.pairs[0].rx.call)),
    |guest| Message::set_vring_kick(0, fd_of(&guest.pairs[0].rx.kick)),
    |guest| Message::set_vring_addr(1, &guest.pairs[0].tx),
    |_| Message::set_vring_base(1, 0),
    |guest| Message::set_vring_call(1, fd_of(&guest.pairs[0].tx.call)),
    |guest| Message::set_vring_kick(1, fd_of(&guest.pairs[0].tx.kick)),
    |_| Message::set_vring_enable(0, 1),
    |_| Message::set_vring_enable(1, 1),
];

/// At the end of a session.
const STOP: &[Make] = &[
    |_| Message::set_vring_enable(0, 0),
    |_| Message::get_vring_base(0),
    |_| Message::set_vring_enable(1, 0),
    |_| Message::get_vring_base(1),
];

/// Runs `act` with this back-end, and with the reference.
fn both<T>(act: impl Fn(PathBuf, &TapDouble) -> T) -> [T; 2] {
    let backend = InProcess::start(1);
    let ours = act(backend.socket(), &backend.taps[0]);
    let dir = TempDir::new().unwrap();
    let (tap, device) = TapDouble::new();
    let socket = dir.path().join("socket");
    let reference = ReferenceDaemon::start(&socket, device);
    let theirs = act(socket, &tap);
    drop(reference);
    [ours, theirs]
}

#[test]
fn every_question_is_answered_alike_or_for_a_stated_reason() {
    let mut wrong = Vec::new();
    for (name, stage, make) in QUESTIONS {
        let [ours, theirs] = both(|socket, tap| {
            let side = Side::at(*stage, socket, tap);
            side.put(make(&side.guest))
        });
        let stated = DIFFERENCES.iter().find(|difference| difference.questions.contains(name));
        let as_stated = match stated {
            Some(stated) => ours != theirs && (ours.kind(), theirs.kind()) == (stated.ours, stated.reference),
            None => ours == theirs,
        };
        let why = stated.map_or("no difference is stated", |stated| stated.why);
        if !as_stated {
            wrong.push(format!("{name}: {ours:?}, the reference {theirs:?} ({why})"));
        }
    }
    assert!(wrong.is_empty(), "Not as stated:\n{}", wrong.join("\n"));
}

#[test]
fn stated_differences_are_of_questions_that_are_put_once() {
    let mut put: Vec<_> = QUESTIONS.iter().map(|(name, ..)| *name).collect();
    let stated: Vec<_> = DIFFERENCES.iter().flat_map(|difference| difference.questions).collect();
    for name in &stated {
        assert!(put.contains(name), "{name} is not put");
        assert_eq!(stated.iter().filter(|other| other == &name).count(), 1, "{name} is stated twice");
    }
    put.sort_unstable();
    assert!(put.windows(2).all(|pair| pair[0] != pair[1]), "A name twice");
}

#[test]
fn session_from_start_to_stop_is_answered_alike() {
    let [ours, theirs] = both(|socket, tap| {
        let mut side = Side::at(Stage::Running, socket, tap);
        for seq in 1..20 {
            let frame = test_frame(&Ends::TX, Stamp { stream: 1, seq }, 100);
            side.guest.pairs[0].send(&VnetHdr::default(), &frame);
            assert_eq!(tap.recv(PATIENCE).unwrap().1, frame);
        }
        assert!(side.guest.pairs[0].wait_tx_done(PATIENCE));
        side.run(STOP)
    });
    assert_eq!(ours, theirs);
    let state = |ring: u32, base: u32| Outcome::Reply([ring, base].map(u32::to_ne_bytes).concat());
    assert_eq!(ours, [Outcome::Ack, state(0, 1), Outcome::Ack, state(1, 20)]);
}

/// And frames are the same on the TAP and in the guest, whatever the features.
#[test]
fn frames_come_out_alike() {
    for features in [0, feature::MRG_RXBUF, feature::INDIRECT_DESC] {
        let [ours, theirs] = both(|socket, tap| {
            let mut guest = Guest::new(1, features);
            let front_end = RawFrontend::connect(socket).unwrap();
            front_end.negotiate_like_cloud_hypervisor(&guest.session()).unwrap();
            guest.pairs[0].post_rx(64, 2048);
            let mut seen = Vec::new();
            for (seq, len) in (0..).zip([60, 300, 1514]) {
                let stamp = Stamp { stream: 1, seq };
                guest.pairs[0].send(&VnetHdr::default(), &test_frame(&Ends::TX, stamp, len));
                seen.push(tap.recv(PATIENCE).unwrap());
                tap.send(&VnetHdr::default(), &test_frame(&Ends::RX, stamp, len));
                seen.push(guest.pairs[0].recv(PATIENCE).unwrap());
            }
            seen
        });
        assert_eq!(ours, theirs, "features {features:#x}");
    }
}
