//! A server that changes to another protocol takes its client along: WebSockets through absolute-form.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

use crate::host::{Control, HANG, Host, Port};
use crate::server::{get, next_head, ok, serve, until};

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

fn started(more: &str) -> (Host, Vec<Port>, Control) {
    let (host, ports) = Host::serving(&[("a", 3)], more);
    let control = ports[0].connected();
    (host, ports, control)
}

/// What a client of WebSockets sends to a proxy.
fn ask(client: &mut TcpStream, behind: &[u8]) {
    ask_as(client, "http", behind);
}

/// The same with another scheme.
fn ask_as(client: &mut TcpStream, scheme: &str, behind: &[u8]) {
    write!(
        client,
        "GET {scheme}://a/chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
         Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    .unwrap();
    client.write_all(behind).unwrap();
}

/// The guest's end of the request.
fn reached(control: &Control) -> UnixStream {
    control.dialed(control.dial().id);
    control.attached().0
}

/// A changed connection: the client, and the guest's end.
fn changed(host: &Host, control: &Control) -> (TcpStream, UnixStream) {
    let mut client = host.proxy();
    ask(&mut client, b"");
    let mut guest = reached(control);
    next_head(&mut guest).unwrap();
    guest
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
        .unwrap();
    let head = next_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    (client, guest)
}

fn exchange(a: &mut (impl Read + Write), b: &mut (impl Read + Write)) {
    a.write_all(b"there").unwrap();
    until(b, "there");
    b.write_all(b"back").unwrap();
    until(a, "back");
}

#[test]
fn a_web_socket_is_carried_with_its_fields() {
    carried("http");
}

/// As curl since 8.20 and Python's aiohttp ask.
#[test]
fn a_web_socket_is_carried_also_where_the_target_says_ws() {
    carried("ws");
    carried("WS");
}

fn carried(scheme: &str) {
    let (host, _ports, control) = started("");
    let client = host.proxy();
    let server = std::thread::spawn(move || {
        let guest = reached(&control);
        // Checks the key, the version, `Upgrade` and `Connection`.
        let mut socket = tungstenite::accept(guest).unwrap();
        loop {
            match socket.read().unwrap() {
                Message::Close(_) => break,
                said => socket.send(said).unwrap(),
            }
        }
        // Until the client's side has ended, too.
        while socket.flush().is_ok() && socket.read().is_ok() {}
        control
    });
    let mut client = client;
    ask_as(&mut client, scheme, b"");
    let head = next_head(&mut client).unwrap();
    assert!(
        head.starts_with("HTTP/1.1 101 Switching Protocols\r\n"),
        "{head}"
    );
    let head = head.to_lowercase();
    assert!(head.contains("\r\nupgrade: websocket\r\n"), "{head}");
    assert!(head.contains("\r\nconnection: upgrade\r\n"), "{head}");
    let accept = derive_accept_key(KEY.as_bytes()).to_lowercase();
    assert!(head.contains(&accept), "{head}");
    let mut socket = WebSocket::from_raw_socket(client, Role::Client, None);
    for size in [0, 1, 125, 70_000, 1 << 20] {
        let sent = Message::Binary(vec![7; size].into());
        socket.send(sent.clone()).unwrap();
        assert_eq!(socket.read().unwrap(), sent);
    }
    socket.close(None).unwrap();
    // The server's close comes back, and the end behind it.
    assert!(socket.read().unwrap().is_close());
    assert!(matches!(
        socket.read(),
        Err(tungstenite::Error::ConnectionClosed)
    ));
    server.join().unwrap();
}

#[test]
fn the_request_for_another_protocol_is_made_again_for_the_guest() {
    let (host, _ports, control) = started("");
    let mut client = host.proxy();
    ask(&mut client, b"");
    let mut guest = reached(&control);
    let head = next_head(&mut guest).unwrap().to_lowercase();
    assert!(head.contains("\r\nupgrade: websocket\r\n"), "{head}");
    assert!(head.contains("\r\nconnection: upgrade\r\n"), "{head}");
    // A server may refuse, and go on.
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nUpgrade: other\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nno")
        .unwrap();
    let head = next_head(&mut client).unwrap().to_lowercase();
    assert!(!head.contains("upgrade"), "{head}");
    until(&mut client, "no");
    client
        .write_all(b"GET http://nobody/ HTTP/1.1\r\nHost: nobody\r\n\r\n")
        .unwrap();
    assert!(next_head(&mut client).unwrap().starts_with("HTTP/1.1 404 "));
}

#[test]
fn what_was_sent_ahead_is_carried_both_ways() {
    let (host, _ports, control) = started("");
    let mut client = host.proxy();
    ask(&mut client, b"ahead");
    let mut guest = reached(&control);
    next_head(&mut guest).unwrap();
    guest
        .write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nfirst",
        )
        .unwrap();
    next_head(&mut client).unwrap();
    until(&mut client, "first");
    until(&mut guest, "ahead");
    exchange(&mut client, &mut guest);
}

#[test]
fn each_side_of_a_changed_connection_ends_by_itself() {
    for client_first in [true, false] {
        let (host, _ports, control) = started("");
        let (mut client, mut guest) = changed(&host, &control);
        exchange(&mut client, &mut guest);
        let mut rest = Vec::new();
        if client_first {
            client.shutdown(Shutdown::Write).unwrap();
            guest.read_to_end(&mut rest).unwrap();
            guest.write_all(b"last").unwrap();
            until(&mut client, "last");
            guest.shutdown(Shutdown::Write).unwrap();
            client.read_to_end(&mut rest).unwrap();
        } else {
            guest.shutdown(Shutdown::Write).unwrap();
            client.read_to_end(&mut rest).unwrap();
            client.write_all(b"last").unwrap();
            until(&mut guest, "last");
            client.shutdown(Shutdown::Write).unwrap();
            guest.read_to_end(&mut rest).unwrap();
        }
        assert!(rest.is_empty());
    }
}

/// How a changed connection breaks off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Off {
    /// The guest's server or agent, or the port process.
    Guest,
    /// aditd is killed.
    Killed,
    /// aditd is told to stop.
    Stopped,
}

#[test]
fn r117_a_changed_connection_that_breaks_off_looks_so_to_the_client() {
    for off in [Off::Guest, Off::Killed, Off::Stopped] {
        let (mut host, _ports, control) = started("");
        let (mut client, mut guest) = changed(&host, &control);
        exchange(&mut client, &mut guest);
        match off {
            Off::Guest => guest.shutdown(Shutdown::Both).unwrap(),
            Off::Killed => host.kill(),
            Off::Stopped => host.terminate(),
        }
        let end = client.read_to_end(&mut Vec::new()).map_err(|e| e.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "{off:?}");
    }
}

#[test]
fn r117_a_client_that_breaks_off_looks_so_to_the_guest() {
    let (host, _ports, control) = started("");
    let (mut client, mut guest) = changed(&host, &control);
    exchange(&mut client, &mut guest);
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    drop(client);
    let _ = guest.read_to_end(&mut Vec::new());
    assert!(adit_channel::socket_end::is_closed(&guest));
}

#[test]
fn a_server_that_changes_unasked_is_not_followed() {
    for request in [
        "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET http://a/ HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\n\r\n",
        "GET http://a/ HTTP/1.0\r\nHost: a\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    ] {
        let (host, _ports, control) = started("");
        let mut client = host.proxy();
        client.write_all(request.as_bytes()).unwrap();
        let mut guest = reached(&control);
        let head = next_head(&mut guest).unwrap().to_lowercase();
        assert!(!head.contains("upgrade"), "{head}");
        guest
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
            )
            .unwrap();
        let head = next_head(&mut client).unwrap();
        assert!(
            head.contains(" 502 ") && head.contains("http_protocol_error"),
            "{head}"
        );
    }
}

#[test]
fn a_server_that_insists_on_another_protocol_says_which() {
    let (host, _ports, control) = started("");
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let mut guest = reached(&control);
    next_head(&mut guest).unwrap();
    guest
        .write_all(b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    let head = next_head(&mut client).unwrap().to_lowercase();
    assert!(head.contains("\r\nupgrade: websocket\r\n"), "{head}");
}

#[test]
fn a_changed_connection_is_still_a_request_under_way() {
    let (host, _ports, control) =
        started("[limits]\nrequests_per_vm = 1\nconnections_per_client = 2");
    let (mut client, mut guest) = changed(&host, &control);
    let mut other = host.proxy();
    other
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    assert!(next_head(&mut other).unwrap().starts_with("HTTP/1.1 503 "));
    // The second of the client's connections may not have gone yet; the third is too many as long as the first is there.
    let held = host.proxy();
    let mut refused = host.proxy();
    refused.set_read_timeout(Some(HANG)).unwrap();
    let mut said = Vec::new();
    let _ = refused.read_to_end(&mut said);
    assert!(String::from_utf8_lossy(&said).contains("connection_limit_reached"));
    drop(held);
    exchange(&mut client, &mut guest);
    client.shutdown(Shutdown::Write).unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    serve(control, ok);
    host.until("its share is given back", |h| {
        get(&mut h.proxy())
            .starts_with("HTTP/1.1 200 ")
            .then_some(())
    });
}
