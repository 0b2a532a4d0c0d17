//! From what aditd says of itself and of a VM to what is wrong, and what to do. Pure: `adit doctor` prints it, and aditd words its
//! own answers by it.
//!
//! The checks stand in the order in which a stream comes into a guest. What cannot be known because an earlier one failed is
//! `unknown`, and no failure of its own.

use serde::{Deserialize, Serialize};

use crate::{ConfigStatus, DiscoverShown, GrantShown, Vm, VmFault, VmLock, VmState};

/// What to do about a configuration file that aditd has refused.
pub const CONFIG_REFUSED: &str =
    "it goes on with what it had: mend the file, then `systemctl reload aditd`";
/// What to do about a kernel that does not say who local clients are.
pub const USERS_UNKNOWN: &str = "`modprobe tcp_diag` (a kernel with CONFIG_INET_TCP_DIAG), then `systemctl restart aditd`; until then users reach VMs over a \
                                 listener at `unix:PATH`, or with a token";
/// What to do about a guest that has no key of a manager.
pub const NO_GOAL_KEYS: &str = "it runs no task; put a key into the guest's trust_dir";
/// What to do about a VM that is to have a ring, and has none.
const NO_RING: &str = "give the VM the memory of a ring, as docs/which-carrier.md has it, or set `carrier = \"vhost-user\"`; until then its services go over \
                       vsock";
/// What to do about a socket that is found and not used.
const NOT_FOUND: &str = "mend owner and mode, or the name: docs/with-your-vmm.md has the rules; aditd looks again by itself";
/// From how far on a guest's clock is wrong. Goals are valid by it.
pub const CLOCK_OFF_MS: u64 = 60_000;
/// For how long a dial that failed is news: somebody may have asked for a wrong port.
pub const DIAL_IS_NEWS_MS: u64 = 600_000;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Nothing is wrong.
    Ok,
    /// `remedy` says what to do.
    Failed,
    /// Nobody knows, as long as an earlier check fails.
    Unknown,
}

impl Health {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which check.
    pub check: String,
    /// How it went.
    pub health: Health,
    /// What was seen.
    pub says: String,
    /// What to do; empty unless it failed.
    pub remedy: String,
}

/// Faults of a guest's agent: the check, the kind of fault, what is fine otherwise, and where to look.
const BY_AGENT: [(&str, &[&str], &str, &str); 5] = [
    (
        "identity",
        &["enrolment", "clone"],
        "the guest has its own",
        "give the guest its own identity: `adit card new`, or `adit-guest install --vm-id` in it",
    ),
    (
        "trust",
        &["trust"],
        "it has taken what it was sent",
        "sign the next document with `adit trust change`; `adit-guest status` in the guest says more",
    ),
    (
        "policy",
        &["policy"],
        "it can be used",
        "mend the guest's policy file; `adit-guest policy check` there says line and key",
    ),
    (
        "journal",
        &["journal"],
        "it takes tasks",
        "make room on the guest's disk; `adit-guest status` there says more",
    ),
    (
        "agent program",
        &["agent"],
        "it is the one that it was to be",
        "`adit agent upgrade` again, or the next package in the guest",
    ),
];

/// What is missing while a VM is in this state, and what to do; none: nothing is.
pub fn missing(state: VmState) -> Option<(&'static str, &'static str)> {
    match state {
        VmState::Down => Some((
            "it has no port process",
            "the log of its port process, RUN/vm/NAME/port.log, and that of aditd say why",
        )),
        VmState::Waiting => Some((
            "no VMM is connected, or the guest's vsock driver does not run yet, or the VM is paused",
            "`adit vm show` names the socket that the VM's vsock device must connect to",
        )),
        VmState::Up => Some((
            "the guest's driver runs, and no agent has been heard since aditd was started",
            "look in the guest: `systemctl status adit-guest`, `journalctl -u adit-guest`, or the log of its own init",
        )),
        VmState::PowerCycle => Some((
            "its VMM must connect again",
            "switch the VM off and on: a reboot from within is not enough",
        )),
        VmState::Ready => None,
    }
}

/// What is known of an agent that is not connected.
pub fn absent_agent(vm: &Vm) -> String {
    match (&vm.agent, vm.last_seen_ms) {
        (Some(version), Some(ms)) => format!(
            "its agent, adit-guest {version}, is not connected now and was last heard {}.{} s ago",
            ms / 1000,
            ms % 1000 / 100
        ),
        // What is missing ahead of it, if that is why.
        _ => match vm.state {
            VmState::Up | VmState::Ready => missing(VmState::Up),
            state => missing(state),
        }
        .map_or_else(String::new, |(what, _)| what.to_owned()),
    }
}

/// Looks at the host.
pub fn of_host(config: &ConfigStatus) -> Vec<Finding> {
    let version = config.version.as_deref().unwrap_or("of a version before");
    let file = match (&config.error, config.restart.as_slice()) {
        (Some(why), _) => failed("configuration", why, CONFIG_REFUSED),
        (None, []) => ok("configuration", "as in the file"),
        (None, restart) => failed(
            "configuration",
            format!("not in force: {}", restart.join("; ")),
            "`systemctl restart aditd` when it suits; tunnels go on",
        ),
    };
    let users = config.users_unknown.as_ref().map(|why| {
        let says = format!(
            "over TCP nobody knows which user a client is, and grants to users do not count: {why}"
        );
        failed("users", says, USERS_UNKNOWN)
    });
    let found = (!config.discover.is_empty()).then(|| discovery(&config.discover));
    let all = [ok("host", format!("aditd {version} answers")), file];
    all.into_iter().chain(users).chain(found).collect()
}

/// Looks at the directories in which VMs are found.
fn discovery(all: &[DiscoverShown]) -> Finding {
    let refused: Vec<&str> = all
        .iter()
        .flat_map(|of| &of.refused)
        .map(String::as_str)
        .collect();
    if !refused.is_empty() {
        return failed("discovery", refused.join("; "), NOT_FOUND);
    }
    let each = all.iter().map(|of| {
        let DiscoverShown {
            dir, pattern, vms, ..
        } = of;
        format!("{vms} VMs at {dir}/{pattern}")
    });
    ok("discovery", each.collect::<Vec<_>>().join("; "))
}

/// Looks at a host that does not tell us of its configuration.
pub fn of_silent_host() -> Vec<Finding> {
    vec![
        ok("host", "aditd answers"),
        unknown(
            "configuration",
            "it is told to whoever may `see` all VMs of the host",
        ),
    ]
}

/// Looks at the grants about a VM: who reaches it over the proxy. That nobody does is no failure: it may be there for its tasks.
pub fn access(grants: &[GrantShown]) -> Finding {
    let reaches = |may: &&String| *may == "reach" || may.starts_with("reach:");
    let now = grants.iter().filter(|grant| !grant.expired);
    let who: Vec<String> = now
        .filter_map(|grant| {
            let may: Vec<_> = grant.may.iter().filter(reaches).cloned().collect();
            (!may.is_empty()).then(|| format!("{} may {}", grant.to.join(", "), may.join(", ")))
        })
        .collect();
    match who.is_empty() {
        true => ok(
            "access",
            "nobody reaches it over the proxy: no grant has `reach` for it (`adit access ls --vm …`)",
        ),
        false => ok("access", who.join("; ")),
    }
}

/// Looks at a VM.
pub fn of_vm(vm: &Vm) -> Vec<Finding> {
    let mut found = channel(vm);
    found.push(carrier(vm));
    found.push(lock(vm));
    found.push(agent(vm));
    found.push(version(vm));
    found.extend(
        BY_AGENT
            .iter()
            .map(|check| by_agent(vm, check.0, check.1, check.2, check.3)),
    );
    found.push(card(vm));
    found.push(clock(vm));
    found.push(services(vm));
    found.push(last_dial(vm));
    found.extend(others(vm));
    found
}

/// Port process, VMM, device and session.
fn channel(vm: &Vm) -> Vec<Finding> {
    let of_state = |state| missing(state).unwrap_or_default();
    let (down, what_down) = of_state(VmState::Down);
    let port = match (vm.port_pid, fault(vm, &["port-process"])) {
        (_, Some(why)) => failed("port process", why, what_down),
        (None, None) => failed("port process", down, what_down),
        (Some(pid), None) if vm.held_by.is_some() => {
            ok("port process", format!("the VMM itself, process {pid}"))
        }
        (Some(pid), None) => ok("port process", format!("process {pid}")),
    };
    let has_session = matches!(vm.state, VmState::Up | VmState::Ready);
    let (again, cycle) = of_state(VmState::PowerCycle);
    let vmm = match (vm.state, vm.vmm) {
        (VmState::PowerCycle, _) => {
            let why = fault(vm, &["power-cycle"]);
            failed("VMM", why.unwrap_or_else(|| again.to_owned()), cycle)
        }
        _ if vm.port_pid.is_none() => unknown("VMM", "there is no port process"),
        (_, Some(true)) => ok("VMM", "it is connected"),
        _ if has_session => ok("VMM", "it is connected"),
        (_, Some(false)) if let Some(path) = &vm.carrier.hybrid => failed(
            "VMM",
            fault(vm, &["transport"]).unwrap_or_else(|| "it is not there".into()),
            format!("start the VM; the socket of its vsock device must be {path}"),
        ),
        (_, Some(false)) if let Some(cid) = vm.carrier.kernel_cid => failed(
            "VMM",
            fault(vm, &["transport"]).unwrap_or_else(|| "it is not there".into()),
            format!(
                "start the VM with `-device vhost-vsock-pci,guest-cid={cid}`; `ls -l /dev/vhost-vsock` shows whether the kernel has the device, \
                 and `modprobe vhost_vsock` brings it"
            ),
        ),
        (_, Some(false)) if let (None, Some(why)) = (&vm.carrier.way, &vm.carrier.way_why) => {
            failed(
                "VMM",
                why,
                format!(
                    "start the VM; its vsock device must connect to {}, be the host kernel's with CID {}, or have its own socket where that is looked for",
                    vm.vhost_socket, vm.cid
                ),
            )
        }
        (_, Some(false)) => failed(
            "VMM",
            "none is connected",
            format!(
                "start the VM; its vsock device must connect to {}",
                vm.vhost_socket
            ),
        ),
        (_, None) => unknown("VMM", "this aditd does not say"),
    };
    let device = match fault(vm, &["transport"]) {
        // It has said what is in the way of the VMM's socket.
        Some(_) if vm.carrier.hybrid.is_some() => unknown("device", "no VMM"),
        Some(_) if vm.carrier.kernel_cid.is_some() && !has_session => unknown("device", "no VMM"),
        Some(why) if vm.carrier.kernel_cid.is_some() => failed(
            "device",
            why,
            "do what it says; RUN/vm/NAME/port.log and aditd's own log say more",
        ),
        Some(why) => failed(
            "device",
            why,
            "what broke the protocol is in the guest, or its VMM: RUN/vm/NAME/port.log says more; reset the VM if its channel \
             stays away",
        ),
        None if has_session => ok("device", "no fault"),
        None => unknown("device", "no session"),
    };
    let session = match vm.state {
        VmState::Up | VmState::Ready => ok("session", format!("number {}", vm.epoch)),
        _ if vmm.health == Health::Ok => failed(
            "session",
            "the guest's vsock driver does not run, or the VM is paused",
            "resume the VM, or wait for its boot; in the guest, `modprobe vmw_vsock_virtio_transport`",
        ),
        _ => unknown("session", "no VMM"),
    };
    vec![port, vmm, device, session]
}

/// The way to the guest, and what it costs.
fn carrier(vm: &Vm) -> Finding {
    let carrier = &vm.carrier;
    if let Some(why) = fault(vm, &["carrier"]) {
        return failed("carrier", why, NO_RING);
    }
    let Some(way) = &carrier.way else {
        let why = carrier.way_why.as_deref();
        return unknown("carrier", why.unwrap_or("this aditd does not say"));
    };
    let why = carrier.way_why.iter();
    let said = [way].into_iter().chain(why).map(String::as_str);
    let costs = carrier.costs.iter().map(String::as_str);
    ok("carrier", said.chain(costs).collect::<Vec<_>>().join("; "))
}

/// Whether anything new goes there.
fn lock(vm: &Vm) -> Finding {
    match &vm.lock {
        None => ok("lock", "it is open"),
        Some(lock) => failed(
            "lock",
            locked(lock),
            format!("`adit vm unlock {}`, when that is over", vm.name),
        ),
    }
}

/// What a lock says: why, who, since when.
pub fn locked(lock: &VmLock) -> String {
    let VmLock { reason, by, since } = lock;
    let why = if reason.is_empty() { "" } else { ": " };
    format!("locked by {by} since {since}{why}{reason}")
}

fn agent(vm: &Vm) -> Finding {
    match vm.state {
        VmState::Ready => ok("agent", "it is connected"),
        VmState::Up => {
            let remedy = missing(VmState::Up).map_or("", |(_, remedy)| remedy);
            failed("agent", absent_agent(vm), remedy)
        }
        _ => unknown("agent", absent_agent(vm)),
    }
}

fn version(vm: &Vm) -> Finding {
    match (&vm.agent, &vm.kernel) {
        (Some(agent), Some(kernel)) => {
            ok("version", format!("adit-guest {agent}, kernel {kernel}"))
        }
        _ => unknown("version", "no agent has said it"),
    }
}

/// What the agent says of itself: it is right as long as it is there and says nothing else.
fn by_agent(vm: &Vm, check: &str, kinds: &[&str], fine: &str, remedy: &str) -> Finding {
    match fault(vm, kinds) {
        Some(why) => failed(check, why, remedy),
        None if vm.state == VmState::Ready => ok(check, fine),
        None => unknown(check, "no agent is connected"),
    }
}

fn card(vm: &Vm) -> Finding {
    const REMEDY: &str = "sign one with `adit card new`, and give it to the guest";
    match (fault(vm, &["card"]), &vm.card) {
        (Some(why), _) => failed("card", why, REMEDY),
        (None, Some(card)) => ok(
            "card",
            match (&card.unproved, &card.not_after) {
                (Some(why), _) => format!("not believed here: {why}"),
                (None, until) => {
                    format!("believed until {}", until.as_deref().unwrap_or("its end"))
                }
            },
        ),
        (None, None) if vm.state == VmState::Ready => ok("card", "the guest shows none"),
        (None, None) => unknown("card", "no agent is connected"),
    }
}

fn clock(vm: &Vm) -> Finding {
    let Some(ms) = vm.clock_ahead_ms else {
        return unknown("clock", "no agent has said it");
    };
    let holding = vm.holding.as_ref();
    let holding = holding.map_or_else(String::new, |held| {
        format!("; it holds task {} until {}", held.task_id, held.valid_from)
    });
    let tenths = ms.unsigned_abs() / 100;
    let side = if ms < 0 { "behind" } else { "ahead of" };
    let says = format!(
        "{}.{} s {side} this host's{holding}",
        tenths / 10,
        tenths % 10
    );
    match ms.unsigned_abs() >= CLOCK_OFF_MS {
        true => failed(
            "clock",
            says,
            "set the guest's clock, or `clock = \"host\"` in its agent's configuration",
        ),
        false => ok("clock", says),
    }
}

/// What may be reached and done.
fn services(vm: &Vm) -> Finding {
    if !vm.pending.is_empty() {
        return failed(
            "services",
            format!("not in force: {}", vm.pending.join(", ")),
            format!("`adit vm reload {}`; its open tunnels end", vm.name),
        );
    }
    let all = vm.allow.len() + vm.allow_vsock.len();
    let ports = match all + vm.allow_services.len() {
        0 => "no port may be reached (`adit vm set`)".to_owned(),
        n if n == all => format!("{n} ports may be reached"),
        n => format!("{all} ports and {} services may be reached", n - all),
    };
    match vm.goal_keys {
        Some(0) => ok("services", format!("{ports}; {NO_GOAL_KEYS}")),
        _ => ok("services", ports),
    }
}

fn last_dial(vm: &Vm) -> Finding {
    let Some(dial) = &vm.last_dial else {
        return ok("last dial", "none since aditd was started");
    };
    let ago = dial.ms_ago / 1000;
    match &dial.refused {
        None => {
            let us = dial.took_us;
            ok("last dial", format!("{}, {ago} s ago, in {us} us", dial.to))
        }
        Some(refused) => {
            let says = format!("{ago} s ago, {}: {}", refused.code, refused.text);
            match dial.ms_ago < DIAL_IS_NEWS_MS {
                // Whoever reads this has asked the doctor already.
                true if refused.remedy.contains("adit doctor") => failed(
                    "last dial",
                    says,
                    "mend what else has failed here, then try again",
                ),
                true => failed("last dial", says, &refused.remedy),
                false => ok("last dial", says),
            }
        }
    }
}

/// Faults of kinds that a later aditd has, and of one before, which says all in one text.
fn others(vm: &Vm) -> Vec<Finding> {
    const REMEDY: &str = "`adit vm show` has it whole";
    let known = [
        "power-cycle",
        "port-process",
        "transport",
        "carrier",
        "card",
    ];
    let is_known = |kind: &str| {
        known.contains(&kind) || BY_AGENT.iter().any(|(_, kinds, ..)| kinds.contains(&kind))
    };
    if let ([], Some(text)) = (vm.faults.as_slice(), &vm.fault) {
        return vec![failed("fault", text, REMEDY)];
    }
    let more = vm.faults.iter().filter(|fault| !is_known(&fault.kind));
    more.map(|fault| failed(&fault.kind, &fault.text, REMEDY))
        .collect()
}

/// Texts of the VM's faults of these kinds.
fn fault(vm: &Vm, kinds: &[&str]) -> Option<String> {
    let of_kind = |fault: &&VmFault| kinds.contains(&fault.kind.as_str());
    let texts = vm.faults.iter().filter(of_kind);
    let texts: Vec<&str> = texts.map(|fault| fault.text.as_str()).collect();
    (!texts.is_empty()).then(|| texts.join("; "))
}

fn ok(check: &str, says: impl Into<String>) -> Finding {
    finding(check, Health::Ok, says, "")
}

fn unknown(check: &str, says: impl Into<String>) -> Finding {
    finding(check, Health::Unknown, says, "")
}

fn failed(check: &str, says: impl Into<String>, remedy: impl Into<String>) -> Finding {
    finding(check, Health::Failed, says, remedy)
}

fn finding(
    check: &str,
    health: Health,
    says: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding {
        check: check.to_owned(),
        health,
        says: says.into(),
        remedy: remedy.into(),
    }
}

#[cfg(test)]
mod tests;
