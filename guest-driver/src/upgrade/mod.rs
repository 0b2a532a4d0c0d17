//! The agent becomes another program: the next version comes over the channel, signed, and takes the place of the one that runs.
//!
//! ```text
//!  order ─► signed by an anchor `agent`? for this machine? not below the floor? ─► the blob, copied beside the image's program
//!        ─► tried: says its version, takes the configuration ─► state.json: current, on trial ─► a running task ends
//!        ─► exec of the image's program (begin) ─► exec of the new one ─► the first hello: confirmed
//!                                                                     └─ none in time, or it ends thrice: taken back
//! ```
//! | file | what |
//! |---|---|
//! | `rules` | what becomes of it: pure |
//! | `kept`, `place` | what is on disk: the state; the programs |
//! | `begin` | the image's program begins the agent |
//! | `probe` | a program is tried before it is taken |
//! | `program` | this program's version and machine |
//!
//! The image's program, which a distribution's package may own, is never written.

pub mod begin;
pub mod kept;
pub mod place;
pub mod probe;
pub mod program;
pub mod rules;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Instant;
use std::{fmt, fs, io};

use adit_blob::{BlobError, Digest, Store};
use adit_tasks::package::{self, Package};
use adit_tasks::wire;

use self::begin::How;
use self::rules::{Failed, Installed, Kept, NotTaken, What};
use crate::config::Config;
use crate::running::SharedRunner;
use crate::{clock, log, protect};

/// Stack of the threads that wait.
const STACK_BYTES: usize = 128 * 1024;

/// Why an order is not followed. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Stable word.
    pub code: &'static str,
    /// Why, and what to do.
    pub text: String,
}

impl Refused {
    pub(crate) fn new(code: &'static str, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { code, text }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.text)
    }
}

/// An order that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The agent is that program already; what may run instead of it is as the order says.
    Already,
    /// It becomes it when it is told to switch.
    Next,
}

/// How this process came to be the agent.
#[derive(Clone, Debug)]
pub struct Begun {
    /// How it was started.
    pub how: How,
    /// It came over the channel.
    pub is_kept: bool,
    /// It has not had its hello yet.
    pub is_on_trial: bool,
    /// What is wrong with the program that it is not.
    pub faults: Vec<String>,
}

/// What becomes of this agent.
pub struct Upgrade {
    begun: Begun,
    state_dir: PathBuf,
    blobs: Arc<Store>,
    /// One order at a time; also held while what is kept is changed.
    ordering: Mutex<()>,
    trial: Mutex<Trial>,
    heard: Condvar,
    runner: OnceLock<SharedRunner>,
}

struct Trial {
    is_on: bool,
    /// Why there was no hello, as was said last.
    last: String,
}

impl Upgrade {
    /// Of an agent that begins with this configuration, and has files there. One on trial is watched from now on.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new(begun: Begun, config: &Config, blobs: Arc<Store>) -> io::Result<Arc<Self>> {
        let trial = Trial {
            is_on: begun.is_on_trial,
            last: "the host was not dialled".into(),
        };
        for fault in &begun.faults {
            log::event("agent-fault", &[("fault", fault)]);
        }
        let upgrade = Arc::new(Self {
            state_dir: config.state_dir.clone(),
            blobs,
            ordering: Mutex::default(),
            trial: Mutex::new(trial),
            heard: Condvar::new(),
            runner: OnceLock::new(),
            begun,
        });
        if upgrade.begun.is_on_trial {
            let watched = upgrade.clone();
            let watch = thread::Builder::new().name("trial".into());
            watch
                .stack_size(STACK_BYTES)
                .spawn(move || watched.watch())?;
        }
        Ok(upgrade)
    }

    /// What a switch waits for.
    pub fn set_runner(&self, runner: SharedRunner) {
        let _ = self.runner.set(runner);
    }

    fn trial(&self) -> MutexGuard<'_, Trial> {
        self.trial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ordering(&self) -> MutexGuard<'_, ()> {
        self.ordering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A hello with the host succeeded: this program is the agent from now on.
    pub fn hello(&self) {
        if !self.trial().is_on {
            return;
        }
        let _ordering = self.ordering();
        // Meanwhile it may have been taken back.
        if !self.trial().is_on {
            return;
        }
        let kept = kept::read(&self.state_dir).map(|kept| kept.confirmed());
        let done = kept.and_then(|kept| {
            // Before anybody hears of it: what was said must be so after a cut.
            kept::write(&self.state_dir, &kept)?;
            Ok(kept)
        });
        match done {
            Ok(kept) => {
                begin::alarm(std::time::Duration::ZERO);
                self.trial().is_on = false;
                self.heard.notify_all();
                log::event("agent-confirmed", &[("version", &program::version())]);
                place::clean(&self.state_dir, &kept);
            }
            // The next hello tries again; meanwhile it is on trial still.
            Err(e) => log::event("agent-not-kept", &[("error", &e)]),
        }
    }

    /// Why there was no hello.
    pub fn no_hello(&self, why: &str) {
        let mut trial = self.trial();
        if trial.is_on {
            why.clone_into(&mut trial.last);
        }
    }

    /// Waits for the hello, and goes back to the program before if there is none in time.
    fn watch(&self) {
        let until = Instant::now() + begin::limit();
        let mut trial = self.trial();
        while trial.is_on {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.heard.wait_timeout(trial, left);
            trial = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if !trial.is_on {
            return;
        }
        let last = trial.last.clone();
        drop(trial);
        let limit_s = begin::limit().as_secs();
        let why = format!("it had no hello within {limit_s} s; last: {last}");
        log::event("agent-on-trial", &[("why", &why)]);
        let ordering = self.ordering();
        if !self.trial().is_on {
            return;
        }
        let image = self.image_version();
        let back = kept::read(&self.state_dir).and_then(|kept| {
            let back = kept.taken_back(&image, &why);
            let is_back = back.is_some();
            let kept = back.unwrap_or_else(|| kept.no_way_back(&why));
            kept::write(&self.state_dir, &kept).map(|()| is_back)
        });
        if matches!(back, Ok(true)) {
            // A hello that comes now is too late.
            self.trial().is_on = false;
        }
        drop(ordering);
        match back {
            Ok(true) => self.switch_now(),
            // It goes on trying: nothing else may run here.
            Ok(false) => begin::alarm(std::time::Duration::ZERO),
            // The image's program counts the time as well, at the next start.
            Err(e) => log::event("agent-not-kept", &[("error", &e)]),
        }
    }

    /// The version of the image's program: as it was when this one came, or as this one's own.
    fn image_version(&self) -> semver::Version {
        let beside = kept::read(&self.state_dir)
            .ok()
            .and_then(|kept| kept.current);
        match beside {
            Some(current) if self.begun.is_kept => current.beside,
            _ => program::version(),
        }
    }

    /// Follows an order as far as it can be without ending this process.
    ///
    /// # Errors
    /// Why not. Nothing has changed but what came before.
    pub fn order(&self, config: &Config, envelope: &[u8]) -> Result<Taken, Refused> {
        let Ok(_ordering) = self.ordering.try_lock() else {
            return Err(Refused::new("busy", "another order is being followed"));
        };
        let trust = begin::trust(config);
        let (package, _) =
            package::check_new(envelope, &trust, program::ARCHITECTURE, clock::unix_ms())
                .map_err(|e| Refused::new(e.code(), format!("{e}; {}", e.remedy())))?;
        let before = kept::read(&self.state_dir).map_err(|e| {
            Refused::new("agent-unreadable", begin::unreadable(&self.state_dir, &e))
        })?;
        let running = running(&before, self.begun.is_kept);
        let image = self.image_version();
        let next = before.accept(&package, running, &image);
        let next = next.map_err(|not| not_taken(&package, not))?;
        if Digest(package.digest) == running {
            if next != before {
                kept::write(&self.state_dir, &next).map_err(place::refused)?;
            }
            return Ok(Taken::Already);
        }
        place::clean(&self.state_dir, &before);
        let blob = Digest(package.digest);
        let reading = self.blobs.open(blob).map_err(|e| no_blob(&e))?;
        if reading.size() != package.size {
            let text = format!(
                "the file has {} bytes, and not {}",
                reading.size(),
                package.size
            );
            return Err(Refused::new("agent-wrong-size", text));
        }
        let head = self.blobs.open(blob).map_err(|e| no_blob(&e))?;
        probe::is_program(head)?;
        if let Err(refused) = place::put(&self.state_dir, &package, envelope, reading) {
            if refused.code == "agent-wrong-digest" {
                let _ = self.blobs.remove(&blob);
            }
            return Err(refused);
        }
        let program = place::program(&self.state_dir, &Installed::of(&package));
        let tried = probe::run(&program, &package.version, &config.path);
        let kept = tried.and_then(|()| kept::write(&self.state_dir, &next).map_err(place::refused));
        if let Err(refused) = kept {
            place::clean(&self.state_dir, &before);
            return Err(refused);
        }
        let version = &package.version;
        log::event("agent-next", &[("version", version), ("digest", &blob)]);
        Ok(Taken::Next)
    }

    /// Whether a task runs, which a switch waits for.
    pub fn waits(&self) -> bool {
        self.runner.get().is_some_and(SharedRunner::is_busy)
    }

    /// Becomes the program that is the agent now, once no task runs. Returns at once.
    pub fn switch(self: &Arc<Self>) {
        let switched = self.clone();
        let waits = thread::Builder::new().name("switch".into());
        let started = waits
            .stack_size(STACK_BYTES)
            .spawn(move || switched.switch_now());
        if let Err(e) = started {
            self.stays(&e);
        }
    }

    fn switch_now(&self) {
        let runner = self.runner.get();
        // No task begins from here on.
        let mut runner = runner.map(SharedRunner::lock);
        if let Some(runner) = &mut runner {
            runner.close();
        }
        log::event("agent-switches", &[("from", &program::version())]);
        protect::undo();
        // An alarm outlives exec, and would end what comes after a program on trial.
        begin::alarm(std::time::Duration::ZERO);
        let e = self.begun.how.image().exec();
        protect::redo();
        self.stays(&e);
    }

    /// It could not become another program: then that one is not the agent either.
    fn stays(&self, e: &io::Error) {
        let image = self.begun.how.image.display();
        let why = format!("{image} could not be begun: {e}");
        log::event("agent-stays", &[("why", &why)]);
        let _ordering = self.ordering();
        let back = kept::read(&self.state_dir).and_then(|kept| {
            match kept.taken_back(&self.image_version(), &why) {
                Some(back) if kept.is_on_trial() => kept::write(&self.state_dir, &back),
                _ => Ok(()),
            }
        });
        if let Err(e) = back {
            log::event("agent-not-kept", &[("error", &e)]);
        }
    }

    /// What the host is told.
    pub fn program(&self) -> wire::Program {
        let kept = kept::read(&self.state_dir);
        let mut faults = self.begun.faults.clone();
        let kept = kept.unwrap_or_else(|e| {
            let fault = begin::unreadable(&self.state_dir, &e);
            if !faults.contains(&fault) {
                faults.push(fault);
            }
            Kept::default()
        });
        faults.extend(kept.failed.iter().map(fault));
        faults.truncate(wire::FAULTS_MAX);
        let current = kept.current.filter(|_| self.begun.is_kept);
        wire::Program {
            digest: current.map(|current| current.installed.digest.0),
            floor: kept
                .floor
                .map(|floor| floor.to_string())
                .unwrap_or_default(),
            taken_back: kept.failed.map(|failed| failed.installed.digest.0),
            faults,
        }
    }
}

/// The digest of the program that runs.
fn running(kept: &Kept, is_kept: bool) -> Digest {
    let current = kept.current.as_ref().filter(|_| is_kept);
    current.map_or_else(
        || {
            let own = fs::File::open("/proc/self/exe").and_then(Digest::of_reader);
            // Nothing has this one.
            own.map_or(Digest([0; 32]), |(digest, _)| digest)
        },
        |current| current.installed.digest,
    )
}

fn no_blob(e: &BlobError) -> Refused {
    let text = format!("{e}; send the file first");
    match e {
        BlobError::Unknown(_) => Refused::new("no-such-blob", text),
        e => Refused::new("agent-not-kept", e.to_string()),
    }
}

fn not_taken(package: &Package, why: NotTaken) -> Refused {
    match why {
        NotTaken::BelowFloor(floor) => Refused::new(
            "agent-below-floor",
            format!(
                "{} is older than {floor}, the oldest version that this guest takes since a package said so",
                package.version
            ),
        ),
        NotTaken::OnTrial(installed) => Refused::new(
            "agent-on-trial",
            format!(
                "{} came just before and is on trial; try again in a minute",
                installed.version
            ),
        ),
    }
}

/// A program, for people.
fn named(installed: &Installed) -> String {
    let digest = installed.digest.to_string();
    format!("{} ({})", installed.version, &digest[..16])
}

/// What is said of a program that failed.
pub fn fault(failed: &Failed) -> String {
    let Failed {
        installed,
        what,
        why,
    } = failed;
    let named = named(installed);
    match what {
        What::TakenBack => format!(
            "agent-taken-back: {named}: {why}; what ran before it runs again. Look into its log in the guest; `adit agent upgrade` \
             gives another, or the same once more"
        ),
        What::NoWayBack => format!(
            "agent-no-way-back: {named}: {why}; nothing else that may run is there, so it is begun again and again. Give it another \
             by package, or see to the host"
        ),
        What::Damaged => format!(
            "agent-damaged: {named}: {why}; another program is the agent. See to the disk, and to the anchors of the role agent; \
             then `adit agent upgrade`"
        ),
    }
}

/// The image's program, where a deleted one has a name that says so: a package has replaced it.
pub fn image(own: &Path) -> PathBuf {
    let text = own.to_string_lossy();
    match text.strip_suffix(" (deleted)") {
        Some(path) => path.into(),
        None => own.into(),
    }
}
