//! The hook for libvirt, run as libvirt 9 runs it: by its arguments, with the domain's XML on standard input; against a real aditd.
//!
//! It needs the binaries that `cargo xtask test` builds. Without them it prints that and passes.
#![allow(missing_docs)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use adit_tests::host::Host;
use serde_json::Value;

/// A domain that runs, as `virsh dumpxml` has it and a hook gets it. What stands in its metadata is no device.
fn domain(name: &str, vsock: &str) -> String {
    format!(
        "<domain type='kvm' id='3'>\n  <name>{name}</name>\n  <metadata>\n    <vsock><cid auto='no' address='99'/></vsock>\n  </metadata>\n  \
         <devices>\n    <emulator>/usr/bin/qemu-system-x86_64</emulator>\n{vsock}  </devices>\n</domain>\n"
    )
}

fn vsock(cid: u32) -> String {
    format!(
        "    <vsock model='virtio'>\n      <cid auto='yes' address='{cid}'/>\n      <alias name='vsock0'/>\n    </vsock>\n"
    )
}

fn adit_of(dir: &Path) -> PathBuf {
    dir.join("adit")
}

fn program(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

struct World {
    host: Host,
    dir: tempfile::TempDir,
}

impl World {
    fn start() -> Option<Self> {
        let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
            println!(
                "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
            );
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let config = "[proxy]\nlisten = \"127.0.0.1:0\"\n[[vm]]\nname = \"web-9\"\ncid = 9\n";
        let host = Host::start_configured(&bins, config).unwrap();
        // The vsock of this machine's own kernel is not the test's: what is added has another way.
        let adit = bins.join("adit");
        let (adit, asked) = (adit.display(), dir.path().join("asked"));
        let script = format!(
            "#!/bin/sh\necho \"$@\" >>{}\nfor arg; do shift; [ \"$arg\" = --vhost-vsock ] || set -- \"$@\" \"$arg\"; done\n\
             exec {adit} \"$@\"\n",
            asked.display()
        );
        program(&adit_of(dir.path()), &script);
        fs::write(dir.path().join("conf"), "ADIT_VM_OPTIONS='--allow 80,22'\n").unwrap();
        Some(Self { host, dir })
    }

    /// Another adit, in a directory of its own: a shell text, in which `adit` is the first one.
    fn other(&self, name: &str, text: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        let first = adit_of(self.dir.path());
        program(
            &adit_of(&dir),
            &format!(
                "#!/bin/sh\nadit() {{ {} \"$@\"; }}\n{text}\n",
                first.display()
            ),
        );
        dir
    }

    /// Runs the hook with the adit of that directory. Returns what it said.
    fn hook(&self, adit: &Path, args: [&str; 4], xml: &str) -> String {
        let mut hook = Command::new(adit_tests::root().join("host-proxy/dist/libvirt-hook"));
        hook.args(args)
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", adit.display()))
            .env(
                "ADIT_SOCKET",
                self.host.vm_dir("web-9").join("../../aditd.sock"),
            )
            .env("ADIT_HOOK_STATE", self.dir.path().join("state"))
            .env("ADIT_HOOK_CONF", self.dir.path().join("conf"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut hook = hook.spawn().unwrap();
        // It need not read it.
        let _ = hook.stdin.take().unwrap().write_all(xml.as_bytes());
        let out = hook.wait_with_output().unwrap();
        assert!(out.status.success(), "a domain starts whatever it says");
        String::from_utf8(out.stderr).unwrap()
    }

    fn vms(&self) -> Vec<(String, u64)> {
        let out = self.host.adit(&["vm", "ls", "-o", "json"]).unwrap();
        let vms: Value = serde_json::from_slice(&out.stdout).unwrap();
        let each = vms.as_array().unwrap().iter();
        each.map(|vm| {
            (
                vm["name"].as_str().unwrap().to_owned(),
                vm["cid"].as_u64().unwrap(),
            )
        })
        .collect()
    }
}

#[test]
fn a_domain_that_starts_is_a_vm_until_it_is_released() {
    let Some(world) = World::start() else { return };
    let own = world.dir.path();
    let always = ("web-9".to_owned(), 9);
    let web_1 = domain("web-1", &vsock(7));
    let hook = |args, xml: &str| world.hook(own, args, xml);
    // In the order in which libvirt calls it; before it is started nobody knows its number.
    for operation in ["prepare", "start"] {
        hook(["web-1", operation, "begin", "-"], &web_1);
    }
    assert_eq!(world.vms(), std::slice::from_ref(&always));
    assert_eq!(hook(["web-1", "started", "begin", "-"], &web_1), "");
    assert_eq!(world.vms(), [("web-1".to_owned(), 7), always.clone()]);
    let out = world
        .host
        .adit(&["vm", "show", "web-1", "-o", "json"])
        .unwrap();
    let vm: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(vm["allow"], serde_json::json!([80, 22]));
    let asked = fs::read_to_string(own.join("asked")).unwrap();
    assert!(asked.contains("vm add --vhost-vsock --cid 7 "), "{asked}");
    // libvirt is started anew; then it was killed, and the domain has another number.
    hook(["web-1", "reconnect", "begin", "-"], &web_1);
    assert_eq!(world.vms()[0].1, 7);
    hook(
        ["web-1", "started", "begin", "-"],
        &domain("web-1", &vsock(8)),
    );
    assert_eq!(world.vms()[0].1, 8);
    for operation in ["stopped", "release"] {
        hook(["web-1", operation, "end", "-"], &web_1);
    }
    assert_eq!(world.vms(), std::slice::from_ref(&always));
    // One without a device, one whose name is none, one whose name another VM has: that one stays.
    hook(["web-2", "started", "begin", "-"], &domain("web-2", ""));
    let said = hook(
        ["Web_3", "started", "begin", "-"],
        &domain("Web_3", &vsock(10)),
    );
    assert!(said.contains("Web_3"), "{said}");
    let said = hook(
        ["web-9", "started", "begin", "-"],
        &domain("web-9", &vsock(11)),
    );
    assert!(said.contains("not libvirt's"), "{said}");
    hook(["web-9", "release", "end", "-"], &web_1);
    assert_eq!(world.vms(), [always]);
}

/// What aditd was asked while it did not answer is mended at the domain's next start or end.
#[test]
fn a_domain_is_no_vm_for_ever_because_aditd_was_away() {
    let Some(world) = World::start() else { return };
    let own = world.dir.path();
    let always = ("web-9".to_owned(), 9);
    let away = world.other("away", "exit 3");
    let starts = |adit: &Path, cid| {
        let xml = domain("web-1", &vsock(cid));
        world.hook(adit, ["web-1", "started", "begin", "-"], &xml)
    };
    let ends = |adit: &Path| {
        let xml = domain("web-1", &vsock(7));
        world.hook(adit, ["web-1", "release", "end", "-"], &xml)
    };
    // It was away at the start: then nothing is known, until libvirt is started anew.
    let said = starts(&away, 7);
    assert!(said.contains("does not answer"), "{said}");
    assert_eq!(world.vms(), std::slice::from_ref(&always));
    let xml = domain("web-1", &vsock(7));
    world.hook(own, ["web-1", "reconnect", "begin", "-"], &xml);
    assert_eq!(world.vms(), [("web-1".to_owned(), 7), always.clone()]);
    // At its end: the VM is left, until the domain is started again, with another CID.
    ends(&away);
    assert_eq!(world.vms().len(), 2);
    assert_eq!(starts(own, 8), "");
    assert_eq!(world.vms(), [("web-1".to_owned(), 8), always.clone()]);
    ends(own);
    assert_eq!(world.vms(), std::slice::from_ref(&always));
    // It did what it was asked, and its answer was lost.
    let late = world.other(
        "late",
        r#"adit "$@"; status=$?; case "$*" in *" vm add "*) exit 3 ;; esac; exit $status"#,
    );
    starts(&late, 7);
    assert_eq!(world.vms().len(), 2);
    ends(own);
    assert_eq!(world.vms(), std::slice::from_ref(&always));
    // Somebody has taken the VM away; it is told again.
    starts(own, 7);
    let out = world.host.adit(&["vm", "rm", "--force", "web-1"]).unwrap();
    assert!(out.status.success());
    assert_eq!(starts(own, 7), "");
    assert_eq!(world.vms(), [("web-1".to_owned(), 7), always.clone()]);
    let out = world.host.adit(&["vm", "rm", "--force", "web-1"]).unwrap();
    assert!(out.status.success());
    assert_eq!(ends(own), "");
    assert!(!own.join("state/vm-web-1").exists());
}
