//! One connection to another host: TLS, and a question or a tunnel on it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use adit_api::HostAnswer;
use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_passed::Closer;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue, PROXY_AUTHORIZATION};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::carry::Carried;
use super::hop::{self, CALLER};
use super::{Host, Peers, tls};
use crate::access::Caller;
use crate::front::pump;
use crate::link::ClientSocket;
use crate::passing::Socket;
use crate::reach::Destination;
use crate::reach::resolve::Claim;
use crate::state::State;

/// How long a host may take to answer a question.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How long it may take to open a tunnel: it dials a guest for it.
const OPEN_LIMIT: Duration = Duration::from_secs(15);
/// Bytes of an answer at most: more than all VMs of a host need.
const ANSWER_MAX: usize = 2 << 20;
/// Bytes of a refusal's text at most.
const TEXT_MAX: usize = 1024;
/// Descriptors that a port process may pass over a pair, which nobody here takes.
const PASSED_MAX: usize = 4;

/// A tunnel's end here.
pub struct Open(TokioIo<Upgraded>);

impl Open {
    pub(super) fn into_io(self) -> impl AsyncRead + AsyncWrite + Unpin + Send {
        self.0
    }
}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Open").finish_non_exhaustive()
    }
}

/// Why a host does not answer.
#[derive(Debug, thiserror::Error)]
pub enum NoLine {
    /// There is no connection.
    #[error("{0}")]
    Connection(String),
    /// It did not speak as it should.
    #[error("it does not answer as adit does: {0}")]
    Http(#[from] hyper::Error),
    /// It took too long.
    #[error("it did not answer in time")]
    Slow,
    /// It said something else.
    #[error("{0}")]
    Answer(String),
}

impl Host {
    /// Asks which VMs it has; with a name, whether it has this one.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn ask(
        self: &Arc<Self>,
        state: &State,
        vm: Option<&VmId>,
    ) -> Result<HostAnswer, NoLine> {
        let path = match vm {
            Some(vm) => format!("/v1/resolve/{vm}"),
            None => "/v1/resolve".into(),
        };
        let request = Request::get(path).body(Empty::new());
        let request = request.map_err(|e| NoLine::Answer(e.to_string()))?;
        let asked = async {
            let answer = self.send(state, request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
            let body = body.map_err(|e| NoLine::Answer(e.to_string()))?.to_bytes();
            let parsed = serde_json::from_slice::<HostAnswer>(&body);
            parsed.map_err(|_| NoLine::Answer(format!("status {status} instead of what it has")))
        };
        let answer = timeout(ANSWER_LIMIT, asked)
            .await
            .map_err(|_| NoLine::Slow)??;
        let name = &self.config.name;
        match answer.host.as_deref() {
            Some(host) if host == name.as_str() => Ok(answer),
            other => Err(NoLine::Answer(format!(
                "it calls itself {}, and not `{name}`",
                other.map_or("nothing".into(), |other| format!(
                    "`{}`",
                    adit_names::escape(other).at_most(63)
                )),
            ))),
        }
    }

    /// Whether it has a VM, as far as it may claim that.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn claim(
        self: &Arc<Self>,
        state: &State,
        vm: &VmId,
    ) -> Result<Option<Claim<VmId>>, NoLine> {
        let answer = self.ask(state, Some(vm)).await?;
        let found = answer
            .vms
            .into_iter()
            .find(|found| found.name == vm.as_str());
        let claim = found.map(|found| Claim {
            host: self.config.name.clone(),
            live: found.live,
            generation: found.generation,
        });
        if claim.is_some() && !self.config.may_claim(vm) {
            tracing::warn!(%vm, host = %self.config.name, "a host claims a VM that its `names` does not have: it is not believed");
            return Ok(None);
        }
        Ok(claim)
    }

    /// Opens a tunnel to a VM of it.
    async fn open(
        self: &Arc<Self>,
        state: &State,
        caller: &Caller,
        to: &Destination,
    ) -> Result<Open, Refusal> {
        let name = &self.config.name;
        let to = Destination {
            host: Some(name.clone()),
            ..to.clone()
        };
        let internal =
            |e: &dyn fmt::Display| Refusal::new(Code::Internal, format!("host `{name}`: {e}"));
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(to.authority());
        if let Some(claims) = hop::claims(caller) {
            request = request.header(CALLER, claims);
        }
        if let Some(shown) = caller.shown() {
            let mut shown = HeaderValue::from_bytes(shown).map_err(|e| internal(&e))?;
            shown.set_sensitive(true);
            request = request.header(PROXY_AUTHORIZATION, shown);
        }
        let request = request.body(Empty::new()).map_err(|e| internal(&e))?;
        let asked = async {
            let mut answer = self.send(state, request).await?;
            if answer.status().is_success() {
                return Ok(Ok(hyper::upgrade::on(&mut answer).await?));
            }
            let (status, error) = (answer.status(), error_of(&answer));
            let body = Limited::new(answer.into_body(), TEXT_MAX).collect().await;
            let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).trim().to_owned());
            let text = adit_names::escape(&text.unwrap_or_default()).to_string();
            Ok(Err(Refusal::new(
                code(status, &error),
                format!("host `{name}`: {text}"),
            )))
        };
        match timeout(OPEN_LIMIT, asked).await {
            Ok(Ok(Ok(upgraded))) => Ok(Open(TokioIo::new(upgraded))),
            Ok(Ok(Err(refusal))) => Err(refusal),
            Ok(Err(no_line)) => Err(unreachable(self, &no_line)),
            Err(_) => Err(unreachable(self, &NoLine::Slow)),
        }
    }

    /// Opens a tunnel for a client whose own socket is the other end.
    ///
    /// # Errors
    /// As that host says, or it does not answer.
    pub async fn hand_over(
        self: &Arc<Self>,
        state: &State,
        caller: &Caller,
        to: &Destination,
        client: ClientSocket,
    ) -> Result<Carried, Refusal> {
        let open = self.open(state, caller, to).await?;
        let thread = thread(&state.peers)?;
        Ok(Carried::new(open, client, thread.clone()))
    }

    /// Opens one whose other end is a socket of aditd's.
    ///
    /// # Errors
    /// As above, or there are few descriptors.
    pub async fn relayed(
        self: &Arc<Self>,
        state: &State,
        caller: &Caller,
        to: &Destination,
    ) -> Result<Socket, Refusal> {
        let internal = |e: io::Error| Refusal::new(Code::Internal, format!("no socket: {e}"));
        let (ours, theirs) = StdUnixStream::pair().map_err(internal)?;
        if !state.room.spares(&ours) || !state.room.spares(&theirs) {
            state.pool.clear();
            return Err(Refusal::busy("aditd has few descriptors left"));
        }
        let open = self.open(state, caller, to).await?;
        thread(&state.peers)?.spawn(async move {
            let Ok(theirs) = Socket::new(theirs, &Closer::new(PASSED_MAX)) else {
                return;
            };
            pump::pump(open.into_io(), theirs, None).await;
        });
        Socket::new(ours, &Closer::new(PASSED_MAX)).map_err(internal)
    }

    /// Sends a request over a connection of its own.
    async fn send(
        self: &Arc<Self>,
        state: &State,
        mut request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, NoLine> {
        let failed = |e: &dyn fmt::Display| NoLine::Connection(e.to_string());
        let tls = self.tls.clone();
        let tls = tls.ok_or_else(|| failed(&"there is no `cert` in [peers] to show to it"))?;
        let name =
            tls::server_name(&self.config).ok_or_else(|| failed(&"its name is no name in TLS"))?;
        let own = HeaderValue::from_str(self.config.name.as_str()).map_err(|e| failed(&e))?;
        request.headers_mut().insert(HOST, own);
        let turn = state.peers.turn().await;
        let socket = state.monitor.peer(&self.config.name).await;
        drop(turn);
        let socket = socket.map_err(|e| failed(&e))?;
        if !state.room.spares(&socket) {
            state.pool.clear();
            return Err(failed(&"aditd has few descriptors left"));
        }
        let thread = thread(&state.peers).map_err(|e| failed(&e.text()))?;
        let shaken = thread.spawn(handshake(socket, TlsConnector::from(tls), name));
        let mut sender = shaken.await.map_err(|e| failed(&e))??;
        Ok(sender.send_request(request).await?)
    }
}

type Sender = http1::SendRequest<Empty<Bytes>>;

/// Shakes hands, on the thread, and drives the connection there.
async fn handshake(
    socket: OwnedFd,
    tls: TlsConnector,
    name: rustls::pki_types::ServerName<'static>,
) -> Result<Sender, NoLine> {
    let failed = |e: io::Error| NoLine::Connection(tls::explained(&e));
    // The monitor has made it such that nobody blocks on it.
    let socket = TcpStream::from_std(socket.into()).map_err(failed)?;
    let _ = socket.set_nodelay(true);
    let shaken = timeout(ANSWER_LIMIT, tls.connect(name, socket)).await;
    let shaken = shaken.map_err(|_| NoLine::Slow)?.map_err(failed)?;
    let (sender, connection) = http1::handshake(TokioIo::new(shaken)).await?;
    tokio::spawn(async move {
        if let Err(e) = connection.with_upgrades().await {
            tracing::debug!(error = %e, "a connection to another host ended");
        }
    });
    Ok(sender)
}

fn thread(peers: &Peers) -> Result<&tokio::runtime::Handle, Refusal> {
    let thread = peers.thread.as_ref();
    thread.ok_or_else(|| Refusal::new(Code::Internal, "there is no thread for other hosts"))
}

fn unreachable(host: &Host, why: &NoLine) -> Refusal {
    let name = &host.config.name;
    tracing::warn!(host = %name, error = %adit_names::escape(&why.to_string()), "another host is not reached");
    let code = match why {
        NoLine::Slow => Code::NoAnswer,
        _ => Code::NoPortProcess,
    };
    Refusal::new(
        code,
        format!("host `{name}`, which has the VM, is not reached: {why}"),
    )
}

/// The error type of RFC 9209 that the last proxy says.
fn error_of(answer: &Response<Incoming>) -> String {
    let status = answer.headers().get("proxy-status");
    let status = status
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let error = status.split("error=").nth(1).unwrap_or_default();
    let end = error.find(|c: char| !c.is_ascii_lowercase() && c != '_');
    error[..end.unwrap_or(error.len())].to_owned()
}

/// What the other host's refusal is here: a client hears the same status and error type of it.
fn code(status: StatusCode, error: &str) -> Code {
    match (status.as_u16(), error) {
        (404, _) => Code::UnknownVm,
        (403 | 407, _) => Code::NotAllowed,
        (503, "connection_limit_reached") => Code::Busy,
        (503, _) => Code::NoSession,
        (504, _) => Code::NoAnswer,
        (502, "connection_terminated") => Code::Reset,
        (502, "http_protocol_error") => Code::Foreign,
        (502, _) => Code::DialFailed,
        _ => Code::Internal,
    }
}
