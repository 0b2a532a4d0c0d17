//! What this host answers to others, and to callers who may see its VMs: `GET http://HOST/v1/resolve/VM` on any listener of the proxy, where
//! HOST is this host's own name, which no VM has. Hosts of `[[host]]` also ask there for work: the part of the API that is about goals and
//! tasks, for the callers that they bring.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use adit_api::{HostAnswer, VmAt};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use crate::access::{Caller, Verb};
use crate::api;
use crate::listen::HEADER_LIMIT;
use crate::proxy::problem::{Body, BodyError, Problem};
use crate::state::State;
use crate::vm::VmEntry;

/// Where it is asked.
const PATH: &str = "/v1/resolve";

/// Whether a request is to this host itself, and not for a VM.
pub fn is_to_host<B>(state: &State, request: &Request<B>) -> bool {
    let named = match request.uri().authority() {
        Some(authority) => Some(authority.host()),
        None => {
            let host = request.headers().get(HOST);
            let host = host.and_then(|host| host.to_str().ok());
            host.map(|host| host.rsplit_once(':').map_or(host, |(host, _)| host))
        }
    };
    let named = named.and_then(|named| state.config.names.suffix.host(named));
    named.is_some() && named.as_ref() == state.host()
}

/// The answer to a request to this host itself.
///
/// # Errors
/// It is none that this host answers.
pub async fn answer<B>(
    state: &Arc<State>,
    caller: &Caller,
    request: Request<B>,
) -> Result<Response<Body>, Problem>
where
    B: HttpBody<Data = Bytes, Error: Into<BodyError>> + Send + 'static,
{
    let path = request.uri().path();
    let rest = path
        .strip_prefix(PATH)
        .filter(|_| request.method() == Method::GET);
    match rest {
        Some("") => Ok(said(&of_all(state, caller))),
        Some(rest) if rest.starts_with('/') => Ok(said(&of_one(state, caller, &rest[1..]))),
        // Another host's callers have the part of the API that is about work.
        _ if caller.via().is_some() => of_api(state, caller, request).await,
        _ => Err(Problem::new(
            StatusCode::NOT_FOUND,
            "http_request_error",
            format!(
                "this is host `{}` itself, which answers to GET {PATH}/VM only",
                state.host().map_or("", |host| host.as_str())
            ),
            "for a VM of it, name the VM; for its API use `adit --server` with a listener of role \"management\"",
        )),
    }
}

async fn of_api<B>(
    state: &Arc<State>,
    caller: &Caller,
    request: Request<B>,
) -> Result<Response<Body>, Problem>
where
    B: HttpBody<Data = Bytes, Error: Into<BodyError>> + Send + 'static,
{
    let (parts, body) = request.into_parts();
    let whole = Limited::new(body, api::BODY_MAX).collect();
    let whole = tokio::time::timeout(HEADER_LIMIT, whole).await;
    let Ok(Ok(whole)) = whole else {
        let why = "the request's body is too long, or did not come in time";
        return Err(Problem::malformed(why));
    };
    let mut target = Request::builder().method(parts.method);
    if let Some(path) = parts.uri.path_and_query() {
        target = target.uri(path.as_str());
    }
    let request = target.body(whole.to_bytes());
    let request = request.map_err(|e| Problem::malformed(e.to_string()))?;
    let answer = api::of_other_host(state, caller.clone(), request).await;
    Ok(answer.map(|body| Shared(Mutex::new(body)).map_err(Into::into).boxed()))
}

/// A body that threads may share, as the proxy's are: whoever reads it has it alone.
struct Shared(Mutex<axum::body::Body>);

impl HttpBody for Shared {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let body = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        Pin::new(body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body.size_hint()
    }
}

fn said(answer: &HostAnswer) -> Response<Body> {
    let body = serde_json::to_vec(answer).unwrap_or_default();
    let body = Full::from(Bytes::from(body)).map_err(|never| match never {});
    let mut response = Response::new(body.boxed());
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

fn of_all(state: &State, caller: &Caller) -> HostAnswer {
    let vms = state.registry.all();
    let seen = vms.iter().filter(|vm| is_seen(state, caller, vm));
    HostAnswer {
        host: state.host().map(ToString::to_string),
        vms: seen.map(|vm| at(state, vm)).collect(),
    }
}

fn of_one(state: &State, caller: &Caller, name: &str) -> HostAnswer {
    let vm = name.parse().ok().and_then(|name| state.registry.get(&name));
    let seen = vm.filter(|vm| is_seen(state, caller, vm));
    HostAnswer {
        host: state.host().map(ToString::to_string),
        vms: seen.iter().map(|vm| at(state, vm)).collect(),
    }
}

/// Another host is told of every VM: what its clients hear, their grants there and here decide.
fn is_seen(state: &State, caller: &Caller, vm: &VmEntry) -> bool {
    let (grants, now_ms) = (state.grants(), state.now_ms());
    caller.via().is_some() || vm.viewed(|vm| grants.granted(caller, Verb::See, vm, now_ms).is_ok())
}

/// A VM of this host, as it is claimed.
pub fn at(state: &State, vm: &VmEntry) -> VmAt {
    VmAt {
        name: vm.name.to_string(),
        host: state.host().map(ToString::to_string).unwrap_or_default(),
        live: vm.channel.session(),
        generation: vm.agent.generation(),
        locked: vm.lock.is_on(),
        by_map_of: None,
    }
}
