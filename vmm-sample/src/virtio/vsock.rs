//! adit's virtio-vsock device in this process, on a thread of its own: registers are written on vCPU threads and carried out
//! there, between two bursts (`adit_channel::linked`). What is above the engine is the owner's choice: sockets
//! (`adit_channel::hybrid`), or aditd, for which this process is then the VM's port process (`adit_port::vmm`).

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

/// Entries of each queue at most.
const QUEUE: u16 = 256;
const _: () = assert!(QUEUE <= QUEUE_MAX);

/// The carrier that is given to a shard, or to whoever has one.
type Linked = linked::Linked<Memory>;

/// Who has the host's ends of the streams.
#[derive(Debug)]
pub enum Owner {
    /// Whoever connects to this socket; nobody, without one.
    Sockets(Option<PathBuf>),
    /// aditd; and where the VM's ring comes out, if it has one.
    Aditd(Registration, Option<RingInbox>),
}

/// The device's face towards the transport.
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
    /// Makes the device of the guest `cid`, and its thread.
    ///
    /// # Errors
    /// The owner's sockets cannot be made, or there are no descriptors to be had.
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
                Box::new(|| eprintln!("adit-vmm: vsock ends: {}", host.run()))
            }
            Owner::Aditd(registration, rings) => {
                let handed = Handed::new(carrier, &registration, rings)?;
                Box::new(|| match handed.run() {
                    Ok(()) => eprintln!("adit-vmm: aditd has let the VM go: it has no channel now"),
                    Err(e) => eprintln!("adit-vmm: vsock ends: {e:#}"),
                })
            }
        };
        let filters = filters.clone();
        std::thread::Builder::new()
            .name("vsock".to_owned())
            .spawn(move || match filters.apply(kind) {
                Ok(()) => run(),
                Err(e) => eprintln!("adit-vmm: no vsock: {e:#}"),
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
            "the saved vsock device and its driver disagree: the guest had broken it, and must reset it first"
        );
        let Some(with) = with else { return Ok(()) };
        let restore =
            move |linked: &mut Linked| linked.restore(&state, with.memory, with.interrupt);
        Ok(self.remote.ask(restore)??)
    }

    fn reset(&mut self) {
        // No thread any more: it touches nothing.
        let _ = self.remote.ask(Linked::reset);
    }
}
