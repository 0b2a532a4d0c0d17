//! Clocks, and tasks whose time has not come: what the agent says of them on its stream, and when.
//!
//! The agent sends the time of its clock before every pull, so that the host sees a clock that is off; the host answers with
//! its own time, which the guest takes if its configuration says so.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use adit_channel::frame::Header;
use adit_tasks::wire::{self, Clock, Stood, WireKind};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Client;
use crate::config::ClockSource;
use crate::conn::Conn;
use crate::frames::decode;
use crate::{clock, log};

/// A time that the host took longer to answer with is not used.
const CLOCK_ANSWER_MAX: Duration = Duration::from_secs(5);
/// A guest that was away for less is not said to have stood still: answers are late now and then.
const STOOD_MIN_MS: u64 = 3000;
/// The guest's clock is not set while it is off by less, ms.
const CLOCK_STEP_MIN_MS: u64 = 1000;

impl Client {
    /// Waits for the stream; meanwhile says so when the time of what was given back has come, or the clock was set.
    pub(super) fn wait_for_frame(&mut self, conn: &Conn) -> io::Result<()> {
        while let Some(ms) = self.given.next_held() {
            let alarm = clock::Alarm::at(ms)?;
            let mut fds =
                [conn.as_fd(), alarm.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
                Ok(_) => {}
            }
            if fds[0].any().unwrap_or(true) {
                break;
            }
            self.send_clock(conn)?;
        }
        Ok(())
    }

    /// Waits until the time of a task has come, or that of one that was given back, or the clock was set, or the stream ends.
    pub(super) fn hold(&mut self, conn: &Conn, not_before_ms: u64) -> io::Result<()> {
        self.send_clock(conn)?;
        // Then there is room to give this one back too: it may be due in a year, and another in an hour.
        let not_before_ms = self
            .given
            .next_held()
            .map_or(not_before_ms, |ms| ms.min(not_before_ms));
        let alarm = clock::Alarm::at(not_before_ms)?;
        while clock::now_ms() < not_before_ms {
            let mut fds =
                [alarm.as_fd(), conn.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
                Ok(_) => {}
            }
            if fds[0].any().unwrap_or(true) {
                break;
            }
            self.read_unsolicited(conn)?;
        }
        if self.given.next_held().is_some() {
            // Both ends count what is given back, and count by the times that were told.
            self.send_clock(conn)?;
        }
        Ok(())
    }

    /// Sends the guest's time. A host of this version answers with its own.
    pub(super) fn send_clock(&mut self, conn: &Conn) -> io::Result<()> {
        let unix_ms = clock::now_ms();
        self.given.come(unix_ms);
        let id = self.send_ignorable(conn, WireKind::Clock, &Clock { unix_ms })?;
        self.clock_asked = Some((id, Instant::now()));
        Ok(())
    }

    /// The host's time: sets the guest's clock if the configuration says so.
    pub(super) fn on_host_clock(
        &mut self,
        conn: &Conn,
        header: &Header,
        body: &[u8],
    ) -> io::Result<()> {
        let host: Clock = decode(header, body)?;
        let Some((_, asked)) = self.clock_asked.take_if(|(id, _)| *id == header.id) else {
            return Ok(());
        };
        let took = asked.elapsed();
        if took > CLOCK_ANSWER_MAX {
            return Ok(());
        }
        // The answer took half of that to come.
        let way = u64::try_from(took.as_millis() / 2).unwrap_or(0);
        let hosts = host.unix_ms.saturating_add(way);
        let stood = self.stood(hosts);
        let clock_set_ms = match self.live.config().clock {
            ClockSource::Own => None,
            ClockSource::Host => set(hosts),
        };
        if stood == 0 || self.features & wire::SEED == 0 {
            return Ok(());
        }
        log::event("stood-still", &[("ms", &stood), ("seeded", &self.seeded)]);
        let stood = Stood {
            ms: stood,
            clock_set_ms,
            seeded: self.seeded,
        };
        self.send_ignorable(conn, WireKind::Stood, &stood).map(drop)
    }

    /// For how long this guest has stood still since the host gave its time before: paused, or restored from a snapshot of then.
    fn stood(&mut self, hosts: u64) -> u64 {
        let now = Instant::now();
        let Some((before, at)) = self.host_time.replace((hosts, now)) else {
            return 0;
        };
        let here = u64::try_from(now.duration_since(at).as_millis()).unwrap_or(u64::MAX);
        stood(hosts.saturating_sub(before), here)
    }
}

/// For how long a guest stood still in which so much time went by, while so much did for its host; 0: it did not.
fn stood(hosts: u64, here: u64) -> u64 {
    let stood = hosts.saturating_sub(here);
    // Clocks go apart by themselves, by less than a thousandth.
    match stood >= STOOD_MIN_MS.max(here / 1000) {
        true => stood,
        false => 0,
    }
}

/// Sets the clock, unless it is nearly right. Returns by how much.
fn set(to: u64) -> Option<i64> {
    let now = clock::now_ms();
    if now.abs_diff(to) < CLOCK_STEP_MIN_MS {
        return None;
    }
    match clock::set_ms(to) {
        Ok(()) => {
            log::event("clock-set", &[("from_ms", &now), ("to_ms", &to)]);
            i64::try_from(i128::from(to) - i128::from(now)).ok()
        }
        Err(e) => {
            log::event("clock-not-set", &[("to_ms", &to), ("error", &e)]);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_go_apart_are_no_guest_that_stood_still() {
        let (day, s) = (86_400_000, 1000);
        for (hosts, here, want) in [
            (5 * s, 0, 5 * s),
            (2 * s, 0, 0),
            (2 * day + 5 * s, 2 * day, 0),
            (3 * day, 2 * day, day),
            (0, day, 0),
        ] {
            assert_eq!(stood(hosts, here), want, "{hosts} {here}");
        }
    }
}
