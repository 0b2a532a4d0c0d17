//! A disk (virtio 1.3 §5.2) on a file: read, write, flush, serial number. One thread handles all requests, one after the other.
//!
//! ```text
//! chain: header (16 bytes, read) │ data (read or written) │ status (1 byte, written)
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use nix::fcntl::{Flock, FlockArg};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, Device, Interrupt, Memory};
use crate::bus::lock;
use crate::seccomp::{Filters, Thread};

const SECTOR: u64 = 512;
const QUEUE: u16 = 256;
/// Data of one request at most. The chain alone is no limit: the same page may be in every descriptor.
const REQUEST_MAX: usize = 8 << 20;
/// Bytes that are copied at a time.
const PIECE: usize = 64 << 10;
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_SEG_MAX;
const SERIAL: &[u8] = b"adit-vmm-disk";

/// The state of the disk's thread.
pub struct Disk {
    file: Flock<File>,
    sectors: u64,
    kick: EventFd,
    active: Option<Active>,
    held: bool,
    buffer: Vec<u8>,
}

struct Active {
    memory: Memory,
    queue: Queue,
    interrupt: Arc<Interrupt>,
}

/// The disk as the transport sees it.
pub struct Block {
    disk: Arc<Mutex<Disk>>,
    kick: EventFd,
    sectors: u64,
}

impl Block {
    /// Opens a disk and starts its thread.
    ///
    /// # Errors
    /// The file cannot be opened, is not a disk, or another process uses it.
    pub fn open(path: &Path, filters: &Filters) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| {
                format!(
                    "cannot open disk {}: name a file that can be written",
                    path.display()
                )
            })?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
            anyhow::anyhow!("disk {} is in use by another VM: {e}", path.display())
        })?;
        let len = file.seek(SeekFrom::End(0))?;
        anyhow::ensure!(
            len.is_multiple_of(SECTOR),
            "disk {} does not consist of whole sectors of 512 bytes",
            path.display()
        );
        let kick = EventFd::new(EFD_NONBLOCK)?;
        let disk = Arc::new(Mutex::new(Disk {
            file,
            sectors: len / SECTOR,
            kick: kick.try_clone()?,
            active: None,
            held: false,
            buffer: vec![0; PIECE],
        }));
        let mut events = EventManager::<Arc<Mutex<Disk>>>::new()?;
        events.add_subscriber(disk.clone());
        let filters = filters.clone();
        // The thread ends with the process. That loses nothing: a write is in the page cache before the guest gets its answer.
        std::thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || {
                if let Err(e) = filters.apply(Thread::Disk) {
                    return adit_print::note!("adit-vmm: the disk cannot be used: {e:#}");
                }
                while let Ok(_) | Err(event_manager::Error::Epoll(_)) = events.run() {}
            })?;
        Ok(Self {
            disk,
            kick,
            sectors: len / SECTOR,
        })
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE]
    }

    fn kicks(&self) -> Vec<&EventFd> {
        vec![&self.kick]
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_blk_config: capacity, size_max, seg_max (all but header and status).
        let seg_max = u64::from(QUEUE - 2) << 32;
        [self.sectors.to_le_bytes(), seg_max.to_le_bytes()].concat()
    }

    fn activate(&mut self, with: Activation) -> anyhow::Result<()> {
        let [queue] = <[Queue; 1]>::try_from(with.queues)
            .map_err(|_| anyhow::anyhow!("a disk has one queue"))?;
        anyhow::ensure!(
            queue.is_valid(&*with.memory),
            "the queue is not in the guest's memory"
        );
        lock(&self.disk).active = Some(Active {
            memory: with.memory,
            queue,
            interrupt: with.interrupt,
        });
        Ok(())
    }

    fn pause(&mut self) -> anyhow::Result<Vec<u8>> {
        // The lock is free between two requests only, so every chain that was read has been returned.
        let mut disk = lock(&self.disk);
        disk.held = true;
        disk.file.sync_data()?;
        let position = disk.active.as_ref().map(|a| a.queue.next_avail());
        Ok(position.unwrap_or(0).to_le_bytes().into())
    }

    fn resume(&mut self) {
        lock(&self.disk).held = false;
        // Notifications of the meantime were ignored.
        let _ = self.kick.write(1);
    }

    fn restore(&mut self, state: &[u8], with: Option<Activation>) -> anyhow::Result<()> {
        let state = <[u8; 2]>::try_from(state).context("the saved state is not a disk's")?;
        let position = u16::from_le_bytes(state);
        let Some(mut with) = with else { return Ok(()) };
        for queue in &mut with.queues {
            queue.set_next_avail(position);
            queue.set_next_used(position);
        }
        self.activate(with)
    }

    fn reset(&mut self) {
        lock(&self.disk).active = None;
    }
}

impl MutEventSubscriber for Disk {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new_raw(self.kick.as_raw_fd(), EventSet::IN)) {
            adit_print::note!("adit-vmm: disk: {e}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // It is nonblocking, and empty if a reset drained it.
        let _ = self.kick.read();
        if self.held {
            return;
        }
        let Some(mut active) = self.active.take() else {
            return;
        };
        match self.serve(&mut active) {
            Ok(()) => self.active = Some(active),
            Err(e) => {
                adit_print::note!("adit-vmm: the disk stops until the guest resets it: {e:#}")
            }
        }
    }
}

impl Disk {
    fn serve(&mut self, active: &mut Active) -> anyhow::Result<()> {
        let memory = active.memory.clone();
        let mut left = active.queue.size();
        loop {
            active.queue.disable_notification(&*memory)?;
            while let Some(chain) = active.queue.iter(&*memory)?.next() {
                let head = chain.head_index();
                let written = self.request(&memory, chain).unwrap_or(0);
                active.queue.add_used(&*memory, head, written)?;
                left -= 1;
                if left == 0 {
                    // Return after one queue's worth of requests, so that a reset or the VM's end need not wait longer.
                    self.kick.write(1)?;
                    break;
                }
            }
            if active.queue.needs_notification(&*memory)? {
                active.interrupt.used();
            }
            if left == 0 || !active.queue.enable_notification(&*memory)? {
                return Ok(());
            }
        }
    }

    /// Handles one request. Returns how many bytes were written to the guest. Fails if the chain has no room for a status.
    fn request(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> anyhow::Result<u32> {
        let mut reader = chain.clone().reader(memory)?;
        let mut writer = chain.writer(memory)?;
        let room = writer.available_bytes();
        let mut status = writer.split_at(room.checked_sub(1).context("no status")?)?;
        let kind: u32 = reader.read_obj()?;
        let _reserved: u32 = reader.read_obj()?;
        let sector: u64 = reader.read_obj()?;
        let outcome = match kind {
            VIRTIO_BLK_T_IN => self.copy_out(sector, &mut writer),
            VIRTIO_BLK_T_OUT => self.copy_in(sector, &mut reader),
            VIRTIO_BLK_T_FLUSH => self.file.sync_data(),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id[..SERIAL.len()].copy_from_slice(SERIAL);
                let n = writer.available_bytes().min(id.len());
                writer.write_all(&id[..n])
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        let code = match outcome {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(e) if e.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        status.write_all(&[code as u8])?;
        // It fits: a chain's length was computed in 32 bits before.
        Ok((writer.bytes_written() + 1) as u32)
    }

    /// Checks that a request is within the disk, and seeks to it.
    fn seek(&mut self, sector: u64, bytes: usize) -> io::Result<()> {
        let end = sector.checked_add(bytes as u64 / SECTOR);
        let inside = end.is_some_and(|end| end <= self.sectors);
        if !inside || bytes > REQUEST_MAX || !(bytes as u64).is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.file.seek(SeekFrom::Start(sector * SECTOR)).map(drop)
    }

    fn copy_out(&mut self, sector: u64, to: &mut Writer<'_>) -> io::Result<()> {
        let mut left = to.available_bytes();
        self.seek(sector, left)?;
        while left > 0 {
            let piece = &mut self.buffer[..left.min(PIECE)];
            io::Read::read_exact(&mut *self.file, piece)?;
            to.write_all(piece)?;
            left -= piece.len();
        }
        Ok(())
    }

    fn copy_in(&mut self, sector: u64, from: &mut Reader<'_>) -> io::Result<()> {
        let mut left = from.available_bytes();
        self.seek(sector, left)?;
        while left > 0 {
            let piece = &mut self.buffer[..left.min(PIECE)];
            io::Read::read_exact(from, piece)?;
            self.file.write_all(piece)?;
            left -= piece.len();
        }
        Ok(())
    }
}
