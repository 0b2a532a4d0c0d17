//! The configuration in force, which SIGHUP replaces while the agent runs.
//!
//! | key | takes effect |
//! |---|---|
//! | files in `trust_dir` | at the next task, without SIGHUP: they are read for each |
//! | `trust_dir`, `script`, `file` | at the next task after SIGHUP |
//! | `policy`, and what is in that file | at the next task or stream after SIGHUP; what becomes of a file that cannot be used: `policy::Standing` |
//! | `allow_ports` | at the next stream after SIGHUP; streams that are open go on |
//! | `clock` | when the host next sends its time after SIGHUP |
//! | `vm_id`, `card` and what is in it, `state_dir`, `run_dir` | at the next start of the agent |

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use adit_names::VmId;
use adit_tasks::{KeyId, Roles, wire};

use crate::config::{Config, ConfigError};
use crate::enrol::{self, Enrolment, Fault};
use crate::policy::Standing;
use crate::trust::Anchors;
use crate::{clock, log};

/// The configuration in force.
pub struct Live {
    config: RwLock<Arc<Config>>,
    policy: RwLock<Arc<Standing>>,
    /// Who this guest is, as found at the start.
    enrolment: Enrolment,
    /// What was last logged of the anchors.
    logged: Mutex<Logged>,
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
            enrolment,
            logged: Mutex::default(),
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
        let anchors = Anchors::read(&config).with_card(&self.enrolment, &config, now_ms);
        let skipped = anchors.skipped.iter().chain(&anchors.distrusted);
        let now = Logged {
            keys: (anchors.keys.anchors())
                .map(|anchor| (anchor.key.id(), anchor.roles))
                .collect(),
            skipped: skipped.map(ToString::to_string).collect(),
        };
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// What the host is told of the enrolment.
    pub fn enrolment(&self, anchors: &Anchors) -> wire::Enrolment {
        let mut told = self.enrolment.told(anchors.card.as_ref());
        if let Some(fault) = self.policy().fault() {
            told.faults.truncate(wire::FAULTS_MAX - 1);
            told.faults.insert(0, fault.to_string());
        }
        told
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
