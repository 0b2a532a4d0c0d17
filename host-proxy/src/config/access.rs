//! `[[listen]]`, `[[grant]]` and `[[token]]`: who gets in where, and what they may do.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::certificates::Pem;
use crate::access::{Grant, Grants};
use crate::reach::{Destination, Suffix};

/// Most `[[listen]]` sections.
pub const LISTENS_MAX: usize = 64;
/// Most addresses of this host that a listener answers.
pub const ANSWERS_MAX: usize = 2;
/// Most `[[token]]` sections.
pub const TOKENS_MAX: usize = 4096;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// A path.
    Unix(PathBuf),
}

/// Why a text is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither an IP address with a port nor `unix:` with an absolute path")]
pub struct AddressError;

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.strip_prefix("unix:") {
            Some(path) if Path::new(path).is_absolute() && !path.contains('\0') => {
                Ok(Self::Unix(path.into()))
            }
            Some(_) => Err(AddressError),
            None => text.parse().map(Self::Tcp).map_err(|_| AddressError),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

adit_names::serde_by_text!(Address);

/// What clients of a listener speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speak {
    /// HTTP/1.1 and HTTP/2: CONNECT, absolute-form, and origin-form by its `Host`.
    #[default]
    Http,
    /// SOCKS5, with names that aditd resolves.
    Socks5,
    /// TLS, whose server name names the VM. It is passed on as it is.
    Tls,
    /// Anything: each connection goes to one place, [`ListenConfig::to`].
    Any,
    /// DNS, over UDP and TCP.
    Dns,
}

/// Names of [`Speak`].
pub const SPEAKS: [&str; 5] = ["http", "socks5", "tls", "any", "dns"];

/// Whom a listener is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Clients of VMs.
    #[default]
    Proxy,
    /// Operators: it answers the API, and nothing else.
    Management,
}

/// Names of [`Role`].
pub const ROLES: [&str; 2] = ["proxy", "management"];

/// Longest name of a network device (`IFNAMSIZ`, linux/if.h, has room for a zero).
const DEVICE_MAX: usize = 15;

/// Whether a text can be the name of a network device.
pub(super) fn is_device(text: &str) -> bool {
    let is = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    (1..=DEVICE_MAX).contains(&text.len()) && text.bytes().all(is) && text != "." && text != ".."
}

/// Why a text is no address of a host.
pub(super) fn refuses_address(text: &str) -> Option<String> {
    match text.parse::<IpAddr>() {
        Ok(ip) if !ip.is_unspecified() && !ip.is_multicast() => None,
        _ => Some("it takes an IP address that a host can have".into()),
    }
}

/// `[[listen]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// Where.
    pub address: Address,
    /// Whom it is for.
    #[serde(default)]
    pub role: Role,
    /// Only clients that come in by this network device are served.
    #[serde(default)]
    pub device: Option<String>,
    /// What clients speak.
    #[serde(default)]
    pub speak: Speak,
    /// Where each connection leads: `VM:PORT`.
    #[serde(default)]
    pub to: Option<String>,
    /// What clients of DNS are called in grants.
    #[serde(default)]
    pub network: Option<String>,
    /// What they are told of this host's VMs; empty: the address of the listener.
    #[serde(default)]
    pub answer: Vec<IpAddr>,
    /// Port in the VM of TLS clients; none: the one of the address.
    #[serde(default)]
    pub port: Option<u16>,
    /// The address may be one that other machines reach.
    #[serde(default)]
    pub open: bool,
    /// File with its certificate, and those between that and a root: clients speak TLS.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// File with the certificate's private key.
    #[serde(default)]
    pub key: Option<PathBuf>,
    /// File with the roots that vouch for clients' certificates.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    /// What is in these files.
    #[serde(skip)]
    pub pem: Pem,
}

impl ListenConfig {
    /// Where each connection leads, if all lead to one place.
    pub fn destination(&self, suffix: &Suffix) -> Option<Destination> {
        let to = self.to.as_deref()?;
        destination(suffix, to)
    }

    /// Checks what is true of several keys together.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        match &self.address {
            Address::Tcp(at) if !self.open && !super::is_for_this_host(*at) => {
                let sent = match self.cert {
                    Some(_) => "over TLS: what they send, tokens too, is encrypted",
                    None => "what they send, tokens too, is not encrypted without `cert` and `key`",
                };
                let why = format!(
                    "{at} is no loopback address: use 127.0.0.1, or set `open = true` in this [[listen]] to serve other machines \
                     ({sent})"
                );
                return Err(("address", why));
            }
            Address::Tcp(_) => {}
            Address::Unix(path) => {
                let checked = adit_channel::socket_path::check_len(path);
                checked.map_err(|e| ("address", e.to_string()))?;
            }
        }
        self.check_tls()?;
        self.check_role()?;
        self.check_dns()?;
        if self.port.is_some() && self.speak != Speak::Tls {
            return Err((
                "port",
                "it takes `speak = \"tls\"`: other clients say it themselves, or have it in `to`"
                    .into(),
            ));
        }
        match (self.speak, &self.to) {
            (Speak::Any, None) => Err((
                "to",
                "`speak = \"any\"` needs it: where each connection leads".into(),
            )),
            (Speak::Any, Some(_)) | (_, None) => Ok(()),
            (_, Some(_)) => Err((
                "to",
                "it takes `speak = \"any\"`: other clients say themselves where they go".into(),
            )),
        }
    }
}

impl ListenConfig {
    fn check_role(&self) -> Result<(), (&'static str, String)> {
        if self.device.is_some() && matches!(self.address, Address::Unix(_)) {
            return Err((
                "device",
                "it takes an IP address: nobody comes to a Unix socket by a network device".into(),
            ));
        }
        if self.role == Role::Proxy {
            return Ok(());
        }
        if self.speak != Speak::Http {
            return Err((
                "speak",
                "it takes `role = \"proxy\"`: the API is HTTP".into(),
            ));
        }
        match &self.address {
            Address::Tcp(at) if self.cert.is_none() && !super::is_for_this_host(*at) => Err((
                "role",
                format!(
                    "{at} is no loopback address: a management listener for other machines needs `cert` and `key`, \
                     or whoever is on the way takes its callers' tokens"
                ),
            )),
            _ => Ok(()),
        }
    }
}

impl ListenConfig {
    fn check_dns(&self) -> Result<(), (&'static str, String)> {
        if self.speak != Speak::Dns {
            let other = "it takes `speak = \"dns\"`: no others ask for names alone";
            return match (&self.network, &self.answer[..]) {
                (None, []) => Ok(()),
                (Some(_), _) => Err(("network", other.into())),
                (None, _) => Err(("answer", other.into())),
            };
        }
        match &self.address {
            Address::Unix(_) => {
                return Err((
                    "address",
                    "`speak = \"dns\"` takes an IP address: it is asked over UDP and TCP".into(),
                ));
            }
            Address::Tcp(at) if at.ip().is_unspecified() => {
                let why = format!(
                    "{at} is all addresses of this host, and with `speak = \"dns\"` an answer must come from the one that was \
                     asked: use a [[listen]] for each"
                );
                return Err(("address", why));
            }
            Address::Tcp(_) => {}
        }
        let is_v4 = |ip: &IpAddr| ip.to_canonical().is_ipv4();
        match self.answer[..] {
            [a, b] if is_v4(&a) == is_v4(&b) => Err((
                "answer",
                "it takes one address of IPv4 and one of IPv6".into(),
            )),
            _ => Ok(()),
        }
    }

    /// What clients of DNS are told of this host's VMs.
    pub fn answers(&self) -> Vec<IpAddr> {
        match &self.address {
            Address::Tcp(at) if self.answer.is_empty() => vec![at.ip()],
            _ => self.answer.clone(),
        }
    }
}

/// `VM:PORT`, also `vsock-PORT.VM`.
pub(super) fn destination(suffix: &Suffix, text: &str) -> Option<Destination> {
    crate::proxy::authority::parse(suffix, text, None).ok()
}

/// `[[grant]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantConfig {
    /// To whom.
    pub to: Vec<String>,
    /// With which VMs.
    pub vms: Vec<String>,
    /// What may be done.
    pub may: Vec<String>,
    /// Until when; RFC 3339.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// Connections that each of them may open in a second.
    #[serde(default)]
    pub connections_per_s: Option<u32>,
    /// Bytes a second, each way, of all tunnels of each of them to one VM.
    #[serde(default)]
    pub bytes_per_s: Option<u64>,
    /// How many times a client's share each of them has.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// File and line.
    #[serde(skip)]
    pub place: String,
}

const fn default_weight() -> u32 {
    1
}

impl GrantConfig {
    /// What it means. It has been checked.
    fn meaning(&self) -> Grant {
        fn all<T: FromStr>(texts: &[String]) -> Vec<T> {
            texts.iter().filter_map(|text| text.parse().ok()).collect()
        }
        Grant {
            to: all(&self.to),
            vms: all(&self.vms),
            may: all(&self.may),
            until_ms: self.until.map(Timestamp::as_millisecond),
            connections_per_s: self.connections_per_s,
            bytes_per_s: self.bytes_per_s,
            weight: self.weight,
            place: self.place.clone(),
        }
    }
}

/// `[[token]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenConfig {
    /// Its name, as grants have it after `token:`.
    pub name: String,
    /// SHA-256 of the token, 64 hex digits.
    pub sha256: String,
    /// Until when; RFC 3339.
    #[serde(default)]
    pub until: Option<Timestamp>,
}

impl super::Config {
    /// Where clients get in: `[proxy]`, and then each `[[listen]]`.
    pub fn fronts(&self) -> Vec<ListenConfig> {
        let proxy = ListenConfig {
            address: Address::Tcp(self.proxy.listen),
            role: Role::Proxy,
            device: None,
            speak: Speak::Http,
            to: None,
            network: None,
            answer: vec![],
            port: None,
            open: self.proxy.open,
            cert: None,
            key: None,
            client_ca: None,
            pem: Pem::default(),
        };
        [proxy]
            .into_iter()
            .chain(self.listen.iter().cloned())
            .collect()
    }

    /// What is granted.
    pub fn grants(&self) -> Grants {
        Grants::new(self.grant.iter().map(GrantConfig::meaning).collect())
    }
}
