//! `adit events`.

use serde_json::{Value, json};

use crate::fake::{Fake, Say};

fn event(number: u32, kind: &str) -> Value {
    json!({
        "cursor": format!("0123456789abcdef.{number}"),
        "at": "2026-11-30T00:00:00Z",
        "kind": kind,
        "vm": "web-1\u{1b}[2J",
        "state": "ready",
    })
}

#[test]
fn what_is_kept_is_printed_escaped_and_that_is_all() {
    let aditd = Fake::start(|_| Say::Lines(vec![event(1, "vm-state"), event(2, "moon-rises")]));
    let out = aditd.adit(&["events", "--since", "0123456789abcdef.0"]);
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{said}");
    assert_eq!(said.lines().count(), 2, "{said}");
    assert!(said.contains("vm-state") && said.contains("ready") && !said.contains('\u{1b}'));
    let asked = aditd.asked();
    assert_eq!(
        asked[0].path,
        "/v1/host-events?since=0123456789abcdef.0&follow=false"
    );
}

#[test]
fn who_follows_goes_on_behind_the_last_event_when_aditd_was_away() {
    let mut streams = 0;
    let aditd = Fake::start(move |_| {
        streams += 1;
        match streams {
            1 => Say::Cut(vec![event(1, "started")]),
            2 => Say::HangUp,
            3 => Say::Lines(vec![event(5, "gap")]),
            _ => Say::Error(400, "usage"),
        }
    });
    let out = aditd.adit(&["events", "--follow", "-o", "json"]);
    // What aditd refuses ends it.
    assert!(!out.status.success());
    let said = String::from_utf8(out.stdout).unwrap();
    let kinds = said.lines().map(|line| {
        let event: Value = serde_json::from_str(line).unwrap();
        event["kind"].as_str().unwrap().to_owned()
    });
    assert_eq!(kinds.collect::<Vec<_>>(), ["started", "gap"]);
    let paths: Vec<_> = aditd.asked().into_iter().map(|asked| asked.path).collect();
    assert_eq!(paths[0], "/v1/host-events?follow=true");
    let on = |path: &String, number| path.contains(&format!("since=0123456789abcdef.{number}&"));
    assert!(
        on(&paths[1], 1) && on(&paths[2], 1) && on(&paths[3], 5),
        "{paths:?}"
    );
}

#[test]
fn without_aditd_there_is_no_waiting() {
    let dir = Fake::absent();
    let out = crate::fake::command(dir.path(), &["events", "--follow"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(3));
}
