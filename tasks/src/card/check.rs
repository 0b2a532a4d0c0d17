//! What guest and host ask of a card before they believe it, in this order: the envelope's form, the signature of a key with the
//! role `card`, the card's form, the roles of the anchors that it brings, its VM, its time. Then its generation
//! ([`Proved::not_before`]), of which whoever checks keeps the highest of each VM.

use adit_names::VmId;
use jiff::Timestamp;

use super::{Card, FormError};
use crate::anchor::{Roles, TrustStore};
use crate::dsse::{Envelope, EnvelopeError, Type, VerifyError};
use crate::here::{Here, shown, wider};
use crate::key::KeyId;

/// A card that is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proved {
    /// What it says.
    pub card: Card,
    /// Who signed it.
    pub key: KeyId,
}

impl Proved {
    /// The card, unless one of a higher generation than its own was believed for its VM: `seen`, 0 for none.
    ///
    /// # Errors
    /// It is an older one.
    pub fn not_before(self, seen: u64) -> Result<Self, CardError> {
        match self.card.generation {
            generation if generation < seen => Err(CardError::Old { generation, seen }),
            _ => Ok(self),
        }
    }
}

/// Why a card is not believed. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// Not an envelope with a card in it.
    #[error("the card is damaged: {0}")]
    Envelope(#[from] EnvelopeError),
    /// Nobody who may sign it has signed it.
    #[error("the card is not trusted: {0}")]
    Verify(#[from] VerifyError),
    /// What is signed is no card.
    #[error("what is signed is no card: {0}")]
    Form(#[from] FormError),
    /// It brings an anchor that may more than its signer.
    #[error("the card brings a key for `{brings}`, and its signer is trusted for `{signer}` only")]
    Wider {
        /// The anchor's roles.
        brings: Roles,
        /// The signer's.
        signer: Roles,
    },
    /// It is another VM's.
    #[error("the card is for {of}, and this is {here}")]
    Foreign {
        /// Whose it is.
        of: VmId,
        /// Who this is.
        here: VmId,
    },
    /// Its time is over.
    #[error("the card was valid until {not_after}, and the clock here says {}", shown(*now_ms))]
    Expired {
        /// Until then it was valid.
        not_after: Timestamp,
        /// The clock, unix ms.
        now_ms: i64,
    },
    /// A newer one was believed.
    #[error("the card has generation {generation}, and one of {seen} was here before")]
    Old {
        /// Its generation.
        generation: u64,
        /// The highest that was believed.
        seen: u64,
    },
}

impl CardError {
    /// Stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Envelope(_) => "card-damaged",
            Self::Verify(_) => "card-untrusted",
            Self::Form(_) => "card-bad",
            Self::Wider { .. } => "card-too-wide",
            Self::Foreign { .. } => "card-foreign",
            Self::Expired { .. } => "card-expired",
            Self::Old { .. } => "card-old",
        }
    }

    /// What to do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Envelope(_) | Self::Form(_) => {
                "make it anew with `adit card new`, and hand it over whole".into()
            }
            Self::Verify(_) => {
                "sign it with a key that is an anchor there with the role `card`".into()
            }
            Self::Wider { .. } => {
                "sign it with a key of these roles, or leave the anchor out".into()
            }
            Self::Foreign { here, .. } => format!("give this VM its own: `adit card new {here}`"),
            Self::Expired { .. } => "sign a new one with `adit card new`, or set the clock".into(),
            Self::Old { seen, .. } => {
                format!("sign a new one: `adit card new --generation {seen}` or higher")
            }
        }
    }
}

/// Decides whether a card is believed here and now.
///
/// # Errors
/// Why not.
pub fn check(envelope: &[u8], trust: &TrustStore, here: Here<'_>) -> Result<Proved, CardError> {
    let verified = Envelope::parse_as(Type::Card, envelope)?.verify(trust)?;
    let card = Card::parse(verified.payload())?;
    let signer = verified.roles();
    if let Some(brings) = wider(&card.anchors, signer) {
        return Err(CardError::Wider { brings, signer });
    }
    if let Some(me) = here.vm_id.filter(|me| **me != card.vm_id) {
        let (of, here) = (card.vm_id, me.clone());
        return Err(CardError::Foreign { of, here });
    }
    if here.is_after(card.not_after) {
        let (not_after, now_ms) = (card.not_after, here.now_ms);
        return Err(CardError::Expired { not_after, now_ms });
    }
    let key = verified.key();
    Ok(Proved { card, key })
}
