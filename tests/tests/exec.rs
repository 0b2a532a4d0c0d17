//! `adit exec` with a real aditd, a port process, and an agent on a ring: this program again, because an agent waits for every child of its
//! process.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use adit_tests::process::wait_for;
use adit_tests::running::{LIMIT, Setup};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

const ANY: &str =
    "default = \"deny\"\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n";

#[test]
fn an_agent() {
    adit_tests::running::an_agent();
}

fn setup(policy: &str, more: &str) -> Option<Setup> {
    setup_with(policy, "", more)
}

/// The same; `of_vm`: more keys of VM `a`, and `more` comes behind it.
fn setup_with(policy: &str, of_vm: &str, more: &str) -> Option<Setup> {
    Setup::start_with(policy, of_vm, more).unwrap()
}

/// Shorter words for what these tests do.
trait Runs {
    fn exec(&self, args: &[&str]) -> Output;
    fn sh(&self, script: &str) -> Output;
}

impl Runs for Setup {
    fn exec(&self, args: &[&str]) -> Output {
        self.adit(&[&["exec"], args].concat())
    }

    fn sh(&self, script: &str) -> Output {
        self.exec(&["a", "--", "sh", "-c", script])
    }
}

fn status(out: &Output) -> i32 {
    out.status.code().unwrap_or_else(|| panic!("{out:?}"))
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// kubernetes/kubernetes#26424: the status is the command's own.
#[test]
fn kubectl_26424_status_output_and_input_are_those_of_the_command() {
    let Some(setup) = setup(ANY, "") else { return };
    let out = setup.sh("echo out; echo err >&2; exit 42");
    assert_eq!(
        (status(&out), &out.stdout[..], &out.stderr[..]),
        (42, &b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(status(&setup.sh("kill -9 $$")), 128 + 9);
    assert_eq!(
        status(&setup.exec(&["a", "--timeout", "200ms", "--", "sleep", "1000"])),
        124
    );
    assert_eq!(status(&setup.exec(&["a", "--", "no-such-program"])), 127);
    assert_eq!(status(&setup.exec(&["a", "--", "/etc/passwd"])), 126);
    assert_eq!(status(&setup.exec(&["nobody", "--", "true"])), 125);
    assert_eq!(
        status(&setup.exec(&["a", "--user", "no-such-user", "--", "true"])),
        125
    );
    let out = setup.exec(&[
        "a",
        "--env",
        "A=b c",
        "--cwd",
        "/",
        "--",
        "sh",
        "-c",
        "echo $A; pwd",
    ]);
    assert_eq!(out.stdout, b"b c\n/\n");
    // 20 MB there and back, by checksum.
    let mut child = setup.spawn(&["exec", "-i", "a", "--", "cat"]);
    let sent: Vec<u8> = (0..20_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect();
    let (mut stdin, all) = (child.stdin.take().unwrap(), sent.clone());
    let writer = std::thread::spawn(move || stdin.write_all(&all));
    let out = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(status(&out), 0, "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(Sha256::digest(&out.stdout), Sha256::digest(&sent));
    // One who reads no more ends it.
    let mut child = setup.spawn(&["exec", "a", "--", "yes"]);
    let mut first = [0; 2];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(141));
    let line = setup.audit();
    assert!(
        line.contains("\"verb\":\"exec\"") && line.contains("root:sh"),
        "{line}"
    );
    wait_for("no session is left", LIMIT, || {
        let out = setup.adit(&["ps", "a", "-o", "json"]);
        Ok((out.stdout == b"[]\n").then_some(()))
    })
    .unwrap();
}

#[test]
fn a_command_outlives_a_killed_aditd_and_a_killed_port_process_is_no_success() {
    let Some(mut setup) = setup(ANY, "") else {
        return;
    };
    let script = "echo ready; read line; echo \"got $line\"; head -c 3000000 /dev/zero; exit 7";
    let mut child = setup.spawn(&["exec", "-i", "a", "--", "sh", "-c", script]);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    setup.host.kill();
    stdin.write_all(b"it\n").unwrap();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert!(rest.starts_with(b"got it\n") && rest.len() == 3_000_007);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    setup.host.launch().unwrap();
    wait_for("the next aditd has the VM", LIMIT, || {
        Ok(setup.sh("true").status.success().then_some(()))
    })
    .unwrap();
    // kubernetes/kubectl#1726: a stream that breaks off is no status 0.
    let mut child = setup.spawn(&["exec", "a", "--", "sh", "-c", "echo ready; sleep 1000"]);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    kill(Pid::from_raw(setup.port_pid()), Signal::SIGKILL).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(255));
}

#[test]
fn signals_are_forwarded_and_a_client_that_is_killed_takes_the_command_along() {
    let Some(setup) = setup(ANY, "") else { return };
    for (number, name) in [
        (Signal::SIGINT, "INT"),
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGHUP, "HUP"),
    ] {
        let script =
            format!("trap 'echo {name}; exit 3' {name}; echo ready; while :; do sleep 0.02; done");
        let mut child = setup.spawn(&["exec", "a", "--", "sh", "-c", &script]);
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        signal(&child, number);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("{name}\n"));
        assert_eq!(child.wait().unwrap().code(), Some(3));
    }
    let mut child = setup.spawn(&["exec", "a", "--", "sh", "-c", "echo $$; sleep 1000 & wait"]);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let gone = Path::new("/proc").join(line.trim());
    wait_for("the command has ended", LIMIT, || {
        Ok((!gone.exists()).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_detached_command_is_listed_attached_to_and_ended() {
    let Some(setup) = setup(ANY, "") else { return };
    let out = setup.exec(&[
        "--detach",
        "a",
        "--",
        "sh",
        "-c",
        "i=0; while [ $i -lt 50000 ]; do echo line $i; i=$((i+1)); done; exit 9",
    ]);
    assert_eq!(status(&out), 0, "{out:?}");
    let id = String::from_utf8(out.stdout).unwrap().trim().to_owned();
    let out = setup.adit(&["ps", "a"]);
    let listed = String::from_utf8(out.stdout).unwrap();
    assert!(listed.contains(&id) && listed.contains("runs"), "{listed}");
    // Left in the middle, and taken up again where the message says: by a reader who goes on reading, and by one who does not.
    let mut all = Vec::new();
    let mut since = String::from("0,0");
    for reads_on in [true, false, true] {
        let mut child = setup.spawn(&["attach", &id, "--since", &since]);
        let mut stdout = child.stdout.take().unwrap();
        let mut piece = vec![0; 10_000];
        stdout.read_exact(&mut piece).unwrap();
        signal(&child, Signal::SIGINT);
        let left = match reads_on {
            true => None,
            false => Some(child.wait().unwrap()),
        };
        stdout.read_to_end(&mut piece).unwrap();
        let left = left.unwrap_or_else(|| child.wait().unwrap());
        let mut said = String::new();
        let mut stderr = child.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(left.code(), Some(0), "{said}");
        let at = said.split("--since ").nth(1).unwrap();
        let at = at.split('`').next().unwrap();
        all.extend(piece);
        let had: usize = at.split(',').next().unwrap().parse().unwrap();
        assert!(had <= all.len() && (!reads_on || had == all.len()), "{had}");
        all.truncate(had);
        since = at.to_owned();
    }
    let out = setup.adit(&["attach", &id, "--since", &since]);
    assert_eq!(status(&out), 9);
    all.extend(&out.stdout);
    let want: String = (0..50_000).map(|i| format!("line {i}\n")).collect();
    assert!(all == want.as_bytes(), "{} of {}", all.len(), want.len());
    assert_eq!(status(&setup.adit(&["attach", &id])), 125);
    let out = setup.exec(&["--detach", "a", "--", "sleep", "1000"]);
    let id = String::from_utf8(out.stdout).unwrap().trim().to_owned();
    assert_eq!(status(&setup.adit(&["kill", &id])), 0);
    assert_eq!(status(&setup.adit(&["attach", &id])), 128 + 9);
}

/// Runs a line in a shell that has a terminal.
fn at_a_terminal(setup: &Setup, line: &str) -> Child {
    let mut command = Command::new("script");
    command
        .args(["-q", "-c", line, "/dev/null"])
        .env("ADIT_SOCKET", setup.socket())
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command.spawn().unwrap()
}

/// openssh's `-t`: keys are the command's signals, the size is ours, and the terminal is as before (R123).
#[test]
fn a_terminal_is_the_commands_and_is_as_before_afterwards() {
    let Some(setup) = setup(ANY, "") else { return };
    let inner = "stty size; trap 'echo got; exit 6' INT; echo ready; while :; do sleep 0.02; done";
    let line = format!(
        "stty rows 31 cols 77; {} exec -t a -- sh -c \"{inner}\"; echo \"status $?\"; stty -a | tr ';' '\\n' | grep -c -w -e icanon -e echo",
        setup.bins.join("adit").display()
    );
    let mut child = at_a_terminal(&setup, &line);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut all = String::new();
    while !all.ends_with("ready\r\n") {
        let n = stdout.read_line(&mut all).unwrap();
        assert!(n > 0, "{all}");
    }
    assert!(all.contains("31 77\r\n"), "{all}");
    stdin.write_all(b"\x03").unwrap();
    stdout.read_to_string(&mut all).unwrap();
    assert!(all.contains("got\r\nstatus 6\r\n"), "{all}");
    // Both words are there without a minus before them, in the line of flags.
    assert!(!all.trim_end().ends_with("\n0"), "{all}");
    child.wait().unwrap();
    // Without a terminal of ours there is none to give.
    assert_eq!(status(&setup.exec(&["-t", "a", "--", "true"])), 125);
}

/// A login shell, left by `~.`: the terminal is as before, and the shell and what it has started end.
#[test]
fn a_shell_is_left_by_an_escape_and_ends() {
    let Some(setup) = setup(ANY, "") else { return };
    let line = format!(
        "{} shell a; echo \"status $?\"; stty -a | tr ';' '\\n' | grep -c -w -e icanon -e echo",
        setup.bins.join("adit").display()
    );
    let mut child = at_a_terminal(&setup, &line);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdin
        .write_all(b"PS1=; stty -echo; echo pid=$$ in=$0\r")
        .unwrap();
    let mut all = String::new();
    while !all.contains("in=-") {
        let n = stdout.read_line(&mut all).unwrap();
        assert!(n > 0, "{all}");
    }
    let pid = all.rsplit("pid=").next().unwrap();
    let shell = Path::new("/proc").join(pid.split(' ').next().unwrap());
    assert!(shell.exists(), "{all}");
    stdin.write_all(b"~.").unwrap();
    stdout.read_to_string(&mut all).unwrap();
    assert!(all.contains("status 255\r\n"), "{all}");
    assert!(!all.trim_end().ends_with("\n0"), "{all}");
    child.wait().unwrap();
    wait_for("the shell has ended", LIMIT, || {
        Ok((!shell.exists()).then_some(()))
    })
    .unwrap();
    // Without a terminal there is nobody to type.
    let out = setup.adit(&["shell", "a"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(status(&out) == 125 && said.contains("adit exec"), "{said}");
}

/// One command in many VMs: those without a guest are told apart, and the lines of the others come whole.
#[test]
fn a_command_runs_in_all_vms_of_a_label() {
    let more = "[[vm]]\nname = \"b\"\ncid = 4\nlabels = { tier = \"web\" }\n[[vm]]\nname = \"c\"\ncid = 5\n";
    let Some(setup) = setup_with(ANY, "labels = { tier = \"web\" }\n", more) else {
        return;
    };
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; echo bad >&2; printf end; exit 3";
    let web = ["--all", "label:tier=web", "--"];
    let out = setup.exec(&[&web[..], &["sh", "-c", script]].concat());
    // b has no guest: 255 is the highest.
    assert_eq!(status(&out), 255, "{out:?}");
    let mut want: String = (0..2000).map(|i| format!("a: line {i}\n")).collect();
    want.push_str("a: end\n");
    assert!(out.stdout == want.as_bytes());
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.starts_with("a: bad\n"), "{said}");
    assert!(said.contains("\na: status 3\nb: error["), "{said}");
    assert!(said.ends_with("2 of 2 VMs: not status 0\n"), "{said}");
    let out = setup.exec(&["--all", "a*", "--", "echo", "hi"]);
    assert_eq!((status(&out), &out.stdout[..]), (0, &b"a: hi\n"[..]));
    let out = setup.exec(&[
        "-o",
        "json",
        "--all",
        "*",
        "--",
        "sh",
        "-c",
        "echo hi; exit 4",
    ]);
    let all: Vec<serde_json::Value> = out
        .stdout
        .split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    let line = serde_json::json!({ "vm": "a", "stream": "stdout", "line": "hi" });
    let end = serde_json::json!({ "vm": "a", "status": 4 });
    assert!(all.contains(&line) && all.contains(&end), "{all:?}");
    let failed = |vm: &str| {
        let is = |v: &&serde_json::Value| v["vm"] == vm && v["status"] == 255;
        all.iter().filter(is).count()
    };
    assert_eq!((failed("b"), failed("c"), all.len()), (1, 1, 4), "{all:?}");
    // Nobody is named; and what makes no sense with many.
    let out = setup.exec(&["--all", "label:tier=db", "--", "true"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("label:tier=db"));
    assert_eq!(status(&out), 125);
    assert_eq!(status(&setup.exec(&["-i", "--all", "*", "--", "cat"])), 125);
    // Ctrl-C goes to those that run, and no other is begun.
    let script = "trap 'echo got; exit 5' INT; echo ready; while :; do sleep 0.02; done";
    let args = [
        "exec",
        "--parallel",
        "1",
        "--all",
        "*",
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut child = setup.spawn(&args);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut all = String::new();
    stdout.read_line(&mut all).unwrap();
    signal(&child, Signal::SIGINT);
    stdout.read_to_string(&mut all).unwrap();
    assert_eq!(all, "a: ready\na: got\n");
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(status(&out), 130, "{said}");
    assert_eq!(said.matches("was not begun").count(), 2, "{said}");
    // One who reads no more ends them.
    let mut child = setup.spawn(&["exec", "--all", "a", "--", "yes"]);
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
fn r120_neither_without_a_grant_nor_without_a_rule_of_the_guest() {
    let Some(off) = setup("default = \"deny\"\n", "") else {
        return;
    };
    let out = off.sh("true");
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(status(&out), 125, "{said}");
    assert!(
        said.contains("error[denied]") && said.contains("[[exec]]"),
        "{said}"
    );
    drop(off);
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: only root can be somebody else");
    }
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        place.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let socket = place.path().join("m.sock");
    let more = format!(
        "[[listen]]\naddress = \"unix:{}\"\nrole = \"management\"\n[[grant]]\nto = [\"user:daemon\"]\nvms = [\"a\"]\nmay = [\"see\", \"exec:daemon\"]\n",
        socket.display()
    );
    let setup = setup(ANY, &more).unwrap();
    // Everybody can read the program of the test.
    let adit = place.path().join("adit");
    std::fs::copy(setup.bins.join("adit"), &adit).unwrap();
    let by = |user: &str, args: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", user, "--clear-groups", "--"])
            .arg(&adit)
            .args(args);
        command
            .env("ADIT_SOCKET", &socket)
            .current_dir("/")
            .output()
            .unwrap()
    };
    let out = by(
        "daemon",
        &["exec", "--user", "daemon", "a", "--", "id", "-un"],
    );
    assert_eq!(
        (status(&out), &out.stdout[..]),
        (0, &b"daemon\n"[..]),
        "{out:?}"
    );
    assert_eq!(status(&by("daemon", &["exec", "a", "--", "true"])), 125);
    assert_eq!(status(&by("daemon", &["ps", "a"])), 125);
    assert_eq!(status(&by("daemon", &["ps", "a", "--user", "daemon"])), 0);
    // One without a grant does not even learn that there is such a VM.
    let out = by("nobody", &["exec", "--user", "daemon", "a", "--", "true"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(status(&out) == 125 && said.contains("unknown-vm"), "{said}");
    let audit = setup.audit();
    let denied = |line: &&str| line.contains("\"deny\"") && line.contains("\"exec\"");
    assert!(audit.lines().filter(denied).count() >= 3, "{audit}");
    // A session of another user is none of theirs.
    let out = setup.exec(&["--detach", "a", "--", "sleep", "30"]);
    let id = String::from_utf8(out.stdout).unwrap().trim().to_owned();
    let out = by("daemon", &["kill", &id, "--user", "daemon"]);
    assert_eq!(status(&out), 125, "{out:?}");
    assert_eq!(status(&setup.adit(&["kill", &id])), 0);
}
