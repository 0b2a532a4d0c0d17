//! Guests whose root drives the socket device by hand. After each case the same port process must serve the same guest again, a
//! well-behaved neighbour must not be affected, and no process may have grown.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use adit_tests::connect::connect;
use adit_tests::guest::{Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;

use crate::{BOOT, bins, echo};

const CASE: Duration = Duration::from_secs(120);
/// Most anonymous memory under any attack, KiB.
const ADITD_MAX_KIB: u64 = 32 << 10;
const PORT_MAX_KIB: u64 = 8 << 10;

fn anonymous_kib(pid: u64) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn port_pid(host: &Host, vm: &str) -> u64 {
    let out = host.adit(&["vm", "show", vm, "-o", "json"]).unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    shown["port_pid"].as_u64().unwrap()
}

fn boot(image: &Image, host: &Host, name: &str, dir: &Path, script: &str) -> Guest {
    boot_with(image, host, name, dir, script, None, false)
}

/// The same; with an agent, and a ring.
fn boot_with(
    image: &Image,
    host: &Host,
    name: &str,
    dir: &Path,
    script: &str,
    agent: Option<&Path>,
    ring: bool,
) -> Guest {
    let server = host.ivshmem_socket(name);
    let ring = ring.then_some(adit_tests::guest::Ring {
        socket: &server,
        iommu: false,
        parameters: "",
    });
    let who = Identity {
        name,
        vhost_socket: &host.vhost_socket(name),
        agent,
        trust: None,
        script,
        boot_files: false,
    };
    Guest::boot_with(image, &who, ring, dir).unwrap()
}

#[test]
fn hostile_guests_harm_only_themselves() {
    let Some(bins) = bins() else { return };
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let host = Host::start(&bins, &["web-1", "bad"]).unwrap();
    for vm in ["web-1", "bad"] {
        host.wait_port(vm).unwrap();
    }
    let mut neighbour = boot(&image, &host, "web-1", &host.dir().join("web-1"), "");
    neighbour.wait_ready(BOOT).unwrap();
    let list = Command::new(adit_tests::guest_bin("adit-hostile"))
        .arg("list")
        .output()
        .unwrap();
    let cases = String::from_utf8(list.stdout).unwrap();
    assert!(cases.lines().count() >= 12, "{cases}");
    let ports = ["web-1", "bad"].map(|vm| port_pid(&host, vm));
    for case in cases.lines() {
        let script = format!("adit-hostile {case} > /dev/console 2>&1 &\n");
        let mut guest = boot(&image, &host, "bad", &host.dir().join(case), &script);
        guest
            .wait_serial(case, CASE, |log| log.contains("HOSTILE-"))
            .unwrap_or_else(|e| panic!("{e:#}\n{}", host.log()));
        let serial = guest.serial();
        let verdict = serial.lines().find(|l| l.contains("HOSTILE-")).unwrap();
        let [aditd, own, other] = [u64::from(host.worker()), ports[1], ports[0]].map(anonymous_kib);
        println!("{verdict} (aditd {aditd} KiB, its port {own} KiB, the neighbour's {other} KiB)");
        assert!(verdict.contains("HOSTILE-OK"), "{serial}\n{}", host.log());
        assert!(aditd < ADITD_MAX_KIB && own.max(other) < PORT_MAX_KIB);
        echo(&host, "vsock-5000.web-1:5000", 100_000);
        assert_eq!(ports, ["web-1", "bad"].map(|vm| port_pid(&host, vm)));
    }
}

/// R1 to R8, R10, R15 and R16 from inside a guest that overwrites the region of its ring (`adit_bare::attacks`); R11, R14 and
/// R17 from one that does not help its host; and one that tries the doorbells of others. A well-behaved neighbour has a ring too.
/// A tunnel over it must survive everything, because the two share nothing.
#[test]
fn r01_to_r17_guests_that_overwrite_their_ring_harm_only_themselves() {
    let Some(bins) = bins() else { return };
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let host = Host::start_with(&bins, &["web-1", "bad"], crate::RING).unwrap();
    for vm in ["web-1", "bad"] {
        host.wait_port(vm).unwrap();
    }
    let agent = adit_tests::guest_bin("adit-guest");
    let dir = host.dir().join("web-1");
    let mut neighbour = boot_with(&image, &host, "web-1", &dir, "", Some(&agent), true);
    neighbour.wait_ready(BOOT).unwrap();
    let carrier = |vm: &str| {
        let out = host.adit(&["vm", "show", vm, "-o", "json"]).unwrap();
        let shown: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        shown["carrier"].clone()
    };
    wait_for("the neighbour's ring", CASE, || {
        Ok((carrier("web-1")["kind"] == "ring").then_some(()))
    })
    .unwrap();
    let mut tunnel = connect(host.proxy(), "web-1:7").unwrap();
    let list = Command::new(adit_tests::guest_bin("adit-testguest"))
        .args(["ring-attack", "list"])
        .output()
        .unwrap();
    let cases = String::from_utf8(list.stdout).unwrap();
    assert!(cases.lines().count() >= 6, "{cases}");
    let mut mutes = 0;
    let ports = ["web-1", "bad"].map(|vm| port_pid(&host, vm));
    for case in cases.lines() {
        let script = format!("adit-testguest ring-attack {case} > /dev/console 2>&1 &\n");
        let dir = host.dir().join(case);
        let mut guest = boot_with(&image, &host, "bad", &dir, &script, None, true);
        let mut said = |text: &[&str]| {
            guest
                .wait_serial(case, CASE, |log| {
                    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
                    text.iter().any(|t| whole.contains(t))
                })
                .unwrap_or_else(|e| panic!("{e:#}\n{}\n{}", host.log(), host.port_log("bad")));
            guest.serial()
        };
        let told = said(&["RING-MUTE", "HOSTILE-"])
            .contains("RING-MUTE")
            .then(|| dialled(&host, ports[1]));
        let serial = said(&["HOSTILE-"]);
        if let Some((answer, woken)) = told {
            let typed = ["HTTP/1.1 504", "connection_timeout"].map(|t| answer.contains(t));
            let log = host.port_log("bad");
            assert_eq!(typed, [true; 2], "{answer}\n{serial}\n{log}");
            assert!(woken < 100, "it woke up {woken} times");
            mutes += 1;
        }
        let verdict = serial.lines().find(|l| l.contains("HOSTILE-")).unwrap();
        let [aditd, own, other] = [u64::from(host.worker()), ports[1], ports[0]].map(anonymous_kib);
        println!("{verdict} (aditd {aditd} KiB, its port {own} KiB, the neighbour's {other} KiB)");
        assert!(
            verdict.contains("HOSTILE-OK"),
            "{serial}\n{}",
            host.port_log("bad")
        );
        assert!(aditd < ADITD_MAX_KIB && own.max(other) < PORT_MAX_KIB);
        // The neighbour's tunnel from before all of this, and a new dial.
        tunnel.write_all(b"still").unwrap();
        tunnel.read_exact(&mut [0; 5]).unwrap();
        echo(&host, "web-1:7", 100_000);
        assert_eq!(carrier("web-1")["kind"], "ring");
        assert_eq!(ports, ["web-1", "bad"].map(|vm| port_pid(&host, vm)));
    }
    assert_eq!(mutes, 1, "the guest that reads nothing was not tried");
}

/// The answer to a client that dials the guest over HTTP, and how often its port process woke up meanwhile.
fn dialled(host: &Host, port: u64) -> (String, u64) {
    let switches = || {
        let status = std::fs::read_to_string(format!("/proc/{port}/status")).unwrap();
        let lines = status.lines().filter(|l| l.contains("ctxt_switches:"));
        let count = |l: &str| l.split_whitespace().nth(1)?.parse::<u64>().ok();
        lines.filter_map(count).sum::<u64>()
    };
    let before = switches();
    let out = host.curl(&["http://bad/"]).unwrap();
    let answer = String::from_utf8_lossy(&out.stdout).into_owned();
    (answer, switches() - before)
}
