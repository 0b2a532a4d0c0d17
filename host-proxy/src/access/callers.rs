//! Finds out who is at the other end of a connection.
//!
//! A Unix socket's user is known at accept. Of a loopback connection the kernel is asked, and the host's user database says what
//! a user is called and which groups it is in; neither is waited for where everybody is served, but by the request that needs
//! it. What the database said is believed for [`KNOWN_FOR`], and anew after a reload.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::SetOnce;

use super::caller::{Caller, Person};
use super::certificate::Certificate;
use super::diag::{Diag, Socket};
use super::tokens::Tokens;
use crate::monitor::Monitor;

/// How long what the user database said of a user is believed.
pub const KNOWN_FOR: Duration = Duration::from_secs(30);
/// Users that are remembered at most.
const KNOWN_MAX: usize = 1024;
/// How long the user database may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Who finds it out.
pub struct Callers {
    diag: Option<Diag>,
    monitor: Monitor,
    known: Mutex<HashMap<u32, (Instant, Arc<Person>)>>,
    tokens: RwLock<Arc<Tokens>>,
}

/// Somebody who is being found out. A copy is the same one.
#[derive(Clone)]
pub struct Asking {
    found: Arc<SetOnce<Caller>>,
    certificate: Option<Arc<Certificate>>,
}

impl Asking {
    /// Somebody who is known.
    pub fn known(caller: Caller) -> Self {
        Self::new(SetOnce::new_with(Some(caller)))
    }

    fn new(found: SetOnce<Caller>) -> Self {
        Self {
            found: Arc::new(found),
            certificate: None,
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
    pub fn new(monitor: Monitor, socket: Option<Socket>, tokens: Tokens) -> Arc<Self> {
        let diag = socket.and_then(|socket| Diag::start(socket).ok());
        if diag.is_none() {
            tracing::warn!(
                "the kernel cannot be asked who local clients are: over TCP, grants to users do not count"
            );
        }
        Arc::new(Self {
            diag,
            monitor,
            known: Mutex::default(),
            tokens: RwLock::new(Arc::new(tokens)),
        })
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
    pub fn over_tcp(self: &Arc<Self>, client: SocketAddr, server: SocketAddr) -> Asking {
        let nobody = Caller::anonymous(client);
        if self.diag.is_none() || !client.ip().to_canonical().is_loopback() {
            return Asking::known(nobody);
        }
        let this = self.clone();
        Asking::find(async move {
            let Some(diag) = &this.diag else {
                return nobody;
            };
            match diag.user(client, server).await {
                Some(uid) => nobody.with_person(this.person(uid).await.as_ref()),
                None => nobody,
            }
        })
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

    /// What the user database says of a user; its number, where that does not answer.
    pub async fn person(&self, uid: u32) -> Arc<Person> {
        if let Some((since, person)) = self.known().get(&uid)
            && since.elapsed() < KNOWN_FOR
        {
            return person.clone();
        }
        let asked = tokio::time::timeout(LIMIT, self.monitor.person(uid)).await;
        let person = match asked {
            Ok(Ok(person)) => Arc::new(person),
            Ok(Err(_)) | Err(_) => {
                // By its number it is known all the same.
                return Arc::new(Person {
                    uid,
                    ..Person::default()
                });
            }
        };
        let mut known = self.known();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(uid, (Instant::now(), person.clone()));
        person
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u32, (Instant, Arc<Person>)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
