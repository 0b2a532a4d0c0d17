//! Connections to a guest's server that are used again.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use adit_port::control_io::Message;

use crate::host::{Answer, Control, Host, Port};
use crate::server::{Then, get, ok, serve, two, until};

fn started(more: &str) -> (Host, Vec<Port>) {
    let (host, ports) = Host::serving(&[("a", 3)], more);
    (host, ports)
}

/// A second handle of the control socket, for what is said while the server has the first.
fn second(control: &Control) -> Control {
    control.try_clone().unwrap()
}

fn post(client: &mut impl Write) {
    client
        .write_all(b"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        .unwrap();
}

/// Asks, for a server that closes.
fn whole(host: &Host) -> Answer {
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    Answer::parse(&said).unwrap()
}

#[test]
fn a_hundred_requests_of_one_client_are_one_dial() {
    let (host, ports) = started("");
    let counts = serve(ports[0].connected(), ok);
    let mut client = host.proxy();
    for _ in 0..100 {
        assert!(get(&mut client).starts_with("HTTP/1.1 200 "));
    }
    assert_eq!(counts.dials(), 1);
}

#[test]
fn requests_of_a_hundred_clients_one_after_the_other_are_one_dial() {
    let (host, ports) = started("");
    // Every way in which a body may end.
    let n = AtomicUsize::new(0);
    let counts = serve(ports[0].connected(), move |stream, _| {
        let answers = [
            "Content-Length: 2\r\n\r\nok",
            "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "Content-Length: 0\r\n\r\n",
            "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n",
        ];
        let answer = answers[n.fetch_add(1, Ordering::SeqCst) % answers.len()];
        write!(stream, "HTTP/1.1 200 OK\r\n{answer}").unwrap();
        Then::GoOn
    });
    for _ in 0..100 {
        assert_eq!(whole(&host).status, 200);
    }
    assert_eq!(counts.dials(), 1);
}

#[test]
fn a_connection_that_its_server_closed_is_not_used_again() {
    let (host, ports) = started("");
    let counts = serve(ports[0].connected(), |stream, head| {
        ok(stream, head);
        Then::End
    });
    for n in 1..=20 {
        assert_eq!(whole(&host).body, "ok");
        assert_eq!(counts.dials(), n);
        host.until("its stream ends", |_| (counts.open() == 0).then_some(()));
    }
}

#[test]
fn a_request_that_met_a_closing_connection_is_made_once_more_over_a_new_one() {
    for then in [Then::End, Then::BreakOff] {
        let (host, ports) = started("");
        let n = AtomicUsize::new(0);
        let counts = serve(ports[0].connected(), move |stream, head| {
            // As if the server had closed before the second came.
            match n.fetch_add(1, Ordering::SeqCst) {
                1 => then,
                _ => ok(stream, head),
            }
        });
        let mut client = host.proxy();
        for _ in 0..2 {
            assert!(get(&mut client).starts_with("HTTP/1.1 200 "), "{then:?}");
        }
        assert_eq!(counts.dials(), 2, "{then:?}");
    }
}

#[test]
fn a_server_that_tires_of_waiting_as_a_request_comes_is_asked_once_more() {
    let (host, ports) = started("");
    let n = AtomicUsize::new(0);
    let counts = serve(ports[0].connected(), move |stream, head| {
        match n.fetch_add(1, Ordering::SeqCst) {
            1 => {
                let tired = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                stream.write_all(tired).unwrap();
                Then::End
            }
            _ => ok(stream, head),
        }
    });
    for _ in 0..2 {
        assert_eq!(whole(&host).status, 200);
    }
    assert_eq!(counts.dials(), 2);
}

#[test]
fn a_request_is_not_made_a_third_time() {
    let (host, ports) = started("");
    let n = AtomicUsize::new(0);
    let counts = serve(ports[0].connected(), move |stream, head| {
        match n.fetch_add(1, Ordering::SeqCst) {
            0 => ok(stream, head),
            _ => Then::End,
        }
    });
    assert_eq!(whole(&host).status, 200);
    let answer = whole(&host);
    assert_eq!(answer.status, 502);
    assert!(answer.head.contains("http_response_incomplete"));
    assert_eq!(counts.dials(), 2);
}

#[test]
fn a_request_whose_answer_began_is_not_made_again() {
    let (host, ports) = started("");
    let n = AtomicUsize::new(0);
    let counts = serve(ports[0].connected(), move |stream, head| {
        match n.fetch_add(1, Ordering::SeqCst) {
            1 => {
                stream.write_all(b"HTTP/1.1 2").unwrap();
                Then::End
            }
            _ => ok(stream, head),
        }
    });
    assert_eq!(whole(&host).status, 200);
    assert_eq!(whole(&host).status, 502);
    assert_eq!(counts.dials(), 1);
}

#[test]
fn what_may_not_be_made_twice_has_a_connection_of_its_own() {
    let (host, ports) = started("");
    let counts = serve(ports[0].connected(), |stream, head| {
        if head.starts_with("POST") {
            until(stream, "hi");
        }
        ok(stream, head)
    });
    let mut client = host.proxy();
    get(&mut client);
    for n in 2..5 {
        post(&mut client);
        two(&mut client);
        assert_eq!(counts.dials(), n);
    }
    // Each took the place of the one that waited, and a request without a body uses what it left.
    host.until("one waits", |_| (counts.open() == 1).then_some(()));
    get(&mut client);
    assert_eq!(counts.dials(), 4);
}

#[test]
fn what_a_server_closes_or_knows_as_one_clients_is_not_used_again() {
    for (head, version) in [
        ("Connection: close\r\n", "1.1"),
        ("Connection: keep-alive\r\n", "1.0"),
        ("WWW-Authenticate: NTLM\r\n", "1.1"),
        ("WWW-Authenticate: Negotiate\r\n", "1.1"),
    ] {
        let (host, ports) = started("");
        let counts = serve(ports[0].connected(), move |stream, _| {
            write!(
                stream,
                "HTTP/{version} 401 No\r\n{head}Content-Length: 2\r\n\r\nno"
            )
            .unwrap();
            Then::GoOn
        });
        for n in 1..4 {
            assert_eq!(whole(&host).status, 401);
            assert_eq!(counts.dials(), n, "{head}");
        }
        host.until("the streams end", |_| (counts.open() == 0).then_some(()));
    }
}

#[test]
fn a_connection_that_waits_is_no_request_under_way() {
    let (host, ports) = started("[limits]\nrequests_per_vm = 1");
    let counts = serve(ports[0].connected(), |stream, head| {
        if head.starts_with("POST") {
            until(stream, "hi");
        }
        ok(stream, head)
    });
    assert_eq!(whole(&host).status, 200);
    assert_eq!(counts.open(), 1, "it waits");
    let mut client = host.proxy();
    for _ in 0..4 {
        post(&mut client);
        assert!(two(&mut client).starts_with("HTTP/1.1 200 "));
    }
}

#[test]
fn few_connections_wait_and_not_for_long() {
    let (host, ports) = started("[limits]\nrequests_per_vm = 100");
    // All of them are asked before one is answered.
    let all = std::sync::Arc::new(std::sync::Barrier::new(40));
    let counts = serve(ports[0].connected(), move |stream, head| {
        all.wait();
        ok(stream, head)
    });
    let mut clients: Vec<_> = (0..40).map(|_| host.proxy()).collect();
    for client in &mut clients {
        client
            .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
    }
    for client in &mut clients {
        two(client);
    }
    assert_eq!(counts.dials(), 40);
    host.until("most of them end", |_| (counts.open() <= 16).then_some(()));
    host.until("all of them end", |_| (counts.open() == 0).then_some(()));
}

#[test]
fn r108_connections_that_wait_leave_descriptors_to_others() {
    let (mut host, ports) = Host::new(&[("a", 3)], "[limits]\nrequests_per_vm = 100");
    host.start_with(128);
    let counts = serve(ports[0].connected(), ok);
    for _ in 0..5 {
        let mut clients: Vec<_> = (0..12).map(|_| host.proxy()).collect();
        for client in &mut clients {
            client
                .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
                .unwrap();
        }
        // Some may hear that descriptors are short: those of the round before may not be closed yet.
        for client in &mut clients {
            two(client);
        }
    }
    // A quarter of the requests that there is room for.
    host.until("few wait", |_| (counts.open() <= 7).then_some(()));
    // As soon as the client's own connections are seen to be closed.
    host.until("it is served", |h| (whole(h).status == 200).then_some(()));
    assert_eq!(host.api("GET", "/healthz", "").status, 200);
}

/// What a connection that waits leads to is no longer there: the next request is dialled.
#[test]
fn another_session_another_port_process_or_another_vm_gets_no_old_connection() {
    let (host, ports) = started("");
    let control = ports[0].connected();
    let other = second(&control);
    let counts = serve(control, ok);
    whole(&host);
    // The guest has booted anew; its old streams still look open.
    let mut status = ports[0].status(true);
    status.epoch = 2;
    other.say(&Message::Status(status.clone()), None);
    host.until("the session is new", |h| {
        (h.get("/v1/vms/a")["epoch"] == 2).then_some(())
    });
    whole(&host);
    assert_eq!(counts.dials(), 2);
    // It is paused: whoever asks is told so by the dial.
    status.session = false;
    other.say(&Message::Status(status), None);
    host.until("the session is gone", |h| {
        (h.get("/v1/vms/a")["state"] == "waiting").then_some(())
    });
    whole(&host);
    assert_eq!(counts.dials(), 3);
    // Another port process; the streams of the old one still look open.
    rustix::net::shutdown(&other.0, rustix::net::Shutdown::Both).unwrap();
    let newer = serve(ports[0].connected(), ok);
    host.until("the new one serves", |h| {
        (h.get("/v1/vms/a")["state"] == "up").then_some(())
    });
    assert_eq!(whole(&host).status, 200);
    assert_eq!(newer.dials(), 1);
}

#[test]
fn a_removed_vms_connections_are_closed() {
    let (host, ports) = started("");
    drop(ports);
    let port = host.port("b", 9);
    let added = host.api(
        "POST",
        "/v1/vms",
        r#"{"name": "b", "cid": 9, "allow": [80]}"#,
    );
    assert!((200..300).contains(&added.status), "{}", added.body);
    let counts = serve(port.connected(), ok);
    host.until("it serves", |h| {
        (h.get("/v1/vms/b")["state"] == "up").then_some(())
    });
    let mut client = host.proxy();
    client
        .write_all(b"GET http://b/ HTTP/1.1\r\nHost: b\r\n\r\n")
        .unwrap();
    two(&mut client);
    assert_eq!(counts.open(), 1);
    assert_eq!(host.api("DELETE", "/v1/vms/b", "").status / 100, 2);
    host.until("it is closed", |_| (counts.open() == 0).then_some(()));
}

/// A client that leaves in the middle of an answer leaves nothing that could be used again.
#[test]
fn a_connection_whose_answer_was_not_read_to_its_end_is_not_used_again() {
    let (host, ports) = started("");
    let counts = serve(ports[0].connected(), |stream: &mut UnixStream, _| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
        let piece = [b'x'; 1000];
        while let Ok(()) = stream.write_all(&piece) {}
        Then::End
    });
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let mut some = [0; 500];
    client.read_exact(&mut some).unwrap();
    drop(client);
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    client.read_exact(&mut some).unwrap();
    assert!(some.starts_with(b"HTTP/1.1 200 "));
    assert_eq!(counts.dials(), 2);
}
