//! The tables of `syscalls` as programs for the kernel.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::SandboxError;
use super::syscalls::{Only, Permit, Role};

/// A program that lets through what a thread may do, and ends the process at anything else.
///
/// # Errors
/// Where this architecture is none that the compiler of such programs knows.
pub fn program(role: Role) -> Result<BpfProgram, SandboxError> {
    let fault = |error: seccompiler::BackendError| SandboxError::Filter(seccompiler::Error::Backend(error));
    let rules = role.permits().map(|permit| Ok((permit.number, rules(permit)?))).collect::<Result<_, _>>();
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(fault)?;
    let filter = SeccompFilter::new(rules.map_err(fault)?, SeccompAction::KillProcess, SeccompAction::Allow, arch)
        .map_err(fault)?;
    filter.try_into().map_err(fault)
}

/// One of these must hold; none means that nothing has to.
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
