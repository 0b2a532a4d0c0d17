//! `[[host]]` and `[peers]`: other hosts whose VMs are reached from here, how they are known, and what they may say.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use adit_names::VmId;
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};

use super::Config;
use super::certificates::{Files, Pem, Wrong, certified};
use crate::access::Subject;
use crate::access::subject;
use crate::reach::rows::{self, Rows};
use adit_tasks::vms::Vms;

/// Most `[[host]]` sections.
pub const HOSTS_MAX: usize = 64;

/// `[[host]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Its name.
    pub name: VmId,
    /// A listener of its proxy that speaks TLS.
    pub address: SocketAddr,
    /// The digest of its key, as server and as client.
    pub pin: Pin,
    /// VMs that it may claim to have.
    #[serde(default = "all")]
    pub names: Vec<String>,
    /// Users and groups of it that count here.
    #[serde(default)]
    pub vouches: Vec<String>,
}

fn all() -> Vec<String> {
    vec!["*".into()]
}

/// The digest of a key: `sha256/` and base64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin(Subject);

/// Why a text is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it takes `sha256/` with the base64 of a key's SHA-256")]
pub struct PinError;

impl Pin {
    /// As a certificate proves it.
    pub fn subject(&self) -> &Subject {
        &self.0
    }
}

impl FromStr for Pin {
    type Err = PinError;

    fn from_str(text: &str) -> Result<Self, PinError> {
        let is = text.starts_with(subject::PIN);
        let subject = format!("cert:{text}").parse().ok();
        subject.filter(|_| is).map(Self).ok_or(PinError)
    }
}

impl std::fmt::Display for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Subject::Cert(pin) => f.pad(pin),
            other => write!(f, "{other}"),
        }
    }
}

adit_names::serde_by_text!(Pin);

impl HostConfig {
    /// Whether it may claim to have a VM.
    pub fn may_claim(&self, vm: &VmId) -> bool {
        let is = |pattern: &String| {
            let pattern = pattern.parse::<Vms>();
            // No label of a VM elsewhere is known here.
            pattern.is_ok_and(|vms| vms.has(vm.as_str(), |_| None))
        };
        self.names.iter().any(is)
    }

    /// Whether a user or group of it counts here.
    pub fn vouches_for(&self, subject: &Subject) -> bool {
        self.vouches.contains(&subject.to_string())
    }
}

/// Why a text is no name of VMs that a host may claim.
pub(super) fn refuses_claim(text: &str) -> Option<String> {
    match text.parse::<Vms>() {
        Ok(Vms::Named(..)) => None,
        _ => Some("it takes a VM's name, or a name with one `*` in it".into()),
    }
}

/// Why a text is nobody whom a host may vouch for. A number is another user on each host.
pub(super) fn refuses_vouched(text: &str) -> Option<String> {
    match text.parse::<Subject>() {
        Ok(Subject::User(name) | Subject::Group(name)) if !is_number(&name) => None,
        _ => Some("it takes `user:NAME` and `group:NAME`, and no number".into()),
    }
}

/// Whether a user's name is a number.
pub fn is_number(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_digit())
}

/// `[peers]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Peers {
    /// File with this host's certificate.
    pub cert: Option<PathBuf>,
    /// File with its private key.
    pub key: Option<PathBuf>,
    /// File that says which host has which VM.
    pub map: Option<PathBuf>,
    /// What is in these files.
    #[serde(skip)]
    pub pem: Pem,
    /// What is in that one.
    #[serde(skip)]
    pub rows: Rows,
}

impl Peers {
    /// Takes the texts of its files.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub(super) fn take(&mut self, files: &Files) -> Result<(), Wrong> {
        self.pem = Pem::of(files, self.cert.as_deref(), self.key.as_deref(), None)?;
        Ok(())
    }

    /// What this host shows to others; none: it asks nobody.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub fn identity(&self) -> Result<Option<Arc<CertifiedKey>>, Wrong> {
        match (&self.cert, &self.key) {
            (None, None) => Ok(None),
            (Some(_), None) => Err((
                "cert",
                "it takes `key`, the certificate's private key".into(),
            )),
            (None, Some(_)) => Err(("key", "it takes `cert`, the key's certificate".into())),
            (Some(cert), Some(key)) => Ok(Some(Arc::new(certified(cert, key, &self.pem)?))),
        }
    }
}

impl Config {
    /// Takes the text of the file that says which host has which VM.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub(super) fn take_rows(&mut self, files: &Files) -> Result<(), Wrong> {
        let Some(path) = self.peers.map.clone() else {
            return Ok(());
        };
        let text = files.text(&path).map_err(|why| ("map", why))?;
        let own = self.host_name();
        let knows = |vm: &VmId, host: &VmId| {
            match self.host.iter().find(|other| other.name == *host) {
                Some(other) if other.may_claim(vm) => Ok(()),
                Some(_) => Err(format!("`names` of [[host]] `{host}` does not have `{vm}`")),
                // All hosts may have the same file.
                None if own == Some(host) => Ok(()),
                None => Err(format!("there is no [[host]] `{host}`")),
            }
        };
        let rows = rows::parse(&text, knows);
        let rows = rows.map_err(|e| ("map", format!("{}: {e}", path.display())))?;
        self.peers.rows = rows;
        Ok(())
    }

    /// What is wrong with a host's name among the others: the key at fault is `name`, or `pin`.
    pub(super) fn clash_of_host(&self, nth: usize) -> Option<Wrong> {
        let host = self.host.get(nth)?;
        let name = &host.name;
        if self.names.suffix.hides(name) {
            let why = format!("names that end with `.{name}` mean something else already");
            return Some(("name", why));
        }
        if self.names.host.as_ref() == Some(name) {
            return Some(("name", format!("`{name}` is this host's own name")));
        }
        if self.vm.iter().any(|vm| vm.name == *name) {
            let why = format!("a VM has the name `{name}`, and hosts and VMs share their names");
            return Some(("name", why));
        }
        let mut before = self.host[..nth].iter();
        if before.clone().any(|other| other.name == *name) {
            return Some(("name", format!("another host has the name `{name}`")));
        }
        let other = before.find(|other| other.pin == host.pin)?;
        let why = format!(
            "`{}` has the same key, so that nobody could tell them apart",
            other.name
        );
        Some(("pin", why))
    }
}
