//! CONNECT: dial, answer 200, hand the client's socket to the port process, forget it.

use std::os::fd::OwnedFd;

use adit_names::VmId;
use adit_port::control::PREFIX_MAX;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::net::TcpStream;

use super::client::Client;
use super::problem::{Body, Problem};
use super::{admit, authority, dial};
use crate::link::DialedStream;
use crate::listen::Share;
use crate::state::State;

/// A stream to a guest that waits for its client.
pub(super) struct Tunnel {
    vm: VmId,
    stream: DialedStream,
    /// Until the tunnel is the port process's.
    _share: Share<VmId>,
}

/// Dials what a CONNECT names.
pub(super) async fn open(state: &State, request: &Request<Incoming>) -> Result<Tunnel, Problem> {
    let named = request.uri().authority();
    let named = named.ok_or_else(|| Problem::malformed("CONNECT names VM:PORT"))?;
    let to = authority::parse(named.as_str(), None)?;
    let admitted = admit(state, &to)?;
    let stream = dial(&admitted.link, &to).await?;
    Ok(Tunnel {
        vm: to.vm,
        stream,
        _share: admitted.share,
    })
}

/// The answer to a CONNECT; hyper gives the socket back once it is written.
pub(super) fn opened() -> Response<Body> {
    let none = Empty::<Bytes>::new().map_err(|never| match never {});
    Response::new(none.boxed())
}

impl Tunnel {
    /// Gives the client to the port process. What the client sent behind its request goes ahead of the rest.
    pub(super) async fn hand_over(self, client: Client) {
        let vm = self.vm.clone();
        if let Err(e) = self.attach(client).await {
            tracing::debug!(%vm, error = %e, "tunnel not begun");
        }
    }

    async fn attach(self, client: Client) -> Result<(), String> {
        let (client, ahead) = client.into_tunnel();
        let client = client.into_tcp().and_then(TcpStream::into_std);
        let client = client.map_err(|e| e.to_string())?;
        if ahead.len() > PREFIX_MAX {
            return Err(format!(
                "{} bytes were sent ahead of the answer",
                ahead.len()
            ));
        }
        self.stream
            .attach(OwnedFd::from(client), ahead.to_vec())
            .await
            .map_err(|e| e.text)
    }
}
