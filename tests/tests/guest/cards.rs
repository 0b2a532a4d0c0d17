//! Guests from one image that are who their platform's card says, and nobody without one.

use std::fs;
use std::process::Command;

use adit_tests::guest::{Carried, Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;

use super::{BOOT, Setup, bins};

const GOAL: &str = "\
steps:
  - id: who
    script: {interpreter: /bin/sh, script: \"/usr/sbin/adit-guest status\\n\"}
";

#[test]
fn r133_guests_of_one_image_are_who_their_cards_say() {
    let Some(bins) = bins() else { return };
    let keys = tempfile::tempdir().unwrap();
    let new = |name: &str, role: &str| {
        let made = Command::new(bins.join("adit"))
            .args(["key", "new", name, "--role", role])
            .current_dir(keys.path())
            .status();
        assert!(made.unwrap().success());
    };
    new("enrol.key", "card");
    new("fleet.key", "goal");
    let line = fs::read_to_string(keys.path().join("enrol.key.pub")).unwrap();
    let mut host = Host::start(&bins, &["web-1", "web-2"]).unwrap();
    let config = host.dir().join("aditd.toml");
    let text = fs::read_to_string(&config).unwrap();
    let trust = format!("{text}\n[trust]\ncard = [\"{}\"]\n", line.trim());
    fs::write(config, trust).unwrap();
    host.kill();
    host.launch().unwrap();
    let key = |name: &str| keys.path().join(name).display().to_string();
    fs::copy(key("fleet.key"), host.dir().join("fleet.key")).unwrap();
    let card = |vm: &str| {
        let (sign, labels) = (key("enrol.key"), format!("env=prod,name={vm}"));
        let args = [
            "card", "new", vm, "--labels", &labels, "--sign", &sign, "--word",
        ];
        let out = host.adit(&args).unwrap();
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let agent = adit_tests::guest_bin("adit-guest");
    let boot = |vm: &str, carried: Carried<'_>| {
        host.wait_port(vm).unwrap();
        let socket = host.vhost_socket(vm);
        let who = Identity {
            name: vm,
            vhost_socket: &socket,
            agent: Some(&agent),
            trust: Some(keys.path()),
            script: "",
            boot_files: false,
        };
        let mut guest = Guest::boot_by_card(&image, &who, carried, &host.dir().join(vm)).unwrap();
        guest.wait_ready(BOOT).unwrap();
        guest
    };
    let (one, two) = (card("web-1"), card("web-2"));
    let guest = boot("web-1", Carried::Smbios(&one));
    let other = boot("web-2", Carried::CommandLine(&two));
    let shown = |vm: &str| {
        let wait = ["wait", vm, "--for", "agent", "--timeout", "30s"];
        assert!(host.adit(&wait).unwrap().status.success(), "{}", host.log());
        let out = host.adit(&["vm", "show", vm]).unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    for (vm, place) in [("web-1", "SMBIOS"), ("web-2", "kernel command line")] {
        let said = shown(vm);
        for part in [
            &format!("env=prod, name={vm}"),
            place,
            "unproved: no card names it",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!said.contains("\nfault"), "{said}");
    }
    drop(other);
    let setup = Setup { guest, host };
    let watch = ["task", "watch", "--timeout", "60s"];
    setup.order(GOAL);
    let (status, said) = setup.adit(&watch);
    assert_eq!(status, 0, "{said}\n{}", setup.guest.serial());

    // A trust document puts another key for goals in the place of the one of the image.
    fs::copy(key("enrol.key"), setup.host.dir().join("enrol.key")).unwrap();
    let old = key("fleet.key.pub");
    let change = [
        "trust",
        "change",
        "enrol.trust",
        "--sign",
        "enrol.key",
        "--revoke",
        &old,
    ];
    for args in [&change[..], &["trust", "apply", "enrol.trust"]] {
        let (status, said) = setup.adit(args);
        assert_eq!(status, 0, "{said}");
    }
    wait_for("the guest takes it", BOOT, || {
        let (_, said) = setup.adit(&["vm", "show", "web-1"]);
        Ok(said.contains("revoked keys: 1").then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}: {}", setup.guest.serial()));
    setup.order(GOAL);
    let (status, said) = setup.adit(&watch);
    assert!(status == 5 && said.contains("revoked-key"), "{said}");
}

#[test]
fn a_guest_with_another_vms_card_is_seen_as_that_and_orders_reach_neither() {
    let Some(bins) = bins() else { return };
    let host = Host::start(&bins, &["web-1"]).unwrap();
    host.wait_port("web-1").unwrap();
    for (name, role) in [("fleet.key", "card,goal"), ("stranger.key", "card")] {
        let new = ["key", "new", name, "--role", role];
        assert!(host.adit(&new).unwrap().status.success());
    }
    let sign = |vm: &str, key: &str| {
        let out = host.adit(&["card", "new", vm, "--sign", key, "--word"]);
        String::from_utf8(out.unwrap().stdout)
            .unwrap()
            .trim()
            .to_owned()
    };
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let (agent, trust) = (
        adit_tests::guest_bin("adit-guest"),
        host.dir().join("fleet.key.pub"),
    );
    let socket = host.vhost_socket("web-1");
    let who = Identity {
        name: "web-1",
        vhost_socket: &socket,
        agent: Some(&agent),
        trust: Some(&trust),
        script: "",
        boot_files: false,
    };
    let (other, strangers) = (sign("web-9", "fleet.key"), sign("web-1", "stranger.key"));
    let file = host.dir().join("web-9.card");
    fs::write(&file, other).unwrap();
    let path = |path: &std::path::Path| path.display().to_string();
    let (adit, file, agent_at, keys) = (
        path(&bins.join("adit")),
        path(&file),
        path(&agent),
        path(&trust),
    );
    let inject = [
        &adit, "image", "inject", "--init", "busybox", "--card", &file, "--agent", &agent_at,
        "--trust", &keys,
    ];
    for (carried, says) in [
        (Carried::Injected(&inject), "enrolled as `web-9`"),
        (Carried::FwCfg(&strangers), "(fw_cfg)"),
    ] {
        let dir = host.dir().join(says.split(' ').next().unwrap());
        let mut guest = Guest::boot_by_card(&image, &who, carried, &dir).unwrap();
        guest.wait_ready(BOOT).unwrap();
        let wait = ["wait", "web-1", "--for", "agent", "--timeout", "30s"];
        assert!(host.adit(&wait).unwrap().status.success());
        let out = host.adit(&["vm", "show", "web-1"]).unwrap();
        let said = String::from_utf8(out.stdout).unwrap();
        assert!(said.contains(says), "{says}: {said}\n{}", guest.serial());
        let is_strangers = says == "(fw_cfg)";
        assert_eq!(said.contains("card-untrusted"), is_strangers, "{said}");
        guest.kill().unwrap();
    }
}
