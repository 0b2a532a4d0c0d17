//! One VM: its settings, its channel, its agent, and what the API shows of them.
//!
//! | part | what changes it |
//! |---|---|
//! | `spec` | the operator: `aditd.toml`, the API |
//! | [`channel`](Channel) | the supervisor: the port process that serves it, and what that says |
//! | [`agent`](Agent) | the agent in the guest: its streams, and what it says |
//! | [`dials`](Dials) | whoever dials it |
//! | [`lock`](Lock) | the operator: whether anything new goes there |

mod agent;
mod changes;
mod channel;
mod dials;
mod drain;
mod lock;
mod show;

pub use agent::{AGENT_STREAMS_MAX, Agent, ENROLMENTS_MAX, OTHER_STREAMS_MAX, TrustOf};
pub use changes::Changes;
pub use channel::{Channel, Serving};
pub use dials::{Dials, LastDial};
pub use drain::StillOpen;
pub use lock::{Lock, Locked};

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use adit_names::VmId;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::access::VmView;
use crate::config::{VmConfig, vm_dir};
use crate::fault::{Fault, FaultKind};

/// Where a VM's settings come from, and so where they are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `aditd.toml`.
    File,
    /// The API: they are in the database.
    Api,
    /// A socket that was found: they are in a section `[[discover]]` of `aditd.toml`.
    Found {
        /// Which: its [`key`](crate::config::DiscoverConfig::key).
        section: u64,
    },
}

impl Origin {
    /// Its word in the API.
    pub fn word(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Api => "api",
            Self::Found { .. } => "found",
        }
    }

    /// Who has said what its settings say.
    fn says(self) -> &'static str {
        match self {
            Self::File => "aditd.toml says so",
            Self::Api => "it was added so",
            Self::Found { .. } => "its socket was found by [[discover]]",
        }
    }
}

/// One VM.
#[derive(Debug)]
pub struct VmEntry {
    /// Name and id. It never changes.
    pub name: VmId,
    /// Its CID. It never changes.
    pub cid: u64,
    /// Where its settings come from.
    pub origin: Origin,
    /// Its directory: sockets of its port process.
    pub dir: PathBuf,
    /// Held while its settings are changed or it is removed, so that one change ends before the next begins.
    pub changing: tokio::sync::Mutex<()>,
    /// A task for it was queued.
    pub queued: Notify,
    /// There may be a trust document for it.
    pub trusted: Notify,
    /// It was removed: its supervisor ends.
    pub removed: CancellationToken,
    /// Its port process.
    pub channel: Channel,
    /// Its agent.
    pub agent: Agent,
    /// How dials into it went.
    pub dials: Dials,
    /// Whether anything new goes there.
    pub lock: Lock,
    /// All its settings as they are now.
    spec: RwLock<Arc<VmConfig>>,
    open_tasks: AtomicU32,
    changes: Changes,
}

impl VmEntry {
    /// Makes a VM; its directory is under `run_dir`.
    pub fn new(run_dir: &Path, spec: VmConfig, origin: Origin) -> Self {
        let changes = Changes::default();
        let dir = vm_dir(run_dir, &spec.name);
        Self {
            name: spec.name.clone(),
            cid: spec.cid,
            origin,
            changing: tokio::sync::Mutex::default(),
            queued: Notify::new(),
            trusted: Notify::new(),
            removed: CancellationToken::new(),
            channel: Channel::new(&spec.name, &dir, changes.clone()),
            dir,
            agent: Agent::new(&spec.name, changes.clone()),
            dials: Dials::default(),
            lock: Lock::new(changes.clone()),
            spec: RwLock::new(Arc::new(spec)),
            open_tasks: AtomicU32::new(0),
            changes,
        }
    }

    /// All settings as they are now. Whoever decides by several of them takes one snapshot.
    pub fn spec(&self) -> Arc<VmConfig> {
        let spec = self.spec.read().unwrap_or_else(PoisonError::into_inner);
        spec.clone()
    }

    /// Replaces the settings. Name and CID stay: callers have checked that they are the same.
    pub fn set_spec(&self, spec: VmConfig) {
        *self.spec.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(spec);
        self.changes.note();
    }

    /// How many shares it has.
    pub fn weight(&self) -> usize {
        usize::try_from(self.spec().weight.max(1)).unwrap_or(1)
    }

    /// Calls `look` with what of the VM decides who may do what with it.
    pub fn viewed<T>(&self, look: impl FnOnce(VmView<'_>) -> T) -> T {
        let spec = self.spec();
        self.agent.with_labels(|card| {
            look(VmView {
                name: self.name.as_str(),
                allow: &spec.allow,
                allow_vsock: &spec.allow_vsock,
                allow_services: &spec.allow_services,
                labels: &spec.labels,
                card,
            })
        })
    }

    /// Names of the settings that its port process will have only when it is started anew.
    pub fn pending(&self) -> Vec<String> {
        self.channel.lacks(&self.spec())
    }

    /// Everything that is wrong with it now, the gravest first.
    pub fn faults(&self) -> Vec<Fault> {
        let mut faults = self.channel.faults();
        faults.extend(self.lacks_ring());
        faults.extend(self.agent.faults());
        faults
    }

    /// Streams that somebody has opened by way of this host, as its port process has said last. Those that the guest has dialled are not
    /// among them.
    pub fn tunnels(&self) -> u32 {
        let streams = self.channel.status().map_or(0, |s| s.streams);
        let dialled = u32::try_from(self.agent.dialled()).unwrap_or(u32::MAX);
        streams.saturating_sub(dialled)
    }

    /// Its services are to go over a ring, and do not.
    fn lacks_ring(&self) -> Option<Fault> {
        let lacks = self.spec().carrier.wants_ring() && self.ready();
        let ring = self.channel.ring().filter(|ring| lacks && !ring.running)?;
        let text = format!("it is to have a ring, and uses vsock: {}", ring.why);
        Some(Fault::new(FaultKind::Carrier, &text))
    }

    /// Wakes up when the state may have changed.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether an agent is connected and has said who it is. Not while its VM is paused, or on its way through a reboot: its
    /// streams are held then.
    pub fn ready(&self) -> bool {
        self.channel.session() && self.agent.is_known()
    }

    /// Notes how many tasks are open.
    pub fn set_open_tasks(&self, n: u32) {
        self.open_tasks.store(n, Ordering::Relaxed);
    }

    fn open_tasks(&self) -> u32 {
        self.open_tasks.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrolment::Enrolment;
    use adit_tasks::wire::Facts;

    fn entry() -> VmEntry {
        let config = VmConfig::new("a".parse().unwrap(), 3);
        VmEntry::new(Path::new("/run/adit"), config, Origin::Api)
    }

    #[test]
    fn a_newer_agent_connection_ends_the_older() {
        let e = entry();
        let (first, over_first) = e.agent.connected();
        let (second, over_second) = e.agent.connected();
        assert!(first.is_cancelled() && !second.is_cancelled());
        // Only the second came while there was another.
        assert_eq!((over_first, over_second), (false, true));
        e.agent.gone(&first);
        assert!(!second.is_cancelled());
        e.agent.gone(&second);
        assert!(!e.agent.connected().1);
    }

    #[test]
    fn what_a_port_process_was_not_started_with_is_pending_until_the_next_one() {
        let e = entry();
        e.channel.set_started_with(e.spec());
        let mut spec = VmConfig::clone(&e.spec());
        (spec.busy_poll_us, spec.allow) = (50, vec![80]);
        e.set_spec(spec);
        assert_eq!(e.pending(), ["busy_poll_us"]);
        e.channel.set_started_with(e.spec());
        assert!(e.pending().is_empty());
    }

    #[test]
    fn every_fault_is_listed_with_the_gravest_first_and_as_text_of_one_line() {
        let e = entry();
        e.agent.seen(Some(Facts {
            agent_version: "1".into(),
            kernel: "6".into(),
            os: "x".into(),
            vm_id: "b".into(),
            anchors: 1,
            boot_nonce: [1; 16],
        }));
        e.channel.set_trouble("one\nline".into());
        e.channel.set_stuck(Some("x".repeat(10_000)));
        let faults = [
            "policy-bad: /etc/adit-guest/policy.toml:2:1: x",
            "card-old: y",
            "no-space: z",
            "journal-corrupt: z",
        ];
        e.agent.enrolled(Enrolment {
            faults: faults.map(str::to_owned).into(),
            ..Enrolment::default()
        });
        let kinds: Vec<_> = e.faults().iter().map(|f| f.kind).collect();
        use FaultKind::{Card, PortProcess, PowerCycle};
        let all = [
            PowerCycle,
            PortProcess,
            FaultKind::Enrolment,
            Card,
            FaultKind::Policy,
            FaultKind::Journal,
        ];
        assert_eq!(kinds, all);
        let shown = e.show().fault.unwrap();
        assert!(
            shown.contains("one\\nline") && shown.contains("`b`"),
            "{shown}"
        );
        assert!(shown.len() < 2000);
    }
}
