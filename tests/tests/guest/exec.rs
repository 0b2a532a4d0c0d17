//! Commands in a real guest: switched on by its owner, with its status, input and output, over a killed aditd.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};

use adit_tests::image::Kernel;
use adit_tests::process::wait_for;
use sha2::{Digest, Sha256};

use crate::clock::{is_done, step};
use crate::{BOOT, Setup, bins, run_goal, setup};

/// Bytes that go through at once.
const MUCH: usize = 4 << 20;

fn commands(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, "", false) else {
        return;
    };
    let out = exec(&setup, &["web-1", "--", "true"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.code() == Some(125) && said.contains("off"),
        "{said}"
    );
    switch_on(&setup);
    statuses(&setup);
    bytes(&setup);
    over_a_kill(&mut setup);
    detached(&setup);
    nothing_is_left(&setup);
}

fn exec(setup: &Setup, args: &[&str]) -> Output {
    setup.host.adit(&[&["exec"], args].concat()).unwrap()
}

fn sh(setup: &Setup, script: &str) -> Output {
    exec(setup, &["web-1", "--", "sh", "-c", script])
}

/// Runs on while the test looks.
fn spawn(setup: &Setup, args: &[&str]) -> Child {
    Command::new(bins().unwrap().join("adit"))
        .args(args)
        .env(
            "ADIT_SOCKET",
            setup.host.vm_dir("web-1").join("../../aditd.sock"),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn switch_on(setup: &Setup) {
    let text = "cat > /etc/adit-guest/policy.toml <<E\\ndefault = 'deny'\\n[[exec]]\\nallow = 'host'\\nusers = 'any'\\ncommands = 'any'\\n\
                E\\nadit-guest policy check && /etc/init.d/S50adit-guest reload";
    let list = run_goal(setup, &step("policy", text));
    assert!(is_done(&list, "policy"), "{list}\n{}", setup.guest.serial());
    let on = wait_for("commands are on", BOOT, || {
        Ok(sh(setup, "true").status.success().then_some(()))
    });
    on.unwrap_or_else(|e| panic!("{e}\n{}", setup.guest.serial()));
}

fn statuses(setup: &Setup) {
    let out = sh(setup, "echo out; echo err >&2; hostname; exit 42");
    let said = String::from_utf8_lossy(&out.stdout);
    assert_eq!(
        (out.status.code(), &*said),
        (Some(42), "out\nweb-1\n"),
        "{out:?}"
    );
    assert_eq!(out.stderr, b"err\n");
    assert_eq!(sh(setup, "kill -9 $$").status.code(), Some(137));
    let out = exec(setup, &["web-1", "--timeout", "1s", "--", "sleep", "1000"]);
    assert_eq!(out.status.code(), Some(124));
    let out = exec(setup, &["web-1", "--", "no-such-program"]);
    assert_eq!(out.status.code(), Some(127));
}

fn bytes(setup: &Setup) {
    let mut child = spawn(setup, &["exec", "-i", "web-1", "--", "cat"]);
    let sent: Vec<u8> = (0..MUCH as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect();
    let (mut stdin, all) = (child.stdin.take().unwrap(), sent.clone());
    let writer = std::thread::spawn(move || stdin.write_all(&all));
    let out = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(out.status.code(), Some(0));
    assert_eq!(Sha256::digest(&out.stdout), Sha256::digest(&sent));
}

/// aditd is killed in the middle; what was said before and after arrives, and the status too.
fn over_a_kill(setup: &mut Setup) {
    let script = "echo ready; read line; echo \"got $line\"; head -c 1000000 /dev/zero; exit 7";
    let mut child = spawn(setup, &["exec", "-i", "web-1", "--", "sh", "-c", script]);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    setup.host.kill();
    stdin.write_all(b"it\n").unwrap();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert!(
        rest.starts_with(b"got it\n") && rest.len() == 1_000_007,
        "{}",
        rest.len()
    );
    assert_eq!(child.wait().unwrap().code(), Some(7));
    setup.host.launch().unwrap();
    setup.wait_agent();
}

/// It goes on over a killed agent, which its init script starts again.
fn detached(setup: &Setup) {
    let out = exec(
        setup,
        &[
            "--detach",
            "web-1",
            "--",
            "sh",
            "-c",
            "i=0; while [ $i -lt 40000 ]; do echo $i; i=$((i+1)); done; exit 5",
        ],
    );
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    let id = String::from_utf8(out.stdout).unwrap().trim().to_owned();
    let out = sh(
        setup,
        "cat /sys/fs/cgroup/adit-tasks/adit-task-exec/cgroup.procs | wc -l; kill -9 $(pidof adit-guest | tr ' ' '\\n' | sort -n | head -1); sleep 0.2",
    );
    let said = String::from_utf8_lossy(&out.stdout);
    // Two sessions, and the fork server.
    assert_eq!(said.trim(), "3", "{out:?}");
    setup.wait_agent();
    let attached = wait_for("the next agent has it", BOOT, || {
        let out = setup.host.adit(&["attach", &id])?;
        Ok((out.status.code() == Some(5)).then_some(out))
    });
    let out = attached.unwrap_or_else(|e| panic!("{e}\n{}", setup.guest.serial()));
    let want: String = (0..40_000).map(|i| format!("{i}\n")).collect();
    assert!(
        out.stdout == want.as_bytes(),
        "{} of {}",
        out.stdout.len(),
        want.len()
    );
}

/// Many short ones: processes, sockets and cgroups are as before.
fn nothing_is_left(setup: &Setup) {
    // The kernel's own threads come and go; they have no program.
    let count = "for p in /proc/[0-9]*; do readlink $p/exe; done | wc -l; ls /run/adit-guest/exec | wc -l; \
                 ls -d /sys/fs/cgroup/adit-tasks/adit-task-exec-* | wc -l";
    let counted = || String::from_utf8(sh(setup, count).stdout).unwrap();
    let before = counted();
    for n in 0..50 {
        assert_eq!(sh(setup, &format!("exit {n}")).status.code(), Some(n));
    }
    let after = wait_for("nothing is left", BOOT, || {
        Ok((counted() == before).then_some(()))
    });
    after.unwrap_or_else(|e| panic!("{e}: {before:?} and {:?}", counted()));
}

#[test]
fn commands_6_1() {
    commands(Kernel::V6_1);
}
