//! A client of HTTP/2, for tests that read and write in one thread.

use std::future::poll_fn;
use std::net::TcpStream;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use hyper::header::HeaderMap;
use hyper::{Request, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;

use crate::host::HANG;

/// One connection.
pub struct Client {
    runtime: Handle,
    send: SendRequest<Bytes>,
    /// Its end, as the client saw it.
    ended: std::sync::mpsc::Receiver<Result<(), h2::Error>>,
}

/// A stream, whose answer may not have come.
pub struct Stream {
    runtime: Handle,
    response: Option<ResponseFuture>,
    pub send: SendStream<Bytes>,
    received: Option<RecvStream>,
}

/// A runtime that goes on by itself.
pub fn runtime() -> Handle {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let handle = runtime.handle().clone();
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}

impl Client {
    /// Without TLS: the client knows what the proxy speaks.
    pub fn new(tcp: TcpStream) -> Self {
        let runtime = runtime();
        let _entered = runtime.enter();
        tcp.set_nonblocking(true).unwrap();
        tcp.set_nodelay(true).unwrap();
        let tcp = tokio::net::TcpStream::from_std(tcp).unwrap();
        Self::over(&runtime, tcp)
    }

    pub fn over(
        runtime: &Handle,
        io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Self {
        let (send, connection) = runtime.block_on(h2::client::handshake(io)).unwrap();
        let (tell, ended) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let _ = tell.send(connection.await);
        });
        Self {
            runtime: runtime.clone(),
            send,
            ended,
        }
    }

    /// Begins a stream; `end`: with nothing behind the head.
    pub fn ask(&self, method: &str, uri: &str, fields: &[(&str, &str)], end: bool) -> Stream {
        self.try_ask(method, uri, fields, end).unwrap()
    }

    pub fn try_ask(
        &self,
        method: &str,
        uri: &str,
        fields: &[(&str, &str)],
        end: bool,
    ) -> Result<Stream, h2::Error> {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let ready = self.limited(self.send.clone().ready());
        let (response, send) = ready?.send_request(request.body(()).unwrap(), end)?;
        Ok(Stream {
            runtime: self.runtime.clone(),
            response: Some(response),
            send,
            received: None,
        })
    }

    pub fn get(&self, uri: &str) -> Stream {
        self.ask("GET", uri, &[], true)
    }

    pub fn connect(&self, authority: &str) -> Stream {
        self.ask("CONNECT", authority, &[], false)
    }

    /// How the connection ended.
    pub fn ended(&self) -> Result<(), h2::Error> {
        self.ended.recv_timeout(HANG).unwrap()
    }

    fn limited<T>(&self, wait: impl Future<Output = T>) -> T {
        limited(&self.runtime, wait)
    }
}

fn limited<T>(runtime: &Handle, wait: impl Future<Output = T>) -> T {
    // The timer is another thread's.
    let limited = async { tokio::time::timeout(HANG, wait).await };
    runtime.block_on(limited).expect("it hangs")
}

impl Stream {
    /// The answer's status and fields.
    pub fn head(&mut self) -> (u16, HeaderMap) {
        self.try_head().unwrap()
    }

    pub fn status(&mut self) -> u16 {
        self.head().0
    }

    pub fn try_head(&mut self) -> Result<(u16, HeaderMap), h2::Error> {
        let response = limited(&self.runtime, self.response.take().unwrap())?;
        let (head, received) = response.into_parts();
        self.received = Some(received);
        Ok((head.status.as_u16(), head.headers))
    }

    /// The next interim answer; none: the final one has come.
    pub fn interim(&mut self) -> Option<StatusCode> {
        let response = self.response.as_mut().unwrap();
        let next = poll_fn(|cx| response.poll_informational(cx));
        let next = limited(&self.runtime, next);
        next.map(|interim| interim.unwrap().status())
    }

    pub fn say(&mut self, bytes: &[u8], end: bool) {
        let bytes = Bytes::copy_from_slice(bytes);
        self.send.send_data(bytes, end).unwrap();
    }

    /// Some bytes; none: the end of them.
    pub fn some(&mut self) -> Result<Option<Bytes>, h2::Error> {
        let received = self.received.as_mut().unwrap();
        let data = poll_fn(|cx| received.poll_data(cx));
        let data = limited(&self.runtime, data).transpose()?;
        if let Some(data) = &data {
            received.flow_control().release_capacity(data.len())?;
        }
        Ok(data)
    }

    /// So many bytes.
    pub fn exactly(&mut self, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            all.extend_from_slice(&self.some().unwrap().expect("too few"));
        }
        assert_eq!(all.len(), len);
        all
    }

    /// All bytes to the end.
    pub fn rest(&mut self) -> Result<String, h2::Error> {
        let mut all = Vec::new();
        while let Some(data) = self.some()? {
            all.extend_from_slice(&data);
        }
        Ok(String::from_utf8(all).unwrap())
    }

    pub fn trailers(&mut self) -> Option<HeaderMap> {
        let received = self.received.as_mut().unwrap();
        let trailers = poll_fn(|cx| received.poll_trailers(cx));
        limited(&self.runtime, trailers).unwrap()
    }

    /// Why the proxy reset it.
    pub fn reset(&mut self) -> Reason {
        let reset = poll_fn(|cx| self.send.poll_reset(cx));
        limited(&self.runtime, reset).unwrap()
    }
}
