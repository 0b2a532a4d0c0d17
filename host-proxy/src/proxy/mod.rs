//! The HTTP/1.1 forward proxy: absolute-form and CONNECT, to VMs by name.
//!
//! hyper is the one parser that decides what a request is; what it refuses (CL with TE, bad header bytes, too many
//! headers) is answered 400 or 431 and the connection ends. A request is then: authority → VM → allow-list → dial →
//! relay. aditd is in the way of an absolute-form body, and out of the way of a CONNECT tunnel.

mod absolute;
pub mod authority;
mod connect;
mod ends;
pub mod problem;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use adit_port::control::{PREFIX_MAX, Target};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::ports::DialedStream;
use crate::state::State;
use authority::Destination;
use ends::{Answered, ClientIo, UnderWay};
use problem::{Body, Problem};

/// How long a client may take for its header.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of a header. hyper reads no further ahead, so what a client sends behind a CONNECT fits into `Attach`.
const HEADER_MAX: usize = PREFIX_MAX;
/// Most header fields.
const FIELDS_MAX: usize = 100;
/// How long the guest may take to accept a stream.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// Serves clients until told to stop; returns when the requests that were under way have ended.
pub async fn serve(state: Arc<State>, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(state.config.limits.connections));
    loop {
        // A slot first: what is not accepted waits in the kernel's backlog, bounded.
        let accept = async {
            let slot = slots.clone().acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            accepted = accept => accepted,
            () = state.stop.cancelled() => break,
        };
        match accepted {
            Ok((client, _)) => {
                let of_client = state.clone();
                state.clients.spawn(async move {
                    connection(of_client, client).await;
                    drop(slot);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept");
                // Only what ends frees descriptors; asking again at once would spin.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    state.clients.close();
    state.clients.wait().await;
}

async fn connection(state: Arc<State>, client: TcpStream) {
    let _ = client.set_nodelay(true);
    let stop = state.stop.clone();
    let under_way = UnderWay::default();
    let client = ClientIo::new(client, under_way.clone());
    let service = service_fn(|request: Request<Incoming>| {
        let state = state.clone();
        let under_way = under_way.clone();
        async move {
            let answer = answer(&state, request).await;
            Ok::<_, Infallible>(answer.map(|body| Answered::new(body, under_way)))
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

/// Checks who is meant and whether that is allowed, and dials.
async fn dial(state: &State, to: &Destination) -> Result<DialedStream, Problem> {
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
        Target::Service(_) => u16::try_from(to.port).is_ok_and(|p| vm.config.allow.contains(&p)),
        Target::VsockPort(port) => vm.config.allow_vsock.contains(port),
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
    link.dial(to.target.clone(), DIAL_LIMIT)
        .await
        .map_err(|e| Problem::of_dial(to, &e))
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
