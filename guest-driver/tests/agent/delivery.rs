//! The delivery promise: every task one terminal state, begun at most once, its result kept until acknowledged.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use adit_tasks::wire::{Outcome, Report};
use serde_json::json;

use crate::host::*;

/// An agent is back within a second; other tests on the same processors may have them for longer.
const SOON: Duration = Duration::from_secs(5);

/// Plays the host until the agent pulls with nothing left to do (true) or is gone (false). The first report counts.
fn serve(host: &Host, task: &adit_tasks::wire::Task, terminal: &mut Option<Report>) -> bool {
    let (mut session, _) = host.accept();
    loop {
        match session.next() {
            Ok(Some(Said::Pull(_))) if terminal.is_some() => return true,
            Ok(Some(Said::Pull(id))) => session.task(id, task),
            Ok(Some(Said::Started | Said::Held(_) | Said::Lacks(..) | Said::Trust(_))) => {}
            Ok(Some(Said::Report(id, report))) => {
                let first = terminal.get_or_insert_with(|| report.clone());
                assert_eq!(
                    (first.task_id, first.outcome),
                    (report.task_id, report.outcome),
                    "two terminal states"
                );
                session.ack(id, &report);
            }
            Ok(None) | Err(_) => return false,
        }
    }
}

#[test]
fn r88_killed_at_each_point_a_task_is_begun_once_at_most_and_ends_once() {
    use Outcome::{Done, Interrupted};
    for (point, outcome, began) in [
        ("received", Done, 1..=1),
        ("stored", Done, 1..=1),
        ("started", Interrupted, 0..=0),
        ("spawned", Interrupted, 0..=1),
        ("child-done", Interrupted, 1..=1),
        ("result-stored", Done, 1..=1),
        ("sent", Done, 1..=1),
        ("acked", Done, 1..=1),
    ] {
        let mut host = Host::new();
        let file = host.path("count");
        let task = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
        let mut terminal = None;
        host.start(Some(point));
        assert!(
            !serve(&host, &task, &mut terminal),
            "{point} was never reached"
        );
        host.wait_for_crash();
        host.start(None);
        assert!(
            serve(&host, &task, &mut terminal),
            "{point}: {}",
            host.log()
        );
        let report = terminal.clone().unwrap();
        assert_eq!(report.outcome, outcome, "{point}: {}", report.reason);
        assert!(
            began.contains(&lines(&file)),
            "{point}: begun {} times",
            lines(&file)
        );
        // A host that lost its database hands it out again: same answer, no second run.
        host.kill();
        let again = host.run(&task);
        assert_eq!(again.outcome, outcome, "{point}: {}", again.reason);
        assert!(
            began.contains(&lines(&file)),
            "{point}: begun {} times",
            lines(&file)
        );
    }
}

#[test]
fn an_interrupted_step_runs_again_only_as_an_allowed_attempt() {
    for (idempotent, want) in [(true, Outcome::Done), (false, Outcome::Refused)] {
        let mut host = Host::new();
        let file = host.path("count");
        let mut step = counting(&file, "");
        step["idempotent"] = json!(idempotent);
        let envelope = host.goal(1, json!([step]));
        refused(&host.run(&task(envelope.clone(), "count", 2)), "attempt");
        host.start(Some("child-done"));
        let mut terminal = None;
        assert!(!serve(
            &host,
            &task(envelope.clone(), "count", 1),
            &mut terminal
        ));
        host.wait_for_crash();
        host.start(None);
        let (mut session, _) = host.accept();
        let report = session.run(&task(envelope, "count", 2));
        assert_eq!(report.outcome, want, "{}", report.reason);
        assert_eq!(lines(&file), if idempotent { 2 } else { 1 });
    }
}

pub fn fifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

#[test]
fn a_stream_that_ends_in_mid_task_is_replaced_at_once_and_the_task_reported_once() {
    for ends_while_away in [false, true] {
        let mut host = Host::new();
        let [file, up, go] = ["count", "up", "go"].map(|name| host.path(name));
        fifo(&up);
        fifo(&go);
        let text = "echo x >>\"$1\"; echo up >\"$2\"; read word <\"$3\"; echo \"$word\"";
        let step = json!({"id": "long", "script": {"interpreter": "/bin/sh", "script": text, "args": [file, up, go]}});
        let task = task(host.goal(1, json!([step])), "long", 1);
        host.start(None);
        let (mut session, _) = host.accept();
        let Some(Said::Pull(id)) = session.next().unwrap() else {
            panic!()
        };
        session.task(id, &task);
        assert_eq!(fs::read_to_string(&up).unwrap(), "up\n");
        // Twice: what was taken up once is taken up again.
        for _ in 0..2 {
            let lost = Instant::now();
            drop(session);
            session = host.accept().0;
            assert!(lost.elapsed() < SOON, "{}", host.log());
            let said = session.next().unwrap();
            assert!(matches!(said, Some(Said::Started)), "{}", host.log());
        }
        if ends_while_away {
            drop(session);
            fs::write(&go, "went on\n").unwrap();
            let begin = Instant::now();
            while !host.log().contains("adit-guest: ended") {
                assert!(begin.elapsed() < Duration::from_secs(60), "{}", host.log());
                std::thread::sleep(Duration::from_millis(5));
            }
            session = host.accept().0;
        } else {
            fs::write(&go, "went on\n").unwrap();
        }
        let report = loop {
            match session.next().unwrap() {
                Some(Said::Report(id, report)) => {
                    session.ack(id, &report);
                    break report;
                }
                // Ended while away it may have been taken up before its end was seen.
                Some(Said::Started) if ends_while_away => {}
                _ => panic!("{}", host.log()),
            }
        };
        assert_eq!(report.task_id, task.task_id);
        assert_eq!(
            (report.outcome, &report.stdout.head[..]),
            (Outcome::Done, &b"went on\n"[..])
        );
        assert_eq!(lines(&file), 1);
        // Nothing is said of it again, and the next pull has the same answer as ever.
        let Some(Said::Pull(id)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        session.task(id, &task);
        let Some(Said::Report(_, again)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        assert_eq!((again.outcome, lines(&file)), (Outcome::Done, 1));
    }
}

pub fn in_environment(task: &str) -> usize {
    let want = format!("ADIT_TASK_ID={task}");
    let bears = |dir: &Path| {
        let env = fs::read(dir.join("environ")).unwrap_or_default();
        env.split(|&b| b == 0).any(|v| v == want.as_bytes())
    };
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|e| bears(&e.path()))
        .count()
}

#[test]
fn r98_a_restarted_agent_kills_what_runs_and_reports_it_interrupted() {
    let mut host = Host::new();
    let fifo = host.path("fifo");
    self::fifo(&fifo);
    let text = "trap '' TERM; setsid sleep 1000 & (setsid sh -c 'sleep 1000; :' &); echo up >\"$1\"; sleep 1000";
    let step =
        json!({"id": "long", "script": {"interpreter": "/bin/sh", "script": text, "args": [fifo]}});
    let task = task(host.goal(1, json!([step])), "long", 1);
    host.start(None);
    let (mut session, _) = host.accept();
    let Some(Said::Pull(id)) = session.next().unwrap() else {
        panic!()
    };
    session.task(id, &task);
    let mut up = String::new();
    BufReader::new(fs::File::open(&fifo).unwrap())
        .read_line(&mut up)
        .unwrap();
    assert_eq!(up, "up\n");
    let name = adit_tasks::hex(&task.task_id);
    assert!(in_environment(&name) >= 3);
    host.kill();
    host.start(None);
    let (mut session, _) = host.accept();
    let Some(Said::Report(id, report)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    assert_eq!(
        (report.task_id, report.outcome),
        (task.task_id, Outcome::Interrupted)
    );
    assert_eq!(in_environment(&name), 0);
    session.ack(id, &report);
    assert_eq!(session.run(&task).outcome, Outcome::Interrupted);
}

#[test]
fn a_result_outlives_a_host_that_went_away_before_acknowledging() {
    let mut host = Host::new();
    let file = host.path("count");
    let task = task(
        host.goal(
            1,
            json!([counting(&file, "echo out; echo err >&2; exit 3")]),
        ),
        "count",
        1,
    );
    host.start(None);
    let (mut session, _) = host.accept();
    let Some(Said::Pull(id)) = session.next().unwrap() else {
        panic!()
    };
    session.task(id, &task);
    let first = loop {
        if let Said::Report(_, report) = session.next().unwrap().unwrap() {
            break report;
        }
    };
    // Not acknowledged: the host dies, comes back, and gets the same report on the next stream, by itself.
    drop(session);
    let (mut session, _) = host.accept();
    let Some(Said::Report(_, second)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    assert_eq!(first, second);
    assert_eq!((second.outcome, second.exit), (Outcome::Failed, Some(3)));
    assert_eq!(
        (&second.stdout.head[..], &second.stderr.head[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(lines(&file), 1);
}

#[test]
fn r100_a_damaged_journal_leaves_the_agent_reachable_and_every_task_refused_by_name() {
    let mut host = Host::new();
    let file = host.path("count");
    let good = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    assert_eq!(host.run(&good).outcome, Outcome::Done);
    let journal = host.path("state/journal.redb");
    let whole = fs::read(&journal).unwrap();
    // Everything behind the header page, then everything.
    for from in [4096, 0] {
        let mut damaged = whole.clone();
        damaged[from..]
            .iter_mut()
            .for_each(|b| *b = b.wrapping_mul(31).wrapping_add(7));
        fs::write(&journal, damaged).unwrap();
        let next = task(host.goal(2, json!([counting(&file, "")])), "count", 1);
        refused(&host.run(&next), "journal-corrupt");
        host.kill();
        host.start(None);
        let (session, _) = host.accept();
        let faults = &session.enrolment.faults;
        let remedy = "restore";
        assert!(
            faults[0].starts_with("journal-corrupt: ") && faults[0].contains(remedy),
            "{faults:?}"
        );
        host.kill();
    }
    assert_eq!(lines(&file), 1);
}

#[test]
fn a_hostile_host_ends_its_stream_and_no_more() {
    let mut host = Host::new();
    host.start(None);
    let (mut session, _) = host.accept();
    assert!(matches!(session.next().unwrap(), Some(Said::Pull(_))));
    // An answer to another question.
    let file = host.path("count");
    let task = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    session.task(77, &task);
    assert!(session.next().map_or(true, |m| m.is_none()));
    let (mut session, _) = host.accept();
    assert_eq!(session.run(&task).outcome, Outcome::Done);
}

/// A host that has forgotten the stream acknowledges nothing, and nobody says so: it is dialled anew.
#[test]
fn a_report_that_is_not_acknowledged_is_delivered_on_a_new_stream() {
    let mut host = Host::new();
    let file = host.path("count");
    let task = task(host.goal(1, json!([counting(&file, "")])), "count", 1);
    host.start(None);
    let (mut silent, _) = host.accept();
    let mut reported = false;
    while !reported {
        match silent.next().unwrap().unwrap() {
            Said::Pull(id) => silent.task(id, &task),
            Said::Started | Said::Held(_) | Said::Lacks(..) | Said::Trust(_) => {}
            Said::Report(..) => reported = true,
        }
    }
    // Its end stays open.
    let mut terminal = None;
    assert!(serve(&host, &task, &mut terminal), "{}", host.log());
    assert_eq!(terminal.unwrap().outcome, Outcome::Done);
    assert_eq!(lines(&file), 1);
    drop(silent);
}

/// As one does whose disk is full: it cannot keep the report.
#[test]
fn a_host_that_accepts_and_breaks_off_is_dialled_less_and_less_often() {
    let mut host = Host::new();
    host.start(None);
    let begin = Instant::now();
    for _ in 0..6 {
        drop(host.accept());
    }
    // 0.1 s, 0.2 s, 0.4 s, 0.8 s and 1.6 s, or half of each.
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(1550), "{took:?}");
}
