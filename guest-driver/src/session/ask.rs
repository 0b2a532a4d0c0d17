//! What the agent asks of a session process: one message and one answer on its socket (SEQPACKET), each a frame in one packet.
//!
//! | kind, version 1 | body | what |
//! |---|---|---|
//! | 1 | nothing | its [`Row`] |
//! | 2 | [`Attaching`], and the stream as a passed descriptor | the client of that stream takes the place of the one before |
//! | 3 | [`Ending`] | it is ended, or gets a signal |
//! | 4 | [`Attaching`] and [`Keys`], and the stream | as 2, because a ticket says so; the stream is sealed |
//! | 5 | [`Ending`] | as 3, because a ticket says so |
//! | 33 | [`Answer`] | the answer to each |
//!
//! An agent of another version may ask, so these bytes stay as they are.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use adit_channel::frame::{self, HEADER_LEN, Header};
use adit_exec::seal::Keys;
use adit_exec::{Attach, Refused, Row};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind,
    connect, listen, recvmsg, sendmsg, socket_with, sockopt,
};
use serde::{Deserialize, Serialize};

/// How long either side waits for the other.
const LIMIT: Duration = Duration::from_secs(2);
/// Most bytes of a message.
const MESSAGE_MAX: usize = 4096;
/// Agents that may wait at a time: streams of one, of which it has fewer that ask.
const BACKLOG: i32 = 64;
const VERSION: u16 = 1;

/// A client comes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attaching {
    /// The session must be this user's; empty: anybody's.
    pub user: String,
    /// From where on.
    pub attach: Attach,
}

/// The session is to end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// As above.
    pub user: String,
    /// This signal instead; 0: the end.
    pub signal: u8,
}

/// What a session process answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// It does not; and why.
    pub refused: Option<Refused>,
    /// What it is.
    pub row: Option<Row>,
}

/// What is asked.
#[derive(Debug)]
pub enum Asks {
    /// What it is.
    Row,
    /// A client comes, by this stream, which is sealed where a ticket says so.
    Attach(Attaching, OwnedFd, Option<Keys>),
    /// It is to end; whether a ticket says so.
    End(Ending, bool),
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socket_with(family, kind, flags, None)?)
}

fn limit(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LIMIT))?;
    Ok(sockopt::set_socket_timeout(
        &socket,
        sockopt::Timeout::Send,
        Some(LIMIT),
    )?)
}

/// Makes the socket at which a session process is asked.
///
/// # Errors
/// There is one, or it cannot be made.
pub fn listener(at: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    bind(&socket, &SocketAddrUnix::new(at)?)?;
    listen(&socket, BACKLOG)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// Asks a session process. `kind`, `body` and `fd` as at the top of this file.
fn ask(
    at: &Path,
    kind: u16,
    body: &impl Serialize,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<Answer> {
    let socket = socket()?;
    limit(&socket)?;
    connect(&socket, &SocketAddrUnix::new(at)?)?;
    let bytes = frame::encode(kind, VERSION, 0, 0, body).map_err(io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(
        &socket,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    let (header, body, _) = received(&socket)?;
    match (header.kind, header.version) {
        (33, VERSION) => header.decode(&body).map_err(io::Error::other),
        _ => Err(io::Error::other("it is of another version")),
    }
}

/// Asks what it is.
///
/// # Errors
/// It has gone, or does not answer.
pub fn row(at: &Path) -> io::Result<Answer> {
    ask(at, 1, &(), None)
}

/// Gives it a client.
///
/// # Errors
/// As [`row`].
pub fn attach(at: &Path, attaching: &Attaching, stream: BorrowedFd<'_>) -> io::Result<Answer> {
    ask(at, 2, attaching, Some(stream))
}

/// Has it end.
///
/// # Errors
/// As [`row`].
pub fn end(at: &Path, ending: &Ending) -> io::Result<Answer> {
    ask(at, 3, ending, None)
}

/// Gives it a client, because a ticket says so.
///
/// # Errors
/// As [`row`].
pub fn attach_by_ticket(
    at: &Path,
    attaching: &Attaching,
    keys: &Keys,
    stream: BorrowedFd<'_>,
) -> io::Result<Answer> {
    ask(at, 4, &(attaching, keys), Some(stream))
}

/// Has it end, because a ticket says so.
///
/// # Errors
/// As [`row`].
pub fn end_by_ticket(at: &Path, ending: &Ending) -> io::Result<Answer> {
    ask(at, 5, ending, None)
}

/// One packet.
fn received(socket: impl AsFd) -> io::Result<(Header, Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = [0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(
        &socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        flags,
    )?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            fd = fds.next();
        }
    }
    let bytes = &bytes[..got.bytes];
    let cut = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let (head, body) = bytes.split_first_chunk::<HEADER_LEN>().ok_or_else(cut)?;
    let header = Header::parse(head, MESSAGE_MAX as u32).map_err(io::Error::other)?;
    let body = body.get(..header.len as usize).ok_or_else(cut)?.to_vec();
    Ok((header, body, fd))
}

/// A question that waits for its answer.
#[derive(Debug)]
pub struct Question {
    socket: OwnedFd,
    /// What is asked.
    pub asks: Asks,
}

impl Question {
    /// Takes the next one; none: nobody asks.
    ///
    /// # Errors
    /// Whoever asked does not keep to the protocol, or has gone.
    pub fn take(listener: impl AsFd) -> io::Result<Option<Self>> {
        let socket = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        limit(&socket)?;
        let (header, body, fd) = received(&socket)?;
        let bad = || io::Error::from(io::ErrorKind::InvalidData);
        let asks = match (header.kind, header.version, fd) {
            (1, VERSION, None) => Asks::Row,
            (2, VERSION, Some(fd)) => {
                Asks::Attach(header.decode(&body).map_err(io::Error::other)?, fd, None)
            }
            (4, VERSION, Some(fd)) => {
                let (attaching, keys) = header.decode(&body).map_err(io::Error::other)?;
                Asks::Attach(attaching, fd, Some(keys))
            }
            (3 | 5, VERSION, None) => {
                let ending = header.decode(&body).map_err(io::Error::other)?;
                Asks::End(ending, header.kind == 5)
            }
            _ => return Err(bad()),
        };
        Ok(Some(Self { socket, asks }))
    }

    /// Answers it.
    pub fn answer(socket: &OwnedFd, answer: &Answer) {
        // Whoever asked may have gone.
        if let Ok(bytes) = frame::encode(33, VERSION, 0, 0, answer) {
            let _ = rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL);
        }
    }

    /// What is asked, and where the answer goes.
    pub fn split(self) -> (Asks, OwnedFd) {
        (self.asks, self.socket)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn questions_and_answers_have_golden_bytes() {
        let attaching = Attaching {
            user: "ops".into(),
            attach: Attach {
                stdout: Some(300),
                stderr: None,
                size: None,
            },
        };
        let bytes = postcard::to_stdvec(&attaching).unwrap();
        assert_eq!(bytes, [3, b'o', b'p', b's', 1, 0xac, 2, 0, 0]);
        let ending = Ending {
            user: String::new(),
            signal: 15,
        };
        assert_eq!(postcard::to_stdvec(&ending).unwrap(), [0, 15]);
        let answer = Answer {
            refused: Some(Refused {
                reason: 3,
                text: "no".into(),
            }),
            row: None,
        };
        assert_eq!(
            postcard::to_stdvec(&answer).unwrap(),
            [1, 3, 2, b'n', b'o', 0]
        );
    }

    #[test]
    fn an_agent_asks_and_passes_a_stream_on() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("s");
        let listener = listener(&at).unwrap();
        assert!(Question::take(&listener).unwrap().is_none());
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                let attaching = Attaching::default();
                attach(&at, &attaching, theirs.as_fd()).unwrap()
            });
            let question = loop {
                if let Some(question) = Question::take(&listener).unwrap() {
                    break question;
                }
                std::thread::yield_now();
            };
            let (Asks::Attach(_, fd, None), socket) = question.split() else {
                panic!("no stream came along");
            };
            rustix::io::write(&fd, b"x").unwrap();
            Question::answer(&socket, &Answer::default());
            assert_eq!(asked.join().unwrap(), Answer::default());
        });
        let mut got = [0];
        rustix::io::read(&ours, &mut got).unwrap();
        assert_eq!(got, *b"x");
    }

    #[test]
    fn whoever_says_nonsense_gets_no_answer_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("s");
        let listener = listener(&at).unwrap();
        for bytes in [&b""[..], b"x", &[0; HEADER_LEN], &[9; 64]] {
            let socket = socket().unwrap();
            connect(&socket, &SocketAddrUnix::new(&at).unwrap()).unwrap();
            rustix::net::send(&socket, bytes, SendFlags::NOSIGNAL).unwrap();
            assert!(Question::take(&listener).is_err(), "{bytes:?}");
        }
    }
}
