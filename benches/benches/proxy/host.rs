//! A real aditd with a VM whose guest is the agent as a process.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use adit_host_proxy::access::certificate::pin;
use adit_tests::process::{Reaped, bound, wait_for};
use anyhow::Context;

/// How long anything may take to come up.
pub const SOON: Duration = Duration::from_secs(20);

/// The server that all contenders lead to.
pub struct Target {
    /// Its port.
    pub port: u16,
    _process: Reaped,
}

impl Target {
    /// Starts it.
    pub fn start() -> anyhow::Result<Self> {
        let mut child = bound(std::env::current_exe()?)
            .arg("--server")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().context("its output")?;
        let mut line = String::new();
        let process = Reaped(child);
        BufReader::new(out).read_line(&mut line)?;
        Ok(Self {
            port: line.trim().parse().context("the server's port")?,
            _process: process,
        })
    }
}

/// A host with VMs `a`, `b` and so on, each with an agent.
pub struct Host {
    /// The plain listener.
    pub plain: SocketAddr,
    /// The listener with TLS.
    pub tls: SocketAddr,
    /// Of whoever signed the listener's certificate, which is for `localhost`.
    pub certificate: rustls::pki_types::CertificateDer<'static>,
    /// PEM file with certificate and key.
    pub pem: std::path::PathBuf,
    // Agents go first, so that nothing is dialled while the host ends.
    agents: Vec<Reaped>,
    aditd: Child,
    dir: tempfile::TempDir,
}

/// What a host shows, for `localhost` and for its own name.
pub struct Identity {
    /// Its name.
    pub name: &'static str,
    signed: rcgen::CertifiedKey<rcgen::KeyPair>,
    /// `pin` of a `[[host]]`.
    pub pin: String,
}

impl Identity {
    /// Signs its own.
    pub fn new(name: &'static str) -> anyhow::Result<Self> {
        let names = ["localhost".to_owned(), name.to_owned()];
        let signed = rcgen::generate_simple_self_signed(names)?;
        let pin = pin(&webpki::EndEntityCert::try_from(signed.cert.der())?).to_string();
        let pin = pin.strip_prefix("cert:").unwrap_or(&pin).to_owned();
        Ok(Self { name, signed, pin })
    }

    /// Section of the configuration of another host.
    pub fn section(&self, address: SocketAddr) -> String {
        let (name, pin) = (self.name, &self.pin);
        format!("[[host]]\nname = \"{name}\"\naddress = \"{address}\"\npin = \"{pin}\"\n")
    }
}

impl Host {
    /// Starts it, with agents that serve this port.
    pub fn start(binaries: &Path, vms: usize, port: u16) -> anyhow::Result<Self> {
        Self::named(binaries, vms, port, &Identity::new("host")?, "")
    }

    /// Starts one of several.
    pub fn named(
        binaries: &Path,
        vms: usize,
        port: u16,
        identity: &Identity,
        others: &str,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("adit-").tempdir()?;
        let at = dir.path().display();
        let signed = &identity.signed;
        let pem = dir.path().join("host.pem");
        let text = signed.cert.pem() + &signed.signing_key.serialize_pem();
        fs::write(&pem, text)?;
        let mut config = format!(
            "run_dir = \"{at}/run\"\nstate_dir = \"{at}/state\"\n\
             [proxy]\nlisten = \"127.0.0.1:0\"\n\
             [limits]\nconnections = 50000\nconnections_per_client = 40000\nrequests_per_vm = 40000\n\
             [names]\nhost = \"{1}\"\n[peers]\ncert = \"{0}\"\nkey = \"{0}\"\n{others}\
             [[listen]]\naddress = \"127.0.0.1:0\"\ncert = \"{0}\"\nkey = \"{0}\"\n\
             [[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\"]\n",
            pem.display(),
            identity.name
        );
        let names: Vec<String> = (0..vms).map(name).collect();
        for (cid, name) in (3..).zip(&names) {
            config += &format!("[[vm]]\nname = \"{name}\"\ncid = {cid}\nallow = [{port}]\n");
        }
        fs::write(dir.path().join("aditd.toml"), config)?;
        let log = fs::File::create(dir.path().join("log"))?;
        let aditd = Command::new(binaries.join("aditd"))
            .args(["run", "--port-bin"])
            .arg(binaries.join("adit-port"))
            .arg("--config")
            .arg(dir.path().join("aditd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start aditd")?;
        let run = dir.path().join("run");
        let mut host = Self {
            plain: SocketAddr::from(([127, 0, 0, 1], 0)),
            tls: SocketAddr::from(([127, 0, 0, 1], 0)),
            certificate: signed.cert.der().clone(),
            pem,
            agents: vec![],
            aditd,
            dir,
        };
        let address = |file: &str| {
            let read = || Ok(fs::read_to_string(run.join(file)).ok());
            let text = wait_for("aditd serves", SOON, read);
            text.with_context(|| host.log())?
                .lines()
                .last()
                .context("an address")?
                .parse()
                .context("an address")
        };
        let (plain, tls) = (address("proxy.addr")?, address("listen.addr")?);
        (host.plain, host.tls) = (plain, tls);
        for name in names {
            let socket = run.join("vm").join(name).join("ring.sock");
            wait_for("a ring's socket", SOON, || {
                Ok(socket.exists().then_some(()))
            })?;
            let agent = bound(std::env::current_exe()?)
                .arg("--agent")
                .arg(socket)
                .arg(port.to_string())
                .stdin(Stdio::null())
                .spawn()?;
            host.agents.push(Reaped(agent));
        }
        Ok(host)
    }

    /// Process id of the agent of VM number `n`.
    pub fn agent(&self, n: usize) -> u32 {
        self.agents[n].pid()
    }

    /// What aditd said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// aditd's monitor and its worker, and the port processes.
    pub fn processes(&self) -> Vec<u32> {
        let mut all = vec![self.aditd.id()];
        let mut next = 0;
        while next < all.len() {
            let threads = fs::read_dir(format!("/proc/{}/task", all[next]));
            for thread in threads.into_iter().flatten().flatten() {
                let children = fs::read_to_string(thread.path().join("children"));
                let children = children.unwrap_or_default();
                all.extend(
                    children
                        .split_whitespace()
                        .filter_map(|p| p.parse::<u32>().ok()),
                );
            }
            next += 1;
        }
        all
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its processes survive it unless they are ended.
        let all = self.processes();
        let _ = self.aditd.kill();
        let _ = self.aditd.wait();
        for pid in all.iter().skip(1) {
            let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// Name of VM number `n`.
pub fn name(n: usize) -> String {
    format!("vm-{n}")
}
