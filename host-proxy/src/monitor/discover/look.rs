//! One directory: what is in it, and whether that may be used.
//!
//! | part of a path | may be used |
//! |---|---|
//! | above `dir` | of root, of this user or of `dir`'s owner; nobody else may write there, unless it is sticky |
//! | `dir` itself | nobody but its owner may write there, so all entries are that one's |
//! | a directory in it | not by everybody to be written; below the first one also of root, of this user or of the owner of the one above |
//! | the socket | of root, of this user or of its directory's owner |
//! | a link, anywhere | never |
//!
//! This is what the doorkeeper checks at every dial (`adit-port door`), and of the directories above besides: a name must be nobody's to
//! take who is not meant to make VMs (R127). What a VM is called, its path says, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use adit_names::VmId;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::geteuid;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat};
use tokio::sync::watch;

use super::HasFound;
use crate::config::DiscoverConfig;

/// Most VMs of a directory.
pub const FOUND_MAX: usize = 256;
/// Most names of a directory that are told though they have no socket: a VMM that is started again has none for a moment.
pub const WITHOUT_MAX: usize = 128;
/// Most entries of a directory that are looked at.
const ENTRIES_MAX: usize = 1024;
/// Most lines about what is not used.
pub const REFUSED_MAX: usize = 16;
/// Most characters of such a line.
const LINE_MAX: usize = 200;
/// How long what changes together may take.
const SETTLE: Duration = Duration::from_millis(20);
/// How long after the last look the next one begins.
const EVERY: Duration = Duration::from_millis(100);

/// A directory is looked at again when one of these happens in it.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW);

/// Looks after a directory.
pub(super) struct Watcher {
    config: DiscoverConfig,
    inotify: OwnedFd,
    watches: BTreeMap<PathBuf, i32>,
    /// Names that had a socket when it was looked last, or before and are there still.
    known: BTreeSet<VmId>,
}

/// What a look has found.
#[derive(Default)]
struct Look {
    sockets: Vec<VmId>,
    without: Vec<VmId>,
    refused: Vec<String>,
    left_out: usize,
    /// Something was not looked at.
    is_partial: bool,
}

/// What is at the path of a name.
enum At {
    Socket,
    /// The entry is there, and no socket.
    Without,
    /// Something else.
    Nothing,
}

impl Watcher {
    pub(super) fn new(config: DiscoverConfig) -> io::Result<Self> {
        Ok(Self {
            config,
            inotify: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?,
            watches: BTreeMap::new(),
            known: BTreeSet::new(),
        })
    }

    /// Tells what is there, and whenever that changes, until the other end of `stop` is closed.
    pub(super) fn run(mut self, stop: &PipeReader, tell: &watch::Sender<HasFound>) {
        loop {
            let looked = Instant::now();
            let found = self.look();
            tell.send_if_modified(|told| {
                let is_news = told.version == 0 || !told.says_as(&found);
                if is_news {
                    let version = told.version + 1;
                    *told = HasFound { version, ..found };
                }
                is_news
            });
            let mut fds = [
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            if fds[0].any().unwrap_or(true) {
                return;
            }
            std::thread::sleep(SETTLE.max(EVERY.saturating_sub(looked.elapsed())));
            let mut events = [0; 4096];
            while rustix::io::read(&self.inotify, &mut events).is_ok_and(|n| n > 0) {}
        }
    }

    fn look(&mut self) -> HasFound {
        let mut watched = BTreeMap::new();
        let mut look = Look::default();
        // Watched first: what changes while it is looked at is looked at again.
        let dir = self.config.dir.clone();
        let failed = match self.watch(&dir, &mut watched) {
            Ok(()) => self.look_into(&dir, &mut watched, &mut look).err(),
            // The closest one above it that there is.
            Err(rustix::io::Errno::NOENT) => {
                let mut above = dir.ancestors().skip(1);
                let is_watched = above.any(|at| self.watch(at, &mut watched).is_ok());
                (!is_watched).then(|| "nothing above it can be watched".to_owned())
            }
            Err(rustix::io::Errno::NOTDIR) => Some("it is a link, or no directory".into()),
            Err(e) => Some(format!("it cannot be watched: {e}")),
        };
        if let Some(why) = failed {
            look.is_partial = true;
            look.refuse(&dir, &why);
        }
        let kept: BTreeSet<i32> = watched.values().copied().collect();
        for watch in self.watches.values().filter(|watch| !kept.contains(watch)) {
            // It is gone already where its directory was removed.
            let _ = inotify::remove_watch(&self.inotify, *watch);
        }
        self.watches = watched;
        self.told(look)
    }

    /// Has changes in a directory heard.
    fn watch(&self, at: &Path, watched: &mut BTreeMap<PathBuf, i32>) -> rustix::io::Result<()> {
        let watch = inotify::add_watch(&self.inotify, at, CHANGES)?;
        watched.insert(at.into(), watch);
        Ok(())
    }

    fn look_into(
        &self,
        path: &Path,
        watched: &mut BTreeMap<PathBuf, i32>,
        look: &mut Look,
    ) -> Result<(), String> {
        let dir = open_dir(path).map_err(|e| match e {
            // The second is what is said of a link that must be a directory.
            rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR => {
                "a link leads there: write where it leads to".to_owned()
            }
            e => format!("cannot be opened: {e}"),
        })?;
        let found = fstat(&dir).map_err(|e| e.to_string())?;
        if found.st_mode & 0o022 != 0 {
            return Err(
                "others than its owner may write there, and could plant a socket: `chmod go-w` it"
                    .into(),
            );
        }
        check_above(path, found.st_uid)?;
        let mut names = BTreeMap::new();
        let entries = Dir::read_from(&dir).map_err(|e| e.to_string())?;
        let mut seen = 0;
        for entry in entries {
            let entry = entry.map_err(|e| e.to_string())?;
            let entry = OsStr::from_bytes(entry.file_name().to_bytes());
            let Some(name) = entry
                .to_str()
                .and_then(|entry| self.config.pattern.name(entry))
            else {
                continue;
            };
            if matches!(name, "." | "..") {
                continue;
            }
            seen += 1;
            if seen > ENTRIES_MAX {
                look.is_partial = true;
                look.refuse(
                    path,
                    &format!(
                        "it has more than {ENTRIES_MAX} entries: the others are not looked at"
                    ),
                );
                break;
            }
            names.insert(name.to_owned(), entry.to_owned());
        }
        for (name, entry) in names {
            let at = path.join(&entry);
            let id = name.parse::<VmId>();
            match (self.at(&dir, &found, &at, watched), id) {
                (Ok(At::Nothing), _) | (Ok(At::Without), Err(_)) => {}
                (Ok(At::Socket), Ok(id)) => look.sockets.push(id),
                (Ok(At::Without), Ok(id)) => look.without.push(id),
                (Ok(At::Socket), Err(e)) => look.refuse(&at, &format!("it names no VM: {e}")),
                (Err((at, why)), id) => {
                    look.refuse(&at, &why);
                    // It was found when it was right: what is wrong with it now, its doorkeeper says.
                    look.without.extend(id.ok());
                }
            }
        }
        Ok(())
    }

    /// What is at an entry of the directory, with all that is below it.
    fn at(
        &self,
        dir: &OwnedFd,
        dir_stat: &Stat,
        entry: &Path,
        watched: &mut BTreeMap<PathBuf, i32>,
    ) -> Result<At, (PathBuf, String)> {
        let below = self.config.pattern.below();
        let mut above = dir.try_clone().map_err(|e| (entry.into(), e.to_string()))?;
        let (mut above_uid, mut path) = (dir_stat.st_uid, entry.to_owned());
        for nth in 0..=below.len() {
            if nth > 0 {
                path.push(&below[nth - 1]);
            }
            let wrong = |why: String| (path.clone(), why);
            let (is_first, is_last) = (nth == 0, nth == below.len());
            if !is_last {
                // What is wrong with it shows below.
                let _ = self.watch(&path, watched);
            }
            let name = path.file_name().unwrap_or_default();
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = match openat(above.as_fd(), name, flags, Mode::empty()) {
                Ok(found) => found,
                Err(rustix::io::Errno::NOENT) if is_first => return Ok(At::Nothing),
                Err(rustix::io::Errno::NOENT) => return Ok(At::Without),
                Err(e) => return Err(wrong(e.to_string())),
            };
            let stat = fstat(&found).map_err(|e| wrong(e.to_string()))?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            let is_of_one = [0, geteuid().as_raw(), above_uid].contains(&stat.st_uid);
            let stranger = || {
                let uid = stat.st_uid;
                wrong(format!(
                    "it belongs to user {uid}, and its directory to user {above_uid}: somebody else may have put it there"
                ))
            };
            match kind {
                FileType::Symlink => return Err(wrong("it is a link".into())),
                FileType::Socket if is_last && is_of_one => return Ok(At::Socket),
                FileType::Socket if is_last => return Err(stranger()),
                FileType::Directory if !is_last => {
                    if stat.st_mode & 0o002 != 0 {
                        let why = "it may be written by everybody, who could plant a socket there: `chmod o-w` it";
                        return Err(wrong(why.into()));
                    }
                    if !is_first && !is_of_one {
                        return Err(stranger());
                    }
                }
                _ if is_first => return Ok(At::Nothing),
                _ if is_last => return Err(wrong("it is not a socket".into())),
                _ => return Err(wrong("it is no directory".into())),
            }
            (above, above_uid) = (found, stat.st_uid);
        }
        Ok(At::Nothing)
    }

    /// What is told of a look.
    fn told(&mut self, mut look: Look) -> HasFound {
        look.is_partial |= look.sockets.len() > FOUND_MAX || look.without.len() > WITHOUT_MAX;
        if look.sockets.len() > FOUND_MAX {
            // Whoever was first stays.
            look.sockets.sort_by_key(|name| !self.known.contains(name));
            let more = look.sockets.split_off(FOUND_MAX).len();
            let why = format!(
                "it has {more} sockets more than the {FOUND_MAX} that a directory may have"
            );
            look.refuse(&self.config.dir.clone(), &why);
        }
        look.without.sort_by_key(|name| !self.known.contains(name));
        look.without.truncate(WITHOUT_MAX);
        let is_there = |name: &VmId| look.without.contains(name);
        let stay = self.known.iter().filter(|name| is_there(name)).cloned();
        self.known = stay.chain(look.sockets.iter().cloned()).collect();
        if look.left_out > 0 {
            look.refused.push(format!("and {} more", look.left_out));
        }
        let sockets = look.sockets.into_iter().map(|name| (name, true));
        let without = look.without.into_iter().map(|name| (name, false));
        HasFound {
            version: 0,
            vms: sockets.chain(without).collect(),
            is_whole: !look.is_partial,
            refused: look.refused,
        }
    }
}

impl Look {
    fn refuse(&mut self, at: &Path, why: &str) {
        if self.refused.len() < REFUSED_MAX {
            let line = format!("{}: {why}", at.display());
            let line = adit_names::escape(&line).at_most(LINE_MAX);
            self.refused.push(line.to_string());
        } else {
            self.left_out += 1;
        }
    }
}

/// Opens a directory, to which no link leads at any part of its path. Not by `openat2`: `RestrictSUIDSGID=` of a unit forbids that.
fn open_dir(path: &Path) -> rustix::io::Result<OwnedFd> {
    let to = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = openat(CWD, "/", OFlags::PATH | to, Mode::empty())?;
    let mut parts = path.components().skip(1).peekable();
    while let Some(part) = parts.next() {
        let how = match parts.peek() {
            Some(_) => OFlags::PATH,
            None => OFlags::RDONLY,
        };
        at = openat(&at, part.as_os_str(), how | to, Mode::empty())?;
    }
    Ok(at)
}

/// Checks the directories above one of this owner.
fn check_above(path: &Path, owner: u32) -> Result<(), String> {
    for above in path.ancestors().skip(1) {
        let shown = above.display();
        let found: Metadata = fs::symlink_metadata(above).map_err(|e| format!("{shown}: {e}"))?;
        if ![0, geteuid().as_raw(), owner].contains(&found.uid()) {
            return Err(format!(
                "{shown} belongs to user {}, who could put another one there",
                found.uid()
            ));
        }
        let (is_others, is_sticky) = (found.mode() & 0o022 != 0, found.mode() & 0o1000 != 0);
        if is_others && !is_sticky {
            return Err(format!(
                "others than its owner may write to {shown}, and could put another one there"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
