//! Journals that agents of before have written: each entry is read, and what was cut off is reported.
//! `host-proxy/tests/fixtures/README.md` says what is in them, and how they were made.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use adit_guest_driver::journal::{Journal, Phase};
use adit_tasks::wire::{Outcome, TaskId};
use adit_tasks::{PublicKey, unhex};
use ed25519_dalek::SigningKey;
use serde_json::Value;

use crate::host::{Host, Said};

/// Builds by the schema of the database that their aditd had.
const BUILDS: std::ops::RangeInclusive<u32> = 1..=3;

fn fixture(name: &str, build: u32, ending: &str) -> PathBuf {
    let name = format!("tests/fixtures/{name}-{build}.{ending}");
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Puts a copy of such a journal into a directory of an agent.
fn put(name: &str, build: u32, dir: &Path) {
    fs::DirBuilder::new().mode(0o700).create(dir).unwrap();
    fs::copy(fixture(name, build, "redb"), dir.join("journal.redb")).unwrap();
}

/// The tasks of the guest: id, step, and the state that its host knew when the guest was killed.
fn tasks(build: u32) -> Vec<(TaskId, String, String)> {
    let text = fs::read(fixture("running", build, "json")).unwrap();
    let list: Vec<Value> = serde_json::from_slice(&text).unwrap();
    let field = |t: &Value, key: &str| t[key].as_str().unwrap().to_owned();
    let tasks = list.iter();
    tasks
        .map(|t| {
            (
                unhex(&field(t, "task_id")).unwrap(),
                field(t, "step"),
                field(t, "state"),
            )
        })
        .collect()
}

#[test]
fn a_journal_of_every_build_says_of_each_task_how_far_it_was() {
    for build in BUILDS {
        let dir = tempfile::tempdir().unwrap();
        put("running", build, &dir.path().join("state"));
        let mut journal = Journal::open(&dir.path().join("state")).unwrap();
        let mut started = Vec::new();
        for (id, step, state) in tasks(build) {
            let phase = journal.phase(&id).unwrap();
            let ended = |outcome| Some(Phase::Acked(outcome));
            let want = match state.as_str() {
                "done" => ended(Outcome::Done),
                "failed" => ended(Outcome::Failed),
                "timed_out" => ended(Outcome::TimedOut),
                "interrupted" => ended(Outcome::Interrupted),
                "leased" => Some(Phase::Received),
                // Nothing of these was ever done in the guest.
                "refused" | "skipped" | "queued" => None,
                "started" => {
                    let unfinished = journal.unfinished().unwrap();
                    started.push(id);
                    let at_ms = unfinished.iter().find(|u| u.0 == id).unwrap().1;
                    Some(Phase::Started { at_ms })
                }
                other => panic!("{other}"),
            };
            assert_eq!(phase, want, "build {build}: {step}");
        }
        let unfinished = journal.unfinished().unwrap();
        assert!(unfinished.iter().map(|u| &u.0).eq(&started));
        assert!(journal.unacknowledged().unwrap().is_empty());
        // The highest goals of both keys; of a stranger's key there is none.
        for (seed, seq) in [(7, Some(10)), (8, Some(6)), (9, None)] {
            let key = PublicKey::of(&SigningKey::from_bytes(&[seed; 32]), "");
            let window = journal.window(&key.id().0).unwrap();
            let last = window.last().map(|(last, _)| last);
            // What is below it may have run.
            assert_eq!(
                (last, window.floor()),
                (seq, seq),
                "build {build}: key {seed}"
            );
        }
    }
}

#[test]
fn a_result_in_a_journal_of_every_build_is_reported() {
    for build in BUILDS {
        // In the one, the agent has yet to find out that the task was cut off. In the other, it had.
        for name in ["running", "reporting"] {
            let mut host = Host::new();
            put(name, build, &host.path("state"));
            let runs = tasks(build).into_iter().find(|t| t.1 == "runs").unwrap();
            host.start(None);
            let (mut session, _) = host.accept();
            let Some(Said::Report(id, report)) = session.next().unwrap() else {
                panic!("{name}-{build}: {}", host.log())
            };
            assert_eq!(
                (report.task_id, report.outcome),
                (runs.0, Outcome::Interrupted)
            );
            session.ack(id, &report);
            assert!(matches!(session.next().unwrap(), Some(Said::Pull(_))));
            host.kill();
            let mut journal = Journal::open(&host.path("state")).unwrap();
            let acked = Some(Phase::Acked(Outcome::Interrupted));
            assert_eq!(journal.phase(&runs.0).unwrap(), acked, "{name}-{build}");
        }
    }
}
