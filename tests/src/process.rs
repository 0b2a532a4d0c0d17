//! Child processes that end with this process, however it ends.

use std::io;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// A command whose process the kernel kills when the thread that started it ends (`prctl(PR_SET_PDEATHSIG)`).
pub fn bound(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// The same for one whose end is waited for: killed after two minutes, so that one that hangs is a test that fails.
pub fn limited(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = bound("timeout");
    command.args(["--signal=KILL", "120"]).arg(program);
    command
}

/// A child process. Drop kills and reaps it.
#[derive(Debug)]
pub struct Reaped(pub Child);

impl Reaped {
    /// Kills it now.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill(&mut self) -> io::Result<()> {
        self.0.kill()?;
        self.0.wait().map(drop)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.kill();
    }
}

/// Runs a command to its end. Returns its output; if it fails, the error contains the output.
///
/// # Errors
/// It cannot be started, or its status is not 0.
pub fn output(command: &mut Command) -> anyhow::Result<Output> {
    let shown = format!("{command:?}");
    let out = command
        .output()
        .with_context(|| format!("cannot start {shown}"))?;
    if !out.status.success() {
        bail!(
            "{shown}: {}\n{}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(out)
}

/// Calls `ask` until it returns `Some`. `what` is for the error.
///
/// # Errors
/// The time is over, or `ask` fails.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if begin.elapsed() > limit {
            bail!("{what}: not after {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
