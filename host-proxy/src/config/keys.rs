//! Every key of `aditd.toml`: what it means, its default, its limit.
//!
//! This table is the only place that says so. The file is checked against it ([`check`](super::check)), the commented example
//! ([`example`]) is made of it, and tests hold it to the types that the file is read into.

mod kind;
mod table;

use std::fmt::Write as _;

pub(super) use kind::Kind;
#[cfg(test)]
pub(super) use kind::Texts;
use table::KEYS;

/// A key of the file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As `section.key`; `vm.…` is a key of every `[[vm]]`.
    pub path: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// The value where the file has none, as TOML, or in words where it depends; `required`: there is none.
    pub default: &'static str,
    /// A value, as TOML.
    pub example: &'static str,
    pub(super) kind: Kind,
}

impl Key {
    /// What it takes, and how much of it.
    pub fn limit(&self) -> String {
        self.kind.limit()
    }

    /// What makes a changed value take effect.
    pub fn applied_by(&self) -> &'static str {
        match self.path {
            "vm.cid" => "a restart of aditd, once the VM has ended",
            "vm.busy_poll_us" | "vm.ivshmem_mib" | "vm.allow_any_memory" | "vm.carrier" => {
                "a reload of aditd, and then `adit vm reload`"
            }
            "listen.cert" | "listen.key" | "listen.client_ca" => "a reload of aditd",
            _ if ["vm", "discover", "grant", "token", "host", "peers"]
                .contains(&self.section()) =>
            {
                "a reload of aditd"
            }
            _ => "a restart of aditd",
        }
    }

    /// Whether the file must have it, in each of its sections.
    pub(super) fn is_required(&self) -> bool {
        self.default == REQUIRED
    }

    /// The section; empty: it stands before all sections.
    pub(super) fn section(&self) -> &'static str {
        self.path
            .rsplit_once('.')
            .map_or("", |(section, _)| section)
    }

    /// Without the section.
    pub(super) fn name(&self) -> &'static str {
        self.path
            .rsplit_once('.')
            .map_or(self.path, |(_, name)| name)
    }
}

/// [`Key::default`] of a key that has none.
const REQUIRED: &str = "required";

/// All keys, those of a section together.
pub fn keys() -> impl Iterator<Item = &'static Key> {
    KEYS.iter()
}

/// Sections of which there may be many, and what each one is.
pub(super) const MANY: [(&str, &str); 6] = [
    ("host", "host"),
    ("listen", "listener"),
    ("grant", "grant"),
    ("token", "token"),
    ("discover", "directory with VMMs' sockets"),
    ("vm", "VM"),
];

/// Columns of the example.
const WIDTH: usize = 100;

/// Returns a file with every key in comments: as it is, it sets nothing.
pub fn example() -> String {
    let mut text = String::from(
        "# aditd.toml, with every key there is. Without the `#` in front of it, a line takes effect.\n\
         # `aditd check-config` checks a file; `systemctl reload aditd` applies it.\n",
    );
    let mut section = "";
    for key in keys() {
        // Writing to a String cannot fail.
        if key.section() != section {
            section = key.section();
            let _ = match MANY.iter().find(|(many, _)| *many == section) {
                Some((_, one)) => write!(
                    text,
                    "\n# A {one}; repeat the section for each one.\n#[[{section}]]\n"
                ),
                None => write!(text, "\n#[{section}]\n"),
            };
        } else {
            text.push('\n');
        }
        let default = match key.is_required() {
            true => "Required".into(),
            false => format!("Default: {}", key.default),
        };
        wrap(&mut text, key.meaning);
        let (limit, by) = (key.limit(), key.applied_by());
        wrap(
            &mut text,
            &format!("{default}. Takes {limit}. A change takes {by}."),
        );
        let _ = writeln!(text, "#{} = {}", key.name(), key.example);
    }
    text
}

/// Adds a comment.
fn wrap(text: &mut String, comment: &str) {
    let mut line = String::from("#");
    for word in comment.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            text.push_str(&line);
            text.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    text.push_str(&line);
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use serde_json::Value;

    use super::super::Config;
    use super::*;
    use crate::config::UidRange;

    fn parse(text: &str) -> Config {
        Config::parse(Path::new("a.toml"), text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    /// The example without its `#`.
    fn whole() -> String {
        // `to` is for listeners of one kind, `network`, `device`, `port` and `cert` for those of others.
        let others = [
            "#network = ",
            "#answer = ",
            "#device = ",
            "#port = ",
            "#cert = ",
            "#key = ",
            "#client_ca = ",
            "#map = ",
        ];
        let is_key = |line: &str| {
            let is_others = others.iter().any(|key| line.starts_with(key));
            !line.starts_with("# ") && line.starts_with('#') && !is_others
        };
        let example = example();
        let lines = example.lines().filter(|l| is_key(l)).map(|l| &l[1..]);
        lines.fold(String::new(), |text, line| text + line + "\n")
    }

    /// Paths of the fields that a configuration is made of.
    fn paths(value: &Value, prefix: &str, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields)
                if ![".vm.labels", ".vm.carrier", ".discover.labels"].contains(&prefix) =>
            {
                fields
                    .iter()
                    .for_each(|(name, value)| paths(value, &format!("{prefix}.{name}"), into))
            }
            Value::Array(many) if MANY.iter().any(|(name, _)| prefix == format!(".{name}")) => {
                many.iter().for_each(|one| paths(one, prefix, into));
            }
            _ => drop(into.insert(prefix[1..].to_owned())),
        }
    }

    #[test]
    fn the_table_has_every_key_that_the_file_may_have_and_no_other() {
        let mut known = BTreeSet::new();
        paths(
            &serde_json::to_value(parse(&whole())).unwrap(),
            "",
            &mut known,
        );
        let listed: BTreeSet<_> = keys().map(|k| k.path.to_owned()).collect();
        assert_eq!(listed, known);
    }

    #[test]
    fn the_example_beside_the_unit_is_the_tables_and_sets_nothing() {
        let shipped = include_str!("../../dist/aditd.toml.example");
        assert_eq!(
            shipped,
            example(),
            "run `aditd example-config > host-proxy/dist/aditd.toml.example`"
        );
        assert_eq!(parse(shipped), Config::default());
    }

    #[test]
    fn every_default_is_what_a_file_without_the_key_has() {
        let vm = "[[vm]]\nname = \"a\"\ncid = 3\n";
        for key in keys() {
            let is_toml = format!("x = {}", key.default)
                .parse::<toml::Table>()
                .is_ok();
            // `uids` is tried where it is not given, and demanded where it is.
            if !is_toml || key.path == "ports.uids" {
                continue;
            }
            let line = format!("{} = {}\n", key.name(), key.default);
            let with = match key.section() {
                "" => parse(&(line + vm)),
                "vm" => parse(&format!("{vm}{line}")),
                section @ ("host" | "listen" | "grant" | "discover") => {
                    let pin = "sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";
                    let needed = match section {
                        "host" => {
                            format!("name = \"b\"\naddress = \"192.0.2.2:1\"\npin = \"{pin}\"")
                        }
                        "discover" => "dir = \"/run/fc\"\npattern = \"{name}/v.sock\"".into(),
                        "listen" => "address = \"127.0.0.1:1\"".into(),
                        _ => "to = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"see\"]".into(),
                    };
                    let without = format!("[[{section}]]\n{needed}\n");
                    let with = parse(&format!("{without}{line}"));
                    assert_eq!(with, parse(&without), "{}", key.path);
                    continue;
                }
                "metrics" => {
                    let without = "[metrics]\nlisten = \"127.0.0.1:1\"\n";
                    assert_eq!(parse(&format!("{without}{line}")), parse(without));
                    continue;
                }
                section => parse(&format!("[{section}]\n{line}{vm}")),
            };
            assert_eq!(with, parse(vm), "{}", key.path);
        }
        let uids = keys().find(|k| k.path == "ports.uids").unwrap().default;
        assert_eq!(uids.trim_matches('"'), UidRange::default().to_string());
    }
}
