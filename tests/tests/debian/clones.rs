//! Debians from copies of one sealed disk, each with a card that was put into its image.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use adit_tests::debian::Init;
use adit_tests::host::Host;
use adit_tests::process::{output, wait_for};
use serde_json::Value;

use super::{BOOT, built, full};

/// As the last thing before the shutdown. The agent, which carries this, ends with it.
const SEAL: &str = "systemd-run --no-block sh -c 'sleep 2; systemctl stop adit-guest; \
    adit-guest seal --keep-vm-id > /dev/ttyS0; echo SEALED > /dev/ttyS0; systemctl poweroff'";

#[test]
fn r133_debians_of_one_sealed_disk_are_who_the_cards_in_their_images_say() {
    if !full() {
        return println!("skipped: only `cargo xtask test --full` boots four Debians");
    }
    let Some((bins, debian)) = built(Init::Systemd) else {
        return;
    };
    let copies = ["copy-1", "copy-2", "copy-3"];
    let vms = [&["web-1"][..], &copies].concat();
    let host = Host::start(&bins, &vms).unwrap();
    let adit = |args: &[&str]| {
        let out = host.adit(args).unwrap();
        let said = [out.stdout, out.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(out.status.success(), "{args:?}: {said}");
        said
    };
    adit(&["key", "new", "enrol.key", "--role", "card"]);
    let limit = format!("{}s", BOOT.as_secs());
    let wait = |vm: &str| adit(&["wait", vm, "--for", "agent", "--timeout", &limit]);
    host.wait_port("web-1").unwrap();
    let dir = host.dir().join("web-1");
    let mut guest = debian.boot(&host.vhost_socket("web-1"), &dir).unwrap();
    wait("web-1");
    wait_for("sshd", BOOT, || {
        let status = debian.ssh(host.proxy()).arg(SEAL).status()?;
        Ok(status.success().then_some(()))
    })
    .unwrap();
    guest
        .wait_serial("the disk is sealed", BOOT, |log| log.contains("SEALED"))
        .unwrap();
    // No image is written that was not unmounted.
    guest.wait_end(BOOT).unwrap();
    // The disk is an overlay of Debian's; an image to be copied is whole.
    let sealed = host.dir().join("sealed.qcow2");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "qcow2", "-O", "qcow2"]);
    output(convert.arg(debian.overlay(&dir).unwrap()).arg(&sealed)).unwrap();

    let (mut keys, mut ids) = (BTreeSet::new(), BTreeSet::new());
    for vm in copies {
        let dir = host.dir().join(vm);
        fs::create_dir(&dir).unwrap();
        let disk = dir.join("disk.qcow2");
        fs::copy(&sealed, &disk).unwrap();
        let card = adit(&["card", "new", vm, "--sign", "enrol.key"]);
        fs::write(dir.join("card"), card).unwrap();
        let (disk, card) = (
            disk.display().to_string(),
            dir.join("card").display().to_string(),
        );
        let agent = adit_tests::guest_bin("adit-guest").display().to_string();
        adit(&[
            "image",
            "inject",
            &disk,
            "--card",
            &card,
            "--trust",
            "enrol.key.pub",
            "--agent",
            &agent,
            "--allow-port",
            "22",
        ]);
        host.wait_port(vm).unwrap();
        let guest = debian.boot(&host.vhost_socket(vm), &dir).unwrap();
        wait(vm);
        let text = adit(&["vm", "show", vm, "-o", "json"]);
        let shown: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            shown["card"]["place"],
            "file",
            "{shown}\n{}",
            guest.serial()
        );
        assert!(
            shown["fault"].is_null() && shown["enrolled_as"].is_null(),
            "{shown}"
        );
        keys.insert(shown["guest_key"]["public"].to_string());
        ids.insert(shown["guest_id"].to_string());
    }
    assert_eq!((keys.len(), ids.len()), (3, 3));
}
