//! `adit cp`, `ls`, `stat` and `rm` with a real aditd, a port process, and an agent on a ring: this program again, because an agent waits
//! for every child of its process.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Output;

use adit_tests::process::{Reaped, wait_for};
use adit_tests::running::{LIMIT, Setup};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sha2::{Digest, Sha256};

const ANY: &str = "default = \"deny\"\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n\
    [[files]]\nallow = \"host\"\nusers = \"any\"\nread = \"any\"\nwrite = \"any\"\n";

#[test]
fn an_agent() {
    adit_tests::running::an_agent();
}

fn status(out: &Output) -> i32 {
    out.status.code().unwrap_or_else(|| panic!("{out:?}"))
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn ok(out: Output) -> Output {
    assert_eq!(status(&out), 0, "{}", said(&out));
    out
}

fn user() -> String {
    nix::unistd::geteuid().to_string()
}

/// As whoever runs this test.
fn cp(setup: &Setup, args: &[&str]) -> Output {
    setup.adit(&[&["cp", "--user", &user()], args].concat())
}

fn bytes(len: usize) -> Vec<u8> {
    (0..u32::try_from(len).unwrap())
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect()
}

fn digest(at: &Path) -> Vec<u8> {
    Sha256::digest(fs::read(at).unwrap()).to_vec()
}

/// The guest's process of a copy that has a file open below this.
fn of_guest(dir: &Path) -> Pid {
    let is = |process: &Path| {
        let name = fs::read(process.join("comm")).unwrap_or_default();
        let mut files = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        name == b"adit-copy\n"
            && files.any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file.starts_with(dir)))
    };
    let mut all = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let found = all
        .find(|process| is(process))
        .expect("a process of the copy");
    Pid::from_raw(
        found
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .parse()
            .unwrap(),
    )
}

/// How many copies and waits this agent has.
fn copies(agent: u32) -> usize {
    let is = |process: &Path| {
        let read = |name: &str| fs::read_to_string(process.join(name)).unwrap_or_default();
        let of = |stat: &str| stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok();
        let above = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            of(&stat).unwrap_or(0)
        };
        // The fork server is between.
        read("comm") == "adit-copy\n"
            && of(&read("stat")).is_some_and(|parent: u32| above(parent) == agent)
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| is(&entry.path())).count()
}

fn text(at: &Path) -> &str {
    at.to_str().unwrap()
}

#[test]
fn files_and_trees_go_both_ways() {
    let Some(setup) = Setup::start(ANY, "").unwrap() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let there = |name: &str| format!("a:{}", text(&at(name)));
    fs::write(at("one"), bytes(20_000_000)).unwrap();
    fs::set_permissions(at("one"), fs::Permissions::from_mode(0o640)).unwrap();
    ok(cp(&setup, &[text(&at("one")), &there("two")]));
    ok(cp(&setup, &[&there("two"), text(&at("three"))]));
    assert_eq!(digest(&at("one")), digest(&at("three")));
    let (one, three) = (
        at("one").metadata().unwrap(),
        at("three").metadata().unwrap(),
    );
    assert_eq!((one.mode(), one.mtime()), (three.mode(), three.mtime()));
    // A tree, into a directory that is there, and what is in it.
    fs::create_dir_all(at("tree/a/b")).unwrap();
    fs::write(at("tree/a/b/file"), "deep").unwrap();
    symlink("b/file", at("tree/a/link")).unwrap();
    fs::create_dir(at("to")).unwrap();
    ok(cp(&setup, &[text(&at("tree")), &there("to/")]));
    ok(cp(
        &setup,
        &[&format!("{}/.", there("tree")), text(&at("to"))],
    ));
    for top in ["to/tree/a", "to/a"] {
        assert_eq!(fs::read(at(top).join("b/file")).unwrap(), b"deep");
        assert_eq!(
            fs::read_link(at(top).join("link")).unwrap(),
            Path::new("b/file")
        );
    }
    // Pipes.
    let mut child = setup.spawn(&["cp", "--user", &user(), "-", &there("piped")]);
    child
        .stdin
        .take()
        .unwrap()
        .write_all(&bytes(3_000_000))
        .unwrap();
    ok(child.wait_with_output().unwrap());
    let out = ok(cp(&setup, &[&there("piped"), "-"]));
    assert!(out.stdout == bytes(3_000_000));
    // Lists.
    let out = ok(setup.adit(&["ls", "--user", &user(), &there("to/tree/a"), "-o", "json"]));
    let rows: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&rows[0]["name"], &rows[0]["type"]),
        (&"b".into(), &"directory".into())
    );
    assert_eq!(
        (&rows[1]["name"], &rows[1]["target"]),
        (&"link".into(), &"b/file".into())
    );
    let out = ok(setup.adit(&["stat", "--user", &user(), &there("three"), "-o", "json"]));
    let row: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&row["size"], &row["mode"]),
        (&20_000_000.into(), &"0640".into())
    );
    let out = setup.adit(&["rm", "--user", &user(), &there("to")]);
    assert_eq!(status(&out), 125, "{}", said(&out));
    ok(setup.adit(&["rm", "-r", "--user", &user(), &there("to")]));
    assert!(!at("to").exists() && at("tree/a/b/file").exists());
    ok(setup.adit(&["rm", "--user", &user(), &there("two")]));
    // Who did what.
    let audit = setup.audit();
    for what in ["write ", "read ", "list ", "stat ", "remove "] {
        assert!(
            audit.contains(&format!("{}:{what}", user())),
            "{what}: {audit}"
        );
    }
    // What is not there, what makes no sense, and what cannot be written.
    for args in [
        &[&*there("no-such"), "x"][..],
        &["no-such", &*there("x")],
        &["one", "two"],
        &["a:/x", "a:/y"],
        &["a:../x", "y"],
        &["nobody:/x", "y"],
        &[text(&at("one")), &*there("no/such/dir")],
        &[text(&at("one")), "a:/proc/x"],
    ] {
        let out = cp(&setup, args);
        assert_eq!(status(&out), 125, "{args:?}: {}", said(&out));
        assert!(!said(&out).is_empty());
    }
    // In part.
    let fifo = at("tree/fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let out = cp(&setup, &[text(&at("tree")), &there("part")]);
    assert_eq!(status(&out), 1, "{}", said(&out));
    assert!(said(&out).contains("fifo") && at("part/a/b/file").exists());
}

#[test]
fn a_copy_goes_on_after_the_guests_end_was_killed_both_ways() {
    let Some(setup) = Setup::start(ANY, "").unwrap() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let there = |name: &str| format!("a:{}", text(&at(name)));
    fs::write(at("from"), bytes(200_000_000)).unwrap();
    for (from, to, target) in [
        (text(&at("from")).to_owned(), there("to"), "to"),
        (there("from"), text(&at("back")).to_owned(), "back"),
    ] {
        let child = setup.spawn(&["cp", "--user", &user(), &from, &to]);
        let part = at(&format!(".{target}.adit-part"));
        adit_tests::process::wait_for("it is under way", adit_tests::running::LIMIT, || {
            let len = part.metadata().map_or(0, |part| part.len());
            Ok((len > 5_000_000).then_some(()))
        })
        .unwrap();
        kill(of_guest(dir.path()), Signal::SIGKILL).unwrap();
        let out = ok(child.wait_with_output().unwrap());
        assert!(said(&out).contains("it goes on"), "{}", said(&out));
        assert_eq!(digest(&at("from")), digest(&at(target)));
        assert!(!part.exists());
    }
}

#[test]
fn r120_grants_and_the_guests_policy_say_where_and_as_whom() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().canonicalize().unwrap();
    let at = |name: &str| top.join(name);
    fs::create_dir_all(at("srv/app/deep")).unwrap();
    fs::create_dir_all(at("srv/apple")).unwrap();
    fs::create_dir_all(at("log")).unwrap();
    for file in [
        "srv/app/file",
        "srv/file",
        "srv/apple/file",
        "log/file",
        "secret",
    ] {
        fs::write(at(file), file).unwrap();
    }
    symlink("../file", at("srv/app/up")).unwrap();
    symlink(at("secret"), at("srv/app/out")).unwrap();
    symlink("..", at("srv/app/above")).unwrap();
    symlink("file", at("srv/app/inside")).unwrap();
    let policy = format!(
        "default = \"deny\"\n[[files]]\nallow = \"host\"\nusers = [{user}]\nread = [{srv:?}, {log:?}]\nwrite = [{srv:?}]\n",
        user = user(),
        srv = at("srv"),
        log = at("log"),
    );
    let app = at("srv/app");
    let more = format!(
        "[[listen]]\naddress = \"127.0.0.1:0\"\nrole = \"management\"\n[[grant]]\nto = [\"user:{user}\"]\nvms = [\"a\"]\nmay = [\"see\", \"files:{app}\"]\n",
        user = user(),
        app = text(&app),
    );
    let Some(setup) = Setup::start(&policy, &more).unwrap() else {
        return;
    };
    let there = |name: &str| format!("a:{}", text(&at(name)));
    let read = |name: &str| cp(&setup, &[&there(name), "-"]);
    // The owner of the host: as far as the guest's policy goes.
    for name in [
        "srv/app/file",
        "srv/app/up",
        "srv/app/inside",
        "srv/file",
        "log/file",
    ] {
        ok(read(name));
    }
    for name in ["secret", "srv/app/out", "srv/app/above/above/secret", ""] {
        let out = read(name);
        assert_eq!(status(&out), 125, "{name}: {}", said(&out));
        assert!(out.stdout.is_empty());
    }
    let one = at("srv/file");
    ok(cp(&setup, &[text(&one), &there("srv/new")]));
    for name in ["log/new", "new", "srv/app/above/above/new", "srv/app/out"] {
        let out = cp(&setup, &[text(&one), &there(name)]);
        assert_eq!(status(&out), 125, "{name}: {}", said(&out));
    }
    assert_eq!(fs::read(at("secret")).unwrap(), b"secret");
    assert!(!at("log/new").exists() && !at("new").exists());
    let other = setup.adit(&["cp", "--user", "daemon", &there("srv/file"), "-"]);
    assert_eq!(status(&other), 125, "{}", said(&other));
    let out = setup.adit(&["rm", "--user", &user(), &there("log/file")]);
    assert_eq!(status(&out), 125, "{}", said(&out));
    let out = ok(setup.adit(&[
        "access",
        "check",
        "--as",
        &format!("user:{}", user()),
        "files",
        &format!("{}@a:{}", user(), text(&at("srv/app/file"))),
    ]));
    assert!(
        String::from_utf8_lossy(&out.stdout).contains("grant"),
        "{out:?}"
    );
}

#[test]
fn without_a_rule_files_are_off() {
    let policy =
        "default = \"deny\"\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n";
    let Some(setup) = Setup::start(policy, "").unwrap() else {
        return;
    };
    for args in [
        &["cp", "a:/etc/hostname", "-"][..],
        &["ls", "a:/"],
        &["stat", "a:/"],
        &["rm", "a:/x"],
    ] {
        let out = setup.adit(args);
        assert_eq!(status(&out), 125, "{}", said(&out));
        assert!(said(&out).contains("[[files]]"), "{}", said(&out));
    }
}

#[test]
fn r121_whoever_reads_no_more_is_waited_for_and_one_who_goes_leaves_nothing() {
    let Some(setup) = Setup::start(ANY, "").unwrap() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::write(&from, bytes(30_000_000)).unwrap();
    let there = format!("a:{}", text(&from));
    for _ in 0..10 {
        let mut child = setup.spawn(&["cp", "--user", &user(), &there, "-"]);
        let mut first = [0; 10];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        // Its standard output is closed.
        let code = child.wait().unwrap().code();
        assert!(matches!(code, Some(125 | 141)), "{code:?}");
    }
    let mut child = setup.spawn(&["cp", "--user", &user(), &there, "-"]);
    let mut out = child.stdout.take().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut all = Vec::new();
    out.read_to_end(&mut all).unwrap();
    assert!(child.wait().unwrap().success() && all == bytes(30_000_000));
    adit_tests::process::wait_for(
        "no process of a copy is left",
        adit_tests::running::LIMIT,
        || {
            let mut left = 0;
            for process in fs::read_dir("/proc").unwrap().flatten() {
                let name = fs::read(process.path().join("comm")).unwrap_or_default();
                left += usize::from(name == b"adit-copy\n");
            }
            Ok((left == 0).then_some(()))
        },
    )
    .unwrap();
}

/// A file is waited for without asking again and again; whoever may not read there hears that at once.
#[test]
fn a_file_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().canonicalize().unwrap();
    let policy = format!(
        "default = \"deny\"\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n\
         [[files]]\nallow = \"host\"\nusers = \"any\"\nread = [\"{}\"]\n",
        at.display()
    );
    let Some(setup) = Setup::start(&policy, "").unwrap() else {
        return;
    };
    let user = user();
    let waits = |path: &Path, timeout: &str| {
        let condition = format!("file:{}", path.display());
        let of = ["--user", &user, "--timeout", timeout];
        let mut command = setup.command(&[&["wait", "a", "--for", &condition], &of[..]].concat());
        Reaped(command.spawn().unwrap())
    };
    let processes = |n: usize| {
        wait_for(&format!("{n} processes that wait"), LIMIT, || {
            Ok((copies(setup.agent()) == n).then_some(()))
        })
        .unwrap();
    };
    let ready = at.join("sub/ready");
    let mut one = waits(&ready, "30s");
    let mut another = waits(&ready, "30s");
    processes(2);
    another.kill().unwrap();
    processes(1);
    fs::create_dir(at.join("sub")).unwrap();
    fs::write(&ready, "here").unwrap();
    assert_eq!(one.0.wait().unwrap().code(), Some(0));
    // It is there; it never comes; it may not be looked for.
    for (path, timeout, status) in [
        (ready.as_path(), "30s", 0),
        (&at.join("never"), "300ms", 124),
        (Path::new("/etc/passwd"), "30s", 125),
    ] {
        let mut waits = waits(path, timeout);
        assert_eq!(waits.0.wait().unwrap().code(), Some(status), "{path:?}");
    }
    processes(0);
}
