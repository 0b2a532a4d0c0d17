//! adit's virtio-vsock device in this process, on a thread of its own. The vCPU threads handle register writes and send the
//! effects to that thread, which applies them between two bursts (`adit_channel::linked`). The owner chooses what is above the
//! engine: Unix sockets (`adit_channel::hybrid`), or aditd. With aditd this process is the VM's port process (`adit_port::vmm`).

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use adit_channel::device::{DeviceState, FEATURES, GuestCid, QUEUE_MAX, Signal, VsockDevice};
use adit_channel::hybrid::Host;
use adit_channel::linked::{self, Held, Remote};
use adit_port::rings::RingInbox;
use adit_port::vmm::{Handed, Registration};
use adit_ringbuf_io::doorbell::borrow;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, Device, Interrupt, Memory};
use crate::seccomp::{Filters, Thread};

/// Largest size of each queue, in entries.
const QUEUE: u16 = 256;
const _: () = assert!(QUEUE <= QUEUE_MAX);

/// The carrier that a shard gets.
type Linked = linked::Linked<Memory>;

/// Who uses the host's ends of the streams.
#[derive(Debug)]
pub enum Owner {
    /// Whoever connects to this Unix socket. `None`: nobody.
    Sockets(Option<PathBuf>),
    /// aditd. The inbox is where the VM's ring arrives, if it has one.
    Aditd(Registration, Option<RingInbox>),
}

/// The device as the transport sees it.
pub struct Vsock {
    cid: GuestCid,
    /// RX, TX, events.
    kicks: [EventFd; 3],
    remote: Remote<Memory>,
    held: Option<Held>,
}

impl Signal for Interrupt {
    fn signal(&self, _queue: u16) {
        self.used();
    }

    fn is_shared(&self) -> bool {
        true
    }
}

impl Vsock {
    /// Makes the device of the guest `cid`, and starts its thread.
    ///
    /// # Errors
    /// The owner's sockets cannot be made, or no descriptors are left.
    pub fn new(cid: GuestCid, owner: Owner, filters: &Filters) -> anyhow::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK);
        let kicks = [event()?, event()?, event()?];
        let device = VsockDevice::new(cid, 1)?;
        let copy = |i: usize| borrow(&kicks[i]).try_clone_to_owned();
        let (carrier, remote) = linked::link(device, [copy(0)?, copy(1)?, copy(2)?])?;
        let kind = match owner {
            Owner::Sockets(Some(_)) => Thread::Hybrid,
            Owner::Sockets(None) | Owner::Aditd(..) => Thread::Vsock,
        };
        let run: Box<dyn FnOnce() + Send> = match owner {
            Owner::Sockets(uds) => {
                let mut seed = [0; 8];
                File::open("/dev/urandom")?.read_exact(&mut seed)?;
                let host = Host::new(carrier, uds.as_deref(), u64::from_le_bytes(seed))?;
                Box::new(|| adit_print::note!("adit-vmm: the vsock device ends: {}", host.run()))
            }
            Owner::Aditd(registration, rings) => {
                let handed = Handed::new(carrier, &registration, rings)?;
                Box::new(|| match handed.run() {
                    Ok(()) => {
                        adit_print::note!(
                            "adit-vmm: aditd removed the VM: the guest has no channel now"
                        )
                    }
                    Err(e) => adit_print::note!("adit-vmm: the vsock device ends: {e:#}"),
                })
            }
        };
        let filters = filters.clone();
        std::thread::Builder::new()
            .name("vsock".to_owned())
            .spawn(move || match filters.apply(kind) {
                Ok(()) => run(),
                Err(e) => adit_print::note!("adit-vmm: the vsock device cannot be used: {e:#}"),
            })?;
        Ok(Self {
            cid,
            kicks,
            remote,
            held: None,
        })
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE; 3]
    }

    fn kicks(&self) -> Vec<&EventFd> {
        self.kicks.iter().collect()
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_vsock_config.
        self.cid.get().to_le_bytes().into()
    }

    fn activate(&mut self, with: Activation) -> anyhow::Result<()> {
        let queues = <[Queue; 3]>::try_from(with.queues)
            .map_err(|_| anyhow::anyhow!("a vsock device has three queues"))?;
        let (features, memory, irq) = (with.features, with.memory, with.interrupt);
        let activate = move |linked: &mut Linked| linked.activate(features, memory, queues, irq);
        Ok(self.remote.ask(activate)??)
    }

    fn pause(&mut self) -> anyhow::Result<Vec<u8>> {
        let (state, held) = self.remote.hold()?;
        self.held = Some(held);
        Ok(state.to_bytes().into())
    }

    fn resume(&mut self) {
        self.held = None;
    }

    fn restore(&mut self, state: &[u8], with: Option<Activation>) -> anyhow::Result<()> {
        let state = DeviceState::parse(state)?;
        anyhow::ensure!(
            state.has_session() == with.is_some(),
            "the saved vsock device had been broken by its guest, which must reset it before the VM is saved"
        );
        let Some(with) = with else { return Ok(()) };
        let restore =
            move |linked: &mut Linked| linked.restore(&state, with.memory, with.interrupt);
        Ok(self.remote.ask(restore)??)
    }

    fn reset(&mut self) {
        // An error means that the thread has ended, so nothing uses the queues.
        let _ = self.remote.ask(Linked::reset);
    }
}
