//! What aditd has in its run directory: the lock, the operator's socket, and the addresses of its listeners.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use adit_channel::socket_path;
use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::sockopt::BindToDevice;
use nix::sys::socket::{getsockname, getsockopt, setsockopt};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

use crate::config::{Address, Config, ListenConfig, Speak};
use crate::no_passing;

/// Connections that may wait, also for the next worker.
const BACKLOG: i32 = 1024;
/// How many free ports of TCP are tried until one is free for UDP as well.
const ANY_PORT_TRIES: usize = 64;

/// Makes the run directory and the directory of the database.
///
/// # Errors
/// One line that says what to do.
pub fn make_dirs(config: &Config) -> anyhow::Result<()> {
    for dir in [&config.run_dir, &config.state_dir] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| {
                format!(
                    "cannot make {}: run as root, or set run_dir and state_dir",
                    dir.display()
                )
            })?;
    }
    Ok(())
}

/// One aditd a run_dir: whoever holds the lock may remove what an earlier one left.
///
/// # Errors
/// Another aditd has it, or the file cannot be used.
pub fn lock(run_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = run_dir.join("aditd.lock");
    let mut options = OpenOptions::new();
    let file = options
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)
                .and_then(|()| write!(lock, "{}", std::process::id()))
                .with_context(|| format!("cannot write {}", path.display()))?;
            Ok(lock)
        }
        Err(_) => {
            let pid = std::fs::read_to_string(&path).unwrap_or_default();
            bail!(
                "aditd runs in {} already (process {}): stop it, or set another run_dir",
                run_dir.display(),
                pid.trim()
            )
        }
    }
}

/// The sockets that clients connect to.
#[derive(Debug)]
pub struct Listeners {
    /// The operator's.
    pub api: UnixListener,
    /// For metrics, if wanted.
    pub metrics: Option<TcpListener>,
    /// For those of VMs, in the order of [`Config::fronts`]: the proxy's is the first.
    pub fronts: Vec<Bound>,
}

/// A socket that clients of VMs connect to.
#[derive(Debug)]
pub enum Bound {
    /// An IP address.
    Tcp(TcpListener),
    /// A path.
    Unix(UnixListener),
    /// An IP address, of which connections and datagrams are taken.
    Both(TcpListener, UdpSocket),
}

impl Bound {
    /// Its IP address and port, if it has one.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(tcp) | Self::Both(tcp, _) => tcp.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Takes a listener over that was bound to this address. None: a descriptor is missing.
    fn of(front: &ListenConfig, fds: &mut impl Iterator<Item = OwnedFd>) -> Option<Self> {
        let fd = fds.next()?;
        Some(match (&front.address, front.speak) {
            (Address::Tcp(_), Speak::Dns) => Self::Both(fd.into(), fds.next()?.into()),
            (Address::Tcp(_), _) => Self::Tcp(fd.into()),
            (Address::Unix(_), _) => Self::Unix(fd.into()),
        })
    }

    /// Its descriptors.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let (first, second) = match self {
            Self::Tcp(tcp) => (tcp.as_fd(), None),
            Self::Unix(unix) => (unix.as_fd(), None),
            Self::Both(tcp, udp) => (tcp.as_fd(), Some(udp.as_fd())),
        };
        [first].into_iter().chain(second)
    }

    fn bind(front: &ListenConfig, section: &str) -> anyhow::Result<Self> {
        let device = front.device.as_deref();
        Ok(match &front.address {
            Address::Tcp(at) if front.speak == Speak::Dns => {
                let (tcp, udp) = bind_both(*at, device, section)?;
                Self::Both(tcp, udp)
            }
            Address::Tcp(at) => Self::Tcp(bind(*at, device, section)?),
            Address::Unix(path) => {
                // It may be in anybody's directory, and another aditd's.
                let free = socket_path::has_stale(path);
                free.with_context(|| format!("cannot use the address of {section}"))?;
                // Every user may connect: grants say who may do what.
                let listener = bind_unix(path, 0o666)?;
                // Where it cannot be forbidden, it is put up with.
                no_passing::forbid(&listener);
                Self::Unix(listener)
            }
        })
    }

    fn is_of(&self, front: &ListenConfig) -> bool {
        let device = front.device.as_deref();
        let is_dns = front.speak == Speak::Dns;
        match (self, &front.address) {
            (Self::Tcp(tcp), Address::Tcp(at)) => !is_dns && is_at(tcp, *at) && is_by(tcp, device),
            (Self::Both(tcp, udp), Address::Tcp(at)) => {
                let of_tcp = is_at(tcp, *at) && is_by(tcp, device);
                is_dns && of_tcp && takes_datagrams(udp, tcp) && is_by(udp, device)
            }
            (Self::Unix(unix), Address::Unix(path)) => is_at_path(unix, path),
            _ => false,
        }
    }

    fn set_nonblocking(&self) -> std::io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.set_nonblocking(true),
            Self::Unix(unix) => unix.set_nonblocking(true),
            Self::Both(tcp, udp) => tcp
                .set_nonblocking(true)
                .and_then(|()| udp.set_nonblocking(true)),
        }
    }

    /// Where it is, as clients write it.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(tcp) | Self::Both(tcp, _) => tcp.local_addr().map(|at| at.to_string()),
            Self::Unix(unix) => unix.local_addr().map(|at| {
                let path = at.as_pathname().unwrap_or(Path::new(""));
                format!("unix:{}", path.display())
            }),
        }
        .unwrap_or_default()
    }
}

impl Listeners {
    /// Binds what the configuration says.
    ///
    /// # Errors
    /// One line that says which address is busy, and what to do.
    pub fn bind(config: &Config) -> anyhow::Result<Self> {
        let metrics = config.metrics.as_ref();
        let fronts = config.fronts().into_iter().enumerate().map(|(nth, front)| {
            let section = if nth == 0 { "[proxy]" } else { "[[listen]]" };
            Bound::bind(&front, section)
        });
        let listeners = Self {
            fronts: fronts.collect::<anyhow::Result<_>>()?,
            metrics: metrics
                .map(|m| bind(m.listen, None, "[metrics]"))
                .transpose()?,
            api: bind_unix(&config.api_socket(), 0o600)?,
        };
        listeners.nonblocking()?;
        Ok(listeners)
    }

    /// Takes them as descriptors, in the order of [`all`](Self::all).
    ///
    /// # Errors
    /// They are too few or too many, or no listeners.
    pub fn of(config: &Config, fds: Vec<OwnedFd>) -> std::io::Result<Self> {
        let fronts = config.fronts();
        let metrics = config.metrics.is_some();
        let of_dns = fronts.iter().filter(|front| front.speak == Speak::Dns);
        if fds.len() != 1 + usize::from(metrics) + fronts.len() + of_dns.count() {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let mut fds = fds.into_iter();
        let Some(api) = fds.next() else {
            return Err(std::io::ErrorKind::InvalidInput.into());
        };
        let metrics = metrics.then(|| fds.next()).flatten();
        let fronts = fronts.iter().map(|front| Bound::of(front, &mut fds));
        let fronts = fronts.collect::<Option<_>>();
        let listeners = Self {
            api: api.into(),
            metrics: metrics.map(TcpListener::from),
            fronts: fronts.ok_or(std::io::ErrorKind::InvalidInput)?,
        };
        listeners.nonblocking()?;
        Ok(listeners)
    }

    /// All of them: operator's socket, metrics, those of VMs.
    pub fn all(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let metrics = self.metrics.as_ref().map(AsFd::as_fd);
        let fronts = self.fronts.iter().flat_map(Bound::fds);
        [self.api.as_fd()].into_iter().chain(metrics).chain(fronts)
    }

    /// Whether these are the listeners that the configuration wants: a worker passed them.
    pub fn are_of(&self, config: &Config) -> bool {
        let metrics = match (&self.metrics, &config.metrics) {
            (Some(listener), Some(metrics)) => is_at(listener, metrics.listen),
            (None, None) => true,
            _ => false,
        };
        let fronts = config.fronts();
        let mut pairs = self.fronts.iter().zip(&fronts);
        let fronts =
            self.fronts.len() == fronts.len() && pairs.all(|(bound, front)| bound.is_of(front));
        metrics && fronts && is_at_path(&self.api, &config.api_socket())
    }

    /// Writes the addresses that were bound into the run directory.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write_addresses(&self, run_dir: &Path) -> anyhow::Result<()> {
        if let Some(metrics) = &self.metrics {
            let at = metrics.local_addr()?;
            write_whole(run_dir, "metrics.addr", &format!("{at}\n"))?;
        }
        let (proxy, others) = match self.fronts.split_first() {
            Some((proxy, others)) => (proxy.address(), others),
            None => return Ok(()),
        };
        if !others.is_empty() {
            let lines: String = others.iter().map(|front| front.address() + "\n").collect();
            write_whole(run_dir, "listen.addr", &lines)?;
        }
        // Whoever waits for this one finds the others, too.
        write_whole(run_dir, "proxy.addr", &format!("{proxy}\n"))
    }

    fn nonblocking(&self) -> std::io::Result<()> {
        self.api.set_nonblocking(true)?;
        if let Some(metrics) = &self.metrics {
            metrics.set_nonblocking(true)?;
        }
        self.fronts.iter().try_for_each(Bound::set_nonblocking)
    }
}

fn listens(fd: impl AsFd) -> bool {
    rustix::net::sockopt::socket_acceptconn(fd).is_ok_and(|listens| listens)
}

fn is_at(listener: &TcpListener, at: SocketAddr) -> bool {
    let is =
        |bound: SocketAddr| bound.ip() == at.ip() && (at.port() == 0 || bound.port() == at.port());
    listener.local_addr().is_ok_and(is) && listens(listener)
}

/// Whether it serves whoever comes in by this device; none: by any.
fn is_by(listener: &impl AsFd, device: Option<&str>) -> bool {
    let by = getsockopt(listener, BindToDevice);
    // A name has a zero at its end, and none has no name.
    by.is_ok_and(|by| {
        by.as_encoded_bytes().split(|b| *b == 0).next() == Some(device.unwrap_or("").as_bytes())
    })
}

/// Whether it takes datagrams from everybody, at the address of the listener.
fn takes_datagrams(udp: &UdpSocket, listener: &TcpListener) -> bool {
    let is_udp = sockopt::socket_type(udp).is_ok_and(|of| of == SocketType::DGRAM);
    let at = listener.local_addr().ok();
    is_udp && at.is_some() && udp.local_addr().ok() == at && udp.peer_addr().is_err()
}

fn is_at_path(listener: &UnixListener, path: &Path) -> bool {
    let at = getsockname::<nix::sys::socket::UnixAddr>(std::os::fd::AsRawFd::as_raw_fd(listener));
    at.is_ok_and(|at| at.path() == Some(path)) && listens(listener)
}

/// Removes what says that aditd serves.
pub fn clear(config: &Config) {
    let _ = socket_path::remove(&config.api_socket());
    for listen in &config.listen {
        if let Address::Unix(path) = &listen.address {
            let _ = socket_path::remove(path);
        }
    }
    for file in ["proxy.addr", "listen.addr", "metrics.addr"] {
        let _ = std::fs::remove_file(config.run_dir.join(file));
    }
}

fn bind(address: SocketAddr, device: Option<&str>, section: &str) -> anyhow::Result<TcpListener> {
    if let Some(device) = device {
        return bind_by(device, address).with_context(|| {
            format!("cannot listen on {address} by the network device {device}: `ip link` lists those there are; see `device` in {section}")
        });
    }
    let bound = TcpListener::bind(address).and_then(|listener| {
        rustix::net::listen(&listener, BACKLOG)
            .map(|()| listener)
            .map_err(Into::into)
    });
    bound.with_context(|| {
        format!("cannot listen on {address}: choose another address in {section} (port 0 = any)")
    })
}

/// Binds one port for connections and datagrams. Where any will do, the first that is free for both.
fn bind_both(
    address: SocketAddr,
    device: Option<&str>,
    section: &str,
) -> anyhow::Result<(TcpListener, UdpSocket)> {
    let mut tries = if address.port() == 0 {
        ANY_PORT_TRIES
    } else {
        1
    };
    loop {
        tries -= 1;
        let tcp = bind(address, device, section)?;
        match bind_datagrams(device, tcp.local_addr()?) {
            Ok(udp) => return Ok((tcp, udp)),
            Err(_) if tries > 0 => {}
            Err(e) => {
                let e = anyhow::Error::from(e);
                return Err(e.context(format!(
                    "cannot take datagrams at {address}: another DNS server may be there; choose another address in {section} \
                     (port 0 = any)"
                )));
            }
        }
    }
}

fn bind_datagrams(device: Option<&str>, address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = socket_with(
        family(address),
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    if let Some(device) = device {
        setsockopt(&socket, BindToDevice, &device.into())?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket.into())
}

/// As [`TcpListener::bind`], by a device from the beginning: nobody comes in by another one meanwhile. A socket that is bound to no device
/// yet may be bound by anybody since Linux 5.7.
fn bind_by(device: &str, address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = socket_with(
        family(address),
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_reuseaddr(&listener, true)?;
    setsockopt(&listener, BindToDevice, &device.into())?;
    rustix::net::bind(&listener, &address)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener.into())
}

fn family(address: SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

fn bind_unix(path: &Path, mode: u32) -> anyhow::Result<UnixListener> {
    // Nobody listens there: aditd's own paths are under the lock of the run directory, and others were looked at.
    socket_path::remove(path)?;
    // It has its mode from the beginning: whoever owns the directory could put a link in its place before a `chmod`.
    let umask = rustix::process::umask(Mode::from_raw_mode(!mode & 0o777));
    let bound = UnixListener::bind(path);
    rustix::process::umask(umask);
    let listener = bound.with_context(|| format!("cannot listen on {}", path.display()))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Whole or not at all: somebody may be waiting for the file.
///
/// # Errors
/// It cannot be written.
pub fn write_whole(run_dir: &Path, file: &str, text: &str) -> anyhow::Result<()> {
    let (path, new) = (run_dir.join(file), run_dir.join(format!("{file}.new")));
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_channel::socket_path::SocketPathError;

    #[test]
    fn what_is_no_socket_at_the_apis_path_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aditd.sock");
        std::fs::write(&path, "precious").unwrap();
        let refused = bind_unix(&path, 0o600).unwrap_err();
        let why = refused.downcast_ref();
        assert!(matches!(why, Some(SocketPathError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn the_mode_is_the_one_that_was_asked_for_whatever_the_umask() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o600, 0o666] {
            let path = dir.path().join("s");
            bind_unix(&path, mode).unwrap();
            let is = std::fs::symlink_metadata(&path).unwrap().permissions();
            assert_eq!(is.mode() & 0o777, mode);
        }
    }

    #[test]
    fn a_listener_of_another_process_is_not_taken_away_and_a_stale_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.sock");
        let at = |path: &Path| {
            let text = format!("[[listen]]\naddress = \"unix:{}\"\n", path.display());
            let config = Config::parse(Path::new("a.toml"), &text).unwrap();
            config.listen[0].clone()
        };
        let front = at(&path);
        let other = UnixListener::bind(&path).unwrap();
        let refused = Bound::bind(&front, "[[listen]]").unwrap_err();
        assert!(matches!(
            refused.downcast_ref(),
            Some(SocketPathError::InUse(_))
        ));
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        drop(other);
        Bound::bind(&front, "[[listen]]").unwrap();
        // A link is nobody's socket.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(Bound::bind(&at(&link), "[[listen]]").is_err());
        assert!(link.is_symlink());
    }

    #[test]
    fn only_the_listeners_that_the_configuration_wants_are_taken_from_a_worker() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let text = format!(
            "run_dir = \"{at}\"\n[proxy]\nlisten = \"127.0.0.1:0\"\n[metrics]\nlisten = \"127.0.0.1:0\"\n\
             [[listen]]\naddress = \"unix:{at}/proxy.sock\"\n"
        );
        let config = Config::parse(Path::new("a.toml"), &text).unwrap();
        let listeners = Listeners::bind(&config).unwrap();
        let passed = |fds: &[&dyn AsFd]| {
            let fds = fds
                .iter()
                .map(|fd| fd.as_fd().try_clone_to_owned().unwrap());
            Listeners::of(&config, fds.collect()).is_ok_and(|listeners| listeners.are_of(&config))
        };
        let api = &listeners.api;
        let [Bound::Tcp(proxy), Bound::Unix(unix)] = &listeners.fronts[..] else {
            panic!("{listeners:?}")
        };
        let metrics = listeners.metrics.as_ref().unwrap();
        assert!(passed(&[api, metrics, proxy, unix]));
        let by_lo = bind_by("lo", proxy.local_addr().unwrap());
        let free = bind_by("lo", "127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(by_lo.is_err(), "its address is taken");
        assert!(is_by(&free, Some("lo")) && !is_by(&free, None) && !is_by(proxy, Some("lo")));
        assert!(!passed(&[api, metrics, &free, unix]), "another device");
        assert!(!passed(&[api, metrics, proxy]), "one is missing");
        assert!(!passed(&[metrics, api, proxy, unix]), "another order");
        let other = UnixListener::bind(dir.path().join("other.sock")).unwrap();
        assert!(!passed(&[&other, metrics, proxy, unix]), "another path");
        let open = TcpListener::bind("0.0.0.0:0").unwrap();
        assert!(!passed(&[api, metrics, &open, unix]), "another address");
        let client = std::net::TcpStream::connect(proxy.local_addr().unwrap()).unwrap();
        assert!(!passed(&[api, metrics, &client, unix]), "no listener");
        let file = File::open("/dev/null").unwrap();
        assert!(!passed(&[api, metrics, &file, unix]), "no socket");
    }

    #[test]
    fn a_listener_for_dns_has_one_port_for_both_and_is_taken_over_with_both() {
        let text = "[[listen]]\naddress = \"127.0.0.1:0\"\nspeak = \"dns\"\n";
        let config = Config::parse(Path::new("a.toml"), text).unwrap();
        let front = &config.listen[0];
        let bound = Bound::bind(front, "[[listen]]").unwrap();
        let Bound::Both(tcp, udp) = &bound else {
            panic!("{bound:?}")
        };
        assert_eq!(tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        let again = |fds: &[&dyn AsFd]| {
            let fds = fds.iter().map(|fd| fd.as_fd().try_clone_to_owned());
            let mut fds = fds.map(Result::unwrap);
            Bound::of(front, &mut fds).is_some_and(|bound| bound.is_of(front))
        };
        assert!(again(&[tcp, udp]));
        assert!(!again(&[tcp]), "one is missing");
        assert!(!again(&[udp, tcp]) && !again(&[tcp, tcp]), "another kind");
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(!again(&[tcp, &other]), "another port");
        let theirs = other.local_addr().unwrap();
        let taken = config.listen[0].clone();
        let taken = ListenConfig {
            address: Address::Tcp(theirs),
            ..taken
        };
        assert!(Bound::bind(&taken, "[[listen]]").is_err());
        udp.connect(theirs).unwrap();
        assert!(!again(&[tcp, udp]), "from one client alone");
    }
}
