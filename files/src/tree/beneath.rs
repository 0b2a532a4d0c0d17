//! A directory that no path leads out of.
//!
//! | follow | links in a path |
//! |---|---|
//! | `Any` | are followed as everywhere: the path is the user's own, and the kernel says what they may |
//! | `Inside` | are followed as long as they stay beneath the directory |
//! | `None` | are an error |
//!
//! The kernel resolves a path in one call (`openat2`), so nobody can swap a directory for a link between two steps. Where it has none
//! (before Linux 5.6, or a filter forbids it), each step is opened by itself and no link is followed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2, statat};
use rustix::io::Errno;

/// Which links in a path are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// All.
    Any,
    /// Those that stay beneath the directory.
    Inside,
    /// None.
    None,
}

/// Opens a directory for what is done beneath it.
pub(super) const DIR: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A directory, and how paths lead from it.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
    follow: Follow,
}

/// A name in a directory. Whoever uses it says that no link is followed.
#[derive(Debug)]
pub(super) struct Spot {
    pub(super) dir: OwnedFd,
    pub(super) name: Vec<u8>,
}

/// Opens a path beneath a directory.
pub(super) fn open_at(
    dir: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
    follow: Follow,
) -> io::Result<OwnedFd> {
    let path = match path {
        [] => b".",
        path => path,
    };
    let flags = flags | OFlags::CLOEXEC;
    let resolve = match follow {
        Follow::Any => return Ok(openat(dir, path, flags, Mode::empty())?),
        Follow::Inside => ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        Follow::None => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    };
    let mut tries = 0;
    loop {
        match openat2(dir, path, flags, Mode::empty(), resolve) {
            // Something was renamed meanwhile, and the kernel cannot tell whether that led out.
            Err(Errno::AGAIN) if tries < 64 => tries += 1,
            Err(Errno::NOSYS | Errno::PERM) => return step_by_step(dir, path, flags),
            opened => return Ok(opened?),
        }
    }
}

fn step_by_step(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    if path.starts_with(b"/") {
        return Err(Errno::XDEV.into());
    }
    let mut at: Option<OwnedFd> = None;
    let mut names = path
        .split(|b| *b == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
        .peekable();
    while let Some(name) = names.next() {
        if name == b".." {
            return Err(Errno::XDEV.into());
        }
        let from = at.as_ref().map_or(dir, |fd| fd.as_fd());
        let how = match names.peek() {
            Some(_) => DIR,
            None => flags,
        };
        let opened = openat(from, name, how | OFlags::NOFOLLOW, Mode::empty());
        at = Some(opened.map_err(|e| match e {
            // What `DIRECTORY` says of a link.
            Errno::NOTDIR if is_link(from, name) => Errno::LOOP,
            e => e,
        })?);
    }
    let Some(fd) = at else {
        return Ok(openat(dir, ".", flags, Mode::empty())?);
    };
    // `PATH` and `NOFOLLOW` open a link itself.
    let mode = rustix::fs::fstat(&fd)?.st_mode;
    match FileType::from_raw_mode(mode) {
        FileType::Symlink => Err(Errno::LOOP.into()),
        _ => Ok(fd),
    }
}

pub(super) fn is_link(dir: BorrowedFd<'_>, name: &[u8]) -> bool {
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
}

impl Root {
    /// Of a user's own paths: relative ones begin at the working directory.
    ///
    /// # Errors
    /// There is no working directory.
    pub fn own() -> io::Result<Self> {
        let dir = openat(CWD, ".", DIR, Mode::empty())?;
        let follow = Follow::Any;
        Ok(Self { dir, follow })
    }

    /// Splits an absolute, plain path at the directory that nothing may lead out of: `/` stands for no such directory. Returns the rest of
    /// the path, too.
    ///
    /// # Errors
    /// The directory is not there, or a link leads to it: whoever names it is to name where it is.
    pub fn of<'p>(root: &str, path: &'p str) -> io::Result<(Self, &'p [u8])> {
        let top = openat(CWD, "/", DIR, Mode::empty())?;
        if root == "/" {
            let follow = Follow::Any;
            let rest = path.strip_prefix('/').unwrap_or(path);
            return Ok((Self { dir: top, follow }, rest.as_bytes()));
        }
        let beneath = |root: &str| {
            let names = root.trim_start_matches('/').as_bytes();
            open_at(top.as_fd(), names, DIR, Follow::None)
        };
        let rest = path.strip_prefix(root).ok_or(Errno::XDEV)?;
        match rest.strip_prefix('/') {
            Some(rest) => {
                let (dir, follow) = (beneath(root)?, Follow::Inside);
                Ok((Self { dir, follow }, rest.as_bytes()))
            }
            // The directory itself, or a file that is named so.
            None if rest.is_empty() => {
                let (above, name) = root.rsplit_once('/').unwrap_or(("", root));
                let (dir, follow) = (beneath(above)?, Follow::None);
                let at = path.len() - name.len();
                Ok((Self { dir, follow }, &path.as_bytes()[at..]))
            }
            None => Err(Errno::XDEV.into()),
        }
    }

    /// Opens something beneath it.
    pub(super) fn open(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        open_at(self.dir.as_fd(), path, flags, self.follow)
    }

    /// The directory that a path is in, and its last name; none, where the path ends without one (`.`, `..`, `/`).
    pub(super) fn spot(&self, path: &[u8]) -> io::Result<Option<Spot>> {
        let end = path.iter().rposition(|b| *b != b'/').map_or(0, |at| at + 1);
        let path = &path[..end];
        let (above, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(at) => path.split_at(at + 1),
            None => (&path[..0], path),
        };
        if matches!(name, b"" | b"." | b"..") {
            return Ok(None);
        }
        let dir = self.open(above, DIR)?;
        let name = name.to_vec();
        Ok(Some(Spot { dir, name }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn scene() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "in").unwrap();
        fs::write(dir.path().join("secret"), "out").unwrap();
        symlink("a", root.join("inside")).unwrap();
        symlink("../secret", root.join("up")).unwrap();
        symlink("..", root.join("parent")).unwrap();
        symlink(dir.path().join("secret"), root.join("absolute")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let fd = openat(CWD, &root, DIR, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn r122_no_path_leads_out_of_a_directory_with_openat2_and_without() {
        let (_dir, fd) = scene();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let by = |path: &str, follow| open_at(fd.as_fd(), path.as_bytes(), flags, follow);
        let steps = |path: &str| step_by_step(fd.as_fd(), path.as_bytes(), flags);
        for path in ["a", "a/b", "a/file", ".", "", "a/./b"] {
            by(path, Follow::None).unwrap();
            steps(path).unwrap();
        }
        by("inside/file", Follow::Inside).unwrap();
        assert!(by("inside/file", Follow::None).is_err());
        assert!(steps("inside/file").is_err());
        for path in [
            "..",
            "a/../../secret",
            "up",
            "parent/secret",
            "absolute",
            "/etc/passwd",
            "loop",
        ] {
            for follow in [Follow::None, Follow::Inside] {
                assert!(by(path, follow).is_err(), "{path} {follow:?}");
            }
            assert!(steps(path).is_err(), "{path}");
        }
    }

    #[test]
    fn a_directory_that_a_link_leads_to_is_no_root() {
        let (dir, _fd) = scene();
        let text = |path: &str| dir.path().canonicalize().unwrap().join(path);
        let root = |root: &str, path: &str| {
            let (root, path) = (text(root), text(path));
            let found = Root::of(root.to_str().unwrap(), path.to_str().unwrap());
            found.map(|(_, rest)| String::from_utf8(rest.to_vec()).unwrap())
        };
        assert_eq!(root("root", "root/a/b").unwrap(), "a/b");
        assert_eq!(root("root/a/file", "root/a/file").unwrap(), "file");
        assert!(root("root/inside", "root/inside/file").is_err());
        // One that only begins like it.
        assert!(root("root", "rooted/a").is_err());
    }
}
