//! A carrier in memory: a queue of packets, a count of slots, and an eventfd as the kick.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use adit_engine::{Lane, PacketHeader, SessionChange};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv};

use crate::carrier::{
    Armed, Carrier, CarrierCaps, CarrierFault, Interest, RxPacket, TxSlot, Woken,
};

/// Maximum payload of one packet in bytes.
const PAYLOAD: usize = 4096;

pub(super) type Packet = (PacketHeader, Vec<u8>);

/// One direction: packets in transit, and slots that the receiver posted.
pub(super) struct Pipe {
    pub(super) packets: Mutex<(VecDeque<Packet>, usize)>,
    pub(super) bell: EventFd,
}

impl Pipe {
    pub(super) fn new(slots: usize) -> Arc<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Arc::new(Self {
            packets: Mutex::new((VecDeque::new(), slots)),
            bell: EventFd::from_flags(flags).unwrap(),
        })
    }
}

pub(super) struct Memory {
    pub(super) rx: Arc<Pipe>,
    pub(super) tx: Arc<Pipe>,
    pub(super) session: EventFd,
    pub(super) changes: VecDeque<SessionChange>,
    pub(super) fault: bool,
    pub(super) torn: bool,
}

pub(super) struct Rx {
    header: PacketHeader,
    body: VecDeque<u8>,
    pipe: Arc<Pipe>,
}

impl Drop for Rx {
    fn drop(&mut self) {
        // The slot is posted again.
        self.pipe.packets.lock().unwrap().1 += 1;
    }
}

impl RxPacket for Rx {
    fn header(&self) -> &PacketHeader {
        &self.header
    }
    fn remaining(&self) -> u32 {
        self.body.len() as u32
    }
    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        Ok(self.body.read(dst).unwrap())
    }
    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let mut part: VecDeque<u8> = self.body.iter().take(max as usize).copied().collect();
        let n = super::super::entry::write_held(fd, &mut part, usize::MAX)?;
        self.body.drain(..n);
        match n {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            n => Ok(n),
        }
    }
}

pub(super) struct Tx {
    body: Vec<u8>,
    pipe: Arc<Pipe>,
}

impl TxSlot for Tx {
    fn capacity(&self) -> u32 {
        PAYLOAD as u32
    }
    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault> {
        let n = src.len().min(PAYLOAD - self.body.len());
        self.body.extend_from_slice(&src[..n]);
        Ok(n)
    }
    fn read_from(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let mut buf = vec![0; (max as usize).min(PAYLOAD - self.body.len())];
        let n = recv(fd.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT)?;
        self.body.extend_from_slice(&buf[..n]);
        Ok(n)
    }
    fn commit(self, h: &PacketHeader) {
        let mut packets = self.pipe.packets.lock().unwrap();
        packets.1 -= 1;
        packets.0.push_back((*h, self.body));
        let _ = self.pipe.bell.write(1);
    }
}

impl Carrier for Memory {
    type Rx<'a> = Rx;
    type Tx<'a> = Tx;

    fn caps(&self) -> CarrierCaps {
        CarrierCaps {
            max_payload: PAYLOAD as u32,
            packet_overhead: 0,
            lanes: false,
            tells_reason: false,
            run_bytes: 64 << 10,
        }
    }
    fn begin(&mut self) {}
    fn rx(&mut self) -> Result<Option<Rx>, CarrierFault> {
        if std::mem::take(&mut self.fault) {
            return Err(CarrierFault {
                what: "test",
                value: 1,
                limit: 0,
            });
        }
        if self.torn {
            return Ok(None);
        }
        let packet = self.rx.packets.lock().unwrap().0.pop_front();
        Ok(packet.map(|(header, body)| Rx {
            header,
            body: body.into(),
            pipe: self.rx.clone(),
        }))
    }
    fn tx(&mut self, _: Lane, _: u32) -> Result<Option<Tx>, CarrierFault> {
        let free = self.tx.packets.lock().unwrap().1;
        Ok((free > 0 && !self.torn).then(|| Tx {
            body: Vec::new(),
            pipe: self.tx.clone(),
        }))
    }
    fn flush(&mut self) {
        // Slots were returned, so wake a side that waits for one.
        let _ = self.rx.bell.write(0);
        let _ = self.session.write(0);
    }
    fn arm(&mut self, interest: Interest) -> Armed {
        let rx = !self.torn && !self.rx.packets.lock().unwrap().0.is_empty();
        let tx = interest.tx && self.tx.packets.lock().unwrap().1 > 0;
        match rx || tx {
            true => Armed::WorkAppeared,
            false => Armed::Sleep,
        }
    }
    fn tear(&mut self) {
        self.torn = true;
    }
    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.rx.bell.as_fd(), 0);
        visit(self.session.as_fd(), 1);
    }
    fn woken(&mut self, id: u32) -> Woken {
        if id == 0 {
            let _ = self.rx.bell.read();
            return Woken::default();
        }
        let _ = self.session.read();
        Woken {
            session: self.changes.pop_front(),
            wakers_changed: true,
            ..Woken::default()
        }
    }
}
