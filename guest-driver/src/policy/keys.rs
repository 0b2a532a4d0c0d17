//! The keys of a policy file: what `policy/parse.rs` takes, what the example and docs/operate.md tell. A test holds the three
//! together.

/// A key, as `section.key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The section that it is in; empty: before all sections.
    pub section: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What it takes.
    pub takes: &'static str,
    /// What holds without it; none: it is required.
    pub default: Option<&'static str>,
}

const fn required(section: &'static str, name: &'static str, takes: &'static str) -> Key {
    Key {
        section,
        name,
        takes,
        default: None,
    }
}

const WHOM: &str = "\"any\", or a list of names and numbers";
const PATHS: &str = "\"any\", or a list of absolute paths, such as [\"/srv\"]";

/// All keys, in the order in which the example has them.
pub const KEYS: [Key; 13] = [
    required("", "default", "\"deny\""),
    required("step", "kinds", "a list of names, such as [\"script\"]"),
    required("step", "users", WHOM),
    Key {
        section: "step",
        name: "groups",
        takes: WHOM,
        default: Some("\"any\""),
    },
    required(
        "step",
        "roots",
        "a list of absolute paths, such as [\"/srv/www\"]",
    ),
    required(
        "service",
        "names",
        "a list of names, such as [\"ping\", \"tcp:80\"]",
    ),
    required("exec", "allow", "\"off\", \"ticket\" or \"host\""),
    required("exec", "users", WHOM),
    required(
        "exec",
        "commands",
        "\"any\", or a list of absolute paths of programs",
    ),
    required("files", "allow", "\"off\", \"ticket\" or \"host\""),
    required("files", "users", WHOM),
    Key {
        section: "files",
        name: "read",
        takes: PATHS,
        default: Some("nothing"),
    },
    Key {
        section: "files",
        name: "write",
        takes: PATHS,
        default: Some("nothing"),
    },
];

/// The sections, each of which is one rule.
pub const SECTIONS: [&str; 4] = ["step", "service", "exec", "files"];

/// The keys of a section.
pub fn of(section: &str) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(move |key| key.section == section)
}
