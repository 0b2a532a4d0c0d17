//! `adit-port`: serves one VM. Started by `aditd`, and lives on without it.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use adit_channel::device::GuestCid;
use adit_channel::hello;
use adit_channel::vhost_user::{MemoryPolicy, VhostUserCarrier, VhostUserConfig};
use adit_port::log;
use adit_port::place::Place;
use adit_port::process::{Options, Process};
use adit_port::sandbox;
use anyhow::Context;
use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Serves one VM: its virtio-vsock device behind vhost-user, and its tunnels.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Name of the VM.
    #[arg(long, value_parser = vm_name)]
    name: String,
    /// CID of the VM, at least 3.
    #[arg(long, value_parser = clap::value_parser!(u64).range(3..))]
    cid: u64,
    /// The VM's directory: vhost.sock and ctl.sock are made in it.
    #[arg(long)]
    dir: PathBuf,
    /// Host port that the guest may dial; repeat for more.
    #[arg(long = "serve-port", value_name = "PORT", default_values_t = [hello::PORT])]
    serve_ports: Vec<u32>,
    /// Take guest memory from any file (hugetlbfs), not from sealed memfds only.
    #[arg(long)]
    allow_any_memory: bool,
    /// error, warn, info, debug or trace.
    #[arg(long, default_value = "info")]
    log_level: tracing::Level,
}

fn vm_name(text: &str) -> Result<String, String> {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    if text.is_empty() || text.len() > 63 || !text.bytes().all(ok) {
        return Err("use 1 to 63 of a-z 0-9 - . _".into());
    }
    Ok(text.to_owned())
}

fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.log_level);
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("adit-port: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let place = Place::take(&args.dir)?;
    raise_descriptor_limit();
    let stop = stop_signals().context("cannot watch signals")?;
    let mut random = [0; 24];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut random))
        .context("cannot read /dev/urandom")?;
    let (boot_nonce, seed) = random.split_at(16);
    // From here on there is a guest to be afraid of: files go before its thread is there, system calls after.
    let files = sandbox::lock_files().context("no sandbox")?;
    if !files {
        tracing::warn!("the kernel has no landlock: only seccomp confines this process");
    }
    let guest_cid = GuestCid::new(args.cid).context("CID is reserved: use 3 to 4294967294")?;
    let mut config = VhostUserConfig::new(place.vhost, guest_cid, args.name.clone());
    if args.allow_any_memory {
        config.memory = MemoryPolicy::AnyFile;
    }
    let carrier = VhostUserCarrier::new(config).context("cannot serve vhost.sock")?;
    let options = Options {
        vm: args.name,
        cid: args.cid,
        serve_ports: args.serve_ports,
        seed: u64::from_le_bytes(seed.try_into()?),
        boot_nonce: boot_nonce.try_into()?,
    };
    let mut process = Process::new(options, carrier, place.control, stop)?;
    sandbox::lock_calls().context("no sandbox")?;
    tracing::info!(pid = std::process::id(), "serving");
    process.run().context("the loop ended")
}

/// As many tunnels as the machine lets us have.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(error = %e, soft, "descriptor limit not raised");
    }
}

/// SIGTERM and SIGINT as a descriptor. Threads made later inherit that they are blocked.
fn stop_signals() -> nix::Result<OwnedFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    Ok(fd.into())
}
