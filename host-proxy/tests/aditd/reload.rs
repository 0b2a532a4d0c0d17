//! SIGHUP: aditd goes on, with the VMs that the file has now.

use adit_port::control_io::Message;

use crate::host::{Host, Port};

fn names(host: &Host) -> Vec<String> {
    let vms = host.get("/v1/vms");
    let names = vms.as_array().unwrap().iter();
    names
        .map(|vm| vm["name"].as_str().unwrap().to_owned())
        .collect()
}

/// Its port process ends as soon as it is told to.
fn ends_when_told(port: Port) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let control = port.connected();
        while let Some((message, _)) = control.hear() {
            if matches!(message, Message::Quit(_)) {
                return;
            }
        }
    })
}

fn section(name: &str, cid: u64, more: &str) -> String {
    format!("[[vm]]\nname = \"{name}\"\ncid = {cid}\n{more}\n")
}

#[test]
fn sighup_adds_removes_and_changes_vms_and_the_process_goes_on() {
    let (mut host, mut ports) = Host::new(&[("a", 3), ("b", 4)], "");
    host.start();
    let pid = host.pid();
    let gone = ends_when_told(ports.pop().unwrap());
    let _stays = ports[0].connected();
    host.until("both are up", |h| {
        let is_up = |name| h.get(&format!("/v1/vms/{name}"))["state"] == "up";
        (is_up("a") && is_up("b")).then_some(())
    });
    host.reload(|old| {
        let (head, _) = old.split_once("[[vm]]").unwrap();
        let a = section("a", 3, "allow = [80, 443]\nbusy_poll_us = 50");
        // With the CID that is free by then.
        let c = section("c", 4, "allow = [22]");
        format!("{head}{a}{c}")
    });
    gone.join().unwrap();
    assert_eq!(names(&host), ["a", "c"]);
    let a = host.get("/v1/vms/a");
    assert_eq!(a["allow"], serde_json::json!([80, 443]));
    // What its port process does not have yet is said.
    assert_eq!(a["pending"], serde_json::json!(["busy_poll_us"]));
    assert_eq!(a["state"], "up");
    let said = host.log();
    assert!(
        said.contains("busy_poll_us") && said.contains("adit vm reload"),
        "{said}"
    );
    assert!(!host.in_vm("b", "").exists());
    assert_eq!(host.pid(), pid);
    host.terminate();
    assert!(host.ended());
}

#[test]
fn a_configuration_with_a_mistake_changes_nothing_and_is_shown_with_its_reason() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let _a = ports[0].connected();
    let status = host.reload(|old| old + &section("b", 4, "") + &section("c", 5, "alow = [80]"));
    for said in [status["error"].as_str().unwrap(), &host.log()] {
        assert!(said.contains("did you mean `allow`"), "{said}");
    }
    assert_eq!(names(&host), ["a"]);
    let metrics = host.api("GET", "/metrics", "").body;
    assert!(
        metrics.contains("adit_config_last_reload_successful 0"),
        "{metrics}"
    );
    // Put right, it is applied.
    host.reload(|old| old.replace("alow", "allow"));
    assert_eq!(names(&host), ["a", "b", "c"]);
    assert_eq!(host.get("/v1/config")["error"], serde_json::Value::Null);
    let metrics = host.api("GET", "/metrics", "").body;
    assert!(
        metrics.contains("adit_config_last_reload_successful 1"),
        "{metrics}"
    );
}

#[test]
fn what_takes_a_restart_is_named_and_left_as_it_is() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let _a = ports[0].connected();
    let status = host.reload(|old| {
        old.replace("listen = \"127.0.0.1:0\"", "listen = \"127.0.0.1:1\"")
            .replace("cid = 3", "cid = 7")
            + "[limits]\nkept_days = 1\n"
    });
    let said = host.log();
    for what in ["proxy.listen", "limits.kept_days", "`cid` of a"] {
        assert!(said.contains(what), "{what}: {said}");
        assert!(status["restart"].to_string().contains(what), "{status}");
    }
    assert_eq!(host.get("/v1/vms/a")["cid"], 3);
    host.proxy();
}

#[test]
fn a_vm_that_is_held_by_its_vmm_stays_and_one_of_the_api_is_not_the_files_to_have() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let a = ports[0].connected();
    a.say(&Message::Held(adit_port::control::Held {}), None);
    host.until("it is held", |h| h.get("/v1/vms/a")["held_by"].as_u64());
    let status = host.reload(|old| old.split_once("[[vm]]").unwrap().0.to_owned());
    assert!(
        status["restart"].to_string().contains("its VMM"),
        "{status}"
    );
    assert_eq!(names(&host), ["a"]);
    assert_eq!(
        host.api("POST", "/v1/vms", r#"{"name": "b", "cid": 4}"#)
            .status,
        200
    );
    let status = host.reload(|old| old + &section("a", 3, "") + &section("b", 4, ""));
    assert!(
        status["error"].to_string().contains("adit vm add"),
        "{status}"
    );
    // Those of the API are nobody else's to remove.
    host.reload(|old| old.split_once("[[vm]]").unwrap().0.to_owned() + &section("a", 3, ""));
    assert_eq!(names(&host), ["a", "b"]);
}

#[test]
fn what_could_not_be_done_of_the_file_is_shown() {
    let (mut host, mut ports) = Host::new(&[("a", 3), ("b", 4)], "");
    host.start();
    let b = ports.pop().unwrap().connected();
    host.until("it is up", |h| {
        (h.get("/v1/vms/b")["state"] == "up").then_some(())
    });
    let status = std::thread::scope(|s| {
        let reloaded = s.spawn(|| {
            host.reload(|old| {
                let (head, _) = old.split_once("[[vm]]").unwrap();
                format!("{head}{}{}", section("a", 3, ""), section("c", 5, ""))
            })
        });
        while !matches!(b.hear().unwrap().0, Message::Quit(_)) {}
        // Somebody is faster, while `b` ends.
        let new = r#"{"name": "c", "cid": 9}"#;
        assert_eq!(host.api("POST", "/v1/vms", new).status, 200);
        drop(b);
        reloaded.join().unwrap()
    });
    let left = status["restart"].to_string();
    assert!(left.contains("the VM c"), "{status}");
}

#[test]
fn a_file_that_is_no_file_or_has_nothing_in_it_is_refused_and_aditd_goes_on() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    // An editor that has just begun, or a full disk.
    let status = host.reload(|_| String::new());
    assert!(status["error"].to_string().contains("empty"), "{status}");
    assert_eq!(names(&host), ["a"]);
    let path = host.config_file();
    for make in [
        |p: &std::path::Path| nix::unistd::mkfifo(p, nix::sys::stat::Mode::S_IRUSR).unwrap(),
        |p: &std::path::Path| std::fs::create_dir(p).unwrap(),
        |p: &std::path::Path| {
            let file = std::fs::File::create(p).unwrap();
            file.set_len(1 << 30).unwrap();
        },
    ] {
        let _ = std::fs::remove_file(&path);
        make(&path);
        let before = host.get("/v1/config")["reads"].as_u64();
        host.signal(nix::sys::signal::Signal::SIGHUP);
        let status = host.until("it is read", |h| {
            let status = h.get("/v1/config");
            (status["reads"].as_u64() > before).then_some(status)
        });
        assert!(status["error"].is_string(), "{status}");
        assert_eq!(names(&host), ["a"]);
        let _ = std::fs::remove_dir(&path);
    }
}
