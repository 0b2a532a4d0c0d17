//! Who asks over HTTP: whoever the connection is from, with the token that a request shows.

use adit_channel::refusal::{Code, Refusal};
use hyper::header::PROXY_AUTHORIZATION;
use hyper::{Request, StatusCode};

use super::problem::Problem;
use crate::access::Caller;
use crate::access::callers::Asking;
use crate::access::tokens::shown;
use crate::state::State;

/// Finds out who asks. The field that says so goes no further.
///
/// # Errors
/// A token is shown that is none, or two are: whoever shows one means to be somebody, and is not served as anybody else.
pub(super) async fn asks<B>(
    state: &State,
    asking: &Asking,
    request: &mut Request<B>,
) -> Result<Caller, Problem> {
    let caller = asking.caller().await;
    let fields = request.headers().get_all(PROXY_AUTHORIZATION);
    let is_one = fields.iter().count() <= 1;
    let Some(field) = request.headers_mut().remove(PROXY_AUTHORIZATION) else {
        return Ok(caller);
    };
    let tokens = state.callers.tokens();
    if tokens.is_empty() {
        // It is another proxy's, as of a client that uses several.
        return Ok(caller);
    }
    let token = shown(field.as_bytes()).filter(|_| is_one);
    let name = token.and_then(|token| {
        let name = tokens.name(&token, state.now_ms())?;
        Some(name.to_owned())
    });
    match name {
        Some(name) => Ok(caller.with_token(&name)),
        None => {
            state.denied(&caller, "log-in", "", "", "bad-token");
            Err(log_in(
                "what Proxy-Authorization shows is not one token of this host, or its time is over",
            ))
        }
    }
}

/// What somebody of whom nothing is known hears, where a token may help: how to show it.
pub(super) fn may_log_in(state: &State, caller: &Caller, problem: Problem) -> Problem {
    let hidden = Problem::from(Refusal::new(Code::UnknownVm, ""));
    let is_denied = problem.status == hidden.status && problem.error == hidden.error;
    if caller.is_anonymous() && is_denied && !state.callers.tokens().is_empty() {
        return log_in(
            "whoever you are may not do this: show a token (`curl --proxy-user x:TOKEN`)",
        );
    }
    problem
}

fn log_in(detail: &str) -> Problem {
    let status = StatusCode::PROXY_AUTHENTICATION_REQUIRED;
    Problem::new(status, "http_request_denied", detail)
}
