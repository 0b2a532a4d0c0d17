//! Answers into a stream: interim ones, the head, and the body as fast as the client takes it.

use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use hyper::header::{CONTENT_LENGTH, DATE, HeaderMap, HeaderValue, TE};
use hyper::{Response, StatusCode};
use tokio::time::timeout;

use super::OF_A_CONNECTION;
use super::meter::Meter;
use crate::proxy::client::TAKE_LIMIT;
use crate::proxy::fields::Hop;
use crate::proxy::own;
use crate::proxy::problem::Body;

/// Bytes of interim answers into a stream at most; what is more is left out.
const INTERIM_MAX: usize = 32 << 10;
/// What a field takes beside its bytes (RFC 7541 §4.1).
const OF_A_FIELD: usize = 32;

/// The half of a stream that answers.
#[derive(Clone)]
pub(in crate::proxy) struct Respond(Arc<Inner>);

struct Inner {
    half: Mutex<SendResponse<Bytes>>,
    /// Bytes that interim answers may still have.
    interim: AtomicUsize,
    meter: Arc<Meter>,
}

impl Respond {
    pub(super) fn new(half: SendResponse<Bytes>, meter: Arc<Meter>) -> Self {
        Self(Arc::new(Inner {
            half: Mutex::new(half),
            interim: AtomicUsize::new(INTERIM_MAX),
            meter,
        }))
    }

    fn half(&self) -> MutexGuard<'_, SendResponse<Bytes>> {
        self.0.half.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends an interim answer. They wait in memory for a client that reads nothing, so there are not many.
    pub(in crate::proxy) fn interim(&self, status: StatusCode, headers: HeaderMap) {
        let len = OF_A_FIELD + size(&headers);
        let (all, set) = (&self.0.interim, Ordering::Relaxed);
        if all
            .fetch_update(set, set, |left| left.checked_sub(len))
            .is_err()
        {
            return;
        }
        let mut answer = Response::new(());
        *answer.status_mut() = status;
        *answer.headers_mut() = headers;
        // A stream that is over hears nothing.
        let _ = self.half().send_informational(answer);
    }

    /// Ready once the client has given its request up.
    pub(super) async fn given_up(&self) {
        let _ = poll_fn(|cx| self.half().poll_reset(cx)).await;
    }

    /// Says that there is a tunnel, and by way of whom.
    pub(super) fn tunnel(&self, by: Option<HeaderValue>) -> Result<SendStream<Bytes>, h2::Error> {
        let mut answer = Response::new(());
        date(answer.headers_mut());
        if let Some(by) = by {
            answer.headers_mut().insert("proxy-status", by);
        }
        self.half().send_response(answer, false)
    }

    /// Answers; `bodiless`: to HEAD, of which there is no body to come.
    pub(super) async fn answer(&self, response: Response<Body>, bodiless: bool) {
        let (mut parts, body) = response.into_parts();
        without_http_11(&mut parts.headers);
        date(&mut parts.headers);
        if let Some(len) = body.size_hint().exact().filter(|_| !body.is_end_stream()) {
            let len = || HeaderValue::from(len);
            parts.headers.entry(CONTENT_LENGTH).or_insert_with(len);
        }
        let is_over = bodiless || body.is_end_stream();
        self.0.meter.wanted(size(&parts.headers));
        let head = Response::from_parts(parts, ());
        let stream = self.half().send_response(head, is_over);
        match stream {
            Ok(stream) if !is_over => self.body(stream, body).await,
            Ok(_) => {}
            Err(e) => tracing::debug!(error = %e, "a stream ended before its answer"),
        }
    }

    async fn body(&self, mut stream: SendStream<Bytes>, mut body: Body) {
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                _ = poll_fn(|cx| stream.poll_reset(cx)) => return,
            };
            let said = match frame.map(|frame| frame.map(|frame| frame.into_data())) {
                None => stream.send_data(Bytes::new(), true).map_err(Into::into),
                Some(Ok(Ok(data))) => {
                    self.0.meter.wanted(data.len());
                    let is_last = body.is_end_stream();
                    match give(&mut stream, data, is_last, || true).await {
                        Ok(()) if !is_last => continue,
                        given => given,
                    }
                }
                Some(Ok(Err(frame))) => match frame.into_trailers() {
                    Ok(mut trailers) => {
                        Hop::take_from(&mut trailers);
                        without_http_11(&mut trailers);
                        stream.send_trailers(trailers).map_err(Into::into)
                    }
                    Err(_) => continue,
                },
                Some(Err(e)) => Err(Untaken::Body(e.to_string())),
            };
            if let Err(e) = said {
                tracing::debug!(error = %e, "an answer broke off");
                stream.send_reset(Reason::INTERNAL_ERROR);
            }
            return;
        }
    }
}

/// Why an answer was not given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Untaken {
    /// The stream is over.
    #[error("{0}")]
    Over(#[from] h2::Error),
    /// Its client took nothing.
    #[error("the client took nothing for {TAKE_LIMIT:?}")]
    Stalled,
    /// There is no more of it.
    #[error("{0}")]
    Body(String),
}

/// Sends bytes as the client has room for them; `is_last`: and ends the stream. Whether a client that takes nothing for
/// [`TAKE_LIMIT`] is given up, `gives_up` says.
pub(crate) async fn give(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    is_last: bool,
    gives_up: impl Fn() -> bool,
) -> Result<(), Untaken> {
    while !data.is_empty() {
        let room = match timeout(TAKE_LIMIT, room(stream, data.len())).await {
            Ok(room) => room?,
            Err(_) if gives_up() => return Err(Untaken::Stalled),
            Err(_) => continue,
        };
        let piece = data.split_to(room.min(data.len()));
        stream.send_data(piece, is_last && data.is_empty())?;
        if data.is_empty() {
            return Ok(());
        }
    }
    if is_last {
        stream.send_data(data, true)?;
    }
    Ok(())
}

/// Waits until some of so many bytes can be sent.
async fn room(stream: &mut SendStream<Bytes>, wanted: usize) -> Result<usize, h2::Error> {
    stream.reserve_capacity(wanted);
    while stream.capacity() == 0 {
        match poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(room) => room.map(drop)?,
            None => return Err(Reason::STREAM_CLOSED.into()),
        };
    }
    Ok(stream.capacity())
}

/// Bytes of fields.
pub(crate) fn size(headers: &HeaderMap) -> usize {
    let of_each = headers.iter().map(|(name, value)| {
        let len = name.as_str().len() + value.len();
        len + OF_A_FIELD
    });
    of_each.sum()
}

fn without_http_11(headers: &mut HeaderMap) {
    headers.remove(TE);
    for name in OF_A_CONNECTION {
        headers.remove(name);
    }
}

fn date(headers: &mut HeaderMap) {
    if let Some(date) = own::date().and_then(|date| HeaderValue::try_from(date).ok()) {
        headers.entry(DATE).or_insert(date);
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use hyper::Request;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn r67_a_client_that_takes_nothing_of_its_answer_is_given_up() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let server = tokio::spawn(async move {
            let mut conn = h2::server::handshake(far).await.unwrap();
            let (_request, half) = conn.accept().await.unwrap().unwrap();
            let respond = Respond::new(half, Arc::default());
            let body = Full::new(Bytes::from(vec![0; 1 << 20]));
            let body = body.map_err(|never| match never {}).boxed();
            let begin = Instant::now();
            tokio::select! {
                () = respond.answer(Response::new(body), false) => {}
                _ = conn.accept() => panic!("the connection goes on"),
            }
            let took = begin.elapsed();
            drop(respond);
            // What was decided is told.
            let _ = timeout(TAKE_LIMIT, conn.accept()).await;
            took
        });
        let (send, conn) = h2::client::handshake(near).await.unwrap();
        let driver = tokio::spawn(conn);
        let mut send = send.ready().await.unwrap();
        let request = Request::get("http://a/").body(()).unwrap();
        let (response, _) = send.send_request(request, true).unwrap();
        let mut body = response.await.unwrap().into_body();
        // It reads, and gives no room for more.
        let ended = loop {
            match body.data().await {
                Some(Ok(_)) => {}
                Some(Err(e)) => break e,
                None => panic!("it is not whole"),
            }
        };
        assert_eq!(ended.reason(), Some(Reason::INTERNAL_ERROR));
        drop((body, send));
        assert_eq!(server.await.unwrap().as_secs(), TAKE_LIMIT.as_secs());
        driver.abort();
    }
}
