//! What is said on a stream of the service `files`, once its hello is accepted.
//!
//! ```text
//! write:  Begin ► ◄ Ready   Entry · Data* · End · Entry · … · All ►           ◄ Skipped* · Totals
//! read:   Begin ► ◄ Ready   ◄ Entry · Data* · End · Skipped* · … · All        Totals ►
//! either, gone on with:     Entry of a file ► ◄ Have · From ► Data* · End
//! list, stat, remove, wait: ◄ Row* · Done
//! any:                      Refused from either, and the stream ends
//! ```
//! Message frames ([`adit_channel::frame`]), (kind, version 1):
//!
//! | kind | from | body |
//! |---|---|---|
//! | 1 | client | postcard of [`Begin`] |
//! | 16 | sender | postcard of [`Entry`] |
//! | 17 | sender | bytes of the file: offset u64 little-endian, 1 to [`DATA_MAX`] bytes. What an offset leaves out is a hole |
//! | 18 | sender | postcard of [`End`] |
//! | 19 | either | postcard of [`Skipped`]: one thing is not copied, the rest is |
//! | 20 | sender | that was all: postcard of the number of entries, u64 |
//! | 21 | sender | where it goes on: postcard of an offset, u64 |
//! | 32 | receiver | postcard of [`Have`] |
//! | 33 | receiver | all is where it belongs: postcard of [`Totals`] |
//! | 48 | guest | the client may go on: postcard of the [`Place`] that the target is |
//! | 49 | either | postcard of [`Refused`] |
//! | 50 | guest | postcard of up to [`ROWS_MAX`] [`Row`]s |
//! | 51 | guest | it is done: no body |

use std::io;

use adit_channel::frame::{self, FrameError, HEADER_LEN, Header};
use serde::{Deserialize, Serialize};

/// Most bytes of a file in a frame.
pub const DATA_MAX: usize = 256 << 10;
/// Most bytes of a frame's body.
pub const FRAME_MAX: u32 = (DATA_MAX + OFFSET_LEN) as u32;
/// Most bytes of a name.
pub const NAME_MAX: usize = 255;
/// Most bytes of a path within a tree.
pub const TREE_PATH_MAX: usize = 3072;
/// Most names of a path within a tree.
pub const DEPTH_MAX: usize = 128;
/// Most bytes of a link's target.
pub const LINK_MAX: usize = 4095;
/// Most extended attributes of a file, and most bytes of them.
pub const XATTRS_MAX: (usize, usize) = (64, 64 << 10);
/// Most rows in a frame.
pub const ROWS_MAX: usize = 48;
/// Most bytes of a text for people.
pub const TEXT_MAX: usize = 512;
/// Nobody has a file so long.
pub const LEN_MAX: u64 = i64::MAX as u64;
const VERSION: u16 = 1;
const OFFSET_LEN: usize = 8;

/// Reasons of [`Refused`], for programs.
pub mod refusal {
    /// The guest's policy, or the kernel, does not allow it.
    pub const DENIED: u16 = 1;
    /// The guest does not know the user.
    pub const NO_USER: u16 = 2;
    /// Nothing has this name.
    pub const NOT_FOUND: u16 = 3;
    /// There are as many copies as there may be, or another one writes the same file now.
    pub const BUSY: u16 = 4;
    /// What was asked for makes no sense.
    pub const MALFORMED: u16 = 5;
    /// It failed.
    pub const FAILED: u16 = 6;
    /// There is no room: the disk, or the user's quota.
    pub const NO_SPACE: u16 = 7;
    /// Nothing can be written there.
    pub const READ_ONLY: u16 = 8;
    /// A link leads out of what may be reached, or is where a directory should be.
    pub const LINK: u16 = 9;
    /// It is no directory, or one where none may be.
    pub const KIND: u16 = 10;
    /// There is no stream to the guest: the host says so.
    pub const UNREACHABLE: u16 = 11;
    /// The other side does not keep to the protocol.
    pub const VIOLATION: u16 = 12;
    /// The file changed while it was read.
    pub const CHANGED: u16 = 13;
}

/// How a copy is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// What the tree is called in a target that is a directory; empty: what is in it goes there.
    pub name: Vec<u8>,
    /// What the target is.
    pub place: Place,
    /// It goes on where one before was cut off: the receiver says what it has.
    pub resume: bool,
    /// With extended attributes of users.
    pub xattrs: bool,
    /// With owners, where the receiver may give files away.
    pub owners: bool,
    /// On the disk before it is done.
    pub sync: bool,
}

/// What the target of a copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// If it is a directory, the tree goes into it; else it will be the tree.
    #[default]
    Auto,
    /// It must be a directory, and the tree goes into it.
    Within,
    /// It is the tree: so it was when the copy began that is gone on with.
    Itself,
}

/// Something in a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where, from the top; empty: the top itself.
    pub path: Vec<u8>,
    /// What.
    pub kind: Kind,
    /// Permissions; bits beside 0777 are left out.
    pub mode: u32,
    /// When it was changed: seconds of Unix time, and nanoseconds.
    pub mtime: (i64, u32),
    /// User and group, by number.
    pub owner: Option<(u32, u32)>,
    /// Extended attributes, `user.` alone.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A directory.
    Dir,
    /// A file, which has so many bytes if that is known.
    File(Option<u64>),
    /// A symbolic link to this.
    Link(Vec<u8>),
}

/// What a receiver has of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Have {
    /// As far as that; 0: nothing.
    pub offset: u64,
    /// SHA-256 of it.
    pub digest: [u8; 32],
}

/// How a file ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// It is whole, and has so many bytes.
    Whole(u64),
    /// It is not to be kept, for this reason ([`refusal`]) and in these words.
    Broken(u16, String),
}

/// One thing is not copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Where, from the top.
    pub path: Vec<u8>,
    /// Why, for people.
    pub text: String,
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Entries that are where they belong.
    pub entries: u64,
    /// Bytes that have come for them.
    pub bytes: u64,
    /// Entries that are not there.
    pub skipped: u64,
}

/// It is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// One of [`refusal`].
    pub reason: u16,
    /// For people.
    pub text: String,
}

impl Refused {
    /// One whose text fits.
    pub fn new(reason: u16, said: impl Into<String>) -> Self {
        let text = text(said);
        Self { reason, text }
    }
}

/// A text, cut to what fits.
pub fn text(said: impl Into<String>) -> String {
    let mut text = said.into();
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    text
}

/// What is known of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub name: Vec<u8>,
    /// `-`, `d`, `l`, `p`, `s`, `b`, `c`, or `?`.
    pub kind: char,
    /// Bytes.
    pub size: u64,
    /// Permissions.
    pub mode: u32,
    /// As in an [`Entry`].
    pub mtime: (i64, u32),
    /// User, by number.
    pub uid: u32,
    /// Group, by number.
    pub gid: u32,
    /// Where a link leads.
    pub target: Vec<u8>,
}

/// All that is said.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Begin(Begin),
    Entry(Entry),
    Data(Data),
    End(End),
    Skipped(Skipped),
    All(u64),
    From(u64),
    Have(Have),
    Totals(Totals),
    Ready(Place),
    Refused(Refused),
    Rows(Vec<Row>),
    Done,
}

/// Bytes of a file.
#[derive(Clone, PartialEq, Eq)]
pub struct Data {
    /// Where they belong.
    pub offset: u64,
    body: Vec<u8>,
}

impl Data {
    /// The bytes: at least one.
    pub fn bytes(&self) -> &[u8] {
        &self.body[OFFSET_LEN..]
    }
}

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Data({} at {})", self.bytes().len(), self.offset)
    }
}

/// Why bytes are none of the protocol. The other side's fault.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// As a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// No bytes, or too many.
    #[error("frame of kind 17 has {len} bytes of data")]
    Data {
        /// How many.
        len: usize,
    },
    /// More than there may be.
    #[error("frame of kind {kind} has more of something than there may be")]
    TooMuch {
        /// Kind of the frame.
        kind: u16,
    },
    /// A name that leads elsewhere, or that nothing may have.
    #[error("a name in a frame of kind {kind}: {source}")]
    Name {
        /// Kind of the frame.
        kind: u16,
        /// What is wrong with it.
        #[source]
        source: NameError,
    },
}

/// The other side does not keep to the rules.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Something that is not due.
    #[error("what it says is not due now")]
    NotDue,
    /// A piece that is not behind the one before.
    #[error("bytes at {offset} come behind those up to {at}")]
    Backwards {
        /// Where it should be at least.
        at: u64,
        /// Where it is.
        offset: u64,
    },
    /// A file that is not as long as was said.
    #[error("a file of {said} bytes has {is}")]
    Length {
        /// What was said.
        said: u64,
        /// What it is.
        is: u64,
    },
    /// The number of entries is another one.
    #[error("it says that there were {said} entries, and there were {were}")]
    Count {
        /// What was said.
        said: u64,
        /// What came.
        were: u64,
    },
}

/// Why a path is not one within a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It leads elsewhere.
    #[error("`.`, `..`, an empty name or an absolute path")]
    Leads,
    /// No file can have it.
    #[error("it has a NUL byte")]
    Nul,
    /// It is too long.
    #[error("it is too long")]
    Long,
}

/// Checks a path within a tree; the top itself is an empty one.
///
/// # Errors
/// It could lead elsewhere, or is too long.
pub fn check_path(path: &[u8]) -> Result<(), NameError> {
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > TREE_PATH_MAX {
        return Err(NameError::Long);
    }
    for (nth, name) in path.split(|b| *b == b'/').enumerate() {
        match name {
            b"" | b"." | b".." => return Err(NameError::Leads),
            name if name.contains(&0) => return Err(NameError::Nul),
            name if name.len() > NAME_MAX || nth >= DEPTH_MAX => return Err(NameError::Long),
            _ => {}
        }
    }
    Ok(())
}

fn framed<T: Serialize>(kind: u16, body: &T) -> Vec<u8> {
    // Whatever fits its limits is shorter than a frame may be.
    frame::encode(kind, VERSION, 0, 0, body).unwrap_or_default()
}

/// The head of a frame of data, which goes before its bytes.
pub(crate) fn data_head(offset: u64, len: usize) -> [u8; HEADER_LEN + OFFSET_LEN] {
    let mut head = [0; HEADER_LEN + OFFSET_LEN];
    let body = u32::try_from(len + OFFSET_LEN).unwrap_or(u32::MAX);
    head[..4].copy_from_slice(&body.to_le_bytes());
    head[4..6].copy_from_slice(&17_u16.to_le_bytes());
    head[6..8].copy_from_slice(&VERSION.to_le_bytes());
    head[HEADER_LEN..].copy_from_slice(&offset.to_le_bytes());
    head
}

impl Message {
    /// Bytes of a file: 1 to [`DATA_MAX`].
    pub fn data(offset: u64, bytes: &[u8]) -> Self {
        let mut body = offset.to_le_bytes().to_vec();
        body.extend(bytes);
        Self::Data(Data { offset, body })
    }

    /// As a frame.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Begin(begin) => framed(1, begin),
            Self::Entry(entry) => framed(16, entry),
            Self::Data(data) => {
                let mut frame = data_head(data.offset, data.bytes().len()).to_vec();
                frame.extend(data.bytes());
                frame
            }
            Self::End(end) => framed(18, end),
            Self::Skipped(skipped) => framed(19, skipped),
            Self::All(entries) => framed(20, entries),
            Self::From(offset) => framed(21, offset),
            Self::Have(have) => framed(32, have),
            Self::Totals(totals) => framed(33, totals),
            Self::Ready(place) => framed(48, place),
            Self::Refused(refused) => framed(49, refused),
            Self::Rows(rows) => framed(50, rows),
            Self::Done => framed(51, &()),
        }
    }

    /// Reads the next one; none: the stream has ended between two. A kind that is not known is skipped if its sender says that it may be.
    ///
    /// # Errors
    /// The stream fails, or its bytes are none of the protocol (`InvalidData`, with a [`WireError`] inside).
    pub fn read(from: &mut impl io::Read) -> io::Result<Option<Self>> {
        let invalid = |e: WireError| io::Error::new(io::ErrorKind::InvalidData, e);
        loop {
            let Some((header, body)) = frame::read(from, FRAME_MAX)? else {
                return Ok(None);
            };
            match Self::of(&header, body) {
                Ok(message) => return Ok(Some(message)),
                Err(WireError::Frame(FrameError::Unknown { .. }))
                    if header.flags & frame::IGNORABLE != 0 => {}
                Err(e) => return Err(invalid(e)),
            }
        }
    }

    fn of(header: &Header, body: Vec<u8>) -> Result<Self, WireError> {
        let (kind, version) = (header.kind, header.version);
        if version != VERSION {
            return Err(FrameError::Unknown { kind, version }.into());
        }
        let bounded = |is: bool| is.then_some(()).ok_or(WireError::TooMuch { kind });
        let name = |source| WireError::Name { kind, source };
        Ok(match kind {
            1 => {
                let begin: Begin = header.decode(&body)?;
                check_path(&begin.name).map_err(name)?;
                if begin.name.contains(&b'/') {
                    return Err(name(NameError::Leads));
                }
                Self::Begin(begin)
            }
            16 => {
                let entry: Entry = header.decode(&body)?;
                check_path(&entry.path).map_err(name)?;
                bounded(entry.fits())?;
                Self::Entry(entry)
            }
            17 => match body.split_first_chunk::<OFFSET_LEN>() {
                Some((offset, bytes)) if !bytes.is_empty() && bytes.len() <= DATA_MAX => {
                    let offset = u64::from_le_bytes(*offset);
                    Self::Data(Data { offset, body })
                }
                _ => {
                    let len = body.len().saturating_sub(OFFSET_LEN);
                    return Err(WireError::Data { len });
                }
            },
            18 => {
                let end: End = header.decode(&body)?;
                let fits = match &end {
                    End::Whole(len) => *len <= LEN_MAX,
                    End::Broken(_, text) => text.len() <= TEXT_MAX,
                };
                bounded(fits)?;
                Self::End(end)
            }
            19 => {
                let skipped: Skipped = header.decode(&body)?;
                // It is shown, and never used.
                bounded(skipped.path.len() <= LINK_MAX && skipped.text.len() <= TEXT_MAX)?;
                Self::Skipped(skipped)
            }
            20 => Self::All(header.decode(&body)?),
            21 => Self::From(header.decode(&body)?),
            32 => Self::Have(header.decode(&body)?),
            33 => Self::Totals(header.decode(&body)?),
            48 => Self::Ready(header.decode(&body)?),
            49 => {
                let refused: Refused = header.decode(&body)?;
                bounded(refused.text.len() <= TEXT_MAX)?;
                Self::Refused(refused)
            }
            50 => {
                let rows: Vec<Row> = header.decode(&body)?;
                let fits = |row: &Row| row.name.len() <= LINK_MAX && row.target.len() <= LINK_MAX;
                bounded(rows.len() <= ROWS_MAX && rows.iter().all(fits))?;
                Self::Rows(rows)
            }
            51 => {
                header.decode::<()>(&body)?;
                Self::Done
            }
            _ => return Err(FrameError::Unknown { kind, version }.into()),
        })
    }
}

impl Entry {
    fn fits(&self) -> bool {
        let (count, bytes) = XATTRS_MAX;
        let of_users = |(name, _): &(Vec<u8>, Vec<u8>)| is_users(name);
        let sum: usize = self.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum();
        let kind = match &self.kind {
            Kind::Dir | Kind::File(None) => true,
            Kind::File(Some(len)) => *len <= LEN_MAX,
            Kind::Link(to) => (1..=LINK_MAX).contains(&to.len()) && !to.contains(&0),
        };
        kind && self.mtime.1 < 1_000_000_000
            && self.xattrs.len() <= count
            && sum <= bytes
            && self.xattrs.iter().all(of_users)
    }
}

/// Whether an extended attribute is one of users: others give rights.
pub(crate) fn is_users(name: &[u8]) -> bool {
    name.starts_with(b"user.") && name.len() <= NAME_MAX && !name.contains(&0)
}

#[cfg(test)]
mod tests;
