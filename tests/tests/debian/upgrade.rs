//! Agents that come over the channel, under the init systems that people have: one that works stays, one that fails goes, however
//! it fails.

use std::fs;
use std::path::PathBuf;

use adit_tests::process::wait_for;

use super::unit::Booted;
use super::{BOOT, full};

/// Both kinds. The guest trusts `fleet.key` for goals; afterwards it trusts `agents.key` for agents too.
pub fn works_or_goes(booted: &Booted) {
    assert_eq!(
        booted
            .adit(&["key", "new", "agents.key", "--role", "agent"])
            .0,
        0
    );
    booted.trust("agents.key.pub");
    let journal = || booted.ssh("stat -c %i /var/lib/adit-guest/journal.redb");
    let (before, image) = (journal(), sum(booted));

    // Ordered while a task runs, whose result must not be lost.
    let next = program(booted, "adit-guest", "another build");
    let goal = "steps: [{id: long, script: {interpreter: /bin/sh, script: \"echo ran >> /root/ran; sleep 3; echo to its end\"}}]";
    fs::write(booted.host.dir().join("long.yaml"), goal).unwrap();
    let apply = [
        "goal",
        "apply",
        "long.yaml",
        "--sign",
        "fleet.key",
        "--to",
        "web-1",
    ];
    let (code, said) = booted.adit(&apply);
    assert_eq!(code, 0, "{said}");
    wait_for("the task begins", BOOT, || {
        Ok((booted.last_task()["state"] == "started").then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}: {}\n{}", booted.last_task(), booted.log()));
    let (code, said) = give(booted, &next);
    assert_eq!(code, 0, "{said}\n{}", booted.log());
    wait_for("the task's result", BOOT, || {
        Ok((booted.last_task()["state"] == "done").then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}: {}\n{}", booted.last_task(), booted.log()));
    // Its journal is that of the agent before, and nothing ran twice.
    assert_eq!(journal(), before);
    assert_eq!(booted.ssh("cat /root/ran"), "ran\n");
    runs_beside(booted, "");

    // The last is the status at which a unit lets the agent of an image be.
    let ends = ["abort", "1", "78"];
    for ends in if full() { &ends[..] } else { &ends[2..] } {
        let bad = program(booted, "adit-badagent", &format!("ends={ends}"));
        let (code, said) = give(booted, &bad);
        assert!(
            code == 1 && said.contains("agent-taken-back") && said.contains("3 times"),
            "{ends}: {code} {said}\n{}",
            booted.log()
        );
        runs_beside(booted, "agent-taken-back");
        let (_, state, said) = booted.task("deploy", "echo still here");
        assert_eq!((state.as_str(), said.as_str()), ("done", "still here\n"));
    }
    assert_eq!((journal(), sum(booted)), (before, image));
}

/// Of the image's program, which nobody writes.
fn sum(booted: &Booted) -> String {
    booted.ssh("sha256sum /usr/sbin/adit-guest")
}

/// The agent is the one that came over the channel and works, also by its own word.
fn runs_beside(booted: &Booted, fault: &str) {
    let (_, shown) = booted.adit(&["vm", "show", "web-1"]);
    assert!(
        shown.contains("came over the channel") && shown.contains(fault),
        "{shown}\n{}",
        booted.log()
    );
    assert_eq!(shown.contains("\nfault"), !fault.is_empty(), "{shown}");
    let running = booted.ssh("readlink /proc/$(pidof adit-guest)/exe");
    assert!(
        running.starts_with("/var/lib/adit-guest/agent/"),
        "{running}"
    );
}

/// One of our static programs, with a last line of its own.
fn program(booted: &Booted, name: &str, line: &str) -> PathBuf {
    let from = adit_tests::guest_bin(name);
    let mut content = fs::read(&from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    content.extend_from_slice(format!("\n{line}").as_bytes());
    let to = booted.host.dir().join(line.replace(' ', "-"));
    fs::write(&to, content).unwrap();
    fs::set_permissions(&to, fs::metadata(from).unwrap().permissions()).unwrap();
    to
}

fn give(booted: &Booted, program: &std::path::Path) -> (i32, String) {
    let program = program.display().to_string();
    let order = ["agent", "upgrade", "--to", "web-1", "--sign", "agents.key"];
    booted.adit(&[&order[..], &["--package", &program]].concat())
}
