//! What ends a guest's session and what begins the next: `reboot` in the guest, QEMU killed and started again.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;

use adit_tests::connect::connect;
use adit_tests::image::Kernel;

use crate::{BOOT, Setup, echo, run_goal, setup};

/// Reads until the tunnel ends, however it ends; a silence is a hang and fails.
fn must_end(tunnel: &mut TcpStream, why: &str) {
    let mut buf = [0; 4096];
    loop {
        match tunnel.read(&mut buf) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&e.kind()) => {
                panic!("{why}: the tunnel hangs")
            }
            Err(_) => return,
        }
    }
}

/// Everything works again in the new session.
fn whole_again(setup: &mut Setup) {
    setup.guest.wait_ready(BOOT).unwrap();
    setup.wait_agent();
    echo(&setup.host, "web-1:7", 200_000);
    echo(&setup.host, "vsock-5000.web-1:5000", 200_000);
    let list = run_goal(
        setup,
        "steps: [{id: alive, script: {interpreter: /bin/sh, script: \"cat /proc/sys/kernel/random/boot_id\"}}]\n",
    );
    assert!(list.contains("done"), "{list}");
}

fn restarts(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, "") else {
        return;
    };
    let tunnels = |setup: &Setup| {
        ["web-1:7", "vsock-5000.web-1:5000"].map(|to| connect(setup.host.proxy(), to).unwrap())
    };
    // By itself: `-f` syncs nothing and tells nobody.
    let open = tunnels(&setup);
    let goal = "steps: [{id: reboot, script: {interpreter: /bin/sh, script: \"reboot -f\"}}]\n";
    std::fs::write(setup.host.dir().join("reboot.yaml"), goal).unwrap();
    let args = [
        "goal",
        "apply",
        "reboot.yaml",
        "--sign",
        "fleet.key",
        "--to",
        "web-1",
    ];
    let (code, said) = setup.adit(&args);
    assert_eq!(code, 0, "{said}");
    for mut tunnel in open {
        must_end(&mut tunnel, "guest rebooted");
    }
    whole_again(&mut setup);
    let (_, list) = setup.adit(&["task", "ls"]);
    let reboot = list
        .lines()
        .find(|l| l.contains(" reboot "))
        .unwrap_or_default();
    assert!(
        reboot.contains("interrupted"),
        "the step that took the guest down: {list}"
    );

    // By a power cut.
    let open = tunnels(&setup);
    setup.guest.kill().unwrap();
    for mut tunnel in open {
        must_end(&mut tunnel, "guest killed");
    }
    let refused = setup.curl(&["http://web-1/"]);
    assert!(
        refused.starts_with("HTTP/1.1 503"),
        "no guest is there: {refused}"
    );
    setup.guest.power_cycle().unwrap();
    whole_again(&mut setup);
}

#[test]
fn restarts_6_1() {
    restarts(Kernel::V6_1);
}

#[test]
fn restarts_6_12() {
    restarts(Kernel::V6_12);
}
