//! `adit-guest install` as a command, against images that lead elsewhere and whoever installs with a strict umask.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

const VERBS: [&str; 3] = ["systemd", "openrc", "busybox"];

fn install(root: &Path, init: &str, umask: &str) -> Output {
    let key = root.parent().unwrap().join("manager.pub");
    let private = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
    fs::write(
        &key,
        adit_tasks::PublicKey::of(&private, "test").to_string(),
    )
    .unwrap();
    let policy = root.parent().unwrap().join("policy.toml");
    fs::write(&policy, "default = \"deny\"\n").unwrap();
    Command::new("sh")
        .args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"])
        .arg(env!("CARGO_BIN_EXE_adit-guest"))
        .args(["install", "--init", init, "--vm-id", "web-1", "--root"])
        .arg(root)
        .arg("--trust")
        .arg(&key)
        .arg("--policy")
        .arg(&policy)
        .args(["--binary", "/bin/true"])
        .output()
        .unwrap()
}

/// Every entry below a directory, links not followed.
fn entries(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        found.push(entry.path().display().to_string());
        if entry.file_type().unwrap().is_dir() {
            found.extend(entries(&entry.path()));
        }
    }
    found.sort();
    found
}

/// Each directory and file that an installation makes, from the top.
fn levels(root: &Path) -> Vec<String> {
    let below = |path: String| path.strip_prefix(root.to_str().unwrap()).unwrap()[1..].to_owned();
    entries(root).into_iter().map(below).collect()
}

#[test]
fn r113_a_link_at_any_level_of_the_image_leads_nowhere_outside_of_it() {
    for init in VERBS {
        let model = tempfile::tempdir().unwrap();
        let root = model.path().join("root");
        fs::create_dir(&root).unwrap();
        assert!(install(&root, init, "022").status.success());
        let levels = levels(&root);
        assert!(levels.len() > 8, "{levels:?}");
        for level in &levels {
            let dir = tempfile::tempdir().unwrap();
            let outside = dir.path().join("outside");
            let up = "../".repeat(level.matches('/').count() + 1);
            let is_dir = fs::symlink_metadata(root.join(level)).unwrap().is_dir();
            for (target, inside) in [
                (outside.display().to_string(), false),
                (format!("{up}outside"), false),
                (format!("{up}../../../../{}", outside.display()), false),
                // Links that an image may well have: absolute, and to somewhere in it.
                ("/data".to_owned(), true),
                (format!("{up}data"), true),
            ] {
                let root = dir.path().join("root");
                let _ = fs::remove_dir_all(&root);
                let _ = fs::remove_dir_all(&outside);
                let link = root.join(level);
                fs::create_dir_all(link.parent().unwrap()).unwrap();
                fs::create_dir_all(outside.join("sub")).unwrap();
                fs::create_dir(root.join("data")).unwrap();
                symlink(&target, &link).unwrap();
                let before = entries(&outside);
                let done = install(&root, init, "022");
                assert_eq!(entries(&outside), before, "{level} -> {target}");
                // A link in a file's own place is replaced; one to a directory that the image has is followed.
                let said = String::from_utf8_lossy(&done.stderr);
                assert_eq!(
                    done.status.success(),
                    inside || !is_dir,
                    "{level} -> {target}: {said}"
                );
                assert!(
                    done.status.success() || said.contains(level.as_str()),
                    "{said}"
                );
            }
        }
    }
}

#[test]
fn r113_modes_do_not_depend_on_the_umask_of_whoever_installs() {
    for init in VERBS {
        let modes = ["022", "077", "000"].map(|umask| {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("root");
            fs::create_dir(&root).unwrap();
            let done = install(&root, init, umask);
            assert!(
                done.status.success(),
                "{}",
                String::from_utf8_lossy(&done.stderr)
            );
            let mode = |level: String| {
                let meta = fs::symlink_metadata(root.join(&level)).unwrap();
                (level, meta.permissions().mode() & 0o7777)
            };
            levels(&root).into_iter().map(mode).collect::<Vec<_>>()
        });
        assert_eq!(modes[0], modes[1]);
        assert_eq!(modes[0], modes[2]);
        let of = |level: &str| modes[1].iter().find(|(l, _)| l == level).unwrap().1;
        for public in ["etc", "usr", "usr/sbin", "usr/sbin/adit-guest"] {
            assert_eq!(of(public), 0o755, "{public}");
        }
        for private in ["etc/adit-guest", "etc/adit-guest/trust"] {
            assert_eq!(of(private), 0o700, "{private}");
        }
    }
}

#[test]
fn r113_an_agent_that_is_started_with_a_strict_umask_makes_directories_that_its_tasks_can_use() {
    let mut host = crate::host::Host::new();
    host.start(None);
    host.accept();
    let mode = |path: &str| fs::metadata(host.path(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("run"), mode("state")), (0o711, 0o700));
}

#[test]
fn keys_may_be_named_many_times_and_in_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let key = |seed: u8| {
        let private = ed25519_dalek::SigningKey::from_bytes(&[seed; 32]);
        let path = dir.path().join(format!("k{seed}.pub"));
        fs::write(&path, adit_tasks::PublicKey::of(&private, "k").to_string()).unwrap();
        path.display().to_string()
    };
    let list = format!("{},{}", key(2), key(3));
    let done = Command::new(env!("CARGO_BIN_EXE_adit-guest"))
        .args([
            "install",
            "--init",
            "none",
            "--binary",
            "/bin/true",
            "--root",
        ])
        .arg(&root)
        .args(["--trust", &key(1), "--trust", &list])
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    let placed = entries(&root.join("etc/adit-guest/trust"));
    let names: Vec<_> = placed.iter().filter_map(|p| p.rsplit('/').next()).collect();
    assert_eq!(names, ["k1.pub", "k2.pub", "k3.pub"]);
}
