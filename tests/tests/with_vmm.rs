//! `docs/with-your-vmm.md` is typed, from its first command to its last, on a machine with a systemd and the service as it is shipped.
//! Scripted endpoints play Firecracker and Cloud Hypervisor.
//!
//! It needs the binaries that `cargo xtask test` builds. Without them it prints that and passes.
#![allow(missing_docs)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use adit_channel::frame;
use adit_tasks::wire::{Facts, WireKind};
use adit_tests::hybrid::{Kind, Vmm};
use adit_tests::machine::Machine;
use adit_tests::process::wait_for;
use adit_tests::tour::{Tour, line, read};

const PAGE: &str = "docs/with-your-vmm.md";
const SOON: Duration = Duration::from_secs(30);

/// A VMM at this path of the machine, with an agent that has said who it is.
fn vmm(tour: &mut Tour, inside: &str, kind: Kind) -> (Vmm, UnixStream) {
    let path = tour.machine.path(inside);
    let dir = path.parent().unwrap();
    fs::create_dir_all(dir).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    let vmm = Vmm::start(&path, kind, &[]).unwrap();
    let stream = wait_for("the agent's stream", SOON, || Ok(vmm.agent_stream().ok()));
    let mut stream = stream.unwrap_or_else(|e| {
        let (_, said) = tour
            .machine
            .run("adit vm ls; adit doctor; tail -n 30 /run/adit/vm/*/port.log")
            .unwrap_or_default();
        panic!("{e:#}\n{said}\n{}", tour.log())
    });
    let name = dir.file_name().unwrap().to_str().unwrap();
    let facts = Facts {
        agent_version: "0.1.0".into(),
        kernel: "6.1".into(),
        os: "Debian".into(),
        vm_id: name.into(),
        anchors: 1,
        boot_nonce: vmm.identity.boot_nonce,
    };
    let frame = frame::encode(WireKind::Facts as u16, 1, 0, 0, &facts).unwrap();
    stream.write_all(&frame).unwrap();
    (vmm, stream)
}

#[test]
fn with_your_vmm_does_what_it_says() {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
        return;
    };
    if let Some(why) = Machine::missing() {
        println!("skipped: {why}");
        return;
    }
    let mut tour = Tour::start(PAGE, &bins).unwrap();
    // The host, as operate.md makes it by hand.
    let operate = read("docs/operate.md");
    let install = line(&operate, "$ install -m 755 target/release/aditd");
    tour.follow(
        &operate,
        install..line(&operate, "$ mkdir -p -m 755 /etc/adit"),
    );
    let config = "mkdir -p -m 755 /etc/adit && printf '[proxy]\\nlisten = \"127.0.0.1:7080\"\\n[[grant]]\\nto = [\"user:root\"]\\n\
                  vms = [\"*\"]\\nmay = [\"reach\", \"see\"]\\n' > /etc/adit/aditd.toml && systemctl daemon-reload && systemctl start aditd";
    let (status, said) = tour.machine.run(config).unwrap();
    assert_eq!(status, 0, "{said}");
    let page = read(PAGE);
    let fc = line(&page, "<!-- here a scripted endpoint plays Firecracker");
    let ch = line(
        &page,
        "<!-- here a scripted endpoint plays Cloud Hypervisor",
    );
    tour.follow(&page, 1..fc);
    let _fc = vmm(&mut tour, "/run/fc/web-1/v.sock", Kind::Closes);
    tour.follow(&page, fc..ch);
    let _ch = vmm(&mut tour, "/run/ch/web-2/v.sock", Kind::Keeps);
    tour.follow(&page, ch..usize::MAX);
}

/// What the page shows of a configuration is one, and names the path that the section finds.
#[test]
fn the_configuration_for_firecracker_is_json_with_the_path_that_is_looked_for() {
    let page = read(PAGE);
    let (_, block) = page.split_once("```json\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    let config: serde_json::Value = serde_json::from_str(block).unwrap();
    assert_eq!(config["vsock"]["uds_path"], "/run/fc/web-1/v.sock");
    assert!(
        config["vsock"]["guest_cid"]
            .as_u64()
            .is_some_and(|cid| cid >= 3)
    );
}
