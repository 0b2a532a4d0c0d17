//! The client of aditd's API (`adit_api` has the endpoints): HTTP/1.1 over its Unix socket, or with the feature `tls` to another host
//! ([`server`]), one connection a request. The
//! command line, a VMM that registers its VM, and the tests use it.
//!
//! [`Client`] is for async tasks, [`blocking::Client`] for threads.
#![forbid(unsafe_code)]

pub mod blocking;
mod error;
mod lines;
#[cfg(feature = "tls")]
pub mod server;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

pub use error::ClientError;
pub use hyper::upgrade::Upgraded;
pub use hyper::{HeaderMap, Method};
pub use lines::Lines;

/// Most bytes of one answer that is read whole.
const ANSWER_MAX: usize = 64 << 20;
/// Most elements of a list's page.
const PAGE: usize = 500;

/// Where aditd listens, and how long it may take to answer.
#[derive(Clone, Debug)]
pub struct Client {
    to: To,
    limit: Duration,
}

/// Where.
#[derive(Clone, Debug)]
enum To {
    Socket(PathBuf),
    #[cfg(feature = "tls")]
    Server(server::Server),
}

/// An answer, read whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header fields.
    pub head: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Client {
    /// `limit`: how long aditd may take to answer.
    pub fn new(socket: &Path, limit: Duration) -> Self {
        Self {
            to: To::Socket(socket.to_owned()),
            limit,
        }
    }

    /// An aditd on another host.
    #[cfg(feature = "tls")]
    pub fn of_server(server: server::Server, limit: Duration) -> Self {
        Self {
            to: To::Server(server),
            limit,
        }
    }

    /// For a request that aditd answers only after this long.
    pub fn patient(&self, wait: Duration) -> Self {
        Self {
            to: self.to.clone(),
            limit: self.limit.saturating_add(wait),
        }
    }

    /// How long aditd may take to answer.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// GETs JSON.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.whole(Method::GET, path, None).await?.json()
    }

    /// GETs the newest elements of a list, at most this many (none: all), the newest last; and whether there are more.
    /// `path` has a query.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn newest<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: Option<usize>,
    ) -> Result<(Vec<T>, bool), ClientError> {
        let (mut pages, mut got, mut before) = (Vec::new(), 0, String::new());
        let mut last = u64::MAX;
        let earlier = loop {
            let wanted = limit.map_or(PAGE, |limit| (limit - got).min(PAGE));
            let path = format!("{path}&newest={wanted}{before}");
            let answer = self.whole(Method::GET, &path, None).await?;
            let page: Vec<T> = answer.json()?;
            got += page.len();
            pages.push(page);
            let done = limit.is_some_and(|limit| got >= limit);
            match answer.number(adit_api::EARLIER) {
                Some(_) if done => break true,
                // Or the list has no end.
                Some(cursor) if cursor < last => last = cursor,
                Some(_) => return Err(ClientError::Pages),
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
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn get_bytes(
        &self,
        path: &str,
        field: &str,
    ) -> Result<(Bytes, Option<String>), ClientError> {
        let answer = self.whole(Method::GET, path, None).await?;
        let value = answer.field(field).map(str::to_owned);
        Ok((answer.body, value))
    }

    /// POSTs JSON and reads JSON.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.exchange(Method::POST, path, body).await
    }

    /// PATCHes with JSON and reads JSON.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.exchange(Method::PATCH, path, body).await
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Body)?;
        self.whole(method, path, Some(body)).await?.json()
    }

    /// DELETEs.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.whole(Method::DELETE, path, None).await.map(drop)
    }

    /// GETs a body that comes bit by bit.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn stream(&self, path: &str) -> Result<Lines, ClientError> {
        let answer = self.in_time(self.send(Method::GET, path, None)).await?;
        if answer.status().is_success() {
            return Ok(Lines::new(answer.into_body()));
        }
        let refused = self.in_time(Answer::read(answer)).await?.accepted();
        Err(refused.map_or_else(|e| e, |answer| ClientError::Status(answer.status)))
    }

    /// POSTs for a connection that becomes a stream of that protocol.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub async fn upgrade(
        &self,
        path: &str,
        protocol: &str,
    ) -> Result<TokioIo<Upgraded>, ClientError> {
        self.in_time(async {
            let answer = self
                .send_as(Method::POST, path, None, Some(protocol))
                .await?;
            if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                let refused = Answer::read(answer).await?.accepted();
                return Err(refused.map_or_else(|e| e, |answer| ClientError::Status(answer.status)));
            }
            let upgraded = hyper::upgrade::on(answer).await;
            upgraded.map(TokioIo::new).map_err(ClientError::NoAnswer)
        })
        .await
    }

    /// Makes a request, and returns the answer whatever its status is.
    ///
    /// # Errors
    /// There is no whole answer.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Answer, ClientError> {
        self.in_time(async { Answer::read(self.send(method, path, body).await?).await })
            .await
    }

    async fn whole(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Answer, ClientError> {
        self.request(method, path, body).await?.accepted()
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        let late = |_| ClientError::Late { limit: self.limit };
        tokio::time::timeout(self.limit, answer)
            .await
            .map_err(late)?
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, ClientError> {
        self.send_as(method, path, body, None).await
    }

    async fn send_as(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        protocol: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "aditd")
            .header(CONTENT_TYPE, "application/json");
        if let Some(protocol) = protocol {
            request = request
                .header(CONNECTION, "upgrade")
                .header(UPGRADE, protocol);
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|source| ClientError::Path {
                path: path.to_owned(),
                source,
            })?;
        match &self.to {
            To::Socket(socket) => {
                let stream = UnixStream::connect(socket).await;
                let stream = stream.map_err(|source| ClientError::Unreachable {
                    socket: socket.clone(),
                    source,
                })?;
                exchange(stream, request).await
            }
            #[cfg(feature = "tls")]
            To::Server(server) => {
                let mut request = request;
                let head = request.headers_mut();
                if let Ok(host) = server.authority().parse() {
                    head.insert(HOST, host);
                }
                if let Some(token) = server.token() {
                    head.insert(hyper::header::AUTHORIZATION, token.clone());
                }
                exchange(server.connect().await?, request).await
            }
        }
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, ClientError> {
    let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = shaken.map_err(ClientError::NoAnswer)?;
    tokio::spawn(connection.with_upgrades());
    let answer = sender.send_request(request).await;
    answer.map_err(ClientError::NoAnswer)
}

impl Answer {
    async fn read(answer: Response<Incoming>) -> Result<Self, ClientError> {
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER_MAX).collect().await;
        Ok(Self {
            status: head.status.as_u16(),
            head: head.headers,
            body: body.map_err(ClientError::CutOff)?.to_bytes(),
        })
    }

    /// Returns it if aditd did what was asked.
    ///
    /// # Errors
    /// aditd refused; the error says what it said.
    pub fn accepted(self) -> Result<Self, ClientError> {
        if matches!(self.status, 200..=299) {
            return Ok(self);
        }
        let status = self.status;
        Err(match serde_json::from_slice(&self.body) {
            Ok(said) => ClientError::Refused { status, said },
            // Every refusal of the proxy has it, and no answer of the API.
            Err(_) if self.head.contains_key("proxy-status") => ClientError::Proxy,
            Err(_) => ClientError::Status(status),
        })
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// It is no such value.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.body).map_err(ClientError::Answer)
    }

    /// A header field.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.head.get(name)?.to_str().ok()
    }

    fn number(&self, field: &str) -> Option<u64> {
        self.field(field)?.parse().ok()
    }
}
