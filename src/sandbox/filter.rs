//! Turns the tables of `syscalls` into programs for the kernel.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::SandboxError;
use super::syscalls::{Only, Permit, Role};

/// A program that lets a thread make the system calls of its role, and ends the process at any other.
///
/// # Errors
/// If the compiler of such programs does not know this architecture.
pub fn program(role: Role) -> Result<BpfProgram, SandboxError> {
    let fault = |error: seccompiler::BackendError| SandboxError::Filter(seccompiler::Error::Backend(error));
    let rules = role.permits().map(|permit| Ok((permit.number, rules(permit)?))).collect::<Result<_, _>>();
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(fault)?;
    let filter = SeccompFilter::new(rules.map_err(fault)?, SeccompAction::KillProcess, SeccompAction::Allow, arch)
        .map_err(fault)?;
    filter.try_into().map_err(fault)
}

/// The rules of which one must hold for the call; without any, all arguments will do.
fn rules(permit: &Permit) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let condition = |index, op, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, u64::from(value));
    match permit.only {
        Only::Any => Ok(Vec::new()),
        Only::Values(index, values) => values
            .iter()
            .map(|(value, _)| SeccompRule::new(vec![condition(index, SeccompCmpOp::Eq, *value)?]))
            .collect(),
        Only::Without(index, (bits, _)) => {
            Ok(vec![SeccompRule::new(vec![condition(index, SeccompCmpOp::MaskedEq(u64::from(bits)), 0)?])?])
        }
    }
}
