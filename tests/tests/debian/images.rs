//! Other ways for the agent to come into an image, each booted once: by cloud-init, and by its package when the image is made.

use std::path::{Path, PathBuf};
use std::process::Command;

use adit_tests::debian::{self, Debian};
use adit_tests::guest::Guest;
use adit_tests::guest_bin;
use adit_tests::host::Host;
use adit_tests::process::output;

use super::{BOOT, full};

/// `None`, with the reason printed, if nothing can be booted, or not now.
fn host() -> Option<Host> {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!("skipped: `cargo xtask test` builds what is needed");
        return None;
    };
    if !full() {
        println!("skipped: only `cargo xtask test --full` makes and boots these images");
        return None;
    }
    if let Some(why) = Debian::missing() {
        println!("skipped: {why}");
        return None;
    }
    let host = Host::start(&bins, &["web-1"]).unwrap();
    host.wait_port("web-1").unwrap();
    adit(&host, &["key", "new", "fleet.key"]);
    Some(host)
}

/// Returns what it printed.
fn adit(host: &Host, args: &[&str]) -> String {
    let out = host.adit(args).unwrap();
    let said = [&out.stdout[..], &out.stderr].map(String::from_utf8_lossy);
    assert!(out.status.success(), "{args:?}: {}", said.concat());
    said[0].to_string()
}

/// Waits for the agent, and has it run a script, which must succeed. Returns what that printed.
fn runs(host: &Host, guest: &Guest, script: &str) -> String {
    // Three starts of cloud-init, which is in Python, come before what installs the agent: emulated, that takes minutes.
    let limit = format!("{}s", 2 * BOOT.as_secs());
    let waited = host.adit(&["wait", "web-1", "--timeout", &limit]).unwrap();
    assert!(
        waited.status.success(),
        "{}\n{}",
        guest.serial(),
        host.log()
    );
    println!("ready after {} ms", guest.age().as_millis());
    let goal = format!(
        "steps: [{{id: look, script: {{interpreter: /bin/sh, script: \"{script}\", timeout_s: 120}}}}]"
    );
    std::fs::write(host.dir().join("look.yaml"), goal).unwrap();
    let apply = [
        "goal",
        "apply",
        "look.yaml",
        "--sign",
        "fleet.key",
        "--to",
        "web-1",
        "--watch",
    ];
    adit(host, &apply);
    let list: serde_json::Value =
        serde_json::from_str(&adit(host, &["task", "ls", "-o", "json"])).unwrap();
    adit(
        host,
        &["task", "output", list[0]["task_id"].as_str().unwrap()],
    )
}

fn file(host: &Host, name: &str) -> PathBuf {
    host.dir().join(name)
}

#[test]
fn cloud_init_installs_the_agent_in_an_image_that_has_none() {
    let Some(host) = host() else { return };
    let agent = guest_bin("adit-guest");
    let data = adit(
        &host,
        &[
            "image",
            "cloud-init",
            "--vm-id",
            "web-1",
            "--trust",
            "fleet.key.pub",
            "--allow-port",
            "22",
            "--agent",
            agent.to_str().unwrap(),
        ],
    );
    let (user_data, seed) = (file(&host, "user-data"), file(&host, "seed.img"));
    std::fs::write(&user_data, data).unwrap();
    output(Command::new("cloud-localds").arg(&seed).arg(&user_data)).unwrap();
    let image = debian::stock_image(&|what| println!("{what}")).unwrap();
    let dir = file(&host, "web-1");
    let vhost = host.vhost_socket("web-1");
    let guest = debian::boot_image(&image, Some(&seed), &vhost, &dir).unwrap();
    let said = runs(
        &host,
        &guest,
        "cloud-init status --wait; systemctl is-enabled adit-guest; stat -c %a /etc/adit-guest /etc/adit-guest/trust/fleet.key.pub",
    );
    assert_eq!(
        said.trim_start_matches('.').trim(),
        "status: done\nenabled\n700\n600"
    );
}

#[test]
fn an_image_of_the_script_has_the_agent_by_its_package() {
    let Some(host) = host() else { return };
    let image = file(&host, "web-1.qcow2");
    let deb = debian::package();
    assert!(
        deb.exists(),
        "no {}: `cargo xtask package` makes it",
        deb.display()
    );
    debian::make_image(&image, &[deb]).unwrap();
    let trust = ["--trust", "fleet.key.pub", "--agent", "/bin/false"];
    let inject = [
        "image",
        "inject",
        "web-1.qcow2",
        "--vm-id",
        "web-1",
        "--allow-port",
        "22",
    ];
    let said = adit(&host, &[&inject[..], &trust].concat());
    let kept = said.contains("keeps  /usr/sbin/adit-guest (package adit-guest)");
    assert!(kept, "{said}");
    let guest = boot(&host, &image);
    let said = runs(
        &host,
        &guest,
        "dpkg -S /usr/sbin/adit-guest; systemctl is-enabled adit-guest",
    );
    assert_eq!(said, "adit-guest: /usr/sbin/adit-guest\nenabled\n");
}

#[test]
fn a_raw_disk_that_is_not_started_gets_agent_card_and_key() {
    let Some(host) = host() else { return };
    let stock = debian::stock_image(&|what| println!("{what}")).unwrap();
    let image = file(&host, "web-1.raw");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "qcow2", "-O", "raw"]);
    output(convert.arg(&stock).arg(&image)).unwrap();
    adit(&host, &["key", "new", "enrol.key", "--role", "card"]);
    let card = adit(&host, &["card", "new", "web-1", "--sign", "enrol.key"]);
    std::fs::write(file(&host, "web-1.card"), card).unwrap();
    let agent = guest_bin("adit-guest").display().to_string();
    let inject = ["image", "inject", "web-1.raw", "--card", "web-1.card"];
    let trust = ["--trust", "fleet.key.pub,enrol.key.pub", "--agent", &agent];
    let said = adit(&host, &[&inject[..], &trust].concat());
    assert!(said.contains("wrote  /usr/sbin/adit-guest\n"), "{said}");
    let mut guest = boot(&host, &image);
    let said = runs(
        &host,
        &guest,
        "systemctl is-enabled adit-guest; adit-guest status | grep -c 'web-1, generation .* from file'; \
         stat -c %U:%G:%a /usr/sbin/adit-guest /etc/adit-guest /etc/adit-guest/trust/fleet.key.pub",
    );
    assert_eq!(
        said,
        "enabled\n1\nroot:root:755\nroot:root:700\nroot:root:600\n"
    );
    // A disk that a VM has is not written, and one that has it all does not need to be.
    let again = [&inject[..], &trust].concat();
    let refused = host.adit(&again).unwrap();
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("error[image-in-use]"), "{refused}");
    guest.kill().unwrap();
    let again = adit(&host, &again);
    assert!(!again.contains("wrote  /usr/sbin"), "{again}");
}

fn boot(host: &Host, image: &Path) -> Guest {
    let (vhost, dir) = (host.vhost_socket("web-1"), file(host, "web-1"));
    debian::boot_image(image, None, &vhost, &dir).unwrap()
}
