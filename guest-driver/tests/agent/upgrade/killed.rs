//! An agent that is killed at every change it makes on disk while it becomes another one: one comes back that serves, and it is the
//! old one or the new one.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use adit_blob::{Digest, wire};

use super::*;

/// What it is killed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The program comes, and is kept as a blob.
    Blob,
    /// The order is followed: copied, tried, written down.
    Order,
    /// The image's program begins the new one.
    Begin,
    /// The new one has its hello.
    Confirm,
    /// The new one has no hello in time.
    Back,
}

/// Each with how many of a hundred runs it gets.
const PHASES: [(Phase, u64); 5] = [
    (Phase::Blob, 15),
    (Phase::Order, 45),
    (Phase::Begin, 12),
    (Phase::Confirm, 14),
    (Phase::Back, 14),
];

const TRIAL: (&str, &str) = ("ADIT_TEST_TRIAL_MS", "200");

struct Programs {
    good: Vec<u8>,
    mute: Vec<u8>,
    /// A state directory in which the good one, or the mute one, was taken and not begun.
    good_taken: Host,
    mute_taken: Host,
}

impl Programs {
    fn make() -> Self {
        let (good, mute) = (program("0.2.0", "ok"), program("0.2.0", "mute"));
        let last = steps(Phase::Order, &mut host(), &good, &[]);
        let taken = |content: &[u8]| {
            let mut host = host();
            let at_step = [(variable(Phase::Order), last.to_string())];
            let died = play(Phase::Order, &mut host, content, &at_step);
            assert!(died, "not killed at its last step");
            host
        };
        let (good_taken, mute_taken) = (taken(&good), taken(&mute));
        Self {
            good,
            mute,
            good_taken,
            mute_taken,
        }
    }

    fn of(&self, phase: Phase) -> (&[u8], Option<&Host>) {
        match phase {
            Phase::Blob | Phase::Order => (&self.good, None),
            Phase::Begin | Phase::Confirm => (&self.good, Some(&self.good_taken)),
            Phase::Back => (&self.mute, Some(&self.mute_taken)),
        }
    }

    /// A guest in which the phase begins.
    fn host(&self, phase: Phase) -> Host {
        let host = host();
        if let (_, Some(taken)) = self.of(phase) {
            copy(&taken.path("state"), &host.path("state"));
        }
        host
    }
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(done.unwrap().success());
}

/// Plays a phase to its end. Returns whether the agent was killed.
fn play(phase: Phase, host: &mut Host, content: &[u8], more: &[(&str, String)]) -> bool {
    let mut environment: Vec<(&str, &str)> = more.iter().map(|(k, v)| (*k, &**v)).collect();
    if phase == Phase::Back {
        environment.push(TRIAL);
    }
    if matches!(phase, Phase::Blob | Phase::Order) {
        if phase == Phase::Order {
            put_blob(host, content);
        }
        host.start_in(&environment);
        // It dials only after it has begun.
        let begin = Instant::now();
        while !host.is_dialled() {
            // Killed at its start, where it makes its key.
            if let Some(status) = host.ended() {
                assert_eq!(status.signal(), Some(9), "{status}: {}", host.log());
                return true;
            }
            assert!(begin.elapsed() < HANG, "{}", host.log());
        }
        let _session = host.accept();
        // It may be dead at any of them.
        if phase == Phase::Blob {
            let _ = try_send(host, content);
        }
        let _ = try_order(host, &signed(&package(content, "0.2.0", "0.1.0")));
    } else {
        host.start_in(&environment);
    }
    let begin = Instant::now();
    loop {
        if let Some(status) = host.ended() {
            assert_eq!(status.signal(), Some(9), "{status}: {}", host.log());
            return true;
        }
        if host.is_dialled() {
            let Some((session, facts)) = host.try_accept() else {
                continue;
            };
            if facts.agent_version != then(phase) {
                continue;
            }
            // Confirmed, and what is not needed any more is gone.
            let begin = Instant::now();
            while fs::read_dir(host.path("state/agent")).is_ok_and(|d| d.count() > 2) {
                if host.ended().is_some() {
                    return true;
                }
                assert!(begin.elapsed() < HANG);
            }
            drop(session);
            return false;
        }
        assert!(begin.elapsed() < HANG, "{}", host.log());
    }
}

/// The version that runs where nothing is killed.
fn then(phase: Phase) -> &'static str {
    match phase {
        Phase::Back => "0.1.0",
        _ => "0.2.0",
    }
}

/// Sends a program to an agent that may die meanwhile.
fn try_send(host: &Host, content: &[u8]) -> io::Result<()> {
    let want = wire::Want {
        digest: Digest::of(content),
        size: content.len() as u64,
    };
    let dialled = try_dial(host, wire::SERVICE, want.encode())?;
    let mut stream = dialled.map_err(io::Error::other)?;
    let next = frame::read(&mut stream, wire::BODY_MAX)?;
    let (header, body) = next.ok_or(io::ErrorKind::UnexpectedEof)?;
    let have: wire::Have = header.decode(&body).map_err(io::Error::other)?;
    stream.write_all(&content[have.bytes as usize..])?;
    frame::read(&mut stream, wire::BODY_MAX).map(drop)
}

/// As if it had been sent.
fn put_blob(host: &Host, content: &[u8]) {
    let blobs = host.path("state/blobs");
    for dir in [host.path("state"), blobs.clone()] {
        let _ = fs::create_dir(&dir);
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(blobs.join(Digest::of(content).to_string()), content).unwrap();
}

/// How many steps a phase has.
fn steps(phase: Phase, host: &mut Host, content: &[u8], more: &[(&str, String)]) -> u64 {
    let file = host.path("steps").display().to_string();
    let mut environment = more.to_vec();
    environment.push(("ADIT_TEST_STEPS_FILE", file.clone()));
    play(phase, host, content, &environment);
    let counted = fs::read_to_string(format!("{file}.{}", variable(phase))).unwrap();
    counted.parse().unwrap()
}

/// By which variable the program counts that is the one of a phase.
fn variable(phase: Phase) -> &'static str {
    match phase {
        Phase::Blob | Phase::Order | Phase::Begin => "ADIT_TEST_KILL_AT_STEP",
        Phase::Confirm | Phase::Back => "ADIT_TEST_KILL_AT_STEP_KEPT",
    }
}

/// One comes back that serves, and can be upgraded.
fn comes_back(phase: Phase, at: u64, host: &mut Host, content: &[u8]) {
    let environment = match phase {
        Phase::Back => vec![TRIAL],
        _ => vec![],
    };
    host.start_in(&environment);
    let (session, facts) = accept_as(host, &environment, |_, _| true);
    let is_known = ["0.1.0", "0.2.0"].contains(&&*facts.agent_version);
    assert!(is_known, "{phase:?} at {at}: {}", facts.agent_version);
    serves(host);
    // It stays what it is.
    host.kill();
    drop(session);
    host.start_in(&environment);
    let (session, again) = accept_as(host, &environment, |_, _| true);
    assert_eq!(
        again.agent_version, facts.agent_version,
        "{phase:?} at {at}"
    );
    if facts.agent_version == "0.1.0" && phase != Phase::Back {
        let (_session, facts) = upgrade(host, content, "0.2.0", "0.1.0");
        assert_eq!(facts.agent_version, "0.2.0", "{phase:?} at {at}");
    }
    drop(session);
}

#[test]
fn r132_an_agent_that_is_killed_at_every_step_comes_back_and_serves() {
    let hundreds = match std::env::var_os("ADIT_TEST_FULL").is_some() {
        true => 5,
        false => 1,
    };
    let programs = Programs::make();
    let (mut runs, mut kills) = (0, 0);
    for (phase, share) in PHASES {
        let (content, _) = programs.of(phase);
        let steps = steps(phase, &mut programs.host(phase), content, &[]);
        assert!(steps >= 4, "{phase:?}: {steps} steps");
        for nth in 0..share * hundreds {
            // All of them where there are fewer than runs.
            let at = 1 + nth * steps / (share * hundreds);
            let mut host = programs.host(phase);
            let at_step = [(variable(phase), at.to_string())];
            let killed = play(phase, &mut host, content, &at_step);
            (runs, kills) = (runs + 1, kills + u64::from(killed));
            assert!(killed, "{phase:?}: not killed at {at} of {steps}");
            comes_back(phase, at, &mut host, content);
        }
        println!("{phase:?}: {} runs over {steps} steps", share * hundreds);
    }
    println!("{runs} runs, {kills} kills");
    assert_eq!((runs, kills), (100 * hundreds, 100 * hundreds));
}
