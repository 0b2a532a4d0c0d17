//! A virtio-vsock driver: posts RX buffers, sends packets of a chosen shape, takes packets.

use std::sync::Arc;

use adit_channel::device::{
    GuestCid, HEADER_BYTES, HOST_CID, RX_QUEUE, TX_QUEUE, VirtQueues, WireHeader,
};
use adit_engine::PacketHeader;
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

use crate::memory::{self, PAGE_BYTES, PAYLOAD_MAX, VmMemory};
use crate::queue::{Buffer, DriverQueue};

/// What the guest posts on the RX queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxShape {
    /// Linux 6.1: a header of 44 bytes and a page, two descriptors.
    HeaderAndPage,
    /// Linux 6.12: one buffer of a page, header included.
    OnePage,
}

/// How the driver behaves.
#[derive(Clone, Copy, Debug)]
pub struct DriverConfig {
    /// Size of both queues.
    pub queue_size: u16,
    /// Shape of RX buffers.
    pub rx: RxShape,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// TX chains of more than one buffer use an indirect table.
    pub indirect: bool,
}

impl DriverConfig {
    /// What Linux 6.1 does under QEMU.
    pub const LINUX_6_1: Self = Self {
        queue_size: 128,
        rx: RxShape::HeaderAndPage,
        event_idx: true,
        indirect: true,
    };
    /// What Linux 6.12 does under QEMU.
    pub const LINUX_6_12: Self = Self {
        queue_size: 128,
        rx: RxShape::OnePage,
        event_idx: true,
        indirect: true,
    };
}

/// A software guest driver.
#[derive(Debug)]
pub struct Driver {
    mem: Arc<VmMemory>,
    config: DriverConfig,
    cid: u64,
    /// Buffers of the packet being sent. Empty between calls; a field so that the allocation is reused.
    buffers: Vec<Buffer>,
    /// Queue 0: packets from the host.
    pub rx: DriverQueue,
    /// Queue 1: packets to the host.
    pub tx: DriverQueue,
}

impl Driver {
    /// Sets the queues up and fills RX, as the kernel does when it probes the device.
    pub fn new(mem: Arc<VmMemory>, cid: GuestCid, config: DriverConfig) -> Self {
        let mut driver = Self::empty(mem, cid, config);
        driver.fill_rx();
        driver
    }

    /// Sets the queues up and posts nothing.
    pub fn empty(mem: Arc<VmMemory>, cid: GuestCid, config: DriverConfig) -> Self {
        let queue =
            |index| DriverQueue::new(mem.clone(), index, config.queue_size, config.event_idx);
        let (rx, tx) = (queue(RX_QUEUE), queue(TX_QUEUE));
        Self {
            mem,
            config,
            cid: cid.get(),
            buffers: Vec::new(),
            rx,
            tx,
        }
    }

    /// Returns guest memory.
    pub fn memory(&self) -> &Arc<VmMemory> {
        &self.mem
    }

    /// Returns the queues as the bus would hand them to the device.
    pub fn queues(&self) -> VirtQueues {
        VirtQueues {
            rx: self.rx.queue().into(),
            tx: self.tx.queue().into(),
            event: None,
        }
    }

    /// Posts RX buffers until no descriptors are left. Returns true if the device wants a kick.
    pub fn fill_rx(&mut self) -> bool {
        while self.post_rx() {}
        self.rx.publish()
    }

    /// Posts one RX buffer, but does not publish it. Returns false if no descriptors are left.
    pub fn post_rx(&mut self) -> bool {
        let Some(head) = self.rx.next_head() else {
            return false;
        };
        let page = memory::rx_page(head);
        match self.config.rx {
            RxShape::OnePage => {
                let buffer = Buffer {
                    addr: page,
                    len: PAGE_BYTES as u32,
                };
                self.rx.add(&[buffer], true).is_some()
            }
            RxShape::HeaderAndPage => {
                let buffers = [
                    Buffer {
                        addr: memory::header(RX_QUEUE, head),
                        len: HEADER_BYTES as u32,
                    },
                    Buffer {
                        addr: page,
                        len: PAGE_BYTES as u32,
                    },
                ];
                self.rx.add(&buffers, true).is_some()
            }
        }
    }

    /// Sends a packet: the header in a descriptor of its own, then the payload in pieces of at most `piece` bytes.
    /// Returns false when the queue is full. The device sees the packet after `tx.publish()`.
    pub fn send(&mut self, h: &PacketHeader, payload: &[u8], piece: usize) -> bool {
        let h = PacketHeader {
            len: payload.len() as u32,
            ..*h
        };
        let wire = WireHeader::new(self.cid, HOST_CID, &h);
        let Some(head) = self.tx.next_head() else {
            return false;
        };
        self.write(memory::tx_payload(head), payload);
        self.send_wire(&wire, payload.len(), piece)
    }

    /// As `send`, with `len` bytes of old data from the payload area: the measurement then has no copy by the harness.
    pub fn send_unwritten(&mut self, h: &PacketHeader, len: usize) -> bool {
        let h = PacketHeader {
            len: len as u32,
            ..*h
        };
        self.send_wire(&WireHeader::new(self.cid, HOST_CID, &h), len, len.max(1))
    }

    /// As `send`, with this header unchanged and `len` bytes of old data from the payload area.
    pub fn send_wire(&mut self, wire: &WireHeader, len: usize, piece: usize) -> bool {
        assert!(len <= PAYLOAD_MAX && piece > 0);
        let Some(head) = self.tx.next_head() else {
            return false;
        };
        let mut buffers = std::mem::take(&mut self.buffers);
        buffers.clear();
        let addr = memory::header(TX_QUEUE, head);
        self.write(addr, &wire.to_bytes());
        buffers.push(Buffer {
            addr,
            len: HEADER_BYTES as u32,
        });
        let mut offset = 0;
        while offset < len {
            let n = piece.min(len - offset);
            buffers.push(Buffer {
                addr: memory::tx_payload(head) + offset as u64,
                len: n as u32,
            });
            offset += n;
        }
        let sent = self.send_buffers(&buffers);
        self.buffers = buffers;
        sent
    }

    /// Sends a chain of exactly these buffers.
    pub fn send_buffers(&mut self, buffers: &[Buffer]) -> bool {
        let indirect =
            self.config.indirect && buffers.len() > 1 && buffers.len() <= memory::INDIRECT_MAX;
        if indirect {
            self.tx.add_indirect(buffers, false).is_some()
        } else {
            self.tx.add(buffers, false).is_some()
        }
    }

    /// Takes back the buffers of sent packets. Returns how many packets.
    pub fn reap_tx(&mut self) -> usize {
        let mut n = 0;
        while self.tx.pop_used().is_some() {
            n += 1;
        }
        n
    }

    /// Receives a packet without its payload; returns header and payload length. Posts the buffer again, but does not publish
    /// it.
    pub fn receive_header(&mut self) -> Option<(WireHeader, usize)> {
        let (head, len) = self.rx.pop_used()?;
        let header = match self.config.rx {
            RxShape::OnePage => memory::rx_page(head),
            RxShape::HeaderAndPage => memory::header(RX_QUEUE, head),
        };
        let mut bytes = [0; HEADER_BYTES];
        self.read(header, &mut bytes);
        self.post_rx();
        let len = (len as usize).saturating_sub(HEADER_BYTES);
        Some((WireHeader::from_bytes(&bytes), len))
    }

    /// Receives a packet into `payload`, which is cleared first. Posts the buffer again, but does not publish it.
    pub fn receive(&mut self, payload: &mut Vec<u8>) -> Option<WireHeader> {
        let (head, len) = self.rx.pop_used()?;
        let mut bytes = [0; HEADER_BYTES];
        let (header, body) = match self.config.rx {
            RxShape::OnePage => {
                let page = memory::rx_page(head);
                (page, page + HEADER_BYTES as u64)
            }
            RxShape::HeaderAndPage => (memory::header(RX_QUEUE, head), memory::rx_page(head)),
        };
        self.read(header, &mut bytes);
        payload.resize((len as usize).saturating_sub(HEADER_BYTES), 0);
        self.read(body, payload);
        self.post_rx();
        Some(WireHeader::from_bytes(&bytes))
    }

    /// Writes guest memory.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let first = memory::first(&self.mem);
        match first.get_slice(addr as usize, bytes.len()) {
            Ok(slice) => slice.copy_from(bytes),
            Err(_) => self
                .mem
                .write_slice(bytes, GuestAddress(addr))
                .expect("inside guest memory"),
        }
    }

    /// Reads guest memory.
    pub fn read(&self, addr: u64, bytes: &mut [u8]) {
        let first = memory::first(&self.mem);
        match first.get_slice(addr as usize, bytes.len()) {
            Ok(slice) => {
                slice.copy_to(bytes);
            }
            Err(_) => self
                .mem
                .read_slice(bytes, GuestAddress(addr))
                .expect("inside guest memory"),
        }
    }

    /// The guest's CID.
    pub fn cid(&self) -> u64 {
        self.cid
    }
}
