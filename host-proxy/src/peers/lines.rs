//! The connections to one host: HTTP/2 over TLS, each with many questions and tunnels. They are made when they are wanted, and
//! kept as long as that host keeps them.
//!
//! ```text
//!  take ─► one with room for a stream ─┬─ there is one ─► its place
//!                                      └─ none ─► one more is made, by one at a time; all others wait for it
//! ```
//! A host may vanish without a word. A connection that answers neither a request nor a PING in time gets no new streams; what is
//! open on it ends when TCP gives it up, which the kernel finds out ([`pump::keep_asking`]), so nothing wakes here while nothing
//! moves. One that makes work and carries nothing ends as a client's does, with all that is on it
//! ([`calm`](crate::proxy::http2::calm)); all hosts have one thread.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use adit_names::VmId;
use bytes::{Bytes, BytesMut};
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::{PingPong, RecvStream, SendStream};
use hyper::{Request, Response};
use rustix::net::sockopt;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::line::{NoLine, thread};
use super::{Host, tls};
use crate::front::pump;
use crate::front::read_ahead::ReadAhead;
use crate::proxy::http2::answer::{give, size};
use crate::proxy::http2::calm::Calm;
use crate::proxy::http2::meter::{Meter, Metered};
use crate::proxy::http2::{STREAMS_MAX, Sizes};
use crate::state::State;

/// Connections to one host.
pub(super) const LINES_MAX: usize = 16;
/// How long a connection may take to be made, once there is a socket.
const SHAKE_LIMIT: Duration = Duration::from_secs(2);
/// How long an answer may take until it is asked whether the host is there. With [`PONG_LIMIT`] it is less than any question
/// has, so that the question is asked again over another connection.
const DOUBT_AFTER: Duration = Duration::from_millis(500);
/// How long a PING may take.
const PONG_LIMIT: Duration = Duration::from_millis(500);
/// How long what was sent may stay unacknowledged until the kernel gives the connection up.
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(20);
/// Bytes of an answer's fields.
const HEADER_MAX: u32 = 16 << 10;

/// All connections to a host.
#[derive(Debug, Default)]
pub(super) struct Lines {
    lines: Mutex<Vec<Arc<Line>>>,
    /// When the last one that was tried failed, and why: those who have waited for it hear the same.
    making: tokio::sync::Mutex<Option<(Instant, String)>>,
}

/// One of them.
struct Line {
    requests: SendRequest<Bytes>,
    streams: Arc<AtomicUsize>,
    health: Arc<Health>,
    meter: Arc<Meter>,
}

/// What is known of one, also by the task that drives it.
#[derive(Debug, Default)]
struct Health {
    /// It takes no streams any more.
    over: AtomicBool,
    /// Nobody is there: whoever waits for an answer has none to wait for.
    vanished: CancellationToken,
    /// Somebody waits longer than usual.
    doubted: Notify,
    /// It made work and carried nothing: of what it was a flood.
    flood: OnceLock<&'static str>,
}

impl Health {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Why it has ended, where more is known than somebody heard.
    fn why(&self, heard: NoLine) -> NoLine {
        self.flood.get().map_or(heard, |what| NoLine::Flood(what))
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").finish_non_exhaustive()
    }
}

/// A place for a stream. Dropped, it is another's.
#[derive(Debug)]
pub(super) struct Slot {
    line: Arc<Line>,
    /// It was made for this one.
    pub(super) is_new: bool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.line.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Slot {
    /// Sends a request, and waits for what it is answered.
    pub(super) async fn ask(&self, request: Request<()>, rest: Rest) -> Result<Asked, NoLine> {
        let requests = self.line.requests.clone().ready().await;
        let mut requests = requests.map_err(|e| self.line.health.why(e.into()))?;
        let body = match rest {
            Rest::Open => None,
            Rest::Whole(body) => Some(body),
        };
        let is_whole = body.as_ref().is_some_and(Bytes::is_empty);
        let meter = &self.line.meter;
        meter.request();
        meter.wanted(body.as_ref().map_or(0, Bytes::len));
        let (answer, mut stream) = requests.send_request(request, is_whole)?;
        let answer = {
            let sent = async {
                if let Some(body) = body.filter(|body| !body.is_empty()) {
                    // Who does not take all of it says why in the answer.
                    let _ = give(&mut stream, body, true, || true).await;
                }
                std::future::pending().await
            };
            tokio::select! {
                answer = self.answered(answer) => answer?,
                never = sent => never,
            }
        };
        meter.wanted(size(answer.headers()));
        Ok((answer, stream))
    }

    /// Counts bytes that somebody wanted, of either direction.
    pub(super) fn wanted(&self, bytes: usize) {
        self.line.meter.wanted(bytes);
    }

    async fn answered(&self, answer: ResponseFuture) -> Result<Response<RecvStream>, NoLine> {
        let health = &self.line.health;
        let mut answer = pin!(answer);
        if let Ok(answer) = timeout(DOUBT_AFTER, &mut answer).await {
            return answer.map_err(|e| health.why(e.into()));
        }
        health.doubted.notify_one();
        tokio::select! {
            answer = &mut answer => answer.map_err(|e| health.why(e.into())),
            () = health.vanished.cancelled() => Err(health.why(NoLine::Slow)),
        }
    }

    /// Has it take no more streams.
    pub(super) fn give_up(&self) {
        self.line.health.over.store(true, Ordering::Release);
    }
}

/// What follows a request.
#[derive(Clone, Debug)]
pub(super) enum Rest {
    /// What is not known yet: it is a tunnel.
    Open,
    /// A body, which may be empty.
    Whole(Bytes),
}

/// An answer, and what more may be sent.
pub(super) type Asked = (Response<RecvStream>, SendStream<Bytes>);

impl Line {
    fn slot(self: &Arc<Self>, is_new: bool) -> Option<Slot> {
        if self.health.is_over() {
            return None;
        }
        let max = self.requests.current_max_send_streams().min(STREAMS_MAX);
        let ordering = Ordering::AcqRel;
        let more = |n: usize| (n < max).then_some(n + 1);
        let taken = self.streams.fetch_update(ordering, Ordering::Acquire, more);
        taken.is_ok().then(|| Slot {
            line: self.clone(),
            is_new,
        })
    }
}

impl Lines {
    fn lines(&self) -> MutexGuard<'_, Vec<Arc<Line>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place on one that is there.
    fn free(&self) -> Option<Slot> {
        let mut lines = self.lines();
        lines.retain(|line| !line.health.is_over());
        lines.iter().find_map(|line| line.slot(false))
    }

    /// A place for a stream to that host.
    pub(super) async fn take(&self, host: &Host, state: &State) -> Result<Slot, NoLine> {
        if let Some(slot) = self.free() {
            return Ok(slot);
        }
        let since = Instant::now();
        let mut failed = self.making.lock().await;
        if let Some(slot) = self.free() {
            return Ok(slot);
        }
        if let Some((at, why)) = &*failed
            && *at >= since
        {
            return Err(NoLine::Connection(why.clone()));
        }
        if self.lines().len() >= LINES_MAX {
            return Err(NoLine::Full);
        }
        match make(host, state).await {
            Ok(line) => {
                let line = Arc::new(line);
                let slot = line.slot(true);
                self.lines().push(line);
                slot.ok_or(NoLine::Full)
            }
            Err(e) => {
                *failed = Some((Instant::now(), e.to_string()));
                Err(e)
            }
        }
    }
}

async fn make(host: &Host, state: &State) -> Result<Line, NoLine> {
    let failed = |e: &dyn fmt::Display| NoLine::Connection(e.to_string());
    let tls = host.tls.clone();
    let tls = tls.ok_or_else(|| failed(&"there is no `cert` in [peers] to show to it"))?;
    let name =
        tls::server_name(&host.config).ok_or_else(|| failed(&"its name is no name in TLS"))?;
    let turn = state.peers.turn().await;
    let socket = state.monitor.peer(&host.config.name).await;
    drop(turn);
    let socket = socket.map_err(|e| failed(&e))?;
    if !state.room.spares(&socket) {
        state.pool.clear();
        return Err(failed(&"aditd has few descriptors left"));
    }
    let thread = thread(&state.peers).map_err(|e| failed(&e.text()))?;
    let shaken = thread.spawn(shake(socket, tls, name, host.config.name.clone()));
    shaken.await.map_err(|e| failed(&e))?
}

/// Shakes hands, on the thread, and drives the connection there.
async fn shake(
    socket: OwnedFd,
    tls: Arc<ClientConfig>,
    name: ServerName<'static>,
    host: VmId,
) -> Result<Line, NoLine> {
    let failed = |e: io::Error| NoLine::Connection(tls::explained(&e));
    pump::keep_asking(&socket);
    // Without it TCP gives up later.
    let limit = u32::try_from(UNACKNOWLEDGED_LIMIT.as_millis()).unwrap_or(u32::MAX);
    let _ = sockopt::set_tcp_user_timeout(&socket, limit);
    // The monitor has made it such that nobody blocks on it.
    let socket = TcpStream::from_std(socket.into()).map_err(failed)?;
    let _ = socket.set_nodelay(true);
    let meter = Arc::<Meter>::default();
    let shaken = async {
        let tls = TlsConnector::from(tls)
            .connect(name, ReadAhead::new(socket))
            .await;
        let tls = tls.map_err(failed)?;
        if tls.get_ref().1.alpn_protocol() != Some(tls::HTTP) {
            return Err(NoLine::Connection("it does not speak HTTP/2".into()));
        }
        let http = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(Sizes::OF_HOST.window)
            .initial_connection_window_size(STREAMS_MAX as u32 * Sizes::OF_HOST.window)
            .max_frame_size(Sizes::OF_HOST.frame)
            .max_header_list_size(HEADER_MAX)
            .max_send_buffer_size(Sizes::OF_HOST.sending)
            .handshake(Metered::new(tls, BytesMut::new(), meter.clone()));
        Ok(http.await?)
    };
    let shaken = timeout(SHAKE_LIMIT, shaken).await;
    let (requests, connection) = shaken.map_err(|_| NoLine::Slow)??;
    let (health, streams) = (Arc::<Health>::default(), Arc::<AtomicUsize>::default());
    let counted = (meter.clone(), streams.clone());
    tokio::spawn(drive(connection, health.clone(), counted, host));
    Ok(Line {
        requests,
        streams,
        health,
        meter,
    })
}

type Http = Connection<Metered<tokio_rustls::client::TlsStream<ReadAhead>>, Bytes>;

/// Until it ends, there is no more to do on it, or it is a flood.
async fn drive(
    mut connection: Http,
    health: Arc<Health>,
    (meter, streams): (Arc<Meter>, Arc<AtomicUsize>),
    host: VmId,
) {
    let pings = connection.ping_pong();
    let (began, mut calm) = (Instant::now(), Calm::of_host());
    let mut driven = pin!(poll_fn(|cx| {
        meter.new_turn();
        let polled = Pin::new(&mut connection).poll(cx);
        let streams = streams.load(Ordering::Relaxed);
        match calm.look(began.elapsed(), meter.seen(), streams) {
            Some(what) => Poll::Ready(Err(Ended::Flood(what))),
            None => polled.map_err(Ended::Http),
        }
    }));
    let ended = tokio::select! {
        ended = &mut driven => ended,
        () = vanished(pings, &health) => {
            tracing::info!(%host, "a connection to another host does not answer: it gets no more to do");
            health.over.store(true, Ordering::Release);
            health.vanished.cancel();
            driven.await
        }
    };
    health.over.store(true, Ordering::Release);
    match ended {
        Ok(()) => {}
        Err(Ended::Http(e)) => {
            tracing::debug!(%host, error = %e, "a connection to another host ended");
        }
        Err(Ended::Flood(what)) => {
            tracing::warn!(%host, what, "a connection to another host is a flood: it ends");
            // Before those who wait on it hear that it has ended.
            let _ = health.flood.set(what);
            health.vanished.cancel();
        }
    }
}

/// How a connection ended that did not end in order.
enum Ended {
    Http(h2::Error),
    Flood(&'static str),
}

/// Ready once a PING was not answered.
async fn vanished(pings: Option<PingPong>, health: &Health) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        health.doubted.notified().await;
        let pong = timeout(PONG_LIMIT, pings.ping(h2::Ping::opaque())).await;
        if !matches!(pong, Ok(Ok(_))) {
            return;
        }
    }
}
