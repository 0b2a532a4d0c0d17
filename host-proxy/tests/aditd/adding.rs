//! `POST /v1/vms`: the ways to a guest, kept over the end of aditd.

use std::fs;

use serde_json::{Value, json};

use crate::access::grant;
use crate::host::{Answer, Host};
use crate::management::{Manager, management, token};

fn add(host: &Host, body: Value) -> Answer {
    host.api("POST", "/v1/vms", &body.to_string())
}

fn added(host: &Host, body: Value) -> Value {
    let answer = add(host, body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

/// What the API says of a VM's way.
fn way(vm: &Value) -> (&Value, &Value, &Value) {
    let carrier = &vm["carrier"];
    (&carrier["way"], &carrier["hybrid"], &carrier["forbids"])
}

#[test]
fn a_vm_is_added_with_its_way_and_has_it_after_a_kill() {
    let (mut host, _) = Host::serving(&[("a", 3)], "");
    let run = host.state_dir().with_file_name("fc");
    let path = run.join("v.sock").display().to_string();
    let fc = added(
        &host,
        json!({"name": "fc", "carrier": {"hybrid": path, "half_closes": true}}),
    );
    // Of numbers that nobody writes down.
    let chosen = |vm: &Value| vm["cid"].as_u64().is_some_and(|cid| cid >= 1 << 30);
    let vhost = added(
        &host,
        json!({"name": "vu", "cid": 9, "carrier": "vhost-user"}),
    );
    let ring = added(&host, json!({"name": "ri", "carrier": "ring"}));
    assert!(vhost["cid"] == 9 && chosen(&fc) && chosen(&ring), "{ring}");
    for start in [false, true] {
        if start {
            host.kill();
            host.start();
        }
        let now = host.get("/v1/vms/fc");
        assert_eq!(way(&now), (&json!("hybrid"), &json!(path), &Value::Null));
        assert_eq!((&now["cid"], &now["origin"]), (&fc["cid"], &json!("api")));
        let costs = now["carrier"]["costs"].as_str().unwrap();
        assert!(costs.contains("streams end"), "{costs}");
        for (name, word) in [
            ("vu", "`vhost-user`"),
            ("ri", "`ring`"),
            ("a", "`vhost-user`"),
        ] {
            let vm = host.get(&format!("/v1/vms/{name}"));
            let forbids = json!(["migration", "savevm"]);
            assert_eq!(way(&vm), (&json!("vhost-user"), &Value::Null, &forbids));
            let why = vm["carrier"]["way_why"].as_str().unwrap();
            assert!(why.starts_with(word), "{why}");
        }
    }
    assert_eq!(host.get("/v1/vms/a")["origin"], "file");
}

#[test]
fn what_cannot_be_a_way_is_refused_and_a_socket_is_one_vms() {
    let (host, _) = Host::serving(&[("a", 3)], "");
    let _ = added(
        &host,
        json!({"name": "b", "carrier": {"hybrid": "/run/fc/b/v.sock"}}),
    );
    for (body, status, word) in [
        (
            json!({"name": "c", "carrier": {"hybrid": "/run/fc/./b/v.sock"}}),
            409,
            "`b`",
        ),
        (
            json!({"name": "c", "carrier": {"hybrid": "v.sock"}}),
            422,
            "carrier",
        ),
        (
            json!({"name": "c", "carrier": {"hybrid": "/a/../v.sock"}}),
            422,
            "carrier",
        ),
        (json!({"name": "c", "carrier": "tcp"}), 400, ""),
        (
            json!({"name": "c", "carrier": {"hybrid": "/v.sock", "x": 1}}),
            400,
            "",
        ),
        (json!({"name": "c", "cid": 2}), 422, "cid"),
    ] {
        let answer = add(&host, body.clone());
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert!(answer.body.contains(word), "{body}: {}", answer.body);
    }
    assert_eq!(host.api("GET", "/v1/vms/c", "").status, 404);
}

#[test]
fn a_path_of_the_host_is_named_by_its_owner_only() {
    let (secret, section) = token("ops");
    let more = management("") + &section + &grant("\"token:ops\"", "\"*\"", "\"see\", \"manage\"");
    let (host, _ports) = Host::serving(&[("a", 3)], &more);
    let ops = Manager {
        host: &host,
        token: secret,
    };
    let hybrid = json!({"name": "b", "carrier": {"hybrid": "/run/dbus/system_bus_socket"}});
    assert_eq!(ops.status("POST", "/v1/vms", &hybrid.to_string()), 403);
    let plain = json!({"name": "b", "carrier": "vhost-user"});
    assert_eq!(ops.status("POST", "/v1/vms", &plain.to_string()), 200);
}

/// A fault that is the operator's to see: there is to be a ring.
#[test]
fn a_vm_that_is_to_have_a_ring_and_has_none_says_so_once_its_agent_is_there() {
    use adit_port::control::Ring;
    use adit_port::control_io::Message;
    let (host, _) = Host::serving(&[], "");
    let _ = added(&host, json!({"name": "ri", "cid": 5, "carrier": "ring"}));
    let control = host.port("ri", 5).connected();
    let ring = |running| Ring {
        running,
        why: "no VMM has handed a ring over".into(),
        memory: String::new(),
        bytes: 0,
        line_ns: 0,
        hears: 0,
        rtt_ns: (0, 0),
        streams: 0,
    };
    control.say(&Message::Ring(ring(false)), None);
    let _agent = control.agent();
    let fault = |h: &Host| {
        let vm = h.get("/v1/vms/ri");
        vm["faults"]
            .as_array()
            .unwrap()
            .iter()
            .any(|f| f["kind"] == "carrier")
    };
    host.until("it has the fault", |h| fault(h).then_some(()));
    control.say(&Message::Ring(ring(true)), None);
    host.until("it has none", |h| (!fault(h)).then_some(()));
}

/// The file gets a host of that name while aditd is stopped.
#[test]
fn a_vm_whose_name_a_host_has_got_is_kept_with_a_fault_and_can_be_removed() {
    let (mut host, _) = Host::serving(&[("a", 3)], "");
    added(&host, json!({"name": "gamma", "cid": 9}));
    host.kill();
    let pin = format!("sha256/{}=", "A".repeat(43));
    let text = fs::read_to_string(host.config_file()).unwrap();
    let section =
        format!("[[host]]\nname = \"gamma\"\naddress = \"192.0.2.1:1\"\npin = \"{pin}\"\n");
    fs::write(host.config_file(), format!("{text}\n{section}")).unwrap();
    host.start();
    for vm in [host.get("/v1/vms/gamma"), host.get("/v1/vms")[1].clone()] {
        // Its port process may be at fault besides.
        let faults = vm["faults"].as_array().unwrap();
        let named = faults.iter().find(|fault| fault["kind"] == "name");
        let text = named.map_or("", |fault| fault["text"].as_str().unwrap());
        assert!(
            vm["name"] == "gamma" && text.contains("adit vm rm gamma"),
            "{vm}"
        );
    }
    assert!(host.log().contains("`gamma` is the name of a host too"));
    assert_eq!(host.api("DELETE", "/v1/vms/gamma", "").status, 204);
    // Now it is the host's alone.
    let again = add(&host, json!({"name": "gamma", "cid": 9}));
    assert_eq!(again.status, 409, "{}", again.body);
}
