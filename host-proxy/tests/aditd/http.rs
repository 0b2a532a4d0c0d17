//! What an HTTP/1.1 intermediary changes of a message on its way, and what it must leave alone (RFC 9110, RFC 9112).

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use crate::host::{Answer, Control, Host, Port};
use crate::server::{next_head, until};

fn started() -> (Host, Vec<Port>, Control) {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    (host, ports, control)
}

/// Sends a request; returns the client, the guest's end of it, and the head that the guest got.
fn asked(host: &Host, control: &Control, request: &str) -> (TcpStream, UnixStream, String) {
    let mut client = host.proxy();
    client.write_all(request.as_bytes()).unwrap();
    let (mut guest, _) = control.tunnel();
    let head = next_head(&mut guest).unwrap();
    (client, guest, head)
}

/// Everything that comes until the end.
fn rest(client: &mut TcpStream) -> String {
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    String::from_utf8(said).unwrap()
}

fn has(head: &str, line: &str) -> bool {
    head.lines().any(|l| l.eq_ignore_ascii_case(line))
}

fn names(head: &str) -> Vec<&str> {
    let lines = head.lines().skip(1);
    lines
        .filter_map(|l| l.split_once(':'))
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn names_of_fields_keep_their_spelling_and_their_order_both_ways() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, head) = asked(
        &host,
        &control,
        "GET http://a/ HTTP/1.1\r\nHOST: a\r\nConnection: X-Hop\r\nX-MiXed: 1\r\nX-Hop: 1\r\nother: 2\r\nx-mIXED: 3\r\n\
         Proxy-Connection: close\r\nSOAPAction: x\r\nAccept: */*\r\nUser-agent: t\r\n\r\n",
    );
    assert_eq!(
        names(&head),
        [
            "HOST",
            "X-MiXed",
            "x-mIXED",
            "other",
            "SOAPAction",
            "Accept",
            "User-agent",
            "Via",
            "Forwarded",
            "Traceparent"
        ],
        "{head}"
    );
    guest
        .write_all(
            b"HTTP/1.1 200 Fine\r\nServer: x\r\nConnection: close\r\nDATE: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
              etag: \"1\"\r\nWWW-Authenticate: Basic\r\nContent-length: 2\r\n\r\nok",
        )
        .unwrap();
    let head = next_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 200 Fine\r\n"), "{head}");
    assert_eq!(
        names(&head),
        [
            "Server",
            "DATE",
            "etag",
            "WWW-Authenticate",
            "Content-length",
            "Via"
        ],
        "{head}"
    );
}

#[test]
fn an_answer_of_our_own_has_names_as_people_write_them() {
    let (host, _ports, _control) = started();
    let mut client = host.proxy();
    client
        .write_all(b"GET http://nobody/ HTTP/1.1\r\nHost: nobody\r\n\r\n")
        .unwrap();
    let head = next_head(&mut client).unwrap();
    assert!(names(&head).contains(&"Proxy-Status"), "{head}");
}

/// The guest's server speaks HTTP/1.0, and says where its answer ends by closing.
#[test]
fn an_answer_in_http_1_0_goes_on_in_our_own_version_and_with_its_end() {
    for version in ["1.1", "1.0"] {
        for whole in [true, false] {
            let (host, _ports, control) = started();
            let request =
                format!("GET http://a/ HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n");
            let (mut client, mut guest, head) = asked(&host, &control, &request);
            assert!(head.starts_with("GET / HTTP/1.1\r\n"), "{head}");
            assert!(has(&head, &format!("via: {version} adit")), "{head}");
            guest.write_all(b"HTTP/1.0 200 OK\r\n\r\nhalf").unwrap();
            let head = next_head(&mut client).unwrap();
            assert!(
                head.starts_with(&format!("HTTP/{version} 200 OK\r\n")),
                "{head}"
            );
            assert!(has(&head, "via: 1.0 adit"), "{head}");
            let is_chunked = has(&head, "transfer-encoding: chunked");
            assert_eq!(is_chunked, version == "1.1", "{head}");
            until(&mut client, "half");
            match whole {
                true => guest.shutdown(Shutdown::Write).unwrap(),
                false => guest.shutdown(Shutdown::Both).unwrap(),
            }
            let mut said = Vec::new();
            let end = client.read_to_end(&mut said).map_err(|e| e.kind());
            match (version, whole) {
                (_, false) => assert_eq!(end, Err(ErrorKind::ConnectionReset), "{version}"),
                ("1.1", true) => {
                    assert_eq!(
                        (end.is_ok(), said.as_slice()),
                        (true, &b"\r\n0\r\n\r\n"[..])
                    );
                }
                (_, true) => assert_eq!((end, said.as_slice()), (Ok(0), &b""[..])),
            }
        }
    }
}

#[test]
fn a_chunked_answer_is_plain_for_a_client_of_http_1_0() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, _) =
        asked(&host, &control, "GET http://a/ HTTP/1.0\r\nHost: a\r\n\r\n");
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        .unwrap();
    let said = rest(&mut client);
    assert!(said.starts_with("HTTP/1.0 200 OK\r\n"), "{said}");
    assert!(said.ends_with("\r\n\r\nok"), "{said}");
    assert!(!said.to_lowercase().contains("transfer-encoding"), "{said}");
}

#[test]
fn trailers_are_carried_both_ways() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, head) = asked(
        &host,
        &control,
        "POST http://a/ HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\nTrailer: X-Sum\r\n\
         Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 6\r\n\r\n",
    );
    for line in ["te: trailers", "connection: TE", "trailer: X-Sum"] {
        assert!(has(&head, line), "{line}: {head}");
    }
    let body = until(&mut guest, "\r\n\r\n");
    assert_eq!(body, "3\r\nabc\r\n0\r\nX-Sum: 6\r\n\r\n");
    guest
        .write_all(
            b"HTTP/1.1 200 OK\r\nTrailer: X-Sum, X-Late\r\nTransfer-Encoding: chunked\r\n\r\n\
              2\r\nok\r\n0\r\nX-Sum: 7\r\nX-Late: 1\r\n\r\n",
        )
        .unwrap();
    let head = next_head(&mut client).unwrap();
    assert!(has(&head, "trailer: X-Sum, X-Late"), "{head}");
    let body = until(&mut client, "\r\n\r\n");
    assert_eq!(body, "2\r\nok\r\n0\r\nX-Sum: 7\r\nX-Late: 1\r\n\r\n");
    // Its connection goes on.
    client
        .write_all(b"GET http://nobody/ HTTP/1.1\r\nHost: nobody\r\n\r\n")
        .unwrap();
    assert!(next_head(&mut client).unwrap().starts_with("HTTP/1.1 404 "));
}

#[test]
fn a_client_that_takes_no_trailers_gets_none_and_the_guest_knows() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, head) =
        asked(&host, &control, "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(!head.to_lowercase().contains("\nte:"), "{head}");
    guest
        .write_all(
            b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n\
              2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n",
        )
        .unwrap();
    let said = until(&mut client, "0\r\n\r\n");
    assert!(!said.to_lowercase().contains("x-sum"), "{said}");
}

#[test]
fn a_get_keeps_its_body() {
    let (host, _ports, control) = started();
    let (_client, mut guest, head) = asked(
        &host,
        &control,
        "GET http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    );
    assert!(has(&head, "transfer-encoding: chunked"), "{head}");
    assert_eq!(until(&mut guest, "\r\n\r\n"), "3\r\nabc\r\n0\r\n\r\n");
}

const PUT: &str =
    "PUT http://a/ HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";

#[test]
fn a_body_that_is_expected_is_asked_for_when_the_server_wants_it() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, head) = asked(&host, &control, PUT);
    assert!(has(&head, "expect: 100-continue"), "{head}");
    guest.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
    assert_eq!(
        next_head(&mut client).unwrap(),
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    client.write_all(b"hi").unwrap();
    until(&mut guest, "hi");
    guest.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
    assert!(next_head(&mut client).unwrap().starts_with("HTTP/1.1 204 "));
}

#[test]
fn a_client_whose_request_is_refused_is_not_asked_for_the_body_that_is_expected() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, _) = asked(&host, &control, PUT);
    guest
        .write_all(b"HTTP/1.1 417 No\r\nContent-Length: 2\r\n\r\nno")
        .unwrap();
    let head = next_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 417 "), "{head}");
}

#[test]
fn a_server_that_knows_no_expectation_gets_the_body_all_the_same() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, _) = asked(&host, &control, PUT);
    assert_eq!(
        next_head(&mut client).unwrap(),
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    client.write_all(b"hi").unwrap();
    until(&mut guest, "hi");
}

#[test]
fn other_interim_answers_are_carried_ahead_of_the_final_one() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, _) = asked(
        &host,
        &control,
        "GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    );
    guest
        .write_all(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\nConnection: x\r\n\r\n",
        )
        .unwrap();
    // It does not wait for the final one.
    let hints = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n";
    assert_eq!(next_head(&mut client).unwrap(), hints);
    guest
        .write_all(
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        )
        .unwrap();
    assert_eq!(next_head(&mut client).unwrap(), hints);
    let said = rest(&mut client);
    assert!(
        said.starts_with("HTTP/1.1 200 OK\r\n") && said.ends_with("ok"),
        "{said}"
    );
}

#[test]
fn a_client_of_http_1_0_gets_no_interim_answer_and_no_client_waits_for_too_many() {
    let (host, _ports, control) = started();
    let hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n";
    let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let (mut client, mut guest, _) =
        asked(&host, &control, "GET http://a/ HTTP/1.0\r\nHost: a\r\n\r\n");
    guest.write_all(&[&hints[..], ok].concat()).unwrap();
    assert!(next_head(&mut client).unwrap().starts_with("HTTP/1.0 200 "));
    // As many as a guest likes do not pile up.
    let (host, _ports, control) = started();
    let (mut client, mut guest, _) =
        asked(&host, &control, "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
    let writer = std::thread::spawn(move || {
        for _ in 0..100_000 {
            guest.write_all(hints).unwrap();
        }
        guest.write_all(ok).unwrap();
        guest
    });
    let last = loop {
        let head = next_head(&mut client).unwrap();
        if !head.starts_with("HTTP/1.1 103 ") {
            break head;
        }
    };
    assert!(last.starts_with("HTTP/1.1 200 "), "{last}");
    until(&mut client, "ok");
    writer.join().unwrap();
}

#[test]
fn answers_without_a_body_keep_what_they_say_of_it() {
    for (method, status, fields, kept) in [
        ("HEAD", "200 OK", "Content-Length: 1000", true),
        ("HEAD", "200 OK", "ETag: \"1\"", true),
        ("GET", "204 No Content", "ETag: \"1\"", true),
        ("GET", "304 Not Modified", "ETag: \"1\"", true),
        ("GET", "200 OK", "Content-Length: 0", true),
        ("HEAD", "200 OK", "Transfer-Encoding: chunked", false),
    ] {
        let (host, _ports, control) = started();
        let request = format!("{method} http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
        let (mut client, mut guest, _) = asked(&host, &control, &request);
        write!(guest, "HTTP/1.1 {status}\r\n{fields}\r\n\r\n").unwrap();
        let head = next_head(&mut client).unwrap();
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{head}"
        );
        assert_eq!(has(&head, fields), kept, "{method} {status}: {head}");
        // Nothing comes behind it but the next answer.
        client
            .write_all(b"GET http://nobody/ HTTP/1.1\r\nHost: nobody\r\n\r\n")
            .unwrap();
        let head = next_head(&mut client).unwrap();
        assert!(
            head.starts_with("HTTP/1.1 404 "),
            "{method} {status}: {head}"
        );
    }
}

#[test]
fn an_encoded_body_is_left_as_it_is() {
    let (host, _ports, control) = started();
    let (mut client, mut guest, head) = asked(
        &host,
        &control,
        "GET http://a/ HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n",
    );
    assert!(has(&head, "accept-encoding: gzip"), "{head}");
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00")
        .unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    assert!(said.ends_with(b"\r\n\r\n\x1f\x8b\x08\x00"), "{said:?}");
    let answer = Answer::parse(&said).unwrap();
    assert!(
        has(&answer.head, "content-encoding: gzip"),
        "{}",
        answer.head
    );
}
