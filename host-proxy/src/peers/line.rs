//! One stream to another host: a question, or a tunnel.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use adit_api::{HostAnswer, VmAt};
use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_passed::Closer;
use bytes::Bytes;
use h2::{RecvStream, SendStream};
use hyper::header::{HeaderMap, HeaderValue, InvalidHeaderValue, PROXY_AUTHORIZATION, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use tokio::time::timeout;

use super::carry::Carried;
use super::hop::{self, CALLER};
use super::lines::{Asked, LINES_MAX, Rest, Slot};
use super::{Host, Peers};
use crate::access::Caller;
use crate::link::ClientSocket;
use crate::passing::Socket;
use crate::proxy::fields::TRACEPARENT;
use crate::proxy::http2::tunnel::{self, End, Went};
use crate::reach::Destination;
use crate::reach::resolve::Claim;
use crate::state::State;
use crate::visit::Visit;

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
pub struct Open {
    stream: (RecvStream, SendStream<Bytes>),
    /// Its place, until it ends.
    slot: Slot,
}

impl Open {
    /// Carries it to its end, which a socket is the other end of; `ahead` goes into it first.
    pub(super) async fn carry(
        self,
        ahead: Bytes,
        socket: &impl End,
        count: &(impl Fn(Went, usize) + Sync),
    ) -> io::Result<()> {
        let count = |went, bytes| {
            self.slot.wanted(bytes);
            count(went, bytes);
        };
        tunnel::carry(self.stream, ahead, socket, &count).await
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
    Http(#[from] h2::Error),
    /// It took too long.
    #[error("it did not answer in time")]
    Slow,
    /// Its connection was ended.
    #[error("its connection was ended because it was a flood of {0}")]
    Flood(&'static str),
    /// This host has as many connections to it as it may.
    #[error("{LINES_MAX} connections to it have as many streams as they may")]
    Full,
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
        let own = &self.config.name;
        let uri = match vm {
            Some(vm) => format!("https://{own}/v1/resolve/{vm}"),
            None => format!("https://{own}/v1/resolve"),
        };
        let request = Request::get(uri).body(());
        let request = request.map_err(|e| NoLine::Answer(e.to_string()))?;
        let asked = async {
            let ((answer, _), slot) = self.send(state, request, Rest::Whole(Bytes::new())).await?;
            let status = answer.status();
            let body = collected(answer.into_body(), ANSWER_MAX, &slot).await?;
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
        let claim = found.map(|found| self.claimed(&found));
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
        visit: &Visit,
    ) -> Result<Open, Refusal> {
        let name = &self.config.name;
        let to = to.at(name);
        let internal =
            |e: &dyn fmt::Display| Refusal::new(Code::Internal, format!("host `{name}`: {e}"));
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(to.authority())
            .header(TRACEPARENT, visit.trace().to_string());
        let mut request = request.body(()).map_err(|e| internal(&e))?;
        let said = says_who(request.headers_mut(), caller);
        said.map_err(|e| internal(&e))?;
        let asked = async {
            let ((answer, to), slot) = self.send(state, request, Rest::Open).await?;
            if answer.status().is_success() {
                return Ok(Ok(Open {
                    stream: (answer.into_body(), to),
                    slot,
                }));
            }
            let (status, error) = (answer.status(), error_of(&answer));
            let passes = answer.headers().contains_key(RETRY_AFTER);
            let body = collected(answer.into_body(), TEXT_MAX, &slot).await;
            let text = String::from_utf8_lossy(&body.unwrap_or_default()).into_owned();
            // What to do about it is said here, with what is known here.
            let why = text.trim().lines().next().unwrap_or_default();
            let text = adit_names::escape(why).to_string();
            Ok(Err(Refusal::new(
                code(status, &error, passes),
                format!("host `{name}`: {text}"),
            )))
        };
        match timeout(OPEN_LIMIT, asked).await {
            Ok(Ok(Ok(open))) => Ok(open),
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
        (to, visit): (&Destination, &Visit),
        client: ClientSocket,
    ) -> Result<Carried, Refusal> {
        let open = self.open(state, caller, to, visit).await?;
        let thread = thread(&state.peers)?.clone();
        Ok(Carried::new(open, client, visit.clone(), thread))
    }

    /// Opens one whose other end is a socket of aditd's.
    ///
    /// # Errors
    /// As above, or there are few descriptors.
    pub async fn relayed(
        self: &Arc<Self>,
        state: &State,
        caller: &Caller,
        (to, visit): (&Destination, &Visit),
    ) -> Result<Socket, Refusal> {
        let internal = |e: io::Error| Refusal::new(Code::Internal, format!("no socket: {e}"));
        let (ours, theirs) = StdUnixStream::pair().map_err(internal)?;
        if !state.room.spares(&ours) || !state.room.spares(&theirs) {
            state.pool.clear();
            return Err(Refusal::busy("aditd has few descriptors left"));
        }
        let open = self.open(state, caller, to, visit).await?;
        thread(&state.peers)?.spawn(async move {
            let Ok(theirs) = Socket::new(theirs, &Closer::new(PASSED_MAX)) else {
                return;
            };
            // Whoever has the other end counts its bytes.
            if let Err(e) = open.carry(Bytes::new(), &theirs, &|_, _| ()).await {
                tracing::debug!(error = %e, "a tunnel to another host broke off");
            }
        });
        Socket::new(ours, &Closer::new(PASSED_MAX)).map_err(internal)
    }

    /// All VMs that it has, as far as it may claim them.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn claims(
        self: &Arc<Self>,
        state: &State,
    ) -> Result<HashMap<VmId, Claim<VmId>>, NoLine> {
        let answer = self.ask(state, None).await?;
        let claims = answer.vms.into_iter().filter_map(|found| {
            let vm: VmId = found.name.parse().ok()?;
            let claim = self.claimed(&found);
            self.config.may_claim(&vm).then_some((vm, claim))
        });
        Ok(claims.collect())
    }

    fn claimed(&self, found: &VmAt) -> Claim<VmId> {
        Claim {
            host: self.config.name.clone(),
            live: found.live,
            generation: found.generation,
        }
    }

    /// Whether there is something to show to it, so that it can be asked.
    pub fn is_asked(&self) -> bool {
        self.tls.is_some()
    }

    /// Sends a request. Where the connection was over already it is sent again over another; that host may then see it twice.
    pub(super) async fn send(
        self: &Arc<Self>,
        state: &State,
        request: Request<()>,
        rest: Rest,
    ) -> Result<(Asked, Slot), NoLine> {
        for _ in 0..LINES_MAX {
            let slot = self.lines.take(self, state).await?;
            match slot.ask(request.clone(), rest.clone()).await {
                Ok(asked) => return Ok((asked, slot)),
                Err(e) => {
                    let is_over = e.is_of_connection();
                    if is_over {
                        slot.give_up();
                    }
                    if !is_over || slot.is_new {
                        return Err(e);
                    }
                }
            }
        }
        Err(NoLine::Full)
    }
}

impl NoLine {
    /// Nothing comes over the connection any more.
    fn is_of_connection(&self) -> bool {
        match self {
            Self::Http(e) => e.is_io() || e.is_go_away(),
            Self::Connection(_) | Self::Slow | Self::Flood(_) => true,
            Self::Full | Self::Answer(_) => false,
        }
    }
}

/// Writes who asks: what this host claims of them, and what they have shown.
pub(super) fn says_who(head: &mut HeaderMap, caller: &Caller) -> Result<(), InvalidHeaderValue> {
    head.insert(CALLER, HeaderValue::from_str(&hop::claims(caller))?);
    if let Some(shown) = caller.shown() {
        let mut shown = HeaderValue::from_bytes(shown)?;
        shown.set_sensitive(true);
        head.insert(PROXY_AUTHORIZATION, shown);
    }
    Ok(())
}

/// The body of an answer that comes bit by bit.
pub struct Coming {
    body: RecvStream,
    /// Its place, until it ends.
    slot: Slot,
}

impl Coming {
    pub(super) fn new(body: RecvStream, slot: Slot) -> Self {
        Self { body, slot }
    }

    /// The next bit; none: it has ended.
    ///
    /// # Errors
    /// It has broken off.
    pub async fn next(&mut self) -> Option<Result<Bytes, NoLine>> {
        let data = match poll_fn(|cx| self.body.poll_data(cx)).await? {
            Ok(data) => data,
            Err(e) => return Some(Err(e.into())),
        };
        self.slot.wanted(data.len());
        // A stream that is over has no window.
        let _ = self.body.flow_control().release_capacity(data.len());
        Some(Ok(data))
    }
}

impl fmt::Debug for Coming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coming").finish_non_exhaustive()
    }
}

/// All of a body, unless that is more.
pub(super) async fn collected(
    mut body: RecvStream,
    max: usize,
    slot: &Slot,
) -> Result<Vec<u8>, NoLine> {
    let mut all = Vec::new();
    while let Some(data) = poll_fn(|cx| body.poll_data(cx)).await {
        let data = data?;
        if all.len() + data.len() > max {
            return Err(NoLine::Answer("its answer is too long".into()));
        }
        all.extend_from_slice(&data);
        slot.wanted(data.len());
        // A stream that is over has no window.
        let _ = body.flow_control().release_capacity(data.len());
    }
    Ok(all)
}

pub(super) fn thread(peers: &Peers) -> Result<&tokio::runtime::Handle, Refusal> {
    let thread = peers.thread.as_ref();
    thread.ok_or_else(|| Refusal::new(Code::Internal, "there is no thread for other hosts"))
}

fn unreachable(host: &Host, why: &NoLine) -> Refusal {
    let name = &host.config.name;
    tracing::warn!(host = %name, error = %adit_names::escape(&why.to_string()), "another host is not reached");
    let code = match why {
        NoLine::Slow => Code::NoAnswer,
        _ => Code::SilentHost,
    };
    Refusal::new(
        code,
        format!("host `{name}`, which has the VM, is not reached: {why}"),
    )
}

/// The error type of RFC 9209 that the last proxy says.
fn error_of(answer: &Response<RecvStream>) -> String {
    let status = answer.headers().get("proxy-status");
    let status = status
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let error = status.split("error=").nth(1).unwrap_or_default();
    let end = error.find(|c: char| !c.is_ascii_lowercase() && c != '_');
    error[..end.unwrap_or(error.len())].to_owned()
}

/// What the other host's refusal is here: a client hears the same status and error type of it. `passes`: it may go better later.
fn code(status: StatusCode, error: &str, passes: bool) -> Code {
    match (status.as_u16(), error) {
        (404, _) => Code::UnknownVm,
        (403 | 407, _) => Code::NotAllowed,
        (409, _) => Code::Ambiguous,
        (429, _) => Code::TooOften,
        (503, "connection_limit_reached") => Code::Busy,
        (503, _) if passes => Code::NoSession,
        (503, _) => Code::Locked,
        (504, _) => Code::NoAnswer,
        (502, "connection_terminated") => Code::Reset,
        (502, "http_protocol_error") => Code::Foreign,
        (502, _) => Code::DialFailed,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::problem::Problem;

    #[test]
    fn a_client_hears_of_every_refusal_of_another_host_what_it_would_hear_there() {
        for there in Code::ALL {
            let said = Problem::from(Refusal::new(there, "x"));
            let here = code(said.status, said.error, said.retry_after.is_some());
            let heard = Problem::from(Refusal::new(here, "x"));
            let of = |problem: Problem| (problem.status, problem.error, problem.retry_after);
            assert_eq!(of(heard), of(said), "{there}: {here}");
        }
        assert_eq!(
            code(StatusCode::SERVICE_UNAVAILABLE, "x", false),
            Code::Locked
        );
    }
}
