//! What the API is asked of VMs.

use std::time::Duration;

use adit_api::{NewVm, Vm, VmChange, VmFault};
use adit_names::VmId;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::lists::{self, PageQuery};
use super::{Answer, ApiError, App, Asks, find, parse, resolve};
use crate::access::Verb;
use crate::config::{CarrierConfig, VmConfig};
use crate::registry::AddError;
use crate::vm::{Origin, Serving, VmEntry};
use crate::vms::{self, NotAdded};

/// How long it may take until a new port process serves in place of another.
const RELOAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a port process may take until it has made place.
const RELEASE_LIMIT: Duration = Duration::from_secs(3);

/// Lists VMs.
#[utoipa::path(
    get,
    path = "/v1/vms",
    params(PageQuery),
    responses((status = 200, body = Vec<Vm>, description = "By name", headers(("adit-next" = String, description = "Cursor of the next page, if there is one"))))
)]
pub(super) async fn list(
    Shared(state): Shared<App>,
    asks: Asks,
    Query(page): Query<PageQuery>,
) -> Result<Response, ApiError> {
    let mut vms = state.registry.all();
    vms.retain(|vm| asks.sees(&state, Verb::See, vm.name.as_str()));
    let (page, next) = page.of(&vms, |vm| vm.name.to_string());
    let shown = page.iter().map(|vm| {
        let mut shown = vm.show();
        if state.registry.is_host(&vm.name) {
            named(&mut shown, vms::host_has_the_name(&vm.name));
        }
        shown
    });
    let shown: Vec<Vm> = shown.collect();
    Ok(lists::page(&shown, next))
}

/// Shows a VM.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}",
    params(("name" = String, Path, description = "Name of the VM")),
    responses((status = 200, body = Vm, description = "As it is now"))
)]
pub(super) async fn show(Shared(state): Shared<App>, Path(name): Path<String>) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    let mut shown = vm.show();
    if let Some(text) = resolve::not_ours(&state, &vm).await {
        named(&mut shown, text);
    }
    Ok(Json(shown))
}

/// Its name leads elsewhere.
fn named(shown: &mut Vm, text: String) {
    let kind = "name".into();
    shown.fault.get_or_insert_with(|| text.clone());
    shown.faults.push(VmFault { kind, text });
}

/// Adds a VM.
#[utoipa::path(
    post,
    path = "/v1/vms",
    request_body = NewVm,
    responses((status = 200, body = Vm, description = "It is kept, and served"))
)]
pub(super) async fn add(Shared(state): Shared<App>, asks: Asks, body: Bytes) -> Answer<Vm> {
    let new: NewVm = parse(&body)?;
    let name = new.name.parse::<VmId>();
    let name = name.map_err(|e| bad_vm(("name", e.to_string())))?;
    asks.may(&state, Verb::Manage, name.as_str())?;
    let carrier = new.carrier.map(CarrierConfig::from).unwrap_or_default();
    if carrier.hybrid().is_some() {
        // Root looks at the path, makes a socket beside it, and connects to it.
        asks.must_be_owner(&state, "POST /v1/vms with a path")?;
    }
    let cid = match new.cid {
        0 => state.registry.free_cid(&name),
        cid => cid,
    };
    let config = VmConfig {
        carrier,
        allow: new.allow,
        allow_vsock: new.allow_vsock,
        allow_services: services(&new.allow_services).map_err(bad_vm)?,
        ..VmConfig::new(name, cid)
    };
    let checked = config.check();
    let checked = checked.and_then(|()| state.config.check_paths(&config.name));
    checked.map_err(bad_vm)?;
    let added = vms::add(&state, config, Origin::Api).await;
    let vm = added.map_err(|e| match e {
        // Whose it is, is not for everybody to know.
        NotAdded::Refused(AddError::CidTaken { cid, by })
            if !asks.sees(&state, Verb::See, by.as_str()) =>
        {
            let message = format!("CID {cid} is taken");
            ApiError::new(StatusCode::CONFLICT, "taken", message).help("take another one")
        }
        e => e.into(),
    })?;
    Ok(Json(vm.show()))
}

/// Changes settings of a VM that was added over the API.
#[utoipa::path(
    patch,
    path = "/v1/vms/{name}",
    params(("name" = String, Path, description = "Name of the VM")),
    request_body = VmChange,
    responses((status = 200, body = Vm, description = "With its settings changed"))
)]
pub(super) async fn change(
    Shared(state): Shared<App>,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    let change = parse_change(&body)?;
    of_the_api(&vm, "change it there, then `systemctl reload aditd`")?;
    if change.busy_poll_us.is_some() {
        held(
            &vm,
            "how that process polls is not aditd's to say",
            "leave busy_poll_us out",
        )?;
    }
    let _changing = vm.changing.lock().await;
    if vm.removed.is_cancelled() {
        return Err(ApiError::unknown_vm(&name));
    }
    let mut spec = VmConfig::clone(&vm.spec());
    let VmChange {
        allow,
        allow_vsock,
        allow_services,
        busy_poll_us,
    } = change;
    if let Some(names) = allow_services {
        spec.allow_services = services(&names).map_err(bad_vm)?;
    }
    spec.allow = allow.unwrap_or(spec.allow);
    spec.allow_vsock = allow_vsock.unwrap_or(spec.allow_vsock);
    spec.busy_poll_us = busy_poll_us.unwrap_or(spec.busy_poll_us);
    spec.check().map_err(bad_vm)?;
    state.desk.keep_vm(&spec).await?;
    vm.set_spec(spec);
    Ok(Json(vm.show()))
}

/// Names of services.
fn services(names: &[String]) -> Result<Vec<VmId>, (&'static str, String)> {
    let name = |text: &String| text.parse::<VmId>();
    let names = names.iter().map(name).collect::<Result<_, _>>();
    names.map_err(|e| ("allow_services", e.to_string()))
}

/// What cannot be changed over the API, why, and what can be done.
const FIXED: [(&str, &str, &str); 5] = [
    (
        "name",
        "goals are signed for it, and the guest is enrolled with it",
        "remove the VM and add it under the new name",
    ),
    (
        "cid",
        "the running guest has it",
        "remove the VM and add it with the new CID",
    ),
    ("ivshmem_mib", IN_FILE.0, IN_FILE.1),
    ("allow_any_memory", IN_FILE.0, IN_FILE.1),
    (
        "carrier",
        "its port process is another one for each",
        "remove the VM and add it with the new carrier",
    ),
];
const IN_FILE: (&str, &str) = (
    "only a VM of aditd.toml can have another value than the default",
    "remove the VM, add it to aditd.toml, then `systemctl reload aditd`",
);

fn parse_change(body: &[u8]) -> Result<VmChange, ApiError> {
    let fields: serde_json::Map<String, serde_json::Value> = parse(body)?;
    let fixed = |name: &String| FIXED.iter().find(|(fixed, ..)| fixed == name);
    if let Some((name, why, help)) = fields.keys().find_map(fixed) {
        let message = format!("`{name}` of a VM cannot be changed: {why}");
        let refused = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "fixed", message);
        return Err(refused.help(help));
    }
    parse(body)
}

fn bad_vm((key, why): (&str, String)) -> ApiError {
    let message = format!("`{key}`: {why}");
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "bad-vm", message)
}

/// A VM of the file is changed in the file: the API's word would be gone at the next start.
fn of_the_api(vm: &VmEntry, help: &str) -> Result<(), ApiError> {
    match vm.origin {
        Origin::Api => Ok(()),
        Origin::File => {
            let message = format!("`{}` is configured in aditd.toml", vm.name);
            let refused = ApiError::new(StatusCode::CONFLICT, "configured", message);
            Err(refused.help(help))
        }
        Origin::Found { .. } => {
            let message = format!("`{}` is there because its VMM's socket was found", vm.name);
            let refused = ApiError::new(StatusCode::CONFLICT, "found", message);
            Err(refused.help(
                "its settings are those of its [[discover]] in aditd.toml; it goes when the socket and its directory are gone",
            ))
        }
    }
}

/// What an operator must not do to a VM by mistake while its VMM holds it.
fn held(vm: &VmEntry, what: &str, help: &str) -> Result<(), ApiError> {
    let Some(pid) = vm.channel.held_by() else {
        return Ok(());
    };
    let message = format!(
        "process {pid}, the VMM of `{}`, serves its channel itself: {what}",
        vm.name
    );
    Err(ApiError::new(StatusCode::CONFLICT, "held", message).help(help))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct RemoveQuery {
    #[serde(default)]
    force: bool,
}

/// Removes a VM.
#[utoipa::path(
    delete,
    path = "/v1/vms/{name}",
    params(("name" = String, Path, description = "Name of the VM"), RemoveQuery),
    responses((status = 204, description = "It is gone, with its port process"))
)]
pub(super) async fn remove(
    Shared(state): Shared<App>,
    Path(name): Path<String>,
    Query(q): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let vm = find(&state, &name)?;
    of_the_api(&vm, "take it out there, then `systemctl reload aditd`")?;
    if !q.force {
        held(
            &vm,
            "removed, it would run on without a channel",
            "end the VM, and its VMM removes it here; `adit vm rm --force` removes it all the same",
        )?;
    }
    vms::remove(&state, &vm).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Replaces the port process under a running VM.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/reload",
    params(("name" = String, Path, description = "Name of the VM")),
    responses((status = 200, body = Vm, description = "The new one serves"))
)]
pub(super) async fn reload(Shared(state): Shared<App>, Path(name): Path<String>) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    held(
        &vm,
        "it has no port process that could be replaced",
        "to run a new build of the VMM, end the VM and start it again, or restore it from a snapshot",
    )?;
    let serving = vm.channel.serving();
    let running = serving.and_then(|s| Some((s.link.status()?, s)));
    let Some((status, Serving { link, process, .. })) = running else {
        let message = format!("`{name}` has no port process now: one is being started");
        return Err(ApiError::new(StatusCode::CONFLICT, "down", message)
            .help("`adit vm show` says why, if it does not come"));
    };
    let pid = process.pid();
    // Where the VMM or the host's kernel has a socket for each stream there is nothing to go on with: the streams end.
    let is_foreign = vm.channel.is_foreign();
    if status.session && !is_foreign && !vm.channel.keeper.has_frontend() {
        let message = format!(
            "port process {pid} of `{name}` has handed nothing over that a new one could go on with"
        );
        return Err(ApiError::new(StatusCode::CONFLICT, "not-kept", message)
            .help("power-cycle the VM after you have ended that process: the new build is started then"));
    }
    let mut changes = vm.watch();
    let replaced = async {
        // One that does not hear it is ended all the same: what the next one needs is here.
        let _ = tokio::time::timeout(RELEASE_LIMIT, link.release()).await;
        state.monitor.end(&vm.name, pid, RELEASE_LIMIT).await;
        loop {
            let now = vm.channel.status();
            let another = vm.channel.port_pid().is_some_and(|now| now != pid);
            if now.is_some_and(|now| another && now.session >= status.session)
                || vm.channel.stuck().is_some()
                || changes.changed().await.is_err()
            {
                return;
            }
        }
    };
    if tokio::time::timeout(RELOAD_LIMIT, replaced).await.is_err() {
        let message = format!("`{name}`: no new port process serves after {RELOAD_LIMIT:?}");
        return Err(
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
                .help("`adit vm show` and RUN/vm/NAME/port.log say why"),
        );
    }
    Ok(Json(vm.show()))
}
