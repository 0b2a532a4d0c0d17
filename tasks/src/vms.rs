//! Some VMs, as a grant or a command line names them.
//!
//! | text | VMs |
//! |---|---|
//! | `web-1` | the VM of that name |
//! | `web-*`, `*-db`, `*` | VMs whose names are so; one `*` stands for any characters, also none |
//! | `label:env=prod` | VMs with that label: of the configuration, or of a card that this host believes |

use std::fmt;
use std::str::FromStr;

use crate::card::Labels;

/// Longest text.
const TEXT_MAX: usize = 160;

/// Some VMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vms {
    /// By name: what it begins with, and what it ends with. With no second part it is the whole name.
    Named(String, Option<String>),
    /// By a label and its value.
    Labelled(String, String),
}

/// Why a text is no such thing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it takes a VM's name, a name with one `*` in it, or `label:NAME=VALUE`")]
pub struct VmsError;

impl Vms {
    /// Whether every VM is one, whatever its name.
    pub fn is_all(&self) -> bool {
        matches!(self, Self::Named(begin, Some(end)) if begin.is_empty() && end.is_empty())
    }

    /// Whether the VM of that name is one; `label` knows its labels.
    pub fn has<'a>(&self, name: &str, label: impl FnOnce(&str) -> Option<&'a str>) -> bool {
        match self {
            Self::Named(whole, None) => whole == name,
            Self::Named(begin, Some(end)) => {
                name.len() >= begin.len() + end.len()
                    && name.starts_with(begin)
                    && name.ends_with(end)
            }
            Self::Labelled(key, value) => label(key) == Some(value),
        }
    }
}

impl FromStr for Vms {
    type Err = VmsError;

    fn from_str(text: &str) -> Result<Self, VmsError> {
        if text.len() > TEXT_MAX {
            return Err(VmsError);
        }
        if let Some(label) = text.strip_prefix("label:") {
            let (name, value) = label.split_once('=').ok_or(VmsError)?;
            let mut checked = Labels::default();
            checked.add(name, value).map_err(|_| VmsError)?;
            return Ok(Self::Labelled(name.into(), value.into()));
        }
        let is_part = |part: &str| {
            let is = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            part.bytes().all(is)
        };
        match text.split_once('*') {
            Some((begin, end)) if is_part(begin) && is_part(end) => {
                Ok(Self::Named(begin.into(), Some(end.into())))
            }
            None if text.parse::<adit_names::VmId>().is_ok() => Ok(Self::Named(text.into(), None)),
            _ => Err(VmsError),
        }
    }
}

impl fmt::Display for Vms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name, None) => f.pad(name),
            Self::Named(begin, Some(end)) => write!(f, "{begin}*{end}"),
            Self::Labelled(name, value) => write!(f, "label:{name}={value}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(vms: &str, name: &str) -> bool {
        let vms: Vms = vms.parse().unwrap();
        vms.has(name, |key| (key == "env").then_some("prod"))
    }

    #[test]
    fn vms_are_named_whole_by_their_ends_or_by_a_label() {
        assert!(has("web-1", "web-1") && !has("web-1", "web-11") && !has("web-1", "xweb-1"));
        assert!(has("web-*", "web-1") && has("web-*", "web-") && !has("web-*", "db-web-1"));
        assert!(has("*-db", "a-db") && !has("*-db", "a-dbx"));
        assert!(has("a*a", "aa") && !has("a*a", "a"), "ends do not overlap");
        assert!(has("*", "anything"));
        assert!(has("label:env=prod", "x"));
        assert!(!has("label:env=pro", "x") && !has("label:tier=prod", "x"));
    }

    #[test]
    fn r125_what_is_no_name_is_refused_and_not_folded() {
        let long = "a".repeat(TEXT_MAX + 1);
        for text in [
            "",
            "Web-1",
            "web-1.adit",
            "web_*",
            "a*b*c",
            "**",
            "web-?",
            "[ab]",
            "label:env",
            "label:=x",
            "label:env=",
            "label:env=a b",
            "LABEL:env=x",
            "web-1 ",
            "\u{212a}",
            &long,
        ] {
            assert!(text.parse::<Vms>().is_err(), "{text}");
        }
        for text in ["web-1", "web-*", "*", "*-x", "label:env=prod"] {
            assert_eq!(text.parse::<Vms>().unwrap().to_string(), text);
        }
    }
}
