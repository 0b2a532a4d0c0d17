//! Clients that have not sent yet which port they want.
//!
//! A client has an index here, and its epoll key is derived from the index. Indices are reused, so a key never
//! overflows. A silent client keeps its index for a minute. If others need the index, the client that connected first
//! and has sent nothing loses it earlier. So silent clients cannot lock others out.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use adit_engine::Tick;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

/// Maximum number of such clients.
pub(super) const CLIENTS_MAX: usize = 64;
/// Time in ns that a client may take to send its line.
pub(super) const LINE_LIMIT_NS: u64 = 60_000_000_000;
/// Maximum length of a line with its end, as in the other VMMs.
pub(super) const LINE_MAX: usize = 32;

/// A client that has not sent its line yet.
pub(super) struct Client {
    pub(super) socket: UnixStream,
    line: Vec<u8>,
    since: Tick,
}

/// The result of reading from a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The line is not complete yet.
    Incomplete,
    /// The client wants this port of the guest.
    Port(u32),
    /// The client is gone, or sent something else.
    Invalid,
}

#[derive(Default)]
pub(super) struct Clients {
    slots: Vec<Option<Client>>,
}

impl Clients {
    /// Returns a free index. `None`: a client must be disconnected first.
    pub(super) fn free(&mut self) -> Option<usize> {
        let free = self.slots.iter().position(Option::is_none);
        if free.is_none() && self.slots.len() < CLIENTS_MAX {
            self.slots.push(None);
            return Some(self.slots.len() - 1);
        }
        free
    }

    /// Stores a client at a free index.
    pub(super) fn insert(&mut self, index: usize, socket: UnixStream, since: Tick) {
        let line = Vec::new();
        self.slots[index] = Some(Client {
            socket,
            line,
            since,
        });
    }

    pub(super) fn remove(&mut self, index: usize) -> Option<Client> {
        self.slots.get_mut(index)?.take()
    }

    /// The client to disconnect: the one that connected first among those that sent nothing, or among all.
    pub(super) fn oldest(&self) -> Option<usize> {
        let all = self.with_indices();
        let first = all.min_by_key(|(_, client)| (!client.line.is_empty(), client.since))?;
        Some(first.0)
    }

    /// The earliest time at which a client has taken too long.
    pub(super) fn deadline(&self) -> Option<Tick> {
        let since = self.with_indices().map(|(_, client)| client.since).min()?;
        Some(Tick(since.0.saturating_add(LINE_LIMIT_NS)))
    }

    /// A client that has taken too long.
    pub(super) fn late(&self, now: Tick) -> Option<usize> {
        let late = |c: &Client| now.0.saturating_sub(c.since.0) >= LINE_LIMIT_NS;
        let mut all = self.with_indices();
        all.find(|(_, client)| late(client)).map(|(index, _)| index)
    }

    fn with_indices(&self) -> impl Iterator<Item = (usize, &Client)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(index, client)| Some((index, client.as_ref()?)))
    }

    /// Reads a client's line and nothing after it, because the bytes after it belong to the guest.
    pub(super) fn read(&mut self, index: usize) -> Request {
        let Some(Some(client)) = self.slots.get_mut(index) else {
            return Request::Incomplete;
        };
        loop {
            let (mut bytes, room) = ([0; LINE_MAX], LINE_MAX - client.line.len());
            let there = match peek(&client.socket, &mut bytes[..room]) {
                Err(Errno::EAGAIN) => return Request::Incomplete,
                Err(Errno::EINTR) => continue,
                Ok(0) | Err(_) => return Request::Invalid,
                Ok(n) => &bytes[..n],
            };
            let end = there.iter().position(|&b| b == b'\n');
            let mut line = [0; LINE_MAX];
            let line = &mut line[..end.map_or(there.len(), |end| end + 1)];
            // The bytes are there, and nobody else reads this socket.
            if client.socket.read_exact(line).is_err() {
                return Request::Invalid;
            }
            client.line.extend_from_slice(line);
            if end.is_some() {
                return parse(&client.line).map_or_else(|| client.invalid(), Request::Port);
            }
            if client.line.len() >= LINE_MAX {
                return client.invalid();
            }
        }
    }
}

fn peek(socket: &UnixStream, into: &mut [u8]) -> nix::Result<usize> {
    recv(
        socket.as_raw_fd(),
        into,
        MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
    )
}

impl Client {
    fn invalid(&self) -> Request {
        let line = self.line.escape_ascii().to_string();
        tracing::info!(line, "a client is refused: it has to send `CONNECT PORT`");
        Request::Invalid
    }
}

/// What a client's bytes ask for.
#[cfg(feature = "test-util")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing yet.
    Nothing,
    /// A port. So many bytes were taken of its socket.
    Port {
        /// The port.
        port: u32,
        /// Bytes of the line.
        taken: usize,
    },
    /// Something else, so that it is disconnected.
    Invalid,
}

/// Has a client send these bytes in pieces of this length.
///
/// # Panics
/// There are no descriptors left.
#[cfg(feature = "test-util")]
pub fn asked(bytes: &[u8], piece: usize) -> Asked {
    use std::io::Write;
    const SOCKETS: &str = "a pair of sockets";
    let (ours, mut theirs) = UnixStream::pair().expect(SOCKETS);
    let mut clients = Clients::default();
    let index = clients.free().unwrap_or_default();
    ours.set_nonblocking(true).expect(SOCKETS);
    clients.insert(index, ours, Tick(0));
    let mut sent = 0;
    for piece in bytes.chunks(piece) {
        theirs.write_all(piece).expect(SOCKETS);
        sent += piece.len();
        match clients.read(index) {
            Request::Incomplete => {}
            Request::Invalid => return Asked::Invalid,
            Request::Port(port) => {
                let client = clients.remove(index);
                let socket = client.map(|client| client.socket);
                let left = socket.and_then(|socket| {
                    drop(theirs);
                    std::io::copy(&mut &socket, &mut std::io::sink()).ok()
                });
                let left = left.expect(SOCKETS) as usize;
                let taken = sent - left;
                return Asked::Port { port, taken };
            }
        }
    }
    Asked::Nothing
}

/// As tolerant as Firecracker and Cloud Hypervisor: any case, any blanks, anything after the port.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    let verb = words.next()?;
    let port = words.next()?;
    verb.eq_ignore_ascii_case("connect")
        .then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_that_other_vmms_accept_are_accepted() {
        for line in [
            "CONNECT 5000\n",
            "connect 5000\n",
            "Connect  5000 \r\n",
            " CONNECT\t5000\n",
            "CONNECT 5000 please\n",
            "CONNECT +5000\n",
        ] {
            assert_eq!(parse(line.as_bytes()), Some(5000), "{line:?}");
        }
        assert_eq!(parse(b"CONNECT 4294967295\n"), Some(u32::MAX));
        for line in [
            "CONNECT\n",
            "CONNECT 4294967296\n",
            "CONNECT -1\n",
            "CONNECT5000\n",
            "GET / HTTP/1.1\n",
            "\n",
            "5000\n",
        ] {
            assert_eq!(parse(line.as_bytes()), None, "{line:?}");
        }
    }

    fn client(clients: &mut Clients, since: u64) -> (usize, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let index = clients.free().unwrap();
        clients.insert(index, ours, Tick(since));
        (index, theirs)
    }

    #[test]
    fn a_line_may_come_in_pieces_and_bytes_after_it_stay_in_the_socket() {
        let mut clients = Clients::default();
        let (index, mut theirs) = client(&mut clients, 0);
        for byte in b"CONNECT 7" {
            theirs.write_all(&[*byte]).unwrap();
            assert_eq!(clients.read(index), Request::Incomplete);
        }
        theirs.write_all(b"\nrest").unwrap();
        assert_eq!(clients.read(index), Request::Port(7));
        let mut rest = [0; 4];
        let mut socket = clients.remove(index).unwrap().socket;
        socket.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"rest");
        // A line without an end is too long.
        let (index, mut theirs) = client(&mut clients, 0);
        theirs.write_all(&[b' '; LINE_MAX]).unwrap();
        assert_eq!(clients.read(index), Request::Invalid);
    }

    #[test]
    fn r118_indices_are_reused_and_silent_clients_are_disconnected_first() {
        let mut clients = Clients::default();
        let mut theirs: Vec<_> = (0..CLIENTS_MAX as u64)
            .map(|since| client(&mut clients, since).1)
            .collect();
        assert_eq!(clients.free(), None);
        // The first two have started to send.
        for index in [0, 1] {
            theirs[index].write_all(b"CONN").unwrap();
            assert_eq!(clients.read(index), Request::Incomplete);
        }
        assert_eq!(clients.oldest(), Some(2));
        clients.remove(2).unwrap();
        for since in 100..10_000 {
            let (index, _theirs) = client(&mut clients, since);
            assert_eq!(index, 2);
            clients.remove(index).unwrap();
        }
        for index in 2..CLIENTS_MAX {
            clients.remove(index);
        }
        assert_eq!(
            clients.oldest(),
            Some(0),
            "a client that has started goes last"
        );
    }

    #[test]
    fn a_silent_client_has_a_deadline() {
        let mut clients = Clients::default();
        assert_eq!(clients.deadline(), None);
        let (second, _b) = client(&mut clients, 9);
        let (first, _a) = client(&mut clients, 5);
        let deadline = clients.deadline().unwrap();
        assert_eq!(deadline, Tick(5 + LINE_LIMIT_NS));
        assert_eq!(clients.late(Tick(deadline.0 - 1)), None);
        assert_eq!(clients.late(deadline), Some(first));
        clients.remove(first);
        assert_eq!(clients.late(deadline), None);
        assert_eq!(clients.late(Tick(deadline.0 + 4)), Some(second));
    }
}
