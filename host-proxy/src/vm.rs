//! One VM: its settings, its port process, its agent, and the state that the API shows.

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

use crate::config::{VmConfig, vm_dir};
use crate::fault::{Fault, FaultKind, Logged};
use crate::keeper::Keeper;
use crate::link::Link;
use crate::whose::PortProcess;

/// Streams to the tasks service that one guest may hold open: its agent's, and a few that replace each other.
pub const AGENT_STREAMS_MAX: usize = 4;
/// Streams from unprivileged ports of one guest that may wait for their refusal.
pub const OTHER_STREAMS_MAX: usize = 2;

/// Characters of a port process's text about its ring that are shown.
const RING_TEXT_MAX: usize = 300;

/// Where a VM's settings come from, and so where they are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `aditd.toml`.
    File,
    /// The API: they are in the database.
    Api,
}

/// The part of a VM's settings that never changes.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Name and id.
    pub name: VmId,
    /// Its CID.
    pub cid: u64,
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
    /// Name and CID. For every other setting see [`spec`](Self::spec).
    pub config: Identity,
    /// Where its settings come from.
    pub origin: Origin,
    /// Held while its settings are changed or it is removed, so that one change ends before the next begins.
    pub changing: tokio::sync::Mutex<()>,
    /// All its settings as they are now.
    spec: RwLock<Arc<VmConfig>>,
    /// The settings that its port process was started with.
    started_with: Mutex<Option<Arc<VmConfig>>>,
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
    logged: Logged,
}

impl VmEntry {
    /// Makes a VM; its directory is under `run_dir`.
    pub fn new(run_dir: &Path, config: VmConfig, origin: Origin) -> Self {
        Self {
            dir: vm_dir(run_dir, &config.name),
            config: Identity {
                name: config.name.clone(),
                cid: config.cid,
            },
            origin,
            changing: tokio::sync::Mutex::default(),
            spec: RwLock::new(Arc::new(config)),
            started_with: Mutex::default(),
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
            logged: Logged::default(),
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
        self.touch();
    }

    /// Notes the settings that its port process was started with.
    pub fn set_started_with(&self, spec: Arc<VmConfig>) {
        let mut started_with = self
            .started_with
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *started_with = Some(spec);
    }

    /// Names of the settings that its port process will have only when it is started anew.
    pub fn pending(&self) -> Vec<String> {
        let started_with = self.started_with.lock();
        let started_with = started_with.unwrap_or_else(PoisonError::into_inner).clone();
        let (Some(old), None) = (started_with, self.held_by()) else {
            return vec![];
        };
        let new = self.spec();
        let differs = [
            ("busy_poll_us", old.busy_poll_us != new.busy_poll_us),
            ("ivshmem_mib", old.ivshmem_mib != new.ivshmem_mib),
            (
                "allow_any_memory",
                old.allow_any_memory != new.allow_any_memory,
            ),
        ];
        let differs = differs.into_iter().filter(|(_, differs)| *differs);
        differs.map(|(name, _)| name.to_owned()).collect()
    }

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

    /// Its supervisor has ended.
    pub fn supervisor_ended(&self) {
        self.supervised.store(false, Ordering::Release);
        self.touch();
    }

    /// Whether its supervisor has ended.
    pub fn unsupervised(&self) -> bool {
        !self.supervised.load(Ordering::Acquire)
    }

    /// Notes whether its port process is its VMM.
    pub fn set_held(&self, held: bool) {
        self.held.store(held, Ordering::Release);
        self.touch();
    }

    /// The VMM that is the VM's port process itself, and removes the VM when it ends; none: a process of aditd's serves it.
    pub fn held_by(&self) -> Option<u32> {
        let held = |_: &u32| self.held.load(Ordering::Acquire);
        self.port_pid().filter(held)
    }

    /// Notes why there is no port process, or that there is one.
    pub fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
        self.touch();
    }

    /// Notes that only a power cycle gives the VM its channel back, and why; or that it has it.
    pub fn set_stuck(&self, stuck: Option<String>) {
        *self.stuck.lock().unwrap_or_else(PoisonError::into_inner) = stuck;
        self.touch();
    }

    /// Notes the state of its ring; `None`: there is no port process.
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
            // The text comes from the port process, which the guest may control.
            why: ring.why.chars().take(RING_TEXT_MAX).collect(),
            memory: (!ring.memory.is_empty())
                .then(|| ring.memory.chars().take(RING_TEXT_MAX).collect()),
            bytes: ring.bytes,
            line_ns: ring.line_ns,
            doorbell: match ring.hears {
                1 => Some("interrupt".into()),
                2 => Some("a byte over vsock".into()),
                3 => Some("none: the guest polls".into()),
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

    /// Everything that is wrong with it now, the gravest first.
    pub fn faults(&self) -> Vec<Fault> {
        let trouble = self.trouble.lock();
        let trouble = trouble.unwrap_or_else(PoisonError::into_inner).clone();
        let transport = self.link().and_then(|l| l.status()).map(|s| s.last_fault);
        let enrolment = self.enrolled_as().map(|id| {
            format!(
                "the guest's image is enrolled as `{id}`: it was copied from that VM, and refuses every goal for this one; \
                 install the agent anew with `adit-guest install --vm-id {}`",
                self.config.name
            )
        });
        let all = [
            (FaultKind::PowerCycle, self.stuck()),
            (FaultKind::PortProcess, trouble),
            (
                FaultKind::Transport,
                transport.filter(|text| !text.is_empty()),
            ),
            (FaultKind::Enrolment, enrolment),
        ];
        let all = all.into_iter();
        all.filter_map(|(kind, text)| Some(Fault::new(kind, &text?)))
            .collect()
    }

    /// The id that the guest's image is enrolled with, if it is another VM's.
    fn enrolled_as(&self) -> Option<String> {
        let id = self.agent().facts.as_ref().map(|f| f.vm_id.clone());
        id.filter(|id| id != self.config.name.as_str())
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

    /// Wakes whoever waits for a change, and logs faults that are new or over.
    pub fn touch(&self) {
        self.logged.update(self.config.name.as_str(), self.faults());
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
        let (spec, enrolled_as) = (self.spec(), self.enrolled_as());
        let faults: Vec<_> = self.faults().into_iter().map(|f| f.text).collect();
        let status = self.link().and_then(|l| l.status());
        let agent = self.agent();
        let connected = agent.connected.as_ref().is_some_and(|t| !t.is_cancelled());
        let state = match &status {
            _ if self.stuck().is_some() => VmState::PowerCycle,
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
            enrolled_as,
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
            allow: spec.allow.clone(),
            allow_vsock: spec.allow_vsock.clone(),
            busy_poll_us: spec.busy_poll_us,
            pending: self.pending(),
            port_pid: self.port_pid(),
            held_by: self.held_by(),
            vhost_socket: self.dir.join(VHOST_SOCKET).display().to_string(),
            carrier: self.carrier(),
            ring_socket: self.dir.join(RING_SOCKET).display().to_string(),
            ivshmem_socket: self.dir.join(IVSHMEM_SOCKET).display().to_string(),
            fault: (!faults.is_empty()).then(|| faults.join("; ")),
        }
    }

    fn agent(&self) -> MutexGuard<'_, AgentState> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rfc3339(ms: u64) -> String {
    crate::queue::rfc3339(i64::try_from(ms).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> VmEntry {
        let config = VmConfig::new("a".parse().unwrap(), 3);
        VmEntry::new(Path::new("/run/adit"), config, Origin::Api)
    }

    #[test]
    fn a_newer_agent_connection_ends_the_older() {
        let e = entry();
        let first = e.agent_connected();
        let second = e.agent_connected();
        assert!(first.is_cancelled() && !second.is_cancelled());
        e.agent_gone(&first);
        assert!(!second.is_cancelled());
    }

    #[test]
    fn what_a_port_process_was_not_started_with_is_pending_until_the_next_one() {
        let e = entry();
        e.set_started_with(e.spec());
        let mut spec = VmConfig::clone(&e.spec());
        (spec.busy_poll_us, spec.allow) = (50, vec![80]);
        e.set_spec(spec);
        assert_eq!(e.pending(), ["busy_poll_us"]);
        e.set_started_with(e.spec());
        assert!(e.pending().is_empty());
    }

    #[test]
    fn every_fault_is_listed_with_the_gravest_first_and_as_text_of_one_line() {
        let e = entry();
        e.agent_seen(Some(Facts {
            agent_version: "1".into(),
            kernel: "6".into(),
            os: "x".into(),
            vm_id: "b".into(),
            anchors: 1,
            boot_nonce: [1; 16],
        }));
        e.set_trouble(Some("one\nline".into()));
        e.set_stuck(Some("x".repeat(10_000)));
        let kinds: Vec<_> = e.faults().iter().map(|f| f.kind).collect();
        use FaultKind::{Enrolment, PortProcess, PowerCycle};
        assert_eq!(kinds, [PowerCycle, PortProcess, Enrolment]);
        let shown = e.show().fault.unwrap();
        assert!(
            shown.contains("one\\nline") && shown.contains("`b`"),
            "{shown}"
        );
        assert!(shown.len() < 2000);
    }
}
