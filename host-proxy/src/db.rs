//! The database thread: one connection, one writer, many jobs a commit.
//!
//! A job is a closure over the connection. Those that have gathered while the last commit was on its way to the disk run
//! in one transaction, each in a savepoint of its own, and are answered after the commit: an answer means "on disk".

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};
use tokio::sync::oneshot;

/// Jobs in one transaction at most.
const BATCH_MAX: usize = 256;
/// Jobs that wait at most; one more waits outside.
const WAITING_MAX: usize = 1024;
/// How long the database may be locked by somebody else (an operator with `sqlite3`).
const BUSY: Duration = Duration::from_secs(10);

/// Why a job has no answer.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// SQLite says no: disk full, a broken file, …
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
    /// The thread has ended.
    #[error("database is closed")]
    Closed,
}

impl DbError {
    /// What whoever started aditd can do about a database that does not open.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Sqlite(e) if e.sqlite_error_code() == Some(ErrorCode::DiskFull) => {
                "make room there and start again: nothing that was acknowledged is lost"
            }
            Self::Sqlite(e) if e.sqlite_error_code() == Some(ErrorCode::NotADatabase) => {
                "move it away and start again: its queue is lost, no VM is"
            }
            Self::Newer { .. } => {
                "start the newer aditd, or move the file away: its queue is lost, no VM is"
            }
            _ => {
                "look at the disk and at who may write there; a broken file can be moved away: its queue is lost, no VM is"
            }
        }
    }
}

/// Tells a job's owner after the commit.
type Answer = Box<dyn FnOnce(Result<(), String>) + Send>;
/// Without a transaction to be in, a job is not run.
type Job = Box<dyn FnOnce(Result<&Connection, String>) -> Answer + Send>;

/// Handle to the database thread.
#[derive(Clone)]
pub struct Db {
    jobs: SyncSender<Job>,
}

impl Db {
    /// Opens (or makes) the database and starts its thread.
    ///
    /// # Errors
    /// The file cannot be opened, is no database, or is of a newer aditd.
    pub fn open(path: &Path, schema: &str, version: i64) -> Result<Self, DbError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        // WAL and FULL: a commit that returned survives loss of power; readers never wait.
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "cache_size", -2048)?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |r| r.get(0))?;
        if found > version {
            return Err(DbError::Newer {
                path: path.display().to_string(),
                found,
                known: version,
            });
        }
        if found < version {
            connection.execute_batch(&format!(
                "BEGIN IMMEDIATE; {schema} PRAGMA user_version = {version}; COMMIT;"
            ))?;
        }
        let (jobs, receiver) = sync_channel(WAITING_MAX);
        std::thread::Builder::new()
            .name("database".into())
            .spawn(move || run(connection, &receiver))
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
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = match connection {
                Ok(connection) => in_savepoint(connection, job),
                Err(why) => Err(DbError::Commit(why).into()),
            };
            Box::new(move |committed: Result<(), String>| {
                let result = result
                    .and_then(|v| committed.map(|()| v).map_err(|e| DbError::Commit(e).into()));
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

fn run(connection: Connection, jobs: &Receiver<Job>) {
    while let Ok(first) = jobs.recv() {
        if let Err(e) = connection.execute_batch("BEGIN IMMEDIATE") {
            tracing::error!(error = %e, "no transaction to be had");
            first(Err(e.to_string()))(Ok(()));
            continue;
        }
        let mut answers = vec![first(Ok(&connection))];
        // After some errors SQLite has rolled back already. A job after that would be a transaction of its own, on disk
        // although it is answered with an error: it waits for the next one.
        while answers.len() < BATCH_MAX && !connection.is_autocommit() {
            let Ok(job) = jobs.try_recv() else { break };
            answers.push(job(Ok(&connection)));
        }
        let committed = connection
            .execute_batch("COMMIT")
            .map_err(|e| e.to_string());
        if let Err(e) = &committed {
            tracing::error!(error = %e, "commit failed: nothing of it is acknowledged");
            if !connection.is_autocommit()
                && let Err(e) = connection.execute_batch("ROLLBACK")
            {
                tracing::error!(error = %e, "rollback failed");
            }
        }
        for answer in answers {
            answer(committed.clone());
        }
    }
}
