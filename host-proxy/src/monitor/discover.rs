//! Directories in which VMMs put their sockets: a thread looks after each, and sleeps while nothing happens there.
//!
//! ```text
//! inotify ─► look: which names have a socket that may be used ─► watch ─► HasFound, to the worker that has asked
//! ```
//! The worker can open no directory, and names none: it asks for a section of the configuration by its number, and is told names. The
//! monitor reads names of files and who they belong to, and opens nothing that it finds (`O_PATH`). See `look` for what is checked.

mod look;

use std::collections::BTreeMap;
use std::io::{self, PipeWriter};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::privileged::NotDone;
use super::wire::HasFound;
use crate::config::{Config, DiscoverConfig};
use look::Watcher;
#[cfg(test)]
pub(super) use look::{FOUND_MAX, REFUSED_MAX, WITHOUT_MAX};

/// The directories of the configuration.
#[derive(Debug, Default)]
pub struct Discover(Mutex<BTreeMap<u64, Section>>);

#[derive(Debug)]
struct Section {
    found: watch::Receiver<HasFound>,
    /// Closed, its thread ends.
    _stop: PipeWriter,
    /// Whoever waits for news: one, so that workers that come and go leave nothing behind.
    waits: CancellationToken,
}

impl Discover {
    /// Looks after those of this configuration from now on.
    pub fn set(&self, config: &Config) {
        let mut sections = self.sections();
        let keys: Vec<u64> = config.discover.iter().map(DiscoverConfig::key).collect();
        sections.retain(|key, _| keys.contains(key));
        for (key, config) in keys.into_iter().zip(&config.discover) {
            if sections.contains_key(&key) {
                continue;
            }
            match Section::start(config.clone()) {
                Ok(section) => drop(sections.insert(key, section)),
                Err(e) => {
                    tracing::error!(dir = %config.dir.display(), error = %e, "nobody looks after it");
                }
            }
        }
    }

    /// What is found in a section, once that is another version than `seen`.
    ///
    /// # Errors
    /// The configuration has no such section.
    pub async fn next(&self, key: u64, seen: u64) -> Result<HasFound, NotDone> {
        let none = || NotDone::from(io::Error::other("there is no such [[discover]]"));
        let (mut found, replaced) = {
            let mut sections = self.sections();
            let section = sections.get_mut(&key).ok_or_else(none)?;
            let ours = CancellationToken::new();
            std::mem::replace(&mut section.waits, ours.clone()).cancel();
            (section.found.clone(), ours)
        };
        tokio::select! {
            found = found.wait_for(|found| found.version != seen) => {
                found.map(|found| found.clone()).map_err(|_| none())
            }
            () = replaced.cancelled() => Err(none()),
        }
    }

    fn sections(&self) -> MutexGuard<'_, BTreeMap<u64, Section>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Section {
    fn start(config: DiscoverConfig) -> io::Result<Self> {
        let (tell, found) = watch::channel(HasFound::default());
        let (stop, stopped) = io::pipe()?;
        let watcher = Watcher::new(config)?;
        std::thread::Builder::new()
            .name("discover".into())
            .spawn(move || watcher.run(&stop, &tell))?;
        Ok(Self {
            found,
            _stop: stopped,
            waits: CancellationToken::new(),
        })
    }
}
