//! The HTTP forward proxy: absolute-form and CONNECT, to VMs by name, over HTTP/1.1 and HTTP/2.
//!
//! `client` checks each request before hyper reads it; what is refused there, or later, has a [`Problem`] for its answer, and
//! ends its connection. A request is then an authority, which names a destination; [`reach`](crate::reach) finds, decides and
//! dials. aditd is in the way of an absolute-form body, and out of the way of a CONNECT tunnel, which has its client from the
//! port process on (`connect`). Whoever begins to speak HTTP/2 is served by `http2`.

mod absolute;
mod bodies;
pub(crate) mod client;
mod connect;
pub mod cut_off;
pub(crate) mod ends;
pub(crate) mod fields;
mod guest;
pub(crate) mod http2;
mod interim;
pub(crate) mod linger;
mod own;
mod patience;
pub mod pool;
pub mod problem;
mod upgrade;
mod who;

pub use adit_reach::authority;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

use crate::access::callers::Asking;
use crate::front::party::Party;
use crate::front::stream::Stream;
use crate::listen::Place;
use crate::peers::{Carried, asked};
use crate::state::State;
use crate::visit::Visit;
use client::{Client, FIELDS_MAX, HEADER_MAX, Notes};
use connect::Handed;
use ends::{ClientIo, UnderWay};
use interim::Interims;
use problem::{Body, Problem};
use upgrade::Upgraded;

/// The head of a request as hyper gets it, for the fuzz target of that name; none: it is refused.
pub fn checked_head(head: &[u8]) -> Option<Vec<u8>> {
    client::checked_head(head)
}

/// Serves a client to its end.
pub async fn connection(
    state: Arc<State>,
    client: Stream,
    (asking, party): (Asking, Party),
    place: Place,
) {
    let (place, stop) = (Arc::new(place), state.stop.clone());
    let (under_way, notes) = (UnderWay::default(), Notes::default());
    // After `101 Switching Protocols`.
    let onward = Mutex::new(None);
    // After CONNECT: nothing more is said to the client here.
    let handed = CancellationToken::new();
    // Unless its tunnel leads to another host.
    let carried = Mutex::new(None);
    let client = ClientIo::new(client, under_way.clone());
    let interim = Interims::Http1(client.interim());
    let client = Client::new(client, place.clone(), notes.clone());
    let service = service_fn(|request: Request<Incoming>| {
        let under_way = under_way.clone();
        // Of an answer to HEAD there is no body to come, whatever it says.
        let head = request.method() == Method::HEAD;
        let after = After {
            onward: &onward,
            handed: &handed,
            carried: &carried,
        };
        let parent = fields::given_trace(request.headers());
        let now_ms = state.now_ms();
        let visit = state.visits.begin(place.listener(), "http", parent, now_ms);
        visit.method(request.method().as_str());
        let by = (&asking, visit);
        let answered = answer(&state, by, &notes, &interim, after, request);
        async move {
            let answer = answered.await;
            Ok::<_, Infallible>(answer.map(|body| ends::answered(body, under_way, head)))
        }
    });
    let mut served = http1::Builder::new()
        // `Client` has the deadlines, and tells who ended its sending from who is gone.
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(HEADER_MAX + 1)
        .max_headers(FIELDS_MAX)
        // Names of fields go on as they came, and ours look like most.
        .preserve_header_case(true)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(client), service);
    let ended = tokio::select! {
        ended = &mut served => Some(ended),
        () = place.evicted.cancelled() => return,
        () = handed.cancelled() => None,
        () = stop.cancelled() => {
            std::pin::Pin::new(&mut served).graceful_shutdown();
            tokio::select! {
                ended = &mut served => Some(ended),
                () = handed.cancelled() => None,
            }
        }
    };
    let Some(ended) = ended else {
        drop(served);
        let carried = carried.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(carried) = carried {
            carried.carry(&stop).await;
        }
        return;
    };
    if let Err(e) = ended {
        tracing::debug!(error = %e, "client connection ended");
        return;
    }
    let client = match served.into_parts().io.into_inner().into_http2() {
        Ok((client, ahead)) => {
            return http2::connection(state, client, ahead, (asking, party), place).await;
        }
        Err(client) => *client,
    };
    let onward = onward.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(upgraded) = onward {
        return upgraded.carry(client, &stop).await;
    }
    if let Some(problem) = client.unanswered() {
        let now_ms = state.now_ms();
        let visit = state.visits.begin(place.listener(), "http", None, now_ms);
        visit.answered(problem.status.as_u16(), problem.error);
        log_refusal(problem, &visit.trace().id());
        state.metrics.request(false, problem.status.as_u16());
    }
    tokio::select! {
        _ = client.end() => {}
        () = place.evicted.cancelled() => {}
        () = stop.cancelled() => {}
    }
}

/// What becomes of a client's connection that is not one of requests any more.
#[derive(Clone, Copy)]
struct After<'a> {
    onward: &'a Mutex<Option<Upgraded>>,
    handed: &'a CancellationToken,
    carried: &'a Mutex<Option<Carried>>,
}

async fn answer(
    state: &Arc<State>,
    (asking, visit): (&Asking, Visit),
    notes: &Notes,
    interim: &Interims,
    after: After<'_>,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let connect = request.method() == Method::CONNECT;
    let result = match who::asks(state, asking, &mut request).await {
        Err(problem) => Err(problem),
        Ok(caller) if connect => match connect::open(state, &caller, notes, &request, &visit).await
        {
            Ok(whose) => {
                let status = match whose {
                    Handed::Over => StatusCode::OK,
                    Handed::Carried(carried) => {
                        let mut place =
                            after.carried.lock().unwrap_or_else(PoisonError::into_inner);
                        *place = Some(carried);
                        StatusCode::OK
                    }
                    Handed::Lost => StatusCode::BAD_GATEWAY,
                };
                state.metrics.request(connect, status.as_u16());
                drop(visit);
                after.handed.cancel();
                return std::future::pending().await;
            }
            Err(problem) => Err(who::may_log_in(state, &caller, problem)),
        },
        Ok(caller) if asked::is_to_host(state, &request) => {
            visit.caller(&caller);
            visit.ended();
            let answer = asked::answer(state, &caller, request).await;
            answer.map(|answer| (answer, None))
        }
        Ok(caller) => match own::answer(&mut request) {
            Some(answer) => {
                visit.caller(&caller);
                visit.ended();
                Ok((answer, None))
            }
            None => {
                let no_path = notes.has_no_path();
                absolute::handle(state, &caller, interim, request, no_path, &visit)
                    .await
                    .map_err(|problem| who::may_log_in(state, &caller, problem))
            }
        },
    };
    if let Ok((answer, _)) = &result {
        visit.answered(answer.status().as_u16(), "");
    }
    let result = result.map(|(answer, next)| {
        *after.onward.lock().unwrap_or_else(PoisonError::into_inner) = next;
        answer
    });
    let response = result.unwrap_or_else(|problem| {
        // Where a body was refused on its way, that is why the VM had no whole request.
        let problem = notes.refused().unwrap_or(&problem);
        visit.answered(problem.status.as_u16(), problem.error);
        log_refusal(problem, &visit.trace().id());
        problem.response()
    });
    state.metrics.request(connect, response.status().as_u16());
    response
}

fn log_refusal(problem: &Problem, trace_id: &str) {
    tracing::info!(status = problem.status.as_u16(), detail = %adit_names::escape(&problem.detail), trace_id, "request refused");
}
