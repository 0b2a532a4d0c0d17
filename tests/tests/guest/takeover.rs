//! A port process of a real guest is killed or replaced: the guest is never rebooted, nothing in it hangs, and the next request is
//! served.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use adit_tests::connect::{connect, pattern};
use adit_tests::host::Host;
use adit_tests::image::Kernel;
use adit_tests::process::wait_for;
use adit_tests::systemd::Systemd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{BOOT, Setup, bins, boot, setup};

const SOON: Duration = Duration::from_secs(20);

impl Setup {
    pub fn logs(&self) -> String {
        let port = self.host.port_log("web-1");
        let (aditd, guest) = (self.host.log(), self.guest.serial());
        format!("aditd:\n{aditd}\nport:\n{port}\nguest:\n{guest}")
    }

    pub fn vm(&self) -> serde_json::Value {
        let (code, said) = self.adit(&["vm", "show", "web-1", "-o", "json"]);
        assert_eq!(code, 0, "{said}");
        serde_json::from_str(&said).unwrap()
    }

    fn port_pid(&self) -> i32 {
        wait_for(
            "a port process",
            SOON,
            || Ok(self.vm()["port_pid"].as_u64()),
        )
        .ok()
        .and_then(|pid| i32::try_from(pid).ok())
        .unwrap_or_else(|| panic!("no port process\n{}", self.logs()))
    }

    pub fn kill_port(&self) {
        kill(Pid::from_raw(self.port_pid()), Signal::SIGKILL).unwrap();
    }

    /// Waits until the tasks of a goal have ended; returns the list.
    fn finish(&self, goal: &str) -> String {
        self.adit(&["task", "watch", "--goal", goal, "--timeout", "60s"]);
        self.adit(&["task", "ls", "--goal", goal]).1
    }

    /// Runs a line of shell in the guest. Returns the last word of its output.
    pub fn ask(&self, line: &str) -> String {
        let id = self.order(&format!(
            "steps: [{{id: ask, script: {{interpreter: /bin/sh, script: \"{line}\"}}}}]\n"
        ));
        let list = self.finish(&id);
        assert!(list.contains(" done"), "{list}\n{}", self.logs());
        let line = list
            .lines()
            .find(|l| l.contains(" ask "))
            .unwrap_or_default();
        line.split_whitespace()
            .last()
            .unwrap_or_default()
            .to_owned()
    }

    fn boot_id(&self) -> String {
        self.ask("cat /proc/sys/kernel/random/boot_id")
    }

    /// Makes requests to the guest's server until it answers. Returns how long that took.
    pub(super) fn served(&self, since: Instant) -> Duration {
        let answered = wait_for("the server inside", SOON, || {
            let out = self.host.curl(&["--max-time", "5", "http://web-1/"])?;
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            Ok(said.contains("this is web-1").then_some(()))
        });
        if let Err(e) = answered {
            panic!("{e}\n{}", self.logs());
        }
        since.elapsed()
    }

    /// Opens a tunnel to the echo, kills after so many bytes came back, and reads to the end.
    fn kill_in_echo(&self, bytes: usize, kill: impl FnOnce()) -> Instant {
        let mut tunnel = connect(self.host.proxy(), "web-1:7").unwrap();
        let mut far = tunnel.try_clone().unwrap();
        let sending = std::thread::spawn(move || {
            let piece: Vec<u8> = (0..1 << 16).map(pattern).collect();
            // Until the tunnel breaks.
            while far.write_all(&piece).is_ok() {}
        });
        let mut got = vec![0; bytes];
        tunnel.read_exact(&mut got).unwrap();
        kill();
        let killed = Instant::now();
        let mut buf = [0; 65536];
        while matches!(tunnel.read(&mut buf), Ok(1..)) {}
        println!("tunnel ended after {:?}", killed.elapsed());
        drop(tunnel);
        sending.join().unwrap();
        killed
    }
}

fn next(seed: &mut u64) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    usize::try_from(*seed >> 46).unwrap_or(0)
}

fn port_killed(kernel: Kernel) {
    let Some(setup) = setup(kernel, "", false) else {
        return;
    };
    let boot = setup.boot_id();
    assert_eq!(boot.len(), 36, "{boot}");
    // The task runs when the channel breaks, and until somebody dials it.
    let task = setup.order(
        "steps: [{id: long, script: {interpreter: /bin/sh, script: \"echo begun >> /var/lib/long; sync; nc -l -p 81 < /dev/null > /dev/null; echo finished\"}}]\n",
    );
    wait_for("the task", SOON, || {
        let list = setup.adit(&["task", "ls", "--goal", &task]).1;
        Ok(list.contains("started").then_some(()))
    })
    .unwrap();
    let mut seed = u64::from(std::process::id());
    println!("seed {seed}");
    let (mut took, mut back) = (Vec::new(), Vec::new());
    for _ in 0..6 {
        let killed = setup.kill_in_echo(1 + next(&mut seed), || setup.kill_port());
        took.push(setup.served(killed));
        // The agent must be connected too, although a task runs.
        setup.wait_agent();
        back.push(killed.elapsed());
        let list = setup.adit(&["task", "ls", "--goal", &task]).1;
        assert!(list.contains(" started "), "{list}\n{}", setup.logs());
    }
    let kernel = kernel.name();
    println!("{kernel}: served again after {took:?}, the agent back after {back:?}");
    connect(setup.host.proxy(), "web-1:81").unwrap();
    let list = setup.finish(&task);
    assert!(
        list.contains("done") && list.contains("finished"),
        "{list}\n{}",
        setup.logs()
    );
    assert_eq!(setup.ask("wc -l < /var/lib/long"), "1");
    assert_eq!(setup.boot_id(), boot, "the guest was rebooted");
    // The guest must have closed all streams of killed processes.
    let sockets = setup.ask("echo $(ls -l /proc/$(pidof adit-guest)/fd | grep -c socket:)");
    println!("sockets of the agent: {sockets}");
    assert!(sockets.parse::<u32>().is_ok_and(|n| n <= 8), "{sockets}");
}

fn reloaded(kernel: Kernel) {
    let Some(setup) = setup(kernel, "", false) else {
        return;
    };
    let boot = setup.boot_id();
    for _ in 0..3 {
        let before = setup.port_pid();
        let killed = setup.kill_in_echo(100_000, || {
            let (code, said) = setup.adit(&["vm", "reload", "web-1"]);
            assert_eq!(code, 0, "{said}\n{}", setup.logs());
            println!("{said}");
        });
        println!("served after {:?}", setup.served(killed));
        assert_ne!(setup.port_pid(), before);
    }
    setup.wait_agent();
    assert_eq!(setup.boot_id(), boot, "the guest was rebooted");
}

fn both_killed(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, "", false) else {
        return;
    };
    let boot = setup.boot_id();
    // One after the other: the new aditd has received the handover before the port process is killed.
    setup.host.kill();
    setup.host.launch().unwrap();
    setup.wait_agent();
    let killed = Instant::now();
    setup.kill_port();
    println!(
        "{}: served again after {:?}",
        kernel.name(),
        setup.served(killed)
    );
    setup.wait_agent();
    assert_eq!(setup.boot_id(), boot, "the guest was rebooted");
    // Both at once: nobody keeps the descriptors any more.
    let port = setup.port_pid();
    setup.host.kill();
    kill(Pid::from_raw(port), Signal::SIGKILL).unwrap();
    setup.host.launch().unwrap();
    let vm = wait_for("a VM that is named", SOON, || {
        let vm = setup.vm();
        Ok((vm["state"] == "power-cycle").then_some(vm))
    });
    let vm = vm.unwrap_or_else(|e| panic!("{e}\n{}", setup.logs()));
    let fault = vm["fault"].as_str().unwrap_or_default();
    println!("{fault}");
    assert!(
        fault.contains(&format!("VMM process {}", setup.guest.pid())),
        "{fault}"
    );
    let (_, said) = setup.adit(&["vm", "ls"]);
    assert!(said.contains("power-cycle"), "{said}");
    setup.guest.power_cycle().unwrap();
    setup.guest.wait_ready(BOOT).unwrap();
    setup.wait_agent();
    assert!(setup.vm()["fault"].is_null());
    setup.served(Instant::now());
}

/// Under systemd with its descriptor store, aditd and the port process may be killed at once. A restart keeps both the port
/// process and the store.
fn both_killed_and_held(kernel: Kernel) {
    let Some(bins) = bins() else { return };
    if let Some(why) = Systemd::missing() {
        return println!("skipped: {why}");
    }
    let host = Host::start_as_service(&bins, &["web-1"]).unwrap();
    let mut setup = boot(kernel, host, "", false);
    let boot = setup.boot_id();
    let held = |setup: &Setup| setup.host.service_property("NFileDescriptorStore").unwrap();
    for _ in 0..3 {
        let port = setup.port_pid();
        let mut killed = Instant::now();
        setup.host.kill_service().unwrap();
        let launched = killed.elapsed();
        killed += launched;
        let served = setup.served(killed);
        println!("aditd serves after {launched:?}, the VM {served:?} later");
        assert_ne!(setup.port_pid(), port);
        assert_eq!(held(&setup), "2");
    }
    setup.wait_agent();
    let port = setup.port_pid();
    setup.host.restart_service().unwrap();
    setup.served(Instant::now());
    assert_eq!((setup.port_pid(), held(&setup)), (port, "2".to_owned()));
    setup.wait_agent();
    assert_eq!(setup.boot_id(), boot, "the guest was rebooted");
    assert!(setup.vm()["fault"].is_null());
}

#[test]
fn with_a_descriptor_store_both_may_be_killed_at_once_6_1() {
    both_killed_and_held(Kernel::V6_1);
}

#[test]
fn a_killed_port_process_is_replaced_under_a_running_guest_6_1() {
    port_killed(Kernel::V6_1);
}

#[test]
fn a_killed_port_process_is_replaced_under_a_running_guest_6_12() {
    port_killed(Kernel::V6_12);
}

#[test]
fn a_reload_keeps_the_guest_running_6_1() {
    reloaded(Kernel::V6_1);
}

#[test]
fn a_reload_keeps_the_guest_running_6_12() {
    reloaded(Kernel::V6_12);
}

#[test]
fn without_a_descriptor_store_both_killed_at_once_need_a_power_cycle_6_1() {
    both_killed(Kernel::V6_1);
}
