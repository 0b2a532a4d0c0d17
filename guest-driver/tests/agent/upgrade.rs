//! The agent becomes another program: real processes, which are killed at every change that they make on disk.
//!
//! The programs are this agent with another version written at their end, and with what they do wrong.

mod back;
mod killed;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use adit_blob::Digest;
use adit_channel::frame;
use adit_guest_driver::config::BAD_CONFIG;
use adit_tasks::dsse::{Type, sign_as};
use adit_tasks::order::{Answer, BODY_MAX, Kind, Order, SERVICE};
use adit_tasks::package::version;
use adit_tasks::wire::{Facts, Outcome};
use adit_tasks::{Package, PublicKey};
use ed25519_dalek::SigningKey;
use serde_json::json;

use crate::blob::{dial, send, try_dial};
use crate::commands::agent;
use crate::host::{Host, Said, Session, counting, task};

const HANG: Duration = Duration::from_secs(60);

/// The agent without symbols: it is copied and read often.
fn stripped() -> &'static Path {
    static STRIPPED: OnceLock<PathBuf> = OnceLock::new();
    STRIPPED.get_or_init(|| {
        let own = env!("CARGO_BIN_EXE_adit-guest");
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let made = dir.join(format!("adit-guest.{}", std::process::id()));
        let strip = Command::new("strip").arg("-o").arg(&made).arg(own).status();
        if !strip.is_ok_and(|status| status.success()) {
            fs::copy(own, &made).unwrap();
        }
        made
    })
}

/// A program of this version that behaves so.
fn program(version: &str, behaves: &str) -> Vec<u8> {
    let mut bytes = fs::read(stripped()).unwrap();
    bytes.extend_from_slice(format!("\nadit-test={version},{behaves}\n").as_bytes());
    bytes
}

fn key() -> SigningKey {
    SigningKey::from_bytes(&[21; 32])
}

/// What is signed of a program.
fn package(content: &[u8], of: &str, floor: &str) -> Package {
    Package {
        version: version(of).unwrap(),
        architecture: std::env::consts::ARCH.into(),
        size: content.len() as u64,
        digest: Digest::of(content).0,
        oldest_fallback: version(floor).unwrap(),
        not_after: "2120-01-01T00:00:00Z".parse().unwrap(),
    }
}

fn signed(package: &Package) -> Vec<u8> {
    sign_as(Type::Agent, &package.payload(), &key()).into_bytes()
}

/// A host whose guest has an image of version 0.1.0, and trusts a key for agents.
fn host() -> Host {
    let mut host = Host::new();
    let line = format!("roles=agent {}", PublicKey::of(&key(), "agents"));
    fs::write(host.path("trust/agents.pub"), line).unwrap();
    fs::create_dir(host.path("image")).unwrap();
    host.program = host.path("image/adit-guest");
    write_program(&host.program, &program("0.1.0", "ok"));
    host
}

fn write_program(path: &Path, content: &[u8]) {
    // By another process: a child that any thread starts meanwhile would have the file open for writing, and nobody runs such
    // a file.
    let made = path.with_extension("made");
    fs::write(&made, content).unwrap();
    let copied = Command::new("cp")
        .args(["--remove-destination"])
        .args([&made, path])
        .status();
    assert!(copied.unwrap().success());
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Gives an order; none if the agent is gone before it answers.
fn try_order(host: &Host, envelope: &[u8]) -> Option<Answer> {
    let mut stream = try_dial(host, SERVICE, vec![]).ok()?.ok()?;
    let envelope = envelope.to_vec();
    let order = frame::encode(Kind::Order as u16, 1, 5, 0, &Order { envelope }).unwrap();
    stream.write_all(&order).ok()?;
    let (header, body) = frame::read(&mut stream, BODY_MAX).ok()??;
    assert_eq!((header.kind, header.id), (Kind::Answer as u16, 5));
    Some(header.decode(&body).unwrap())
}

fn order(host: &Host, envelope: &[u8]) -> Answer {
    try_order(host, envelope).unwrap_or_else(|| panic!("{}", host.log()))
}

fn taken(answer: &Answer) {
    assert_eq!(answer.refused, "", "{}", answer.text);
}

/// Gives it a program, and waits until that has dialled.
fn upgrade(host: &mut Host, content: &[u8], of: &str, floor: &str) -> (Session, Facts) {
    give(host, content, of, floor);
    accept_as(host, &[], |session, facts| {
        facts.agent_version == of && session.program.digest == Some(Digest::of(content).0)
    })
}

fn give(host: &Host, content: &[u8], of: &str, floor: &str) {
    assert_eq!(send(host, content).refusal, 0);
    taken(&order(host, &signed(&package(content, of, floor))));
}

/// Waits for the stream of an agent that says this, as an init system does: one that ends is started again.
fn accept_as(
    host: &mut Host,
    environment: &[(&str, &str)],
    is: impl Fn(&Session, &Facts) -> bool,
) -> (Session, Facts) {
    let begin = Instant::now();
    loop {
        if let Some(status) = host.ended() {
            // The unit that adit ships does not start such a one again.
            assert_ne!(status.code(), Some(BAD_CONFIG.into()), "{}", host.log());
            host.start_in(environment);
        }
        if host.is_dialled()
            && let Some((session, facts)) = host.try_accept()
            && is(&session, &facts)
        {
            return (session, facts);
        }
        assert!(begin.elapsed() < HANG, "{}", host.log());
    }
}

/// It serves: what the host dials is answered.
fn serves(host: &Host) {
    let mut stream = dial(host, "ping", vec![]).unwrap();
    stream.write_all(b"x").unwrap();
    let mut echo = [0];
    stream.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"x");
}

fn status(host: &Host) -> String {
    let config = host.path("adit-guest.toml");
    let mut command = Command::new(&host.program);
    let said = command.args(["status", "--config"]).arg(config).output();
    String::from_utf8_lossy(&said.unwrap().stdout).into_owned()
}

#[test]
fn the_next_agent_has_the_process_of_the_one_before_and_the_image_stays_as_it_is() {
    let mut host = host();
    let image = fs::read(&host.program).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.agent_version, "0.1.0");
    assert_eq!(session.program, Default::default());
    let pid = host.pid();
    let next = program("0.2.0", "ok");
    let (session, facts) = upgrade(&mut host, &next, "0.2.0", "0.1.0");
    assert_eq!(facts.agent_version, "0.2.0");
    assert_eq!(session.program.digest, Some(Digest::of(&next).0));
    assert_eq!(
        (&*session.program.floor, session.program.faults.len()),
        ("0.1.0", 0)
    );
    assert_eq!((host.pid(), host.ended()), (pid, None));
    let runs = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(runs.starts_with(host.path("state/agent")), "{runs:?}");
    serves(&host);
    assert!(status(&host).contains("0.2.0 ("), "{}", status(&host));
    // Also after a restart, of which the init system knows only the image's program.
    host.kill();
    host.start(None);
    assert_eq!(host.accept().1.agent_version, "0.2.0");
    assert_eq!(fs::read(&host.program).unwrap(), image);
    // The same once more is no upgrade, and no fault.
    let answer = order(&host, &signed(&package(&next, "0.2.0", "0.1.0")));
    assert!(answer.already && answer.refused.is_empty());
    // What it says of older ones counts.
    let older = signed(&package(b"older", "0.1.5", "0.1.0"));
    assert_eq!(order(&host, &older).refused, "no-such-blob");
    assert!(order(&host, &signed(&package(&next, "0.2.0", "0.2.0"))).already);
    assert_eq!(order(&host, &older).refused, "agent-below-floor");
    // One more, and only what may run again is kept.
    let third = program("0.3.0", "ok");
    let (_session, facts) = upgrade(&mut host, &third, "0.3.0", "0.2.0");
    assert_eq!(facts.agent_version, "0.3.0");
    let fourth = program("0.4.0", "ok");
    upgrade(&mut host, &fourth, "0.4.0", "0.3.0");
    let begin = Instant::now();
    let kept = || fs::read_dir(host.path("state/agent")).unwrap().count();
    while kept() > 3 {
        assert!(begin.elapsed() < HANG, "0.3.0, 0.4.0 and the state");
    }
}

#[test]
fn r132_what_is_unsigned_foreign_older_or_no_program_is_refused_by_name() {
    let mut host = host();
    host.start(None);
    let (mut session, _) = host.accept();
    let next = program("0.2.0", "ok");
    let good = package(&next, "0.2.0", "0.1.0");
    let refused = |envelope: &[u8]| order(&host, envelope).refused;
    assert_eq!(refused(&signed(&good)), "no-such-blob");
    assert_eq!(send(&host, &next).refusal, 0);
    // Nobody, or nobody who may, has signed it.
    let by = |key: &SigningKey, of| sign_as(of, &good.payload(), key).into_bytes();
    assert_eq!(refused(b""), "agent-damaged");
    assert_eq!(refused(&good.payload()), "agent-damaged");
    assert_eq!(refused(&by(&key(), Type::Goal)), "agent-damaged");
    assert_eq!(refused(&by(&host.key, Type::Agent)), "agent-untrusted");
    let stranger = SigningKey::from_bytes(&[99; 32]);
    assert_eq!(refused(&by(&stranger, Type::Agent)), "agent-untrusted");
    let changed = String::from_utf8(signed(&good)).unwrap();
    let changed = changed.replace("\"payload\":\"ey", "\"payload\":\"ez");
    assert_eq!(refused(changed.as_bytes()), "agent-untrusted");
    // It is for others, or was for another time, or is something else.
    let with = |change: &dyn Fn(&mut Package)| {
        let mut package = good.clone();
        change(&mut package);
        signed(&package)
    };
    let foreign = with(&|p| p.architecture = "aarch64".into());
    assert_eq!(refused(&foreign), "agent-foreign");
    let over = with(&|p| p.not_after = "2020-01-01T00:00:00Z".parse().unwrap());
    assert_eq!(refused(&over), "agent-expired");
    assert_eq!(refused(&with(&|p| p.size += 1)), "agent-wrong-size");
    let other = with(&|p| p.version = version("0.2.1").unwrap());
    assert_eq!(refused(&other), "agent-wrong-version");
    let file = |content: &[u8]| {
        assert_eq!(send(&host, content).refusal, 0);
        signed(&package(content, "0.2.0", "0.1.0"))
    };
    let script = b"#!/bin/sh\necho adit-guest 0.2.0\n";
    assert_eq!(refused(&file(script)), "agent-not-elf");
    let mut machine = next.clone();
    machine[18..20].copy_from_slice(&183_u16.to_le_bytes());
    assert_eq!(refused(&file(&machine)), "agent-foreign");
    assert_eq!(refused(&file(&next[..4096])), "agent-cannot-run");
    // Of none of them is anything left.
    let left = fs::read_dir(host.path("state/agent")).unwrap();
    assert_eq!(left.count(), 0);
    // The agent has run all the time.
    let done = counting(&host.path("count"), "");
    let task = task(host.goal(1, json!([done])), "count", 1);
    assert_eq!(session.run(&task).outcome, Outcome::Done);
    drop(session);
    // What a package said once holds for every host, and after a restart.
    let (_session, facts) = upgrade(&mut host, &program("0.4.0", "ok"), "0.4.0", "0.3.0");
    assert_eq!(facts.agent_version, "0.4.0");
    assert_eq!(order(&host, &signed(&good)).refused, "agent-below-floor");
    host.kill();
    host.start(None);
    host.accept();
    assert_eq!(order(&host, &signed(&good)).refused, "agent-below-floor");
}

#[test]
fn a_running_task_is_waited_for_and_none_begins_meanwhile() {
    let mut host = host();
    host.start(None);
    let (mut session, _) = host.accept();
    let wait = format!(
        "while ! test -e {}; do sleep 0.02; done",
        host.path("go").display()
    );
    let steps = json!([counting(&host.path("count"), &wait)]);
    let task = task(host.goal(1, steps), "count", 1);
    let Some(Said::Pull(id)) = session.next().unwrap() else {
        panic!("no pull")
    };
    session.task(id, &task);
    assert!(matches!(session.next().unwrap(), Some(Said::Started)));
    let next = program("0.2.0", "ok");
    assert_eq!(send(&host, &next).refusal, 0);
    let answer = order(&host, &signed(&package(&next, "0.2.0", "0.1.0")));
    taken(&answer);
    assert!(answer.waits);
    // Another order has to wait for this one.
    let again = order(&host, &signed(&package(&next, "0.2.0", "0.1.0")));
    assert_eq!(again.refused, "agent-on-trial");
    assert!(!host.is_dialled());
    fs::write(host.path("go"), "").unwrap();
    drop(session);
    // Its result is not lost: whoever is the agent next has it from the journal.
    let begin = Instant::now();
    let report = loop {
        let (mut session, facts) = host.accept();
        if let Ok(Some(Said::Report(id, report))) = session.next() {
            session.ack(id, &report);
            if facts.agent_version == "0.2.0" {
                break Some(report);
            }
        } else if facts.agent_version == "0.2.0" {
            break None;
        }
        assert!(begin.elapsed() < HANG, "{}", host.log());
    };
    if let Some(report) = report {
        assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
    }
    assert!(host.log().contains("outcome=Done"), "{}", host.log());
}

#[test]
fn what_was_changed_on_disk_or_is_not_trusted_any_more_is_not_run() {
    let mut host = host();
    host.start(None);
    host.accept();
    let next = program("0.2.0", "ok");
    upgrade(&mut host, &next, "0.2.0", "0.1.0");
    let digest = Digest::of(&next).to_string();
    let at = host.path(&format!("state/agent/0.2.0-{}/adit-guest", &digest[..16]));
    host.kill();
    let mut file = fs::OpenOptions::new().write(true).open(&at).unwrap();
    file.seek(SeekFrom::Start(next.len() as u64 / 2)).unwrap();
    file.write_all(b"planted").unwrap();
    drop(file);
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.agent_version, "0.1.0");
    let fault = &session.program.faults[0];
    assert!(
        fault.starts_with("agent-damaged: 0.2.0") && fault.contains("changed"),
        "{fault}"
    );
    // It may come again.
    upgrade(&mut host, &next, "0.2.0", "0.1.0");
    host.kill();
    fs::set_permissions(&at, fs::Permissions::from_mode(0o777)).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.agent_version, "0.1.0");
    assert!(session.program.faults[0].contains("0777"));
    upgrade(&mut host, &next, "0.2.0", "0.1.0");
    host.kill();
    let (anchor, aside) = (host.path("trust/agents.pub"), host.path("agents.pub"));
    fs::rename(&anchor, &aside).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.agent_version, "0.1.0");
    let fault = &session.program.faults[0];
    assert!(
        fault.starts_with("agent-not-begun: 0.2.0") && fault.contains("not trusted"),
        "{fault}"
    );
    assert!(
        status(&host).contains("agent-not-begun"),
        "{}",
        status(&host)
    );
    drop(session);
    // It was confirmed: what passes takes it from nobody.
    host.kill();
    fs::rename(&aside, &anchor).unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.agent_version, "0.2.0");
    assert!(
        session.program.faults.is_empty(),
        "{:?}",
        session.program.faults
    );
}

#[test]
fn what_nobody_can_read_is_no_reason_not_to_serve() {
    let mut host = host();
    host.start(None);
    host.accept();
    let next = program("0.2.0", "ok");
    upgrade(&mut host, &next, "0.2.0", "0.1.0");
    host.kill();
    fs::write(host.path("state/agent/state.json"), "{cut").unwrap();
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.agent_version, "0.1.0");
    assert!(session.program.faults[0].starts_with("agent-unreadable"));
    // Which versions are too old is not known: none is taken.
    let answer = order(&host, &signed(&package(&next, "0.2.0", "0.1.0")));
    assert_eq!(answer.refused, "agent-unreadable");
    serves(&host);
}

#[test]
fn an_image_that_became_newer_is_the_agent_again() {
    let mut host = host();
    host.start(None);
    host.accept();
    upgrade(&mut host, &program("0.2.0", "ok"), "0.2.0", "0.1.0");
    host.kill();
    // As a package of the distribution does it.
    write_program(&host.program.clone(), &program("0.3.0", "ok"));
    host.start(None);
    let (session, facts) = host.accept();
    assert_eq!(facts.agent_version, "0.3.0");
    assert_eq!(
        (session.program.digest, &*session.program.floor),
        (None, "0.1.0")
    );
}

#[test]
fn an_image_begins_an_agent_that_knows_more_of_the_configuration() {
    let mut host = host();
    host.start(None);
    host.accept();
    upgrade(&mut host, &program("0.2.0", "ok"), "0.2.0", "0.1.0");
    host.kill();
    let path = host.path("adit-guest.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("of_the_next_version = 1\n{text}")).unwrap();
    host.start(None);
    let begin = Instant::now();
    while host.ended().is_none() {
        assert!(begin.elapsed() < HANG);
    }
    // It was begun; that it does not know the key either is this test's.
    assert!(host.log().contains("agent version=0.2.0"), "{}", host.log());
}

#[test]
fn a_sealed_image_keeps_its_agent_and_no_file_of_the_hosts() {
    let mut host = host();
    host.start(None);
    host.accept();
    upgrade(&mut host, &program("0.2.0", "ok"), "0.2.0", "0.1.0");
    host.kill();
    let config = host.path("adit-guest.toml");
    let config = config.to_str().unwrap();
    let tested = agent(&["self-test", "--config", config]).output().unwrap();
    let tested = String::from_utf8_lossy(&tested.stdout).into_owned();
    assert!(tested.contains("agent is 0.2.0"), "{tested}");
    let sealed = agent(&["seal", "--keep-vm-id", "--config", config]).output();
    let sealed = String::from_utf8_lossy(&sealed.unwrap().stdout).into_owned();
    assert!(sealed.contains("state/blobs"), "{sealed}");
    assert!(!host.path("state/blobs").exists());
    host.start(None);
    assert_eq!(host.accept().1.agent_version, "0.2.0");
}
