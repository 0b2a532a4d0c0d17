//! When a connection is a flood: it makes work and carries nothing. Of clients, and of other hosts in both directions. Pure.
//!
//! h2 ends what it sees by itself (a header that never ends, empty DATA, streams that are reset before they are looked at). What
//! it answers frame by frame without an end is seen here, by two sums: bytes of the connection against bytes that somebody
//! wanted, and streams against those that were given up before they were answered. Both are of a [`WINDOW`], so a connection may
//! be as old as it likes. What is in the windows of streams is wanted by somebody who has no room for it yet.
//!
//! A host carries the streams of many, and with its connection all of them end. So it may give up more, and whoever of its clients
//! gives up too much gets no more streams before that is reached ([`PerClient`]).

use std::collections::HashMap;
use std::time::Duration;

use super::Sizes;

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
/// The same of another host, for all its clients.
const GIVEN_UP_OF_HOST_MAX: u64 = 64 * GIVEN_UP_MAX;
/// Clients of a host that are told apart at most: all others are one.
const CLIENTS_MAX: usize = 1024;

/// What was counted of a connection since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
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
#[derive(Debug)]
pub(crate) struct Calm {
    given_up_max: u64,
    /// Bytes that may wait in a stream.
    window: u32,
    since: Duration,
    before: Seen,
}

impl Calm {
    /// Of a client.
    pub(super) fn of_client() -> Self {
        Self {
            given_up_max: GIVEN_UP_MAX,
            window: Sizes::OF_CLIENT.window,
            since: Duration::ZERO,
            before: Seen::default(),
        }
    }

    /// Of another host.
    pub(crate) fn of_host() -> Self {
        Self {
            given_up_max: GIVEN_UP_OF_HOST_MAX,
            window: Sizes::OF_HOST.window,
            ..Self::of_client()
        }
    }

    /// Looks at a connection of this age with so many streams. A flood: what it is one of.
    pub(crate) fn look(
        &mut self,
        age: Duration,
        seen: Seen,
        streams: usize,
    ) -> Option<&'static str> {
        let read = seen.read - self.before.read;
        let wanted = seen.wanted - self.before.wanted;
        let requests = seen.requests - self.before.requests;
        let given_up = seen.given_up - self.before.given_up;
        let wanted = wanted.saturating_add(requests.saturating_mul(OF_A_REQUEST));
        let may = OVERHEAD_MAX.saturating_add(wanted.saturating_mul(OVERHEAD_OF_A_BYTE));
        // Twice, for what is said about it.
        let waits = 2 * u64::from(self.window) * u64::try_from(streams).unwrap_or(u64::MAX);
        let may = may.saturating_add(waits);
        if read > may {
            return Some("frames that carry nothing");
        }
        if given_up > self.given_up_max + requests / 2 {
            return Some("requests that are given up at once");
        }
        if age - self.since >= WINDOW {
            (self.since, self.before) = (age, seen);
        }
        None
    }
}

/// What each client of a host has asked for and given up, on one connection.
#[derive(Debug, Default)]
pub(super) struct PerClient {
    since: Duration,
    of: HashMap<String, (u64, u64)>,
}

impl PerClient {
    /// Whether a client may have one more request; then it has.
    pub(super) fn request(&mut self, age: Duration, client: &str) -> bool {
        if age - self.since >= WINDOW {
            (self.since, self.of) = (age, HashMap::new());
        }
        let (requests, given_up) = self.counts(client);
        *requests += 1;
        *given_up <= GIVEN_UP_MAX + *requests / 2
    }

    /// It gave one up before it was answered.
    pub(super) fn given_up(&mut self, client: &str) {
        self.counts(client).1 += 1;
    }

    fn counts(&mut self, client: &str) -> &mut (u64, u64) {
        let is_known = self.of.contains_key(client) || self.of.len() < CLIENTS_MAX;
        let client = if is_known { client } else { "" };
        self.of.entry(client.to_owned()).or_default()
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
        let look = |seen| Calm::of_client().look(now, seen, 0);
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
        let look =
            |requests, given_up| Calm::of_client().look(now, seen(0, 0, requests, given_up), 0);
        assert_eq!(look(200, 200), None);
        assert!(look(500, 500).is_some());
        // A browser that leaves pages early.
        assert_eq!(look(10_000, 4000), None);
    }

    #[test]
    fn r110_streams_whose_vms_take_nothing_are_no_flood() {
        let now = Duration::ZERO;
        // Each has its window full of bytes that nobody has taken.
        let streams = crate::proxy::http2::STREAMS_MAX;
        let read = streams as u64 * u64::from(Sizes::OF_HOST.window) + OVERHEAD_MAX;
        assert!(Calm::of_host().look(now, seen(read, 0, 0, 0), 0).is_some());
        assert_eq!(
            Calm::of_host().look(now, seen(read, 0, 0, 0), streams),
            None
        );
        let more = 3 * read;
        assert!(
            Calm::of_host()
                .look(now, seen(more, 0, 0, 0), streams)
                .is_some()
        );
    }

    #[test]
    fn r126_a_client_of_a_host_is_stopped_long_before_the_host_is() {
        let mut clients = PerClient::default();
        let now = Duration::ZERO;
        let mut taken = 0;
        while clients.request(now, "hostile") {
            taken += 1;
            clients.given_up("hostile");
        }
        // All that one client can give up leaves room for as much of many others.
        let all = seen(0, 0, taken, taken);
        assert!(taken * 30 < GIVEN_UP_OF_HOST_MAX, "{taken}");
        assert_eq!(Calm::of_host().look(now, all, 0), None);
        assert!(Calm::of_client().look(now, all, 0).is_some());
        assert!(clients.request(now, "other"));
        assert!(
            clients.request(WINDOW, "hostile"),
            "it is over after a while"
        );
        for n in 0..2 * CLIENTS_MAX {
            clients.request(WINDOW, &n.to_string());
        }
        assert!(clients.of.len() <= CLIENTS_MAX + 1);
    }

    #[test]
    fn a_connection_is_as_calm_as_it_was_lately() {
        let mut calm = Calm::of_client();
        let mut all = 0;
        for window in 0..1000 {
            all += OVERHEAD_MAX / 2;
            assert_eq!(calm.look(window * WINDOW, seen(all, 0, 0, 0), 0), None);
        }
        assert!(
            calm.look(1000 * WINDOW, seen(all + OVERHEAD_MAX + 1, 0, 0, 0), 0)
                .is_some()
        );
    }
}
