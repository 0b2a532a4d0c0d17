//! What aditd keeps and shows of a port process that its guest may control.

use std::fs::{File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use adit_port::control::{HANDOVER_FDS_MAX, Handover, Held, Status, Stuck};
use adit_port::control_io::{ControlError, Message, send_all};

use crate::host::{Control, Host, Port};

fn try_hand_over(control: &Control, seq: u64, fds: usize) -> Result<(), ControlError> {
    let null = File::open("/dev/null").unwrap();
    let record = vec![7; 4096];
    let message = Message::Handover(Handover {
        seq,
        record,
        ring: 0,
    });
    send_all(&control.0, &message, &vec![null.as_fd(); fds])
}

fn hand_over(control: &Control, seq: u64, fds: usize) {
    try_hand_over(control, seq, fds).unwrap();
}

/// Waits until aditd confirms that it keeps the state with this number.
fn kept(control: &Control, seq: u64) {
    loop {
        if let Message::Kept(kept) = control.hear().unwrap().0 {
            assert!(kept.seq <= seq);
            if kept.seq == seq {
                return;
            }
        }
    }
}

fn descriptors(host: &Host) -> usize {
    let path = format!("/proc/{}/fd", host.worker());
    std::fs::read_dir(path).unwrap().count()
}

#[test]
fn a_handover_replaces_the_one_before_with_all_its_descriptors() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    hand_over(&control, 1, HANDOVER_FDS_MAX);
    kept(&control, 1);
    let before = descriptors(&host);
    for seq in 2..=1000 {
        hand_over(&control, seq, HANDOVER_FDS_MAX);
        kept(&control, seq);
    }
    host.until("what was replaced is closed", |host| {
        (descriptors(host) <= before + 2).then_some(())
    });
    // The last handover counts, whatever its number is. It has fewer descriptors, so fewer are kept.
    hand_over(&control, 1, 1);
    kept(&control, 1);
    host.until("and all but one", |host| {
        (descriptors(host) + HANDOVER_FDS_MAX <= before + 2).then_some(())
    });
}

#[test]
fn a_handover_of_another_vms_process_is_not_kept() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected_as(99);
    // aditd may have closed the connection already.
    let _ = try_hand_over(&control, 1, HANDOVER_FDS_MAX);
    // aditd closes it without an answer. (ECONNRESET: it did not read everything.)
    assert!(!matches!(
        adit_port::control_io::receive(&control.0),
        Ok(Some(_))
    ));
    host.until("the descriptors are gone", |h| {
        (descriptors(h) < HANDOVER_FDS_MAX).then_some(())
    });
}

#[test]
fn a_vm_that_needs_a_power_cycle_is_named_until_it_has_its_session() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let state = |host: &Host| {
        let vm = host.get("/v1/vms/a");
        let fault = vm["fault"].as_str().unwrap_or_default().to_owned();
        (vm["state"].as_str().unwrap_or_default().to_owned(), fault)
    };
    host.until("it is up", |h| (state(h).0 == "up").then_some(()));
    // Nothing was handed over, so a reload could not take over the running VM.
    let refused = host.api("POST", "/v1/vms/a/reload", "null");
    assert_eq!(refused.status, 409, "{}", refused.body);
    assert!(refused.body.contains("not-kept"), "{}", refused.body);

    let reason = "because\u{1b}[31m".to_owned() + &"x".repeat(60_000);
    control.say(&Message::Stuck(Stuck { reason }), None);
    host.until("it is named", |h| {
        let (state, fault) = state(h);
        (state == "power-cycle").then(|| {
            assert!(fault.starts_with("because") && fault.len() < 1000);
            assert!(!fault.contains('\u{1b}'));
        })
    });
    let status = Status {
        vm: "a".parse().unwrap(),
        cid: 3,
        pid: std::process::id(),
        session: true,
        epoch: 2,
        streams: 0,
        bytes: (0, 0),
        faults: 0,
        last_fault: String::new(),
    };
    control.say(&Message::Status(status), None);
    host.until("it is up again", |h| (state(h).0 == "up").then_some(()));
    assert_eq!(state(&host).1, "");
}

#[test]
fn only_its_vmm_can_remove_a_held_vm() {
    let (mut host, _) = Host::serving(&[], "");
    let (port, other) = (host.port("b", 4), host.port("c", 5));
    for vm in [r#"{"name":"b","cid":4}"#, r#"{"name":"c","cid":5}"#] {
        let added = host.api("POST", "/v1/vms", vm);
        assert_eq!(added.status, 200, "{}", added.body);
    }
    let [held, free] = [&port, &other].map(Port::connected);
    held.say(&Message::Held(Held {}), None);
    let pid = std::process::id();
    host.until("it is held", |h| {
        (h.get("/v1/vms/b")["held_by"] == pid).then_some(())
    });
    host.until("the other is up", |h| {
        (h.get("/v1/vms/c")["state"] == "up").then_some(())
    });
    assert!(host.get("/v1/vms/c")["held_by"].is_null());
    for (method, path) in [("DELETE", "/v1/vms/b"), ("POST", "/v1/vms/b/reload")] {
        let refused = host.api(method, path, "null");
        assert_eq!(refused.status, 409, "{}", refused.body);
        let says = |what: &str| refused.body.contains(what);
        assert!(
            says("\"held\"") && says(&pid.to_string()),
            "{}",
            refused.body
        );
    }
    // Both aditd and all port processes end; the VM's entry must stay.
    std::thread::scope(|s| {
        let host = &host;
        let ended = s.spawn(|| host.api("POST", "/v1/shutdown?ports=true", "").status);
        assert!(matches!(free.hear(), Some((Message::Quit(_), _))));
        drop((free, other));
        assert!(held.hear().is_none());
        assert_eq!(ended.join().unwrap(), 202);
    });
    assert!(host.ended());
    // The next aditd knows it as held too, and removes it only with `force`.
    host.start();
    let held = port.connected();
    held.say(&Message::Held(Held {}), None);
    host.until("it is held again", |h| {
        (h.get("/v1/vms/b")["held_by"] == pid).then_some(())
    });
    std::thread::scope(|s| {
        let removed = s.spawn(|| host.api("DELETE", "/v1/vms/b?force=true", "").status);
        assert!(matches!(held.hear(), Some((Message::Quit(_), _))));
        drop((held, port));
        assert_eq!(removed.join().unwrap(), 204);
    });
    assert_eq!(host.api("GET", "/v1/vms/b", "").status, 404);
}

fn fault(host: &Host, vm: &str) -> String {
    let vm = host.get(&format!("/v1/vms/{vm}"));
    vm["fault"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn the_reason_why_a_port_process_ends_at_its_start_is_shown_with_its_vm() {
    let bin = tempfile::tempdir().unwrap();
    let failing = bin.path().join("failing");
    let more = "[[vm]]\nname = \"b\"\ncid = 4\n";
    let (mut host, ports) = Host::new(&[("a", 3)], more);
    let script = "#!/bin/sh\necho 'adit-port: no sandbox: the kernel says no' >&2\nexit 3\n";
    std::fs::write(&failing, script).unwrap();
    std::fs::set_permissions(&failing, Permissions::from_mode(0o755)).unwrap();
    host.port_bin = failing.clone();
    host.start();
    host.until("what it said itself", |host| {
        let fault = fault(host, "b");
        (fault.contains("no sandbox") && fault.contains("exit status: 3")).then_some(())
    });
    // A process that prints nothing, and one that cannot be started.
    std::fs::write(&failing, "#!/bin/sh\nkill -9 $$\n").unwrap();
    host.until("its end", |host| {
        fault(host, "b").contains("SIGKILL").then_some(())
    });
    std::fs::remove_file(&failing).unwrap();
    host.until("that it is not there", |host| {
        fault(host, "b").contains("cannot start").then_some(())
    });
    // A process that runs, but ends before it sends a status.
    ports[0].hang_up();
    host.until("that it says nothing", |host| {
        fault(host, "a").contains("without a word").then_some(())
    });
    let _control = ports[0].connected();
    host.until("that it serves", |host| {
        fault(host, "a").is_empty().then_some(())
    });
}
