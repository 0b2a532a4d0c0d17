//! A disk without room: what is asked for is refused with the reason, what was there goes on, and room is enough to recover.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use adit_port::control_io::Message;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use crate::host::{Host, Port};

/// Puts a small file system there, for this thread and the processes that it starts.
fn small_disk(at: &Path) -> bool {
    let none = None::<&str>;
    let mounted = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
        .and_then(|()| mount(none, at, Some("tmpfs"), MsFlags::empty(), Some("size=512k")));
    if let Err(e) = mounted {
        println!("skipped: no small file system can be mounted here: {e}");
    }
    mounted.is_ok()
}

/// Takes all room that there is, also what is given back late.
fn fill(dir: &Path) {
    let path = dir.join("fill");
    let mut file = fs::File::create(path).unwrap();
    while rustix::fs::statvfs(dir).unwrap().f_bavail > 0 {
        if let Err(e) = file.write_all(&[0; 4096]) {
            assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
        }
    }
}

fn add(host: &Host, name: &str, cid: u64) -> (u16, String) {
    let answer = host.api(
        "POST",
        "/v1/vms",
        &json!({"name": name, "cid": cid}).to_string(),
    );
    (answer.status, answer.body)
}

/// Deletes a VM whose port process ends when it is told to.
fn removed(host: &Host, port: Port) -> u16 {
    let control = port.connected();
    let path = format!("/v1/vms/{}", port.name);
    host.until("it is up", |h| {
        (h.get(&path)["state"] == "up").then_some(())
    });
    std::thread::scope(|s| {
        let answer = s.spawn(|| host.api("DELETE", &path, "").status);
        while let Some((message, _)) = control.hear() {
            if matches!(message, Message::Quit(_)) {
                break;
            }
        }
        drop(control);
        answer.join().unwrap()
    })
}

#[test]
fn r76_a_full_disk_refuses_changes_with_the_reason_and_vms_go_on() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    let state = host.state_dir();
    fs::create_dir(&state).unwrap();
    if !small_disk(&state) {
        return;
    }
    host.start();
    let _a = ports[0].connected();
    assert_eq!(add(&host, "b", 4).0, 200);
    let b = host.port("b", 4);
    let control = b.connected();
    host.until("it is up", |h| {
        (h.get("/v1/vms/b")["state"] == "up").then_some(())
    });
    fill(&state);
    for (method, path, body) in [
        ("POST", "/v1/vms", r#"{"name": "c", "cid": 5}"#),
        ("PATCH", "/v1/vms/b", r#"{"allow": [22]}"#),
        ("DELETE", "/v1/vms/b", ""),
    ] {
        let answer = host.api(method, path, body);
        let error: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(answer.status, 507, "{method}: {error}");
        assert!(
            error["message"].as_str().unwrap().contains("full"),
            "{error}"
        );
        assert!(error["help"].as_str().unwrap().contains("space"), "{error}");
    }
    // All is as it was.
    assert_eq!(host.get("/v1/vms").as_array().unwrap().len(), 2);
    let vm = host.get("/v1/vms/b");
    assert_eq!((&vm["state"], &vm["allow"]), (&json!("up"), &json!([])));
    fs::remove_file(state.join("fill")).unwrap();
    assert_eq!(add(&host, "c", 5).0, 200);
    assert_eq!(
        host.api("PATCH", "/v1/vms/b", r#"{"allow": [22]}"#).status,
        200
    );
    drop(control);
    assert_eq!(removed(&host, b), 204);
    // What was said yes to is there after a crash.
    host.kill();
    host.start();
    let names = host.get("/v1/vms");
    let names: Vec<_> = names
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| &vm["name"])
        .collect();
    assert_eq!(names, ["a", "c"]);
}

#[test]
fn an_aditd_that_starts_on_a_full_disk_says_so() {
    let (mut host, _) = Host::new(&[], "");
    let state = host.state_dir();
    fs::create_dir(&state).unwrap();
    if !small_disk(&state) {
        return;
    }
    host.start();
    host.kill();
    // Whoever closes it last removes the files beside it, for which there is no room then.
    let path = state.join("aditd.db");
    let db = rusqlite::Connection::open(&path).unwrap();
    let tables = "SELECT count(*) FROM sqlite_schema";
    db.query_row(tables, [], |row| row.get::<_, u32>(0))
        .unwrap();
    db.close().unwrap();
    assert!(!path.with_extension("db-wal").exists());
    fill(&state);
    let mut aditd = Command::new(env!("CARGO_BIN_EXE_aditd"));
    aditd.args(["run", "--port-bin", "/bin/false", "--config"]);
    aditd.arg(host.config_file()).stderr(Stdio::piped());
    let mut aditd = aditd.spawn().unwrap();
    let mut said = String::new();
    // Up to the reason, or to the line that says that it serves.
    let mut lines = BufReader::new(aditd.stderr.take().unwrap()).lines();
    while !said.contains("aditd: ") && !said.contains("serving") {
        said += &lines.next().unwrap().unwrap();
    }
    let _ = aditd.kill();
    aditd.wait().unwrap();
    assert!(said.contains("the disk is full"), "{said}");
}
