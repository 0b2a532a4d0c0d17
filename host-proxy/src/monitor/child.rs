//! The worker as the monitor sees it: a process that it starts, or finds, and ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use adit_channel::socket_path;
use adit_passed::{Closer, Passed};
use adit_port::control_io;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, getsockopt, socket, socketpair,
    sockopt::PeerCredentials,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::packets::Packets;
use super::wire::{Message, Stop, Welcome};
use crate::spawn::{self, Spawner};

/// Where a monitor finds the worker of one before it: in the run directory.
const SOCKET: &str = "work.sock";
/// Descriptors from a worker that may wait to be closed.
const CLOSING_MAX: usize = 16;
/// How long a worker that was told to end may take: requests that are under way get two seconds.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A living worker.
#[derive(Debug)]
pub struct Worker {
    /// Its process id.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// The connection to it.
    pub packets: Arc<Packets>,
    /// A monitor before this one started it.
    pub is_found: bool,
    pidfd: OwnedFd,
    child: Option<Child>,
}

/// Binds the socket at which later monitors find the worker, who listens there.
///
/// # Errors
/// The file system refuses.
pub fn rendezvous(run_dir: &Path) -> io::Result<OwnedFd> {
    let path = run_dir.join(SOCKET);
    socket_path::remove(&path).map_err(io::Error::other)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let raw = std::os::fd::AsRawFd::as_raw_fd(&socket);
    bind(raw, &UnixAddr::new(&path)?)?;
    Ok(socket)
}

/// Removes that socket.
pub fn clear(run_dir: &Path) {
    let _ = socket_path::remove(&run_dir.join(SOCKET));
}

impl Worker {
    /// Starts a worker, and tells it who it is; `fds` are those of [`Welcome`].
    ///
    /// # Errors
    /// No process can be had.
    pub async fn start(
        spawner: &Arc<Spawner>,
        welcome: Welcome,
        fds: &[BorrowedFd<'_>],
        log_json: bool,
    ) -> anyhow::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        // The same program, also where another one is at its path by now.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("aditd")
            .arg("worker")
            .args(log_json.then_some("--log-json"))
            .env_clear()
            .envs(std::env::var_os("RUST_LOG").map(|level| ("RUST_LOG", level)))
            // Ctrl-C is for the monitor, which ends it in order.
            .process_group(0);
        let stderr = io::stderr().as_fd().try_clone_to_owned()?;
        let child = spawner.spawn(command, Some(theirs), stderr).await?;
        let pid = child.id();
        let pidfd = pidfd(pid.cast_signed())?;
        let packets = Arc::new(Packets::new(ours, Closer::new(CLOSING_MAX))?);
        let worker = Self {
            pid,
            uid: welcome.uid,
            packets,
            is_found: false,
            pidfd,
            child: Some(child),
        };
        worker
            .packets
            .send(0, &Message::Welcome(welcome), fds)
            .await?;
        Ok(worker)
    }

    /// Finds the worker of an earlier monitor of this run directory. `None`: there is none.
    ///
    /// # Errors
    /// The system does not say which process it is.
    pub fn find(run_dir: &Path) -> io::Result<Option<Self>> {
        let path: PathBuf = run_dir.join(SOCKET);
        let Ok(socket) = control_io::connect(&path) else {
            return Ok(None);
        };
        let peer = getsockopt(&socket.as_fd(), PeerCredentials)?;
        let pidfd = match pidfd(peer.pid()) {
            Ok(pidfd) => pidfd,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        let packets = Arc::new(Packets::new(socket, Closer::new(CLOSING_MAX))?);
        Ok(Some(Self {
            pid: peer.pid().cast_unsigned(),
            uid: peer.uid(),
            packets,
            is_found: true,
            pidfd,
            child: None,
        }))
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// It cannot be watched.
    pub async fn ended(&self) -> io::Result<()> {
        spawn::ended(self.pidfd.try_clone()?).await
    }

    /// Ends it: in order if it does so in time, by force if not. Returns its status, if it is this process' child.
    pub async fn end(mut self) -> Option<ExitStatus> {
        let told = self.packets.send(0, &Message::Stop(Stop {}), &[]);
        let in_order = async { told.await.is_ok() && self.ended().await.is_ok() };
        let ended = tokio::time::timeout(END_LIMIT, in_order).await;
        if !ended.is_ok_and(|ended| ended) {
            self.kill();
            let _ = self.ended().await;
        }
        self.status()
    }

    /// Ends it by force.
    pub fn kill(&self) {
        // It may just have ended.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Its status, once it has ended, if it is this process' child.
    pub fn status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.wait().ok()
    }
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Takes passed descriptors as sockets of streams, or of UDP, that were passed by a worker. Others are closed apart.
pub fn sockets(fds: Vec<Passed>) -> Option<Vec<OwnedFd>> {
    let is_one = |fd: &Passed| {
        use rustix::net::{SocketType, ipproto, sockopt};
        match sockopt::socket_type(fd) {
            Ok(SocketType::STREAM) => true,
            Ok(SocketType::DGRAM) => sockopt::socket_protocol(fd) == Ok(Some(ipproto::UDP)),
            _ => false,
        }
    };
    let all = fds.iter().all(is_one);
    all.then(|| fds.into_iter().filter_map(Passed::trust).collect())
}
