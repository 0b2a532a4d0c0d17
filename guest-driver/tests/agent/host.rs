//! The host's end of the `tasks` service, and an agent under test in a directory of its own.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use adit_channel::frame;
use adit_channel::hello::{self, Accept, Common, Hello};
use adit_names::VmId;
use adit_tasks::wire::{
    self, Clock, Facts, Goal, Held, HostGiven, Identified, Identity, Lacks, Outcome, Pull, Report,
    ReportAck, Started, Task, TaskOf, Trust, TrustHeld, WireKind,
};
use adit_tasks::{PublicKey, task_id};
use ed25519_dalek::SigningKey;
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::Serialize;
use serde_json::{Value, json};

/// Nothing here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);

pub struct Host {
    pub dir: tempfile::TempDir,
    listener: UnixListener,
    agent: Option<Child>,
    pub key: SigningKey,
    /// Bits of its hello's features.
    pub features: u64,
    /// The id that it gives a guest that asks; none: the one that the guest has.
    pub gives: Option<HostGiven>,
    /// Shell text that is run in the agent's process before the agent.
    pub prelude: &'static str,
    /// The agent.
    pub program: PathBuf,
}

pub enum Said {
    Pull(u32),
    Held(Held),
    Started,
    Lacks(u32, Lacks),
    Report(u32, Report),
    Trust(TrustHeld),
}

impl Host {
    pub fn new() -> Self {
        let host = Self::without_anchor();
        let line = PublicKey::of(&host.key, "test").to_string();
        fs::write(host.path("trust/manager.pub"), line).unwrap();
        host
    }

    pub fn without_anchor() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Scripts of other users pass through to their text.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        for sub in ["trust", "root"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let listener = UnixListener::bind(dir.path().join("host.sock")).unwrap();
        let limit = TimeVal::seconds(HANG.as_secs() as i64);
        setsockopt(&listener, ReceiveTimeout, &limit).unwrap();
        let at = |p: &str| dir.path().join(p).to_str().unwrap().to_owned();
        let config = format!(
            "vm_id = \"web-1\"\ntrust_dir = \"{}\"\nstate_dir = \"{}\"\nrun_dir = \"{}\"\n[file]\nroots = [\"{}\"]\n",
            at("trust"),
            at("state"),
            at("run"),
            at("root")
        );
        fs::write(dir.path().join("adit-guest.toml"), config).unwrap();
        Self {
            dir,
            listener,
            agent: None,
            key: SigningKey::from_bytes(&[7; 32]),
            features: 0,
            gives: None,
            prelude: ":",
            program: env!("CARGO_BIN_EXE_adit-guest").into(),
        }
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    /// Starts the agent; with a kill point it ends there by itself.
    pub fn start(&mut self, crash_at: Option<&str>) {
        self.start_with("ADIT_TEST_CRASH_AT", crash_at);
    }

    /// Starts the agent with a clock that is so far ahead.
    pub fn start_ahead(&mut self, ahead_ms: i64) {
        self.start_with("ADIT_TEST_CLOCK_AHEAD_MS", Some(&ahead_ms.to_string()));
    }

    /// Starts the agent on a disk that is full whenever the journal is to reach this point.
    pub fn start_full_at(&mut self, point: &str) {
        self.start_with("ADIT_TEST_DISK_FULL_AT", Some(point));
    }

    pub fn start_with(&mut self, name: &str, value: Option<&str>) {
        self.start_in(&value.map_or(vec![], |value| vec![(name, value)]));
    }

    /// Starts the agent in this environment.
    pub fn start_in(&mut self, environment: &[(&str, &str)]) {
        // Whoever starts an agent may have any umask.
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                &format!("umask 077; {}; exec \"$@\"", self.prelude),
                "sh",
            ])
            .arg(&self.program)
            .args(["run", "--config"])
            .arg(self.path("adit-guest.toml"));
        command
            .arg("--test-transport")
            .arg(format!("unix:{}", self.dir.path().display()));
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        command
            .stdin(Stdio::null())
            .stderr(log)
            .env_remove("ADIT_TEST_CRASH_AT");
        command.envs(environment.iter().copied());
        self.agent = Some(command.spawn().unwrap());
    }

    pub fn pid(&self) -> i32 {
        self.agent.as_ref().unwrap().id() as i32
    }

    /// SIGKILL, as a power cut.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            agent.wait().unwrap();
        }
    }

    /// SIGTERM, as a service manager.
    pub fn stop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = self.agent.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}: {}", self.log());
    }

    /// Waits until the agent has ended at its kill point.
    pub fn wait_for_crash(&mut self) {
        use std::os::unix::process::ExitStatusExt;
        let status = self.agent.take().unwrap().wait().unwrap();
        assert_eq!(status.signal(), Some(9), "{status}: {}", self.log());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// How the agent has ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        let status = self.agent.as_mut()?.try_wait().unwrap()?;
        self.agent = None;
        Some(status)
    }

    /// Whether the agent has dialled, and waits to be accepted.
    pub fn is_dialled(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, 5_u8).unwrap() > 0
    }

    /// Takes the agent's next stream.
    pub fn accept(&self) -> (Session, Facts) {
        let accepted = self.try_accept();
        accepted.unwrap_or_else(|| panic!("the agent is gone: {}", self.log()))
    }

    /// Takes the next stream of an agent that may be gone by then.
    pub fn try_accept(&self) -> Option<(Session, Facts)> {
        let (mut stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        let Hello::Open(open) = hello::read(&mut stream).ok()? else {
            panic!("not an open")
        };
        assert_eq!(open.service.as_str(), "tasks");
        let has = wire::FEATURES | wire::KEY | wire::CHUNKS;
        assert_eq!(open.common.features, has);
        let accept = Accept {
            common: Common {
                features: self.features,
                epoch: 3,
                ..Common::default()
            },
            version: 1,
        };
        stream.write_all(&Hello::Accept(accept).encode()).ok()?;
        let mut session = Session {
            stream,
            enrolment: wire::Enrolment::default(),
            program: wire::Program::default(),
            facts: None,
            identity: None,
            trust: None,
            pulls: None,
            told: None,
            clock: None,
            clocks: Vec::new(),
            stood: None,
        };
        let mut facts = None;
        let waits = self.features & wire::TRUST != 0;
        loop {
            let (header, body) = frame::read(&mut session.stream, frame::LEN_MAX).ok()??;
            match header.kind {
                k if k == WireKind::Identity as u16 => {
                    assert_ne!(self.features & wire::IDENTITY, 0);
                    let said: Identity = header.decode(&body).unwrap();
                    session.identity = said.id;
                    let id = self.gives.or(said.id).unwrap();
                    let copy_of = "VM `web-9`".into();
                    session.send(WireKind::Identified, header.id, &Identified { id, copy_of });
                }
                k if k == WireKind::Enrolment as u16 => {
                    // A host of before skips it.
                    assert_eq!(header.flags, frame::IGNORABLE);
                    session.enrolment = header.decode(&body).unwrap();
                }
                k if k == WireKind::Program as u16 => {
                    assert_eq!(header.flags, frame::IGNORABLE);
                    session.program = header.decode(&body).unwrap();
                }
                k if k == WireKind::TrustHeld as u16 => {
                    assert_ne!(self.features & wire::TRUST, 0);
                    session.trust = Some(header.decode(&body).unwrap());
                }
                k => {
                    assert_eq!(k, WireKind::Facts as u16);
                    facts = Some(header.decode(&body).unwrap());
                }
            }
            if let Some(facts) = facts.take_if(|_| !waits || session.trust.is_some()) {
                return Some((session, facts));
            }
        }
    }

    /// Signs a goal for this VM with these steps.
    pub fn goal(&self, key_seq: u64, steps: Value) -> Vec<u8> {
        self.sign(&goal(key_seq, "web-1", steps))
    }

    pub fn sign(&self, goal: &Value) -> Vec<u8> {
        adit_tasks::dsse::sign(&serde_json::to_vec(goal).unwrap(), &self.key).into_bytes()
    }

    /// Hands out one task on a fresh agent's stream and takes its report.
    pub fn run(&mut self, task: &Task) -> Report {
        self.start(None);
        let (mut session, _) = self.accept();
        let report = session.run(task);
        self.kill();
        report
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Session {
    /// What it said of its card.
    pub enrolment: wire::Enrolment,
    /// What it said of itself again.
    pub facts: Option<Facts>,
    /// The id that it had.
    pub identity: Option<HostGiven>,
    /// What it had taken of trust documents.
    pub trust: Option<TrustHeld>,
    /// What it said of its program.
    pub program: wire::Program,
    /// What it has said of it since.
    pub told: Option<wire::Enrolment>,
    stream: UnixStream,
    /// The pull that came while something else was waited for.
    pub pulls: Option<u32>,
    /// What the host's clock shows, for a host that answers; none: one of the version before.
    pub clock: Option<u64>,
    /// What the guest's clock showed.
    pub clocks: Vec<u64>,
    /// That its time stood still.
    pub stood: Option<wire::Stood>,
}

impl Session {
    /// The agent's next message; none if it is gone.
    pub fn next(&mut self) -> io::Result<Option<Said>> {
        let (header, body) = loop {
            let Some((header, body)) = frame::read(&mut self.stream, frame::LEN_MAX)? else {
                return Ok(None);
            };
            // Said again, for it has changed.
            if header.kind == WireKind::Enrolment as u16 {
                assert_eq!(header.flags, frame::IGNORABLE);
                self.enrolment = header.decode(&body).unwrap();
                self.told = Some(self.enrolment.clone());
                continue;
            }
            if header.kind == WireKind::Program as u16 {
                assert_eq!(header.flags, frame::IGNORABLE);
                self.program = header.decode(&body).unwrap();
                continue;
            }
            if header.kind == WireKind::Facts as u16 {
                self.facts = Some(header.decode(&body).unwrap());
                continue;
            }
            if header.kind == WireKind::Stood as u16 {
                assert_eq!(header.flags, frame::IGNORABLE);
                self.stood = Some(header.decode(&body).unwrap());
                continue;
            }
            if header.kind != WireKind::Clock as u16 {
                break (header, body);
            }
            assert_eq!(header.flags, frame::IGNORABLE);
            self.clocks
                .push(header.decode::<Clock>(&body).unwrap().unix_ms);
            if let Some(unix_ms) = self.clock {
                self.send(WireKind::HostClock, header.id, &Clock { unix_ms });
            }
        };
        Ok(Some(match header.kind {
            k if k == WireKind::Pull as u16 => {
                assert_eq!(header.decode::<Pull>(&body).unwrap().epoch, 3);
                Said::Pull(header.id)
            }
            k if k == WireKind::Held as u16 => {
                assert_eq!(header.flags, frame::IGNORABLE);
                Said::Held(header.decode(&body).unwrap())
            }
            k if k == WireKind::Started as u16 => {
                header.decode::<Started>(&body).unwrap();
                Said::Started
            }
            k if k == WireKind::Lacks as u16 => {
                Said::Lacks(header.id, header.decode(&body).unwrap())
            }
            k if k == WireKind::Report as u16 => {
                Said::Report(header.id, header.decode(&body).unwrap())
            }
            k if k == WireKind::TrustHeld as u16 => Said::Trust(header.decode(&body).unwrap()),
            k => panic!("kind {k}"),
        }))
    }

    pub fn send<T: Serialize>(&mut self, kind: WireKind, id: u32, body: &T) {
        // A write to an agent that is dead shows at the next read.
        let _ = self
            .stream
            .write_all(&frame::encode(kind as u16, 1, id, 0, body).unwrap());
    }

    /// Takes a message about the clock, which is to be the next.
    pub fn wait_for_clock(&mut self) {
        let (header, body) = frame::read(&mut self.stream, frame::LEN_MAX)
            .unwrap()
            .unwrap();
        assert_eq!(header.kind, WireKind::Clock as u16);
        let clock: Clock = header.decode(&body).unwrap();
        self.clocks.push(clock.unix_ms);
    }

    /// Passes a trust document on, and takes the answer.
    pub fn trust(&mut self, envelope: &str) -> TrustHeld {
        let envelope = envelope.as_bytes().to_vec();
        self.send(WireKind::Trust, 0, &Trust { envelope });
        loop {
            match self.next().unwrap().expect("the agent is gone") {
                Said::Trust(held) => return held,
                Said::Pull(id) => self.pulls = Some(id),
                Said::Started => {}
                _ => panic!("no answer"),
            }
        }
    }

    /// Hands out a task by digest.
    pub fn task_of(&mut self, id: u32, task: &Task, digest: [u8; 32]) {
        let of = TaskOf {
            task_id: task.task_id,
            digest,
            step_id: task.step_id.clone(),
            attempt: task.attempt,
        };
        self.send(WireKind::TaskOf, id, &of);
    }

    /// Sends a goal.
    pub fn goal(&mut self, envelope: &[u8]) {
        let envelope = envelope.to_vec();
        self.send(WireKind::Goal, 0, &Goal { envelope });
    }

    pub fn task(&mut self, id: u32, task: &Task) {
        self.send(WireKind::Task, id, task);
    }

    pub fn ack(&mut self, id: u32, report: &Report) {
        self.send(
            WireKind::ReportAck,
            id,
            &ReportAck {
                task_id: report.task_id,
            },
        );
    }

    /// Answers the next pull with this task and acknowledges its report.
    pub fn run(&mut self, task: &Task) -> Report {
        let mut handed_out = false;
        if let Some(id) = self.pulls.take() {
            handed_out = true;
            self.task(id, task);
        }
        loop {
            match self.next().unwrap().expect("the agent is gone") {
                Said::Pull(id) if !handed_out => {
                    handed_out = true;
                    self.task(id, task);
                }
                Said::Pull(_) => panic!("pulled again without a report"),
                Said::Started | Said::Held(_) | Said::Lacks(..) | Said::Trust(_) => {}
                Said::Report(id, report) => {
                    self.ack(id, &report);
                    if report.task_id == task.task_id && handed_out {
                        return report;
                    }
                }
            }
        }
    }
}

pub fn goal(key_seq: u64, vm: &str, steps: Value) -> Value {
    json!({
        "goal_id": "01990000-0000-7000-8000-000000000001", "key_seq": key_seq, "audience": {"vms": [vm]},
        "not_before": "2020-01-01T00:00:00Z", "not_after": "2120-01-01T00:00:00Z", "min_planner": 1, "steps": steps
    })
}

pub fn task(envelope: Vec<u8>, step: &str, attempt: u32) -> Task {
    let digest = adit_tasks::dsse::Envelope::parse(&envelope)
        .unwrap()
        .digest();
    let vm: VmId = "web-1".parse().unwrap();
    Task {
        task_id: task_id(&digest, &vm, step, attempt),
        envelope,
        step_id: step.into(),
        attempt,
    }
}

/// A step that leaves one line in a file each time it is begun.
pub fn counting(file: &Path, then: &str) -> Value {
    json!({"id": "count", "script": {"interpreter": "/bin/sh", "script": format!("echo x >>\"$1\"\n{then}"), "args": [file]}})
}

pub fn lines(file: &Path) -> usize {
    fs::read_to_string(file).unwrap_or_default().lines().count()
}

pub fn refused(report: &Report, code: &str) {
    assert_eq!(report.outcome, Outcome::Refused, "{}", report.reason);
    assert!(
        report.reason.starts_with(&format!("{code}: ")),
        "{code}: {}",
        report.reason
    );
}
