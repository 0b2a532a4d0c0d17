//! `PATCH /v1/vms/{name}`: settings of a VM that runs. `DELETE`: what becomes of its directory.

use std::io::{Read, Write};

use adit_port::control_io::Message;
use serde_json::{Value, json};

use crate::host::{Control, Host};

const NEW: &str = r#"{"name": "b", "cid": 4, "allow": [80]}"#;

/// Adds `b`, and waits until its port process is taken for what it is.
fn added(host: &Host) -> Control {
    let answer = host.api("POST", "/v1/vms", NEW);
    assert_eq!(answer.status, 200, "{}", answer.body);
    let control = host.port("b", 4).connected();
    host.until("it is up", |h| {
        (h.get("/v1/vms/b")["state"] == "up").then_some(())
    });
    control
}

/// The proxy's status for a tunnel to a port of `b`.
fn tunnel(host: &Host, port: u16) -> (std::net::TcpStream, String) {
    let mut client = host.proxy();
    write!(client, "CONNECT b:{port} HTTP/1.1\r\nhost: b\r\n\r\n").unwrap();
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && client.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap_or_default().to_owned();
    (client, status)
}

#[test]
fn an_allow_list_changes_at_once_and_is_kept_and_open_tunnels_go_on() {
    let (mut host, _) = Host::serving(&[("a", 3)], "");
    let control = added(&host);
    let (mut open, mut inside) = std::thread::scope(|s| {
        let client = s.spawn(|| tunnel(&host, 80));
        let dial = control.dial();
        control.dialed(dial.id);
        let (inside, _) = control.attached();
        let (client, status) = client.join().unwrap();
        assert_eq!(status, "200");
        (client, inside)
    });
    let answer = host.api(
        "PATCH",
        "/v1/vms/b",
        r#"{"allow": [22], "allow_vsock": [5000]}"#,
    );
    assert_eq!(answer.status, 200, "{}", answer.body);
    let vm: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(
        (&vm["allow"], &vm["allow_vsock"]),
        (&json!([22]), &json!([5000]))
    );
    assert_eq!(tunnel(&host, 80).1, "403");
    open.write_all(b"still here").unwrap();
    let mut got = [0; 10];
    inside.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still here");
    // What is not named stays.
    host.api("PATCH", "/v1/vms/b", r#"{"busy_poll_us": 70}"#);
    host.kill();
    host.start();
    let vm = host.get("/v1/vms/b");
    assert_eq!(
        (&vm["allow"], &vm["allow_vsock"]),
        (&json!([22]), &json!([5000]))
    );
    assert_eq!(vm["busy_poll_us"], 70);
}

#[test]
fn what_the_port_process_has_only_after_a_reload_is_said() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    let _b = added(&host);
    let answer = host.api("PATCH", "/v1/vms/b", r#"{"busy_poll_us": 70}"#);
    let vm: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(vm["busy_poll_us"], 70);
    assert_eq!(vm["pending"], json!(["busy_poll_us"]));
    // As it was: nothing is left to be done.
    host.api("PATCH", "/v1/vms/b", r#"{"busy_poll_us": 0}"#);
    assert_eq!(host.get("/v1/vms/b").get("pending"), None);
}

#[test]
fn what_cannot_change_is_refused_by_name_and_changes_nothing() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    host.api("POST", "/v1/vms", NEW);
    let before = host.get("/v1/vms/b");
    for (vm, body, status, code, word) in [
        ("b", r#"{"allow": [1], "cid": 9}"#, 422, "fixed", "`cid`"),
        ("b", r#"{"name": "c"}"#, 422, "fixed", "`name`"),
        ("b", r#"{"ivshmem_mib": 8}"#, 422, "fixed", "`ivshmem_mib`"),
        (
            "b",
            r#"{"allow": [1], "busy_poll_us": 1001}"#,
            422,
            "bad-vm",
            "1000",
        ),
        ("b", r#"{"allow": [0]}"#, 422, "bad-vm", "`allow`"),
        ("b", r#"{"alow": [1]}"#, 400, "bad-json", "`alow`"),
        ("b", "7", 400, "bad-json", ""),
        ("a", r#"{"allow": [1]}"#, 409, "configured", "aditd.toml"),
        ("x", r#"{"allow": [1]}"#, 404, "unknown-vm", "`x`"),
    ] {
        let answer = host.api("PATCH", &format!("/v1/vms/{vm}"), body);
        let error: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(
            (answer.status, error["code"].as_str()),
            (status, Some(code)),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains(word), "{error}");
    }
    let after = host.get("/v1/vms/b");
    for key in ["allow", "busy_poll_us", "cid"] {
        assert_eq!(before[key], after[key]);
    }
}

#[test]
fn a_removed_vms_directory_goes_and_what_is_not_adits_stays_and_is_named() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    for (name, foreign) in [("b", false), ("c", true)] {
        let cid = if foreign { 5 } else { 4 };
        host.api(
            "POST",
            "/v1/vms",
            &format!(r#"{{"name": "{name}", "cid": {cid}}}"#),
        );
        let port = host.port(name, cid);
        let control = port.connected();
        let path = format!("/v1/vms/{name}");
        host.until("it is up", |h| {
            (h.get(&path)["state"] == "up").then_some(())
        });
        std::fs::write(host.in_vm(name, "port.log"), "x").unwrap();
        if foreign {
            std::fs::write(host.in_vm(name, "notes"), "precious").unwrap();
        }
        let answer = std::thread::scope(|s| {
            let answer = s.spawn(|| host.api("DELETE", &path, ""));
            while let Some((message, _)) = control.hear() {
                if matches!(message, Message::Quit(_)) {
                    break;
                }
            }
            drop(control);
            answer.join().unwrap()
        });
        assert_eq!(answer.status, 204, "{}", answer.body);
        assert_eq!(host.in_vm(name, "").exists(), foreign);
    }
    assert_eq!(
        std::fs::read(host.in_vm("c", "notes")).unwrap(),
        b"precious"
    );
    assert!(!host.in_vm("c", "port.log").exists());
    let log = host.log();
    assert!(
        log.contains("notes") && log.contains("directory stays"),
        "{log}"
    );
}

/// Sends a request and does not wait for its answer.
fn ask(host: &Host, method: &str, path: &str, body: &str) -> std::os::unix::net::UnixStream {
    let mut stream = host.operator();
    let len = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {len}\r\n\r\n{body}"
    )
    .unwrap();
    stream
}

/// Has been asked, and has seen by now that a connection was closed before.
fn has_noticed(host: &Host) {
    for _ in 0..3 {
        host.get("/v1/config");
    }
}

/// Keeps aditd from writing to its database.
fn locked(host: &Host) -> rusqlite::Connection {
    // It answers once it has read its VMs; without them it would end.
    host.get("/v1/vms");
    let db = rusqlite::Connection::open(host.state_dir().join("aditd.db")).unwrap();
    db.execute_batch("BEGIN IMMEDIATE").unwrap();
    db
}

#[test]
fn a_removal_goes_to_its_end_though_whoever_asked_for_it_has_gone() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    let b = added(&host);
    let asked = ask(&host, "DELETE", "/v1/vms/b", "");
    while !matches!(b.hear().unwrap().0, Message::Quit(_)) {}
    drop(asked);
    has_noticed(&host);
    drop(b);
    host.until("its name is free", |h| {
        (h.api("GET", "/v1/vms/b", "").status == 404).then_some(())
    });
}

#[test]
fn an_addition_and_a_change_go_to_their_end_though_whoever_asked_for_them_has_gone() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    let db = locked(&host);
    let asked = ask(&host, "POST", "/v1/vms", NEW);
    host.until("it is there", |h| {
        (h.api("GET", "/v1/vms/b", "").status == 200).then_some(())
    });
    drop(asked);
    has_noticed(&host);
    drop(db);
    // Its port process is /bin/false.
    host.until("somebody looks after it", |h| {
        h.get("/v1/vms/b")["fault"].as_str().map(str::to_owned)
    });
    let db = locked(&host);
    let asked = ask(&host, "PATCH", "/v1/vms/b", r#"{"allow": [22]}"#);
    has_noticed(&host);
    drop(asked);
    has_noticed(&host);
    drop(db);
    host.until("it is changed", |h| {
        (h.get("/v1/vms/b")["allow"] == json!([22])).then_some(())
    });
}

#[test]
fn a_second_removal_does_not_take_the_vm_that_has_the_name_by_then() {
    use nix::fcntl::{Flock, FlockArg};
    let (mut host, _) = Host::serving(&[("a", 3)], "");
    let b = added(&host);
    // Each removal waits for a while for whoever has the directory.
    let lock = std::fs::File::create(host.in_vm("b", "lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let mut first = ask(&host, "DELETE", "/v1/vms/b", "");
    while !matches!(b.hear().unwrap().0, Message::Quit(_)) {}
    let mut second = ask(&host, "DELETE", "/v1/vms/b", "");
    has_noticed(&host);
    drop(b);
    let mut answer = String::new();
    first.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 204 "), "{answer}");
    assert_eq!(host.api("POST", "/v1/vms", NEW).status, 200);
    second.read_to_string(&mut answer).unwrap();
    assert_eq!(host.get("/v1/vms/b")["cid"], 4);
    host.kill();
    host.start();
    assert_eq!(host.get("/v1/vms/b")["cid"], 4);
}

#[test]
fn a_port_process_that_does_not_come_up_ends_with_its_vm() {
    use std::os::unix::fs::PermissionsExt;
    let (mut host, _) = Host::new(&[], "");
    let bin = host.config_file().with_file_name("hangs");
    let pid = host.config_file().with_file_name("pid");
    let script = format!("#!/bin/sh\necho $$ > {}\nexec sleep 1000\n", pid.display());
    std::fs::write(&bin, script).unwrap();
    std::fs::set_permissions(&bin, std::fs::Permissions::from_mode(0o755)).unwrap();
    host.port_bin = bin;
    host.start();
    host.api("POST", "/v1/vms", NEW);
    let pid = host.until("it runs", |_| {
        std::fs::read_to_string(&pid)
            .ok()?
            .trim()
            .parse::<u32>()
            .ok()
    });
    assert_eq!(host.api("DELETE", "/v1/vms/b", "").status, 204);
    let process = format!("/proc/{pid}");
    host.until("it has ended", |_| {
        (!std::path::Path::new(&process).exists()).then_some(())
    });
}

#[test]
fn what_the_framework_refuses_has_the_shape_of_every_refusal() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    for (method, path, status) in [
        ("GET", "/v1/tasks?limit=x", 400),
        ("GET", "/v1/vms/a/wait", 400),
        ("DELETE", "/v1/vms/a?force=1e999", 400),
        ("PUT", "/v1/vms/a", 405),
    ] {
        let answer = host.api(method, path, "");
        assert_eq!(answer.status, status, "{path}");
        let said: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        assert!(said["code"].is_string(), "{path}: {}", answer.body);
    }
}
