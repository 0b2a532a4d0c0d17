//! The guest's clock: read it, set it where the configuration says so, wait for a time.
//!
//! A build for tests (`test-util`, which no image has) has a clock of its own: `ADIT_TEST_CLOCK_AHEAD_MS` says how far it is
//! ahead of the system's, and setting it changes nothing else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::poll::PollTimeout;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Milliseconds since 1970 by the guest's clock.
pub fn now_ms() -> u64 {
    system_ms().saturating_add_signed(own::ahead_ms())
}

/// The same, as goals and cards count it.
pub fn unix_ms() -> i64 {
    i64::try_from(now_ms()).unwrap_or(i64::MAX)
}

/// Sets the guest's clock.
///
/// # Errors
/// The agent may not, or the kernel does not accept the time.
pub fn set_ms(to: u64) -> io::Result<()> {
    own::set_ms(to)
}

/// So long as `poll` takes it. Rounded up: a wait that ended just before would be followed by a busy loop.
pub fn poll_limit(left: Duration) -> PollTimeout {
    let ms = i32::try_from(left.as_millis() + 1).ok();
    ms.and_then(|ms| PollTimeout::try_from(ms).ok())
        .unwrap_or(PollTimeout::MAX)
}

fn system_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// The latest time of an alarm, in the year 2255: the kernel counts ns in 63 bits, which end soon after.
const FAR_MS: u64 = 9_000_000_000_000;

/// A descriptor that becomes readable at a time by the guest's clock, and at once when somebody sets the clock.
pub struct Alarm(TimerFd);

impl Alarm {
    /// Sets one for a time, which may have passed.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn at(ms: u64) -> io::Result<Self> {
        let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC)?;
        // Zero would disarm it. A time that is too late for the kernel becomes the latest that it knows.
        let ms = ms.saturating_add_signed(own::ahead_ms().saturating_neg());
        let at = Duration::from_millis(ms.clamp(1, FAR_MS));
        let flags =
            TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        timer.set(Expiration::OneShot(TimeSpec::from_duration(at)), flags)?;
        Ok(Self(timer))
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(not(feature = "test-util"))]
mod own {
    use super::{Duration, TimeSpec, io};

    pub fn ahead_ms() -> i64 {
        0
    }

    pub fn set_ms(to: u64) -> io::Result<()> {
        let to = TimeSpec::from_duration(Duration::from_millis(to));
        Ok(nix::time::clock_settime(
            nix::time::ClockId::CLOCK_REALTIME,
            to,
        )?)
    }
}

#[cfg(feature = "test-util")]
mod own {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    static AHEAD_MS: LazyLock<AtomicI64> = LazyLock::new(|| {
        let ahead = std::env::var("ADIT_TEST_CLOCK_AHEAD_MS").ok();
        AtomicI64::new(ahead.and_then(|ms| ms.parse().ok()).unwrap_or(0))
    });

    pub fn ahead_ms() -> i64 {
        AHEAD_MS.load(Ordering::Relaxed)
    }

    pub fn set_ms(to: u64) -> super::io::Result<()> {
        let ahead = i128::from(to) - i128::from(super::system_ms());
        AHEAD_MS.store(
            i64::try_from(ahead).map_err(super::io::Error::other)?,
            Ordering::Relaxed,
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;

    fn fires(alarm: &Alarm, limit: PollTimeout) -> bool {
        poll(&mut [PollFd::new(alarm.as_fd(), PollFlags::POLLIN)], limit).unwrap() == 1
    }

    #[test]
    fn an_alarm_fires_when_its_time_has_come_and_not_before() {
        for past in [0, 1, now_ms()] {
            assert!(fires(&Alarm::at(past).unwrap(), PollTimeout::NONE));
        }
        for far in [now_ms() + 3_600_000, u64::MAX / 2, u64::MAX] {
            assert!(!fires(&Alarm::at(far).unwrap(), PollTimeout::ZERO));
        }
        let soon = now_ms() + 20;
        assert!(fires(&Alarm::at(soon).unwrap(), PollTimeout::NONE));
        assert!(now_ms() >= soon);
    }
}
