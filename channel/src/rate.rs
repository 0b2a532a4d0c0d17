//! How many bytes a second streams may carry: a bucket for each direction, which any number of streams share.
//!
//! ```text
//!            now − 1 s                  now                      next
//!  ─────────────┼───────────────────────┼──────────────────────────┼──► time
//!               └── what was saved: at most a second's bytes        └── the next bytes that are asked for move then
//! ```
//! A stream asks for one chunk at a time, and gets the time from which these bytes may move. `next` then is behind them. So
//! streams that wait have their turns in the order in which they asked, and none of them gets a second chunk before another one
//! has had its first. What a stream did not use after all is given back.
//!
//! Rules: [`Bucket`] is pure, the caller passes the time. In any time T no more moves than `per_s · (T + 1 s)` and one chunk.
//! The directions are counted apart, as in `proxy_upload_rate` of nginx, `bwlim-in` of HAProxy, Envoy's `bandwidth_limit` and
//! Firecracker's rate limiter.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adit_engine::Tick;

/// Bytes that are asked for at once, at least: fewer would cost a system call for each few bytes.
pub const CHUNK_MIN: u32 = 1 << 10;
/// Bytes that are asked for at once, at most: what a stream may hold at most anyway.
pub const CHUNK_MAX: u32 = 256 << 10;
/// Chunks of a second, as far as the bounds allow: so often a stream wakes up that nobody shares a rate with.
const CHUNKS_A_SECOND: u64 = 100;
/// What was not used is saved for so long, ns.
const SAVED_NS: i64 = SECOND_NS;
const SECOND_NS: i64 = 1_000_000_000;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// To the guest.
    In,
    /// From the guest.
    Out,
}

/// A bucket.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_s: u64,
    /// When the next bytes may move, ns. Long ago: the bucket is full.
    next: i64,
}

impl Bucket {
    /// Makes a full one. A rate of 0 is one of 1.
    pub fn full(per_s: u64) -> Self {
        Self {
            per_s: per_s.max(1),
            next: i64::MIN,
        }
    }

    /// Bytes to ask for at once, at most.
    pub fn chunk(&self) -> u32 {
        let chunk = self.per_s / CHUNKS_A_SECOND;
        let chunk = u32::try_from(chunk).unwrap_or(CHUNK_MAX);
        chunk.clamp(CHUNK_MIN, CHUNK_MAX)
    }

    /// Takes `bytes`. They may move from the time that it returns, which may be over.
    #[must_use]
    pub fn take(&mut self, now: Tick, bytes: u32) -> Tick {
        let start = self.next.max(ns(now) - SAVED_NS);
        let cost = self.cost(bytes.into(), true);
        self.next = start.saturating_add(cost);
        Tick(u64::try_from(start).unwrap_or(0))
    }

    /// Gives back what was taken and not used.
    pub fn give_back(&mut self, bytes: u32) {
        let cost = self.cost(bytes.into(), false);
        self.next = self.next.saturating_sub(cost);
    }

    /// Changes the rate. What waits, waits as many bytes as before.
    pub fn change(&mut self, now: Tick, per_s: u64) {
        let per_s = per_s.max(1);
        if per_s == self.per_s {
            return;
        }
        let waits_ns = self.next.saturating_sub(ns(now)).max(0);
        let bytes = i128::from(waits_ns) * i128::from(self.per_s) / i128::from(SECOND_NS);
        self.per_s = per_s;
        if waits_ns > 0 {
            let bytes = u64::try_from(bytes).unwrap_or(0);
            self.next = ns(now).saturating_add(self.cost(bytes, true));
        }
    }

    /// Whether it says no more than one that is not there.
    pub fn is_full(&self, now: Tick) -> bool {
        self.next <= ns(now) - SAVED_NS
    }

    /// How long so many bytes take, ns.
    fn cost(&self, bytes: u64, is_rounded_up: bool) -> i64 {
        let (all, per_s) = (u128::from(bytes) * SECOND_NS as u128, self.per_s.into());
        let cost = match is_rounded_up {
            true => all.div_ceil(per_s),
            false => all / per_s,
        };
        i64::try_from(cost).unwrap_or(i64::MAX)
    }
}

fn ns(time: Tick) -> i64 {
    i64::try_from(time.0).unwrap_or(i64::MAX)
}

/// The rate of some streams: that of one client, or of a whole VM. A clone is the same rate.
#[derive(Clone, Debug)]
pub struct Rate(Arc<Mutex<[Bucket; 2]>>);

impl Rate {
    /// So many bytes a second, in each direction.
    pub fn new(per_s: u64) -> Self {
        Self(Arc::new(Mutex::new([Bucket::full(per_s); 2])))
    }

    /// Changes the rate.
    pub fn change(&self, now: Tick, per_s: u64) {
        for bucket in &mut *self.lock() {
            bucket.change(now, per_s);
        }
    }

    /// Whether it can be forgotten: no stream has it, and it says no more than a new one.
    pub fn is_idle(&self, now: Tick) -> bool {
        Arc::strong_count(&self.0) == 1 && self.lock().iter().all(|bucket| bucket.is_full(now))
    }

    fn chunk(&self) -> u32 {
        self.lock()[0].chunk()
    }

    fn take(&self, now: Tick, way: Way, bytes: u32) -> Tick {
        self.lock()[way as usize].take(now, bytes)
    }

    fn give_back(&self, way: Way, bytes: u32) {
        if bytes > 0 {
            self.lock()[way as usize].give_back(bytes);
        }
    }

    fn lock(&self) -> MutexGuard<'_, [Bucket; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What limits one stream: all of some rates. Pure, apart from the rates that it shares.
///
/// ```text
///           may: not yet                      release, at that time
///  Free ───────────────────► Until(time, n) ────────────────────────► Granted(n) ── may ──► Free
/// ```
#[derive(Debug)]
pub(crate) struct Limit {
    rates: Vec<Rate>,
    waits: [Waits; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    Free,
    /// So many bytes may move then.
    Until(Tick, u32),
    /// So many bytes may move.
    Granted(u32),
}

impl Limit {
    /// None: nothing limits it.
    pub(crate) fn new(rates: Vec<Rate>) -> Option<Box<Self>> {
        let waits = [Waits::Free; 2];
        (!rates.is_empty()).then(|| Box::new(Self { rates, waits }))
    }

    /// How many of `want` bytes may move now. If none may, [`until`](Self::until) says when.
    pub(crate) fn may(&mut self, now: Tick, way: Way, want: u32) -> u32 {
        match self.waits[way as usize] {
            Waits::Until(..) => 0,
            Waits::Granted(granted) => {
                let n = granted.min(want);
                self.waits[way as usize] = Waits::Free;
                self.unused(way, granted - n);
                n
            }
            Waits::Free if want == 0 => 0,
            Waits::Free => {
                let chunk = self.rates.iter().map(Rate::chunk).min();
                let n = want.min(chunk.unwrap_or(want));
                let times = self.rates.iter().map(|rate| rate.take(now, way, n));
                match times.max() {
                    Some(at) if at > now => {
                        self.waits[way as usize] = Waits::Until(at, n);
                        0
                    }
                    _ => n,
                }
            }
        }
    }

    /// So many of the bytes that might move did not.
    pub(crate) fn unused(&self, way: Way, bytes: u32) {
        for rate in &self.rates {
            rate.give_back(way, bytes);
        }
    }

    /// Counts bytes that move whatever the rate is: others wait for them.
    pub(crate) fn charge(&self, now: Tick, way: Way, bytes: u32) {
        for rate in &self.rates {
            let _ = rate.take(now, way, bytes);
        }
    }

    /// Until when nothing may move.
    pub(crate) fn until(&self, way: Way) -> Option<Tick> {
        match self.waits[way as usize] {
            Waits::Until(at, _) => Some(at),
            Waits::Free | Waits::Granted(_) => None,
        }
    }

    /// Its time has come, if it has. Returns whether it waited for that.
    pub(crate) fn release(&mut self, now: Tick, way: Way) -> bool {
        match self.waits[way as usize] {
            Waits::Until(at, n) if at <= now => {
                self.waits[way as usize] = Waits::Granted(n);
                true
            }
            _ => false,
        }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        for way in [Way::In, Way::Out] {
            if let Waits::Until(_, n) | Waits::Granted(n) = self.waits[way as usize] {
                self.unused(way, n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: u64 = SECOND_NS as u64;

    /// Virtual time: streams that always have bytes, each with its limit. Returns what each has moved by `end`, after `see` saw
    /// each move.
    fn run(
        limits: &mut [Box<Limit>],
        from: u64,
        end: u64,
        mut see: impl FnMut(usize, u64, u32),
    ) -> Vec<u64> {
        let mut moved = vec![0; limits.len()];
        let mut now = from;
        loop {
            for (n, limit) in limits.iter_mut().enumerate() {
                limit.release(Tick(now), Way::Out);
                loop {
                    let bytes = limit.may(Tick(now), Way::Out, u32::MAX);
                    if bytes == 0 {
                        break;
                    }
                    moved[n] += u64::from(bytes);
                    see(n, now, bytes);
                }
            }
            let next = limits.iter().filter_map(|limit| limit.until(Way::Out));
            // The kernel's timer ends up to a millisecond too late.
            now = next.min().unwrap().0 + 999_999;
            if now > end {
                return moved;
            }
        }
    }

    fn limits<const N: usize>(rates: [&[&Rate]; N]) -> [Box<Limit>; N] {
        rates.map(|rates| Limit::new(rates.iter().copied().cloned().collect()).unwrap())
    }

    #[test]
    fn a_stream_has_its_rate_and_what_it_saved_for_a_second_and_no_more() {
        for per_s in [1024, 100_000, 1 << 20, 125_000_000, 12_500_000_000] {
            let rate = Rate::new(per_s);
            let moved = run(&mut limits([&[&rate]]), 0, 10 * S, |_, _, _| {})[0];
            let chunk = u64::from(rate.chunk());
            let most = 11 * per_s + chunk;
            assert!(moved <= most, "{per_s}: {moved} of {most}");
            // Neither rounding to whole ns nor a timer that is late costs it a thousandth
            // (firecracker-microvm/firecracker#6212).
            assert!(moved >= most - most / 1000 - 2 * chunk, "{per_s}: {moved}");
        }
    }

    #[test]
    fn streams_that_share_a_rate_have_the_same_of_it_and_come_in_turn() {
        let rate = Rate::new(100_000);
        let mut last = [0_u64; 3];
        let mut longest = 0;
        let moved = run(&mut limits([&[&rate]; 3]), 5 * S, 65 * S, |n, now, _| {
            if last[n] > 0 {
                longest = longest.max(now - last[n]);
            }
            last[n] = now;
        });
        let chunk = u64::from(rate.chunk());
        // The first took what was saved; from then on they take turns.
        assert!(moved[1].abs_diff(moved[2]) <= chunk && moved[0] - moved[1] <= 100_000 + chunk);
        // Once what was saved is gone, nobody waits longer than for a chunk of each.
        assert!(longest <= 4 * (chunk * S / 100_000), "{longest}");
    }

    #[test]
    fn r110_one_that_comes_later_waits_for_one_chunk_of_each_and_not_for_all_they_have() {
        let rate = Rate::new(100_000);
        let mut greedy = limits([&[&rate]; 8]);
        run(&mut greedy, 5 * S, 30 * S, |_, _, _| {});
        let [mut late] = limits([&[&rate]]);
        let now = Tick(30 * S);
        assert_eq!(late.may(now, Way::Out, 100), 0);
        let waits = late.until(Way::Out).unwrap().0 - now.0;
        assert!(
            waits <= 9 * u64::from(rate.chunk()) * S / 100_000,
            "{waits}"
        );
        // The other direction is counted apart.
        assert_eq!(late.may(now, Way::In, 100), 100);
    }

    #[test]
    fn all_rates_of_a_stream_hold_and_who_has_used_up_its_own_leaves_the_others_theirs() {
        let (whole, one, other) = (Rate::new(1 << 20), Rate::new(10_000), Rate::new(1 << 30));
        let mut both = limits([&[&one, &whole], &[&other, &whole]]);
        let moved = run(&mut both, 5 * S, 15 * S, |_, _, _| {});
        assert!(moved[0] <= 11 * 10_000 + 1024, "{moved:?}");
        assert!(moved[1] > 10 * (1 << 20), "{moved:?}");
        assert!(
            moved[0] + moved[1] <= 11 * (1 << 20) + 2 * 10_485,
            "{moved:?}"
        );
    }

    #[test]
    fn what_was_not_used_is_given_back_and_what_ends_leaves_nothing_taken() {
        let rate = Rate::new(10_000);
        let now = Tick(5 * S);
        for _ in 0..1000 {
            let mut limit = Limit::new(vec![rate.clone()]).unwrap();
            // It may move, and there was nothing.
            let n = limit.may(now, Way::In, 1000);
            assert_eq!(n, 1000);
            limit.unused(Way::In, n);
        }
        let mut first = Limit::new(vec![rate.clone()]).unwrap();
        while first.may(now, Way::In, 1000) > 0 {}
        let at = first.until(Way::In).unwrap();
        for _ in 0..1000 {
            let mut waits = Limit::new(vec![rate.clone()]).unwrap();
            assert_eq!(waits.may(now, Way::In, 1000), 0);
        }
        assert!(first.release(at, Way::In) && !first.release(at, Way::In));
        assert_eq!(first.may(at, Way::In, 300), 300);
        assert!(!rate.is_idle(Tick(100 * S)), "somebody has it");
        drop(first);
        assert!(!rate.is_idle(now) && rate.is_idle(Tick(100 * S)));
    }

    #[test]
    fn a_rate_that_is_changed_counts_at_once() {
        let rate = Rate::new(1024);
        let mut slow = limits([&[&rate]; 2]);
        run(&mut slow, 5 * S, 8 * S, |_, _, _| {});
        let now = Tick(8 * S);
        drop(slow);
        rate.change(now, 1 << 20);
        let mut fast = limits([&[&rate]]);
        let moved = run(&mut fast, now.0, now.0 + S, |_, _, _| {})[0];
        assert!(moved + 2 * u64::from(rate.chunk()) >= 1 << 20, "{moved}");
        drop(fast);
        rate.change(Tick(9 * S), 1024);
        let mut slow = limits([&[&rate]]);
        // What a stream was given ahead is not lost.
        let moved = run(&mut slow, 9 * S, 19 * S, |_, _, _| {})[0];
        assert!((8 * 1024..=12 * 1024).contains(&moved), "{moved}");
    }

    proptest! {
        #[test]
        fn nobody_ever_has_more_than_the_rate_and_one_second_of_it(
            per_s in 1_u64..1 << 24,
            steps in proptest::collection::vec((0_u64..S / 2, 1_u32..1 << 17, 0_u32..1 << 17), 1..200),
        ) {
            let rate = Rate::new(per_s);
            let mut limit = Limit::new(vec![rate.clone()]).unwrap();
            let (mut now, mut moved) = (0, 0_u64);
            for (step, want, less) in steps {
                now += step;
                limit.release(Tick(now), Way::Out);
                let may = limit.may(Tick(now), Way::Out, want);
                let used = may.saturating_sub(less);
                limit.unused(Way::Out, may - used);
                moved += u64::from(used);
                let most = u128::from(per_s) * u128::from(now + S) / u128::from(S);
                prop_assert!(u128::from(moved) <= most + u128::from(rate.chunk()) + 1);
            }
        }
    }
}
