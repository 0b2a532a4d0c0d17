//! aditd's two processes with real port processes and a software guest: whichever of them is killed, tunnels go on byte for byte.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

mod echo;

use std::path::PathBuf;
use std::time::Duration;

use adit_tests::host::Host;
use adit_tests::process::{output, wait_for};
use adit_tests::systemd::Systemd;
use echo::{Echo, Tunnels, connect};

const SOON: Duration = Duration::from_secs(30);

fn bins() -> Option<PathBuf> {
    let bins = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from);
    if bins.is_none() {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
    }
    bins
}

/// Waits until the proxy makes new tunnels.
fn serves(host: &Host) {
    let answered = wait_for("a new tunnel", SOON, || Ok(connect(host.proxy())));
    answered.unwrap_or_else(|e| panic!("{e:#}\n{}\n{}", host.log(), host.port_log("a")));
}

fn is_two(host: &Host) -> bool {
    let two = host.worker() != host.pid();
    if !two {
        println!("skipped: aditd is one process here: {}", host.log());
    }
    two
}

#[test]
fn a_hundred_tunnels_go_on_byte_for_byte_whichever_process_of_aditd_is_killed() {
    let Some(bins) = bins() else { return };
    let mut host = Host::start(&bins, &["a"]).unwrap();
    host.wait_port("a").unwrap();
    if !is_two(&host) {
        return;
    }
    let _guest = Echo::boot(&host.vhost_socket("a"));
    serves(&host);
    let tunnels = Tunnels::open(host.proxy());
    let proxy = host.proxy();

    let first = host.worker();
    host.kill_worker();
    let second = host.wait_worker(first).unwrap();
    serves(&host);
    tunnels.all_go_on();

    // The worker serves meanwhile, and the next monitor finds it: the proxy's port is the same, which nobody could bind anew.
    host.kill_monitor();
    serves(&host);
    host.launch().unwrap();
    assert_eq!((host.worker(), host.proxy()), (second, proxy));
    serves(&host);
    tunnels.all_go_on();

    // A worker that its monitor did not start is replaced as well.
    host.kill_worker();
    host.wait_worker(second).unwrap();
    serves(&host);
    assert_eq!(host.proxy(), proxy);

    host.kill();
    tunnels.all_go_on();
    host.launch().unwrap();
    serves(&host);
    tunnels.end();
}

#[test]
fn a_service_survives_the_end_of_each_of_its_processes() {
    let Some(bins) = bins() else { return };
    if let Some(why) = Systemd::missing() {
        println!("skipped: {why}");
        return;
    }
    let mut host = Host::start_as_service(&bins, &["a"]).unwrap();
    host.wait_port("a").unwrap();
    let _guest = Echo::boot(&host.vhost_socket("a"));
    serves(&host);
    let tunnels = Tunnels::open(host.proxy());
    let main = |host: &Host| host.service_property("MainPID").unwrap();

    let (monitor, first) = (main(&host), host.worker());
    host.kill_in_service(first).unwrap();
    let second = host.wait_worker(first).unwrap();
    serves(&host);
    assert_eq!(main(&host), monitor, "the monitor goes on");
    tunnels.all_go_on();

    host.kill_in_service(monitor.parse().unwrap()).unwrap();
    wait_for("another monitor", SOON, || {
        let now = main(&host);
        let state = host.service_property("ActiveState")?;
        // It says that it is ready once it has found the worker.
        let is_ready = state == "active" && now != monitor && now != "0";
        Ok(is_ready.then_some(()))
    })
    .unwrap();
    serves(&host);
    assert_eq!(host.worker(), second, "the worker goes on: {}", host.log());
    tunnels.all_go_on();

    // In order, and both.
    host.restart_service().unwrap();
    host.wait_worker(second).unwrap();
    serves(&host);
    tunnels.end();
}

#[test]
fn the_unit_loads_and_says_what_it_is_exposed_to() {
    if Systemd::missing().is_some() {
        println!("skipped: no systemd");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let unit = adit_tests::root().join("host-proxy/dist/aditd.service");
    let text = std::fs::read_to_string(unit).unwrap();
    // A program that is there: the unit's own is not installed where tests run.
    let text = text.replace("/usr/bin/aditd", "/bin/true");
    let path = dir.path().join("aditd.service");
    std::fs::write(&path, text).unwrap();
    let mut verify = std::process::Command::new("systemd-analyze");
    let said = output(verify.args(["verify", "--man=no"]).arg(&path)).unwrap();
    // A key that this systemd does not know is a warning, and the unit is loaded without it.
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.contains("aditd.service"), "{said}");
    let mut security = std::process::Command::new("systemd-analyze");
    security.args(["security", "--offline=true", "--no-pager", "--threshold=40"]);
    let said = output(security.arg(&path)).unwrap();
    println!("{}", String::from_utf8_lossy(&said.stdout));
}
