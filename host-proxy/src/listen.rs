//! What every listener has (I8): a cap on its connections, a share of it for each client, a deadline for a request's header,
//! and descriptors that it leaves to the operator's socket.
//!
//! Where a listener is full, the connection that has been silent for longest makes room: idle connections lock nobody out.
//! The kernel gives out the lowest free descriptor, so one whose number is high tells that the process has few left; whoever
//! may do without gives it back then ([`Room::spares`]).

mod strict;

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_api::ErrorBody;
use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use http_body_util::{BodyExt, Limited};
use hyper::Request;
use hyper::body::{Body as _, Incoming};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::resource::{Resource, getrlimit};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::metrics::{Listener as Counted, Turned};
use crate::proxy::linger;
use crate::proxy::problem::Problem;
use crate::taken::Taken;
use strict::{Refused, Strict};

/// How long a client may take for a request's header, and again for its body.
pub const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// How long a client of the API may read nothing of its answer.
const READ_LIMIT: Duration = Duration::from_secs(30);
/// Descriptors that are left to the operator's socket and to aditd itself at most.
const RESERVE_MAX: usize = 256;
/// Connections of the API at most.
const API_MAX: usize = 128;
/// Connections of the metrics' listener at most.
const METRICS_MAX: usize = 64;
/// Connections of management listeners at most.
const MANAGEMENT_MAX: usize = 64;
/// Descriptors of a VM that may wait to be closed at least.
const CLOSING_MIN: usize = 8;
/// Descriptors that a request through the proxy takes: the client's, and both ends of a pair.
const OF_A_REQUEST: usize = 3;

/// How many descriptors this process may have.
fn descriptors() -> usize {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    usize::try_from(soft).unwrap_or(usize::MAX)
}

/// Descriptors of one VM that may wait to be closed: with more of them in the table there would be none left for others.
pub fn closing_max() -> usize {
    (descriptors() / 16).max(CLOSING_MIN)
}

/// How many connections there may be, by how many descriptors this process may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Descriptors from this number on are not for clients of the proxy, of metrics, and for guests.
    spare_from: usize,
    /// Connections of the API.
    pub api: usize,
    /// Connections of the metrics' listener.
    pub metrics: usize,
    /// Connections of all management listeners together; 0: there are none.
    pub management: usize,
    /// Connections of the proxy.
    pub proxy: usize,
}

impl Room {
    /// Divides what the process has; `proxy` is what the configuration allows, and whether it has a management listener.
    pub fn of_process(proxy: usize, is_managed: bool) -> Self {
        Self::new(descriptors(), proxy, is_managed)
    }

    fn new(descriptors: usize, proxy: usize, is_managed: bool) -> Self {
        let reserve = (descriptors / 4).clamp(8, RESERVE_MAX);
        let metrics = (descriptors / 16).clamp(2, METRICS_MAX);
        let spare_from = descriptors.saturating_sub(reserve);
        let management = match is_managed {
            true => (descriptors / 32).clamp(2, MANAGEMENT_MAX),
            false => 0,
        };
        let others = metrics + OF_A_REQUEST * management;
        Self {
            spare_from,
            api: (reserve / 2).min(API_MAX),
            metrics,
            management,
            proxy: (spare_from.saturating_sub(others) / OF_A_REQUEST).clamp(1, proxy.max(1)),
        }
    }

    /// Whether a client's or a guest's new descriptor leaves enough to others.
    pub fn spares(&self, fd: &impl AsRawFd) -> bool {
        usize::try_from(fd.as_raw_fd()).is_ok_and(|fd| fd < self.spare_from)
    }
}

/// So much for each of many, and no more.
#[derive(Debug)]
pub struct Shares<K: Eq + Hash> {
    max: usize,
    held: Mutex<HashMap<K, Held>>,
}

/// What one has.
#[derive(Clone, Copy, Debug)]
struct Held {
    taken: usize,
    /// How many times `max` it may have.
    weight: usize,
}

/// One of a [`Shares`]. Dropped = given back.
#[derive(Debug)]
pub struct Share<K: Eq + Hash> {
    of: Arc<Shares<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> Shares<K> {
    /// `max` for each.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            held: Mutex::default(),
        })
    }

    /// Takes one; none: `key` has all that it may.
    pub fn take(self: &Arc<Self>, key: K) -> Option<Share<K>> {
        self.take_of(key, self.max)
    }

    /// The same for one that may have so many, and so many times its weight.
    pub fn take_of(self: &Arc<Self>, key: K, max: usize) -> Option<Share<K>> {
        let mut held = self.held();
        let (taken, weight) = held.get(&key).map_or((0, 1), |of| (of.taken, of.weight));
        if taken >= max.saturating_mul(weight) {
            return None;
        }
        let taken = taken + 1;
        held.insert(key.clone(), Held { taken, weight });
        Some(Share {
            of: self.clone(),
            key,
        })
    }

    /// As many times what others have, for as long as it has one. A weight that it has shown before is kept if it is higher.
    pub fn weigh(&self, key: &K, weight: usize) {
        if let Some(held) = self.held().get_mut(key) {
            held.weight = held.weight.max(weight);
        }
    }

    /// Nobody has a weight any more until it is shown again.
    pub fn forget_weights(&self) {
        for held in self.held().values_mut() {
            held.weight = 1;
        }
    }

    /// How many this one may have.
    pub fn max_of(&self, key: &K) -> usize {
        let weight = self.held().get(key).map_or(1, |held| held.weight);
        self.max.saturating_mul(weight)
    }

    /// How many each may have.
    pub fn max(&self) -> usize {
        self.max
    }
}

impl<K: Eq + Hash> Shares<K> {
    /// How many this one has.
    pub fn taken(&self, key: &K) -> usize {
        self.held().get(key).map_or(0, |held| held.taken)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<K, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut held = self.of.held();
        // Whoever has none has no entry: the map is as large as there are connections.
        match held.get_mut(&self.key) {
            Some(of) if of.taken > 1 => of.taken -= 1,
            _ => drop(held.remove(&self.key)),
        }
    }
}

/// A connection that says nothing: what ends it, and what counts that.
type Silent = (CancellationToken, Arc<Counted>);

/// The connections of a listener, or of several together.
#[derive(Debug)]
pub struct Gate {
    slots: Arc<Semaphore>,
    /// Those that have asked for nothing yet, or are idle again, by age.
    silent: Mutex<BTreeMap<u64, Silent>>,
    next: AtomicU64,
    /// One more is silent.
    falls_silent: Notify,
    /// What is counted of its listener.
    pub counted: Arc<Counted>,
}

/// A connection's place. Dropped = free.
#[derive(Debug)]
pub struct Place {
    gate: Arc<Gate>,
    counted: Arc<Counted>,
    /// Its age among the silent ones.
    nth: AtomicU64,
    /// Another one needs the place, and nothing is under way on this one.
    pub evicted: CancellationToken,
    slot: Slot,
}

/// What a place takes of its gate, for whoever needs it for longer than the place itself. The last one that is dropped frees it.
pub type Slot = Option<Arc<OwnedSemaphorePermit>>;

impl Gate {
    /// As many connections at the same time as its listener may have.
    pub fn new(counted: Arc<Counted>) -> Arc<Self> {
        Arc::new(Self {
            slots: Arc::new(Semaphore::new(counted.max)),
            silent: Mutex::default(),
            next: AtomicU64::new(0),
            falls_silent: Notify::new(),
            counted,
        })
    }

    /// As [`enter_of`](Self::enter_of), for the gate's own listener.
    pub async fn enter(self: &Arc<Self>) -> Place {
        self.enter_of(&self.counted).await
    }

    /// Waits for a place for a client of this listener; the oldest silent connection makes it, if there is none, or else the
    /// first that falls silent.
    pub async fn enter_of(self: &Arc<Self>, counted: &Arc<Counted>) -> Place {
        let slot = match self.slots.clone().try_acquire_owned() {
            Ok(slot) => Some(slot),
            Err(_) => {
                let free = self.slots.clone().acquire_owned();
                let evicted = async {
                    loop {
                        let next = self.falls_silent.notified();
                        if self.evict() {
                            break;
                        }
                        next.await;
                    }
                };
                tokio::pin!(free);
                // It is never closed.
                tokio::select! {
                    slot = &mut free => slot.ok(),
                    () = evicted => free.await.ok(),
                }
            }
        };
        let place = Place {
            gate: self.clone(),
            counted: counted.clone(),
            nth: AtomicU64::new(0),
            evicted: CancellationToken::new(),
            slot: slot.map(Arc::new),
        };
        counted.opened();
        place.idle();
        place
    }

    /// What a stream takes beside its connection's place, without waiting; none: as many as there may be are there, of which the
    /// oldest silent one makes room for the next.
    pub fn one_more(&self) -> Slot {
        let slot = self.slots.clone().try_acquire_owned();
        if slot.is_err() {
            self.evict();
        }
        slot.ok().map(Arc::new)
    }

    /// Ends the oldest silent connection; false: there is none.
    pub fn evict(&self) -> bool {
        let oldest = self.silent().pop_first();
        if let Some((_, (oldest, counted))) = &oldest {
            oldest.cancel();
            counted.turned(Turned::Silent);
        }
        oldest.is_some()
    }

    fn silent(&self) -> MutexGuard<'_, BTreeMap<u64, Silent>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Keeps the gate's slot beyond the place.
    pub fn slot(&self) -> Slot {
        self.slot.clone()
    }

    /// Name of the listener.
    pub fn listener(&self) -> &str {
        &self.counted.name
    }

    /// A whole request has come: it is not cut off for another.
    pub fn spoke(&self) {
        let nth = self.nth.load(Ordering::Relaxed);
        self.gate.silent().remove(&nth);
    }

    /// Nothing is under way any more: it makes room, after those that have been silent for longer.
    pub fn idle(&self) {
        self.spoke();
        let nth = self.gate.next.fetch_add(1, Ordering::Relaxed);
        self.nth.store(nth, Ordering::Relaxed);
        let silent = (self.evicted.clone(), self.counted.clone());
        self.gate.silent().insert(nth, silent);
        self.gate.falls_silent.notify_waiters();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.spoke();
        self.counted.closed();
    }
}

/// Who may have a request served at all. It is asked before the request's body is read.
pub trait Admits {
    /// Lets a request in, and says in it whose it is.
    ///
    /// # Errors
    /// What is answered instead.
    fn admit(&self, request: &mut Parts) -> impl Future<Output = Result<(), Response>> + Send;
}

/// Serves the API, or a part of it, one request a connection, until told to stop; `spares` says which connections leave
/// enough descriptors to others, and `admits` who they are.
pub async fn serve<L, A>(
    mut listener: L,
    app: Router,
    gate: Arc<Gate>,
    body_max: usize,
    spares: impl Fn(&L::Io) -> bool,
    admits: impl Fn(&L::Io) -> A,
    stop: CancellationToken,
) where
    L: Listener,
    L::Io: AsRawFd + AsFd,
    A: Admits + Send + Sync + 'static,
{
    let app = TowerToHyperService::new(app);
    let clients = TaskTracker::new();
    loop {
        let (client, _) = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        if !spares(&client) {
            // The next one may have the descriptor of a connection that says nothing.
            gate.counted.turned(Turned::Descriptors);
            gate.evict();
            continue;
        }
        let place = tokio::select! {
            place = gate.enter() => place,
            () = stop.cancelled() => break,
        };
        let admits = admits(&client);
        clients.spawn(connection(
            client,
            place,
            app.clone(),
            body_max,
            stop.clone(),
            admits,
        ));
    }
    drop(listener);
    clients.close();
    clients.wait().await;
}

/// Serves one connection: a request, which is checked as one to the proxy is, and whose body has at most `body_max` bytes.
pub async fn connection<I>(
    client: I,
    place: Place,
    app: TowerToHyperService<Router>,
    body_max: usize,
    stop: CancellationToken,
    admits: impl Admits + Send + Sync,
) where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + AsFd + Send + Unpin + 'static,
{
    let mut client = tokio_io_timeout::TimeoutWriter::new(client);
    client.set_timeout(Some(READ_LIMIT));
    let refused = Refused::default();
    let client = Strict::new(Box::pin(client), refused.clone());
    let (unread, heard) = (AtomicBool::new(false), AtomicBool::new(false));
    let taken = Mutex::new(None::<Taken>);
    let is_taken = &taken;
    let (place, app, is_unread, admits) = (&place, &app, &unread, &admits);
    let (is_refused, is_heard) = (&refused, &heard);
    let service = service_fn(|request: Request<Incoming>| async move {
        is_heard.store(true, Ordering::Relaxed);
        let (mut parts, body) = request.into_parts();
        if let Err(refused) = admits.admit(&mut parts).await {
            is_unread.store(!body.is_end_stream(), Ordering::Relaxed);
            return Ok(refused);
        }
        let whole = Limited::new(body, body_max).collect();
        let whole = tokio::time::timeout(HEADER_LIMIT, whole).await;
        is_unread.store(!matches!(whole, Ok(Ok(_))), Ordering::Relaxed);
        let body = match whole {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) if let Some(why) = is_refused.why() => {
                return Ok(refusal(why.status, format!("{}\n", why.detail)));
            }
            Ok(Err(_)) => {
                let why = format!("a request has at most {body_max} bytes, and all of them\n");
                return Ok(refusal(StatusCode::PAYLOAD_TOO_LARGE, why));
            }
            Err(_) => {
                let why = format!("the request's body did not come within {HEADER_LIMIT:?}\n");
                return Ok(refusal(StatusCode::REQUEST_TIMEOUT, why));
            }
        };
        place.spoke();
        let request = Request::from_parts(parts, axum::body::Body::from(body));
        app.call(request).await.map(|mut response| {
            let mut taken = is_taken.lock().unwrap_or_else(PoisonError::into_inner);
            *taken = response.extensions_mut().remove();
            response
        })
    });
    let mut served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        // So a connection either says its request or is silent, and a client asks as easily anew.
        .keep_alive(false)
        .serve_connection(TokioIo::new(client), service);
    let ended = tokio::select! {
        ended = &mut served => ended,
        () = place.evicted.cancelled() => return,
        () = stop.cancelled() => {
            std::pin::Pin::new(&mut served).graceful_shutdown();
            (&mut served).await
        }
    };
    let taken = is_taken
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Err(e) = ended {
        tracing::debug!(error = %e, "client connection ended");
    } else if let Some(taken) = taken {
        let parts = served.into_parts();
        // What was read of it, and a duplicate of it: from here on whoever takes it has the only one.
        let (client, behind) = parts.io.into_inner().into_parts();
        let own = client
            .as_ref()
            .get_ref()
            .get_ref()
            .as_fd()
            .try_clone_to_owned();
        drop(client);
        match own {
            Ok(own) => {
                let ahead = [&parts.read_buf[..], &behind].concat();
                taken.take(own, ahead.into()).await;
            }
            Err(e) => tracing::debug!(error = %e, "no descriptor for a client that is given away"),
        }
    } else if unread.load(Ordering::Relaxed) || refused.why().is_some() {
        let mut client = served.into_parts().io.into_inner().into_parts().0;
        let why = refused.why().filter(|_| !heard.load(Ordering::Relaxed));
        let said = async {
            if let Some(why) = why {
                client.write_all(refused_head(why).as_bytes()).await?;
            }
            linger::end(&mut client, None, true).await
        };
        tokio::select! {
            _ = said => {}
            () = place.evicted.cancelled() => {}
            () = stop.cancelled() => {}
        }
    }
}

fn refusal(status: StatusCode, why: String) -> Response {
    (status, why).into_response()
}

/// The answer to a request that hyper has not seen, in the API's shape.
fn refused_head(why: &Problem) -> String {
    let body = ErrorBody {
        code: "usage".into(),
        message: adit_names::escape(&why.detail).to_string(),
        help: "the program that asks is at fault: a request is written as RFC 9112 has it".into(),
    };
    // It has nothing that JSON has no text for.
    let body = serde_json::to_string(&body).unwrap_or_default();
    format!(
        "HTTP/1.1 {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        why.status,
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(max: usize) -> Arc<Gate> {
        Gate::new(Counted::new(max))
    }

    #[test]
    fn the_operators_socket_has_room_whatever_the_limit_of_descriptors() {
        for descriptors in [32, 128, 256, 1024, 20_000, 1 << 20] {
            for is_managed in [false, true] {
                let room = Room::new(descriptors, 4096, is_managed);
                let clients = room.metrics + OF_A_REQUEST * (room.proxy + room.management);
                assert!(clients + room.api < descriptors, "{descriptors}: {room:?}");
                assert!(room.api >= 4 && room.metrics >= 2 && room.proxy >= 1);
                assert!(!is_managed || room.management >= 2);
            }
        }
        assert_eq!(Room::new(20_000, 4096, false).proxy, 4096);
    }

    #[test]
    fn a_share_is_given_back_and_leaves_nothing_behind() {
        let shares = Shares::new(2);
        let (one, two) = (shares.take("a"), shares.take("a"));
        assert!(one.is_some() && two.is_some() && shares.take("a").is_none());
        let other = shares.take("b");
        assert!(other.is_some());
        drop(one);
        assert!(shares.take("a").is_some());
        drop((two, other));
        assert!(shares.held().is_empty());
    }

    #[test]
    fn r110_a_weight_is_so_many_times_a_share_while_anything_of_it_is_held() {
        let shares = Shares::new(2);
        // Nobody has shown anything.
        shares.weigh(&"a", 3);
        let mut held = vec![shares.take("a").unwrap(), shares.take("a").unwrap()];
        assert!(shares.take("a").is_none());
        shares.weigh(&"a", 3);
        shares.weigh(&"a", 1);
        held.extend((0..4).map(|_| shares.take("a").unwrap()));
        assert!(shares.take("a").is_none() && shares.max_of(&"a") == 6);
        assert_eq!(shares.max_of(&"b"), 2);
        // After a reload it has what it has, and gets no more.
        shares.forget_weights();
        held.pop();
        assert!(shares.take("a").is_none());
        drop(held);
        assert!(shares.held().is_empty());
    }

    #[tokio::test]
    async fn the_oldest_silent_connection_makes_room_and_one_that_spoke_does_not() {
        let gate = gate(2);
        let (spoke, silent) = (gate.enter().await, gate.enter().await);
        spoke.spoke();
        let of_silent = silent.evicted.clone();
        let entering = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter().await }
        });
        of_silent.cancelled().await;
        drop(silent);
        let third = entering.await.unwrap();
        assert!(!spoke.evicted.is_cancelled() && !third.evicted.is_cancelled());
    }

    #[tokio::test]
    async fn one_that_becomes_idle_makes_room_for_one_that_waits_already() {
        let gate = gate(2);
        let (first, second) = (gate.enter().await, gate.enter().await);
        first.spoke();
        second.spoke();
        let mut entering = std::pin::pin!(gate.enter());
        assert!(futures_util::poll!(&mut entering).is_pending());
        first.idle();
        assert!(futures_util::poll!(&mut entering).is_pending());
        assert!(first.evicted.is_cancelled());
        // One makes room for one.
        second.idle();
        assert!(futures_util::poll!(&mut entering).is_pending());
        assert!(!second.evicted.is_cancelled());
        drop(first);
        entering.await;
    }

    #[tokio::test]
    async fn a_connection_that_is_idle_again_makes_room_after_those_that_are_so_for_longer() {
        let gate = gate(2);
        let (first, second) = (gate.enter().await, gate.enter().await);
        first.spoke();
        first.idle();
        gate.evict();
        assert!(second.evicted.is_cancelled() && !first.evicted.is_cancelled());
        gate.evict();
        assert!(first.evicted.is_cancelled());
        drop((first, second));
        assert!(gate.silent().is_empty());
    }
}
