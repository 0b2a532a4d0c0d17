//! What a client asks for: a VM, and what in it. Parsed once, from the names that all front ends share.
//!
//! A host name is `VM`, `VM.adit`, or `vsock-PORT.VM[.adit]` for a plain AF_VSOCK listener. It is the same in every case, and
//! with a dot at its end (RFC 9110 §4.2.3, RFC 1034 §3.1), as clients and DNS have it; the VM's own name is in lower case. No
//! name is ever resolved, so there is no address to be tricked into (R62, R63, R64).

use std::fmt;

use adit_names::ServiceName;
use adit_names::VmId;
use adit_port::control::Target;

/// Name suffix that may be there, for tools that want a dot in a host name.
const SUFFIX: &str = ".adit";
/// Label prefix of plain AF_VSOCK ports.
const VSOCK: &str = "vsock-";
/// Most characters of a client's text that are shown.
const SHOWN_MAX: usize = 80;

/// A destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The VM.
    pub vm: VmId,
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
    pub fn named(host: &str, port: Option<u16>) -> Result<Self, DestinationError> {
        let lower = host.to_ascii_lowercase();
        let name = lower.strip_suffix('.').unwrap_or(&lower);
        let name = name.strip_suffix(SUFFIX).unwrap_or(name);
        let of_vsock = name.strip_prefix(VSOCK).and_then(|n| n.split_once('.'));
        let (name, target) = match (of_vsock, port) {
            (Some((number, name)), _) => {
                let bad = || DestinationError::BadPort(shown(number));
                let port = canonical(number).ok_or_else(bad)?;
                (name, Target::VsockPort(port))
            }
            (None, Some(port)) => (name, Target::Service(ServiceName::tcp(port))),
            (None, None) => return Err(DestinationError::NoPort(shown(host))),
        };
        let vm = name
            .parse::<VmId>()
            .map_err(|e| DestinationError::BadName {
                name: shown(name),
                why: e.to_string(),
            })?;
        Ok(Self { vm, target })
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
        write!(f, "VM `{}` ", self.vm)?;
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
