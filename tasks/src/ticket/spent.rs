//! That each ticket is used once. Whoever keeps a [`Ledger`] on disk does, in this order, what [`Ledger::spend`] says: keeps the floor,
//! forgets, keeps the new one, and only then has something done.
//!
//! | the host | finds |
//! |---|---|
//! | brings a ticket again | its nonce |
//! | brings it again once its nonce was forgotten, with the guest's clock set back | the floor: no ticket that ends before the last forgotten one counts |
//! | keeps a ticket back, and brings it with the guest's clock set back | that it is at least as late as the latest time that a ticket was signed at |

use std::collections::BTreeMap;

use super::check::tolerance_ms;
use super::{Nonce, Ticket};

/// Most tickets that are remembered.
pub const SPENT_MAX: usize = 4096;
/// From so many on those whose time is over are forgotten.
const FORGET_AT: usize = 256;

/// One that was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spent {
    /// It is not valid after, unix ms.
    pub not_after_ms: i64,
    /// Nor before.
    pub not_before_ms: i64,
    /// Which.
    pub nonce: Nonce,
}

/// What is known of those that were forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Floor {
    /// The latest end of one, unix ms.
    pub not_after_ms: i64,
    /// The latest beginning of one.
    pub not_before_ms: i64,
}

/// Why a ticket that is believed is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpentError {
    /// It was.
    #[error("the ticket was used before: each is good for one use")]
    Again,
    /// It may have been.
    #[error("the ticket is from before what is remembered here, and may have been used")]
    Forgotten,
    /// No more can be remembered.
    #[error(
        "{SPENT_MAX} tickets are remembered, and all of them are valid: no other is taken until one has ended"
    )]
    Full,
}

/// All that are remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    floor: Floor,
    spent: BTreeMap<Nonce, Spent>,
}

/// What is to be kept before a ticket is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// First, if it has changed.
    pub floor: Option<Floor>,
    /// Then these may go.
    pub forgotten: Vec<Spent>,
    /// Then this is kept.
    pub spent: Spent,
}

impl Ledger {
    /// As it is on disk.
    pub fn new(floor: Floor, spent: impl IntoIterator<Item = Spent>) -> Self {
        let spent = spent.into_iter().map(|one| (one.nonce, one)).collect();
        Self { floor, spent }
    }

    /// What time it is, at least: the clock, unless a ticket was signed later.
    pub fn now_ms(&self, clock_ms: i64) -> i64 {
        let begun = self.spent.values().map(|one| one.not_before_ms);
        let latest = begun.max().unwrap_or(0).max(self.floor.not_before_ms);
        clock_ms.max(latest.saturating_sub(tolerance_ms()))
    }

    /// Uses a ticket. Nothing has changed here if it is not used; on disk nothing has in either case.
    ///
    /// # Errors
    /// It was used, may have been, or there is no room.
    pub fn spend(&mut self, ticket: &Ticket, now_ms: i64) -> Result<Change, SpentError> {
        let one = Spent {
            not_after_ms: ticket.not_after.as_millisecond(),
            not_before_ms: ticket.not_before.as_millisecond(),
            nonce: ticket.nonce,
        };
        if self.spent.contains_key(&one.nonce) {
            return Err(SpentError::Again);
        }
        if one.not_after_ms <= self.floor.not_after_ms {
            return Err(SpentError::Forgotten);
        }
        let mut forgotten = Vec::new();
        let mut floor = self.floor;
        if self.spent.len() >= FORGET_AT {
            let is_over = |old: &&Spent| old.not_after_ms < now_ms;
            forgotten.extend(self.spent.values().filter(is_over).copied());
            for old in &forgotten {
                floor.not_after_ms = floor.not_after_ms.max(old.not_after_ms);
                floor.not_before_ms = floor.not_before_ms.max(old.not_before_ms);
            }
        }
        if self.spent.len() - forgotten.len() >= SPENT_MAX {
            return Err(SpentError::Full);
        }
        let changed = (floor != self.floor).then_some(floor);
        self.floor = floor;
        for old in &forgotten {
            self.spent.remove(&old.nonce);
        }
        self.spent.insert(one.nonce, one);
        Ok(Change {
            floor: changed,
            forgotten,
            spent: one,
        })
    }
}
