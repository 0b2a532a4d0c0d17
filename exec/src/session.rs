//! A session in the guest, without its processes and sockets.
//!
//! ```text
//!              ┌──────────── attach ───────────┐
//!              ▼                               │
//!  Open ─► attached ── client_gone ─► kept? ─ yes ─► alone
//!              │                        └── no: whoever calls ends the command with all that it has started
//!              └─ exit, and all of both outputs is sent ─► Exit is sent ─► over; kept: once it has arrived
//! ```
//!
//! | family | calls |
//! |---|---|
//! | getters | [`room`](Session::room), [`stdin`](Session::stdin), [`written`](Session::written), [`is_attached`](Session::is_attached), [`is_over`](Session::is_over) |
//! | what happens | [`handle`](Session::handle) a client's message; [`output`](Session::output), [`output_ended`](Session::output_ended), [`exited`](Session::exited); [`stdin_wrote`](Session::stdin_wrote), [`stdin_broke`](Session::stdin_broke); [`attach`](Session::attach), [`client_gone`](Session::client_gone) |
//! | to do | [`poll_send`](Session::poll_send), until none, after any of these |

use crate::spool::Spool;
use crate::stdin::Stdin;
use crate::wire::{Attach, DATA_MAX, Exit, Out, Size, Started, ToClient, ToGuest, data, kind_of};

/// The highest signal that a client may send.
const SIGNAL_MAX: u8 = 31;
/// Kind of the frames of a client's own messages that a session does not take.
const NOT_NOW: &str = "it came once already, or is not for this session";

const BOUND: &str = "its ticket says all that it gets, and this it does not say; what comes later needs a sealed stream";

/// What a client's message asks of the session's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// This signal.
    Signal(u8),
    /// The terminal has this size.
    Resize(Size),
}

/// What is to become of the command's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// Nothing now.
    Nothing,
    /// Some of this is to be written.
    Write(&'a [u8]),
    /// It has ended.
    Close,
}

/// A client has broken the protocol; it is to be cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(&'static str);

/// What is asked for is not here any more, or not yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {from} to {to} are kept, and {asked} is asked for")]
pub struct Gone {
    /// The first that is kept.
    pub from: u64,
    /// The end.
    pub to: u64,
    /// What is asked for.
    pub asked: u64,
}

/// The session.
#[derive(Debug)]
pub struct Session {
    id: String,
    kept: bool,
    tty: bool,
    /// The command takes input.
    input: bool,
    stdin: Stdin,
    outs: [Spool; 2],
    ended: [bool; 2],
    exit: Option<Exit>,
    attached: bool,
    /// The client has not heard that it is attached.
    owes_started: bool,
    exit_sent: bool,
    /// A client has said that it has the end, and all before it.
    exit_heard: bool,
    /// Which output is next.
    turn: usize,
    /// A ticket has said all that the client may say.
    bound: bool,
}

fn nth(out: Out) -> usize {
    match out {
        Out::Stdout => 0,
        Out::Stderr => 1,
    }
}

impl Session {
    /// One with its first client. A terminal has no error output of its own.
    pub fn new(id: String, kept: bool, tty: bool, input: bool) -> Self {
        Self {
            id,
            kept,
            tty,
            input,
            stdin: Stdin::default(),
            outs: Default::default(),
            ended: [false, tty],
            exit: None,
            attached: true,
            owes_started: true,
            exit_sent: false,
            exit_heard: false,
            turn: 0,
            bound: false,
        }
    }

    /// Takes nothing from its client any more but what that has had: whoever carries the stream could have said it.
    pub fn bind(&mut self, bound: bool) {
        self.bound = bound;
    }

    /// How many bytes of an output it takes now; 0 also where it has ended.
    pub fn room(&self, out: Out) -> usize {
        match self.ended[nth(out)] {
            true => 0,
            false => self.outs[nth(out)].room(),
        }
    }

    /// Whether an output may still bring something.
    pub fn is_open(&self, out: Out) -> bool {
        !self.ended[nth(out)]
    }

    /// How many bytes each output has brought.
    pub fn written(&self) -> [u64; 2] {
        [self.outs[0].end(), self.outs[1].end()]
    }

    /// Whether it has a client.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Whether it goes on without one.
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// How it has ended.
    pub fn exit(&self) -> Option<&Exit> {
        self.exit.as_ref()
    }

    /// Whether a client has all of it, and how it ended.
    pub fn is_over(&self) -> bool {
        self.exit_sent && (!self.kept || self.exit_heard)
    }

    /// What is to become of the command's input.
    pub fn stdin(&self) -> Next<'_> {
        match self.stdin.unwritten() {
            [] if self.stdin.is_done() => Next::Close,
            [] => Next::Nothing,
            bytes => Next::Write(bytes),
        }
    }

    /// So much of it was written.
    pub fn stdin_wrote(&mut self, n: usize) {
        self.stdin.wrote(n);
    }

    /// The command reads no more.
    pub fn stdin_broke(&mut self) {
        self.stdin.close();
    }

    /// The command has written this. Returns how much of it is taken: all, if it is no more than there is room for.
    #[must_use]
    pub fn output(&mut self, out: Out, bytes: &[u8]) -> usize {
        match self.ended[nth(out)] {
            true => 0,
            false => self.outs[nth(out)].push(bytes),
        }
    }

    /// It will write no more there.
    pub fn output_ended(&mut self, out: Out) {
        self.ended[nth(out)] = true;
    }

    /// The command has ended. What it has written may still come.
    pub fn exited(&mut self, exit: Exit) {
        self.exit.get_or_insert(exit);
    }

    /// Takes a client's message.
    ///
    /// # Errors
    /// The client is to be cut off. Nothing has changed.
    pub fn handle(&mut self, message: &ToGuest) -> Result<Option<Effect>, Violation> {
        let then = |fits: bool, what| fits.then_some(None).ok_or(Violation(what));
        match message {
            ToGuest::Open(_) | ToGuest::Attach(_) | ToGuest::Ticket(_) | ToGuest::Seal(_) => {
                Err(Violation(NOT_NOW))
            }
            ToGuest::Stdin { .. }
            | ToGuest::StdinEnd { .. }
            | ToGuest::Signal(_)
            | ToGuest::Resize(_)
                if self.bound =>
            {
                Err(Violation(BOUND))
            }
            ToGuest::Stdin { offset, bytes } => then(
                self.input && self.stdin.receive(*offset, bytes),
                "its input is not the next, or more than is taken",
            ),
            ToGuest::StdinEnd { offset } => then(
                self.input && self.stdin.end(*offset),
                "its input does not end there",
            ),
            ToGuest::Signal(number) => match number {
                1..=SIGNAL_MAX => Ok(Some(Effect::Signal(*number))),
                _ => Err(Violation("there is no such signal")),
            },
            ToGuest::Resize(size) => match self.tty {
                true => Ok(Some(Effect::Resize(*size))),
                false => Err(Violation(NOT_NOW)),
            },
            ToGuest::Ack { stdout, stderr } => {
                let fits = *stdout <= self.outs[0].sent() && *stderr <= self.outs[1].sent();
                let fits = fits && self.kept;
                if fits {
                    let _ = self.outs[0].ack(*stdout) && self.outs[1].ack(*stderr);
                    self.exit_heard |= self.exit_sent && self.written() == [*stdout, *stderr];
                }
                then(fits, "it says to have what it was not sent")
            }
        }
    }

    /// Another client comes, in place of the one before.
    ///
    /// # Errors
    /// What it asks for is not here. The one before stays.
    pub fn attach(&mut self, attach: &Attach) -> Result<Option<Effect>, Gone> {
        let asked = [attach.stdout, attach.stderr];
        let at = |nth: usize| asked[nth].unwrap_or(self.outs[nth].base());
        let from = [at(0), at(1)];
        for (spool, asked) in self.outs.iter().zip(from) {
            let (from, to) = (spool.base(), spool.end());
            if !(from..=to).contains(&asked) {
                return Err(Gone { from, to, asked });
            }
        }
        for ((spool, from), asked) in self.outs.iter_mut().zip(from).zip(asked) {
            if let Some(had) = asked {
                // It will not say so again, and a command that writes more waits for whoever has read.
                spool.has(had);
            }
            let _ = spool.rewind(from);
        }
        self.stdin.anew();
        (self.attached, self.owes_started, self.exit_sent) = (true, true, false);
        Ok(attach.size.filter(|_| self.tty).map(Effect::Resize))
    }

    /// The client is gone. Returns whether the command goes on without it.
    pub fn client_gone(&mut self) -> bool {
        self.attached = false;
        for spool in &mut self.outs {
            // What was sent and is not known to have arrived is sent again.
            let acked = spool.acked().max(spool.base());
            let _ = spool.rewind(acked);
        }
        self.kept
    }

    /// The next frame for the client; none: nothing is to be said now.
    #[must_use]
    pub fn poll_send(&mut self) -> Option<Vec<u8>> {
        if !self.attached || self.exit_sent {
            return None;
        }
        if std::mem::take(&mut self.owes_started) {
            let started = Started {
                id: self.id.clone(),
                kept: self.kept,
                input: self.input && self.stdin.is_open(),
                tty: self.tty,
                stdin: self.stdin.received(),
                taken: self.stdin.told(),
                stdout: self.outs[0].sent(),
                stderr: self.outs[1].sent(),
            };
            return Some(ToClient::Started(started).encode());
        }
        if let Some(stdin) = self.stdin.poll_taken() {
            return Some(ToClient::Taken { stdin }.encode());
        }
        if self.stdin.poll_closed() {
            return Some(ToClient::StdinClosed.encode());
        }
        for _ in 0..2 {
            self.turn ^= 1;
            let spool = &mut self.outs[self.turn];
            let (offset, bytes) = spool.unsent();
            let bytes = &bytes[..bytes.len().min(DATA_MAX)];
            if !bytes.is_empty() {
                let n = bytes.len();
                let out = [Out::Stdout, Out::Stderr][self.turn];
                let frame = data(kind_of(out), offset, bytes);
                spool.has_sent(n);
                if !self.kept {
                    spool.forget_sent();
                }
                return Some(frame);
            }
        }
        let exit = self.exit.as_ref().filter(|_| self.ended == [true; 2])?;
        let [stdout, stderr] = self.written();
        let exit = Exit {
            stdout,
            stderr,
            ..exit.clone()
        };
        self.exit_sent = true;
        Some(ToClient::Exit(exit).encode())
    }
}
