//! What the API answers where there is nothing to answer: not an empty list, not a stream that just ends.

use std::io::{BufRead, BufReader, Read, Write};

use adit_tasks::wire::{Captured, Outcome, WireKind};
use serde_json::Value;

use crate::host::{Answer, Host, report};
use crate::tasks::{LATER, apply, goal, goal_id};

fn code(answer: &Answer) -> (u16, String) {
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    let code = body["code"].as_str().unwrap_or_default();
    (answer.status, code.to_owned())
}

#[test]
fn a_wait_for_a_vm_that_is_removed_ends_at_once() {
    let (mut host, _ports) = Host::new(&[("a", 3)], "");
    let port = host.port("b", 9);
    host.start();
    let added = host.api("POST", "/v1/vms", r#"{"name": "b", "cid": 9}"#);
    assert_eq!(added.status, 200, "{}", added.body);
    let control = port.connected();
    let mut waiting = host.operator();
    let path = "/v1/vms/b/wait?for=agent&timeout_ms=3600000";
    write!(
        waiting,
        "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    std::thread::scope(|s| {
        let removed = s.spawn(|| host.api("DELETE", "/v1/vms/b", "").status);
        let mut text = Vec::new();
        waiting.read_to_end(&mut text).unwrap();
        let answer = Answer::parse(&text).unwrap();
        assert_eq!(code(&answer), (404, "unknown-vm".into()));
        // Its port process is told to end, and does.
        drop(control);
        drop(port);
        assert_eq!(removed.join().unwrap(), 204);
    });
}

#[test]
fn a_wait_that_is_over_says_what_is_known_of_the_agent() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let wait = || {
        host.api("GET", "/v1/vms/a/wait?for=agent&timeout_ms=1", "")
            .body
    };
    host.until("its driver runs", |h| {
        (h.get("/v1/vms/a")["state"] == "up").then_some(())
    });
    let said = wait();
    assert!(said.contains("no agent has been heard"), "{said}");
    let agent = control.agent();
    host.until("the agent is there", |h| {
        (h.get("/v1/vms/a")["state"] == "ready").then_some(())
    });
    drop(agent);
    host.until("the agent is lost", |h| {
        (h.get("/v1/vms/a")["state"] == "up").then_some(())
    });
    let said = wait();
    assert!(said.contains("was last heard"), "{said}");
    assert!(!said.contains("does not run"), "{said}");
}

#[test]
fn an_agent_that_is_back_is_ready_once_it_has_said_who_it_is() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut before = control.agent();
    before.heard();
    let state = || host.get("/v1/vms/a")["state"].clone();
    assert_eq!(state(), "ready");
    let mut back = control.silent_agent(0);
    back.heard();
    assert_eq!(state(), "up");
    // What was known of it is shown meanwhile.
    assert_eq!(host.get("/v1/vms/a")["agent"], "1");
    back.facts("a", 1);
    back.heard();
    assert_eq!(state(), "ready");
}

#[test]
fn filters_that_name_nothing_known_are_errors() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    let unknown = goal_id(9);
    for (path, want) in [
        ("/v1/tasks?vm=b", "unknown-vm"),
        ("/v1/tasks?vm=b&newest=5", "unknown-vm"),
        ("/v1/tasks?vm=B..", "unknown-vm"),
        (&format!("/v1/tasks?goal={unknown}"), "unknown-goal"),
        (
            &format!("/v1/tasks?goal={unknown}&newest=5"),
            "unknown-goal",
        ),
        (&format!("/v1/events?goal={unknown}"), "unknown-goal"),
        (&format!("/v1/goals/{unknown}"), "unknown-goal"),
    ] {
        assert_eq!(
            code(&host.api("GET", path, "")),
            (404, want.into()),
            "{path}"
        );
    }
    let dnoe = host.api("GET", "/v1/tasks?state=dnoe", "");
    assert_eq!(code(&dnoe), (400, "usage".into()));
    assert!(dnoe.body.contains("lost_contact"), "{}", dnoe.body);
    // What is known may have no tasks.
    for path in ["/v1/tasks?vm=a", "/v1/tasks?newest=3", "/v1/goals"] {
        assert_eq!(host.get(path), serde_json::json!([]), "{path}");
    }
    apply(&host, 9);
    let none = host.get(&format!("/v1/tasks?goal={unknown}&state=done"));
    assert_eq!(none, serde_json::json!([]));
}

#[test]
fn a_stream_of_events_that_ends_without_a_verdict_is_cut_off() {
    let (mut host, _ports) = Host::serving(&[("a", 3)], "");
    apply(&host, 1);
    let mut stream = BufReader::new(host.operator());
    let request = "GET /v1/events HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    let mut text = Vec::new();
    // It has begun when it has named a task.
    while !String::from_utf8_lossy(&text).contains("task_id") {
        stream.read_until(b'\n', &mut text).unwrap();
    }
    host.terminate();
    // A reset is as clear.
    let _ = stream.read_to_end(&mut text);
    assert!(Answer::parse(&text).is_err());
    assert!(host.ended());
}

#[test]
fn the_newest_tasks_and_goals_are_listed_with_where_the_earlier_ones_are() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    for n in 1..=3 {
        assert_eq!(apply(&host, n).status, 200);
    }
    let all = host.get("/v1/tasks");
    let answer = host.api("GET", "/v1/tasks?newest=2", "");
    let newest: Vec<Value> = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(newest, all.as_array().unwrap()[4..]);
    let field = |answer: &Answer| {
        let mut lines = answer.head.lines();
        lines.find_map(|l| l.strip_prefix("adit-earlier: ").map(str::to_owned))
    };
    let before = field(&answer).unwrap();
    let answer = host.api("GET", &format!("/v1/tasks?newest=500&before={before}"), "");
    let earlier: Vec<Value> = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(earlier, all.as_array().unwrap()[..4]);
    assert_eq!(field(&answer), None);
    let goals = host.get("/v1/goals?newest=1");
    let goal = &goals.as_array().unwrap()[0];
    assert_eq!(
        (&goal["goal_id"], &goal["open"]),
        (&goal_id(3).into(), &2.into())
    );
    assert_eq!(goal["signer"].as_str().unwrap().len(), 32);
}

#[test]
fn a_goal_whose_time_is_over_is_refused_with_the_time() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    let answer = host.api("POST", "/v1/goals", &goal(1, "2021-01-01T00:00:00Z"));
    assert_eq!(code(&answer), (422, "expired".into()));
    assert!(answer.body.contains("2021-01-01"), "{}", answer.body);
    let answer = host.api("POST", "/v1/goals", &goal(1, LATER));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[test]
fn an_output_with_something_missing_says_where() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let mut agent = ports[0].connected().agent();
    apply(&host, 1);
    let id = agent.pull().task_id;
    let mut ended = report(id, Outcome::Done);
    ended.stdout = Captured {
        head: b"ab".into(),
        tail: b"cd".into(),
        total: 74,
    };
    agent.say(WireKind::Report, 9, &ended);
    agent.acknowledged(id);
    let path = format!("/v1/tasks/{}/output", adit_tasks::hex(&id));
    let answer = host.api("GET", &path, "");
    assert!(
        answer.head.contains("adit-left-out: 2 70"),
        "{}",
        answer.head
    );
    assert_eq!(answer.body, format!("ab{}cd", adit_api::left_out(70)));
    let answer = host.api("GET", &format!("{path}?stream=stderr"), "");
    assert!(!answer.head.contains("adit-left-out"), "{}", answer.head);
}
