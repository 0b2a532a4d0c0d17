//! Reads a file or a tree, and sends it. No link below the top is followed, no special file opened, and a file that changes meanwhile is
//! broken, never mixed.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat, fstat, openat, readlinkat, seek, statat,
};
use rustix::io::Errno;
use rustix::net::Shutdown;
use sha2::{Digest, Sha256};

use super::LEVELS_MAX;
use super::beneath::Root;
use super::link::{Fault, Stream, Watch, hear, said, say_data};
use crate::outgoing::{Heard, Outgoing};
use crate::wire::{
    Begin, DATA_MAX, End, Entry, Have, Kind, LINK_MAX, Message, Refused, Skipped, Totals,
    XATTRS_MAX, check_path, is_users, refusal,
};

/// Opens a file for reading: never waits for a FIFO's writer, never takes a terminal.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);
/// Opens a directory for reading.
const LIST: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// How long is waited for why the other side has gone.
const WHY: Duration = Duration::from_secs(2);

/// What is sent.
pub enum Source {
    /// A file.
    File(File),
    /// A directory, and what is below.
    Tree(OwnedFd),
    /// What comes out of it, until its end.
    Pipe(Box<dyn Read + Send>),
}

impl Source {
    /// Finds what is at a path.
    ///
    /// # Errors
    /// It is not there, may not be read, or is neither a file nor a directory.
    pub fn find(root: &Root, path: &[u8]) -> Result<Self, Fault> {
        let failed = |e: io::Error| Fault::local("read", path, e);
        let at = root
            .open(path, OFlags::PATH | OFlags::CLOEXEC)
            .map_err(failed)?;
        let stat = fstat(&at).map_err(|e| failed(e.into()))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let dir = openat(&at, ".", LIST, Mode::empty());
                Ok(Self::Tree(dir.map_err(|e| failed(e.into()))?))
            }
            FileType::RegularFile => {
                let file = root.open(path, READ).map_err(failed)?;
                match is_same(&file, &stat) {
                    true => Ok(Self::File(file.into())),
                    false => Err(failed(io::Error::other("it was replaced just now"))),
                }
            }
            kind => {
                let text = format!("{} is {}", super::link::shown(path), what(kind));
                Err(Fault::Local(Refused::new(refusal::KIND, text)))
            }
        }
    }
}

fn what(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "a FIFO, which is not copied",
        FileType::Socket => "a socket, which is not copied",
        FileType::CharacterDevice | FileType::BlockDevice => "a device, which is not copied",
        _ => "of a kind that is not copied",
    }
}

fn is_same(fd: impl AsFd, stat: &Stat) -> bool {
    fstat(fd).is_ok_and(|now| {
        (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino)
            && FileType::from_raw_mode(now.st_mode) == FileType::RegularFile
    })
}

/// What would be another one if somebody had written to it.
fn version(stat: &Stat) -> impl PartialEq + use<> {
    (
        stat.st_size,
        (stat.st_mtime, stat.st_mtime_nsec),
        (stat.st_ctime, stat.st_ctime_nsec),
    )
}

/// Sends it all, and hears what became of it.
///
/// # Errors
/// It was not done, whole or in part. What the receiver has begun may be gone on with after [`Fault::Cut`].
pub fn send(
    stream: &mut Stream,
    source: Source,
    begin: &Begin,
    watch: &dyn Watch,
) -> Result<Totals, Fault> {
    let (from, to) = stream.halves();
    let Ok(socket) = to.get_ref().try_clone() else {
        let text = "there is no descriptor left";
        return Err(Fault::Local(Refused::new(refusal::FAILED, text)));
    };
    let view = Mutex::new(Outgoing::default());
    let (tell, heard) = channel();
    std::thread::scope(|scope| {
        let view = &view;
        let ear = &socket;
        scope.spawn(move || {
            let told = listen(from, view, watch, &tell);
            let is_end = told.is_err();
            let _ = tell.send(told);
            if is_end {
                // Whatever is being written would wait for ever.
                let _ = rustix::net::shutdown(ear, Shutdown::Both);
            }
        });
        let mut sending = Sending {
            to,
            view,
            heard: &heard,
            begin,
            watch,
            piece: vec![0; DATA_MAX],
            entries: 0,
            skipped: 0,
        };
        let done = sending.all(source);
        let done = match done {
            Ok(totals) => Ok(totals),
            Err(Fault::Cut(e)) => Err(why(&heard).unwrap_or(Fault::Cut(e))),
            Err(fault) => {
                if let Some(refused) = fault.refusal() {
                    let _ = sending.to.write_all(&Message::Refused(refused).encode());
                    let _ = sending.to.flush();
                    let _ = rustix::net::shutdown(&socket, Shutdown::Write);
                    let _ = why(&heard);
                }
                Err(fault)
            }
        };
        if done.is_err() {
            let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        }
        done
    })
}

/// Why the other side has gone, if it has said that.
fn why(heard: &Receiver<Result<Heard, Fault>>) -> Option<Fault> {
    loop {
        match heard.recv_timeout(WHY) {
            Ok(Err(Fault::Cut(_))) | Err(_) => return None,
            Ok(Err(fault)) => return Some(fault),
            Ok(Ok(_)) => {}
        }
    }
}

/// Hears until nothing more is to come. What is only to be shown is shown here.
fn listen(
    from: &mut io::BufReader<File>,
    view: &Mutex<Outgoing>,
    watch: &dyn Watch,
    tell: &Sender<Result<Heard, Fault>>,
) -> Result<Heard, Fault> {
    loop {
        let message = hear(from)?;
        let heard = {
            let mut view = view.lock().unwrap_or_else(PoisonError::into_inner);
            view.handle(message).map_err(Fault::Violation)?
        };
        match heard {
            Heard::Skipped(Skipped { path, text }) => watch.skipped(&path, &text),
            Heard::Refused(refused) => return Err(Fault::Refused(refused)),
            Heard::Totals(_) => return Ok(heard),
            Heard::Have(_) => {
                let _ = tell.send(Ok(heard));
            }
        }
    }
}

struct Sending<'a> {
    to: &'a mut io::BufWriter<File>,
    view: &'a Mutex<Outgoing>,
    heard: &'a Receiver<Result<Heard, Fault>>,
    begin: &'a Begin,
    watch: &'a dyn Watch,
    piece: Vec<u8>,
    entries: u64,
    skipped: u64,
}

/// A directory that is being read.
struct Level {
    dir: Dir,
    path: Vec<u8>,
}

impl Sending<'_> {
    fn all(&mut self, source: Source) -> Result<Totals, Fault> {
        match source {
            Source::Pipe(pipe) => self.pipe(pipe)?,
            Source::File(file) => {
                let stat = fstat(&file).map_err(|e| Fault::local("read", b"", e))?;
                self.file(&file, Vec::new(), &stat)?;
            }
            Source::Tree(dir) => self.tree(dir)?,
        }
        {
            let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            view.all();
        }
        self.say(&Message::All(self.entries))?;
        self.flush()?;
        match self.next()? {
            Heard::Totals(mut totals) => {
                totals.skipped = totals.skipped.max(self.skipped);
                Ok(totals)
            }
            _ => Err(Fault::Violation(crate::wire::Violation::NotDue)),
        }
    }

    fn next(&mut self) -> Result<Heard, Fault> {
        let gone = || Fault::Cut(ErrorKind::UnexpectedEof.into());
        self.heard.recv().map_err(|_| gone())?
    }

    fn say(&mut self, message: &Message) -> Result<(), Fault> {
        self.to.write_all(&message.encode()).map_err(Fault::Cut)
    }

    fn flush(&mut self) -> Result<(), Fault> {
        self.to.flush().map_err(Fault::Cut)
    }

    fn skip(&mut self, path: &[u8], why: impl Into<String>) -> Result<(), Fault> {
        let text = crate::wire::text(why);
        self.skipped += 1;
        self.watch.skipped(path, &text);
        let path = path[..path.len().min(LINK_MAX)].to_vec();
        self.say(&Message::Skipped(Skipped { path, text }))
    }

    fn entry(&mut self, entry: Entry) -> Result<(), Fault> {
        self.watch.entry(&entry.path);
        self.entries += 1;
        self.say(&Message::Entry(entry))
    }

    fn entry_of(
        &self,
        path: Vec<u8>,
        kind: Kind,
        stat: &Stat,
        fd: Option<BorrowedFd<'_>>,
    ) -> Entry {
        let xattrs = match fd {
            Some(fd) if self.begin.xattrs => xattrs(fd),
            _ => Vec::new(),
        };
        Entry {
            path,
            kind,
            mode: stat.st_mode & 0o777,
            mtime: (
                stat.st_mtime,
                u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            ),
            owner: self.begin.owners.then_some((stat.st_uid, stat.st_gid)),
            xattrs,
        }
    }

    fn pipe(&mut self, mut pipe: Box<dyn Read + Send>) -> Result<(), Fault> {
        self.expect();
        self.entry(Entry {
            path: Vec::new(),
            kind: Kind::File(None),
            mode: 0o644,
            mtime: now(),
            owner: None,
            xattrs: Vec::new(),
        })?;
        if self.begin.resume {
            self.answer()?;
            self.say(&Message::From(0))?;
        }
        let mut at = 0;
        loop {
            let n = match pipe.read(&mut self.piece) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(Fault::local("read standard input", b"", e)),
            };
            say_data(self.to, at, &self.piece[..n])?;
            // Whoever writes into it slowly is not to wait for a full buffer.
            self.flush()?;
            at += n as u64;
            self.watch.moved(n as u64);
        }
        self.say(&Message::End(End::Whole(at)))
    }

    fn tree(&mut self, top: OwnedFd) -> Result<(), Fault> {
        let failed = |e: Errno| Fault::local("read", b"", e);
        let stat = fstat(&top).map_err(failed)?;
        let entry = self.entry_of(Vec::new(), Kind::Dir, &stat, Some(top.as_fd()));
        self.entry(entry)?;
        let mut levels = vec![Level {
            dir: Dir::new(top).map_err(failed)?,
            path: Vec::new(),
        }];
        while let Some(level) = levels.last_mut() {
            let next = match level.dir.read() {
                None => {
                    levels.pop();
                    continue;
                }
                Some(Ok(next)) => next,
                Some(Err(e)) => {
                    let text = said("list", &[], &e.into());
                    let path = level.path.clone();
                    levels.pop();
                    self.skip(&path, text)?;
                    continue;
                }
            };
            let name = next.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let mut path = level.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(name.to_bytes());
            let below = self.one(levels.last(), name, &path)?;
            if let Some(dir) = below {
                levels.push(Level { dir, path });
            }
        }
        Ok(())
    }

    /// Sends one thing of a directory; of another directory the beginning.
    fn one(
        &mut self,
        level: Option<&Level>,
        name: &CStr,
        path: &[u8],
    ) -> Result<Option<Dir>, Fault> {
        let depth = path.iter().filter(|b| **b == b'/').count() + 1;
        if check_path(path).is_err() || depth >= LEVELS_MAX {
            self.skip(path, "its path is too long, or too deep")?;
            return Ok(None);
        }
        let done = (|| {
            let dir = level.map(|level| level.dir.fd()).transpose()?;
            let dir = dir.ok_or(Errno::NOENT)?;
            let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            Ok::<_, Errno>((
                stat,
                match kind {
                    FileType::Directory => {
                        let flags = LIST | OFlags::NOFOLLOW;
                        Found::Dir(openat(dir, name, flags, Mode::empty())?)
                    }
                    FileType::RegularFile => {
                        let flags = READ | OFlags::NOFOLLOW;
                        Found::File(openat(dir, name, flags, Mode::empty())?)
                    }
                    FileType::Symlink => Found::Link(readlinkat(dir, name, Vec::new())?),
                    kind => Found::Other(what(kind)),
                },
            ))
        })();
        match done {
            Err(e) => self.skip(path, said("read", &[], &e.into()))?,
            Ok((_, Found::Other(what))) => self.skip(path, what)?,
            Ok((stat, Found::Link(to))) => {
                let to = to.into_bytes();
                if to.is_empty() || to.len() > LINK_MAX {
                    self.skip(path, "it is a link whose target is too long")?;
                } else {
                    let entry = self.entry_of(path.to_vec(), Kind::Link(to), &stat, None);
                    self.entry(entry)?;
                }
            }
            Ok((stat, Found::File(fd))) => match is_same(&fd, &stat) {
                true => self.file(&fd.into(), path.to_vec(), &stat)?,
                false => self.skip(path, "it was replaced while it was read")?,
            },
            Ok((_, Found::Dir(fd))) => match fstat(&fd) {
                Ok(stat) => {
                    let entry = self.entry_of(path.to_vec(), Kind::Dir, &stat, Some(fd.as_fd()));
                    match Dir::new(fd) {
                        Ok(dir) => {
                            self.entry(entry)?;
                            return Ok(Some(dir));
                        }
                        Err(e) => self.skip(path, said("list", &[], &e.into()))?,
                    }
                }
                Err(e) => self.skip(path, said("read", &[], &e.into()))?,
            },
        }
        Ok(None)
    }

    /// Of a copy that is gone on with the receiver may answer to each file, from its entry on.
    fn expect(&self) {
        if self.begin.resume {
            let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            view.ask();
        }
    }

    /// Waits for what the receiver has of the file that was told last.
    fn answer(&mut self) -> Result<Have, Fault> {
        self.flush()?;
        match self.next()? {
            Heard::Have(have) => Ok(have),
            _ => Err(Fault::Violation(crate::wire::Violation::NotDue)),
        }
    }

    fn file(&mut self, file: &File, path: Vec<u8>, stat: &Stat) -> Result<(), Fault> {
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        // What says that it is empty may be one of /proc.
        let said_len = (len > 0).then_some(len);
        let entry = self.entry_of(path.clone(), Kind::File(said_len), stat, Some(file.as_fd()));
        self.expect();
        self.entry(entry)?;
        let mut from = 0;
        if self.begin.resume {
            let have = self.answer()?;
            let same = have.offset <= len && have.offset > 0;
            if same && digest(file, have.offset).is_ok_and(|digest| digest == have.digest) {
                from = have.offset;
            }
            self.say(&Message::From(from))?;
        }
        let end = match self.content(file, from, said_len, stat)? {
            Ok(len) => End::Whole(len),
            Err(e) => {
                let (reason, text) = match e {
                    Broken::Changed => (refusal::CHANGED, "it changed while it was read".into()),
                    Broken::Failed(e) => (refusal::FAILED, said("read", &[], &e)),
                };
                self.skipped += 1;
                self.watch.skipped(&path, &text);
                End::Broken(reason, crate::wire::text(text))
            }
        };
        self.say(&Message::End(end))
    }

    /// Sends the bytes of a file. An error inside is the file's.
    fn content(
        &mut self,
        file: &File,
        from: u64,
        len: Option<u64>,
        stat: &Stat,
    ) -> Result<Result<u64, Broken>, Fault> {
        let is_sparse = len.is_some_and(|len| (stat.st_blocks as u64).saturating_mul(512) < len);
        let (mut at, end) = (from, len.unwrap_or(u64::MAX));
        while at < end {
            let mut until = end;
            if is_sparse {
                match seek(file, SeekFrom::Data(at)) {
                    // A hole up to the end.
                    Err(Errno::NXIO) => {
                        at = end;
                        break;
                    }
                    Ok(data) if data < end => {
                        at = at.max(data);
                        let hole = seek(file, SeekFrom::Hole(at));
                        until = hole.map_or(end, |hole| hole.clamp(at + 1, end));
                    }
                    Ok(_) => {
                        at = end;
                        break;
                    }
                    // It has no holes that could be found.
                    Err(_) => {}
                }
            }
            while at < until {
                let most = usize::try_from(until - at).unwrap_or(DATA_MAX);
                let most = most.min(DATA_MAX);
                let n = match file.read_at(&mut self.piece[..most], at) {
                    Ok(n) => n,
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    Err(e) => return Ok(Err(Broken::Failed(e))),
                };
                if n == 0 {
                    return Ok(match len {
                        Some(_) => Err(Broken::Changed),
                        None => Ok(at),
                    });
                }
                say_data(self.to, at, &self.piece[..n])?;
                at += n as u64;
                self.watch.moved(n as u64);
            }
        }
        let is_same = fstat(file).is_ok_and(|now| version(&now) == version(stat));
        Ok(match is_same {
            true => Ok(at),
            false => Err(Broken::Changed),
        })
    }
}

enum Found {
    Dir(OwnedFd),
    File(OwnedFd),
    Link(std::ffi::CString),
    Other(&'static str),
}

enum Broken {
    Changed,
    Failed(io::Error),
}

fn now() -> (i64, u32) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    (now.tv_sec as i64, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// SHA-256 of a file's first bytes.
pub(super) fn digest(file: &File, len: u64) -> io::Result<[u8; 32]> {
    let (mut sha, mut piece, mut at) = (Sha256::new(), vec![0; DATA_MAX], 0);
    while at < len {
        let most = usize::try_from(len - at).unwrap_or(DATA_MAX).min(DATA_MAX);
        match file.read_at(&mut piece[..most], at) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                sha.update(&piece[..n]);
                at += n as u64;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(sha.finalize().into())
}

/// Those of users, as far as they fit.
fn xattrs(fd: BorrowedFd<'_>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let (count, most) = XATTRS_MAX;
    let mut names = vec![0_u8; most];
    let Ok(len) = rustix::fs::flistxattr(fd, &mut names[..]) else {
        return Vec::new();
    };
    let (mut all, mut sum) = (Vec::new(), 0);
    let mut value = vec![0_u8; most];
    for name in names[..len]
        .split(|b| *b == 0)
        .filter(|name| is_users(name))
    {
        let Ok(len) = rustix::fs::fgetxattr(fd, name, &mut value[..]) else {
            continue;
        };
        sum += name.len() + len;
        if sum <= most && all.len() < count {
            all.push((name.to_vec(), value[..len].to_vec()));
        }
    }
    all
}
