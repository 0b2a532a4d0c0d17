//! The measurements. Each runs against one backend for a short time and returns one number.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, sendmmsg};

use crate::guest::{Key, PATIENCE};
use crate::hybrid::{DRAIN, ECHO, SOCKETS, SOURCE_4K, SOURCE_64, SOURCE_64K};
use crate::process::Backend;

/// How long one throughput cell lasts.
pub const CELL: Duration = Duration::from_millis(60);
const WARM_BYTES: u64 = 1 << 20;
const ROUND_TRIPS: usize = 1000;
/// Bytes that a host program reads or writes at a time.
pub const SPAN: usize = 64 << 10;
const CHECKED: usize = 256 << 10;

/// Where the host's end of a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A host program behind a Unix socket. It is a part of the harness's loop.
    Socket,
    /// A service inside the backend.
    Inline,
}

/// A stream of the guest, and the host program's socket if there is one.
pub struct Open {
    /// The guest's side.
    pub key: Key,
    /// The host's side.
    pub host: Option<UnixStream>,
}

/// Opens a stream from the guest to a host program.
pub fn open_socket(backend: &mut Backend) -> anyhow::Result<Open> {
    let key = backend.guest.connect(SOCKETS.start)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match backend.listeners[0].accept() {
            Ok((host, _)) => {
                host.set_nonblocking(true)?;
                return Ok(Open {
                    key,
                    host: Some(host),
                });
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                backend.guest.pump();
            }
            Err(e) => return Err(e).context("the backend does not connect to the host program"),
        }
    }
}

fn open_inline(backend: &mut Backend, port: u32) -> anyhow::Result<Open> {
    let key = backend.guest.connect(port)?;
    Ok(Open { key, host: None })
}

/// Ends a stream, and lets the backend handle that.
pub fn close(backend: &mut Backend, open: Open) {
    backend.guest.reset(open.key);
    drop(open.host);
    backend.guest.pump();
}

/// Bytes per second from the guest to the host, in packets of `size`; and the backend's CPU time, ns per byte.
pub fn upload(backend: &mut Backend, end: End, size: usize) -> anyhow::Result<(f64, f64)> {
    let open = match end {
        End::Socket => open_socket(backend)?,
        End::Inline => open_inline(backend, DRAIN)?,
    };
    let (mut sent, mut got) = (0, 0);
    let mut buf = vec![0; SPAN];
    let result = steady(backend, |backend| {
        // As Linux does: what does not fit the window is sent in smaller packets.
        sent += backend.guest.fill(open.key, size, size > 64);
        backend.guest.pump();
        match &open.host {
            Some(host) => got += read_all(host, &mut buf)?,
            None => got = sent - backend.guest.in_flight(open.key),
        }
        alive(backend, open.key)?;
        Ok(got)
    });
    close(backend, open);
    result
}

/// Bytes per second from the host to the guest, written in pieces of `size`; and the backend's CPU time, ns per byte.
pub fn download(backend: &mut Backend, end: End, size: usize) -> anyhow::Result<(f64, f64)> {
    let open = match (end, size) {
        (End::Socket, _) => open_socket(backend)?,
        (End::Inline, 64) => open_inline(backend, SOURCE_64)?,
        (End::Inline, 4096) => open_inline(backend, SOURCE_4K)?,
        (End::Inline, _) => open_inline(backend, SOURCE_64K)?,
    };
    let mut pieces = Pieces::new(size);
    let result = steady(backend, |backend| {
        if let Some(host) = &open.host {
            pieces.write(host)?;
        }
        backend.guest.pump();
        alive(backend, open.key)?;
        Ok(backend.guest.conn(open.key).received)
    });
    close(backend, open);
    result
}

/// What a host program writes: pieces of one size. Each piece is a message of its own to the socket. One system call writes as
/// many as a fast program could have ready: with a call for each piece, the calls would be measured.
struct Pieces {
    size: usize,
    count: usize,
    bytes: Vec<u8>,
    headers: MultiHeaders<()>,
    /// Bytes of the first piece that were already written.
    offset: usize,
}

impl Pieces {
    fn new(size: usize) -> Self {
        let count = (SPAN / size).clamp(4, 128);
        Self {
            size,
            count,
            bytes: vec![7; size],
            headers: MultiHeaders::preallocate(count, None),
            offset: 0,
        }
    }

    fn write(&mut self, host: &UnixStream) -> anyhow::Result<()> {
        let rest = [IoSlice::new(&self.bytes[self.offset..])];
        let whole = [IoSlice::new(&self.bytes)];
        let pieces = std::iter::once(&rest).chain(std::iter::repeat(&whole));
        let to = vec![None::<()>; self.count];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let fd = host.as_raw_fd();
        match sendmmsg(fd, &mut self.headers, pieces, to, [], flags) {
            Ok(taken) => {
                let bytes: usize = taken.map(|message| message.bytes).sum();
                self.offset = (self.offset + bytes) % self.size;
                Ok(())
            }
            Err(Errno::EAGAIN) => Ok(()),
            Err(e) => Err(e).context("the stream's socket broke"),
        }
    }
}

fn alive(backend: &Backend, key: Key) -> anyhow::Result<()> {
    if backend.guest.conn(key).ended {
        bail!("the backend ended the stream");
    }
    Ok(())
}

/// Repeats `step`, which returns the bytes moved so far. The measurement starts after a warm-up.
fn steady(
    backend: &mut Backend,
    mut step: impl FnMut(&mut Backend) -> anyhow::Result<u64>,
) -> anyhow::Result<(f64, f64)> {
    let give_up = Instant::now() + PATIENCE;
    let warm = loop {
        let moved = step(backend)?;
        if moved >= WARM_BYTES.min(SPAN as u64 * 4) {
            break moved;
        }
        if Instant::now() > give_up {
            bail!("only {moved} bytes in {PATIENCE:?}");
        }
    };
    let (begin, before) = (Instant::now(), backend.usage()?);
    let mut moved = warm;
    while begin.elapsed() < CELL {
        for _ in 0..8 {
            moved = step(backend)?;
        }
    }
    let (took, after) = (begin.elapsed(), backend.usage()?);
    let bytes = (moved - warm) as f64;
    if bytes == 0.0 {
        bail!("the stream makes no progress");
    }
    let cpu = (after.cpu_ns - before.cpu_ns) as f64 / bytes;
    Ok((bytes / took.as_secs_f64(), cpu))
}

/// Reads what a host program's socket has. Returns how many bytes.
pub fn read_all(mut host: &UnixStream, buf: &mut [u8]) -> anyhow::Result<u64> {
    let mut total = 0;
    for _ in 0..4 {
        match host.read(buf) {
            Ok(0) => bail!("the backend closed the socket"),
            Ok(n) => total += n as u64,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e).context("the stream's socket broke"),
        }
    }
    Ok(total)
}

/// Round trips of `size` bytes, ns, sorted: the guest sends, the host echoes.
pub fn round_trips(backend: &mut Backend, end: End, size: usize) -> anyhow::Result<Vec<f64>> {
    let open = match end {
        End::Socket => open_socket(backend)?,
        End::Inline => open_inline(backend, ECHO)?,
    };
    let times = round_trips_on(backend, &open, size);
    close(backend, open);
    times
}

/// Share of a core, percent, that the backend takes for 1,000 packets a second: a request and its echo every 2 ms.
pub fn paced(backend: &mut Backend) -> anyhow::Result<f64> {
    const TRIPS: u32 = 150;
    let open = open_socket(backend)?;
    let (begin, before) = (Instant::now(), backend.usage()?);
    for i in 1..=TRIPS {
        trip(backend, &open, 64)?;
        while begin.elapsed() < i * Duration::from_millis(2) {
            backend.guest.pump();
        }
    }
    let cpu = backend.usage()?.cpu_ns - before.cpu_ns;
    let share = cpu as f64 / begin.elapsed().as_nanos() as f64;
    close(backend, open);
    Ok(100.0 * share)
}

/// As `round_trips`, on an open stream.
pub fn round_trips_on(backend: &mut Backend, open: &Open, size: usize) -> anyhow::Result<Vec<f64>> {
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for i in 0..ROUND_TRIPS + ROUND_TRIPS / 10 {
        let took = trip(backend, open, size)?;
        if i >= ROUND_TRIPS / 10 {
            times.push(took.as_nanos() as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// One round trip: its time.
fn trip(backend: &mut Backend, open: &Open, size: usize) -> anyhow::Result<Duration> {
    let mut buf = [0; 256];
    let begin = Instant::now();
    let before = backend.guest.conn(open.key).received;
    while !backend.guest.send(open.key, size, None) {
        backend.guest.pump();
        patient(begin)?;
    }
    while backend.guest.conn(open.key).received - before < size as u64 {
        backend.guest.pump();
        if let Some(mut host) = open.host.as_ref() {
            match host.read(&mut buf) {
                Ok(0) => bail!("the backend closed the socket"),
                Ok(n) => host.write_all(&buf[..n])?,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("the stream's socket broke"),
            }
        }
        alive(backend, open.key)?;
        patient(begin)?;
    }
    Ok(begin.elapsed())
}

fn patient(begin: Instant) -> anyhow::Result<()> {
    if begin.elapsed() > PATIENCE {
        bail!("no answer in {PATIENCE:?}");
    }
    Ok(())
}

/// Results of many short connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct Connections {
    /// Connections whose echo was complete.
    pub completed: u64,
    /// Connections that ended or hung before that.
    pub failed: u64,
    /// Time spent in connections, without the pauses between them.
    pub busy: Duration,
}

impl Connections {
    /// Completed connections per second of time in connections, failed ones included in the time.
    pub fn rate(&self) -> f64 {
        self.completed as f64 / self.busy.as_secs_f64()
    }
}

/// A host program connects to the guest, waits for the echo of 64 bytes, and closes; `n` times, with a pause of `spacing`.
pub fn connections(backend: &mut Backend, spacing: Duration, n: u64) -> Connections {
    let mut out = Connections::default();
    let begin = Instant::now();
    for _ in 0..n {
        let started = Instant::now();
        match connection(backend, started) {
            Ok(()) => out.completed += 1,
            Err(_) => out.failed += 1,
        }
        out.busy += started.elapsed();
        let next = Instant::now() + spacing;
        while Instant::now() < next {
            backend.guest.pump();
        }
        backend.guest.forget_ended();
        if begin.elapsed() > PATIENCE / 2 {
            break;
        }
    }
    out
}

fn connection(backend: &mut Backend, started: Instant) -> anyhow::Result<()> {
    let mut host = UnixStream::connect(backend.uds())?;
    host.set_nonblocking(true)?;
    host.write_all(b"CONNECT 5000\n")?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        read_some(backend, &mut host, &mut answer, 1, started)?;
    }
    host.write_all(&[7; 64])?;
    let mut echo = Vec::new();
    while echo.len() < 64 {
        read_some(backend, &mut host, &mut echo, 64, started)?;
    }
    Ok(())
}

fn read_some(
    backend: &mut Backend,
    host: &mut UnixStream,
    into: &mut Vec<u8>,
    max: usize,
    started: Instant,
) -> anyhow::Result<()> {
    /// Longer than any connection that completes.
    const LIMIT: Duration = Duration::from_millis(200);
    let mut buf = [0; 64];
    loop {
        backend.guest.pump();
        match host.read(&mut buf[..max]) {
            Ok(0) => bail!("closed"),
            Ok(n) => {
                into.extend_from_slice(&buf[..n]);
                return Ok(());
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
        if started.elapsed() > LIMIT {
            bail!("no progress");
        }
    }
}

/// Sends known bytes in both directions, and compares them at the other end.
pub fn checked_transfer(backend: &mut Backend) -> anyhow::Result<()> {
    let open = open_socket(backend)?;
    let mut host = open.host.as_ref().context("a socket")?;
    let bytes: Vec<u8> = (0..CHECKED as u32)
        .map(|i| (i * 7 + i / 251) as u8)
        .collect();
    let (mut sent, mut got) = (0, Vec::new());
    let begin = Instant::now();
    let mut buf = [0; SPAN];
    while got.len() < CHECKED {
        let n = backend.guest.credit(open.key).min(CHECKED - sent).min(4000);
        if n > 0
            && backend
                .guest
                .send(open.key, n, Some(&bytes[sent..sent + n]))
        {
            sent += n;
        }
        backend.guest.pump();
        match host.read(&mut buf) {
            Ok(0) => bail!("the backend closed the socket"),
            Ok(n) => got.extend_from_slice(&buf[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
        patient(begin)?;
    }
    if got != bytes {
        bail!("the host received other bytes than the guest sent");
    }
    backend.guest.keep = Some(Vec::new());
    let mut sent = 0;
    while backend.guest.keep.as_ref().map_or(0, Vec::len) < CHECKED {
        match host.write(&bytes[sent..]) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
        backend.guest.pump();
        patient(begin)?;
    }
    if backend.guest.keep.take().as_ref() != Some(&bytes) {
        bail!("the guest received other bytes than the host sent");
    }
    close(backend, open);
    Ok(())
}

/// Bytes per second that one thread writes to a Unix socket and reads from its other end.
pub fn socket_alone() -> anyhow::Result<f64> {
    let (mut a, mut b) = UnixStream::pair()?;
    let (piece, mut buf) = (vec![7; SPAN], vec![0; SPAN]);
    let (begin, mut moved) = (Instant::now(), 0);
    while begin.elapsed() < CELL {
        a.write_all(&piece)?;
        let mut got = 0;
        while got < SPAN {
            got += b.read(&mut buf)?;
        }
        moved += got;
    }
    Ok(moved as f64 / begin.elapsed().as_secs_f64())
}

/// Bytes per second that one thread writes to a Unix socket in pieces of `size`, and another one reads without a pause: the socket
/// costs the writer more for each piece than a backend behind it.
pub fn pieces_alone(size: usize) -> anyhow::Result<f64> {
    let (a, mut b) = UnixStream::pair()?;
    a.set_nonblocking(true)?;
    b.set_nonblocking(true)?;
    let mut pieces = Pieces::new(size);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (begin, mut buf, mut moved) = (Instant::now(), vec![0; SPAN], 0);
            loop {
                match b.read(&mut buf) {
                    Ok(0) => return Ok(moved as f64 / begin.elapsed().as_secs_f64()),
                    Ok(n) => moved += n,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e),
                }
            }
        });
        let begin = Instant::now();
        while begin.elapsed() < CELL {
            pieces.write(&a)?;
        }
        drop(a);
        Ok(reader.join().expect("the reader does not panic")?)
    })
}
