//! A token that a caller shows, wherever it does: on the proxy, over SOCKS5, on a management listener.

use super::caller::Caller;
use super::client::Whose;
use crate::state::State;

/// It does not say who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotLoggedIn {
    /// It is no token of this host, or its time is over.
    Wrong,
    /// The caller has shown too many wrong ones: the next is looked at after so many seconds.
    Later(u32),
}

/// Finds out which token it is; none: what is shown cannot be one. Returns its name.
///
/// # Errors
/// There is none of that name. It is written down.
pub fn log_in(state: &State, caller: &Caller, token: Option<&[u8]>) -> Result<String, NotLoggedIn> {
    if let Some(seconds) = must_wait(state, caller) {
        return Err(NotLoggedIn::Later(seconds));
    }
    let tokens = state.callers.tokens();
    if let Some(name) = token.and_then(|token| tokens.name(token, state.now_ms())) {
        return Ok(name.to_owned());
    }
    was_wrong(state, caller);
    Err(NotLoggedIn::Wrong)
}

/// How many seconds it is until a token of a caller is looked at again; none: it is. That it is not is written down.
pub fn must_wait(state: &State, caller: &Caller) -> Option<u32> {
    let wait_ms = state
        .guesses()
        .wait_ms(&Whose::of(caller), state.now_ms())?;
    state.denied(caller, "log-in", "", "", "too-many-tokens");
    Some(u32::try_from(wait_ms.saturating_add(999) / 1000).unwrap_or(u32::MAX))
}

/// A caller has shown what is no token of this host.
pub fn was_wrong(state: &State, caller: &Caller) {
    state.guesses().wrong(&Whose::of(caller), state.now_ms());
    state.denied(caller, "log-in", "", "", "bad-token");
}
