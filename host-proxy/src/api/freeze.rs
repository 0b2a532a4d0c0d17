//! `POST` and `DELETE /v1/vms/{name}/freeze`: the guest's file systems stand still for a while, so that its disks can be saved.

use std::time::Duration;

use adit_api::{Frozen, NewFreeze};
use adit_channel::frame;
use adit_channel::refusal::{Code, Refusal};
use adit_tasks::freeze::{
    ANSWER, Answer as Said, Asked, BODY_MAX, LEASE_MS, NAMED_MAX, SERVICE, VERSION,
};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State as Shared};
use axum::http::StatusCode;
use tokio::time::timeout;

use super::{Answer, ApiError, App, Asks, find, parse};
use crate::blobs::dial;

/// How long a guest may take: its hooks before and after, and all file systems.
const LIMIT: Duration = Duration::from_secs(100);
/// Most characters of a path that is shown.
const PATH_MAX: usize = 200;

/// Freezes a VM's file systems, or has them stay so for longer.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/freeze",
    params(("name" = String, Path, description = "Name of the VM")),
    request_body = NewFreeze,
    responses((status = 200, body = Frozen, description = "They stand still, and go on by themselves when the time is over"))
)]
pub(super) async fn freeze(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer<Frozen> {
    let NewFreeze { lease_ms } = parse(&body)?;
    if !LEASE_MS.contains(&lease_ms) {
        let (least, most) = (LEASE_MS.start() / 1000, LEASE_MS.end() / 1000);
        let text = format!("`lease_ms`: from {least} s to {most} s");
        return Err(ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "usage",
            text,
        ));
    }
    ask(&state, &asks, &name, Asked::Freeze(lease_ms)).await
}

/// Has a VM's file systems go on.
#[utoipa::path(
    delete,
    path = "/v1/vms/{name}/freeze",
    params(("name" = String, Path, description = "Name of the VM")),
    responses((status = 200, body = Frozen, description = "They do"))
)]
pub(super) async fn thaw(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
) -> Answer<Frozen> {
    ask(&state, &asks, &name, Asked::Thaw).await
}

/// Says what stands still.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/freeze",
    params(("name" = String, Path, description = "Name of the VM")),
    responses((status = 200, body = Frozen, description = "What stands still now"))
)]
pub(super) async fn show(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
) -> Answer<Frozen> {
    ask(&state, &asks, &name, Asked::Show).await
}

async fn ask(state: &App, asks: &Asks, name: &str, asked: Asked) -> Answer<Frozen> {
    let vm = find(state, name)?;
    let said = async {
        let mut stream = dial(state, &vm, SERVICE, asked.encode()).await?;
        let broken = |why: String| {
            let text = format!("VM `{}`: the stream ended before an answer: {why}", vm.name);
            Refusal::new(Code::Reset, text)
        };
        let next = frame::read_async(&mut stream, BODY_MAX).await;
        let next = next.map_err(|e| broken(e.to_string()))?;
        let (header, body) = next.ok_or_else(|| broken("nothing was said".into()))?;
        if (header.kind, header.version) != (ANSWER, VERSION.into()) {
            return Err(broken("it is none".into()));
        }
        header.decode(&body).map_err(|e| broken(e.to_string()))
    };
    let said: Said = match timeout(LIMIT, said).await {
        Ok(said) => said?,
        Err(_) => {
            let text = format!("VM `{}`: no answer within {LIMIT:?}", vm.name);
            return Err(Refusal::new(Code::NoAnswer, text).into());
        }
    };
    match said {
        Said::State {
            frozen,
            count,
            left_ms,
        } => {
            let named = u32::try_from(frozen.len()).unwrap_or(u32::MAX);
            if count < named || matches!(asked, Asked::Freeze(_)) && count == 0 {
                let text = format!("VM `{}`: its agent says what cannot be", vm.name);
                return Err(Refusal::new(Code::Foreign, text).into());
            }
            match asked {
                Asked::Freeze(_) => asks.did(state, name, "freeze"),
                Asked::Thaw => asks.did(state, name, "thaw"),
                Asked::Show => {}
            }
            let shown = |path: &String| adit_names::escape(path).at_most(PATH_MAX).to_string();
            Ok(Json(Frozen {
                file_systems: frozen.iter().take(NAMED_MAX).map(shown).collect(),
                count,
                left_ms,
            }))
        }
        Said::Refused(why) => {
            let why = adit_names::escape(&why).at_most(400).to_string();
            let text = format!("VM `{}`: {why}", vm.name);
            let refused = ApiError::new(StatusCode::CONFLICT, "not-frozen", text);
            Err(refused.help("nothing in it stands still; see its journal"))
        }
    }
}
