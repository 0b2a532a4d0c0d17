//! Tasks by digest, and goals whose time is to come, with a host that knows `wire::WINDOW`.

use std::time::{SystemTime, UNIX_EPOCH};

use adit_tasks::recent;
use adit_tasks::wire::{self, Outcome, Task};
use serde_json::json;

use crate::host::*;

fn with_window() -> Host {
    let mut host = Host::new();
    host.features = wire::WINDOW;
    host
}

/// The agent's next pull; what it says before that is asserted to be advice.
fn pull(session: &mut Session) -> u32 {
    loop {
        match session.next().unwrap().expect("the agent is gone") {
            Said::Pull(id) => return id,
            Said::Started | Said::Held(_) => {}
            Said::Lacks(..) | Said::Report(..) | Said::Trust(_) => panic!("not a pull"),
        }
    }
}

/// Takes the report of a task.
fn done(session: &mut Session, task: &Task) {
    loop {
        match session.next().unwrap().expect("the agent is gone") {
            Said::Report(id, report) => {
                assert_eq!(report.task_id, task.task_id);
                assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
                return session.ack(id, &report);
            }
            Said::Started => {}
            _ => panic!("not a report"),
        }
    }
}

fn steps(host: &Host, names: &[&str]) -> Vec<Task> {
    let steps: Vec<_> = names
        .iter()
        .map(|name| {
            let mut step = counting(&host.path("count"), "");
            step["id"] = json!(name);
            step
        })
        .collect();
    let envelope = host.goal(1, json!(steps));
    let task = |name: &&str| task(envelope.clone(), name, 1);
    names.iter().map(task).collect()
}

#[test]
fn an_envelope_is_sent_once_and_its_other_tasks_by_digest() {
    let mut host = with_window();
    let tasks = steps(&host, &["one", "two", "three"]);
    let digest = recent::digest(&tasks[0].envelope);
    host.start(None);
    let (mut session, _) = host.accept();
    session.goal(&tasks[0].envelope);
    for task in &tasks {
        let id = pull(&mut session);
        session.task_of(id, task, digest);
        done(&mut session, task);
    }
    assert_eq!(lines(&host.path("count")), 3);
    // A stream of its own begins with nothing.
    drop(session);
    let (mut session, _) = host.accept();
    let id = pull(&mut session);
    session.task_of(id, &tasks[0], digest);
    let said = session.next().unwrap();
    assert!(matches!(said, Some(Said::Lacks(_, lacks)) if lacks.digest == digest));
}

#[test]
fn r85_a_digest_that_was_never_sent_is_asked_for_once_and_then_ends_the_stream() {
    let mut host = with_window();
    let tasks = steps(&host, &["one"]);
    let digest = recent::digest(&tasks[0].envelope);
    host.start(None);
    let (mut session, _) = host.accept();
    for honest in [false, true] {
        let id = pull(&mut session);
        session.task_of(id, &tasks[0], digest);
        let Some(Said::Lacks(id, lacks)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        assert_eq!(lacks.digest, digest);
        if honest {
            session.goal(&tasks[0].envelope);
            session.task_of(id, &tasks[0], digest);
            done(&mut session, &tasks[0]);
        } else {
            // Another goal instead, under the digest that it does not have.
            session.goal(&host.goal(2, json!([counting(&host.path("other"), "")])));
            session.task_of(id, &tasks[0], digest);
            assert!(session.next().map_or(true, |said| said.is_none()));
            session = host.accept().0;
        }
    }
    assert_eq!(lines(&host.path("count")), 1);
    assert!(!host.path("other").exists());
}

#[test]
fn r101_a_flood_of_goals_pushes_out_what_was_not_used_and_costs_no_more() {
    let mut host = with_window();
    let tasks = steps(&host, &["one"]);
    let digest = recent::digest(&tasks[0].envelope);
    host.start(None);
    let (mut session, _) = host.accept();
    session.goal(&tasks[0].envelope);
    for n in 0..64u8 {
        session.goal(&vec![n; adit_tasks::dsse::ENVELOPE_MAX]);
    }
    let id = pull(&mut session);
    session.task_of(id, &tasks[0], digest);
    let Some(Said::Lacks(id, _)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    session.goal(&tasks[0].envelope);
    session.task_of(id, &tasks[0], digest);
    done(&mut session, &tasks[0]);
}

#[test]
fn an_envelope_that_is_none_is_refused_by_its_task() {
    let mut host = with_window();
    let mut task = steps(&host, &["one"]).remove(0);
    task.envelope = b"nonsense".to_vec();
    host.start(None);
    let (mut session, _) = host.accept();
    let id = pull(&mut session);
    session.goal(&task.envelope);
    session.task_of(id, &task, recent::digest(&task.envelope));
    let Some(Said::Report(_, report)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    refused(&report, "bad-envelope");
}

#[test]
fn a_goal_whose_time_is_to_come_is_given_back_and_others_run_meanwhile() {
    let mut host = with_window();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let from = i64::try_from(now.as_secs()).unwrap() + 4;
    let mut early = goal(1, "web-1", json!([counting(&host.path("early"), "")]));
    early["not_before"] = json!(jiff::Timestamp::from_second(from).unwrap().to_string());
    let early = task(host.sign(&early), "count", 1);
    let other = task(
        host.goal(2, json!([counting(&host.path("other"), "")])),
        "count",
        1,
    );
    host.start(None);
    let (mut session, _) = host.accept();
    let id = pull(&mut session);
    session.task(id, &early);
    let Some(Said::Held(held)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    assert_eq!(held.not_before_ms, from as u64 * 1000);
    // It pulls again at once, and takes a goal of a higher number of the same key.
    let id = pull(&mut session);
    session.task(id, &other);
    done(&mut session, &other);
    assert!(!host.path("early").exists());
    // Idle in its pull, it says when the time has come.
    let id = pull(&mut session);
    let before = session.clocks.len();
    let told = loop {
        session.wait_for_clock();
        let told = *session.clocks.last().unwrap();
        if told >= held.not_before_ms {
            break told;
        }
    };
    assert!(session.clocks.len() > before && told < held.not_before_ms + 60_000);
    session.task(id, &early);
    done(&mut session, &early);
    assert_eq!(lines(&host.path("early")), 1);
}

#[test]
fn r101_one_goal_more_than_are_given_back_waits_no_longer_than_the_first_of_those() {
    let mut host = with_window();
    host.start(None);
    let early = |key_seq: u64, in_s: i64| {
        let from = jiff::Timestamp::now().as_second() + in_s;
        let mut early = goal(key_seq, "web-1", json!([counting(&host.path("early"), "")]));
        early["not_before"] = json!(jiff::Timestamp::from_second(from).unwrap().to_string());
        task(host.sign(&early), "count", 1)
    };
    let (mut session, _) = host.accept();
    let give_back = |session: &mut Session, task: &Task| {
        let id = pull(session);
        session.task(id, task);
        let said = session.next().unwrap();
        assert!(matches!(said, Some(Said::Held(_))), "{}", host.log());
    };
    for n in 1..wire::HELD_MAX as u64 {
        give_back(&mut session, &early(n, 36_000));
    }
    let first = early(5000, 5);
    give_back(&mut session, &first);
    // There is no room for this one: the agent keeps it, and does not pull.
    give_back(&mut session, &early(6000, 30_000_000));
    let said = session.next().unwrap();
    assert!(matches!(said, Some(Said::Held(_))), "{}", host.log());
    let id = pull(&mut session);
    session.task(id, &first);
    done(&mut session, &first);
    assert_eq!(lines(&host.path("early")), 1);
}
