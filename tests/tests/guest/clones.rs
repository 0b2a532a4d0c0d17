//! Real guests from copies of one sealed disk: each gets an identity of its own before it runs anything, and keeps it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use adit_tests::guest::{Carried, Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use serde_json::Value;

use super::{BOOT, bins};

/// Set by `cargo xtask test --full`.
const FULL: &str = "ADIT_TEST_FULL";
/// Guests that run at a time.
const AT_ONCE: usize = 4;

/// The agent ends first, or it would write all of it again. The step ends when that has a session of its own: what is left in the
/// step's own session ends with it.
const SEAL: &str = "\
steps:
  - id: seal
    script:
      interpreter: /bin/sh
      script: |
        setsid sh -c 'touch /run/apart; sleep 2; /etc/init.d/S50adit-guest stop; sleep 1; adit-guest seal; ls -A /var/lib/adit-guest; sync; echo SEALED' \\
          > /dev/ttyS0 2>&1 < /dev/null &
        until test -e /run/apart; do sleep 0.1; done
";
const COUNT: &str = "\
steps:
  - id: count
    script: {interpreter: /bin/sh, script: \"echo x >> /var/lib/ran; sync; cat /var/lib/ran\", timeout_s: 20}
";

struct Fleet {
    host: Host,
    image: Image,
    keys: tempfile::TempDir,
}

impl Fleet {
    fn adit(&self, args: &[&str]) -> (Option<i32>, String) {
        let out = self.host.adit(args).unwrap();
        let said = [out.stdout, out.stderr].concat();
        (
            out.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    fn key(&self, name: &str) -> String {
        self.keys.path().join(name).display().to_string()
    }

    /// Boots a guest by a card of its own, with this state disk if there is one.
    fn boot(&self, vm: &str, disk: Option<&Path>) -> Guest {
        let dir = self.host.dir().join(vm);
        fs::create_dir_all(&dir).unwrap();
        if let Some(disk) = disk {
            fs::copy(disk, dir.join("state.ext4")).unwrap();
        }
        self.host.wait_port(vm).unwrap();
        let card = self
            .adit(&[
                "card",
                "new",
                vm,
                "--sign",
                &self.key("enrol.key"),
                "--word",
            ])
            .1;
        let socket = self.host.vhost_socket(vm);
        let agent = adit_tests::guest_bin("adit-guest");
        let who = Identity {
            name: vm,
            vhost_socket: &socket,
            agent: Some(&agent),
            trust: Some(self.keys.path()),
            script: "",
            boot_files: false,
        };
        let carried = Carried::CommandLine(card.trim());
        Guest::boot_by_card(&self.image, &who, carried, &dir).unwrap()
    }

    fn wait(&self, vm: &str, guest: &Guest) {
        let (status, said) = self.adit(&["wait", vm, "--for", "agent", "--timeout", "120s"]);
        assert_eq!(status, Some(0), "{said}\n{}", guest.serial());
    }

    /// Orders a goal for a VM. Returns what its step printed.
    fn order(&self, vm: &str, goal: &str, guest: &Guest) -> String {
        fs::write(self.host.dir().join("goal.yaml"), goal).unwrap();
        let sign = self.key("fleet.key");
        let apply = [
            "goal",
            "apply",
            "goal.yaml",
            "--sign",
            &sign,
            "--to",
            vm,
            "--watch",
            "--timeout",
            "60s",
        ];
        let (status, said) = self.adit(&apply);
        assert_eq!(status, Some(0), "{said}\n{}", guest.serial());
        let list = self.adit(&["task", "ls", "--vm", vm, "-o", "json"]).1;
        let tasks: Vec<Value> = serde_json::from_str(&list).unwrap();
        let id = tasks.last().unwrap()["task_id"]
            .as_str()
            .unwrap()
            .to_owned();
        self.adit(&["task", "output", &id]).1
    }
}

#[test]
fn r133_copies_of_a_sealed_disk_get_identities_of_their_own_and_keep_them() {
    let Some(bins) = bins() else { return };
    let clones = if std::env::var_os(FULL).is_some() {
        50
    } else {
        3
    };
    let names: Vec<String> = (0..=clones).map(|n| format!("web-{n}")).collect();
    let vms: Vec<&str> = names.iter().map(String::as_str).collect();
    let fleet = Fleet {
        host: Host::start(&bins, &vms).unwrap(),
        image: Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap(),
        keys: tempfile::tempdir().unwrap(),
    };
    for (name, role) in [("enrol.key", "card"), ("fleet.key", "goal")] {
        let mut new = Command::new(bins.join("adit"));
        new.args(["key", "new", name, "--role", role]);
        assert!(
            new.current_dir(fleet.keys.path())
                .status()
                .unwrap()
                .success()
        );
    }
    let begin = Instant::now();
    let (original, copies) = vms.split_first().unwrap();
    let mut guest = fleet.boot(original, None);
    fleet.wait(original, &guest);
    assert_eq!(fleet.order(original, COUNT, &guest), "x\n");
    fleet.order(original, SEAL, &guest);
    guest
        .wait_serial("the disk is sealed", BOOT, |log| log.contains("SEALED"))
        .unwrap();
    guest.kill().unwrap();
    let disk = fleet.host.dir().join(original).join("state.ext4");
    println!("sealed after {:?}", begin.elapsed());

    let (mut keys, mut ids) = (BTreeSet::new(), BTreeSet::new());
    for batch in copies.chunks(AT_ONCE) {
        let mut guests: Vec<_> = batch.iter().map(|vm| fleet.boot(vm, Some(&disk))).collect();
        for (vm, guest) in batch.iter().zip(&mut guests) {
            fleet.wait(vm, guest);
            // The file system is a copy, and what the journal had is not in it: it runs once here, too.
            assert_eq!(fleet.order(vm, COUNT, guest), "x\nx\n", "{vm}");
            let text = fleet.adit(&["vm", "show", vm, "-o", "json"]).1;
            let shown: Value = serde_json::from_str(&text).unwrap();
            assert!(shown["fault"].is_null(), "{shown}");
            keys.insert(shown["guest_key"]["public"].as_str().unwrap().to_owned());
            ids.insert(shown["guest_id"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!((keys.len(), ids.len()), (copies.len(), copies.len()));
    println!("{} copies after {:?}", copies.len(), begin.elapsed());

    // The last one is booted again, and is the same; then copied without a seal, and the copy is another.
    let last = *copies.last().unwrap();
    let disk = fleet.host.dir().join(last).join("state.ext4");
    let shown = |vm: &str| -> Value {
        let text = fleet.adit(&["vm", "show", vm, "-o", "json"]).1;
        serde_json::from_str(&text).unwrap()
    };
    let before = shown(last);
    let again = fleet.boot(last, None);
    let ready = wait_for("the same guest again", BOOT, || {
        let now = shown(last);
        Ok((now["state"] == "ready" && now["guest_id"].is_string()).then_some(now))
    });
    let now = ready.unwrap_or_else(|e| panic!("{e}: {}", again.serial()));
    for key in ["guest_key", "guest_id"] {
        assert_eq!(now[key], before[key], "{key}");
    }
    drop(again);
    let copy = fleet.boot(original, Some(&disk));
    let ready = wait_for("the copy", BOOT, || {
        let now = shown(original);
        Ok((now["guest_id"].is_string() && now["guest_id"] != before["guest_id"]).then_some(()))
    });
    ready.unwrap_or_else(|e| panic!("{e}: {}", copy.serial()));
    fleet.wait(original, &copy);
    assert_eq!(fleet.order(original, COUNT, &copy), "x\nx\nx\n");
    let now = shown(original);
    assert_ne!(now["guest_key"]["public"], before["guest_key"]["public"]);
}
