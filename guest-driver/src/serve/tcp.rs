//! `tcp:PORT`: a local TCP port that the configuration allows.
//!
//! Policy → dial 127.0.0.1, then ::1. The refusal says what became of the dial, so that the host can tell "not allowed" from
//! "nobody listens" from "busy".

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use adit_channel::hello::Open;
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;

use super::services::{Run, Service};
use super::shares::{Shares, busy};
use crate::conn::Conn;

/// Arguments of a hello that is to be answered when somebody listens. Agents before this one answer at once.
const WAIT: &[u8] = b"wait";
/// How long such a hello may wait at most: it has a thread.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// How long a local dial may take if the host names no shorter deadline.
const DIAL_LIMIT: Duration = Duration::from_secs(5);

/// The service.
pub struct Tcp {
    ports: RwLock<Vec<u16>>,
    shares: Shares,
}

impl Tcp {
    /// Serves these ports and no others.
    pub fn new(ports: Vec<u16>, shares: Shares) -> Self {
        Self {
            ports: RwLock::new(ports),
            shares,
        }
    }

    /// Serves these ports instead, from the next stream on. Streams that are open go on.
    pub fn allow(&self, ports: Vec<u16>) {
        *self.ports.write().unwrap_or_else(PoisonError::into_inner) = ports;
    }

    fn forbidden(&self, port: u16) -> Option<String> {
        let ports = self.ports.read().unwrap_or_else(PoisonError::into_inner);
        forbidden(port, &ports)
    }
}

/// Why the configuration forbids a port, if it does.
pub fn forbidden(port: u16, allowed: &[u16]) -> Option<String> {
    let text = || format!("port {port} is not in the guest's allow_ports");
    (!allowed.contains(&port)).then(text)
}

impl Service for Tcp {
    fn form(&self) -> &'static str {
        "tcp:PORT"
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.tcp_port().is_some()
    }

    fn open(&self, open: &Open) -> Result<Run, Refusal> {
        // `takes` has seen that there is one; no port has the number 0.
        let port = open.service.tcp_port().unwrap_or(0);
        if let Some(text) = self.forbidden(port) {
            return Err(Refusal::new(Code::Denied, text));
        }
        let local = opened(open, |limit| dial(port, limit));
        let local = local.map_err(|e| Refusal::of_io(format_args!("127.0.0.1:{port}"), &e))?;
        relayed(local, &self.shares)
    }
}

/// Carries a stream to what was dialled for it.
pub(super) fn relayed(local: Conn, shares: &Shares) -> Result<Run, Refusal> {
    if shares.exceeded_by(&local) {
        return Err(busy("it has no descriptors left for tunnels"));
    }
    // Until the stream begins: the host may be gone by then.
    local.reset_on_close(true);
    Ok(Box::new(move |stream| {
        local.reset_on_close(false);
        stream.relay_to(local)
    }))
}

/// Dials what a hello asks for. One that says [`WAIT`] is answered when somebody listens there, or when its time is nearly over: the
/// kernel tells nobody that a port has a listener, so it is tried, and only while somebody waits.
pub(super) fn opened(
    open: &Open,
    mut dial: impl FnMut(Duration) -> io::Result<Conn>,
) -> io::Result<Conn> {
    let limit = limit(open);
    if open.extensions.arguments.as_bytes() != WAIT {
        return dial(limit);
    }
    let whole = Duration::from_millis(open.deadline_ms.into());
    // The answer has to arrive, too.
    let end = Instant::now() + whole.min(WAIT_MAX) * 4 / 5;
    loop {
        match dial(limit) {
            Err(e) if is_not_there(&e) && Instant::now() + TRY_AGAIN < end => {
                thread::sleep(TRY_AGAIN);
            }
            done => return done,
        }
    }
}

fn is_not_there(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
    )
}

/// How long a local dial for a hello may take.
fn limit(open: &Open) -> Duration {
    match open.deadline_ms {
        0 => DIAL_LIMIT,
        ms => DIAL_LIMIT.min(Duration::from_millis(ms.into())),
    }
}

/// Connects to a port of the loopback address.
pub(super) fn dial(port: u16, limit: Duration) -> io::Result<Conn> {
    let to = |ip: IpAddr| TcpStream::connect_timeout(&SocketAddr::new(ip, port), limit);
    // The error of 127.0.0.1 is reported: ::1 may not exist at all.
    let tcp = to(Ipv4Addr::LOCALHOST.into())
        .or_else(|e| to(Ipv6Addr::LOCALHOST.into()).map_err(|_| e))?;
    let _ = tcp.set_nodelay(true);
    Ok(OwnedFd::from(tcp).into())
}
