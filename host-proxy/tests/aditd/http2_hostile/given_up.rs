//! Clients that do not get to a request, and streams and tunnels that are given up or rest (R67).

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use adit_channel::socket_end;
use h2::Reason;

use super::*;

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
