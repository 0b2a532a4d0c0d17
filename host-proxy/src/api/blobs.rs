//! What the API is asked of files for VMs: they come in pieces, one a request, so that each request is short, and what was cut off
//! goes on where it ended.

use adit_api::{AgentAnswer, AgentOrder, Blob, Transfer};
use adit_blob::{Begun, BlobError, Digest, Present};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Answer, ApiError, App, Asks, find, parse, patient};
use crate::blobs;

// A piece fits into a request.
const _: () = assert!(adit_api::PIECE_MAX <= super::BODY_MAX);

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Piece {
    size: u64,
    from: u64,
}

fn digest_of(text: &str) -> Result<Digest, ApiError> {
    text.parse().map_err(|e| {
        let text = adit_names::escape(text).at_most(80);
        ApiError::new(StatusCode::BAD_REQUEST, "usage", format!("`{text}`: {e}"))
    })
}

/// Does something with the disk, on a thread that nobody waits for but whoever asks.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    let failed = |e| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", e);
    Ok(done.map_err(failed)??)
}

/// Shows a file.
#[utoipa::path(
    get,
    path = "/v1/blobs/{digest}",
    params(("digest" = String, Path, description = "sha256 of the file, 64 hex digits")),
    responses((status = 200, body = Blob, description = "How much of it is here"))
)]
pub(super) async fn show(Shared(state): Shared<App>, Path(digest): Path<String>) -> Answer<Blob> {
    let digest = digest_of(&digest)?;
    let store = state.blobs.store.clone();
    let present = on_disk(move || Ok(store.present(&digest)?)).await?;
    let (bytes, size) = match present {
        Present::Nothing => (0, None),
        Present::Part { bytes, size } => (bytes, Some(size)),
        Present::Whole { size } => (size, Some(size)),
    };
    Ok(Json(Blob {
        sha256: digest.to_string(),
        bytes,
        size,
        whole: matches!(present, Present::Whole { .. }),
    }))
}

/// Takes the next bytes of a file.
#[utoipa::path(
    put,
    path = "/v1/blobs/{digest}",
    params(("digest" = String, Path, description = "sha256 of the file, 64 hex digits"), Piece),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = Blob, description = "Where to go on"))
)]
pub(super) async fn put(
    Shared(state): Shared<App>,
    Path(digest): Path<String>,
    Query(Piece { size, from }): Query<Piece>,
    piece: Bytes,
) -> Answer<Blob> {
    let digest = digest_of(&digest)?;
    let store = state.blobs.store.clone();
    let written = on_disk(move || {
        let mut writing = match store.begin(digest, size)? {
            Begun::Whole(_) => return Ok(None),
            Begun::Writing(writing) => writing,
        };
        if writing.at() == from {
            writing.write(&piece)?;
        }
        match writing.missing() {
            0 => writing.finish().map(|()| None),
            _ => Ok(Some(writing.at())),
        }
    });
    let at = written.await?;
    Ok(Json(Blob {
        sha256: digest.to_string(),
        bytes: at.unwrap_or(size),
        size: Some(size),
        whole: at.is_none(),
    }))
}

/// Has a file sent to a guest.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/blobs/{digest}",
    params(("name" = String, Path, description = "Name of the VM"), ("digest" = String, Path, description = "sha256 of the file, 64 hex digits")),
    responses((status = 200, body = Transfer, description = "How far it is"))
)]
pub(super) async fn send(
    Shared(state): Shared<App>,
    Path((name, digest)): Path<(String, String)>,
) -> Answer<Transfer> {
    let (vm, digest) = (find(&state, &name)?, digest_of(&digest)?);
    Ok(Json(blobs::send(&state, &vm, digest).await?))
}

/// Has a guest's agent become a program that it was sent.
#[utoipa::path(
    post,
    path = "/v1/vms/{name}/agent",
    params(("name" = String, Path, description = "Name of the VM")),
    request_body = AgentOrder,
    responses((status = 200, body = AgentAnswer, description = "The guest has taken the order"))
)]
pub(super) async fn order(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer<AgentAnswer> {
    let vm = find(&state, &name)?;
    let AgentOrder { envelope } = parse(&body)?;
    let _patient = patient(&state, &asks)?;
    let said = blobs::order(&state, &vm, envelope.into_bytes()).await?;
    if !said.refused.is_empty() {
        // Words of the guest: what it calls it must not be taken for one of aditd's.
        let is_word = said
            .refused
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b == b'-');
        let code = match said.refused.get(..32).unwrap_or(&said.refused) {
            word if is_word && !word.starts_with("unknown-") => word,
            _ => "agent-refused",
        };
        let text = adit_names::escape(&said.text).at_most(1024);
        let text = format!("VM `{}` refuses the agent: {text}", vm.name);
        return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code, text));
    }
    if !said.already {
        vm.agent.ordered();
    }
    Ok(Json(AgentAnswer {
        already: said.already,
        waits: said.waits,
    }))
}
