//! How often somebody may do something: a token bucket for each holder. Pure: time is a parameter.
//!
//! A bucket holds what may be done in a second, and fills up at that rate. One that is full says no more than one that is not there,
//! so it is forgotten when room is needed. Where there is none, all others share one bucket: whoever comes with ever new names
//! has no more than one of them.

use std::collections::HashMap;

/// Holders that have a bucket of their own at most.
pub const HOLDERS_MAX: usize = 8192;
/// What one thing costs, so that a millisecond fills in whole parts.
const COST: u64 = 1000;

/// The buckets.
#[derive(Debug, Default)]
pub struct Buckets {
    of: HashMap<String, Bucket>,
    others: Option<Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// In parts of [`COST`].
    level: u64,
    per_s: u32,
    since_ms: u64,
}

impl Bucket {
    fn full(per_s: u32, now_ms: u64) -> Self {
        Self {
            level: u64::from(per_s) * COST,
            per_s,
            since_ms: now_ms,
        }
    }

    /// How full it is at that time, at a rate that may be another one than before.
    fn at(self, per_s: u32, now_ms: u64) -> Self {
        let passed = now_ms.saturating_sub(self.since_ms);
        let more = passed.saturating_mul(per_s.into());
        let most = u64::from(per_s) * COST;
        Self {
            level: self.level.saturating_add(more).min(most),
            per_s,
            since_ms: now_ms.max(self.since_ms),
        }
    }

    fn is_full(self, now_ms: u64) -> bool {
        self.at(self.per_s, now_ms).level >= u64::from(self.per_s) * COST
    }

    fn take(&mut self) -> bool {
        let left = self.level.checked_sub(COST);
        self.level = left.unwrap_or(self.level);
        left.is_some()
    }
}

impl Buckets {
    /// Whether `holder` may do it once more, at `per_s` a second; then it has.
    pub fn take(&mut self, holder: &str, per_s: u32, now_ms: u64) -> bool {
        let bucket = match self.of.get_mut(holder) {
            Some(bucket) => bucket,
            None => {
                if self.of.len() >= HOLDERS_MAX {
                    self.of.retain(|_, bucket| !bucket.is_full(now_ms));
                }
                match self.of.len() < HOLDERS_MAX {
                    true => self
                        .of
                        .entry(holder.to_owned())
                        .or_insert(Bucket::full(per_s, now_ms)),
                    false => self.others.get_or_insert(Bucket::full(per_s, now_ms)),
                }
            }
        };
        *bucket = bucket.at(per_s, now_ms);
        bucket.take()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_holder_has_its_rate_and_what_it_saved_for_a_second_and_no_more() {
        let mut buckets = Buckets::default();
        let mut taken = |holder: &str, times: usize, now_ms| {
            (0..times)
                .filter(|_| buckets.take(holder, 10, now_ms))
                .count()
        };
        assert_eq!(taken("a", 100, 0), 10);
        assert_eq!(taken("b", 5, 0), 5, "it is another's");
        assert_eq!(taken("a", 100, 99), 0);
        assert_eq!(taken("a", 100, 100), 1);
        assert_eq!(taken("a", 100, 1_000_000), 10);
        // A clock that goes back gives nothing.
        assert_eq!(taken("a", 100, 0), 0);
    }

    #[test]
    fn a_rate_that_is_changed_counts_at_once() {
        let mut buckets = Buckets::default();
        assert!(buckets.take("a", 100, 0));
        let taken = (0..200).filter(|_| buckets.take("a", 2, 0)).count();
        assert_eq!(taken, 2);
    }

    #[test]
    fn r110_ever_new_names_have_one_bucket_once_there_is_no_room_and_room_comes_back() {
        let mut buckets = Buckets::default();
        let taken = (0..3 * HOLDERS_MAX).filter(|n| buckets.take(&n.to_string(), 1, 0));
        assert_eq!(taken.count(), HOLDERS_MAX + 1);
        assert_eq!(buckets.of.len(), HOLDERS_MAX);
        assert!(buckets.take("new", 1, 1000));
        assert_eq!(buckets.of.len(), 1);
    }

    proptest! {
        #[test]
        fn nobody_ever_has_more_than_the_rate_and_one_second_of_it(
            per_s in 1_u32..50,
            steps in proptest::collection::vec(0_u64..700, 1..200),
        ) {
            let (mut buckets, mut now, mut taken) = (Buckets::default(), 0, 0_u64);
            for step in steps {
                now += step;
                taken += u64::from(buckets.take("a", per_s, now));
            }
            prop_assert!(taken * COST <= u64::from(per_s) * (COST + now));
        }
    }
}
