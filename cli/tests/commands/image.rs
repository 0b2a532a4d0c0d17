//! `adit image …` on a real file system, and what it prints for cloud-init.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::{adit, text};

/// A root with systemd, and an agent that needs nothing of it.
fn scene() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir_all(root.join("usr/lib/systemd")).unwrap();
    fs::write(root.join("usr/lib/systemd/systemd"), "").unwrap();
    symlink("usr/lib", root.join("lib")).unwrap();
    fs::write(dir.path().join("agent"), b"\x7fELF and no more").unwrap();
    assert!(adit(dir.path(), &["key", "new", "k"]).status.success());
    fs::write(dir.path().join("minimal.toml"), "default = \"deny\"\n").unwrap();
    dir
}

const WHAT: [&str; 10] = [
    "--vm-id",
    "web-1",
    "--trust",
    "k.pub",
    "--allow-port",
    "22,80",
    "--agent",
    "agent",
    "--policy",
    "minimal.toml",
];

fn inject(dir: &Path, target: &str, more: &[&str]) -> std::process::Output {
    adit(
        dir,
        &[&["image", "inject", target], &WHAT[..], more].concat(),
    )
}

#[test]
fn an_image_gets_the_files_that_a_directory_gets() {
    let dir = scene();
    let image = dir.path().join("web-1.raw");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    let made = mke2fs.args(["-q", "-t", "ext4", "-F", "-d", "root", "web-1.raw"]);
    assert!(made.current_dir(dir.path()).status().unwrap().success());

    let into_image = inject(dir.path(), "web-1.raw", &[]);
    let into_dir = inject(dir.path(), "root", &[]);
    assert!(into_image.status.success(), "{}", text(&into_image.stderr));
    assert_eq!(text(&into_image.stdout), text(&into_dir.stdout));
    assert_eq!(
        text(&into_image.stdout)
            .lines()
            .filter(|l| l.starts_with("wrote "))
            .count(),
        6
    );
    for file in [
        "etc/adit-guest/adit-guest.toml",
        "etc/adit-guest/policy.toml",
        "etc/adit-guest/trust/k.pub",
        "usr/sbin/adit-guest",
    ] {
        let mut debugfs = Command::new("debugfs");
        let cat = debugfs
            .args(["-R", &format!("cat /{file}")])
            .arg(&image)
            .output()
            .unwrap();
        assert_eq!(
            cat.stdout,
            fs::read(dir.path().join("root").join(file)).unwrap(),
            "{file}"
        );
    }
    let again = inject(dir.path(), "web-1.raw", &["-o", "json"]);
    let again: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    let lines = again["lines"].as_array().unwrap();
    assert!(
        lines
            .iter()
            .all(|l| l.as_str().unwrap().starts_with("keeps ")),
        "{lines:?}"
    );
}

#[test]
fn a_qcow2_image_gets_the_policy_too() {
    let dir = scene();
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return eprintln!("skipped: no qemu-img (qemu-utils)");
    }
    let run = |program: &str, args: &[&str]| {
        let out = Command::new(program)
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{program}: {}", text(&out.stderr));
        text(&out.stdout)
    };
    let raw = dir.path().join("web-1.raw");
    fs::File::create(raw).unwrap().set_len(16 << 20).unwrap();
    run(
        "mke2fs",
        &["-q", "-t", "ext4", "-F", "-d", "root", "web-1.raw"],
    );
    let to_qcow2 = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "web-1.raw",
        "web-1.qcow2",
    ];
    run("qemu-img", &to_qcow2);
    let done = inject(dir.path(), "web-1.qcow2", &[]);
    let lines = text(&done.stdout);
    assert!(
        lines.contains("wrote  /etc/adit-guest/policy.toml"),
        "{lines}{}",
        text(&done.stderr)
    );
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "web-1.qcow2",
            "back.raw",
        ],
    );
    let cat = |file: &str| run("debugfs", &["-R", &format!("cat {file}"), "back.raw"]);
    assert_eq!(cat("/etc/adit-guest/policy.toml"), "default = \"deny\"\n");
    let config = cat("/etc/adit-guest/adit-guest.toml");
    assert!(
        config.contains("policy = \"/etc/adit-guest/policy.toml\""),
        "{config}"
    );
}

#[test]
fn what_is_no_image_or_no_agent_is_refused_with_the_remedy() {
    let dir = scene();
    let refused = |out: std::process::Output, code: i32, part: &str| {
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(said.contains(part), "{said}");
    };
    refused(inject(dir.path(), "none.raw", &[]), 1, "No such file");
    refused(
        inject(dir.path(), "agent", &[]),
        1,
        "neither a file system nor a partition table",
    );
    refused(
        inject(dir.path(), "root", &["--partition", "1"]),
        2,
        "is a directory",
    );
    let key = [
        "image", "inject", "root", "--vm-id", "web-1", "--agent", "k.pub",
    ];
    refused(adit(dir.path(), &key), 1, "is no program");
    fs::write(dir.path().join("minimal.toml"), "default = \"allow\"\n").unwrap();
    let bad = "--policy: minimal.toml:1:11: key `default`: ";
    refused(inject(dir.path(), "root", &[]), 1, bad);
    let none = fs::exists(dir.path().join("root/etc/adit-guest")).unwrap();
    assert!(!none, "nothing is written");
}

#[test]
fn an_image_that_has_the_package_needs_no_agent() {
    let dir = scene();
    let unit = dir.path().join("root/usr/lib/systemd/system");
    fs::create_dir_all(&unit).unwrap();
    fs::write(unit.join("adit-guest.service"), "").unwrap();
    // Beside this one there is no agent, and it is not in its place.
    let alone = dir.path().join("adit");
    // By another process: a child that another test starts meanwhile would have it open for writing.
    let mut cp = Command::new("cp");
    let copied = cp.args([Path::new(env!("CARGO_BIN_EXE_adit")), &alone]);
    assert!(copied.status().unwrap().success());
    let inject = |root: &str| {
        let mut adit = Command::new(&alone);
        adit.args([
            "image", "inject", root, "--init", "none", "--vm-id", "web-1",
        ]);
        adit.current_dir(dir.path()).output().unwrap()
    };
    let done = inject("root");
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stdout).contains("(package adit-guest)"));
    if !Path::new("/usr/lib/adit/adit-guest").exists() {
        fs::create_dir(dir.path().join("bare")).unwrap();
        assert!(text(&inject("bare").stderr).contains("error[no-agent]"));
    }
}

#[test]
fn a_card_goes_in_if_it_is_one_and_of_this_vm() {
    let dir = scene();
    let run = |args: &[&str]| adit(dir.path(), args);
    assert!(
        run(&["key", "new", "enrol.key", "--role", "card"])
            .status
            .success()
    );
    let card = run(&["card", "new", "web-2", "--sign", "enrol.key"]).stdout;
    fs::write(dir.path().join("web-2.card"), &card).unwrap();
    let with = |more: &[&str]| {
        let args = [
            "image", "inject", "root", "--agent", "agent", "--trust", "k.pub",
        ];
        run(&[&args[..], more].concat())
    };
    let done = with(&["--card", "web-2.card", "--trust", "enrol.key.pub"]);
    let lines = text(&done.stdout);
    assert!(
        lines.contains("wrote  /etc/adit/card"),
        "{lines}{}",
        text(&done.stderr)
    );
    assert!(
        !lines.contains("no --vm-id") && !lines.contains("--trust counts"),
        "{lines}"
    );
    assert_eq!(
        fs::read(dir.path().join("root/etc/adit/card")).unwrap(),
        card
    );
    // A key that would not count, which the image may have already.
    assert!(text(&with(&["--card", "web-2.card"]).stdout).contains("none of the keys of --trust"));
    let trusted = ["--trust", "enrol.key.pub"];
    let foreign = with(&[&["--card", "web-2.card", "--vm-id", "web-1"], &trusted[..]].concat());
    assert!(text(&foreign.stderr).contains("the card is for web-2, and this is web-1"));
    let damaged = with(&[&["--card", "k.pub"], &trusted[..]].concat());
    assert!(text(&damaged.stderr).contains("--card: k.pub: it is damaged"));
    assert_eq!(
        (foreign.status.code(), damaged.status.code()),
        (Some(1), Some(1))
    );
}

#[test]
fn a_cloud_config_has_the_same_files() {
    use base64::Engine;
    let dir = scene();
    let args = [&["image", "cloud-init"], &WHAT[..]].concat();
    let printed = text(&adit(dir.path(), &args).stdout);
    let json = printed.strip_prefix("#cloud-config\n").unwrap();
    let config: serde_json::Value = serde_json::from_str(json).unwrap();
    assert!(inject(dir.path(), "root", &[]).status.success());
    let files = config["write_files"].as_array().unwrap();
    assert_eq!(files.len(), 5);
    for file in files {
        let path = file["path"].as_str().unwrap().trim_start_matches('/');
        let content =
            base64::engine::general_purpose::STANDARD.decode(file["content"].as_str().unwrap());
        assert_eq!(
            content.unwrap(),
            fs::read(dir.path().join("root").join(path)).unwrap(),
            "{path}"
        );
        let mode = if path.starts_with("etc/adit-guest") {
            "0600"
        } else {
            "0"
        };
        assert!(
            file["permissions"].as_str().unwrap().starts_with(mode),
            "{path}"
        );
    }
    let last = config["runcmd"].as_array().unwrap().last().unwrap();
    assert_eq!(last[3], "adit-guest.service");
}

/// The program of a real agent has megabytes, which cloud-init would read as YAML several times.
#[test]
fn a_large_program_is_a_script_beside_the_cloud_config() {
    let dir = scene();
    let mut agent = b"\x7fELF and more".to_vec();
    agent.extend((0..300_000_u32).map(|n| (n % 251) as u8));
    fs::write(dir.path().join("agent"), &agent).unwrap();
    let args = [&["image", "cloud-init"], &WHAT[..]].concat();
    let printed = text(&adit(dir.path(), &args).stdout);
    let (head, parts) = printed.split_once("\n\n").unwrap();
    let boundary = format!("--{}", head.split('"').nth(1).unwrap());
    let parts: Vec<_> = parts.split(&boundary).map(str::trim_end).collect();
    let [_, config, script, "--"] = parts[..] else {
        panic!("{} parts", parts.len())
    };
    let body = |part: &str, of: &str| {
        let (head, body) = part.split_once("\n\n").unwrap();
        assert!(head.contains(&format!("Content-Type: {of}")), "{head}");
        body.to_owned()
    };
    let config = body(config, "text/cloud-config");
    let json = config.strip_prefix("#cloud-config\n").unwrap();
    let config: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(config["write_files"].as_array().unwrap().len(), 4);
    // As cloud-init does, but elsewhere.
    let to = dir.path().join("it's/sbin/adit-guest");
    let quoted = to.to_str().unwrap().replace('\'', "'\\''");
    let script = body(script, "text/x-shellscript");
    let script = script.replace("'/usr/sbin/adit-guest'", &format!("'{quoted}'"));
    fs::write(dir.path().join("script"), script).unwrap();
    let ran = Command::new("sh").arg(dir.path().join("script")).output();
    assert!(ran.as_ref().unwrap().status.success(), "{ran:?}");
    assert_eq!(fs::read(&to).unwrap(), agent);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        fs::metadata(&to).unwrap().permissions().mode() & 0o777,
        0o755
    );
}
