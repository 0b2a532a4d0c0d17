//! CONNECT: dial, answer 200, hand the client's socket to the port process, forget it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use adit_port::control::PREFIX_MAX;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Parts};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::ends::ClientIo;
use super::problem::{Body, Problem};
use super::{authority, dial};
use crate::link::DialedStream;
use crate::state::State;

/// Answers a CONNECT.
pub(super) async fn handle(
    state: &Arc<State>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Problem> {
    let Some(named) = request.uri().authority().map(|a| a.as_str().to_owned()) else {
        return Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "http_request_error",
            "CONNECT names VM:PORT",
        ));
    };
    let to = authority::parse(&named, None)?;
    let (stream, share) = dial(state, &to).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    state.clients.spawn(async move {
        if let Err(e) = hand_over(upgrade, stream).await {
            tracing::debug!(vm = %to.vm, error = %e, "tunnel not begun");
        }
        // From here on the tunnel is the port process's.
        drop(share);
    });
    Ok(Response::new(
        Empty::<Bytes>::new()
            .map_err(|never| match never {})
            .boxed(),
    ))
}

/// hyper gives the socket back once the 200 is written; what the client sent behind its request goes ahead of the rest.
async fn hand_over(upgrade: OnUpgrade, stream: DialedStream) -> Result<(), String> {
    let upgraded = upgrade.await.map_err(|e| e.to_string())?;
    let Parts { io, read_buf, .. } = upgraded
        .downcast::<TokioIo<ClientIo>>()
        .map_err(|_| "not a TCP client".to_owned())?;
    let client = io.into_inner().into_tcp().and_then(TcpStream::into_std);
    let client = client.map_err(|e| e.to_string())?;
    if read_buf.len() > PREFIX_MAX {
        return Err(format!(
            "{} bytes were sent ahead of the answer",
            read_buf.len()
        ));
    }
    stream
        .attach(OwnedFd::from(client), read_buf.to_vec())
        .await
        .map_err(|e| e.text)
}
