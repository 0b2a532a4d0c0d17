//! Starts port processes from a thread that shares no descriptor with the rest of aditd.
//!
//! A new process begins with a copy of the descriptor table of the thread that started it, and its `exec` closes the copies.
//! aditd holds descriptors that VMs passed. One of them may be a file of a silent file system (FUSE): closing a copy of it
//! takes forever, and the thread that started the process waits for its `exec`. One VM could so keep the port process of
//! another from starting (R105, [`adit_passed`]).
//!
//! So a thread is made before aditd opens or receives anything. It leaves the shared table (`unshare(CLONE_FILES)`), and closes
//! everything but standard output, standard error and one end of a socket pair. What a new process needs, its log and its
//! standard input, is passed on that socket.
//!
//! ```text
//! supervisor ── Command by channel, descriptors by SCM_RIGHTS ──► thread `spawner` ── fork, exec ──► adit-port
//!            ◄── the child, by channel ─────────────────────────┘
//! ```
#![allow(unsafe_code)] // close_range on the thread's own table; its signals in a child; a descriptor that tokio watches

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use adit_passed::{Closer, Passed, receive};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::SigSet;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
};
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What starts port processes.
#[derive(Debug)]
pub struct Spawner {
    binary: PathBuf,
    /// Locked while both are sent: the descriptors of the first request are the first in the socket. One waits at most for
    /// each VM.
    to: Mutex<To>,
}

#[derive(Debug)]
struct To {
    requests: Sender<Request>,
    descriptors: OwnedFd,
}

#[derive(Debug)]
struct Request {
    command: Command,
    has_stdin: bool,
    answer: SyncSender<io::Result<Child>>,
}

impl Spawner {
    /// Makes the thread, which starts `binary`. To be called before this process receives descriptors of others.
    ///
    /// # Errors
    /// There is no thread or no socket to be had, or the kernel does not let the thread have a table of its own.
    pub fn start(binary: PathBuf) -> io::Result<Arc<Self>> {
        let (descriptors, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let theirs = Arc::new(theirs);
        let (requests, inbox) = channel();
        let (tell, told) = sync_channel(1);
        let of_thread = theirs.clone();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                // The handler of a signal writes to a descriptor of the shared table: here it would write to nothing, or to
                // something else, and the signal would be lost.
                let signals = block_signals();
                let alone = leave_the_shared_table(&of_thread);
                // The last reference is the caller's, and closes the socket's number in the shared table.
                drop(of_thread);
                let is_alone = alone.is_ok();
                if tell.send(alone).is_ok() && is_alone {
                    serve(&inbox, signals);
                }
            })?;
        told.recv().map_err(io::Error::other)??;
        drop(theirs);
        let to = Mutex::new(To {
            requests,
            descriptors,
        });
        Ok(Arc::new(Self { binary, to }))
    }

    /// The program that it starts.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// A command of the program, without arguments.
    pub fn command(&self) -> Command {
        Command::new(&self.binary)
    }

    /// Starts a command. Its standard input is `stdin`, or empty; its standard output is empty. Its descriptors are these three
    /// and no other.
    ///
    /// # Errors
    /// As the system says.
    pub async fn spawn(
        self: &Arc<Self>,
        command: Command,
        stdin: Option<OwnedFd>,
        stderr: OwnedFd,
    ) -> io::Result<Child> {
        let this = self.clone();
        // The thread cannot wake a runtime: that takes a descriptor of the shared table. It can wake a thread.
        tokio::task::spawn_blocking(move || this.ask(command, stdin, stderr))
            .await
            .map_err(io::Error::other)?
    }

    /// The same for a thread that can wait.
    fn ask(&self, command: Command, stdin: Option<OwnedFd>, stderr: OwnedFd) -> io::Result<Child> {
        let gone = || io::Error::other("the thread that starts port processes has ended");
        let (answer, answered) = sync_channel(1);
        let request = Request {
            command,
            has_stdin: stdin.is_some(),
            answer,
        };
        let fds: Vec<_> = std::iter::once(&stderr).chain(&stdin).collect();
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        let at = to.descriptors.as_raw_fd();
        sendmsg::<UnixAddr>(
            at,
            &[IoSlice::new(&[0])],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        to.requests.send(request).map_err(|_| gone())?;
        drop(to);
        answered.recv().map_err(|_| gone())?
    }
}

/// Blocks all signals of the calling thread. Returns what was blocked before, for the processes that it starts.
fn block_signals() -> SigSet {
    let before = SigSet::thread_get_mask().unwrap_or_else(|_| SigSet::empty());
    // It fails for no set that there is.
    let _ = SigSet::all().thread_block();
    before
}

/// Gives the calling thread a table of its own with standard output, standard error, and `socket` as standard input.
fn leave_the_shared_table(socket: &OwnedFd) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FILES)?;
    nix::unistd::dup2_stdin(socket.as_fd())?;
    // SAFETY: the table is this thread's alone now, and nothing that this thread uses owns a number of 3 or more in it: the
    // numbers that other threads own are those of the table that they share.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            0 as libc::c_uint,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The thread: starts what is asked for until nobody can ask any more.
fn serve(inbox: &Receiver<Request>, signals: SigSet) {
    let socket = io::stdin();
    let closer = Closer::shared();
    let next = || loop {
        match receive(&socket, &mut [0], RecvFlags::empty(), &closer) {
            // Left where it is, it would be taken for the next request's.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            received => return received,
        }
    };
    while let Ok(request) = inbox.recv() {
        let fds: Vec<OwnedFd> = match next() {
            // All of them: the closer's thread has another table, in which their numbers are other descriptors'.
            Ok(received) => received.fds.into_iter().filter_map(Passed::trust).collect(),
            Err(e) => {
                // Nobody waits for an answer any more where this fails.
                let _ = request.answer.send(Err(e));
                continue;
            }
        };
        let mut fds = fds.into_iter();
        let (stderr, stdin) = (fds.next(), fds.next());
        let started = match (stderr, stdin, request.has_stdin) {
            (Some(stderr), stdin, has) if stdin.is_some() == has => {
                let mut command = request.command;
                let restore = move || Ok(signals.thread_set_mask()?);
                // SAFETY: it makes one system call, allocates nothing and takes no lock.
                unsafe { command.pre_exec(restore) };
                command
                    .stdin(stdin.map_or_else(Stdio::null, Stdio::from))
                    .stdout(Stdio::null())
                    .stderr(stderr)
                    .spawn()
            }
            _ => Err(io::Error::other("no descriptor left for a port process")),
        };
        let _ = request.answer.send(started);
    }
}

/// Waits for a child that `fd`, a pidfd, is of, and reaps it.
///
/// # Errors
/// It cannot be watched, or was waited for by somebody else.
pub async fn reap(mut child: Child, fd: OwnedFd) -> io::Result<ExitStatus> {
    ended(fd).await?;
    child.wait()
}

/// Waits until the process that `fd`, a pidfd, is of has ended.
///
/// # Errors
/// It cannot be watched.
pub async fn ended(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: an owned descriptor stays open, and the same, for as long as it is registered.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
    let _ended = fd.readable().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    }

    /// What a script writes to its standard error.
    fn output_of(spawner: &Arc<Spawner>, script: &str, stdin: Option<OwnedFd>) -> String {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = spawner.command();
        command.args(["-c", script]);
        let stderr = log.reopen().unwrap().into();
        runtime().block_on(async {
            let child = spawner.spawn(command, stdin, stderr).await.unwrap();
            let pid = rustix::process::Pid::from_child(&child);
            let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
            assert!(reap(child, fd.unwrap()).await.unwrap().success());
        });
        std::fs::read_to_string(log.path()).unwrap()
    }

    #[test]
    fn a_child_has_three_descriptors_whatever_this_process_has_open() {
        let before = std::fs::File::open("/dev/null").unwrap();
        let spawner = Spawner::start("/bin/sh".into()).unwrap();
        let after = std::fs::File::open("/dev/null").unwrap();
        for open in [&before, &after] {
            // Even what is not close-on-exec.
            let none = nix::fcntl::FdFlag::empty();
            nix::fcntl::fcntl(open, nix::fcntl::FcntlArg::F_SETFD(none)).unwrap();
            assert!(open.as_raw_fd() > 2);
        }
        let [before, after] = [before.as_raw_fd(), after.as_raw_fd()];
        let script = format!(
            "cd /proc/$$/fd; for n in 0 1 2 {before} {after}; do test -e $n && echo $n >&2; done; true"
        );
        assert_eq!(output_of(&spawner, &script, None), "0\n1\n2\n");
    }

    #[test]
    fn no_signal_is_lost_at_the_thread_and_a_child_gets_all() {
        let spawner = Spawner::start("/bin/sh".into()).unwrap();
        let blocked = |status: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix("SigBlk:"));
            u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
        };
        let is_blocked = |thread: std::path::PathBuf| {
            // One of another test may have ended, or begun just now.
            let name = std::fs::read_to_string(thread.join("comm")).unwrap_or_default();
            let status = std::fs::read_to_string(thread.join("status"));
            let all = 1 << (libc::SIGHUP - 1) | 1 << (libc::SIGTERM - 1) | 1 << (libc::SIGCHLD - 1);
            name != "spawner\n" || status.is_ok_and(|s| blocked(&s) & all == all)
        };
        let threads = || std::fs::read_dir("/proc/self/task").unwrap();
        let begin = std::time::Instant::now();
        while !threads().all(|thread| is_blocked(thread.unwrap().path())) {
            assert!(begin.elapsed() < std::time::Duration::from_secs(20));
            std::thread::yield_now();
        }
        // Without a fork of its own, during which a shell may block signals.
        let status = output_of(&spawner, "exec cat /proc/self/status >&2", None);
        assert_eq!(blocked(&status), 0);
    }

    #[test]
    fn each_child_reads_its_own_standard_input() {
        let spawner = Spawner::start("/bin/sh".into()).unwrap();
        for said in ["one", "two"] {
            let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.write_all(said.as_bytes()).unwrap();
            drop(ours);
            assert_eq!(output_of(&spawner, "cat >&2", Some(theirs.into())), said);
        }
        assert_eq!(
            output_of(&spawner, "cat >&2; echo none >&2", None),
            "none\n"
        );
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_and_the_next_one_starts() {
        let missing = Spawner::start("/nowhere/adit-port".into()).unwrap();
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let command = missing.command();
        let failed = runtime().block_on(missing.spawn(command, None, null()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound);
        let mut command = Command::new("/bin/true");
        command.env_clear();
        let started = runtime().block_on(missing.spawn(command, None, null()));
        assert!(started.unwrap().wait().unwrap().success());
    }
}
