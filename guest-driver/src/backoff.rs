//! When the host is dialled again.

use std::time::Duration;

/// First delay before dialling again.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest delay before dialling again.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A stream that lasted this long did not end because the host refuses it: a new aditd is there already, and it is dialled at
/// once. One that ends sooner is dialled after a delay, or the two would never stop.
const LASTED: Duration = Duration::from_secs(1);

/// How long to wait before the next dial.
pub struct Backoff {
    delay: Duration,
    /// The delay after a stream that does not last. It doubles with each in a row: a host that accepts, and then cannot keep
    /// what it is told, is not to be asked again and again.
    short: Duration,
}

impl Backoff {
    /// No stream yet.
    pub fn new() -> Self {
        Self {
            delay: BACKOFF_MIN,
            short: BACKOFF_MIN,
        }
    }

    /// A stream has ended that lasted this long.
    pub fn ended_after(&mut self, lasted: Duration) {
        if lasted >= LASTED {
            (self.delay, self.short) = (Duration::ZERO, BACKOFF_MIN);
        } else {
            self.delay = self.short;
            self.short = (self.short * 2).min(BACKOFF_MAX);
        }
    }

    /// How long to wait now.
    pub fn next(&mut self) -> Duration {
        let delay = self.delay;
        self.delay = (delay * 2).clamp(BACKOFF_MIN, BACKOFF_MAX);
        delay
    }
}

/// Between half and all of a delay, so that the guests of a restarted host do not come back in step.
pub fn jittered(delay: Duration) -> Duration {
    let part = getrandom::u32().unwrap_or(0) % 1024;
    delay / 2 + delay / 2 * part / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_between_half_and_whole() {
        for _ in 0..1000 {
            let d = jittered(BACKOFF_MAX);
            assert!(d >= BACKOFF_MAX / 2 && d <= BACKOFF_MAX);
        }
    }

    #[test]
    fn a_stream_that_lasted_is_dialled_again_at_once_and_no_other() {
        let millis = |backoff: &mut Backoff| [(); 8].map(|()| backoff.next().as_millis());
        let doubled = [100, 200, 400, 800, 1600, 3200, 5000, 5000];
        let mut backoff = Backoff::new();
        assert_eq!(millis(&mut backoff), doubled);
        backoff.ended_after(LASTED / 2);
        assert_eq!(millis(&mut backoff), doubled);
        backoff.ended_after(LASTED);
        assert_eq!(millis(&mut backoff)[..2], [0, 100]);
        assert_eq!(jittered(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn streams_that_do_not_last_are_dialled_less_and_less_often() {
        let mut backoff = Backoff::new();
        let after = |backoff: &mut Backoff, lasted| {
            backoff.ended_after(lasted);
            backoff.next().as_millis()
        };
        for delay in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            assert_eq!(after(&mut backoff, LASTED / 2), delay);
        }
        assert_eq!(after(&mut backoff, LASTED), 0);
        assert_eq!(after(&mut backoff, LASTED / 2), 100);
    }
}
