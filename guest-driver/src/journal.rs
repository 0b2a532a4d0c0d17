//! The journal: what this guest has accepted, started and finished, on disk before anything depends on it.
//!
//! ```text
//! received ──▶ started ──▶ result ──▶ acked
//!    │            └ agent or guest ended here ─▶ result (interrupted)
//!    └ agent ended here: nothing ran; the host hands it out again
//! ```
//! Every arrow is one transaction with an fsync. An id that was `started` is never started again. Of every signing key the
//! admitted goals are kept in a window; a finished task is dropped only once its goal was forgotten there, and can never be
//! admitted again (`room`). If none can be dropped, the next task is refused: `journal-full`.
//!
//! A full disk: a task starts only once `received`, `started` and the space for its result are on disk (`reserve`);
//! else it is refused, `no-space`, and nothing has run.
//!
//! A damaged file must not take the agent down with it: [`open_checked`] has a process of its own read everything first.

mod checked;
mod overlay;
mod reserve;
mod result;
mod room;
mod windows;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use adit_blob::disk;
use adit_tasks::window::Window;
use adit_tasks::wire::{Outcome, Report, TaskId};
use redb::{
    Builder, Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    TableHandle, WriteTransaction,
};
use serde::{Deserialize, Serialize};

pub use checked::{check, open_checked};
pub use result::Kept;

use reserve::Reserve;
use windows::WINDOWS;

use crate::crash::{self, Point};

/// Most tasks that are remembered.
pub const JOURNAL_MAX: u64 = 4096;
/// Most keys whose goals are remembered; a key is named by a trust anchor, so an image has few.
const KEYS_MAX: u64 = 256;
/// Bytes of pages held in memory.
const CACHE_BYTES: usize = 128 * 1024;
const FILE: &str = "journal.redb";
const RESERVE_FILE: &str = "reserve";
/// All that a journal has in its directory.
pub const FILES: [&str; 2] = [FILE, RESERVE_FILE];

const TASKS: TableDefinition<&[u8; 16], &[u8]> = TableDefinition::new("tasks-v1");
/// Order of arrival, for resending and dropping.
const ORDER: TableDefinition<u64, &[u8; 16]> = TableDefinition::new("order-v1");
const FLOORS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("floors-v1");

/// Why the journal could not be used. The resource's fault.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Too many tasks that must be remembered.
    #[error(
        "journal-full: {JOURNAL_MAX} tasks are remembered and all of them still matter; a goal with a higher key_seq makes room"
    )]
    Full,
    /// Its goal was forgotten here, or its number is another goal's.
    #[error("replay: number {key_seq} of its key was forgotten here, or is another goal's")]
    Replay {
        /// The number.
        key_seq: u64,
    },
    /// Too many keys whose goals must be remembered.
    #[error(
        "journal-full: {KEYS_MAX} keys have signed goals for this guest, and the goals of each are remembered; no other key's goal runs here"
    )]
    TooManyKeys,
    /// The disk is full.
    #[error("no-space: guest disk full: journal cannot be written")]
    NoSpace(#[source] redb::Error),
    /// The file is no journal or is damaged.
    #[error("journal-corrupt: {0}")]
    Corrupt(String),
    /// A newer agent wrote it: what ran is in a table that this one does not know.
    #[error("journal-newer: its table `{0}` is of a newer agent")]
    Newer(String),
    /// Anything else: a read-only file system, another agent, an I/O error.
    #[error("journal-unavailable: {0}")]
    Unavailable(String),
}

impl JournalError {
    /// What to do, where no task can be accepted because of it.
    pub fn remedy(&self, dir: &Path) -> String {
        let dir = dir.display();
        match self {
            Self::NoSpace(_) => format!("make room on the disk of {dir}, then tasks run again"),
            Self::Corrupt(_) => format!(
                "restore {dir}/{FILE}, or move it away and restart the agent: what has run may run again while its goal is valid"
            ),
            Self::Newer(_) => format!(
                "install that agent again, or move {dir}/{FILE} away and restart this one: what has run may run again while its goal is valid"
            ),
            Self::Unavailable(_) => {
                format!("make {dir} writable for this agent alone, then tasks run again")
            }
            Self::Full | Self::Replay { .. } | Self::TooManyKeys => {
                "order new work by a goal of now".into()
            }
        }
    }
}

impl From<redb::Error> for JournalError {
    fn from(e: redb::Error) -> Self {
        match &e {
            redb::Error::Io(io)
                if matches!(io.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) =>
            {
                Self::NoSpace(e)
            }
            redb::Error::Io(io) if io.kind() == io::ErrorKind::InvalidData => {
                Self::Corrupt(e.to_string())
            }
            redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => {
                Self::Corrupt(e.to_string())
            }
            _ => Self::Unavailable(e.to_string()),
        }
    }
}

/// Which goal of which key a task belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The signing key's id.
    pub key: Vec<u8>,
    /// The goal's sequence under that key.
    pub seq: u64,
    /// The goal's digest.
    pub digest: [u8; 32],
}

/// The highest goal that was accepted of one key: what the version before remembers of it.
type Floor = (u64, [u8; 32]);

/// How far a task is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Accepted; nothing was done.
    Received,
    /// The effect was about to begin.
    Started {
        /// When, by the guest's clock.
        at_ms: u64,
    },
    /// Ended; the host has not acknowledged it.
    Result(Box<Report>),
    /// Ended, and the host has it.
    Acked(Outcome),
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Received => f.write_str("received"),
            Self::Started { .. } => f.write_str("started"),
            Self::Result(report) => write!(f, "ended as {:?}", report.outcome),
            Self::Acked(outcome) => write!(f, "acknowledged as {outcome:?}"),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Entry {
    order: u64,
    key: Vec<u8>,
    seq: u64,
    phase: Phase,
}

/// The open journal. After a failed write it is opened anew on the next call.
pub struct Journal {
    path: PathBuf,
    db: Option<Database>,
    reserve: Reserve,
}

type Result<T, E = JournalError> = std::result::Result<T, E>;

/// Turns any of redb's errors into one.
fn any<E: Into<redb::Error>>(e: E) -> redb::Error {
    e.into()
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|e| JournalError::Unavailable(e.to_string()))
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        // As much a sign of damage as a value that is too short.
        Ok((_, rest)) => Err(JournalError::Corrupt(format!(
            "an entry has {} bytes behind its end",
            rest.len()
        ))),
        Err(e) => Err(JournalError::Corrupt(e.to_string())),
    }
}

/// Every table. An agent that writes one in another way gives it the next number, so that those before it do not take the journal for
/// an empty one. They ignore a table with a name of its own.
const TABLES: [&str; 5] = ["tasks-v1", "order-v1", "floors-v1", "windows-v1", "mark-v1"];

/// Whether a table is one of [`TABLES`] with a higher number.
fn is_newer(table: &str) -> bool {
    let parts = |table: &str| {
        let (name, number) = table.rsplit_once("-v")?;
        Some((name.to_owned(), number.parse::<u32>().ok()?))
    };
    let known = TABLES.iter().filter_map(|known| parts(known));
    parts(table).is_some_and(|(name, number)| {
        { known }.any(|(known, latest)| known == name && latest < number)
    })
}

fn open(path: &Path) -> Result<Database> {
    let mut builder = Builder::new();
    let db = builder.set_cache_size(CACHE_BYTES).create(path);
    let db = db.map_err(any)?;
    let tx = db.begin_write().map_err(any)?;
    let newer = { tx.list_tables().map_err(any)? }.find(|table| is_newer(table.name()));
    if let Some(table) = newer {
        return Err(JournalError::Newer(table.name().to_owned()));
    }
    tx.open_table(TASKS).map_err(any)?;
    tx.open_table(ORDER).map_err(any)?;
    tx.open_table(FLOORS).map_err(any)?;
    windows::open(&tx)?;
    tx.commit().map_err(any)?;
    Ok(db)
}

/// Makes the file under another name first: one that a full disk or a power cut left half made would be no journal, forever.
fn make(path: &Path) -> Result<()> {
    let new = path.with_extension("new");
    let _ = std::fs::remove_file(&new);
    let made = open(&new).and_then(|db| {
        drop(db);
        Ok(std::fs::rename(&new, path).map_err(any)?)
    });
    if made.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    made
}

impl Journal {
    /// Opens or makes the journal in a directory of mode 0700.
    ///
    /// # Errors
    /// The directory cannot be used, or the file is damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir);
        made.map_err(|e| JournalError::from(redb::Error::Io(e)))?;
        let meta = std::fs::metadata(dir).map_err(|e| JournalError::from(redb::Error::Io(e)))?;
        // Whoever may write it can put an older journal in its place, and tasks would run again.
        crate::owned::check(&meta)
            .map_err(|e| JournalError::Unavailable(format!("{}: {e}", dir.display())))?;
        let mut journal = Self {
            path: dir.join(FILE),
            db: None,
            reserve: Reserve::at(dir.join(RESERVE_FILE)),
        };
        if !std::fs::exists(&journal.path).map_err(any)? {
            make(&journal.path)?;
        }
        journal.db()?;
        // The file's own name must survive a crash too.
        disk::sync_dir(dir).map_err(any)?;
        Ok(journal)
    }

    fn db(&mut self) -> Result<&Database> {
        if self.db.is_none() {
            // One begun anew would not know what has run.
            if !std::fs::exists(&self.path).map_err(any)? {
                return Err(JournalError::Unavailable(format!(
                    "{} is gone since the agent started: put it back, or restart the agent to begin a new one",
                    self.path.display()
                )));
            }
            self.db = Some(open(&self.path)?);
        }
        self.db
            .as_ref()
            .ok_or_else(|| JournalError::Unavailable("not open".into()))
    }

    /// Runs one operation; a failure of the storage below closes the file, so that the next call starts clean.
    fn with<T>(&mut self, operation: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let done = self.db().and_then(operation);
        if matches!(
            done,
            Err(JournalError::NoSpace(_) | JournalError::Unavailable(_))
        ) {
            self.db = None;
        }
        done
    }

    /// How far a task is, if it is known.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn phase(&mut self, id: &TaskId) -> Result<Option<Phase>> {
        self.with(|db| {
            let tx = db.begin_read().map_err(any)?;
            let tasks = tx.open_table(TASKS).map_err(any)?;
            let entry = tasks.get(id).map_err(any)?;
            entry
                .map(|e| decode::<Entry>(e.value()).map(|e| e.phase))
                .transpose()
        })
    }

    /// The goals admitted from a key.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn window(&mut self, key: &[u8]) -> Result<Window> {
        self.with(|db| {
            let tx = db.begin_read().map_err(any)?;
            windows::read(&tx.open_table(WINDOWS).map_err(any)?, key)
        })
    }

    /// Records that a task was accepted and admits its goal; a task that is known already stays as it is.
    ///
    /// # Errors
    /// Full, or its goal was forgotten, or it cannot be written; nothing has changed then.
    pub fn received(&mut self, id: &TaskId, origin: &Origin) -> Result<()> {
        self.with(|db| {
            crash::disk_full(Point::Stored).map_err(any)?;
            let tx = db.begin_write().map_err(any)?;
            windows::admit(&tx, origin)?;
            let (known, count) = {
                let tasks = tx.open_table(TASKS).map_err(any)?;
                let known = tasks.get(id).map_err(any)?.is_some();
                (known, tasks.len().map_err(any)?)
            };
            if !known {
                if count >= JOURNAL_MAX {
                    room::make(&tx, origin)?;
                }
                insert(&tx, id, origin)?;
                windows::set_mark(&tx)?;
            }
            Ok(tx.commit().map_err(any)?)
        })
    }

    /// Holds space for the result, and records that the effect is about to begin.
    ///
    /// # Errors
    /// The task is not in `received`, or it cannot be written, or there is no space for its result. It must not begin then.
    pub fn started(&mut self, id: &TaskId, at_ms: u64) -> Result<()> {
        crash::disk_full(Point::Started).map_err(any)?;
        self.reserve.hold().map_err(any)?;
        self.advance(id, |phase| {
            (*phase == Phase::Received).then_some(Phase::Started { at_ms })
        })
    }

    /// Records that the host has the result, and drops its output. An unknown id is ignored.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn acked(&mut self, id: &TaskId) -> Result<()> {
        match self.phase(id)? {
            Some(Phase::Result(_)) => self.advance(id, |phase| match phase {
                Phase::Result(report) => Some(Phase::Acked(report.outcome)),
                _ => None,
            }),
            _ => Ok(()),
        }
    }

    fn advance(&mut self, id: &TaskId, next: impl FnOnce(&Phase) -> Option<Phase>) -> Result<()> {
        self.with(|db| {
            let tx = db.begin_write().map_err(any)?;
            {
                let mut tasks = tx.open_table(TASKS).map_err(any)?;
                let entry = tasks
                    .get(id)
                    .map_err(any)?
                    .map(|e| decode::<Entry>(e.value()))
                    .transpose()?;
                let mut entry = entry
                    .ok_or_else(|| JournalError::Corrupt("a running task is not in it".into()))?;
                entry.phase = next(&entry.phase).ok_or_else(|| {
                    JournalError::Corrupt(format!("a running task is already {}", entry.phase))
                })?;
                tasks.insert(id, encode(&entry)?.as_slice()).map_err(any)?;
            }
            Ok(tx.commit().map_err(any)?)
        })
    }

    /// Tasks that have started and not ended, with the time of their start: after a start of the agent, the interrupted ones.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn unfinished(&mut self) -> Result<Vec<(TaskId, u64)>> {
        self.collect(|id, phase| match phase {
            Phase::Started { at_ms } => Some((id, at_ms)),
            _ => None,
        })
    }

    /// Results that the host has not acknowledged, oldest first.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn unacknowledged(&mut self) -> Result<Vec<Report>> {
        self.collect(|_, phase| match phase {
            Phase::Result(report) => Some(*report),
            _ => None,
        })
    }

    /// Every key's highest goal and window, read once.
    fn read_windows(&mut self) -> Result<()> {
        self.with(|db| {
            let tx = db.begin_read().map_err(any)?;
            for row in tx.open_table(FLOORS).map_err(any)?.iter().map_err(any)? {
                decode::<Floor>(row.map_err(any)?.1.value())?;
            }
            for row in tx.open_table(WINDOWS).map_err(any)?.iter().map_err(any)? {
                decode::<Window>(row.map_err(any)?.1.value())?;
            }
            Ok(())
        })
    }

    fn collect<T>(&mut self, pick: impl Fn(TaskId, Phase) -> Option<T>) -> Result<Vec<T>> {
        self.with(|db| {
            let tx = db.begin_read().map_err(any)?;
            let tasks = tx.open_table(TASKS).map_err(any)?;
            let order = tx.open_table(ORDER).map_err(any)?;
            let mut found = Vec::new();
            for row in order.iter().map_err(any)? {
                let id = *row.map_err(any)?.1.value();
                let Some(entry) = tasks.get(&id).map_err(any)? else {
                    return Err(JournalError::Corrupt("an ordered task is missing".into()));
                };
                found.extend(pick(id, decode::<Entry>(entry.value())?.phase));
            }
            Ok(found)
        })
    }
}

/// Appends a task that was accepted.
fn insert(tx: &WriteTransaction, id: &TaskId, origin: &Origin) -> Result<()> {
    let mut tasks = tx.open_table(TASKS).map_err(any)?;
    let mut order = tx.open_table(ORDER).map_err(any)?;
    let next = order.last().map_err(any)?.map_or(0, |(k, _)| k.value() + 1);
    let entry = Entry {
        order: next,
        key: origin.key.clone(),
        seq: origin.seq,
        phase: Phase::Received,
    };
    tasks.insert(id, encode(&entry)?.as_slice()).map_err(any)?;
    order.insert(next, id).map_err(any)?;
    Ok(())
}

#[cfg(test)]
mod tests;
