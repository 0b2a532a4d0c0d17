//! Back-off for wrong tokens: whoever has shown [`FREE`] of them waits before the next one is looked at, each time twice as long.
//!
//! ```text
//!  wrong tokens   1 … 8    9     10    11    12    13    14    15 …
//!  then wait      none     1 s   2 s   4 s   8 s   16 s  32 s  60 s
//! ```
//! While a client waits, no token of its is looked at, a right one neither: nothing is to be learnt meanwhile. What it is without a
//! token it stays. Somebody else at the same address waits with it, for a minute at most. Pure: time is a parameter.

use std::collections::HashMap;
use std::hash::Hash;

/// Wrong tokens before the first wait: who mistypes one is not kept waiting.
pub const FREE: u32 = 8;
/// Longest wait.
pub const WAIT_MAX_MS: i64 = 60_000;
/// After so long without a wrong token it begins anew.
pub const FORGET_MS: i64 = 600_000;
/// Clients that are remembered at most. Of more, the one whose last wrong token is the oldest is forgotten.
pub const CLIENTS_MAX: usize = 4096;

/// What clients have shown.
#[derive(Clone, Debug)]
pub struct Guesses<K> {
    of: HashMap<K, Wrong>,
}

#[derive(Clone, Copy, Debug)]
struct Wrong {
    count: u32,
    last_ms: i64,
    until_ms: i64,
}

impl<K> Default for Guesses<K> {
    fn default() -> Self {
        Self { of: HashMap::new() }
    }
}

impl<K: Eq + Hash + Clone> Guesses<K> {
    /// How long a client must wait, ms; none: its token is looked at.
    pub fn wait_ms(&self, client: &K, now_ms: i64) -> Option<i64> {
        let left = self.of.get(client)?.until_ms.saturating_sub(now_ms);
        // A clock that was set back makes nobody wait for longer.
        (1..=WAIT_MAX_MS).contains(&left).then_some(left)
    }

    /// A client has shown a wrong one.
    pub fn wrong(&mut self, client: &K, now_ms: i64) {
        let before = self.of.get(client).filter(|wrong| !wrong.is_over(now_ms));
        let count = before.map_or(1, |wrong| wrong.count.saturating_add(1));
        if self.of.len() >= CLIENTS_MAX && !self.of.contains_key(client) {
            self.make_room(now_ms);
        }
        let wait_ms = match count.checked_sub(FREE + 1) {
            None => 0,
            Some(nth) => 1000_i64.saturating_mul(1 << nth.min(16)).min(WAIT_MAX_MS),
        };
        let wrong = Wrong {
            count,
            last_ms: now_ms,
            until_ms: now_ms.saturating_add(wait_ms),
        };
        self.of.insert(client.clone(), wrong);
    }

    fn make_room(&mut self, now_ms: i64) {
        self.of.retain(|_, wrong| !wrong.is_over(now_ms));
        if self.of.len() < CLIENTS_MAX {
            return;
        }
        let oldest = self.of.iter().min_by_key(|(_, wrong)| wrong.last_ms);
        if let Some(oldest) = oldest.map(|(client, _)| client.clone()) {
            self.of.remove(&oldest);
        }
    }
}

impl Wrong {
    fn is_over(&self, now_ms: i64) -> bool {
        // Also where the clock was set back.
        !(0..FORGET_MS).contains(&now_ms.saturating_sub(self.last_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r69_wrong_tokens_make_only_their_client_wait_longer_each_time_and_not_for_ever() {
        let (mut guesses, mut now) = (Guesses::default(), 1_000_000);
        for _ in 0..FREE {
            assert_eq!(guesses.wait_ms(&"a", now), None);
            guesses.wrong(&"a", now);
        }
        assert_eq!(guesses.wait_ms(&"a", now), None);
        let mut waits = Vec::new();
        for _ in 0..8 {
            guesses.wrong(&"a", now);
            let wait = guesses.wait_ms(&"a", now).unwrap();
            assert_eq!(guesses.wait_ms(&"a", now + wait - 1), Some(1));
            waits.push(wait / 1000);
            now += wait;
            assert_eq!(guesses.wait_ms(&"a", now), None);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(guesses.wait_ms(&"b", now), None);
        guesses.wrong(&"a", now + FORGET_MS);
        assert_eq!(guesses.wait_ms(&"a", now + FORGET_MS), None, "begun anew");
    }

    #[test]
    fn r69_guesses_of_many_clients_take_bounded_memory_and_a_set_clock_locks_nobody_out() {
        let mut guesses = Guesses::default();
        for n in 0..20_000_u32 {
            // One of them guesses all the time, and is not forgotten for the others.
            let client = if n % 2 == 0 { 0 } else { n % 20_000 };
            guesses.wrong(&client, i64::from(n / 2));
            assert!(guesses.of.len() <= CLIENTS_MAX);
        }
        assert_eq!(guesses.wait_ms(&0, 9_999), Some(WAIT_MAX_MS));
        assert_eq!(guesses.wait_ms(&0, -1_000_000), None);
        guesses.wrong(&0, -1_000_000);
        assert_eq!(guesses.wait_ms(&0, -1_000_000), None);
    }
}
