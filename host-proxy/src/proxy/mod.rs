//! The HTTP/1.1 forward proxy: absolute-form and CONNECT, to VMs by name.
//!
//! `client` checks each request before hyper reads it; what is refused there, or later, has a [`Problem`] for its answer, and
//! ends its connection. A request is then an authority, which names a destination; [`reach`](crate::reach) finds, decides and
//! dials. aditd is in the way of an absolute-form body, and out of the way of a CONNECT tunnel, which has its client from the
//! port process on (`connect`).

mod absolute;
pub mod authority;
mod bodies;
mod client;
mod connect;
pub mod cut_off;
mod ends;
mod fields;
mod guest;
mod interim;
pub(crate) mod linger;
mod own;
mod patience;
pub mod pool;
pub mod problem;
mod upgrade;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use adit_channel::refusal::Refusal;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::listen::{Gate, Place, Shares};
use crate::reach::Caller;
use crate::state::State;
use client::{Client, FIELDS_MAX, HEADER_MAX, Notes};
use connect::Handed;
use ends::{ClientIo, UnderWay};
use interim::Interim;
use problem::{Body, Problem};
use upgrade::Upgraded;

/// Connections that are being refused at the same time; more of them are closed without a word.
const REFUSALS_MAX: usize = 8;

/// Serves clients until told to stop; returns when the requests that were under way have ended.
pub async fn serve(state: Arc<State>, listener: TcpListener) {
    let max = state.room.proxy;
    let gate = Gate::new(max);
    let of_each = state.config.limits.connections_per_client;
    let clients = Shares::new(of_each.unwrap_or(max / 2).max(1));
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = state.stop.cancelled() => break,
        };
        let (client, from) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept");
                gate.evict();
                // Only what ends frees descriptors; asking again at once would spin.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if !state.room.spares(&client) {
            // Silent ones have the descriptors that the next one needs, and so have idle connections to guests.
            gate.evict();
            state.pool.clear();
            continue;
        }
        let Some(share) = clients.take(from.ip()) else {
            let why = format!("this client has {} connections open", clients.max());
            let why = Problem::from(Refusal::busy(why));
            if let Ok(slot) = refusals.clone().try_acquire_owned() {
                let stop = state.stop.clone();
                state.clients.spawn(async move {
                    tokio::select! {
                        () = refuse(client, &why) => {}
                        () = stop.cancelled() => {}
                    }
                    drop(slot);
                });
            }
            continue;
        };
        // What is not let in waits in the kernel's backlog, bounded.
        let place = tokio::select! {
            place = gate.enter() => place,
            () = state.stop.cancelled() => break,
        };
        let of_client = state.clone();
        state.clients.spawn(async move {
            connection(of_client, client, Caller::Client(from), place).await;
            drop(share);
        });
    }
    drop(listener);
    state.clients.close();
    state.clients.wait().await;
}

/// Says why there is no connection to be had, whatever was asked.
async fn refuse(mut client: TcpStream, problem: &Problem) {
    let _ = linger::end(&mut client, Some(problem), true).await;
}

async fn connection(state: Arc<State>, client: TcpStream, caller: Caller, place: Place) {
    let _ = client.set_nodelay(true);
    let (place, stop) = (Arc::new(place), state.stop.clone());
    let (under_way, notes) = (UnderWay::default(), Notes::default());
    // After `101 Switching Protocols`.
    let onward = Mutex::new(None);
    // After CONNECT: nothing more is said to the client here.
    let handed = CancellationToken::new();
    let client = ClientIo::new(client, under_way.clone());
    let interim = client.interim();
    let client = Client::new(client, place.clone(), notes.clone());
    let service = service_fn(|request: Request<Incoming>| {
        let under_way = under_way.clone();
        // Of an answer to HEAD there is no body to come, whatever it says.
        let head = request.method() == Method::HEAD;
        let answered = answer(&state, &caller, &notes, &interim, &onward, &handed, request);
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
        ended = &mut served => ended,
        () = place.evicted.cancelled() => return,
        () = handed.cancelled() => return,
        () = stop.cancelled() => {
            std::pin::Pin::new(&mut served).graceful_shutdown();
            tokio::select! {
                ended = &mut served => ended,
                () = handed.cancelled() => return,
            }
        }
    };
    if let Err(e) = ended {
        tracing::debug!(error = %e, "client connection ended");
        return;
    }
    let client = served.into_parts().io.into_inner();
    let onward = onward.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(upgraded) = onward {
        return upgraded.carry(client, &stop).await;
    }
    if let Some(problem) = client.unanswered() {
        log_refusal(problem);
        state.metrics.request(false, problem.status.as_u16());
    }
    tokio::select! {
        _ = client.end() => {}
        () = place.evicted.cancelled() => {}
        () = stop.cancelled() => {}
    }
}

async fn answer(
    state: &Arc<State>,
    caller: &Caller,
    notes: &Notes,
    interim: &Interim,
    onward: &Mutex<Option<Upgraded>>,
    handed: &CancellationToken,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let connect = request.method() == Method::CONNECT;
    let result = if connect {
        match connect::open(state, caller, notes, &request).await {
            Ok(whose) => {
                let status = match whose {
                    Handed::Over => StatusCode::OK,
                    Handed::Lost => StatusCode::BAD_GATEWAY,
                };
                state.metrics.request(connect, status.as_u16());
                handed.cancel();
                return std::future::pending().await;
            }
            Err(problem) => Err(problem),
        }
    } else if let Some(answer) = own::answer(&mut request) {
        Ok((answer, None))
    } else {
        absolute::handle(state, caller, interim, request, notes.has_no_path()).await
    };
    let result = result.map(|(answer, next)| {
        *onward.lock().unwrap_or_else(PoisonError::into_inner) = next;
        answer
    });
    let response = result.unwrap_or_else(|problem| {
        // Where a body was refused on its way, that is why the VM had no whole request.
        let problem = notes.refused().unwrap_or(&problem);
        log_refusal(problem);
        problem.response()
    });
    state.metrics.request(connect, response.status().as_u16());
    response
}

fn log_refusal(problem: &Problem) {
    tracing::info!(status = problem.status.as_u16(), detail = %adit_names::escape(&problem.detail), "request refused");
}
