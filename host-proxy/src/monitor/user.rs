//! Who the worker becomes, and what is handed over to it: the directory of the database.
//!
//! | there is | it is |
//! |---|---|
//! | `user` of `[worker]` | that user |
//! | a user `adit` on the host | that one |
//! | neither | the last user of `ports.uids` that no VM and no process has; the one that the directory belongs to already, or that a worker runs as, if it can be |

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, bail};
use nix::unistd::User;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Uid, chownat, fchown, openat, statat,
};
use rustix::thread::{CapabilitySet, capabilities};

use crate::config::Config;
use crate::{arguments, uids};

/// The user that packages make.
const NAME: &str = "adit";
/// What the directory of the database may have, so that it is aditd's own and can be handed over.
const OWN: [&str; 2] = ["aditd.", "lost+found"];
/// The database, what SQLite puts beside it, the host's own id and key, and the audit and the access log that are written: older
/// ones are only removed.
const FILES: [&str; 8] = [
    "aditd.access",
    "aditd.audit",
    "aditd.db",
    "aditd.db-wal",
    "aditd.db-shm",
    "aditd.db-journal",
    "aditd.id",
    "aditd.key",
];

/// A user and its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Returns who the worker becomes, or why aditd is one process.
///
/// # Errors
/// The configuration names a user, and aditd cannot use it.
pub fn of_worker(config: &Config) -> anyhow::Result<Result<Account, String>> {
    let wanted = config.worker.user.as_deref();
    let why = match cannot(config) {
        Some(why) => why,
        None => match account(config, wanted)? {
            Some(account) => match cannot_hand_over(config, account)? {
                None => return Ok(Ok(account)),
                Some(why) => why,
            },
            None => "all users of `ports.uids` are taken: set more of them".into(),
        },
    };
    match wanted {
        Some(_) => bail!("cannot use the `user` of [worker]: {why}; or remove the key"),
        None => Ok(Err(why)),
    }
}

/// Why there cannot be two processes; none: there can.
fn cannot(config: &Config) -> Option<String> {
    let range = config.ports.uids.unwrap_or_default();
    let wanted = CapabilitySet::SYS_CHROOT | CapabilitySet::KILL | CapabilitySet::DAC_OVERRIDE;
    uids::cannot(range).or_else(|| {
        let has = capabilities(None).map(|c| c.effective);
        let can = has.is_ok_and(|has| has.contains(wanted));
        (!can).then(|| "aditd lacks CAP_SYS_CHROOT, CAP_KILL or CAP_DAC_OVERRIDE".into())
    })
}

fn account(config: &Config, wanted: Option<&str>) -> anyhow::Result<Option<Account>> {
    let named = User::from_name(wanted.unwrap_or(NAME)).ok().flatten();
    match (named, wanted) {
        (Some(user), _) if !user.uid.is_root() && user.gid.as_raw() != 0 => Ok(Some(Account {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        })),
        (Some(_), Some(name)) => bail!("the `user` of [worker], `{name}`, is root"),
        (None, Some(name)) => bail!("the host has no user `{name}`, which [worker] names"),
        (_, None) => {
            let range = config.ports.uids.unwrap_or_default();
            let owner = std::fs::metadata(&config.state_dir)
                .ok()
                .map(|dir| dir.uid());
            // A `StateDirectory=` is root's again whenever systemd starts a monitor, and the worker may have gone on.
            let known = owner
                .filter(|uid| range.contains(*uid))
                .or_else(|| of_running_worker(&config.run_dir));
            let free = uids::highest_free(range, &config.run_dir, known)?;
            Ok(free.map(|uid| Account { uid, gid: uid }))
        }
    }
}

/// The user of the worker that another monitor has left.
fn of_running_worker(run_dir: &Path) -> Option<u32> {
    let pid: u32 = std::fs::read_to_string(run_dir.join(super::run::PID_FILE))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    // Another process may have its number by now.
    let line = arguments::line_of(pid);
    let is_worker = line.split(|byte| *byte == 0).nth(1) == Some(b"worker");
    let process = Path::new("/proc").join(pid.to_string());
    uids::of_process(&process)
        .first()
        .copied()
        .filter(|_| is_worker)
}

/// Why the directory of the database cannot become the worker's root directory; none: it can.
fn cannot_hand_over(config: &Config, account: Account) -> io::Result<Option<String>> {
    let (dir, shown) = (&config.state_dir, config.state_dir.display());
    // The worker would have the lock, and the sockets to it.
    let whole = |dir: &Path| dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    if whole(&config.run_dir).starts_with(whole(dir)) {
        return Ok(Some(format!(
            "run_dir is in {shown}, the worker's directory: set a state_dir of aditd's own"
        )));
    }
    for name in FILES {
        let path = dir.join(name);
        let Ok(stat) = statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || stat.st_nlink != 1 && stat.st_uid != account.uid {
            let path = path.display();
            return Ok(Some(format!(
                "{path} is a link, or has other names, and cannot be the worker's: put the file itself there, or set a state_dir"
            )));
        }
    }
    let others = || {
        format!(
            "{shown} has files of others, and cannot be the worker's: set a state_dir of aditd's own"
        )
    };
    Ok((!is_own(dir, account)?).then(others))
}

/// Whether the directory is the worker's already, or has nothing but what is aditd's.
fn is_own(state_dir: &Path, account: Account) -> io::Result<bool> {
    let dir = match openat(
        CWD,
        state_dir,
        OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Ok(dir) => dir,
        Err(rustix::io::Errno::NOENT) => return Ok(true),
        Err(e) => return Err(e.into()),
    };
    if rustix::fs::fstat(&dir)?.st_uid == account.uid {
        return Ok(true);
    }
    for entry in Dir::read_from(&dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let is_known = OWN.iter().any(|own| name.starts_with(own));
        if name != "." && name != ".." && !is_known {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Hands the directory of the database over to the worker. Returns it.
///
/// # Errors
/// The file system refuses.
pub fn hand_over(state_dir: &Path, account: Account) -> anyhow::Result<OwnedFd> {
    let done = || -> io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = openat(CWD, state_dir, flags, Mode::empty())?;
        let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
        for name in FILES {
            let Ok(stat) = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            let is_its = (stat.st_uid, stat.st_gid) == (account.uid, account.gid);
            // A file with another name may be anybody's.
            if is_file && stat.st_nlink == 1 && !is_its {
                chownat(&dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
        }
        // Last: whoever finds it done finds all of it done.
        fchown(&dir, Some(uid), Some(gid))?;
        Ok(dir)
    };
    done().with_context(|| {
        let (dir, uid) = (state_dir.display(), account.uid);
        format!("cannot hand {dir} over to user {uid}, the worker's")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_directory_is_handed_over_that_has_the_database_itself_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (run, state) = (dir.path().join("run"), dir.path().join("state"));
        let config = |run: &Path, state: &Path| {
            std::fs::create_dir_all(run).unwrap();
            std::fs::create_dir_all(state).unwrap();
            let (run, state) = (run.display(), state.display());
            let text = format!("run_dir = \"{run}\"\nstate_dir = \"{state}\"\n");
            Config::parse(Path::new("a.toml"), &text).unwrap()
        };
        // Nobody's: as at the first start with two processes.
        let (uid, gid) = (70_001, 70_001);
        let why = |config: &Config| cannot_hand_over(config, Account { uid, gid }).unwrap();
        let usual = config(&run, &state);
        assert_eq!(why(&usual), None);
        // The database is elsewhere, or has a second name.
        let (database, elsewhere) = (state.join("aditd.db"), dir.path().join("elsewhere"));
        std::fs::write(&elsewhere, "whole").unwrap();
        symlink(&elsewhere, &database).unwrap();
        assert!(why(&usual).unwrap().contains("is a link"));
        std::fs::remove_file(&database).unwrap();
        std::fs::hard_link(&elsewhere, &database).unwrap();
        assert!(why(&usual).unwrap().contains("other names"));
        std::fs::remove_file(&elsewhere).unwrap();
        assert_eq!(why(&usual), None);
        std::fs::write(state.join("backup"), "").unwrap();
        assert!(why(&usual).unwrap().contains("files of others"));
        // The lock and the sockets would be the worker's.
        let both = dir.path().join("both");
        assert!(why(&config(&both, &both)).unwrap().contains("run_dir"));
        let link = dir.path().join("link");
        symlink(&both, &link).unwrap();
        assert!(why(&config(&both, &link)).unwrap().contains("run_dir"));
        let inner = both.join("run");
        assert!(why(&config(&inner, &both)).unwrap().contains("run_dir"));
        // The other way round nothing of the run directory is in it.
        assert_eq!(why(&config(&both, &both.join("state"))), None);
    }
}
