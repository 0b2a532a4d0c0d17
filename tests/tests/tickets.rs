//! `adit exec --sign`, `--seal` and `adit ticket` with a real aditd, a port process, and an agent on a ring that takes tickets alone.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use adit_exec::ToGuest;
use adit_tests::agent;
use adit_tests::host::Host;
use adit_tests::process::{Reaped, bound, wait_for};

const LIMIT: Duration = Duration::from_secs(60);
const TICKETS: &str =
    "default = \"deny\"\n[[exec]]\nallow = \"ticket\"\nusers = \"any\"\ncommands = \"any\"\n";

/// Set where this program is the agent: the VM's directory.
const AGENT: &str = "ADIT_TEST_AGENT_OF";

/// The agent of another process of this program.
#[test]
fn an_agent() {
    let Some(vm) = std::env::var_os(AGENT) else {
        return;
    };
    let path = |name| PathBuf::from(std::env::var_os(name).unwrap());
    agent::start_running(
        vm.as_ref(),
        &[],
        &path("PROGRAM"),
        &path("RUN_DIR"),
        TICKETS,
    )
    .unwrap();
    loop {
        std::thread::park();
    }
}

struct Setup {
    host: Host,
    bins: PathBuf,
    run: tempfile::TempDir,
    keys: tempfile::TempDir,
    _agent: Reaped,
}

fn setup() -> Option<Setup> {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
        return None;
    };
    let config = "[proxy]\nlisten = \"127.0.0.1:0\"\n[audit]\nallows = true\n[[vm]]\nname = \"web-1\"\ncid = 3\n";
    let host = Host::start_configured(&bins, config).unwrap();
    let run = tempfile::tempdir().unwrap();
    let built = bins.join("adit-guest");
    let program = match built.exists() {
        true => built,
        false => adit_tests::guest_bin("adit-guest"),
    };
    let agent = bound(std::env::current_exe().unwrap())
        .args(["--exact", "an_agent", "--nocapture"])
        .env(AGENT, host.vm_dir("web-1"))
        .env("PROGRAM", program)
        .env("RUN_DIR", run.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(run.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let setup = Setup {
        host,
        bins,
        run,
        keys: tempfile::tempdir().unwrap(),
        _agent: Reaped(agent),
    };
    let out = setup.adit(&["key", "new", &setup.key("ops.key"), "--role", "exec"]);
    assert!(out.status.success(), "{out:?}");
    fs::create_dir(setup.run.path().join("trust")).unwrap();
    fs::copy(
        setup.key("ops.key.pub"),
        setup.run.path().join("trust/ops.key.pub"),
    )
    .unwrap();
    wait_for("the ring carries", LIMIT, || {
        let out = setup.exec(&["web-1", "--", "true"]);
        Ok((out.status.code() != Some(255)).then_some(()))
    })
    .unwrap();
    Some(setup)
}

impl Setup {
    fn key(&self, name: &str) -> String {
        self.keys.path().join(name).to_str().unwrap().to_owned()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.bins.join("adit"));
        command
            .args(args)
            .env(
                "ADIT_SOCKET",
                self.host.vm_dir("web-1").join("../../aditd.sock"),
            )
            .current_dir(self.keys.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn socket(&self) -> PathBuf {
        self.host.vm_dir("web-1").join("../../aditd.sock")
    }

    fn adit(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn exec(&self, args: &[&str]) -> Output {
        self.adit(&[&["exec"], args].concat())
    }

    fn given(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let out = child.wait_with_output().unwrap();
        writer.join().unwrap();
        out
    }

    /// The guest's key, as its owner has it.
    fn guest_pk(&self) -> String {
        let private = self.run.path().join("state/guest.key");
        let out = self.adit(&["key", "show", private.to_str().unwrap()]);
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }
}

fn err(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn out(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn ok(of: Output) -> String {
    assert!(of.status.success(), "{}", err(&of));
    out(&of)
}

fn fails(of: &Output, code: &str, help: &str) {
    let said = err(of);
    assert_eq!(of.status.code(), Some(125), "{said}");
    assert!(said.contains(help), "{code}: {said}");
}

#[test]
fn a_command_is_signed_and_its_status_and_output_come_back() {
    let Some(setup) = setup() else { return };
    // Without a key it says what to do.
    fails(
        &setup.exec(&["web-1", "--", "true"]),
        "needs-ticket",
        "--sign KEY",
    );
    let sign = ["--sign", "ops.key"];
    let signed = |args: &[&str]| setup.exec(&[&sign, args].concat());
    let text = ok(signed(&[
        "--env",
        "A=b c",
        "--cwd",
        "/tmp",
        "web-1",
        "--",
        "sh",
        "-c",
        "pwd; echo $A",
    ]));
    assert_eq!(text, "/tmp\nb c\n");
    assert_eq!(
        signed(&["web-1", "--", "sh", "-c", "exit 7"]).status.code(),
        Some(7)
    );
    let all = [&["exec"], &sign[..], &["-i", "web-1", "--", "wc", "-c"]].concat();
    let text = ok(setup.given(&all, &vec![b'x'; 1_000_000]));
    assert_eq!(text.trim(), "1000000");
    fails(&signed(&["-t", "web-1", "--", "true"]), "usage", "terminal");
    // What the host writes down has the caller and the program; what the guest does has the key.
    let log = fs::read_to_string(setup.run.path().join("log")).unwrap();
    assert!(
        log.lines()
            .any(|l| l.contains(" exec ") && l.contains(" key=")),
        "{log}"
    );
    // A key that the guest does not trust for it.
    ok(setup.adit(&["key", "new", "other.key", "--role", "exec"]));
    fails(
        &setup.exec(&["--sign", "other.key", "web-1", "--", "true"]),
        "bad-ticket",
        "role `exec`",
    );
}

#[test]
fn a_sealed_command_has_live_input_and_the_key_must_be_the_guests() {
    let Some(setup) = setup() else { return };
    let pk = setup.guest_pk();
    let seal = ["exec", "--sign", "ops.key", "--seal", "--guest-pk", &pk];
    let sealed = |args: &[&str], input: &[u8]| setup.given(&[&seal, args].concat(), input);
    let content: Vec<u8> = (0..20_000_000_u32).map(|n| n as u8).collect();
    let all = sealed(&["-i", "web-1", "--", "cat"], &content);
    assert!(
        all.status.success() && all.stdout == content,
        "{}",
        err(&all)
    );
    assert_eq!(
        sealed(&["web-1", "--", "sh", "-c", "exit 9"], b"")
            .status
            .code(),
        Some(9)
    );
    // Detached, listed, attached to and ended, all of it sealed.
    let id = ok(sealed(
        &[
            "--detach",
            "web-1",
            "--",
            "sh",
            "-c",
            "echo one; sleep 1000",
        ],
        b"",
    ));
    let id = id.trim();
    let by = |command: &[&str]| {
        setup.adit(&[command, &["--sign", "ops.key", "--guest-pk", &pk]].concat())
    };
    assert!(ok(by(&["ps", "web-1"])).contains(id));
    ok(by(&["kill", id]));
    let seen = by(&["attach", id]);
    assert_eq!(out(&seen), "one\n", "{}", err(&seen));
    fails(&setup.adit(&["ps", "web-1"]), "needs-ticket", "--sign KEY");
    // Nobody's key, and that of another guest.
    let none = setup.exec(&["--sign", "ops.key", "--seal", "web-1", "--", "true"]);
    fails(&none, "unproved-key", "--guest-pk");
    ok(setup.adit(&["key", "new", "other.key"]));
    let args = [
        "exec",
        "--sign",
        "ops.key",
        "--seal",
        "--guest-pk",
        "other.key.pub",
        "web-1",
        "--",
        "true",
    ];
    fails(&setup.adit(&args), "other-key", "another key");
    // By a card that names it.
    ok(setup.adit(&["key", "new", "enrol.key", "--role", "card"]));
    let card = ok(setup.adit(&[
        "card",
        "new",
        "web-1",
        "--sign",
        "enrol.key",
        "--guest-pk",
        &pk,
    ]));
    fs::write(setup.key("web-1.card"), card).unwrap();
    let by_card = |trust: &str| {
        setup.exec(&[
            "--sign",
            "ops.key",
            "--seal",
            "--card",
            "web-1.card",
            "--trust",
            trust,
            "web-1",
            "--",
            "echo",
            "hi",
        ])
    };
    assert_eq!(ok(by_card("enrol.key.pub")), "hi\n");
    assert!(!by_card("ops.key.pub").status.success());
}

#[test]
fn a_ticket_is_signed_here_and_used_there_once() {
    let Some(setup) = setup() else { return };
    let put = |name: &str, text: String| fs::write(setup.key(name), text).unwrap();
    let new = ["ticket", "new", "web-1", "--sign", "ops.key"];
    let made = |args: &[&str]| ok(setup.adit(&[&new, args].concat()));
    put("one.ticket", made(&["--", "echo", "once"]));
    let shown = ok(setup.adit(&["ticket", "show", "one.ticket", "--trust", "ops.key.pub"]));
    assert!(
        shown.contains("web-1") && shown.contains("\"once\""),
        "{shown}"
    );
    assert!(
        !setup
            .adit(&["key", "new", "other.key", "--role", "exec"])
            .stdout
            .is_empty()
    );
    assert!(
        !setup
            .adit(&["ticket", "show", "one.ticket", "--trust", "other.key.pub"])
            .status
            .success()
    );
    assert_eq!(ok(setup.adit(&["ticket", "run", "one.ticket"])), "once\n");
    fails(
        &setup.adit(&["ticket", "run", "one.ticket"]),
        "ticket-spent",
        "sign another",
    );
    // With its input, which is signed, too.
    fs::write(setup.key("in"), "content").unwrap();
    put("two.ticket", made(&["--stdin", "in", "--", "cat"]));
    let run = ["ticket", "run", "two.ticket"];
    assert!(!setup.given(&run, b"another").status.success());
    assert_eq!(ok(setup.given(&run, b"content")), "content");
    // For later, and for too long.
    put(
        "later.ticket",
        made(&["--not-before", "2099-01-01T00:00:00Z", "--", "true"]),
    );
    fails(
        &setup.adit(&["ticket", "run", "later.ticket"]),
        "ticket-time",
        "clocks",
    );
    let long = setup.adit(&[&new, &["--valid", "11m", "--", "true"][..]].concat());
    assert!(err(&long).contains("10 minutes"), "{}", err(&long));
}

/// A hostile aditd: what `adit` says goes through it, to the real one and the guest behind that.
struct Hostile {
    socket: PathBuf,
    said: Arc<Mutex<Vec<u8>>>,
}

/// What it makes of a piece of what the client says; `nth`: which piece, 0 has the request's head.
type Change = fn(nth: usize, piece: Vec<u8>) -> Vec<u8>;

impl Hostile {
    fn start(setup: &Setup, name: &str, change: Change) -> Self {
        let socket = setup.keys.path().join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let upstream = setup.socket();
        let said = Arc::<Mutex<Vec<u8>>>::default();
        let heard = said.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, heard) = (client.unwrap(), heard.clone());
                let mut server = UnixStream::connect(&upstream).unwrap();
                let (mut back, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut back, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
                std::thread::spawn(move || {
                    let (mut piece, mut nth) = (vec![0; 1 << 16], 0);
                    while let Ok(n @ 1..) = client.read(&mut piece) {
                        let piece = change(nth, piece[..n].to_vec());
                        heard.lock().unwrap().extend(&piece);
                        if server.write_all(&piece).is_err() {
                            break;
                        }
                        nth += 1;
                    }
                    let _ = server.shutdown(Shutdown::Write);
                });
            }
        });
        Self { socket, said }
    }

    /// Runs `adit` through it.
    fn adit(&self, setup: &Setup, args: &[&str]) -> Output {
        let mut command = setup.command(args);
        command.env("ADIT_SOCKET", &self.socket).output().unwrap()
    }

    /// Says all of it again to the real one. Returns what is answered.
    fn again(&self, setup: &Setup) -> Vec<u8> {
        let mut server = UnixStream::connect(setup.socket()).unwrap();
        server.set_read_timeout(Some(LIMIT)).unwrap();
        server.write_all(&self.said.lock().unwrap()).unwrap();
        let _ = server.shutdown(Shutdown::Write);
        let mut all = Vec::new();
        let _ = server.read_to_end(&mut all);
        all
    }
}

#[test]
fn r120_a_hostile_aditd_that_replays_widens_injects_and_changes_runs_nothing() {
    let Some(setup) = setup() else { return };
    let mark = setup.key("ran");
    let marks = || fs::read_to_string(&mark).map_or(0, |text| text.lines().count());
    let script = format!("echo ran >> {mark}; cat >> {mark}; sleep 0.2");
    let pk = setup.guest_pk();
    let signed = ["exec", "--sign", "ops.key"];
    let sealed = ["exec", "--sign", "ops.key", "--seal", "--guest-pk", &pk];
    let what = ["web-1", "--", "sh", "-c", &script];
    // It carries all of it, and says it again: as it was, and in many streams.
    for (nth, by) in [&signed[..], &sealed].into_iter().enumerate() {
        let honest = Hostile::start(&setup, &format!("honest-{nth}"), |_, piece| piece);
        ok(honest.adit(&setup, &[by, &what].concat()));
        assert_eq!(marks(), 1);
        for _ in 0..5 {
            let answer = honest.again(&setup);
            assert!(answer.starts_with(b"HTTP/1.1 101"), "{answer:?}");
        }
        assert_eq!(marks(), 1);
        fs::remove_file(&mark).unwrap();
    }
    let injected: Change = |nth, mut piece| {
        if nth > 0 {
            let bytes = b"injected\n".to_vec();
            piece.extend(ToGuest::Stdin { offset: 0, bytes }.encode());
        }
        piece
    };
    let changed: Change = |nth, mut piece| {
        if nth > 0 {
            let at = piece.len() / 2;
            piece[at] ^= 1;
        }
        piece
    };
    // Another user, another program: as aditd would say it of itself.
    let widened: Change = |nth, piece| {
        let text = String::from_utf8_lossy(&piece).into_owned();
        match nth {
            0 => text.replace("run=sh", "run=id").into_bytes(),
            _ => piece,
        }
    };
    let cut: Change = |nth, piece| match nth {
        0 => piece,
        _ => piece[..piece.len() - 1].to_vec(),
    };
    for (name, change, may_begin) in [
        ("changed", changed, false),
        ("widened", widened, false),
        ("cut", cut, false),
        ("injected", injected, true),
    ] {
        for (nth, by) in [&signed[..], &sealed].into_iter().enumerate() {
            let hostile = Hostile::start(&setup, &format!("{name}-{nth}"), change);
            let mut command = [by, &what].concat();
            // A cut stream waits for its rest until the guest's patience is over.
            command.insert(1, "--timeout");
            command.insert(2, "5s");
            let done = hostile.adit(&setup, &command);
            assert!(!done.status.success(), "{name} {nth}: {}", err(&done));
            // What began before the injection has got nothing of it.
            let got = fs::read_to_string(&mark).unwrap_or_default();
            assert!(!got.contains("injected"), "{name} {nth}: {got}");
            assert!(got.is_empty() || may_begin, "{name} {nth}: {got}");
            let _ = fs::remove_file(&mark);
        }
    }
}

/// The page's own commands.
#[test]
fn the_pages_commands_for_tickets_do_what_it_says() {
    let Some(setup) = setup() else { return };
    let page = fs::read_to_string(adit_tests::root().join("docs/exec.md")).unwrap();
    let lines = page.lines().filter_map(|line| line.strip_prefix("$ adit "));
    let lines: Vec<_> = lines.collect();
    assert!(
        lines.iter().any(|line| line.starts_with("ticket new")),
        "{lines:?}"
    );
    let bin = Path::new(&setup.bins).join("adit");
    for line in lines {
        let line = line.replace("key new ", "key new --force ");
        let done = Command::new("sh")
            .args(["-c", &format!("{} {line}", bin.display())])
            .current_dir(setup.keys.path())
            .output()
            .unwrap();
        assert!(done.status.success(), "{line}: {}", err(&done));
    }
}

/// What somebody else has signed is shown to a person before it is used.
#[test]
fn r123_a_ticket_drives_no_terminal() {
    let Some(setup) = setup() else { return };
    let hostile = "\u{1b}]0;x\u{7}\u{1b}[2J";
    let args = [
        "ticket", "new", "web-1", "--sign", "ops.key", "--user", hostile, "--env",
    ];
    let env = format!("A={hostile}");
    let made = ok(setup.adit(&[&args[..], &[&env, "--", "echo", hostile]].concat()));
    fs::write(setup.key("hostile.ticket"), made).unwrap();
    for command in [
        &["ticket", "show", "hostile.ticket"][..],
        &["ticket", "show", "hostile.ticket", "-o", "json"],
        &["ticket", "run", "hostile.ticket"],
    ] {
        let done = setup.adit(command);
        let said = [&done.stdout[..], &done.stderr].concat();
        assert!(
            !said.contains(&0x1b) && !said.contains(&7),
            "{command:?}: {done:?}"
        );
    }
}
