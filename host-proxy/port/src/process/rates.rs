//! The rates of a VM's tunnels, by the keys under which `aditd` has them. No IO.
//!
//! A rate is kept until it says no more than a new one would: whoever opens one connection after the other has one rate with all of
//! them. They are here, and not with `aditd`, so that a tunnel keeps its rate while there is none.

use std::collections::HashMap;

use adit_channel::rate::Rate;
use adit_engine::Tick;

use crate::control::{Limit, LimitKey};

/// Rates that are known at most. Where there is no more room, all others share one.
pub(super) const RATES_MAX: usize = 8192;

/// The rates.
#[derive(Debug, Default)]
pub(super) struct Rates {
    of: HashMap<LimitKey, Rate>,
    others: Option<Rate>,
}

impl Rates {
    /// The rates of a tunnel, with what they say now.
    pub(super) fn of(&mut self, limits: &[Limit], now: Tick) -> Vec<Rate> {
        limits.iter().map(|limit| self.rate(limit, now)).collect()
    }

    fn rate(&mut self, limit: &Limit, now: Tick) -> Rate {
        let per_s = limit.bytes_per_s;
        if !self.of.contains_key(&limit.key) && self.of.len() >= RATES_MAX {
            self.of.retain(|_, rate| !rate.is_idle(now));
        }
        let has_room = self.of.len() < RATES_MAX;
        let rate = match self.of.get(&limit.key) {
            Some(rate) => rate,
            None if has_room => self.of.entry(limit.key).or_insert(Rate::new(per_s)),
            None => self.others.get_or_insert(Rate::new(per_s)),
        };
        rate.change(now, per_s);
        rate.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn limit(nth: u32, bytes_per_s: u64) -> Limit {
        let mut key = [0; 16];
        key[..4].copy_from_slice(&nth.to_le_bytes());
        Limit { key, bytes_per_s }
    }

    #[test]
    fn r110_ever_new_keys_have_one_rate_once_there_is_no_room_and_room_comes_back() {
        let mut rates = Rates::default();
        let now = Tick(5 * S);
        let held: Vec<_> = (0..2 * RATES_MAX as u32)
            .flat_map(|nth| rates.of(&[limit(nth, 1000)], now))
            .collect();
        assert_eq!(rates.of.len(), RATES_MAX);
        drop(held);
        // All of them are as new ones, so that they can be forgotten.
        rates.of(&[limit(u32::MAX, 1000)], now);
        assert_eq!(rates.of.len(), 1);
    }
}
