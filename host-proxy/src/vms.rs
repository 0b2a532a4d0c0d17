//! How a VM comes, changes and goes: its entry, its row in the database, its supervisor, its directory.
//!
//! | origin | settings are in | changed by |
//! |---|---|---|
//! | [`Origin::File`] | `aditd.toml` | SIGHUP ([`reload`](crate::reload)) |
//! | [`Origin::Api`] | the database | `PATCH /v1/vms/{name}` |
//! | [`Origin::Found`] | a section `[[discover]]` | SIGHUP; it comes and goes with its socket ([`found`](crate::found)) |

use std::sync::Arc;
use std::time::Duration;

use adit_channel::hello;
use adit_names::VmId;
use adit_port::control::Ends;
use anyhow::bail;

use crate::config::VmConfig;
use crate::desk::DeskError;
use crate::registry::AddError;
use crate::state::State;
use crate::vm::{Origin, VmEntry};
use crate::{events, services, supervisor};

/// How long a port process that was told to end may take.
const PORT_END_LIMIT: Duration = Duration::from_secs(5);

/// Why a VM was not added.
#[derive(Debug, thiserror::Error)]
pub enum NotAdded {
    /// It cannot be.
    #[error(transparent)]
    Refused(#[from] AddError),
    /// The database does not take it.
    #[error(transparent)]
    NotKept(#[from] DeskError),
}

/// Adds a VM and starts its supervisor. One of the API is written to the database first.
///
/// # Errors
/// Its name or CID is taken, or it cannot be written down.
pub async fn add(
    state: &Arc<State>,
    config: VmConfig,
    origin: Origin,
) -> Result<Arc<VmEntry>, NotAdded> {
    let vm = state.registry.add(config.clone(), origin)?;
    let changing = vm.changing.lock().await;
    if origin == Origin::Api
        && let Err(e) = state.desk.keep_vm(&config).await
    {
        state.registry.remove(&config.name);
        return Err(e.into());
    }
    place(state, &vm).await;
    start(state, &vm).await;
    drop(changing);
    Ok(vm)
}

/// Gives a VM its place in the descriptor store, if it has none yet, with what an earlier aditd left there.
pub async fn place(state: &State, vm: &VmEntry) {
    if vm.channel.keeper.place(|_| ()).is_some() {
        return;
    }
    let opened = match state.monitor.slot(&vm.name).await {
        Ok(None) => return,
        Ok(Some(ends)) => vm.channel.keeper.open(ends).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    if let Err(error) = opened {
        tracing::warn!(vm = %vm.name, error, "nothing is kept over the end of this aditd");
    }
}

async fn start(state: &Arc<State>, vm: &Arc<VmEntry>) {
    state.desk.greet(vm).await;
    let (for_agents, of_vm) = (state.clone(), vm.clone());
    // What its port process kept of an earlier aditd's tunnels may have no grant any more.
    let of_access = state.clone();
    let (of_ends, ended_in) = (state.clone(), vm.name.clone());
    let on_incoming = move |incoming: adit_port::control::Incoming, fd| {
        if incoming.port == hello::PORT {
            services::accept(&for_agents, &of_vm, incoming, fd);
        }
    };
    tokio::spawn(events::follow_vm(state.events.clone(), vm.clone()));
    tokio::spawn(supervisor::supervise(
        vm.clone(),
        state.monitor.clone(),
        on_incoming,
        move || {
            of_access.access_changed.notify_one();
            of_access.guests.wanted();
        },
        move |ends: &Ends| of_ends.visits.ended_all(&ended_in, ends),
    ));
}

/// Removes a VM: its port process and its tunnels end, its open tasks too, and its directory goes.
///
/// # Errors
/// The database refuses: the VM goes on as before.
pub async fn remove(state: &Arc<State>, vm: &Arc<VmEntry>) -> Result<(), DeskError> {
    let _changing = vm.changing.lock().await;
    let has_the_name = state.registry.get(&vm.name);
    if has_the_name.is_none_or(|now| !Arc::ptr_eq(&now, vm)) {
        // Somebody else has removed it meanwhile, and another VM may have its name by now.
        return Ok(());
    }
    // First: if it fails, the VM goes on as before.
    state.desk.remove_vm(&vm.name).await?;
    vm.removed.cancel();
    port_gone(vm).await;
    // Of goals that came meanwhile. Those that stay in the database end when their goal does.
    if let Err(e) = state.desk.remove_vm(&vm.name).await {
        tracing::warn!(vm = %vm.name, error = %e, "the removed VM's last tasks are not ended");
    }
    if let Err(e) = state.monitor.remove_dir(&vm.name).await {
        let dir = vm.dir.display();
        tracing::warn!(vm = %vm.name, %dir, error = %e, "the removed VM's directory stays");
    }
    // Only now is the name free: whoever takes it gets a port process and a directory of its own.
    state.registry.remove(&vm.name);
    state.found.look_again();
    Ok(())
}

/// Waits until a removed VM's supervisor has ended, and its port process with it.
pub async fn port_gone(vm: &VmEntry) {
    let mut changes = vm.watch();
    let gone = async { while !vm.channel.unsupervised() && changes.changed().await.is_ok() {} };
    if tokio::time::timeout(PORT_END_LIMIT, gone).await.is_err() {
        tracing::warn!(vm = %vm.name, "its port process does not end");
    }
}

/// What is wrong with a VM whose name a host has got while aditd was stopped, and what to do.
pub fn host_has_the_name(vm: &VmId) -> String {
    format!(
        "`{vm}` is the name of a host too, and hosts and VMs share their names: `adit vm rm {vm}` and add it under another one, or \
         give the host another name (`[names] host` and `[[host]] name` in aditd.toml); until then no change of aditd.toml is taken"
    )
}

/// Adds the VMs of the configuration, then those of the database that do not clash with them.
///
/// # Errors
/// The database cannot be read.
pub async fn load(state: &Arc<State>) -> anyhow::Result<()> {
    // What the operator chose comes before VMs of the database; a name that the machine happens to have, after them.
    state.reserve(&state.config);
    for vm in state.config.vm.clone() {
        if let Err(e) = add(state, vm, Origin::File).await {
            bail!("the VMs of the configuration clash: {e}"); // it was checked when it was read
        }
    }
    for (name, spec) in state.desk.kept_vms().await? {
        let added = match serde_json::from_str::<VmConfig>(&spec) {
            Ok(config) => state
                .registry
                .put_back(config, Origin::Api)
                .map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        match added {
            Ok(vm) => {
                if state.registry.is_host(&vm.name) {
                    let name = &vm.name;
                    let fault = host_has_the_name(name);
                    tracing::error!(vm = %name, fault, "the VM has a fault");
                }
                place(state, &vm).await;
                start(state, &vm).await;
            }
            Err(error) => {
                tracing::error!(
                    vm = name,
                    error,
                    "a VM that was added with `adit vm add` is not served"
                );
            }
        }
    }
    state.take_name();
    Ok(())
}
