//! That `explain` says what the agent decides, and in which form.

use std::fs;

use clap::Parser;
use proptest::prelude::*;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: PolicyCommand,
}

fn say(args: &[&str]) -> Result<Said, CommandError> {
    let line = Line::parse_from([&["policy"], args].concat());
    run(&line.command)
}

const TEXT: &str = "\
default = \"deny\"
[[step]]
kinds = [\"script\"]
users = [\"nobody\"]
[[step]]
kinds = [\"file\"]
users = [\"root\"]
roots = [\"/srv/www\"]
[[service]]
names = [\"ping\", \"tcp:80\"]
";

struct Room {
    dir: tempfile::TempDir,
}

fn room(config: &str) -> Room {
    let dir = tempfile::tempdir().unwrap();
    let policy = dir.path().join("policy.toml");
    fs::write(&policy, TEXT).unwrap();
    let text = format!("policy = \"{}\"\n{config}", policy.display());
    fs::write(dir.path().join("adit-guest.toml"), text).unwrap();
    Room { dir }
}

impl Room {
    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn explain(&self, args: &[&str]) -> (u8, Value, String) {
        let config = self.path("adit-guest.toml");
        let args = [&["explain"], args, &["--config", &config]].concat();
        let text = say(&args).unwrap();
        let json = say(&[&args[..], &["-o", "json"]].concat()).unwrap();
        assert_eq!(text.status, json.status);
        (
            text.status,
            serde_json::from_str(&json.text).unwrap(),
            text.text,
        )
    }
}

#[test]
fn explain_says_the_line_and_both_who_decide() {
    let room = room("allow_ports = [80]\n[file]\nroots = [\"/srv\"]\n");
    let (status, json, text) = room.explain(&["script", "--user", "root"]);
    assert_eq!((status, &json["policy"]["line"]), (1, &json!(4)), "{text}");
    let place = format!("{}:4: ", room.path("policy.toml"));
    assert!(
        text.starts_with("deny: script\n") && text.contains(&place),
        "{text}"
    );
    assert_eq!(json["configuration"]["decision"], "allow");
    let (status, json, text) = room.explain(&["file", "--path", "/srv/www/a"]);
    assert_eq!(
        (status, &json["policy"]["line"], &json["policy"]["root"]),
        (0, &json!(5), &json!("/srv/www")),
        "{text}"
    );
    let (status, json, _) = room.explain(&["dial", "--service", "tcp:80"]);
    assert_eq!((status, &json["policy"]["line"]), (0, &json!(10)));
    // Either forbids.
    let (status, json, _) = room.explain(&["dial", "--service", "tcp:22"]);
    assert_eq!((status, &json["policy"]["line"]), (1, &json!(1)));
    assert_eq!(json["configuration"]["decision"], "deny");
    for (own, args) in [
        ("allow_ports = []\n", &["dial", "--service", "tcp:80"][..]),
        (
            "[file]\nroots = [\"/var\"]\n",
            &["file", "--path", "/srv/www/a"],
        ),
        (
            "[file]\nenabled = false\n",
            &["file", "--path", "/srv/www/a"],
        ),
        (
            "[script]\nenabled = false\n",
            &["script", "--user", "nobody"],
        ),
    ] {
        let (status, json, text) = self::room(own).explain(args);
        assert_eq!(status, 1, "{text}");
        assert_eq!(
            (&json["decision"], &json["policy"]["decision"]),
            (&json!("deny"), &json!("allow"))
        );
        assert_eq!(json["configuration"]["decision"], "deny", "{text}");
    }
}

#[test]
fn the_json_of_both_commands_keeps_its_form() {
    let room = room("");
    let file = room.path("policy.toml");
    let args = [
        "explain",
        "dial",
        "--service",
        "tcp:443",
        "--policy",
        &file,
        "-o",
        "json",
    ];
    let said: Value = serde_json::from_str(&say(&args).unwrap().text).unwrap();
    let want = json!({
        "decision": "deny", "kind": "dial", "configuration": null,
        "policy": {"file": file, "decision": "deny", "line": 1, "root": null, "reason": "no [[service]] names `tcp:443`"},
    });
    assert_eq!(said, want);
    let check = |text: &str| -> (u8, Value) {
        fs::write(&file, text).unwrap();
        let said = say(&["check", &file, "-o", "json"]).unwrap();
        (said.status, serde_json::from_str(&said.text).unwrap())
    };
    let good = "default = \"deny\"\n[[service]]\nnames = [\"ping\"]\n";
    assert_eq!(
        check(good),
        (
            0,
            json!({"file": file, "ok": true, "problems": [], "notes": []})
        )
    );
    let (status, said) = check("default = \"deny\"\n[[service]]\n");
    let problem = json!({"line": 2, "column": 1, "key": "names", "message": "it is missing; it takes a list of names, such as [\"ping\", \"tcp:80\"]"});
    assert_eq!((status, &said["problems"]), (1, &json!([problem])));
}

#[test]
fn check_tells_mistakes_and_notes_and_what_cannot_be_read_is_no_answer() {
    let room = room("");
    let file = room.path("policy.toml");
    let text = "default = \"deny\"\n[[step]]\nkinds = [\"script\", \"reboot\"]\nusers = [\"root\", \"no-such-user\"]\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n";
    fs::write(&file, text).unwrap();
    let said = say(&["check", &file]).unwrap();
    assert_eq!(said.status, 0, "{}", said.text);
    for note in [
        ":3: note: this agent has no kind `reboot`",
        ":4: note: scripts may run as root",
        ":4: note: this system has no user `no-such-user`",
        ":6: note: the host may have commands run as root",
    ] {
        assert!(
            said.text.contains(&format!("{file}{note}")),
            "{note}: {}",
            said.text
        );
    }
    assert!(said.text.ends_with(&format!("{file}: ok, 2 rules\n")));
    fs::write(
        &file,
        text.replace("deny", "allow").replace("[\"root\"", "[\"*\""),
    )
    .unwrap();
    let said = say(&["check", &file]).unwrap();
    assert_eq!(
        (said.status, said.text.lines().count()),
        (1, 2),
        "{}",
        said.text
    );
    assert!(
        said.text
            .starts_with(&format!("{file}:1:11: key `default`: ")),
        "{}",
        said.text
    );
    assert!(say(&["check", "/nowhere/policy.toml"]).is_err());
    assert!(say(&["check", "--config", "/nowhere/adit-guest.toml"]).is_err());
    assert!(
        say(&["explain", "script", "--policy", &file]).is_err(),
        "it has mistakes"
    );
    for usage in [
        &["explain", "file"][..],
        &["explain", "dial"],
        &["explain", "exec"],
        &["explain", "script", "--path", "/a"],
        &["explain", "dial", "--service", "A b"],
    ] {
        fs::write(&file, TEXT).unwrap();
        let args = [usage, &["--policy", &file]].concat();
        assert!(
            matches!(say(&args), Err(CommandError::Usage(_))),
            "{usage:?}"
        );
    }
}

#[test]
fn check_without_a_file_looks_at_the_owner_too() {
    use std::os::unix::fs::PermissionsExt;
    let room = room("");
    let (file, config) = (room.path("policy.toml"), room.path("adit-guest.toml"));
    assert_eq!(say(&["check", "--config", &config]).unwrap().status, 0);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
    let said = say(&["check", "--config", &config]).unwrap();
    assert!(
        said.status == 1 && said.text.contains("chmod go-w"),
        "{}",
        said.text
    );
    assert_eq!(say(&["check", &file]).unwrap().status, 0, "its text only");
    let (status, json, text) = room.explain(&["script"]);
    assert_eq!(
        (status, &json["policy"]["line"]),
        (1, &Value::Null),
        "closed: {text}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn explain_and_the_decision_agree(
        user in prop::sample::select(vec!["root", "nobody", "0", "ghost", "4294967295"]),
        path in prop::sample::select(vec!["/srv/www/a", "/srv/www2/a", "/srv/www/../a", "/etc/passwd", "/srv/www"]),
        service in prop::sample::select(vec!["ping", "tcp:80", "tcp:8", "blob"]),
    ) {
        let room = room("allow_ports = [8, 80]\n[file]\nroots = [\"/srv\"]\n");
        let config = Config::load(Path::new(&room.path("adit-guest.toml"))).unwrap();
        let standing = Standing::at_start(&config);
        let script = standing.step(Touches::script(user)).is_ok();
        prop_assert_eq!(room.explain(&["script", "--user", user]).0 == 0, script);
        let file = standing.step(Touches::file(user, "root", path)).is_ok();
        prop_assert_eq!(room.explain(&["file", "--user", user, "--path", path]).0 == 0, file);
        let dial = standing.dial(&service.parse().unwrap()).is_ok();
        prop_assert_eq!(room.explain(&["dial", "--service", service]).0 == 0, dial);
    }
}
