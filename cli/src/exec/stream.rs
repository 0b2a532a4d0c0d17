//! The connection of a command: frames out and in, input and output, signals.

use std::io;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use adit_client::Upgraded;
use adit_exec::seal::{Keys, Sealed};
use adit_exec::{
    Asked, Client as Half, ClientError, DATA_MAX, Decoder, Exit, Heard, How, Out, Refused, Row,
    Started, ToClient, ToGuest, What, refusal,
};
use adit_print::PrintError;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::files::{Input, Output};
use super::terminal::{self, Raw};
use super::typed::Typed;
use super::{OWN, WAY};
use crate::client::Client;
use crate::error::Failure;

/// What the connection becomes.
const PROTOCOL: &str = "adit-exec";
/// Bytes that are read at once.
const PIECE: usize = 256 << 10;
/// Whoever presses Ctrl-C so many times within so long wants to be rid of it.
pub(super) const IMPATIENT: (usize, Duration) = (3, Duration::from_secs(2));
/// Whoever leaves waits so long for output that its reader has not taken.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// What goes through a stream beside its output.
pub(super) struct Carries {
    /// Our standard input.
    pub(super) input: bool,
    /// Its terminal is ours.
    pub(super) tty: bool,
    /// Whoever types at it can leave by an escape.
    pub(super) escapes: bool,
    pub(super) signals: Signals,
}

/// What becomes of signals to us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Signals {
    /// They are the command's.
    Forwarded,
    /// We leave, and the command goes on.
    Leave,
    /// We leave, and the command ends with that: it has a ticket, which says of no signal.
    Cut,
}

/// How it ended.
pub(super) enum Ended {
    /// The command has.
    Exit(Exit),
    /// We have, with so much of its outputs: never more than was written, and less where that was not taken in time.
    Left([u64; 2]),
}

/// A stream.
pub(super) struct Stream {
    io: TokioIo<Upgraded>,
    /// It is sealed to the guest's key.
    sealed: Option<Sealed>,
    decoder: Decoder,
    half: Half,
}

/// Opens a stream to a VM's service `exec`.
pub(super) async fn open(
    client: &Client,
    vm: &str,
    user: Option<&str>,
    what: &What,
) -> Result<Stream, Failure> {
    let asked = Asked {
        user: user.map(str::to_owned),
        what: what.clone(),
    };
    if asked.encode().is_none() {
        return Err(Failure::new(
            "usage",
            "the user or the program's name is too long, or empty",
        ));
    }
    let path = format!("{}/exec?{}", crate::vm::path(vm)?, query(user, what));
    let io = client.upgrade(&path, PROTOCOL).await?;
    Ok(Stream {
        io,
        sealed: None,
        decoder: Decoder::default(),
        half: Half::new(),
    })
}

fn query(user: Option<&str>, what: &What) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    if let Some(user) = user {
        query.append_pair("user", user);
    }
    match what {
        What::Run(program) => drop(query.append_pair("run", program)),
        What::Shell => drop(query.append_pair("shell", "true")),
        What::Attach(id) => drop(query.append_pair("attach", id)),
        What::List => {}
        What::End { id, signal } => {
            query.append_pair("end", id);
            if *signal > 0 {
                query.append_pair("signal", &signal.to_string());
            }
        }
        What::Ticket(of) => drop(query.append_pair("ticket", of)),
    }
    query.finish()
}

fn broken(why: impl std::fmt::Display) -> Failure {
    Failure::new(
        "broken-off",
        format!("the connection to the command broke off: {why}"),
    )
    .help("the guest ends the command, unless it was started with --detach: `adit ps` shows it")
    .with_status(WAY)
}

pub(super) fn lies(e: ClientError) -> Failure {
    broken(format!("the guest breaks the protocol: {e}"))
}

/// Why the guest, or aditd, does not do it.
pub(super) fn no(refused: &Refused) -> Failure {
    let (code, status, help) = match refused.reason {
        refusal::DENIED => (
            "denied",
            OWN,
            "the guest's owner says what may be run: `adit-guest policy explain exec …` in the guest",
        ),
        refusal::NO_USER => ("unknown-user", OWN, ""),
        refusal::NO_SESSION => ("unknown-session", OWN, "`adit ps VM` lists them"),
        refusal::BUSY => (
            "busy",
            OWN,
            "`adit ps VM` shows them, `adit kill` ends them",
        ),
        refusal::GONE => (
            "gone",
            OWN,
            "leave --since out: all that is kept comes then",
        ),
        refusal::TAKEN_OVER => ("taken-over", OWN, ""),
        refusal::NO_PROGRAM => ("unknown-program", 127, ""),
        refusal::CANNOT_RUN => ("cannot-run", 126, ""),
        refusal::UNREACHABLE => ("unreached", WAY, "`adit doctor VM` says what is wrong"),
        refusal::TICKET => ("bad-ticket", OWN, ""),
        refusal::TICKET_TIME => ("ticket-time", OWN, ""),
        refusal::TICKET_SPENT => (
            "ticket-spent",
            OWN,
            "sign another: whether this one has run, the guest's log says",
        ),
        refusal::TICKET_INPUT => ("ticket-input", OWN, "the input was changed on the way"),
        refusal::NEEDS_SEAL => (
            "needs-seal",
            OWN,
            "give --seal, with the guest's key as --guest-pk",
        ),
        refusal::NEEDS_TICKET => (
            "needs-ticket",
            OWN,
            "give --sign KEY, with a key that the guest trusts for `exec`",
        ),
        refusal::SEAL => ("other-key", OWN, ""),
        _ => ("refused", OWN, ""),
    };
    Failure::new(code, refused.text.clone())
        .help(help)
        .with_status(status)
}

/// The exit status that a command's end is here; what is to be said of it is said.
pub(super) fn status(exit: &Exit) -> ExitCode {
    if !exit.text.is_empty() {
        adit_print::note(crate::text::escape(&exit.text));
    }
    ExitCode::from(number(exit))
}

/// The exit status that a command's end is here.
pub(super) fn number(exit: &Exit) -> u8 {
    let of_signal = |signal: i32| u8::try_from(128 + signal).unwrap_or(u8::MAX);
    match How::of(exit.how) {
        // As a shell has it: the lowest eight bits.
        Some(How::Code) => exit.value.to_le_bytes()[0],
        Some(How::Signal) => of_signal(exit.value),
        Some(How::TimedOut) => 124,
        Some(How::Ended) => of_signal(9),
        Some(How::Lost) | None => WAY,
    }
}

impl Stream {
    /// Says something.
    pub(super) async fn say(&mut self, message: &ToGuest) -> Result<(), Failure> {
        self.send(&message.encode()).await
    }

    /// What answers the first message of a handshake.
    pub(super) async fn handshake(&mut self) -> Result<Vec<u8>, Failure> {
        let mut piece = vec![0; 4096];
        loop {
            match self.decoder.poll_frame::<ToClient>().map_err(broken)? {
                Some(ToClient::Sealed(message)) => return Ok(message),
                Some(ToClient::Refused(refused)) => return Err(no(&refused)),
                Some(_) => return Err(lies(ClientError::NotDue)),
                None => match self.io.read(&mut piece).await.map_err(broken)? {
                    0 => return Err(broken("it ended")),
                    n => self.decoder.push(&piece[..n]),
                },
            }
        }
    }

    /// From here on all of it is sealed.
    pub(super) fn seal(&mut self, keys: Keys) {
        let mut sealed = Sealed::new(keys);
        // What came behind the handshake is a record.
        sealed.push(self.decoder.rest());
        self.decoder = Decoder::default();
        self.sealed = Some(sealed);
    }

    /// Takes what was read.
    fn push(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let Some(sealed) = &mut self.sealed else {
            self.decoder.push(bytes);
            return Ok(());
        };
        let mut plain = Vec::new();
        sealed.push(bytes);
        let opened = sealed.open(&mut plain);
        self.decoder.push(&plain);
        opened.map_err(broken)
    }

    async fn send(&mut self, frame: &[u8]) -> Result<(), Failure> {
        let mut record = Vec::new();
        let frame = match &mut self.sealed {
            Some(sealed) => {
                sealed.seal(frame, &mut record).map_err(broken)?;
                &record
            }
            None => frame,
        };
        let sent = async {
            self.io.write_all(frame).await?;
            self.io.flush().await
        };
        sent.await.map_err(broken)
    }

    /// The next thing that is heard.
    /// May be dropped while it waits.
    pub(super) async fn hear(&mut self) -> Result<Heard, Failure> {
        let mut piece = vec![0; 4096];
        loop {
            let next = self.decoder.poll_frame().map_err(broken)?;
            if let Some(message) = next {
                return self.half.handle(message).map_err(lies);
            }
            match self.io.read(&mut piece).await.map_err(broken)? {
                0 => return Err(broken("it ended")),
                n => self.push(&piece[..n])?,
            }
        }
    }

    /// Waits until the command runs.
    pub(super) async fn started(&mut self) -> Result<Started, Failure> {
        match self.hear().await? {
            Heard::Started(started) => Ok(started),
            Heard::Refused(refused) => Err(no(&refused)),
            _ => Err(lies(ClientError::NotDue)),
        }
    }

    /// Waits for the list.
    pub(super) async fn rows(&mut self) -> Result<Vec<Row>, Failure> {
        match self.hear().await? {
            Heard::Rows(rows) => Ok(rows),
            Heard::Refused(refused) => Err(no(&refused)),
            _ => Err(lies(ClientError::NotDue)),
        }
    }

    /// Waits until it is done.
    pub(super) async fn done(&mut self) -> Result<(), Failure> {
        match self.hear().await? {
            Heard::Done => Ok(()),
            Heard::Refused(refused) => Err(no(&refused)),
            _ => Err(lies(ClientError::NotDue)),
        }
    }

    /// Carries input and output until the command has ended, or we leave it. Has it been `started` already, `tty` is what it has.
    pub(super) async fn carry(&mut self, carries: Carries) -> Result<Ended, Failure> {
        let local = |e| Failure::io("cannot use standard input and output", &e);
        let raw = match carries.tty {
            true => Some(Raw::take().map_err(local)?),
            false => None,
        };
        let mut carrying = Carrying {
            raw,
            output: Output::start(carries.tty),
            input: match carries.input {
                true => Some(Input::start().map_err(local)?),
                false => None,
            },
            caught: Caught::new().map_err(local)?,
            writing: false,
            written: [0; 2],
            pressed: Vec::new(),
            signals: carries.signals,
            typed: carries.escapes.then(Typed::default),
        };
        carrying.run(self).await
    }
}

/// The signals that are caught.
pub(super) struct Caught {
    interrupt: Signal,
    terminate: Signal,
    quit: Signal,
    hang_up: Signal,
    /// None: whoever presses Ctrl-Z stops us, and nothing else.
    stop: Option<Signal>,
    window: Signal,
}

impl Caught {
    fn new() -> io::Result<Self> {
        Ok(Self {
            stop: Some(signal(SignalKind::from_raw(TSTP))?),
            ..Self::of_many()?
        })
    }

    /// Those for many commands at once.
    pub(super) fn of_many() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            quit: signal(SignalKind::quit())?,
            hang_up: signal(SignalKind::hangup())?,
            stop: None,
            window: signal(SignalKind::window_change())?,
        })
    }

    /// The number of the next one. May be dropped while it waits.
    pub(super) async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => INT,
            _ = self.terminate.recv() => TERM,
            _ = self.quit.recv() => QUIT,
            _ = self.hang_up.recv() => HUP,
            () = stopped(&mut self.stop) => TSTP as u8,
            _ = self.window.recv() => WINCH,
        }
    }
}

async fn stopped(stop: &mut Option<Signal>) {
    match stop {
        Some(stop) => drop(stop.recv().await),
        None => std::future::pending().await,
    }
}

const HUP: u8 = 1;
pub(super) const INT: u8 = 2;
const QUIT: u8 = 3;
const TERM: u8 = 15;
const CONT: u8 = 18;
const TSTP: i32 = 20;
pub(super) const WINCH: u8 = 28;

/// A command whose streams are ours.
struct Carrying {
    raw: Option<Raw>,
    output: Output,
    input: Option<Input>,
    caught: Caught,
    /// The output has pieces that are not written yet.
    writing: bool,
    /// Of each output, what came before those pieces.
    written: [u64; 2],
    /// When Ctrl-C was pressed.
    pressed: Vec<Instant>,
    signals: Signals,
    /// What was typed, where an escape means something.
    typed: Option<Typed>,
}

impl Carrying {
    async fn run(&mut self, stream: &mut Stream) -> Result<Ended, Failure> {
        let mut piece = vec![0; PIECE];
        // What came with what was read before.
        let mut exit = self.take(stream, None)?;
        loop {
            if !self.writing {
                if let Some(ack) = stream.half.poll_ack() {
                    stream.send(&ack).await?;
                }
                if let Some(exit) = exit.take() {
                    return Ok(Ended::Exit(exit));
                }
            }
            let room = stream.half.stdin_room().min(DATA_MAX);
            let wants_input = room > 0 && self.input.is_some();
            tokio::select! {
                number = self.caught.next() => {
                    if self.signal(stream, number).await? {
                        return Ok(Ended::Left(self.leave(stream).await));
                    }
                }
                wrote = self.output.written(), if self.writing => {
                    self.writing = false;
                    wrote.map_err(|e| Failure::from(PrintError::from(e)))?;
                }
                read = stream.io.read(&mut piece), if !self.writing && exit.is_none() => {
                    match read.map_err(broken)? {
                        0 => return Err(broken("it ended without the command's end")),
                        n => stream.push(&piece[..n])?,
                    }
                    exit = self.take(stream, exit)?;
                }
                next = input(&mut self.input, room), if wants_input => {
                    let bytes = next.map_err(|e| Failure::io("cannot read standard input", &e))?;
                    let was_empty = bytes.is_empty();
                    let (bytes, leaves) = match &mut self.typed {
                        Some(typed) => typed.take(&bytes),
                        None => (bytes, false),
                    };
                    if leaves {
                        return Ok(Ended::Left(self.leave(stream).await));
                    }
                    if bytes.is_empty() && !was_empty {
                        // A tilde, of which the next byte says what it means.
                        continue;
                    }
                    let frame = match bytes.is_empty() {
                        true => {
                            self.input = None;
                            stream.half.stdin_end()
                        }
                        false => stream.half.stdin(&bytes),
                    };
                    // Never is more on its way than the guest has room for, so this ends.
                    stream.send(&frame).await?;
                }
            }
        }
    }

    /// How much of the outputs was written, when we leave. What is still being written counts only if it is taken at once: whoever
    /// asks for the rest may get some of it twice, and misses nothing.
    async fn leave(&mut self, stream: &Stream) -> [u64; 2] {
        let all = stream.half.had();
        if !self.writing {
            return all;
        }
        tokio::select! {
            wrote = self.output.written() => match wrote {
                Ok(()) => all,
                Err(_) => self.written,
            },
            _ = self.caught.next() => self.written,
            () = tokio::time::sleep(LEAVE_LIMIT) => self.written,
        }
    }

    /// Takes all whole frames; output goes to its thread.
    fn take(
        &mut self,
        stream: &mut Stream,
        mut exit: Option<Exit>,
    ) -> Result<Option<Exit>, Failure> {
        let mut pieces: Vec<(Out, Vec<u8>)> = Vec::new();
        while let Some(message) = stream.decoder.poll_frame().map_err(broken)? {
            if pieces.is_empty() {
                self.written = stream.half.had();
            }
            match stream.half.handle(message).map_err(lies)? {
                Heard::Output(out, bytes) => match pieces.last_mut() {
                    Some((last, all)) if *last == out => all.extend(bytes),
                    _ => pieces.push((out, bytes)),
                },
                Heard::Exit(ended) => exit = Some(ended),
                Heard::Refused(refused) => return Err(no(&refused)),
                Heard::Started(_) | Heard::Nothing => {}
                Heard::Rows(_) | Heard::Done => return Err(lies(ClientError::NotDue)),
            }
        }
        if !pieces.is_empty() {
            self.output.give(pieces);
            self.writing = true;
        }
        Ok(exit)
    }

    /// Does with a signal what is to be done with it; true: we leave.
    async fn signal(&mut self, stream: &mut Stream, number: u8) -> Result<bool, Failure> {
        if number == WINCH {
            if let Some(size) = terminal::size().filter(|_| self.raw.is_some()) {
                stream.say(&ToGuest::Resize(size)).await?;
            }
            return Ok(false);
        }
        if i32::from(number) == TSTP {
            return self.stop(stream).await.map(|()| false);
        }
        if self.signals == Signals::Leave {
            return Ok(true);
        }
        if number == INT {
            let (many, within) = IMPATIENT;
            self.pressed.retain(|at| at.elapsed() < within);
            self.pressed.push(Instant::now());
            if self.pressed.len() >= many {
                return Err(Failure::interrupted(
                    "Ctrl-C: the command is left, and ends with that",
                ));
            }
        }
        if self.signals == Signals::Cut {
            return Err(Failure::interrupted(
                "the command is left, and ends with that: where only a ticket counts, signals need --seal",
            ));
        }
        stream.say(&ToGuest::Signal(number)).await?;
        Ok(false)
    }

    /// Stops, and the command with us; goes on when we do.
    async fn stop(&mut self, stream: &mut Stream) -> Result<(), Failure> {
        match &self.raw {
            Some(raw) => raw.restore(),
            None if self.signals == Signals::Forwarded => {
                stream.say(&ToGuest::Signal(TSTP as u8)).await?;
            }
            None => {}
        }
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        match &self.raw {
            Some(raw) => {
                let _ = raw.again();
                if let Some(size) = terminal::size() {
                    stream.say(&ToGuest::Resize(size)).await?;
                }
            }
            None if self.signals == Signals::Forwarded => {
                stream.say(&ToGuest::Signal(CONT)).await?;
            }
            None => {}
        }
        Ok(())
    }
}

async fn input(input: &mut Option<Input>, room: usize) -> io::Result<Vec<u8>> {
    match input {
        Some(input) => input.next(room).await,
        None => std::future::pending().await,
    }
}
