//! Every limit of the table is the limit.

use super::*;

/// Just inside and just outside of every limit that the table names.
#[test]
fn every_limit_of_the_table_is_the_limit_and_is_named() {
    let with = |key: &Key, value: &str| {
        let line = format!("{} = {value}\n", key.name());
        let listen = "listen = \"127.0.0.1:0\"\n";
        match (key.section(), key.name()) {
            // What the section must have besides.
            (many, name) if keys::MANY.iter().any(|(section, _)| *section == many) => {
                let others =
                    keys().filter(|k| k.section() == many && k.is_required() && k.name() != name);
                let others = others.map(|k| format!("{} = {}\n", k.name(), k.example));
                let speak = match (many, name) {
                    ("listen", "to") => "speak = \"any\"\n",
                    ("listen", "port") => "speak = \"tls\"\n",
                    _ => "",
                };
                format!("[[{many}]]\n{}{speak}{line}", others.collect::<String>())
            }
            ("", _) => line,
            (section, "listen") => format!("[{section}]\n{line}"),
            (section @ ("proxy" | "metrics"), _) => format!("[{section}]\n{listen}{line}"),
            (section, _) => format!("[{section}]\n{line}"),
        }
    };
    for key in keys() {
        let (mut good, mut bad): (Vec<String>, Vec<String>) = match key.kind {
            keys::Kind::Number { min, max } => (
                vec![min.to_string(), max.to_string(), format!("0x{max:x}")],
                vec![
                    (i128::from(min) - 1).to_string(),
                    (u128::from(max) + 1).to_string(),
                ],
            ),
            keys::Kind::Numbers { min, max } => {
                let list = |n: usize| format!("{:?}", vec![max; n]);
                let one = |n: i128| format!("[{n}]");
                (
                    vec![one(min.into()), list(ALLOW_MAX)],
                    vec![
                        one(i128::from(min) - 1),
                        one(i128::from(max) + 1),
                        list(ALLOW_MAX + 1),
                        "7".into(),
                    ],
                )
            }
            keys::Kind::PowerOfTwo { max } => (
                vec!["1".into(), max.to_string()],
                vec!["0".into(), "3".into(), (max * 2).to_string()],
            ),
            keys::Kind::Flag => (vec!["true".into()], vec!["1".into()]),
            keys::Kind::Path => (vec!["\"/a\"".into()], vec!["\"a\"".into()]),
            keys::Kind::Address => (vec!["\"[::1]:0\"".into()], vec!["\"127.0.0.1\"".into()]),
            keys::Kind::Uids => (vec!["\"1-2\"".into()], vec!["\"2-1\"".into()]),
            keys::Kind::User => (
                vec!["\"adit\"".into(), "\"_a-1\"".into()],
                vec!["\"root\"".into(), "\"0\"".into(), "\"a b\"".into()],
            ),
            keys::Kind::VmName => (vec!["\"a-b\"".into()], vec!["\"a-\"".into()]),
            keys::Kind::Texts {
                of: keys::Texts::CardKeys,
                ..
            } => {
                let line = key.example.trim_matches(['[', ']']);
                let list = |n: usize| format!("[{}]", vec![line; n].join(", "));
                let for_goals = line.replace("roles=card ", "");
                (
                    vec!["[]".into(), list(1), list(ANCHORS_MAX)],
                    vec![
                        list(ANCHORS_MAX + 1),
                        format!("[{for_goals}]"),
                        line.into(),
                        "[7]".into(),
                        "[\"fleet.key.pub\"]".into(),
                    ],
                )
            }
            keys::Kind::Texts { max, .. } => {
                let one = key
                    .example
                    .trim_matches(['[', ']'])
                    .split(", ")
                    .next()
                    .unwrap();
                let list = |n: usize| format!("[{}]", vec![one; n].join(", "));
                let empty = key.is_required().then(|| "[]".into());
                let bad = [
                    list(max + 1),
                    one.into(),
                    "[7]".into(),
                    "[\"no such\"]".into(),
                ];
                (
                    vec![list(1), list(max), key.example.into()],
                    bad.into_iter().chain(empty).collect(),
                )
            }
            keys::Kind::Listener => (
                vec!["\"[::1]:0\"".into(), "\"unix:/a\"".into()],
                vec!["\"127.0.0.1\"".into(), "\"unix:a\"".into(), "\"/a\"".into()],
            ),
            // `any` needs another key besides, `dns` an address of another kind.
            keys::Kind::Word(words) => (
                words
                    .iter()
                    .filter(|word| !["any", "dns"].contains(*word))
                    .map(|word| format!("\"{word}\""))
                    .collect(),
                vec!["\"HTTP\"".into(), "\"\"".into()],
            ),
            keys::Kind::Destination => (
                vec!["\"a:1\"".into(), "\"vsock-1.a:1\"".into()],
                vec!["\"a\"".into(), "\"a:0\"".into(), "\"127.0.0.1:80\"".into()],
            ),
            keys::Kind::Suffix => (
                vec!["\".adit\"".into(), "\".vm.example.org\"".into()],
                vec!["\"adit\"".into(), "\".\"".into(), "\".a_b\"".into()],
            ),
            keys::Kind::Pin => (
                vec![key.example.into()],
                vec!["\"sha256/\"".into(), key.example.replace("sha256", "sha1")],
            ),
            keys::Kind::Time => (
                vec![
                    "\"2027-01-31T00:00:00Z\"".into(),
                    "\"2027-01-31T00:00:00+01:00\"".into(),
                ],
                vec!["\"2027-01-31\"".into(), "\"never\"".into()],
            ),
            keys::Kind::Device => (
                vec!["\"mgmt0\"".into()],
                vec![
                    "\"a/b\"".into(),
                    "\"\"".into(),
                    "\"sixteen-letters-\"".into(),
                ],
            ),
            keys::Kind::TokenName => (
                vec!["\"a-1\"".into()],
                vec!["\"a b\"".into(), "\"\"".into()],
            ),
            keys::Kind::Sha256 => (
                vec![format!("\"{}\"", "0a".repeat(32))],
                vec![format!("\"{}\"", "0A".repeat(32)), "\"0a\"".into()],
            ),
            keys::Kind::Carrier => (
                vec![
                    "\"auto\"".into(),
                    "\"vhost-user\"".into(),
                    "\"ring\"".into(),
                    "{ hybrid = \"/a/v.sock\" }".into(),
                    "{ hybrid = \"/a/v.sock\", half_closes = true }".into(),
                    format!("{{ hybrid = \"/{}\" }}", "x".repeat(95)),
                    "{ vsock = { cid = 3 } }".into(),
                    "{ auto = { hybrid = \"/a/v.sock\" } }".into(),
                    "{ auto = { hybrid = \"/a/v.sock\", half_closes = true } }".into(),
                ],
                vec![
                    "\"hybrid\"".into(),
                    "{ hybrid = \"v.sock\" }".into(),
                    "{ hybrid = \"/\" }".into(),
                    "{ hybrid = \"/a/../v.sock\" }".into(),
                    "{ hybrid = \"/a\\u0000b\" }".into(),
                    "{ hybrid = 3 }".into(),
                    "{ auto = { hybrid = \"v.sock\" } }".into(),
                    "{ auto = { half_closes = true } }".into(),
                    "{ auto = { hybrid = \"/a\", half_closes = 1 } }".into(),
                    "{ auto = { hybrid = \"/a\", x = true } }".into(),
                    "{ auto = {}, hybrid = \"/a\" }".into(),
                    "{ auto = true }".into(),
                    "{ hybrid = \"/a\", half_closes = 1 }".into(),
                    "{ hybrid = \"/a\", vsock = 3 }".into(),
                    "{ half_closes = true }".into(),
                    "{ vsock = { cid = 2 } }".into(),
                    "{ vsock = { cid = 4294967295 } }".into(),
                    "{ vsock = { cid = \"3\" } }".into(),
                    "{ vsock = { cid = 3, port = 741 } }".into(),
                    "{ vsock = {} }".into(),
                    "{ vsock = { cid = 3 }, half_closes = true }".into(),
                    format!("{{ hybrid = \"/{}\" }}", "x".repeat(96)),
                ],
            ),
            keys::Kind::Pattern => (
                vec!["\"{name}/v.sock\"".into(), "\"vm-{name}.sock\"".into()],
                vec![
                    "\"v.sock\"".into(),
                    "\"../{name}\"".into(),
                    "\"{name}/..\"".into(),
                ],
            ),
            keys::Kind::Labels => (
                vec!["{}".into(), "{ env = \"prod\", \"a/b\" = \"c\" }".into()],
                vec!["\"env=prod\"".into()],
            ),
        };
        bad.extend(["1.5", "1979-05-27"].map(str::to_owned));
        if !matches!(key.kind, keys::Kind::Labels) {
            bad.push("{}".into());
        }
        if !matches!(
            key.kind,
            keys::Kind::Numbers { .. } | keys::Kind::Texts { .. }
        ) {
            bad.push("[]".into());
        }
        let files = [
            "listen.cert",
            "listen.key",
            "listen.client_ca",
            "listen.device",
            "listen.network",
            "listen.answer",
            "peers.cert",
            "peers.key",
            "peers.map",
        ];
        if files.contains(&key.path) {
            // They need each other, and files; or an address of another kind.
            good.clear();
        }
        for value in good {
            parse(&with(key, &value)).unwrap_or_else(|e| panic!("{e}"));
        }
        for value in bad {
            let found = problems(&with(key, &value));
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].key.as_deref(), Some(key.name()), "{found:?}");
            let said = &found[0].message;
            let limit = key.limit();
            let words = ["expected", "invalid type", "struct"];
            assert!(!words.iter().any(|w| said.contains(w)), "{said}");
            assert!(said.contains(&limit) || said.contains("may list"), "{said}");
        }
    }
}
