//! The ids that guests are given, and what is said of one that comes with another's.

use std::fs;

use adit_tasks::wire::{self, HostGiven, Identified, Identity, WireKind};

use crate::host::{Agent, Control, Host};

/// An agent says which id its guest has, and who it is in this boot. Returns what it has from now on.
fn says(control: &Control, vm: &str, id: Option<HostGiven>, boot: u8) -> (Agent, Identified) {
    let mut agent = control.silent_agent(wire::IDENTITY);
    agent.say(WireKind::Identity, 5, &Identity { id });
    let (header, body) = agent.hear_kind(WireKind::Identified);
    assert_eq!(header.id, 5);
    agent.facts(vm, boot);
    agent.heard();
    (agent, header.decode(&body).unwrap())
}

fn fault(host: &Host, vm: &str) -> Option<String> {
    let shown = host.get(&format!("/v1/vms/{vm}"));
    shown["fault"].as_str().map(str::to_owned)
}

#[test]
fn r133_a_guest_with_the_id_of_another_vm_is_a_clone_and_the_original_is_not() {
    let (mut host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let (agent, first) = says(&a, "a", None, 1);
    assert_eq!((first.copy_of.as_str(), fault(&host, "a")), ("", None));
    drop(agent);
    // The same guest after a reboot, and after aditd's.
    let (agent, again) = says(&a, "a", Some(first.id), 2);
    assert_eq!(again, first);
    drop(agent);

    let (agent, clone) = says(&b, "b", Some(first.id), 3);
    assert_eq!(clone.copy_of, "VM `a`");
    assert_eq!(clone.id.host, first.id.host);
    assert_ne!(clone.id.guest, first.id.guest);
    let said = fault(&host, "b").unwrap();
    assert!(said.contains("a copy of that of VM `a`"), "{said}");
    let metrics = host.api("GET", "/metrics", "").body;
    assert!(
        metrics.contains("adit_vm_fault{vm=\"b\",kind=\"clone\"} 1"),
        "{metrics}"
    );
    assert!(host.log().contains("kind=\"clone\""), "{}", host.log());
    assert_eq!(fault(&host, "a"), None);
    let shown = host.get("/v1/vms/b")["guest_id"].clone();
    assert_eq!(shown, adit_tasks::hex(&clone.id.guest));
    drop(agent);
    // It stays a fault until the guest boots again.
    let (agent, same) = says(&b, "b", Some(clone.id), 3);
    assert_eq!((same.id, same.copy_of.as_str()), (clone.id, ""));
    assert!(fault(&host, "b").is_some());
    drop(agent);
    let (agent, _) = says(&b, "b", Some(clone.id), 4);
    assert_eq!(fault(&host, "b"), None);
    drop(agent);

    host.kill();
    host.start();
    let (a, b) = (ports[0].connected(), ports[1].connected());
    assert_eq!(says(&a, "a", Some(first.id), 5).1, first);
    assert_eq!(says(&b, "b", Some(clone.id), 5).1.copy_of, "");
    // One that comes back from a backup is still known.
    let (_, new) = says(&a, "a", None, 6);
    assert_ne!(new.id, first.id);
    assert_eq!(says(&a, "a", Some(first.id), 7).1, first);
}

#[test]
fn a_host_that_has_lost_its_database_knows_its_guests_again() {
    let (mut host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let (_, first) = says(&control, "a", None, 1);
    host.kill();
    for file in fs::read_dir(host.state_dir()).unwrap().map(Result::unwrap) {
        if file.file_name() != "aditd.id" {
            fs::remove_file(file.path()).unwrap();
        }
    }
    host.start();
    let control = ports[0].connected();
    assert_eq!(says(&control, "a", Some(first.id), 2).1, first);
    assert_eq!(fault(&host, "a"), None);
    assert_eq!(says(&control, "a", Some(first.id), 3).1, first);

    // With its own id gone too, it is another host.
    host.kill();
    fs::remove_dir_all(host.state_dir()).unwrap();
    host.start();
    let control = ports[0].connected();
    let (_agent, anew) = says(&control, "a", Some(first.id), 4);
    assert_eq!(anew.copy_of, "a guest of another host");
    assert!(
        fault(&host, "a")
            .unwrap()
            .contains("a guest of another host")
    );
    // A damaged one is drawn again, and the database still knows the guest.
    host.kill();
    fs::write(host.state_dir().join("aditd.id"), "x").unwrap();
    host.start();
    let control = ports[0].connected();
    let (_agent, again) = says(&control, "a", Some(anew.id), 5);
    assert_ne!(again.id, anew.id);
    assert!(host.log().contains("damaged"));
}

#[test]
fn ids_are_kept_so_many_of_a_vm_and_an_agent_of_before_gets_none() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let ids: Vec<_> = (0..10).map(|n| says(&control, "a", None, n).1.id).collect();
    // The oldest are forgotten, which is as if the database were lost.
    assert_eq!(says(&control, "a", Some(ids[0]), 20).1.id, ids[0]);
    let mut agent = control.enrolled("a", &wire::Enrolment::default());
    assert!(host.get("/v1/vms/a")["guest_id"].is_null());
    // It does not know the message: who sends it all the same has broken the protocol.
    agent.say(WireKind::Identity, 1, &Identity { id: None });
    assert!(
        adit_channel::frame::read(&mut agent.stream, 1000)
            .unwrap()
            .is_none()
    );
}
