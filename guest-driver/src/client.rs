//! The agent's end of the `tasks` service: dial, send facts, send the reports that were not acknowledged, pull.
//!
//! Connected and idle it is in one blocking read: no timer, no wake-up. There is a time limit only while the host owes an
//! answer. A stream that lasted is dialled again at once, and from then on after a jittered delay that doubles up to five
//! seconds, whether a task runs or not. What must survive a reconnect is in the journal; a task that runs on is announced and
//! reported on the new stream.
//!
//! A task whose goal is not yet valid by the guest's clock is given back, and the next one is pulled: the host hands it out
//! again once the guest's clock shows its time, which the agent says as soon as it does. A host of the version before would
//! hand it out again at once: with one, the task is held and started when its time has come, and later tasks wait behind it
//! (`client/time.rs`).

mod time;

use std::io::{self, ErrorKind, Write};
use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use adit_channel::frame::{self, Header};
use adit_channel::hello::{self, Hello, Open};
use adit_tasks::hex;
use adit_tasks::wire::{
    self, Facts, Held, Lacks, Pull, Report, ReportAck, SERVICE, Task, TaskOf, WireKind,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::backoff::{Backoff, jittered};
use crate::clock;
use crate::conn::Conn;
use crate::crash::{self, Point};
use crate::frames::{answers, decode, ignorable, invalid};
use crate::given::Given;
use crate::live::Live;
use crate::runner::{Handled, Runner};
use crate::running::{Event, Running, SharedRunner};
use crate::serve::Identity;
use crate::transport::Transport;
use crate::trust::Anchors;
use crate::upgrade::{Upgrade, program};
use crate::{entropy, facts, log};

/// How long the host may take to answer the hello, and to read our bytes meanwhile.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long the host may take to acknowledge a report. A host that does not may have lost the stream without an end that the
/// guest could see.
const OWED_LIMIT: Duration = Duration::from_secs(30);
/// Most trust documents that are looked at of one stream: each costs a check of a signature.
const TRUSTS_MAX: u32 = 256;
/// Version of every kind of message.
const VERSION: u16 = 1;
/// Longest body from the host: an envelope of 256 KiB and the fields around it.
const BODY_MAX: u32 = 264 * 1024;

/// Pulls and runs tasks until the process ends.
pub struct Client {
    transport: Arc<dyn Transport>,
    identity: Arc<Identity>,
    live: Arc<Live>,
    runner: SharedRunner,
    upgrade: Arc<Upgrade>,
    running: Option<Running>,
    /// What came on the stream that is open.
    given: Given,
    /// What both ends of it know.
    features: u64,
    /// How many trust documents came on it.
    trusts: u32,
    /// What the host was told on it of who this guest is.
    told: Option<(wire::Enrolment, wire::Program, Facts)>,
    /// The clock message that the host has not answered, and when it was sent.
    clock_asked: Option<(u32, Instant)>,
    /// The host's time that it answered with last, and when; also on a stream before.
    host_time: Option<(u64, Instant)>,
    /// What the host sent on this stream is mixed into the guest's random numbers.
    seeded: bool,
    last_id: u32,
}

impl Client {
    /// Works through this transport with this runner.
    pub fn new(
        transport: Arc<dyn Transport>,
        identity: Arc<Identity>,
        live: Arc<Live>,
        runner: Runner,
        upgrade: Arc<Upgrade>,
    ) -> Self {
        let runner = SharedRunner::new(runner);
        upgrade.set_runner(runner.clone());
        Self {
            transport,
            identity,
            live,
            runner,
            upgrade,
            running: None,
            given: Given::default(),
            features: 0,
            trusts: 0,
            told: None,
            clock_asked: None,
            host_time: None,
            seeded: false,
            last_id: 0,
        }
    }

    /// Dials, works until the stream fails, and dials again.
    pub fn run(mut self) -> ! {
        let (mut backoff, mut last) = (Backoff::new(), String::new());
        loop {
            let error = match self.dial() {
                Ok(conn) => {
                    self.upgrade.hello();
                    last = String::new();
                    log::event("connected", &[("service", &SERVICE)]);
                    let begin = Instant::now();
                    self.live.talks_on(Some(&conn));
                    let ended = self.session(&conn).unwrap_or_else(|e| e);
                    self.live.talks_on(None);
                    self.identity.admission.ended();
                    backoff.ended_after(begin.elapsed());
                    ended
                }
                Err(e) => e,
            };
            // One line for as long as the error is the same, however often it is tried.
            let text = error.to_string();
            self.upgrade.no_hello(&text);
            if text != last {
                log::event("disconnected", &[("service", &SERVICE), ("error", &text)]);
                last = text;
            }
            thread::sleep(jittered(backoff.next()));
        }
    }

    /// What is wrong in this guest at this moment, so that no task runs. While one does, its journal takes tasks.
    fn faults(&self) -> Vec<String> {
        let policy = self.live.policy_fault().map(|fault| fault.to_string());
        let idle = self.runner.if_idle();
        let journal = idle.and_then(|runner| runner.journal_fault());
        policy.into_iter().chain(journal).collect()
    }

    fn facts(&self, anchors: &Anchors) -> Facts {
        let me = self.live.me(anchors);
        Facts {
            agent_version: program::version().to_string(),
            kernel: facts::kernel(),
            os: facts::os(),
            vm_id: me.map_or_else(|_| String::new(), String::from),
            anchors: anchors.count(),
            boot_nonce: self.identity.boot_nonce,
        }
    }

    fn dial(&mut self) -> io::Result<Conn> {
        let conn = self.transport.dial_host()?;
        conn.set_timeout(Some(HELLO_LIMIT))?;
        let service = SERVICE.parse().map_err(io::Error::other)?;
        let mut open = Open {
            lane: 0,
            ..Open::new(service, self.identity.common())
        };
        open.common.features |= wire::FEATURES | wire::KEY | wire::CHUNKS;
        (&conn).write_all(&Hello::Open(open).encode())?;
        match hello::read(&mut &conn)? {
            Hello::Accept(accept) => {
                self.identity.saw(&accept.common);
                self.features = accept.common.features & (wire::FEATURES | wire::KEY);
                (self.trusts, self.told, self.seeded) = (0, None, false);
                self.given = Given::new(self.features & wire::WINDOW != 0);
                conn.set_timeout(None)?;
                Ok(conn)
            }
            Hello::Refuse(r) => Err(io::Error::other(format!("host refused: {}", r.refusal))),
            Hello::Open(_) => Err(invalid("host answered with an open")),
        }
    }

    /// One connection's work. It ends only with an error; the inner one is the host's orderly end.
    fn session(&mut self, conn: &Conn) -> io::Result<io::Error> {
        self.take_key(conn)?;
        if self.features & wire::IDENTITY != 0 {
            self.identify(conn)?;
        }
        self.tell(conn)?;
        if self.features & wire::TRUST != 0 {
            let held = self.live.held(String::new());
            self.send(conn, WireKind::TrustHeld, &held)?;
        }
        self.send_clock(conn)?;
        // Not sent again before the first pull, unless something comes in between.
        let mut clock_is_fresh = true;
        if let Some(running) = self.running.take() {
            // It started on an earlier stream. Nothing is pulled before it has ended: the host would hand it out again. Its
            // report is among those below; if it was refused or is held, the host hands it out again.
            self.wait_for_end(conn, running)?;
            clock_is_fresh = false;
        }
        let unacknowledged = self.runner.lock().unacknowledged();
        for report in unacknowledged {
            self.deliver(conn, &report)?;
            clock_is_fresh = false;
        }
        loop {
            if !mem::take(&mut clock_is_fresh) {
                self.send_clock(conn)?;
            }
            // A reload may have found, or mended, a policy that cannot be used; and the journal may be another one since.
            self.tell(conn)?;
            let epoch = self.identity.common().epoch;
            let id = self.send(conn, WireKind::Pull, &Pull { epoch })?;
            let Some(task) = self.next_task(conn, id)? else {
                return Ok(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "host ended the stream",
                ));
            };
            if let Some(report) = self.work(conn, &task)? {
                self.deliver(conn, &report)?;
            }
        }
    }

    /// Tells who this guest is, unless the host was told just that.
    fn tell(&mut self, conn: &Conn) -> io::Result<()> {
        let anchors = self.live.anchors();
        let enrolment = self.live.enrolment(&anchors, &self.faults());
        let now = (enrolment, self.upgrade.program(), self.facts(&anchors));
        if self.told.as_ref() == Some(&now) {
            return Ok(());
        }
        // First, so that a VM that is ready has its labels.
        self.send_ignorable(conn, WireKind::Enrolment, &now.0)?;
        self.send_ignorable(conn, WireKind::Program, &now.1)?;
        self.send(conn, WireKind::Facts, &now.2)?;
        self.told = Some(now);
        Ok(())
    }

    /// Takes the key of the host's dials, if this host gives one.
    fn take_key(&mut self, conn: &Conn) -> io::Result<()> {
        let mut key = None;
        if self.features & wire::KEY != 0 {
            conn.set_timeout(Some(OWED_LIMIT))?;
            // Nothing was asked, so it answers no message.
            let given: Option<wire::HostKey> = self.receive(conn, WireKind::HostKey, 0)?;
            let ended = || io::Error::new(ErrorKind::UnexpectedEof, "host ended the stream");
            key = Some(hello::HostKey::new(given.ok_or_else(ended)?.key));
            conn.set_timeout(None)?;
        }
        self.identity.admission.given(key);
        Ok(())
    }

    /// Learns from the host which id this guest has. Before that nothing runs: it may be a copy of another guest's disk.
    fn identify(&mut self, conn: &Conn) -> io::Result<()> {
        let Some(identity) = self.live.identity() else {
            return Ok(());
        };
        let id = self.send(conn, WireKind::Identity, &identity)?;
        conn.set_timeout(Some(OWED_LIMIT))?;
        let said: Option<wire::Identified> = self.receive(conn, WireKind::Identified, id)?;
        let ended = || io::Error::new(ErrorKind::UnexpectedEof, "host ended the stream");
        self.live.identified(&said.ok_or_else(ended)?);
        conn.set_timeout(None)
    }

    /// Takes a trust document, or not, and answers.
    fn on_trust(&mut self, conn: &Conn, header: &Header, body: &[u8]) -> io::Result<()> {
        let wire::Trust { envelope } = decode(header, body)?;
        self.trusts = self.trusts.saturating_add(1);
        let held = match self.trusts <= TRUSTS_MAX {
            true => self.live.take(&envelope),
            false => {
                let why =
                    format!("trust-too-many: more than {TRUSTS_MAX} trust documents on one stream");
                self.live.held(why)
            }
        };
        self.send(conn, WireKind::TrustHeld, &held)?;
        // The key that has signed its card may be out now, for example.
        self.tell(conn)
    }

    /// Waits for the task that answers a pull; none at the end of the stream.
    fn next_task(&mut self, conn: &Conn, mut pull: u32) -> io::Result<Option<Task>> {
        let mut lacked = false;
        loop {
            self.wait_for_frame(conn)?;
            let Some((header, body)) = frame::read(&mut &*conn, BODY_MAX)? else {
                return Ok(None);
            };
            let is = |kind: WireKind| header.kind == kind as u16 && header.version == VERSION;
            if is(WireKind::Goal) {
                self.given.goal(decode(&header, &body)?);
            } else if is(WireKind::Task) {
                answers(&header, pull)?;
                return decode(&header, &body).map(Some);
            } else if is(WireKind::TaskOf) {
                answers(&header, pull)?;
                let of: TaskOf = decode(&header, &body)?;
                let digest = of.digest;
                match self.given.task(of) {
                    Some(task) => return Ok(Some(task)),
                    None if lacked => {
                        return Err(invalid("host did not send the goal of the task"));
                    }
                    None => pull = self.send(conn, WireKind::Lacks, &Lacks { digest })?,
                }
                lacked = true;
            } else {
                self.on_unsolicited(conn, &header, &body)?;
            }
        }
    }

    /// Runs a task, once its time has come; none if it was given back until then.
    fn work(&mut self, conn: &Conn, task: &Task) -> io::Result<Option<Report>> {
        loop {
            let running = self.runner.begin(task.clone())?;
            let not_before_ms = match self.wait_for_end(conn, running)? {
                Handled::Ended(report) => return Ok(Some(report)),
                Handled::NotYet(ms) => ms,
            };
            let held = Held {
                task_id: task.task_id,
                not_before_ms,
                now_ms: clock::now_ms(),
            };
            self.send_ignorable(conn, WireKind::Held, &held)?;
            if self.given.gives_back(not_before_ms) {
                return Ok(None);
            }
            self.hold(conn, not_before_ms)?;
        }
    }

    /// Waits for a task's end. If the stream ends first, the task runs on, and the next stream continues with it.
    fn wait_for_end(&mut self, conn: &Conn, mut running: Running) -> io::Result<Handled> {
        match self.follow(conn, &mut running) {
            Ok(()) => Ok(running.handled()),
            Err(e) => {
                self.running = Some(running);
                Err(e)
            }
        }
    }

    /// Reports that the task has started, now or before, and watches the stream until the task has ended.
    fn follow(&mut self, conn: &Conn, running: &mut Running) -> io::Result<()> {
        let mut news = Event::Started;
        while news != Event::Ended {
            match (news, running.started()) {
                (Event::Started, Some(started)) => {
                    self.send(conn, WireKind::Started, &started)?;
                }
                (Event::Stream, _) => self.read_unsolicited(conn)?,
                _ => {}
            }
            news = running.next(conn)?;
        }
        Ok(())
    }

    /// Reads a frame that answers nothing, or the end of the stream.
    fn read_unsolicited(&mut self, conn: &Conn) -> io::Result<()> {
        match frame::read(&mut &*conn, BODY_MAX)? {
            Some((header, body)) => self.on_unsolicited(conn, &header, &body),
            None => Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                "host ended the stream while a task runs or is held",
            )),
        }
    }

    /// Handles a frame that is not the answer being waited for.
    fn on_unsolicited(&mut self, conn: &Conn, header: &Header, body: &[u8]) -> io::Result<()> {
        let is = |kind: WireKind| header.kind == kind as u16 && header.version == VERSION;
        if is(WireKind::HostClock) {
            self.on_host_clock(conn, header, body)
        } else if is(WireKind::Seed) && self.features & wire::SEED != 0 {
            let wire::Seed { bytes } = decode(header, body)?;
            match entropy::mix(&bytes) {
                Ok(()) => self.seeded = true,
                Err(e) => log::event("seed-not-mixed", &[("error", &e)]),
            }
            Ok(())
        } else if is(WireKind::Trust) && self.features & wire::TRUST != 0 {
            self.on_trust(conn, header, body)
        } else {
            ignorable(header)
        }
    }

    /// Sends a report and waits until the host has it on disk.
    fn deliver(&mut self, conn: &Conn, report: &Report) -> io::Result<()> {
        let id = self.send(conn, WireKind::Report, report)?;
        crash::at(Point::Sent);
        conn.set_timeout(Some(OWED_LIMIT))?;
        let heard = self.receive(conn, WireKind::ReportAck, id);
        let ack: ReportAck = heard
            .map_err(|e| match e.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => io::Error::new(
                    ErrorKind::TimedOut,
                    format!(
                        "host did not acknowledge the report within {OWED_LIMIT:?}: dialling again"
                    ),
                ),
                _ => e,
            })?
            .ok_or_else(|| {
                io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "host ended the stream before its acknowledgement",
                )
            })?;
        conn.set_timeout(None)?;
        if ack.task_id != report.task_id {
            return Err(invalid(
                "host acknowledged another task than the one reported",
            ));
        }
        crash::at(Point::Acked);
        log::event("acknowledged", &[("task", &hex(&ack.task_id))]);
        self.runner.lock().acknowledged(&ack.task_id);
        Ok(())
    }

    fn send<T: Serialize>(&mut self, conn: &Conn, kind: WireKind, body: &T) -> io::Result<u32> {
        self.send_with(conn, kind, 0, body)
    }

    /// Sends a frame that a host of an earlier version may skip.
    fn send_ignorable<T: Serialize>(
        &mut self,
        conn: &Conn,
        kind: WireKind,
        body: &T,
    ) -> io::Result<u32> {
        self.send_with(conn, kind, frame::IGNORABLE, body)
    }

    fn send_with<T: Serialize>(
        &mut self,
        mut conn: &Conn,
        kind: WireKind,
        flags: u32,
        body: &T,
    ) -> io::Result<u32> {
        self.last_id = self.last_id.wrapping_add(1).max(1);
        let bytes = frame::encode(kind as u16, VERSION, self.last_id, flags, body);
        let bytes = bytes.map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
        conn.write_all(&bytes)?;
        Ok(self.last_id)
    }

    fn receive<T: DeserializeOwned>(
        &mut self,
        conn: &Conn,
        kind: WireKind,
        id: u32,
    ) -> io::Result<Option<T>> {
        loop {
            let Some((header, body)) = frame::read(&mut &*conn, BODY_MAX)? else {
                return Ok(None);
            };
            if header.kind == kind as u16 && header.version == VERSION {
                answers(&header, id)?;
                return decode(&header, &body).map(Some);
            }
            self.on_unsolicited(conn, &header, &body)?;
        }
    }
}
