//! The system calls of the threads that a guest drives: a guest that takes over one of them must not gain much.
//!
//! | thread | may |
//! |---|---|
//! | vCPU | run the guest (KVM_RUN is the only ioctl), signal other threads, write the serial line |
//! | vsock | what a shard may (`SYSTEM_CALLS`), and what its owner needs: accept, send our pid, draw seeds |
//! | vsock, with Unix sockets on the host | the same, and connect to Unix sockets for the guest's dials |
//! | disk | seek, read, write and sync its file |
//!
//! None may open a file, map code, or create a process or a thread. None has a capability, whoever runs the VMM. Where a call's
//! effect depends on its arguments, the filter checks them as a port process's does (`adit_port::sandbox::by_argument`). Two
//! threads have no filter: the main thread, which serves the operator, and the one that tells KVM where the ring is. A call
//! that is not allowed ends the process, with a line that names thread and call.

#![allow(unsafe_code)] // a signal handler reads which call was forbidden, and ends the process

use std::collections::BTreeMap;

use adit_channel::shard::SYSTEM_CALLS;
use adit_port::privilege;
use adit_port::sandbox::{by_argument, exactly};
use anyhow::Context;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use vmm_sys_util::signal::register_signal_handler;

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs the guest.
    Vcpu,
    /// Runs the vsock device. On the host's side is aditd or nobody.
    Vsock,
    /// Runs the disk.
    Disk,
    /// Runs the vsock device, and connects to Unix sockets on the host.
    Hybrid,
}

/// `_IO(0xae, 0x80)`.
const KVM_RUN: u32 = 0xae80;
/// Family and type of the sockets that it makes. They are nonblocking, so that no listener can block the thread.
const UNIX_STREAM: [(u8, u32); 2] = [
    (0, libc::AF_UNIX as u32),
    (
        1,
        (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u32,
    ),
];
/// Needed by every thread: allocate, wait, handle a signal, print a line, end.
const COMMON: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // To read the thread's name for the report of a forbidden call.
    libc::SYS_prctl,
];
const VSOCK: &[libc::c_long] = &[
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_socketpair,
    libc::SYS_getsockopt,
    // Makes sockets nonblocking.
    libc::SYS_ioctl,
    libc::SYS_getpid,
    // Seeds of hash maps.
    libc::SYS_getrandom,
    // Unlocks a port process's directory.
    libc::SYS_flock,
];
const DISK: &[libc::c_long] = &[
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
];

fn program(thread: Thread) -> anyhow::Result<BpfProgram> {
    let calls: &[&[libc::c_long]] = match thread {
        Thread::Vcpu => &[COMMON],
        Thread::Vsock => &[COMMON, SYSTEM_CALLS, VSOCK],
        Thread::Disk => &[COMMON, DISK],
        Thread::Hybrid => &[COMMON, SYSTEM_CALLS, VSOCK, &[libc::SYS_connect]],
    };
    let calls = calls.iter().copied().flatten();
    let mut rules: BTreeMap<_, _> = calls.map(|&call| (call, vec![])).collect();
    for (call, ways) in by_argument()? {
        rules.entry(call).and_modify(|any| *any = ways);
    }
    match thread {
        Thread::Vcpu => drop(rules.insert(libc::SYS_ioctl, vec![exactly(&[(1, KVM_RUN)])?])),
        Thread::Hybrid => drop(rules.insert(libc::SYS_socket, vec![exactly(&UNIX_STREAM)?])),
        Thread::Vsock | Thread::Disk => {}
    }
    let (otherwise, listed) = (SeccompAction::Trap, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// The compiled filters. They are made before any thread exists.
#[derive(Clone, Debug, Default)]
pub struct Filters(Option<[BpfProgram; 4]>);

impl Filters {
    /// # Errors
    /// A filter cannot be compiled.
    pub fn on() -> anyhow::Result<Self> {
        register_signal_handler(libc::SIGSYS, forbidden)?;
        let threads = [Thread::Vcpu, Thread::Vsock, Thread::Disk, Thread::Hybrid];
        let [vcpu, vsock, disk, hybrid] = threads.map(program);
        Ok(Self(Some([vcpu?, vsock?, disk?, hybrid?])))
    }

    /// Confines the calling thread for the rest of its life: filters its calls, and drops its capabilities.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn apply(&self, thread: Thread) -> anyhow::Result<()> {
        let Some(filters) = &self.0 else {
            return Ok(());
        };
        privilege::drop_capabilities().context("cannot drop capabilities")?;
        seccompiler::apply_filter(&filters[thread as usize])
            .context("this kernel does not accept a seccomp filter: run with --no-seccomp")
    }
}

/// Prints which call was forbidden, and ends the process. Makes only calls that are allowed in a signal handler.
extern "C" fn forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Offset of `si_syscall` in a siginfo of SIGSYS (include/uapi/asm-generic/siginfo.h).
    const SYSCALL_OFFSET: usize = 24;
    // SAFETY: the kernel passes a whole siginfo_t (128 bytes) to a handler that was installed with SA_SIGINFO.
    let call = unsafe { info.cast::<u8>().add(SYSCALL_OFFSET).cast::<i32>().read() };
    let mut name = [0; 16];
    let mut line =
        *b"adit-vmm: a thread made a system call that it may not make: 000 by                 \n";
    let digits = 60;
    for (place, power) in [100, 10, 1].into_iter().enumerate() {
        line[digits + place] = b'0' + (call / power % 10) as u8;
    }
    // SAFETY: PR_GET_NAME writes at most 16 bytes, and `name` has 16. The filter allows prctl.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    for (to, from) in line[67..]
        .iter_mut()
        .zip(name.into_iter().take_while(|&b| b != 0))
    {
        *to = from;
    }
    // SAFETY: writes bytes of this stack; then ends the process without running any of its code.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
        libc::_exit(1);
    }
}
