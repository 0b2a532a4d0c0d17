//! The HTTP/1.1 forward proxy: absolute-form and CONNECT, to VMs by name.
//!
//! hyper is the one parser that decides what a request is; what it refuses (CL with TE, bad header bytes, too many
//! headers) is answered 400 or 431 and the connection ends. A request is then: authority → VM → allow-list → dial →
//! relay. aditd is in the way of an absolute-form body, and out of the way of a CONNECT tunnel.

mod absolute;
pub mod authority;
mod bodies;
mod connect;
mod ends;
mod patience;
pub mod problem;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use adit_port::control::{PREFIX_MAX, Target};
use adit_tasks::VmId;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::link::DialedStream;
use crate::listen::{Gate, HEADER_LIMIT, Place, Share, Shares};
use crate::state::State;
use authority::Destination;
use ends::{ClientIo, UnderWay};
use problem::{Body, Problem};

/// Connections that are being refused at the same time; more of them are closed without a word.
const REFUSALS_MAX: usize = 8;
/// How long a client may take to hear that it is refused.
const REFUSAL_LIMIT: Duration = Duration::from_secs(2);
/// Most bytes of a header. hyper reads no further ahead, so what a client sends behind a CONNECT fits into `Attach`.
const HEADER_MAX: usize = PREFIX_MAX;
/// Most header fields.
const FIELDS_MAX: usize = 100;
/// How long the guest may take to accept a stream.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

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
            // Silent ones have the descriptors that the next one needs.
            gate.evict();
            continue;
        }
        let Some(share) = clients.take(from.ip()) else {
            let why = format!("this client has {} connections open", clients.max());
            if let Ok(slot) = refusals.clone().try_acquire_owned() {
                state.clients.spawn(async move {
                    refuse(client, &Problem::busy(why)).await;
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
            connection(of_client, client, &place).await;
            drop((place, share));
        });
    }
    drop(listener);
    state.clients.close();
    state.clients.wait().await;
}

/// Says why there is no connection to be had, whatever was asked.
async fn refuse(mut client: TcpStream, problem: &Problem) {
    let said = async {
        client.write_all(problem.text().as_bytes()).await?;
        client.shutdown().await?;
        // Closed with something unread, the answer would be lost.
        let mut asked = [0; 4096];
        while client.read(&mut asked).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(REFUSAL_LIMIT, said).await;
}

async fn connection(state: Arc<State>, client: TcpStream, place: &Place) {
    let _ = client.set_nodelay(true);
    let stop = state.stop.clone();
    let under_way = UnderWay::default();
    let client = ClientIo::new(client, under_way.clone());
    let service = service_fn(|request: Request<Incoming>| {
        place.spoke();
        let state = state.clone();
        let under_way = under_way.clone();
        // Of an answer to HEAD there is no body to come, whatever it says.
        let head = request.method() == Method::HEAD;
        async move {
            let answer = answer(&state, request).await;
            Ok::<_, Infallible>(answer.map(|body| ends::answered(body, under_way, head)))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(HEADER_MAX)
        .max_headers(FIELDS_MAX)
        // Without half-close: a client that goes away while the guest thinks takes its stream along. A tunnel has left
        // hyper before its half-closes matter.
        .serve_connection(TokioIo::new(client), service)
        .with_upgrades();
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = place.evicted.cancelled() => return,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(e) = ended {
        tracing::debug!(error = %e, "client connection ended");
    }
}

async fn answer(state: &Arc<State>, request: Request<Incoming>) -> Response<Body> {
    let connect = request.method() == Method::CONNECT;
    let result = if connect {
        connect::handle(state, request).await
    } else {
        absolute::handle(state, request).await
    };
    let response = result.unwrap_or_else(|problem| {
        tracing::info!(status = problem.status.as_u16(), detail = %problem.detail.escape_debug(), "request refused");
        problem.response()
    });
    state.metrics.request(connect, response.status().as_u16());
    response
}

/// Checks who is meant and whether that is allowed, and dials. The share is the VM's of the proxy: for as long as the
/// request needs aditd.
async fn dial(state: &State, to: &Destination) -> Result<(DialedStream, Share<VmId>), Problem> {
    let Some(vm) = state.registry.get(&to.vm) else {
        let detail = format!(
            "no VM is named `{}` on this host (`adit vm ls` lists them)",
            to.vm
        );
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            "destination_not_found",
            detail,
        ));
    };
    let allowed = match &to.target {
        Target::Service(_) => u16::try_from(to.port).is_ok_and(|p| vm.spec().allow.contains(&p)),
        Target::VsockPort(port) => vm.spec().allow_vsock.contains(port),
    };
    if !allowed {
        let list = if matches!(to.target, Target::Service(_)) {
            "allow"
        } else {
            "allow_vsock"
        };
        let detail = format!(
            "port {} of VM `{}` is not in its `{list}` list",
            to.port, to.vm
        );
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "http_request_denied",
            detail,
        ));
    }
    let Some(link) = vm.link() else {
        return Err(Problem::no_channel(
            to.vm.as_str(),
            "its port process does not run",
        ));
    };
    let Some(share) = state.vm_shares.take(to.vm.clone()) else {
        let max = state.vm_shares.max();
        let detail = format!("VM `{}` has {max} requests under way already", to.vm);
        return Err(Problem::busy(detail));
    };
    let stream = link.dial(to.target.clone(), DIAL_LIMIT).await;
    Ok((stream.map_err(|e| Problem::of_dial(to, &e))?, share))
}

/// A pair of connected Unix stream sockets.
fn socket_pair() -> io::Result<(
    std::os::unix::net::UnixStream,
    std::os::unix::net::UnixStream,
)> {
    std::os::unix::net::UnixStream::pair()
}

/// aditd itself is short of something.
fn internal(what: &str, e: impl std::fmt::Display) -> Problem {
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "proxy_internal_error",
        format!("{what}: {e}"),
    )
}
