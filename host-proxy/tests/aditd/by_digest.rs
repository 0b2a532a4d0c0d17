//! Guests that know `wire::WINDOW`: an envelope crosses a stream once, and a goal that was given back waits for the guest's clock.

use adit_channel::frame;
use adit_tasks::dsse;
use adit_tasks::recent;
use adit_tasks::wire::{Clock, Goal, Held, Lacks, Outcome, Pull, TaskId, TaskOf, WINDOW, WireKind};
use ed25519_dalek::SigningKey;
use serde_json::json;

use crate::host::{Agent, Host};
use crate::tasks::{LATER, apply, goal_from, goal_id};

/// Pulls; returns the task, the goal if it came with it, and how many bytes both took.
fn pull(agent: &mut Agent) -> (TaskOf, Option<Goal>, usize) {
    agent.say(WireKind::Pull, 7, &Pull { epoch: 1 });
    task_of(agent, 7)
}

fn task_of(agent: &mut Agent, id: u32) -> (TaskOf, Option<Goal>, usize) {
    let (mut header, mut body) = agent.hear();
    let mut bytes = 0;
    let mut goal = None;
    if header.kind == WireKind::Goal as u16 {
        bytes += frame::HEADER_LEN + body.len();
        goal = Some(header.decode(&body).unwrap());
        (header, body) = agent.hear();
    }
    assert_eq!((header.kind, header.id), (WireKind::TaskOf as u16, id));
    bytes += frame::HEADER_LEN + body.len();
    (header.decode(&body).unwrap(), goal, bytes)
}

/// A goal of so many steps whose envelope has some 200 KiB.
fn large(steps: usize) -> String {
    let filler = "x".repeat(150 * 1024 / steps);
    let step = |n: usize| json!({"id": format!("s{n}"), "script": {"interpreter": "/bin/sh", "script": filler}});
    let payload = json!({
        "goal_id": goal_id(1), "key_seq": 2, "audience": {"vms": ["a"]}, "not_before": "2020-01-01T00:00:00Z",
        "not_after": LATER, "min_planner": 1, "steps": (0..steps).map(step).collect::<Vec<_>>(),
    });
    let key = SigningKey::from_bytes(&[7; 32]);
    dsse::sign(payload.to_string().as_bytes(), &key)
}

#[test]
fn an_envelope_of_200_kib_with_20_steps_crosses_once_and_for_an_agent_of_before_each_time() {
    let envelope = large(20);
    assert!(envelope.len() > 200 * 1024);
    for window in [true, false] {
        let (mut host, ports) = Host::new(&[("a", 3)], "");
        host.start();
        let control = ports[0].connected();
        let body = json!({ "envelope": envelope }).to_string();
        assert_eq!(host.api("POST", "/v1/goals", &body).status, 200);
        let mut agent = control.agent_with(if window { WINDOW } else { 0 });
        let mut bytes = 0;
        for n in 0..20 {
            let task_id: TaskId = if window {
                let (task, goal, took) = pull(&mut agent);
                assert_eq!(task.digest, recent::digest(envelope.as_bytes()));
                assert_eq!(task.step_id, format!("s{n}"));
                assert_eq!(goal.is_some(), n == 0);
                bytes += took;
                task.task_id
            } else {
                let task = agent.pull();
                bytes += task.envelope.len();
                task.task_id
            };
            agent.report(task_id, Outcome::Done);
        }
        let each = match window {
            true => envelope.len()..envelope.len() + 20 * 100,
            false => 20 * envelope.len()..20 * envelope.len() + 1,
        };
        assert!(each.contains(&bytes), "{bytes} bytes, window {window}");
        // A new stream begins with nothing.
        if window {
            drop(agent);
            assert_eq!(apply(&host, 3).status, 200);
            let mut agent = control.agent_with(WINDOW);
            assert!(pull(&mut agent).1.is_some());
            assert!(pull(&mut agent).1.is_none(), "the same task again");
        }
    }
}

#[test]
fn what_a_guest_lacks_is_sent_again_with_its_task() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.start();
    let control = ports[0].connected();
    assert_eq!(apply(&host, 1).status, 200);
    let mut agent = control.agent_with(WINDOW);
    let (first, goal, _) = pull(&mut agent);
    let digest = first.digest;
    for id in [8, 9] {
        agent.say(WireKind::Lacks, id, &Lacks { digest });
        let (again, sent, _) = task_of(&mut agent, id);
        assert_eq!((&again, &sent), (&first, &goal));
    }
    // Whatever it says to lack, it gets its task.
    agent.say(WireKind::Lacks, 10, &Lacks { digest: [0; 32] });
    let (again, sent, _) = task_of(&mut agent, 10);
    assert_eq!((again, sent), (first, None));
}

#[test]
fn a_goal_that_was_given_back_waits_for_the_guests_clock_and_no_other_goal_waits_for_it() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.start();
    let control = ports[0].connected();
    // Held here: one of a lower number does not hold the others for such a guest.
    let held_here = goal_from(1, "2090-01-01T00:00:00Z", LATER);
    assert_eq!(host.api("POST", "/v1/goals", &held_here).status, 200);
    for n in [2, 3] {
        assert_eq!(apply(&host, n).status, 200);
    }
    let mut agent = control.agent_with(WINDOW);
    let (early, _, _) = pull(&mut agent);
    let held = Held {
        task_id: early.task_id,
        not_before_ms: 5000,
        now_ms: 1000,
    };
    agent.say(WireKind::Held, 0, &held);
    agent.say(WireKind::Clock, 3, &Clock { unix_ms: 1001 });
    agent.hear_kind(WireKind::HostClock);
    let (one, _, _) = pull(&mut agent);
    assert_ne!(one.digest, early.digest);
    agent.report(one.task_id, Outcome::Done);
    // It is shown for as long as it waits.
    let vm = host.get("/v1/vms/a");
    assert!(vm["holding"].is_object(), "{vm}");
    let (two, _, _) = pull(&mut agent);
    assert_eq!(two.digest, one.digest);
    agent.report(two.task_id, Outcome::Done);
    // It is idle until its clock shows the time.
    agent.say(WireKind::Pull, 7, &Pull { epoch: 1 });
    agent.say(WireKind::Clock, 4, &Clock { unix_ms: 4999 });
    agent.hear_kind(WireKind::HostClock);
    agent.say(WireKind::Clock, 5, &Clock { unix_ms: 5000 });
    agent.hear_kind(WireKind::HostClock);
    assert_eq!(task_of(&mut agent, 7).0, early);
    // On a new stream nothing is held any more.
    agent.say(WireKind::Held, 0, &held);
    drop(agent);
    let mut agent = control.agent_with(WINDOW);
    assert_eq!(pull(&mut agent).0.task_id, early.task_id);
}

#[test]
fn r101_what_a_guest_says_of_its_clock_while_it_waits_costs_the_database_nothing() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.start();
    let control = ports[0].connected();
    const GOALS: u64 = 400;
    for n in 0..GOALS {
        assert_eq!(apply(&host, n).status, 200);
    }
    let mut agent = control.agent_with(WINDOW);
    for _ in 0..GOALS {
        let (task, _, _) = pull(&mut agent);
        let held = Held {
            task_id: task.task_id,
            not_before_ms: u64::MAX,
            now_ms: 1,
        };
        agent.say(WireKind::Held, 0, &held);
    }
    agent.say(WireKind::Pull, 7, &Pull { epoch: 1 });
    // A look at the queue for each of them took minutes.
    let begin = std::time::Instant::now();
    for n in 0..4000 {
        agent.say(WireKind::Clock, n + 10, &Clock { unix_ms: 1 });
        agent.hear_kind(WireKind::HostClock);
    }
    assert!(begin.elapsed() < crate::host::HANG);
    // What comes meanwhile is not missed.
    for n in GOALS..GOALS + 20 {
        let task = std::thread::scope(|s| {
            let more = s.spawn(|| apply(&host, n).status);
            let mut task = None;
            while task.is_none() || !more.is_finished() {
                agent.say(WireKind::Clock, 3, &Clock { unix_ms: 1 });
                loop {
                    let (header, body) = agent.hear();
                    if header.kind == WireKind::HostClock as u16 {
                        break;
                    } else if header.kind == WireKind::TaskOf as u16 {
                        task = Some(header.decode::<TaskOf>(&body).unwrap());
                    }
                }
            }
            assert_eq!(more.join().unwrap(), 200);
            task.unwrap()
        });
        let held = Held {
            task_id: task.task_id,
            not_before_ms: u64::MAX,
            now_ms: 1,
        };
        agent.say(WireKind::Held, 0, &held);
        agent.say(WireKind::Pull, 7, &Pull { epoch: 1 });
    }
}
