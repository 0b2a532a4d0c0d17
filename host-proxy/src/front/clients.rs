//! Clients whose protocol ends where their tunnel begins.

use std::io;
use std::sync::Arc;

use adit_channel::refusal::{Code, Refusal};
use hyper::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::handed::{Words, hand, refuse};
use super::sni::{self, Hello};
use super::socks5::{self, Socks5, Step, Why};
use super::stream::Stream;
use crate::access::Caller;
use crate::access::callers::Asking;
use crate::access::log_in::log_in;
use crate::listen::{HEADER_LIMIT, Place};
use crate::proxy::problem::Problem;
use crate::reach::Destination;
use crate::state::State;

/// Bytes that are read at once.
const PIECE: usize = 2048;

/// Any client of a listener that leads to one place.
pub async fn any(state: Arc<State>, client: Stream, asking: Asking, place: Place, to: Destination) {
    let Some(caller) = unless_over(&state, &place, asking.caller()).await else {
        return;
    };
    let caller = caller.led();
    let words = Words {
        speaks: "any",
        greeting: vec![],
        refusal: |_: &Refusal| vec![],
    };
    hand(&state, &caller, &to, client, vec![], words, place).await;
}

/// A client that speaks TLS to a VM; `port` is the one that it connected to.
pub async fn tls(state: Arc<State>, mut client: Stream, asking: Asking, place: Place, port: u16) {
    let mut bytes = Vec::new();
    let hello = async {
        loop {
            match sni::read(&bytes) {
                Hello::More if bytes.len() < sni::HELLO_MAX => {
                    more(&mut client, &mut bytes).await?
                }
                hello => return io::Result::Ok(hello),
            }
        }
    };
    let asked = async { (timeout(HEADER_LIMIT, hello).await, asking.caller().await) };
    let Some((hello, caller)) = unless_over(&state, &place, asked).await else {
        return;
    };
    let to = match hello {
        Ok(Ok(Hello::Named(name))) => {
            Destination::named(&state.config.names.suffix, &name, Some(port)).ok()
        }
        Ok(Ok(Hello::Unnamed)) => None,
        _ => return,
    };
    let Some(to) = to else {
        let problem = Problem::malformed("its TLS names no server that could be a VM");
        note_early(&state, &place, "tls", &caller, &problem);
        return refuse(&state, client, &sni::UNRECOGNIZED_NAME, &place).await;
    };
    let words = Words {
        speaks: "tls",
        greeting: vec![],
        refusal: |refusal: &Refusal| match refusal.code() {
            Code::UnknownVm | Code::Ambiguous | Code::NotAllowed => sni::UNRECOGNIZED_NAME.to_vec(),
            _ => sni::INTERNAL_ERROR.to_vec(),
        },
    };
    hand(&state, &caller, &to, client, bytes, words, place).await;
}

/// A client that speaks SOCKS5.
pub async fn socks5(state: Arc<State>, mut client: Stream, asking: Asking, place: Place) {
    let Some(mut caller) = unless_over(&state, &place, asking.caller()).await else {
        return;
    };
    let (mut bytes, mut socks) = (Vec::new(), Socks5::default());
    let asked = async {
        let mut step = socks.step(&bytes);
        loop {
            step = match step {
                Step::More if bytes.len() < socks5::BYTES_MAX => {
                    more(&mut client, &mut bytes).await?;
                    socks.step(&bytes)
                }
                Step::Say(words) => {
                    client.write_all(&words).await?;
                    socks.step(&bytes)
                }
                Step::Token(token) => match log_in(&state, &caller, Some(&token)) {
                    Ok(name) => {
                        caller = caller.with_token(&name);
                        asking.is(&state, &caller);
                        socks.logged_in(true)
                    }
                    Err(_) => socks.logged_in(false),
                },
                step => return io::Result::Ok(step),
            };
        }
    };
    let Some(asked) = unless_over(&state, &place, timeout(HEADER_LIMIT, asked)).await else {
        return;
    };
    let (to, ahead) = match asked {
        Ok(Ok(Step::Connect { name, port, len })) => (
            Destination::named(&state.config.names.suffix, &name, Some(port)),
            bytes.split_off(len),
        ),
        Ok(Ok(Step::Refuse(said, why))) => {
            let problem = Problem::malformed(why.to_string());
            let problem = match why {
                Why::Malformed(_) => problem,
                Why::NoToken => Problem {
                    status: StatusCode::PROXY_AUTHENTICATION_REQUIRED,
                    error: "http_request_denied",
                    ..problem
                },
            };
            note_early(&state, &place, "socks5", &caller, &problem);
            return refuse(&state, client, &said, &place).await;
        }
        _ => return,
    };
    let to = match to {
        Ok(to) => to,
        Err(e) => {
            let problem = Problem::from(Refusal::new(Code::UnknownVm, e.to_string()));
            note_early(&state, &place, "socks5", &caller, &problem);
            let said = socks5::answer(socks5::reply(Code::UnknownVm));
            return refuse(&state, client, &said, &place).await;
        }
    };
    let words = Words {
        speaks: "socks5",
        greeting: socks5::answer(0),
        refusal: |refusal: &Refusal| socks5::answer(socks5::reply(refusal.code())),
    };
    hand(&state, &caller, &to, client, ahead, words, place).await;
}

/// Writes down that a client was refused before it was known which VM it means.
fn note_early(
    state: &State,
    place: &Place,
    speaks: &'static str,
    caller: &Caller,
    problem: &Problem,
) {
    let visit = state
        .visits
        .begin(place.listener(), speaks, None, state.now_ms());
    let status = problem.status.as_u16();
    visit.caller(caller);
    visit.answered(status, problem.error);
    state.metrics.tunnel(speaks, status);
    let (detail, trace_id) = (adit_names::escape(&problem.detail), visit.trace().id());
    tracing::info!(%detail, trace_id, "connection refused");
}

/// What is waited for; none: somebody else needs the place, or aditd stops.
pub async fn unless_over<T>(
    state: &State,
    place: &Place,
    waited: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        waited = waited => Some(waited),
        () = place.evicted.cancelled() => None,
        () = state.stop.cancelled() => None,
    }
}

/// Reads what is there.
async fn more(client: &mut Stream, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut piece = [0; PIECE];
    match client.read(&mut piece).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        n => {
            bytes.extend_from_slice(&piece[..n]);
            Ok(())
        }
    }
}
