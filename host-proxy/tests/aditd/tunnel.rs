//! CONNECT with the client's socket in the dial: what aditd does while a port process, which its guest may control, has the
//! client too.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_channel::socket_end;
use adit_port::control::{DialError, DialFailed, Dialed, Status, Target};
use adit_port::control_io::Message;

use crate::host::{Answer, Control, HANG, Host, Port};
use crate::proxy::head;

const CONNECT: &[u8] = b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n";

fn started(more: &str) -> (Host, Vec<Port>, Control) {
    let (mut host, ports) = Host::new(&[("a", 3)], more);
    host.start();
    let control = ports[0].connected();
    (host, ports, control)
}

/// A client that asks for a tunnel, and what the port process gets of it.
fn asked(host: &Host, control: &Control, behind: &[u8]) -> (TcpStream, u64) {
    let mut client = host.proxy();
    client.write_all(&[CONNECT, behind].concat()).unwrap();
    (client, control.dial().id)
}

fn failed(id: u64, error: DialError) -> Message {
    Message::DialFailed(DialFailed {
        id,
        error,
        status: 0,
        errno: 0,
        text: "no".into(),
    })
}

/// The whole answer, which ends in order.
fn answer(client: &mut TcpStream) -> Answer {
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    Answer::parse(&said).unwrap()
}

/// Reads everything there is, and how it ends.
fn end(client: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut said = Vec::new();
    let end = client.read_to_end(&mut said);
    (said, end.err().map(|e| e.kind()))
}

#[test]
fn a_fresh_tunnel_takes_two_crossings_of_the_control_socket_until_its_first_byte() {
    let (host, _ports, control) = started("");
    for _ in 0..3 {
        let mut client = host.proxy();
        client.write_all(&[CONNECT, b"ahead"].concat()).unwrap();
        // One from aditd, which has everything with it: nothing came before it, also of the tunnel before.
        let (message, fd) = control.hear().unwrap();
        let Message::Connect(connect) = message else {
            panic!("{message:?}")
        };
        let (prefix, id) = (connect.prefix.clone(), connect.id);
        control.keep(connect, fd.unwrap());
        // One back, and the client hears what the port process and the guest say, from nobody else.
        control.dialed(id);
        let (mut guest, _) = control.attached();
        guest.write_all(b"!").unwrap();
        assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
        let mut first = [0];
        client.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"!");
        // What aditd had not read is in the socket.
        let mut behind = vec![0; 5 - prefix.len()];
        guest.read_exact(&mut behind).unwrap();
        assert_eq!([prefix, behind].concat(), b"ahead");
    }
}

/// The next frame that has to do with a dial.
fn next(control: &Control) -> Message {
    control.hear().unwrap().0
}

#[test]
fn a_connect_crosses_the_control_socket_twice() {
    let (host, _ports, control) = started("");
    for _ in 0..3 {
        // Two crossings: this frame, and the answer.
        let mut client = host.proxy();
        client.write_all(&[CONNECT, b"ahead"].concat()).unwrap();
        let Some((Message::Connect(connect), Some(fd))) = control.hear() else {
            panic!("not a dial with its client")
        };
        assert_eq!(connect.to, Target::Service("tcp:80".parse().unwrap()));
        assert_eq!(connect.prefix, b"ahead");
        assert!(connect.greeting.starts_with(b"HTTP/1.1 200 "));
        let (id, boot_nonce) = (connect.id, [1; 16]);
        control.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
        // aditd says nothing to the client any more, whatever it sends.
        client.write_all(b" and behind").unwrap();
        let mut guest = TcpStream::from(fd);
        guest.set_nonblocking(false).unwrap();
        let mut got = [0; 11];
        guest.read_exact(&mut got).unwrap();
        assert_eq!(&got, b" and behind");
        guest.write_all(&connect.greeting).unwrap();
        guest.write_all(b"bytes").unwrap();
        socket_end::reset_on_close(&guest, false);
        drop(guest);
        let (said, how) = end(&mut client);
        assert_eq!(said, [&connect.greeting[..], b"bytes"].concat());
        // aditd has closed its duplicate, or there would be no end.
        assert_eq!(how, None);
    }
    // The next frame belongs to the next request.
    let mut client = host.proxy();
    client.write_all(CONNECT).unwrap();
    assert!(matches!(next(&control), Message::Connect(_)));
}

#[test]
fn a_relayed_request_crosses_it_twice_too() {
    let (host, _ports, control) = started("");
    for _ in 0..3 {
        let mut client = host.proxy();
        client
            .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .unwrap();
        let Some((Message::Connect(connect), Some(fd))) = control.hear() else {
            panic!("not a dial with its end")
        };
        assert!(connect.greeting.is_empty() && connect.prefix.is_empty());
        let (id, boot_nonce) = (connect.id, [1; 16]);
        control.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
        let mut guest = UnixStream::from(fd);
        guest.set_nonblocking(false).unwrap();
        head(&mut guest);
        guest
            .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
            .unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(answer(&mut client).body, "ok");
    }
}

#[test]
fn a_port_process_of_the_build_before_is_dialled_in_three_steps() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.start();
    let control = ports[0].connected_older();
    // A tunnel.
    let mut client = host.proxy();
    client.write_all(&[CONNECT, b"ahead"].concat()).unwrap();
    let Message::Dial(dial) = next(&control) else {
        panic!("it knows nothing else")
    };
    // Not read, though it waits in aditd.
    client.write_all(b" and behind").unwrap();
    control.dialed(dial.id);
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    let (mut guest, prefix) = control.attached();
    assert_eq!(prefix, b"ahead");
    let mut got = [0; 11];
    guest.read_exact(&mut got).unwrap();
    assert_eq!(&got, b" and behind");
    guest.write_all(b"down").unwrap();
    client.read_exact(&mut got[..4]).unwrap();
    assert_eq!(&got[..4], b"down");
    // A request.
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .unwrap();
    control.dialed(control.dial().id);
    let (mut guest, _) = control.attached();
    head(&mut guest);
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        .unwrap();
    assert_eq!(answer(&mut client).body, "ok");
    // A refusal.
    let (mut client, id) = asked(&host, &control, b"");
    control.say(&failed(id, DialError::Refused), None);
    assert_eq!(answer(&mut client).status, 503);
    // A client that leaves.
    let (client, id) = asked(&host, &control, b"");
    drop(client);
    control.cancelled(id);
    // The next port process is of today's build.
    drop(control);
    let control = ports[0].connected();
    let mut client = host.proxy();
    client.write_all(CONNECT).unwrap();
    assert!(matches!(next(&control), Message::Connect(_)));
}

#[test]
fn a_dial_that_fails_is_answered_by_aditd_and_the_client_is_served_no_more() {
    let (host, _ports, control) = started("");
    for (error, status) in [
        (DialError::Refused, 503),
        (DialError::Timeout, 504),
        (DialError::Reset, 502),
        (DialError::Busy, 503),
    ] {
        // What it sends behind its CONNECT is meant for the tunnel, and is no request.
        let behind = b"GET http://nobody/ HTTP/1.1\r\nHost: nobody\r\n\r\n";
        let (mut client, id) = asked(&host, &control, behind);
        // The port process keeps its duplicate, and would read along.
        let kept = control.client(id);
        control.say(&failed(id, error), None);
        // By a shutdown, as somebody else has the socket too.
        let (said, how) = end(&mut client);
        let answer = Answer::parse(&said).unwrap();
        assert_eq!((answer.status, how), (status, None), "{}", answer.body);
        let says = |what: &str| answer.head.contains(what);
        assert!(says("proxy-status: adit; error=") && says("connection: close"));
        drop(kept);
    }
}

#[test]
fn a_client_that_leaves_during_its_dial_gives_it_up_however_it_leaves() {
    let (host, _ports, control) = started("");
    for (unread, resets) in [(false, false), (false, true), (true, false), (true, true)] {
        let behind: &[u8] = if unread { b"first bytes" } else { b"" };
        let (mut client, id) = asked(&host, &control, behind);
        if unread {
            client.write_all(b"and some that nobody has read").unwrap();
        }
        socket_end::reset_on_close(&client, resets);
        let begin = Instant::now();
        drop(client);
        // Of one that ends in order, aditd finds out only by asking.
        assert!(control.cancelled(id) <= usize::from(!resets));
        let limit = if resets { 2 } else { 9 };
        assert!(
            begin.elapsed() < Duration::from_secs(limit),
            "{:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn a_client_that_has_ended_its_sending_is_asked_and_gets_its_tunnel() {
    let (host, _ports, control) = started("");
    let (mut client, id) = asked(&host, &control, b"all there is");
    client.shutdown(Shutdown::Write).unwrap();
    let Message::Ask(ask) = next(&control) else {
        panic!("not asked")
    };
    assert_eq!(
        (ask.id, &ask.text[..]),
        (id, &b"HTTP/1.1 100 Continue\r\n\r\n"[..])
    );
    control.ask(&ask);
    control.dialed(id);
    let (mut guest, prefix) = control.attached();
    assert_eq!(prefix, b"all there is");
    assert_eq!(guest.read(&mut [0; 9]).unwrap(), 0);
    assert!(head(&mut client).starts_with("HTTP/1.1 100 "));
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    guest.write_all(b"answer").unwrap();
    let mut got = [0; 6];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"answer");
}

#[test]
fn a_client_that_floods_behind_its_connect_is_not_read() {
    let (host, _ports, control) = started("");
    let (mut client, id) = asked(&host, &control, b"");
    // More than the kernel keeps for a connection.
    let data: Vec<u8> = (0..64u32 << 20).map(|i| (i % 251) as u8).collect();
    client
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut sent = 0;
    while let Ok(n) = client.write(&data[sent..]) {
        sent += n;
        assert!(sent < data.len(), "somebody reads it all");
    }
    assert_eq!(host.get("/v1/vms/a")["name"], "a");
    control.dialed(id);
    let (mut guest, prefix) = control.attached();
    assert!(prefix.is_empty());
    let mut got = vec![0; sent];
    guest.read_exact(&mut got).unwrap();
    assert!(got == data[..sent]);
}

#[test]
fn a_port_process_that_is_killed_during_a_dial_leaves_an_answer_or_a_greeting_and_never_both() {
    for answered in [false, true] {
        for unread in [false, true] {
            let (host, ports, control) = started("");
            let (mut client, id) = asked(&host, &control, b"");
            if unread {
                // A frame of aditd that it has not read: the kernel tells aditd of a reset first.
                let mut other = host.proxy();
                other.write_all(CONNECT).unwrap();
                host.until("the frame is there", |_| {
                    let mut fds = [nix::poll::PollFd::new(
                        control.0.as_fd(),
                        nix::poll::PollFlags::POLLIN,
                    )];
                    (nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO) == Ok(1)).then_some(())
                });
                std::mem::forget(other);
            }
            if answered {
                control.dialed(id);
            }
            let kept = control.1.clone();
            drop(control);
            let _next = ports[0].connected();
            if answered {
                // Greeted, and then killed.
                let (mut guest, _) = pop(&kept);
                guest.write_all(b"bytes").unwrap();
                drop(guest);
                assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
                let (said, how) = end(&mut client);
                assert!(b"bytes".starts_with(&said[..]), "{said:?}");
                assert_eq!(how, Some(ErrorKind::ConnectionReset));
            } else {
                drop(kept);
                let answer = answer(&mut client);
                assert_eq!(answer.status, 503, "{}", answer.body);
            }
        }
    }
}

fn pop(clients: &std::sync::Mutex<crate::host::Clients>) -> (UnixStream, Vec<u8>) {
    clients.lock().unwrap().open.pop_front().unwrap()
}

#[test]
fn aditd_that_is_killed_during_a_dial_leaves_no_client_that_waits() {
    let (mut host, _ports, control) = started("");
    let (mut client, id) = asked(&host, &control, b"");
    host.kill();
    // The port process sees the end of the connection, and gives its dials up.
    while control.hear().is_some() {}
    drop(control.client(id));
    assert_eq!(end(&mut client), (vec![], Some(ErrorKind::ConnectionReset)));
}

#[test]
fn a_port_process_that_breaks_off_leaves_a_client_without_a_second_answer() {
    let (host, ports, control) = started("");
    let (mut client, id) = asked(&host, &control, b"");
    // What it would say next is unknown: perhaps it has greeted the client.
    let (fd, connect) = control.client(id);
    TcpStream::from(fd).write_all(&connect.greeting).unwrap();
    nix::sys::socket::send(
        control.0.as_raw_fd(),
        b"no frame",
        nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
    )
    .unwrap();
    drop(control);
    let _next = ports[0].connected();
    let (said, how) = end(&mut client);
    // A reset may take what was not read.
    assert!(
        connect.greeting.starts_with(&said),
        "{}",
        String::from_utf8_lossy(&said)
    );
    assert_eq!(how, Some(ErrorKind::ConnectionReset));
    assert_eq!(host.get("/v1/vms/a")["name"], "a");
}

#[test]
fn an_answer_to_no_dial_and_a_second_answer_mean_nothing() {
    let (host, ports, control) = started("");
    let answered = |id| {
        control.say(
            &Message::Dialed(Dialed {
                id,
                boot_nonce: [0; 16],
            }),
            None,
        )
    };
    answered(77);
    control.say(&failed(78, DialError::Reset), None);
    let (mut client, id) = asked(&host, &control, b"");
    control.dialed(id);
    answered(id);
    control.say(&failed(id, DialError::Reset), None);
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    let (mut guest, _) = control.attached();
    // The connection is the same one.
    let status = Status {
        streams: 5,
        ..ports[0].status(true)
    };
    control.say(&Message::Status(status), None);
    host.until("the status is shown", |h| {
        (h.get("/v1/vms/a")["streams"] == 5).then_some(())
    });
    guest.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

/// It is made blocking, is full, and would linger: a plain write or close would stop aditd for a minute.
#[test]
fn r105_a_client_that_a_port_process_has_made_blocking_delays_nobody() {
    let (host, _ports, control) = started("");
    let mut clients = Vec::new();
    for fail in [true, false, true] {
        let (client, id) = asked(&host, &control, b"");
        let mut stream = TcpStream::from(control.client(id).0);
        stream.set_nonblocking(true).unwrap();
        while let Ok(1..) = stream.write(&[b'.'; 65_536]) {}
        stream.set_nonblocking(false).unwrap();
        let linger = nix::libc::linger {
            l_onoff: 1,
            l_linger: 60,
        };
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
        if !fail {
            let boot_nonce = [0; 16];
            crate::kinds::stopped(host.pid(), || {
                control.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
                // aditd has the last one.
                drop(stream);
            });
        } else {
            control.say(&failed(id, DialError::Reset), None);
            drop(stream);
        }
        clients.push(client);
        let begin = Instant::now();
        assert_eq!(host.get("/v1/vms/a")["name"], "a");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
    drop(clients);
}

#[test]
fn hundreds_of_clients_are_passed_at_once() {
    let (mut host, ports) = Host::new(
        &[("a", 3)],
        "[limits]\nconnections_per_client = 300\nrequests_per_vm = 300",
    );
    host.start();
    let control = ports[0].connected();
    let mut clients: Vec<_> = (0..256).map(|_| host.proxy()).collect();
    for client in &mut clients {
        client.write_all(CONNECT).unwrap();
    }
    let dials: Vec<_> = (0..256).map(|_| control.dial().id).collect();
    for id in dials {
        control.dialed(id);
    }
    for client in &mut clients {
        assert!(head(client).starts_with("HTTP/1.1 200 "));
    }
    // Only the port process has them.
    host.until("their descriptors are given back", |h| {
        let path = format!("/proc/{}/fd", h.worker());
        (std::fs::read_dir(path).unwrap().count() < 100).then_some(())
    });
}

/// A port process that reads nothing is waited for; then nobody knows whether it greets its client next.
#[test]
fn a_client_of_a_port_process_that_does_not_answer_is_reset_in_the_end() {
    let (host, _ports, control) = started("");
    let (mut client, id) = asked(&host, &control, b"");
    client.set_read_timeout(Some(HANG)).unwrap();
    let kept = control.client(id);
    assert!(matches!(next(&control), Message::Cancel(c) if c.id == id));
    // Though the port process still has the socket.
    assert_eq!(end(&mut client), (vec![], Some(ErrorKind::ConnectionReset)));
    drop(kept);
}

/// Of one that is stopped, or in its guest's hands: others need the descriptors.
#[test]
fn a_port_process_that_reads_nothing_costs_no_descriptors_of_clients_that_have_left() {
    for is_older in [false, true] {
        let (host, ports) = Host::serving(&[("a", 3)], "");
        let control = match is_older {
            false => ports[0].connected(),
            true => ports[0].connected_older(),
        };
        host.until("it is up", |h| {
            (h.get("/v1/vms/a")["state"] == "up").then_some(())
        });
        let open = |h: &Host| {
            let path = format!("/proc/{}/fd", h.pid());
            std::fs::read_dir(path).unwrap().count()
        };
        let before = open(&host);
        for turn in 0..10 {
            let mut clients: Vec<_> = (0..100).map(|_| host.proxy()).collect();
            for client in &mut clients {
                client.write_all(CONNECT).unwrap();
            }
            unknown(&host);
            if is_older {
                // It need not read a dial to know its number.
                for id in turn * 100 + 1..turn * 100 + 101 {
                    let boot_nonce = [1; 16];
                    control.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
                }
                unknown(&host);
            }
        }
        host.until("their descriptors are given back", |h| {
            (open(h) < before + 50).then_some(())
        });
    }
}

/// An answer behind all that was asked before.
fn unknown(host: &Host) {
    let mut client = host.proxy();
    let request = b"GET http://b/ HTTP/1.1\r\nHost: b\r\n\r\n";
    client.write_all(request).unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 404 "));
}
