//! `cargo bench --bench ring_guest -- --binaries DIR [--plot FILE] [--json]`: a real guest's ring beside the vsock of the same
//! guest, in one run. `cargo xtask bench ring-guest` builds what it needs.
//!
//! | row | host's end | guest's end |
//! |---|---|---|
//! | records, guest polls | the bare ring | `ring-echo`, which never sleeps |
//! | vsock port | a tunnel to a plain vsock port | an echo on AF_VSOCK |
//! | tunnel | CONNECT through aditd | the agent, and a TCP echo behind it |

mod plot;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_benches::report::{Better, Figure, median};
use adit_ringbuf::session::{self, Event};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::blocking::{Receiver, Sender};
use adit_ringbuf_io::ivshmem::Server;
use adit_tests::connect::connect;
use adit_tests::guest::{Guest, Identity, Ring};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use anyhow::Context;

const LIMIT: Duration = Duration::from_secs(60);
/// Round trips of 64 bytes one after the other; and with a pause between them, so that whoever waits has gone to sleep.
const ROUNDS: usize = 1000;
const IDLE_ROUNDS: usize = 300;
const PAUSE: Duration = Duration::from_millis(1);
const BULK: usize = 64 << 10;
const BULK_ROUNDS: usize = 256;
const BYTES: usize = 8 << 20;
/// The lane that `ring-echo` sends back.
const LANE: usize = 1;
/// Bytes of a message of the plot, and round trips of each.
pub const SIZES: [usize; 6] = [64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10];
const SIZE_ROUNDS: usize = 100;

/// What one way there and back was measured to do.
pub struct Row {
    /// How it goes, for people.
    pub name: &'static str,
    /// Round trips of 64 bytes, us: one after the other, and with a pause.
    rtt_us: Vec<f64>,
    idle_us: Vec<f64>,
    /// 64 KiB pieces there and back, MiB/s.
    bulk_mib_s: f64,
    /// Middle round trip of a message of each of [`SIZES`], us.
    pub sizes_us: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let json = std::env::args().any(|a| a == "--json");
    let Some(bins) = after("--binaries").map(PathBuf::from) else {
        eprintln!("skipped: no --binaries; `cargo xtask bench ring-guest` builds them");
        return Ok(());
    };
    let image = Image::build(Kernel::V6_1, &|what| eprintln!("{what}"))?;
    let [polling, port] = bare(&image, &bins)?;
    let [tunnel, _] = tunnels(&image, &bins, None)?;
    let [byte, _] = tunnels(&image, &bins, Some(false))?;
    // A machine with an IOMMU, emulated, is a slower one: it has its own vsock beside it.
    let [msix, msix_port] = tunnels(&image, &bins, Some(true))?;
    let rows = [polling, port, tunnel, byte, msix, msix_port];
    for row in &rows {
        for (what, unit, better, values) in [
            ("64 B", "us", Better::Lower, &row.rtt_us),
            ("64 B, asleep in between", "us", Better::Lower, &row.idle_us),
            ("64 KiB", "MiB/s", Better::Higher, &vec![row.bulk_mib_s]),
        ] {
            Figure::alone(format!("{}: {what}", row.name), unit, better, values).print(json);
        }
    }
    let [polling, port, tunnel, byte, msix, msix_port] = &rows;
    let less = |name: &str, a: &[f64], b: &[f64], must, aim| {
        let figure = Figure::alone(name, "us", Better::Lower, a);
        figure.beside("vsock", b, must, aim).print(json);
    };
    less("polling, 64 B", &polling.rtt_us, &port.rtt_us, 0.05, 0.01);
    less(
        "idle, MSI-X, 64 B",
        &msix.idle_us,
        &msix_port.idle_us,
        0.5,
        0.3,
    );
    less(
        "idle, a byte over vsock, 64 B",
        &byte.idle_us,
        &tunnel.idle_us,
        1.0,
        0.3,
    );
    let more = |name: &str, a: &Row, b: &Row, must, aim| {
        let figure = Figure::alone(name, "MiB/s", Better::Higher, &[a.bulk_mib_s]);
        figure
            .beside("vsock", &[b.bulk_mib_s], must, aim)
            .print(json);
    };
    more("polling, 64 KiB", polling, port, 8.0, 20.0);
    more("tunnel, a byte over vsock, 64 KiB", byte, tunnel, 2.0, 5.0);
    more("tunnel, MSI-X, 64 KiB", msix, msix_port, 2.0, 5.0);
    if let Some(path) = after("--plot") {
        match plot::draw(&rows, &path) {
            Ok(()) => eprintln!("plot over sizes: {path}"),
            Err(e) => eprintln!("no plot: {path}: {e}"),
        }
    }
    Ok(())
}

/// The word behind another one on the command line.
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

/// A guest whose ring is echoed by a program that polls, and its vsock.
fn bare(image: &Image, bins: &Path) -> anyhow::Result<[Row; 2]> {
    let host = Host::start(bins, &["web-1"])?;
    host.wait_port("web-1")?;
    let socket = host.dir().join("bench.sock");
    let mut server = Server::new(UnixListener::bind(&socket)?, BYTES)?;
    let vhost = host.vhost_socket("web-1");
    let script = "adit-testguest ring-echo > /dev/console 2>&1 &\n";
    let ring = Ring {
        socket: &socket,
        iommu: false,
        parameters: "",
    };
    let who = identity(&vhost, None, script);
    let mut guest = Guest::boot_with(image, &who, Some(ring), &host.dir().join("web-1"))?;
    let given = wait_for("QEMU", LIMIT, || Ok(server.accept()?))?;
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let spec = adit_channel::ring::spec(BYTES).context("room for a region")?;
    let mut session = session::Host::offer(given.memory.clone(), spec, epoch)?;
    guest.wait_ready(LIMIT)?;
    wait_for("the guest attaches", LIMIT, || {
        let attached = matches!(session.poll().event, Some(Event::Attached { .. }));
        Ok(attached.then_some(()))
    })?;
    let ends = session.ends(LANE, true)?;
    let bells = given.bells.try_clone()?;
    let mut to = Sender::new(
        ends.producer,
        bells.guest_data,
        bells.host_space,
        Spin::default(),
    );
    let mut from = Receiver::new(
        ends.consumer,
        bells.guest_space,
        bells.host_data,
        Spin::default(),
    );
    let (piece, mut back) = (vec![0x5a; BULK], vec![0; BULK]);
    let polling = measure("records, guest polls", |len, count| {
        // As many on the way as the ring has room for, without ever waiting for a reader that waits for us.
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
    let port = over(
        "vsock port",
        &connect(host.proxy(), "vsock-5000.web-1:5000")?,
    )?;
    drop(guest);
    Ok([polling, port])
}

/// A tunnel to the agent's TCP echo; with a ring, behind an IOMMU or not, or without one. And a plain vsock port of the same
/// guest, without the agent.
fn tunnels(image: &Image, bins: &Path, iommu: Option<bool>) -> anyhow::Result<[Row; 2]> {
    let host = Host::start_with(bins, &["web-1"], "ivshmem_mib = 8")?;
    host.wait_port("web-1")?;
    let (vhost, server) = (host.vhost_socket("web-1"), host.ivshmem_socket("web-1"));
    let agent = adit_tests::guest_bin("adit-guest");
    let who = identity(&vhost, Some(&agent), "");
    let ring = iommu.map(|iommu| Ring {
        socket: &server,
        iommu,
        parameters: "",
    });
    let mut guest = Guest::boot_with(image, &who, ring, &host.dir().join("web-1"))?;
    guest.wait_ready(LIMIT)?;
    let wanted = if iommu.is_some() { "ring" } else { "vsock" };
    host.adit(&["wait", "web-1", "--for", "agent", "--timeout", "60s"])?;
    wait_for(wanted, LIMIT, || {
        let out = host.adit(&["vm", "show", "web-1", "-o", "json"])?;
        let vm: serde_json::Value = serde_json::from_slice(&out.stdout)?;
        Ok((vm["carrier"]["kind"] == wanted).then_some(()))
    })?;
    let (name, port) = match iommu {
        None => ("tunnel, vsock", "vsock port, with an agent"),
        Some(false) => ("tunnel, ring, a byte over vsock", "vsock port, with a ring"),
        Some(true) => ("tunnel, ring, MSI-X (q35)", "vsock port (q35)"),
    };
    let tunnel = over(name, &connect(host.proxy(), "web-1:7")?)?;
    let plain = over(port, &connect(host.proxy(), "vsock-5000.web-1:5000")?)?;
    Ok([tunnel, plain])
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
        // Both ways at once, as an echo needs it.
        std::thread::scope(|scope| {
            let sending =
                scope.spawn(|| (0..count).try_for_each(|_| { stream }.write_all(&piece[..len])));
            let read = (0..count).try_for_each(|_| { stream }.read_exact(&mut back[..len]));
            sending.join().ok().context("the sender panicked")??;
            Ok(read?)
        })
    })
}

/// `go(len, count)`: so many pieces of that length there and back.
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
