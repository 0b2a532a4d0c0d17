//! Receives a file or a tree, and writes it. Nothing is written out of the target, whatever the sender says; no link is followed, nothing
//! that is there is opened but directories, and a file has its name when it is whole.
//!
//! A file is written as `.NAME.adit-part` beside its place, and renamed at its end. When the stream breaks off, that stays, so that the copy
//! can be gone on with; at any other end it is removed.

use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::beneath::{DIR, Root, Spot};
use super::link::{Fault, Stream, Watch, said};
use super::writer::{Current, Offered, Top, Tree};
use crate::incoming::{Incoming, Told};
use crate::wire::{
    Begin, Data, End, Entry, Have, Kind, LINK_MAX, Message, Place, Refused, Skipped, Totals,
    refusal, text,
};

/// A piece of a hole, where it must be written.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Where it goes.
pub enum Sink {
    /// Below a directory.
    Target(Target),
    /// Into it: one file.
    Pipe(Box<dyn Write + Send>),
}

/// A place for a file or a tree.
#[derive(Debug)]
pub struct Target(Top, Place);

impl Target {
    /// Finds it: what is a directory gets the tree in it, under the name that it comes with; else it is what the tree will be.
    ///
    /// # Errors
    /// There is no directory where one must be, or a link leads elsewhere.
    pub fn find(root: &Root, path: &[u8], begin: &Begin) -> Result<Self, Fault> {
        let failed = |e: io::Error| Fault::local("write to", path, e);
        let e = match root.open(path, DIR) {
            Ok(_) if begin.place == Place::Itself => Errno::ISDIR.into(),
            Ok(dir) if begin.name.is_empty() => return Ok(Self(Top::Dir(dir), Place::Within)),
            Ok(dir) => {
                let name = begin.name.clone();
                return Ok(Self(Top::Spot(Spot { dir, name }), Place::Within));
            }
            Err(e) => e,
        };
        let errno = Errno::from_io_error(&e);
        let is_no_dir = matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::ISDIR));
        let spot = match is_no_dir && begin.place != Place::Within {
            true => root.spot(path).map_err(failed)?,
            false => None,
        };
        let spot = spot.ok_or_else(|| failed(e))?;
        Ok(Self(Top::Spot(spot), Place::Itself))
    }

    /// What it is: so it must be again when the copy is gone on with.
    pub fn place(&self) -> Place {
        self.1
    }
}

/// Receives it all, and says what became of it. `tells`: the other side is to hear what is not written, and why nothing is.
///
/// # Errors
/// It was not done, whole or in part.
pub fn receive(
    stream: &mut Stream,
    sink: Sink,
    begin: &Begin,
    watch: &dyn Watch,
    tells: bool,
) -> Result<Totals, Fault> {
    let mut receiving = Receiving {
        stream,
        begin,
        watch,
        tells,
        is_resumed: begin.resume && matches!(sink, Sink::Target(_)),
        writer: match sink {
            Sink::Target(target) => Writer::Tree(Box::new(Tree::new(target.0))),
            Sink::Pipe(pipe) => Writer::Pipe(pipe, 0),
        },
        totals: Totals::default(),
        current: None,
    };
    let done = receiving.run();
    if !matches!(done, Ok(_) | Err(Fault::Cut(_))) {
        receiving.give_up();
    }
    done
}

enum Writer {
    Tree(Box<Tree>),
    Pipe(Box<dyn Write + Send>, u64),
}

struct Receiving<'a> {
    stream: &'a mut Stream,
    begin: &'a Begin,
    watch: &'a dyn Watch,
    tells: bool,
    is_resumed: bool,
    writer: Writer,
    totals: Totals,
    /// The file that comes now; none: it is not written.
    current: Option<Current>,
}

impl Receiving<'_> {
    fn run(&mut self) -> Result<Totals, Fault> {
        let mut incoming = Incoming::new(self.begin.resume);
        while !incoming.is_over() {
            let message = match self.stream.hear()? {
                Message::Refused(refused) => return Err(Fault::Refused(refused)),
                message => message,
            };
            match incoming.handle(message).map_err(Fault::Violation)? {
                Told::Entry(entry) => self.entry(entry)?,
                Told::From(from) => self.from(from)?,
                Told::Data(data) => self.data(&data)?,
                Told::End(end) => self.end(end)?,
                Told::Skipped(Skipped { path, text }) => {
                    self.totals.skipped += 1;
                    if !self.tells {
                        self.watch.skipped(&path, &text);
                    }
                }
                Told::All => {}
            }
            if incoming.owes_answer() {
                let have = self.have();
                incoming.answered(have.offset);
                self.stream.say(&Message::Have(have))?;
                self.stream.flush()?;
            }
        }
        self.all()?;
        self.stream.say(&Message::Totals(self.totals))?;
        self.stream.flush()?;
        Ok(self.totals)
    }

    /// One thing cannot be written. If nothing can, that is the end.
    fn failed(&mut self, what: &str, path: &[u8], e: io::Error) -> Result<(), Fault> {
        // Of the top alone nothing is left.
        if Fault::is_final(&e) || path.is_empty() {
            return Err(Fault::local(what, path, e));
        }
        self.skip(path, said(what, &[], &e))
    }

    fn skip(&mut self, path: &[u8], why: String) -> Result<(), Fault> {
        self.totals.skipped += 1;
        self.watch.skipped(path, &why);
        if self.tells {
            let path = path[..path.len().min(LINK_MAX)].to_vec();
            let text = text(why);
            self.stream.say(&Message::Skipped(Skipped { path, text }))?;
            self.stream.flush()?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry) -> Result<(), Fault> {
        self.watch.entry(&entry.path);
        let tree = match &mut self.writer {
            Writer::Tree(tree) => tree,
            Writer::Pipe(..) => {
                if !matches!(entry.kind, Kind::File(_)) {
                    let text = "it is a directory: `-` takes one file";
                    return Err(Fault::Local(Refused::new(refusal::KIND, text)));
                }
                self.current = Some(Current::new(entry, None));
                return Ok(());
            }
        };
        let left = tree.leave(&entry.path);
        let path = entry.path.clone();
        let done = match &entry.kind {
            Kind::Dir => tree.make(&entry, self.begin.resume).map(|()| true),
            Kind::Link(to) => tree.link(&entry, to, self.begin).map(|()| true),
            Kind::File(_) => {
                // What there is of one that is gone on with is looked at when it is asked for.
                let part = match self.is_resumed {
                    true => tree.parent(&path).map(|_| None),
                    false => tree.begin(&path).map(Some),
                };
                part.map(|part| {
                    self.current = Some(Current::new(entry, part));
                    false
                })
            }
        };
        for (path, e) in left {
            self.failed("set rights and times of", &path, e)?;
        }
        match done {
            Ok(is_there) => {
                self.totals.entries += u64::from(is_there);
                Ok(())
            }
            Err(e) => {
                self.current = None;
                self.failed("write", &path, e)
            }
        }
    }

    /// What there is of the file that comes now.
    fn have(&mut self) -> Have {
        let (Writer::Tree(tree), Some(current)) = (&mut self.writer, &mut self.current) else {
            return Have::default();
        };
        let Some((have, offered)) = tree.have(&current.entry) else {
            return Have::default();
        };
        current.offered = Some(offered);
        have
    }

    fn from(&mut self, from: u64) -> Result<(), Fault> {
        let Some(mut current) = self.current.take() else {
            return Ok(());
        };
        current.at = from;
        // What is of no use is let go of: a new part takes its place.
        match (
            current.offered.take().filter(|_| from > 0),
            &mut self.writer,
        ) {
            (Some(Offered::Part(part)), _) => current.part = Some(part),
            (Some(Offered::Whole), _) | (None, Writer::Pipe(..)) => {}
            (None, Writer::Tree(tree)) => match tree.begin(&current.entry.path) {
                Ok(part) => current.part = Some(part),
                Err(e) => return self.failed("write", &current.entry.path, e),
            },
        }
        if from > 0 {
            self.watch.moved(from);
        }
        self.current = Some(current);
        Ok(())
    }

    fn data(&mut self, data: &Data) -> Result<(), Fault> {
        let bytes = data.bytes();
        self.totals.bytes += bytes.len() as u64;
        self.watch.moved(bytes.len() as u64);
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        let done = match (&mut self.writer, &current.part) {
            (Writer::Pipe(pipe, at), _) => {
                let gap = data.offset - *at;
                *at = data.offset + bytes.len() as u64;
                let out = zeros(pipe, gap).and_then(|()| pipe.write_all(bytes));
                // Who reads it must not wait for what comes later.
                let out = out.and_then(|()| pipe.flush());
                return out.map_err(|e| Fault::local("write to standard output", b"", e));
            }
            (Writer::Tree(_), Some(part)) => part.file.write_all_at(bytes, data.offset),
            // It was said to be whole, and here is more of it.
            (Writer::Tree(_), None) => Err(io::Error::other("more came than there is of it")),
        };
        match done {
            Ok(()) => {
                current.at = data.offset + bytes.len() as u64;
                Ok(())
            }
            Err(e) => {
                let path = current.entry.path.clone();
                self.give_up();
                self.failed("write", &path, e)
            }
        }
    }

    fn end(&mut self, end: End) -> Result<(), Fault> {
        let Some(mut current) = self.current.take() else {
            return Ok(());
        };
        let path = current.entry.path.clone();
        let len = match end {
            End::Whole(len) => len,
            End::Broken(reason, why) => {
                self.current = Some(current);
                self.give_up();
                if path.is_empty() {
                    return Err(Fault::Local(Refused::new(reason, why)));
                }
                self.totals.skipped += 1;
                if !self.tells {
                    self.watch.skipped(&path, &why);
                }
                return Ok(());
            }
        };
        match &mut self.writer {
            Writer::Pipe(pipe, at) => {
                let out = zeros(pipe, len.saturating_sub(*at)).and_then(|()| pipe.flush());
                out.map_err(|e| Fault::local("write to standard output", b"", e))?;
            }
            Writer::Tree(tree) => {
                let Some(part) = current.part.take() else {
                    // It was whole.
                    self.totals.entries += 1;
                    return Ok(());
                };
                let done = tree.finish(&current, &part, len, self.begin);
                match done {
                    Ok(None) => {}
                    Ok(Some(lost)) => self.skip(&path, lost)?,
                    Err(e) => {
                        tree.discard(&path, &part.name);
                        return self.failed("write", &path, e);
                    }
                }
            }
        }
        self.totals.entries += 1;
        Ok(())
    }

    fn all(&mut self) -> Result<(), Fault> {
        if let Writer::Tree(tree) = &mut self.writer {
            for (path, e) in tree.leave_all() {
                let text = said("set rights and times of", &[], &e);
                self.skip(&path, text)?;
            }
        }
        let Writer::Tree(tree) = &self.writer else {
            return Ok(());
        };
        match self.begin.sync {
            true => tree
                .sync()
                .map_err(|e| Fault::local("write to the disk", b"", e)),
            false => Ok(()),
        }
    }

    /// Nothing half is left.
    fn give_up(&mut self) {
        let Some(current) = self.current.take() else {
            return;
        };
        let offered = match current.offered {
            Some(Offered::Part(part)) => Some(part),
            _ => None,
        };
        if let (Writer::Tree(tree), Some(part)) = (&mut self.writer, current.part.or(offered)) {
            tree.discard(&current.entry.path, &part.name);
        }
    }
}

fn zeros(to: &mut impl Write, mut count: u64) -> io::Result<()> {
    while count > 0 {
        let n = count.min(ZEROS.len() as u64);
        to.write_all(&ZEROS[..n as usize])?;
        count -= n;
    }
    Ok(())
}
