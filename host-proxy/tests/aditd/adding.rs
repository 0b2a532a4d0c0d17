//! `POST /v1/vms`: the ways to a guest, kept over the end of aditd.

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
