//! What a policy file may say, that each mistake is told with its place, and that no bytes do harm.

use super::*;
use crate::policy::keys::KEYS;

const EXAMPLE: &str = include_str!("../../../dist/policy.toml.example");

fn wrong(text: &str) -> Vec<Problem> {
    match parse(text.as_bytes()) {
        Err(problems) => problems,
        Ok(policy) => panic!("it is taken: {text}\n{policy:?}"),
    }
}

/// The only mistake of a text behind a good first line.
fn only(rules: &str) -> Problem {
    let mut problems = wrong(&format!("default = \"deny\"\n{rules}"));
    assert_eq!(problems.len(), 1, "{rules}: {problems:?}");
    problems.remove(0)
}

#[test]
fn the_example_is_a_policy_and_has_every_key_and_no_other() {
    let policy = parse(EXAMPLE.as_bytes()).unwrap();
    assert_eq!(
        (policy.steps.len(), policy.services.len(), policy.exec.len()),
        (2, 1, 1)
    );
    let mut section = "";
    let mut found = Vec::new();
    for line in EXAMPLE.lines() {
        if let Some(name) = line.strip_prefix("[[") {
            section = name.trim_end_matches(']');
            continue;
        }
        let Some((key, _)) = line.trim_start_matches('#').split_once(" = ") else {
            continue;
        };
        if key.bytes().all(|b| b.is_ascii_lowercase()) {
            found.push((section, key));
        }
    }
    for key in KEYS {
        assert!(found.contains(&(key.section, key.name)), "{key:?}");
    }
    for (section, key) in found {
        assert!(keys::of(section).any(|k| k.name == key), "{section}.{key}");
    }
    // Each key that is commented out can be taken in.
    let all: String = EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(code) if code.starts_with(|c: char| c.is_ascii_lowercase()) => code,
            _ => line,
        })
        .map(|line| format!("{line}\n"))
        .collect();
    assert!(
        parse(
            all.replace("allow = \"off\"", "allow = \"ticket\"")
                .as_bytes()
        )
        .is_ok(),
        "{all}"
    );
}

#[test]
fn a_mistake_names_line_column_and_key() {
    for (rules, line, column, key) in [
        (
            "[[step]]\nkind = [\"script\"]\nkinds = [\"script\"]\nusers = \"any\"\n",
            3,
            1,
            "kind",
        ),
        (
            "[[steps]]\nkinds = [\"script\"]\nusers = \"any\"\n",
            2,
            3,
            "steps",
        ),
        ("[[step]]\nkinds = [\"script\"]\n", 2, 1, "users"),
        (
            "[[step]]\nkinds = [\"file\"]\nusers = \"any\"\n",
            2,
            1,
            "roots",
        ),
        (
            "[[step]]\nkinds = [\"script\", \"Ä\"]\nusers = \"any\"\n",
            3,
            20,
            "kinds",
        ),
        (
            "[[step]]\nkinds = \"script\"\nusers = \"any\"\n",
            3,
            9,
            "kinds",
        ),
        (
            "[[step]]\nkinds = [\"script\"]\nusers = [\"ä\", \"any\"]\n",
            4,
            15,
            "users",
        ),
        (
            "[[step]]\nkinds = [\"script\"]\nusers = \"root\"\n",
            4,
            9,
            "users",
        ),
        (
            "[[step]]\nkinds = [\"script\"]\nusers = []\n",
            4,
            9,
            "users",
        ),
        (
            "[[step]]\nkinds = [\"script\"]\nusers = \"any\"\nroots = [\"/srv\"]\n",
            2,
            1,
            "kinds",
        ),
        (
            "[[step]]\nkinds = [\"script\", \"file\"]\nusers = \"any\"\nroots = [\"/srv\"]\n",
            2,
            1,
            "kinds",
        ),
        (
            "[[step]]\nkinds = [\"file\"]\nusers = \"any\"\nroots = [\"/a\", \"/srv/\"]\n",
            5,
            16,
            "roots",
        ),
        (
            "[step]\nkinds = [\"script\"]\nusers = \"any\"\n",
            2,
            2,
            "step",
        ),
        ("step = [1]\n", 2, 9, "step"),
        (
            "[[service]]\nnames = [\"ping\", \"tcp:080\"]\n",
            3,
            18,
            "names",
        ),
        ("[[service]]\nnames = [80]\n", 3, 10, "names"),
        (
            "[[service]]\nusers = \"any\"\nnames = [\"ping\"]\n",
            3,
            1,
            "users",
        ),
        ("[[exec]]\nallow = true\n", 3, 9, "allow"),
        ("[[files]]\nallow = true\n", 3, 9, "allow"),
        ("[[files]]\nallow = \"off\"\nread = \"any\"\n", 4, 1, "read"),
        (
            "[[files]]\nallow = \"host\"\nusers = \"any\"\n",
            2,
            1,
            "files",
        ),
        (
            "[[files]]\nallow = \"host\"\nusers = \"any\"\nread = [\"/srv/\"]\n",
            5,
            9,
            "read",
        ),
        (
            "[[exec]]\nallow = \"off\"\nusers = \"any\"\n",
            4,
            1,
            "users",
        ),
        (
            "[[exec]]\nallow = \"host\"\nusers = \"any\"\n",
            2,
            1,
            "commands",
        ),
        (
            "[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = [\"ls\"]\n",
            5,
            13,
            "commands",
        ),
    ] {
        let found = only(rules);
        let at = (found.line, found.column, found.key.as_deref());
        assert_eq!(at, (line, column, Some(key)), "{rules}: {found}");
        let said = format!("{line}:{column}: key `{key}`: ");
        assert!(found.to_string().starts_with(&said), "{found}");
    }
    for (text, line) in [
        ("", 1),
        ("[[service]]\nnames = [\"ping\"]\n", 1),
        ("default = \"allow\"\n", 1),
    ] {
        let found = wrong(text);
        assert_eq!(
            (found[0].line, found[0].key.as_deref()),
            (line, Some("default")),
            "{text}"
        );
    }
}

#[test]
fn every_mistake_is_told_at_once_and_in_its_order() {
    let text = "[[service]]\nnames = [\"Ping\", \"tcp:0\"]\n[[exec]]\nallow = \"on\"\n[[step]]\nkinds = []\nusers = [-1]\n";
    let found = wrong(text);
    let lines: Vec<_> = found.iter().map(|p| p.line).collect();
    assert_eq!(lines, [1, 2, 2, 4, 6, 7], "{found:?}");
    let many = format!(
        "default = \"deny\"\n[[service]]\nnames = [{}]\n",
        "\"X\",".repeat(200)
    );
    assert_eq!(wrong(&many).len(), PROBLEMS_MAX);
}

/// A rule of `off` beside one that allows was settled by the order elsewhere, which nobody knows by heart.
#[test]
fn two_rules_that_contradict_are_a_mistake_and_none_of_them_wins() {
    let on = "[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n";
    let off = "[[exec]]\nallow = \"off\"\n";
    for (rules, line, names) in [
        (format!("{on}{off}"), 2, "line 7"),
        (format!("{off}{on}"), 4, "line 3"),
    ] {
        let found = only(&rules);
        assert!(
            found.line == line && found.message.contains(names),
            "{found}"
        );
    }
    assert!(parse(format!("default = \"deny\"\n{off}{off}").as_bytes()).is_ok());
}

/// Patterns, prefixes and negations of other files of this sort mean more than whoever wrote them thought.
#[test]
fn what_looks_like_a_pattern_a_group_or_a_negation_is_a_mistake() {
    for user in [
        "*",
        "www-*",
        "!root",
        "%wheel",
        "#1000",
        "any",
        "",
        "a b",
        "a:b",
        "+5",
        "-1",
        "4294967295",
        "4294967296",
        "8589934592",
    ] {
        let found = only(&format!(
            "[[step]]\nkinds = [\"script\"]\nusers = [\"{user}\"]\n"
        ));
        assert_eq!(found.key.as_deref(), Some("users"), "{user}");
    }
    for number in ["-1", "4294967295", "4294967296", "1.5", "true", "[0]", "{}"] {
        let found = only(&format!(
            "[[step]]\nkinds = [\"script\"]\nusers = [{number}]\n"
        ));
        assert_eq!(
            (found.line, found.key.as_deref()),
            (4, Some("users")),
            "{number}"
        );
    }
    for name in [
        "tcp:*",
        "tcp:1-80",
        "tcp:",
        "tcp",
        "tcp:65536",
        "PING",
        "ping ",
        "*",
    ] {
        only(&format!("[[service]]\nnames = [\"{name}\"]\n"));
    }
    for root in [
        "/srv/*/a/..",
        "srv",
        "",
        "/srv/",
        "//srv",
        "/srv/../etc",
        "/./srv",
        "~/a",
        "/a\\u0000b",
    ] {
        only(&format!(
            "[[step]]\nkinds = [\"file\"]\nusers = [0]\nroots = [\"{root}\"]\n"
        ));
    }
}

#[test]
fn kinds_and_services_of_later_versions_are_names() {
    let text = "default = \"deny\"\n[[step]]\nkinds = [\"package\", \"reboot\"]\nusers = [\"root\"]\n[[service]]\nnames = [\"unix:docker.sock\", \"blob\", \"exec\"]\n";
    let policy = parse(text.as_bytes()).unwrap();
    assert_eq!(policy.steps[0].kinds.value, ["package", "reboot"]);
    assert_eq!(policy.services[0].names.len(), 3);
}

#[test]
fn the_limits_of_a_file_are_reached_and_not_passed() {
    let service = "[[service]]\nnames = [\"ping\"]\n";
    let with = |n: usize| format!("default = \"deny\"\n{}", service.repeat(n));
    assert!(parse(with(RULES_MAX).as_bytes()).is_ok());
    assert_eq!(
        wrong(&with(RULES_MAX + 1))[0].key.as_deref(),
        Some("service")
    );
    let list = |n: usize| {
        format!(
            "default = \"deny\"\n[[service]]\nnames = [{}]\n",
            "\"ping\",".repeat(n)
        )
    };
    assert!(parse(list(ENTRIES_MAX).as_bytes()).is_ok());
    assert_eq!(
        wrong(&list(ENTRIES_MAX + 1))[0].key.as_deref(),
        Some("names")
    );
    let mut long = b"default = \"deny\"\n#".to_vec();
    long.resize(FILE_MAX, b'x');
    assert!(parse(&long).is_ok());
    long.push(b'x');
    assert!(parse(&long).unwrap_err()[0].message.contains("bytes"));
    let kind = |n: usize| {
        format!(
            "default = \"deny\"\n[[step]]\nkinds = [\"{}\"]\nusers = [0]\n",
            "k".repeat(n)
        )
    };
    assert!(
        parse(kind(KIND_MAX).as_bytes()).is_ok() && parse(kind(KIND_MAX + 1).as_bytes()).is_err()
    );
}

/// A file that cannot be read as a whole was an empty policy elsewhere, or the one of the factory.
#[test]
fn what_is_no_whole_toml_is_no_policy_at_all() {
    let good = "default = \"deny\"\n[[service]]\nnames = [\"ping\"]\n";
    for broken in [
        format!("{good}}}\n"),
        format!("{good}[[step]\n"),
        format!("{good}names = [\"ping\"]\n"),
        format!("{good}[[service]]\nnames = [\"ping\"\n"),
        format!("{good}\0"),
        format!("{good}# \0\n"),
        format!("{good}default = \"deny\"\n"),
        good.replace("deny", "de\u{7}ny"),
        format!("{good}x = {}{}\n", "[".repeat(5000), "]".repeat(5000)),
        format!("{good}x = {}1{}\n", "{a = ".repeat(5000), "}".repeat(5000)),
        format!("{good}[{}]\n", vec!["a"; 5000].join(".")),
        good.replace('=', ":"),
        "{\"default\": \"deny\"}".into(),
    ] {
        for p in wrong(&broken) {
            let said = p.to_string();
            assert!(p.line >= 1 && p.column >= 1, "{said}");
            assert!(!said.contains('\n') && said.len() < 1000, "{said}");
        }
    }
    let utf16: Vec<u8> = good.encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(parse(&utf16).is_err());
    let latin1 = b"default = \"deny\"\n# f\xfcr\n";
    let found = parse(latin1).unwrap_err();
    assert_eq!((found[0].line, found[0].column), (2, 4));
    assert!(found[0].message.contains("UTF-8"));
    // An editor's mark at the beginning is no text, and neither are its line ends.
    assert!(parse(format!("\u{feff}{good}").as_bytes()).is_ok());
    assert!(parse(good.replace('\n', "\r\n").as_bytes()).is_ok());
}
