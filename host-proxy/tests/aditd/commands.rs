//! What `aditd` prints: its own name, what a configuration makes it serve, what is wrong with one.

use std::process::{Command, Output, Stdio};

fn aditd(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aditd"));
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn it_says_its_own_name_and_version() {
    let said = aditd(&["--version"]).stdout;
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(text(&said), format!("aditd {version}\n"));
}

#[test]
fn a_checked_configuration_is_summed_up_and_every_mistake_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.toml");
    let path = path.to_str().unwrap();
    let good = "run_dir = \"/run/x\"\n[metrics]\nlisten = \"127.0.0.1:7081\"\n[[vm]]\nname = \"web-1\"\ncid = 3\n\
                allow = [80, 22]\nallow_vsock = [5000]\n";
    std::fs::write(path, good).unwrap();
    let checked = aditd(&["check-config", path]);
    assert!(checked.status.success());
    for word in [
        "web-1",
        "cid 3",
        "80, 22",
        "5000",
        "127.0.0.1:7080",
        "127.0.0.1:7081",
        "/run/x/aditd.sock",
        // A file of before grants is told what it needs.
        "[[grant]]",
    ] {
        let said = text(&checked.stdout);
        assert!(said.contains(word), "{word}: {said}");
    }
    std::fs::write(
        path,
        format!("{good}alow = [1]\n[limits]\nkept_days = -1\n"),
    )
    .unwrap();
    let checked = aditd(&["check-config", path]);
    let said = text(&checked.stderr);
    assert_eq!(checked.status.code(), Some(1));
    assert!(said.contains(&format!("{path}:9: `alow`")), "{said}");
    assert!(said.contains(&format!("{path}:11: `kept_days`")), "{said}");
}

#[test]
fn sections_that_are_wrong_are_named_with_line_key_and_what_each_takes() {
    let dir = tempfile::tempdir().unwrap();
    let (path, map) = (dir.path().join("aditd.toml"), dir.path().join("map"));
    let path = path.to_str().unwrap();
    let pin = "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let beta =
        format!("[[host]]\nname = \"beta\"\naddress = \"127.0.0.1:7443\"\npin = \"{pin}\"\n");
    let of_map = format!("[peers]\nmap = \"{}\"\n{beta}", map.display());
    for (config, rows, says) in [
        (
            "[[listen]]\nspeak = \"dns\"\naddress = \"0.0.0.0:53\"\n",
            "",
            &[":3: `address`", "no loopback address", "`open = true`"][..],
        ),
        (
            "[[listen]]\nspeak = \"dns\"\naddress = \"127.0.0.1:53\"\nnetwrk = \"lab\"\n",
            "",
            &[":4: `netwrk`", "no such key", "did you mean `network`"],
        ),
        (
            "[[host]]\nname = \"beta\"\n",
            "",
            &[
                ":1: `address`",
                "missing in this [[host]]",
                "it takes an IP address",
                ":1: `pin`",
            ],
        ),
        (
            &of_map,
            "a beta\nb\n",
            &[":2: `map`", "line 2", "two words, a VM and its host"],
        ),
        (
            &of_map,
            "a gamma\n",
            &[":2: `map`", "line 1", "no [[host]] `gamma`"],
        ),
        (
            &of_map,
            "a beta\na beta\n",
            &["line 2", "has a row already"],
        ),
    ] {
        std::fs::write(path, config).unwrap();
        std::fs::write(&map, rows).unwrap();
        let checked = aditd(&["check-config", path]);
        let said = text(&checked.stderr);
        assert_eq!(checked.status.code(), Some(1), "{config}: {said}");
        for words in says {
            assert!(said.contains(words), "{config}: no `{words}` in {said}");
        }
    }
}

#[test]
fn a_database_of_a_newer_aditd_is_named_before_anything_is_started_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.toml");
    std::fs::write(&path, format!("state_dir = {:?}\n", dir.path())).unwrap();
    let path = path.to_str().unwrap();
    let check = || aditd(&["check-config", "--database", path]);
    assert!(check().status.success(), "there is none yet");
    let database = rusqlite::Connection::open(dir.path().join("aditd.db")).unwrap();
    database.pragma_update(None, "user_version", 99).unwrap();
    let said = check();
    let why = text(&said.stderr);
    assert_eq!(said.status.code(), Some(1), "{why}");
    assert!(why.contains("newer") && why.contains("aditd.db"), "{why}");
    assert!(aditd(&["check-config", path]).status.success());
}

#[test]
fn a_reader_that_has_gone_ends_it_quietly_and_a_full_disk_with_a_word() {
    for args in [&["example-config"][..], &["check-config", "/dev/null"]] {
        let run = |to: Stdio| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_aditd"));
            command.args(args).stdin(Stdio::null()).stdout(to);
            command.output().unwrap()
        };
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let gone = run(writer.into());
        assert_eq!((gone.status.code(), text(&gone.stderr)), (Some(141), ""));
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
        let full = run(full.unwrap().into());
        let said = text(&full.stderr);
        assert_eq!(full.status.code(), Some(1));
        assert!(said.starts_with("aditd: cannot write"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn an_error_that_cannot_be_written_anywhere_is_an_exit_status_and_no_panic() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let mut command = Command::new(env!("CARGO_BIN_EXE_aditd"));
    command.args(["check-config", "/nonexistent"]);
    let status = command.stderr(full.unwrap()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}
