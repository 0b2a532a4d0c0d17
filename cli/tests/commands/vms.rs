//! `adit vm add`, `lock`, `unlock` and `rm --drain`: what they ask for, and how they end.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::fake::{Asked, Fake, Say, command, vm};
use crate::text;

/// What was asked for, in order.
fn lines(fake: &Fake) -> Vec<String> {
    let asked = fake.asked().into_iter();
    asked
        .map(|Asked { method, path, .. }| format!("{method} {path}"))
        .collect()
}

#[test]
fn a_way_is_one_of_several_and_a_cid_is_needed_for_none() {
    let fake = Fake::start(|_| Say::Json(vm("b")));
    for (args, carrier) in [
        (&["--cid", "5"][..], Value::Null),
        (&["--vhost-user", "--cid", "5"], json!("vhost-user")),
        (&["--ring"], json!("ring")),
        (&["--hybrid", "/fc/v.sock"], json!({"hybrid": "/fc/v.sock"})),
        (
            &["--hybrid", "/fc/v.sock", "--half-closes"],
            json!({"hybrid": "/fc/v.sock", "half_closes": true}),
        ),
    ] {
        let out = fake.adit(&[&["vm", "add", "b"], args].concat());
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let body: Value = serde_json::from_str(&fake.asked()[0].body).unwrap();
        assert_eq!(body["carrier"], carrier, "{args:?}");
        let cid = if args.contains(&"--cid") {
            json!(5)
        } else {
            Value::Null
        };
        assert_eq!(body["cid"], cid, "{args:?}");
    }
    for args in [
        &["--hybrid", "/v.sock", "--ring"][..],
        &["--vhost-user", "--ring"],
        &["--half-closes"],
    ] {
        let out = fake.adit(&[&["vm", "add", "b"], args].concat());
        assert_eq!(out.status.code(), Some(2), "{args:?}");
    }
    assert!(fake.asked().is_empty());
}

#[test]
fn a_lock_is_shown_wherever_a_vm_is_safe_on_a_terminal() {
    let fake = Fake::start(|asked| {
        let mut locked = vm("web-1");
        locked["lock"] =
            json!({"reason": "new\u{1b}[2J", "by": "user:root", "since": "2026-12-01T00:00:00Z"});
        locked["origin"] = json!("api");
        locked["carrier"] = json!({"kind": "vsock", "why": "", "memory": null, "bytes": 0, "line_ns": 0, "streams": 0,
            "way": "vhost-user", "way_why": "as it was added", "forbids": ["migration", "savevm"], "costs": "no migration"});
        Say::Json(match asked.path.as_str() {
            "/v1/vms" => json!([locked, vm("web-2")]),
            "/v1/config" => json!({"reads": 1, "error": null, "restart": [], "version": "0.1.0"}),
            _ => locked,
        })
    });
    let said = text(&fake.adit(&["vm", "ls"]).stdout);
    assert!(
        said.contains("ready, locked") && said.contains("vm add"),
        "{said}"
    );
    let said = text(&fake.adit(&["vm", "show", "web-1"]).stdout);
    for word in [
        "locked by user:root",
        "vhost-user; as it was added",
        "no migration",
        "vm add",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(!said.contains('\u{1b}'), "{said}");
    let out = fake.adit(&["doctor", "web-1"]);
    let said = text(&out.stdout);
    assert_eq!(out.status.code(), Some(6), "{said}");
    assert!(
        said.contains("lock: locked by user:root") && said.contains("adit vm unlock web-1"),
        "{said}"
    );
}

#[test]
fn lock_and_unlock_ask_once_and_say_what_undoes_them() {
    let fake = Fake::start(|_| Say::Json(vm("web-1")));
    let out = fake.adit(&["vm", "lock", "web-1", "--reason", "a new kernel"]);
    assert!(text(&out.stdout).contains("adit vm unlock web-1"));
    let asked = fake.asked();
    assert_eq!(
        (asked[0].path.as_str(), asked.len()),
        ("/v1/vms/web-1/lock", 1)
    );
    assert_eq!(asked[0].body, r#"{"reason":"a new kernel"}"#);
    let out = fake.adit(&["vm", "unlock", "web-1"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert_eq!(lines(&fake), ["DELETE /v1/vms/web-1/lock"]);
}

/// An aditd whose VM has something open for so many looks.
fn busy(looks: usize) -> Fake {
    let mut left = looks;
    Fake::start(move |asked| {
        if !asked.path.contains("for=drained") {
            return Say::Json(vm("web-1"));
        }
        match left.checked_sub(1) {
            Some(less) => {
                left = less;
                Say::Error(408, "timeout")
            }
            None => Say::Json(vm("web-1")),
        }
    })
}

#[test]
fn a_drained_vm_is_locked_waited_for_and_removed() {
    let fake = busy(2);
    let out = fake.adit(&["vm", "rm", "web-1", "--drain", "-o", "json"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert_eq!(text(&out.stdout).trim(), r#"{"removed":"web-1"}"#);
    assert_eq!(text(&out.stderr), "");
    let asked = lines(&fake);
    assert_eq!(asked[..2], ["GET /v1/vms/web-1", "POST /v1/vms/web-1/lock"]);
    assert_eq!(
        asked[2..5]
            .iter()
            .filter(|a| a.contains("for=drained"))
            .count(),
        3
    );
    assert_eq!(asked[5..], ["DELETE /v1/vms/web-1"]);
}

#[test]
fn an_aditd_that_is_started_anew_while_a_vm_is_drained_is_waited_for() {
    let mut looks = 0;
    let fake = Fake::start(move |asked| {
        if !asked.path.contains("for=drained") {
            return Say::Json(vm("web-1"));
        }
        looks += 1;
        match looks {
            1 => Say::HangUp,
            2 => Say::Error(503, "busy"),
            _ => Say::Json(vm("web-1")),
        }
    });
    let out = fake.adit(&["vm", "rm", "web-1", "--drain"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert_eq!(lines(&fake).last().unwrap(), "DELETE /v1/vms/web-1");
}

#[test]
fn at_the_end_of_its_time_it_stays_locked_or_is_removed_by_force() {
    let fake = busy(usize::MAX);
    let args = ["vm", "rm", "web-1", "--drain", "--timeout", "1ms"];
    let out = fake.adit(&args);
    assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
    assert!(lines(&fake).iter().all(|a| !a.starts_with("DELETE")));
    let out = fake.adit(&[&args[..], &["--force"]].concat());
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert_eq!(
        lines(&fake).last().unwrap(),
        "DELETE /v1/vms/web-1?force=true"
    );
}

#[test]
fn ctrl_c_leaves_the_lock_and_says_so() {
    // Its first answer to `drained` tells the test that it waits.
    let (tell, waits) = std::sync::mpsc::channel();
    let fake = Fake::start(move |asked| {
        if asked.path.contains("for=drained") {
            let _ = tell.send(());
            return Say::Error(408, "timeout");
        }
        Say::Json(vm("web-1"))
    });
    let mut adit = command(
        fake.dir(),
        &["vm", "rm", "web-1", "--drain", "--timeout", "1h"],
    )
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    waits.recv().unwrap();
    let pid = Pid::from_raw(adit.id().cast_signed()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let stderr = BufReader::new(adit.stderr.take().unwrap());
    let said: Vec<_> = stderr.lines().map(Result::unwrap).collect();
    assert_eq!(adit.wait().unwrap().code(), Some(130), "{said:?}");
    assert!(said.iter().any(|l| l.contains("stays locked")), "{said:?}");
    assert!(
        said.iter().any(|l| l.contains("adit vm unlock web-1")),
        "{said:?}"
    );
    assert!(lines(&fake).iter().all(|a| !a.starts_with("DELETE")));
}

#[test]
fn what_would_not_be_removed_is_not_locked_either() {
    for (key, value) in [("origin", json!("file")), ("held_by", json!(7))] {
        let fake = Fake::start(move |_| {
            let mut vm = vm("web-1");
            vm[key] = value.clone();
            Say::Json(vm)
        });
        let out = fake.adit(&["vm", "rm", "web-1", "--drain"]);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
        assert_eq!(lines(&fake), ["GET /v1/vms/web-1"]);
    }
}
