//! The end of a guest's session and the start of the next: `reboot` in the guest, and QEMU killed and started again.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;

use adit_tests::connect::connect;
use adit_tests::image::Kernel;
use adit_tests::process::wait_for;

use crate::{BOOT, Setup, echo, run_goal, setup};

/// Reads until the tunnel ends in any way. A silence means that it hangs, and fails.
pub fn must_end(tunnel: &mut TcpStream, why: &str) {
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

fn tunnels(setup: &Setup) -> [TcpStream; 2] {
    ["web-1:7", "vsock-5000.web-1:5000"].map(|to| connect(setup.host.proxy(), to).unwrap())
}

/// After a boot: waits until the guest is ready, and checks that everything works.
fn booted_again(setup: &mut Setup) {
    setup.guest.wait_ready(BOOT).unwrap();
    whole_again(setup);
}

/// Checks that everything works in the new session.
pub fn whole_again(setup: &Setup) {
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
    let Some(mut setup) = setup(kernel, "", true) else {
        return;
    };
    // By itself: `-f` syncs nothing and notifies nobody.
    let open = tunnels(&setup);
    setup.order("steps: [{id: reboot, script: {interpreter: /bin/sh, script: \"echo it begins > /dev/console; reboot -f\"}}]\n");
    for mut tunnel in open {
        must_end(&mut tunnel, "guest rebooted");
    }
    booted_again(&mut setup);
    let (_, list) = setup.adit(&["task", "ls"]);
    let reboot = list
        .lines()
        .find(|l| l.contains(" reboot "))
        .unwrap_or_default();
    assert!(
        reboot.contains("interrupted"),
        "the step that took the guest down: {list}"
    );
    // It is not handed out again, and so there is no loop.
    let begun = setup.guest.serial().matches("it begins").count();
    assert_eq!(begun, 1, "{}", setup.guest.serial());

    // By kexec: the device is not reset before the new kernel finds it.
    let open = tunnels(&setup);
    setup.order("steps: [{id: kexec, script: {interpreter: /bin/sh, script: \"adit-testguest kexec /boot/vmlinuz /boot/initrd\"}}]\n");
    for mut tunnel in open {
        must_end(&mut tunnel, "kexec");
    }
    booted_again(&mut setup);

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
    booted_again(&mut setup);
}

/// Runs a step that removes the device for a while: tunnels end, the agent dials again, and the step's result arrives.
fn device_goes(setup: &Setup, what: &str, script: &str, then: impl FnOnce()) {
    let open = tunnels(setup);
    let goal = format!(
        "steps: [{{id: {what}, script: {{interpreter: /bin/sh, script: {}}}}}]\n",
        serde_json::Value::from(script)
    );
    let goal = setup.order(&goal);
    // While no driver is known, the VM may be paused, so its streams are held until a driver is there again.
    then();
    for mut tunnel in open {
        must_end(&mut tunnel, what);
    }
    let (code, said) = setup.adit(&["task", "watch", "--goal", &goal, "--timeout", "60s"]);
    let (_, list) = setup.adit(&["task", "ls"]);
    let line = list.lines().find(|l| l.contains(&format!(" {what} ")));
    assert!(
        code == 0 && line.is_some_and(|l| l.contains("done")),
        "{what}: {said}\n{list}\n{}\n{}",
        setup.guest.serial(),
        setup.host.log()
    );
    whole_again(setup);
}

/// The guest's driver is unbound from the device and bound again; then the guest sleeps and wakes up.
fn drivers(kernel: Kernel) {
    let Some(setup) = setup(kernel, "", true) else {
        return;
    };
    let rebind = "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport
dev=$(basename virtio*)
for n in 1 2 3; do echo $dev > unbind; echo $dev > bind; done";
    device_goes(&setup, "driver-reset", rebind, || {});
    let suspend = "set -e
echo enabled > /sys/class/tty/ttyS0/power/wakeup
exec 3< /dev/ttyS0
echo freeze > /sys/power/state
echo AWAKE > /dev/console";
    device_goes(&setup, "suspend", suspend, || {
        // A key that comes before the guest sleeps does not wake it, so send more.
        wait_for("guest wakes", BOOT, || {
            setup.guest.press(b"\n")?;
            Ok(setup.guest.serial().contains("AWAKE").then_some(()))
        })
        .unwrap();
    });
}

#[test]
fn streams_end_and_the_agent_redials_when_the_driver_restarts_6_1() {
    drivers(Kernel::V6_1);
}

#[test]
fn streams_end_and_the_agent_redials_when_the_driver_restarts_6_12() {
    drivers(Kernel::V6_12);
}

#[test]
fn r103_after_reboot_kexec_and_power_cut_everything_works_6_1() {
    restarts(Kernel::V6_1);
}

#[test]
fn r103_after_reboot_kexec_and_power_cut_everything_works_6_12() {
    restarts(Kernel::V6_12);
}
