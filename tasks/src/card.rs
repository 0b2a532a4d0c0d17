//! Cards: who a guest is, said by somebody whom the guest trusts. JSON in a DSSE envelope of its own type, at most
//! [`CARD_MAX`](crate::dsse::CARD_MAX) bytes in all, signed by a key of the role `card`.
//!
//! ```json
//! {"vm_id": "web-1", "generation": 1795219200, "labels": {"env": "prod", "tier": "web"},
//!  "guest_pk": "adit-ed25519 BASE64", "anchors": ["roles=card adit-ed25519 BASE64 next"],
//!  "not_after": "2027-11-21T22:00:00Z"}
//! ```
//! `guest_pk` and `anchors` may be left out. Everything else is required; an unknown or duplicate key anywhere is refused.
//!
//! A card of a higher generation replaces one of a lower, and never the other way round. The anchors that it brings have no
//! role that its signer does not have, so that whoever only makes guests known cannot order anything in them.
//!
//! | file | what |
//! |---|---|
//! | `labels` | what a card says of its VM |
//! | `check` | what guest and host ask of a card before they believe it |
//! | `carried` | the ways on which a card reaches a guest |

mod carried;
mod check;
mod labels;

use adit_names::VmId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::anchor::{Anchor, AnchorError};
use crate::key::{KeyError, PublicKey};
use crate::object::{self, Object};

pub use carried::{
    CarriedError, TEXT_MAX, as_text, from_fields, from_smbios, from_text, from_text_as, text_max,
};
pub use check::{CardError, Proved, check};

pub use crate::here::Here;
pub use labels::{LABELS_MAX, Labels};

/// Most anchors that a card brings.
pub const CARD_ANCHORS_MAX: usize = 4;
/// Highest generation: the host's database counts no further.
pub const GENERATION_MAX: u64 = i64::MAX as u64;

/// Why a signed text is no card: the fault of whoever signed it.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// Not the JSON that it should be; says line, column and key.
    #[error("{}", object::shown_plain(.0))]
    Json(#[source] serde_json::Error),
    /// A generation that is not counted.
    #[error("`generation`: must be a whole number from 1 to {GENERATION_MAX}, not {0}")]
    Generation(u64),
    /// `guest_pk` is no key.
    #[error("`guest_pk`: {0}")]
    GuestKey(#[source] KeyError),
    /// One of `anchors` is none.
    #[error("`anchors[{at}]`: {source}")]
    Anchor {
        /// Which, from 0.
        at: usize,
        /// What is wrong with it.
        source: AnchorError,
    },
    /// More than [`CARD_ANCHORS_MAX`].
    #[error("`anchors`: has {0} keys, at most {CARD_ANCHORS_MAX} are allowed")]
    Anchors(usize),
}

/// A card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Who the guest is.
    pub vm_id: VmId,
    /// Counts the cards of a VM, upwards.
    pub generation: u64,
    /// What the VM is used for.
    pub labels: Labels,
    /// The guest's own key, if whoever signed it knows that key.
    pub guest_pk: Option<PublicKey>,
    /// Whom the guest is to trust besides those of its image.
    pub anchors: Vec<Anchor>,
    /// Not to be believed after.
    pub not_after: Timestamp,
}

/// As it is written.
#[derive(Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a card: an object with the keys `vm_id`, `generation`, `labels` and `not_after`"
)]
struct Written {
    vm_id: VmId,
    generation: u64,
    labels: Labels,
    #[serde(
        default,
        deserialize_with = "text",
        skip_serializing_if = "Option::is_none"
    )]
    guest_pk: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    anchors: Vec<String>,
    not_after: Timestamp,
}

/// A text where the key is there: `null` is refused.
fn text<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    String::deserialize(d).map(Some)
}

impl Card {
    /// Parses a payload, signed or to be signed. That it parses says nothing about whether it is true: see [`check`].
    ///
    /// # Errors
    /// It is no card.
    pub fn parse(payload: &[u8]) -> Result<Self, FormError> {
        let Object(written): Object<Written> =
            serde_json::from_slice(payload).map_err(FormError::Json)?;
        if !(1..=GENERATION_MAX).contains(&written.generation) {
            return Err(FormError::Generation(written.generation));
        }
        if written.anchors.len() > CARD_ANCHORS_MAX {
            return Err(FormError::Anchors(written.anchors.len()));
        }
        let key = written.guest_pk.as_deref().map(PublicKey::parse);
        let anchors = written.anchors.iter().enumerate().map(|(at, line)| {
            Anchor::parse(line).map_err(|source| FormError::Anchor { at, source })
        });
        Ok(Self {
            anchors: anchors.collect::<Result<_, _>>()?,
            guest_pk: key.transpose().map_err(FormError::GuestKey)?,
            vm_id: written.vm_id,
            generation: written.generation,
            labels: written.labels,
            not_after: written.not_after,
        })
    }

    /// The bytes to sign.
    pub fn payload(&self) -> Vec<u8> {
        let written = Written {
            vm_id: self.vm_id.clone(),
            generation: self.generation,
            labels: self.labels.clone(),
            guest_pk: self.guest_pk.as_ref().map(ToString::to_string),
            anchors: self.anchors.iter().map(ToString::to_string).collect(),
            not_after: self.not_after,
        };
        // Texts, numbers and a map with texts as keys always serialise.
        serde_json::to_vec(&written).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
