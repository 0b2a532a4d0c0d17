//! What is said on a stream of the service `exec`, once its hello is accepted.
//!
//! ```text
//! run:     Open ─────────► ◄ Started · Output* · Taken* · InputClosed? · Exit      Stdin* · StdinEnd? · Signal* · Resize* · Ack* ►
//! attach:  Attach ───────► ◄ the same, from the offsets that were asked for
//! list:                    ◄ Rows
//! end:                     ◄ Done
//! any:                     ◄ Refused, and the stream ends
//! by a ticket, to run:     Ticket · Stdin* · StdinEnd? ─► as run; but of the client nothing is taken any more except Ack
//! by a ticket, any:        Seal ─► ◄ Sealed; from there on records (`seal`), and in them Ticket, and then all of the above
//! ```
//! Message frames ([`adit_channel::frame`]), (kind, version 1):
//!
//! | kind | from | body |
//! |---|---|---|
//! | 1 | client | postcard of [`Open`] |
//! | 2 | client | postcard of [`Attach`] |
//! | 3 | client | input: offset u64 little-endian, 1 to [`DATA_MAX`] bytes |
//! | 4 | client | the end of the input: postcard of its length, u64 |
//! | 5 | client | a signal: postcard of its number, u8 |
//! | 6 | client | postcard of [`Size`] |
//! | 7 | client | what has arrived: postcard of the offsets of both outputs |
//! | 8 | client | a ticket: its envelope |
//! | 9 | client | the first message of a handshake |
//! | 32 | guest | postcard of [`Started`] |
//! | 33, 34 | guest | output, error output: as 3 |
//! | 35 | guest | the command has taken the input as far as that: postcard of an offset, u64 |
//! | 36 | guest | the command reads no more input: no body |
//! | 37 | guest | postcard of [`Exit`] |
//! | 38 | guest | postcard of [`Refused`] |
//! | 39 | guest | postcard of up to [`ROWS_MAX`] [`Row`]s |
//! | 40 | guest | it is done: no body |
//! | 41 | guest | the second message of a handshake |

use std::collections::BTreeSet;

use adit_channel::frame::{self, FrameError, HEADER_LEN, Header};
use serde::{Deserialize, Serialize};

/// Most elements of a command.
pub const ARGV_MAX: usize = 4096;
/// Most bytes of a command's elements and environment together.
pub const ARGV_BYTES_MAX: usize = 128 << 10;
/// Most variables that a client sets.
pub const ENV_MAX: usize = 256;
/// Most bytes of input or output in a frame.
pub const DATA_MAX: usize = 32 << 10;
/// Most sessions in a list.
pub const ROWS_MAX: usize = 256;
/// Most bytes of a text for people.
pub const TEXT_MAX: usize = 512;
/// Most bytes of a working directory.
const CWD_MAX: usize = 4096;
/// Most bytes of a session's id.
const ID_MAX: usize = 32;
/// Most bytes of a message of a handshake.
const HANDSHAKE_MAX: usize = 256;
/// Most bytes of a frame's body.
pub const FRAME_MAX: u32 = 192 << 10;
const VERSION: u16 = 1;
const OFFSET_LEN: usize = 8;

/// Reasons of [`Refused`], for programs.
pub mod refusal {
    /// The guest's policy does not allow it.
    pub const DENIED: u16 = 1;
    /// The guest does not know the user.
    pub const NO_USER: u16 = 2;
    /// No session has this id, or none of this user.
    pub const NO_SESSION: u16 = 3;
    /// There are as many sessions as there may be.
    pub const BUSY: u16 = 4;
    /// What was asked for makes no sense.
    pub const MALFORMED: u16 = 5;
    /// The guest itself failed.
    pub const FAILED: u16 = 6;
    /// What is asked for is no longer kept.
    pub const GONE: u16 = 7;
    /// Somebody else has attached to the session.
    pub const TAKEN_OVER: u16 = 8;
    /// No such program.
    pub const NO_PROGRAM: u16 = 9;
    /// The program, or its working directory, cannot be used.
    pub const CANNOT_RUN: u16 = 10;
    /// There is no stream to the guest: the host says so.
    pub const UNREACHABLE: u16 = 11;
    /// The ticket is none that this guest believes, or not for what was asked for.
    pub const TICKET: u16 = 12;
    /// The ticket's time is over, or has not come.
    pub const TICKET_TIME: u16 = 13;
    /// The ticket was used, or may have been.
    pub const TICKET_SPENT: u16 = 14;
    /// What is asked for needs a sealed stream.
    pub const NEEDS_SEAL: u16 = 15;
    /// The input is not what the ticket says.
    pub const TICKET_INPUT: u16 = 16;
    /// It needs a ticket.
    pub const NEEDS_TICKET: u16 = 17;
    /// The stream is not sealed to this guest's key.
    pub const SEAL: u16 = 18;
}

/// A command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Program and arguments, element by element: no shell reads them. None for the user's login shell.
    pub argv: Vec<Vec<u8>>,
    /// Variables beside those that every session has.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory, absolute; empty: the user's home.
    pub cwd: Vec<u8>,
    /// Its terminal; none: it has pipes.
    pub tty: Option<Size>,
    /// The client has input for it; else it reads nothing.
    pub stdin: bool,
    /// It is ended after so long; 0: never.
    pub timeout_ms: u64,
    /// It goes on without a client, and clients may come and go.
    pub detach: bool,
}

/// Size of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub cols: u16,
}

/// A client comes to a session that goes on without one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// It has the output as far as that; none: it wants all that is kept.
    pub stdout: Option<u64>,
    /// The same of the error output.
    pub stderr: Option<u64>,
    /// Size of its terminal.
    pub size: Option<Size>,
}

/// The command runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// By which the session is found again.
    pub id: String,
    /// It goes on without a client, and wants to hear what has arrived.
    pub kept: bool,
    /// It takes input.
    pub input: bool,
    /// It has a terminal.
    pub tty: bool,
    /// Where the client's input begins.
    pub stdin: u64,
    /// The command has taken the input as far as that.
    pub taken: u64,
    /// Where the output begins that follows.
    pub stdout: u64,
    /// The same of the error output.
    pub stderr: u64,
}

/// How a command ended. The number is wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum How {
    /// By itself, with this status.
    Code = 1,
    /// By this signal.
    Signal = 2,
    /// It was ended because its time was over.
    TimedOut = 3,
    /// It was ended because somebody asked for that.
    Ended = 4,
    /// Nobody knows.
    Lost = 5,
}

impl How {
    /// What a number means; none: nothing in this version.
    pub fn of(number: u8) -> Option<Self> {
        let all = [
            Self::Code,
            Self::Signal,
            Self::TimedOut,
            Self::Ended,
            Self::Lost,
        ];
        all.into_iter().find(|how| *how as u8 == number)
    }
}

/// The end of a command, and of all that it has written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// [`How`].
    pub how: u8,
    /// The status or the signal.
    pub value: i32,
    /// What else is to be said, for people.
    pub text: String,
    /// Bytes of the whole output.
    pub stdout: u64,
    /// Bytes of the whole error output.
    pub stderr: u64,
}

/// It is not done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Of [`refusal`].
    pub reason: u16,
    /// Why, for people.
    pub text: String,
}

/// A session in a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its id.
    pub id: String,
    /// As whom.
    pub user: String,
    /// The program.
    pub program: String,
    /// Unix time, ms.
    pub started_ms: i64,
    /// Bytes that it has written: output, error output.
    pub written: [u64; 2],
    /// It goes on without a client.
    pub kept: bool,
    /// It has a client now.
    pub attached: bool,
    /// How it ended, [`How`] and its value; none: it runs.
    pub ended: Option<(u8, i32)>,
}

/// Which output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// The output; of a terminal, all of it.
    Stdout,
    /// The error output.
    Stderr,
}

/// From the client.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ToGuest {
    Open(Open),
    Attach(Attach),
    Stdin { offset: u64, bytes: Vec<u8> },
    StdinEnd { offset: u64 },
    Signal(u8),
    Resize(Size),
    Ack { stdout: u64, stderr: u64 },
    Ticket(Vec<u8>),
    Seal(Vec<u8>),
}

/// From the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ToClient {
    Started(Started),
    Output {
        out: Out,
        offset: u64,
        bytes: Vec<u8>,
    },
    Taken {
        stdin: u64,
    },
    StdinClosed,
    Exit(Exit),
    Refused(Refused),
    Rows(Vec<Row>),
    Done,
    Sealed(Vec<u8>),
}

/// Why bytes are not of this protocol. Always the peer's fault.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Not a frame, or not its struct.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Input or output of a size that a frame cannot have.
    #[error("a frame of kind {kind} has {len} bytes of data; it has 1 to {DATA_MAX}")]
    Data {
        /// Its kind.
        kind: u16,
        /// How many.
        len: usize,
    },
    /// A text or a list is too long.
    #[error("a frame of kind {kind} has more than it may")]
    TooMuch {
        /// Its kind.
        kind: u16,
    },
}

/// Why a command makes no sense. The client's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No program.
    #[error("it has no program")]
    NoProgram,
    /// Too much of something.
    #[error(
        "it has at most {ARGV_MAX} elements, {ENV_MAX} variables and {ARGV_BYTES_MAX} bytes of both"
    )]
    TooMuch,
    /// A zero byte.
    #[error("an element or a variable has a zero byte")]
    Nul,
    /// A variable's name.
    #[error("a variable's name is empty, is there twice or has a `=`")]
    EnvName,
    /// The directory.
    #[error("a working directory is absolute, with at most {CWD_MAX} bytes")]
    Cwd,
}

impl Open {
    /// Checks what the types do not say.
    ///
    /// # Errors
    /// It cannot be a command.
    pub fn check(&self) -> Result<(), OpenError> {
        match self.argv.first().is_none_or(Vec::is_empty) {
            true => Err(OpenError::NoProgram),
            false => self.check_shell(),
        }
    }

    /// The same of a login shell, which has no elements of the client's.
    ///
    /// # Errors
    /// It cannot be one.
    pub fn check_shell(&self) -> Result<(), OpenError> {
        let of_env = self.env.iter().flat_map(|(name, value)| [name, value]);
        let texts = self.argv.iter().chain(of_env);
        let bytes: usize = texts.clone().map(|text| text.len() + 1).sum();
        if self.argv.len() > ARGV_MAX || self.env.len() > ENV_MAX || bytes > ARGV_BYTES_MAX {
            return Err(OpenError::TooMuch);
        }
        if texts.clone().chain([&self.cwd]).any(|t| t.contains(&0)) {
            return Err(OpenError::Nul);
        }
        let mut names = BTreeSet::new();
        let is_name = |name: &Vec<u8>| {
            !name.is_empty() && !name.contains(&b'=') && names.insert(name.clone())
        };
        if !self.env.iter().map(|(name, _)| name).all(is_name) {
            return Err(OpenError::EnvName);
        }
        let is_cwd = self.cwd.is_empty() || self.cwd.starts_with(b"/");
        (is_cwd && self.cwd.len() <= CWD_MAX)
            .then_some(())
            .ok_or(OpenError::Cwd)
    }
}

/// A frame whose body is these bytes.
fn plain(kind: u16, bytes: &[u8]) -> Vec<u8> {
    let mut out = framed(kind, &());
    out.reserve_exact(OFFSET_LEN + bytes.len());
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&len.to_le_bytes());
    out.extend(bytes);
    out
}

fn framed(kind: u16, body: &impl Serialize) -> Vec<u8> {
    // Plain values do serialise, and the senders keep to the limits; what is too long for a frame is nobody's to read.
    frame::encode(kind, VERSION, 0, 0, body).unwrap_or_default()
}

pub(crate) fn data(kind: u16, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut out = framed(kind, &());
    let len = u32::try_from(OFFSET_LEN + bytes.len()).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&len.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out.extend(bytes);
    out
}

pub(crate) fn kind_of(out: Out) -> u16 {
    match out {
        Out::Stdout => 33,
        Out::Stderr => 34,
    }
}

impl ToGuest {
    /// As a frame.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Open(open) => framed(1, open),
            Self::Attach(attach) => framed(2, attach),
            Self::Stdin { offset, bytes } => data(3, *offset, bytes),
            Self::StdinEnd { offset } => framed(4, offset),
            Self::Signal(number) => framed(5, number),
            Self::Resize(size) => framed(6, size),
            Self::Ack { stdout, stderr } => framed(7, &(stdout, stderr)),
            Self::Ticket(envelope) => plain(8, envelope),
            Self::Seal(message) => plain(9, message),
        }
    }
}

impl ToClient {
    /// As a frame.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Started(started) => framed(32, started),
            Self::Output { out, offset, bytes } => data(kind_of(*out), *offset, bytes),
            Self::Taken { stdin } => framed(35, stdin),
            Self::StdinClosed => framed(36, &()),
            Self::Exit(exit) => framed(37, exit),
            Self::Refused(refused) => framed(38, refused),
            Self::Rows(rows) => framed(39, rows),
            Self::Done => framed(40, &()),
            Self::Sealed(message) => plain(41, message),
        }
    }
}

fn of_data(header: &Header, body: &[u8]) -> Result<(u64, Vec<u8>), WireError> {
    let (kind, len) = (header.kind, body.len());
    match body.split_first_chunk::<OFFSET_LEN>() {
        Some((offset, bytes)) if !bytes.is_empty() && bytes.len() <= DATA_MAX => {
            Ok((u64::from_le_bytes(*offset), bytes.to_vec()))
        }
        _ => Err(WireError::Data {
            kind,
            len: len.saturating_sub(OFFSET_LEN),
        }),
    }
}

/// What one side may say.
pub trait Message: Sized {
    /// Reads a body.
    ///
    /// # Errors
    /// It is not of this side, or not well formed.
    fn read(header: &Header, body: &[u8]) -> Result<Self, WireError>;
}

fn unknown(header: &Header) -> WireError {
    let (kind, version) = (header.kind, header.version);
    FrameError::Unknown { kind, version }.into()
}

fn bounded<T>(header: &Header, is_bounded: bool, value: T) -> Result<T, WireError> {
    let kind = header.kind;
    is_bounded
        .then_some(value)
        .ok_or(WireError::TooMuch { kind })
}

fn handshake(header: &Header, body: &[u8]) -> Result<Vec<u8>, WireError> {
    bounded(header, body.len() <= HANDSHAKE_MAX, body.to_vec())
}

impl Message for ToGuest {
    fn read(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        if header.version != VERSION {
            return Err(unknown(header));
        }
        Ok(match header.kind {
            1 => Self::Open(header.decode(body)?),
            2 => Self::Attach(header.decode(body)?),
            3 => {
                let (offset, bytes) = of_data(header, body)?;
                Self::Stdin { offset, bytes }
            }
            4 => Self::StdinEnd {
                offset: header.decode(body)?,
            },
            5 => Self::Signal(header.decode(body)?),
            6 => Self::Resize(header.decode(body)?),
            7 => {
                let (stdout, stderr) = header.decode(body)?;
                Self::Ack { stdout, stderr }
            }
            8 => Self::Ticket(body.to_vec()),
            9 => Self::Seal(handshake(header, body)?),
            _ => return Err(unknown(header)),
        })
    }
}

impl Message for ToClient {
    fn read(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        if header.version != VERSION {
            return Err(unknown(header));
        }
        Ok(match header.kind {
            32 => {
                let started: Started = header.decode(body)?;
                Self::Started(bounded(header, started.id.len() <= ID_MAX, started)?)
            }
            33 | 34 => {
                let (offset, bytes) = of_data(header, body)?;
                let out = match header.kind {
                    33 => Out::Stdout,
                    _ => Out::Stderr,
                };
                Self::Output { out, offset, bytes }
            }
            35 => Self::Taken {
                stdin: header.decode(body)?,
            },
            36 => {
                header.decode::<()>(body)?;
                Self::StdinClosed
            }
            37 => {
                let exit: Exit = header.decode(body)?;
                Self::Exit(bounded(header, exit.text.len() <= TEXT_MAX, exit)?)
            }
            38 => {
                let refused: Refused = header.decode(body)?;
                Self::Refused(bounded(header, refused.text.len() <= TEXT_MAX, refused)?)
            }
            39 => {
                let rows: Vec<Row> = header.decode(body)?;
                let fits = |row: &Row| {
                    let texts = [&row.user, &row.program];
                    row.id.len() <= ID_MAX && texts.iter().all(|text| text.len() <= TEXT_MAX)
                };
                let is_bounded = rows.len() <= ROWS_MAX && rows.iter().all(fits);
                Self::Rows(bounded(header, is_bounded, rows)?)
            }
            40 => {
                header.decode::<()>(body)?;
                Self::Done
            }
            41 => Self::Sealed(handshake(header, body)?),
            _ => return Err(unknown(header)),
        })
    }
}

/// Frames of a side, from bytes in whatever pieces they come. It keeps one frame, and what came with its end.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    at: usize,
}

impl Decoder {
    /// Takes more bytes. All whole frames are to be taken out before more are put in.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.at));
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame; none: it needs more bytes. A kind that it does not know is skipped if its sender says that it may be.
    ///
    /// # Errors
    /// The bytes are none of the protocol. Nothing may be taken afterwards.
    pub fn poll_frame<M: Message>(&mut self) -> Result<Option<M>, WireError> {
        loop {
            let Some((head, rest)) = self.bytes[self.at..].split_first_chunk::<HEADER_LEN>() else {
                return Ok(None);
            };
            let header = Header::parse(head, FRAME_MAX)?;
            let Some(body) = rest.get(..header.len as usize) else {
                return Ok(None);
            };
            let read = M::read(&header, body);
            self.at += HEADER_LEN + body.len();
            match read {
                Ok(message) => return Ok(Some(message)),
                Err(WireError::Frame(FrameError::Unknown { .. }))
                    if header.flags & frame::IGNORABLE != 0 => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether bytes of a frame are here that is not whole.
    pub fn is_in_frame(&self) -> bool {
        self.at < self.bytes.len()
    }

    /// What is here and was not taken, for whoever goes on with the stream.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: &[u8] = b"\x18\0\0\0\x01\0\x01\0\0\0\0\0\0\0\0\0\x02\x02ls\x02-l\x01\x01A\x01b\x04/tmp\x01\x18\x50\x01\xf4\x03\0";

    fn open() -> Open {
        Open {
            argv: vec![b"ls".to_vec(), b"-l".to_vec()],
            env: vec![(b"A".to_vec(), b"b".to_vec())],
            cwd: b"/tmp".to_vec(),
            tty: Some(Size { rows: 24, cols: 80 }),
            stdin: true,
            timeout_ms: 500,
            detach: false,
        }
    }

    fn round<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8], message: &M) {
        // In one piece, and byte by byte.
        let mut decoder = Decoder::default();
        decoder.push(bytes);
        assert_eq!(decoder.poll_frame::<M>().unwrap().as_ref(), Some(message));
        assert!(!decoder.is_in_frame());
        for (nth, byte) in bytes.iter().enumerate() {
            decoder.push(std::slice::from_ref(byte));
            let is_whole = nth + 1 == bytes.len();
            let next = decoder.poll_frame::<M>().unwrap();
            assert_eq!(next.as_ref(), is_whole.then_some(message));
        }
    }

    #[test]
    fn frames_of_the_client_have_golden_bytes() {
        let size = Size {
            rows: 24,
            cols: 300,
        };
        for (message, bytes) in [
            (ToGuest::Open(open()), OPEN),
            (
                ToGuest::Attach(Attach {
                    stdout: Some(300),
                    stderr: None,
                    size: None,
                }),
                b"\x05\0\0\0\x02\0\x01\0\0\0\0\0\0\0\0\0\x01\xac\x02\0\0",
            ),
            (
                ToGuest::Stdin {
                    offset: 258,
                    bytes: b"hi".to_vec(),
                },
                b"\x0a\0\0\0\x03\0\x01\0\0\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0hi",
            ),
            (
                ToGuest::StdinEnd { offset: 300 },
                b"\x02\0\0\0\x04\0\x01\0\0\0\0\0\0\0\0\0\xac\x02",
            ),
            (
                ToGuest::Signal(15),
                b"\x01\0\0\0\x05\0\x01\0\0\0\0\0\0\0\0\0\x0f",
            ),
            (
                ToGuest::Resize(size),
                b"\x03\0\0\0\x06\0\x01\0\0\0\0\0\0\0\0\0\x18\xac\x02",
            ),
            (
                ToGuest::Ack {
                    stdout: 300,
                    stderr: 1,
                },
                b"\x03\0\0\0\x07\0\x01\0\0\0\0\0\0\0\0\0\xac\x02\x01",
            ),
            (
                ToGuest::Ticket(b"{}".to_vec()),
                b"\x02\0\0\0\x08\0\x01\0\0\0\0\0\0\0\0\0{}",
            ),
            (
                ToGuest::Seal(b"ee".to_vec()),
                b"\x02\0\0\0\x09\0\x01\0\0\0\0\0\0\0\0\0ee",
            ),
        ] {
            assert_eq!(message.encode(), bytes, "{message:?}");
            round(bytes, &message);
        }
    }

    #[test]
    fn frames_of_the_guest_have_golden_bytes() {
        let row = Row {
            id: "3f".into(),
            user: "ops".into(),
            program: "/bin/sh".into(),
            started_ms: 1,
            written: [300, 0],
            kept: true,
            attached: false,
            ended: Some((1, -1)),
        };
        for (message, bytes) in [
            (
                ToClient::Started(Started {
                    id: "3f".into(),
                    kept: true,
                    input: true,
                    tty: false,
                    stdin: 1,
                    taken: 0,
                    stdout: 300,
                    stderr: 2,
                }),
                &b"\x0b\0\0\0\x20\0\x01\0\0\0\0\0\0\0\0\0\x023f\x01\x01\0\x01\0\xac\x02\x02"[..],
            ),
            (
                ToClient::Output {
                    out: Out::Stderr,
                    offset: 1,
                    bytes: b"no".to_vec(),
                },
                b"\x0a\0\0\0\x22\0\x01\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0no",
            ),
            (
                ToClient::Taken { stdin: 300 },
                b"\x02\0\0\0\x23\0\x01\0\0\0\0\0\0\0\0\0\xac\x02",
            ),
            (
                ToClient::StdinClosed,
                b"\0\0\0\0\x24\0\x01\0\0\0\0\0\0\0\0\0",
            ),
            (
                ToClient::Exit(Exit {
                    how: How::Signal as u8,
                    value: 9,
                    text: "x".into(),
                    stdout: 300,
                    stderr: 0,
                }),
                b"\x07\0\0\0\x25\0\x01\0\0\0\0\0\0\0\0\0\x02\x12\x01x\xac\x02\0",
            ),
            (
                ToClient::Refused(Refused {
                    reason: refusal::DENIED,
                    text: "no".into(),
                }),
                b"\x04\0\0\0\x26\0\x01\0\0\0\0\0\0\0\0\0\x01\x02no",
            ),
            (
                ToClient::Rows(vec![row]),
                b"\x19\0\0\0\x27\0\x01\0\0\0\0\0\0\0\0\0\x01\x023f\x03ops\x07/bin/sh\x02\xac\x02\0\x01\0\x01\x01\x01",
            ),
            (ToClient::Done, b"\0\0\0\0\x28\0\x01\0\0\0\0\0\0\0\0\0"),
        ] {
            assert_eq!(message.encode(), bytes, "{message:?}");
            round(bytes, &message);
        }
        for how in 0..=u8::MAX {
            assert_eq!(How::of(how).is_some(), (1..=5).contains(&how));
        }
    }

    #[test]
    fn each_side_says_only_what_is_its_own() {
        let mut decoder = Decoder::default();
        decoder.push(&ToClient::Done.encode());
        assert!(decoder.poll_frame::<ToGuest>().is_err());
        let mut decoder = Decoder::default();
        decoder.push(&ToGuest::Signal(1).encode());
        assert!(decoder.poll_frame::<ToClient>().is_err());
        // A later version's, which may be skipped.
        let mut bytes = frame::encode(19, 1, 0, frame::IGNORABLE, &7_u8).unwrap();
        bytes.extend(ToGuest::Signal(1).encode());
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        assert_eq!(decoder.poll_frame().unwrap(), Some(ToGuest::Signal(1)));
    }

    #[test]
    fn lengths_are_checked_before_anything_is_kept() {
        let mut head = ToGuest::Signal(1).encode();
        head[..4].copy_from_slice(&(FRAME_MAX + 1).to_le_bytes());
        let mut decoder = Decoder::default();
        decoder.push(&head);
        assert!(matches!(
            decoder.poll_frame::<ToGuest>(),
            Err(WireError::Frame(FrameError::TooLong { .. }))
        ));
        for len in [0, DATA_MAX + 1] {
            let mut decoder = Decoder::default();
            decoder.push(&data(3, 0, &vec![0; len]));
            assert!(matches!(
                decoder.poll_frame::<ToGuest>(),
                Err(WireError::Data { .. })
            ));
        }
        let text = "x".repeat(TEXT_MAX + 1);
        let mut decoder = Decoder::default();
        decoder.push(&ToClient::Refused(Refused { reason: 1, text }).encode());
        assert!(matches!(
            decoder.poll_frame::<ToClient>(),
            Err(WireError::TooMuch { kind: 38 })
        ));
    }

    #[test]
    fn r92_a_command_that_makes_no_sense_is_none() {
        assert_eq!(open().check(), Ok(()));
        let bad = |change: &dyn Fn(&mut Open)| {
            let mut open = open();
            change(&mut open);
            open.check().unwrap_err()
        };
        assert_eq!(bad(&|o| o.argv.clear()), OpenError::NoProgram);
        assert_eq!(bad(&|o| o.argv[0].clear()), OpenError::NoProgram);
        assert_eq!(bad(&|o| o.argv[1].push(0)), OpenError::Nul);
        assert_eq!(bad(&|o| o.cwd.push(0)), OpenError::Nul);
        assert_eq!(bad(&|o| o.cwd = b"tmp".to_vec()), OpenError::Cwd);
        assert_eq!(bad(&|o| o.env[0].0 = b"A=B".to_vec()), OpenError::EnvName);
        assert_eq!(bad(&|o| o.env[0].0.clear()), OpenError::EnvName);
        assert_eq!(bad(&|o| o.env.push(o.env[0].clone())), OpenError::EnvName);
        let many = vec![b"x".to_vec(); ARGV_MAX + 1];
        assert_eq!(bad(&|o| o.argv = many.clone()), OpenError::TooMuch);
        let long = vec![b'x'; ARGV_BYTES_MAX];
        assert_eq!(bad(&|o| o.argv[1] = long.clone()), OpenError::TooMuch);
    }
}
