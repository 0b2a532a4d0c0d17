//! When a client's connection is a flood: it makes work and carries nothing. Pure.
//!
//! h2 ends what it sees by itself (a header that never ends, empty DATA, streams that are reset before they are looked at). What
//! it answers frame by frame without an end is seen here, by two sums: bytes of the connection against bytes that somebody
//! wanted, and streams against those that were given up before they were answered. Both are of a [`WINDOW`], so a connection may
//! be as old as it likes.

use std::time::Duration;

/// Over which time it is judged.
const WINDOW: Duration = Duration::from_secs(10);
/// Bytes that are nobody's: PING, SETTINGS, WINDOW_UPDATE, PRIORITY, frames that nobody knows, empty ones.
const OVERHEAD_MAX: u64 = 4 << 20;
/// The more is carried, the more may be said about it: a DATA frame of one byte has ten.
const OVERHEAD_OF_A_BYTE: u64 = 16;
/// Bytes that a request counts for beside its fields: a HEADERS frame of the next one may repeat all by their index.
const OF_A_REQUEST: u64 = 64;
/// Requests that may be given up before they are answered, and besides half of all.
const GIVEN_UP_MAX: u64 = 200;

/// What was counted of a connection since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Bytes that were read of it.
    pub(super) read: u64,
    /// Of them, or of those that were written, what carries something: bytes of bodies and fields.
    pub(super) wanted: u64,
    /// Requests that came.
    pub(super) requests: u64,
    /// Those that the client gave up before they were answered.
    pub(super) given_up: u64,
}

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub(super) struct Calm {
    since: Duration,
    before: Seen,
}

impl Calm {
    /// Looks at a connection of this age. A flood: what it is one of.
    pub(super) fn look(&mut self, age: Duration, seen: Seen) -> Option<&'static str> {
        let read = seen.read - self.before.read;
        let wanted = seen.wanted - self.before.wanted;
        let requests = seen.requests - self.before.requests;
        let given_up = seen.given_up - self.before.given_up;
        let wanted = wanted.saturating_add(requests.saturating_mul(OF_A_REQUEST));
        let may = OVERHEAD_MAX.saturating_add(wanted.saturating_mul(OVERHEAD_OF_A_BYTE));
        if read > may {
            return Some("frames that carry nothing");
        }
        if given_up > GIVEN_UP_MAX + requests / 2 {
            return Some("requests that are given up at once");
        }
        if age - self.since >= WINDOW {
            (self.since, self.before) = (age, seen);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(read: u64, wanted: u64, requests: u64, given_up: u64) -> Seen {
        Seen {
            read,
            wanted,
            requests,
            given_up,
        }
    }

    #[test]
    fn r74_frames_that_carry_nothing_are_a_flood_and_traffic_is_none() {
        let now = Duration::ZERO;
        let look = |seen| Calm::default().look(now, seen);
        assert_eq!(look(seen(OVERHEAD_MAX, 0, 0, 0)), None);
        assert!(look(seen(OVERHEAD_MAX + 1, 0, 0, 0)).is_some());
        // A gigabyte of keystrokes: ten bytes a frame, of which one is wanted.
        assert_eq!(look(seen(10 << 30, 1 << 30, 1, 0)), None);
        // A gigabyte that is downloaded, with a WINDOW_UPDATE for each 4 KiB.
        assert_eq!(look(seen(13 << 18, 1 << 30, 1, 0)), None);
        // A million requests whose fields are all known by their index.
        assert_eq!(look(seen(20 << 20, 0, 1 << 20, 0)), None);
    }

    #[test]
    fn r74_requests_that_are_given_up_are_a_flood_unless_most_are_answered() {
        let now = Duration::ZERO;
        let look = |requests, given_up| Calm::default().look(now, seen(0, 0, requests, given_up));
        assert_eq!(look(200, 200), None);
        assert!(look(500, 500).is_some());
        // A browser that leaves pages early.
        assert_eq!(look(10_000, 4000), None);
    }

    #[test]
    fn a_connection_is_as_calm_as_it_was_lately() {
        let mut calm = Calm::default();
        let mut all = 0;
        for window in 0..1000 {
            all += OVERHEAD_MAX / 2;
            assert_eq!(calm.look(window * WINDOW, seen(all, 0, 0, 0)), None);
        }
        assert!(
            calm.look(1000 * WINDOW, seen(all + OVERHEAD_MAX + 1, 0, 0, 0))
                .is_some()
        );
    }
}
