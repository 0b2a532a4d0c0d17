//! Streams that work: echoes, ends, many streams, readers that stop, sockets as sinks, idle carriers.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use adit_channel::dial::DialError;
use adit_channel::port::Notice;
use adit_channel::shard::News;
use adit_channel::sink::{Service, ServiceEvent, Sink, StreamIo};
use adit_channel::stream::Stream;
use adit_engine::{How, PeerReason, ResetReason};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use crate::world::{End, LONG, Region, dial, echo, pair, pattern, serve, shard, within};

const PORT: u32 = 741;

fn dialling(end: &End) -> std::thread::JoinHandle<Stream> {
    let handle = end.handle.clone();
    std::thread::spawn(move || dial(&handle, PORT))
}

fn echoes(dialler: &End, len: usize) {
    let stream = dialler.dial(PORT);
    let sent = pattern(len, len);
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).expect("room");
            stream.shutdown(How::Send).expect("open");
        });
        (&stream).read_to_end(&mut back).expect("an orderly end");
    });
    assert!(back == sent, "{len} bytes came back as {}", back.len());
    assert_eq!(stream.reason(), None);
}

#[test]
fn echoes_of_1_byte_to_4_mib_are_exact_in_both_directions() {
    let (host, guest) = pair();
    serve(guest.listen(PORT), echo);
    serve(host.listen(PORT), echo);
    within(LONG, move || {
        for len in [
            1,
            2,
            63,
            64,
            1000,
            4096,
            65_535,
            65_536,
            65_537,
            1 << 20,
            4 << 20,
        ] {
            echoes(&host, len);
            echoes(&guest, len);
        }
    });
}

#[test]
fn each_side_ends_its_sending_and_the_other_goes_on() {
    let (host, guest) = pair();
    let listener = guest.listen(PORT);
    let stream = dialling(&host);
    let far = listener
        .accept()
        .expect("a request")
        .accept()
        .expect("open");
    let near = stream.join().expect("no panic");
    (&near).write_all(b"first").expect("room");
    near.shutdown(How::Send).expect("open");
    let mut got = Vec::new();
    (&far).read_to_end(&mut got).expect("an orderly end");
    assert_eq!(got, b"first");
    // The other direction still works as before.
    let long = pattern(300_000, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&far).write_all(&long).expect("room");
            far.shutdown(How::Send).expect("open");
        });
        let mut got = Vec::new();
        (&near).read_to_end(&mut got).expect("an orderly end");
        assert_eq!(got, long);
    });
    assert_eq!((near.reason(), far.reason()), (None, None));
}

#[test]
fn a_thousand_streams_come_and_go_and_none_is_left_over() {
    let (host, guest) = pair();
    serve(guest.listen(PORT), echo);
    within(LONG, move || {
        let host = &host;
        std::thread::scope(|scope| {
            for worker in 0..8 {
                scope.spawn(move || {
                    for n in 0..125 {
                        let mut stream = host.dial(PORT);
                        let sent = pattern(1 + n * 7, worker);
                        stream.write_all(&sent).expect("room");
                        stream.shutdown(How::Send).expect("open");
                        let mut back = Vec::new();
                        stream.read_to_end(&mut back).expect("an orderly end");
                        assert_eq!(back, sent);
                    }
                });
            }
        });
    });
}

#[test]
fn one_stopped_reader_of_a_hundred_stops_no_other() {
    let (host, guest) = pair();
    // The server of the first stream never reads.
    let first = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let taken = first.clone();
    serve(guest.listen(PORT), move |stream| {
        if first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            std::thread::park_timeout(LONG);
        }
        echo(stream);
    });
    within(LONG, move || {
        let filler = host.dial(PORT);
        // Wait, so that no other stream gets the server that never reads.
        while taken.load(std::sync::atomic::Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let filling = std::thread::spawn(move || {
            filler.set_deadline(Some(std::time::Instant::now() + Duration::from_secs(1)));
            let mut sent = 0usize;
            while let Ok(n) = (&filler).write(&[1; 64 << 10]) {
                sent += n;
            }
            sent
        });
        let host = &host;
        std::thread::scope(|scope| {
            for n in 0..99 {
                scope.spawn(move || echoes(host, 20_000 + n));
            }
        });
        let sent = filling.join().expect("no panic");
        assert!(
            sent < 2 << 20,
            "{sent} bytes were accepted without a reader"
        );
    });
}

#[test]
fn a_refusal_and_a_reset_carry_their_reason() {
    let (host, guest) = pair();
    let listener = guest.listen(PORT);
    // Nothing listens: the dial is refused and does not time out.
    let refused = within(LONG, {
        let stream = dialling(&host);
        let far = listener
            .accept()
            .expect("a request")
            .accept()
            .expect("open");
        let near = stream.join().expect("no panic");
        far.reset(ResetReason::Local);
        let mut near = near;
        let mut buf = [0; 8];
        let error = near.read(&mut buf).expect_err("it was reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(
            near.reason(),
            Some(ResetReason::Told(PeerReason::Local)),
            "the ring carries the reason"
        );
        move || host.try_dial(PORT + 1).map(drop)
    });
    assert_eq!(refused, Err(DialError::Refused));
}

/// A tunnel: bytes go from a socket through the ring to a socket.
#[test]
fn with_sockets_as_sinks_each_side_copies_every_byte_once() {
    let region = Region::new();
    let (mut host, at) = shard(region.host());
    let (mut guest, there) = shard(region.guest());
    guest.port_mut(there).listen(PORT).expect("free");
    let mut turn = || {
        host.turn(Some(Duration::ZERO)).expect("a turn");
        guest.turn(Some(Duration::ZERO)).expect("a turn");
        (host.poll_news(), guest.poll_news())
    };
    while !matches!(
        turn().0,
        Some(News::Notice(_, Notice::Session { epoch: Some(_) }))
    ) {}
    for _ in 0..10 {
        turn();
    }
    let (client, near) = UnixStream::pair().expect("sockets");
    let (server, far) = UnixStream::pair().expect("sockets");
    for socket in [&client, &server] {
        socket.set_nonblocking(true).expect("a socket");
    }
    // Prepared before the dial, which has a limit of 2 s, because it takes that long on a busy machine.
    let sent = pattern(3 << 20, 5);
    let request = adit_channel::dial::DialRequest {
        port: PORT,
        hello: None,
        deadline: None,
        lane: adit_engine::Lane::Control,
    };
    let now = host.now();
    let sink = Some(Sink::Fd(near.into()));
    host.port_mut(at)
        .dial(now, request, sink)
        .expect("a session");
    let mut far = Some(Sink::Fd(far.into()));
    let (mut written, mut got) = (0, Vec::<u8>::new());
    let mut buf = vec![0; 1 << 20];
    let mut turns = 0;
    while got.len() < sent.len() {
        turns += 1;
        assert!(turns < 1_000_000, "{} bytes came", got.len());
        if let Ok(n) = (&client).write(&sent[written..]) {
            written += n;
        }
        host.turn(Some(Duration::ZERO)).expect("a turn");
        guest.turn(Some(Duration::ZERO)).expect("a turn");
        while let Some(news) = guest.poll_news() {
            if let News::Notice(_, Notice::Incoming { stream, .. }) = news {
                let now = guest.now();
                guest.port_mut(there).accept(now, stream, far.take());
            }
        }
        if let Ok(n) = (&server).read(&mut buf) {
            got.extend(&buf[..n]);
        }
    }
    assert_eq!(got, sent);
    let there = guest.port(there);
    assert_eq!(there.counters().violations, 0);
    // Bytes that the socket accepts at once are never copied through this process's memory.
    let copied = host.port(at).counters().bytes_copied;
    assert_eq!(copied, 0, "on the way in");
    assert_eq!(
        host.port(at).carrier().counters().bytes_copied,
        sent.len() as u64
    );
}

#[test]
fn an_idle_carrier_causes_no_wake_up_and_no_doorbell() {
    let region = Region::new();
    let (mut host, at) = shard(region.host());
    let (mut guest, there) = shard(region.guest());
    guest.port_mut(there).listen(PORT).expect("free");
    for _ in 0..50 {
        host.turn(Some(Duration::ZERO)).expect("a turn");
        guest.turn(Some(Duration::ZERO)).expect("a turn");
        while host.poll_news().is_some() {}
        while guest.poll_news().is_some() {}
    }
    assert!(host.port(at).epoch().is_some() && guest.port(there).epoch().is_some());
    let before = [host.port(at), guest.port(there)].map(|p| p.carrier().counters());
    let mut fds = [host.as_fd(), guest.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    let ready = poll(&mut fds, PollTimeout::from(500u16)).expect("a poll");
    assert_eq!(ready, 0, "a thread was woken");
    assert_eq!((host.wait_limit(), guest.wait_limit()), (None, None));
    let after = [host.port(at), guest.port(there)].map(|p| p.carrier().counters());
    assert_eq!(before, after);
}

/// Bytes of a pattern in pieces of odd lengths: directly into packets if there is one, and queued otherwise.
struct Pieces {
    bytes: Vec<u8>,
    sent: usize,
    straight: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl Service for Pieces {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        let straight = io.straight();
        match event {
            ServiceEvent::Opened => {}
            // The queued bytes were sent.
            ServiceEvent::Writable if straight == 0 => return io.ask(),
            ServiceEvent::Writable => {}
            _ => return,
        }
        let len = (1 + self.sent * 7 % 90_000).min(self.bytes.len() - self.sent);
        let n = io.write(&self.bytes[self.sent..self.sent + len]);
        let order = std::sync::atomic::Ordering::SeqCst;
        self.straight.fetch_add(n.min(straight), order);
        self.sent += n;
        match self.sent < self.bytes.len() {
            true => io.ask(),
            false => io.finish(),
        }
    }
}

#[test]
fn a_service_that_asks_writes_directly_into_packets_and_in_order() {
    let region = Region::new();
    let (mut host, at) = shard(region.host());
    let guest = End::spawn(region.guest());
    let listener = guest.listen(PORT);
    let got = std::thread::spawn(move || {
        let mut stream = listener
            .accept()
            .expect("a request")
            .accept()
            .expect("open");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("an orderly end");
        got
    });
    let straight = std::sync::Arc::default();
    let bytes = pattern(5 << 20, 9);
    let mut service = Some(Pieces {
        bytes: bytes.clone(),
        sent: 0,
        straight: std::sync::Arc::clone(&straight),
    });
    while !got.is_finished() {
        host.turn(Some(Duration::from_millis(5))).expect("a turn");
        while host.poll_news().is_some() {}
        if host.port(at).epoch().is_some()
            && let Some(service) = service.take()
        {
            let request = adit_channel::dial::DialRequest {
                port: PORT,
                hello: None,
                deadline: None,
                lane: adit_engine::Lane::Bulk,
            };
            let now = host.now();
            let sink = Some(Sink::Inline(Box::new(service)));
            host.port_mut(at)
                .dial(now, request, sink)
                .expect("a session");
        }
    }
    assert!(got.join().expect("no panic") == bytes);
    let straight = straight.load(std::sync::atomic::Ordering::SeqCst);
    assert!(
        straight > bytes.len() / 4,
        "{straight} of {} bytes",
        bytes.len()
    );
}
