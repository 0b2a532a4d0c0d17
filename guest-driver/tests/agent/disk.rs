//! A full disk in the guest: a task starts only if its result can be written, and whoever ordered it learns what was lost.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use adit_tasks::wire::{Outcome, Report, Task};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::host::*;

const FULL: &str = "guest disk full";

fn counted(host: &Host, key_seq: u64) -> Task {
    let step = counting(&host.path("count"), "echo out");
    task(host.goal(key_seq, json!([step])), "count", 1)
}

fn refused_for_space(report: &Report) {
    refused(report, "no-space");
    let why = format!("{FULL}: journal cannot be written");
    assert!(report.reason.contains(&why), "{}", report.reason);
}

#[test]
fn a_task_that_the_journal_cannot_take_is_not_started_and_runs_once_there_is_space() {
    for point in ["stored", "started"] {
        let mut host = Host::new();
        let task = counted(&host, 1);
        host.start_full_at(point);
        let (mut session, _) = host.accept();
        refused_for_space(&session.run(&task));
        assert_eq!(lines(&host.path("count")), 0, "{point}");
        host.kill();
        assert_eq!(host.run(&task).outcome, Outcome::Done, "{point}");
        assert_eq!(lines(&host.path("count")), 1, "{point}");
    }
}

#[test]
fn a_result_that_the_journal_cannot_take_is_reported_with_a_mark_and_its_task_never_runs_again() {
    let mut host = Host::new();
    let task = counted(&host, 1);
    host.start_full_at("result-stored");
    let (mut session, _) = host.accept();
    for _ in 0..2 {
        // The second time from memory.
        let report = session.run(&task);
        assert_eq!((report.outcome, report.exit), (Outcome::Done, Some(0)));
        assert_eq!(report.stdout.head, b"out\n");
        assert!(report.reason.contains(FULL), "{:?}", report.reason);
    }
    // What was not written comes before any other task.
    refused_for_space(&session.run(&counted(&host, 2)));
    host.kill();
    let report = host.run(&task);
    assert_eq!(report.outcome, Outcome::Interrupted, "{}", report.reason);
    assert_eq!(lines(&host.path("count")), 1);
}

/// Lets others write the state directory, or not: a journal there is not used.
fn open_to_others(host: &Host, open: bool) {
    let mode = if open { 0o777 } else { 0o700 };
    fs::set_permissions(host.path("state"), fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_task_that_ran_before_has_its_result_also_when_the_journal_can_be_read_only_later() {
    for (point, outcome) in [
        ("sent", Outcome::Done),
        ("acked", Outcome::Done),
        ("spawned", Outcome::Interrupted),
    ] {
        let mut host = Host::new();
        let task = counted(&host, 1);
        host.start(Some(point));
        let (mut session, _) = host.accept();
        let Some(Said::Pull(id)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        session.task(id, &task);
        while let Ok(Some(said)) = session.next() {
            if let Said::Report(id, report) = said {
                session.ack(id, &report);
            }
        }
        host.wait_for_crash();
        open_to_others(&host, true);
        host.start(None);
        let (mut session, _) = host.accept();
        let Some(Said::Pull(id)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        open_to_others(&host, false);
        session.task(id, &task);
        let Some(Said::Report(id, report)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        assert_eq!(report.outcome, outcome, "{point}: {}", report.reason);
        session.ack(id, &report);
        assert!(lines(&host.path("count")) <= 1, "{point}");
    }
}

#[test]
fn a_new_stream_brings_the_results_of_a_journal_that_can_be_read_again() {
    let mut host = Host::new();
    let task = counted(&host, 1);
    host.start(Some("sent"));
    let (mut session, _) = host.accept();
    let Some(Said::Pull(id)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    session.task(id, &task);
    while let Ok(Some(_)) = session.next() {}
    host.wait_for_crash();
    open_to_others(&host, true);
    host.start(None);
    let (mut session, _) = host.accept();
    assert!(matches!(session.next().unwrap(), Some(Said::Pull(_))));
    open_to_others(&host, false);
    drop(session);
    let (mut session, _) = host.accept();
    match session.next().unwrap() {
        Some(Said::Report(_, report)) => assert_eq!(report.outcome, Outcome::Done),
        _ => panic!("{}", host.log()),
    }
}

/// A small disk in place of the agent's state directory.
struct SmallDisk(PathBuf);

impl SmallDisk {
    const BYTES: usize = 16 << 20;

    /// None, with the reason printed, where this test may not mount.
    fn at(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let options = format!("size={},mode=700", Self::BYTES);
        let none = None::<&str>;
        match mount(
            none,
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(&options[..]),
        ) {
            Ok(()) => Some(Self(path)),
            Err(e) => {
                println!("skipped: cannot mount a tmpfs: {e}");
                None
            }
        }
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Takes all the space that is left.
    fn fill(&self) {
        let mut file = fs::File::create(self.filler()).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A step that fills a disk and then prints a line and much more.
fn filling(count: &Path, filler: &Path) -> serde_json::Value {
    let text = "echo x >>\"$1\"; cat /dev/zero >\"$2\" 2>/dev/null; echo out; head -c 200000 /dev/zero | tr '\\0' a";
    let script = json!({"interpreter": "/bin/sh", "script": text, "args": [count, filler], "output_cap": 262_144});
    json!({"id": "fill", "script": script})
}

/// Hands a task out, and returns its report, which it leaves without an answer.
fn unacknowledged(host: &Host, session: &mut Session, task: &Task) -> Report {
    let Some(Said::Pull(id)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    session.task(id, task);
    loop {
        if let Said::Report(_, report) = session.next().unwrap().unwrap() {
            return report;
        }
    }
}

#[test]
fn a_task_that_fills_the_disk_has_its_result_kept_whole_and_the_next_is_not_started() {
    let mut host = Host::new();
    let Some(disk) = SmallDisk::at(host.path("state")) else {
        return;
    };
    let count = host.path("count");
    let step = filling(&count, &disk.filler());
    let task = task(host.goal(1, json!([step])), "fill", 1);
    host.start(None);
    let (mut session, _) = host.accept();
    let first = unacknowledged(&host, &mut session, &task);
    assert_eq!(first.outcome, Outcome::Done, "{}", first.reason);
    assert_eq!(first.stdout.total, 200_004);
    // Not acknowledged, and the agent is killed: it is all in the journal.
    drop(session);
    host.kill();
    host.start(None);
    let (mut session, _) = host.accept();
    let Some(Said::Report(id, second)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    assert_eq!(second, first, "{}", host.log());
    session.ack(id, &second);
    refused_for_space(&session.run(&counted(&host, 2)));
    disk.free();
    let report = session.run(&counted(&host, 2));
    assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
    assert_eq!(lines(&count), 2);
}

#[test]
fn an_agent_that_starts_on_a_full_disk_runs_tasks_once_there_is_space() {
    let mut host = Host::new();
    let Some(disk) = SmallDisk::at(host.path("state")) else {
        return;
    };
    disk.fill();
    host.start(None);
    let (mut session, _) = host.accept();
    let is_space = |fault: &String| fault.starts_with("no-space: ") && fault.contains("make room");
    let faults = &session.enrolment.faults;
    assert!(faults.iter().any(is_space), "{faults:?}");
    refused_for_space(&session.run(&counted(&host, 1)));
    disk.free();
    let report = session.run(&counted(&host, 1));
    assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
    assert_eq!(lines(&host.path("count")), 1);
    // The host hears that it is over.
    assert!(matches!(session.next().unwrap(), Some(Said::Pull(_))));
    let faults = session.told.take().unwrap().faults;
    assert!(!faults.iter().any(is_space), "{faults:?}");
}

#[test]
fn an_output_that_does_not_fit_on_the_disk_is_said_to_be_lost_and_the_outcome_is_kept() {
    let mut host = Host::new();
    let Some(disk) = SmallDisk::at(host.path("state")) else {
        return;
    };
    // Less is held back than was: only a short result has room.
    let text = "truncate -s 400K \"$1\"; cat /dev/zero >\"$2\" 2>/dev/null; \
                head -c 262144 /dev/zero; head -c 262144 /dev/zero >&2; exit 3";
    let script = json!({"interpreter": "/bin/sh", "script": text, "output_cap": 262_144,
                        "args": [host.path("state/reserve"), disk.filler()]});
    let steps = json!([{"id": "loud", "script": script}]);
    let task = task(host.goal(1, steps), "loud", 1);
    host.start(None);
    let (mut session, _) = host.accept();
    let first = unacknowledged(&host, &mut session, &task);
    // The stream that is there gets it all.
    assert_eq!((first.outcome, first.exit), (Outcome::Failed, Some(3)));
    assert_eq!(first.stdout.total + first.stderr.total, 2 * 262_144);
    drop(session);
    host.kill();
    host.start(None);
    let (mut session, _) = host.accept();
    let Some(Said::Report(_, second)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    assert_eq!((second.outcome, second.exit), (Outcome::Failed, Some(3)));
    let says = format!("{FULL}: its output could not be kept");
    assert!(second.reason.contains(&says), "{}", second.reason);
}
