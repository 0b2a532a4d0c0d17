//! VMs that are found: `[[discover]]` names a directory, and each VMM's socket in it is a VM.
//!
//! ```text
//! monitor: what is there ─► follow ─► not there yet: added · gone with its directory: removed · taken: said
//! ```
//! One task for each section asks the monitor, which looks into the directory, and sleeps until there is news. A VM stays while its
//! directory does, for a VMM that is started again has no socket for a moment. A VM that is configured or was added has its name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_api::DiscoverShown;
use adit_names::VmId;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::config::DiscoverConfig;
use crate::monitor::wire::HasFound;
use crate::state::State;
use crate::vm::{Origin, VmEntry};
use crate::vms;

/// How soon a monitor is asked again that does not answer.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a start waits for the first answers.
const FIRST_LIMIT: Duration = Duration::from_secs(2);

/// The sections of the configuration.
#[derive(Debug, Default)]
pub struct Found {
    sections: Mutex<BTreeMap<u64, Arc<Section>>>,
    /// Held while VMs come and go because of a directory, or of the configuration, so that a name is never taken meanwhile.
    pub turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Section {
    key: u64,
    config: Mutex<DiscoverConfig>,
    /// What is wrong with what is there.
    refused: Mutex<Vec<String>>,
    /// It is to be looked at again, though nothing is new in the directory.
    again: Notify,
    /// It is no more in the configuration.
    over: CancellationToken,
    /// It was looked at.
    looked: watch::Sender<bool>,
}

impl Found {
    /// Follows these sections from now on, and no others. VMs of one that is gone are removed.
    pub fn renew(&self, state: &Arc<State>, configs: &[DiscoverConfig]) {
        let mut sections = self.sections();
        let keys: Vec<u64> = configs.iter().map(DiscoverConfig::key).collect();
        sections.retain(|key, section| {
            let stays = keys.contains(key);
            if !stays {
                section.over.cancel();
            }
            stays
        });
        for (key, config) in keys.into_iter().zip(configs) {
            if let Some(section) = sections.get(&key) {
                *lock(&section.config) = config.clone();
                section.again.notify_one();
                continue;
            }
            let section = Arc::new(Section {
                key,
                config: Mutex::new(config.clone()),
                refused: Mutex::default(),
                again: Notify::new(),
                over: CancellationToken::new(),
                looked: watch::Sender::new(false),
            });
            sections.insert(key, section.clone());
            tokio::spawn(section.follow(state.clone()));
        }
    }

    /// Waits until each directory was looked at, but not long.
    pub async fn first(&self) {
        let all: Vec<_> = self.sections().values().cloned().collect();
        let looked = async {
            for section in all {
                // The sender is the section's.
                let _ = section.looked.subscribe().wait_for(|looked| *looked).await;
            }
        };
        if tokio::time::timeout(FIRST_LIMIT, looked).await.is_err() {
            tracing::warn!("directories of [[discover]] are still being looked at");
        }
    }

    /// A VM has gone: one of the same name may be there.
    pub fn look_again(&self) {
        self.sections()
            .values()
            .for_each(|section| section.again.notify_one());
    }

    /// As the API shows them.
    pub fn show(&self, state: &State) -> Vec<DiscoverShown> {
        let sections: Vec<_> = self.sections().values().cloned().collect();
        let show = |section: Arc<Section>| {
            let config = lock(&section.config).clone();
            DiscoverShown {
                dir: config.dir.display().to_string(),
                pattern: config.pattern.to_string(),
                vms: u32::try_from(section.vms(state).len()).unwrap_or(u32::MAX),
                refused: lock(&section.refused).clone(),
            }
        };
        sections.into_iter().map(show).collect()
    }

    fn sections(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Section>>> {
        lock(&self.sections)
    }
}

impl Section {
    async fn follow(self: Arc<Self>, state: Arc<State>) {
        let mut found = HasFound::default();
        loop {
            tokio::select! {
                biased;
                () = state.stop.cancelled() => return,
                () = self.over.cancelled() => break,
                () = self.again.notified() => self.apply(&state, &found).await,
                answer = state.monitor.discover(self.key, found.version) => match answer {
                    Ok(news) => {
                        found = news;
                        self.apply(&state, &found).await;
                    }
                    Err(_) => {
                        // The next monitor counts anew. What is there stays.
                        found.version = 0;
                        tokio::select! {
                            () = self.over.cancelled() => break,
                            () = state.stop.cancelled() => return,
                            () = tokio::time::sleep(AGAIN) => {}
                        }
                    }
                }
            }
        }
        let _turn = state.found.turn.lock().await;
        for vm in self.vms(&state) {
            self.remove(&state, &vm).await;
        }
    }

    /// Adds and removes VMs.
    async fn apply(&self, state: &Arc<State>, found: &HasFound) {
        // Nothing was heard yet.
        if found.version == 0 && found.vms.is_empty() && !*self.looked.borrow() {
            return;
        }
        let _turn = state.found.turn.lock().await;
        let config = lock(&self.config).clone();
        let mut refused = found.refused.clone();
        for vm in self.vms(state) {
            let is_there = found.vms.iter().any(|(name, _)| *name == vm.name);
            match is_there || !found.is_whole {
                true => self.settle(&config, &vm).await,
                false => self.remove(state, &vm).await,
            }
        }
        for (name, _) in found.vms.iter().filter(|(_, has_socket)| *has_socket) {
            if let Err(why) = self.add(state, &config, name).await {
                let path = config.socket(name);
                let line = format!("{}: {why}", path.display());
                refused.push(adit_names::escape(&line).to_string());
            }
        }
        let before = std::mem::replace(&mut *lock(&self.refused), refused.clone());
        for line in refused.iter().filter(|line| !before.contains(line)) {
            tracing::warn!(line, "a VMM's socket is not used");
        }
        self.looked.send_replace(true);
    }

    /// Adds a VM, if it is not there.
    async fn add(
        &self,
        state: &Arc<State>,
        config: &DiscoverConfig,
        name: &VmId,
    ) -> Result<(), String> {
        let origin = Origin::Found { section: self.key };
        if let Some(vm) = state.registry.get(name) {
            return match vm.origin {
                other if other == origin => Ok(()),
                Origin::File => Err(format!("`{name}` is configured in aditd.toml")),
                Origin::Api => Err(format!("`{name}` was added with `adit vm add`")),
                Origin::Found { .. } => Err(format!("`{name}` is found somewhere else, too")),
            };
        }
        let vm = config.vm(name, state.registry.free_cid(name));
        let checked = vm.check().and_then(|()| state.config.check_paths(name));
        checked.map_err(|(_, why)| why)?;
        let added = vms::add(state, vm, origin).await;
        added.map(drop).map_err(|e| e.to_string())
    }

    /// Gives a VM the settings of its section.
    async fn settle(&self, config: &DiscoverConfig, vm: &VmEntry) {
        let spec = config.vm(&vm.name, vm.cid);
        if *vm.spec() != spec {
            let _changing = vm.changing.lock().await;
            vm.set_spec(spec);
        }
    }

    async fn remove(&self, state: &Arc<State>, vm: &Arc<VmEntry>) {
        tracing::info!(vm = %vm.name, "its socket and its directory are gone");
        if let Err(e) = vms::remove(state, vm).await {
            tracing::error!(vm = %vm.name, error = %e, "the VM is not removed");
        }
    }

    /// Its VMs.
    fn vms(&self, state: &State) -> Vec<Arc<VmEntry>> {
        let mut all = state.registry.all();
        all.retain(|vm| vm.origin == Origin::Found { section: self.key });
        all
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
