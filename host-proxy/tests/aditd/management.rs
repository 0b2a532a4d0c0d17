//! Management listeners: who may do what over them, and what nobody hears of other VMs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use adit_api::token;
use adit_tasks::dsse;
use adit_tasks::wire::Outcome;
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use crate::access::{UID, audit, curl, grant, listen, other};
use crate::host::{Answer, HANG, Host, Port};
use crate::tasks::{LATER, goal_id};
use crate::tls::Files;

/// Sections of a management listener.
pub fn management(more: &str) -> String {
    listen(
        "127.0.0.1:0",
        "http",
        &format!("role = \"management\"\n{more}"),
    )
}

/// A token of that name, and its section.
pub fn token(name: &str) -> (String, String) {
    let (secret, digest) = token::new().unwrap();
    let section = format!("[[token]]\nname = \"{name}\"\nsha256 = \"{digest}\"\n");
    (secret, section)
}

/// Somebody at a management listener.
pub struct Manager<'a> {
    pub host: &'a Host,
    pub token: String,
}

impl Manager<'_> {
    pub fn connect(&self) -> TcpStream {
        let client = TcpStream::connect(other(self.host)).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        client
    }

    pub fn asks(&self, method: &str, path: &str, body: &str) -> Answer {
        self.try_asks(method, path, body).unwrap()
    }

    /// The same at a listener that is one of several.
    pub fn asks_at(&self, address: &str, method: &str, path: &str, body: &str) -> Answer {
        let client = TcpStream::connect(address).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        self.asks_by(client, method, path, body).unwrap()
    }

    pub fn try_asks(&self, method: &str, path: &str, body: &str) -> std::io::Result<Answer> {
        self.asks_by(self.connect(), method, path, body)
    }

    fn asks_by(
        &self,
        mut client: TcpStream,
        method: &str,
        path: &str,
        body: &str,
    ) -> std::io::Result<Answer> {
        let shown = match self.token.as_str() {
            "" => String::new(),
            token => format!("Authorization: Bearer {token}\r\n"),
        };
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{shown}Content-Length: {length}\r\n\r\n"
        );
        client.write_all((head + body).as_bytes())?;
        let mut said = Vec::new();
        client.read_to_end(&mut said)?;
        Answer::parse(&said)
    }

    pub fn status(&self, method: &str, path: &str, body: &str) -> u16 {
        self.asks(method, path, body).status
    }

    pub fn get(&self, path: &str) -> Value {
        let answer = self.asks("GET", path, "");
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        serde_json::from_str(&answer.body).unwrap()
    }
}

/// A body with a goal of one step for these VMs.
pub fn goal(n: u64, vms: &[&str]) -> String {
    let payload = json!({
        "goal_id": goal_id(n), "key_seq": n + 1, "audience": {"vms": vms}, "not_before": "2020-01-01T00:00:00Z",
        "not_after": LATER, "min_planner": 1,
        "steps": [{"id": "one", "script": {"interpreter": "/bin/sh", "script": "x"}}],
    });
    let key = SigningKey::from_bytes(&[7; 32]);
    json!({ "envelope": dsse::sign(payload.to_string().as_bytes(), &key) }).to_string()
}

/// A host with VMs `a`, `b` and `c`, and somebody with a token who may do this with `a`.
pub fn started(may: &str) -> (Host, Vec<Port>, String) {
    let (secret, section) = token("ops");
    let more = management("") + &section + &grant("\"token:ops\"", "\"a\"", may);
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4), ("c", 5)], &more);
    (host, ports, secret)
}

fn names(list: &Value) -> Vec<&str> {
    let names = list.as_array().unwrap().iter();
    names.map(|vm| vm["name"].as_str().unwrap()).collect()
}

/// Everything of an answer but the time, and the name that was asked for.
fn without(answer: &Answer, name: &str) -> (u16, String, String) {
    let lines = answer.head.lines();
    let head = lines.filter(|line| !line.starts_with("date: "));
    let head: Vec<_> = head.map(|line| line.replace(name, "VM")).collect();
    (
        answer.status,
        head.join("\n"),
        answer.body.replace(name, "VM"),
    )
}

#[test]
fn r69_a_hidden_vm_and_one_that_is_not_there_are_answered_for_alike_and_lists_leave_it_out() {
    let (host, _ports, token) = started("\"see\", \"goal\"");
    let ops = Manager { host: &host, token };
    assert_eq!(names(&ops.get("/v1/vms")), ["a"]);
    assert_eq!(names(&ops.get("/v1/vms?limit=2")), ["a"]);
    assert_eq!(ops.get("/v1/vms/a")["name"], "a");
    let targets = ops.get("/sd/prometheus?port=80");
    assert_eq!(targets.as_array().unwrap().len(), 1, "{targets}");
    // Of one that it may see, it hears why not.
    let refused = ops.asks("DELETE", "/v1/vms/a", "");
    assert_eq!(refused.status, 403);
    assert!(refused.body.contains("manage"), "{}", refused.body);
    let requests = |name: &str| {
        [
            ("GET", format!("/v1/vms/{name}"), String::new()),
            (
                "PATCH",
                format!("/v1/vms/{name}"),
                "{\"allow\": [1]}".to_owned(),
            ),
            (
                "DELETE",
                format!("/v1/vms/{name}?force=true"),
                String::new(),
            ),
            ("POST", format!("/v1/vms/{name}/reload"), String::new()),
            (
                "GET",
                format!("/v1/vms/{name}/wait?for=agent&timeout_ms=1"),
                String::new(),
            ),
            ("GET", format!("/v1/vms/{name}/wait"), String::new()),
            ("POST", format!("/v1/vms/{name}/agent"), "{}".to_owned()),
            ("GET", format!("/v1/vms/{name}/freeze"), String::new()),
            (
                "POST",
                format!("/v1/vms/{name}/freeze"),
                "{\"lease_ms\": 1000}".to_owned(),
            ),
            ("DELETE", format!("/v1/vms/{name}/freeze"), String::new()),
            ("GET", format!("/v1/tasks?vm={name}"), String::new()),
            ("POST", "/v1/goals".to_owned(), goal(1, &[name])),
            ("POST", "/v1/goals".to_owned(), goal(1, &["a", name])),
        ]
    };
    for ((method, hidden, body), (_, unknown, same)) in
        requests("b").iter().zip(requests("x").iter())
    {
        let (hidden, unknown) = (
            ops.asks(method, hidden, body),
            ops.asks(method, unknown, same),
        );
        assert_eq!(
            without(&hidden, "`b`"),
            without(&unknown, "`x`"),
            "{method}"
        );
        assert_eq!(hidden.status, 404, "{}", hidden.body);
    }
    let denied = audit(&host, 10);
    let of = |reason: &str| {
        denied
            .iter()
            .filter(|line| line["reason"] == reason)
            .count()
    };
    assert!(of("unknown-vm") > 0 && of("not-granted") > 0, "{denied:?}");
    assert!(
        denied
            .iter()
            .any(|line| line["verb"] == "manage" && line["vm"] == "a")
    );
    assert!(
        denied
            .iter()
            .all(|line| line["caller"] == "token:ops" || line["suppressed"].is_u64())
    );
}

#[test]
fn each_verb_lets_do_its_own_and_no_other() {
    let everything = [
        ("GET", "/healthz", ""),
        ("GET", "/v1/vms/a", ""),
        ("GET", "/v1/tasks?vm=a", ""),
        ("POST", "/v1/goals", "goal"),
        ("PATCH", "/v1/vms/n", "{\"allow\": [22]}"),
        ("GET", "/metrics", ""),
        ("GET", "/v1/config", ""),
        ("GET", "/v1/trust", ""),
        ("POST", "/v1/reload", ""),
        ("GET", "/v1/grants", ""),
        ("GET", "/v1/access?as=anyone&verb=see&vm=a", ""),
        ("POST", "/v1/shutdown", ""),
    ];
    for (vms, may, want) in [
        (
            "\"*\"",
            "\"see\"",
            [200, 200, 403, 403, 403, 200, 200, 403, 403, 403, 403, 403],
        ),
        (
            "\"*\"",
            "\"see\", \"task\"",
            [200, 200, 200, 403, 403, 200, 200, 403, 403, 403, 403, 403],
        ),
        (
            "\"*\"",
            "\"see\", \"goal\"",
            [200, 200, 403, 200, 403, 200, 200, 403, 403, 403, 403, 403],
        ),
        (
            "\"*\"",
            "\"see\", \"manage\"",
            [200, 200, 403, 403, 200, 200, 200, 200, 200, 200, 200, 403],
        ),
        (
            "\"a\", \"n\"",
            "\"see\", \"manage\"",
            [200, 200, 403, 403, 200, 403, 403, 403, 403, 403, 403, 403],
        ),
        (
            "\"*\"",
            "\"reach\"",
            [200, 404, 404, 404, 404, 403, 403, 403, 403, 403, 403, 403],
        ),
    ] {
        let (token, section) = token("ops");
        let more = management("") + &section + &grant("\"token:ops\"", vms, may);
        let (host, _ports) = Host::serving(&[("a", 3)], &more);
        let new = "{\"name\": \"n\", \"cid\": 9, \"allow\": [], \"allow_vsock\": []}";
        assert_eq!(host.api("POST", "/v1/vms", new).status, 200);
        let ops = Manager { host: &host, token };
        for ((method, path, body), want) in everything.iter().zip(want) {
            let of_a = goal(1, &["a"]);
            let body = if *body == "goal" { &of_a } else { *body };
            let answer = ops.asks(method, path, body);
            assert_eq!(
                answer.status, want,
                "{may}: {method} {path}: {}",
                answer.body
            );
        }
        assert_eq!(host.api("GET", "/healthz", "").status, 200, "it still runs");
    }
}

#[test]
fn whoever_manages_a_name_adds_its_vm_and_hears_nothing_of_who_has_its_cid() {
    let (secret, section) = token("ops");
    let may = grant("\"token:ops\"", "\"web-*\"", "\"manage\"");
    let (host, _ports) = Host::serving(&[("secret", 3)], &(management("") + &section + &may));
    let ops = Manager {
        host: &host,
        token: secret,
    };
    let new = |name: &str, cid: u64| {
        let body = json!({"name": name, "cid": cid, "allow": [], "allow_vsock": []}).to_string();
        ops.asks("POST", "/v1/vms", &body)
    };
    let taken = new("web-1", 3);
    assert_eq!(taken.status, 409);
    assert!(!taken.body.contains("secret"), "{}", taken.body);
    assert_eq!(new("web-1", 7).status, 200);
    assert_eq!(new("other", 8).status, 404);
    assert_eq!(new("secret", 8).status, 404);
    assert_eq!(ops.status("DELETE", "/v1/vms/web-1?force=true", ""), 204);
}

#[test]
fn a_goal_needs_the_verb_on_every_vm_of_its_audience_and_its_tasks_another() {
    let (secret, section) = token("ops");
    let more = management("")
        + &section
        + &grant("\"token:ops\"", "\"a\", \"b\"", "\"see\", \"goal\"")
        + &grant("\"token:ops\"", "\"a\", \"c\"", "\"task\"");
    let (host, _ports) = Host::serving(&[("a", 3), ("b", 4), ("c", 5)], &more);
    let ops = Manager {
        host: &host,
        token: secret,
    };
    assert_eq!(ops.status("POST", "/v1/goals", &goal(1, &["a", "c"])), 404);
    assert_eq!(host.get("/v1/tasks"), json!([]));
    // Not for a part of its audience either, nor beyond it.
    let narrowed = |body: String, to: Value| {
        let mut body: Value = serde_json::from_str(&body).unwrap();
        body["to"] = to;
        body["relay_unchecked"] = true.into();
        body.to_string()
    };
    assert_eq!(
        ops.status(
            "POST",
            "/v1/goals",
            &narrowed(goal(1, &["a", "c"]), json!(["a"]))
        ),
        404
    );
    assert_eq!(
        ops.status(
            "POST",
            "/v1/goals",
            &narrowed(goal(1, &["a"]), json!(["a", "c"]))
        ),
        404
    );
    assert_eq!(host.get("/v1/tasks"), json!([]));
    let accepted = ops.asks("POST", "/v1/goals", &goal(2, &["a", "b"]));
    assert_eq!(accepted.status, 200, "{}", accepted.body);
    let accepted: Value = serde_json::from_str(&accepted.body).unwrap();
    let of = |tasks: &Value| -> Vec<String> {
        let tasks = tasks.as_array().unwrap().iter();
        tasks
            .map(|task| task["vm"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(of(&accepted["tasks"]), ["a"], "`goal` is not `task`");
    // Others' work.
    assert_eq!(host.api("POST", "/v1/goals", &goal(3, &["b"])).status, 200);
    assert_eq!(
        host.api("POST", "/v1/goals", &goal(4, &["b", "c"])).status,
        200
    );
    assert_eq!(of(&ops.get("/v1/tasks")), ["a", "c"]);
    assert_eq!(of(&ops.get("/v1/tasks?newest=1")), ["c"]);
    assert_eq!(of(&ops.get("/v1/tasks?limit=1")), ["a"]);
    assert_eq!(
        of(&ops.get(&format!("/v1/goals/{}", goal_id(4)))["tasks"]),
        ["c"]
    );
    let goals = ops.get("/v1/goals");
    let counted: Vec<_> = goals
        .as_array()
        .unwrap()
        .iter()
        .map(|goal| (&goal["goal_id"], &goal["vms"], &goal["open"]))
        .collect();
    assert_eq!(
        counted,
        [
            (&json!(goal_id(2)), &json!(1), &json!(1)),
            (&json!(goal_id(4)), &json!(1), &json!(1))
        ]
    );
    // What is not for it is not there.
    let all = host.get("/v1/tasks");
    let hidden = all
        .as_array()
        .unwrap()
        .iter()
        .find(|task| task["vm"] == "b")
        .unwrap()["task_id"]
        .as_str()
        .unwrap();
    let unknown = "0".repeat(32);
    for (hidden, unknown) in [
        (
            format!("/v1/tasks/{hidden}"),
            format!("/v1/tasks/{unknown}"),
        ),
        (
            format!("/v1/tasks/{hidden}/output"),
            format!("/v1/tasks/{unknown}/output"),
        ),
        (
            format!("/v1/goals/{}", goal_id(3)),
            format!("/v1/goals/{}", goal_id(99)),
        ),
        (
            format!("/v1/tasks?goal={}", goal_id(3)),
            format!("/v1/tasks?goal={}", goal_id(99)),
        ),
        (
            format!("/v1/events?goal={}", goal_id(3)),
            format!("/v1/events?goal={}", goal_id(99)),
        ),
    ] {
        let (hidden, unknown) = (ops.asks("GET", &hidden, ""), ops.asks("GET", &unknown, ""));
        assert_eq!(without(&hidden, "-"), without(&unknown, "-"));
        assert_eq!(hidden.status, 404);
    }
    assert_eq!(
        ops.get(&format!("/v1/goals?id={}", &goal_id(3)[30..])),
        json!([])
    );
}

#[test]
fn a_stream_of_events_has_no_task_of_another_vm_and_breaks_off_with_its_grant() {
    let (host, ports, token) = started("\"task\"");
    let ops = Manager { host: &host, token };
    for (n, vms) in [(1, vec!["a"]), (2, vec!["b"])] {
        assert_eq!(host.api("POST", "/v1/goals", &goal(n, &vms)).status, 200);
    }
    let mut client = ops.connect();
    let ask = format!(
        "GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {}\r\n\r\n",
        ops.token
    );
    client.write_all(ask.as_bytes()).unwrap();
    let mut lines = BufReader::new(client).lines().map_while(Result::ok);
    let mut event = || -> Option<Value> {
        let line = lines.by_ref().find(|line| line.starts_with('{'));
        line.map(|line| serde_json::from_str(&line).unwrap())
    };
    assert_eq!(event().unwrap()["task"]["vm"], "a");
    // What happens to `b` is not in it.
    let mut of_b = ports[1].connected().agent();
    let task = of_b.pull();
    of_b.report(task.task_id, Outcome::Done);
    let mut of_a = ports[0].connected().agent();
    let task = of_a.pull();
    let leased = event().unwrap();
    assert_eq!(
        (&leased["task"]["vm"], &leased["task"]["state"]),
        (&json!("a"), &json!("leased"))
    );
    // The grant goes: the next change of what was shown breaks the stream off.
    let reloaded = host.reload(|text| text.replace("may = [\"task\"]", "may = [\"goal\"]"));
    assert_eq!(reloaded["error"], Value::Null);
    of_a.report(task.task_id, Outcome::Done);
    assert_eq!(event(), None);
    assert_eq!(ops.status("GET", "/v1/tasks?vm=a", ""), 404);
}

#[test]
fn a_user_of_the_host_is_known_on_a_unix_socket_and_on_loopback_and_owns_nothing() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can be somebody else");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let socket = dir.path().join("m.sock");
    let unix = listen(
        &format!("unix:{}", socket.display()),
        "http",
        "role = \"management\"",
    );
    let more = unix
        + &management("")
        + &grant(&format!("\"user:{UID}\""), "\"a\"", "\"see\"")
        + &grant("\"user:root\"", "\"b\"", "\"see\"");
    let (host, _ports) = Host::serving(&[("a", 3), ("b", 4)], &more);
    let addresses = other(&host);
    let tcp = addresses.lines().last().unwrap().to_owned();
    let socket = socket.display().to_string();
    for (uid, sees) in [(UID, "a"), (0, "b")] {
        let over_tcp = curl(uid, &[&format!("http://{tcp}/v1/vms")]);
        let over_unix = curl(uid, &["--unix-socket", &socket, "http://aditd/v1/vms"]);
        for answer in [over_tcp, over_unix].into_iter().flatten() {
            assert_eq!(answer.0, 200, "{}", answer.1);
            let list = serde_json::from_str(&answer.1).unwrap();
            assert_eq!(names(&list), [sees]);
        }
    }
    // Root over it is a user as any other.
    let stop = curl(
        0,
        &[
            "-X",
            "POST",
            "--unix-socket",
            &socket,
            "http://aditd/v1/shutdown",
        ],
    );
    assert_eq!(stop.map(|(status, _)| status).unwrap_or(403), 403);
    // Nor is it the user who visits a page.
    for more in [
        "Origin: http://evil.example",
        "Sec-Fetch-Site: cross-site",
        "Host: evil.example",
    ] {
        let url = format!("http://{tcp}/v1/vms");
        if let Some((status, said)) = curl(UID, &["-H", more, &url]) {
            assert_eq!(status, 403, "{said}");
        }
    }
}

#[test]
fn r70_a_client_is_known_by_its_certificate_and_plain_http_is_refused() {
    let files = Files::new();
    let ca = files.authority();
    let client = files.signs(&["ci.example"]);
    let more = files.listen(
        "http",
        &format!("role = \"management\"\nclient_ca = \"{ca}\""),
    ) + &grant("\"cert:ci.example\"", "\"a\"", "\"see\"");
    let (host, _ports) = Host::serving(&[("a", 3), ("b", 4)], &more);
    let url = format!("https://{}/v1/vms", other(&host));
    let root = files.root();
    let (cert, key) = client;
    let Some((status, said)) = curl(
        UID,
        &["--cacert", &root, "--cert", &cert, "--key", &key, &url],
    ) else {
        return;
    };
    assert_eq!(status, 200, "{said}");
    assert_eq!(names(&serde_json::from_str(&said).unwrap()), ["a"]);
    // Without one it is a user of this host, who has no grant.
    let (status, said) = curl(UID, &["--cacert", &root, &url]).unwrap();
    assert_eq!((status, said.as_str()), (200, "[]"));
    let plain = format!("http://{}/v1/vms", other(&host));
    let (status, said) = curl(UID, &[&plain]).unwrap();
    assert_eq!(status, 400, "{said}");
    assert!(said.contains("https://"), "{said}");
}

#[test]
fn the_proxy_never_answers_the_api_and_a_management_listener_is_no_proxy() {
    let more = management("")
        + &listen("127.0.0.1:0", "http", "")
        + &grant(
            "\"anyone\"",
            "\"*\"",
            "\"reach\", \"see\", \"task\", \"goal\", \"manage\"",
        );
    let (host, ports) = Host::serving(&[("a", 3)], &more);
    let _control = ports[0].connected();
    let addresses = other(&host);
    let mut addresses = addresses.lines();
    let management = addresses.next().unwrap();
    let proxies = [
        addresses.next().unwrap().to_owned(),
        host.proxy().peer_addr().unwrap().to_string(),
    ];
    let ask = |at: &str, request: &str| {
        let client = TcpStream::connect(at).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        crate::access::asked(client, request)
    };
    for proxy in &proxies {
        for host in ["127.0.0.1", "aditd", "localhost", proxy] {
            let answer = ask(
                proxy,
                &format!("GET /v1/vms HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"),
            );
            assert!(
                (400..500).contains(&answer.status),
                "{}: {}",
                answer.status,
                answer.body
            );
            assert!(!answer.body.contains("\"cid\""), "{}", answer.body);
        }
    }
    for request in [
        "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
        "GET http://127.0.0.1/v1/vms HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ] {
        let answer = ask(management, request);
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert!(answer.body.contains("no-proxy"), "{}", answer.body);
    }
    let answer = ask(
        management,
        "GET /v1/vms HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    );
    assert_eq!(answer.status, 200, "`anyone` is anyone");
}

#[test]
fn the_owners_socket_is_as_it_was() {
    let (host, _ports, _) = started("\"see\"");
    let mut operator: UnixStream = host.operator();
    // Whatever it shows: there is nobody to be found out.
    operator
        .write_all(b"GET /v1/vms HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer nonsense\r\nOrigin: http://a\r\n\r\n")
        .unwrap();
    let mut said = Vec::new();
    operator.read_to_end(&mut said).unwrap();
    let answer = Answer::parse(&said).unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(
        names(&serde_json::from_str(&answer.body).unwrap()),
        ["a", "b", "c"]
    );
    let grants = host.api("GET", "/v1/grants?limit=1", "");
    assert_eq!(grants.status, 200);
    assert!(!grants.head.contains("adit-next"), "there is one only");
}

#[test]
fn somebody_of_another_machine_without_a_name_is_told_to_log_in_and_hears_nothing_else() {
    // An address of this machine that is none of loopback: who comes from it is nobody that the kernel knows.
    let ours = std::net::UdpSocket::bind("0.0.0.0:0")
        .and_then(|udp| udp.connect("192.0.2.1:9").and_then(|()| udp.local_addr()));
    let Some(ip) = ours.ok().map(|at| at.ip()).filter(|ip| !ip.is_loopback()) else {
        eprintln!("skipped: this machine has no other address");
        return;
    };
    let files = Files::new();
    let section = files.listen("http", "role = \"management\"\nopen = true");
    let (secret, token) = token("ops");
    let more = section.replace("127.0.0.1:0", &format!("{ip}:0"))
        + &token
        + &grant("\"token:ops\"", "\"a\"", "\"see\"");
    let (host, _ports) = Host::serving(&[("a", 3)], &more);
    let url = |path: &str| format!("https://{}{path}", other(&host));
    let asks = |more: &[&str], path: &str| curl(UID, &[&["-k", "-i", &url(path)], more].concat());
    let Some((status, said)) = asks(&[], "/v1/vms") else {
        return;
    };
    assert_eq!(status, 401, "{said}");
    assert!(
        said.to_lowercase().contains("www-authenticate: bearer"),
        "{said}"
    );
    for path in [
        "/v1/vms/a",
        "/v1/vms/x",
        "/v1/openapi.json",
        "/metrics",
        "/v1/tasks",
        "/v1/config",
    ] {
        assert_eq!(asks(&[], path).unwrap().0, 401, "{path}");
    }
    assert_eq!(asks(&["-X", "POST"], "/v1/shutdown").unwrap().0, 401);
    assert_eq!(asks(&[], "/healthz").unwrap().0, 200);
    let shown = format!("Authorization: Bearer {secret}");
    assert_eq!(asks(&["-H", &shown], "/v1/vms/a").unwrap().0, 200);
    let lines = audit(&host, 5);
    assert!(
        lines.iter().any(|line| line["reason"] == "anonymous"),
        "{lines:?}"
    );
}

#[test]
fn a_listener_of_a_device_serves_who_comes_in_by_it() {
    let (secret, section) = token("ops");
    let may = grant("\"token:ops\"", "\"a\"", "\"see\"");
    let more = management("device = \"lo\"") + &section + &may;
    let (mut host, _ports) = Host::serving(&[("a", 3)], &more);
    let ops = Manager {
        host: &host,
        token: secret,
    };
    assert_eq!(ops.status("GET", "/v1/vms/a", ""), 200);
    // One that is not there is named.
    host.kill();
    let text = std::fs::read_to_string(host.config_file()).unwrap();
    let text = text.replace("device = \"lo\"", "device = \"none-such\"");
    std::fs::write(host.config_file(), text).unwrap();
    let aditd = std::process::Command::new(env!("CARGO_BIN_EXE_aditd"))
        .args(["run", "--port-bin", "/bin/false", "--config"])
        .arg(host.config_file())
        .output()
        .unwrap();
    assert!(!aditd.status.success());
    let said = String::from_utf8_lossy(&aditd.stderr);
    assert!(said.contains("none-such"), "{said}");
}
