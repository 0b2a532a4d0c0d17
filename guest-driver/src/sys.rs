//! The few system calls that nix and std do not wrap safely: accept4 with an owned descriptor, pidfds, and what a child
//! does between fork and exec.
//!
//! `unsafe` is allowed here because a raw descriptor becomes owned exactly where the kernel returns it, and because code
//! between fork and exec has rules that the type system does not know.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::setrlimit;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Pid, Uid};

use crate::protect::Inherited;

/// Opens a descriptor for this process, and no later one with the same number.
pub fn pidfd_open(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes a pid and flags by value and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the call succeeded, so `fd` is a fresh descriptor (close-on-exec by definition) that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends a signal to the process of a pidfd.
pub fn pidfd_kill(pidfd: BorrowedFd<'_>, signal: Signal) -> nix::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is live for the call; a null siginfo is allowed and means "as kill does".
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as i32,
            no_info,
            0,
        )
    };
    Errno::result(done).map(drop)
}

/// What a child gets before its program starts. All of it is prepared before the fork.
pub struct ChildSetup {
    /// `cgroup.procs` of the task's cgroup, open for writing.
    pub cgroup: Option<OwnedFd>,
    /// Groups, gid and uid to become; none = stay who we are.
    pub user: Option<(Vec<Gid>, Gid, Uid)>,
    /// Working directory, entered as that user.
    pub cwd: CString,
    /// What the agent has changed for itself since its start, and the child gets back.
    pub inherited: Inherited,
    /// Its standard input is a terminal, which is to be its own.
    pub tty: bool,
    /// It is killed when the thread that starts it ends, which is one of this process.
    pub dies_with: Option<Pid>,
}

/// Starts a program in its own session with default signals, umask 022, no inherited descriptors and the given user.
///
/// # Errors
/// Any step before or at exec; nothing runs then.
pub fn spawn(command: &mut Command, setup: ChildSetup) -> io::Result<Child> {
    // SAFETY: between fork and exec the closure makes only async-signal-safe system calls: it neither allocates (paths
    // are C strings, groups a ready vector) nor takes a lock.
    unsafe { command.pre_exec(move || enter(&setup)) }.spawn()
}

/// What a child is called until it is its program.
pub const STARTING: &std::ffi::CStr = c"adit-start";

fn enter(setup: &ChildSetup) -> io::Result<()> {
    nix::sys::prctl::set_name(STARTING)?;
    nix::unistd::setsid()?;
    if let Some(procs) = &setup.cgroup {
        nix::unistd::write(procs, b"0")?;
    }
    restore(&setup.inherited)?;
    close_inherited();
    default_signals();
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    if let Some((groups, gid, uid)) = &setup.user {
        nix::unistd::setgroups(groups)?;
        nix::unistd::setgid(*gid)?;
        nix::unistd::setuid(*uid)?;
    }
    nix::unistd::chdir(setup.cwd.as_c_str())?;
    if setup.tty {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    }
    if let Some(parent) = setup.dies_with {
        // Behind the change of the user, which would undo it.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if nix::unistd::getppid() != parent {
            // It has ended already, and of that nobody is told.
            return Err(Errno::ESRCH.into());
        }
    }
    Ok(())
}

/// This process had one thread, and starts none as long as this is used: a child of it may do whatever this process may.
#[derive(Debug)]
pub struct Alone(());

impl Alone {
    /// Looks.
    ///
    /// # Errors
    /// There are other threads.
    pub fn now() -> io::Result<Self> {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => Ok(Self(())),
            n => Err(io::Error::other(format!("{n} threads are there"))),
        }
    }
}

/// Makes a copy of this process. None: this is the copy.
///
/// # Errors
/// There is no room for one.
pub fn fork(_: &Alone) -> io::Result<Option<i32>> {
    // SAFETY: no other thread can have held a lock that the copy needs.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Some(child.as_raw())),
        nix::unistd::ForkResult::Child => Ok(None),
    }
}

/// As [`spawn`], for a child that begins in the cgroup with this directory: one that is moved there waits for a grace period of the kernel.
/// Returns its pid. Kernels before 5.7, and filters that do not know the call, have it moved by `setup`.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_in(
    command: &mut Command,
    mut setup: ChildSetup,
    cgroup: BorrowedFd<'_>,
    _: &Alone,
) -> io::Result<i32> {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    /// `struct clone_args` of the kernel.
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    let args = CloneArgs {
        flags: CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    let (mut failed, tell) = io::pipe()?;
    // SAFETY: without CLONE_VM the child has a copy of all memory, and goes on here, as after a fork; no other thread can have held a lock
    // that it needs. The kernel reads `args` for the call only.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<CloneArgs>()) };
    match pid {
        0 => {
            drop(failed);
            // It is there already.
            setup.cgroup = None;
            // SAFETY: as in `spawn`, and this child may allocate, too.
            let e = unsafe { command.pre_exec(move || enter(&setup)) }.exec();
            let number = e.raw_os_error().unwrap_or(libc::EINVAL);
            let _ = nix::unistd::write(&tell, &number.to_le_bytes());
            // SAFETY: nothing of the parent's is to be run or flushed.
            unsafe { libc::_exit(127) }
        }
        -1 => Ok(spawn(command, setup)?.id().cast_signed()),
        pid => {
            drop(tell);
            let mut number = [0; 4];
            let pid = pid as i32;
            match io::Read::read_exact(&mut failed, &mut number) {
                // It has become its program.
                Err(_) => Ok(pid),
                Ok(()) => {
                    let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
                    Err(io::Error::from_raw_os_error(i32::from_le_bytes(number)))
                }
            }
        }
    }
}

/// Has the kernel's generator of random numbers begin anew with what is in its pool.
///
/// # Errors
/// This process may not; or there is not enough in the pool yet.
pub fn reseed(random: &std::fs::File) -> io::Result<()> {
    /// `RNDRESEEDCRNG` of linux/random.h, Linux 4.14.
    const RESEED: libc::c_int = 0x5207;
    // SAFETY: the descriptor is live for the call, which takes no argument.
    let done = unsafe { libc::ioctl(random.as_raw_fd(), RESEED as _) };
    Ok(Errno::result(done).map(drop)?)
}

/// Has a file system take no more writes: whoever writes waits.
///
/// # Errors
/// It cannot, or somebody has done so already.
pub fn freeze(root: &std::fs::File) -> io::Result<()> {
    /// `FIFREEZE` of linux/fs.h.
    const FREEZE: libc::c_ulong = 0xc004_5877;
    still(root, FREEZE)
}

/// Has it take writes again.
///
/// # Errors
/// It takes them.
pub fn thaw(root: &std::fs::File) -> io::Result<()> {
    /// `FITHAW` of linux/fs.h.
    const THAW: libc::c_ulong = 0xc004_5878;
    still(root, THAW)
}

fn still(root: &std::fs::File, what: libc::c_ulong) -> io::Result<()> {
    let unused: libc::c_int = 0;
    // SAFETY: the descriptor is live for the call. The kernel takes no argument of these two, whatever their numbers say.
    let done = unsafe { libc::ioctl(root.as_raw_fd(), what as _, &unused) };
    Ok(Errno::result(done).map(drop)?)
}

/// Has a signal do nothing.
pub fn ignore_signal(signal: Signal) {
    // SAFETY: SIG_IGN installs no code of ours.
    unsafe { libc::signal(signal as libc::c_int, libc::SIG_IGN) };
}

/// Undoes in the child what the agent has set for itself: still as root, since the child's user may not be allowed to. If
/// that fails, the child does not start.
fn restore(inherited: &Inherited) -> io::Result<()> {
    if let Some(score) = &inherited.oom_score {
        let file = c"/proc/self/oom_score_adj";
        let file = nix::fcntl::open(file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        nix::unistd::write(&file, score.as_bytes())?;
    }
    // Last: the agent's descriptors are still open, and there may be more of them than the child's limit.
    for &(which, soft, hard) in &inherited.limits {
        setrlimit(which, soft, hard)?;
    }
    Ok(())
}

/// Marks every descriptor above 2 close-on-exec: the agent may have inherited some.
fn close_inherited() {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: close_range with CLOEXEC closes nothing now and touches no memory.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    };
    if done == 0 {
        return;
    }
    // Before Linux 5.11. Descriptors above 1024 were opened by us, and have the flag already.
    for fd in 3..1024 {
        // SAFETY: F_SETFD on a number that is no descriptor fails with EBADF and does nothing.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Gives a signal its default effect.
pub fn default_signal(signal: Signal) {
    // SAFETY: SIG_DFL installs no code of ours.
    unsafe { libc::signal(signal as libc::c_int, libc::SIG_DFL) };
}

/// Signals that a shell or nohup set to be ignored get their defaults; std resets only the mask and SIGPIPE.
fn default_signals() {
    for signal in 1..=31 {
        // SAFETY: SIG_DFL installs no code of ours; KILL and STOP fail with EINVAL and stay as they are.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}
