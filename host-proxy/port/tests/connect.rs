//! Dials that bring their client along (`Connect`), in the real `adit-port`: a test is `aditd` on its control socket, the
//! client behind the passed socket, and the guest.

mod guest;
mod running;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use adit_channel::hello::{self, Accept, Common, Extensions, Hello};
use adit_channel::port::Notice;
use adit_channel::sink::Sink;
use adit_channel::socket_end;
use adit_engine::ResetReason;
use adit_port::control::{
    Ask, Attach, Cancel, Connect, DialError, GREETING_MAX, PREFIX_MAX, Target,
};
use adit_port::control_io::{Message, receive, send_all};
use guest::Guest;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use running::{Aditd, Running};

const GREETING: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

/// A client, and the socket that aditd has of it.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    client.set_nonblocking(true).unwrap();
    // As aditd has it: whoever closes it last resets it.
    socket_end::reset_on_close(&ours, true);
    (client, ours)
}

fn dial(id: u64) -> Connect {
    Connect {
        id,
        to: Target::VsockPort(22),
        deadline_ms: 5000,
        extensions: Extensions::default(),
        prefix: b"ahead ".to_vec(),
        greeting: GREETING.to_vec(),
    }
}

fn connect(aditd: &Aditd, connect: Connect, client: &impl AsFd) {
    send_all(&aditd.0, &Message::Connect(connect), &[client.as_fd()]).unwrap();
}

/// The guest's end, and what the host gets of it.
fn far() -> (UnixStream, Sink) {
    let (far, sink) = UnixStream::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    (far, Sink::Fd(sink.into()))
}

/// Reads so many bytes while the guest runs.
fn take(guest: &mut Guest, mut from: impl Read, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    guest.until(|_| {
        let mut buf = [0; 9001];
        match from.read(&mut buf[..9001.min(len - got.len())]) {
            Ok(0) => panic!("ended after {} bytes", got.len()),
            Ok(n) => got.extend_from_slice(&buf[..n]),
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        (got.len() == len).then_some(())
    });
    got
}

/// How a stream ends, while the guest runs.
fn end(guest: &mut Guest, mut from: impl Read) -> (Vec<u8>, Option<ErrorKind>) {
    let mut got = Vec::new();
    let end = guest.until(|_| {
        let mut buf = [0; 4096];
        match from.read(&mut buf) {
            Ok(0) => Some(None),
            Ok(n) => {
                got.extend_from_slice(&buf[..n]);
                None
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            Err(e) => Some(Some(e.kind())),
        }
    });
    (got, end)
}

/// Nothing was written to this client, and nothing is.
fn unsaid(guest: &mut Guest, mut client: &TcpStream) {
    for _ in 0..20 {
        guest
            .shard
            .turn(Some(std::time::Duration::from_millis(1)))
            .unwrap();
    }
    let said = client.read(&mut [0; 64]).map_err(|e| e.kind());
    assert_eq!(said, Err(ErrorKind::WouldBlock));
}

fn started(listen: &[u32]) -> (Running, Aditd, Guest) {
    let mut running = Running::start();
    let aditd = running.connect();
    let guest = running.boot(listen);
    aditd.wait_status(|s| s.session);
    (running, aditd, guest)
}

fn closed(guest: &mut Guest) {
    guest.until(|g| {
        let at = g.heard.iter().position(|n| {
            matches!(
                n,
                Notice::Closed {
                    reason: Some(_),
                    ..
                }
            )
        })?;
        g.heard.remove(at);
        Some(())
    });
}

#[test]
fn a_tunnel_takes_two_crossings_of_the_control_socket() {
    let mut running = Running::start();
    let aditd = running.connect();
    // What it knows is said before aditd can dial.
    assert!(matches!(
        receive(&aditd.0).unwrap(),
        Some((Message::Features(f), None)) if f.bits & 1 == 1
    ));
    let mut guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
    let (client, passed) = tcp();
    connect(&aditd, dial(1), &passed);
    let (far, sink) = far();
    guest.accept(sink);
    { &far }.write_all(b"the guest speaks first").unwrap();
    let (message, fd) = guest.until(|_| aditd.heard());
    assert!(matches!(message, Message::Dialed(d) if d.id == 1) && fd.is_none());
    // aditd has nothing more to do with it.
    drop(passed);
    let want = [GREETING, b"the guest speaks first"].concat();
    assert_eq!(take(&mut guest, &client, want.len()), want);
    { &client }.write_all(b"and more").unwrap();
    assert_eq!(take(&mut guest, &far, 14), b"ahead and more");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(end(&mut guest, &far), (vec![], None));
    far.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(end(&mut guest, &client), (vec![], None));
    assert!(aditd.heard().is_none(), "a third frame");
}

#[test]
fn the_first_byte_takes_one_round_trip_through_the_guest_and_two_with_an_agent() {
    let service = Target::Service("tcp:80".parse().unwrap());
    for (to, most) in [(Target::VsockPort(22), 1), (service, 2)] {
        let (_running, aditd, mut guest) = started(&[22, hello::PORT]);
        // Packets from the host: each round trip begins with one.
        let heard = |guest: &Guest| {
            let counters = guest.shard.port(guest.port).counters();
            counters.packets_from_guest
        };
        let before = heard(&guest);
        let (client, passed) = tcp();
        let is_service = matches!(to, Target::Service(_));
        connect(&aditd, Connect { to, ..dial(1) }, &passed);
        let (far, sink) = far();
        guest.accept(sink);
        let mut first = b"first".to_vec();
        if is_service {
            let mut asked = Vec::new();
            guest.until(|_| {
                let mut buf = [0; 1088];
                let n = { &far }.read(&mut buf).unwrap_or(0);
                asked.extend_from_slice(&buf[..n]);
                hello::read(&mut &asked[..]).ok()
            });
            let common = Common::default();
            let accept = Hello::Accept(Accept { common, version: 1 }).encode();
            first.splice(..0, accept);
        }
        { &far }.write_all(&first).unwrap();
        assert_eq!(heard(&guest) - before, most, "packets until it is said");
        let want = [GREETING, b"first"].concat();
        assert_eq!(take(&mut guest, &client, want.len()), want);
        let (message, _) = guest.until(|_| aditd.heard());
        assert!(matches!(message, Message::Dialed(d) if d.id == 1));
        assert!(aditd.heard().is_none(), "a third frame");
    }
}

#[test]
fn what_a_client_sends_during_its_dial_follows_what_it_sent_before() {
    let (_running, aditd, mut guest) = started(&[22]);
    let (client, passed) = tcp();
    let prefix = vec![b'p'; PREFIX_MAX];
    let frame = Connect {
        prefix: prefix.clone(),
        ..dial(1)
    };
    connect(&aditd, frame, &passed);
    // It sends as much as the kernel takes, and goes on when the stream is open.
    let data: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut sent = 0;
    while let Ok(n @ 1..) = { &client }.write(&data[sent..]) {
        sent += n;
    }
    assert!(sent > 0);
    let (far, sink) = far();
    guest.accept(sink);
    let mut got = Vec::new();
    guest.until(|_| {
        sent += { &client }.write(&data[sent..]).unwrap_or(0);
        let mut buf = [0; 60_000];
        while let Ok(n @ 1..) = { &far }.read(&mut buf) {
            got.extend_from_slice(&buf[..n]);
        }
        (got.len() >= prefix.len() + data.len()).then_some(())
    });
    assert!(got == [prefix, data].concat());
}

#[test]
fn a_client_whose_window_is_zero_gets_its_greeting_later_and_whole() {
    let (_running, aditd, mut guest) = started(&[22]);
    let (client, passed) = tcp();
    passed.set_nonblocking(true).unwrap();
    let mut full = 0;
    while let Ok(n @ 1..) = { &passed }.write(&[b'.'; 65_536]) {
        full += n;
    }
    connect(&aditd, dial(1), &passed);
    let (far, sink) = far();
    guest.accept(sink);
    { &far }.write_all(b"first").unwrap();
    let (message, _) = guest.until(|_| aditd.heard());
    assert!(matches!(message, Message::Dialed(_)));
    drop(passed);
    // Other dials go on meanwhile.
    let (other, passed) = tcp();
    connect(&aditd, dial(2), &passed);
    let (_far_2, sink) = self::far();
    guest.accept(sink);
    assert_eq!(take(&mut guest, &other, GREETING.len()), GREETING);
    let got = take(&mut guest, &client, full + GREETING.len() + 5);
    assert!(got[..full].iter().all(|b| *b == b'.'));
    assert_eq!(got[full..], [GREETING, b"first"].concat());
}

#[test]
fn a_guest_that_accepts_and_resets_at_once_gives_its_client_an_answer_or_a_reset() {
    let (_running, aditd, mut guest) = started(&[22]);
    for id in 1..50 {
        let (client, passed) = tcp();
        connect(&aditd, dial(id), &passed);
        let (far, sink) = far();
        let stream = guest.until(|g| match g.heard.pop() {
            Some(Notice::Incoming { stream, .. }) => Some(stream),
            _ => None,
        });
        let now = guest.shard.now();
        let port = guest.shard.port_mut(guest.port);
        port.accept(now, stream, Some(sink));
        if id % 2 == 0 {
            // Otherwise both are in the same burst.
            guest.shard.turn(Some(std::time::Duration::ZERO)).unwrap();
        }
        let port = guest.shard.port_mut(guest.port);
        port.reset(now, stream, ResetReason::Local);
        let (message, _) = guest.until(|_| aditd.heard());
        match message {
            Message::DialFailed(failed) => {
                assert_eq!(failed.id, id);
                // Then aditd answers, and is the only one that does.
                unsaid(&mut guest, &client);
            }
            Message::Dialed(dialed) => {
                assert_eq!(dialed.id, id);
                drop(passed);
                let (got, how) = end(&mut guest, &client);
                assert!(GREETING.starts_with(&got), "{got:?}");
                assert_eq!(how, Some(ErrorKind::ConnectionReset));
            }
            other => panic!("{other:?}"),
        }
        drop(far);
    }
}

#[test]
fn a_dial_that_fails_leaves_its_client_as_it_was() {
    let (running, aditd, mut guest) = started(&[22]);
    let before = running.counts();
    let (client, passed) = tcp();
    let frame = Connect {
        to: Target::VsockPort(23),
        ..dial(1)
    };
    connect(&aditd, frame, &passed);
    let (message, _) = guest.until(|_| aditd.heard());
    assert!(matches!(message, Message::DialFailed(f) if f.error == DialError::Refused));
    unsaid(&mut guest, &client);
    running.shrinks_to(before);
    // aditd answers it, keeps its bytes, and ends it in order.
    { &client }.write_all(b"unread").unwrap();
    socket_end::reset_on_close(&passed, false);
    { &passed }.write_all(b"HTTP/1.1 502").unwrap();
    assert_eq!(take(&mut guest, &client, 12), b"HTTP/1.1 502");
    assert_eq!({ &passed }.read(&mut [0; 9]).unwrap(), 6);
    drop(passed);
    assert_eq!(end(&mut guest, &client), (vec![], None));
}

#[test]
fn a_cancelled_dial_and_one_whose_aditd_has_gone_end_without_a_word() {
    let (mut running, mut aditd, mut guest) = started(&[22]);
    let before = running.counts();
    for how in ["cancelled", "killed", "replaced"] {
        let (client, passed) = tcp();
        connect(&aditd, dial(1), &passed);
        let (far, sink) = far();
        // The guest has the request, and does not answer yet.
        let stream = guest.until(|g| match g.heard.pop() {
            Some(Notice::Incoming { stream, .. }) => Some(stream),
            _ => None,
        });
        match how {
            "cancelled" => aditd.say(Message::Cancel(Cancel { id: 1 }), None),
            "killed" => {
                drop(aditd);
                aditd = running.connect();
            }
            _ => aditd = running.connect(),
        }
        closed(&mut guest);
        // Too late.
        let now = guest.shard.now();
        guest
            .shard
            .port_mut(guest.port)
            .accept(now, stream, Some(sink));
        unsaid(&mut guest, &client);
        running.shrinks_to(before);
        drop((passed, far));
        // Nobody holds it any more, so its client does not wait.
        assert_eq!(
            end(&mut guest, &client),
            (vec![], Some(ErrorKind::ConnectionReset))
        );
    }
}

#[test]
fn a_client_is_asked_until_it_is_greeted() {
    const TEXT: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
    let (_running, aditd, mut guest) = started(&[22]);
    let ask = |id, text: &[u8]| {
        let text = text.to_vec();
        aditd.say(Message::Ask(Ask { id, text }), None);
    };
    let (client, passed) = tcp();
    connect(&aditd, dial(1), &passed);
    ask(1, TEXT);
    // A dial that nobody knows.
    ask(7, b"nobody");
    assert_eq!(take(&mut guest, &client, TEXT.len()), TEXT);
    let (far, sink) = far();
    guest.accept(sink);
    let (message, _) = guest.until(|_| aditd.heard());
    assert!(matches!(message, Message::Dialed(_)));
    // The question and the answer have crossed: the client has its tunnel, and nothing is put into it.
    ask(1, TEXT);
    { &far }.write_all(b"x").unwrap();
    let want = [GREETING, b"x"].concat();
    assert_eq!(take(&mut guest, &client, want.len()), want);
    unsaid(&mut guest, &client);
}

#[test]
fn a_service_is_told_what_aditd_says_of_the_caller() {
    let (_running, aditd, mut guest) = started(&[hello::PORT]);
    let extensions = Extensions {
        arguments: b"-l".to_vec().try_into().unwrap(),
        caller: b"uid:1000".to_vec().try_into().unwrap(),
        trace: b"00-4bf9-00f0-01".to_vec().try_into().unwrap(),
    };
    let (client, passed) = tcp();
    let frame = Connect {
        to: Target::Service("tcp:80".parse().unwrap()),
        extensions: extensions.clone(),
        ..dial(1)
    };
    connect(&aditd, frame, &passed);
    let (far, sink) = far();
    guest.accept(sink);
    let mut asked = Vec::new();
    let open = guest.until(|_| {
        let mut buf = [0; 1088];
        let n = { &far }.read(&mut buf).unwrap_or(0);
        asked.extend_from_slice(&buf[..n]);
        hello::read(&mut &asked[..]).ok()
    });
    assert!(matches!(open, Hello::Open(open) if open.extensions == extensions));
    unsaid(&mut guest, &client);
    let common = Common::default();
    let accept = Hello::Accept(Accept { common, version: 1 }).encode();
    { &far }.write_all(&accept).unwrap();
    assert_eq!(take(&mut guest, &client, GREETING.len()), GREETING);
    assert_eq!(take(&mut guest, &far, 6), b"ahead ");
}

/// Sends a packet as it is, with so many descriptors.
fn raw(aditd: &Aditd, packet: &[u8], fds: &[i32]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    let iov = [std::io::IoSlice::new(packet)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(aditd.0.as_raw_fd(), &iov, rights, flags, None).unwrap();
}

#[test]
fn r53_a_dial_that_breaks_the_protocol_ends_its_connection_and_nobody_is_greeted() {
    let (mut running, mut aditd, mut guest) = started(&[22]);
    let before = running.counts();
    let long = Connect {
        greeting: vec![b'x'; GREETING_MAX + 1],
        ..dial(2)
    };
    let prefix = Connect {
        prefix: vec![b'x'; PREFIX_MAX + 1],
        ..dial(2)
    };
    let ask = Message::Ask(Ask {
        id: 1,
        text: vec![b'x'; GREETING_MAX + 1],
    });
    let attach = Message::Attach(Attach {
        id: 1,
        prefix: vec![],
    });
    for (what, message, fds) in [
        ("no descriptor", Message::Connect(dial(2)), 0),
        ("two descriptors", Message::Connect(dial(2)), 2),
        ("an id twice", Message::Connect(dial(1)), 1),
        ("a long greeting", Message::Connect(long), 1),
        ("a long prefix", Message::Connect(prefix), 1),
        ("a long question", ask, 0),
        ("a second client", attach, 1),
    ] {
        // One that is under way.
        let (client, passed) = tcp();
        connect(&aditd, dial(1), &passed);
        let (wrong, theirs) = tcp();
        let fds = vec![theirs.as_raw_fd(); fds];
        raw(&aditd, &message.encode().unwrap(), &fds);
        let end = loop {
            match receive(&aditd.0) {
                Ok(Some((
                    Message::Status(_)
                    | Message::Handover(_)
                    | Message::Features(_)
                    | Message::Ring(_),
                    _,
                ))) => {}
                other => break other.map_err(|e| e.to_string()),
            }
        };
        assert!(matches!(end, Ok(None)), "{what}: {end:?}");
        guest.heard.clear();
        unsaid(&mut guest, &client);
        unsaid(&mut guest, &wrong);
        drop(aditd);
        running.shrinks_to(before.map(|n| n - usize::from(n == before[0])));
        aditd = running.connect();
    }
}

#[test]
fn hundreds_of_dials_at_once_each_bring_a_client() {
    const DIALS: u64 = 256;
    let (running, aditd, mut guest) = started(&[22]);
    let before = running.counts();
    let mut clients = Vec::new();
    for id in 0..DIALS {
        let (client, passed) = tcp();
        // The kernel lets so many frames wait; meanwhile the process reads.
        connect(&aditd, dial(id), &passed);
        clients.push(client);
    }
    let mut fars = Vec::new();
    for _ in 0..DIALS {
        let (far, sink) = far();
        guest.accept(sink);
        fars.push(far);
    }
    // Nobody is greeted whose answer aditd has no room for yet.
    let mut answered = 0;
    guest.until(|_| {
        while let Some((message, _)) = aditd.heard() {
            assert!(matches!(message, Message::Dialed(_)), "{message:?}");
            answered += 1;
        }
        (answered == DIALS).then_some(())
    });
    for client in &clients {
        assert_eq!(take(&mut guest, client, GREETING.len()), GREETING);
    }
    for far in &fars {
        assert_eq!(take(&mut guest, far, 6), b"ahead ");
    }
    drop((clients, fars));
    guest.until(|g| (g.shard.port(g.port).streams() == 0).then_some(()));
    running.shrinks_to(before);
}

#[test]
fn a_dial_for_which_no_descriptor_is_left_fails_and_the_others_go_on() {
    let (running, aditd, mut guest) = started(&[22]);
    let numbers: Vec<u32> = {
        let dir = std::fs::read_dir(format!("/proc/{}/fd", running.child.id())).unwrap();
        let names = dir.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.map(|n| n.parse().unwrap()).collect()
    };
    // So many numbers are free below the limit.
    let limit_at = (0..).filter(|n| !numbers.contains(n)).nth(8).unwrap();
    let mut limit = std::process::Command::new("prlimit");
    limit.arg(format!("--pid={}", running.child.id()));
    match limit.arg(format!("--nofile={limit_at}:")).status() {
        Ok(done) => assert!(done.success()),
        Err(e) => return println!("skipped: no prlimit: {e}"),
    }
    const DIALS: u64 = 64;
    let clients: Vec<_> = (0..DIALS)
        .map(|id| {
            let (client, passed) = tcp();
            connect(&aditd, dial(id), &passed);
            (client, passed)
        })
        .collect();
    let mut refused = Vec::new();
    guest.until(|g| {
        while let Some((message, _)) = aditd.heard() {
            let Message::DialFailed(failed) = message else {
                panic!("{message:?}")
            };
            assert_eq!(failed.error, DialError::Busy);
            refused.push(failed.id);
        }
        let incoming = |n: &&Notice| matches!(n, Notice::Incoming { .. });
        let asked = g.heard.iter().filter(incoming).count();
        (refused.len() + asked == DIALS as usize).then_some(())
    });
    let some = 1..DIALS as usize;
    assert!(some.contains(&refused.len()), "{refused:?}");
    let mut fars = Vec::new();
    for (id, (client, _)) in (0..).zip(&clients) {
        if refused.contains(&id) {
            unsaid(&mut guest, client);
        } else {
            let (far, sink) = far();
            guest.accept(sink);
            fars.push(far);
            assert_eq!(take(&mut guest, client, GREETING.len()), GREETING);
        }
    }
}
