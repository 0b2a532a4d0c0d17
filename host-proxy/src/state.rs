//! What the parts of aditd share.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_port::control::Limit;
use adit_tasks::TrustStore;
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::audit::{Allowed, Decided, counted_as};
use crate::access::callers::Callers;
use crate::access::client::Whose;
use crate::access::guesses::Guesses;
use crate::access::limits::{limits, most_bytes_first};
use crate::access::rate::Buckets;
use crate::access::{Access, Caller, Denial, Grant, Grants, Verb};
use crate::blobs::Blobs;
use crate::config::{Config, Role, Speak, Trust};
use crate::desk::Desk;
use crate::desk::store::db::Db;
use crate::events::Events;
use crate::found::Found;
use crate::front::tls::Tls;
use crate::guests::Guests;
use crate::listen::{Room, Shares};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::peers::Peers;
use crate::proxy::pool::Pool;
use crate::registry::Registry;
use crate::reload::Reloads;
use crate::visit::Visits;
use crate::vm::VmEntry;

/// How long an agent may take to come back to an `aditd` that is started anew: it tries every five seconds at least.
const AGENTS_WAIT: Duration = Duration::from_secs(15);

/// Shared by all tasks of the process.
pub struct State {
    /// As read at start; of its VMs, [`registry`](Self::registry) has those that are served now.
    pub config: Config,
    /// This host's own name, once its VMs are known.
    host: OnceLock<VmId>,
    /// Addresses of its listeners, in the order of [`Config::fronts`]; of Unix sockets none.
    pub bound: OnceLock<Vec<Option<SocketAddr>>>,
    /// What became of the configuration file since then.
    pub reloads: Reloads,
    /// Whose cards are believed now.
    trust: RwLock<(Trust, Arc<TrustStore>)>,
    /// What callers may do.
    grants: RwLock<Arc<Grants>>,
    /// That may have changed, or a VM's labels.
    pub access_changed: Notify,
    /// Who they are.
    pub callers: Arc<Callers>,
    /// Other hosts.
    pub peers: Arc<Peers>,
    /// Wrong tokens that they have shown.
    guesses: Mutex<Guesses<Whose>>,
    /// TLS of listeners.
    pub tls: Tls,
    /// What is written of requests and tunnels, and of what is decided.
    pub visits: Arc<Visits>,
    /// What happens here.
    pub events: Arc<Events>,
    /// Guests that dial through the host's kernel.
    pub guests: Guests,
    /// What needs root.
    pub monitor: Monitor,
    /// VMs that are found.
    pub found: Found,
    /// The VMs.
    pub registry: Arc<Registry>,
    /// Their tasks.
    pub desk: Desk,
    /// Files for VMs.
    pub blobs: Blobs,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How many connections there were in this second.
    rates: Mutex<Buckets>,
    /// Since when this process runs, and time is counted there.
    began: Instant,
    /// How many connections there may be.
    pub room: Room,
    /// Each VM's share of the requests that are under way through the proxy.
    pub vm_shares: Arc<Shares<VmId>>,
    /// Shares of clients: of the proxy, of its Unix sockets, of management listeners.
    pub of_clients: OnceLock<[Arc<Shares<Whose>>; 3]>,
    /// Connections to guests' servers that wait for the next request.
    pub pool: Arc<Pool>,
    /// Requests of the API that wait for something to happen: half of its connections at most.
    pub patient: Arc<Semaphore>,
    /// The same of management listeners: they keep no owner from waiting.
    pub patient_others: Arc<Semaphore>,
    /// Drawn once a process.
    pub boot_nonce: [u8; 16],
    /// Drawn once a host, see [`identity`](crate::identity).
    pub host_id: [u8; 16],
    /// Stops everything.
    pub stop: CancellationToken,
    /// Clients of the proxy: a stop waits for them.
    pub clients: TaskTracker,
}

impl State {
    /// Puts the parts together.
    pub fn new(
        config: Config,
        monitor: Monitor,
        db: Db,
        blobs: Blobs,
        (callers, visits): (Arc<Callers>, Arc<Visits>),
        boot_nonce: [u8; 16],
        host_id: [u8; 16],
    ) -> Arc<Self> {
        let is_managed = config.listen.iter().any(|l| l.role == Role::Management);
        let room = Room::of_process(config.limits.connections, is_managed);
        let registry = Arc::new(Registry::new(&config.run_dir));
        let metrics = Arc::new(Metrics::new(registry.clone()));
        let per_vm = config.limits.requests_per_vm.unwrap_or(room.proxy / 4);
        Arc::new(Self {
            rates: Mutex::default(),
            began: Instant::now(),
            room,
            vm_shares: Shares::new(per_vm.max(1)),
            of_clients: OnceLock::new(),
            pool: Pool::new(room.proxy),
            patient: Arc::new(Semaphore::new((room.api / 2).max(1))),
            patient_others: Arc::new(Semaphore::new((room.management / 2).max(1))),
            desk: Desk::new(
                db,
                registry.clone(),
                metrics.clone(),
                &config.limits,
                now_ms,
            ),
            registry,
            trust: RwLock::new((config.trust.clone(), Arc::new(config.trust.anchors()))),
            grants: RwLock::new(Arc::new(config.grants())),
            access_changed: Notify::new(),
            peers: Peers::new(&config),
            tls: Tls::new(&config),
            callers,
            guesses: Mutex::default(),
            visits,
            events: Events::new(boot_nonce),
            config,
            host: OnceLock::new(),
            bound: OnceLock::new(),
            reloads: Reloads::default(),
            guests: Guests::default(),
            monitor,
            found: Found::default(),
            metrics,
            blobs,
            boot_nonce,
            host_id,
            stop: CancellationToken::new(),
            clients: TaskTracker::new(),
        })
    }

    /// This host's own name, if it has one.
    pub fn host(&self) -> Option<&VmId> {
        self.host.get()
    }

    /// Keeps the names of hosts from VMs.
    pub fn reserve(&self, config: &Config) {
        let own = self.host.get().or(self.config.names.host.as_ref());
        let others = config.host.iter().map(|host| &host.name);
        self.registry.reserve(others.chain(own).cloned());
    }

    /// Takes a name for this host, unless a VM has it: then it was nobody's choice.
    pub fn take_name(&self) {
        let name = self.config.host_name();
        if let Some(name) = name.filter(|name| self.registry.get(name).is_none()) {
            // Once, when the VMs are loaded.
            let _ = self.host.set(name.clone());
            self.reserve(&self.config);
        }
    }

    /// Whose cards are believed now.
    pub fn trust(&self) -> Arc<TrustStore> {
        let trust = self.trust.read().unwrap_or_else(PoisonError::into_inner);
        trust.1.clone()
    }

    /// Replaces that. Returns whether it is something else.
    pub fn set_trust(&self, new: &Trust) -> bool {
        let mut trust = self.trust.write().unwrap_or_else(PoisonError::into_inner);
        let changes = trust.0 != *new;
        if changes {
            *trust = (new.clone(), Arc::new(new.anchors()));
        }
        changes
    }

    /// Whether this process has not run for so long that agents which an earlier one knew would have come back.
    pub fn waits_for_agents(&self) -> bool {
        self.began.elapsed() < AGENTS_WAIT
    }

    /// What callers may do now.
    pub fn grants(&self) -> Arc<Grants> {
        let grants = self.grants.read().unwrap_or_else(PoisonError::into_inner);
        grants.clone()
    }

    /// Replaces what callers may do. Returns whether that is something else.
    pub fn set_grants(&self, grants: Grants) -> bool {
        let mut now = self.grants.write().unwrap_or_else(PoisonError::into_inner);
        let (old, new) = (now.all(), grants.all());
        let is_same = |(old, new): (&Grant, &Grant)| old.says_as(new);
        let changes = old.len() != new.len() || !old.iter().zip(new).all(is_same);
        *now = Arc::new(grants);
        if changes {
            // Whoever has one still shows it again with its next connection or request.
            let shares = self.of_clients.get().into_iter().flatten();
            shares.for_each(|shares| shares.forget_weights());
        }
        changes
    }

    /// Wrong tokens that callers have shown.
    pub fn guesses(&self) -> MutexGuard<'_, Guesses<Whose>> {
        self.guesses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides, and writes down what is denied. None: it may be done.
    pub fn decide(&self, caller: &Caller, verb: Verb<'_>, vm: &VmEntry) -> Option<Denial> {
        self.allow(caller, verb, vm).err()
    }

    /// Decides, and writes down what is denied. Returns where the grant is written that allows it; none: it is the owner's right.
    ///
    /// # Errors
    /// It is denied.
    pub fn allow(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        vm: &VmEntry,
    ) -> Result<Option<String>, Denial> {
        let grants = self.grants();
        let access = vm.viewed(|vm| match grants.decide(caller, verb, vm, self.now_ms()) {
            Access::Allow(by) => Ok(by.map(|grant| grant.place.clone())),
            Access::Deny(denial) => Err(denial),
        });
        let (word, target) = verb.words();
        tracing::debug!(vm = %vm.name, %caller, verb = word, target, ?access, "access decided");
        // A stream is written at its end, and to be shown a VM is not worth a line.
        if let Ok(by) = &access
            && matches!(verb, Verb::Task | Verb::Goal | Verb::Manage)
        {
            let by = by.as_deref().unwrap_or("owner");
            self.allowed(caller, word, vm.name.as_str(), by);
        }
        if let Err(denial) = &access {
            self.denied(
                caller,
                word,
                vm.name.as_str(),
                &target,
                denial.reason.word(),
            );
        }
        access
    }

    /// Whether connections to a VM, or their bytes, are counted by the second.
    pub fn has_rate(&self, vm: &VmEntry) -> bool {
        let spec = vm.spec();
        let of_vm = spec.connections_per_s.is_some() || spec.bytes_per_s.is_some();
        of_vm || self.grants().has_rates()
    }

    /// Bytes of a path that are the directory which the caller's grants are for; 0: any. None: there is no grant.
    pub fn files_root(&self, caller: &Caller, verb: Verb<'_>, vm: &VmEntry) -> Option<u16> {
        let grants = self.grants();
        let len = vm.viewed(|view| grants.files_root(caller, verb, view, self.now_ms()))?;
        u16::try_from(len).ok()
    }

    /// What limits the bytes of a stream of this caller that is there already; none: no grant lets it be there.
    pub fn limits(&self, caller: &Caller, verb: Verb<'_>, vm: &VmEntry) -> Option<Vec<Limit>> {
        if caller.is_owner() {
            return Some(Vec::new());
        }
        let (grants, of_vm) = (self.grants(), vm.spec().bytes_per_s);
        vm.viewed(|view| {
            let all = grants.all_granted(caller, verb, view, self.now_ms());
            let by = most_bytes_first(all).first().copied()?;
            Some(limits(caller, by, of_vm))
        })
    }

    /// Counts a connection that is allowed: for the caller by one of its grants, and for the VM. Returns where that grant is written,
    /// and what limits the connection's bytes; none: it is the owner, who is not counted.
    ///
    /// # Errors
    /// Each grant that allows it has as many in this second already, or the VM has.
    pub fn rated(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        vm: &VmEntry,
    ) -> Result<Option<(String, Vec<Limit>)>, Refusal> {
        if caller.is_owner() {
            return Ok(None);
        }
        let spec = vm.spec();
        let (grants, now_ms) = (self.grants(), self.now_ms());
        let of = counted_as(&caller.to_string(), caller.from());
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let passed_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut most = None;
        let by = vm.viewed(|view| {
            let all = most_bytes_first(grants.all_granted(caller, verb, view, now_ms));
            let granted = all.into_iter().find(|grant| match grant.connections_per_s {
                None => true,
                Some(per_s) => {
                    most = most.max(Some(per_s));
                    rates.take(&format!("{} {of}", grant.place), per_s, passed_ms)
                }
            });
            granted.map(|grant| {
                let limits = limits(caller, grant, spec.bytes_per_s);
                (grant.place.clone(), limits)
            })
        });
        let of_vm = spec.connections_per_s;
        let (per_s, whose) = match (by, of_vm) {
            (None, _) => (most, format!("{caller} has")),
            (Some(by), None) => return Ok(Some(by)),
            (Some(by), Some(per_s)) => match rates.take(vm.name.as_str(), per_s, passed_ms) {
                true => return Ok(Some(by)),
                false => (Some(per_s), "it has".into()),
            },
        };
        drop(rates);
        let (word, what) = verb.words();
        self.denied(caller, word, vm.name.as_str(), &what, "too-often");
        let per_s = per_s.unwrap_or_default();
        let text = format!("VM `{}`: {whose} {per_s} connections a second", vm.name);
        Err(Refusal::new(Code::TooOften, text))
    }

    /// Writes down what is allowed and carries nothing, if that is wanted; `by`: where the grant is written.
    pub fn allowed(&self, caller: &Caller, verb: &'static str, vm: &str, by: &str) {
        self.allowed_to(caller, verb, (vm, ""), by);
    }

    /// The same, of something in the VM.
    pub fn allowed_to(
        &self,
        caller: &Caller,
        verb: &'static str,
        (vm, target): (&str, &str),
        by: &str,
    ) {
        let allowed = Allowed {
            caller: (&caller.to_string(), caller.from()),
            verb,
            vm,
            target,
            reason: by,
            moved: None,
            trace_id: "",
        };
        self.visits.audit().allowed(allowed, self.now_ms());
    }

    /// Writes down what is denied.
    pub fn denied(
        &self,
        caller: &Caller,
        verb: &'static str,
        vm: &str,
        target: &str,
        reason: &'static str,
    ) {
        let decided = Decided {
            caller,
            verb,
            vm,
            target,
            denied: reason,
        };
        self.events.denied();
        self.visits.audit().note(decided, self.now_ms());
    }

    /// The first listener of the proxy that speaks HTTP over TLS, where clients of other machines get in: its address, and the pin of its
    /// key.
    pub fn door(&self) -> Option<(SocketAddr, String)> {
        let bound = self.bound.get()?;
        let fronts = self.config.fronts();
        let mut doors = fronts.iter().zip(bound).enumerate();
        doors.find_map(|(nth, (front, bound))| {
            let is = front.role == Role::Proxy && front.speak == Speak::Http;
            let terms = self.tls.terms(nth).filter(|_| is)?;
            Some(((*bound)?, terms.pin))
        })
    }

    /// Unix time.
    pub fn now_ms(&self) -> i64 {
        now_ms()
    }
}

/// Unix time. The one place where aditd reads the wall clock.
fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}
