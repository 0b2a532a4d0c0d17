//! How a VM's dials went, and how long they took. The VM's own entry has it, so its series end with the VM.
//!
//! A listener in the guest may refuse with any number, and each would be a series of its own for ever: all that this build does
//! not know are one outcome.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use adit_channel::refusal::Code;
use adit_port::control::{DialFailed, Target};
use prometheus_client::metrics::histogram::Histogram;

/// Upper ends of the buckets of dials, s. A dial has ten seconds.
const DIAL_S: [f64; 12] = [
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0, 10.0,
];
/// Upper ends of the buckets of answers, s.
const FIRST_BYTE_S: [f64; 12] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0, 15.0, 60.0,
];

/// Dials of one VM. A VM that nobody has dialled has no histogram.
#[derive(Debug, Default)]
pub struct Dials(OnceLock<Box<Seen>>);

/// What was seen of them.
#[derive(Debug)]
pub struct Seen {
    /// How long dials took that opened a stream, s.
    pub dial: Histogram,
    /// From a request's head to the head of its answer, s, of what aditd relays.
    pub first_byte: Histogram,
    ends: Mutex<Ends>,
}

#[derive(Debug, Default)]
struct Ends {
    counts: HashMap<Outcome, u64>,
    last: Option<LastDial>,
}

/// How a dial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The stream is open.
    Opened,
    /// Whoever asked has gone meanwhile.
    GivenUp,
    /// It was refused.
    Refused(Code),
}

impl Outcome {
    /// Label of the metric. There are as many as the code has words.
    pub fn label(self) -> String {
        match self {
            Self::Opened => "opened".into(),
            Self::GivenUp => "given-up".into(),
            Self::Refused(Code::Other(_)) => "other".into(),
            Self::Refused(code) => code.to_string(),
        }
    }
}

/// The last dial that ended, and was not given up.
#[derive(Clone, Debug)]
pub struct LastDial {
    /// When.
    pub at: Instant,
    /// How long it took.
    pub took: Duration,
    /// What was dialled.
    pub to: Target,
    /// Why it failed; none: it did not.
    pub failed: Option<DialFailed>,
}

/// A dial that is under way. Dropped, it was given up.
pub struct Dial<'a> {
    seen: &'a Seen,
    since: Instant,
    to: &'a Target,
    ended: bool,
}

impl Dials {
    /// A dial begins.
    pub fn begin<'a>(&'a self, to: &'a Target) -> Dial<'a> {
        Dial {
            seen: self.begun(),
            since: Instant::now(),
            to,
            ended: false,
        }
    }

    /// An answer has begun, to a request that came at `since`.
    pub fn first_byte(&self, since: Instant) {
        let seen = self.begun();
        seen.first_byte.observe(since.elapsed().as_secs_f64());
    }

    /// What was seen; none: nobody has dialled it.
    pub fn seen(&self) -> Option<&Seen> {
        self.0.get().map(Box::as_ref)
    }

    /// The last that ended.
    pub fn last(&self) -> Option<LastDial> {
        self.seen()?.ends().last.clone()
    }

    fn begun(&self) -> &Seen {
        self.0.get_or_init(|| {
            Box::new(Seen {
                dial: Histogram::new(DIAL_S),
                first_byte: Histogram::new(FIRST_BYTE_S),
                ends: Mutex::default(),
            })
        })
    }
}

impl Seen {
    /// How many ended in which way, by label.
    pub fn counts(&self) -> Vec<(String, u64)> {
        let ends = self.ends();
        let counts = ends.counts.iter().map(|(end, n)| (end.label(), *n));
        let mut counts: Vec<_> = counts.collect();
        counts.sort();
        counts
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dial<'_> {
    /// It has ended; `failed`: why there is no stream.
    pub fn ended(mut self, failed: Option<&DialFailed>) {
        self.ended = true;
        let took = self.since.elapsed();
        let outcome = match failed.map(|failed| failed.refusal(self.to).code()) {
            None => Outcome::Opened,
            Some(Code::Other(_)) => Outcome::Refused(Code::Other(0)),
            Some(code) => Outcome::Refused(code),
        };
        if failed.is_none() {
            self.seen.dial.observe(took.as_secs_f64());
        }
        let last = LastDial {
            at: self.since + took,
            took,
            to: self.to.clone(),
            failed: failed.cloned(),
        };
        let mut ends = self.seen.ends();
        *ends.counts.entry(outcome).or_default() += 1;
        ends.last = Some(last);
    }
}

impl Drop for Dial<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let mut ends = self.seen.ends();
            *ends.counts.entry(Outcome::GivenUp).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use adit_channel::refusal::Refusal;
    use adit_names::ServiceName;

    use super::*;

    fn failed(number: u16) -> DialFailed {
        DialFailed::new(1, &Refusal::of_hello(number, 0, ""))
    }

    #[test]
    fn a_guest_that_refuses_with_every_number_makes_no_series_but_those_that_there_are() {
        let (dials, to) = (Dials::default(), Target::Service(ServiceName::tcp(80)));
        for number in 0..=u16::MAX {
            dials.begin(&to).ended(Some(&failed(number)));
        }
        let counts = dials.seen().unwrap().counts();
        assert!(counts.len() <= Code::ALL.len(), "{counts:?}");
        let all: u64 = counts.iter().map(|(_, n)| n).sum();
        assert_eq!(all, 1 << 16);
    }

    #[test]
    fn a_dial_is_counted_once_however_it_ends() {
        let (dials, to) = (Dials::default(), Target::VsockPort(5000));
        assert!(dials.seen().is_none() && dials.last().is_none());
        drop(dials.begin(&to));
        assert!(dials.last().is_none());
        dials.begin(&to).ended(None);
        assert!(dials.last().unwrap().failed.is_none());
        dials.begin(&to).ended(Some(&failed(5)));
        let seen = dials.seen().unwrap();
        let counts = seen.counts();
        let said: Vec<_> = counts.iter().map(|(l, n)| (l.as_str(), *n)).collect();
        assert_eq!(said, [("busy", 1), ("given-up", 1), ("opened", 1)]);
        assert!(dials.last().unwrap().failed.is_some());
    }
}
