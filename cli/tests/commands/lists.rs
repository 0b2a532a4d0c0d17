//! Lists: bounded, with goal and age, and errors where a filter makes no sense.

use serde_json::json;

use crate::fake::{Fake, GOAL, Say, task, vm};
use crate::text;

#[test]
fn a_list_of_tasks_is_the_newest_and_says_that_there_are_more() {
    let fake = Fake::start(|asked| {
        let tasks = json!([task('a', "one", 1, "done"), task('b', "two", 1, "started")]);
        match asked.path.as_str() {
            "/v1/tasks?&newest=2" | "/v1/tasks?&newest=100" => Say::With(
                adit_api::EARLIER,
                "17".into(),
                tasks.to_string().into_bytes(),
            ),
            "/v1/tasks?&newest=98&before=17" | "/v1/tasks?&newest=500&before=17" => {
                Say::Json(json!([task('0', "zero", 1, "done")]))
            }
            "/v1/tasks?&newest=500" => Say::With(
                adit_api::EARLIER,
                "17".into(),
                tasks.to_string().into_bytes(),
            ),
            _ => Say::Error(404, "unknown-path"),
        }
    });
    let out = fake.adit(&["task", "ls", "--limit", "2"]);
    let (said, list) = (text(&out.stderr), text(&out.stdout));
    assert!(out.status.success(), "{said}");
    assert!(said.contains("newest 2 tasks"), "{said}");
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 3, "{list}");
    for column in ["TASK", "GOAL", "AGE"] {
        assert!(lines[0].contains(column), "{list}");
    }
    assert!(
        lines[1].contains("deadbeef") && lines[1].contains("one"),
        "{list}"
    );
    // Pages are asked for until the limit is reached or there are no more.
    for args in [&["task", "ls"][..], &["task", "ls", "--all"]] {
        let out = fake.adit(args);
        let list = text(&out.stdout);
        assert!(out.stderr.is_empty(), "{}", text(&out.stderr));
        let steps: Vec<&str> = list
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(3))
            .collect();
        assert_eq!(steps, ["zero", "one", "two"], "{list}");
    }
}

#[test]
fn a_list_of_vms_shows_what_is_wrong_with_each() {
    let copied = "the guest's image is enrolled as `web-1`: it was copied from that VM, and refuses every goal";
    let fake = Fake::start(move |_| {
        let (mut wrong, mut of_before) = (vm("web-2"), vm("web-3"));
        wrong["fault"] = json!(copied);
        of_before["enrolled_as"] = json!("web-1");
        Say::Json(json!([vm("web-1"), wrong, of_before]))
    });
    let out = fake.adit(&["vm", "ls"]);
    let list = text(&out.stdout);
    let lines: Vec<&str> = list.lines().collect();
    assert!(lines[0].ends_with("FAULT"), "{list}");
    assert!(lines[1].ends_with('-'), "{list}");
    // Its beginning: a list has one line for each.
    let begin: String = copied.chars().take(60).collect();
    assert!(
        lines[2].ends_with(&format!("{}…", begin.trim_end())),
        "{list}"
    );
    assert!(lines[3].contains("enrolled as `web-1`"), "{list}");
}

#[test]
fn an_aditd_of_before_that_lists_everything_is_cut_to_the_newest() {
    let fake = Fake::start(|_| {
        let tasks = ['a', 'b', 'c'].map(|digit| task(digit, "one", 1, "done"));
        Say::Json(json!(tasks))
    });
    let out = fake.adit(&["task", "ls", "--limit", "1", "-o", "json"]);
    let tasks: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(tasks.len(), 1);
    assert!(tasks[0]["task_id"].as_str().unwrap().starts_with('c'));
    assert!(text(&out.stderr).contains("older"));
}

#[test]
fn filters_that_make_no_sense_are_errors() {
    let fake = Fake::start(|asked| match asked.path.contains("vm=gone") {
        true => Say::Error(404, "unknown-vm"),
        false => Say::Json(json!([])),
    });
    for (args, code) in [
        (&["task", "ls", "--state", "dnoe"][..], 2),
        (&["task", "ls", "--limit", "0"], 2),
        (&["task", "ls", "--vm", "gone"], 4),
        (&["task", "ls", "--vm", "Gone"], 4),
        (&["task", "ls", "--goal", "beef"], 4),
        (&["task", "show", "xyz"], 4),
        (&["task", "show", ""], 4),
        (&["task", "output", "77"], 4),
    ] {
        let out = fake.adit(args);
        assert_eq!(
            out.status.code(),
            Some(code),
            "{args:?}: {}",
            text(&out.stderr)
        );
    }
}

#[test]
fn goals_are_listed_with_key_age_and_how_far_they_are() {
    let goal = json!({
        "goal_id": GOAL, "digest": "00", "signer": "0123456789abcdef", "key_seq": 1,
        "accepted_at": "2026-11-20T22:00:00Z", "not_before": "2026-11-20T22:00:00Z",
        "not_after": "2026-11-21T22:00:00Z", "vms": 41, "steps": 42, "open": 43, "done": 44, "failed": 45,
    });
    let list = json!([goal]);
    let fake = Fake::start(move |asked| match asked.path.as_str() {
        "/v1/goals?&newest=100" | "/v1/goals?newest=2&id=beef" => Say::Json(list.clone()),
        path if path.starts_with("/v1/goals/") => Say::Json(crate::fake::goal(&[])),
        _ => Say::Error(404, "unknown-path"),
    });
    let out = fake.adit(&["goal", "ls"]);
    let list = text(&out.stdout);
    assert!(out.status.success(), "{}", text(&out.stderr));
    for word in [GOAL, "01234567", "41", "42", "43", "44", "45", "2026-11-21"] {
        assert!(list.contains(word), "{word}: {list}");
    }
    let out = fake.adit(&["goal", "ls", "-o", "json"]);
    let json: Vec<adit_api::GoalSummary> = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json[0].failed, 45);
    // The last digits name it.
    assert!(fake.adit(&["goal", "show", "beef"]).status.success());
    assert!(
        fake.asked()
            .iter()
            .any(|a| a.path == format!("/v1/goals/{GOAL}"))
    );
}

#[test]
fn a_vm_is_changed_only_in_what_is_given() {
    let fake = Fake::start(|_| Say::Json(vm("web-1")));
    for (args, body) in [
        (&["--allow", "80,443"][..], json!({"allow": [80, 443]})),
        (&["--allow-vsock", "none"], json!({"allow_vsock": []})),
        (
            &["--busy-poll-us", "50", "--allow", "22"],
            json!({"allow": [22], "busy_poll_us": 50}),
        ),
    ] {
        let out = fake.adit(&[&["vm", "set", "web-1"], args].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
        let asked = fake.asked().pop().unwrap();
        assert_eq!(
            (asked.method.as_str(), asked.path.as_str()),
            ("PATCH", "/v1/vms/web-1")
        );
        let said: serde_json::Value = serde_json::from_str(&asked.body).unwrap();
        assert_eq!(said, body);
    }
    for args in [
        &["vm", "set", "web-1"][..],
        &["vm", "set", "web-1", "--allow", "x"],
        &["vm", "set", "web-1", "--allow", ""],
    ] {
        assert_eq!(fake.adit(args).status.code(), Some(2), "{args:?}");
    }
    assert!(fake.asked().is_empty());
}

#[test]
fn a_configuration_that_was_refused_is_an_error_and_what_waits_for_a_restart_is_named() {
    for (status, code, word) in [
        (
            json!({"reads": 2, "error": "line 7", "restart": []}),
            1,
            "line 7",
        ),
        (
            json!({"reads": 2, "error": null, "restart": ["run_dir"]}),
            0,
            "run_dir",
        ),
    ] {
        let fake = Fake::start(move |_| Say::Json(status.clone()));
        let out = fake.adit(&["config"]);
        let said = text(&out.stdout) + &text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_vm_shows_what_is_in_force_only_after_a_reload() {
    let fake = Fake::start(|_| {
        let mut vm = vm("web-1");
        vm["busy_poll_us"] = json!(50);
        vm["pending"] = json!(["busy_poll_us"]);
        Say::Json(vm)
    });
    let out = fake.adit(&["vm", "show", "web-1"]);
    let said = text(&out.stdout);
    assert!(
        said.contains("50 us") && said.contains("adit vm reload web-1"),
        "{said}"
    );
}

#[test]
fn a_list_whose_pages_do_not_go_on_is_refused_and_not_asked_for_for_ever() {
    let fake = Fake::start(|_| {
        let page = json!([task('a', "one", 1, "done")]).to_string();
        Say::With(adit_api::EARLIER, "17".into(), page.into_bytes())
    });
    let out = fake.adit(&["task", "ls", "--all"]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("bad-answer"));
}

#[test]
fn lists_of_all_hosts_have_hosts_and_a_silent_one_is_named_and_is_the_exit_status() {
    let fake = Fake::start(|asked| {
        let mut of_beta = task('a', "one", 1, "failed");
        of_beta["host"] = json!("beta");
        let silent = |is: bool| match is {
            true => {
                json!([{"host": "gamma", "why": "it is cut off"}, {"host": "delta", "why": "x"}])
            }
            false => json!([]),
        };
        let goal = json!({
            "goal_id": GOAL, "digest": "00", "signer": "aa", "key_seq": 1, "accepted_at": "2026-11-20T22:00:00Z",
            "not_before": "2026-11-20T22:00:00Z", "not_after": "2026-12-20T22:00:00Z",
            "vms": 3, "steps": 1, "open": 1, "done": 1, "failed": 1, "hosts": ["alpha", "beta"],
        });
        match asked.path.as_str() {
            "/v1/all-hosts/tasks?newest=100" => {
                Say::Json(json!({"tasks": [of_beta], "earlier": true, "silent": silent(true)}))
            }
            "/v1/all-hosts/tasks?newest=500&state=failed" => {
                Say::Json(json!({"tasks": [of_beta], "earlier": false, "silent": silent(false)}))
            }
            "/v1/all-hosts/goals?newest=100" => {
                Say::Json(json!({"goals": [goal], "earlier": false, "silent": silent(true)}))
            }
            "/v1/all-hosts/goals?newest=5" => {
                Say::Json(json!({"goals": [goal], "earlier": true, "silent": silent(false)}))
            }
            "/v1/resolve" => Say::Json(json!({
                "vms": [
                    {"name": "a", "host": "alpha", "live": true},
                    {"name": "b", "host": "beta", "live": false, "by_map_of": "alpha"},
                ],
                "silent": [],
            })),
            _ => Say::Error(404, "unknown-path"),
        }
    });
    let run = |args: &[&str]| {
        let out = fake.adit(args);
        let (list, said) = (text(&out.stdout), text(&out.stderr));
        (out.status.code(), list, said)
    };
    for what in ["task", "goal"] {
        let (code, list, said) = run(&[what, "ls", "--all-hosts"]);
        assert_eq!(code, Some(3), "{said}");
        assert!(list.contains("beta"), "{list}");
        for words in [
            "error[silent-host]",
            "`gamma`",
            "it is cut off",
            "`delta`",
            "help: ",
        ] {
            assert!(said.contains(words), "{said}");
        }
    }
    let (_, list, said) = run(&["task", "ls", "--all-hosts"]);
    assert!(list.contains("VM.HOST") && list.contains(".beta"), "{list}");
    assert!(said.contains("older ones"), "{said}");
    let args = [
        "task",
        "ls",
        "--all-hosts",
        "--state",
        "failed",
        "--limit",
        "500",
    ];
    let (code, list, said) = run(&args);
    assert!(code == Some(0) && said.is_empty(), "{said}");
    assert_eq!(list.lines().count(), 2, "{list}");
    let (code, list, said) = run(&["goal", "ls", "--all-hosts", "--limit", "5"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        list.contains("HOSTS") && list.contains("alpha,beta"),
        "{list}"
    );
    assert!(said.contains("newest 1 goals of all hosts"), "{said}");
    // An aditd of before has no such list.
    let (code, _, said) = run(&["goal", "ls", "--all-hosts", "--limit", "7"]);
    assert!(code == Some(1) && said.contains("version before"), "{said}");
    // What one host lists has no column for hosts; more than there may be, and what makes no sense together.
    for args in [
        &["task", "ls", "--all-hosts", "--limit", "501"][..],
        &["goal", "ls", "--all-hosts", "--limit", "501"],
        &["goal", "ls", "--all-hosts", "--all"],
        &["task", "ls", "--all-hosts", "--all"],
        &["task", "ls", "--all-hosts", "--vm", "a"],
    ] {
        let (code, list, said) = run(args);
        assert!(code == Some(2) && list.is_empty(), "{args:?}: {said}");
    }
    let (code, list, said) = run(&["vm", "ls", "--all-hosts"]);
    assert_eq!(code, Some(0), "{said}");
    let lines: Vec<Vec<&str>> = list
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[1], ["a", "alpha", "live", "-", "alpha"]);
    assert_eq!(
        lines[2],
        ["b", "beta", "-", "-", "the", "map", "of", "alpha"]
    );
}
