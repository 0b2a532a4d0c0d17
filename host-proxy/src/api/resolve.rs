//! What the API is asked of names: which host has a VM, and what all hosts have.

use std::collections::HashSet;

use adit_api::{AllVms, HostShown, Resolution, Silent, VmAt};
use adit_channel::refusal::Code;
use adit_names::{ServiceName, VmId};
use adit_port::control::Target;
use axum::Json;
use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::future::join_all;

use super::lists::{self, PageQuery};
use super::{Answer, ApiError, App};
use crate::access::Caller;
use crate::peers::asked;
use crate::reach::Destination;
use crate::reach::find::{Found, find, silent};
use crate::reach::resolve::listed;
use crate::remedy;
use crate::vm::VmEntry;
use crate::vms;

/// Says which host has a VM.
#[utoipa::path(
    get,
    path = "/v1/resolve/{name}",
    params(("name" = String, Path, description = "`VM` or `VM.HOST`, also with the suffix")),
    responses((status = 200, body = Resolution, description = "As it is known now"))
)]
pub(super) async fn one(
    Shared(state): Shared<App>,
    Path(name): Path<String>,
) -> Answer<Resolution> {
    let to = Destination::named(&state.config.names.suffix, &name, Some(1));
    let to = to.map_err(|e| ApiError::new(StatusCode::NOT_FOUND, "unknown-vm", e))?;
    let found = find(&state, &Caller::owner(), &to).await;
    let (host, here) = match &found {
        Found::Here(_) => (state.host().map(ToString::to_string), true),
        Found::There(host) => (Some(host.config.name.to_string()), false),
        Found::Nowhere(_) | Found::Several(_) => (None, false),
    };
    let own = state.registry.get(&to.vm).map(|vm| asked::at(&state, &vm));
    let peers = &state.peers;
    let others = peers.map().claims(&to.vm, peers.now_ms());
    let others = others.into_iter().map(|claim| VmAt {
        name: to.vm.to_string(),
        host: claim.host.to_string(),
        live: claim.live,
        generation: claim.generation,
        locked: false,
        by_map_of: None,
    });
    let mut claims: Vec<_> = own.into_iter().chain(others).collect();
    claims.sort_by(|a, b| a.host.cmp(&b.host));
    match found {
        Found::Nowhere(_) => return Err(nowhere(&state, &to, &claims)),
        Found::Here(_) | Found::There(_) | Found::Several(_) => {}
    }
    Ok(Json(Resolution {
        vm: to.vm.to_string(),
        host,
        here,
        claims,
    }))
}

/// No host that is meant and answers has the VM. Whoever asks here may see all VMs, and hears of others.
fn nowhere(state: &App, to: &Destination, claims: &[VmAt]) -> ApiError {
    let (name, vm) = (to.name(), &to.vm);
    let silent = silent(state, &Caller::owner(), to);
    if !silent.is_empty() {
        let text = format!(
            "no host that answers has a VM named `{name}`, and of {}, which may have it, there is no answer",
            listed(&silent)
        );
        return ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "silent-host", text)
            .help(remedy::of(Code::SilentHost));
    }
    let hosts: Vec<VmId> = claims
        .iter()
        .filter_map(|at| at.host.parse().ok())
        .collect();
    if to.host.is_none() || hosts.is_empty() {
        return ApiError::unknown_vm(&name);
    }
    let text = format!(
        "no VM is named `{name}`: VM `{vm}` is on {}",
        listed(&hosts)
    );
    ApiError::new(StatusCode::NOT_FOUND, "unknown-vm", text).help(&format!(
        "`adit resolve {vm}` says which host it is that the name leads to"
    ))
}

/// Why a VM of this host is not what its name leads to; none: it is.
pub(super) async fn not_ours(state: &App, vm: &VmEntry) -> Option<String> {
    // Its port is of no account.
    let to = Destination::of(vm.name.clone(), Target::Service(ServiceName::tcp(1)));
    let name = &vm.name;
    if state.registry.is_host(name) {
        return Some(vms::host_has_the_name(name));
    }
    match find(state, &Caller::owner(), &to).await {
        Found::Here(_) | Found::Nowhere(_) => None,
        Found::There(host) => {
            let host = &host.config.name;
            Some(format!(
                "host `{host}` has a VM of this name too, which its guest or its card shows to be the one that is meant: `{name}` \
                 leads there; take it off the map of one of the hosts"
            ))
        }
        Found::Several(hosts) => Some(format!(
            "the hosts {} have a VM of this name, and nothing says which is meant: `{name}` alone is refused; take it off \
             the map of one of them",
            listed(&hosts)
        )),
    }
}

/// Lists the VMs of all hosts.
#[utoipa::path(
    get,
    path = "/v1/resolve",
    params(PageQuery),
    responses((status = 200, body = AllVms, description = "Every host was asked; by name, then by host", headers(("adit-next" = String, description = "Cursor of the next page, if there is one"))))
)]
pub(super) async fn all(Shared(state): Shared<App>, Query(page): Query<PageQuery>) -> Response {
    let own = state.registry.all();
    let mut vms: Vec<VmAt> = own.iter().map(|vm| asked::at(&state, vm)).collect();
    let mut silent = Vec::new();
    let (hosts, state) = (state.peers.all(), &state);
    let answers = hosts
        .iter()
        .map(|host| async move { (host, host.ask(state, None).await) });
    for (host, answer) in join_all(answers).await {
        match answer {
            Ok(answer) => {
                let may = |vm: &VmAt| {
                    vm.name
                        .parse()
                        .is_ok_and(|name| host.config.may_claim(&name))
                };
                let claimed = answer.vms.into_iter().filter(may).map(|vm| VmAt {
                    host: host.config.name.to_string(),
                    by_map_of: None,
                    ..vm
                });
                vms.extend(claimed);
            }
            Err(e) => silent.push(Silent {
                host: host.config.name.to_string(),
                why: adit_names::escape(&e.to_string()).to_string(),
            }),
        }
    }
    let rows = state.peers.map().rows().clone();
    let own = state.host().map_or_else(String::new, ToString::to_string);
    let said = vms.iter().map(|at| (at.name.clone(), at.host.clone()));
    let said: HashSet<(String, String)> = said.collect();
    for (vm, host) in rows {
        let at = (vm.to_string(), host.to_string());
        if said.contains(&at) {
            continue;
        }
        let (name, host) = at;
        vms.push(VmAt {
            name,
            host,
            live: false,
            generation: None,
            locked: false,
            by_map_of: Some(own.clone()),
        });
    }
    vms.sort_by(|a, b| (&a.name, &a.host).cmp(&(&b.name, &b.host)));
    // Of names and hosts no character sorts before the blank, so cursors are in the order of their entries.
    let (vms, next) = page.of(&vms, |at| format!("{} {}", at.name, at.host));
    let vms = vms.to_vec();
    lists::page(&AllVms { vms, silent }, next)
}

/// Lists the hosts, as clients find their proxies.
#[utoipa::path(
    get,
    path = "/v1/hosts",
    responses((status = 200, body = Vec<HostShown>, description = "Those of the configuration, and this one if it has a listener for others"))
)]
pub(super) async fn hosts(Shared(state): Shared<App>) -> Json<Vec<HostShown>> {
    let own = state.host().and_then(|name| {
        let (address, pin) = state.door()?;
        Some(HostShown {
            name: name.to_string(),
            address: address.to_string(),
            pin,
            here: true,
        })
    });
    let others = state.peers.all();
    let others = others.iter().map(|host| HostShown {
        name: host.config.name.to_string(),
        address: host.config.address.to_string(),
        pin: host.config.pin.to_string(),
        here: false,
    });
    Json(own.into_iter().chain(others).collect())
}
