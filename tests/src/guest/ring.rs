//! `ring-echo`: only the guest's side of the ring. `ring-poison`: a process that breaks the ring while another one uses it.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use adit_guest_driver::ring::{self, Interrupt};
use adit_ringbuf::RingMem;
use adit_ringbuf::region::{Features, GUEST_WORD};
use adit_ringbuf::session::{Event, Guest};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::blocking::{Error, Receiver, Sender};
use adit_ringbuf_io::doorbell::Doorbell;
use anyhow::Context;
use vsock::VsockListener;

/// The lane of the echo.
const LANE: usize = 1;
/// How long the host may take to answer.
const LIMIT: Duration = Duration::from_secs(30);
/// How often it checks the session: without a doorbell, and with one. Frequent checks write an emulated timer before each wait,
/// and a measurement of a sleeping guest would then measure that.
const LOOK: Duration = Duration::from_millis(100);
const RUNG_LOOK: Duration = Duration::from_secs(5);

pub fn echo(port: Option<u32>) -> anyhow::Result<()> {
    let mut device = ring::find(&mut String::new()).context("no ring")?;
    if let Some(port) = port {
        let listener = VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, port)?;
        println!("RING-LISTENS");
        let (stream, _) = listener.accept()?;
        // The stream stays open to the end of this program.
        let _ = device.use_stream(OwnedFd::from(stream).into())?;
    }
    let (hears, look) = match device.data_interrupt {
        Interrupt::Event(_) => ("msix", RUNG_LOOK),
        Interrupt::Line(_) => ("intx", RUNG_LOOK),
        Interrupt::Stream(..) => ("vsock", RUNG_LOOK),
        Interrupt::Polled => ("polling", LOOK),
    };
    let nonce = adit_guest_driver::facts::boot_nonce();
    let start = u64::from_ne_bytes(std::array::from_fn(|n| nonce[n]));
    let mut guest = Guest::find(device.memory.clone(), start, Features::NONE)?;
    let _ = guest.attach();
    device.data.ring()?;
    let begin = Instant::now();
    let epoch = loop {
        if let Some(Event::Attached { epoch, .. }) = guest.poll()?.event {
            break epoch;
        }
        anyhow::ensure!(begin.elapsed() < LIMIT, "the host does not answer");
        thread::sleep(Duration::from_millis(1));
    };
    device.data.ring()?;
    println!(
        "RING-ATTACHED by={} hears={hears} epoch={epoch}",
        device.access
    );
    let ends = guest.ends(LANE, true)?.context("not attached")?;
    let (data, space) = (device.data.clone(), device.space.clone());
    let mut to = Sender::new(ends.producer, data, device.space_interrupt, Spin::default());
    let mut from = Receiver::new(ends.consumer, space, device.data_interrupt, Spin::default());
    let mut record = vec![0; 256 << 10];
    loop {
        match from.recv_within(&mut record, look) {
            Ok(len) => to.send(&record[..len])?,
            Err(Error::TimedOut) => {
                if let Some(Event::Lost(why)) = guest.poll()?.event {
                    println!("RING-LOST {why:?}");
                    return Ok(());
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
}

pub fn poison(port: u32) -> anyhow::Result<()> {
    let listener = VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, port)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut times = [0];
        stream.read_exact(&mut times)?;
        let device = ring::find(&mut String::new()).context("no ring")?;
        for _ in 0..times[0] {
            // No guest writes this state, so the host must reject it, whatever the agent writes.
            device.memory.store(GUEST_WORD, u64::MAX);
            device.data.ring()?;
            thread::sleep(Duration::from_millis(5));
        }
        stream.write_all(&times)?;
    }
    Ok(())
}
