//! Clients of HTTP/2 that mean harm (R65, R67, R74): frame by frame, as no library makes them. Whatever they do, the proxy says why
//! it ends them, keeps little for them, and serves others.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use adit_channel::socket_end;
use h2::Reason;

use crate::h2client::Client;
use crate::h2raw::*;
use crate::host::{Control, Host, Port};
use crate::proxy::head;

fn started() -> (Host, Vec<Port>) {
    Host::serving(&[("a", 3), ("b", 4)], "")
}

/// Memory of whoever serves, KiB.
fn memory_kib(host: &Host) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.worker())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse().unwrap()
}

/// Somebody else gets an answer, and nothing else has reached the guest.
fn others_are_served(host: &Host, control: &Control) {
    let client = Client::new(host.proxy());
    let mut stream = client.get("http://a/");
    let (mut guest, _) = control.tunnel();
    assert!(head(&mut guest).starts_with("GET / HTTP/1.1\r\n"));
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        .unwrap();
    assert_eq!(stream.status(), 200);
    assert_eq!(stream.rest().unwrap(), "ok");
}

/// Sends pieces of it until the other end is heard to be gone, which reads on all the time. Returns how the connection ended.
fn flood(host: &Host, before: &[u8], piece: impl Fn(u32) -> Vec<u8>) -> Ended {
    let mut raw = Raw::new(host.proxy());
    raw.say(before);
    flood_over(raw, piece)
}

fn flood_over(mut raw: Raw, piece: impl Fn(u32) -> Vec<u8>) -> Ended {
    let mut sending = raw.sender();
    let sender = std::thread::spawn(move || raw.ended());
    for n in 0.. {
        if !sending.say(&piece(n)) || sender.is_finished() {
            break;
        }
        assert!(n < 1_000_000, "it goes on for ever");
    }
    sender.join().unwrap()
}

#[test]
fn r74_what_breaks_the_protocol_ends_its_connection_with_the_code_that_says_so() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let get = get("x", "/");
    let settings = |id: u16, value: u32| {
        let payload = [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
        frame(SETTINGS, 0, 0, &payload)
    };
    let update = |stream, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    for (what, bytes, expected) in [
        (
            "DATA before HEADERS",
            frame(DATA, 0, 1, b"x"),
            PROTOCOL_ERROR,
        ),
        ("DATA of no stream", frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        (
            "a request on no stream",
            headers(0, END_STREAM, &get),
            PROTOCOL_ERROR,
        ),
        (
            "a stream of the server's",
            headers(2, END_STREAM, &get),
            PROTOCOL_ERROR,
        ),
        (
            "a stream from before",
            [headers(5, END_STREAM, &get), headers(3, END_STREAM, &get)].concat(),
            PROTOCOL_ERROR,
        ),
        (
            "a push",
            frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2, 0x82]),
            PROTOCOL_ERROR,
        ),
        (
            "RST_STREAM of an idle stream",
            frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]),
            PROTOCOL_ERROR,
        ),
        (
            "RST_STREAM that is too short",
            frame(RST_STREAM, 0, 1, &[0]),
            PROTOCOL_ERROR,
        ),
        (
            "PING that is too short",
            frame(PING, 0, 0, b"x"),
            PROTOCOL_ERROR,
        ),
        (
            "PING in a stream",
            frame(PING, 0, 1, b"12345678"),
            PROTOCOL_ERROR,
        ),
        (
            "SETTINGS in a stream",
            frame(SETTINGS, 0, 1, &[]),
            PROTOCOL_ERROR,
        ),
        (
            "half a setting",
            frame(SETTINGS, 0, 0, &[0, 4, 0]),
            PROTOCOL_ERROR,
        ),
        (
            "a window that is too large",
            settings(4, 1 << 31),
            PROTOCOL_ERROR,
        ),
        ("frames that are too small", settings(5, 16), PROTOCOL_ERROR),
        ("a push that may be or not", settings(2, 7), PROTOCOL_ERROR),
        (
            "no more window of the connection",
            update(0, 0),
            PROTOCOL_ERROR,
        ),
        (
            "too much window of the connection",
            update(0, i32::MAX.cast_unsigned()),
            FLOW_CONTROL_ERROR,
        ),
        (
            "CONTINUATION of nothing",
            frame(CONTINUATION, END_HEADERS, 1, &get),
            PROTOCOL_ERROR,
        ),
        (
            "another frame within a header",
            [
                frame(HEADERS, END_STREAM, 1, &get),
                frame(PING, 0, 0, b"12345678"),
            ]
            .concat(),
            PROTOCOL_ERROR,
        ),
        (
            "CONTINUATION of another stream",
            [
                frame(HEADERS, END_STREAM, 1, &get),
                frame(CONTINUATION, END_HEADERS, 3, &[]),
            ]
            .concat(),
            PROTOCOL_ERROR,
        ),
        (
            "a field that nobody remembers",
            headers(1, END_STREAM, &indexed(FIRST + 9)),
            PROTOCOL_ERROR,
        ),
        (
            "a table that is too large",
            headers(1, END_STREAM, &[0x3f, 0xff, 0xff, 0xff, 0x7f]),
            PROTOCOL_ERROR,
        ),
        (
            "a number without an end",
            headers(1, END_STREAM, &[0xff; 40]),
            PROTOCOL_ERROR,
        ),
        (
            "a text that is longer than its frame",
            headers(1, END_STREAM, &[0, 0x7f, 0xff, 0x7f]),
            PROTOCOL_ERROR,
        ),
        (
            "more padding than there is",
            frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0x82]),
            PROTOCOL_ERROR,
        ),
        (
            "a frame that is too long",
            [&[0, 0x40, 1, DATA, 0, 0, 0, 0, 1][..], &[0; 1 << 14]].concat(),
            FRAME_SIZE_ERROR,
        ),
    ] {
        let mut raw = Raw::new(host.proxy());
        raw.say(&bytes);
        assert_eq!(raw.ended(), Ended::Told(expected), "{what}");
    }
    others_are_served(&host, &control);
}

#[test]
fn r74_streams_that_are_reset_as_they_come_end_their_connection() {
    // CVE-2023-44487.
    let (host, ports) = started();
    let control = ports[0].connected();
    let get = get("x", "/");
    let ended = flood(&host, &[], |n| {
        let stream = 2 * n + 1;
        let reset = frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]);
        [headers(stream, END_STREAM, &get), reset].concat()
    });
    assert_eq!(ended, Ended::Told(ENHANCE_YOUR_CALM));
    others_are_served(&host, &control);
}

#[test]
fn r74_resets_that_the_proxy_is_made_to_send_end_their_connection() {
    // CVE-2025-8671: the client breaks a rule of each stream, and the server's own resets do the work.
    let (host, ports) = started();
    let control = ports[0].connected();
    let get = get("x", "/");
    let update = |stream, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    type Fault = (&'static str, fn(u32) -> Vec<u8>);
    let faults: [Fault; 4] = [
        ("a window of nothing", |n| {
            frame(WINDOW_UPDATE, 0, n, &0_u32.to_be_bytes())
        }),
        ("too much of a window", |n| {
            frame(WINDOW_UPDATE, 0, n, &i32::MAX.to_be_bytes())
        }),
        ("DATA behind the end", |n| frame(DATA, 0, n, b"x")),
        ("a priority of its own", |n| {
            frame(PRIORITY, 0, n, &[n.to_be_bytes().as_slice(), &[1]].concat())
        }),
    ];
    for (what, fault) in faults {
        let ended = flood(&host, &update(0, 1 << 20), |n| {
            let stream = 2 * n + 1;
            [headers(stream, END_STREAM, &get), fault(stream)].concat()
        });
        let Ended::Told(code) = ended else {
            panic!("{what}: {ended:?}")
        };
        println!("{what}: {code}");
        assert!(
            [ENHANCE_YOUR_CALM, STREAM_CLOSED, PROTOCOL_ERROR].contains(&code),
            "{what}: {code}"
        );
    }
    others_are_served(&host, &control);
}

#[test]
fn r74_a_header_without_an_end_ends_its_connection() {
    // CVE-2024-27316 and its like: a header that is never whole, in frames that may be empty.
    let (host, ports) = started();
    let control = ports[0].connected();
    let before = memory_kib(&host);
    for piece in [vec![], field(b"x", b"y"), field(b"x", &[b'y'; 10_000])] {
        let begin = frame(HEADERS, END_STREAM, 1, &get("a", "/"));
        let ended = flood(&host, &begin, |_| frame(CONTINUATION, 0, 1, &piece));
        assert_eq!(ended, Ended::Told(ENHANCE_YOUR_CALM), "{}", piece.len());
    }
    let grown = memory_kib(&host).saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB");
    others_are_served(&host, &control);
}

#[test]
fn r74_a_header_that_grows_when_it_is_read_takes_no_memory() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let before = memory_kib(&host);
    // Four kilobytes, said once, and meant 16,000 times.
    let bomb = [
        get("a", "/"),
        remembered(b"x", &[b'y'; 4000]),
        indexed(FIRST).repeat(12_000),
    ]
    .concat();
    let mut raw = Raw::new(host.proxy());
    raw.say(&headers(1, END_STREAM, &bomb));
    assert_eq!(raw.ended(), Ended::Told(ENHANCE_YOUR_CALM));
    // Many small ones are the same: each may hold what a header may hold, and there are not more at once than streams.
    let mut raw = Raw::new(host.proxy());
    raw.say(&headers(
        1,
        END_STREAM,
        &[get("x", "/"), remembered(b"x", &[b'y'; 4000])].concat(),
    ));
    for n in 1..200 {
        raw.say(&headers(
            2 * n + 1,
            END_STREAM,
            &[get("x", "/"), indexed(FIRST).repeat(8)].concat(),
        ));
    }
    assert!(raw.answers());
    // A little too large: that request is refused, and the connection goes on.
    let client = Client::new(host.proxy());
    let large = "y".repeat(40_000);
    let mut stream = client.ask("GET", "http://a/", &[("x", &large)], true);
    assert_eq!(stream.status(), 431);
    assert_eq!(client.get("http://x/").status(), 404);
    // And many fields that are nothing.
    let mut raw = Raw::new(host.proxy());
    let empty = [get("a", "/"), field(b"x", b"").repeat(3000)].concat();
    raw.say(&headers(1, END_STREAM, &empty));
    let answer = raw.until(|frame| frame.stream == 1);
    assert_eq!(answer.kind, HEADERS, "{answer:?}");
    let grown = memory_kib(&host).saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB");
    others_are_served(&host, &control);
}

#[test]
fn r74_frames_without_an_end_that_carry_nothing_end_their_connection() {
    // CVE-2019-9511 to -9518, as far as a client can.
    let (host, ports) = started();
    let control = ports[0].connected();
    let open = headers(1, 0, &connect("a:80"));
    let priority = |n: u32| {
        let on = (2 * n + 1).to_be_bytes();
        frame(PRIORITY, 0, 2 * n + 3, &[&on[..], &[1]].concat())
    };
    type Piece<'a> = Box<dyn Fn(u32) -> Vec<u8> + 'a>;
    let pieces: [(&str, &[u8], Piece<'_>); 6] = [
        (
            "PING",
            b"",
            Box::new(|_| frame(PING, 0, 0, b"12345678").repeat(500)),
        ),
        (
            "SETTINGS",
            b"",
            Box::new(|_| frame(SETTINGS, 0, 0, &[]).repeat(500)),
        ),
        ("PRIORITY", b"", Box::new(|n| priority(n).repeat(500))),
        (
            "frames that nobody knows",
            b"",
            Box::new(|_| frame(0xfa, 0, 0, &[0; 1000]).repeat(20)),
        ),
        (
            "WINDOW_UPDATE",
            &open,
            Box::new(|_| frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()).repeat(500)),
        ),
        (
            "empty DATA",
            &open,
            Box::new(|_| frame(DATA, 0, 1, &[]).repeat(50)),
        ),
    ];
    for (what, before, piece) in &pieces {
        let mut raw = Raw::new(host.proxy());
        raw.say(before);
        let _tunnel = (!before.is_empty()).then(|| control.tunnel());
        let ended = flood_over(raw, piece);
        assert_eq!(ended, Ended::Told(ENHANCE_YOUR_CALM), "{what}");
    }
    others_are_served(&host, &control);
}

#[test]
fn r74_a_flood_whose_client_reads_no_answers_costs_nobody_else() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let before = memory_kib(&host);
    // Each wants an answer; nobody reads one. As much is sent as is taken.
    let mut raw = Raw::new(host.proxy());
    let pings = frame(PING, 0, 0, b"12345678").repeat(4000);
    raw.tcp
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let (begin, mut sent) = (Instant::now(), 0);
    while raw.say(&pings) {
        sent += pings.len();
        assert!(begin.elapsed() < Duration::from_secs(30), "it goes on");
    }
    others_are_served(&host, &control);
    let grown = memory_kib(&host).saturating_sub(before);
    println!("{} KiB were taken, and {grown} KiB are kept", sent >> 10);
    assert!(grown < 16 << 10, "{grown} KiB");
}

#[test]
fn r74_windows_that_a_client_keeps_shut_keep_little_in_memory_and_open_again() {
    let (host, ports) = started();
    let a = ports[0].connected();
    let before = memory_kib(&host);
    let mut raw = Raw::new(host.proxy());
    // SETTINGS_INITIAL_WINDOW_SIZE.
    let window = |n: u32| frame(SETTINGS, 0, 0, &[&[0, 4][..], &n.to_be_bytes()].concat());
    raw.say(&window(0));
    // The connection's own is wide open.
    raw.say(&frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 20).to_be_bytes()));
    let mut guests = Vec::new();
    for n in 0..100 {
        raw.say(&headers(2 * n + 1, END_STREAM, &get("a", "/")));
        let (mut guest, _) = a.tunnel();
        head(&mut guest);
        guest
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
            .unwrap();
        // As much as anybody takes.
        guest.set_nonblocking(true).unwrap();
        while guest.write(&[b'x'; 1 << 16]).is_ok() {}
        guests.push(guest);
    }
    let grown = memory_kib(&host).saturating_sub(before);
    println!("{grown} KiB for 100 answers that nobody takes");
    assert!(grown < 100 * 512, "{grown} KiB");
    // Shut further while it is in debt, and opened: what is owed comes first (RFC 9113 §6.9.2).
    raw.say(&window(1000));
    raw.until(|frame| frame.kind == DATA && frame.stream == 1);
    raw.say(&window(0));
    raw.say(&frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()));
    raw.say(&frame(WINDOW_UPDATE, 0, 1, &1000_u32.to_be_bytes()));
    raw.until(|frame| frame.kind == DATA && frame.stream == 1);
    drop(raw);
    for guest in &guests {
        host.until("the guest hears that nobody takes it", |_| {
            socket_end::is_closed(guest).then_some(())
        });
    }
    others_are_served(&host, &a);
}

#[test]
fn r74_a_client_that_sends_more_than_its_window_is_ended() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let mut raw = Raw::new(host.proxy());
    raw.say(&headers(1, 0, &connect("a:80")));
    let (guest, _) = control.tunnel();
    // The guest takes nothing: its socket is full, and then the window.
    let piece = frame(DATA, 0, 1, &[0; 1 << 14]);
    let mut sending = raw.sender();
    let sender = std::thread::spawn(move || while sending.say(&piece) {});
    let reason = loop {
        match raw.hear() {
            Some(frame) if [GOAWAY, RST_STREAM].contains(&frame.kind) => break frame,
            Some(_) => {}
            None => panic!("it ended without a word"),
        }
    };
    let at = if reason.kind == GOAWAY { 4 } else { 0 };
    assert_eq!(reason.payload[at..][..4], FLOW_CONTROL_ERROR.to_be_bytes());
    raw.tcp.shutdown(Shutdown::Both).unwrap();
    sender.join().unwrap();
    drop(guest);
    others_are_served(&host, &control);
}

#[test]
fn keystrokes_without_an_end_and_tunnels_that_rest_are_no_flood() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let mut raw = Raw::new(host.proxy());
    raw.say(&headers(1, 0, &connect("a:80")));
    let (mut guest, _) = control.tunnel();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        guest.read_to_end(&mut all).unwrap();
        all.len()
    });
    // More bytes of frames than a flood may have, each with one byte that is wanted.
    let keys = frame(DATA, 0, 1, b"x").repeat(1000);
    let mut given = 65_535_u64;
    for n in 0..600 {
        // The window is kept: it is given back as the guest takes.
        while given < 1000 * (n + 1) {
            let update = raw.until(|frame| frame.kind == WINDOW_UPDATE && frame.stream == 1);
            given += u64::from(u32::from_be_bytes(update.payload.try_into().unwrap()));
        }
        assert!(raw.say(&keys));
    }
    raw.say(&frame(DATA, END_STREAM, 1, &[]));
    assert_eq!(reader.join().unwrap(), 600_000);
    assert!(raw.answers());
}

#[test]
fn frames_of_streams_that_are_long_over_are_no_fault() {
    // As browsers send them, which gave a page up before they had heard its end.
    let (host, ports) = started();
    let control = ports[0].connected();
    let mut raw = Raw::new(host.proxy());
    for n in 0..300 {
        raw.say(&headers(2 * n + 1, END_STREAM, &get("x", "/")));
        raw.until(|frame| frame.kind == DATA && frame.flags & END_STREAM != 0);
    }
    for n in 0..300 {
        let stream = 2 * n + 1;
        raw.say(&frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
        raw.say(&frame(WINDOW_UPDATE, 0, stream, &[0, 0, 0, 1]));
        raw.say(&frame(PRIORITY, 0, stream, &[0, 0, 0, 0, 1]));
    }
    assert!(raw.answers());
    others_are_served(&host, &control);
}

#[test]
fn r65_a_request_that_could_be_read_as_another_in_http_1_1_reaches_no_guest() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let base = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "a"),
        (":path", "/"),
    ];
    // Each in place of the field of its name, or besides.
    let with = |name: &str, value: &str| {
        let mut all = Vec::new();
        let mut is_there = false;
        for (of, old) in base {
            let new = if of == name { value } else { old };
            is_there |= of == name;
            all.extend(field(of.as_bytes(), new.as_bytes()));
        }
        if !is_there {
            all.extend(field(name.as_bytes(), value.as_bytes()));
        }
        all
    };
    let twice = |name: &str, value: &str| {
        [field(name.as_bytes(), value.as_bytes()), with(name, value)].concat()
    };
    let mut corpus: Vec<(String, Vec<u8>)> = Vec::new();
    for (name, value) in [
        // The framing of another protocol.
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "identity"),
        ("connection", "close"),
        ("connection", "keep-alive, x"),
        ("proxy-connection", "keep-alive"),
        ("keep-alive", "5"),
        ("upgrade", "websocket"),
        ("te", "gzip, trailers"),
        ("content-length", "4"),
        ("content-length", "2"),
        ("content-length", "+3"),
        ("content-length", "3, 3"),
        ("content-length", "0x3"),
        ("content-length", ""),
        ("content-length", "18446744073709551619"),
        ("content-length", " 3"),
        // Lines within a line.
        ("x", "a\r\nX-Injected: 1"),
        ("x", "a\nX-Injected: 1"),
        ("x", "a\rX-Injected: 1"),
        ("x", "a\0b"),
        ("x", " a"),
        ("x", "a "),
        ("x: y\r\nx-injected", "1"),
        ("x y", "1"),
        ("x:", "1"),
        ("X", "1"),
        ("", "1"),
        (":path", "/ HTTP/1.1\r\nX-Injected: 1"),
        (":path", "/ HTTP/1.1"),
        (":path", "/\t"),
        (":path", "/\0"),
        (":path", ""),
        (":path", "x"),
        (":path", "http://b/"),
        (":path", "*"),
        (":method", "GET / HTTP/1.1\r\nX-Injected: 1\r\n\r\nPOST"),
        (":method", "GET /"),
        (":method", ""),
        (":scheme", "http\r\nX-Injected: 1"),
        (":scheme", "file"),
        (":scheme", ""),
        (":authority", "a\r\nX-Injected: 1"),
        (":authority", "a b"),
        (":authority", "a/b"),
        (":authority", "a@b"),
        (":authority", "b@a"),
        (":authority", ""),
        (":authority", "a:80:80"),
        ("host", "b"),
        ("host", "a, a"),
        ("host", ""),
        (":protocol", "websocket"),
        (":status", "200"),
        (":unknown", "x"),
    ] {
        corpus.push((format!("{name:?}: {value:?}"), with(name, value)));
    }
    for (name, value) in base {
        corpus.push((format!("{name} twice"), twice(name, value)));
        let without = base.iter().filter(|(of, _)| *of != name);
        let without: Vec<_> = without.copied().collect();
        corpus.push((format!("no {name}"), fields(&without)));
        let mut last = without.clone();
        last.extend([("x", "y"), (name, value)]);
        corpus.push((format!("{name} behind others"), fields(&last)));
    }
    for name in ["host", "content-length"] {
        let value = if name == "host" { "a" } else { "3" };
        corpus.push((format!("{name} twice"), twice(name, value)));
    }
    corpus.push(("CONNECT with a path".into(), with(":method", "CONNECT")));
    for (what, fields) in &corpus {
        let mut raw = Raw::new(host.proxy());
        raw.say(&headers(1, 0, fields));
        raw.say(&frame(DATA, END_STREAM, 1, b"abc"));
        let said = loop {
            match raw.hear() {
                Some(frame) if frame.stream == 1 && frame.kind != WINDOW_UPDATE => break frame,
                Some(frame) if frame.kind == GOAWAY => break frame,
                Some(_) => {}
                None => panic!("{what}: nothing was said"),
            }
        };
        match said.kind {
            RST_STREAM => assert!(
                [PROTOCOL_ERROR, STREAM_CLOSED]
                    .contains(&u32::from_be_bytes(said.payload[..4].try_into().unwrap())),
                "{what}: {said:?}"
            ),
            GOAWAY => assert_eq!(said.payload[4..8], PROTOCOL_ERROR.to_be_bytes(), "{what}"),
            // 400 is in HPACK's own table (RFC 7541 appendix A), and 404 too.
            HEADERS => assert!([0x8c, 0x8d].contains(&said.payload[0]), "{what}: {said:?}"),
            _ => panic!("{what}: {said:?}"),
        }
    }
    // Nothing of it was a request.
    others_are_served(&host, &control);
}

#[test]
fn r65_a_body_is_as_long_as_was_said_and_its_trailers_are_no_fields_of_the_request() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let post = |length: &str| {
        let mut all = vec![
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "a"),
            (":path", "/"),
        ];
        all.extend((!length.is_empty()).then_some(("content-length", length)));
        fields(&all)
    };
    // More than was said, and less.
    for body in [
        frame(DATA, 0, 1, b"abcGET / HTTP/1.1\r\n\r\n"),
        frame(DATA, END_STREAM, 1, b"ab"),
        [frame(DATA, 0, 1, b"ab"), frame(DATA, END_STREAM, 1, b"cd")].concat(),
        [
            frame(DATA, 0, 1, b"ab"),
            headers(1, END_STREAM, &fields(&[("x", "y")])),
        ]
        .concat(),
    ] {
        let mut raw = Raw::new(host.proxy());
        raw.say(&headers(1, 0, &post("3")));
        let (mut guest, _) = control.tunnel();
        let got = head(&mut guest);
        assert!(got.contains("Content-Length: 3\r\n"), "{got}");
        raw.say(&body);
        assert_eq!(raw.reset(1), PROTOCOL_ERROR);
        // Whatever part of it came, it is not whole, and nothing is behind it.
        let mut rest = Vec::new();
        let _ = guest.read_to_end(&mut rest);
        assert!(rest.len() < 3 && b"abc".starts_with(&rest), "{rest:?}");
    }
    // In chunks, whose end says what comes behind.
    for trailer in [
        ("content-length", "3"),
        ("transfer-encoding", "chunked"),
        ("host", "b"),
        ("authorization", "x"),
        ("connection", "x"),
        (":path", "/b"),
        ("x", "a\r\nX-Injected: 1"),
    ] {
        let mut raw = Raw::new(host.proxy());
        raw.say(&headers(1, 0, &post("")));
        let (mut guest, _) = control.tunnel();
        head(&mut guest);
        raw.say(&frame(DATA, 0, 1, b"abc"));
        raw.say(&headers(1, END_STREAM, &fields(&[trailer])));
        let mut got = Vec::new();
        guest
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        while !got.ends_with(b"0\r\n\r\n") {
            let mut byte = [0];
            match guest.read(&mut byte) {
                Ok(1) => got.extend(byte),
                _ => break,
            }
        }
        let got = String::from_utf8_lossy(&got).to_lowercase();
        assert!(
            "3\r\nabc\r\n0\r\n\r\n".starts_with(&*got),
            "{trailer:?}: {got:?}"
        );
    }
    others_are_served(&host, &control);
}

#[test]
fn r67_a_client_that_does_not_get_to_a_request_is_given_up() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let begin = Instant::now();
    // The preface, byte by byte; half of a header; PING in place of a request; nothing behind the preface.
    let trickles: [(&str, Vec<u8>); 3] = [
        ("the preface", PREFACE.to_vec()),
        (
            "half of a header",
            [
                PREFACE.to_vec(),
                frame(SETTINGS, 0, 0, &[]),
                frame(HEADERS, END_STREAM, 1, &get("a", "/")),
                frame(CONTINUATION, 0, 1, b""),
            ]
            .concat(),
        ),
        (
            "PING",
            [
                PREFACE.to_vec(),
                frame(SETTINGS, 0, 0, &[]),
                frame(PING, 0, 0, b"12345678").repeat(100),
            ]
            .concat(),
        ),
    ];
    let ended = std::thread::scope(|scope| {
        let trickling = trickles.iter().map(|(what, bytes)| {
            let client = host.proxy();
            scope.spawn(move || {
                let mut raw = Raw::silent(client);
                // The last byte is left out, so that nothing is ever whole.
                let (first, rest) = bytes.split_at(bytes.len().min(16));
                raw.say(first);
                let mut sending = raw.tcp.try_clone().unwrap();
                let rest = rest[..rest.len() - 1].to_vec();
                let sender = std::thread::spawn(move || {
                    for byte in rest {
                        if sending.write_all(&[byte]).is_err() {
                            return;
                        }
                        std::thread::sleep(Duration::from_millis(100));
                    }
                });
                let ended = raw.ended();
                let _ = raw.tcp.shutdown(Shutdown::Both);
                sender.join().unwrap();
                (*what, ended)
            })
        });
        let trickling: Vec<_> = trickling.collect();
        let join = |one: std::thread::ScopedJoinHandle<'_, _>| one.join().unwrap();
        trickling.into_iter().map(join).collect::<Vec<_>>()
    });
    assert!(begin.elapsed() >= Duration::from_secs(9), "{ended:?}");
    println!("{ended:?} after {:?}", begin.elapsed());
    others_are_served(&host, &control);
}

#[test]
fn streams_that_are_given_up_leave_the_connection_its_window() {
    let (host, ports) = started();
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let client = Client::new(host.proxy());
    let (mut tunnels, mut guests) = (Vec::new(), Vec::new());
    // More than the connection's window, by streams whose VM takes nothing and has ended its sending.
    for _ in 0..300 {
        let mut stream = client.connect("a:80");
        let (guest, _) = a.tunnel();
        assert_eq!(stream.status(), 200);
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.rest().unwrap(), "");
        stream.say(&vec![0; 1 << 20], false);
        tunnels.push(stream);
        guests.push(guest);
        if tunnels.len() == 50 {
            for mut stream in tunnels.drain(..) {
                stream.send.send_reset(Reason::CANCEL);
            }
        }
    }
    for guest in &guests {
        host.until("the VM hears that the client has given it up", |_| {
            socket_end::is_closed(guest).then_some(())
        });
    }
    carries_much(&client, &b);
}

/// Another VM's stream of the same connection goes on.
fn carries_much(client: &Client, b: &Control) {
    let mut stream = client.connect("b:80");
    let (mut guest, _) = b.tunnel();
    assert_eq!(stream.status(), 200);
    let many = vec![7; 4 << 20];
    stream.say(&many, true);
    let mut got = Vec::new();
    guest.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), many.len());
}

#[test]
fn uploads_that_are_given_up_leave_the_connection_its_window() {
    let (host, ports) = started();
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let client = Client::new(host.proxy());
    let mut guests = Vec::new();
    for n in 0..300 {
        let mut stream = client.ask("POST", "http://a/", &[], false);
        let (mut guest, _) = a.tunnel();
        head(&mut guest);
        stream.say(&vec![0; 1 << 20], false);
        if n % 2 == 0 {
            // An answer that has begun, or is over, while the body is not.
            let answer = if n % 4 == 0 {
                "Content-Length: 9\r\n\r\nhalf"
            } else {
                "Content-Length: 0\r\n\r\n"
            };
            guest
                .write_all(format!("HTTP/1.1 200 OK\r\n{answer}").as_bytes())
                .unwrap();
            assert_eq!(stream.status(), 200);
        }
        stream.send.send_reset(Reason::CANCEL);
        guests.push(guest);
    }
    carries_much(&client, &b);
}

#[test]
fn an_upload_whose_answer_came_early_is_told_to_stop_and_the_answer_is_whole() {
    let (host, ports) = Host::serving(&[("a", 3)], "[limits]\nresponse_s = 1");
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut stream = client.ask("POST", "http://a/", &[], false);
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    stream.say(&vec![0; 4 << 20], false);
    guest
        .write_all(
            b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmuch",
        )
        .unwrap();
    assert_eq!(stream.status(), 413);
    assert_eq!(stream.rest().unwrap(), "much");
    // RFC 9113 §8.1: what is not wanted any more is no error.
    assert_eq!(stream.reset(), Reason::NO_ERROR);
    assert_eq!(client.get("http://x/").status(), 404);
}

#[test]
fn a_whole_download_arrives_though_its_client_never_ends_its_sending() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    for ends in [false, true] {
        let mut stream = client.connect("a:80");
        let (mut guest, _) = control.tunnel();
        assert_eq!(stream.status(), 200);
        stream.say(b"GET", ends);
        let many: Vec<u8> = (0..16 << 20).map(|n: u32| (n % 251) as u8).collect();
        let sent = many.clone();
        let server = std::thread::spawn(move || {
            let mut three = [0; 3];
            guest.read_exact(&mut three).unwrap();
            guest.write_all(&sent).unwrap();
            guest.shutdown(Shutdown::Write).unwrap();
            guest
        });
        let mut got = Vec::new();
        while let Some(data) = stream.some().unwrap() {
            got.extend_from_slice(&data);
        }
        assert!(got == many, "{} bytes came", got.len());
        server.join().unwrap();
    }
}

#[test]
fn tunnels_that_rest_take_no_time_of_a_processor() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let client = Client::new(host.proxy());
    let mut resting = Vec::new();
    for n in 0..100 {
        let mut stream = client.connect("a:80");
        let (guest, _) = control.tunnel();
        assert_eq!(stream.status(), 200);
        match n % 3 {
            0 => stream.say(b"", true),
            1 => guest.shutdown(Shutdown::Write).unwrap(),
            _ => {}
        }
        resting.push((stream, guest));
    }
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", host.worker())).unwrap();
        let rest = stat.rsplit_once(')').unwrap().1;
        let numbers: Vec<i64> = rest.split(' ').filter_map(|n| n.parse().ok()).collect();
        // utime and stime, in 1/100 s: fields 14 and 15, the first of which here is 4.
        numbers[10] + numbers[11]
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(3));
    let took = ticks() - before;
    println!("{took} ticks in 3 s");
    assert!(took < 100, "{took} ticks: something spins");
}
