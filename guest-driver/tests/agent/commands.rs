//! The commands that answer a person, and what becomes of an agent that cannot be configured.

use std::fs::{self, File};
use std::io;
use std::process::{Command, Output, Stdio};

use adit_guest_driver::config::BAD_CONFIG;

use crate::host::Host;

pub fn agent(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit-guest"));
    command.args(args).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn its_version_begins_with_its_name() {
    for how in ["--version", "version"] {
        let said = text(&agent(&[how]).output().unwrap().stdout);
        assert_eq!(said, format!("adit-guest {}\n", env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn output_that_nobody_reads_or_that_does_not_fit_is_no_panic() {
    let host = Host::new();
    let path = host.path("adit-guest.toml").display().to_string();
    let root = host.path("root").display().to_string();
    let install = [
        "install",
        "--root",
        &root,
        "--vm-id",
        "web-1",
        "--init",
        "none",
        "--binary",
        "/bin/true",
    ];
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for args in [
        &["version"][..],
        &["--version"],
        &["--help"],
        &["check-config", &path],
        &["status", "--config", &path],
        &install,
    ] {
        let (reader, closed) = io::pipe().unwrap();
        drop(reader);
        let unread = agent(args).stdout(closed).output().unwrap();
        assert_eq!(
            unread.status.code(),
            Some(141),
            "{args:?}: {}",
            text(&unread.stderr)
        );
        let lost = agent(args).stdout(full()).output().unwrap();
        let said = text(&lost.stderr);
        assert!(!said.contains("panicked"), "{args:?}: {said}");
        if !args[0].starts_with('-') {
            assert_eq!(lost.status.code(), Some(1), "{args:?}");
            assert!(said.contains("standard output"), "{args:?}: {said}");
        }
        // And nowhere to complain.
        let lost = agent(args).stdout(full()).stderr(full()).status().unwrap();
        assert_ne!(lost.code(), Some(101), "{args:?}");
    }
    let mute = agent(&["check-config", "/nonexistent"])
        .stderr(full())
        .status();
    assert_eq!(mute.unwrap().code(), Some(BAD_CONFIG.into()));
}

#[test]
fn a_configuration_that_cannot_be_used_ends_the_agent_with_one_line_and_a_status_of_its_own() {
    let host = Host::new();
    let path = host.path("adit-guest.toml");
    let name = path.display().to_string();
    let ended = |out: Output, line: usize| {
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(BAD_CONFIG.into()), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        let place = match line {
            0 => format!("adit-guest: {name}: "),
            line => format!("adit-guest: {name}:{line}: "),
        };
        assert!(said.starts_with(&place), "{said}");
    };
    for (config, line) in [
        (Some("vm_id = \"web-1\"\nallow_port = [80]\n"), 2),
        (Some("vm_id = \"web-1\"\nallow_ports = [0]\n"), 2),
        (Some("vm_id = \"Web\"\n"), 1),
        (Some("vm_id = \"web-1\"\n\n[file\n"), 3),
        (None, 0),
    ] {
        match config {
            Some(config) => fs::write(&path, config).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        ended(agent(&["run", "--config", &name]).output().unwrap(), line);
        ended(agent(&["check-config", &name]).output().unwrap(), line);
    }
}

#[test]
fn check_config_shows_what_is_in_force_and_whom_the_guest_trusts() {
    let host = Host::new();
    let path = host.path("adit-guest.toml");
    let name = path.display().to_string();
    fs::write(host.path("trust/bad.pub"), "ssh-ed25519 AAAA").unwrap();
    let config = fs::read_to_string(&path).unwrap();
    let services = "[[service]]\nname = \"docker\"\nto = \"unix:/run/docker.sock\"\n";
    fs::write(&path, format!("allow_ports = [80, 22]\n{config}{services}")).unwrap();
    let out = agent(&["check-config", &name]).output().unwrap();
    let said = text(&out.stdout);
    assert!(out.status.success() && out.stderr.is_empty(), "{said}");
    let key = adit_tasks::PublicKey::of(&host.key, "test");
    let value = |key: &str| {
        let line = said.lines().find(|l| l.starts_with(key));
        line.unwrap_or_else(|| panic!("no {key}: {said}"))[key.len()..]
            .trim()
            .to_owned()
    };
    for (name, want) in [
        ("vm_id", "web-1".to_owned()),
        ("state_dir", host.path("state").display().to_string()),
        ("allow_ports", "80, 22".into()),
        ("services", "docker = unix:/run/docker.sock".into()),
        ("clock", "own".into()),
        ("script.enabled", "true".into()),
        ("file.roots", host.path("root").display().to_string()),
        ("trusted key", format!("{} goal test", key.id())),
    ] {
        assert_eq!(value(name), want, "{said}");
    }
    let bad = host.path("trust/bad.pub").display().to_string();
    assert!(value("not trusted").starts_with(&bad), "{said}");
}
