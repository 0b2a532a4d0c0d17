//! Tunnels over the sockets of a VMM that has one for each stream, beside `socat` between the same kind of sockets.
//!
//! ```text
//!  client ── Unix socket ── shard with a foreign carrier, or socat ── Unix socket ── the VMM's end
//! ```
//! The client and the VMM's end are threads of this process. So is the shard, which is alone in a port process; `socat` is a process.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use adit_channel::chunk::{Reader, Writer};
use adit_channel::foreign::{Door, DoorNews, Foreign, Options};
use adit_channel::hello::{self, Accept, CHUNKS, Common, Hello, Open};
use adit_channel::shard::{PortIndex, Shard, ShardThread};
use adit_channel::stream::Target;
use adit_engine::EngineConfig;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{BULK, SMALL};

/// Bytes of a bulk cell.
const TOTAL: usize = 192 << 20;
/// Round trips of a cell, and those before it is measured.
const TRIPS: u32 = 10_000;
const WARM: u32 = 1_000;
/// Streams of the idle cell.
const IDLE: usize = 1_000;
const LIMIT: Duration = Duration::from_secs(10);

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The shard, with plain bytes.
    Plain,
    /// The shard, with the ends among the bytes.
    Chunks,
    Socat,
}

type News = Arc<Mutex<Vec<DoorNews>>>;

/// Dials by making a pair of sockets. The VMM's ends go to `dialled`.
struct Pairs {
    bell: EventFd,
    news: News,
    dialled: std::sync::mpsc::Sender<UnixStream>,
}

impl Door for Pairs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn dial(&mut self, ticket: u32, _: u32) -> std::io::Result<()> {
        let (ours, mut vmm) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        vmm.write_all(b"OK 1\n")?;
        let _ = self.dialled.send(vmm);
        let socket = ours.into();
        self.news
            .lock()
            .expect("the news")
            .push(DoorNews::Dialed { ticket, socket });
        let _ = self.bell.write(1);
        Ok(())
    }

    fn receive(&mut self) -> Option<DoorNews> {
        let news = self.news.lock().expect("the news").pop();
        if news.is_none() {
            let _ = self.bell.read();
        }
        news
    }
}

struct Tunnels {
    shard: Shard<Foreign<Pairs>>,
    port: PortIndex,
    dialled: std::sync::mpsc::Receiver<UnixStream>,
}

fn tunnels(way: Way) -> Tunnels {
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let (bell, (to, dialled)) = (
        EventFd::from_flags(flags).expect("an eventfd"),
        std::sync::mpsc::channel(),
    );
    let _ = bell.write(1);
    let door = Pairs {
        bell,
        news: Arc::new(Mutex::new(vec![DoorNews::State(Ok(()))])),
        dialled: to,
    };
    let options = Options {
        half_closes: way == Way::Plain,
    };
    let carrier = Foreign::new(door, options, 1).expect("a carrier");
    let mut shard = Shard::new().expect("a shard");
    let port = shard
        .add(carrier, EngineConfig::default(), 7)
        .expect("a port");
    while shard.port(port).epoch().is_none() {
        shard.turn(None).expect("a turn");
    }
    Tunnels {
        shard,
        port,
        dialled,
    }
}

fn target(way: Way) -> Target {
    let features = match way {
        Way::Chunks => CHUNKS,
        Way::Plain | Way::Socat => 0,
    };
    let common = Common {
        features,
        ..Common::default()
    };
    Target {
        port: hello::PORT,
        hello: Some(Open::new("tcp:80".parse().expect("a name"), common)),
    }
}

/// The agent's part of the hello.
fn greet(vmm: &mut UnixStream) {
    let Ok(Hello::Open(open)) = hello::read(vmm) else {
        panic!("no hello");
    };
    let common = open.common;
    let accept = Hello::Accept(Accept { common, version: 1 });
    vmm.write_all(&accept.encode()).expect("an accept");
}

/// Keeps the relay running.
#[allow(dead_code)]
enum Running {
    Shard(ShardThread),
    Socat(Child, tempfile::TempDir),
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Self::Socat(child, _) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A tunnel: the client's end, the VMM's, and what is between.
fn tunnel(way: Way) -> (UnixStream, UnixStream, Running) {
    if way == Way::Socat {
        return socat();
    }
    let Tunnels {
        shard,
        port,
        dialled,
    } = tunnels(way);
    let handle = shard.handle(port);
    let running = shard.spawn("bench").expect("a thread");
    let vmm = thread::spawn(move || {
        let mut vmm = dialled.recv().expect("a dial");
        greet(&mut vmm);
        vmm
    });
    let stream = handle.dialer().dial(&target(way), LIMIT).expect("a stream");
    let (client, sink) = UnixStream::pair().expect("sockets");
    // As aditd's are: only such ones are worth a pipe.
    sink.set_nonblocking(true).expect("a socket");
    stream.splice(OwnedFd::from(sink));
    let vmm = vmm.join().expect("the VMM's end");
    (client, vmm, Running::Shard(running))
}

fn socat() -> (UnixStream, UnixStream, Running) {
    let dir = tempfile::tempdir().expect("a directory");
    let (at, to) = (dir.path().join("client"), dir.path().join("vmm"));
    let vmm = UnixListener::bind(&to).expect("a listener");
    let child = Command::new("socat")
        .args(["-b", "65536"])
        .arg(format!("UNIX-LISTEN:{}", at.display()))
        .arg(format!("UNIX-CONNECT:{}", to.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("socat");
    let end = Instant::now() + LIMIT;
    let client = loop {
        match UnixStream::connect(&at) {
            Ok(client) => break client,
            Err(e) => assert!(Instant::now() < end, "socat does not listen: {e}"),
        }
        thread::sleep(Duration::from_millis(1));
    };
    let (vmm, _) = vmm.accept().expect("socat");
    (client, vmm, Running::Socat(child, dir))
}

fn write_all(to: &mut UnixStream, bytes: &[u8], writer: Option<&mut Writer>) {
    let Some(writer) = writer else {
        return to.write_all(bytes).expect("a relay");
    };
    let mut rest = bytes;
    while !rest.is_empty() {
        let (head, n) = writer.next(rest.len());
        let iov = [
            std::io::IoSlice::new(head),
            std::io::IoSlice::new(&rest[..n]),
        ];
        let n = to.write_vectored(&iov).expect("a relay");
        rest = &rest[writer.sent(n)..];
    }
}

fn read(from: &mut UnixStream, into: &mut [u8], reader: Option<&mut Reader>) -> usize {
    let n = from.read(into).expect("a relay");
    assert!(n > 0, "the relay has ended");
    match reader {
        None => n,
        Some(reader) => reader.unwrap(&mut into[..n]).0,
    }
}

/// Writes of 64 KiB, a second.
pub fn bulk(way: Way, to_guest: bool) -> Vec<f64> {
    let (mut client, mut vmm, _running) = tunnel(way);
    let (mut reader, mut writer) = match way {
        Way::Chunks => (Some(Reader::default()), Some(Writer::default())),
        Way::Plain | Way::Socat => (None, None),
    };
    let block = vec![7; BULK];
    let begin = Instant::now();
    thread::scope(|scope| {
        let (from, to) = match to_guest {
            true => {
                writer = None;
                (&mut client, &mut vmm)
            }
            false => {
                reader = None;
                (&mut vmm, &mut client)
            }
        };
        scope.spawn(move || {
            for _ in 0..TOTAL / BULK {
                write_all(from, &block, writer.as_mut());
            }
        });
        let (mut got, mut into) = (0, vec![0; BULK]);
        while got < TOTAL {
            got += read(to, &mut into, reader.as_mut());
        }
    });
    vec![(TOTAL / BULK) as f64 / begin.elapsed().as_secs_f64()]
}

/// Round trips of 64 bytes, ns.
pub fn trips(way: Way) -> Vec<f64> {
    let (mut client, mut vmm, _running) = tunnel(way);
    let server = thread::spawn(move || {
        let (mut reader, mut writer) = (Reader::default(), Writer::default());
        let (mut message, mut got) = ([0; 2 * SMALL], 0);
        for _ in 0..WARM + TRIPS {
            while got < SMALL {
                let reader = (way == Way::Chunks).then_some(&mut reader);
                got += read(&mut vmm, &mut message[got..], reader);
            }
            got -= SMALL;
            let writer = (way == Way::Chunks).then_some(&mut writer);
            write_all(&mut vmm, &message[..SMALL], writer);
        }
        vmm
    });
    let mut message = [1; SMALL];
    let mut trip = || {
        client.write_all(&message).expect("a relay");
        client.read_exact(&mut message).expect("a relay");
    };
    (0..WARM).for_each(|_| trip());
    let begin = Instant::now();
    (0..TRIPS).for_each(|_| trip());
    let each = begin.elapsed().as_nanos() as f64 / f64::from(TRIPS);
    drop(server.join());
    vec![each]
}

/// One turn. Nobody wants the news.
fn turn(shard: &mut Shard<Foreign<Pairs>>, limit: Duration) {
    shard.turn(Some(limit)).expect("a turn");
    while shard.poll_news().is_some() {}
}

/// Bytes of memory for each stream that is open and idle, and wake-ups while they are for a second.
pub fn idle() -> Vec<f64> {
    let Tunnels {
        mut shard,
        port,
        dialled,
    } = tunnels(Way::Chunks);
    let mut kept = Vec::with_capacity(2 * IDLE);
    let open = |shard: &mut Shard<Foreign<Pairs>>, kept: &mut Vec<UnixStream>| {
        let now = shard.now();
        let target = target(Way::Chunks);
        let request = adit_channel::dial::DialRequest {
            port: target.port,
            hello: target.hello,
            deadline: None,
            lane: adit_engine::Lane::Bulk,
        };
        let (client, sink) = UnixStream::pair().expect("sockets");
        let sink = adit_channel::sink::Sink::Fd(sink.into());
        shard
            .port_mut(port)
            .dial(now, request, Some(sink))
            .expect("a stream");
        let mut vmm = loop {
            turn(shard, Duration::ZERO);
            if let Ok(vmm) = dialled.try_recv() {
                break vmm;
            }
        };
        vmm.set_nonblocking(true).expect("a socket");
        let mut hello = Vec::<u8>::new();
        while hello.len() < adit_channel::hello::PREFIX_LEN + 6 {
            turn(shard, Duration::ZERO);
            let mut bytes = [0; 128];
            if let Ok(n) = vmm.read(&mut bytes) {
                hello.extend(&bytes[..n]);
            }
        }
        vmm.set_nonblocking(false).expect("a socket");
        let common = Common {
            features: CHUNKS,
            ..Common::default()
        };
        let accept = Hello::Accept(Accept { common, version: 1 }).encode();
        // A message each way, so that what these need is there, too.
        let message = [&accept[..], &[1, 2, 0, 0, b'h', b'i']].concat();
        vmm.write_all(&message).expect("the relay");
        let mut client = client;
        client.write_all(b"hello").expect("the relay");
        client.set_nonblocking(true).expect("a socket");
        while client.read(&mut [0; 8]).is_err() {
            turn(shard, Duration::ZERO);
        }
        kept.extend([client, vmm]);
    };
    // Tables have grown, and the allocator's arenas are there.
    for _ in 0..16 {
        open(&mut shard, &mut kept);
    }
    let before = resident();
    for _ in 0..IDLE - 16 {
        open(&mut shard, &mut kept);
    }
    let each = resident().saturating_sub(before) as f64 / (IDLE - 16) as f64;
    while shard.wait_limit() == Some(Duration::ZERO) {
        turn(&mut shard, Duration::ZERO);
    }
    let (before, begin) = (shard.wakeups(), Instant::now());
    let mut turns = 0;
    while begin.elapsed() < Duration::from_secs(1) {
        let left = Duration::from_secs(1).saturating_sub(begin.elapsed());
        turn(&mut shard, left);
        turns += 1;
    }
    // The last one is the end of the second.
    let wakeups = (shard.wakeups() - before).min(turns).saturating_sub(1);
    vec![each, wakeups as f64]
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1);
    pages.and_then(|n| n.parse().ok()).unwrap_or(0) * 4096
}
