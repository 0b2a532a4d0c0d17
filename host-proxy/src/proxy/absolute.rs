//! Absolute-form: `GET http://VM/path`. One dial a request; bodies are streamed, never gathered.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use adit_port::control::{DialFailed, Target};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
    TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
};
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;

use super::bodies::Watched;
use super::ends::{self, GuestIo};
use super::patience::{Moved, in_time};
use super::problem::{Body, Problem};
use super::{authority, dial, internal, socket_pair};
use crate::passing::Socket;
use crate::state::State;

/// Port of `http://`.
const HTTP: u16 = 80;
/// Most header fields of an answer. Programs set a cookie for each thing that they keep; curl takes as many, too.
const ANSWER_FIELDS_MAX: usize = 1000;
const VIA_ADIT: HeaderValue = HeaderValue::from_static("1.1 adit");

/// Carries one request to the VM that its target names; `no_path`: the target ends with the authority.
pub(super) async fn handle(
    state: &Arc<State>,
    mut request: Request<Incoming>,
    no_path: bool,
) -> Result<Response<Body>, Problem> {
    let uri = request.uri().clone();
    let bad = |detail: &str| Problem::new(StatusCode::BAD_REQUEST, "http_request_error", detail);
    let named = match (uri.scheme_str(), uri.authority()) {
        (Some("http"), Some(named)) => named.as_str(),
        (Some(_), _) => {
            return Err(bad(
                "only http:// is carried in absolute-form: use CONNECT (curl does for https://)",
            ));
        }
        (None, _) => {
            return Err(bad(
                "this is a forward proxy: ask for http://VM/path (curl -x) or use CONNECT",
            ));
        }
    };
    let to = authority::parse(named, Some(HTTP))?;
    // The target decides, never the Host field (R65).
    let host = HeaderValue::from_str(named).map_err(|_| bad("the authority is no header value"))?;
    let (stream, share) = dial(state, &to).await?;
    let (ours, theirs) = socket_pair().map_err(|e| internal("no socket", e))?;
    if !state.room.spares(&ours) || !state.room.spares(&theirs) {
        return Err(Problem::busy("aditd has few descriptors left"));
    }
    let ours = Socket::new(ours, stream.closer()).map_err(|e| internal("no socket", e))?;
    // Of a listener without an agent nobody knows: most programs just close.
    let ours = GuestIo::new(ours, matches!(to.target, Target::Service(_)));
    stream
        .attach(OwnedFd::from(theirs), Vec::new())
        .await
        .map_err(|e: DialFailed| Problem::of_dial(&to, &e))?;

    let headers = request.headers_mut();
    strip_hop_by_hop(headers);
    headers.insert(HOST, host);
    headers.append(VIA, VIA_ADIT);
    *request.uri_mut() = origin(request.method(), &uri, no_path);
    *request.version_mut() = hyper::Version::HTTP_11;

    let broken = |e: hyper::Error| {
        let detail = format!("VM `{}` port {}: {e}", to.vm, to.port);
        Problem::new(StatusCode::BAD_GATEWAY, "http_response_incomplete", detail)
    };
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_headers(ANSWER_FIELDS_MAX)
        .handshake(TokioIo::new(ours))
        .await
        .map_err(broken)?;
    tokio::spawn(ends::drive(connection));
    let moved = Moved::now();
    let request = request.map(|body| Watched::new(body, moved.clone()));
    let limit = Duration::from_secs(state.config.limits.response_s.into());
    let mut response = in_time(sender.send_request(request), &moved, limit)
        .await
        .ok_or_else(|| {
            let detail = format!(
                "VM `{}` port {}: no answer began within {limit:?}",
                to.vm, to.port
            );
            Problem::new(StatusCode::GATEWAY_TIMEOUT, "http_response_timeout", detail)
        })?
        .map_err(broken)?;
    strip_hop_by_hop(response.headers_mut());
    response.headers_mut().append(VIA, VIA_ADIT);
    Ok(response.map(|body| Watched::new(body, share).boxed()))
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

/// Takes out what concerns one connection only (RFC 9110 §7.6.1), and what is meant for this proxy.
fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    let own = ["proxy-connection", "keep-alive"].map(HeaderName::from_static);
    let fields = [
        CONNECTION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
        PROXY_AUTHORIZATION,
        PROXY_AUTHENTICATE,
    ];
    for name in own.into_iter().chain(fields) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_fields_and_those_named_by_connection_are_taken_out() {
        let mut h = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("proxy-authorization", "Basic x"),
            ("te", "trailers"),
            ("upgrade", "websocket"),
            ("proxy-connection", "keep-alive"),
            ("accept", "*/*"),
        ] {
            h.append(name, value.parse().unwrap());
        }
        strip_hop_by_hop(&mut h);
        assert_eq!(
            h.keys().map(HeaderName::as_str).collect::<Vec<_>>(),
            ["accept"]
        );
    }
}
