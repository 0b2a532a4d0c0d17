//! How long to look on before sleeping: bounded each time, and a bounded share of a processor where it is in vain.

use std::time::{Duration, Instant};

/// What looking on in vain may cost of a processor: one part in so many.
const SHARE: u32 = 10;
/// How often the other side's word is looked at between two looks at the clock, which costs as much as ten.
const LOOKS: u32 = 16;
/// Without a pause at first: an answer comes within a microsecond, or not soon.
const EAGER: u32 = 64;

/// Looks on before sleeping.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    limit: Duration,
    /// What may be spent in vain yet, as of `at`.
    allowed: Duration,
    at: Option<Instant>,
}

impl Default for Spin {
    /// Fifty microseconds: what waking a sleeper costs.
    fn default() -> Self {
        Self::new(Duration::from_micros(50))
    }
}

impl Spin {
    /// At most `limit` at a time, and a tenth of a processor where it is in vain; zero: sleep at once.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            allowed: limit,
            at: None,
        }
    }

    /// Tries until it brings something, or the time is over.
    pub(crate) fn look_on<T, E>(
        &mut self,
        mut attempt: impl FnMut() -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        if self.limit.is_zero() {
            return Ok(None);
        }
        for _ in 0..EAGER {
            if let Some(found) = attempt()? {
                return Ok(Some(found));
            }
        }
        let begin = Instant::now();
        if let Some(at) = self.at.replace(begin) {
            let earned = (begin - at) / SHARE;
            self.allowed = (self.allowed + earned).min(self.limit);
        }
        let limit = self.allowed;
        loop {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                if let Some(found) = attempt()? {
                    return Ok(Some(found));
                }
            }
            let spent = begin.elapsed();
            if spent >= limit {
                self.allowed = self.allowed.saturating_sub(spent);
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_vain_it_ends_and_costs_its_share() {
        let mut spin = Spin::default();
        let begin = Instant::now();
        let mut tries = 0u64;
        let mut attempt = || {
            tries += 1;
            Ok::<_, ()>(None::<()>)
        };
        assert_eq!(spin.look_on(&mut attempt), Ok(None));
        // What the first one cost is not earned again at once.
        assert_eq!(spin.look_on(&mut attempt), Ok(None));
        let earned = begin.elapsed() / SHARE;
        assert!(spin.allowed <= earned, "{:?} of {earned:?}", spin.allowed);
        assert!(tries > 2 * u64::from(EAGER));
    }

    #[test]
    fn off_it_does_not_even_look() {
        let mut spin = Spin::new(Duration::ZERO);
        let found = spin.look_on(|| -> Result<Option<()>, ()> { panic!("looked") });
        assert_eq!(found, Ok(None));
    }
}
