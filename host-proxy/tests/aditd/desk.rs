//! What a step of a goal costs on disk, and what is seen of it meanwhile.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use adit_tasks::wire::{Outcome, Started, TaskId, WireKind};
use adit_tasks::{dsse, hex};
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use crate::host::{Agent, Host};
use crate::tasks::{LATER, apply, goal_id};

/// Hands over a goal with so many steps.
fn apply_steps(host: &Host, n: u64, steps: usize) {
    let step =
        |at| json!({"id": format!("s{at}"), "script": {"interpreter": "/bin/sh", "script": "x"}});
    let payload = json!({
        "goal_id": goal_id(n), "key_seq": n, "audience": {"vms": ["a"]}, "not_before": "2020-01-01T00:00:00Z",
        "not_after": LATER, "min_planner": 1, "steps": (0..steps).map(step).collect::<Vec<_>>(),
    });
    let key = SigningKey::from_bytes(&[7; 32]);
    let envelope = dsse::sign(payload.to_string().as_bytes(), &key);
    let body = json!({ "envelope": envelope }).to_string();
    assert_eq!(host.api("POST", "/v1/goals", &body).status, 200);
}

/// Which log it is, and the transactions in it, as they are on disk: frames of SQLite's write-ahead log that end one.
fn commits(host: &Host) -> (Vec<u8>, usize) {
    let wal = fs::read(Path::new(&host.state_dir()).join("aditd.db-wal")).unwrap();
    let word = |at: usize| u32::from_be_bytes(wal[at..at + 4].try_into().unwrap());
    let (page, salt) = (word(8) as usize, &wal[16..24]);
    let frames = (32..wal.len()).step_by(24 + page);
    // Behind the last frame of this log there may be those of an earlier one.
    let frames = frames.take_while(|at| wal.get(at + 8..at + 16) == Some(salt));
    (salt.to_vec(), frames.filter(|at| word(at + 4) != 0).count())
}

/// What `adit task watch` reads.
struct Watch(BufReader<UnixStream>);

impl Watch {
    fn of_goal(host: &Host, n: u64) -> Self {
        let mut stream = host.operator();
        let path = format!("/v1/events?goal={}", goal_id(n));
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        Self(BufReader::new(stream))
    }

    /// The next event's task and state.
    fn next(&mut self) -> (String, String) {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "it ended");
            // Between heads and lengths of chunks.
            if line.starts_with('{') {
                let event: Value = serde_json::from_str(&line).unwrap();
                let text = |key: &str| event["task"][key].as_str().unwrap().to_owned();
                return (text("task_id"), text("state"));
            }
        }
    }
}

fn begin(agent: &mut Agent, task_id: TaskId) {
    agent.say(WireKind::Started, 8, &Started { task_id });
}

/// Ids of the tasks in this state.
fn in_state(host: &Host, state: &str) -> Vec<String> {
    let tasks = host.get(&format!("/v1/tasks?state={state}"));
    let tasks = tasks.as_array().unwrap().iter();
    tasks
        .map(|t| {
            assert_eq!(t["state"], state);
            t["task_id"].as_str().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn a_step_costs_two_commits_and_everybody_sees_at_once_that_it_has_begun() {
    const STEPS: usize = 12;
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let mut agent = ports[0].connected().agent();
    apply_steps(&host, 1, STEPS);
    let mut watch = Watch::of_goal(&host, 1);
    for _ in 0..STEPS {
        assert_eq!(watch.next().1, "queued");
    }
    let (log, before) = commits(&host);
    for _ in 0..STEPS {
        let id = agent.pull().task_id;
        let is = |state: &str| (hex(&id), state.to_owned());
        assert_eq!(watch.next(), is("leased"));
        begin(&mut agent, id);
        assert_eq!(watch.next(), is("started"));
        assert_eq!(in_state(&host, "started"), [hex(&id)]);
        assert!(in_state(&host, "leased").is_empty());
        let task = host.get(&format!("/v1/tasks/{}", hex(&id)));
        assert_eq!(task["state"], "started");
        assert!(task["started_at"].is_string(), "{task}");
        agent.report(id, Outcome::Done);
        assert_eq!(watch.next(), is("done"));
    }
    let (log_now, after) = commits(&host);
    assert_eq!(
        log_now, log,
        "the log began anew: its transactions are not all there"
    );
    assert_eq!(after - before, 2 * STEPS);
}

#[test]
fn what_runs_is_said_again_after_a_kill_and_is_on_disk_after_a_stop() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let mut agent = ports[0].connected().agent();
    assert_eq!(apply(&host, 1).status, 200);
    let id = agent.pull().task_id;
    let begun = |host: &Host| {
        host.until("it has begun", |h| {
            (in_state(h, "started") == [hex(&id)]).then_some(())
        });
    };
    begin(&mut agent, id);
    begun(&host);
    host.kill();
    host.start();
    assert_eq!(in_state(&host, "leased"), [hex(&id)]);
    // The agent says what runs whenever it connects.
    let mut agent = ports[0].connected().agent();
    begin(&mut agent, id);
    begun(&host);
    host.terminate();
    assert!(host.ended());
    host.start();
    assert_eq!(in_state(&host, "started"), [hex(&id)]);
    let mut agent = ports[0].connected().agent();
    agent.report(id, Outcome::Done);
    assert_eq!(in_state(&host, "done"), [hex(&id)]);
}

#[test]
fn the_next_transaction_of_a_vm_writes_what_has_begun() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let mut agent = ports[0].connected().agent();
    apply_steps(&host, 1, 1);
    let id = agent.pull().task_id;
    begin(&mut agent, id);
    host.until("it has begun", |h| {
        (in_state(h, "started") == [hex(&id)]).then_some(())
    });
    apply_steps(&host, 2, 1);
    host.kill();
    host.start();
    assert_eq!(in_state(&host, "started"), [hex(&id)]);
}
