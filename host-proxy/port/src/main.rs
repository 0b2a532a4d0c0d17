//! `adit-port` serves one VM. `aditd` starts it, and it survives `aditd`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::carrier::Carrier;
use adit_channel::device::GuestCid;
use adit_channel::foreign::{self, Foreign};
use adit_channel::hello;
use adit_channel::live::LiveFile;
use adit_channel::socket_path;
use adit_channel::vhost_user::{self, MemoryPolicy, VhostUserCarrier, VhostUserConfig};
use adit_names::VmId;
use adit_passed::{Closer, Passed};
use adit_port::auto::Auto;
use adit_port::control_io::{Message, receive_passed};
use adit_port::door::{Behind, DoorLink, Offers, WithOffers, keeper};
use adit_port::keep::{Keeping, Note};
use adit_port::log;
use adit_port::place::Place;
use adit_port::privilege;
use adit_port::process::{Options, Process};
use adit_port::rings::{self, RingSockets};
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
    #[arg(long)]
    name: VmId,
    /// CID of the VM, at least 3.
    #[arg(long, value_parser = clap::value_parser!(u64).range(3..))]
    cid: u64,
    /// The VM's directory: vhost.sock and ctl.sock are made in it.
    #[arg(long)]
    dir: PathBuf,
    /// Reach the guest through this socket of a VMM that has one for each stream (Firecracker, Cloud Hypervisor), and not by
    /// vhost-user. What the guest dials arrives at the same path with `_PORT` behind it, which is made here.
    #[arg(long, value_name = "PATH", value_parser = hybrid)]
    hybrid: Option<PathBuf>,
    /// The VMM of --hybrid passes a half-close on, in both directions.
    #[arg(long, requires = "hybrid")]
    half_closes: bool,
    /// Reach the guest through the host's kernel (vhost_vsock), and not by vhost-user. What the guest dials comes from aditd.
    #[arg(long)]
    vsock: bool,
    /// Take whichever way there is: vhost-user, and those of --vsock and --hybrid that are given, in this order.
    #[arg(long)]
    auto: bool,
    /// Host port that the guest may dial; repeat for more.
    #[arg(long = "serve-port", value_name = "PORT", default_values_t = [hello::PORT])]
    serve_ports: Vec<u32>,
    /// Poll for so many microseconds (at most 1000) before sleeping: for VMs whose vCPUs have cores of their own.
    #[arg(long, value_name = "US", default_value_t = 0)]
    busy_poll_us: u64,
    /// Memory of the ring for a QEMU that connects to ivshmem.sock, MiB: a power of two up to 1024.
    #[arg(long, value_name = "MIB", default_value_t = 4, value_parser = ivshmem_mib)]
    ivshmem_mib: usize,
    /// Accept guest memory from any file (hugetlbfs), not only from sealed memfds.
    #[arg(long)]
    allow_any_memory: bool,
    /// Take over from a process that was killed: its state arrives on the standard input, a SOCK_SEQPACKET socket.
    #[arg(long)]
    resume: bool,
    /// Run as this user and group, which belong to this VM alone. Needs root. Without it, the user does not change.
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u32).range(1..i64::from(u32::MAX)))]
    uid: Option<u32>,
    /// error, warn, info, debug or trace.
    #[arg(long, default_value = "info")]
    log_level: tracing::Level,
}

fn ivshmem_mib(text: &str) -> Result<usize, String> {
    let mib = text.parse().ok();
    mib.filter(|mib: &usize| mib.is_power_of_two() && *mib <= 1024)
        .ok_or_else(|| "use a power of two up to 1024".into())
}

fn hybrid(text: &str) -> Result<PathBuf, String> {
    socket_path::check_hybrid(text.as_ref()).map(|()| text.into())
}

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|arg| arg == keeper::COMMAND)
    {
        return doorkeeper();
    }
    let args: Args = match adit_print::parse("adit-port") {
        Ok(args) => args,
        Err(done) => return done,
    };
    log::start(args.log_level);
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => adit_print::failed("adit-port", e.as_ref()),
    }
}

/// The other process of a VM whose VMM has a socket for each stream.
fn doorkeeper() -> ExitCode {
    log::start(tracing::Level::INFO);
    let served = keeper::Args::of_this_process().and_then(|args| {
        let control = std::io::stdin().as_fd().try_clone_to_owned()?;
        keeper::run(args, control)
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => adit_print::failed("adit-port door", &e),
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    // Landlock applies to the calling thread and its children, so no thread may exist yet.
    Closer::shared().hold();
    anyhow::ensure!(
        args.auto || args.hybrid.is_none() || !args.vsock,
        "--hybrid and --vsock are two ways: choose one, or add --auto"
    );
    let place = Place::prepare(&args.dir)?;
    if !args.auto && (args.hybrid.is_some() || args.vsock) {
        // No VMM and no ring connects to these.
        place.withdraw(&args.dir)?;
    }
    let left = Left::find(&args)?;
    raise_descriptor_limit();
    let stop = stop_signals().context("cannot watch signals")?;
    let mut random = [0; 24];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut random))
        .context("cannot read /dev/urandom")?;
    let (boot_nonce, seed) = random.split_at(16);
    // It keeps the rights that this process gives up.
    let guest_cid = GuestCid::new(args.cid).context("CID is reserved: use 3 to 4294967294")?;
    let doors = Doors::start(&args)?;
    // The guest comes after this. Give up rights and files before its thread exists, and system calls after.
    let ring_bytes = args.ivshmem_mib << 20;
    if !privilege::give_up(args.uid, ring_bytes as u64).context("cannot give up privileges")? {
        tracing::debug!("started without the right to empty its capability bounding set");
    }
    place.listen().context("cannot listen on ctl.sock")?;
    let files = sandbox::lock_files().context("cannot enter the sandbox")?;
    if !files {
        tracing::warn!("the kernel has no landlock: only seccomp confines this process");
    }
    let options = Options {
        vm: args.name.clone(),
        cid: args.cid,
        serve_ports: args.serve_ports.clone(),
        busy_poll: Duration::from_micros(args.busy_poll_us),
        seed: u64::from_le_bytes(seed.try_into()?),
        boot_nonce: boot_nonce.try_into()?,
        vmm: false,
    };
    let of = Served {
        options,
        live: left.live.clone(),
        control: place.control,
        stop,
    };
    if !args.auto && doors.is_any() {
        let (foreign, offers) = doors.carrier(&args, &of)?;
        return serve_foreign(of, foreign, offers, left.note);
    }
    let mut config = VhostUserConfig::new(place.vhost, guest_cid, args.name.to_string());
    if args.allow_any_memory {
        config.memory = MemoryPolicy::AnyFile;
    }
    config.first_epoch = left.live.epoch() + 1;
    config.live = Some(left.live.clone());
    config.resume = left.handover;
    let keeping = Keeping::new(left.live.clone(), left.note, left.stuck);
    let (mut keeping, keeper) = keeping.context("cannot keep state for a successor")?;
    config.keeper = Some(Box::new(keeper));
    let carrier = VhostUserCarrier::new(config).context("cannot serve vhost.sock")?;
    keeping.set_releaser(carrier.releaser());
    let (rings, inbox) = rings::channel().context("cannot take rings")?;
    let mut sockets = RingSockets::new(
        of.options.vm.clone(),
        place.ring,
        place.ivshmem,
        ring_bytes,
        rings,
    )?;
    sockets.resume(left.ring);
    sockets.spawn().context("cannot serve ring.sock")?;
    if !args.auto {
        return serve(of.process(carrier, keeping)?.with_rings(inbox)?);
    }
    // Its thread must be there before the last right to make one is gone.
    Closer::shared().prepare();
    let first_epoch = left.live.epoch() + 1;
    let (auto, offers) = doors.auto(&args, carrier, first_epoch)?;
    let ways = auto.ways();
    let mut process = of
        .process(auto, keeping)?
        .with_rings(inbox)?
        .with_ways(ways);
    if let Some(offers) = offers {
        process = process.with_offers(offers);
    }
    serve(process)
}

/// What every kind of carrier is served with.
struct Served {
    options: Options,
    live: Arc<LiveFile>,
    control: OwnedFd,
    stop: OwnedFd,
}

impl Served {
    fn process<C: Carrier>(self, carrier: C, keeping: Keeping) -> anyhow::Result<Process<C>> {
        let Self {
            options,
            live,
            control,
            stop,
        } = self;
        Ok(Process::new(
            options, carrier, live, keeping, control, stop,
        )?)
    }
}

/// Serves a VM whose VMM, or whose host's kernel, has a socket for each stream. It has no ring, and nothing of it outlives this process.
fn serve_foreign(
    of: Served,
    carrier: Foreign<AtDoor>,
    offers: Option<Offers>,
    mut note: Note,
) -> anyhow::Result<()> {
    note.clear();
    let keeping = Keeping::new(of.live.clone(), note, None);
    let (keeping, _) = keeping.context("cannot keep state for a successor")?;
    // Its thread must be there before the last right to make one is gone.
    Closer::shared().prepare();
    let mut process = of.process(carrier, keeping)?;
    if let Some(offers) = offers {
        process = process.with_offers(offers);
    }
    serve(process)
}

fn serve<C: Carrier>(mut process: Process<C>) -> anyhow::Result<()> {
    sandbox::lock_calls().context("cannot enter the sandbox")?;
    tracing::info!(pid = std::process::id(), "serving");
    process.run().context("the loop ended")
}

/// Doorkeepers: they keep the rights that this process gives up.
struct Doors {
    /// Of the host's kernel.
    kernel: Option<DoorLink>,
    /// Of a VMM's socket.
    hybrid: Option<DoorLink>,
}

type AtDoor = WithOffers<DoorLink>;

impl Doors {
    fn start(args: &Args) -> anyhow::Result<Self> {
        let start = |behind| {
            DoorLink::start(behind, &args.serve_ports, Closer::shared())
                .context("cannot start the doorkeeper")
        };
        let cid = u32::try_from(args.cid)?;
        let kernel = args.vsock.then_some(Behind::Kernel {
            cid,
            only_seen: args.auto,
        });
        let hybrid = args.hybrid.as_deref().map(|path| Behind::Socket {
            path,
            stays: path.parent() == Some(&args.dir),
        });
        Ok(Self {
            kernel: kernel.map(start).transpose()?,
            hybrid: hybrid.map(start).transpose()?,
        })
    }

    fn is_any(&self) -> bool {
        self.kernel.is_some() || self.hybrid.is_some()
    }

    /// The only one, as a carrier.
    fn carrier(
        self,
        args: &Args,
        of: &Served,
    ) -> anyhow::Result<(Foreign<AtDoor>, Option<Offers>)> {
        let is_kernel = self.kernel.is_some();
        let door = self.kernel.or(self.hybrid).context("there is no door")?;
        let (carrier, offers) = foreign(door, args, is_kernel, of.live.epoch() + 1)?;
        Ok((carrier, is_kernel.then_some(offers)))
    }

    /// All of them, and the device.
    fn auto(
        self,
        args: &Args,
        device: VhostUserCarrier,
        first_epoch: u64,
    ) -> anyhow::Result<(Auto<VhostUserCarrier, AtDoor>, Option<Offers>)> {
        let kernel = self.kernel.map(|door| foreign(door, args, true, 1));
        let (kernel, offers) = kernel.transpose()?.unzip();
        let hybrid = self.hybrid.map(|door| foreign(door, args, false, 1));
        let hybrid = hybrid.transpose()?.map(|(carrier, _)| carrier);
        let auto = Auto::new(device, kernel, hybrid, first_epoch)
            .context("cannot serve the VMM's streams")?;
        Ok((auto, offers))
    }
}

fn foreign(
    door: DoorLink,
    args: &Args,
    is_kernel: bool,
    first_epoch: u64,
) -> anyhow::Result<(Foreign<AtDoor>, Offers)> {
    let options = foreign::Options {
        // AF_VSOCK passes them on.
        half_closes: is_kernel || args.half_closes,
    };
    let (door, offers) = WithOffers::new(door).context("cannot serve the VMM's streams")?;
    let carrier =
        Foreign::new(door, options, first_epoch).context("cannot serve the VMM's streams")?;
    Ok((carrier, offers))
}

/// What a predecessor left for this process.
struct Left {
    live: Arc<LiveFile>,
    handover: Option<vhost_user::Handover>,
    /// Descriptors of a ring, or none.
    ring: Vec<Passed>,
    note: Note,
    stuck: Option<String>,
}

impl Left {
    fn find(args: &Args) -> anyhow::Result<Self> {
        let mut note = Note::open(&args.dir).context("cannot note which VMM is connected")?;
        let resumed = args.resume.then(received).transpose();
        if let Ok(Some((live, handover, ring))) = resumed {
            return Ok(Self {
                live: Arc::new(live),
                handover,
                ring,
                note,
                stuck: None,
            });
        }
        // The state comes from a process that its guest may have controlled. If it is unusable, still serve the next VMM.
        let lost = match &resumed {
            Err(e) => {
                tracing::error!(
                    error = format!("{e:#}"),
                    "cannot take over from the predecessor"
                );
                format!("and its successor cannot use what it left ({e:#})")
            }
            Ok(_) => "while no aditd kept its descriptors".to_owned(),
        };
        let stuck = note.orphan().map(|pid| {
            let vmm = match pid {
                0 => "a VMM".to_owned(),
                pid => format!("VMM process {pid}"),
            };
            format!(
                "{vmm} is connected to a port process that was killed {lost}: power-cycle the VM, because QEMU does not \
                connect again"
            )
        });
        if stuck.is_none() {
            note.clear();
        }
        Ok(Self {
            live: Arc::new(LiveFile::create().context("no memory for the live table")?),
            handover: None,
            ring: Vec::new(),
            note,
            stuck,
        })
    }
}

/// Receives what `aditd` passes on from a predecessor.
fn received() -> anyhow::Result<(LiveFile, Option<vhost_user::Handover>, Vec<Passed>)> {
    let received = receive_passed(std::io::stdin(), &Closer::shared())?;
    let (message, mut fds) = received.context("it is closed")?;
    let Message::Handover(handover) = message else {
        anyhow::bail!("another frame: {:?}", message.kind());
    };
    let others = fds.len().checked_sub(handover.ring.into());
    let ring = fds.split_off(others.context("it lacks the ring's descriptors")?);
    let mut fds = fds.into_iter();
    let live = fds.next().context("it lacks the live table")?;
    let live = LiveFile::open(live.memory()?)?;
    let bytes = handover.record;
    let handover = (!bytes.is_empty()).then(|| vhost_user::Handover {
        bytes,
        // Not checked here: parsing checks each before its first use.
        fds: fds.filter_map(Passed::trust).collect(),
    });
    Ok((live, handover, ring))
}

/// Raises the limit of descriptors as far as allowed: each tunnel needs some.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(error = %e, soft, "descriptor limit not raised");
    }
}

/// A descriptor for SIGTERM and SIGINT; SIGHUP is ignored. Threads made later inherit that all of them are blocked.
fn stop_signals() -> nix::Result<OwnedFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    // Blocked, and never taken: aditd's whole control group may get it (`systemctl kill -s HUP`), and means aditd only.
    SigSet::from(Signal::SIGHUP).thread_block()?;
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    Ok(fd.into())
}
