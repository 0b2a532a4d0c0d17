//! Trust anchors: the keys in `trust_dir/*.pub`, each with its roles, read again for every task, so that a key that was added or
//! removed counts from the next task on. The card that a guest goes by may bring more (`enrol`), and trust documents bring and
//! revoke keys (`documents`): what is revoked is no anchor, wherever it comes from.
//!
//! A file that others than its owner may write, or that belongs to neither root nor the agent's user, is no anchor; nor is
//! one with a malformed line. Both are logged and skipped, so that a mistake leaves less trust, never more. Where others may
//! write the directory, or the configuration that names it, nothing in it is an anchor.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use adit_tasks::anchor::AnchorError;
use adit_tasks::card::Proved;
use adit_tasks::trust::Held;
use adit_tasks::{Role, TrustStore};

use crate::config::Config;
use crate::documents;
use crate::enrol::{Enrolment, Fault};
use crate::owned::{self, Writable};

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
    Key(AnchorError),
    #[error("holds no key; make one with `adit key new`")]
    Empty,
    #[error(transparent)]
    Writable(#[from] Writable),
    #[error("is longer than {KEY_FILE_MAX} bytes")]
    TooLong,
    #[error("what was taken of trust documents cannot be read: {0}")]
    Documents(String),
}

/// What the image trusts at one moment.
#[derive(Debug, Default)]
pub struct Anchors {
    /// The trusted keys.
    pub keys: TrustStore,
    /// Those of the image and of the card, also revoked ones.
    pub own: TrustStore,
    /// What was taken of trust documents.
    pub held: Held,
    /// Files that are no anchors, and why.
    pub skipped: Vec<KeyFileError>,
    /// Why nothing is an anchor, whatever `trust_dir` holds.
    pub distrusted: Option<KeyFileError>,
    /// The card that the guest goes by, or why it does not any more.
    pub card: Option<Result<Proved, Fault>>,
}

impl Anchors {
    /// Reads the directory that a configuration names.
    pub fn read(config: &Config) -> Self {
        let mut anchors = Self::default();
        let of_disk = key_files(config).and_then(|files| Ok((files, held(config)?)));
        let (files, held) = match of_disk {
            Ok(both) => both,
            Err(e) => {
                anchors.distrusted = Some(e);
                return anchors;
            }
        };
        for file in files {
            let added = add_file(&mut anchors.own, &file);
            anchors.skipped.extend(added.err());
        }
        anchors.held = held;
        anchors.keys = anchors.held.applied_to(&anchors.own, config.vm_id.as_ref());
        anchors
    }

    /// Checks the card of an enrolment against these keys, and adds those that it brings.
    pub fn with_card(mut self, enrolment: &Enrolment, config: &Config, now_ms: i64) -> Self {
        self.card = enrolment.card_now(config, &self.keys, now_ms);
        if let Some(Ok(proved)) = &self.card {
            for anchor in &proved.card.anchors {
                let added = self.own.add(anchor.clone());
                self.skipped.extend(added.err().map(|e| KeyFileError {
                    file: "the card".into(),
                    why: Why::Key(e),
                }));
            }
            let me = config.vm_id.as_ref().unwrap_or(&proved.card.vm_id);
            self.keys = self.held.applied_to(&self.own, Some(me));
        }
        self
    }

    /// Why it is not known what was taken of trust documents.
    pub fn documents_error(&self) -> Option<&KeyFileError> {
        let is = |e: &&KeyFileError| matches!(e.why, Why::Documents(_));
        self.distrusted.as_ref().filter(is)
    }

    /// How many keys may sign goals.
    pub fn count(&self) -> u16 {
        u16::try_from(self.keys.count(Role::Goal)).unwrap_or(u16::MAX)
    }

    /// Why no key is trusted, for a report.
    pub fn why_none(&self) -> String {
        match (&self.distrusted, self.skipped.first()) {
            (Some(e), _) | (None, Some(e)) => format!("no-trust-anchor: {e}"),
            (None, None) => {
                "no-trust-anchor: this image trusts no key; it was installed without --trust".into()
            }
        }
    }
}

/// Reads a key file that is to be put into an image, once: it may be a pipe. Returns its keys and its text.
///
/// # Errors
/// It holds no usable key, or is longer than what the agent reads.
pub fn check_key(file: &Path) -> Result<(TrustStore, String), KeyFileError> {
    let of = |why| KeyFileError {
        file: file.to_owned(),
        why,
    };
    let mut text = String::new();
    fs::File::open(file)
        .and_then(|open| open.take(KEY_FILE_MAX + 1).read_to_string(&mut text))
        .map_err(|e| of(Why::Read(e)))?;
    if text.len() as u64 > KEY_FILE_MAX {
        return Err(of(Why::TooLong));
    }
    let mut keys = TrustStore::default();
    keys.add_text(&text).map_err(|e| of(Why::Key(e)))?;
    match keys.is_empty() {
        true => Err(of(Why::Empty)),
        false => Ok((keys, text)),
    }
}

/// The files in a directory that may hold keys: `*.pub`, sorted by name.
///
/// # Errors
/// The directory cannot be read.
pub fn pub_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        files.push(entry?.path());
    }
    files.retain(|p| p.extension().is_some_and(|e| e == "pub"));
    files.sort();
    Ok(files)
}

/// The files that may hold anchors.
fn key_files(config: &Config) -> Result<Vec<PathBuf>, KeyFileError> {
    let dir = &config.trust_dir;
    let of = |file: &Path| {
        let file = file.to_owned();
        move |why| KeyFileError { file, why }
    };
    let meta = fs::metadata(&config.path)
        .map_err(Why::Read)
        .map_err(of(&config.path))?;
    owned::check(&meta)
        .map_err(Why::Writable)
        .map_err(of(&config.path))?;
    let meta = match fs::metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        meta => meta.map_err(Why::Read).map_err(of(dir))?,
    };
    owned::check(&meta)
        .map_err(Why::Writable)
        .map_err(of(dir))?;
    pub_files(dir).map_err(Why::Read).map_err(of(dir))
}

/// What was taken of trust documents. Where others may write its directory, they could have removed a revocation.
fn held(config: &Config) -> Result<Held, KeyFileError> {
    let dir = &config.state_dir;
    let of = |file: PathBuf| move |why| KeyFileError { file, why };
    if let Ok(meta) = fs::metadata(dir) {
        let ours = owned::check(&meta).map_err(Why::Writable);
        ours.map_err(of(dir.clone()))?;
    }
    let held = documents::read(dir).map_err(Why::Documents);
    held.map_err(of(dir.join(documents::FILE)))
}

fn add_file(keys: &mut TrustStore, path: &Path) -> Result<(), KeyFileError> {
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
        return Err(of(Why::TooLong));
    }
    // All of a file or nothing of it.
    let mut with = keys.clone();
    let mut text = String::new();
    let read = file.take(KEY_FILE_MAX).read_to_string(&mut text);
    read.map_err(|e| of(Why::Read(e)))?;
    with.add_text(&text).map_err(|e| of(Why::Key(e)))?;
    *keys = with;
    Ok(())
}
