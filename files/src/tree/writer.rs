//! Writes a tree beneath its top, and gives each file its name when it is whole.
//!
//! A file is written as `.NAME.adit-part` beside its place. Two copies never write one: whoever writes it holds a lock of it.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::fchown;

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, Stat, Timespec, Timestamps, fchmod, flock,
    fstat, futimens, mkdirat, openat, renameat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::beneath::{DIR, Follow, Spot, open_at};
use super::source::digest;
use crate::wire::{Begin, Entry, Have, Kind, NAME_MAX};

/// Ends the name of a file that is not whole.
const PART: &[u8] = b".adit-part";

#[derive(Debug)]
pub(super) enum Top {
    /// The tree has this name.
    Spot(Spot),
    /// What is in the tree goes into this directory.
    Dir(OwnedFd),
}

/// The file that comes now.
pub(super) struct Current {
    pub(super) entry: Entry,
    /// What it is written to; none: it goes into a pipe, or is whole already.
    pub(super) part: Option<Part>,
    pub(super) at: u64,
    /// What was said to be here.
    pub(super) offered: Option<Offered>,
}

/// What was said to be here of it.
pub(super) enum Offered {
    /// The file itself is whole, as it seems.
    Whole,
    /// A part of it.
    Part(Part),
}

/// A file that is not whole.
pub(super) struct Part {
    pub(super) file: File,
    pub(super) name: Vec<u8>,
}

/// A directory whose rights and time are set when all is in it.
struct Made {
    path: Vec<u8>,
    mode: u32,
    mtime: (i64, u32),
    owner: Option<(u32, u32)>,
}

pub(super) struct Tree {
    top: Top,
    /// The tree's own directory, once there is one.
    dir: Option<OwnedFd>,
    /// The directory that was used last.
    last: Option<(Vec<u8>, OwnedFd)>,
    made: Vec<Made>,
}

impl Current {
    pub(super) fn new(entry: Entry, part: Option<Part>) -> Self {
        Self {
            entry,
            part,
            at: 0,
            offered: None,
        }
    }
}

/// The name of a file that is not whole.
fn part_of(name: &[u8]) -> Vec<u8> {
    let most = name.len().min(NAME_MAX - PART.len() - 1);
    let cut = match std::str::from_utf8(name) {
        Ok(text) => text.floor_char_boundary(most),
        Err(_) => most,
    };
    [b".", &name[..cut], PART].concat()
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], path),
    }
}

fn is_below(path: &[u8], dir: &[u8]) -> bool {
    match path.strip_prefix(dir) {
        Some(rest) => dir.is_empty() && !rest.is_empty() || rest.starts_with(b"/"),
        None => false,
    }
}

fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.into(),
    };
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        last_modification: time,
    }
}

/// Gives it away, where that is possible at all.
fn give(fd: impl AsFd, owner: Option<(u32, u32)>) -> io::Result<()> {
    match owner.map(|(uid, gid)| fchown(fd, Some(uid), Some(gid))) {
        // Whoever is not root keeps what he makes.
        Some(Err(e)) if e.kind() != ErrorKind::PermissionDenied => Err(e),
        _ => Ok(()),
    }
}

fn is_own(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && stat.st_uid == rustix::process::geteuid().as_raw()
        && stat.st_nlink == 1
}

/// Opens a part that an earlier copy has left; none: there is none, or it is not ours.
fn left_over(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    // Looked at before it is opened: it may be a FIFO, or a device.
    let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if !is_own(&stat) {
        return Ok(None);
    }
    let file = match openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(_) => return Ok(None),
    };
    if !fstat(&file).is_ok_and(|now| is_own(&now) && now.st_ino == stat.st_ino) {
        return Ok(None);
    }
    // Another copy writes it now.
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(Some(file))
}

impl Tree {
    pub(super) fn new(top: Top) -> Self {
        Self {
            top,
            dir: None,
            last: None,
            made: Vec::new(),
        }
    }

    /// The directory that something is in, and its name there. Each is found beneath the tree's own one, and no link is followed.
    pub(super) fn parent(&mut self, path: &[u8]) -> io::Result<(BorrowedFd<'_>, Vec<u8>)> {
        if path.is_empty() {
            return match &self.top {
                Top::Spot(Spot { dir, name }) => Ok((dir.as_fd(), name.clone())),
                Top::Dir(_) => Err(Errno::ISDIR.into()),
            };
        }
        let (above, name) = split(path);
        let dir = self.dir.as_ref().ok_or(Errno::NOTDIR)?;
        if above.is_empty() {
            return Ok((dir.as_fd(), name.to_vec()));
        }
        if self.last.as_ref().is_none_or(|(path, _)| path != above) {
            let fd = open_at(dir.as_fd(), above, DIR, Follow::None)?;
            self.last = Some((above.to_vec(), fd));
        }
        let (_, fd) = self.last.as_ref().ok_or(Errno::NOTDIR)?;
        Ok((fd.as_fd(), name.to_vec()))
    }

    pub(super) fn make(&mut self, entry: &Entry, again: bool) -> io::Result<()> {
        let path = &entry.path;
        if let (Top::Dir(dir), true) = (&self.top, path.is_empty()) {
            // It is not the tree's: it stays as it is.
            self.dir = Some(dir.try_clone()?);
            return Ok(());
        }
        let (dir, name) = self.parent(path)?;
        let is_new = match mkdirat(dir, &name[..], Mode::from_raw_mode(0o700)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(e) => return Err(e.into()),
        };
        let made = open_at(dir, &name, DIR, Follow::None)?;
        if again && !is_new {
            let mode = Mode::from_raw_mode(entry.mode & 0o777 | 0o700);
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            if let Ok(fd) = open_at(dir, &name, flags, Follow::None) {
                // One that was made read-only by the copy before.
                let _ = fchmod(fd, mode);
            }
        }
        match path.is_empty() {
            true => self.dir = Some(made),
            false => self.last = Some((path.clone(), made)),
        }
        if is_new || again {
            self.made.push(Made {
                path: path.clone(),
                mode: entry.mode & 0o777,
                mtime: entry.mtime,
                owner: entry.owner,
            });
        }
        Ok(())
    }

    /// Sets rights and times of the directories that something is not in.
    pub(super) fn leave(&mut self, path: &[u8]) -> Vec<(Vec<u8>, io::Error)> {
        let mut failed = Vec::new();
        while let Some(made) = self.made.pop_if(|made| !is_below(path, &made.path)) {
            if let Err(e) = self.seal(&made) {
                failed.push((made.path, e));
            }
        }
        failed
    }

    pub(super) fn leave_all(&mut self) -> Vec<(Vec<u8>, io::Error)> {
        let mut failed = Vec::new();
        while let Some(made) = self.made.pop() {
            if let Err(e) = self.seal(&made) {
                failed.push((made.path, e));
            }
        }
        failed
    }

    fn seal(&mut self, made: &Made) -> io::Result<()> {
        let (dir, name) = self.parent(&made.path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let fd = open_at(dir, &name, flags, Follow::None)?;
        give(&fd, made.owner)?;
        fchmod(&fd, Mode::from_raw_mode(made.mode))?;
        Ok(futimens(&fd, &times(made.mtime))?)
    }

    pub(super) fn link(&mut self, entry: &Entry, to: &[u8], begin: &Begin) -> io::Result<()> {
        let (dir, name) = self.parent(&entry.path)?;
        let part = part_of(&name);
        let made = match symlinkat(to, dir, &name[..]) {
            Err(Errno::EXIST) => {
                let _ = unlinkat(dir, &part[..], AtFlags::empty());
                symlinkat(to, dir, &part[..])?;
                &part
            }
            done => {
                done?;
                &name
            }
        };
        let follow = AtFlags::SYMLINK_NOFOLLOW;
        // What a link is worth is where it leads.
        let _ = utimensat(dir, &made[..], &times(entry.mtime), follow);
        if let (true, Some((uid, gid))) = (begin.owners, entry.owner) {
            let (uid, gid) = (
                rustix::fs::Uid::from_raw(uid),
                rustix::fs::Gid::from_raw(gid),
            );
            let _ = rustix::fs::chownat(dir, &made[..], Some(uid), Some(gid), follow);
        }
        if made == &part
            && let Err(e) = renameat(dir, &part[..], dir, &name[..])
        {
            let _ = unlinkat(dir, &part[..], AtFlags::empty());
            return Err(e.into());
        }
        Ok(())
    }

    /// A new, empty file beside a path.
    pub(super) fn begin(&mut self, path: &[u8]) -> io::Result<Part> {
        let (dir, name) = self.parent(path)?;
        let name = part_of(&name);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let make = || openat(dir, &name[..], flags, Mode::from_raw_mode(0o600));
        let fd = match make() {
            Err(Errno::EXIST) => {
                // Held until the new one is there.
                let _before = left_over(dir, &name)?;
                unlinkat(dir, &name[..], AtFlags::empty())?;
                make()?
            }
            made => made?,
        };
        flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
        let file = fd.into();
        Ok(Part { file, name })
    }

    /// What there is of a file.
    pub(super) fn have(&mut self, entry: &Entry) -> Option<(Have, Offered)> {
        let Kind::File(len) = entry.kind else {
            return None;
        };
        let (dir, name) = self.parent(&entry.path).ok()?;
        let len = len?;
        let whole = statat(dir, &name[..], AtFlags::SYMLINK_NOFOLLOW);
        let seems_whole = |stat: &Stat| {
            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && u64::try_from(stat.st_size) == Ok(len)
                && (stat.st_mtime, stat.st_mtime_nsec) == (entry.mtime.0, entry.mtime.1.into())
        };
        if whole.is_ok_and(|stat| seems_whole(&stat)) {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = openat(dir, &name[..], flags, Mode::empty()).ok()?;
            let stat = fstat(&file).ok().filter(seems_whole)?;
            let digest = is_dense(&stat)
                .then(|| digest(&file.into(), len).ok())
                .flatten()?;
            let offset = len;
            return Some((Have { offset, digest }, Offered::Whole));
        }
        let name = part_of(&name);
        let file = left_over(dir, &name).ok().flatten()?;
        let stat = fstat(&file).ok().filter(is_dense)?;
        let offset = u64::try_from(stat.st_size).ok()?;
        if offset == 0 || offset > len {
            return None;
        }
        let digest = digest(&file, offset).ok()?;
        Some((Have { offset, digest }, Offered::Part(Part { file, name })))
    }

    /// Gives a file its length, rights, times and name. Says what of it is lost.
    pub(super) fn finish(
        &mut self,
        current: &Current,
        part: &Part,
        len: u64,
        begin: &Begin,
    ) -> io::Result<Option<String>> {
        let Current { entry, at, .. } = current;
        let file = &part.file;
        if *at != len {
            file.set_len(len)?;
        }
        let mut lost = None;
        for (name, value) in entry.xattrs.iter().filter(|_| begin.xattrs) {
            let flags = rustix::fs::XattrFlags::empty();
            if let Err(e) = rustix::fs::fsetxattr(file, &name[..], value, flags) {
                let name = super::link::shown(name);
                lost = Some(format!("its attribute {name} cannot be kept: {e}"));
            }
        }
        if begin.owners {
            give(file, entry.owner)?;
        }
        fchmod(file, Mode::from_raw_mode(entry.mode & 0o777))?;
        futimens(file, &times(entry.mtime))?;
        let (dir, name) = self.parent(&entry.path)?;
        renameat(dir, &part.name[..], dir, &name[..])?;
        Ok(lost)
    }

    pub(super) fn discard(&mut self, path: &[u8], part: &[u8]) {
        if let Ok((dir, _)) = self.parent(path) {
            let _ = unlinkat(dir, part, AtFlags::empty());
        }
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        let at = match &self.top {
            Top::Spot(spot) => &spot.dir,
            Top::Dir(dir) => dir,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::syncfs(openat(at, ".", flags, Mode::empty())?)?)
    }
}

/// Whether it has no holes: reading one costs no more than was once written.
fn is_dense(stat: &Stat) -> bool {
    u64::try_from(stat.st_blocks).is_ok_and(|blocks| {
        blocks.saturating_mul(512) >= u64::try_from(stat.st_size).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_a_name_that_fits_and_is_no_other_entrys() {
        assert_eq!(part_of(b"a"), b".a.adit-part");
        let long = part_of("ü".repeat(127).as_bytes());
        assert!(long.len() <= NAME_MAX && String::from_utf8(long).is_ok());
        assert_eq!(part_of(&[0xff; 255]).len(), NAME_MAX);
    }

    #[test]
    fn below_is_a_whole_name() {
        assert!(is_below(b"a/b", b"a") && is_below(b"a", b"") && is_below(b"a/b/c", b"a"));
        assert!(!is_below(b"ab", b"a") && !is_below(b"a", b"a") && !is_below(b"", b""));
    }
}
