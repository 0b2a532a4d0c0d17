//! `cargo xtask bench NAME` runs the benches of that name and prints their lines. The exit status says whether they could measure,
//! not whether the figures are good.

use std::path::PathBuf;
use std::process::Command;

use adit_tests::debian::Init;
use adit_tests::image::Kernel;
use adit_tests::process::output;

use crate::{bench_vmm, progress, setup};

/// The vsock backend that ours is compared with, from crates.io.
const PEER: (&str, &str) = ("vhost-device-vsock", "0.3.0");

/// The benches.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Name {
    /// Device and port; our backend and vhost-device-vsock; tunnels, socat and haproxy
    Vsock,
    /// Real guests on our backend and on vhost-device-vsock
    Guest,
    /// The ring, other ways to send messages, and the machine's limits
    Ring,
    /// Streams over the ring, the bare ring, and Unix sockets
    Carrier,
    /// A real guest's ring and its vsock
    RingGuest,
    /// aditd's proxy to an agent on a ring; haproxy, nginx, socat and tinyproxy
    Proxy,
    /// Commands in a VM; the same started here
    Exec,
    /// adit-vmm and QEMU's microvm
    Vmm,
}

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Which bench
    name: Name,
    /// One JSON object a line for each figure
    #[arg(long)]
    json: bool,
    /// Only cells whose name contains this (proxy, exec)
    #[arg(long)]
    only: Option<String>,
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    let json = options.json.then_some("--json");
    // In real time: otherwise the scheduler's delays would be measured with each wake-up.
    let realtime = nix::unistd::geteuid().is_root().then_some("--realtime");
    let own: Vec<&str> = json.into_iter().chain(realtime).collect();
    match options.name {
        Name::Vsock => vsock(&own),
        Name::Guest => guest(&own),
        Name::Ring => ring(&own),
        Name::Carrier => carrier(&own),
        Name::RingGuest => ring_guest(&own),
        Name::Proxy => proxy(&own, options.only.as_deref()),
        Name::Exec => exec(&own, options.only.as_deref()),
        Name::Vmm => bench_vmm::run(options.json).map(|()| true),
    }
}

fn vsock(own: &[&str]) -> anyhow::Result<bool> {
    bench("vsock", own)?;
    let peer = peer();
    let mut args = own.to_vec();
    args.extend(peer.iter().flat_map(|path| ["--peer", path]));
    // Build the programs of a tunnel, and install the relays.
    setup::run()?;
    let binaries = setup::host_binaries(true)?.display().to_string();
    args.extend(["--binaries", &binaries]);
    bench("backends", &args)?;
    Ok(true)
}

/// Streams over the ring between two processes, and the ring into a guest.
fn carrier(own: &[&str]) -> anyhow::Result<bool> {
    setup::run()?;
    let image = setup::bare_image()?.display().to_string();
    let more = ["--rounds", "15", "--image", &image];
    bench("carrier", &[own, &more].concat())?;
    Ok(true)
}

/// The ring and others. Those that need more than Rust to build are in a workspace of their own.
fn ring(own: &[&str]) -> anyhow::Result<bool> {
    let plot = plot("ring.svg")?;
    let mut args = [own, &["--rounds", "15", "--plot", &plot]].concat();
    let peers = ring_peers();
    if let Err(e) = &peers {
        eprintln!("skipped: iceoryx2, shmem-ipc and ipmpsc do not build: {e:#}");
    }
    let peers = peers.ok().map(|path| path.display().to_string());
    args.extend(peers.iter().flat_map(|path| ["--peers", path]));
    bench("ring", &args)?;
    Ok(true)
}

/// Builds the other rings under target/peers.
fn ring_peers() -> anyhow::Result<PathBuf> {
    setup::libclang()?;
    let target = adit_tests::target().join("peers").join("ring");
    progress::during("building the other rings", || {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command
            .args(["build", "--quiet", "--release", "--locked"])
            .current_dir(adit_tests::root().join("benches/peers"))
            .arg("--target-dir")
            .arg(&target);
        output(&mut command)
    })?;
    Ok(target.join("release/adit-bench-peers"))
}

/// The front door, beside relays of Debian.
fn proxy(own: &[&str], only: Option<&str>) -> anyhow::Result<bool> {
    setup::run()?;
    setup::relays()?;
    let binaries = setup::host_binaries(true)?.display().to_string();
    let only: Vec<&str> = only.into_iter().flat_map(|only| ["--only", only]).collect();
    bench("proxy", &[own, &["--binaries", &binaries], &only].concat())?;
    Ok(true)
}

/// Commands, with an agent as a process.
fn exec(own: &[&str], only: Option<&str>) -> anyhow::Result<bool> {
    setup::run()?;
    setup::guest_binaries()?;
    let binaries = setup::host_binaries(true)?.display().to_string();
    let program = adit_tests::guest_bin("adit-guest").display().to_string();
    // The agent comes into the real guest by its package.
    crate::package::all_for_tests()?;
    setup::debian(Kernel::V6_1, Init::Systemd)?;
    let only: Vec<&str> = only.into_iter().flat_map(|only| ["--only", only]).collect();
    let args = ["--binaries", &binaries, "--program", &program];
    bench("exec", &[own, &args, &only].concat())?;
    Ok(true)
}

/// Real guests on both backends.
fn guest(own: &[&str]) -> anyhow::Result<bool> {
    let peer = peer();
    setup::run()?;
    setup::guest_binaries()?;
    let mut args = own.to_vec();
    args.extend(peer.iter().flat_map(|path| ["--peer", path]));
    bench("guest", &args)?;
    Ok(true)
}

/// A real guest's ring, with a plot.
fn ring_guest(own: &[&str]) -> anyhow::Result<bool> {
    setup::run()?;
    setup::guest_binaries()?;
    let binaries = setup::host_binaries(true)?.display().to_string();
    let plot = plot("which-carrier.svg")?;
    let args = ["--binaries", &binaries, "--plot", &plot];
    bench("ring_guest", &[own, &args].concat())?;
    Ok(true)
}

/// The path of a bench's plot.
fn plot(name: &str) -> anyhow::Result<String> {
    let dir = adit_tests::target().join("bench");
    std::fs::create_dir_all(&dir)?;
    Ok(dir.join(name).display().to_string())
}

/// The path of the peer. Prints the reason and returns `None` if it cannot be installed.
fn peer() -> Option<String> {
    let peer = setup::cargo_install(PEER, "peers", &[]);
    if let Err(e) = &peer {
        eprintln!("skipped: {} cannot be installed: {e:#}", PEER.0);
    }
    peer.ok().map(|path| path.display().to_string())
}

fn bench(name: &str, args: &[&str]) -> anyhow::Result<()> {
    let cargo = [
        "bench",
        "--quiet",
        "-p",
        "adit-benches",
        "--bench",
        name,
        "--",
    ];
    setup::cargo(&[&cargo[..], args].concat())
}
