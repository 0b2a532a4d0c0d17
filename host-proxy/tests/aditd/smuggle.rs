//! Requests that two readers could read differently are refused, and the connection ends (R65, R66, R68).

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::access::other;
use crate::host::{Answer, Control, HANG, Host};
use crate::management::management;
use crate::proxy::head;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Requests, and how they are refused.
fn corpus() -> Vec<(String, u16)> {
    let mut corpus = Vec::new();
    let mut refuse = |status: u16, request: &str| corpus.push((request.to_owned(), status));
    let get = |fields: &str| format!("GET http://a/ HTTP/1.1\r\n{fields}\r\n");
    let post = |fields: &str, body: &str| {
        format!("POST http://a/ HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}")
    };
    // Ends of lines.
    refuse(400, "GET http://a/ HTTP/1.1\nHost: a\n\n");
    refuse(400, "GET http://a/ HTTP/1.1\r\nHost: a\n\r\n");
    refuse(400, "GET http://a/ HTTP/1.1\r\nHost: a\r\n\n");
    refuse(400, "GET http://a/ HTTP/1.1\rHost: a\r\n\r\n");
    refuse(400, "\nGET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
    refuse(400, &get("Host: a\r\nX: y\r z\r\n"));
    // Folded lines, spaces, and bytes that are no text.
    refuse(400, &get("Host: a\r\nX: y\r\n z\r\n"));
    refuse(400, &get("Host: a\r\nX: y\r\n\tz\r\n"));
    refuse(400, &get(" Host: a\r\n"));
    refuse(400, &get("Host : a\r\n"));
    refuse(400, &get("Host\t: a\r\n"));
    refuse(400, &get("Host: a\r\nX: y\0z\r\n"));
    refuse(400, &get("Host: a\r\nX: y\x1bz\r\n"));
    refuse(400, &get("Host: a\r\nX\r\n"));
    refuse(400, &get("Host: a\r\n: y\r\n"));
    refuse(400, &get("Host: a\r\nX(y): z\r\n"));
    // Hosts.
    refuse(400, &get(""));
    refuse(400, &get("Host: a\r\nHost: a\r\n"));
    refuse(400, &get("Host: a\r\nhost: b\r\n"));
    refuse(400, &get("Host: a b\r\n"));
    refuse(400, &get("Host: a, b\r\n"));
    refuse(400, &get("Host: a,b\r\n"));
    refuse(400, &get("Host: a/b\r\n"));
    refuse(400, &get("Host: x@a\r\n"));
    // Request lines.
    refuse(400, "GET  http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
    refuse(400, "GET http://a/ HTTP/1.1 \r\nHost: a\r\n\r\n");
    refuse(400, "GET http://a/\tHTTP/1.1\r\nHost: a\r\n\r\n");
    refuse(400, "GET http://a/ b HTTP/1.1\r\nHost: a\r\n\r\n");
    refuse(400, "GET http://a/\r\n\r\n");
    refuse(400, "G(T http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
    refuse(400, "GET http://a/ http/1.1\r\nHost: a\r\n\r\n");
    refuse(505, "GET http://a/ HTTP/1.2\r\nHost: a\r\n\r\n");
    refuse(505, "PRI * HTTP/2.0\r\nX: y\r\n\r\n");
    refuse(505, "PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n");
    // Lengths.
    let chunks = "3\r\nabc\r\n0\r\n\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n";
    refuse(
        400,
        &post(
            "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
            chunks,
        ),
    );
    refuse(
        400,
        &post(
            "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
            chunks,
        ),
    );
    refuse(
        400,
        &post(
            "Transfer-Encoding: identity\r\nContent-Length: 3\r\n",
            "abc",
        ),
    );
    for length in [
        "3\r\nContent-Length: 3",
        "3\r\nContent-Length: 4",
        "3, 3",
        "+3",
        "-3",
        "0x3",
        "3 3",
        "",
        "3.0",
        "99999999999999999999",
    ] {
        refuse(400, &post(&format!("Content-Length: {length}\r\n"), "abc"));
    }
    for coding in [
        "chunked, chunked",
        "xchunked",
        "chunked, gzip",
        "identity",
        "",
        "chunked;q=1",
        "chunked,",
        "chunked\r\nTransfer-Encoding: chunked",
        "\"chunked\"",
        "\x0bchunked",
    ] {
        refuse(
            400,
            &post(&format!("Transfer-Encoding: {coding}\r\n"), chunks),
        );
    }
    refuse(501, &post("Transfer-Encoding: gzip, chunked\r\n", chunks));
    refuse(400, &post(chunked, chunks).replace("HTTP/1.1", "HTTP/1.0"));
    let connect = |fields: &str| format!("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n{fields}\r\n");
    refuse(400, &connect("Content-Length: 3\r\n"));
    refuse(400, &connect(chunked));
    refuse(400, &connect("").replace("a:80 ", "http://a:80/ "));
    refuse(400, &connect("").replace("a:80 ", "a:80/x "));
    corpus
}

/// Chunked bodies that are none.
const CHUNKS: &[&str] = &[
    "3\nabc\r\n0\r\n\r\n",
    "3\r\nabc\n0\r\n\r\n",
    "3\r\nabcd\r\n0\r\n\r\n",
    "3\r\nab\r\n0\r\n\r\n",
    "+3\r\nabc\r\n0\r\n\r\n",
    "-3\r\nabc\r\n0\r\n\r\n",
    "0x3\r\nabc\r\n0\r\n\r\n",
    " 3\r\nabc\r\n0\r\n\r\n",
    "\r\n3\r\nabc\r\n0\r\n\r\n",
    "3;x\ny\r\nabc\r\n0\r\n\r\n",
    "3;x\ry\r\nabc\r\n0\r\n\r\n",
    "3;\0\r\nabc\r\n0\r\n\r\n",
    "3 3\r\nabc\r\n0\r\n\r\n",
    "10000000000000003\r\nabc\r\n0\r\n\r\n",
    "3\r\nabc\r\n0\r\nX y\r\n\r\n",
    "3\r\nabc\r\n0\r\nX: y\n\r\n",
    "3\r\nabc\r\n0\r\nX: y\r\n z\r\n\r\n",
    "3\r\nabc\r\n0\r\n\n",
];

/// Sends it to the proxy in these pieces, and hears all that comes.
fn said(host: &Host, pieces: &[&[u8]]) -> Vec<u8> {
    let client = host.proxy();
    client.set_nodelay(true).unwrap();
    said_to(client, pieces)
}

fn said_to(mut client: impl Read + Write, pieces: &[&[u8]]) -> Vec<u8> {
    for piece in pieces {
        // It may be refused before it has said all.
        let _ = client.write_all(piece);
    }
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    said
}

/// One answer, which says why, and that the connection ends.
fn refusal(said: &[u8]) -> u16 {
    let text = String::from_utf8_lossy(said);
    let answers = text.lines().filter(|line| line.starts_with("HTTP/1."));
    assert_eq!(answers.count(), 1, "{text}");
    let answer = Answer::parse(said).unwrap();
    assert!(answer.head.contains("connection: close"), "{text}");
    assert!(answer.head.contains("proxy-status: adit; error="), "{text}");
    assert!(
        answer.body.len() > 10 && answer.body.ends_with('\n'),
        "{text}"
    );
    answer.status
}

/// A whole request, answered by the guest: the first that the port process hears of.
fn served(control: &Control, mut client: TcpStream) {
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .unwrap();
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    guest.write_all(OK).unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    assert_eq!(Answer::parse(&said).unwrap().body, "ok");
}

#[test]
fn r65_what_two_readers_could_read_differently_is_refused_however_it_comes() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for (request, status) in corpus() {
        let bytes = request.as_bytes();
        assert_eq!(refusal(&said(&host, &[bytes])), status, "{request:?}");
        for cut in 1..bytes.len() {
            let (one, two) = bytes.split_at(cut);
            let said = said(&host, &[one, two]);
            assert_eq!(refusal(&said), status, "{request:?} at {cut}");
        }
    }
    // Nothing of it was a request.
    served(&control, host.proxy());
}

#[test]
fn r65_what_is_behind_an_answered_request_is_refused_after_the_answer() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for behind in [
        "GET http://a/2 HTTP/1.1\nHost: a\n\n",
        "POST http://a/2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "hello",
    ] {
        let mut client = host.proxy();
        let first = "POST http://a/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody";
        client
            .write_all((first.to_owned() + behind).as_bytes())
            .unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let (mut guest, _) = control.tunnel();
        assert!(head(&mut guest).starts_with("POST /1 "));
        let mut body = [0; 4];
        guest.read_exact(&mut body).unwrap();
        assert_eq!(&body, b"body");
        guest.write_all(OK).unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        let second = said.windows(4).rposition(|w| w == b"HTTP").unwrap();
        assert_eq!(Answer::parse(&said[..second]).unwrap().body, "ok");
        assert_eq!(refusal(&said[second..]), 400, "{behind:?}");
    }
    served(&control, host.proxy());
}

#[test]
fn r65_a_chunked_body_that_is_none_is_refused_and_has_no_end_in_the_guest() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for chunks in CHUNKS {
        let mut client = host.proxy();
        let request = format!(
            "POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"
        );
        client.write_all(request.as_bytes()).unwrap();
        let (mut guest, _) = control.tunnel();
        let mut got = Vec::new();
        // It ends, or is broken off.
        let _ = guest.read_to_end(&mut got);
        assert!(!got.ends_with(b"0\r\n\r\n"), "{chunks:?}: {got:?}");
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        assert_eq!(refusal(&said), 400, "{chunks:?}");
    }
    served(&control, host.proxy());
}

/// The same of the API: in its own shape, and the connection ends.
fn refused_by_api(said: &[u8]) -> u16 {
    let text = String::from_utf8_lossy(said);
    let answers = text.lines().filter(|line| line.starts_with("HTTP/1."));
    assert_eq!(answers.count(), 1, "{text}");
    let answer = Answer::parse(said).unwrap();
    assert!(answer.head.contains("connection: close"), "{text}");
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    let says = |key: &str| body[key].as_str().is_some_and(|text| text.len() > 10);
    assert!(
        body["code"] == "usage" && says("message") && says("help"),
        "{text}"
    );
    answer.status
}

#[test]
fn r65_the_api_has_the_proxys_parser_and_forgives_as_little() {
    let (host, _ports) = Host::serving(&[("a", 3)], &management(""));
    let manager = || {
        let client = TcpStream::connect(other(&host)).unwrap();
        client.set_nodelay(true).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        client
    };
    let ok = "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
    for (request, status) in corpus() {
        // As the API is asked.
        let request = request.replace("http://a/", "/v1/vms");
        // It would be a request for the API.
        let behind = request.clone() + ok;
        assert_eq!(
            refused_by_api(&said_to(manager(), &[behind.as_bytes()])),
            status,
            "{request:?}"
        );
        let by_owner = said_to(host.operator(), &[request.as_bytes()]);
        assert_eq!(refused_by_api(&by_owner), status, "{request:?}");
        for cut in 1..request.len() {
            let (one, two) = request.as_bytes().split_at(cut);
            let said = said_to(manager(), &[one, two]);
            assert_eq!(refused_by_api(&said), status, "{request:?} at {cut}");
        }
    }
    for chunks in CHUNKS {
        let request = format!(
            "POST /v1/vms HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"
        );
        for said in [
            said_to(manager(), &[request.as_bytes(), ok.as_bytes()]),
            said_to(host.operator(), &[request.as_bytes(), ok.as_bytes()]),
        ] {
            let answer = Answer::parse(&said).unwrap();
            assert_eq!(answer.status, 400, "{chunks:?}: {}", answer.body);
            let all = String::from_utf8_lossy(&said);
            assert_eq!(all.matches("HTTP/1.1 ").count(), 1, "{chunks:?}: {all}");
        }
    }
    // One that is cut off in its header is told so; one that says nothing is not.
    let client = manager();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(said_to(client, &[]), b"");
    let mut client = manager();
    client.write_all(b"GET /healthz HT").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(refused_by_api(&said_to(client, &[])), 400);
    // And what is a request is one, in any pieces.
    for cut in 1..ok.len() {
        let (one, two) = ok.as_bytes().split_at(cut);
        let answer = Answer::parse(&said_to(manager(), &[one, two])).unwrap();
        assert_eq!((answer.status, &*answer.body), (200, "ok\n"), "{cut}");
    }
    let chunked = "POST /v1/reload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nnull\r\n0\r\n\r\n";
    let answer = Answer::parse(&said_to(host.operator(), &[chunked.as_bytes()])).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[test]
fn r66_what_follows_a_refused_connect_is_no_request() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let behind = "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n".repeat(2000);
    for (named, status) in [("nobody:80", 404), ("a:81", 403), ("a:0", 400)] {
        let request = format!("CONNECT {named} HTTP/1.1\r\nHost: {named}\r\n\r\n");
        let said = said(&host, &[request.as_bytes(), behind.as_bytes()]);
        assert_eq!(refusal(&said), status, "{named}");
    }
    served(&control, host.proxy());
}

#[test]
fn r65_a_host_that_is_not_the_targets_is_replaced() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n")
        .unwrap();
    let (mut guest, _) = control.tunnel();
    let got = head(&mut guest).to_lowercase();
    assert!(
        got.contains("\r\nhost: a\r\n") && !got.contains("169.254"),
        "{got}"
    );
}
