//! Finds out who is at the other end of a connection.
//!
//! A Unix socket's user is known at accept. Of a loopback connection the kernel is asked, and the host's user database says what
//! a user is called and which groups it is in; neither is waited for where everybody is served, but by the request that needs
//! it. What the database said is believed for [`KNOWN_FOR`], and anew after a reload.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use adit_api::doctor::USERS_UNKNOWN;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SetOnce};

use super::caller::{Caller, Person};
use super::certificate::Certificate;
use super::client::Standing;
use super::diag::{Diag, Socket};
use super::tokens::Tokens;
use crate::monitor::Monitor;
use crate::state::State;

/// How long what the user database said of a user is believed.
pub const KNOWN_FOR: Duration = Duration::from_secs(30);
/// After a failure it is asked again no sooner.
const UNKNOWN_FOR: Duration = Duration::from_secs(2);
/// Questions to the user database at the same time, and how long each counts at least: some 1,600 in a second.
const LOOKS_MAX: usize = 16;
const LOOK_LEAST: Duration = Duration::from_millis(10);
/// Users that are remembered at most.
const KNOWN_MAX: usize = 1024;
/// How long a client waits for the user database: then it is known by its number only.
const LIMIT: Duration = Duration::from_secs(5);

/// Who finds it out.
pub struct Callers {
    /// Or why nobody can be asked.
    diag: Result<Diag, String>,
    monitor: Monitor,
    known: Mutex<HashMap<u32, Known>>,
    looks: Semaphore,
    tokens: RwLock<Arc<Tokens>>,
}

/// What the user database said of a user, says, or failed to say.
#[derive(Clone)]
struct Known {
    since: Instant,
    person: Arc<SetOnce<Option<Arc<Person>>>>,
}

impl Known {
    fn is_over(&self) -> bool {
        let known_for = match self.person.get() {
            Some(Some(_)) => KNOWN_FOR,
            Some(None) => UNKNOWN_FOR,
            // It is asked already, and not again.
            None => return false,
        };
        self.since.elapsed() >= known_for
    }
}

/// Somebody who is being found out. A copy is the same one.
#[derive(Clone)]
pub struct Asking {
    found: Arc<SetOnce<Caller>>,
    /// The user of this host, which is known before its name and its groups are; none: it is not asked for.
    uid: Option<Arc<SetOnce<Option<u32>>>>,
    certificate: Option<Arc<Certificate>>,
    standing: Option<Arc<Standing>>,
}

impl Asking {
    /// Somebody who is known.
    pub fn known(caller: Caller) -> Self {
        Self::new(SetOnce::new_with(Some(caller)))
    }

    fn new(found: SetOnce<Caller>) -> Self {
        Self {
            found: Arc::new(found),
            uid: None,
            certificate: None,
            standing: None,
        }
    }

    /// The same one, whose weight counts there.
    #[must_use]
    pub fn with_standing(self, standing: Standing) -> Self {
        Self {
            standing: Some(Arc::new(standing)),
            ..self
        }
    }

    /// It is this caller: it has the weight of what that one is granted.
    pub fn is(&self, state: &State, caller: &Caller) {
        let grants = state.grants();
        // What another host says of its clients is no weight of that host.
        let standing = self.standing.as_ref().filter(|_| caller.via().is_none());
        if let Some(standing) = standing.filter(|_| grants.has_weights()) {
            standing.weighs(grants.weight(caller, state.now_ms()));
        }
    }

    /// Whether the kernel is asked which user of this host has made the connection.
    pub fn seeks_uid(&self) -> bool {
        self.uid.is_some()
    }

    /// The user of this host who made a TCP connection, once the kernel has said; none: it is none's, or nobody knows.
    pub async fn uid(&self) -> Option<u32> {
        match &self.uid {
            Some(uid) => *uid.wait().await,
            None => None,
        }
    }

    /// The same one, who has shown a certificate.
    #[must_use]
    pub fn with_certificate(self, certificate: Option<Certificate>) -> Self {
        Self {
            certificate: certificate.map(Arc::new),
            ..self
        }
    }

    /// Finds out beside whatever else is done.
    fn find(find: impl Future<Output = Caller> + Send + 'static) -> Self {
        let asking = Self::new(SetOnce::new());
        let found = asking.found.clone();
        tokio::spawn(async move {
            // It is set here only.
            let _ = found.set(find.await);
        });
        asking
    }

    /// Who it is, once that is known. What a certificate proves may be another thing the next time.
    pub async fn caller(&self) -> Caller {
        let caller = self.found.wait().await.clone();
        match &self.certificate {
            Some(certificate) => caller.with(certificate.names()),
            None => caller,
        }
    }
}

impl Callers {
    /// `socket` asks the kernel; without one, users of TCP stay unknown.
    pub fn new(monitor: Monitor, socket: io::Result<Socket>, tokens: Tokens) -> Arc<Self> {
        let diag = socket.and_then(Diag::start).map_err(|e| e.to_string());
        if let Err(error) = &diag {
            tracing::warn!(
                error,
                remedy = USERS_UNKNOWN,
                "the kernel cannot be asked who local clients are: over TCP, grants to users do not count"
            );
        }
        Arc::new(Self {
            diag,
            monitor,
            known: Mutex::default(),
            looks: Semaphore::new(LOOKS_MAX),
            tokens: RwLock::new(Arc::new(tokens)),
        })
    }

    /// Why users of this host who come over TCP are not known; none: they are.
    pub fn unknown_users(&self) -> Option<&str> {
        self.diag.as_ref().err().map(String::as_str)
    }

    /// Replaces the tokens, and forgets what was known of users.
    pub fn renew(&self, tokens: Tokens) {
        *self.tokens.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(tokens);
        self.known().clear();
    }

    /// The tokens as they are now.
    pub fn tokens(&self) -> Arc<Tokens> {
        let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
        tokens.clone()
    }

    /// A client of a TCP listener.
    ///
    /// # Errors
    /// The connection is gone again.
    pub fn over_tcp(
        self: &Arc<Self>,
        connection: &TcpStream,
        client: SocketAddr,
    ) -> io::Result<Asking> {
        let nobody = Caller::anonymous(client);
        if self.diag.is_err() || !client.ip().to_canonical().is_loopback() {
            return Ok(Asking::known(nobody));
        }
        let server = connection.local_addr()?;
        let cookie = sockopt::socket_cookie(connection)?;
        let this = self.clone();
        let uid = Arc::new(SetOnce::new());
        let said = uid.clone();
        let asking = Asking::find(async move {
            let user = match &this.diag {
                Ok(diag) => diag.user(client, server, cookie).await,
                Err(_) => None,
            };
            // It is set here only.
            let _ = said.set(user);
            match user {
                Some(uid) => nobody.with_person(this.person(uid).await.as_ref()),
                None => nobody,
            }
        });
        let uid = Some(uid);
        Ok(Asking { uid, ..asking })
    }

    /// A client of a Unix socket.
    pub fn of_user(self: &Arc<Self>, uid: u32) -> Asking {
        let nobody = Caller::anonymous(format_args!("a Unix socket (uid {uid})"));
        let this = self.clone();
        Asking::find(async move { nobody.with_person(this.person(uid).await.as_ref()) })
    }

    /// A user of this host by name, with its groups; none: there is none.
    pub async fn named(&self, name: &str) -> Option<Person> {
        let asked = tokio::time::timeout(LIMIT, self.monitor.person_named(name)).await;
        asked.ok()?.ok().flatten()
    }

    /// What the user database says of a user; its number, where that does not answer. All who wait for the same user wait for one answer.
    pub async fn person(self: &Arc<Self>, uid: u32) -> Arc<Person> {
        let by_number = || {
            // By its number it is known all the same.
            Arc::new(Person {
                uid,
                ..Person::default()
            })
        };
        self.look_up(uid).await.unwrap_or_else(by_number)
    }

    /// What the user database says of a user; none: it does not answer.
    pub async fn look_up(self: &Arc<Self>, uid: u32) -> Option<Arc<Person>> {
        let known = self.asked(uid)?;
        // Of one that takes longer, nobody waits for the same again.
        let limit = tokio::time::Instant::from_std(known.since) + LIMIT;
        let person = tokio::time::timeout_at(limit, known.person.wait()).await;
        person.ok()?.clone()
    }

    /// What is known of a user, or will be; none: too many are asked for.
    fn asked(self: &Arc<Self>, uid: u32) -> Option<Known> {
        let mut known = self.known();
        if let Some(known) = known.get(&uid).filter(|known| !known.is_over()) {
            return Some(known.clone());
        }
        if known.len() >= KNOWN_MAX {
            known.retain(|_, known| known.person.get().is_none());
            if known.len() >= KNOWN_MAX {
                return None;
            }
        }
        let new = Known {
            since: Instant::now(),
            person: Arc::new(SetOnce::new()),
        };
        known.insert(uid, new.clone());
        tokio::spawn(self.clone().look(uid, new.person.clone()));
        Some(new)
    }

    /// Asks the user database. It is never given up before it answers, so that no more than [`LOOKS_MAX`] are under way at
    /// the monitor, which ends a worker that asks for too much; and they are not many in a second.
    async fn look(self: Arc<Self>, uid: u32, into: Arc<SetOnce<Option<Arc<Person>>>>) {
        let Ok(_look) = self.looks.acquire().await else {
            return;
        };
        let paced = tokio::time::sleep(LOOK_LEAST);
        let asked = self.monitor.person(uid).await;
        // It is set here only.
        let _ = into.set(asked.ok().map(Arc::new));
        paced.await;
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u32, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use adit_passed::Closer;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::monitor::client::Client;
    use crate::monitor::packets::Packets;
    use crate::monitor::wire::{Is, Message, WhoIs};

    #[tokio::test(start_paused = true)]
    async fn r119_a_user_database_that_hangs_is_asked_little_and_delays_a_client_once() {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let client = Arc::new(Client::default());
        let packets = client.connect(Packets::new(ours, Closer::default()).unwrap());
        let driven = client.clone();
        tokio::spawn(async move { driven.drive(packets, |_| {}).await });
        let monitor = Packets::new(theirs, Closer::default()).unwrap();
        let callers = Callers::new(
            Monitor::There(client),
            Err(io::ErrorKind::Unsupported.into()),
            Tokens::default(),
        );
        assert!(callers.unknown_users().is_some());
        // Many clients of each of many users, and no answer: each is known by its number.
        let asking: Vec<_> = (0..4000)
            .map(|n| callers.of_user(5000 + n % 2000))
            .collect();
        for (n, asking) in asking.iter().enumerate() {
            let caller = asking.caller().await;
            assert_eq!(caller.to_string(), format!("user:{}", 5000 + n % 2000));
        }
        let mut asked = Vec::new();
        while let Some(Ok(Some((id, Message::WhoIs(WhoIs::Uid(uid)), _)))) =
            futures_util::FutureExt::now_or_never(monitor.receive())
        {
            asked.push((id, uid));
        }
        assert_eq!(asked.len(), LOOKS_MAX);
        // Nobody waits for the same user again, until there is an answer.
        let (id, uid) = asked[0];
        let begin = tokio::time::Instant::now();
        callers.of_user(uid).caller().await;
        assert_eq!(begin.elapsed(), Duration::ZERO);
        let is = Is {
            user: Some((uid, "deploy".into(), vec!["ops".into()])),
        };
        monitor.send(id, &Message::Is(is), &[]).await.unwrap();
        // The next question says that the answer was taken.
        monitor.receive().await.unwrap();
        let caller = callers.of_user(uid).caller().await;
        assert_eq!(caller.to_string(), "user:deploy");
    }
}
