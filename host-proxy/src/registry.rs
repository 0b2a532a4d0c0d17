//! The VMs of this host: names, CIDs, what may be reached, and how each one's channel stands.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use adit_api::{Carrier, CarrierKind, Holding, Vm, VmState};
use adit_port::control::{IVSHMEM_SOCKET, RING_SOCKET, Ring, VHOST_SOCKET};
use adit_tasks::VmId;
use adit_tasks::wire::{Facts, Held};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::config::{VMS_MAX, VmConfig, vm_dir};
use crate::keeper::Keeper;
use crate::ports::Link;
use crate::whose::PortProcess;

/// Streams to the tasks service that one guest holds open at most: its agent's, and a few that replace each other.
pub const AGENT_STREAMS_MAX: usize = 4;
/// Streams from unprivileged ports of one guest that wait for their refusal at most.
pub const OTHER_STREAMS_MAX: usize = 2;

/// Characters of what a port process says of its ring that are shown.
const RING_TEXT_MAX: usize = 300;

/// Why a VM cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Another VM has the name.
    #[error("a VM named `{0}` is there already")]
    NameTaken(VmId),
    /// Another VM has the CID.
    #[error("CID {cid} is taken by `{by}`")]
    CidTaken {
        /// The CID.
        cid: u64,
        /// Who has it.
        by: VmId,
    },
    /// [`VMS_MAX`] VMs.
    #[error("there are {VMS_MAX} VMs already")]
    Full,
}

/// What the agent said, and when.
#[derive(Debug, Default)]
struct AgentState {
    facts: Option<Facts>,
    /// How far its clock is ahead, ms.
    clock_ahead_ms: Option<i64>,
    held: Option<Held>,
    seen: Option<Instant>,
    connected: Option<CancellationToken>,
}

/// One VM.
#[derive(Debug)]
pub struct VmEntry {
    /// What it was registered with.
    pub config: VmConfig,
    /// Its directory: sockets of its port process.
    pub dir: PathBuf,
    /// A task for it was queued.
    pub queued: Notify,
    /// It was removed: its supervisor ends.
    pub removed: CancellationToken,
    /// [`AGENT_STREAMS_MAX`].
    pub agent_streams: Arc<Semaphore>,
    /// [`OTHER_STREAMS_MAX`].
    pub other_streams: Arc<Semaphore>,
    /// What its port process left with us for the next one.
    pub keeper: Keeper,
    /// Why there is no port process.
    trouble: Mutex<Option<String>>,
    /// Why its VMM has no channel until the VM is power-cycled.
    stuck: Mutex<Option<String>>,
    /// How its ring stands, as its port process said last.
    ring: Mutex<Option<Ring>>,
    supervised: AtomicBool,
    /// Its port process is its VMM.
    held: AtomicBool,
    link: watch::Sender<Option<Arc<Link>>>,
    /// Who is at the other end of the link.
    process: Mutex<Option<Arc<PortProcess>>>,
    agent: Mutex<AgentState>,
    /// Changes whenever its state may have.
    changed: watch::Sender<u64>,
    open_tasks: AtomicU32,
}

impl VmEntry {
    /// The port process, if one is connected.
    pub fn link(&self) -> Option<Arc<Link>> {
        self.link.borrow().clone()
    }

    /// Sets or clears the port process.
    pub fn set_link(&self, link: Option<Arc<Link>>) {
        self.link.send_replace(link);
        self.touch();
    }

    /// Notes who is at the other end of the link.
    pub fn set_process(&self, process: Option<Arc<PortProcess>>) {
        let mut noted = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        *noted = process;
    }

    /// Who is at the other end of the link, if one is connected.
    pub fn process(&self) -> Option<Arc<PortProcess>> {
        let process = self.process.lock();
        process.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Process id of whoever serves it, as the kernel has it.
    pub fn port_pid(&self) -> Option<u32> {
        self.process().map(|process| process.pid())
    }

    /// Its supervisor ends, and with it whatever held the port process.
    pub fn supervisor_ended(&self) {
        self.supervised.store(false, Ordering::Release);
        self.touch();
    }

    /// Whether nobody looks after it any more.
    pub fn unsupervised(&self) -> bool {
        !self.supervised.load(Ordering::Acquire)
    }

    /// Notes whether its port process is its VMM.
    pub fn set_held(&self, held: bool) {
        self.held.store(held, Ordering::Release);
        self.touch();
    }

    /// The process that runs it and has its device, and takes it off the map when it ends; none: a port process serves it.
    pub fn held_by(&self) -> Option<u32> {
        let held = |_: &u32| self.held.load(Ordering::Acquire);
        self.port_pid().filter(held)
    }

    /// Notes why there is no port process, or that there is one. Returns whether that is news.
    pub fn set_trouble(&self, trouble: Option<String>) -> bool {
        let mut noted = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let news = *noted != trouble;
        *noted = trouble;
        drop(noted);
        if news {
            self.touch();
        }
        news
    }

    /// Notes that only a power cycle gives the VM its channel back, and why; or that it has it.
    pub fn set_stuck(&self, stuck: Option<String>) {
        let mut noted = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        let news = *noted != stuck;
        *noted = stuck;
        drop(noted);
        if news {
            self.touch();
        }
    }

    /// Notes how its ring stands; `None`: nobody says.
    pub fn set_ring(&self, ring: Option<Ring>) {
        *self.ring.lock().unwrap_or_else(PoisonError::into_inner) = ring;
        self.touch();
    }

    fn carrier(&self) -> Carrier {
        let measured = |ns: u64| (ns > 0).then_some(ns);
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ring) = &*ring else {
            return Carrier::default();
        };
        Carrier {
            kind: match ring.running {
                true => CarrierKind::Ring,
                false => CarrierKind::Vsock,
            },
            // Its words are the port process's, which may be in its guest's hands.
            why: ring.why.chars().take(RING_TEXT_MAX).collect(),
            memory: (!ring.memory.is_empty())
                .then(|| ring.memory.chars().take(RING_TEXT_MAX).collect()),
            bytes: ring.bytes,
            line_ns: ring.line_ns,
            doorbell: match ring.hears {
                1 => Some("interrupt".into()),
                2 => Some("a byte over vsock".into()),
                3 => Some("none: the guest looks on".into()),
                _ => None,
            },
            rtt_ns: measured(ring.rtt_ns.0),
            vsock_rtt_ns: measured(ring.rtt_ns.1),
            streams: ring.streams,
        }
    }

    /// Why the VM must be power-cycled, if it must.
    pub fn stuck(&self) -> Option<String> {
        let stuck = self.stuck.lock();
        stuck.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why there is no port process, if there is none.
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock();
        trouble.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a VMM is connected and the guest's driver runs.
    pub fn session(&self) -> bool {
        self.link()
            .and_then(|l| l.status())
            .is_some_and(|s| s.session)
    }

    /// The session's number, 0 if there is none.
    pub fn epoch(&self) -> u64 {
        self.link().and_then(|l| l.status()).map_or(0, |s| s.epoch)
    }

    /// Tells waiters to look again.
    pub fn touch(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Wakes up when the state may have changed.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// An agent's connection begins: the older one is told to end.
    pub fn agent_connected(&self) -> CancellationToken {
        let token = CancellationToken::new();
        let older = self.agent().connected.replace(token.clone());
        if let Some(older) = older {
            older.cancel();
        }
        token
    }

    /// An agent's connection has ended.
    pub fn agent_gone(&self, token: &CancellationToken) {
        token.cancel();
        self.touch();
    }

    /// The agent has spoken.
    pub fn agent_seen(&self, facts: Option<Facts>) {
        let mut agent = self.agent();
        agent.seen = Some(Instant::now());
        if facts.is_some() {
            agent.facts = facts;
        }
        drop(agent);
        self.touch();
    }

    /// The agent has said what its clock shows.
    pub fn agent_clock(&self, guest_ms: u64, now_ms: i64) {
        let guest_ms = i64::try_from(guest_ms).unwrap_or(i64::MAX);
        self.agent().clock_ahead_ms = Some(guest_ms.saturating_sub(now_ms));
        self.touch();
    }

    /// The agent holds a task that is not yet valid by its clock, or goes on.
    pub fn agent_holds(&self, held: Option<Held>) {
        let before = std::mem::replace(&mut self.agent().held, held);
        if before != held {
            self.touch();
        }
    }

    /// Whether an agent is connected and has said who it is. Not while its VM is paused, or on its way through a reboot: its
    /// streams are held then.
    pub fn ready(&self) -> bool {
        if !self.session() {
            return false;
        }
        let agent = self.agent();
        agent.facts.is_some() && agent.connected.as_ref().is_some_and(|t| !t.is_cancelled())
    }

    /// Notes how many tasks are open.
    pub fn set_open_tasks(&self, n: u32) {
        self.open_tasks.store(n, Ordering::Relaxed);
    }

    /// The VM as the API shows it.
    pub fn show(&self) -> Vm {
        let status = self.link().and_then(|l| l.status());
        let agent = self.agent();
        let connected = agent.connected.as_ref().is_some_and(|t| !t.is_cancelled());
        let stuck = self.stuck();
        let state = match &status {
            _ if stuck.is_some() => VmState::PowerCycle,
            None => VmState::Down,
            Some(s) if !s.session => VmState::Waiting,
            Some(_) if connected && agent.facts.is_some() => VmState::Ready,
            Some(_) => VmState::Up,
        };
        let age = |seen: Instant| u64::try_from(seen.elapsed().as_millis()).unwrap_or(u64::MAX);
        let facts = agent.facts.as_ref();
        Vm {
            name: self.config.name.to_string(),
            cid: self.config.cid,
            state,
            agent: facts.map(|f| f.agent_version.clone()),
            kernel: facts.map(|f| f.kernel.clone()),
            enrolled_as: facts
                .map(|f| f.vm_id.clone())
                .filter(|id| id != self.config.name.as_str()),
            clock_ahead_ms: agent.clock_ahead_ms,
            holding: agent.held.filter(|_| connected).map(|held| Holding {
                task_id: adit_tasks::hex(&held.task_id),
                valid_from: rfc3339(held.not_before_ms),
                guest_time: rfc3339(held.now_ms),
            }),
            // A connection that is open is heard from now.
            last_seen_ms: agent.seen.map(|seen| if connected { 0 } else { age(seen) }),
            epoch: status.as_ref().map_or(0, |s| s.epoch),
            streams: status.as_ref().map_or(0, |s| s.streams),
            queued: self.open_tasks.load(Ordering::Relaxed),
            allow: self.config.allow.clone(),
            allow_vsock: self.config.allow_vsock.clone(),
            port_pid: self.port_pid(),
            held_by: self.held_by(),
            vhost_socket: self.dir.join(VHOST_SOCKET).display().to_string(),
            carrier: self.carrier(),
            ring_socket: self.dir.join(RING_SOCKET).display().to_string(),
            ivshmem_socket: self.dir.join(IVSHMEM_SOCKET).display().to_string(),
            fault: stuck
                .or_else(|| status.map(|s| s.last_fault))
                .filter(|fault| !fault.is_empty())
                .or_else(|| self.trouble()),
        }
    }

    fn agent(&self) -> MutexGuard<'_, AgentState> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rfc3339(ms: u64) -> String {
    crate::queue::rfc3339(i64::try_from(ms).unwrap_or(i64::MAX))
}

/// All VMs by name.
#[derive(Debug)]
pub struct Registry {
    run_dir: PathBuf,
    vms: RwLock<BTreeMap<VmId, Arc<VmEntry>>>,
}

impl Registry {
    /// Makes an empty registry; VMs get directories under `run_dir`.
    pub fn new(run_dir: &Path) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
            vms: RwLock::default(),
        }
    }

    /// Adds a VM.
    ///
    /// # Errors
    /// Its name or CID is taken, or there are too many.
    pub fn add(&self, config: VmConfig) -> Result<Arc<VmEntry>, AddError> {
        let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
        if vms.contains_key(&config.name) {
            return Err(AddError::NameTaken(config.name));
        }
        if let Some(other) = vms.values().find(|v| v.config.cid == config.cid) {
            return Err(AddError::CidTaken {
                cid: config.cid,
                by: other.config.name.clone(),
            });
        }
        if vms.len() >= VMS_MAX {
            return Err(AddError::Full);
        }
        let entry = Arc::new(VmEntry {
            dir: vm_dir(&self.run_dir, &config.name),
            config,
            queued: Notify::new(),
            removed: CancellationToken::new(),
            agent_streams: Arc::new(Semaphore::new(AGENT_STREAMS_MAX)),
            other_streams: Arc::new(Semaphore::new(OTHER_STREAMS_MAX)),
            keeper: Keeper::default(),
            trouble: Mutex::default(),
            stuck: Mutex::default(),
            ring: Mutex::default(),
            supervised: AtomicBool::new(true),
            held: AtomicBool::new(false),
            link: watch::Sender::new(None),
            process: Mutex::default(),
            agent: Mutex::default(),
            changed: watch::Sender::new(0),
            open_tasks: AtomicU32::new(0),
        });
        vms.insert(entry.config.name.clone(), entry.clone());
        Ok(entry)
    }

    /// Takes a VM out.
    pub fn remove(&self, name: &VmId) -> Option<Arc<VmEntry>> {
        self.vms
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name)
    }

    /// Finds a VM.
    pub fn get(&self, name: &VmId) -> Option<Arc<VmEntry>> {
        self.vms
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// All VMs, by name.
    pub fn all(&self) -> Vec<Arc<VmEntry>> {
        self.vms
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(name: &str, cid: u64) -> VmConfig {
        VmConfig {
            name: name.parse().unwrap(),
            cid,
            allow: vec![],
            allow_vsock: vec![],
            busy_poll_us: 0,
            ivshmem_mib: crate::config::default_ivshmem_mib(),
            allow_any_memory: false,
        }
    }

    #[test]
    fn r61_a_taken_name_or_cid_is_refused() {
        let r = Registry::new(Path::new("/run/adit"));
        r.add(vm("a", 3)).unwrap();
        assert!(matches!(r.add(vm("a", 4)), Err(AddError::NameTaken(_))));
        assert!(matches!(
            r.add(vm("b", 3)),
            Err(AddError::CidTaken { cid: 3, .. })
        ));
        r.remove(&"a".parse().unwrap()).unwrap();
        r.add(vm("b", 3)).unwrap();
    }

    #[test]
    fn a_newer_agent_connection_ends_the_older() {
        let r = Registry::new(Path::new("/run/adit"));
        let e = r.add(vm("a", 3)).unwrap();
        let first = e.agent_connected();
        let second = e.agent_connected();
        assert!(first.is_cancelled() && !second.is_cancelled());
        e.agent_gone(&first);
        assert!(!second.is_cancelled());
    }
}
