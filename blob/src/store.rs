//! Blobs in a directory of this process's own, with a quota.
//!
//! | name | is |
//! |---|---|
//! | `HEX` | a blob: its content has this sha256, which was checked before it had this name |
//! | `HEX-SIZE.part` | what has come so far of one that will have `SIZE` bytes |
//!
//! A prefix may stand before both. Files with other names are not the store's, and not touched.
//!
//! Where there is no room for one more, those go that were used least recently, parts as well as blobs; never one that
//! somebody reads or writes. Whether that makes enough room is known before the first one goes.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::OFlags;

use crate::{Digest, disk};

/// Most blobs and parts of one store.
pub const COUNT_MAX: usize = 256;

/// How much a store takes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one blob.
    pub blob: u64,
    /// Bytes of all of them, parts counted whole.
    pub all: u64,
    /// Bytes of the file system that are left free.
    pub spare: u64,
}

/// Why a blob is not taken, or not there.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// Larger than any may be.
    #[error("it has {size} bytes, at most {max} are taken")]
    TooLarge {
        /// Its size.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// There is no room, also without all that may go.
    #[error("no room for {size} bytes: {why}")]
    NoSpace {
        /// Its size.
        size: u64,
        /// Whose limit that is.
        why: String,
    },
    /// Somebody writes it.
    #[error("it is being written by another stream")]
    Busy,
    /// What came, or what was announced of it, is not what has this digest.
    #[error("{0}")]
    Mismatch(String),
    /// There is none.
    #[error("no blob is named {0}")]
    Unknown(Digest),
    /// The disk fails.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What there is of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Present {
    /// Nothing.
    Nothing,
    /// The first bytes.
    Part {
        /// How many.
        bytes: u64,
        /// How many it will have.
        size: u64,
    },
    /// All of it.
    Whole {
        /// Its size.
        size: u64,
    },
}

/// A directory of blobs.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    prefix: &'static str,
    limits: Limits,
    /// Held by whoever reads the directory or changes what is in it, which takes time.
    turn: Mutex<()>,
    /// Never held over anything that takes time, because readers and writers are dropped on threads that others wait for. New ones
    /// come only to whoever has the turn.
    held: Mutex<HashMap<Digest, Held>>,
}

/// Who uses a blob now.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    readers: usize,
    is_written: bool,
}

/// A file of the store.
struct Entry {
    path: PathBuf,
    digest: Digest,
    /// None: it is a blob.
    part_of: Option<u64>,
    /// What it counts.
    size: u64,
    /// What it takes now.
    on_disk: u64,
    used: SystemTime,
}

/// What becomes of a blob that is offered.
#[derive(Debug)]
pub enum Begun {
    /// It is there.
    Whole(Reading),
    /// It is to be written from [`Writing::at`] on.
    Writing(Writing),
}

impl Store {
    /// A store in this directory, which is made when the first blob comes.
    pub fn new(dir: &Path, prefix: &'static str, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            dir: dir.into(),
            prefix,
            limits,
            turn: Mutex::default(),
            held: Mutex::default(),
        })
    }

    /// What there is of a blob.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn present(&self, digest: &Digest) -> io::Result<Present> {
        let _turn = self.turn();
        let mut found = Present::Nothing;
        for entry in self.entries()?.iter().filter(|e| e.digest == *digest) {
            match entry.part_of {
                None => return Ok(Present::Whole { size: entry.size }),
                Some(size) => {
                    let bytes = entry.on_disk;
                    found = Present::Part { bytes, size };
                }
            }
        }
        Ok(found)
    }

    /// Makes room for a blob, and goes on with what there is of it.
    ///
    /// # Errors
    /// It is not taken; then nothing has changed.
    pub fn begin(self: &Arc<Self>, digest: Digest, size: u64) -> Result<Begun, BlobError> {
        let max = self.limits.blob;
        if size > max {
            return Err(BlobError::TooLarge { size, max });
        }
        let _turn = self.turn();
        let held = self.held().clone();
        disk::own_dir(&self.dir)?;
        let mut entries = self.entries()?;
        entries.sort_by(|a, b| (a.used, &a.path).cmp(&(b.used, &b.path)));
        let (own, others): (Vec<_>, Vec<_>) = entries.into_iter().partition(|e| e.digest == digest);
        if let Some(whole) = own.iter().find(|e| e.part_of.is_none()) {
            if whole.size != size {
                let is = whole.size;
                let text = format!("the blob of this digest has {is} bytes, and not {size}");
                return Err(BlobError::Mismatch(text));
            }
            return self.read(digest).map(Begun::Whole);
        }
        if held.get(&digest).is_some_and(|h| h.is_written) {
            return Err(BlobError::Busy);
        }
        let goes_on = |e: &Entry| e.part_of == Some(size) && e.on_disk <= size;
        let have = own.iter().find(|e| goes_on(e)).map_or(0, |e| e.on_disk);
        let gone: u64 = own.iter().filter(|e| !goes_on(e)).map(|e| e.on_disk).sum();
        let evicted = self.room(&others, &held, size, size - have, gone)?;
        for entry in own.iter().filter(|e| !goes_on(e)).chain(evicted) {
            disk::remove(&entry.path)?;
        }
        let path = self.path(&digest, Some(size));
        let mut file = match open(&path, true) {
            Err(e) if e.kind() == ErrorKind::NotFound => disk::create(&path, 0o600)?,
            // It was another user's, who this process was before.
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                disk::remove(&path)?;
                disk::create(&path, 0o600)?
            }
            file => file?,
        };
        let at = file.seek(SeekFrom::End(0))?;
        self.held().entry(digest).or_default().is_written = true;
        Ok(Begun::Writing(Writing {
            store: self.clone(),
            digest,
            size,
            path,
            file,
            at,
        }))
    }

    /// Opens a blob. While it is read, it does not go.
    ///
    /// # Errors
    /// There is none.
    pub fn open(self: &Arc<Self>, digest: Digest) -> Result<Reading, BlobError> {
        let _turn = self.turn();
        self.read(digest)
    }

    /// Removes a blob that nobody uses, and what there is of one.
    ///
    /// # Errors
    /// Somebody uses it, or it stays.
    pub fn remove(&self, digest: &Digest) -> Result<(), BlobError> {
        let _turn = self.turn();
        if self.held().contains_key(digest) {
            return Err(BlobError::Busy);
        }
        for entry in self.entries()?.iter().filter(|e| e.digest == *digest) {
            disk::remove(&entry.path)?;
        }
        Ok(())
    }

    /// Of who has the turn.
    fn read(self: &Arc<Self>, digest: Digest) -> Result<Reading, BlobError> {
        let path = self.path(&digest, None);
        let file = match open(&path, false) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(BlobError::Unknown(digest)),
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                disk::remove(&path)?;
                return Err(BlobError::Unknown(digest));
            }
            file => file?,
        };
        let size = file.metadata()?.len();
        // Only its turn to go depends on it.
        let _ = file.set_modified(SystemTime::now());
        self.held().entry(digest).or_default().readers += 1;
        Ok(Reading {
            store: self.clone(),
            digest,
            file,
            size,
        })
    }

    /// Which files go, so that there is room for so many bytes, of which `new` are not on disk yet and `freed` will be free.
    fn room<'a>(
        &self,
        others: &'a [Entry],
        held: &HashMap<Digest, Held>,
        size: u64,
        new: u64,
        freed: u64,
    ) -> Result<Vec<&'a Entry>, BlobError> {
        let full = |why: String| Err(BlobError::NoSpace { size, why });
        // What others are still to write is not free.
        let writes = |e: &&Entry| held.get(&e.digest).is_some_and(|h| h.is_written);
        let owed = others.iter().filter(writes);
        let owed = owed.fold(0_u64, |n, e| {
            n.saturating_add(e.size.saturating_sub(e.on_disk))
        });
        let free = disk::free(&self.dir)?.saturating_add(freed);
        let mut free = free.saturating_sub(owed);
        let needed = new.saturating_add(self.limits.spare);
        let mut all = others.iter().fold(size, |n, e| n.saturating_add(e.size));
        let mut count = others.len();
        let mut evicted = Vec::new();
        let mut oldest = others.iter().filter(|e| !held.contains_key(&e.digest));
        while all > self.limits.all || count >= COUNT_MAX || free < needed {
            let Some(entry) = oldest.next() else {
                let Limits { all: max, .. } = self.limits;
                return match free < needed {
                    true => full(format!(
                        "{free} bytes of the disk are free, {needed} needed"
                    )),
                    false => full(format!("{max} bytes in {COUNT_MAX} files are kept at most")),
                };
            };
            all -= entry.size;
            count -= 1;
            free = free.saturating_add(entry.on_disk);
            evicted.push(entry);
        }
        Ok(evicted)
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        let listed = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed?,
        };
        let mut entries = Vec::new();
        for file in listed {
            let file = file?;
            let name = file.file_name();
            let Some((digest, part_of)) = name.to_str().and_then(|n| self.parse(n)) else {
                continue;
            };
            let path = file.path();
            let meta = match fs::symlink_metadata(&path) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                meta => meta?,
            };
            let on_disk = meta.len();
            entries.push(Entry {
                path,
                digest,
                part_of,
                size: part_of.unwrap_or(on_disk),
                on_disk,
                used: meta.modified()?,
            });
        }
        Ok(entries)
    }

    fn path(&self, digest: &Digest, part_of: Option<u64>) -> PathBuf {
        let prefix = self.prefix;
        self.dir.join(match part_of {
            None => format!("{prefix}{digest}"),
            Some(size) => format!("{prefix}{digest}-{size}.part"),
        })
    }

    /// Reads a name, in its one spelling.
    fn parse(&self, name: &str) -> Option<(Digest, Option<u64>)> {
        let rest = name.strip_prefix(self.prefix)?;
        let (digest, part_of) = match rest.strip_suffix(".part") {
            Some(part) => {
                let (digest, size) = part.split_once('-')?;
                (digest, Some(size.parse().ok()?))
            }
            None => (rest, None),
        };
        let digest = digest.parse().ok()?;
        let again = self.path(&digest, part_of);
        (again.file_name()?.to_str() == Some(name)).then_some((digest, part_of))
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Digest, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, digest: &Digest, release: impl FnOnce(&mut Held)) {
        let mut all = self.held();
        if let Some(held) = all.get_mut(digest) {
            release(held);
            if held.readers == 0 && !held.is_written {
                all.remove(digest);
            }
        }
    }
}

/// Opens a file of the store: a regular one that has no other name, and no link.
fn open(path: &Path, write: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let file = options
        .read(true)
        .write(write)
        .custom_flags(flags.cast_signed())
        .open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() || meta.nlink() != 1 {
        let why = format!("{} is no file of our own", path.display());
        return Err(io::Error::new(ErrorKind::InvalidData, why));
    }
    Ok(file)
}

/// A blob that is read.
#[derive(Debug)]
pub struct Reading {
    store: Arc<Store>,
    digest: Digest,
    file: File,
    size: u64,
}

impl Reading {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads from this byte on, wherever others read.
    ///
    /// # Errors
    /// The disk fails.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read_at(buf, at)
    }
}

impl Read for Reading {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.file.read(buf)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.store.release(&self.digest, |held| held.readers -= 1);
    }
}

/// A blob that is written. Dropped before its end, what came is kept.
#[derive(Debug)]
pub struct Writing {
    store: Arc<Store>,
    digest: Digest,
    size: u64,
    path: PathBuf,
    file: File,
    at: u64,
}

impl Writing {
    /// Bytes that are there.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Bytes that are missing.
    pub fn missing(&self) -> u64 {
        self.size - self.at
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// They are too many; or there is no room any more, and then what was there is given up.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        if bytes.len() as u64 > self.missing() {
            let text = format!("more came than the {} bytes that were announced", self.size);
            return Err(BlobError::Mismatch(text));
        }
        match disk::write(&self.file, bytes) {
            Ok(()) => self.at += bytes.len() as u64,
            Err(e) if disk::is_full(&e) => {
                let (size, why) = (self.size, e.to_string());
                disk::remove(&self.path)?;
                return Err(BlobError::NoSpace { size, why });
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// Checks it, now that all of it is there, and gives it its name: on disk when this returns.
    ///
    /// # Errors
    /// It has another digest, and is removed; or the disk fails.
    pub fn finish(mut self) -> Result<(), BlobError> {
        disk::sync(&self.file)?;
        self.file.rewind()?;
        let (is, len) = Digest::of_reader(&self.file)?;
        if is != self.digest || len != self.size {
            disk::remove(&self.path)?;
            let text = format!("what came has the digest {is}, and not {}", self.digest);
            return Err(BlobError::Mismatch(text));
        }
        Ok(disk::rename(
            &self.path,
            &self.store.path(&self.digest, None),
        )?)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.store
            .release(&self.digest, |held| held.is_written = false);
    }
}

#[cfg(test)]
mod tests;
