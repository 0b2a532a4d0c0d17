//! The guest's side of one stream: the state that Linux's `virtio_transport_common.c` keeps for a connected socket.

use adit_engine::{Kind, Op, PacketHeader};

/// Credit and ports of a guest's stream.
#[derive(Clone, Copy, Debug)]
pub struct GuestStream {
    /// Port in the guest.
    pub port: u32,
    /// Port on the host.
    pub host_port: u32,
    /// The buffer size that the guest announces.
    pub buf_alloc: u32,
    fwd_cnt: u32,
    last_fwd_cnt: u32,
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

impl GuestStream {
    /// Linux's default buffer.
    pub const BUF_ALLOC: u32 = 256 * 1024;

    /// Makes a stream that is not connected yet.
    pub fn new(port: u32, host_port: u32) -> Self {
        Self {
            port,
            host_port,
            buf_alloc: Self::BUF_ALLOC,
            fwd_cnt: 0,
            last_fwd_cnt: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
        }
    }

    /// Returns the header of a packet, which also tells the host the guest's credit.
    pub fn header(&mut self, op: Op) -> PacketHeader {
        self.last_fwd_cnt = self.fwd_cnt;
        PacketHeader {
            src_port: self.port,
            dst_port: self.host_port,
            len: 0,
            kind: Kind::Stream as u16,
            op: op as u16,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Returns the header for `len` bytes of payload, which the host's credit must cover.
    pub fn payload(&mut self, len: u32) -> PacketHeader {
        self.tx_cnt = self.tx_cnt.wrapping_add(len);
        PacketHeader {
            len,
            ..self.header(Op::Rw)
        }
    }

    /// How many bytes the guest may send now. A newer Linux has no more in flight than its own buffer has room for.
    pub fn credit(&self) -> u32 {
        let most = self.peer_buf_alloc.min(self.buf_alloc);
        most.saturating_sub(self.in_flight())
    }

    /// Bytes sent that the host has not confirmed.
    pub fn in_flight(&self) -> u32 {
        self.tx_cnt.wrapping_sub(self.peer_fwd_cnt)
    }

    /// Takes the credit from the header of a host's packet, and counts its payload.
    pub fn handle(&mut self, h: &PacketHeader, payload: usize) {
        self.peer_buf_alloc = h.buf_alloc;
        self.peer_fwd_cnt = h.fwd_cnt;
        self.fwd_cnt = self.fwd_cnt.wrapping_add(payload as u32);
    }

    /// Tells whether Linux would send a credit update: the host knows of less than half of the free buffer.
    pub fn owes_credit(&self) -> bool {
        self.fwd_cnt.wrapping_sub(self.last_fwd_cnt) > self.buf_alloc / 2
    }
}
