//! The database thread: one connection, one writer, many jobs a commit.
//!
//! A job is a closure over the connection. Those that have gathered while the last commit was on its way to the disk run
//! in one transaction, each in a savepoint of its own, and are answered after the commit: an answer means "on disk".
//!
//! After a commit that failed, nobody knows what is in the kernel's cache and what is on the disk (a failed fsync may drop
//! pages, and the next one may succeed). So it is treated as a crash: the connection is closed, and the file is opened and
//! checked again, as at the start.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension};
use tokio::sync::oneshot;

use crate::disk;

/// Most jobs in one transaction.
const BATCH_MAX: usize = 256;
/// Most jobs in the queue. Whoever has another one waits until there is room.
const WAITING_MAX: usize = 1024;
/// How long the database may be locked by somebody else (an operator with `sqlite3`).
const BUSY: Duration = Duration::from_secs(10);

/// Largest database that is checked whole when it is opened, bytes: one that is larger would keep the host's VMs waiting.
const CHECK_MAX: u64 = 1 << 30;

/// A step of the schema: the one at place N (from 0) brings a database from version N to N + 1.
pub type Migration = fn(&Connection) -> rusqlite::Result<()>;

/// What a database is brought to when it is opened.
#[derive(Debug)]
pub struct Schema {
    /// All steps, the first from nothing. Their number is the version.
    pub migrations: &'static [Migration],
    /// SQL for every connection: what it has in memory, and loses with itself.
    pub session: &'static str,
}

/// Why a job has no answer.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// SQLite reports an error: the disk is full, the file is broken, …
    #[error("database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The transaction that the job was in could not be committed.
    #[error("database: commit failed: {0}")]
    Commit(String),
    /// Made by a newer aditd.
    #[error("{path} has schema {found}, this aditd knows {known}: it was made by a newer one")]
    Newer {
        /// The file.
        path: String,
        /// Its schema.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// A database, and not one of aditd's.
    #[error("{path} is the database of another program: it has tables, but no schema version")]
    Foreign {
        /// The file.
        path: String,
    },
    /// Its pages contradict each other: the disk, or who copied it, has damaged it.
    #[error("{path} is damaged: {found}")]
    Damaged {
        /// The file.
        path: String,
        /// What SQLite's check found first.
        found: String,
    },
    /// The thread has ended.
    #[error("database is closed")]
    Closed,
}

impl DbError {
    /// What whoever started aditd can do about the database at `path`, which does not open.
    pub fn remedy(&self, path: &Path) -> &'static str {
        // Without room, SQLite reports an I/O error for the files beside the database.
        let is_full = path.parent().is_some_and(disk::is_full);
        match self {
            Self::Sqlite(e)
                if e.sqlite_error_code() == Some(ErrorCode::DiskFull)
                    || is_full && e.sqlite_error_code() == Some(ErrorCode::SystemIoFailure) =>
            {
                "the disk is full: make room and start again; nothing that was acknowledged is lost"
            }
            Self::Sqlite(e) if e.sqlite_error_code() == Some(ErrorCode::NotADatabase) => {
                "move it away and start again: its tasks are lost, and the VMs that were added with `adit vm add`"
            }
            Self::Foreign { .. } => "set another state_dir, or move the file away",
            Self::Damaged { .. } => {
                "copy it with its -wal file, then either save what can be read (`sqlite3 FILE .recover | sqlite3 NEW`, \
                 `PRAGMA user_version` as before) or move both away: then its tasks are lost, and the VMs that were added \
                 with `adit vm add`"
            }
            Self::Newer { .. } => {
                "start the newer aditd, or move the file away: then its tasks are lost, and the VMs that were added with `adit vm add`"
            }
            _ => "check the disk, and that aditd may write there",
        }
    }
}

/// Tells a job's owner after the commit.
type Answer = Box<dyn FnOnce(Result<(), String>) + Send>;
/// A job. Where no transaction can be made, it gets the reason in place of the connection.
type Job = Box<dyn FnOnce(Result<&Connection, String>) -> Answer + Send>;

/// Handle to the database thread.
#[derive(Clone)]
pub struct Db {
    jobs: SyncSender<Job>,
}

impl Db {
    /// As [`open_as`](Self::open_as), under its own path.
    ///
    /// # Errors
    /// As there.
    pub fn open(path: &Path, schema: &'static Schema) -> Result<Self, DbError> {
        Self::open_as(path, path, schema)
    }

    /// Opens (or makes) the database, checks it, brings it to the newest schema, and starts its thread. `shown` is its path as
    /// people know it: the worker has another root directory.
    ///
    /// # Errors
    /// The file cannot be opened, is no database, is damaged, or is of a newer aditd. It is left as it was.
    pub fn open_as(path: &Path, shown: &Path, schema: &'static Schema) -> Result<Self, DbError> {
        let connection = prepare(path, shown, schema)?;
        let (jobs, receiver) = sync_channel(WAITING_MAX);
        let (path, shown) = (path.to_owned(), shown.to_owned());
        std::thread::Builder::new()
            .name("database".into())
            .spawn(move || run(connection, &path, &shown, schema, &receiver))
            .map_err(|e| DbError::Commit(e.to_string()))?;
        Ok(Self { jobs })
    }

    /// Runs a job and waits until what it wrote is on disk.
    ///
    /// # Errors
    /// The job failed and was rolled back, or the commit failed.
    pub async fn run<T, E, F>(&self, job: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + From<rusqlite::Error> + Send + 'static,
        F: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    {
        self.run_then(job, |_| {}).await
    }

    /// The same. Once it is on disk, `then` is called on the database's thread: in the order of the jobs, and also where
    /// nobody waits for the answer any more. It must not block.
    ///
    /// # Errors
    /// The job failed and was rolled back, or the commit failed; `then` is not called.
    pub async fn run_then<T, E, F, A>(&self, job: F, then: A) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + From<rusqlite::Error> + Send + 'static,
        F: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
        A: FnOnce(&T) + Send + 'static,
    {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = match connection {
                Ok(connection) => in_savepoint(connection, job),
                Err(why) => Err(DbError::Commit(why).into()),
            };
            Box::new(move |committed: Result<(), String>| {
                let result = result
                    .and_then(|v| committed.map(|()| v).map_err(|e| DbError::Commit(e).into()));
                if let Ok(value) = &result {
                    then(value);
                }
                // Whoever asked may have gone.
                let _ = tell.send(result);
            })
        });
        let jobs = self.jobs.clone();
        // The queue is bounded; a full one is waited for off the runtime's thread.
        let sent = match jobs.try_send(job) {
            Ok(()) => true,
            Err(std::sync::mpsc::TrySendError::Full(job)) => {
                tokio::task::spawn_blocking(move || jobs.send(job).is_ok())
                    .await
                    .unwrap_or(false)
            }
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) => false,
        };
        if !sent {
            return Err(DbError::Closed.into());
        }
        told.await.unwrap_or_else(|_| Err(DbError::Closed.into()))
    }
}

fn in_savepoint<T, E: From<rusqlite::Error>>(
    connection: &Connection,
    job: impl FnOnce(&Connection) -> Result<T, E>,
) -> Result<T, E> {
    connection.execute_batch("SAVEPOINT job")?;
    let result = job(connection);
    connection.execute_batch(match result {
        Ok(_) => "RELEASE job",
        Err(_) => "ROLLBACK TO job; RELEASE job",
    })?;
    result
}

/// Opens the file, and writes nothing to it before it is known to be whole and ours.
pub(in crate::desk) fn prepare(
    path: &Path,
    shown: &Path,
    schema: &Schema,
) -> Result<Connection, DbError> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    let damaged = |e| damaged(e, shown);
    let found = version(&connection, shown, schema)?;
    check(&connection, path)
        .map_err(damaged)?
        .map_or(Ok(()), |found| {
            Err(DbError::Damaged {
                path: shown.display().to_string(),
                found,
            })
        })?;
    // WAL and FULL: a commit that returned survives loss of power; readers never wait.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "cache_size", -2048)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    for (at, migrate) in schema
        .migrations
        .iter()
        .enumerate()
        .skip(usize::try_from(found).unwrap_or(0))
    {
        // All of a step or nothing of it.
        let step = connection.transaction()?;
        migrate(&step)?;
        step.pragma_update(
            None,
            "user_version",
            i64::try_from(at + 1).unwrap_or(i64::MAX),
        )?;
        step.commit()?;
    }
    connection.execute_batch(schema.session)?;
    Ok(connection)
}

/// The schema of a database that this aditd may bring to its own; 0: there is nothing in it.
fn version(connection: &Connection, shown: &Path, schema: &Schema) -> Result<i64, DbError> {
    let damaged = |e| damaged(e, shown);
    let path = || shown.display().to_string();
    let known = i64::try_from(schema.migrations.len()).unwrap_or(i64::MAX);
    let found: i64 = connection
        .pragma_query_value(None, "user_version", |r| r.get(0))
        .map_err(damaged)?;
    if found > known {
        return Err(DbError::Newer {
            path: path(),
            found,
            known,
        });
    }
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))
        .map_err(damaged)?;
    if found <= 0 && tables > 0 {
        return Err(DbError::Foreign { path: path() });
    }
    Ok(found)
}

fn damaged(e: rusqlite::Error, shown: &Path) -> DbError {
    match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt) => DbError::Damaged {
            path: shown.display().to_string(),
            found: e.to_string(),
        },
        _ => e.into(),
    }
}

/// Says whether this aditd would take the database, and changes nothing: another one may run on it. That there is none is fine.
///
/// # Errors
/// As [`Db::open`], but for what only a check of the whole file finds.
pub fn would_take(path: &Path, schema: &Schema) -> Result<(), DbError> {
    if matches!(path.try_exists(), Ok(false)) {
        return Ok(());
    }
    // What has a meaning of its own in a URI.
    let escaped = path.display().to_string().replace('%', "%25");
    let mut uri = format!("file:{}", escaped.replace('?', "%3f").replace('#', "%23"));
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    // Without this file nobody has the database open, and SQLite would make one to read it.
    if matches!(Path::new(&log).try_exists(), Ok(false)) {
        uri.push_str("?immutable=1");
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(uri, flags)?;
    connection.busy_timeout(BUSY)?;
    version(&connection, path, schema).map(drop)
}

/// Returns what is wrong with the file, if something is.
fn check(connection: &Connection, path: &Path) -> rusqlite::Result<Option<String>> {
    let len = std::fs::metadata(path).map_or(0, |m| m.len());
    if len > CHECK_MAX {
        tracing::warn!(path = %path.display(), len, "too large to be checked at the start: `sqlite3 FILE 'PRAGMA integrity_check'` does");
        return Ok(None);
    }
    let said: String = connection.query_row("PRAGMA integrity_check(1)", [], |r| r.get(0))?;
    if said != "ok" {
        return Ok(Some(said));
    }
    let orphan = connection.query_row("PRAGMA foreign_key_check", [], |r| r.get::<_, String>(0));
    Ok(orphan
        .optional()?
        .map(|table| format!("a row of `{table}` refers to one that does not exist")))
}

fn run(connection: Connection, path: &Path, shown: &Path, schema: &Schema, jobs: &Receiver<Job>) {
    let mut open = Some(connection);
    while let Ok(first) = jobs.recv() {
        let connection = match open.take().map_or_else(|| prepare(path, shown, schema), Ok) {
            Ok(connection) => connection,
            Err(e) => {
                tracing::error!(error = %e, remedy = e.remedy(path), "the database cannot be opened");
                first(Err(e.to_string()))(Ok(()));
                continue;
            }
        };
        if batch(&connection, first, jobs) {
            open = Some(connection);
        } else if let Err((_, e)) = connection.close() {
            tracing::error!(error = %e, "cannot close the database");
        } else {
            tracing::warn!("the database is opened and checked again");
        }
    }
}

/// Runs the jobs that wait in one transaction. Returns whether the connection is still to be trusted.
fn batch(connection: &Connection, first: Job, jobs: &Receiver<Job>) -> bool {
    if let Err(e) = connection.execute_batch("BEGIN IMMEDIATE") {
        tracing::error!(error = %e, "cannot begin a transaction");
        first(Err(e.to_string()))(Ok(()));
        return e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy);
    }
    let mut answers = vec![first(Ok(connection))];
    // After some errors SQLite has rolled back already. A job after that would be a transaction of its own, on disk
    // although it is answered with an error: it waits for the next one.
    while answers.len() < BATCH_MAX && !connection.is_autocommit() {
        let Ok(job) = jobs.try_recv() else { break };
        answers.push(job(Ok(connection)));
    }
    // A transaction that has ended before its commit was rolled back by SQLite, and the job that failed knows.
    let is_open = !connection.is_autocommit();
    let committed = connection.execute_batch("COMMIT");
    let mut trusted = true;
    if let Err(e) = &committed {
        tracing::error!(error = %e, "commit failed: its jobs are answered with an error");
        // A full disk leaves no doubt about what was written.
        trusted = !is_open || e.sqlite_error_code() == Some(ErrorCode::DiskFull);
        if !connection.is_autocommit()
            && let Err(e) = connection.execute_batch("ROLLBACK")
        {
            tracing::error!(error = %e, "rollback failed");
            trusted = false;
        }
    }
    let committed = committed.map_err(|e| e.to_string());
    for answer in answers {
        answer(committed.clone());
    }
    trusted
}
