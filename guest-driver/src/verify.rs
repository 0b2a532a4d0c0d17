//! What this image trusts, and the check of a task against it.
//!
//! Trust anchors are the keys in `trust_dir/*.pub`. A file that others than its owner may write, or that belongs to
//! neither root nor the agent's user, is no anchor; nor is one with a malformed line. Both are said and skipped, so that
//! a mistake leaves less trust, never more. Where others may write the directory, or the configuration that names it,
//! nothing in it is an anchor.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use adit_tasks::admit::{History, LastGoal};
use adit_tasks::key::KeyError;
use adit_tasks::wire::{Outcome, Report, Task, TaskId};
use adit_tasks::{Admitted, KeyId, TrustStore, VmId, admit};

use crate::config::Config;
use crate::journal::{Journal, JournalError, Phase};
use crate::owned::{self, Writable};
use crate::{clock, log};

/// Longest key file.
const KEY_FILE_MAX: u64 = 64 * 1024;

/// Why a key file is no trust anchor. The fault of whoever made the image.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", file.display())]
pub struct KeyFileError {
    file: PathBuf,
    why: Why,
}

#[derive(Debug, thiserror::Error)]
enum Why {
    #[error("cannot be read: {0}")]
    Read(io::Error),
    #[error("is not a regular file")]
    Kind,
    #[error("{0}")]
    Key(KeyError),
    #[error("holds no key; make one with `adit key new`")]
    Empty,
    #[error(transparent)]
    Writable(#[from] Writable),
    #[error("{len} bytes, at most {KEY_FILE_MAX} are read")]
    TooLong { len: u64 },
}

/// Why a task may not run here and now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It never may; begins with a stable code.
    Refused(String),
    /// It may later.
    NotYet {
        /// From this time on, unix ms.
        not_before_ms: u64,
        /// Begins with a stable code.
        text: String,
    },
}

impl From<String> for Denied {
    fn from(why: String) -> Self {
        Self::Refused(why)
    }
}

/// Checks tasks.
pub struct Verifier {
    trust: TrustStore,
    /// Why there is no anchor, whatever `trust_dir` holds.
    distrusted: Option<KeyFileError>,
    vm_id: VmId,
}

impl Verifier {
    /// Reads the anchors of the image.
    pub fn load(config: &Config) -> Self {
        let mut trust = TrustStore::default();
        let distrusted = match key_files(config) {
            Ok(files) => {
                for file in files {
                    if let Err(e) = add_file(&mut trust, &file) {
                        log::event("anchor-skipped", &[("error", &e)]);
                    }
                }
                None
            }
            Err(e) => {
                log::event("anchors-skipped", &[("error", &e)]);
                Some(e)
            }
        };
        Self {
            trust,
            distrusted,
            vm_id: config.vm_id.clone(),
        }
    }

    /// Why no key is trusted, for a report.
    pub fn why_no_anchor(&self) -> String {
        match &self.distrusted {
            Some(e) => format!("no-trust-anchor: {e}"),
            None => {
                "no-trust-anchor: this image trusts no key; it was installed without --trust".into()
            }
        }
    }

    /// Checks a key file before it is put into an image.
    ///
    /// # Errors
    /// It holds no usable key.
    pub fn check_key(file: &Path) -> Result<(), KeyFileError> {
        let of = |why| KeyFileError {
            file: file.to_owned(),
            why,
        };
        let text = fs::read_to_string(file).map_err(|e| of(Why::Read(e)))?;
        let mut trust = TrustStore::default();
        trust.add_text(&text).map_err(|e| of(Why::Key(e)))?;
        if trust.is_empty() {
            Err(of(Why::Empty))
        } else {
            Ok(())
        }
    }

    /// The id that this image was enrolled with.
    pub fn vm_id(&self) -> &VmId {
        &self.vm_id
    }

    /// How many keys are trusted.
    pub fn anchors(&self) -> u16 {
        u16::try_from(self.trust.len()).unwrap_or(u16::MAX)
    }

    /// Decides whether a task may run here and now. `unsaved`: a result that the journal could not take.
    ///
    /// # Errors
    /// Why not.
    pub fn verify(
        &self,
        task: &Task,
        journal: &mut Journal,
        unsaved: Option<&Report>,
    ) -> Result<Admitted, Denied> {
        let now = i64::try_from(clock::now_ms()).unwrap_or(i64::MAX);
        let past = Past {
            journal: RefCell::new(journal),
            unsaved,
            failed: Cell::new(None),
        };
        let admitted = admit(task, &self.trust, &self.vm_id, now, &past);
        match past.failed.take() {
            // What could not be read might have said no.
            Some(e) => Err(e.to_string().into()),
            None => admitted.map_err(|denial| match denial.not_before_ms {
                Some(ms) => Denied::NotYet {
                    not_before_ms: u64::try_from(ms).unwrap_or(0),
                    text: denial.to_string(),
                },
                None => denial.to_string().into(),
            }),
        }
    }
}

/// The files that may hold anchors.
fn key_files(config: &Config) -> Result<Vec<PathBuf>, KeyFileError> {
    let dir = &config.trust_dir;
    let of = |file: &Path| {
        let file = file.to_owned();
        move |why| KeyFileError { file, why }
    };
    if let Some((file, writable)) = &config.writable {
        return Err(of(file)(Why::Writable(*writable)));
    }
    let meta = match fs::metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        meta => meta.map_err(Why::Read).map_err(of(dir))?,
    };
    owned::check(&meta)
        .map_err(Why::Writable)
        .map_err(of(dir))?;
    let entries = fs::read_dir(dir).map_err(Why::Read).map_err(of(dir))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "pub"));
    files.sort();
    Ok(files)
}

fn add_file(trust: &mut TrustStore, path: &Path) -> Result<(), KeyFileError> {
    let of = |why| KeyFileError {
        file: path.to_owned(),
        why,
    };
    // Opened once, so that what is checked is what is read; a fifo is not waited for.
    let mut options = fs::OpenOptions::new();
    let options = options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(|e| of(Why::Read(e)))?;
    let meta = file.metadata().map_err(|e| of(Why::Read(e)))?;
    if !meta.is_file() {
        return Err(of(Why::Kind));
    }
    owned::check(&meta).map_err(|e| of(e.into()))?;
    if meta.len() > KEY_FILE_MAX {
        return Err(of(Why::TooLong { len: meta.len() }));
    }
    // All of a file or nothing of it.
    let mut with = trust.clone();
    let mut text = String::new();
    let read = file.take(KEY_FILE_MAX).read_to_string(&mut text);
    read.map_err(|e| of(Why::Read(e)))?;
    with.add_text(&text).map_err(|e| of(Why::Key(e)))?;
    *trust = with;
    Ok(())
}

/// The journal as `admit` asks it.
struct Past<'j> {
    journal: RefCell<&'j mut Journal>,
    unsaved: Option<&'j Report>,
    failed: Cell<Option<JournalError>>,
}

impl Past<'_> {
    fn ask<T>(&self, answer: Result<Option<T>, JournalError>) -> Option<T> {
        answer.unwrap_or_else(|e| {
            self.failed.set(Some(e));
            None
        })
    }
}

impl History for Past<'_> {
    fn last_goal(&self, key: &KeyId) -> Option<LastGoal> {
        let floor = self.journal.borrow_mut().floor(&key.0);
        self.ask(floor)
            .map(|(key_seq, digest)| LastGoal { key_seq, digest })
    }

    /// As the agent reports it when it is asked again.
    fn outcome(&self, task: &TaskId) -> Option<Outcome> {
        if let Some(report) = self.unsaved.filter(|r| r.task_id == *task) {
            return Some(report.outcome);
        }
        let phase = self.journal.borrow_mut().phase(task);
        match self.ask(phase)? {
            Phase::Result(report) => Some(report.outcome),
            Phase::Acked(outcome) => Some(outcome),
            // One task runs at a time: this one has ended, and its result could not be stored.
            Phase::Started { .. } => Some(Outcome::Interrupted),
            Phase::Received => None,
        }
    }

    fn begun(&self, task: &TaskId) -> bool {
        self.outcome(task).is_some()
    }
}
