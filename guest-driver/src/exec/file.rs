//! The file executor: one file replaced atomically, under an allowed root, following no symbolic link.
//!
//! The directory is opened once, beneath its root, with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`; everything
//! after that names single path components relative to that descriptor, so that nobody who swaps directories for links
//! meanwhile can lead the write elsewhere (R89, R90). Where the guest has a policy, the root is the shallower of the
//! configuration's and the policy's: then no link leads out of the deeper one either. Order: temporary file (`O_EXCL`), content, owner, extended attributes,
//! mode, fsync, rename, fsync of the directory: a crash leaves the old file or the new one.
//!
//! The new file has the old one's extended attributes: security labels, access lists, those of users. Attributes that describe
//! the content are left out, as any write drops them. Other names of the old file (hard links) keep the old content, and the
//! output says so.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat};
use nix::unistd::{Gid, Group, Uid, UnlinkatFlags, User, fchown, fsync, unlinkat};
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fsetxattr};
use sha2::{Digest, Sha256};

use adit_tasks::Principal;
use adit_tasks::action::FileStep;

use super::{Executed, Executor, Job};
use crate::config::Config;
use crate::policy::{self, Touches};

/// Attributes that hold for the old content only: capabilities of a program, measurements of it. A write drops the first, and
/// the kernel makes the others again.
const OF_CONTENT: [&[u8]; 3] = [b"security.capability", b"security.ima", b"security.evm"];

/// Where this guest lets files be written.
#[derive(Clone, Debug, Default)]
pub struct FilePolicy {
    /// Directories under which files may be written.
    pub roots: Vec<PathBuf>,
    /// Directories and files that may not be written, whatever the roots: the agent's own.
    pub protected: Vec<PathBuf>,
    /// The root that the guest's policy names for this file. The policy has decided that the path is below it.
    pub of_policy: Option<PathBuf>,
}

impl FilePolicy {
    /// What the configuration says; never what it names as the agent's own.
    fn of(config: &Config, of_policy: Option<&str>) -> Self {
        let own: [&Path; 5] = [
            &config.path,
            policy::file_of(config).0,
            &config.trust_dir,
            &config.state_dir,
            &config.run_dir,
        ];
        Self {
            roots: config.file.roots.clone(),
            protected: own.map(PathBuf::from).into(),
            // Nothing is outside of `/`.
            of_policy: of_policy.filter(|root| *root != "/").map(PathBuf::from),
        }
    }
}

/// Why a file was not written.
#[derive(Debug, PartialEq, Eq)]
enum FileError {
    /// Policy.
    Denied(String),
    /// The attempt failed.
    Failed(String),
}

fn failed(what: &str, path: &Path, e: impl Into<io::Error>) -> FileError {
    let e = e.into();
    match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => FileError::Failed(format!(
            "no-space: guest disk full: {what} {}: {e}",
            path.display()
        )),
        _ => FileError::Failed(format!("{what} {}: {e}", path.display())),
    }
}

/// What became of the file.
enum Placed {
    Unchanged,
    /// Written.
    Written {
        /// Other names (hard links) of the old file, which keep its content.
        others: u64,
    },
}

impl Executor for FileStep {
    fn touches(&self) -> Touches<'_> {
        Touches::file(&self.owner, &self.group, &self.path)
    }

    fn execute(&self, job: &Job<'_>) -> Executed {
        write(
            self,
            &FilePolicy::of(job.config, job.permit.root.as_deref()),
        )
    }
}

/// Why the configuration alone forbids a path, if it does.
pub fn forbidden(path: &str, config: &Config) -> Option<String> {
    match resolve(Path::new(path), &FilePolicy::of(config, None)) {
        Err(FileError::Denied(why) | FileError::Failed(why)) => Some(why),
        Ok(_) => None,
    }
}

/// Writes it, or says why not; an unchanged file is not written again.
fn write(step: &FileStep, policy: &FilePolicy) -> Executed {
    match place(step, policy) {
        Ok(Placed::Unchanged) => Executed::done(format!("{}: unchanged\n", step.path)),
        Ok(Placed::Written { others: 0 }) => Executed::done(format!("{}: written\n", step.path)),
        Ok(Placed::Written { others }) => Executed::done(format!(
            "{}: written\n{}: the old file had {others} other names (hard links), which still have its old content\n",
            step.path, step.path
        )),
        Err(FileError::Denied(why)) => Executed::refused(format!("path-denied: {why}")),
        Err(FileError::Failed(why)) => Executed::failed(why),
    }
}

fn place(step: &FileStep, policy: &FilePolicy) -> Result<Placed, FileError> {
    let path = Path::new(&step.path);
    let unusable = |what| FileError::Failed(format!("{what} of {} cannot be used", step.path));
    let content = step.bytes().ok_or_else(|| unusable("content"))?;
    let mode = Mode::from_bits_truncate(step.mode_bits().ok_or_else(|| unusable("mode"))?);
    let target = resolve(path, policy)?;
    let dir = open_dir(&target)?;
    let (uid, gid) = owner(step)?;
    let mut old = None;
    match fstatat(&dir, target.name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => {}
        Err(e) => return Err(failed("cannot stat", path, e)),
        Ok(stat) if kind(&stat) == SFlag::S_IFREG => {
            if same(&dir, target.name, &stat, &content, (uid, gid, mode)) {
                return Ok(Placed::Unchanged);
            }
            old = Some(open_old(&dir, target.name).map_err(|e| failed("cannot open", path, e))?);
        }
        Ok(_) => {
            return Err(FileError::Denied(format!(
                "{} is not a regular file",
                step.path
            )));
        }
    }
    let temp = format!(".adit-{:x}.tmp", u64::from_be_bytes(digest8(target.name)));
    let others = match &old {
        Some(old) => {
            fstat(old)
                .map_err(|e| failed("cannot stat", path, e))?
                .st_nlink
        }
        None => 1,
    };
    let written = replace(
        &dir,
        &temp,
        target.name,
        &content,
        (uid, gid, mode),
        old.as_ref(),
    );
    if written.is_err() {
        let _ = unlinkat(&dir, temp.as_str(), UnlinkatFlags::NoRemoveDir);
    }
    written
        .map(|()| Placed::Written {
            others: others.saturating_sub(1),
        })
        .map_err(|e| failed("cannot write", path, e))
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn digest8(name: &str) -> [u8; 8] {
    let digest = Sha256::digest(name);
    std::array::from_fn(|i| digest[i])
}

/// A path cut at its root.
#[derive(Debug, PartialEq, Eq)]
struct Target<'p> {
    root: &'p Path,
    /// Below the root, to the directory; may be empty.
    parent: PathBuf,
    name: &'p str,
}

/// Checks a path as text: absolute, one spelling, under a root, not the agent's own.
fn resolve<'p>(path: &'p Path, allowed: &'p FilePolicy) -> Result<Target<'p>, FileError> {
    let denied = |why: &str| FileError::Denied(format!("{:?} {why}", path.as_os_str()));
    let text = path.to_str().ok_or_else(|| denied("is not UTF-8"))?;
    // `components` hides `//`, `/./` and a trailing slash; a path with another spelling is refused instead.
    if !policy::is_plain(text) {
        return Err(denied("is not a plain absolute path"));
    }
    let root = allowed
        .roots
        .iter()
        .filter(|r| path.starts_with(r) && path != r.as_path())
        .max_by_key(|r| r.components().count());
    let root = root.ok_or_else(|| denied("is under none of this guest's file.roots"))?;
    let root = match &allowed.of_policy {
        Some(other) if root.starts_with(other) => other,
        _ => root,
    };
    if allowed.protected.iter().any(|p| path.starts_with(p)) {
        return Err(denied("belongs to the agent"));
    }
    let below = path
        .strip_prefix(root)
        .map_err(|_| denied("is not under its root"))?;
    let Some(Component::Normal(name)) = below.components().next_back() else {
        return Err(denied("names no file"));
    };
    let name = name.to_str().ok_or_else(|| denied("is not UTF-8"))?;
    Ok(Target {
        root,
        parent: below.parent().unwrap_or(Path::new("")).into(),
        name,
    })
}

fn open_dir(target: &Target<'_>) -> Result<OwnedFd, FileError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let root = open(target.root, flags, Mode::empty())
        .map_err(|e| failed("cannot open root", target.root, e))?;
    let below = if target.parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        &target.parent
    };
    let how = OpenHow::new().flags(flags).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    );
    let full = target.root.join(&target.parent);
    openat2(&root, below, how).map_err(|e| match e {
        Errno::ELOOP | Errno::EXDEV => {
            FileError::Denied(format!("{} leads through a symbolic link", full.display()))
        }
        // A link in place of the last directory is ENOTDIR or ELOOP, depending on the kernel's order of checks.
        Errno::ENOTDIR => FileError::Denied(format!("{} is not a directory", full.display())),
        e => failed("cannot open directory", &full, e),
    })
}

/// Owner and group, each a name or a number.
fn owner(step: &FileStep) -> Result<(Uid, Gid), FileError> {
    let unknown = |what: &str, name: &str| {
        FileError::Failed(format!("{what} {name:?} is not known in this guest"))
    };
    let uid = match Principal::parse(&step.owner) {
        Some(Principal::Number(number)) => Some(Uid::from_raw(number)),
        Some(Principal::Name(name)) => User::from_name(name).ok().flatten().map(|u| u.uid),
        None => None,
    };
    let gid = match Principal::parse(&step.group) {
        Some(Principal::Number(number)) => Some(Gid::from_raw(number)),
        Some(Principal::Name(name)) => Group::from_name(name).ok().flatten().map(|g| g.gid),
        None => None,
    };
    let uid = uid.ok_or_else(|| unknown("owner", &step.owner))?;
    let gid = gid.ok_or_else(|| unknown("group", &step.group))?;
    Ok((uid, gid))
}

fn same(
    dir: &OwnedFd,
    name: &str,
    stat: &FileStat,
    content: &[u8],
    want: (Uid, Gid, Mode),
) -> bool {
    let (uid, gid, mode) = want;
    if (stat.st_uid, stat.st_gid) != (uid.as_raw(), gid.as_raw())
        || stat.st_mode & 0o7777 != mode.bits()
        || u64::try_from(stat.st_size) != Ok(content.len() as u64)
    {
        return false;
    }
    let Ok(fd) = open_old(dir, name) else {
        return false;
    };
    let mut found = Vec::new();
    let limit = content.len() as u64 + 1;
    File::from(fd).take(limit).read_to_end(&mut found).is_ok() && found == content
}

fn open_old(dir: &OwnedFd, name: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

/// The attribute that holds a file's access list.
const ACCESS_LIST: &[u8] = b"system.posix_acl_access";

/// Removes from an access list the rights that a mode does not give (`posix_acl_xattr.h`: a version, then entries of tag,
/// rights and id). Unchanged, it would let the old file's readers read the new content until the mode is set.
fn limit_access(list: &mut [u8], mode: Mode) {
    const HEADER: usize = 4;
    const ENTRY: usize = 8;
    let rights = |shift: u32| ((mode.bits() >> shift) & 7) as u16;
    let tag = |entry: &[u8]| u16::from_le_bytes([entry[0], entry[1]]);
    let entries = list.get_mut(HEADER..).unwrap_or_default();
    let (owner, group, mask, others) = (1, 4, 0x10, 0x20);
    let masked = entries.chunks_exact(ENTRY).any(|e| tag(e) == mask);
    for entry in entries.chunks_exact_mut(ENTRY) {
        let now = match tag(entry) {
            t if t == owner => rights(6),
            t if t == mask || t == group && !masked => rights(3),
            t if t == others => rights(0),
            _ => continue,
        };
        entry[2..4].copy_from_slice(&now.to_le_bytes());
    }
}

/// Gives a new file the extended attributes of the old one.
fn keep_attributes(old: &OwnedFd, new: &File, mode: Mode) -> io::Result<()> {
    // The most that a list and a value may have: XATTR_LIST_MAX, XATTR_SIZE_MAX.
    let mut names = vec![0; 64 << 10];
    let mut value = vec![0; 64 << 10];
    let listed = match flistxattr(old, &mut names[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        listed => listed?,
    };
    for name in names[..listed].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        if OF_CONTENT.contains(&name) {
            continue;
        }
        let kept = fgetxattr(old, name, &mut value[..]).and_then(|n| {
            if name == ACCESS_LIST {
                limit_access(&mut value[..n], mode);
            }
            fsetxattr(new, name, &value[..n], XattrFlags::empty())
        });
        match kept {
            // Removed meanwhile.
            Ok(()) | Err(rustix::io::Errno::NODATA) => {}
            Err(e) => {
                let name = String::from_utf8_lossy(name);
                let e = io::Error::from(e);
                let text = format!("the old file's attribute {name} cannot be kept: {e}");
                return Err(io::Error::new(e.kind(), text));
            }
        }
    }
    Ok(())
}

fn replace(
    dir: &OwnedFd,
    temp: &str,
    name: &str,
    content: &[u8],
    want: (Uid, Gid, Mode),
    old: Option<&OwnedFd>,
) -> io::Result<()> {
    let (uid, gid, mode) = want;
    let flags =
        OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let create = || openat(dir, temp, flags, Mode::S_IRUSR | Mode::S_IWUSR);
    let fd = create().or_else(|e| match e {
        // Left by a write that was cut short. If somebody else put it there, it does no harm: it is removed, not opened.
        Errno::EEXIST => unlinkat(dir, temp, UnlinkatFlags::NoRemoveDir).and_then(|()| create()),
        e => Err(e),
    })?;
    let mut file = File::from(fd);
    file.write_all(content)?;
    // Owner before mode: changing the owner clears set-id bits. Access lists before mode: the mode is what was declared.
    fchown(&file, Some(uid), Some(gid))?;
    old.map_or(Ok(()), |old| keep_attributes(old, &file, mode))?;
    fchmod(&file, mode)?;
    file.sync_all()?;
    renameat(dir, temp, dir, name)?;
    Ok(fsync(dir)?)
}

#[cfg(test)]
mod tests;
