//! What a client hears of a VM: whether it may reach it, and what its guest says.

use std::io::{Read, Write};

use adit_port::control::{DialError, DialFailed};
use adit_port::control_io::Message;

use crate::host::{Answer, Host};

/// Asks with CONNECT, and hears the answer.
fn connect(host: &Host, to: &str) -> Answer {
    let mut client = host.proxy();
    write!(client, "CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    Answer::parse(&said).unwrap()
}

/// The whole answer but for the name and the time.
fn without(name: &str, answer: &Answer) -> (u16, Vec<String>, String) {
    let of = |text: &str| text.replace(name, "VM");
    let fields = answer.head.lines().filter(|l| !l.starts_with("date: "));
    (answer.status, fields.map(of).collect(), of(&answer.body))
}

#[test]
fn a_denial_does_not_tell_whether_the_vm_runs() {
    let (mut host, mut ports) = Host::new(&[("runs", 3), ("idle", 4)], "");
    drop(ports.pop());
    host.start();
    let _control = ports[0].connected();
    host.until("the other one has no port process", |h| {
        (h.get("/v1/vms/idle")["state"] == "down").then_some(())
    });
    for to in ["NAME:81", "vsock-80.NAME:80"] {
        let of = |name: &str| without(name, &connect(&host, &to.replace("NAME", name)));
        let (runs, idle) = (of("runs"), of("idle"));
        assert_eq!(runs, idle);
        assert_eq!(runs.0, 403);
    }
    // What is allowed tells.
    assert_eq!(connect(&host, "idle:80").status, 503);
}

#[test]
fn every_refusal_of_a_port_process_and_its_guest_is_an_answer() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.start();
    let control = ports[0].connected();
    let refused = |status, errno| (DialError::HelloRefused, status, errno);
    for ((error, status, errno), heard) in [
        (
            (DialError::NoSession, 0, 0),
            (503, "destination_unavailable", true),
        ),
        (
            (DialError::Refused, 0, 0),
            (503, "destination_unavailable", true),
        ),
        (
            (DialError::Timeout, 0, 0),
            (504, "connection_timeout", false),
        ),
        (
            (DialError::Reset, 0, 0),
            (502, "connection_terminated", false),
        ),
        (
            (DialError::Foreign, 0, 0),
            (502, "http_protocol_error", false),
        ),
        (
            (DialError::Busy, 0, 0),
            (503, "connection_limit_reached", true),
        ),
        (refused(1, 0), (502, "connection_refused", false)),
        (refused(2, 0), (403, "http_request_denied", false)),
        (refused(3, 0), (403, "http_request_denied", false)),
        (refused(4, 111), (502, "connection_refused", false)),
        (refused(4, 110), (504, "connection_timeout", false)),
        (refused(4, 0), (502, "connection_refused", false)),
        (refused(4, u16::MAX), (502, "connection_refused", false)),
        (refused(5, 24), (503, "connection_limit_reached", true)),
        (refused(6, 0), (502, "connection_refused", false)),
        // Of a newer guest.
        (refused(7, 0), (502, "connection_refused", false)),
        (
            refused(u16::MAX, u16::MAX),
            (502, "connection_refused", false),
        ),
    ] {
        let mut client = host.proxy();
        client
            .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
            .unwrap();
        let failed = DialFailed {
            id: control.dial().id,
            error,
            status,
            errno,
            text: "\x1b[2Jwhy\r\nX-Y: z ".repeat(3000),
        };
        control.say(&Message::DialFailed(failed), None);
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        assert!(said.len() < 8 << 10, "{} bytes", said.len());
        let answer = Answer::parse(&said).unwrap();
        let (is, word, later) = heard;
        assert_eq!(answer.status, is, "{error:?} {status} {errno}");
        let error = format!("proxy-status: adit; error={word};");
        assert!(answer.head.contains(&error), "{}", answer.head);
        assert_eq!(answer.head.contains("\r\nretry-after: 1"), later);
        assert!(!answer.head.contains("\r\nx-y"), "{}", answer.head);
        answer.assert_cause_and_remedy();
    }
}

#[test]
fn a_service_that_the_guest_names_is_reached_where_grant_and_vm_allow_it_in_every_spelling() {
    let grants =
        "[[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach:80,svc:docker\", \"see\"]\n";
    let (host, ports) = Host::serving(&[("a", 3)], grants);
    let control = ports[0].connected();
    let denied = connect(&host, "docker.a.svc:1");
    assert_eq!(denied.status, 403, "{}", denied.body);
    assert!(denied.body.contains("`allow_services`"), "{}", denied.body);
    let status = host.reload(|text| text + "allow_services = [\"docker\", \"other\"]\n");
    assert_eq!(status["error"], serde_json::Value::Null, "{status}");
    assert_eq!(host.get("/v1/vms/a")["allow_services"][0], "docker");
    let asked = |head: String| {
        let mut client = host.proxy();
        client.write_all(head.as_bytes()).unwrap();
        let dial = control.dial();
        control.say(
            &Message::DialFailed(DialFailed {
                id: dial.id,
                error: DialError::HelloRefused,
                status: 2,
                errno: 0,
                text: "this agent serves tcp:PORT, ping, blob".into(),
            }),
            None,
        );
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        (format!("{:?}", dial.to), Answer::parse(&said).unwrap())
    };
    for head in [
        "CONNECT docker.a.svc:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT Docker.A.svc.adit:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://docker.a.svc/containers HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: docker.a.svc\r\nConnection: close\r\n\r\n",
    ] {
        let (to, answer) = asked(head.into());
        assert!(to.contains("svc:docker"), "{to}");
        // An agent of before says that it has no such service.
        assert_eq!(answer.status, 403, "{}", answer.body);
        assert!(
            answer.body.contains("service `svc:docker`")
                && answer.body.contains("this agent serves"),
            "{}",
            answer.body
        );
    }
    let denied = connect(&host, "other.a.svc:1");
    assert!(
        denied.status == 403 && denied.body.contains("no grant"),
        "{}",
        denied.body
    );
    assert_eq!(connect(&host, "docker.nobody.svc:1").status, 404);
}
