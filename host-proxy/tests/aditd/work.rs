//! Goals and tasks of VMs of other hosts: who has them, who decides, and what is said of a host that does not answer.

use std::io::{BufRead, BufReader, Write};

use adit_tasks::wire::Outcome;
use serde_json::{Value, json};

use crate::access::{audit, grant};
use crate::host::{Agent, Answer, Control, Host, NO_GRANTS};
use crate::management::{Manager, goal, management, token};
use crate::peers::{Member, two};
use crate::tasks::goal_id;

const ALL: &str = "\"goal\", \"task\", \"see\"";
const VOUCHES: &str = "vouches = [\"user:root\"]\n";

/// Whether the tests' own user is one that a host can be vouched for as `user:root`.
fn is_root() -> bool {
    let is = nix::unistd::geteuid().is_root();
    if !is {
        eprintln!("skipped: the user who asks is not root");
    }
    is
}

/// Two hosts of which `beta` lets `alpha` vouch for root, who may do this with its VMs.
fn hosts(of_alpha: &[(&str, u64)], of_beta: &[(&str, u64)], may: &str) -> (Member, Member) {
    let grants = grant("\"user:root\"", "\"*\"", may);
    let alpha = Member::new("alpha", of_alpha, NO_GRANTS);
    let beta = Member::new("beta", of_beta, &grants);
    alpha.knows(&beta, "");
    beta.knows(&alpha, VOUCHES);
    (alpha, beta)
}

fn body(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).unwrap_or_else(|_| panic!("{}", answer.body))
}

/// VM, host and state of each task.
fn tasks(of: &Value) -> Vec<(&str, &str, &str)> {
    let tasks = of.as_array().unwrap_or_else(|| panic!("{of}")).iter();
    tasks
        .map(|task| {
            (
                task["vm"].as_str().unwrap(),
                task["host"].as_str().unwrap_or_default(),
                task["state"].as_str().unwrap(),
            )
        })
        .collect()
}

fn agent(control: &Control, vm: &str) -> Agent {
    let mut agent = control.silent_agent(0);
    agent.facts(vm, 1);
    agent
}

/// Does the one step of a goal.
fn does(control: &Control, vm: &str) {
    let mut agent = agent(control, vm);
    let task = agent.pull();
    agent.report(task.task_id, Outcome::Done);
}

fn shown(host: &Host, n: u64) -> Value {
    host.get(&format!("/v1/goals/{}", goal_id(n)))
}

fn with_to(n: u64, vms: &[&str], to: &[&str]) -> String {
    let mut body: Value = serde_json::from_str(&goal(n, vms)).unwrap();
    body["to"] = json!(to);
    body.to_string()
}

#[test]
fn a_goal_reaches_the_host_that_has_the_vm_and_what_all_hosts_say_of_it_is_one_answer() {
    if !is_root() {
        return;
    }
    let (alpha, beta) = hosts(&[("a", 3)], &[("b", 3)], ALL);
    let (of_a, of_b) = (alpha.ports[0].connected(), beta.ports[0].connected());
    // Only there.
    let answer = alpha.host.api("POST", "/v1/goals", &goal(1, &["b"]));
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(tasks(&body(&answer)["tasks"]), [("b", "beta", "queued")]);
    assert_eq!(tasks(&beta.host.get("/v1/tasks")), [("b", "", "queued")]);
    assert_eq!(alpha.host.get("/v1/tasks"), json!([]));
    does(&of_b, "b");
    assert_eq!(
        tasks(&shown(&alpha.host, 1)["tasks"]),
        [("b", "beta", "done")]
    );
    // Here and there, each named as it may be; again it is the same.
    for to in [&[][..], &["a", "b"], &["a.alpha", "b.beta.adit"]] {
        let answer = alpha
            .host
            .api("POST", "/v1/goals", &with_to(2, &["a", "b"], to));
        assert_eq!(answer.status, 200, "{to:?}: {}", answer.body);
        let want = [("a", "alpha", "queued"), ("b", "beta", "queued")];
        assert_eq!(tasks(&body(&answer)["tasks"]), want, "{to:?}");
    }
    for host in [&alpha.host, &beta.host] {
        let open = host.get("/v1/tasks?state=queued");
        assert_eq!(open.as_array().unwrap().len(), 1, "{open}");
    }
    does(&of_a, "a");
    for member in [&alpha, &beta] {
        // alpha lets nobody of beta see its tasks.
        let goal = shown(&member.host, 2);
        let want = match member.name {
            "alpha" => vec![("a", "alpha", "done"), ("b", "beta", "queued")],
            _ => vec![("b", "", "queued")],
        };
        assert_eq!(tasks(&goal["tasks"]), want);
        assert_eq!(goal["silent"], Value::Null, "{goal}");
    }
    // Each verb of tasks.
    for vm in ["b", "b.beta"] {
        let listed = alpha.host.get(&format!("/v1/tasks?vm={vm}&newest=100"));
        let want = [("b", "beta", "done"), ("b", "beta", "queued")];
        assert_eq!(tasks(&listed), want);
    }
    let page = alpha.host.api("GET", "/v1/tasks?vm=b&newest=1", "");
    assert!(page.head.contains("adit-earlier: "), "{}", page.head);
    let id = body(&page)[0]["task_id"].as_str().unwrap().to_owned();
    let task = alpha.host.get(&format!("/v1/tasks/{id}"));
    assert_eq!((&task["vm"], &task["host"]), (&"b".into(), &"beta".into()));
    let found = alpha
        .host
        .get(&format!("/v1/tasks?id={}&limit=500", &id[..12]));
    assert_eq!(tasks(&found), [("b", "beta", "queued")]);
    let output = format!("/v1/tasks/{id}/output?stream=stderr");
    assert_eq!(alpha.host.api("GET", &output, "").status, 200);
    let digits = &goal_id(1)[30..];
    let found = alpha.host.get(&format!("/v1/goals?newest=2&id={digits}"));
    assert_eq!(found[0]["goal_id"], goal_id(1));
    // What is nowhere.
    for path in [
        format!("/v1/goals/{}", goal_id(77)),
        format!("/v1/tasks/{}", "0".repeat(32)),
        format!("/v1/tasks/{}/output", "0".repeat(32)),
        "/v1/tasks?vm=nobody".into(),
        format!("/v1/events?goal={}", goal_id(77)),
    ] {
        assert_eq!(alpha.host.api("GET", &path, "").status, 404, "{path}");
    }
    let unknown = alpha
        .host
        .api("POST", "/v1/goals", &goal(3, &["a", "nobody"]));
    assert_eq!(unknown.status, 404, "{}", unknown.body);
    assert_eq!(
        alpha
            .host
            .api("GET", &format!("/v1/goals/{}", goal_id(3)), "")
            .status,
        404
    );
}

#[test]
fn one_goal_that_is_given_to_many_hosts_at_the_same_time_is_queued_once() {
    if !is_root() {
        return;
    }
    let (alpha, beta) = hosts(&[("a", 3)], &[("b", 3)], ALL);
    let (_a, _b) = (alpha.ports[0].connected(), beta.ports[0].connected());
    let both = goal(1, &["a", "b"]);
    let only_b = with_to(1, &["a", "b"], &["b"]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let answer = alpha.host.api("POST", "/v1/goals", &both);
                assert_eq!(answer.status, 200, "{}", answer.body);
            });
            scope.spawn(|| {
                let answer = beta.host.api("POST", "/v1/goals", &only_b);
                assert_eq!(answer.status, 200, "{}", answer.body);
            });
        }
    });
    assert_eq!(tasks(&alpha.host.get("/v1/tasks")), [("a", "", "queued")]);
    assert_eq!(tasks(&beta.host.get("/v1/tasks")), [("b", "", "queued")]);
}

#[test]
fn lists_of_all_hosts_have_each_goal_once_and_the_newest_tasks_and_name_who_is_silent() {
    if !is_root() {
        return;
    }
    let (alpha, mut beta) = hosts(&[("a", 3)], &[("b", 3)], ALL);
    let (of_a, of_b) = (alpha.ports[0].connected(), beta.ports[0].connected());
    for (n, vms) in [(1, &["a", "b"][..]), (2, &["b"]), (3, &["a"])] {
        let answer = alpha.host.api("POST", "/v1/goals", &goal(n, vms));
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    does(&of_b, "b");
    let get = |path: &str| alpha.host.get(&format!("/v1/all-hosts/{path}"));
    let all = get("tasks");
    let mut listed = tasks(&all["tasks"]);
    listed.sort_unstable();
    let want = [
        ("a", "alpha", "queued"),
        ("a", "alpha", "queued"),
        ("b", "beta", "done"),
        ("b", "beta", "queued"),
    ];
    assert_eq!(listed, want);
    assert_eq!(
        (&all["earlier"], &all["silent"]),
        (&false.into(), &json!([]))
    );
    let of_goal = get(&format!("tasks?goal={}&state=done", goal_id(1)));
    assert_eq!(tasks(&of_goal["tasks"]), [("b", "beta", "done")]);
    for (goal, status) in [("x", 200), ("..%2F..", 200)] {
        let answer = alpha
            .host
            .api("GET", &format!("/v1/all-hosts/tasks?goal={goal}"), "");
        assert_eq!(answer.status, status);
        assert_eq!(body(&answer)["tasks"], json!([]));
    }
    let refused = alpha.host.api("GET", "/v1/all-hosts/tasks?state=x", "");
    assert_eq!(refused.status, 400, "{}", refused.body);
    let all = get("goals");
    let goals: Vec<_> = all["goals"].as_array().unwrap().iter().collect();
    let row = |n: u64| {
        let found = goals
            .iter()
            .find(|goal| goal["goal_id"] == goal_id(n))
            .unwrap();
        json!([found["hosts"], found["vms"], found["open"], found["done"]])
    };
    assert_eq!(goals.len(), 3, "{all}");
    assert_eq!(row(1), json!([["alpha", "beta"], 2, 1, 1]));
    assert_eq!(row(2), json!([["beta"], 1, 1, 0]));
    assert_eq!(row(3), json!([["alpha"], 1, 1, 0]));
    // The newest of all, and no more than asked for.
    for list in ["goals", "tasks"] {
        let newest = get(&format!("{list}?newest=1"));
        assert_eq!(newest[list].as_array().unwrap().len(), 1, "{newest}");
        assert_eq!(newest["earlier"], true, "{newest}");
    }
    // One hop: who asks by way of another host is not told of further ones; what beta may not claim is left out.
    let old = beta.section("");
    alpha
        .host
        .reload(|text| text.replace(&old, &beta.section("names = [\"x-*\"]\n")));
    assert_eq!(tasks(&get("tasks")["tasks"]).len(), 2);
    alpha
        .host
        .reload(|text| text.replace(&beta.section("names = [\"x-*\"]\n"), &old));
    does(&of_a, "a");
    beta.host.kill();
    for list in ["goals", "tasks"] {
        let all = get(list);
        assert_eq!(all[list].as_array().unwrap().len(), 2, "{all}");
        assert_eq!(all["silent"][0]["host"], "beta", "{all}");
        assert_ne!(all["silent"][0]["why"], "", "{all}");
    }
}

#[test]
fn whoever_watches_a_goal_hears_of_its_tasks_on_all_hosts() {
    if !is_root() {
        return;
    }
    let (alpha, beta) = hosts(&[("a", 3)], &[("b", 3)], ALL);
    let (of_a, of_b) = (alpha.ports[0].connected(), beta.ports[0].connected());
    let answer = alpha.host.api("POST", "/v1/goals", &goal(1, &["a", "b"]));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut client = alpha.host.operator();
    let ask = format!(
        "GET /v1/events?goal={} HTTP/1.1\r\nHost: aditd\r\n\r\n",
        goal_id(1)
    );
    client.write_all(ask.as_bytes()).unwrap();
    let mut lines = BufReader::new(client).lines().map_while(Result::ok);
    let mut until = |vm: &str, state: &str| loop {
        let line = lines.by_ref().find(|line| line.starts_with('{')).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        let task = &event["task"];
        if task["vm"] == vm && task["state"] == state {
            return task["host"].as_str().map(str::to_owned);
        }
    };
    assert_eq!(until("b", "queued").as_deref(), Some("beta"));
    does(&of_b, "b");
    assert_eq!(until("b", "done").as_deref(), Some("beta"));
    does(&of_a, "a");
    until("a", "done");
    assert_eq!(
        lines.by_ref().last().as_deref(),
        Some(""),
        "it ends in order"
    );
}

#[test]
fn r126_who_gives_a_goal_counts_as_far_as_the_owner_lets_that_host_vouch() {
    if !is_root() {
        return;
    }
    let grants = grant("\"user:root\"", "\"*\"", ALL);
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &grants);
    let _b = beta.ports[0].connected();
    // Nobody vouches: it is as if there were no such VM.
    let denied = alpha.host.api("POST", "/v1/goals", &goal(1, &["b"]));
    assert_eq!(denied.status, 404, "{}", denied.body);
    let unknown = alpha.host.api("POST", "/v1/goals", &goal(1, &["x"]));
    assert_eq!(denied.body, unknown.body.replace("`x`", "`b`"));
    let lines = audit(&beta.host, 1);
    assert_eq!(
        (&lines[0]["via"], &lines[0]["verb"], &lines[0]["vm"]),
        (&"alpha".into(), &"goal".into(), &"b".into())
    );
    // A refusal there is one as a whole.
    let denied = alpha.host.api("POST", "/v1/goals", &goal(1, &["a", "b"]));
    assert_eq!(denied.status, 404, "{}", denied.body);
    assert_eq!(alpha.host.get("/v1/tasks"), json!([]));
    let alpha_section = alpha.section("");
    let vouched = alpha.section(VOUCHES);
    beta.host
        .reload(|text| text.replace(&alpha_section, &vouched));
    let answer = alpha.host.api("POST", "/v1/goals", &goal(1, &["a", "b"]));
    assert_eq!(answer.status, 200, "{}", answer.body);
    // To give goals is not to see tasks, and what is seen is not all that may be done.
    beta.host.reload(|text| text.replace(ALL, "\"see\""));
    let denied = alpha.host.api("POST", "/v1/goals", &goal(2, &["b"]));
    assert_eq!(denied.status, 403, "{}", denied.body);
    let said = body(&denied);
    let message = said["message"].as_str().unwrap();
    assert!(
        message.contains("host `beta`, asked by host `alpha`") && message.contains("via alpha"),
        "{said}"
    );
    assert_ne!(said["help"], "", "{said}");
    assert_eq!(
        tasks(&shown(&alpha.host, 1)["tasks"]),
        [("a", "", "queued")]
    );
}

#[test]
fn r126_a_goal_goes_one_hop_and_a_host_says_nothing_of_vms_that_it_may_not_claim() {
    if !is_root() {
        return;
    }
    let (alpha, beta) = hosts(&[("a", 3)], &[("b", 3)], ALL);
    let gamma = Member::new("gamma", &[("c", 3)], &grant("\"user:root\"", "\"*\"", ALL));
    beta.knows(&gamma, "");
    gamma.knows(&beta, VOUCHES);
    let _c = gamma.ports[0].connected();
    assert_eq!(
        beta.host.api("POST", "/v1/goals", &goal(1, &["c"])).status,
        200
    );
    for to in [&["c"][..], &["c.beta"], &["c.gamma"]] {
        let refused = alpha.host.api("POST", "/v1/goals", &with_to(2, &["c"], to));
        assert_eq!(refused.status, 404, "{to:?}: {}", refused.body);
    }
    assert_eq!(gamma.host.get("/v1/tasks").as_array().unwrap().len(), 1);
    // alpha asks beta, and beta does not ask gamma.
    let answer = alpha
        .host
        .api("GET", &format!("/v1/goals/{}", goal_id(1)), "");
    assert_eq!(answer.status, 404, "{}", answer.body);
    // What beta may not claim.
    let _b = beta.ports[0].connected();
    assert_eq!(
        alpha.host.api("POST", "/v1/goals", &goal(3, &["b"])).status,
        200
    );
    let old = beta.section("");
    alpha
        .host
        .reload(|text| text.replace(&old, &beta.section("names = [\"x-*\"]\n")));
    assert_eq!(shown(&alpha.host, 3)["tasks"], json!([]));
    assert_eq!(
        alpha.host.api("POST", "/v1/goals", &goal(4, &["b"])).status,
        404
    );
    assert_eq!(alpha.host.api("GET", "/v1/tasks?vm=b", "").status, 404);
}

#[test]
fn a_host_that_does_not_answer_is_named_and_nothing_is_queued_here_then() {
    if !is_root() {
        return;
    }
    let (alpha, mut beta) = hosts(&[("a", 3)], &[("b", 3)], ALL);
    let _a = alpha.ports[0].connected();
    let _b = beta.ports[0].connected();
    let both = goal(1, &["a", "b"]);
    assert_eq!(alpha.host.api("POST", "/v1/goals", &both).status, 200);
    beta.host.kill();
    let goal_1 = shown(&alpha.host, 1);
    assert_eq!(tasks(&goal_1["tasks"]), [("a", "", "queued")]);
    assert_eq!(goal_1["silent"][0]["host"], "beta", "{goal_1}");
    assert_ne!(goal_1["silent"][0]["why"], "", "{goal_1}");
    // The map may still have it, or no longer.
    for n in 2..4 {
        let refused = alpha.host.api("POST", "/v1/goals", &goal(n, &["a", "b"]));
        let said = body(&refused);
        assert_eq!(said["code"], "no-answer", "{said}");
        let message = said["message"].as_str().unwrap();
        assert!(
            message.contains("`beta`") && message.contains("host `alpha`"),
            "{said}"
        );
        assert!(said["help"].as_str().unwrap().contains("aditd"), "{said}");
        let known = alpha.host.get("/v1/tasks");
        assert_eq!(known.as_array().unwrap().len(), 1, "{known}");
        alpha.host.reload(|text| text + "# the map is empty then\n");
    }
    for path in [
        "/v1/tasks?vm=b".to_owned(),
        format!("/v1/tasks/{}", "0".repeat(32)),
        format!("/v1/goals/{}", goal_id(9)),
        "/v1/goals?newest=2&id=ff".to_owned(),
    ] {
        let answer = alpha.host.api("GET", &path, "");
        assert_eq!(
            body(&answer)["code"],
            "no-answer",
            "{path}: {}",
            answer.body
        );
    }
    // What is here needs nobody.
    assert_eq!(alpha.host.api("GET", "/v1/tasks?vm=a", "").status, 200);
    // Its goal is there when it is back, and is not queued twice.
    let old = beta.address();
    beta.host.start();
    // Port 0 is another one now.
    let new = beta.address();
    alpha.host.reload(|text| text.replace(&old, &new));
    let answer = alpha.host.until("beta is back", |host| {
        let answer = host.api("POST", "/v1/goals", &both);
        (answer.status == 200).then_some(answer)
    });
    let want = [("a", "alpha", "queued"), ("b", "beta", "queued")];
    assert_eq!(tasks(&body(&answer)["tasks"]), want);
}

#[test]
fn a_token_that_both_hosts_know_goes_along_and_no_other_name_of_its_holder_does() {
    let (secret, section) = token("ops");
    let of_beta = section.clone() + &grant("\"token:ops\"", "\"b\"", ALL);
    let alpha = Member::new(
        "alpha",
        &[("a", 3)],
        &(management("") + &section + &grant("\"token:ops\"", "\"a\"", "\"see\"")),
    );
    let beta = Member::new("beta", &[("b", 3)], &of_beta);
    alpha.knows(&beta, "");
    beta.knows(&alpha, "");
    let _b = beta.ports[0].connected();
    let path = alpha
        .host
        .state_dir()
        .with_file_name("run")
        .join("listen.addr");
    let addresses = std::fs::read_to_string(path).unwrap();
    let at = addresses.lines().last().unwrap().to_owned();
    let ops = Manager {
        host: &alpha.host,
        token: secret,
    };
    let asks = |method: &str, path: &str, body: &str| ops.asks_at(&at, method, path, body);
    let answer = asks("POST", "/v1/goals", &goal(1, &["b"]));
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(tasks(&body(&answer)["tasks"]), [("b", "beta", "queued")]);
    // Of its own VM the first host decides.
    let denied = asks("POST", "/v1/goals", &goal(2, &["a", "b"]));
    assert_eq!(denied.status, 403, "{}", denied.body);
    assert_eq!(beta.host.get("/v1/tasks").as_array().unwrap().len(), 1);
    let shown = asks("GET", &format!("/v1/goals/{}", goal_id(1)), "");
    assert_eq!(tasks(&body(&shown)["tasks"]), [("b", "beta", "queued")]);
    // One that only the first host has says nothing there, and is no mistake: alpha's own key is granted to see tasks.
    let (secret, section) = token("local");
    alpha.takes(&section);
    let pin = alpha.section("");
    let pin = pin
        .split("pin = \"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap();
    beta.takes(&grant(&format!("\"cert:{pin}\""), "\"b\"", "\"task\""));
    let local = Manager {
        host: &alpha.host,
        token: secret,
    };
    let shown = local.asks_at(&at, "GET", &format!("/v1/goals/{}", goal_id(1)), "");
    assert_eq!(shown.status, 200, "{}", shown.body);
    let denied = local.asks_at(&at, "POST", "/v1/goals", &goal(4, &["b"]));
    assert_eq!(denied.status, 404, "{}", denied.body);
    // Whoever shows none is nobody there.
    let nobody = Manager {
        host: &alpha.host,
        token: String::new(),
    };
    let denied = nobody.asks_at(&at, "POST", "/v1/goals", &goal(3, &["b"]));
    assert!([401, 404].contains(&denied.status), "{}", denied.body);
}

#[test]
fn only_another_host_is_told_of_work_at_the_proxy() {
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &grant("\"anyone\"", "\"*\"", ALL));
    let _ = alpha;
    let asked = crate::access::asked(
        beta.host.proxy(),
        "GET http://beta/v1/tasks HTTP/1.1\r\nHost: beta\r\nConnection: close\r\n\r\n",
    );
    assert_eq!(asked.status, 404, "{}", asked.body);
    assert!(asked.body.contains("/v1/resolve"), "{}", asked.body);
}
