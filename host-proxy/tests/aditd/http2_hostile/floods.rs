//! Frames without an end, and windows that are kept shut: what they cost nobody else.

use std::io::Read;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use adit_channel::socket_end;

use super::*;

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
