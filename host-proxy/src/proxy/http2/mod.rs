//! Clients of HTTP/2: many requests and tunnels over one connection, each as HTTP/1.1 would have it.
//!
//! ```text
//!  socket ─► Metered ─► h2 ─┬─ stream ─► head checked ─► who, admitted ─┬─ CONNECT  ═ stream ═ pair ─ the port process
//!            counts, turns  ├─ stream                                   └─ other     absolute: asked anew in HTTP/1.1
//!                           └─ …
//! ```
//! A client says by its first bytes that it speaks HTTP/2 (RFC 9113 §3.4), whether TLS has agreed on that (ALPN `h2`) or it knows
//! beforehand. h2 (the crate) has the protocol; this has what a proxy must decide:
//!
//! - Each stream takes what a connection takes: one of its client's share and a place in the gate ([`Party`]); so nobody gets
//!   more tunnels by having them in one connection. A stream beyond that is answered 503.
//! - A stream that breaks off is reset, towards either side, and an end is an end.
//! - aditd is in the way of all bytes, so a client's tunnels end with aditd's worker.
//! - What one stream may keep in memory is bounded ([`Sizes`]). A window
//!   is a stream's own: one whose VM takes nothing holds up no other.
//! - A connection without a stream makes room for others, and ends after [`IDLE_LIMIT`]; the first stream must come within
//!   [`HEADER_LIMIT`].
//! - A flood ends with GOAWAY ([`calm`]).

pub(crate) mod answer;
mod body;
pub(crate) mod calm;
mod head;
pub(crate) mod meter;
pub(crate) mod tunnel;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use adit_channel::refusal::Refusal;
use adit_names::VmId;
use bytes::{Bytes, BytesMut};
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use hyper::header::{CONTENT_LENGTH, EXPECT, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use super::client::{HEADER_MAX, IDLE_LIMIT};
use super::ends::ClientIo;
use super::interim::Interims;
use super::problem::{self, Body, Problem};
use super::{absolute, authority, fields, linger, log_refusal, own, who};
use crate::access::Caller;
use crate::access::callers::Asking;
use crate::access::client::Whose;
use crate::front::party::Party;
use crate::listen::{HEADER_LIMIT, Place, Share};
use crate::passing::Socket;
use crate::peers::asked;
use crate::reach::{self, Lasts};
use crate::state::State;
use crate::visit::Visit;
use answer::Respond;
use body::Received;
use calm::{Calm, PerClient};
use meter::{Lent, Meter, Metered};
use tunnel::Went;

/// Streams of a connection at the same time.
pub const STREAMS_MAX: usize = 250;
/// How much one stream may have under way.
pub(crate) struct Sizes {
    /// Bytes that come before some were taken.
    pub(crate) window: u32,
    /// Bytes that come in one frame.
    pub(crate) frame: u32,
    /// Bytes that wait to be taken by the other side.
    pub(crate) sending: usize,
}

impl Sizes {
    /// With a client.
    pub(crate) const OF_CLIENT: Self = Self {
        window: 64 << 10,
        frame: 16 << 10,
        sending: 64 << 10,
    };
    /// With another host, which has many clients, and bytes for them that go through two more processes.
    pub(crate) const OF_HOST: Self = Self {
        window: 256 << 10,
        frame: 64 << 10,
        sending: 256 << 10,
    };
}

/// Streams that h2 itself resets, and remembers for a while, until it gives the connection up.
const RESETS_MAX: usize = 256;
/// How long a connection that is told to end may take to hear it.
const BYE_LIMIT: Duration = Duration::from_secs(1);

/// Fields of one connection, which HTTP/2 does not have (RFC 9113 §8.2.2).
const OF_A_CONNECTION: [&str; 5] = [
    "connection",
    "transfer-encoding",
    "upgrade",
    "keep-alive",
    "proxy-connection",
];

type Conn = Connection<Metered<Lent>, Bytes>;
type Asked = (Request<RecvStream>, SendResponse<Bytes>);

/// What the streams of a connection have together.
struct Served {
    state: Arc<State>,
    asking: Asking,
    party: Party,
    meter: Arc<Meter>,
    began: Instant,
    /// Of another host.
    clients: Mutex<PerClient>,
    /// Streams that are there.
    active: AtomicUsize,
    /// There is none any more.
    idle: Notify,
}

/// Which client of another host has a stream, and its shares.
type OfClient = (String, Vec<Share<Whose>>);

impl Served {
    fn clients(&self) -> MutexGuard<'_, PerClient> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream. Dropped: it is over.
struct Active(Arc<Served>);

impl Drop for Active {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_one();
        }
    }
}

/// Serves a client to its end; `ahead` was read of it already.
pub(super) async fn connection(
    state: Arc<State>,
    client: ClientIo,
    ahead: BytesMut,
    (asking, party): (Asking, Party),
    place: Arc<Place>,
) {
    let stop = state.stop.clone();
    let meter = Arc::<Meter>::default();
    let streams = party.max().min(STREAMS_MAX) as u32;
    let io = Arc::new(Mutex::new(client));
    let metered = Metered::new(Lent(io.clone()), ahead, meter.clone());
    let served = Arc::new(Served {
        state,
        asking,
        party,
        meter: meter.clone(),
        began: Instant::now(),
        clients: Mutex::default(),
        active: AtomicUsize::new(0),
        idle: Notify::new(),
    });
    let sizes = match served.party.host() {
        Some(_) => Sizes::OF_HOST,
        None => Sizes::OF_CLIENT,
    };
    let handshake = h2::server::Builder::new()
        .initial_window_size(sizes.window)
        .initial_connection_window_size(streams * sizes.window)
        .max_frame_size(sizes.frame)
        .max_concurrent_streams(streams)
        .max_header_list_size(HEADER_MAX as u32)
        .max_send_buffer_size(sizes.sending)
        .max_local_error_reset_streams(Some(RESETS_MAX))
        .handshake(metered);
    let mut handshake = pin!(handshake);
    let shaken = poll_fn(|cx| {
        meter.new_turn();
        handshake.as_mut().poll(cx)
    });
    let conn = tokio::select! {
        shaken = timeout(HEADER_LIMIT, shaken) => shaken,
        () = place.evicted.cancelled() => return,
        () = stop.cancelled() => return,
    };
    let Ok(Ok(conn)) = conn else {
        return tracing::debug!("a client did not begin to speak HTTP/2");
    };
    let is_read = serve(&served, conn, &place).await;
    // h2 has dropped its half.
    if let Some(Ok(mut client)) = Arc::into_inner(io).map(Mutex::into_inner) {
        place.idle();
        tokio::select! {
            _ = timeout(BYE_LIMIT, linger::end(&mut client, None, !is_read)) => {}
            () = place.evicted.cancelled() => {}
            () = stop.cancelled() => {}
        }
    }
}

/// What happened to a connection.
enum Next {
    Stream(Box<Asked>),
    Over(Result<(), h2::Error>),
    Flood(&'static str),
}

/// Serves its streams until it is over. Returns whether its client has sent all that it was to send.
async fn serve(served: &Arc<Served>, mut conn: Conn, place: &Place) -> bool {
    let (state, meter) = (&served.state, &served.meter);
    let began = served.began;
    let mut calm = match served.party.host() {
        Some(_) => Calm::of_host(),
        None => Calm::of_client(),
    };
    let mut due = began + HEADER_LIMIT;
    // It takes no streams any more; it is told so, and over as soon as it has heard it.
    let (mut stopping, mut ending) = (false, false);
    loop {
        let next = poll_fn(|cx| {
            meter.new_turn();
            let polled = conn.poll_accept(cx);
            let streams = served.active.load(Ordering::Relaxed);
            if !ending && let Some(what) = calm.look(began.elapsed(), meter.seen(), streams) {
                return Poll::Ready(Next::Flood(what));
            }
            polled.map(|next| match next {
                Some(Ok(asked)) => Next::Stream(Box::new(asked)),
                Some(Err(e)) => Next::Over(Err(e)),
                None => Next::Over(Ok(())),
            })
        });
        let is_idle = served.active.load(Ordering::Acquire) == 0;
        tokio::select! {
            // Whether it is idle is known before it has been so for too long.
            biased;
            () = served.idle.notified(), if !ending => {
                if served.active.load(Ordering::Acquire) == 0 {
                    place.idle();
                    due = Instant::now() + if stopping { BYE_LIMIT } else { IDLE_LIMIT };
                }
            }
            () = place.evicted.cancelled(), if !ending => {
                conn.abrupt_shutdown(Reason::NO_ERROR);
                (ending, due) = (true, Instant::now() + BYE_LIMIT);
            }
            () = state.stop.cancelled(), if !stopping => {
                conn.graceful_shutdown();
                (stopping, due) = (true, Instant::now() + BYE_LIMIT);
            }
            () = sleep_until(due), if is_idle || ending => {
                if ending || stopping {
                    return false;
                }
                conn.abrupt_shutdown(Reason::NO_ERROR);
                (ending, due) = (true, Instant::now() + BYE_LIMIT);
            }
            next = next => match next {
                Next::Stream(asked) => begin(served, *asked, place),
                // Whoever is ended may be sending still, and a reset would take away what says why.
                Next::Over(Ok(())) => return !ending,
                Next::Over(Err(e)) if e.is_io() => {
                    tracing::debug!(error = %e, "a client's connection ended");
                    return true;
                }
                Next::Over(Err(e)) => {
                    tracing::info!(error = %e, "a client's HTTP/2 connection broke off");
                    return false;
                }
                Next::Flood(what) => {
                    match served.party.host() {
                        Some(host) => {
                            tracing::warn!(%host, what, "another host's connection is a flood: it ends");
                        }
                        None => tracing::info!(what, "a client's HTTP/2 connection is a flood"),
                    }
                    conn.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    (ending, due) = (true, Instant::now() + BYE_LIMIT);
                }
            },
        }
    }
}

/// Serves a stream on its own.
fn begin(served: &Arc<Served>, (request, respond): Asked, place: &Place) {
    if served.active.fetch_add(1, Ordering::AcqRel) == 0 {
        place.spoke();
    }
    let active = Active(served.clone());
    let meter = &served.meter;
    meter.request();
    meter.wanted(answer::size(request.headers()));
    let respond = Respond::new(respond, meter.clone());
    let clients = &served.state.clients;
    let listener = place.listener().to_owned();
    clients.spawn(async move {
        stream(&active.0, &listener, request, respond).await;
    });
}

/// What a stream is answered.
enum Answer {
    Response(Response<Body>),
    Tunnel(RecvStream, Tunnel),
}

/// The VM's end of a tunnel.
struct Tunnel {
    pair: Socket,
    /// What says which hosts it goes by.
    by: Option<HeaderValue>,
    /// The VM's: the tunnel needs aditd as long as it lasts.
    share: Share<VmId>,
}

async fn stream(served: &Served, listener: &str, request: Request<RecvStream>, respond: Respond) {
    let Served { state, meter, .. } = served;
    let parent = fields::given_trace(request.headers());
    let visit = state
        .visits
        .begin(listener, "http2", parent, state.now_ms());
    visit.method(request.method().as_str());
    let is_head = request.method() == Method::HEAD;
    let connect = request.method() == Method::CONNECT;
    let turn = served.party.one_more();
    // What it has of its host's, if it came by way of one: as long as the stream lasts.
    let of_client = OnceLock::new();
    let answer = async {
        match &turn {
            Ok(_) => answer(served, request, (&respond, &of_client), &visit).await,
            Err(refusal) => Err(refusal.clone().into()),
        }
    };
    let answer = tokio::select! {
        answer = answer => answer,
        () = respond.given_up() => {
            if let Some((client, _)) = of_client.get() {
                served.clients().given_up(client);
            }
            return meter.given_up();
        }
    };
    let answer = answer.unwrap_or_else(|problem| {
        visit.answered(problem.status.as_u16(), problem.error);
        log_refusal(&problem, &visit.trace().id());
        Answer::Response(problem.response())
    });
    let status = match &answer {
        Answer::Response(response) => response.status(),
        Answer::Tunnel(..) => StatusCode::OK,
    };
    state.metrics.request(connect, status.as_u16());
    match answer {
        Answer::Response(response) => respond.answer(response, is_head).await,
        Answer::Tunnel(client, Tunnel { pair, by, share }) => {
            let carried = async {
                match respond.tunnel(by) {
                    Ok(stream) => {
                        visit.answered(StatusCode::OK.as_u16(), "");
                        let count = |went, bytes| {
                            meter.wanted(bytes);
                            match went {
                                Went::FromStream => visit.add_to_vm(bytes),
                                Went::IntoStream => visit.add_from_vm(bytes),
                            }
                        };
                        let both = (client, stream);
                        match tunnel::carry(both, Bytes::new(), &pair, &count).await {
                            Ok(()) => visit.ended(),
                            Err(e) => tracing::debug!(error = %e, "a tunnel in a stream broke off"),
                        }
                    }
                    Err(e) => tracing::debug!(error = %e, "a stream ended before its tunnel"),
                }
            };
            tokio::select! {
                () = carried => {}
                () = state.stop.cancelled() => {}
            }
            drop(share);
        }
    }
}

async fn answer(
    served: &Served,
    request: Request<RecvStream>,
    (respond, of_client): (&Respond, &OnceLock<OfClient>),
    visit: &Visit,
) -> Result<Answer, Problem> {
    let Served {
        state,
        asking,
        party,
        ..
    } = served;
    let (mut head, body) = request.into_parts();
    let no_path = head::check(&mut head, party.over_tls)?;
    let mut request = Request::from_parts(head, ());
    let caller = who::asks(state, asking, &mut request).await?;
    if let Some(host) = caller.via() {
        let weight = state.grants().weight(&caller, state.now_ms());
        let client = caller.client();
        let share = party.one_more_of(host, client, weight)?;
        if !served.clients().request(served.began.elapsed(), client) {
            let text = "this client gives up most of what it asks for: ask again in some seconds";
            return Err(Refusal::busy(text).into());
        }
        // It is set here only.
        let _ = of_client.set((client.to_owned(), share));
    }
    let denied = |problem| who::may_log_in(state, &caller, problem);
    if request.method() == Method::CONNECT {
        let opened = open(state, &caller, &request, visit).await;
        return Ok(Answer::Tunnel(body, opened.map_err(denied)?));
    }
    let (length, expects) = announced(request.headers());
    let expected = expects.then(|| respond.clone());
    let body = Received::new(body, length, expected, served.meter.clone());
    let ours = |answer: Response<Body>| {
        visit.caller(&caller);
        visit.ended();
        visit.answered(answer.status().as_u16(), "");
        Ok(Answer::Response(answer))
    };
    if asked::is_to_host(state, &request) {
        let request = request.map(|()| body);
        return ours(asked::answer(state, &caller, request).await?);
    }
    if let Some(answer) = own::answer(&mut request) {
        return ours(answer);
    }
    let interims = Interims::Http2(respond.clone());
    let request = request.map(|()| body);
    let answered = absolute::handle(state, &caller, &interims, request, no_path, visit).await;
    // Nobody changes to another protocol here: the request asked for none.
    let (response, _) = answered.map_err(denied)?;
    visit.answered(response.status().as_u16(), "");
    Ok(Answer::Response(response))
}

/// Opens the tunnel that a CONNECT asks for.
async fn open(
    state: &Arc<State>,
    caller: &Caller,
    request: &Request<()>,
    visit: &Visit,
) -> Result<Tunnel, Problem> {
    let named = request.uri().authority();
    let named = named.ok_or_else(|| Problem::malformed("CONNECT names VM:PORT"))?;
    let to = authority::parse(&state.config.names.suffix, named.as_str(), None)?;
    let admitted = reach::admit(state, caller, &to, visit).await?;
    let pair = admitted.relayed(state, &to, Lasts::Tunnel).await;
    let (there, here) = (admitted.host(), state.host());
    let pair = pair.map_err(|refusal| Problem::from(refusal).of(there, here))?;
    let by = problem::both(there, here);
    Ok(Tunnel {
        pair,
        by,
        share: admitted.share,
    })
}

/// How long a body is, and whether its client waits until it is asked for it.
fn announced(fields: &HeaderMap) -> (Option<u64>, bool) {
    let text = |name| fields.get(name).and_then(|value| value.to_str().ok());
    let length = text(CONTENT_LENGTH).and_then(|text| text.parse().ok());
    let expects = text(EXPECT).is_some_and(|text| text.eq_ignore_ascii_case("100-continue"));
    (length, expects)
}
