//! `/etc/adit-guest/adit-guest.toml`: the guest's id or where its card is, whom it trusts, what the host may reach.
//!
//! `dist/adit-guest.toml.example` has every key, its meaning, default and limit; a test holds it to [`Config`]. A key that
//! is not known is an error that names file, line and key: a misspelt limit must not silently be no limit.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use adit_names::{ServiceName, VmId};
use adit_tasks::Kind;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Where the configuration is if nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/adit-guest/adit-guest.toml";
/// Exit status of a configuration that cannot be used (`EX_CONFIG` of sysexits.h). Init systems do not start the agent again
/// then: only whoever writes the file can help.
pub const BAD_CONFIG: u8 = 78;
/// Most ports that may be listed.
const PORTS_MAX: usize = 256;
/// Most services that may be named.
const SERVICES_MAX: usize = 64;
/// Longest path of a Unix socket, bytes (`sun_path` of unix(7), without its NUL).
const PATH_MAX: usize = 107;
/// Longest file, bytes.
const FILE_MAX: u64 = 1 << 20;

/// Why a configuration cannot be used. The fault of whoever wrote it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{}:{line}: {}{message}", path.display(), key.as_ref().map(|k| format!("key `{k}`: ")).unwrap_or_default())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key at fault, if one is.
        key: Option<String>,
        /// What the parser says.
        message: String,
    },
    /// A value that has the right type and cannot be used.
    #[error("{}:{line}: key `{key}`: {message}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key at fault.
        key: &'static str,
        /// Why.
        message: String,
    },
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a configuration: keys and values, as in `vm_id = \"web-1\"`"
)]
pub struct Config {
    /// The id that the image was enrolled with; none: its card says it.
    #[serde(default)]
    pub vm_id: Option<VmId>,
    /// File with the guest's card.
    #[serde(default = "default_card")]
    pub card: PathBuf,
    /// The policy file, which must be there then; none: the file where it usually is, if it is there.
    #[serde(default)]
    pub policy: Option<PathBuf>,
    /// Directory of public keys.
    #[serde(default = "default_trust_dir")]
    pub trust_dir: PathBuf,
    /// Directory of the journal.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Directory of the texts of running scripts.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Local TCP ports that the host may reach.
    #[serde(default)]
    pub allow_ports: Vec<u16>,
    /// What the host may reach by a name.
    #[serde(default)]
    pub service: Vec<NamedService>,
    /// Whether nothing is served before the host has given a key.
    #[serde(default)]
    pub require_host_key: bool,
    /// Whose time the guest has.
    #[serde(default)]
    pub clock: ClockSource,
    /// The script executor.
    #[serde(default)]
    pub script: ScriptConfig,
    /// The file executor.
    #[serde(default)]
    pub file: FileConfig,
    /// This file.
    #[serde(skip)]
    pub path: PathBuf,
}

/// `[[service]]`: something local that the host may reach by a name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "tables, [[service]]")]
pub struct NamedService {
    /// The name: of `NAME.VM.svc`.
    pub name: VmId,
    /// What it is.
    pub to: Place,
}

/// Where a named service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of the loopback address.
    Tcp(u16),
}

impl FromStr for Place {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_prefix("unix:").map(PathBuf::from);
        let is_path = |path: &PathBuf| path.is_absolute() && path.as_os_str().len() <= PATH_MAX;
        if let Some(path) = path.filter(is_path) {
            return Ok(Self::Unix(path));
        }
        let service = text.parse::<ServiceName>().ok();
        service
            .and_then(|service| service.tcp_port())
            .map(Self::Tcp)
            .ok_or(
                "it takes `unix:` and an absolute path of at most 107 bytes, or `tcp:` and a port",
            )
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(port) => write!(f, "tcp:{port}"),
        }
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(text: D) -> Result<Self, D::Error> {
        let text = String::deserialize(text)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// Whose time the guest has. A host whose time is used decides by it which goals are valid now, but never which are signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockSource {
    /// Its own: the agent never sets the clock.
    #[default]
    Own,
    /// The host's: the agent sets the clock when it is off by a second or more.
    Host,
}

/// `[script]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [script]")]
pub struct ScriptConfig {
    /// Whether scripts may run at all.
    pub enabled: bool,
}

/// `[file]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [file]")]
pub struct FileConfig {
    /// Whether files may be written at all.
    pub enabled: bool,
    /// Directories under which they may be written.
    pub roots: Vec<PathBuf>,
}

impl Default for ScriptConfig {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Default for FileConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            roots: ["/etc", "/opt", "/srv", "/tmp", "/var"]
                .map(PathBuf::from)
                .into(),
        }
    }
}

fn default_card() -> PathBuf {
    "/etc/adit/card".into()
}

fn default_trust_dir() -> PathBuf {
    "/etc/adit-guest/trust".into()
}

fn default_state_dir() -> PathBuf {
    "/var/lib/adit-guest".into()
}

fn default_run_dir() -> PathBuf {
    "/run/adit-guest".into()
}

impl Config {
    /// Whether steps of a kind may run here: `enabled` in the table that has the kind's name.
    pub fn enabled(&self, kind: Kind) -> bool {
        match kind {
            Kind::Script => self.script.enabled,
            Kind::File => self.file.enabled,
        }
    }

    /// Says that steps of a kind are switched off here, if they are.
    pub fn switched_off(&self, kind: &str) -> Option<String> {
        let off = Kind::ALL.iter().filter(|kind| !self.enabled(**kind));
        let off = off.map(|kind| kind.name()).find(|name| *name == kind)?;
        Some(format!(
            "steps of kind `{off}` are switched off in this guest ([{off}] enabled = false)"
        ))
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong; says where.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.into(),
            source,
        };
        let text = read_regular(path).map_err(read)?;
        Self::parse(path, &text)
    }

    /// Reads what a file says of places and of who the guest is, and nothing else: also one with keys that only a newer agent
    /// has.
    ///
    /// # Errors
    /// It cannot be read, or is not TOML, or one of these is wrong.
    pub fn places(path: &Path) -> Result<Self, ConfigError> {
        const PLACES: [&str; 5] = ["vm_id", "card", "trust_dir", "state_dir", "run_dir"];
        let read = |source| ConfigError::Read {
            path: path.into(),
            source,
        };
        let text = read_regular(path).map_err(read)?;
        let mut all: toml::Table = text.parse().unwrap_or_default();
        all.retain(|key, _| PLACES.contains(&key));
        Self::parse(path, &all.to_string())
    }

    /// Checks the text of a file.
    ///
    /// # Errors
    /// Something in it is wrong; says where.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |s| s.start);
            ConfigError::Parse {
                path: path.into(),
                line: line_of(text, at),
                key: key_at(text, at),
                message: adit_tasks::plain(e.message()),
            }
        })?;
        let value = |key: &'static str, message: String| ConfigError::Value {
            path: path.into(),
            line: text
                .lines()
                .position(|l| l.trim_start().starts_with(key))
                .map_or(1, |i| i + 1),
            key,
            message,
        };
        let absolute = |key, dir: &Path| match dir.is_absolute() {
            true => Ok(()),
            false => Err(value(
                key,
                format!("{} is not an absolute path", dir.display()),
            )),
        };
        absolute("card", &config.card)?;
        if let Some(policy) = &config.policy {
            absolute("policy", policy)?;
        }
        absolute("trust_dir", &config.trust_dir)?;
        absolute("state_dir", &config.state_dir)?;
        absolute("run_dir", &config.run_dir)?;
        config
            .file
            .roots
            .iter()
            .try_for_each(|r| absolute("roots", r))?;
        if config.allow_ports.len() > PORTS_MAX {
            return Err(value(
                "allow_ports",
                format!("at most {PORTS_MAX} ports may be listed"),
            ));
        }
        if config.service.len() > SERVICES_MAX {
            let why = format!("at most {SERVICES_MAX} services may be named");
            return Err(value("[[service]]", why));
        }
        for (nth, service) in config.service.iter().enumerate() {
            let name = &service.name;
            if config.service[..nth]
                .iter()
                .any(|other| other.name == *name)
            {
                return Err(value("[[service]]", format!("two are named `{name}`")));
            }
            if ServiceName::named(name.as_str()).is_none() {
                let why =
                    format!("`{name}` is too long: a service's name has at most 60 characters");
                return Err(value("[[service]]", why));
            }
        }
        if config.allow_ports.contains(&0) {
            return Err(value("allow_ports", "0 is not a port".into()));
        }
        path.clone_into(&mut config.path);
        Ok(config)
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&b| b == b'\n').count() + 1
}

/// The key that an error at this offset is about: the line's own, wherever in the line the error is.
fn key_at(text: &str, at: usize) -> Option<String> {
    let line = text.lines().nth(line_of(text, at) - 1)?;
    let (key, _) = line.split_once('=')?;
    let key = key.trim();
    (!key.is_empty() && !key.starts_with('#')).then(|| key.to_owned())
}

/// Reads a file that is one: at SIGHUP, a FIFO in its place would hold up the thread that ends the agent.
fn read_regular(path: &Path) -> io::Result<String> {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = file.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = String::new();
    file.take(FILE_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_MAX {
        let why = format!("it has more than {FILE_MAX} bytes");
        return Err(io::Error::other(why));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
