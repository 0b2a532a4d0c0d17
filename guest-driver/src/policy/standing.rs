//! The policy in force.
//!
//! | at | the file | then |
//! |---|---|---|
//! | start | is good | it is in force |
//! | start | is not there, and the configuration does not name it | there is no policy: the configuration alone decides |
//! | start | is not there, and the configuration names it | closed: nothing runs, nothing is dialled |
//! | start | cannot be used | closed |
//! | reload | is good | it is in force, from the next task and the next stream on |
//! | reload | cannot be used, or is gone | what was in force stays, and a fault says so; closed if there was none |
//! | reload | is not there, never was, and is not named | there is no policy |
//!
//! So a policy, once there, goes only with a restart of the agent. Each decision is made by one state, from its beginning to its
//! end: a reload meanwhile counts for the next one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;

use super::accounts::{self, Lookup, System, Touches};
use super::decide::{Accounts, Decision, Line, Policy, Request};
use super::source::{self, PolicyError};
use crate::config::Config;
use crate::enrol::Fault;

/// Where a policy is if the configuration names none.
pub const DEFAULT_FILE: &str = "/etc/adit-guest/policy.toml";

/// What decides now.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    force: Force,
    /// What is wrong with the file.
    fault: Option<Fault>,
}

#[derive(Clone, Debug, Default)]
enum Force {
    /// The configuration alone decides.
    #[default]
    None,
    /// This policy does.
    Policy(Arc<(PathBuf, Policy)>),
    /// There should be a policy, and none can be used.
    Closed(PathBuf),
}

/// What a policy says, with its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The file; none: there is no policy.
    pub file: Option<PathBuf>,
    /// Whether it allows.
    pub allowed: bool,
    /// The line that decides; none: no line could be read.
    pub line: Option<Line>,
    /// Why not; or by what.
    pub reason: String,
    /// The root below which a file may be written, following no link.
    pub root: Option<String>,
}

impl Answer {
    /// A denial in one line: `FILE:LINE: REASON`.
    pub fn said(&self) -> String {
        let file = self.file.as_deref().unwrap_or(Path::new(""));
        let line = self.line.map(|line| format!(":{line}"));
        format!(
            "{}{}: {}",
            file.display(),
            line.unwrap_or_default(),
            self.reason
        )
    }
}

/// The file that a configuration means, and whether it must be there.
pub fn file_of(config: &Config) -> (&Path, bool) {
    match &config.policy {
        Some(file) => (file, true),
        None => (Path::new(DEFAULT_FILE), false),
    }
}

fn fault(e: &PolicyError, then: &str) -> Fault {
    Fault {
        code: e.code(),
        place: "policy",
        why: e.to_string(),
        remedy: format!("{}; {then}", e.remedy()),
    }
}

impl Standing {
    /// What a start of the agent makes of the file.
    pub fn at_start(config: &Config) -> Self {
        Self::default().next(config)
    }

    /// What a reload makes of it.
    pub fn next(&self, config: &Config) -> Self {
        let (file, is_named) = file_of(config);
        let was_there = !matches!(self.force, Force::None);
        let (e, closed) = match source::read(file) {
            Ok(policy) => {
                let force = Force::Policy(Arc::new((file.into(), policy)));
                return Self { force, fault: None };
            }
            Err(PolicyError::Missing { .. }) if !is_named && !was_there => return Self::default(),
            Err(e) => (e, Force::Closed(file.into())),
        };
        match &self.force {
            Force::Policy(before) => Self {
                force: Force::Policy(before.clone()),
                fault: Some(fault(&e, "the policy before stays in force until then")),
            },
            Force::None | Force::Closed(_) => Self {
                force: closed,
                fault: Some(fault(
                    &e,
                    "until then no task runs and no service is dialled",
                )),
            },
        }
    }

    /// A policy that was read elsewhere.
    pub fn of(file: &Path, policy: Policy) -> Self {
        let force = Force::Policy(Arc::new((file.into(), policy)));
        Self { force, fault: None }
    }

    /// What is wrong with the file.
    pub fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// The file and the policy that is in force.
    pub fn policy(&self) -> Option<(&Path, &Policy)> {
        match &self.force {
            Force::Policy(policy) => Some((&policy.0, &policy.1)),
            Force::None | Force::Closed(_) => None,
        }
    }

    /// Decides a request: the only way to [`Policy::decide`].
    pub fn answer(&self, request: &Request<'_>, guest: &dyn Lookup) -> Answer {
        match &self.force {
            Force::None => {
                // What a guest's owner has to switch on is off where nothing says anything.
                let (allowed, reason) = match request {
                    Request::Exec { .. } => (
                        false,
                        "there is no policy file, and without one commands are off",
                    ),
                    Request::Files { .. } => (
                        false,
                        "there is no policy file, and without one files are off",
                    ),
                    Request::Dial { .. } | Request::Step { .. } => {
                        (true, "there is no policy file")
                    }
                };
                Answer {
                    file: None,
                    allowed,
                    line: None,
                    reason: reason.into(),
                    root: None,
                }
            }
            Force::Closed(file) => Answer {
                file: Some(file.clone()),
                allowed: false,
                line: None,
                reason: match &self.fault {
                    Some(fault) => fault.to_string(),
                    None => "it cannot be used".into(),
                },
                root: None,
            },
            Force::Policy(policy) => {
                let (file, policy) = &**policy;
                let file = Some(file.clone());
                let numbers = match request {
                    // It has no users: nothing is looked up for a stream.
                    Request::Dial { .. } => Accounts::default(),
                    Request::Step { .. } | Request::Exec { .. } | Request::Files { .. } => {
                        accounts::of_policy(policy, guest)
                    }
                };
                match policy.decide(request, &numbers) {
                    Decision::Allow { line, root } => Answer {
                        file,
                        allowed: true,
                        line: Some(line),
                        reason: "this line allows it".into(),
                        root: root.map(str::to_owned),
                    },
                    Decision::Deny { line, reason } => Answer {
                        file,
                        allowed: false,
                        line: Some(line),
                        reason,
                        root: None,
                    },
                }
            }
        }
    }

    /// Whether a step may run: the root that its file must be below, if it writes one.
    ///
    /// # Errors
    /// It may not; where that is said, and why.
    pub fn step(&self, touches: Touches<'_>) -> Result<Option<String>, String> {
        let answer = self.answer(&touches.request(&System), &System);
        match answer.allowed {
            true => Ok(answer.root),
            false => Err(answer.said()),
        }
    }

    /// Whether any command may be run at all, because the host says so or a ticket: what is off is off for all that is asked.
    ///
    /// # Errors
    /// None may: there is no policy, or it has no rule for commands.
    pub fn exec_at_all(&self) -> Result<(), Refusal> {
        let allow = "`allow = \"host\"` or `allow = \"ticket\"`";
        self.at_all(("commands", "exec", allow), Policy::lets_anybody)
    }

    /// The same of files.
    ///
    /// # Errors
    /// As [`exec_at_all`](Self::exec_at_all).
    pub fn files_at_all(&self) -> Result<(), Refusal> {
        let allow = "`allow = \"host\"`";
        self.at_all(("files", "files", allow), Policy::lets_host_files)
    }

    fn at_all(
        &self,
        (what, section, allow): (&str, &str, &str),
        lets: fn(&Policy) -> bool,
    ) -> Result<(), Refusal> {
        let denied = |why: String| Err(Refusal::new(Code::Denied, why));
        match &self.force {
            Force::None => denied(format!(
                "{what} are off in this guest: its owner's policy ({DEFAULT_FILE}) would have to allow them, and there is none"
            )),
            Force::Closed(file) => denied(format!(
                "{what} are off in this guest: its policy {} cannot be used",
                file.display()
            )),
            Force::Policy(policy) if lets(&policy.1) => Ok(()),
            Force::Policy(policy) => denied(format!(
                "{what} are off in this guest: no [[{section}]] of its policy {} has {allow}",
                policy.0.display()
            )),
        }
    }

    /// Whether the host may have what runs shown, attached to and ended by its word alone.
    ///
    /// # Errors
    /// It may not: no rule lets it have any command run.
    pub fn exec_by_host(&self) -> Result<(), String> {
        match &self.force {
            Force::Policy(policy) if policy.1.lets_host() => Ok(()),
            Force::Policy(policy) => Err(format!(
                "this needs a signed ticket and a sealed stream: no [[exec]] of the guest's policy {} has `allow = \"host\"`",
                policy.0.display()
            )),
            Force::None | Force::Closed(_) => Err("commands are off in this guest".into()),
        }
    }

    /// Whether this program may be run as this user: because a ticket says so, or the host alone.
    ///
    /// # Errors
    /// It may not; where that is said, and why.
    pub fn exec(&self, user: &str, program: &str, ticket: bool) -> Result<(), String> {
        self.exec_at_all()
            .map_err(|refusal| refusal.text().to_owned())?;
        let request = Request::Exec {
            user: accounts::user(user, &System),
            command: program,
            ticket,
        };
        let answer = self.answer(&request, &System);
        match answer.allowed {
            true => Ok(()),
            false => Err(format!("the guest's policy: {}", answer.said())),
        }
    }

    /// Whether the host may have this read, or written, as this user: the directory that no link may lead out of.
    ///
    /// # Errors
    /// It may not; where that is said, and why.
    pub fn files(&self, user: &str, path: &str, write: bool) -> Result<String, String> {
        self.files_at_all()
            .map_err(|refusal| refusal.text().to_owned())?;
        let user = accounts::user(user, &System);
        let answer = self.answer(&Request::Files { user, path, write }, &System);
        match (answer.allowed, &answer.root) {
            (true, Some(root)) => Ok(root.clone()),
            _ => Err(format!("the guest's policy: {}", answer.said())),
        }
    }

    /// Whether the host may dial a service.
    ///
    /// # Errors
    /// It may not.
    pub fn dial(&self, service: &ServiceName) -> Result<(), Refusal> {
        let answer = self.answer(&Request::Dial { service }, &System);
        match answer.allowed {
            true => Ok(()),
            false => Err(Refusal::new(
                Code::Denied,
                format!("the guest's policy: {}", answer.said()),
            )),
        }
    }
}

#[cfg(test)]
mod tests;
