//! Absolute-form: `GET http://VM/path`, carried to the VM and answered. Bodies are streamed, never gathered.
//!
//! aditd is an HTTP intermediary here (RFC 9110 §3.7): each message is made anew in our own version, with the framing
//! that its receiver understands; fields of one connection stay behind ([`fields`]), and where a server changes to another
//! protocol, the client's connection goes with it ([`upgrade`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body as HttpBody, Incoming};
use hyper::header::{EXPECT, HOST, HeaderValue, TRANSFER_ENCODING};
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use tokio_util::sync::CancellationToken;

use super::authority;
use super::bodies::{Expected, Watch, Watched};
use super::fields::{self, Hop};
use super::guest::{Answering, GiveBack, Guest};
use super::interim::Interims;
use super::patience::Moved;
use super::pool::Route;
use super::problem::{self, Body, BodyError, Problem};
use super::upgrade::Upgraded;
use crate::access::Caller;
use crate::reach::{self, Admitted, Destination, Lasts};
use crate::state::State;
use crate::visit::Visit;

/// Port of `http://`.
const HTTP: u16 = 80;

/// Carries one request to the VM that its target names; `no_path`: the target ends with the authority. Interim answers go to the
/// client by way of `interim`. If the server changed to another protocol, that is what goes on after the answer.
pub(super) async fn handle<B: Relayed>(
    state: &Arc<State>,
    caller: &Caller,
    interim: &Interims,
    request: Request<B>,
    no_path: bool,
    visit: &Visit,
) -> Result<(Response<Body>, Option<Upgraded>), Problem> {
    let (to, host) = target(state, request.uri(), request.headers().get(HOST))?;
    let admitted = reach::admit(state, caller, &to, visit).await?;
    let (moved, since) = (Moved::now(), Instant::now());
    let by = By {
        caller,
        moved: &moved,
        interim,
        visit,
    };
    let (request, asked) = outgoing(request, host, no_path, &by);
    // A connection that a server knows as one client's is not for others.
    let bound = fields::binds_connection(request.headers());
    let here = admitted.here();
    let limits = admitted.limits();
    let route = here.and_then(|(vm, link)| Route::new(vm, &to.target, link, limits));
    let route = route.filter(|_| !bound && !asked.upgrade);

    // What is asked to change its protocol may stay for long, and is on a connection of its own.
    let lasts = match asked.upgrade {
        true => Lasts::Tunnel,
        false => Lasts::Request,
    };
    let route = (route, lasts);
    let answer = ask(state, &admitted, &to, &route, request, &moved).await;
    let answer = answer.map_err(|problem| problem.of(admitted.host(), state.host()));
    let (route, _) = route;
    if answer.is_err() {
        interim.forget();
    }
    let (guest, mut response) = answer?;
    if let Some((vm, _)) = admitted.here() {
        vm.dials.first_byte(since);
    }
    visit.first_byte(since.elapsed());
    interim.written().await;

    let received = response.version();
    let bound = fields::binds_connection(response.headers());
    let plain = fields::plain_framing(response.headers_mut()).map_err(|why| {
        let detail = format!("{to}: {why}");
        let status = StatusCode::BAD_GATEWAY;
        Problem::new(status, "http_protocol_error", detail, NO_HTTP)
    })?;
    let hop = Hop::take_from(response.headers_mut());
    fields::add_via(response.headers_mut(), received);
    if let Some(status) = problem::both(admitted.host(), state.host()) {
        response.headers_mut().append("proxy-status", status);
    }
    *response.version_mut() = Version::HTTP_11;
    match response.status() {
        StatusCode::SWITCHING_PROTOCOLS if asked.upgrade => {
            hop.upgrade_only().put_into(response.headers_mut());
            let upgraded = Upgraded::new(guest, admitted.share, visit.clone());
            return Ok((response.map(|_| nothing()), Some(upgraded)));
        }
        StatusCode::SWITCHING_PROTOCOLS => {
            let detail = format!("{to}: the server changed to a protocol that nobody asked for");
            let status = StatusCode::BAD_GATEWAY;
            return Err(Problem::new(status, "http_protocol_error", detail, NO_HTTP));
        }
        // It says to what.
        StatusCode::UPGRADE_REQUIRED => hop.upgrade_only().put_into(response.headers_mut()),
        _ => {}
    }
    if !asked.trailers {
        fields::without_trailers(response.headers_mut());
    }
    // A server of HTTP/1.0 says nothing of how its connection goes on that all agree on.
    let route = route.filter(|_| plain && !bound && received == Version::HTTP_11);
    let mut back = Some(GiveBack::new(state, admitted, route, guest, moved));
    if response.body().is_end_stream()
        && let Some(back) = back.take()
    {
        back.now();
    }
    let answering = Answering::new(back, visit.clone());
    let response = response.map(|body| relayed(Watched::new(body, answering)));
    Ok((response, None))
}

/// What helps where a server breaks the rules of HTTP.
const NO_HTTP: &str =
    "look into the guest: its server breaks the rules of HTTP; CONNECT carries whatever it says";

/// Whom a request is for, and the `Host` that says so.
fn target(
    state: &State,
    uri: &Uri,
    host: Option<&HeaderValue>,
) -> Result<(Destination, HeaderValue), Problem> {
    let bad = |detail: &str| Problem::malformed(detail);
    // A client that wants a WebSocket may ask for `ws://`, which is an `http://` that asks for an upgrade (RFC 6455 §3).
    let is_http = |scheme: &str| {
        ["http", "ws"]
            .iter()
            .any(|s| scheme.eq_ignore_ascii_case(s))
    };
    let named = match (uri.scheme_str(), uri.authority()) {
        (Some(scheme), Some(named)) if is_http(scheme) => named.as_str(),
        (Some(_), _) => {
            return Err(bad(
                "only http:// and ws:// are carried in absolute-form: use CONNECT (curl does for https://)",
            ));
        }
        // Origin-form: of whoever takes this listener for the VM itself. Its head was checked: there is one `Host`.
        (None, _) => match host.and_then(|host| host.to_str().ok()) {
            Some(named) if !named.is_empty() => named,
            _ => {
                return Err(bad(
                    "this is a forward proxy: ask for http://VM/path (curl -x), use CONNECT, or name the VM in Host",
                ));
            }
        },
    };
    let to = authority::parse(&state.config.names.suffix, named, Some(HTTP))?;
    // Where the target has a host, that decides, never the Host field (R65).
    let host = HeaderValue::from_str(named).map_err(|_| bad("the authority is no header value"))?;
    Ok((to, host))
}

/// The target as the VM's server has it.
fn origin(method: &Method, target: &Uri, no_path: bool) -> Uri {
    if no_path && method == Method::OPTIONS {
        // It asks for the whole server (RFC 9112 §3.2.4).
        return Uri::from_static("*");
    }
    // Not by way of its text: the path of `http://VM?q` is empty, and written as `/`.
    let path = target.path_and_query().cloned();
    Uri::from(path.unwrap_or(PathAndQuery::from_static("/")))
}

/// What the client of a request takes.
struct Asked {
    /// Trailers behind the answer.
    trailers: bool,
    /// Another protocol.
    upgrade: bool,
}

/// Whose request it is, and who is told what becomes of it.
struct By<'a> {
    caller: &'a Caller,
    moved: &'a Arc<Moved>,
    interim: &'a Interims,
    visit: &'a Visit,
}

impl By<'_> {
    /// Watches the request's body.
    fn moving(&self) -> Moving {
        Moving {
            moved: self.moved.clone(),
            visit: self.visit.clone(),
        }
    }
}

/// Notes when the body of a request moves, and how much of it has.
struct Moving {
    moved: Arc<Moved>,
    visit: Visit,
}

impl Watch for Moving {
    fn moved(&mut self, bytes: usize) {
        self.moved.note();
        self.visit.add_to_vm(bytes);
    }
}

/// The request as the guest's server gets it.
fn outgoing<B: Relayed>(
    request: Request<B>,
    host: HeaderValue,
    no_path: bool,
    by: &By<'_>,
) -> (Request<Body>, Asked) {
    let received = request.version();
    let has_interim = received >= Version::HTTP_11;
    let (mut parts, body) = request.into_parts();
    let mut hop = Hop::take_from(&mut parts.headers);
    hop.upgrade = hop.upgrade.filter(|_| received == Version::HTTP_11);
    let asked = Asked {
        // In HTTP/2 they are frames, which whoever does not want them skips.
        trailers: hop.trailers || received == Version::HTTP_2,
        upgrade: hop.upgrade.is_some(),
    };
    fields::add_via(&mut parts.headers, received);
    fields::add_forwarded(&mut parts.headers, by.caller.from(), &host);
    parts.headers.insert(HOST, host);
    fields::set_trace(&mut parts.headers, by.visit.trace());
    hop.put_into(&mut parts.headers);
    parts.uri = origin(&parts.method, &parts.uri, no_path);
    parts.version = Version::HTTP_11;
    if !body.is_end_stream() && body.size_hint().exact().is_none() {
        // hyper would send a GET without its body.
        let chunked = HeaderValue::from_static("chunked");
        parts.headers.insert(TRANSFER_ENCODING, chunked);
    }
    let expect = parts.headers.get(EXPECT).filter(|_| has_interim);
    let expects = expect.is_some_and(|e| e.as_bytes().eq_ignore_ascii_case(b"100-continue"));

    let wanted = CancellationToken::new();
    let body = match (body.is_end_stream(), expects) {
        (true, _) => nothing(),
        (false, true) => relayed(Watched::new(
            Expected::new(body, wanted.clone()),
            by.moving(),
        )),
        (false, false) => relayed(Watched::new(body, by.moving())),
    };
    let mut request = Request::from_parts(parts, body);
    let (moved, interim) = (by.moved.clone(), by.interim.clone());
    hyper::ext::on_informational(&mut request, move |said| {
        // The server is there, and at work.
        moved.note();
        if said.status() == StatusCode::CONTINUE {
            wanted.cancel();
        } else if has_interim {
            interim.push(said.status(), said.headers().clone());
        }
    });
    (request, asked)
}

/// Asks the guest's server: over a connection that waits, if there is one and the request may be made twice, else over a
/// new one.
async fn ask(
    state: &State,
    admitted: &Admitted,
    to: &Destination,
    (route, lasts): &(Option<Route>, Lasts),
    request: Request<Body>,
    moved: &Moved,
) -> Result<(Guest, Response<Incoming>), Problem> {
    let limit = Duration::from_secs(state.config.limits.response_s.into());
    let repeatable = request.body().is_end_stream() && request.method().is_idempotent();
    // Any other request takes its place all the same: a server that serves one connection at a time is free then.
    let waiting = route.as_ref().and_then(|r| state.pool.take(r));
    let waiting = waiting.filter(|_| repeatable);
    let mut request = request;
    if let Some(mut guest) = waiting {
        let (parts, nothing_yet) = request.into_parts();
        let first = Request::from_parts(parts.clone(), nothing());
        match guest.ask(to, first, moved, limit).await {
            Ok(response) if response.status() != StatusCode::REQUEST_TIMEOUT => {
                return Ok((guest, response));
            }
            // Said of the time in which it waited (RFC 9110 §15.5.9).
            Ok(_) => request = Request::from_parts(parts, nothing_yet),
            // The server was just closing it (RFC 9110 §9.2.2).
            Err(failed) if failed.unheard => request = Request::from_parts(parts, nothing_yet),
            Err(failed) => return Err(failed.problem),
        }
    }
    let mut guest = Guest::connect(state, admitted, to, *lasts).await?;
    match guest.ask(to, request, moved, limit).await {
        Ok(response) => Ok((guest, response)),
        Err(failed) => Err(failed.problem),
    }
}

/// A body that can be carried.
pub(super) trait Relayed:
    HttpBody<Data = Bytes, Error: Into<BodyError>> + Send + Sync + Unpin + 'static
{
}

impl<B> Relayed for B where
    B: HttpBody<Data = Bytes, Error: Into<BodyError>> + Send + Sync + Unpin + 'static
{
}

fn relayed(body: impl Relayed) -> Body {
    body.map_err(Into::into).boxed()
}

/// No body.
fn nothing() -> Body {
    Empty::<Bytes>::new()
        .map_err(|never| match never {})
        .boxed()
}
