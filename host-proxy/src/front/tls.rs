//! TLS to clients: it ends here, and what is within it goes on as a plain client's would.
//!
//! ```text
//!  client ══ TLS ══ [ thread of its own: handshake, then pump ] ═══ pair ─ the other end: served, then handed over
//! ```
//! Strangers choose how much a handshake costs, so all of TLS is on one thread beside the one that serves everybody: a flood of
//! handshakes slows other clients of TLS listeners, and nobody else. A handshake has [`HEADER_LIMIT`], and the place of a
//! connection that has not spoken. The client's share is held until its connection ends, also for a tunnel, which ends with
//! aditd's worker.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, RwLock};

use adit_channel::socket_end;
use adit_passed::Closer;
use rustls::pki_types::CertificateDer;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::read_ahead::ReadAhead;
use super::stream::Stream;
use super::{PASSED_MAX, pump};
use crate::access::certificate::{Authority, Certificate};
use crate::config::{Config, ListenConfig, Terms};
use crate::listen::{HEADER_LIMIT, Room};
use crate::passing::Socket;
use crate::proxy::linger;

/// First byte of a TLS connection: a record of the handshake (RFC 8446 §5.1).
const HANDSHAKE: u8 = 22;

/// TLS of all listeners.
#[derive(Debug)]
pub struct Tls {
    /// In the order of [`Config::fronts`].
    of: Vec<OfListener>,
    thread: Option<Handle>,
}

#[derive(Debug, Default)]
struct OfListener {
    terms: RwLock<Option<Terms>>,
    authority: Arc<Authority>,
}

impl OfListener {
    fn set(&self, listen: &ListenConfig) {
        let terms = match listen.terms() {
            Ok(terms) => terms,
            // The configuration was checked.
            Err((key, why)) => {
                tracing::error!(key, why, "a certificate is not used");
                return;
            }
        };
        self.authority
            .set(terms.as_ref().and_then(|terms| terms.authority.clone()));
        *self.terms.write().unwrap_or_else(PoisonError::into_inner) = terms;
    }
}

/// A client whose handshake has ended well.
#[derive(Debug)]
pub struct Opened {
    /// What it says within TLS.
    pub client: Stream,
    /// What it has shown.
    pub certificate: Option<Certificate>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum NotOpened {
    /// It speaks something else.
    #[error("the client speaks no TLS")]
    Plain(TcpStream),
    /// The handshake failed.
    #[error("{0}")]
    Failed(#[from] io::Error),
    /// It came and went, as whoever looks whether a port is open.
    #[error("the client said nothing")]
    Silent,
    /// It took too long.
    #[error("the handshake did not end within {HEADER_LIMIT:?}")]
    Slow,
}

impl Tls {
    /// As the configuration has it.
    pub fn new(config: &Config) -> Self {
        let fronts = config.fronts();
        let of = fronts.iter().map(|listen| {
            let of = OfListener::default();
            of.set(listen);
            of
        });
        let thread = match thread() {
            Ok(thread) => Some(thread),
            Err(e) => {
                tracing::error!(error = %e, "no thread for TLS: clients of its listeners are not served");
                None
            }
        };
        Self {
            of: of.collect(),
            thread,
        }
    }

    /// Replaces certificates, from the next connection on. What a listener is not in `newer`, keeps its own.
    pub fn renew(&self, config: &Config, newer: &Config) {
        // The first is that of [proxy].
        let listeners = self.of.iter().skip(1);
        for (of, newer) in listeners.zip(config.certificates_of(newer)) {
            if let Some(newer) = newer {
                of.set(&newer);
            }
        }
    }

    /// What the nth listener does with TLS now; none: it speaks none.
    pub fn terms(&self, nth: usize) -> Option<Terms> {
        let of = self.of.get(nth)?;
        of.terms
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Shakes hands with a client of the nth listener. `held` is what it holds until its connection ends.
    ///
    /// # Errors
    /// It is not served.
    pub async fn open(
        &self,
        nth: usize,
        terms: Terms,
        client: TcpStream,
        room: Room,
        held: impl Send + 'static,
    ) -> Result<Opened, NotOpened> {
        let thread = self.thread.as_ref();
        let thread = thread.ok_or_else(|| io::Error::other("there is no thread for TLS"))?;
        let client = client.into_std()?;
        let (tell, told) = oneshot::channel();
        thread.spawn(async move {
            serve(terms, client, room, tell).await;
            drop(held);
        });
        let told = told.await.map_err(io::Error::other)?;
        let (end, chain) = told.map_err(|why| match why {
            Ended::Plain(client) => match TcpStream::from_std(client) {
                Ok(client) => NotOpened::Plain(client),
                Err(e) => e.into(),
            },
            Ended::Failed(e) => e.into(),
            Ended::Slow => NotOpened::Slow,
            Ended::Silent => NotOpened::Silent,
        })?;
        let authority = self.of.get(nth).map(|of| of.authority.clone());
        Ok(Opened {
            client: Stream::Pair(UnixStream::from_std(end)?),
            certificate: Certificate::new(chain, authority.unwrap_or_default()),
        })
    }
}

/// Starts the thread. It ends with the process.
fn thread() -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("tls".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

/// [`NotOpened`], on its way from one runtime to the other.
enum Ended {
    Plain(std::net::TcpStream),
    Failed(io::Error),
    Slow,
    Silent,
}

type Told = Result<(std::os::unix::net::UnixStream, Vec<CertificateDer<'static>>), Ended>;

/// A client to its end, on the thread. Whoever waits for `tell` and does so no more has given it up.
async fn serve(
    terms: Terms,
    client: std::net::TcpStream,
    room: Room,
    mut tell: oneshot::Sender<Told>,
) {
    let shaken = tokio::select! {
        shaken = timeout(HEADER_LIMIT, shake(terms, client, room)) => shaken,
        () = tell.closed() => return,
    };
    let (mut client, ours, theirs) = match shaken.unwrap_or(Err((Ended::Slow, None))) {
        Ok(shaken) => shaken,
        Err((why, client)) => {
            let told = tell.send(Err(why));
            if let (Ok(()), Some(mut client)) = (told, client) {
                // What it has sent ahead would take away the alert that says why.
                let _ = linger::end(&mut client, None, true).await;
            }
            return;
        }
    };
    let (socket, session) = client.get_ref();
    let socket = socket.tcp();
    let chain = session.peer_certificates().unwrap_or_default();
    let chain = chain.iter().map(|one| one.clone().into_owned()).collect();
    // Whatever breaks off breaks off there too: an end without `close_notify` may pass for one.
    socket_end::reset_on_close(socket, true);
    let Ok(duplicate) = socket.as_fd().try_clone_to_owned() else {
        return;
    };
    if tell.send(Ok((theirs, chain))).is_err() {
        return;
    }
    if pump::pump(&mut client, ours, Some(&duplicate)).await {
        socket_end::reset_on_close(client.get_ref().0.tcp(), false);
    }
}

type Shaken = (
    tokio_rustls::server::TlsStream<ReadAhead>,
    Socket,
    std::os::unix::net::UnixStream,
);

/// Returns the client besides, if it is to hear why not.
async fn shake(
    terms: Terms,
    client: std::net::TcpStream,
    room: Room,
) -> Result<Shaken, (Ended, Option<TcpStream>)> {
    let failed = |e: io::Error| (Ended::Failed(e), None);
    let client = TcpStream::from_std(client).map_err(failed)?;
    let mut first = [HANDSHAKE];
    if client.peek(&mut first).await.map_err(failed)? == 0 {
        return Err((Ended::Silent, None));
    }
    if first != [HANDSHAKE] {
        let client = client.into_std().map_err(failed)?;
        return Err((Ended::Plain(client), None));
    }
    let accepted = TlsAcceptor::from(terms.server).accept(ReadAhead::new(client));
    let accepted = accepted.into_fallible().await;
    let client = accepted.map_err(|(e, client)| (Ended::Failed(e), Some(client.into_tcp())))?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    if !room.spares(&ours) || !room.spares(&theirs) {
        return Err(failed(io::Error::other("few descriptors are left")));
    }
    theirs.set_nonblocking(true).map_err(failed)?;
    // A port process that has the other end may pass descriptors over it.
    let ours = Socket::new(ours, &Closer::new(PASSED_MAX)).map_err(failed)?;
    Ok((client, ours, theirs))
}
