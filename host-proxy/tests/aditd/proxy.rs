//! The proxy as a client and a port process see it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use adit_port::control::{DialError, DialFailed};
use adit_port::control_io::Message;

use crate::host::{Answer, Host};

/// Reads until the end of a header.
pub fn head(stream: &mut impl Read) -> String {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

/// Waits for the end of a stream.
pub fn drained(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_tunnel_gets_bytes_sent_before_the_answer_and_outlives_aditd() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\nahead")
        .unwrap();
    let (mut guest, prefix) = control.tunnel();
    assert_eq!(prefix, b"ahead");
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    host.kill();
    client.write_all(b"up").unwrap();
    let mut two = [0; 2];
    guest.read_exact(&mut two).unwrap();
    guest.write_all(b"down").unwrap();
    let mut four = [0; 4];
    client.read_exact(&mut four).unwrap();
    assert_eq!((&two, &four), (b"up", b"down"));
}

#[test]
fn an_absolute_form_request_reaches_the_guest_without_the_hops_headers() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client
        .write_all(
            b"POST http://a?q=1 HTTP/1.1\r\nHost: evil\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\n\
              Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        )
        .unwrap();
    let (mut guest, _) = control.tunnel();
    let got = head(&mut guest).to_lowercase();
    assert!(got.starts_with("post /?q=1 http/1.1\r\n"), "{got}");
    assert!(
        got.contains("host: a\r\n") && got.contains("via: 1.1 adit\r\n"),
        "{got}"
    );
    for gone in ["evil", "x-hop", "authorization", "connection"] {
        assert!(!got.contains(gone), "{got}");
    }
    let mut body = [0; 13];
    guest.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"3\r\nabc\r\n0\r\n\r\n");
    guest
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nkeep-alive: 5\r\n\r\nok")
        .unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    let answer = Answer::parse(&said).unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, "ok"));
    assert!(!answer.head.contains("keep-alive"), "{}", answer.head);
}

#[test]
fn a_wrong_token_is_refused_also_by_a_host_that_has_none_and_lets_anyone_in() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    for method in ["GET http://a/", "CONNECT a:80"] {
        let mut client = host.proxy();
        let request = format!(
            "{method} HTTP/1.1\r\nHost: a:80\r\nProxy-Authorization: Basic eA==\r\nConnection: close\r\n\r\n"
        );
        client.write_all(request.as_bytes()).unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        let answer = Answer::parse(&said).unwrap();
        assert_eq!(answer.status, 407, "{method}: {}", answer.body);
        let lines: Vec<_> = answer.body.lines().collect();
        assert!(
            lines.len() == 2 && lines[1].contains("--proxy-user"),
            "{lines:?}"
        );
    }
}

#[test]
fn r71_a_client_that_leaves_ends_its_stream() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/never HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    // As with curl --max-time: the guest has not answered, and nobody waits for it any more.
    drop(client);
    assert!(drained(&mut guest), "the guest's stream goes on");
}

#[test]
fn r71_a_client_that_leaves_during_a_dial_cancels_it() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
        .unwrap();
    let dial = control.dial();
    drop(client);
    control.cancelled(dial.id);
}

#[test]
fn r62_a_port_process_of_another_cid_is_not_this_vms() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let _control = ports[0].connected_as(4);
    let vm = host.until("the fault is shown", |h| {
        let vm = h.get("/v1/vms/a");
        vm["fault"].as_str().map(str::to_owned)
    });
    assert!(vm.contains("CID 4") && vm.contains("CID 3"), "{vm}");
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
        .unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 503 "));
}

#[test]
fn r72_control_characters_in_a_guests_text_do_not_reach_the_terminal() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
        .unwrap();
    let failed = DialFailed {
        id: control.dial().id,
        error: DialError::HelloRefused,
        status: 4,
        errno: 111,
        text: "a\x1b[2Jb\r\nc".into(),
    };
    control.say(&Message::DialFailed(failed), None);
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    let answer = Answer::parse(&said).unwrap();
    assert_eq!(answer.status, 502);
    answer.assert_cause_and_remedy();
}

#[test]
fn r64_a_plain_port_refuses_an_invalid_second_port() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    for port in ["0", "65536", "+80", "080"] {
        let mut client = host.proxy();
        write!(
            client,
            "CONNECT vsock-5000.a:{port} HTTP/1.1\r\nHost: a\r\n\r\n"
        )
        .unwrap();
        assert!(head(&mut client).starts_with("HTTP/1.1 400 "), "{port}");
    }
}

#[test]
fn a_stop_lets_a_running_request_finish() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    host.terminate();
    host.until("it stops", |h| {
        h.log().contains("told to stop").then_some(())
    });
    guest
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        .unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    assert_eq!(Answer::parse(&said).unwrap().body, "ok");
    assert!(host.ended());
}
