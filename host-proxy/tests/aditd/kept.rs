//! Which tasks are kept, how they are listed, and when they are handed out.

use std::time::{Duration, SystemTime};

use adit_tasks::wire::{Captured, Outcome, Pull, WireKind};
use jiff::Timestamp;

use crate::host::{Host, report};
use crate::tasks::{LATER, apply, goal_from};

#[test]
fn r112_ended_tasks_are_kept_within_the_vms_quota_and_listed_in_pages() {
    let (host, ports) = Host::serving(
        &[("a", 3)],
        "[limits]\nkept_per_vm = 7\nkept_mib_per_vm = 1",
    );
    let mut agent = ports[0].connected().agent();
    for n in 1..=6 {
        assert_eq!(apply(&host, n).status, 200);
        for _ in 0..2 {
            let id = agent.pull().task_id;
            agent.report(id, Outcome::Done);
        }
    }
    // 12 tasks have ended. The newest 7 are kept.
    let all = host.get("/v1/tasks");
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 7);
    assert_eq!(
        host.api("GET", "/v1/goals/01937b5e-0000-7000-8000-000000000001", "")
            .status,
        404
    );
    let (mut got, mut after) = (Vec::new(), String::from("0"));
    loop {
        let answer = host.api("GET", &format!("/v1/tasks?limit=3&after={after}"), "");
        let page: Vec<serde_json::Value> = serde_json::from_str(&answer.body).unwrap();
        assert!(page.len() <= 3);
        got.extend(page);
        let next = answer
            .head
            .lines()
            .find_map(|l| l.strip_prefix("adit-next: "));
        match next {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(&got, all);
    let id = all[2]["task_id"].as_str().unwrap();
    let one = host.get(&format!("/v1/tasks?id={id}"));
    assert_eq!(one.as_array().unwrap()[..], all[2..3]);
    // Output beyond the goal's limit (64 KiB of each stream) is cut off, and no more than 1 MiB is kept.
    let large = Captured {
        head: vec![b'x'; 100 << 10],
        tail: vec![b'y'; 100 << 10],
        total: 1 << 20,
    };
    for n in 7..=10 {
        apply(&host, n);
        for _ in 0..2 {
            let id = agent.pull().task_id;
            let mut report = report(id, Outcome::Done);
            report.stdout = large.clone();
            report.stderr = large.clone();
            agent.say(WireKind::Report, 9, &report);
            agent.acknowledged(id);
        }
    }
    let kept = host.get("/v1/tasks");
    assert_eq!(kept.as_array().unwrap().len(), 7);
    for task in kept.as_array().unwrap() {
        let id = task["task_id"].as_str().unwrap();
        let output = host.api("GET", &format!("/v1/tasks/{id}/output"), "").body;
        assert!(output.len() < (64 << 10) + 64, "{}", output.len());
    }
}

#[test]
fn a_list_of_several_pages_is_one_json_array() {
    let (host, _ports) = Host::serving(&[("a", 3)], "[limits]\nqueued_per_vm = 1000000");
    for n in 0..260 {
        assert_eq!(apply(&host, n).status, 200);
    }
    let tasks = host.get("/v1/tasks");
    let mut ids: Vec<_> = tasks
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["task_id"].to_string())
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 520);
    // A page may have any length but 0.
    let page = |limit: &str| {
        host.get(&format!("/v1/tasks?limit={limit}"))
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!((page("1000000"), page("0")), (500, 1));
}

#[test]
fn a_goal_that_is_not_valid_yet_is_held_and_handed_out_when_its_time_comes() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let mut agent = ports[0].connected().agent();
    // The pull comes first. Only the time can wake it.
    agent.say(WireKind::Pull, 7, &Pull { epoch: 1 });
    let at = Timestamp::try_from(SystemTime::now() + Duration::from_secs(2)).unwrap();
    let answer = host.api("POST", "/v1/goals", &goal_from(1, &at.to_string(), LATER));
    assert_eq!(answer.status, 200, "{}", answer.body);
    // A busy machine may take longer than that to answer.
    let held = answer.body.contains("held until");
    assert!(held || Timestamp::now() >= at, "{}", answer.body);
    assert_eq!(agent.task().step_id, "one");
    assert!(Timestamp::now() >= at);
}

#[test]
fn a_report_of_an_unknown_task_is_acknowledged_and_changes_nothing() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let mut agent = ports[0].connected().agent();
    assert_eq!(apply(&host, 1).status, 200);
    let tasks = host.get("/v1/tasks");
    let id = adit_tasks::unhex(tasks[0]["task_id"].as_str().unwrap()).unwrap();
    // For example after the database was restored from an older copy. Without an answer the guest would wait for ever.
    agent.report(id, Outcome::Done);
    assert_eq!(host.get("/v1/tasks"), tasks);
    assert_eq!(agent.pull().task_id, id);
}

#[test]
fn what_ends_because_its_time_is_over_or_its_vm_is_removed_is_kept_within_the_quota_too() {
    let (host, _) = Host::serving(&[], "[limits]\nkept_per_vm = 3");
    let new = r#"{"name": "a", "cid": 3}"#;
    host.api("POST", "/v1/vms", new);
    let now = SystemTime::now();
    let at = |time: SystemTime| Timestamp::try_from(time).unwrap().to_string();
    let (from, until) = (
        at(now - Duration::from_secs(60)),
        now + Duration::from_secs(3),
    );
    for n in 1..=3 {
        let goal = goal_from(n, &from, &at(until));
        assert_eq!(host.api("POST", "/v1/goals", &goal).status, 200);
    }
    let states = |host: &Host| {
        let tasks = host.get("/v1/tasks");
        let tasks = tasks.as_array().unwrap().iter();
        tasks.map(|t| t["state"].to_string()).collect::<Vec<_>>()
    };
    host.until("they expire", |h| {
        (states(h)[..] == ["\"expired\""; 3]).then_some(())
    });
    for n in 4..=5 {
        assert_eq!(apply(&host, n).status, 200);
    }
    assert_eq!(states(&host).len(), 7);
    assert_eq!(host.api("DELETE", "/v1/vms/a", "").status, 204);
    assert_eq!(states(&host).len(), 3);
}
