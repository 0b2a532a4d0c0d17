//! When something that changes with every tunnel is said: at once, and then at most once in a while. No clock.

use std::time::Duration;

use adit_engine::Tick;

/// When it was said last, and when it may be again.
#[derive(Debug)]
pub(super) struct Pace {
    every: u64,
    next: Tick,
    due: Option<Tick>,
}

impl Pace {
    pub(super) fn new(every: Duration) -> Self {
        Self {
            every: u64::try_from(every.as_nanos()).unwrap_or(u64::MAX),
            next: Tick(0),
            due: None,
        }
    }

    /// Whether it may be said now. If not, it is [due](Self::due) later.
    pub(super) fn allows(&mut self, now: Tick) -> bool {
        let allows = now >= self.next;
        self.due = (!allows).then_some(self.next);
        allows
    }

    /// It is said now, for whatever reason.
    pub(super) fn said(&mut self, now: Tick) {
        self.next = Tick(now.0.saturating_add(self.every));
        self.due = None;
    }

    /// There is nothing to say any more.
    pub(super) fn settled(&mut self) {
        self.due = None;
    }

    /// When it has to be looked at again; none: something else comes first.
    pub(super) fn due(&self) -> Option<Tick> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_quickly_is_said_at_once_then_once_in_a_while_and_the_last_of_it_always() {
        let mut pace = Pace::new(Duration::from_nanos(100));
        assert!(pace.allows(Tick(5)));
        pace.said(Tick(5));
        assert_eq!(pace.due(), None);
        assert!(!pace.allows(Tick(6)) && !pace.allows(Tick(104)));
        assert_eq!(pace.due(), Some(Tick(105)));
        assert!(pace.allows(Tick(105)));
        pace.said(Tick(105));
        assert!(!pace.allows(Tick(110)));
        pace.settled();
        assert_eq!(
            pace.due(),
            None,
            "nothing is left to say, and nothing wakes"
        );
    }
}
