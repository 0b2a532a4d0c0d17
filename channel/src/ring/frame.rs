//! What stands in front of a payload in a record of a ring: 24 bytes, little-endian.
//!
//! | off | size | field | valid |
//! |---|---|---|---|
//! | 0 | 4 | src_port | any |
//! | 4 | 4 | dst_port | any |
//! | 8 | 4 | buf_alloc, bytes | any |
//! | 12 | 4 | fwd_cnt, bytes | see the engine |
//! | 16 | 4 | len, payload bytes | what follows, or less: the rest is padding |
//! | 20 | 2 | flags | SHUTDOWN: as virtio has them; RST: why ([`PeerReason`](adit_engine::PeerReason)); else 0 |
//! | 22 | 1 | type | 1 |
//! | 23 | 1 | op | virtio's numbers |
//!
//! There are no CIDs: whose packet it is says the region. With the record's own header of 8 bytes a payload begins at 32,
//! and a packet without one takes half a cache line.

use adit_engine::PacketHeader;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a frame.
pub const FRAME_BYTES: usize = 24;

/// A frame as it lies in the ring.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Frame {
    src_port: U32,
    dst_port: U32,
    buf_alloc: U32,
    fwd_cnt: U32,
    len: U32,
    flags: U16,
    kind: u8,
    op: u8,
}

const _: () = assert!(size_of::<Frame>() == FRAME_BYTES);

impl Frame {
    /// The frame of `bytes`, which are a private copy.
    pub fn from_bytes(bytes: &[u8; FRAME_BYTES]) -> Self {
        zerocopy::transmute!(*bytes)
    }

    /// The bytes to write.
    pub fn to_bytes(self) -> [u8; FRAME_BYTES] {
        zerocopy::transmute!(self)
    }

    /// What the engine makes of it.
    pub fn header(&self) -> PacketHeader {
        PacketHeader {
            src_port: self.src_port.get(),
            dst_port: self.dst_port.get(),
            len: self.len.get(),
            kind: self.kind.into(),
            op: self.op.into(),
            flags: self.flags.get().into(),
            buf_alloc: self.buf_alloc.get(),
            fwd_cnt: self.fwd_cnt.get(),
        }
    }
}

impl From<&PacketHeader> for Frame {
    /// Of a header of our engine, whose numbers fit.
    fn from(h: &PacketHeader) -> Self {
        Self {
            src_port: h.src_port.into(),
            dst_port: h.dst_port.into(),
            buf_alloc: h.buf_alloc.into(),
            fwd_cnt: h.fwd_cnt.into(),
            len: h.len.into(),
            flags: (h.flags as u16).into(),
            kind: h.kind as u8,
            op: h.op as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; FRAME_BYTES] = [
        0x44, 0x33, 0x22, 0x11, // src_port 0x11223344
        0xe5, 0x02, 0, 0, // dst_port 741
        0x00, 0x00, 0x04, 0x00, // buf_alloc 256 KiB
        0xff, 0xff, 0xff, 0xff, // fwd_cnt
        0x00, 0x10, 0, 0, // len 4096
        0x03, 0,    // flags
        0x01, // type stream
        0x05, // op RW
    ];

    #[test]
    fn golden_bytes_both_ways() {
        let h = PacketHeader {
            src_port: 0x1122_3344,
            dst_port: 741,
            len: 4096,
            kind: 1,
            op: 5,
            flags: 3,
            buf_alloc: 256 * 1024,
            fwd_cnt: u32::MAX,
        };
        assert_eq!(Frame::from(&h).to_bytes(), GOLDEN);
        assert_eq!(Frame::from_bytes(&GOLDEN).header(), h);
    }
}
