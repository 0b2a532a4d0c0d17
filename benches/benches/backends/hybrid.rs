//! Our backend in a process of its own: the channel's vhost-user carrier on one shard. On the host's side are a Unix socket as
//! the peer and Firecracker have it (a "hybrid" socket), and services in this process.
//!
//! | who dials | how |
//! |---|---|
//! | a host program | connects to UDS, writes `CONNECT port\n`, reads `OK port\n`; then the socket is the stream |
//! | the guest, any other port | we connect to `UDS_port` |
//! | the guest, [`ECHO`], [`DRAIN`], [`SOURCE`]… | a service on the shard's thread |
//!
//! Each line on standard input asks for [`Totals`]. The process ends at the end of standard input.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_channel::device::GuestCid;
use adit_channel::dial::DialRequest;
use adit_channel::port::Notice;
use adit_channel::shard::{News, Shard};
use adit_channel::sink::{Service, ServiceEvent, Sink, StreamIo};
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{EngineConfig, StreamId};
use adit_testkit::service::{Drain, Echo};
use anyhow::Context;
use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};

/// Echoes.
pub const ECHO: u32 = 7;
/// Reads and discards.
pub const DRAIN: u32 = 9;
/// Writes without end, in pieces of 64 bytes.
pub const SOURCE_64: u32 = 1064;
/// The same in pieces of 4 KiB.
pub const SOURCE_4K: u32 = 5096;
/// The same in pieces of 64 KiB.
pub const SOURCE_64K: u32 = 66536;
/// Guest ports that lead to Unix sockets.
pub const SOCKETS: std::ops::Range<u32> = 2000..2002;
/// Streams that may be open at a time.
pub const STREAMS: u32 = 16_384;

const LISTENER: u32 = 0;
const STDIN: u32 = 1;
const CLIENTS: u32 = 2;
const LINE_MAX: usize = 32;

/// Counters of the backend since its start.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Payload bytes in both directions.
    pub payload: u64,
    /// Copies of payload from or to guest memory, by us or by the kernel, bytes.
    pub guest_copies: u64,
    /// Copies through memory of the process beside these, bytes.
    pub copies_beside: u64,
    /// Packets in both directions.
    pub packets: u64,
    /// Interrupts sent to the guest.
    pub signals: u64,
    /// How often the shard returned from epoll.
    pub wakeups: u64,
}

struct Backend {
    shard: Shard<VhostUserCarrier>,
    port: adit_channel::shard::PortIndex,
    uds: PathBuf,
    listener: UnixListener,
    /// Host programs that have not sent their line yet.
    clients: HashMap<u32, (UnixStream, Vec<u8>)>,
    next_client: u32,
    dials: HashMap<StreamId, (UnixStream, u32)>,
}

/// Serves until the end of standard input.
pub fn serve(dir: &Path, busy_poll: Duration) -> anyhow::Result<()> {
    let listener = UnixListener::bind(dir.join("vhost.sock"))?;
    let cid = GuestCid::new(3).context("a guest's CID")?;
    let carrier = VhostUserCarrier::new(VhostUserConfig::new(listener, cid, "bench"))?;
    let uds = dir.join("uds");
    let listener = UnixListener::bind(&uds)?;
    listener.set_nonblocking(true)?;
    let mut shard = Shard::new()?;
    shard.busy_poll(busy_poll);
    let config = EngineConfig {
        // More than asked for, because the engine keeps an eighth for streams that the host opens.
        max_streams: STREAMS + STREAMS / 4,
        pool_bytes: u64::from(STREAMS) * (8 << 10),
        ..EngineConfig::default()
    };
    let port = shard.add(carrier, config, 7)?;
    let services = [ECHO, DRAIN, SOURCE_64, SOURCE_4K, SOURCE_64K];
    for at in services.into_iter().chain(SOCKETS) {
        shard.port_mut(port).listen(at)?;
    }
    shard.watch(listener.as_fd(), LISTENER)?;
    shard.watch(std::io::stdin().as_fd(), STDIN)?;
    let mut backend = Backend {
        shard,
        port,
        uds,
        listener,
        clients: HashMap::new(),
        next_client: CLIENTS,
        dials: HashMap::new(),
    };
    while backend.turn()? {}
    Ok(())
}

impl Backend {
    fn turn(&mut self) -> anyhow::Result<bool> {
        self.shard.turn(None)?;
        while let Some(news) = self.shard.poll_news() {
            match news {
                News::Ready { key: LISTENER } => self.accept(),
                News::Ready { key: STDIN } => {
                    if !self.totals()? {
                        return Ok(false);
                    }
                }
                News::Ready { key } => self.line(key),
                News::Notice(_, notice) => self.notice(notice),
            }
        }
        Ok(true)
    }

    fn accept(&mut self) {
        while let Ok((client, _)) = self.listener.accept() {
            if client.set_nonblocking(true).is_err() {
                continue;
            }
            self.next_client = CLIENTS + (self.next_client - CLIENTS + 1) % 100_000;
            if self.shard.watch(client.as_fd(), self.next_client).is_ok() {
                let client = (client, Vec::new());
                self.clients.insert(self.next_client, client);
            }
        }
    }

    /// Reads a client's line and nothing after it: what follows belongs to the stream.
    fn line(&mut self, key: u32) {
        let Some((client, line)) = self.clients.get_mut(&key) else {
            return;
        };
        let whole = match read_line(client, line) {
            Ok(true) => true,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
            Ok(false) if line.len() < LINE_MAX => return,
            _ => false,
        };
        self.shard.unwatch(client.as_fd());
        let Some((client, line)) = self.clients.remove(&key).filter(|_| whole) else {
            return;
        };
        let Some(port) = line
            .strip_prefix(b"CONNECT ")
            .and_then(|p| std::str::from_utf8(p).ok())
            .and_then(|p| p.parse().ok())
        else {
            return;
        };
        let request = DialRequest {
            port,
            hello: None,
            deadline: None,
            lane: adit_engine::Lane::Bulk,
        };
        let now = self.shard.now();
        if let Ok(stream) = self.shard.port_mut(self.port).dial(now, request, None) {
            self.dials.insert(stream, (client, port));
        }
    }

    fn notice(&mut self, notice: Notice) {
        let now = self.shard.now();
        let port = self.shard.port_mut(self.port);
        match notice {
            Notice::Incoming {
                stream, local_port, ..
            } => match sink(&self.uds, local_port) {
                Ok(sink) => port.accept(now, stream, Some(sink)),
                Err(_) => port.refuse(now, stream),
            },
            Notice::Dialed { stream, .. } => {
                if let Some((mut client, at)) = self.dials.remove(&stream)
                    && client.write_all(format!("OK {at}\n").as_bytes()).is_ok()
                {
                    port.attach(now, stream, Sink::Fd(client.into()), &[]);
                }
            }
            Notice::DialFailed { stream, .. } => drop(self.dials.remove(&stream)),
            Notice::Closed { .. } | Notice::Session { .. } | Notice::Obstacle => {}
        }
    }

    /// Answers a request on standard input. Returns false at its end.
    fn totals(&mut self) -> anyhow::Result<bool> {
        if std::io::stdin().read(&mut [0])? == 0 {
            return Ok(false);
        }
        let port = self.shard.port(self.port);
        let (of_port, of_device) = (port.counters(), port.carrier().counters());
        let totals = Totals {
            payload: of_port.bytes_from_guest + of_port.bytes_to_guest,
            guest_copies: of_device.bytes_copied,
            copies_beside: of_port.bytes_copied,
            packets: of_port.packets_from_guest + of_port.packets_to_guest,
            signals: of_device.signals,
            wakeups: self.shard.wakeups(),
        };
        println!("{}", serde_json::to_string(&totals)?);
        Ok(true)
    }
}

fn sink(uds: &Path, port: u32) -> std::io::Result<Sink> {
    Ok(match port {
        ECHO => Sink::Inline(Box::new(Echo)),
        DRAIN => Sink::Inline(Box::new(Drain)),
        SOURCE_64 => Sink::Inline(Box::new(Source(vec![7; 64]))),
        SOURCE_4K => Sink::Inline(Box::new(Source(vec![7; 4096]))),
        SOURCE_64K => Sink::Inline(Box::new(Source(vec![7; 65536]))),
        port => {
            let mut path = uds.as_os_str().to_owned();
            path.push(format!("_{port}"));
            Sink::Fd(UnixStream::connect(path)?.into())
        }
    })
}

/// Appends what there is of a line. Returns true if it is whole.
fn read_line(client: &mut UnixStream, line: &mut Vec<u8>) -> std::io::Result<bool> {
    let (mut bytes, room) = ([0; LINE_MAX], LINE_MAX - line.len());
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let there = recv(client.as_raw_fd(), &mut bytes[..room], flags)?;
    if there == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let end = bytes[..there].iter().position(|&b| b == b'\n');
    let take = end.map_or(there, |end| end + 1);
    client.read_exact(&mut bytes[..take])?;
    line.extend_from_slice(&bytes[..end.unwrap_or(take)]);
    Ok(end.is_some())
}

struct Source(Vec<u8>);

impl Service for Source {
    fn on_event(&mut self, _: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        while io.room() >= self.0.len() {
            io.write(&self.0);
        }
    }
}
