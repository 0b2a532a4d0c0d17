//! `aditd.toml`: where things are, which VMs there are, what of them may be reached.
//!
//! ```toml
//! run_dir = "/run/adit"             # sockets: aditd.sock, proxy.addr, metrics.addr, vm/NAME/{vhost,ctl}.sock
//! state_dir = "/var/lib/adit"       # the database
//!
//! [proxy]
//! listen = "127.0.0.1:7080"         # port 0 = any; the address is written to RUN/proxy.addr
//! open = false                      # true: `listen` may be an address that other machines reach, and they may use it
//!
//! [metrics]
//! listen = "127.0.0.1:7081"         # optional; they are on the API socket too
//!
//! [limits]                          # all optional; these are the defaults
//! queued_per_vm = 1024              # tasks that wait for one VM
//! connections = 4096                # clients of the proxy at the same time; fewer where descriptors are few
//! connections_per_client = 2048     # of one address (all of this host's users have one): half
//! requests_per_vm = 1024            # to one VM that are under way: a quarter
//! response_s = 60                   # what a VM may take to begin an answer: 504 then
//! kept_days = 30                    # what has ended is forgotten after this long, ...
//! kept_per_vm = 10000               # ... and the oldest when a VM has more tasks than this, ...
//! kept_mib_per_vm = 64              # ... or more output than this
//!
//! [ports]
//! uids = "70000-78191"              # optional: where aditd is root, each VM's port process is another of these users
//!
//! [[vm]]
//! name = "web-1"
//! cid = 3
//! allow = [80, 22]                  # guest TCP ports
//! allow_vsock = [5000]              # plain AF_VSOCK ports, reached as vsock-5000.web-1
//! busy_poll_us = 50                 # optional: look on before sleeping; for vCPUs with cores of their own
//! ivshmem_mib = 4                   # optional: what a QEMU that connects to RUN/vm/NAME/ivshmem.sock is given
//! allow_any_memory = true           # optional: its memory may be any file (memory-backend-file), not only a sealed memfd
//! ```
//! An unknown key is an error that names file, line and key: a misspelt limit must not silently be no limit.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use adit_channel::socket_path;
use adit_port::control::IVSHMEM_SOCKET;
use adit_tasks::VmId;
use serde::Deserialize;

/// Where the configuration is if nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/adit/aditd.toml";
/// Most VMs of a host.
pub const VMS_MAX: usize = 4096;
/// Most ports in a VM's allow-list.
pub const ALLOW_MAX: usize = 1024;
/// Longest look before a sleep, microseconds.
pub const BUSY_POLL_US_MAX: u32 = 1000;
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
    #[error("cannot read the configuration {} (`aditd --help` shows a short one)", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something in it is wrong.
    #[error("{}:{line}: {}{message}", path.display(), key.as_ref().map(|k| format!("`{k}`: ")).unwrap_or_default())]
    Value {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The key at fault, if one is.
        key: Option<String>,
        /// What is wrong.
        message: String,
    },
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Sockets and the VMs' directories.
    pub run_dir: PathBuf,
    /// The database.
    pub state_dir: PathBuf,
    /// The forward proxy.
    pub proxy: Proxy,
    /// Metrics over TCP, if wanted.
    pub metrics: Option<Listen>,
    /// Limits.
    pub limits: Limits,
    /// Port processes.
    pub ports: Ports,
    /// The VMs that are always there.
    pub vm: Vec<VmConfig>,
}

/// `[proxy]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Proxy {
    /// IP address and port.
    pub listen: SocketAddr,
    /// The address need not be a loopback address. Whoever reaches it reaches every port that a VM allows: the proxy has no
    /// authentication.
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
    /// Checks that nobody is served without the operator's word.
    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.open || self.listen.ip().to_canonical().is_loopback() {
            return Ok(());
        }
        let why = format!(
            "{} is no loopback address, and whoever reaches it may use the proxy, without authentication: \
             use 127.0.0.1, or set `open = true` in [proxy]",
            self.listen
        );
        Err(("listen", why))
    }
}

/// A TCP address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// IP address and port.
    pub listen: SocketAddr,
}

/// `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Tasks that wait for one VM at most.
    pub queued_per_vm: u32,
    /// Client connections of the proxy at most.
    pub connections: usize,
    /// Client connections of one client at most; if nothing is said, half of all.
    pub connections_per_client: Option<usize>,
    /// Requests to one VM that are under way at most; if nothing is said, a quarter of all connections.
    pub requests_per_vm: Option<usize>,
    /// Seconds that a VM may take until its answer begins, from when it has the request.
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
            response_s: 60,
            kept_days: 30,
            kept_per_vm: 10_000,
            kept_mib_per_vm: 64,
        }
    }
}

/// `[ports]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ports {
    /// Users that port processes run as, one a VM. None: [`UidRange::default`], as far as aditd can.
    pub uids: Option<UidRange>,
}

/// User ids, and group ids of the same numbers, that are nobody else's: `FIRST-LAST`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct UidRange {
    first: u32,
    last: u32,
}

/// `nobody`, on every system.
const UID_NOBODY: u32 = 65_534;

impl UidRange {
    /// The lowest.
    pub fn first(self) -> u32 {
        self.first
    }

    /// The highest.
    pub fn last(self) -> u32 {
        self.last
    }

    /// Whether it is one of them.
    pub fn contains(self, uid: u32) -> bool {
        (self.first..=self.last).contains(&uid)
    }

    /// All of them.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        self.first..=self.last
    }
}

impl Default for UidRange {
    /// Above what distributions give to users, services and dynamic users (65,535 at most), below what they give to users'
    /// containers (100,000 and more): two for each VM that there may be.
    fn default() -> Self {
        Self {
            first: 70_000,
            last: 78_191,
        }
    }
}

impl std::str::FromStr for UidRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ends = text.split_once('-');
        let ends = ends.and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        let (first, last) = ends.ok_or("use FIRST-LAST, such as \"70000-78191\"")?;
        let range = Self { first, last };
        if first == 0 || last == u32::MAX || first > last {
            return Err(format!("{range} are no users from 1 to {}", u32::MAX - 1));
        }
        if range.contains(UID_NOBODY) {
            return Err(format!("{range} has {UID_NOBODY}, which is nobody's own"));
        }
        Ok(range)
    }
}

impl TryFrom<String> for UidRange {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::fmt::Display for UidRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name and id.
    pub name: VmId,
    /// Its CID.
    pub cid: u64,
    /// Guest TCP ports that may be reached.
    #[serde(default)]
    pub allow: Vec<u16>,
    /// Plain AF_VSOCK ports that may be reached.
    #[serde(default)]
    pub allow_vsock: Vec<u32>,
    /// Microseconds that its port process looks on before it sleeps (at most 1,000; 0, the default: none). It answers in a
    /// fraction of the time, at the price of the CPU: for VMs whose vCPUs have cores of their own.
    #[serde(default)]
    pub busy_poll_us: u32,
    /// MiB of the region that a QEMU with an ivshmem function is given: a power of two, at most 1,024.
    #[serde(default = "default_ivshmem_mib")]
    pub ivshmem_mib: u32,
    /// Its VMM may hand any file over as guest memory (`memory-backend-file,share=on`). Whoever can truncate that file can
    /// end the VM's port process (SIGBUS); without it, memory is a memfd that is sealed against that.
    #[serde(default)]
    pub allow_any_memory: bool,
}

/// [`VmConfig::ivshmem_mib`] where nothing is said.
pub const fn default_ivshmem_mib() -> u32 {
    4
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: "/run/adit".into(),
            state_dir: "/var/lib/adit".into(),
            proxy: Proxy::default(),
            metrics: None,
            limits: Limits::default(),
            ports: Ports::default(),
            vm: Vec::new(),
        }
    }
}

impl VmConfig {
    /// Checks what the types do not say.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if !(CID_MIN..=CID_MAX).contains(&self.cid) {
            return Err((
                "cid",
                format!("{} is reserved: use {CID_MIN} to {CID_MAX}", self.cid),
            ));
        }
        if self.busy_poll_us > BUSY_POLL_US_MAX {
            let why = format!("{} is more than {BUSY_POLL_US_MAX}", self.busy_poll_us);
            return Err(("busy_poll_us", why));
        }
        let mib = self.ivshmem_mib;
        if !mib.is_power_of_two() || mib > IVSHMEM_MIB_MAX {
            let why = format!("{mib} is no power of two from 1 to {IVSHMEM_MIB_MAX}");
            return Err(("ivshmem_mib", why));
        }
        if self.allow.len() > ALLOW_MAX || self.allow_vsock.len() > ALLOW_MAX {
            return Err(("allow", format!("at most {ALLOW_MAX} ports may be listed")));
        }
        if self.allow.contains(&0) {
            return Err(("allow", "0 is not a port".into()));
        }
        Ok(())
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong; says where.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        Self::parse(path, &text)
    }

    /// Checks the text of a file; `path` is for messages only.
    ///
    /// # Errors
    /// Something in it is wrong; says where.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let error = |line, key: Option<String>, message| ConfigError::Value {
            path: path.into(),
            line,
            key,
            message,
        };
        let config: Self = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |s| s.start);
            let line = text.bytes().take(at).filter(|&b| b == b'\n').count();
            let key = text
                .lines()
                .nth(line)
                .and_then(|l| l.split_once('='))
                .map(|(k, _)| k.trim().to_owned());
            error(line + 1, key, e.message().replace('\n', " "))
        })?;
        for dir in [&config.run_dir, &config.state_dir] {
            if !dir.is_absolute() {
                return Err(error(
                    1,
                    None,
                    format!("{} is not an absolute path", dir.display()),
                ));
            }
        }
        config.proxy.check().map_err(|(key, message)| {
            error(key_line(text, "[proxy]", key), Some(key.into()), message)
        })?;
        if config.vm.len() > VMS_MAX {
            return Err(error(
                1,
                Some("vm".into()),
                format!("at most {VMS_MAX} VMs are allowed"),
            ));
        }
        socket_path::check_len(&config.api_socket())
            .map_err(|e| error(1, Some("run_dir".into()), e.to_string()))?;
        let (mut names, mut cids) = (BTreeMap::new(), BTreeMap::new());
        for (nth, vm) in config.vm.iter().enumerate() {
            let line = vm_line(text, nth);
            vm.check()
                .and_then(|()| config.check_paths(&vm.name))
                .map_err(|(key, message)| error(line, Some(key.into()), message))?;
            if names.insert(&vm.name, nth).is_some() {
                return Err(error(
                    line,
                    Some("name".into()),
                    format!("`{}` is taken by an earlier VM", vm.name),
                ));
            }
            if let Some(other) = cids.insert(vm.cid, nth) {
                let other = &config.vm[other].name;
                return Err(error(
                    line,
                    Some("cid".into()),
                    format!("{} of `{}` is taken by `{other}`", vm.cid, vm.name),
                ));
            }
        }
        Ok(config)
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

/// Line of a key of a table; 1 if it is written in another way.
fn key_line(text: &str, table: &str, key: &str) -> usize {
    let lines = text.lines().map(str::trim_start).enumerate();
    let mut in_table = lines.skip_while(|(_, line)| !line.starts_with(table));
    in_table
        .find(|(_, line)| line.split('=').next().is_some_and(|k| k.trim() == key))
        .map_or(1, |(at, _)| at + 1)
}

/// Line of the n-th `[[vm]]`.
fn vm_line(text: &str, nth: usize) -> usize {
    let is_vm = |(_, l): &(usize, &str)| l.trim_start().starts_with("[[vm]]");
    text.lines()
        .enumerate()
        .filter(is_vm)
        .nth(nth)
        .map_or(1, |(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use adit_channel::socket_path::PATH_MAX;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("a.toml"), text)
    }

    #[test]
    fn an_empty_file_is_a_configuration() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn a_run_dir_that_is_too_long_for_a_socket_is_refused() {
        let vm = "[[vm]]\nname = \"web-1\"\ncid = 3\n";
        // `/` and the rest of RUN/vm/web-1/ivshmem.sock.
        let rest = 1 + "/vm/web-1/ivshmem.sock".len();
        let dir = |len: usize| format!("run_dir = \"/{}\"\n", "x".repeat(len));
        parse(&(dir(PATH_MAX - rest) + vm)).unwrap();
        for (text, line) in [(dir(PATH_MAX - rest + 1) + vm, 2), (dir(PATH_MAX), 1)] {
            let e = parse(&text).unwrap_err();
            let ConfigError::Value {
                line: at,
                key: Some(key),
                ..
            } = &e
            else {
                panic!("{e}")
            };
            assert_eq!((*at, key.as_str()), (line, "run_dir"), "{e}");
        }
    }

    #[test]
    fn a_proxy_for_other_machines_needs_the_operators_word() {
        let listen = |address: &str| format!("[proxy]\nlisten = \"{address}\"\n");
        for address in [
            "127.0.0.1:1",
            "127.8.9.1:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            parse(&listen(address)).unwrap();
        }
        for address in [
            "0.0.0.0:7080",
            "[::]:7080",
            "192.0.2.1:7080",
            "[fe80::1]:7080",
            "[::ffff:192.0.2.1]:7080",
        ] {
            let e = parse(&listen(address)).unwrap_err();
            let ConfigError::Value { line: 2, key, .. } = &e else {
                panic!("{e}")
            };
            assert_eq!(key.as_deref(), Some("listen"), "{e}");
            let open = parse(&(listen(address) + "open = true\n")).unwrap();
            assert_eq!(open.proxy.listen.to_string(), address);
            parse(&(listen(address) + "open = false\n")).unwrap_err();
        }
    }

    #[test]
    fn mistakes_name_file_line_and_key() {
        let vm = "[[vm]]\nname = \"a\"\ncid = 3\n";
        for (text, line, key) in [
            (
                "\n[proxy]\nlissten = \"127.0.0.1:1\"\n".to_owned(),
                3,
                "lissten",
            ),
            ("[ports]\nuids = \"0-70000\"\n".to_owned(), 2, "uids"),
            ("[ports]\nuids = \"65000-66000\"\n".to_owned(), 2, "uids"),
            ("[ports]\nuids = \"70000\"\n".to_owned(), 2, "uids"),
            (format!("{vm}alow = [80]\n"), 4, "alow"),
            (format!("{vm}allow = [70000]\n"), 4, "allow"),
            (format!("{vm}ivshmem_mib = 6\n"), 1, "ivshmem_mib"),
            ("[[vm]]\nname = \"A\"\ncid = 3\n".to_owned(), 2, "name"),
            ("[[vm]]\nname = \"a\"\ncid = 2\n".to_owned(), 1, "cid"),
            (format!("{vm}[[vm]]\nname = \"a\"\ncid = 4\n"), 4, "name"),
            (format!("{vm}[[vm]]\nname = \"b\"\ncid = 3\n"), 4, "cid"),
        ] {
            let e = parse(&text).unwrap_err();
            let ConfigError::Value {
                line: at,
                key: Some(k),
                ..
            } = &e
            else {
                panic!("{e}")
            };
            assert_eq!((*at, k.as_str()), (line, key), "{e}");
            assert!(
                e.to_string()
                    .starts_with(&format!("a.toml:{line}: `{key}`: ")),
                "{e}"
            );
        }
    }
}
