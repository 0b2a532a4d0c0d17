//! The listener: streams from the host to allowed local TCP ports.
//!
//! `hello open {service tcp:PORT}` → policy → dial 127.0.0.1, then ::1 → `accept` or `refuse {why}` → relay. The answer
//! has the result of the local dial, so that the host can tell "not allowed" from "nobody listens" from "busy".
//!
//! Descriptors are divided by number, since the kernel always uses the lowest that is free: those below `Shares::ceiling` are
//! for tunnels, those above for the agent's own stream, its journal and its tasks. A stream beyond the tunnels' share always
//! gets an answer that says so, even if there is no descriptor left for it.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use adit_channel::hello::{self, Accept, Common, Hello, Open, Refuse, Status};
use adit_channel::ring::bell::PING;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::conn::Conn;
use crate::log;
use crate::transport::{HostStream, Listen};

/// Most streams at a time; more are refused as busy. There are fewer where the limit of descriptors is too low for so many.
pub const CONNS_MAX: usize = 512;
/// Descriptors that are no tunnel's: a task needs some 16, the agent and its ring as many.
const RESERVED: u64 = 64;
/// Descriptors of a tunnel: the host's stream, the local one.
const TUNNEL: u64 = 2;
/// How long the listener itself may take to send a refusal.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);
/// How long the host may take to send its hello, and to read our answer.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long a local dial may take if the host names no shorter deadline.
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// Stack of a stream's thread: its buffers are on the heap.
const STACK_BYTES: usize = 128 * 1024;

/// What the agent sends of itself in every hello.
#[derive(Debug)]
pub struct Identity {
    /// A random number for this boot.
    pub boot_nonce: [u8; 16],
    /// The last epoch of the host that was seen.
    pub epoch: AtomicU64,
}

impl Identity {
    /// Fields of a hello that we send.
    pub fn common(&self) -> Common {
        Common {
            features: 0,
            epoch: self.epoch.load(Ordering::Relaxed),
            boot_nonce: self.boot_nonce,
        }
    }

    /// Remembers the host's epoch.
    pub fn saw(&self, peer: &Common) {
        if peer.epoch != 0 {
            self.epoch.store(peer.epoch, Ordering::Relaxed);
        }
    }
}

/// The tunnels' share of this process's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shares {
    /// Most streams at a time.
    streams: usize,
    /// The first descriptor that is no tunnel's.
    ceiling: RawFd,
}

impl Shares {
    /// The share of so many descriptors. Where there are very few, tunnels have half of them.
    fn of(limit: u64) -> Self {
        let ceiling = limit - RESERVED.min(limit / 2);
        Self {
            streams: usize::try_from(ceiling / TUNNEL).map_or(CONNS_MAX, |n| n.min(CONNS_MAX)),
            ceiling: RawFd::try_from(ceiling).unwrap_or(RawFd::MAX),
        }
    }

    fn now() -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE);
        Self::of(limit.map_or(RLIM_INFINITY, |(soft, _)| soft))
    }

    fn exceeded_by(&self, fd: impl AsFd) -> bool {
        fd.as_fd().as_raw_fd() >= self.ceiling
    }
}

/// Serves the host's streams.
pub struct Server {
    /// Local TCP ports that may be dialled.
    ports: RwLock<Vec<u16>>,
    identity: Arc<Identity>,
    active: AtomicUsize,
    shares: Shares,
}

/// Counts a stream for as long as it lives.
struct Slot(Arc<Server>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a stream is refused.
struct Refusal {
    status: Status,
    errno: u16,
    text: String,
}

impl Refusal {
    fn new(status: Status, text: impl Into<String>) -> Self {
        Self {
            status,
            errno: 0,
            text: text.into(),
        }
    }

    fn busy(why: impl std::fmt::Display) -> Self {
        Self::new(Status::Busy, format!("the guest is busy: {why}"))
    }
}

impl Server {
    /// Serves these local TCP ports and no others.
    pub fn new(ports: Vec<u16>, identity: Arc<Identity>) -> Arc<Self> {
        Arc::new(Self {
            ports: RwLock::new(ports),
            identity,
            active: AtomicUsize::new(0),
            shares: Shares::now(),
        })
    }

    /// Serves these ports instead, from the next stream on. Streams that are open go on.
    pub fn allow(&self, ports: Vec<u16>) {
        *self.ports.write().unwrap_or_else(PoisonError::into_inner) = ports;
    }

    fn allows(&self, port: u16) -> bool {
        let ports = self.ports.read().unwrap_or_else(PoisonError::into_inner);
        ports.contains(&port)
    }

    /// Accepts until the listener is gone.
    ///
    /// # Errors
    /// The listener failed for good.
    pub fn run(self: &Arc<Self>, listener: &dyn Listen) -> io::Result<()> {
        // Closed to make room for a stream that then is refused: without it, there would be no descriptor to answer on.
        let mut spare = spare();
        loop {
            match listener.accept() {
                Ok(Some(conn)) => {
                    spare = spare.or_else(self::spare);
                    if spare.is_some() && !self.shares.exceeded_by(&conn) {
                        self.admit(conn);
                    } else {
                        self.refuse_busy(&conn, "it has no descriptors left");
                    }
                }
                Ok(None) => log::event("stream-refused", &[("why", &"peer is not the host")]),
                Err(e) if short_of_resources(&e) => {
                    log::event("accept-failed", &[("error", &e)]);
                    if spare.take().is_none() {
                        // Only the end of something else frees descriptors; to try again at once would spin.
                        thread::sleep(Duration::from_millis(100));
                        spare = self::spare();
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Serves one stream on a thread, or refuses it.
    pub fn admit(self: &Arc<Self>, conn: impl HostStream) {
        let most = self.shares.streams;
        if self.active.fetch_add(1, Ordering::Relaxed) >= most {
            self.active.fetch_sub(1, Ordering::Relaxed);
            return self.refuse_busy(&conn, &format!("{most} streams are open"));
        }
        let slot = Slot(self.clone());
        // Passed to the thread once it runs: if it does not start, the stream is still here and gets an answer.
        let (give, take) = sync_channel(1);
        let started = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Ok(conn) = take.recv() {
                    slot.0.serve(conn);
                }
            });
        match started {
            Ok(_) => drop(give.send(conn)),
            Err(e) => {
                log::event("stream-refused", &[("why", &e)]);
                self.refuse_busy(&conn, &e.to_string());
            }
        }
    }

    /// Refuses a stream as busy without reading its hello.
    fn refuse_busy(&self, conn: &impl HostStream, why: &str) {
        // A peer that does not read the refusal must not keep other streams waiting for long.
        let _ = conn.set_timeout(Some(REFUSAL_LIMIT));
        self.refuse(conn, Refusal::busy(why));
    }

    fn serve(&self, conn: impl HostStream) {
        let _ = conn.set_timeout(Some(HELLO_LIMIT));
        let open = match hello::read(&mut conn.io()) {
            Ok(Hello::Open(open)) => open,
            Ok(_) => return log::event("hello-refused", &[("error", &"not an open")]),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return,
            Err(e) => return log::event("hello-refused", &[("error", &e)]),
        };
        self.identity.saw(&open.common);
        if open.service.as_str() == PING {
            // Each read has the hello's time limit.
            let _ = self.ping(&conn, &open);
            return;
        }
        match self.connect(&open) {
            Ok((version, local)) => {
                let accept = Hello::Accept(Accept {
                    common: self.identity.common(),
                    version,
                });
                if conn.io().write_all(&accept.encode()).is_err() {
                    return local.reset_on_close(true);
                }
                if let Err(e) = conn.relay_to(local) {
                    log::event("relay-failed", &[("service", &open.service), ("error", &e)]);
                }
            }
            Err(refusal) => {
                let status = format!("{:?}", refusal.status);
                let fields: [(&str, &dyn std::fmt::Display); 3] = [
                    ("service", &open.service),
                    ("status", &status),
                    ("why", &refusal.text),
                ];
                log::event("stream-refused", &fields);
                self.refuse(&conn, refusal);
            }
        }
    }

    /// Sends back what it reads.
    fn ping(&self, conn: &impl HostStream, open: &Open) -> io::Result<()> {
        let Some(version) = hello::choose_version(open) else {
            return Ok(());
        };
        let common = self.identity.common();
        let accept = Hello::Accept(Accept { common, version });
        conn.io().write_all(&accept.encode())?;
        let mut buf = [0; 1024];
        loop {
            match conn.io().read(&mut buf)? {
                0 => return conn.end_sending(),
                n => conn.io().write_all(&buf[..n])?,
            }
        }
    }

    fn refuse(
        &self,
        conn: &impl HostStream,
        Refusal {
            status,
            errno,
            text,
        }: Refusal,
    ) {
        let hello = Hello::Refuse(Refuse {
            common: self.identity.common(),
            status,
            errno,
            text,
        });
        let _ = conn.io().write_all(&hello.encode());
        let _ = conn.end_sending();
    }

    fn connect(&self, open: &Open) -> Result<(u16, Conn), Refusal> {
        let version = hello::choose_version(open).ok_or_else(|| {
            Refusal::new(
                Status::Version,
                format!("only version {} is spoken", hello::VERSION),
            )
        })?;
        let port = open
            .service
            .tcp_port()
            .ok_or_else(|| Refusal::new(Status::UnknownService, "this agent serves tcp:PORT"))?;
        if !self.allows(port) {
            return Err(Refusal::new(
                Status::Denied,
                format!("port {port} is not in the guest's allow_ports"),
            ));
        }
        let limit = match open.deadline_ms {
            0 => DIAL_LIMIT,
            ms => DIAL_LIMIT.min(Duration::from_millis(ms.into())),
        };
        let local = dial(port, limit).map_err(|e| Refusal {
            status: match short_of_resources(&e) {
                true => Status::Busy,
                false => Status::DialFailed,
            },
            errno: errno_of(&e),
            text: format!("127.0.0.1:{port}: {e}"),
        })?;
        if self.shares.exceeded_by(&local) {
            return Err(Refusal::busy("it has no descriptors left for tunnels"));
        }
        Ok((version, local))
    }
}

fn dial(port: u16, limit: Duration) -> io::Result<Conn> {
    let to = |ip: IpAddr| TcpStream::connect_timeout(&SocketAddr::new(ip, port), limit);
    // The error of 127.0.0.1 is reported: ::1 may not exist at all.
    let tcp = to(Ipv4Addr::LOCALHOST.into())
        .or_else(|e| to(Ipv6Addr::LOCALHOST.into()).map_err(|_| e))?;
    let _ = tcp.set_nodelay(true);
    Ok(OwnedFd::from(tcp).into())
}

fn errno_of(e: &io::Error) -> u16 {
    match e.kind() {
        ErrorKind::TimedOut => libc::ETIMEDOUT as u16,
        _ => e
            .raw_os_error()
            .and_then(|n| u16::try_from(n).ok())
            .unwrap_or(0),
    }
}

fn short_of_resources(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EADDRNOTAVAIL)
    )
}

/// A descriptor that is closed when one is needed.
fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

#[cfg(test)]
mod tests;
