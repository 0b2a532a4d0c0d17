//! What is read as a request here is the same request to hyper, and what is refused is refused in every piece that it comes in.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;

use super::body::{EXTENSIONS_MAX, TRAILER_MAX};
use super::head::{self, Search};
use super::*;

/// A stream of requests as `Client` reads it.
#[derive(Debug, Default, PartialEq)]
struct Read {
    /// First line of each request that is whole.
    lines: Vec<String>,
    /// What hyper gets of them.
    bytes: Vec<u8>,
    /// Of what is refused.
    status: Option<u16>,
}

fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Read {
    let mut read = Read::default();
    let mut ahead = BytesMut::new();
    let mut at = At::Head(Search::new());
    let mut request = Vec::new();
    for piece in pieces {
        ahead.extend_from_slice(piece);
        let done = loop {
            let step = match &mut at {
                At::Head(search) => match search.end(&mut ahead) {
                    Ok(None) => break Ok(()),
                    Ok(Some(len)) => head::check(&ahead.split_to(len)).map(|head| {
                        request = head.bytes.to_vec();
                        at = At::Request(head.body);
                    }),
                    Err(why) => Err(why),
                },
                At::Request(body) => {
                    let took = body.take(&ahead);
                    let over = body.is_over();
                    took.map(|own| request.extend_from_slice(&ahead.split_to(own)))
                        .map(|()| {
                            if over {
                                let line = request.split(|&b| b == b'\r').next().unwrap();
                                read.lines.push(String::from_utf8(line.to_vec()).unwrap());
                                read.bytes.append(&mut request);
                                at = At::Head(Search::new());
                            }
                        })
                }
                At::Tunnel { .. } | At::Over | At::Http2 => break Ok(()),
            };
            if step.is_err() || (ahead.is_empty() && !matches!(&at, At::Request(b) if b.is_over()))
            {
                break step;
            }
        };
        if let Err(why) = done {
            read.status = Some(why.status.as_u16());
            break;
        }
    }
    read
}

/// First line of each request that hyper reads whole; none: it refuses something.
fn hyper_reads(bytes: &[u8]) -> Option<Vec<String>> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let heard = lines.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let lines = lines.clone();
        async move {
            let line = format!("{} {}", request.method(), request.uri());
            let (parts, body) = request.into_parts();
            let whole = body.collect().await.is_ok();
            lines
                .lock()
                .unwrap()
                .push((line, parts.headers.len(), whole));
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let ended = runtime.block_on(async {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        near.write_all(bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let mut server = http1::Builder::new();
        let server = server
            .half_close(true)
            .header_read_timeout(None)
            .max_buf_size(HEADER_MAX + 1)
            .max_headers(FIELDS_MAX);
        server.serve_connection(TokioIo::new(far), service).await
    });
    let heard = heard.lock().unwrap();
    let whole = ended.is_ok() && heard.iter().all(|(_, _, whole)| *whole);
    whole.then(|| heard.iter().map(|(line, ..)| line.clone()).collect())
}

const SAMPLES: &[&str] = &[
    "GET http://a/1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "POST http://a/2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    "POST http://a/3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "PUT http://a/4 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n00a ;x=\"y\"\r\n0123456789\r\n1\r\nx\r\n0\r\nT: 1\r\n\r\n",
    "\r\nHEAD http://a/?5 HTTP/1.1\r\nhost:\r\nX-Empty:\r\nX:  y \t\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n",
];

/// What a mutation puts in.
const PIECES: &[&str] = &[
    "\r",
    "\n",
    "\r\n",
    "\0",
    " ",
    "\t",
    ":",
    ";",
    ",",
    "0",
    "1",
    "f",
    "5",
    "x",
    "\"",
    "<",
    "%",
    "#",
    "?",
    "/",
    "@",
    "\u{7f}",
    "é",
    "chunked",
    "Content-Length: 3\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Host: b\r\n",
    "\r\n\r\n",
    "0\r\n\r\n",
    "+",
    "-",
    "GET http://a/9 HTTP/1.1\r\nHost: a\r\n\r\n",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 30_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// One parser decides (R65): where hyper reads what was let through, it reads as many requests, with the same targets.
    #[test]
    fn r65_what_is_let_through_is_the_same_requests_to_hyper(
        samples in prop::collection::vec(0..SAMPLES.len(), 1..3),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..PIECES.len(), 0..3u8), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes: Vec<u8> = samples.iter().flat_map(|&n| SAMPLES[n].bytes()).collect();
        for (at, piece, kind) in changes {
            let at = at.index(bytes.len());
            let piece = PIECES[piece].bytes();
            match kind {
                0 => drop(bytes.splice(at..at, piece)),
                1 => drop(bytes.splice(at..=at, piece)),
                _ => drop(bytes.remove(at)),
            }
            if bytes.is_empty() {
                bytes.push(b'x');
            }
        }
        let whole = read([&bytes[..]]);
        let (left, right) = bytes.split_at(cut.index(bytes.len()));
        prop_assert_eq!(&read([left, right]), &whole);
        let expected: Vec<String> = whole
            .lines
            .iter()
            .map(|line| {
                let mut words = line.split(' ');
                let (method, target) = (words.next().unwrap(), words.next().unwrap());
                format!("{method} {}", target.parse::<hyper::Uri>().unwrap())
            })
            .collect();
        // What asks for the end of the connection, and a CONNECT, is the last that hyper reads.
        let text = String::from_utf8_lossy(&whole.bytes).to_lowercase();
        let heard = hyper_reads(&whole.bytes);
        prop_assert!(heard.is_some(), "hyper refuses {:?}", text);
        let heard = heard.unwrap();
        if text.contains("close") || text.contains("connect ") || text.contains("http/1.0") {
            prop_assert!(expected.starts_with(&heard));
        } else {
            prop_assert_eq!(heard, expected);
        }
    }
}

/// As the field's name or value has one more byte, of any kind and anywhere, some readers see the coding and some do not.
#[test]
fn r65_no_byte_hides_a_transfer_coding_behind_a_length() {
    const FIELD: &str = "Transfer-Encoding: chunked";
    let with = |field: &[u8]| {
        let head = b"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n";
        [head, field, b"\r\n\r\n0\r\n\r\n"].concat()
    };
    assert_eq!(refused(&with(FIELD.as_bytes())), Some(400));
    let mut let_through = 0;
    for at in 0..=FIELD.len() {
        for byte in 0..=u8::MAX {
            let mut field = FIELD.as_bytes().to_vec();
            field.insert(at, byte);
            let read = read([&with(&field)[..]]);
            if read.status == Some(400) {
                continue;
            }
            // It is another field then, to whoever reads it.
            let text = String::from_utf8_lossy(&read.bytes).to_lowercase();
            assert!(!text.contains("\ntransfer-encoding:"), "{text:?}");
            assert!(at <= "Transfer-Encoding".len(), "{text:?}");
            assert_eq!(hyper_reads(&read.bytes).map(|lines| lines.len()), Some(1));
            let_through += 1;
        }
    }
    assert!(let_through > 0);
}

/// A served connection, and the other end of it.
async fn served(
    answer: usize,
) -> (
    impl Future<Output = Result<(), hyper::Error>>,
    tokio::net::TcpStream,
) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = tokio::net::TcpStream::connect(listener.local_addr().unwrap());
    let near = near.await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    let place = Arc::new(
        crate::listen::Gate::new(crate::metrics::Listener::new(1))
            .enter()
            .await,
    );
    let far = Client::new(
        ClientIo::new(crate::front::stream::Stream::Tcp(far), Default::default()),
        place,
        Notes::default(),
    );
    let service = service_fn(move |_: Request<Incoming>| {
        let body = http_body_util::Full::new(Bytes::from(vec![b'x'; answer]));
        async move { Ok::<_, Infallible>(Response::new(body)) }
    });
    let server = http1::Builder::new()
        .half_close(true)
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(far), service);
    (server, near)
}

#[tokio::test(start_paused = true)]
async fn a_connection_ends_after_ten_seconds_before_its_first_request_and_after_a_minute_behind_it()
{
    let (server, _near) = served(0).await;
    let begin = Instant::now();
    server.await.unwrap();
    assert_eq!(begin.elapsed().as_secs(), HEADER_LIMIT.as_secs());
    let (server, mut near) = served(0).await;
    near.write_all(SAMPLES[0].as_bytes()).await.unwrap();
    let begin = Instant::now();
    server.await.unwrap();
    assert_eq!(begin.elapsed().as_secs(), IDLE_LIMIT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn r67_a_client_that_takes_nothing_of_its_answer_is_given_up() {
    let (server, mut near) = served(64 << 20).await;
    near.write_all(SAMPLES[0].as_bytes()).await.unwrap();
    let begin = Instant::now();
    server.await.unwrap_err();
    assert_eq!(begin.elapsed().as_secs(), TAKE_LIMIT.as_secs());
}

#[test]
fn samples_are_read_whole() {
    for sample in SAMPLES {
        let read = read([sample.as_bytes()]);
        assert_eq!((read.lines.len(), read.status), (1, None), "{sample:?}");
    }
}

fn refused(bytes: &[u8]) -> Option<u16> {
    read([bytes]).status
}

#[test]
fn r68_a_header_has_at_most_so_many_fields_and_bytes() {
    let fields = |n: usize| {
        format!(
            "GET http://a/ HTTP/1.1\r\nHost: a\r\n{}\r\n",
            "X: y\r\n".repeat(n)
        )
    };
    assert_eq!(refused(fields(FIELDS_MAX - 1).as_bytes()), None);
    assert_eq!(refused(fields(FIELDS_MAX).as_bytes()), Some(431));
    assert_eq!(refused(fields(10_000).as_bytes()), Some(431));
    let value = |n: usize| {
        format!(
            "GET http://a/ HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
            "y".repeat(n)
        )
    };
    assert_eq!(refused(value(HEADER_MAX - 64).as_bytes()), None);
    assert_eq!(refused(value(HEADER_MAX).as_bytes()), Some(431));
    let target = |n: usize| format!("GET http://a/{} HTTP/1.1\r\nHost: a\r\n\r\n", "y".repeat(n));
    assert_eq!(refused(target(HEADER_MAX - 64).as_bytes()), None);
    assert_eq!(refused(target(HEADER_MAX).as_bytes()), Some(414));
    // It is refused before its end, and whatever it grows to in its other spelling.
    assert_eq!(refused(&vec![b'x'; HEADER_MAX]), Some(414));
    let grown = format!(
        "GET http://a/{} HTTP/1.1\r\nHost: a\r\n\r\n",
        "<".repeat(HEADER_MAX / 2)
    );
    assert_eq!(refused(grown.as_bytes()), Some(414));
}

#[test]
fn r68_chunk_extensions_and_trailers_have_a_limit() {
    const HEAD: &str = "POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let long = |n: usize| format!("{HEAD}1;{}\r\nx\r\n0\r\n\r\n", "y".repeat(n - 1));
    assert_eq!(refused(long(EXTENSIONS_MAX).as_bytes()), None);
    assert_eq!(refused(long(EXTENSIONS_MAX + 1).as_bytes()), Some(400));
    // In many chunks as in one.
    let many = |n: usize| format!("{HEAD}{}0\r\n\r\n", "1;y\r\nx\r\n".repeat(n / 2));
    assert_eq!(refused(many(EXTENSIONS_MAX).as_bytes()), None);
    assert_eq!(refused(many(EXTENSIONS_MAX + 2).as_bytes()), Some(400));
    let trailer = |n: usize| format!("{HEAD}0\r\nX: {}\r\n\r\n", "y".repeat(n - 7));
    assert_eq!(refused(trailer(TRAILER_MAX).as_bytes()), None);
    assert_eq!(refused(trailer(TRAILER_MAX + 1).as_bytes()), Some(400));
    assert_eq!(
        refused(format!("{HEAD}00000000000000000\r\n").as_bytes()),
        Some(400)
    );
}
