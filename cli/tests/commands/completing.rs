//! Shell completion: the scripts, and what they are answered.

use serde_json::json;

use crate::fake::{Fake, Say, command, vm};
use crate::text;

/// What bash is answered for a line whose last word is being typed.
fn complete(dir: &std::path::Path, words: &[&str]) -> Vec<String> {
    let args = [&["--", "adit"], words].concat();
    let mut command = command(dir, &args);
    command.env("ADIT_COMPLETE", "bash").env("_CLAP_IFS", "\n");
    command.env("_CLAP_COMPLETE_INDEX", words.len().to_string());
    command.env("_CLAP_COMPLETE_COMP_TYPE", "9");
    let out = command.output().unwrap();
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), "".into()));
    text(&out.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn names_of_vms_are_completed_by_asking_aditd() {
    let fake = Fake::start(|asked| match asked.path.as_str() {
        "/v1/vms" => Say::Json(json!([vm("web-1"), vm("web-2"), vm("db")])),
        _ => Say::Error(404, "unknown-path"),
    });
    for words in [
        &["vm", "show", "we"][..],
        &["wait", "we"],
        &["vm", "set", "we"],
        &["task", "ls", "--vm", "we"],
        &["card", "new", "we"],
    ] {
        assert_eq!(complete(fake.dir(), words), ["web-1", "web-2"], "{words:?}");
    }
    // A list with commas is completed by its last word.
    let words = ["goal", "apply", "g.yaml", "--to", "web-1,d"];
    assert_eq!(complete(fake.dir(), &words), ["web-1,db"]);
    let socket = fake.socket();
    let elsewhere = Fake::absent();
    let words = ["--socket", socket.to_str().unwrap(), "vm", "show", "d"];
    assert_eq!(complete(elsewhere.path(), &words), ["db"]);
}

#[test]
fn without_aditd_there_are_no_names_and_no_word_of_it() {
    let dir = Fake::absent();
    assert_eq!(complete(dir.path(), &["vm", "show", "we"]), [""; 0]);
    for command in ["ls", "show", "set"] {
        let offered = complete(dir.path(), &["vm", ""]);
        assert!(offered.contains(&command.into()), "{offered:?}");
    }
    assert!(complete(dir.path(), &["task", "ls", "--state", "do"]).contains(&"done".into()));
}

#[test]
fn every_shell_has_a_script() {
    let dir = Fake::absent();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let out = command(dir.path(), &["completion", shell])
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        assert!(text(&out.stdout).contains("ADIT_COMPLETE"), "{shell}");
    }
}

#[test]
fn what_is_no_name_is_not_put_into_a_shells_line() {
    let fake = Fake::start(|asked| match asked.path.as_str() {
        "/v1/vms" => Say::Json(json!([
            vm("web-1"),
            vm("web-$(id)"),
            vm("web-\u{9b}31m\nx")
        ])),
        _ => Say::Error(404, "unknown-path"),
    });
    assert_eq!(complete(fake.dir(), &["vm", "show", "we"]), ["web-1"]);
}
