//! Answers of a guest's server that two readers could read differently, and answers that come before their requests are whole.

use std::io::{Read, Write};
use std::time::Duration;

use crate::host::{Answer, Host};
use crate::server::{Then, next_head, serve, until};

/// What two clients get of an answer each, and how many connections to the server that took.
fn asked_twice(method: &str, answer: String) -> (Vec<Answer>, usize) {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let counts = serve(ports[0].connected(), move |stream, _| {
        stream.write_all(answer.as_bytes()).unwrap();
        Then::GoOn
    });
    let said = [(); 2].map(|()| {
        let mut client = host.proxy();
        write!(
            client,
            "{method} http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        Answer::parse(&said).unwrap()
    });
    (said.into(), counts.dials())
}

#[test]
fn r65_an_answer_with_chunks_and_a_length_has_its_chunks_and_is_its_connections_last() {
    for length in [2, 9] {
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        );
        let (said, dials) = asked_twice("GET", answer);
        for answer in said {
            assert_eq!(answer.status, 200);
            assert!(!answer.head.contains("content-length"), "{}", answer.head);
            assert!(answer.head.contains("transfer-encoding: chunked"));
            assert_eq!(answer.body, "hello");
        }
        assert_eq!(dials, 2);
    }
}

#[test]
fn r65_a_length_that_an_answer_says_twice_is_said_once() {
    for method in ["GET", "HEAD"] {
        for length in ["5, 5", "5\r\nContent-Length: 5"] {
            let body = if method == "GET" { "hello" } else { "" };
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
            let (said, dials) = asked_twice(method, answer);
            for answer in said {
                let lengths: Vec<_> = answer.head.matches("content-length: 5\r\n").collect();
                assert_eq!(lengths.len(), 1, "{}", answer.head);
                assert_eq!(answer.body, body);
            }
            assert_eq!(dials, 1);
        }
    }
}

#[test]
fn r65_an_answer_that_has_no_one_end_is_none() {
    for (method, fields) in [
        ("GET", "Transfer-Encoding: gzip, chunked"),
        ("GET", "Transfer-Encoding: gzip"),
        (
            "GET",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        ),
        ("GET", "Transfer-Encoding: chunked;q=1"),
        ("GET", "Content-Length: +5"),
        ("GET", "Content-Length: 5, 6"),
        ("HEAD", "Content-Length: 5\r\nContent-Length: 6"),
        ("HEAD", "Content-Length: x"),
    ] {
        let (said, _) = asked_twice(method, format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n"));
        for answer in said {
            assert_eq!(answer.status, 502, "{method} {fields}: {}", answer.head);
        }
    }
}

/// The client sends no more of its body, or the server takes no more of it.
#[test]
fn r110_an_upload_that_rests_after_its_answer_is_given_up_and_counts_until_then() {
    for body in [&b"hi"[..], &[b'x'; 8 << 20]] {
        let (host, ports) =
            Host::serving(&[("a", 3)], "[limits]\nrequests_per_vm = 1\nresponse_s = 2");
        let control = ports[0].connected();
        let mut client = host.proxy();
        write!(
            client,
            "POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n"
        )
        .unwrap();
        let (mut guest, _) = control.tunnel();
        next_head(&mut guest).unwrap();
        guest
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
            .unwrap();
        until(&mut client, "\r\n\r\nno");
        let mut other = host.proxy();
        write!(
            other,
            "GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut said = Vec::new();
        other.read_to_end(&mut said).unwrap();
        assert_eq!(Answer::parse(&said).unwrap().status, 503);
        let sending = std::thread::spawn({
            let mut client = client.try_clone().unwrap();
            move || drop(client.write_all(body))
        });
        // The client hears that the connection ends; what it sends meanwhile is thrown away.
        client
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        sending.join().unwrap();
        host.until("the stream ends", |_| {
            adit_channel::socket_end::is_closed(&guest).then_some(())
        });
    }
}

/// A server that changes to another protocol in the middle of an upload gets the rest of it first.
#[test]
fn a_body_that_is_under_way_ends_before_another_protocol_begins() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    write!(
        client,
        "POST http://a/ HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nConnection: Upgrade\r\nContent-Length: 10\r\n\r\n12345"
    )
    .unwrap();
    let (mut guest, _) = control.tunnel();
    until(&mut guest, "\r\n\r\n12345");
    guest
        .write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nfirst",
        )
        .unwrap();
    let head = next_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    client.write_all(b"67890there").unwrap();
    assert_eq!(until(&mut guest, "there"), "67890there");
    guest.write_all(b"back").unwrap();
    assert_eq!(until(&mut client, "back"), "firstback");
}
