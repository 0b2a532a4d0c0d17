//! VMs that are found: `[[discover]]`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::host::Host;
use crate::tasks::apply;

/// What its VMs have in common.
const SETTINGS: &str = "allow = [80]\nlabels = { env = \"prod\" }";

/// A directory that only its owner may write in.
fn private(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A host that looks into a directory, and the directory.
fn started(more: &str) -> (Host, PathBuf, tempfile::TempDir) {
    let outer = tempfile::tempdir().unwrap();
    private(outer.path());
    let dir = outer.path().join("fc");
    private(&dir);
    let section = section(&dir, SETTINGS);
    let (host, _) = Host::serving(&[("b", 4)], &(more.to_owned() + &section));
    (host, dir, outer)
}

fn section(dir: &Path, more: &str) -> String {
    let dir = dir.display();
    format!("[[discover]]\ndir = \"{dir}\"\npattern = \"{{name}}/v.sock\"\n{more}\n")
}

fn socket(dir: &Path, name: &str) -> UnixListener {
    private(&dir.join(name));
    UnixListener::bind(dir.join(name).join("v.sock")).unwrap()
}

/// Waits until these VMs are there, and no others.
fn there(host: &Host, names: &[&str]) {
    host.until("these VMs are there", |h| {
        let vms = h.get("/v1/vms");
        let now = vms.as_array().unwrap().iter();
        let now: Vec<_> = now
            .map(|vm| vm["name"].as_str().unwrap().to_owned())
            .collect();
        (now == names).then_some(())
    });
}

/// The only directory, as the configuration's status has it, once it is as expected.
fn shown(host: &Host, expected: impl Fn(&Value) -> bool) -> Value {
    host.until("the directory is as expected", |h| {
        let shown = h.get("/v1/config")["discover"][0].clone();
        expected(&shown).then_some(shown)
    })
}

#[test]
fn a_vmms_socket_is_a_vm_until_its_directory_is_gone() {
    let (mut host, dir, _outer) = started("");
    let listener = socket(&dir, "a");
    there(&host, &["a", "b"]);
    let vm = host.get("/v1/vms/a");
    let path = dir.join("a/v.sock").display().to_string();
    assert_eq!(
        (&vm["origin"], &vm["carrier"]["hybrid"]),
        (&json!("found"), &json!(path))
    );
    assert_eq!(
        (&vm["allow"], &vm["carrier"]["way"]),
        (&json!([80]), &json!("hybrid"))
    );
    assert_eq!(shown(&host, |_| true)["vms"], 1);
    // Its settings are the directory's, and it comes and goes with its socket.
    assert_eq!(
        host.api("PATCH", "/v1/vms/a", r#"{"allow": []}"#).status,
        409
    );
    assert_eq!(host.api("DELETE", "/v1/vms/a", "").status, 409);
    assert_eq!(host.api("POST", "/v1/vms/a/lock", "{}").status, 200);
    assert_eq!(apply(&host, 1).status, 200);
    // A kill of everything: there when aditd serves again, with its lock, its queue and its number.
    host.kill();
    host.start();
    let again = host.get("/v1/vms/a");
    assert_eq!((&again["cid"], &again["queued"]), (&vm["cid"], &json!(2)));
    assert_ne!(again["lock"], Value::Null);
    // A VMM that is started again has no socket for a moment.
    drop(listener);
    fs::remove_file(dir.join("a/v.sock")).unwrap();
    let second = socket(&dir, "c");
    there(&host, &["a", "b", "c"]);
    fs::remove_dir_all(dir.join("a")).unwrap();
    there(&host, &["b", "c"]);
    // Its tasks have ended, and are known as those of any VM that was removed.
    let tasks = host.get("/v1/tasks");
    assert!(
        tasks
            .as_array()
            .unwrap()
            .iter()
            .all(|t| t["state"] == "expired"),
        "{tasks}"
    );
    // With its section, they all go.
    let section = section(&dir, SETTINGS);
    host.reload(|text| text.replace(&section, ""));
    there(&host, &["b"]);
    drop(second);
}

#[test]
fn a_vm_of_the_file_or_of_the_api_has_its_name_and_the_clash_is_said() {
    let (host, dir, _outer) = started("");
    let _in_the_way = socket(&dir, "b");
    let _free = socket(&dir, "c");
    there(&host, &["b", "c"]);
    let one = |of: &Value| {
        of["refused"]
            .as_array()
            .is_some_and(|refused| refused.len() == 1)
    };
    let said = shown(&host, one);
    let line = said["refused"][0].as_str().unwrap();
    assert!(line.contains("`b` is configured in aditd.toml"), "{line}");
    assert_eq!(host.get("/v1/vms/b")["origin"], "file");
    // A VM of the file that comes later has the name, too.
    host.reload(|text| text + "[[vm]]\nname = \"c\"\ncid = 9\n");
    host.until("it is the file's", |h| {
        (h.get("/v1/vms/c")["origin"] == "file").then_some(())
    });
    shown(&host, |of| {
        of["refused"]
            .as_array()
            .is_some_and(|refused| refused.len() == 2)
    });
    // And when it is gone, it is found again.
    host.reload(|text| text.replace("[[vm]]\nname = \"c\"\ncid = 9\n", ""));
    host.until("it is found", |h| {
        let vm = h.api("GET", "/v1/vms/c", "");
        vm.body.contains("\"origin\":\"found\"").then_some(())
    });
}

#[test]
fn r127_what_somebody_else_could_have_put_there_is_no_vm_and_says_why() {
    let (host, dir, _outer) = started("");
    let elsewhere = tempfile::tempdir().unwrap();
    let _planted = UnixListener::bind(elsewhere.path().join("v.sock")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), dir.join("a")).unwrap();
    let _good = socket(&dir, "c");
    there(&host, &["b", "c"]);
    let line = shown(&host, |of| of["refused"][0].is_string())["refused"][0].clone();
    let line = line.as_str().unwrap();
    assert!(line.contains("/fc/a: it is a link"), "{line}");
    // Swapped later: the VM of that path stays, and what is there now is not used.
    fs::remove_file(dir.join("c/v.sock")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("v.sock"), dir.join("c/v.sock")).unwrap();
    shown(&host, |of| {
        of["refused"]
            .as_array()
            .is_some_and(|refused| refused.len() == 2)
    });
    there(&host, &["b", "c"]);
    if nix::unistd::geteuid().is_root() {
        let stranger = socket(&dir, "d");
        std::os::unix::fs::chown(dir.join("d/v.sock"), Some(54_321), None).unwrap();
        let said = shown(&host, |of| {
            of["refused"].as_array().is_some_and(|r| {
                r.iter()
                    .any(|l| l.as_str().unwrap().contains("/fc/d/v.sock: "))
            })
        });
        assert!(said.to_string().contains("user 54321"), "{said}");
        drop(stranger);
    }
}

#[test]
fn a_directory_that_is_not_there_yet_is_waited_for() {
    let outer = tempfile::tempdir().unwrap();
    private(outer.path());
    let dir = outer.path().join("run/fc");
    let (host, _) = Host::serving(&[("b", 4)], &section(&dir, ""));
    assert_eq!(shown(&host, |_| true)["vms"], 0);
    private(&outer.path().join("run"));
    private(&dir);
    let _listener = socket(&dir, "a");
    there(&host, &["a", "b"]);
}

#[test]
fn a_monitor_that_is_killed_leaves_the_vms_that_were_found() {
    let (mut host, dir, _outer) = started("");
    let _listener = socket(&dir, "a");
    there(&host, &["a", "b"]);
    if host.worker() == host.pid() {
        println!("skipped: without root there is one process");
        return;
    }
    let worker = host.worker();
    host.kill_monitor();
    let _second = socket(&dir, "c");
    assert_eq!(host.get("/v1/vms/a")["origin"], "found");
    host.start();
    there(&host, &["a", "b", "c"]);
    assert_eq!(host.worker(), worker);
}
