//! `adit proxy`: a forward proxy on a client machine. It asks the map of a server which host has a VM, and takes its clients there.
//!
//! ```text
//!  curl ─ HTTP, SOCKS5 ─► adit proxy ─┬─ which host has it? ══ mTLS ══► server: /v1/resolve, /v1/hosts
//!                                     └─ CONNECT, absolute-form ══ mTLS ══► the proxy of that host, which decides
//! ```
//! | file | what it is |
//! |---|---|
//! | `hosts` | which host has a VM, as the server says, and how that host is spoken to |
//! | `faked` | the same for tests: made up |
//! | `http`, `socks` | what a client says |
//! | `ahead` | a connection of which something was read |
//! | `problem` | why not, as an answer: status, `Proxy-Status`, cause and remedy |
//!
//! What names mean, how long an answer counts and which of several hosts has a VM is decided by the code that aditd uses (`adit_reach`). Who may
//! reach what is decided by the host that has the VM; to it, all clients of this proxy are whoever its certificate and its token say.

mod ahead;
#[cfg(feature = "test-util")]
pub mod faked;
mod hosts;
mod http;
mod problem;
mod socks;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use adit_client::Client;
use adit_client::server::Server;
use adit_guest_driver::conn::Conn;
use adit_names::VmId;
use adit_reach::{Destination, Suffix};
use clap::Args;
use hyper::StatusCode;
use hyper::client::conn::http1::SendRequest;
use hyper::header::HeaderValue;
use rustix::net::{AddressFamily, sockopt};
use serde_json::json;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, copy_bidirectional_with_sizes, sink,
};
use tokio::net::{TcpStream, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::error::Failure;
use crate::forward::{Listen, Listener, listen, tell};
use crate::output;
use crate::text::{Format, escape};

use ahead::Ahead;
use hosts::Hosts;
use problem::{Body, Problem};

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// How long a client may take until it has said what it wants.
const SAY_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a direction that are under way.
const PIECE: usize = 64 << 10;
/// First byte of SOCKS5, which no method of HTTP begins with.
const SOCKS5: u8 = 5;
/// The first line of whoever begins with HTTP/2 (RFC 9113 §3.4), which no request of HTTP/1 has.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n";
/// Bytes that are read of a client that is not served, and for how long.
const REST_MAX: u64 = 64 << 10;
const REST_LIMIT: Duration = Duration::from_secs(1);
/// How soon a client is taken again after that has failed.
const AGAIN: Duration = Duration::from_millis(200);

const EXAMPLES: &str = "\
Examples:
  adit --server https://alpha:7443 --pin sha256/… --cert me.crt --key me.key proxy
  curl -x http://127.0.0.1:7080 http://web-9/
  curl --socks5-hostname 127.0.0.1:7080 http://web-9.beta/

The server is a management listener, and has to let the certificate (or the token) `see` all VMs: it says which host has one. That host
decides who may reach it. Every program that can connect here is the holder of this certificate there; so it listens on this machine's loopback
address unless another is given. It runs until Ctrl-C, which ends its tunnels too.";

/// Arguments of `adit proxy`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Gate {
    /// Where to listen: ADDRESS:PORT, PORT on 127.0.0.1, or unix:PATH. Port 0 takes any free port
    #[arg(long, value_parser = listen, default_value = "127.0.0.1:7080", value_name = "ADDRESS")]
    listen: Listen,
    /// What names may end with, as `[names] suffix` of the hosts has it
    #[arg(long, default_value_t = Suffix::default(), value_name = "SUFFIX")]
    suffix: Suffix,
}

/// What all clients need.
pub struct Shared<H> {
    hosts: H,
    suffix: Suffix,
}

/// Who knows which host has a VM, and leads there.
pub trait Lead: Send + Sync + 'static {
    /// What clients of this proxy show to hosts, besides its certificate.
    fn token(&self) -> Option<&HeaderValue>;

    /// The host that has a VM.
    fn find(&self, to: &Destination) -> impl Future<Output = Result<VmId, Problem>> + Send;

    /// A connection to a host, for one request.
    fn reach(&self, host: &VmId)
    -> impl Future<Output = Result<SendRequest<Body>, Problem>> + Send;

    /// The host has said that it does not have the VM.
    fn forget(&self, vm: &VmId, host: &VmId);
}

pub async fn run(
    gate: &Gate,
    (client, server): (Client, Server),
    format: Format,
) -> Result<(), Failure> {
    let cannot = |e: io::Error| Failure::io("cannot wait for signals", &e);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let of = server.to_string();
    let hosts = Hosts::new(client, server).await?;
    let shared = Arc::new(Shared {
        hosts,
        suffix: gate.suffix.clone(),
    });
    let (listener, at) = Listener::bind(&gate.listen).await?;
    match format {
        Format::Json => output::json(&json!({ "listen": at, "server": of }))?,
        Format::Table => {
            output::line(format_args!("listening on {} for VMs of {of}", escape(&at)))?
        }
    }
    if format == Format::Table {
        let whom = match listener.is_open_to_others() {
            true => "every machine that reaches this address",
            false => "every program of this machine that may connect here",
        };
        adit_print::note!(
            "{}: {whom} acts with this certificate and token",
            escape(&at)
        );
    }
    let serving = tokio::spawn(serve(listener, shared, at, format));
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    serving.abort();
    // The socket's file goes with it.
    let _ = serving.await;
    Ok(())
}

/// Takes clients, for good.
async fn serve(listener: Listener, shared: Arc<Shared<impl Lead>>, at: String, format: Format) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        if room.available_permits() == 0 {
            let message = format!("{CONNECTIONS_MAX} connections are open: the next ones wait");
            tell(&at, &Failure::new("busy", message), format);
        }
        // It is never closed.
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        let client = match listener.accept().await {
            Ok(client) => client,
            Err(e) => {
                tell(&at, &Failure::io("cannot take a connection", &e), format);
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            // What became of it, the client knows.
            let _ = one(client, shared).await;
            drop(permit);
        });
    }
}

/// Serves one client.
async fn one(client: OwnedFd, shared: Arc<Shared<impl Lead>>) -> io::Result<()> {
    let ends = Ends(Conn::from(client.as_fd().try_clone_to_owned()?));
    let mut client = stream(client)?;
    let said = timeout(SAY_LIMIT, first(&mut client)).await;
    let said = said.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    match &*said {
        [] => Ok(()),
        HTTP2 => {
            let cause = "this proxy speaks HTTP/1.1 and SOCKS5 with its clients, and no HTTP/2";
            let problem = Problem::new(
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                "http_protocol_error",
                cause,
            )
            .remedy("turn HTTP/2 off for the proxy; over CONNECT it may be spoken with the VM");
            client.write_all(problem.text().as_bytes()).await?;
            client.shutdown().await?;
            // What it has said behind that, and nobody reads, would take the answer away from it.
            let mut rest = client.take(REST_MAX);
            let rest = timeout(REST_LIMIT, copy(&mut rest, &mut sink())).await;
            rest.map_or(Ok(()), |read| read.map(drop))
        }
        [SOCKS5, ..] => socks::serve(Ahead::new(&said, client), ends, shared).await,
        _ => http::serve(Ahead::new(&said, client), ends, shared).await,
    }
}

/// Reads what a client begins with, for as long as that may be [`HTTP2`]. Empty: it says nothing.
async fn first(client: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut said = Vec::new();
    while said.len() < HTTP2.len() && HTTP2.starts_with(&said) {
        let mut piece = [0; HTTP2.len()];
        let room = &mut piece[said.len()..];
        match client.read(room).await? {
            0 => break,
            n => said.extend_from_slice(&room[..n]),
        }
    }
    Ok(said)
}

/// A second descriptor of a client's socket, by which its close is an end or a break.
struct Ends(Conn);

impl Ends {
    /// Carries a tunnel's bytes both ways, to their ends. What breaks off on one side is broken off on the other.
    async fn carry(
        self,
        mut client: impl AsyncRead + AsyncWrite + Unpin,
        mut tunnel: impl AsyncRead + AsyncWrite + Unpin,
    ) -> io::Result<()> {
        self.0.reset_on_close(true);
        copy_bidirectional_with_sizes(&mut client, &mut tunnel, PIECE, PIECE).await?;
        self.0.reset_on_close(false);
        Ok(())
    }
}

/// A client's connection.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

fn stream(fd: OwnedFd) -> io::Result<Box<dyn Io>> {
    // Nobody blocks on it: tokio has accepted it.
    Ok(match sockopt::socket_domain(&fd)? {
        AddressFamily::UNIX => Box::new(UnixStream::from_std(fd.into())?),
        _ => Box::new(TcpStream::from_std(fd.into())?),
    })
}
