//! Writes the first inputs of the targets, from what the test-suite is made of: frames, messages in the order of real
//! front-ends, commands, command lines. Takes the directory to write to, in which each target has one of its own.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use vhost_user_net_fuzz::guest;
use vhost_user_net_fuzz::kit::fd_of;
use vhost_user_net_fuzz::kit::frames::{Ends, L4Csum, arp_request, tcp4, tcp6, udp4, udp6, vlan};
use vhost_user_net_fuzz::kit::message::Message;
use vhost_user_net_fuzz::kit::split_ring::SplitRing;
use vhost_user_net_fuzz::kit::virtio::{VnetHdr, ctrl, feature, gso, net_flag};

struct Seeds(PathBuf);

impl Seeds {
    fn write(&self, target: &str, name: &str, bytes: &[u8]) {
        let dir = self.0.join(target);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("seed-{name}")), bytes).unwrap();
    }
}

fn main() {
    let dir = std::env::args_os().nth(1).expect("a directory to write to");
    let seeds = Seeds(Path::new(&dir).to_owned());
    frames(&seeds);
    rings(&seeds);
    sessions(&seeds);
    commands(&seeds);
    command_lines(&seeds);
}

/// Every kind of frame with every header that suits it, and some that do not.
fn suite_frames() -> Vec<(String, VnetHdr, Vec<u8>)> {
    let bytes = [7; 100];
    let all = [
        ("tcp4", tcp4(&Ends::TX, 1, &bytes, L4Csum::Partial), 34, 16, gso::TCPV4),
        ("tcp6", tcp6(&Ends::TX, 1, &bytes, L4Csum::Partial), 54, 16, gso::TCPV6),
        ("udp4", udp4(&Ends::TX, &bytes, L4Csum::Partial), 34, 6, gso::UDP_L4),
        ("udp6", udp6(&Ends::TX, &bytes, L4Csum::Partial), 54, 6, gso::UDP_L4),
    ];
    let mut frames = vec![("arp".to_owned(), VnetHdr::default(), arp_request(&Ends::TX))];
    for (name, frame, csum_start, csum_offset, gso_type) in all {
        let csum = VnetHdr { flags: net_flag::NEEDS_CSUM, csum_start, csum_offset, ..VnetHdr::default() };
        let segmented = VnetHdr { gso_type, gso_size: 40, hdr_len: csum_start + 20, ..csum };
        let tagged = VnetHdr { csum_start: csum_start + 4, ..segmented };
        frames.push((format!("{name}-plain"), VnetHdr::default(), frame.clone()));
        frames.push((format!("{name}-csum"), csum, frame.clone()));
        frames.push((format!("{name}-gso"), segmented, frame.clone()));
        frames.push((format!("{name}-ecn"), VnetHdr { gso_type: gso_type | gso::ECN, ..segmented }, frame.clone()));
        frames.push((format!("{name}-wrong"), VnetHdr { csum_start: 0xffff, ..csum }, frame.clone()));
        frames.push((format!("{name}-vlan"), tagged, vlan(&frame, 5)));
    }
    frames
}

fn frames(seeds: &Seeds) {
    const ALL: [u8; 2] = [0xff; 2];
    for (name, header, frame) in suite_frames() {
        let header = header.to_bytes();
        // As it is: see `scenario::frame`.
        let raw = [&[0x80][..], &header, &[frame.len() as u8], &frame].concat();
        seeds.write("header", &name, &[&ALL[..], &ALL, &[0], &header, &frame].concat());
        seeds.write("segment", &name, &[&ALL[..], &raw].concat());
        seeds.write("segment", &format!("{name}-none"), &[&[0, 0][..], &raw].concat());
        let other = [&raw[..], &raw].concat();
        seeds.write("coalesce", &name, &[&[1, 1][..], &other].concat());
        // One frame in two buffers, then one in a table.
        let chains = [&[1, 0][..], &raw, &[1, 12, 0, 0], &raw, &[0, 1, 0]].concat();
        seeds.write("tx", &name, &[&ALL[..], &[1, 0, 0, 0, 0], &chains].concat());
        // Four buffers, then the frame.
        let buffers = [4, 0, 201, 0, 1, 12, 210, 0, 0, 255, 0, 0, 100, 0];
        for mergeable in [0, 1] {
            let begin = [0xff, 0xff, mergeable, 0, 0];
            seeds.write("rx", &format!("{name}-{mergeable}"), &[&begin[..], &buffers, &[1], &raw].concat());
        }
        seeds.write("mutate", &name, &[&ALL[..], &[0, 0, 1], &raw, &[2, 12, 20, 1, 0]].concat());
    }
    // A flow of eight frames, to be put together: see `scenario::frame`.
    for kind in 0..8 {
        let flow = [kind, 10, 5].repeat(8);
        seeds.write("coalesce", &format!("flow-{kind}"), &[&[1, 1][..], &flow].concat());
        let chains = [kind, 10, 5, 0, 0].repeat(8);
        seeds.write("tx", &format!("flow-{kind}"), &[&[0xff, 0xff, 0, 1, 1, 0, 0, 7][..], &chains].concat());
    }
}

fn rings(seeds: &Seeds) {
    let desc = |len: u8, flags: u8, next: u8| [4, 0, 0, 3, len, flags, next];
    // Writes a chain of two, makes it available, pops, completes, publishes, and sleeps.
    let chain = [
        &[0, 0][..],
        &desc(12, 1, 1),
        &[1, 1],
        &desc(60, 2, 0),
        &[5, 0, 0, 0, 8, 1, 12, 13, 72, 0, 0, 0, 15, 1, 15, 0],
    ];
    for size in 1..7 {
        for (event_idx, indirect) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            let begin = [size, event_idx, indirect, 0, 0];
            let whole = [&begin[..], &chain.concat(), &chain.concat()].concat();
            seeds.write("split_ring", &format!("{size}-{event_idx}{indirect}"), &whole);
        }
    }
    for place in 0..4 {
        let short = [&[1, place, 16, 0, 3][..], &desc(4, 0, 0), &desc(5, 0, 0), &desc(6, 2, 0), &[1], &desc(7, 0, 0)];
        seeds.write("indirect", &format!("short-{place}"), &short.concat());
        let long = [1, place, 16, 1, 24, 1, 2, 4, 0, 0, 0, 4, 0, 9];
        seeds.write("indirect", &format!("long-{place}"), &long);
    }
}

/// The messages that start a session, in cloud-hypervisor's order and in QEMU's, with their descriptors.
fn sessions(seeds: &Seeds) {
    let guest = guest::fresh();
    let rings = [(); 2].map(|()| SplitRing::new(&guest.mem, 64));
    let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
    let begin = || {
        let protocol = Message::set_protocol_features(1 << 3 | 1 << 15);
        vec![Message::get_features(), Message::get_protocol_features(), protocol, Message::set_owner()]
    };
    let ring = |index: usize| {
        let (ring, at) = (&rings[index], index as u32);
        let (kick, call) = (fd_of(&ring.kick), fd_of(&ring.call));
        [
            Message::set_vring_num(at, 64),
            Message::set_vring_base(at, 0),
            Message::set_vring_addr(at, ring),
            Message::set_vring_kick(index as u64, kick),
            Message::set_vring_call(index as u64, call),
            Message::set_vring_enable(at, 1),
        ]
    };
    let end = || [Message::get_vring_base(0), Message::get_vring_base(1), Message::get_config(0, 12)];
    let regions = guest.mem.regions();
    let whole = [Message::set_mem_table(&guest.mem), Message::set_features(features)];
    let one_by_one = [Message::set_features(features)].into_iter().chain(regions.iter().map(Message::add_mem_reg));
    let cloud_hypervisor = begin().into_iter().chain(whole).chain(ring(0)).chain(ring(1)).chain(end());
    let qemu = begin().into_iter().chain(one_by_one).chain(ring(0)).chain(ring(1)).chain(end());
    let number = |fd: i32| regions.iter().position(|region| region.fd().as_fd().as_raw_fd() == fd).unwrap_or(3) as u8;
    for (name, messages) in [("cloud-hypervisor", cloud_hypervisor.collect::<Vec<_>>()), ("qemu", qemu.collect())] {
        let mut bytes = Vec::new();
        for message in messages {
            // How many descriptors, and which: see the target.
            bytes.push(match message.fds.len() {
                0 => 0,
                1 => 160,
                count => 240 + (count / 3) as u8,
            });
            bytes.extend(message.fds.iter().map(|fd| number(fd.as_raw_fd())));
            let message = message.with_need_reply().to_bytes();
            bytes.push(message.len() as u8);
            bytes.extend(message);
        }
        seeds.write("session_bytes", name, &bytes);
    }
    // A ring's index and a step's number, see the target: features, memory, and for each ring size, address, kick, enable;
    // then disabling and stopping it.
    let mut steps = vec![1, 0, 0, 0, 2, 3, 0, 3, 7, 7];
    for ring in [0, 1] {
        for step in [&[6, 1, 6][..], &[8, 1, 9], &[10, 7], &[13, 1], &[13, 0], &[14]] {
            steps.push(ring);
            steps.extend(step);
        }
    }
    seeds.write("session", "start", &steps);
}

fn commands(seeds: &Seeds) {
    let table = [&2_u32.to_le_bytes()[..], &[2; 12], &1_u32.to_le_bytes(), &[3; 6]].concat();
    let all: [(&str, u8, u8, &[u8]); 9] = [
        ("promiscuous", ctrl::CLASS_RX, 0, &[0]),
        ("no-broadcast", ctrl::CLASS_RX, 5, &[1]),
        ("macs", ctrl::CLASS_MAC, 0, &table),
        ("mac", ctrl::CLASS_MAC, 1, &[2, 0, 0, 0, 0, 9]),
        ("vlan", ctrl::CLASS_VLAN, 0, &[5, 0]),
        ("vlan-off", ctrl::CLASS_VLAN, 1, &[5, 0]),
        ("announce", ctrl::CLASS_ANNOUNCE, 0, &[]),
        ("pairs", ctrl::CLASS_MQ, ctrl::MQ_VQ_PAIRS_SET, &[2, 0]),
        ("offloads", ctrl::CLASS_GUEST_OFFLOADS, ctrl::GUEST_OFFLOADS_SET, &[2, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (name, class, command, data) in all {
        let quiet = [ctrl::CLASS_RX, 0, 1, 0];
        let command = [&quiet[..], &[class, command, data.len() as u8], data].concat();
        seeds.write("control", name, &[&[0xff, 0xff][..], &command].concat());
    }
}

/// Those that the tests of `config.rs` try.
fn command_lines(seeds: &Seeds) {
    let source = include_str!("../../../src/config.rs");
    let lines = source.split('"').filter(|text| text.starts_with("--") && text.contains(' '));
    for (at, line) in lines.enumerate() {
        seeds.write("cli", &at.to_string(), line.replace(' ', "\n").as_bytes());
    }
}
