//! `cargo xtask bench ring-guest`: a real guest's ring beside the vsock of the same guest, in one run.
//!
//! | row | host's end | guest's end |
//! |---|---|---|
//! | echo of records, polling | the bare ring | `ring-echo`, which never sleeps |
//! | vsock | a tunnel to a plain vsock port | an echo on AF_VSOCK |
//! | tunnel | CONNECT through aditd | the agent, and a TCP echo behind it |

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_ringbuf::session::{self, Event};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::blocking::{Receiver, Sender};
use adit_ringbuf_io::ivshmem::{Server, spec};
use adit_tests::connect::connect;
use adit_tests::guest::{Guest, Identity, Ring};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use anyhow::Context;

use crate::{progress, setup};

const LIMIT: Duration = Duration::from_secs(60);
const ROUNDS: usize = 1000;
/// With a pause between them, so that whoever waits has gone to sleep.
const IDLE_ROUNDS: usize = 300;
const PAUSE: Duration = Duration::from_millis(1);
const BULK: usize = 64 << 10;
const BULK_ROUNDS: usize = 256;
const BYTES: usize = 8 << 20;
/// The lane that `ring-echo` sends back.
const LANE: usize = 1;

/// What one way there and back was measured to do.
struct Figures {
    /// Middle round trips of 64 bytes, us: one after the other, and with a pause.
    rtt_us: f64,
    idle_us: f64,
    /// 64 KiB pieces there and back, MiB/s.
    bulk_mib_s: f64,
}

pub fn run(json: bool) -> anyhow::Result<()> {
    setup::run()?;
    setup::guest_binaries()?;
    let bins = setup::host_binaries(true)?;
    let image = Image::build(Kernel::V6_1, &|what| progress::line(what))?;
    let show = |row: &str, f: &Figures| {
        let Figures {
            rtt_us,
            idle_us,
            bulk_mib_s,
        } = f;
        match json {
            true => println!(
                "{{\"row\":\"{row}\",\"rtt_us\":{rtt_us:.1},\"idle_us\":{idle_us:.1},\"bulk_mib_s\":{bulk_mib_s:.1}}}"
            ),
            false => println!(
                "{row:<44} 64 B {rtt_us:>9.1} us   idle {idle_us:>9.1} us   64 KiB {bulk_mib_s:>8.1} MiB/s"
            ),
        }
    };
    let (polling, plain) = bare(&image, &bins)?;
    show("records over the ring, guest polls", &polling);
    show("plain vsock port of the same guest", &plain);
    let vsock = tunnel(&image, &bins, None)?;
    let (vsock, _) = vsock;
    show("tunnel to the agent, vsock", &vsock);
    let (byte, _) = tunnel(&image, &bins, Some(false))?;
    show("tunnel to the agent, ring, byte over vsock", &byte);
    // A machine with an IOMMU, emulated, is a slower one: it has its own vsock beside it.
    let (msix, msix_plain) = tunnel(&image, &bins, Some(true))?;
    show("tunnel to the agent, ring, MSI-X", &msix);
    show("plain vsock port of the same guest, q35", &msix_plain);
    for (what, a, b, most) in [
        ("polling RTT to vsock's", polling.rtt_us, plain.rtt_us, 0.05),
        (
            "idle RTT, MSI-X, to vsock's",
            msix.idle_us,
            msix_plain.idle_us,
            0.5,
        ),
        (
            "idle RTT, byte, to vsock's",
            byte.idle_us,
            vsock.idle_us,
            1.0,
        ),
    ] {
        ratio(json, what, a / b, most, "at most");
    }
    for (what, a, b, least) in [
        ("bulk to vsock's", polling.bulk_mib_s, plain.bulk_mib_s, 8.0),
        (
            "tunnel, 64 KiB, byte, to vsock's",
            byte.bulk_mib_s,
            vsock.bulk_mib_s,
            2.0,
        ),
        (
            "tunnel, 64 KiB, MSI-X, to vsock's",
            msix.bulk_mib_s,
            msix_plain.bulk_mib_s,
            2.0,
        ),
    ] {
        ratio(json, what, a / b, least, "at least");
    }
    Ok(())
}

fn ratio(json: bool, what: &str, ratio: f64, wanted: f64, how: &str) {
    match json {
        true => println!("{{\"ratio\":\"{what}\",\"is\":{ratio:.3},\"{how}\":{wanted}}}"),
        false => println!("{what:<44} {ratio:.3}x   ({how} {wanted}x)"),
    }
}

fn identity<'a>(host: &'a Host, socket: &'a std::path::Path, script: &'a str) -> Identity<'a> {
    let _ = host;
    Identity {
        name: "web-1",
        vhost_socket: socket,
        agent: None,
        trust: None,
        script,
        boot_files: false,
    }
}

/// A guest whose ring is echoed by a program that polls, and its vsock.
fn bare(image: &Image, bins: &std::path::Path) -> anyhow::Result<(Figures, Figures)> {
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
    let who = identity(&host, &vhost, script);
    let mut guest = Guest::boot_with(image, &who, Some(ring), &host.dir().join("web-1"))?;
    let given = wait_for("QEMU", LIMIT, || Ok(server.accept()?))?;
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut session = session::Host::offer(given.memory.clone(), spec(BYTES)?, epoch)?;
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
    let polling = measure(|len, count| {
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
    let plain = over(&connect(host.proxy(), "vsock-5000.web-1:5000")?)?;
    drop(guest);
    Ok((polling, plain))
}

/// A tunnel to the agent's TCP echo; with a ring, behind an IOMMU or not, or without one.
/// And a plain vsock port of the same guest, without the agent.
fn tunnel(
    image: &Image,
    bins: &std::path::Path,
    iommu: Option<bool>,
) -> anyhow::Result<(Figures, Figures)> {
    let host = Host::start_with(bins, &["web-1"], "ivshmem_mib = 8")?;
    host.wait_port("web-1")?;
    let (vhost, server) = (host.vhost_socket("web-1"), host.ivshmem_socket("web-1"));
    let agent = adit_tests::guest_bin("adit-guest");
    let who = Identity {
        agent: Some(&agent),
        ..identity(&host, &vhost, "")
    };
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
    let tunnel = over(&connect(host.proxy(), "web-1:7")?)?;
    let plain = over(&connect(host.proxy(), "vsock-5000.web-1:5000")?)?;
    Ok((tunnel, plain))
}

fn over(stream: &TcpStream) -> anyhow::Result<Figures> {
    stream.set_nodelay(true)?;
    let piece = vec![0x5a; BULK];
    let mut back = vec![0; BULK];
    measure(|len, count| {
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
fn measure(mut go: impl FnMut(usize, usize) -> anyhow::Result<()>) -> anyhow::Result<Figures> {
    go(64, 100)?;
    let mut round_trips = |count: usize, pause: Duration| -> anyhow::Result<f64> {
        let mut took = Vec::with_capacity(count);
        for _ in 0..count {
            std::thread::sleep(pause);
            let begin = Instant::now();
            go(64, 1)?;
            took.push(begin.elapsed());
        }
        took.sort_unstable();
        Ok(took[count / 2].as_nanos() as f64 / 1000.0)
    };
    let rtt_us = round_trips(ROUNDS, Duration::ZERO)?;
    let idle_us = round_trips(IDLE_ROUNDS, PAUSE)?;
    let begin = Instant::now();
    go(BULK, BULK_ROUNDS)?;
    let mib = (BULK * BULK_ROUNDS) as f64 / f64::from(1 << 20);
    let bulk_mib_s = mib / begin.elapsed().as_secs_f64();
    Ok(Figures {
        rtt_us,
        idle_us,
        bulk_mib_s,
    })
}
