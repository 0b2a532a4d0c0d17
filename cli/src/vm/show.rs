//! How VMs are printed: a table of all, or all of one.

use adit_api::doctor::{NO_GOAL_KEYS, locked};
use adit_api::{Card, Carrier, CarrierKind, Trust, TrustRefused, Vm};

use crate::error::Failure;
use crate::output::{self, ago};
use crate::text::Format;

/// Characters of a fault in a list.
const FAULT_CHARS: usize = 60;

/// What is wrong with it, whole.
fn fault(vm: &Vm) -> Option<String> {
    // An aditd of before does not name a copied image among the faults.
    let copied = || {
        let id = vm.enrolled_as.as_ref()?;
        let again = format!("build it again with --vm-id {}", vm.name);
        Some(format!("the image is enrolled as `{id}`: {again}"))
    };
    vm.fault.clone().or_else(copied)
}

/// As much of a text as a list has room for; `adit vm show` has the rest.
fn begin(text: &str) -> String {
    match text.char_indices().nth(FAULT_CHARS) {
        Some((at, _)) => format!("{}…", text[..at].trim_end()),
        None => text.to_owned(),
    }
}

/// Where its settings are.
fn origin(vm: &Vm) -> &str {
    match vm.origin.as_deref() {
        None => "-",
        Some("file") => "aditd.toml",
        Some("api") => "vm add",
        Some(other) => other,
    }
}

pub fn list(vms: &[Vm], format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(&vms);
    }
    if vms.is_empty() {
        let text = "no VMs: add one with `adit vm add NAME --allow 80`, or in aditd.toml";
        return output::line(text);
    }
    let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let rows: Vec<_> = vms
        .iter()
        .map(|vm| {
            [
                vm.name.clone(),
                vm.cid.to_string(),
                match vm.lock {
                    None => vm.state.name().into(),
                    Some(_) => format!("{}, locked", vm.state.name()),
                },
                dash(&vm.agent),
                dash(&vm.kernel),
                ago(vm.last_seen_ms),
                vm.queued.to_string(),
                vm.streams.to_string(),
                origin(vm).to_owned(),
                fault(vm).map_or_else(|| "-".into(), |text| begin(&text)),
            ]
        })
        .collect();
    output::table(
        [
            "VM",
            "CID",
            "STATE",
            "AGENT",
            "KERNEL",
            "LAST-SEEN",
            "QUEUE",
            "STREAMS",
            "FROM",
            "FAULT",
        ],
        &rows,
    )
}

pub fn show(vm: &Vm, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(vm);
    }
    let ports = |list: String| {
        if list.is_empty() {
            "none".to_owned()
        } else {
            list
        }
    };
    let mut rows = vec![
        ["name", &vm.name].map(str::to_owned),
        ["state", vm.state.name()].map(str::to_owned),
        ["from", origin(vm)].map(str::to_owned),
        ["cid".into(), vm.cid.to_string()],
        [
            "agent".into(),
            vm.agent.clone().unwrap_or_else(|| "not heard yet".into()),
        ],
        ["last seen".into(), ago(vm.last_seen_ms)],
        ["session".into(), vm.epoch.to_string()],
        ["streams".into(), vm.streams.to_string()],
        ["tasks queued".into(), vm.queued.to_string()],
        ["allowed ports".into(), ports(join(&vm.allow))],
        ["allowed vsock".into(), ports(join(&vm.allow_vsock))],
        ["services".into(), ports(join(&vm.allow_services))],
        ["busy poll".into(), format!("{} us", vm.busy_poll_us)],
    ];
    let lock = vm.lock.iter();
    rows.extend(lock.map(|lock| ["lock".into(), locked(lock)]));
    // With its own sockets, or those of the kernel, a VMM connects to none of these.
    if vm.carrier.hybrid.is_none() && vm.carrier.kernel_cid.is_none() {
        rows.extend([
            ["vhost-user".into(), vm.vhost_socket.clone()],
            ["ring".into(), vm.ring_socket.clone()],
            ["ivshmem".into(), vm.ivshmem_socket.clone()],
        ]);
    }
    rows.push(["carrier".into(), carrier(&vm.carrier)]);
    let why = vm.carrier.way_why.iter();
    rows.extend(why.map(|why| {
        let said = match &vm.carrier.way {
            Some(way) => format!("{way}; {why}"),
            None => why.clone(),
        };
        ["reached by".into(), said]
    }));
    let costs = vm.carrier.costs.iter();
    rows.extend(costs.map(|costs| ["costs".into(), costs.clone()]));
    if !vm.pending.is_empty() {
        let said = format!(
            "{}: in force after `adit vm reload {}`",
            vm.pending.join(", "),
            vm.name
        );
        rows.push(["pending".into(), said]);
    }
    if let Some(program) = &vm.program {
        let said = match &program.sha256 {
            Some(digest) => format!("{}, came over the channel", short(digest)),
            None => "the one of its image".into(),
        };
        rows.push(["program".into(), said]);
        let floor = program.floor.iter();
        rows.extend(floor.map(|floor| ["oldest agent".into(), floor.clone()]));
    }
    rows.extend(vm.card.iter().map(|card| ["card".into(), self::card(card)]));
    if !vm.labels.is_empty() {
        let labels: Vec<_> = vm.labels.iter().map(|(n, v)| format!("{n}={v}")).collect();
        rows.push(["labels".into(), labels.join(", ")]);
    }
    rows.extend(vm.guest_key.iter().map(|key| {
        let proof = match &key.unproved {
            None => "named by its card".into(),
            Some(why) => format!("unproved: {why}"),
        };
        ["guest key".into(), format!("{} ({proof})", key.public)]
    }));
    rows.extend(vm.goal_keys.map(|n| {
        let said = match n {
            0 => format!("none: {NO_GOAL_KEYS}"),
            n => format!("{n} in the guest"),
        };
        ["goal keys".into(), said]
    }));
    rows.extend(vm.trust.iter().flat_map(trust));
    rows.extend(vm.clock_ahead_ms.map(|ms| ["clock".into(), clock(ms)]));
    rows.extend(vm.stood_still.iter().map(|stood| {
        let set = match stood.clock_set_ms {
            Some(ms) => format!("its clock was set by {}", seconds(ms)),
            None => "its clock was not set".into(),
        };
        let mixed = match stood.entropy_mixed {
            true => "new entropy mixed in",
            false => "no entropy mixed in",
        };
        let still = seconds(i64::try_from(stood.ms).unwrap_or(i64::MAX));
        [
            "stood still".into(),
            format!("{still} until {}: {set}, {mixed}", stood.at),
        ]
    }));
    rows.extend(vm.holding.iter().map(|held| {
        let said = format!(
            "task {}: its goal is valid from {}, and the guest's clock said {}",
            held.task_id, held.valid_from, held.guest_time
        );
        ["holds".into(), said]
    }));
    rows.extend(vm.kernel.iter().map(|k| ["kernel".into(), k.clone()]));
    rows.extend(vm.port_pid.iter().map(|pid| match vm.held_by {
        Some(_) => ["held by".into(), format!("its VMM, process {pid}")],
        None => ["port process".into(), pid.to_string()],
    }));
    rows.extend(fault(vm).map(|text| ["fault".into(), text]));
    if let Some(memory) = &vm.carrier.memory {
        let Carrier {
            bytes,
            line_ns,
            streams,
            ..
        } = vm.carrier;
        let kib = bytes / 1024;
        rows.push([
            "ring memory".into(),
            format!("{memory}, {kib} KiB, {line_ns} ns a line, {streams} streams"),
        ]);
        let doorbell = vm.carrier.doorbell.iter();
        rows.extend(doorbell.map(|bell| ["ring doorbell".into(), bell.clone()]));
    }
    if let (Some(ring), Some(vsock)) = (vm.carrier.rtt_ns, vm.carrier.vsock_rtt_ns) {
        let us = |ns: u64| ns as f64 / 1000.0;
        let (ring, vsock) = (us(ring), us(vsock));
        let said = format!("64 B there and back: ring {ring:.0} us, vsock {vsock:.0} us");
        rows.push(["latency".into(), said]);
    }
    output::pairs(14, &rows)
}

/// So much of a digest as tells it from others.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

/// `generation 3, from SMBIOS, signed by …, until …`, or `unproved: …`.
fn card(card: &Card) -> String {
    if let Some(why) = &card.unproved {
        return format!("unproved: {why}");
    }
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    format!(
        "generation {}, from {}, signed by {}, until {}",
        card.generation.unwrap_or(0),
        card.place,
        text(&card.signer),
        text(&card.not_after)
    )
}

/// `sequence 5 of 32 hex digits, for all`, a line for each document; how many keys are revoked there, what was not taken.
fn trust(trust: &Trust) -> Vec<[String; 2]> {
    let documents = trust.documents.iter().map(|taken| {
        let of = if taken.own { "this VM" } else { "all" };
        format!("sequence {} of {}, for {of}", taken.sequence, taken.signer)
    });
    let refused = trust.refused.iter().map(|refused| {
        let TrustRefused {
            sequence, signer, ..
        } = refused;
        format!("sequence {sequence} of {signer} is not taken: see the fault")
    });
    let revoked = (trust.revoked > 0).then(|| format!("revoked keys: {}", trust.revoked));
    let lines = documents.chain(refused).chain(revoked);
    lines.map(|line| ["trust".into(), line]).collect()
}

/// `-2.5 s`.
fn seconds(ms: i64) -> String {
    let sign = if ms < 0 { "-" } else { "" };
    let tenths = ms.unsigned_abs() / 100;
    format!("{sign}{}.{} s", tenths / 10, tenths % 10)
}

/// `300.0 s behind this host's`. The time that a message takes is part of it, so less than a second means nothing.
fn clock(ahead_ms: i64) -> String {
    let side = match ahead_ms {
        ms if ms.unsigned_abs() < 1000 => return "as this host's".into(),
        ms if ms < 0 => "behind",
        _ => "ahead of",
    };
    format!("{} {side} this host's", seconds(ahead_ms.saturating_abs()))
}

/// `ring: both sides use the ring`, `vsock: no VMM has handed a ring over`.
fn carrier(carrier: &Carrier) -> String {
    let kind = match (&carrier.hybrid, carrier.kind) {
        (_, CarrierKind::Ring) => "ring",
        (Some(path), _) => &format!("hybrid {path}"),
        (None, _) if let Some(cid) = carrier.kernel_cid => {
            &format!("AF_VSOCK of the kernel, CID {cid}")
        }
        (None, CarrierKind::Vsock) => "vsock",
    };
    match carrier.why.as_str() {
        "" => kind.to_owned(),
        why => format!("{kind}: {why}"),
    }
}

fn join(ports: &[impl ToString]) -> String {
    ports
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_says_which_side_of_the_hosts_it_is_on() {
        for (ms, want) in [
            (0, "as this host's"),
            (-999, "as this host's"),
            (-300_050, "300.0 s behind this host's"),
            (86_400_100, "86400.1 s ahead of this host's"),
            (i64::MIN, "9223372036854775.8 s behind this host's"),
        ] {
            assert_eq!(clock(ms), want);
        }
    }
}
