//! `GET /v1/vms/{name}/wait`: answered when the VM is ready, when it is removed, or when the time is over.

use std::time::Duration;

use adit_api::{Vm, VmState};
use axum::Json;
use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use serde::Deserialize;

use super::{Answer, ApiError, App, find, patient};

/// Longest wait for a VM.
const WAIT_MAX: Duration = Duration::from_secs(3600);

#[derive(Deserialize)]
pub(super) struct WaitQuery {
    #[serde(rename = "for")]
    condition: String,
    timeout_ms: u64,
}

pub(super) async fn wait_vm(
    Shared(state): Shared<App>,
    Path(name): Path<String>,
    Query(q): Query<WaitQuery>,
) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    if q.condition != "agent" {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "usage",
            "`for` is `agent`",
        ));
    }
    let _patient = patient(&state)?;
    let mut changes = vm.watch();
    let ready = async { while !vm.ready() && changes.changed().await.is_ok() {} };
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
            Ok(()) => Ok(Json(vm.show())),
            Err(_) => Err(late(&vm.show(), limit)),
        },
    }
}

/// Says what is known of a VM that is not ready, and what to do.
fn late(vm: &Vm, limit: Duration) -> ApiError {
    let (state, known, help) = match vm.state {
        VmState::Down => (
            "down",
            "it has no port process".to_owned(),
            "the log of its port process, RUN/vm/NAME/port.log, and that of aditd say why",
        ),
        VmState::Waiting => (
            "waiting",
            "no VMM is connected, or the guest's vsock driver does not run yet, or the VM is paused".into(),
            "`adit vm show` names the socket that the VM's vsock device must connect to",
        ),
        VmState::Up | VmState::Ready => (
            "up",
            agent(vm),
            "look in the guest: `systemctl status adit-guest`, `journalctl -u adit-guest`, or the log of its own init",
        ),
        VmState::PowerCycle => (
            "power-cycle",
            "its VMM must connect again".into(),
            "switch the VM off and on: a reboot from within is not enough",
        ),
    };
    let fault = vm.fault.as_ref();
    let fault = fault.map_or_else(String::new, |fault| format!(" ({fault})"));
    let message = format!(
        "`{}` is not ready after {limit:?}: its channel is {state}: {known}{fault}",
        vm.name
    );
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message).help(help)
}

/// What is known of an agent that is not connected.
fn agent(vm: &Vm) -> String {
    match (&vm.agent, vm.last_seen_ms) {
        (Some(version), Some(ms)) => format!(
            "its agent, adit-guest {version}, is not connected now and was last heard {}.{} s ago",
            ms / 1000,
            ms % 1000 / 100
        ),
        _ => "the guest's driver runs, and no agent has been heard since aditd was started".into(),
    }
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
