//! A VM as the API shows it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use adit_api::{
    Card, Carrier, CarrierKind, GuestKey, Holding, LastDial, Program, Refused, StoodStill, Trust,
    TrustRefused, TrustTaken, Vm, VmFault, VmState,
};
use adit_port::control::{IVSHMEM_SOCKET, RING_SOCKET, Ring, Status, VHOST_SOCKET};

use adit_port::ways;
use adit_tasks::KeyId;

use super::{TrustOf, VmEntry};
use crate::config;
use crate::enrolment::{Believed, Enrolment};
use crate::reach::Destination;
use crate::reach::dial::refusal;
use crate::remedy;

/// Characters of a port process's text about its ring that are shown.
const RING_TEXT_MAX: usize = 300;
/// Characters of a port process's reason for its way that are shown.
const WHY_TEXT_MAX: usize = 1000;
/// Characters of what a failed dial says that are shown.
const DIAL_TEXT_MAX: usize = 300;

/// A way to a guest, and what it costs.
struct Way {
    word: &'static str,
    /// What the VMM cannot do with the VM.
    forbids: &'static [&'static str],
    costs: &'static str,
}

const VHOST_USER: Way = Way {
    word: "vhost-user",
    forbids: &["migration", "savevm"],
    costs: "its VMM can neither migrate nor save it (`savevm`): QEMU does neither with a vhost-user device or with ivshmem",
};
const DEVICE: Way = Way {
    word: "device",
    forbids: &[],
    costs: "its VMM has the device itself, and saves and restores it with the VM",
};
const HYBRID: Way = Way {
    word: "hybrid",
    forbids: &[],
    costs: "each byte is copied once more, and open streams end when its VMM saves or restores it",
};
const KERNEL: Way = Way {
    word: "vhost-vsock",
    forbids: &[],
    costs: "each byte is copied once more; its VMM can migrate and save it, which ends open streams",
};

impl VmEntry {
    /// How far its channel is.
    pub fn state(&self) -> VmState {
        self.state_of(self.channel.status().as_ref())
    }

    fn state_of(&self, status: Option<&Status>) -> VmState {
        match status {
            _ if self.channel.stuck().is_some() => VmState::PowerCycle,
            None => VmState::Down,
            Some(s) if !s.session => VmState::Waiting,
            Some(_) if self.agent.is_known() => VmState::Ready,
            Some(_) => VmState::Up,
        }
    }

    /// The VM as the API shows it.
    pub fn show(&self) -> Vm {
        let (spec, agent) = (self.spec(), self.agent.said());
        let faults = self.faults();
        let texts: Vec<_> = faults.iter().map(|f| f.text.as_str()).collect();
        let status = self.channel.status();
        let connected = agent.is_connected();
        let state = self.state_of(status.as_ref());
        let age = |seen: Instant| u64::try_from(seen.elapsed().as_millis()).unwrap_or(u64::MAX);
        let facts = agent.facts.as_ref();
        Vm {
            name: self.name.to_string(),
            cid: self.cid,
            state,
            agent: facts.map(|f| f.agent_version.clone()),
            program: agent.program.as_ref().map(|program| Program {
                sha256: program.digest.map(|digest| adit_tasks::hex(&digest)),
                floor: (!program.floor.is_empty()).then(|| program.floor.clone()),
                taken_back: program.taken_back.map(|digest| adit_tasks::hex(&digest)),
            }),
            kernel: facts.map(|f| f.kernel.clone()),
            enrolled_as: self.agent.enrolled_as(),
            labels: labels(&spec.labels, &agent.enrolment),
            card: card(&agent.enrolment),
            guest_key: agent.enrolment.key.as_ref().map(|key| GuestKey {
                public: key.public.to_string(),
                unproved: key.unproved.clone(),
            }),
            goal_keys: facts.map(|f| f.anchors),
            guest_id: agent.id.clone(),
            trust: agent.trust.as_ref().map(trust),
            clock_ahead_ms: agent.clock_ahead_ms,
            stood_still: agent.stood.map(|(stood, at)| StoodStill {
                at: rfc3339(u64::try_from(at).unwrap_or(0)),
                ms: stood.ms,
                clock_set_ms: stood.clock_set_ms,
                entropy_mixed: stood.seeded,
            }),
            holding: agent.held.filter(|_| connected).map(|held| Holding {
                task_id: adit_tasks::hex(&held.task_id),
                valid_from: rfc3339(held.not_before_ms),
                guest_time: rfc3339(held.now_ms),
            }),
            // A connection that is open is heard from now.
            last_seen_ms: agent.seen.map(|seen| if connected { 0 } else { age(seen) }),
            epoch: status.as_ref().map_or(0, |s| s.epoch),
            streams: status.as_ref().map_or(0, |s| s.streams),
            queued: self.open_tasks(),
            allow: spec.allow.clone(),
            allow_vsock: spec.allow_vsock.clone(),
            allow_services: spec
                .allow_services
                .iter()
                .map(ToString::to_string)
                .collect(),
            busy_poll_us: spec.busy_poll_us,
            pending: self.pending(),
            port_pid: self.channel.port_pid(),
            held_by: self.channel.held_by(),
            vhost_socket: self.dir.join(VHOST_SOCKET).display().to_string(),
            carrier: self.carrier(agent.chunks, agent.half_closes),
            ring_socket: self.dir.join(RING_SOCKET).display().to_string(),
            ivshmem_socket: self.dir.join(IVSHMEM_SOCKET).display().to_string(),
            fault: (!texts.is_empty()).then(|| texts.join("; ")),
            faults: faults
                .iter()
                .map(|fault| VmFault {
                    kind: fault.kind.label().into(),
                    text: fault.text.clone(),
                })
                .collect(),
            vmm: Some(self.has_vmm()),
            last_dial: self.dials.last().map(|dial| self.last_dial(dial)),
            lock: self.lock.locked().map(|locked| locked.show()),
            origin: Some(self.origin.word().into()),
        }
    }
}

impl VmEntry {
    /// Whether a VMM is connected.
    fn has_vmm(&self) -> bool {
        let channel = &self.channel;
        channel.session() || channel.held_by().is_some() || channel.keeper.has_frontend()
    }

    /// `chunks`: whether its agent knows them. `tried`: whether its VMM passes half-closes on, as was tried.
    fn carrier(&self, chunks: Option<bool>, tried: Option<bool>) -> Carrier {
        let spec = self.spec();
        let reached = self.channel.reached();
        let (says, asked) = match (spec.carrier.word(), &reached) {
            ("auto", Some(reached)) => {
                let why = adit_names::escape(&reached.why).at_most(WHY_TEXT_MAX);
                ("it is the one that is there", format!("`auto`: {why}"))
            }
            ("auto", None) => (
                "",
                "`auto`: no port process has said yet what there is".into(),
            ),
            ("vhost-user", _) => (
                "",
                "`vhost-user`: as a VM is reached that says nothing else".into(),
            ),
            (word, _) => (
                self.origin.says(),
                format!("`{word}`: {}", self.origin.says()),
            ),
        };
        // Of a ring that its VMM has handed over: QEMU can do neither with ivshmem, whatever the rest takes.
        let ring = self.channel.ring().map(carrier);
        let has_ring = ring.as_ref().is_some_and(|ring| ring.memory.is_some());
        // Without a port process, as the next one will be.
        let hybrid = match self.channel.serving() {
            Some(_) => self.channel.hybrid(),
            None => spec.carrier.hybrid().cloned(),
        };
        let is_auto = matches!(spec.carrier.way(), config::Way::Auto(_));
        if is_auto
            && reached
                .as_ref()
                .is_none_or(|r| ways::Way::numbered(r.way).is_none())
        {
            return Carrier {
                way_why: Some(asked),
                ..ring.unwrap_or_default()
            };
        }
        let (way, shown) = match (hybrid, self.channel.held_by()) {
            _ if let Some(cid) = self.channel.kernel() => {
                let shown = Carrier {
                    why: format!(
                        "{says}; every user of this host can dial the VM, so its agent serves only who has aditd's key"
                    ),
                    kernel_cid: Some(cid),
                    ..Carrier::default()
                };
                (&KERNEL, shown)
            }
            (Some(hybrid), _) => {
                let shown = Carrier {
                    why: match (hybrid.half_closes, chunks) {
                        (true, _) => match tried {
                            Some(true) => format!(
                                "{says}; the VMM passes half-closes on, as was tried when the agent came"
                            ),
                            // It is a fault.
                            Some(false) | None => says.into(),
                        },
                        (false, Some(true)) => format!(
                            "{says}; the VMM takes a half-close for a close: chunks carry the ends of streams to the agent"
                        ),
                        (false, _) => format!(
                            "{says}; the VMM takes a half-close for a close: the end of a client's sending reaches the \
                             guest only with the end of the stream, unless the agent knows chunks; upgrade one that does not"
                        ),
                    },
                    hybrid: Some(hybrid.hybrid.display().to_string()),
                    ..Carrier::default()
                };
                (&HYBRID, shown)
            }
            (None, held_by) => {
                let way = match held_by {
                    Some(_) => &DEVICE,
                    None => &VHOST_USER,
                };
                (way, Carrier::default())
            }
        };
        let of_vmm = matches!(way.word, "hybrid" | "vhost-vsock") && has_ring;
        let (forbids, more) = match of_vmm {
            true => (
                VHOST_USER.forbids,
                "; because of the ring it can do neither while that is there",
            ),
            false => (way.forbids, ""),
        };
        let with_ring = ring.unwrap_or_default();
        Carrier {
            way: Some(way.word.into()),
            way_why: Some(asked),
            forbids: forbids.iter().map(ToString::to_string).collect(),
            costs: Some(format!("{}{more}", way.costs)),
            // The ring's own reason, or that of the way.
            why: match (with_ring.why.as_str(), shown.why.as_str()) {
                (ring, "") => ring.to_owned(),
                (_, way) if !has_ring => way.to_owned(),
                (ring, way) => format!("{ring}; {way}"),
            },
            hybrid: shown.hybrid,
            kernel_cid: shown.kernel_cid,
            ..with_ring
        }
    }

    fn last_dial(&self, dial: super::LastDial) -> LastDial {
        let millis = |since: Duration| u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let to = Destination::of(self.name.clone(), dial.to);
        LastDial {
            ms_ago: millis(dial.at.elapsed()),
            took_us: u64::try_from(dial.took.as_micros()).unwrap_or(u64::MAX),
            refused: dial.failed.map(|failed| {
                let refusal = refusal(&to, &failed);
                Refused {
                    code: refusal.code().to_string(),
                    text: adit_names::escape(refusal.text())
                        .at_most(DIAL_TEXT_MAX)
                        .to_string(),
                    remedy: remedy::of(refusal.code()).into(),
                }
            }),
            to: to.to_string(),
        }
    }
}

/// What a VM's labels are: those of the configuration, then those of a card that is believed.
fn labels(
    configured: &BTreeMap<String, String>,
    enrolment: &Enrolment,
) -> BTreeMap<String, String> {
    let believed = enrolment.card.as_ref().and_then(|card| card.as_ref().ok());
    let labels = believed.and_then(Believed::labels);
    let mut labels = labels.cloned().unwrap_or_default();
    labels.extend(configured.clone());
    labels
}

fn card(enrolment: &Enrolment) -> Option<Card> {
    let place = enrolment.place.clone();
    Some(match enrolment.card.as_ref()? {
        Ok(believed) => Card {
            place,
            generation: Some(believed.card.generation),
            signer: Some(believed.signer.clone()),
            not_after: Some(believed.card.not_after.to_string()),
            unproved: (believed.labels().is_none())
                .then(|| "its time is over; sign a new one with `adit card new`".into()),
        },
        Err(unproved) => Card {
            place,
            generation: None,
            signer: None,
            not_after: None,
            unproved: Some(unproved.why.clone()),
        },
    })
}

fn trust(trust: &TrustOf) -> Trust {
    let documents = trust.held.documents.iter();
    let refused = trust.refused.iter();
    Trust {
        documents: documents
            .map(|taken| TrustTaken {
                signer: KeyId(taken.signer).to_string(),
                own: taken.own,
                sequence: taken.sequence,
            })
            .collect(),
        revoked: trust.held.revoked.into(),
        refused: refused
            .map(|(signer, sequence, why)| TrustRefused {
                signer: KeyId(*signer).to_string(),
                sequence: *sequence,
                why: why.clone(),
            })
            .collect(),
    }
}

/// What carries the VM's streams. Its texts come from the port process, which the guest may control.
fn carrier(ring: Ring) -> Carrier {
    let measured = |ns: u64| (ns > 0).then_some(ns);
    let cut = |text: &str| text.chars().take(RING_TEXT_MAX).collect::<String>();
    Carrier {
        kind: match ring.running {
            true => CarrierKind::Ring,
            false => CarrierKind::Vsock,
        },
        why: cut(&ring.why),
        memory: (!ring.memory.is_empty()).then(|| cut(&ring.memory)),
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
        ..Carrier::default()
    }
}

fn rfc3339(ms: u64) -> String {
    crate::desk::rfc3339(i64::try_from(ms).unwrap_or(i64::MAX))
}
