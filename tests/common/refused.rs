//! System calls that the kernel refuses to a command, as an older kernel or a container does.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// Has each call of this number fail with `errno`, in the calling thread and all that it starts.
pub fn refuse(call: libc::c_long, errno: i32) -> io::Result<()> {
    apply(&filter(call, Vec::new(), errno))
}

/// Runs the command where each call of this number fails with `errno`.
pub fn refuse_to(command: &mut Command, call: libc::c_long, errno: i32) {
    apply_to(command, filter(call, Vec::new(), errno));
}

/// Runs it where calls of this number fail with `errno` if their argument at `index` is `value`.
pub fn refuse_argument_to(command: &mut Command, call: libc::c_long, (index, value): (u8, u64), errno: i32) {
    let rule = SeccompRule::new(vec![condition(index, SeccompCmpOp::Eq, value)]).unwrap();
    apply_to(command, filter(call, vec![rule], errno));
}

/// Runs it where an ioctl of this `request` fails with `errno` if any of `bits` is in its argument.
pub fn refuse_ioctl_bits_to(command: &mut Command, request: u32, bits: u32, errno: i32) {
    let is_request = condition(1, SeccompCmpOp::Eq, request.into());
    let one_of_them = |bit| condition(2, SeccompCmpOp::MaskedEq(bit), bit);
    let bits = (0..32).map(|bit| 1_u64 << bit).filter(|bit| u64::from(bits) & bit != 0);
    let rules = bits.map(|bit| SeccompRule::new(vec![is_request.clone(), one_of_them(bit)]).unwrap());
    apply_to(command, filter(libc::SYS_ioctl, rules.collect(), errno));
}

fn condition(argument: u8, op: SeccompCmpOp, value: u64) -> SeccompCondition {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value).unwrap()
}

/// Without rules, whatever the arguments are.
fn filter(call: libc::c_long, rules: Vec<SeccompRule>, errno: i32) -> BpfProgram {
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let refusal = SeccompAction::Errno(errno as u32);
    SeccompFilter::new([(call, rules)].into(), SeccompAction::Allow, refusal, arch).unwrap().try_into().unwrap()
}

fn apply_to(command: &mut Command, filter: BpfProgram) {
    // SAFETY: between fork and exec the filter, which is there, is set by system calls alone.
    unsafe { command.pre_exec(move || apply(&filter)) };
}

fn apply(filter: &BpfProgram) -> io::Result<()> {
    apply_filter(filter).map_err(io::Error::other)
}
