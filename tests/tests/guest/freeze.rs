//! A guest's file systems stand still while somebody writes, and go on: asked, by themselves, and after whoever froze them was killed.

use std::time::{Duration, Instant};

use adit_tests::image::Kernel;
use adit_tests::process::wait_for;
use serde_json::Value;

use crate::{BOOT, Setup, setup};

/// Writes to the guest's disk, and says so each time. A hook says what it is told. Keys kill the process that freezes, or the agent with it, or also its guard.
const SCRIPT: &str = "mkdir -p /etc/adit-guest/freeze.d; \
    printf '#!/bin/sh\\necho HOOK $1 > /dev/ttyS0\\n' > /etc/adit-guest/freeze.d/10-test; \
    chmod 755 /etc/adit-guest/freeze.d /etc/adit-guest/freeze.d/10-test; \
    ( n=0; while :; do n=$((n+1)); echo $n > /var/lib/n && sync /var/lib/n && echo TICK > /dev/ttyS0; sleep 0.05; done ) & \
    ( while read -r key; do \
        case $key in f) kill -9 $(pidof adit-freezer);; b) kill -9 $(pgrep -o adit-guest) $(pidof adit-freezer);; a) kill -9 $(pidof adit-guest) $(pidof adit-freezer);; esac; \
    done < /dev/ttyS0 ) &\n";

fn ticks(setup: &Setup) -> usize {
    setup.guest.serial().matches("TICK").count()
}

fn go_on(setup: &Setup, why: &str) {
    let before = ticks(setup);
    let found = wait_for(why, BOOT, || Ok((ticks(setup) > before + 3).then_some(())));
    found.unwrap_or_else(|e| panic!("{e}\n{}\n{}", setup.guest.serial(), setup.host.log()));
}

fn freeze(setup: &Setup, lease: &str) -> Value {
    let args = ["vm", "freeze", "web-1", "--lease", lease, "-o", "json"];
    let (status, said) = setup.adit(&args);
    assert_eq!(status, 0, "{said}\n{}", setup.guest.serial());
    serde_json::from_str(&said).unwrap()
}

/// They do now. One write may have been under way.
fn stand_still(setup: &Setup) {
    std::thread::sleep(Duration::from_millis(300));
    let before = ticks(setup);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(ticks(setup), before, "{}", setup.guest.serial());
}

fn hooks(setup: &Setup) -> Vec<String> {
    let serial = setup.guest.serial();
    let said = serial.lines().filter(|line| line.contains("HOOK "));
    said.map(|line| line.trim().to_owned()).collect()
}

fn freezes(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, SCRIPT, false) else {
        return;
    };
    go_on(&setup, "somebody writes");
    // Asked.
    let frozen = freeze(&setup, "60s");
    assert_eq!(frozen["count"], 1);
    assert_eq!(frozen["file_systems"][0], "/var/lib");
    stand_still(&setup);
    // The host reaches the guest meanwhile, and hears how it is.
    let (status, shown) = setup.adit(&["vm", "freeze", "web-1", "--lease", "90s"]);
    assert!(status == 0 && shown.contains("/var/lib"), "{shown}");
    let (status, said) = setup.adit(&["vm", "thaw", "web-1"]);
    assert_eq!(status, 0, "{said}");
    go_on(&setup, "it was asked to");
    assert_eq!(hooks(&setup), ["HOOK freeze", "HOOK thaw"]);
    // By itself, and aditd is gone meanwhile.
    let begin = Instant::now();
    freeze(&setup, "3s");
    setup.host.kill();
    stand_still(&setup);
    go_on(&setup, "its time is over");
    assert!(
        begin.elapsed() >= Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
    setup.host.launch().unwrap();
    setup.wait_agent();
    // Whoever comes too late has saved what was written to.
    let (status, said) = setup.adit(&["vm", "thaw", "web-1"]);
    assert!(status == 1 && said.contains("its time was over"), "{said}");
    // Whoever froze is killed.
    freeze(&setup, "300s");
    stand_still(&setup);
    setup.guest.press(b"f\n").unwrap();
    go_on(&setup, "its guard thaws");
    // And the agent, at the same time: the next one could not even start.
    freeze(&setup, "300s");
    stand_still(&setup);
    setup.guest.press(b"b\n").unwrap();
    go_on(&setup, "its guard thaws");
    setup.wait_agent();
    // All that there are of it.
    freeze(&setup, "300s");
    stand_still(&setup);
    setup.guest.press(b"a\n").unwrap();
    go_on(&setup, "the next agent thaws");
    setup.wait_agent();
    // Once more, after all that.
    freeze(&setup, "4s");
    let (status, said) = setup.adit(&["vm", "thaw", "web-1", "-o", "json"]);
    assert_eq!(status, 0, "{said}");
    let thawed: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&thawed["count"], &thawed["left_ms"]),
        (&0.into(), &0.into())
    );
    go_on(&setup, "it was asked to");
    // What nobody may.
    for lease in ["0s", "1h"] {
        let (status, said) = setup.adit(&["vm", "freeze", "web-1", "--lease", lease]);
        assert_eq!(status, 2, "{said}");
    }
}

#[test]
fn file_systems_stand_still_and_go_on_6_1() {
    freezes(Kernel::V6_1);
}
