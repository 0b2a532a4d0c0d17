//! What is in a directory, and removing.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat, unlinkat,
};
use rustix::io::Errno;

use super::LEVELS_MAX;
use super::beneath::Root;
use super::link::Fault;
use crate::wire::{LINK_MAX, ROWS_MAX, Refused, Row, refusal};

const LIST: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

fn row(name: &[u8], stat: &Stat, target: Vec<u8>) -> Row {
    Row {
        name: name.to_vec(),
        kind: match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => '-',
            FileType::Directory => 'd',
            FileType::Symlink => 'l',
            FileType::Fifo => 'p',
            FileType::Socket => 's',
            FileType::BlockDevice => 'b',
            FileType::CharacterDevice => 'c',
            FileType::Unknown => '?',
        },
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        mtime: (
            stat.st_mtime,
            u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        ),
        uid: stat.st_uid,
        gid: stat.st_gid,
        target,
    }
}

fn row_of(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Row> {
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let target = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => readlinkat(dir, name, Vec::new())?.into_bytes(),
        _ => Vec::new(),
    };
    let target = target[..target.len().min(LINK_MAX)].to_vec();
    Ok(row(name.to_bytes(), &stat, target))
}

/// What is known of what is at a path: of a link, of the link itself.
///
/// # Errors
/// It is not there, or may not be seen.
pub fn stat(root: &Root, path: &[u8]) -> Result<Row, Fault> {
    let failed = |e: io::Error| Fault::local("look at", path, e);
    match root.spot(path).map_err(failed)? {
        Some(spot) => {
            let name = std::ffi::CString::new(spot.name).map_err(|e| failed(e.into()))?;
            row_of(spot.dir.as_fd(), &name).map_err(failed)
        }
        None => {
            let at = root.open(path, OFlags::PATH).map_err(failed)?;
            let stat = fstat(&at).map_err(|e| failed(e.into()))?;
            Ok(row(b".", &stat, Vec::new()))
        }
    }
}

/// Gives what is in a directory, some at a time; of what is none, that itself.
///
/// # Errors
/// It is not there or may not be read, or whoever is given it wants no more.
pub fn list(
    root: &Root,
    path: &[u8],
    mut give: impl FnMut(Vec<Row>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let failed = |e: io::Error| Fault::local("list", path, e);
    let dir = match root.open(path, LIST) {
        Ok(dir) => dir,
        Err(e) if Errno::from_io_error(&e) == Some(Errno::NOTDIR) => {
            return give(vec![stat(root, path)?]);
        }
        Err(e) => return Err(failed(e)),
    };
    let mut dir = Dir::new(dir).map_err(|e| failed(e.into()))?;
    let mut rows = Vec::new();
    while let Some(next) = dir.read() {
        let next = next.map_err(|e| failed(e.into()))?;
        if matches!(next.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let fd = dir.fd().map_err(|e| failed(e.into()))?;
        // What is gone meanwhile is not there.
        if let Ok(row) = row_of(fd, next.file_name()) {
            rows.push(row);
        }
        if rows.len() == ROWS_MAX {
            give(std::mem::take(&mut rows))?;
        }
    }
    match rows.is_empty() {
        true => Ok(()),
        false => give(rows),
    }
}

/// Removes what is at a path: of a link, the link; of a directory only with `all`, and then all that is below.
///
/// # Errors
/// It is not there or cannot be removed. What was removed before stays removed.
pub fn remove(root: &Root, path: &[u8], all: bool) -> Result<(), Fault> {
    let failed = |e: io::Error| Fault::local("remove", path, e);
    let refused = |text: String| Fault::Local(Refused::new(refusal::KIND, text));
    let Some(spot) = root.spot(path).map_err(failed)? else {
        return Err(refused("it has no name of its own".into()));
    };
    let dir = spot.dir.as_fd();
    let kind = statat(dir, &spot.name[..], AtFlags::SYMLINK_NOFOLLOW);
    let kind = FileType::from_raw_mode(kind.map_err(|e| failed(e.into()))?.st_mode);
    if kind != FileType::Directory {
        let done = unlinkat(dir, &spot.name[..], AtFlags::empty());
        return done.map_err(|e| failed(e.into()));
    }
    if !all {
        let shown = super::link::shown(path);
        return Err(refused(format!("{shown} is a directory")));
    }
    empty(dir, &spot.name).map_err(failed)?;
    unlinkat(dir, &spot.name[..], AtFlags::REMOVEDIR).map_err(|e| failed(e.into()))
}

/// Removes what is in a directory. Each is opened in the one above it, and no link is followed.
fn empty(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let open = |dir: BorrowedFd<'_>, name: &[u8]| -> io::Result<Dir> {
        let fd: OwnedFd = openat(dir, name, LIST | OFlags::NOFOLLOW, Mode::empty())?;
        Ok(Dir::new(fd)?)
    };
    let mut levels = vec![(name.to_vec(), open(dir, name)?)];
    loop {
        let depth = levels.len();
        let Some((name, level)) = levels.last_mut() else {
            return Ok(());
        };
        let Some(next) = level.read() else {
            let name = std::mem::take(name);
            levels.pop();
            if let Some((_, above)) = levels.last() {
                unlinkat(above.fd()?, &name[..], AtFlags::REMOVEDIR)?;
            }
            continue;
        };
        let next = next?;
        let name = next.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let at = level.fd()?;
        match unlinkat(at, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) if depth < LEVELS_MAX => {
                let below = open(at, name.to_bytes())?;
                levels.push((name.to_bytes().to_vec(), below));
            }
            Err(e) => return Err(e.into()),
        }
    }
}
