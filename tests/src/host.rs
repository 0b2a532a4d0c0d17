//! The host's side: aditd with directories of its own, and what people run beside it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::manager::Manager;
use crate::process::{Reaped, bound, output, wait_for};

/// How long aditd may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A running aditd. Dropped = it and its port processes are gone.
#[derive(Debug)]
pub struct Host {
    aditd: Option<Reaped>,
    manager: Option<Manager>,
    bins: PathBuf,
    dir: tempfile::TempDir,
    proxy: SocketAddr,
}

impl Host {
    /// Starts aditd with these VMs (CIDs from 3 on); `bins` holds aditd, adit-port and adit.
    ///
    /// # Errors
    /// It does not start; its log is in the message.
    pub fn start(bins: &Path, vms: &[&str]) -> anyhow::Result<Self> {
        // Unix socket paths are short: not below target/.
        let dir = tempfile::Builder::new().prefix("adit-").tempdir()?;
        let mut config = format!(
            "run_dir = \"{0}/run\"\nstate_dir = \"{0}/state\"\n[proxy]\nlisten = \"127.0.0.1:0\"\n",
            dir.path().display()
        );
        for (cid, name) in (3..).zip(vms) {
            config.push_str(&format!(
                "[[vm]]\nname = \"{name}\"\ncid = {cid}\nallow = [80, 7, 81]\nallow_vsock = [5000, 5001]\n"
            ));
        }
        fs::write(dir.path().join("aditd.toml"), config)?;
        let mut host = Self {
            aditd: None,
            manager: None,
            bins: bins.to_owned(),
            dir,
            proxy: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        host.launch()?;
        Ok(host)
    }

    /// Starts aditd (again).
    ///
    /// # Errors
    /// It does not serve in time.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        let address = self.dir.path().join("run/proxy.addr");
        let _ = fs::remove_file(&address);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("aditd.log"))?;
        let aditd = self.bins.join("aditd");
        let mut command = match &mut self.manager {
            None => bound(aditd),
            Some(manager) => manager.command(&aditd)?,
        };
        let child = command
            .arg("run")
            .arg("--config")
            .arg(self.dir.path().join("aditd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start aditd of {}", self.bins.display()))?;
        self.aditd = Some(Reaped(child));
        if let Some(manager) = &mut self.manager {
            manager.started();
        }
        let served = wait_for("aditd serves", START_LIMIT, || {
            Ok(fs::read_to_string(&address).ok())
        });
        let text = served.with_context(|| format!("aditd said:\n{}", self.log()))?;
        self.proxy = text.trim().parse()?;
        Ok(())
    }

    /// Starts aditd anew, from now on under a service manager that holds descriptors for it.
    ///
    /// # Errors
    /// It does not serve in time.
    pub fn manage(&mut self) -> anyhow::Result<()> {
        self.kill();
        self.manager = Some(Manager::start(self.dir.path())?);
        self.launch()
    }

    /// What its service manager holds for aditd.
    pub fn held(&self) -> Vec<String> {
        self.manager.as_ref().map_or(vec![], Manager::names)
    }

    /// Kills aditd with SIGKILL.
    pub fn kill(&mut self) {
        self.aditd = None;
    }

    /// The proxy's address.
    pub fn proxy(&self) -> SocketAddr {
        self.proxy
    }

    /// Process id of aditd, 0 if it was killed.
    pub fn pid(&self) -> u32 {
        self.aditd.as_ref().map_or(0, Reaped::pid)
    }

    /// A directory for whoever uses the host.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where a VM's VMM connects.
    pub fn vhost_socket(&self, vm: &str) -> PathBuf {
        self.dir.path().join("run/vm").join(vm).join("vhost.sock")
    }

    /// aditd's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("aditd.log")).unwrap_or_default()
    }

    /// Waits until a VM's sockets are there.
    ///
    /// # Errors
    /// They do not come.
    pub fn wait_port(&self, vm: &str) -> anyhow::Result<()> {
        let socket = self.vhost_socket(vm);
        let waited = wait_for("port process", START_LIMIT, || {
            Ok(socket.exists().then_some(()))
        });
        waited.with_context(|| format!("aditd said:\n{}", self.log()))
    }

    /// Runs `adit`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn adit(&self, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(self.bins.join("adit"));
        command
            .args(args)
            .env("ADIT_SOCKET", self.dir.path().join("run/aditd.sock"))
            .current_dir(self.dir.path());
        Ok(command.output()?)
    }

    /// Runs `curl` through the proxy. Its output begins with the answer's header.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn curl(&self, args: &[&str]) -> anyhow::Result<Output> {
        let proxy = format!("http://{}", self.proxy);
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-i", "--max-time", "60", "-x", &proxy])
            .args(args);
        Ok(command.output()?)
    }

    /// Ends aditd and its port processes.
    ///
    /// # Errors
    /// It does not listen.
    pub fn shut_down(&self) -> anyhow::Result<()> {
        let socket = self.dir.path().join("run/aditd.sock");
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-X", "POST", "--max-time", "10", "--unix-socket"])
            .arg(socket);
        output(command.arg("http://aditd/v1/shutdown?ports=true")).map(drop)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.aditd.is_none() {
            // Only aditd knows how to end its port processes.
            let _ = self.launch();
        }
        if let Err(e) = self.shut_down() {
            eprintln!("port processes may be left: {e:#}");
        }
    }
}
