//! Packages: which program a guest's agent is to be, said by a key of the role `agent`. JSON in a DSSE envelope of its own type, at
//! most [`AGENT_MAX`](crate::dsse::AGENT_MAX) bytes in all.
//!
//! ```json
//! {"version": "0.2.0", "architecture": "x86_64", "size": 4800000, "sha256": "64 hex digits",
//!  "oldest_fallback": "0.1.0", "not_after": "2027-11-21T22:00:00Z"}
//! ```
//! All of it is required; an unknown or duplicate key is refused. The program itself is a file of its own with that digest.
//!
//! A package names no VM, so that whoever has it may give it to any. What keeps a host from giving an old one is
//! `oldest_fallback`: once a guest has taken a package, nothing older than that is taken, or gone back to, any more. `not_after`
//! is for taking it: one that was taken runs on.

use jiff::Timestamp;
use semver::Version;
use serde::{Deserialize, Serialize};

use crate::anchor::TrustStore;
use crate::dsse::{Envelope, EnvelopeError, Type, VerifyError};
use crate::key::KeyId;
use crate::object::{self, Object};

/// Most bytes of an agent's program.
pub const SIZE_MAX: u64 = 64 << 20;
/// Most bytes of a version's text.
pub const VERSION_MAX: usize = 64;
/// Most bytes of an architecture's name.
const ARCHITECTURE_MAX: usize = 32;

/// Why a signed text is no package: the fault of whoever signed it.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// Not the JSON that it should be; says line, column and key.
    #[error("{}", object::shown_plain(.0))]
    Json(#[source] serde_json::Error),
    /// A value that has the right type and means nothing.
    #[error("`{key}`: {why}")]
    Value {
        /// Which.
        key: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// A package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// The agent's version.
    pub version: Version,
    /// What it runs on, as `uname -m` says it.
    pub architecture: String,
    /// Bytes of the program.
    pub size: u64,
    /// sha256 of the program.
    pub digest: [u8; 32],
    /// The oldest version that may be taken, or gone back to, from then on.
    pub oldest_fallback: Version,
    /// Not to be taken after.
    pub not_after: Timestamp,
}

/// As it is written.
#[derive(Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a package: an object with the keys `version`, `architecture`, `size`, `sha256`, `oldest_fallback` and `not_after`"
)]
struct Written {
    version: String,
    architecture: String,
    size: u64,
    sha256: String,
    oldest_fallback: String,
    not_after: Timestamp,
}

/// Reads a version in its one spelling: three numbers, and perhaps what comes before a release. No build's name: two builds of
/// one version are told apart by their digests.
///
/// # Errors
/// It is none; says why.
pub fn version(text: &str) -> Result<Version, String> {
    if text.len() > VERSION_MAX {
        return Err(format!("has more than {VERSION_MAX} bytes"));
    }
    let shown = adit_names::escape(text);
    let version = Version::parse(text).map_err(|e| format!("`{shown}` is no version: {e}"))?;
    match version.build.is_empty() {
        true => Ok(version),
        false => Err(format!("`{shown}` names a build, as no version here does")),
    }
}

impl Package {
    /// Parses a payload, signed or to be signed. That it parses says nothing about whether it is trusted: see [`check`].
    ///
    /// # Errors
    /// It is no package.
    pub fn parse(payload: &[u8]) -> Result<Self, FormError> {
        let Object(written): Object<Written> =
            serde_json::from_slice(payload).map_err(FormError::Json)?;
        let value = |key, why: &str| FormError::Value {
            key,
            why: why.into(),
        };
        let version_of = |key, text: &str| version(text).map_err(|why| value(key, &why));
        let named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        let architecture = written.architecture;
        if !(1..=ARCHITECTURE_MAX).contains(&architecture.len()) || !architecture.bytes().all(named)
        {
            let why = format!("must be 1 to {ARCHITECTURE_MAX} of a-z, 0-9 and _");
            return Err(value("architecture", &why));
        }
        if !(1..=SIZE_MAX).contains(&written.size) {
            let why = format!("must be 1 to {SIZE_MAX}, not {}", written.size);
            return Err(value("size", &why));
        }
        let digest = crate::unhex(&written.sha256);
        let digest = digest.ok_or_else(|| value("sha256", "must have 64 digits of 0-9 and a-f"))?;
        let version = version_of("version", &written.version)?;
        let oldest_fallback = version_of("oldest_fallback", &written.oldest_fallback)?;
        if oldest_fallback > version {
            let why = format!("{oldest_fallback} is newer than the version {version} itself");
            return Err(value("oldest_fallback", &why));
        }
        Ok(Self {
            version,
            architecture,
            size: written.size,
            digest,
            oldest_fallback,
            not_after: written.not_after,
        })
    }

    /// The bytes to sign.
    pub fn payload(&self) -> Vec<u8> {
        let written = Written {
            version: self.version.to_string(),
            architecture: self.architecture.clone(),
            size: self.size,
            sha256: crate::hex(&self.digest),
            oldest_fallback: self.oldest_fallback.to_string(),
            not_after: self.not_after,
        };
        // Texts and numbers always serialise.
        serde_json::to_vec(&written).unwrap_or_default()
    }
}

/// Why a package is not taken. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// Not an envelope with a package in it.
    #[error("the package is damaged: {0}")]
    Envelope(#[from] EnvelopeError),
    /// Nobody who may sign it has signed it.
    #[error("the package is not trusted: {0}")]
    Verify(#[from] VerifyError),
    /// What is signed is no package.
    #[error("what is signed is no package: {0}")]
    Form(#[from] FormError),
    /// It is for other machines.
    #[error("the package is for {of}, and this is {here}")]
    Foreign {
        /// What it runs on.
        of: String,
        /// What this is.
        here: String,
    },
    /// Its time is over.
    #[error("the package was to be taken until {not_after}")]
    Expired {
        /// Until then.
        not_after: Timestamp,
    },
}

impl PackageError {
    /// Stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(_) => "agent-damaged",
            Self::Verify(_) => "agent-untrusted",
            Self::Form(_) => "agent-bad",
            Self::Foreign { .. } => "agent-foreign",
            Self::Expired { .. } => "agent-expired",
        }
    }

    /// What to do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Envelope(_) | Self::Form(_) => "make it anew with `adit agent upgrade`",
            Self::Verify(_) => {
                "sign it with a key that is an anchor there with the role `agent`, as `adit key new --role agent` makes it"
            }
            Self::Foreign { .. } => "give it the program for its architecture",
            Self::Expired { .. } => "sign it anew, or set the clock",
        }
    }
}

/// Checks who signed a package, and reads it: what is asked of one whenever it is used.
///
/// # Errors
/// It is not to be used.
pub fn check(
    envelope: &[u8],
    trust: &TrustStore,
    architecture: &str,
) -> Result<(Package, KeyId), PackageError> {
    let verified = Envelope::parse_as(Type::Agent, envelope)?.verify(trust)?;
    let package = Package::parse(verified.payload())?;
    if package.architecture != architecture {
        let (of, here) = (package.architecture, architecture.to_owned());
        return Err(PackageError::Foreign { of, here });
    }
    Ok((package, verified.key()))
}

/// The same, and its time: what is asked of one that comes.
///
/// # Errors
/// It is not taken.
pub fn check_new(
    envelope: &[u8],
    trust: &TrustStore,
    architecture: &str,
    now_ms: i64,
) -> Result<(Package, KeyId), PackageError> {
    let (package, key) = check(envelope, trust, architecture)?;
    if now_ms > package.not_after.as_millisecond() {
        let not_after = package.not_after;
        return Err(PackageError::Expired { not_after });
    }
    Ok((package, key))
}

#[cfg(test)]
mod tests;
