//! One HTTP/1.1 connection to a server in a guest: dialled, asked, used again or ended in order.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, Connection, Parts, SendRequest};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::bodies::Watch;
use super::ends::{GuestIo, Heard};
use super::patience::{Moved, in_time};
use super::pool::{IDLE_LIMIT, Pool, Route};
use super::problem::{Body, Problem};
use crate::listen::Share;
use crate::reach::dial::ends_in_order;
use crate::reach::{Admitted, Destination, Lasts};
use crate::state::State;
use crate::visit::Visit;
use adit_names::VmId;

/// Most header fields of an answer. Programs set a cookie for each thing that they keep; curl takes as many, too.
const FIELDS_MAX: usize = 1000;

/// What is left of a connection that speaks HTTP no more: the stream, and what was read from it already.
pub(super) type Left = Parts<TokioIo<GuestIo>>;

/// A connection. Dropped, it ends in order once nothing is under way on it.
pub(super) struct Guest {
    id: u64,
    sender: SendRequest<Body>,
    heard: Heard,
    /// Breaks the connection off, whatever is under way on it.
    given_up: CancellationToken,
    /// To whom the driver hands the stream after an upgrade; dropped: it ends the stream.
    claim: Option<oneshot::Sender<oneshot::Sender<Left>>>,
}

/// Why there is no answer.
pub(super) struct Failed {
    /// For the client.
    pub(super) problem: Problem,
    /// The connection ended before any byte of an answer came.
    pub(super) unheard: bool,
}

impl Guest {
    /// Dials.
    pub(super) async fn connect(
        state: &State,
        admitted: &Admitted,
        to: &Destination,
        lasts: Lasts,
    ) -> Result<Self, Problem> {
        let ours = admitted.relayed(state, to, lasts).await?;
        let heard = Heard::default();
        let ours = GuestIo::new(ours, ends_in_order(&to.target), heard.clone());
        let (sender, connection) = Builder::new()
            .preserve_header_case(true)
            .title_case_headers(true)
            .max_headers(FIELDS_MAX)
            .handshake(TokioIo::new(ours))
            .await
            .map_err(|e| incomplete(to, &e))?;
        let (claim, claimed) = oneshot::channel();
        let id = state.pool.next_id();
        let given_up = CancellationToken::new();
        let driver = Driver {
            id,
            vm: to.vm.clone(),
            pool: state.pool.clone(),
            removed: admitted.removed(),
            given_up: given_up.clone(),
        };
        tokio::spawn(driver.drive(connection, claimed));
        Ok(Self {
            id,
            sender,
            heard,
            given_up,
            claim: Some(claim),
        })
    }

    /// Whether it can be asked right now. It may still be closing.
    pub(super) fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    /// Asks, and waits for the head of the answer for as long as the body of the request moves, and `limit` after that.
    pub(super) async fn ask(
        &mut self,
        to: &Destination,
        request: Request<Body>,
        moved: &Moved,
        limit: Duration,
    ) -> Result<Response<Incoming>, Failed> {
        let before = self.heard.bytes();
        match in_time(self.sender.send_request(request), moved, limit).await {
            Some(Ok(response)) => Ok(response),
            Some(Err(e)) => Err(Failed {
                problem: incomplete(to, &e),
                // It was not sent at all if what came was said of the time before it.
                unheard: e.is_canceled() || self.heard.bytes() == before,
            }),
            None => {
                let detail = format!("{to}: no answer began within {limit:?}");
                let status = StatusCode::GATEWAY_TIMEOUT;
                Err(Failed {
                    problem: Problem::new(status, "http_response_timeout", detail, SLOW),
                    unheard: false,
                })
            }
        }
    }

    /// The stream, after the server has changed to another protocol.
    pub(super) fn switched(mut self) -> oneshot::Receiver<Left> {
        let (hand, left) = oneshot::channel();
        if let Some(claim) = self.claim.take() {
            // Without its driver there is nothing to hand over, and the receiver sees that.
            let _ = claim.send(hand);
        }
        left
    }
}

/// Drives a connection.
struct Driver {
    id: u64,
    vm: VmId,
    pool: Arc<Pool>,
    removed: CancellationToken,
    given_up: CancellationToken,
}

impl Driver {
    /// Drives it until it is over, and ends it in order or hands its stream on.
    async fn drive(
        self,
        connection: Connection<TokioIo<GuestIo>, Body>,
        claimed: oneshot::Receiver<oneshot::Sender<Left>>,
    ) {
        let Self { id, pool, .. } = &self;
        let ended = connection.without_shutdown();
        tokio::pin!(ended);
        let mut look = tokio::time::Instant::now() + IDLE_LIMIT;
        let mut is_removed = false;
        let ended = loop {
            tokio::select! {
                ended = &mut ended => break ended,
                () = tokio::time::sleep_until(look) => look = pool.expire(*id),
                () = self.removed.cancelled(), if !is_removed => {
                    is_removed = true;
                    pool.forget(*id);
                }
                () = self.given_up.cancelled() => return,
            }
        };
        pool.forget(*id);
        match ended {
            Ok(left) => {
                let unclaimed = match claimed.await {
                    Ok(to) => to.send(left).err(),
                    Err(_) => Some(left),
                };
                if let Some(left) = unclaimed {
                    let ended = left.io.into_inner().end();
                    pool.end(*id, self.vm.clone(), ended).await;
                }
            }
            Err(e) => tracing::debug!(error = %e, "connection to a guest ended"),
        }
    }
}

/// Watches the body of an answer: its end gives the connection back, and is the visit's.
pub(super) struct Answering {
    back: Option<GiveBack>,
    visit: Visit,
}

impl Answering {
    pub(super) fn new(back: Option<GiveBack>, visit: Visit) -> Self {
        if back.is_none() {
            // There is no body.
            visit.ended();
        }
        Self { back, visit }
    }
}

/// A connection that is asked, and what it may be used for again.
pub(super) struct GiveBack {
    guest: Guest,
    /// None: it is for this request only.
    route: Option<Route>,
    pool: Arc<Pool>,
    removed: CancellationToken,
    /// When the body of the request moved last, and how long it may rest.
    moved: Arc<Moved>,
    limit: Duration,
    /// The VM's, of the proxy: until both sides have said all.
    _share: Share<VmId>,
}

impl Watch for Answering {
    fn moved(&mut self, bytes: usize) {
        self.visit.add_from_vm(bytes);
    }

    fn ended(&mut self) {
        self.visit.ended();
        if let Some(back) = self.back.take() {
            back.now();
        }
    }
}

impl GiveBack {
    pub(super) fn new(
        state: &State,
        admitted: Admitted,
        route: Option<Route>,
        mut guest: Guest,
        moved: Arc<Moved>,
    ) -> Self {
        guest.claim = None;
        Self {
            guest,
            route,
            pool: state.pool.clone(),
            removed: admitted.removed(),
            moved,
            limit: Duration::from_secs(state.config.limits.response_s.into()),
            _share: admitted.share,
        }
    }

    /// The answer has ended. The connection waits for the next request as soon as both sides have said all, if it is still
    /// open then. A request that rests in the middle of its body, though it is answered, is given up: hyper waits for ever
    /// (hyperium/hyper#4176).
    pub(super) fn now(self) {
        if self.guest.is_ready() {
            self.put();
        } else {
            let mut back = self;
            back.moved.note();
            tokio::spawn(async move {
                let ready = back.guest.sender.ready();
                match in_time(ready, &back.moved, back.limit).await {
                    Some(Ok(())) => back.put(),
                    Some(Err(_)) => {}
                    None => back.guest.given_up.cancel(),
                }
            });
        }
    }

    fn put(self) {
        if let Some(route) = self.route.filter(|_| !self.removed.is_cancelled()) {
            self.pool.put(self.guest.id, route, self.guest);
        }
    }
}

fn incomplete(to: &Destination, e: &hyper::Error) -> Problem {
    let detail = format!("{to}: {e}");
    let remedy = "look into the guest: its server ended the connection, or what it says is no HTTP";
    let status = StatusCode::BAD_GATEWAY;
    Problem::new(status, "http_response_incomplete", detail, remedy)
}

/// What helps where a server takes long.
const SLOW: &str = "look into the guest: its server is slow; `[limits] response_s` in aditd.toml is how long it may take";
