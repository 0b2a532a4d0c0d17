//! Which program is the agent: what is kept on disk, and what becomes of it. Pure: the clock and the disk are outside.
//!
//! ```text
//!  the image's program ◄──────────────────── taken back ──────────────┐
//!        │ order: signed, not below the floor                         │ STARTS_MAX starts, or the time of one,
//!        ▼                                                            │ and no hello
//!  current on trial, 0 starts ── start ──► on trial, n starts ────────┤
//!        ▲                                       │ the first hello     │
//!        │ order: it becomes `previous`          ▼                     ▼
//!        └───────────────────────────────── confirmed ◄──────────── previous
//! ```
//! - A start is counted on disk before the program begins, so that whatever it does counts.
//! - The way back leads to what ran before, and never below the floor: the highest `oldest_fallback` of any package that was
//!   taken. Where nothing else may run, the one on trial is begun again and again.
//! - What is damaged is not run. Then whatever there is serves, the image's own program last of all, and a fault says so. What was
//!   confirmed and cannot be begun as things are at the moment stays the agent: the image's program serves until the next start.
//! - The image's program, once it is newer than what came beside it, is the agent again.

use adit_blob::Digest;
use adit_tasks::package::Package;
use semver::Version;
use serde::{Deserialize, Serialize};

/// Starts without a hello after which a program is taken back.
pub const STARTS_MAX: u8 = 3;

/// A program that came over the channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    /// Its version.
    pub version: Version,
    /// Its sha256.
    pub digest: Digest,
}

/// What is kept. A key that is not known is another version's, and is skipped: the image's program is the older one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Nothing older is taken, or gone back to.
    #[serde(default)]
    pub floor: Option<Version>,
    /// The agent; none: the image's program is.
    #[serde(default)]
    pub current: Option<Current>,
    /// The agent before it, if that came over the channel too.
    #[serde(default)]
    pub previous: Option<Installed>,
    /// The last one that did not become the agent, or is not any more.
    #[serde(default)]
    pub failed: Option<Failed>,
}

/// The agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Current {
    /// Which program.
    pub installed: Installed,
    /// The version of the image's program when it came.
    pub beside: Version,
    /// It has not had a hello yet.
    #[serde(default)]
    pub trial: Option<Trial>,
}

/// A program on trial.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// How often it was begun.
    pub starts: u8,
    /// When it was begun last.
    pub began: Option<Now>,
}

/// A time of one boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// Names the boot.
    pub boot: String,
    /// Milliseconds since then.
    pub at_ms: u64,
}

/// A program that did not become the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Which.
    pub installed: Installed,
    /// What was done.
    pub what: What,
    /// Why.
    pub why: String,
}

/// What was done with a program that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// What ran before it runs again.
    TakenBack,
    /// It is begun again: nothing else may run.
    NoWayBack,
    /// It is not what was signed any more, or cannot be run.
    Damaged,
}

/// Why a package is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotTaken {
    /// The one before it is still on trial.
    OnTrial(Installed),
    /// It is older than what may run here.
    BelowFloor(Version),
}

impl Installed {
    /// Which program a package is about.
    pub fn of(package: &Package) -> Self {
        Self {
            version: package.version.clone(),
            digest: Digest(package.digest),
        }
    }
}

impl Kept {
    fn may_run(&self, version: &Version) -> bool {
        self.floor.as_ref().is_none_or(|floor| version >= floor)
    }

    /// Takes a package. Of the program that runs it raises the floor, and no more. `running`: that one's digest; `beside`: the
    /// version of the image's program.
    ///
    /// # Errors
    /// It is not taken.
    pub fn accept(
        &self,
        package: &Package,
        running: Digest,
        beside: &Version,
    ) -> Result<Self, NotTaken> {
        let current = self.current.as_ref();
        if let Some(on_trial) = current.filter(|current| current.trial.is_some()) {
            return Err(NotTaken::OnTrial(on_trial.installed.clone()));
        }
        let installed = Installed::of(package);
        let floor = self
            .floor
            .clone()
            .max(Some(package.oldest_fallback.clone()));
        if installed.digest == running {
            let mut kept = self.clone();
            kept.floor = floor;
            // The image's program may be the one that runs, because the agent could not be begun.
            let may_run = |c: &Current| kept.may_run(&c.installed.version);
            kept.current = kept.current.clone().filter(may_run);
            return Ok(kept);
        }
        if let Some(floor) = self
            .floor
            .clone()
            .filter(|floor| installed.version < *floor)
        {
            return Err(NotTaken::BelowFloor(floor));
        }
        let previous = match current {
            Some(current) if current.installed != installed => Some(current.installed.clone()),
            // The agent that could not be begun comes once more.
            _ => self.previous.clone(),
        };
        Ok(Self {
            floor,
            previous,
            current: Some(Current {
                installed,
                beside: beside.clone(),
                trial: Some(Trial::default()),
            }),
            failed: None,
        })
    }

    /// What is the agent at a start of the image's program, which has this version: none, it itself. `limit_ms`: how long one on
    /// trial has for its hello. What is returned is to be on disk before the program begins.
    pub fn start(&self, image: &Version, now: &Now, limit_ms: u64) -> (Self, Option<Installed>) {
        let Some(current) = &self.current else {
            return (self.clone(), None);
        };
        if *image > current.installed.version && *image > current.beside {
            let kept = Self {
                current: None,
                previous: None,
                ..self.clone()
            };
            return (kept, None);
        }
        let Some(trial) = &current.trial else {
            return (self.clone(), Some(current.installed.clone()));
        };
        let limit_s = limit_ms / 1000;
        let is_late = |began: &Now| {
            began.boot == now.boot && now.at_ms.saturating_sub(began.at_ms) >= limit_ms
        };
        let why = match trial {
            trial if trial.starts >= STARTS_MAX => {
                Some(format!("it ended {STARTS_MAX} times before a hello"))
            }
            trial if trial.began.as_ref().is_some_and(is_late) => {
                Some(format!("it had no hello within {limit_s} s"))
            }
            _ => None,
        };
        match why {
            None => self.begun(trial.starts + 1, now),
            Some(why) => match self.taken_back(image, &why) {
                Some(kept) => {
                    let run = kept.current.as_ref().map(|c| c.installed.clone());
                    (kept, run)
                }
                None => self.no_way_back(&why).begun(1, now),
            },
        }
    }

    /// One more start of the one on trial.
    fn begun(&self, starts: u8, now: &Now) -> (Self, Option<Installed>) {
        let mut kept = self.clone();
        let began = Some(now.clone());
        let current = kept.current.as_mut();
        let run = current.map(|current| {
            current.trial = Some(Trial { starts, began });
            current.installed.clone()
        });
        (kept, run)
    }

    /// The agent before the one on trial is the agent again; none: nothing that there is may run.
    pub fn taken_back(&self, image: &Version, why: &str) -> Option<Self> {
        let current = self.current.as_ref()?;
        let previous = self.previous.clone();
        let previous = previous.filter(|previous| self.may_run(&previous.version));
        if previous.is_none() && !self.may_run(image) {
            return None;
        }
        Some(self.instead(current, previous, What::TakenBack, why))
    }

    /// The one on trial stays, for want of another.
    pub fn no_way_back(&self, why: &str) -> Self {
        let mut kept = self.clone();
        kept.failed = self.current.as_ref().map(|current| Failed {
            installed: current.installed.clone(),
            what: What::NoWayBack,
            why: why.into(),
        });
        kept
    }

    /// The agent's program is not what it was, or cannot be run: another takes its place, the image's last of all.
    pub fn damaged(&self, why: &str) -> Self {
        let Some(current) = &self.current else {
            return self.clone();
        };
        let previous = self.previous.clone();
        let previous = previous.filter(|previous| self.may_run(&previous.version));
        self.instead(current, previous, What::Damaged, why)
    }

    fn instead(
        &self,
        current: &Current,
        previous: Option<Installed>,
        what: What,
        why: &str,
    ) -> Self {
        Self {
            floor: self.floor.clone(),
            current: previous.map(|installed| Current {
                installed,
                beside: current.beside.clone(),
                trial: None,
            }),
            previous: None,
            failed: Some(Failed {
                installed: current.installed.clone(),
                what,
                why: why.into(),
            }),
        }
    }

    /// The one on trial has had its hello. From here on nothing that it does takes it back.
    pub fn confirmed(&self) -> Self {
        let mut kept = self.clone();
        if let Some(current) = &mut kept.current {
            current.trial = None;
        }
        kept.failed = kept.failed.filter(|f| f.what != What::NoWayBack);
        kept
    }

    /// Whether the agent is on trial.
    pub fn is_on_trial(&self) -> bool {
        self.current.as_ref().is_some_and(|c| c.trial.is_some())
    }
}

#[cfg(test)]
mod tests;
