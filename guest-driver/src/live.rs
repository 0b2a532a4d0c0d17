//! The configuration in force, which SIGHUP replaces while the agent runs.
//!
//! | key | takes effect |
//! |---|---|
//! | files in `trust_dir` | at the next task, without SIGHUP: they are read for each |
//! | `trust_dir`, `script`, `file` | at the next task after SIGHUP |
//! | `policy`, and what is in that file | at the next task or stream after SIGHUP; what becomes of a file that cannot be used: `policy::Standing` |
//! | `allow_ports`, `[[service]]` | at the next stream after SIGHUP; streams that are open go on |
//! | `require_host_key` | at the next stream after SIGHUP |
//! | `clock` | when the host next sends its time after SIGHUP |
//! | what is in the places of cards and trust documents | at SIGHUP; the host hears of it on the agent's next stream, which begins at once |
//! | trust documents that the host passes on | at the next task; a task that runs ends at once if its key is revoked |
//! | those that `adit-guest trust add` takes | at the next task; at SIGHUP a task that runs ends if its key is revoked, and the host hears of it as above |
//! | `vm_id`, `card`, `state_dir`, `run_dir` | at the next start of the agent |

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use adit_names::VmId;
use adit_tasks::trust::DOCUMENTS_MAX;
use adit_tasks::wire::{HeldDocument, TrustHeld};
use adit_tasks::{KeyId, Roles, wire};
use nix::sys::socket::{Shutdown, shutdown};

use crate::config::{Config, ConfigError};
use crate::conn::Conn;
use crate::enrol::{self, Enrolment, Fault};
use crate::exec::script;
use crate::policy::Standing;
use crate::trust::Anchors;
use crate::{clock, documents, log};

/// The configuration in force.
pub struct Live {
    config: RwLock<Arc<Config>>,
    policy: RwLock<Arc<Standing>>,
    /// Who this guest is, as found at the start or at SIGHUP.
    enrolment: RwLock<Arc<Enrolment>>,
    /// Held by whoever replaces it.
    enrolling: Mutex<()>,
    /// What was last logged of the anchors.
    logged: Mutex<Logged>,
    /// The task that runs.
    current: Mutex<Option<Current>>,
    /// The stream to the host.
    stream: Mutex<Option<OwnedFd>>,
    /// What the host was told on it of trust documents; none: nothing.
    told: Mutex<Option<TrustHeld>>,
}

/// A task that was verified, and has not ended.
struct Current {
    task: String,
    key: KeyId,
    /// Its key was revoked since.
    is_revoked: bool,
}

/// The trusted keys, and why others are not.
#[derive(Default, PartialEq, Eq)]
struct Logged {
    keys: Vec<(KeyId, Roles)>,
    skipped: Vec<String>,
}

impl Live {
    /// Begins with this configuration.
    pub fn new(config: Config, enrolment: Enrolment) -> Self {
        let policy = Standing::at_start(&config);
        say(&policy);
        Self {
            config: RwLock::new(Arc::new(config)),
            policy: RwLock::new(Arc::new(policy)),
            enrolment: RwLock::new(Arc::new(enrolment)),
            enrolling: Mutex::default(),
            logged: Mutex::default(),
            current: Mutex::default(),
            stream: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// The configuration at this moment.
    pub fn config(&self) -> Arc<Config> {
        let config = self.config.read();
        config.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The policy at this moment.
    pub fn policy(&self) -> Arc<Standing> {
        let policy = self.policy.read();
        policy.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is wrong with the policy file, as it was last read.
    pub fn policy_fault(&self) -> Option<Fault> {
        self.policy().fault().cloned()
    }

    /// Reads the policy file again, and logs what has become of it. What cannot be used changes nothing.
    pub fn reload_policy(&self) -> Arc<Standing> {
        let next = Arc::new(self.policy().next(&self.config()));
        say(&next);
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = next.clone();
        next
    }

    /// Reads the trust anchors; logs what has changed since they were last read.
    pub fn anchors(&self) -> Anchors {
        let (config, now_ms) = (self.config(), clock::unix_ms());
        let anchors = Anchors::read(&config).with_card(&self.enrolled(), &config, now_ms);
        let skipped = anchors.skipped.iter().chain(&anchors.distrusted);
        let now = Logged {
            keys: (anchors.keys.anchors())
                .map(|anchor| (anchor.key.id(), anchor.roles))
                .collect(),
            skipped: skipped.map(ToString::to_string).collect(),
        };
        let mut logged = lock(&self.logged);
        if now.keys != logged.keys {
            log::event("anchors", &[("count", &anchors.count())]);
        }
        for error in now.skipped.iter().filter(|e| !logged.skipped.contains(e)) {
            log::event("anchor-skipped", &[("error", error)]);
        }
        *logged = now;
        anchors
    }

    /// Who this guest is, by what these anchors say of its card.
    ///
    /// # Errors
    /// Nothing says so that is believed; begins with a stable code.
    pub fn me(&self, anchors: &Anchors) -> Result<VmId, String> {
        enrol::me(&self.config(), anchors.card.as_ref())
    }

    fn enrolled(&self) -> Arc<Enrolment> {
        let enrolment = self.enrolment.read();
        enrolment.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_enrolled(&self, enrolment: Enrolment) {
        let mut now = self
            .enrolment
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *now = Arc::new(enrolment);
    }

    /// What the host is told of the enrolment, and of `faults` besides.
    pub fn enrolment(&self, anchors: &Anchors, faults: &[String]) -> wire::Enrolment {
        let mut told = self.enrolled().told(anchors.card.as_ref());
        told.faults.splice(0..0, faults.iter().cloned());
        told.faults.truncate(wire::FAULTS_MAX);
        told
    }

    /// The id that a host has given this guest; none: there is no place to keep one.
    pub fn identity(&self) -> Option<wire::Identity> {
        let enrolled = self.enrolled();
        let id = enrolled.id();
        enrolled.kept.is_some().then_some(wire::Identity { id })
    }

    /// The host has said which id this guest has from now on.
    pub fn identified(&self, said: &wire::Identified) {
        let _one = lock(&self.enrolling);
        let mut enrolment = Enrolment::clone(&self.enrolled());
        if let Err(fault) = enrolment.identified(&self.config(), said) {
            log::event(fault.code, &[("why", &fault.why), ("do", &fault.remedy)]);
            // It is asked on each stream.
            if !enrolment.faults.contains(&fault) {
                enrolment.faults.push(fault);
            }
        }
        self.set_enrolled(enrolment);
    }

    /// Looks again who this guest is, at SIGHUP. If that has changed, the stream to the host ends, and the next one says so.
    pub fn enrol_again(&self) {
        let enrolling = lock(&self.enrolling);
        let (before, now) = (self.enrolled(), enrol::at_start(&self.config()));
        let says = |e: &Enrolment| {
            let card = e
                .card
                .as_ref()
                .map(|card| (card.place, card.envelope.clone()));
            (
                card,
                e.faults.clone(),
                e.key.as_ref().map(|key| key.public().id()),
            )
        };
        let has_changed = says(&before) != says(&now);
        self.set_enrolled(now);
        drop(enrolling);
        let anchors = self.anchors();
        self.end_revoked(&anchors);
        let is_news = |told: &TrustHeld| *told != held(&anchors, String::new());
        let has_changed = has_changed || lock(&self.told).as_ref().is_some_and(is_news);
        if has_changed && let Some(stream) = &*lock(&self.stream) {
            let _ = shutdown(stream.as_raw_fd(), Shutdown::Both);
        }
    }

    /// The stream to the host; none: there is none.
    pub fn talks_on(&self, conn: Option<&Conn>) {
        let own = conn.and_then(|conn| conn.as_fd().try_clone_to_owned().ok());
        *lock(&self.told) = None;
        *lock(&self.stream) = own;
    }

    /// What the host is told of trust documents that this guest has taken. `refused`: why one was not; empty: none was.
    pub fn held(&self, refused: String) -> TrustHeld {
        // Held while they are read: whoever takes one, and then looks here, finds it told or not told.
        let mut told = lock(&self.told);
        let said = held(&self.anchors(), refused);
        *told = Some(TrustHeld {
            refused: String::new(),
            ..said.clone()
        });
        said
    }

    /// Takes a trust document, or not; what runs by a key that is revoked with it ends.
    pub fn take(&self, envelope: &[u8]) -> TrustHeld {
        let taken = documents::take(&self.config(), &self.enrolled(), envelope);
        let refused = match taken {
            Ok(changed) => {
                if changed {
                    log::event("trust-taken", &[]);
                }
                String::new()
            }
            Err(fault) => {
                log::event("trust-refused", &[("why", &fault)]);
                fault.to_string()
            }
        };
        self.end_revoked(&self.anchors());
        self.held(refused)
    }

    /// A task that was verified is about to be recorded. Whoever revokes its key from here on finds it.
    ///
    /// # Errors
    /// The key has been revoked meanwhile.
    pub fn runs(&self, task: &str, key: KeyId) -> Result<(), String> {
        let mut current = lock(&self.current);
        if self.anchors().keys.is_revoked(&key) {
            return Err(format!("revoked-key: the key {key} was revoked here"));
        }
        *current = Some(Current {
            task: task.to_owned(),
            key,
            is_revoked: false,
        });
        Ok(())
    }

    /// That task has ended. Returns its key if that was revoked meanwhile.
    pub fn ran(&self) -> Option<KeyId> {
        let current = lock(&self.current).take();
        current.filter(|c| c.is_revoked).map(|c| c.key)
    }

    fn end_revoked(&self, anchors: &Anchors) {
        let mut current = lock(&self.current);
        if let Some(Current {
            task,
            key,
            is_revoked,
        }) = &mut *current
            && anchors.keys.is_revoked(key)
            && !*is_revoked
        {
            *is_revoked = true;
            script::end(task);
        }
    }

    /// Reads the configuration file again. Returns the keys whose change needs a restart; they keep their old values.
    ///
    /// # Errors
    /// The file cannot be used; the configuration before stays in force.
    pub fn reload(&self) -> Result<Vec<&'static str>, ConfigError> {
        let old = self.config();
        let mut new = Config::load(&old.path)?;
        let mut kept = Vec::new();
        keep("vm_id", &mut new.vm_id, &old.vm_id, &mut kept);
        keep("card", &mut new.card, &old.card, &mut kept);
        keep("state_dir", &mut new.state_dir, &old.state_dir, &mut kept);
        keep("run_dir", &mut new.run_dir, &old.run_dir, &mut kept);
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        Ok(kept)
    }
}

fn held(anchors: &Anchors, refused: String) -> TrustHeld {
    let documents = anchors.held.documents().iter().take(DOCUMENTS_MAX);
    TrustHeld {
        documents: documents
            .map(|taken| HeldDocument {
                signer: taken.signer.0,
                own: taken.vm_id.is_some(),
                sequence: taken.sequence,
            })
            .collect(),
        revoked: u16::try_from(anchors.held.revoked().count()).unwrap_or(u16::MAX),
        refused,
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn say(policy: &Standing) {
    if let Some((file, policy)) = policy.policy() {
        let (file, rules) = (file.display(), policy.rules());
        log::event("policy", &[("file", &file), ("rules", &rules)]);
    }
    if let Some(Fault {
        code, why, remedy, ..
    }) = policy.fault()
    {
        log::event(code, &[("why", why), ("do", remedy)]);
    }
}

fn keep<T: Clone + PartialEq>(
    key: &'static str,
    new: &mut T,
    old: &T,
    kept: &mut Vec<&'static str>,
) {
    if new != old {
        kept.push(key);
        new.clone_from(old);
    }
}
