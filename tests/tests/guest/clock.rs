//! A guest whose clock is wrong: an early goal is held, `adit vm show` says why, and a guest may take the host's time.

use adit_tests::guest::{Carried, Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use serde_json::Value;

use crate::{BOOT, Setup, run_goal, setup};

const MINUTE_MS: i64 = 60_000;
const HOUR_MS: i64 = 60 * MINUTE_MS;

/// A key on the serial line sets the clock an hour ahead.
const SCRIPT: &str = "( read -r key < /dev/ttyS0; date -s @$(( $(date +%s) + 3600 )) ) &\n";

pub fn step(id: &str, text: &str) -> String {
    format!("steps: [{{id: {id}, script: {{interpreter: /bin/sh, script: \"{text}\"}}}}]\n")
}

/// Waits until the VM's status is as wanted, and returns it.
fn shown(setup: &Setup, what: &str, ok: impl Fn(&Value) -> bool) -> Value {
    let show = || setup.adit(&["-o", "json", "vm", "show", "web-1"]).1;
    let found = wait_for(what, BOOT, || {
        let vm: Value = serde_json::from_str(&show())?;
        Ok(ok(&vm).then_some(vm))
    });
    found.unwrap_or_else(|e| {
        let (serial, log) = (setup.guest.serial(), setup.host.log());
        panic!("{e}\n{}\n{serial}\n{log}", show())
    })
}

/// Waits until the clock is ahead by this time, to the minute: an emulated guest sends and receives late.
fn shown_ahead(setup: &Setup, ms: i64) -> Value {
    shown(setup, &format!("clock ahead by {ms} ms"), |vm| {
        let told = vm["clock_ahead_ms"].as_i64();
        told.is_some_and(|told| (told - ms).abs() < MINUTE_MS)
    })
}

pub fn is_done(list: &str, step: &str) -> bool {
    let line = list.lines().find(|l| l.contains(&format!(" {step} ")));
    line.is_some_and(|l| l.contains("done"))
}

fn off(kernel: Kernel) {
    let Some(setup) = setup(kernel, SCRIPT, false) else {
        return;
    };
    shown_ahead(&setup, 0);
    let list = run_goal(&setup, &step("slow", "date -s @$(( $(date +%s) - 3600 ))"));
    assert!(is_done(&list, "slow"), "{list}");
    // Reported with the next pull, and again with the held task.
    shown_ahead(&setup, -HOUR_MS);
    setup.order(&step("held", "date"));
    shown(&setup, "a task is held", |vm| vm["holding"].is_object());
    let (_, list) = setup.adit(&["task", "ls"]);
    assert!(list.contains("leased"), "{list}");
    // When somebody corrects the clock, the held task starts at once, not an hour later.
    setup.guest.press(b"\n").unwrap();
    setup.adit(&["task", "watch", "--timeout", "60s"]);
    let (_, list) = setup.adit(&["task", "ls"]);
    assert!(is_done(&list, "held"), "{list}\n{}", setup.guest.serial());
    let vm = shown_ahead(&setup, 0);
    assert!(vm["holding"].is_null(), "{vm}");
    // A guest that takes the host's time. Its clock is a day ahead, behind the end of every goal.
    let text = "sed -i '1i clock = \\\"host\\\"' /etc/adit-guest/adit-guest.toml; \
                date -s @$(( $(date +%s) + 86400 )); kill -9 $(pidof adit-guest)";
    let list = run_goal(&setup, &step("ahead", text));
    assert!(list.contains("interrupted"), "{list}");
    let list = run_goal(&setup, &step("taken", "date"));
    assert!(is_done(&list, "taken"), "{list}\n{}", setup.guest.serial());
    shown_ahead(&setup, 0);
}

#[test]
fn an_early_goal_is_held_until_the_clock_is_right_6_1() {
    off(Kernel::V6_1);
}

#[test]
fn an_early_goal_is_held_until_the_clock_is_right_6_12() {
    off(Kernel::V6_12);
}

/// Of the guests of these tests: one whose kernel has given up its only timer, as a busy host makes it do now and then, would look well and
/// run nothing to its end. It boots again until it has one.
#[test]
fn a_guest_without_a_timer_boots_again() {
    let Some(bins) = crate::bins() else { return };
    let host = Host::start(&bins, &["web-1"]).unwrap();
    host.wait_port("web-1").unwrap();
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let socket = host.vhost_socket("web-1");
    let who = Identity {
        name: "web-1",
        vhost_socket: &socket,
        agent: None,
        trust: None,
        script: "",
        boot_files: false,
    };
    // A card is the one thing that a guest's command line gets.
    let never = Carried::CommandLine("none nolapic_timer");
    let mut guest = Guest::boot_by_card(&image, &who, never, &host.dir().join("web-1")).unwrap();
    guest
        .wait_serial("it boots again", BOOT, |log| {
            log.matches("ADIT-NO-TIMER").count() >= 2
        })
        .unwrap();
    assert!(!guest.serial().contains("ADIT-READY"));
}
