//! Goals and agents: an acknowledged goal is never lost, and one guest does not disturb the others.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use adit_channel::frame;
use adit_channel::hello::{self, Hello};
use adit_channel::refusal::Code;
use adit_port::control_io::Message;
use adit_tasks::dsse;
use adit_tasks::wire::{self, Clock, Held, Outcome, Pull, WireKind};
use ed25519_dalek::SigningKey;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::host::{Answer, HANG, Host, open, report};

pub fn goal_id(n: u64) -> String {
    format!("01937b5e-0000-7000-8000-{n:012x}")
}

/// A request body with a signed goal for VM `a`; two steps, the second idempotent.
pub fn goal(n: u64, not_after: &str) -> String {
    goal_from(n, "2020-01-01T00:00:00Z", not_after)
}

/// The same with a time before which it is not valid.
pub fn goal_from(n: u64, not_before: &str, not_after: &str) -> String {
    let step = |id: &str, idempotent: bool| json!({"id": id, "idempotent": idempotent, "script": {"interpreter": "/bin/sh", "script": "x"}});
    let payload = json!({
        "goal_id": goal_id(n), "key_seq": n + 1, "audience": {"vms": ["a"]}, "not_before": not_before,
        "not_after": not_after, "min_planner": 1, "steps": [step("one", false), step("two", true)],
    });
    let envelope = dsse::sign(
        payload.to_string().as_bytes(),
        &SigningKey::from_bytes(&[7; 32]),
    );
    json!({ "envelope": envelope }).to_string()
}

pub const LATER: &str = "2100-01-01T00:00:00Z";

pub fn apply(host: &Host, n: u64) -> Answer {
    host.api("POST", "/v1/goals", &goal(n, LATER))
}

fn states(host: &Host) -> Vec<(String, u64, String)> {
    let tasks = host.get("/v1/tasks");
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    let tasks = tasks.as_array().unwrap().iter();
    tasks
        .map(|t| {
            (
                text(&t["step"]),
                t["attempt"].as_u64().unwrap(),
                text(&t["state"]),
            )
        })
        .collect()
}

fn state(step: &str, attempt: u64, state: &str) -> (String, u64, String) {
    (step.into(), attempt, state.into())
}

#[test]
fn a_task_is_pulled_reported_and_known_across_kills() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut agent = control.agent();
    // The pull comes first, and waits.
    agent.say(WireKind::Pull, 7, &Pull { epoch: 1 });
    assert_eq!(apply(&host, 1).status, 200);
    let one = agent.task();
    assert_eq!((one.step_id.as_str(), one.attempt), ("one", 1));
    host.kill();
    host.start();
    // The task is leased, so the guest's journal decides, and here it says done.
    let mut agent = ports[0].connected().agent();
    assert_eq!(agent.pull().task_id, one.task_id);
    agent.report(one.task_id, Outcome::Done);
    host.kill();
    host.start();
    let mut agent = ports[0].connected().agent();
    let two = agent.pull();
    agent.report(two.task_id, Outcome::Interrupted);
    let again = agent.pull();
    assert_eq!((again.step_id.as_str(), again.attempt), ("two", 2));
    agent.report(again.task_id, Outcome::Done);
    // A second report of the same task changes nothing. It is acknowledged, so that the guest can forget it.
    agent.report(two.task_id, Outcome::Done);
    let want = [
        state("one", 1, "done"),
        state("two", 1, "interrupted"),
        state("two", 2, "done"),
    ];
    assert_eq!(states(&host), want);
}

#[test]
fn r78_no_acknowledged_goal_is_lost_by_kills_at_any_time() {
    let (mut host, ports) = Host::new(&[("a", 3)], "[limits]\nqueued_per_vm = 1000000");
    let (next, acked) = (AtomicU64::new(0), Mutex::new(BTreeSet::new()));
    for round in 0..8u64 {
        host.start();
        let _control = ports[0].connected();
        let before = acked.lock().unwrap().len();
        let dead = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !dead.load(Ordering::Relaxed) {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        let answer = host.try_api("POST", "/v1/goals", &goal(n, LATER));
                        if answer.is_ok_and(|a| a.status == 200) {
                            acked.lock().unwrap().insert(goal_id(n));
                        }
                    }
                });
            }
            // Kill aditd after some goals were acknowledged, while others are being sent.
            while acked.lock().unwrap().len() < before + 5 + round as usize {
                std::thread::yield_now();
            }
            for pid in [host.pid(), host.worker()] {
                let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
                // Where there is one process, it has been killed the second time.
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            dead.store(true, Ordering::Relaxed);
        });
        host.kill();
    }
    host.start();
    let _control = ports[0].connected();
    let tasks = host.get("/v1/tasks");
    let known: BTreeSet<String> = tasks
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["goal_id"].as_str().unwrap().to_owned())
        .collect();
    let lost: Vec<_> = acked.lock().unwrap().difference(&known).cloned().collect();
    assert!(lost.is_empty(), "{lost:?}");
}

#[test]
fn a_goal_that_is_sent_again_gets_the_same_answer_although_the_queue_is_full() {
    let (host, _ports) = Host::serving(&[("a", 3)], "[limits]\nqueued_per_vm = 3");
    let first = apply(&host, 1);
    assert_eq!(first.status, 200, "{}", first.body);
    let again = apply(&host, 1);
    assert_eq!((again.status, again.body), (200, first.body));
    assert_eq!(apply(&host, 2).status, 429);
}

#[test]
fn expired_tasks_no_longer_count_as_queued() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    host.until("a goal is accepted before its time is over", |h| {
        let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1);
        let answer = h.api("POST", "/v1/goals", &goal(1, &soon.to_string()));
        (answer.status == 200).then_some(())
    });
    host.until("it has expired", |h| {
        states(h).iter().all(|t| t.2 == "expired").then_some(())
    });
    host.until("nothing is queued", |h| {
        (h.get("/v1/vms/a")["queued"] == 0).then_some(())
    });
}

#[test]
fn r59_an_unprivileged_process_or_another_service_is_refused() {
    let (_host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for (from, service, code) in [
        (1024, "tasks", Code::Denied),
        (700, "tcp:80", Code::UnknownService),
    ] {
        let mut guest = control.incoming(from);
        open(&mut guest, service);
        match hello::read(&mut guest).unwrap() {
            Hello::Refuse(r) => assert_eq!(r.refusal.code(), code),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_newer_agent_ends_the_older_one() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut older = control.agent();
    let mut newer = control.agent();
    assert_eq!(older.stream.read(&mut [0]).unwrap(), 0);
    apply(&host, 1);
    assert_eq!(newer.pull().step_id, "one");
}

#[test]
fn r75_silent_streams_of_one_guest_do_not_use_up_aditds_descriptors() {
    let (mut host, ports) = Host::new(&[("a", 3), ("b", 4)], "");
    host.start_with(128);
    let (a, b) = (ports[0].connected(), ports[1].connected());
    // From unprivileged and privileged ports; none sends anything.
    let mut silent: Vec<_> = (0..400u32)
        .map(|n| a.incoming(if n % 2 == 0 { 5000 } else { 700 }))
        .collect();
    // Nobody else is affected: another VM's agent is accepted and served.
    let mut agent = b.agent();
    agent.say(WireKind::Report, 9, &report([9; 16], Outcome::Done));
    assert_eq!(host.api("GET", "/healthz", "").status, 200);
    // Streams that aditd has not accepted yet wait in the socket, and use none of its descriptors.
    host.until("few silent streams are held", |_| {
        let open = silent.iter_mut().filter_map(|stream| {
            stream.set_nonblocking(true).unwrap();
            let read = stream.read(&mut [0]).map_err(|e| e.kind());
            (read == Err(std::io::ErrorKind::WouldBlock)).then_some(())
        });
        (open.count() <= 16).then_some(())
    });
}

#[test]
fn r104_reports_that_were_not_asked_for_change_nothing() {
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let mut a = ports[0].connected().agent();
    let mut b = ports[1].connected().agent();
    apply(&host, 1);
    let task = a.pull();
    // b reports a's task. The report is acknowledged, so that b stops sending it, but has no effect.
    b.report(task.task_id, Outcome::Done);
    assert_eq!(states(&host)[0], state("one", 1, "leased"));
    a.report(task.task_id, Outcome::Failed);
    a.report(task.task_id, Outcome::Done);
    assert_eq!(
        states(&host),
        [state("one", 1, "failed"), state("two", 1, "skipped")]
    );
}

#[test]
fn a_guests_clock_and_held_task_are_shown_and_a_guest_that_asks_gets_the_hosts_time() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let mut agent = ports[0].connected().agent();
    // An agent of the previous version does not report its clock.
    agent.say(WireKind::Report, 9, &report([9; 16], Outcome::Done));
    agent.hear_kind(WireKind::ReportAck);
    let vm = host.get("/v1/vms/a");
    assert!(vm["clock_ahead_ms"].is_null() && vm["holding"].is_null());
    let now = || {
        let since = std::time::UNIX_EPOCH.elapsed().unwrap();
        i64::try_from(since.as_millis()).unwrap()
    };
    let (before, ahead) = (now(), -300_000);
    let unix_ms = u64::try_from(before + ahead).unwrap();
    agent.say(WireKind::Clock, 11, &Clock { unix_ms });
    let (header, body) = agent.hear_kind(WireKind::HostClock);
    let told: Clock = header.decode(&body).unwrap();
    let (told, after) = (i64::try_from(told.unix_ms).unwrap(), now());
    assert_eq!(header.id, 11);
    assert!((before..=after).contains(&told));
    let shown = host.get("/v1/vms/a")["clock_ahead_ms"].as_i64().unwrap();
    assert_eq!(shown, ahead - (told - before));
    // It was away.
    assert!(host.get("/v1/vms/a")["stood_still"].is_null());
    let stood = wire::Stood {
        ms: 90_000,
        clock_set_ms: Some(90_400),
        seeded: true,
    };
    agent.say(WireKind::Stood, 0, &stood);
    agent.say(WireKind::Clock, 12, &Clock { unix_ms });
    agent.hear_kind(WireKind::HostClock);
    let stood = host.get("/v1/vms/a")["stood_still"].clone();
    assert_eq!(
        (
            &stood["ms"],
            &stood["clock_set_ms"],
            &stood["entropy_mixed"]
        ),
        (&json!(90_000), &json!(90_400), &json!(true))
    );
    // The guest holds a task. Its next report clears that.
    apply(&host, 1);
    let task_id = agent.pull().task_id;
    let held = Held {
        task_id,
        not_before_ms: 1_795_219_200_000,
        now_ms: 1_795_132_800_000,
    };
    agent.say(WireKind::Held, 12, &held);
    let holding = host.until("it is shown", |h| {
        Some(h.get("/v1/vms/a")["holding"].clone()).filter(|v| v.is_object())
    });
    assert_eq!(
        holding,
        json!({"task_id": adit_tasks::hex(&task_id), "valid_from": "2026-11-21T00:00:00Z",
               "guest_time": "2026-11-20T00:00:00Z"})
    );
    assert_eq!(states(&host)[0], state("one", 1, "leased"));
    agent.report(task_id, Outcome::Done);
    assert!(host.get("/v1/vms/a")["holding"].is_null());
}

/// Number of aditd's open descriptors.
fn open_descriptors(host: &Host) -> usize {
    let dir = format!("/proc/{}/fd", host.worker());
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn r106_an_agent_that_is_replaced_leaves_no_descriptor_behind() {
    const TIMES: usize = 1_000;
    // A report of this size is announced, but only half of it is sent.
    const HALF: usize = 64 << 10;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(8192).max(soft), hard).unwrap();
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let half = frame::encode(WireKind::Report as u16, 1, 9, 0, &vec![7_u8; 2 * HALF]).unwrap();
    let half = &half[..HALF];
    let mut first = control.agent();
    let mut start = 0;
    // The guest's ends stay open, but aditd must close its own.
    let mut guests = Vec::new();
    first.stream.write_all(half).unwrap();
    let mut older = first;
    for n in 0..TIMES {
        let mut newer = control.agent();
        newer.stream.write_all(half).unwrap();
        // The stream has ended for the guest, so its place among the VM's streams is free.
        assert_eq!(older.stream.read(&mut [0]).unwrap_or(0), 0);
        if n == 9 {
            start = open_descriptors(&host);
        }
        guests.push(std::mem::replace(&mut older, newer));
    }
    host.until("what was replaced is closed", |host| {
        (open_descriptors(host) <= start + 4).then_some(())
    });
    // The last agent is served.
    let mut last = control.agent();
    assert_eq!(apply(&host, 1).status, 200);
    last.pull();
}

/// An agent that got a task and reports nothing may have lost the stream: its stream is ended, and the task handed out again.
#[test]
fn an_agent_that_reports_nothing_is_disconnected_and_the_next_one_gets_its_task() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut silent = control.agent();
    assert_eq!(apply(&host, 1).status, 200);
    let task = silent.pull();
    silent.stream.set_read_timeout(Some(2 * HANG)).unwrap();
    assert_eq!(silent.stream.read(&mut [0]).unwrap_or(0), 0);
    let mut next = control.agent();
    assert_eq!(next.pull().task_id, task.task_id);
}

/// A paused VM's agent has a stream, but nobody serves it.
#[test]
fn r51_a_paused_vm_is_not_ready_and_becomes_ready_without_a_new_stream() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut agent = control.agent();
    agent.say(WireKind::Report, 9, &report([9; 16], Outcome::Done));
    agent.hear_kind(WireKind::ReportAck);
    let wait = |ms: u32| {
        let path = format!("/v1/vms/a/wait?for=agent&timeout_ms={ms}");
        host.api("GET", &path, "").status
    };
    assert_eq!(wait(60_000), 200);
    let says = |session| {
        let status = ports[0].status(session);
        control.say(&Message::Status(status), None);
        let state = if session { "ready" } else { "waiting" };
        host.until("the state follows", |h| {
            (h.get("/v1/vms/a")["state"] == state).then_some(())
        });
    };
    says(false);
    assert_eq!(wait(10), 408);
    says(true);
    assert_eq!(wait(60_000), 200);
    assert_eq!(apply(&host, 1).status, 200);
    agent.pull();
}
