//! What a file with mistakes is answered.

use adit_channel::socket_path::PATH_MAX;
use adit_tasks::anchor::ANCHORS_MAX;

use super::*;

const VM: &str = "[[vm]]\nname = \"a\"\ncid = 3\n";

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("a.toml"), text)
}

fn problems(text: &str) -> Vec<Problem> {
    match parse(text) {
        Err(ConfigError::Wrong { problems, .. }) => problems,
        other => panic!("{other:?}\n{text}"),
    }
}

#[test]
fn an_empty_file_is_a_configuration() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn a_run_dir_that_is_too_long_for_a_socket_is_refused() {
    let vm = "[[vm]]\nname = \"web-1\"\ncid = 3\n";
    // `/` and the rest of RUN/vm/web-1/ivshmem.sock.
    let rest = 1 + "/vm/web-1/ivshmem.sock".len();
    let dir = |len: usize| format!("run_dir = \"/{}\"\n", "x".repeat(len));
    parse(&(dir(PATH_MAX - rest) + vm)).unwrap();
    for (text, line) in [(dir(PATH_MAX - rest + 1) + vm, 3), (dir(PATH_MAX), 1)] {
        let found = &problems(&text)[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (line, Some("run_dir")),
            "{found:?}"
        );
    }
}

#[test]
fn mistakes_name_file_line_and_key() {
    for (text, line, key) in [
        (
            "\n[proxy]\nlissten = \"127.0.0.1:1\"\n".to_owned(),
            3,
            "lissten",
        ),
        ("[ports]\nuids = \"0-70000\"\n".to_owned(), 2, "uids"),
        ("[ports]\nuids = \"65000-66000\"\n".to_owned(), 2, "uids"),
        ("[ports]\nuids = \"70000\"\n".to_owned(), 2, "uids"),
        (format!("{VM}alow = [80]\n"), 4, "alow"),
        (format!("{VM}allow = [70000]\n"), 4, "allow"),
        (
            format!("{VM}allow_vsock = [4294967295]\n"),
            4,
            "allow_vsock",
        ),
        (
            format!("{VM}allow_services = [\"Docker\"]\n"),
            4,
            "allow_services",
        ),
        (format!("{VM}ivshmem_mib = 6\n"), 4, "ivshmem_mib"),
        (
            format!(
                "{VM}carrier = {{ hybrid = \"/a/v\" }}\n[[vm]]\nname = \"b\"\ncid = 4\ncarrier = {{ hybrid = \"/a/./v\" }}\n"
            ),
            8,
            "carrier",
        ),
        (
            format!("{VM}[[vm]]\nname = \"b\"\ncarrier = {{ vsock = {{ cid = 3 }} }}\n"),
            6,
            "carrier",
        ),
        (
            format!("{VM}carrier = {{ vsock = {{ cid = 4 }} }}\n"),
            3,
            "cid",
        ),
        ("[[vm]]\nname = \"A\"\ncid = 3\n".to_owned(), 2, "name"),
        ("[[vm]]\nname = \"a\"\ncid = 2\n".to_owned(), 3, "cid"),
        ("[[vm]]\nname = \"a\"\n".to_owned(), 1, "cid"),
        (format!("{VM}[[vm]]\nname = \"a\"\ncid = 4\n"), 5, "name"),
        (format!("{VM}[[vm]]\nname = \"b\"\ncid = 3\n"), 6, "cid"),
        (format!("{VM}cid = 4\n"), 4, "cid"),
        ("proxy = 3\n".to_owned(), 1, "proxy"),
        ("[vm]\nname = \"a\"\ncid = 4\n".to_owned(), 1, "vm"),
        ("vm = [3]\n".to_owned(), 1, "vm"),
    ] {
        let found = &problems(&text)[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (line, Some(key)),
            "{found:?}"
        );
        let said = parse(&text).unwrap_err().to_string();
        assert!(
            said.starts_with(&format!("a.toml:{line}: `{key}`: ")),
            "{said}"
        );
    }
}

#[test]
fn a_vm_of_the_hosts_kernel_has_the_cid_of_its_carrier_and_a_clash_names_both_places() {
    let of = |text: &str| {
        let text = format!("[[vm]]\nname = \"a\"\n{text}");
        parse(&text).unwrap().vm.remove(0)
    };
    for cid in ["", "cid = 42\n"] {
        let vm = of(&format!("{cid}carrier = {{ vsock = {{ cid = 42 }} }}\n"));
        assert_eq!((vm.cid, vm.carrier.kernel()), (42, Some(42)));
        // As the database has it.
        let kept = serde_json::to_string(&vm).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&kept).unwrap(), vm);
    }
    let carrier = "carrier = { vsock = { cid = 42 } }";
    let text = format!("[[vm]]\nname = \"a\"\n{carrier}\n[[vm]]\nname = \"b\"\n{carrier}\n");
    let said = parse(&text).unwrap_err().to_string();
    let is_clear = said.starts_with("a.toml:6: `carrier`: ") && said.ends_with("already: line 3");
    assert!(is_clear, "{said}");
}

#[test]
fn every_mistake_of_a_file_is_named_at_once() {
    let text = "run_dir = \"run\"\nstates = 1\n[limits]\nkept_days = \"x\"\nresponse_s = 0\n[[vm]]\nname = \"a\"\n";
    let found: Vec<_> = problems(text)
        .into_iter()
        .map(|p| (p.line, p.key))
        .collect();
    let found: Vec<_> = found
        .iter()
        .map(|(line, key)| (*line, key.as_deref().unwrap()))
        .collect();
    let want = [
        (1, "run_dir"),
        (2, "states"),
        (4, "kept_days"),
        (5, "response_s"),
        (6, "cid"),
    ];
    assert_eq!(found, want);
}

#[test]
fn an_unknown_key_has_a_suggestion() {
    for (text, suggestion) in [
        (format!("{VM}alow = [80]\n"), "`allow`"),
        (
            "[proxy]\nlissten = \"127.0.0.1:1\"\n".to_owned(),
            "`listen`",
        ),
        ("[limit]\n".to_owned(), "`limits`"),
        ("statedir = \"/a\"\n".to_owned(), "`state_dir`"),
        (format!("{VM}run_dir = \"/a\"\n"), "before all sections"),
        ("allow = [80]\n".to_owned(), "[[vm]]"),
        ("xyz = 1\n".to_owned(), "example-config"),
    ] {
        let said = &problems(&text)[0].message;
        assert!(said.contains(suggestion), "{text}: {said}");
    }
}

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

#[test]
fn a_proxy_for_other_machines_needs_the_operators_word() {
    let listen = |address: &str| format!("[proxy]\nlisten = \"{address}\"\n");
    parse("[metrics]\nlisten = \"127.0.0.1:7081\"\n").unwrap();
    for address in [
        "127.0.0.1:1",
        "127.8.9.1:1",
        "[::1]:1",
        "[::ffff:127.0.0.1]:1",
    ] {
        let ours = parse(&listen(address)).unwrap().summary();
        assert!(!ours.contains("other machines"), "{ours}");
    }
    for address in [
        "0.0.0.0:7080",
        "[::]:7080",
        "192.0.2.1:7080",
        "[fe80::1]:7080",
        "[::ffff:192.0.2.1]:7080",
    ] {
        let found = &problems(&listen(address))[0];
        assert_eq!((found.line, found.key.as_deref()), (2, Some("listen")));
        let open = parse(&(listen(address) + "open = true\n")).unwrap();
        assert_eq!(open.proxy.listen.to_string(), address);
        assert!(
            open.summary()
                .contains(&format!("{address} (other machines"))
        );
        // It shows all VMs to whoever reaches it.
        let metrics = format!("[metrics]\nlisten = \"{address}\"\n");
        let found = &problems(&metrics)[0];
        assert_eq!((found.line, found.key.as_deref()), (2, Some("listen")));
        assert!(found.message.contains("`open = true`"), "{found:?}");
        let metrics = parse(&(metrics + "open = true\n")).unwrap().summary();
        assert_eq!(metrics.matches("(other machines").count(), 1, "{metrics}");
        problems(&(listen(address) + "open = false\n"));
    }
}

#[test]
fn each_vm_needs_a_user_of_its_own() {
    let vms = |n: u64| -> String {
        (0..n)
            .map(|n| format!("[[vm]]\nname = \"a{n}\"\ncid = {}\n", n + 3))
            .collect()
    };
    let uids = "[ports]\nuids = \"70000-70001\"\n";
    parse(&(uids.to_owned() + &vms(2))).unwrap();
    let found = &problems(&(uids.to_owned() + &vms(3)))[0];
    assert_eq!((found.line, found.key.as_deref()), (2, Some("uids")));
}

#[test]
fn r125_a_label_of_the_configuration_is_one_or_is_refused() {
    for labels in [
        "{ Env = \"prod\" }",
        "{ env = \"a b\" }",
        "{ env = 7 }",
        "{ env = \"\" }",
    ] {
        let found = &problems(&format!("{VM}labels = {labels}\n"))[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (4, Some("labels")),
            "{labels}"
        );
    }
}

#[test]
fn a_listener_says_where_its_connections_lead_if_and_only_if_its_clients_do_not() {
    let listen = |more: &str| format!("[[listen]]\naddress = \"127.0.0.1:0\"\n{more}");
    for (more, key) in [
        ("speak = \"any\"\n", "to"),
        ("to = \"a:1\"\n", "to"),
        ("port = 1\n", "port"),
        ("speak = \"socks5\"\nport = 1\n", "port"),
    ] {
        let found = &problems(&listen(more))[0];
        assert_eq!(found.key.as_deref(), Some(key), "{more}");
    }
    let to = parse(&listen("speak = \"any\"\nto = \"WEB-1.adit:22\"\n")).unwrap();
    assert_eq!(
        to.listen[0]
            .destination(&to.names.suffix)
            .unwrap()
            .vm
            .as_str(),
        "web-1"
    );
    let open = "[[listen]]\naddress = \"0.0.0.0:1\"\n";
    assert_eq!(problems(open)[0].key.as_deref(), Some("address"));
    parse(&format!("{open}open = true\n")).unwrap();
    // Port 0 is another port each time; others are not.
    parse(&(listen("") + &listen(""))).unwrap();
    let twice = "[[listen]]\naddress = \"127.0.0.1:7\"\n";
    let found = &problems(&twice.repeat(2))[0];
    assert_eq!((found.line, found.key.as_deref()), (4, Some("address")));
    // Nor may one be where something else listens.
    for section in ["proxy", "metrics"] {
        let both = format!("[{section}]\nlisten = \"127.0.0.1:7\"\n{twice}");
        let found = &problems(&both)[0];
        assert_eq!((found.line, found.key.as_deref()), (4, Some("address")));
        parse(&both.replace(":7", ":0")).unwrap();
    }
    let both = "[proxy]\nlisten = \"127.0.0.1:7\"\n[metrics]\nlisten = \"127.0.0.1:7\"\n";
    assert_eq!(problems(both)[0].line, 4);
}

#[test]
fn a_listener_for_dns_has_one_address_and_says_what_it_answers() {
    let dns = |address: &str, more: &str| {
        format!("[[listen]]\naddress = \"{address}\"\nspeak = \"dns\"\nopen = true\n{more}")
    };
    let here = "127.0.0.1:53";
    for (text, key) in [
        // An answer would come from another address than was asked.
        (dns("0.0.0.0:53", ""), "address"),
        (dns("[::]:53", ""), "address"),
        (dns("unix:/run/a.sock", ""), "address"),
        (dns(here, "cert = \"/a\"\nkey = \"/a\"\n"), "cert"),
        (dns(here, "role = \"management\"\n"), "speak"),
        (dns(here, "to = \"a:1\"\n"), "to"),
        (dns(here, "network = \"a b\"\n"), "network"),
        (dns(here, "answer = [\"0.0.0.0\"]\n"), "answer"),
        (dns(here, "answer = [\"host.example\"]\n"), "answer"),
        (
            dns(here, "answer = [\"192.0.2.1\", \"192.0.2.2\"]\n"),
            "answer",
        ),
        (
            dns(here, "answer = [\"192.0.2.1\", \"::ffff:192.0.2.2\"]\n"),
            "answer",
        ),
        (
            dns(here, "").replace("\"dns\"", "\"http\"") + "network = \"lab\"\n",
            "network",
        ),
        (
            dns(here, "").replace("\"dns\"", "\"any\"") + "to = \"a:1\"\nanswer = [\"::1\"]\n",
            "answer",
        ),
    ] {
        let found = &problems(&text)[0];
        assert_eq!(found.key.as_deref(), Some(key), "{text}");
    }
    let answers = |text: &str| {
        let answers = parse(text).unwrap().listen[0].answers();
        answers.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(answers(&dns(here, "network = \"lab\"\n")), ["127.0.0.1"]);
    let both = "answer = [\"192.0.2.1\", \"2001:db8::1\"]\n";
    assert_eq!(answers(&dns(here, both)), ["192.0.2.1", "2001:db8::1"]);
}

const PIN: &str = "sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

fn host(name: &str, pin: &str, more: &str) -> String {
    format!("[[host]]\nname = \"{name}\"\naddress = \"192.0.2.2:1\"\npin = \"{pin}\"\n{more}")
}

#[test]
fn hosts_and_vms_share_their_names_and_a_clash_is_refused() {
    let other_pin = PIN.replace("47D", "48D");
    let named = "[names]\nhost = \"b\"\n";
    for (text, line, key) in [
        ("[names]\nhost = \"a\"\n".to_owned() + VM, 2, "host"),
        (VM.to_owned() + &host("a", PIN, ""), 5, "name"),
        (named.to_owned() + &host("b", PIN, ""), 4, "name"),
        (host("b", PIN, "") + &host("b", &other_pin, ""), 6, "name"),
        // One key is one host.
        (host("b", PIN, "") + &host("c", PIN, ""), 8, "pin"),
        // What would be read as another name.
        (host("svc", PIN, ""), 2, "name"),
        (host("adit", PIN, ""), 2, "name"),
        (
            "[names]\nhost = \"vm\"\nsuffix = \".vm\"\n".into(),
            2,
            "host",
        ),
        ("[names]\nsuffix = \"vm\"\n".into(), 2, "suffix"),
    ] {
        let found = &problems(&text)[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (line, Some(key)),
            "{text}"
        );
    }
    let whole = named.to_owned() + VM + &host("c", PIN, "") + &host("d", &other_pin, "");
    let config = parse(&whole).unwrap();
    assert_eq!(config.host_name().unwrap().as_str(), "b");
}

#[test]
fn the_machines_name_is_the_hosts_unless_something_else_has_it() {
    let mut config = parse(&(VM.to_owned() + &host("b", PIN, ""))).unwrap();
    for (hostname, name) in [
        ("Alpha.example.org\n", Some("alpha")),
        ("a", None),
        ("b.example.org", None),
        ("svc", None),
        ("not_a_label", None),
        ("", None),
    ] {
        config.names.hostname = super::names::of_machine(hostname);
        let found = config.host_name().map(|name| name.as_str());
        assert_eq!(found, name, "{hostname:?}");
    }
}

#[test]
fn r126_what_another_host_may_say_is_what_is_written_and_nothing_else() {
    let more = "names = [\"db-*\", \"web-1\"]\nvouches = [\"user:deploy\", \"group:ops\"]\n";
    let config = parse(&host("b", PIN, more)).unwrap();
    let host_b = &config.host[0];
    let claims = |vm: &str| host_b.may_claim(&vm.parse().unwrap());
    assert!(claims("db-1") && claims("web-1") && !claims("web-2") && !claims("xdb-1"));
    let vouches = |subject: &str| host_b.vouches_for(&subject.parse().unwrap());
    assert!(vouches("user:deploy") && vouches("group:ops"));
    for other in [
        "user:ops",
        "group:deploy",
        "token:deploy",
        "cert:deploy",
        "anyone",
    ] {
        assert!(!vouches(other), "{other}");
    }
    assert!(!parse(&host("b", PIN, "")).unwrap().host[0].vouches_for(&"user:a".parse().unwrap()));
    for (more, key) in [
        ("names = [\"label:env=prod\"]\n", "names"),
        ("names = [\"A\"]\n", "names"),
        ("vouches = [\"user:1000\"]\n", "vouches"),
        ("vouches = [\"token:ci\"]\n", "vouches"),
        ("vouches = [\"anyone\"]\n", "vouches"),
        ("vouches = [\"cert:x\"]\n", "vouches"),
    ] {
        assert_eq!(
            problems(&host("b", PIN, more))[0].key.as_deref(),
            Some(key),
            "{more}"
        );
    }
    for pin in [
        "",
        "x",
        "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
        "beta.example",
        &PIN[..40],
    ] {
        assert_eq!(
            problems(&host("b", pin, ""))[0].key.as_deref(),
            Some("pin"),
            "{pin}"
        );
    }
}

#[test]
fn a_file_that_says_where_vms_are_is_checked_with_its_lines() {
    let dir = tempfile::tempdir().unwrap();
    let (main, map) = (dir.path().join("aditd.toml"), dir.path().join("vms.map"));
    let text = format!(
        "[names]\nhost = \"alpha\"\n[peers]\nmap = \"{}\"\n{}",
        map.display(),
        host("b", PIN, "names = [\"db-*\"]\n")
    );
    std::fs::write(&main, text).unwrap();
    let load = |rows: &str| {
        std::fs::write(&map, rows).unwrap();
        Config::load(&main)
    };
    let config = load("# shared\ndb-1 b\nweb-1 alpha\n").unwrap();
    let rows: Vec<_> = config.peers.rows.iter().collect();
    assert_eq!((rows.len(), rows[0].1.as_str()), (2, "b"));
    for (rows, why) in [
        ("db-1 b\nweb-1 b\n", "line 2: `names` of [[host]] `b`"),
        ("db-1 c\n", "line 1: there is no [[host]] `c`"),
        ("db-1\n", "line 1: a line has two words"),
    ] {
        let ConfigError::Wrong { problems } = load(rows).unwrap_err() else {
            panic!("{rows}")
        };
        let found = &problems[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (4, Some("map")),
            "{rows}"
        );
        assert!(found.message.contains(why), "{}", found.message);
    }
    std::fs::remove_file(&map).unwrap();
    assert!(matches!(
        Config::load(&main),
        Err(ConfigError::Wrong { .. })
    ));
}

/// `aditd.toml` and `conf.d` with these files.
fn with_parts(
    main: &str,
    parts: &[(&str, &str)],
) -> (tempfile::TempDir, Result<Config, ConfigError>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.toml");
    std::fs::write(&path, main).unwrap();
    std::fs::create_dir(dir.path().join("conf.d")).unwrap();
    for (name, text) in parts {
        std::fs::write(dir.path().join("conf.d").join(name), text).unwrap();
    }
    let loaded = Config::load(&path);
    (dir, loaded)
}

const GRANT: &str = "[[grant]]\nto = [\"user:a\"]\nvms = [\"*\"]\nmay = [\"see\"]\n";

#[test]
fn files_of_conf_d_add_to_the_main_one_in_the_order_of_their_names() {
    let (dir, loaded) = with_parts(
        VM,
        &[
            ("20-b.toml", "[[vm]]\nname = \"c\"\ncid = 5\n"),
            (
                "10-a.toml",
                &format!("\n{GRANT}[[vm]]\nname = \"b\"\ncid = 4\n"),
            ),
            (".20-b.toml.swp", "x"),
            (".half.toml", "x"),
            ("README", "x"),
        ],
    );
    let config = loaded.unwrap();
    let names: Vec<_> = config.vm.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let place = format!("{}:2", dir.path().join("conf.d/10-a.toml").display());
    assert_eq!(config.grants().all()[0].place, place);
    // Another process of aditd has the same.
    let sources = Sources::read(&dir.path().join("aditd.toml")).unwrap();
    let unpacked = Sources::unpack(&sources.packed()).unwrap();
    assert_eq!(Config::of(&unpacked).unwrap(), config);
}

#[test]
fn a_mistake_in_a_file_of_conf_d_names_that_file() {
    for (text, line, key) in [
        ("\n[limits]\nkept_days = 1\n", 2, "limits"),
        (
            "[[grant]]\nto = [\"user:a\"]\nvms = [\"*\"]\nmay = [\"fly\"]\n",
            4,
            "may",
        ),
        ("[[vm]]\nname = \"a\"\ncid = 9\n", 2, "name"),
        ("\n[[vm]]\nname = \"b\"\ncid = 3\n", 4, "cid"),
    ] {
        let (dir, loaded) = with_parts(VM, &[("x.toml", text)]);
        let Err(ConfigError::Wrong { problems }) = loaded else {
            panic!("{text}")
        };
        let found = (
            &problems[0].file,
            problems[0].line,
            problems[0].key.as_deref(),
        );
        assert_eq!(found, (&dir.path().join("conf.d/x.toml"), line, Some(key)));
    }
}

#[test]
fn a_grant_must_say_who_what_and_with_which_vms() {
    for key in ["to", "vms", "may"] {
        let lines = GRANT.lines().filter(|line| !line.starts_with(key));
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        assert_eq!(problems(&text)[0].key.as_deref(), Some(key));
    }
    let said = &problems(&GRANT.replace("see", "expose:web"))[0].message;
    assert!(said.contains("`expose`"), "{said}");
    for may in ["exec:root", "files", "files:ops@/srv"] {
        assert!(parse(&GRANT.replace("see", may)).is_ok());
    }
    let grants = parse(GRANT).unwrap().grants();
    assert_eq!(grants.all()[0].place, "a.toml:1");
}

/// A certificate and its key.
fn certified(name: &str) -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec![name.into()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    (certificate.pem(), key.serialize_pem())
}

#[test]
fn files_of_a_listener_are_checked_with_it_and_nothing_of_its_key_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).display().to_string()
    };
    let ((cert, key), (_, other)) = (certified("a"), certified("b"));
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let (cut, two) = (&key[..key.len() / 2], format!("{key}{other}"));
    let both = file("both", &format!("Bag Attributes\n{key}{cert}"));
    let (cert, key) = (file("cert", &cert), file("key", &key));
    let listen = |keys: &str| {
        let text = format!("\n[[listen]]\naddress = \"127.0.0.1:1\"\n{keys}\n");
        Config::load(Path::new(&file("aditd.toml", &text)))
    };
    let with = |cert: &str, key: &str| listen(&format!("cert = \"{cert}\"\nkey = \"{key}\""));
    for (cert, key) in [(&cert, &key), (&both, &both)] {
        let config = with(cert, key).unwrap();
        assert!(config.listen[0].terms().unwrap().is_some());
        assert!(config.summary().contains("http over TLS"));
        let sources = Sources::read(&dir.path().join("aditd.toml")).unwrap();
        let unpacked = Sources::unpack(&sources.packed()).unwrap();
        assert_eq!(Config::of(&unpacked).unwrap(), config);
        let secret = std::fs::read_to_string(key).unwrap();
        let secret = secret.split("PRIVATE KEY-----").nth(1).unwrap();
        let secret = secret.lines().nth(1).unwrap();
        let shown = format!("{config:?} {sources:?} {}", config.summary());
        assert!(
            !shown.contains(secret) && !serde_json::to_string(&config).unwrap().contains(secret)
        );
        // Whoever changes them needs no restart.
        assert_eq!(config.digest(), listen("").unwrap().digest());
    }
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (none, pipe) = (file("none", "text"), pipe.display().to_string());
    let large = file("large", &"x".repeat(2 << 20));
    let not_v3 = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    let not_v3 = file("not-v3", not_v3);
    for (cert, key, at, why) in [
        (&*cert, "/nonexistent/x", "key", "No such file"),
        ("/nonexistent/x", &key, "cert", "No such file"),
        (&pipe, &key, "cert", "regular file"),
        (&large, &key, "cert", "more than"),
        (&none, &key, "cert", "no certificate"),
        (&key, &key, "cert", "no certificate"),
        (&not_v3, &key, "cert", "X.509"),
        (&cert, &cert, "key", "no private key"),
        (&cert, &file("other", &other), "key", "not the key of"),
        (&cert, &file("two", &two), "key", "more than one"),
        (&cert, &file("cut", cut), "key", "broken"),
        (&cert, &file("encrypted", &encrypted), "key", "encrypted"),
    ] {
        let Err(ConfigError::Wrong { problems }) = with(cert, key) else {
            panic!("{why}");
        };
        let line = if at == "cert" { 4 } else { 5 };
        let found = (problems.len(), problems[0].line, problems[0].key.as_deref());
        assert_eq!(found, (1, line, Some(at)), "{problems:?}");
        let message = &problems[0].message;
        assert!(message.contains(why), "{message}");
        assert!(
            message.contains(if at == "cert" { cert } else { key }),
            "{message}"
        );
    }
    let pair = format!("cert = \"{cert}\"\nkey = \"{key}\"\n");
    for (keys, at) in [
        (format!("cert = \"{cert}\""), "cert"),
        (format!("key = \"{key}\""), "key"),
        (format!("client_ca = \"{cert}\""), "client_ca"),
        (format!("{pair}client_ca = \"{none}\""), "client_ca"),
        (format!("{pair}client_ca = \"{not_v3}\""), "client_ca"),
        (format!("{pair}speak = \"tls\""), "cert"),
        (format!("{pair}speak = \"any\"\nto = \"a:1\""), "cert"),
    ] {
        let Err(ConfigError::Wrong { problems }) = listen(&keys) else {
            panic!("{keys}");
        };
        assert_eq!(problems[0].key.as_deref(), Some(at), "{problems:?}");
    }
}
