//! The stream of a session's client.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use adit_exec::seal::{Keys, Sealed};
use adit_exec::{Decoder, Refused, Session, ToClient, ToGuest};
use nix::poll::{PollFd, PollFlags, poll};

use crate::conn::Conn;

/// Bytes that are read, and gathered to be written, at once.
const PIECE: usize = 64 << 10;

/// The stream. Its client may be hostile: what is kept of it is one frame each way, and a piece.
pub(super) struct Link {
    conn: Conn,
    sealed: Option<Sealed>,
    decoder: Decoder,
    out: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Link {
    /// `keys`: what it is sealed with.
    pub(super) fn new(fd: OwnedFd, keys: Option<Keys>) -> io::Result<Self> {
        let conn = Conn::from(fd);
        conn.set_nonblocking()?;
        Ok(Self {
            conn,
            sealed: keys.map(Sealed::new),
            decoder: Decoder::default(),
            out: Vec::new(),
            at: 0,
            ended: false,
        })
    }

    /// Whether nobody between here and the client can have said what comes.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.is_some()
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
        let n = match (&self.conn).read(&mut piece) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let forged = self.unseal(&piece[..n]);
        let invalid = |e| io::Error::new(ErrorKind::InvalidData, e);
        while let Some(message) = self.decoder.poll_frame().map_err(invalid)? {
            messages.push(message);
        }
        // What came before it is the client's.
        forged.map(Some)
    }

    fn unseal(&mut self, piece: &[u8]) -> io::Result<()> {
        let Some(sealed) = &mut self.sealed else {
            self.decoder.push(piece);
            return Ok(());
        };
        let mut plain = Vec::new();
        sealed.push(piece);
        let opened = sealed.open(&mut plain);
        self.decoder.push(&plain);
        opened.map_err(|e| io::Error::new(ErrorKind::InvalidData, e))
    }

    /// Has bytes wait until they are written.
    fn owe(&mut self, frames: Vec<u8>) -> io::Result<()> {
        match &mut self.sealed {
            // Most often nothing waits, and then nothing is copied.
            None if self.out.is_empty() => self.out = frames,
            None => self.out.extend(frames),
            Some(sealed) => sealed
                .seal(&frames, &mut self.out)
                .map_err(io::Error::other)?,
        }
        Ok(())
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
                // Its room is used again.
                let mut frames = match self.sealed {
                    None => std::mem::take(&mut self.out),
                    Some(_) => Vec::new(),
                };
                while frames.len() < PIECE
                    && let Some(frame) = session.poll_send()
                {
                    frames.extend(frame);
                }
                self.owe(frames)?;
                if session.is_over()
                    && let Some(sealed) = &mut self.sealed
                {
                    sealed.seal_end(&mut self.out).map_err(io::Error::other)?;
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
    pub(super) fn refuse(mut self, refused: Refused) {
        if !self.owes() {
            let last = self.last(refused);
            let _ = (&self.conn).write(&last);
            let _ = self.conn.shutdown_write();
        }
    }

    fn last(&mut self, refused: Refused) -> Vec<u8> {
        self.out.clear();
        let frame = ToClient::Refused(refused).encode();
        let ended = self.owe(frame).map(|()| {
            if let Some(sealed) = &mut self.sealed {
                let _ = sealed.seal_end(&mut self.out);
            }
        });
        // Numbers that are used up: then it is cut off.
        ended.map_or_else(|_| Vec::new(), |()| std::mem::take(&mut self.out))
    }
}

impl Link {
    /// The same, and has it read: some carriers forget what was said when a stream is closed on bytes that nobody has read.
    pub(super) fn refuse_and_wait(mut self, refused: Refused, limit: Duration) {
        let until = Instant::now() + limit;
        let last = self.last(refused);
        if (&self.conn).write(&last).is_err() {
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
