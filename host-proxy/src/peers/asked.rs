//! What this host answers to others, and to callers who may see its VMs: `GET http://HOST/v1/resolve/VM` on any listener of the proxy, where
//! HOST is this host's own name, which no VM has.

use adit_api::{HostAnswer, VmAt};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use crate::access::{Caller, Verb};
use crate::proxy::problem::{Body, Problem};
use crate::state::State;
use crate::vm::VmEntry;

/// Where it is asked.
const PATH: &str = "/v1/resolve";

/// The answer to a request to this host itself; none: it is for a VM.
pub fn answer<B>(
    state: &State,
    caller: &Caller,
    request: &Request<B>,
) -> Option<Result<Response<Body>, Problem>> {
    let own = state.host()?;
    let named = match request.uri().authority() {
        Some(authority) => authority.host(),
        None => {
            let host = request.headers().get(HOST)?.to_str().ok()?;
            host.rsplit_once(':').map_or(host, |(host, _)| host)
        }
    };
    let is_own = state.config.names.suffix.host(named).as_ref() == Some(own);
    is_own.then(|| {
        let path = request.uri().path();
        let rest = path
            .strip_prefix(PATH)
            .filter(|_| request.method() == Method::GET);
        match rest {
            Some("") => Ok(said(&of_all(state, caller))),
            Some(rest) if rest.starts_with('/') => Ok(said(&of_one(state, caller, &rest[1..]))),
            _ => Err(Problem::new(
                StatusCode::NOT_FOUND,
                "http_request_error",
                format!("`{own}` is this host, which answers to GET {PATH}/VM only"),
            )),
        }
    })
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
    }
}
