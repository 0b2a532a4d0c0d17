//! All steps to link the ring into a VMM: a region in memory that the guest sees, a session, an echo service. `cargo
//! run -p adit-ringbuf-io --example link_the_ring` starts `guest_side` as its guest, in a separate process.
//!
//! Your VMM already has guest memory and a way to show the guest a piece of it (a PCI BAR, ivshmem, virtio-pmem). In
//! this example the guest polls. A guest that sleeps needs doorbells: use `irqfd`s as `guest_data` and `guest_space`,
//! and `ioeventfd`s as `host_data` and `host_space` ([`adit_ringbuf_io::attach::Bells`]). Give them to the ends
//! instead of [`Polled`]. Poll the session when `host_data` was signalled, and signal `guest_data` when
//! [`Turn::wake`](adit_ringbuf::session::Turn) says so.

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
    // Two lanes, so that bulk data on one never delays the other.
    let spec = Spec::uniform(2, 256 << 10);
    let (memory, fd) = Mapped::memfd(spec.bytes())?;

    // Every offer needs a new epoch. The time is higher than every earlier epoch of this memory.
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut host = Host::offer(memory, spec, epoch)?;

    let region = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    let beside = std::env::current_exe()?.with_file_name("guest_side");
    let mut guest = Command::new(beside).arg(region).spawn()?;

    // The loop serves every session; the guest may restart as often as it likes. The ends are made once per session.
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

/// Sends back every record, until no record has arrived for a while.
fn serve(host: &mut Host<Mapped>, (from, to): &mut Ends) -> Result<(), Box<dyn std::error::Error>> {
    let mut record = vec![0; 64 << 10];
    loop {
        match from.recv_within(&mut record, Duration::from_millis(20)) {
            Ok(len) => to.send(&record[..len])?,
            Err(Error::TimedOut) => return Ok(()), // the guest may have closed: the caller polls the session
            // The guest broke the ring. Nothing from this session is trusted any more; the guest may attach again.
            Err(Error::Corrupt(corrupt)) => {
                println!("poisoned: {corrupt}");
                let _ = host.poison();
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        }
    }
}
