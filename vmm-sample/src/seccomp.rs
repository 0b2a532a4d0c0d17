//! What the threads that a guest drives may ask of the kernel: a guest that takes one over finds little.
//!
//! | thread | may |
//! |---|---|
//! | vCPU | run the guest (KVM_RUN is the only ioctl), signal other threads, write the serial line |
//! | vsock | what a shard may (`SYSTEM_CALLS`), and what its owner does: accept, say who we are, draw seeds |
//! | vsock, with sockets of the host's | the same, and connect to Unix sockets for what the guest dials |
//! | disk | seek, read, write and sync the file that it has |
//!
//! None may open a file, map code, start a process or make a thread, and none has a capability, whoever runs the VMM. What
//! a call does depends on its arguments: they are those of a port process (`adit_port::sandbox::by_argument`). The main thread, which hears the operator, and the one
//! that tells KVM where the ring lies have no filter. Another call ends the process with a line that names thread and call.

#![allow(unsafe_code)] // a signal handler reads what the kernel says of the call, and ends the process

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
    /// Has the vsock device, and aditd or nobody on the host's side.
    Vsock,
    /// Has the disk.
    Disk,
    /// Has the vsock device, and connects to sockets of the host.
    Hybrid,
}

/// `_IO(0xae, 0x80)`.
const KVM_RUN: u32 = 0xae80;
/// Family and type of the sockets that are made: nonblocking, so that no listener holds the thread up.
const UNIX_STREAM: [(u8, u32); 2] = [
    (0, libc::AF_UNIX as u32),
    (
        1,
        (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u32,
    ),
];
/// What every thread does: allocate, wait, hear a signal, say a line, end.
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
    // A thread's name, for the report.
    libc::SYS_prctl,
];
const VSOCK: &[libc::c_long] = &[
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_socketpair,
    libc::SYS_getsockopt,
    // Sockets are made nonblocking.
    libc::SYS_ioctl,
    libc::SYS_getpid,
    // Seeds of hash maps.
    libc::SYS_getrandom,
    // The lock of a place that is let go.
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

/// The filters, made before any thread is.
#[derive(Clone, Debug, Default)]
pub struct Filters(Option<[BpfProgram; 4]>);

impl Filters {
    /// # Errors
    /// They cannot be made.
    pub fn on() -> anyhow::Result<Self> {
        register_signal_handler(libc::SIGSYS, forbidden)?;
        let threads = [Thread::Vcpu, Thread::Vsock, Thread::Disk, Thread::Hybrid];
        let [vcpu, vsock, disk, hybrid] = threads.map(program);
        Ok(Self(Some([vcpu?, vsock?, disk?, hybrid?])))
    }

    /// Confines the calling thread for the rest of its life: its calls, and without any capability.
    ///
    /// # Errors
    /// The kernel takes no filter.
    pub fn apply(&self, thread: Thread) -> anyhow::Result<()> {
        let Some(filters) = &self.0 else {
            return Ok(());
        };
        privilege::drop_capabilities().context("cannot drop capabilities")?;
        seccompiler::apply_filter(&filters[thread as usize])
            .context("this kernel takes no seccomp filter: --no-seccomp runs without")
    }
}

/// Ends the process and says why. Only what may be called from a signal handler.
extern "C" fn forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Of `si_syscall` in a siginfo of SIGSYS (include/uapi/asm-generic/siginfo.h).
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
    // SAFETY: PR_GET_NAME writes at most 16 bytes, which `name` has, and is on the list.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    for (to, from) in line[67..]
        .iter_mut()
        .zip(name.into_iter().take_while(|&b| b != 0))
    {
        *to = from;
    }
    // SAFETY: a plain write of bytes that live on this stack; then the end, without running anything of the process's.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
        libc::_exit(1);
    }
}
