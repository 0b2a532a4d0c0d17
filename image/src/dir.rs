//! A root directory, out of which no link leads.
//!
//! The kernel looks every path up as if the root were `/` (`openat2` with `RESOLVE_IN_ROOT`): a link in the image, absolute
//! or with `..` in it, leads to where it will lead once the image runs, and never to a file of whoever installs. After that
//! only single names relative to an open directory are used. Modes are set explicitly, because whoever installs may have any
//! umask.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, fsync, symlinkat, unlinkat};

use crate::{Root, dir_mode};

/// An open root directory.
#[derive(Debug)]
pub struct Dir(OwnedFd);

impl Root for Dir {
    fn has(&self, path: &str) -> bool {
        self.at(path).is_ok()
    }

    fn is_same(&self, one: &str, other: &str) -> bool {
        let file = |path| self.at(path).and_then(fstat).map(|s| (s.st_dev, s.st_ino));
        file(one).is_ok_and(|one| file(other) == Ok(one))
    }

    fn place(&mut self, path: &str, content: &[u8], mode: u32) -> io::Result<bool> {
        let (dir, name) = self.dir_of(path)?;
        let mode = Mode::from_bits_truncate(mode);
        if same(&dir, name, content, mode) {
            return Ok(false);
        }
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        self.replace(&dir, name, |temp| {
            let mut file = File::from(openat(&dir, temp, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
            file.write_all(content)?;
            fchmod(&file, mode)?;
            file.sync_all()
        })?;
        Ok(true)
    }

    fn place_link(&mut self, path: &str, target: &str) -> io::Result<bool> {
        let (dir, name) = self.dir_of(path)?;
        if readlinkat(&dir, name).is_ok_and(|t| t == target) {
            return Ok(false);
        }
        self.replace(&dir, name, |temp| Ok(symlinkat(target, &dir, temp)?))?;
        Ok(true)
    }
}

impl Dir {
    /// Opens a root directory; a link in its own path is followed.
    ///
    /// # Errors
    /// It is no directory that can be opened.
    pub fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(Self(open(root, flags, Mode::empty())?))
    }

    /// Makes something under a name of its own, then puts it in its place at once.
    fn replace(
        &self,
        dir: &OwnedFd,
        name: &str,
        make: impl FnOnce(&str) -> io::Result<()>,
    ) -> io::Result<()> {
        let temp = format!(".adit-install-{}.tmp", std::process::id());
        let made = make(&temp).and_then(|()| {
            renameat(dir, temp.as_str(), dir, name)?;
            Ok(fsync(dir)?)
        });
        if made.is_err() {
            let _ = unlinkat(dir, temp.as_str(), UnlinkatFlags::NoRemoveDir);
        }
        made
    }

    /// Opens the directory of a path, and makes what is missing of it.
    fn dir_of<'p>(&self, path: &'p str) -> io::Result<(OwnedFd, &'p str)> {
        let (dir, name) = path.rsplit_once('/').unwrap_or((".", path));
        let (mut at, mut so_far) = (self.lookup(Path::new("."))?, PathBuf::new());
        for part in dir.split('/') {
            so_far.push(part);
            at = match self.lookup(&so_far) {
                Err(Errno::ENOENT) => make_dir(&at, part, &so_far)?,
                found => found?,
            };
        }
        Ok((at, name))
    }

    fn at(&self, path: &str) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.0, path, how)
    }

    fn lookup(&self, path: &Path) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.0, path, how)
    }
}

fn make_dir(parent: &OwnedFd, name: &str, so_far: &Path) -> io::Result<OwnedFd> {
    mkdirat(parent, name, Mode::S_IRWXU).map_err(|e| match e {
        Errno::EEXIST => io::Error::other(format!(
            "/{} is a link to a directory that the image does not have",
            so_far.display()
        )),
        e => e.into(),
    })?;
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let made = openat(parent, name, flags, Mode::empty())?;
    let mode = dir_mode(&so_far.to_string_lossy());
    fchmod(&made, Mode::from_bits_truncate(mode))?;
    Ok(made)
}

fn same(dir: &OwnedFd, name: &str, content: &[u8], mode: Mode) -> bool {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let Ok(file) = openat(dir, name, flags, Mode::empty()) else {
        return false;
    };
    let regular = fstat(&file).is_ok_and(|s| {
        SFlag::from_bits_truncate(s.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFREG
            && s.st_mode & 0o7777 == mode.bits()
    });
    let (mut found, limit) = (Vec::new(), content.len() as u64 + 1);
    regular && File::from(file).take(limit).read_to_end(&mut found).is_ok() && found == content
}
