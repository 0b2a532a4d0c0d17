//! A shard with a foreign carrier, and a scripted VMM at the other ends of its sockets.

mod chunks;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use adit_engine::{EngineConfig, StreamId, Tick};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::dial::{DialError, DialRequest};
use crate::port::Notice;
use crate::shard::{News, PortIndex, Shard};
use crate::sink::Sink;

mod kernel;

const HERE: PortIndex = PortIndex(0);
/// A condition that does not hold after so many turns has failed.
const TURNS_MAX: u32 = 200_000;

#[derive(Default)]
struct Said {
    news: VecDeque<DoorNews>,
    dials: Vec<(u32, u32)>,
    full: bool,
}

struct TestDoor {
    said: Arc<Mutex<Said>>,
    bell: Arc<EventFd>,
}

impl Door for TestDoor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn dial(&mut self, ticket: u32, port: u32) -> io::Result<()> {
        let mut said = self.said.lock().unwrap();
        if said.full {
            return Err(ErrorKind::WouldBlock.into());
        }
        said.dials.push((ticket, port));
        Ok(())
    }

    fn receive(&mut self) -> Option<DoorNews> {
        let news = self.said.lock().unwrap().news.pop_front();
        if news.is_none() {
            let _ = self.bell.read();
        }
        news
    }
}

struct World {
    shard: Shard<Foreign<TestDoor>>,
    said: Arc<Mutex<Said>>,
    bell: Arc<EventFd>,
    heard: Vec<Notice>,
    /// Sockets of applications are not nonblocking by themselves: no pipe is used for them.
    blocking: bool,
}

impl World {
    fn new() -> Self {
        Self::with(Options { half_closes: true })
    }

    /// With a VMM that is there.
    fn with(options: Options) -> Self {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let bell = Arc::new(EventFd::from_flags(flags).unwrap());
        let said = Arc::new(Mutex::default());
        let door = TestDoor {
            said: Arc::clone(&said),
            bell: bell.clone(),
        };
        let mut shard = Shard::new().unwrap();
        let carrier = Foreign::new(door, options, 1).unwrap();
        shard.add(carrier, EngineConfig::default(), 7).unwrap();
        shard.port_mut(HERE).listen(741).unwrap();
        let mut world = Self {
            shard,
            said,
            bell,
            heard: Vec::new(),
            blocking: false,
        };
        world.news(DoorNews::State(Ok(())));
        world.until(|w| w.shard.port(HERE).epoch() == Some(1));
        world.heard.clear();
        world
    }

    fn carrier(&mut self) -> &mut Foreign<TestDoor> {
        self.shard.port_mut(HERE).carrier_mut()
    }

    fn news(&mut self, news: DoorNews) {
        self.said.lock().unwrap().news.push_back(news);
        self.bell.write(1).unwrap();
    }

    fn turn(&mut self) {
        self.shard.turn(Some(Duration::ZERO)).unwrap();
        while let Some(news) = self.shard.poll_news() {
            if let News::Notice(_, notice) = news {
                self.heard.push(notice);
            }
        }
    }

    #[track_caller]
    fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..TURNS_MAX {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("not reached; heard {:?}", self.heard);
    }

    /// Some turns, in which nothing may happen.
    fn settle(&mut self) {
        (0..50).for_each(|_| self.turn());
    }

    /// Dials a port. Returns the stream, and the VMM's end of its socket.
    fn dial(&mut self, port: u32) -> (StreamId, UnixStream) {
        let stream = self.ask(port, None);
        let ticket = self.ticket(port);
        let (ours, vmm) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        vmm.set_nonblocking(true).unwrap();
        let socket = ours.into();
        self.news(DoorNews::Dialed { ticket, socket });
        (stream, vmm)
    }

    fn ask(&mut self, port: u32, limit: Option<Duration>) -> StreamId {
        let now = self.shard.now();
        let request = DialRequest {
            port,
            hello: None,
            deadline: limit.map(|limit| Tick(now.0 + limit.as_nanos() as u64)),
            lane: Lane::Bulk,
        };
        let port = self.shard.port_mut(HERE);
        port.dial(now, request, None).unwrap()
    }

    /// The ticket of the dial that comes next.
    fn ticket(&mut self, port: u32) -> u32 {
        let said = Arc::clone(&self.said);
        self.until(|_| !said.lock().unwrap().dials.is_empty());
        let (ticket, dialled) = said.lock().unwrap().dials.remove(0);
        assert_eq!(dialled, port);
        ticket
    }

    #[track_caller]
    fn dialed(&mut self, stream: StreamId) -> UnixStream {
        let dialed = Notice::Dialed {
            stream,
            accept: None,
        };
        self.until(|w| w.heard.contains(&dialed));
        let (app, sink) = UnixStream::pair().unwrap();
        app.set_nonblocking(true).unwrap();
        sink.set_nonblocking(!self.blocking).unwrap();
        let now = self.shard.now();
        let port = self.shard.port_mut(HERE);
        assert!(port.attach(now, stream, Sink::Fd(sink.into()), &[]));
        app
    }

    #[track_caller]
    fn failed(&mut self, stream: StreamId) -> DialError {
        let mut why = None;
        self.until(|w| {
            why = w.heard.iter().find_map(|n| match n {
                Notice::DialFailed { stream: s, error } if *s == stream => Some(error.clone()),
                _ => None,
            });
            why.is_some()
        });
        why.unwrap()
    }

    /// An open stream: the application's end, and the VMM's.
    fn open(&mut self) -> (UnixStream, UnixStream) {
        let (stream, mut vmm) = self.dial(22);
        vmm.write_all(b"OK 1\n").unwrap();
        (self.dialed(stream), vmm)
    }

    /// Reads until there are so many bytes.
    #[track_caller]
    fn read(&mut self, from: &mut UnixStream, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.until(|_| {
            let mut chunk = vec![0; len - bytes.len()];
            let n = from.read(&mut chunk).unwrap_or(0);
            bytes.extend(&chunk[..n]);
            bytes.len() == len
        });
        bytes
    }

    /// Waits for the end of a socket's bytes.
    #[track_caller]
    fn end(&mut self, of: &mut UnixStream) {
        self.until(|_| of.read(&mut [0]).is_ok_and(|n| n == 0));
    }

    #[track_caller]
    fn gone(&mut self) {
        self.until(|w| w.shard.port(HERE).streams() == 0 && w.carrier().streams() == 0);
        assert_eq!(self.carrier().pairs.len(), 0);
    }
}

#[test]
fn bytes_right_behind_the_answer_are_the_guests_and_come_first() {
    for split in [1, 3, 5, 12] {
        let mut world = World::new();
        let (stream, mut vmm) = world.dial(22);
        let answer = b"OK 1073741824\nSSH-2.0-x\r\n";
        vmm.write_all(&answer[..split]).unwrap();
        world.settle();
        vmm.write_all(&answer[split..]).unwrap();
        let mut app = world.dialed(stream);
        vmm.write_all(b"more").unwrap();
        assert_eq!(world.read(&mut app, 15), b"SSH-2.0-x\r\nmore");
        app.write_all(b"hello").unwrap();
        assert_eq!(world.read(&mut vmm, 5), b"hello");
        // Both sides finish.
        app.shutdown(Shutdown::Write).unwrap();
        world.end(&mut vmm);
        vmm.write_all(b"last").unwrap();
        drop(vmm);
        assert_eq!(world.read(&mut app, 4), b"last");
        world.end(&mut app);
        world.gone();
        let closed = world.heard.iter().find_map(|n| match n {
            Notice::Closed { reason, totals, .. } => Some((*reason, *totals)),
            _ => None,
        });
        let (reason, totals) = closed.unwrap();
        assert_eq!(reason, None);
        assert_eq!((totals.to_guest, totals.from_guest), (5, 19));
    }
}

#[test]
fn r53_a_vmm_that_answers_wrongly_or_not_fails_that_dial_only() {
    let mut world = World::new();
    let (mut app, mut vmm) = world.open();
    for answer in ["", "OK", "OK 1", "SSH-2.0\r\n", "OK 1\0\n", "\0"] {
        let (stream, mut end) = world.dial(22);
        end.write_all(answer.as_bytes()).unwrap();
        drop(end);
        assert_eq!(world.failed(stream), DialError::Refused, "{answer:?}");
    }
    // One that never answers costs the dial's time, and a late answer finds nobody.
    let stream = world.ask(22, Some(Duration::from_millis(5)));
    let ticket = world.ticket(22);
    assert_eq!(world.failed(stream), DialError::Timeout);
    let (ours, mut late) = UnixStream::pair().unwrap();
    late.set_nonblocking(true).unwrap();
    world.news(DoorNews::Dialed {
        ticket,
        socket: ours.into(),
    });
    world.end(&mut late);
    // One that cannot be dialled.
    let stream = world.ask(22, None);
    let ticket = world.ticket(22);
    world.news(DoorNews::Failed { ticket });
    assert_eq!(world.failed(stream), DialError::Refused);
    world.said.lock().unwrap().full = true;
    let stream = world.ask(22, None);
    assert_eq!(world.failed(stream), DialError::Refused);
    // The stream beside them has noticed nothing.
    app.write_all(b"still").unwrap();
    assert_eq!(world.read(&mut vmm, 5), b"still");
    drop((app, vmm));
    world.gone();
}

#[test]
fn what_the_guest_dials_is_offered_and_refused_by_closing() {
    let mut world = World::new();
    let offer = |world: &mut World| {
        let (ours, vmm) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        vmm.set_nonblocking(true).unwrap();
        let socket = ours.into();
        world.news(DoorNews::Offered { port: 741, socket });
        let mut found = None;
        world.until(|w| {
            found = w.heard.iter().find_map(|n| match n {
                Notice::Incoming {
                    stream,
                    local_port: 741,
                    ..
                } => Some(*stream),
                _ => None,
            });
            found.is_some()
        });
        world.heard.clear();
        (found.unwrap(), vmm)
    };
    let (stream, mut vmm) = offer(&mut world);
    vmm.write_all(b"before").unwrap();
    let (mut app, sink) = UnixStream::pair().unwrap();
    app.set_nonblocking(true).unwrap();
    let now = world.shard.now();
    world
        .shard
        .port_mut(HERE)
        .accept(now, stream, Some(Sink::Fd(sink.into())));
    assert_eq!(world.read(&mut app, 6), b"before");
    let (refused, mut end) = offer(&mut world);
    let now = world.shard.now();
    world.shard.port_mut(HERE).refuse(now, refused);
    world.end(&mut end);
    // A port that nobody serves.
    let (ours, mut other) = UnixStream::pair().unwrap();
    let socket = ours.into();
    world.news(DoorNews::Offered { port: 5, socket });
    other.set_nonblocking(true).unwrap();
    world.end(&mut other);
    // The first one goes on. When the VMM dies, the application sees it.
    vmm.write_all(b"after").unwrap();
    assert_eq!(world.read(&mut app, 5), b"after");
    drop(vmm);
    world.end(&mut app);
    world.gone();
}

#[test]
fn r118_made_up_ports_of_the_guest_wrap_and_skip_what_lives() {
    let mut world = World::new();
    let pair = |world: &mut World| {
        let (ours, vmm) = UnixStream::pair().unwrap();
        let socket = ours.into();
        world.carrier().offered(741, socket);
        vmm
    };
    let _first = pair(&mut world);
    world.carrier().next_guest_port = u32::MAX;
    let _last = pair(&mut world);
    // The next one would have the first one's.
    let _wrapped = pair(&mut world);
    let mut ports: Vec<_> = world.carrier().pairs.keys().map(|p| p.1).collect();
    ports.sort_unstable();
    assert_eq!(ports, [GUEST_PORTS, GUEST_PORTS + 1, u32::MAX]);
}

#[test]
fn a_side_that_does_not_read_stops_the_other_and_loses_nothing() {
    const TOTAL: usize = 3 << 20;
    let pattern = |at: usize| (at % 251) as u8;
    for (to_guest, blocking) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut world = World::new();
        world.blocking = blocking;
        let (mut app, mut vmm) = world.open();
        let (from, to) = match to_guest {
            true => (&mut app, &mut vmm),
            false => (&mut vmm, &mut app),
        };
        let (mut sent, mut stalled) = (0, 0);
        while stalled < 200 {
            let chunk: Vec<u8> = (sent..TOTAL.min(sent + 50_000)).map(pattern).collect();
            match from.write(&chunk) {
                Ok(n) => (sent, stalled) = (sent + n, 0),
                Err(_) => stalled += 1,
            }
            world.turn();
        }
        assert!(sent < TOTAL, "nothing stopped the sender");
        let waiting = world.carrier().links.iter().flatten();
        assert!(waiting.map(Link::waits).all(|n| n <= WINDOW as usize));
        // A side that is stopped costs nothing.
        let before = world.shard.wakeups();
        world.settle();
        assert!(world.shard.wakeups() <= before + 51);
        let mut read = 0;
        for _ in 0..TURNS_MAX {
            if read == TOTAL {
                break;
            }
            let chunk: Vec<u8> = (sent..TOTAL.min(sent + 50_000)).map(pattern).collect();
            if !chunk.is_empty() {
                sent += from.write(&chunk).unwrap_or(0);
            }
            world.turn();
            let mut chunk = [0; 40_000];
            let n = to.read(&mut chunk).unwrap_or(0);
            assert!(
                chunk[..n]
                    .iter()
                    .zip(read..)
                    .all(|(b, at)| *b == pattern(at))
            );
            read += n;
        }
        assert_eq!(read, TOTAL);
        drop((app, vmm));
        world.gone();
    }
}

#[test]
fn r117_where_the_vmm_takes_a_half_close_for_a_close_the_answer_still_arrives() {
    let mut world = World::with(Options::default());
    let (mut app, mut vmm) = world.open();
    app.write_all(b"question").unwrap();
    app.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.read(&mut vmm, 8), b"question");
    world.settle();
    // It sees no end, which it would take for one of both directions.
    assert_eq!(
        vmm.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    vmm.write_all(b"answer").unwrap();
    drop(vmm);
    assert_eq!(world.read(&mut app, 6), b"answer");
    world.end(&mut app);
    world.gone();
}

#[test]
fn r117_a_client_that_closes_is_a_close_for_every_vmm() {
    for half_closes in [true, false] {
        let mut world = World::with(Options { half_closes });
        let (app, mut vmm) = world.open();
        drop(app);
        world.end(&mut vmm);
        // It accepts no bytes any more, either.
        world.until(|_| vmm.write(b"x").is_err());
        drop(vmm);
        world.gone();
    }
}

#[test]
fn r117_a_stream_that_the_vmm_breaks_off_is_reset() {
    let mut world = World::new();
    let (mut app, mut vmm) = world.open();
    app.write_all(b"not read").unwrap();
    vmm.write_all(b"sent").unwrap();
    assert_eq!(world.read(&mut app, 4), b"sent");
    // Closed with bytes unread, a Unix socket is reset.
    world.until(|w| w.shard.port(HERE).counters().bytes_to_guest == 8);
    drop(vmm);
    world.gone();
    let reason = world.heard.iter().find_map(|n| match n {
        Notice::Closed { reason, .. } => Some(*reason),
        _ => None,
    });
    assert!(reason.unwrap().is_some());
}

#[test]
fn r128_a_session_ends_with_its_last_stream_and_the_next_one_has_none_of_them() {
    let mut world = World::new();
    let (mut app, mut vmm) = world.open();
    world.news(DoorNews::State(Err("gone".into())));
    world.settle();
    // The path is gone; the stream is not.
    assert_eq!(world.shard.port(HERE).epoch(), Some(1));
    assert_eq!(world.carrier().obstacle().as_deref(), Some("gone"));
    app.write_all(b"on").unwrap();
    assert_eq!(world.read(&mut vmm, 2), b"on");
    drop((app, vmm));
    world.until(|w| w.shard.port(HERE).epoch().is_none());
    let now = world.shard.now();
    let request = DialRequest {
        port: 22,
        hello: None,
        deadline: None,
        lane: Lane::Bulk,
    };
    let port = world.shard.port_mut(HERE);
    assert_eq!(port.dial(now, request, None), Err(DialError::NoSession));
    world.news(DoorNews::State(Ok(())));
    world.until(|w| w.shard.port(HERE).epoch() == Some(2));
    let (mut app, mut vmm) = world.open();
    vmm.write_all(b"new").unwrap();
    assert_eq!(world.read(&mut app, 3), b"new");
}

#[test]
fn a_guest_that_dials_without_a_stop_gets_no_more_than_there_is() {
    let mut world = World::new();
    let mut ends = Vec::new();
    for _ in 0..LINKS_MAX + 3 {
        let (ours, vmm) = UnixStream::pair().unwrap();
        let socket = ours.into();
        world.carrier().offered(741, socket);
        vmm.set_nonblocking(true).unwrap();
        ends.push(vmm);
    }
    assert_eq!(world.carrier().streams(), LINKS_MAX);
    for mut beyond in ends.split_off(LINKS_MAX) {
        assert_eq!(beyond.read(&mut [0]).unwrap(), 0);
    }
    // Our own dials beyond it fail, and come back when there is room.
    let stream = world.ask(22, None);
    assert_eq!(world.failed(stream), DialError::Refused);
    drop(ends);
    // What a guest has dialled and ended may have bytes, so it lasts until it is answered.
    world.until(|w| {
        for notice in std::mem::take(&mut w.heard) {
            if let Notice::Incoming { stream, .. } = notice {
                let now = w.shard.now();
                w.shard.port_mut(HERE).refuse(now, stream);
            }
        }
        w.carrier().streams() == 0
    });
    let (mut app, mut vmm) = world.open();
    vmm.write_all(b"room").unwrap();
    assert_eq!(world.read(&mut app, 4), b"room");
}
