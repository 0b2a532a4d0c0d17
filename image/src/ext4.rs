//! An ext4 file system in a file, without mounting it.
//!
//! Reading is `ext4-view`, writing is one run of `debugfs` (e2fsprogs) in [`Ext4::commit`], after which `e2fsck` must find
//! nothing and every file must be read back as it was meant. `debugfs` says by no exit status what went wrong, and a command
//! of it that fails can leave a damaged file system: so the caller works on a copy, and throws it away if `commit` fails.
//!
//! `debugfs` follows links of the file system inside the file system, as the kernel of the VM will.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::{self, NoProgram};
use crate::{Root, dir_mode};

/// Offset of the superblock in the file system, and of what is read of it (kernel: fs/ext4/ext4.h).
const SUPERBLOCK: u64 = 1024;
const MAGIC_AT: u64 = SUPERBLOCK + 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];
const STATE_AT: u64 = SUPERBLOCK + 0x3a;
const STATE_CLEAN: u16 = 1;
const STATE_ERRORS: u16 = 2;
const INCOMPATIBLE_AT: u64 = SUPERBLOCK + 0x60;
const NEEDS_RECOVERY: u32 = 4;
const LOG_BLOCK_SIZE_AT: u64 = SUPERBLOCK + 0x18;
const BLOCKS_AT: u64 = SUPERBLOCK + 0x04;
const BLOCKS_HIGH_AT: u64 = SUPERBLOCK + 0x150;
const GROUP_BLOCKS_AT: u64 = SUPERBLOCK + 0x20;

/// Largest block: 64 KiB, as 10 bits that are shifted. The kernel knows none larger.
const LOG_BLOCK_SIZE_MAX: u32 = 6;
/// Most groups of blocks: those of 128 TiB, laid out as usual. `ext4-view` makes room for all of them before it reads one.
const GROUPS_MAX: u64 = 1 << 20;
/// Longest target of a link, as in the kernel.
const TARGET_MAX: u64 = 4095;
/// Most links on the way to a path, as in the kernel.
const LINKS_MAX: u32 = 40;
/// Largest directory on the way to a path, in bytes: it is read from its beginning.
const DIR_MAX: u64 = 64 << 20;

/// Why a file system cannot be used, or was not written.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// The image cannot be read.
    #[error("cannot read the image")]
    Read(#[source] io::Error),
    /// A VM had it mounted when it was copied, or did not shut down.
    #[error(
        "the file system was not unmounted cleanly: start and shut down its VM, or run `e2fsck -f` on it"
    )]
    Unclean,
    /// It is damaged, or has features that are not known here.
    #[error("the file system cannot be read: {0}")]
    Damaged(String),
    /// A program of e2fsprogs cannot be started.
    #[error(transparent)]
    NoProgram(#[from] NoProgram),
    /// A path has a character that `debugfs` cannot be given.
    #[error("the name {0:?} cannot be written into an image")]
    BadName(String),
    /// A file is not there as it was meant, most often because there is no room.
    #[error("/{path} could not be written{}", after(.said))]
    NotWritten {
        /// Its path.
        path: String,
        /// What debugfs said.
        said: String,
    },
    /// After writing the file system has errors.
    #[error("after writing, e2fsck finds errors: {0}")]
    Broken(String),
    /// What is to be written cannot be laid out.
    #[error("cannot write the temporary file {}", path.display())]
    Temp {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn after(text: &str) -> String {
    match text {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

/// What is to be at a path.
#[derive(Debug)]
enum Entry {
    File { content: Vec<u8>, mode: u32 },
    Link { target: String },
}

/// A file system: reads it as it is, and gathers what is to be written.
pub struct Ext4 {
    image: PathBuf,
    /// Where it begins in the image.
    offset: u64,
    view: ext4_view::Ext4,
    /// By path, which has no link in it but for its last name.
    changes: BTreeMap<String, Entry>,
}

/// Reads from where the file system begins.
struct Part {
    file: File,
    offset: u64,
}

impl ext4_view::Ext4Read for Part {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let start = self.offset.checked_add(start_byte);
        let start = start.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.file.seek(SeekFrom::Start(start))?;
        Ok(self.file.read_exact(dst)?)
    }
}

/// Tells whether there is an ext2, ext3 or ext4 file system at an offset of the image.
pub(crate) fn is_at(image: &File, offset: u64) -> bool {
    let mut magic = [0; 2];
    let at = offset.saturating_add(MAGIC_AT);
    image.read_exact_at(&mut magic, at).is_ok() && magic == MAGIC
}

/// Refuses sizes that no file system of a VM has. The image may be anybody's, and `ext4-view` believes them: it would ask for more
/// memory than there is.
fn check_sizes(image: &File, offset: u64) -> Result<(), Ext4Error> {
    let number = |at: u64| {
        let mut bytes = [0; 4];
        let read = image.read_exact_at(&mut bytes, offset.saturating_add(at));
        read.map_err(Ext4Error::Read)?;
        Ok::<_, Ext4Error>(u32::from_le_bytes(bytes))
    };
    let log = number(LOG_BLOCK_SIZE_AT)?;
    if log > LOG_BLOCK_SIZE_MAX {
        let text = format!("its blocks have 2^{} bytes", u64::from(log) + 10);
        return Err(Ext4Error::Damaged(text));
    }
    let blocks = u64::from(number(BLOCKS_HIGH_AT)?) << 32 | u64::from(number(BLOCKS_AT)?);
    let groups = blocks.div_ceil(u64::from(number(GROUP_BLOCKS_AT)?).max(1));
    if groups > GROUPS_MAX {
        let text = format!("it has {groups} groups of blocks, at most {GROUPS_MAX} are read");
        return Err(Ext4Error::Damaged(text));
    }
    Ok(())
}

fn view(image: &Path, offset: u64) -> Result<ext4_view::Ext4, Ext4Error> {
    let file = File::open(image).map_err(Ext4Error::Read)?;
    check_sizes(&file, offset)?;
    ext4_view::Ext4::load(Box::new(Part { file, offset }))
        .map_err(|e| Ext4Error::Damaged(e.to_string()))
}

impl Ext4 {
    /// Opens the file system that begins at `offset` bytes of an image.
    ///
    /// # Errors
    /// It cannot be read, or was not unmounted.
    pub fn open(image: &Path, offset: u64) -> Result<Self, Ext4Error> {
        let file = File::open(image).map_err(Ext4Error::Read)?;
        let (mut state, mut incompatible) = ([0; 2], [0; 4]);
        let read = file.read_exact_at(&mut state, offset.saturating_add(STATE_AT));
        let read = read.and_then(|()| {
            file.read_exact_at(&mut incompatible, offset.saturating_add(INCOMPATIBLE_AT))
        });
        read.map_err(Ext4Error::Read)?;
        let state = u16::from_le_bytes(state);
        let clean = state & STATE_CLEAN != 0 && state & STATE_ERRORS == 0;
        if !clean || u32::from_le_bytes(incompatible) & NEEDS_RECOVERY != 0 {
            return Err(Ext4Error::Unclean);
        }
        let view = view(image, offset)?;
        let root = view.symlink_metadata("/");
        let root = root.map_err(|e| Ext4Error::Damaged(e.to_string()))?;
        if root.len() > DIR_MAX {
            let text = format!("its root directory has {} bytes", root.len());
            return Err(Ext4Error::Damaged(text));
        }
        Ok(Self {
            image: image.into(),
            offset,
            view,
            changes: BTreeMap::new(),
        })
    }

    /// Writes what was gathered. If it fails the file system may be damaged.
    ///
    /// # Errors
    /// It cannot be written, or is not what it should be afterwards.
    pub fn commit(self) -> Result<(), Ext4Error> {
        if self.changes.is_empty() {
            return Ok(());
        }
        let dir = tempfile::tempdir().map_err(|source| Ext4Error::Temp {
            path: std::env::temp_dir(),
            source,
        })?;
        let put = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            let put = fs::write(&path, content);
            let put =
                put.and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)));
            put.map_err(|source| Ext4Error::Temp {
                path: path.clone(),
                source,
            })?;
            Ok::<_, Ext4Error>(path)
        };
        // The image's own name may have any character; the link's has none that a program treats specially.
        let link = dir.path().join("image");
        let target = fs::canonicalize(&self.image).map_err(Ext4Error::Read)?;
        std::os::unix::fs::symlink(target, &link).map_err(|source| Ext4Error::Temp {
            path: link.clone(),
            source,
        })?;
        let device = format!("{}?offset={}", link.display(), self.offset);
        let mut script = String::new();
        let mut made = Vec::new();
        for (n, (path, entry)) in self.changes.iter().enumerate() {
            self.make_parents(path, &mut made, &mut script);
            if self.view.symlink_metadata(&*absolute(path)).is_ok() {
                let _ = writeln!(script, "rm \"/{path}\"");
            }
            let (parent, name) = split(path);
            match entry {
                Entry::File { content, mode } => {
                    let from = put(&format!("file{n}"), content)?;
                    let _ = writeln!(script, "cd \"/{parent}\"");
                    let _ = writeln!(script, "write \"{}\" \"{name}\"", from.display());
                    let _ = writeln!(script, "sif \"/{path}\" mode 0100{mode:03o}");
                    let _ = writeln!(script, "sif \"/{path}\" uid 0\nsif \"/{path}\" gid 0");
                }
                Entry::Link { target } => {
                    let _ = writeln!(script, "symlink \"/{path}\" \"{target}\"");
                }
            }
        }
        let script = put("script", script.as_bytes())?;
        let mut debugfs = Command::new("debugfs");
        debugfs.arg("-w").arg("-f").arg(&script).arg(&device);
        let (_, said) = run("debugfs", debugfs)?;
        let written = view(&self.image, self.offset)?;
        for (path, entry) in &self.changes {
            if !is_there(&written, path, entry) {
                let (path, said) = (path.clone(), complaints(&said));
                return Err(Ext4Error::NotWritten { path, said });
            }
        }
        let mut e2fsck = Command::new("e2fsck");
        e2fsck.arg("-fn").arg(&device);
        match run("e2fsck", e2fsck)? {
            (true, _) => Ok(()),
            (false, said) => Err(Ext4Error::Broken(complaints(&said))),
        }
    }

    /// Makes the directories above a path that are not there.
    fn make_parents(&self, path: &str, made: &mut Vec<String>, script: &mut String) {
        for (at, _) in path.match_indices('/') {
            let dir = &path[..at];
            if self.view.exists(&*absolute(dir)).unwrap_or(false) || made.iter().any(|d| d == dir) {
                continue;
            }
            let _ = writeln!(script, "mkdir \"/{dir}\"");
            let _ = writeln!(script, "sif \"/{dir}\" mode 040{:03o}", dir_mode(dir));
            made.push(dir.into());
        }
    }

    /// Where an absolute path leads, with no link in it; none if it leads nowhere. `ext4-view` is not asked to follow links: it
    /// would read a target of whatever length the image says.
    fn follow(&self, path: &str) -> Option<String> {
        let (mut at, mut links) = (String::new(), 0);
        let parts = |path: &str| path.split('/').rev().map(str::to_owned).collect::<Vec<_>>();
        let mut rest = parts(path);
        while let Some(part) = rest.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    at.truncate(at.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = format!("{at}/{part}");
            let found = self.view.symlink_metadata(next.as_str()).ok()?;
            if found.is_dir() && found.len() > DIR_MAX {
                return None;
            }
            if !found.is_symlink() {
                at = next;
                continue;
            }
            links += 1;
            if links > LINKS_MAX || found.len() > TARGET_MAX {
                return None;
            }
            let target = self.view.read_link(next.as_str()).ok()?;
            let target = target.to_str().ok()?;
            if target.starts_with('/') {
                at.clear();
            }
            rest.extend(parts(target));
        }
        Some(if at.is_empty() { "/".into() } else { at })
    }

    /// The path without links in its directories; what does not exist stays as it is.
    fn resolve(&self, path: &str) -> io::Result<String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "/._-@+".contains(c);
        let bad = || io::Error::other(Ext4Error::BadName(path.into()));
        if !path.chars().all(allowed) || path.split('/').any(|p| ["", ".", ".."].contains(&p)) {
            return Err(bad());
        }
        let (parent, name) = split(path);
        let mut at = String::from("/");
        for part in parent.split('/').filter(|p| !p.is_empty()) {
            let next = format!("{}/{part}", at.trim_end_matches('/'));
            let there = self.view.symlink_metadata(next.as_str());
            at = match (self.follow(&next), there) {
                (Some(real), _) => real,
                (None, Err(_)) => next,
                (None, Ok(there)) => {
                    let what = match there.is_symlink() {
                        true => "a link to a directory that the image does not have",
                        false => "no directory that can be read",
                    };
                    return Err(io::Error::other(format!("/{path}: {next} is {what}")));
                }
            };
            if let Ok(found) = self.view.symlink_metadata(at.as_str())
                && !found.is_dir()
            {
                return Err(io::Error::other(format!("{at} is no directory")));
            }
        }
        if !at.chars().all(allowed) {
            return Err(bad());
        }
        let whole = format!("{}/{name}", at.trim_end_matches('/'));
        if self
            .view
            .symlink_metadata(whole.as_str())
            .is_ok_and(|m| m.is_dir())
        {
            return Err(io::Error::other(format!("{whole} is a directory")));
        }
        Ok(whole.trim_start_matches('/').into())
    }

    fn change(&mut self, path: &str, entry: Entry) -> io::Result<bool> {
        let path = self.resolve(path)?;
        if is_there(&self.view, &path, &entry) {
            self.changes.remove(&path);
            return Ok(false);
        }
        self.changes.insert(path, entry);
        Ok(true)
    }
}

impl Root for Ext4 {
    fn has(&self, path: &str) -> bool {
        self.follow(path).is_some()
    }

    fn is_same(&self, one: &str, other: &str) -> bool {
        let one = self.follow(one);
        one.is_some() && one == self.follow(other)
    }

    fn place(&mut self, path: &str, content: &[u8], mode: u32) -> io::Result<bool> {
        let content = content.to_vec();
        self.change(path, Entry::File { content, mode })
    }

    fn place_link(&mut self, path: &str, target: &str) -> io::Result<bool> {
        let target = target.into();
        self.change(path, Entry::Link { target })
    }
}

fn absolute(path: &str) -> String {
    format!("/{path}")
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// Tells whether a path is what it should be: content, kind, mode and owner.
fn is_there(view: &ext4_view::Ext4, path: &str, entry: &Entry) -> bool {
    let path = absolute(path);
    let Ok(found) = view.symlink_metadata(path.as_str()) else {
        return false;
    };
    match entry {
        Entry::File { content, mode } => {
            let regular = found.file_type() == ext4_view::FileType::Regular;
            let right =
                u32::from(found.mode()) & 0o7777 == *mode && found.uid() == 0 && found.gid() == 0;
            regular
                && right
                && found.len() == content.len() as u64
                && view
                    .read(path.as_str())
                    .is_ok_and(|found| found == *content)
        }
        Entry::Link { target } => {
            found.is_symlink()
                && found.len() == target.len() as u64
                && view
                    .read_link(path.as_str())
                    .is_ok_and(|l| l.as_ref() == target.as_bytes())
        }
    }
}

/// Runs a program of e2fsprogs. Returns whether it said that all is well, and what it said.
fn run(program: &'static str, command: Command) -> Result<(bool, String), NoProgram> {
    let done = program::output(program, "e2fsprogs", command)?;
    let text = [done.stdout, done.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok((done.status.success(), text))
}

/// What a program of e2fsprogs said beyond its version and the commands that it was given; a few lines at most.
fn complaints(said: &str) -> String {
    let own = ["debugfs", "e2fsck ", "Allocated inode", "Pass "];
    let lines = said.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !own.iter().any(|o| line.starts_with(o)));
    let some: Vec<&str> = lines.take(3).collect();
    some.join("; ")
}
