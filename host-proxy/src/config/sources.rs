//! The texts that a configuration is made of: `aditd.toml`, and what is in `conf.d` beside it.
//!
//! Files of `conf.d` are read in the order of their names, and only those whose names end with `.toml`; a name that begins with
//! a dot is somebody's half-written file. They have sections of which there may be many: `[[vm]]`, `[[listen]]`, `[[grant]]`,
//! `[[token]]`. With them goes what is in the files that a listener's `cert`, `key` and `client_ca` name, and those of `[peers]`.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use adit_names::VmId;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::certificates::Files;
use super::{ConfigError, FILE_MAX, names};

/// Most files of `conf.d`.
pub const PARTS_MAX: usize = 256;

/// Paths and texts.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Sources {
    /// The main file first.
    texts: Vec<(PathBuf, String)>,
    /// What they name.
    files: Files,
    /// The machine's, as far as it can be a host's name here.
    #[serde(default)]
    hostname: Option<VmId>,
}

impl Sources {
    /// One file, whose text is known.
    pub fn one(path: &Path, text: &str) -> Self {
        Self {
            texts: vec![(path.into(), text.into())],
            files: Files::default(),
            hostname: None,
        }
    }

    /// Reads them all.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut left = FILE_MAX;
        let mut read = |path: &Path, is_part| {
            let text = text_of(path, is_part, left).map_err(|source| cannot(path, source))?;
            left -= text.len() as u64;
            Ok((path.to_owned(), text))
        };
        let mut texts = vec![read(path, false)?];
        for part in parts(path)? {
            texts.push(read(&part, true)?);
        }
        let mut files = Files::default();
        for (_, text) in &texts {
            files.read(text, &mut left);
        }
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Ok(Self {
            texts,
            files,
            hostname: names::of_machine(&hostname),
        })
    }

    /// Each path with its text, the main file first.
    pub fn iter(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.texts.iter().map(|(path, text)| (&**path, &**text))
    }

    /// What is in the files that they name.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The machine's name, if a host can have it.
    pub fn hostname(&self) -> Option<&VmId> {
        self.hostname.as_ref()
    }

    /// Puts them into one text, for another process of aditd.
    pub fn packed(&self) -> String {
        // Paths of this host's files, which are shown as they are in messages only.
        let lossy = self
            .iter()
            .map(|(path, text)| (path.to_string_lossy(), text));
        let packed = Packed {
            texts: lossy.collect(),
            files: &self.files,
            hostname: self.hostname.as_ref(),
        };
        serde_json::to_string(&packed).unwrap_or_default()
    }

    /// Takes them out of such a text.
    ///
    /// # Errors
    /// It is none.
    pub fn unpack(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// [`Sources`] as a text.
#[derive(Serialize)]
struct Packed<'a> {
    texts: Vec<(Cow<'a, str>, &'a str)>,
    files: &'a Files,
    hostname: Option<&'a VmId>,
}

fn cannot(path: &Path, source: io::Error) -> ConfigError {
    let path = path.into();
    ConfigError::Read { path, source }
}

/// Files of `conf.d` beside the main file.
fn parts(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let dir = path.with_file_name("conf.d");
    let cannot = |source| cannot(&dir, source);
    let listed = match std::fs::read_dir(&dir) {
        Ok(listed) => listed,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(cannot(e)),
    };
    let mut parts = Vec::new();
    for entry in listed {
        let part = entry.map_err(cannot)?.path();
        let is_hidden = part
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if is_hidden || part.extension().is_none_or(|end| end != "toml") {
            continue;
        }
        if parts.len() == PARTS_MAX {
            return Err(cannot(io::Error::other(format!(
                "it has more than {PARTS_MAX} files"
            ))));
        }
        parts.push(part);
    }
    parts.sort();
    Ok(parts)
}

/// `is_part`: it is in `conf.d`, where anybody who may write may leave a pipe, which would be waited for.
fn text_of(path: &Path, is_part: bool, left: u64) -> io::Result<String> {
    let mut text = String::new();
    let file = match is_part {
        false => File::open(path)?,
        true => {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
            if !file.metadata()?.is_file() {
                return Err(io::Error::other("it is no regular file"));
            }
            file
        }
    };
    let read = file.take(left + 1).read_to_string(&mut text)?;
    match read as u64 > left {
        true => Err(io::Error::other(format!(
            "the configuration has more than {} MiB",
            FILE_MAX >> 20
        ))),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What `conf.d` does with this in it: the files that are read, or that it is refused with the path of the one at fault.
    fn read(make: impl FnOnce(&Path)) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let (main, parts) = (dir.path().join("aditd.toml"), dir.path().join("conf.d"));
        std::fs::write(&main, "# main\n").unwrap();
        std::fs::create_dir(&parts).unwrap();
        make(&parts);
        let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
        match Sources::read(&main) {
            Ok(all) => Ok(all.iter().skip(1).map(|(path, _)| name(path)).collect()),
            Err(ConfigError::Read { path, .. }) => Err(name(&path)),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn parts_are_read_by_their_names_and_half_written_ones_are_not() {
        let found = read(|parts| {
            for file in [
                "b.toml",
                "a.toml",
                ".a.toml.swp",
                ".c.toml",
                "a.toml~",
                "d",
                "e.toml.bak",
            ] {
                std::fs::write(parts.join(file), "").unwrap();
            }
            symlink(parts.join("a.toml"), parts.join("z.toml")).unwrap();
        });
        assert_eq!(
            found,
            Ok(vec!["a.toml".into(), "b.toml".into(), "z.toml".into()])
        );
    }

    #[test]
    fn what_is_no_readable_file_is_refused_by_name_and_never_waited_for() {
        let pipe = |path: &Path| {
            let (kind, mode) = (rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600));
            rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
        };
        let dir = |path: &Path| std::fs::create_dir(path).unwrap();
        let dangling = |path: &Path| symlink("nowhere", path).unwrap();
        let around = |path: &Path| symlink(path, path).unwrap();
        let endless = |path: &Path| symlink("/dev/zero", path).unwrap();
        let no_text = |path: &Path| std::fs::write(path, b"\xff").unwrap();
        let too_big = |path: &Path| File::create(path).unwrap().set_len(FILE_MAX + 1).unwrap();
        let kinds: [&dyn Fn(&Path); 7] = [
            &pipe, &dir, &dangling, &around, &endless, &no_text, &too_big,
        ];
        for (nth, make) in kinds.into_iter().enumerate() {
            let found = read(|parts| make(&parts.join("x.toml")));
            assert_eq!(found, Err("x.toml".into()), "{nth}");
        }
    }

    #[test]
    fn parts_are_bounded_in_number() {
        let some = |n: usize| {
            read(move |parts| {
                for nth in 0..n {
                    std::fs::write(parts.join(format!("{nth}.toml")), "").unwrap();
                }
            })
        };
        assert_eq!(some(PARTS_MAX).unwrap().len(), PARTS_MAX);
        assert_eq!(some(PARTS_MAX + 1), Err("conf.d".into()));
    }
}
