//! Clients that die in the middle of a request, or never finish one (R53): only their own connection is closed.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::host::{Answer, Control, HANG, Host};

const CONNECT: &[u8] = b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n";
const POST: &[u8] =
    b"POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// How a client dies.
#[derive(Clone, Copy, Debug)]
enum Death {
    /// The client closes its socket.
    Close,
    /// The client's kernel resets the connection.
    Reset,
    /// The client shuts its sending side down, and waits for the answer.
    HalfClose,
}

fn die(mut client: TcpStream, how: Death) {
    match how {
        Death::Close => {}
        Death::Reset => {
            let linger = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&client, sockopt::Linger, &linger).unwrap();
        }
        Death::HalfClose => {
            client.shutdown(Shutdown::Write).unwrap();
            let mut rest = Vec::new();
            let end = client.read_to_end(&mut rest).map_err(|e| e.kind());
            assert!(
                matches!(end, Ok(_) | Err(ErrorKind::ConnectionReset)),
                "{end:?}"
            );
        }
    }
}

/// Makes a complete request, which the guest answers.
fn served(host: &Host, control: &Control) {
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .unwrap();
    let (mut guest, _) = control.tunnel();
    read_until(&mut guest, b"\r\n\r\n");
    guest.write_all(ANSWER).unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    assert_eq!(Answer::parse(&said).unwrap().body, "ok");
}

fn read_until(stream: &mut impl Read, end: &[u8]) {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(end) {
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
}

#[test]
fn r53_a_client_that_dies_at_any_byte_of_its_request_loses_only_its_own_connection() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let body = POST.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    for how in [Death::Close, Death::Reset, Death::HalfClose] {
        for cut in 0..CONNECT.len() {
            let mut client = host.proxy();
            client.write_all(&CONNECT[..cut]).unwrap();
            die(client, how);
        }
        for cut in 0..body {
            let mut client = host.proxy();
            client.write_all(&POST[..cut]).unwrap();
            die(client, how);
        }
        // None of these was a request: the next dial that the port process gets belongs to this one.
        served(&host, &control);
        for cut in body..POST.len() {
            let mut client = host.proxy();
            client.write_all(&POST[..cut]).unwrap();
            let (mut guest, _) = control.tunnel();
            read_until(&mut guest, b"\r\n\r\n");
            die(client, how);
            // Its stream ends with it, and the part of the body that the guest has is visibly incomplete.
            let mut rest = Vec::new();
            let end = guest.read_to_end(&mut rest).map_err(|e| e.kind());
            assert!(
                matches!(end, Ok(_) | Err(ErrorKind::ConnectionReset)),
                "{end:?}"
            );
            assert!(!rest.ends_with(b"0\r\n\r\n"), "{cut}: {rest:?}");
        }
        served(&host, &control);
    }
}

#[test]
fn r53_endless_lines_and_bytes_that_are_not_text_end_their_own_connection_only() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    // These clients stay connected and send no more.
    let halves: Vec<TcpStream> = (0..64)
        .map(|i| {
            let mut client = host.proxy();
            client.write_all(&CONNECT[..i % CONNECT.len()]).unwrap();
            client
        })
        .collect();
    served(&host, &control);
    let long = vec![b'a'; 1 << 20];
    let with = |at: usize, byte: u8| {
        let mut bytes = CONNECT.to_vec();
        bytes.insert(at, byte);
        bytes
    };
    let mut wrong = vec![
        long.clone(),
        [b"CONNECT ", &long[..]].concat(),
        [&CONNECT[..CONNECT.len() - 2], b"X: ", &long].concat(),
        vec![0; 1 << 20],
    ];
    wrong.extend((0..CONNECT.len() - 2).map(|at| with(at, 0)));
    for bytes in wrong {
        let mut client = host.proxy();
        // The connection may be closed before all is sent.
        let _ = client.write_all(&bytes);
        let mut said = Vec::new();
        let end = client.read_to_end(&mut said).map_err(|e| e.kind());
        assert!(
            matches!(end, Ok(_) | Err(ErrorKind::ConnectionReset)),
            "{end:?}"
        );
        let status = Answer::parse(&said).map(|a| a.status);
        assert!(
            status.is_err() || matches!(status, Ok(400 | 414 | 431)),
            "{status:?}"
        );
    }
    served(&host, &control);
    // The clients that sent no more are closed after their time, each on its own.
    for mut client in halves {
        client
            .set_read_timeout(Some(HANG + Duration::from_secs(10)))
            .unwrap();
        let end = client.read_to_end(&mut Vec::new()).map_err(|e| e.kind());
        assert!(
            matches!(end, Ok(_) | Err(ErrorKind::ConnectionReset)),
            "{end:?}"
        );
    }
    served(&host, &control);
}

/// How a guest's answer without a length ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The server ends it regularly, and the port process passes that on.
    Ended,
    /// Server, agent or port process broke off: the socket is closed without the regular end.
    BrokenOff,
    /// aditd is killed.
    Killed,
}

/// A partial answer must not look complete, whatever its framing and whichever process dies (for the guest's side, see `close`).
#[test]
fn r117_a_partial_answer_never_looks_complete() {
    const HALF: &[u8] = b"the first half of what there is to say";
    for version in ["1.1", "1.0"] {
        for stop in [Stop::Ended, Stop::BrokenOff, Stop::Killed] {
            let (mut host, ports) = Host::serving(&[("a", 3)], "");
            let control = ports[0].connected();
            let mut client = host.proxy();
            let request =
                format!("GET http://a/ HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n");
            client.write_all(request.as_bytes()).unwrap();
            let (mut guest, _) = control.tunnel();
            read_until(&mut guest, b"\r\n\r\n");
            // Without a length, only its end says that it is complete.
            guest.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            guest.write_all(HALF).unwrap();
            let mut said = Vec::new();
            while !said.windows(HALF.len()).any(|w| w == HALF) {
                let mut some = [0; 512];
                let n = client.read(&mut some).unwrap();
                assert!(
                    n > 0,
                    "{version} {stop:?}: {}",
                    String::from_utf8_lossy(&said)
                );
                said.extend(&some[..n]);
            }
            match stop {
                Stop::Ended => guest.shutdown(Shutdown::Write).unwrap(),
                Stop::BrokenOff => drop(guest.shutdown(Shutdown::Both)),
                Stop::Killed => host.kill(),
            }
            let end = client.read_to_end(&mut said).map_err(|e| e.kind());
            let whole = if version == "1.1" {
                said.ends_with(b"\r\n0\r\n\r\n")
            } else {
                end.is_ok()
            };
            assert_eq!(whole, stop == Stop::Ended, "{version} {stop:?}: {end:?}");
            if stop != Stop::Ended {
                assert_eq!(end, Err(ErrorKind::ConnectionReset), "{version} {stop:?}");
            }
        }
    }
}

/// The answer to HEAD has no body, whatever its header says: it is complete.
#[test]
fn r117_an_answer_to_head_ends_regularly() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    for _ in 0..20 {
        let mut client = host.proxy();
        client
            .write_all(b"HEAD http://nobody/ HTTP/1.1\r\nHost: nobody\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        assert!(said.starts_with(b"HTTP/1.1 404"), "{said:?}");
    }
}
