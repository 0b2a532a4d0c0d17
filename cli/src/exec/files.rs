//! Standard input and output, on threads of their own.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;

use adit_exec::{DATA_MAX, Out};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::output;

/// Standard input, piece by piece; it is read only as far as it is asked for.
pub(super) struct Input {
    wanted: Sender<usize>,
    pieces: Receiver<io::Result<Vec<u8>>>,
    asked: bool,
}

impl Input {
    /// Begins to read, once something is asked for.
    pub(super) fn start() -> io::Result<Self> {
        let mut file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let (wanted, mut asks) = channel::<usize>(1);
        let (give, pieces) = channel(1);
        std::thread::spawn(move || {
            while let Some(room) = asks.blocking_recv() {
                let mut piece = vec![0; room.min(DATA_MAX)];
                let read = loop {
                    match file.read(&mut piece) {
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        read => break read,
                    }
                };
                let read = read.map(|n| {
                    piece.truncate(n);
                    piece
                });
                let is_last = !matches!(&read, Ok(piece) if !piece.is_empty());
                if give.blocking_send(read).is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Self {
            wanted,
            pieces,
            asked: false,
        })
    }

    /// The next piece, of at most so many bytes; an empty one is the end. May be dropped while it waits.
    pub(super) async fn next(&mut self, room: usize) -> io::Result<Vec<u8>> {
        if !self.asked {
            // One is asked for at a time, so there is room.
            let _ = self.wanted.try_send(room);
            self.asked = true;
        }
        let piece = self.pieces.recv().await;
        self.asked = false;
        piece.unwrap_or_else(|| Ok(Vec::new()))
    }
}

type Pieces = Vec<(Out, Vec<u8>)>;

/// Standard output and standard error.
pub(super) struct Output {
    pieces: Sender<Pieces>,
    written: Receiver<io::Result<()>>,
}

impl Output {
    /// `raw`: what a terminal gets is what the command wrote to its own.
    pub(super) fn start(raw: bool) -> Self {
        let (pieces, mut take) = channel::<Pieces>(1);
        let (tell, written) = channel(1);
        std::thread::spawn(move || {
            let mut ends = [End::new(Out::Stdout, raw), End::new(Out::Stderr, raw)];
            while let Some(pieces) = take.blocking_recv() {
                let wrote = pieces.iter().try_for_each(|(out, bytes)| match out {
                    Out::Stdout => ends[0].write(bytes),
                    Out::Stderr => ends[1].write(bytes),
                });
                if tell.blocking_send(wrote).is_err() {
                    return;
                }
            }
        });
        Self { pieces, written }
    }

    /// Gives it pieces. They are written when [`written`](Self::written) says so, and no others may be given before.
    pub(super) fn give(&self, pieces: Pieces) {
        let _ = self.pieces.try_send(pieces);
    }

    /// Waits until what was given is written. May be dropped while it waits.
    pub(super) async fn written(&mut self) -> io::Result<()> {
        let wrote = self.written.recv().await;
        wrote.unwrap_or_else(|| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

/// One of the two. What goes to a terminal is escaped, as everything that a guest has written (R123).
struct End {
    out: Out,
    escapes: bool,
    /// Bytes of a character that is not whole.
    rest: Vec<u8>,
}

impl End {
    fn new(out: Out, raw: bool) -> Self {
        let is_terminal = match out {
            Out::Stdout => io::stdout().is_terminal(),
            Out::Stderr => io::stderr().is_terminal(),
        };
        Self {
            out,
            escapes: is_terminal && !raw,
            rest: Vec::new(),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !self.escapes {
            return self.put(bytes);
        }
        self.rest.extend_from_slice(bytes);
        let whole = whole(&self.rest);
        let text = output::for_terminal(&self.rest[..whole]);
        self.rest.drain(..whole);
        self.put(text.as_bytes())
    }

    fn put(&self, bytes: &[u8]) -> io::Result<()> {
        match self.out {
            Out::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            Out::Stderr => io::stderr().lock().write_all(bytes),
        }
    }
}

/// How many of the bytes are whole characters, or none of any.
fn whole(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let at = bytes.len() - back;
        let len = match bytes[at] {
            b if b >= 0xf0 => 4,
            b if b >= 0xe0 => 3,
            b if b >= 0xc0 => 2,
            b if b >= 0x80 => continue,
            _ => return bytes.len(),
        };
        return if len > back { at } else { bytes.len() };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_in_two_pieces_is_one() {
        for (bytes, len) in [
            (&b"ab"[..], 2),
            (b"a\xc3", 1),
            (b"a\xc3\xbc", 3),
            (b"\xe2\x82", 0),
            (b"\xe2\x82\xac", 3),
            (b"\xf0\x9f\x98", 0),
            // None of any character.
            (b"\x80\x80\x80\x80", 4),
            (b"", 0),
        ] {
            assert_eq!(whole(bytes), len, "{bytes:x?}");
        }
    }
}
