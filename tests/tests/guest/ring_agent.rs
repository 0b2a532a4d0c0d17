//! The agent over the ring: its services by name, a signed goal, and recovery after a process is killed.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use adit_tests::connect::connect;
use adit_tests::host::Host;
use adit_tests::image::Kernel;
use adit_tests::process::wait_for;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::restarts::must_end;
use crate::stalls::{push, take_back};
use crate::{BOOT, RING, Setup, bins, boot_with, echo, run_goal};

const LIMIT: Duration = Duration::from_secs(20);
/// A ring is attached again within this time once both sides run.
const AGAIN: Duration = Duration::from_secs(1);
/// Must match [`RING`].
const RING_BYTES: u64 = 8 << 20;
/// More than all buffers between a writer and a reader that has stopped.
const STOPPED_MAX: u64 = 64 << 20;
const HELLO: &str =
    "steps: [{id: hi, script: {interpreter: /bin/sh, script: \"echo over the ring\"}}]\n";

impl Setup {
    /// Waits until the agent is attached (again), and the carriers were measured. Returns how long that took.
    fn wait_ring(&self) -> Duration {
        let begin = Instant::now();
        let mut attached = None;
        let waited = wait_for("the ring", LIMIT, || {
            let ring = &self.vm()["carrier"];
            if ring["kind"] == "ring" {
                attached.get_or_insert(begin.elapsed());
            }
            Ok(ring["rtt_ns"].is_u64().then_some(()))
        });
        waited.unwrap_or_else(|e| panic!("{e:#}\n{:#}\n{}", self.vm(), self.logs()));
        attached.unwrap_or_default()
    }

    /// Does the main job while services are dialled over the ring.
    fn job(&self) {
        assert!(self.curl(&["http://web-1/"]).contains("this is web-1"));
        for len in [1, 4096, 65_537, 4 << 20] {
            echo(&self.host, "web-1:7", len);
        }
        // In quick succession.
        for n in 0..300 {
            echo(&self.host, "web-1:7", n * 37 % 5000 + 1);
        }
        // A reader stops: the others continue, and later it gets all that was kept for it.
        let mut stopped = self.tunnel();
        let pushed = push(&mut stopped, STOPPED_MAX);
        assert!(pushed < STOPPED_MAX, "nobody held it back");
        for _ in 0..10 {
            echo(&self.host, "web-1:7", 50_000);
        }
        take_back(&mut stopped, pushed);
        let list = run_goal(self, HELLO);
        assert!(list.contains("over the ring"), "{list}");
        assert_eq!(self.vm()["carrier"]["kind"], "ring");
    }
}

fn setup(kernel: Kernel, iommu: bool) -> Option<Setup> {
    setup_with(kernel, iommu, "")
}

/// The same in a guest that runs a script.
fn setup_with(kernel: Kernel, iommu: bool, script: &str) -> Option<Setup> {
    let host = Host::start_with(&bins()?, &["web-1"], RING).unwrap();
    Some(boot_with(kernel, host, script, false, Some(iommu)))
}

fn job(kernel: Kernel, iommu: bool, doorbell: &str) {
    let Some(setup) = setup(kernel, iommu) else {
        return;
    };
    setup.wait_ring();
    let (_, shown) = setup.adit(&["vm", "show", "web-1"]);
    println!("{shown}");
    assert_eq!(plain(&shown), as_the_page(doorbell), "{shown}");
    setup.job();
}

/// The lines of `adit vm show` about carriers, without numbers and directories of the machine.
fn plain(shown: &str) -> Vec<String> {
    let told = ["carrier", "ring", "latency"];
    let is_told = |line: &&str| line.split([' ', ':']).any(|word| told.contains(&word));
    let lines = shown.lines().filter(is_told);
    let word = |word: &str| match word {
        path if path.starts_with('/') => path.rsplit('/').next().unwrap_or_default().to_owned(),
        number if number.parse::<u64>().is_ok() => "N".to_owned(),
        word => word.to_owned(),
    };
    let line = |line: &str| {
        line.split_whitespace()
            .map(word)
            .collect::<Vec<_>>()
            .join(" ")
    };
    lines.map(line).collect()
}

/// The same lines from docs/which-carrier.md, for a guest with this doorbell.
fn as_the_page(doorbell: &str) -> Vec<String> {
    let page = std::fs::read_to_string(adit_tests::root().join("docs/which-carrier.md")).unwrap();
    let mut blocks = page.split("```");
    let shown = blocks.find(|block| block.starts_with("\nring ")).unwrap();
    assert!(shown.contains("ring doorbell  interrupt"), "{shown}");
    plain(&shown.replace("interrupt", doorbell))
}

#[test]
fn the_main_job_works_over_a_ring_with_a_byte_as_doorbell() {
    job(Kernel::V6_1, false, "a byte over vsock");
}

#[test]
fn the_main_job_works_over_a_ring_with_interrupts() {
    job(Kernel::V6_12, true, "interrupt");
}

/// Whether the tunnel still works.
fn alive(tunnel: &mut TcpStream) -> bool {
    let echoed = tunnel
        .write_all(b"still")
        .and_then(|()| tunnel.read_exact(&mut [0; 5]));
    echoed.is_ok()
}

impl Setup {
    fn carrier(&self) -> String {
        let vm = self.vm();
        vm["carrier"]["kind"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Waits until services are dialled over this carrier.
    fn wait_carrier(&self, kind: &str, since: Instant) -> Duration {
        let waited = wait_for(kind, LIMIT, || Ok((self.carrier() == kind).then_some(())));
        waited.unwrap_or_else(|e| panic!("{e:#}\n{:#}\n{}", self.vm(), self.logs()));
        since.elapsed()
    }

    /// Checks that the ring is used again within a second.
    fn ring_again(&self, what: &str, since: Instant) {
        let took = self.wait_carrier("ring", since);
        println!("{what}: the ring again after {} ms", took.as_millis());
        assert!(
            took < AGAIN,
            "{what}: {took:?}\n{:#}\n{}",
            self.vm(),
            self.logs()
        );
    }

    /// How many agents the guest has started since QEMU's start.
    fn agents(&self) -> usize {
        self.guest.serial().matches("adit-guest: ready").count()
    }

    /// Waits until the guest is up again, and has started an agent after those `before`.
    fn wait_booted(&mut self, before: usize) -> Instant {
        self.guest.wait_ready(BOOT).unwrap();
        wait_for("the agent's start", LIMIT, || {
            Ok((self.agents() > before).then(Instant::now))
        })
        .unwrap()
    }

    fn tunnel(&self) -> TcpStream {
        let mut tunnel = connect(self.host.proxy(), "web-1:7").unwrap();
        assert!(alive(&mut tunnel));
        tunnel
    }

    /// After a process was killed: the old tunnel ends, the ring is attached again, and new streams use it. `since` is when it can
    /// be attached; `None`: when somebody answers again.
    fn anew(&self, what: &str, mut old: TcpStream, since: Option<Instant>) {
        must_end(&mut old, what);
        // Whichever process was killed, aditd notices a moment after the tunnel has ended.
        let served = self.served(Instant::now());
        println!("{what}: an answer again after {} ms", served.as_millis());
        let since = since.unwrap_or_else(Instant::now);
        self.ring_again(what, since);
        echo(&self.host, "web-1:7", 300_000);
        let mut tunnel = self.tunnel();
        assert!(alive(&mut tunnel) && self.carrier() == "ring", "{what}");
    }
}

/// A second process with the region: sysfs gives it to root, vfio only to one process.
const POISON: &str = "adit-testguest ring-poison 5001 > /dev/console 2>&1 &\n";

/// The ring breaks while the agent uses it. Its streams end with the carrier's fault; streams that are dialled meanwhile use vsock
/// and stay there; and the ring is attached again, in another epoch, within a second.
fn poisoned(setup: &Setup) {
    let epochs = || -> Vec<u64> {
        let log = setup.host.port_log("web-1");
        let begun = log.lines().filter(|l| l.contains("session of the ring on"));
        let epoch = |l: &str| l.split("epoch=").nth(1)?.split(' ').next()?.parse().ok();
        begun.filter_map(epoch).collect()
    };
    let mut old = setup.tunnel();
    let before = epochs();
    let mut poison = connect(setup.host.proxy(), "vsock-5001.web-1:5001").unwrap();
    // For a second, which is long enough to see it.
    poison.write_all(&[200]).unwrap();
    must_end(&mut old, "the ring was poisoned");
    // Between two faults the ring is offered again, and the status says so.
    wait_for("vsock, because the ring broke", LIMIT, || {
        let carrier = setup.vm()["carrier"].clone();
        let why = carrier["why"].as_str().unwrap_or_default();
        let broke = carrier["kind"] == "vsock" && why.starts_with("the ring broke: ");
        Ok(broke.then_some(()))
    })
    .unwrap();
    let mut over_vsock = loop {
        let tunnel = setup.tunnel();
        // Meanwhile the ring may have been attached and have broken again. A stream on it ends with it, and does not count here.
        let ring = setup.vm()["carrier"].clone();
        if ring["kind"] == "vsock" && ring["streams"] == 0 {
            break tunnel;
        }
    };
    poison.read_exact(&mut [0]).unwrap();
    setup.wait_ring();
    assert!(alive(&mut over_vsock), "no stream changes its carrier");
    let log = setup.host.port_log("web-1");
    assert!(log.contains("reason=carrier fault"), "{log}");
    let after = epochs();
    assert!(after.last() > before.last(), "{before:?}, then {after:?}");

    // After a session of a second, faults count from zero again. One more fault, to measure how long the ring is away.
    std::thread::sleep(Duration::from_secs(1));
    let (mut tunnel, before) = (setup.tunnel(), epochs().len());
    let mut poison = connect(setup.host.proxy(), "vsock-5001.web-1:5001").unwrap();
    poison.write_all(&[1]).unwrap();
    must_end(&mut tunnel, "the ring was poisoned once");
    let begin = Instant::now();
    wait_for("another epoch", LIMIT, || {
        Ok((epochs().len() > before).then_some(()))
    })
    .unwrap();
    setup.ring_again("poisoned", begin);
    let mut tunnel = setup.tunnel();
    assert!(alive(&mut tunnel) && setup.carrier() == "ring" && alive(&mut over_vsock));
}

/// Kills the agent (its supervisor starts another one), aditd, the port process, and the guest.
fn killed(iommu: bool) {
    let Some(mut setup) = setup_with(Kernel::V6_1, iommu, if iommu { "" } else { POISON }) else {
        return;
    };
    setup.wait_ring();
    if !iommu {
        poisoned(&setup);
    }

    // aditd: the port process keeps ring and tunnels, and the next aditd finds both.
    let mut tunnel = setup.tunnel();
    setup.host.kill();
    assert!(alive(&mut tunnel), "without aditd");
    setup.host.launch().unwrap();
    setup.ring_again("aditd was killed", Instant::now());
    assert!(alive(&mut tunnel), "with the next aditd");
    setup.wait_agent();

    // The agent.
    setup.order(
        "steps: [{id: kill, script: {interpreter: /bin/sh, script: \"killall -9 adit-guest\"}}]\n",
    );
    setup.anew("the agent was killed", tunnel, None);
    setup.wait_agent();

    // The port process: its successor gets the region from aditd, and offers it again.
    let tunnel = setup.tunnel();
    setup.kill_port();
    setup.anew("the port process was killed", tunnel, None);
    setup.wait_agent();

    // The guest, by itself: function and region stay the same.
    let (tunnel, before) = (setup.tunnel(), setup.agents());
    setup.order("steps: [{id: reboot, script: {interpreter: /bin/sh, script: \"reboot -f\"}}]\n");
    let booted = setup.wait_booted(before);
    setup.anew("the guest rebooted", tunnel, Some(booted));
    setup.wait_agent();

    // The VMM: the next one has another region.
    let tunnel = setup.tunnel();
    setup.guest.power_cycle().unwrap();
    let booted = setup.wait_booted(0);
    setup.anew("power cut", tunnel, Some(booted));
    setup.wait_agent();
    if !iommu {
        cut(&setup);
    }
    setup.job();
}

/// R13: QEMU, or a process in its place, cannot truncate the ring's memory. It can remove the pages, which then read as zero. That
/// ends the session, and nothing else; the next session writes what it needs.
fn cut(setup: &Setup) {
    let ring = std::fs::read_dir(format!("/proc/{}/fd", setup.guest.pid())).unwrap();
    let ring = ring
        .filter_map(|fd| File::options().write(true).open(fd.ok()?.path()).ok())
        .find(|file| file.metadata().is_ok_and(|m| m.len() == RING_BYTES));
    let ring = ring.expect("QEMU has the ring's memory");
    for bytes in [0, 4096, RING_BYTES / 2, 2 * RING_BYTES] {
        assert!(ring.set_len(bytes).is_err(), "made {bytes} bytes long");
    }
    let (mut tunnel, port) = (setup.tunnel(), setup.vm()["port_pid"].clone());
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let begin = Instant::now();
    while begin.elapsed() < LIMIT && tunnel.write_all(&[7; 1 << 16]).is_ok() {
        fallocate(&ring, hole, 0, RING_BYTES as i64).unwrap();
    }
    // Zeros look like an empty ring to a side that waits. The next packet shows that positions went back.
    let _ = connect(setup.host.proxy(), "web-1:7");
    must_end(&mut tunnel, "the ring's pages were taken away");
    echo(&setup.host, "vsock-5000.web-1:5000", 100_000);
    setup.ring_again("pages taken away", Instant::now());
    assert_eq!(setup.vm()["port_pid"], port);
}

#[test]
fn after_any_kill_the_ring_is_attached_again_without_interrupts() {
    killed(false);
}

#[test]
fn after_any_kill_the_ring_is_attached_again_with_interrupts() {
    killed(true);
}

/// While its ring carries nothing, the agent sleeps, and so does the port process: neither side polls.
fn idle(iommu: bool) {
    let Some(setup) = setup(Kernel::V6_1, iommu) else {
        return;
    };
    setup.wait_ring();
    let count = "for t in /proc/$(pidof adit-guest)/task/*; do \
                 echo $(cat $t/comm) $(grep -h ctxt $t/status); done";
    let script = format!(
        "sleep 1; {count} > /run/a; sleep 5; {count} > /run/b; diff /run/a /run/b && echo asleep"
    );
    let script = serde_json::Value::from(script);
    let goal =
        format!("steps: [{{id: idle, script: {{interpreter: /bin/sh, script: {script}}}}}]\n");
    let pid = setup.vm()["port_pid"].as_u64().unwrap_or_default();
    let switches = || -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|l| l.trim().parse().ok()).unwrap_or_default()
    };
    let before = switches();
    let list = run_goal(&setup, &goal);
    assert!(list.contains("asleep"), "{list}");
    // The task, its report, and the requests meanwhile wake it; the clock must not.
    let woken = switches() - before;
    assert!(woken < 100, "the port process woke up {woken} times");
}

#[test]
fn an_idle_ring_wakes_nobody_without_interrupts() {
    idle(false);
}

#[test]
fn an_idle_ring_wakes_nobody_with_interrupts() {
    idle(true);
}
