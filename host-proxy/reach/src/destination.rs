//! What a client asks for: a VM, and what in it. Parsed once, from the names that all front ends share.
//!
//! | host name | means |
//! |---|---|
//! | `VM` | a VM, wherever it is |
//! | `VM.HOST` | the one of that host |
//! | `vsock-PORT.VM`, `vsock-PORT.VM.HOST` | a plain AF_VSOCK listener of it |
//! | `SERVICE.VM.svc`, `SERVICE.VM.HOST.svc` | a service of it that its guest names |
//!
//! Each may have the suffix behind it (`.adit`). It is the same in every case, and
//! with a dot at its end (RFC 9110 §4.2.3, RFC 1034 §3.1), as clients and DNS have it; names of VMs and hosts themselves are in
//! lower case. No name is ever resolved to an address, so there is none to be tricked into (R62, R63, R64).

use std::fmt;
use std::str::FromStr;

use adit_names::ServiceName;
use adit_names::VmId;
use adit_port::control::Target;

/// Label prefix of plain AF_VSOCK ports.
const VSOCK: &str = "vsock-";
/// Last label of named services.
const SVC: &str = "svc";
/// Most characters of a client's text that are shown.
const SHOWN_MAX: usize = 80;
/// Longest suffix.
const SUFFIX_MAX: usize = 64;

/// What a name may end with, for tools that want a dot in a host name: a dot, and labels as DNS has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suffix(String);

/// Why a text is no suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it takes a dot and labels of a-z, 0-9 and inner `-`, at most {SUFFIX_MAX} bytes")]
pub struct SuffixError;

impl Default for Suffix {
    fn default() -> Self {
        Self(".adit".into())
    }
}

impl FromStr for Suffix {
    type Err = SuffixError;

    fn from_str(text: &str) -> Result<Self, SuffixError> {
        let labels = text.strip_prefix('.').ok_or(SuffixError)?;
        let is = text.len() <= SUFFIX_MAX && labels.split('.').all(is_label);
        is.then(|| Self(text.to_owned())).ok_or(SuffixError)
    }
}

impl fmt::Display for Suffix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

adit_names::serde_by_text!(Suffix);

impl Suffix {
    /// A name without it, in lower case.
    fn taken_from(&self, host: &str) -> String {
        let mut name = host.to_ascii_lowercase();
        if name.ends_with('.') {
            name.pop();
        }
        if name.ends_with(&self.0) {
            name.truncate(name.len() - self.0.len());
        }
        name
    }

    /// Whether no host may have this name, because names with it would be read as others.
    pub fn hides(&self, host: &VmId) -> bool {
        host.as_str() == SVC || self.0.strip_prefix('.') == Some(host.as_str())
    }

    /// Its labels.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.0.trim_start_matches('.').split('.')
    }

    /// The host that a name is, and nothing else: itself, not a VM of it.
    pub fn host(&self, name: &str) -> Option<VmId> {
        self.taken_from(name).parse().ok()
    }
}

fn is_label(text: &str) -> bool {
    text.parse::<VmId>().is_ok()
}

/// A destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The VM.
    pub vm: VmId,
    /// Of which host; none: whichever has it.
    pub host: Option<VmId>,
    /// Where in it.
    pub target: Target,
}

/// Why a text names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// No port where one is needed.
    #[error("`{0}` has no port: write VM:PORT")]
    NoPort(String),
    /// Not a port in its one spelling.
    #[error("`{0}` is no port: 1 to 65535, digits only")]
    BadPort(String),
    /// A user before `@`.
    #[error("user names in an authority mean nothing here")]
    User,
    /// Not the name of any VM.
    #[error("`{name}` can name no VM: {why}")]
    BadName {
        /// As given.
        name: String,
        /// Why not.
        why: String,
    },
}

impl Destination {
    /// What a host name with a port means. A name that has its own port needs no other, and none changes it.
    ///
    /// # Errors
    /// It names nothing that there could be.
    pub fn named(suffix: &Suffix, host: &str, port: Option<u16>) -> Result<Self, DestinationError> {
        let name = suffix.taken_from(host);
        if name.ends_with(&suffix.0) {
            // What is left is read as another name by whoever takes the suffix from it again.
            return Err(bad_name(
                host,
                format_args!("it ends with `{suffix}` twice"),
            ));
        }
        let (vm, target) = match name.split_once('.') {
            Some((first, rest)) if first.starts_with(VSOCK) => {
                let number = &first[VSOCK.len()..];
                let bad = || DestinationError::BadPort(shown(number));
                (rest, Target::VsockPort(canonical(number).ok_or_else(bad)?))
            }
            Some((first, rest)) if is_of_svc(rest) => {
                let service = ServiceName::named(first);
                let bad = || {
                    bad_name(
                        first,
                        "it is no name of a service: use a-z, 0-9 and inner '-'",
                    )
                };
                let vm = &rest[..rest.len() - SVC.len() - 1];
                (vm, Target::Service(service.ok_or_else(bad)?))
            }
            _ => match port {
                Some(port) => (&*name, Target::Service(ServiceName::tcp(port))),
                None => return Err(DestinationError::NoPort(shown(host))),
            },
        };
        let label = |text: &str| text.parse::<VmId>().map_err(|e| bad_name(&name, e));
        let (vm, host) = match vm.split_once('.') {
            Some((vm, host)) => (label(vm)?, Some(label(host)?)),
            None => (label(vm)?, None),
        };
        Ok(Self { vm, host, target })
    }

    /// A VM, wherever it is.
    pub fn of(vm: VmId, target: Target) -> Self {
        let host = None;
        Self { vm, host, target }
    }

    /// The same on a certain host.
    #[must_use]
    pub fn at(&self, host: &VmId) -> Self {
        Self {
            host: Some(host.clone()),
            ..self.clone()
        }
    }

    /// Name of the VM with that of its host, where there is one.
    pub fn name(&self) -> String {
        match &self.host {
            Some(host) => format!("{}.{host}", self.vm),
            None => self.vm.to_string(),
        }
    }

    /// As another host reads it, with any suffix or none: `web-1:80`, `vsock-5000.web-1:1`.
    pub fn authority(&self) -> String {
        let name = self.name();
        match &self.target {
            Target::VsockPort(port) => format!("{VSOCK}{port}.{name}:1"),
            Target::Service(service) => match (service.tcp_port(), service.name()) {
                (Some(port), _) => format!("{name}:{port}"),
                (None, Some(label)) => format!("{label}.{name}.{SVC}:1"),
                // Of the agent, and nothing that a client can name.
                (None, None) => format!("{name}:0"),
            },
        }
    }
}

/// Whether what follows a first label is `VM.svc` or `VM.HOST.svc`.
fn is_of_svc(rest: &str) -> bool {
    rest.rsplit_once('.').is_some_and(|(_, last)| last == SVC)
}

fn bad_name(name: &str, why: impl fmt::Display) -> DestinationError {
    DestinationError::BadName {
        name: shown(name),
        why: why.to_string(),
    }
}

impl Destination {
    /// Where in the VM, for programs: `tcp:80`, `vsock:5000`.
    pub fn what(&self) -> String {
        match &self.target {
            Target::VsockPort(port) => format!("vsock:{port}"),
            Target::Service(service) => service.to_string(),
        }
    }
}

/// `VM NAME port N`, to begin a sentence about it.
impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM `{}` ", self.name())?;
        match &self.target {
            Target::VsockPort(port) => write!(f, "port {port}"),
            Target::Service(service) => match service.tcp_port() {
                Some(port) => write!(f, "port {port}"),
                None => write!(f, "service `{service}`"),
            },
        }
    }
}

/// A client's text as it is shown.
pub fn shown(text: &str) -> String {
    adit_names::escape(text).at_most(SHOWN_MAX).to_string()
}

/// A number in its one spelling, not 0: no sign, no leading zero, no space.
pub fn canonical<T: std::str::FromStr + ToString + Default + PartialEq>(text: &str) -> Option<T> {
    let n: T = text.parse().ok()?;
    (n != T::default() && n.to_string() == text).then_some(n)
}
