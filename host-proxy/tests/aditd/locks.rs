//! VMs that are locked: nothing new goes there, what is there goes on, and whoever asks hears why.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use adit_port::control_io::Message;
use adit_tasks::wire::{Outcome, Pull, WireKind};
use serde_json::{Value, json};

use crate::access::{audit, grant};
use crate::host::{Answer, Control, Host};
use crate::management::{Manager, management, token};
use crate::peers::{to_alpha, two};
use crate::proxy::head;
use crate::tasks::apply;

const REASON: &str = "a new kernel, until noon";

fn lock(host: &Host, vm: &str) {
    let body = json!({ "reason": REASON }).to_string();
    let answer = host.api("POST", &format!("/v1/vms/{vm}/lock"), &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn unlock(host: &Host, vm: &str) {
    let answer = host.api("DELETE", &format!("/v1/vms/{vm}/lock"), "");
    assert_eq!(answer.status, 204, "{}", answer.body);
}

fn asks(host: &Host, vm: &str) -> TcpStream {
    let mut client = host.proxy();
    write!(client, "CONNECT {vm}:80 HTTP/1.1\r\nHost: {vm}:80\r\n\r\n").unwrap();
    client
}

/// A tunnel to `a`: the client's end, and the guest's.
fn tunnel(host: &Host, control: &Control) -> (TcpStream, UnixStream) {
    let mut client = asks(host, "a");
    let (guest, _) = control.tunnel();
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    (client, guest)
}

/// A client that is refused.
fn refused(host: &Host) -> Answer {
    let mut said = Vec::new();
    asks(host, "a").read_to_end(&mut said).unwrap();
    let answer = Answer::parse(&said).unwrap();
    assert_eq!(answer.status, 503, "{}", answer.body);
    answer
}

#[test]
fn a_locked_vm_refuses_new_tunnels_with_the_reason_and_the_open_ones_go_on() {
    let (mut host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let control = ports[0].connected();
    let other_port = ports[1].connected();
    let (mut client, mut guest) = tunnel(&host, &control);
    lock(&host, "a");
    let answer = refused(&host);
    let text = format!("VM `a` is locked: {REASON}\n");
    assert!(answer.body.starts_with(&text), "{}", answer.body);
    assert!(answer.body.contains("`adit vm unlock`"), "{}", answer.body);
    assert_eq!(answer.body.lines().count(), 2);
    // The heads of these answers are in small letters.
    let status = "proxy-status: adit; error=destination_unavailable; details=\"vm `a` is locked: ";
    assert!(answer.head.contains(status), "{}", answer.head);
    assert!(!answer.head.contains("retry-after"), "{}", answer.head);
    let denied = &audit(&host, 1)[0];
    assert_eq!(
        (&denied["vm"], &denied["reason"]),
        (&json!("a"), &json!("locked"))
    );
    // What was open goes on, and so does the other VM.
    client.write_all(b"to").unwrap();
    guest.write_all(b"fro").unwrap();
    let (mut to, mut fro) = ([0; 2], [0; 3]);
    guest.read_exact(&mut to).unwrap();
    client.read_exact(&mut fro).unwrap();
    assert_eq!((&to, &fro), (b"to", b"fro"));
    let mut other = asks(&host, "b");
    let (_guest, _) = other_port.tunnel();
    assert!(head(&mut other).starts_with("HTTP/1.1 200 "));
    // Shown wherever VMs are.
    let vm = host.get("/v1/vms/a");
    assert_eq!(vm["lock"]["reason"], REASON);
    assert!(vm["lock"]["by"].as_str().unwrap().contains("user:") || vm["lock"]["by"] == "owner");
    assert_eq!(host.get("/v1/vms/b")["lock"], Value::Null);
    assert_eq!(host.get("/v1/resolve")["vms"][0]["locked"], true);
    let metrics = host.api("GET", "/metrics", "").body;
    for line in ["adit_vm_locked{vm=\"a\"} 1", "adit_vm_locked{vm=\"b\"} 0"] {
        assert!(metrics.lines().any(|l| l == line), "{line}: {metrics}");
    }
    let events = host.api("GET", "/v1/host-events", "").body;
    let locked = events.lines().find(|line| line.contains("vm-locked"));
    assert!(locked.unwrap().contains(REASON), "{events}");
    // Over a kill, and then no more.
    host.kill();
    host.start();
    let control = ports[0].connected();
    assert!(refused(&host).body.starts_with(&text));
    unlock(&host, "a");
    tunnel(&host, &control);
    assert_eq!(host.get("/v1/vms/a")["lock"], Value::Null);
    host.kill();
    host.start();
    let control = ports[0].connected();
    tunnel(&host, &control);
}

#[test]
fn a_locked_vm_of_another_host_is_refused_here_as_it_is_there() {
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    let _b = beta.ports[0].connected();
    lock(&beta.host, "b");
    let mut said = Vec::new();
    asks(&alpha.host, "b").read_to_end(&mut said).unwrap();
    let answer = Answer::parse(&said).unwrap();
    assert_eq!(answer.status, 503, "{}", answer.body);
    // It takes somebody, and no time: nobody is told to ask again.
    assert!(!answer.head.contains("retry-after"), "{}", answer.head);
    let says = |part: &str| answer.body.contains(part);
    assert!(
        says(REASON) && says("`adit vm unlock`") && says("host `beta`"),
        "{}",
        answer.body
    );
}

#[test]
fn a_relayed_request_to_a_locked_vm_is_refused_on_a_connection_that_was_there() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let _control = ports[0].connected();
    lock(&host, "a");
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    let answer = Answer::parse(&said).unwrap();
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains(REASON), "{}", answer.body);
}

/// State and reason of each task, in order.
fn tasks(host: &Host) -> Vec<(String, String)> {
    let tasks = host.get("/v1/tasks");
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let each = tasks.as_array().unwrap().iter();
    each.map(|t| (text(&t["state"]), text(&t["reason"])))
        .collect()
}

#[test]
fn tasks_for_a_locked_vm_stay_queued_and_say_why_and_what_the_guest_has_goes_on() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut agent = control.agent();
    assert_eq!(apply(&host, 1).status, 200);
    let one = agent.pull();
    lock(&host, "a");
    // A goal is queued, not refused.
    assert_eq!(apply(&host, 2).status, 200);
    let because = format!("its VM is locked: {REASON}");
    let waits = ("queued".to_owned(), because);
    let leased = ("leased".to_owned(), String::new());
    let all = [leased.clone(), waits.clone(), waits.clone(), waits.clone()];
    assert_eq!(tasks(&host), all);
    assert_eq!(
        host.get("/v1/tasks?state=queued").as_array().unwrap().len(),
        3
    );
    // What it has, it gets again when it asks again, also of the next aditd; and nothing else.
    host.kill();
    host.start();
    let control = ports[0].connected();
    let mut agent = control.agent();
    assert_eq!(agent.pull().task_id, one.task_id);
    agent.report(one.task_id, Outcome::Done);
    agent.say(WireKind::Pull, 7, &Pull { epoch: 1 });
    agent.heard();
    assert_eq!(tasks(&host)[1..], all[1..]);
    unlock(&host, "a");
    let two = agent.task();
    // Of the first goal: the second one begins with another.
    assert_eq!(two.step_id, "two");
}

/// Waits for this condition, but not long.
fn waited(host: &Host, timeout_ms: u32) -> Answer {
    let path = format!("/v1/vms/b/wait?for=drained&timeout_ms={timeout_ms}");
    host.api("GET", &path, "")
}

#[test]
fn a_vm_is_drained_once_its_tunnels_and_its_tasks_have_ended() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    let added = host.api(
        "POST",
        "/v1/vms",
        r#"{"name": "b", "cid": 4, "allow": [80]}"#,
    );
    assert_eq!(added.status, 200, "{}", added.body);
    let port = host.port("b", 4);
    let control = port.connected();
    let mut agent = control.agent();
    assert_eq!(
        waited(&host, 1).status,
        409,
        "what comes anew is never over"
    );
    let goal = crate::management::goal(1, &["b"]);
    assert_eq!(host.api("POST", "/v1/goals", &goal).status, 200);
    let task = agent.pull();
    lock(&host, "b");
    // The agent's own stream, and one tunnel.
    let streams = |streams| {
        let mut status = port.status(true);
        status.streams = streams;
        control.say(&Message::Status(status), None);
        host.until("it is heard", |h| {
            (h.get("/v1/vms/b")["streams"] == streams).then_some(())
        });
    };
    streams(2);
    let open = waited(&host, 1);
    assert_eq!(open.status, 408);
    assert!(open.body.contains("1 tunnel and 1 task"), "{}", open.body);
    streams(1);
    let open = waited(&host, 1);
    assert!(open.body.contains("has 1 task open"), "{}", open.body);
    agent.report(task.task_id, Outcome::Done);
    assert_eq!(waited(&host, 20_000).status, 200);
    drop((agent, control, port));
    assert_eq!(host.api("DELETE", "/v1/vms/b", "").status, 204);
    // A new one of that name is another.
    let added = host.api("POST", "/v1/vms", r#"{"name": "b", "cid": 4}"#);
    let vm: Value = serde_json::from_str(&added.body).unwrap();
    assert_eq!((added.status, &vm["lock"]), (200, &Value::Null));
}

#[test]
fn to_lock_takes_manage_and_a_reason_is_one_short_line() {
    let (secret, section) = token("ops");
    let more = management("") + &section + &grant("\"token:ops\"", "\"a\"", "\"see\", \"manage\"");
    let more = more + &grant("\"token:ops\"", "\"b\"", "\"see\"");
    let (host, _ports) = Host::serving(&[("a", 3), ("b", 4)], &more);
    let ops = Manager {
        host: &host,
        token: secret,
    };
    assert_eq!(ops.status("POST", "/v1/vms/b/lock", "{}"), 403);
    assert_eq!(ops.status("DELETE", "/v1/vms/b/lock", ""), 403);
    assert_eq!(ops.status("POST", "/v1/vms/c/lock", "{}"), 404);
    let locked = ops.asks("POST", "/v1/vms/a/lock", "{}");
    let vm: Value = serde_json::from_str(&locked.body).unwrap();
    assert_eq!(
        (locked.status, &vm["lock"]["by"]),
        (200, &json!("token:ops"))
    );
    // Another reason, of the same lock.
    let again = ops.asks("POST", "/v1/vms/a/lock", r#"{"reason": "x"}"#);
    let again: Value = serde_json::from_str(&again.body).unwrap();
    assert_eq!(again["lock"]["since"], vm["lock"]["since"]);
    for (body, status) in [
        (r#"{"reason": "a\nb"}"#.to_owned(), 422),
        (json!({ "reason": "x".repeat(201) }).to_string(), 422),
        (r#"{"why": "x"}"#.into(), 400),
    ] {
        assert_eq!(
            ops.status("POST", "/v1/vms/a/lock", &body),
            status,
            "{body}"
        );
    }
    assert_eq!(ops.get("/v1/vms/a")["lock"]["reason"], "x");
    assert_eq!(ops.status("DELETE", "/v1/vms/a/lock", ""), 204);
    assert_eq!(
        ops.status("DELETE", "/v1/vms/a/lock", ""),
        204,
        "it is open"
    );
}
