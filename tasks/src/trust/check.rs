//! What a guest asks of a trust document before it takes it, in this order: the envelope's form, the signature of a key with the
//! role `card`, the document's form, the roles of the anchors that it brings, its VM, its time. Then what was taken before
//! ([`Held::take`](super::Held::take)): the sequence, room, and whether a key is left that may sign the next one.

use adit_names::VmId;
use jiff::Timestamp;

use super::{DOCUMENTS_MAX, Document, FormError, REVOKED_MAX};
use crate::anchor::{ANCHORS_MAX, Roles, TrustStore};
use crate::dsse::{Envelope, EnvelopeError, Type, VerifyError};
use crate::here::{Here, shown, wider};
use crate::key::KeyId;

/// A document that a trusted key has signed for this guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proved {
    /// What it says.
    pub document: Document,
    /// Who signed it.
    pub key: KeyId,
    /// sha256 of its payload.
    pub digest: [u8; 32],
}

/// Why a document is not taken. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Not an envelope with a trust document in it.
    #[error("the trust document is damaged: {0}")]
    Envelope(#[from] EnvelopeError),
    /// Nobody who may sign it has signed it.
    #[error("the trust document is not trusted: {0}")]
    Verify(#[from] VerifyError),
    /// What is signed is no trust document.
    #[error("what is signed is no trust document: {0}")]
    Form(#[from] FormError),
    /// It brings an anchor that may more than its signer.
    #[error(
        "the trust document brings a key for `{brings}`, and its signer is trusted for `{signer}` only"
    )]
    Wider {
        /// The anchor's roles.
        brings: Roles,
        /// The signer's.
        signer: Roles,
    },
    /// It is for another VM.
    #[error("the trust document is for {of}, and this is {}", here.as_ref().map_or("nobody", VmId::as_str))]
    Foreign {
        /// Whom it is for.
        of: VmId,
        /// Who this is.
        here: Option<VmId>,
    },
    /// It is too late to take it.
    #[error("the trust document was to be taken until {not_after}, and the clock here says {}", shown(*now_ms))]
    Expired {
        /// Until then it could be taken.
        not_after: Timestamp,
        /// The clock, unix ms.
        now_ms: i64,
    },
    /// A newer one was taken.
    #[error(
        "the trust document has sequence {sequence}, and {held} of its signer was taken before"
    )]
    Old {
        /// Its sequence.
        sequence: u64,
        /// The highest that was taken.
        held: u64,
    },
    /// Another one of the same sequence was taken.
    #[error("another trust document of the sequence {sequence} was taken before")]
    Changed {
        /// The sequence of both.
        sequence: u64,
    },
    /// No key would be left that may sign cards and documents.
    #[error(
        "the trust document leaves no key that may sign cards: nobody could change anything after it"
    )]
    NoCardKey,
    /// More than is kept.
    #[error(
        "there is no room for the trust document: of keys, revoked keys and documents at most {ANCHORS_MAX}, {REVOKED_MAX} and \
         {DOCUMENTS_MAX} are kept"
    )]
    Full,
}

impl TrustError {
    /// Stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(_) => "trust-damaged",
            Self::Verify(_) => "trust-untrusted",
            Self::Form(_) => "trust-bad",
            Self::Wider { .. } => "trust-too-wide",
            Self::Foreign { .. } => "trust-foreign",
            Self::Expired { .. } => "trust-expired",
            Self::Old { .. } => "trust-old",
            Self::Changed { .. } => "trust-changed",
            Self::NoCardKey => "trust-no-card-key",
            Self::Full => "trust-full",
        }
    }

    /// What to do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Envelope(_) | Self::Form(_) => {
                "make it anew with `adit trust change`, and hand it over whole"
            }
            Self::Verify(_) => "sign it with a key that is an anchor there with the role `card`",
            Self::Wider { .. } => "sign it with a key of these roles, or leave the anchor out",
            Self::Foreign { .. } => "apply it to that VM only: --to",
            Self::Expired { .. } => {
                "sign it again with `adit trust change`, which gives it a later time, or set the clock"
            }
            Self::Old { .. } | Self::Changed { .. } => {
                "apply the newest one, or sign the next with `adit trust change`"
            }
            Self::NoCardKey => {
                "have another key of the role `card` sign it, add one first, or say --leave-no-card-key"
            }
            Self::Full => "install the image anew with the keys that it needs",
        }
    }
}

/// Decides whether a document is for this guest, here and now.
///
/// # Errors
/// Why not.
pub fn check(envelope: &[u8], trust: &TrustStore, here: Here<'_>) -> Result<Proved, TrustError> {
    let verified = Envelope::parse_as(Type::Trust, envelope)?.verify(trust)?;
    let document = Document::parse(verified.payload())?;
    let signer = verified.roles();
    if let Some(brings) = wider(&document.anchors, signer) {
        return Err(TrustError::Wider { brings, signer });
    }
    if let Some(of) = &document.vm_id
        && here.vm_id != Some(of)
    {
        let (of, here) = (of.clone(), here.vm_id.cloned());
        return Err(TrustError::Foreign { of, here });
    }
    if here.is_after(document.not_after) {
        let (not_after, now_ms) = (document.not_after, here.now_ms);
        return Err(TrustError::Expired { not_after, now_ms });
    }
    Ok(Proved {
        key: verified.key(),
        digest: verified.digest(),
        document,
    })
}
