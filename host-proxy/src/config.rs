//! `aditd.toml`: where things are, which VMs there are, and what of them may be reached.
//!
//! [`keys`] has every key with its meaning, default and limit, and [`example`] a file with all of them. An unknown key is an
//! error that names file, line and key: a misspelt limit must not silently be no limit.

mod access;
mod carrier;
mod certificates;
mod check;
mod discover;
pub mod hosts;
mod keys;
mod log;
mod names;
mod sources;
mod summary;
mod uids;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use adit_channel::socket_path;
use adit_names::{ServiceName, VmId};
use adit_port::control::IVSHMEM_SOCKET;
use adit_tasks::{Anchor, TrustStore};
use serde::{Deserialize, Serialize};

pub use access::{Address, GrantConfig, LISTENS_MAX, ListenConfig, Role, Speak, TokenConfig};
pub use carrier::{AutoAt, CarrierConfig, Hybrid, Named, Way};
pub use certificates::{Files, Pem, Terms};
pub use check::Problem;
use check::{Document, Documents};
pub use discover::{DISCOVERS_MAX, DiscoverConfig, Pattern};
pub use hosts::{HOSTS_MAX, HostConfig, Peers, Pin};
pub use keys::{Key, example, keys};
pub use log::{ACCESS_LOGS, AccessLog, AuditConfig, LogConfig};
pub use names::Names;
pub use sources::Sources;
pub use uids::UidRange;

/// Where the configuration is if nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/adit/aditd.toml";
/// Most bytes of the file, and of those in `conf.d` with it: more than [`VMS_MAX`] VMs need.
pub const FILE_MAX: u64 = 32 << 20;
/// Most VMs of a host.
pub const VMS_MAX: usize = 4096;
/// Most ports in a VM's allow-list.
pub const ALLOW_MAX: usize = 1024;
/// Most services of one VM that may be reached.
pub const SERVICES_MAX: usize = 64;
/// Longest poll before a sleep, microseconds.
pub const BUSY_POLL_US_MAX: u32 = 1000;
/// Most connections a second of a rate: more is none.
pub const RATE_MAX: u32 = 1_000_000;
/// Fewest and most bytes a second of a rate.
pub const BYTES_PER_S: (u64, u64) = (1024, 1_000_000_000_000);
/// Highest weight of a VM.
pub const WEIGHT_MAX: u32 = 100;
/// MiB of an ivshmem region at most; PCI wants a power of two.
pub const IVSHMEM_MIB_MAX: u32 = 1024;
/// Lowest CID that a guest may have (virtio 1.3 §5.10.4).
const CID_MIN: u64 = 3;
/// Highest CID that a guest may have; the next one means "any".
const CID_MAX: u64 = u32::MAX as u64 - 1;

/// Why a configuration cannot be used. The fault of whoever wrote it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {} (`aditd example-config` prints one)", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something in it is wrong.
    #[error("{}", lines(problems))]
    Wrong {
        /// Every mistake, at least one.
        problems: Vec<Problem>,
    },
}

/// A line for each mistake.
fn lines(problems: &[Problem]) -> String {
    let line = |p: &Problem| {
        let key = p.key.as_ref().map(|k| format!("`{k}`: "));
        let (path, key) = (p.file.display(), key.unwrap_or_default());
        format!("{path}:{}: {key}{}", p.line, p.message)
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Sockets and the VMs' directories.
    pub run_dir: PathBuf,
    /// The database.
    pub state_dir: PathBuf,
    /// The forward proxy.
    pub proxy: Proxy,
    /// What this host and its VMs are called.
    pub names: Names,
    /// Metrics over TCP, if wanted.
    pub metrics: Option<Listen>,
    /// Limits.
    pub limits: Limits,
    /// Port processes.
    pub ports: Ports,
    /// The part of aditd that is not root.
    pub worker: Worker,
    /// What is written of requests and tunnels.
    pub log: LogConfig,
    /// What is written of decisions.
    pub audit: AuditConfig,
    /// Whose word is believed.
    pub trust: Trust,
    /// Where clients get in, besides [`proxy`](Self::proxy).
    pub listen: Vec<ListenConfig>,
    /// What callers may do.
    pub grant: Vec<GrantConfig>,
    /// Tokens that callers may show.
    pub token: Vec<TokenConfig>,
    /// Other hosts.
    pub host: Vec<HostConfig>,
    /// What this one shows them.
    pub peers: Peers,
    /// Directories with VMMs' sockets.
    pub discover: Vec<DiscoverConfig>,
    /// The VMs that are always there.
    pub vm: Vec<VmConfig>,
}

/// `[proxy]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Proxy {
    /// IP address and port.
    pub listen: SocketAddr,
    /// The address need not be a loopback address. Clients of other machines are known by a token only.
    pub open: bool,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7080)),
            open: false,
        }
    }
}

impl Proxy {
    /// Checks that the operator has agreed to serve other machines.
    fn check(&self) -> Result<(), String> {
        if self.open || is_for_this_host(self.listen) {
            return Ok(());
        }
        Err(format!(
            "{} is no loopback address, and what other machines send there, tokens too, is not encrypted: \
             use 127.0.0.1, or set `open = true` in [proxy]",
            self.listen
        ))
    }
}

/// Whether only programs of this host reach an address.
fn is_for_this_host(listen: SocketAddr) -> bool {
    listen.ip().to_canonical().is_loopback()
}

/// A TCP address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// IP address and port.
    pub listen: SocketAddr,
    /// The address may be one that other machines reach.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub open: bool,
}

impl Listen {
    /// Checks that the operator has agreed to show the names of all VMs to other machines.
    fn check(&self) -> Result<(), String> {
        if self.open || is_for_this_host(self.listen) {
            return Ok(());
        }
        Err(format!(
            "{} is no loopback address, and whoever reaches it sees the names of all VMs, without a grant: \
             use 127.0.0.1, or set `open = true` in [metrics]; a [[listen]] of role \"management\" has the metrics for those \
             whom a grant lets `see` all VMs",
            self.listen
        ))
    }
}

/// `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Tasks that wait for one VM at most.
    pub queued_per_vm: u32,
    /// Client connections of the proxy at most.
    pub connections: usize,
    /// Client connections of one client at most; none: half of all.
    pub connections_per_client: Option<usize>,
    /// Requests to one VM that are under way at most; none: a quarter of all connections.
    pub requests_per_vm: Option<usize>,
    /// Tunnels go on when their grant ends.
    pub tunnels_outlive_grants: bool,
    /// Seconds that a VM may take to begin its response, from when it has the whole request.
    pub response_s: u32,
    /// Days that ended tasks are kept at most.
    pub kept_days: u32,
    /// Ended tasks of one VM that are kept at most.
    pub kept_per_vm: u32,
    /// MiB of output of one VM's tasks that are kept at most.
    pub kept_mib_per_vm: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queued_per_vm: 1024,
            connections: 4096,
            connections_per_client: None,
            requests_per_vm: None,
            tunnels_outlive_grants: false,
            response_s: 60,
            kept_days: 30,
            kept_per_vm: 10_000,
            kept_mib_per_vm: 64,
        }
    }
}

/// `[ports]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ports {
    /// Users that port processes run as, one a VM. None: [`UidRange::default`], as far as aditd can.
    pub uids: Option<UidRange>,
}

/// `[worker]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Worker {
    /// Name of the user that it is. None: `adit` if the system has it, or else one of `ports.uids`.
    pub user: Option<String>,
}

/// `[trust]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trust {
    /// Public keys of the role `card`, one a text.
    pub card: Vec<String>,
}

impl Trust {
    /// Reads a key, which must have the role.
    fn card_key(line: &str) -> Option<Anchor> {
        let anchor = Anchor::parse(line).ok()?;
        anchor.roles.has(adit_tasks::Role::Card).then_some(anchor)
    }

    /// The keys. They have been checked.
    pub fn anchors(&self) -> TrustStore {
        let mut trust = TrustStore::default();
        for anchor in self.card.iter().filter_map(|line| Self::card_key(line)) {
            // At most so many, or the file would be refused.
            let _ = trust.add(anchor);
        }
        trust
    }
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name and id.
    pub name: VmId,
    /// Its CID. In the file it may be left to [`carrier`](Self::carrier), if that has one.
    #[serde(default)]
    pub cid: u64,
    /// Guest TCP ports that may be reached.
    #[serde(default)]
    pub allow: Vec<u16>,
    /// Plain AF_VSOCK ports that may be reached.
    #[serde(default)]
    pub allow_vsock: Vec<u32>,
    /// Services that the guest names and that may be reached.
    // A build before does not know it, and reads what is in the database.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_services: Vec<VmId>,
    /// Microseconds that its port process polls before it sleeps, at most [`BUSY_POLL_US_MAX`].
    #[serde(default)]
    pub busy_poll_us: u32,
    /// MiB of the region that a QEMU with an ivshmem function gets: a power of two, at most [`IVSHMEM_MIB_MAX`].
    #[serde(default = "default_ivshmem_mib")]
    pub ivshmem_mib: u32,
    /// Guest memory may be any file. Whoever can truncate that file can end the VM's port process (SIGBUS); a sealed memfd
    /// cannot be truncated.
    #[serde(default)]
    pub allow_any_memory: bool,
    /// How the guest is reached.
    // A build before does not know it, and reads what is in the database.
    #[serde(default, skip_serializing_if = "CarrierConfig::is_default")]
    pub carrier: CarrierConfig,
    /// What it is used for. A label of a card with the same name does not count.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// How many times [`Limits::requests_per_vm`] it may have.
    // A build before does not know it, and reads what is in the database.
    #[serde(default = "default_weight", skip_serializing_if = "is_default_weight")]
    pub weight: u32,
    /// Connections that may be opened to it in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_per_s: Option<u32>,
    /// Bytes a second, each way, of all clients' tunnels together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
}

const fn default_weight() -> u32 {
    1
}

/// Serde passes a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_default_weight(weight: &u32) -> bool {
    *weight == default_weight()
}

/// Default of [`VmConfig::ivshmem_mib`].
const fn default_ivshmem_mib() -> u32 {
    4
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: "/run/adit".into(),
            state_dir: "/var/lib/adit".into(),
            proxy: Proxy::default(),
            names: Names::default(),
            metrics: None,
            limits: Limits::default(),
            ports: Ports::default(),
            worker: Worker::default(),
            log: LogConfig::default(),
            audit: AuditConfig::default(),
            trust: Trust::default(),
            listen: Vec::new(),
            grant: Vec::new(),
            token: Vec::new(),
            host: Vec::new(),
            peers: Peers::default(),
            discover: Vec::new(),
            vm: Vec::new(),
        }
    }
}

impl VmConfig {
    /// Makes a VM with the defaults of all that is not required.
    pub fn new(name: VmId, cid: u64) -> Self {
        Self {
            name,
            cid,
            allow: Vec::new(),
            allow_vsock: Vec::new(),
            allow_services: Vec::new(),
            busy_poll_us: 0,
            ivshmem_mib: default_ivshmem_mib(),
            allow_any_memory: false,
            carrier: CarrierConfig::default(),
            labels: BTreeMap::new(),
            weight: default_weight(),
            connections_per_s: None,
            bytes_per_s: None,
        }
    }

    /// Checks what the types do not say.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if !(CID_MIN..=CID_MAX).contains(&self.cid) {
            let why = format!("it takes {CID_MIN} to {CID_MAX}, not {}", self.cid);
            return Err(("cid", why));
        }
        if self.busy_poll_us > BUSY_POLL_US_MAX {
            let why = format!(
                "it takes 0 to {BUSY_POLL_US_MAX}, not {}",
                self.busy_poll_us
            );
            return Err(("busy_poll_us", why));
        }
        let mib = self.ivshmem_mib;
        if !mib.is_power_of_two() || mib > IVSHMEM_MIB_MAX {
            let why = format!("it takes a power of two from 1 to {IVSHMEM_MIB_MAX}, not {mib}");
            return Err(("ivshmem_mib", why));
        }
        self.carrier.check().map_err(|why| ("carrier", why))?;
        if let Some(cid) = self.carrier.kernel()
            && u64::from(cid) != self.cid
        {
            let why = format!(
                "{} is not the CID of its `carrier`, {cid}: leave it out",
                self.cid
            );
            return Err(("cid", why));
        }
        for (key, len) in [
            ("allow", self.allow.len()),
            ("allow_vsock", self.allow_vsock.len()),
        ] {
            if len > ALLOW_MAX {
                return Err((
                    key,
                    format!("it takes at most {ALLOW_MAX} ports, not {len}"),
                ));
            }
        }
        let is_named = |name: &VmId| ServiceName::named(name.as_str()).is_some();
        if !self.allow_services.iter().all(is_named) {
            let why = "a service's name has at most 60 characters".into();
            return Err(("allow_services", why));
        }
        if self.allow_services.len() > SERVICES_MAX {
            let why = format!("it takes at most {SERVICES_MAX} names");
            return Err(("allow_services", why));
        }
        if self.allow.contains(&0) {
            return Err(("allow", "it takes ports from 1 to 65535, not 0".into()));
        }
        if self.allow_vsock.contains(&u32::MAX) {
            let why = format!(
                "{} is no port: it stands for any (VMADDR_PORT_ANY)",
                u32::MAX
            );
            return Err(("allow_vsock", why));
        }
        let mut labels = adit_tasks::card::Labels::default();
        for (name, value) in &self.labels {
            labels
                .add(name, value)
                .map_err(|e| ("labels", e.to_string()))?;
        }
        Ok(())
    }
}

impl Config {
    /// Reads and checks a file, and those in `conf.d` beside it.
    ///
    /// # Errors
    /// They cannot be read, or something in them is wrong; says where.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::of(&Sources::read(path)?)
    }

    /// The settings that a running aditd does not change: without VMs and where they are found, grants, tokens, other hosts and certificates.
    pub fn settings(&self) -> Self {
        let mut settings = Self {
            vm: Vec::new(),
            grant: Vec::new(),
            token: Vec::new(),
            host: Vec::new(),
            peers: Peers::default(),
            discover: Vec::new(),
            trust: Trust::default(),
            ..self.clone()
        };
        for listen in &mut settings.listen {
            listen.forget_tls();
        }
        settings
    }

    /// These settings, with what a running aditd changes as `newer` has it.
    #[must_use]
    pub fn with_changes_of(mut self, newer: Self) -> Self {
        self.take_certificates_of(&newer);
        let Self {
            vm,
            grant,
            token,
            host,
            peers,
            discover,
            trust,
            ..
        } = newer;
        Self {
            vm,
            grant,
            token,
            host,
            peers,
            discover,
            trust,
            ..self
        }
    }

    /// Of [`settings`](Self::settings).
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        // It was read from text, and can be written as such.
        serde_json::to_string(&self.settings())
            .unwrap_or_default()
            .hash(&mut hasher);
        hasher.finish()
    }

    /// Checks the text of one file; `path` is for messages only.
    ///
    /// # Errors
    /// Something in it is wrong; says where.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::of(&Sources::one(path, text))
    }

    /// Checks the texts of a configuration, and puts them together.
    ///
    /// # Errors
    /// Something in them is wrong; says where.
    pub fn of(sources: &Sources) -> Result<Self, ConfigError> {
        let wrong = |mut problems: Vec<Problem>| {
            problems.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
            ConfigError::Wrong { problems }
        };
        let mut whole = Self::default();
        let hostname = sources.hostname();
        let (mut documents, mut problems) = (Documents::default(), Vec::new());
        for (nth, (path, text)) in sources.iter().enumerate() {
            let document = match Document::parse(path, text) {
                Ok(document) => document,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            let found = document.check(nth > 0);
            if !found.is_empty() {
                problems.extend(found);
                continue;
            }
            // What has passed the check is what the types take.
            match toml::from_str::<Self>(text) {
                Ok(part) => documents.add(document, part, &mut whole),
                Err(e) => problems.push(check::of_toml(path, text, &e)),
            }
        }
        whole.names.hostname = hostname.cloned();
        if problems.is_empty() {
            problems = check::compare(&whole, &documents);
        }
        if problems.is_empty() {
            problems = check::certificates(&mut whole, sources.files(), &documents);
        }
        match problems.is_empty() {
            true => Ok(whole),
            false => Err(wrong(problems)),
        }
    }

    /// Checks that the sockets of a VM can be bound: its port process would find that out too late.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub fn check_paths(&self, vm: &VmId) -> Result<(), (&'static str, String)> {
        // Its longest.
        let longest = vm_dir(&self.run_dir, vm).join(IVSHMEM_SOCKET);
        socket_path::check_len(&longest).map_err(|e| ("run_dir", e.to_string()))
    }

    /// The API's socket.
    pub fn api_socket(&self) -> PathBuf {
        self.run_dir.join("aditd.sock")
    }
}

/// A VM's directory.
pub fn vm_dir(run_dir: &Path, vm: &VmId) -> PathBuf {
    run_dir.join("vm").join(vm.as_str())
}

#[cfg(test)]
mod tests;
