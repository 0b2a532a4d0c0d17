//! Real guests with both kernels: tunnels, tasks and reboots from end to end. Each test boots once.
//!
//! These tests need the binaries and images that `cargo xtask test` builds. Without them they print that and pass.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_tests::connect::{connect, pattern};
use adit_tests::guest::{Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;

mod agents;
mod before;
mod bombs;
mod cards;
mod clock;
mod clones;
mod cuts;
mod exec;
mod files;
mod freeze;
mod from_guest;
mod hostile;
mod hosts;
#[path = "../clients/keys.rs"]
mod keys;
mod pauses;
mod restarts;
mod ring;
mod ring_agent;
mod stalls;
mod takeover;
mod tour;
mod upkeep;

const BOOT: Duration = Duration::from_secs(60);
/// A VM's configuration if it has a ring.
const RING: &str = "ivshmem_mib = 8";

/// A host, and one guest whose agent is ready.
struct Setup {
    guest: Guest,
    host: Host,
}

/// The directory of aditd, adit-port and adit. Prints the reason and returns `None` if nothing can be booted.
fn bins() -> Option<PathBuf> {
    let bins = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from);
    if bins.is_none() {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
    }
    bins
}

/// Boots a guest that also runs `script` at its start. Returns `None` like [`bins`].
fn setup(kernel: Kernel, script: &str, boot_files: bool) -> Option<Setup> {
    let host = Host::start(&bins()?, &["web-1"]).unwrap();
    Some(boot(kernel, host, script, boot_files))
}

/// Boots a guest on this host.
fn boot(kernel: Kernel, host: Host, script: &str, boot_files: bool) -> Setup {
    boot_with(kernel, host, script, boot_files, None)
}

/// The same with a ring, perhaps behind an IOMMU.
fn boot_with(
    kernel: Kernel,
    host: Host,
    script: &str,
    boot_files: bool,
    iommu: Option<bool>,
) -> Setup {
    let agent = adit_tests::guest_bin("adit-guest");
    boot_agent(kernel, host, script, boot_files, iommu, &agent)
}

/// The same with another agent.
fn boot_agent(
    kernel: Kernel,
    host: Host,
    script: &str,
    boot_files: bool,
    iommu: Option<bool>,
    agent: &Path,
) -> Setup {
    let image = Image::build(kernel, &|what| println!("{what}")).unwrap();
    host.wait_port("web-1").unwrap();
    assert!(
        host.adit(&["key", "new", "fleet.key"])
            .unwrap()
            .status
            .success()
    );
    let (socket, trust) = (host.vhost_socket("web-1"), host.dir().join("fleet.key.pub"));
    let who = Identity {
        name: "web-1",
        vhost_socket: &socket,
        agent: Some(agent),
        trust: Some(&trust),
        script,
        boot_files,
    };
    let server = host.ivshmem_socket("web-1");
    let ring = iommu.map(|iommu| adit_tests::guest::Ring {
        socket: &server,
        iommu,
        parameters: "",
    });
    let mut guest = Guest::boot_with(&image, &who, ring, &host.dir().join("web-1")).unwrap();
    let took = guest.wait_ready(BOOT).unwrap();
    println!(
        "guest {} ready after {} ms",
        kernel.name(),
        took.as_millis()
    );
    let setup = Setup { guest, host };
    setup.wait_agent();
    setup
}

impl Setup {
    fn wait_agent(&self) {
        let out = self
            .host
            .adit(&["wait", "web-1", "--for", "agent", "--timeout", "30s"])
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.success(),
            "{said}\n{}\n{}",
            self.guest.serial(),
            self.host.log()
        );
    }

    fn curl(&self, args: &[&str]) -> String {
        let out = self.host.curl(args).unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
    }

    /// Signs a goal and applies it. Returns its id.
    fn order(&self, goal: &str) -> String {
        std::fs::write(self.host.dir().join("run.yaml"), goal).unwrap();
        let sign = ["--sign", "fleet.key", "--to", "web-1"];
        let (code, said) = self.adit(&[&["goal", "apply", "run.yaml"], &sign[..]].concat());
        assert_eq!(code, 0, "{said}");
        said.split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    }

    fn adit(&self, args: &[&str]) -> (i32, String) {
        let out = self.host.adit(args).unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned()
            + &String::from_utf8_lossy(&out.stderr);
        (out.status.code().unwrap_or(-1), text)
    }
}

/// Sends `len` bytes in odd pieces, and reads the echo at the same time.
fn echo(host: &Host, to: &str, len: u64) {
    let stream = connect(host.proxy(), to).unwrap();
    let mut sender = stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let (mut at, mut piece) = (0, 1);
        while at < len {
            let n = (len - at).min(piece);
            let bytes: Vec<u8> = (at..at + n).map(pattern).collect();
            sender.write_all(&bytes).unwrap();
            at += n;
            piece = piece * 3 % 100_003 + 1;
        }
        // After a half-close the echo of the bytes in flight must still arrive.
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let (mut at, mut buf) = (0u64, vec![0; 70_001]);
    let mut stream = stream;
    loop {
        let n = stream.read(&mut buf).unwrap();
        if n == 0 {
            break;
        }
        for (i, &b) in buf[..n].iter().enumerate() {
            assert_eq!(
                b,
                pattern(at + i as u64),
                "{to}: byte {} of {len}",
                at + i as u64
            );
        }
        at += n as u64;
    }
    sending.join().unwrap();
    assert_eq!(at, len, "{to}");
}

/// The guest has a name for a Unix socket, of which its agent is told while it runs.
const SERVICE: &str = r#"
adit-testguest uds-echo /run/echo.sock &
printf '[[service]]\nname = "echo"\nto = "unix:/run/echo.sock"\n' >> /etc/adit-guest/adit-guest.toml
kill -HUP $(pidof adit-guest)
"#;

fn tunnels(kernel: Kernel) {
    let Some(bins) = bins() else { return };
    let services = "allow_services = [\"echo\", \"none\"]";
    let host = Host::start_with(&bins, &["web-1"], services).unwrap();
    let setup = boot(kernel, host, SERVICE, false);
    // By name, with an absolute-form request and with CONNECT.
    assert!(setup.curl(&["http://web-1/"]).contains("this is web-1"));
    assert!(
        setup
            .curl(&["-p", "http://web-1:80/"])
            .contains("this is web-1")
    );
    for (url, status) in [
        ("http://web-9/", "404"),
        ("http://web-1:8080/", "403"),
        ("http://web-1:81/", "502"),
        ("http://web_1/", "404"),
        ("http://web-1:0/", "400"),
        ("http://none.web-1.svc/", "403"),
    ] {
        let said = setup.curl(&[url]);
        assert!(
            said.starts_with(&format!("HTTP/1.1 {status}")),
            "{url}: {said}"
        );
        assert!(
            said.to_lowercase().contains("proxy-status: adit; error="),
            "{url}: {said}"
        );
    }
    // A service that the guest names, once its agent has read so.
    wait_for("the service", BOOT, || {
        Ok(connect(setup.host.proxy(), "echo.web-1.svc:1").ok())
    })
    .unwrap();
    echo(&setup.host, "echo.web-1.svc:1", 1 << 20);
    // Through the agent (TCP in the guest), and to a plain AF_VSOCK listener.
    for to in ["web-1:7", "vsock-5000.web-1:5000"] {
        for len in [1, 43, 4096, 65_536, 65_537, 1 << 20, 64 << 20] {
            echo(&setup.host, to, len);
        }
    }
    // In quick succession: from the host, and from the guest.
    for n in 0..2000 {
        let to = if n % 2 == 0 {
            "web-1:7"
        } else {
            "vsock-5000.web-1:5000"
        };
        echo(&setup.host, to, n * 37 % 5000 + 1);
    }
    let goal = "steps: [{id: storm, script: {interpreter: /bin/sh, script: \"adit-testguest dial-host 2000\"}}]\n";
    let list = run_goal(&setup, goal);
    assert!(
        list.contains("2000 answers"),
        "{list}\n{}",
        setup.host.log()
    );
}

/// Signs and applies a goal, and waits for its end. Returns the list of tasks.
fn run_goal(setup: &Setup, goal: &str) -> String {
    setup.order(goal);
    setup.adit(&["task", "watch", "--timeout", "60s"]);
    setup.adit(&["task", "ls"]).1
}

/// aditd is killed at random points while a tunnel is in use: the tunnel continues, and new requests work afterwards.
fn aditd_killed(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, "", false) else {
        return;
    };
    let mut seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut tunnel = connect(setup.host.proxy(), "web-1:7").unwrap();
    for round in 0..8u64 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let before = seed >> 49;
        let mut far = tunnel.try_clone().unwrap();
        let sending = std::thread::spawn(move || {
            let bytes: Vec<u8> = (0..1 << 20).map(pattern).collect();
            far.write_all(&bytes).unwrap();
        });
        let mut got = vec![0; 1 << 20];
        // Kill it after so many bytes of the echo.
        let (first, rest) = got.split_at_mut(usize::try_from(before).unwrap());
        tunnel.read_exact(first).unwrap();
        setup.host.kill();
        tunnel.read_exact(rest).unwrap();
        sending.join().unwrap();
        assert!(
            got.iter().enumerate().all(|(i, &b)| b == pattern(i as u64)),
            "round {round}"
        );
        setup.host.launch().unwrap();
        setup.wait_agent();
        echo(&setup.host, "web-1:7", 100_000);
    }
    let list = run_goal(
        &setup,
        "steps: [{id: after, script: {interpreter: /bin/sh, script: \"echo alive\"}}]\n",
    );
    assert!(list.contains("alive"), "{list}");
}

/// Counts the context switches of the agent's threads in five seconds without traffic.
const IDLE: &str = r#"(
switches() { cat /proc/$(pidof adit-guest)/task/*/status | awk '/ctxt_switches/ { n += $2 } END { print n }'; }
sleep 6; before=$(switches); sleep 5; after=$(switches)
echo "IDLE-SWITCHES $((after - before)) of $before" > /dev/console
) &
"#;

/// An idle agent does not wake up, not even by a timer.
fn idle(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, IDLE, false) else {
        return;
    };
    setup
        .guest
        .wait_serial("idle count", BOOT, |log| log.contains("IDLE-SWITCHES"))
        .unwrap();
    let serial = setup.guest.serial();
    let line = serial.lines().find(|l| l.contains("IDLE-SWITCHES"));
    let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
    assert!(
        matches!(words[..], [_, "0", "of", before] if before != "0"),
        "{line:?}"
    );
}

const GOAL: &str = "steps:
  - id: hello
    script: {interpreter: /bin/sh, script: \"echo hello from $(hostname); exit 0\\n\"}
  - id: file
    file: {path: /etc/motd, content: \"managed\\n\"}
  - id: fails
    continue_on_error: true
    script: {interpreter: /bin/sh, script: \"echo no >&2; exit 3\\n\"}
  - id: once
    script: {interpreter: /bin/sh, script: \"echo ran >> /var/lib/once; sync; cat /etc/motd\\n\"}
";

fn tasks(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, "", false) else {
        return;
    };
    std::fs::write(setup.host.dir().join("goal.yaml"), GOAL).unwrap();
    let (code, said) = setup.adit(&[
        "goal",
        "apply",
        "goal.yaml",
        "--sign",
        "fleet.key",
        "--to",
        "web-1",
        "--save",
        "signed.json",
    ]);
    assert_eq!(code, 0, "{said}");
    let goal = said.split_whitespace().nth(1).unwrap_or_default();
    let (code, said) = setup.adit(&["task", "watch", "--goal", goal, "--timeout", "30s"]);
    let (_, list) = setup.adit(&["task", "ls"]);
    assert!(
        code == 0 || code == 5,
        "{code} {said}\n{list}\n{}\n{}",
        setup.guest.serial(),
        setup.host.log()
    );
    for (step, state) in [
        ("hello", "done"),
        ("file", "done"),
        ("fails", "failed"),
        ("once", "done"),
    ] {
        let line = list
            .lines()
            .find(|l| l.contains(&format!(" {step} ")))
            .unwrap_or_default();
        assert!(
            line.contains(state),
            "{step}: {list}\n{}",
            setup.guest.serial()
        );
    }
    assert!(list.contains("hello from web-1"), "{list}");

    let list = run_goal(
        &setup,
        "steps: [{id: size, script: {interpreter: /bin/sh, script: \"grep VmRSS /proc/$PPID/status\"}}]\n",
    );
    let line = list
        .lines()
        .find(|l| l.contains("VmRSS"))
        .unwrap_or_default();
    let kib = line
        .split_whitespace()
        .rev()
        .nth(1)
        .and_then(|n| n.parse::<u64>().ok());
    println!("agent: {kib:?} KiB resident");
    assert!(kib.is_some_and(|n| n < 4096), "{list}");

    // One byte is changed after signing: the guest must refuse.
    let signed = std::fs::read_to_string(setup.host.dir().join("signed.json")).unwrap();
    let tampered = adit_tests::tamper::tamper(&signed).unwrap();
    std::fs::write(setup.host.dir().join("tampered.json"), tampered).unwrap();
    let (code, said) = setup.adit(&["goal", "apply", "tampered.json", "--to", "web-1"]);
    assert_eq!(code, 0, "{said}");
    setup.adit(&["task", "watch", "--timeout", "30s"]);
    let (_, list) = setup.adit(&["task", "ls", "--state", "refused"]);
    assert!(list.contains("bad-signature"), "{list}");

    // The result was not acknowledged before a reboot: the step must have run only once.
    setup.guest.power_cycle().unwrap();
    setup.guest.wait_ready(BOOT).unwrap();
    setup.wait_agent();
    std::fs::write(
        setup.host.dir().join("count.yaml"),
        "steps: [{id: count, script: {interpreter: /bin/sh, script: \"wc -l < /var/lib/once\"}}]\n",
    )
    .unwrap();
    setup.adit(&[
        "goal",
        "apply",
        "count.yaml",
        "--sign",
        "fleet.key",
        "--to",
        "web-1",
    ]);
    setup.adit(&["task", "watch", "--timeout", "30s"]);
    let (_, list) = setup.adit(&["task", "ls"]);
    let line = list
        .lines()
        .find(|l| l.contains(" count "))
        .unwrap_or_default();
    assert!(
        line.contains("done") && line.trim_end().ends_with(" 1"),
        "{list}\n{}",
        setup.guest.serial()
    );
}

#[test]
fn tunnels_carry_every_byte_and_failures_have_a_status_6_1() {
    tunnels(Kernel::V6_1);
}

#[test]
fn tunnels_carry_every_byte_and_failures_have_a_status_6_12() {
    tunnels(Kernel::V6_12);
}

#[test]
fn tunnels_outlive_a_killed_aditd_6_1() {
    aditd_killed(Kernel::V6_1);
}

#[test]
fn tunnels_outlive_a_killed_aditd_6_12() {
    aditd_killed(Kernel::V6_12);
}

#[test]
fn an_idle_agent_does_not_wake_up_6_1() {
    idle(Kernel::V6_1);
}

#[test]
fn signed_goals_run_once_and_are_reported_6_1() {
    tasks(Kernel::V6_1);
}

#[test]
fn signed_goals_run_once_and_are_reported_6_12() {
    tasks(Kernel::V6_12);
}
