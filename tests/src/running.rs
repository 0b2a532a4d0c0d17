//! A host whose VM `a` has an agent that runs commands and copies files: a process of the test's own program, because an agent waits for
//! every child of its process. The program has a test `an_agent` that is [`an_agent`].

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::agent;
use crate::host::Host;
use crate::process::{Reaped, bound, limited, wait_for};

/// How long something may take.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Set where the program is the agent: the VM's directory.
const AGENT: &str = "ADIT_TEST_AGENT_OF";

/// The agent of another process of this program, if this is it.
#[allow(clippy::missing_panics_doc)]
pub fn an_agent() {
    let Some(vm) = std::env::var_os(AGENT) else {
        return;
    };
    let path = |name| PathBuf::from(std::env::var_os(name).unwrap_or_default());
    let policy = std::env::var("POLICY").unwrap_or_default();
    agent::start_running(
        vm.as_ref(),
        &[],
        &path("PROGRAM"),
        &path("RUN_DIR"),
        &policy,
    )
    .expect("the agent starts");
    loop {
        std::thread::park();
    }
}

/// The host and its VM.
pub struct Setup {
    /// The host.
    pub host: Host,
    /// Where its programs are.
    pub bins: PathBuf,
    agent: Reaped,
    _run: tempfile::TempDir,
}

impl Setup {
    /// One whose guest has this policy; `more`: sections of aditd.toml. None: there are no programs to run, which it has said.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(policy: &str, more: &str) -> anyhow::Result<Option<Self>> {
        Self::start_with(policy, "", more)
    }

    /// The same; `of_vm`: more keys of VM `a`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(policy: &str, of_vm: &str, more: &str) -> anyhow::Result<Option<Self>> {
        let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
            println!(
                "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
            );
            return Ok(None);
        };
        let config = format!(
            "[proxy]\nlisten = \"127.0.0.1:0\"\n[audit]\nallows = true\n[[vm]]\nname = \"a\"\ncid = 3\n{of_vm}{more}"
        );
        let host = Host::start_configured(&bins, &config)?;
        let run = tempfile::tempdir()?;
        let built = bins.join("adit-guest");
        let program = match built.exists() {
            true => built,
            false => crate::guest_bin("adit-guest"),
        };
        let agent = bound(std::env::current_exe()?)
            .args(["--exact", "an_agent", "--nocapture"])
            .env(AGENT, host.vm_dir("a"))
            .env("PROGRAM", program)
            .env("RUN_DIR", run.path())
            .env("POLICY", policy)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(run.path().join("log"))?)
            .spawn()?;
        let setup = Self {
            host,
            bins,
            agent: Reaped(agent),
            _run: run,
        };
        wait_for("the ring carries", LIMIT, || {
            let out = setup.adit(&["exec", "a", "--", "true"]);
            Ok((out.status.code() != Some(255)).then_some(()))
        })?;
        Ok(Some(setup))
    }

    /// `adit` with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        self.set(Command::new(self.bins.join("adit")), args)
    }

    fn set(&self, mut command: Command, args: &[&str]) -> Command {
        command
            .args(args)
            .env("ADIT_SOCKET", self.socket())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// aditd's socket.
    pub fn socket(&self) -> PathBuf {
        self.host.vm_dir("a").join("../../aditd.sock")
    }

    /// Runs `adit`.
    #[allow(clippy::missing_panics_doc)]
    pub fn adit(&self, args: &[&str]) -> Output {
        let mut command = self.set(limited(self.bins.join("adit")), args);
        command.output().expect("adit runs")
    }

    /// Starts `adit` with a pipe for its input.
    #[allow(clippy::missing_panics_doc)]
    pub fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdin(Stdio::piped());
        command.spawn().expect("adit starts")
    }

    /// Number of the agent's process.
    pub fn agent(&self) -> u32 {
        self.agent.pid()
    }

    /// Number of the VM's port process.
    #[allow(clippy::missing_panics_doc)]
    pub fn port_pid(&self) -> i32 {
        let out = self.adit(&["vm", "show", "a", "-o", "json"]);
        let vm: serde_json::Value = serde_json::from_slice(&out.stdout).expect("a VM");
        let pid = vm["port_pid"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok());
        pid.expect("a port process")
    }

    /// What is written down of who did what.
    pub fn audit(&self) -> String {
        let at: &Path = &self.host.dir().join("state/aditd.audit");
        std::fs::read_to_string(at).unwrap_or_default()
    }
}
