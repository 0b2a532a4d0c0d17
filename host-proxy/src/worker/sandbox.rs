//! What the worker gives up before it hears anybody: root, every file but the database and blobs, and every system call that it does not
//! need.
//!
//! 1. [`enter`], while there is one thread: the root directory becomes that of the database, the user the worker's own, all
//!    capabilities go. Landlock, where the kernel has it: files may be read, written, made and removed there and nowhere
//!    else, no TCP connection is made, no signal is sent to others.
//! 2. [`lock_calls`], before there is a second thread: seccomp. A call that is not on the list ends the process, as do another
//!    process's memory, a new program and a new process. Sockets are those that were passed to it; that of a
//!    listener for DNS can send datagrams to any address (by `sendmsg`, for `sendto` takes no address here).
//!
//! A client or guest that takes the worker over still has: the database, what passes through, the control sockets of port
//! processes, and what the monitor does for everybody who asks in form.

use std::os::fd::AsFd;

use adit_port::privilege::{self, PrivilegeError};
use adit_port::sandbox::{self, Rules, SandboxError, exactly, masked_is};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::sys::resource::Resource;
use rustix::process::{chroot, fchdir};

use crate::proxy::cut_off;

/// Why the worker is not confined. It must end.
#[derive(Debug, thiserror::Error)]
pub enum NotConfined {
    /// The kernel refuses the new root directory.
    #[error("cannot make the directory of the database the root directory")]
    Root(#[source] std::io::Error),
    /// It still has a privilege.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// It still has files or system calls.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The directory cannot be named to landlock.
    #[error("cannot open the directory of the database")]
    Path(#[from] landlock::PathFdError),
}

/// Makes `dir` the root directory, becomes this user and group, and gives up all other files. Returns false if the kernel has no
/// landlock.
///
/// # Errors
/// The kernel refuses.
pub fn enter(dir: impl AsFd, uid: u32, gid: u32) -> Result<bool, NotConfined> {
    let root = || {
        fchdir(&dir)?;
        chroot(c".")
    };
    root().map_err(|e| NotConfined::Root(e.into()))?;
    // A core dump would contain what clients sent.
    let core = privilege::limit(Resource::RLIMIT_CORE, 0);
    core.map_err(NotConfined::Root)?;
    privilege::become_user(Some((uid, gid)))?;
    lock_files()
}

fn lock_files() -> Result<bool, NotConfined> {
    let own = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::ReadDir
        | AccessFs::MakeReg
        | AccessFs::RemoveFile;
    let rules = || {
        let dir = PathFd::new("/")?;
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V5))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(ABI::V5)))
            .and_then(|rules| rules.scope(Scope::from_all(ABI::V6)))
            .and_then(|rules| rules.create())
            .and_then(|rules| rules.add_rule(PathBeneath::new(dir, own)))
            .and_then(|rules| rules.restrict_self());
        Ok::<_, NotConfined>(ruleset.map_err(SandboxError::from)?)
    };
    Ok(rules()?.ruleset != RulesetStatus::NotEnforced)
}

/// Gives up all system calls except those of the worker.
///
/// # Errors
/// The kernel has no seccomp.
pub fn lock_calls() -> Result<(), NotConfined> {
    // A thread is made by `clone`, whose flags can be looked at. Libraries try `clone3` first.
    let refused = [(libc::SYS_clone3, vec![])].into_iter().collect();
    let allowed = allowed().map_err(SandboxError::from)?;
    Ok(sandbox::lock_to(allowed, refused, libc::ENOSYS)?)
}

fn allowed() -> Result<Rules, seccompiler::BackendError> {
    let mut calls = vec![
        // Read and write.
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_pread64,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_pwrite64,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        // Wait.
        libc::SYS_epoll_create1,
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
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        libc::SYS_getsockopt,
        libc::SYS_eventfd2,
        // Files: those of the database, and blobs.
        libc::SYS_openat,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_statfs,
        libc::SYS_fstatfs,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_readlinkat,
        libc::SYS_unlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_getdents64,
        libc::SYS_utimensat,
        libc::SYS_getcwd,
        libc::SYS_lseek,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_fchmod,
        // Threads.
        libc::SYS_membarrier,
        libc::SYS_clone3,
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sched_getaffinity,
        // Who it is.
        libc::SYS_getuid,
        libc::SYS_geteuid,
    ];
    calls.extend(sandbox::ALWAYS);
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        libc::SYS_epoll_wait,
        libc::SYS_poll,
        libc::SYS_open,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_access,
        libc::SYS_readlink,
        libc::SYS_unlink,
        libc::SYS_rename,
    ]);
    let mut rules: Rules = sandbox::by_argument()?;
    // Of those, the worker makes no memory for rings.
    for unused in [libc::SYS_memfd_create, libc::SYS_flock] {
        rules.remove(&unused);
    }
    rules.extend(calls.into_iter().map(|call| (call, vec![])));
    let more = [
        (
            libc::SYS_clone,
            vec![masked_is(
                0,
                libc::CLONE_THREAD as u32,
                libc::CLONE_THREAD as u32,
            )?],
        ),
        // The limits of this process are read, and no others are set.
        (libc::SYS_prlimit64, vec![exactly(&[(0, 0), (2, 0)])?]),
    ];
    rules.extend(more);
    let more_of = [
        // SQLite locks its files against an operator's `sqlite3`.
        (libc::SYS_fcntl, exactly(&[(1, libc::F_SETLK as u32)])?),
        (libc::SYS_fcntl, exactly(&[(1, libc::F_GETLK as u32)])?),
        (
            libc::SYS_setsockopt,
            exactly(&[(1, libc::SOL_SOCKET as u32), (2, libc::SO_KEEPALIVE as u32)])?,
        ),
        (
            libc::SYS_setsockopt,
            exactly(&[(1, libc::IPPROTO_TCP as u32)])?,
        ),
    ];
    // A client's connection is cut off by an address of no family, which is all that has room here. There is no call that makes a
    // socket, and none of those that were passed can connect.
    let cut_off = exactly(&[(2, cut_off::ADDRESS_LEN)])?;
    rules.entry(libc::SYS_connect).or_default().push(cut_off);
    // In which a port process finds what its predecessor left.
    let packets = exactly(&[
        (0, libc::AF_UNIX as u32),
        (1, (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u32),
        (2, 0),
    ])?;
    rules.entry(libc::SYS_socketpair).or_default().push(packets);
    for (call, rule) in more_of {
        rules.entry(call).or_default().push(rule);
    }
    Ok(rules)
}
