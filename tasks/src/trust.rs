//! Trust documents: which keys guests are to trust from now on, and which no longer, said by a key that they trust as `card`. JSON
//! in a DSSE envelope of its own type, at most [`TRUST_MAX`](crate::dsse::TRUST_MAX) bytes in all.
//!
//! ```json
//! {"version": 1, "sequence": 1795219200, "vm_id": "web-1",
//!  "anchors": ["roles=goal adit-ed25519 BASE64 fleet-2"], "revoked": ["32 hex digits"],
//!  "leaves_no_card_key": true, "not_after": "2027-11-21T22:00:00Z"}
//! ```
//! Without `vm_id` it is for every guest that trusts its signer. `anchors`, `revoked` and `leaves_no_card_key` may be left out.
//! Everything else is required; an unknown or duplicate key anywhere is refused.
//!
//! A document is the whole of what its signer says, and one of a higher sequence replaces it. So nothing is lost where a host
//! delivers the last one only. What was revoked stays revoked, also where a later document does not name it.
//!
//! | file | what |
//! |---|---|
//! | `check` | what is asked of a document before it is taken |
//! | `held` | what was taken, and what it makes of the keys of an image |

mod check;
mod held;

use std::collections::BTreeSet;

use adit_names::VmId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::anchor::{Anchor, AnchorError};
use crate::key::{KeyError, KeyId};
use crate::object::{self, Object};

pub use crate::here::Here;
pub use check::{Proved, TrustError, check};
pub use held::{DOCUMENTS_MAX, Held, REVOKED_MAX, Taken};

/// Version of a document's payload.
pub const VERSION: u64 = 1;
/// Highest sequence: the host's database counts no further.
pub const SEQUENCE_MAX: u64 = i64::MAX as u64;
/// Most anchors of a document.
pub const DOCUMENT_ANCHORS_MAX: usize = 16;
/// Most keys that a document revokes.
pub const DOCUMENT_REVOKED_MAX: usize = 128;

/// Why a signed text is no trust document: the fault of whoever signed it.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// Not the JSON that it should be; says line, column and key.
    #[error("{}", object::shown_plain(.0))]
    Json(#[source] serde_json::Error),
    /// Of a version that this build does not know.
    #[error("`version`: is {0}, and this build knows {VERSION} only")]
    Version(u64),
    /// A sequence that is not counted.
    #[error("`sequence`: must be a whole number from 1 to {SEQUENCE_MAX}, not {0}")]
    Sequence(u64),
    /// More than [`DOCUMENT_ANCHORS_MAX`].
    #[error("`anchors`: has {0} keys, at most {DOCUMENT_ANCHORS_MAX} are allowed")]
    Anchors(usize),
    /// One of `anchors` is none.
    #[error("`anchors[{at}]`: {source}")]
    Anchor {
        /// Which, from 0.
        at: usize,
        /// What is wrong with it.
        source: AnchorError,
    },
    /// More than [`DOCUMENT_REVOKED_MAX`].
    #[error("`revoked`: has {0} keys, at most {DOCUMENT_REVOKED_MAX} are allowed")]
    Revoked(usize),
    /// One of `revoked` is no id of a key.
    #[error("`revoked[{at}]`: {source}")]
    Id {
        /// Which, from 0.
        at: usize,
        /// What is wrong with it.
        source: KeyError,
    },
    /// A key that is named more than once: which of them is meant is not known.
    #[error("the key {0} is named twice")]
    Twice(KeyId),
}

/// A trust document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Counts the documents of a signer, upwards: those for all guests, and those for each VM.
    pub sequence: u64,
    /// The VM that it is for; none: every guest that trusts the signer.
    pub vm_id: Option<VmId>,
    /// Whom to trust besides those of the image.
    pub anchors: Vec<Anchor>,
    /// Whom to trust no longer.
    pub revoked: Vec<KeyId>,
    /// It is meant that no key is left that may sign cards and documents.
    pub leaves_no_card_key: bool,
    /// Not to be taken after. What was taken stays.
    pub not_after: Timestamp,
}

/// As it is written.
#[derive(Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a trust document: an object with the keys `version`, `sequence` and `not_after`"
)]
struct Written {
    version: u64,
    sequence: u64,
    #[serde(
        default,
        deserialize_with = "name",
        skip_serializing_if = "Option::is_none"
    )]
    vm_id: Option<VmId>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    anchors: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    revoked: Vec<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    leaves_no_card_key: bool,
    not_after: Timestamp,
}

/// A name where the key is there: `null` would mean every guest.
fn name<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<VmId>, D::Error> {
    VmId::deserialize(d).map(Some)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for this")]
fn is_false(is: &bool) -> bool {
    !is
}

impl Document {
    /// Parses a payload, signed or to be signed. That it parses says nothing about whether it is true: see [`check`].
    ///
    /// # Errors
    /// It is no trust document.
    pub fn parse(payload: &[u8]) -> Result<Self, FormError> {
        let Object(written): Object<Written> =
            serde_json::from_slice(payload).map_err(FormError::Json)?;
        if written.version != VERSION {
            return Err(FormError::Version(written.version));
        }
        if !(1..=SEQUENCE_MAX).contains(&written.sequence) {
            return Err(FormError::Sequence(written.sequence));
        }
        if written.anchors.len() > DOCUMENT_ANCHORS_MAX {
            return Err(FormError::Anchors(written.anchors.len()));
        }
        if written.revoked.len() > DOCUMENT_REVOKED_MAX {
            return Err(FormError::Revoked(written.revoked.len()));
        }
        let anchors = written.anchors.iter().enumerate().map(|(at, line)| {
            Anchor::parse(line).map_err(|source| FormError::Anchor { at, source })
        });
        let anchors = anchors.collect::<Result<Vec<_>, _>>()?;
        let revoked = written.revoked.iter().enumerate().map(|(at, id)| {
            let id = id.parse();
            id.map_err(|source| FormError::Id { at, source })
        });
        let revoked = revoked.collect::<Result<Vec<KeyId>, _>>()?;
        let mut named = BTreeSet::new();
        let ids = anchors.iter().map(|anchor| anchor.key.id());
        if let Some(twice) = ids
            .chain(revoked.iter().copied())
            .find(|id| !named.insert(*id))
        {
            return Err(FormError::Twice(twice));
        }
        Ok(Self {
            sequence: written.sequence,
            vm_id: written.vm_id,
            anchors,
            revoked,
            leaves_no_card_key: written.leaves_no_card_key,
            not_after: written.not_after,
        })
    }

    /// The bytes to sign.
    pub fn payload(&self) -> Vec<u8> {
        let written = Written {
            version: VERSION,
            sequence: self.sequence,
            vm_id: self.vm_id.clone(),
            anchors: self.anchors.iter().map(ToString::to_string).collect(),
            revoked: self.revoked.iter().map(ToString::to_string).collect(),
            leaves_no_card_key: self.leaves_no_card_key,
            not_after: self.not_after,
        };
        // Texts, numbers and lists of texts always serialise.
        serde_json::to_vec(&written).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
