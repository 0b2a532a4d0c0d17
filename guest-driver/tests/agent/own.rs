//! What is the agent's own and no task's, and the other way round: descriptors, limits, protection, processes.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Common, Hello, Open};
use adit_channel::refusal::Code;
use adit_guest_driver::exec::{proc, tree};
use adit_tasks::hex;
use adit_tasks::wire::{Outcome, Report};
use serde_json::{Value, json};

use crate::delivery::{fifo, in_environment};
use crate::host::*;

/// Nothing that is waited for here takes this long.
const LIMIT: Duration = Duration::from_secs(30);

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn shell(text: &str, args: &[&PathBuf]) -> Value {
    json!({"id": "it", "script": {"interpreter": "/bin/sh", "script": text, "args": args}})
}

fn said(report: &Report) -> String {
    assert_eq!(report.outcome, Outcome::Done, "{}", report.reason);
    String::from_utf8_lossy(&report.stdout.head).into_owned()
}

/// The answer to a dial of a service, and the stream.
pub fn dial(dir: &Path, service: &str) -> (Hello, UnixStream) {
    let mut s = UnixStream::connect(dir.join("guest.sock")).unwrap();
    s.set_read_timeout(Some(LIMIT)).unwrap();
    let open = Open::new(service.parse().unwrap(), Common::default());
    // One that is refused unheard may be closed already; the answer is there all the same.
    let _ = s.write_all(&Hello::Open(open).encode());
    (hello::read(&mut s).expect("an answer"), s)
}

#[test]
fn tunnels_beyond_their_share_of_descriptors_are_refused_as_busy_and_tasks_run_on() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || server.incoming().map(Result::unwrap).collect::<Vec<_>>());
    let mut host = Host::new();
    // Fewer than the tunnels that are asked for need, and the agent raises the one to the other.
    host.prelude = "ulimit -Sn 100; ulimit -Hn 256";
    let config = fs::read_to_string(host.path("adit-guest.toml")).unwrap();
    let config = format!("allow_ports = [{port}]\n{config}");
    fs::write(host.path("adit-guest.toml"), config).unwrap();
    host.start(None);
    let (mut session, _) = host.accept();
    let mut held = Vec::new();
    for _ in 0..200 {
        match dial(host.dir.path(), &format!("tcp:{port}")) {
            // Also after one was refused: a descriptor that the agent had for a moment is a tunnel's then.
            (Hello::Accept(_), stream) => held.push(stream),
            (Hello::Refuse(r), _) => {
                assert_eq!(r.refusal.code(), Code::Busy, "{}", r.refusal);
            }
            other => panic!("{other:?}"),
        }
    }
    // 192 of 256 are for tunnels and what the agent itself had first, two each.
    assert!((80..=96).contains(&held.len()), "{} tunnels", held.len());
    let task = task(
        host.goal(1, json!([shell("ulimit -Sn; ulimit -Hn", &[])])),
        "it",
        1,
    );
    // A task starts, and has the limits from before the agent.
    assert_eq!(said(&session.run(&task)), "100\n256\n", "{}", host.log());
    drop(held);
    until("tunnels that ended make room", || {
        matches!(
            dial(host.dir.path(), &format!("tcp:{port}")).0,
            Hello::Accept(_)
        )
    });
}

#[test]
fn r114_a_task_has_nothing_of_what_the_agent_has_for_itself() {
    let status = "grep -E '^(SigBlk|Seccomp|CapBnd|NoNewPrivs):' /proc/self/status";
    let mut host = Host::new();
    // As a unit of before would have it, and a parent that ignores the ends of its children.
    host.prelude =
        "trap '' CHLD; echo -500 >/proc/self/oom_score_adj; ulimit -c unlimited; ulimit -Sn 100";
    host.start(None);
    let (mut session, _) = host.accept();
    let of_agent = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", host.pid())).unwrap();
    if of_agent("oom_score_adj").trim() != "-500" {
        eprintln!("not shown: no right to be spared when memory is short");
    }
    assert!(of_agent("limits").lines().any(|l| {
        l.starts_with("Max core file size") && l.split_whitespace().nth(4) == Some("0")
    }));
    let text = format!("cat /proc/self/oom_score_adj; ulimit -c; ulimit -Sn; {status}; exit 0");
    let task = task(host.goal(1, json!([shell(&text, &[])])), "it", 1);
    let got = said(&session.run(&task));
    let plain = std::process::Command::new("sh")
        .args(["-c", status])
        .output()
        .unwrap();
    let plain = String::from_utf8_lossy(&plain.stdout).into_owned();
    assert_eq!(got, format!("0\nunlimited\n100\n{plain}"));
    // Neither is it in the agent's cgroup, where there is a cgroup of its own to be had.
    let task = crate::host::task(
        host.goal(2, json!([shell("cat /proc/self/cgroup", &[])])),
        "it",
        1,
    );
    let cgroup = said(&session.run(&task));
    let unified = cgroup
        .lines()
        .find(|l| l.starts_with("0::"))
        .unwrap_or("0::/");
    match adit_guest_driver::exec::cgroup::base() {
        Some(base) if base.ends_with("adit-tasks") => {
            assert!(
                unified.ends_with(&format!("/adit-task-{}", hex(&task.task_id))),
                "{cgroup}"
            );
        }
        other => eprintln!("not shown: no cgroup of its own here ({other:?})"),
    }
}

/// A daemon, told to go on by one fifo, tells by the other that it did.
fn daemon(then: &str) -> String {
    format!(
        "setsid sh -c 'echo begun >\"$1\"; read go <\"$0\"; {then}; echo did >\"$1\"; exec sleep 1000' \"$1\" \"$2\" \
         >/dev/null 2>&1 & cat \"$2\""
    )
}

#[test]
fn r95_orphans_of_a_daemon_are_reaped_while_no_task_runs() {
    let mut host = Host::new();
    let [go, did] = ["go", "did"].map(|name| host.path(name));
    fifo(&go);
    fifo(&did);
    let text = daemon("i=0; while [ $i -lt 50 ]; do (true &); i=$((i+1)); done");
    let task = task(host.goal(1, json!([shell(&text, &[&go, &did])])), "it", 1);
    host.start(None);
    let (mut session, _) = host.accept();
    assert_eq!(said(&session.run(&task)), "begun\n");
    fs::write(&go, "go\n").unwrap();
    assert_eq!(fs::read_to_string(&did).unwrap(), "did\n");
    let agent = host.pid();
    let children = |zombie| {
        let of_agent = move |p: &&proc::Proc| p.parent == agent && p.zombie == zombie;
        proc::table().values().filter(of_agent).count()
    };
    until("more than the daemon stays", || {
        children(true) == 0 && children(false) == 1
    });
    assert!(tree::kill_orphans(&hex(&task.task_id), None));
    until("the daemon stays a zombie", || {
        children(true) + children(false) == 0
    });
}

#[test]
fn r114_a_daemon_of_a_finished_task_outlives_the_agent() {
    let mut host = Host::new();
    let [go, did] = ["go", "did"].map(|name| host.path(name));
    fifo(&go);
    fifo(&did);
    let task = task(
        host.goal(1, json!([shell(&daemon(":"), &[&go, &did])])),
        "it",
        1,
    );
    host.start(None);
    let (mut session, _) = host.accept();
    assert_eq!(said(&session.run(&task)), "begun\n");
    host.kill();
    host.start(None);
    let (mut session, _) = host.accept();
    // Also when the next agent has a task of its own to end.
    let next = json!([{"id": "it", "script": {"interpreter": "/bin/sh", "script": "sleep 1000", "timeout_s": 1}}]);
    let next = crate::host::task(host.goal(2, next), "it", 1);
    assert_eq!(session.run(&next).outcome, Outcome::TimedOut);
    fs::write(&go, "go\n").unwrap();
    assert_eq!(fs::read_to_string(&did).unwrap(), "did\n");
    assert!(tree::kill_orphans(&hex(&task.task_id), None));
}

#[test]
fn a_stopped_agent_ends_the_task_that_runs_and_the_next_reports_it_interrupted() {
    let mut host = Host::new();
    let [go, did] = ["go", "did"].map(|name| host.path(name));
    fifo(&go);
    fifo(&did);
    // Whatever it does against it.
    let text = "trap '' TERM; setsid sleep 1000 & echo up >\"$2\"; sleep 1000; sleep 1000";
    let task = task(host.goal(1, json!([shell(text, &[&go, &did])])), "it", 1);
    host.start(None);
    let (mut session, _) = host.accept();
    let Some(Said::Pull(id)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    session.task(id, &task);
    assert_eq!(fs::read_to_string(&did).unwrap(), "up\n");
    let name = hex(&task.task_id);
    assert!(in_environment(&name) >= 2);
    host.stop();
    assert_eq!(in_environment(&name), 0, "{}", host.log());
    host.start(None);
    let (mut session, _) = host.accept();
    let Some(Said::Report(id, report)) = session.next().unwrap() else {
        panic!("{}", host.log())
    };
    assert_eq!(report.outcome, Outcome::Interrupted, "{}", report.reason);
    session.ack(id, &report);
}
