//! `adit-guest self-test`: what would fail on this image, before it is needed. Changes nothing but a file that it makes and removes.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::clock;
use crate::config::Config;
use crate::enrol::{self, seal};
use crate::policy::Standing;
use crate::policy::command::notes;
use crate::trust::Anchors;
use crate::upgrade::begin;

/// 2024-01-01: a clock that is behind was never set.
const CLOCK_MIN_MS: u64 = 1_704_067_200_000;

/// What was found of one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It works.
    Ok(String),
    /// It works, and somebody should know this.
    Note(String),
    /// It does not work; says what to do.
    Fails(String),
}

/// Tries everything.
pub fn run(config: &Config) -> Vec<Found> {
    let mut found = vec![vsock(), state_dir(&config.state_dir), clock_is_set()];
    let enrolment = enrol::look(config);
    let anchors = Anchors::read(config).with_card(&enrolment, config, clock::unix_ms());
    found.push(match anchors.count() {
        0 => {
            Found::Fails("no key is trusted for goals: no task runs; put one into trust_dir".into())
        }
        n => Found::Ok(format!("{n} keys are trusted for goals")),
    });
    let skipped = anchors.skipped.iter().chain(&anchors.distrusted);
    found.extend(skipped.map(|e| Found::Fails(format!("not trusted: {e}"))));
    found.push(match enrol::me(config, anchors.card.as_ref()) {
        Ok(me) => Found::Ok(format!("this guest is {me}")),
        Err(why) => Found::Fails(why),
    });
    found.extend(
        enrolment
            .faults
            .iter()
            .map(|fault| Found::Fails(fault.to_string())),
    );
    found.push(agent(config));
    found.extend(policy(config));
    found.push(copies(config));
    found
}

fn policy(config: &Config) -> Vec<Found> {
    let standing = Standing::at_start(config);
    let Some((file, policy)) = standing.policy() else {
        let fault = standing
            .fault()
            .map(|fault| Found::Fails(fault.to_string()));
        return fault.into_iter().collect();
    };
    let shown = file.display();
    let rules = format!("the policy {shown} has {} rules", policy.rules());
    let notes = notes(policy).into_iter();
    let notes = notes.map(|(line, note)| Found::Note(format!("{shown}:{line}: {note}")));
    [Found::Ok(rules)].into_iter().chain(notes).collect()
}

fn vsock() -> Found {
    let made = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    );
    match made {
        Ok(_) => Found::Ok("this kernel has vsock".into()),
        Err(e) => Found::Fails(format!(
            "this kernel has no vsock ({e}): `modprobe vmw_vsock_virtio_transport`, and install the module where there is none"
        )),
    }
}

fn state_dir(dir: &Path) -> Found {
    let shown = dir.display();
    let tried = dir.join(".self-test");
    let write = || -> io::Result<()> {
        fs::write(&tried, b"x")?;
        fs::remove_file(&tried)
    };
    match write() {
        Ok(()) => Found::Ok(format!("{shown} can be written")),
        // The agent makes it.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Found::Note(format!("{shown} is not there yet: the agent makes it"))
        }
        Err(e) => Found::Fails(format!(
            "{shown} cannot be written ({e}): every task is refused; make room, or mount it writable"
        )),
    }
}

fn clock_is_set() -> Found {
    match clock::now_ms() {
        ms if ms < CLOCK_MIN_MS => Found::Fails(
            "the clock was never set: goals wait until it is; set it, or `clock = \"host\"` in the configuration".into(),
        ),
        _ => Found::Ok("the clock is set".into()),
    }
}

/// Which program is the agent.
fn agent(config: &Config) -> Found {
    match begin::look(config) {
        (_, Ok(None)) => Found::Ok("the image's program is the agent".into()),
        (kept, Ok(Some(installed))) if kept.is_on_trial() => Found::Note(format!(
            "the agent {} is on trial: a copy of this disk would try it anew",
            installed.version
        )),
        (_, Ok(Some(installed))) => Found::Ok(format!(
            "the agent is {}, which came over the channel; copies of this disk have it",
            installed.version
        )),
        (_, Err(why)) => Found::Fails(format!("the agent is not the one that was taken: {why}")),
    }
}

/// Whether a copy of this disk would be somebody already.
fn copies(config: &Config) -> Found {
    let there = seal::identity(config)
        .into_iter()
        .filter(|file| file.exists());
    let there: Vec<_> = there.map(|file| file.display().to_string()).collect();
    match (&config.vm_id, there.is_empty()) {
        (None, true) => {
            Found::Ok("sealed: each copy of this disk gets an identity of its own".into())
        }
        (vm_id, _) => {
            let fixed = vm_id.iter().map(|id| format!("vm_id = {id}"));
            let all: Vec<_> = fixed.chain(there).collect();
            Found::Note(format!(
                "this disk has an identity ({}). A copy of it is noticed by another card, another SMBIOS UUID, another VM of its \
                 host, or another host; where none of them differs it goes unnoticed. Before you copy it: `adit-guest seal`",
                all.join(", ")
            ))
        }
    }
}
