//! A VM without a machine: the guest's agent as threads of the test, on a ring that it offers to the VM's port process. What it
//! serves are the ports of this machine's 127.0.0.1, so a server of the test is one in the VM.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use adit_channel::ring::RingBells;
use adit_guest_driver::config::Config;
use adit_guest_driver::enrol;
use adit_guest_driver::fork_server::ForkServer;
use adit_guest_driver::live::Live;
use adit_guest_driver::policy::{Standing, parse};
use adit_guest_driver::serve::exec::Exec;
use adit_guest_driver::serve::files::Files;
use adit_guest_driver::serve::{Identity, Server, blob};
use adit_guest_driver::transport::ring::{RingEnd, carrier};
use adit_ringbuf::Mapped;
use adit_ringbuf_io::attach::{Bells, Offer, Socket};
use anyhow::Context;

use crate::process::wait_for;

/// Bytes of the ring.
const BYTES: usize = 4 << 20;
const LIMIT: Duration = Duration::from_secs(20);

/// Starts it for the VM whose directory this is, with these ports. It ends with the port process, or with the test.
///
/// # Errors
/// The port process does not take the ring.
pub fn start(vm: &Path, ports: &[u16]) -> anyhow::Result<()> {
    start_with(vm, ports, "")
}

/// The same with `[[service]]` sections of its `adit-guest.toml`.
///
/// # Errors
/// As [`start`], or the agent would not take these.
pub fn start_with(vm: &Path, ports: &[u16], services: &str) -> anyhow::Result<()> {
    begin(vm, ports, services, |_| Ok(()))
}

/// The same for commands, too: sessions and copies are processes of `program`, found in `run_dir`, and this policy decides. Below
/// `run_dir` are also its state (`state`) and the keys that it trusts (`trust`).
///
/// # Errors
/// As [`start`], or the agent would not take the policy.
pub fn start_running(
    vm: &Path,
    ports: &[u16],
    program: &Path,
    run_dir: &Path,
    policy: &str,
) -> anyhow::Result<()> {
    begin(vm, ports, "", |server| {
        let text = parse::parse(policy.as_bytes());
        let text = text.map_err(|problems| anyhow::anyhow!("{problems:?}"))?;
        let file = run_dir.join("adit-guest.toml");
        let name = vm.file_name().context("a VM's directory")?;
        let at = |below: &str| run_dir.join(below).display().to_string();
        let config = format!(
            "vm_id = {:?}\nrun_dir = {:?}\nstate_dir = {:?}\ntrust_dir = {:?}\n",
            name.to_string_lossy(),
            run_dir.display().to_string(),
            at("state"),
            at("trust")
        );
        std::fs::write(&file, config)?;
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let config = Config::load(&file)?;
        let enrolment = enrol::at_start(&config);
        let forks = Arc::new(ForkServer::of(program));
        let live = Arc::new(Live::new(config, enrolment));
        server.runs(Exec::new(forks.clone(), live)?);
        server.copies(Files::new(forks));
        server.govern(Arc::new(Standing::of("policy.toml".as_ref(), text)));
        Ok(())
    })
}

fn begin(
    vm: &Path,
    ports: &[u16],
    services: &str,
    set_up: impl FnOnce(&Server) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let config = Config::parse("adit-guest.toml".as_ref(), services)?;
    let socket: PathBuf = vm.join("ring.sock");
    wait_for("a ring's socket", LIMIT, || {
        Ok(socket.exists().then_some(()))
    })?;
    let name = vm.file_name().context("a VM's directory")?;
    let offer = Offer {
        vm: name.to_string_lossy().into_owned(),
        bytes: BYTES as u64,
        lanes: 2,
    };
    let (memory, fd) = Mapped::memfd(BYTES)?;
    let bells = Bells::new()?;
    let attached = Socket::connect(&socket)?;
    attached.offer(&offer, 1, fd.as_fd(), &bells)?;
    let ring = RingEnd::start(carrier(memory, RingBells::of_guest(bells))?)?;
    let identity = Arc::new(Identity {
        boot_nonce: [5; 16],
        epoch: AtomicU64::new(0),
        admission: Default::default(),
    });
    let blobs = blob::store("/nowhere".as_ref());
    let server = Server::new(ports.to_vec(), blobs, None, identity);
    server.offer(config.service);
    set_up(&server)?;
    std::thread::Builder::new()
        .name("agent".into())
        .spawn(move || {
            // The ring lives as long as the connection by which it was offered.
            let _attached = attached;
            match ring.listen() {
                Ok(streams) => server.run_on_ring(streams),
                Err(e) => eprintln!("the agent has ended: {e}"),
            }
        })?;
    Ok(())
}
