//! `adit wait`: for the VM, and for aditd itself.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::fake::{Fake, Say, command, vm};
use crate::text;

#[test]
fn an_aditd_that_is_not_up_yet_is_waited_for() {
    let dir = Fake::absent();
    let mut command = command(dir.path(), &["wait", "web-1", "--timeout", "60s"]);
    let mut adit = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It says so when it has looked for aditd once.
    let mut said = String::new();
    let mut stderr = BufReader::new(adit.stderr.take().unwrap());
    stderr.read_line(&mut said).unwrap();
    assert!(said.contains("waiting for aditd"), "{said}");
    let mut requests = 0;
    let _fake = Fake::in_dir(dir, move |_| {
        requests += 1;
        match requests {
            1 => Say::HangUp,
            _ => Say::Json(vm("web-1")),
        }
    });
    let out = adit.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(0));
    assert!(text(&out.stdout).contains("web-1 is ready"));
}

#[test]
fn an_aditd_that_never_comes_is_unreachable_when_the_time_is_over() {
    let dir = Fake::absent();
    let mut command = command(dir.path(), &["wait", "web-1", "--timeout", "10ms"]);
    let out = command.output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
}

#[test]
fn a_vm_that_is_unknown_or_removed_ends_the_wait_at_once() {
    let fake = Fake::start(|_| Say::Error(404, "unknown-vm"));
    let out = fake.adit(&["wait", "web-1", "--timeout", "1h"]);
    assert_eq!(out.status.code(), Some(4), "{}", text(&out.stderr));
    assert_eq!(fake.asked().len(), 1);
}

#[test]
fn a_wait_that_aditd_ends_before_its_time_goes_on() {
    let mut requests = 0;
    let fake = Fake::start(move |_| {
        requests += 1;
        match requests {
            1 => Say::Error(408, "timeout"),
            2 => Say::Error(503, "busy"),
            _ => Say::Json(vm("web-1")),
        }
    });
    let out = fake.adit(&["wait", "web-1", "--timeout", "2h"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
}
