//! The host's side: aditd with directories of its own, and the programs that people run.

use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::net::Machine;
use crate::process::{Reaped, bound, limited, output, wait_for};
use crate::systemd::Systemd;

/// How long aditd may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A running aditd. Drop ends it and its port processes.
#[derive(Debug)]
pub struct Host {
    aditd: Option<Reaped>,
    systemd: Option<Systemd>,
    bins: PathBuf,
    /// What comes before its command line: it runs on another machine of a network, or with less rights.
    on: Vec<String>,
    /// The directory of its sockets, as seen from outside of its namespace.
    run: PathBuf,
    dir: tempfile::TempDir,
    proxy: SocketAddr,
}

impl Host {
    /// Starts aditd with these VMs (CIDs from 3 on). `bins` is the directory of aditd, adit-port and adit.
    ///
    /// # Errors
    /// It does not start. The error contains its log.
    pub fn start(bins: &Path, vms: &[&str]) -> anyhow::Result<Self> {
        Self::start_with(bins, vms, "")
    }

    /// The same. `more` are additional lines for every VM's configuration.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn start_with(bins: &Path, vms: &[&str], more: &str) -> anyhow::Result<Self> {
        Self::start_on(bins, |run, state| config(run, state, vms, more))
    }

    /// The same with programs of a version that knows no grants; [`upgrade`](Self::upgrade) writes one.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn start_before(bins: &Path, vms: &[&str]) -> anyhow::Result<Self> {
        Self::start_on(bins, |run, state| {
            config(run, state, vms, "").replace(GRANT, "")
        })
    }

    /// The same with this configuration, all but its directories.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn start_configured(bins: &Path, config: &str) -> anyhow::Result<Self> {
        Self::start_there(bins, vec![], |run, state| configured(run, state, config))
    }

    /// The same on a machine of a network.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn start_at(bins: &Path, machine: &Machine, config: &str) -> anyhow::Result<Self> {
        Self::start_there(bins, machine.words().into(), |run, state| {
            configured(run, state, config)
        })
    }

    /// As [`start_with`](Self::start_with), for a test whose VMs are anything: the vsock of this machine's own kernel is not its, and has
    /// no port for this aditd.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn start_without_vsock(bins: &Path, vms: &[&str], more: &str) -> anyhow::Result<Self> {
        let on = ["setpriv", "--bounding-set", "-net_bind_service", "--"];
        Self::start_there(bins, on.map(Into::into).into(), |run, state| {
            config(run, state, vms, more)
        })
    }

    fn start_on(bins: &Path, config: impl Fn(&Path, &Path) -> String) -> anyhow::Result<Self> {
        Self::start_there(bins, vec![], config)
    }

    fn start_there(
        bins: &Path,
        on: Vec<String>,
        config: impl Fn(&Path, &Path) -> String,
    ) -> anyhow::Result<Self> {
        let dir = directory()?;
        let (run, state) = (dir.path().join("run"), dir.path().join("state"));
        fs::write(dir.path().join("aditd.toml"), config(&run, &state))?;
        let mut host = Self {
            aditd: None,
            systemd: None,
            bins: bins.to_owned(),
            on,
            run,
            dir,
            proxy: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        host.launch()?;
        Ok(host)
    }

    /// As [`start`](Self::start), but under a systemd of its own, with the unit that adit ships.
    ///
    /// # Errors
    /// There is no systemd, or the service does not start. The error contains the logs.
    pub fn start_as_service(bins: &Path, vms: &[&str]) -> anyhow::Result<Self> {
        let dir = directory()?;
        let inside = dir.path().join("run");
        let units = inside.join("units");
        fs::create_dir_all(units.join("aditd.service.d"))?;
        let unit = crate::root().join("host-proxy/dist/aditd.service");
        fs::copy(unit, units.join("aditd.service"))?;
        // The programs are not in /usr/bin, and this systemd has no targets of a normal system.
        fs::write(
            units.join("aditd.service.d/test.conf"),
            "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=\nExecStart=/run/bin/aditd run --config /run/aditd.toml\n\
             StandardOutput=append:/run/aditd.log\nStandardError=inherit\n",
        )?;
        let (run, state) = (Path::new("/run/adit"), Path::new("/var/lib/adit"));
        fs::write(inside.join("aditd.toml"), config(run, state, vms, ""))?;
        let systemd = Systemd::start(dir.path(), bins)?;
        let mut host = Self {
            aditd: None,
            systemd: Some(systemd),
            bins: bins.to_owned(),
            on: vec![],
            run: inside.join("adit"),
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
        let _ = fs::remove_file(self.run.join("proxy.addr"));
        if let Some(systemd) = &self.systemd {
            // Type=notify: returns when aditd says that it is ready.
            systemd.systemctl(&["start", "aditd"])?;
            return self.wait_served();
        }
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let program = self.bins.join("aditd");
        let mut words = self.on.iter().map(OsStr::new).chain([program.as_os_str()]);
        let child = bound(words.next().unwrap_or_default())
            .args(words)
            .arg("run")
            .arg("--config")
            .arg(self.dir.path().join("aditd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start aditd of {}", self.bins.display()))?;
        self.aditd = Some(Reaped(child));
        self.wait_served()
    }

    fn wait_served(&mut self) -> anyhow::Result<()> {
        let address = self.run.join("proxy.addr");
        let served = wait_for("aditd serves", START_LIMIT, || {
            Ok(fs::read_to_string(&address).ok())
        });
        let text = served.with_context(|| format!("aditd said:\n{}", self.log()))?;
        self.proxy = text.trim().parse()?;
        Ok(())
    }

    /// Kills aditd and its port processes at once with SIGKILL, and waits until systemd has started aditd again.
    ///
    /// # Errors
    /// It does not run as a service, or does not start in time.
    pub fn kill_service(&mut self) -> anyhow::Result<()> {
        fs::remove_file(self.run.join("proxy.addr"))?;
        let systemd = self.systemd.as_ref().context("not under systemd")?;
        // Port processes have cgroups outside the unit's, so `systemctl kill` does not reach them.
        systemd.run("pkill", &["-KILL", "-x", "aditd|adit-port"])?;
        self.wait_served()
    }

    /// Kills one process of the service, by its process id there, with SIGKILL.
    ///
    /// # Errors
    /// It does not run as a service.
    pub fn kill_in_service(&self, pid: u32) -> anyhow::Result<()> {
        let systemd = self.systemd.as_ref().context("not under systemd")?;
        systemd.run("kill", &["-KILL", &pid.to_string()]).map(drop)
    }

    /// Lets systemd stop aditd and start the next one.
    ///
    /// # Errors
    /// It does not run as a service, or does not start in time.
    pub fn restart_service(&mut self) -> anyhow::Result<()> {
        let systemd = self.systemd.as_ref().context("not under systemd")?;
        systemd.systemctl(&["restart", "aditd"])?;
        self.wait_served()
    }

    /// A property of the service, from systemd.
    ///
    /// # Errors
    /// It does not run as a service.
    pub fn service_property(&self, name: &str) -> anyhow::Result<String> {
        let systemd = self.systemd.as_ref().context("not under systemd")?;
        let property = format!("--property={name}");
        let said = systemd.systemctl(&["show", "aditd", "--value", &property])?;
        Ok(said.trim().to_owned())
    }

    /// The next [`launch`](Self::launch) starts the programs of this directory, on the same files, with the grant that they need.
    ///
    /// # Errors
    /// The configuration cannot be written.
    pub fn upgrade(&mut self, bins: &Path) -> anyhow::Result<()> {
        self.bins = bins.to_owned();
        let path = self.dir.path().join("aditd.toml");
        let text = fs::read_to_string(&path)?;
        if !text.contains(GRANT) {
            fs::write(path, text + GRANT)?;
        }
        Ok(())
    }

    /// Kills aditd with SIGKILL: its monitor and its worker.
    pub fn kill(&mut self) {
        self.kill_monitor();
        self.kill_worker();
    }

    /// Kills aditd's monitor with SIGKILL; its worker goes on.
    pub fn kill_monitor(&mut self) {
        self.aditd = None;
    }

    /// Kills aditd's worker with SIGKILL, and waits until it has ended. Where aditd is one process, there is none.
    pub fn kill_worker(&self) {
        let Some(pid) = self.noted_worker() else {
            return;
        };
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let line = fs::read_to_string(proc.join("cmdline")).unwrap_or_default();
        // Another process may have its number by now.
        if !line.split('\0').any(|word| word == "worker") {
            return;
        }
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.cast_signed()),
            nix::sys::signal::Signal::SIGKILL,
        );
        let state = || fs::read_to_string(proc.join("stat")).unwrap_or_default();
        let ended = wait_for("the worker's end", START_LIMIT, || {
            let state = state();
            Ok((state.is_empty() || state.contains(") Z ")).then_some(()))
        });
        if let Err(e) = ended {
            eprintln!("{e:#}");
        }
    }

    /// Process id of whoever serves clients and guests: the worker, or the one process that there is without root. As seen
    /// from outside of its namespace, unless it is a service.
    pub fn worker(&self) -> u32 {
        self.noted_worker().unwrap_or_else(|| self.pid())
    }

    fn noted_worker(&self) -> Option<u32> {
        let text = fs::read_to_string(self.run.join("worker.pid")).ok()?;
        text.trim().parse().ok()
    }

    /// Waits until another worker than this one serves. Returns its process id.
    ///
    /// # Errors
    /// None does.
    pub fn wait_worker(&self, other_than: u32) -> anyhow::Result<u32> {
        let another = wait_for("another worker", START_LIMIT, || {
            Ok(self.noted_worker().filter(|pid| *pid != other_than))
        });
        another.with_context(|| format!("aditd said:\n{}", self.log()))
    }

    /// The proxy's address.
    pub fn proxy(&self) -> SocketAddr {
        self.proxy
    }

    /// Process id of aditd's monitor; 0 if it was killed.
    pub fn pid(&self) -> u32 {
        self.aditd.as_ref().map_or(0, Reaped::pid)
    }

    /// A directory for the test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The addresses of its `[[listen]]` sections, in their order.
    ///
    /// # Errors
    /// It has none, or does not serve.
    pub fn listeners(&self) -> anyhow::Result<Vec<String>> {
        let text = fs::read_to_string(self.run.join("listen.addr"))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// A VM's directory, with its sockets.
    pub fn vm_dir(&self, vm: &str) -> PathBuf {
        self.run.join("vm").join(vm)
    }

    /// The socket for a VM's VMM.
    pub fn vhost_socket(&self, vm: &str) -> PathBuf {
        self.vm_dir(vm).join("vhost.sock")
    }

    /// The socket for a VM's ring.
    pub fn ivshmem_socket(&self, vm: &str) -> PathBuf {
        self.vhost_socket(vm).with_file_name("ivshmem.sock")
    }

    /// aditd's log.
    pub fn log(&self) -> String {
        let systemd = self.systemd.as_ref().map(Systemd::log);
        let aditd = fs::read_to_string(self.log_path()).unwrap_or_default();
        systemd.unwrap_or_default() + &aditd
    }

    fn log_path(&self) -> PathBuf {
        let under = self
            .systemd
            .as_ref()
            .map_or("aditd.log", |_| "run/aditd.log");
        self.dir.path().join(under)
    }

    /// A port process's log.
    pub fn port_log(&self, vm: &str) -> String {
        let path = self.run.join("vm").join(vm).join("port.log");
        fs::read_to_string(path).unwrap_or_default()
    }

    /// Waits until a VM's sockets exist.
    ///
    /// # Errors
    /// They do not appear.
    pub fn wait_port(&self, vm: &str) -> anyhow::Result<()> {
        let socket = self.vhost_socket(vm);
        let waited = wait_for("port process", START_LIMIT, || {
            Ok(socket.exists().then_some(()))
        });
        waited.with_context(|| format!("aditd said:\n{}", self.log()))
    }

    /// Lines of a shell that say where everything is: for `demo --keep`, and for whoever types the first commands of the
    /// README.
    pub fn environment(&self) -> String {
        format!(
            "export ADIT_SOCKET={} ADIT_PROXY=http://{} ADIT_KEY={} PATH={}:$PATH\n",
            self.run.join("aditd.sock").display(),
            self.proxy,
            self.dir.path().join("fleet.key").display(),
            self.bins.display(),
        )
    }

    /// Runs `adit`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn adit(&self, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = limited(self.bins.join("adit"));
        command
            .args(args)
            .env("ADIT_SOCKET", self.run.join("aditd.sock"))
            .current_dir(self.dir.path());
        Ok(command.output()?)
    }

    /// Runs `curl` through the proxy. Its output begins with the header of the answer.
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
    /// It does not accept the request.
    pub fn shut_down(&self) -> anyhow::Result<()> {
        let socket = self.run.join("aditd.sock");
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-X", "POST", "--max-time", "10", "--unix-socket"])
            .arg(socket);
        output(command.arg("http://aditd/v1/shutdown?ports=true")).map(drop)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.systemd.is_some() {
            return; // systemd ends with all of its processes
        }
        if self.aditd.is_none() {
            // Only aditd knows how to end its port processes, so start it again if it was killed.
            let _ = self.launch();
        }
        if let Err(e) = self.shut_down() {
            eprintln!("port processes may be left: {e:#}");
        }
    }
}

/// A directory with a short path, not below target/, because paths of Unix sockets must be short.
fn directory() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("adit-").tempdir()
}

/// Lets everybody use what VMs allow.
const GRANT: &str = "[[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n";

/// aditd's configuration with its directories.
fn configured(run: &Path, state: &Path, config: &str) -> String {
    let (run, state) = (run.display(), state.display());
    format!("run_dir = \"{run}\"\nstate_dir = \"{state}\"\n{config}")
}

/// aditd's configuration with these VMs, and `more` for each of them.
fn config(run: &Path, state: &Path, vms: &[&str], more: &str) -> String {
    let (run, state) = (run.display(), state.display());
    let mut config = format!(
        "run_dir = \"{run}\"\nstate_dir = \"{state}\"\n[proxy]\nlisten = \"127.0.0.1:0\"\n{GRANT}"
    );
    for (cid, name) in (3..).zip(vms) {
        config.push_str(&format!(
            "[[vm]]\nname = \"{name}\"\ncid = {cid}\nallow = [80, 7, 81, 22]\nallow_vsock = [5000, 5001]\n{more}\n"
        ));
    }
    config
}
