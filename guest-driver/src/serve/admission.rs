//! Who may dial the agent: the host, and where others could too, only who shows that it has the host's key.
//!
//! ```text
//!                     own stream: no key here ──► open
//! start ─► open ──────┤
//!    │                own stream: a key ────────► keyed(key) ── the stream ends ──► keyed(none)
//!    ├ require_host_key = true ─► keyed(none)                  ◄── own stream: a key
//!    └ a key was given on this boot, to an agent that has ended (`note`) ─► keyed(none)
//! ```
//! Whether others can dial is the host's to know: it gives a key where the VMM's socket is open to more than the host. In `keyed`
//! nothing runs for a hello without the MAC of the key, with one exception. While there is no key, `ping` is answered: it reaches
//! nothing, and by its answer, which only a privileged listener of this guest can give, the host knows that a stream which claims
//! to be the agent's is the agent's. A hello that comes while the key is on its way waits for it. Each hello is served once: its
//! number is in the MAC (`serials`).

use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_channel::hello::{HostKey, Open};
use adit_channel::refusal::{Code, Refusal};
use adit_channel::ring::bell::PING;

use super::note::Note;
use super::serials::Serials;
use crate::log;

/// How long a hello waits for a key.
const WAIT: Duration = Duration::from_secs(1);

/// Decides whether a hello comes from the host.
#[derive(Debug, Default)]
pub struct Admission {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The configuration says so.
    required: bool,
    /// The host has said so.
    keyed: bool,
    /// The host has said whether there is a key, on the agent's own stream as it is now.
    told: bool,
    key: Option<HostKey>,
    /// Hellos with this key that were served.
    served: Serials,
    note: Option<Note>,
}

impl Admission {
    /// One that knows whether the host has given a key since this guest has booted, and lets the next agent know.
    pub fn of_this_boot(run_dir: &Path) -> Self {
        let note = Note::of(run_dir);
        let state = State {
            keyed: note.is_there(),
            note: Some(note),
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::default(),
        }
    }

    /// Whether a key is needed also before the host has given one.
    pub fn require(&self, required: bool) {
        self.lock().required = required;
    }

    /// The host has given a key on the agent's own stream, or none.
    pub fn given(&self, key: Option<HostKey>) {
        let mut state = self.lock();
        state.told = true;
        state.keyed = key.is_some();
        state.key = key;
        state.served = Serials::default();
        if let Some(note) = &state.note
            && let Err(e) = note.set(state.keyed)
        {
            log::event("host-key-not-noted", &[("error", &e)]);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The agent's own stream has ended, and with it the key.
    pub fn ended(&self) {
        let mut state = self.lock();
        (state.key, state.told) = (None, false);
    }

    /// Whether a hello that may be served is known to be the host's: it has shown the key, or the host has said that nobody else can
    /// dial. Before that anybody could who may open the VMM's socket.
    ///
    /// # Errors
    /// The host has not said that yet.
    pub fn is_hosts(&self) -> Result<(), Refusal> {
        self.is_hosts_within(WAIT)
    }

    fn is_hosts_within(&self, limit: Duration) -> Result<(), Refusal> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match state.keyed || state.required || state.told {
                true => return Ok(()),
                false if left.is_zero() => {
                    let text = "the agent has no stream to its host yet, which says who may dial";
                    return Err(Refusal::busy(text));
                }
                false => {
                    let waited = self.changed.wait_timeout(state, left);
                    (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Whether a hello may be served.
    ///
    /// # Errors
    /// Why not. Nothing may be said of this guest then.
    pub fn check(&self, open: &Open) -> Result<(), Refusal> {
        self.check_within(open, WAIT)
    }

    fn check_within(&self, open: &Open, limit: Duration) -> Result<(), Refusal> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if !state.keyed && !state.required {
                return Ok(());
            }
            let made = state.key.as_ref().map(|key| key.made(open));
            let left = end.saturating_duration_since(Instant::now());
            match made {
                Some(true) => {
                    let serial = open.mac.map_or(0, |mac| mac.serial);
                    if state.served.take(serial) {
                        return Ok(());
                    }
                    let text = "a hello with this number was served already: dial by aditd";
                    return Err(Refusal::new(Code::Denied, text));
                }
                None if open.service.as_str() == PING => return Ok(()),
                // Without a MAC no key helps.
                None if open.mac.is_some() && !left.is_zero() => {
                    let waited = self.changed.wait_timeout(state, left);
                    (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                }
                Some(false) | None => {
                    let text = "the hello does not show that it is the host's: dial by aditd";
                    return Err(Refusal::new(Code::Denied, text));
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use adit_channel::hello::{Common, KEY_LEN};

    use super::*;

    /// A hello as no other: each has another number.
    fn open(service: &str, key: Option<u8>) -> Open {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let mut open = Open::new(service.parse().unwrap(), Common::default());
        open.mac = key.map(|key| HostKey::new([key; KEY_LEN]).mac(&open, serial));
        open
    }

    fn admits(admission: &Admission, service: &str, key: Option<u8>) -> bool {
        let within = admission.check_within(&open(service, key), Duration::ZERO);
        within.is_ok()
    }

    #[test]
    fn where_the_host_gives_a_key_only_its_hellos_are_served() {
        let admission = Admission::default();
        // Not known yet, or a host that gives none.
        assert!(admits(&admission, "tcp:22", None) && admits(&admission, "tcp:22", Some(1)));
        admission.given(Some(HostKey::new([1; KEY_LEN])));
        assert!(admits(&admission, "tcp:22", Some(1)) && admits(&admission, "ping", Some(1)));
        for key in [None, Some(2)] {
            assert!(!admits(&admission, "tcp:22", key) && !admits(&admission, "ping", key));
        }
        // Without its stream there is no key, and what needs one is not served.
        admission.ended();
        for key in [None, Some(1), Some(2)] {
            assert!(!admits(&admission, "tcp:22", key) && admits(&admission, "ping", key));
        }
        // Another key, and another host.
        admission.given(Some(HostKey::new([2; KEY_LEN])));
        assert!(admits(&admission, "tcp:22", Some(2)) && !admits(&admission, "tcp:22", Some(1)));
        admission.given(None);
        assert!(admits(&admission, "tcp:22", None));
    }

    #[test]
    fn a_guest_that_requires_a_key_serves_nobody_before_it_has_one() {
        let admission = Admission::default();
        admission.require(true);
        for key in [None, Some(1)] {
            assert!(!admits(&admission, "tcp:22", key) && admits(&admission, "ping", key));
        }
        // Also with a host that gives none.
        admission.given(None);
        assert!(!admits(&admission, "tcp:22", None));
        admission.given(Some(HostKey::new([1; KEY_LEN])));
        assert!(admits(&admission, "tcp:22", Some(1)));
    }

    #[test]
    fn a_hello_that_is_replayed_is_served_once() {
        let admission = Admission::default();
        let key = |n| Some(HostKey::new([n; KEY_LEN]));
        admission.given(key(1));
        let (first, second) = (open("tcp:22", Some(1)), open("tcp:22", Some(1)));
        // In any order.
        for hello in [&second, &first] {
            assert_eq!(admission.check_within(hello, Duration::ZERO), Ok(()));
            let again = admission.check_within(hello, Duration::ZERO);
            assert_eq!(again.unwrap_err().code(), Code::Denied);
        }
        // The same key again begins anew, and another does not know it.
        admission.given(key(1));
        assert_eq!(admission.check_within(&first, Duration::ZERO), Ok(()));
        admission.given(key(2));
        assert!(admission.check_within(&second, Duration::ZERO).is_err());
    }

    #[test]
    fn an_agent_that_is_started_again_serves_nobody_before_it_has_a_key_again() {
        let run_dir = tempfile::tempdir().unwrap();
        let start = || Admission::of_this_boot(run_dir.path());
        let first = start();
        assert!(admits(&first, "tcp:22", None));
        first.given(Some(HostKey::new([1; KEY_LEN])));
        drop(first);
        let second = start();
        for key in [None, Some(1)] {
            assert!(!admits(&second, "tcp:22", key) && admits(&second, "ping", key));
        }
        second.given(Some(HostKey::new([2; KEY_LEN])));
        assert!(admits(&second, "tcp:22", Some(2)));
        // A host that gives none is believed by those that follow, too.
        second.given(None);
        assert!(admits(&second, "tcp:22", None) && admits(&start(), "tcp:22", None));
        // Without its directory nothing is known of this boot's start; what is in use is not disturbed.
        drop(run_dir);
        second.given(Some(HostKey::new([3; KEY_LEN])));
        assert!(admits(&second, "tcp:22", Some(3)));
    }

    #[test]
    fn r120_before_the_host_has_said_who_may_dial_nobody_is_known_to_be_it() {
        let known = |admission: &Admission| admission.is_hosts_within(Duration::ZERO).is_ok();
        let admission = Admission::default();
        // A tunnel is served then, a command is not.
        assert!(admits(&admission, "exec", None) && !known(&admission));
        admission.given(None);
        assert!(known(&admission));
        admission.ended();
        assert!(!known(&admission));
        // With a key only who has it is admitted at all.
        admission.given(Some(HostKey::new([1; KEY_LEN])));
        admission.ended();
        assert!(known(&admission) && !admits(&admission, "exec", None));
    }

    #[test]
    fn a_hello_that_overtakes_its_key_waits_for_it() {
        let admission = Admission::default();
        admission.require(true);
        std::thread::scope(|scope| {
            let early = scope.spawn(|| admission.check_within(&open("tcp:22", Some(1)), WAIT * 60));
            admission.given(Some(HostKey::new([1; KEY_LEN])));
            assert_eq!(early.join().unwrap(), Ok(()));
        });
    }
}
