//! What a draft may say, and in which words its mistakes are told.

use super::*;
use crate::goal::tests::{file, script};

const GOOD: &str = "valid_for: 2h\nsteps:\n  - id: hello\n    script:\n      interpreter: /bin/sh\n      script: |\n        echo hi\n  - id: motd\n    file: {path: /etc/motd, content: hi}\n";

#[test]
fn yaml_becomes_a_goal_that_every_reader_accepts() {
    let now: Timestamp = "2026-11-20T22:00:00Z".parse().unwrap();
    let inputs = Inputs {
        goal_id: Uuid::nil(),
        key_seq: 9,
        vms: vec!["web-1".parse().unwrap()],
        now,
    };
    let payload = Draft::parse(GOOD, "g.yaml")
        .unwrap()
        .into_payload(inputs)
        .unwrap();
    let goal = Goal::parse_unverified(&payload).unwrap();
    assert_eq!(goal.not_after.to_string(), "2026-11-21T00:00:00Z");
    assert_eq!(script(&goal.steps[0]).script, "echo hi\n");
}

#[test]
fn mistakes_are_told_in_the_words_of_whoever_wrote_the_draft() {
    let script = "interpreter: /bin/sh";
    let and = |more: &str| format!("{script}\n      {more}");
    for (from, to, says) in [
        (
            script,
            and("timeout_s: soon"),
            "`steps[0].script.timeout_s`: must be a whole number",
        ),
        (
            script,
            and("timeout_s: -1"),
            "`steps[0].script.timeout_s`: must be a whole number",
        ),
        (
            script,
            and("args: one"),
            "`steps[0].script.args`: must be a list",
        ),
        (
            script,
            and("args: [[1]]"),
            "`steps[0].script.args[0]`: must be text",
        ),
        (
            script,
            and("env: []"),
            "`steps[0].script.env`: must be a mapping",
        ),
        (
            script,
            and("cwd: [a]"),
            "`steps[0].script.cwd`: must be text",
        ),
        (script, and("cwd: ~"), "`steps[0].script.cwd`: must be text"),
        (
            script,
            and("interpreter: /bin/sh"),
            "`interpreter` is given twice",
        ),
        (
            script,
            "interpeter: /bin/sh".into(),
            "unknown key `interpeter`; it could be `interpreter`, `script`",
        ),
        (script, String::new(), "`interpreter` is missing"),
        (
            "{path: /etc/motd, content: hi}",
            "motd".into(),
            "`steps[1].file`: must be a mapping",
        ),
        (
            "{path: /etc/motd, content: hi}",
            "[a, b]".into(),
            "`steps[1].file`: must be a mapping",
        ),
        (
            "id: motd",
            "idempotent: 7\n    id: motd".into(),
            "`steps[1].idempotent`: must be true or false",
        ),
    ] {
        let e = Draft::parse(&GOOD.replacen(from, &to, 1), "g.yaml")
            .unwrap_err()
            .to_string();
        assert!(e.contains(says), "{to}: {e}");
        for jargon in [
            "struct",
            "invalid",
            "field",
            "u32",
            "Option",
            "DuplicateKeyPolicy",
            "deserialize",
        ] {
            assert!(!e.contains(jargon), "{to}: {e}");
        }
    }
    for text in ["", "hello", "[]", "steps: 5", "steps: {}", "steps: [hello]"] {
        let e = Draft::parse(text, "g.yaml").unwrap_err().to_string();
        for jargon in ["struct", "invalid", "field", "expected"] {
            assert!(!e.contains(jargon), "{text}: {e}");
        }
    }
}

/// A text with each of its words replaced by other values, and cut and broken at each place.
fn mistakes(text: &str) -> impl Iterator<Item = String> {
    const VALUES: [&str; 24] = [
        "null",
        "true",
        "1",
        "-1",
        "1.5",
        "1e400",
        "99999999999999999999999999999999999999999",
        "x",
        "\"\"",
        "[]",
        "{}",
        "[[1]]",
        "{a: 1}",
        "[null]",
        "~",
        "|",
        "&a *a",
        "*a",
        "!!binary x",
        "!x y",
        "<<",
        "!!int x",
        "2026-01-01",
        "a\n--- b",
    ];
    let word = |c: char| c.is_alphanumeric() || "\"'/_-.".contains(c);
    let places = || text.char_indices().map(|(at, _)| at);
    let words = places().filter(move |&at| {
        let before = text[..at].chars().next_back();
        text[at..].starts_with(word) && !before.is_some_and(word)
    });
    let replaced = words.flat_map(move |at| {
        let end = text[at..].find(|c| !word(c)).map_or(text.len(), |n| at + n);
        VALUES.map(|v| format!("{}{v}{}", &text[..at], &text[end..]))
    });
    let broken = places().flat_map(move |at| {
        ["", "\"", "{", "]", ":", "\t", "\n", "*", "&", "!", "\0"]
            .map(|c| format!("{}{c}{}", &text[..at], &text[at..]))
    });
    let cut = places().map(move |at| text[..at].to_owned());
    replaced.chain(broken).chain(cut)
}

#[test]
fn no_mistake_is_told_in_the_words_of_a_library() {
    let all = "valid_for: 2h\nsteps:\n  - id: hello\n    script:\n      interpreter: /bin/sh\n      \
               timeout_s: 7\n      success_codes: [0, 1]\n      args: [a]\n      env: {A: b}\n      \
               script: x\n  - id: motd\n    idempotent: true\n    \
               file: {path: /etc/motd, content: hi, mode: '0644'}\n";
    let draft = |text: String| Some(Draft::parse(&text, "g.yaml").err()?.to_string());
    let goal = |text: String| {
        let parsed = Goal::parse_unverified(text.as_bytes());
        Some(parsed.err()?.to_string())
    };
    let good = crate::goal::tests::GOOD;
    let drafts = mistakes(all).chain(mistakes(good)).filter_map(draft);
    let goals = mistakes(good).filter_map(goal);
    let mut count = 0;
    for e in drafts.chain(goals) {
        count += 1;
        for jargon in [
            "struct ",
            "serializ",
            "from_str",
            "Option<",
            "invalid type",
            "invalid value",
            "scalar into",
            "u16",
            "u32",
            "i32",
            "u64",
            "enum",
            "variant",
            "Policy",
            "formatted UUID",
        ] {
            assert!(!e.contains(jargon), "{e}");
        }
    }
    assert!(count > 1000, "{count}");
}

#[test]
fn what_yaml_reads_otherwise_than_people_do_is_refused_or_text() {
    let with = |step: &str| format!("steps:\n  - id: a\n    {step}\n");
    let file = |mode: &str| with(&format!("file: {{path: /a, content: x, mode: {mode}}}"));
    // 420 and 416 are 0644 and 0640 in decimal; as octal digits they would let others write.
    for mode in ["420", "416", "644", "0x1a4", "0", "4_2_0", "true", "-1"] {
        let e = Draft::parse(&file(mode), "g").unwrap_err().to_string();
        assert!(
            e.contains("`steps[0].file.mode`: must be octal digits in quotes"),
            "{mode}: {e}"
        );
    }
    for mode in ["0644", "0o644", "'0644'", "\"644\""] {
        let draft = Draft::parse(&file(mode), "g").unwrap();
        assert_eq!(
            self::file(&draft.steps[0]).mode_bits(),
            Some(0o644),
            "{mode}"
        );
    }
    let env =
        with("script: {interpreter: /bin/sh, script: x, env: {A: no, B: 010, C: 1e3, D: 1.0}}");
    let draft = Draft::parse(&env, "g").unwrap();
    let env = &script(&draft.steps[0]).env;
    assert_eq!(
        env.values().collect::<Vec<_>>(),
        ["no", "010", "1e3", "1.0"]
    );
    let script = with("script: {interpreter: /bin/sh, script: x}");
    let two = Draft::parse(&(script.clone() + "---\n" + &script), "g").unwrap_err();
    assert!(two.to_string().contains("more than one document"), "{two}");
    let mut bomb = String::from("- &a0 [x, x]\n");
    for n in 0..40 {
        bomb += &format!("        - &a{} [*a{n}, *a{n}]\n", n + 1);
    }
    let bomb = with(&format!(
        "script:\n      interpreter: /bin/sh\n      script: x\n      args:\n        {bomb}"
    ));
    assert!(Draft::parse(&bomb, "g").is_err());
    let long = Draft::parse(&("valid_for: 99999999d\n".to_owned() + &script), "g").unwrap();
    let inputs = Inputs {
        goal_id: Uuid::nil(),
        key_seq: 9,
        vms: vec!["web-1".parse().unwrap()],
        now: "2026-11-20T22:00:00Z".parse().unwrap(),
    };
    let long = long.into_payload(inputs).unwrap_err().to_string();
    assert_eq!(
        long,
        "`valid_for`: `99999999d` is too long: it ends after the year 9999"
    );
}

#[test]
fn mistakes_name_file_line_and_key() {
    for (from, to, line, says) in [
        ("interpreter:", "interpeter:", 5, "interpeter"),
        ("    file:", "    id: x\n    file:", 9, "id"),
        ("valid_for: 2h", "valid_fr: 2h", 1, "valid_fr"),
    ] {
        let e = Draft::parse(&GOOD.replacen(from, to, 1), "g.yaml").unwrap_err();
        let DraftError::Parse {
            line: at, message, ..
        } = &e
        else {
            panic!("{e}")
        };
        assert!(message.contains(says), "{e}");
        assert_eq!(*at, line, "{e}");
    }
    for (from, to, at, key) in [
        ("/bin/sh", "sh", "5:20", "steps[0].script.interpreter"),
        ("/etc/motd", "etc", "9:18", "steps[1].file.path"),
        (
            "content: hi",
            "mode: \"9\", content: hi",
            "9:35",
            "steps[1].file.mode",
        ),
        (
            "echo hi\n",
            "id: x\n  - id: hello\n    script: {interpreter: /bin/sh, script: x}\n",
            "8:9",
            "steps[1].id",
        ),
        ("2h", "2 hours", "1:12", "valid_for"),
        ("2h", "+2h", "1:12", "valid_for"),
    ] {
        let e = Draft::parse(&GOOD.replacen(from, to, 1), "g.yaml").unwrap_err();
        assert!(
            e.to_string().starts_with(&format!("g.yaml:{at}: `{key}`")),
            "{e}"
        );
    }
}
