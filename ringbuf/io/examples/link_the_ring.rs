//! The whole of linking the ring into a VMM: a region in memory that the guest sees, a session, an echo.
//! `cargo run -p adit-ringbuf-io --example link_the_ring` starts `guest_side` as its guest, in a process of its own.
//!
//! What your VMM has already: guest memory and a way to show the guest a piece of it (a PCI BAR, ivshmem, virtio-pmem). Here
//! the guest polls. One that sleeps has doorbells: give `irqfd`s as `guest_data` and `guest_space`, `ioeventfd`s as
//! `host_data` and `host_space` ([`adit_ringbuf_io::attach::Bells`]), and the ends those instead of [`Polled`]; poll the
//! session when `host_data` rang, and ring `guest_data` where [`Turn::wake`](adit_ringbuf::session::Turn) says so.

use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_ringbuf::Mapped;
use adit_ringbuf::region::Spec;
use adit_ringbuf::session::{Event, Host, State};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::blocking::{Error, Receiver, Sender};
use adit_ringbuf_io::doorbell::Polled;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Two lanes, so that bulk on the one never stands in the way of the other.
    let spec = Spec::uniform(2, 256 << 10);
    let (memory, fd) = Mapped::memfd(spec.bytes())?;

    // Every offer is a new epoch. The time is above every one that this memory may have had.
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut host = Host::offer(memory, spec, epoch)?;

    let region = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    let beside = std::env::current_exe()?.with_file_name("guest_side");
    let mut guest = Command::new(beside).arg(region).spawn()?;

    // Once for every guest that comes: it may restart as often as it likes. The ends are made once a session.
    let mut ends = None;
    let status = loop {
        let gone = guest.try_wait()?;
        match (host.poll().event, gone, &mut ends) {
            (Some(Event::Attached { epoch, .. }), ..) => {
                println!("attached, epoch {epoch}");
                let made = host.ends(0, true)?;
                let from = Receiver::new(made.consumer, Polled, Polled, Spin::default());
                let to = Sender::new(made.producer, Polled, Polled, Spin::default());
                ends = Some((from, to));
            }
            (Some(Event::Lost(why)), ..) => {
                println!("lost: {why:?}");
                ends = None;
            }
            (None, Some(status), _) => break status,
            (None, None, Some(ends)) if host.state() == State::Run => serve(&mut host, ends)?,
            (None, None, _) => std::thread::yield_now(),
        }
    };
    assert!(status.success(), "guest_side: {status}");
    Ok(())
}

type Ends = (
    Receiver<Mapped, Polled, Polled>,
    Sender<Mapped, Polled, Polled>,
);

/// Sends back what comes, until the guest says nothing for a while.
fn serve(host: &mut Host<Mapped>, (from, to): &mut Ends) -> Result<(), Box<dyn std::error::Error>> {
    let mut record = vec![0; 64 << 10];
    loop {
        match from.recv_within(&mut record, Duration::from_millis(20)) {
            Ok(len) => to.send(&record[..len])?,
            Err(Error::TimedOut) => return Ok(()), // it may have closed: look at the session
            // The guest lied. Nothing of it is believed any more; it may attach again.
            Err(Error::Corrupt(corrupt)) => {
                println!("poisoned: {corrupt}");
                let _ = host.poison();
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        }
    }
}
