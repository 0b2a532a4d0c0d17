//! `adit --server`: what works at aditd's socket works from another machine, by a certificate.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

mod own;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use adit_tests::process::limited;
use adit_tests::running::Setup;
use own::{Own, listen, own};

const ANY: &str = "default = \"deny\"\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n\
    [[files]]\nallow = \"host\"\nusers = \"any\"\nread = \"any\"\nwrite = \"any\"\n";
const GOAL: &str = "steps:\n  - id: hello\n    script: {interpreter: /bin/sh, script: \"true\"}\n";

#[test]
fn an_agent() {
    adit_tests::running::an_agent();
}

/// `adit` of a machine that has the server's pin and a certificate.
struct Away {
    bins: PathBuf,
    dir: PathBuf,
    server: String,
    pin: String,
    me: Own,
}

impl Away {
    fn set(&self, mut command: Command, args: &[&str]) -> Command {
        command
            .args(args)
            .current_dir(&self.dir)
            .env("ADIT_SERVER", &self.server)
            .env("ADIT_PIN", &self.pin)
            .env("ADIT_CERT", &self.me.cert)
            .env("ADIT_CERT_KEY", &self.me.key)
            .env_remove("ADIT_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn adit(&self, line: &str) -> Output {
        let args: Vec<&str> = line.split(' ').collect();
        let mut command = self.set(limited(self.bins.join("adit")), &args);
        command.output().unwrap()
    }

    /// What it prints where it succeeds.
    fn ok(&self, line: &str) -> String {
        let out = self.adit(line);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(0), "{line}: {said}");
        String::from_utf8(out.stdout).unwrap()
    }

    fn gets(&self, line: &str, contains: &str) {
        let got = self.ok(line);
        assert!(got.contains(contains), "{line}: {got}");
    }
}

fn setup(dir: &Path) -> Option<(Setup, Away)> {
    let (server, me) = (own(dir, "server"), own(dir, "me"));
    let may = "may = [\"see\", \"reach\", \"task\", \"goal\", \"manage\", \"exec\", \"files\"]";
    let more = format!(
        "{}[[grant]]\nto = [\"cert:{}\"]\nvms = [\"*\"]\n{may}\n",
        listen(&server, "role = \"management\"\n"),
        me.pin
    );
    let setup = Setup::start(ANY, &more).unwrap()?;
    let at = fs::read_to_string(setup.host.dir().join("run/listen.addr")).unwrap();
    let away = Away {
        bins: setup.bins.clone(),
        dir: dir.to_owned(),
        server: format!("https://{}", at.lines().next().unwrap()),
        pin: server.pin,
        me,
    };
    Some((setup, away))
}

#[test]
fn every_verb_works_from_another_machine() {
    let dir = tempfile::tempdir().unwrap();
    let Some((setup, away)) = setup(dir.path()) else {
        return;
    };
    // What there is, and who may what.
    away.gets("vm ls", "a ");
    away.gets("vm ls --all-hosts", "a ");
    away.gets("vm show a", "aditd.toml");
    away.gets("vm add b --cid 9", "");
    away.gets("vm set b --allow 80", "");
    away.gets("vm show b", "80");
    away.gets("vm lock b", "");
    away.gets("vm unlock b", "");
    away.gets("vm rm b", "");
    away.gets("resolve a", "a");
    away.gets("access ls", "cert:");
    away.gets(&format!("access check --as cert:{} see a", away.me.pin), "");
    away.gets("events", "");
    away.gets("config", "");
    away.gets("version", "adit");
    // Commands.
    let out = away.adit("exec a -- sh -c kill${IFS}-9${IFS}$$");
    assert_eq!(out.status.code(), Some(128 + 9));
    let mut command = away.set(Command::new(away.bins.join("adit")), &[]);
    command.args(["exec", "-i", "a", "--", "cat"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n >> 3) as u8).collect();
    let (mut stdin, all) = (child.stdin.take().unwrap(), sent.clone());
    let writer = std::thread::spawn(move || stdin.write_all(&all).unwrap());
    let mut back = Vec::new();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert!(child.wait().unwrap().success() && back == sent);
    away.gets("exec --all a -- echo hello", "hello");
    let id = away.ok("exec --detach a -- sleep 1000");
    let id = id.trim();
    away.gets("ps a", id);
    away.gets(&format!("kill {id}"), "");
    let out = away.adit(&format!("attach {id}"));
    assert_eq!(out.status.code(), Some(128 + 9));
    // Files.
    let user = nix::unistd::geteuid();
    fs::write(dir.path().join("sent"), &sent).unwrap();
    let there = dir.path().join("there");
    let there = there.display();
    away.gets(&format!("cp --user {user} sent a:{there}"), "");
    away.gets(&format!("ls --user {user} a:{there}"), "there");
    away.gets(&format!("stat --user {user} a:{there}"), "3000000");
    away.gets(&format!("cp --user {user} a:{there} back"), "");
    assert!(fs::read(dir.path().join("back")).unwrap() == sent);
    away.gets(&format!("rm --user {user} a:{there}"), "");
    // Goals, and what becomes of them: this guest has an agent that takes none.
    fs::write(dir.path().join("goal.yml"), GOAL).unwrap();
    away.ok("key new ops.key --role goal");
    away.gets("goal apply goal.yml --sign ops.key --to a", "");
    away.gets("goal ls", "1");
    away.gets("task ls", "a ");
    away.gets("trust ls", "");
    // What is not so says that.
    for (line, status, says) in [
        ("reload", 0, ""),
        // No agent takes tasks.
        ("doctor", 6, ""),
        ("task watch --timeout 200ms", 124, ""),
        ("wait a --for agent --timeout 200ms", 124, "no agent"),
        // A ring without a VMM.
        ("vm reload a", 1, "nothing over"),
    ] {
        let out = away.adit(line);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(status), "{line}: {said}");
        assert!(said.contains(says), "{line}: {said}");
    }
    drop(setup);
}
