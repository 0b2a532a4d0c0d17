//! What is left to the process once its sockets are bound: nothing of the file system, no new sockets to anywhere, and
//! the system calls of its loop.
//!
//! 1. [`lock_files`], while there is one thread (landlock holds for the calling thread and its children): no file, no
//!    TCP, no abstract socket, no signal to others. A kernel without landlock is said so and goes on.
//! 2. [`lock_calls`], when all threads are there, for all of them: seccomp. What opens or asks for files gets an error;
//!    anything else that is not on the list ends the process.
//!
//! A process that is taken over by its guest still has: the guest's own memory, its tunnels, and two sockets.

use std::collections::BTreeMap;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};

/// Why there is no sandbox. The machine's fault: the process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Landlock failed, other than by being absent.
    #[error("landlock failed")]
    Landlock(#[from] landlock::RulesetError),
    /// Seccomp failed.
    #[error("seccomp failed")]
    Seccomp(#[from] seccompiler::Error),
    /// The list cannot be compiled.
    #[error("seccomp filter is malformed")]
    Filter(#[from] seccompiler::BackendError),
}

/// Takes the file system and the network away. Returns false if the kernel has no landlock.
///
/// # Errors
/// Landlock is there and fails.
pub fn lock_files() -> Result<bool, SandboxError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// Takes all system calls away but those of the loop, from every thread of the process.
///
/// # Errors
/// The kernel has no seccomp, or the architecture is not supported.
pub fn lock_calls() -> Result<(), SandboxError> {
    // The more severe of two filters' verdicts holds.
    let listed = compile(SeccompAction::KillProcess, SeccompAction::Allow, allowed()?)?;
    let errno = SeccompAction::Errno(libc::EACCES as u32);
    let softly = compile(SeccompAction::Allow, errno, refused())?;
    // Each installs for all threads, and sets no_new_privs.
    apply_filter_all_threads(&softly)?;
    apply_filter_all_threads(&listed)?;
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compile(
    mismatch: SeccompAction,
    matched: SeccompAction,
    rules: Rules,
) -> Result<BpfProgram, SandboxError> {
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, mismatch, matched, arch)?.try_into()?)
}

/// Calls that a library may try and that get `EACCES`.
fn refused() -> Rules {
    let mut calls = vec![libc::SYS_openat, libc::SYS_readlinkat, libc::SYS_faccessat];
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_open, libc::SYS_readlink, libc::SYS_access]);
    calls.into_iter().map(|call| (call, vec![])).collect()
}

fn allowed() -> Result<Rules, seccompiler::BackendError> {
    let mut calls = vec![
        // Bytes.
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_sendfile,
        // Waiting.
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_ctl,
        libc::SYS_ppoll,
        libc::SYS_futex,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_restart_syscall,
        libc::SYS_sched_yield,
        // Descriptors.
        libc::SYS_accept4,
        libc::SYS_socketpair,
        libc::SYS_shutdown,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_fcntl,
        libc::SYS_close,
        libc::SYS_flock,
        libc::SYS_fstat,
        libc::SYS_fstatfs,
        libc::SYS_lseek,
        libc::SYS_eventfd2,
        // Memory for a ring: no file has a name.
        libc::SYS_memfd_create,
        libc::SYS_ftruncate,
        // Memory.
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_membarrier,
        libc::SYS_getrandom,
        // What a thread does while it starts: the frontend's thread may still be at it.
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sched_getaffinity,
        // Ends.
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_sigaltstack,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_tgkill,
    ];
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_epoll_wait, libc::SYS_poll]);
    let mut rules: Rules = calls.into_iter().map(|call| (call, vec![])).collect();
    rules.extend(refused());
    // Memory that is not executable.
    let no_exec = |rules: &mut Rules, call| -> Result<(), seccompiler::BackendError> {
        let exec = libc::PROT_EXEC as u64;
        let rule = masked(2, exec, 0)?;
        rules.insert(call, vec![rule]);
        Ok(())
    };
    no_exec(&mut rules, libc::SYS_mmap)?;
    no_exec(&mut rules, libc::SYS_mprotect)?;
    // A descriptor's metadata, not a path's; a descriptor's nonblocking flag and what is left to read, no other ioctl.
    let empty_path = libc::AT_EMPTY_PATH as u64;
    rules.insert(
        libc::SYS_newfstatat,
        vec![masked(3, empty_path, empty_path)?],
    );
    rules.insert(libc::SYS_statx, vec![masked(2, empty_path, empty_path)?]);
    rules.insert(
        libc::SYS_ioctl,
        vec![
            masked(1, u64::from(u32::MAX), u64::from(libc::FIONBIO as u32))?,
            masked(1, u64::from(u32::MAX), u64::from(libc::FIONREAD as u32))?,
        ],
    );
    // A Rust panic's abort and a name for a thread.
    let set_name = libc::PR_SET_NAME as u64;
    rules.insert(
        libc::SYS_prctl,
        vec![masked(0, u64::from(u32::MAX), set_name)?],
    );
    Ok(rules)
}

/// The call is matched if its argument, masked, has this value.
fn masked(index: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let op = SeccompCmpOp::MaskedEq(mask);
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)?;
    SeccompRule::new(vec![condition])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_compile() {
        compile(
            SeccompAction::KillProcess,
            SeccompAction::Allow,
            allowed().unwrap(),
        )
        .unwrap();
        compile(SeccompAction::Allow, SeccompAction::Errno(13), refused()).unwrap();
    }
}
