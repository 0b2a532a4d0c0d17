//! `adit task watch`: the end of a stream is no verdict, and nothing found is no success.

use serde_json::json;

use crate::fake::{Fake, GOAL, Say, event, goal, task};
use crate::text;

#[test]
fn an_aditd_that_stops_in_mid_task_is_asked_again_until_the_task_has_ended() {
    for cut in [false, true] {
        let (mut streams, mut asked_again) = (0, 0);
        let fake = Fake::start(move |asked| match asked.path.as_str() {
            "/v1/events" => {
                streams += 1;
                let seen = match streams {
                    1 => "started",
                    2 | 3 => return Say::HangUp,
                    _ => "done",
                };
                let lines = vec![event(task('a', "one", 1, seen))];
                match (cut, streams) {
                    (true, 1) => Say::Cut(lines),
                    _ => Say::Lines(lines),
                }
            }
            _ => {
                asked_again += 1;
                match asked_again {
                    1 => Say::HangUp,
                    _ => Say::Json(goal(&[task('a', "one", 1, "started")])),
                }
            }
        });
        let out = fake.adit(&["task", "watch"]);
        let said = text(&out.stdout) + &text(&out.stderr);
        assert_eq!(out.status.code(), Some(0), "{said}");
        assert!(said.contains("started") && said.contains("done"), "{said}");
    }
}

#[test]
fn what_ended_while_aditd_was_away_is_known() {
    let mut streams = 0;
    let fake = Fake::start(move |asked| match asked.path.as_str() {
        "/v1/events" => {
            streams += 1;
            Say::Lines(match streams {
                1 => vec![event(task('a', "one", 1, "started"))],
                _ => vec![],
            })
        }
        _ => Say::Json(goal(&[task('a', "one", 1, "failed")])),
    });
    let out = fake.adit(&["task", "watch"]);
    assert_eq!(out.status.code(), Some(5), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("failed"));
}

#[test]
fn an_aditd_that_does_not_come_back_is_unreachable_within_the_requests_time() {
    let mut streams = 0;
    let fake = Fake::start(move |asked| {
        streams += i32::from(asked.path == "/v1/events");
        match streams {
            1 if asked.path == "/v1/events" => {
                Say::Lines(vec![event(task('a', "one", 1, "started"))])
            }
            _ => Say::HangUp,
        }
    });
    let out = fake.adit(&["task", "watch", "--request-timeout", "3s"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(said.contains("aditd ended the stream"), "{said}");
}

#[test]
fn a_step_that_succeeded_when_it_was_tried_again_is_a_success() {
    let fake = Fake::start(|asked| {
        let tasks = [
            task('b', "one", 2, "queued"),
            task('a', "one", 1, "interrupted"),
            task('b', "one", 2, "done"),
        ];
        match asked.path.starts_with("/v1/events") {
            true => Say::Lines(tasks.map(event).to_vec()),
            false => Say::Json(goal(&tasks[1..])),
        }
    });
    for args in [&["task", "watch"][..], &["task", "watch", "--goal", GOAL]] {
        let out = fake.adit(args);
        assert_eq!(
            out.status.code(),
            Some(0),
            "{args:?}: {}",
            text(&out.stderr)
        );
    }
}

#[test]
fn an_unknown_goal_and_nothing_to_watch_are_not_found() {
    // As an aditd of before has it: an empty stream.
    let fake = Fake::start(|asked| match asked.path.as_str() {
        path if path.starts_with("/v1/events") => Say::Lines(vec![]),
        path if path.starts_with("/v1/goals?") => Say::Json(json!([])),
        _ => Say::Error(404, "unknown-goal"),
    });
    for args in [
        &["task", "watch"][..],
        &["task", "watch", "--goal", GOAL],
        &["task", "watch", "--goal", "beef"],
        &["task", "watch", "--goal", "../x"],
        &["goal", "show", "beef"],
        &["goal", "show", "no id"],
    ] {
        let out = fake.adit(args);
        assert_eq!(
            out.status.code(),
            Some(4),
            "{args:?}: {}",
            text(&out.stderr)
        );
    }
}

#[test]
fn an_output_that_is_not_there_yet_is_said_or_waited_for() {
    let mut ended = false;
    let fake = Fake::start(move |asked| match asked.path.as_str() {
        path if path.starts_with("/v1/events") => {
            ended = true;
            let states = ["started", "done"];
            Say::Lines(states.map(|s| event(task('3', "a", 1, s))).to_vec())
        }
        path if path.contains("/output") => Say::With("x", "y".into(), b"all of it\n".into()),
        path => {
            let mut task = task('3', "a", 1, if ended { "done" } else { "started" });
            task["output_bytes"] = json!([if ended { 10 } else { 0 }, 0]);
            match path {
                path if path.starts_with("/v1/tasks?") => Say::Json(json!([task])),
                path if path.starts_with("/v1/goals/") => Say::Json(goal(&[task])),
                _ => Say::Json(task),
            }
        }
    });
    let out = fake.adit(&["task", "output", "3"]);
    let said = text(&out.stderr);
    assert_eq!(
        (out.status.code(), out.stdout.len()),
        (Some(1), 0),
        "{said}"
    );
    assert!(
        said.contains("not-ended") && said.contains("started"),
        "{said}"
    );
    let out = fake.adit(&["task", "output", "3", "--wait"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert_eq!(text(&out.stdout), "all of it\n");
}
