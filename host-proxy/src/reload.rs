//! SIGHUP: the configuration is read again, and applied as far as that is possible in a running process. Who reads the file is
//! the monitor, for the worker cannot; who applies it, the worker.
//!
//! A file with a mistake changes nothing. Of a good one the VMs are applied: added, removed, changed; and grants, tokens,
//! certificates, whose cards are believed, and other hosts. Everything else takes a restart, as does a VM's CID; the log names what was left. `GET /v1/config` and the service's status say what became of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use adit_api::{ConfigStatus, HostEventKind};
use adit_names::VmId;
use futures_util::future::join_all;
use tokio::sync::{Notify, mpsc};

use crate::access::tokens::Tokens;
use crate::config::{Config, ConfigError, Sources, VMS_MAX, VmConfig};
use crate::enrolment;
use crate::state::State;
use crate::vm::{Origin, VmEntry};
use crate::vms;

/// What became of the configuration file.
#[derive(Debug, Default)]
pub struct Reloads {
    outcome: Mutex<Outcome>,
    /// It was read once more.
    read: Notify,
}

#[derive(Clone, Debug, Default)]
struct Outcome {
    /// How often it was read since the start.
    reads: u64,
    error: Option<String>,
    restart: Vec<String>,
}

impl Reloads {
    /// Why the file was refused the last time it was read.
    pub fn error(&self) -> Option<String> {
        self.get().error
    }

    /// As the API shows it.
    pub fn show(&self) -> ConfigStatus {
        let Outcome {
            reads,
            error,
            restart,
        } = self.get();
        ConfigStatus {
            version: Some(env!("CARGO_PKG_VERSION").into()),
            // And once at the start.
            reads: reads + 1,
            error,
            restart,
            users_unknown: None,
            discover: Vec::new(),
        }
    }

    /// Waits until it was read once more than this status says.
    pub async fn read_after(&self, before: &ConfigStatus) -> ConfigStatus {
        loop {
            // Enabled before it is looked, so that none is missed.
            let mut read = std::pin::pin!(self.read.notified());
            read.as_mut().enable();
            let now = self.show();
            if now.reads > before.reads {
                return now;
            }
            read.await;
        }
    }

    fn get(&self) -> Outcome {
        self.outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, outcome: Outcome) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
        self.read.notify_waiters();
    }
}

/// Applies each text of the configuration that was read again; an error is why it could not be.
pub async fn follow(state: Arc<State>, mut changes: mpsc::Receiver<Result<Sources, String>>) {
    while let Some(text) = changes.recv().await {
        let mut outcome = state.reloads.get();
        outcome.reads += 1;
        let new = text.and_then(|text| Config::of(&text).map_err(|e| in_a_line(&e)));
        let applied = match new {
            Ok(new) => apply(&state, new).await,
            Err(error) => Err(error),
        };
        match applied {
            Ok(restart) => (outcome.error, outcome.restart) = (None, restart),
            Err(error) => {
                tracing::error!(
                    error,
                    "the configuration is refused: nothing of it is applied"
                );
                let events = &state.events;
                events.note(HostEventKind::ConfigRefused, None, &error);
                // What waited for a restart before still does.
                outcome.error = Some(error);
            }
        }
        state.reloads.set(outcome);
        crate::tell_status(&state).await;
    }
}

/// Applies a configuration. Returns what of it takes a restart.
async fn apply(state: &Arc<State>, mut new: Config) -> Result<Vec<String>, String> {
    let mut restart = differences(&state.config, &new);
    let (grants, tokens) = (new.grants(), Tokens::new(&new.token));
    check_names(state, &new)?;
    // A VM that is found takes no name of the file's meanwhile.
    let turn = state.found.turn.lock().await;
    let plan = Plan::new(&state.registry.all(), std::mem::take(&mut new.vm))?;
    for vm in &plan.add {
        // In the directory that is in use, whatever the file says now.
        let checked = state.config.check_paths(&vm.name);
        checked.map_err(|(_, why)| format!("`{}`: {why}", vm.name))?;
    }
    restart.extend(plan.restart.iter().cloned());
    if state.set_grants(grants) {
        state.events.note(HostEventKind::GrantsChanged, None, "");
    }
    state.callers.renew(tokens);
    if state.set_trust(&new.trust) {
        for vm in state.registry.all() {
            enrolment::judge_again(state, &vm).await;
        }
    }
    state.tls.renew(&state.config, &new);
    state.reserve(&new);
    state.peers.renew(&new);
    // Each has its own time to end.
    let removals = join_all(plan.remove.iter().map(|vm| async {
        let failed = vms::remove(state, vm).await.err()?;
        tracing::error!(vm = %vm.name, error = %failed, "the VM is not removed");
        Some(format!("the removal of {} ({failed})", vm.name))
    }));
    let stay: Vec<_> = removals.await.into_iter().flatten().collect();
    let removed = plan.remove.len() - stay.len();
    restart.extend(stay);
    for (vm, spec) in &plan.change {
        let _changing = vm.changing.lock().await;
        vm.set_spec(spec.clone());
        let pending = vm.pending();
        if !pending.is_empty() {
            let settings = pending.join(", ");
            tracing::warn!(vm = %vm.name, settings, "to be applied by `adit vm reload`");
        }
    }
    let (mut added, changed) = (0, plan.change.len());
    for config in plan.add {
        let name = config.name.clone();
        match vms::add(state, config, Origin::File).await {
            Ok(_) => added += 1,
            // Somebody was faster over the API.
            Err(e) => {
                tracing::error!(vm = %name, error = %e, "the VM is not added");
                restart.push(format!("the VM {name}, which is not added ({e})"));
            }
        }
    }
    drop(turn);
    state.found.renew(state, &new.discover);
    state.access_changed.notify_one();
    tracing::info!(added, removed, changed, "the configuration is applied");
    let counts = format!("VMs: {added} added, {removed} removed, {changed} changed");
    let events = &state.events;
    events.note(HostEventKind::ConfigReloaded, None, &counts);
    if !restart.is_empty() {
        let what = restart.join(", ");
        tracing::warn!(
            what,
            "changed in the configuration, and not applied before aditd is restarted"
        );
    }
    Ok(restart)
}

/// Checks the names of hosts against those of what the file does not know: this host, as it is called, and VMs of the API.
fn check_names(state: &State, new: &Config) -> Result<(), String> {
    for host in &new.host {
        let name = &host.name;
        if state.host() == Some(name) {
            return Err(format!("[[host]] `{name}` has this host's own name"));
        }
        let vm = state.registry.get(name);
        if vm.is_some_and(|vm| vm.origin == Origin::Api) {
            return Err(format!(
                "[[host]] `{name}` has the name of a VM that was added with `adit vm add`, and hosts and VMs share their names"
            ));
        }
    }
    Ok(())
}

/// Reads the file once more. What the start takes, a pipe or an empty file, is a mistake here: the one would be waited for,
/// and the other would remove every VM where an editor has just begun to write, or could not because the disk is full.
///
/// # Errors
/// Why it cannot be read, in one line.
pub fn read_again(path: &Path) -> Result<Sources, String> {
    let shown = path.display();
    match std::fs::metadata(path) {
        Ok(file) if !file.is_file() => return Err(format!("{shown} is not a regular file")),
        Ok(file) if file.len() == 0 => {
            return Err(format!(
                "{shown} is empty: write a comment into it if no VM is to stay"
            ));
        }
        _ => {}
    }
    let sources = Sources::read(path).map_err(|e| in_a_line(&e))?;
    if let Some((part, _)) = sources.iter().find(|(_, text)| text.is_empty()) {
        let part = part.display();
        return Err(format!(
            "{part} is empty: remove it, or write a comment into it if nothing of it is to stay"
        ));
    }
    Ok(sources)
}

fn in_a_line(e: &ConfigError) -> String {
    match std::error::Error::source(e) {
        Some(source) => format!("{e}: {source}"),
        None => e.to_string().replace('\n', "; "),
    }
}

/// Keys that differ, of those that take a restart.
fn differences(old: &Config, new: &Config) -> Vec<String> {
    let values = |config: &Config| {
        let config = config.settings();
        let mut values = BTreeMap::new();
        // It was read from text, and can be written as such.
        flatten(
            "",
            &serde_json::to_value(&config).unwrap_or_default(),
            &mut values,
        );
        values
    };
    let (old, new) = (values(old), values(new));
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let differs = keys
        .into_iter()
        .filter(|key| old.get(*key) != new.get(*key));
    differs.map(|key| format!("`{key}`")).collect()
}

fn flatten(
    prefix: &str,
    value: &serde_json::Value,
    into: &mut BTreeMap<String, serde_json::Value>,
) {
    let Some(fields) = value.as_object() else {
        // Also a section that is not there: it has no values.
        if !value.is_null() {
            into.insert(prefix.to_owned(), value.clone());
        }
        return;
    };
    for (name, value) in fields {
        let path = match prefix {
            "" => name.clone(),
            _ => format!("{prefix}.{name}"),
        };
        flatten(&path, value, into);
    }
}

/// What is to be done with the VMs.
struct Plan {
    remove: Vec<Arc<VmEntry>>,
    change: Vec<(Arc<VmEntry>, VmConfig)>,
    add: Vec<VmConfig>,
    /// What cannot be done now.
    restart: Vec<String>,
}

impl Plan {
    /// Compares the VMs that there are with those of the file.
    ///
    /// # Errors
    /// They clash with those that were added over the API.
    fn new(present: &[Arc<VmEntry>], file: Vec<VmConfig>) -> Result<Self, String> {
        let mut plan = Self {
            remove: Vec::new(),
            change: Vec::new(),
            add: Vec::new(),
            restart: Vec::new(),
        };
        let listed: BTreeSet<VmId> = file.iter().map(|vm| vm.name.clone()).collect();
        let mut stay: BTreeMap<u64, VmId> = BTreeMap::new();
        for vm in present {
            let name = &vm.name;
            let is_gone = vm.origin == Origin::File && !listed.contains(name);
            match (is_gone, vm.channel.held_by()) {
                (true, None) => plan.remove.push(vm.clone()),
                (is_gone, held_by) => {
                    if is_gone && let Some(pid) = held_by {
                        let why =
                            format!("the removal of {name} (process {pid}, its VMM, still has it)");
                        plan.restart.push(why);
                    }
                    stay.insert(vm.cid, name.clone());
                }
            }
        }
        for config in file {
            let name = &config.name;
            match present.iter().find(|vm| vm.name == *name) {
                Some(vm) if vm.origin == Origin::Api => {
                    return Err(format!(
                        "there is a VM `{name}` already, which was added with `adit vm add`: remove it first, or take it out \
                         of the file"
                    ));
                }
                // What is configured comes first.
                Some(vm) if matches!(vm.origin, Origin::Found { .. }) => {
                    stay.remove(&vm.cid);
                    plan.remove.push(vm.clone());
                    plan.add.push(config);
                }
                Some(vm) => {
                    if vm.cid != config.cid {
                        let cids = format!("{} instead of {}", config.cid, vm.cid);
                        let why = format!("`cid` of {name} ({cids}: its VM must be ended)");
                        plan.restart.push(why);
                    }
                    let cid = vm.cid;
                    let spec = VmConfig { cid, ..config };
                    if *vm.spec() != spec {
                        plan.change.push((vm.clone(), spec));
                    }
                }
                None => {
                    if let Some(other) = stay.insert(config.cid, name.clone()) {
                        let cid = config.cid;
                        return Err(format!(
                            "CID {cid} of `{name}` is the CID of `{other}` already"
                        ));
                    }
                    plan.add.push(config);
                }
            }
        }
        match stay.len() > VMS_MAX {
            true => Err(format!(
                "there would be {} VMs, and may be {VMS_MAX}",
                stay.len()
            )),
            false => Ok(plan),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("a.toml"), text).unwrap()
    }

    #[test]
    fn every_key_outside_of_the_vms_that_differs_is_named() {
        let old = config("");
        let new = "run_dir = \"/a\"\n[metrics]\nlisten = \"127.0.0.1:1\"\n[limits]\nkept_days = 1\n[ports]\nuids = \"1-9\"\n\
                   [[vm]]\nname = \"a\"\ncid = 3\n";
        let named = differences(&old, &config(new));
        let want = [
            "`limits.kept_days`",
            "`metrics.listen`",
            "`ports.uids`",
            "`run_dir`",
        ];
        assert_eq!(named, want);
        assert!(differences(&old, &config("[limits]\nkept_days = 30\n")).is_empty());
    }

    fn vm(name: &str, cid: u64) -> VmConfig {
        VmConfig::new(name.parse().unwrap(), cid)
    }

    fn present(vms: &[(&str, u64, Origin)]) -> Vec<Arc<VmEntry>> {
        let entry = |(name, cid, origin): &(&str, u64, Origin)| {
            Arc::new(VmEntry::new(
                Path::new("/run/adit"),
                vm(name, *cid),
                *origin,
            ))
        };
        vms.iter().map(entry).collect()
    }

    #[test]
    fn a_cid_may_go_from_a_vm_that_is_removed_to_one_that_is_added() {
        let plan = Plan::new(&present(&[("a", 3, Origin::File)]), vec![vm("b", 3)]).unwrap();
        assert_eq!(
            (plan.remove.len(), plan.add.len(), plan.restart.len()),
            (1, 1, 0)
        );
    }

    #[test]
    fn vms_of_the_api_stay_and_what_clashes_with_them_is_refused() {
        let there = present(&[("a", 3, Origin::Api), ("b", 4, Origin::File)]);
        let plan = Plan::new(&there, vec![vm("b", 4), vm("c", 5)]).unwrap();
        assert_eq!(
            (plan.remove.len(), plan.change.len(), plan.add.len()),
            (0, 0, 1)
        );
        for clash in [vm("a", 9), vm("c", 3)] {
            assert!(Plan::new(&there, vec![clash]).is_err());
        }
    }

    #[test]
    fn a_new_cid_waits_for_a_restart_and_its_old_one_is_not_free() {
        let there = present(&[("a", 3, Origin::File)]);
        let plan = Plan::new(&there, vec![vm("a", 7)]).unwrap();
        assert_eq!((plan.change.len(), plan.restart.len()), (0, 1));
        assert!(Plan::new(&there, vec![vm("a", 7), vm("b", 3)]).is_err());
    }
}
