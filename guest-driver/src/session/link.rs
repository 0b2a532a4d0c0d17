//! The stream of a session's client.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use adit_exec::{Decoder, Refused, Session, ToClient, ToGuest};
use nix::poll::{PollFd, PollFlags, poll};

use crate::conn::Conn;

/// Bytes that are read, and gathered to be written, at once.
const PIECE: usize = 64 << 10;

/// The stream. Its client may be hostile: what is kept of it is one frame each way, and a piece.
pub(super) struct Link {
    conn: Conn,
    decoder: Decoder,
    out: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Link {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let conn = Conn::from(fd);
        conn.set_nonblocking()?;
        Ok(Self {
            conn,
            decoder: Decoder::default(),
            out: Vec::new(),
            at: 0,
            ended: false,
        })
    }

    /// Whether something waits until the client takes it.
    pub(super) fn owes(&self) -> bool {
        self.at < self.out.len()
    }

    /// Reads once, and appends what the client says. None: there is nothing now.
    ///
    /// # Errors
    /// It has gone, or says what is none of the protocol.
    pub(super) fn read(&mut self, messages: &mut Vec<ToGuest>) -> io::Result<Option<()>> {
        let mut piece = [0; PIECE / 4];
        match (&self.conn).read(&mut piece) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.decoder.push(&piece[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
        let invalid = |e| io::Error::new(ErrorKind::InvalidData, e);
        while let Some(message) = self.decoder.poll_frame().map_err(invalid)? {
            messages.push(message);
        }
        Ok(Some(()))
    }

    /// Writes what the session has for the client, as far as that goes now. Returns whether anything was written.
    ///
    /// # Errors
    /// The client has gone.
    pub(super) fn write(&mut self, session: &mut Session) -> io::Result<bool> {
        let mut progress = false;
        loop {
            if !self.owes() {
                self.out.clear();
                self.at = 0;
                while self.out.len() < PIECE
                    && let Some(frame) = session.poll_send()
                {
                    self.out.extend(frame);
                }
                if self.out.is_empty() {
                    return Ok(progress);
                }
            }
            match (&self.conn).write(&self.out[self.at..]) {
                Ok(n) => {
                    self.at += n;
                    progress = true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(progress),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Says that nothing comes any more, once.
    pub(super) fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            let _ = self.conn.shutdown_write();
        }
    }

    /// Says why it is cut off, if there is room for that.
    pub(super) fn refuse(self, refused: Refused) {
        if !self.owes() {
            let _ = (&self.conn).write(&ToClient::Refused(refused).encode());
            let _ = self.conn.shutdown_write();
        }
    }
}

impl Link {
    /// The same, and has it read: some carriers forget what was said when a stream is closed on bytes that nobody has read.
    pub(super) fn refuse_and_wait(self, refused: Refused, limit: Duration) {
        let until = Instant::now() + limit;
        if (&self.conn)
            .write(&ToClient::Refused(refused).encode())
            .is_err()
        {
            return;
        }
        let _ = self.conn.shutdown_write();
        let mut rest = [0; 1024];
        loop {
            match (&self.conn).read(&mut rest) {
                Ok(n) if n > 0 => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let left = until.saturating_duration_since(Instant::now());
                    let left = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
                    let mut fds = [PollFd::new(self.conn.as_fd(), PollFlags::POLLIN)];
                    if left == 0 || !poll(&mut fds, left).is_ok_and(|n| n > 0) {
                        return;
                    }
                }
                _ => return,
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.conn.as_fd()
    }
}
