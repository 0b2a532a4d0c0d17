//! Guests that dial this host through its kernel (`vhost_vsock`): one AF_VSOCK listener on port 741 for all of them.
//!
//! ```text
//! guest 42 ── CID 42, port 742 ──► kernel ──► listener ── accept ─► VM with CID 42 ─► its port process ─► Incoming, as anywhere
//!                                             (monitor: root)  (worker)      └─ none, or reached by another carrier: closed, counted
//! ```
//! The kernel says which CID has dialled, and a VM cannot have another's. The guest's port is the guest's kernel's word.
//!
//! A VM that dials without end is cut to [`STREAMS_A_SECOND`]; what is beyond that is closed as soon as it is accepted, so that the queue of
//! the listener, which all have together, stays free. There is a listener only once there is a VM that needs one.

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_channel::hello;
use adit_names::VmId;
use adit_port::control::Accepted;
use nix::errno::Errno;
use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, getpeername, listen as listen_on,
    socket,
};
use rustix::net::SocketFlags;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::Notify;

use crate::access::rate::Buckets;
use crate::registry::Registry;
use crate::state::State;
use crate::vm::VmEntry;

/// Streams that one VM may dial in a second. Its agent needs one, and one more for each file.
pub const STREAMS_A_SECOND: u32 = 128;
/// Streams that wait to be accepted, of all VMs together.
const BACKLOG: i32 = 1024;
/// Streams that are accepted until others have a turn.
const A_TURN: u32 = 32;
/// After an error of `accept` that is the host's.
const PAUSE: Duration = Duration::from_millis(100);
/// How long to wait before the listener is asked for again.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Why no guest reaches this host through its kernel. The host's matter.
#[derive(Debug, thiserror::Error)]
pub enum NoListener {
    /// The kernel has none, or the unit forbids it.
    #[error(
        "what guests dial is not heard: this host has no AF_VSOCK (`modprobe vhost_vsock`), or aditd's unit forbids it \
         (`RestrictAddressFamilies`)"
    )]
    NoVsock,
    /// Another program has the port.
    #[error(
        "what guests dial is not heard: another program listens on vsock port {} of this host; adit-guest does so where this host is \
         itself a VM",
        hello::PORT
    )]
    Taken,
    /// Ports below 1024 are root's.
    #[error(
        "what guests dial is not heard: aditd needs CAP_NET_BIND_SERVICE for vsock port {}: start it as root",
        hello::PORT
    )]
    NotRoot,
    /// Something else.
    #[error(
        "what guests dial is not heard: the kernel does not let aditd listen on vsock port {}: {}",
        hello::PORT, .0.desc()
    )]
    Io(Errno),
}

impl From<Errno> for NoListener {
    fn from(e: Errno) -> Self {
        match e {
            Errno::EAFNOSUPPORT => Self::NoVsock,
            Errno::EADDRINUSE => Self::Taken,
            Errno::EACCES | Errno::EPERM => Self::NotRoot,
            e => Self::Io(e),
        }
    }
}

/// Makes the listener.
///
/// # Errors
/// It cannot be made, and what to do.
pub fn listen() -> Result<OwnedFd, NoListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    bind(
        listener.as_raw_fd(),
        &VsockAddr::new(VMADDR_CID_ANY, hello::PORT),
    )?;
    listen_on(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Whether there is a VM that needs the listener.
#[derive(Debug, Default)]
pub struct Guests {
    wanted: Notify,
}

impl Guests {
    /// A VM is served, perhaps one that needs it.
    pub fn wanted(&self) {
        self.wanted.notify_one();
    }
}

/// A stream that a guest has dialled.
#[derive(Debug)]
struct Arrived {
    cid: u32,
    port: u32,
    socket: OwnedFd,
}

/// Where such streams come from.
trait Accepts {
    /// The next one.
    fn next(&self) -> impl Future<Output = io::Result<Arrived>> + Send;
}

/// The listener. Only its readiness is tokio's, whatever tokio takes it for.
struct Listener(UnixStream);

impl Listener {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        UnixStream::from_std(fd.into()).map(Self)
    }
}

impl Accepts for Listener {
    async fn next(&self) -> io::Result<Arrived> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accept = || Ok(rustix::net::accept_with(&self.0, flags)?);
        let socket = self.0.async_io(Interest::READABLE, accept).await?;
        let peer = getpeername::<VsockAddr>(socket.as_raw_fd());
        // It may have gone already.
        let peer = peer.map_err(|_| io::Error::from(io::ErrorKind::ConnectionAborted))?;
        Ok(Arrived {
            cid: peer.cid(),
            port: peer.port(),
            socket,
        })
    }
}

/// Why a stream is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Refused {
    #[error("no VM has CID {0}")]
    Unknown(u32),
    #[error(
        "`{0}` is reached by another carrier: `carrier = {{ vsock = {{ cid = {1} }} }}` says that the host's kernel carries its streams"
    )]
    Carrier(VmId, u32),
    #[error("`{0}` dials more than {STREAMS_A_SECOND} streams a second")]
    Rate(VmId),
    #[error("the port process of `{0}` takes no streams now")]
    PortProcess(VmId),
}

impl Refused {
    /// Label of the metric.
    fn label(&self) -> &'static str {
        match self {
            Self::Unknown(_) => "unknown",
            Self::Carrier(..) => "carrier",
            Self::Rate(_) => "rate",
            Self::PortProcess(_) => "port-process",
        }
    }
}

/// Serves what guests dial, once there is a VM that needs it.
pub async fn serve(state: Arc<State>) {
    let mut wait = AGAIN.0;
    let listener = loop {
        // Registered before it is looked, so that none is missed.
        let mut wanted = std::pin::pin!(state.guests.wanted.notified());
        wanted.as_mut().enable();
        let vms = of_kernel(&state.registry);
        if vms.is_empty() {
            wanted.await;
            continue;
        }
        let made = state.monitor.guests().await;
        let made = made.map_err(|e| e.to_string());
        match made.and_then(|fd| Listener::new(fd).map_err(|e| e.to_string())) {
            Ok(listener) => {
                vms.iter().for_each(|vm| vm.channel.set_deaf(None));
                break listener;
            }
            Err(why) if state.monitor.is_absent() => {
                tracing::debug!(why, "no listener for guests yet");
                state.monitor.is_there().await;
            }
            Err(why) => {
                vms.iter()
                    .for_each(|vm| vm.channel.set_deaf(Some(why.clone())));
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(AGAIN.1);
            }
        }
    };
    tracing::info!(port = hello::PORT, "listening for guests of this kernel");
    accept_all(&state, listener).await;
}

/// VMs whose streams the kernel carries.
fn of_kernel(vms: &Registry) -> Vec<Arc<VmEntry>> {
    let mut vms = vms.all();
    vms.retain(|vm| vm.channel.kernel().is_some());
    vms
}

async fn accept_all(state: &State, from: impl Accepts) {
    let mut rates = Buckets::default();
    let began = Instant::now();
    let mut turn = 0;
    loop {
        let arrived = match from.next().await {
            Ok(arrived) => arrived,
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept what guests dial");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if !state.room.spares(&arrived.socket) {
            tracing::warn!("a guest's stream is closed: aditd has few descriptors left");
            continue;
        }
        let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        if let Err(refused) = pass(&state.registry, &mut rates, now_ms, arrived) {
            state.metrics.guest_refused(refused.label());
            tracing::warn!(why = %refused, "a guest's stream is closed");
        }
        turn = (turn + 1) % A_TURN;
        if turn == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// Passes a stream to the port process of its VM.
fn pass(vms: &Registry, rates: &mut Buckets, now_ms: u64, arrived: Arrived) -> Result<(), Refused> {
    let Arrived { cid, port, socket } = arrived;
    let vm = vms.by_cid(cid.into()).ok_or(Refused::Unknown(cid))?;
    // The kernel's CID is the VM's own, whichever of its keys says it.
    if !vm.spec().carrier.may_be_kernel() {
        return Err(Refused::Carrier(vm.name.clone(), cid));
    }
    if !rates.take(vm.name.as_str(), STREAMS_A_SECOND, now_ms) {
        return Err(Refused::Rate(vm.name.clone()));
    }
    let accepted = Accepted {
        port: hello::PORT,
        guest_port: port,
    };
    // One of an older build, or that was started for another carrier, takes none: `adit vm reload` replaces it.
    match vm.channel.link() {
        Some(link) if link.accepted(accepted, socket) => Ok(()),
        _ => Err(Refused::PortProcess(vm.name.clone())),
    }
}

#[cfg(test)]
mod tests;
