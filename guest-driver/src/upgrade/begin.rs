//! `adit-guest run` of the image's program: begins the program that is the agent, which may be another one.
//!
//! The image's program is what every init system starts, so it is the only one that has to be right. It becomes the other one by
//! `exec`: the process that the init system knows is the agent. For the time of a trial it has the kernel keep an alarm,
//! which outlives `exec`: a program that hangs at once, and watches nothing, is ended by that.
//!
//! What it says to the other program is the command line `run --config FILE --kept-by IMAGE [--trial]`, in every version.

use std::fmt::Display;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use adit_tasks::TrustStore;
use nix::sys::signal::{SigSet, Signal};

use super::place::NotRun;
use super::rules::{Installed, Kept};
use super::{kept, named, place, program};
use crate::config::Config;
use crate::trust::Anchors;
use crate::{clock, enrol, log, sys};

/// How long a program has for its first hello with the host.
const TRIAL_LIMIT: Duration = Duration::from_secs(60);
/// How much later it is ended, if it did not see to that itself.
const ALARM_GRACE: Duration = Duration::from_secs(10);

/// How this process was started, and so how the next one is.
#[derive(Clone, Debug)]
pub struct How {
    /// The configuration.
    pub config: PathBuf,
    /// The image's program.
    pub image: PathBuf,
    /// For tests.
    pub transport: Option<String>,
}

impl How {
    /// The image's program, as the init system starts it.
    pub fn image(&self) -> Command {
        self.command(&self.image)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("run").arg("--config").arg(&self.config);
        if let Some(transport) = &self.transport {
            command.arg("--test-transport").arg(transport);
        }
        command
    }

    /// Becomes this program; returns only if it cannot.
    fn become_kept(&self, path: &Path, is_on_trial: bool) -> io::Error {
        let mut command = self.command(path);
        command.arg("--kept-by").arg(&self.image);
        if is_on_trial {
            command.arg("--trial");
            alarm(limit() + grace());
        }
        let e = command.exec();
        alarm(Duration::ZERO);
        e
    }
}

/// Has the kernel end this process after so long; zero: not any more.
pub fn alarm(after: Duration) {
    sys::default_signal(Signal::SIGALRM);
    let _ = SigSet::from_iter([Signal::SIGALRM]).thread_unblock();
    let seconds = u32::try_from(after.as_secs()).unwrap_or(u32::MAX);
    match seconds {
        0 => drop(nix::unistd::alarm::cancel()),
        seconds => drop(nix::unistd::alarm::set(seconds)),
    }
}

/// How long a program on trial has.
pub fn limit() -> Duration {
    test_limit().map_or(TRIAL_LIMIT, |(limit, _)| limit)
}

fn grace() -> Duration {
    test_limit().map_or(ALARM_GRACE, |(_, grace)| grace)
}

#[cfg(feature = "test-util")]
fn test_limit() -> Option<(Duration, Duration)> {
    let ms = std::env::var("ADIT_TEST_TRIAL_MS").ok()?.parse().ok()?;
    Some((Duration::from_millis(ms), Duration::from_secs(1)))
}

#[cfg(not(feature = "test-util"))]
fn test_limit() -> Option<(Duration, Duration)> {
    None
}

/// Begins the agent. Returns where that is this process, with what is wrong.
pub fn begin(how: &How) -> Vec<String> {
    // Of a program on trial that became this one.
    alarm(Duration::ZERO);
    let Some(config) = places(&how.config) else {
        return Vec::new();
    };
    let state_dir = &config.state_dir;
    let before = match kept::read(state_dir) {
        Ok(kept) if kept.current.is_some() => kept,
        Ok(_) => return Vec::new(),
        Err(e) => return vec![unreadable(state_dir, &e)],
    };
    let trust = trust(&config);
    let (mut kept, mut run) = before.start(&program::version(), &kept::now(), limit_ms());
    let mut faults = Vec::new();
    // At most two programs that came over the channel are kept.
    while let Some(installed) = run {
        let not = match place::verify(state_dir, &installed, &trust) {
            Ok(path) => match keep(state_dir, &before, &kept) {
                Err(why) if kept.is_on_trial() => {
                    // A start that is not counted could be repeated for ever.
                    faults.push(why);
                    return faults;
                }
                _ => {
                    let version = &installed.version;
                    log::event("agent", &[("version", version), ("path", &path.display())]);
                    let e = how.become_kept(&path, kept.is_on_trial());
                    NotRun::exec(&path, &e)
                }
            },
            Err(not) => not,
        };
        let fields: [(&str, &dyn Display); 2] = [("version", &installed.version), ("why", &not)];
        if let NotRun::Now(why) = &not
            && !kept.is_on_trial()
        {
            // It was confirmed, and is the agent again once that is over. One on trial was never any: an order may repeat it.
            log::event("agent-not-begun", &fields);
            faults.push(not_begun(&installed, why));
            break;
        }
        log::event("agent-damaged", &fields);
        kept = kept.damaged(&not.to_string());
        run = kept.current.as_ref().map(|c| c.installed.clone());
    }
    faults.extend(keep(state_dir, &before, &kept).err());
    faults
}

fn limit_ms() -> u64 {
    u64::try_from(limit().as_millis()).unwrap_or(u64::MAX)
}

fn keep(state_dir: &Path, before: &Kept, now: &Kept) -> Result<(), String> {
    if before == now {
        return Ok(());
    }
    kept::write(state_dir, now).map_err(|e| {
        format!(
            "agent-not-kept: {}: {e}; make it writable: until then the image's program is the agent",
            kept::dir(state_dir).display()
        )
    })
}

fn not_begun(installed: &Installed, why: &str) -> String {
    format!(
        "agent-not-begun: {}: {why}; the image's program is the agent, and each start tries this one again. See to the disk, the \
         clock, and the anchors of the role agent; then restart the agent",
        named(installed)
    )
}

/// What is said of a state that nobody can read.
pub fn unreadable(state_dir: &Path, e: &io::Error) -> String {
    let dir = kept::dir(state_dir);
    let dir = dir.display();
    format!(
        "agent-unreadable: {dir}/state.json: {e}; the image's program is the agent, and no other is taken: see to the disk, then \
         remove {dir} where what it has is to be forgotten, also which versions are too old"
    )
}

/// Whom the guest trusts, with what its card brings.
pub fn trust(config: &Config) -> TrustStore {
    let enrolment = enrol::look(config);
    Anchors::read(config)
        .with_card(&enrolment, config, clock::unix_ms())
        .keys
}

/// The configuration, or as much of it as is needed here: an older program has to begin a newer one also where that has keys of
/// its own.
fn places(path: &Path) -> Option<Config> {
    Config::load(path).or_else(|_| Config::places(path)).ok()
}

/// Whether the agent is a program on trial. Then an init system is to start it again whatever status it ended with.
pub fn is_on_trial(config: &Path) -> bool {
    places(config)
        .and_then(|config| kept::read(&config.state_dir).ok())
        .is_some_and(|kept| kept.is_on_trial())
}

/// Which program would run, for people; and what is wrong with it.
pub fn look(config: &Config) -> (Kept, Result<Option<Installed>, String>) {
    match kept::read(&config.state_dir) {
        Err(e) => (Kept::default(), Err(unreadable(&config.state_dir, &e))),
        Ok(kept) => {
            let (_, run) = kept.start(&program::version(), &kept::now(), limit_ms());
            let verified = run.map_or(Ok(None), |installed| {
                let verified = place::verify(&config.state_dir, &installed, &trust(config));
                match verified {
                    Ok(_) => Ok(Some(installed)),
                    Err(NotRun::Damaged(why)) => Err(why),
                    Err(NotRun::Now(why)) => Err(not_begun(&installed, &why)),
                }
            });
            (kept, verified)
        }
    }
}
