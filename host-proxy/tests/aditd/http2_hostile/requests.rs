//! Requests that another reader could take for something else (R65).

use std::io::Read;
use std::time::Duration;

use super::*;

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
