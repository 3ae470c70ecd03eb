//! Classic BPF programs for packet sockets: which frames come up, and to which of several sockets.
//!
//! Loads name the link-layer or the network header that they count from, since what is at offset 0 depends on who runs
//! the program.

use libc::{
    BPF_ABS, BPF_ALU, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_LDX, BPF_MEM, BPF_MOD,
    BPF_MSH, BPF_MUL, BPF_RET, BPF_RSH, BPF_ST, BPF_W, BPF_X, BPF_XOR, sock_filter,
};

use crate::mac::Mac;

/// The offset of the link-layer header.
const LINK: u32 = libc::SKF_LL_OFF as u32;
/// The offset of the network header.
const NET: u32 = libc::SKF_NET_OFF as u32;
/// The offset at which the kernel gives the frame's protocol, which is not a place in the frame.
const PROTOCOL: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_PROTOCOL) as u32;
const ACCEPT: u32 = u32::MAX;

fn op(code: u32, k: u32) -> sock_filter {
    // The codes are of 16 bits.
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Skips `jt` instructions if the condition holds, else `jf`.
fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | code | BPF_K) as u16, jt, jf, k }
}

/// Accepts frames to `mac` and to groups.
pub(super) fn frames_to(mac: Mac) -> Vec<sock_filter> {
    let [a, b, c, d, e, f] = mac;
    vec![
        op(BPF_LD | BPF_B | BPF_ABS, LINK),
        jump(BPF_JSET, 1, 4, 0),
        op(BPF_LD | BPF_W | BPF_ABS, LINK),
        jump(BPF_JEQ, u32::from_be_bytes([a, b, c, d]), 0, 3),
        op(BPF_LD | BPF_H | BPF_ABS, LINK.wrapping_add(4)),
        jump(BPF_JEQ, u32::from(u16::from_be_bytes([e, f])), 0, 1),
        op(BPF_RET | BPF_K, ACCEPT),
        op(BPF_RET | BPF_K, 0),
    ]
}

/// Chooses one of `sockets` for each flow, by its addresses and ports. If there are none, the first socket of the group
/// gets all frames.
pub(super) fn spread(sockets: &[u32]) -> Vec<sock_filter> {
    let load_net = |at: u32| op(BPF_LD | BPF_W | BPF_ABS, NET.wrapping_add(at));
    // Adds the accumulator to the hash in M[0].
    let add = [op(BPF_LDX | BPF_MEM, 0), op(BPF_ALU | BPF_XOR | BPF_X, 0), op(BPF_ST, 0)];
    let mut v4 = vec![load_net(12)];
    v4.extend(add);
    v4.push(load_net(16));
    v4.extend(add);
    // TCP and UDP ports, if the packet has them.
    let ports = [op(BPF_LDX | BPF_MSH | BPF_B, NET), op(BPF_LD | BPF_W | BPF_IND, NET)];
    v4.extend([op(BPF_LD | BPF_B | BPF_ABS, NET.wrapping_add(9))]);
    let to_end = (ports.len() + add.len()) as u8;
    v4.extend([
        jump(BPF_JEQ, 6, 1, 0),
        jump(BPF_JEQ, 17, 0, to_end + 2),
        op(BPF_LD | BPF_H | BPF_ABS, NET.wrapping_add(6)),
        jump(BPF_JSET, 0x3fff, to_end, 0),
    ]);
    v4.extend(ports);
    v4.extend(add);
    let mut v6 = Vec::new();
    for at in (8..40).step_by(4) {
        v6.push(load_net(at));
        v6.extend(add);
    }
    v6.extend([
        op(BPF_LD | BPF_B | BPF_ABS, NET.wrapping_add(6)),
        jump(BPF_JEQ, 6, 1, 0),
        jump(BPF_JEQ, 17, 0, 1 + add.len() as u8),
        load_net(40),
    ]);
    v6.extend(add);

    let (v4_len, v6_len) = (v4.len() as u32, v6.len() as u32);
    let mut program = vec![
        op(BPF_LD, 0),
        op(BPF_ST, 0),
        op(BPF_LD | BPF_W | BPF_ABS, PROTOCOL),
        jump(BPF_JEQ, 0x0800, 2, 0),
        // To the IPv6 part: over the next instruction, the IPv4 part and the jump behind that.
        jump(BPF_JEQ, 0x86dd, 2 + v4_len as u8, 0),
        op(BPF_JMP, v4_len + 1 + v6_len),
    ];
    program.extend(v4);
    program.push(op(BPF_JMP, v6_len));
    program.extend(v6);
    let count = u32::try_from(sockets.len()).unwrap_or(u32::MAX).max(1);
    program.extend([
        op(BPF_LD | BPF_MEM, 0),
        op(BPF_ALU | BPF_MUL | BPF_K, 0x9e37_79b1),
        op(BPF_ALU | BPF_RSH | BPF_K, 16),
        op(BPF_ALU | BPF_MOD | BPF_K, count),
    ]);
    for (index, socket) in (0..).zip(sockets) {
        program.extend([jump(BPF_JEQ, index, 0, 1), op(BPF_RET | BPF_K, *socket)]);
    }
    program.push(op(BPF_RET | BPF_K, 0));
    program
}
