//! Other hosts: asks them where VMs are, and takes clients to the one that has theirs.
//!
//! ```text
//!  client ─► find: own VMs, VmMap ─┬─ here: the port process, as ever
//!                                  └─ there: hop ══ mTLS ══ CONNECT VM.HOST:PORT, who asks ─► that host decides, dials
//! ```
//! There is one hop: who comes by way of another host gets VMs of this host only, so no request goes round. A host is known by the
//! pin of its key, as server and as client; nothing else is tried where that fails. What it says of who asks counts as far as
//! `[[host]] vouches` says, and what it claims to have, as far as `names` does.
//!
//! | module | what |
//! |---|---|
//! | `tls` | what both ends show and check |
//! | `hop` | who asks, as it is written for the next host. Pure |
//! | `lines` | the connections to a host: HTTP/2, each with many streams |
//! | `line` | one stream to a host: a question, or a tunnel |
//! | `work` | what another host is asked of goals and tasks |
//! | `carry` | bytes of a tunnel whose client is here |
//! | `asked` | what this host answers to others |

pub mod asked;
mod carry;
pub mod hop;
pub mod line;
mod lines;
mod tls;
pub mod work;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use adit_names::VmId;
use rustls::ClientConfig;
use tokio::runtime::{Builder, Handle};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::access::{Caller, Subject};
use crate::config::{Config, HostConfig};
use crate::reach::map::VmMap;

pub use carry::Carried;
use lines::Lines;

/// Questions to other hosts that are under way at the same time.
const QUESTIONS_MAX: usize = 64;

/// Watchers of tasks of this host who are at other hosts.
const WATCHES_MAX: usize = 32;

/// Connections that are being made at the same time, and how long each counts at least: some 3,200 in a second. The monitor
/// gives a worker up that asks it for more than it should need, and clients choose how many are wanted.
const CONNECTS_MAX: usize = 64;
const CONNECT_LEAST: Duration = Duration::from_millis(20);

/// Another host.
#[derive(Debug)]
pub struct Host {
    /// As it is configured.
    pub config: HostConfig,
    /// How it is spoken to; none: this host has nothing to show.
    tls: Option<Arc<ClientConfig>>,
    lines: Lines,
}

/// All of them.
#[derive(Debug)]
pub struct Peers {
    hosts: RwLock<Arc<Vec<Arc<Host>>>>,
    /// What they say of where VMs are.
    map: Mutex<VmMap>,
    /// Where TLS to them is spoken.
    thread: Option<Handle>,
    pub(crate) questions: Semaphore,
    /// Names that hosts are being asked for, and how often.
    asking: Mutex<HashMap<VmId, (CancellationToken, usize)>>,
    /// Requests of other hosts that wait for something to happen.
    pub(crate) watches: Arc<Semaphore>,
    connects: Arc<Semaphore>,
    begin: Instant,
}

impl Peers {
    /// As the configuration has them.
    pub fn new(config: &Config) -> Arc<Self> {
        let thread = thread();
        if let Err(e) = &thread {
            tracing::error!(error = %e, "no thread for other hosts: their VMs are not reached");
        }
        let peers = Self {
            hosts: RwLock::default(),
            map: Mutex::default(),
            thread: thread.ok(),
            questions: Semaphore::new(QUESTIONS_MAX),
            asking: Mutex::default(),
            watches: Arc::new(Semaphore::new(WATCHES_MAX)),
            connects: Arc::new(Semaphore::new(CONNECTS_MAX)),
            begin: Instant::now(),
        };
        peers.renew(config);
        Arc::new(peers)
    }

    /// Replaces them. Tunnels that are open go on.
    pub fn renew(&self, config: &Config) {
        let identity = config.peers.identity().ok().flatten();
        let hosts = config.host.iter().map(|host| {
            let tls = identity.clone().and_then(|own| tls::client(host, own));
            let config = host.clone();
            let lines = Lines::default();
            Arc::new(Host { config, tls, lines })
        });
        let hosts: Vec<_> = hosts.collect();
        let asked = hosts.iter().filter(|host| host.tls.is_some());
        let asked = asked.map(|host| host.config.name.clone()).collect();
        let is_other = |name: &VmId| config.host.iter().any(|host| host.name == *name);
        let rows = config.peers.rows.iter().filter(|(_, host)| is_other(host));
        let rows = rows.map(|(vm, host)| (vm.clone(), host.clone())).collect();
        {
            let mut map = self.map();
            map.set_hosts(asked);
            map.set_rows(rows);
        }
        *self.hosts.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(hosts);
    }

    /// All of them.
    pub fn all(&self) -> Arc<Vec<Arc<Host>>> {
        let hosts = self.hosts.read().unwrap_or_else(PoisonError::into_inner);
        hosts.clone()
    }

    /// One of them.
    pub fn get(&self, name: &VmId) -> Option<Arc<Host>> {
        let hosts = self.all();
        hosts.iter().find(|host| host.config.name == *name).cloned()
    }

    /// The host that a caller is, by the key of its certificate.
    pub fn of(&self, caller: &Caller) -> Option<Arc<Host>> {
        let hosts = self.all();
        let is = |host: &&Arc<Host>| caller.subjects().contains(host.config.pin.subject());
        hosts.iter().find(is).cloned()
    }

    /// Waits for its turn to have a connection made. Its place is free again once it is dropped and [`CONNECT_LEAST`] are over.
    async fn turn(&self) -> impl Drop + use<> {
        // It is never closed.
        let place = self.connects.clone().acquire_owned().await.ok();
        Turn(place)
    }

    /// Whether a name that somebody had by way of another host still counts.
    pub fn still_vouches(&self, host: &VmId, subject: &Subject) -> bool {
        self.get(host)
            .is_some_and(|host| host.config.vouches_for(subject))
    }

    /// Hosts are asked for a VM from now on, until this is dropped.
    pub(crate) fn asks(self: &Arc<Self>, vm: &VmId) -> Asks {
        let mut asking = self.asking();
        asking.entry(vm.clone()).or_default().1 += 1;
        Asks(self.clone(), vm.clone())
    }

    /// Waits while hosts are being asked for a VM, if they are: whoever comes second is not told that there is none.
    pub(crate) async fn asked(&self, vm: &VmId) {
        let asked = self.asking().get(vm).map(|(asked, _)| asked.clone());
        if let Some(asked) = asked {
            asked.cancelled().await;
        }
    }

    fn asking(&self) -> MutexGuard<'_, HashMap<VmId, (CancellationToken, usize)>> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn map(&self) -> MutexGuard<'_, VmMap> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock of the map.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Hosts that are being asked for a VM.
pub(crate) struct Asks(Arc<Peers>, VmId);

impl Drop for Asks {
    fn drop(&mut self) {
        let mut asking = self.0.asking();
        if let Some((asked, times)) = asking.get_mut(&self.1) {
            *times -= 1;
            if *times == 0 {
                asked.cancel();
                asking.remove(&self.1);
            }
        }
    }
}

/// A connection that is being made.
struct Turn(Option<OwnedSemaphorePermit>);

impl Drop for Turn {
    fn drop(&mut self) {
        // Without a runtime aditd stops.
        if let (Some(place), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(async move {
                tokio::time::sleep(CONNECT_LEAST).await;
                drop(place);
            });
        }
    }
}

/// Starts the thread. It ends with the process.
fn thread() -> std::io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("peers".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}
