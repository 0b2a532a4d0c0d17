//! Clients of HTTP/2: what HTTP/1.1 has, in streams.

use std::io::{Read, Write};
use std::net::Shutdown;

use adit_api::token;
use adit_port::control::{DialError, DialFailed};
use adit_port::control_io::Message;
use h2::Reason;
use hyper::header::HeaderMap;

use rustls::version::{TLS12, TLS13};
use std::sync::Arc;
use tokio_rustls::TlsConnector;

use crate::access::{UID, audit, grant};
use crate::h2client::{Client, runtime};
use crate::host::{Host, NO_GRANTS};
use crate::limits::{proxy, silent};
use crate::proxy::{drained, head};
use crate::tls::{Files, tcp};

fn text<'a>(fields: &'a HeaderMap, name: &str) -> &'a str {
    fields.get(name).map_or("", |value| value.to_str().unwrap())
}

#[test]
fn a_connect_is_a_tunnel_and_each_sides_end_is_passed_on() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut stream = client.connect("a:80");
    // Ahead of the answer.
    stream.say(b"ahead", false);
    let (mut guest, prefix) = control.tunnel();
    assert!(prefix.is_empty());
    let (status, fields) = stream.head();
    assert_eq!(status, 200);
    assert!(!text(&fields, "date").is_empty());
    assert!(!fields.contains_key("content-length") && !fields.contains_key("transfer-encoding"));
    let mut five = [0; 5];
    guest.read_exact(&mut five).unwrap();
    assert_eq!(&five, b"ahead");
    // Another stream, while this one is there.
    let mut other = client.connect("a:80");
    let (mut of_other, _) = control.tunnel();
    assert_eq!(other.status(), 200);
    of_other.write_all(b"first").unwrap();
    assert_eq!(other.exactly(5), b"first");

    stream.say(b"up", true);
    let mut rest = Vec::new();
    guest.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"up");
    guest.write_all(b"down").unwrap();
    assert_eq!(stream.exactly(4), b"down");
    guest.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.rest().unwrap(), "");

    // The other way round.
    of_other.write_all(b"last").unwrap();
    of_other.shutdown(Shutdown::Write).unwrap();
    assert_eq!(other.rest().unwrap(), "last");
    other.say(b"more", true);
    rest.clear();
    of_other.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"more");
}

#[test]
fn r71_what_breaks_off_is_reset_towards_either_side() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    // The VM's side: closed without an end.
    let mut stream = client.connect("a:80");
    let (guest, _) = control.tunnel();
    assert_eq!(stream.status(), 200);
    drop(guest);
    assert_eq!(stream.reset(), Reason::CONNECT_ERROR);
    // The client's.
    let mut stream = client.connect("a:80");
    let (mut guest, _) = control.tunnel();
    assert_eq!(stream.status(), 200);
    stream.send.send_reset(Reason::CANCEL);
    assert!(drained(&mut guest));
    assert!(guest.write_all(b"x").is_err(), "nobody reads it");
    // The client's, after it has ended its sending.
    let mut stream = client.connect("a:80");
    let (mut guest, _) = control.tunnel();
    assert_eq!(stream.status(), 200);
    stream.say(b"", true);
    assert!(drained(&mut guest));
    stream.send.send_reset(Reason::CANCEL);
    host.until("the guest's stream is over", |_| {
        guest.write_all(b"x").is_err().then_some(())
    });
    // The whole connection.
    let mut stream = client.connect("a:80");
    let (mut guest, _) = control.tunnel();
    assert_eq!(stream.status(), 200);
    drop((stream, client));
    assert!(drained(&mut guest));
}

#[test]
fn r71_a_client_that_gives_up_during_a_dial_cancels_it() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut stream = client.connect("a:80");
    let dial = control.dial();
    stream.send.send_reset(Reason::CANCEL);
    control.cancelled(dial.id);
    // The connection goes on.
    assert_eq!(client.get("http://x/").status(), 404);
}

#[test]
fn requests_are_made_anew_in_http_1_1_and_answered() {
    let digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
    let token = format!("[[token]]\nname = \"ci\"\nsha256 = \"{digest}\"\n");
    let (host, ports) = Host::serving(&[("a", 3)], &token);
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let fields = [
        ("proxy-authorization", "Bearer x"),
        ("x-own", "1"),
        ("cookie", "a=1"),
        ("cookie", "b=2"),
        ("te", "trailers"),
    ];
    let mut stream = client.ask("POST", "http://a/p?q=1", &fields, false);
    stream.say(b"abc", true);
    let (mut guest, _) = control.tunnel();
    let got = head(&mut guest);
    assert!(got.starts_with("POST /p?q=1 HTTP/1.1\r\n"), "{got}");
    for line in [
        "Host: a\r\n",
        "Via: 2.0 adit\r\n",
        "X-Own: 1\r\n",
        "Cookie: a=1; b=2\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Te: trailers\r\n",
    ] {
        assert!(got.contains(line), "{line}: {got}");
    }
    assert!(!got.to_lowercase().contains("authorization"), "{got}");
    let mut body = [0; 13];
    guest.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"3\r\nabc\r\n0\r\n\r\n");
    guest
        .write_all(
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n\
              HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\nKeep-Alive: 5\r\n\
              Connection: keep-alive\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n",
        )
        .unwrap();
    assert_eq!(stream.interim().map(|s| s.as_u16()), Some(103));
    let (status, fields) = stream.head();
    assert_eq!(status, 200);
    assert_eq!(text(&fields, "via"), "1.1 adit");
    assert!(!fields.contains_key("keep-alive") && !fields.contains_key("connection"));
    assert_eq!(stream.rest().unwrap(), "ok");
    assert_eq!(text(&stream.trailers().unwrap(), "x-sum"), "7");

    // Over the same connection to the guest, which waits now.
    let mut stream = client.ask("HEAD", "http://A.adit/", &[("host", "a.ADIT")], true);
    let got = head(&mut guest);
    assert!(got.starts_with("HEAD / HTTP/1.1\r\n"), "{got}");
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        .unwrap();
    let (status, fields) = stream.head();
    assert_eq!((status, text(&fields, "content-length")), (200, "1000"));
    assert_eq!(stream.rest().unwrap(), "");
}

#[test]
fn a_body_is_asked_for_where_its_client_waits_for_that() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let fields = [("expect", "100-continue"), ("content-length", "3")];
    let mut stream = client.ask("PUT", "http://a/", &fields, false);
    let (mut guest, _) = control.tunnel();
    let got = head(&mut guest).to_lowercase();
    assert!(got.contains("expect: 100-continue\r\n"), "{got}");
    assert!(got.contains("content-length: 3\r\n"), "{got}");
    guest.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
    assert_eq!(stream.interim().map(|s| s.as_u16()), Some(100));
    stream.say(b"abc", true);
    let mut body = [0; 3];
    guest.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"abc");
    guest.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
    assert_eq!(stream.interim(), None);
    assert_eq!(stream.status(), 204);
}

#[test]
fn an_answer_that_breaks_off_is_reset_and_one_that_never_begins_is_refused() {
    let (host, ports) = Host::serving(&[("a", 3)], "[limits]\nresponse_s = 1");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut stream = client.get("http://a/");
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        .unwrap();
    assert_eq!(stream.status(), 200);
    assert_eq!(stream.exactly(4), b"half");
    drop(guest);
    assert_eq!(
        stream.rest().unwrap_err().reason(),
        Some(Reason::INTERNAL_ERROR)
    );
    let mut stream = client.get("http://a/");
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    let (status, fields) = stream.head();
    assert_eq!(status, 504);
    let said = text(&fields, "proxy-status");
    assert!(said.contains("error=http_response_timeout"), "{said}");
}

#[test]
fn refusals_say_what_they_say_in_http_1_1() {
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    for (mut stream, expected, error) in [
        (client.connect("x:80"), 404, "destination_not_found"),
        (client.connect("a:22"), 403, "http_request_denied"),
        (client.connect("a:080"), 400, "http_request_error"),
        (client.connect("b:80"), 503, "destination_unavailable"),
        (client.get("http://x/"), 404, "destination_not_found"),
        (client.get("https://a/"), 400, "http_request_error"),
        (client.get("ftp://a/"), 400, "http_request_error"),
        (client.get("http://u@a/"), 400, "http_request_error"),
    ] {
        let (status, fields) = stream.head();
        let said = text(&fields, "proxy-status");
        assert_eq!(status, expected, "{said}");
        assert!(
            said.starts_with(&format!("adit; error={error}; ")),
            "{said}"
        );
        assert!(!fields.contains_key("connection"));
        let line = stream.rest().unwrap();
        assert!(line.ends_with('\n'), "{line}");
        let len = text(&fields, "content-length");
        assert_eq!(len, line.len().to_string());
    }
    let mut stream = client.connect("a:80");
    let dial = control.dial();
    let failed = DialFailed {
        id: dial.id,
        error: DialError::Busy,
        status: 0,
        errno: 0,
        text: String::new(),
    };
    control.say(&Message::DialFailed(failed), None);
    let (status, fields) = stream.head();
    assert_eq!(status, 503);
    assert!(fields.contains_key("retry-after"), "{fields:?}");
    let mut stream = client.ask(
        "OPTIONS",
        "/",
        &[("host", "a"), ("max-forwards", "0")],
        true,
    );
    let (status, fields) = stream.head();
    assert_eq!(status, 200);
    assert!(text(&fields, "allow").contains("CONNECT"));
}

#[test]
fn r125_each_stream_says_itself_who_asks() {
    let token = token::sha256(b"secret");
    let sha256: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
    let more = format!(
        "[[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n{}",
        grant("\"token:ci\"", "\"a\"", "\"reach\"")
    );
    let (host, ports) = Host::serving(&[("a", 3)], &more);
    let control = ports[0].connected();
    let client = Client::new(host.tcp("proxy.addr", [127, 0, 0, 9]));
    let with = |token: &str| {
        let shown = format!("Bearer {token}");
        client.ask("CONNECT", "a:80", &[("proxy-authorization", &shown)], false)
    };
    let mut right = with("secret");
    let (_guest, _) = control.tunnel();
    assert_eq!(right.status(), 200);
    assert_eq!(with("wrong").status(), 407);
    // Nothing of the stream before is this one's.
    assert_ne!(client.connect("a:80").status(), 200);
    let lines = audit(&host, 2);
    assert!(
        lines.iter().any(|line| line["reason"] == "bad-token"),
        "{lines:?}"
    );
}

#[test]
fn r125_an_unknown_vm_and_a_forbidden_one_look_alike() {
    let (host, ports) = Host::serving(&[("a", 3)], NO_GRANTS);
    let _control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut said = ["a", "x"].map(|vm| {
        let mut stream = client.connect(&format!("{vm}:80"));
        let (status, mut fields) = stream.head();
        fields.remove("date");
        let vm = format!("`{vm}`");
        let body = stream.rest().unwrap().replace(&vm, "VM");
        let fields = format!("{fields:?}").replace(&vm, "VM");
        (status, fields, body)
    });
    said.sort();
    assert_eq!(said[0], said[1]);
    assert_eq!(said[0].0, 404);
    assert_eq!(audit(&host, 2).len(), 2);
}

#[test]
fn r110_streams_take_what_connections_take() {
    let more = "[limits]\nconnections = 40\nconnections_per_client = 5\nrequests_per_vm = 30";
    let (host, ports) = Host::serving(&[("a", 3)], more);
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut tunnels: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = client.connect("a:80");
            let tunnel = control.tunnel();
            assert_eq!(stream.status(), 200);
            (stream, tunnel)
        })
        .collect();
    // Nor over a connection of its own; and others have theirs.
    let mut said = Vec::new();
    let mut http_11 = host.proxy();
    let _ = http_11.write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n");
    let _ = http_11.read_to_end(&mut said);
    assert!(said.starts_with(b"HTTP/1.1 503 "), "{said:?}");
    let other = Client::new(silent(&proxy(&host), UID));
    let mut stream = other.connect("a:80");
    let _tunnel = control.tunnel();
    assert_eq!(stream.status(), 200);
    // What is given back is had again.
    tunnels.pop();
    host.until("there is room again", |_| {
        let mut stream = client.try_ask("GET", "http://x/", &[], true).unwrap();
        (stream.status() == 404).then_some(())
    });
}

#[test]
fn r110_a_stream_whose_vm_takes_nothing_holds_up_no_other_of_its_connection() {
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let client = Client::new(host.proxy());
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let mut stream = client.connect("a:80");
        let tunnel = a.tunnel();
        assert_eq!(stream.status(), 200);
        // As much as the window takes: it waits in the client, too.
        stream.say(&vec![0; 1 << 20], false);
        stalled.push((stream, tunnel));
    }
    let mut stream = client.connect("b:80");
    let (mut guest, _) = b.tunnel();
    assert_eq!(stream.status(), 200);
    let many = vec![7; 1 << 20];
    stream.say(&many, true);
    let mut got = Vec::new();
    guest.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), many.len());
}

#[test]
fn over_tls_both_sides_agree_on_http_2_and_the_vm_may_be_called_https() {
    let files = Files::new();
    let (host, ports) = Host::serving(&[("a", 3)], &files.listen("http", ""));
    let control = ports[0].connected();
    for (version, offered, agreed) in [
        (&TLS13, &["h2", "http/1.1"][..], "h2"),
        (&TLS13, &["http/1.1", "h2"][..], "h2"),
        (&TLS12, &["h2"][..], "h2"),
        (&TLS13, &["http/1.1"][..], "http/1.1"),
    ] {
        let mut config = files.config(version, None);
        config.alpn_protocols = offered.iter().map(|p| p.as_bytes().to_vec()).collect();
        let runtime = runtime();
        let _entered = runtime.enter();
        let tcp = tcp(&host);
        tcp.set_nonblocking(true).unwrap();
        let tcp = tokio::net::TcpStream::from_std(tcp).unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let name = "127.0.0.1".try_into().unwrap();
        let tls = runtime.block_on(connector.connect(name, tcp)).unwrap();
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(agreed.as_bytes()));
        if agreed != "h2" {
            continue;
        }
        let client = Client::over(&runtime, tls);
        let mut stream = client.connect("a:80");
        let (mut guest, _) = control.tunnel();
        assert_eq!(stream.status(), 200);
        let many = vec![7; 1 << 20];
        let (mut reader, sent) = (guest.try_clone().unwrap(), many.clone());
        let echo = std::thread::spawn(move || {
            let mut got = vec![0; sent.len()];
            reader.read_exact(&mut got).unwrap();
            assert!(got == sent);
            guest.write_all(&got).unwrap();
            guest.shutdown(Shutdown::Write).unwrap();
            let _ = guest.read(&mut [0]);
        });
        stream.say(&many, false);
        assert!(stream.exactly(many.len()) == many);
        stream.say(b"", true);
        assert_eq!(stream.rest().unwrap(), "");
        echo.join().unwrap();
        // As if the proxy were the VM.
        let mut stream = client.get("https://a/x");
        let (mut guest, _) = control.tunnel();
        let got = head(&mut guest);
        assert!(got.starts_with("GET /x HTTP/1.1\r\n"), "{got}");
        guest
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            .unwrap();
        assert_eq!(stream.status(), 200);
        assert_eq!(stream.rest().unwrap(), "ok");
    }
}

#[test]
fn a_stop_says_goodbye_and_ends_tunnels() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut tunnel = client.connect("a:80");
    let (mut in_tunnel, _) = control.tunnel();
    assert_eq!(tunnel.status(), 200);
    let mut stream = client.get("http://a/");
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    host.terminate();
    assert!(drained(&mut in_tunnel));
    assert_eq!(tunnel.reset(), Reason::CANCEL);
    // A request that is under way has its answer.
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        .unwrap();
    assert_eq!(stream.status(), 200);
    assert_eq!(stream.rest().unwrap(), "ok");
    client.ended().unwrap();
    assert!(host.ended());
}
