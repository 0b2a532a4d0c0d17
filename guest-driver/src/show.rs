//! What a configuration means, for people: `adit-guest check-config` and `adit-guest status`.

use std::fmt::{self, Display, Write as _};

use adit_names::VmId;
use adit_tasks::card::Proved;
use adit_tasks::{Anchor, Kind};

use crate::clock;
use crate::config::{ClockSource, Config};
use crate::enrol::{self, Enrolment};
use crate::policy::{self, Standing};
use crate::trust::Anchors;
use crate::upgrade::{self, begin, program};

/// Every key with its value in force, and the trust anchors.
pub fn in_force(config: &Config) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut text, config);
    text
}

fn write(out: &mut String, config: &Config) -> fmt::Result {
    let none = |text: String, meaning: &str| match text.is_empty() {
        true => format!("none: {meaning}"),
        false => text,
    };
    let clock = match config.clock {
        ClockSource::Own => "own",
        ClockSource::Host => "host",
    };
    let roots = config.file.roots.iter().map(|root| root.display());
    for (key, value) in [
        (
            "vm_id",
            config
                .vm_id
                .as_ref()
                .map_or_else(|| "none: the card says it".into(), VmId::to_string),
        ),
        ("card", config.card.display().to_string()),
        ("trust_dir", config.trust_dir.display().to_string()),
        ("state_dir", config.state_dir.display().to_string()),
        ("run_dir", config.run_dir.display().to_string()),
        (
            "allow_ports",
            none(list(&config.allow_ports), "the host reaches no port"),
        ),
        (
            "services",
            none(
                list(
                    config
                        .service
                        .iter()
                        .map(|s| format!("{} = {}", s.name, s.to)),
                ),
                "the host reaches none by name",
            ),
        ),
        ("require_host_key", config.require_host_key.to_string()),
        ("clock", clock.into()),
    ] {
        writeln!(out, "{key:<15} {value}")?;
    }
    for &kind in Kind::ALL {
        let key = format!("{}.enabled", kind.name());
        writeln!(out, "{key:<15} {}", config.enabled(kind))?;
    }
    let roots = none(list(roots), "no file is written");
    writeln!(out, "{:<15} {roots}", "file.roots")?;
    writeln!(out, "{:<15} {}", "policy", policy_line(config))?;
    anchors(out, &Anchors::read(config))
}

/// What a start of the agent makes of the policy file.
fn policy_line(config: &Config) -> String {
    let standing = Standing::at_start(config);
    match (standing.policy(), standing.fault()) {
        (Some((file, policy)), _) => {
            format!("{}: {} rules", file.display(), policy.rules())
        }
        (None, Some(fault)) => format!("not used: {fault}"),
        (None, None) => {
            let file = policy::file_of(config).0.display();
            format!("none: there is no {file}, and the keys above decide alone")
        }
    }
}

/// Who the guest is, and by what: its card, and what of that is not used.
pub fn enrolment(config: &Config, found: &Enrolment) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_enrolment(&mut text, config, found);
    text
}

fn write_enrolment(out: &mut String, config: &Config, found: &Enrolment) -> fmt::Result {
    let anchors = Anchors::read(config).with_card(found, config, clock::unix_ms());
    match enrol::me(config, anchors.card.as_ref()) {
        Ok(me) if config.vm_id.is_some() => {
            writeln!(
                out,
                "{:<15} {me}, by vm_id of the configuration",
                "this guest"
            )?;
        }
        Ok(me) => writeln!(out, "{:<15} {me}, by its card", "this guest")?,
        Err(why) => writeln!(out, "{:<15} nobody: {why}", "this guest")?,
    }
    match (&found.card, &anchors.card) {
        (Some(at), Some(Ok(Proved { card, key }))) => {
            let place = at.place.name();
            let (vm, n, until) = (&card.vm_id, card.generation, card.not_after);
            writeln!(
                out,
                "{:<15} {vm}, generation {n}, from {place}, until {until}, signed by {key}",
                "goes by card"
            )?;
            if !card.labels.as_map().is_empty() {
                writeln!(out, "{:<15} {}", "labels", card.labels)?;
            }
            for Anchor { key, roles } in &card.anchors {
                let id = key.id();
                writeln!(out, "{:<15} {id} {roles} {}", "brings key", key.comment())?;
            }
        }
        _ => writeln!(out, "{:<15} none", "goes by card")?,
    }
    if let Some(key) = &found.key {
        writeln!(out, "{:<15} {}", "own key", key.public())?;
    }
    for fault in &found.faults {
        writeln!(out, "{:<15} {fault}", "not used")?;
    }
    Ok(())
}

/// Which program is the agent, and why others are not.
pub fn agent(config: &Config) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_agent(&mut text, config);
    text
}

fn write_agent(out: &mut String, config: &Config) -> fmt::Result {
    let image = program::version();
    let (kept, run) = begin::look(config);
    let ours = format!("{image}, the image's program");
    let agent = match &run {
        Err(why) => format!("{ours}: {why}"),
        Ok(None) => ours,
        Ok(Some(installed)) => {
            let digest = installed.digest.to_string();
            let trial = match kept.is_on_trial() {
                true => ", on trial: it has had no hello with the host yet",
                false => "",
            };
            let version = &installed.version;
            format!(
                "{version} ({}), beside the image's {image}{trial}",
                &digest[..16]
            )
        }
    };
    writeln!(out, "{:<15} {agent}", "agent")?;
    if let Some(floor) = &kept.floor {
        writeln!(out, "{:<15} {floor}", "oldest agent")?;
    }
    if let Some(failed) = &kept.failed {
        writeln!(out, "{:<15} {}", "agent's fault", upgrade::fault(failed))?;
    }
    Ok(())
}

fn anchors(out: &mut String, anchors: &Anchors) -> fmt::Result {
    for Anchor { key, roles } in anchors.keys.anchors() {
        let (id, comment) = (key.id(), key.comment());
        writeln!(out, "{:<15} {id} {roles} {comment}", "trusted key")?;
    }
    for error in anchors.skipped.iter().chain(&anchors.distrusted) {
        writeln!(out, "{:<15} {error}", "not trusted")?;
    }
    for (key, by) in anchors.held.revoked() {
        writeln!(out, "{:<15} {key}, by {by}", "revoked key")?;
    }
    for taken in anchors.held.documents() {
        let (signer, n) = (taken.signer, taken.sequence);
        let of = taken.vm_id.as_ref();
        let of = of.map_or_else(|| "all".into(), VmId::to_string);
        writeln!(
            out,
            "{:<15} of {signer}, sequence {n}, for {of}",
            "trust document"
        )?;
    }
    if anchors.count() == 0 {
        writeln!(out, "{:<15} none as goal: no task runs", "trusted key")?;
    }
    Ok(())
}

fn list(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(", ")
}
