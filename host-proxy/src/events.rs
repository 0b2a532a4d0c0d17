//! What happens on this host, for whoever follows it: numbered, and bounded.
//!
//! ```text
//! whoever changes something ─ note ─► the last KEPT_MAX ─ after(cursor) ─► GET /v1/host-events
//! ```
//! A cursor is `BOOT.NUMBER`: the number counts events of one run of aditd, and `BOOT` says of which. Whoever asks for what came
//! behind a cursor gets it whole, or first an event that says how much is gone: because more came than are kept, or because aditd
//! was started anew. What a guest, a client or a port process can cause as often as it likes comes once a while for each VM, or as a
//! count.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_api::{HostEvent, HostEventKind, TaskEvent};
use adit_tasks::hex;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, watch};

use crate::lines::at;
use crate::state::State;
use crate::vm::VmEntry;

/// Events that are kept.
pub const KEPT_MAX: usize = 8192;
/// Most events of an answer's part.
const PART_MAX: usize = 256;
/// Most characters of an event's text.
const TEXT_MAX: usize = 300;
/// How often the state of one VM is news at most, and for how long denials are counted together.
const A_WHILE: Duration = Duration::from_millis(500);

/// The events.
#[derive(Debug)]
pub struct Events {
    boot: String,
    kept: Mutex<Kept>,
    news: watch::Sender<u64>,
    denied: AtomicU64,
    is_denied: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    /// The number of the last one.
    last: u64,
    events: VecDeque<HostEvent>,
}

/// Behind which event somebody wants to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    boot: String,
    number: u64,
}

impl Cursor {
    /// Reads one; none: it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let (boot, number) = text.split_once('.')?;
        let is_hex = |b: u8| b.is_ascii_digit() || matches!(b, b'a'..=b'f');
        let parsed: u64 = number.parse().ok()?;
        let is_one = boot.len() == 16 && boot.bytes().all(is_hex) && parsed.to_string() == number;
        is_one.then(|| Self {
            boot: boot.to_owned(),
            number: parsed,
        })
    }
}

impl Events {
    /// Of this run of aditd.
    pub fn new(boot_nonce: [u8; 16]) -> Arc<Self> {
        Arc::new(Self {
            boot: hex(&boot_nonce[..8]),
            kept: Mutex::default(),
            news: watch::Sender::new(0),
            denied: AtomicU64::new(0),
            is_denied: Notify::new(),
        })
    }

    /// Notes what has happened.
    pub fn note(&self, kind: HostEventKind, vm: Option<&str>, text: &str) {
        self.put(HostEvent {
            kind,
            vm: vm.map(str::to_owned),
            text: adit_names::escape(text).at_most(TEXT_MAX).to_string(),
            ..HostEvent::default()
        });
    }

    /// The same, of so many.
    pub fn count(&self, kind: HostEventKind, vm: Option<&str>, count: u64) {
        self.put(HostEvent {
            kind,
            vm: vm.map(str::to_owned),
            count: Some(count),
            ..HostEvent::default()
        });
    }

    /// Something was denied.
    pub fn denied(&self) {
        self.denied.fetch_add(1, Ordering::Relaxed);
        self.is_denied.notify_one();
    }

    fn put(&self, event: HostEvent) {
        let now = at(jiff::Timestamp::now().as_millisecond());
        let last = {
            let mut kept = self.kept();
            kept.last += 1;
            if kept.events.len() >= KEPT_MAX {
                kept.events.pop_front();
            }
            let cursor = self.cursor(kept.last);
            kept.events.push_back(HostEvent {
                cursor,
                at: now,
                ..event
            });
            kept.last
        };
        self.news.send_replace(last);
    }

    fn cursor(&self, number: u64) -> String {
        format!("{}.{number}", self.boot)
    }

    /// The next events behind a cursor, or all that are kept, and whether there may be more; where some are gone, that comes first.
    pub fn after(&self, since: Option<&Cursor>) -> (Vec<HostEvent>, bool) {
        let kept = self.kept();
        let before = kept.last - kept.events.len() as u64;
        let mut gap = None;
        let from = match since {
            None => before,
            Some(since) if since.boot != self.boot || since.number > kept.last => {
                gap = Some((
                    None,
                    "aditd was started anew: what was behind that cursor is not known any more",
                ));
                before
            }
            Some(since) if since.number < before => {
                let gone = before - since.number;
                gap = Some((Some(gone), "more has happened than is kept"));
                before
            }
            Some(since) => since.number,
        };
        let gap = gap.map(|(count, text)| HostEvent {
            cursor: self.cursor(from),
            at: at(jiff::Timestamp::now().as_millisecond()),
            kind: HostEventKind::Gap,
            count,
            text: text.into(),
            ..HostEvent::default()
        });
        // At most KEPT_MAX.
        let skip = (from - before) as usize;
        let next = kept.events.iter().skip(skip).take(PART_MAX);
        let is_more = kept.events.len() > skip + PART_MAX;
        (gap.into_iter().chain(next.cloned()).collect(), is_more)
    }

    /// Wakes up at each event from now on.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how much was denied, once a while.
    pub async fn count_denials(self: Arc<Self>) {
        loop {
            self.is_denied.notified().await;
            tokio::time::sleep(A_WHILE).await;
            let denied = self.denied.swap(0, Ordering::Relaxed);
            if denied > 0 {
                self.count(HostEventKind::Denied, None, denied);
            }
        }
    }
}

/// Notes every change of a task.
pub async fn follow_tasks(state: Arc<State>, mut changes: Receiver<TaskEvent>) {
    loop {
        match changes.recv().await {
            Ok(TaskEvent { task, .. }) => state.events.put(HostEvent {
                kind: HostEventKind::Task,
                vm: Some(task.vm),
                task: Some(task.task_id),
                goal: Some(task.goal_id),
                state: Some(task.state.name().into()),
                text: adit_names::escape(&task.reason)
                    .at_most(TEXT_MAX)
                    .to_string(),
                ..HostEvent::default()
            }),
            Err(RecvError::Lagged(missed)) => state.events.count(HostEventKind::Gap, None, missed),
            Err(RecvError::Closed) => return,
        }
    }
}

/// Notes how a VM's state changes until it is removed. One that changes it all the time is looked at once a while.
pub async fn follow_vm(events: Arc<Events>, vm: Arc<VmEntry>) {
    let name = vm.name.as_str();
    events.note(HostEventKind::VmAdded, Some(name), "");
    let (mut changes, mut said) = (vm.watch(), None);
    let state_changes = async {
        loop {
            let state = vm.state();
            if said.replace(state) != Some(state) {
                events.put(HostEvent {
                    kind: HostEventKind::VmState,
                    vm: Some(name.into()),
                    state: Some(state.name().into()),
                    ..HostEvent::default()
                });
                tokio::time::sleep(A_WHILE).await;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        () = state_changes => {}
        () = vm.removed.cancelled() => {}
    }
    events.note(HostEventKind::VmRemoved, Some(name), "");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(text: &str) -> Option<Cursor> {
        Some(Cursor::parse(text).unwrap())
    }

    fn texts(events: &[HostEvent]) -> Vec<&str> {
        events.iter().map(|event| event.text.as_str()).collect()
    }

    #[test]
    fn whoever_goes_on_behind_a_cursor_misses_nothing_and_hears_nothing_twice() {
        let events = Events::new([1; 16]);
        for text in ["a", "b"] {
            events.note(HostEventKind::VmAdded, None, text);
        }
        let (first, more) = events.after(None);
        assert_eq!((texts(&first), more), (vec!["a", "b"], false));
        let (next, _) = events.after(cursor(&first[0].cursor).as_ref());
        assert_eq!(texts(&next), ["b"]);
        let last = cursor(&next[0].cursor);
        assert!(events.after(last.as_ref()).0.is_empty());
        events.note(HostEventKind::VmAdded, None, "c");
        assert_eq!(texts(&events.after(last.as_ref()).0), ["c"]);
    }

    #[test]
    fn r111_events_are_bounded_and_how_many_are_gone_is_said() {
        let events = Events::new([1; 16]);
        events.note(HostEventKind::VmAdded, None, "first");
        let first = events.after(None).0.remove(0);
        for _ in 0..KEPT_MAX + 9 {
            events.count(HostEventKind::Denied, None, 1);
        }
        let mut since = cursor(&first.cursor);
        let (mut found, mut gone) = (0, 0);
        loop {
            let (part, more) = events.after(since.as_ref());
            assert!(part.len() <= PART_MAX + 1);
            for event in &part {
                match event.kind {
                    HostEventKind::Gap => gone += event.count.unwrap(),
                    _ => found += 1,
                }
            }
            since = part.last().and_then(|last| Cursor::parse(&last.cursor));
            if !more {
                break;
            }
        }
        assert_eq!((found, gone), (KEPT_MAX, 9));
        let long = "\u{1b}".repeat(1 << 20);
        events.note(HostEventKind::ConfigRefused, None, &long);
        let (part, _) = events.after(since.as_ref());
        // Each character that is escaped is at most so many.
        let len = part[0].text.len();
        assert!(len <= 8 * TEXT_MAX, "{len}");
    }

    #[test]
    fn a_cursor_of_another_run_is_a_gap_and_everything_that_is_kept() {
        let (before, now) = (Events::new([1; 16]), Events::new([2; 16]));
        before.note(HostEventKind::VmAdded, None, "old");
        now.note(HostEventKind::VmAdded, None, "new");
        let old = before.after(None).0.remove(0);
        let (part, _) = now.after(cursor(&old.cursor).as_ref());
        assert_eq!(part[0].kind, HostEventKind::Gap);
        assert_eq!((part[0].count, part[1].text.as_str()), (None, "new"));
        // Its cursor leads to the same events.
        let (again, _) = now.after(cursor(&part[0].cursor).as_ref());
        assert_eq!(texts(&again), ["new"]);
    }

    #[test]
    fn r116_what_is_no_cursor_to_the_letter_is_none() {
        let whole = format!("{}.7", "0".repeat(16));
        assert!(Cursor::parse(&whole).is_some());
        for text in [
            "",
            ".",
            "7",
            "0000000000000000.",
            "0000000000000000.07",
            "0000000000000000.+7",
            "0000000000000000.-1",
            "000000000000000G.7",
            "0000000000000000.18446744073709551616",
            "0000000000000000.7\n",
        ] {
            assert_eq!(Cursor::parse(text), None, "{text}");
        }
    }
}
