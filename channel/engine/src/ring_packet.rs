//! A packet's header as a carrier of ours has it, one with a region for each VM: 24 bytes, little-endian.
//!
//! | off | size | field | valid |
//! |---|---|---|---|
//! | 0 | 4 | src_port | any |
//! | 4 | 4 | dst_port | any |
//! | 8 | 4 | buf_alloc, bytes | any |
//! | 12 | 4 | fwd_cnt, bytes | see the engine |
//! | 16 | 4 | len, payload bytes | what follows, or less: the rest is padding |
//! | 20 | 2 | flags | SHUTDOWN: as virtio has them; RST: why ([`PeerReason`](crate::PeerReason)); else 0 |
//! | 22 | 1 | type | 1 |
//! | 23 | 1 | op | virtio's numbers |
//!
//! There are no CIDs: whose packet it is says the region. With the record's own header of 8 bytes a payload begins at 32,
//! and a packet without one takes half a cache line.

use crate::PacketHeader;

/// Bytes of a frame.
pub const FRAME_BYTES: usize = 24;

impl PacketHeader {
    /// The header that a frame stands for; whatever it says is the engine's to check.
    #[inline]
    pub fn from_frame(frame: &[u8; FRAME_BYTES]) -> Self {
        let [a, b, c, d, e, f] = words(frame);
        Self {
            src_port: a,
            dst_port: b,
            buf_alloc: c,
            fwd_cnt: d,
            len: e,
            flags: f & 0xffff,
            kind: (f >> 16 & 0xff) as u16,
            op: (f >> 24) as u16,
        }
    }

    /// The frame of a header of our engine, whose numbers fit.
    #[inline]
    pub fn to_frame(&self) -> [u8; FRAME_BYTES] {
        let last =
            self.flags & 0xffff | u32::from(self.kind & 0xff) << 16 | u32::from(self.op) << 24;
        let words = [
            self.src_port,
            self.dst_port,
            self.buf_alloc,
            self.fwd_cnt,
            self.len,
            last,
        ];
        let mut frame = [0; FRAME_BYTES];
        for (to, word) in frame.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        frame
    }
}

fn words(frame: &[u8; FRAME_BYTES]) -> [u32; 6] {
    core::array::from_fn(|n| {
        let bytes = core::array::from_fn(|i| frame[4 * n + i]);
        u32::from_le_bytes(bytes)
    })
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
        assert_eq!(h.to_frame(), GOLDEN);
        assert_eq!(PacketHeader::from_frame(&GOLDEN), h);
    }
}
