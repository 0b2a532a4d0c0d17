//! A systemd of its own for a test: process 1 of its own pid, mount and cgroup namespaces. It has only the units that the test
//! gives it.
//!
//! Inside, `/run` and `/var/lib` are directories of the test, so that sockets there can be reached from outside.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::namespace::{ASK, Namespace, is_up};
use crate::process::{output, wait_for};

/// How long systemd may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A running systemd. Drop ends it and all of its services.
#[derive(Debug)]
pub struct Systemd(Namespace);

impl Systemd {
    /// The reason why systemd cannot run here, if there is one.
    pub fn missing() -> Option<&'static str> {
        Namespace::missing()
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
        let prepare = format!(
            "mount --bind {bins} {dir}/run/bin; mount --rbind {dir}/run /run; mount --bind {dir}/lib /var/lib",
            bins = bins.display(),
            dir = dir.display(),
        );
        let log = dir.join("systemd.log");
        let systemd = Self(Namespace::start(&prepare, "/run/units", false, log)?);
        let up = wait_for("systemd", START_LIMIT, || {
            let answer = systemd.run(ASK[0], &ASK[1..]);
            Ok(answer.is_ok_and(|said| is_up(&said)).then_some(()))
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
        let mut command = self.0.enter()?;
        command.arg(program).args(args);
        let out = output(&mut command)?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Its log.
    pub fn log(&self) -> String {
        self.0.log()
    }
}
