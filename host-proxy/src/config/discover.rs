//! `[[discover]]`: directories in which VMMs put their sockets. Each one that is found is a VM.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use adit_names::VmId;
use serde::{Deserialize, Serialize};

use super::{CarrierConfig, Hybrid, VmConfig};

/// Most such sections.
pub const DISCOVERS_MAX: usize = 16;
/// Most bytes of a pattern.
const PATTERN_MAX: usize = 96;
/// Most parts of a pattern.
const PARTS_MAX: usize = 4;
/// What stands for the name.
const NAME: &str = "{name}";

/// A directory, and what the VMs in it have in common.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiscoverConfig {
    /// Where it is looked.
    pub dir: PathBuf,
    /// For what.
    pub pattern: Pattern,
    /// As [`Hybrid::half_closes`].
    #[serde(default)]
    pub half_closes: bool,
    /// As [`VmConfig::allow`], and so on.
    #[serde(default)]
    pub allow: Vec<u16>,
    /// The same.
    #[serde(default)]
    pub allow_vsock: Vec<u32>,
    /// The same.
    #[serde(default)]
    pub allow_services: Vec<VmId>,
    /// The same.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl DiscoverConfig {
    /// Which directory and pattern, as a number: two sections have the same number if these are the same.
    pub fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.dir, self.pattern.to_string()).hash(&mut hasher);
        hasher.finish()
    }

    /// A VM that was found.
    pub fn vm(&self, name: &VmId, cid: u64) -> VmConfig {
        VmConfig {
            allow: self.allow.clone(),
            allow_vsock: self.allow_vsock.clone(),
            allow_services: self.allow_services.clone(),
            labels: self.labels.clone(),
            carrier: CarrierConfig::Hybrid(Hybrid {
                hybrid: self.socket(name),
                half_closes: self.half_closes,
            }),
            ..VmConfig::new(name.clone(), cid)
        }
    }

    /// Where the socket of a VM is.
    pub fn socket(&self, name: &VmId) -> PathBuf {
        self.dir.join(self.pattern.path(name))
    }

    /// # Errors
    /// The key at fault, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        // The shortest name there is.
        if let Ok(name) = "a".parse() {
            self.vm(&name, super::CID_MIN)
                .check()
                .map_err(|(key, why)| match key {
                    "carrier" => ("dir", why),
                    key => (key, why),
                })?;
        }
        Ok(())
    }
}

/// A path with a name in its first part: `{name}/v.sock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    before: String,
    behind: String,
    /// The other parts.
    below: Vec<String>,
}

impl Pattern {
    /// The name in an entry of the directory; none: it is no such entry.
    pub fn name<'a>(&self, entry: &'a str) -> Option<&'a str> {
        let name = entry.strip_prefix(&*self.before)?;
        name.strip_suffix(&*self.behind)
            .filter(|name| !name.is_empty())
    }

    /// The entry of a name.
    pub fn entry(&self, name: &VmId) -> String {
        format!("{}{name}{}", self.before, self.behind)
    }

    /// What is below an entry, the socket last; empty: the entry is the socket.
    pub fn below(&self) -> &[String] {
        &self.below
    }

    /// The whole path of a name.
    fn path(&self, name: &VmId) -> PathBuf {
        let entry = PathBuf::from(self.entry(name));
        self.below.iter().fold(entry, |path, part| path.join(part))
    }
}

/// Why a text is no pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// There is not one name in it, in the first part.
    #[error("it has `{NAME}` once, in its first part, and no other brace")]
    Name,
    /// It is no path below the directory.
    #[error("it is a path of at most {PARTS_MAX} parts below `dir`, without `.` and `..`")]
    Path,
    /// It is too long.
    #[error("it has at most {PATTERN_MAX} printable ASCII characters")]
    Text,
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.len() > PATTERN_MAX || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(PatternError::Text);
        }
        let mut parts = text.split('/').map(str::to_owned);
        let first = parts.next().unwrap_or_default();
        let below: Vec<_> = parts.collect();
        let is_part = |part: &String| !matches!(part.as_str(), "" | "." | "..");
        if !is_part(&first) || !below.iter().all(is_part) || below.len() >= PARTS_MAX {
            return Err(PatternError::Path);
        }
        let (before, behind) = first.split_once(NAME).ok_or(PatternError::Name)?;
        let has_brace = |part: &str| part.contains(['{', '}']);
        if has_brace(before) || has_brace(behind) || below.iter().any(|part| has_brace(part)) {
            return Err(PatternError::Name);
        }
        Ok(Self {
            before: before.into(),
            behind: behind.into(),
            below,
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{NAME}{}", self.before, self.behind)?;
        self.below.iter().try_for_each(|part| write!(f, "/{part}"))
    }
}

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

/// Whether two of these look for the same.
pub(super) fn same(all: &[DiscoverConfig], nth: usize) -> Option<usize> {
    let (this, before) = all.get(nth).map(|this| (this, &all[..nth]))?;
    let is_same = |other: &DiscoverConfig| {
        // As `Path` compares: without empty parts and `.`.
        Path::new(&other.dir) == Path::new(&this.dir) && other.pattern == this.pattern
    };
    before.iter().position(is_same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_has_one_name_in_its_first_part_and_leads_nowhere_else() {
        for (text, entry, path) in [
            ("{name}/v.sock", "web-1", "web-1/v.sock"),
            ("vm-{name}.sock", "vm-web-1.sock", "vm-web-1.sock"),
            ("{name}/root/run/v.sock", "web-1", "web-1/root/run/v.sock"),
        ] {
            let pattern: Pattern = text.parse().unwrap();
            let name = "web-1".parse().unwrap();
            assert_eq!(pattern.to_string(), text);
            assert_eq!(
                (pattern.entry(&name), pattern.path(&name)),
                (entry.into(), path.into())
            );
            assert_eq!(pattern.name(entry), Some("web-1"));
        }
        let pattern: Pattern = "vm-{name}.sock".parse().unwrap();
        for entry in ["vm-.sock", "vm-a", "a.sock", "vm-.soc", ""] {
            assert_eq!(pattern.name(entry), None, "{entry}");
        }
        for text in [
            "",
            "v.sock",
            "v/{name}",
            "{name}/../v",
            "/{name}",
            "{name}//v",
            "{name}/.",
            "{name}{name}",
            "{name}/{name}",
            "{nam}",
            "{name}/a/b/c/d",
            "{name}/a b",
            "{name}/\u{e9}",
        ] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
        assert!(
            format!("{{name}}/{}", "x".repeat(90))
                .parse::<Pattern>()
                .is_err()
        );
    }
}
