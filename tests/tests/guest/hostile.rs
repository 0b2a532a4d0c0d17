//! A guest whose root drives the socket device by hand. After each case the same port process serves the same guest
//! again, an honest neighbour never noticed, and nobody has grown.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use adit_tests::guest::{Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};

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
    let who = Identity {
        name,
        vhost_socket: &host.vhost_socket(name),
        agent: None,
        trust: None,
        script,
        boot_files: false,
    };
    Guest::boot(image, &who, dir).unwrap()
}

#[test]
fn hostile_guests_hurt_nobody_but_themselves() {
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
        let [aditd, own, other] = [u64::from(host.pid()), ports[1], ports[0]].map(anonymous_kib);
        println!("{verdict} (aditd {aditd} KiB, its port {own} KiB, the neighbour's {other} KiB)");
        assert!(verdict.contains("HOSTILE-OK"), "{serial}\n{}", host.log());
        assert!(aditd < ADITD_MAX_KIB && own.max(other) < PORT_MAX_KIB);
        echo(&host, "vsock-5000.web-1:5000", 100_000);
        assert_eq!(ports, ["web-1", "bad"].map(|vm| port_pid(&host, vm)));
    }
}
