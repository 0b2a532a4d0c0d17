//! What each stream of a client takes, where one connection has many: as much as a connection of its own would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use adit_channel::refusal::Refusal;
use adit_names::VmId;

use super::Whose;
use crate::listen::{Gate, Share, Shares, Slot};

/// A client, whose streams are counted.
pub struct Party {
    whose: Whose,
    /// Of each of these it has a share.
    of: Vec<Arc<Shares<Whose>>>,
    gate: Arc<Gate>,
    /// Whether a stream has what the connection has taken.
    first: Arc<AtomicBool>,
    /// The client speaks TLS with the proxy.
    pub over_tls: bool,
}

/// What a stream has. Dropped: others may have it.
pub struct Turn {
    first: Option<Arc<AtomicBool>>,
    _shares: Vec<Share<Whose>>,
    _slot: Slot,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(first) = &self.first {
            first.store(false, Ordering::Release);
        }
    }
}

impl Party {
    /// A client that has one share of each, and a slot of the gate, by its connection.
    pub fn new(whose: Whose, of: Vec<Arc<Shares<Whose>>>, gate: Arc<Gate>) -> Self {
        Self {
            whose,
            of,
            gate,
            first: Arc::default(),
            over_tls: false,
        }
    }

    /// How many streams it may have at a time, with nothing else open.
    pub fn max(&self) -> usize {
        let of = self.of.iter().map(|shares| shares.max_of(&self.whose));
        of.min().unwrap_or(1)
    }

    /// The other host that it is, if it is one.
    pub fn host(&self) -> Option<&VmId> {
        match &self.whose {
            Whose::Host(host) => Some(host),
            _ => None,
        }
    }

    /// For one more stream of a client that came by way of another host: half of that host's share is the most that one of them has, so
    /// that it leaves something to the others. `weight`: how many times that, as far as the host has as much.
    ///
    /// # Errors
    /// It has that.
    pub fn one_more_of(
        &self,
        host: &VmId,
        client: &str,
        weight: usize,
    ) -> Result<Vec<Share<Whose>>, Refusal> {
        let whose = Whose::Through(host.clone(), client.to_owned());
        let max = (self.max() / 2).max(1).saturating_mul(weight);
        let shares = self
            .of
            .iter()
            .map(|shares| shares.take_of(whose.clone(), max));
        let shares: Option<Vec<_>> = shares.collect();
        shares.ok_or_else(|| {
            Refusal::busy(format!(
                "this client has {max} streams open by way of host `{host}`"
            ))
        })
    }

    /// For one more stream: the first has what the connection has.
    ///
    /// # Errors
    /// The client has its share, or all together have too many.
    pub fn one_more(&self) -> Result<Turn, Refusal> {
        if !self.first.swap(true, Ordering::AcqRel) {
            return Ok(Turn {
                first: Some(self.first.clone()),
                _shares: vec![],
                _slot: None,
            });
        }
        let shares = self.of.iter().map(|shares| shares.take(self.whose.clone()));
        let Some(shares) = shares.collect() else {
            let text = format!(
                "this client has {} connections and streams open",
                self.max()
            );
            return Err(Refusal::busy(text));
        };
        let slot = self.gate.one_more();
        if slot.is_none() {
            return Err(Refusal::busy(
                "the proxy has as many connections and streams as it may",
            ));
        }
        Ok(Turn {
            first: None,
            _shares: shares,
            _slot: slot,
        })
    }
}
