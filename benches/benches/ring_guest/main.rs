//! `cargo bench --bench ring_guest -- --binaries DIR [--plot FILE] [--json]`: a real guest's ring compared with the vsock of the
//! same guest, in one run. `cargo xtask bench ring-guest` builds what it needs.
//!
//! | row | host's end | guest's end |
//! |---|---|---|
//! | records | the bare ring | `ring-echo`: polls, or gets its doorbell by an interrupt or by a byte over vsock |
//! | vsock port | a tunnel to a plain vsock port | an echo on AF_VSOCK |
//! | tunnel | CONNECT through aditd | the agent, and a TCP echo behind it |

#[path = "../common/plot.rs"]
mod plot;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_benches::report::{Better, Figure, median};
use adit_ringbuf::Wake;
use adit_ringbuf::session::{self, Event};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::blocking::{Receiver, Sender};
use adit_ringbuf_io::doorbell::Doorbell;
use adit_ringbuf_io::ivshmem::Server;
use adit_tests::connect::connect;
use adit_tests::guest::{Guest, Identity, Ring};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use anyhow::Context;
use plot::Plot;
use vmm_sys_util::eventfd::EventFd;

const LIMIT: Duration = Duration::from_secs(60);
/// Round trips of 64 bytes: without a pause, and with one, so that whoever waits has gone to sleep.
const ROUNDS: usize = 1000;
const IDLE_ROUNDS: usize = 300;
const PAUSE: Duration = Duration::from_millis(1);
const BULK: usize = 64 << 10;
const BULK_ROUNDS: usize = 256;
const BYTES: usize = 8 << 20;
/// The lane that `ring-echo` echoes.
const LANE: usize = 1;
/// Message sizes of the plot, and round trips of each.
const SIZES: [usize; 6] = [64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10];
const SIZE_ROUNDS: usize = 100;

/// The figures of one way to the guest.
struct Row {
    /// The name of the way, for people.
    name: &'static str,
    /// Round trips of 64 bytes, us: without a pause, and with one.
    rtt_us: Vec<f64>,
    idle_us: Vec<f64>,
    /// Echo of 64 KiB pieces, MiB/s.
    bulk_mib_s: f64,
    /// Median round trip of a message of each of [`SIZES`], us.
    sizes_us: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let json = std::env::args().any(|a| a == "--json");
    let Some(bins) = after("--binaries").map(PathBuf::from) else {
        eprintln!("skipped: no --binaries; `cargo xtask bench ring-guest` builds them");
        return Ok(());
    };
    let image = Image::build(Kernel::V6_1, &|what| eprintln!("{what}"))?;
    // A guest that polls leaves no processor to its vsock, so it is compared with the vsock of a guest that sleeps.
    let [polling, _] = bare(&image, &bins, Signal::Polls)?;
    let [byte, port] = bare(&image, &bins, Signal::Byte)?;
    // The emulated machine with an IOMMU is slower, so it is compared with its own vsock.
    let [msix, msix_port] = bare(&image, &bins, Signal::Interrupt)?;
    let tunnels = [Over::Vsock, Over::RingByte, Over::VsockQ35, Over::RingQ35];
    let tunnels = tunnels.map(|by| tunnel(&image, &bins, by));
    let [tunnel, tunnel_byte, tunnel_q35, tunnel_msix] = tunnels;
    let rows = [
        polling,
        byte,
        port,
        msix,
        msix_port,
        tunnel?,
        tunnel_byte?,
        tunnel_q35?,
        tunnel_msix?,
    ];
    for row in &rows {
        for (what, unit, better, values) in [
            ("64 B", "us", Better::Lower, &row.rtt_us),
            ("64 B, asleep in between", "us", Better::Lower, &row.idle_us),
            ("64 KiB", "MiB/s", Better::Higher, &vec![row.bulk_mib_s]),
        ] {
            Figure::alone(format!("{}: {what}", row.name), unit, better, values).print(json);
        }
    }
    let [
        polling,
        byte,
        port,
        msix,
        msix_port,
        tunnel,
        tunnel_byte,
        tunnel_q35,
        tunnel_msix,
    ] = &rows;
    let less = |name: &str, a: &[f64], b: &[f64], must, aim| {
        let figure = Figure::alone(name, "us", Better::Lower, a);
        figure.beside("vsock", b, must, aim).print(json);
    };
    let (ours, theirs) = (&polling.rtt_us, &port.rtt_us);
    less("polling, 64 B", ours, theirs, 0.05, 0.01);
    let (ours, theirs) = (&msix.idle_us, &msix_port.idle_us);
    less("asleep, MSI-X, 64 B", ours, theirs, 0.5, 0.3);
    let (ours, theirs) = (&byte.idle_us, &port.idle_us);
    less("asleep, a byte over vsock, 64 B", ours, theirs, 1.0, 1.0);
    let more = |name: &str, a: &Row, b: &Row, must, aim| {
        let figure = Figure::alone(name, "MiB/s", Better::Higher, &[a.bulk_mib_s]);
        figure
            .beside("vsock", &[b.bulk_mib_s], must, aim)
            .print(json);
    };
    more("polling, 64 KiB", polling, port, 8.0, 20.0);
    more(
        "tunnel, a byte over vsock, 64 KiB",
        tunnel_byte,
        tunnel,
        2.0,
        5.0,
    );
    more(
        "tunnel, MSI-X (q35), 64 KiB",
        tunnel_msix,
        tunnel_q35,
        2.0,
        5.0,
    );
    if let Some(path) = after("--plot") {
        match plot(&rows).draw(&SIZES, &path) {
            Ok(()) => eprintln!("plot over sizes: {path}"),
            Err(e) => eprintln!("no plot: {path}: {e}"),
        }
    }
    Ok(())
}

/// The round trip time over the size of a message, for each carrier.
fn plot(rows: &[Row]) -> Plot<'_> {
    let all = || rows.iter().flat_map(|row| row.sizes_us.iter().copied());
    let (least, most) = (all().fold(f64::MAX, f64::min), all().fold(0.0, f64::max));
    let line = |row: &'_ Row| {
        let points = SIZES.iter().zip(&row.sizes_us);
        let points = points.map(|(&size, &us)| (size as f64, us)).collect();
        let width = if row.name.contains("vsock port") {
            2
        } else {
            4
        };
        (row.name, points, width)
    };
    Plot {
        caption: "A message there and back: a real guest in QEMU",
        y: ("us, median", least * 0.7..most * 1.5),
        lines: rows.iter().map(line).collect(),
    }
}

/// The argument after `name` on the command line.
fn after(name: &str) -> Option<String> {
    std::env::args().skip_while(|arg| arg != name).nth(1)
}

fn identity<'a>(socket: &'a Path, agent: Option<&'a Path>, script: &'a str) -> Identity<'a> {
    Identity {
        name: "web-1",
        vhost_socket: socket,
        agent,
        trust: None,
        script,
        boot_files: false,
    }
}

/// How the host signals the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signal {
    /// Not at all: the guest polls.
    Polls,
    /// By a byte on a stream over vsock.
    Byte,
    /// By MSI-X.
    Interrupt,
}

/// The guest's doorbell.
enum GuestDoorbell {
    Event(EventFd),
    Stream(TcpStream),
}

impl Doorbell for GuestDoorbell {
    fn ring(&self) -> std::io::Result<()> {
        match self {
            Self::Event(event) => event.ring(),
            Self::Stream(stream) => { stream }.write_all(&[1]),
        }
    }
}

/// Measures a guest with a program that echoes its ring, and the guest's vsock.
fn bare(image: &Image, bins: &Path, signal: Signal) -> anyhow::Result<[Row; 2]> {
    let host = Host::start(bins, &["web-1"])?;
    host.wait_port("web-1")?;
    let socket = host.dir().join("bench.sock");
    let mut server = Server::new(UnixListener::bind(&socket)?, BYTES)?;
    let vhost = host.vhost_socket("web-1");
    let port = if signal == Signal::Byte { "5001" } else { "" };
    let script = format!("adit-testguest ring-echo {port} > /dev/console 2>&1 &\n");
    let ring = Ring {
        socket: &socket,
        iommu: signal == Signal::Interrupt,
        parameters: "",
    };
    let who = identity(&vhost, None, &script);
    let mut guest = Guest::boot_with(image, &who, Some(ring), &host.dir().join("web-1"))?;
    let given = wait_for("QEMU", LIMIT, || Ok(server.accept()?))?;
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let spec = adit_channel::ring::spec(BYTES).context("room for a region")?;
    let mut session = session::Host::offer(given.memory.clone(), spec, epoch)?;
    guest.wait_ready(LIMIT)?;
    let bells = given.bells.try_clone()?;
    let [data, space] = match signal {
        Signal::Byte => {
            guest.wait_serial("listens", LIMIT, |log| log.contains("RING-LISTENS"))?;
            let stream = connect(host.proxy(), "vsock-5001.web-1:5001")?;
            stream.set_nodelay(true)?;
            [
                GuestDoorbell::Stream(stream.try_clone()?),
                GuestDoorbell::Stream(stream),
            ]
        }
        _ => [bells.guest_data, bells.guest_space].map(GuestDoorbell::Event),
    };
    wait_for("the guest attaches", LIMIT, || {
        let turn = session.poll();
        if turn.wake == Wake::Yes {
            data.ring()?;
        }
        let attached = matches!(turn.event, Some(Event::Attached { .. }));
        Ok(attached.then_some(()))
    })?;
    let ends = session.ends(LANE, true)?;
    let spin = Spin::default();
    let mut to = Sender::new(ends.producer, data, bells.host_space, spin);
    let mut from = Receiver::new(ends.consumer, space, bells.host_data, spin);
    let (piece, mut back) = (vec![0x5a; BULK], vec![0; BULK]);
    let (name, port) = match signal {
        Signal::Polls => ("ring, guest polls", "vsock, guest polls"),
        Signal::Byte => ("ring, a byte over vsock", "vsock"),
        Signal::Interrupt => ("ring, MSI-X (q35)", "vsock (q35)"),
    };
    let records = measure(name, |len, count| {
        // Send as much as the ring has room for. Never block on a full ring: the guest would then wait for us to read.
        let (mut sent, mut got) = (0, 0);
        while got < count {
            while sent < count && sent - got < 8 {
                to.send_within(&piece[..len], LIMIT)?;
                sent += 1;
            }
            from.recv_within(&mut back, LIMIT)?;
            got += 1;
        }
        Ok(())
    })?;
    let port = over(port, &connect(host.proxy(), "vsock-5000.web-1:5000")?)?;
    drop(guest);
    Ok([records, port])
}

/// The carrier of a tunnel to the agent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    Vsock,
    /// The machine has the ring's function, but nobody made its memory a region.
    VsockQ35,
    RingByte,
    RingQ35,
}

/// Measures a tunnel to the agent's TCP echo.
fn tunnel(image: &Image, bins: &Path, by: Over) -> anyhow::Result<Row> {
    let host = Host::start_with(bins, &["web-1"], "ivshmem_mib = 8")?;
    host.wait_port("web-1")?;
    let vhost = host.vhost_socket("web-1");
    let (served, unused) = (host.ivshmem_socket("web-1"), host.dir().join("unused.sock"));
    let mut nobody = Server::new(UnixListener::bind(&unused)?, BYTES)?;
    let agent = adit_tests::guest_bin("adit-guest");
    let who = identity(&vhost, Some(&agent), "");
    let (name, socket, wanted) = match by {
        Over::Vsock => ("tunnel, vsock", None, "vsock"),
        Over::VsockQ35 => ("tunnel, vsock (q35)", Some(&unused), "vsock"),
        Over::RingByte => ("tunnel, ring, a byte over vsock", Some(&served), "ring"),
        Over::RingQ35 => ("tunnel, ring, MSI-X (q35)", Some(&served), "ring"),
    };
    let ring = socket.map(|socket| Ring {
        socket,
        iommu: by != Over::RingByte,
        parameters: "",
    });
    let mut guest = Guest::boot_with(image, &who, ring, &host.dir().join("web-1"))?;
    let _memory = match by {
        Over::VsockQ35 => Some(wait_for("QEMU", LIMIT, || Ok(nobody.accept()?))?),
        _ => None,
    };
    guest.wait_ready(LIMIT)?;
    host.adit(&["wait", "web-1", "--for", "agent", "--timeout", "60s"])?;
    wait_for(wanted, LIMIT, || {
        let out = host.adit(&["vm", "show", "web-1", "-o", "json"])?;
        let vm: serde_json::Value = serde_json::from_slice(&out.stdout)?;
        Ok((vm["carrier"]["kind"] == wanted).then_some(()))
    })?;
    over(name, &connect(host.proxy(), "web-1:7")?)
}

fn over(name: &'static str, stream: &TcpStream) -> anyhow::Result<Row> {
    stream.set_nodelay(true)?;
    let piece = vec![0x5a; BULK];
    let mut back = vec![0; BULK];
    measure(name, |len, count| {
        if count == 1 {
            { stream }.write_all(&piece[..len])?;
            { stream }.read_exact(&mut back[..len])?;
            return Ok(());
        }
        // Write and read at once: the echo needs it.
        std::thread::scope(|scope| {
            let sending =
                scope.spawn(|| (0..count).try_for_each(|_| { stream }.write_all(&piece[..len])));
            let read = (0..count).try_for_each(|_| { stream }.read_exact(&mut back[..len]));
            sending.join().ok().context("the sender panicked")??;
            Ok(read?)
        })
    })
}

/// Runs all measurements. `go(len, count)` makes `count` round trips of `len` bytes.
fn measure(
    name: &'static str,
    mut go: impl FnMut(usize, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Row> {
    eprintln!("measuring {name}");
    go(64, 100)?;
    let mut trips = |len: usize, count: usize, pause: Duration| -> anyhow::Result<Vec<f64>> {
        let trip = |_| {
            std::thread::sleep(pause);
            let begin = Instant::now();
            go(len, 1)?;
            Ok(begin.elapsed().as_nanos() as f64 / 1000.0)
        };
        (0..count).map(trip).collect()
    };
    let rtt_us = trips(64, ROUNDS, Duration::ZERO)?;
    let idle_us = trips(64, IDLE_ROUNDS, PAUSE)?;
    let sizes = SIZES.iter().map(|&len| {
        let took = trips(len, SIZE_ROUNDS, Duration::ZERO)?;
        Ok(median(&took))
    });
    let sizes_us = sizes.collect::<anyhow::Result<_>>()?;
    let begin = Instant::now();
    go(BULK, BULK_ROUNDS)?;
    let mib = (BULK * BULK_ROUNDS) as f64 / f64::from(1 << 20);
    let bulk_mib_s = mib / begin.elapsed().as_secs_f64();
    Ok(Row {
        name,
        rtt_us,
        idle_us,
        bulk_mib_s,
        sizes_us,
    })
}
