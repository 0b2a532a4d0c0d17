//! The host's side of one guest over Unix sockets, as Firecracker and Cloud Hypervisor have it: tools written for them work
//! with any VMM that links this.
//!
//! ```text
//! host ── connect PATH, "CONNECT 5000\n" ──► dial port 5000 of the guest ── "OK 1073741824\n" ──► its bytes
//! guest ── dials port 7000 ──► connect PATH_7000 ──► its bytes; refused if nothing listens there
//! ```
//! Once a stream is open its socket belongs to the shard, which moves bytes between it and guest memory with one copy.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use adit_engine::{EngineConfig, ResetReason, StreamId, Tick};

use crate::carrier::Carrier;
use crate::dial::DialRequest;
use crate::port::Notice;
use crate::shard::{News, PortIndex, Shard};
use crate::sink::Sink;

const KEY_LISTENER: u32 = 0;
/// Keys of clients that have not said what they want.
const KEY_FIRST: u32 = 1;
/// Those at most: one more is turned away.
const ASKING_MAX: usize = 64;
/// `CONNECT 4294967295\n`.
const LINE_MAX: usize = 19;
/// How long a guest may take to answer.
const DIAL_LIMIT_NS: u64 = 5_000_000_000;

struct Asking {
    socket: UnixStream,
    line: Vec<u8>,
}

/// Binds a socket; one that a killed process left is taken away.
///
/// # Errors
/// Somebody listens there, or it cannot be made.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let refused = io::ErrorKind::ConnectionRefused;
    if UnixStream::connect(path).is_err_and(|e| e.kind() == refused) {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path).map_err(|e| {
        let path = path.display();
        io::Error::new(
            e.kind(),
            format!("cannot listen on {path}: {e}: is it another VM's?"),
        )
    })
}

/// A shard with the guest's port in it, and the loop around them.
pub struct Host<C: Carrier> {
    shard: Shard<C>,
    port: PortIndex,
    uds: Option<(UnixListener, PathBuf)>,
    asking: HashMap<u32, Asking>,
    next_key: u32,
    dialing: HashMap<StreamId, UnixStream>,
}

impl<C: Carrier> Host<C> {
    /// Makes the socket at `uds`; none: nobody on the host can reach the guest, nor it anybody. `seed` is drawn at random, as
    /// for [`Shard::add`].
    ///
    /// # Errors
    /// The socket cannot be made, or there are no descriptors to be had.
    pub fn new(carrier: C, uds: Option<&Path>, seed: u64) -> io::Result<Self> {
        let mut shard = Shard::new()?;
        let port = shard.add(carrier, EngineConfig::default(), seed)?;
        // Whatever the guest asks for is looked for as a socket.
        shard.port_mut(port).listen_to_all();
        let uds = uds.map(|path| -> io::Result<_> {
            let listener = bind(path)?;
            listener.set_nonblocking(true)?;
            shard.watch(listener.as_fd(), KEY_LISTENER)?;
            Ok((listener, path.to_owned()))
        });
        Ok(Self {
            shard,
            port,
            uds: uds.transpose()?,
            asking: HashMap::new(),
            next_key: KEY_FIRST,
            dialing: HashMap::new(),
        })
    }

    /// Serves until the process ends; returns why the kernel would not have it.
    pub fn run(mut self) -> io::Error {
        loop {
            if let Err(e) = self.shard.turn(None) {
                return e;
            }
            while let Some(news) = self.shard.poll_news() {
                match news {
                    News::Ready { key: KEY_LISTENER } => self.accept(),
                    News::Ready { key } => self.asked(key),
                    News::Notice(_, notice) => self.notice(notice),
                }
            }
        }
    }

    fn accept(&mut self) {
        let Some((listener, _)) = &self.uds else {
            return;
        };
        // Gone again, or no descriptors left: the client sees its connection end.
        let Ok((socket, _)) = listener.accept() else {
            return;
        };
        let key = self.next_key;
        let room = self.asking.len() < ASKING_MAX && socket.set_nonblocking(true).is_ok();
        if room && self.shard.watch(socket.as_fd(), key).is_ok() {
            let line = Vec::new();
            self.asking.insert(key, Asking { socket, line });
            self.next_key = self.next_key.checked_add(1).unwrap_or(KEY_FIRST);
        }
    }

    /// A client says which port it wants, byte by byte: what is behind the line is the guest's.
    fn asked(&mut self, key: u32) {
        let Some(asking) = self.asking.get_mut(&key) else {
            return;
        };
        let port = loop {
            let mut byte = [0];
            match asking.socket.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break parse(&asking.line),
                Ok(1) if asking.line.len() < LINE_MAX => asking.line.push(byte[0]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                _ => break None,
            }
        };
        let Some(Asking { socket, .. }) = self.asking.remove(&key) else {
            return;
        };
        self.shard.unwatch(socket.as_fd());
        let Some(port) = port else { return };
        let now = self.shard.now();
        let request = DialRequest {
            port,
            hello: None,
            deadline: Some(Tick(now.0 + DIAL_LIMIT_NS)),
            lane: adit_engine::Lane::Bulk,
        };
        // Fails without a driver in the guest: the client sees the end of its connection.
        if let Ok(stream) = self.shard.port_mut(self.port).dial(now, request, None) {
            self.dialing.insert(stream, socket);
        }
    }

    fn notice(&mut self, notice: Notice) {
        let now = self.shard.now();
        match notice {
            Notice::Incoming {
                stream, local_port, ..
            } => {
                let to = self
                    .uds
                    .as_ref()
                    .map(|(_, path)| socket_of(path, local_port));
                let socket = to.and_then(|path| UnixStream::connect(path).ok());
                let port = self.shard.port_mut(self.port);
                match socket {
                    Some(socket) => port.accept(now, stream, Some(Sink::Fd(OwnedFd::from(socket)))),
                    None => port.refuse(now, stream),
                }
            }
            Notice::Dialed { stream, .. } => {
                let port = self.shard.port_mut(self.port);
                let Some(mut socket) = self.dialing.remove(&stream) else {
                    return port.reset(now, stream, ResetReason::Local);
                };
                // The number is the host's port of the stream in the other VMMs; nothing depends on it.
                match writeln!(socket, "OK {}", stream.slot()) {
                    Ok(()) => {
                        port.attach(now, stream, Sink::Fd(socket.into()), &[]);
                    }
                    Err(_) => port.reset(now, stream, ResetReason::Local),
                }
            }
            Notice::DialFailed { stream, .. } => drop(self.dialing.remove(&stream)),
            Notice::Closed { .. } | Notice::Session { .. } => {}
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line)
        .ok()?
        .strip_prefix("CONNECT ")?
        .trim_end()
        .parse()
        .ok()
}

/// Where the host serves a port of its own.
fn socket_of(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}
