//! `POST` and `DELETE /v1/vms/{name}/lock`: whether anything new goes to a VM. What is there goes on.

use adit_api::{HostEventKind, LOCK_REASON_MAX, NewLock, Vm};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State as Shared};
use axum::http::StatusCode;

use super::{Answer, ApiError, App, Asks, find, parse};
use crate::vm::Locked;

/// Locks a VM.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/lock",
    params(("name" = String, Path, description = "Name of the VM")),
    request_body = NewLock,
    responses((status = 200, body = Vm, description = "Nothing new goes there"))
)]
pub(super) async fn lock(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    let NewLock { reason } = parse(&body)?;
    check(&reason)?;
    let by = asks.who(&state).await;
    let _changing = vm.changing.lock().await;
    if vm.removed.is_cancelled() {
        return Err(ApiError::unknown_vm(&name));
    }
    let before = vm.lock.locked();
    let since_ms = before.map_or_else(|| state.now_ms(), |before| before.since_ms);
    let locked = Locked {
        reason,
        by,
        since_ms,
    };
    let told = match locked.reason.as_str() {
        "" => format!("by {}", locked.by),
        reason => format!("by {}: {reason}", locked.by),
    };
    state.desk.lock_vm(&vm, locked).await?;
    // What waits for the next request of a client waits for what will not come.
    state.pool.clear();
    asks.did(&state, name.as_str(), "lock");
    let events = &state.events;
    events.note(HostEventKind::VmLocked, Some(vm.name.as_str()), &told);
    tracing::info!(vm = %vm.name, told, "locked");
    Ok(Json(vm.show()))
}

/// Opens a VM again.
#[utoipa::path(
    delete,
    path = "/v1/vms/{name}/lock",
    params(("name" = String, Path, description = "Name of the VM")),
    responses((status = 204, description = "It is open"))
)]
pub(super) async fn unlock(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    let vm = find(&state, &name)?;
    let by = asks.who(&state).await;
    let _changing = vm.changing.lock().await;
    if state.desk.unlock_vm(&vm).await? {
        asks.did(&state, name.as_str(), "unlock");
        let (events, told) = (&state.events, format!("by {by}"));
        events.note(HostEventKind::VmUnlocked, Some(vm.name.as_str()), &told);
        tracing::info!(vm = %vm.name, told, "unlocked");
    }
    Ok(StatusCode::NO_CONTENT)
}

/// A reason is shown on one line, to everybody who is refused.
fn check(reason: &str) -> Result<(), ApiError> {
    let why = match reason.chars().count() {
        _ if reason.chars().any(char::is_control) => "it has a control character".to_owned(),
        n if n > LOCK_REASON_MAX => {
            format!("it has {n} characters, and may have {LOCK_REASON_MAX}")
        }
        _ => return Ok(()),
    };
    let message = format!("`reason`: {why}");
    let refused = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "bad-lock", message);
    Err(refused.help("say why in one short line"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_short_line() {
        let long = "ü".repeat(LOCK_REASON_MAX);
        for reason in ["", "a new kernel", &long] {
            assert!(check(reason).is_ok());
        }
        for reason in ["a\nb", "\u{1b}[2J", "\u{9b}2J", &(long + "x")] {
            assert!(check(reason).is_err());
        }
    }
}
