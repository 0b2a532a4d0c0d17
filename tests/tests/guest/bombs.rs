//! A task that takes all resources ends, and only this task; its report says why. The agent and the guest's services are not
//! affected. The same for too many tunnels. Needs a guest, because the host may lack cgroup 2 controllers and the right to lower an
//! OOM score.

use adit_tests::connect::connect;
use adit_tests::image::Kernel;

use crate::{Setup, run_goal, setup};

/// The attacker may not become more than `nobody`: processes that together need four thirds of the guest's memory, processes without
/// end, and a fork bomb.
const BOMBS: &str = "steps:
  - id: memory
    continue_on_error: true
    script: {interpreter: /bin/sh, run_as: nobody, script: \"for i in 1 2 3 4; do dd if=/dev/zero of=/dev/null bs=80M count=100000 & done; wait\\n\", timeout_s: 50}
  - id: processes
    continue_on_error: true
    script: {interpreter: /bin/sh, run_as: nobody, script: \"while :; do sleep 1000 & done\\n\", timeout_s: 50}
  - id: forks
    continue_on_error: true
    script: {interpreter: /bin/sh, run_as: nobody, script: \"f() { f & f & wait; }; f; sleep 1000\\n\", timeout_s: 3}
";
/// Prints which processes live, and the limits of the agent and of its tasks.
const LOOK: &str = "steps:
  - id: look
    script: {interpreter: /bin/sh, script: \"echo $(pidof adit-guest adit-testguest | tr ' ' '\\\\n' | sort -n) \
score $(cat /proc/$(pidof adit-guest)/oom_score_adj) $(cat /proc/self/oom_score_adj) limits $(ulimit -n) end\\n\"}
";

/// The line of a step in a list of tasks.
fn line<'l>(list: &'l str, step: &str) -> &'l str {
    let of_step = |l: &&str| l.contains(&format!(" {step} "));
    list.lines().rfind(of_step).unwrap_or_default()
}

fn look(setup: &Setup) -> String {
    let list = run_goal(setup, LOOK);
    let line = line(&list, "look");
    let from = line.find(" done ");
    let from = from.unwrap_or_else(|| panic!("{list}\n{}", setup.guest.serial()));
    // The width of columns depends on the longest state, so compare words.
    let mut words: Vec<&str> = line[from..].split_whitespace().collect();
    // State, exit status, and how long it took, which is no matter here.
    words.remove(2);
    words.join(" ")
}

fn bombs(kernel: Kernel) {
    let Some(setup) = setup(kernel, "", false) else {
        return;
    };
    let before = look(&setup);
    assert!(before.contains("score -500 0 limits 1024 end"), "{before}");
    let list = run_goal(&setup, BOMBS);
    for (step, why) in [
        (
            "memory",
            "it was killed because memory ran out, a task may have",
        ),
        ("processes", "it reached its limit of"),
        ("forks", "it reached its limit of"),
    ] {
        let line = line(&list, step);
        let ended = line.contains("failed") || line.contains("timed_out");
        assert!(
            ended && line.contains(why),
            "{step}: {list}\n{}",
            setup.guest.serial()
        );
    }
    // The same processes as before, and they still serve.
    assert_eq!(look(&setup), before, "{}", setup.guest.serial());
    assert!(setup.curl(&["http://web-1/"]).contains("this is web-1"));
}

/// More tunnels than the agent serves: each gets an answer at once, and a task still runs.
fn many_tunnels(kernel: Kernel) {
    let Some(setup) = setup(kernel, "", false) else {
        return;
    };
    let mut held = Vec::new();
    let mut refused = 0;
    for n in 0..540 {
        // To a server that uses one descriptor for each, and waits for a request.
        match connect(setup.host.proxy(), "web-1:80") {
            Ok(tunnel) => {
                assert_eq!(refused, 0, "tunnel {n}: room again");
                held.push(tunnel);
            }
            Err(e) => {
                let said = e.to_string();
                assert!(said.starts_with("HTTP/1.1 503"), "tunnel {n}: {said}");
                refused += 1;
            }
        }
    }
    assert_eq!((held.len(), refused), (512, 28), "{}", setup.host.log());
    let list = run_goal(
        &setup,
        "steps: [{id: beside, script: {interpreter: /bin/sh, script: \"echo ran $(ulimit -n)\"}}]\n",
    );
    assert!(
        list.contains("ran 1024"),
        "{list}\n{}",
        setup.guest.serial()
    );
}

#[test]
fn r114_bombs_end_with_their_task_6_1() {
    bombs(Kernel::V6_1);
}

#[test]
fn r114_bombs_end_with_their_task_6_12() {
    bombs(Kernel::V6_12);
}

#[test]
fn tunnels_that_are_too_many_get_503_6_1() {
    many_tunnels(Kernel::V6_1);
}
