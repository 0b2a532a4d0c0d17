//! What an agent takes in while it runs: trust anchors at each task, its configuration at SIGHUP.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};

use adit_channel::hello::Hello;
use adit_channel::refusal::Code;
use adit_tasks::PublicKey;
use adit_tasks::wire::{Outcome, Task};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::host::*;
use crate::own::{dial, until};

fn counted(host: &Host, key_seq: u64) -> Task {
    let step = counting(&host.path("count"), "");
    task(host.goal(key_seq, json!([step])), "count", 1)
}

#[test]
fn an_anchor_counts_from_the_next_task_on_and_once_it_is_gone_no_longer() {
    let mut host = Host::without_anchor();
    host.start(None);
    let (mut session, _) = host.accept();
    refused(&session.run(&counted(&host, 1)), "no-trust-anchor");
    let file = host.path("trust/new.pub");
    fs::write(&file, PublicKey::of(&host.key, "new").to_string()).unwrap();
    assert_eq!(session.run(&counted(&host, 1)).outcome, Outcome::Done);
    // Owner and mode are looked at as at the start: of the file, of the directory, of the configuration.
    for path in [&file, &host.path("trust"), &host.path("adit-guest.toml")] {
        let before = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        let report = session.run(&counted(&host, 2));
        refused(&report, "no-trust-anchor");
        assert!(
            report.reason.contains(path.to_str().unwrap()),
            "{}",
            report.reason
        );
        fs::set_permissions(path, before).unwrap();
    }
    if nix::unistd::geteuid().is_root() {
        chown(&file, Some(65534), None).unwrap();
        refused(&session.run(&counted(&host, 2)), "no-trust-anchor");
        chown(&file, Some(0), None).unwrap();
    }
    assert_eq!(session.run(&counted(&host, 2)).outcome, Outcome::Done);
    fs::remove_file(&file).unwrap();
    refused(&session.run(&counted(&host, 3)), "no-trust-anchor");
    assert_eq!(lines(&host.path("count")), 2);
}

fn hup(host: &Host) {
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
}

#[test]
fn sighup_reloads_what_it_can_says_what_needs_a_restart_and_ends_nothing() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let service = format!("tcp:{port}");
    let mut host = Host::new();
    host.start(None);
    let (mut session, _) = host.accept();
    let (refuse, _) = dial(host.dir.path(), &service);
    assert!(matches!(refuse, Hello::Refuse(r) if r.refusal.code() == Code::Denied));
    let path = host.path("adit-guest.toml");
    let before = fs::read_to_string(&path).unwrap();
    let state = host.path("state").display().to_string();
    let after = before.replace(&state, &format!("{state}-elsewhere"));
    let after = format!("allow_ports = [{port}]\n{after}[script]\nenabled = false\n");
    fs::write(&path, after).unwrap();
    hup(&host);
    until("the agent reloads", || {
        host.log()
            .contains("adit-guest: restart-needed keys=state_dir\n")
    });
    let (accept, tunnel) = dial(host.dir.path(), &service);
    assert!(matches!(accept, Hello::Accept(_)), "{}", host.log());
    refused(&session.run(&counted(&host, 1)), "policy");
    // A file that cannot be used changes nothing.
    fs::write(&path, "vm_id = 5\n").unwrap();
    hup(&host);
    until("the agent refuses to reload", || {
        host.log().contains("adit-guest: reload-failed ")
    });
    refused(&session.run(&counted(&host, 2)), "policy");
    // A port that is taken away ends no stream.
    fs::write(&path, before).unwrap();
    hup(&host);
    let denied = || matches!(dial(host.dir.path(), &service).0, Hello::Refuse(_));
    until("the port is closed", denied);
    assert_eq!(session.run(&counted(&host, 3)).outcome, Outcome::Done);
    tunnel.set_nonblocking(true).unwrap();
    let waits = (&tunnel).read(&mut [0]).unwrap_err();
    assert_eq!(waits.kind(), ErrorKind::WouldBlock);
    assert!(!host.path("state-elsewhere").exists());
}
