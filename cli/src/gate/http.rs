//! A client that speaks HTTP: CONNECT, and absolute-form. Each request goes to the host that has its VM over a connection of its own, and what
//! that host's proxy answers goes back as it is, with `Proxy-Status` and `Via` of this one.
//!
//! hyper reads a request and writes it anew, so nobody behind it sees another framing than the one that was read here.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use adit_reach::{Destination, Suffix, authority};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHORIZATION, TRANSFER_ENCODING,
    UPGRADE, VIA,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

use super::problem::{Body, NAME, Problem, whole};
use super::{Ends, Lead, SAY_LIMIT, Shared};

/// Port of `http://`.
const HTTP: u16 = 80;
const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// What goes on after an answer: the client's side, and the other.
type Onward = Mutex<Option<(OnUpgrade, OnUpgrade)>>;

pub async fn serve(
    client: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ends: Ends,
    shared: Arc<Shared<impl Lead>>,
) -> io::Result<()> {
    let onward = Arc::new(Onward::default());
    let service = service_fn(|request| {
        let (shared, onward) = (shared.clone(), onward.clone());
        async move {
            let answer = answer(&shared, request, &onward).await;
            Ok::<_, Infallible>(answer.unwrap_or_else(|problem| problem.response()))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SAY_LIMIT)
        .half_close(true)
        .preserve_header_case(true)
        .serve_connection(TokioIo::new(client), service)
        .with_upgrades()
        .await;
    served.map_err(io::Error::other)?;
    let upgraded = onward.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((client, tunnel)) = upgraded else {
        return Ok(());
    };
    let (client, tunnel) = (client.await, tunnel.await);
    let (client, tunnel) = (
        client.map_err(io::Error::other)?,
        tunnel.map_err(io::Error::other)?,
    );
    ends.carry(TokioIo::new(client), TokioIo::new(tunnel)).await
}

async fn answer(
    shared: &Shared<impl Lead>,
    mut request: Request<Incoming>,
    onward: &Onward,
) -> Result<Response<Body>, Problem> {
    let connect = request.method() == Method::CONNECT;
    let to = destination(&shared.suffix, &request)?;
    let host = shared.hosts.find(&to).await?;
    let mut sender = shared.hosts.reach(&host).await?;
    let client = hyper::upgrade::on(&mut request);
    let mut passed = match connect {
        true => asks_for(&to.at(&host), request.headers().get(PROXY_AUTHORIZATION)),
        false => onto(request),
    };
    if let Some(token) = shared.hosts.token() {
        passed
            .headers_mut()
            .insert(PROXY_AUTHORIZATION, token.clone());
    }
    let answered = sender.send_request(passed).await;
    let mut answer = answered.map_err(|e| {
        let cause = format!("host `{host}`, which has the VM, broke off before it answered: {e}");
        Problem::new(StatusCode::BAD_GATEWAY, "connection_terminated", cause).remedy("try again")
    })?;
    let status = answer.status();
    if status == StatusCode::NOT_FOUND && says_error(answer.headers()) {
        shared.hosts.forget(&to.vm, &host);
    }
    let goes_on = match connect {
        true => status.is_success(),
        false => status == StatusCode::SWITCHING_PROTOCOLS,
    };
    if goes_on {
        let tunnel = hyper::upgrade::on(&mut answer);
        *onward.lock().unwrap_or_else(PoisonError::into_inner) = Some((client, tunnel));
    }
    let mut answer = match connect && goes_on {
        true => answer.map(|_| whole("")),
        false => answer.map(BodyExt::boxed),
    };
    back(answer.headers_mut(), goes_on && !connect);
    *answer.version_mut() = Version::HTTP_11;
    Ok(answer)
}

/// Opens a tunnel for a client that speaks something else. `shown`: the field with its token.
pub(super) async fn tunnel(
    shared: &Shared<impl Lead>,
    to: &Destination,
    shown: Option<&HeaderValue>,
) -> Result<Upgraded, Problem> {
    let host = shared.hosts.find(to).await?;
    let mut sender = shared.hosts.reach(&host).await?;
    let asked = asks_for(&to.at(&host), shown.or(shared.hosts.token()));
    let broke = |e: hyper::Error| {
        let cause = format!("host `{host}`: {e}");
        Problem::new(StatusCode::BAD_GATEWAY, "connection_terminated", cause)
    };
    let mut answer = sender.send_request(asked).await.map_err(broke)?;
    let status = answer.status();
    if status.is_success() {
        return hyper::upgrade::on(&mut answer).await.map_err(broke);
    }
    if status == StatusCode::NOT_FOUND {
        shared.hosts.forget(&to.vm, &host);
    }
    let cause = format!("host `{host}` refuses");
    Err(Problem::new(status, "http_request_denied", cause))
}

/// Whom a request is for.
fn destination(suffix: &Suffix, request: &Request<Incoming>) -> Result<Destination, Problem> {
    let bad = |cause: &str| Problem::new(StatusCode::BAD_REQUEST, "http_request_error", cause);
    let uri = request.uri();
    let connect = request.method() == Method::CONNECT;
    let is_http = |scheme: &str| {
        ["http", "ws"]
            .iter()
            .any(|s| scheme.eq_ignore_ascii_case(s))
    };
    let named = match (uri.scheme_str(), uri.authority()) {
        (None, Some(named)) if connect => named,
        (Some(scheme), Some(named)) if is_http(scheme) => named,
        (Some(_), _) => {
            return Err(bad("only http:// and ws:// are carried in absolute-form")
                .remedy("use CONNECT (curl does for https://)"));
        }
        _ => {
            return Err(bad("this is a forward proxy, and no web server")
                .remedy("ask for http://VM/path (`curl -x`), or use CONNECT"));
        }
    };
    let port = (!connect).then_some(HTTP);
    let to = authority::parse(suffix, named.as_str(), port);
    to.map_err(|e| bad(&e.to_string()).remedy("write VM:PORT, or VM.HOST:PORT"))
}

/// A CONNECT.
fn asks_for(to: &Destination, shown: Option<&HeaderValue>) -> Request<Body> {
    let mut request = Request::new(whole(""));
    *request.method_mut() = Method::CONNECT;
    // What names a VM is a URI's authority.
    *request.uri_mut() = to.authority().parse().unwrap_or_default();
    if let Ok(host) = to.authority().parse() {
        request.headers_mut().insert(HOST, host);
    }
    if let Some(shown) = shown {
        let mut shown = shown.clone();
        shown.set_sensitive(true);
        request.headers_mut().insert(PROXY_AUTHORIZATION, shown);
    }
    request
}

/// A request as the host's proxy gets it: that one sees to what a VM may not get. It also finds the VM by its name, of which the VM hears what the client
/// wrote.
fn onto(request: Request<Incoming>) -> Request<Body> {
    let (mut head, body) = request.into_parts();
    via(&mut head.headers, head.version);
    head.version = Version::HTTP_11;
    // Each has framing of its own.
    head.headers.remove(TRANSFER_ENCODING);
    // A client of HTTP/1.0 needs none.
    let named = head.uri.authority().map(|named| named.as_str().parse());
    if let (None, Some(Ok(named))) = (head.headers.get(HOST), named) {
        head.headers.insert(HOST, named);
    }
    Request::from_parts(head, body.boxed())
}

/// An answer as the client gets it. `changes`: to another protocol.
fn back(head: &mut HeaderMap, changes: bool) {
    let upgrade = head.get(UPGRADE).cloned().filter(|_| changes);
    for field in [
        CONNECTION,
        TRANSFER_ENCODING,
        HeaderName::from_static("keep-alive"),
    ] {
        head.remove(field);
    }
    if let Some(upgrade) = upgrade {
        head.insert(UPGRADE, upgrade);
        head.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    head.append(PROXY_STATUS, HeaderValue::from_static(NAME));
}

fn via(head: &mut HeaderMap, version: Version) {
    let version = if version == Version::HTTP_10 {
        "1.0"
    } else {
        "1.1"
    };
    if let Ok(via) = HeaderValue::from_str(&format!("{version} {NAME}")) {
        head.append(VIA, via);
    }
}

/// Whether an answer is a proxy's own.
fn says_error(head: &HeaderMap) -> bool {
    let status = head.get_all(PROXY_STATUS).iter();
    status
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("error="))
}
