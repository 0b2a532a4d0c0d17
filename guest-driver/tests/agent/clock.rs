//! A guest whose clock is off: nothing that is only early is lost, and whoever looks sees why.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use adit_tasks::wire::{self, Outcome, Seed, Task, WireKind};
use serde_json::json;

use crate::host::*;

const MINUTE_MS: i64 = 60_000;

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_millis() as i64
}

/// `…T…Z`, to the second.
fn rfc3339(ms: i64) -> String {
    jiff::Timestamp::from_second(ms / 1000).unwrap().to_string()
}

/// A task of a goal that is valid between two times.
fn valid(host: &Host, from_ms: i64, to_ms: i64) -> Task {
    let mut goal = goal(1, "web-1", json!([counting(&host.path("count"), "")]));
    goal["not_before"] = json!(rfc3339(from_ms));
    goal["not_after"] = json!(rfc3339(to_ms));
    task(host.sign(&goal), "count", 1)
}

#[test]
fn a_goal_that_is_not_yet_valid_is_held_across_streams_and_runs_once_the_clock_is_right() {
    let mut host = Host::new();
    let (now, behind) = (now_ms(), 5 * MINUTE_MS);
    let task = valid(&host, now - MINUTE_MS, now + 60 * MINUTE_MS);
    host.start_ahead(-behind);
    for _ in 0..2 {
        let (mut session, _) = host.accept();
        let Some(Said::Pull(id)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        session.task(id, &task);
        let Some(Said::Held(held)) = session.next().unwrap() else {
            panic!("{}", host.log())
        };
        assert_eq!(held.task_id, task.task_id);
        assert_eq!(held.not_before_ms as i64, (now - MINUTE_MS) / 1000 * 1000);
        // Both messages tell the guest's own clock.
        let own = now_ms() - behind;
        for told in session.clocks.iter().chain([&held.now_ms]) {
            assert!(
                (told.abs_diff(own as u64) as i64) < MINUTE_MS,
                "{told} {own}"
            );
        }
    }
    assert_eq!(lines(&host.path("count")), 0);
    host.kill();
    host.start(None);
    let (mut session, _) = host.accept();
    assert_eq!(session.run(&task).outcome, Outcome::Done);
    assert_eq!(lines(&host.path("count")), 1);
}

#[test]
fn a_session_begins_with_one_message_about_the_clock() {
    let mut host = Host::new();
    host.start(None);
    let (mut session, _) = host.accept();
    let pull = session.next().unwrap();
    assert!(matches!(pull, Some(Said::Pull(_))), "{}", host.log());
    assert_eq!(session.clocks.len(), 1);
}

#[test]
fn a_held_task_begins_when_its_time_has_come() {
    let mut host = Host::new();
    // Held for a second or two, unless this machine takes longer to start the agent.
    let from = (now_ms() / 1000 + 2) * 1000;
    let task = valid(&host, from, from + 60 * MINUTE_MS);
    let report = host.run(&task);
    assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
    assert!(report.started_ms as i64 >= from);
}

#[test]
fn a_guest_that_takes_the_hosts_time_runs_what_is_valid_by_it_and_another_says_what_its_own_clock_shows()
 {
    for ahead in [-5 * MINUTE_MS, 1440 * MINUTE_MS] {
        let mut host = Host::new();
        let now = now_ms();
        let task = valid(&host, now - MINUTE_MS, now + 60 * MINUTE_MS);
        if ahead > 0 {
            host.start_ahead(ahead);
            let (mut session, _) = host.accept();
            session.clock = Some(now_ms() as u64);
            let report = session.run(&task);
            refused(&report, "expired");
            let day = &rfc3339(now + ahead)[..10];
            let text = format!("this guest's clock says {day}");
            assert!(report.reason.contains(&text), "{}", report.reason);
            host.kill();
        }
        let config = fs::read_to_string(host.path("adit-guest.toml")).unwrap();
        let config = format!("clock = \"host\"\n{config}");
        fs::write(host.path("adit-guest.toml"), config).unwrap();
        host.start_ahead(ahead);
        let (mut session, _) = host.accept();
        session.clock = Some(now_ms() as u64);
        let report = session.run(&task);
        assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
        assert!(report.started_ms.abs_diff(now as u64) < 10 * MINUTE_MS as u64);
        assert!(
            host.log().contains("adit-guest: clock-set "),
            "{}",
            host.log()
        );
    }
}

/// A guest that is restored from a snapshot goes on as if no time had gone by, with the random numbers of the one that was saved.
#[test]
fn a_guest_that_stood_still_says_so_and_what_it_set_right() {
    for clock in ["own", "host"] {
        let mut host = Host::new();
        let config = fs::read_to_string(host.path("adit-guest.toml")).unwrap();
        let config = format!("clock = \"{clock}\"\n{config}");
        fs::write(host.path("adit-guest.toml"), config).unwrap();
        host.features |= wire::SEED;
        host.start(None);
        let away = 100_000;
        for (session_nr, ms) in [(1, 0), (2, away), (3, away)] {
            let steps = json!([counting(&host.path("count"), "")]);
            let goal = host.sign(&goal(session_nr, "web-1", steps));
            let task = task(goal, "count", 1);
            let (mut session, _) = host.accept();
            session.send(WireKind::Seed, 0, &Seed { bytes: [7; 32] });
            session.clock = Some(now_ms() as u64 + ms);
            session.run(&task);
            let Some(stood) = session.stood else {
                assert_ne!(session_nr, 2, "{}", host.log());
                continue;
            };
            assert_eq!(session_nr, 2, "{stood:?}");
            assert!(stood.ms.abs_diff(away) < 20_000, "{stood:?}");
            assert_eq!(stood.clock_set_ms.is_some(), clock == "host");
            let set = stood.clock_set_ms.unwrap_or(away as i64);
            assert!(set.abs_diff(away as i64) < 20_000, "{stood:?}");
            assert_eq!(stood.seeded, nix::unistd::geteuid().is_root());
        }
    }
}
