//! What a guest asks of a ticket before it believes it, in this order: the envelope's form, the signature of a key with the role `exec`,
//! the ticket's form, its VM, its time, its stream. Then that it was not used before ([`Ledger`](super::Ledger)).
//!
//! The time that counts is [`Ledger::now_ms`](super::Ledger::now_ms), not the clock alone: the host may set that.

use adit_names::VmId;
use jiff::Timestamp;

use super::{FormError, TOLERANCE, Ticket};
use crate::anchor::TrustStore;
use crate::dsse::{Envelope, EnvelopeError, Type, VerifyError};
use crate::here::shown;
use crate::key::KeyId;

/// Where one is checked.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Who the guest is.
    pub vm_id: &'a VmId,
    /// Unix ms.
    pub now_ms: i64,
    /// Hash of the stream's handshake, if it is sealed.
    pub channel: Option<&'a [u8; 32]>,
}

/// A ticket that is believed. It is to be spent before anything is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proved {
    /// What it says.
    pub ticket: Ticket,
    /// Who signed it.
    pub key: KeyId,
}

/// Why a ticket is not believed. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    /// Not an envelope with a ticket in it.
    #[error("the ticket is damaged: {0}")]
    Envelope(#[from] EnvelopeError),
    /// Nobody who may sign it has signed it.
    #[error("the ticket is not trusted: {0}")]
    Verify(#[from] VerifyError),
    /// What is signed is no ticket.
    #[error("what is signed is no ticket: {0}")]
    Form(#[from] FormError),
    /// It is another VM's.
    #[error("the ticket is for {of}, and this is {here}")]
    Foreign {
        /// Whose it is.
        of: VmId,
        /// Who this is.
        here: VmId,
    },
    /// Its time is over.
    #[error("the ticket was valid until {not_after}, and here it is {}", shown(*now_ms))]
    Expired {
        /// Until then it was valid.
        not_after: Timestamp,
        /// The time here, unix ms.
        now_ms: i64,
    },
    /// Its time has not come, by more than clocks may be apart.
    #[error("the ticket is valid from {not_before} on, and here it is {}", shown(*now_ms))]
    NotYet {
        /// From then on it is valid.
        not_before: Timestamp,
        /// The time here, unix ms.
        now_ms: i64,
    },
    /// It leaves something open that the host could choose.
    #[error("{what} needs a sealed stream: no ticket can say all of it")]
    NeedsSeal {
        /// What.
        what: &'static str,
    },
    /// It is for a sealed stream, and this one is not; or the other way round; or for another one.
    #[error("the ticket is for another stream than the one that it came on")]
    OtherStream,
}

impl TicketError {
    /// What to do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Envelope(_) | Self::Form(_) => "sign one with `adit exec --sign`",
            Self::Verify(_) => "sign it with a key that is an anchor there with the role `exec`",
            Self::Foreign { .. } => "sign one for this VM",
            Self::Expired { .. } | Self::NotYet { .. } => {
                "sign a new one, and compare the clocks here and in the guest"
            }
            Self::NeedsSeal { .. } => "give --seal",
            Self::OtherStream => "sign one for each use",
        }
    }
}

/// Decides whether a ticket is believed here and now.
///
/// # Errors
/// Why not.
pub fn check(envelope: &[u8], trust: &TrustStore, here: Here<'_>) -> Result<Proved, TicketError> {
    let verified = Envelope::parse_as(Type::Ticket, envelope)?.verify(trust)?;
    let ticket = Ticket::parse(verified.payload())?;
    if ticket.vm_id != *here.vm_id {
        let (of, here) = (ticket.vm_id, here.vm_id.clone());
        return Err(TicketError::Foreign { of, here });
    }
    let now_ms = here.now_ms;
    if now_ms > ticket.not_after.as_millisecond() {
        let not_after = ticket.not_after;
        return Err(TicketError::Expired { not_after, now_ms });
    }
    let latest = now_ms.saturating_add(tolerance_ms());
    if ticket.not_before.as_millisecond() > latest {
        let not_before = ticket.not_before;
        return Err(TicketError::NotYet { not_before, now_ms });
    }
    if here.channel.is_none()
        && let Some(what) = ticket.verb.unbound()
    {
        return Err(TicketError::NeedsSeal { what });
    }
    if ticket.channel.as_ref() != here.channel {
        return Err(TicketError::OtherStream);
    }
    let key = verified.key();
    Ok(Proved { ticket, key })
}

pub(super) fn tolerance_ms() -> i64 {
    i64::try_from(TOLERANCE.as_millis()).unwrap_or(0)
}
