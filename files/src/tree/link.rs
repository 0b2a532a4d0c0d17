//! The stream of a copy, and what can go wrong with one.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::Shutdown;

use crate::wire::{Message, Refused, Violation, data_head, refusal, text};

/// Bytes that are gathered before they are written, and read at once.
const BUFFER: usize = 256 << 10;

/// What somebody wants to know of a copy while it goes on. Asked from several threads.
pub trait Watch: Sync {
    /// So many more bytes are through.
    fn moved(&self, bytes: u64);
    /// One more thing of the tree is begun.
    fn entry(&self, path: &[u8]);
    /// This is not copied.
    fn skipped(&self, path: &[u8], why: &str);
}

/// Nobody watches.
impl Watch for () {
    fn moved(&self, _: u64) {}
    fn entry(&self, _: &[u8]) {}
    fn skipped(&self, _: &[u8], _: &str) {}
}

/// Why a copy has ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The stream broke off: it can be gone on with.
    #[error("the connection broke off: {0}")]
    Cut(#[source] io::Error),
    /// The other side said why.
    #[error("{}", .0.text)]
    Refused(Refused),
    /// The other side does not keep to the rules.
    #[error("the other side breaks the protocol: {0}")]
    Violation(Violation),
    /// It says what is none of the protocol.
    #[error("the other side breaks the protocol: {0}")]
    Wire(#[source] io::Error),
    /// This side cannot go on.
    #[error("{}", .0.text)]
    Local(Refused),
}

impl Fault {
    /// Something of this side failed, at this path.
    pub(super) fn local(what: &str, path: &[u8], e: impl Into<io::Error>) -> Self {
        let e = e.into();
        Self::Local(Refused::new(reason_of(&e), said(what, path, &e)))
    }

    /// The same, of what has no path of its own.
    pub fn at(what: &str, e: impl Into<io::Error>) -> Self {
        Self::local(what, &[], e)
    }

    /// What the other side is to hear of it.
    pub fn refusal(&self) -> Option<Refused> {
        match self {
            Self::Local(refused) => Some(refused.clone()),
            Self::Violation(why) => Some(Refused::new(refusal::VIOLATION, why.to_string())),
            Self::Wire(why) => Some(Refused::new(refusal::VIOLATION, why.to_string())),
            Self::Cut(_) | Self::Refused(_) => None,
        }
    }

    /// Whether nothing more can come of the target, whatever is sent to it.
    pub(super) fn is_final(e: &io::Error) -> bool {
        let full = matches!(reason_of(e), refusal::NO_SPACE | refusal::READ_ONLY);
        full || e.raw_os_error() == Some(Errno::IO.raw_os_error())
    }
}

/// A path as texts have it.
pub(super) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

pub(super) fn said(what: &str, path: &[u8], e: &io::Error) -> String {
    let why = match e.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::LOOP | Errno::XDEV) => {
            "a link leads elsewhere, or is where a directory should be, and none is followed".into()
        }
        Some(Errno::NOSPC) => "the disk is full".into(),
        Some(Errno::DQUOT) => "the user's quota is used up".into(),
        Some(Errno::ROFS) => "it is on a file system that is read-only".into(),
        _ => e.to_string(),
    };
    match path {
        [] => text(format!("cannot {what}: {why}")),
        path => text(format!("cannot {what} {}: {why}", shown(path))),
    }
}

/// The reason of a refusal that an error of the system is.
pub(super) fn reason_of(e: &io::Error) -> u16 {
    match e.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => refusal::NO_SPACE,
        Some(Errno::ROFS) => refusal::READ_ONLY,
        Some(Errno::LOOP | Errno::XDEV) => refusal::LINK,
        Some(Errno::ACCESS | Errno::PERM) => refusal::DENIED,
        Some(Errno::NOENT) => refusal::NOT_FOUND,
        Some(Errno::NOTDIR | Errno::ISDIR | Errno::NOTEMPTY | Errno::EXIST) => refusal::KIND,
        Some(Errno::WOULDBLOCK) => refusal::BUSY,
        _ => refusal::FAILED,
    }
}

/// A stream between the two sides.
#[derive(Debug)]
pub struct Stream {
    from: BufReader<File>,
    to: BufWriter<File>,
}

impl Stream {
    /// Of a socket that waits in its calls.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = File::from(socket);
        Ok(Self {
            from: BufReader::with_capacity(BUFFER, socket.try_clone()?),
            to: BufWriter::with_capacity(BUFFER, socket),
        })
    }

    /// Both directions, each with an owner of its own.
    pub(super) fn halves(&mut self) -> (&mut BufReader<File>, &mut BufWriter<File>) {
        (&mut self.from, &mut self.to)
    }

    /// Says something, some time before the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// The stream is gone.
    pub fn say(&mut self, message: &Message) -> Result<(), Fault> {
        self.to.write_all(&message.encode()).map_err(Fault::Cut)
    }

    /// Has it sent.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn flush(&mut self) -> Result<(), Fault> {
        self.to.flush().map_err(Fault::Cut)
    }

    /// Whether the other side says nothing any more. It waits for that to be known.
    pub(super) fn is_at_end(&self) -> bool {
        let mut byte = [0];
        let flags = rustix::net::RecvFlags::PEEK;
        let got = rustix::net::recv(self.to.get_ref(), &mut byte, flags);
        !matches!(got, Ok((_, n)) if n > 0)
    }

    /// Waits for the next thing that the other side says.
    ///
    /// # Errors
    /// The stream is gone, or it is none of the protocol.
    pub fn hear(&mut self) -> Result<Message, Fault> {
        hear(&mut self.from)
    }

    /// Says the last thing, and has it read: some carriers forget what was said when a stream is closed on bytes that nobody has read.
    pub fn end(mut self, last: Option<&Message>) {
        if let Some(message) = last {
            let _ = self.say(message);
        }
        let _ = self.flush();
        let _ = rustix::net::shutdown(self.to.get_ref(), Shutdown::Write);
        // Whoever sends for ever is read no further than this.
        let mut left: usize = 64 << 20;
        let mut rest = [0; 4096];
        while left > 0 {
            match io::Read::read(self.from.get_mut(), &mut rest) {
                Ok(n) if n > 0 => left = left.saturating_sub(n),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.to.get_ref().as_fd()
    }
}

pub(super) fn hear(from: &mut BufReader<File>) -> Result<Message, Fault> {
    match Message::read(from) {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(Fault::Cut(ErrorKind::UnexpectedEof.into())),
        Err(e) if e.kind() == ErrorKind::InvalidData => Err(Fault::Wire(e)),
        Err(e) => Err(Fault::Cut(e)),
    }
}

/// Sends bytes of a file: 1 to [`DATA_MAX`](crate::DATA_MAX).
pub(super) fn say_data(to: &mut impl Write, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
    let head = data_head(offset, bytes.len());
    let sent = to.write_all(&head).and_then(|()| to.write_all(bytes));
    sent.map_err(Fault::Cut)
}
