//! HTTP/1.1 to `aditd` over its Unix socket, one connection a request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_api::ErrorBody;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Failure;

/// Most bytes of one answer that is read whole.
const ANSWER_MAX: usize = 64 << 20;

/// Most elements of a list's page.
const PAGE: usize = 500;

/// How long aditd may take to answer if nobody says otherwise.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// Where aditd listens.
pub struct Client {
    socket: PathBuf,
    limit: Duration,
}

impl Client {
    /// `limit`: how long aditd may take to answer.
    pub fn new(socket: &Path, limit: Duration) -> Self {
        Self {
            socket: socket.to_owned(),
            limit,
        }
    }

    /// For a request that aditd answers only after this long.
    pub fn patient(&self, wait: Duration) -> Self {
        Self {
            socket: self.socket.clone(),
            limit: self.limit.saturating_add(wait),
        }
    }

    /// How long aditd may take to answer.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// GETs JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        decode(&self.whole(Method::GET, path, None).await?.body)
    }

    /// GETs the newest elements of a list, at most this many (none: all), the newest last; and whether there are more.
    /// `path` has a query.
    pub async fn newest<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: Option<usize>,
    ) -> Result<(Vec<T>, bool), Failure> {
        let (mut pages, mut got, mut before) = (Vec::new(), 0, String::new());
        let mut last = u64::MAX;
        let earlier = loop {
            let wanted = limit.map_or(PAGE, |limit| (limit - got).min(PAGE));
            let path = format!("{path}&newest={wanted}{before}");
            let answer = self.whole(Method::GET, &path, None).await?;
            let page: Vec<T> = decode(&answer.body)?;
            got += page.len();
            pages.push(page);
            let done = limit.is_some_and(|limit| got >= limit);
            match answer.number(adit_api::EARLIER) {
                Some(_) if done => break true,
                // Or the list has no end.
                Some(cursor) if cursor < last => last = cursor,
                Some(_) => {
                    let message = "the pages of aditd's list do not go on";
                    return Err(Failure::new("bad-answer", message));
                }
                None => break false,
            }
            before = format!("&before={last}");
        };
        let mut all: Vec<T> = pages.into_iter().rev().flatten().collect();
        // An aditd of before does not know `newest`, and has said all at once.
        let surplus = all.len().saturating_sub(limit.unwrap_or(usize::MAX));
        all.drain(..surplus);
        Ok((all, earlier || surplus > 0))
    }

    /// GETs raw bytes, with the value of a header field.
    pub async fn get_bytes(
        &self,
        path: &str,
        field: &str,
    ) -> Result<(Bytes, Option<String>), Failure> {
        let answer = self.whole(Method::GET, path, None).await?;
        let value = answer.head.get(field).and_then(|v| v.to_str().ok());
        let value = value.map(str::to_owned);
        Ok((answer.body, value))
    }

    /// POSTs JSON and reads JSON.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        self.exchange(Method::POST, path, body).await
    }

    /// PATCHes with JSON and reads JSON.
    pub async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        self.exchange(Method::PATCH, path, body).await
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let body = serde_json::to_vec(body).map_err(|e| Failure::new("internal", e.to_string()))?;
        decode(&self.whole(method, path, Some(body)).await?.body)
    }

    /// DELETEs.
    pub async fn delete(&self, path: &str) -> Result<(), Failure> {
        self.whole(Method::DELETE, path, None).await.map(drop)
    }

    /// GETs a body that comes bit by bit.
    pub async fn stream(&self, path: &str) -> Result<Lines, Failure> {
        let answer = self.in_time(self.send(Method::GET, path, None)).await?;
        Ok(Lines {
            body: answer.into_body(),
            buffer: Vec::new(),
            searched: 0,
        })
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let limit = self.limit;
        let late = |_| {
            Failure::new(
                "unreachable",
                format!("aditd takes connections, but has not answered for {limit:?}"),
            )
            .help("it may still do what was asked; look at `systemctl status aditd` and `journalctl -u aditd`, or give it longer with --request-timeout")
        };
        tokio::time::timeout(self.limit, answer)
            .await
            .map_err(late)?
    }

    async fn whole(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Answer, Failure> {
        self.in_time(async {
            let (head, body) = self.send(method, path, body).await?.into_parts();
            let body = Limited::new(body, ANSWER_MAX).collect().await;
            let body = body
                .map_err(|e| Failure::new("cut-off", format!("aditd's answer was cut off: {e}")))?
                .to_bytes();
            let head = head.headers;
            Ok(Answer { head, body })
        })
        .await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = tokio::net::UnixStream::connect(&self.socket)
            .await
            .map_err(|e| self.unreachable(&e))?;
        let broken =
            |e: hyper::Error| Failure::new("cut-off", format!("aditd did not answer: {e}"));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "aditd")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|e| {
                Failure::new(
                    "usage",
                    format!("`{path}` cannot be the path of a request: {e}"),
                )
            })?;
        let answer = sender.send_request(request).await.map_err(broken)?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
        let body = body.map(|b| b.to_bytes()).unwrap_or_default();
        Err(match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(e) => {
                let code = if status == 408 {
                    "timeout"
                } else {
                    e.code.as_str()
                };
                Failure::new(code, e.message).help(e.help)
            }
            Err(_) => Failure::new("http", format!("aditd answered {status}")),
        })
    }

    fn unreachable(&self, e: &io::Error) -> Failure {
        let socket = self.socket.display();
        let help = match e.kind() {
            io::ErrorKind::NotFound => {
                "start it with `aditd run` (or `systemctl start aditd`), or name its socket with --socket or ADIT_SOCKET"
            }
            io::ErrorKind::ConnectionRefused => {
                "the socket is left over from an aditd that ended: start it again with `aditd run`"
            }
            io::ErrorKind::PermissionDenied => {
                "only the user that aditd runs as may use its socket (mode 0600): try it as root"
            }
            _ => "check that aditd runs",
        };
        let mut failure = Failure::new(
            "unreachable",
            format!("cannot reach aditd at {socket}: {e}"),
        );
        failure.passing = e.kind() != io::ErrorKind::PermissionDenied;
        failure.help(help)
    }
}

/// A whole answer.
struct Answer {
    head: HeaderMap,
    body: Bytes,
}

impl Answer {
    /// A header field that is a number.
    fn number(&self, field: &str) -> Option<u64> {
        self.head.get(field)?.to_str().ok()?.parse().ok()
    }
}

/// A body read line by line.
pub struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
    /// Bytes of it that hold no end of a line.
    searched: usize,
}

impl Lines {
    /// Returns the next line as JSON, or `None` at the end, which says nothing of why it ends.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        loop {
            let rest = &self.buffer[self.searched..];
            if let Some(end) = rest.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                return decode(&line).map(Some);
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > ANSWER_MAX {
                return Err(Failure::new("cut-off", "aditd sent a line without end"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => self
                    .buffer
                    .extend_from_slice(frame.data_ref().map_or(&[][..], |d| d)),
                Some(Err(e)) => {
                    return Err(Failure::new("cut-off", format!("aditd went away: {e}"))
                        .help("what was accepted is on its disk: run the command again"));
                }
            }
        }
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|e| {
        Failure::new(
            "bad-answer",
            format!(
                "aditd's answer is not understood: {}",
                adit_tasks::plain(&e.to_string())
            ),
        )
        .help(
            "adit and aditd should be of one version: compare `adit version` and `aditd --version`",
        )
    })
}
