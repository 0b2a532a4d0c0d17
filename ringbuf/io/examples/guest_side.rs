//! The guest's side of `link_the_ring`: `guest_side FILE` maps the region in the file, attaches, and sends some
//! records that the host echoes. In a VM the file is the BAR: `/sys/bus/pci/devices/0000:00:04.0/resource2`. This
//! example polls. A guest that waits for interrupts gives its ends a [`Waiter`](adit_ringbuf_io::doorbell::Waiter) on
//! the descriptor of vfio or uio.
#![allow(unsafe_code)] // maps the memory of a device

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;
use adit_ringbuf::session::{Event, Guest};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::blocking::{Receiver, Sender};
use adit_ringbuf_io::doorbell::Polled;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: guest_side FILE")?;
    let memory = map(&path)?;

    // First request number: different from the number of any earlier guest in this memory.
    let start = std::process::id().into();
    let mut guest = Guest::find(memory, start, Features::NONE)?;
    let _ = guest.attach(); // the host polls; with a doorbell, signal it here
    let epoch = loop {
        if let Some(Event::Attached { epoch, .. }) = guest.poll()?.event {
            break epoch;
        }
        std::thread::yield_now();
    };

    let ends = guest.ends(0, true)?.ok_or("not attached")?;
    let mut to = Sender::new(ends.producer, Polled, Polled, Spin::default());
    let mut from = Receiver::new(ends.consumer, Polled, Polled, Spin::default());
    let (limit, mut buf) = (Duration::from_secs(5), [0; 1024]);
    for n in 0..10_000usize {
        let record = vec![n as u8; n % 1000];
        to.send_within(&record, limit)?;
        let len = from.recv_within(&mut buf, limit)?;
        assert_eq!(buf[..len], record, "record {n}");
    }
    println!("10000 records echoed, epoch {epoch}");
    let _ = guest.close();
    Ok(())
}

/// Maps the whole memory of a device.
fn map(path: &str) -> Result<Mapped, Box<dyn std::error::Error>> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let len = usize::try_from(file.metadata()?.len())?;
    let bytes = NonZeroUsize::new(len).ok_or("the file is empty")?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let base = unsafe { mmap(None, bytes, prot, MapFlags::MAP_SHARED, &file, 0)? };
    // SAFETY: the mapping lives as long as this process, and a device's memory does not shrink.
    Ok(unsafe { Mapped::from_raw(base.cast(), len, Arc::new(file)) })
}
