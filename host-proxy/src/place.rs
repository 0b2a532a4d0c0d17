//! What aditd has in its run directory: the lock, the operator's socket, and the addresses of its listeners.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use adit_channel::socket_path;
use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::getsockname;

use crate::config::Config;

/// Connections that may wait, also for the next worker.
const BACKLOG: i32 = 1024;

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
    /// The proxy's.
    pub proxy: TcpListener,
    /// For metrics, if wanted.
    pub metrics: Option<TcpListener>,
}

impl Listeners {
    /// Binds what the configuration says.
    ///
    /// # Errors
    /// One line that says which address is busy, and what to do.
    pub fn bind(config: &Config) -> anyhow::Result<Self> {
        let metrics = config.metrics.as_ref();
        let listeners = Self {
            proxy: bind(config.proxy.listen, "[proxy]")?,
            metrics: metrics.map(|m| bind(m.listen, "[metrics]")).transpose()?,
            api: bind_api(&config.api_socket())?,
        };
        listeners.nonblocking()?;
        Ok(listeners)
    }

    /// Takes them as descriptors, in the order of [`all`](Self::all).
    ///
    /// # Errors
    /// They are too few, or no listeners.
    pub fn of(fds: Vec<OwnedFd>) -> std::io::Result<Self> {
        let mut fds = fds.into_iter();
        let (Some(api), Some(proxy)) = (fds.next(), fds.next()) else {
            return Err(std::io::ErrorKind::InvalidInput.into());
        };
        let listeners = Self {
            api: api.into(),
            proxy: proxy.into(),
            metrics: fds.next().map(TcpListener::from),
        };
        listeners.nonblocking()?;
        Ok(listeners)
    }

    /// All of them: operator's socket, proxy, metrics.
    pub fn all(&self) -> impl Iterator<Item = std::os::fd::BorrowedFd<'_>> {
        let metrics = self.metrics.as_ref().map(AsFd::as_fd);
        [self.api.as_fd(), self.proxy.as_fd()]
            .into_iter()
            .chain(metrics)
    }

    /// Whether these are the listeners that the configuration wants: a worker passed them.
    pub fn are_of(&self, config: &Config) -> bool {
        let listens = |fd: &dyn AsFd| {
            rustix::net::sockopt::socket_acceptconn(fd.as_fd()).is_ok_and(|listens| listens)
        };
        let is_at = |listener: &TcpListener, at: SocketAddr| {
            let bound = listener.local_addr().ok();
            let is = |bound: SocketAddr| {
                bound.ip() == at.ip() && (at.port() == 0 || bound.port() == at.port())
            };
            bound.is_some_and(is) && listens(listener)
        };
        let metrics = match (&self.metrics, &config.metrics) {
            (Some(listener), Some(metrics)) => is_at(listener, metrics.listen),
            (None, None) => true,
            _ => false,
        };
        let api =
            getsockname::<nix::sys::socket::UnixAddr>(std::os::fd::AsRawFd::as_raw_fd(&self.api));
        let is_api = api.is_ok_and(|at| at.path() == Some(&config.api_socket()));
        metrics && is_at(&self.proxy, config.proxy.listen) && is_api && listens(&self.api)
    }

    /// Writes the addresses that were bound into the run directory.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write_addresses(&self, run_dir: &Path) -> anyhow::Result<()> {
        if let Some(metrics) = &self.metrics {
            write_address(run_dir, "metrics.addr", metrics)?;
        }
        // Whoever waits for this one finds the others, too.
        write_address(run_dir, "proxy.addr", &self.proxy)
    }

    fn nonblocking(&self) -> std::io::Result<()> {
        self.api.set_nonblocking(true)?;
        let tcp = [Some(&self.proxy), self.metrics.as_ref()];
        tcp.into_iter()
            .flatten()
            .try_for_each(|listener| listener.set_nonblocking(true))
    }
}

/// Removes what says that aditd serves.
pub fn clear(config: &Config) {
    let _ = socket_path::remove(&config.api_socket());
    for file in ["proxy.addr", "metrics.addr"] {
        let _ = std::fs::remove_file(config.run_dir.join(file));
    }
}

fn bind(address: SocketAddr, section: &str) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).and_then(|listener| {
        rustix::net::listen(&listener, BACKLOG)
            .map(|()| listener)
            .map_err(Into::into)
    });
    bound.with_context(|| {
        format!("cannot listen on {address}: choose another address in {section} (port 0 = any)")
    })
}

fn bind_api(path: &Path) -> anyhow::Result<UnixListener> {
    // The lock of the directory is ours: nobody listens there.
    socket_path::remove(path)?;
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    // The directory is 0700: nobody came in between.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

fn write_address(run_dir: &Path, file: &str, listener: &TcpListener) -> anyhow::Result<()> {
    write_whole(run_dir, file, &format!("{}\n", listener.local_addr()?))
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
        let refused = bind_api(&path).unwrap_err();
        let why = refused.downcast_ref();
        assert!(matches!(why, Some(SocketPathError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_the_listeners_that_the_configuration_wants_are_taken_from_a_worker() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let text = format!(
            "run_dir = \"{at}\"\n[proxy]\nlisten = \"127.0.0.1:0\"\n[metrics]\nlisten = \"127.0.0.1:0\"\n"
        );
        let config = Config::parse(Path::new("a.toml"), &text).unwrap();
        let listeners = Listeners::bind(&config).unwrap();
        let passed = |fds: &[&dyn AsFd]| {
            let fds = fds
                .iter()
                .map(|fd| fd.as_fd().try_clone_to_owned().unwrap());
            Listeners::of(fds.collect()).is_ok_and(|listeners| listeners.are_of(&config))
        };
        let (api, proxy) = (&listeners.api, &listeners.proxy);
        let metrics = listeners.metrics.as_ref().unwrap();
        assert!(passed(&[api, proxy, metrics]));
        assert!(!passed(&[api, proxy]), "one is missing");
        assert!(!passed(&[proxy, api, metrics]), "another order");
        let other = UnixListener::bind(dir.path().join("other.sock")).unwrap();
        assert!(!passed(&[&other, proxy, metrics]), "another path");
        let open = TcpListener::bind("0.0.0.0:0").unwrap();
        assert!(!passed(&[api, &open, metrics]), "another address");
        let client = std::net::TcpStream::connect(proxy.local_addr().unwrap()).unwrap();
        assert!(!passed(&[api, &client, metrics]), "no listener");
        let file = File::open("/dev/null").unwrap();
        assert!(!passed(&[api, &file, metrics]), "no socket");
    }
}
