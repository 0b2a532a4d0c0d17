//! Two `Port`s over an in-memory carrier, with real sockets as sinks. No test waits for time: it turns both shards
//! until its condition holds, and fails after a fixed number of turns.

mod memory;
mod names;
mod pair;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use adit_engine::{EngineConfig, ResetReason, StreamId};

use super::Notice;
use crate::dial::{DialError, DialRequest};
use crate::hello::{self, Accept, Common, Hello, Open, Refuse};
use crate::rate::Rate;
use crate::refusal::Refusal;
use crate::shard::{Handle, News, ShardThread};
use crate::sink::{Service, ServiceEvent, Sink, StreamIo};
use pair::{Flow, HERE, Pair, pattern, read_to_end, socket};

#[test]
fn r54_bytes_arrive_exactly_in_odd_splits_both_ways_at_once() {
    let mut pair = Pair::new();
    for (i, len) in [1, 2, 4095, 4096, 4097, 65_537, 1 << 20, 4 << 20]
        .into_iter()
        .enumerate()
    {
        let (near, far, _) = pair.connect();
        let mut out = Flow::new(&near, &far, pattern(i as u32, len), 1021 + 7 * i);
        let mut back = Flow::new(&far, &near, pattern(!(i as u32), len), 4099);
        pair.until(|_| out.go() & back.go());
        assert!(out.got == out.data && back.got == back.data, "{len}");
    }
    pair.until(Pair::idle);
}

#[test]
fn r49_half_close_each_way_leaves_the_other_open() {
    for near_first in [true, false] {
        let mut pair = Pair::new();
        let (near, far, _) = pair.connect();
        let (first, second) = match near_first {
            true => (&near, &far),
            false => (&far, &near),
        };
        { first }.write_all(b"last words").unwrap();
        first.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut pair, second), b"last words");
        let mut flow = Flow::new(second, first, pattern(5, 1 << 20), 8191);
        pair.until(|_| flow.go());
        assert!(flow.got == flow.data);
        second.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut pair, first), b"");
        pair.until(Pair::idle);
    }
}

#[test]
fn a_thousand_streams_come_and_go() {
    let mut pair = Pair::new();
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = fds();
    for i in 0..1000u32 {
        let (near, far, _) = pair.connect();
        if i % 2 == 0 {
            drop(near);
            assert_eq!(read_to_end(&mut pair, &far), b"");
        } else {
            drop(far);
            assert_eq!(read_to_end(&mut pair, &near), b"");
        }
    }
    pair.until(Pair::idle);
    // Other tests of this process hold descriptors too.
    assert!(fds() < before + 200);
}

#[test]
fn r57_bytes_before_a_close_arrive_or_the_end_is_a_reset() {
    let mut pair = Pair::new();
    for i in 0..200 {
        let (near, far, _) = pair.connect();
        let data = pattern(i, 1 + 997 * i as usize % 100_000);
        near.set_nonblocking(true).unwrap();
        let sent = { &near }.write(&data).unwrap();
        drop(near);
        assert!(read_to_end(&mut pair, &far) == data[..sent]);
    }
    pair.until(Pair::idle);
}

#[test]
fn reset_reaches_the_other_side() {
    let mut pair = Pair::new();
    let (near, far, stream) = pair.connect();
    let now = pair.a.now();
    pair.a.port_mut(HERE).reset(now, stream, ResetReason::Local);
    pair.until(Pair::idle);
    for end in [&near, &far] {
        assert_ne!({ end }.write(b"x").map_err(|e| e.kind()), Ok(1));
    }
    let ended = pair.heard[1].iter().any(|n| {
        matches!(
            n,
            Notice::Closed {
                reason: Some(ResetReason::Peer),
                ..
            }
        )
    });
    assert!(ended, "{:?}", pair.heard);
}

#[test]
fn r55_one_stopped_reader_stops_nobody_else() {
    let mut pair = Pair::new();
    let (stuck, unread, _) = pair.connect();
    let data = pattern(1, 4 << 20);
    let mut sent = 0;
    // Write until the socket accepts no more: socket, windows and held bytes are full.
    for _ in 0..2000 {
        sent += { &stuck }.write(&data[sent..]).unwrap_or(0);
        pair.turn();
    }
    assert!(sent < data.len());
    for i in 0..20 {
        let (near, far, _) = pair.connect();
        let mut flow = Flow::new(&near, &far, pattern(i, 200_000), 8191);
        pair.until(|_| flow.go());
        assert!(flow.got == flow.data);
    }
    // The stream continues when it is read.
    let mut flow = Flow::new(&stuck, &unread, data, 65_536);
    flow.sent = sent;
    pair.until(|_| flow.go());
    assert!(flow.got == flow.data);
}

/// Has both directions of a stream limited, on the side that dialled.
fn limited(pair: &mut Pair, stream: StreamId, rate: &Rate) {
    let now = pair.a.now();
    pair.a.port_mut(HERE).limit(now, stream, vec![rate.clone()]);
}

#[test]
fn r110_a_limited_stream_slows_only_those_that_share_its_rate() {
    let mut pair = Pair::new();
    let rate = Rate::new(1024);
    let (near, far, stream) = pair.connect();
    limited(&mut pair, stream, &rate);
    let begin = std::time::Instant::now();
    // Minutes of its rate, each way.
    let mut out = Flow::new(&near, &far, pattern(1, 300_000), 8191);
    let mut back = Flow::new(&far, &near, pattern(2, 300_000), 8191);
    for i in 0..4 {
        let (free, end, _) = pair.connect();
        let mut flows = [
            Flow::new(&free, &end, pattern(i, 2 << 20), 8191),
            Flow::new(&end, &free, pattern(!i, 2 << 20), 8191),
        ];
        pair.until(|_| {
            let _ = (out.go(), back.go());
            flows[0].go() & flows[1].go()
        });
        assert!(flows.iter().all(|flow| flow.got == flow.data));
    }
    // What it moved meanwhile is what its rate lets through, however long that was: a second ahead, and one chunk.
    let most = 1024 * (begin.elapsed().as_secs() as usize + 3);
    assert!((1..=most).contains(&out.got.len()), "{}", out.got.len());
    assert!((1..=most).contains(&back.got.len()), "{}", back.got.len());
    // Another rate counts at once, and no byte is missing.
    rate.change(pair.a.now(), 1 << 30);
    limited(&mut pair, stream, &rate);
    pair.until(|_| out.go() & back.go());
    assert!(out.got == out.data && back.got == back.data);
    drop((near, far));
    pair.until(Pair::idle);
    assert!(pair.a.port(HERE).limited.is_empty());
}

#[test]
fn a_limited_stream_that_waits_causes_no_turns_until_its_time() {
    let mut pair = Pair::new();
    let (near, far, stream) = pair.connect();
    limited(&mut pair, stream, &Rate::new(1));
    let mut out = Flow::new(&near, &far, pattern(1, 100_000), 8191);
    let mut back = Flow::new(&far, &near, pattern(2, 100_000), 8191);
    // Until everything that can move has moved.
    for _ in 0..2000 {
        let _ = (out.go(), back.go());
        pair.turn();
    }
    let a = &mut pair.a;
    while a.wait_limit() == Some(Duration::ZERO) {
        a.turn(Some(Duration::ZERO)).unwrap();
    }
    let polls = a.port(HERE).counters().polls;
    for _ in 0..100 {
        a.turn(Some(Duration::ZERO)).unwrap();
    }
    assert_eq!(a.port(HERE).counters().polls, polls);
    // The timer of both directions is set, and no end of the stream leaves one behind.
    assert_eq!(a.port(HERE).limited.len(), 2);
    assert!(a.wait_limit().is_some());
    let now = pair.a.now();
    pair.a.port_mut(HERE).reset(now, stream, ResetReason::Local);
    pair.until(Pair::idle);
    assert!(pair.a.port(HERE).limited.is_empty());
}

#[test]
fn what_a_limited_stream_says_before_it_ends_arrives_whole() {
    let mut pair = Pair::new();
    let rate = Rate::new(200_000);
    for far_first in [true, false] {
        let (near, far, stream) = pair.connect();
        limited(&mut pair, stream, &rate);
        let (from, to) = match far_first {
            true => (far, near),
            false => (near, far),
        };
        let data = pattern(7, 60_000);
        let sent = { &from }.write(&data).unwrap();
        drop(from);
        assert!(read_to_end(&mut pair, &to) == data[..sent]);
    }
    pair.until(Pair::idle);
}

#[test]
fn r50_no_spin_when_the_sink_is_closed_and_the_peer_posts_no_slots() {
    let mut pair = Pair::with(EngineConfig::default(), 8);
    let (near, _far, _) = pair.connect();
    // The peer accepts nothing more, because only one side is turned.
    { &near }.write_all(&pattern(3, 100_000)).unwrap();
    drop(near);
    let a = &mut pair.a;
    let mut turns = 0;
    for _ in 0..1000 {
        let before = a.port(HERE).counters().polls;
        a.turn(Some(Duration::ZERO)).unwrap();
        if a.port(HERE).counters().polls == before {
            break;
        }
        turns += 1;
    }
    assert!(turns < 20, "{turns} polls");
    let polls = a.port(HERE).counters().polls;
    for _ in 0..100 {
        a.turn(Some(Duration::ZERO)).unwrap();
    }
    assert_eq!(a.port(HERE).counters().polls, polls);
}

#[test]
fn r52_a_closed_sink_resets_only_its_own_stream() {
    let mut pair = Pair::new();
    let (near, far, _) = pair.connect();
    let (other_near, other_far, _) = pair.connect();
    drop(near);
    // Write until the other side has noticed, then expect the reset.
    pair.until(|_| {
        { &far }
            .write(&[7; 4096])
            .is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock)
    });
    let mut flow = Flow::new(&other_near, &other_far, pattern(1, 100_000), 5000);
    pair.until(|_| flow.go());
    assert!(flow.got == flow.data);
}

#[test]
fn a_fault_ends_the_session_and_every_stream() {
    let mut pair = Pair::new();
    let (near, _far, _) = pair.connect();
    pair.a.port_mut(HERE).carrier.fault = true;
    pair.until(|p| p.a.port(HERE).epoch().is_none());
    assert_eq!(pair.a.port(HERE).counters().faults, 1);
    assert_eq!(pair.a.port(HERE).streams(), 0);
    assert_eq!(read_to_end(&mut pair, &near), b"");
    let request = DialRequest {
        port: 1,
        hello: None,
        deadline: None,
        lane: adit_engine::Lane::Bulk,
    };
    let now = pair.a.now();
    let dialled = pair.a.port_mut(HERE).dial(now, request, None);
    assert_eq!(dialled, Err(DialError::NoSession));
}

#[test]
fn a_dial_to_a_port_without_listener_is_refused() {
    let mut pair = Pair::new();
    let stream = pair.dial(9, None);
    let error = DialError::Refused;
    pair.until(|p| {
        p.heard[0].contains(&Notice::DialFailed {
            stream,
            error: error.clone(),
        })
    });
}

fn open() -> Open {
    Open::new("tcp:80".parse().unwrap(), Common::default())
}

#[test]
fn a_hello_is_answered_and_the_services_bytes_follow() {
    for step in [1, 30, 5000] {
        let mut pair = Pair::new();
        let stream = pair.dial(hello::PORT, Some(open()));
        let (far, sink) = socket();
        let theirs = pair.asked();
        pair.accept(theirs, sink);
        let mut asked = Vec::new();
        pair.until(|_| {
            let mut buf = [0; 500];
            if let Ok(n) = { &far }.read(&mut buf) {
                asked.extend_from_slice(&buf[..n]);
            }
            asked.len() >= open_len()
        });
        assert_eq!(hello::read(&mut &asked[..]).unwrap(), Hello::Open(open()));
        let accept = Accept {
            common: Common {
                boot_nonce: [4; 16],
                ..Common::default()
            },
            version: 1,
        };
        let answer = [&Hello::Accept(accept).encode()[..], b"220 hi"].concat();
        for piece in answer.chunks(step) {
            { &far }.write_all(piece).unwrap();
            pair.turn();
        }
        let accept = Some(accept);
        pair.until(|p| p.heard[0].contains(&Notice::Dialed { stream, accept }));
        let (near, sink) = socket();
        let now = pair.a.now();
        assert!(pair.a.port_mut(HERE).attach(now, stream, sink, b"early"));
        drop(far.shutdown(std::net::Shutdown::Write));
        assert_eq!(read_to_end(&mut pair, &near), b"220 hi");
        near.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut pair, &far), b"early");
        pair.until(Pair::idle);
    }
}

fn open_len() -> usize {
    Hello::Open(open()).encode().len()
}

#[test]
fn a_refusal_a_foreign_listener_and_a_silent_one_give_different_errors() {
    let refuse = Refuse {
        common: Common::default(),
        refusal: Refusal::of_hello(4, 111, "connection refused"),
    };
    let refusal = Hello::Refuse(refuse.clone()).encode();
    for (answer, want) in [
        (&refusal[..], Some(DialError::HelloRefused(refuse))),
        (b"SSH-2.0-x\r\n", None),
        (b"", Some(DialError::Reset)),
    ] {
        let mut pair = Pair::new();
        let stream = pair.dial(hello::PORT, Some(open()));
        let (far, sink) = socket();
        let theirs = pair.asked();
        pair.accept(theirs, sink);
        { &far }.write_all(answer).unwrap();
        if answer.is_empty() {
            far.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut found = None;
        pair.until(|p| {
            found = p.heard[0].iter().find_map(|n| match n {
                Notice::DialFailed { stream: s, error } if *s == stream => Some(error.clone()),
                _ => None,
            });
            found.is_some()
        });
        match want {
            Some(want) => assert_eq!(found, Some(want)),
            None => assert!(matches!(found, Some(DialError::Foreign(_)))),
        }
        pair.until(Pair::idle);
    }
}

#[test]
fn a_dials_deadline_covers_the_hello() {
    let mut pair = Pair::new();
    let now = pair.a.now();
    let request = DialRequest {
        port: hello::PORT,
        hello: Some(open()),
        deadline: Some(adit_engine::Tick(now.0 + 20_000_000)),
        lane: adit_engine::Lane::Bulk,
    };
    let stream = pair.a.port_mut(HERE).dial(now, request, None).unwrap();
    let (_far, sink) = socket();
    let theirs = pair.asked();
    pair.accept(theirs, sink);
    let error = DialError::Timeout;
    // No sleep is needed: the epoll timeout ends at the deadline.
    pair.until(|p| {
        p.a.turn(Some(Duration::from_millis(1))).unwrap();
        p.heard[0].contains(&Notice::DialFailed {
            stream,
            error: error.clone(),
        }) || drain_into(p).contains(&Notice::DialFailed {
            stream,
            error: error.clone(),
        })
    });
    pair.until(Pair::idle);
}

fn drain_into(pair: &mut Pair) -> Vec<Notice> {
    let mut all = Vec::new();
    while let Some(News::Notice(_, notice)) = pair.a.poll_news() {
        all.push(notice);
    }
    all
}

/// Echoes its input, in whole records of this many bytes.
struct Echo(usize);

impl Service for Echo {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        match event {
            ServiceEvent::Data(bytes) => {
                let whole = bytes.len().min(io.room()) / self.0 * self.0;
                let n = io.write(&bytes[..whole]);
                io.take(n);
            }
            ServiceEvent::PeerDone => io.finish(),
            ServiceEvent::Opened | ServiceEvent::Writable => {}
        }
    }
}

#[test]
fn an_inline_service_echoes_and_ends() {
    inline_echo(Pair::new(), 1, 1 << 20);
}

#[test]
fn shards_that_poll_before_they_sleep_carry_the_same_bytes() {
    let mut pair = Pair::new();
    pair.a.busy_poll(Duration::from_micros(50));
    pair.b.busy_poll(Duration::from_micros(50));
    inline_echo(pair, 1, 1 << 20);
}

#[test]
fn an_inline_service_gets_untaken_bytes_again_with_more_after_them() {
    inline_echo(Pair::new(), 6000, 167 * 6000);
}

fn inline_echo(mut pair: Pair, record: usize, bytes: usize) {
    let stream = pair.dial(1, None);
    let theirs = pair.asked();
    pair.accept(theirs, Sink::Inline(Box::new(Echo(record))));
    pair.until(|p| {
        p.heard[0].contains(&Notice::Dialed {
            stream,
            accept: None,
        })
    });
    let (near, sink) = socket();
    let now = pair.a.now();
    pair.a.port_mut(HERE).attach(now, stream, sink, &[]);
    let mut flow = Flow::new(&near, &near, pattern(9, bytes), 9001);
    pair.until(|_| flow.go());
    assert!(flow.got == flow.data);
    near.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut pair, &near), b"");
    pair.until(Pair::idle);
}

#[test]
fn an_idle_shard_does_not_wake() {
    let mut pair = Pair::new();
    let (_near, _far, _) = pair.connect();
    for _ in 0..50 {
        pair.turn();
    }
    let polls = pair.a.port(HERE).counters().polls;
    for _ in 0..10 {
        pair.a.turn(Some(Duration::from_millis(1))).unwrap();
    }
    assert!(pair.a.port(HERE).counters().polls <= polls + 1);
}

/// Both shards, each on its own thread.
fn threads() -> (Handle, Handle, [ShardThread; 2]) {
    let pair = Pair::new();
    let (a, b) = (pair.a.handle(HERE), pair.b.handle(HERE));
    let threads = [pair.a.spawn("a").unwrap(), pair.b.spawn("b").unwrap()];
    (a, b, threads)
}

#[test]
fn streams_of_the_application_carry_bytes_both_ways() {
    let (a, b, _threads) = threads();
    let listener = b.listen(7).unwrap();
    let data = pattern(3, 1 << 20);
    let server = std::thread::spawn({
        let want = data.len();
        move || {
            let mut stream = listener.accept().unwrap().accept().unwrap();
            let mut got = vec![0; want];
            stream.read_exact(&mut got).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
            stream.write_all(&got).unwrap();
            stream.shutdown(adit_engine::How::Send).unwrap();
        }
    });
    let target = crate::stream::Target {
        port: 7,
        hello: None,
    };
    let dialer = a.dialer();
    let mut stream = dialer.dial(&target, Duration::from_secs(5)).unwrap();
    stream.write_all(&data).unwrap();
    stream.shutdown(adit_engine::How::Send).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    server.join().unwrap();
    assert!(got == data);
    assert_eq!(stream.reason(), None);
    drop(stream);
    // The listener ended together with the server.
    let refused = dialer.dial(&target, Duration::from_secs(5));
    assert_eq!(refused.unwrap_err(), DialError::Refused);
}

#[test]
fn a_dropped_stream_is_a_reset_and_a_dropped_shard_ends_its_streams() {
    let (a, b, threads) = threads();
    let listener = b.listen(7).unwrap();
    let target = crate::stream::Target {
        port: 7,
        hello: None,
    };
    let dialer = a.dialer();
    let dial = || {
        std::thread::scope(|s| {
            let accepted = s.spawn(|| listener.accept().unwrap().accept().unwrap());
            let dialled = dialer.dial(&target, Duration::from_secs(5)).unwrap();
            (dialled, accepted.join().unwrap())
        })
    };
    let (near, mut far) = dial();
    drop(near);
    assert_eq!(
        far.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::ConnectionReset
    );
    assert_eq!(far.reason(), Some(ResetReason::Peer));
    let (mut near, _far) = dial();
    drop(threads);
    assert!(near.read(&mut [0]).is_err());
    assert_eq!(
        dialer.dial(&target, Duration::from_secs(5)).unwrap_err(),
        DialError::Cancelled
    );
    assert!(listener.accept().is_err());
}

#[test]
fn a_spliced_stream_loses_nothing() {
    let (a, b, _threads) = threads();
    let listener = b.listen(7).unwrap();
    let target = crate::stream::Target {
        port: 7,
        hello: None,
    };
    let data = pattern(8, 300_000);
    std::thread::scope(|s| {
        let server = s.spawn(|| {
            let mut far = listener.accept().unwrap().accept().unwrap();
            far.write_all(&data).unwrap();
            far.shutdown(adit_engine::How::Send).unwrap();
            let mut got = Vec::new();
            far.read_to_end(&mut got).unwrap();
            got
        });
        let mut near = a.dialer().dial(&target, Duration::from_secs(5)).unwrap();
        let mut head = [0; 100];
        near.read_exact(&mut head).unwrap();
        near.write_all(b"before ").unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        near.splice(theirs.into());
        { &ours }.write_all(b"after").unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        { &ours }.read_to_end(&mut rest).unwrap();
        assert!([&head[..], &rest].concat() == data);
        assert_eq!(server.join().unwrap(), b"before after");
    });
}

/// Writes to a sink's socket until it accepts nothing. Returns a duplicate of the socket, and what was written.
fn filled(sink: &Sink) -> (UnixStream, Vec<u8>) {
    let Sink::Fd(fd) = sink else { panic!() };
    let socket = UnixStream::from(fd.try_clone().unwrap());
    socket.set_nonblocking(true).unwrap();
    let mut full = Vec::new();
    while let Ok(n @ 1..) = { &socket }.write(&[b'.'; 4096]) {
        full.resize(full.len() + n, b'.');
    }
    (socket, full)
}

/// Dials with a greeting. Returns the guest's socket and the stream.
fn greeted(pair: &mut Pair, sink: Sink, greeting: &[u8]) -> (UnixStream, StreamId) {
    let (far, far_sink) = socket();
    let stream = pair.dial(1, None);
    let theirs = pair.asked();
    pair.accept(theirs, far_sink);
    // The guest's first bytes are there before the client is.
    { &far }.write_all(b"first").unwrap();
    let accept = None;
    pair.until(|p| p.heard[0].contains(&Notice::Dialed { stream, accept }));
    let now = pair.a.now();
    let port = pair.a.port_mut(HERE);
    assert!(port.attach_greeted(now, stream, sink, b"ahead", greeting));
    (far, stream)
}

#[test]
fn a_greeting_goes_to_the_socket_ahead_of_the_guests_bytes_and_costs_no_credit() {
    let mut pair = Pair::new();
    let (near, sink) = socket();
    let (far, _) = greeted(&mut pair, sink, b"200 ");
    let mut sent = b"first".to_vec();
    let data = pattern(3, 1 << 20);
    let mut flow = Flow::new(&far, &near, data.clone(), 4099);
    sent.extend(&data);
    pair.until(|_| flow.go() && flow.sent == data.len());
    far.shutdown(std::net::Shutdown::Write).unwrap();
    let mut got = flow.got;
    got.extend(read_to_end(&mut pair, &near));
    assert!(got == [b"200 ", &sent[..]].concat());
    near.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut pair, &far), b"ahead");
    pair.until(Pair::idle);
}

/// The client has not read what it was sent before: its socket accepts nothing when the greeting comes.
#[test]
fn a_greeting_that_does_not_fit_waits_for_room_and_nothing_overtakes_it() {
    for ends_early in [true, false] {
        let mut pair = Pair::new();
        let (near, sink) = socket();
        let (before, full) = filled(&sink);
        let (far, _) = greeted(&mut pair, sink, &[b'g'; 5000]);
        { &far }.write_all(b"second").unwrap();
        if ends_early {
            // The stream has ended before the client reads anything.
            far.shutdown(std::net::Shutdown::Write).unwrap();
            drop(before);
            for _ in 0..50 {
                pair.turn();
            }
        }
        let mut got = Vec::<u8>::new();
        pair.until(|_| {
            let mut buf = [0; 1000];
            if let Ok(n) = { &near }.read(&mut buf) {
                got.extend(&buf[..n]);
            }
            got.len() >= full.len() + 5000 + 11
        });
        assert!(got[..full.len()] == full);
        assert!(got[full.len()..][..5000] == [b'g'; 5000]);
        assert_eq!(got[full.len() + 5000..], *b"firstsecond");
        if !ends_early {
            far.shutdown(std::net::Shutdown::Write).unwrap();
        }
        near.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut pair, &far), b"ahead");
        pair.until(Pair::idle);
    }
}

#[test]
fn a_sink_that_replaces_another_gets_no_rest_of_its_greeting() {
    let mut pair = Pair::new();
    let (_near, sink) = socket();
    let _full = filled(&sink);
    let (far, stream) = greeted(&mut pair, sink, &[b'g'; 5000]);
    let (other, sink) = socket();
    let now = pair.a.now();
    assert!(pair.a.port_mut(HERE).attach(now, stream, sink, &[]));
    far.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut pair, &other), b"first");
}
