//! A guest with many streams on one driver. It runs on the thread that calls [`Guest::pump`], without a sleep or a lock, so that
//! the backend is what is measured.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use adit_engine::{Kind, Op, PacketHeader};
use adit_testkit::stream::GuestStream;
use anyhow::bail;

use crate::frontend::Attached;

/// How long a measurement waits for progress.
pub const PATIENCE: Duration = Duration::from_secs(5);
const SHUTDOWN_BOTH: u32 = 3;

/// A stream of the guest, by its ports.
pub struct Conn {
    credit: GuestStream,
    /// The stream is open.
    pub open: bool,
    /// The host ended the stream.
    pub ended: bool,
    /// Payload bytes received.
    pub received: u64,
    /// The host opened the stream.
    accepted: bool,
    /// The guest echoes what it receives.
    echo: bool,
    owed: Vec<u8>,
}

/// Key of a stream: port in the guest, port on the host.
pub type Key = (u32, u32);

/// A guest.
pub struct Guest {
    /// The driver.
    pub attached: Attached,
    conns: HashMap<Key, Conn>,
    next_port: u32,
    /// Streams with bytes to send back.
    owing: Vec<Key>,
    payload: Vec<u8>,
    /// Packets to send once there is room.
    replies: Vec<PacketHeader>,
    /// Do not echo on streams that the host opens.
    pub silent: bool,
    /// If set, payload is copied out of RX buffers to here, for the transfer that is checked.
    pub keep: Option<Vec<u8>>,
}

impl Guest {
    /// Makes a guest without streams.
    pub fn new(attached: Attached) -> Self {
        Self {
            attached,
            conns: HashMap::new(),
            next_port: 1 << 16,
            owing: Vec::new(),
            payload: Vec::new(),
            replies: Vec::new(),
            silent: false,
            keep: None,
        }
    }

    /// Asks for a stream to a host port, and waits until it is open.
    pub fn connect(&mut self, host_port: u32) -> anyhow::Result<Key> {
        let key = self.request(host_port);
        let end = Instant::now() + PATIENCE;
        // The host's answer carries the credit.
        while !self.conn(key).open {
            self.pump();
            if self.conn(key).ended || Instant::now() > end {
                bail!("the backend opens no stream to port {host_port}");
            }
        }
        Ok(key)
    }

    /// Asks for a stream without waiting.
    pub fn request(&mut self, host_port: u32) -> Key {
        self.next_port += 1;
        let mut credit = GuestStream::new(self.next_port, host_port);
        self.replies.push(credit.header(Op::Request));
        let key = (self.next_port, host_port);
        self.conns.insert(key, Conn::new(credit, false));
        key
    }

    /// Returns a stream.
    ///
    /// # Panics
    /// The key was not returned by `connect`.
    pub fn conn(&self, key: Key) -> &Conn {
        &self.conns[&key]
    }

    /// Streams that are open.
    pub fn open(&self) -> usize {
        self.conns.values().filter(|c| c.open && !c.ended).count()
    }

    /// Returns a stream that the host opened and that has not ended.
    pub fn accepted(&self) -> Option<Key> {
        let mut host = self.conns.iter().filter(|(_, c)| c.accepted && !c.ended);
        host.next().map(|(key, _)| *key)
    }

    /// Removes streams that ended.
    pub fn forget_ended(&mut self) {
        self.conns.retain(|_, c| !c.ended);
    }

    /// Resets a stream.
    pub fn reset(&mut self, key: Key) {
        if let Some(mut conn) = self.conns.remove(&key)
            && !conn.ended
        {
            self.replies.push(conn.credit.header(Op::Rst));
        }
    }

    /// Sends one packet: `bytes`, or `len` bytes of old data in the payload buffers. Returns false without credit or room.
    pub fn send(&mut self, key: Key, len: usize, bytes: Option<&[u8]>) -> bool {
        let Some(conn) = self.conns.get_mut(&key).filter(|c| c.open && !c.ended) else {
            return false;
        };
        if (conn.credit.credit() as usize) < len {
            return false;
        }
        let before = conn.credit;
        let header = conn.credit.payload(len as u32);
        let driver = &mut self.attached.driver;
        let sent = match bytes {
            Some(bytes) => driver.send(&header, bytes, len.max(1)),
            None => driver.send_unwritten(&header, len),
        };
        if !sent {
            conn.credit = before;
        }
        sent
    }

    /// Sends packets of `size` bytes of old data in the payload buffers while there is credit and room. With `split`, the last
    /// packet may be smaller, as in Linux. Returns how many bytes were sent.
    pub fn fill(&mut self, key: Key, size: usize, split: bool) -> u64 {
        let Some(conn) = self.conns.get_mut(&key).filter(|c| c.open && !c.ended) else {
            return 0;
        };
        let mut sent = 0;
        loop {
            let n = size.min(conn.credit.credit() as usize);
            if n == 0 || (n < size && !split) {
                return sent;
            }
            let before = conn.credit;
            let header = conn.credit.payload(n as u32);
            if !self.attached.driver.send_unwritten(&header, n) {
                conn.credit = before;
                return sent;
            }
            sent += n as u64;
        }
    }

    /// How many bytes the host accepts now.
    pub fn credit(&self, key: Key) -> usize {
        self.conns[&key].credit.credit() as usize
    }

    /// Bytes sent that the host has not confirmed.
    pub fn in_flight(&self, key: Key) -> u64 {
        u64::from(self.conns[&key].credit.in_flight())
    }

    /// Polls both queues once: handles packets, answers, publishes. Returns the payload bytes received.
    pub fn pump(&mut self) -> usize {
        self.attached.driver.reap_tx();
        let mut bytes = 0;
        loop {
            let (wire, len) = if self.keep.is_some() {
                let Some(wire) = self.attached.driver.receive(&mut self.payload) else {
                    break;
                };
                if let Some(keep) = &mut self.keep {
                    keep.extend_from_slice(&self.payload);
                }
                (wire, self.payload.len())
            } else {
                let Some(packet) = self.attached.driver.receive_header() else {
                    break;
                };
                packet
            };
            bytes += len;
            self.handle(&wire.header(), len);
        }
        self.reply();
        self.attached.publish();
        bytes
    }

    fn handle(&mut self, h: &PacketHeader, len: usize) {
        let key = (h.dst_port, h.src_port);
        if h.op == Op::Request as u16 {
            let mut conn = Conn::new(GuestStream::new(key.0, key.1), true);
            conn.echo = !self.silent;
            conn.credit.handle(h, 0);
            conn.open = true;
            self.replies.push(conn.credit.header(Op::Response));
            self.conns.insert(key, conn);
            return;
        }
        let Some(conn) = self.conns.get_mut(&key) else {
            // Linux answers like this if it does not know the socket.
            if h.op != Op::Rst as u16 {
                self.replies.push(rst(key));
            }
            return;
        };
        if h.op == Op::Rst as u16 {
            conn.ended = true;
            return;
        }
        conn.credit.handle(h, len);
        conn.received += len as u64;
        if h.op == Op::Response as u16 {
            conn.open = true;
        } else if h.op == Op::Rw as u16 && conn.echo {
            if conn.owed.is_empty() {
                self.owing.push(key);
            }
            conn.owed.resize(conn.owed.len() + len, 7);
        } else if h.op == Op::CreditRequest as u16 {
            self.replies.push(conn.credit.header(Op::CreditUpdate));
        } else if h.op == Op::Shutdown as u16 && h.flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH {
            conn.ended = true;
            self.replies.push(rst(key));
        }
        if conn.credit.owes_credit() {
            self.replies.push(conn.credit.header(Op::CreditUpdate));
        }
    }

    fn reply(&mut self) {
        let driver = &mut self.attached.driver;
        let mut sent = 0;
        for header in &self.replies {
            if !driver.send(header, &[], 1) {
                break;
            }
            sent += 1;
        }
        self.replies.drain(..sent);
        let conns = &mut self.conns;
        self.owing.retain(|key| {
            let Some(conn) = conns.get_mut(key).filter(|c| !c.ended) else {
                return false;
            };
            let n = conn.owed.len().min(conn.credit.credit() as usize);
            let before = conn.credit;
            let header = conn.credit.payload(n as u32);
            if n > 0 && driver.send(&header, &conn.owed[..n], n) {
                conn.owed.drain(..n);
            } else {
                conn.credit = before;
            }
            !conn.owed.is_empty()
        });
    }
}

impl Conn {
    fn new(credit: GuestStream, accepted: bool) -> Self {
        Self {
            credit,
            open: false,
            ended: false,
            received: 0,
            accepted,
            echo: false,
            owed: Vec::new(),
        }
    }
}

fn rst(key: Key) -> PacketHeader {
    PacketHeader {
        src_port: key.0,
        dst_port: key.1,
        kind: Kind::Stream as u16,
        op: Op::Rst as u16,
        ..PacketHeader::default()
    }
}
