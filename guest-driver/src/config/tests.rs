//! What a configuration may say, and that the example in `dist/` says all of it.

use serde::de::value::Error as Stop;
use serde::de::{Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/adit-guest/adit-guest.toml"), text)
}

#[test]
fn one_line_is_enough_and_allows_nothing() {
    let c = parse("vm_id = \"web-1\"\n").unwrap();
    assert!(c.allow_ports.is_empty());
    assert_eq!(c.state_dir, Path::new("/var/lib/adit-guest"));
    assert!(!c.file.roots.contains(&PathBuf::from("/")));
}

#[test]
fn an_unknown_key_names_file_line_and_key() {
    for (text, line, key) in [
        ("vm_id = \"a\"\nalow_ports = [80]\n", 2, "alow_ports"),
        (
            "vm_id = \"a\"\n[script]\nenabled = true\n\nshell = true\n",
            5,
            "shell",
        ),
        (
            "vm_id = \"a\"\nallow_ports = [80, 70000]\n",
            2,
            "allow_ports",
        ),
        ("vm_id = \"Web\"\n", 1, "vm_id"),
    ] {
        let e = parse(text).unwrap_err();
        let ConfigError::Parse {
            line: at,
            key: Some(found),
            ..
        } = &e
        else {
            panic!("{e}")
        };
        assert_eq!((*at, found.as_str()), (line, key), "{e}");
        assert!(
            e.to_string().starts_with(&format!(
                "/etc/adit-guest/adit-guest.toml:{line}: key `{key}`: "
            )),
            "{e}"
        );
    }
}

#[test]
fn without_an_id_the_card_says_it() {
    let c = parse("").unwrap();
    assert_eq!((c.vm_id, c.card), (None, "/etc/adit/card".into()));
}

#[test]
fn values_that_cannot_be_used_are_refused() {
    for text in [
        "card = \"card\"\n",
        "policy = \"policy.toml\"\n",
        "vm_id = \"a\"\nallow_ports = [0]\n",
        "vm_id = \"a\"\nstate_dir = \"var\"\n",
        "vm_id = \"a\"\n[file]\nroots = [\"etc\"]\n",
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
}

const EXAMPLE: &str = include_str!("../../dist/adit-guest.toml.example");

/// The example with the keys that it leaves out.
fn whole_example() -> String {
    let mut example = EXAMPLE.to_owned();
    for key in ["policy = ", "[[service]]", "name = ", "to = "] {
        example = example.replace(&format!("\n#{key}"), &format!("\n{key}"));
    }
    example
}

/// Asked for a struct, it notes the keys that the struct knows, and has none of them.
struct Keys<'k>(&'k mut Vec<&'static str>);

impl<'de> Deserializer<'de> for Keys<'_> {
    type Error = Stop;
    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
        Err(Stop::custom("no struct"))
    }
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        keys: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Stop> {
        self.0.extend(keys);
        Err(Stop::custom("keys are noted"))
    }
    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map enum identifier ignored_any
    }
}

fn keys_of<T: for<'de> Deserialize<'de>>() -> Vec<&'static str> {
    let mut keys = Vec::new();
    assert!(T::deserialize(Keys(&mut keys)).is_err());
    keys.sort_unstable();
    assert!(!keys.is_empty());
    keys
}

#[test]
fn the_example_has_exactly_the_keys_that_are_known_each_explained_and_with_its_default() {
    let example: toml::Table = whole_example().parse().unwrap();
    let mut known = keys_of::<Config>();
    for (table, inside) in [
        ("script", keys_of::<ScriptConfig>()),
        ("file", keys_of::<FileConfig>()),
    ] {
        let mut has: Vec<&str> = example[table]
            .as_table()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        has.sort_unstable();
        assert_eq!(has, inside, "[{table}]");
        known.retain(|&key| key != table);
    }
    let services = example["service"].as_array().unwrap();
    let service = services[0].as_table().unwrap();
    let mut has: Vec<&str> = service.keys().map(String::as_str).collect();
    has.sort_unstable();
    assert_eq!(has, keys_of::<NamedService>());
    let mut has: Vec<&str> = example.keys().map(String::as_str).collect();
    has.retain(|&key| !example[key].is_table());
    has.sort_unstable();
    assert_eq!(has, known);
    let lines: Vec<&str> = EXAMPLE.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let is_key = !line.is_empty() && !line.starts_with('#');
        assert!(
            !is_key || lines[at - 1].starts_with('#'),
            "no word about {line}"
        );
    }
    assert_eq!(
        parse(EXAMPLE).unwrap(),
        parse("vm_id = \"web-1\"\n").unwrap()
    );
    assert_eq!(parse(EXAMPLE).unwrap().policy, None, "it need not be there");
    assert!(parse(&whole_example()).unwrap().policy.is_some());
}

#[test]
fn a_service_has_a_name_and_a_place_each_in_one_spelling() {
    let of =
        |name: &str, to: &str| parse(&format!("[[service]]\nname = \"{name}\"\nto = \"{to}\"\n"));
    let c = of("docker", "unix:/run/docker.sock").unwrap();
    assert_eq!(c.service[0].to, Place::Unix("/run/docker.sock".into()));
    assert_eq!(
        of("web", "tcp:8080").unwrap().service[0].to,
        Place::Tcp(8080)
    );
    let long = format!("unix:/{}", "x".repeat(PATH_MAX));
    for to in [
        "",
        "unix:",
        "unix:run/x",
        &long,
        "/run/x",
        "tcp:0",
        "tcp:080",
        "tcp:127.0.0.1:80",
        "8080",
        "vsock:5",
    ] {
        assert!(of("a", to).is_err(), "{to}");
    }
    for name in ["", "Docker", "a.b", "svc:a", &"x".repeat(61)] {
        assert!(of(name, "tcp:1").is_err(), "{name}");
    }
    let two = "[[service]]\nname = \"a\"\nto = \"tcp:1\"\n".repeat(2);
    assert!(parse(&two).is_err());
    let many: String = (0..=SERVICES_MAX)
        .map(|n| format!("[[service]]\nname = \"s{n}\"\nto = \"tcp:1\"\n"))
        .collect();
    assert!(parse(&many).is_err());
}

#[test]
fn a_mistake_is_told_in_the_words_of_whoever_wrote_the_file() {
    for (text, says) in [
        ("vm_id = 5\n", "must be"),
        (
            "vm_id = \"a\"\nallow_ports = 80\n",
            "must be a list, not 80",
        ),
        (
            "vm_id = \"a\"\nallow_ports = [70000]\n",
            "must be a whole number from 0 to 65535, not 70000",
        ),
        (
            "vm_id = \"a\"\nclock = \"ntp\"\n",
            "must be `own` or `host`, not `ntp`",
        ),
        (
            "vm_id = \"a\"\nscript = true\n",
            "must be a table, [script], not true",
        ),
        (
            "vm_id = \"a\"\n[file]\nenabled = \"yes\"\n",
            "must be true or false, not the text \"yes\"",
        ),
        (
            "vm_id = \"a\"\nports = [80]\n",
            "unknown key `ports`; it could be `vm_id`, ",
        ),
        ("vm_id = \"a\"\nvm_id = \"b\"\n", "duplicate key"),
    ] {
        let e = parse(text).unwrap_err().to_string();
        assert!(e.contains(says), "{text}: {e}");
        for jargon in ["struct", "invalid", "field", "u16", "expected"] {
            assert!(!e.contains(jargon), "{text}: {e}");
        }
    }
}

#[test]
fn no_mistake_is_told_in_the_words_of_a_library() {
    let example = whole_example();
    let keys = example
        .lines()
        .filter(|l| !l.starts_with('#') && l.contains(" = "));
    let values = [
        "7",
        "-7",
        "70000",
        "1.5",
        "true",
        "\"x\"",
        "\"\"",
        "[]",
        "[[1]]",
        "[-1]",
        "[1.5]",
        "[\"x\"]",
        "{}",
        "{ a = 1 }",
        "[{}]",
        "2026-01-01",
        "nan",
        "99999999999999999999",
        "'",
        "\"",
        "[",
        "",
        "0x",
        "1\nvm_id = \"a\"",
        "{ a = 1, a = 2 }",
        "07",
        "\"\\q\"",
    ];
    for line in keys {
        let (key, _) = line.split_once(" = ").unwrap();
        for value in values {
            let text = example.replacen(line, &format!("{key} = {value}"), 1);
            let Err(e) = Config::parse(Path::new("f"), &text) else {
                continue;
            };
            let e = e.to_string();
            for jargon in [
                "struct",
                "i128",
                "invalid type",
                "invalid value",
                "u16",
                "i64",
                "variant",
                "datetime",
                "deserial",
            ] {
                assert!(!e.contains(jargon), "{e}");
            }
        }
    }
}

#[test]
fn what_is_no_file_or_too_long_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let long = dir.path().join("long");
    let file = std::fs::File::create(&long).unwrap();
    file.set_len(FILE_MAX + 1).unwrap();
    for path in [&fifo, &long, dir.path()] {
        let refused = Config::load(path).unwrap_err();
        assert!(matches!(refused, ConfigError::Read { .. }), "{refused}");
    }
}
