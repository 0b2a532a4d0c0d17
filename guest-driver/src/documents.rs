//! What this guest has taken of trust documents: `trust.json` in the state directory, which says which keys were revoked for good, and
//! which came in besides those of the image. Read again for every task, as the keys in `trust_dir` are.
//!
//! ```text
//! a place of enrol::places ┐
//! adit-guest trust add     ├─► take: checked, and newer than what its signer said before? ─► on disk ─► counts
//! the host, over its stream┘
//! ```
//! The file is not removed by `adit-guest seal`: a copy must not trust a revoked key again. Where it is damaged, nothing is
//! trusted, for nobody knows then what was revoked.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use adit_tasks::card::{from_text_as, text_max};
use adit_tasks::dsse::{Envelope, Type};
use adit_tasks::trust::{self, Document, Held, TrustError};

use crate::config::Config;
use crate::enrol::kept::replace;
use crate::enrol::{Enrolment, Fault};
use crate::trust::Anchors;
use crate::{clock, enrol};

/// Its name.
pub const FILE: &str = "trust.json";
/// Held while it is read and written again: the agent and `adit-guest trust add` do so at the same time.
const LOCK: &str = "trust.lock";
/// Longest file: as much as is kept, and more than any of it takes.
const FILE_MAX: u64 = 1 << 20;

/// Reads what was taken.
///
/// # Errors
/// It is there, and damaged.
pub fn read(state_dir: &Path) -> Result<Held, String> {
    match read_start(&state_dir.join(FILE), FILE_MAX) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(Held::default())
        }
        Err(e) => Err(e.to_string()),
        Ok(text) => Held::parse(&text),
    }
}

/// Reads a file with a document: its envelope.
///
/// # Errors
/// It cannot be read, or is too long to be one.
pub fn read_file(file: &Path) -> io::Result<Vec<u8>> {
    let text = read_start(file, text_max(Type::Trust) as u64 + 1)?;
    from_text_as(Type::Trust, &text).map_err(io::Error::other)
}

/// At most so many bytes of a file.
fn read_start(file: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(file)?.take(max).read_to_end(&mut text)?;
    Ok(text)
}

/// Takes a document. Returns whether that changed anything.
///
/// # Errors
/// Why not; nothing has changed then.
pub fn take(config: &Config, found: &Enrolment, envelope: &[u8]) -> Result<bool, Fault> {
    let refused = |e: &TrustError| Fault {
        code: e.code(),
        place: "",
        why: e.to_string(),
        remedy: e.remedy().into(),
    };
    let not_kept = |e: &io::Error| Fault {
        code: "trust-not-kept",
        place: "state_dir",
        why: format!("{}: {e}", config.state_dir.display()),
        remedy: "make it writable, and apply the trust document again".into(),
    };
    let _lock = lock(&config.state_dir).map_err(|e| not_kept(&e))?;
    let anchors = Anchors::read(config).with_card(found, config, clock::unix_ms());
    if let Some(e) = &anchors.distrusted {
        return Err(Fault {
            code: "trust-untrusted",
            place: "",
            why: format!("this image trusts nobody: {e}"),
            remedy: "mend that, and apply the trust document again".into(),
        });
    }
    let me = enrol::me(config, anchors.card.as_ref()).ok();
    let here = trust::Here {
        vm_id: me.as_ref(),
        now_ms: clock::unix_ms(),
    };
    let proved = trust::check(envelope, &anchors.keys, here).map_err(|e| refused(&e))?;
    let mut held = anchors.held;
    let taken = held.take(proved, &anchors.own, me.as_ref());
    let changed = taken.map_err(|e| refused(&e))?;
    if changed {
        let written = replace(&config.state_dir.join(FILE), &held.text());
        written.map_err(|e| not_kept(&e))?;
    }
    Ok(changed)
}

/// The same for a document that may have been taken, or replaced, before: that is no fault of a place in which it stays.
///
/// # Errors
/// As [`take`].
pub fn take_again(config: &Config, found: &Enrolment, envelope: &[u8]) -> Result<bool, Fault> {
    match read(&config.state_dir) {
        Ok(held) if is_over(&held, envelope) => Ok(false),
        _ => take(config, found, envelope),
    }
}

/// Whether a document says of itself that nothing of it could be taken any more. It says so unverified, and that changes nothing.
fn is_over(held: &Held, envelope: &[u8]) -> bool {
    let Ok(envelope) = Envelope::parse_as(Type::Trust, envelope) else {
        return false;
    };
    let Some(signer) = envelope.unverified_signer() else {
        return false;
    };
    let digest = envelope.digest();
    let Ok(said) = Document::parse(envelope.unverified_payload()) else {
        return false;
    };
    let its = |t: &&trust::Taken| t.signer == signer && t.vm_id == said.vm_id;
    let newest = held.documents().iter().find(its);
    // Another one of the same sequence is not over, and is refused.
    let is_taken = |t: &trust::Taken| t.sequence == said.sequence && t.digest == digest;
    newest.is_some_and(|t| t.sequence > said.sequence || is_taken(t))
        || held.revoked().any(|(key, _)| *key == signer)
}

fn lock(state_dir: &Path) -> io::Result<File> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let mut dir = fs::DirBuilder::new();
    dir.recursive(true).mode(0o700).create(state_dir)?;
    let mut options = fs::OpenOptions::new();
    let options = options.create(true).truncate(false).write(true);
    let file = options.mode(0o600).open(state_dir.join(LOCK))?;
    file.lock()?;
    Ok(file)
}
