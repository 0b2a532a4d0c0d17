//! Files of a real guest: switched on by its owner, both ways, as a user of it, and over a port process that is killed meanwhile.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use adit_tests::image::Kernel;
use adit_tests::process::wait_for;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

use crate::clock::{is_done, step};
use crate::{BOOT, Setup, bins, run_goal, setup};

fn copies(kernel: Kernel) {
    let Some(setup) = setup(kernel, "", false) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let out = adit(&setup, &["ls", "web-1:/"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.code() == Some(125) && said.contains("off"),
        "{said}"
    );
    let text = "chmod 1777 /tmp; cat > /etc/adit-guest/policy.toml <<E\\ndefault = 'deny'\\n[[files]]\\nallow = 'host'\\nusers = 'any'\\n\
                read = ['/tmp', '/etc']\\nwrite = ['/tmp']\\nE\\nadit-guest policy check && /etc/init.d/S50adit-guest reload";
    let list = run_goal(&setup, &step("policy", text));
    assert!(is_done(&list, "policy"), "{list}\n{}", setup.guest.serial());
    a_tree(&setup, dir.path());
    as_a_user(&setup, dir.path());
    over_a_kill(&setup, dir.path());
}

fn adit(setup: &Setup, args: &[&str]) -> Output {
    setup.host.adit(args).unwrap()
}

fn ok(setup: &Setup, args: &[&str]) -> Output {
    let out = adit(setup, args);
    assert!(
        out.status.success(),
        "{args:?}: {out:?}\n{}",
        setup.guest.serial()
    );
    out
}

fn text(at: &Path) -> &str {
    at.to_str().unwrap()
}

fn bytes(len: u32) -> Vec<u8> {
    (0..len)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect()
}

/// There and back is the same.
fn a_tree(setup: &Setup, dir: &Path) {
    let from = dir.join("from");
    fs::create_dir_all(from.join("a/b")).unwrap();
    for n in 0..500 {
        fs::write(from.join(format!("a/{n}")), bytes(n * 10)).unwrap();
    }
    symlink("../../etc/passwd", from.join("a/b/link")).unwrap();
    ok(setup, &["cp", text(&from), "web-1:/tmp/tree"]);
    ok(setup, &["cp", "web-1:/tmp/tree", text(&dir.join("back"))]);
    for n in 0..500 {
        let [there, back] = ["from", "back"].map(|top| dir.join(top).join(format!("a/{n}")));
        assert!(fs::read(&there).unwrap() == fs::read(&back).unwrap(), "{n}");
        assert_eq!(
            there.metadata().unwrap().mtime(),
            back.metadata().unwrap().mtime()
        );
    }
    assert!(dir.join("back/a/b/link").is_symlink());
    let out = ok(setup, &["ls", "web-1:/tmp/tree/a", "-o", "json"]);
    let rows: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 501);
    ok(setup, &["rm", "-r", "web-1:/tmp/tree"]);
    assert!(
        ok(setup, &["cp", "web-1:/etc/passwd", "-"])
            .stdout
            .starts_with(b"root:")
    );
}

/// The kernel decides by the user's rights, and a link leads nowhere.
fn as_a_user(setup: &Setup, dir: &Path) {
    let one = dir.join("one");
    fs::write(&one, "one").unwrap();
    ok(
        setup,
        &["cp", "--user", "nobody", text(&one), "web-1:/tmp/one"],
    );
    let out = ok(setup, &["stat", "web-1:/tmp/one", "-o", "json"]);
    let row: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(row["uid"] != 0, "{row}");
    for args in [
        &["cp", "--user", "nobody", "web-1:/etc/shadow", "-"][..],
        &["cp", text(&one), "web-1:/etc/one"],
        &["cp", "web-1:/proc/version", "-"],
        &["rm", "web-1:/etc/passwd"],
    ] {
        let out = adit(setup, args);
        assert_eq!(out.status.code(), Some(125), "{args:?}: {out:?}");
    }
}

/// It goes on where it was.
fn over_a_kill(setup: &Setup, dir: &Path) {
    let large = dir.join("large");
    fs::write(&large, bytes(24 << 20)).unwrap();
    let child = Command::new(bins().unwrap().join("adit"))
        .args(["cp", text(&large), "web-1:/tmp/large"])
        .env(
            "ADIT_SOCKET",
            setup.host.vm_dir("web-1").join("../../aditd.sock"),
        )
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("it is under way", BOOT, || {
        let out = adit(
            setup,
            &["stat", "web-1:/tmp/.large.adit-part", "-o", "json"],
        );
        let row: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        Ok((row["size"].as_u64() > Some(1 << 20)).then_some(()))
    })
    .unwrap();
    let vm = ok(setup, &["vm", "show", "web-1", "-o", "json"]);
    let vm: serde_json::Value = serde_json::from_slice(&vm.stdout).unwrap();
    let port = i32::try_from(vm["port_pid"].as_i64().unwrap()).unwrap();
    kill(Pid::from_raw(port), Signal::SIGKILL).unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success() && said.contains("it goes on"),
        "{said}\n{}",
        setup.guest.serial()
    );
    let back = ok(setup, &["cp", "web-1:/tmp/large", "-"]).stdout;
    assert_eq!(
        Sha256::digest(&back),
        Sha256::digest(fs::read(&large).unwrap())
    );
}

#[test]
fn copies_6_1() {
    copies(Kernel::V6_1);
}
