//! Clients of DNS: names of VMs, for whoever needs an address. The address is that of the host that runs the VM, on which other
//! listeners lead on to it; the VM itself has none.
//!
//! ```text
//!  UDP: datagram ─► rate of its address ─┐
//!  TCP: place, share, deadline ──────────┴─► zone.read ─► look: may the network see it? which host? ─► answer
//! ```
//! [`zone`] has what is said to what, without IO; `look` finds hosts. Nothing is forwarded: a name outside the zone is refused.
//!
//! Whoever sends datagrams may say that they are somebody else, who then gets the answers. So an answer is hardly longer than its question,
//! and an address, or a /64 of IPv6, gets [`ANSWERS_PER_S`] of them in a second. As many more are told to come over TCP, where
//! nobody can say that they are somebody else, and what is beyond that has no answer.

mod look;
pub mod zone;

use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg_addr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::clients::unless_over;
use super::stream::Stream;
use crate::access::client::Whose;
use crate::access::rate::Buckets;
use crate::access::{Caller, Subject};
use crate::config::ListenConfig;
use crate::listen::{HEADER_LIMIT, Place};
use crate::metrics::Listener as Counted;
use crate::state::State;
use crate::visit::Visit;
use look::{Asker, look};
use zone::{Named, Over, Question, Read, Reply, Zone};

pub use look::Asks;
pub use zone::Kind;

/// Answers to datagrams of one address in a second.
pub const ANSWERS_PER_S: u32 = 200;
/// Datagrams whose answers take longer: another host is asked, or waited for.
const WAITING_MAX: usize = 256;
/// After an error of the socket, which says nothing of the next datagram.
const PAUSE: Duration = Duration::from_millis(50);
/// Bytes of the length ahead of a message over TCP (RFC 1035 §4.2.2).
const LENGTH: usize = 2;

/// A listener for DNS.
pub struct Dns {
    state: Arc<State>,
    zone: Zone,
    network: Option<Subject>,
    counted: Arc<Counted>,
    asks: Arc<Asks>,
    waiting: Arc<Semaphore>,
}

impl Dns {
    /// As it is configured.
    pub fn new(
        state: Arc<State>,
        config: &ListenConfig,
        counted: Arc<Counted>,
        asks: Arc<Asks>,
    ) -> Arc<Self> {
        counted.answers();
        Arc::new(Self {
            zone: Zone::new(&state.config.names.suffix, config.answers()),
            network: config.network.clone().map(Subject::Network),
            counted,
            asks,
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
            state,
        })
    }

    fn caller(&self, from: SocketAddr) -> Caller {
        Caller::anonymous(from).with(self.network.clone())
    }

    /// Answers datagrams until told to stop.
    pub async fn datagrams(self: Arc<Self>, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let (mut rates, began) = (Buckets::default(), Instant::now());
        // A byte more than the longest says that one is longer.
        let mut bytes = vec![0; zone::MESSAGE_MAX + 1];
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut bytes) => received,
                () = self.state.stop.cancelled() => return,
            };
            let (len, from) = match received {
                Ok(received) => received,
                Err(e) => {
                    tracing::warn!(error = %e, "cannot take datagrams");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            let client = client(from);
            let read = self.zone.read(&bytes[..len], Over::Udp);
            let reply = match (read, pace(&mut rates, &client, now_ms)) {
                (Read::Silence, _) => continue,
                (_, Pace::Silence) => {
                    self.counted.answered(Kind::Dropped);
                    continue;
                }
                (Read::Question(question), Pace::OverTcp) => question.truncated(),
                (Read::Reply(_), Pace::OverTcp) => {
                    self.counted.answered(Kind::Dropped);
                    continue;
                }
                (Read::Reply(reply), Pace::Answer) => reply,
                (Read::Question(question), Pace::Answer) => {
                    let this = self.clone();
                    let mut answer =
                        Box::pin(async move { this.answer(&question, from, &client).await });
                    // Most answers are known at once.
                    match (&mut answer).now_or_never() {
                        Some(reply) => {
                            send(&socket, from, &reply);
                            continue;
                        }
                        None => {
                            self.wait(answer, &socket, from);
                            continue;
                        }
                    }
                }
            };
            self.note(&reply, from);
            send(&socket, from, &reply);
        }
    }

    /// Has an answer sent once it is known, while there are not too many of those.
    fn wait(
        &self,
        answer: impl Future<Output = Reply> + Send + 'static,
        socket: &Arc<UdpSocket>,
        from: SocketAddr,
    ) {
        let Ok(waits) = self.waiting.clone().try_acquire_owned() else {
            return self.counted.answered(Kind::Dropped);
        };
        let (socket, stop) = (socket.clone(), self.state.stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                reply = answer => send(&socket, from, &reply),
                () = stop.cancelled() => {}
            }
            drop(waits);
        });
    }

    /// Serves a client of a connection: a question after the other, each in time.
    pub async fn connection(&self, mut client: Stream, from: SocketAddr, place: Place) {
        let whose = self::client(from);
        loop {
            place.idle();
            let message = timeout(HEADER_LIMIT, message(&mut client));
            let Some(Ok(Some(bytes))) = unless_over(&self.state, &place, message).await else {
                return;
            };
            place.spoke();
            let reply = match self.zone.read(&bytes, Over::Tcp) {
                Read::Silence => return,
                Read::Reply(reply) => {
                    self.note(&reply, from);
                    reply
                }
                Read::Question(question) => {
                    let answer = self.answer(&question, from, &whose);
                    match unless_over(&self.state, &place, answer).await {
                        Some(reply) => reply,
                        None => return,
                    }
                }
            };
            let Ok(len) = u16::try_from(reply.bytes.len()) else {
                return;
            };
            // In one segment: not every client puts two together.
            let whole = [&len.to_be_bytes()[..], &reply.bytes].concat();
            let written = timeout(HEADER_LIMIT, client.write_all(&whole));
            let Some(Ok(Ok(()))) = unless_over(&self.state, &place, written).await else {
                return;
            };
        }
    }

    /// Finds the answer, and writes down what it was.
    async fn answer(&self, question: &Question, from: SocketAddr, client: &str) -> Reply {
        let caller = self.caller(from);
        let visit = self.visit(&caller);
        visit.method(&question.record_type());
        if let Named::Vm(to) | Named::Above(to) = question.name() {
            visit.about(&to.vm);
        }
        let asker = Asker {
            caller: &caller,
            client,
            own: self.zone.own(),
            asks: &self.asks,
        };
        let found = look(&self.state, asker, question.name()).await;
        let reply = question.answer(&found);
        self.over(&visit, &reply);
        reply
    }

    /// Writes down an answer that took no look.
    fn note(&self, reply: &Reply, from: SocketAddr) {
        let visit = self.visit(&self.caller(from));
        self.over(&visit, reply);
    }

    fn visit(&self, caller: &Caller) -> Visit {
        let (visits, now_ms) = (&self.state.visits, self.state.now_ms());
        let visit = visits.begin(&self.counted.name, "dns", None, now_ms);
        visit.caller(caller);
        visit
    }

    fn over(&self, visit: &Visit, reply: &Reply) {
        self.counted.answered(reply.kind);
        let (status, error) = status(reply.kind);
        visit.answered(status, error);
        visit.ended();
    }
}

/// What a log of HTTP says of an answer.
fn status(kind: Kind) -> (u16, &'static str) {
    match kind {
        Kind::Found | Kind::NoData => (200, ""),
        Kind::NoName => (404, kind.word()),
        Kind::Refused => (403, kind.word()),
        Kind::Malformed => (400, kind.word()),
        Kind::NotImplemented => (501, kind.word()),
        Kind::Failed => (503, kind.word()),
        Kind::Truncated | Kind::Dropped => (429, kind.word()),
    }
}

/// Whose datagrams are counted together.
fn client(from: SocketAddr) -> String {
    format!("{:?}", Whose::at(from.ip()))
}

/// What an address has left of its second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Answer,
    OverTcp,
    Silence,
}

fn pace(rates: &mut Buckets, client: &str, now_ms: u64) -> Pace {
    if rates.take(client, ANSWERS_PER_S, now_ms) {
        return Pace::Answer;
    }
    match rates.take(&format!("{client} over TCP"), ANSWERS_PER_S, now_ms) {
        true => Pace::OverTcp,
        false => Pace::Silence,
    }
}

/// Sends without waiting: what finds no room is asked again by its client.
fn send(socket: &UdpSocket, to: SocketAddr, reply: &Reply) {
    // The sandbox has no other call with an address.
    let pieces = [IoSlice::new(&reply.bytes)];
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let mut nothing = SendAncillaryBuffer::default();
    if let Err(e) = sendmsg_addr(socket, &to, &pieces, &mut nothing, flags) {
        tracing::debug!(error = %e, client = %to, "an answer was not sent");
    }
}

/// Reads a message; none: there comes no more, or no question is so long.
async fn message(client: &mut Stream) -> Option<Vec<u8>> {
    let mut len = [0; LENGTH];
    client.read_exact(&mut len).await.ok()?;
    let len = usize::from(u16::from_be_bytes(len));
    if len > zone::MESSAGE_MAX {
        return None;
    }
    let mut bytes = vec![0; len];
    client.read_exact(&mut bytes).await.ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_so_many_answers_a_second_and_is_then_told_to_come_over_tcp_and_then_nothing()
    {
        let mut rates = Buckets::default();
        let mut asked = |client: &str, times: usize, now_ms| {
            let paces: Vec<_> = (0..times)
                .map(|_| pace(&mut rates, client, now_ms))
                .collect();
            [Pace::Answer, Pace::OverTcp, Pace::Silence]
                .map(|of| paces.iter().filter(|pace| **pace == of).count())
        };
        let of = |ip: &str| client(SocketAddr::new(ip.parse().unwrap(), 53));
        assert_eq!(asked(&of("192.0.2.1"), 1000, 0), [200, 200, 600]);
        assert_eq!(asked(&of("192.0.2.2"), 10, 0), [10, 0, 0]);
        assert_eq!(asked(&of("192.0.2.1"), 1000, 500), [100, 100, 800]);
        // Of IPv6, a client has all addresses of its network.
        assert_eq!(asked(&of("2001:db8::1"), 1000, 0), [200, 200, 600]);
        assert_eq!(asked(&of("2001:db8::2"), 10, 0), [0, 0, 10]);
    }
}
