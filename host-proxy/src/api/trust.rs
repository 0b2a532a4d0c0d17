//! What the API is asked of trust documents. They are kept and passed on here; whether one is true is each guest's to check.

use std::sync::Arc;

use adit_api::{KeptTrust, NewTrust};
use adit_names::VmId;
use adit_tasks::KeyId;
use adit_tasks::dsse::{Envelope, Type};
use adit_tasks::trust::Document;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::lists::{self, PageQuery};
use super::{Answer, ApiError, App, find, parse};
use crate::desk::rfc3339;
use crate::desk::store::trust;
use crate::state::State;
use crate::vm::VmEntry;

fn bad(e: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "bad-trust", e.to_string())
}

/// Keeps a document, and gives it to the VMs whose agents are connected.
#[utoipa::path(
    post,
    path = "/v1/trust",
    request_body = NewTrust,
    responses((status = 200, body = KeptTrust, description = "It is on disk"))
)]
pub(super) async fn apply(Shared(state): Shared<App>, body: Bytes) -> Answer<KeptTrust> {
    let new: NewTrust = parse(&body)?;
    let envelope = Envelope::parse_as(Type::Trust, new.envelope.as_bytes()).map_err(|e| bad(&e))?;
    let said = Document::parse(envelope.unverified_payload()).map_err(|e| bad(&e))?;
    if state.now_ms() > said.not_after.as_millisecond() {
        let text = format!(
            "the trust document was to be taken until {}",
            said.not_after
        );
        let refused = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "expired", text);
        return Err(refused.help("sign the next one: `adit trust change`"));
    }
    let signer = envelope
        .unverified_signer()
        .ok_or_else(|| bad(&"no signer"))?;
    let vms = targets(&state, &new, said.vm_id.as_ref())?;
    let document = trust::Document {
        signer: signer.0,
        own: said.vm_id.is_some(),
        sequence: said.sequence,
        envelope: new.envelope.into_bytes(),
    };
    let names: Vec<VmId> = vms.iter().map(|vm| vm.name.clone()).collect();
    state.desk.keep_trust(document, names.clone()).await?;
    let now = match names.is_empty() {
        true => state.registry.all(),
        false => vms,
    };
    for vm in now {
        vm.trusted.notify_waiters();
    }
    Ok(Json(KeptTrust {
        signer: signer.to_string(),
        own: said.vm_id.is_some(),
        sequence: said.sequence,
        vms: names.iter().map(VmId::to_string).collect(),
        given_at: rfc3339(state.now_ms()),
    }))
}

/// The VMs that it is kept for; none: all.
fn targets(
    state: &State,
    new: &NewTrust,
    own: Option<&VmId>,
) -> Result<Vec<Arc<VmEntry>>, ApiError> {
    if let Some(vm) = own
        && let Some(other) = new.to.iter().find(|name| *name != vm.as_str())
    {
        let message = format!("the trust document is for `{vm}`, and not for `{other}`");
        let code = StatusCode::UNPROCESSABLE_ENTITY;
        return Err(ApiError::new(code, "wrong-audience", message)
            .help("sign one for all: `adit trust change` without --for"));
    }
    let own = own.map(VmId::to_string);
    let names = if new.to.is_empty() {
        own.into_iter().collect()
    } else {
        new.to.clone()
    };
    names.iter().map(|name| find(state, name)).collect()
}

/// Lists trust documents.
#[utoipa::path(
    get,
    path = "/v1/trust",
    params(PageQuery),
    responses((status = 200, body = Vec<KeptTrust>, description = "By VM and signer", headers(("adit-next" = String, description = "Cursor of the next page, if there is one"))))
)]
pub(super) async fn list(
    Shared(state): Shared<App>,
    Query(page): Query<PageQuery>,
) -> Result<Response, ApiError> {
    let rows = state.desk.trusts().await?;
    // Sorts as the rows are: `!` is below whatever a name has.
    let (page, next) = page.of(&rows, |row| {
        let own = u8::from(row.own);
        format!("{}!{}!{own}", row.vm, KeyId(row.signer))
    });
    let shown = page.iter().map(|row| KeptTrust {
        signer: KeyId(row.signer).to_string(),
        own: row.own,
        sequence: row.sequence,
        vms: Some(row.vm.clone())
            .filter(|vm| !vm.is_empty())
            .into_iter()
            .collect(),
        given_at: rfc3339(row.given_ms),
    });
    let shown: Vec<_> = shown.collect();
    Ok(lists::page(&shown, next))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ForgetQuery {
    vm: Option<String>,
}

/// Forgets the trust documents of a signer.
#[utoipa::path(
    delete,
    path = "/v1/trust/{signer}",
    params(("signer" = String, Path, description = "Id of the key, 32 hex digits"), ForgetQuery),
    responses((status = 204, description = "It is passed on no more"))
)]
pub(super) async fn forget(
    Shared(state): Shared<App>,
    Path(signer): Path<String>,
    Query(q): Query<ForgetQuery>,
) -> Result<StatusCode, ApiError> {
    let signer: KeyId = signer.parse().map_err(|e| bad(&e))?;
    let vm = match q.vm {
        Some(name) => Some(find(&state, &name)?.name.clone()),
        None => None,
    };
    state.desk.forget_trust(signer.0, vm).await?;
    Ok(StatusCode::NO_CONTENT)
}
