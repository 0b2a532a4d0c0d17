//! What an operator sees of requests and tunnels: access log, audit, traces, events; and how many a second there may be.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use adit_port::control::{Connect, ConnectNoted, Dialed, Ends, TunnelEnd};
use adit_port::control_io::Message;
use serde_json::Value;

use crate::access::{asked, audit, grant, listen, other};
use crate::host::{Control, HANG, Host, Port};
use crate::management::{Manager, management, token};

pub const SEEN: &str = "[log]\naccess = \"file\"\n[audit]\nallows = true\n";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// A host that writes everything down. Its grants come first, so that their lines are known.
fn started(more: &str) -> (Host, Vec<Port>) {
    Host::serving(&[("a", 3)], &format!("{SEEN}{more}"))
}

/// The lines of the access log, once there are so many.
pub fn access_log(host: &Host, lines: usize) -> Vec<Value> {
    let path = host.state_dir().join("aditd.access");
    host.until("the access log is written", |_| {
        let text = fs::read_to_string(&path).unwrap_or_default();
        (text.lines().count() >= lines).then(|| {
            text.lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect()
        })
    })
}

/// The guest of a VM: hears a request of that many bytes behind its head, and answers `hello`.
fn serve(control: &Control, body: usize) -> std::thread::JoinHandle<String> {
    let control = control.try_clone().unwrap();
    std::thread::spawn(move || {
        let (mut guest, mut said) = control.tunnel();
        let is_whole = |said: &[u8]| {
            let head = said.windows(4).position(|end| end == b"\r\n\r\n");
            head.is_some_and(|head| said.len() >= head + 4 + body)
        };
        while !is_whole(&said) {
            let mut piece = [0; 4096];
            let n = guest.read(&mut piece).unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&said));
            said.extend_from_slice(&piece[..n]);
        }
        guest
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            .unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        let _ = guest.read_to_end(&mut Vec::new());
        String::from_utf8(said).unwrap()
    })
}

fn field<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let values = head.lines().filter_map(|line| line.split_once(": "));
    let of_name = values.filter(|(field, _)| field.eq_ignore_ascii_case(name));
    of_name.map(|(_, value)| value).collect()
}

#[test]
fn a_relayed_request_is_in_both_logs_and_its_guest_hears_by_whom_and_of_which_trace_it_is() {
    let (secret, sha256) = adit_api::token::new().unwrap();
    let section = format!("[[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n");
    let (host, ports) = started(&(section + &grant("\"token:ci\"", "\"a\"", "\"reach\"")));
    let control = ports[0].connected();
    let served = serve(&control, 3);
    let client = host.proxy();
    let from = client.local_addr().unwrap().to_string();
    let answer = asked(
        client,
        &format!(
            "POST http://a/secret-path?q=1 HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Bearer {secret}\r\nTraceparent: {GIVEN}\r\n\
             Tracestate: x=y\r\nVia: 1.0 before\r\nForwarded: for=192.0.2.9\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
        ),
    );
    assert_eq!((answer.status, answer.body.as_str()), (200, "hello"));
    let heard = served.join().unwrap();
    assert!(!heard.contains(&secret) && !heard.to_lowercase().contains("authorization"));
    assert_eq!(field(&heard, "via"), ["1.0 before", "1.1 adit"]);
    let own = format!("for=\"{from}\";host=\"a\";proto=http;by=_adit");
    assert_eq!(field(&heard, "forwarded"), ["for=192.0.2.9", &own]);
    assert_eq!(field(&heard, "tracestate"), ["x=y"]);
    let traces = field(&heard, "traceparent");
    let parts: Vec<_> = traces[0].split('-').collect();
    assert_eq!((traces.len(), parts[1], parts[3]), (1, TRACE, "01"));
    assert_ne!(parts[2], "00f067aa0ba902b7", "a span of its own");

    let line = &access_log(&host, 1)[0];
    for (name, value) in [
        ("proto", "http"),
        ("method", "POST"),
        ("caller", "token:ci"),
        ("from", &*from),
        ("vm", "a"),
        ("target", "tcp:80"),
        ("trace_id", TRACE),
    ] {
        assert_eq!(line[name], value, "{line}");
    }
    let proxy = fs::read_to_string(host.state_dir().with_file_name("run").join("proxy.addr"));
    assert_eq!(line["listener"], proxy.unwrap().trim(), "{line}");
    assert_eq!(
        (&line["bytes_to_vm"], &line["bytes_from_vm"]),
        (&3.into(), &5.into())
    );
    assert_eq!(
        (&line["status"], &line["broken_off"]),
        (&200.into(), &Value::Null)
    );
    assert!(
        line["dial_ms"].is_number() && line["first_byte_ms"].is_number(),
        "{line}"
    );
    let allow = &audit(&host, 1)[0];
    assert_eq!(
        (&allow["decision"], &allow["verb"]),
        (&"allow".into(), &"reach".into())
    );
    assert!(
        allow["reason"].as_str().unwrap().contains("aditd.toml:"),
        "{allow}"
    );
    assert_eq!(allow["bytes_from_vm"], 5);
    // Nowhere the token, nor what was asked for.
    for file in ["aditd.access", "aditd.audit"] {
        let text = fs::read_to_string(host.state_dir().join(file)).unwrap();
        assert!(
            !text.contains(&secret) && !text.contains("secret-path"),
            "{text}"
        );
    }
    assert!(!host.log().contains(&secret));
}

#[test]
fn r72_a_trace_that_a_client_makes_up_begins_a_new_one_and_its_state_goes_no_further() {
    let (host, ports) = started("");
    let control = ports[0].connected();
    for (nth, hostile) in [
        "Traceparent: 00-0-0-0\r\n".to_owned(),
        format!("Traceparent: {GIVEN}\r\nTraceparent: {GIVEN}\r\n"),
        format!("Traceparent: {}\r\n", "f".repeat(8000)),
        String::new(),
    ]
    .into_iter()
    .enumerate()
    {
        let served = serve(&control, 0);
        let request = format!(
            "GET http://a/ HTTP/1.1\r\nHost: a\r\n{hostile}Tracestate: {}\r\nConnection: close\r\n\r\n",
            "x=y,".repeat(100)
        );
        assert_eq!(asked(host.proxy(), &request).status, 200);
        let heard = served.join().unwrap();
        let traces = field(&heard, "traceparent");
        assert_eq!((traces.len(), traces[0].len()), (1, 55), "{traces:?}");
        assert!(traces[0].ends_with("-00") && !traces[0].contains(TRACE));
        assert!(field(&heard, "tracestate").is_empty());
        let id = traces[0].split('-').nth(1).unwrap().to_owned();
        let lines = access_log(&host, nth + 1);
        assert!(
            lines.iter().any(|line| line["trace_id"] == *id),
            "{lines:?}"
        );
    }
}

#[test]
fn what_is_refused_and_what_ends_before_its_end_have_lines_that_say_so() {
    let (host, ports) = started("");
    let control = ports[0].connected();
    assert_eq!(
        asked(host.proxy(), "GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n").status,
        403
    );
    let line = &access_log(&host, 1)[0];
    assert_eq!(
        (&line["status"], &line["error"]),
        (&403.into(), &"http_request_denied".into())
    );
    assert_eq!(
        (&line["vm"], &line["target"]),
        (&"a".into(), &"tcp:81".into())
    );
    let id = line["trace_id"].as_str().unwrap();
    host.until("the log", |host| host.log().contains(id).then_some(()));
    // No request at all.
    assert_eq!(
        asked(host.proxy(), "GET\u{1b}[2J http://a/\r\n\r\n").status,
        400
    );
    assert_eq!(access_log(&host, 2)[1]["status"], 400);
    // Half of an answer, and then nothing.
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let (mut guest, mut said) = control.tunnel();
    while !said.ends_with(b"\r\n\r\n") {
        let mut piece = [0; 4096];
        let n = guest.read(&mut piece).unwrap();
        said.extend_from_slice(&piece[..n]);
    }
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        .unwrap();
    client.read_exact(&mut [0; 60]).unwrap();
    drop(client);
    let line = &access_log(&host, 3)[2];
    assert_eq!(
        (&line["status"], &line["broken_off"]),
        (&200.into(), &true.into()),
        "{line}"
    );
    assert_eq!(line["bytes_from_vm"], 4);
}

/// The next tunnel that is noted, with its client, as a port process that has it open.
fn noted(control: &Control) -> (UnixStream, ConnectNoted) {
    loop {
        match control.hear().unwrap() {
            (Message::ConnectNoted(noted), Some(fd)) => {
                let boot_nonce = [1; 16];
                let id = noted.connect.id;
                control.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
                let mut client = UnixStream::from(fd);
                client.write_all(&noted.connect.greeting).unwrap();
                return (client, noted);
            }
            (Message::ListTunnels(_), _) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn end(note: &[u8], to_guest: u64) -> TunnelEnd {
    TunnelEnd {
        note: note.to_vec(),
        to_guest,
        from_guest: 7,
        lasted_us: 2_000_000,
        dial_us: Some(1500),
        first_byte_us: Some(2500),
        broken_off: false,
    }
}

fn taken(control: &Control, seq: u64) {
    loop {
        match control.hear().unwrap().0 {
            Message::EndsTaken(taken) => return assert_eq!(taken.seq, seq),
            Message::ListTunnels(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_tunnels_line_is_written_when_its_port_process_says_how_it_ended_also_by_the_next_aditd() {
    let (mut host, ports) = started("");
    let control = ports[0].connected_and_tells();
    let open = |host: &Host| {
        let mut client = host.proxy();
        let request = format!("CONNECT a:80 HTTP/1.1\r\nHost: a\r\nTraceparent: {GIVEN}\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        client
    };
    let _first = open(&host);
    let (_of_first, first) = noted(&control);
    let Connect { extensions, .. } = &first.connect;
    let trace = String::from_utf8(extensions.trace.as_bytes().to_vec()).unwrap();
    assert!(trace.contains(TRACE) && trace.len() == 55, "{trace}");
    assert!(first.tag.is_some() && first.note.len() <= 1024);
    let _second = open(&host);
    let (_of_second, second) = noted(&control);
    let ends = |seq, ends, lost| Message::Ends(Ends { seq, ends, lost });
    // One that is made up besides: only what aditd has noted counts.
    let forged = [
        &first.note[..16],
        b"{\"a\":0,\"i\":\"\",\"s\":{\"c\":\"user:root\"}}",
    ]
    .concat();
    control.say(
        &ends(1, vec![end(&first.note, 11), end(&forged, 0)], 0),
        None,
    );
    taken(&control, 1);
    let line = &access_log(&host, 1)[0];
    assert_eq!(
        (&line["method"], &line["trace_id"]),
        (&"CONNECT".into(), &TRACE.into()),
        "{line}"
    );
    assert_eq!(
        (&line["bytes_to_vm"], &line["bytes_from_vm"]),
        (&11.into(), &7.into())
    );
    assert_eq!(
        (&line["dial_ms"], &line["duration_ms"]),
        (&1.5.into(), &2000.into())
    );
    let allow = &audit(&host, 1)[0];
    assert_eq!(
        (&allow["decision"], &allow["bytes_to_vm"]),
        (&"allow".into(), &11.into())
    );
    host.kill();
    drop(control);
    host.start();
    let control = ports[0].connected_and_tells();
    control.say(&ends(2, vec![end(&second.note, 12)], 5), None);
    taken(&control, 2);
    let lines = access_log(&host, 3);
    assert_eq!(lines[1]["bytes_to_vm"], 12, "{lines:?}");
    assert_eq!(
        (&lines[2]["lost_tunnels"], &lines[2]["vm"]),
        (&5.into(), &"a".into())
    );
    assert_eq!(lines.len(), 3);
}

#[test]
fn a_port_process_of_the_version_before_is_given_no_note_and_its_tunnels_have_a_line_without_bytes()
{
    let (host, ports) = started("");
    for control in [ports[0].connected_and_lists()] {
        let mut client = host.proxy();
        client
            .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
        let id = loop {
            match control.hear().unwrap() {
                (Message::ConnectAs(connect), Some(_)) => break connect.connect.id,
                (Message::ListTunnels(_), _) => {}
                other => panic!("{other:?}"),
            }
        };
        let boot_nonce = [1; 16];
        control.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
        let line = &access_log(&host, 1)[0];
        assert_eq!((&line["status"], &line["vm"]), (&200.into(), &"a".into()));
        assert_eq!(
            (&line["bytes_to_vm"], &line["duration_ms"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(audit(&host, 1)[0]["decision"], "allow");
    }
}

#[test]
fn without_the_settings_nothing_is_noted_or_written() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected_and_tells();
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    loop {
        match control.hear().unwrap().0 {
            Message::ConnectAs(_) => break,
            Message::ListTunnels(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(!host.state_dir().join("aditd.access").exists());
}

#[test]
fn a_client_of_a_unix_socket_has_a_line_and_is_nobody_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let listen = format!("[[listen]]\naddress = \"unix:{}\"\n", path.display());
    let (host, ports) = started(&listen);
    let control = ports[0].connected();
    let served = serve(&control, 0);
    let client = UnixStream::connect(&path).unwrap();
    let answer = asked(
        client,
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    );
    assert_eq!(answer.status, 200);
    let heard = served.join().unwrap();
    assert_eq!(
        field(&heard, "forwarded"),
        ["for=unknown;host=\"a\";proto=http;by=_adit"]
    );
    let line = &access_log(&host, 1)[0];
    assert_eq!(line["listener"], other(&host), "{line}");
}

/// Says this to the other listener, and hears all that it says.
fn told(host: &Host, says: &[u8]) -> Vec<u8> {
    let mut client = TcpStream::connect(other(host)).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    client.write_all(says).unwrap();
    let mut said = Vec::new();
    // What is not understood at all is reset.
    let _ = client.read_to_end(&mut said);
    said
}

#[test]
fn a_client_that_is_refused_before_it_is_known_what_it_wants_has_its_line() {
    let (_, sha256) = adit_api::token::new().unwrap();
    let token = format!("[[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n");
    let (host, _ports) = started(&(listen("127.0.0.1:0", "socks5", "") + &token));
    for (nth, (says, said, status)) in [
        // It speaks something else.
        (&b"GET / HTTP/1.1\r\n\r\n"[..], &b""[..], 400),
        // No way to log in that both know; a token that is none; an address; a name that no VM has.
        (b"\x05\x01\x01", b"\x05\xff", 400),
        (b"\x05\x01\x02\x01\x01x\x05wrong", b"\x05\x02\x01\x01", 407),
        (
            b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50",
            b"\x05\x00\x05\x08",
            400,
        ),
        (
            b"\x05\x01\x00\x05\x01\x00\x03\x03a_b\x00\x50",
            b"\x05\x00\x05\x04",
            404,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let heard = told(&host, says);
        assert!(heard.starts_with(said), "{says:?}: {heard:?}");
        let line = &access_log(&host, nth + 1)[nth];
        assert_eq!(
            (&line["proto"], &line["status"], &line["vm"]),
            (&"socks5".into(), &status.into(), &Value::Null),
            "{says:?}: {line}"
        );
        assert_eq!(line["listener"], other(&host), "{line}");
        assert!(!line["error"].as_str().unwrap().is_empty(), "{line}");
    }
    // The log has why, under the same name; of many in a second, the first.
    let id = access_log(&host, 1)[0]["trace_id"].clone();
    let id = id.as_str().unwrap();
    host.until("the log", |host| host.log().contains(id).then_some(()));
    let (host, _ports) = started(&listen("127.0.0.1:0", "tls", "port = 443"));
    // A whole first message without a name; rustls has one for an address.
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = "127.0.0.1".try_into().unwrap();
    let mut hello = Vec::new();
    rustls::ClientConnection::new(config.into(), name)
        .unwrap()
        .write_tls(&mut hello)
        .unwrap();
    // TLS's alert `unrecognized_name`.
    assert_eq!(told(&host, &hello), [21, 3, 3, 0, 2, 2, 112]);
    let line = &access_log(&host, 1)[0];
    assert_eq!(
        (&line["proto"], &line["status"]),
        (&"tls".into(), &400.into()),
        "{line}"
    );
}

/// Asks so often, and returns the statuses.
fn often(host: &Host, times: usize) -> Vec<u16> {
    let ask = |_| {
        asked(
            host.proxy(),
            "GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        )
    };
    let answers: Vec<_> = (0..times).map(ask).collect();
    for answer in answers.iter().filter(|answer| answer.status == 429) {
        assert!(
            answer.head.to_lowercase().contains("retry-after: 1"),
            "{}",
            answer.head
        );
        assert!(
            answer.head.contains("connection_limit_reached"),
            "{}",
            answer.head
        );
    }
    answers.iter().map(|answer| answer.status).collect()
}

#[test]
fn r110_a_grant_and_a_vm_have_their_rate_and_more_is_refused_with_429() {
    let rated = grant("\"anyone\"", "\"a\"", "\"reach\", \"see\"") + "connections_per_s = 1\n";
    // The VM is not up: what is let through is answered with 503, at once.
    let (host, _ports) = started(&rated);
    let statuses = often(&host, 20);
    assert_eq!(statuses[0], 503);
    let refused = |statuses: &[u16]| statuses.iter().filter(|s| **s == 429).count();
    assert!(refused(&statuses) >= 5, "{statuses:?}");
    let lines = audit(&host, 2);
    assert!(
        lines.iter().any(|line| line["reason"] == "too-often"),
        "{lines:?}"
    );
    // Whoever has a grant without a rate has that.
    host.reload(|text| text + &grant("\"anyone\"", "\"*\"", "\"reach\""));
    assert_eq!(refused(&often(&host, 20)), 0);
    // The VM's own is for all.
    host.reload(|text| text.replace("cid = 3\n", "cid = 3\nconnections_per_s = 1\n"));
    assert!(refused(&often(&host, 20)) >= 5);
}

#[test]
fn what_is_asked_on_a_management_listener_and_allowed_has_a_line_too() {
    let (secret, section) = token("ops");
    let more = SEEN.to_owned()
        + &management("")
        + &section
        + &grant("\"token:ops\"", "\"*\"", "\"see\", \"task\"");
    let (host, _ports) = Host::serving(&[("a", 3)], &more);
    let manager = Manager {
        host: &host,
        token: secret,
    };
    for path in ["/v1/vms/a", "/v1/tasks?vm=a", "/v1/config", "/v1/vms"] {
        manager.get(path);
    }
    assert_eq!(manager.status("GET", "/v1/vms/nobody", ""), 404);
    assert_eq!(manager.status("GET", "/v1/grants", ""), 403);
    let lines = audit(&host, 4);
    let said: Vec<_> = lines
        .iter()
        .map(|line| ["decision", "caller", "verb", "vm"].map(|key| line[key].as_str().unwrap()))
        .collect();
    // A list has none, and neither has what is not there.
    let allow = |verb, vm| ["allow", "token:ops", verb, vm];
    assert_eq!(
        said,
        [
            allow("see", "a"),
            allow("task", "a"),
            allow("see", "*"),
            ["deny", "token:ops", "manage", "*"]
        ]
    );
    let place = lines[0]["reason"].as_str().unwrap();
    assert!(place.contains("aditd.toml:"), "{place}");
}

/// Follows the events of a host.
fn follow(host: &Host, since: Option<&str>) -> impl Iterator<Item = Value> + use<> {
    let mut stream = host.operator();
    let since = since
        .map(|since| format!("&since={since}"))
        .unwrap_or_default();
    write!(
        stream,
        "GET /v1/host-events?follow=true{since} HTTP/1.1\r\nHost: aditd\r\n\r\n"
    )
    .unwrap();
    // The chunks' lengths are no JSON objects.
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(&line).unwrap())
}

#[test]
fn events_are_followed_and_resumed_behind_a_cursor_and_a_new_aditd_says_that_some_are_gone() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let mut events = follow(&host, None);
    let mut until = |kind: &str| events.find(|event| event["kind"] == kind).unwrap();
    until("started");
    assert_eq!(until("vm-added")["vm"], "a");
    let _control = ports[0].connected();
    let up = loop {
        let event = until("vm-state");
        if event["state"] == "up" {
            break event;
        }
    };
    asked(host.proxy(), "GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(until("denied")["count"], 1);
    host.reload(|text| text + &grant("\"user:new\"", "\"*\"", "\"see\""));
    until("grants-changed");
    until("config-reloaded");
    host.reload(|text| text + "[nonsense]\n");
    let refused = until("config-refused");
    assert!(
        refused["text"].as_str().unwrap().contains("nonsense"),
        "{refused}"
    );
    // From the middle on.
    let cursor = up["cursor"].as_str().unwrap();
    let next = follow(&host, Some(cursor)).next().unwrap();
    assert_eq!(next["kind"], "denied", "{next}");
    let bad = host.api("GET", "/v1/host-events?since=7", "");
    assert_eq!(bad.status, 400);
    host.kill();
    let text = fs::read_to_string(host.config_file()).unwrap();
    fs::write(host.config_file(), text.replace("[nonsense]\n", "")).unwrap();
    host.start();
    let mut events = follow(&host, Some(cursor));
    let gap = events.next().unwrap();
    assert_eq!((&gap["kind"], &gap["count"]), (&"gap".into(), &Value::Null));
    assert_eq!(events.next().unwrap()["kind"], "started");
}
