//! The guest owner's policy in an agent that runs: what it refuses, what the host is told of it, and what a reload does.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Output;

use adit_channel::hello::Hello;
use adit_channel::refusal::Code;
use adit_tasks::wire::{Outcome, Report, Task};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::commands::agent;
use crate::host::*;
use crate::own::{dial, until};

const DENY: &str = "default = \"deny\"\n";

/// A host whose guest has this policy.
pub fn host(rules: &str) -> Host {
    let host = Host::new();
    let file = host.path("policy.toml");
    let path = host.path("adit-guest.toml");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("policy = \"{}\"\n{config}", file.display())).unwrap();
    put(&host, &format!("{DENY}{rules}"));
    host
}

pub fn put(host: &Host, text: &str) {
    let file = host.path("policy.toml");
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
}

pub fn hup(host: &Host) {
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
}

/// A task of one step.
fn step(host: &Host, seq: u64, step: Value) -> Task {
    let mut step = step;
    step["id"] = json!("it");
    task(host.goal(seq, json!([step])), "it", 1)
}

fn script(host: &Host, seq: u64, user: &str) -> Task {
    let script = json!({"interpreter": "/bin/sh", "script": "echo ran", "run_as": user});
    step(host, seq, json!({"script": script}))
}

fn file(host: &Host, seq: u64, path: &str) -> Task {
    step(
        host,
        seq,
        json!({"file": {"path": host.path(path), "content": "x"}}),
    )
}

/// Refused by this line, and never begun.
fn by_line(host: &Host, report: &Report, line: usize) {
    refused(report, "policy");
    let place = format!("{}:{line}: ", host.path("policy.toml").display());
    assert!(report.reason.contains(&place), "{}", report.reason);
    assert!(report.stdout.head.is_empty() && report.exit.is_none());
}

const SCRIPTS_OF_NOBODY: &str = "[[step]]\nkinds = [\"script\"]\nusers = [\"nobody\"]\n";

#[test]
fn a_task_that_no_rule_allows_ends_with_the_line_and_is_never_begun() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root runs scripts of other users");
    }
    let mut host = host(SCRIPTS_OF_NOBODY);
    host.start(None);
    let (mut session, _) = host.accept();
    by_line(&host, &session.run(&script(&host, 1, "root")), 4);
    let allowed = session.run(&script(&host, 2, "nobody"));
    assert_eq!(allowed.outcome, Outcome::Done, "{}", allowed.reason);
    by_line(&host, &session.run(&file(&host, 3, "root/f")), 1);
    assert!(!host.path("root/f").exists());
    assert_eq!(
        host.log().matches("adit-guest: started ").count(),
        1,
        "{}",
        host.log()
    );
    // It is an end like any other: known after a restart, and not decided anew.
    host.kill();
    put(
        &host,
        &format!("{DENY}[[step]]\nkinds = [\"script\"]\nusers = \"any\"\n"),
    );
    host.start(None);
    let (mut session, _) = host.accept();
    let known = session.run(&script(&host, 1, "root"));
    assert_eq!(known.outcome, Outcome::Refused, "{}", known.reason);
}

#[test]
fn a_refused_step_lets_the_goal_go_on_where_it_says_so() {
    let mut host = host("[[step]]\nkinds = [\"script\"]\nusers = [0]\n");
    let motd = host.path("root/motd");
    let first =
        json!({"id": "motd", "continue_on_error": true, "file": {"path": motd, "content": "x"}});
    let envelope = host.goal(1, json!([first, counting(&host.path("count"), "")]));
    host.start(None);
    let (mut session, _) = host.accept();
    by_line(&host, &session.run(&task(envelope.clone(), "motd", 1)), 1);
    let after = session.run(&task(envelope, "count", 1));
    assert_eq!(after.outcome, Outcome::Done, "{}", after.reason);
    assert!(!motd.exists());
}

/// A link below a root of the policy leads out of it, though not out of the configuration's root; the agent of another project
/// compared the path's text only, and its host planted the link itself.
#[test]
fn no_link_below_a_root_of_the_policy_is_followed() {
    let mut host = host("");
    let root = host.dir.path().to_owned();
    let at = |below: &str| root.join(below).display().to_string();
    for dir in ["root/www", "root/etc", "aside"] {
        fs::create_dir(host.path(dir)).unwrap();
    }
    symlink("../etc", host.path("root/www/up")).unwrap();
    symlink(host.path("aside"), host.path("root/www/out")).unwrap();
    symlink("www", host.path("root/alias")).unwrap();
    let rule = |root: &str| {
        format!("{DENY}[[step]]\nkinds = [\"file\"]\nusers = \"any\"\nroots = [\"{root}\"]\n")
    };
    put(&host, &rule(&at("root/www")));
    host.start(None);
    let (mut session, _) = host.accept();
    let mut seq = 0;
    let mut write = |session: &mut Session, path: &str| {
        seq += 1;
        session.run(&file(&host, seq, path))
    };
    assert_eq!(write(&mut session, "root/www/f").outcome, Outcome::Done);
    for (path, code) in [
        ("root/www/up/f", "path-denied"),
        ("root/www/out/f", "path-denied"),
        ("root/alias/f", "policy"),
        ("root/www2/f", "policy"),
        ("root/f", "policy"),
        ("root/www", "policy"),
        ("policy.toml", "policy"),
    ] {
        refused(&write(&mut session, path), code);
    }
    assert_eq!(fs::read_dir(host.path("root/etc")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.path("aside")).unwrap().count(), 0);
    // A link below the configuration's root is none that a policy can have followed.
    put(&host, &rule(&at("root/www/out")));
    hup(&host);
    let reloads = |host: &Host, n| host.log().matches("adit-guest: reloaded ").count() == n;
    until("it reloads", || reloads(&host, 1));
    refused(&write(&mut session, "root/www/out/f"), "path-denied");
    assert_eq!(fs::read_dir(host.path("aside")).unwrap().count(), 0);
    put(&host, &rule(&at("root/www")));
    // The configuration's root is a link that leads out of the policy's.
    let config = fs::read_to_string(host.path("adit-guest.toml")).unwrap();
    let narrow = config.replace(
        &format!("roots = [\"{}\"]", at("root")),
        &format!("roots = [\"{}\"]", at("root/www/out")),
    );
    fs::write(host.path("adit-guest.toml"), narrow).unwrap();
    hup(&host);
    until("it reloads", || {
        host.log().contains("adit-guest: reloaded ")
    });
    refused(&write(&mut session, "root/www/out/f"), "path-denied");
    assert_eq!(fs::read_dir(host.path("aside")).unwrap().count(), 0);
    // Both roots are the link: whoever wrote them means what it leads to.
    put(&host, &rule(&at("root/www/out")));
    hup(&host);
    until("it reloads", || reloads(&host, 3));
    assert_eq!(write(&mut session, "root/www/out/f").outcome, Outcome::Done);
    assert!(host.path("aside/f").exists());
}

#[test]
fn the_policy_itself_is_written_by_no_file_step() {
    let mut host = host("[[step]]\nkinds = [\"file\"]\nusers = \"any\"\nroots = [\"/\"]\n");
    let config = fs::read_to_string(host.path("adit-guest.toml")).unwrap();
    let roots = format!("roots = [\"{}\"]", host.path("root").display());
    let wide = config.replace(
        &roots,
        &format!("roots = [\"{}\"]", host.dir.path().display()),
    );
    fs::write(host.path("adit-guest.toml"), wide).unwrap();
    host.start(None);
    let (mut session, _) = host.accept();
    refused(&session.run(&file(&host, 1, "policy.toml")), "path-denied");
    assert_eq!(
        session.run(&file(&host, 2, "root/f")).outcome,
        Outcome::Done
    );
}

#[test]
fn the_host_dials_what_both_allow_and_is_told_the_line() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut host = host(&format!(
        "[[service]]\nnames = [\"tcp:{port}\", \"tcp:1\"]\n"
    ));
    let path = host.path("adit-guest.toml");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("allow_ports = [{port}, 2]\n{config}")).unwrap();
    host.start(None);
    host.accept();
    let refusal = |service: &str| match dial(host.dir.path(), service).0 {
        Hello::Refuse(r) => (r.refusal.code(), r.refusal.text().to_owned()),
        other => panic!("{service}: {other:?}"),
    };
    let (accept, _tunnel) = dial(host.dir.path(), &format!("tcp:{port}"));
    assert!(matches!(accept, Hello::Accept(_)), "{}", host.log());
    let place = format!("{}:1: ", host.path("policy.toml").display());
    // Files and orders for the agent too: the guest's owner allows them, or does not.
    for service in ["tcp:2", "ping", "blob", "agent"] {
        let (code, text) = refusal(service);
        assert!(code == Code::Denied && text.contains(&place), "{text}");
    }
    let (code, text) = refusal("tcp:1");
    assert!(
        code == Code::Denied && text.contains("allow_ports"),
        "{text}"
    );
    // What this agent does not have is said before.
    assert_eq!(refusal("nobody").0, Code::UnknownService);
}

#[test]
fn a_reload_keeps_the_policy_before_and_says_so_to_the_host_too() {
    let mut host =
        host("[[service]]\nnames = [\"ping\"]\n[[step]]\nkinds = [\"script\"]\nusers = \"any\"\n");
    host.start(None);
    let (mut session, _) = host.accept();
    assert!(session.enrolment.faults.is_empty());
    let is_dialled = |host: &Host| matches!(dial(host.dir.path(), "ping").0, Hello::Accept(_));
    assert!(is_dialled(&host));
    for (n, text) in [Some("default = \"deny\"\n[[service\n"), None]
        .into_iter()
        .enumerate()
    {
        match text {
            Some(text) => put(&host, text),
            None => fs::remove_file(host.path("policy.toml")).unwrap(),
        }
        hup(&host);
        let code = ["policy-bad", "policy-missing"][n];
        until("it says so", || {
            host.log().contains(&format!("adit-guest: {code} "))
        });
        until("it has reloaded", || {
            host.log().matches("adit-guest: reloaded ").count() == n + 1
        });
        assert!(is_dialled(&host), "{}", host.log());
        // Before it pulls again, it says what is wrong.
        for seq in [2 * n as u64 + 1, 2 * n as u64 + 2] {
            let report = session.run(&script(&host, seq, "root"));
            assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
        }
        let said = session.told.take().unwrap().faults;
        assert!(said.len() == 1 && said[0].starts_with(code), "{said:?}");
    }
    put(&host, DENY);
    hup(&host);
    until("the new one is in force", || !is_dialled(&host));
    for seq in [5, 6] {
        refused(&session.run(&script(&host, seq, "root")), "policy");
    }
    assert!(session.told.take().unwrap().faults.is_empty());
}

#[test]
fn an_agent_that_starts_with_a_policy_that_cannot_be_used_runs_and_allows_nothing() {
    let mut host =
        host("[[service]]\nnames = [\"ping\"]\n[[step]]\nkinds = [\"script\"]\nusers = \"any\"\n");
    let file = host.path("policy.toml");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o660)).unwrap();
    host.start(None);
    let (mut session, _) = host.accept();
    let said = session.enrolment.faults.join("\n");
    assert!(said.starts_with("policy-writable: "), "{said}");
    let report = session.run(&script(&host, 1, "root"));
    refused(&report, "policy");
    assert!(
        report.reason.contains("policy-writable"),
        "{}",
        report.reason
    );
    assert!(
        matches!(dial(host.dir.path(), "ping").0, Hello::Refuse(r) if r.refusal.code() == Code::Denied)
    );
    // Mended, it needs no restart.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    hup(&host);
    until("it is in force", || {
        matches!(dial(host.dir.path(), "ping").0, Hello::Accept(_))
    });
    assert_eq!(
        session.run(&script(&host, 2, "root")).outcome,
        Outcome::Done
    );
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn the_commands_name_the_policy_and_explain_with_the_exit_status() {
    let host = host("[[step]]\nkinds = [\"script\"]\nusers = [\"nobody\"]\n");
    let config = host.path("adit-guest.toml").display().to_string();
    let file = host.path("policy.toml").display().to_string();
    let run = |args: &[&str]| agent(args).args(["--config", &config]).output().unwrap();
    let status = text(&run(&["status"]));
    let line = status.lines().find(|l| l.starts_with("policy ")).unwrap();
    assert!(line.ends_with(&format!("{file}: 1 rules")), "{line}");
    assert!(text(&run(&["self-test"])).contains(&format!("ok     the policy {file} has 1 rules")));
    let explained = |user: &str| run(&["policy", "explain", "script", "--user", user]);
    assert_eq!(
        explained("nobody").status.code(),
        Some(0),
        "{}",
        text(&explained("nobody"))
    );
    let denied = explained("root");
    assert_eq!(denied.status.code(), Some(1));
    assert!(
        text(&denied).contains(&format!("{file}:4: ")),
        "{}",
        text(&denied)
    );
    assert_eq!(run(&["policy", "check"]).status.code(), Some(0));
    put(&host, "default = 1\n");
    assert_eq!(run(&["policy", "check"]).status.code(), Some(1));
    assert!(text(&run(&["self-test"])).contains("FAILS  policy-bad: "));
    let status = text(&run(&["status"]));
    assert!(
        status.contains("policy          not used: policy-bad: "),
        "{status}"
    );
    fs::remove_file(host.path("policy.toml")).unwrap();
    for args in [
        &["policy", "check"][..],
        &["policy", "explain", "file"],
        &["policy", "explain"],
    ] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}
