//! Puts the agent together: configuration, journal, listener, client.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;

use adit_names::VmId;

use crate::client::Client;
use crate::config::{Config, ConfigError};
use crate::exec::{cgroup, reap};
use crate::fork_server::ForkServer;
use crate::freeze::Freezer;
use crate::live::Live;
use crate::ring::Link;
use crate::runner::Runner;
use crate::serve::agent::Agent;
use crate::serve::exec::Exec;
use crate::serve::files::Files;
use crate::serve::freeze::Freeze;
use crate::serve::{Admission, Identity, Server, blob};
use crate::transport::Transport;
use crate::upgrade::{Begun, Upgrade};
use crate::{enrol, facts, journald, log, protect};

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

/// Runs the agent until its listener fails. `ring`: serve streams over a shared-memory ring too, where the guest has one.
///
/// # Errors
/// It could not start, or the listener is gone.
pub fn run(
    begun: Begun,
    transport: Arc<dyn Transport>,
    ring: Option<Link>,
) -> Result<(), RunError> {
    let config = Config::load(&begun.how.config)?;
    // The agent may inherit any umask: the files that it makes have the modes that it asks for.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let system = |what| move |source: std::io::Error| RunError::System { what, source };
    reap::hold_signals().map_err(system("hold the signals of ended children"))?;
    protect::apply();
    let blobs = blob::store(&config.state_dir);
    let upgrade = Upgrade::new(begun, &config, blobs.clone())
        .map_err(system("start the thread that watches a trial"))?;
    let listener = transport.listen().map_err(|source| RunError::Listen {
        hint: listen_hint(&source),
        source,
    })?;
    let become_reaper = nix::sys::prctl::set_child_subreaper(true);
    become_reaper.map_err(|e| system("become the reaper of tasks' orphans")(e.into()))?;
    // Optional: without one a task's processes are found by their parents.
    let _ = cgroup::mount_if_absent();
    cgroup::leave_task();
    let run_dir = config.run_dir.clone();
    crate::exec::script::prepare(&run_dir).map_err(system("make run_dir usable"))?;
    let identity = Arc::new(Identity {
        boot_nonce: facts::boot_nonce(),
        epoch: AtomicU64::new(0),
        admission: Admission::of_this_boot(&run_dir),
    });
    let enrolment = enrol::at_start(&config);
    let (ports, services) = (config.allow_ports.clone(), config.service.clone());
    identity.admission.require(config.require_host_key);
    let live = Arc::new(Live::new(config, enrolment));
    let agent = Agent::new(live.clone(), upgrade.clone());
    let server = Server::new(ports, blobs, Some(agent), identity.clone());
    server.offer(services);
    let forks = Arc::new(ForkServer::of("/proc/self/exe".as_ref()));
    let exec = Exec::new(forks.clone(), live.clone());
    server.runs(exec.map_err(system("make the directory of sessions usable"))?);
    server.copies(Files::new(forks.clone()));
    server.freezes(Freeze::new(Freezer::new(forks, &run_dir)));
    server.govern(live.policy());
    let hup = (live.clone(), server.clone());
    reap::start(move || reload(&hup.0, &hup.1))
        .map_err(system("start the thread that reaps tasks' orphans"))?;
    if let Some(ring) = ring {
        ring.start(server.clone())
            .map_err(system("start the ring's thread"))?;
    }
    let anchors = live.anchors();
    let (me, anchors) = (live.me(&anchors), anchors.count());
    let runner = Runner::new(live.clone(), identity.boot_nonce);
    let client = Client::new(transport, identity, live.clone(), runner, upgrade);
    let client = thread::Builder::new()
        .name("client".into())
        .spawn(|| client.run());
    client.map_err(system("start the client's thread"))?;
    journald::is_vm(me.as_ref().ok());
    let vm = me.as_ref().map_or("none", VmId::as_str);
    log::event("ready", &[("vm", &vm), ("anchors", &anchors)]);
    if let Err(why) = &me {
        let effect = "no task will be run";
        let remedy = "give it a card, or `vm_id` in its configuration";
        let fields: [(&str, &dyn std::fmt::Display); 3] =
            [("effect", &effect), ("why", why), ("do", &remedy)];
        log::event("not-enrolled", &fields);
    }
    if anchors == 0 {
        log::event(
            "no-trust-anchor",
            &[
                ("effect", &"no task will be run"),
                ("dir", &live.config().trust_dir.display()),
                (
                    "do",
                    &"put a public key of `adit key new` there, if this guest is to run work",
                ),
            ],
        );
    }
    server
        .run(&*listener)
        .map_err(system("go on accepting streams"))
}

/// At SIGHUP.
fn reload(live: &Live, server: &Server) {
    let kept = live.reload();
    // Also if the configuration before stays: what a revoked key runs ends.
    server.govern(live.reload_policy());
    live.enrol_again();
    let kept = match kept {
        Ok(kept) => kept,
        Err(e) => {
            let effect = "the configuration before stays in force";
            return log::event(
                "reload-failed",
                &[("error", &log::chain(&e)), ("effect", &effect)],
            );
        }
    };
    let config = live.config();
    server.allow(config.allow_ports.clone());
    server.offer(config.service.clone());
    server.require_key(config.require_host_key);
    let anchors = live.anchors();
    journald::is_vm(live.me(&anchors).as_ref().ok());
    let (ports, anchors) = (config.allow_ports.len(), anchors.count());
    log::event("reloaded", &[("ports", &ports), ("anchors", &anchors)]);
    if !kept.is_empty() {
        log::event("restart-needed", &[("keys", &kept.join(","))]);
    }
}

fn listen_hint(e: &std::io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::EAFNOSUPPORT | libc::ENODEV) => {
            "this kernel has no vsock: `modprobe vmw_vsock_virtio_transport`, and install the module where there is none"
        }
        Some(libc::EADDRINUSE) => "another agent or program listens there",
        Some(libc::EACCES | libc::EPERM) => "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
        _ => "see the cause",
    }
}
