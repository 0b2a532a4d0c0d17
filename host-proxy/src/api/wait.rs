//! `GET /v1/vms/{name}/wait`: answered when the VM is ready or drained, when it is removed, or when the time is over.

use std::time::Duration;

use adit_api::{Vm, VmState, doctor};
use axum::Json;
use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Answer, ApiError, App, Asks, find, patient};
use crate::vm::{StillOpen, VmEntry};

/// Longest wait for a VM.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// How often a VM is looked at that is drained, and how often in a row nothing must be open: a port process says within 100 ms how many
/// streams it has.
const DRAINED_LOOK: Duration = Duration::from_millis(100);
const DRAINED_LOOKS: u32 = 5;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct WaitQuery {
    #[serde(rename = "for")]
    #[param(pattern = "^(agent|drained)$")]
    condition: String,
    /// How long at most.
    timeout_ms: u64,
}

/// Waits until a VM is ready, or until a VM that is locked has nothing open any more.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/wait",
    params(("name" = String, Path, description = "Name of the VM"), WaitQuery),
    responses((status = 200, body = Vm, description = "It is"))
)]
pub(super) async fn wait_vm(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
    Query(q): Query<WaitQuery>,
) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    let is_for_agent = match q.condition.as_str() {
        "agent" => true,
        "drained" => false,
        _ => {
            let message = "`for` is `agent` or `drained`";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "usage", message));
        }
    };
    let _patient = patient(&state, &asks)?;
    let mut changes = vm.watch();
    let ready = async {
        if is_for_agent {
            while !vm.ready() && changes.changed().await.is_ok() {}
            return Ok(());
        }
        drained(&state, &vm).await
    };
    let limit = Duration::from_millis(q.timeout_ms).min(WAIT_MAX);
    tokio::select! {
        // A VM that is being removed is not ready, whatever its agent says.
        biased;
        () = vm.removed.cancelled() => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "unknown-vm",
            format!("`{name}` was removed while somebody waited for it"),
        )
        .help("`adit vm ls` lists the names")),
        done = tokio::time::timeout(limit, ready) => match done {
            Ok(Ok(())) => Ok(Json(vm.show())),
            Ok(Err(e)) => Err(e),
            Err(_) if is_for_agent => Err(late(&vm.show(), limit)),
            Err(_) => Err(not_drained(&vm, still_open(&state, &vm).await?)),
        },
    }
}

/// Waits until nothing is open any more in a VM that is locked.
async fn drained(state: &App, vm: &VmEntry) -> Result<(), ApiError> {
    // How many streams there are is said a little later than they are: only what stays so counts.
    let mut seen = 0;
    loop {
        if !vm.lock.is_on() {
            let message = format!("`{}` is not locked: what is open there comes anew", vm.name);
            let refused = ApiError::new(StatusCode::CONFLICT, "not-locked", message);
            return Err(refused.help("lock it first: `adit vm lock`"));
        }
        seen = match still_open(state, vm).await?.is_nothing() {
            true => seen + 1,
            false => 0,
        };
        if seen == DRAINED_LOOKS {
            return Ok(());
        }
        tokio::time::sleep(DRAINED_LOOK).await;
    }
}

async fn still_open(state: &App, vm: &VmEntry) -> Result<StillOpen, ApiError> {
    Ok(StillOpen {
        tunnels: vm.tunnels(),
        requests: state.vm_shares.taken(&vm.name),
        tasks: state.desk.leased(&vm.name).await?,
    })
}

/// Says what is still open.
fn not_drained(vm: &VmEntry, open: StillOpen) -> ApiError {
    let message = format!("`{}` still has {open} open", vm.name);
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message)
        .help("it stays locked: wait on, or `adit vm unlock` opens it again")
}

/// Says what is known of a VM that is not ready, and what to do.
fn late(vm: &Vm, limit: Duration) -> ApiError {
    // Its agent may have gone as the time was over.
    let of = match vm.state {
        VmState::Ready => VmState::Up,
        state => state,
    };
    let (what, help) = doctor::missing(of).unwrap_or_default();
    let known = match of {
        VmState::Up => doctor::absent_agent(vm),
        _ => what.to_owned(),
    };
    let fault = vm.fault.as_ref();
    let fault = fault.map_or_else(String::new, |fault| format!(" ({fault})"));
    let message = format!(
        "`{}` is not ready after {limit:?}: its channel is {of}: {known}{fault}",
        vm.name
    );
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message).help(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_agent_is_not_called_one_that_does_not_run() {
        let json = r#"{"name": "a", "cid": 3, "state": "up", "agent": "0.1.0", "kernel": "6", "enrolled_as": null,
            "last_seen_ms": 12340, "epoch": 1, "streams": 0, "queued": 0, "allow": [], "allow_vsock": [],
            "port_pid": 7, "vhost_socket": "", "fault": "the stream was reset"}"#;
        let mut vm: Vm = serde_json::from_str(json).unwrap();
        let said = late(&vm, Duration::from_secs(1)).1.message;
        for known in ["0.1.0", "12.3 s ago", "up", "the stream was reset"] {
            assert!(said.contains(known), "{said}");
        }
        vm.agent = None;
        let said = late(&vm, Duration::from_secs(1)).1.message;
        assert!(said.contains("no agent has been heard"), "{said}");
    }
}
