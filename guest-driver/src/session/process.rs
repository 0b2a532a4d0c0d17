//! A session process: one loop that moves bytes, and sleeps where nothing can be moved.
//!
//! | ends | when |
//! |---|---|
//! | the command, with HUP and then all of it by KILL | its client goes, and it is not to go on without one |
//! | the command, with TERM and then all of it by KILL | its time is over; somebody asks for that; this process gets TERM |
//! | what the command has left in its own session | it has ended by itself |
//! | this process | a client has the end; or nobody can have it any more |

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use adit_exec::seal::Keys;
use adit_exec::{Effect, Exit, How, Next, Out, Refused, Row, Session, ToGuest, refusal};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::ask::{self, Answer, Asks, Question};
use super::child::{self, Child, Status};
use super::link::Link;
use super::place::Place;
use super::{SPEC_MAX, Spec, refused};
use crate::{clock, log};

/// Between the first signal and KILL.
const GRACE: Duration = Duration::from_secs(1);
/// How long a client that has all of it may take to go.
const LINGER: Duration = Duration::from_secs(5);
/// How long a session that has ended waits for somebody to hear of it.
const KEPT: Duration = Duration::from_secs(3600);
/// The same, where whoever ended it knows.
const KEPT_ENDED: Duration = Duration::from_secs(60);
/// Most bytes that are read of what others still write after the command has ended.
const DRAIN_MAX: usize = 1 << 20;
/// Bytes that are read at once.
const PIECE: usize = 64 << 10;
const OUTS: [Out; 2] = [Out::Stdout, Out::Stderr];

/// The command is being ended.
#[derive(Clone, Copy, Debug)]
struct Ending {
    how: How,
    kill_at: Instant,
    killed: bool,
}

struct Process {
    spec: Spec,
    at: PathBuf,
    started_ms: i64,
    session: Session,
    link: Option<Link>,
    child: Child,
    listener: OwnedFd,
    signals: SignalFd,
    /// When its time is over.
    deadline: Option<Instant>,
    ending: Option<Ending>,
    /// When this process ends, whoever has heard what.
    leave_at: Option<Instant>,
    /// When it does not wait any longer for a client that has all of it.
    linger_at: Option<Instant>,
    drained: usize,
    piece: Vec<u8>,
}

/// Runs a session: what it is comes by standard input, its client is standard output.
///
/// # Errors
/// It cannot begin. Its client has heard so, if that was possible.
pub fn run() -> io::Result<()> {
    let mut spec = Vec::new();
    io::stdin().lock().take(SPEC_MAX).read_to_end(&mut spec)?;
    let mut spec: Spec = postcard::from_bytes(&spec).map_err(io::Error::other)?;
    let stream = child::take_stdout()?;
    let link = Link::new(stream, spec.seal.take())?;
    match Process::start(spec) {
        Ok(mut process) => {
            process.take_link(link);
            process.serve();
            Ok(())
        }
        Err(refused) => {
            log::event("exec-refused", &[("why", &refused.text)]);
            link.refuse_and_wait(refused, LINGER);
            Ok(())
        }
    }
}

impl Process {
    fn start(spec: Spec) -> Result<Self, Refused> {
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            refused(refusal::FAILED, format!("cannot {what}: {e}"))
        };
        let place = Place::of(&spec.run_dir);
        let at = place.socket(&spec.id);
        let at = at.ok_or_else(|| refused(refusal::FAILED, "it has no id"))?;
        nix::sys::prctl::set_child_subreaper(true)
            .map_err(|e| failed("keep its processes together", &e))?;
        let mask = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM]);
        crate::sys::default_signal(Signal::SIGCHLD);
        mask.thread_block()
            .map_err(|e| failed("hold signals", &e))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags);
        let signals = signals.map_err(|e| failed("hold signals", &e))?;
        let listener = ask::listener(&at).map_err(|e| failed("listen for the agent", &e))?;
        let child = Child::start(&spec).inspect_err(|_| drop(std::fs::remove_file(&at)))?;
        let timeout = spec.open.timeout_ms;
        let deadline =
            (timeout > 0).then(|| Instant::now().checked_add(Duration::from_millis(timeout)));
        let open = &spec.open;
        let session = Session::new(spec.id.clone(), open.detach, child.has_tty(), open.stdin);
        Ok(Self {
            at,
            started_ms: clock::unix_ms(),
            session,
            link: None,
            child,
            listener,
            signals,
            deadline: deadline.flatten(),
            ending: None,
            leave_at: None,
            linger_at: None,
            drained: 0,
            piece: vec![0; PIECE],
            spec,
        })
    }

    fn take_link(&mut self, link: Link) -> Option<Link> {
        self.session
            .bind(self.spec.by.is_some() && !link.is_sealed());
        self.link.replace(link)
    }

    fn serve(mut self) {
        loop {
            while self.move_bytes() {}
            if self.is_done() {
                break;
            }
            self.wait();
            self.look_at_signals();
            self.look_at_questions();
            self.look_at_clock();
        }
        let _ = std::fs::remove_file(&self.at);
        let exit = self.session.exit().cloned().unwrap_or_default();
        log::event(
            "exec-ended",
            &[
                ("session", &self.spec.id),
                ("how", &exit.how),
                ("value", &exit.value),
            ],
        );
        self.child.release();
    }

    /// Nobody can hear any more, or all was heard.
    fn is_done(&self) -> bool {
        let is_past = |at: Option<Instant>| at.is_some_and(|at| Instant::now() >= at);
        let has_left = is_past(self.leave_at) || is_past(self.linger_at);
        let has_ended = self.session.exit().is_some();
        let is_alone = self.link.is_none();
        has_left || (has_ended && is_alone && (!self.session.is_kept() || self.session.is_over()))
    }

    /// Moves what can be moved now; true if anything was.
    fn move_bytes(&mut self) -> bool {
        let mut progress = self.hear();
        progress |= self.write_stdin();
        for nth in 0..2 {
            progress |= self.read_out(nth);
        }
        progress |= self.say();
        if self.session.is_over()
            && self.linger_at.is_none()
            && let Some(link) = self.link.as_mut().filter(|link| !link.owes())
        {
            link.end();
            self.linger_at = Some(Instant::now() + LINGER);
        }
        progress
    }

    fn hear(&mut self) -> bool {
        let Some(link) = &mut self.link else {
            return false;
        };
        let mut messages = Vec::new();
        let read = link.read(&mut messages);
        for message in &messages {
            if !self.take(message) {
                return true;
            }
        }
        match read {
            Ok(progress) => progress.is_some(),
            Err(e) => {
                self.client_gone(&e);
                true
            }
        }
    }

    /// False: the client is cut off.
    fn take(&mut self, message: &ToGuest) -> bool {
        match self.session.handle(message) {
            Ok(effect) => {
                self.effect(effect);
                true
            }
            Err(violation) => {
                if let Some(link) = self.link.take() {
                    link.refuse(refused(refusal::MALFORMED, violation.to_string()));
                }
                self.client_gone(&io::Error::new(ErrorKind::InvalidData, violation));
                false
            }
        }
    }

    fn effect(&mut self, effect: Option<Effect>) {
        match effect {
            Some(Effect::Signal(number)) => self.child.signal(number.into()),
            Some(Effect::Resize(size)) => self.child.resize(size),
            None => {}
        }
    }

    fn client_gone(&mut self, why: &io::Error) {
        self.link = None;
        if self.session.client_gone() || self.session.exit().is_some() {
            return;
        }
        log::event(
            "exec-client-gone",
            &[("session", &self.spec.id), ("why", why)],
        );
        self.end(How::Ended, Signal::SIGHUP);
    }

    fn say(&mut self) -> bool {
        let Some(link) = &mut self.link else {
            return false;
        };
        match link.write(&mut self.session) {
            Ok(progress) => progress,
            Err(e) => {
                self.client_gone(&e);
                true
            }
        }
    }

    fn write_stdin(&mut self) -> bool {
        let Some(pipe) = &self.child.stdin else {
            return false;
        };
        match self.session.stdin() {
            Next::Nothing => false,
            Next::Close => {
                // A terminal has no end of its own: it ends with its client.
                self.child.stdin = None;
                true
            }
            Next::Write(bytes) => match rustix::io::write(pipe, bytes) {
                Ok(n) => {
                    self.session.stdin_wrote(n);
                    n > 0
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
                Err(_) => {
                    self.stdin_broke();
                    true
                }
            },
        }
    }

    fn stdin_broke(&mut self) {
        self.child.stdin = None;
        self.session.stdin_broke();
    }

    fn read_out(&mut self, nth: usize) -> bool {
        let Some(fd) = &self.child.outs[nth] else {
            if self.session.is_open(OUTS[nth]) {
                self.session.output_ended(OUTS[nth]);
                return true;
            }
            return false;
        };
        let room = self.session.room(OUTS[nth]).min(PIECE);
        if room == 0 {
            return false;
        }
        // The command has ended, so what is in the pipe now is what it has written.
        let has_ended = self.session.exit().is_some();
        match rustix::io::read(fd, &mut self.piece[..room]) {
            Ok(n) if n > 0 => {
                let _ = self.session.output(OUTS[nth], &self.piece[..n]);
                self.drained += if has_ended { n } else { 0 };
                if self.drained > DRAIN_MAX {
                    self.child.outs[nth] = None;
                }
                true
            }
            Err(rustix::io::Errno::INTR) => true,
            Err(rustix::io::Errno::AGAIN) if !has_ended => false,
            // The end; EIO of a terminal that nobody has open.
            _ => {
                self.child.outs[nth] = None;
                true
            }
        }
    }

    /// Sleeps until something can be moved, or is due.
    fn wait(&self) {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(link) = &self.link {
            let mut want = PollFlags::POLLIN;
            want.set(PollFlags::POLLOUT, link.owes());
            fds.push(PollFd::new(link.as_fd(), want));
        }
        for (fd, out) in self.child.outs.iter().zip(OUTS) {
            if let Some(fd) = fd.as_ref().filter(|_| self.session.room(out) > 0) {
                fds.push(PollFd::new(fd.as_fd(), PollFlags::POLLIN));
            }
        }
        let is_owed = matches!(self.session.stdin(), Next::Write(_));
        if let Some(pipe) = &self.child.stdin {
            // Of a pipe that nobody reads any more an error is told also where nothing is asked. A terminal tells its end by what it
            // brings.
            let want = match is_owed {
                true => Some(PollFlags::POLLOUT),
                false => (!self.child.has_tty()).then(PollFlags::empty),
            };
            fds.extend(want.map(|want| PollFd::new(pipe.as_fd(), want)));
        }
        let kill_at = self.ending.filter(|e| !e.killed).map(|e| e.kill_at);
        let due = [self.deadline, kill_at, self.leave_at, self.linger_at];
        let left = due.into_iter().flatten().min();
        let left = left.map(|at| at.saturating_duration_since(Instant::now()));
        let limit = left.map_or(PollTimeout::NONE, clock::poll_limit);
        let _ = poll(&mut fds, limit);
    }

    /// A pipe that nobody reads is closed here, or `wait` would return for ever.
    fn look_at_stdin(&mut self) {
        let is_broken = self.child.stdin.as_ref().is_some_and(|pipe| {
            let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
            let got = poll(&mut fds, PollTimeout::ZERO);
            got.is_ok_and(|n| n > 0) && !self.child.has_tty()
        });
        if is_broken {
            self.stdin_broke();
        }
    }

    fn look_at_signals(&mut self) {
        self.look_at_stdin();
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                self.end(How::Ended, Signal::SIGTERM);
                // Nobody is to wait for a client then.
                self.leave_at = Some(Instant::now() + GRACE + LINGER);
            }
        }
        if let Some(status) = self.child.reap() {
            self.exited(Some(status));
        }
    }

    fn exited(&mut self, status: Option<Status>) {
        let ended = self.ending.map(|ending| ending.how);
        let mut text = self.child.limits_hit().join("; ");
        let is_whole = match ended {
            None => {
                self.child.end_rest();
                true
            }
            Some(_) => self.child.kill(),
        };
        if !is_whole {
            text = format!("some of its processes could not be killed; {text}");
        }
        text.truncate(text.floor_char_boundary(adit_exec::TEXT_MAX));
        let (how, value) = match status {
            Some(Status::Code(code)) => (How::Code, code),
            Some(Status::Signal(signal)) => (How::Signal, signal),
            None => (How::Lost, 0),
        };
        let how = ended.unwrap_or(how) as u8;
        self.child.stdin = None;
        self.session.exited(Exit {
            how,
            value,
            text,
            ..Exit::default()
        });
        self.deadline = None;
        if self.session.is_kept() {
            let kept = match ended {
                Some(How::Ended) => KEPT_ENDED,
                _ => KEPT,
            };
            self.leave_at.get_or_insert(Instant::now() + kept);
        }
    }

    /// Begins to end the command.
    fn end(&mut self, how: How, signal: Signal) {
        if self.session.exit().is_some() || self.ending.is_some() {
            return;
        }
        self.child.signal(signal as i32);
        // One that is stopped ends only when it goes on.
        self.child.signal(Signal::SIGCONT as i32);
        self.ending = Some(Ending {
            how,
            kill_at: Instant::now() + GRACE,
            killed: false,
        });
    }

    fn look_at_clock(&mut self) {
        let now = Instant::now();
        if self.deadline.is_some_and(|at| now >= at) {
            self.deadline = None;
            self.end(How::TimedOut, Signal::SIGTERM);
        }
        if let Some(ending) = self
            .ending
            .as_mut()
            .filter(|e| !e.killed && now >= e.kill_at)
        {
            ending.killed = true;
            let _ = self.child.kill();
            let status = self.child.reap();
            if self.session.exit().is_none() {
                self.exited(status);
            }
        }
    }

    fn look_at_questions(&mut self) {
        loop {
            match Question::take(&self.listener) {
                Ok(None) => return,
                Ok(Some(question)) => {
                    let (asks, socket) = question.split();
                    Question::answer(&socket, &self.answer(asks));
                }
                // Whoever it was: the agent asks again.
                Err(_) => {}
            }
        }
    }

    fn answer(&mut self, asks: Asks) -> Answer {
        let of = |user: &str| user.is_empty() || user == self.spec.user;
        let done = match asks {
            Asks::Row => Ok(()),
            Asks::Attach(_, _, None) | Asks::End(_, false) if self.spec.by.is_some() => {
                let text =
                    "this session was begun by a ticket, and only a ticket does anything to it";
                Err(refused(refusal::NEEDS_TICKET, text))
            }
            Asks::Attach(attaching, stream, keys) => match of(&attaching.user) {
                true => self.attach(&attaching.attach, stream, keys),
                false => Err(no_such()),
            },
            Asks::End(ending, _) if of(&ending.user) => {
                match ending.signal {
                    0 => self.end(How::Ended, Signal::SIGTERM),
                    number => self.child.signal(number.into()),
                }
                if ending.signal == 0 && self.session.exit().is_some() {
                    // It has ended already, and whoever asks wants it to be gone.
                    self.leave_at = Some(Instant::now());
                }
                Ok(())
            }
            Asks::End(..) => Err(no_such()),
        };
        Answer {
            refused: done.err(),
            row: Some(self.row()),
        }
    }

    fn attach(
        &mut self,
        attach: &adit_exec::Attach,
        stream: OwnedFd,
        keys: Option<Keys>,
    ) -> Result<(), Refused> {
        if !self.session.is_kept() {
            let text = "this session ends with its client: only what was started with --detach can be attached to";
            return Err(refused(refusal::NO_SESSION, text));
        }
        // One who asks for what is not here disturbs nobody.
        let effect = self.session.attach(attach);
        let effect = effect.map_err(|gone| refused(refusal::GONE, gone.to_string()))?;
        let link = Link::new(stream, keys).map_err(|e| {
            self.client_gone(&e);
            refused(refusal::FAILED, e.to_string())
        })?;
        self.linger_at = None;
        if let Some(before) = self.take_link(link) {
            let text = "somebody else has attached to this session";
            before.refuse(refused(refusal::TAKEN_OVER, text));
        }
        self.effect(effect);
        if self.session.exit().is_some() {
            self.leave_at = Some(Instant::now() + KEPT);
        }
        Ok(())
    }

    fn row(&self) -> Row {
        let program = self.spec.program.to_string_lossy();
        let program = adit_names::escape(&program).at_most(200);
        let ended = self.session.exit().map(|exit| (exit.how, exit.value));
        Row {
            id: self.spec.id.clone(),
            user: self.spec.user.clone(),
            program: program.to_string(),
            started_ms: self.started_ms,
            written: self.session.written(),
            kept: self.session.is_kept(),
            attached: self.link.is_some(),
            ended,
        }
    }
}

fn no_such() -> Refused {
    refused(refusal::NO_SESSION, "there is no such session of this user")
}
