//! A systemd of its own for a test: process 1 of its own pid, mount and cgroup namespaces. It has only the units that the test
//! gives it.
//!
//! Inside, `/run` and `/var/lib` are directories of the test, so that sockets there can be reached from outside.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::process::{Reaped, bound, output, wait_for};

/// Debian's path of systemd.
const PROGRAM: &str = "/lib/systemd/systemd";
/// How long systemd may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A running systemd. Drop ends it and all of its services.
#[derive(Debug)]
pub struct Systemd {
    /// `unshare`. When it is killed, process 1 of the namespace dies too.
    outside: Reaped,
    log: PathBuf,
}

impl Systemd {
    /// The reason why systemd cannot run here, if there is one.
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

    /// Starts systemd. Its `/run` is `dir/run`, its `/var/lib` is `dir/lib`, `bins` is at `/run/bin`, and its units are in
    /// `dir/run/units`.
    ///
    /// # Errors
    /// It does not start. The error contains its log.
    pub fn start(dir: &Path, bins: &Path) -> anyhow::Result<Self> {
        for inside in ["run/bin", "run/units", "lib"] {
            fs::create_dir_all(dir.join(inside))?;
        }
        // The default target needs no other unit.
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

    /// Runs `systemctl` inside. Returns its output.
    ///
    /// # Errors
    /// It fails. The error contains its output.
    pub fn systemctl(&self, args: &[&str]) -> anyhow::Result<String> {
        self.run("systemctl", args)
    }

    /// Runs a program inside. Returns its output.
    ///
    /// # Errors
    /// It fails. The error contains its output.
    pub fn run(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let unshare = self.outside.pid();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        let first = children.split_whitespace().next();
        let first = first.context("the namespace has no process 1")?;
        let mut command = Command::new("nsenter");
        command
            .args(["--target", first, "--mount", "--pid", "--cgroup", "--"])
            .arg(program)
            .args(args);
        let out = output(&mut command)?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Its log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}
