//! What another host is asked of goals and tasks of its VMs, for a caller of this one: endpoints of its API, over the same connection as
//! questions and tunnels. Both what is sent and what is read are bounded, in bytes and in time.

use std::sync::Arc;
use std::time::Duration;

use adit_api::ErrorBody;
use bytes::Bytes;
use h2::RecvStream;
use hyper::header::{CONTENT_TYPE, HeaderMap};
use hyper::{Method, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::Host;
use super::line::{Coming, NoLine, collected, says_who};
use super::lines::{Rest, Slot};
use crate::access::Caller;
use crate::state::State;

/// How long a host may take to say what it has.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to write a goal down.
const WRITE_LIMIT: Duration = Duration::from_secs(15);
/// Bytes of an answer at most: the tasks of the largest goals that a host's own limits let it queue at once.
const ANSWER_MAX: usize = 8 << 20;

/// Why a host has done nothing.
#[derive(Debug, thiserror::Error)]
pub enum NotDone {
    /// It does not answer.
    #[error("{0}")]
    Silent(NoLine),
    /// It is of a version that knows nothing of goals by way of other hosts.
    #[error(
        "its aditd is of a version before, which takes no questions about goals from other hosts"
    )]
    Before,
    /// It has refused.
    #[error("{}", said.message)]
    Refused {
        /// Its status.
        status: StatusCode,
        /// Its words.
        said: ErrorBody,
    },
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    /// Header fields.
    pub head: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// It is no such value.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, NotDone> {
        let parsed = serde_json::from_slice(&self.body);
        parsed.map_err(|_| NotDone::Silent(NoLine::Answer("what it says makes no sense".into())))
    }
}

impl Host {
    /// Asks an endpoint of its API. `body`: what is given to it; none: it is asked what it has.
    ///
    /// # Errors
    /// It does not answer, or refuses.
    pub async fn exchange(
        self: &Arc<Self>,
        state: &State,
        caller: &Caller,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Answer, NotDone> {
        let limit = match body {
            None => LOOK_LIMIT,
            Some(_) => WRITE_LIMIT,
        };
        let asked = async {
            // It is never closed.
            let _question = state.peers.questions.acquire().await.ok();
            let (answer, slot) = self.ask_api(state, caller, path, body).await?;
            let head = answer.headers().clone();
            let body = collected(answer.into_body(), ANSWER_MAX, &slot).await;
            let body = body.map_err(NotDone::Silent)?.into();
            Ok(Answer { head, body })
        };
        let late = |_| NotDone::Silent(NoLine::Slow);
        timeout(limit, asked).await.map_err(late)?
    }

    /// The same for an answer that comes bit by bit.
    ///
    /// # Errors
    /// As above.
    pub async fn stream(
        self: &Arc<Self>,
        state: &State,
        caller: &Caller,
        path: &str,
    ) -> Result<Coming, NotDone> {
        let asked = self.ask_api(state, caller, path, None);
        let late = |_| NotDone::Silent(NoLine::Slow);
        let (answer, slot) = timeout(LOOK_LIMIT, asked).await.map_err(late)??;
        Ok(Coming::new(answer.into_body(), slot))
    }

    /// The head of its answer, if it has done what was asked.
    async fn ask_api(
        self: &Arc<Self>,
        state: &State,
        caller: &Caller,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<(Response<RecvStream>, Slot), NotDone> {
        let wrong = |e: String| NotDone::Silent(NoLine::Answer(e));
        let method = match body {
            None => Method::GET,
            Some(_) => Method::POST,
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("https://{}{path}", self.config.name))
            .header(CONTENT_TYPE, "application/json")
            .body(());
        let mut request = request.map_err(|e| wrong(e.to_string()))?;
        let said = says_who(request.headers_mut(), caller);
        said.map_err(|e| wrong(e.to_string()))?;
        let rest = Rest::Whole(body.unwrap_or_default());
        let sent = self.send(state, request, rest).await;
        let ((answer, _), slot) = sent.map_err(NotDone::Silent)?;
        let status = answer.status();
        if status.is_success() {
            return Ok((answer, slot));
        }
        let is_json = answer
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|kind| kind == "application/json");
        let body = collected(answer.into_body(), ANSWER_MAX, &slot).await;
        let body = body.map_err(|e| wrong(e.to_string()))?;
        match serde_json::from_slice(&body) {
            Ok(said) if is_json => Err(NotDone::Refused { status, said }),
            // As it answers what it does not know.
            _ if status == StatusCode::NOT_FOUND => Err(NotDone::Before),
            _ => Err(wrong(format!("it answers with status {status}"))),
        }
    }
}
