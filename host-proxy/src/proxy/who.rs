//! Who asks over HTTP: whoever the connection is from, with the token that a request shows.

use adit_channel::refusal::{Code, Refusal};
use hyper::header::PROXY_AUTHORIZATION;
use hyper::{Request, StatusCode};

use super::problem::Problem;
use crate::access::Caller;
use crate::access::callers::Asking;
use crate::access::log_in::{must_wait, was_wrong};
use crate::access::tokens::shown;
use crate::peers::hop::{self, CALLER};
use crate::reach::dial::STRANGE;
use crate::state::State;

/// What helps where somebody has to say who they are.
const SHOW_A_TOKEN: &str =
    "show a token of the host: `curl --proxy-user x:TOKEN`; `adit access token` there makes one";

/// Finds out who asks. The field that says so goes no further.
///
/// # Errors
/// A token is shown that is none, or two are: whoever shows one means to be somebody, and is not served as anybody else.
pub(super) async fn asks<B>(
    state: &State,
    asking: &Asking,
    request: &mut Request<B>,
) -> Result<Caller, Problem> {
    let caller = found(state, asking, request).await?;
    asking.is(state, &caller);
    Ok(caller)
}

async fn found<B>(
    state: &State,
    asking: &Asking,
    request: &mut Request<B>,
) -> Result<Caller, Problem> {
    let caller = asking.caller().await;
    let claims = request.headers().get_all(CALLER);
    let is_one_claim = claims.iter().count() <= 1;
    // It is nobody's but the next host's.
    let claims = request.headers_mut().remove(CALLER);
    let caller = match state.peers.of(&caller) {
        Some(host) => {
            let claims = claims.filter(|_| is_one_claim);
            let claims = claims.as_ref().map(|claims| claims.as_bytes());
            let vouched = claims.map(|claims| hop::vouched(claims, &host.config));
            let caller = caller.by_way_of(&host.config.name, vouched.unwrap_or_default());
            caller.for_client(hop::client(claims.unwrap_or_default()))
        }
        None => caller,
    };
    let fields = request.headers().get_all(PROXY_AUTHORIZATION);
    let is_one = fields.iter().count() <= 1;
    let Some(field) = request.headers_mut().remove(PROXY_AUTHORIZATION) else {
        return Ok(caller);
    };
    let tokens = state.callers.tokens();
    // The host that has the VM may know it.
    let may_pass = is_one && caller.via().is_none() && !state.peers.all().is_empty();
    let token = shown(field.as_bytes()).filter(|_| is_one);
    if let Some(seconds) = must_wait(state, &caller) {
        return Err(Problem {
            retry_after: Some(seconds),
            ..Problem::new(
                StatusCode::TOO_MANY_REQUESTS,
                "http_request_denied",
                "too many wrong tokens came from there: none is looked at for a while",
                "wait as long as Retry-After says, and show a token that is right",
            )
        });
    }
    let name = token.and_then(|token| {
        let name = tokens.name(&token, state.now_ms())?;
        Some(name.to_owned())
    });
    match name {
        Some(name) if may_pass => Ok(caller.with_token(&name).with_shown(field.as_bytes(), false)),
        Some(name) => Ok(caller.with_token(&name)),
        None if may_pass => Ok(caller.with_shown(field.as_bytes(), true)),
        // It may be a token of the host that they came by way of.
        None if caller.via().is_some() => Ok(caller),
        None => {
            was_wrong(state, &caller);
            Err(must_log_in(STRANGE))
        }
    }
}

/// What somebody of whom nothing is known hears, where a token may help: how to show it.
pub(super) fn may_log_in(state: &State, caller: &Caller, problem: Problem) -> Problem {
    let hidden = Problem::from(Refusal::new(Code::UnknownVm, ""));
    let is_denied = problem.status == hidden.status && problem.error == hidden.error;
    if caller.shows_strange() && (is_denied || problem.status == StatusCode::FORBIDDEN) {
        was_wrong(state, caller);
        return must_log_in(STRANGE);
    }
    if caller.is_anonymous() && is_denied && !state.callers.tokens().is_empty() {
        return must_log_in("nobody may do this without saying who they are");
    }
    problem
}

fn must_log_in(detail: &str) -> Problem {
    let status = StatusCode::PROXY_AUTHENTICATION_REQUIRED;
    Problem::new(status, "http_request_denied", detail, SHOW_A_TOKEN)
}
