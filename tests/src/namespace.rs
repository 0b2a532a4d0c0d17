//! Namespaces of their own for a test, in which a systemd is process 1.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;

use crate::process::{Reaped, bound};

/// Debian's path of systemd.
const SYSTEMD: &str = "/lib/systemd/systemd";
/// Programs of the system.
pub const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// What asks whether a systemd is up, and [`is_up`] is told what it says.
pub const ASK: [&str; 3] = ["systemctl", "show", "--property=Version"];

/// Whether that was a systemd's answer. Whoever comes in before the root directory is the namespace's own is in a chroot, for
/// systemctl, which then does nothing and succeeds.
pub fn is_up(said: &str) -> bool {
    said.starts_with("Version=")
}

/// The namespaces. Drop ends everything in them.
#[derive(Debug)]
pub struct Namespace {
    /// `unshare`. When it is killed, process 1 of the namespace dies too.
    outside: Reaped,
    network: bool,
    log: PathBuf,
}

/// The kinds of namespaces that are its own.
fn kinds(network: bool) -> &'static [&'static str] {
    match network {
        true => &["--mount", "--pid", "--cgroup", "--net", "--uts"],
        false => &["--mount", "--pid", "--cgroup"],
    }
}

impl Namespace {
    /// The reason why there can be none here, if there is one.
    pub fn missing() -> Option<&'static str> {
        if !Path::new(SYSTEMD).exists() {
            return Some("systemd is not installed");
        }
        let tried = Command::new("unshare")
            .args(kinds(false))
            .args(["--fork", "true"])
            .stderr(Stdio::null())
            .status();
        let may = tried.is_ok_and(|status| status.success());
        (!may).then_some("namespaces need root")
    }

    /// Has a shell prepare the mounts, and then become a systemd that looks for its units in `units`. What it says goes into
    /// `log`. With `network`, the network is its own too.
    ///
    /// # Errors
    /// `unshare` cannot be started.
    pub fn start(prepare: &str, units: &str, network: bool, log: PathBuf) -> anyhow::Result<Self> {
        let first = format!(
            "umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
             exec env -i container=test PATH={PATH} SYSTEMD_UNIT_PATH={units} \
             {SYSTEMD} --system --log-target=console --log-level=notice\n",
        );
        Self::run(prepare, &first, network, log)
    }

    /// The same without a systemd: process 1 only waits.
    ///
    /// # Errors
    /// `unshare` cannot be started.
    pub fn start_bare(prepare: &str, log: PathBuf) -> anyhow::Result<Self> {
        Self::run(prepare, "exec sleep infinity", false, log)
    }

    /// Has a shell run a script, whose last command becomes process 1.
    fn run(prepare: &str, first: &str, network: bool, log: PathBuf) -> anyhow::Result<Self> {
        let script = format!("set -e; mount --make-rprivate /\n{prepare}\n{first}");
        let said = fs::File::create(&log)?;
        let child = bound("unshare")
            .args(kinds(network))
            .args(["--fork", "--mount-proc", "--kill-child", "bash", "-c"])
            .arg(&script)
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said)
            .spawn()
            .context("cannot start unshare")?;
        Ok(Self {
            outside: Reaped(child),
            network,
            log,
        })
    }

    /// Its process 1, as it is seen from outside.
    ///
    /// # Errors
    /// There is none yet.
    pub fn first(&self) -> anyhow::Result<String> {
        let unshare = self.outside.pid();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        let first = children.split_whitespace().next();
        Ok(first.context("the namespace has no process 1")?.to_owned())
    }

    /// A command inside, whose program and arguments are yet to come.
    ///
    /// # Errors
    /// There is no process 1 yet.
    pub fn enter(&self) -> anyhow::Result<Command> {
        let mut command = bound("nsenter");
        command.args(["--target", &self.first()?]);
        command.args(kinds(self.network)).arg("--");
        Ok(command)
    }

    /// What its systemd said.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::wait_for;
    use std::time::Duration;

    #[test]
    fn a_systemd_runs_in_its_namespaces_and_ends_with_them() {
        if let Some(why) = Namespace::missing() {
            return eprintln!("skipped: {why}");
        }
        let dir = tempfile::tempdir().unwrap();
        let unit = "[Unit]\nDefaultDependencies=no\n";
        fs::write(dir.path().join("default.target"), unit).unwrap();
        for network in [false, true] {
            let prepare = "mount -t tmpfs -o mode=755 tmpfs /run";
            let units = dir.path().display().to_string();
            let log = dir.path().join("log");
            let namespace = Namespace::start(prepare, &units, network, log).unwrap();
            let limit = Duration::from_secs(20);
            let up = wait_for("systemd", limit, || {
                let Ok(mut ask) = namespace.enter() else {
                    return Ok(None);
                };
                let said = ask.args(ASK).output()?;
                Ok(is_up(&String::from_utf8_lossy(&said.stdout)).then_some(()))
            });
            up.unwrap_or_else(|e| panic!("{e:#}: {}", namespace.log()));
            let first = PathBuf::from(format!("/proc/{}", namespace.first().unwrap()));
            assert!(first.exists());
            drop(namespace);
            wait_for("the end of process 1", limit, || {
                Ok((!first.exists()).then_some(()))
            })
            .unwrap();
        }
    }
}
