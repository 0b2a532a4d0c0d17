//! Reads a policy file. It counts only if nobody but root can change it: the file is a regular one, it and its directory belong
//! to root (or the agent's user) and nobody else may write them, and its name is no link.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use super::decide::Policy;
use super::parse::{self, FILE_MAX, Problem};
use crate::owned::{self, Writable};

/// Why a policy file is not used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It is not there.
    #[error("{}: there is no such file", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
    },
    /// It cannot be read, or is no file.
    #[error("{}: {why}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// Others can change it.
    #[error("{}: {why}", at.display())]
    Writable {
        /// The file, or its directory.
        at: PathBuf,
        /// Who.
        why: Writable,
    },
    /// It has mistakes.
    #[error("{}:{}", file.display(), told(.problems))]
    Bad {
        /// The file.
        file: PathBuf,
        /// At least one.
        problems: Vec<Problem>,
    },
}

/// The first mistake, and how many there are.
fn told(problems: &[Problem]) -> String {
    match problems {
        [] => "it has mistakes".into(),
        [only] => only.to_string(),
        [first, more @ ..] => format!("{first}; and {} more", more.len()),
    }
}

impl PolicyError {
    /// Stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "policy-missing",
            Self::Unreadable { .. } => "policy-unreadable",
            Self::Writable { .. } => "policy-writable",
            Self::Bad { .. } => "policy-bad",
        }
    }

    /// What to do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Missing { file } => format!(
                "put it back; or, to have no policy, take `policy` out of the configuration, remove {} and restart the agent",
                file.display()
            ),
            Self::Unreadable { .. } => "see the cause".into(),
            Self::Writable { at, .. } => {
                let at = at.display();
                format!("chown root {at} and chmod go-w {at}")
            }
            Self::Bad { .. } => "`adit-guest policy check` says every mistake".into(),
        }
    }
}

/// Reads and checks a policy file.
///
/// # Errors
/// It is not used, and why.
pub fn read(file: &Path) -> Result<Policy, PolicyError> {
    let bytes = read_owned(file)?;
    parse::parse(&bytes).map_err(|problems| PolicyError::Bad {
        file: file.into(),
        problems,
    })
}

/// The bytes of a file that nobody but root can change.
fn read_owned(file: &Path) -> Result<Vec<u8>, PolicyError> {
    let missing = || PolicyError::Missing { file: file.into() };
    let unreadable = |why: io::Error| PolicyError::Unreadable {
        file: file.into(),
        why,
    };
    let of_errno = |e: Errno| match e {
        Errno::ENOENT => missing(),
        Errno::ELOOP => unreadable(io::Error::other("it is a symbolic link")),
        e => unreadable(e.into()),
    };
    let (Some(dir), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(unreadable(io::Error::other("it is no file")));
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let opened = open(dir, flags, Mode::empty()).map_err(of_errno)?;
    let opened = File::from(opened);
    let meta = opened.metadata().map_err(unreadable)?;
    let writable = |at: &Path| {
        let at = at.to_owned();
        move |why| PolicyError::Writable { at, why }
    };
    owned::check(&meta).map_err(writable(dir))?;
    // Opened once, so that what is checked is what is read; a FIFO is not waited for.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let read = openat(&opened, name, flags, Mode::empty()).map_err(of_errno)?;
    let read = File::from(read);
    let meta = read.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(unreadable(io::Error::other("it is not a regular file")));
    }
    owned::check(&meta).map_err(writable(file))?;
    let mut bytes = Vec::new();
    let limit = FILE_MAX as u64 + 1;
    read.take(limit)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    Ok(bytes)
}

/// Reads a policy file that is to be put into an image, whoever owns it, once: it may be a pipe.
///
/// # Errors
/// The agent could not use it.
pub fn read_given(file: &Path) -> Result<(Policy, Vec<u8>), PolicyError> {
    let mut bytes = Vec::new();
    let limit = FILE_MAX as u64 + 1;
    let read = File::open(file).and_then(|open| open.take(limit).read_to_end(&mut bytes));
    read.map_err(|why| match why.kind() {
        io::ErrorKind::NotFound => PolicyError::Missing { file: file.into() },
        _ => PolicyError::Unreadable {
            file: file.into(),
            why,
        },
    })?;
    match parse::parse(&bytes) {
        Ok(policy) => Ok((policy, bytes)),
        Err(problems) => Err(PolicyError::Bad {
            file: file.into(),
            problems,
        }),
    }
}
