//! Puts the agent together: configuration, journal, listener, client.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;

use crate::client::Client;
use crate::config::{Config, ConfigError};
use crate::exec::{cgroup, reap};
use crate::journal::{Journal, JournalError};
use crate::ring::Link;
use crate::runner::Runner;
use crate::serve::{Identity, Server};
use crate::transport::Transport;
use crate::verify::Verifier;
use crate::{facts, log, protect};

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The listener.
    #[error("cannot listen on vsock port {port}: {hint}", port = adit_channel::hello::PORT)]
    Listen {
        /// What to do.
        hint: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Anything else of the system.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Runs the agent until its listener fails. `ring`: where a ring is kept that is looked for, and served, too.
///
/// # Errors
/// It could not start, or the listener is gone.
pub fn run(
    config_path: &Path,
    transport: Arc<dyn Transport>,
    ring: Option<Link>,
) -> Result<(), RunError> {
    let config = Config::load(config_path)?;
    // Whoever starts the agent may have any: what it makes has the modes that it says.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let system = |what| move |source: std::io::Error| RunError::System { what, source };
    reap::hold_signals().map_err(system("hold the signals of ended children"))?;
    protect::take();
    let listener = transport.listen().map_err(|source| RunError::Listen {
        hint: listen_hint(&source),
        source,
    })?;
    let become_reaper = nix::sys::prctl::set_child_subreaper(true);
    become_reaper.map_err(|e| system("become the reaper of tasks' orphans")(e.into()))?;
    // Optional: without one the tree is followed by parenthood.
    let _ = cgroup::mount_if_absent();
    cgroup::leave_task();
    let verifier = Verifier::load(&config);
    let identity = Arc::new(Identity {
        boot_nonce: facts::boot_nonce(),
        epoch: AtomicU64::new(0),
    });
    let own = [
        config_path,
        &config.trust_dir,
        &config.state_dir,
        &config.run_dir,
    ]
    .map(Path::to_owned)
    .into();
    let (vm_id, anchors) = (config.vm_id.clone(), verifier.anchors());
    crate::exec::script::prepare(&config.run_dir).map_err(system("make run_dir usable"))?;
    let journal = open_journal(&config.state_dir);
    if let Err(e) = &journal {
        log::event(
            "journal-failed",
            &[
                ("error", e),
                ("effect", &"every task is refused; ports are served"),
            ],
        );
    }
    // The check of the journal was waited for by itself; from here on whoever starts a process claims it.
    reap::start().map_err(system("start the thread that reaps tasks' orphans"))?;
    let server = Server::new(config.allow_ports.clone(), identity.clone());
    if let Some(ring) = ring {
        ring.start(server.clone())
            .map_err(system("start the ring's thread"))?;
    }
    let runner = Runner::new(&config, own, verifier, journal, identity.boot_nonce);
    let client = Client::new(transport, identity.clone(), runner, config.clock);
    let client = thread::Builder::new()
        .name("client".into())
        .spawn(|| client.run());
    client.map_err(system("start the client's thread"))?;
    log::event("ready", &[("vm", &vm_id), ("anchors", &anchors)]);
    if anchors == 0 {
        log::event(
            "no-trust-anchor",
            &[
                ("effect", &"no task will be run"),
                ("dir", &config.trust_dir.display()),
            ],
        );
    }
    server
        .run(&*listener)
        .map_err(system("go on accepting streams"))
}

fn listen_hint(e: &std::io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::EAFNOSUPPORT | libc::ENODEV) => {
            "this kernel has no vsock; load vmw_vsock_virtio_transport"
        }
        Some(libc::EADDRINUSE) => "another agent or program has it",
        Some(libc::EACCES | libc::EPERM) => "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
        _ => "see the cause",
    }
}

/// Opens the journal if a process of its own could read all of it: a damaged page may panic inside the database, and
/// that must not take the ports down.
fn open_journal(dir: &Path) -> Result<Journal, JournalError> {
    let check = Command::new("/proc/self/exe")
        .arg("journal-check")
        .arg(dir)
        .stdin(Stdio::null())
        .output();
    match check {
        Ok(out) if out.status.success() => Journal::open(dir),
        Ok(out) => {
            let said = String::from_utf8_lossy(&out.stderr);
            let last = said
                .lines()
                .last()
                .unwrap_or_default()
                .trim_start_matches("adit-guest: ");
            let known = ["journal-", "no-space"]
                .iter()
                .any(|code| last.starts_with(code));
            // What it says itself when it can; its panic otherwise.
            match known {
                true => Journal::open(dir).and(Err(JournalError::Unavailable(last.to_owned()))),
                false => Err(JournalError::Corrupt(format!(
                    "reading it ended with {}: {last}",
                    out.status
                ))),
            }
        }
        Err(e) => Err(JournalError::Unavailable(format!("cannot check it: {e}"))),
    }
}
