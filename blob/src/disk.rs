//! Changes on disk that survive a cut: a file is written beside its place, brought to the disk, and put there at once.
//!
//! With the feature `test-util`, each change is a *step*, counted before and after it, and `ADIT_TEST_KILL_AT_STEP=N` makes
//! the process send itself SIGKILL at the Nth; `ADIT_TEST_STEPS_FILE` has their number. Without the feature, which no image has, a step is nothing.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Bytes that are written at a time.
const CHUNK: usize = 256 << 10;

/// Does one change, with a step before and one after it.
fn change<T>(what: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    step();
    let done = what();
    step();
    done
}

/// Makes a directory with mode 0700, on disk when this returns, or finds it: then it must be one, and nobody's but this process's user's.
///
/// # Errors
/// It cannot be made, or others could change what is in it (R99).
pub fn own_dir(dir: &Path) -> io::Result<()> {
    match fs::symlink_metadata(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => make_dir(dir)?,
        found => {
            found?;
        }
    }
    let meta = fs::symlink_metadata(dir)?;
    let is_ours = meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw();
    if !is_ours || meta.mode() & 0o022 != 0 {
        let why = format!("{} is not a directory of our own", dir.display());
        return Err(io::Error::new(ErrorKind::PermissionDenied, why));
    }
    Ok(())
}

fn make_dir(dir: &Path) -> io::Result<()> {
    let parent = match dir.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Ok(()),
    };
    if !parent.exists() {
        make_dir(parent)?;
    }
    match change(|| DirBuilder::new().mode(0o700).create(dir)) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    sync_dir(parent)
}

/// Makes a file that must not be there yet. A link in its place is not followed.
///
/// # Errors
/// There is something, or it cannot be made.
pub fn create(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(mode);
    change(|| options.open(path))
}

/// Writes all of it at the file's position.
///
/// # Errors
/// There is no room, or the disk fails.
pub fn write(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    bytes
        .chunks(CHUNK)
        .try_for_each(|chunk| change(|| file.write_all(chunk)))
}

/// Brings a file to the disk.
///
/// # Errors
/// The disk fails.
pub fn sync(file: &File) -> io::Result<()> {
    change(|| file.sync_all())
}

/// Brings a directory's names to the disk.
///
/// # Errors
/// The disk fails.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    change(|| File::open(dir)?.sync_all())
}

/// Gives something its final name, on disk when this returns. Both names are in one directory.
///
/// # Errors
/// The file system refuses.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    change(|| fs::rename(from, to))?;
    sync_dir(to.parent().unwrap_or(Path::new("/")))
}

/// Removes a file or a whole directory. That there is none is no error, and a link is not followed.
///
/// # Errors
/// It stays.
pub fn remove(path: &Path) -> io::Result<()> {
    let gone = |done: io::Result<()>| match done {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => gone(change(|| fs::remove_dir_all(path))),
        Ok(_) => gone(change(|| fs::remove_file(path))),
        Err(e) => gone(Err(e)),
    }
}

/// Puts this content into a file of mode 0600: all of it or, where this fails or is cut off, what was there before.
///
/// # Errors
/// It cannot be written.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temp = path.with_extension("new");
    // It is there if the power was cut before.
    remove(&temp)?;
    let file = create(&temp, 0o600)?;
    write(&file, content)?;
    sync(&file)?;
    rename(&temp, path)
}

/// Bytes that are free for this process's user on the file system of a directory.
///
/// # Errors
/// It cannot be asked.
pub fn free(dir: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(dir)?;
    Ok(match disk.f_blocks {
        // One that does not count, as ramfs.
        0 => u64::MAX,
        _ => disk.f_bavail.saturating_mul(disk.f_frsize),
    })
}

/// Whether an error says that there is no room.
pub fn is_full(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
    )
}

/// Counts by this variable instead: a process that becomes another one counts each by its own.
#[cfg(feature = "test-util")]
pub fn steps_by(variable: &'static str) {
    let _ = VARIABLE.set(variable);
}

#[cfg(feature = "test-util")]
const KILL_AT: &str = "ADIT_TEST_KILL_AT_STEP";
#[cfg(feature = "test-util")]
static VARIABLE: std::sync::OnceLock<&str> = std::sync::OnceLock::new();

/// Ends this process here if a test asked for it.
#[cfg(feature = "test-util")]
fn step() {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static AT: LazyLock<Option<u64>> = LazyLock::new(|| {
        let variable = VARIABLE.get().unwrap_or(&KILL_AT);
        std::env::var(variable).ok()?.parse().ok()
    });
    static COUNTED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let file = std::env::var("ADIT_TEST_STEPS_FILE").ok()?;
        let file = format!("{file}.{}", VARIABLE.get().unwrap_or(&KILL_AT));
        // Another process counts by the same variable, and had more.
        let counted = fs::read_to_string(&file).ok();
        Some((file, counted.and_then(|n| n.parse().ok()).unwrap_or(0)))
    });
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let now = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
    if let Some((file, counted)) = &*COUNTED
        && now > *counted
    {
        let _ = fs::write(file, now.to_string());
    }
    if *AT == Some(now) {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

#[cfg(not(feature = "test-util"))]
#[inline(always)]
fn step() {}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn r99_a_planted_link_or_a_directory_of_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("victim"), "whole").unwrap();
        symlink(at("victim"), at("planted")).unwrap();
        assert!(create(&at("planted"), 0o600).is_err());
        // A leftover in the place of the temporary name is taken away, and not written through.
        symlink(at("victim"), at("state.new")).unwrap();
        replace(&at("state.json"), b"new").unwrap();
        assert_eq!(fs::read(at("victim")).unwrap(), b"whole");
        assert_eq!(fs::read(at("state.json")).unwrap(), b"new");
        let mode = fs::metadata(at("state.json")).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o600);

        own_dir(&at("own/deep")).unwrap();
        assert_eq!(fs::metadata(at("own/deep")).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(at("own"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(own_dir(&at("own")).is_err());
        symlink(at("own/deep"), at("link")).unwrap();
        assert!(own_dir(&at("link")).is_err());
        assert!(own_dir(&at("victim")).is_err());
    }

    #[test]
    fn what_is_not_there_is_removed_already() {
        let dir = tempfile::tempdir().unwrap();
        remove(&dir.path().join("nothing")).unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        remove(&dir.path().join("a")).unwrap();
        assert!(!dir.path().join("a").exists());
    }
}
