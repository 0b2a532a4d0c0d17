//! A systemd of our own: the system manager as process 1 of its own pid, mount and cgroup namespaces, with the units that
//! it is given and no others.
//!
//! Inside, `/run` and `/var/lib` are directories of the test, so that sockets there are within reach from outside.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::process::{Reaped, bound, output, wait_for};

/// Debian's place for it.
const PROGRAM: &str = "/lib/systemd/systemd";
/// How long it may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A running system manager. Dropped = it and all of its services are gone.
#[derive(Debug)]
pub struct Systemd {
    /// `unshare`, which takes process 1 of the namespace with it when it is killed.
    outside: Reaped,
    log: PathBuf,
}

impl Systemd {
    /// Tells why there can be none, if so.
    pub fn missing() -> Option<&'static str> {
        if !Path::new(PROGRAM).exists() {
            return Some("systemd is not installed");
        }
        let tried = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--cgroup", "true"])
            .stderr(Stdio::null())
            .status();
        let may = tried.is_ok_and(|status| status.success());
        (!may).then_some("namespaces need root")
    }

    /// Starts one whose `/run` is `dir/run` and whose `/var/lib` is `dir/lib`, with `bins` at `/run/bin`. Its units are
    /// what lies in `dir/run/units`.
    ///
    /// # Errors
    /// It does not come up; what it said is in the message.
    pub fn start(dir: &Path, bins: &Path) -> anyhow::Result<Self> {
        for inside in ["run/bin", "run/units", "lib"] {
            fs::create_dir_all(dir.join(inside))?;
        }
        // What it boots into: nothing but itself.
        fs::write(
            dir.join("run/units/idle.target"),
            "[Unit]\nDefaultDependencies=no\n",
        )?;
        let default = dir.join("run/units/default.target");
        symlink("idle.target", default)?;
        let script = format!(
            "set -e; mount --make-rprivate /\n\
             mount --bind {bins} {dir}/run/bin; mount --rbind {dir}/run /run; mount --bind {dir}/lib /var/lib\n\
             umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
             exec env -i container=test PATH=/usr/bin:/bin SYSTEMD_UNIT_PATH=/run/units \
             {PROGRAM} --system --log-target=console --log-level=notice\n",
            bins = bins.display(),
            dir = dir.display(),
        );
        let log = dir.join("systemd.log");
        let said = fs::File::create(&log)?;
        let child = bound("unshare")
            .args(["--mount", "--pid", "--fork", "--cgroup", "--mount-proc"])
            .args(["--kill-child", "bash", "-c", &script])
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said)
            .spawn()
            .context("cannot start unshare")?;
        let systemd = Self {
            outside: Reaped(child),
            log,
        };
        let up = wait_for("systemd", START_LIMIT, || {
            let answer = systemd.systemctl(&["show", "--property=Version"]);
            Ok(answer.ok())
        });
        up.with_context(|| format!("systemd said:\n{}", systemd.log()))?;
        Ok(systemd)
    }

    /// Runs `systemctl` inside; what it printed.
    ///
    /// # Errors
    /// It fails; what it said is in the message.
    pub fn systemctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let unshare = self.outside.pid();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        let first = children.split_whitespace().next();
        let first = first.context("the namespace has no process 1")?;
        let mut command = Command::new("nsenter");
        command
            .args(["--target", first, "--mount", "--pid", "--cgroup", "--"])
            .arg("systemctl")
            .args(args);
        let out = output(&mut command)?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// What it said.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}
