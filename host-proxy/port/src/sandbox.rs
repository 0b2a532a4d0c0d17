//! Confines the process once its sockets are bound: no file system, no new connections, and only the system calls of its loop.
//!
//! 1. [`lock_files`], while there is one thread (landlock applies to the calling thread and its children): no file, no
//!    TCP, no abstract socket, no signal to others. Without landlock in the kernel, the process logs that and continues.
//! 2. [`lock_calls`], once all threads exist, for all of them: seccomp. Calls that open or query files return an error. Any
//!    other call that is not on the list ends the process. Listed calls are allowed only with the arguments that the loop uses:
//!    stream pairs but no datagrams, nothing sent to an address, no signal by a descriptor, none to another process.
//!
//! [`privilege`](crate::privilege) decides which user the process is. A guest that takes the process over still has: its own
//! memory, its tunnels, and two sockets.

use std::collections::BTreeMap;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};

/// Why there is no sandbox. The machine's fault; the process must end.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Landlock failed, other than by being absent.
    #[error("landlock failed")]
    Landlock(#[from] landlock::RulesetError),
    /// Seccomp failed.
    #[error("seccomp failed")]
    Seccomp(#[from] seccompiler::Error),
    /// The filter cannot be compiled.
    #[error("seccomp filter is malformed")]
    Filter(#[from] seccompiler::BackendError),
}

/// Gives up the file system and the network. Returns false if the kernel has no landlock.
///
/// # Errors
/// The kernel has landlock, and it fails.
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

/// Gives up all system calls except those of the loop, in every thread of the process.
///
/// # Errors
/// The kernel has no seccomp, or the architecture is not supported.
pub fn lock_calls() -> Result<(), SandboxError> {
    lock_to(allowed()?, refused(), libc::EACCES)
}

/// Gives up all system calls except those of `allowed`, in every thread of the process. Those of `refused`, which must be allowed,
/// too, return this error.
///
/// # Errors
/// The kernel has no seccomp, or the architecture is not supported.
pub fn lock_to(allowed: Rules, refused: Rules, errno: i32) -> Result<(), SandboxError> {
    // With two filters, the stricter verdict counts.
    let listed = compile(SeccompAction::KillProcess, SeccompAction::Allow, allowed)?;
    let errno = SeccompAction::Errno(errno as u32);
    let softly = compile(SeccompAction::Allow, errno, refused)?;
    // Each call installs its filter in all threads, and sets no_new_privs.
    apply_filter_all_threads(&softly)?;
    apply_filter_all_threads(&listed)?;
    Ok(())
}

/// System calls by number. Each has the allowed forms of its arguments; no forms: any arguments are allowed.
pub type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Memory of its own, who it is, and the end: calls of every process that is confined.
pub const ALWAYS: [i64; 13] = [
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
];

fn compile(
    mismatch: SeccompAction,
    matched: SeccompAction,
    rules: Rules,
) -> Result<BpfProgram, SandboxError> {
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, mismatch, matched, arch)?.try_into()?)
}

/// Calls that a library may try. They return `EACCES`.
fn refused() -> Rules {
    let mut calls = vec![libc::SYS_openat, libc::SYS_readlinkat, libc::SYS_faccessat];
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_open, libc::SYS_readlink, libc::SYS_access]);
    calls.into_iter().map(|call| (call, vec![])).collect()
}

fn allowed() -> Result<Rules, seccompiler::BackendError> {
    let mut calls = vec![
        // Read and write.
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_sendfile,
        libc::SYS_splice,
        // Wait.
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
        libc::SYS_shutdown,
        libc::SYS_close,
        libc::SYS_fstat,
        libc::SYS_fstatfs,
        libc::SYS_lseek,
        libc::SYS_eventfd2,
        // Memory for a ring: its file has no name.
        libc::SYS_ftruncate,
        libc::SYS_membarrier,
        // A starting thread needs these, and the frontend's thread may still be starting.
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sched_getaffinity,
    ];
    calls.extend(ALWAYS);
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_epoll_wait, libc::SYS_poll]);
    let mut rules: Rules = calls.into_iter().map(|call| (call, vec![])).collect();
    rules.extend(refused());
    rules.extend(by_argument()?);
    Ok(rules)
}

/// The calls of a thread that serves streams whose effect depends on their arguments; also for a VMM's filter. With other
/// arguments they would have effects beyond the descriptors that the thread has.
///
/// # Errors
/// The rules are malformed.
pub fn by_argument() -> Result<Rules, seccompiler::BackendError> {
    let socket = libc::SOL_SOCKET as u32;
    let new_flags = (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u32;
    let memfd_flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let empty_path = libc::AT_EMPTY_PATH as u32;
    let no_code = masked(2, libc::PROT_EXEC as u32, 0);
    // The two timeout options have two numbers each, and libraries try both.
    let options = [
        libc::SO_LINGER,
        libc::SO_RCVTIMEO,
        libc::SO_SNDTIMEO,
        66,
        67,
    ];
    // No owner, no signal, no lease, no lock, no notification about a directory.
    let commands = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_GET_SEALS,
        libc::F_ADD_SEALS,
    ];
    // Nonblocking mode, and how much can be read; no terminal.
    let requests = [libc::FIONBIO, libc::FIONREAD];
    [
        // Send only to the connected peer. Only datagrams carry an address in sendmsg, and the process cannot make any.
        (libc::SYS_sendto, vec![vec![no_pointer(4)]]),
        (
            libc::SYS_socketpair,
            vec![vec![
                equal(0, libc::AF_UNIX as u32),
                masked(1, !new_flags, libc::SOCK_STREAM as u32),
                equal(2, 0),
            ]],
        ),
        (libc::SYS_getsockopt, vec![vec![equal(1, socket)]]),
        (
            libc::SYS_setsockopt,
            each(options, |option| {
                vec![equal(1, socket), equal(2, option as u32)]
            }),
        ),
        (
            libc::SYS_fcntl,
            each(commands, |command| vec![equal(1, command as u32)]),
        ),
        (
            libc::SYS_ioctl,
            each(requests, |request| vec![equal(1, request as u32)]),
        ),
        // flock only to unlock; closing the file unlocks too.
        (libc::SYS_flock, vec![vec![equal(1, libc::LOCK_UN as u32)]]),
        // Memory that is not executable. For a ring it is mapped from a file without a name.
        (libc::SYS_mmap, vec![vec![no_code]]),
        (libc::SYS_mprotect, vec![vec![no_code]]),
        (
            libc::SYS_memfd_create,
            vec![vec![masked(1, !memfd_flags, 0)]],
        ),
        // A descriptor's metadata.
        (
            libc::SYS_newfstatat,
            vec![vec![masked(3, empty_path, empty_path)]],
        ),
        (
            libc::SYS_statx,
            vec![vec![masked(2, empty_path, empty_path)]],
        ),
        // prctl names a thread. A panic of Rust ends with a signal to the own process.
        (
            libc::SYS_prctl,
            each([libc::PR_SET_NAME, libc::PR_GET_NAME], |what| {
                vec![equal(0, what as u32)]
            }),
        ),
        (libc::SYS_tgkill, vec![vec![equal(0, std::process::id())]]),
    ]
    .into_iter()
    .map(|(call, ways)| {
        let rules = ways.into_iter().map(|arguments| {
            let conditions: Result<_, _> = arguments.into_iter().map(Argument::condition).collect();
            SeccompRule::new(conditions?)
        });
        Ok((call, rules.collect::<Result<_, _>>()?))
    })
    .collect()
}

/// Allows a call whose argument `number` has these of the masked bits.
///
/// # Errors
/// The rule is malformed.
pub fn masked_is(
    number: u8,
    mask: u32,
    value: u32,
) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![masked(number, mask, value).condition()?])
}

/// Allows a call with exactly these 32-bit arguments, given as pairs of number and value.
///
/// # Errors
/// The rule is malformed.
pub fn exactly(arguments: &[(u8, u32)]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions = arguments.iter().map(|&(n, is)| equal(n, is).condition());
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

/// What one argument must be: which bits are compared, and their value.
#[derive(Clone, Copy)]
struct Argument {
    number: u8,
    /// Compares 64 bits; otherwise 32, which is all of an `int`.
    wide: bool,
    mask: u64,
    value: u64,
}

impl Argument {
    fn condition(self) -> Result<SeccompCondition, seccompiler::BackendError> {
        let width = match self.wide {
            true => SeccompCmpArgLen::Qword,
            false => SeccompCmpArgLen::Dword,
        };
        let looks = SeccompCmpOp::MaskedEq(self.mask);
        SeccompCondition::new(self.number, width, looks, self.value)
    }
}

fn equal(number: u8, value: u32) -> Argument {
    masked(number, u32::MAX, value)
}

fn masked(number: u8, mask: u32, value: u32) -> Argument {
    Argument {
        number,
        wide: false,
        mask: mask.into(),
        value: value.into(),
    }
}

fn no_pointer(number: u8) -> Argument {
    Argument {
        number,
        wide: true,
        mask: u64::MAX,
        value: 0,
    }
}

fn each<T>(
    of: impl IntoIterator<Item = T>,
    way: impl Fn(T) -> Vec<Argument>,
) -> Vec<Vec<Argument>> {
    of.into_iter().map(way).collect()
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
