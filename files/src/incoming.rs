//! What a receiver takes of a sender. Whatever a hostile one says is one of these, in this order, or the end.
//!
//! ```text
//!            Entry of a file, new        Data*                End
//! Between ─────────────────────────► InFile ──────────────────────► Between ── All ──► Over
//!    │ Entry of a file, gone on with                ▲ From
//!    └──────────────► Answer ── answered() ──► Due ─┘
//! ```

use crate::wire::{Data, End, Entry, Kind, LEN_MAX, Message, Skipped, Violation};

/// What was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// Something in the tree. A file's bytes follow; of one that is gone on with, once the receiver has said what it has of it.
    Entry(Entry),
    /// The file goes on from here: 0, or what the receiver has said.
    From(u64),
    /// Bytes of the file, behind those that came before.
    Data(Data),
    /// The file's end.
    End(End),
    /// Something is not copied.
    Skipped(Skipped),
    /// That was all.
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    /// We owe what we have of a file.
    Answer {
        len: Option<u64>,
    },
    /// Where it goes on is to come.
    Due {
        len: Option<u64>,
        have: u64,
    },
    InFile {
        len: Option<u64>,
        at: u64,
    },
    Over,
}

/// A receiver's view of its sender.
#[derive(Debug)]
pub struct Incoming {
    state: State,
    resume: bool,
    entries: u64,
    /// The top is a directory.
    is_tree: bool,
}

impl Incoming {
    /// Nothing has come yet; `resume`: files are gone on with.
    pub fn new(resume: bool) -> Self {
        Self {
            state: State::Between,
            resume,
            entries: 0,
            is_tree: false,
        }
    }

    /// Whether that was all.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Takes what the sender says.
    ///
    /// # Errors
    /// It breaks the rules. Nothing that it says is to be believed any more.
    pub fn handle(&mut self, message: Message) -> Result<Told, Violation> {
        match (self.state, message) {
            (State::Between, Message::Entry(entry)) => {
                let is_top = self.entries == 0;
                if is_top != entry.path.is_empty() || !is_top && !self.is_tree {
                    return Err(Violation::NotDue);
                }
                self.entries += 1;
                if is_top {
                    self.is_tree = entry.kind == Kind::Dir;
                }
                if let Kind::File(len) = entry.kind {
                    self.state = match self.resume {
                        true => State::Answer { len },
                        false => State::InFile { len, at: 0 },
                    };
                }
                Ok(Told::Entry(entry))
            }
            (State::Due { len, have }, Message::From(from)) => {
                if from != 0 && from != have {
                    return Err(Violation::NotDue);
                }
                self.state = State::InFile { len, at: from };
                Ok(Told::From(from))
            }
            (State::InFile { len, at }, Message::Data(data)) => {
                let offset = data.offset;
                if offset < at {
                    return Err(Violation::Backwards { at, offset });
                }
                let end = offset.checked_add(data.bytes().len() as u64);
                let most = len.unwrap_or(LEN_MAX);
                let end = end.filter(|end| *end <= most).ok_or(Violation::Length {
                    said: most,
                    is: offset,
                })?;
                self.state = State::InFile { len, at: end };
                Ok(Told::Data(data))
            }
            (State::InFile { len, at }, Message::End(end)) => {
                if let End::Whole(is) = end {
                    let said = len.unwrap_or(is);
                    if is < at || is != said {
                        return Err(Violation::Length { said, is });
                    }
                }
                self.state = State::Between;
                Ok(Told::End(end))
            }
            (State::Between, Message::Skipped(skipped)) => Ok(Told::Skipped(skipped)),
            (State::Between, Message::All(said)) => {
                let were = self.entries;
                if said != were {
                    return Err(Violation::Count { said, were });
                }
                self.state = State::Over;
                Ok(Told::All)
            }
            _ => Err(Violation::NotDue),
        }
    }

    /// Whether what we have of a file is to be said.
    pub fn owes_answer(&self) -> bool {
        matches!(self.state, State::Answer { .. })
    }

    /// We have said how much of the file we have.
    pub fn answered(&mut self, have: u64) {
        if let State::Answer { len } = self.state {
            self.state = State::Due { len, have };
        }
    }
}
