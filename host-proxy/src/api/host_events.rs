//! What happens on this host, from a cursor on.

use adit_api::HostEvent;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{ApiError, App, Asks, patient};
use crate::access::Verb;
use crate::events::Cursor;
use crate::reach::destination::shown;

/// Parts of an answer that wait for a client that reads slowly.
const PARTS_MAX: usize = 2;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct HostEventQuery {
    /// Cursor of the last event that is known; without it, all that are kept.
    #[param(pattern = "^[0-9a-f]{16}\\.(0|[1-9][0-9]{0,18})$")]
    since: Option<String>,
    /// Goes on with what happens from now on, until aditd ends.
    #[serde(default)]
    follow: bool,
}

/// What has happened on this host, and happens. A stream that is followed has no end: it is cut off.
#[utoipa::path(
    get,
    path = "/v1/host-events",
    params(HostEventQuery),
    responses((status = 200, body = HostEvent, content_type = "application/x-ndjson", description = "One a line"))
)]
pub(super) async fn follow(
    Shared(state): Shared<App>,
    Query(q): Query<HostEventQuery>,
    asks: Asks,
) -> Result<Response, ApiError> {
    let cursor = |text: String| {
        Cursor::parse(&text).ok_or_else(|| {
            let message = format!("`{}` is no cursor of an event", shown(&text));
            ApiError::new(StatusCode::BAD_REQUEST, "usage", message)
                .help("give `since` as the field `cursor` of an event has it")
        })
    };
    let mut since = q.since.map(cursor).transpose()?;
    let patient = patient(&state, &asks)?;
    let (to, from) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(PARTS_MAX);
    tokio::spawn(async move {
        let _patient = patient;
        let mut news = state.events.subscribe();
        loop {
            news.mark_unchanged();
            let (part, is_more) = state.events.after(since.as_ref());
            if let Some(last) = part.last() {
                since = Cursor::parse(&last.cursor);
                let lines = part.iter().flat_map(line).collect::<Vec<u8>>();
                if to.send(Ok(lines.into())).await.is_err() {
                    return;
                }
            }
            if is_more {
                continue;
            }
            if !q.follow {
                return;
            }
            // What let it begin may have ended meanwhile.
            if !asks.is_owner() {
                let asks = asks.again(&state).await;
                // It is written down that it may not any more, and not each time that it still may.
                if !asks.has_of_host(&state, Verb::See) {
                    let _ = asks.may_of_host(&state, Verb::See);
                    return;
                }
            }
            tokio::select! {
                // It lives as long as the state.
                _ = news.changed() => {}
                () = to.closed() => return,
                () = state.stop.cancelled() => {
                    let _ = to.send(Err(std::io::Error::other("aditd ends"))).await;
                    return;
                }
            }
        }
    });
    let body = Body::from_stream(futures_util::stream::unfold(from, |mut from| async {
        from.recv().await.map(|item| (item, from))
    }));
    Ok(([("content-type", "application/x-ndjson")], body).into_response())
}

fn line(event: &HostEvent) -> Vec<u8> {
    let mut text = serde_json::to_vec(event).unwrap_or_default();
    text.push(b'\n');
    text
}
