//! A VM's channel: the port process that serves it, and what that says.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adit_names::VmId;
use adit_port::control::{HYBRID_SOCKET, Ring, Status, Way as Reached};
use adit_port::ways;

use super::Changes;
use crate::config::{Hybrid, VmConfig, Way};
use crate::fault::{Fault, FaultKind, Logged};
use crate::keeper::Keeper;
use crate::link::Link;
use crate::whose::Peer;

/// A VM's channel.
#[derive(Debug)]
pub struct Channel {
    /// What its port process left with us for the next one.
    pub keeper: Keeper,
    vm: VmId,
    state: Mutex<State>,
    /// Where a VMM's socket is looked for, if nobody says where.
    own_hybrid: Hybrid,
    logged: Logged,
    changes: Changes,
}

#[derive(Debug, Default)]
struct State {
    /// The port process, if one is connected and serves this VM.
    serving: Option<Serving>,
    /// The settings that the port process was started with.
    started_with: Option<Arc<VmConfig>>,
    /// Why there is no port process.
    trouble: Option<String>,
    /// Why its VMM has no channel until the VM is power-cycled.
    stuck: Option<String>,
    /// Its supervisor has ended.
    unsupervised: bool,
    /// Why what the guest dials does not arrive.
    deaf: Option<String>,
}

/// Who serves a VM.
#[derive(Clone, Debug)]
pub struct Serving {
    /// Speaks to it.
    pub link: Arc<Link>,
    /// Who the kernel says it is.
    pub process: Peer,
    /// It is the VM's VMM itself.
    held: bool,
    /// State of the ring, as it said last.
    ring: Option<Ring>,
    /// Which way to the guest it has chosen, and why, if that is its matter.
    reached: Option<Reached>,
}

impl Channel {
    pub(super) fn new(vm: &VmId, dir: &Path, changes: Changes) -> Self {
        Self {
            keeper: Keeper::default(),
            vm: vm.clone(),
            state: Mutex::default(),
            own_hybrid: Hybrid {
                hybrid: dir.join(HYBRID_SOCKET),
                half_closes: false,
            },
            logged: Logged::default(),
            changes,
        }
    }

    /// A port process serves the VM from now on: what was wrong with the one before is over.
    pub fn begin(&self, link: Arc<Link>, process: Peer) {
        self.change(|state| {
            state.trouble = None;
            state.serving = Some(Serving {
                link,
                process,
                held: false,
                ring: None,
                reached: None,
            });
        });
    }

    /// The port process has gone.
    pub fn end(&self) {
        self.change(|state| state.serving = None);
    }

    /// The port process has said something about the channel.
    pub fn heard(&self) {
        self.change(|_| {});
    }

    /// Its port process is the VM's VMM.
    pub fn set_held(&self) {
        self.change(|state| {
            if let Some(serving) = &mut state.serving {
                serving.held = true;
            }
        });
    }

    /// Notes the state of its ring.
    pub fn set_ring(&self, ring: Ring) {
        self.change(|state| {
            if let Some(serving) = &mut state.serving {
                serving.ring = Some(ring);
            }
        });
    }

    /// Notes which way to the guest it has chosen.
    pub fn set_reached(&self, reached: Reached) {
        self.change(|state| {
            if let Some(serving) = &mut state.serving {
                serving.reached = Some(reached);
            }
        });
    }

    /// Which way to the guest its port process has chosen, if it was started to choose.
    pub(super) fn reached(&self) -> Option<Reached> {
        let state = self.lock();
        let is_auto = |spec: &Arc<VmConfig>| matches!(spec.carrier.way(), Way::Auto(_));
        state.started_with.as_ref().filter(|s| is_auto(s))?;
        let serving = state.serving.as_ref().filter(|s| !s.held)?;
        serving.reached.clone()
    }

    /// Notes why there is no port process.
    pub fn set_trouble(&self, trouble: String) {
        self.change(|state| state.trouble = Some(trouble));
    }

    /// Notes that only a power cycle gives the VM its channel back, and why; or that it has it.
    pub fn set_stuck(&self, stuck: Option<String>) {
        self.change(|state| state.stuck = stuck);
    }

    /// Notes the settings that its port process was started with.
    pub fn set_started_with(&self, spec: Arc<VmConfig>) {
        self.lock().started_with = Some(spec);
    }

    /// The sockets of its VMM, if it has one for each stream, as its port process was started, or has chosen.
    pub fn hybrid(&self) -> Option<Hybrid> {
        self.way(|way| match way {
            Way::Hybrid(hybrid) => Some(hybrid.clone()),
            Way::Device | Way::Kernel(_) | Way::Auto(_) => None,
        })
    }

    /// The CID of a VM whose streams the host's kernel carries, as its port process was started, or has chosen.
    pub fn kernel(&self) -> Option<u32> {
        self.way(|way| match way {
            Way::Kernel(cid) => Some(cid),
            Way::Device | Way::Hybrid(_) | Way::Auto(_) => None,
        })
    }

    /// Whether the guest's virtqueues are its VMM's or the host's kernel's: nothing of the streams can be handed over to another port
    /// process, and others can dial the guest, too.
    pub fn is_foreign(&self) -> bool {
        self.way(|way| way != Way::Device)
    }

    /// What carries its streams, as its port process was started, or has chosen. Never [`Way::Auto`].
    fn way<T>(&self, look: impl FnOnce(Way<'_>) -> T) -> T {
        let state = self.lock();
        let is_held = state.serving.as_ref().is_some_and(|s| s.held);
        let spec = state.started_with.as_ref().filter(|_| !is_held);
        let Some(spec) = spec else {
            return look(Way::Device);
        };
        let Way::Auto(at) = spec.carrier.way() else {
            return look(spec.carrier.way());
        };
        let reached = state.serving.as_ref().and_then(|s| s.reached.as_ref());
        look(match reached.and_then(|r| ways::Way::numbered(r.way)) {
            None | Some(ways::Way::VhostUser) => Way::Device,
            Some(ways::Way::Kernel) => u32::try_from(spec.cid).map_or(Way::Device, Way::Kernel),
            Some(ways::Way::Hybrid) => Way::Hybrid(at.unwrap_or(&self.own_hybrid)),
        })
    }

    /// Notes why what the guest dials does not arrive; none: it does.
    pub fn set_deaf(&self, why: Option<String>) {
        self.change(|state| state.deaf = why);
    }

    /// Its supervisor has ended.
    pub fn supervisor_ended(&self) {
        self.change(|state| state.unsupervised = true);
    }

    /// Whether its supervisor has ended.
    pub fn unsupervised(&self) -> bool {
        self.lock().unsupervised
    }

    /// Who serves the VM, if a port process is connected.
    pub fn serving(&self) -> Option<Serving> {
        self.lock().serving.clone()
    }

    /// The port process, if one is connected.
    pub fn link(&self) -> Option<Arc<Link>> {
        self.lock().serving.as_ref().map(|s| s.link.clone())
    }

    /// Process id of whoever serves it, as the kernel has it.
    pub fn port_pid(&self) -> Option<u32> {
        self.lock().serving.as_ref().map(|s| s.process.pid())
    }

    /// The VMM that is the VM's port process itself, and removes the VM when it ends; none: a process of aditd's serves it.
    pub fn held_by(&self) -> Option<u32> {
        let state = self.lock();
        let serving = state.serving.as_ref().filter(|s| s.held);
        serving.map(|s| s.process.pid())
    }

    /// State of its ring, as its port process said last.
    pub(super) fn ring(&self) -> Option<Ring> {
        self.lock().serving.as_ref()?.ring.clone()
    }

    /// What its port process said last.
    pub fn status(&self) -> Option<Status> {
        self.link()?.status()
    }

    /// Whether a VMM is connected and the guest's driver runs.
    pub fn session(&self) -> bool {
        self.status().is_some_and(|s| s.session)
    }

    /// The session's number, 0 if there is none.
    pub fn epoch(&self) -> u64 {
        self.status().map_or(0, |s| s.epoch)
    }

    /// Why the VM must be power-cycled, if it must.
    pub fn stuck(&self) -> Option<String> {
        self.lock().stuck.clone()
    }

    /// Names of the settings that the port process was started without.
    pub(super) fn lacks(&self, new: &VmConfig) -> Vec<String> {
        let state = self.lock();
        let is_held = state.serving.as_ref().is_some_and(|s| s.held);
        let Some(old) = state.started_with.as_ref().filter(|_| !is_held) else {
            return vec![];
        };
        let differs = [
            ("busy_poll_us", old.busy_poll_us != new.busy_poll_us),
            ("ivshmem_mib", old.ivshmem_mib != new.ivshmem_mib),
            ("carrier", old.carrier.way() != new.carrier.way()),
            (
                "allow_any_memory",
                old.allow_any_memory != new.allow_any_memory,
            ),
        ];
        let differs = differs.into_iter().filter(|(_, differs)| *differs);
        differs.map(|(name, _)| name.to_owned()).collect()
    }

    /// What is wrong with it now, the gravest first.
    pub(super) fn faults(&self) -> Vec<Fault> {
        let transport = self.status().map(|s| s.last_fault);
        let state = self.lock();
        let all = [
            (FaultKind::PowerCycle, state.stuck.clone()),
            (FaultKind::PortProcess, state.trouble.clone()),
            (
                FaultKind::Transport,
                transport.filter(|text| !text.is_empty()),
            ),
            (FaultKind::Transport, state.deaf.clone()),
        ];
        let all = all.into_iter();
        all.filter_map(|(kind, text)| Some(Fault::new(kind, &text?)))
            .collect()
    }

    /// Changes its state, logs faults that are new or over, and wakes whoever waits.
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.logged.update(self.vm.as_str(), self.faults());
        self.changes.note();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
