//! Where clients get in: every listener of the configuration but the operator's socket and that of metrics.
//!
//! ```text
//!  listener ─► accept: cap, share, reserve ─► who is it? ─┬─ http    proxy
//!                                                        ├─ socks5  a name and a port, then bytes
//!                                                        ├─ tls     the server name says where, then bytes
//!                                                        ├─ any     one place, bytes
//!                                                        ├─ dns     names of VMs, and also in datagrams
//!                                                        └─ (management)  the API
//! ```
//! Where a listener has a certificate, TLS is ended before that ([`tls`]).
//!
//! All listeners have the same shares together ([`listen`](crate::listen)), so a second one brings nobody more than the first.
//! A tunnel of a TCP client leaves aditd; a client of a Unix socket stays in it as long as its tunnel lasts. So these have a
//! third of the places to themselves, a user of the host half of them, and leave the others theirs. Management listeners have places
//! and shares of their own, so that operators get in whatever the clients of VMs do.

pub use adit_reach::socks5;

mod clients;
pub mod dns;
mod handed;
mod management;
pub mod party;
pub mod pump;
pub mod read_ahead;
pub mod sni;
pub mod stream;
pub mod tls;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::refusal::Refusal;
use adit_names::VmId;
use adit_passed::Closer;
use tokio::net::{TcpListener, UdpSocket, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::access::Caller;
use crate::access::callers::Asking;
use crate::access::client::{Standing, Whose};
use crate::config::{Address, ListenConfig, Role, Speak};
use crate::listen::{Gate, Place, Share, Shares, Slot};
use crate::metrics::{Listener as Counted, Turned};
use crate::passing::Socket;
use crate::place::Bound;
use crate::proxy;
use crate::proxy::linger;
use crate::proxy::problem::Problem;
use crate::reach::Destination;
use crate::state::State;
use dns::Dns;
use party::Party;
use stream::Stream;
use tls::{NotOpened, Opened};

/// Connections that are being refused at the same time; more of them are closed without a word.
const REFUSALS_MAX: usize = 8;
/// Descriptors that one client of a Unix socket may pass, and that wait to be closed.
const PASSED_MAX: usize = 4;
/// Clients of Unix sockets that are not let in, and wait to be closed: a close may take as long as what they passed lingers.
const DROPPED_MAX: usize = 64;
/// One client has this part of the management listeners' connections.
const OF_MANAGEMENT: usize = 4;
/// How often it is looked whether a client is closed.
const CLOSE_LOOK: Duration = Duration::from_millis(10);
/// Port of a VM's TLS server where the listener has none.
const HTTPS: u16 = 443;

/// What all listeners have together.
pub struct Fronts {
    state: Arc<State>,
    gate: Arc<Gate>,
    /// Of those whose bytes pass through here as long as they last.
    carried: Arc<Gate>,
    clients: Arc<Shares<Whose>>,
    of_carried: Arc<Shares<Whose>>,
    /// Of management listeners.
    managers: Arc<Gate>,
    of_managers: Arc<Shares<Whose>>,
    /// What they are served.
    api: management::Api,
    refusals: Arc<Semaphore>,
    dropped: Closer,
    /// What names of DNS may ask other hosts.
    asks: Arc<dns::Asks>,
}

/// What a client has as long as it has descriptors here.
type Held = (Share<Whose>, Option<Share<Whose>>);

/// A listener, and what its clients are served.
struct Front {
    listener: Listener,
    role: Role,
    speak: Speak,
    to: Option<Destination>,
    dns: Option<Arc<Dns>>,
    /// Which of all.
    nth: usize,
    /// Its port, where it has one: of TLS, the one in the VM as well.
    port: u16,
    counted: Arc<Counted>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A client that was accepted.
enum Accepted {
    Tcp(tokio::net::TcpStream, SocketAddr),
    /// Its closer is another one once it is let in.
    Unix(Socket),
}

impl Listener {
    /// With the socket that takes datagrams, if there is one.
    fn new(bound: Bound) -> io::Result<(Self, Option<UdpSocket>)> {
        Ok(match bound {
            Bound::Tcp(tcp) => (Self::Tcp(TcpListener::from_std(tcp)?), None),
            Bound::Unix(unix) => (Self::Unix(UnixListener::from_std(unix)?), None),
            Bound::Both(tcp, udp) => {
                let udp = UdpSocket::from_std(udp)?;
                (Self::Tcp(TcpListener::from_std(tcp)?), Some(udp))
            }
        })
    }

    async fn accept(&self, dropped: &Closer) -> io::Result<Accepted> {
        Ok(match self {
            Self::Tcp(tcp) => {
                let (client, from) = tcp.accept().await?;
                Accepted::Tcp(client, from)
            }
            Self::Unix(unix) => {
                while dropped.is_full() {
                    tokio::time::sleep(CLOSE_LOOK).await;
                }
                let unix = unix.accept().await?.0.into_std()?;
                Accepted::Unix(Socket::new(unix, dropped)?)
            }
        })
    }
}

impl Accepted {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(tcp, _) => tcp.as_fd(),
            Self::Unix(unix) => unix.stream().as_fd(),
        }
    }

    fn is_carried(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    fn from(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(_, from) => Some(*from),
            Self::Unix(_) => None,
        }
    }

    /// Whose it is, and who asks over it.
    fn asking(&self, state: &State, speak: Speak) -> io::Result<(Whose, Asking)> {
        Ok(match self {
            Self::Tcp(_, from) if speak == Speak::Dns => {
                // Its listener says what it may see, and nothing else.
                (Whose::at(from.ip()), Asking::known(Caller::anonymous(from)))
            }
            Self::Tcp(tcp, from) => {
                let asking = state.callers.over_tcp(tcp, *from)?;
                (Whose::at(from.ip()), asking)
            }
            Self::Unix(unix) => {
                let uid = unix.stream().peer_cred()?.uid();
                (Whose::Uid(uid), state.callers.of_user(uid))
            }
        })
    }
}

impl Fronts {
    /// With the limits of the configuration.
    pub fn new(state: Arc<State>) -> Arc<Self> {
        let max = state.room.proxy;
        let of_each = state.config.limits.connections_per_client;
        let is_unix = |front: &ListenConfig| {
            front.role == Role::Proxy && matches!(front.address, Address::Unix(_))
        };
        let carried = match state.config.listen.iter().any(is_unix) {
            true => (max / 3).max(1),
            false => 0,
        };
        let of_each = of_each.unwrap_or(max / 2).max(1);
        let clients = Shares::new(of_each);
        let of_carried = Shares::new((carried / 2).clamp(1, of_each));
        let of_managers = Shares::new((state.room.management / OF_MANAGEMENT).max(1));
        // It is set here only.
        let all = [&clients, &of_carried, &of_managers];
        let _ = state.of_clients.set(all.map(Arc::clone));
        Arc::new(Self {
            gate: Gate::new(Counted::new((max - carried).max(1))),
            carried: Gate::new(Counted::new(carried)),
            clients,
            of_carried,
            managers: Gate::new(Counted::new(state.room.management)),
            of_managers,
            api: management::Api::new(&state),
            refusals: Arc::new(Semaphore::new(REFUSALS_MAX)),
            dropped: Closer::new(DROPPED_MAX),
            asks: Arc::default(),
            state,
        })
    }

    /// Serves the clients of all listeners until told to stop; returns when the requests that were under way have ended.
    ///
    /// # Errors
    /// A listener is none.
    pub fn start(
        self: Arc<Self>,
        listeners: Vec<(ListenConfig, Bound)>,
    ) -> io::Result<impl Future<Output = ()>> {
        let accepting = TaskTracker::new();
        for (nth, (config, bound)) in listeners.into_iter().enumerate() {
            let port = match &bound {
                Bound::Tcp(tcp) | Bound::Both(tcp, _) => tcp.local_addr()?.port(),
                Bound::Unix(_) => HTTPS,
            };
            let max = self.gate_of(config.role, matches!(bound, Bound::Unix(_)));
            let max = max.counted.max;
            let counted = self.state.metrics.listener(&bound.address(), max);
            let (listener, datagrams) = Listener::new(bound)?;
            let dns = datagrams.map(|socket| {
                let (state, asks) = (self.state.clone(), self.asks.clone());
                let dns = Dns::new(state, &config, counted.clone(), asks);
                accepting.spawn(dns.clone().datagrams(socket));
                dns
            });
            let front = Front {
                counted,
                dns,
                port: config.port.unwrap_or(port),
                listener,
                role: config.role,
                speak: config.speak,
                to: config.destination(&self.state.config.names.suffix),
                nth,
            };
            accepting.spawn(self.clone().accept(Arc::new(front)));
        }
        accepting.close();
        Ok(async move {
            accepting.wait().await;
            self.state.clients.close();
            self.state.clients.wait().await;
        })
    }

    async fn accept(self: Arc<Self>, front: Arc<Front>) {
        let state = &self.state;
        loop {
            let accepted = tokio::select! {
                accepted = front.listener.accept(&self.dropped) => accepted,
                () = state.stop.cancelled() => return,
            };
            let accepted = match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    tracing::warn!(error = %e, "cannot accept");
                    self.make_room();
                    // Only what ends frees descriptors; asking again at once would spin.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            if !state.room.spares(&accepted.fd()) {
                front.counted.turned(Turned::Descriptors);
                self.make_room();
                continue;
            }
            // It is gone again otherwise.
            let Ok((whose, asking)) = accepted.asking(state, front.speak) else {
                continue;
            };
            self.let_in(&front, accepted, whose, asking).await;
        }
    }

    fn gate_of(&self, role: Role, is_carried: bool) -> &Arc<Gate> {
        match (role, is_carried) {
            (Role::Management, _) => &self.managers,
            (Role::Proxy, true) => &self.carried,
            (Role::Proxy, false) => &self.gate,
        }
    }

    fn shares_of(&self, role: Role) -> &Arc<Shares<Whose>> {
        match role {
            Role::Proxy => &self.clients,
            Role::Management => &self.of_managers,
        }
    }

    /// Silent ones have the descriptors that the next one needs, and so have idle connections to guests.
    fn make_room(&self) {
        self.gate.evict();
        self.carried.evict();
        self.managers.evict();
        self.state.pool.clear();
    }

    /// Serves a client that has its share, once there is a place.
    async fn let_in(
        self: &Arc<Self>,
        front: &Arc<Front>,
        accepted: Accepted,
        whose: Whose,
        asking: Asking,
    ) {
        // Whose it is, if the kernel is still asked for that, is seen after that.
        let share = match asking.seeks_uid() {
            true => Some(None),
            false => self.shares_of(front.role).take(whose.clone()).map(Some),
        };
        let of_carried = match accepted.is_carried() && front.role == Role::Proxy {
            true => self.of_carried.take(whose.clone()).map(Some),
            false => Some(None),
        };
        let (Some(share), Some(of_carried)) = (share, of_carried) else {
            front.counted.turned(Turned::Share);
            return self.refuse(accepted, front, &whose);
        };
        let gate = self.gate_of(front.role, accepted.is_carried());
        // What is not let in waits in the kernel's backlog, bounded.
        let place = tokio::select! {
            place = gate.enter_of(&front.counted) => place,
            () = self.state.stop.cancelled() => return,
        };
        self.serve(front, accepted, (asking, whose), place, (share, of_carried));
    }

    /// Whose a connection is, with its share: once the kernel has said which user of this host has made it, if it is asked for that.
    ///
    /// # Errors
    /// That client has its share.
    async fn settled(
        &self,
        front: &Front,
        (asking, whose): (&Asking, Whose),
        share: Option<Share<Whose>>,
    ) -> Result<(Whose, Share<Whose>), Whose> {
        if let Some(share) = share {
            return Ok((whose, share));
        }
        let whose = asking.uid().await.map_or(whose, Whose::Uid);
        let share = self.shares_of(front.role).take(whose.clone());
        match share {
            Some(share) => Ok((whose, share)),
            None => Err(whose),
        }
    }

    /// Serves a client to its end.
    fn serve(
        self: &Arc<Self>,
        front: &Arc<Front>,
        accepted: Accepted,
        (asking, whose): (Asking, Whose),
        place: Place,
        (share, of_carried): (Option<Share<Whose>>, Option<Share<Whose>>),
    ) {
        let (this, state, front) = (self.clone(), self.state.clone(), front.clone());
        let (role, speak, to) = (front.role, front.speak, front.to.clone());
        let (port, nth, dns) = (front.port, front.nth, front.dns.clone());
        self.state.clients.spawn(async move {
            let settled = this.settled(&front, (&asking, whose), share);
            let Some(settled) = clients::unless_over(&state, &place, settled).await else {
                return;
            };
            let (mut whose, share) = match settled {
                Ok(settled) => settled,
                Err(whose) => {
                    front.counted.turned(Turned::Share);
                    return this.refuse(accepted, &front, &whose);
                }
            };
            let is_carried = accepted.is_carried();
            // Whoever carries bytes for it has it too.
            let held: Arc<Held> = Arc::new((share, of_carried));
            let mut of_host = None;
            let mut over_tls = false;
            let by = management::By::of(&accepted, state.tls.terms(nth).is_some());
            let from = accepted.from();
            let (client, asking) = match accepted {
                Accepted::Tcp(tcp, from) => {
                    let _ = tcp.set_nodelay(true);
                    match state.tls.terms(nth) {
                        None => (Stream::Tcp(tcp), asking),
                        Some(terms) => {
                            let held = held.clone();
                            let opening = state.tls.open(nth, terms, tcp, state.room, held);
                            match this.opened(opening, &place, from, speak).await {
                                Some(opened) => {
                                    over_tls = true;
                                    if let Some(host) = this.host(&opened) {
                                        whose = Whose::Host(host);
                                        of_host = this.shares_of(role).take(whose.clone());
                                        if of_host.is_none() {
                                            return front.counted.turned(Turned::Share);
                                        }
                                    }
                                    let asking = asking.with_certificate(opened.certificate);
                                    (opened.client, asking)
                                }
                                None => return,
                            }
                        }
                    }
                }
                Accepted::Unix(unix) => match this.apart(unix, (place.slot(), held.clone())) {
                    Ok(stream) => (stream, asking),
                    Err(e) => {
                        tracing::debug!(error = %e, "no pair for a client");
                        this.make_room();
                        return;
                    }
                },
            };
            let mut of = vec![this.shares_of(role).clone()];
            of.extend(is_carried.then(|| this.of_carried.clone()));
            let asking = asking.with_standing(Standing::new(whose.clone(), of.clone()));
            if state.grants().has_weights() {
                // Nobody waits for the user database before something is asked.
                let (asking, state) = (asking.clone(), state.clone());
                tokio::spawn(async move { asking.is(&state, &asking.caller().await) });
            }
            let gate = this.gate_of(role, is_carried).clone();
            let mut party = Party::new(whose, of, gate);
            party.over_tls = over_tls;
            match (speak, to) {
                _ if role == Role::Management => {
                    this.api.serve(state, client, (asking, by), place).await;
                }
                (Speak::Http, _) => {
                    proxy::connection(state, client, (asking, party), place).await;
                }
                (Speak::Socks5, _) => clients::socks5(state, client, asking, place).await,
                (Speak::Tls, _) => clients::tls(state, client, asking, place, port).await,
                (Speak::Any, Some(to)) => clients::any(state, client, asking, place, to).await,
                (Speak::Dns, _) => {
                    if let (Some(dns), Some(from)) = (dns, from) {
                        dns.connection(client, from, place).await;
                    }
                }
                // The configuration was checked.
                (Speak::Any, None) => {}
            }
            drop((held, of_host));
        });
    }

    /// The other host that a client is, by its certificate: wherever it connects from, it has its own share, with all who come by
    /// way of it.
    fn host(&self, opened: &Opened) -> Option<VmId> {
        let shown = opened.certificate.as_ref()?;
        let caller = Caller::anonymous("").with(shown.names());
        let host = self.state.peers.of(&caller)?;
        Some(host.config.name.clone())
    }

    /// Waits for a handshake, as long as the client has its place; none: the client is not served.
    async fn opened(
        &self,
        opening: impl Future<Output = Result<Opened, NotOpened>>,
        place: &Place,
        from: SocketAddr,
        speak: Speak,
    ) -> Option<Opened> {
        let given_up = || async {
            tokio::select! {
                () = place.evicted.cancelled() => {}
                () = self.state.stop.cancelled() => {}
            }
        };
        let opened = tokio::select! {
            opened = opening => opened,
            () = given_up() => return None,
        };
        let why = match opened {
            Ok(opened) => return Some(opened),
            Err(NotOpened::Silent) => return None,
            Err(why) => why,
        };
        let error = adit_names::escape(&why.to_string()).to_string();
        tracing::info!(client = %from, error, "TLS handshake failed");
        if let (NotOpened::Plain(mut client), Speak::Http) = (why, speak) {
            let https = "this listener speaks TLS: its address begins with https://";
            let why = Problem::malformed(https);
            tokio::select! {
                _ = linger::end(&mut client, Some(&why), true) => {}
                () = given_up() => {}
            }
        }
        None
    }

    /// Puts a pair between a client of a Unix socket and whoever serves it. `held` is dropped once the client's socket is closed,
    /// which may take longer than its end.
    fn apart(&self, mut unix: Socket, held: (Slot, Arc<Held>)) -> io::Result<Stream> {
        let (ours, theirs) = StdUnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let theirs = UnixStream::from_std(theirs)?;
        let socket = unix.stream().as_fd().try_clone_to_owned()?;
        if !self.state.room.spares(&socket) || !self.state.room.spares(&theirs) {
            return Err(io::Error::other("few descriptors are left"));
        }
        let closer = Closer::new(PASSED_MAX);
        unix.close_by(&closer);
        let ours = Socket::new(ours, &closer)?;
        tokio::spawn(async move {
            pump::pump(unix, ours, Some(&socket)).await;
            // It may be the last one.
            closer.close(socket);
            while closer.pending() > 0 {
                tokio::time::sleep(CLOSE_LOOK).await;
            }
            drop(held);
        });
        Ok(Stream::Pair(theirs))
    }

    /// Says why there is no connection to be had, whatever was asked.
    fn refuse(&self, accepted: Accepted, front: &Front, whose: &Whose) {
        let Ok(slot) = self.refusals.clone().try_acquire_owned() else {
            return;
        };
        let max = self.shares_of(front.role).max_of(whose);
        let why = format!("this client has {max} connections open");
        let why = Problem::from(Refusal::busy(why));
        // Nobody shakes hands for that.
        let is_plain = front.speak == Speak::Http && self.state.tls.terms(front.nth).is_none();
        let why = is_plain.then_some(why);
        let stop = self.state.stop.clone();
        let Accepted::Tcp(mut client, _) = accepted else {
            // It is closed elsewhere, with what it may have passed.
            return;
        };
        self.state.clients.spawn(async move {
            tokio::select! {
                _ = linger::end(&mut client, why.as_ref(), true) => {}
                () = stop.cancelled() => {}
            }
            drop(slot);
        });
    }
}
