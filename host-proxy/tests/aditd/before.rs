//! Databases that aditds of before have written, of every schema there was: each row of them says what it said then, and
//! the work in them goes on. `tests/fixtures/README.md` says what is in them, and how they were made.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use adit_tasks::wire::Outcome;
use serde_json::{Map, Value};

use crate::host::Host;

/// Schemas of which there is a database.
const SCHEMAS: std::ops::RangeInclusive<u32> = 1..=6;

/// From this schema on, aditd has in memory only that a task has started, until the next transaction. After a kill the task is
/// leased, and its guest says it again.
const IN_MEMORY: u32 = 4;

/// States of a task in those schemas.
const STATES: [&str; 11] = [
    "queued",
    "leased",
    "started",
    "done",
    "failed",
    "timed_out",
    "interrupted",
    "refused",
    "skipped",
    "expired",
    "lost_contact",
];

fn fixture(schema: u32, ending: &str) -> PathBuf {
    let name = format!("tests/fixtures/schema-{schema}.{ending}");
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// An aditd on a copy of such a database, and what the aditd that wrote it said of it at its end.
fn host(schema: u32) -> (Host, Value) {
    // What has ended there is older with every day on which this test runs.
    let (host, _) = Host::new(&[], "[limits]\nkept_days = 1000000");
    fs::create_dir(host.state_dir()).unwrap();
    let database = host.state_dir().join("aditd.db");
    fs::copy(fixture(schema, "db"), database).unwrap();
    let said = fs::read(fixture(schema, "json")).unwrap();
    (host, serde_json::from_slice(&said).unwrap())
}

/// Today's answers may say more than those of before.
fn says_all_of(now: &Value, before: &Map<String, Value>, what: &str) {
    for (key, value) in before {
        assert_eq!(&now[key], value, "{what}: {key} of {before:?}");
    }
}

fn by<'a>(key: &str, list: &'a Value) -> BTreeMap<String, &'a Value> {
    let named = |v: &'a Value| (v[key].as_str().unwrap().to_owned(), v);
    list.as_array().unwrap().iter().map(named).collect()
}

#[test]
fn a_database_of_every_schema_says_of_each_row_what_it_said_then() {
    for schema in SCHEMAS {
        let (mut host, before) = host(schema);
        host.start();
        for (list, path, key) in [
            ("vms", "/v1/vms", "name"),
            ("tasks", "/v1/tasks", "task_id"),
        ] {
            let now = host.get(path);
            let (now, before) = (by(key, &now), by(key, &before[list]));
            assert!(now.keys().eq(before.keys()), "schema {schema}: {now:?}");
            for (name, row) in before {
                let what = format!("schema {schema}, {list}");
                let mut row = row.as_object().unwrap().clone();
                if list == "tasks" && schema >= IN_MEMORY && row["state"] == "started" {
                    row.insert("state".into(), "leased".into());
                    row.insert("started_at".into(), Value::Null);
                }
                says_all_of(now[&name], &row, &what);
            }
        }
        let goals = host.get("/v1/goals");
        let listed = by("goal_id", &goals);
        for (id, goal) in by("goal_id", &before["goals"]) {
            let (now, goal) = (
                host.get(&format!("/v1/goals/{id}")),
                goal.as_object().unwrap(),
            );
            says_all_of(&now, goal, &format!("schema {schema}, goals"));
            says_all_of(
                listed[&id],
                goal,
                &format!("schema {schema}, list of goals"),
            );
        }
        for (path, output) in before["output"].as_object().unwrap() {
            let now = host.api("GET", path, "").body;
            assert_eq!(&now, output.as_str().unwrap(), "schema {schema}: {path}");
        }
    }
}

#[test]
fn a_database_of_every_schema_has_every_state() {
    for schema in SCHEMAS {
        let (_, before) = host(schema);
        let tasks = before["tasks"].as_array().unwrap();
        for state in STATES {
            let has = |t: &Value| t["state"] == state;
            assert!(tasks.iter().any(has), "schema {schema}: {state}");
        }
    }
}

#[test]
fn the_work_in_a_database_of_every_schema_goes_on() {
    for schema in SCHEMAS {
        let (mut host, _) = host(schema);
        let [web_1, web_2] = [("web-1", 3), ("web-2", 4)].map(|(vm, cid)| host.port(vm, cid));
        host.start();
        // What was begun is handed out again, for the guest's journal knows it; then what comes next in its order.
        let mut agent = web_1.connected().agent();
        for step in ["runs", "taken", "after"] {
            let task = agent.pull();
            assert_eq!(task.step_id, step, "schema {schema}");
            agent.report(task.task_id, Outcome::Done);
        }
        // The goal behind this one is not valid before the year 2100.
        let mut agent = web_2.connected().agent();
        let task = agent.pull();
        assert_eq!(task.step_id, "waits", "schema {schema}");
        agent.report(task.task_id, Outcome::Done);
        let tasks = host.get("/v1/tasks");
        let is_open = |t: &&Value| STATES[..3].iter().any(|open| t["state"] == *open);
        let open = tasks.as_array().unwrap().iter().filter(is_open);
        let open: Vec<_> = open.map(|t| [&t["step"], &t["state"]]).collect();
        assert_eq!(open, [["held", "queued"]], "schema {schema}");
    }
}
