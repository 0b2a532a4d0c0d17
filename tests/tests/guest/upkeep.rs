//! An agent that is kept running: its disk fills up and is cleared, its configuration is changed and reloaded.

use adit_tests::image::Kernel;
use adit_tests::process::wait_for;

use crate::clock::{is_done, step};
use crate::{BOOT, Setup, run_goal, setup};

/// A key on the serial line makes room on the state disk.
const SCRIPT: &str = "( read -r key < /dev/ttyS0; rm /var/lib/filler ) &\n";

fn kept_running(kernel: Kernel) {
    let Some(setup) = setup(kernel, SCRIPT, false) else {
        return;
    };
    full_disk(&setup);
    reload(&setup);
    policy(&setup);
}

/// A task that fills the disk has its result; the next is not started, and says why; with room again, one runs.
fn full_disk(setup: &Setup) {
    let fill = "cat /dev/zero > /var/lib/filler; echo filled";
    let list = run_goal(setup, &step("fill", fill));
    assert!(is_done(&list, "fill"), "{list}\n{}", setup.guest.serial());
    let list = run_goal(setup, &step("refused", "touch /run/ran"));
    let why = "guest disk full: journal cannot be written";
    assert!(list.contains(why), "{list}\n{}", setup.guest.serial());
    setup.guest.press(b"\n").unwrap();
    let mut nth = 0;
    let ran = wait_for("a task runs again", BOOT, || {
        nth += 1;
        let id = format!("after-{nth}");
        let list = run_goal(setup, &step(&id, "test ! -e /run/ran"));
        Ok(is_done(&list, &id).then_some(()))
    });
    ran.unwrap_or_else(|e| panic!("{e}\n{}", setup.guest.serial()));
}

/// The init script's reload closes a port; the agent, and the task that asked for it, go on.
fn reload(setup: &Setup) {
    assert!(setup.curl(&["http://web-1/"]).contains("this is web-1"));
    let text = "sed -i 's/^allow_ports = .*/allow_ports = [7]/' /etc/adit-guest/adit-guest.toml; \
                /etc/init.d/S50adit-guest reload";
    let list = run_goal(setup, &step("reload", text));
    assert!(is_done(&list, "reload"), "{list}\n{}", setup.guest.serial());
    let closed = wait_for("the port is closed", BOOT, || {
        let said = setup.curl(&["http://web-1/"]);
        Ok(said.contains("allow_ports").then_some(()))
    });
    closed.unwrap_or_else(|e| panic!("{e}\n{}", setup.guest.serial()));
    let list = run_goal(setup, &step("alive", "true"));
    assert!(is_done(&list, "alive"), "{list}\n{}", setup.guest.serial());
    assert!(!list.contains("interrupted"), "{list}");
}

/// The guest's owner writes a policy: what it forbids ends with its line, in the lists of the host too.
fn policy(setup: &Setup) {
    let text = "cat > /etc/adit-guest/policy.toml <<E\\ndefault = 'deny'\\n[[step]]\\nkinds = ['file']\\nusers = ['root']\\n\
                roots = ['/srv']\\nE\\nadit-guest policy check && /etc/init.d/S50adit-guest reload";
    let list = run_goal(setup, &step("policy", text));
    assert!(is_done(&list, "policy"), "{list}\n{}", setup.guest.serial());
    let closed = wait_for("the policy is in force", BOOT, || {
        let said = setup.curl(&["-i", "http://web-1/"]);
        Ok(said
            .contains("/etc/adit-guest/policy.toml:1: no [[service]] names `tcp:80`")
            .then_some(()))
    });
    closed.unwrap_or_else(|e| panic!("{e}\n{}", setup.guest.serial()));
    let list = run_goal(setup, &step("vetoed", "touch /run/vetoed"));
    let why = "policy: /etc/adit-guest/policy.toml:1: no [[step]] allows the kind `script`";
    assert!(list.contains(why), "{list}\n{}", setup.guest.serial());
    let (_, json) = setup.adit(&["task", "ls", "-o", "json"]);
    assert!(json.contains("\"refusal\":\"policy\""), "{json}");
}

#[test]
fn upkeep_6_1() {
    kept_running(Kernel::V6_1);
}

#[test]
fn upkeep_6_12() {
    kept_running(Kernel::V6_12);
}
