//! What aditd believes of a guest's card, and what it says where it does not.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use adit_host_proxy::access::tag::Tag;
use adit_host_proxy::access::{Caller, Verb};
use adit_names::ServiceName;
use adit_port::control::{Target, Tunnels};
use adit_port::control_io::Message;
use adit_tasks::PublicKey;
use adit_tasks::dsse::{CARD_MAX, Type, sign_as};
use adit_tasks::wire::Enrolment;
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};

use crate::access::grant;
use crate::host::{Control, Host};

const LATER: &str = "2100-01-01T00:00:00Z";

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn trust() -> String {
    let line = PublicKey::of(&key(7), "fleet");
    format!("[trust]\ncard = [\"roles=card {line}\"]")
}

fn card(by: u8, vm: &str, generation: u64, not_after: &str, more: Value) -> Enrolment {
    let mut card = json!({
        "vm_id": vm, "generation": generation, "labels": {"env": "prod"}, "not_after": not_after
    });
    for (key, value) in more.as_object().unwrap() {
        card[key] = value.clone();
    }
    Enrolment {
        card: sign_as(Type::Card, card.to_string().as_bytes(), &key(by)).into_bytes(),
        place: "SMBIOS".into(),
        ..Enrolment::default()
    }
}

fn good(generation: u64) -> Enrolment {
    card(7, "a", generation, LATER, json!({}))
}

/// What is shown of VM `a` once its guest has said this.
fn shown(host: &Host, control: &Control, said: &Enrolment) -> Value {
    let _agent = control.enrolled("a", said);
    host.get("/v1/vms/a")
}

/// Checks that a card is not believed, for this reason, and that this is a fault.
fn refused(vm: &Value, why: &str) {
    let unproved = vm["card"]["unproved"].as_str().unwrap();
    assert!(unproved.contains(why), "{why}: {unproved}");
    assert!(
        vm["labels"].is_null() && vm["card"]["generation"].is_null(),
        "{vm}"
    );
    let fault = vm["fault"].as_str().unwrap();
    assert!(fault.contains(why), "{why}: {fault}");
}

#[test]
fn labels_are_those_of_a_card_that_is_signed_for_this_vm_by_a_trusted_key() {
    let (host, ports) = Host::serving(&[("a", 3)], &trust());
    let control = ports[0].connected();
    let vm = shown(&host, &control, &good(3));
    assert_eq!(vm["labels"], json!({"env": "prod"}));
    assert_eq!(vm["card"]["generation"], 3);
    assert_eq!(vm["card"]["place"], "SMBIOS");
    assert!(
        vm["card"]["unproved"].is_null() && vm["fault"].is_null(),
        "{vm}"
    );
    let listed = host.get("/v1/vms");
    assert_eq!(listed[0]["labels"]["env"], "prod");
    refused(
        &shown(&host, &control, &card(8, "a", 3, LATER, json!({}))),
        "not trusted",
    );
    refused(
        &shown(&host, &control, &card(7, "b", 3, LATER, json!({}))),
        "for b",
    );
    let over = card(7, "a", 3, "2020-01-01T00:00:00Z", json!({}));
    refused(&shown(&host, &control, &over), "valid until 2020");
    let wide = json!({"anchors": [PublicKey::of(&key(8), "").to_string()]});
    refused(
        &shown(&host, &control, &card(7, "a", 3, LATER, wide)),
        "roles=card,goal adit-ed25519",
    );
    let mut cut = good(3);
    cut.card.truncate(100);
    refused(&shown(&host, &control, &cut), "damaged");
    let mut long = good(3);
    long.card.splice(1..1, vec![b' '; CARD_MAX]);
    refused(&shown(&host, &control, &long), "at most 1024");
    // None of them has changed what is believed next.
    assert_eq!(shown(&host, &control, &good(3))["labels"]["env"], "prod");
    let metrics = host.api("GET", "/metrics", "").body;
    assert!(!metrics.contains("kind=\"card\""), "{metrics}");
}

#[test]
fn r133_a_generation_never_goes_back_also_for_the_next_aditd() {
    let (mut host, ports) = Host::serving(&[("a", 3)], &trust());
    let control = ports[0].connected();
    assert_eq!(shown(&host, &control, &good(4))["card"]["generation"], 4);
    refused(
        &shown(&host, &control, &good(3)),
        "one of 4 was here before",
    );
    host.kill();
    host.start();
    let control = ports[0].connected();
    refused(
        &shown(&host, &control, &good(3)),
        "one of 4 was here before",
    );
    assert_eq!(shown(&host, &control, &good(4))["card"]["generation"], 4);
    assert_eq!(shown(&host, &control, &good(5))["labels"]["env"], "prod");
}

#[test]
fn r133_a_generation_outlives_the_vm_and_its_guests_key_does_not() {
    let (host, _) = Host::serving(&[], &trust());
    let add = || {
        let new = json!({"name": "a", "cid": 3}).to_string();
        assert_eq!(host.api("POST", "/v1/vms", &new).status, 200);
        host.port("a", 3)
    };
    let own = |seed: u8, said: Enrolment| Enrolment {
        guest_pk: Some(PublicKey::of(&key(seed), "").to_bytes()),
        ..said
    };
    let port = add();
    let control = port.connected();
    let vm = shown(&host, &control, &own(9, good(4)));
    assert_eq!(vm["card"]["generation"], 4);
    drop(control);
    drop(port);
    assert_eq!(host.api("DELETE", "/v1/vms/a", "").status, 204);
    let port = add();
    let control = port.connected();
    refused(
        &shown(&host, &control, &own(10, good(3))),
        "one of 4 was here before",
    );
    let vm = shown(&host, &control, &own(10, good(4)));
    let doubt = vm["guest_key"]["unproved"].as_str().unwrap();
    assert!(doubt.contains("learnt from the guest"), "{doubt}");
}

#[test]
fn a_card_whose_time_ends_while_the_agent_is_connected_is_a_fault_from_then_on() {
    let (host, ports) = Host::serving(&[("a", 3)], &trust());
    let control = ports[0].connected();
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_millis(1500);
    let mut agent = control.enrolled("a", &card(7, "a", 3, &soon.to_string(), json!({})));
    let vm = host.get("/v1/vms/a");
    assert!(
        vm["fault"].is_null() && vm["labels"]["env"] == "prod",
        "{vm}"
    );
    host.until("its time is over", |h| {
        h.get("/v1/vms/a")["fault"].as_str().map(|fault| {
            assert!(fault.contains("its time was over"), "{fault}");
        })
    });
    let metrics = host.api("GET", "/metrics", "").body;
    assert!(metrics.contains("kind=\"card\"} 1"), "{metrics}");
    // The log has it when the agent next says something.
    agent.heard();
    assert!(host.log().contains("its time was over"), "{}", host.log());
}

#[test]
fn r110_enrolments_that_come_faster_than_they_are_judged_wait_and_others_do_not() {
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4)], &trust());
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let mut agent = a.agent();
    let begin = std::time::Instant::now();
    for n in 1..=40 {
        agent.say(adit_tasks::wire::WireKind::Enrolment, 0, &good(n));
    }
    let mut other = b.agent();
    other.heard();
    assert!(begin.elapsed().as_secs() < 3);
    agent.heard();
    // 16 at once, 16 after four seconds, the rest after eight.
    assert!(begin.elapsed().as_secs() >= 7, "{:?}", begin.elapsed());
    assert_eq!(host.get("/v1/vms/a")["card"]["generation"], 40);
}

#[test]
fn without_a_trusted_key_a_card_is_unproved_and_no_fault() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let vm = shown(&host, &control, &good(3));
    assert!(
        vm["card"]["unproved"].as_str().unwrap().contains("[trust]"),
        "{vm}"
    );
    assert!(vm["labels"].is_null() && vm["fault"].is_null(), "{vm}");
}

#[test]
fn a_guests_key_is_unproved_unless_its_card_names_it() {
    let (host, ports) = Host::serving(&[("a", 3)], &trust());
    let control = ports[0].connected();
    let own = |seed: u8, said: Enrolment| Enrolment {
        guest_pk: Some(PublicKey::of(&key(seed), "").to_bytes()),
        ..said
    };
    let unproved = |said: &Enrolment| shown(&host, &control, said)["guest_key"]["unproved"].clone();
    let says = |value: Value, part: &str| {
        let text = value.as_str().unwrap();
        assert!(text.contains(part), "{text}");
    };
    says(
        unproved(&own(9, Enrolment::default())),
        "learnt from the guest",
    );
    says(unproved(&own(9, good(3))), "learnt from the guest");
    says(unproved(&own(10, good(3))), "a clone");
    // A new card begins anew.
    says(unproved(&own(10, good(4))), "learnt from the guest");
    let named = json!({"guest_pk": PublicKey::of(&key(10), "").to_string()});
    let named = card(7, "a", 4, LATER, named);
    assert!(unproved(&own(10, named.clone())).is_null());
    says(unproved(&own(9, named)), "the card names");
    // What is no key is none.
    let weak = Enrolment {
        guest_pk: Some([0; 32]),
        ..good(4)
    };
    assert!(shown(&host, &control, &weak)["guest_key"].is_null());
}

#[test]
fn what_a_guest_does_not_use_is_a_fault_in_one_line_and_ends_with_the_next_agent() {
    let (host, ports) = Host::serving(&[("a", 3)], &trust());
    let control = ports[0].connected();
    let said = Enrolment {
        faults: vec!["card-damaged: a\nb\u{1b}[2J".into(); 100],
        ..Enrolment::default()
    };
    let vm = shown(&host, &control, &said);
    let fault = vm["fault"].as_str().unwrap();
    assert!(fault.starts_with("card-damaged: a"), "{fault}");
    assert!(
        fault.len() < 1000 && !fault.contains(|c: char| c.is_control()),
        "{fault}"
    );
    let metrics = host.api("GET", "/metrics", "").body;
    assert!(
        metrics.contains("adit_vm_fault{vm=\"a\",kind=\"card\"} 1"),
        "{metrics}"
    );
    let nobody = control.enrolled("", &Enrolment::default());
    let vm = host.get("/v1/vms/a");
    assert!(
        vm["fault"].as_str().unwrap().contains("adit card new a"),
        "{vm}"
    );
    assert!(vm["enrolled_as"].is_null());
    drop(nobody);
    let _before = control.enrolled("a", &good(3));
    assert_eq!(host.get("/v1/vms/a")["labels"]["env"], "prod");
    // One of the version before says nothing of cards.
    let mut agent = control.agent();
    agent.say(
        adit_tasks::wire::WireKind::Clock,
        1,
        &adit_tasks::wire::Clock { unix_ms: 0 },
    );
    agent.hear_kind(adit_tasks::wire::WireKind::HostClock);
    let vm = host.get("/v1/vms/a");
    assert!(
        vm["card"].is_null() && vm["labels"].is_null() && vm["fault"].is_null(),
        "{vm}"
    );
}

/// Everybody may reach what has the label that only a card can bring.
fn by_label() -> String {
    trust() + "\n" + &grant("\"anyone\"", "\"label:env=prod\"", "\"reach\"")
}

/// Answers what aditd asks of tunnels: there is one, number 7. Returns the next of its other messages.
fn with_a_tunnel(control: &Control) -> Message {
    let target = Target::Service(ServiceName::tcp(80));
    let tag = Tag::of(&Caller::anonymous("x"), Verb::Reach(&target)).unwrap();
    loop {
        match control.hear().unwrap().0 {
            Message::ListTunnels(ask) => {
                let tunnels = vec![(7, tag.clone())];
                let page = Tunnels {
                    after: ask.after,
                    tunnels: tunnels
                        .into_iter()
                        .filter(|(n, _)| *n > ask.after)
                        .collect(),
                    last: true,
                };
                control.say(&Message::Tunnels(page), None);
            }
            other => return other,
        }
    }
}

fn ends(control: &Control) {
    match with_a_tunnel(control) {
        Message::EndTunnels(end) => assert_eq!(end.numbers, [7]),
        other => panic!("{other:?}"),
    }
}

/// Whether anybody may reach the VM now.
fn may_reach(host: &Host) -> bool {
    let decided = host.get("/v1/access?as=anyone&verb=reach&vm=a&target=tcp:80");
    decided["allowed"].as_bool().unwrap()
}

#[test]
fn r125_a_card_that_is_believed_no_more_gives_no_grant_and_its_tunnels_end() {
    let (host, ports) = Host::serving(&[("a", 3)], &by_label());
    let control = ports[0].connected_and_lists();
    let two = |text: String| {
        let line = |seed| PublicKey::of(&key(seed), "fleet").to_string();
        let one = format!("[\"roles=card {}\"]", line(7));
        let two = format!("[\"roles=card {}\", \"roles=card {}\"]", line(7), line(9));
        match text.contains(&two) {
            true => text.replace(&two, &one),
            false => text.replace(&one, &two),
        }
    };
    let reload = |change: &dyn Fn(String) -> String| {
        let path = host.config_file();
        let text = std::fs::read_to_string(&path).unwrap();
        let changed = change(text.clone());
        assert_ne!(text, changed);
        std::fs::write(&path, changed).unwrap();
        let answer = host.api("POST", "/v1/reload", "null");
        let status: Value = serde_json::from_str(&answer.body).unwrap();
        assert!(status["error"].is_null(), "{status}");
        assert_eq!(status["restart"], json!([]), "{status}");
    };
    let mut generation = 10;
    let mut believed = |control: &Control| {
        generation += 2;
        let agent = control.enrolled("a", &good(generation));
        assert!(may_reach(&host));
        (agent, generation)
    };
    let says = |control: &Control, said: &Enrolment| drop(control.enrolled("a", said));
    let soon = |left: Duration| {
        let at = jiff::Timestamp::now() + left;
        (Instant::now() + left, at.to_string())
    };
    let mut measured = Vec::new();
    let mut ended = |what: &'static str, since: Instant| {
        ends(&control);
        measured.push((what, since.elapsed()));
        assert!(!may_reach(&host), "{what}");
        let mut refused = host.proxy();
        refused
            .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
            .unwrap();
        let mut said = String::new();
        refused.read_to_string(&mut said).unwrap();
        assert!(said.starts_with("HTTP/1.1 404 "), "{what}: {said}");
    };
    // An older one.
    let (_agent, n) = believed(&control);
    let since = Instant::now();
    says(&control, &good(n - 1));
    ended("an older generation", since);
    // One by somebody else, one for another VM, none at all.
    for (what, said) in [
        ("by another key", card(8, "a", 1_000, LATER, json!({}))),
        ("for another VM", card(7, "b", 1_000, LATER, json!({}))),
        ("no card", Enrolment::default()),
    ] {
        let _agent = believed(&control);
        let since = Instant::now();
        says(&control, &said);
        ended(what, since);
    }
    // Its time is over while nothing else happens.
    let (at, until) = soon(Duration::from_millis(1500));
    let agent = control.enrolled("a", &card(7, "a", 50, &until, json!({})));
    assert!(may_reach(&host));
    ended("its time is over", at);
    drop(agent);
    // The key that signed it is taken away, of two and as the last one; and is there again.
    reload(&two);
    let agent = control.enrolled("a", &card(9, "a", 60, LATER, json!({})));
    assert!(may_reach(&host));
    let since = Instant::now();
    reload(&two);
    ended("one key of [trust] is gone", since);
    let why = host.get("/v1/vms/a")["card"]["unproved"].to_string();
    assert!(why.contains("not trusted"), "{why}");
    reload(&two);
    assert!(may_reach(&host), "it is believed again");
    let since = Instant::now();
    reload(&|text| text.replace("[trust]\ncard = [", "[trust]\ncard = [] # ["));
    ended("[trust] is empty", since);
    drop(agent);
    // Said, and not asserted closely: other tests run beside this one.
    println!("from the cause to the end of the tunnel: {measured:?}");
    assert!(
        measured.iter().all(|(_, after)| after.as_secs() < 10),
        "{measured:?}"
    );
}

#[test]
fn a_tunnel_by_a_label_waits_for_the_agent_to_come_back_to_the_next_aditd_and_not_for_ever() {
    let (mut host, ports) = Host::serving(&[("a", 3)], &by_label());
    let control = ports[0].connected_and_lists();
    let agent = control.enrolled("a", &good(3));
    assert!(may_reach(&host));
    host.kill();
    drop((agent, control));
    host.start();
    let control = ports[0].connected_and_lists();
    // It is asked for its tunnels, and for them again after the agent has said who it is.
    let listed = || match control.hear().unwrap().0 {
        Message::ListTunnels(ask) => {
            let target = Target::Service(ServiceName::tcp(80));
            let tag = Tag::of(&Caller::anonymous("x"), Verb::Reach(&target)).unwrap();
            let page = Tunnels {
                after: ask.after,
                tunnels: vec![(7, tag)],
                last: true,
            };
            control.say(&Message::Tunnels(page), None);
        }
        other => panic!("{other:?}"),
    };
    listed();
    assert!(!may_reach(&host), "nothing new before that");
    let agent = control.enrolled("a", &good(3));
    listed();
    assert!(may_reach(&host));
    host.kill();
    drop((agent, control));
    host.start();
    let control = ports[0].connected_and_lists();
    let begin = Instant::now();
    ends(&control);
    let waited = begin.elapsed();
    println!("without an agent it ended after {waited:?}");
    assert!(waited >= Duration::from_secs(5), "{waited:?}");
}
