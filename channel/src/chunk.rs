//! Chunks: how a stream's bytes and its ends travel where the carrier does not keep half-closes (a VMM that takes the end of one
//! direction for a close of both). Without IO, as a writer's half and a reader's half.
//!
//! ```text
//! hello: open with CHUNKS ─► accept with CHUNKS, then in each direction:
//!
//!   chunk ─► chunk ─► … ─► end       this direction is finished; the other goes on
//!                     └──► abort     both are broken off. So they are where the bytes stop without one of the two
//! ```
//!
//! | off | size | field |
//! |---|---|---|
//! | 0 | 1 | kind: 1 chunk, 2 end, 3 abort |
//! | 1 | 3 | bytes that follow, little-endian: 1 to [`CHUNK_MAX`] of a chunk, 0 of the others |
//!
//! Rules: behind an end there may be an abort, and nothing else; behind an abort there is nothing. Whatever else comes is a
//! [`ChunkError`], which ends that stream. The bytes before it are the stream's. A reader keeps four bytes, and no payload.
//!
//! In hellos the bit is [`CHUNKS`](crate::hello::CHUNKS). It is offered where the carrier needs it, so an agent that does not know
//! it is served as before.

#[cfg(test)]
mod tests;

/// Bytes before a chunk's own.
pub const HEAD_LEN: usize = 4;
/// Most bytes of a chunk.
pub const CHUNK_MAX: usize = 64 << 10;

const CHUNK: u8 = 1;
const END: u8 = 2;
const ABORT: u8 = 3;

/// Why bytes are none of this protocol. Always the peer's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// A kind that does not exist.
    #[error("a chunk's kind is {kind}, and only {CHUNK} to {ABORT} exist")]
    Kind {
        /// What it says.
        kind: u8,
    },
    /// A length that its kind cannot have.
    #[error(
        "a chunk of kind {kind} has {len} bytes; kind {CHUNK} has 1 to {CHUNK_MAX}, the others none"
    )]
    Length {
        /// Its kind.
        kind: u8,
        /// What it says.
        len: u32,
    },
    /// Something behind the end.
    #[error("a chunk of kind {kind} came behind the last one")]
    Behind {
        /// Its kind.
        kind: u8,
    },
    /// The bytes stopped without an end.
    #[error("the stream stopped without an end")]
    Cut,
}

/// How a direction stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It is finished.
    End,
    /// Both directions are broken off.
    Abort,
}

fn head(kind: u8, len: usize) -> [u8; HEAD_LEN] {
    // At most `CHUNK_MAX`, which has 17 bits.
    let [a, b, c, _] = (len as u32).to_le_bytes();
    [kind, a, b, c]
}

/// The writer's half: says which bytes go out next.
///
/// [`next`](Self::next), write some of that, [`sent`](Self::sent), and again.
#[derive(Debug)]
pub struct Writer {
    head: [u8; HEAD_LEN],
    /// Bytes of the head that were sent.
    head_sent: usize,
    /// Bytes of the chunk that were not sent.
    left: usize,
}

impl Default for Writer {
    fn default() -> Self {
        Self {
            head: [0; HEAD_LEN],
            head_sent: HEAD_LEN,
            left: 0,
        }
    }
}

impl Writer {
    /// What goes out next, while `available` bytes of payload wait: the rest of a head, and behind it so many bytes of the payload.
    /// Payload that was available once must be there until it is sent.
    #[must_use]
    pub fn next(&mut self, available: usize) -> (&[u8], usize) {
        if self.is_between() && available > 0 {
            self.left = available.min(CHUNK_MAX);
            (self.head, self.head_sent) = (head(CHUNK, self.left), 0);
        }
        (&self.head[self.head_sent..], self.left.min(available))
    }

    /// So many bytes of it were written. Returns how many of them were payload.
    pub fn sent(&mut self, bytes: usize) -> usize {
        let of_head = bytes.min(HEAD_LEN - self.head_sent);
        self.head_sent += of_head;
        let payload = (bytes - of_head).min(self.left);
        self.left -= payload;
        payload
    }

    /// Has the direction stop: the next bytes are that. Returns false in the middle of a chunk, behind which it has to wait.
    #[must_use]
    pub fn stop(&mut self, stop: Stop) -> bool {
        let is_between = self.is_between();
        if is_between {
            let kind = match stop {
                Stop::End => END,
                Stop::Abort => ABORT,
            };
            (self.head, self.head_sent) = (head(kind, 0), 0);
        }
        is_between
    }

    /// Returns true if a head was begun and not sent.
    pub fn owes_head(&self) -> bool {
        self.head_sent < HEAD_LEN
    }

    /// Returns true if nothing of what was begun is left to be sent.
    pub fn is_between(&self) -> bool {
        !self.owes_head() && self.left == 0
    }
}

/// What the first of some bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of a head.
    Head,
    /// Payload.
    Payload,
    /// The last bytes of what says how the direction stops.
    Stop(Stop),
}

/// Bytes that are read with one call, and the head among them apart from the payload before and behind it.
///
/// [`parts`](Self::parts), read into them, [`came`](Self::came), [`Reader::unwrap_apart`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Apart {
    head: [u8; HEAD_LEN],
    /// Bytes of the present chunk, of the head behind it, and behind that.
    rest: usize,
    of_head: usize,
    behind: usize,
}

impl Apart {
    /// Where to read to, in this order. `only_head`: nothing behind the head.
    pub fn parts<'a>(
        &'a mut self,
        reader: &Reader,
        bytes: &'a mut [u8],
        only_head: bool,
    ) -> [&'a mut [u8]; 3] {
        let (rest, behind) = bytes.split_at_mut(reader.left().min(bytes.len()));
        // With a chunk that does not fit, its head is not next.
        let of_head = match rest.len() < reader.left() {
            true => 0,
            false => reader.head_left(),
        };
        (self.rest, self.of_head) = (rest.len(), of_head);
        self.behind = if only_head { 0 } else { behind.len() };
        [rest, &mut self.head[..of_head], &mut behind[..self.behind]]
    }

    /// Whether anything was read this way.
    pub fn is_any(&self) -> bool {
        self.rest + self.of_head + self.behind > 0
    }

    /// So many bytes were read.
    pub fn came(&mut self, bytes: usize) {
        self.rest = self.rest.min(bytes);
        self.of_head = self.of_head.min(bytes - self.rest);
        self.behind = self.behind.min(bytes - self.rest - self.of_head);
    }
}

/// The reader's half.
#[derive(Debug, Default)]
pub struct Reader {
    head: [u8; HEAD_LEN],
    /// Bytes of the head that are here.
    have: usize,
    /// Bytes of the chunk that are still to come.
    left: usize,
    stopped: Option<Stop>,
}

impl Reader {
    /// Bytes of the present chunk that are still to come.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Bytes of the next head that are still to come.
    pub fn head_left(&self) -> usize {
        HEAD_LEN - self.have
    }

    /// How the direction has stopped.
    pub fn stopped(&self) -> Option<Stop> {
        self.stopped
    }

    /// So many bytes of the present chunk went another way, and never more than are [left](Self::left).
    pub fn passed(&mut self, bytes: usize) {
        self.left -= bytes.min(self.left);
    }

    /// Takes the first of some bytes, at least one if there is one. Returns how many, and what they are.
    ///
    /// # Errors
    /// They are none of this protocol. Nothing may be taken afterwards.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(usize, Piece), ChunkError> {
        if self.left > 0 {
            let n = self.left.min(bytes.len());
            self.left -= n;
            return Ok((n, Piece::Payload));
        }
        let n = bytes.len().min(HEAD_LEN - self.have);
        self.head[self.have..self.have + n].copy_from_slice(&bytes[..n]);
        self.have += n;
        if self.have < HEAD_LEN {
            return Ok((n, Piece::Head));
        }
        self.have = 0;
        let [kind, a, b, c] = self.head;
        let len = u32::from_le_bytes([a, b, c, 0]);
        let stop = match kind {
            CHUNK => None,
            END => Some(Stop::End),
            ABORT => Some(Stop::Abort),
            kind => return Err(ChunkError::Kind { kind }),
        };
        let is_length = match stop {
            None => (1..=CHUNK_MAX as u32).contains(&len),
            Some(_) => len == 0,
        };
        if !is_length {
            return Err(ChunkError::Length { kind, len });
        }
        match (self.stopped, stop) {
            (None, _) | (Some(Stop::End), Some(Stop::Abort)) => {}
            (Some(_), _) => return Err(ChunkError::Behind { kind }),
        }
        self.stopped = stop;
        match stop {
            None => {
                self.left = len as usize;
                Ok((n, Piece::Head))
            }
            Some(stop) => Ok((n, Piece::Stop(stop))),
        }
    }

    /// Leaves nothing but the payload of these bytes, at their beginning. Returns its length; how it goes on is
    /// [`stopped`](Self::stopped).
    ///
    /// # Errors
    /// What is behind that payload is none of this protocol.
    pub fn unwrap(&mut self, bytes: &mut [u8]) -> (usize, Result<(), ChunkError>) {
        let (mut at, mut payload) = (0, 0);
        while at < bytes.len() {
            match self.take(&bytes[at..]) {
                Ok((n, Piece::Payload)) => {
                    if at != payload {
                        bytes.copy_within(at..at + n, payload);
                    }
                    (at, payload) = (at + n, payload + n);
                }
                Ok((n, Piece::Head | Piece::Stop(_))) => at += n,
                Err(e) => return (payload, Err(e)),
            }
        }
        (payload, Ok(()))
    }

    /// As [`unwrap`](Self::unwrap), of bytes that were read in [`Apart`]s: the payload is where it belongs, and nothing is moved as long as
    /// no second head came along.
    ///
    /// # Errors
    /// As above.
    pub fn unwrap_apart(
        &mut self,
        apart: &Apart,
        bytes: &mut [u8],
    ) -> (usize, Result<(), ChunkError>) {
        self.passed(apart.rest);
        let mut at = 0;
        while at < apart.of_head {
            match self.take(&apart.head[at..apart.of_head]) {
                Ok((n, _)) => at += n,
                Err(e) => return (apart.rest, Err(e)),
            }
        }
        let (n, outcome) = self.unwrap(&mut bytes[apart.rest..apart.rest + apart.behind]);
        (apart.rest + n, outcome)
    }

    /// The bytes have stopped.
    ///
    /// # Errors
    /// They did so without an end.
    pub fn end(&self) -> Result<(), ChunkError> {
        match self.stopped {
            Some(Stop::End) if self.have == 0 => Ok(()),
            _ => Err(ChunkError::Cut),
        }
    }
}
